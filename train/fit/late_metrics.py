"""The metrics of training steps, read from an accelerator without stopping it."""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

import torch
from torch import Tensor


class StepMetrics(NamedTuple):
    """The metrics of one step."""

    step: int
    """Number of the step, from 0."""
    values: dict[str, float]


class LateMetrics:
    """The metrics of steps whose work an accelerator may not have done yet.

    Reading a value right away would let the accelerator run out of work, so each is copied to the host asynchronously,
    and read when a later step has been launched. On a CPU the values are there at once.
    """

    def __init__(self) -> None:
        self._waiting: deque[tuple[int, list[str], Tensor, torch.cuda.Event | None]] = deque()

    def put(self, step: int, names: list[str], values: Tensor) -> None:
        """Start the copy of the metrics of a step.

        Args:
            step: Number of the step.
            names: The names of the metrics.
            values: The metrics in the same order, [n], on any device.
        """
        copied = values.to("cpu", non_blocking=True)
        event = None
        if values.device.type == "cuda":
            event = torch.cuda.Event()
            event.record()
        self._waiting.append((step, names, copied, event))

    def take(self, *, keep: int = 0) -> list[StepMetrics]:
        """Read the metrics of all steps but the last `keep`, in the order of the steps; each is returned once."""
        taken = []
        while len(self._waiting) > keep:
            step, names, copied, event = self._waiting.popleft()
            if event is not None:
                event.synchronize()
            taken.append(StepMetrics(step, dict(zip(names, copied.tolist(), strict=True))))
        return taken
