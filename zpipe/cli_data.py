"""The verbs that make data: shards of images, and a teacher's maps of these images."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, cast

import typer
from rich.table import Column, Table

from zpipe.cli_options import (
    Address,
    CropPct,
    Device,
    Interpolation,
    Mean,
    ModelArgs,
    OwnHead,
    ResizePositions,
    Shards,
    Std,
    TeacherName,
    TeacherWeights,
)
from zpipe.console import (
    count_or_auto,
    local_path,
    parse_channels,
    parse_settings,
    path_or_url,
    print_table,
    reporting,
    tell,
    warn,
)
from zpipe.schemas.errors import UsageError, ZpipeError
from zpipe.schemas.names import printable
from zpipe.schemas.storage import as_local


def make_shards_command(
    source: Annotated[
        str,
        typer.Argument(
            help="Folder of images (one sub-folder per class, or a labels.csv); "
            "cifar10:PATH (cifar-10-binary.tar.gz or its folder); "
            "flowers102:FOLDER (with 102flowers.tgz or jpg/, imagelabels.mat, setid.mat); "
            "imagenet:FOLDER (with the official archives, Kaggle's ILSVRC/, or train/ and val/); "
            "parquet:PATH (files, a folder of them, or a URL such as hf://datasets/OWNER/NAME); "
            "voc:FOLDER (VOCdevkit); coco:FILE (instances_*.json); "
            "or 'scenes', the embedded data."
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Argument(
            parser=path_or_url,
            metavar="OUTPUT",
            help="Local folder for the tars and their index: new, empty, or that of a run to resume. With "
            "--index-only: folder or URL for the index, if it shall not lie beside the tars.",
        ),
    ] = None,
    shard_size: Annotated[int, typer.Option(min=1, help="Most images in one tar.")] = 1000,
    keys: Annotated[
        str, typer.Option(help="(image folders only) Key of an image: 'stem' (file name) or 'path' (with its folders).")
    ] = "stem",
    seed: Annotated[int, typer.Option(help="Seed of the order of images, or of the embedded scenes.")] = 0,
    no_shuffle: Annotated[
        bool, typer.Option("--no-shuffle", help="(not for embedded scenes) Keep the images in the order of the source.")
    ] = False,
    count: Annotated[int, typer.Option(help="(embedded scenes only) Number of scenes.")] = 10000,
    split: Annotated[
        str,
        typer.Option(
            help="Split of the data set: train or val (scenes, cifar10); train, val or test (imagenet); train, val, "
            "test or trainval (flowers102, voc); any that is in the names of the files (parquet). Image folders and "
            "coco have none."
        ),
    ] = "train",
    image_column: Annotated[
        str | None, typer.Option(help="(parquet only) Column of the images, where it can't be told.")
    ] = None,
    label_column: Annotated[
        str | None, typer.Option(help="(parquet only) Column of the labels, where it can't be told; 'none' for none.")
    ] = None,
    images: Annotated[
        str | None, typer.Option(help="(coco only) Folder of the images, where they are not beside the annotations.")
    ] = None,
    image_size: Annotated[
        int | None, typer.Option(help="(embedded scenes only) Width and height of a scene in pixels.")
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="(embedded scenes only) Any other setting of a scene, such as pieces=[1,2] or digit_size=[9,10]. "
            "Repeatable.",
        ),
    ] = None,
    masks: Annotated[
        Path | None,
        typer.Option(
            parser=local_path,
            metavar="FOLDER",
            help="(embedded scenes only) Also write the mask of each digit, KEY.png, for `zpipe maps judge --masks`.",
        ),
    ] = None,
    no_check: Annotated[
        bool,
        typer.Option(
            "--no-check",
            help="Read only the header of images that keep their bytes (JPEG, PNG, WebP), to save the time of decoding "
            "them; damage after it is found by whoever decodes them.",
        ),
    ] = False,
    index_only: Annotated[
        bool,
        typer.Option(
            "--index-only",
            help="SOURCE is a folder or URL of tars, a pattern ('train-{000..099}.tar', 'train-*.tar'), or @FILE with "
            "one of these a line: only write their shards.json.",
        ),
    ] = False,
    label_field: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="(--index-only) Field of each KEY.json that the label is taken from, dotted where nested, in place of "
            "KEY.cls or label.",
        ),
    ] = None,
) -> None:
    """Pack images into WebDataset tars: key.jpg (original bytes), key.cls, key.json, and a shards.json.

    The content of a file decides whether it is an image, not its name. BMP, GIF, TIFF and PPM become PNG. Images that
    can't be decoded are listed in quarantine.csv and left out; the exit code is then 1.
    """
    with reporting() as progress:
        from zpipe.pipeline.make_shards import index_shards, make_shards
        from zpipe.pipeline.open_source import SourceConfig, open_source
        from zpipe.pipeline.sources import SceneSource

        config = SourceConfig(
            shard_size=shard_size,
            keys=keys,
            seed=seed,
            shuffle=not no_shuffle,
            count=count,
            split=split,
            image_size=image_size,
            image_column=image_column,
            label_column=label_column,
            images=images,
            scene=parse_settings(settings, "--set"),
            check=not no_check,
        )
        if index_only:
            config.refuse_others("--index-only")
            index = index_shards(source, output, label_field=label_field, progress=progress)
            tell(f"{source}: {index.count} images in {_counted(len(index.shards), 'shard')} indexed; {index.account}")
            if not index.account.is_whole:
                raise ZpipeError(
                    f"{source}: {index.account.images_left_out} images were left out, because a key ends at the first "
                    "dot of a name; rename them KEY.jpg in new tars, or go on without them: shards.json is written"
                )
            return
        if label_field is not None:
            raise UsageError("--label-field: is for tars as they are; give --index-only too")
        if output is None:
            raise UsageError("give an output folder: zpipe make-shards SOURCE OUTPUT")
        output = as_local(output)
        opened = open_source(source, config, warn)
        if masks is not None:
            if not isinstance(opened, SceneSource):
                raise UsageError(f"--masks {masks}: only the embedded scenes have masks; leave it out")
            opened.write_masks(masks)
        report = make_shards(opened, output, progress=progress)
        tell(
            f"{output}: {report.count} images in {_counted(report.shards, 'shard')} ({report.written} written now), "
            f"{_counted(report.classes, 'class')}; {report.account}"
        )
        if report.quarantined:
            raise ZpipeError(
                f"{output / 'quarantine.csv'}: {_counted(len(report.quarantined), 'image')} put aside; "
                "mend, move or remove them, then make the shards in a new folder",
                [f"{printable(item.file)}: {printable(item.reason)}" for item in report.quarantined[:20]],
            )


def _counted(count: int, what: str) -> str:
    plural = "es" if what.endswith("s") else "s"
    return f"{count} {what}{plural * (count != 1)}"


def _list_teachers(wanted: bool) -> None:
    if wanted:
        with reporting():
            from zpipe.pipeline.families import family_rows

            titles = ("family", "answer read from", "methods", "examples")
            table = Table(*(Column(title, overflow="fold") for title in titles), show_lines=True)
            for row in family_rows():
                table.add_row(*row.values())
            print_table(table)
        raise typer.Exit


def extract_command(
    shards: Shards,
    output: Annotated[
        Path,
        typer.Option(
            "--out",
            parser=path_or_url,
            metavar="PATH|URL",
            help="Folder of the relevance store: new, empty, or that of an extraction to resume.",
        ),
    ],
    teacher: TeacherName = None,
    weights: TeacherWeights = "pretrained",
    list_teachers: Annotated[
        bool,
        typer.Option(
            "--list-teachers",
            is_eager=True,
            callback=_list_teachers,
            help="Print the families of teachers, examples of each, and the methods that explain them, and exit.",
        ),
    ] = False,
    own_head: OwnHead = None,
    head: Annotated[
        str | None, typer.Option(metavar="FILE", help="Head that zpipe fit-head wrote, in place of the teacher's own.")
    ] = None,
    class_embeddings: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="Zero-shot classes instead of a head: embeddings of their names by the text tower of a CLIP or SigLIP "
            "(.npy, .safetensors, .pt).",
        ),
    ] = None,
    resize_positions: ResizePositions = False,
    num_classes: Annotated[
        int | None, typer.Option(help="Number of the teacher's classes, where neither weights nor model say it.")
    ] = None,
    model_arg: ModelArgs = None,
    mean: Mean = None,
    std: Std = None,
    interpolation: Interpolation = None,
    crop_pct: CropPct = None,
    classes: Annotated[
        str,
        typer.Option(
            help="How labels find the teacher's classes: same (both name the same classes), by-name, or by-index (the "
            "numbers, whatever the names)."
        ),
    ] = "same",
    seed: Annotated[int, typer.Option(help="Seed of random weights.")] = 0,
    method: Annotated[
        str,
        typer.Option(
            help="transformer-attribution, transformer-attribution-stable, gradient-attention, legrad, libragrad, "
            "rollout or class-attention. The default is the paper's; libragrad gave the better Zoomer on the demo."
        ),
    ] = "transformer-attribution",
    target: Annotated[
        str,
        typer.Option(
            help="Class that a map explains: ground-truth, predicted, or class:K; top:K stores a map for each of the "
            "teacher's K best classes."
        ),
    ] = "ground-truth",
    save: Annotated[
        str,
        typer.Option(
            metavar="logits,features",
            help="Also store these of the teacher, in the same pass, in stores inside the output: OUT/logits, "
            "OUT/features.",
        ),
    ] = "",
    frame: Annotated[
        str, typer.Option(help="'full' (the whole image, for training) or 'center' (the teacher's evaluation view).")
    ] = "full",
    symmetrise: Annotated[
        bool, typer.Option("--symmetrise", help="Average with the map of the mirrored image; takes twice the time.")
    ] = False,
    stability: Annotated[
        bool,
        typer.Option(
            "--stability",
            help="Measure how stable each map is: its rank correlation with the map of the image plus noise of a "
            "quarter of a grey level. Takes twice the time.",
        ),
    ] = False,
    precision: Annotated[
        str,
        typer.Option(
            help="float32 or float64; for transformer-attribution and transformer-attribution-stable also "
            "FORWARD+SWEEP: float64+float32 (almost exact), float64+bfloat16, float32+bfloat16, float32+tf32; for the "
            "other methods also bfloat16; or auto: the cheapest one whose errors are smaller than what noise of a "
            "quarter of a grey level makes of the maps."
        ),
    ] = "float32",
    executor: Annotated[
        str, typer.Option(help="'ray' (local when no cluster is given) or 'local' (this process).")
    ] = "ray",
    address: Address = None,
    actors: Annotated[int, typer.Option(min=0, help="Worker processes; 0: chosen automatically.")] = 0,
    threads: Annotated[int, typer.Option(min=0, help="CPU threads of each worker; 0: chosen automatically.")] = 0,
    gpus_per_actor: Annotated[float, typer.Option(min=0, help="GPUs of each worker; 0: chosen automatically.")] = 0.0,
    batch_size: Annotated[
        int,
        typer.Option(
            parser=count_or_auto,
            metavar="N|auto",
            help="Images per batch; auto: 8 on CPU, 64 on GPU, fewer when memory is short.",
        ),
    ] = "auto",  # type: ignore[assignment]
    device: Device = "auto",
    image_timeout: Annotated[
        float | None,
        typer.Option(
            min=0.001,
            help="Seconds per image of a shard, beside ten minutes, after which a silent Ray worker counts as hung; by "
            "default 10, and less once shards are finished.",
        ),
    ] = None,
    replace: Annotated[bool, typer.Option("--replace", help="Delete what the store holds and start over.")] = False,
) -> None:
    """Run a frozen teacher over tar shards and store its relevance maps for each image's own label.

    One tar gives one map shard. Finished shards are kept, so the same command resumes an interrupted extraction.
    """
    with reporting() as progress:
        from zpipe.pipeline.explainer import ExplainConfig
        from zpipe.pipeline.extract import Executor, ExtractConfig, extract_teacher_maps
        from zpipe.schemas.classes import Matching

        config = ExtractConfig(
            teacher=teacher,
            weights=weights,
            num_classes=num_classes,
            teacher_args=parse_settings(model_arg, "--model-arg"),
            seed=seed,
            mean=parse_channels(mean, "--mean"),
            std=parse_channels(std, "--std"),
            interpolation=interpolation,
            crop_pct=crop_pct,
            own_head=own_head,
            head=head,
            class_embeddings=class_embeddings,
            resize_positions=resize_positions,
            classes=cast(Matching, classes),
            explain=ExplainConfig(method=method, target=target, symmetrise=symmetrise, precision=precision),
            stability=stability,
            save=tuple(name.strip() for name in save.split(",") if name.strip()),
            frame=frame,
            executor=cast(Executor, executor),
            batch_size=batch_size,
            actors=actors,
            threads=threads,
            gpus_per_actor=gpus_per_actor,
            address=address,
            device=device,
            image_timeout_s=image_timeout,
            replace=replace,
        )
        if weights == "random":
            warn("warning: random weights were asked for: these maps mean nothing; the manifest says so")
        told: set[str] = set()

        def say(note: str) -> None:
            told.add(note)
            warn(f"note: {note}")

        report = extract_teacher_maps(shards, output, config, progress=progress, say=say)
        top1 = "" if report.top1 is None else f"; the teacher names {100 * report.top1:.1f} % of these labels"
        made = f"{report.count} maps in {report.shards} shards ({report.extracted} extracted now)"
        tell(f"{output}: {made}{top1}; {report.account}")
        for note in report.notes:
            if note not in told:
                warn(f"note: {note}")
        if report.problems:
            raise ZpipeError(
                f"{output}: {len(report.problems)} images have no usable map; the store is whole and says which",
                report.problems[:20],
            )
        if report.left_out:
            raise ZpipeError(report.left_out)


def fit_head_command(
    shards: Shards,
    output: Annotated[
        Path, typer.Option("--out", parser=local_path, metavar="FILE", help="File of the head: NAME.safetensors.")
    ],
    teacher: TeacherName = None,
    weights: TeacherWeights = "pretrained",
    val: Annotated[
        Path | None,
        typer.Option(parser=path_or_url, metavar="SHARDS", help="Shards of the same classes, to measure the head on."),
    ] = None,
    strength: Annotated[
        float | None,
        typer.Option(
            "--l2", help="Strength of the L2 penalty; default: chosen on a fifth of the images of each class."
        ),
    ] = None,
    frame: Annotated[
        str, typer.Option(help="'center' (the teacher's evaluation view) or 'full' (the whole image).")
    ] = "center",
    model_arg: ModelArgs = None,
    own_head: OwnHead = None,
    resize_positions: ResizePositions = False,
    mean: Mean = None,
    std: Std = None,
    interpolation: Interpolation = None,
    crop_pct: CropPct = None,
    seed: Annotated[int, typer.Option(help="Seed of random weights.")] = 0,
    threads: Annotated[int, typer.Option(min=0, help="CPU threads; 0: all.")] = 0,
    batch_size: Annotated[
        int, typer.Option(parser=count_or_auto, metavar="N|auto", help="Images per batch; auto: 8 on CPU, 64 on GPU.")
    ] = "auto",  # type: ignore[assignment]
    device: Device = "auto",
) -> None:
    """Fit a linear head to the frozen features of a teacher: a classifier of the shards' classes, in minutes.

    It reads what the teacher's own head would read and the mean of the patch tokens. Then --head makes the encoder a
    teacher for extract-teacher-maps. The same command resumes an interrupted run.
    """
    with reporting() as progress:
        from zpipe.pipeline.fit_head import FitHeadConfig, fit_head
        from zpipe.pipeline.teacher_spec import TeacherSpec

        spec = TeacherSpec(
            name=teacher,
            weights=weights,
            model_args=parse_settings(model_arg, "--model-arg"),
            seed=seed,
            mean=parse_channels(mean, "--mean"),
            std=parse_channels(std, "--std"),
            interpolation=interpolation,
            crop_pct=crop_pct,
            own_head=own_head,
            resize_positions=resize_positions,
        )
        if weights == "random":
            warn("warning: random weights were asked for: a head of their features means little")
        config = FitHeadConfig(
            teacher=spec, frame=frame, strength=strength, batch_size=batch_size, threads=threads, device=device
        )
        told: set[str] = set()

        def say(note: str) -> None:
            told.add(note)
            warn(f"note: {note}")

        report = fit_head(shards, output, config, val=val, progress=progress, say=say)
        fitted = f"{_counted(report.classes, 'class')} from {report.features} features of {report.count} images"
        tell(f"{output}: {fitted}, L2 strength {report.strength:.2g}")
        if report.held_out is not None:
            tell(f"{report.held_out}, held out to choose the strength; the head was then fitted to all images")
        if report.val is not None:
            tell(f"{report.val} in {val}")
        for note in report.notes:
            if note not in told:
                warn(f"note: {note}")
        if report.unusable:
            raise ZpipeError(
                f"{output}: written without {_counted(len(report.unusable), 'image')} that could not be used; mend or "
                "remove them, then run again",
                report.unusable[:20],
            )
