"""Our JSON files: their header, their types, and the check of which files this zpipe reads.

Every JSON file of ours, and every checkpoint, states `format` (a name) and `version` (a whole number). The version
changes when a reader of the previous one would misread the file; tests/schemas/test_formats.py reads an example of each
version. The content is a dataclass: a value of another type, or outside its bounds, is an error of one line, so that
the code behind a reader can rely on what the annotations say, whoever wrote the file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Generic, TypeVar

import msgspec

from zpipe.schemas.errors import ZpipeError
from zpipe.schemas.storage import read_file, storage_errors

T = TypeVar("T")
MAX_JSON_BYTES = 256 << 20  # a shard index or a manifest has 250 bytes per shard

# Types of fields.
Count = Annotated[int, msgspec.Meta(ge=0, le=2**53)]
Digest = Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]  # SHA-256, in hex
Text = Annotated[str, msgspec.Meta(max_length=65_536)]


def header(format: str, version: int) -> dict[str, Any]:
    """The two fields that every file of ours begins with."""
    return {"format": format, "version": version}


def check_format(
    path: Path | str, content: Mapping[str, Any], format: str, version: int, *, oldest: int = 1, remedy: str
) -> int:
    """Check the header of a file and return its version.

    Args:
        path: The file, for messages.
        content: Its content.
        format: The format that it must have.
        version: The newest version that is read.
        oldest: The oldest version that is read.
        remedy: What to do about a file of another format, or of a version that is no longer read.

    Raises:
        ZpipeError: The format or the version is another one; for a newer version the message says to upgrade.
    """
    name, number = content.get("format"), content.get("version")
    if name != format or not isinstance(number, int) or isinstance(number, bool):
        raise ZpipeError(
            f"{path}: is {_short(name)} version {_short(number)}, expected {format!r} version {version}; {remedy}"
        )
    if number > version:
        raise ZpipeError(
            f"{path}: is {format!r} version {number}, made by a newer zpipe; this one reads up to version "
            f"{version}: upgrade zpipe"
        )
    if number < oldest:
        raise ZpipeError(f"{path}: is {format!r} version {number}, which is no longer read; {remedy}")
    return number


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


@dataclass(frozen=True, kw_only=True)
class _Header:
    """The two fields that every file begins with; reading them alone builds nothing of the rest."""

    format: Any = None
    version: Any = None


@dataclass(frozen=True, kw_only=True)
class Format(Generic[T]):
    """One JSON format of ours, and how to read its files."""

    name: str
    """What `format` must say."""
    version: int
    """The newest version that is read."""
    content: type[T]
    """The dataclass of its content. Fields that it does not know are ignored."""
    what: str
    """What messages call the content: `a shard index`."""
    remedy: str
    """What to do about a file that cannot be used."""
    oldest: int = 1
    """The oldest version that is read."""
    max_bytes: int = MAX_JSON_BYTES
    """Largest size of a file."""

    @property
    def header(self) -> dict[str, Any]:
        """The two fields that a file begins with."""
        return header(self.name, self.version)

    def read(self, path: Path) -> T:
        """Read and check a file, at a path or a URL.

        Raises:
            ZpipeError: It is absent, unreadable, too large, of another format or version, or a field has another type.
        """
        return self.decode(_read(path, self.what, self.remedy, self.max_bytes), path)

    def decode(self, data: bytes, path: Path | str) -> T:
        """Check the content of a file; `path` is for messages. Raises as :meth:`read`."""
        first = decode_json(data, path, type=_Header, what=self.what, remedy=self.remedy)
        check_format(path, vars(first), self.name, self.version, oldest=self.oldest, remedy=self.remedy)
        return decode_json(data, path, type=self.content, what=self.what, remedy=self.remedy)


def read_json(path: Path, what: str, *, type: type[T], remedy: str, max_bytes: int = MAX_JSON_BYTES) -> T:
    """Read a JSON file without our header.

    Args:
        path: The file, a path or a URL.
        what: What messages call its content: `a model description`.
        type: Type of the content, as for :func:`decode_json`.
        remedy: What to do about a file that cannot be used.
        max_bytes: Largest size of the file.

    Raises:
        ZpipeError: It is absent, unreadable, too large, no JSON, or a value has another type.
    """
    return decode_json(_read(path, what, remedy, max_bytes), path, type=type, what=what, remedy=remedy)


def decode_json(data: bytes | str, where: Path | str, *, type: type[T], what: str, remedy: str) -> T:
    """Decode JSON to a typed value.

    Args:
        data: The JSON text.
        where: File, or file and key, for messages.
        type: A dataclass, or a type made of `dict`, `tuple`, `list` and plain values; with bounds where they are
            `Annotated` with `msgspec.Meta`. NaN and infinity are no JSON.
        what: What messages call the content.
        remedy: What to do about a content that cannot be used.

    Raises:
        ZpipeError: It is no JSON, or a value has another type or is outside its bounds; the message names its place.
    """
    try:
        return msgspec.json.decode(data, type=type)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise ZpipeError(f"{where}: not readable as {what} ({_reason(error)}); {remedy}") from error


def _read(path: Path, what: str, remedy: str, max_bytes: int) -> bytes:
    try:
        return read_file(path, max_bytes)
    except FileNotFoundError as error:
        raise ZpipeError(f"{path}: no such file; expected {what}") from error
    except storage_errors() as error:
        raise ZpipeError(
            f"{path}: not readable as {what} ({getattr(error, 'strerror', None) or error}); {remedy}"
        ) from error


def _reason(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    return (str(error).splitlines() or [""])[0][:200] or error.__class__.__name__
