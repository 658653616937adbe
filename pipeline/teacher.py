"""A frozen timm ViT that is ready for attribution, and the digest that identifies it."""

from __future__ import annotations

import difflib
import hashlib
import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import timm
import torch
from timm.models import split_model_name_tag
from torch import Tensor, nn

from zpipe.pipeline.classifier import Classifier, as_classifier
from zpipe.pipeline.shard_reader import PIL_FILTERS
from zpipe.pipeline.teacher_spec import TeacherFiles, TeacherSpec, find_files
from zpipe.schemas.errors import UsageError, ZpipeError, first_line
from zpipe.schemas.model_config import CONFIG_NAME, read_class_names
from zpipe.schemas.weights import fit_names, no_floats, not_finite, prefix_note, read_weights

__all__ = ["DEFAULT_NAME", "Teacher", "TeacherSpec", "load_teacher", "state_digest"]

DEFAULT_NAME = "deit_base_patch16_224"


@dataclass(frozen=True, kw_only=True, eq=False)
class Teacher:
    """A classifier to explain, and what the manifest says about it."""

    model: Classifier
    """The model: in eval mode, without gradients."""
    name: str
    """timm's name of the architecture."""
    weights: str
    """`TeacherSpec.weights` that it was loaded from."""
    digest: str
    """`state_digest` of its weights."""
    num_classes: int
    """Number of classes of its head."""
    image_size: tuple[int, int]
    """Height and width of its input in pixels."""
    grid: tuple[int, int]
    """Height and width of its input in patches."""
    mean: tuple[float, ...]
    """Mean of each channel, subtracted from pixels in 0 to 1."""
    std: tuple[float, ...]
    """Standard deviation of each channel, by which the difference is divided."""
    interpolation: str
    """How images are resized to its input: a name of `zpipe.pipeline.shard_reader.PIL_FILTERS`."""
    crop_pct: float
    """Fraction of the image, 0 to 1, that its own evaluation crops from the centre."""
    model_args: dict[str, Any]
    """The arguments that rebuild it beside `name` and `num_classes`, as JSON values."""
    classes: tuple[str, ...] = ()
    """Names of its classes, "" for one without; empty if nothing names them."""
    note: str = ""
    """What was assumed about it, for the user; empty if everything is known."""


def load_teacher(spec: TeacherSpec, *, device: str | torch.device = "cpu") -> Teacher:
    """Build the model, load its weights and freeze it.

    Args:
        spec: Which teacher to load.
        device: Where the model shall be.

    Raises:
        UsageError: The request contradicts itself or names something that does not exist.
        ZpipeError: The weights cannot be fetched, read or fitted, are not finite, or no family has the model.
    """
    built = _build(spec)
    if bad := not_finite(built.model.state_dict()):
        raise ZpipeError(f"teacher {spec.weights}: {bad} holds NaN or infinity; give weights that did not diverge")
    try:
        model = as_classifier(built.model).eval().requires_grad_(False).to(device)
    except (RuntimeError, AssertionError) as error:  # AssertionError is what a CPU build of torch raises for "cuda"
        raise UsageError(f"device {device}: {first_line(error)}; give a device that torch has here, or cpu") from error
    prepared, note = _preparation(spec, built)
    return Teacher(
        model=model,
        name=built.name,
        weights=spec.weights,
        digest=state_digest(model.model.state_dict()),
        num_classes=model.num_classes,
        image_size=model.image_size,
        grid=model.grid,
        model_args=built.model_args,
        classes=_class_names(built),
        note=note,
        **prepared,
    )


class _Built(NamedTuple):
    """A model with its weights, what rebuilds it, and where it came from."""

    model: Any
    name: str
    model_args: dict[str, Any]
    files: TeacherFiles | None  # None for pretrained and random weights


def _build(spec: TeacherSpec) -> _Built:
    name = spec.name or DEFAULT_NAME
    if spec.path is None:
        if spec.weights == "pretrained":
            model = _pretrained(name, spec)
        else:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(spec.seed)
                model = _create(name, num_classes=spec.num_classes, **spec.model_args)
        _check_family(model, name)
        return _Built(model, name, spec.model_args, None)
    files = find_files(spec)
    # The class token and the head have these names in every teacher, so that a prefix before them is none of its own.
    state = fit_names(read_weights(files.weights), ("cls_token", "head.weight"))
    model_args, classes = spec.model_args, spec.num_classes
    if files.config is not None:
        name, classes = files.config.architecture, files.config.class_count
        model_args = {key: value for key, value in files.config.model_args.items() if key != "num_classes"}
    else:
        classes = _head_classes(files, state, spec.num_classes)
    # First without memory for its weights: a description may ask for any size.
    with torch.device("meta"):
        shape = _create(name, num_classes=classes, **model_args)
    _check_family(shape, name)
    _check_fit(shape, state, files, name)
    model = _create(name, num_classes=classes, **model_args)
    model.load_state_dict(state)
    return _Built(model, name, model_args, files)


def _check_family(model: nn.Module, name: str) -> None:
    try:
        as_classifier(model)
    except ValueError as error:
        raise ZpipeError(f"teacher {name}: {error}; --list-teachers shows those that are known") from error


def _preparation(spec: TeacherSpec, built: _Built) -> tuple[dict[str, Any], str]:
    """How images are prepared: `mean`, `std`, `interpolation` and `crop_pct`; and a note about what is assumed."""
    config = None if built.files is None else built.files.config
    values: dict[str, Any] = {}
    assumed = []
    for field in ("mean", "std", "interpolation", "crop_pct"):
        said = getattr(spec, field)
        if said is None and config is not None:
            said = getattr(config.pretrained_cfg, field)
        if said is None:
            said = built.model.pretrained_cfg[field]
            assumed.append(f"{field} {list(said) if isinstance(said, tuple | list) else said}")
        values[field] = tuple(said) if isinstance(said, tuple | list) else said
    if values["interpolation"] not in PIL_FILTERS:
        raise ZpipeError(
            f"teacher {spec.weights}: resizes images by {values['interpolation']!r}, which is none of "
            f"{', '.join(PIL_FILTERS)}; choose one with --interpolation"
        )
    if len(values["mean"]) != 3:
        raise ZpipeError(f"teacher {spec.weights}: takes {len(values['mean'])} channels, images have 3; give another")
    if built.files is None or not assumed:
        return values, ""
    why = built.files.why_not or f"{CONFIG_NAME} does not say all"
    return values, (
        f"teacher {spec.weights}: how its images are prepared is assumed, {why}: {', '.join(assumed)}; "
        "if it was trained otherwise, give --mean, --std, --interpolation or --crop-pct"
    )


def _class_names(built: _Built) -> tuple[str, ...]:
    files, count = built.files, built.model.num_classes
    if files is None or files.config is None or files.folder is None:
        return ()
    names = read_class_names(files.folder, files.config)
    if len(names) > count:
        raise ZpipeError(f"{files.folder}: names {len(names)} classes, the model has {count}; write the folder again")
    return names


def state_digest(state: dict[str, torch.Tensor]) -> str:
    """SHA-256 (hex) over the tensors of a state dict in the order of their names: name, dtype, shape and bytes.

    The same weights have the same digest whatever their file format, order or device.
    """
    digest = hashlib.sha256()
    for name in sorted(state):
        value = state[name].detach().cpu().contiguous()
        digest.update(f"{name}\0{value.dtype}\0{list(value.shape)}\0".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _check_name(name: str) -> None:
    if ":" in name or "/" in name or not timm.is_model(split_model_name_tag(name)[0]):
        near = difflib.get_close_matches(name, timm.list_models("*vit*") + timm.list_models("deit*"), n=1)
        raise UsageError(f"teacher {name}: timm has no such model" + (f"; did you mean {near[0]}?" if near else ""))


def _create(name: str, **kwargs: Any) -> Any:
    """timm.create_model without weights."""
    _check_name(name)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of layers without weights, which the checks refuse
            return timm.create_model(name, pretrained=False, **kwargs)
    except (
        ArithmeticError,
        AssertionError,
        AttributeError,
        LookupError,
        MemoryError,
        RuntimeError,
        TypeError,
        ValueError,
    ) as error:
        args = ", ".join(f"{key}={value!r}" for key, value in kwargs.items() if value is not None)
        raise UsageError(f"teacher {name} cannot be built with ({args[:200]}): {first_line(error)}") from error


def _pretrained(name: str, spec: TeacherSpec) -> Any:
    _check_name(name)
    known = timm.get_pretrained_cfg(name)
    if known is None or not known.has_weights:
        raise UsageError(f"teacher {name}: timm has no pretrained weights of that name; give a weights file")
    if spec.num_classes not in (None, known.num_classes):
        raise UsageError(
            f"teacher {name}: its pretrained weights know {known.num_classes} classes, not {spec.num_classes}; "
            "train it on your classes first and give that run's folder"
        )
    try:
        return timm.create_model(name, pretrained=True, **spec.model_args)
    except Exception as error:  # timm, the hub client and its transport each raise their own; all mean no weights
        raise ZpipeError(
            f"teacher {name}: its pretrained weights could not be loaded ({_describe(error)}); "
            "fetch them on a machine with network access and give the local file as weights"
        ) from error


def _head_classes(files: TeacherFiles, state: Mapping[str, Tensor], num_classes: int | None) -> int | None:
    head = state.get("head.weight")
    if head is None or head.ndim == 0:
        return num_classes  # the missing key, or its shape, is named later
    if num_classes not in (None, len(head)):
        raise UsageError(
            f"{files.weights}: head.weight knows {len(head)} classes, not {num_classes}; leave num_classes out"
        )
    return len(head)


def _check_fit(model: nn.Module, state: Mapping[str, Tensor], files: TeacherFiles, name: str) -> None:
    """Check that a file holds the model's tensors as they are: a teacher resized while loading would be another one."""
    file, wanted = files.weights, model.state_dict()
    missing, unexpected = sorted(wanted.keys() - state.keys()), sorted(state.keys() - wanted.keys())
    remedy = "give the name and model_args that the weights were made with"
    if files.folder is not None:
        remedy = f"{files.folder / CONFIG_NAME} describes other weights: write both again, or move them apart"
    if missing or unexpected:
        parts = [
            f"{what} {keys[0]}" + (f" and {len(keys) - 1} more" if len(keys) > 1 else "")
            for what, keys in (("has no", missing), ("has the unknown", unexpected))
            if keys
        ]
        raise ZpipeError(f"{file}: does not fit {name}, it {' and '.join(parts)}{prefix_note(state)}; {remedy}")
    for key, value in wanted.items():
        if value.shape != state[key].shape:
            if key == "pos_embed" and files.folder is None and (side := _side_of(model, state[key])):
                remedy = f"its images have {side} pixels: give model_args img_size={side} (--model-arg img_size={side})"
            raise ZpipeError(
                f"{file}: does not fit {name}, {key} is {list(state[key].shape)} in the file and {list(value.shape)} "
                f"in the model; {remedy}"
            )
    if odd := no_floats(state, wanted):
        raise ZpipeError(f"{file}: {odd} is {state[odd].dtype}; give weights of floating-point numbers")


def _side_of(model: Any, positions: Tensor) -> int | None:
    """The side in pixels of the square images that a position table [1, tokens, width] is for; None if not square."""
    if positions.ndim != 3:
        return None
    prefix = model.pos_embed.shape[1] - model.patch_embed.num_patches
    patches = positions.shape[1] - prefix
    side = math.isqrt(max(0, patches))
    return side * model.patch_embed.patch_size[0] if side and side * side == patches else None


def _describe(error: BaseException) -> str:
    return f"{type(error).__name__}: {first_line(error)}"
