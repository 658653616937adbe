"""How a model can be run: its use of scores, its operating points, and the cost of an image.

A model declares it with members, all of them optional, so that a new model is one file:

- `score_use`, a :class:`ScoreUse`, of a model that scores guide;
- `setting_names` and `operating_points(requested)`, of a model with settings that a user may vary at inference time;
- `cost(point, kind)`, and if the cost differs between images `cost_kinds(point, scores, output)`.

The functions below read these members, and have defaults for models that lack them, such as those of timm.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast

from torch import Tensor, nn

Value = str | int | float | None
Requested = Mapping[str, Sequence[Any]]


@dataclass(frozen=True, kw_only=True)
class ScoreUse:
    """How scores guide a model."""

    grid: int
    """Cells a side of the score map that the model reads; scores are [B, grid * grid], row-major."""
    any_grid: bool = False
    """Whether the model resamples scores of another square grid."""
    has_own: bool = False
    """Whether the model uses its own class attention when it is given no scores."""
    zooms: bool = False
    """Whether the model zooms the cells above a threshold `alpha`, or within a `budget`."""
    class_attention: bool = False
    """Whether the class attention of the model's forward pass without scores can serve as its scores."""


@dataclass(frozen=True, kw_only=True)
class OperatingPoint:
    """One way to run a model."""

    name: str
    """A short name, unique among the points of an evaluation, such as `alpha=0.1`."""
    arguments: Mapping[str, Any] = field(default_factory=dict)
    """Keyword arguments of the model's forward pass, besides images and scores."""
    settings: Mapping[str, Value] = field(default_factory=dict)
    """The settings as the user gave them; results record these."""


class ImageCost(NamedTuple):
    """What one image costs at an operating point.

    Attributes:
        tokens: tokens that enter a block, as a mean over blocks, without the class token; None for a model without
            tokens.
        arguments: keyword arguments of a forward pass of the same cost, besides an image; scores only where the cost
            depends on their values.
        exited: whether the first of two stages answered; None for a model of one stage.
    """

    tokens: float | None
    arguments: Mapping[str, Any]
    exited: bool | None = None


class SettingError(ValueError):
    """A value of a setting that the model can't take."""

    def __init__(self, setting: str, value: Any, reason: object) -> None:
        super().__init__(f"{setting} {value}: {reason}")
        self.setting, self.value, self.reason = setting, value, reason


def score_use(model: nn.Module) -> ScoreUse | None:
    """How scores guide a model; None for a model that takes no scores."""
    return getattr(model, "score_use", None)


def setting_names(model: nn.Module) -> tuple[str, ...]:
    """The settings that a model's operating points have."""
    return getattr(model, "setting_names", ())


def operating_points(model: nn.Module, requested: Requested) -> list[OperatingPoint]:
    """The operating points of a model for the requested values of its settings.

    Args:
        model: the model.
        requested: the values of each setting, all of them among `setting_names(model)`.

    Returns:
        At least one point. A model without settings has a single one, without a name.

    Raises:
        SettingError: a value that is out of range.
        ValueError: no value for a setting that the model requires.
    """
    if not setting_names(model):
        return [OperatingPoint(name="")]
    return cast(Any, model).operating_points(requested)


def points_of(name: str, values: Iterable[Any], argument: str, resolve: Callable[[Any], Any]) -> list[OperatingPoint]:
    """A point for each value of a single setting.

    Args:
        name: the setting.
        values: its values.
        argument: the keyword argument of the forward pass that the setting becomes.
        resolve: turns a value into that argument; a ValueError becomes a :class:`SettingError`.

    Raises:
        SettingError: a value that `resolve` refuses.
    """
    points = []
    for value in values:
        try:
            arguments = {argument: resolve(value)}
        except ValueError as error:
            raise SettingError(name, value, error) from error
        except TypeError as error:  # text where the setting is a number
            raise SettingError(name, value, "this setting takes no such value") from error
        points.append(OperatingPoint(name=f"{name}={shortest(value)}", arguments=arguments, settings={name: value}))
    return points


def zoom_points(requested: Requested, resolve_budget: Callable[[int | str], int]) -> list[OperatingPoint]:
    """The points of a model that zooms by a threshold `alpha` or within a `budget`.

    Raises:
        SettingError: a threshold outside [0, 1], or a budget that the model can't keep.
        ValueError: neither thresholds nor budgets.
    """
    # Thresholds are not rounded, since cells may score exactly as much.
    alphas = points_of("alpha", requested.get("alpha", ()), "alpha", check_threshold)
    budgets = points_of("budget", requested.get("budget", ()), "budget", resolve_budget)
    if not alphas and not budgets:
        raise ValueError("nothing to evaluate: give --alphas or --budgets")
    return alphas + budgets


def check_threshold(value: float) -> float:
    """The threshold itself.

    Raises:
        ValueError: a threshold outside [0, 1].
    """
    if not 0.0 <= value <= 1.0:
        raise ValueError("a threshold lies in [0, 1]")
    return value


def shortest(value: Any) -> str:
    """The shortest text that reads back as the same number; text stays."""
    return repr(value).removesuffix(".0") if isinstance(value, float) else str(value)


def cost_kinds(model: nn.Module, point: OperatingPoint, scores: Tensor | None, output: Any) -> Tensor | None:
    """Which images of a batch cost the same.

    Args:
        model: the model.
        point: the operating point at which it ran.
        scores: its scores [B, s * s], or None.
        output: what it returned.

    Returns:
        A kind for each image, int64 [B]; None if all images cost the same.
    """
    method: Callable[..., Tensor | None] | None = getattr(model, "cost_kinds", None)
    return None if method is None else method(point, scores, output)


def cost(model: nn.Module, point: OperatingPoint, kind: int | None = None) -> ImageCost:
    """The cost of an image of a kind (see `cost_kinds`), or of any image if there are no kinds."""
    method: Callable[..., ImageCost] | None = getattr(model, "cost", None)
    return ImageCost(count_patches(model), point.arguments) if method is None else method(point, kind)


def count_patches(model: nn.Module) -> float | None:
    """The number of patches of an image in a timm model; None for a model without patches."""
    patches = getattr(getattr(model, "patch_embed", None), "num_patches", None)
    return None if patches is None else float(patches)


def logits_of(output: Any) -> Tensor:
    """The logits [B, classes] in a model's output; of a model of two stages, those of the stage that answered."""
    return getattr(output, "logits", output)
