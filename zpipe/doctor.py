"""Checks of this machine: find what would make commands fail later, and say how to fix it."""

from __future__ import annotations

import importlib
import os
import platform
import shutil
import tempfile
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

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
MIN_SHM_BYTES = 80 * 1024 * 1024
MIN_TEMP_BYTES = 1024**3


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One line of the report."""

    name: str
    """What was checked."""
    value: str
    """The result, with the remedy if there is a problem."""
    ok: bool = True
    """False if a command would fail later."""


def examine() -> list[Finding]:
    """All findings, in the order in which they are printed."""
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
        _shm(),
        _temp(),
    ]
    return findings


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
    devices = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU only"
    return Finding(
        name="torch devices", value=f"{', '.join(devices) or 'cpu'} (build: {build}, {torch.get_num_threads()} threads)"
    )


def _shm() -> Finding:
    path = Path("/dev/shm")
    if not path.is_dir():
        return Finding(name="/dev/shm", value="absent; Ray and data-loading workers use temporary files instead")
    free = shutil.disk_usage(path).free
    if free < MIN_SHM_BYTES:
        return Finding(
            name="/dev/shm",
            value=f"{free >> 20} MiB free, Ray wants {MIN_SHM_BYTES >> 20}; docker: --shm-size=1g",
            ok=False,
        )
    return Finding(name="/dev/shm", value=f"{free >> 20} MiB free")


def _temp() -> Finding:
    # Python ignores a TMPDIR that it cannot use, but Ray and C libraries do not.
    tmpdir = os.environ.get("TMPDIR")
    folder = Path(tmpdir or "/tmp")
    try:
        folder = Path(tmpdir or tempfile.gettempdir())
        with tempfile.NamedTemporaryFile(dir=folder) as file:
            file.write(b"x" * 4096)
            file.flush()
    except OSError as error:
        return Finding(
            name="temp", value=f"{folder}: not writable ({error.strerror}); set TMPDIR to a folder that is", ok=False
        )
    free = shutil.disk_usage(folder).free
    if free < MIN_TEMP_BYTES:
        return Finding(
            name="temp",
            value=f"{folder}: {free >> 20} MiB free, Ray wants {MIN_TEMP_BYTES >> 20}; set TMPDIR",
            ok=False,
        )
    return Finding(name="temp", value=f"{folder}: writable, {free >> 30} GiB free")
