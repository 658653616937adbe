"""Results as tidy rows, one value a row: what evaluations and studies leave and the report reads.

A results file is `RUN/results/STUDY.json`: {format, version, study, title, shards, zpipe, rows}, beside it the rows alone as
Parquet. Its reader and writer are here.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from zpipe.schemas.atomic import commit, read_json, write_json
from zpipe.schemas.errors import ZpipeError
from zpipe.schemas.formats import check_format, header

FORMAT = "zpipe-results"
VERSION = 1

Value = str | int | float | None


@dataclass(frozen=True, kw_only=True)
class Result:
    """One figure.

    study: what it belongs to; `evaluation` for a plain one. run, model: the run's folder name and its timm model. setting:
    what was varied, such as {"alpha": 0.1, "scores": "zoomer"}. seed: of the training. metric: `top1`, `gmacs`, ... n: images (or
    whatever it is the mean of) behind the value. low, high: its 95 % interval, None where it has none.
    """

    study: str
    run: str
    model: str
    setting: dict[str, Value] = field(default_factory=dict)
    seed: int | None = None
    metric: str
    n: int
    value: float
    low: float | None = None
    high: float | None = None


def share(**where: Any) -> Any:
    """A `Result` for a share of n: `right` of `n`, with the Wilson interval. Takes the other fields of `Result`."""
    right, n = where.pop("right"), where["n"]
    low, high = wilson(right, n)
    return Result(value=right / n, low=low, high=high, **where)


def wilson(right: float, n: int) -> tuple[float, float]:
    """The 95 % interval of a share, `right` of `n` (Wilson 1927): never outside [0, 1], nor empty at its ends."""
    z, p = 1.959964, right / n
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, middle - half), min(1.0, middle + half)


def write_results(run: Path, study: str, title: str, shards: str, rows: Sequence[Result]) -> Path:
    """Write the results of a study into a run's folder; returns the JSON file."""
    path = Path(run) / "results" / f"{study}.json"
    table = [asdict(row) for row in rows]
    flat = [
        {name: value for name, value in row.items() if name != "setting"}
        | {f"setting.{name}": value for name, value in row["setting"].items()}
        for row in table
    ]
    with commit(path.with_suffix(".parquet")) as tmp:
        pq.write_table(pa.table({name: _column([row.get(name) for row in flat]) for name in _names(flat)}), tmp)
    about = header(FORMAT, VERSION) | {"study": study, "title": title, "shards": shards}
    write_json(path, about | {"zpipe": version("zpipe"), "rows": table})
    return path


def read_results(path: Path) -> tuple[dict[str, Any], list[Result]]:
    """What a results file says of itself, and its rows. Errors: :class:`ZpipeError` naming a file that is none."""
    found = read_json(path, "a results file")
    check_format(path, found, FORMAT, VERSION, remedy="evaluate again")
    try:
        return found, [Result(**row) for row in found.pop("rows")]
    except (KeyError, TypeError, ValueError) as error:
        raise ZpipeError(f"{path}: not a complete results file ({error}); evaluate again") from error


def wide(rows: Sequence[Result]) -> list[dict[str, Any]]:
    """One row a run and setting, its metrics side by side, for people to read. Histograms are left out."""
    table: dict[tuple, dict[str, Any]] = {}
    for row in rows:
        if row.metric != "images_with_tokens":
            about = {"run": row.run, **row.setting, "seed": row.seed}
            table.setdefault(tuple(about.items()), about)[row.metric] = row.value
    names = _names(table.values())
    return [{name: row.get(name) for name in names} for row in table.values()]


def _names(rows: Iterable[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row))


def _column(values: list[Value]) -> pa.Array:
    """Values of one kind as they are, mixed ones as text."""
    kinds = {type(value) for value in values if value is not None}
    if len(kinds) > 1 and not kinds <= {int, float}:
        return pa.array([None if value is None else str(value) for value in values])
    return pa.array([float(value) if kinds == {int, float} and value is not None else value for value in values])
