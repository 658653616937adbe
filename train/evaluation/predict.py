"""Classify single image files with a finished run: labels, and pictures of what the model looked at."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
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
from zpipe.train.device import resolve_device
from zpipe.train.evaluation.operating_points import EvalConfig, choose_run_source, trained_with
from zpipe.train.evaluation.pictures import picture
from zpipe.train.models.zoom_tokens import token_boxes
from zpipe.train.models.zoomvit import ZoomViT
from zpipe.train.scoring import ScoreSource, zooms


@dataclass(frozen=True, kw_only=True)
class PredictConfig:
    """alpha or budget: the zoom of a model that zooms; with neither, alpha is 0.1. scores: where its scores come from, as of
    evaluation. weights: of the run, see `checkpoint.load_run`. top: classes per image.
    """

    alpha: float | None = None
    budget: int | str | None = None
    scores: str | None = None
    weights: str = "final"
    top: int = 5
    device: str = "auto"

    def zoom(self) -> dict[str, Any]:
        if self.alpha is not None and self.budget is not None:
            raise UsageError("give --alpha or --budget, not both")
        if self.budget is not None:
            return {"budget": self.budget}
        return {"alpha": 0.1 if self.alpha is None else self.alpha}


class Classifier:
    """A run as one function: images in, logits out, the zoomer (or another source of scores) included.

    Args:
        run: an opened vit run.
        config: its zoom.

    Raises:
        UsageError: a run of another kind, or scores that can't be had without a data set.
    """

    def __init__(self, run: Run, config: PredictConfig | None = None) -> None:
        config = config or PredictConfig()
        if run.kind != "vit":
            raise UsageError(f"{run.path}: holds a {run.kind}, no classifier")
        if (config.scores or trained_with(run)) == "maps":
            asked = (
                "--scores maps"
                if config.scores
                else f"{run.path}: was trained with maps as scores, as if by --scores maps"
            )
            raise UsageError(
                f"{asked}: single images have no maps in a store; choose zoomer, attention, entropy, centre, random, own or none"
            )
        self.device = resolve_device(config.device)
        self.run, self.model = run, run.model.to(self.device)
        self.source: ScoreSource | None = choose_run_source(run, EvalConfig(scores=config.scores), None)
        if self.source is not None and self.source.zoomer is not None:
            self.source.zoomer.to(self.device)
        self.zoom = config.zoom() if zooms(self.model) and self.source.name != "none" else {}

    @torch.inference_mode()
    def __call__(self, images: Tensor, keys: Sequence[str] = ()) -> Tensor:
        """uint8 [B, 3, S, S], S the run's image size -> logits [B, classes] on the classifier's device.

        keys: the samples' names, which random scores are drawn by. Raises ValueError for images of another size.
        """
        return self.look(images, keys)[0]

    @torch.inference_mode()
    def look(self, images: Tensor, keys: Sequence[str] = ()) -> tuple[Tensor, Tensor | None]:
        """Logits as above, and the scores [B, s * s] behind the zoom, if there are any."""
        side = self.run.preprocessing.image_size
        if images.dtype != torch.uint8 or images.ndim != 4 or tuple(images.shape[1:]) != (3, side, side):
            raise ValueError(
                f"images must be uint8 [batch, 3, {side}, {side}], got {images.dtype} {list(images.shape)}"
            )
        pixels = self.run.preprocessing.normalise(images.to(self.device))
        batch = {"key": list(keys) or [str(i) for i in range(len(images))]}
        scores = self.source.score(pixels, batch) if self.source is not None else None
        if scores is None:
            return self.model(pixels), None
        try:
            return self.model(pixels, scores, **self.zoom), scores
        except ValueError as error:
            raise UsageError(f"{self.run.path}: {error}") from error

    def token_boxes(self, images: Tensor, scores: Tensor) -> list[Tensor]:
        """The patches of each image of a ZoomViT, int64 [n, 4] as (left, top, right, bottom) in pixels."""
        pixels = self.run.preprocessing.normalise(images.to(self.device))
        boxes: list[Tensor] = [torch.empty(0)] * len(images)
        for group in self.model.tokenise(pixels, scores, **self.zoom).groups():
            for place, ids in zip(group.index.tolist(), group.ids, strict=True):
                boxes[place] = token_boxes(ids.cpu(), self.model.coarse_grid, self.run.preprocessing.image_size)
        return boxes


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
        boxes = classifier.token_boxes(images, scores)[0] if _zoomed(classifier, scores) else None
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


def _zoomed(classifier: Classifier, scores: Tensor | None) -> bool:
    return scores is not None and isinstance(classifier.model, ZoomViT)


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
