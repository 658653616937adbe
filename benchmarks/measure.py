"""Time and peak memory of a call, on the CPU or a CUDA device; what the benchmarks share."""

from __future__ import annotations

import ctypes
import time
from pathlib import Path

import torch


def seconds(run, device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    begun = time.perf_counter()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begun


def peak_bytes(run, device: str) -> int:
    """Most memory held during `run()` beyond what was held before it."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # or what earlier runs freed, and the process kept, would count as held
    Path("/proc/self/clear_refs").write_text("5")  # sets the process's high-water mark back to what it holds now
    before = status_bytes("VmRSS")
    run()
    return status_bytes("VmHWM") - before


def status_bytes(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name + ":"))
