"""Read the members of a tar in one pass: the one place where tars are read, for shards and for published archives.

Tars come from strangers. The standard library's reader loops on members of negative size (Python 3.11), keeps every
header in memory, and needs a time that grows with the square of the extended headers; and it takes a damaged header for
the end of the tar. Here every size is checked against a bound or the file's end before it is used, time and memory grow
with the length of the file at most, and what is not whole is an error. Formats: ustar, pax, GNU and old tars, as
Python's `tarfile`, GNU tar and bsdtar write them; no sparse files.
"""

from __future__ import annotations

import gzip
import hashlib
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple, Protocol

from zpipe.schemas.errors import ZpipeError
from zpipe.schemas.names import printable
from zpipe.schemas.storage import open_file, storage_errors

TAR_BLOCK = 512  # bytes
MAX_HEADER_BYTES = 1 << 20  # of an extended header: names, times and attributes of one member
REMEDY = "restore it or make the shards again"
MAX_MEMBER_BYTES = 1 << 30  # of a member that is read into memory
_CHUNK = 1 << 20
_REGULAR, _NO_DATA, _SPARSE = b"0\0" + b"7", b"123456", b"S"
_LONG_NAME, _LONG_LINK, _PAX, _PAX_GLOBAL = b"L", b"K", (b"x", b"X"), b"g"
_FOLDER = b"5"
_OTHER_KINDS = {
    b"\x1f\x8b": ("gzip", "gunzip"),
    b"BZh": ("bzip2", "bunzip2"),
    b"\xfd7zXZ\0": ("xz", "unxz"),
    b"\x28\xb5\x2f\xfd": ("zstd", "unzstd"),
    b"PK\x03\x04": ("zip", "unzip, then tar --sort=name"),
}


class Readable(Protocol):
    """What a tar is read from: a file, or what passes its bytes on."""

    def read(self, size: int, /) -> bytes:
        """The next bytes, none at the end."""


class Member(NamedTuple):
    """A member of a tar, other than a folder."""

    name: str
    """Its name; bytes that are no UTF-8 are surrogates."""
    data: bytes | None
    """Its first bytes, as many as were asked for; None if it is a link, a device or a FIFO."""


class ListedMember(NamedTuple):
    """Where the contents of a member of a tar lie."""

    name: str
    """Its name; bytes that are no UTF-8 are surrogates."""
    offset: int
    """Where its contents begin, counted from the start of the tar."""
    size: int
    """Its number of bytes; -1 if it is a link, a device or a FIFO."""


class Section:
    """A part of a file as a file of its own, for a tar inside a tar. The file is not to be used otherwise meanwhile.

    Args:
        file: The file.
        start: Where the part begins.
        size: Its number of bytes.
    """

    def __init__(self, file: BinaryIO, start: int, size: int) -> None:
        file.seek(start)
        self._file, self._left = file, size

    def read(self, size: int) -> bytes:
        """Read the next bytes, none at the end of the part."""
        data = self._file.read(max(0, min(size, self._left)))
        self._left -= len(data)
        return data

    def seek(self, size: int, whence: int) -> None:
        """Pass over bytes; `whence` is 1, the current place. Beyond the end there are no bytes to read."""
        self._file.seek(size, whence)
        self._left -= size


class Unzipped:
    """What a gzip file holds, up to a bound: a small one may hold any amount of zeros.

    Args:
        file: The file.
        path: Its name, for messages.
        max_bytes: The bound.
        remedy: What to do about a file that is not whole.
    """

    def __init__(self, file: gzip.GzipFile, path: Path, max_bytes: int, remedy: str) -> None:
        self._file, self._path, self._left, self._remedy = file, path, max_bytes, remedy
        self._max_bytes = max_bytes

    def read(self, size: int) -> bytes:
        """Read the next bytes. Raises :class:`ZpipeError` if the file is not whole or holds more than the bound."""
        try:
            data = self._file.read(size)
        except (zlib.error, EOFError, OSError) as error:
            raise ZpipeError(f"{self._path}: not a whole .tar.gz ({error}); {self._remedy}") from error
        self._left -= len(data)
        if self._left < 0:
            raise ZpipeError(f"{self._path}: unpacks to more than {self._max_bytes} bytes; {self._remedy}")
        return data


class HashingFile:
    """Hashes what is read from a file, so that checking the digest takes no second read."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._hash = hashlib.sha256()
        self.count = 0

    def read(self, size: int) -> bytes:
        """Read and hash the next bytes."""
        data = self._file.read(size)
        self._hash.update(data)
        self.count += len(data)
        return data

    def hexdigest(self) -> str:
        """SHA-256 (hex) of all that was read."""
        return self._hash.hexdigest()


def read_members(
    file: Readable, path: Path | str, amount: Callable[[str, int], int], *, remedy: str = REMEDY
) -> Iterator[Member]:
    """Yield the members of a tar, in order, and check that it is whole.

    Args:
        file: The tar, opened at its start. It is read to its end, with seeks only if it has a `seek`.
        path: The tar, for messages.
        amount: Says for the name and the size of a regular member how many of its first bytes to read.
        remedy: What to do about a tar that is not whole.

    Raises:
        ZpipeError: The tar is truncated, damaged or compressed, holds a sparse member or one that is too large, or
            cannot be read.
    """
    for member, _, _ in _checked(file, path, amount, remedy):
        yield member


def read_packed(
    path: Path, wanted: Callable[[str], bool], *, largest: int, max_bytes: int, remedy: str
) -> Iterator[Member]:
    """Yield the wanted members of a .tar.gz, in order, each read whole, and check that it is whole to its checksum.

    Args:
        path: The file.
        wanted: Says by its name whether a member is wanted.
        largest: Most bytes of a wanted member.
        max_bytes: Most bytes that the file may unpack to.
        remedy: What to do about a file that is not whole.

    Raises:
        ZpipeError: It cannot be read, unpacks to too much, or as for :func:`read_members`.
    """

    def amount(name: str, size: int) -> int:
        if wanted(name) and size > largest:  # so that no archive fills the memory
            raise ZpipeError(f"{path}: its {printable(name)} has {size} bytes, more than {largest}; {remedy}")
        return size if wanted(name) else 0

    try:
        packed = open_file(path)
    except OSError as error:
        raise ZpipeError(f"{path}: can't be read ({error.strerror}); {remedy}") from error
    with packed, gzip.open(packed) as unpacked:
        # The tar is read to its end, and the checksum comes after it.
        for member in read_members(Unzipped(unpacked, path, max_bytes, remedy), path, amount, remedy=remedy):
            if wanted(member.name):
                yield member


def list_members(file: Readable, path: Path | str, *, remedy: str = REMEDY) -> Iterator[ListedMember]:
    """Yield where the members of a tar lie, in order, by reading its headers only, and check that it is whole.

    Args:
        file: The tar, opened at its start. It is read to its end, with seeks if it has a `seek`.
        path: The tar, for messages.
        remedy: What to do about a tar that is not whole.

    Raises:
        ZpipeError: As :func:`read_members`.
    """
    for member, offset, size in _checked(file, path, lambda name, size: 0, remedy):
        yield ListedMember(member.name, offset, -1 if member.data is None else size)


def _checked(
    file: Readable, path: Path | str, amount: Callable[[str, int], int], remedy: str
) -> Iterator[tuple[Member, int, int]]:
    try:
        yield from _members(file, path, amount)
    except _Damaged as error:
        raise ZpipeError(f"{path}: not a whole tar ({error}); {remedy}") from error
    except storage_errors(EOFError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ZpipeError(f"{path}: can't be read ({reason}); {remedy}") from error


class _Damaged(Exception):
    pass


@dataclass(frozen=True)
class _Header:
    name: str
    kind: bytes
    size: int


def _members(file: Readable, path: Path | str, amount: Callable[[str, int], int]) -> Iterator[tuple[Member, int, int]]:
    """The members, the places of their contents in the tar, and their sizes."""
    first = True
    extended: dict[str, str] = {}  # for the next member
    place = 0
    while True:
        block = file.read(TAR_BLOCK)
        place += TAR_BLOCK
        if first and block[257:262] != b"ustar":
            _check_kind(block, path)
        first = False
        if block.count(0) == TAR_BLOCK:
            break
        if len(block) < TAR_BLOCK:
            raise _Damaged("it has no end mark: truncated or altered")
        header = _header(block)
        if header.kind in (_LONG_NAME, _LONG_LINK, _PAX_GLOBAL, *_PAX):
            text = _extended_header(file, header)
            place += header.size + -header.size % TAR_BLOCK
            if header.kind == _LONG_NAME:
                extended.setdefault("path", _text(text.partition(b"\0")[0]))
            elif header.kind in _PAX:
                extended = _pax_records(text) | extended  # as in tarfile, the first one counts
            continue
        name, size = extended.get("path", header.name), _number(extended, header.size)
        if header.kind == _SPARSE or any(key.startswith("GNU.sparse.") for key in extended):
            raise ZpipeError(f"{path}: {printable(name)} is a sparse member; make the shards again")
        extended = {}
        regular = header.kind in _REGULAR and not (header.kind == b"\0" and name.endswith("/"))
        if regular:
            wanted = min(amount(name, size), size)
            if wanted > MAX_MEMBER_BYTES:
                raise ZpipeError(
                    f"{path}: {printable(name)} has {size} bytes, more than the {MAX_MEMBER_BYTES} of a member; "
                    "make the shards again without it"
                )
            data = _read(file, wanted, name)
            _skip(file, size - wanted + -size % TAR_BLOCK, name)
            yield Member(name, data), place, size
            place += size + -size % TAR_BLOCK
        elif header.kind in _NO_DATA:
            if header.kind != _FOLDER:
                yield Member(name, None), place, 0
        elif header.kind != b"\0":  # kinds that are not known have contents
            _skip(file, size + -size % TAR_BLOCK, name)
            place += size + -size % TAR_BLOCK
    _check_end(file)


def _check_kind(block: bytes, path: Path | str) -> None:
    for signature, (kind, program) in _OTHER_KINDS.items():
        if block.startswith(signature):
            raise ZpipeError(f"{path}: is a {kind} file, and shards are plain tars; unpack it ({program})")


def _check_end(file: Readable) -> None:
    if file.read(TAR_BLOCK) != bytes(TAR_BLOCK):
        raise _Damaged("it has no end mark: truncated or altered")
    while rest := file.read(_CHUNK):
        if rest.count(0) != len(rest):
            raise _Damaged("it goes on behind its end mark, as two tars in one file do")


def _header(block: bytes) -> _Header:
    try:
        stated = _octal(block[148:156], "checksum")
    except _Damaged:
        stated = -1
    rest = block[:148] + block[156:]
    total = 256 + sum(rest)
    # Some old programs add bytes as signed numbers.
    if stated != total and stated != total - 256 * sum(byte > 127 for byte in rest):
        raise _Damaged("a header is damaged")
    name = block[:100].partition(b"\0")[0]
    prefix = block[345:500].partition(b"\0")[0] if block[257:263] == b"ustar\0" else b""
    return _Header(_text(prefix + b"/" + name if prefix else name), block[156:157], _octal(block[124:136], "size"))


def _octal(field: bytes, what: str) -> int:
    if field[0] in (0x80, 0xFF):  # GNU's binary numbers; 0xFF begins a negative one
        value = int.from_bytes(field[1:], "big") if field[0] == 0x80 else -1
    else:
        digits = field.partition(b"\0")[0].strip() or b"0"
        value = int(digits, 8) if digits.isdigit() and not set(digits) & set(b"89") else -1
    if not 0 <= value < 1 << 63:
        raise _Damaged(f"a header has no valid {what}")
    return value


def _extended_header(file: Readable, header: _Header) -> bytes:
    if header.size > MAX_HEADER_BYTES:
        raise _Damaged(f"an extended header of {header.size} bytes, more than {MAX_HEADER_BYTES}")
    text = _read(file, header.size, "an extended header")
    _skip(file, -header.size % TAR_BLOCK, "an extended header")
    return text


def _pax_records(text: bytes) -> dict[str, str]:
    """The records of a pax header that matter here, each `LENGTH KEY=VALUE` and a line break."""
    records: dict[str, str] = {}
    place = 0
    while place < len(text):
        space = text.find(b" ", place, place + 20)
        digits = text[place:space] if space >= 0 else b""
        end = place + int(digits) if digits.isdigit() else place
        key, equals, value = text[space + 1 : end - 1].partition(b"=")
        if end <= space or not equals or text[end - 1 : end] != b"\n":
            raise _Damaged("an extended header is damaged")
        if key in (b"path", b"size") or key.startswith(b"GNU.sparse."):
            records[_text(key)] = _text(value)
        place = end
    return records


def _number(extended: dict[str, str], size: int) -> int:
    text = extended.get("size")
    if text is None:
        return size
    if not (text.isascii() and text.isdigit() and len(text) < 20 and int(text) < 1 << 63):
        raise _Damaged("an extended header has no valid size")
    return int(text)


def _text(data: bytes) -> str:
    return data.decode("utf-8", "surrogateescape")


def _read(file: Readable, size: int, name: str) -> bytes:
    data = file.read(min(size, _CHUNK)) if size else b""
    if size > _CHUNK:  # piece by piece, because what a stated size allocates at once may not be there
        pieces = [data]
        left = size - len(data)
        while left and pieces[-1]:
            pieces.append(file.read(min(left, _CHUNK)))
            left -= len(pieces[-1])
        data = b"".join(pieces)
    if len(data) != size:
        raise _Damaged(f"it ends inside {printable(name)}")
    return data


def _skip(file: Readable, size: int, name: str) -> None:
    seek = getattr(file, "seek", None)
    if seek is None or size < TAR_BLOCK:
        while size:
            read = len(file.read(min(size, _CHUNK)))
            if not read:
                raise _Damaged(f"it ends inside {printable(name)}")
            size -= read
        return
    # Beyond the end there is no header, and so no end mark.
    try:
        seek(size, 1)
    except (OSError, OverflowError, ValueError) as error:  # a place that no file has
        raise _Damaged(f"it ends inside {printable(name)}") from error
