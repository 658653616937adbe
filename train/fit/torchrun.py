"""Training in processes that torchrun started, one for each GPU, without Ray.

Every process runs the whole command: torch.distributed joins them, and the first one writes files and shows progress.
torchrun ends all of them when one fails, and with `--max-restarts` starts them again; they then resume from the run's
last checkpoint.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from zpipe.schemas.errors import UsageError, ZpipeError, last_line
from zpipe.schemas.progress import Progress, silent
from zpipe.train.device import resolve_device
from zpipe.train.ranks import is_lost_process


def is_launched() -> bool:
    """Whether torchrun started this process."""
    return dist.is_torchelastic_launched()


def is_first() -> bool:
    """Whether this is the first of torchrun's processes, or the only process."""
    return not is_launched() or os.environ["RANK"] == "0"


def run_as_rank(function: Callable[..., Any], arguments: Mapping[str, Any], device: str, progress: Progress) -> None:
    """Join the other processes, and call `train_vit` or `train_zoomer` as one of their ranks.

    Args:
        function: `train_vit` or `train_zoomer`.
        arguments: Its keyword arguments.
        device: As `TrainConfig.device`; `cuda` is the GPU with the number of this process on its machine.
        progress: Called with the progress of the training, on the first rank only.

    Raises:
        UsageError: If there are fewer GPUs than processes; else as `function`.
        ZpipeError: If another process was lost; else as `function`.
    """
    if int(os.environ["GROUP_WORLD_SIZE"]) > 1 and os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0":
        raise UsageError(
            "torchrun: --max-restarts works on one machine only; leave it out, and run the same command again to resume"
        )
    if resolve_device(device).type == "cuda":
        count, gpus = int(os.environ["LOCAL_WORLD_SIZE"]), torch.cuda.device_count()
        if count > gpus:
            raise UsageError(
                f"torchrun: started {count} processes on this machine, where torch sees {gpus} CUDA devices; give "
                f"--nproc-per-node {gpus}, or --device cpu"
            )
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        _join("nccl")
    else:
        _join("gloo")
    if _restarts():
        arguments = {**arguments, "resume": "auto"}
    try:
        function(**arguments, progress=progress if is_first() else silent)
    except RuntimeError as error:
        if not is_lost_process(error) or "DataLoader worker" in str(error):  # of which the command line says more
            raise
        raise ZpipeError(
            f"a training process or its device was lost ({last_line(error)[:200]}); run the same command again to "
            "resume"
        ) from error
    dist.destroy_process_group()


def _join(backend: str) -> None:
    if int(os.environ["GROUP_WORLD_SIZE"]) > 1:  # whose machines count their restarts apart
        dist.init_process_group(backend)
        return
    # torchrun's store outlives the processes: those that are started again must not find addresses of the dead.
    store = PrefixStore(f"zpipe/attempt-{_restarts()}", _store())
    size = int(os.environ["WORLD_SIZE"])
    dist.init_process_group(backend, store=store, rank=int(os.environ["RANK"]), world_size=size)


def _store() -> Store:
    store, _, _ = next(rendezvous("env://"))
    return store


def _restarts() -> int:
    return int(os.environ["TORCHELASTIC_RESTART_COUNT"])


@contextmanager
def first_error_alone() -> Iterator[None]:
    """Show only the error of the process that fails first; torchrun's other processes exit with code 1.

    The first one has the cause. The others fail because they miss it, or are terminated by torchrun.
    """
    if not is_launched():
        yield
        return
    store, key = _store(), f"zpipe/failures-{_restarts()}"
    try:
        yield
    except BaseException as error:
        try:
            failed = store.add(key, 1)
        except dist.DistError:  # torchrun itself has ended
            failed = 1
        if failed > 1:
            raise SystemExit(1) from error
        raise
