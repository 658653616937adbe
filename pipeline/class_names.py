"""What the names of class folders give away: splits in place of classes, and orders that other tools do not share."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from pathlib import Path

from zpipe.schemas.errors import UsageError, ZpipeError
from zpipe.schemas.names import printable

_SPLIT = re.compile(
    r"(?:train|training|val|valid|validation|test|testing|dev|eval|evaluation|holdout|trainval|unlabell?ed)"
    r"(?:[-_ ]?(?:\d+|set|split|data|images?|imgs?|v\d+))*",
    re.IGNORECASE,
)
_TRAINING = re.compile("train", re.IGNORECASE)
_SHOWN = 5


def check_class_folders(root: Path, names: Sequence[str]) -> None:
    """Check that sub-folders are classes.

    Args:
        root: The folder.
        names: Its sub-folders.

    Raises:
        UsageError: They are the splits of a data set: all are named like one, or some like the training split and
            others like another one.
        ZpipeError: A name has unprintable characters.
    """
    splits = [name for name in names if _SPLIT.fullmatch(name)]
    training = [name for name in splits if _TRAINING.match(name)]
    if splits and (len(splits) == len(names) or 0 < len(training) < len(splits)):
        raise UsageError(
            f"{root}: {_few(splits)} look{'s' * (len(splits) == 1)} like splits of a data set, not like classes; "
            f"give one of them, such as {root / splits[0]}, or rename what is a class"
        )
    for name in names:
        if printable(name) != name:
            raise ZpipeError(f"{root}: the class folder '{printable(name)}' has an unprintable character; rename it")


def order_warnings(root: Path, names: Sequence[str], with_images: Sequence[str]) -> tuple[str, ...]:
    """What a user should know about classes that were made of folders.

    Args:
        root: The folder.
        names: The classes, in order.
        with_images: Those that have images.
    """
    lines = []
    if len(names) == 1:
        lines.append(
            f"{root}: there is one class, {names[0]!r}; if its sub-folders are the classes, give {root / names[0]}"
        )
    if empty := [name for name in names if name not in set(with_images)]:
        lines.append(
            f"{root}: {len(empty)} of {len(names)} classes have no images ({_few(empty)}); they keep their numbers, so "
            "that the splits of a data set are numbered alike"
        )
    # timm, file managers and `ls -v` sort so.
    elsewhere = {name: number for number, name in enumerate(sorted(names, key=_natural))}
    moved = [(number, name) for number, name in enumerate(names) if elsewhere[name] != number]
    if moved:
        number, name = moved[0]
        lines.append(
            f"{root}: classes are numbered in the plain order of their names, as in torchvision: {name!r} is class "
            f"{number}; tools that compare digits as numbers and ignore case, such as timm, number it "
            f"{elsewhere[name]}. Names are compared where data and models meet; a labels.csv gives other numbers"
        )
    same: dict[str, str] = {}
    for name in names:
        other = same.setdefault(unicodedata.normalize("NFKC", name).casefold().strip(), name)
        if other is not name:
            lines.append(f"{root}: classes {other!r} and {name!r} differ in case or in the form of their letters only")
    return tuple(lines)


def _natural(name: str) -> tuple[tuple[int, int, str], ...]:
    parts = re.split(r"([0-9]+)", name.lower())
    return tuple((0, int(part), part) if part.isdecimal() and part.isascii() else (1, 0, part) for part in parts)


def _few(names: Sequence[str]) -> str:
    more = ", ..." if len(names) > _SHOWN else ""
    return ", ".join(printable(name) for name in names[:_SHOWN]) + more
