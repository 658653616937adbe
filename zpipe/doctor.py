"""Checks of this machine: find what would make commands fail later, and say how to fix it."""

from __future__ import annotations

import importlib
import os
import platform
import shutil
import warnings
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import cast

from zpipe import limits
from zpipe.limits import Finding
from zpipe.schemas.errors import first_line

REQUIRED = (
    "torch",
    "torchvision",
    "timm",
    "webdataset",
    "ray",
    "pyarrow",
    "zarr",
    "safetensors",
    "typer",
    "matplotlib",
)
MIN_SHM_BYTES = 80 * 1024 * 1024  # Ray's smallest object store
MIN_TEMP_BYTES = 1024**3
ROOT = Path("/")


def examine(folder: Path | None = None) -> list[Finding]:
    """All findings, in the order in which they are printed.

    Args:
        folder: A folder for shards, stores or runs, to be checked too.
    """
    findings = [
        Finding(name="zpipe", value=version("zpipe")),
        Finding(
            name="python",
            value=f"{platform.python_version()} on {platform.system()} {platform.machine()}, {os.cpu_count()} CPUs",
        ),
    ]
    findings += [_package(name) for name in REQUIRED]
    findings += [
        _pillow(),
        _torch(),
        _optional("scikit-learn", "only `zpipe demo` and scenes need it"),
        limits.shared_memory(limits.SHARED_MEMORY, MIN_SHM_BYTES),
        limits.descriptors(),
        limits.sockets(),
        limits.temporary_folder(MIN_TEMP_BYTES),
        limits.memory(),
        limits.clock(),
    ]
    return findings if folder is None else findings + limits.output_folder(folder)


def _package(name: str) -> Finding:
    try:
        importlib.import_module(name)
        return Finding(name=name, value=version(name))
    except (ImportError, PackageNotFoundError, OSError, RuntimeError) as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        return Finding(name=name, value=f"can't be imported ({first}); pip install --force-reinstall {name}", ok=False)


def _optional(name: str, why: str) -> Finding:
    try:
        return Finding(name=name, value=version(name))
    except PackageNotFoundError:
        return Finding(name=name, value=f"not installed; {why}")


def _pillow() -> Finding:
    try:
        import PIL
        from PIL import Image, features
    except ImportError as error:
        remedy = "pip install --force-reinstall pillow"
        return Finding(name="PIL", value=f"can't be imported ({error}); {remedy}", ok=False)
    simd = "post" in PIL.__version__
    missing = [codec for codec in ("jpg", "zlib") if not features.check_codec(codec)]
    if missing:
        return Finding(
            name="PIL",
            value=f"{PIL.__version__} lacks {missing[0]}; install libjpeg and zlib headers, build again",
            ok=False,
        )
    build = "pillow-simd" if simd else "Pillow"
    turbo = (
        f", libjpeg-turbo {features.version_feature('libjpeg_turbo')}"
        if features.check_feature("libjpeg_turbo")
        else ""
    )
    return Finding(name="PIL", value=f"{build} {PIL.__version__}{turbo} ({Path(Image.__file__).parent})")


def _torch() -> Finding:
    try:
        import torch
    except (ImportError, OSError) as error:
        return Finding(name="torch devices", value=f"torch can't be imported ({error})", ok=False)
    with warnings.catch_warnings(record=True) as warned:  # torch warns of a driver that it can't use
        warnings.simplefilter("always")
        available = torch.cuda.is_available()
    devices = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())] if available else []
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU only"
    value = f"{', '.join(devices) or 'cpu'} (build: {build}, {torch.get_num_threads()} threads)"
    if devices or not (signs := _signs_of_a_gpu(ROOT)):
        return Finding(name="torch devices", value=value)
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    if hidden in ("", "-1"):
        return Finding(name="torch devices", value=f"{value}; CUDA_VISIBLE_DEVICES={hidden} hides the GPUs")
    if torch.version.cuda is None:
        remedy = "install a torch that is built for CUDA"
    else:
        reason = f" ({first_line(cast(Warning, warned[0].message))})" if warned else ""
        remedy = (
            f"torch can't use it{reason}; run nvidia-smi, update the driver or install a torch built for its CUDA, and "
            "start containers with --gpus all"
        )
    return Finding(name="torch devices", value=f"{value}; there is a GPU ({signs}): {remedy}", ok=False)


def missing_gpu() -> str | None:
    """Why torch can't use a GPU here, with the remedy; None if it can."""
    import torch

    found = _torch()
    if found.ok and torch.cuda.is_available():
        return None
    return f"{found.value}; run it on a machine with a GPU" if found.ok else found.value


def _signs_of_a_gpu(root: Path) -> str:
    """What says that this machine has an NVIDIA GPU; empty if nothing does."""
    driver, devices = root / "proc/driver/nvidia", sorted((root / "dev").glob("nvidia[0-9]*"))
    signs = [str(path) for path in (driver, *devices[:1]) if path.exists()]
    return ", ".join(signs + (["nvidia-smi"] if shutil.which("nvidia-smi") else []))
