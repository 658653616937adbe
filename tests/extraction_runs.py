"""Watching an extraction that runs in a process of its own: its children, its progress, its files."""

import time
from pathlib import Path

# Settings of a teacher slow enough for a signal to arrive between the first and the last shard.
SLOWER = {"img_size": [160, 240], "depth": 12, "embed_dim": 192}


def state(root):
    """Name -> time of last change, of every file and folder."""
    return {str(path.relative_to(root)): path.stat().st_mtime_ns for path in sorted(root.rglob("*"))}


def descendants(pid):
    """The process ids below `pid`, from /proc."""
    children: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(path.read_text().rpartition(")")[2].split()[1])
        except OSError:  # the process has ended
            continue
        children.setdefault(parent, []).append(int(path.parent.name))
    found, todo = [], [pid]
    while todo:
        below = children.get(todo.pop(), [])
        found += below
        todo += below
    return found


def name_of(pid):
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    except OSError:
        return ""


def committed(out):
    return len(list(out.glob("index/shard-*.parquet")))


def wait_for(condition, seconds, running=None):
    """Poll until `condition()` holds or the process `running` has ended; returns the condition's last value."""
    deadline = time.monotonic() + seconds
    while not (met := condition()) and time.monotonic() < deadline and (running is None or running.poll() is None):
        time.sleep(0.002)
    return met
