"""Ctrl-C and SIGTERM, held back where they would do harm."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)
# What sends a signal to a process group often sends it to the process too.
REPEAT_S = 0.5


def _deliver(number: int, handler: Any) -> None:
    """Do what a signal does under that handler."""
    if callable(handler):
        # Not by a new signal, which would count as the second one that ends a command at once.
        handler(number, None)
    elif handler == signal.SIG_DFL:
        signal.raise_signal(number)


def _may_handle() -> bool:
    """Whether handlers can be installed. During the shutdown of Python there is none that could be restored."""
    in_main = threading.current_thread() is threading.main_thread()
    return in_main and all(signal.getsignal(number) is not None for number in STOP_SIGNALS)


@contextmanager
def deferred_signals() -> Iterator[None]:
    """Deliver a Ctrl-C or SIGTERM that comes during the block, which starts or ends processes, after it.

    Python prints and drops an exception that is raised in a fork's hooks or in a finaliser.
    """
    if not _may_handle():
        yield
        return
    received: list[int] = []
    previous = {number: signal.signal(number, lambda number, frame: received.append(number)) for number in STOP_SIGNALS}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    if received:
        _deliver(received[0], previous[signal.Signals(received[0])])


@contextmanager
def stop_flag() -> Iterator[Callable[[], bool]]:
    """Yield a function that tells whether Ctrl-C or SIGTERM was received in the block.

    The signal is held back, and delivered at the end of the block. A second one is delivered at once. Outside the main
    thread, where no handler can be installed, the function returns False.
    """
    if not _may_handle():
        yield lambda: False
        return
    received: list[tuple[int, float]] = []

    def handle(number: int, frame: FrameType | None) -> None:
        received.append((number, time.monotonic()))
        handler = previous[signal.Signals(number)]
        if getattr(handler, "ends_at_second", False):  # the command line's, which counts signals by itself
            return
        if received[-1][1] - received[0][1] > REPEAT_S:
            restore()
            _deliver(number, handler)

    def restore() -> None:
        for number, handler in previous.items():
            signal.signal(number, handler)

    previous = {number: signal.signal(number, handle) for number in STOP_SIGNALS}
    try:
        yield lambda: bool(received)
    finally:
        restore()
    if received:
        _deliver(received[0][0], previous[signal.Signals(received[0][0])])
