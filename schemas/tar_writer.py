"""Write plain files into a tar that is determined by their names and contents alone, and hash it on the way.

Owner, mode and time are fixed, so that the same samples give the same bytes, and the SHA-256 takes no second read. The
format is pax, as Python's `tarfile` writes it: ustar headers, and an extended one for a name that is longer than 100
bytes or not ASCII.
"""

from __future__ import annotations

import hashlib
import tarfile
from concurrent.futures import Future, ThreadPoolExecutor
from typing import BinaryIO, Self

from zpipe.schemas.tar_file import TAR_BLOCK

RECORD = 20 * TAR_BLOCK  # a tar ends at a multiple of this
_CHUNK = 1 << 22  # bytes that are hashed and written at once
_ZEROS = bytes(RECORD)
_MAX_NAME, _MAX_SIZE = 100, 8**11 - 1  # of a plain header


def _plain_header(name: str, size: int, owner: str) -> bytes:
    info = tarfile.TarInfo(name)
    info.size, info.mode, info.uname, info.gname = size, 0o444, owner, owner
    return info.tobuf(tarfile.PAX_FORMAT)


class TarWriter:
    """Appends members to a tar. A thread of its own hashes and writes, at most `2 * _CHUNK` bytes behind `add`.

    It is a context manager that waits for this thread; the tar is whole only after `finish`.

    Args:
        file: Where to write, opened at its start.
        owner: Name of the user and of the group of each member.
    """

    def __init__(self, file: BinaryIO, owner: str) -> None:
        self._file, self._owner = file, owner
        self._template = _plain_header("", 0, owner)
        self._checksum = int(self._template[148:154], 8) - sum(b"%011o" % 0)
        self._hash = hashlib.sha256()
        self._thread = ThreadPoolExecutor(max_workers=1)
        self._writing: Future[None] | None = None
        self._pieces: list[bytes] = []
        self._held = 0
        self.size = 0
        """Number of bytes of the tar so far."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._thread.shutdown()

    def add(self, name: str, data: bytes) -> None:
        """Append a plain file of less than 8 GiB.

        Args:
            name: Its name.
            data: Its contents.

        Raises:
            OSError: What was added before could not be written.
        """
        self._append(self._header(name, len(data)), data, _ZEROS[: -len(data) % TAR_BLOCK])

    def finish(self) -> str:
        """Append the end mark, and flush the file.

        Returns:
            SHA-256 (hex) of the tar.

        Raises:
            OSError: The tar could not be written.
        """
        self._append(_ZEROS[: 2 * TAR_BLOCK])
        self._append(_ZEROS[: -self.size % RECORD])
        self._flush()
        self._wait()
        self._file.flush()
        return self._hash.hexdigest()

    def _header(self, name: str, size: int) -> bytes:
        if len(name) > _MAX_NAME or not name.isascii() or size > _MAX_SIZE:
            return _plain_header(name, size, self._owner)
        # The same bytes; but making them anew takes as long as reading the header of an image.
        octal = b"%011o" % size
        total = self._checksum + sum(name.encode()) + sum(octal)
        head = self._template
        return b"".join(
            (name.encode().ljust(_MAX_NAME, b"\0"), head[100:124], octal, head[135:148], b"%06o" % total, head[154:])
        )

    def _append(self, *pieces: bytes) -> None:
        self._pieces += pieces
        size = sum(map(len, pieces))
        self._held += size
        self.size += size
        if self._held >= _CHUNK:
            self._flush()

    def _flush(self) -> None:
        self._wait()
        self._writing = self._thread.submit(self._write, self._pieces)
        self._pieces, self._held = [], 0

    def _wait(self) -> None:
        if self._writing is not None:
            self._writing.result()

    def _write(self, pieces: list[bytes]) -> None:
        # In one piece, because each call waits for the threads that decode images to give way.
        data = b"".join(pieces)
        self._file.write(data)
        self._hash.update(data)
