"""Names of classes are their identity; their numbers hold only within one list.

Wherever classes of two origins meet (shards and a run, a teacher and shards, a validation set and a training set), the
lists are compared here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from zpipe.schemas.errors import ZpipeError

Matching = Literal["same", "by-name", "by-index"]


@dataclass(frozen=True, kw_only=True)
class ClassNames:
    """The classes of one side."""

    names: Sequence[str]
    """Name of each class, in the order of its numbers; empty if only numbers are known, "" for a class without name."""
    where: str
    """What has these classes, for messages: a folder of shards, a run."""


def match_classes(
    data: ClassNames,
    model: ClassNames,
    how: Matching = "same",
    *,
    remedy: str = "give --classes by-name to match them by name, or --classes by-index where they mean the same",
) -> tuple[int, ...] | None:
    """Find the model's class for each class of the data.

    Args:
        data: The classes that the labels number.
        model: The classes that the model, the teacher or the maps number.
        how: ``same``: both number the classes alike, as far as both name them. ``by-name``: each class of the data is
            the model's class of that name. ``by-index``: the numbers are taken as they are, whatever the names.
        remedy: What to do about lists that differ.

    Returns:
        The model's class number for each class of the data (-1 for one without a name); None if the numbers are the
        same, or one side has no names.

    Raises:
        ZpipeError: The lists differ, naming the first difference; or a name cannot be matched.
    """
    if how == "by-index":
        return None
    if how == "by-name":
        return _by_name(data, model)
    if not data.names or not model.names:
        return None
    for number, (ours, theirs) in enumerate(zip(data.names, model.names, strict=False)):
        if ours != theirs and ours and theirs:
            raise ZpipeError(
                f"{data.where}: its class {number} is {ours!r}, that of {model.where} is {theirs!r}; {remedy}"
            )
    if len(data.names) > len(model.names):
        number = len(model.names)
        raise ZpipeError(
            f"{data.where}: its class {number} is {data.names[number]!r}, {model.where} has {number} classes; {remedy}"
        )
    return None


def _by_name(data: ClassNames, model: ClassNames) -> tuple[int, ...] | None:
    for side in (data, model):
        if not side.names:
            raise ZpipeError(f"{side.where}: names no classes; they can be matched by name where both sides have names")
    repeated = {name for name, count in Counter(model.names).items() if count > 1}
    number_of = {name: number for number, name in enumerate(model.names)}
    mapping = []
    for number, name in enumerate(data.names):
        if not name:
            mapping.append(-1)
            continue
        if name not in number_of:
            raise ZpipeError(
                f"{data.where}: its class {number}, {name!r}, is none of {model.where}; rename it, or leave it out"
            )
        if name in repeated:
            raise ZpipeError(
                f"{model.where}: has two classes named {name!r}, so that class {number} of {data.where} could be "
                "either; match them with a file"
            )
        mapping.append(number_of[name])
    if twice := next((name for name, count in Counter(data.names).items() if name and count > 1), None):
        raise ZpipeError(f"{data.where}: has two classes named {twice!r}; rename one")
    return None if mapping == list(range(len(mapping))) else tuple(mapping)
