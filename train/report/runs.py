"""What runs and studies left on disk, read into one form: tidy results, training curves, settings."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from zpipe.schemas.atomic import read_json
from zpipe.schemas.errors import UsageError, ZpipeError
from zpipe.train.checkpoint import CONFIG_NAME, METRICS_NAME, RUN_NAME, read_record
from zpipe.train.evaluation.results import Result, Value, read_results, wilson
from zpipe.train.scoring import SOURCES

RESULTS_FOLDER = "results"
SAMPLES_SUFFIX = "_samples.json"  # beside a study's tidy rows: what it says of single samples, in a form of its own
ERROR_SAMPLES = "errors_samples.json"
EVALUATION, ZOOMER_EVALUATION = "evaluation", "zoomer evaluation"

# Fields of an evaluation's row that say what was evaluated, or belong to another field; all others are figures.
SETTING_FIELDS = ("alpha", "budget", "keep", "prune", "exit", "merge", "scores")
USUAL = {"weights": "final", "precision": "float32"}  # settings that are worth a word when they are others
NO_METRICS = {"setting", "count", "seed", "model", "token_histogram", *SETTING_FIELDS, *USUAL}
BESIDE = ("_interval", "_low", "_high")


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """One training run. name: of its folder, with as many folders above it as make it unique.

    curve: the lines of metrics.jsonl in the order of their steps, none of them twice. shards: of its evaluation.json.
    points: the settings evaluated there, such as {"alpha": 0.1} or {"exit": 0.5}. error_kinds: key -> kind, of the error analysis.
    """

    path: Path
    name: str
    kind: str
    model: str
    settings: dict[str, Any]
    finished: bool
    curve: list[dict[str, Any]]
    shards: str | None = None
    points: list[dict[str, Any]] = field(default_factory=list)
    error_kinds: dict[str, str] = field(default_factory=dict)

    @property
    def evaluated(self) -> bool:
        return self.shards is not None

    @property
    def zooms(self) -> list[dict[str, Any]]:
        """The thresholds and budgets among the points, without pruning."""
        return [point for point in self.points if len(point) == 1 and point.keys() <= {"alpha", "budget"}]


@dataclass(frozen=True, kw_only=True)
class Gathered:
    """runs; results: the tidy rows of all evaluations and studies; titles: of the studies."""

    runs: list[RunRecord]
    results: list[Result]
    titles: dict[str, str]


def gather(paths: Sequence[Path]) -> Gathered:
    """Read runs, studies (folders with ``results/*.json``) and folders of them.

    Errors: :class:`UsageError` for a folder that is neither; :class:`ZpipeError` naming a file that is broken.
    """
    run_folders: dict[Path, None] = {}
    study_folders: dict[Path, None] = {}
    for path in (Path(path) for path in paths):
        if not path.is_dir():
            raise UsageError(f"{path}: no such folder; give runs, or a folder of runs")
        found = False
        inside = () if _is_run(path) else sorted(entry for entry in path.iterdir() if entry.is_dir())
        for folder in (path, *inside):
            if _is_run(folder):
                run_folders[folder.resolve()] = None
                found = True
            if _studies(folder):
                study_folders[folder.resolve()] = None
                found = True
        if not found:
            raise UsageError(f"{path}: holds no training run and no results; train-zoomer and train-vit make runs")
    names = _unique_names(list(run_folders))
    runs = [_read_run(folder, name) for folder, name in names.items()]
    known: dict[tuple, Result] = {}
    titles: dict[str, str] = {}
    for folder in study_folders:
        for file in _studies(folder):
            about, rows = read_results(file)
            titles.setdefault(str(about["study"]), str(about.get("title") or about["study"]))
            # A run's own results name it by its folder, which here may have been given a longer name.
            rows = [
                replace(row, run=names[folder]) if folder in names and row.run == folder.name else row for row in rows
            ]
            found = {_key(row): row for row in map(_without_usual, rows)}
            if any(key in known and known[key] != row for key, row in found.items()):
                # Another folder's runs of the same names: told apart by that folder.
                found = {
                    _key(row): row for row in (replace(row, run=f"{row.run}, {folder.name}") for row in found.values())
                }
            known |= found
    for run in runs:
        for row in map(_without_usual, _evaluation_results(run)):
            known.setdefault(_key(row), row)  # tidy results may hold the same figure
    return Gathered(runs=runs, results=list(known.values()), titles=titles)


def _without_usual(row: Result) -> Result:
    """Without what is not set, and without the zoomer as the source of scores, which goes without saying."""
    setting = {name: value for name, value in row.setting.items() if value is not None}
    if setting.get("scores") == "zoomer":
        del setting["scores"]
    return replace(row, setting=setting)


def _key(row: Result) -> tuple:
    """What a figure is of; 0 and 0.0 are the same threshold."""
    setting = sorted((name, f"{v:g}" if _is_number(v) else str(v)) for name, v in row.setting.items())
    return (row.study, row.run, row.seed, row.metric, *setting)


def _is_run(folder: Path) -> bool:
    return (folder / RUN_NAME).is_file()


def _studies(folder: Path) -> list[Path]:
    files = sorted((folder / RESULTS_FOLDER).glob("*.json"))
    return [file for file in files if not file.name.endswith(SAMPLES_SUFFIX)]


def _unique_names(folders: list[Path]) -> dict[Path, str]:
    """Each folder's name, longer by the folders above it where another ends alike."""
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
        error_kinds=_read_error_kinds(folder / RESULTS_FOLDER / ERROR_SAMPLES),
    )
    path = folder / "evaluation.json"
    if not path.is_file():
        return run
    found = _read_evaluation(path)
    about = ("scores", *USUAL)
    settings = [_setting(row) for row in found["rows"]]
    points = [{name: value for name, value in each.items() if name not in about} for each in settings]
    return replace(run, shards=str(found.get("shards", "")), points=[point for point in points if point])


def _read_curve(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    lines: dict[tuple[int, bool], dict[str, Any]] = {}
    for number, text in enumerate(path.read_bytes().splitlines(), start=1):
        try:
            line = json.loads(text)
            step = int(line["step"])
        except (ValueError, KeyError, TypeError) as error:
            raise ZpipeError(f"{path}: line {number} is no line of figures; remove it") from error
        # A run that was killed logs the steps since its last checkpoint again: the later line is what the weights saw.
        key = (step, "loss" in line)
        lines.pop(key, None)
        lines[key] = line
    return sorted(lines.values(), key=lambda line: line["step"])


def _read_error_kinds(path: Path) -> dict[str, str]:
    if not path.is_file():
        return {}
    try:
        return {str(sample["key"]): str(sample["kind"]) for sample in read_json(path, "an error analysis")["samples"]}
    except (KeyError, TypeError) as error:
        raise ZpipeError(f"{path}: not an error analysis that this zpipe reads ({error}); analyse again") from error


# -- evaluation*.json --------------------------------------------------------------------------------------------------


def _read_evaluation(path: Path) -> dict[str, Any]:
    found = read_json(path, "an evaluation")
    rows = found.get("rows")
    try:
        if not isinstance(rows, list) or not rows:
            raise ValueError("no rows")
        for row in rows:
            if not _count(row):
                raise ValueError("a row without its count of images")
            _setting(row)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ZpipeError(f"{path}: not an evaluation that this zpipe reads ({error}); evaluate again") from error
    return found


def _count(row: dict[str, Any]) -> int:
    count = row.get("count")
    return count if isinstance(count, int) and count > 0 else 0


def _setting(row: dict[str, Any]) -> dict[str, Value]:
    """What was varied, from a row's fields; from its name where an older file has no such fields."""
    setting: dict[str, Value] = {name: row[name] for name in SETTING_FIELDS if row.get(name) is not None}
    setting |= {name: row[name] for name, usual in USUAL.items() if row.get(name, usual) != usual}
    name, equals, value = row["setting"].partition("=")
    if equals and name in ("alpha", "budget") and name not in setting:
        setting[name] = float(value) if name == "alpha" else int(value) if value.isdecimal() else value
    return setting


def _evaluation_results(run: RunRecord) -> list[Result]:
    found: list[Result] = []
    for path in sorted(run.path.glob("evaluation*.json"), key=lambda path: path.stem):
        extra = path.stem.removeprefix("evaluation").strip("-_.")
        try:
            told = _read_evaluation(path)
            for row in told["rows"]:
                found += _row_results(run, {"weights": told.get("weights", USUAL["weights"])} | row, extra)
        except (KeyError, TypeError, ValueError) as error:
            raise ZpipeError(f"{path}: not an evaluation that this zpipe reads ({error}); evaluate again") from error
    return found


def _row_results(run: RunRecord, row: dict[str, Any], extra: str) -> list[Result]:
    setting = _setting(row)
    said = [str(setting[name]) for name in ("scores", *USUAL) if name in setting]
    if extra in SOURCES and "scores" not in setting:
        setting["scores"] = extra
    elif extra and extra not in ("-".join(said), *said):  # a name that says what the row doesn't
        setting["evaluation"] = extra
    seed = row.get("seed", run.settings.get("train", {}).get("seed"))
    about = {
        "study": EVALUATION if run.kind == "vit" else ZOOMER_EVALUATION,
        "run": run.name,
        "model": str(row.get("model") or run.model),
        "seed": seed if isinstance(seed, int) else None,
        "n": _count(row),
    }
    rows = []
    for name, value in row.items():
        if name in NO_METRICS or name.endswith(BESIDE) or not _is_number(value):
            continue
        low, high = _interval(row, name, value)
        metric = "gmacs_scores" if name == "gmacs_zoomer" else name
        rows.append(Result(**about, setting=setting, metric=metric, value=float(value), low=low, high=high))
    for tokens, images in (row.get("token_histogram") or {}).items():
        at = setting | {"tokens": int(tokens)}
        rows.append(Result(**about, setting=at, metric="images_with_tokens", value=int(images) / _count(row)))
    return rows


def _interval(row: dict[str, Any], name: str, value: float) -> tuple[float | None, float | None]:
    low, high, half = (row.get(name + end) for end in ("_low", "_high", "_interval"))
    if _is_number(low) and _is_number(high):
        return float(low), float(high)
    if name in ("top1", "top5"):  # an interval that holds at 0 and 1 too
        return wilson(value * _count(row), _count(row))
    return (value - half, value + half) if _is_number(half) else (None, None)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
