"""How the parts of batches travel from data-loading processes to the loader: in shared memory, or through pipes.

Shared memory is faster, but a container may have little of it, and each part in it takes file descriptors and a socket.
"""

from __future__ import annotations

import errno
import math
import os
import pickle
import resource
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import torch

from zpipe.schemas.errors import ZpipeError, last_line

SHARED_MEMORY = Path("/dev/shm")
PREFETCH = 2  # parts that a worker prepares ahead
IN_FLIGHT = PREFETCH + 2  # besides these, the part that is being merged, and the batch in use
ALIGNMENT = 64  # bytes
PIPE_DESCRIPTORS = 4  # of each worker: the queue of its tasks, and the pipes that tell of its end and its parent's
SPARE_DESCRIPTORS = 16  # for shards, maps and logs

Part = dict[str, Any]


def part_bytes(batch_size: int, image_size: int, *shapes: tuple[int, ...] | None) -> int:
    """Size of the tensors of a batch, in bytes: all its parts together.

    Args:
        batch_size: Samples in the batch.
        image_size: Side of the images, in pixels.
        shapes: Shape of a sample's tensor from each store, such as (gh, gw); None for no store.
    """
    values = sum(math.prod(shape) for shape in shapes if shape is not None)
    return batch_size * (3 * image_size**2 + 4 * values + ALIGNMENT * max(1, len(shapes)))


def shared_memory_problem(batch_bytes: int, folder: Path = SHARED_MEMORY) -> str | None:
    """Why the batches in flight don't fit into shared memory, with the remedy; None if they do."""
    needed = IN_FLIGHT * batch_bytes
    try:
        status = os.statvfs(folder)
    except OSError as error:
        return f"{folder}: {error.strerror}; mount a tmpfs there"
    free = status.f_bavail * status.f_frsize
    if free >= needed:
        return None
    return (
        f"{folder}: {_mib(free)} MiB of {_mib(status.f_blocks * status.f_frsize)} are free, the batches in flight need "
        f"{_mib(needed)}; make it larger (docker run --shm-size=1g), or lower --batch-size"
    )


def descriptor_problem(workers: int, *, shared: bool) -> str | None:
    """Why so many workers lack file descriptors, with the remedy; None if there are enough.

    Args:
        workers: Number of data-loading processes.
        shared: Whether their parts travel in shared memory, which takes a descriptor each.
    """
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    each = PIPE_DESCRIPTORS + (IN_FLIGHT if shared else 0)
    needed = _open_descriptors() + workers * each + SPARE_DESCRIPTORS
    if limit == resource.RLIM_INFINITY or needed <= limit:
        return None
    return (
        f"ulimit -n: {limit} file descriptors are allowed, {workers} data-loading processes need about {needed}; "
        "raise it, or give fewer --data-workers"
    )


def _open_descriptors() -> int:
    try:
        return len(os.listdir("/proc/self/fd"))
    except OSError:  # not Linux
        return 3


def _mib(size: int) -> str:
    return f"{size / 2**20:.3g}"


class Packer:
    """Packs the parts of one worker.

    Args:
        shared: Whether to use shared memory. Once that fails, all further parts go through the pipe.
    """

    def __init__(self, *, shared: bool) -> None:
        self._shared = shared

    def pack(self, part: Part | ZpipeError) -> Parcel:
        """Pack a part. If shared memory fails, the part's `notes` say why."""
        if isinstance(part, ZpipeError):
            return Parcel(pickle.dumps(part))
        if self._shared and part["key"]:
            try:
                return Parcel(_packed(part, shared=True))
            except (OSError, RuntimeError) as error:  # the latter is torch's
                self._shared = False
                part = part | {"notes": [*part.get("notes", ()), _sharing_failure(error)]}
        return Parcel(_packed(part, shared=False))


class Parcel:
    """A packed part. Where it is unpickled, the part itself appears, or the ZpipeError that ends the epoch."""

    # It is packed before it is queued: the queue's thread, which pickles what is queued, could not answer a failure.
    def __init__(self, content: bytes) -> None:
        self._content = content

    def __reduce__(self) -> tuple[Any, ...]:
        return _open, (self._content,)


def _packed(part: Part, *, shared: bool) -> bytes:
    """The pickled part, all its tensors in one block: in shared memory it takes one descriptor, and all or nothing."""
    places, end = {}, 0
    for name, value in part.items():
        if isinstance(value, torch.Tensor):
            # Images lie in memory as PIL leaves them, channels last; the strides of a dense tensor are kept.
            strides = torch.empty_like(value, device="meta").stride()
            places[name] = (end, value.dtype, value.shape, strides)
            end += -(-value.nbytes // ALIGNMENT) * ALIGNMENT
    block = torch.empty(0 if shared else end, dtype=torch.uint8)
    if shared:
        block.set_(torch.UntypedStorage._new_shared(end, device="cpu"))
    for name, place in places.items():
        _piece(block, *place).copy_(part[name])
    rest = {name: value for name, value in part.items() if name not in places}
    return bytes(ForkingPickler.dumps((block if shared else block.numpy(), places, rest), pickle.HIGHEST_PROTOCOL))


def _piece(
    block: torch.Tensor, start: int, dtype: torch.dtype, shape: torch.Size, strides: tuple[int, ...]
) -> torch.Tensor:
    size = shape.numel() * dtype.itemsize
    return block[start : start + size].view(dtype).as_strided(shape, strides)


def _open(content: bytes) -> Part | ZpipeError:
    try:
        packed = pickle.loads(content)
    except (OSError, RuntimeError) as error:
        if _is_out_of_descriptors(error):
            return ZpipeError("ulimit -n: too few file descriptors to receive a batch; raise it")
        raise  # torch finds out which worker died
    if isinstance(packed, ZpipeError):
        return packed
    block, places, rest = packed
    block = torch.as_tensor(block)
    return {name: _piece(block, *place) for name, place in places.items()} | rest


def _is_out_of_descriptors(error: Exception) -> bool:
    # The socket that passes descriptors drops those that don't fit, and then misses them.
    return getattr(error, "errno", None) in (errno.EMFILE, errno.ENFILE) or any(
        sign in str(error) for sign in ("Too many open files", "items of ancdata")
    )


def _sharing_failure(error: Exception) -> str:
    text = last_line(error)
    if _is_out_of_descriptors(error):
        return f"ulimit -n: too few file descriptors for shared memory ({text}); raise it"
    if "AF_UNIX path too long" in text:
        return f"TMPDIR: too long for the sockets of shared memory ({text}); set TMPDIR to a shorter path"
    if "No space left" in text:
        return f"{SHARED_MEMORY}: too small ({text}); make it larger (docker run --shm-size=1g), or lower --batch-size"
    return f"{SHARED_MEMORY}: can't be used ({text}); check it, and TMPDIR"
