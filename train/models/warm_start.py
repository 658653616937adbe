"""A ZoomViT that starts from the weights of a plain ViT: the kernel for both patch sizes, the positions to both grids."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zpipe.train.models.zoomvit import ZoomViT


class WarmStart(NamedTuple):
    """What `load_vit` did: the names of our parameters that it filled, and one line for each thing it left out."""

    filled: tuple[str, ...]
    left: tuple[str, ...]


@torch.no_grad()
def load_vit(model: ZoomViT, vit: nn.Module | Mapping[str, Tensor]) -> WarmStart:
    """Start a ZoomViT from a plain ViT or DeiT of the same width and depth, in place.

    Blocks, norm, patch kernel and class token are copied. The ViT's position table goes to the grid of its patch
    size: the coarse one at zoom factor 2, whose fine positions are it enlarged x2 (bicubic), the fine one at 0.5,
    whose coarse positions are its 2 x 2 means. With nothing zoomed at zoom factor 2, or everything at 0.5, the
    logits are those of the ViT. A position table for another number of patches is resized (bicubic) first.

    Left as they were, each with a line in the result: a head for another number of classes, the positions of a model
    with fixed ones, and the distillation token of a distilled DeiT.

    Args:
        model: the ZoomViT.
        vit: a timm VisionTransformer or its state dict.

    Raises:
        ValueError: the two differ in any other way (width, depth, patch size, LayerScale, norms, register tokens).
            The model is then untouched.
    """
    source = dict(vit.state_dict() if isinstance(vit, nn.Module) else vit)
    target = model.state_dict()
    updates: dict[str, Tensor] = {}
    left: list[str] = []

    for name in ("cls_token", "pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias"):
        if name not in source:
            raise ValueError(f"not the state dict of a plain ViT: it has no {name}")
    updates["cls_token"] = source.pop("cls_token")
    updates["patch_embed.weight"] = source.pop("patch_embed.proj.weight")
    updates["patch_embed.bias"] = source.pop("patch_embed.proj.bias")

    positions = source.pop("pos_embed")
    prefix = 1
    if "dist_token" in source:
        prefix = 2
        for name in [name for name in source if name == "dist_token" or name.startswith("head_dist.")]:
            left.append(f"{name}: ZoomViT has no distillation token")
            source.pop(name)
    elif math.isqrt(positions.shape[1]) ** 2 == positions.shape[1]:
        prefix = 0  # DeiT-III: the class token has no position
    if model.pos != "learned":
        left.append("pos_embed: the model's positions are fixed")
    else:
        updates |= _positions_from_vit(model, positions, prefix)

    head = {name: source.pop(name) for name in ("head.weight", "head.bias") if name in source}
    classes = len(head["head.bias"]) if "head.bias" in head else 0
    if classes == model.num_classes:
        updates |= head
    else:
        left.append(f"head: the ViT has {classes} classes, the model {model.num_classes}")

    body = {name for name in target if name.startswith(("blocks.", "norm."))}
    if differ := sorted(body ^ source.keys()):
        remedy = "; give the model init_values=1e-4" if ".ls1." in differ[0] and differ[0] in source else ""
        raise ValueError(f"the ViT and the model are not built alike: {differ[0]} is only in one of them{remedy}")
    updates |= source
    for name, value in updates.items():
        if value.shape != target[name].shape:
            raise ValueError(f"{name}: the ViT has {list(value.shape)}, the model {list(target[name].shape)}")
    for name, value in updates.items():
        target[name].copy_(value)
    return WarmStart(filled=tuple(updates), left=tuple(left))


def _positions_from_vit(model: ZoomViT, positions: Tensor, prefix: int) -> dict[str, Tensor]:
    """positions [1, prefix + side * side, E] of a ViT -> the model's three position tables."""
    side = math.isqrt(positions.shape[1] - prefix)
    if side * side != positions.shape[1] - prefix:
        raise ValueError(f"pos_embed: {positions.shape[1]} positions are no square grid with {prefix} before it")
    positions = positions.float()
    grid = positions[:, prefix:].transpose(1, 2).unflatten(2, (side, side))  # [1, E, side, side]
    if side != model.score_grid:
        grid = _resize(grid, model.score_grid)
    if model.zoom_factor == 2.0:
        coarse, fine = grid, _resize(grid, 2 * model.score_grid)
    else:
        coarse, fine = F.avg_pool2d(grid, 2), grid
    return {
        "pos_cls": positions[:, :1] if prefix else torch.zeros_like(positions[:, :1]),
        "pos_coarse": coarse.flatten(2).transpose(1, 2),  # [1, C, E]
        "pos_fine": fine.flatten(2).transpose(1, 2),  # [1, 4C, E]
    }


def _resize(grid: Tensor, side: int) -> Tensor:
    return F.interpolate(grid, size=(side, side), mode="bicubic", align_corners=False, antialias=True)
