"""What the loop trains."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

Batch = dict[str, Any]


class Task(Protocol):
    """What is trained: a model and its loss."""

    call: Callable[..., Any]
    """How `loss` runs the model: the model itself, or the trainer's wrapper around it (compiled, distributed)."""

    draws: torch.Generator
    """For random numbers that must be the same on all ranks; all others come from torch's global generator.

    The trainer seeds both generators for every epoch and keeps their states in checkpoints."""

    progress: float
    """Fraction of the training that is completed, in [0, 1); the trainer sets it before every step."""

    @property
    def model(self) -> nn.Module:
        """The model whose parameters are trained."""

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of a batch, 0-d, and metrics to log, 0-d tensors on the model's device."""

    def validate(self, model: nn.Module) -> dict[str, float]:
        """Metrics of a model on held-out data, after every epoch; may be empty. `val_top1` decides the best epoch."""
