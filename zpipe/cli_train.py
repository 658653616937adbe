"""The verbs that train the Zoomer and the ViTs."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from zpipe.cli_options import (
    Address,
    Damaged,
    DataWorkers,
    Join,
    Missing,
    ModelArgs,
    NumWorkers,
    Resume,
    RunFolder,
    Seed,
    Sets,
    Shards,
    StepImages,
    TrainingDevice,
)
from zpipe.console import local_path, parse_settings, path_or_url, reporting, tell, warn
from zpipe.schemas.errors import ZpipeError
from zpipe.schemas.progress import Progress


@contextmanager
def _training() -> Iterator[tuple[Progress, Callable[[str], None]]]:
    """As `reporting`; yields the progress, and a function that shows a line.

    Of torchrun's processes, only the first one shows lines, and only the one that fails first shows its error.
    """
    with reporting(bars=os.environ.get("TORCHELASTIC_RUN_ID") is None or os.environ["RANK"] == "0") as progress:
        from zpipe.train.fit.torchrun import first_error_alone, is_first

        with first_error_alone():
            if is_first():
                yield progress, warn
            else:
                warnings.simplefilter("ignore")
                yield progress, lambda line: None


def _tell_first(line: str) -> None:
    """Print a line of a result; of torchrun's processes only the first one does."""
    from zpipe.train.fit.torchrun import is_first

    if is_first():
        tell(line)


def _given(flags: dict[str, Any]) -> dict[str, Any]:
    """Only the flags that were given; the recipe decides on the others."""
    return {name: value for name, value in flags.items() if value is not None}


def _warn_of_warmup(config: Any, say: Callable[[str], None]) -> None:
    """Say that the warm-up is shorter than the settings want, which a few epochs would not outlast."""
    from zpipe.train.fit.optim import warmup_epochs

    if warmup_epochs(config) < config.warmup_epochs:
        say(
            f"warning: a warm-up of {config.warmup_epochs:g} of {config.epochs:g} epochs is shortened to "
            f"{warmup_epochs(config):g}, a quarter of the training; set train.warmup_epochs to choose it"
        )


@contextmanager
def _complete(shards: Path, say: Callable[[str], None]) -> Iterator[None]:
    """Tell before a training which images of tars without an index belong to no sample, and fail after it."""
    from zpipe.train.data.stream import list_shards

    left_out = list_shards(shards)[1].left_out
    if left_out:
        say(f"warning: {left_out}")
    yield
    if left_out:
        raise ZpipeError(left_out)


def train_zoomer_command(
    shards: Shards,
    maps: Annotated[
        Path, typer.Option(parser=path_or_url, metavar="PATH|URL", help="Relevance store made from these shards.")
    ],
    output: RunFolder,
    num_blocks: Annotated[int, typer.Option(help="Residual blocks: 2, 4 or 6.")] = 4,
    image_size: Annotated[int, typer.Option(help="Width and height of the input in pixels.")] = 224,
    recipe_name: Annotated[str | None, typer.Option("--recipe", help="zoomer (default) or zoomer-small.")] = None,
    epochs: Annotated[float | None, typer.Option(help="Epochs; fractions are allowed. Default 100.")] = None,
    batch_size: StepImages = None,
    lr: Annotated[float | None, typer.Option(help="Highest learning rate. Default 0.01.")] = None,
    data_workers: DataWorkers = None,
    num_workers: NumWorkers = 1,
    address: Address = None,
    resume: Resume = "auto",
    missing: Missing = "error",
    damaged: Damaged = "error",
    join: Join = "tar",
    seed: Seed = 0,
    device: TrainingDevice = "auto",
    settings: Sets = None,
) -> None:
    """Stage 1: teach a small convolutional Zoomer to predict the teacher's maps from the image alone."""
    with _training() as (progress, say):
        from zpipe.train.fit.distributed import Workers, run_training
        from zpipe.train.fit.recipes import ZOOMER_RECIPES, recipe
        from zpipe.train.fit.train_zoomer import ZoomerConfig, train_zoomer
        from zpipe.train.settings import with_settings

        flags = {
            "num_blocks": num_blocks,
            "image_size": image_size,
            "missing": missing,
            "join": join,
            "damaged": damaged,
        }
        flags |= {"train.seed": seed, "train.device": device}
        flags |= _given({"train.epochs": epochs, "train.batch_size": batch_size, "train.lr": lr})
        flags |= _given({"train.data_workers": data_workers})
        config = with_settings(
            recipe(recipe_name, ZOOMER_RECIPES, ZoomerConfig()), flags | parse_settings(settings, "--set")
        )
        _warn_of_warmup(config.train, say)
        arguments = {"shards": shards, "maps": maps, "out": output, "resume": resume}
        workers = Workers(count=num_workers, address=address)
        with _complete(shards, say):
            run_training(train_zoomer, arguments, config, workers, progress=progress, say=say)
            _tell_first(f"{output}: zoomer ready; measure it with: zpipe evaluate {output} VAL_SHARDS --maps VAL_MAPS")


def train_vit_command(
    shards: Shards,
    output: RunFolder,
    model: Annotated[
        str,
        typer.Option(
            help="zoomvit_{tiny,small,base}_patch16_224, cfvit_small, lfvit_small, sparseformer_tiny, "
            "token_pruned_vit, tome_vit, image_zoom, or any timm classifier."
        ),
    ] = "zoomvit_small_patch16_224",
    model_arg: ModelArgs = None,
    zoomer: Annotated[
        Path | None,
        typer.Option(parser=local_path, metavar="RUN", help="Finished train-zoomer run that scores the images."),
    ] = None,
    maps: Annotated[
        Path | None,
        typer.Option(
            parser=path_or_url,
            metavar="PATH|URL",
            help="Instead of --zoomer: relevance store whose maps are the scores.",
        ),
    ] = None,
    scores: Annotated[
        str | None,
        typer.Option(
            help="Source of the scores: zoomer, maps, attention, entropy, centre, random, own or none; "
            "default: that of --zoomer or --maps."
        ),
    ] = None,
    init_from: Annotated[
        str | None,
        typer.Option(help="Run, checkpoint file or timm:NAME to start from (a plain ViT may start a ZoomViT)."),
    ] = None,
    num_classes: Annotated[
        int | None, typer.Option(help="Number of classes; default: as many as the shards name.")
    ] = None,
    image_size: Annotated[
        int | None, typer.Option(help="Width and height of the input in pixels. Default 224.")
    ] = None,
    recipe_name: Annotated[
        str | None,
        typer.Option(
            "--recipe",
            help="deit, deit3, finetune, cifar10 or flowers102, or a small variant such as deit-small; "
            "none by default.",
        ),
    ] = None,
    val: Annotated[
        Path | None,
        typer.Option(
            parser=path_or_url,
            metavar="SHARDS",
            help="Validate on these shards after every epoch, and keep the best weights.",
        ),
    ] = None,
    val_maps: Annotated[
        Path | None,
        typer.Option(
            parser=path_or_url,
            metavar="PATH|URL",
            help="Relevance store of the validation shards, if the scores are maps.",
        ),
    ] = None,
    epochs: Annotated[float | None, typer.Option(help="Epochs; fractions are allowed. Default 300.")] = None,
    batch_size: StepImages = None,
    lr: Annotated[float | None, typer.Option(help="Highest learning rate. Default 0.001.")] = None,
    data_workers: DataWorkers = None,
    num_workers: NumWorkers = 1,
    address: Address = None,
    resume: Resume = "auto",
    missing: Missing = "error",
    damaged: Damaged = "error",
    join: Join = "tar",
    seed: Seed = 0,
    device: TrainingDevice = "auto",
    settings: Sets = None,
) -> None:
    """Stage 2: train a ZoomViT under a frozen zoomer (or cached maps), or a plain timm ViT without zoom."""
    with _training() as (progress, say):
        from zpipe.train.fit.distributed import Workers, run_training
        from zpipe.train.fit.initialise import assumed
        from zpipe.train.fit.recipes import VIT_RECIPES, recipe
        from zpipe.train.fit.train_vit import VitConfig, train_vit
        from zpipe.train.settings import with_settings

        base = recipe(recipe_name, VIT_RECIPES, VitConfig())
        model_args = base.model_args | parse_settings(model_arg, "--model-arg")
        flags = {"model": model, "model_args": model_args, "num_classes": num_classes}
        flags |= {"missing": missing, "join": join, "damaged": damaged, "init_from": init_from, "scores": scores}
        flags |= {"train.seed": seed, "train.device": device}
        flags |= _given({"train.epochs": epochs, "train.batch_size": batch_size, "train.lr": lr})
        flags |= _given({"train.data_workers": data_workers})
        flags |= _given({"image_size": image_size})
        config = with_settings(base, flags | parse_settings(settings, "--set"))
        _warn_of_warmup(config.train, say)
        paths = {"shards": shards, "out": output, "zoomer": zoomer, "maps": maps, "val": val, "val_maps": val_maps}
        if config.init_from is not None and config.mean is None and zoomer is None:
            note = assumed(config.init_from)
            if note:
                say(f"note: {note}")
        workers = Workers(count=num_workers, address=address)
        with _complete(shards, say):
            run_training(train_vit, {**paths, "resume": resume}, config, workers, progress=progress, say=say)
            _tell_first(f"{output}: model ready; measure it with: zpipe evaluate {output} VAL_SHARDS")
