"""The verbs that measure a trained model and show its results."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, cast

import typer
from typer.core import TyperCommand

from zpipe.cli_options import (
    Address,
    Alphas,
    At,
    AtOne,
    BatchSize,
    Classes,
    Damaged,
    Device,
    Exits,
    Join,
    Labels,
    LoadingProcesses,
    Maps,
    Merge,
    Precision,
    Run,
    Scores,
    ScoresOfImages,
    Shards,
    Weights,
)
from zpipe.console import (
    fail,
    local_path,
    parse_budget,
    parse_budgets,
    parse_numbers,
    parse_point,
    parse_points,
    path_or_url,
    print_rows,
    reporting,
    tell,
    warn,
)
from zpipe.schemas.account import Account

# The columns of an evaluation that a table has room for; the file has all of them.
_COLUMNS = [
    "setting",
    "count",
    "top1",
    "top1_interval",
    "top5",
    "tokens",
    "exited",
    "gmacs",
    "gmacs_zoomer",
    "images_per_s",
]


def _main_columns(row: dict[str, Any]) -> dict[str, Any]:
    """The columns of an evaluation's row that are printed."""
    if "top1" not in row:
        return {name: value for name, value in row.items() if name != "precision"}
    return {name: row[name] for name in _COLUMNS if name != "exited" or row["exited"] is not None}


def _tables(rows: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Split a study's rows into tables of the same columns, with one for all ViTs at the end; drop empty columns."""
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for row in rows:
        filled = tuple(name for name, value in row.items() if value is not None)
        groups.setdefault(("top1",) if "top1" in filled else filled, []).append(row)
    tables = []
    for key in sorted(groups, key=lambda names: names == ("top1",)):
        shown = {name for row in groups[key] for name, value in row.items() if value is not None}
        shown -= {"parameters"} if key == ("top1",) else set()
        tables.append([{name: value for name, value in row.items() if name in shown} for row in groups[key]])
    return tables


def evaluate_command(
    run: Run,
    shards: Shards,
    alphas: Alphas = None,
    budgets: Annotated[
        str,
        typer.Option(
            help="Budgets to evaluate as well: zoomed cells per image, '300 tokens' or '2.3 GMACs', comma-separated."
        ),
    ] = "",
    keep: Annotated[
        str, typer.Option(help="Also evaluate each setting pruned to so many tokens, comma-separated.")
    ] = "",
    prune: Annotated[
        str,
        typer.Option(
            help="Which tokens --keep drops: backward (the lowest-ranked) or forward (the highest), "
            "or either with -zoomed or -rest."
        ),
    ] = "backward",
    exits: Exits = "",
    merge: Merge = "",
    at: At = None,
    target_gmacs: Annotated[
        float | None,
        typer.Option(help="Instead of --alphas or --exits: use the threshold whose mean cost per image is this."),
    ] = None,
    calibration: Annotated[
        Path | None,
        typer.Option(
            parser=path_or_url,
            metavar="SHARDS",
            help="(with --target-gmacs) Images to choose the threshold on; not those of SHARDS.",
        ),
    ] = None,
    calibration_maps: Annotated[
        Path | None,
        typer.Option(
            parser=path_or_url,
            metavar="PATH|URL",
            help="Relevance store of the calibration shards, if the scores are maps.",
        ),
    ] = None,
    maps: Annotated[
        Path | None,
        typer.Option(
            parser=path_or_url, metavar="PATH|URL", help="Relevance store of these shards (needed for a zoomer)."
        ),
    ] = None,
    scores: Scores = None,
    classes: Classes = None,
    labels: Labels = None,
    damaged: Damaged = "error",
    join: Join = "tar",
    weights: Weights = "final",
    precision: Precision = "float32",
    batch_size: BatchSize = 128,
    data_workers: LoadingProcesses = None,
    device: Device = "auto",
    json_path: Annotated[
        Path | None,
        typer.Option(
            "--json",
            parser=path_or_url,
            metavar="PATH|URL",
            help="Results file; default evaluation.json in the run, or evaluation-best.json and the like "
            "for other weights, precision, scores, labels, classes or images.",
        ),
    ] = None,
) -> None:
    """Measure top-1, mean tokens, GMACs and images/s of a ViT for each alpha, or a zoomer's distance to its teacher."""
    with reporting() as progress:
        from zpipe.train.data.join import Damaged as DamagedChoice
        from zpipe.train.data.map_stores import Join as JoinChoice
        from zpipe.train.evaluation.evaluate import evaluate, evaluation_path
        from zpipe.train.evaluation.operating_points import EvalConfig
        from zpipe.train.evaluation.results import check_results_file

        config = EvalConfig(
            alphas=None if alphas is None else parse_numbers(alphas, float, "--alphas"),
            budgets=parse_budgets(budgets),
            keeps=parse_numbers(keep, int, "--keep"),
            prune=prune,
            exits=parse_numbers(exits, float, "--exits"),
            merges=parse_numbers(merge, int, "--merge"),
            points=parse_points(at),
            target_gmacs=target_gmacs,
            calibration=calibration,
            calibration_maps=calibration_maps,
            scores=scores,
            classes=classes,
            labels=labels,
            damaged=cast(DamagedChoice, damaged),
            join=cast(JoinChoice, join),
            weights=weights,
            precision=precision,
            batch_size=batch_size,
            data_workers=data_workers,
            device=device,
        )
        if json_path is not None:
            check_results_file(json_path)
        result = evaluate(run, shards, config, maps=maps, progress=progress)
    print_rows([_main_columns(row) for row in result["rows"]], title=str(run))
    with reporting():
        target = json_path or evaluation_path(run, config, result)
    conclude(result, target)


def conclude(content: Mapping[str, Any], target: Path | None = None) -> None:
    """The end of a measurement, behind its figures: write the results file, and account for what was left out.

    The figures are printed first, so that they aren't lost if the file can't be written.

    Args:
        content: of the results file.
        target: the file to write; None to write none.
    """
    if target is not None:
        with reporting():
            from zpipe.schemas.atomic import write_json

            write_json(target, content)
        tell(f"written to {target}")
    account = Account(
        seen=content["samples"], taken=content["samples"] - content["skipped"], left_out=Counter(content["skipped_by"])
    )
    if content["skipped"]:
        tell(f"{content['shards']}: {account}")
    problems = [content["left_out_of_tars"]] if content["left_out_of_tars"] else []
    if damaged := account.left_out["damaged"]:
        line = f"{content['shards']}: damaged and left out by --damaged skip: {damaged}; the figures are of the others"
        problems = [line, *problems]
    if problems:
        fail(problems[0], (*problems[1:], *content["damaged"]), 1)


class StudyCommand(TyperCommand):
    """`zpipe study`, whose help ends with the list of studies. Only the help imports them, for they import torch."""

    # Context and formatter are those of click, which some versions of typer bundle.
    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        """Write the list of studies."""
        from zpipe.train.studies.registry import STUDIES

        with formatter.section("Studies"):
            formatter.write_dl([(name, study.title) for name, study in STUDIES.items()])


def study_command(
    name: Annotated[str, typer.Argument(metavar="NAME", help="One of the studies below.")],
    run: Run,
    shards: Shards,
    alphas: Annotated[
        str, typer.Option(help="Thresholds of a ZoomViT, comma-separated; default: those of the study.")
    ] = "",
    budgets: Annotated[
        str,
        typer.Option(
            help="Budgets, comma-separated: zoomed cells per image, '300 tokens' or '2.3 GMACs'; "
            "default: those of the study."
        ),
    ] = "",
    exits: Exits = "",
    merge: Merge = "",
    at: At = None,
    maps: Maps = None,
    zoomer: Annotated[
        Path | None,
        typer.Option(
            parser=local_path,
            metavar="RUN",
            help="(test-time-zoom) Train-zoomer run whose scores decide where to zoom.",
        ),
    ] = None,
    methods: Annotated[
        str,
        typer.Option(
            help="(map-methods) Attribution methods to compare, comma-separated; default: all that the teacher can be "
            "explained by."
        ),
    ] = "",
    weights: Annotated[
        str | None,
        typer.Option(
            help="(map-methods) The teacher's weights, if they are no longer where the zoomer's relevance store says."
        ),
    ] = None,
    classes: Classes = None,
    labels: Labels = None,
    damaged: Damaged = "error",
    join: Join = "tar",
    seeds: Annotated[
        str, typer.Option(help="Seeds of what it trains, comma-separated; default: that of the run.")
    ] = "",
    epochs: Annotated[float | None, typer.Option(help="Epochs of what it trains; default: those of the run.")] = None,
    num_workers: Annotated[
        int, typer.Option(min=0, help="Training processes, as of train-vit; they share the run's batch.")
    ] = 1,
    address: Address = None,
    precision: Precision = "float32",
    batch_size: BatchSize = 128,
    data_workers: LoadingProcesses = None,
    device: Device = "auto",
) -> None:
    """Repeat one of the paper's experiments around a run.

    The models that it compares are trained under the run's own settings into RUN/studies, where they are kept and
    resumed. The results go to RUN/results/NAME.json and .parquet.
    """
    with reporting() as progress:
        from zpipe.train.data.join import Damaged as DamagedChoice
        from zpipe.train.data.map_stores import Join as JoinChoice
        from zpipe.train.evaluation.operating_points import EvalConfig
        from zpipe.train.evaluation.results import wide, write_study
        from zpipe.train.fit.distributed import Workers
        from zpipe.train.studies.bench import StudyConfig, StudyInputs
        from zpipe.train.studies.registry import STUDIES, measure_study

        evaluation = EvalConfig(
            alphas=parse_numbers(alphas, float, "--alphas"),
            budgets=parse_budgets(budgets),
            exits=parse_numbers(exits, float, "--exits"),
            merges=parse_numbers(merge, int, "--merge"),
            points=parse_points(at),
            classes=classes,
            labels=labels,
            damaged=cast(DamagedChoice, damaged),
            join=cast(JoinChoice, join),
            precision=precision,
            batch_size=batch_size,
            data_workers=data_workers,
            device=device,
        )
        workers = Workers(count=num_workers, address=address)
        config = StudyConfig(
            evaluation=evaluation, seeds=parse_numbers(seeds, int, "--seeds"), epochs=epochs, workers=workers
        )
        inputs = StudyInputs(run=run, shards=shards, maps=maps, zoomer=zoomer)
        if name == "map-methods" or methods or weights is not None:
            from zpipe.method_maps import MethodsConfig, extract_method_maps

            named = tuple(method.strip() for method in methods.split(",") if method.strip())
            chosen = MethodsConfig(methods=named, weights=weights, address=address, device=device)
            extract = partial(extract_method_maps, config=chosen, progress=progress, say=warn)
            inputs = replace(inputs, method_maps=extract)
        about, results, notes = measure_study(name, inputs, config, progress=progress, say=warn)
    for table in _tables(wide(results)):
        print_rows(table, title=STUDIES[name].title)
    for note in notes:
        tell(f"note: {note}")
    with reporting():
        path = write_study(run, about, results)
    tell(f"written to {path} and {path.with_suffix('.parquet').name}")
    conclude(about)


def predict_command(
    images: Annotated[list[Path], typer.Argument(parser=local_path, metavar="IMAGES", help="Image files.")],
    checkpoint: Annotated[
        Path, typer.Option(parser=local_path, metavar="RUN", help="Finished train-vit run; its zoomer is in it.")
    ],
    alpha: Annotated[
        float | None, typer.Option(help="Threshold of a model that zooms; default 0.1, unless --budget is given.")
    ] = None,
    budget: Annotated[
        str | None, typer.Option(help="Instead of --alpha: zoomed cells per image, '300 tokens' or '2.3 GMACs'.")
    ] = None,
    at: AtOne = None,
    scores: ScoresOfImages = None,
    top: Annotated[int, typer.Option(min=1, help="Number of classes to print.")] = 5,
    output: Annotated[
        Path | None,
        typer.Option(
            "--out",
            parser=local_path,
            metavar="FOLDER",
            help="Folder for one PNG per image, with scores and patches drawn over it.",
        ),
    ] = None,
    json_path: Annotated[
        Path | None,
        typer.Option("--json", parser=path_or_url, metavar="PATH|URL", help="Also write the predictions to this file."),
    ] = None,
    weights: Weights = "final",
    precision: Precision = "float32",
    device: Device = "auto",
) -> None:
    """Print the most probable classes of image files, and draw what a ZoomViT looked at."""
    with reporting() as progress:
        from zpipe.schemas.atomic import check_out_file
        from zpipe.train.evaluation.predict import MARK, PredictConfig, predict

        config = PredictConfig(
            alpha=alpha,
            budget=parse_budget(budget),
            settings=parse_point(at),
            scores=scores,
            weights=weights,
            precision=precision,
            top=top,
            device=device,
        )
        if json_path is not None:
            check_out_file(json_path, (), MARK)
        rows = predict(checkpoint, images, config, out=output, progress=progress)
    unread = [row for row in rows if "error" in row]
    for row in rows:
        if "error" in row:
            continue
        classes = [f"{each['name'] or each['index']} {each['probability']:.1%}" for each in row["classes"]]
        tokens = "" if row["tokens"] is None else f" ({row['tokens']} tokens)"
        tell(f"{row['file']}: {', '.join(classes)}{tokens}")
    if json_path is not None:
        with reporting():
            from zpipe.schemas.atomic import write_json

            write_json(json_path, rows)
    if unread:
        tell(str(Account(seen=len(rows), taken=len(rows) - len(unread), quarantined=len(unread))))
        fail(f"{len(unread)} of {len(rows)} files can't be read as images", tuple(row["error"] for row in unread), 1)


def calibrate_command(
    run: Annotated[
        Path,
        typer.Argument(
            parser=local_path, metavar="RUN", help="Finished train-vit run of a zoomvit_*, cfvit_* or lfvit_* model."
        ),
    ],
    shards: Shards,
    budget: Annotated[
        str, typer.Option(help="Mean cost per image: '2.3 GMACs', '300 tokens', or a number of zoomed cells.")
    ],
    scores: Scores = None,
    maps: Annotated[
        Path | None,
        typer.Option(parser=path_or_url, metavar="PATH|URL", help="Relevance store, for --scores maps."),
    ] = None,
    limit: Annotated[int, typer.Option(min=1, help="Most images to use.")] = 50_000,
    classes: Classes = None,
    damaged: Damaged = "error",
    join: Join = "tar",
    batch_size: BatchSize = 128,
    data_workers: LoadingProcesses = None,
    weights: Weights = "final",
    device: Device = "auto",
    json_path: Annotated[
        Path | None,
        typer.Option(
            "--json", parser=path_or_url, metavar="PATH|URL", help="Results file; default calibration.json in the run."
        ),
    ] = None,
) -> None:
    """Find the threshold (alpha, or that of early exit) at which a model costs a given budget per image on average."""
    with reporting() as progress:
        from zpipe.train.data.join import Damaged as DamagedChoice
        from zpipe.train.data.map_stores import Join as JoinChoice
        from zpipe.train.evaluation.calibrate import CalibrationConfig, calibration
        from zpipe.train.evaluation.results import check_results_file, results_path

        config = CalibrationConfig(
            budget=budget,
            scores=scores,
            weights=weights,
            limit=limit,
            classes=classes,
            damaged=cast(DamagedChoice, damaged),
            join=cast(JoinChoice, join),
            batch_size=batch_size,
            data_workers=data_workers,
            device=device,
        )
        target = json_path or results_path(run, "calibration", weights=weights)
        check_results_file(target)
        calibrated = calibration(run, shards, config, maps=maps, progress=progress)
    name = next(name for name in ("alpha", "exit_threshold") if name in calibrated)
    tell(
        f"{name} {calibrated[name]!r}: {calibrated['mean']:.4g} {calibrated['unit']} per image, "
        f"standard deviation {calibrated['std']:.3g}, over {calibrated['images']:,} images"
    )
    conclude(calibrated, target)


def report_command(
    runs: Annotated[
        list[Path],
        typer.Argument(
            parser=local_path,
            metavar="RUNS",
            help="Training runs, folders with results/*.json, or folders of these.",
        ),
    ],
    output: Annotated[
        Path,
        typer.Option(
            "--out", parser=local_path, metavar="FOLDER", help="Folder for index.html, which holds everything."
        ),
    ] = Path("report"),
    shards: Annotated[
        Path | None,
        typer.Option(
            parser=path_or_url, metavar="SHARDS", help="Images of the gallery; default: those of the first evaluation."
        ),
    ] = None,
    maps: Maps = None,
    gallery: Annotated[int, typer.Option(min=0, help="Number of images in the gallery; 0 for none.")] = 200,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the choice of images in the gallery.")] = 0,
    precision: Precision = "float32",
    batch_size: BatchSize = 64,
    device: Device = "auto",
) -> None:
    """Write one HTML page about runs: accuracy against cost, tables with intervals, training curves, and a gallery.

    The page needs no network and no other file. Where a run lacks results, it names the command that makes them.
    """
    with reporting() as progress:
        from zpipe.train.report import ReportConfig, report

        config = ReportConfig(
            shards=shards,
            maps=maps,
            gallery=gallery,
            seed=seed,
            precision=precision,
            batch_size=batch_size,
            device=device,
        )
        path = report(runs, output, config, progress=progress)
    tell(f"written to {path} ({path.stat().st_size / 1e6:.1f} MB); open it in a browser")
