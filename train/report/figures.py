"""Tidy results into what the page draws: points with their spread, Plotly traces, tables, headline. Pure: no file, no model.

Everything here is JSON. Names come from files and may hold anything; the page sets text, never markup, and text inside plots,
which Plotly reads as a little markup language, goes through `plot_text`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from statistics import fmean, median
from typing import Any

from zpipe.train.evaluation.results import Result, Value
from zpipe.train.report.runs import EVALUATION, ZOOMER_EVALUATION, RunRecord

# A series is swept along these; what else is set makes another series.
SWEPT = ("alpha", "budget", "keep", "exit", "merge", "tokens")
HISTOGRAM = "images_with_tokens"
# Of a data set: shown as per cent. Others that lie in [0, 1], such as an error, mean something else.
SHARES = re.compile(r"top\d+|.*_top\d+|share_.*|.*_share|.*pointing_game|.*overlap|.*_rate|exited|.*_left_out")
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
}
SEED_MARK = re.compile(r"(?:^|[-_./])seed[-_]?\d+(?=$|[-_./])")

Table = dict[str, Any]
Figure = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Measure:
    """One metric of a point. seeds: how many trainings it is the mean of; low and high are then the least and the greatest
    of them, else the 95 % interval of the one."""

    value: float
    low: float | None
    high: float | None
    n: int
    seeds: int


@dataclass(kw_only=True)
class Point:
    """One setting of one series. histogram: tokens -> share of images, mean over seeds."""

    study: str
    series: str
    model: str
    setting: dict[str, Value]
    measures: dict[str, Measure] = field(default_factory=dict)
    histogram: dict[int, float] = field(default_factory=dict)

    @property
    def told(self) -> str:
        return ", ".join(f"{name} {_number(value)}" for name, value in self.setting.items()) or "-"

    @property
    def sweep(self) -> str:
        """What the line that the point lies on is swept along."""
        return next((name for name in ("keep", "exit", "merge", "alpha", "budget") if name in self.setting), "")

    @property
    def zooms(self) -> bool:
        return any(name in self.setting for name in ("alpha", "budget"))


def base_name(run: str) -> str:
    """A run's name without the mark of its seed: `zoomvit-seed1`, `seed-1/zoomvit` -> `zoomvit`."""
    return SEED_MARK.sub("", run).strip("-_./") or run


def points(results: Iterable[Result]) -> list[Point]:
    """Results of one setting put together, those of several seeds as their mean and spread. In the order they came.

    Runs count as seeds of one thing when their names differ in the seed's mark alone and every seed is there once.
    """
    found: dict[tuple, dict[str, dict[tuple, Result]]] = {}
    for row in results:
        rest = {name: value for name, value in row.setting.items() if name != "tokens" or row.metric != HISTOGRAM}
        key = (row.study, base_name(row.run), row.model, tuple(sorted((n, str(v)) for n, v in rest.items())))
        metric = row.metric if row.metric != HISTOGRAM else f"{HISTOGRAM} {row.setting.get('tokens')}"
        found.setdefault(key, {}).setdefault(metric, {})[(row.seed, row.run)] = row
    made: list[Point] = []
    for metrics in found.values():
        # Two runs that say the same seed are no repetition of each other: each is its own series then.
        everyone = {who for rows in metrics.values() for who in rows}
        seeds = [seed for seed, _ in everyone]
        apart = len(set(seeds)) < len(seeds) or (None in seeds and len(seeds) > 1)
        for run in sorted({run for _, run in everyone}) if apart else [None]:
            made.append(_point(metrics, run))
    return made


def _point(metrics: dict[str, dict[tuple, Result]], run: str | None) -> Point:
    first: Result | None = None
    measures: dict[str, Measure] = {}
    histogram: dict[int, float] = {}
    everyone = {who for rows in metrics.values() for who in rows if run is None or who[1] == run}
    for metric, rows in metrics.items():
        mine = [row for who, row in sorted(rows.items(), key=lambda item: str(item[0])) if run in (None, who[1])]
        if not mine:
            continue
        first = first or mine[0]
        if metric.startswith(HISTOGRAM):
            # A seed without images at this length has no row for it.
            tokens = int(metric.removeprefix(HISTOGRAM))
            histogram[tokens] = sum(row.value for row in mine) / len(everyone)
        else:
            measures[metric] = _measure(mine)
    assert first is not None  # every metric has rows
    if "gmacs" in measures:
        measures["total_gmacs"] = _total(measures["gmacs"], measures.get("gmacs_scores"))
    setting = {name: value for name, value in first.setting.items() if name in SWEPT}
    if histogram and "tokens" not in measures:
        setting.pop("tokens", None)
    others = [(n, v) for n, v in first.setting.items() if n not in SWEPT]
    name = base_name(first.run) if run is None and len(everyone) > 1 else first.run
    series = ", ".join([name, *(f"{n} {_number(v)}" for n, v in others)])
    return Point(
        study=first.study,
        series=series,
        model=first.model,
        setting=setting,
        measures=measures,
        histogram=dict(sorted(histogram.items())),
    )


def _measure(rows: Sequence[Result]) -> Measure:
    values = [row.value for row in rows]
    n = sum(row.n for row in rows) // len(rows)
    if len(rows) == 1:
        return Measure(value=values[0], low=rows[0].low, high=rows[0].high, n=n, seeds=1)
    return Measure(value=fmean(values), low=min(values), high=max(values), n=n, seeds=len(rows))


def _total(model: Measure, scores: Measure | None) -> Measure:
    more = 0.0 if scores is None else scores.value
    return Measure(value=model.value + more, low=None, high=None, n=model.n, seeds=model.seeds)


# -- figures -----------------------------------------------------------------------------------------------------------


def plot_text(text: object) -> str:
    """Text that Plotly shows as it is: it takes <a>, <b> and entities in labels for markup."""
    return str(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def curves(found: Sequence[Point], titles: dict[str, str], runs: Sequence[RunRecord] = ()) -> list[Figure]:
    """Accuracy against multiply-adds and against throughput. A run keeps its colour (`series` of a trace) in all plots."""
    wanted = [point for point in found if "top1" in point.measures]
    named = [(EVALUATION, run.name) for run in runs] + [(p.study, p.series) for p in wanted]
    numbers = {name: number for number, name in enumerate(dict.fromkeys(named))}
    bars = "Bars: 95 % interval (of images/s, quartiles)."
    if any(measure.seeds > 1 for point in wanted for measure in point.measures.values()):
        bars = "Bars: 95 % interval (of images/s, quartiles); where several seeds were trained, the mean and the range of the seeds."
    whole = (
        ("gmacs", "total_gmacs", "Accuracy and multiply-adds", "GMACs per image, source of the scores included"),
        ("throughput", "images_per_s", "Accuracy and throughput", "images/s"),
    )
    notes = {
        "gmacs": "Up and to the left is better.",
        "throughput": "Up and to the right is better. Compare speeds only where they were measured on the same machine.",
    }
    figures = []
    for name, metric, title, axis in whole:
        lines: dict[tuple[str, str], dict[str, list[Point]]] = {}  # a line a sweep: thresholds and budgets are two
        for point in wanted:
            if metric in point.measures:
                lines.setdefault((point.study, point.series), {}).setdefault(point.sweep, []).append(point)
        if not lines:
            continue
        data, evaluated = [], any(study == EVALUATION for study, _ in lines)
        aside = evaluated and any(study != EVALUATION for study, _ in lines)
        for key, sweeps in lines.items():
            for place, (sweep, members) in enumerate(sweeps.items()):
                suffix = f", {sweep}" if len(sweeps) > 1 and sweep else ""
                trace = _curve(titles, numbers[key], key, members, metric, suffix)
                if evaluated and key[0] != EVALUATION:
                    trace["visible"] = "legendonly"  # what a study does to a model would hide how good the models are
                data.append(trace | {"dashed": place % 2 == 1})
        figures.append(
            {
                "id": name,
                "title": title,
                "note": f"{notes[name]} {bars}{' Studies are shown by a click on their names.' if aside else ''}",
                "table": EVALUATION if evaluated else next(iter(lines))[0],
                "data": data,
                "layout": {
                    "xaxis": {"title": {"text": axis}, "rangemode": "tozero"},
                    "yaxis": {"title": {"text": "top-1, %"}},
                },
            }
        )
    return figures


def _curve(
    titles: dict[str, str], number: int, key: tuple[str, str], members: list[Point], metric: str, suffix: str
) -> Figure:
    study, name = key
    members = sorted(members, key=lambda point: point.measures[metric].value)
    across = [point.measures[metric] for point in members]
    up = [point.measures["top1"] for point in members]
    trace: Figure = {
        "type": "scatter",
        "mode": "lines+markers" if len(members) > 1 else "markers",
        "name": plot_text(name + suffix),
        "series": number,
        "x": [measure.value for measure in across],
        "y": [100 * measure.value for measure in up],
        "error_y": _error(up, 100.0),
        "text": [plot_text(f"{name}: {_told(point)}") for point in members],
        "hoverinfo": "text",
    }
    if any(measure.low is not None for measure in across):
        trace["error_x"] = _error(across, 1.0)
    if study != EVALUATION:
        trace |= {"legendgroup": study, "legendgrouptitle": {"text": plot_text(titles.get(study, study))}}
    return trace


def _error(measures: Sequence[Measure], scale: float) -> dict[str, Any]:
    return {
        "type": "data",
        "symmetric": False,
        "array": [scale * (m.high - m.value) if m.high is not None else 0.0 for m in measures],
        "arrayminus": [scale * (m.value - m.low) if m.low is not None else 0.0 for m in measures],
    }


def _told(point: Point) -> str:
    parts = [point.told] if point.setting else []
    for metric in ("top1", "tokens", "total_gmacs", "images_per_s"):
        if metric in point.measures:
            parts.append(f"{HEADINGS[metric]} {cell(metric, point.measures[metric])}")
    return "; ".join(parts)


def histograms(found: Sequence[Point]) -> list[Figure]:
    """Images by token count, where images differ in it. Of each series the widest is shown, the others by a click in the legend."""
    series: dict[tuple[str, str], list[Point]] = {}
    for point in found:
        if len(point.histogram) > 1:
            series.setdefault((point.study, point.series), []).append(point)
    if not series:
        return []
    data = []
    number = 0
    for (_, name), members in series.items():
        widest = max(members, key=lambda point: len(point.histogram))
        for point in members:
            data.append(
                {
                    "type": "bar",
                    "name": plot_text(f"{name}: {point.told}"),
                    "series": number,
                    "x": list(point.histogram),
                    "y": [100 * share for share in point.histogram.values()],
                    "hovertemplate": "%{x} tokens: %{y:.1f} %<extra>%{fullData.name}</extra>",
                    "visible": True if point is widest else "legendonly",
                }
            )
            number += 1
    return [
        {
            "id": "tokens",
            "title": "Tokens per image",
            "note": "How many images got how many tokens. Click a name in the legend to show or hide it.",
            "table": "token table",
            "data": data,
            "layout": {
                "xaxis": {"title": {"text": "tokens, class token not counted"}},
                "yaxis": {"title": {"text": "images, %"}, "rangemode": "tozero"},
                "barmode": "overlay",
            },
        }
    ]


def training_figures(runs: Sequence[RunRecord]) -> list[Figure]:
    """Loss, accuracy, learning rate and speed over the steps."""
    vits = [(number, run) for number, run in enumerate(runs) if run.kind == "vit"]
    zoomers = [(number, run) for number, run in enumerate(runs) if run.kind != "vit"]
    everyone = list(enumerate(runs))
    wanted = (
        ("loss", "Training loss", "loss", vits, (("loss", "", 1.0),), {}),
        ("accuracy", "Training accuracy", "top-1, %", vits, (("train_top1", "train", 100.0), ("val_top1", "validation", 100.0)), {}),
        ("zoomer-loss", "Zoomer's loss", "loss", zoomers, (("loss", "", 1.0),), {"type": "log"}),
        ("lr", "Learning rate", "learning rate", everyone, (("lr", "", 1.0),), {}),
        ("speed", "Training speed", "images/s", everyone, (("images_per_s", "", 1.0),), {"rangemode": "tozero"}),
    )  # fmt: skip
    figures = []
    for name, title, axis, group, metrics, more in wanted:
        data = []
        for number, run in group:
            for metric, suffix, scale in metrics:
                line = [(row["step"], scale * row[metric]) for row in run.curve if _finite(row.get(metric))]
                if line:
                    label = f"{run.name}, {suffix}" if suffix else run.name
                    data.append(
                        {
                            "type": "scatter",
                            "mode": "lines+markers" if suffix == "validation" or len(line) < 3 else "lines",
                            "name": plot_text(label),
                            "series": number,
                            "dashed": suffix == "validation",
                            "x": [step for step, _ in line],
                            "y": [value for _, value in line],
                            "hovertemplate": "step %{x}: %{y:.4g}<extra>%{fullData.name}</extra>",
                        }
                    )
        if data:
            layout = {"xaxis": {"title": {"text": "step"}}, "yaxis": {"title": {"text": axis}} | more}
            figures.append(
                {"id": f"train-{name}", "title": title, "note": "", "table": "training", "data": data, "layout": layout}
            )
    return figures


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


# -- tables ------------------------------------------------------------------------------------------------------------


def tables(found: Sequence[Point], titles: dict[str, str]) -> list[Table]:
    """A table a study: a row a setting, a column a metric; intervals in brackets."""
    captions = {EVALUATION: "Evaluation", ZOOMER_EVALUATION: "Zoomers against their teacher's maps"} | titles
    made = []
    for study in sorted({point.study for point in found}, key=lambda name: (name != EVALUATION, name)):
        members = [point for point in found if point.study == study and point.measures]
        if not members:
            continue
        metrics = list(dict.fromkeys(metric for point in members for metric in point.measures))
        if all(point.measures.get("gmacs_scores", _NONE).value == 0 for point in members):
            metrics = [metric for metric in metrics if metric not in ("gmacs_scores", "total_gmacs")]
        metrics.sort(key=lambda metric: FIRST_COLUMNS.index(metric) if metric in FIRST_COLUMNS else len(FIRST_COLUMNS))
        repeated = any(measure.seeds > 1 for point in members for measure in point.measures.values())
        heads = ["run", "setting", *(HEADINGS.get(metric, metric.replace("_", " ")) for metric in metrics), "n"]
        rows = []
        for point in members:
            figures = [cell(metric, point.measures[metric]) if metric in point.measures else "" for metric in metrics]
            most = max(point.measures.values(), key=lambda measure: (measure.seeds, measure.n))
            row = [point.series, point.told, *figures, f"{most.n:,}"]
            rows.append(row + [str(most.seeds)] if repeated else row)
        made.append(
            {
                "id": study,
                "caption": captions.get(study, study),
                "note": "In brackets: the 95 % interval (of images/s: the quartiles over batches)"
                + ("; where several seeds were trained, the mean and the range of the seeds." if repeated else "."),
                "columns": heads + (["seeds"] if repeated else []),
                "rows": rows,
            }
        )
    return made


_NONE = Measure(value=0.0, low=None, high=None, n=0, seeds=1)


def token_table(found: Sequence[Point]) -> list[Table]:
    rows = []
    for point in found:
        if len(point.histogram) > 1:  # a budget gives all images the same, which the tables say already
            total = sum(point.histogram.values())
            mean = sum(tokens * share for tokens, share in point.histogram.items()) / total
            places = [_quantile(point.histogram, q) for q in (0.05, 0.5, 0.95)]
            rows.append([point.series, point.told, f"{mean:.1f}", *(str(place) for place in places)])
    if not rows:
        return []
    heads = ["run", "setting", "mean", "5 % have at most", "half have at most", "95 % have at most"]
    return [{"id": "token table", "caption": "Tokens per image", "note": "", "columns": heads, "rows": rows}]


def _quantile(histogram: dict[int, float], share: float) -> int:
    left = share * sum(histogram.values())
    for tokens, images in sorted(histogram.items()):
        left -= images
        if left <= 1e-9:
            return tokens
    return max(histogram)


def training_table(runs: Sequence[RunRecord]) -> list[Table]:
    """What each run was and how it ended."""
    rows = []
    for run in runs:
        train = run.settings.get("train", {})
        steps = run.curve[-1]["step"] if run.curve else None
        rows.append(
            [
                run.name,
                run.model,
                "" if steps is None else f"{steps:,}",
                _number(train.get("epochs")),
                str(train.get("opt", "")),
                _number(train.get("lr")),
                _last(run, "loss", 1.0),
                _last(run, "train_top1", 100.0),
                _best(run, "val_top1"),
                _middle(run, "images_per_s"),
                "yes" if run.finished else "no",
            ]
        )
    heads = ["run", "model", "steps", "epochs", "optimizer", "highest lr", "last loss", "last train top-1, %"]
    heads += ["best validation top-1, %", "images/s, median", "finished"]
    note = "The last loss and accuracy are those of one logging interval, not of the whole training set."
    return [{"id": "training", "caption": "Training", "note": note, "columns": heads, "rows": rows}] if rows else []


def _values(run: RunRecord, metric: str) -> list[float]:
    return [row[metric] for row in run.curve if _finite(row.get(metric))]


def _last(run: RunRecord, metric: str, scale: float) -> str:
    values = _values(run, metric)
    return f"{scale * values[-1]:.3g}" if values else ""


def _best(run: RunRecord, metric: str) -> str:
    values = _values(run, metric)
    return f"{100 * max(values):.1f}" if values else ""


def _middle(run: RunRecord, metric: str) -> str:
    values = _values(run, metric)
    return f"{median(values):,.0f}" if values else ""


def cell(metric: str, measure: Measure) -> str:
    """A figure with its interval, as text."""
    if SHARES.fullmatch(metric):
        text = f"{100 * measure.value:.1f} %"
        if measure.low is None or measure.high is None:
            return text
        return f"{text} ({100 * measure.low:.1f} to {100 * measure.high:.1f})"
    text = _rounded(metric, measure.value)
    if measure.low is None or measure.high is None or measure.low == measure.high:
        return text
    return f"{text} ({_rounded(metric, measure.low)} to {_rounded(metric, measure.high)})"


def _rounded(metric: str, value: float) -> str:
    if metric == "images_per_s":
        return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
    if metric == "tokens":
        return f"{value:.1f}".removesuffix(".0")
    return f"{value:.3g}" if value < 1000 else f"{value:,.0f}"


def _number(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return "" if value is None else str(value)
    return f"{value:.4g}" if isinstance(value, float) and not float(value).is_integer() else f"{value:g}"


# -- headline ----------------------------------------------------------------------------------------------------------

MOST_TILES = 6


def headline(found: Sequence[Point]) -> dict[str, Any]:
    """The best setting of every series, best first, and what zooming bought beside each plain model.

    Series scored by the teacher's maps are left out: these maps know the label.
    """
    known = [point for point in found if "top1" in point.measures and point.series.count("scores maps") == 0]
    if any(point.study == EVALUATION for point in known):
        known = [point for point in known if point.study == EVALUATION]
    series: dict[tuple[str, str], list[Point]] = {}
    for point in known:
        series.setdefault((point.study, point.series), []).append(point)
    tiles = []
    for members in series.values():
        best = max(members, key=lambda point: point.measures["top1"].value)
        top1 = best.measures["top1"]
        facts = [best.told.replace(" ", "\u00a0")] if best.setting else []
        for metric, unit in (("tokens", "tokens"), ("total_gmacs", "GMACs"), ("images_per_s", "images/s")):
            if metric in best.measures:
                facts.append(f"{_rounded(metric, best.measures[metric].value)}\u00a0{unit}")
        tiles.append(
            {
                "name": best.series,
                "value": f"{100 * top1.value:.1f} %",
                "interval": ""
                if top1.low is None or top1.high is None
                else f"{_spread(top1)}: {100 * top1.low:.1f} to {100 * top1.high:.1f}",
                "facts": facts,
                "of": f"best of {len(members)} settings" if len(members) > 1 else "",
                "rank": top1.value,
            }
        )
    tiles.sort(key=lambda tile: -tile.pop("rank"))
    return {"tiles": tiles[:MOST_TILES], "left_out": max(0, len(tiles) - MOST_TILES), "said": _comparisons(series)}


def _comparisons(series: dict[tuple[str, str], list[Point]]) -> list[str]:
    """Each zooming series beside each plain model that costs at least as much."""
    said = []
    costed = [[p for p in members if "total_gmacs" in p.measures] for members in series.values()]
    plain = [members[0] for members in costed if len(members) == 1 and not members[0].zooms]
    for members in costed:
        if not any(point.zooms for point in members):
            continue
        for other in plain:
            limit = other.measures["total_gmacs"].value
            cheaper = [point for point in members if point.measures["total_gmacs"].value <= limit]
            if not cheaper:
                continue
            best = max(cheaper, key=lambda point: point.measures["top1"].value)
            mine, theirs = best.measures["top1"], other.measures["top1"]
            gain = 100 * (mine.value - theirs.value)
            cost = best.measures["total_gmacs"].value / limit
            way = f"{abs(gain):.1f} points {'more' if gain >= 0 else 'less'} accurate than"
            said.append(
                f"{best.series} at {best.told} is {way} {other.series} ({100 * mine.value:.1f} % against "
                f"{100 * theirs.value:.1f} %) for {cost:.2f} of its multiply-adds, the source of the scores included"
                + _overlap(mine, theirs)
                + "."
            )
    return said[:MOST_TILES]


def _spread(measure: Measure) -> str:
    """What low and high are: the range over a few seeds is no interval of confidence."""
    return f"range of {measure.seeds} seeds" if measure.seeds > 1 else "95 % interval"


def _overlap(mine: Measure, theirs: Measure) -> str:
    if None in (mine.low, mine.high, theirs.low, theirs.high):
        return ""
    if mine.low > theirs.high or theirs.low > mine.high:
        return ""
    if mine.seeds == theirs.seeds == 1:
        return "; the intervals overlap"
    if mine.seeds > 1 and theirs.seeds > 1:
        return "; the ranges of their seeds overlap"
    return f"; the {_spread(mine)} of the one and the {_spread(theirs)} of the other overlap"
