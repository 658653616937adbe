"""Models of two grids that start from the weights of a plain ViT: one kernel for both, the positions to both grids."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zpipe.train.models.cfvit import CFViT
from zpipe.train.models.zoomvit import ZoomViT


class WarmStart(NamedTuple):
    """What `load_vit` did: the names of our parameters that it filled, and one line for each thing it left out."""

    filled: tuple[str, ...]
    left: tuple[str, ...]


@torch.no_grad()
def load_vit(model: ZoomViT | CFViT, vit: nn.Module | Mapping[str, Tensor]) -> WarmStart:
    """Start a ZoomViT, a CFViT or an LFViT from a plain ViT or DeiT of the same width and depth, in place.

    Blocks, norm, patch kernel and class token are copied. The ViT's position table goes to the grid of its patch
    size: the coarse one at zoom factor 2, whose fine positions are it enlarged x2 (bicubic), the fine one at 0.5,
    whose coarse positions are its 2 x 2 means. With nothing zoomed at zoom factor 2, or everything at 0.5, the
    logits are those of the ViT. A position table for another number of patches is resized (bicubic) first.

    The two stages of a CFViT take the ViT's table, resized to their grids, and its class position each. Where nothing is
    reused and all cells are refined, with positions, the fine stage's logits are those of the ViT.

    Left as they were, each with a line in the result: a head for another number of classes, the positions of a model
    with fixed ones, the reuse MLP of a CFViT, and the distillation token of a distilled DeiT.

    Args:
        model: the ZoomViT, CFViT or LFViT.
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
            left.append(f"{name}: {type(model).__name__} has no distillation token")
            source.pop(name)
    elif math.isqrt(positions.shape[1]) ** 2 == positions.shape[1]:
        prefix = 0  # DeiT-III: the class token has no position
    if isinstance(model, CFViT):
        updates |= _positions_of_stages(model, positions, prefix)
        if model.reuse is not None:
            left.append("reuse: a ViT has none")
    elif model.pos != "learned":
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
    first, grid = _class_and_grid(positions, prefix)
    if grid.shape[-1] != model.score_grid:
        grid = _resize(grid, model.score_grid)
    if model.zoom_factor == 2.0:
        coarse, fine = grid, _resize(grid, 2 * model.score_grid)
    else:
        coarse, fine = F.avg_pool2d(grid, 2), grid
    return {
        "pos_cls": first,
        "pos_coarse": coarse.flatten(2).transpose(1, 2),  # [1, C, E]
        "pos_fine": fine.flatten(2).transpose(1, 2),  # [1, 4C, E]
    }


def _positions_of_stages(model: CFViT, positions: Tensor, prefix: int) -> dict[str, Tensor]:
    """positions [1, prefix + side * side, E] of a ViT -> the model's two tables, [1, 1 + C, E] and [1, 1 + 4C, E]."""
    first, grid = _class_and_grid(positions, prefix)
    tables = {}
    for name, side in (("pos_coarse", model.coarse_grid), ("pos_fine", model.score_grid)):
        resized = grid if grid.shape[-1] == side else _resize(grid, side)
        tables[name] = torch.cat([first, resized.flatten(2).transpose(1, 2)], dim=1)
    return tables


def _class_and_grid(positions: Tensor, prefix: int) -> tuple[Tensor, Tensor]:
    """positions [1, prefix + side * side, E] -> the class token's [1, 1, E], 0 if it has none, and [1, E, side, side]."""
    side = math.isqrt(positions.shape[1] - prefix)
    if side * side != positions.shape[1] - prefix:
        raise ValueError(f"pos_embed: {positions.shape[1]} positions are no square grid with {prefix} before it")
    positions = positions.float()
    first = positions[:, :1] if prefix else torch.zeros_like(positions[:, :1])
    return first, positions[:, prefix:].transpose(1, 2).unflatten(2, (side, side))


def _resize(grid: Tensor, side: int) -> Tensor:
    return F.interpolate(grid, size=(side, side), mode="bicubic", align_corners=False, antialias=True)
