"""Stage 1: distil relevance maps into a Zoomer (ZoomViT, section 3.2, Eq. 5)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn

from zpipe.schemas.errors import UsageError
from zpipe.schemas.model_config import MAX_SIDE
from zpipe.schemas.progress import Progress, silent
from zpipe.schemas.relevance_maps import RelevanceMaps
from zpipe.schemas.storage import as_path
from zpipe.train.checkpoint import Preprocessing, save_zoomer
from zpipe.train.data.join import Damaged, Missing
from zpipe.train.data.map_stores import Join
from zpipe.train.data.transforms import ViewConfig
from zpipe.train.device import resolve_device, to_device
from zpipe.train.fit.config import TrainConfig
from zpipe.train.fit.defaults import of_earlier_versions, resolved
from zpipe.train.fit.loaders import training_loader
from zpipe.train.fit.loop import Trainer, never
from zpipe.train.losses import KlDirection, Normalisation, ZoomerLoss
from zpipe.train.models.zoomer import Zoomer
from zpipe.train.ranks import ranks
from zpipe.train.run_files import Resume, begin_run, maps_record, run_lease
from zpipe.train.settings import check_bounds, check_choices, to_json

BOUNDS = {"num_blocks": (1, 64), "width": (1, 4096), "image_size": (1, MAX_SIDE), "w_kl": (0, 1e6), "w_dice": (0, 1e6)}


@dataclass(frozen=True, kw_only=True)
class ZoomerConfig:
    """Settings of stage 1. The defaults are the paper's: n = 4, AdamW, learning rate 0.01, batch size 128, 100 epochs.

    The paper does not give the weights of the loss terms; our defaults are those of `ZoomerLoss`.
    """

    num_blocks: int = 4
    """Convolutional blocks of the zoomer, the paper's n: 2, 4 or 6."""

    width: int = 64
    """Channels of the first stage of the zoomer."""

    image_size: int = 224
    """Side of the images, in pixels."""

    w_kl: float = 0.1
    """Weight of the KL term in the loss."""

    w_dice: float = 0.1
    """Weight of the Dice term in the loss."""

    kl_direction: KlDirection = "student||teacher"
    """Which of the two distributions the divergence is taken from, see `ZoomerLoss`."""

    normalisation: Normalisation = "sum"
    """How maps become the distributions that KL compares, see `ZoomerLoss`."""

    missing: Missing = "error"
    """How to handle samples without a usable map, see `RelevanceLoader`."""

    join: Join = "tar"
    """How maps find their images: `tar` or `image`, see `RelevanceLoader`."""

    damaged: Damaged = "error"
    """How to handle damaged tars and samples, see `RelevanceLoader`."""

    view: ViewConfig = field(default_factory=ViewConfig)
    """Crops, flips and colours of the training images."""

    train: TrainConfig = field(default_factory=lambda: TrainConfig(lr=0.01, epochs=100.0, batch_size=128))
    """Settings of the training loop."""

    def __post_init__(self) -> None:
        check_choices(self)
        self.loss()
        check_bounds(self, BOUNDS)

    def loss(self) -> ZoomerLoss:
        """The loss with these weights.

        Raises:
            UsageError: If a weight is out of range.
        """
        try:
            return ZoomerLoss(self.w_kl, self.w_dice, self.kl_direction, self.normalisation)
        except ValueError as error:
            raise UsageError(f"train-zoomer: {error}") from error


class ZoomerTask:
    """Predict the min-max normalised relevance of each crop."""

    def __init__(self, model: Zoomer, loss: ZoomerLoss, preprocessing: Preprocessing, device: torch.device) -> None:
        self.model, self._loss, self._preprocessing, self._device = model, loss, preprocessing, device
        self.call: Callable[..., Any] = model
        self.draws = torch.Generator()  # nothing is drawn
        self.progress = 0.0

    def loss(self, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """The distillation loss of a batch, and its terms."""
        images = self._preprocessing.normalise(to_device(batch["image"], self._device))
        target = to_device(batch["relevance"], self._device).flatten(1)  # [B, grid * grid]
        return self._loss(self.call(images), target)

    def validate(self, model: nn.Module) -> dict[str, float]:
        """No metrics: `zpipe evaluate` measures a zoomer on held-out data, for which it needs the validation maps."""
        return {}


def train_zoomer(
    shards: Path,
    maps: Path,
    out: Path,
    config: ZoomerConfig,
    *,
    resume: Resume = "auto",
    progress: Progress = silent,
    stop: Callable[[], bool] = never,
) -> dict[str, float]:
    """Train a Zoomer on shards and their maps, and leave a run folder at `out`.

    Several processes may train together, see `Trainer`.

    Args:
        shards: The training shards.
        maps: The relevance store made from them.
        out: The run folder. A finished run is left alone, an interrupted one is resumed.
        config: The settings.
        resume: "never" to refuse a folder that holds a run already.
        progress: Called with the progress of the training.
        stop: Called once per batch; True saves and stops.

    Returns:
        An empty dictionary: this stage has no validation.

    Raises:
        UsageError: If a setting is wrong, or does not fit the data.
        ZpipeError: If data or run can't be used, or the training fails, see `Trainer`.
    """
    out, shards, maps = Path(out), as_path(shards), as_path(maps)
    store = RelevanceMaps(maps)
    grid = store.manifest.provenance.grid
    if grid[0] != grid[1]:
        raise UsageError(f"{maps}: maps of {grid[0]} x {grid[1]} cells; the zoomer needs a square grid")
    config = replace(config, train=resolved(config.train, out))
    device = resolve_device(config.train.device)
    loader = training_loader(shards, store, config)
    loader.report_coverage(progress)
    settings = asdict(config) | {
        "shards": str(shards),
        "maps": str(maps),
        "shards_digest": loader.digest,
        **maps_record(store),
    }
    preprocessing = Preprocessing(
        image_size=config.image_size,
        mean=IMAGENET_DEFAULT_MEAN,
        std=IMAGENET_DEFAULT_STD,
        crop_pct=config.view.crop_pct,
    )
    with run_lease(out) as check_lease:
        if begin_run(
            out, "zoomer", to_json(settings), resume, defaults=of_earlier_versions(to_json(asdict(ZoomerConfig())))
        ):
            return {}
        torch.manual_seed(config.train.seed)
        task = ZoomerTask(_zoomer(config, grid[0]).to(device), config.loss(), preprocessing, device)
        trainer = Trainer(task, loader, config.train, out)
        metrics = trainer.train("train-zoomer", progress, lambda: check_lease() or stop())
        if ranks().first:
            save_zoomer(out, task.model.cpu(), preprocessing)
    return metrics


def _zoomer(config: ZoomerConfig, grid: int) -> Zoomer:
    try:
        return Zoomer(config.num_blocks, grid, width=config.width)
    except ValueError as error:
        raise UsageError(f"train-zoomer: {error}") from error
