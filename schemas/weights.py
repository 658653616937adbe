"""Weights that others saved: safetensors, or what torch.save writes, read as tensors and nothing else.

Nothing in a file is run: objects of other classes than torch's own are not built, whatever they are. They may stand
beside the tensors (settings, NumPy scalars, the state of a trainer), and are left out.
"""

from __future__ import annotations

import io
import pickletools
import re
import struct
import warnings
import zipfile
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import safetensors.torch
import torch
from torch import Tensor

from zpipe.schemas.errors import ZpipeError, first_line
from zpipe.schemas.names import printable
from zpipe.schemas.storage import open_file, storage_errors

# Where training scripts keep the state dict beside other things; an average over steps is preferred.
WRAPPERS = ("state_dict_ema", "model_ema", "average", "state_dict", "model")
# What DistributedDataParallel, torch.compile, Lightning and classes around a backbone put before every name.
PREFIXES = ("module.", "_orig_mod.", "model.", "net.", "backbone.", "encoder.")
MAX_PICKLE = 64 << 20  # the names of tensors and what stands beside them; the tensors are apart
# What torch builds of the pickle in a weights file, functions and classes; of bytearray it allows any size.
_OF_TORCH = re.compile(
    r"torch\.(_utils\.|storage\.|_tensor\.|serialization\.|nn\.parameter\.|cuda\.|sparse\.)?\w+|_codecs\.encode|"
    r"collections\.(OrderedDict|Counter)|builtins\.(bytearray|complex|set)"
)


class _LeftOut:
    """Stands for an object of another class, which is not built."""

    name = ""

    def __new__(cls, *_: object) -> _LeftOut:
        return object.__new__(cls)

    def __init__(self, *_: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


def read_weights(path: Path | str) -> dict[str, Tensor]:
    """Read the tensors of a weights file to the CPU.

    The kind of file is recognised by its content. A state dict may be wrapped in a dictionary, under one of `WRAPPERS`.

    Args:
        path: The file.

    Returns:
        Tensors by name; the names are those in the file.

    Raises:
        ZpipeError: The file is absent, no weights file, damaged, or what it holds is no state dict. The cause is an
            OSError if the file could not be opened.
    """
    return _state_dict(_open(path), path)


def read_tensors(path: Path | str) -> dict[str, Tensor]:
    """Read a file as :func:`read_weights` does, or one that holds a single tensor, which gets the name ""."""
    found = _open(path)
    return _state_dict({"": found} if isinstance(found, Tensor) else found, path)


def fit_names(state: Mapping[str, Tensor], wanted: Collection[str]) -> dict[str, Tensor]:
    """Remove the usual prefixes from the names, as long as all names carry one, and none is a name of the model.

    Args:
        state: Tensors by name.
        wanted: The model's own names.
    """
    named = dict(state)
    while named and not any(name in wanted for name in named):
        prefix = next((each for each in PREFIXES if all(name.startswith(each) for name in named)), None)
        if prefix is None:
            break
        named = {name.removeprefix(prefix): value for name, value in named.items()}
    return named


def prefix_note(state: Mapping[str, Tensor]) -> str:
    """A phrase for a message about names that do not fit, if some, but not all, carry a usual prefix; else empty."""
    for prefix in PREFIXES:
        count = sum(name.startswith(prefix) for name in state)
        if 0 < count < len(state) and count * 2 > len(state):
            return f"; {count} of its {len(state)} names begin with '{prefix}': save these alone, without it"
    return ""


def is_state_dict(value: object) -> bool:
    """Whether it is a dictionary of tensors alone, with at least one."""
    return (
        isinstance(value, Mapping)
        and bool(value)
        and all(isinstance(name, str) and isinstance(each, Tensor) for name, each in value.items())
    )


def no_floats(state: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> str | None:
    """The name of the first tensor of integers or complex numbers where the model has floating-point numbers."""
    return next(
        (
            name
            for name, value in state.items()
            if name in wanted and wanted[name].is_floating_point() and not value.is_floating_point()
        ),
        None,
    )


def not_finite(state: Mapping[str, Tensor]) -> str | None:
    """The name of the first tensor that holds NaN or infinity; None if all are finite."""
    return next((name for name, value in state.items() if not value.isfinite().all()), None)


def _open(path: Path | str) -> Any:
    try:
        with open_file(path) as file:
            return _read(file, path)
    except storage_errors() as error:
        reason = getattr(error, "strerror", None) or first_line(error)
        raise ZpipeError(f"{path}: cannot be read as weights ({reason}); give a file that is there") from error


def _read(file: BinaryIO, path: Path | str) -> Any:
    head = file.read(512)
    size = file.seek(0, 2)
    file.seek(0)
    if head[8:9] == b"{":
        return _read_safetensors(head, size, path)
    if head[:4] == b"PK\x03\x04":
        return _torch_load(file, _check_zip(file, size, path), path)
    if head[:1] == b"\x80":
        return _torch_load(file, _classes_of_old(file, path), path)
    if head.startswith(b"version https://git-lfs"):
        raise _unreadable(path, "it is a Git LFS pointer", "run git lfs pull")
    kind = "it is empty" if not head else "it is a web page" if head.lstrip()[:1] == b"<" else "its content is neither"
    raise _unreadable(path, kind, "give a .safetensors file, or one that torch.save wrote (.pth, .pt, .bin, .ckpt)")


def _read_safetensors(head: bytes, size: int, path: Path | str) -> dict[str, Tensor]:
    if struct.unpack("<Q", head[:8])[0] > size - 8:
        raise _unreadable(path, f"it ends after {size} bytes, within its header", "fetch it again")
    try:
        return safetensors.torch.load_file(path)
    except safetensors.SafetensorError as error:
        cut = "incomplete metadata" in str(error).lower()
        reason = f"it is truncated or damaged: {first_line(error)}" if cut else first_line(error)
        raise _unreadable(path, reason, "fetch or save it again") from error


def _check_zip(file: BinaryIO, size: int, path: Path | str) -> set[str]:
    """Check the archive that torch.save writes; return the classes that its pickle names."""
    try:
        with zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
            pickles = [entry for entry in entries if entry.filename.rpartition("/")[2] == "data.pkl"]
            if any(entry.filename.endswith("/constants.pkl") for entry in entries):
                raise _unreadable(path, "it is a TorchScript program", "save the state_dict() of the model")
            if len(pickles) != 1:
                raise _unreadable(path, "it is an archive that torch.save did not write", "save a state_dict()")
            if any(entry.compress_type for entry in entries) or sum(entry.file_size for entry in entries) > size:
                raise _unreadable(path, "its entries are larger than the file", "save it with torch.save")
            if pickles[0].file_size > MAX_PICKLE:
                raise _unreadable(path, f"its pickle has more than {MAX_PICKLE} bytes", "save the state_dict() alone")
            # torch does not look at the checksums. Those of zero were not computed (torch.serialization has a switch).
            for entry in entries:
                if entry.CRC:
                    _check_entry(archive, entry)
            names = _classes(archive.open(pickles[0]))
    except (zipfile.BadZipFile, ArithmeticError, EOFError, RuntimeError, ValueError, struct.error) as error:
        raise _unreadable(path, f"it is truncated or damaged: {first_line(error)}", "fetch or save it again") from error
    file.seek(0)
    return names


def _check_entry(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> None:
    with archive.open(entry) as data:
        while data.read(1 << 22):
            pass


def _classes_of_old(file: BinaryIO, path: Path | str) -> set[str]:
    """The classes that the pickles at the beginning of a file name which torch.save wrote before version 1.6."""
    try:
        pickles = io.BytesIO(file.read(MAX_PICKLE))
        names = set().union(*(_classes(pickles) for _ in range(4)))  # magic number, version, system, and the object
    except (ValueError, EOFError, IndexError, struct.error) as error:
        raise _unreadable(
            path, f"it is truncated, or a pickle of another program: {first_line(error)}", _SAVE
        ) from error
    file.seek(0)
    return names


def _classes(file: Any) -> set[str]:
    names = {str(arg).replace(" ", ".", 1) for op, arg, _ in pickletools.genops(file) if op.name == "GLOBAL"}
    return {f"builtins.{name[12:]}" if name.startswith("__builtin__.") else name for name in names}


_SAVE = "fetch it again, or save the state_dict() with torch.save"


def _torch_load(file: BinaryIO, names: set[str], path: Path | str) -> Any:
    if "builtins.bytearray" in names:
        raise _unreadable(path, "its pickle calls bytearray, which may take any memory", "save the state_dict() alone")
    others = sorted((name for name in names if not _OF_TORCH.fullmatch(name)), key=lambda n: (n[:9] == "builtins.", n))
    stands_for: list[Any] = [(type("LeftOut", (_LeftOut,), {"name": name}), name) for name in others]
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals(stands_for):
            warnings.simplefilter("ignore")  # torch warns of pickles that it did not write, and then refuses them
            return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file fails anywhere in archive, pickle or tensors, each in its own way
        if others:
            reason = f"it holds objects of {', '.join(map(printable, others[:3]))}, which need pickled code"
            raise _unreadable(path, reason, "save the state_dict() alone") from error
        raise _unreadable(path, f"it is truncated or damaged: {first_line(error)}", _SAVE) from error


def _state_dict(found: Any, path: Path | str) -> dict[str, Tensor]:
    where = ""
    for _ in range(2):
        outer = found if isinstance(found, Mapping) else {}
        key = next((key for key in WRAPPERS if isinstance(outer.get(key), Mapping | _LeftOut)), None)
        if key is None:
            break
        found, where = found[key], f"{where}{key}: "
    if isinstance(found, _LeftOut):
        reason = f"{where}it is a pickled object of {printable(found.name)}, which needs its code"
        raise _unreadable(path, reason, "save its state_dict() with torch.save")
    if not isinstance(found, Mapping):
        raise _unreadable(path, f"{where}no state dict, but a {type(found).__name__}", _WRAP)
    if not found:
        raise _unreadable(path, f"{where}the state dict is empty", _WRAP)
    unnamed = [key for key in found if not isinstance(key, str)]
    if unnamed:
        raise _unreadable(path, f"{where}no state dict, it has the key {printable(unnamed[0])[:80]}, no name", _WRAP)
    odd = next((key for key in found if not isinstance(found[key], Tensor)), None)
    if odd is not None:
        kind = found[odd].name if isinstance(found[odd], _LeftOut) else type(found[odd]).__name__
        inside = [key for key in found if is_state_dict(found[key])]
        remedy = f"save its {printable(' or '.join(inside))[:80]} alone" if inside else _WRAP
        reason = f"{where}no state dict, {printable(odd)[:80]!r} holds {printable(kind)}, no tensor"
        raise _unreadable(path, reason, remedy)
    for name, value in found.items():
        if value.device.type != "cpu" or value.layout != torch.strided or value.is_quantized:
            raise _unreadable(path, f"{printable(name)[:80]} is no plain tensor", "save plain tensors")
        if value.nbytes > value.untyped_storage().nbytes():
            raise _unreadable(path, f"{printable(name)[:80]} is larger than its data", "save it contiguous")
    return {name: value.detach() for name, value in found.items()}


_WRAP = "save the state_dict() alone or under 'model'"


def _unreadable(path: Path | str, reason: str, remedy: str) -> ZpipeError:
    return ZpipeError(f"{path}: cannot be read as weights ({reason}); {remedy}")
