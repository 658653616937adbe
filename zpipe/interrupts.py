"""Ctrl-C and SIGTERM of a command: the first one asks it to stop, a second one ends it at once."""

from __future__ import annotations

import atexit
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

_watched_by: int | None = None  # the process whose signals are watched


class Terminated(BaseException):
    """SIGTERM was received; like Ctrl-C, it ends the command."""


@contextmanager
def stoppable() -> Iterator[None]:
    """Raise KeyboardInterrupt on Ctrl-C and :class:`Terminated` on SIGTERM, once; end the process at the second signal.

    Python runs signal handlers only when its main thread comes back from what it does, and a thread that reads a dead
    mount or a pipe without a writer doesn't. So a thread of its own counts the signals. After the first one it stays
    until the process has ended.

    Processes that are forked meanwhile just end. Outside the main thread nothing is changed.
    """
    global _watched_by
    if threading.current_thread() is not threading.main_thread() or _watched_by == os.getpid():
        yield
        return
    from zpipe.train.signals import STOP_SIGNALS

    received: list[int] = []
    ours = os.getpid()

    def handle(number: int, frame: object) -> None:
        if os.getpid() != ours:
            os._exit(128 + number)
        received.append(number)
        if len(received) == 1:
            raise Terminated if number == signal.SIGTERM else KeyboardInterrupt

    handle.ends_at_second = True  # type: ignore[attr-defined]  # what stacks a handler on this one leaves that to it
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    handlers = {number: signal.signal(number, handle) for number in STOP_SIGNALS}
    wakeup = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    _watched_by = ours
    threading.Thread(target=_watch, args=(reader,), daemon=True).start()
    try:
        yield
    finally:
        if not received:
            signal.set_wakeup_fd(wakeup)
            _watched_by = None
            for number, handler in handlers.items():
                signal.signal(number, handler)
            os.close(writer)


def _watch(reader: int) -> None:
    """Read the numbers of signals as they arrive, until the writing end is closed."""
    from zpipe.train.signals import REPEAT_S, STOP_SIGNALS

    first: float | None = None
    while numbers := os.read(reader, 1):
        if numbers[0] not in STOP_SIGNALS:
            continue
        now = time.monotonic()
        if first is None:
            first = now
        elif now - first > REPEAT_S:
            _end_at_once(numbers[0])
    os.close(reader)


def _end_at_once(number: int) -> None:
    shown = b"\x1b[?25h\n" if sys.stderr.isatty() else b""  # a progress bar hides the cursor
    os.write(2, shown + b"error: ended at once by a second signal; run the same command again to resume\n")
    os._exit(128 + number)


def _leave_signals_to_parent() -> None:
    """In a forked process: its signals are not those of the command."""
    if _watched_by is not None:
        signal.set_wakeup_fd(-1)


def _ignore_late_signals() -> None:
    """While Python ends, it gives handled signals back to the system, which would replace the command's exit code."""
    if _watched_by == os.getpid():
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)


os.register_at_fork(after_in_child=_leave_signals_to_parent)
atexit.register(_ignore_late_signals)  # early, so that it runs after the clean-up of libraries, which may hang
