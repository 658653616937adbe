"""Classify single image files with a finished run, and draw what the model looked at."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from zpipe.schemas.errors import UsageError, ZpipeError
from zpipe.schemas.images import DECODE_ERRORS
from zpipe.schemas.progress import Progress, silent
from zpipe.train.checkpoint import Run, load_run
from zpipe.train.data.transforms import ViewConfig, decode, draw_view, view_image
from zpipe.train.device import autocast
from zpipe.train.evaluation.inference import OpenRun, choose_run_source, trained_with
from zpipe.train.evaluation.operating_points import one_point
from zpipe.train.evaluation.pictures import picture


@dataclass(frozen=True, kw_only=True)
class PredictConfig:
    """Settings of a prediction."""

    alpha: float | None = None
    """The threshold of a model that zooms; None for 0.1, unless a budget is given."""
    budget: int | str | None = None
    """A budget instead of a threshold: zoomed cells per image, or "300 tokens" or "2.3 GMACs"."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Other settings of the operating point, such as {"exit": 0.7}, {"keep": 16} or {"merge": 8}."""
    scores: str | None = None
    """The source of the scores, one of `scoring.SOURCES`; None for the one that the run was trained with."""
    weights: str = "final"
    """The weights of the run to use, see `checkpoint.load_run`."""
    precision: str = "float32"
    """The precision of both scores and model: float32, or bf16 or fp16 under autocast."""
    top: int = 5
    """The number of classes per image."""
    device: str = "auto"
    """`auto`, `cpu`, `cuda` or `cuda:N`."""

    def __post_init__(self) -> None:
        autocast(self.precision, torch.device("cpu"))  # refuses an unknown precision
        if {"alpha", "budget"} <= self.point_settings().keys():
            raise UsageError("give --alpha or --budget, not both")
        for name in ("alpha", "budget"):
            if name in self.settings:
                raise UsageError(f"--at {name}: give --{name} {self.settings[name]}")
        if self.top < 1:
            raise UsageError(f"--top {self.top}: give a number >= 1")

    def point_settings(self) -> dict[str, Any]:
        """All settings of the operating point, including a threshold or a budget."""
        zoom = {"alpha": self.alpha, "budget": self.budget}
        return {name: value for name, value in zoom.items() if value is not None} | dict(self.settings)


class Classifier:
    """A run as one function from images to logits, including the zoomer or another source of scores.

    Args:
        run: a vit run.
        config: its operating point, source of scores, precision and device; None for the defaults.

    Raises:
        UsageError: the run is not a classifier, its scores need a data set, or a setting does not suit the model.
    """

    def __init__(self, run: Run, config: PredictConfig | None = None) -> None:
        config = config or PredictConfig()
        if run.kind == "vit" and (config.scores or trained_with(run)) == "maps":
            reason = "--scores maps"
            if not config.scores:
                reason = f"{run.path}: was trained with maps as scores, as if by --scores maps"
            raise UsageError(
                f"{reason}: single images have no maps in a store; choose zoomer, attention, entropy, centre, random, "
                "own or none"
            )
        source = choose_run_source(run, config.scores, None) if run.kind == "vit" else None
        self.opened = OpenRun(run, source, device=config.device, precision=config.precision)
        self.run, self.model, self.device = run, self.opened.model, self.opened.device
        try:
            self.point = one_point(self.model, source, config.point_settings())
        except UsageError as error:
            raise UsageError(f"{run.path}: {error}") from error

    def __call__(self, images: Tensor, keys: Sequence[str] = ()) -> Tensor:
        """Classify images.

        Args:
            images: uint8 [B, 3, S, S] of the run's image size S.
            keys: the names of the samples, which determine random scores.

        Returns:
            Logits [B, classes] on the device of the classifier.

        Raises:
            ValueError: the images have another size or type.
        """
        return self.look(images, keys)[0]

    def look(self, images: Tensor, keys: Sequence[str] = ()) -> tuple[Tensor, Tensor | None]:
        """As calling the classifier, but return also the scores [B, s * s] that the model got, or None."""
        side = self.run.preprocessing.image_size
        if images.dtype != torch.uint8 or images.ndim != 4 or tuple(images.shape[1:]) != (3, side, side):
            raise ValueError(
                f"images must be uint8 [batch, 3, {side}, {side}], got {images.dtype} {list(images.shape)}"
            )
        batch = {"image": images, "key": list(keys) or [str(i) for i in range(len(images))]}
        answer = self.opened.answer(batch, self.point)
        return answer.logits, answer.scores

    def token_boxes(self, images: Tensor, scores: Tensor | None) -> list[Tensor] | None:
        """The patches of images under the scores that `look` returned, see `OpenRun.token_boxes`."""
        return self.opened.token_boxes(self.opened.prepare({"image": images}), scores, self.point)


def predict(
    run: Path,
    files: Sequence[Path],
    config: PredictConfig,
    *,
    out: Path | None = None,
    progress: Progress = silent,
) -> list[dict[str, Any]]:
    """Find the most probable classes of image files, each in the view of evaluation.

    Args:
        run: the folder of a finished vit run.
        files: JPEG, PNG or WEBP images.
        config: settings.
        out: a folder for one PNG per image, with the image, its score map and its patches; None to draw nothing.
        progress: called once per image.

    Returns:
        [{file, classes: [{index, name, probability}], tokens}], the most probable class first.

    Raises:
        UsageError: the run or a setting does not suit, or two pictures would have the same name.
        ZpipeError: a file can't be read.
    """
    opened = load_run(run, config.weights)
    classifier = Classifier(opened, config)
    names = opened.settings.get("classes") or []
    view = ViewConfig(augment="eval", crop_pct=opened.preprocessing.crop_pct)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        if len({file.stem for file in files}) < len(files):
            raise UsageError("--out: two images have the same name, and so would their pictures")
    rows = []
    for number, file in enumerate(files):
        images = torch.from_numpy(read_image(file, opened.preprocessing.image_size, view))[None]
        logits, scores = classifier.look(images, [file.stem])
        probabilities = logits[0].float().softmax(dim=0)
        best = probabilities.topk(min(config.top, len(probabilities)))
        classes = [
            {"index": index, "name": names[index] if index < len(names) else None, "probability": value}
            for value, index in zip(best.values.tolist(), best.indices.tolist(), strict=True)
        ]
        batch_boxes = classifier.token_boxes(images, scores)
        boxes = None if batch_boxes is None else batch_boxes[0]
        rows.append({"file": str(file), "classes": classes, "tokens": None if boxes is None else len(boxes)})
        if out is not None:
            side = 0 if scores is None else math.isqrt(scores.shape[1])  # may differ from the model's own grid
            score_map = None if scores is None else scores[0].view(side, side).float().cpu().numpy()
            cell = 0 if boxes is None else opened.preprocessing.image_size // classifier.model.coarse_grid
            first = classes[0]
            title = f"{first['name'] or first['index']}, {first['probability']:.0%}"
            picture(out / f"{file.stem}.png", images[0].permute(1, 2, 0).numpy(), score_map, boxes, cell, title)
        progress("predict", number + 1, len(files))
    return rows


def read_image(file: Path, size: int, view: ViewConfig) -> np.ndarray:
    """Read an image file in the view of evaluation, as uint8 [3, size, size].

    Raises:
        ZpipeError: the file can't be read as an image.
    """
    try:
        data = Path(file).read_bytes()
        image, chosen, source = decode(data, lambda shape: draw_view(np.random.default_rng(0), *shape, view), size)
        return np.ascontiguousarray(view_image(image, chosen, size, source))
    except DECODE_ERRORS as error:
        raise ZpipeError(f"{file}: can't be read as an image ({error}); give an image file") from error
