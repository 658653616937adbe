"""Stage 2: train a ZoomViT under a frozen Zoomer or cached maps; the same command trains plain ViTs, without zoom."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
import torch.nn.functional as F
from timm.data.mixup import mixup_target
from torch import Tensor, nn

from zpipe.schemas.classes import ClassNames, match_classes
from zpipe.schemas.errors import UsageError, ZpipeError
from zpipe.schemas.model_config import CONFIG_NAME, MAX_CLASSES, MAX_SIDE, read_class_names, read_model_config
from zpipe.schemas.progress import Progress, silent
from zpipe.schemas.relevance_maps import RelevanceMaps
from zpipe.schemas.storage import as_path
from zpipe.train.checkpoint import Preprocessing, digest_zoomer, load_zoomer, save_model, save_zoomer
from zpipe.train.data.join import Damaged, Missing
from zpipe.train.data.labels import check_labels
from zpipe.train.data.loader import RelevanceLoader
from zpipe.train.data.map_stores import Join
from zpipe.train.data.mix import MixConfig, mix_batch
from zpipe.train.data.stream import read_tar
from zpipe.train.data.transforms import ViewConfig
from zpipe.train.device import resolve_device, to_device
from zpipe.train.fit.config import TrainConfig
from zpipe.train.fit.defaults import of_earlier_versions, resolved
from zpipe.train.fit.initialise import build_vit, check_source, start_from
from zpipe.train.fit.loaders import training_loader, validation_loader
from zpipe.train.fit.loop import Trainer, never
from zpipe.train.fit.normalisation import choose_normalisation
from zpipe.train.losses import CoarseToFineLoss, TokenLabelLoss, relevance_token_labels
from zpipe.train.models.operating_points import OperatingPoint, logits_of
from zpipe.train.models.zoomer import Zoomer
from zpipe.train.ranks import ranks
from zpipe.train.run_files import CHECKPOINT_NAME, WEIGHTS_NAME, Resume, begin_run, maps_record, run_lease
from zpipe.train.scoring import (
    SOURCES,
    ScoreSource,
    choose_source,
    default_source,
    open_zoomer,
    run_model,
    score_use,
    zooms,
)
from zpipe.train.settings import check_bounds, check_choices, to_json

ZoomDraw = Literal["alpha", "budget"]
BOUNDS = {
    "num_classes": (1, MAX_CLASSES),
    "image_size": (1, MAX_SIDE),
    "max_zoomed": (0, 2**26),
    "full_split": (0, 1),
    "token_label_weight": (0, 1e6),
    "label_smoothing": (0, 1),
    "mixup": (0, 1000),
    "cutmix": (0, 1000),
    "mix_switch": (0, 1),
    "mix_prob": (0, 1),
    "val_alpha": (0, 1),
}


@dataclass(frozen=True, kw_only=True)
class VitConfig:
    """Settings of stage 2."""

    model: str = "zoomvit_small_patch16_224"
    """A classifier of timm or one of ours, such as zoomvit_*."""

    model_args: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of the model's constructor."""

    num_classes: int | None = None
    """Number of classes; None for the number of classes that the shards name."""

    image_size: int = 224
    """Side of the images, in pixels."""

    init_from: str | None = None
    """Weights to start from: a finished run (RUN, RUN:best, RUN:7), a weights file or timm:NAME, see `start_from`."""

    mean: tuple[float, float, float] | None = None
    """Mean of the channels, to normalise images by. None for that of the frozen zoomer, else that of the weights to
    start from, else ImageNet's."""

    std: tuple[float, float, float] | None = None
    """Standard deviation of the channels, as `mean`."""

    zoom_draw: ZoomDraw = "alpha"
    """What is drawn for each training batch: `alpha`, a threshold uniform in [0, 1] (the paper), or `budget`, a number
    of zoomed cells uniform in [0, max_zoomed], which keeps all sequences of a batch equally long."""

    max_zoomed: int | None = None
    """Largest number of zoomed cells under zoom_draw `budget`; None for all cells."""

    fixed_zoom: float | None = None
    """Always this alpha, or this number of cells, instead of a random one."""

    scores: str | None = None
    """Where the scores of a zooming model come from, one of `scoring.SOURCES`; None for the given zoomer or maps."""

    full_split: float = 2 / 3
    """Fraction of the training at whose beginning a model of two stages refines all cells (CF-ViT: 200 of 300 epochs,
    LF-ViT: 230 of 350)."""

    token_label_weight: float = 0.0
    """Weight of the token labels, made of the maps, that the patches of an lvvit_* model learn (see `TokenLabelLoss`);
    0 for none."""

    loss: Literal["ce", "bce"] = "ce"
    """`ce`: cross-entropy; `bce`: independent binary cross-entropy per class (DeiT-III)."""

    label_smoothing: float = 0.0
    """Label smoothing of either loss."""

    mixup: float = 0.0
    """Parameter of MixUp, see `MixConfig`."""

    cutmix: float = 0.0
    """Parameter of CutMix, see `MixConfig`."""

    mix_switch: float = 0.5
    """Probability of CutMix rather than MixUp, see `MixConfig`."""

    mix_prob: float = 1.0
    """Probability that a batch is mixed, see `MixConfig`."""

    val_alpha: float = 0.1
    """Threshold of the validation. Under zoom_draw `budget`, max_zoomed / 2 cells are zoomed instead."""

    missing: Missing = "error"
    """How to handle samples without a usable map, see `RelevanceLoader`."""

    join: Join = "tar"
    """How maps find their images: `tar` or `image`, see `RelevanceLoader`."""

    damaged: Damaged = "error"
    """How to handle damaged tars and samples, see `RelevanceLoader`."""

    view: ViewConfig = field(default_factory=ViewConfig)
    """Crops, flips and colours of the images."""

    train: TrainConfig = field(
        default_factory=lambda: TrainConfig(lr=1e-3, epochs=300.0, warmup_epochs=5.0, batch_size=128)
    )
    """Settings of the training loop."""

    def __post_init__(self) -> None:
        check_choices(self)
        if self.init_from is not None:
            check_source(self.init_from)
        if self.scores is not None and self.scores not in SOURCES:
            raise UsageError(f"--scores {self.scores}: choose one of {', '.join(SOURCES)}")
        check_bounds(self, BOUNDS)
        for name, low in (("mean", -10.0), ("std", 1e-4)):
            channels = getattr(self, name)
            if channels is not None and not all(low <= value <= 10 for value in channels):
                raise UsageError(f"{name} {list(channels)}: give numbers from {low:g} to 10")
        if self.fixed_zoom is not None and not 0 <= self.fixed_zoom <= (1 if self.zoom_draw == "alpha" else 2**26):
            raise UsageError(f"fixed_zoom {self.fixed_zoom:g}: give an alpha in [0, 1], or a number of cells >= 0")
        if self.token_label_weight and (self.loss != "ce" or self.mixup or self.cutmix or self.label_smoothing):
            raise UsageError("token_label_weight: goes with loss ce, without mixup, cutmix and label_smoothing")
        self.mix()

    def mix(self) -> MixConfig:
        """How batches are mixed.

        Raises:
            UsageError: If a value is out of range.
        """
        return MixConfig(
            mixup=self.mixup,
            cutmix=self.cutmix,
            switch=self.mix_switch,
            prob=self.mix_prob,
            smoothing=self.label_smoothing,
        )


class ClassifyTask:
    """Classification; a zooming model gets another zoom in every batch.

    Args:
        model: The classifier, with the attribute `num_classes`.
        source: Where its scores come from; None for a model without scores.
        config: The settings of the stage.
        preprocessing: How images are normalised.
        device: Where the model is.
        val: Validation batches, if there are any.
    """

    def __init__(
        self,
        model: nn.Module,
        source: ScoreSource | None,
        config: VitConfig,
        preprocessing: Preprocessing,
        device: torch.device,
        val: RelevanceLoader | None = None,
    ) -> None:
        self.model: Any = model  # any classifier with timm's attributes
        self._source, self._config = source, config
        self._preprocessing, self._device, self._val = preprocessing, device, val
        self.call: Callable[..., Any] = model
        self.draws = torch.Generator()
        self.progress = 0.0

    def loss(self, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of a batch, and the accuracy on it."""
        check_labels(batch["label"], batch["key"], self.model.num_classes)
        batch = self._to_device(batch)
        labels = batch["label"]
        if self._config.mixup or self._config.cutmix:
            # Seeded from torch's global generator, so that each rank mixes its part of the batch in its own way.
            rng = np.random.default_rng(int(torch.randint(2**62, ())))
            batch = mix_batch(batch, self._config.mix(), rng, self.model.num_classes)
        images = batch["image"]
        scores = self._source.score(images, batch) if self._source is not None else None
        arguments: dict[str, Any] = {} if scores is None else {"scores": scores}
        if scores is not None and zooms(self.model):
            arguments |= self._draw_zoom()
        if getattr(self.model, "two_stage", False):
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
        """The tensors that a step needs, on the device, images normalised; boxes and flips are left out."""
        moved = {
            name: to_device(batch[name], self._device) for name in ("image", "label", "relevance") if name in batch
        }
        return moved | {"key": batch["key"], "image": self._preprocessing.normalise(moved["image"])}

    def _class_loss(self, logits: Tensor, batch: dict[str, Any]) -> Tensor:
        smoothing = self._config.label_smoothing
        logits = logits.float()  # not every autocast computes losses in float32
        target = batch.get("target")  # [B, classes] of a mixed batch, with label smoothing
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
        # From `draws`: the whole batch has one zoom, whichever rank has which part of it.
        if self._config.zoom_draw == "alpha":
            return {"alpha": float(torch.rand((), generator=self.draws))}
        return {"budget": int(torch.randint(0, self._max_zoomed() + 1, (), generator=self.draws))}

    def _max_zoomed(self) -> int:
        limit = self._config.max_zoomed
        return int(self.model.coarse_grid) ** 2 if limit is None else limit

    @torch.no_grad()
    def validate(self, model: nn.Module) -> dict[str, float]:
        """Top-1 accuracy on the validation shards, if there are any."""
        if self._val is None:
            return {}
        point = OperatingPoint(name="validation")
        if zooms(model) and self._source is not None and self._source.name != "none":
            by_budget = self._config.zoom_draw == "budget"
            zoom = {"budget": self._max_zoomed() // 2} if by_budget else {"alpha": self._config.val_alpha}
            point = OperatingPoint(name="validation", arguments=zoom)
        correct = count = 0
        for batch in self._val:
            check_labels(batch["label"], batch["key"], self.model.num_classes)
            batch = self._to_device(batch)
            logits = logits_of(run_model(model, self._source, batch, point)[0])
            right = logits.argmax(dim=1) == batch["label"]
            finite = logits.isfinite().all(dim=1)
            # Both numbers in one copy, for which the host waits.
            all_right, all_finite = torch.stack([right.sum(), finite.sum()]).tolist()
            if all_finite < len(logits):
                first = int((~finite).nonzero()[0])
                raise ZpipeError(
                    f"{self._val.path}: key {batch['key'][first]}: the model's answer is NaN or infinite, which is no "
                    "accuracy to choose the best epoch by; lower --lr"
                )
            correct += all_right
            count += len(logits)
        damage = self._val.damage
        # Each rank has a part of the shards.
        sums = ranks().total([correct, count, len(damage.shards), len(damage.places)])
        all_correct, all_count, shards, samples = sums
        if not all_count:
            raise ZpipeError(f"{self._val.path}: no validation sample can be used; give sound shards")
        damaged = {"val_damaged_shards": shards, "val_damaged_samples": samples}
        return {"val_top1": all_correct / all_count} | {name: value for name, value in damaged.items() if value}


@dataclass(frozen=True, kw_only=True)
class VitInputs:
    """The paths that a run of stage 2 reads from."""

    shards: Path
    """The training shards."""
    zoomer: Path | None = None
    """A finished zoomer run, which scores images live."""
    maps: Path | None = None
    """The relevance store of the training shards."""
    val: Path | None = None
    """The validation shards."""
    val_maps: Path | None = None
    """The relevance store of the validation shards."""


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

    A zooming model needs scores from a finished `zoomer` run (frozen, live), the cached `maps`, or what `config.scores`
    names. Several processes may train together, see `Trainer`.

    Args:
        shards: The training shards.
        out: The run folder. A finished run is left alone, an interrupted one is resumed.
        config: The settings.
        zoomer: A finished zoomer run, which scores images live.
        maps: The relevance store of the training shards.
        val: The validation shards. With them, every epoch ends with a validation, and the best weights are kept.
        val_maps: The relevance store of the validation shards, needed if maps are the scores.
        resume: "never" to refuse a folder that holds a run already.
        progress: Called with the progress of the training.
        stop: Called once per batch; True saves and stops.

    Returns:
        The metrics of the last validation; empty without one, and for a run that was finished already.

    Raises:
        UsageError: If a setting is wrong, or does not fit model and data.
        ZpipeError: If data or run can't be used, or the training fails, see `Trainer`.
    """
    out = Path(out)
    paths = {"zoomer": zoomer, "maps": maps, "val": val, "val_maps": val_maps}
    inputs = VitInputs(
        shards=as_path(shards), **{name: as_path(path) for name, path in paths.items() if path is not None}
    )
    config = replace(config, train=resolved(config.train, out))
    device = resolve_device(config.train.device)
    store = RelevanceMaps(inputs.maps) if inputs.maps is not None else None
    loader = training_loader(inputs.shards, store, config)
    loader.report_coverage(progress)
    model: Any = _build_model(config, loader).to(device)  # with the attributes of a classifier of timm
    source = _source(model, config, inputs.zoomer, store)
    frozen = _frozen_zoomer(source, inputs.zoomer, device)
    mean, std = choose_normalisation(
        out, config.mean, config.std, zoomer=frozen[1] if frozen is not None else None, init_from=config.init_from
    )
    preprocessing = Preprocessing(image_size=config.image_size, mean=mean, std=std, crop_pct=config.view.crop_pct)
    val_loader = _val_loader(inputs, config, source, loader, cast(int, model.num_classes))
    settings = _recorded_settings(inputs, config, loader, store, preprocessing)
    with run_lease(out) as check_lease:
        if begin_run(out, "vit", settings, resume, defaults=of_earlier_versions(to_json(asdict(VitConfig())))):
            return {}
        if config.init_from is not None and not (out / CHECKPOINT_NAME).is_file():  # the checkpoint has its own weights
            _start(model, config.init_from, loader)
        task = ClassifyTask(model, source, config, preprocessing, device, val_loader)
        trainer = Trainer(task, loader, config.train, out)
        metrics = trainer.train("train-vit", progress, lambda: check_lease() or stop())
        if ranks().first:
            if frozen is not None:
                save_zoomer(out / "zoomer", frozen[0].cpu(), frozen[1])
            save_model(out, model.cpu(), preprocessing)
    return metrics


def _start(model: nn.Module, source: str, loader: RelevanceLoader) -> None:
    """Start the model from other weights; its head stays as it was drawn if these are of other classes."""
    classifier = getattr(model, "pretrained_cfg", {}).get("classifier") or "head"
    heads = tuple(f"{name}." for name in ([classifier] if isinstance(classifier, str) else classifier))
    drawn = {name: tensor.clone() for name, tensor in model.state_dict().items() if name.startswith(heads)}
    start_from(model, source)
    theirs = _class_names(source)
    if theirs and loader.index.classes and theirs != tuple(loader.index.classes):
        model.load_state_dict(drawn, strict=False)


def _class_names(source: str) -> tuple[str, ...]:
    """The names of the classes of weights to start from; empty if they are not known."""
    for folder in (Path(source), Path(source.rpartition(":")[0]), Path(source).parent):
        if (folder / CONFIG_NAME).is_file() and (folder / WEIGHTS_NAME).is_file():
            return read_class_names(folder, read_model_config(folder / CONFIG_NAME))
    return ()


def _build_model(config: VitConfig, loader: RelevanceLoader) -> nn.Module:
    """Create the model, and check the settings that depend on it."""
    num_classes = config.num_classes or len(loader.index.classes)
    if not num_classes:
        raise UsageError(f"{loader.path}: its index names no classes; give --num-classes")
    torch.manual_seed(config.train.seed)
    model: Any = build_vit(config.model, num_classes, config.image_size, config.model_args)
    if zooms(model):
        cells = model.coarse_grid**2
        fixed = config.fixed_zoom if config.zoom_draw == "budget" else None
        for name, count in (("max_zoomed", config.max_zoomed), ("fixed_zoom", fixed)):
            if not 0 <= (count or 0) <= cells:
                raise UsageError(f"{name} {count:g}: this model has {cells} cells to zoom")
    if getattr(model, "two_stage", False) and config.loss != "ce":
        raise UsageError(f"loss {config.loss}: the two stages of {config.model} learn by ce")
    return model


def _frozen_zoomer(
    source: ScoreSource | None, path: Path | None, device: torch.device
) -> tuple[Zoomer, Preprocessing] | None:
    """The source's zoomer, moved to the device, and its preprocessing; None if the source has no zoomer."""
    if source is None or source.zoomer is None or path is None:
        return None
    # Its preprocessing is read now: at the end of the training, days later, the folder may hold another zoomer.
    return source.zoomer.to(device), load_zoomer(path)[1]


def _val_loader(
    inputs: VitInputs, config: VitConfig, source: ScoreSource | None, training: RelevanceLoader, num_classes: int
) -> RelevanceLoader | None:
    """The validation batches, after checks of the set that will choose the best epoch."""
    if inputs.val is None:
        return None
    loader = validation_loader(inputs.val, inputs.val_maps, config)
    if source is not None and source.name == "maps" and loader.maps is None:
        raise UsageError("--val: the scores are maps; give --val-maps, those of the validation shards")
    match_classes(
        ClassNames(names=loader.index.classes, where=f"--val {inputs.val}"),
        ClassNames(names=training.index.classes, where=str(training.path)),
        remedy="make both sets with the same classes",
    )
    if not loader.index.count:
        raise UsageError(f"--val {inputs.val}: holds no samples; give shards with some")
    ranks().from_first(lambda: _check_first_labels(loader, num_classes))
    return loader


def _check_first_labels(loader: RelevanceLoader, num_classes: int) -> None:
    """Check the labels of the first tar before a training of hours; those of the others are checked when they are read.

    Raises:
        ZpipeError: A sample has no label, or one outside the model's classes.
    """
    if loader.damaged == "skip":
        return  # a damaged tar is left out, and counted, in the validation
    first = loader.shards[0]
    for sample in read_tar(first):
        if sample.label is None:
            raise ZpipeError(
                f"{first.path}: key {sample.key}: has no label (.cls, or label in .json); add one, or leave out --val"
            )
        check_labels(torch.tensor([sample.label]), [sample.key], num_classes)


def _recorded_settings(
    inputs: VitInputs,
    config: VitConfig,
    loader: RelevanceLoader,
    store: RelevanceMaps | None,
    preprocessing: Preprocessing,
) -> dict[str, Any]:
    """What run.json says: the settings, the paths, and digests of what they hold, which may change before a resume."""
    paths = {item.name: getattr(inputs, item.name) for item in fields(inputs)}
    settings: dict[str, Any] = (
        asdict(config)
        | {"classes": list(loader.index.classes)}
        | maps_record(store)
        | {name: None if path is None else str(path) for name, path in paths.items()}
        | {"mean": preprocessing.mean, "std": preprocessing.std}
        | {"shards_digest": loader.digest}
        | {"zoomer_digest": None if inputs.zoomer is None else digest_zoomer(inputs.zoomer)}
    )
    return to_json(settings)


def _source(
    model: nn.Module, config: VitConfig, zoomer: Path | None, store: RelevanceMaps | None
) -> ScoreSource | None:
    """The source of a zooming model's scores; None for a model that takes no scores."""
    labels_from_maps = config.token_label_weight > 0
    if labels_from_maps and (store is None or not getattr(model, "dense_head", False)):
        raise UsageError("token_label_weight: needs an lvvit_* model, or one fused on it, and --maps")
    use = score_use(model)
    if use is None:
        if zoomer is not None or config.scores is not None or (store is not None and not labels_from_maps):
            raise UsageError(
                "this model takes no scores; leave out --zoomer, --maps and --scores, or choose a zoomvit_* model"
            )
        return None
    name = config.scores or default_source(zoomer, None if labels_from_maps and zoomer is not None else store)
    if name is None and use.has_own:
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
