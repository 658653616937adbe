"""Score maps that need no zoomer, to compare a ZoomViT's scores with. Tensors in, scores in [0, 1] out."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from zpipe.train.models.backbone import class_attention_row, project
from zpipe.train.models.operating_points import score_use


def centre_prior(side: int, width: int | None = None, *, sigma: float = 0.25) -> Tensor:
    """A Gaussian around the image's centre with a maximum of 1, [side * width]; sigma is in image sides.

    Args:
        side: rows of the grid.
        width: columns of the grid; None for as many.
        sigma: standard deviation, as a fraction of the height and of the width of the image.
    """
    down, across = (
        torch.exp(-(((torch.arange(cells) + 0.5) / cells - 0.5) ** 2) / (2 * sigma**2))
        for cells in (side, width or side)
    )
    prior = down[:, None] * across  # [side, width]
    return (prior / prior.max()).flatten()


def entropy_scores(images: Tensor, side: int, bins: int = 32) -> Tensor:
    """The Shannon entropy of the grey values in each cell, as a fraction of the highest possible.

    The intuitive measure of importance that the paper argues against (section 3.2; Table 11).

    Args:
        images: [B, D, H, W] on any scale; grey is the mean over channels.
        side: cells a side.
        bins: bins of the histogram, which span the range of grey in the image.

    Returns:
        [B, side * side].

    Raises:
        ValueError: images that don't divide into that many cells.
    """
    height, width = images.shape[2:]
    if height % side or width % side:
        raise ValueError(f"images of {height} x {width} pixels don't divide into {side} x {side} cells")
    grey = images.float().mean(dim=1)  # [B, H, W]
    low, high = grey.amin((1, 2), keepdim=True), grey.amax((1, 2), keepdim=True)
    level = ((grey - low) / (high - low).clamp(min=1e-12) * bins).long().clamp(max=bins - 1)
    cells = (
        level.reshape(len(level), side, height // side, side, width // side)
        .permute(0, 1, 3, 2, 4)
        .flatten(3)
        .flatten(1, 2)
    )
    counts = torch.zeros(*cells.shape[:2], bins, device=images.device)
    counts.scatter_add_(2, cells, torch.ones_like(cells, dtype=counts.dtype))  # [B, S, bins]
    share = counts / cells.shape[2]
    entropy = -torch.special.xlogy(share, share).sum(dim=2)
    highest = math.log(max(min(bins, cells.shape[2]), 2))
    return (entropy / highest).clamp(max=1.0)  # rounding may lead slightly above


def class_attention(model: nn.Module, images: Tensor, side: int) -> Tensor:
    """The attention of the class token to each patch in the last block, mean over heads, scaled to [0, 1] per image.

    It costs the model's forward pass.

    Args:
        model: a timm VisionTransformer with a class token, or a ZoomViT, which runs with nothing zoomed.
        images: [B, D, H, W].
        side: cells a side of the result.

    Returns:
        [B, side * side], each cell with the value of the patch that it lies in (bilinear if the model's grid doesn't
        divide this one).

    Raises:
        ValueError: another kind of model.
    """
    use = score_use(model)
    is_supported = isinstance(model, VisionTransformer) or (use is not None and use.class_attention)
    if not is_supported or getattr(model, "cls_token", None) is None:
        raise ValueError(f"class attention needs a ViT with a class token, got {type(model).__name__}")
    vit: Any = model
    inputs: list[Tensor] = []
    training = model.training
    attn = vit.blocks[-1].attn
    hook = attn.register_forward_pre_hook(lambda _, arguments: inputs.append(arguments[0]))
    try:
        with torch.no_grad():
            model.eval()  # stochastic depth would give other maps each time
            vit.forward_features(images)
            q, k, _ = project(attn, inputs[0])
            weights = class_attention_row(attn, q, k)  # [B, N]
    finally:
        hook.remove()
        model.train(training)
    patches = weights[:, getattr(model, "num_prefix_tokens", 1) :]
    own = math.isqrt(patches.shape[1])
    low, high = patches.amin(1, keepdim=True), patches.amax(1, keepdim=True)
    maps = ((patches - low) / (high - low).clamp(min=1e-12)).unflatten(1, (1, own, own))
    if side != own:
        maps = F.interpolate(maps, side, mode="nearest" if side % own == 0 else "bilinear")
    return maps.flatten(1)
