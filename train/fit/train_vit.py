"""Stage 2: train a ZoomViT under a frozen Zoomer or cached maps; the same command trains plain ViTs, without zoom."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.data.mixup import mixup_target
from torch import Tensor, nn

from zpipe.schemas.errors import UsageError
from zpipe.schemas.progress import Progress, silent
from zpipe.schemas.relevance_maps import RelevanceMaps
from zpipe.train.checkpoint import (
    CHECKPOINT_NAME,
    CONFIG_NAME,
    Preprocessing,
    Resume,
    begin_run,
    digest_zoomer,
    load_zoomer,
    maps_record,
    read_record,
    save_model,
    save_zoomer,
)
from zpipe.train.data.labels import check_labels
from zpipe.train.data.loader import RelevanceLoader
from zpipe.train.data.mix import MixConfig, mix_batch
from zpipe.train.data.transforms import ViewConfig
from zpipe.train.device import resolve_device, to_device
from zpipe.train.fit.config import TrainConfig
from zpipe.train.fit.initialise import build_vit, described, start_from
from zpipe.train.fit.loop import Trainer, never
from zpipe.train.losses import CoarseToFineLoss, TokenLabelLoss, relevance_token_labels
from zpipe.train.models.cfvit import CFViT
from zpipe.train.models.fusion import FusedViT
from zpipe.train.models.lvvit import LVViT
from zpipe.train.ranks import ranks
from zpipe.train.scoring import (
    ScoreSource,
    choose_source,
    chooses_itself,
    default_source,
    open_zoomer,
    takes_scores,
    zooms,
)
from zpipe.train.settings import check_choices, to_json

ZoomDraw = Literal["alpha", "budget"]


@dataclass(frozen=True, kw_only=True)
class VitConfig:
    """Settings of stage 2.

    model: any classifier of timm, or one of ours (zoomvit_*). model_args: keyword arguments of its constructor.
    num_classes: None takes the number of classes that the shards name.
    init_from: a finished run, a checkpoint file or timm:NAME to start from, see `start_from`.
    mean, std: of the three channels, by which images are normalised; None takes those that the frozen zoomer was trained with, else
    those of the weights to start from, else ImageNet's.
    zoom_draw: what training draws per batch: `alpha`, uniform in [0, 1] (the paper), or `budget`, a number of zoomed
    cells uniform in [0, max_zoomed], which keeps all sequences of a batch equally long. fixed_zoom: always this alpha, or
    this number of cells, instead.
    scores: where a zooming model's scores come from, one of `scoring.SOURCES`; None takes the zoomer or the maps given.
    full_split: of a model of two stages, the first share of the training in which all cells are refined (CF-ViT: 200 of 300
    epochs, LF-ViT: 230 of 350).
    token_label_weight: above 0, the patches of an lvvit_* model learn labels made of the maps (see `TokenLabelLoss`).
    loss: ce, or bce, which asks of every class on its own (DeiT-III). mixup, cutmix: see `MixConfig`; label_smoothing
    goes with both losses. val_alpha: the threshold of validation; under zoom_draw `budget` it zooms max_zoomed / 2 cells.
    missing, damaged: what samples without a usable map and damaged tars do, see `RelevanceLoader`.
    """

    model: str = "zoomvit_small_patch16_224"
    model_args: dict[str, Any] = field(default_factory=dict)
    num_classes: int | None = None
    image_size: int = 224
    init_from: str | None = None
    mean: tuple[float, float, float] | None = None
    std: tuple[float, float, float] | None = None
    zoom_draw: ZoomDraw = "alpha"
    max_zoomed: int | None = None
    fixed_zoom: float | None = None
    scores: str | None = None
    full_split: float = 2 / 3
    token_label_weight: float = 0.0
    loss: Literal["ce", "bce"] = "ce"
    label_smoothing: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    mix_switch: float = 0.5
    mix_prob: float = 1.0
    val_alpha: float = 0.1
    missing: str = "error"
    damaged: str = "error"
    view: ViewConfig = field(default_factory=ViewConfig)
    train: TrainConfig = field(
        default_factory=lambda: TrainConfig(lr=1e-3, epochs=300.0, warmup_epochs=5.0, batch_size=128)
    )

    def __post_init__(self) -> None:
        check_choices(self)
        if self.std is not None and min(self.std) <= 0:
            raise UsageError(f"std {list(self.std)}: give numbers above 0")
        if self.num_classes is not None and self.num_classes < 1:
            raise UsageError(f"num_classes {self.num_classes}: give a number >= 1")
        if not 0.0 <= self.label_smoothing <= 1.0:
            raise UsageError(f"label_smoothing {self.label_smoothing:g}: give a share in [0, 1]")
        if not 0.0 <= self.full_split <= 1.0:
            raise UsageError(f"full_split {self.full_split:g}: give a share in [0, 1]")
        if self.token_label_weight < 0:
            raise UsageError(f"token_label_weight {self.token_label_weight:g}: give a number >= 0")
        if self.fixed_zoom is not None and not 0 <= self.fixed_zoom <= (1 if self.zoom_draw == "alpha" else math.inf):
            raise UsageError(f"fixed_zoom {self.fixed_zoom:g}: give an alpha in [0, 1], or a number of cells >= 0")
        if not 0.0 <= self.val_alpha <= 1.0:
            raise UsageError(f"val_alpha {self.val_alpha:g}: a threshold lies in [0, 1]")
        if self.token_label_weight and (self.loss != "ce" or self.mixup or self.cutmix or self.label_smoothing):
            raise UsageError("token_label_weight: goes with loss ce, without mixup, cutmix and label_smoothing")
        self.mix()

    def mix(self) -> MixConfig:
        """How batches are mixed. Errors: :class:`UsageError` for values out of range."""
        return MixConfig(
            mixup=self.mixup,
            cutmix=self.cutmix,
            switch=self.mix_switch,
            prob=self.mix_prob,
            smoothing=self.label_smoothing,
        )


class ClassifyTask:
    """Classification; a zooming model sees another zoom in every batch."""

    def __init__(
        self,
        model: nn.Module,
        source: ScoreSource | None,
        config: VitConfig,
        preprocessing: Preprocessing,
        device: torch.device,
        val: RelevanceLoader | None = None,
    ) -> None:
        self.model, self._source, self._config = model, source, config
        self._preprocessing, self._device, self._val = preprocessing, device, val
        self.call = model
        self.draws = torch.Generator()
        self.progress = 0.0

    def loss(self, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        check_labels(batch["label"], batch["key"], self.model.num_classes)
        batch = self._to_device(batch)
        labels = batch["label"]
        if self._config.mixup or self._config.cutmix:
            # Drawn by torch's global generator: each rank mixes its part of the batch in its own way.
            rng = np.random.default_rng(int(torch.randint(2**62, ())))
            batch = mix_batch(batch, self._config.mix(), rng, self.model.num_classes)
        images = batch["image"]
        scores = self._source.score(images, batch) if self._source is not None else None
        arguments: dict[str, Any] = {} if scores is None else {"scores": scores}
        if scores is not None and zooms(self.model):
            arguments |= self._draw_zoom()
        if isinstance(self.model, CFViT):
            arguments |= {"return_stages": True, "full_split": self.progress < self._config.full_split}
            coarse, logits = self.call(images, **arguments)
            criterion = CoarseToFineLoss(label_smoothing=self._config.label_smoothing)
            loss = criterion(coarse, logits, batch.get("target", labels))
        elif self._config.token_label_weight:
            logits, dense = self.call(images, return_dense=True, **arguments)
            side = math.isqrt(dense.shape[1])
            token_labels = relevance_token_labels(batch["relevance"], labels, self.model.num_classes, side)
            loss = TokenLabelLoss(self._config.token_label_weight)(logits, dense, labels, token_labels)
        else:
            logits = self.call(images, **arguments)
            loss = self._class_loss(logits, batch)
        accuracy = (logits.argmax(dim=1) == labels).float().mean()
        return loss, {"train_top1": accuracy}

    def _to_device(self, batch: dict[str, Any]) -> dict[str, Any]:
        """What a step computes with, normalised and on the device; boxes and flips stay behind."""
        moved = {
            name: to_device(batch[name], self._device) for name in ("image", "label", "relevance") if name in batch
        }
        return moved | {"key": batch["key"], "image": self._preprocessing.normalise(moved["image"])}

    def _class_loss(self, logits: Tensor, batch: dict[str, Any]) -> Tensor:
        smoothing = self._config.label_smoothing
        target = batch.get("target")  # [B, classes], of a mixed batch, smoothed already
        if self._config.loss == "ce":
            if target is not None:
                return F.cross_entropy(logits, target)
            return F.cross_entropy(logits, batch["label"], label_smoothing=smoothing)
        if target is None:
            target = mixup_target(batch["label"], self.model.num_classes, smoothing=smoothing)
        return F.binary_cross_entropy_with_logits(logits, target.to(logits.dtype))

    def _draw_zoom(self) -> dict[str, Any]:
        fixed = self._config.fixed_zoom
        if fixed is not None:
            return {"alpha": fixed} if self._config.zoom_draw == "alpha" else {"budget": int(fixed)}
        # One draw for the batch, whoever has which part of it.
        if self._config.zoom_draw == "alpha":
            return {"alpha": float(torch.rand((), generator=self.draws))}
        return {"budget": int(torch.randint(0, self._most_zoomed() + 1, (), generator=self.draws))}

    def _most_zoomed(self) -> int:
        most = self._config.max_zoomed
        return self.model.coarse_grid**2 if most is None else most

    @torch.no_grad()
    def validate(self, model: nn.Module) -> dict[str, float]:
        """Top-1 on the validation shards, when there are any."""
        if self._val is None:
            return {}
        zoom: dict[str, Any] = {}
        if zooms(model):
            budget = self._config.zoom_draw == "budget"
            zoom = {"budget": self._most_zoomed() // 2} if budget else {"alpha": self._config.val_alpha}
        right = count = 0
        for batch in self._val:
            batch = self._to_device(batch)
            scores = self._source.score(batch["image"], batch) if self._source is not None else None
            logits = model(batch["image"]) if scores is None else model(batch["image"], scores, **zoom)
            right += int((logits.argmax(dim=1) == batch["label"]).sum())
            count += len(logits)
        right, count = ranks().total([right, count])  # each rank had its share of the shards
        return {"val_top1": right / count}


def train_vit(
    shards: Path,
    out: Path,
    config: VitConfig,
    *,
    zoomer: Path | None = None,
    maps: Path | None = None,
    val: Path | None = None,
    val_maps: Path | None = None,
    resume: Resume = "auto",
    progress: Progress = silent,
    stop: Callable[[], bool] = never,
) -> dict[str, float]:
    """Train a classifier on shards and leave a run folder at `out`.

    A zooming model needs its scores from somewhere: a finished `zoomer` run (frozen, live), the cached `maps`, or what
    `config.scores` names. With `val` shards (and `val_maps`, where maps are the scores) every epoch ends with a validation, and
    the weights that did best are kept. A finished run is left alone, an interrupted one is gone on with, unless `resume`
    is "never". Several processes may train together, see `loop.train`. Errors: :class:`UsageError`, :class:`ZpipeError`.
    """
    team = ranks()
    device = resolve_device(config.train.device)
    store = RelevanceMaps(maps) if maps is not None else None
    loader = RelevanceLoader(
        shards,
        store,
        batch_size=team.part(config.train.batch_size),
        image_size=config.image_size,
        augment="train",
        seed=config.train.seed,
        num_workers=config.train.data_workers,
        rank=team.rank,
        world_size=team.size,
        repeats=config.train.repeats,
        missing=config.missing,
        damaged=config.damaged,
        view=config.view,
    )
    num_classes = config.num_classes or len(loader.index.classes)
    if not num_classes:
        raise UsageError(f"{shards}: its index names no classes; give --num-classes")
    torch.manual_seed(config.train.seed)
    model = build_vit(config.model, num_classes, config.image_size, config.model_args).to(device)
    if zooms(model):
        cells = model.coarse_grid**2
        fixed = config.fixed_zoom if config.zoom_draw == "budget" else None
        for name, count in (("max_zoomed", config.max_zoomed), ("fixed_zoom", fixed)):
            if not 0 <= (count or 0) <= cells:
                raise UsageError(f"{name} {count:g}: this model has {cells} cells to zoom")
    if isinstance(model, CFViT) and config.loss != "ce":
        raise UsageError(f"loss {config.loss}: the two stages of {config.model} learn by ce")
    source = _source(model, config, zoomer, store)
    frozen = source.zoomer if source is not None else None
    zoomers_own = None
    if frozen is not None:
        frozen.to(device)
        zoomers_own = load_zoomer(zoomer)[1]  # now: at the end, days later, its folder may hold another one
    mean, std = _normalisation(Path(out), config, zoomers_own)
    preprocessing = Preprocessing(image_size=config.image_size, mean=mean, std=std, crop_pct=config.view.crop_pct)
    held_out = None
    if val is not None:
        held_out = RelevanceLoader(
            val,
            val_maps,
            batch_size=team.part(config.train.batch_size),
            image_size=config.image_size,
            augment="eval",
            num_workers=config.train.data_workers,
            rank=team.rank,
            world_size=team.size,
            missing="uniform",
            view=config.view,
        )
        if source is not None and source.name == "maps" and held_out.maps is None:
            raise UsageError("--val: the scores are maps; give --val-maps, those of the validation shards")
    settings = (
        asdict(config)
        | {"classes": list(loader.index.classes)}
        | maps_record(store)
        | {"val": _text(val), "val_maps": _text(val_maps)}
        | {"shards": str(shards), "zoomer": _text(zoomer), "maps": _text(maps)}
        | {"mean": mean, "std": std}
        # A path may come to hold something else before the run is gone on with.
        | {"shards_digest": loader.digest, "zoomer_digest": None if zoomer is None else digest_zoomer(zoomer)}
    )
    if begin_run(out, "vit", to_json(settings), resume, defaults=to_json(asdict(VitConfig()))):
        return {}
    if config.init_from is not None and not (Path(out) / CHECKPOINT_NAME).is_file():  # which holds what became of it
        start_from(model, config.init_from)
    task = ClassifyTask(model, source, config, preprocessing, device, held_out)
    metrics = Trainer(task, loader, config.train, Path(out)).train("train-vit", progress, stop)
    if not team.first:
        return metrics
    if frozen is not None:
        save_zoomer(Path(out), frozen.cpu(), zoomers_own)
    save_model(Path(out), model.cpu(), preprocessing)
    return metrics


def _source(
    model: nn.Module, config: VitConfig, zoomer: Path | None, store: RelevanceMaps | None
) -> ScoreSource | None:
    """The source of a zooming model's scores; None for a plain ViT."""
    labels_from_maps = config.token_label_weight > 0
    backbone = model.backbone if isinstance(model, FusedViT) else model
    if labels_from_maps and (store is None or not isinstance(backbone, LVViT)):
        raise UsageError("token_label_weight: needs an lvvit_* model, or one fused on it, and --maps")
    if not takes_scores(model):
        if zoomer is not None or config.scores is not None or (store is not None and not labels_from_maps):
            raise UsageError(
                "this model takes no scores; leave out --zoomer, --maps and --scores, or choose a zoomvit_* model"
            )
        return None
    name = config.scores or default_source(zoomer, None if labels_from_maps and zoomer is not None else store)
    if name is None and chooses_itself(model):
        name = "own"
    if name is None:
        raise UsageError(
            "a zooming model needs its scores from one source: give --zoomer RUN or --maps STORE, or --scores"
        )
    given = (("zoomer", "--zoomer", zoomer), ("maps", "--maps", None if labels_from_maps else store))
    for source, option, value in given:
        if value is not None and name != source:
            raise UsageError(f"--scores {name}: has no use for {option}; leave it out, or choose --scores {source}")
    opened = open_zoomer(zoomer, config.image_size) if zoomer is not None else None
    return choose_source(name, model, zoomer=opened, origin=str(zoomer), store=store, training=True)


def _normalisation(
    out: Path, config: VitConfig, zoomers: Preprocessing | None
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of the channels, see `VitConfig`. A run keeps those it began with, once its settings bind."""
    if (config.mean is None) != (config.std is None):
        raise UsageError("mean, std: give both, or neither")
    if config.mean is not None and config.std is not None:
        check_normalisation(zoomers, config.mean, config.std)
        return config.mean, config.std
    told: Mapping[str, Any] = {}
    if (out / CHECKPOINT_NAME).is_file() or (out / CONFIG_NAME).is_file():
        told = read_record(out)["settings"]
    elif zoomers is not None:
        return zoomers.mean, zoomers.std
    elif config.init_from is not None:
        told = described(config.init_from)
    return tuple(told.get("mean", IMAGENET_DEFAULT_MEAN)), tuple(told.get("std", IMAGENET_DEFAULT_STD))


def check_normalisation(zoomer: Preprocessing | None, mean: Sequence[float], std: Sequence[float]) -> None:
    """Whether a frozen zoomer was trained on images that were normalised as a model's are: it is given the same.

    Errors: :class:`UsageError` with both.
    """
    if zoomer is not None and (tuple(zoomer.mean), tuple(zoomer.std)) != (tuple(mean), tuple(std)):
        wanted, given = (
            [json.dumps(list(each), separators=(",", ":")) for each in pair]
            for pair in ((zoomer.mean, zoomer.std), (mean, std))
        )
        raise UsageError(
            f"--zoomer: was trained with mean {wanted[0]} and std {wanted[1]}, the model with {given[0]} and {given[1]}; "
            f"train the model with --set mean={wanted[0]} --set std={wanted[1]}"
        )


def _text(path: Path | None) -> str | None:
    return None if path is None else str(path)
