"""The device that a computation runs on, its memory, and the precision that it computes in."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor

from zpipe.schemas.errors import UsageError, ZpipeError

LOW_PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16}


def resolve_device(asked: str) -> torch.device:
    """A CPU or CUDA device; `auto` is CUDA when there is one.

    Errors: :class:`UsageError` for another kind of device, :class:`ZpipeError` for one that isn't there.
    """
    if asked == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(asked)
    except RuntimeError as error:
        raise UsageError(f"device {asked}: torch knows no such device; choose auto, cpu or cuda") from error
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"device {asked}: nothing here was made for it; choose auto, cpu or cuda")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ZpipeError(f"device {asked}: torch sees no CUDA device here; use --device cpu")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise ZpipeError(
            f"device {asked}: torch sees {count} CUDA devices here, cuda:0 to cuda:{count - 1}; choose one"
        )
    return device


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """The same on `device`. Out of pinned memory a copy to CUDA takes its turn there, and we don't wait for it."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def keep_freed_memory() -> None:
    """Make glibc keep what tensors on the CPU give back, for the next ones to take.

    It would return every large block to the kernel at once, and have each of its pages cleared and mapped again a moment
    later: a sixth of the time of a training step whose activations are large. What the process holds stays at its peak.
    Does nothing where the C library has no mallopt (macOS, musl).
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        m_mmap_max, m_trim_threshold = -4, -1
        mallopt(m_mmap_max, 0)
        mallopt(m_trim_threshold, 2**31 - 1)


def autocast(precision: str, device: torch.device) -> Callable[[], AbstractContextManager[Any]]:
    """What to compute under, opened anew for each batch: autocast to `precision`, or nothing for float32.

    Raises:
        UsageError: an unknown precision.
    """
    if precision == "float32":
        return nullcontext
    if precision not in LOW_PRECISIONS:
        raise UsageError(f"--precision {precision}: choose float32, {' or '.join(LOW_PRECISIONS)}")
    return partial(torch.autocast, device.type, dtype=LOW_PRECISIONS[precision])
