"""A frozen ViT that is ready for attribution, and the digest that identifies it."""

from __future__ import annotations

import difflib
import hashlib
import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from timm.layers import resample_abs_pos_embed
from timm.models import split_model_name_tag
from torch import Tensor, nn

from zpipe.pipeline import torchvision_models, transformers_models
from zpipe.pipeline.classifier import Classifier, as_classifier
from zpipe.pipeline.heads import other_head
from zpipe.pipeline.shard_reader import PIL_FILTERS
from zpipe.pipeline.teacher_spec import BUILD_ERRORS, TORCHVISION, TRANSFORMERS, TeacherFiles, TeacherSpec, find_files
from zpipe.pipeline.timm_models import embedding_widths
from zpipe.schemas.errors import UsageError, ZpipeError, first_line
from zpipe.schemas.manifest import Provenance
from zpipe.schemas.model_config import CONFIG_NAME, read_class_names
from zpipe.schemas.weights import fit_names, no_floats, not_finite, prefix_note, read_weights

__all__ = ["DEFAULT_NAME", "Teacher", "TeacherSpec", "load_teacher", "load_teacher_of", "state_digest"]

DEFAULT_NAME = "deit_base_patch16_224"
PREPARATION = ("mean", "std", "interpolation", "crop_pct")
HEADS = ("head.weight", "heads.head.weight")  # timm's name of the classifier, and torchvision's
POSITIONS = {"pos_embed", "encoder.pos_embedding"}  # likewise, of the table of absolute positions


@dataclass(frozen=True, kw_only=True, eq=False)
class Teacher:
    """A classifier to explain, and what the manifest says about it."""

    model: Classifier
    """The model: in eval mode, without gradients."""
    name: str
    """Its name, as `TeacherSpec.name` takes it."""
    weights: str
    """`TeacherSpec.weights` that it was loaded from."""
    digest: str
    """`state_digest` of its weights; with a head in place of its own, of the weights of both."""
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
    head_frame: str = ""
    """What it saw of an image when its head was fitted: a name of `zpipe.pipeline.shard_reader.FRAMES`; empty if its
    head is its own, or made of class embeddings."""


def load_teacher(spec: TeacherSpec, *, device: str | torch.device = "cpu", needs_classes: bool = True) -> Teacher:
    """Build the model, load its weights and freeze it.

    Args:
        spec: Which teacher to load.
        device: Where the model shall be.
        needs_classes: Whether a model without any head is refused.

    Raises:
        UsageError: The request contradicts itself or names something that does not exist.
        ZpipeError: The weights cannot be fetched, read or fitted, are not finite, or no family has the model.
    """
    built = _build(spec)
    if bad := not_finite(built.model.state_dict()):
        raise ZpipeError(f"teacher {spec.weights}: {bad} holds NaN or infinity; give weights that did not diverge")
    digest = state_digest(built.model.state_dict())
    own = as_classifier(built.model, own_head=spec.own_head).eval()
    prepared, note = _preparation(spec, built, own.channels)
    other = other_head(spec, own, digest, prepared)
    model = as_classifier(built.model, other.head, spec.own_head)
    if other.head is not None:
        digest = state_digest(model.state_dict())
    elif needs_classes:
        _check_classes(spec, built, own.num_classes)
    try:
        model = model.eval().requires_grad_(False).to(device)
    except (RuntimeError, AssertionError) as error:  # AssertionError is what a CPU build of torch raises for "cuda"
        raise UsageError(f"device {device}: {first_line(error)}; give a device that torch has here, or cpu") from error
    return Teacher(
        model=model,
        name=built.name,
        weights=spec.weights,
        digest=digest,
        num_classes=model.num_classes,
        image_size=model.image_size,
        grid=model.grid,
        model_args=built.model_args if spec.own_head is None else built.model_args | {"own_head": spec.own_head},
        classes=built.classes if other.head is None else other.classes,
        note="; ".join(each for each in (note, other.note) if each),
        head_frame=other.frame,
        **prepared,
    )


def load_teacher_of(
    store: Path | str, origin: Provenance, *, weights: str | None = None, device: str | torch.device = "cpu"
) -> Teacher:
    """Load the teacher that made the maps of a store.

    Args:
        store: The store, for messages.
        origin: What its maps were made with.
        weights: Where the weights are now; None if they are where they were.
        device: Where the model shall be.

    Raises:
        UsageError: The store was made without a teacher, or its weights or its head are not there.
        ZpipeError: Other weights lie in their place, or they cannot be loaded.
    """
    if not origin.teacher:
        raise UsageError(f"{store}: holds no maps of a teacher; give a store that does")
    spec = TeacherSpec.of(origin, weights)
    where = "(a relative path counts from the current folder)"
    if spec.path is not None and not spec.path.exists():
        raise UsageError(
            f"{store}: its teacher's weights {spec.path} are not there {where}; put them back, or say where they are "
            "with --weights"
        )
    for what, file in (("head", spec.head), ("class embeddings", spec.class_embeddings)):
        if file is not None and not Path(file).exists():
            raise UsageError(f"{store}: the {what} of its teacher, {file}: no such file {where}; put the file back")
    teacher = load_teacher(spec, device=device)
    if teacher.digest != origin.teacher_digest:
        raise ZpipeError(
            f"{spec.weights}: holds other weights (digest {teacher.digest[:12]}) than those that {store} was made with "
            f"({origin.teacher_digest[:12]}); put these back, or say where they are with --weights"
        )
    return teacher


class _Built(NamedTuple):
    """A model with its weights, what rebuilds it, and what is known about it."""

    model: Any
    name: str
    model_args: dict[str, Any]
    known: Mapping[str, Any] = {}  # of mean, std, interpolation and crop_pct, what is said beside the weights
    usual: Mapping[str, Any] = {}  # all four, as they are with the library's own weights of the architecture
    why_not: str = ""  # why not all are known; empty if the usual ones belong to the weights
    classes: tuple[str, ...] = ()
    note: str = ""


def _build(spec: TeacherSpec) -> _Built:
    if spec.library == "transformers":
        built = _of_transformers(spec)
    elif spec.path is not None:
        built = _of_file(spec)
    elif spec.library == "torchvision":
        built = _of_torchvision(spec)
    else:
        built = _of_timm(spec)
    _check_family(built.model, built.name, spec.own_head)
    return built


def _of_timm(spec: TeacherSpec) -> _Built:
    name = spec.name or DEFAULT_NAME
    if spec.weights == "pretrained":
        model = _pretrained(name, spec)
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(spec.seed)
            model = _create(name, num_classes=spec.num_classes, **spec.model_args)
    return _Built(model, name, spec.model_args, usual=_usual(model, name))


def _of_torchvision(spec: TeacherSpec) -> _Built:
    name = str(spec.name)
    if spec.weights == "pretrained":
        model, classes = torchvision_models.pretrained(name, spec.model_args, spec.num_classes)
    else:
        classes = ()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(spec.seed)
            model = _create(name, num_classes=spec.num_classes, **spec.model_args)
    return _Built(model, name, spec.model_args, usual=_usual(model, name), classes=classes)


def _of_transformers(spec: TeacherSpec) -> _Built:
    if spec.resize_positions:
        raise UsageError("--resize-positions: is for weights files of timm and torchvision; leave it out")
    wanted = (spec.name or "").removeprefix(TRANSFORMERS)
    if spec.weights == "random":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(spec.seed)
            model = transformers_models.create(wanted, spec.model_args, spec.num_classes)
        return _Built(model, str(spec.name), spec.model_args, usual=transformers_models.usual_preparation(model))
    folder, file = (transformers_models.fetch_folder(wanted), None) if spec.path is None else spec.folder_and_file()
    loaded = transformers_models.load_folder(folder, file, spec.model_args)
    architecture, count = type(loaded.model).__name__, loaded.model.config.num_labels
    if wanted in transformers_models.ARCHITECTURES and wanted != architecture:
        raise UsageError(f"{folder / CONFIG_NAME}: describes a {architecture}, not {wanted}; leave the name out")
    if spec.num_classes not in (None, count):
        raise UsageError(f"{folder / CONFIG_NAME}: num_classes is {count}, not {spec.num_classes}; leave it out")
    return _Built(
        loaded.model,
        spec.name or f"{TRANSFORMERS}{architecture}",
        loaded.model_args,
        known=loaded.prepared,
        usual=transformers_models.usual_preparation(loaded.model),
        why_not=f"{folder} does not say all",
        classes=loaded.classes,
        note=loaded.note,
    )


def _of_file(spec: TeacherSpec) -> _Built:
    files = find_files(spec)
    name, classes, model_args = spec.name or DEFAULT_NAME, spec.num_classes, spec.model_args
    if files.config is not None:
        name, classes = files.config.architecture, files.config.class_count
        model_args = {key: value for key, value in files.config.model_args.items() if key != "num_classes"}
    state = read_weights(files.weights)
    # First without memory for its weights: a description may ask for any size.
    shape = _without_memory(name, classes, model_args)
    state = fit_names(state, shape.state_dict())
    if files.config is None:
        classes = _head_classes(files, state, spec.num_classes)
        shape = _without_memory(name, classes, model_args)
    _check_family(shape, name, spec.own_head)
    if spec.resize_positions:
        state = _with_resized_positions(state, shape)
    _check_fit(shape, state, files, name)
    model = _create(name, num_classes=classes, **model_args)
    model.load_state_dict(state)
    known = {} if files.config is None else vars(files.config.pretrained_cfg)
    return _Built(
        model,
        name,
        model_args,
        known={key: known.get(key) for key in PREPARATION if known.get(key) is not None},
        usual=_usual(model, name),
        why_not=files.why_not or f"{CONFIG_NAME} does not say all",
        classes=_class_names(files, model.num_classes),
    )


def _without_memory(name: str, classes: int | None, model_args: Mapping[str, Any]) -> Any:
    with torch.device("meta"):
        return _create(name, num_classes=classes, **model_args)


def _usual(model: Any, name: str) -> Mapping[str, Any]:
    if not name.startswith(TORCHVISION):
        return {key: model.pretrained_cfg[key] for key in PREPARATION}
    return torchvision_models.preparation(name)


def _check_family(model: nn.Module, name: str, own_head: str | None) -> None:
    try:
        as_classifier(model)
    except ValueError as error:
        raise ZpipeError(f"teacher {name}: {error}; --list-teachers shows those that are known") from error
    try:
        as_classifier(model, own_head=own_head)
    except ValueError as error:
        raise UsageError(f"--own-head {own_head}: {error}; leave it out") from error


def _check_classes(spec: TeacherSpec, built: _Built, count: int) -> None:
    """Check that the model's own head is a classifier.

    Weights that name their classes are one, and a request for that number of classes says so.
    """
    remedy = "fit one with zpipe fit-head and give it as --head, or give --class-embeddings"
    if not count:
        raise ZpipeError(f"teacher {built.name}: {spec.weights} has no classification head; {remedy}")
    if spec.num_classes is None and not built.classes and count in embedding_widths(built.name):
        raise ZpipeError(
            f"teacher {built.name}: {spec.weights} has no classification head, its {count} outputs are the embedding "
            f"that images and texts share; {remedy}; if they are classes, give --num-classes {count}"
        )


def _preparation(spec: TeacherSpec, built: _Built, channels: int) -> tuple[dict[str, Any], str]:
    """How images are prepared: `mean`, `std`, `interpolation` and `crop_pct`; and a note about what is assumed."""
    values: dict[str, Any] = {}
    assumed = []
    for field in PREPARATION:
        said = getattr(spec, field)
        if said is None:
            said = built.known.get(field)
        if said is None:
            said = built.usual[field]
            assumed.append(f"{field} {list(said) if isinstance(said, tuple | list) else said}")
        values[field] = tuple(said) if isinstance(said, tuple | list) else said
    if values["interpolation"] not in PIL_FILTERS:
        raise ZpipeError(
            f"teacher {spec.weights}: resizes images by {values['interpolation']!r}, which is none of "
            f"{', '.join(PIL_FILTERS)}; choose one with --interpolation"
        )
    for count in (channels, len(values["mean"]), len(values["std"])):
        if count != 3:
            raise ZpipeError(f"teacher {spec.weights}: takes {count} channels, images have 3; give another")
    notes = [f"teacher {spec.weights}: {built.note}"] if built.note else []
    if built.why_not and assumed:
        notes.append(
            f"teacher {spec.weights}: how its images are prepared is assumed, {built.why_not}: {', '.join(assumed)}; "
            "if it was trained otherwise, give --mean, --std, --interpolation or --crop-pct"
        )
    return values, "; ".join(notes)


def _class_names(files: TeacherFiles, count: int) -> tuple[str, ...]:
    if files.config is None or files.folder is None:
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
    """A model of timm or torchvision without weights."""
    of_torchvision = name.startswith(TORCHVISION)
    create = torchvision_models.create if of_torchvision else timm.create_model
    torchvision_models.split_name(name) if of_torchvision else _check_name(name)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of layers without weights, which the checks refuse
            return create(name, **kwargs)
    except BUILD_ERRORS as error:
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
    name = next((each for each in HEADS if each in state), None)
    if name is None:
        return num_classes or 0  # An encoder has no head. If one was requested, `_check_fit` names the missing tensors.
    head = state[name]
    if head.ndim == 0:
        return num_classes  # its shape is named later
    if num_classes not in (None, len(head)):
        raise UsageError(f"{files.weights}: {name} knows {len(head)} classes, not {num_classes}; leave num_classes out")
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
            if files.folder is None and (side := _side_of(model, key, state[key])):
                size = f"{'image_size' if name.startswith(TORCHVISION) else 'img_size'}={side}"
                remedy = f"its images have {side} pixels: give model_args {size} (--model-arg {size})"
                if key in POSITIONS:
                    remedy += ", or --resize-positions"
            raise ZpipeError(
                f"{file}: does not fit {name}, {key} is {list(state[key].shape)} in the file and {list(value.shape)} "
                f"in the model; {remedy}"
            )
    if odd := no_floats(state, wanted):
        raise ZpipeError(f"{file}: {odd} is {state[odd].dtype}; give weights of floating-point numbers")


def _with_resized_positions(state: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """The state with a square table of positions resized to the model's grid; any other is left for the check."""
    layout, own, resized = as_classifier(model), model.state_dict(), dict(state)
    for name in POSITIONS & state.keys() & own.keys():
        side = _side_of(model, name, state[name])
        if side is not None and state[name].shape != own[name].shape:
            old = side // (layout.image_size[0] // layout.grid[0])
            prefix = state[name].shape[1] - old**2
            resized[name] = resample_abs_pos_embed(
                state[name], list(layout.grid), [old, old], num_prefix_tokens=prefix, antialias=False
            )
    return resized


def _side_of(model: nn.Module, name: str, positions: Tensor) -> int | None:
    """The side in pixels of the square images that a table of positions is for; None if it is not for such images.

    Absolute positions are [1, tokens, width]; BEiT's relative ones [distances, heads].
    """
    layout, own = as_classifier(model), model.state_dict()[name]
    if name.endswith("relative_position_bias_table") and positions.ndim == own.ndim == 2:
        extra = own.shape[0] - (2 * layout.grid[0] - 1) * (2 * layout.grid[1] - 1)  # distances to the class token
        width = math.isqrt(max(0, positions.shape[0] - extra))
        side = (width + 1) // 2 if width % 2 and width**2 == positions.shape[0] - extra else 0
    elif name in POSITIONS and positions.ndim == own.ndim == 3:
        patches = positions.shape[1] - own.shape[1] + layout.grid[0] * layout.grid[1]
        side = math.isqrt(max(0, patches))
        side = side if side**2 == patches else 0
    else:
        return None
    return side * (layout.image_size[0] // layout.grid[0]) or None


def _describe(error: BaseException) -> str:
    return f"{type(error).__name__}: {first_line(error)}"
