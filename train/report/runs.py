"""Reads the files of runs and studies: tidy results, training curves, settings."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from zpipe.schemas.errors import UsageError
from zpipe.schemas.model_config import CONFIG_NAME
from zpipe.train.evaluation.results import (
    EVALUATION_SETTINGS,
    FOLDER,
    FORMAT,
    HISTOGRAM,
    Result,
    Value,
    content_of,
    read_results,
    read_verdicts,
)
from zpipe.train.run_files import METRICS_NAME, RUN_NAME, read_metrics, read_record


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """One training run."""

    path: Path
    name: str
    """The name of its folder, with as many parent folders as make it unique."""
    kind: str
    model: str
    settings: dict[str, Any]
    finished: bool
    curve: list[dict[str, Any]]
    """The lines of metrics.jsonl by rising step, each step once."""
    results: list[Result] = field(default_factory=list)
    """The results of its evaluations."""
    shards: str | None = None
    """The shards of its first evaluation."""
    points: list[dict[str, Value]] = field(default_factory=list)
    """The operating points of its first evaluation by their settings, such as {"alpha": 0.1} or {"exit": 0.5}."""
    measured: list[dict[str, Any]] = field(default_factory=list)
    """What its evaluations say of themselves, such as `samples`, `skipped` and `images_digest`; the first one first."""
    error_kinds: dict[str, str] = field(default_factory=dict)
    """The kind of each sample's answer by key, from the error analysis."""

    @property
    def evaluated(self) -> bool:
        """Whether it has results of an evaluation."""
        return self.shards is not None

    @property
    def zooms(self) -> list[dict[str, Any]]:
        """The thresholds and budgets among the points, without pruning."""
        return [point for point in self.points if len(point) == 1 and point.keys() <= {"alpha", "budget"}]


@dataclass(frozen=True, kw_only=True)
class JudgedMaps:
    """A test of maps."""

    file: str
    """The name of its file, with that of the folder."""
    about: dict[str, Any]
    """What the file says of itself, and its rows."""
    results: list[Result]


@dataclass(frozen=True, kw_only=True)
class Gathered:
    """The runs and results of a report."""

    runs: list[RunRecord]
    results: list[Result]
    """The tidy results of all evaluations and studies."""
    titles: dict[str, str]
    """The titles of the studies by name."""
    judged: list[JudgedMaps] = field(default_factory=list)
    """The tests of maps."""


def gather(paths: Sequence[Path]) -> Gathered:
    """Read runs, studies (folders with ``results/*.json``), folders with tests of maps, and folders of them.

    Raises:
        UsageError: a folder is none of these.
        ZpipeError: a file is broken.
    """
    run_folders, study_folders, judged_files = _folders(paths)
    names = _unique_names(run_folders)
    runs = [_read_run(folder, name) for folder, name in names.items()]
    known: dict[tuple[Any, ...], Result] = {}
    titles: dict[str, str] = {}
    for folder in study_folders:
        for file in _studies(folder):
            about, rows = read_results(file)
            if about["content"] != "study":
                continue  # calibrations are not shown, and tests of maps are among the files below
            titles.setdefault(
                str(about.get("study") or file.stem), str(about.get("title") or about.get("study") or file.stem)
            )
            # A run's own results name it by its folder at that time; here it may have a longer or another name.
            own = (folder.name, Path(about.get("run") or folder).name)
            rows = [replace(row, run=names[folder]) if folder in names and row.run in own else row for row in rows]
            _add(known, rows, folder.name)
    for run in runs:
        for row in run.results:
            known.setdefault(_key(row), row)  # a study may hold the same value
    judged = []
    for file in judged_files:
        about, rows = read_results(file)
        judged.append(JudgedMaps(file="/".join(file.parts[-2:]), about=about, results=rows))
    return Gathered(runs=runs, results=list(known.values()), titles=titles, judged=judged)


def _folders(paths: Sequence[Path]) -> tuple[list[Path], list[Path], list[Path]]:
    """The runs, the folders with studies, and the tests of maps in the paths and the folders in them, each once."""
    runs: dict[Path, None] = {}
    studies: dict[Path, None] = {}
    judged: dict[Path, None] = {}
    for path in (Path(path) for path in paths):
        if not path.is_dir():
            raise UsageError(f"{path}: no such folder; give runs, or a folder of runs")
        is_empty = True
        inside = () if _is_run(path) else sorted(entry for entry in path.iterdir() if entry.is_dir())
        for folder in (path, *inside):
            if _is_run(folder):
                runs[folder.resolve()] = None
                is_empty = False
            if _studies(folder):
                studies[folder.resolve()] = None
                is_empty = False
            found = [file.resolve() for file in _judged_files(folder)]
            judged |= dict.fromkeys(found)
            is_empty = is_empty and not found
        if is_empty:
            raise UsageError(f"{path}: holds no training run and no results; train-zoomer and train-vit make runs")
    return list(runs), list(studies), list(judged)


def _judged_files(folder: Path) -> list[Path]:
    """The tests of maps in a folder. Outside of runs, where any JSON may lie, only files with our header are read."""
    files = sorted([*folder.glob("*.json"), *(folder / FOLDER).glob("*.json")])
    if not _is_run(folder):
        files = [file for file in files if file.is_file() and _has_header(file)]
    return [file for file in files if content_of(file) == "judge"]


def _has_header(file: Path) -> bool:
    with open(file, "rb") as opened:
        return f'"format": "{FORMAT}"'.encode() in opened.read(4096)


def _add(known: dict[tuple[Any, ...], Result], rows: Iterable[Result], name: str) -> None:
    """Add results; if one of them is known with another value, all of them with `name` appended to their run."""
    rows = [_without_usual(row) for row in rows]
    if any(known.get(_key(row), row) != row for row in rows):
        rows = [replace(row, run=f"{row.run}, {name}") for row in rows]
    known |= {_key(row): row for row in rows}


def _without_usual(row: Result) -> Result:
    """The result without settings that are None, and without the default source of scores, the zoomer."""
    setting: dict[str, Value] = {name: value for name, value in row.setting.items() if value is not None}
    if setting.get("scores") == "zoomer":
        del setting["scores"]
    return replace(row, setting=setting)


def _key(row: Result) -> tuple[Any, ...]:
    """What identifies a result; 0 and 0.0 are the same threshold."""
    setting = sorted((name, f"{v:g}" if is_number(v) else str(v)) for name, v in row.setting.items())
    return (row.study, row.run, row.seed, row.metric, *setting)


def _is_run(folder: Path) -> bool:
    return (folder / RUN_NAME).is_file()


def _studies(folder: Path) -> list[Path]:
    """The files in the folder of results, without those about single samples."""
    return [file for file in sorted((folder / FOLDER).glob("*.json")) if content_of(file) != "verdicts"]


def _unique_names(folders: list[Path]) -> dict[Path, str]:
    """The name of each folder, with as many parent folders as make it unique."""
    names: dict[Path, str] = {}
    for folder in folders:
        parts = folder.parts
        for length in range(1, len(parts) + 1):
            name = "/".join(parts[-length:])
            if sum(other.parts[-length:] == parts[-length:] for other in folders) == 1:
                break
        names[folder] = name
    return names


def _read_run(folder: Path, name: str) -> RunRecord:
    record = read_record(folder)
    settings = record["settings"]
    run = RunRecord(
        path=folder,
        name=name,
        kind=record["kind"],
        model=str(settings.get("model") or record["kind"]),
        settings=settings,
        finished=(folder / CONFIG_NAME).is_file(),
        curve=_read_curve(folder / METRICS_NAME),
        error_kinds=_read_error_kinds(folder / FOLDER),
    )
    files = sorted(folder.glob("*.json"), key=lambda path: path.stem)
    files = [path for path in files if content_of(path) == "evaluation"]
    known: dict[tuple[Any, ...], Result] = {}
    for path in files:
        about, rows = read_results(path)
        # The folder may have been renamed since, and older files state neither model nor seed.
        rows = [_owned(row, run) for row in rows]
        run.measured.append({name: value for name, value in about.items() if name not in ("rows", "results")})
        if run.shards is None:
            run = replace(run, shards=str(about.get("shards") or ""), points=_points(rows))
        _add(known, rows, path.stem)
    return replace(run, results=list(known.values()))


def _owned(row: Result, run: RunRecord) -> Result:
    seed = run.settings.get("train", {}).get("seed") if row.seed is None else row.seed
    return replace(row, run=run.name, model=row.model or run.model, seed=seed)


def _points(rows: Sequence[Result]) -> list[dict[str, Value]]:
    """The operating points of results by their settings, each once, in the order of the results."""
    points: list[dict[str, Value]] = []
    for row in rows:
        if row.metric != HISTOGRAM:
            point = {name: value for name, value in row.setting.items() if name not in EVALUATION_SETTINGS}
            if point and point not in points:
                points.append(point)
    return points


def _read_curve(path: Path) -> list[dict[str, Any]]:
    lines: dict[tuple[int, bool], dict[str, Any]] = {}
    for line in read_metrics(path):
        # A resumed run logs the steps since its last checkpoint again; the weights are those of the later line.
        key = (line["step"], "loss" in line)
        lines.pop(key, None)
        lines[key] = line
    return sorted(lines.values(), key=lambda line: line["step"])


def _read_error_kinds(folder: Path) -> dict[str, str]:
    files = [path for path in sorted(folder.glob("*.json")) if content_of(path) == "verdicts"]
    return {str(sample["key"]): str(sample["kind"]) for path in files for sample in read_verdicts(path)}


def is_number(value: Any) -> bool:
    """Whether a value is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
