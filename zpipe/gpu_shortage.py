"""A shortage of memory, provoked: a batch of maps that does not fit is halved, and the memory is given back."""

from __future__ import annotations

import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from zpipe.gpu_numbers import NumbersConfig, made_up_pixels, made_up_teacher
from zpipe.pipeline.explainer import ExplainConfig, Explainer, bytes_per_image
from zpipe.pipeline.stability import stability

SHORTAGE = 0.5  # of the memory of a batch remains


@dataclass(frozen=True, kw_only=True)
class Shortage:
    """What became of a batch that did not fit the memory."""

    notes: tuple[str, ...]
    """One line for each change that the explainer made, such as a lower batch size."""
    lowered: bool
    """Whether it computed fewer images at once; False if memory was not short."""
    agreement: float
    """Median rank correlation of its maps with those without a shortage."""
    kept_bytes: int | None
    """Memory of the device that is held afterwards beyond what was held before; None on a CPU."""
    taken_bytes: int
    """What the whole batch takes."""

    @property
    def ok(self) -> bool:
        """Whether memory was short, the maps are the same, and memory was given back."""
        return self.lowered and self.agreement >= 0.99 and 10 * (self.kept_bytes or 0) <= self.taken_bytes


def provoke_shortage(device: torch.device, config: NumbersConfig) -> Shortage:
    """Compute the maps of a batch with too little memory for it, and then with enough.

    The memory is limited for this process alone.
    """
    if device.type == "cpu":
        torch.set_num_threads(1)  # or its buffers of each thread hide what a batch takes
    teacher, count = made_up_teacher(config), 4 * config.images
    explain = Explainer(teacher, ExplainConfig(), batch_size=count, device=str(device))
    pixels, targets = made_up_pixels(count, config.side), np.arange(count) % teacher.num_classes

    def maps(count: int) -> np.ndarray:
        return explain.maps_of(pixels[:count], targets[:count])

    maps(1)
    if device.type == "cuda":
        maps(count)  # libraries keep working memory that they take for the first call
        held, taken = _peak_of(lambda: maps(count), device)
    else:
        # Freed main memory stays with the process, which could then use it again under the limit.
        held, taken = 0, bytes_per_image(teacher.model) * count
    with _limited(device, int(SHORTAGE * taken)):
        found = maps(count)
    lowered = explain.current_batch_size < count
    kept = torch.cuda.memory_allocated(device) - held if device.type == "cuda" else None
    notes = tuple(explain.notes)
    ranks = np.nan_to_num(stability(maps(count), found), nan=-1.0)
    agreement = float(np.median(ranks))
    return Shortage(notes=notes, lowered=lowered, agreement=agreement, kept_bytes=kept, taken_bytes=taken)


def _peak_of(run: Callable[[], object], device: torch.device) -> tuple[int, int]:
    """Bytes of a CUDA device that are held before `run`, and the most that it holds beyond them."""
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run()
    return before, torch.cuda.max_memory_allocated(device) - before


@contextmanager
def _limited(device: torch.device, more: int) -> Iterator[None]:
    """Allow this process `more` bytes beyond those that it holds."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved(device) + more) / total, device)
        try:
            yield
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0, device)
    else:
        limits = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (_status_bytes("VmSize") + more, limits[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_AS, limits)


def _status_bytes(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name + ":"))
