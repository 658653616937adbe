"""The verb that opens other people's weights."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from zpipe.cli_options import ModelArgs
from zpipe.console import local_path, parse_channels, parse_settings, reporting, tell


def import_command(
    source: Annotated[
        str,
        typer.Argument(
            help="timm:NAME; a folder that timm's save_for_hf wrote; or a checkpoint that a paper's authors published: "
            "zoomvit:FILE, cfvit:FILE, lfvit:FILE, sparseformer:FILE, deit:FILE (DeiT III, too)."
        ),
    ],
    output: Annotated[
        Path, typer.Option("--out", parser=local_path, metavar="RUN", help="Folder of the run: new or empty.")
    ],
    file: Annotated[
        str | None, typer.Option(help="Weights file of timm:NAME; by default timm's pretrained weights.")
    ] = None,
    model_arg: ModelArgs = None,
    classes: Annotated[
        str | None,
        typer.Option(
            metavar="imagenet-1k|none|FILE",
            help="Names of the classes, in the order of their numbers; FILE has one a line. Default: those of the "
            "source; for 1,000 classes without names, ImageNet's.",
        ),
    ] = None,
    mean: Annotated[
        str | None,
        typer.Option(metavar="R,G,B", help="Mean of the images, of pixels in 0 to 1; default that of the source."),
    ] = None,
    std: Annotated[str | None, typer.Option(metavar="R,G,B", help="Standard deviation, likewise.")] = None,
    crop_pct: Annotated[
        float | None,
        typer.Option(help="Side of the centre crop in evaluation, as a fraction of an image's shorter side, likewise."),
    ] = None,
) -> None:
    """Write other people's weights as a finished run, for evaluate, predict, study, report and --init-from.

    What does not follow from the weights' shapes is given by --model-arg: num_heads for ZoomViT (which needs
    zoom_factor and alpha, too), CF-ViT and LF-ViT (and region_size); num_heads and focus_repeats for SparseFormer.
    """
    with reporting():
        from zpipe.train.import_model import ImportConfig, import_model

        config = ImportConfig(
            file=file,
            model_args=parse_settings(model_arg, "--model-arg"),
            classes=classes,
            mean=parse_channels(mean, "--mean"),
            std=parse_channels(std, "--std"),
            crop_pct=crop_pct,
        )
        found = import_model(source, output, config)
        size, names = found.preprocessing.image_size, len(found.classes)
        named = f", named {found.classes[0]} to {found.classes[-1]}" if names else " without names"
        zoomer = " with its zoomer" if found.zoomer is not None else ""
        tell(
            f"{output}: {type(found.model).__name__}{zoomer}, {found.parameters / 1e6:.2f} M parameters, {size} px, "
            f"{found.model.num_classes} classes{named}; measure it with: zpipe evaluate {output} VAL_SHARDS"
        )
