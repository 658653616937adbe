"""A frozen timm ViT that is ready for attribution, and the digest that identifies it."""

from __future__ import annotations

import difflib
import hashlib
import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import resolve_data_config
from timm.models import load_state_dict, split_model_name_tag
from timm.models.vision_transformer import VisionTransformer

from zpipe.pipeline.supported import check_supported
from zpipe.schemas.errors import UsageError, ZpipeError, first_line
from zpipe.schemas.secrets import refuse_secret
from zpipe.schemas.storage import as_local

DEFAULT_NAME = "deit_base_patch16_224"
FILE_SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".tar")  # .tar: timm's own training runs write .pth.tar
FOLDER_FILES = ("model.safetensors", "pytorch_model.bin")  # what timm writes beside config.json, the safe form first


@dataclass(frozen=True, kw_only=True)
class TeacherSpec:
    """Which teacher to load: what `load_teacher` needs to build the same one in any process.

    Raises:
        UsageError: `model_args` cannot be written as JSON, or name the number of classes.
    """

    name: str | None = None
    """timm's name of the architecture. None takes the one of the weights folder, else deit_base_patch16_224."""
    weights: str = "pretrained"
    """Where the weights come from:

    - ``pretrained``: timm's weights of that name, from its cache or the hub.
    - ``random``: timm's initialisation, drawn from `seed`; the global random state is left alone.
    - a file: a timm state dict as .safetensors, .pth, .pt, .bin or .pth.tar, also under the key `model`, `state_dict`
      or `state_dict_ema` (the exponential average is preferred). It is loaded strictly, and nothing is resized.
    - a folder: what timm's `save_for_hf` and our training runs write, config.json and model.safetensors. The
      architecture comes from config.json; `name`, `num_classes` and `model_args` may repeat it.
    """
    num_classes: int | None = None
    """Number of classes. None takes it from the folder, the head in the file, or the architecture."""
    model_args: dict[str, Any] = field(default_factory=dict)
    """Further arguments of `timm.create_model` (img_size, patch_size, ...), as JSON values."""
    seed: int = 0
    """Seed of random weights."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "weights", str(self.weights))
        refuse_secret(self.weights)
        object.__setattr__(self, "model_args", _json_args(self.model_args))
        if "num_classes" in self.model_args:
            number = self.model_args["num_classes"]
            raise UsageError(f"model_args: num_classes={number!r} is its own option, give it there")

    @property
    def path(self) -> Path | None:
        """The file or folder of the weights; None for ``pretrained`` and ``random``."""
        return None if self.weights in ("pretrained", "random") else as_local(self.weights)

    def resolved(self) -> TeacherSpec:
        """The same teacher with an absolute path to its weights, for processes that start in other folders."""
        return self if self.path is None else replace(self, weights=str(self.path.resolve()))


@dataclass(frozen=True, kw_only=True, eq=False)
class Teacher:
    """A classifier to explain, and what the manifest says about it."""

    model: VisionTransformer
    """The model: in eval mode, without gradients, and accepted by `check_supported`."""
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


def load_teacher(spec: TeacherSpec, *, device: str | torch.device = "cpu") -> Teacher:
    """Build the model, load its weights and freeze it.

    Args:
        spec: Which teacher to load.
        device: Where the model shall be.

    Raises:
        UsageError: The request contradicts itself or names something that does not exist.
        ZpipeError: The weights cannot be fetched, read or fitted, or the relevance rules of the model are not
            implemented.
    """
    model, name, model_args = _build(spec)
    try:
        check_supported(model)
    except ValueError as error:
        raise ZpipeError(f"teacher {name}: {error}; choose a plain ViT such as {DEFAULT_NAME}") from error
    bad = next((key for key, value in model.state_dict().items() if not value.isfinite().all()), None)
    if bad is not None:
        raise ZpipeError(f"teacher {spec.weights}: {bad} holds NaN or infinity; give weights that did not diverge")
    try:
        vit: VisionTransformer = model.eval().requires_grad_(False).to(device)
    except (RuntimeError, AssertionError) as error:  # AssertionError is what a CPU build of torch raises for "cuda"
        raise UsageError(f"device {device}: {first_line(error)}; give a device that torch has here, or cpu") from error

    data = resolve_data_config(model=vit)
    return Teacher(
        model=vit,
        name=name,
        weights=spec.weights,
        digest=state_digest(vit.state_dict()),
        num_classes=vit.num_classes,
        image_size=tuple(vit.patch_embed.img_size),
        grid=tuple(vit.patch_embed.grid_size),
        mean=tuple(data["mean"]),
        std=tuple(data["std"]),
        interpolation=data["interpolation"],
        crop_pct=data["crop_pct"],
        model_args=model_args,
    )


def _build(spec: TeacherSpec) -> tuple[torch.nn.Module, str, dict[str, Any]]:
    """The model with its weights, timm's name of it, and the arguments that rebuild it."""
    path, name = spec.path, spec.name or DEFAULT_NAME
    if path is None:
        if spec.weights == "pretrained":
            return _pretrained(name, spec), name, spec.model_args
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(spec.seed)
            return _create(name, num_classes=spec.num_classes, **spec.model_args), name, spec.model_args
    if path.is_dir():
        name, model_args, num_classes = _read_config(path, spec)
        file = next((path / f for f in FOLDER_FILES if (path / f).is_file()), None)
        if file is None:
            raise ZpipeError(f"{path}: holds no {' or '.join(FOLDER_FILES)}; give a finished run's folder")
        state = _read_state(file)
        model = _create(f"local-dir:{path}", num_classes=num_classes)
        _load_strictly(model, state, file, name)
        return model, name, model_args
    if path.is_file():
        state = _read_state(path)
        model = _create(name, num_classes=_head_classes(path, state, spec.num_classes), **spec.model_args)
        _load_strictly(model, state, path, name)
        return model, name, spec.model_args
    raise UsageError(f"{spec.weights}: no such weights; give 'pretrained', 'random', a weights file or a model folder")


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


def _json_args(model_args: dict[str, Any]) -> dict[str, Any]:
    try:
        return json.loads(json.dumps(model_args))
    except (TypeError, ValueError) as error:
        raise UsageError(f"model_args: {error}; a manifest must be able to hold them, give JSON values") from error


def _check_name(name: str) -> None:
    if ":" in name or "/" in name or not timm.is_model(split_model_name_tag(name)[0]):
        near = difflib.get_close_matches(name, timm.list_models("*vit*") + timm.list_models("deit*"), n=1)
        raise UsageError(f"teacher {name}: timm has no such model" + (f"; did you mean {near[0]}?" if near else ""))


def _create(name: str, **kwargs: Any) -> torch.nn.Module:
    """timm.create_model without weights; `name` may be a "local-dir:" source."""
    if not name.startswith("local-dir:"):
        _check_name(name)
    try:
        return timm.create_model(name, pretrained=False, **kwargs)
    except (AssertionError, AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        args = ", ".join(f"{key}={value!r}" for key, value in kwargs.items() if value is not None)
        raise UsageError(f"teacher {name} cannot be built with ({args}): {first_line(error)}") from error


def _pretrained(name: str, spec: TeacherSpec) -> torch.nn.Module:
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


def _read_config(folder: Path, spec: TeacherSpec) -> tuple[str, dict[str, Any], int | None]:
    """Name, model arguments and number of classes from a folder's config.json, which `spec` may not contradict."""
    file = folder / "config.json"
    if not file.is_file():
        raise ZpipeError(f"{folder}: holds no config.json; give a folder written by a training run, or a weights file")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        known = config["architecture"]
        saved_args = dict(config.get("model_args") or {})
        classes = config.get("num_classes", config.get("pretrained_cfg", {}).get("num_classes"))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ZpipeError(f"{file}: not a timm model config ({_describe(error)}); write the folder again") from error
    if not isinstance(known, str) or not timm.is_model(known):
        raise ZpipeError(f"{file}: architecture {known!r} is not a model of timm {timm.__version__}; write it again")
    # A tag names a set of pretrained weights; the folder brings its own, so only the architecture has to agree.
    if spec.name is not None and split_model_name_tag(spec.name)[0] != known:
        raise UsageError(
            f"{file}: architecture is {known}, not {spec.name}; leave the name out or give the right folder"
        )
    for key, value in spec.model_args.items():
        # timm writes some sizes as pairs, though the argument was one number.
        if key not in saved_args or saved_args[key] not in (value, [value, value]):
            raise UsageError(f"{file}: model_args has {key}={saved_args.get(key)!r}, not {value!r}; leave {key} out")
    classes = saved_args.pop("num_classes", classes)
    if spec.num_classes is not None and spec.num_classes != classes:
        raise UsageError(f"{file}: num_classes is {classes}, not {spec.num_classes}; leave num_classes out")
    return known, saved_args, classes


def _read_state(file: Path) -> dict[str, torch.Tensor]:
    if file.suffix not in FILE_SUFFIXES:
        raise UsageError(f"{file}: unknown kind of weights file; give one of {', '.join(FILE_SUFFIXES)}")
    try:
        state = load_state_dict(str(file), use_ema=True, device="cpu", weights_only=True)
    except Exception as error:  # a damaged file fails anywhere in zip, pickle or safetensors, each in its own way
        raise ZpipeError(
            f"{file}: cannot be read as weights ({_describe(error)}); "
            "it is damaged or no state dict, fetch or save it again"
        ) from error
    odd = next((key for key, value in state.items() if not isinstance(value, torch.Tensor)), None)
    if odd is not None or not state:
        reason = f"{odd!r} is a {type(state[odd]).__name__}, not a tensor" if odd is not None else "it is empty"
        raise ZpipeError(f"{file}: not a state dict, {reason}; save the state_dict() alone or under 'model'")
    return state


def _head_classes(file: Path, state: dict[str, torch.Tensor], num_classes: int | None) -> int | None:
    head = state.get("head.weight")
    if head is None:
        return num_classes  # strict loading names the missing key
    if num_classes not in (None, len(head)):
        raise UsageError(f"{file}: head.weight knows {len(head)} classes, not {num_classes}; leave num_classes out")
    return len(head)


def _load_strictly(model: torch.nn.Module, state: dict[str, torch.Tensor], file: Path, name: str) -> None:
    """Load the tensors of the file as they are: a teacher resized while loading would not be the model in the file."""
    wanted = model.state_dict()
    missing, unexpected = sorted(wanted.keys() - state.keys()), sorted(state.keys() - wanted.keys())
    remedy = "give the name and model_args that the weights were made with"
    if missing or unexpected:
        parts = [
            f"{what} {keys[0]}" + (f" and {len(keys) - 1} more" if len(keys) > 1 else "")
            for what, keys in (("has no", missing), ("has the unknown", unexpected))
            if keys
        ]
        raise ZpipeError(f"{file}: does not fit {name}, it {' and '.join(parts)}; {remedy}")
    for key, value in wanted.items():
        if value.shape != state[key].shape:
            raise ZpipeError(
                f"{file}: does not fit {name}, {key} is {list(state[key].shape)} in the file and {list(value.shape)} "
                f"in the model; {remedy}"
            )
    model.load_state_dict(state)


def _describe(error: BaseException) -> str:
    return f"{type(error).__name__}: {first_line(error)}"
