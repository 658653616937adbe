"""The header of our files, and the check of which files this zpipe reads.

Every JSON file of ours, and every checkpoint, states `format` (a name) and `version` (a whole number). The version
changes when a reader of the previous one would misread the file; tests/schemas/test_formats.py reads an example of each
version.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from zpipe.schemas.errors import ZpipeError


def header(format: str, version: int) -> dict[str, Any]:
    """The two fields that every file of ours begins with."""
    return {"format": format, "version": version}


def check_format(
    path: Path, content: Mapping[str, Any], format: str, version: int, *, oldest: int = 1, remedy: str
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
        raise ZpipeError(f"{path}: is {name!r} version {number!r}, expected {format!r} version {version}; {remedy}")
    if number > version:
        raise ZpipeError(
            f"{path}: is {format!r} version {number}, made by a newer zpipe; this one reads up to version {version}: "
            "upgrade zpipe"
        )
    if number < oldest:
        raise ZpipeError(f"{path}: is {format!r} version {number}, which is no longer read; {remedy}")
    return number
