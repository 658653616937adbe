"""Tests of relevance maps as tables and plots: stores and controls beside each other, with intervals.

Everything here is pure (no file, no model) and makes JSON.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from zpipe.train.evaluation.results import Result
from zpipe.train.report.figures import Figure, error_bars, plot_text
from zpipe.train.report.points import HEADINGS, Measure, cell, number
from zpipe.train.report.runs import JudgedMaps
from zpipe.train.report.tables import Table

ORDER = ("deletion", "insertion", "abpc", "saco")  # the columns that come first
LOWER_IS_BETTER = "deletion"


def judged_tables(judged: Sequence[JudgedMaps]) -> list[Table]:
    """Two tables for each test: the metrics of stores and controls, and the differences to the first store."""
    tables = []
    for place, test in enumerate(judged):
        plain = [row for row in test.results if "minus" not in row.setting]
        note = f"{_setting(test.about)} In brackets: the 95 % interval over images."
        if any(row.metric == LOWER_IS_BETTER for row in plain):
            note += " Deletion: lower is better; all others: higher."
        tables.append(_table(f"judged {place}", _title(test), note, plain))
        # Files of earlier versions have no differences.
        if differences := [row for row in test.results if "minus" in row.setting]:
            caption = f"{_title(test)}: differences to {differences[0].setting['minus']}"
            note = (
                "All maps have the same resampled images. 95 of 100 such intervals hold the true difference: with many "
                "metrics, some exclude 0 by chance."
            )
            tables.append(_table(f"judged differences {place}", caption, note, differences))
    return tables


def _table(name: str, caption: str, note: str, results: Sequence[Result]) -> Table:
    rows = _measures(results)
    metrics = _metrics(rows)
    columns = ["maps", *map(_heading, metrics), "n"]
    cells = []
    for order, own in rows.items():
        most = max(measure.n for measure in own.values())
        values = [_cell(metric, own[metric], most) if metric in own else "" for metric in metrics]
        cells.append([order, *values, f"{most:,}"])
    return {"id": name, "caption": caption, "note": note, "columns": columns, "rows": cells}


def _cell(metric: str, measure: Measure, most: int) -> str:
    """A value with its interval, and with the number of images where other metrics of the row have more."""
    text = cell(metric, measure)
    return text if measure.n == most else f"{text}, n = {measure.n:,}"


def judged_figures(judged: Sequence[JudgedMaps]) -> list[Figure]:
    """A plot for each test: the metrics as groups of bars, a bar for each store and control."""
    figures = []
    for place, test in enumerate(judged):
        rows = _measures([row for row in test.results if "minus" not in row.setting])
        data = []
        for series, (name, own) in enumerate(rows.items()):
            metrics = [metric for metric in _metrics(rows) if metric in own]
            measures = [own[metric] for metric in metrics]
            most = max(measure.n for measure in measures)
            data.append(
                {
                    "type": "bar",
                    "name": plot_text(name),
                    "series": series,
                    "x": [plot_text(_heading(metric)) for metric in metrics],
                    "y": [measure.value for measure in measures],
                    "error_y": error_bars(measures, 1.0),
                    "text": [plot_text(f"{name}: {_cell(m, own[m], most)}") for m in metrics],
                    "textposition": "none",
                    "hoverinfo": "text",
                }
            )
        layout = {
            "xaxis": {"title": {"text": ""}},
            "yaxis": {"title": {"text": "value"}},
            "barmode": "group",
        }
        note = f"{_setting(test.about)} Bars: 95 % interval."
        figure = {"id": f"judged-{place}", "title": _title(test), "note": note, "table": f"judged {place}"}
        figures.append(figure | {"data": data, "layout": layout})
    return figures


def _measures(results: Sequence[Result]) -> dict[str, dict[str, Measure]]:
    """The metrics of each row by its name, in the order of the file."""
    rows: dict[str, dict[str, Measure]] = {}
    for row in results:
        measure = Measure(value=row.value, low=row.low, high=row.high, n=row.n, seeds=1)
        rows.setdefault(str(row.setting.get("order")), {})[row.metric] = measure
    return rows


def _metrics(rows: dict[str, dict[str, Measure]]) -> list[str]:
    names = dict.fromkeys(metric for own in rows.values() for metric in own)
    return sorted(names, key=lambda name: ORDER.index(name) if name in ORDER else len(ORDER))


def _heading(metric: str) -> str:
    return HEADINGS.get(metric, metric.replace("_", " "))


def _title(test: JudgedMaps) -> str:
    run, shards = test.about.get("run") or test.about.get("model"), test.about.get("shards")
    of = f", {Path(str(shards)).name}" if shards else ""
    return f"Maps judged on {Path(str(run)).name}{of} ({test.file})"


def _setting(about: dict[str, Any]) -> str:
    """A sentence about what the values depend on; earlier files do not state it."""
    found = about.get("settings")
    if not isinstance(found, dict):
        return "The file does not state its settings."
    return (
        f"Removed cells: {found.get('baseline')}; {found.get('steps')} steps, {found.get('groups')} groups; images of "
        f"{found.get('image_size')} px, the centre {number(found.get('crop_pct'))} of the shorter side."
    )
