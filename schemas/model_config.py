"""The description of a model beside its weights: timm's config.json, which our training runs write, too.

It says how the model is built, how its images are prepared, and what its classes are called. Whoever loads weights
reads it here, so that the same folder is the same model everywhere.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import msgspec

from zpipe.schemas.errors import UsageError, ZpipeError
from zpipe.schemas.formats import Format, decode_json, read_json

CONFIG_NAME = "config.json"
RUN_NAME = "run.json"
EPOCHS_NAME = "epochs"
REMEDY = "restore the file, or write the model again"
MAX_BYTES = 64 << 20  # names and descriptions of classes can be long, 22,000 of them have 2 MB
MAX_SIDE = 8192
MAX_BLOCKS = 1024
MAX_CLASSES = 1_000_000
# Arguments of timm.create_model that say where weights come from, or make something else than a classifier of it.
NOT_OF_THE_MODEL = (
    "cache_dir",
    "checkpoint_path",
    "exportable",
    "feature_cfg",
    "feature_cls",
    "features_only",
    "kwargs_filter",
    "model_cfg",
    "no_jit",
    "out_indices",
    "pretrained",
    "pretrained_cfg",
    "pretrained_cfg_overlay",
    "pretrained_filter_fn",
    "pretrained_model_args",
    "pretrained_strict",
    "scriptable",
)
# Largest numbers in some arguments; in all others it is 65,536. Each block takes time and memory to build.
LARGEST = {"img_size": MAX_SIDE, "num_classes": MAX_CLASSES} | dict.fromkeys(
    ("depth", "depths", "layers", "num_blocks", "num_layers"), MAX_BLOCKS
)

Mean = Annotated[float, msgspec.Meta(ge=-10, le=10)]
Std = Annotated[float, msgspec.Meta(ge=1e-4, le=10)]
Side = Annotated[int, msgspec.Meta(ge=1, le=MAX_SIDE)]
CropPct = Annotated[float, msgspec.Meta(ge=0.01, le=1)]
Classes = Annotated[int, msgspec.Meta(ge=0, le=MAX_CLASSES)]  # 0: an encoder without a head
Name = Annotated[str, msgspec.Meta(max_length=1000)]
# By number, or by the number as text, as timm writes it where numbers are left out.
ClassLabels = list[Name] | dict[str, Name]


@dataclass(frozen=True, kw_only=True)
class PretrainedConfig:
    """How the images were prepared that the weights were trained with. None where the description doesn't say it."""

    input_size: tuple[int, Side, Side] | None = None
    """Channels, height and width."""
    mean: tuple[Mean, Mean, Mean] | None = None
    """Mean of each channel, subtracted from pixels in 0 to 1."""
    std: tuple[Std, Std, Std] | None = None
    """Standard deviation of each channel."""
    interpolation: Annotated[str, msgspec.Meta(max_length=40)] | None = None
    """How images are resized: timm's name of the filter."""
    crop_pct: CropPct | None = None
    """Fraction of the image, 0 to 1, that evaluation crops from the centre."""
    num_classes: Classes | None = None
    """Number of classes; that of `ModelConfig` takes precedence."""
    label_names: ClassLabels | None = None
    """Names of the classes; those of `ModelConfig` take precedence."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """What config.json says about a model. Its other fields are ignored."""

    architecture: Annotated[str, msgspec.Meta(min_length=1, max_length=200)]
    """timm's name of the architecture, without the tag of pretrained weights; or ``zoomer``."""
    model_args: dict[str, Any] = field(default_factory=dict)
    """Further arguments of its constructor, as JSON values."""
    num_classes: Classes | None = None
    """Number of classes, 0 for an encoder alone; None if nothing says it."""
    pretrained_cfg: PretrainedConfig = field(default_factory=PretrainedConfig)
    """How images are prepared."""
    label_names: ClassLabels | None = None
    """Names of the classes."""

    def __post_init__(self) -> None:
        odd = next((key for key in self.model_args if key in NOT_OF_THE_MODEL), None)
        if odd is not None:
            raise ValueError(f"model_args.{odd} is no argument of a classifier")
        for key, value in self.model_args.items():
            limit = LARGEST.get(key, 1 << 16)
            if any(abs(number) > limit for number in _numbers(value)):
                raise ValueError(f"model_args.{key} is beyond {limit}")
        count = self.model_args.get("num_classes", 1)
        if type(count) is not int or count < 0:
            raise ValueError(f"model_args.num_classes is {str(count)[:40]!r}, no number of classes")

    @property
    def class_count(self) -> int | None:
        """Number of classes, wherever the file says it."""
        found = self.model_args.get("num_classes", self.num_classes)
        return self.pretrained_cfg.num_classes if found is None else found

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes in the order of their numbers, "" for one without; empty if none is named."""
        names = self.label_names or self.pretrained_cfg.label_names or []
        if isinstance(names, list):
            return tuple(names)
        numbered = {int(key): name for key, name in names.items() if key.isdecimal() and len(key) < 10}
        count = self.class_count or 0
        return tuple(numbered.get(number, "") for number in range(count)) if numbered else ()


def split_choice(source: str) -> tuple[Path, str | None]:
    """Split ``RUN:best``, ``RUN:final`` or ``RUN:7`` into the run and its weights; any other source has none of these.

    Raises:
        UsageError: What follows a folder and a colon is no choice.
    """
    folder, colon, choice = source.rpartition(":")
    if not colon or not folder or Path(source).exists() or not Path(folder).is_dir():
        return Path(source), None
    if choice not in ("best", "final") and not (choice.isascii() and choice.isdecimal()):
        raise UsageError(f"{source}: give {folder}:final, {folder}:best, or the number of an epoch that was kept")
    return Path(folder), choice


def config_beside(file: Path) -> Path:
    """Where the description of a weights file is, if it has one: beside it, or above the ``epochs`` of a run."""
    return (file.parent.parent if file.parent.name == EPOCHS_NAME else file.parent) / CONFIG_NAME


@dataclass(frozen=True, kw_only=True)
class _RunSettings:
    classes: list[Name] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class _RunRecord:
    settings: _RunSettings = field(default_factory=_RunSettings)


# Runs of earlier versions have the names of their classes there only. The rest of the file is train.checkpoint's.
_RUN_FORMAT = Format(
    name="zpipe-run", version=1, content=_RunRecord, what="the settings of a run", remedy="restore the file"
)


def is_model_config(path: Path) -> bool:
    """Whether a JSON file is a description of timm's form: other libraries write a config.json, too.

    Raises:
        ZpipeError: The file cannot be read as JSON.
    """
    return "architecture" in _read(path)


def is_transformers_config(path: Path) -> bool:
    """Whether a JSON file describes a model in the form of the transformers library.

    Raises:
        ZpipeError: The file cannot be read as JSON.
    """
    raw = _read(path)
    return "architecture" not in raw and ("model_type" in raw or "architectures" in raw)


def read_model_config(path: Path) -> ModelConfig:
    """Read and check a model's config.json.

    Raises:
        ZpipeError: It is absent, unreadable, of another form, or a value has another type or is out of bounds.
    """
    raw = _read(path)
    if "architecture" not in raw:
        other = "; it is of the transformers library" if "model_type" in raw or "architectures" in raw else ""
        raise ZpipeError(
            f"{path}: not a model description of timm, it names no architecture{other}; give a folder that train-vit "
            "or timm's save_for_hf wrote"
        )
    if "pretrained_cfg" not in raw:  # timm's older form: all fields at the top
        raw = {
            "architecture": raw["architecture"],
            "num_classes": raw.get("num_classes"),
            "pretrained_cfg": {name: raw[name] for name in raw if name in PretrainedConfig.__dataclass_fields__},
            "label_names": raw.get("label_names", raw.get("labels")),
            "model_args": raw.get("model_args", {}),
        }
    raw = {name: value for name, value in raw.items() if value is not None}
    config = decode_json(msgspec.json.encode(raw), path, type=ModelConfig, what="a model description", remedy=REMEDY)
    count = config.class_count
    named = len(config.class_names)
    if count is not None and named and named != count:
        raise ZpipeError(f"{path}: names {named} classes, the model has {count}; {REMEDY}")
    return config


def read_class_names(folder: Path, config: ModelConfig) -> tuple[str, ...]:
    """Names of the classes of the model in a folder, in the order of their numbers; empty if nothing names them.

    Args:
        folder: The folder: of a training run, or of a model that timm saved.
        config: Its description. Where it names no classes, the settings of the run do.

    Raises:
        ZpipeError: The settings of the run cannot be read.
    """
    if config.class_names or not (folder / RUN_NAME).is_file():
        return config.class_names
    return tuple(_RUN_FORMAT.read(folder / RUN_NAME).settings.classes)


def _read(path: Path) -> dict[str, Any]:
    return read_json(path, "a model description", type=dict[str, Any], remedy=REMEDY, max_bytes=MAX_BYTES)


def _numbers(value: Any) -> Iterator[float]:
    """The numbers in a JSON value."""
    if isinstance(value, dict | list):
        for each in value.values() if isinstance(value, dict) else value:
            yield from _numbers(each)
    elif isinstance(value, int | float):
        yield value
