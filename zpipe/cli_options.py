"""Options that several verbs share, with one meaning and one wording."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from zpipe.console import fail, local_path, path_or_url


def moved(option: str, remedy: str) -> type[TyperCommand]:
    """A command that answers an option which it no longer has with the line `OPTION VALUE: REMEDY`.

    Args:
        option: The option, such as `--study`.
        remedy: What to do instead; {} in it stands for the value.
    """

    class Moved(TyperCommand):
        # The context is that of click, which some versions of typer bundle.
        def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
            for place, word in enumerate(args):
                name, _, value = word.partition("=")
                if name == option:
                    value = value or " ".join(args[place + 1 : place + 2])
                    fail(f"{option} {value}: {remedy.format(value)}", (), 2)
            return super().parse_args(ctx, args)

    return Moved


Shards = Annotated[
    Path,
    typer.Argument(
        parser=path_or_url,
        metavar="SHARDS",
        help="Folder or URL of tar shards, one tar, or a quoted pattern: 'train-{000..099}.tar', 'train-*.tar'.",
    ),
]
Maps = Annotated[
    Path | None, typer.Option(parser=path_or_url, metavar="PATH|URL", help="Relevance store of these shards.")
]
Run = Annotated[Path, typer.Argument(parser=local_path, metavar="RUN", help="Finished train-vit or train-zoomer run.")]
Store = Annotated[Path, typer.Argument(parser=path_or_url, metavar="STORE", help="Relevance store.")]
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

# For the verbs that run a teacher.
TeacherName = Annotated[
    str | None,
    typer.Option(
        help="timm model, torchvision:vit_b_16, or transformers:OWNER/NAME; default deit_base_patch16_224, or what "
        "the weights folder says."
    ),
]
TeacherWeights = Annotated[
    str,
    typer.Option(
        help="Weights file, folder of a finished train-vit run (other weights of it: RUN:best, RUN:7) or of "
        "transformers' save_pretrained, 'pretrained', or 'random'."
    ),
]
OwnHead = Annotated[
    str | None,
    typer.Option(
        metavar="class|distilled",
        help="Whose answer counts of a distilled teacher with two heads; default the mean of both.",
    ),
]
ResizePositions = Annotated[
    bool,
    typer.Option(
        "--resize-positions",
        help="Resize the position embeddings of a weights file to the image size that --model-arg gives.",
    ),
]
Mean = Annotated[
    str | None,
    typer.Option(
        metavar="R,G,B",
        help="Mean of the teacher's images, of pixels in 0 to 1, where no config.json beside the weights says it.",
    ),
]
Std = Annotated[str | None, typer.Option(metavar="R,G,B", help="Standard deviation, likewise.")]
Interpolation = Annotated[
    str | None, typer.Option(help="How images are resized, likewise: bicubic, bilinear or lanczos.")
]
CropPct = Annotated[float | None, typer.Option(help="Fraction of the image that --frame center shows, likewise.")]

Address = Annotated[str | None, typer.Option(help="Address of a Ray cluster; default RAY_ADDRESS, else this machine.")]
Seed = Annotated[int, typer.Option(min=0, help="Seed of everything that is random.")]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]

# For the verbs that train.
RunFolder = Annotated[
    Path,
    typer.Option(
        "--out", parser=local_path, metavar="FOLDER", help="Folder of the run: new, empty, or that of a run to resume."
    ),
]
StepImages = Annotated[
    int | None, typer.Option(min=1, help="Images per step, over all training processes together. Default 128.")
]
DataWorkers = Annotated[
    int | None,
    typer.Option(
        min=0,
        help="Data-loading processes of each training process. Default 1 on a CPU, for a GPU up to 16, as many as "
        "there are cores for.",
    ),
]
TrainingDevice = Annotated[
    str,
    typer.Option(
        help="auto, cpu or cuda. On a GPU that computes in bf16, training does, and the blocks of a ZoomViT or a plain "
        "ViT are compiled, unless --set train.precision=float32 or --set train.compile=false say otherwise."
    ),
]
NumWorkers = Annotated[
    int,
    typer.Option(
        min=0,
        help="Training processes, one per GPU; more than one run on Ray and share the batch evenly. Not with torchrun.",
    ),
]
Resume = Annotated[str, typer.Option(help="If the folder already holds a run: auto (resume it) or never (stop).")]
Missing = Annotated[str, typer.Option(help="What to do with samples without a usable map: error, skip or uniform.")]
Join = Annotated[
    str,
    typer.Option(
        metavar="tar|image",
        help="How maps find their images: tar (the store was made from these very tars) or image (by a digest of each "
        "image's bytes, whatever tars, keys and order they come in).",
    ),
]
Damaged = Annotated[
    str,
    typer.Option(
        metavar="error|skip",
        help="What to do with damaged tars, and with samples whose image, label or .json is broken: error, "
        "or skip (leave them out and count them).",
    ),
]

# For the verbs that measure.
Alphas = Annotated[
    str | None, typer.Option(help="Thresholds of a ZoomViT, comma-separated. Default 0,0.05,0.1,0.2,0.5,1.")
]
Exits = Annotated[
    str, typer.Option(help="Thresholds of early exit of a cfvit_* or lfvit_*. Default 0,0.3,0.5,0.7,0.9,1.")
]
Merge = Annotated[str, typer.Option(help="Tokens that a tome_vit merges in each block, comma-separated.")]
At = Annotated[
    list[str] | None,
    typer.Option(
        "--at",
        metavar="NAME=VALUE,...",
        help="Values of any further setting that the model has for inference, such as side=2,4. Repeatable.",
    ),
]
AtOne = Annotated[
    list[str] | None,
    typer.Option(
        "--at",
        metavar="NAME=VALUE",
        help="Any further setting of the model for inference: exit=0.7, keep=16, merge=8. Repeatable.",
    ),
]
Classes = Annotated[
    str | None,
    typer.Option(
        metavar="by-name|by-index|FILE",
        help="For shards whose classes are not those of the run: by-name matches their names, FILE has the run's class "
        "of each label, one a line; the run's other classes then don't count as answers (ImageNet-A). by-index takes "
        "the numbers as they are, whatever the names.",
    ),
]
Labels = Annotated[
    Path | None,
    typer.Option(
        parser=local_path,
        metavar="FILE|real",
        help="JSON file with the right classes of each key, possibly several; real: those of ImageNet-ReaL.",
    ),
]
Precision = Annotated[str, typer.Option(help="float32, or under autocast bf16 or fp16.")]

# For the verbs that only run a model.
BatchSize = Annotated[int, typer.Option(min=1, help="Images per batch.")]
LoadingProcesses = Annotated[
    int | None,
    typer.Option(
        min=0,
        help="Data-loading processes. Default 0 on a CPU and where --limit leaves out images, for a GPU up to 16, as "
        "many as there are cores for.",
    ),
]
Scores = Annotated[
    str | None,
    typer.Option(
        help="Source of the scores: zoomer, maps, attention, entropy, centre, random, own or none; default as trained."
    ),
]
Weights = Annotated[
    str,
    typer.Option(help="Which weights of the run: final, best (with --val in training), or the number of a kept epoch."),
]
# Single images have no maps in a store.
ScoresOfImages = Annotated[
    str | None,
    typer.Option(
        "--scores",
        help="Source of the scores: zoomer, attention, entropy, centre, random, own or none; default as trained.",
    ),
]
