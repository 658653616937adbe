"""What judging maps needs of the teacher that made them: its answers, and the stability of its maps.

Evaluation does not know the pipeline; here the two meet.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from zpipe.pipeline.inspection import has_stability
from zpipe.pipeline.stability import measure_stability
from zpipe.pipeline.teacher import Teacher, load_teacher_of
from zpipe.schemas.classes import ClassNames
from zpipe.schemas.errors import UsageError
from zpipe.schemas.progress import Progress, silent
from zpipe.schemas.relevance_maps import RelevanceMaps
from zpipe.train.checkpoint import Preprocessing
from zpipe.train.device import resolve_device
from zpipe.train.evaluation.answers import match_labels
from zpipe.train.evaluation.judge import Classifier, row_names
from zpipe.train.evaluation.metrics import LARGEST_LOGIT, check_numbers


def teacher_of(stores: Sequence[RelevanceMaps], *, weights: str | None = None, device: str = "auto") -> Classifier:
    """Open the teacher that made the maps of all these stores as the classifier to judge them on.

    Args:
        stores: The stores.
        weights: Where its weights are now; None if they are where they were.
        device: `auto`, `cpu`, `cuda` or `cuda:N`.

    Raises:
        UsageError: The stores are of several teachers, the teacher's images are not square, or its weights are gone.
        ZpipeError: The weights are others, or cannot be loaded.
    """
    first = stores[0]
    for store in stores[1:]:
        if store.manifest.provenance.teacher_digest != first.manifest.provenance.teacher_digest:
            raise UsageError(f"{first.path} and {store.path}: made by different teachers; give --model RUN to judge by")
    place = resolve_device(device)
    teacher = load_teacher_of(first.path, first.manifest.provenance, weights=weights, device=place)
    return as_judge(teacher, place)


def as_judge(teacher: Teacher, device: torch.device) -> Classifier:
    """A teacher on a device as the classifier to judge maps on. Raises UsageError if its images are not square."""
    height, width = teacher.image_size
    if height != width:
        raise UsageError(f"teacher {teacher.name}: takes images of {height} x {width}; give --model RUN to judge by")
    own = ClassNames(names=teacher.classes, where=f"teacher {teacher.weights}")

    def logits(images: Tensor, keys: Sequence[str]) -> Tensor:
        with torch.inference_mode():
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
        device=device,
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
            table = store.table(["key", "stability"])
            pairs = zip(table["key"].to_pylist(), table["stability"].to_pylist(), strict=True)
            values[name] = {key: value for key, value in pairs if not math.isnan(value)}
        elif limit:
            values[name] = measure_stability(
                store, shards, limit=limit, device=device, weights=weights, progress=progress
            )
    return values
