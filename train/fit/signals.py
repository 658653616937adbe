"""Ctrl-C and SIGTERM during training."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def keyboard_interrupt_guard() -> Iterator[Callable[[], None]]:
    """Yield a function that raises KeyboardInterrupt if Ctrl-C was pressed and its exception got lost.

    Python prints and drops an exception that is raised inside a finaliser or a callback from C, so a Ctrl-C at such a
    moment would have no effect. Outside the main thread, where no handler can be installed, the function does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return
    received: list[int] = []
    previous = signal.getsignal(signal.SIGINT)

    def handle(number: int, frame: FrameType | None) -> None:
        received.append(number)
        if callable(previous):
            previous(number, frame)

    def check() -> None:
        if received:
            raise KeyboardInterrupt

    signal.signal(signal.SIGINT, handle)
    try:
        yield check
    finally:
        signal.signal(signal.SIGINT, previous)


@contextmanager
def sigterm_flag() -> Iterator[Callable[[], bool]]:
    """Yield a function that tells whether SIGTERM was received in the block.

    The signal is held back in the block and delivered at its end. Outside the main thread the function returns False.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    received: list[int] = []
    previous = signal.signal(signal.SIGTERM, lambda number, frame: received.append(number))
    try:
        yield lambda: bool(received)
    finally:
        signal.signal(signal.SIGTERM, previous)
    if received:
        os.kill(os.getpid(), signal.SIGTERM)
