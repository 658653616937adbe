"""The results format, its writer and its reader.

An evaluation, a study, a calibration, a test of maps and the demo each leave one JSON file with

    format, version, zpipe         the header, and the release that measured
    content                        what the file holds: evaluation, study, calibration, judge or demo
    run, model, seed, shards, ...  what was measured, and on what
    rows                           a table for people: a row per setting, with its metrics side by side
    results                        the same for programs: tidy `Result`s of one value each

Version 1 held studies only, with their tidy results under `rows`; all other files had no header then. `read_results`
reads them too. A study also leaves its results as Parquet, and `results/errors_samples.json` is a format of its own.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, cast, get_args

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq

from zpipe.schemas import formats
from zpipe.schemas.atomic import check_out_file, commit, refuse_links, write_json
from zpipe.schemas.errors import ZpipeError
from zpipe.schemas.formats import Count, check_format, header
from zpipe.train.checkpoint import Run
from zpipe.train.run_files import RESULTS

FORMAT = "zpipe-results"
VERSION = 2
VERDICTS_FORMAT = "zpipe-verdicts"
VERDICTS_VERSION = 1
FOLDER = RESULTS  # within a run: its studies
EVALUATION, ZOOMER_EVALUATION = "evaluation", "zoomer evaluation"  # the `study` of results that belong to none
HISTOGRAM = "images_with_tokens"
DEFAULTS = {"weights": "final", "precision": "float32"}  # a setting or a file name states only other values
# What an evaluation's results have in their settings besides the settings of the model.
EVALUATION_SETTINGS = ("scores", "classes", "labels", *DEFAULTS)

REMEDY = "restore the file, or measure again"

# Types of fields, with bounds that nothing measured comes near, so that what is computed from them stays finite.
Name = Annotated[str, msgspec.Meta(max_length=4096)]
Whole = Annotated[int, msgspec.Meta(ge=-(2**53), le=2**53)]
Finite = Annotated[float, msgspec.Meta(ge=-1e100, le=1e100)]
Seed = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]
T = TypeVar("T")
Value = Name | Whole | Finite | None
Content = Literal["evaluation", "study", "calibration", "judge", "demo"]


@dataclass(frozen=True, kw_only=True)
class Result:
    """One value of one metric."""

    study: Name
    """The study that it belongs to; `evaluation` or `zoomer evaluation` for a plain evaluation."""
    run: Name
    """The name of the run's folder."""
    model: Name
    """The model's name in timm."""
    setting: dict[str, Value] = field(default_factory=dict)
    """What was varied, such as {"alpha": 0.1, "scores": "zoomer"}."""
    seed: Seed | None = None
    """The seed of the training; None if it is not known."""
    metric: Name
    """`top1`, `gmacs`, ..."""
    n: Count
    """The number of images, or of other items, that the value is computed from."""
    value: Finite
    low: Finite | None = None
    """The lower end of the 95 % interval (of images_per_s: the lower quartile); None if there is no interval."""
    high: Finite | None = None
    """The upper end of the same interval."""


@dataclass(frozen=True, kw_only=True)
class EvalRow:
    """The metrics of one operating point of a ViT."""

    setting: str
    """The name of the operating point."""
    scores: str | None = None
    """The source of the scores; None for a model that takes none."""
    settings: dict[str, Value] = field(default_factory=dict)
    """The settings of the operating point, such as {"alpha": 0.1}; the model defines which ones exist."""
    count: int
    """The number of images that were judged."""
    top1: float
    top1_interval: float
    """Half the width of the 95 % interval of top1 (normal approximation)."""
    top5: float
    tokens: float | None
    """The mean sequence length per image without the class token; None for a model without patches."""
    token_histogram: dict[str, int]
    """The number of images by sequence length; empty for a model that spends the same on all images."""
    exited: float | None
    """The fraction of images that the first of two stages answered; None for other models."""
    gmacs: float
    """1e9 multiply-adds per image of the ViT."""
    gmacs_zoomer: float
    """1e9 multiply-adds per image of the zoomer, or of another source of scores."""
    images_per_s: float
    """The median over batches after a warm-up, of the ViT and the source of the scores together."""
    images_per_s_low: float
    """The lower quartile over batches."""
    images_per_s_high: float
    """The upper quartile over batches."""
    parameters: int
    """The number of weights of the ViT."""
    precision: str = "float32"
    """See `EvalConfig`."""

    def flat(self) -> dict[str, Any]:
        """The row of a table: {"setting": name, "scores": ..., one entry per setting, one per metric}."""
        values = asdict(self)
        settings = values.pop("settings")
        return {"setting": values.pop("setting"), "scores": values.pop("scores"), **settings, **values}


# -- rows to results ---------------------------------------------------------------------------------------------------

NOT_METRICS = {"setting", "settings", "scores", "count", "seed", "model", "token_histogram", *DEFAULTS}
NOT_METRICS_V1 = {"alpha", "budget", "keep", "prune", "exit", "merge"}  # the settings that a row could have then
BOUNDS = ("_interval", "_low", "_high")
SHARES = ("top1", "top5", "exited")


def identity(opened: Run, study: str) -> dict[str, Any]:
    """The fields of a `Result` that identify its run: study, run, model and seed."""
    model = opened.settings.get("model", opened.kind)
    seed = opened.settings.get("train", {}).get("seed")
    return {"study": study, "run": Path(opened.path).resolve().name, "model": model, "seed": seed}


def results_of(row: EvalRow, about: Mapping[str, Any]) -> list[Result]:
    """Convert the metrics of an operating point to results.

    Args:
        row: its metrics.
        about: study, run, model and seed as of `identity`, and optionally a `setting` to extend.
    """
    setting = {"scores": row.scores, **row.settings} | unusual({"precision": row.precision})
    setting = {name: value for name, value in setting.items() if value is not None}
    values = {each.name: getattr(row, each.name) for each in fields(row)}
    return metric_results(values, {**about, "setting": {**about.get("setting", {}), **setting}})


def metric_results(row: Mapping[str, Any], about: Mapping[str, Any]) -> list[Result]:
    """Convert the metrics of a table's row to results over the row's `count` images.

    The interval of a metric is what the row has as `NAME_low` and `NAME_high`; else Wilson's for a fraction of the
    images; else the row's `NAME_interval`, half its width. A token histogram becomes one result per sequence length.
    `counts` has the number of images of the metrics that do not have all.
    """
    n = row["count"]
    if not isinstance(n, int) or n < 1:
        raise ValueError(f"count {n!r} of images")
    results = []
    for name, value in row.items():
        if name in NOT_METRICS or name.endswith(BOUNDS) or not _is_number(value):
            continue
        metric = "gmacs_scores" if name == "gmacs_zoomer" else name
        own = row.get("counts", {}).get(name, n)
        low, high = _interval(row, name, value, own)
        results.append(Result(**about, metric=metric, n=own, value=float(value), low=low, high=high))
    histogram = row.get("token_histogram") or {}
    images = sum(histogram.values())
    for tokens, count in histogram.items() if images else ():
        setting = {**about.get("setting", {}), "tokens": int(tokens)}
        results.append(Result(**{**about, "setting": setting}, metric=HISTOGRAM, n=images, value=count / images))
    return results


def calibration_results(result: Mapping[str, Any], about: Mapping[str, Any]) -> list[Result]:
    """Convert what `calibrate` returns to results whose setting is the budget."""
    setting = {**about.get("setting", {}), "budget": f"{result['budget']:g} {result['unit']}"}
    metrics = {name: value for name, value in result.items() if name not in ("budget", "images")}
    return metric_results({"count": result["images"], **metrics}, {**about, "setting": setting})


def judge_results(rows: Iterable[Mapping[str, Any]], about: Mapping[str, Any]) -> list[Result]:
    """Convert the rows of `judge` to results whose setting is the order of the cells: a method's, centre or random.

    Of a difference to the first row, the setting also has the name of that row as `minus`.
    """
    results: list[Result] = []
    rows = list(rows)
    for row in rows:
        results += metric_results(row, {**about, "setting": {"order": row["setting"]}})
        for metric, (value, low, high) in row.get("difference", {}).items():
            setting = {"order": row["setting"], "minus": rows[0]["setting"]}
            n = row["counts"].get(metric, row["count"])
            results.append(Result(**about, setting=setting, metric=metric, n=n, value=value, low=low, high=high))
    return results


def _interval(row: Mapping[str, Any], name: str, value: float, n: int) -> tuple[float | None, float | None]:
    low, high, half = (row.get(name + end) for end in ("_low", "_high", "_interval"))
    if _is_number(low) and _is_number(high):
        return float(cast(float, low)), float(cast(float, high))
    if name in SHARES:  # this interval also holds at 0 and at 1
        return wilson(value * n, n)
    return (value - half, value + half) if half is not None and _is_number(half) else (None, None)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def unusual(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values of `weights` and `precision` that are not the defaults."""
    return {name: value for name, value in values.items() if value != DEFAULTS[name]}


def share(*, right: float, n: int, **about: Any) -> Result:
    """The result for a fraction, `right` of `n`, with its Wilson interval; `about` are the other fields of `Result`."""
    low, high = wilson(right, n)
    return Result(value=right / n, n=n, low=low, high=high, **about)


def wilson(right: float, n: int) -> tuple[float, float]:
    """The 95 % interval of a fraction, `right` of `n` (Wilson 1927): within [0, 1], and not empty at 0 and 1."""
    z, p = 1.959964, right / n
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, middle - half), min(1.0, middle + half)


def wide(results: Sequence[Result]) -> list[dict[str, Any]]:
    """A row per run and setting with its metrics side by side, for people to read. Histograms are left out."""
    table: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in results:
        if row.metric != HISTOGRAM:
            about = {"run": row.run, **row.setting, "seed": row.seed}
            table.setdefault(tuple(about.items()), about)[row.metric] = row.value
    names = _names(table.values())
    return [{name: row.get(name) for name in names} for row in table.values()]


# -- files -------------------------------------------------------------------------------------------------------------


def results_path(
    run: Path,
    content: Content,
    *,
    study: str | None = None,
    weights: str = "final",
    precision: str = "float32",
    more: Sequence[str] = (),
) -> Path:
    """The default place of results: a file for each content, study, weights and precision, and for `more` words."""
    stem = "-".join([study or content, *unusual({"weights": weights, "precision": precision}).values(), *more])
    return Path(run) / FOLDER / f"{stem}.json" if content == "study" else Path(run) / f"{stem}.json"


def check_results_file(path: Path) -> None:
    """Check, before any work, that results may be written to `path`: that nothing but results lies there.

    Raises:
        UsageError: something else does.
    """
    check_out_file(path, (), f'"format": "{FORMAT}"'.encode())


def write_results(
    path: Path | None,
    content: Content,
    about: Mapping[str, Any],
    rows: Sequence[Mapping[str, Any]],
    results: Iterable[Result],
) -> dict[str, Any]:
    """Assemble the content of a results file, write it if there is a `path`, and return it.

    Args:
        path: the JSON file; None to write nothing.
        content: what the file holds.
        about: what was measured, and on what: run, model, seed, shards, maps, ...
        rows: the table.
        results: the same as tidy results.
    """
    file = header(FORMAT, VERSION) | {"zpipe": version("zpipe"), "content": content, **about}
    file |= {"rows": list(rows), "results": [asdict(result) for result in results]}
    if path is not None:
        write_json(path, file)
    return file


def write_study(run: Path, about: Mapping[str, Any], results: Sequence[Result]) -> Path:
    """Write the results of a study into a run's folder, as JSON and as Parquet.

    Args:
        run: the folder.
        about: `study`, `title`, `shards` and more; `precision` if it is not float32.
        results: the results.

    Returns:
        The JSON file.
    """
    refuse_links(Path(run), (FOLDER,), "training run")
    path = results_path(run, "study", study=about["study"], precision=about.get("precision", "float32"))
    flat = []
    for result in results:
        row = asdict(result)
        setting = row.pop("setting")
        flat.append(row | {f"setting.{name}": value for name, value in setting.items()})
    with commit(path.with_suffix(".parquet")) as tmp:
        pq.write_table(pa.table({name: _column([row.get(name) for row in flat]) for name in _names(flat)}), tmp)
    write_results(path, "study", about, wide(results), results)
    return path


def _names(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row))


def _column(values: list[Value]) -> pa.Array:
    """A column of values; values of several types become text."""
    types = {type(value) for value in values if value is not None}
    if len(types) > 1 and not types <= {int, float}:
        return pa.array([None if value is None else str(value) for value in values])
    return pa.array([float(value) if types == {int, float} and value is not None else value for value in values])


@dataclass(frozen=True, kw_only=True)
class _About:
    """What readers take from the fields beside the results."""

    run: Name | None = None
    model: Name | None = None
    seed: Seed | None = None
    study: Name | None = None
    title: Name | None = None
    shards: Name | None = None
    kind: Name | None = None
    weights: Name = DEFAULTS["weights"]
    precision: Name = DEFAULTS["precision"]


@dataclass(frozen=True, kw_only=True)
class _ResultsFile(_About):
    content: Content
    results: list[Result]
    rows: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class _StudyFileV1(_About):
    rows: list[Result]


@dataclass(frozen=True, kw_only=True)
class _UnversionedFile(_About):
    rows: list[dict[str, Value | bool | dict[str, Count]]] = field(default_factory=list)
    # A calibration is a single row.
    alpha: Finite | None = None
    exit_threshold: Finite | None = None
    budget: Finite | None = None
    unit: Name | None = None
    mean: Finite | None = None
    std: Finite | None = None
    images: Count | None = None


def content_of(path: Path) -> Content | Literal["verdicts"] | None:
    """What a JSON file holds, by its header or, for files of before the header, by its fields; None for other files.

    Raises:
        ZpipeError: the file is not JSON, or states a content that this zpipe does not know.
    """
    file = formats.read_json(path, "JSON", type=Any, remedy="restore or delete the file")
    if not isinstance(file, dict):
        return None
    if file.get("format") == VERDICTS_FORMAT or ("format" not in file and "samples" in file):
        return "verdicts"
    if file.get("format") != FORMAT:
        return _unversioned_content(file)
    content = file.get("content", "study")
    if content not in get_args(Content):
        raise ZpipeError(f"{path}: its content is {str(content)[:40]!r}, none that this zpipe reads; {REMEDY}")
    return content


def read_results(path: Path) -> tuple[dict[str, Any], list[Result]]:
    """Read a results file of any version.

    Returns:
        The other fields of the file, including `content` and `rows`, and its results.

    Raises:
        ZpipeError: the file holds no results, is of a later version, or a value has another type or is out of bounds.
    """
    file = formats.read_json(path, "a results file", type=dict[str, Any], remedy=REMEDY)
    content = _unversioned_content(file)
    if content is None:
        number = check_format(path, file, FORMAT, VERSION, remedy=REMEDY)
        if number == 1:
            results = _typed(file, _StudyFileV1, path, "a complete results file").rows
            file = {name: file[name] for name in file if name != "rows"} | {"content": "study"}
        else:
            results = _typed(file, _ResultsFile, path, "a complete results file").results
            del file["results"]
        _check_histograms(results, path)
        return file | {"rows": file.get("rows") or wide(results)}, results
    what = {"evaluation": "an evaluation", "judge": "a test of maps"}.get(content, f"a {content}")
    _typed(file, _UnversionedFile, path, f"{what} that this zpipe reads")
    try:
        results = _unversioned_results(file, content, path)
    except (AttributeError, KeyError, TypeError, ValueError) as error:  # fields that are absent, or do not go together
        raise ZpipeError(f"{path}: not {what} that this zpipe reads ({error}); {REMEDY}") from error
    return {"rows": [dict(file)]} | file | {"content": content}, results


def _typed(file: dict[str, Any], kind: type[T], path: Path, what: str) -> T:
    """Check the types of what was read."""
    try:
        return msgspec.convert(file, kind)
    except msgspec.ValidationError as error:
        raise ZpipeError(f"{path}: not {what} ({error}); {REMEDY}") from error


def _check_histograms(results: Sequence[Result], path: Path) -> None:
    for row in results:
        if row.metric.startswith(HISTOGRAM) and not (row.metric == HISTOGRAM and _is_count(row.setting.get("tokens"))):
            raise ZpipeError(f"{path}: not a complete results file ({row.metric} without a number of tokens); {REMEDY}")


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def write_verdicts(path: Path, verdicts: Sequence[Mapping[str, Any]]) -> None:
    """Write the verdicts of an error analysis: `key`, `kind` and more for each sample."""
    write_json(path, header(VERDICTS_FORMAT, VERDICTS_VERSION) | {"samples": list(verdicts)})


def read_verdicts(path: Path) -> list[dict[str, Any]]:
    """Read the samples of an error analysis.

    Raises:
        ZpipeError: the file is no error analysis, or is of a later version.
    """
    remedy = "restore the file, or analyse again"
    file = formats.read_json(path, "an error analysis", type=dict[str, Any], remedy=remedy)
    if "format" in file:  # earlier files have no header
        check_format(path, file, VERDICTS_FORMAT, VERDICTS_VERSION, remedy=remedy)
    try:
        msgspec.convert(file, _Verdicts)
    except msgspec.ValidationError as error:
        raise ZpipeError(f"{path}: not an error analysis that this zpipe reads ({error}); {remedy}") from error
    return file["samples"]


@dataclass(frozen=True, kw_only=True)
class _Verdict:
    key: Name
    kind: Name


@dataclass(frozen=True, kw_only=True)
class _Verdicts:
    samples: list[_Verdict]


# -- files without a header --------------------------------------------------------------------------------------------


def _unversioned_content(file: Mapping[str, Any]) -> Content | None:
    """What a file of before the header holds; None if it is no results file, or has a header."""
    if "format" in file:
        return None
    if "rows" not in file:
        return "calibration" if {"unit", "budget", "mean", "std", "images"} <= set(file) else None
    if "notes" in file:
        return "demo"
    rows = file["rows"]
    first = rows[0] if isinstance(rows, list) and rows and isinstance(rows[0], dict) else {}
    return "judge" if "deletion" in first else "evaluation"


def _unversioned_results(file: Mapping[str, Any], content: Content, path: Path) -> list[Result]:
    """The results of such a file. It names its run by a path, or not at all if it lies in the run's folder."""
    run = Path(file["run"]).name if file.get("run") else path.resolve().parent.name
    about: dict[str, Any] = {"study": content, "run": run, "model": file.get("model") or ""}
    about |= {"seed": file.get("seed")}
    if content == "calibration":
        return calibration_results(file, about)
    rows = file["rows"]
    if not rows:
        raise ValueError("no rows")
    if content == "demo":
        return []  # its table does not say how many images it is of
    if content == "judge":
        return judge_results(rows, about)
    results = []
    for row in rows:
        each = about | {name: row[name] for name in ("model", "seed") if row.get(name) is not None}
        each["study"] = ZOOMER_EVALUATION if file.get("kind") == "zoomer" else EVALUATION
        each["setting"] = _setting_v1(row, file)
        results += metric_results({name: row[name] for name in row if name not in NOT_METRICS_V1}, each)
    return results


def _setting_v1(row: Mapping[str, Any], file: Mapping[str, Any]) -> dict[str, Value]:
    """What was varied: from a row's fields or, in older files without these fields, from its name."""
    setting = {name: row[name] for name in ("scores", *sorted(NOT_METRICS_V1)) if row.get(name) is not None}
    stated = {name: row.get(name, file.get(name, usual)) for name, usual in DEFAULTS.items()}
    name, equals, value = row.get("setting", "").partition("=")
    if equals and name in ("alpha", "budget") and name not in setting:
        setting[name] = float(value) if name == "alpha" else int(value) if value.isdecimal() else value
    return setting | unusual(stated)
