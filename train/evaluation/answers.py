"""Right answers of a classifier: by one label, by several (ImageNet-ReaL), or among fewer classes (ImageNet-A)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from zpipe.schemas.errors import UsageError, ZpipeError
from zpipe.train.data.labels import check_labels

REAL_KEY = "ILSVRC2012_val_{:08d}"  # of the n-th entry of ReaL's real.json, counted from 1


class Answers:
    """Ranks of the right classes among a model's logits.

    Args:
        num_classes: the number of the model's classes.
        classes: the model's class for each label of the data, if the data has fewer classes; the model's other classes
            then do not count as answers. None if the labels are the model's classes.
        several: the right classes by key, in the model's numbering; a sample without any does not count. None to use
            the label.
    """

    def __init__(
        self, num_classes: int, classes: Sequence[int] | None = None, several: dict[str, list[int]] | None = None
    ) -> None:
        self.num_classes = num_classes
        self._classes = None if classes is None else torch.tensor(classes)
        self._several = several

    def ranks(self, logits: Tensor, batch: dict[str, Any]) -> Tensor:
        """Rank the classes by descending logit, and find the best right one. Of equal logits the lower class is first.

        Args:
            logits: [B, num_classes].
            batch: of a loader, with `key` and `label`.

        Returns:
            int64 [B]: 0 if the first answer is right; -1 for a sample that does not count.

        Raises:
            ZpipeError: a label is outside the classes, or logits are NaN; the message names the key.
        """
        logits, keys = logits.float().cpu(), batch["key"]
        if logits.isnan().any():
            raise ZpipeError(f"key {keys[int(logits.isnan().any(1).nonzero()[0])]}: the model's logits are NaN")
        right = self._right(batch)  # [B, classes]
        if self._classes is not None:
            is_candidate = torch.zeros(self.num_classes, dtype=torch.bool)
            is_candidate[self._classes] = True
            logits = logits.masked_fill(~is_candidate, -torch.inf)
        best, place = logits.masked_fill(~right, -torch.inf).max(dim=1)
        index = torch.arange(self.num_classes)
        before = (logits > best[:, None]) | ((logits == best[:, None]) & (index < place[:, None]))
        return torch.where(right.any(1), before.sum(1), -1)

    def _right(self, batch: dict[str, Any]) -> Tensor:
        if self._several is not None:
            right = torch.zeros(len(batch["key"]), self.num_classes, dtype=torch.bool)
            for row, key in enumerate(batch["key"]):
                if key not in self._several:
                    raise ZpipeError(f"key {key}: the file of labels has no entry for it")
                right[row, self._several[key]] = True
            return right
        labels = batch["label"]
        check_labels(labels, batch["key"], self.num_classes if self._classes is None else len(self._classes))
        if self._classes is not None:
            labels = self._classes[labels]
        return torch.nn.functional.one_hot(labels, self.num_classes).bool()


def read_classes(source: str, own: Sequence[str], theirs: Sequence[str]) -> list[int]:
    """The model's class for each label of the data.

    Args:
        source: `by-name`, or a text file with one line per label: the model's class, by number or by name.
        own: the names of the model's classes.
        theirs: the names of the data's classes.

    Raises:
        UsageError: the model lacks a class, or the file can't be read.
    """
    index_of = {name: index for index, name in enumerate(own)}
    if source == "by-name":
        wanted = list(theirs)
        if not wanted or not index_of:
            raise UsageError("--classes by-name: run and shards must both name their classes; give a file")
    else:
        try:
            wanted = Path(source).read_text(encoding="utf-8").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"--classes {source}: can't be read ({error}); give by-name or a text file") from error
        wanted = [line.strip() for line in wanted if line.strip()]
    classes = []
    for label, name in enumerate(wanted):
        index = index_of.get(name, int(name) if name.isdecimal() and source != "by-name" else None)
        if index is None or (own and index >= len(own)):
            raise UsageError(f"--classes {source}: label {label}, {name}: the model knows no such class")
        classes.append(index)
    if len(set(classes)) < len(classes):
        raise UsageError(f"--classes {source}: names a class twice")
    return classes


def read_several(path: Path, num_classes: int) -> dict[str, list[int]]:
    """The right classes of every key, from a JSON file: {key: [classes]}, or ReaL's own list of lists.

    Raises:
        ZpipeError: the file has another form, or names a class that the model does not have.
    """
    try:
        content = json.loads(Path(path).read_bytes())
        if isinstance(content, list):
            content = {REAL_KEY.format(number): classes for number, classes in enumerate(content, start=1)}
        labels = {str(key): [int(item) for item in classes] for key, classes in content.items()}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ZpipeError(
            f"{path}: no labels ({error}); expected JSON, a list of classes for each key, or ReaL's real.json"
        ) from error
    for key, classes in labels.items():
        if any(not 0 <= item < num_classes for item in classes):
            raise ZpipeError(f"{path}: key {key}: classes {classes}; the model has {num_classes}")
    return labels
