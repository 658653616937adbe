"""Small CF-ViTs and LF-ViTs, whose every weight shows in their logits, and images for them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import settings
from torch import nn

from zpipe.train.models import CFViT

SMALL = {"img_size": 48, "patch_size": 4, "embed_dim": 24, "depth": 5, "num_heads": 3, "num_classes": 5}
GRIDS = pytest.mark.parametrize("img_size", [48, 72])  # 6 x 6 and 9 x 9 coarse cells
few = settings(max_examples=25, deadline=None)


def shake(module: nn.Module, seed: int = 0) -> nn.Module:
    """Set random weights, large enough for each of them to change the logits."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in module.named_parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * (0.2 if p.ndim > 1 else 0.3))
            if "norm" in name and name.endswith("weight"):
                p.add_(1)
    return module


def small(cls: type[CFViT] = CFViT, **kwargs) -> CFViT:
    return shake(cls(**SMALL | kwargs)).eval()


def pixels(n: int = 6, img_size: int = 48, seed: int = 0) -> torch.Tensor:
    """Random images whose coarse cells differ, so that attention prefers some of them."""
    generator = torch.Generator().manual_seed(seed)
    rough = torch.randn(n, 3, 12, 12, generator=generator)
    return nn.functional.interpolate(rough, img_size) + 0.3 * torch.randn(n, 3, img_size, img_size, generator=generator)
