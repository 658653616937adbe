"""Build a model, and start it from other weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import timm
from safetensors import SafetensorError
from torch import Tensor, nn

from zpipe.schemas.atomic import read_json
from zpipe.schemas.errors import UsageError, ZpipeError
from zpipe.schemas.model_config import CONFIG_NAME
from zpipe.train.checkpoint import load_run
from zpipe.train.models.warm_start import load_weights


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
    """Fill a model with other weights, in place.

    A plain ViT may have another image or patch size. A model with `load_from_vit` starts from a plain ViT or from its
    own kind, a wrapper from its backbone. A head for other classes keeps its weights.

    Args:
        model: The model.
        source: A finished run, a checkpoint file (.pth or .safetensors, read without unpickling code), or `timm:NAME`
            for a pretrained timm model.

    Raises:
        ZpipeError: If the two are not built alike, or the weights can't be read or downloaded.
    """
    state = _weights(source)
    try:
        load_weights(model, state)
    except (RuntimeError, ValueError) as error:
        raise ZpipeError(f"{source}: can't start from it: {' '.join(str(error).split())[:200]}") from error


def _weights(source: str) -> dict[str, Tensor]:
    """The state dict that `start_from` takes."""
    if source.startswith("timm:"):
        try:
            return timm.create_model(source.removeprefix("timm:"), pretrained=True).state_dict()
        except (RuntimeError, OSError, ValueError) as error:
            raise _not_from_timm(source, error) from error
    path = Path(source)
    if path.is_dir():
        return load_run(path).model.state_dict()
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
    return state


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
