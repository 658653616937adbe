"""A program that ends what its parent leaves running of a local Ray: the processes that write to the session's folder.

`ray_session` runs this file with the standard library alone. It waits until its standard input ends, which happens when
the parent closes it or dies in any way. Ray's agents would outlive a killed parent by a minute.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from pathlib import Path

GRACE_S = 2.0  # for processes that are ending by themselves
LIMIT_S = 10.0  # a process in an uninterruptible call can't be killed


def writers(folder: str, parent: int) -> list[int]:
    """The processes, but for `parent`, that have a file below `folder` open for writing. All of Ray's have their log.

    Their environment or command line would not do, because Ray's processes overwrite both with a title.
    """
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended, or belongs to someone else
            if int(process.name) != parent and any(_writes(file, folder) for file in (process / "fd").iterdir()):
                found.append(int(process.name))
    return found


def _writes(file: Path, folder: str) -> bool:
    return os.readlink(file).startswith(f"{folder}/") and bool(file.lstat().st_mode & 0o200)


def end(folder: str, parent: int) -> None:
    """Wait until no process writes below `folder`; kill those that still do after `GRACE_S` seconds."""
    begun = time.monotonic()
    while (left := writers(folder, parent)) and time.monotonic() - begun < LIMIT_S:
        if time.monotonic() - begun > GRACE_S:
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        time.sleep(0.1)


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # they are for the parent
    sys.stdin.buffer.read()
    end(sys.argv[1], int(sys.argv[2]))
