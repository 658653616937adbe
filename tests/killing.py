"""A run of `make-shards` that is killed in the middle."""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path


def kill_after_three_tars(args: Sequence[str], out: Path) -> int:
    """Run a command that writes tars to `out`, and kill it once three are there.

    Returns:
        The number of tars that it wrote.
    """
    running = subprocess.Popen(args, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 60
        while len(list(out.glob("*.tar"))) < 3 and time.monotonic() < deadline:
            time.sleep(0.001)
    finally:
        running.kill()
        running.wait(30)
    made = len(list(out.glob("*.tar")))
    assert running.returncode == -signal.SIGKILL and made >= 3 and not (out / "shards.json").exists()
    return made
