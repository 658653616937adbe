"""Devices, their memory and their precision."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from zpipe.schemas.devices import float32_arithmetic
from zpipe.schemas.errors import UsageError, ZpipeError

MAX_DATA_WORKERS = 16  # more are of no use to one GPU
CPU_QUOTA = Path("/sys/fs/cgroup/cpu.max")
LOW_PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16}


def resolve_device(name: str) -> torch.device:
    """Return a CPU or CUDA device by name; `auto` is CUDA if available.

    Raises:
        UsageError: If it is a device of another kind.
        ZpipeError: If it is a CUDA device that is not available.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError(f"device {name}: torch knows no such device; choose auto, cpu or cuda") from error
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"device {name}: nothing here was made for it; choose auto, cpu or cuda")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ZpipeError(f"device {name}: torch sees no CUDA device here; use --device cpu")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise ZpipeError(f"device {name}: torch sees {count} CUDA devices here, cuda:0 to cuda:{count - 1}; choose one")
    return device


def best_precision(device: torch.device) -> Literal["bf16", "float32"]:
    """The precision to train in on a device: bf16 on a CUDA device that computes in it, else float32."""
    if device.type != "cuda":
        return "float32"
    with torch.cuda.device(device):
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"


def available_cores() -> int:
    """The CPU cores that this process may use: those of its affinity, at most those of its container's quota."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = CPU_QUOTA.read_text().split()
        return max(1, min(cores, int(quota) // int(period)))
    except (OSError, ValueError):  # another kind of cgroup, or the quota is `max`
        return cores


def data_workers_for(device: torch.device, *, processes: int = 1, on_cpu: int) -> int:
    """How many data-loading processes to start where the user gives no number.

    Args:
        device: The device that the batches are for.
        processes: The processes of this machine that start so many each. A core is left to each of them.
        on_cpu: The number for a CPU, whose cores the model uses itself.

    Returns:
        At least 1 for a CUDA device.
    """
    if device.type != "cuda":
        return on_cpu
    return max(1, min(MAX_DATA_WORKERS, available_cores() // processes - 1))


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Move a tensor to `device`; to CUDA asynchronously, through pinned memory."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def keep_freed_memory() -> None:
    """Make glibc keep the memory of freed CPU tensors for later ones.

    By default it returns every large block to the kernel at once, which then has to clear and map its pages again: a
    sixth of the time of a training step with large activations. The memory of the process stays at its peak instead.
    Without effect if the C library has no mallopt (macOS, musl).
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        m_mmap_max, m_trim_threshold = -4, -1
        mallopt(m_mmap_max, 0)
        mallopt(m_trim_threshold, 2**31 - 1)


def autocast(precision: str, device: torch.device) -> Callable[[], AbstractContextManager[Any]]:
    """Return a function that makes the context of one forward pass: autocast, or a null context for float32.

    In training, float32 is what the user made of it by torch's settings, such as TF32.

    Raises:
        UsageError: If the precision is unknown.
    """
    if precision == "float32":
        return nullcontext
    if precision not in LOW_PRECISIONS:
        raise UsageError(f"--precision {precision}: choose float32, {' or '.join(LOW_PRECISIONS)}")
    return partial(torch.autocast, device.type, dtype=LOW_PRECISIONS[precision])


def evaluation_context(precision: str, device: torch.device) -> Callable[[], AbstractContextManager[Any]]:
    """As :func:`autocast`, but float32 is never rounded to TF32: what is measured must not depend on the device."""
    return float32_arithmetic if precision == "float32" else autocast(precision, device)
