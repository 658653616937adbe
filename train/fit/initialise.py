"""Build a model, and start it from other weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import timm
from torch import Tensor, nn

from zpipe.schemas.errors import UsageError, ZpipeError
from zpipe.schemas.model_config import CONFIG_NAME, config_beside, is_model_config, read_model_config, split_choice
from zpipe.schemas.storage import as_local
from zpipe.schemas.weights import fit_names, no_floats, not_finite, prefix_note, read_weights
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


def check_source(source: str) -> None:
    """Raise UsageError for a source that `start_from` does not take: a URL, which might carry a secret."""
    if not source.startswith("timm:"):
        as_local(source)


def start_from(model: nn.Module, source: str) -> None:
    """Fill a model with other weights, in place.

    A plain ViT may have another image or patch size. A model with `load_from_vit` starts from a plain ViT or from its
    own kind, a wrapper from its backbone. A head for other classes keeps its weights.

    Args:
        model: The model.
        source: A finished run, also as RUN:best, RUN:final or RUN:7 (an epoch that was kept); a weights file, see
            `zpipe.schemas.weights.read_weights`; or `timm:NAME` for a pretrained timm model.

    Raises:
        UsageError: If there is no such source.
        ZpipeError: If the two are not built alike, or the weights can't be read or downloaded, or are not finite.
    """
    own = model.state_dict()
    state = fit_names(_weights(source), own.keys())
    if odd := no_floats(state, own):
        raise ZpipeError(f"{source}: {odd} is {state[odd].dtype}; give weights of floating-point numbers")
    try:
        load_weights(model, state)
    except (RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ZpipeError(f"{source}: can't start from it: {reason}{prefix_note(state)}") from error
    if bad := not_finite(model.state_dict()):
        raise ZpipeError(f"{source}: {bad} holds NaN or infinity; give weights that did not diverge")


def _weights(source: str) -> Mapping[str, Tensor]:
    """The state dict that `start_from` takes."""
    if source.startswith("timm:"):
        try:
            return timm.create_model(source.removeprefix("timm:"), pretrained=True).state_dict()
        except (RuntimeError, OSError, ValueError) as error:
            raise _not_from_timm(source, error) from error
    check_source(source)
    path, choice = split_choice(source)
    if path.is_dir():
        return load_run(path, choice or "final").model.state_dict()
    if not path.exists():
        raise UsageError(f"{source}: no run, no checkpoint file; for pretrained weights give timm:NAME")
    return read_weights(path)


def _not_from_timm(source: str, error: Exception) -> ZpipeError:
    return ZpipeError(f"{source}: {' '.join(str(error).split())[:200]}; see timm.list_pretrained()")


def described(source: str) -> Mapping[str, Any]:
    """`mean` and `std` of the images that weights to start from were trained with, as far as they are known."""
    if source.startswith("timm:"):
        try:
            found = timm.models.get_pretrained_cfg(source.removeprefix("timm:"))
        except RuntimeError as error:
            raise _not_from_timm(source, error) from error
        return {} if found is None else {"mean": found.mean, "std": found.std}
    path, _ = split_choice(source)
    path = path / CONFIG_NAME if path.is_dir() else config_beside(path)
    if not path.is_file() or not is_model_config(path):
        return {}
    config = read_model_config(path).pretrained_cfg
    return {name: value for name, value in (("mean", config.mean), ("std", config.std)) if value is not None}


def assumed(source: str) -> str:
    """A note where nothing says how the images of weights to start from were normalised; empty where something does."""
    if len(described(source)) == 2:
        return ""
    return (
        f"--init-from {source}: no config.json beside it says how its images were normalised; assumed: ImageNet's mean "
        "and std; if it was trained otherwise, give --set mean=[R,G,B] --set std=[R,G,B]"
    )
