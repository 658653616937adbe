"""The command line: one verb per stage. Each parses, calls one function, and prints what came of it."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from zpipe.cli_maps import maps_app
from zpipe.console import (
    count_or_auto,
    fail,
    out,
    parse_budgets,
    parse_numbers,
    parse_settings,
    path_or_url,
    print_rows,
    reporting,
    tell,
    warn,
)
from zpipe.schemas.errors import UsageError, ZpipeError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Relevance maps of a frozen ViT teacher at data-set scale, and ViTs that zoom where the class is decided. Try `zpipe demo`.",
)
app.add_typer(maps_app, name="maps")

Sets = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Any other setting, dotted where nested: train.opt=muon, view.flip=0. Repeatable.",
    ),
]
ModelArgs = Annotated[
    list[str] | None,
    typer.Option(
        "--model-arg",
        metavar="KEY=VALUE",
        help="Argument of the model's constructor: patch_size=8, depth=6. Repeatable.",
    ),
]

NumWorkers = Annotated[
    int,
    typer.Option(
        min=0, help="Training processes, one for each GPU, on Ray when more than one; they share the batch evenly."
    ),
]
Address = Annotated[str | None, typer.Option(help="Address of a Ray cluster; default RAY_ADDRESS, else this machine.")]
Resume = Annotated[
    str, typer.Option(help="What becomes of a run that is in the folder already: auto (go on with it) or never.")
]


@app.command("make-shards")
def make_shards_command(
    source: Annotated[
        str,
        typer.Argument(
            help="Folder of images (a sub-folder a class, or a labels.csv); cifar10:PATH (cifar-10-binary.tar.gz or its folder); flowers102:FOLDER (with 102flowers.tgz or jpg/, imagelabels.mat, setid.mat); or 'scenes', the embedded data."
        ),
    ],
    output: Annotated[Path | None, typer.Argument(help="Folder for the tars and their index; new or empty.")] = None,
    shard_size: Annotated[int, typer.Option(min=1, help="Images per tar at most.")] = 1000,
    keys: Annotated[
        str, typer.Option(help="Key of an image: 'stem' (file name) or 'path' (with its folders).")
    ] = "stem",
    seed: Annotated[int, typer.Option(help="Seed of the order of images, and of scenes.")] = 0,
    no_shuffle: Annotated[bool, typer.Option("--no-shuffle", help="Keep the order of folders and files.")] = False,
    count: Annotated[int, typer.Option(help="Scenes to make.")] = 10000,
    split: Annotated[
        str,
        typer.Option(help="Of scenes and cifar10: train or val; of flowers102: train, val, test or trainval."),
    ] = "train",
    image_size: Annotated[int | None, typer.Option(help="Pixels a side of a scene.")] = None,
    settings: Sets = None,
    index_only: Annotated[
        bool, typer.Option("--index-only", help="SOURCE holds tars already: only write their shards.json.")
    ] = False,
) -> None:
    """Images into WebDataset tars: key.jpg (original bytes), key.cls, key.json, and a shards.json.

    Images that can't be decoded are listed in quarantine.csv; the rest is written, and the exit code is 1.
    """
    with reporting() as progress:
        from zpipe.pipeline.datasets import DATASETS
        from zpipe.pipeline.make_shards import FolderSource, SceneSource, index_shards, make_shards, scene_config

        if index_only:
            index = index_shards(Path(source), progress=progress)
            tell(f"{source}: {index.count} images in {len(index.shards)} shards indexed")
            return
        if output is None:
            raise UsageError("give an output folder: zpipe make-shards SOURCE OUTPUT")
        if keys not in ("stem", "path"):
            raise UsageError(f"--keys {keys}: choose stem or path")
        if source == "scenes":
            config = scene_config(image_size, parse_settings(settings, "--set"))
            chosen = SceneSource(count=count, split=split, seed=seed, config=config, shard_size=shard_size)
        else:
            if settings or image_size:
                raise UsageError("--image-size and --set belong to the embedded scenes; other sources have neither")
            order = {"shard_size": shard_size, "shuffle_seed": None if no_shuffle else seed}
            name, colon, path = source.partition(":")
            if colon and name in DATASETS:
                if keys != "stem":
                    raise UsageError(f"--keys belongs to image folders; {name} has keys of its own")
                # No shell expands a ~ behind a colon.
                chosen = DATASETS[name](Path(path).expanduser(), split=split, **order)
                if chosen.warning:
                    warn(f"warning: {chosen.warning}")
            else:
                chosen = FolderSource(Path(source), key_rule=keys, **order)
        report = make_shards(chosen, output, progress=progress)
        tell(f"{output}: {report.count} images in {report.shards} shards ({report.written} written now)")
        if report.quarantined:
            raise ZpipeError(
                f"{output / 'quarantine.csv'}: {len(report.quarantined)} unreadable images were put aside; mend or remove them, then make the shards in a new folder",
                [f"{item.file}: {item.reason}" for item in report.quarantined[:20]],
            )


@app.command("extract-teacher-maps")
def extract_command(
    shards: Annotated[
        Path, typer.Argument(parser=path_or_url, metavar="SHARDS", help="Folder or URL of tar shards, or one tar.")
    ],
    output: Annotated[
        Path,
        typer.Option(
            "--out",
            parser=path_or_url,
            metavar="PATH|URL",
            help="Folder of the relevance store; new, empty, or one to go on with.",
        ),
    ],
    teacher: Annotated[
        str | None, typer.Option(help="timm model; default deit_base_patch16_224, or what the weights folder says.")
    ] = None,
    weights: Annotated[
        str, typer.Option(help="Weights file, folder of a finished train-vit run, 'pretrained', or 'random'.")
    ] = "pretrained",
    num_classes: Annotated[
        int | None, typer.Option(help="Classes of the teacher, where neither weights nor model tell.")
    ] = None,
    model_arg: ModelArgs = None,
    seed: Annotated[int, typer.Option(help="Seed of random weights.")] = 0,
    method: Annotated[
        str, typer.Option(help="transformer-attribution, gradient-attention, rollout or class-attention.")
    ] = "transformer-attribution",
    target: Annotated[
        str, typer.Option(help="Class that a map explains: ground-truth, predicted, or class:K.")
    ] = "ground-truth",
    frame: Annotated[
        str, typer.Option(help="'full' (the whole image, for training) or 'center' (the teacher's evaluation view).")
    ] = "full",
    symmetrise: Annotated[
        bool, typer.Option("--symmetrise", help="Mean with the mirrored image's map; twice the price.")
    ] = False,
    precision: Annotated[
        str,
        typer.Option(
            help="float32, float64, or FORWARD+SWEEP: float64+float32 (all but exact), float64+bfloat16, float32+bfloat16, float32+tf32."
        ),
    ] = "float32",
    executor: Annotated[
        str, typer.Option(help="'ray' (local when no cluster is given) or 'local' (this process).")
    ] = "ray",
    address: Annotated[
        str | None, typer.Option(help="Address of a Ray cluster; default RAY_ADDRESS, else this machine.")
    ] = None,
    actors: Annotated[int, typer.Option(min=0, help="Worker processes; 0 chooses.")] = 0,
    threads: Annotated[int, typer.Option(min=0, help="CPU threads of each worker; 0 chooses.")] = 0,
    gpus_per_actor: Annotated[float, typer.Option(min=0, help="GPUs of each worker; 0 chooses.")] = 0.0,
    batch_size: Annotated[
        int,
        typer.Option(
            parser=count_or_auto,
            metavar="N|auto",
            help="Images at once; auto: 8 on CPU, 64 on GPU, fewer where memory ends.",
        ),
    ] = "auto",  # type: ignore[assignment]
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    replace: Annotated[bool, typer.Option("--replace", help="Remove what the store holds and start over.")] = False,
) -> None:
    """Run a frozen teacher over tar shards and store its relevance maps for each image's own label.

    One tar gives one map shard. Shards that are done are kept, so the same command goes on after an interruption.
    """
    with reporting() as progress:
        from zpipe.pipeline.explainer import ExplainConfig
        from zpipe.pipeline.extract import ExtractConfig, extract_teacher_maps

        if executor not in ("ray", "local"):
            raise UsageError(f"--executor {executor}: choose ray or local")
        if weights == "random":
            print(
                "warning: random weights were asked for: these maps mean nothing; the manifest says so", file=sys.stderr
            )
        config = ExtractConfig(
            teacher=teacher,
            weights=weights,
            num_classes=num_classes,
            teacher_args=parse_settings(model_arg, "--model-arg"),
            seed=seed,
            explain=ExplainConfig(method=method, target=target, symmetrise=symmetrise, precision=precision),
            frame=frame,
            executor=executor,
            batch_size=batch_size,
            actors=actors,
            threads=threads,
            gpus_per_actor=gpus_per_actor,
            address=address,
            device=device,
            replace=replace,
        )
        report = extract_teacher_maps(shards, output, config, progress=progress)
        tell(f"{output}: {report.count} maps in {report.shards} shards ({report.extracted} extracted now)")
        for note in report.notes:
            print(f"note: {note}", file=sys.stderr)
        if report.problems:
            raise ZpipeError(
                f"{output}: {len(report.problems)} images have no usable map; the store is whole and says which",
                report.problems[:20],
            )


def _given(flags: dict[str, Any]) -> dict[str, Any]:
    """Those that were given; the others are a recipe's to say."""
    return {name: value for name, value in flags.items() if value is not None}


@app.command("train-zoomer")
def train_zoomer_command(
    shards: Annotated[Path, typer.Argument(parser=path_or_url, metavar="SHARDS", help="Folder or URL of tar shards.")],
    maps: Annotated[
        Path, typer.Option(parser=path_or_url, metavar="PATH|URL", help="Relevance store made from these shards.")
    ],
    output: Annotated[Path, typer.Option("--out", help="Folder of the run; new, empty, or one to go on with.")],
    num_blocks: Annotated[int, typer.Option(help="Residual blocks: 2, 4 or 6.")] = 4,
    image_size: Annotated[int, typer.Option(help="Pixels a side.")] = 224,
    recipe_name: Annotated[str | None, typer.Option("--recipe", help="zoomer (default) or zoomer-small.")] = None,
    epochs: Annotated[float | None, typer.Option(help="Epochs; fractions are allowed. Default 100.")] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Images a step, those of all training processes together. Default 128.")
    ] = None,
    lr: Annotated[float | None, typer.Option(help="Highest learning rate. Default 0.01.")] = None,
    data_workers: Annotated[int, typer.Option(min=0, help="Data-loading processes of each training process.")] = 1,
    num_workers: NumWorkers = 1,
    address: Address = None,
    resume: Resume = "auto",
    missing: Annotated[str, typer.Option(help="Samples without a usable map: error, skip or uniform.")] = "error",
    seed: Annotated[int, typer.Option(min=0, help="Seed of all that is drawn at random.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    settings: Sets = None,
) -> None:
    """Stage 1: teach a small convolutional Zoomer to predict the teacher's maps from the image alone."""
    with reporting() as progress:
        from zpipe.train.distributed import Workers, run_training
        from zpipe.train.recipes import ZOOMER_RECIPES, recipe
        from zpipe.train.settings import with_settings
        from zpipe.train.train_zoomer import ZoomerConfig, train_zoomer

        flags = {"num_blocks": num_blocks, "image_size": image_size, "missing": missing}
        flags |= {"train.data_workers": data_workers, "train.seed": seed, "train.device": device}
        flags |= _given({"train.epochs": epochs, "train.batch_size": batch_size, "train.lr": lr})
        config = with_settings(
            recipe(recipe_name, ZOOMER_RECIPES, ZoomerConfig()), flags | parse_settings(settings, "--set")
        )
        places = {"shards": shards, "maps": maps, "out": output}
        workers = Workers(count=num_workers, address=address)
        run_training(train_zoomer, places, config, workers, resume=resume, progress=progress, say=warn)
        tell(f"{output}: zoomer ready; measure it with: zpipe evaluate {output} VAL_SHARDS --maps VAL_MAPS")


@app.command("train-vit")
def train_vit_command(
    shards: Annotated[Path, typer.Argument(parser=path_or_url, metavar="SHARDS", help="Folder or URL of tar shards.")],
    output: Annotated[Path, typer.Option("--out", help="Folder of the run; new, empty, or one to go on with.")],
    model: Annotated[
        str,
        typer.Option(
            help="zoomvit_{tiny,small,base}_patch16_224, cfvit_small, lfvit_small, sparseformer_tiny, token_pruned_vit, "
            "tome_vit, image_zoom, or any timm classifier."
        ),
    ] = "zoomvit_small_patch16_224",
    model_arg: ModelArgs = None,
    zoomer: Annotated[Path | None, typer.Option(help="Finished train-zoomer run that scores the image.")] = None,
    maps: Annotated[
        Path | None,
        typer.Option(
            parser=path_or_url,
            metavar="PATH|URL",
            help="Relevance store whose maps are the scores, instead of a zoomer.",
        ),
    ] = None,
    scores: Annotated[
        str | None,
        typer.Option(
            help="Source of the scores: zoomer, maps, attention, entropy, centre, random, own or none; default the one given."
        ),
    ] = None,
    init_from: Annotated[
        str | None,
        typer.Option(help="Run, checkpoint file or timm:NAME to start from (a plain ViT may start a ZoomViT)."),
    ] = None,
    num_classes: Annotated[int | None, typer.Option(help="Classes; default those that the shards name.")] = None,
    image_size: Annotated[int | None, typer.Option(help="Pixels a side. Default 224.")] = None,
    recipe_name: Annotated[
        str | None,
        typer.Option(
            "--recipe",
            help="deit, deit3, finetune, cifar10 or flowers102, or their small twins such as deit-small; none by default.",
        ),
    ] = None,
    val: Annotated[
        Path | None,
        typer.Option(
            parser=path_or_url, metavar="SHARDS", help="Validate on these shards after every epoch; keep the best."
        ),
    ] = None,
    val_maps: Annotated[
        Path | None, typer.Option(parser=path_or_url, metavar="PATH|URL", help="Their maps, where maps are the scores.")
    ] = None,
    epochs: Annotated[float | None, typer.Option(help="Epochs; fractions are allowed. Default 300.")] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Images a step, those of all training processes together. Default 128.")
    ] = None,
    lr: Annotated[float | None, typer.Option(help="Highest learning rate. Default 0.001.")] = None,
    data_workers: Annotated[int, typer.Option(min=0, help="Data-loading processes of each training process.")] = 1,
    num_workers: NumWorkers = 1,
    address: Address = None,
    resume: Resume = "auto",
    missing: Annotated[str, typer.Option(help="Samples without a usable map: error, skip or uniform.")] = "error",
    seed: Annotated[int, typer.Option(min=0, help="Seed of all that is drawn at random.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    settings: Sets = None,
) -> None:
    """Stage 2: train a ZoomViT under a frozen zoomer (or cached maps), or a plain timm ViT without zoom."""
    with reporting() as progress:
        from zpipe.train.distributed import Workers, run_training
        from zpipe.train.recipes import VIT_RECIPES, recipe
        from zpipe.train.settings import with_settings
        from zpipe.train.train_vit import VitConfig, train_vit

        base = recipe(recipe_name, VIT_RECIPES, VitConfig())
        model_args = base.model_args | parse_settings(model_arg, "--model-arg")
        flags = {"model": model, "model_args": model_args, "num_classes": num_classes}
        flags |= {"missing": missing, "init_from": init_from, "scores": scores}
        flags |= {"train.data_workers": data_workers, "train.seed": seed, "train.device": device}
        flags |= _given({"train.epochs": epochs, "train.batch_size": batch_size, "train.lr": lr})
        flags |= _given({"image_size": image_size})
        config = with_settings(base, flags | parse_settings(settings, "--set"))
        places = {"shards": shards, "out": output, "zoomer": zoomer, "maps": maps, "val": val, "val_maps": val_maps}
        workers = Workers(count=num_workers, address=address)
        run_training(train_vit, places, config, workers, resume=resume, progress=progress, say=warn)
        tell(f"{output}: model ready; measure it with: zpipe evaluate {output} VAL_SHARDS")


_HIDDEN = ("scores", "alpha", "budget", "keep", "prune", "exit", "merge", "token_histogram")
_HIDDEN += ("images_per_s_low", "images_per_s_high", "parameters")


def _main_columns(row: dict[str, Any]) -> dict[str, Any]:
    """Those of an evaluation that a table has room for; the file has all."""
    hidden = _HIDDEN if row.get("exited") is not None else (*_HIDDEN, "exited")
    return {name: value for name, value in row.items() if name not in hidden}


@app.command("evaluate")
def evaluate_command(
    run: Annotated[Path, typer.Argument(help="Finished train-vit or train-zoomer run.")],
    shards: Annotated[
        Path, typer.Argument(parser=path_or_url, metavar="SHARDS", help="Folder or URL of validation shards.")
    ],
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
    scores: Annotated[
        str | None,
        typer.Option(
            help="Source of the scores: zoomer, maps, attention, entropy, centre, random, own or none; default as trained."
        ),
    ] = None,
    classes: Annotated[
        str | None,
        typer.Option(
            metavar="by-name|FILE",
            help="The model's class for each label of shards that know fewer (ImageNet-A); the others are no answers.",
        ),
    ] = None,
    labels: Annotated[
        Path | None,
        typer.Option(help="JSON of right classes by key, several for an image (ImageNet-ReaL's real.json)."),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images at once.")] = 128,
    data_workers: Annotated[int, typer.Option(min=0, help="Data-loading processes.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    json_path: Annotated[
        Path | None, typer.Option("--json", help="Results file; default evaluation.json in the run.")
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
    zoomer: Annotated[Path | None, typer.Option(help="Of test-time-zoom: the train-zoomer run to zoom by.")] = None,
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


@app.command("predict")
def predict_command(
    images: Annotated[list[Path], typer.Argument(help="JPEG, PNG or WEBP files.")],
    checkpoint: Annotated[Path, typer.Option(help="Finished train-vit run; its zoomer is in it.")],
    alpha: Annotated[
        float | None, typer.Option(help="Threshold of a zooming model; 0.1 unless a budget is given.")
    ] = None,
    budget: Annotated[str | None, typer.Option(help="Instead: zoomed cells, '300 tokens' or '2.3 GMACs'.")] = None,
    scores: Annotated[
        str | None, typer.Option(help="Source of the scores, as of evaluate; default as trained.")
    ] = None,
    top: Annotated[int, typer.Option(min=1, help="Classes told.")] = 5,
    output: Annotated[
        Path | None, typer.Option("--out", help="Folder for a PNG an image: scores and patches laid over it.")
    ] = None,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the predictions to this file too.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
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


@app.command("calibrate")
def calibrate_command(
    run: Annotated[Path, typer.Argument(help="Finished train-vit run of a zoomvit_*, cfvit_* or lfvit_* model.")],
    shards: Annotated[Path, typer.Argument(parser=path_or_url, metavar="SHARDS", help="Folder or URL of shards.")],
    budget: Annotated[str, typer.Option(help="Mean cost of an image: '2.3 GMACs', '300 tokens', or zoomed cells.")],
    scores: Annotated[
        str | None, typer.Option(help="Source of the scores, as of evaluate; default as trained.")
    ] = None,
    maps: Annotated[
        Path | None,
        typer.Option(parser=path_or_url, metavar="PATH|URL", help="Relevance store, for --scores maps."),
    ] = None,
    limit: Annotated[int, typer.Option(min=1, help="Images looked at.")] = 50_000,
    batch_size: Annotated[int, typer.Option(min=1, help="Images at once.")] = 128,
    data_workers: Annotated[int, typer.Option(min=0, help="Data-loading processes.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    json_path: Annotated[
        Path | None, typer.Option("--json", help="Results file; default calibration.json in the run.")
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


@app.command("report")
def report_command(
    runs: Annotated[
        list[Path], typer.Argument(help="Training runs, folders with results/*.json, or folders of these.")
    ],
    output: Annotated[
        Path, typer.Option("--out", help="Folder for index.html, one file that holds everything.")
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
    batch_size: Annotated[int, typer.Option(min=1, help="Images at once.")] = 64,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
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


@app.command("demo")
def demo_command(
    output: Annotated[
        Path, typer.Argument(help="Folder for everything the demo makes; new, empty, or one to go on with.")
    ] = Path("demo-run"),
    seed: Annotated[int, typer.Option(min=0, help="Seed of all that is drawn at random.")] = 0,
    seeds: Annotated[
        int,
        typer.Option(
            min=0, help="Instead: the demo for so many seeds, with further score sources and all rivals, as one table."
        ),
    ] = 0,
    quick: Annotated[
        bool, typer.Option("--quick", help="The same line in a minute, with too little data to learn anything.")
    ] = False,
) -> None:
    """The whole line on embedded data in minutes: scenes, teacher, maps, Zoomer, ZoomViT, evaluation, report."""
    with reporting() as progress:
        from zpipe.demo import run_demo, run_seeds

        say = lambda line: print(line, file=sys.stderr)  # noqa: E731
        if seeds:
            rows = run_seeds(output, seeds, quick=quick, progress=progress, say=say)
        else:
            report = run_demo(output, seed=seed, quick=quick, progress=progress, say=say)
    if seeds:
        print_rows(rows, title=f"validation scenes, {seeds} seeds")
        tell(f"written to {output / 'results'}")
        return
    print_rows(report["rows"], title="validation scenes")
    print_rows([report["maps"]], title="maps on validation scenes")
    for line in report["notes"]:
        tell(line)


@app.command("doctor")
def doctor_command() -> None:
    """Versions, PIL build, devices, Ray, shared memory, temp: exit code 1 on what would fail later."""
    from zpipe.doctor import examine

    findings = examine()
    table = Table(show_header=False)
    for finding in findings:
        table.add_row("ok" if finding.ok else "PROBLEM", finding.name, finding.value)
    out.print(table)
    bad = [finding for finding in findings if not finding.ok]
    if bad:
        fail(f"{len(bad)} problems", tuple(f"{finding.name}: {finding.value}" for finding in bad), 1)


def main() -> None:
    """Entry point of the `zpipe` command."""
    app(prog_name="zpipe")
