"""Exact float32 arithmetic whatever was set before, and what an error says about a device and its memory."""

import contextlib
import os
import subprocess
import sys
import traceback
from ast import literal_eval
from functools import partial

import pytest
import torch

from zpipe.schemas.devices import device_fault, float32_arithmetic, is_out_of_memory

READ = torch._C._get_fp32_precision_getter
PLACES = [(place, kind) for place in ("cuda", "mkldnn") for kind in ("all", "matmul", "conv")] + [("generic", "all")]


def settings():
    return {place: READ(*place) for place in PLACES}


def legacy():
    """What the older settings say; None where torch refuses to say it."""
    readers = (
        torch.get_float32_matmul_precision,
        lambda: torch.backends.cuda.matmul.allow_tf32,
        lambda: torch.backends.cudnn.allow_tf32,
    )
    found = []
    for read in readers:
        found.append(None)
        with contextlib.suppress(RuntimeError):
            found[-1] = read()
    return found


def nothing():
    pass


def legacy_flags():
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = False


def generic(value):
    torch.backends.fp32_precision = value


def each_of_them():
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    torch.backends.cudnn.conv.fp32_precision = "tf32"
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"
    torch.backends.mkldnn.conv.fp32_precision = "bf16"


def cudnn():
    torch.backends.cudnn.fp32_precision = "tf32"


def mixed():
    torch.set_float32_matmul_precision("high")
    torch.backends.fp32_precision = "tf32"
    torch.backends.cudnn.conv.fp32_precision = "ieee"


BEFORE = {
    "nothing": nothing,
    "high": lambda: torch.set_float32_matmul_precision("high"),
    "medium": lambda: torch.set_float32_matmul_precision("medium"),
    "highest": lambda: torch.set_float32_matmul_precision("highest"),
    "allow_tf32": legacy_flags,
    "generic tf32": lambda: generic("tf32"),
    "generic ieee": lambda: generic("ieee"),
    "each": each_of_them,
    "cudnn": cudnn,
    "mixed": mixed,
}


def check_settings(name):
    BEFORE[name]()
    before, before_legacy = settings(), legacy()
    for matmul in ("ieee", "tf32"):
        with contextlib.suppress(ZeroDivisionError), float32_arithmetic(matmul):
            within = settings()
            assert within.pop(("cuda", "matmul")) == matmul
            del within["mkldnn", "all"]  # nothing computes by it
            assert set(within.values()) == {"ieee"}, within
            with float32_arithmetic():
                assert READ("cuda", "matmul") == "ieee"
            assert READ("cuda", "matmul") == matmul
            raise ZeroDivisionError
        assert settings() == before, matmul
        assert legacy() == before_legacy


def check_following():
    """What followed its parent before the context follows it afterwards, as it does without the context.

    In torch 2.11, convolutions on a GPU do not follow by default, in 2.15 they do.
    """
    reader, writer = os.pipe()
    if not os.fork():  # where the context never was
        found = []
        for value in ("ieee", "tf32"):
            generic(value)
            found.append(settings())
        os.write(writer, repr(found).encode())
        os._exit(0)
    os.wait()
    for value, expected in zip(("ieee", "tf32"), literal_eval(os.read(reader, 1 << 16).decode()), strict=True):
        with float32_arithmetic():
            pass
        generic(value)
        assert settings() == expected
        assert READ("cuda", "matmul") == READ("mkldnn", "matmul") == READ("mkldnn", "conv") == value


CHECKS = {name: partial(check_settings, name) for name in BEFORE} | {"following": check_following}


def test_float32_is_exact_within_and_as_before_afterwards():
    """Each check has a process of its own, because some settings cannot be taken back to torch's default."""
    done = subprocess.run([sys.executable, __file__], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[:-1] == list(CHECKS)


# ------------------------------------------------------------------------------------------------------------- errors

TRAILER = """
CUDA kernel errors might be asynchronously reported at some other API call, so the stacktrace below might be incorrect.
For debugging consider passing CUDA_LAUNCH_BLOCKING=1"""

SHORT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 139 GiB"),
    torch.AcceleratorError("CUDA error: out of memory" + TRAILER),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
    RuntimeError("Triton Error [CUDA]: out of memory"),
    RuntimeError("cudaErrorMemoryAllocation: out of memory"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:121] . DefaultCPUAllocator: can't allocate memory: you tried to ..."),
    RuntimeError("could not create a primitive"),
    MemoryError(),
]
BROKEN = [
    torch.AcceleratorError("CUDA error: an illegal memory access was encountered" + TRAILER),
    torch.AcceleratorError("CUDA error: uncorrectable ECC error encountered" + TRAILER),
    torch.AcceleratorError("something new"),
    RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm( handle, opa, opb, m, n, k)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR"),
    RuntimeError("NCCL error in: ProcessGroupNCCL.cpp:2027, unhandled cuda error"),
    RuntimeError("Triton Error [CUDA]: unspecified launch failure"),
    RuntimeError("No CUDA GPUs are available"),
]
ASSERTED = [
    torch.AcceleratorError("CUDA error: device-side assert triggered" + TRAILER),
    RuntimeError("Triton Error [CUDA]: device-side assert triggered"),
]
OURS = [
    RuntimeError("mat1 and mat2 shapes cannot be multiplied (2x3 and 4x5)"),
    # A block of a kernel is larger than the chip has room for: no smaller batch helps.
    RuntimeError("out of resource: shared memory, Required: 262144, Hardware limit: 232448."),
    ValueError("CUDA error: out of memory"),  # a text that no library raises so
    OSError(12, "Cannot allocate memory"),
]


@pytest.mark.parametrize(
    ("errors", "memory", "fault"),
    [(SHORT_OF_MEMORY, True, None), (BROKEN, False, "device"), (ASSERTED, False, "assert"), (OURS, False, None)],
    ids=["memory", "device", "assert", "ours"],
)
def test_what_an_error_says(errors, memory, fault):
    for error in errors:
        assert is_out_of_memory(error) is memory, error
        assert device_fault(error) == fault, error


def run_checks():
    for name, check in CHECKS.items():
        print(name, flush=True)
        if not (child := os.fork()):
            status = 1
            try:
                check()
                status = 0
            except AssertionError:
                traceback.print_exc()
            os._exit(status)
        if os.waitpid(child, 0)[1]:
            sys.exit(f"{name} failed")


if __name__ == "__main__":
    run_checks()
