"""Weights in the safetensors format, with a digest: a file whose blocks were lost still opens.

The digest stands among the metadata in the header, which other programs leave alone. Files of others, and those of
earlier versions, have none; they are read as they are.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, BinaryIO

import msgspec

from zpipe.schemas.errors import ZpipeError, first_line
from zpipe.schemas.storage import open_file, storage_errors

DIGEST = "zpipe_sha256"  # its name among the metadata
NO_DIGEST = "0" * 64  # in place of the digest while it is computed, which covers the header, too
MAX_HEADER_BYTES = 100_000_000  # the limit of safetensors
BLOCK_BYTES = 1 << 20


def seal(path: Path) -> None:
    """Write the digest of a local safetensors file, saved with the metadata {DIGEST: NO_DIGEST}, into it."""
    with open(path, "r+b") as file:
        head = _read_header(file)
        at = head.index(NO_DIGEST.encode())
        digest = _digest(head, file)
        file.seek(at)
        file.write(digest.encode())


def check_digest(path: Path, remedy: str) -> None:
    """Compare the digest of a safetensors file, if it states one. It reads the file once, some 0.6 GB/s.

    Args:
        path: The file, a path or a URL.
        remedy: What to do about a damaged file.

    Raises:
        ZpipeError: The file can't be read, is no safetensors file, or is damaged.
    """
    try:
        with open_file(path) as file:
            head = _read_header(file)
            stated = _stated(head)
            if stated is None:
                return
            found = _digest(head.replace(stated.encode(), NO_DIGEST.encode(), 1), file)
    except storage_errors(ValueError, RecursionError, msgspec.MsgspecError) as error:
        raise ZpipeError(f"{path}: weights can't be read ({first_line(error)}); {remedy}") from error
    if found != stated:
        raise ZpipeError(f"{path}: weights can't be read (damaged: their digest is not the one in the file); {remedy}")


def _read_header(file: BinaryIO) -> bytes:
    """The length of the header and the header, at the start of the file."""
    length = file.read(8)
    count = int.from_bytes(length, "little")
    if len(length) < 8 or count > MAX_HEADER_BYTES:
        raise ValueError("it is no safetensors file")
    head = file.read(count)
    if len(head) < count:
        raise ValueError("it is truncated")
    return length + head


def _stated(head: bytes) -> str | None:
    fields: dict[str, Any] = msgspec.json.decode(head[8:], type=dict[str, dict[str, Any]])
    digest = fields.get("__metadata__", {}).get(DIGEST)
    return digest if isinstance(digest, str) and digest else None


def _digest(head: bytes, file: BinaryIO) -> str:
    """SHA-256 (hex) of the header and of what follows it."""
    state = hashlib.sha256(head)
    while block := file.read(BLOCK_BYTES):
        state.update(block)
    return state.hexdigest()
