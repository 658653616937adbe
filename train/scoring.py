"""The sources of the scores that guide a model, the same in training and in evaluation."""

from __future__ import annotations

import warnings
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from zpipe.schemas.errors import UsageError
from zpipe.schemas.relevance_maps import RelevanceMaps
from zpipe.train.checkpoint import load_zoomer
from zpipe.train.device import to_device
from zpipe.train.macs import count_macs
from zpipe.train.models.operating_points import OperatingPoint, ScoreUse
from zpipe.train.models.operating_points import score_use as use_of
from zpipe.train.models.scores import centre_prior, class_attention, entropy_scores
from zpipe.train.models.zoomer import Zoomer

SOURCES = {
    "zoomer": "a finished train-zoomer run, frozen",
    "maps": "the cached maps of a relevance store",
    "attention": "the class attention of the model itself with nothing zoomed, which costs that pass",
    "entropy": "the entropy of the grey values in each cell",
    "centre": "a Gaussian around the image's centre",
    "random": "uniform noise: new for every batch in training, fixed by the sample's key in evaluation",
    "own": "what a model of two stages or a token_pruned_vit attends to by itself",
    "none": "no scores: nothing is zoomed",
}

Scorer = Callable[[Tensor, dict[str, Any]], Tensor | None]


@dataclass(frozen=True, kw_only=True)
class ScoreSource:
    """A source of scores for a certain model."""

    name: str
    """One of `SOURCES`."""
    score: Scorer
    """Normalised images [B, 3, S, S] and their batch -> scores [B, s * s] in [0, 1], or None to give none."""
    zoomer: Zoomer | None = None
    """The zoomer that scores, if the source is one."""

    def macs(self, image: Tensor) -> int:
        """Multiply-adds of scoring one image [1, 3, S, S]; 0 for sources without matrix products, such as noise."""
        if self.name not in ("zoomer", "attention"):
            return 0
        return count_macs(lambda: self.score(image, {}))


def score_use(model: nn.Module) -> ScoreUse | None:
    """How scores guide a model; None for a model that takes no scores.

    Raises:
        UsageError: the model can't be trained or evaluated here; the message says why.
    """
    try:
        return use_of(model)
    except ValueError as error:
        raise UsageError(str(error)) from error


def zooms(model: nn.Module) -> bool:
    """Whether the model zooms cells, by a threshold or within a budget."""
    use = score_use(model)
    return use is not None and use.zooms


def run_model(
    model: Callable[..., Any], source: ScoreSource | None, batch: dict[str, Any], point: OperatingPoint
) -> tuple[Any, Tensor | None]:
    """Score the normalised images of a batch, and run the model on images and scores.

    Args:
        model: the model.
        source: the source of its scores; None for a model that takes none.
        batch: as of the loader, with normalised images on the device of the model.
        point: the operating point.

    Returns:
        The output of the model, and the scores [B, s * s] that it got, or None.
    """
    images = batch["image"]
    scores = source.score(images, batch) if source is not None else None
    if scores is None:
        return model(images, **point.arguments), None
    return model(images, scores, **point.arguments), scores


def default_source(zoomer: object | None, maps: object | None) -> str | None:
    """The source to use if only one of its inputs is given; None if it is ambiguous."""
    if (zoomer is None) == (maps is None):
        return None
    return "zoomer" if zoomer is not None else "maps"


def choose_source(
    name: str,
    model: nn.Module,
    *,
    zoomer: Zoomer | None = None,
    origin: Path | str = "the zoomer",
    store: RelevanceMaps | None = None,
    training: bool = False,
) -> ScoreSource:
    """Make a source of scores for a model.

    Args:
        name: one of `SOURCES`.
        model: the model that gets the scores.
        zoomer: for the source "zoomer".
        origin: where the zoomer comes from, for messages.
        store: the relevance store of the images, for the source "maps".
        training: whether random scores are new for every batch.

    Raises:
        UsageError: the name is unknown, an input of the source is missing, or its grid is not the model's.
    """
    if name not in SOURCES:
        raise UsageError(f"--scores {name}: choose one of {', '.join(SOURCES)}")
    use = score_use(model)
    if use is None:
        raise UsageError(f"--scores {name}: this model takes no scores; leave it out")
    side = use.grid
    if name == "own":
        if not use.has_own:
            raise UsageError("--scores own: this model can't choose by itself; choose another source")
        return ScoreSource(name=name, score=lambda images, batch: None)
    if name == "none" and use.has_own:
        raise UsageError("--scores none: this model always chooses; choose own, or another source")
    if name == "zoomer":
        if zoomer is None:
            raise UsageError("--scores zoomer: needs a zoomer; give --zoomer RUN, or another source")
        if zoomer.grid != side and not use.any_grid:
            raise UsageError(f"{origin}: scores of {zoomer.grid} x {zoomer.grid}, the model wants {side} x {side}")
        return ScoreSource(name=name, score=lambda images, batch: _frozen(zoomer, images), zoomer=zoomer)
    if name == "maps":
        if store is None:
            raise UsageError("--scores maps: needs a relevance store; give --maps STORE")
        if not use.any_grid:
            check_grid(store, side)
        return ScoreSource(name=name, score=lambda images, batch: batch["relevance"].to(images.device).flatten(1))
    if name == "attention" and not use.class_attention:
        raise UsageError("--scores attention: needs a zoomvit_* model, whose class attention it is")
    prior = cache(lambda device: to_device(centre_prior(side), device))
    scorers: dict[str, Scorer] = {
        "attention": lambda images, batch: class_attention(model, images, side),
        "entropy": lambda images, batch: entropy_scores(images, side),
        "centre": lambda images, batch: prior(images.device).expand(len(images), -1),
        "random": lambda images, batch: _noise(side * side, images, None if training else batch["key"]),
        "none": lambda images, batch: None,
    }
    return ScoreSource(name=name, score=scorers[name])


def open_zoomer(path: Path, image_size: int) -> Zoomer:
    """Open the zoomer of a finished run, frozen. Warns if it was trained on another image size."""
    zoomer, preprocessing = load_zoomer(path)
    if preprocessing.image_size != image_size:
        warnings.warn(f"{path}: trained on {preprocessing.image_size} px images, used on {image_size} px", stacklevel=2)
    return zoomer


def check_grid(store: RelevanceMaps, side: int) -> None:
    """Check that the maps of a store have the grid of a model's scores, side x side.

    Raises:
        UsageError: the grid is another one.
    """
    grid = store.manifest.provenance.grid
    if tuple(grid) != (side, side):
        raise UsageError(f"{store.path}: maps of {grid[0]} x {grid[1]}, the model wants {side} x {side}")


@torch.no_grad()
def _frozen(zoomer: Zoomer, images: Tensor) -> Tensor:
    return zoomer(images)


def _noise(cells: int, images: Tensor, keys: list[str] | None) -> Tensor:
    """Uniform noise in [0, 1), [B, cells], from the device's generator or, with keys, from each key alone."""
    if keys is None:
        return torch.rand(len(images), cells, device=images.device)
    return to_device(key_noise(cells, keys), images.device)


def key_noise(cells: int, keys: Sequence[str]) -> Tensor:
    """Uniform noise in [0, 1), float32 [len(keys), cells]; each row depends on its key only."""
    return torch.stack(
        [torch.rand(cells, generator=torch.Generator().manual_seed(zlib.crc32(key.encode()))) for key in keys]
    )
