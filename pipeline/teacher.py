"""A frozen timm ViT ready for attribution, wherever its weights come from, and the digest that identifies them."""

from __future__ import annotations

import difflib
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import resolve_data_config
from timm.models import load_state_dict, split_model_name_tag
from timm.models.vision_transformer import VisionTransformer

from zpipe.pipeline.relevance import check_supported
from zpipe.schemas.errors import UsageError, ZpipeError, first_line

DEFAULT_NAME = "deit_base_patch16_224"
FILE_SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".tar")  # .tar: timm's own runs write .pth.tar
FOLDER_FILES = ("model.safetensors", "pytorch_model.bin")  # what timm writes beside config.json, the safe form first


@dataclass(frozen=True, kw_only=True, eq=False)
class Teacher:
    """A classifier to be explained, and what a manifest has to say about it.

    `model` is in eval mode, takes no gradient, and has passed `relevance.check_supported`. `name` is timm's name of the
    architecture, `weights` the request that loaded it, `model_args` the arguments that rebuild it beside `name` and
    `num_classes` (JSON values). `image_size` and `grid` are (height, width), in pixels and in patches. Images are
    scaled to 0..1, resized by `interpolation`, and normalised by `mean` and `std`, one number per channel; the teacher's
    own evaluation looks at the centred `crop_pct` of them.
    """

    model: VisionTransformer
    name: str
    weights: str
    digest: str
    num_classes: int
    image_size: tuple[int, int]
    grid: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str
    crop_pct: float
    model_args: dict[str, Any]


def load_teacher(
    name: str | None,
    weights: str,
    *,
    num_classes: int | None = None,
    seed: int = 0,
    model_args: dict[str, Any] | None = None,
    device: str | torch.device = "cpu",
) -> Teacher:
    """Build the model `name` (None: deit_base_patch16_224), load `weights`, freeze it.

    `weights` is one of
        "pretrained"    timm's weights of that name, from its cache or the hub;
        "random"        timm's initialisation, drawn from `seed`; the global random state is left alone;
        a file          a timm state dict as .safetensors, or as .pth, .pt, .bin or .pth.tar, also under the key
                        `model`, `state_dict` or `state_dict_ema` (exponential average first); loaded strictly,
                        nothing resized;
        a folder        what timm's save_for_hf writes and our training runs leave: config.json and model.safetensors.
                        The architecture comes from config.json; `name`, `num_classes` and `model_args` may repeat it.

    `num_classes` None takes the number from the folder, the file's head, or the architecture. `model_args` are further
    arguments of timm.create_model (img_size, patch_size, ...).

    Raises UsageError for a request that contradicts itself or names nothing that exists, ZpipeError for weights that
    cannot be fetched, read or fitted, and for a model whose relevance rules are not implemented.
    """
    weights, model_args = str(weights), _json_args(model_args or {})
    if "num_classes" in model_args:
        raise UsageError(f"model_args: num_classes={model_args['num_classes']!r} is its own option, give it there")
    path = None if weights in ("pretrained", "random") else Path(weights)
    if path is None:
        name = name or DEFAULT_NAME
        if weights == "pretrained":
            model = _pretrained(name, num_classes, model_args)
        else:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                model = _create(name, num_classes=num_classes, **model_args)
    elif path.is_dir():
        name, model_args, num_classes = _read_config(path, name, model_args, num_classes)
        file = next((path / f for f in FOLDER_FILES if (path / f).is_file()), None)
        if file is None:
            raise ZpipeError(f"{path}: holds no {' or '.join(FOLDER_FILES)}; give a finished run's folder")
        state = _read_state(file)
        model = _create(f"local-dir:{path}", num_classes=num_classes)
        _load_strictly(model, state, file, name)
    elif path.is_file():
        name = name or DEFAULT_NAME
        state = _read_state(path)
        model = _create(name, num_classes=_head_classes(path, state, num_classes), **model_args)
        _load_strictly(model, state, path, name)
    else:
        raise UsageError(f"{weights}: no such weights; give 'pretrained', 'random', a weights file or a model folder")

    try:
        check_supported(model)
    except ValueError as error:
        raise ZpipeError(f"teacher {name}: {error}; choose a plain ViT such as {DEFAULT_NAME}") from error
    bad = next((key for key, value in model.state_dict().items() if not value.isfinite().all()), None)
    if bad is not None:
        raise ZpipeError(f"teacher {weights}: {bad} holds NaN or infinity; give weights that did not diverge")
    try:
        model = model.eval().requires_grad_(False).to(device)
    except (RuntimeError, AssertionError) as error:  # AssertionError is what a CPU build of torch says to "cuda"
        raise UsageError(f"device {device}: {first_line(error)}; give a device that torch has here, or cpu") from error

    vit: VisionTransformer = model
    data = resolve_data_config(model=model)
    return Teacher(
        model=vit,
        name=name,
        weights=weights,
        digest=state_digest(model.state_dict()),
        num_classes=vit.num_classes,
        image_size=tuple(vit.patch_embed.img_size),
        grid=tuple(vit.patch_embed.grid_size),
        mean=tuple(data["mean"]),
        std=tuple(data["std"]),
        interpolation=data["interpolation"],
        crop_pct=data["crop_pct"],
        model_args=model_args,
    )


def state_digest(state: dict[str, torch.Tensor]) -> str:
    """sha256, hex, over the tensors of a state dict in the order of their names: name, dtype, shape and bytes.

    The same weights have the same digest in whatever file format, order or device they come.
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


def _pretrained(name: str, num_classes: int | None, model_args: dict[str, Any]) -> torch.nn.Module:
    _check_name(name)
    known = timm.get_pretrained_cfg(name)
    if known is None or not known.has_weights:
        raise UsageError(f"teacher {name}: timm has no pretrained weights of that name; give a weights file")
    if num_classes not in (None, known.num_classes):
        raise UsageError(
            f"teacher {name}: its pretrained weights know {known.num_classes} classes, not {num_classes}; "
            "train it on your classes first and give that run's folder"
        )
    try:
        return timm.create_model(name, pretrained=True, **model_args)
    except Exception as error:  # timm, the hub client and its transport each have their own; all mean no weights
        raise ZpipeError(
            f"teacher {name}: its pretrained weights could not be loaded ({_named(error)}); "
            "fetch them on a machine with network access and give the local file as weights"
        ) from error


def _read_config(
    folder: Path, name: str | None, model_args: dict[str, Any], num_classes: int | None
) -> tuple[str, dict[str, Any], int | None]:
    """Name, model arguments and number of classes from a folder's config.json, held against what was asked."""
    file = folder / "config.json"
    if not file.is_file():
        raise ZpipeError(f"{folder}: holds no config.json; give a folder written by a training run, or a weights file")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        known = config["architecture"]
        saved_args = dict(config.get("model_args") or {})
        classes = config.get("num_classes", config.get("pretrained_cfg", {}).get("num_classes"))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ZpipeError(f"{file}: not a timm model config ({_named(error)}); write the folder again") from error
    if not isinstance(known, str) or not timm.is_model(known):
        raise ZpipeError(f"{file}: architecture {known!r} is not a model of timm {timm.__version__}; write it again")
    # A tag names a set of pretrained weights; the folder brings its own, so only the architecture has to agree.
    if name is not None and split_model_name_tag(name)[0] != known:
        raise UsageError(f"{file}: architecture is {known}, not {name}; leave the name out or give the right folder")
    for key, value in model_args.items():
        # timm writes the sizes it was given as one number as a pair
        if key not in saved_args or saved_args[key] not in (value, [value, value]):
            raise UsageError(f"{file}: model_args has {key}={saved_args.get(key)!r}, not {value!r}; leave {key} out")
    classes = saved_args.pop("num_classes", classes)
    if num_classes is not None and num_classes != classes:
        raise UsageError(f"{file}: num_classes is {classes}, not {num_classes}; leave num_classes out")
    return known, saved_args, classes


def _read_state(file: Path) -> dict[str, torch.Tensor]:
    if file.suffix not in FILE_SUFFIXES:
        raise UsageError(f"{file}: unknown kind of weights file; give one of {', '.join(FILE_SUFFIXES)}")
    try:
        state = load_state_dict(str(file), use_ema=True, device="cpu", weights_only=True)
    except Exception as error:  # a damaged file fails anywhere inside zip, pickle or safetensors, each in its own way
        raise ZpipeError(
            f"{file}: cannot be read as weights ({_named(error)}); "
            "it is damaged or no state dict, fetch or save it again"
        ) from error
    odd = next((key for key, value in state.items() if not isinstance(value, torch.Tensor)), None)
    if odd is not None or not state:
        held = f"{odd!r} is a {type(state[odd]).__name__}, not a tensor" if odd is not None else "it is empty"
        raise ZpipeError(f"{file}: not a state dict, {held}; save the state_dict() alone or under 'model'")
    return state


def _head_classes(file: Path, state: dict[str, torch.Tensor], num_classes: int | None) -> int | None:
    head = state.get("head.weight")
    if head is None:
        return num_classes  # strict loading names the missing key
    if num_classes not in (None, len(head)):
        raise UsageError(f"{file}: head.weight knows {len(head)} classes, not {num_classes}; leave num_classes out")
    return len(head)


def _load_strictly(model: torch.nn.Module, state: dict[str, torch.Tensor], file: Path, name: str) -> None:
    """Load the file's tensors as they are: a teacher resized on the way in would not be the model in the file."""
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


def _named(error: BaseException) -> str:
    return f"{type(error).__name__}: {first_line(error)}"
