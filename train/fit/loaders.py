"""The loaders of training and validation batches, each with this rank's part."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from zpipe.schemas.relevance_maps import RelevanceMaps
from zpipe.train.data.join import Damaged, Missing
from zpipe.train.data.loader import RelevanceLoader
from zpipe.train.data.map_stores import Join
from zpipe.train.data.transforms import ViewConfig
from zpipe.train.device import data_workers_for, resolve_device
from zpipe.train.fit.config import TrainConfig
from zpipe.train.ranks import local_ranks, ranks


class DataConfig(Protocol):
    """What the configurations of both stages say about data."""

    @property
    def image_size(self) -> int:
        """Width and height of the views in pixels."""

    @property
    def missing(self) -> Missing:
        """How to handle samples without a usable map."""

    @property
    def join(self) -> Join:
        """How maps find their images."""

    @property
    def damaged(self) -> Damaged:
        """How to handle damaged tars and samples."""

    @property
    def view(self) -> ViewConfig:
        """Crop, flip and colours."""

    @property
    def train(self) -> TrainConfig:
        """Settings of the training loop."""


def training_loader(shards: Path, maps: RelevanceMaps | None, config: DataConfig) -> RelevanceLoader:
    """This rank's part of the training batches.

    Raises:
        UsageError, ZpipeError: As `RelevanceLoader`; also if a batch can't be split evenly among the ranks.
    """
    group = ranks()
    return RelevanceLoader(
        shards,
        maps,
        batch_size=group.part(config.train.batch_size),
        image_size=config.image_size,
        augment="train",
        seed=config.train.seed,
        num_workers=data_workers(config.train),
        rank=group.rank,
        world_size=group.size,
        repeats=config.train.repeats,
        missing=config.missing,
        join=config.join,
        damaged=config.damaged,
        view=config.view,
        pin_memory=resolve_device(config.train.device).type == "cuda",
    )


def validation_loader(shards: Path, maps: Path | None, config: DataConfig) -> RelevanceLoader:
    """This rank's part of the validation shards, every sample once; one without a usable map gets a uniform map.

    Raises:
        UsageError, ZpipeError: As `RelevanceLoader`.
    """
    group = ranks()
    return RelevanceLoader(
        shards,
        maps,
        batch_size=group.part(config.train.batch_size),
        image_size=config.image_size,
        augment="eval",
        num_workers=data_workers(config.train),
        rank=group.rank,
        world_size=group.size,
        missing="uniform",
        join=config.join,
        damaged=config.damaged,
        view=config.view,
        pin_memory=resolve_device(config.train.device).type == "cuda",
    )


def data_workers(config: TrainConfig) -> int:
    """The number of data-loading processes of this training process; by the machine if the settings leave it to it."""
    if config.data_workers is not None:
        return config.data_workers
    return data_workers_for(resolve_device(config.device), processes=local_ranks(), on_cpu=1)
