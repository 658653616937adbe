"""Which teacher is wanted, and the files that it is made of: its weights, and the description beside them."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import msgspec
import timm
from timm.models import split_model_name_tag

from zpipe.pipeline.classifier import OWN_HEADS
from zpipe.pipeline.shard_reader import PIL_FILTERS
from zpipe.schemas.choices import check_choice
from zpipe.schemas.errors import UsageError, ZpipeError
from zpipe.schemas.manifest import Provenance
from zpipe.schemas.model_config import (
    CONFIG_NAME,
    EPOCHS_NAME,
    RUN_NAME,
    ModelConfig,
    PretrainedConfig,
    config_beside,
    is_model_config,
    is_transformers_config,
    read_model_config,
    split_choice,
)
from zpipe.schemas.secrets import refuse_secret
from zpipe.schemas.storage import as_local

FOLDER_FILES = ("model.safetensors", "pytorch_model.bin")  # what timm writes beside config.json, the safe form first
TORCHVISION, TRANSFORMERS = "torchvision:", "transformers:"  # how names of their models begin
# What constructors of models raise for arguments that do not fit.
BUILD_ERRORS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    MemoryError,
    RuntimeError,
    TypeError,
    ValueError,
)
GIVE = "give 'pretrained', 'random', a weights file, a model folder, or RUN:best"
BEST_NAME = "best.safetensors"


@dataclass(frozen=True, kw_only=True)
class TeacherSpec:
    """Which teacher to load: what `load_teacher` needs to build the same one in any process.

    Raises:
        UsageError: `model_args` cannot be written as JSON, or name the number of classes; a value is none of its
            choices or out of range; `weights` is a URL.
    """

    name: str | None = None
    """timm's name of the architecture, or ``torchvision:vit_b_16``, or ``transformers:OWNER/NAME``, a model of the Hub,
    or ``transformers:CLASS``, one of `zpipe.pipeline.transformers_models.ARCHITECTURES`. None takes that of the
    description, else deit_base_patch16_224."""
    weights: str = "pretrained"
    """Where the weights come from:

    - ``pretrained``: the library's weights of that name, from its cache or the network.
    - ``random``: the library's initialisation, drawn from `seed`; the global random state is left alone.
    - a folder: what timm's `save_for_hf`, our training runs and transformers' `save_pretrained` write, config.json and
      model.safetensors. Other weights of a run are RUN:best, and RUN:7 for an epoch that was kept.
    - a file, see `zpipe.schemas.weights.read_weights`. A config.json beside it describes it, as it does a folder's
      weights. It is loaded strictly, and nothing is resized but positions, with `resize_positions`.

    What config.json says, `name`, `num_classes` and `model_args` may repeat.
    """
    num_classes: int | None = None
    """Number of classes. None takes it from the description, the head in the file, or the architecture."""
    model_args: dict[str, Any] = field(default_factory=dict)
    """Further arguments of the model's constructor (of timm: img_size, patch_size, ...), as JSON values. `own_head` is
    taken as that field; manifests have it here."""
    seed: int = 0
    """Seed of random weights."""
    mean: tuple[float, float, float] | None = None
    """Mean of each channel, subtracted from pixels in 0 to 1. None takes that of the description, or of the pretrained
    weights; if there is neither, that of timm's weights of the architecture is assumed. So for the next three."""
    std: tuple[float, float, float] | None = None
    """Standard deviation of each channel."""
    interpolation: str | None = None
    """How images are resized: a name of `zpipe.pipeline.shard_reader.PIL_FILTERS`."""
    crop_pct: float | None = None
    """Fraction of the image, 0 to 1, that the teacher's own evaluation crops from the centre."""
    head: str | None = None
    """File of a head that `zpipe.pipeline.fit_head` fitted, in place of the model's own."""
    class_embeddings: str | None = None
    """File of embeddings of the classes, whose cosine with that of the image is the answer; see
    `zpipe.pipeline.heads.read_class_embeddings`."""
    resize_positions: bool = False
    """Whether position embeddings of a weights file may be resized to the model's number of patches: bicubic, without
    antialiasing, as DINOv2 does. It makes another teacher, with another digest."""

    own_head: str | None = None
    """Whose answer counts of a model with a head for each of two tokens (distilled DeiT): ``class`` or ``distilled``.
    None takes the mean of both."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "weights", str(self.weights))
        refuse_secret(self.weights)
        model_args = _json_args(self.model_args)
        object.__setattr__(self, "own_head", model_args.pop("own_head", self.own_head))
        object.__setattr__(self, "model_args", model_args)
        if self.own_head is not None:
            check_choice("--own-head", self.own_head, OWN_HEADS)
        if "num_classes" in self.model_args:
            number = self.model_args["num_classes"]
            raise UsageError(f"model_args: num_classes={number!r} is its own option, give it there")
        for file in (self.path and self.weights, self.head, self.class_embeddings):
            if file:
                as_local(file)
        if self.head and self.class_embeddings:
            raise UsageError(f"--class-embeddings {self.class_embeddings}: takes the place of --head; give one of them")
        if self.resize_positions and (self.path is None or self.path.is_dir()):
            raise UsageError(f"--resize-positions: is for a weights file; leave it out with --weights {self.weights}")
        if self.interpolation is not None:
            check_choice("--interpolation", self.interpolation, PIL_FILTERS)
        for name in ("mean", "std", "crop_pct"):
            value = getattr(self, name)
            try:
                checked = msgspec.convert({name: value}, type=PretrainedConfig)
            except msgspec.ValidationError as error:
                option = name.replace("_", "-")
                raise UsageError(f"--{option} {value}: {str(error).split(' - at ')[0].replace('`', '')}") from error
            object.__setattr__(self, name, getattr(checked, name))

    @classmethod
    def of(cls, origin: Provenance, weights: str | None = None) -> TeacherSpec:
        """The teacher of a store.

        Args:
            origin: What its maps were made with.
            weights: Where the weights are now; None if they are where they were.
        """
        other_head = origin.head or origin.class_embeddings  # whose classes these are
        return cls(
            name=origin.teacher,
            weights=weights or origin.weights,
            num_classes=None if other_head else origin.num_classes,
            model_args=origin.teacher_args,
            seed=origin.seed or 0,
            mean=cast(tuple[float, float, float], origin.mean),
            std=cast(tuple[float, float, float], origin.std),
            interpolation=origin.interpolation,
            crop_pct=origin.crop_pct if origin.frame == "center" else None,
            head=origin.head or None,
            class_embeddings=origin.class_embeddings or None,
            resize_positions=origin.positions_resized,
        )

    @property
    def path(self) -> Path | None:
        """The file or folder of the weights; None for ``pretrained`` and ``random``."""
        return None if self.weights in ("pretrained", "random") else split_choice(self.weights)[0]

    @property
    def library(self) -> str:
        """The library that builds it: ``timm``, ``torchvision`` or ``transformers``.

        Raises:
            ZpipeError: The description beside the weights cannot be read as JSON.
        """
        for prefix in (TORCHVISION, TRANSFORMERS):
            if self.name is not None and self.name.startswith(prefix):
                return prefix[:-1]
        if self.name is None and self.path is not None:
            config = self.path / CONFIG_NAME if self.path.is_dir() else config_beside(self.path)
            if config.is_file() and is_transformers_config(config):
                return "transformers"
        return "timm"

    def folder_and_file(self) -> tuple[Path, Path | None]:
        """The folder of a model of transformers, and the file of its weights if that was given.

        Raises:
            UsageError: There is no such folder, or it has no choice of weights.
        """
        path, choice = split_choice(self.weights)
        if choice is not None or not path.exists():
            raise UsageError(f"{self.weights}: no such weights; {GIVE}")
        return (path, None) if path.is_dir() else (path.parent, path)

    def resolved(self) -> TeacherSpec:
        """The same teacher with absolute paths to its files, for processes that start in other folders."""
        files: dict[str, Any] = {
            name: str(Path(file).resolve()) for name in ("head", "class_embeddings") if (file := getattr(self, name))
        }
        if self.path is not None:
            path, choice = split_choice(self.weights)
            files["weights"] = f"{path.resolve()}:{choice}" if choice else str(path.resolve())
        return replace(self, **files)


@dataclass(frozen=True, kw_only=True)
class TeacherFiles:
    """What a teacher is read from."""

    weights: Path
    """The file of its weights."""
    folder: Path | None
    """The folder that describes it; None if nothing does."""
    config: ModelConfig | None
    """Its description."""
    why_not: str
    """Why nothing describes it; empty if something does."""


def find_files(spec: TeacherSpec) -> TeacherFiles:
    """Find the weights of a teacher that is neither ``pretrained`` nor ``random``, and their description.

    Raises:
        UsageError: There are no such weights, or the request contradicts the description.
        ZpipeError: The folder is not whole, or the description cannot be read.
    """
    path, choice = split_choice(spec.weights)
    if path.is_dir():
        file = _file_of(path, choice)
        config_path, belongs = path / CONFIG_NAME, True
        if not config_path.is_file() and (path / RUN_NAME).is_file():
            raise ZpipeError(f"{path}: this run is not finished (no {CONFIG_NAME}); run its command again to resume")
        if not config_path.is_file():
            raise ZpipeError(f"{path}: holds no {CONFIG_NAME}; give a finished run's folder")
        if is_transformers_config(config_path):
            raise UsageError(f"{config_path}: describes a model of transformers, not {spec.name}; leave the name out")
    elif path.exists():
        file, config_path = path, config_beside(path)
        # In a folder of several files, the description may be that of another one.
        belongs = path.name in (*FOLDER_FILES, BEST_NAME) or path.parent.name == EPOCHS_NAME
        if not config_path.is_file():
            return TeacherFiles(weights=path, folder=None, config=None, why_not=f"no {CONFIG_NAME} is beside it")
        if not is_model_config(config_path):
            return TeacherFiles(weights=path, folder=None, config=None, why_not=f"{config_path} is not timm's")
    else:
        raise UsageError(f"{spec.weights}: no such weights; {GIVE}")
    config = read_model_config(config_path)
    differs = _contradiction(spec, config)
    if differs and belongs:
        raise UsageError(f"{config_path}: {differs}")
    if differs:
        why_not = f"{config_path} describes another model ({differs.partition(';')[0]})"
        return TeacherFiles(weights=file, folder=None, config=None, why_not=why_not)
    if not timm.is_model(config.architecture):
        raise ZpipeError(
            f"{config_path}: architecture {config.architecture!r} is not a model of timm {timm.__version__}; a teacher "
            "is a plain ViT"
        )
    return TeacherFiles(weights=file, folder=config_path.parent, config=config, why_not="")


def _file_of(folder: Path, choice: str | None) -> Path:
    if choice in (None, "final"):
        file = next((folder / name for name in FOLDER_FILES if (folder / name).is_file()), None)
        if file is None:
            raise ZpipeError(f"{folder}: holds no {' or '.join(FOLDER_FILES)}; give a finished run's folder")
        return file
    if choice == "best":
        file, hint = folder / BEST_NAME, "train with --val SHARDS"
    else:
        file, hint = folder / EPOCHS_NAME / f"{int(choice):05d}.safetensors", "train with --set train.keep=N"
    if not file.is_file():
        raise UsageError(f"{file}: this run has no such weights; {hint}")
    return file


def _contradiction(spec: TeacherSpec, config: ModelConfig) -> str:
    """The first thing in which a request and a description differ, with a remedy; empty if they agree."""
    known = config.architecture
    # A tag names a set of pretrained weights; the folder brings its own, so only the architecture has to agree.
    if spec.name is not None and split_model_name_tag(spec.name)[0] != known:
        return f"architecture is {known}, not {spec.name}; leave the name out or give the right weights"
    for key, value in spec.model_args.items():
        # timm writes some sizes as pairs, though the argument was one number.
        if key not in config.model_args or config.model_args[key] not in (value, [value, value]):
            return f"model_args has {key}={config.model_args.get(key)!r}, not {value!r}; leave {key} out"
    if spec.num_classes is not None and spec.num_classes != config.class_count:
        return f"num_classes is {config.class_count}, not {spec.num_classes}; leave num_classes out"
    return ""


def _json_args(model_args: dict[str, Any]) -> dict[str, Any]:
    try:
        return json.loads(json.dumps(model_args, allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise UsageError(f"model_args: {error}; a manifest must be able to hold them, give JSON values") from error
