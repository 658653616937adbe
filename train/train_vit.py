"""Stage 2: train a ZoomViT under a frozen Zoomer or cached maps; the same command trains plain ViTs, without zoom."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import timm
import torch
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import Tensor, nn

from zpipe.schemas.errors import UsageError, ZpipeError
from zpipe.schemas.progress import Progress, silent
from zpipe.schemas.relevance_maps import RelevanceMaps
from zpipe.train.checkpoint import Preprocessing, begin_run, load_run, load_zoomer, save_model, save_zoomer
from zpipe.train.data.loader import RelevanceLoader
from zpipe.train.data.transforms import ViewConfig
from zpipe.train.loop import TrainConfig, resolve_device, train
from zpipe.train.models.zoomer import Zoomer
from zpipe.train.models.zoomvit import ZoomViT, load_vit
from zpipe.train.train_zoomer import to_json

ZoomDraw = Literal["alpha", "budget"]
Scorer = Callable[[Tensor, dict[str, Any]], Tensor]


@dataclass(frozen=True, kw_only=True)
class VitConfig:
    """Settings of stage 2.

    model: any classifier of timm, or one of ours (zoomvit_*). model_args: keyword arguments of its constructor.
    num_classes: None takes the number of classes that the shards name.
    init_from: a finished run to start from; position tables and patch kernel are resampled where the sizes differ.
    zoom_draw: what training draws per batch: `alpha`, uniform in [0, 1] (the paper), or `budget`, a number of zoomed
    cells uniform in [0, max_zoomed], which keeps all sequences of a batch equally long.
    missing, damaged: what samples without a usable map and damaged tars do, see `RelevanceLoader`.
    """

    model: str = "zoomvit_small_patch16_224"
    model_args: dict[str, Any] = field(default_factory=dict)
    num_classes: int | None = None
    image_size: int = 224
    init_from: str | None = None
    zoom_draw: ZoomDraw = "alpha"
    max_zoomed: int | None = None
    label_smoothing: float = 0.0
    missing: str = "error"
    damaged: str = "error"
    view: ViewConfig = field(default_factory=ViewConfig)
    train: TrainConfig = field(
        default_factory=lambda: TrainConfig(lr=1e-3, epochs=300.0, warmup_epochs=5.0, batch_size=128)
    )

    def __post_init__(self) -> None:
        if self.num_classes is not None and self.num_classes < 1:
            raise UsageError(f"num_classes {self.num_classes}: give a number >= 1")
        if not 0.0 <= self.label_smoothing <= 1.0:
            raise UsageError(f"label_smoothing {self.label_smoothing:g}: give a share in [0, 1]")


class ClassifyTask:
    """Cross-entropy over the classes; a ZoomViT sees another zoom in every batch."""

    def __init__(
        self,
        model: nn.Module,
        scorer: Scorer | None,
        config: VitConfig,
        preprocessing: Preprocessing,
        device: torch.device,
    ) -> None:
        self.model, self._scorer, self._config = model, scorer, config
        self._preprocessing, self._device = preprocessing, device

    def loss(self, batch: dict[str, Any]) -> tuple[Tensor, dict[str, float]]:
        labels = batch["label"]
        check_labels(labels, batch["key"], self.model.num_classes)
        labels = labels.to(self._device)
        images = self._preprocessing.normalise(batch["image"].to(self._device))
        if self._scorer is None:
            logits = self.model(images)
        else:
            logits = self.model(images, self._scorer(images, batch), **self._draw_zoom())
        loss = F.cross_entropy(logits, labels, label_smoothing=self._config.label_smoothing)
        accuracy = (logits.argmax(dim=1) == labels).float().mean()
        return loss, {"train_top1": float(accuracy)}

    def _draw_zoom(self) -> dict[str, Any]:
        # torch's global generator is seeded per epoch by the loop, so a resumed run draws the same.
        if self._config.zoom_draw == "alpha":
            return {"alpha": float(torch.rand(()))}
        most = self._config.max_zoomed
        return {"budget": int(torch.randint(0, (self.model.coarse_grid**2 if most is None else most) + 1, ()))}

    def validate(self) -> dict[str, float]:
        """Figures come from `zpipe evaluate`."""
        return {}


def train_vit(
    shards: Path,
    out: Path,
    config: VitConfig,
    *,
    zoomer: Path | None = None,
    maps: Path | None = None,
    progress: Progress = silent,
) -> dict[str, float]:
    """Train a classifier on shards and leave a run folder at `out`.

    A zoomvit_* model needs its scores from somewhere: a finished `zoomer` run (frozen, live) or the cached `maps`. A
    finished run is left alone, an interrupted one is gone on with. Errors: :class:`UsageError`, :class:`ZpipeError`.
    """
    device = resolve_device(config.train.device)
    store = RelevanceMaps(maps) if maps is not None else None
    loader = RelevanceLoader(
        shards,
        store,
        batch_size=config.train.batch_size,
        image_size=config.image_size,
        augment="train",
        seed=config.train.seed,
        num_workers=config.train.num_workers,
        missing=config.missing,
        damaged=config.damaged,
        view=config.view,
    )
    num_classes = config.num_classes or len(loader.index.classes)
    if not num_classes:
        raise UsageError(f"{shards}: its index names no classes; give --num-classes")
    torch.manual_seed(config.train.seed)
    model = build_vit(config, num_classes).to(device)
    preprocessing = Preprocessing(
        image_size=config.image_size,
        mean=IMAGENET_DEFAULT_MEAN,
        std=IMAGENET_DEFAULT_STD,
        crop_pct=config.view.crop_pct,
    )
    if isinstance(model, ZoomViT) and not 0 <= (config.max_zoomed or 0) <= model.coarse_grid**2:
        raise UsageError(f"max_zoomed {config.max_zoomed}: this model has {model.coarse_grid**2} cells to zoom")
    frozen, scorer = choose_scorer(model, zoomer, store, config.image_size)
    if frozen is not None:
        frozen.to(device)
    settings = asdict(config) | {"shards": str(shards), "zoomer": _text(zoomer), "maps": _text(maps)}
    if begin_run(out, "vit", to_json(settings)):
        return {}
    if config.init_from is not None:
        start_from(model, Path(config.init_from))
    task = ClassifyTask(model, scorer, config, preprocessing, device)
    figures = train(task, loader, config.train, Path(out), stage="train-vit", progress=progress)
    if frozen is not None:
        save_zoomer(Path(out), frozen.cpu(), load_zoomer(zoomer)[1])
    save_model(Path(out), model.cpu(), preprocessing)
    return figures


def _text(path: Path | None) -> str | None:
    return None if path is None else str(path)


def build_vit(config: VitConfig, num_classes: int) -> nn.Module:
    """Create the model. Errors: :class:`UsageError` naming the model or argument that timm doesn't know."""
    for name, option in (("num_classes", "--num-classes"), ("img_size", "--image-size")):
        if name in config.model_args:
            raise UsageError(f"model_args.{name}: has an option of its own, {option}")
    arguments = config.model_args | {"num_classes": num_classes}
    try:
        try:
            return timm.create_model(config.model, img_size=config.image_size, **arguments)
        except TypeError as error:
            if "'img_size'" not in str(error):
                raise
            return timm.create_model(config.model, **arguments)  # convolutional: any size will do
    except (RuntimeError, TypeError, ValueError, LookupError, AttributeError, AssertionError, ArithmeticError) as error:
        told = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UsageError(f"model {config.model}: {told}; check --model and --model-arg") from error


def choose_scorer(
    model: nn.Module, zoomer: Path | None, store: RelevanceMaps | None, image_size: int
) -> tuple[Zoomer | None, Scorer | None]:
    """Where a model's scores come from: a frozen zoomer, cached maps, or nothing for a plain ViT.

    A scorer takes normalised images [B, 3, S, S] and their batch, and gives scores [B, s * s] in [0, 1].
    Errors: :class:`UsageError` when the model and the source don't fit.
    """
    if not isinstance(model, ZoomViT):
        if zoomer is not None or store is not None:
            raise UsageError("this model doesn't zoom; leave out --zoomer and --maps, or choose a zoomvit_* model")
        return None, None
    if (zoomer is None) == (store is None):
        raise UsageError("a zoomvit_* model needs its scores from one source: give --zoomer RUN or --maps STORE")
    if store is not None:
        check_grid(store, model.score_grid)
        return None, lambda images, batch: batch["relevance"].to(images.device).flatten(1)
    frozen, preprocessing = load_zoomer(zoomer)
    if frozen.grid != model.score_grid:
        raise UsageError(
            f"{zoomer}: scores of {frozen.grid} x {frozen.grid}, the model wants {model.score_grid} x {model.score_grid}"
        )
    if preprocessing.image_size != image_size:
        warnings.warn(
            f"{zoomer}: trained on {preprocessing.image_size} px images, used on {image_size} px", stacklevel=2
        )

    def score(images: Tensor, batch: dict[str, Any]) -> Tensor:
        with torch.no_grad():
            return frozen(images)

    return frozen, score


def check_grid(store: RelevanceMaps, side: int) -> None:
    """Errors: :class:`UsageError` when the maps of `store` aren't the side x side that a model scores with."""
    grid = store.manifest.provenance.grid
    if tuple(grid) != (side, side):
        raise UsageError(f"{store.path}: maps of {grid[0]} x {grid[1]}, the model wants {side} x {side}")


def start_from(model: nn.Module, run: Path) -> None:
    """Fill `model` with the weights of a finished run, in place.

    A plain ViT may have another image or patch size, a ZoomViT starts from a plain ViT (see `load_vit`) or its like.
    Errors: :class:`ZpipeError` when the two aren't built alike.
    """
    source = load_run(run).model
    try:
        if isinstance(model, ZoomViT) and not isinstance(source, ZoomViT):
            load_vit(model, source)
        elif isinstance(model, VisionTransformer) and isinstance(source, VisionTransformer):
            model.load_state_dict(checkpoint_filter_fn(source.state_dict(), model))
        else:
            model.load_state_dict(source.state_dict())
    except (RuntimeError, ValueError) as error:
        raise ZpipeError(f"{run}: can't start from it: {' '.join(str(error).split())[:200]}") from error


def check_labels(labels: Tensor, keys: list[str], num_classes: int) -> None:
    """Errors: :class:`ZpipeError` naming the first key whose label [B] is outside the classes."""
    outside = (labels < 0) | (labels >= num_classes)
    if outside.any():
        first = int(outside.nonzero()[0])
        raise ZpipeError(
            f"key {keys[first]}: label {int(labels[first])} is outside the model's {num_classes} classes; "
            "correct the label or give --num-classes"
        )
