"""What the extraction and training both have to know of a device: exact float32, and what an error of it means."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch

# The settings of float32 arithmetic that torch has, parents first: one that is not set follows its parent.
_BACKENDS: Any = torch.backends  # whose settings torch makes up at run time
_MATMUL: Any = _BACKENDS.cuda.matmul
_SETTINGS: tuple[Any, ...] = (
    _BACKENDS,
    _BACKENDS.cudnn,
    _MATMUL,
    _BACKENDS.cudnn.conv,
    _BACKENDS.mkldnn.matmul,
    _BACKENDS.mkldnn.conv,
)

MEMORY_TEXTS = (
    "out of memory",
    "cudaErrorMemoryAllocation",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUSOLVER_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "ALLOCATION_FAILED",  # cuDNN 9: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED
    # The allocators of the CPU raise no exception of their own. oneDNN's messages have other causes too; such an error
    # remains when the batch is down to one image.
    "can't allocate memory",
    "could not create a primitive",
    "could not create a memory object",
)
DEVICE_TEXTS = (
    "CUDA error",
    "CUDA driver error",
    "CUBLAS_STATUS_",
    "CUSOLVER_STATUS_",
    "cuDNN error",
    "CUDNN_STATUS_",
    "NCCL error",
    "Triton Error [CUDA]",
    "No CUDA GPUs are available",
)
ASSERT_TEXT = "device-side assert"

Fault = Literal["device", "assert"]


@contextmanager
def float32_arithmetic(matmul: Literal["ieee", "tf32"] = "ieee") -> Iterator[None]:
    """Compute float32 products and convolutions in float32 within the context, whatever the user has set.

    By default, torch rounds the factors of a convolution on a GPU to TF32, which has 10 bits of mantissa; and both
    `torch.set_float32_matmul_precision` and `torch.backends` can say so of matrix products. The settings are those of
    the whole process: other threads have them too. After the context they are what they were. Within it, read
    `fp32_precision` alone: torch refuses to read the older settings (`allow_tf32`) where the two disagree.

    Args:
        matmul: ``tf32`` lets matrix products on a GPU round their factors.
    """
    settings = [(each, "ieee") for each in _SETTINGS if each is not _MATMUL or matmul == "ieee"]
    if matmul != "ieee":
        settings.insert(0, (_MATMUL, matmul))  # read before its parents change, which it may follow
    before = []
    try:
        for setting, wanted in settings:
            # What follows its parent is left to do so: written back, it would not follow it any more.
            if (value := setting.fp32_precision) != wanted or wanted == matmul != "ieee":
                before.append((setting, value))
                setting.fp32_precision = wanted
        yield
    finally:
        for setting, value in reversed(before):
            setting.fp32_precision = value


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory is short, on the device or on the CPU, in any of the libraries' words."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in MEMORY_TEXTS)


def device_fault(error: BaseException) -> Fault | None:
    """What an exception says about the device; None if it is about something else, such as its memory.

    Returns:
        ``device``: the device, its driver or a library on it failed. ``assert``: a kernel refused a value, such as an
        index out of range, so the device is sound. After either, this process can't use the device any more.
    """
    if not isinstance(error, RuntimeError) or is_out_of_memory(error):
        return None
    text = str(error)
    if ASSERT_TEXT in text:
        return "assert"
    return "device" if isinstance(error, torch.AcceleratorError) or any(each in text for each in DEVICE_TEXTS) else None
