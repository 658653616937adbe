"""Collectives between the processes of a training run; without effect in a single process."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from zpipe.schemas.devices import ASSERT_TEXT
from zpipe.schemas.errors import UsageError, ZpipeError

Value = TypeVar("Value")


@dataclass(frozen=True)
class Ranks:
    """This process among those that train together, torch.distributed's default process group.

    All ranks must make the same calls in the same order, or they wait for each other forever.
    """

    rank: int
    """Number of this process, from 0."""

    size: int
    """Number of processes."""

    @property
    def first(self) -> bool:
        """Whether this is rank 0, which writes files and shows progress."""
        return self.rank == 0

    @property
    def alone(self) -> bool:
        """Whether this is the only process."""
        return self.size == 1

    def part(self, batch_size: int) -> int:
        """The number of samples of a batch that this rank takes.

        Raises:
            UsageError: If the batch can't be split evenly.
        """
        check_batch(batch_size, self.size)
        return batch_size // self.size

    def total(self, values: Sequence[float]) -> list[float]:
        """The sum of each value over the ranks, in float64, bit-identical on all of them."""
        if self.alone:
            return [float(value) for value in values]
        sums = torch.tensor(values, dtype=torch.float64, device=_collective_device())
        dist.all_reduce(sums)
        return sums.tolist()

    def sum(self, values: Tensor) -> Tensor:
        """Sum a tensor over the ranks, in place; bit-identical on all of them. It doesn't wait for an accelerator.

        Args:
            values: A tensor of any shape, of the same shape on all ranks, on the device that they train on.

        Returns:
            The same tensor.
        """
        if not self.alone:
            dist.all_reduce(values)
        return values

    def gather(self, value: Value) -> list[Value]:
        """The values of all ranks, in the order of the ranks."""
        if self.alone:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def from_first(self, make: Callable[[], Value]) -> Value:
        """Call `make` on the first rank only, and return its result on all ranks.

        Raises:
            ZpipeError: On all ranks, if `make` raises it.
        """
        if self.alone:
            return make()
        outcome: list[Any] = [None, None]
        if self.first:
            try:
                outcome[0] = make()
            except ZpipeError as error:
                outcome[1] = error
        dist.broadcast_object_list(outcome, src=0)
        if outcome[1] is not None:
            raise outcome[1]
        return outcome[0]

    def share(self, model: nn.Module, *, unused_parameters: bool) -> nn.Module:
        """Wrap `model` so that its backward pass averages the gradients over the ranks, while it goes on.

        Args:
            model: The model, the same on all ranks.
            unused_parameters: Whether a step may leave parameters without a gradient. Before its backward pass, every
                step then looks for those, and gradients are sent in an order that is not that of the pass.
        """
        if self.alone:
            return model
        devices = [torch.cuda.current_device()] if next(model.parameters()).is_cuda else None
        return DistributedDataParallel(
            model, device_ids=devices, find_unused_parameters=unused_parameters, gradient_as_bucket_view=True
        )


def ranks() -> Ranks:
    """The ranks of torch.distributed, or a single one if it is not initialised."""
    if not dist.is_initialized():
        return Ranks(0, 1)
    return Ranks(dist.get_rank(), dist.get_world_size())


def local_ranks() -> int:
    """The number of training processes on this machine, which torchrun and Ray say; otherwise all are here."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 0)) or ranks().size


def is_lost_process(error: BaseException) -> bool:
    """Whether an error means that another process or a device was lost, so that starting again can help.

    gloo, torch's loader and CUDA raise plain RuntimeErrors, which only their messages distinguish from programming
    errors.
    """
    if isinstance(error, dist.DistError):
        return True
    message = str(error)
    if ASSERT_TEXT in message:  # a kernel refused a value, as it would again
        return False
    return isinstance(error, RuntimeError) and any(
        sign in message for sign in ("gloo", "Gloo", "DataLoader worker (pid", "CUDA error")
    )


def check_batch(batch_size: int, count: int) -> None:
    """Check that `count` training processes can split a batch evenly.

    Raises:
        UsageError: If they can't.
    """
    if batch_size % count:
        below = batch_size // count * count
        nearest = f"{below} or {below + count}" if below else str(count)
        raise UsageError(
            f"train.batch_size {batch_size}: can't be shared evenly by {count} training processes; give --batch-size "
            f"{nearest}, or another number of processes"
        )


def _collective_device() -> torch.device:
    if dist.get_backend() == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")
