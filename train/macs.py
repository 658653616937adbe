"""One counter of multiply-adds for every model of the project, and the paper's formula to compare it with."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode


def count_macs(run: Callable[[], object]) -> int:
    """Multiply-adds of the matrix products and convolutions that `run()` executes, attention's two products included.

    The count is half of what torch's flop counter finds in what really runs; normalisation, activations and softmax are
    not counted. Attention runs unfused here, because the counter doesn't know every device's fused kernel.
    """
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops() // 2


def paper_macs(tokens: int, width: int, depth: int) -> int:
    """Multiply-adds of a ViT's blocks by ZoomViT's Eq. 11 and 12: depth (3 N D^2 + 2 N^2 D + 8 N D^2).

    It leaves out attention's output projection (N D^2 a block), the patch embedding, the head and the class token, all
    of which `count_macs` sees; DeiT-S has 4.17 G by it (196 tokens) and 4.60 G by count.
    """
    return depth * (11 * tokens * width**2 + 2 * tokens**2 * width)
