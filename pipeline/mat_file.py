"""A reader of the real number arrays of a MATLAB 5 file (.mat), as published with Flowers-102.

Source: "MAT-File Format", The MathWorks, "Level 5 MAT-file format". scipy reads the whole format, but its reader can
crash the process on a damaged file. Number arrays consist of few kinds of elements and need no more than this.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from zpipe.schemas.errors import ZpipeError
from zpipe.schemas.storage import read_file

_HEADER = 128  # bytes: text, then version and byte order
_MATRIX, _COMPRESSED = 14, 15
_NUMBERS = {1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 9: "f8", 12: "i8", 13: "u8"}
_NUMERIC_CLASSES = range(6, 16)  # double, single, and integers; below are cells, structs, text, sparse arrays
_COMPLEX = 0x800
_MAX_BYTES = 1 << 24  # of the file, and of what its variables unpack to, so that none can fill the memory
_MAX_DIMENSIONS = 32


def read_numbers(path: Path) -> dict[str, np.ndarray]:
    """Read the variables that are arrays of real numbers; others are left out.

    Args:
        path: The file.

    Returns:
        Name -> values, 1-D, in their stored (column-major) order and number type.

    Raises:
        ZpipeError: The file is not whole or has another format.
    """
    try:
        data = read_file(path, _MAX_BYTES)
    except OSError as error:
        remedy = "put it there" if isinstance(error, FileNotFoundError) else "fetch it again"
        raise ZpipeError(f"{path}: can't be read ({error.strerror}); {remedy}") from error
    order = {b"IM": "<", b"MI": ">"}.get(data[126:_HEADER])
    if order is None:
        raise ZpipeError(f"{path}: not a MATLAB 5 file; fetch it again")
    variables: dict[str, np.ndarray] = {}
    room = _MAX_BYTES
    try:
        for kind, content in _elements(data[_HEADER:], order):
            if kind == _COMPRESSED:
                unpacked = _unpacked(content, room)
                room -= len(unpacked)
                kind, content = next(_elements(unpacked, order), (0, b""))
            name, values = _variable(content, order) if kind == _MATRIX else ("", None)
            if values is not None:
                variables[name] = values
    except (ValueError, zlib.error) as error:
        raise ZpipeError(f"{path}: not a whole MATLAB 5 file ({error}); fetch it again") from error
    return variables


def _elements(data: bytes, order: str) -> Iterator[tuple[int, bytes]]:
    """Yield type and content of the consecutive elements of `data`."""
    place = 0
    while place < len(data):
        if len(data) - place < 8:
            raise ValueError("it ends inside a tag")
        kind, size = struct.unpack_from(f"{order}II", data, place)
        place += 8
        if kind >> 16:  # a small element: the tag contains its size and up to 4 bytes
            kind, size = kind & 0xFFFF, kind >> 16
            content, place = data[place - 4 : place][:size], place
        else:
            content = data[place : place + size]
            place += size if kind == _COMPRESSED else size + -size % 8
        if len(content) < size:
            raise ValueError("it ends inside an element")
        yield kind, content


def _unpacked(content: bytes, room: int) -> bytes:
    unpacker = zlib.decompressobj()
    data = unpacker.decompress(content, max(room, 1))
    if not unpacker.eof:
        raise ValueError(f"a variable is cut, or all together are larger than {_MAX_BYTES} bytes")
    return data


def _variable(content: bytes, order: str) -> tuple[str, np.ndarray | None]:
    """Name and values of a matrix element, whose parts are flags, dimensions, name and numbers."""
    parts = list(_elements(content, order))
    if not parts or len(parts[0][1]) != 8:
        raise ValueError("a variable has no flags")
    flags = struct.unpack(f"{order}II", parts[0][1])[0]
    if flags & 0xFF not in _NUMERIC_CLASSES or flags & _COMPLEX:
        return "", None
    if len(parts) != 4 or len(parts[1][1]) % 4 or parts[3][0] not in _NUMBERS:
        raise ValueError("a variable lacks a part")
    if len(parts[1][1]) > 4 * _MAX_DIMENSIONS:
        raise ValueError(f"a variable has more than {_MAX_DIMENSIONS} dimensions")
    (_, sizes), (_, name), (kind, numbers) = parts[1:]
    values = np.frombuffer(numbers, np.dtype(f"{order}{_NUMBERS[kind]}"))
    count = 1
    for size in np.frombuffer(sizes, np.dtype(f"{order}i4")).tolist():
        count *= size
    if len(values) != count:
        raise ValueError(f"a variable has {len(values)} values, not {count}")
    return name.decode("ascii"), values.astype(values.dtype.newbyteorder("="))
