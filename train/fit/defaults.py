"""Settings that are left to the machine, and what a run that has begun keeps of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from zpipe.schemas.errors import UsageError, ZpipeError
from zpipe.schemas.model_config import CONFIG_NAME
from zpipe.train.device import best_precision, resolve_device
from zpipe.train.fit.config import TrainConfig
from zpipe.train.fit.loaders import data_workers
from zpipe.train.ranks import ranks
from zpipe.train.run_files import CHECKPOINT_NAME, RUN_NAME, read_record
from zpipe.train.settings import rebuild

# The defaults of versions in which these settings did not depend on the machine.
BEFORE: Mapping[str, Any] = {"precision": "float32", "compile": False, "data_workers": 1}


def resolved(config: TrainConfig, run: Path) -> TrainConfig:
    """Replace the precision and the number of data-loading processes that are left to the machine by values for it.

    A run that has a checkpoint keeps those that it was begun with, on whatever device it is resumed: the precision
    because it decides what is computed, the number of processes because the order of the samples can depend on it. All
    ranks get the same values, and must call this together: the lower of two numbers, and float32 of two precisions.

    Args:
        config: The settings.
        run: The run folder.

    Raises:
        ZpipeError: If the device is not available, or the record of the run can't be read.
    """
    if config.precision != "auto" and config.data_workers is not None:
        return config
    begun = (run / CHECKPOINT_NAME).is_file() or (run / CONFIG_NAME).is_file()
    kept = _recorded(run) if begun and (run / RUN_NAME).is_file() else None
    precision, workers = config.precision, config.data_workers
    if precision == "auto":
        precision = best_precision(resolve_device(config.device)) if kept is None else kept.precision
    if workers is None:
        workers = None if kept is None else kept.data_workers
        workers = data_workers(config) if workers is None else workers
    every = ranks().gather((precision, workers))  # the machines may differ
    if len({precision for precision, _ in every}) > 1:
        precision = "float32"
    return replace(config, precision=precision, data_workers=min(workers for _, workers in every))


def _recorded(run: Path) -> TrainConfig:
    """These settings from run.json; where an earlier version did not record one, its default of that time."""
    recorded = read_record(run)["settings"].get("train", {})
    try:
        return rebuild(TrainConfig(**BEFORE), {name: recorded[name] for name in BEFORE if name in recorded})
    except UsageError as error:
        raise ZpipeError(f"{run / RUN_NAME}: {error}; restore the file, or give another --out folder") from error


def of_earlier_versions(settings: dict[str, Any]) -> dict[str, Any]:
    """The default settings of a stage, with those of earlier versions where they now depend on the machine."""
    return settings | {"train": settings["train"] | BEFORE}
