"""The settings of an evaluation, and the operating points of a model that they stand for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, get_args

import torch
from torch import nn

from zpipe.schemas.errors import UsageError
from zpipe.train.data.join import Damaged
from zpipe.train.data.map_stores import Join
from zpipe.train.device import autocast
from zpipe.train.models import operating_points as of_model
from zpipe.train.models.operating_points import OperatingPoint, SettingError, setting_names
from zpipe.train.models.zoom_tokens import PRUNE_KINDS
from zpipe.train.scoring import SOURCES, ScoreSource, zooms

# The settings that have an option of their own; the values of others are given by --at NAME=VALUES.
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
DEFAULT_ALPHAS = (0.0, 0.05, 0.1, 0.2, 0.5, 1.0)
"""The thresholds of an evaluation."""
DEFAULT_ALPHA = 0.1
"""The threshold of a model that zooms, if one point is wanted and no threshold or budget is given."""


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Settings of an evaluation."""

    alphas: tuple[float, ...] | None = None
    """Thresholds of a model that zooms; None for `DEFAULT_ALPHAS` if the model has thresholds."""
    budgets: tuple[int | str, ...] = ()
    """Budgets beside or instead of thresholds: zoomed cells per image, or "300 tokens" or "2.3 GMACs"."""
    keeps: tuple[int, ...] = ()
    """Numbers of tokens that each threshold and budget is also pruned to; for a token_pruned_vit, the numbers of patch
    tokens to keep."""
    prune: str = "backward"
    """Which tokens `keeps` drops, one of `zoom_tokens.PRUNE_KINDS`."""
    exits: tuple[float, ...] = ()
    """Thresholds of early exit for a model of two stages; empty for `cfvit.DEFAULT_EXITS`."""
    merges: tuple[int, ...] = ()
    """Numbers of tokens that a tome_vit merges in each block; empty for its own number."""
    points: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    """Values of other settings, by their names in the model's `setting_names`."""
    target_gmacs: float | None = None
    """The mean cost per image, in GMACs, that the threshold is chosen for; None to use the thresholds above."""
    calibration: Path | None = None
    """The shards to choose that threshold on."""
    calibration_maps: Path | None = None
    """The relevance store of the calibration shards, if maps are the scores."""
    scores: str | None = None
    """The source of the scores, one of `scoring.SOURCES`; None for the one that the run was trained with."""
    classes: str | None = None
    """How the labels of the data become classes of the model, see `answers.match_run`; None if both are alike."""
    labels: Path | None = None
    """A file with several labels per image, used instead of the labels of the data; see `answers.read_several`."""
    damaged: Damaged = "error"
    """How to handle damaged tars and samples: `error`, or `skip` to leave them out and count them."""
    join: Join = "tar"
    """How maps find their images: `tar` or `image`, see `RelevanceLoader`."""
    weights: str = "final"
    """The weights of the run to use, see `checkpoint.load_run`."""
    precision: str = "float32"
    """The precision of both scores and model: float32, or bf16 or fp16 under autocast."""
    batch_size: int = 128
    """Images per batch."""
    data_workers: int | None = None
    """Processes that load data, see `eval_loader`."""
    device: str = "auto"
    """`auto`, `cpu`, `cuda` or `cuda:N`."""

    def __post_init__(self) -> None:
        autocast(self.precision, torch.device("cpu"))  # refuses an unknown precision
        for name, values in (("alphas", self.alphas or ()), ("exits", self.exits)):
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
        if self.damaged not in get_args(Damaged):
            raise UsageError(f"--damaged {self.damaged}: choose error or skip")
        if self.batch_size < 1:
            raise UsageError(f"batch_size={self.batch_size}: give a number >= 1")
        if self.data_workers is not None and self.data_workers < 0:
            raise UsageError(f"data_workers={self.data_workers}: give a number >= 0")

    def requested(self) -> dict[str, tuple[Any, ...]]:
        """The values of each setting that was given some."""
        named = {
            "alpha": self.alphas or (),
            "budget": self.budgets,
            "keep": self.keeps,
            "exit": self.exits,
            "merge": self.merges,
        }
        given = {name: tuple(values) for name, values in (named | dict(self.points)).items() if len(values)}
        return given | {"prune": (self.prune,)} if "keep" in given else given


def operating_points(model: nn.Module, source: ScoreSource | None, config: EvalConfig) -> list[OperatingPoint]:
    """All points at which to evaluate a model.

    Raises:
        UsageError: the model lacks a setting, a value is out of range or given twice, or there is no point at all.
    """
    requested = config.requested()
    if config.alphas is None and "alpha" in setting_names(model):
        requested["alpha"] = DEFAULT_ALPHAS
    if "prune" not in setting_names(model) and config.prune == EvalConfig.prune:
        requested.pop("prune", None)
    _check_names(model, requested, option_of)
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
    counts = Counter(point.name for point in points)
    if repeated := sorted(name for name, count in counts.items() if count > 1):
        raise UsageError(f"{repeated[0]}: asked for twice")
    return points


def one_point(model: nn.Module, source: ScoreSource | None, settings: Mapping[str, Any]) -> OperatingPoint:
    """The operating point with the given settings, named as in `EvalRow.settings`.

    Without settings, it is DEFAULT_ALPHA for a model that zooms, and the model as it was built for any other.

    Raises:
        UsageError: the model lacks a setting, a value is out of range, or there are both a threshold and a budget.
    """
    settings = dict(settings)
    _check_names(model, settings, str)
    if {"alpha", "budget"} <= settings.keys():
        raise UsageError("give alpha or budget, not both")
    if zooms(model):
        if source is None or source.name == "none":
            return OperatingPoint(name="no zoom")
        if not settings.keys() & {"alpha", "budget"}:
            settings["alpha"] = DEFAULT_ALPHA
    if not settings:
        return OperatingPoint(name="plain")
    for name, value in settings.items():
        if not isinstance(value, NUMBERS.get(name, object)):
            kind = "a whole number" if NUMBERS[name] is int else "a number"
            raise UsageError(f"{name} {value}: give {kind}")
    try:
        return of_model.operating_points(model, {name: (value,) for name, value in settings.items()})[-1]
    except ValueError as error:
        raise UsageError(str(error)) from error


def _check_names(model: nn.Module, names: Iterable[str], spell: Callable[[str], str]) -> None:
    known = setting_names(model)
    for name in names:
        if name not in known:
            takes = ", ".join(map(spell, known)) or "none"
            raise UsageError(f"{spell(name)}: {type(model).__name__} has no such setting; it takes {takes}")


def option_of(setting: str) -> str:
    """The command-line option that takes a setting's values."""
    return OPTIONS.get(setting, f"--at {setting}")
