"""What judging maps needs of the teacher that made them: its answers, and the stability of its maps.

Evaluation does not know the pipeline; here the two meet.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from zpipe.pipeline.inspection import has_stability
from zpipe.pipeline.stability import measure_stability
from zpipe.pipeline.teacher import Teacher, load_teacher_of
from zpipe.schemas.classes import ClassNames
from zpipe.schemas.devices import float32_arithmetic
from zpipe.schemas.errors import UsageError
from zpipe.schemas.progress import Progress, silent
from zpipe.schemas.relevance_maps import RelevanceMaps
from zpipe.train.checkpoint import Preprocessing
from zpipe.train.device import resolve_device
from zpipe.train.evaluation.answers import match_labels
from zpipe.train.evaluation.judge import Classifier, row_names
from zpipe.train.evaluation.metrics import LARGEST_LOGIT, check_numbers

TEACHER_FIELDS = ("teacher_digest", "mean", "std", "image_size", "interpolation")  # of one teacher these are equal


def teacher_of(stores: Sequence[RelevanceMaps], *, weights: str | None = None, device: str = "auto") -> Classifier:
    """Open the teacher that made the maps of all these stores as the classifier to judge them on.

    Args:
        stores: The stores.
        weights: Where its weights are now; None if they are where they were.
        device: `auto`, `cpu`, `cuda` or `cuda:N`.

    Raises:
        UsageError: The stores are of several teachers, the teacher's images are not square, or its weights are not
            there.
        ZpipeError: The weights are others, or cannot be loaded.
    """
    first, origin = stores[0], stores[0].manifest.provenance
    for store in stores[1:]:
        other = store.manifest.provenance
        if differing := [name for name in TEACHER_FIELDS if getattr(other, name) != getattr(origin, name)]:
            raise UsageError(
                f"{first.path} and {store.path}: made by different teachers ({', '.join(differing)}); give --model RUN "
                "to judge by"
            )
    place = resolve_device(device)
    try:
        teacher = load_teacher_of(first.path, origin, weights=weights, device=place)
    except UsageError as error:
        raise UsageError(f"{error}, or judge by --model RUN") from error
    return as_judge(teacher)


def as_judge(teacher: Teacher) -> Classifier:
    """A teacher as the classifier to judge maps on, where its weights are.

    Its images are resized bicubically, as all images in training and evaluation.

    Raises:
        UsageError: Its images are not square.
    """
    height, width = teacher.image_size
    if height != width:
        raise UsageError(f"teacher {teacher.name}: takes images of {height} x {width}; give --model RUN to judge by")
    own = ClassNames(names=teacher.classes, where=f"teacher {teacher.weights}")

    def logits(images: Tensor, keys: Sequence[str]) -> Tensor:
        with torch.inference_mode(), float32_arithmetic():
            values = cast(Tensor, teacher.model(images))
        check_numbers(values, keys, "the teacher's logits", limit=LARGEST_LOGIT, where=teacher.weights)
        return values

    return Classifier(
        preprocessing=Preprocessing(
            image_size=height,
            mean=cast(tuple[float, float, float], teacher.mean),
            std=cast(tuple[float, float, float], teacher.std),
            crop_pct=teacher.crop_pct,
        ),
        num_classes=teacher.num_classes,
        device=next(teacher.model.parameters()).device,
        logits=logits,
        match=lambda index, shards, how: match_labels(own, teacher.num_classes, index, shards, how),
        about={"study": "judge", "run": Path(teacher.weights).name, "model": teacher.name, "seed": None},
        path=teacher.weights,
    )


def stability_of(
    stores: Sequence[RelevanceMaps],
    shards: Path,
    *,
    limit: int,
    weights: str | None = None,
    device: str = "auto",
    progress: Progress = silent,
) -> Mapping[str, Mapping[str, float]]:
    """The stability of the maps of stores, by the name of the row and by key.

    What a store has in its column is taken; otherwise the teacher computes the maps of at most `limit` images anew.

    Args:
        stores: The stores.
        shards: The tars that they were made from.
        limit: The maximum number of images to measure for a store without the column; 0 to leave the store out.
        weights: Where the teacher's weights are now; None if they are where they were.
        device: `auto`, `cpu`, `cuda` or `cuda:N`.
        progress: Reports the images that have been measured.

    Raises:
        UsageError: A teacher's weights are gone.
        ZpipeError: The weights or the tars are not those that the maps were made from, or cannot be read.
    """
    values: dict[str, Mapping[str, float]] = {}
    for name, store in zip(row_names(stores), stores, strict=True):
        if has_stability(store):
            values[name] = _StabilityColumn(store)
        elif limit:
            values[name] = measure_stability(
                store, shards, limit=limit, device=device, weights=weights, progress=progress
            )
    return values


class _StabilityColumn(Mapping[str, float]):
    """The column `stability` of a store, by key. A shard is read when its first key is looked up.

    Maps are judged in the order of the shards, so that a test of a few thousand images reads, and holds, no more than
    their shards, however large the store is.

    Args:
        store: The store.
    """

    def __init__(self, store: RelevanceMaps) -> None:
        self._store = store
        self._unread = [shard.stem for shard in reversed(store.manifest.shards)]
        self._values: dict[str, float] = {}

    def __getitem__(self, key: str) -> float:
        while key not in self._values and self._unread:
            self._read()
        return self._values[key]

    def __iter__(self) -> Iterator[str]:
        while self._unread:
            self._read()
        return iter(self._values)

    def __len__(self) -> int:
        return self._store.manifest.count

    def _read(self) -> None:
        table = self._store.index(self._unread.pop(), ["key", "stability"])
        self._values |= zip(table["key"].to_pylist(), table["stability"].to_pylist(), strict=True)
