"""Which answers of a classifier are right: one label, several (ImageNet-ReaL), or of fewer classes (ImageNet-A)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from zpipe.schemas.errors import UsageError, ZpipeError
from zpipe.train.data.labels import check_labels

REAL_KEY = "ILSVRC2012_val_{:08d}"  # the images that the entries of ReaL's real.json belong to, in order from 1


class Answers:
    """Judges logits.

    Args:
        num_classes: of the model.
        classes: the model's class for each label of the data, where the data knows fewer; all others are then no
            answers. None: labels are the model's classes.
        several: the right classes by key, in the model's numbering; a sample with none isn't counted. None: the label.
    """

    def __init__(
        self, num_classes: int, classes: Sequence[int] | None = None, several: dict[str, list[int]] | None = None
    ) -> None:
        self.num_classes = num_classes
        self._classes = None if classes is None else torch.tensor(classes)
        self._several = several

    def ranks(self, logits: Tensor, batch: dict[str, Any]) -> Tensor:
        """The place of the best right class among the classes by falling logit, int64 [B]: 0 is a right first answer.
        -1 for a sample that doesn't count. Of equal logits the lower class comes first.

        Errors: :class:`ZpipeError` naming the first key whose label isn't among the classes, or whose logits aren't
        numbers.
        """
        logits, keys = logits.float().cpu(), batch["key"]
        if logits.isnan().any():
            raise ZpipeError(f"key {keys[int(logits.isnan().any(1).nonzero()[0])]}: the model's logits are NaN")
        right = self._right(batch)  # [B, classes]
        if self._classes is not None:
            among = torch.zeros(self.num_classes, dtype=torch.bool)
            among[self._classes] = True
            logits = logits.masked_fill(~among, -torch.inf)
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


def read_classes(asked: str, own: Sequence[str], theirs: Sequence[str]) -> list[int]:
    """The model's class for each label of the data.

    asked: `by-name`, or a text file with one line a label: the model's class, by number or name. own: the names of the
    model's classes, theirs: those of the data's. Errors: :class:`UsageError` naming the class that is missing.
    """
    number = {name: index for index, name in enumerate(own)}
    if asked == "by-name":
        wanted = list(theirs)
        if not wanted or not number:
            raise UsageError("--classes by-name: run and shards must both name their classes; give a file")
    else:
        try:
            wanted = Path(asked).read_text(encoding="utf-8").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"--classes {asked}: can't be read ({error}); give by-name or a text file") from error
        wanted = [line.strip() for line in wanted if line.strip()]
    classes = []
    for label, name in enumerate(wanted):
        found = number.get(name, int(name) if name.isdecimal() and asked != "by-name" else None)
        if found is None or (own and found >= len(own)):
            raise UsageError(f"--classes {asked}: label {label}, {name}: the model knows no such class")
        classes.append(found)
    if len(set(classes)) < len(classes):
        raise UsageError(f"--classes {asked}: names a class twice")
    return classes


def read_several(path: Path, num_classes: int) -> dict[str, list[int]]:
    """The right classes of every key, from a JSON file: {key: [classes]}, or ReaL's own list of lists.

    Errors: :class:`ZpipeError` for a file of another form, or a class that the model doesn't have.
    """
    try:
        found = json.loads(Path(path).read_bytes())
        if isinstance(found, list):
            found = {REAL_KEY.format(number): classes for number, classes in enumerate(found, start=1)}
        labels = {str(key): [int(item) for item in classes] for key, classes in found.items()}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ZpipeError(
            f"{path}: no labels ({error}); expected JSON, a list of classes for each key, or ReaL's real.json"
        ) from error
    for key, classes in labels.items():
        if any(not 0 <= item < num_classes for item in classes):
            raise ZpipeError(f"{path}: key {key}: classes {classes}; the model has {num_classes}")
    return labels
