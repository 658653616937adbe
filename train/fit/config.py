"""Settings of the training loop."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from zpipe.schemas.errors import UsageError
from zpipe.train.settings import check_choices


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Settings of the training loop. Durations are in epochs of the training shards; fractions are allowed."""

    epochs: float = 100.0
    """Length of the training."""

    batch_size: int = 128
    """Images in a batch, over all training processes together."""

    repeats: int = 1
    """How often a batch holds each of its samples, in different views, see `RelevanceLoader`."""

    opt: str = "adamw"
    """Name of an optimizer of timm."""

    lr: float = 1e-3
    """Peak learning rate."""

    min_lr: float = 0.0
    """Learning rate that the schedule ends at."""

    warmup_epochs: float = 0.0
    """Duration of the linear warmup from 0 to `lr`."""

    weight_decay: float = 0.05
    """Weight decay of the optimizer."""

    opt_args: dict[str, Any] = field(default_factory=dict)
    """Further keyword arguments of the optimizer's constructor, such as betas or nesterov."""

    sched: Literal["cosine", "poly", "tanh", "step", "constant"] = "cosine"
    """Schedule after the warmup. `poly` has power 1, a straight line; `step` is governed by the next two settings."""

    decay_epochs: float = 30.0
    """Period of the `step` schedule."""

    decay_rate: float = 0.1
    """Factor of the `step` schedule."""

    layer_decay: float | None = None
    """Factor between the learning rates of a block and the one before it; None for the same rate everywhere."""

    accumulate: int = 1
    """Batches whose gradients make one step. Batches at the end of an epoch that don't make a step are dropped."""

    clip_grad: float = 0.0
    """Limit of the gradients; 0 for none."""

    clip_mode: Literal["norm", "value", "agc"] = "norm"
    """What `clip_grad` limits: the norm, each value, or the ratio to the weights (adaptive gradient clipping)."""

    ema: float = 0.0
    """Decay of an exponential moving average of the weights, which are then the finished ones; 0 for none."""

    precision: Literal["float32", "bf16", "fp16"] = "float32"
    """Precision of the forward pass; fp16 uses loss scaling."""

    compile: bool = False
    """Whether to torch.compile the model."""

    keep: int = 0
    """Number of epochs whose weights are kept beside the last checkpoint."""

    seed: int = 0
    """Seed of the initialisation, the order of the samples and everything that is drawn."""

    data_workers: int = 1
    """Data-loading processes of each training process."""

    log_every: int = 20
    """Steps between two lines of metrics."""

    checkpoint_s: float = 600.0
    """Seconds between checkpoints within an epoch; there is always one at its end."""

    tensorboard: bool = False
    """Whether to write TensorBoard event files beside metrics.jsonl."""

    wandb: str | None = None
    """Project of Weights & Biases to log to."""

    device: str = "auto"
    """Device to train on: auto, cpu, cuda or cuda:N."""

    def __post_init__(self) -> None:
        check_choices(self, "train.")
        for name in ("epochs", "decay_epochs"):
            if getattr(self, name) <= 0:
                raise UsageError(f"train.{name} {getattr(self, name):g}: give a number above 0")
        not_negative = ("lr", "min_lr", "warmup_epochs", "weight_decay", "clip_grad", "decay_rate")
        for name in (*not_negative, "seed", "data_workers", "checkpoint_s", "keep"):
            if getattr(self, name) < 0:
                raise UsageError(f"train.{name} {getattr(self, name):g}: give a number >= 0")
        for name in ("batch_size", "repeats", "log_every", "accumulate"):
            if getattr(self, name) < 1:
                raise UsageError(f"train.{name} {getattr(self, name)}: give a number >= 1")
        if not 0 <= self.ema < 1:
            raise UsageError(f"train.ema {self.ema:g}: give a decay in [0, 1)")
        if self.layer_decay is not None and not 0 < self.layer_decay <= 1:
            raise UsageError(f"train.layer_decay {self.layer_decay:g}: give a factor in (0, 1]")
