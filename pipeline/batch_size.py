"""How many images are computed at once, where the memory of the device may be short for a while or for good."""

from __future__ import annotations

from collections import Counter

GROW_AFTER = 8  # batches in a row that fit, before a larger one is tried
MAX_FAILURES = 2  # of one size, before it is not tried any more


class BatchSize:
    """A batch size that is halved when memory is short, and doubled again once batches have fitted for a while.

    Args:
        most: The size to begin with, which is never exceeded.

    Attributes:
        size: The current size.
    """

    def __init__(self, most: int) -> None:
        self.size = most
        self._most = most
        self._fitted = 0
        self._failures: Counter[int] = Counter()

    def fitted(self, count: int) -> None:
        """A batch of `count` images has been computed."""
        if count < self.size or self.size == self._most:
            return
        self._fitted += 1
        if self._fitted == GROW_AFTER:
            self.size, self._fitted = min(2 * self.size, self._most), 0

    def failed(self, count: int) -> str:
        """A batch of `count` images, two at least, did not fit; returns what becomes of the size, for a note."""
        self._failures[count] += 1
        self.size, self._fitted = count // 2, 0
        if self._failures[count] < MAX_FAILURES:
            return f"lowered to {self.size}"
        self._most = self.size  # or it would fail again and again
        return f"{self.size} from now on"
