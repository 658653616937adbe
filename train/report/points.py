"""Points, each with all metrics of one setting of one series, and their numbers as text.

Everything here is pure: no file and no model.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from zpipe.train.evaluation.results import EVALUATION, EVALUATION_SETTINGS, HISTOGRAM, Result, Value

# The settings that a series of a study is swept along; any other setting makes a series of its own.
SWEPT = ("alpha", "budget", "keep", "exit", "merge", "tokens")
# A series of an evaluation is swept along all settings of the model but these.
NOT_SWEPT = (*EVALUATION_SETTINGS, "prune")
# Metrics that are fractions of a data set, shown as per cent; not all metrics in [0, 1] are.
SHARES = re.compile(
    r"top\d+|.*_top\d+|share_.*|.*_share|.*pointing_game|.*overlap|.*_rate|exited|.*_left_out"
    r"|max_box_acc_\w+|pixel_accuracy|miou|average_precision"
)
FIRST_COLUMNS = ("top1", "top5", "tokens", "gmacs", "gmacs_scores", "total_gmacs", "images_per_s")
HEADINGS = {
    "top1": "top-1",
    "top5": "top-5",
    "tokens": "tokens",
    "gmacs": "GMACs, model",
    "gmacs_scores": "GMACs, scores",
    "total_gmacs": "GMACs, total",
    "images_per_s": "images/s",
    "mse": "MSE",
    "mae": "MAE",
    "pointing_game": "peak in the box",
    "teacher_pointing_game": "teacher's peak in the box",
    "top10_overlap": "top-10 % overlap",
    "rank_correlation": "rank correlation",
    "box_share": "box, share of the image",
    "abpc": "ABPC",
    "saco": "SaCo",
    "max_box_acc_30": "MaxBoxAcc, IoU .3",
    "max_box_acc_50": "MaxBoxAcc, IoU .5",
    "max_box_acc_70": "MaxBoxAcc, IoU .7",
    "max_box_acc_v2": "MaxBoxAccV2",
    "pixel_accuracy": "pixel accuracy",
    "miou": "mIoU",
    "average_precision": "AP of pixels",
}
Rows = dict[tuple[int | None, str], Result]  # one metric by training: (seed, run)
SEED_MARK = re.compile(r"(?:^|[-_./])seed[-_]?\d+(?=$|[-_./])")


@dataclass(frozen=True, kw_only=True)
class Measure:
    """One metric of a point, possibly the mean over several trainings."""

    value: float
    low: float | None
    """The lower end of the 95 % interval; of several seeds, their minimum."""
    high: float | None
    """The upper end of the 95 % interval; of several seeds, their maximum."""
    n: int
    """The number of images that the value of one seed is computed from."""
    seeds: int
    """The number of trainings."""


@dataclass(kw_only=True)
class Point:
    """One setting of one series."""

    study: str
    series: str
    """The run and the settings that the series is not swept along."""
    model: str
    setting: dict[str, Value]
    """The settings that the series is swept along."""
    measures: dict[str, Measure] = field(default_factory=dict)
    """The metrics by name."""
    histogram: dict[int, float] = field(default_factory=dict)
    """The fraction of images by number of tokens, as the mean over seeds."""

    @property
    def label(self) -> str:
        """The setting as text."""
        return ", ".join(f"{name} {number(value)}" for name, value in self.setting.items()) or "-"

    @property
    def sweep(self) -> str:
        """The setting that distinguishes the points of a line."""
        names = [name for name in self.setting if name != "tokens"]
        return "keep" if "keep" in names else next(iter(names), "")

    @property
    def zooms(self) -> bool:
        """Whether the point has a threshold or a budget of zoom."""
        return any(name in self.setting for name in ("alpha", "budget"))


def base_name(run: str) -> str:
    """A run's name without its seed: `zoomvit-seed1` or `seed-1/zoomvit` -> `zoomvit`."""
    return SEED_MARK.sub("", run).strip("-_./") or run


def points(results: Iterable[Result]) -> list[Point]:
    """Group results by setting, and average them over seeds; the points keep the order of the results.

    Runs count as seeds of one training if their names differ only in the seed and every seed occurs once.
    """
    groups: dict[tuple[Any, ...], dict[str, Rows]] = {}
    for row in results:
        rest = {name: value for name, value in row.setting.items() if name != "tokens" or row.metric != HISTOGRAM}
        key = (row.study, base_name(row.run), row.model, tuple(sorted((n, str(v)) for n, v in rest.items())))
        metric = row.metric if row.metric != HISTOGRAM else f"{HISTOGRAM} {row.setting.get('tokens')}"
        groups.setdefault(key, {}).setdefault(metric, {})[(row.seed, row.run)] = row
    result: list[Point] = []
    for metrics in groups.values():
        # Two runs with the same seed are no repetition: each is a series of its own.
        trainings = {training for rows in metrics.values() for training in rows}
        seeds = [seed for seed, _ in trainings]
        apart = len(set(seeds)) < len(seeds) or (None in seeds and len(seeds) > 1)
        runs: list[str | None] = [*sorted({run for _, run in trainings})] if apart else [None]
        result += [_point(metrics, run) for run in runs]
    return result


def _point(metrics: dict[str, Rows], run: str | None) -> Point:
    """The point of a run; of all runs together if `run` is None."""
    first: Result | None = None
    measures: dict[str, Measure] = {}
    histogram: dict[int, float] = {}
    trainings = {training for rows in metrics.values() for training in rows if run in (None, training[1])}
    for metric, rows in metrics.items():
        chosen = [row for key, row in sorted(rows.items(), key=lambda item: str(item[0])) if run in (None, key[1])]
        if not chosen:
            continue
        first = first or chosen[0]
        if metric.startswith(HISTOGRAM):
            # A seed without images of this length has no row for it.
            tokens = int(metric.removeprefix(HISTOGRAM))
            histogram[tokens] = sum(row.value for row in chosen) / len(trainings)
        else:
            measures[metric] = _measure(chosen)
    assert first is not None  # every metric has rows
    if "gmacs" in measures:
        measures["total_gmacs"] = _total(measures["gmacs"], measures.get("gmacs_scores"))
    swept = [name for name in first.setting if _is_swept(first.study, name)]
    setting = {name: first.setting[name] for name in swept}
    if histogram and "tokens" not in measures:
        setting.pop("tokens", None)
    others = [(n, v) for n, v in first.setting.items() if n not in swept]
    name = base_name(first.run) if run is None and len(trainings) > 1 else first.run
    series = ", ".join([name, *(f"{n} {number(v)}" for n, v in others)])
    return Point(
        study=first.study,
        series=series,
        model=first.model,
        setting=setting,
        measures=measures,
        histogram=dict(sorted(histogram.items())),
    )


def _is_swept(study: str, setting: str) -> bool:
    return setting in SWEPT or (study == EVALUATION and setting not in NOT_SWEPT)


def _measure(rows: Sequence[Result]) -> Measure:
    values = [row.value for row in rows]
    n = sum(row.n for row in rows) // len(rows)
    if len(rows) == 1:
        return Measure(value=values[0], low=rows[0].low, high=rows[0].high, n=n, seeds=1)
    return Measure(value=fmean(values), low=min(values), high=max(values), n=n, seeds=len(rows))


def _total(model: Measure, scores: Measure | None) -> Measure:
    more = 0.0 if scores is None else scores.value
    return Measure(value=model.value + more, low=None, high=None, n=model.n, seeds=model.seeds)


# -- numbers as text ---------------------------------------------------------------------------------------------------


def cell(metric: str, measure: Measure) -> str:
    """A metric with its interval, as text."""
    if SHARES.fullmatch(metric):
        text = f"{100 * measure.value:.1f} %"
        if measure.low is None or measure.high is None:
            return text
        return f"{text} ({100 * measure.low:.1f} to {100 * measure.high:.1f})"
    text = rounded(metric, measure.value)
    if measure.low is None or measure.high is None or measure.low == measure.high:
        return text
    return f"{text} ({rounded(metric, measure.low)} to {rounded(metric, measure.high)})"


def rounded(metric: str, value: float) -> str:
    """A metric's value as text, with as many digits as its unit needs."""
    if metric == "images_per_s":
        return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
    if metric == "tokens":
        return f"{value:.1f}".removesuffix(".0")
    return f"{value:.3g}" if value < 1000 else f"{value:,.0f}"


def number(value: Any) -> str:
    """A setting as text; empty for None."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return "" if value is None else str(value)
    return f"{value:.4g}" if isinstance(value, float) and not float(value).is_integer() else f"{value:g}"
