"""The optimizer, its learning rate schedule and one update of the weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from timm.optim import create_optimizer_v2, get_optimizer_class
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from timm.utils import dispatch_clip_grad
from torch import Tensor, nn

from zpipe.schemas.errors import UsageError, ZpipeError
from zpipe.train.fit.config import TrainConfig

# Options of a group of weights that the schedule or the machine sets, not the settings of the run.
OF_THE_MACHINE = ("foreach", "fused", "capturable", "differentiable")
FUSED = (torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD)  # those with a kernel for CUDA
CHANGING = ("lr", "step", "lookahead_step", *OF_THE_MACHINE)
MAX_WARMUP = 0.25  # of the training


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """Create the optimizer that `config.opt` names.

    Raises:
        UsageError: If timm knows no such optimizer, or the optimizer rejects one of its arguments.
    """
    options = config.opt_args if config.layer_decay is None else config.opt_args | {"layer_decay": config.layer_decay}
    _try_step(config)
    if next(model.parameters()).is_cuda and _may_be_fused(config):
        options = options | {"fused": True}  # one kernel for all weights
    return _create(model, config, options)


def _may_be_fused(config: TrainConfig) -> bool:
    """Whether PyTorch has a fused kernel of the optimizer, and the settings leave it to us how it computes."""
    kind = get_optimizer_class(config.opt.lower().rpartition("_")[2], bind_defaults=False)  # of lookahead_adamw: adamw
    return kind in FUSED and not config.opt_args.keys() & set(OF_THE_MACHINE)


def _create(model: nn.Module, config: TrainConfig, options: dict[str, Any]) -> torch.optim.Optimizer:
    try:
        return create_optimizer_v2(model, opt=config.opt, lr=config.lr, weight_decay=config.weight_decay, **options)
    except _REJECTIONS as error:
        raise _rejected(config, error) from error


def _try_step(config: TrainConfig) -> None:
    """Take a step with two small weights: many optimizers look at their arguments only then."""
    with torch.random.fork_rng(devices=[]):  # the numbers that the model draws later stay the same
        layer = nn.Linear(4, 4)
    optimizer = _create(layer, config, config.opt_args)
    for weight in layer.parameters():
        weight.grad = torch.zeros_like(weight)
    try:
        optimizer.step()
    except _REJECTIONS as error:
        raise _rejected(config, error) from error


_REJECTIONS = (AssertionError, AttributeError, TypeError, ValueError, LookupError, ArithmeticError, RuntimeError)


def _rejected(config: TrainConfig, error: Exception) -> UsageError:
    reason = " ".join(str(error).split())[:200] or type(error).__name__
    return UsageError(f"optimizer {config.opt}: {reason}; check train.opt, train.opt_args and train.layer_decay")


def restore_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load the state of an optimizer, after checking that it is of these settings and these weights.

    Raises:
        ValueError, KeyError: Saying what differs.
    """
    numbered = optimizer.state_dict()["param_groups"]
    for number, (own, other) in enumerate(zip(numbered, state["param_groups"], strict=False)):
        for name in own.keys() - set(CHANGING):
            if name in other and own[name] != other[name]:
                raise ValueError(
                    f"group {number} of its optimizer has {name} = {str(other[name])[:80]}, this run has "
                    f"{str(own[name])[:80]}"
                )
    machine = [{name: group[name] for name in OF_THE_MACHINE if name in group} for group in optimizer.param_groups]
    # Before it is loaded: a fused optimizer counts its steps on the device.
    groups = [other | own for other, own in zip(state["param_groups"], machine, strict=False)]
    optimizer.load_state_dict(state | {"param_groups": groups + state["param_groups"][len(groups) :]})
    state_of = getattr(optimizer, "_base_optimizer", optimizer).state  # timm's Lookahead has none of its own
    if any(len(set(kinds)) > 1 for kinds in _forms(state_of).values()):
        raise ValueError("its optimizer holds numbers where it holds tensors for other weights")
    for group in optimizer.param_groups:
        kinds: dict[torch.Size, dict[str, Any]] = {}  # some optimizers treat matrices, or large weights, in another way
        for weight in group["params"]:
            held = state_of.get(weight, {})  # empty for a weight that had no gradient so far
            if held:
                alike = kinds.setdefault(weight.shape, {name: _kind(value) for name, value in held.items()})
                _check_held(weight, held, alike)
                _lay_out_as(weight, held)


def _lay_out_as(weight: Tensor, held: dict[str, Any]) -> None:
    """Store what an optimizer holds as its weight lies, whose channels may be last; fused kernels want it so."""
    for name, value in held.items():
        if isinstance(value, Tensor) and value.shape == weight.shape and value.stride() != weight.stride():
            held[name] = torch.empty_like(weight, dtype=value.dtype).copy_(value)


def _check_held(weight: Tensor, held: dict[str, Any], alike: dict[str, Any]) -> None:
    """Check what an optimizer holds for a weight: `alike` are the kinds of what it holds for one of the same shape."""
    if {name: _kind(value) for name, value in held.items()} != alike:
        raise ValueError("its optimizer holds something else for one weight than for another")
    for name, value in held.items():
        if isinstance(value, Tensor) and not _fits(value, weight):
            raise ValueError(f"{name} of its optimizer is {list(value.shape)}, its weight {list(weight.shape)}")
    if float(held.get("step", 0)) < 0:
        raise ValueError(f"its optimizer is in step {float(held['step']):g}")


def _kind(value: Any) -> Any:
    return (value.dtype, value.ndim) if isinstance(value, Tensor) else type(value)


def _forms(state: Mapping[Tensor, dict[str, Any]]) -> dict[str, list[bool]]:
    """Whether what an optimizer holds for each weight, by name, is a tensor with more than a number."""
    found: dict[str, list[bool]] = {}
    for weight, held in state.items():
        for name, value in held.items() if weight.ndim else ():
            found.setdefault(name, []).append(isinstance(value, Tensor) and value.ndim > 0)
    return found


def _fits(value: Tensor, weight: Tensor) -> bool:
    """Whether a value of the optimizer may have the shape of a weight, or that of its means over dimensions."""
    if value.ndim == weight.ndim:
        return all(side in (1, whole) for side, whole in zip(value.shape, weight.shape, strict=True))
    return value.numel() == 1 or (value.ndim < weight.ndim and set(value.shape) <= {1, *weight.shape})


def warmup_epochs(config: TrainConfig) -> float:
    """Duration of the warm-up: that of the settings, but at most a quarter of the training."""
    return min(config.warmup_epochs, MAX_WARMUP * config.epochs)


def make_scheduler(
    optimizer: torch.optim.Optimizer, config: TrainConfig, *, total_steps: int, steps_per_epoch: int
) -> Scheduler:
    """Create timm's scheduler, which is stepped once per optimizer step: what timm calls an epoch is a step here."""
    kind, decay_rate = config.sched, config.decay_rate
    if kind == "constant":
        kind, decay_rate = "step", 1.0
    elif kind == "poly":
        # timm uses the decay rate as the power of the polynomial; at 0.1 the learning rate would stay up until the end.
        decay_rate = 1.0
    scheduler, _ = create_scheduler_v2(
        optimizer,
        sched=kind,
        num_epochs=total_steps,
        warmup_epochs=round(warmup_epochs(config) * steps_per_epoch),
        warmup_lr=0.0,
        min_lr=config.min_lr,
        decay_epochs=max(round(config.decay_epochs * steps_per_epoch), 1),
        decay_rate=decay_rate,
    )
    return scheduler


def update_weights(
    model: nn.Module, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler | None, config: TrainConfig
) -> None:
    """Clip the gradients and step the optimizer."""
    if scaler is not None:
        scaler.unscale_(optimizer)
    if config.clip_grad:
        # Adaptive clipping leaves the classifier alone, as in timm's trainer (Brock et al. 2021, section 4.1).
        excluded = _classifier_parameters(model) if config.clip_mode == "agc" else set()
        clipped = [parameter for parameter in model.parameters() if parameter not in excluded]
        dispatch_clip_grad(clipped, config.clip_grad, mode=config.clip_mode)
    try:
        if scaler is None:
            optimizer.step()
        else:
            scaler.step(optimizer)
            scaler.update()
    except KeyError as error:  # only a checkpoint can leave such a state
        raise ZpipeError(
            f"the state of the optimizer, from the checkpoint, has no {error}; restore an earlier checkpoint, or "
            "delete the run's folder to start over"
        ) from error


def _classifier_parameters(model: nn.Module) -> set[nn.Parameter]:
    """The parameters of the layers that timm's `get_classifier` returns; empty if the model has no such method.

    timm's trainer excludes the last two parameters instead, which are not the classifier's in a CF-ViT.
    """
    get_classifier = getattr(model, "get_classifier", None)
    if get_classifier is None:
        return set()
    heads = get_classifier()
    return {each for head in (heads if isinstance(heads, tuple) else (heads,)) for each in head.parameters()}
