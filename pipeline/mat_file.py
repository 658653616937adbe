"""A reader of MATLAB 5 files (.mat): arrays of real numbers, as of Flowers-102, and structs, as of ImageNet's kit.

Source: "MAT-File Format", The MathWorks, "Level 5 MAT-file format". scipy reads the whole format, but its reader can
crash the process on a damaged file. What is needed consists of few kinds of elements.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from zpipe.schemas.errors import ZpipeError
from zpipe.schemas.storage import read_file

_HEADER = 128  # bytes: text, then version and byte order
_MATRIX, _COMPRESSED = 14, 15
_NUMBERS = {1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 9: "f8", 12: "i8", 13: "u8"}
_TEXTS = {2: "latin-1", 4: "utf-16-{}", 16: "utf-8", 17: "utf-16-{}", 18: "utf-32-{}"}  # codes, by their type
_STRUCT_CLASS, _CHAR_CLASS = 2, 4
_NUMERIC_CLASSES = range(6, 16)  # double, single, and integers
_COMPLEX = 0x800
MAX_MAT_BYTES = 1 << 24  # of the file, and of what its variables unpack to, so that none can fill the memory
_MAX_DIMENSIONS = 32
_MAX_NAME_BYTES = 64


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
        data = read_file(path, MAX_MAT_BYTES)
    except OSError as error:
        remedy = "put it there" if isinstance(error, FileNotFoundError) else "fetch it again"
        raise ZpipeError(f"{path}: can't be read ({error.strerror}); {remedy}") from error
    variables: dict[str, np.ndarray] = {}
    with _whole(path):
        for content, order in _matrices(data, path):
            name, values = _variable(content, order)
            if values is not None:
                variables[name] = values
    return variables


def read_structs(
    data: bytes, path: Path | str, name: str, fields: Sequence[str]
) -> list[tuple[float | str | None, ...]]:
    """Read fields of a struct array.

    Args:
        data: The file.
        path: Its name, for messages.
        name: The variable.
        fields: The fields to read.

    Returns:
        The fields of each struct, in their stored (column-major) order: a number, a text, or None for what is neither.

    Raises:
        ZpipeError: The file is not whole, has another format, or has no such variable with these fields.
    """
    with _whole(path):
        for content, order in _matrices(data, path):
            found = _structs(content, order, name)
            if found and not set(fields) - set(found[0]):
                places = [found[0].index(field) for field in fields]
                return [tuple(_scalar(row[place], order) for place in places) for row in found[1]]
    raise ZpipeError(f"{path}: has no struct array {name!r} with {', '.join(fields)}; fetch it again")


@contextmanager
def _whole(path: Path | str) -> Iterator[None]:
    try:
        yield
    except (ValueError, zlib.error) as error:
        raise ZpipeError(f"{path}: not a whole MATLAB 5 file ({error}); fetch it again") from error


def _matrices(data: bytes, path: Path | str) -> Iterator[tuple[bytes, str]]:
    """Yield the contents of the variables, and the byte order."""
    order = {b"IM": "<", b"MI": ">"}.get(data[126:_HEADER])
    if order is None:
        raise ZpipeError(f"{path}: not a MATLAB 5 file; fetch it again")
    room = MAX_MAT_BYTES
    for kind, content in _elements(data[_HEADER:], order):
        if kind == _COMPRESSED:
            unpacked = _unpacked(content, room)
            room -= len(unpacked)
            kind, content = next(_elements(unpacked, order), (0, b""))
        if kind == _MATRIX:
            yield content, order


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
        raise ValueError(f"a variable is cut, or all together are larger than {MAX_MAT_BYTES} bytes")
    return data


def _variable(content: bytes, order: str) -> tuple[str, np.ndarray | None]:
    """Name and values of a matrix element, whose parts are flags, dimensions, name and numbers."""
    parts = list(_elements(content, order))
    flags = _flags(parts, order)
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


def _structs(content: bytes, order: str, name: str) -> tuple[list[str], list[list[bytes]]] | None:
    """The names of the fields of a struct array, and the matrix elements of each struct; None for other variables."""
    parts = list(_elements(content, order))
    if _flags(parts, order) & 0xFF != _STRUCT_CLASS or len(parts) < 5 or parts[2][1] != name.encode():
        return None
    # Names have a fixed length and end with a zero byte.
    length = int.from_bytes(parts[3][1], "little" if order == "<" else "big")
    texts = parts[4][1]
    if not 0 < length <= _MAX_NAME_BYTES or len(texts) % length:
        raise ValueError("a struct array has no valid field names")
    fields = [texts[i : i + length].partition(b"\0")[0].decode("ascii") for i in range(0, len(texts), length)]
    values = [value for kind, value in parts[5:] if kind == _MATRIX]
    if not fields or len(values) != len(parts) - 5 or len(values) % len(fields):
        raise ValueError("a struct array lacks a field")
    return fields, [values[i : i + len(fields)] for i in range(0, len(values), len(fields))]


def _scalar(content: bytes, order: str) -> float | str | None:
    """The value of a field: a number, a text, or None for what is neither."""
    parts = list(_elements(content, order))
    if parts and _flags(parts, order) & 0xFF == _CHAR_CLASS and len(parts) == 4:
        kind, text = parts[3]
        return text.decode(_TEXTS.get(kind, "utf-8").format("le" if order == "<" else "be"))
    values = _variable(content, order)[1] if parts else None
    return float(values[0]) if values is not None and len(values) == 1 else None


def _flags(parts: list[tuple[int, bytes]], order: str) -> int:
    if not parts or len(parts[0][1]) != 8:
        raise ValueError("a variable has no flags")
    return int(struct.unpack(f"{order}II", parts[0][1])[0])
