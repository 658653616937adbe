"""Right answers of a classifier: by one label, by several (ImageNet-ReaL), or among fewer classes (ImageNet-A)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Final, cast

import msgspec
import torch
from torch import Tensor

from zpipe.schemas.classes import ClassNames, match_classes
from zpipe.schemas.errors import UsageError, ZpipeError
from zpipe.schemas.formats import read_json
from zpipe.schemas.model_config import CONFIG_NAME
from zpipe.schemas.shard_index import ShardIndex
from zpipe.schemas.storage import read_file
from zpipe.train.checkpoint import Run
from zpipe.train.data.labels import check_labels
from zpipe.train.evaluation.metrics import LARGEST_LOGIT, check_numbers
from zpipe.train.run_files import RUN_NAME

REAL = Path("real")
REAL_KEY = "ILSVRC2012_val_{:08d}"  # of the n-th entry of ReaL's real.json, counted from 1
MAX_CLASSES_BYTES = 16 << 20  # of a file of classes
BY_NAME: Final = "by-name"
BY_INDEX: Final = "by-index"


class Answers:
    """Ranks of the right classes among a model's logits.

    Args:
        num_classes: the number of the model's classes.
        classes: the model's class for each label of the data, -1 for a label that has none; the model's classes that
            are not among them then do not count as answers. None if the labels are the model's classes.
        several: the right classes by key, in the model's numbering; a sample without any does not count. None to use
            the label.
    """

    def __init__(
        self, num_classes: int, classes: Sequence[int] | None = None, several: dict[str, list[int]] | None = None
    ) -> None:
        self.num_classes = num_classes
        self._classes = None if classes is None else torch.tensor(classes, dtype=torch.int64)
        self._several = several

    def ranks(self, logits: Tensor, batch: dict[str, Any]) -> Tensor:
        """Rank the classes by descending logit, and find the best right one. Of equal logits the lower class is first.

        Args:
            logits: [B, num_classes].
            batch: of a loader, with `key` and `label`.

        Returns:
            int64 [B]: 0 if the first answer is right; -1 for a sample that does not count.

        Raises:
            ZpipeError: a label is outside the classes, or logits are NaN, infinite or far too large; the message names
                the key.
        """
        logits = logits.float().cpu()
        check_numbers(logits, batch["key"], "the model's logits", limit=LARGEST_LOGIT)
        right = self._right(batch)  # [B, classes]
        if self._classes is not None:
            is_candidate = torch.zeros(self.num_classes, dtype=torch.bool)
            is_candidate[self._classes[self._classes >= 0]] = True
            logits = logits.masked_fill(~is_candidate, -torch.inf)
        best, place = logits.masked_fill(~right, -torch.inf).max(dim=1)
        index = torch.arange(self.num_classes)
        before = (logits > best[:, None]) | ((logits == best[:, None]) & (index < place[:, None]))
        return torch.where(right.any(1), before.sum(1), -1)

    def labels(self, batch: dict[str, Any]) -> Tensor:
        """The right class of each sample in the model's numbering, int64 [B]; of several the lowest, -1 for none.

        Raises:
            ZpipeError: a label is outside the classes, or there is no class for it; the message names the key.
        """
        keys = batch["key"]
        if self._several is not None:
            if missing := next((key for key in keys if key not in self._several), None):
                raise ZpipeError(f"key {missing}: the file of labels has no entry for it")
            return torch.tensor([min(self._several[key], default=-1) for key in keys], dtype=torch.int64)
        labels = cast(Tensor, batch["label"])
        count = self.num_classes if self._classes is None else len(self._classes)
        check_labels(labels, keys, count, "correct the label, or say by --classes FILE which class it is")
        if self._classes is None:
            return labels
        mapped = self._classes[labels]
        if (mapped < 0).any():
            first = int((mapped < 0).nonzero()[0])
            raise ZpipeError(
                f"key {keys[first]}: class {int(labels[first])} of its label has no name to be matched by; give "
                "--classes FILE"
            )
        return mapped

    def _right(self, batch: dict[str, Any]) -> Tensor:
        labels = self.labels(batch)
        if self._several is None:
            return torch.nn.functional.one_hot(labels, self.num_classes).bool()
        right = torch.zeros(len(labels), self.num_classes, dtype=torch.bool)
        for row, key in enumerate(batch["key"]):
            right[row, self._several[key]] = True
        return right


@dataclass(frozen=True)
class _Described:
    """The part of timm's model description that names classes."""

    label_names: list[str] = field(default_factory=list)


def class_names(run: Run) -> ClassNames:
    """The names of a run's classes: those of its training set or, of a model that timm saved, its `label_names`."""
    names: Sequence[str] = run.settings.get("classes") or ()
    if not names and not (run.path / RUN_NAME).is_file():
        remedy = "restore the file"
        names = read_json(run.path / CONFIG_NAME, "a model description", type=_Described, remedy=remedy).label_names
    return ClassNames(names=names[: cast(int, run.model.num_classes)], where=str(run.path))


def match_run(run: Run, index: ShardIndex, shards: Path | str, how: str | None = None) -> list[int] | None:
    """The run's class for each label of shards.

    Args:
        run: a vit run.
        index: the index of the shards.
        shards: where they are, for messages.
        how: `by-name` to match classes by their names, `by-index` to take the labels as they are, or a text file, see
            `read_classes`. None if shards and run number their classes alike.

    Returns:
        The class for each label, -1 for a label without a name; None if the labels are the run's classes.

    Raises:
        UsageError: the file can't be used.
        ZpipeError: the classes differ, or names can't be matched; the message names the first one.
    """
    return match_labels(class_names(run), cast(int, run.model.num_classes), index, shards, how)


def match_labels(
    own: ClassNames, num_classes: int, index: ShardIndex, shards: Path | str, how: str | None = None
) -> list[int] | None:
    """As `match_run`, for a model whose classes have the names `own`."""
    data = ClassNames(names=index.classes, where=str(shards))
    if how is None:
        match_classes(data, own)
        return None
    if how == BY_INDEX:
        return None
    if how == BY_NAME:
        matched = match_classes(data, own, BY_NAME)
        return list(range(len(data.names)) if matched is None else matched)
    classes = read_classes(how, own.names, num_classes)
    if data.names and len(classes) != len(data.names):
        raise UsageError(
            f"--classes {how}: has {len(classes)} lines, {shards} has {len(data.names)} classes; give one line for each"
        )
    return classes


def read_classes(source: str, own: Sequence[str], num_classes: int) -> list[int]:
    """The model's class for each label of the data, from a text file with one line per label.

    Args:
        source: the file; a line is the model's class by name or by number, a name first.
        own: the names of the model's classes.
        num_classes: how many classes the model has.

    Raises:
        UsageError: the model lacks a class, or the file can't be read.
    """
    try:
        wanted = read_file(source, MAX_CLASSES_BYTES).decode("utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UsageError(
            f"--classes {source}: can't be read ({reason}); give by-name, by-index or a text file with one class a line"
        ) from error
    wanted = [line.strip() for line in wanted if line.strip()]
    if not wanted:
        raise UsageError(f"--classes {source}: is empty; give one class a line")
    index_of = {name: index for index, name in enumerate(own) if name}
    classes = []
    for label, name in enumerate(wanted):
        number = int(name) if name.isdecimal() and len(name) < 10 else None
        index = index_of.get(name, number)
        if index is None or index >= num_classes:
            raise UsageError(f"--classes {source}: label {label}, {name}: the model knows no such class")
        classes.append(index)
    if len(set(classes)) < len(classes):
        raise UsageError(f"--classes {source}: names a class twice")
    return classes


_Classes = list[Annotated[int, msgspec.Meta(ge=0, lt=2**31)]]
# A union is no type to mypy, but one to msgspec.
_Several = cast("type[dict[str, list[int]] | list[list[int]]]", dict[str, _Classes] | list[_Classes])


def read_several(path: Path, num_classes: int) -> dict[str, list[int]]:
    """The right classes of every key, from a JSON file: {key: [classes]}, or ReaL's own list of lists.

    Args:
        path: The file; `real` stands for the copy of ReaL's that timm contains.
        num_classes: How many classes the model has.

    Raises:
        ZpipeError: the file has another form, or names a class that the model does not have.
    """
    remedy = "give JSON with a list of classes for each key, or ReaL's real.json"
    file = Path(path)
    if file == REAL:
        file = Path(str(files("timm.data") / "_info" / "imagenet_real_labels.json"))
    content = read_json(file, "labels", type=_Several, remedy=remedy)
    if isinstance(content, list):
        content = {REAL_KEY.format(number): classes for number, classes in enumerate(content, start=1)}
    for key, classes in content.items():
        if beyond := [item for item in classes if item >= num_classes]:
            raise ZpipeError(
                f"--labels {path}: key {key}: class {beyond[0]}; the model has {num_classes} classes, numbered from 0: "
                "give labels in the model's numbering"
            )
    return content
