"""The data-loading processes of a loader: what they need of the machine, their start and their end."""

from __future__ import annotations

import atexit
import errno
import os
import resource
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader

from zpipe.schemas.errors import ZpipeError
from zpipe.train.data.batches import PREFETCH, Part
from zpipe.train.data.worker import BatchParts, begin_worker
from zpipe.train.signals import deferred_signals

PIPE_DESCRIPTORS = 4  # of each worker: the queue of its tasks, and the pipes that tell of its end and its parent's
SPARE_DESCRIPTORS = 16  # for shards, maps and logs

_running: weakref.WeakSet[Any] = weakref.WeakSet()  # the iterators over parts


def descriptor_problem(workers: int) -> str | None:
    """Why so many workers lack file descriptors, with the remedy; None if there are enough."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    needed = _open_descriptors() + workers * PIPE_DESCRIPTORS + SPARE_DESCRIPTORS
    if limit == resource.RLIM_INFINITY or needed <= limit:
        return None
    return (
        f"ulimit -n: {limit} file descriptors are allowed, {workers} data-loading processes need about {needed}; "
        "raise it, or give fewer --data-workers"
    )


def _open_descriptors() -> int:
    try:
        return len(os.listdir("/proc/self/fd"))
    except OSError:  # not Linux
        return 3


def start_workers(dataset: BatchParts, workers: int) -> Iterator[Part | ZpipeError]:
    """Start the processes. `end_workers` ends them.

    Returns:
        Their parts of the batches, one of each process in turn.

    Raises:
        ZpipeError: If the processes can't be started, or there are too few file descriptors for so many.
    """
    if workers and (too_few := descriptor_problem(workers)):
        raise ZpipeError(too_few)
    options: dict[str, Any] = {}
    if workers:
        # Forked, they share what the loader holds: stores that are joined by image, lists of rows.
        options = {"prefetch_factor": PREFETCH, "worker_init_fn": begin_worker, "multiprocessing_context": "fork"}
    # A generator of its own: the loader does not draw from the user's.
    options |= {"collate_fn": _unchanged, "generator": torch.Generator()}
    loader = DataLoader(dataset, batch_size=None, num_workers=workers, **options)
    with deferred_signals():
        try:
            parts = iter(loader)
        except OSError as error:
            raise ZpipeError(_start_failure(workers, error)) from error
        _running.add(parts)
    return parts


def _unchanged(part: Part | ZpipeError) -> Part | ZpipeError:
    """Instead of torch's conversion to tensors, each of which would travel in shared memory of its own."""
    return part


def _start_failure(workers: int, error: OSError) -> str:
    reason = f"{workers} data-loading processes can't be started ({error.strerror or error})"
    if error.errno in (errno.EMFILE, errno.ENFILE):
        return f"{reason}; raise ulimit -n, or give fewer --data-workers"
    if error.errno in (errno.EAGAIN, errno.ENOMEM):
        return f"{reason}; give fewer --data-workers, or raise the limit of processes (ulimit -u) or of memory"
    # Their queues have semaphores, which are files in shared memory.
    return f"{reason}; check /dev/shm (docker run --shm-size=1g), or give --data-workers 0"


def end_workers(parts: Any) -> None:
    """End the processes behind an iterator over parts, also those that are blocked."""
    _running.discard(parts)
    if not hasattr(parts, "_workers"):  # the parts come from this process
        return
    # An error of torch's may hold the iterator, so its finaliser would come too late.
    parts._shutdown_workers()
    for worker in parts._workers:
        if worker.is_alive():  # it ignores SIGTERM
            worker.kill()
            worker.join()


@atexit.register
def _end_all_workers() -> None:
    """End the processes of iterators that are still in use when Python ends; multiprocessing would wait for them."""
    for parts in list(_running):
        end_workers(parts)
