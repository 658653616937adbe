"""What our files call themselves, and which of them this zpipe reads.

Every JSON file of ours, and a checkpoint, says `format` (a name) and `version` (a whole number). A version changes when a
reader of the one before would misread the file; tests/test_formats.py keeps an example of each version and reads it for good.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from zpipe.schemas.errors import ZpipeError


def header(format: str, version: int) -> dict[str, Any]:
    """The two fields that a file of ours begins with."""
    return {"format": format, "version": version}


def check_format(
    path: Path, found: Mapping[str, Any], format: str, version: int, *, oldest: int = 1, remedy: str
) -> int:
    """The version of a file, from `oldest` to `version`, whose content is `found`.

    remedy: what to do about a file of another format, or of a version that is no longer read. Errors: :class:`ZpipeError`
    naming the file; of a newer version it says to upgrade.
    """
    name, number = found.get("format"), found.get("version")
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
