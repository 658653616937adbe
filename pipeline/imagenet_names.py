"""The 1,000 classes of ImageNet (ILSVRC 2012), the order that models use, and one key per image in all packagings.

`imagenet_synsets.csv` lists the classes by their WordNet ids ("wnids"), sorted: the position is the label. Its column
`ilsvrc2012_id` has the number of a class in the organisers' own order, which their development kit uses and no model.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.resources import files
from types import MappingProxyType
from typing import NamedTuple

from zpipe.schemas.sample import key_for_file

NUM_CLASSES = 1000
WNID = re.compile(r"n[0-9]{8}")
# Hugging Face appends the class to the published name.
_NAME = re.compile(r"(n[0-9]{8}_[0-9]{1,8}|ILSVRC2012_(?:val|test)_[0-9]{8})(?:_n[0-9]{8})?")


class Synset(NamedTuple):
    """A class of ImageNet."""

    wnid: str
    """Its WordNet id, ``n01440764``."""
    name: str
    """Its English names, separated by commas: ``tench, Tinca tinca``."""
    ilsvrc2012_id: int
    """Its number in the development kit, 1 to 1,000."""


@cache
def synsets() -> tuple[Synset, ...]:
    """The 1,000 classes, in the order of their labels."""
    text = (files("zpipe.pipeline") / "imagenet_synsets.csv").read_text("utf-8")
    rows = csv.reader(text.splitlines()[1:])
    return tuple(Synset(wnid, name, int(number)) for wnid, name, number in rows)


@cache
def wnids() -> tuple[str, ...]:
    """The wnids, sorted: the class names of every source of ImageNet."""
    return tuple(synset.wnid for synset in synsets())


@cache
def labels() -> Mapping[str, int]:
    """The label of each wnid, 0 to 999."""
    return MappingProxyType({wnid: label for label, wnid in enumerate(wnids())})


def canonical_key(name: str) -> str:
    """Key of an image of ImageNet, the same in every packaging: ``n01440764_10026``, ``ILSVRC2012_val_00000293``.

    Args:
        name: Name of the image file, maybe with folders, a suffix, and the class that Hugging Face appends
            (``n01440764_10026_n01440764.JPEG``).

    Returns:
        The published name without suffix and appended class; of another name, the key that image folders give it.
    """
    key = key_for_file(name)
    known = _NAME.fullmatch(key)
    return known[1] if known else key


def wnids_of(names: Sequence[str]) -> tuple[str, ...] | None:
    """The 1,000 wnids if a list of class names is that of ImageNet in the order of the wnids, else None.

    Args:
        names: The wnids, or their English names. Only the first of the names of a class counts, in any case, without
            a digit at its end: Hugging Face calls the second crane ``crane2``. Names are compared by position, because
            some belong to two classes.
    """
    if len(names) != NUM_CLASSES:
        return None
    if tuple(names) == wnids():
        return wnids()
    alike = all(_first(name) == _first(synset.name) for name, synset in zip(names, synsets(), strict=True))
    return wnids() if alike else None


def _first(name: str) -> str:
    return name.partition(",")[0].replace("_", " ").strip().rstrip("0123456789").casefold()
