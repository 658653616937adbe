"""Settings of an evaluation, and the operating points that they ask a model for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from zpipe.schemas.errors import UsageError
from zpipe.train.device import autocast
from zpipe.train.models import operating_points as of_model
from zpipe.train.models.operating_points import OperatingPoint, SettingError, setting_names, shortest
from zpipe.train.models.zoom_tokens import PRUNE_KINDS
from zpipe.train.scoring import SOURCES, ScoreSource, zooms

# The options of the settings that have one; others are given as --at NAME=VALUES.
OPTIONS = {
    "alpha": "--alphas",
    "budget": "--budgets",
    "keep": "--keep",
    "prune": "--prune",
    "exit": "--exits",
    "merge": "--merge",
}
# The settings whose values are numbers; a model checks the values of its other settings by itself.
NUMBERS: dict[str, type | tuple[type, ...]] = {"alpha": (int, float), "exit": (int, float), "keep": int, "merge": int}
DEFAULT_ALPHA = 0.1
"""The threshold of a model that zooms, where one point is wanted and none is given."""


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Settings of an evaluation."""

    alphas: tuple[float, ...] = (0.0, 0.05, 0.1, 0.2, 0.5, 1.0)
    """Thresholds of a model that zooms; other models take no notice of them."""
    budgets: tuple[int | str, ...] = ()
    """Besides or instead of thresholds, numbers of zoomed cells an image, or "300 tokens" or "2.3 GMACs"."""
    keeps: tuple[int, ...] = ()
    """Each threshold and budget also with its sequences pruned to so many tokens; of a token_pruned_vit, the patch
    tokens that it keeps."""
    prune: str = "backward"
    """Which tokens `keeps` takes away, one of `zoom_tokens.PRUNE_KINDS`."""
    exits: tuple[float, ...] = ()
    """Thresholds of early exit of a model of two stages; without any, `cfvit.DEFAULT_EXITS`."""
    merges: tuple[int, ...] = ()
    """Tokens that a tome_vit merges in each block; without any, its own number."""
    points: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    """Values of further settings that a model names in its `setting_names`."""
    target_gmacs: float | None = None
    """Instead of thresholds, the one at which an image of the shards `calibration` costs so many GMACs on average."""
    calibration: Path | None = None
    """Shards to choose that threshold by."""
    calibration_maps: Path | None = None
    """The relevance store of the calibration shards, where maps are the scores."""
    scores: str | None = None
    """Where the scores come from, one of `scoring.SOURCES`; None takes the source that the run was trained with."""
    classes: str | None = None
    """Of data that knows fewer classes than the model, the model's class of each label; see `answers.read_classes`."""
    labels: Path | None = None
    """A file of labels in place of the data's, several for an image; see `answers.read_several`."""
    weights: str = "final"
    """Which weights of the run, see `checkpoint.load_run`."""
    precision: str = "float32"
    """The precision of scores and model: float32, or bf16 or fp16 under autocast."""
    batch_size: int = 128
    """Images a batch."""
    data_workers: int = 0
    """Processes that load data; 0 loads in this one."""
    device: str = "auto"
    """`auto`, `cpu`, `cuda` or `cuda:N`."""

    def __post_init__(self) -> None:
        autocast(self.precision, torch.device("cpu"))  # refuses an unknown precision
        for name, values in (("alphas", self.alphas), ("exits", self.exits)):
            for value in values:
                if not 0.0 <= value <= 1.0:
                    kind = "a threshold" if name == "alphas" else "a threshold of early exit"
                    raise UsageError(f"--{name} {value}: {kind} lies in [0, 1]")
        for name, values in self.points.items():
            if name in OPTIONS:
                raise UsageError(f"--at {name}: give {OPTIONS[name]} {','.join(map(str, values))}")
        if self.prune not in PRUNE_KINDS:
            raise UsageError(f"--prune {self.prune}: choose one of {', '.join(PRUNE_KINDS)}")
        if self.scores is not None and self.scores not in SOURCES:
            raise UsageError(f"--scores {self.scores}: choose one of {', '.join(SOURCES)}")
        if self.classes is not None and self.labels is not None:
            raise UsageError("--classes, --labels: give one of them; the file of labels is in the model's numbering")
        if self.target_gmacs is not None and self.target_gmacs <= 0:
            raise UsageError(f"--target-gmacs {self.target_gmacs:g}: give a number above 0")
        if self.batch_size < 1:
            raise UsageError(f"batch_size={self.batch_size}: give a number >= 1")
        if self.data_workers < 0:
            raise UsageError(f"data_workers={self.data_workers}: give a number >= 0")

    def requested(self) -> dict[str, tuple[Any, ...]]:
        """The values of each setting that has any."""
        named = {
            "alpha": self.alphas,
            "budget": self.budgets,
            "keep": self.keeps,
            "exit": self.exits,
            "merge": self.merges,
        }
        given = {name: tuple(values) for name, values in (named | dict(self.points)).items() if len(values)}
        return given | {"prune": (self.prune,)} if "keep" in given else given


def operating_points(model: nn.Module, source: ScoreSource | None, config: EvalConfig) -> list[OperatingPoint]:
    """Every point at which to evaluate a model.

    Raises:
        UsageError: naming a setting that the model doesn't have or a value that is out of range, or without any point.
    """
    requested = config.requested()
    names = setting_names(model)
    # One sweep of thresholds and budgets goes over models that zoom and others beside them.
    requested = {name: values for name, values in requested.items() if name in names or name not in ("alpha", "budget")}
    if "prune" not in names:
        requested.pop("prune", None)
    for name in requested:
        if name not in names:
            takes = f"it takes {', '.join(option_of(each) for each in names)}" if names else "it takes none"
            raise UsageError(f"{option_of(name)}: {type(model).__name__} has no such setting; {takes}")
    if zooms(model) and (source is None or source.name == "none"):
        return [OperatingPoint(name="no zoom")]
    try:
        points = of_model.operating_points(model, requested)
    except SettingError as error:
        raise UsageError(f"{option_of(error.setting)} {error.value}: {error.reason}") from error
    except ValueError as error:
        raise UsageError(str(error)) from error
    unnamed = "plain" if source is None else source.name
    points = [point if point.name else replace(point, name=unnamed) for point in points]
    names_of_points = [point.name for point in points]
    if twice := sorted({name for name in names_of_points if names_of_points.count(name) > 1}):
        raise UsageError(f"{twice[0]}: asked for twice")
    return points


def one_point(model: nn.Module, source: ScoreSource | None, settings: Mapping[str, Any]) -> OperatingPoint:
    """The operating point with these settings, as `EvalRow.settings` or a user names them.

    Without settings, a model that zooms takes the threshold DEFAULT_ALPHA, and any other model runs as it was built.
    A model that doesn't zoom takes no notice of a threshold or a budget.

    Raises:
        UsageError: naming a setting that the model doesn't have, or a value that is out of range.
    """
    names = setting_names(model)
    settings = {name: value for name, value in settings.items() if name in names or name not in ("alpha", "budget")}
    if zooms(model) and (source is None or source.name == "none"):
        return OperatingPoint(name="no zoom")
    if not settings and not zooms(model):
        return OperatingPoint(name="plain")
    if zooms(model) and not settings.keys() & {"alpha", "budget"}:
        settings = {"alpha": DEFAULT_ALPHA, **settings}
    for name in settings:
        if name not in names:
            takes = f"it takes {', '.join(names)}" if names else "it takes none"
            raise UsageError(f"{name} {shortest(settings[name])}: {type(model).__name__} has no such setting; {takes}")
        if not isinstance(settings[name], NUMBERS.get(name, object)):
            kind = "a whole number" if NUMBERS[name] is int else "a number"
            raise UsageError(f"{name} {shortest(settings[name])}: give {kind}")
    try:
        return of_model.operating_points(model, {name: (value,) for name, value in settings.items()})[-1]
    except ValueError as error:
        raise UsageError(str(error)) from error


def option_of(setting: str) -> str:
    """The option of the command line that gives a setting's values."""
    return OPTIONS.get(setting, f"--at {setting}")
