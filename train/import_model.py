"""Other people's weights, written as a finished run that every other verb takes."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import timm
from timm.data import ImageNetInfo
from timm.layers import to_2tuple
from timm.models import is_model
from torch import nn

from zpipe.schemas.atomic import claim_folder
from zpipe.schemas.errors import UsageError, ZpipeError, first_line
from zpipe.schemas.model_config import CONFIG_NAME, read_class_names, read_model_config
from zpipe.schemas.names import printable
from zpipe.schemas.storage import as_local, read_file
from zpipe.schemas.weights import fit_names, not_finite, read_weights
from zpipe.train.checkpoint import Preprocessing, load_run, save_model, save_zoomer
from zpipe.train.models.release import MODELS, load_release
from zpipe.train.models.released_weights import ReleasedWeights
from zpipe.train.models.zoomer import Zoomer
from zpipe.train.run_files import RUN_NAME, ZOOMER

IMAGENET_CLASSES = 1000
IMAGENET = "imagenet-1k"
MAX_NAMES_BYTES = 16 << 20
# How the authors of the released models prepare the images of an evaluation: mean and standard deviation of ImageNet,
# and the side of the centre crop as a fraction of the shorter side.
_CROP = {"zoomvit": 1.0, "cfvit": 0.875, "lfvit": 0.875, "sparseformer": 0.875, "deit": 0.875, "deit3": 1.0}
# DeiT's models by their width; all have 12 blocks and heads of 64 channels.
_DEIT_SIZES = {192: "tiny", 384: "small", 768: "base"}
_DEIT3_SIZES = {(384, 12): "small", (512, 12): "medium", (768, 12): "base", (1024, 24): "large", (1280, 32): "huge"}
KINDS = ("timm", *MODELS, "deit")


@dataclass(frozen=True, kw_only=True)
class ImportConfig:
    """What the weights do not say of a model.

    Raises:
        UsageError: A value is out of range.
    """

    file: str | None = None
    """Weights file for `timm:NAME`; None for timm's pretrained weights."""

    model_args: dict[str, Any] = field(default_factory=dict)
    """What does not follow from the shapes of the weights, such as num_heads, see `load_release`; for `timm:NAME`,
    arguments of the model's constructor."""

    classes: str | None = None
    """Names of the classes: a text file with one name a line, `imagenet-1k`, or `none`. None takes those of the source,
    and ImageNet's for 1,000 classes without names."""

    mean: tuple[float, float, float] | None = None
    """Mean of the channels, to normalise images by. None for that of the source, or of its authors' code."""

    std: tuple[float, float, float] | None = None
    """Standard deviation of the channels, as `mean`."""

    crop_pct: float | None = None
    """Side of the centre crop in evaluation as a fraction of the shorter side of an image, as `mean`."""

    def __post_init__(self) -> None:
        if self.crop_pct is not None and not 0.01 <= self.crop_pct <= 1:
            raise UsageError(f"--crop-pct {self.crop_pct:g}: give a fraction in [0.01, 1]")
        for name, low in (("mean", -10.0), ("std", 1e-4)):
            if any(not low <= value <= 10 for value in getattr(self, name) or ()):
                raise UsageError(f"--{name} {getattr(self, name)}: give three numbers from {low:g} to 10")


@dataclass(frozen=True, kw_only=True)
class Imported:
    """A model with what belongs to it."""

    model: nn.Module
    """The model, in eval mode."""
    preprocessing: Preprocessing
    """How its images are prepared."""
    classes: tuple[str, ...]
    """Names of its classes; empty if they have none."""
    zoomer: Zoomer | None = None
    """The zoomer that was released with a ZoomViT."""

    @property
    def parameters(self) -> int:
        """The number of weights, those of the zoomer included."""
        parts = [part for part in (self.model, self.zoomer) if part is not None]
        return sum(weight.numel() for part in parts for weight in part.parameters())


def import_model(source: str, out: Path, config: ImportConfig) -> Imported:
    """Write a model of someone else as a finished run.

    Args:
        source: `timm:NAME`, a folder that timm's `save_for_hf` or `train-vit` wrote, or a checkpoint that a paper's
            authors published: `zoomvit:FILE`, `cfvit:FILE`, `lfvit:FILE`, `sparseformer:FILE` or `deit:FILE`.
        out: The run folder: new or empty.
        config: What the weights do not say.

    Raises:
        UsageError: There is no such source, or it needs a setting that is not given, or has no such setting.
        ZpipeError: The weights can't be read, are not of such a model, or `out` can't be written.
    """
    out = Path(out)
    if os.path.lexists(out / RUN_NAME) or os.path.lexists(out / CONFIG_NAME):
        raise UsageError(f"{out}: holds a run; give a new folder")
    kind, colon, rest = source.partition(":")
    if not colon or kind not in KINDS:
        found = _folder(source, config)
    elif kind == "timm":
        found = _timm(rest, config)
    elif kind == "deit":
        found = _deit(rest, config)
    else:
        found = _release(kind, rest, config)
    claim_folder(out, CONFIG_NAME, "run", own=ZOOMER)  # which an interrupted import may have left
    if found.zoomer is not None:
        save_zoomer(out / ZOOMER, found.zoomer, found.preprocessing)
    save_model(out, found.model, found.preprocessing, found.classes)
    return found


def _folder(source: str, config: ImportConfig) -> Imported:
    """A folder that timm's `save_for_hf` or a training wrote."""
    path = as_local(source)
    _refuse(config, source, file=True, model_args=True)
    if not path.is_dir():
        kinds = ", ".join(f"{kind}:FILE" for kind in KINDS[1:])
        raise UsageError(f"{source}: no folder; give one that timm's save_for_hf wrote, timm:NAME, or {kinds}")
    run = load_run(path)
    if run.kind == "zoomer":
        raise UsageError(f"{source}: holds a zoomer, no classifier; give it to train-vit by --zoomer")
    names = read_class_names(path, read_model_config(path / CONFIG_NAME))
    return _imported(run.model, config, names, run.preprocessing, zoomer=run.zoomer)


def _timm(name: str, config: ImportConfig) -> Imported:
    """A model of timm, with pretrained weights or those of a file."""
    if not is_model(name):
        raise UsageError(f"timm:{name}: timm knows no such model; see timm.list_models()")
    if config.file is None:
        try:
            model = timm.create_model(name, pretrained=True, **config.model_args)
        except (RuntimeError, OSError, ValueError, TypeError, AssertionError) as error:
            raise ZpipeError(
                f"timm:{name}: {first_line(error)[:200]}; see timm.list_pretrained(), or give its weights by --file"
            ) from error
        return _imported(model, config, tuple(model.pretrained_cfg.get("label_names") or ()))
    return _imported(_from_file(name, config.file, config.model_args), config, ())


def _from_file(name: str, file: str, arguments: Mapping[str, Any]) -> nn.Module:
    """A timm model with the weights of a file, which timm's own filter may rename."""
    state = fit_names(read_weights(as_local(file)), ())
    if bad := not_finite(state):
        raise ZpipeError(f"{file}: {bad} holds NaN or infinity; give weights that did not diverge")
    arguments = dict(arguments)
    try:
        classifier = timm.create_model(name, **arguments).pretrained_cfg["classifier"]
        first = classifier if isinstance(classifier, str) else classifier[0]
        head = next((state[key] for key in (f"{first}.weight", "head.weight") if key in state), None)
        if head is not None:
            arguments.setdefault("num_classes", len(head))
        # A copy whose description holds no weights.
        overlay = {
            "state_dict": state,
            "num_classes": arguments.get("num_classes", IMAGENET_CLASSES),
            "custom_load": False,  # of another format
        }
        filled = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **arguments)
        model = timm.create_model(name, **arguments)
    except (RuntimeError, ValueError, TypeError, LookupError, AssertionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ZpipeError(f"{file}: not the weights of {name} ({reason}); name the model that they are of") from error
    model.load_state_dict(filled.state_dict())
    return model


def _deit(file: str, config: ImportConfig) -> Imported:
    """A checkpoint of DeiT or DeiT III; its size follows from the shapes."""
    _refuse(config, "deit", file=True)
    state = fit_names(read_weights(as_local(file)), ())
    kernel = state.get("patch_embed.proj.weight")
    if kernel is None or "pos_embed" not in state or "blocks.0.attn.qkv.weight" not in state:
        raise ZpipeError(f"{file}: not a DeiT that its authors published; name its model by timm:NAME --file {file}")
    width, patch = kernel.shape[0], kernel.shape[-1]
    depth = sum(name.endswith("attn.qkv.weight") for name in state)
    has_scale = any(name in state for name in ("blocks.0.gamma_1", "blocks.0.ls1.gamma"))
    size = _DEIT3_SIZES.get((width, depth)) if has_scale else _DEIT_SIZES.get(width) if depth == 12 else None
    if size is None:
        raise ZpipeError(
            f"{file}: {depth} blocks of {width} channels, no size of {'DeiT III' if has_scale else 'DeiT'}; name its "
            f"model by timm:NAME --file {file}"
        )
    kind = "deit3" if has_scale else "deit"
    distilled = "_distilled" if "dist_token" in state else ""
    prefix = 0 if has_scale else 2 if distilled else 1
    side = round((state["pos_embed"].shape[1] - prefix) ** 0.5) * patch
    name = f"{kind}_{size}{distilled}_patch{patch}_{224 if side not in (224, 384) else side}"
    if not is_model(name):
        raise ZpipeError(
            f"{file}: would be {name}, which timm does not have; name its model by timm:NAME --file {file}"
        )
    model = _from_file(name, file, {"img_size": side} | config.model_args)
    return _imported(model, config, (), _imagenet(side, _CROP[kind]))


def _release(kind: str, file: str, config: ImportConfig) -> Imported:
    """A checkpoint of the authors of ZoomViT, CF-ViT, LF-ViT or SparseFormer."""
    _refuse(config, kind, file=True)
    wanted = MODELS[kind].RELEASE_CONFIG
    for name in sorted(set(config.model_args) ^ set(wanted)):
        if name in wanted:
            raise UsageError(
                f"{kind}:{file}: the shapes of the weights do not say {name}; give --model-arg {name}=VALUE"
            )
        raise UsageError(f"{kind}:{file}: takes no {name}; its settings are {', '.join(wanted)}")
    try:
        weights = ReleasedWeights.read(as_local(file), MODELS[kind].RELEASE_NAME)
        opened = load_release(weights.tensors, kind, **config.model_args)
    except OSError as error:
        raise UsageError(f"{file}: can't be read ({error.strerror or first_line(error)}); give a file") from error
    except (ValueError, TypeError, RuntimeError) as error:
        reason = first_line(error).removeprefix("state dict: ")
        raise ZpipeError(f"{kind}:{file}: {reason}") from error
    model, zoomer = opened if isinstance(opened, tuple) else (opened, None)
    side = getattr(model, "img_size", 224)  # a SparseFormer takes any size
    return _imported(model, config, (), _imagenet(side, _CROP[kind]), zoomer=zoomer)


def _imagenet(side: int, crop_pct: float) -> Preprocessing:
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    return Preprocessing(image_size=side, mean=mean, std=std, crop_pct=crop_pct)


def _refuse(config: ImportConfig, source: str, **names: bool) -> None:
    for name in names:
        if getattr(config, name):
            raise UsageError(f"{source}: takes no --{name.replace('model_args', 'model-arg')}; leave it out")


def _imported(
    model: nn.Module,
    config: ImportConfig,
    names: Sequence[str],
    preprocessing: Preprocessing | None = None,
    *,
    zoomer: Zoomer | None = None,
) -> Imported:
    """The model with its preprocessing and its classes, where the settings may say otherwise."""
    if preprocessing is None:
        cfg = timm.data.resolve_model_data_config(model)
        channels, height, width = cfg["input_size"]
        height, width = to_2tuple(config.model_args.get("img_size", (height, width)))
        if channels != 3 or height != width:
            raise UsageError(f"images of {channels} x {height} x {width}: zpipe runs models of square RGB images")
        preprocessing = Preprocessing(
            image_size=height, mean=tuple(cfg["mean"]), std=tuple(cfg["std"]), crop_pct=cfg["crop_pct"]
        )
    preprocessing = Preprocessing(
        image_size=preprocessing.image_size,
        mean=config.mean or preprocessing.mean,
        std=config.std or preprocessing.std,
        crop_pct=config.crop_pct or preprocessing.crop_pct,
    )
    count = cast(int, model.num_classes)
    return Imported(
        model=model.eval(), preprocessing=preprocessing, classes=_names(config.classes, names, count), zoomer=zoomer
    )


def _names(wanted: str | None, given: Sequence[str], count: int) -> tuple[str, ...]:
    """The names of the classes, in the order of their numbers."""
    if wanted == "none":
        return ()
    if wanted is None and (given or count != IMAGENET_CLASSES):
        return tuple(given)
    if wanted in (None, IMAGENET):
        names = tuple(ImageNetInfo(IMAGENET).label_names())
    else:
        try:
            text = read_file(wanted, MAX_NAMES_BYTES).decode("utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or first_line(error)
            raise UsageError(
                f"--classes {wanted}: can't be read ({reason}); give a text file, or {IMAGENET}"
            ) from error
        names = tuple(line.strip() for line in text.splitlines() if line.strip())
        if odd := next((name for name in names if printable(name) != name), None):
            raise UsageError(f"--classes {wanted}: {printable(odd)[:80]}: not a printable name; rename the class")
        if len(set(names)) < len(names):
            raise UsageError(f"--classes {wanted}: names a class twice; give each class one line")
    if len(names) != count:
        raise UsageError(f"--classes {wanted}: {len(names)} names, the model has {count} classes")
    return names
