"""Patterns of tars as other programs write them: `train-{0000..1023}.tar`, `train-*.tar`.

Braces are those of bash: `{a,b}`, `{0..9}`, `{000..100..2}`, nested; a backslash takes the meaning from the next
character. They need no listing of a folder, which https:// does not have. Globs (`*`, `?`, `[...]`) stand in the name
of the tar alone, and are compared with the listing of its folder.
"""

from __future__ import annotations

import fnmatch
import math
import re
from pathlib import Path

from braceexpand import braceexpand

from zpipe.schemas.errors import UsageError
from zpipe.schemas.names import printable
from zpipe.schemas.storage import MAX_NAME_BYTES, as_path, is_remote, is_web, names_in

ARCHIVE_SUFFIXES = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".zip", ".gz", ".zst")
MAX_TARS = 1 << 20  # of one pattern
MAX_PATTERN = 4096  # characters, as of a path
MAX_GLOBS = 1000  # that braces may make; each is compared with the whole folder
_SPECIAL = re.compile(r"[{*?\[]")
_GLOB = re.compile(r"[*?\[]")
_HOST = re.compile(r"[a-z0-9+.-]+://[^/]*")
_INNERMOST = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(-?\d+|[A-Za-z])\.\.(-?\d+|[A-Za-z])(?:\.\.-?(\d+))?")
_MAX_DIGITS = 18


def is_pattern(path: Path) -> bool:
    """Whether a path or a URL has a character that means something in a pattern. A file may still have that name."""
    text = str(path)
    host = _HOST.match(text)
    return _SPECIAL.search(text, host.end() if host else 0) is not None


def expand(path: Path) -> tuple[Path, list[str]]:
    """Find the names that a pattern stands for. Time and memory grow with their number, which is bounded.

    Args:
        path: The pattern, a path or a URL.

    Returns:
        The folder, and the names in it, sorted, each one once. Names that braces make need not be there.

    Raises:
        UsageError: It is no pattern, leads to several folders, or stands for too many names, for none, or for files
            that are no tars.
        OSError: The folder cannot be listed.
    """
    folder = path.parent
    if not _is_folder(folder):
        split = [text.rpartition("/") for text in _expand_braces(str(path))]
        folders = sorted({head for head, _, _ in split})
        if len(folders) > 1:
            raise UsageError(
                f"{path}: stands for tars of {len(folders)} folders ({folders[0]}, {folders[1]}); give a pattern of "
                "one, or write one index of all: zpipe make-shards --index-only @LIST OUTPUT"
            )
        folder, names = as_path(folders[0] or ("/" if split[0][1] else ".")), [name for _, _, name in split]
        if _GLOB.search(str(folder)) and not _is_folder(folder):
            raise UsageError(f"{path}: no such folder ({folder}); write *, ? and [...] in the name of the tar alone")
    else:
        names = _expand_braces(path.name)
    globs = {name for name in names if _GLOB.search(name)}
    found = set(names) - globs
    if globs:
        found.update(_matching(path, folder, globs))
    names = sorted(found)
    if other := next((name for name in names if not name.endswith(".tar")), None):
        raise no_tar(folder / other)
    return folder, names


def no_tar(path: Path) -> UsageError:
    """What is wrong with a file that is given in place of a tar."""
    return UsageError(f"{path}: not a .tar file; {remedy_for_name(path.name)}")


def remedy_for_name(name: str) -> str:
    """What to do with a file that is no tar; an empty name stands for none."""
    if name.lower().endswith(ARCHIVE_SUFFIXES):
        return (
            "shards are plain tars: unpack it (gunzip, unxz, unzstd or unzip) and give the .tar, or make shards of it"
        )
    return "give a folder of tar shards (zpipe make-shards makes one), or one tar"


def _matching(path: Path, folder: Path, globs: set[str]) -> set[str]:
    if len(globs) > MAX_GLOBS:
        raise UsageError(f"{path}: stands for {len(globs)} globs, more than {MAX_GLOBS}; write * in place of braces")
    listed = [name for name in names_in(folder) if not name.startswith(".")]
    matching = {name for glob in globs for name in fnmatch.filter(listed, glob)}
    found = {name for name in matching if name.lower().endswith((".tar", *ARCHIVE_SUFFIXES))}
    if not found:
        remedy = "a web server lists no files: write braces" if is_web(folder) else "correct the pattern"
        raise UsageError(f"{path}: no tar among the {len(listed)} files in {folder} has such a name; {remedy}")
    return found


def _expand_braces(text: str) -> list[str]:
    if "{" not in text:
        return [text]
    if len(text) > MAX_PATTERN or _number_of_names(text) > MAX_TARS:
        raise UsageError(
            f"{printable(text)[:80]}: has more than {MAX_PATTERN} characters, or stands for more than {MAX_TARS} tars; "
            "shorten it"
        )
    try:
        return list(braceexpand(text))
    except (ValueError, RecursionError) as error:  # its UnbalancedBracesError is a ValueError
        raise UsageError(
            f"{printable(text)[:80]}: its braces are not balanced, or nested too deeply; write train-{{000..099}}.tar, "
            "and a backslash before a brace of a name"
        ) from error


def _number_of_names(text: str) -> int:
    """How many names braces stand for, without making them: what is within braces is counted from the inside out.

    Raises UsageError for `{b..{1..3}}`: bash leaves both braces as they are there, braceexpand the outer ones alone.
    """
    pattern = text

    def product(part: str) -> int:
        return math.prod(int(number) for number in part.split("\0")[1::2])

    def counted(braces: re.Match[str]) -> str:
        ends = _RANGE.fullmatch(braces[1])
        if ends is None and ".." in braces[1] and "\0" in braces[1] and "," not in braces[1]:
            raise UsageError(
                f"{printable(pattern)[:80]}: '..' between braces that hold others is no range; write a backslash "
                "before braces of a name"
            )
        if ends is None:
            number = sum(product(part) for part in braces[1].split(","))
        elif any(len(digits or "") > _MAX_DIGITS for digits in ends.groups()):
            number = MAX_TARS + 1
        else:
            first, last = (ord(end) if end.isalpha() else int(end) for end in ends.groups()[:2])
            number = abs(last - first) // max(int(ends[3] or 1), 1) + 1
        return f"\0{min(number, MAX_TARS + 1)}\0"

    text = re.sub(r"\\.", "_", text.replace("\0", "_"))
    found = 1
    while found:
        text, found = _INNERMOST.subn(counted, text)
    return product(text)


def _is_folder(path: Path) -> bool:
    """Whether a part of a pattern is a folder, whose name is then taken as it stands; only such names are looked up."""
    if not is_pattern(path):
        return True
    return not is_too_long(path) and path.is_dir()


def is_too_long(path: Path) -> bool:
    """Whether a local path has a part that no file can have as its name: a question for it would be an error."""
    return not is_remote(path) and any(len(part.encode(errors="replace")) > MAX_NAME_BYTES for part in path.parts)
