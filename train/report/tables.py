"""The tables and the headline of the report, from points and runs.

Everything here is pure (no file, no model) and makes JSON.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import Any

from zpipe.train.evaluation.results import EVALUATION, ZOOMER_EVALUATION
from zpipe.train.report.points import FIRST_COLUMNS, HEADINGS, Measure, Point, cell, number, rounded
from zpipe.train.report.runs import RunRecord, is_number

Table = dict[str, Any]


def tables(points: Sequence[Point], titles: dict[str, str]) -> list[Table]:
    """A table per study, with a row per setting and a column per metric; intervals are in brackets."""
    captions = {EVALUATION: "Evaluation", ZOOMER_EVALUATION: "Zoomers against their teacher's maps"} | titles
    result = []
    for study in sorted({point.study for point in points}, key=lambda name: (name != EVALUATION, name)):
        members = [point for point in points if point.study == study and point.measures]
        if members:
            result.append(_table(study, captions.get(study, study), members))
    return result


def _table(study: str, caption: str, members: Sequence[Point]) -> Table:
    metrics = list(dict.fromkeys(metric for point in members for metric in point.measures))
    if not any("gmacs_scores" in point.measures and point.measures["gmacs_scores"].value for point in members):
        metrics = [metric for metric in metrics if metric not in ("gmacs_scores", "total_gmacs")]
    metrics.sort(key=lambda metric: FIRST_COLUMNS.index(metric) if metric in FIRST_COLUMNS else len(FIRST_COLUMNS))
    repeated = any(measure.seeds > 1 for point in members for measure in point.measures.values())
    heads = ["run", "setting", *(HEADINGS.get(metric, metric.replace("_", " ")) for metric in metrics), "n"]
    rows = []
    for point in members:
        cells = [cell(metric, point.measures[metric]) if metric in point.measures else "" for metric in metrics]
        most = max(point.measures.values(), key=lambda measure: (measure.seeds, measure.n))
        row = [point.series, point.label, *cells, f"{most.n:,}"]
        rows.append([*row, str(most.seeds)] if repeated else row)
    note = "In brackets: the 95 % interval (of images/s: the quartiles over batches)"
    note += "; where several seeds were trained, the mean and the range of the seeds." if repeated else "."
    columns = heads + (["seeds"] if repeated else [])
    return {"id": study, "caption": caption, "note": note, "columns": columns, "rows": rows}


def token_table(points: Sequence[Point]) -> list[Table]:
    """The mean and quantiles of the tokens per image, for points whose images differ in them."""
    rows = []
    for point in points:
        if len(point.histogram) > 1:  # of points with a single number, the other tables state it
            total = sum(point.histogram.values())
            mean = sum(tokens * share for tokens, share in point.histogram.items()) / total
            places = [_quantile(point.histogram, q) for q in (0.05, 0.5, 0.95)]
            rows.append([point.series, point.label, f"{mean:.1f}", *(str(place) for place in places)])
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
    """A row per run, with its settings and how it ended."""
    rows = []
    for run in runs:
        train = run.settings.get("train", {})
        steps = run.curve[-1]["step"] if run.curve else None
        rows.append(
            [
                run.name,
                run.model,
                "" if steps is None else f"{steps:,}",
                number(train.get("epochs")),
                str(train.get("opt", "")),
                number(train.get("lr")),
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
    return [row[metric] for row in run.curve if is_number(row.get(metric))]


def _last(run: RunRecord, metric: str, scale: float) -> str:
    values = _values(run, metric)
    return f"{scale * values[-1]:.3g}" if values else ""


def _best(run: RunRecord, metric: str) -> str:
    values = _values(run, metric)
    return f"{100 * max(values):.1f}" if values else ""


def _middle(run: RunRecord, metric: str) -> str:
    values = _values(run, metric)
    return f"{median(values):,.0f}" if values else ""


# -- headline ----------------------------------------------------------------------------------------------------------

MAX_TILES = 6


def headline(points: Sequence[Point], *, comparable: bool = True) -> dict[str, Any]:
    """The best setting of every series, the best series first, and comparisons of zooming with plain models.

    Series with the teacher's maps as scores are left out, because these maps know the label. If the points are not
    `comparable`, because they were measured on different images, there are no comparisons.
    """
    known = [point for point in points if "top1" in point.measures and point.series.count("scores maps") == 0]
    if any(point.study == EVALUATION for point in known):
        known = [point for point in known if point.study == EVALUATION]
    series: dict[tuple[str, str], list[Point]] = {}
    for point in known:
        series.setdefault((point.study, point.series), []).append(point)
    tiles: list[dict[str, Any]] = []
    for members in series.values():
        best = max(members, key=lambda point: point.measures["top1"].value)
        top1 = best.measures["top1"]
        facts = [best.label.replace(" ", "\u00a0")] if best.setting else []
        for metric, unit in (("tokens", "tokens"), ("total_gmacs", "GMACs"), ("images_per_s", "images/s")):
            if metric in best.measures:
                facts.append(f"{rounded(metric, best.measures[metric].value)}\u00a0{unit}")
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
    comparisons = _comparisons(series) if comparable else []
    tiles.sort(key=lambda tile: -tile.pop("rank"))
    return {"tiles": tiles[:MAX_TILES], "left_out": max(0, len(tiles) - MAX_TILES), "comparisons": comparisons}


def _comparisons(series: dict[tuple[str, str], list[Point]]) -> list[str]:
    """A sentence for each zooming series and each plain model that costs at least as much."""
    sentences = []
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
            sentences.append(
                f"{best.series} at {best.label} is {way} {other.series} ({100 * mine.value:.1f} % against "
                f"{100 * theirs.value:.1f} %) for {cost:.2f} of its multiply-adds, the source of the scores included"
                + _overlap(mine, theirs)
                + "."
            )
    return sentences[:MAX_TILES]


def _spread(measure: Measure) -> str:
    """What `low` and `high` are, in words: the range over a few seeds is no confidence interval."""
    return f"range of {measure.seeds} seeds" if measure.seeds > 1 else "95 % interval"


def _overlap(mine: Measure, theirs: Measure) -> str:
    if mine.low is None or mine.high is None or theirs.low is None or theirs.high is None:
        return ""
    if mine.low > theirs.high or theirs.low > mine.high:
        return ""
    if mine.seeds == theirs.seeds == 1:
        return "; the intervals overlap"
    if mine.seeds > 1 and theirs.seeds > 1:
        return "; the ranges of their seeds overlap"
    return f"; the {_spread(mine)} of the one and the {_spread(theirs)} of the other overlap"
