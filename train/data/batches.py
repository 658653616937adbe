"""The memory of batches, and how the parts of a batch become one.

Data-loading processes write images and maps to their slots of memory that they share with the loader from their fork
on, and send the rest, a few bytes a sample, through a pipe. The loader copies each batch once: to memory of its own,
which it uses again when nobody holds the batch any more.
"""

from __future__ import annotations

import math
import mmap
import weakref
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from zpipe.schemas.errors import ZpipeError, last_line

PREFETCH = 2  # parts that a worker prepares ahead
SPARE = 2  # blocks that are kept for the next batches

Part = dict[str, Any]
Arrays = Mapping[str, np.ndarray]


class Field(NamedTuple):
    """What the tensor of a name has of each sample."""

    shape: tuple[int, ...]
    dtype: np.dtype


Fields = Mapping[str, Field]


def image_field(size: int) -> Field:
    """The field of images of size x size pixels: channels last, as PIL leaves them in memory."""
    return Field((size, size, 3), np.dtype(np.uint8))


def staged_batches(workers: int) -> int:
    """Number of batches that lie in shared memory: the one being copied, and those that are prepared meanwhile.

    A data-loading process begins the next part only when the loader asks for it, which it does as it receives one. So
    none begins the batch that takes the place of another before that one was copied.
    """
    return PREFETCH + 1 if workers else 1


def stage(fields: Fields, batch_size: int) -> Arrays:
    """Memory for one batch, [batch_size, ...] for each field, shared with the processes that are forked later.

    It takes neither a file descriptor nor room in /dev/shm.

    Raises:
        ZpipeError: If there is not enough memory.
    """
    arrays = {}
    for name, (shape, dtype) in fields.items():
        values = batch_size * math.prod(shape)
        try:
            block = mmap.mmap(-1, max(1, values * dtype.itemsize))
        except OSError as error:
            raise ZpipeError(
                f"{values * dtype.itemsize / 2**20:,.0f} MiB for the {name} of a batch of {batch_size} can't be "
                f"reserved ({last_line(error)}); lower --batch-size"
            ) from error
        arrays[name] = np.frombuffer(block, dtype, values).reshape(batch_size, *shape)
    return arrays


class BatchMemory:
    """Memory for the tensors of batches, which is used again when nobody holds the tensor any more, nor a view of it.

    The kernel clears fresh memory page by page, which can take longer than the copy of a batch into it. This holds the
    memory of the batches in use, and of at most two more for each field.

    Pinned memory comes from torch, which keeps what is freed, and uses it again when the copies from it to a device
    have ended. It rounds each block up to a power of two.

    Args:
        fields: What each tensor has of a sample.
        batch_size: Most samples in a batch.
        pinned: Whether to use page-locked memory, from which copies to a CUDA device are asynchronous.
    """

    def __init__(self, fields: Fields, batch_size: int, *, pinned: bool = False) -> None:
        self._fields, self._batch_size, self._pinned = fields, batch_size, pinned
        self._free: dict[str, deque[np.ndarray]] = {name: deque(maxlen=SPARE) for name in fields}

    def empty(self, name: str, count: int) -> torch.Tensor:
        """A tensor [count, ...] of a field, with any content."""
        shape, dtype = self._fields[name]
        if self._pinned:
            return torch.empty((count, *shape), dtype=_torch_type(dtype), pin_memory=True)
        free = self._free[name]
        # Of torch, which aligns it.
        block = free.pop() if free else torch.empty((self._batch_size, *shape), dtype=_torch_type(dtype)).numpy()
        # Only the tensor's storage holds this array, and all views of the tensor hold the storage.
        held = block[:count]
        weakref.finalize(held, _give_back, weakref.ref(self), name, block)
        return torch.from_numpy(held)

    def take_back(self, name: str, block: np.ndarray) -> None:
        """Use a block for a later tensor."""
        self._free[name].append(block)


def _give_back(memory: weakref.ref[BatchMemory], name: str, block: np.ndarray) -> None:
    alive = memory()
    if alive is not None:
        alive.take_back(name, block)


def _torch_type(dtype: np.dtype) -> torch.dtype:
    return torch.from_numpy(np.empty(0, dtype)).dtype


def merge(parts: Sequence[Part], staged: Arrays, memory: BatchMemory) -> Part:
    """Join the parts of one batch, its samples in the order of their slots.

    Args:
        parts: What each data-loading process sent.
        staged: Where they wrote the batch, [batch_size, ...] for each field.
        memory: What the batch's tensors are taken from.

    Returns:
        A batch of `RelevanceLoader`, and `damaged`, a list of what was left out.
    """
    full = [part for part in parts if part["key"]] or parts[:1]
    slots = np.concatenate([part["slot"] for part in full])
    order = np.argsort(slots)
    slots = slots[order]
    whole = np.array_equal(slots, np.arange(len(slots)))  # no sample was left out
    out: Part = {"damaged": [each for part in parts for each in part["damaged"]]}
    for name, rows in staged.items():
        tensor = memory.empty(name, len(slots))
        tensor.numpy()[:] = rows[: len(slots)] if whole else rows[slots]
        out[name] = tensor.permute(0, 3, 1, 2) if name == "image" else tensor
    for name in full[0]:
        if name in ("slot", "damaged") or not all(name in part for part in full):
            continue
        if isinstance(full[0][name], list):
            values = [value for part in full for value in part[name]]
            if name == "object_boxes":
                values = [torch.from_numpy(boxes) for boxes in values]
            out[name] = [values[place] for place in order.tolist()]
        else:
            out[name] = torch.from_numpy(np.concatenate([part[name] for part in full])[order])
    return out
