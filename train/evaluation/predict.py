"""Classify single image files with a finished run: labels, and pictures of what the model looked at."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from zpipe.schemas.errors import UsageError, ZpipeError
from zpipe.schemas.progress import Progress, silent
from zpipe.schemas.sample import DECODE_ERRORS
from zpipe.train.checkpoint import Run, load_run
from zpipe.train.data.transforms import ViewConfig, decode, draw_view, view_image
from zpipe.train.evaluation.inference import OpenRun, choose_run_source, trained_with
from zpipe.train.evaluation.operating_points import one_point
from zpipe.train.evaluation.pictures import picture
from zpipe.train.models.zoom_tokens import token_boxes


@dataclass(frozen=True, kw_only=True)
class PredictConfig:
    """Settings of a prediction."""

    alpha: float | None = None
    """The threshold of a model that zooms; 0.1 where no budget is given."""
    budget: int | str | None = None
    """Instead of a threshold: zoomed cells an image, or "300 tokens" or "2.3 GMACs"."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Further settings of the operating point, such as {"exit": 0.7}, {"keep": 16} or {"merge": 8}."""
    scores: str | None = None
    """Where the scores come from, one of `scoring.SOURCES`; None takes the source that the run was trained with."""
    weights: str = "final"
    """Which weights of the run, see `checkpoint.load_run`."""
    precision: str = "float32"
    """The precision of scores and model: float32, or bf16 or fp16 under autocast."""
    top: int = 5
    """Classes an image."""
    device: str = "auto"
    """`auto`, `cpu`, `cuda` or `cuda:N`."""

    def __post_init__(self) -> None:
        if self.alpha is not None and self.budget is not None:
            raise UsageError("give --alpha or --budget, not both")
        for name in ("alpha", "budget"):
            if name in self.settings:
                raise UsageError(f"--at {name}: give --{name} {self.settings[name]}")
        if self.top < 1:
            raise UsageError(f"--top {self.top}: give a number >= 1")

    def point_settings(self) -> dict[str, Any]:
        """The settings that are given, those of the zoom among them."""
        zoom = {"alpha": self.alpha, "budget": self.budget}
        return {name: value for name, value in zoom.items() if value is not None} | dict(self.settings)


class Classifier:
    """A run as one function: images in, logits out, the zoomer (or another source of scores) included.

    Args:
        run: an opened vit run.
        config: its operating point, source of scores, precision and device.

    Raises:
        UsageError: a run of another kind, scores that can't be had without a data set, or a setting that the model
            can't take.
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
            images: uint8 [B, 3, S, S], S the run's image size.
            keys: the samples' names, which random scores are drawn by.

        Returns:
            Logits [B, classes] on the classifier's device.

        Raises:
            ValueError: images of another size or type.
        """
        return self.look(images, keys)[0]

    def look(self, images: Tensor, keys: Sequence[str] = ()) -> tuple[Tensor, Tensor | None]:
        """Logits as above, and the scores [B, s * s] that guided the model, if there are any."""
        side = self.run.preprocessing.image_size
        if images.dtype != torch.uint8 or images.ndim != 4 or tuple(images.shape[1:]) != (3, side, side):
            raise ValueError(
                f"images must be uint8 [batch, 3, {side}, {side}], got {images.dtype} {list(images.shape)}"
            )
        batch = {"image": images, "key": list(keys) or [str(i) for i in range(len(images))]}
        answer = self.opened.answer(batch, self.point)
        return answer.logits, answer.scores

    @torch.inference_mode()
    def token_boxes(self, images: Tensor, scores: Tensor | None) -> list[Tensor] | None:
        """The patches of each image, int64 [n, 4] as (left, top, right, bottom) in pixels.

        None for a model without patches of its own choosing, and without scores.
        """
        if scores is None or not hasattr(self.model, "tokenise"):
            return None
        pixels = self.opened.prepare({"image": images})["image"]
        ids = self.model.tokenise(pixels, scores, **self.point.arguments).by_image()
        size = self.run.preprocessing.image_size
        return [token_boxes(each.cpu(), self.model.coarse_grid, size) for each in ids]


def predict(
    run: Path,
    files: Sequence[Path],
    config: PredictConfig,
    *,
    out: Path | None = None,
    progress: Progress = silent,
) -> list[dict[str, Any]]:
    """The `top` classes of every image file: [{file, classes: [{index, name, probability}], tokens}].

    The image is seen as in evaluation. out: a folder for one PNG an image: the image, its score map and its patches.
    Errors: :class:`UsageError`; :class:`ZpipeError` naming the file that can't be read.
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
        every = classifier.token_boxes(images, scores)
        boxes = None if every is None else every[0]
        rows.append({"file": str(file), "classes": classes, "tokens": None if boxes is None else len(boxes)})
        if out is not None:
            # Not every model wants its scores on a grid of its own.
            side = 0 if scores is None else math.isqrt(scores.shape[1])
            score_map = None if scores is None else scores[0].view(side, side).cpu().numpy()
            cell = 0 if boxes is None else opened.preprocessing.image_size // opened.model.coarse_grid
            first = classes[0]
            title = f"{first['name'] or first['index']}, {first['probability']:.0%}"
            picture(out / f"{file.stem}.png", images[0].permute(1, 2, 0).numpy(), score_map, boxes, cell, title)
        progress("predict", number + 1, len(files))
    return rows


def read_image(file: Path, size: int, view: ViewConfig) -> np.ndarray:
    """The evaluation view of an image file, uint8 [3, size, size]. Errors: :class:`ZpipeError` naming the file."""
    try:
        data = Path(file).read_bytes()
        image, chosen, source = decode(data, lambda shape: draw_view(np.random.default_rng(0), *shape, view), size)
        return np.ascontiguousarray(view_image(image, chosen, size, source))
    except UnidentifiedImageError as error:
        raise ZpipeError(f"{file}: can't be read as a JPEG, PNG or WEBP image; give an image file") from error
    except (*DECODE_ERRORS, Image.DecompressionBombError) as error:
        raise ZpipeError(f"{file}: can't be read as a JPEG, PNG or WEBP image ({error})") from error
