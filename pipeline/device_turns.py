"""Who may use the device next, where several shards are computed at once."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from zpipe.pipeline.explainer import Launched

T = TypeVar("T")

MAX_LAUNCHED = 2  # batches: one that the device computes, and the next one


class DeviceTurns:
    """Keeps up to `MAX_LAUNCHED` batches on the device; the oldest shard that waits goes first.

    Thus a shard is computed as fast as if it were alone, the next one fills the gaps, and has begun when the first one
    is written. If they took turns, both would end at the same time, and the device would wait until both are written.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._free = MAX_LAUNCHED
        self._waiting: list[int] = []  # the ages of the shards
        # Threads that wait for the device, so that a turn ends with a batch, whatever the thread of its shard does.
        self._fetchers = ThreadPoolExecutor(MAX_LAUNCHED)

    def start(self, age: int, launch: Callable[[], Launched[T]]) -> Future[T]:
        """Launch a batch when it is its turn.

        Args:
            age: Number of its shard; lower ones go first.
            launch: Launches the batch.

        Returns:
            The future of the result of the batch.
        """
        with self._changed:
            self._waiting.append(age)
            try:
                self._changed.wait_for(lambda: self._free and age == min(self._waiting))
                self._free -= 1
            finally:
                self._waiting.remove(age)
                self._changed.notify_all()
        begun = False
        try:
            launched = launch()
            future = self._fetchers.submit(self._fetch, launched)
            begun = True
            return future
        finally:
            if not begun:
                self._end_turn()

    def _fetch(self, launched: Launched[T]) -> T:
        try:
            return launched.result()
        finally:
            self._end_turn()

    def _end_turn(self) -> None:
        with self._changed:
            self._free += 1
            self._changed.notify_all()
