"""Points and training curves as Plotly traces. Pure: no file and no model.

Everything here is JSON. Names come from files and may hold anything, and Plotly reads the text inside plots as a small markup
language; `plot_text` escapes it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from zpipe.train.evaluation.results import EVALUATION
from zpipe.train.report.points import HEADINGS, Measure, Point, cell
from zpipe.train.report.runs import RunRecord, is_number

Figure = dict[str, Any]


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
                line = [(row["step"], scale * row[metric]) for row in run.curve if is_number(row.get(metric))]
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
