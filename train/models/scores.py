"""Score maps that need no zoomer: what a ZoomViT's scores are held against. Tensors in, scores in [0, 1] out."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from zpipe.train.models.operating_points import score_use


def centre_prior(side: int, sigma: float = 0.25) -> Tensor:
    """A Gaussian around the image's centre, 1 at its peak. sigma in image sides. -> [side * side]."""
    offset = (torch.arange(side) + 0.5) / side - 0.5
    wave = torch.exp(-(offset**2) / (2 * sigma**2))
    prior = wave[:, None] * wave  # [side, side]
    return (prior / prior.max()).flatten()


def entropy_scores(images: Tensor, side: int, bins: int = 32) -> Tensor:
    """How varied the grey values of each cell are: the Shannon entropy of their histogram, as a share of the highest
    possible. The intuitive measure of importance that the paper argues against (section 3.2; Table 11).

    images [B, D, H, W] on any scale; grey is the mean over channels, its range in the image cut into `bins`.
    -> [B, side * side]. Raises ValueError when side doesn't divide the image.
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
    most = math.log(max(min(bins, cells.shape[2]), 2))
    return (entropy / most).clamp(max=1.0)  # rounding may lead a hair above


def class_attention(model: nn.Module, images: Tensor, side: int) -> Tensor:
    """The attention that the class token pays to each patch in the last block, mean over heads, min-max per image.

    model: a timm VisionTransformer with a class token, or a ZoomViT, which then runs with nothing zoomed. It costs that
    model's forward pass. images [B, D, H, W] -> [B, side * side], each cell the value of the patch that it lies in
    (bilinear where neither grid divides the other). Raises ValueError for another kind of model.
    """
    use = score_use(model)
    known = isinstance(model, VisionTransformer) or (use is not None and use.class_attention)
    if not known or getattr(model, "cls_token", None) is None:
        raise ValueError(f"class attention needs a ViT with a class token, got {type(model).__name__}")
    seen: list[Tensor] = []
    training = model.training
    attn = model.blocks[-1].attn
    hook = attn.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    try:
        with torch.no_grad():
            model.eval()  # stochastic depth would draw other maps each time
            model.forward_features(images)
            x = seen[0]  # [B, N, E]
            q, k, _ = attn.qkv(x).unflatten(2, (3, attn.num_heads, attn.head_dim)).permute(2, 0, 3, 1, 4)
            q, k = attn.q_norm(q[:, :, :1]), attn.k_norm(k)  # [B, H, 1, D], [B, H, N, D]
            weights = (q @ k.transpose(2, 3) * attn.scale).softmax(dim=3).mean(dim=1)[:, 0]  # [B, N]
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
