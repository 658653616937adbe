"""MixUp and CutMix of a batch: one draw for images, targets and relevance maps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from timm.data.mixup import mixup_target

from zpipe.schemas.errors import UsageError
from zpipe.schemas.geometry import Box, covered_share
from zpipe.train.device import to_device


@dataclass(frozen=True, kw_only=True)
class MixConfig:
    """How batches are mixed. The defaults are those of DeiT."""

    mixup: float = 0.8
    """Parameter of MixUp's Beta distribution; 0 disables MixUp."""

    cutmix: float = 1.0
    """Parameter of CutMix's Beta distribution; 0 disables CutMix."""

    switch: float = 0.5
    """Probability of CutMix rather than MixUp if both are enabled."""

    prob: float = 1.0
    """Probability that a batch is mixed."""

    smoothing: float = 0.1
    """Label smoothing of the targets."""

    def __post_init__(self) -> None:
        if min(self.mixup, self.cutmix) < 0:
            raise UsageError(f"mix.mixup {self.mixup:g}, mix.cutmix {self.cutmix:g}: give numbers >= 0")
        for name in ("switch", "prob", "smoothing"):
            if not 0 <= getattr(self, name) <= 1:
                raise UsageError(f"mix.{name} {getattr(self, name):g}: give a number in [0, 1]")


def mix_batch(batch: dict[str, Any], config: MixConfig, rng: np.random.Generator, num_classes: int) -> dict[str, Any]:
    """Mix each image of a batch with its counterpart in the reversed batch: the first with the last, and so on.

    MixUp (Zhang et al. 2018) weights maps as it weights their images. CutMix (Yun et al. 2019) pastes a box: each cell
    of a map takes the other map in proportion to the part of its area that the box covers, and the weight of the other
    target is the box's fraction of the image.

    Args:
        batch: `image` float [B, C, H, W], normalised or not; `label` int64 [B]; optionally `relevance` [B, gh, gw].
        config: How to mix.
        rng: Generator of the draw.
        num_classes: Number of classes.

    Returns:
        A new batch, which also has `target` float [B, num_classes].
    """
    images = batch["image"]
    share, box = _draw(config, rng, images.shape[2], images.shape[3])
    out = dict(batch)
    out["target"] = mixup_target(batch["label"], num_classes, lam=share, smoothing=config.smoothing)  # [B, num_classes]
    if share == 1.0:
        return out
    if box is None:
        out["image"] = images * share + images.flip(0) * (1 - share)
        if "relevance" in batch:
            out["relevance"] = batch["relevance"] * share + batch["relevance"].flip(0) * (1 - share)
        return out
    top, bottom, left, right = box
    out["image"] = images.clone()
    out["image"][:, :, top:bottom, left:right] = images.flip(0)[:, :, top:bottom, left:right]
    if "relevance" in batch:
        relevance = batch["relevance"]
        share_of_cells = covered_share(relevance.shape[1:], Box(left, top, right, bottom), images.shape[2:])
        covered = to_device(torch.from_numpy(share_of_cells).to(relevance.dtype), relevance.device)  # [gh, gw]
        out["relevance"] = relevance * (1 - covered) + relevance.flip(0) * covered
    return out


def _draw(
    config: MixConfig, rng: np.random.Generator, height: int, width: int
) -> tuple[float, tuple[int, int, int, int] | None]:
    """The fraction of itself that an image keeps, and CutMix's box (top, bottom, left, right), or None."""
    if rng.random() >= config.prob or not (config.mixup or config.cutmix):
        return 1.0, None
    cut = config.cutmix > 0 and (config.mixup == 0 or rng.random() < config.switch)
    alpha = config.cutmix if cut else config.mixup
    share = float(rng.beta(alpha, alpha))
    if not cut:
        return share, None
    side = np.sqrt(1 - share)
    middle_y, middle_x = rng.uniform(0, height), rng.uniform(0, width)
    top, bottom = (int(np.clip(middle_y + sign * side * height / 2, 0, height)) for sign in (-1, 1))
    left, right = (int(np.clip(middle_x + sign * side * width / 2, 0, width)) for sign in (-1, 1))
    # The box is clipped to the image, so the fraction is that of the clipped box.
    return 1 - (bottom - top) * (right - left) / (height * width), (top, bottom, left, right)
