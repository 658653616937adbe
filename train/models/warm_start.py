"""Fill models with the weights of others: of their own kind, or of a plain ViT of the same width and depth."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import timm
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import Tensor, nn

Positions = Callable[[Tensor, Tensor], dict[str, Tensor]]


class WarmStart(NamedTuple):
    """The result of a warm start.

    Attributes:
        filled: names of the model's parameters that were filled.
        left: a line for each thing that was left out.
    """

    filled: tuple[str, ...]
    left: tuple[str, ...]


@runtime_checkable
class StartsFromViT(Protocol):
    """A model that can start from a plain ViT.

    `own_prefix` begins the names of parameters that state dicts of such models have, and those of plain ViTs don't.
    """

    own_prefix: str

    def load_from_vit(self, vit: nn.Module | Mapping[str, Tensor]) -> WarmStart:
        """Fill the model, in place, from a ViT or its state dict."""
        ...


def load_vit(model: StartsFromViT, vit: nn.Module | Mapping[str, Tensor]) -> WarmStart:
    """Start a ZoomViT, a CFViT or an LFViT from a plain ViT or DeiT of the same width and depth, in place.

    Blocks, norm, patch kernel and class token are copied; `load_from_vit` of each model describes what becomes of the
    position table, which is first resized (bicubic) if it has another number of patches.

    Some things are left as they were, each with a line in the result: a head for another number of classes, the
    positions of a model with fixed ones, the reuse MLP of a CFViT, and the distillation token of a distilled DeiT.

    Args:
        model: the model to fill.
        vit: a timm VisionTransformer or its state dict.

    Raises:
        ValueError: the two differ in any other way (width, depth, patch size, LayerScale, norms, register tokens).
            The model is then unchanged.
    """
    return model.load_from_vit(vit)


def load_weights(model: nn.Module, state: Mapping[str, Tensor]) -> WarmStart:
    """Fill a model, in place, from the weights of its kind, or of a plain ViT if it can start from one.

    A plain ViT may differ from another in image and patch size. A head for other classes is left as it was.

    Raises:
        ValueError: the two are not built alike.
        RuntimeError: the same, from PyTorch or timm.
    """
    if isinstance(model, StartsFromViT) and not any(name.startswith(model.own_prefix) for name in state):
        return model.load_from_vit(state)
    values = checkpoint_filter_fn(dict(state), model) if isinstance(model, VisionTransformer) else dict(state)
    cfg: Mapping[str, Any] = getattr(model, "pretrained_cfg", {"classifier": "head"})
    heads = [cfg["classifier"]] if isinstance(cfg["classifier"], str) else cfg["classifier"]
    own = model.state_dict()
    unfit = {
        name: own[name]
        for name in own
        if name.startswith(tuple(f"{head}." for head in heads))
        and (name not in values or values[name].shape[0] != own[name].shape[0])
    }
    model.load_state_dict(values | unfit)
    filled = tuple(name for name in values if name not in unfit)
    return WarmStart(filled=filled, left=tuple(f"{name}: of other classes" for name in unfit))


@torch.no_grad()
def fill_from_vit(
    model: nn.Module,
    vit: nn.Module | Mapping[str, Tensor],
    positions: Positions | None,
    left: Sequence[str] = (),
) -> WarmStart:
    """Copy a plain ViT into a model with the same blocks, `norm`, `head`, `cls_token`, and `patch_embed` as its kernel.

    Args:
        model: the model to fill, in place.
        vit: a timm VisionTransformer or its state dict.
        positions: turns the ViT's positions, of the class token [1, 1, E] and of the patches [1, E, side, side], into
            the model's tables by name; None leaves the model's as they are.
        left: lines about what the model itself leaves out.

    Raises:
        ValueError: as of `load_vit`.
    """
    source: dict[str, Tensor] = dict(vit.state_dict() if isinstance(vit, nn.Module) else vit)
    updates: dict[str, Tensor] = {}
    notes = _remove_distillation(model, source)
    prefix = 2 if notes else 1
    for name in ("cls_token", "pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias"):
        if name not in source:
            raise ValueError(f"not the state dict of a plain ViT: it has no {name}")
    updates["cls_token"] = source.pop("cls_token")
    updates["patch_embed.weight"] = source.pop("patch_embed.proj.weight")
    updates["patch_embed.bias"] = source.pop("patch_embed.proj.bias")
    table = source.pop("pos_embed")
    if prefix == 1 and math.isqrt(table.shape[1]) ** 2 == table.shape[1]:
        prefix = 0  # DeiT-III: the class token has no position
    if positions is not None:
        updates |= positions(*_class_and_grid(table, prefix))
    else:
        notes.append("pos_embed: the model's positions are fixed")
    notes += left

    names = ("head.weight", "head.bias")
    head: dict[str, Tensor] = {name: source.pop(name) for name in names if name in source}
    classes = len(head["head.bias"]) if "head.bias" in head else 0
    if classes == model.num_classes:
        updates |= head
    else:
        notes.append(f"head: the ViT has {classes} classes, the model {model.num_classes}")
    _check_alike(model.state_dict(), updates, source)
    target = model.state_dict()
    for name, value in (updates | source).items():
        target[name].copy_(value)
    return WarmStart(filled=(*updates, *source), left=tuple(notes))


def zooming_twin(plain: nn.Module, image_size: int, zoom_factor: float) -> nn.Module:
    """A ZoomViT with the weights of a plain ViT, without further training, in eval mode (ZoomViT, Table 13).

    Raises:
        ValueError: another kind of model, or a ViT that a ZoomViT can't start from.
    """
    if not isinstance(plain, VisionTransformer):
        raise ValueError(f"zooms with a plain ViT, not with {type(plain).__name__}")
    block = plain.blocks[0]
    model = timm.create_model(
        "zoomvit_small_patch16_224",
        zoom_factor=zoom_factor,
        zfe="none",
        img_size=image_size,
        patch_size=plain.patch_embed.patch_size[0],
        embed_dim=plain.embed_dim,
        depth=len(plain.blocks),
        num_heads=block.attn.num_heads,
        mlp_ratio=block.mlp.fc1.out_features / plain.embed_dim,
        init_values=None if getattr(block.ls1, "gamma", None) is None else 1e-4,
        num_classes=plain.num_classes,
    )
    load_vit(model, plain)
    return model.eval()


def resize_positions(grid: Tensor, side: int) -> Tensor:
    """Resize positions [1, E, s, s] to [1, E, side, side], bicubic; those of the same side stay as they are."""
    if grid.shape[-1] == side:
        return grid
    return F.interpolate(grid, size=(side, side), mode="bicubic", align_corners=False, antialias=True)


def _remove_distillation(model: nn.Module, source: dict[str, Tensor]) -> list[str]:
    """Remove the tensors that only a distilled DeiT has; return a line about each."""
    if "dist_token" not in source:
        return []
    names = [name for name in source if name == "dist_token" or name.startswith("head_dist.")]
    for name in names:
        source.pop(name)
    return [f"{name}: {type(model).__name__} has no distillation token" for name in names]


def _check_alike(target: dict[str, Tensor], updates: dict[str, Tensor], body: dict[str, Tensor]) -> None:
    """Raise ValueError unless `body` has exactly the model's blocks and norm, and all shapes agree."""
    own = {name for name in target if name.startswith(("blocks.", "norm."))}
    if differ := sorted(own ^ body.keys()):
        remedy = "; give the model init_values=1e-4" if ".ls1." in differ[0] and differ[0] in body else ""
        raise ValueError(f"the ViT and the model are not built alike: {differ[0]} is only in one of them{remedy}")
    for name, value in (updates | body).items():
        if value.shape != target[name].shape:
            raise ValueError(f"{name}: the ViT has {list(value.shape)}, the model {list(target[name].shape)}")


def _class_and_grid(positions: Tensor, prefix: int) -> tuple[Tensor, Tensor]:
    """Split positions [1, prefix + side * side, E].

    Returns:
        The class token's [1, 1, E], 0 if it has none, and the grid [1, E, side, side].
    """
    side = math.isqrt(positions.shape[1] - prefix)
    if side * side != positions.shape[1] - prefix:
        raise ValueError(f"pos_embed: {positions.shape[1]} positions are no square grid with {prefix} before it")
    positions = positions.float()
    first = positions[:, :1] if prefix else torch.zeros_like(positions[:, :1])
    return first, positions[:, prefix:].transpose(1, 2).unflatten(2, (side, side))
