"""Stage 1: distil relevance maps into a Zoomer (ZoomViT, section 3.2, Eq. 5)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn

from zpipe.schemas.errors import UsageError
from zpipe.schemas.progress import Progress, silent
from zpipe.schemas.relevance_maps import RelevanceMaps
from zpipe.train.checkpoint import Preprocessing, Resume, begin_run, maps_record, save_model
from zpipe.train.data.loader import RelevanceLoader
from zpipe.train.data.transforms import ViewConfig
from zpipe.train.device import resolve_device, to_device
from zpipe.train.fit.config import TrainConfig
from zpipe.train.fit.loop import Trainer, never
from zpipe.train.losses import ZoomerLoss
from zpipe.train.models.zoomer import Zoomer
from zpipe.train.ranks import ranks
from zpipe.train.settings import to_json


@dataclass(frozen=True, kw_only=True)
class ZoomerConfig:
    """Settings of stage 1. The defaults are the paper's: n = 4, AdamW, learning rate 0.01, batch 128, 100 epochs.

    The weights of KL and Dice in the loss are not given there; ours are those of `ZoomerLoss`. missing, damaged: what samples
    without a usable map and damaged tars do, see `RelevanceLoader`.
    """

    num_blocks: int = 4
    width: int = 64
    image_size: int = 224
    w_kl: float = 0.1
    w_dice: float = 0.1
    kl_direction: str = "student||teacher"
    normalisation: str = "sum"
    missing: str = "error"
    damaged: str = "error"
    view: ViewConfig = field(default_factory=ViewConfig)
    train: TrainConfig = field(default_factory=lambda: TrainConfig(lr=0.01, epochs=100.0, batch_size=128))


class ZoomerTask:
    """Predict the min-max normalised relevance of the crop at hand."""

    def __init__(self, model: Zoomer, loss: ZoomerLoss, preprocessing: Preprocessing, device: torch.device) -> None:
        self.model, self._loss, self._preprocessing, self._device = model, loss, preprocessing, device
        self.call = model
        self.draws = torch.Generator()  # nothing is drawn
        self.progress = 0.0

    def loss(self, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        images = self._preprocessing.normalise(to_device(batch["image"], self._device))
        target = to_device(batch["relevance"], self._device).flatten(1)  # [B, grid * grid]
        return self._loss(self.call(images), target)

    def validate(self, model: nn.Module) -> dict[str, float]:
        """Held-out figures come from `zpipe evaluate`, which needs the validation maps."""
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
    """Train a Zoomer on shards joined with their maps and leave a run folder at `out`.

    A finished run is left alone, an interrupted one is gone on with, unless `resume` is "never". Several processes may
    train together, see `loop.train`. Errors: :class:`UsageError`, :class:`ZpipeError`.
    """
    team = ranks()
    store = RelevanceMaps(maps)
    grid = store.manifest.provenance.grid
    if grid[0] != grid[1]:
        raise UsageError(f"{maps}: maps of {grid[0]} x {grid[1]} cells; the zoomer needs a square grid")
    device = resolve_device(config.train.device)
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
    try:
        loss = ZoomerLoss(config.w_kl, config.w_dice, config.kl_direction, config.normalisation)
    except ValueError as error:
        raise UsageError(f"train-zoomer: {error}") from error
    settings = asdict(config) | {
        "shards": str(shards),
        "maps": str(maps),
        "shards_digest": loader.digest,
        **maps_record(store),
    }
    if begin_run(out, "zoomer", to_json(settings), resume, defaults=to_json(asdict(ZoomerConfig()))):
        return {}
    torch.manual_seed(config.train.seed)
    model = _zoomer(config, grid[0]).to(device)
    preprocessing = Preprocessing(
        image_size=config.image_size,
        mean=IMAGENET_DEFAULT_MEAN,
        std=IMAGENET_DEFAULT_STD,
        crop_pct=config.view.crop_pct,
    )
    task = ZoomerTask(model, loss, preprocessing, device)
    metrics = Trainer(task, loader, config.train, Path(out)).train("train-zoomer", progress, stop)
    if team.first:
        save_model(Path(out), model.cpu(), preprocessing)
    return metrics


def _zoomer(config: ZoomerConfig, grid: int) -> Zoomer:
    try:
        return Zoomer(config.num_blocks, grid, width=config.width)
    except ValueError as error:
        raise UsageError(f"train-zoomer: {error}") from error
