"""The Zarr v3 array of a map shard: its only writer and its only reader.

Zarr writes it. It is read without Zarr, because what a stranger's `zarr.json` may ask of Zarr has no bound: nested
codecs, millions of chunks. A map shard has one layout, one chunk and two codecs: the description is compared with that
layout, and one Blosc buffer is unpacked, whose size is known beforehand.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import numpy as np

from zpipe.schemas.errors import first_line
from zpipe.schemas.names import printable
from zpipe.schemas.storage import read_file

# Limit of what an array may unpack to, as a few kilobytes can claim to be terabytes.
MAX_MAP_BYTES = 1 << 30
CODECS = ("bytes", "blosc")
MAX_DESCRIPTION_BYTES = 1 << 20  # zarr.json has 900 bytes
BLOSC_HEADER = struct.Struct("<BBBBIII")  # versions of Blosc and of the codec, flags, type size, sizes; c-blosc 1

Size = Annotated[int, msgspec.Meta(ge=0, le=2**31)]
Shape = Annotated[tuple[Size, ...], msgspec.Meta(min_length=2, max_length=4)]


@dataclass(frozen=True, kw_only=True)
class _Chunks:
    chunk_shape: Shape


@dataclass(frozen=True, kw_only=True)
class _Grid:
    name: Literal["regular"]
    configuration: _Chunks


@dataclass(frozen=True, kw_only=True)
class _Separator:
    separator: Literal["/"] = "/"


@dataclass(frozen=True, kw_only=True)
class _Keys:
    name: Literal["default"]
    configuration: _Separator = field(default_factory=_Separator)


@dataclass(frozen=True, kw_only=True)
class _Codec:
    name: str
    configuration: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class _Description:
    """`zarr.json`. What it says beside these fields changes no value."""

    zarr_format: Literal[3]
    node_type: Literal["array"]
    shape: Shape
    data_type: Literal["float16", "int32"]
    chunk_grid: _Grid
    chunk_key_encoding: _Keys
    fill_value: Annotated[float, msgspec.Meta(ge=0, le=0)]
    codecs: tuple[_Codec, ...]
    storage_transformers: Annotated[tuple[str, ...], msgspec.Meta(max_length=0)] = ()


def chunk_name(axes: int) -> str:
    """Name of the chunk of an array with so many axes, below the folder of the array: ``c/0/0/0`` for maps."""
    return "/".join(["c", *"0" * axes])


def write_array(path: Path, stored: np.ndarray, key_index: str) -> None:
    """Write maps as an array of one chunk, in a new local folder.

    Args:
        path: The folder.
        stored: float16 or int32 [n, ...], such as maps [n, gh, gw].
        key_index: Relative path of the index, for other readers.
    """
    import zarr
    from zarr.codecs import BloscCodec

    array = zarr.create_array(
        store=str(path),
        shape=stored.shape,
        chunks=stored.shape,
        dtype=stored.dtype.name,
        # Shuffling puts bytes of equal significance together: float16 exponents compress, mantissas hardly do.
        compressors=BloscCodec(cname="zstd", clevel=5, shuffle="shuffle", typesize=stored.dtype.itemsize),
        fill_value=stored.dtype.type(0),
        attributes={"key_index": key_index},
        config={"write_empty_chunks": True},  # maps of zeros shall not look like a lost chunk
    )
    array[:] = stored


def read_array(path: Path) -> tuple[np.ndarray, bool]:
    """Read the tensors of a shard, float16 or int32 [n, ...]; maps are float16 [n, gh, gw].

    Returns:
        The maps, and whether their chunk is there. Where it is not, they are zeros, as Zarr has it.

    Raises:
        ValueError: A file is not what zpipe writes, or larger than :data:`MAX_MAP_BYTES` unpacked.
        OSError: A file can't be read; also the exceptions of `storage_errors`.
    """
    shape, dtype = _described(read_file(path / "zarr.json", MAX_DESCRIPTION_BYTES))
    size = math.prod(shape) * dtype.itemsize
    try:
        data = read_file(path / chunk_name(len(shape)), size + BLOSC_HEADER.size)
    except FileNotFoundError:
        return np.zeros(shape, dtype), False
    return _unpacked(data, size, dtype).reshape(shape), True


def _described(data: bytes) -> tuple[Shape, np.dtype]:
    try:
        description = msgspec.json.decode(data, type=_Description)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise ValueError(f"zarr.json describes no array of maps: {first_line(error)}") from error
    shape, chunk = description.shape, description.chunk_grid.configuration.chunk_shape
    dtype = np.dtype(description.data_type)
    if max(math.prod(shape), math.prod(chunk)) * dtype.itemsize > MAX_MAP_BYTES:
        raise ValueError(f"{dtype} {shape} is no shard of maps below {MAX_MAP_BYTES >> 20} MiB")
    if chunk != shape:
        raise ValueError(f"its chunks are {chunk}, not one of {shape}")
    names = [printable(codec.name)[:40] for codec in description.codecs]
    if names != list(CODECS):  # a Blosc buffer says itself how to unpack it
        odd = next((name for name in names if name not in CODECS), " and ".join(names[:4]))
        raise ValueError(f"its codec {odd} is not one of a relevance store")
    if description.codecs[0].configuration.get("endian") != "little":
        raise ValueError("its bytes are not little-endian")
    return shape, dtype


def _unpacked(data: bytes, size: int, dtype: np.dtype) -> np.ndarray:
    """The values of a Blosc buffer that must unpack to `size` bytes."""
    from numcodecs import blosc

    if len(data) < BLOSC_HEADER.size:
        raise ValueError("its chunk is cut off")
    *_, unpacked, _, packed = BLOSC_HEADER.unpack_from(data)
    if (unpacked, packed) != (size, len(data)):
        raise ValueError(f"its chunk claims {packed} bytes for {unpacked}, it has {len(data)} for {size}")
    values = np.empty(size // dtype.itemsize, dtype.newbyteorder("<"))
    try:
        blosc.decompress(data, values)
    except RuntimeError as error:
        raise ValueError(f"its chunk can't be unpacked: {first_line(error)}") from error
    return values.astype(dtype, copy=False)
