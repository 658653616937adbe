"""MixUp and CutMix of a batch: images, targets and relevance maps under one draw."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from timm.data.mixup import mixup_target

from zpipe.schemas.errors import UsageError
from zpipe.schemas.geometry import Box, covered_share


@dataclass(frozen=True, kw_only=True)
class MixConfig:
    """mixup, cutmix: parameters of their Beta distributions, 0 switches one off; with both on, CutMix is taken with
    probability `switch`. prob: share of batches that are mixed. smoothing: label smoothing of the targets.
    (DeiT: 0.8, 1.0, 0.5, 1.0, 0.1.)
    """

    mixup: float = 0.8
    cutmix: float = 1.0
    switch: float = 0.5
    prob: float = 1.0
    smoothing: float = 0.1

    def __post_init__(self) -> None:
        if min(self.mixup, self.cutmix) < 0:
            raise UsageError(f"mix.mixup {self.mixup:g}, mix.cutmix {self.cutmix:g}: give numbers >= 0")
        for name in ("switch", "prob", "smoothing"):
            if not 0 <= getattr(self, name) <= 1:
                raise UsageError(f"mix.{name} {getattr(self, name):g}: give a number in [0, 1]")


def mix_batch(batch: dict[str, Any], config: MixConfig, rng: np.random.Generator, num_classes: int) -> dict[str, Any]:
    """Mix each image with its mirror image in the batch's order: first with last, second with last but one, ...

    image: float [B, C, H, W] (normalised or not); label: int64 [B]; relevance, where there is one: [B, gh, gw]. Returns a new
    batch with `target` float [B, num_classes] besides. MixUp weighs two maps as it weighs their images. CutMix pastes a box:
    a map's cell takes the other map in the share of its area that the box covers, and the target's weight is the box's share
    of the image. Sources: Zhang et al. 2018; Yun et al. 2019.
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
        covered = torch.from_numpy(
            covered_share(relevance.shape[1:], Box(left, top, right, bottom), images.shape[2:])
        ).to(relevance)  # [gh, gw]
        out["relevance"] = relevance * (1 - covered) + relevance.flip(0) * covered
    return out


def _draw(
    config: MixConfig, rng: np.random.Generator, height: int, width: int
) -> tuple[float, tuple[int, int, int, int] | None]:
    """How much of itself an image keeps, and the box (top, bottom, left, right) that it loses, if it loses one."""
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
    # The box is cut off at the image's edges: what counts is what was pasted.
    return 1 - (bottom - top) * (right - left) / (height * width), (top, bottom, left, right)
