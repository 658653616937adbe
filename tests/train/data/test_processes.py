"""Data-loading processes end when they must: with their parent, when they hang, and when Python ends."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time

from ramps import keys_of
from torch.utils.data import _utils

from zpipe.train.data import join
from zpipe.train.data.loader import RelevanceLoader

BEGIN = """
import multiprocessing, os, sys, time
import torch
torch.set_num_threads(1)
from zpipe.train.data.loader import RelevanceLoader
loader = RelevanceLoader(sys.argv[1], batch_size=4, image_size=224, num_workers=2)
batches = iter(loader)
next(batches)
print(*(process.pid for process in multiprocessing.active_children()), flush=True)
"""


def begin(data, then):
    line = [sys.executable, "-W", "ignore", "-c", BEGIN + then, str(data[0])]
    running = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    workers = [int(word) for word in running.stdout.readline().split()]
    assert len(workers) == 2
    return running, workers


def alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def gone(pids, limit=30):
    end = time.monotonic() + limit
    while any(map(alive, pids)) and time.monotonic() < end:
        time.sleep(0.05)
    return not any(map(alive, pids))


def test_a_parent_that_is_killed_leaves_no_orphans(data):
    """Not even those that wait for somebody to read what they send."""
    running, workers = begin(data, "time.sleep(600)")
    assert all(map(alive, workers))
    time.sleep(0.5)  # they fill their queues
    running.kill()
    running.communicate(timeout=30)
    assert gone(workers)


def test_python_ends_while_a_loader_is_in_use(data):
    """They ignore the signal by which multiprocessing ends processes."""
    running, workers = begin(data, "")
    _, told = running.communicate(timeout=60)
    assert running.returncode == 0 and not told and gone(workers)


def test_they_ignore_what_a_group_is_sent(data):
    loader = RelevanceLoader(data[0], batch_size=2, image_size=8, num_workers=2)
    batches = iter(loader)
    first = next(batches)
    workers = multiprocessing.active_children()
    for worker in workers:
        for number in (signal.SIGTERM, signal.SIGINT):
            os.kill(worker.pid, number)
    rest = keys_of(batches)
    assert len(workers) == 2 and len(first["key"]) + len(rest) == 24
    assert gone([worker.pid for worker in workers])


def test_one_that_hangs_is_ended_with_its_loader(data, tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "fifo")
    read_tar = join.read_tar

    def blocked(shard, **options):
        if shard.path.name != "shard-00000.tar":
            open(tmp_path / "fifo").close()
        return read_tar(shard, **options)

    monkeypatch.setattr(join, "read_tar", blocked)
    monkeypatch.setattr(_utils, "MP_STATUS_CHECK_INTERVAL", 0.2)
    loader = RelevanceLoader(data[0], batch_size=2, image_size=8, num_workers=1, augment="eval")
    batches = iter(loader)
    next(batches)
    (worker,) = multiprocessing.active_children()
    batches.close()
    assert gone([worker.pid], limit=1)
