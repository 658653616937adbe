"""Classify single image files with a finished run, and draw what the model looked at."""

from __future__ import annotations

import errno
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from zpipe.schemas.atomic import check_out_file
from zpipe.schemas.errors import UsageError, ZpipeError, first_line, remedy_for
from zpipe.schemas.images import DECODE_ERRORS
from zpipe.schemas.names import printable
from zpipe.schemas.progress import Progress, silent
from zpipe.schemas.storage import read_file
from zpipe.train.checkpoint import Run, load_run
from zpipe.train.data.transforms import ViewConfig, decode, draw_view, view_image
from zpipe.train.device import autocast
from zpipe.train.evaluation.answers import class_names
from zpipe.train.evaluation.inference import OpenRun, choose_run_source, trained_with
from zpipe.train.evaluation.operating_points import one_point
from zpipe.train.evaluation.pictures import PICTURE_MARK, picture

MAX_IMAGE_BYTES = 1 << 28
MARK = b'[\n  {\n    "file": '  # what a file of predictions begins with


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

    A file that can't be read as an image does not stop the others.

    Args:
        run: the folder of a finished vit run.
        files: images of the formats that `zpipe.schemas.images` reads.
        config: settings.
        out: a folder for one PNG per image, with the image, its score map and its patches; None to draw nothing.
        progress: called once per image.

    Returns:
        [{file, classes: [{index, name, probability}], tokens}], the most probable class first; and {file, error} for
        a file that can't be read as an image.

    Raises:
        UsageError: the run or a setting does not suit, two pictures would have the same name, or one would replace a
            file that is not such a picture.
        ZpipeError: the model's answer is none, or a picture can't be written.
    """
    opened = load_run(run, config.weights)
    classifier = Classifier(opened, config)
    names = class_names(opened).names
    view = ViewConfig(augment="eval", crop_pct=opened.preprocessing.crop_pct)
    if out is not None:
        _check_pictures(out, files)
    rows = []
    for number, file in enumerate(files):
        try:
            pixels = read_image(file, opened.preprocessing.image_size, view)
        except ZpipeError as error:
            rows.append({"file": str(file), "error": str(error)})
        else:
            rows.append(_predict(classifier, file, torch.from_numpy(pixels)[None], names, config.top, out))
        progress("predict", number + 1, len(files))
    return rows


def _predict(
    classifier: Classifier, file: Path, images: Tensor, names: Sequence[str], top: int, out: Path | None
) -> dict[str, Any]:
    """The row of one file, of the image uint8 [1, 3, S, S]; its picture is drawn into `out`."""
    logits, scores = classifier.look(images, [printable(file.stem)])
    probabilities = logits[0].float().softmax(dim=0)
    best = probabilities.topk(min(top, len(probabilities)))
    classes: list[dict[str, Any]] = [
        {"index": index, "name": names[index] if index < len(names) else None, "probability": value}
        for value, index in zip(best.values.tolist(), best.indices.tolist(), strict=True)
    ]
    batch_boxes = classifier.token_boxes(images, scores)
    boxes = None if batch_boxes is None else batch_boxes[0]
    if out is not None:
        side = 0 if scores is None else math.isqrt(scores.shape[1])  # may differ from the model's own grid
        score_map = None if scores is None else scores[0].view(side, side).float().cpu().numpy()
        cell = 0 if boxes is None else classifier.run.preprocessing.image_size // classifier.model.coarse_grid
        title = f"{classes[0]['name'] or classes[0]['index']}, {classes[0]['probability']:.0%}"
        picture(_picture_path(out, file), images[0].permute(1, 2, 0).numpy(), score_map, boxes, cell, title)
    return {"file": str(file), "classes": classes, "tokens": None if boxes is None else len(boxes)}


def _picture_path(out: Path, file: Path) -> Path:
    return out / f"{file.stem}.png"


def _check_pictures(out: Path, files: Sequence[Path]) -> None:
    """Make the folder of pictures, and check that none of them would replace another file or another picture."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--out {out}: can't be used ({first_line(error)}); {remedy_for(error)}") from error
    inputs = {file.resolve() for file in files}
    drawn: dict[str, Path] = {}
    for file in files:
        path = _picture_path(out, file)
        if other := drawn.get(path.name):
            raise UsageError(f"--out {out}: {other} and {file} would have the same picture; give them one by one")
        if path.resolve() in inputs:
            raise UsageError(f"--out {out}: the picture of {file} would replace an image; give another folder")
        check_out_file(path, (), PICTURE_MARK)
        drawn[path.name] = file


def read_image(file: Path, size: int, view: ViewConfig) -> np.ndarray:
    """Read an image file in the view of evaluation, as uint8 [3, size, size].

    Raises:
        ZpipeError: the file can't be read as an image.
    """
    try:
        data = read_file(file, MAX_IMAGE_BYTES)
        image, chosen, source = decode(data, lambda shape: draw_view(np.random.default_rng(0), *shape, view), size)
        return np.ascontiguousarray(view_image(image, chosen, size, source))
    except DECODE_ERRORS as error:
        # Errors of PIL have no number; those of another kind of file are about this one.
        number = error.errno if isinstance(error, OSError) else None
        is_other = number in (None, errno.EINVAL, errno.EISDIR, errno.EFBIG)
        remedy = "give an image file" if is_other else remedy_for(error)
        raise ZpipeError(f"{file}: can't be read as an image ({first_line(error)}); {remedy}") from error
