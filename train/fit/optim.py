"""The optimizer, its learning rate schedule and one update of the weights."""

from __future__ import annotations

import torch
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from timm.utils import dispatch_clip_grad
from torch import nn

from zpipe.schemas.errors import UsageError
from zpipe.train.fit.config import TrainConfig


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """Create the optimizer that `config.opt` names.

    Raises:
        UsageError: If timm knows no such optimizer, or the optimizer rejects one of its arguments.
    """
    options = config.opt_args if config.layer_decay is None else config.opt_args | {"layer_decay": config.layer_decay}
    try:
        return create_optimizer_v2(model, opt=config.opt, lr=config.lr, weight_decay=config.weight_decay, **options)
    except (AssertionError, AttributeError, TypeError, ValueError) as error:
        raise UsageError(
            f"optimizer {config.opt}: {' '.join(str(error).split())[:200]}; check train.opt, train.opt_args and "
            "train.layer_decay"
        ) from error


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
        warmup_epochs=round(config.warmup_epochs * steps_per_epoch),
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
    if scaler is None:
        optimizer.step()
    else:
        scaler.step(optimizer)
        scaler.update()


def _classifier_parameters(model: nn.Module) -> set[nn.Parameter]:
    """The parameters of the layers that timm's `get_classifier` returns; empty if the model has no such method.

    timm's trainer excludes the last two parameters instead, which are not the classifier's in a CF-ViT.
    """
    get_classifier = getattr(model, "get_classifier", None)
    if get_classifier is None:
        return set()
    heads = get_classifier()
    return {each for head in (heads if isinstance(heads, tuple) else (heads,)) for each in head.parameters()}
