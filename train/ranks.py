"""What the processes of one training run tell each other. A process alone tells nobody anything."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from zpipe.schemas.errors import UsageError, ZpipeError

Value = TypeVar("Value")


@dataclass(frozen=True)
class Ranks:
    """This process, number `rank` of the `size` that train together in torch.distributed's default group.

    Every rank must make the same calls in the same order, or all wait for ever.
    """

    rank: int
    size: int

    @property
    def first(self) -> bool:
        """Whether this is the rank that writes files and shows progress."""
        return self.rank == 0

    @property
    def alone(self) -> bool:
        return self.size == 1

    def part(self, batch_size: int) -> int:
        """This rank's part of a batch. Errors: :class:`UsageError` when it can't be shared evenly."""
        check_batch(batch_size, self.size)
        return batch_size // self.size

    def total(self, values: Sequence[float]) -> list[float]:
        """The sum of each value over the ranks, in float64, the same bits on all of them."""
        if self.alone:
            return [float(value) for value in values]
        together = torch.tensor(values, dtype=torch.float64, device=_collective_device())
        dist.all_reduce(together)
        return together.tolist()

    def gather(self, value: Value) -> list[Value]:
        """Every rank's value."""
        if self.alone:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def from_first(self, make: Callable[[], Value]) -> Value:
        """What `make` gives on the first rank; it isn't called on the others. Its :class:`ZpipeError` is raised on all."""
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

    def share(self, model: nn.Module) -> nn.Module:
        """`model`, the means of whose gradients over the ranks are taken in the backward pass."""
        if self.alone:
            return model
        # A parameter may go without a gradient: the fine positions of a ZoomViT do when nothing is zoomed.
        devices = [torch.cuda.current_device()] if next(model.parameters()).is_cuda else None
        return DistributedDataParallel(model, device_ids=devices, find_unused_parameters=True)


def ranks() -> Ranks:
    """This process among those of torch.distributed, or alone where that isn't initialised."""
    if not dist.is_initialized():
        return Ranks(0, 1)
    return Ranks(dist.get_rank(), dist.get_world_size())


def check_batch(batch_size: int, count: int) -> None:
    """Errors: :class:`UsageError` when a batch can't be shared evenly by `count` training processes."""
    if batch_size % count:
        raise UsageError(
            f"train.batch_size {batch_size}: can't be shared evenly by {count} training processes; "
            "give a multiple, or another --num-workers"
        )


def _collective_device() -> torch.device:
    if dist.get_backend() == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")
