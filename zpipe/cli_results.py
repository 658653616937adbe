"""The verbs that measure and show what a trained model can do."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from zpipe.cli_options import (
    Address,
    BatchSize,
    Device,
    LoadingProcesses,
    Scores,
    ScoresOfImages,
    Shards,
    Weights,
)
from zpipe.console import local_path, parse_budgets, parse_numbers, path_or_url, print_rows, reporting, tell, warn
from zpipe.schemas.errors import UsageError

_HIDDEN = ("scores", "alpha", "budget", "keep", "prune", "exit", "merge", "token_histogram")
_HIDDEN += ("images_per_s_low", "images_per_s_high", "parameters", "precision")


def _main_columns(row: dict[str, Any]) -> dict[str, Any]:
    """Those of an evaluation that a table has room for; the file has all."""
    hidden = _HIDDEN if row.get("exited") is not None else (*_HIDDEN, "exited")
    return {name: value for name, value in row.items() if name not in hidden}


def _tables(rows: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Those of zoomers and those of ViTs apart, for they have few figures in common, and neither with columns that are empty."""
    found = []
    for has_top1 in (False, True):
        chosen = [row for row in rows if (row.get("top1") is not None) == has_top1]
        filled = {name for row in chosen for name, value in row.items() if value is not None}
        if chosen:
            found.append([{name: value for name, value in row.items() if name in filled} for row in chosen])
    return found


def evaluate_command(
    run: Annotated[
        Path, typer.Argument(parser=local_path, metavar="RUN", help="Finished train-vit or train-zoomer run.")
    ],
    shards: Shards,
    alphas: Annotated[
        str | None, typer.Option(help="Thresholds of a ZoomViT, comma-separated. Default 0,0.05,0.1,0.2,0.5,1.")
    ] = None,
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
            help="Which tokens --keep drops: backward (the lowest-ranked) or forward (the highest), or either with -zoomed or -rest."
        ),
    ] = "backward",
    exits: Annotated[
        str, typer.Option(help="Thresholds of early exit of a cfvit_* or lfvit_*. Default 0,0.3,0.5,0.7,0.9,1.")
    ] = "",
    merge: Annotated[str, typer.Option(help="Tokens that a tome_vit merges in each block, comma-separated.")] = "",
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
    classes: Annotated[
        str | None,
        typer.Option(
            metavar="by-name|FILE",
            help="For shards with a part of the model's classes (ImageNet-A): which class each label is; the others don't count as answers.",
        ),
    ] = None,
    labels: Annotated[
        Path | None,
        typer.Option(
            parser=local_path,
            metavar="FILE",
            help="JSON file with the right classes of each key, possibly several (ImageNet-ReaL's real.json).",
        ),
    ] = None,
    weights: Weights = "final",
    precision: Annotated[str, typer.Option(help="float32, or under autocast bf16 or fp16.")] = "float32",
    batch_size: BatchSize = 128,
    data_workers: LoadingProcesses = 0,
    device: Device = "auto",
    json_path: Annotated[
        Path | None,
        typer.Option(
            "--json",
            parser=path_or_url,
            metavar="PATH|URL",
            help="Results file; default evaluation.json in the run, or evaluation-best.json and the like for other weights or precision.",
        ),
    ] = None,
    study: Annotated[
        str | None,
        typer.Option(
            help="Instead of evaluating, run a study, one of the paper's experiments around this run: alpha-eta, pruning, zfe, zoom-in-training, "
            "zoomer-depth, score-sources, test-time-zoom, nine-crops, backbone-size, selection or errors."
        ),
    ] = None,
    seeds: Annotated[str, typer.Option(help="(with --study) Seeds of what it trains, comma-separated.")] = "",
    epochs: Annotated[
        float | None, typer.Option(help="(with --study) Epochs of what it trains; default: those of the run.")
    ] = None,
    zoomer: Annotated[
        Path | None,
        typer.Option(
            parser=local_path,
            metavar="RUN",
            help="(with --study test-time-zoom) Train-zoomer run whose scores decide where to zoom.",
        ),
    ] = None,
    num_workers: Annotated[
        int, typer.Option(min=0, help="(with --study) Training processes, as of train-vit; they share the run's batch.")
    ] = 1,
    address: Address = None,
) -> None:
    """Measure top-1, mean tokens, GMACs and images/s of a ViT, for each alpha; or a zoomer's distance to its teacher.

    With --study, run a whole experiment: the models it compares are trained under the run's own settings into RUN/studies, and its
    figures go to RUN/results/STUDY.json and .parquet.
    """
    with reporting() as progress:
        from zpipe.train.evaluation.evaluate import evaluate
        from zpipe.train.evaluation.operating_points import EvalConfig
        from zpipe.train.evaluation.results import wide
        from zpipe.train.fit.distributed import Workers
        from zpipe.train.studies.bench import STUDIES, StudyConfig, run_study

        config = EvalConfig(
            alphas=parse_numbers(alphas or "", float, "--alphas"),
            budgets=parse_budgets(budgets),
            keeps=parse_numbers(keep, int, "--keep"),
            prune=prune,
            exits=parse_numbers(exits, float, "--exits"),
            merges=parse_numbers(merge, int, "--merge"),
            target_gmacs=target_gmacs,
            calibration=calibration,
            calibration_maps=calibration_maps,
            scores=scores,
            classes=classes,
            labels=labels,
            weights=weights,
            precision=precision,
            batch_size=batch_size,
            data_workers=data_workers,
            device=device,
        )
        if study is not None:
            told = (("--scores", scores), ("--weights", weights if weights != "final" else None))
            if chosen := [name for name, value in (*told, ("--json", json_path), ("--keep", keep)) if value]:
                raise UsageError(f"{chosen[0]}: a study chooses it itself")
            workers = Workers(count=num_workers, address=address)
            trained = parse_numbers(seeds, int, "--seeds")
            wanted = StudyConfig(evaluation=config, seeds=trained, epochs=epochs, workers=workers)
            path, rows, notes = run_study(
                study, run, shards, wanted, maps=maps, zoomer=zoomer, progress=progress, say=warn
            )
        else:
            of_studies = (("--seeds", seeds), ("--epochs", epochs), ("--zoomer", zoomer), ("--address", address))
            if chosen := [name for name, value in of_studies if value] + ["--num-workers"] * (num_workers != 1):
                raise UsageError(f"{chosen[0]}: goes with --study alone; leave it out")
            unusual = [value for value, usual in ((weights, "final"), (precision, "float32")) if value != usual]
            target = json_path or run / f"{'-'.join(['evaluation', *unusual])}.json"
            config = config if alphas is not None else replace(config, alphas=EvalConfig.alphas)
            result = evaluate(run, shards, config, maps=maps, out=target, progress=progress)
    if study is not None:
        for table in _tables(wide(rows)):
            print_rows(table, title=STUDIES[study].title)
        for note in notes:
            tell(f"note: {note}")
        tell(f"written to {path} and {path.with_suffix('.parquet').name}")
        return
    print_rows([_main_columns(row) for row in result["rows"]], title=str(run))
    tell(f"written to {target}")


def predict_command(
    images: Annotated[list[Path], typer.Argument(parser=local_path, metavar="IMAGES", help="JPEG, PNG or WEBP files.")],
    checkpoint: Annotated[
        Path, typer.Option(parser=local_path, metavar="RUN", help="Finished train-vit run; its zoomer is in it.")
    ],
    alpha: Annotated[
        float | None, typer.Option(help="Threshold of a model that zooms; default 0.1, unless --budget is given.")
    ] = None,
    budget: Annotated[
        str | None, typer.Option(help="Instead of --alpha: zoomed cells per image, '300 tokens' or '2.3 GMACs'.")
    ] = None,
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
    device: Device = "auto",
) -> None:
    """Print the most probable classes of image files, and draw what a ZoomViT looked at."""
    with reporting() as progress:
        from zpipe.schemas.atomic import write_json
        from zpipe.train.evaluation.predict import PredictConfig, predict

        budgets = parse_budgets(budget or "")
        if len(budgets) > 1:
            raise UsageError(f"--budget {budget}: give one budget")
        config = PredictConfig(
            alpha=alpha, budget=budgets[0] if budgets else None, scores=scores, weights=weights, top=top, device=device
        )
        rows = predict(checkpoint, images, config, out=output, progress=progress)
        if json_path is not None:
            write_json(json_path, rows)
    for row in rows:
        told = [f"{found['name'] or found['index']} {found['probability']:.1%}" for found in row["classes"]]
        tokens = "" if row["tokens"] is None else f" ({row['tokens']} tokens)"
        tell(f"{row['file']}: {', '.join(told)}{tokens}")


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
    batch_size: BatchSize = 128,
    data_workers: LoadingProcesses = 0,
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
        from zpipe.train.evaluation.calibrate import CalibrationConfig, calibrate

        config = CalibrationConfig(
            budget=budget,
            scores=scores,
            weights=weights,
            limit=limit,
            batch_size=batch_size,
            data_workers=data_workers,
            device=device,
        )
        target = json_path or run / "calibration.json"
        found = calibrate(run, shards, config, maps=maps, out=target, progress=progress)
    name = next(name for name in ("alpha", "exit_threshold") if name in found)
    unit = found["unit"]
    tell(
        f"{name} {found[name]!r}: {found['mean']:.4g} {unit} per image, standard deviation {found['std']:.3g}, "
        f"over {found['images']:,} images"
    )
    tell(f"written to {target}")


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
    maps: Annotated[
        Path | None, typer.Option(parser=path_or_url, metavar="PATH|URL", help="Relevance store of these shards.")
    ] = None,
    gallery: Annotated[int, typer.Option(min=0, help="Number of images in the gallery; 0 for none.")] = 200,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the choice of images in the gallery.")] = 0,
    batch_size: BatchSize = 64,
    device: Device = "auto",
) -> None:
    """Write one HTML page about runs: accuracy against cost, tables with intervals, training curves, and a gallery of images.

    The page needs no network and no other file. Where a run lacks results, it names the command that makes them.
    """
    with reporting() as progress:
        from zpipe.train.report import ReportConfig, report

        config = ReportConfig(
            shards=shards, maps=maps, gallery=gallery, seed=seed, batch_size=batch_size, device=device
        )
        path = report(runs, output, config, progress=progress)
    tell(f"written to {path} ({path.stat().st_size / 1e6:.1f} MB); open it in a browser")
