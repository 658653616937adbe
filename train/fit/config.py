"""Settings of the training loop."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from zpipe.schemas.errors import UsageError
from zpipe.train.settings import check_bounds, check_choices, shown

# Beyond these a training would never end, or would not even start.
BOUNDS = {
    "epochs": (1e-6, 1e6),
    "batch_size": (1, 2**20),
    "repeats": (1, 1000),
    "lr": (0, 1e30),
    "min_lr": (0, 1e30),
    "warmup_epochs": (0, 1e6),
    "weight_decay": (0, 1e6),
    "decay_epochs": (1e-6, 1e6),
    "decay_rate": (0, 1e6),
    "layer_decay": (1e-6, 1),
    "accumulate": (1, 2**20),
    "clip_grad": (0, 1e30),
    "keep": (0, 10**6),
    "seed": (0, 2**63 - 1),
    "data_workers": (0, 1024),
    "log_every": (1, 10**9),
    "checkpoint_s": (0, 1e9),
}


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
    """Duration of the linear warmup from 0 to `lr`; at most a quarter of the training is warmup."""

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

    precision: Literal["auto", "float32", "bf16", "fp16"] = "auto"
    """Precision of the forward pass, in training and validation; fp16 uses loss scaling. `auto` is bf16 on a CUDA
    device that has it, else float32."""

    compile: bool | None = None
    """Whether to torch.compile the model: the blocks of a ZoomViT or of a plain ViT, any other model as a whole. None
    compiles blocks on a CUDA device with Triton, and does without if that fails."""

    keep: int = 0
    """Number of epochs whose weights are kept beside the last checkpoint."""

    seed: int = 0
    """Seed of the initialisation, the order of the samples and everything that is drawn."""

    data_workers: int | None = None
    """Data-loading processes of each training process. None is 1 on a CPU; with a CUDA device it is up to 16, as many
    as the machine has cores for beside the training processes."""

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
        check_bounds(self, BOUNDS, "train.")
        if not 0 <= self.ema < 1:
            raise UsageError(f"train.ema {self.ema:g}: give a decay in [0, 1)")
        if self.wandb is not None and not 0 < len(self.wandb) <= 128:
            raise UsageError(f"train.wandb {shown(self.wandb)}: give the name of a project, of 1 to 128 characters")
