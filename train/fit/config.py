"""Settings of the training loop."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from zpipe.schemas.errors import UsageError
from zpipe.train.settings import check_choices


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Settings of the loop. Durations are in epochs of the training shards; fractions are allowed.

    batch_size: images of a batch, those of all training processes together; a step takes `accumulate` batches. repeats: how often a batch holds each of its
    samples, in different views, see `RelevanceLoader`. opt: any optimizer name of timm; opt_args: further keyword arguments of its constructor (betas, nesterov).
    The learning rate rises linearly over `warmup_epochs` and then follows `sched` to `min_lr`: cosine, poly (of power 1, a straight line),
    tanh, constant, or step, which multiplies it by `decay_rate` every `decay_epochs`. layer_decay: factor of the learning rate from each
    block to the one before it, None for one rate for all. accumulate: batches whose gradients make one step; what is left of
    an epoch when it doesn't divide is dropped. clip_grad: bound of the gradients, 0 for none; clip_mode: norm, value or agc.
    ema: decay of a running average of the weights, which are then the finished ones; 0 for none. precision: float32, bf16
    or fp16 (with loss scaling) in the forward pass. compile: torch.compile the model. keep: how many epochs' weights stay
    beside the last checkpoint. data_workers: data-loading processes of each training process. checkpoint_s: seconds between checkpoints within an
    epoch; at its end there is one always. tensorboard: write event files beside metrics.jsonl; wandb: the project to log
    to.
    """

    epochs: float = 100.0
    batch_size: int = 128
    repeats: int = 1
    opt: str = "adamw"
    lr: float = 1e-3
    min_lr: float = 0.0
    warmup_epochs: float = 0.0
    weight_decay: float = 0.05
    opt_args: dict[str, Any] = field(default_factory=dict)
    sched: Literal["cosine", "poly", "tanh", "step", "constant"] = "cosine"
    decay_epochs: float = 30.0
    decay_rate: float = 0.1
    layer_decay: float | None = None
    accumulate: int = 1
    clip_grad: float = 0.0
    clip_mode: Literal["norm", "value", "agc"] = "norm"
    ema: float = 0.0
    precision: Literal["float32", "bf16", "fp16"] = "float32"
    compile: bool = False
    keep: int = 0
    seed: int = 0
    data_workers: int = 1
    log_every: int = 20
    checkpoint_s: float = 600.0
    tensorboard: bool = False
    wandb: str | None = None
    device: str = "auto"

    def __post_init__(self) -> None:
        check_choices(self, "train.")
        if self.epochs <= 0:
            raise UsageError(f"train.epochs {self.epochs:g}: give a number above 0")
        for name in (
            "lr",
            "min_lr",
            "warmup_epochs",
            "weight_decay",
            "clip_grad",
            "seed",
            "data_workers",
            "checkpoint_s",
            "keep",
            "decay_rate",
        ):
            if getattr(self, name) < 0:
                raise UsageError(f"train.{name} {getattr(self, name):g}: give a number >= 0")
        if not 0 <= self.ema < 1:
            raise UsageError(f"train.ema {self.ema:g}: give a decay in [0, 1)")
        if self.layer_decay is not None and not 0 < self.layer_decay <= 1:
            raise UsageError(f"train.layer_decay {self.layer_decay:g}: give a factor in (0, 1]")
        if self.decay_epochs <= 0:
            raise UsageError(f"train.decay_epochs {self.decay_epochs:g}: give a number above 0")
        for name in ("batch_size", "repeats", "log_every", "accumulate"):
            if getattr(self, name) < 1:
                raise UsageError(f"train.{name} {getattr(self, name)}: give a number >= 1")
