"""Which tars one index is made of: those of a folder, of a pattern, or of a list of these in several folders."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from zpipe.schemas.errors import UsageError, ZpipeError
from zpipe.schemas.names import printable
from zpipe.schemas.shard_index import check_there, find_shards
from zpipe.schemas.shard_patterns import is_pattern
from zpipe.schemas.storage import as_local, as_path, read_file

MAX_LIST_BYTES = 1 << 28


def list_tars(source: str | Path) -> list[Path]:
    """List the tars of a folder, a pattern, or a list, to make one index of them. Memory grows with their number.

    Args:
        source: As for :func:`find_shards`, or ``@FILE``: a text file that names any number of these, one a line. Empty
            lines and those that begin with # mean nothing; relative paths start from the current folder, as in a shell.

    Returns:
        The tars, sorted by name.

    Raises:
        UsageError: There are none, or two have one name.
        ZpipeError: A folder cannot be read, or a tar is not there.
    """
    if str(source).startswith("@") and not os.path.lexists(source):
        tars = [tar for where, path in _read_list(str(source)[1:]) for tar in _tars_of(path, f"{where}: ")]
        if not tars:
            raise UsageError(f"{source}: names no tar; write a tar, a folder of tars or a pattern a line")
    else:
        tars = _tars_of(as_path(source))
    known: dict[str, Path] = {}
    for tar in tars:
        other = known.setdefault(tar.name, tar)
        if other != tar:
            raise UsageError(f"{tar}: has the name of {other}, and the maps of a tar are found by its name; rename one")
    tars = [known[name] for name in sorted(known)]
    check_there(tars)
    return tars


def _tars_of(path: Path, where: str = "") -> list[Path]:
    if where and path.suffix == ".tar" and not is_pattern(path):
        return [path]  # the tars of a list are looked up together
    try:
        folder, tars = find_shards(path)
    except ZpipeError as error:
        raise type(error)(f"{where}{error}") from error
    if not tars:
        raise UsageError(f"{where}{folder}: holds no tar, only an index of tars elsewhere; give the tars themselves")
    return tars


def _read_list(path: str) -> Iterator[tuple[str, Path]]:
    """The place of each line, for messages, and its path or URL."""
    file = as_local(path)
    try:
        text = read_file(file, MAX_LIST_BYTES).decode()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "is not UTF-8"
        raise UsageError(f"{file}: can't be read as a list of tars ({reason}); write one path a line") from error
    for number, line in enumerate(text.split("\n"), 1):
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        where = f"{file}: line {number}"
        if printable(line) != line:
            raise UsageError(f"{where}: '{printable(line)[:80]}' has unprintable characters; write one path a line")
        try:
            yield where, as_path(line)
        except ZpipeError as error:
            raise UsageError(f"{where}: {error}") from error
