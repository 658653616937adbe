"""Faults of a device, provoked: a failed assertion; and a sum over several devices. It imports little but torch."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
import torch.distributed as dist

from zpipe.schemas.devices import device_fault
from zpipe.schemas.errors import first_line

REPETITIONS = 10  # of a sum over devices


@dataclass(frozen=True, kw_only=True)
class Poisoned:
    """What an index out of range did to a process."""

    message: str
    """First line of the error."""
    fault: str | None
    """What `zpipe.schemas.devices.device_fault` makes of the error."""
    usable: bool
    """Whether the process could use the device afterwards."""

    @property
    def ok(self) -> bool:
        """Whether the error was recognised; a process that goes on needs no recognition."""
        return self.fault == "assert" or self.usable


@dataclass(frozen=True, kw_only=True)
class SumConfig:
    """One process of a sum over several devices."""

    rank: int
    """Number of this process."""
    count: int
    """Number of processes."""
    meeting: str
    """A file that does not exist yet, by which they find each other."""
    size: int
    """Bytes of the buffer."""


@dataclass(frozen=True, kw_only=True)
class Sum:
    """A sum over several devices."""

    right: bool
    """Whether every element is the right one."""
    gb_per_s: float
    """Bytes that a device sends, 2 (n - 1) / n of the buffer, in GB per second."""


def poison(device: torch.device) -> Poisoned:
    """Read a row that a table does not have. On CUDA no kernel runs in this process afterwards."""
    table, index = torch.zeros(4, 2, device=device), torch.full((1,), 1000, device=device)
    try:
        table[index].sum().item()
        message, fault = "no error", None
    except (RuntimeError, IndexError) as error:
        message, fault = first_line(error), device_fault(error)
    try:
        usable = torch.ones(2, device=device).sum().item() == 2
    except RuntimeError:
        usable = False
    return Poisoned(message=message, fault=fault, usable=usable)


def is_alive(device: torch.device) -> bool:
    """Whether the device computes."""
    return torch.ones(2, device=device).sum().item() == 2


def sum_over_devices(device: torch.device, config: SumConfig) -> Sum:
    """Take part in a sum over several processes, one per device."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend, count = ("nccl" if device.type == "cuda" else "gloo"), config.count
    dist.init_process_group(backend, init_method=f"file://{config.meeting}", rank=config.rank, world_size=count)
    try:
        values = torch.full((config.size // 4,), float(config.rank + 1), device=device)
        dist.all_reduce(values)
        right = bool((values == count * (count + 1) / 2).all())
        dist.barrier()
        begun = time.perf_counter()
        for _ in range(REPETITIONS):
            dist.all_reduce(values)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds = (time.perf_counter() - begun) / REPETITIONS
    finally:
        dist.destroy_process_group()
    return Sum(right=right, gb_per_s=2 * (count - 1) / count * config.size / seconds / 1e9)
