"""The verbs that tell what a trained model is worth."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from zpipe.cli_options import BatchSize, Device, LoadingProcesses, Scores, Shards
from zpipe.console import local_path, parse_budgets, parse_numbers, path_or_url, print_rows, reporting, tell
from zpipe.schemas.errors import UsageError

_HIDDEN = ("scores", "alpha", "budget", "keep", "prune", "exit", "merge", "token_histogram")
_HIDDEN += ("images_per_s_low", "images_per_s_high", "parameters")


def _main_columns(row: dict[str, Any]) -> dict[str, Any]:
    """Those of an evaluation that a table has room for; the file has all."""
    hidden = _HIDDEN if row.get("exited") is not None else (*_HIDDEN, "exited")
    return {name: value for name, value in row.items() if name not in hidden}


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
            help="Beside the thresholds: zoomed cells per image, or '300 tokens' or '2.3 GMACs', comma-separated."
        ),
    ] = "",
    keep: Annotated[str, typer.Option(help="Each of these also pruned to so many tokens, comma-separated.")] = "",
    prune: Annotated[
        str,
        typer.Option(help="Which tokens --keep takes: backward or forward, or either of them with -zoomed or -rest."),
    ] = "backward",
    exits: Annotated[
        str, typer.Option(help="Thresholds of early exit of a cfvit_* or lfvit_*. Default 0,0.3,0.5,0.7,0.9,1.")
    ] = "",
    merge: Annotated[str, typer.Option(help="Tokens that a tome_vit merges in each block, comma-separated.")] = "",
    target_gmacs: Annotated[
        float | None,
        typer.Option(help="Instead of --alphas or --exits: the threshold at which an image costs this on average."),
    ] = None,
    calibration: Annotated[
        Path | None,
        typer.Option(
            parser=path_or_url, metavar="SHARDS", help="Images to choose that threshold by; not the ones judged."
        ),
    ] = None,
    calibration_maps: Annotated[
        Path | None, typer.Option(parser=path_or_url, metavar="PATH|URL", help="Their maps, where maps are the scores.")
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
            help="The model's class for each label of shards that know fewer (ImageNet-A); the others are no answers.",
        ),
    ] = None,
    labels: Annotated[
        Path | None,
        typer.Option(
            parser=local_path,
            metavar="FILE",
            help="JSON of right classes by key, several for an image (ImageNet-ReaL's real.json).",
        ),
    ] = None,
    batch_size: BatchSize = 128,
    data_workers: LoadingProcesses = 0,
    device: Device = "auto",
    json_path: Annotated[
        Path | None,
        typer.Option(
            "--json", parser=path_or_url, metavar="PATH|URL", help="Results file; default evaluation.json in the run."
        ),
    ] = None,
    study: Annotated[
        str | None,
        typer.Option(
            help="Instead, one of the paper's experiments around this run: alpha-eta, pruning, zfe, zoom-in-training, "
            "zoomer-depth, score-sources, test-time-zoom, nine-crops, backbone-size, selection or errors."
        ),
    ] = None,
    seeds: Annotated[str, typer.Option(help="Of a study: seeds of what it trains, comma-separated.")] = "",
    epochs: Annotated[
        float | None, typer.Option(help="Of a study: epochs of what it trains; default the run's.")
    ] = None,
    zoomer: Annotated[
        Path | None,
        typer.Option(parser=local_path, metavar="RUN", help="Of test-time-zoom: the train-zoomer run to zoom by."),
    ] = None,
) -> None:
    """Top-1, mean tokens, GMACs and images/s of a ViT, for each alpha; or a zoomer's distance to its teacher.

    With --study a whole experiment: what it compares is trained under the run's own settings, into RUN/studies, and its
    figures go to RUN/results/STUDY.json and .parquet.
    """
    with reporting() as progress:
        from zpipe.train.evaluate import EvalConfig, evaluate
        from zpipe.train.results import wide
        from zpipe.train.studies import STUDIES, StudyConfig, run_study

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
            batch_size=batch_size,
            data_workers=data_workers,
            device=device,
        )
        if study is not None:
            if chosen := [
                name for name, value in (("--scores", scores), ("--json", json_path), ("--keep", keep)) if value
            ]:
                raise UsageError(f"{chosen[0]}: a study chooses it itself")
            wanted = StudyConfig(evaluation=config, seeds=parse_numbers(seeds, int, "--seeds"), epochs=epochs)
            path, rows, notes = run_study(study, run, shards, wanted, maps=maps, zoomer=zoomer, progress=progress)
        else:
            target = json_path or run / "evaluation.json"
            config = config if alphas is not None else replace(config, alphas=EvalConfig.alphas)
            result = evaluate(run, shards, config, maps=maps, out=target, progress=progress)
    if study is not None:
        print_rows(wide(rows), title=STUDIES[study].title)
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
        float | None, typer.Option(help="Threshold of a zooming model; 0.1 unless a budget is given.")
    ] = None,
    budget: Annotated[str | None, typer.Option(help="Instead: zoomed cells, '300 tokens' or '2.3 GMACs'.")] = None,
    scores: Scores = None,
    top: Annotated[int, typer.Option(min=1, help="Classes told.")] = 5,
    output: Annotated[
        Path | None,
        typer.Option(
            "--out",
            parser=local_path,
            metavar="FOLDER",
            help="Folder for a PNG an image: scores and patches laid over it.",
        ),
    ] = None,
    json_path: Annotated[
        Path | None,
        typer.Option("--json", parser=path_or_url, metavar="PATH|URL", help="Write the predictions to this file too."),
    ] = None,
    device: Device = "auto",
) -> None:
    """The most probable classes of image files, and pictures of what a ZoomViT looked at."""
    with reporting() as progress:
        from zpipe.schemas.atomic import write_json
        from zpipe.train.predict import PredictConfig, predict

        budgets = parse_budgets(budget or "")
        if len(budgets) > 1:
            raise UsageError(f"--budget {budget}: give one budget")
        config = PredictConfig(
            alpha=alpha, budget=budgets[0] if budgets else None, scores=scores, top=top, device=device
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
    budget: Annotated[str, typer.Option(help="Mean cost of an image: '2.3 GMACs', '300 tokens', or zoomed cells.")],
    scores: Scores = None,
    maps: Annotated[
        Path | None,
        typer.Option(parser=path_or_url, metavar="PATH|URL", help="Relevance store, for --scores maps."),
    ] = None,
    limit: Annotated[int, typer.Option(min=1, help="Images looked at.")] = 50_000,
    batch_size: BatchSize = 128,
    data_workers: LoadingProcesses = 0,
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
        from zpipe.train.calibrate import CalibrationConfig, calibrate

        config = CalibrationConfig(
            budget=budget, scores=scores, limit=limit, batch_size=batch_size, data_workers=data_workers, device=device
        )
        target = json_path or run / "calibration.json"
        found = calibrate(run, shards, config, maps=maps, out=target, progress=progress)
    name = next(name for name in ("alpha", "exit_threshold") if name in found)
    unit = found["unit"]
    tell(
        f"{name} {found[name]!r}: {found['mean']:.4g} {unit} an image, standard deviation {found['std']:.3g}, "
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
            "--out", parser=local_path, metavar="FOLDER", help="Folder for index.html, one file that holds everything."
        ),
    ] = Path("report"),
    shards: Annotated[
        Path | None,
        typer.Option(
            parser=path_or_url, metavar="SHARDS", help="Images of the gallery; default those of the first evaluation."
        ),
    ] = None,
    maps: Annotated[
        Path | None, typer.Option(parser=path_or_url, metavar="PATH|URL", help="Relevance store of these shards.")
    ] = None,
    gallery: Annotated[int, typer.Option(min=0, help="Entries of the gallery; 0 for none.")] = 200,
    seed: Annotated[int, typer.Option(min=0, help="Seed of which images the gallery shows.")] = 0,
    batch_size: BatchSize = 64,
    device: Device = "auto",
) -> None:
    """One HTML page about runs: accuracy against cost, tables with intervals, training curves, and a gallery of images.

    It needs no network and no other file. What runs lack, it leaves out, and says which command gives it.
    """
    with reporting() as progress:
        from zpipe.train.report import ReportConfig, report

        config = ReportConfig(
            shards=shards, maps=maps, gallery=gallery, seed=seed, batch_size=batch_size, device=device
        )
        path = report(runs, output, config, progress=progress)
    tell(f"written to {path} ({path.stat().st_size / 1e6:.1f} MB); open it in a browser")
