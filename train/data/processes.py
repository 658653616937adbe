"""The data-loading processes of a loader: what they need of the machine, their start and their end."""

from __future__ import annotations

import atexit
import errno
import warnings
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader

from zpipe.schemas.errors import ZpipeError
from zpipe.train.data.parcel import PREFETCH, SHARED_MEMORY, Part, descriptor_problem, shared_memory_problem
from zpipe.train.data.worker import BatchParts, begin_worker
from zpipe.train.signals import deferred_signals

_running: weakref.WeakSet[Any] = weakref.WeakSet()  # the iterators over parts


def check_limits(workers: int, batch_bytes: int) -> bool:
    """Check that so many data-loading processes can be started, and whether their batches fit into shared memory.

    Args:
        workers: Number of processes; 0 to load in this one.
        batch_bytes: Size of a batch.

    Returns:
        Whether to use shared memory. If it is too small, or descriptors are too few for it, a warning says so.

    Raises:
        ZpipeError: If there are too few file descriptors for so many processes.
    """
    if not workers:
        return False
    if too_few := descriptor_problem(workers, shared=False):
        raise ZpipeError(too_few)
    problem = shared_memory_problem(batch_bytes) or descriptor_problem(workers, shared=True)
    if problem is not None:
        warn_of_pipes(problem)
    return problem is None


def warn_of_pipes(problem: str) -> None:
    """Warn that batches don't travel in shared memory, because of that problem."""
    warnings.warn(f"{problem}; until then batches go through pipes, which is slower", RuntimeWarning, stacklevel=3)


def start_workers(dataset: BatchParts, workers: int) -> Iterator[Part | ZpipeError]:
    """Start the processes. `end_workers` ends them.

    Returns:
        Their parts of the batches, one of each process in turn.

    Raises:
        ZpipeError: If the processes can't be started.
    """
    options: dict[str, Any] = {}
    if workers:
        # Forked, they share what the loader holds: stores that are joined by image, lists of rows.
        options = {"prefetch_factor": PREFETCH, "worker_init_fn": begin_worker, "multiprocessing_context": "fork"}
    # A generator of its own: the loader does not draw from the user's.
    loader = DataLoader(dataset, batch_size=None, num_workers=workers, generator=torch.Generator(), **options)
    with deferred_signals():
        try:
            parts = iter(loader)
        except OSError as error:
            raise ZpipeError(_start_failure(workers, error)) from error
        _running.add(parts)
    return parts


def _start_failure(workers: int, error: OSError) -> str:
    reason = f"{workers} data-loading processes can't be started ({error.strerror or error})"
    if error.errno in (errno.EMFILE, errno.ENFILE):
        return f"{reason}; raise ulimit -n, or give fewer --data-workers"
    if error.errno in (errno.EAGAIN, errno.ENOMEM):
        return f"{reason}; give fewer --data-workers, or raise the limit of processes (ulimit -u) or of memory"
    # Their queues have semaphores, which are files in shared memory.
    return f"{reason}; check {SHARED_MEMORY} (docker run --shm-size=1g), or give --data-workers 0"


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
