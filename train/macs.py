"""One counter of multiply-adds for every model of the project."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode


def count_macs(run: Callable[[], object]) -> int:
    """Multiply-adds of the matrix products and convolutions that `run()` executes, attention's two products included.

    torch's flop counter over what really runs, halved; normalisation, activations and softmax are not counted. Attention
    is run unfused here, because the counter doesn't know every device's fused kernel.
    """
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops() // 2
