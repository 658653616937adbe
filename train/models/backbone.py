"""What models wrapped around a timm model share: making the backbone, and running a plain ViT part by part."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import PatchEmbed
from timm.models import build_model_with_cfg, generate_default_cfgs, get_pretrained_cfg
from timm.models.vision_transformer import Attention, Block, VisionTransformer
from torch import Tensor, nn

from zpipe.train.models.operating_points import ImageCost, OperatingPoint, count_patches
from zpipe.train.models.warm_start import WarmStart, load_weights


class WrappedModel(nn.Module):
    """A model around a timm model: what timm's optimizers and fine-tuning tools ask of it, passed on.

    The one inside is `backbone`, and the state dict has it under `backbone.`.
    """

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.num_classes, self.num_features = backbone.num_classes, backbone.num_features

    own_prefix = "backbone."  # in state dicts of this model, and not in those of plain ViTs

    def cost(self, point: OperatingPoint, kind: int | None = None) -> ImageCost:
        """The same for every image; see `operating_points.cost`."""
        return ImageCost(count_patches(self.backbone), point.arguments)

    def load_from_vit(self, vit: nn.Module | Mapping[str, Tensor]) -> WarmStart:
        """Start the backbone from a model of its kind, in place; see `warm_start.load_weights`."""
        return load_weights(self.backbone, vit.state_dict() if isinstance(vit, nn.Module) else vit)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Parameters that weight decay leaves alone, besides the one-dimensional ones."""
        names = self.backbone.no_weight_decay() if hasattr(self.backbone, "no_weight_decay") else ()
        return {f"backbone.{name}" for name in names}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Groups of parameters from input to output, for layer-wise learning rates: those of the backbone."""

        def inside(pattern: str) -> str:
            unanchored = re.sub(r"(?<!\[)\^", "", pattern)  # a ^ behind a bracket is no anchor
            return rf"^backbone\.(?:{unanchored})"

        return {
            name: inside(found) if isinstance(found, str) else [(inside(pattern), order) for pattern, order in found]
            for name, found in self.backbone.group_matcher(coarse=coarse).items()
        }

    def get_classifier(self) -> nn.Module:
        return self.backbone.get_classifier()

    def reset_classifier(self, num_classes: int) -> None:
        """Replace the head by a freshly initialised one."""
        self.num_classes = num_classes
        self.backbone.reset_classifier(num_classes)


def build_wrapped(kind: type[WrappedModel], name: str, pretrained: bool, **kwargs: Any) -> Any:
    """timm's builder, for models of its registry. A model without a description of its own, as one that was saved has, gets its
    backbone's: mean, standard deviation, crop, and where the first convolution and the classifier lie.
    """
    if kwargs.get("pretrained_cfg") is None:
        inner = kwargs.get("backbone", inspect.signature(kind).parameters["backbone"].default)
        kwargs["pretrained_cfg_overlay"] = _described(inner) | (kwargs.get("pretrained_cfg_overlay") or {})
    return build_model_with_cfg(kind, name, pretrained, **kwargs)


def _described(backbone: str | nn.Module) -> dict[str, Any]:
    if isinstance(backbone, str):
        found = get_pretrained_cfg(backbone, allow_unregistered=True)
        cfg = found.to_dict() if found is not None else {}
    else:
        cfg = getattr(backbone, "pretrained_cfg", {})
    same = {key: cfg[key] for key in ("mean", "std", "interpolation", "crop_pct") if key in cfg}
    return same | {key: _inside(cfg[key]) for key in ("first_conv", "classifier") if cfg.get(key)}


def _inside(names: str | Sequence[str]) -> str | tuple[str, ...]:
    return f"backbone.{names}" if isinstance(names, str) else tuple(f"backbone.{name}" for name in names)


def create_backbone(
    name: str, img_size: int, num_classes: int, in_chans: int, backbone_args: dict[str, Any] | None, sized: bool = True
) -> nn.Module:
    """The timm model of that name, untrained.

    backbone_args: further keyword arguments of it; they win over the others. sized: whether it must know its image size;
    otherwise a model that takes any size will do. Raises ValueError for weights among the arguments, which
    would be stored with the model and fetched again at every reload, and for a model without img_size when sized.
    """
    if unwanted := sorted(key for key in backbone_args or {} if key.startswith("pretrained")):
        raise ValueError(f"backbone_args: {unwanted[0]} is not for here; fill `backbone` afterwards")
    arguments = {"num_classes": num_classes, "in_chans": in_chans} | (backbone_args or {})
    try:
        return timm.create_model(name, pretrained=False, **{"img_size": img_size} | arguments)
    except TypeError as error:
        if "'img_size'" not in str(error):
            raise
        if sized:
            raise ValueError(f"{name} has no img_size, hence no regular grid of patches") from error
    return timm.create_model(name, pretrained=False, **arguments)


def check_plain(vit: nn.Module) -> int:
    """The side of a plain ViT's patch grid. Raises ValueError for a model that the functions below can't run part by part:
    other than timm's VisionTransformer with its usual blocks, a square image and all its patches.
    """
    told = f"{type(vit).__name__} is no plain timm VisionTransformer"
    if not isinstance(vit, VisionTransformer) or type(vit).forward_features is not VisionTransformer.forward_features:
        raise ValueError(f"{told}; choose a vit_*, deit_* or deit3_* model")
    for block in vit.blocks:
        if type(block) is not Block or not _usual(block.attn):
            raise ValueError(f"{told}: its blocks are of another form than Block with Attention")
    if (
        vit.dynamic_img_size
        or not isinstance(vit.patch_drop, nn.Identity)
        or not isinstance(vit.patch_embed, PatchEmbed)
    ):
        raise ValueError(f"{told}: it has patch dropout, a size that changes, or another patch embedding")
    height, width = vit.patch_embed.grid_size
    if height != width:
        raise ValueError(f"images must be square, got patches on a grid of {height} x {width}")
    return height


def _usual(attn: nn.Module) -> bool:
    """Whether attention is what `project` and `attend` compute; newer versions of timm know gates and a norm inside."""
    inside = (getattr(attn, "gate", None), getattr(attn, "norm", None))
    return type(attn) is Attention and all(part is None or isinstance(part, nn.Identity) for part in inside)


def embed(vit: VisionTransformer, images: Tensor) -> Tensor:
    """[B, D, H, W] -> tokens [B, prefix + N, E] as they enter the first block. Raises ValueError for images of another shape."""
    side, chans = vit.patch_embed.img_size[0], vit.patch_embed.proj.in_channels
    if tuple(images.shape[1:]) != (chans, side, side):
        raise ValueError(f"images must be [batch, {chans}, {side}, {side}], got {list(images.shape)}")
    return vit.norm_pre(vit._pos_embed(vit.patch_embed(images)))


def project(attn: Attention, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of normalised tokens [B, N, E], [B, heads, N, D] each."""
    q, k, v = attn.qkv(x).unflatten(2, (3, attn.num_heads, attn.head_dim)).permute(2, 0, 3, 1, 4)
    return attn.q_norm(q), attn.k_norm(k), v


def attend(attn: Attention, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """timm's attention from there on -> [B, N, E]. bias, broadcast to [B, heads, N, N], is added to the logits."""
    dropout = attn.attn_drop.p if attn.training else 0.0
    x = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropout)
    return attn.proj_drop(attn.proj(x.transpose(1, 2).flatten(2)))


def read_scores(scores: Tensor, batch: int, side: int) -> Tensor:
    """Scores as one number for each patch: of the score cells that a patch overlaps the plain mean.

    scores [batch, s * s], row-major, any s -> [batch, side * side]. Where s is the grid's side they stay as they are; where
    the patches are the smaller ones, all patches within a cell get its score. Raises ValueError for another shape
    and for NaN, which isn't looked for while a graph is compiled.
    """
    own = math.isqrt(scores.shape[-1]) if scores.ndim == 2 else 0
    if scores.ndim != 2 or len(scores) != batch or own * own != scores.shape[1] or not own:
        raise ValueError(f"scores must be [{batch}, s * s], a square map for each image, got {list(scores.shape)}")
    if not torch.compiler.is_compiling() and scores.isnan().any():
        raise ValueError("scores must be numbers, got NaN")
    scores = scores.detach()
    if own == side:
        return scores
    return F.adaptive_avg_pool2d(scores.float().unflatten(1, (1, own, own)), side).flatten(1)


def embed_macs(vit: VisionTransformer) -> int:
    """Multiply-adds of the patch embedding of an image."""
    return vit.patch_embed.num_patches * vit.patch_embed.proj.weight.numel()


def block_macs(block: Block, length: int, mlp_length: int | None = None) -> int:
    """Multiply-adds of a block over `length` tokens, of which its MLP sees `mlp_length`."""
    attn, mlp = (
        sum(x.weight.numel() for x in part.modules() if isinstance(x, nn.Linear)) for part in (block.attn, block.mlp)
    )
    return (
        length * attn
        + (length if mlp_length is None else mlp_length) * mlp
        + 2 * length**2 * attention_width(block.attn)
    )


def attention_width(attn: Attention) -> int:
    """Channels of all heads together; timm has no name for it in all versions that we support."""
    return attn.num_heads * attn.head_dim


def head_macs(vit: VisionTransformer) -> int:
    """Multiply-adds of the head of an image; of both heads of a distilled DeiT."""
    heads = [vit.head, getattr(vit, "head_dist", None)]
    return sum(head.weight.numel() for head in heads if isinstance(head, nn.Linear))


def square_side(img_size: int | tuple[int, int]) -> int:
    """The side of square images, in pixels. Raises ValueError for images of another shape."""
    height, width = img_size if isinstance(img_size, (tuple, list)) else (img_size, img_size)
    if height != width:
        raise ValueError(f"images must be square, got {height} x {width}")
    return int(height)


_CFG = {
    "url": "",
    "num_classes": 1000,
    "input_size": (3, 224, 224),
    "fixed_input_size": True,
    "crop_pct": 0.9,
    "interpolation": "bicubic",
    "mean": IMAGENET_DEFAULT_MEAN,
    "std": IMAGENET_DEFAULT_STD,
    "first_conv": "patch_embed",
    "classifier": "head",
}


def untrained_cfgs(*names: str, **changes: Any) -> Any:
    """timm's descriptions of models that have no pretrained weights; modules that register models export them."""
    return generate_default_cfgs({f"{name}.untrained": _CFG | changes for name in names})


def build(
    cls: type[nn.Module], variant: str, pretrained: bool, defaults: dict[str, Any], kwargs: dict[str, Any]
) -> Any:
    """timm's builder for a model of its registry, whose keyword arguments win over `defaults`."""
    return build_model_with_cfg(cls, variant, pretrained, **defaults | kwargs)
