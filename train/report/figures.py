"""Points and training curves as Plotly traces.

Everything here is pure (no file, no model) and makes JSON. Names come from files and may contain anything; Plotly
interprets some markup in the text of plots, so `plot_text` escapes it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from zpipe.train.evaluation.results import EVALUATION
from zpipe.train.report.points import HEADINGS, Measure, Point, cell
from zpipe.train.report.runs import RunRecord, is_number

Figure = dict[str, Any]


def plot_text(text: object) -> str:
    """Escape text for Plotly, which interprets <a>, <b> and entities in labels as markup."""
    return str(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


PLOTS = (
    # id, metric of the x axis, title, label of the x axis, note
    (
        "gmacs",
        "total_gmacs",
        "Accuracy and multiply-adds",
        "GMACs per image, source of the scores included",
        "Up and to the left is better.",
    ),
    (
        "throughput",
        "images_per_s",
        "Accuracy and throughput",
        "images/s",
        "Up and to the right is better. Compare speeds only where they were measured on the same machine.",
    ),
)


def curves(points: Sequence[Point], titles: dict[str, str], runs: Sequence[RunRecord] = ()) -> list[Figure]:
    """Plot accuracy over multiply-adds and over throughput.

    Args:
        points: the points of evaluations and studies.
        titles: the titles of the studies by name.
        runs: the runs in the order of their colours (the `series` of a trace), which are the same in all plots.
    """
    judged = [point for point in points if "top1" in point.measures]
    named = [(EVALUATION, run.name) for run in runs] + [(point.study, point.series) for point in judged]
    numbers = {name: number for number, name in enumerate(dict.fromkeys(named))}
    bars = "Bars: 95 % interval (of images/s, quartiles)"
    if any(measure.seeds > 1 for point in judged for measure in point.measures.values()):
        bars += "; where several seeds were trained, the mean and the range of the seeds"
    figures = []
    for name, metric, title, axis, note in PLOTS:
        lines: dict[tuple[str, str], dict[str, list[Point]]] = {}  # of a series, one per sweep
        for point in judged:
            if metric in point.measures:
                lines.setdefault((point.study, point.series), {}).setdefault(point.sweep, []).append(point)
        if not lines:
            continue
        evaluated = any(study == EVALUATION for study, _ in lines)
        hint = ""
        if evaluated and any(study != EVALUATION for study, _ in lines):
            hint = " Studies are shown by a click on their names."
        data = []
        for key, sweeps in lines.items():
            for place, (sweep, members) in enumerate(sweeps.items()):
                suffix = f", {sweep}" if len(sweeps) > 1 and sweep else ""
                trace = _curve(titles, numbers[key], key, members, metric, suffix)
                if evaluated and key[0] != EVALUATION:
                    trace["visible"] = "legendonly"  # the many points of studies would hide the models
                data.append(trace | {"dashed": place % 2 == 1})
        axes = {
            "xaxis": {"title": {"text": axis}, "rangemode": "tozero"},
            "yaxis": {"title": {"text": "top-1, %"}},
        }
        table = EVALUATION if evaluated else next(iter(lines))[0]
        note = f"{note} {bars}.{hint}"
        figures.append({"id": name, "title": title, "note": note, "table": table, "data": data, "layout": axes})
    return figures


def _curve(
    titles: dict[str, str], number: int, key: tuple[str, str], members: list[Point], metric: str, suffix: str
) -> Figure:
    """The trace of one line: the points `members` of the series `key` over `metric`."""
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
        "error_y": error_bars(up, 100.0),
        "text": [plot_text(f"{name}: {_hover(point)}") for point in members],
        "hoverinfo": "text",
    }
    if any(measure.low is not None for measure in across):
        trace["error_x"] = error_bars(across, 1.0)
    if study != EVALUATION:
        trace |= {"legendgroup": study, "legendgrouptitle": {"text": plot_text(titles.get(study, study))}}
    return trace


def error_bars(measures: Sequence[Measure], scale: float) -> dict[str, Any]:
    """The intervals of measures as Plotly's error bars."""
    return {
        "type": "data",
        "symmetric": False,
        "array": [scale * (m.high - m.value) if m.high is not None else 0.0 for m in measures],
        "arrayminus": [scale * (m.value - m.low) if m.low is not None else 0.0 for m in measures],
    }


def _hover(point: Point) -> str:
    parts = [point.label] if point.setting else []
    metrics = [metric for metric in ("top1", "tokens", "total_gmacs", "images_per_s") if metric in point.measures]
    parts += [f"{HEADINGS[metric]} {cell(metric, point.measures[metric])}" for metric in metrics]
    return "; ".join(parts)


def histograms(points: Sequence[Point]) -> list[Figure]:
    """Plot the number of images by number of tokens, if images differ in it.

    At first only the widest histogram of each series is shown; the others appear by a click in the legend.
    """
    series: dict[tuple[str, str], list[Point]] = {}
    for point in points:
        if len(point.histogram) > 1:
            series.setdefault((point.study, point.series), []).append(point)
    if not series:
        return []
    data: list[Figure] = []
    for (_, name), members in series.items():
        widest = max(members, key=lambda point: len(point.histogram))
        data += [
            {
                "type": "bar",
                "name": plot_text(f"{name}: {point.label}"),
                "series": number,
                "x": list(point.histogram),
                "y": [100 * share for share in point.histogram.values()],
                "hovertemplate": "%{x} tokens: %{y:.1f} %<extra>%{fullData.name}</extra>",
                "visible": True if point is widest else "legendonly",
            }
            for number, point in enumerate(members, start=len(data))
        ]
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
    """Plot loss, accuracy, learning rate and speed over the steps."""
    everyone = list(enumerate(runs))
    vits = [(number, run) for number, run in everyone if run.kind == "vit"]
    zoomers = [(number, run) for number, run in everyone if run.kind != "vit"]
    top1 = {"train_top1": "train", "val_top1": "validation"}
    plots: tuple[tuple[str, str, str, Any, dict[str, str], float, dict[str, str]], ...] = (
        # id, title, label of the y axis, runs, metrics with their suffixes, scale, more of the y axis
        ("loss", "Training loss", "loss", vits, {"loss": ""}, 1.0, {}),
        ("accuracy", "Training accuracy", "top-1, %", vits, top1, 100.0, {}),
        ("zoomer-loss", "Zoomer's loss", "loss", zoomers, {"loss": ""}, 1.0, {"type": "log"}),
        ("lr", "Learning rate", "learning rate", everyone, {"lr": ""}, 1.0, {}),
        ("speed", "Training speed", "images/s", everyone, {"images_per_s": ""}, 1.0, {"rangemode": "tozero"}),
    )
    figures = []
    for name, title, axis, group, metrics, scale, more in plots:
        data = [
            trace
            for number, run in group
            for metric, suffix in metrics.items()
            if (trace := _training_curve(number, run, metric, suffix, scale)) is not None
        ]
        if data:
            layout = {"xaxis": {"title": {"text": "step"}}, "yaxis": {"title": {"text": axis}} | more}
            figures.append(
                {"id": f"train-{name}", "title": title, "note": "", "table": "training", "data": data, "layout": layout}
            )
    return figures


def _training_curve(number: int, run: RunRecord, metric: str, suffix: str, scale: float) -> Figure | None:
    """The trace of a metric over the steps; None if the run never logged it."""
    line = [(row["step"], scale * row[metric]) for row in run.curve if is_number(row.get(metric))]
    if not line:
        return None
    return {
        "type": "scatter",
        "mode": "lines+markers" if suffix == "validation" or len(line) < 3 else "lines",
        "name": plot_text(f"{run.name}, {suffix}" if suffix else run.name),
        "series": number,
        "dashed": suffix == "validation",
        "x": [step for step, _ in line],
        "y": [value for _, value in line],
        "hovertemplate": "step %{x}: %{y:.4g}<extra>%{fullData.name}</extra>",
    }
