"""Build a model, and start it from other weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import timm
from safetensors import SafetensorError
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import Tensor, nn

from zpipe.schemas.atomic import read_json
from zpipe.schemas.errors import UsageError, ZpipeError
from zpipe.train.checkpoint import CONFIG_NAME, load_run
from zpipe.train.models.cfvit import CFViT
from zpipe.train.models.fusion import FusedViT
from zpipe.train.models.image_zoom import ImageZoom
from zpipe.train.models.token_pruned_vit import TokenPrunedViT
from zpipe.train.models.tome import ToMeViT
from zpipe.train.models.warm_start import load_vit
from zpipe.train.models.zoomvit import ZoomViT


def build_vit(name: str, num_classes: int, image_size: int, model_args: Mapping[str, Any] | None = None) -> nn.Module:
    """Create the timm model `name`. The image size is ignored for models without one, such as convolutional networks.

    Raises:
        UsageError: If timm does not know the model or one of its arguments.
    """
    arguments = dict(model_args or {})
    for argument, option in (("num_classes", "--num-classes"), ("img_size", "--image-size")):
        if argument in arguments:
            raise UsageError(f"model_args.{argument}: has an option of its own, {option}")
    arguments["num_classes"] = num_classes
    try:
        try:
            return timm.create_model(name, img_size=image_size, **arguments)
        except TypeError as error:
            if "'img_size'" not in str(error):
                raise
            return timm.create_model(name, **arguments)
    except (RuntimeError, TypeError, ValueError, LookupError, AttributeError, AssertionError, ArithmeticError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UsageError(f"model {name}: {reason}; check --model and --model-arg") from error


def start_from(model: nn.Module, source: str) -> None:
    """Fill `model` with weights, in place: those of a finished run, of a checkpoint file (.pth or .safetensors, read
    without unpickling code), or of a pretrained timm model, given as `timm:NAME`.

    A plain ViT may have another image or patch size, a ZoomViT or CFViT starts from a plain ViT (see `load_vit`) or its like, one
    wrapped around a backbone from that; a head for other classes is left as it was. Errors: :class:`ZpipeError` when the two aren't built alike, or the weights
    can't be had.
    """
    state, zooming = _weights(source)
    try:
        if isinstance(model, (FusedViT, ImageZoom, ToMeViT, TokenPrunedViT)) and not any(
            name.startswith("backbone.") for name in state
        ):
            model = model.backbone
        if isinstance(model, (ZoomViT, CFViT)) and not zooming:
            load_vit(model, state)
        elif isinstance(model, VisionTransformer):
            _load_body(model, checkpoint_filter_fn(dict(state), model))
        else:
            _load_body(model, dict(state))
    except (RuntimeError, ValueError) as error:
        raise ZpipeError(f"{source}: can't start from it: {' '.join(str(error).split())[:200]}") from error


def _load_body(model: nn.Module, state: dict[str, Tensor]) -> None:
    """As load_state_dict, except that heads for other classes are left as they were."""
    heads = model.pretrained_cfg["classifier"] if hasattr(model, "pretrained_cfg") else "head"
    own = model.state_dict()
    for name in own:
        is_head = any(name.startswith(f"{head}.") for head in ([heads] if isinstance(heads, str) else heads))
        if is_head and (name not in state or state[name].shape[0] != own[name].shape[0]):
            state[name] = own[name]
    model.load_state_dict(state)


def _weights(source: str) -> tuple[dict[str, Tensor], bool]:
    """A state dict, and whether it is a ZoomViT's or a CFViT's."""
    if source.startswith("timm:"):
        try:
            return timm.create_model(source.removeprefix("timm:"), pretrained=True).state_dict(), False
        except (RuntimeError, OSError, ValueError) as error:
            raise _not_from_timm(source, error) from error
    path = Path(source)
    if path.is_dir():
        found = load_run(path).model
        return found.state_dict(), isinstance(found, (ZoomViT, CFViT))
    if not path.is_file():
        raise UsageError(f"{source}: no run, no checkpoint file; for pretrained weights give timm:NAME")
    try:
        state = timm.models.load_state_dict(str(path), device="cpu", weights_only=True)
    except (RuntimeError, OSError, EOFError, ValueError, KeyError, UnpicklingError, SafetensorError) as error:
        raise ZpipeError(f"{path}: not a readable checkpoint ({' '.join(str(error).split())[:200]})") from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ZpipeError(
            f"{path}: holds no state dict; expected tensors by name, perhaps under 'model' or 'state_dict'"
        )
    return state, "pos_fine" in state


def _not_from_timm(source: str, error: Exception) -> ZpipeError:
    return ZpipeError(f"{source}: {' '.join(str(error).split())[:200]}; see timm.list_pretrained()")


def described(source: str) -> Mapping[str, Any]:
    """The `pretrained_cfg` of weights to start from, such as mean and std; empty if they have none."""
    if source.startswith("timm:"):
        try:
            found = timm.models.get_pretrained_cfg(source.removeprefix("timm:"))
        except RuntimeError as error:
            raise _not_from_timm(source, error) from error
        return {} if found is None else found.to_dict()
    path = Path(source)
    path = (path if path.is_dir() else path.parent) / CONFIG_NAME  # beside the weights of a run
    return read_json(path, "a model description").get("pretrained_cfg", {}) if path.is_file() else {}
