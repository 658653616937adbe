"""Where the time of a training step goes."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any


class Clock:
    """Measures where the time goes: data, forward, backward (with the optimizer's step), save.

    An accelerator works asynchronously. The loop waits for the loss of the step before after the backward pass, so the
    wait counts as backward, and forward is the time that it takes to launch the work.
    """

    def __init__(self) -> None:
        self._spent: defaultdict[str, float] = defaultdict(float)

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Count the time of a `with` block."""
        begun = time.perf_counter()
        try:
            yield
        finally:
            self._spent[name] += time.perf_counter() - begun

    def of(self, name: str, items: Iterable[Any]) -> Iterator[Any]:
        """Iterate over the items, and count the time that each takes to arrive."""
        iterator = iter(items)
        while True:
            with self(name):
                item = next(iterator, None)
            if item is None:
                return
            yield item

    def shares(self) -> dict[str, float]:
        """Fractions of the time counted since the last call, as `share_data` and so on; counting starts again at 0."""
        total = sum(self._spent.values())
        shares = {f"share_{name}": self._spent[name] / total for name in ("data", "forward", "backward", "save")}
        self._spent.clear()
        return shares
