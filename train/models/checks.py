"""Checks of values for which the host doesn't wait for an accelerator."""

from __future__ import annotations

import torch
from torch import Tensor


def check_values(right: Tensor, problem: str) -> None:
    """Raise ValueError if a condition on a CPU is false; let an accelerator check it as an assertion of its own.

    After a failed assertion the process must be started again. While a graph is compiled nothing is checked.

    Args:
        right: the condition, bool, 0-d.
        problem: what is wrong if it is false, and what is wanted.
    """
    if torch.compiler.is_compiling():
        return
    if right.device.type != "cpu":
        torch._assert_async(right, problem)
    elif not right:
        raise ValueError(problem)


def refuse_nan(scores: Tensor) -> None:
    """Raise ValueError if scores hold NaN, as `check_values` does."""
    if not torch.compiler.is_compiling():
        check_values(scores.isnan().logical_not().all(), "scores must be numbers, got NaN")
