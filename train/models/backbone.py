"""What the models share.

- `StandaloneModel`, `transformer_blocks`, `linear_head`, `init_linear`: models made of their own layers;
- `compiled`: any model, compiled;
- `WrappedModel`, `build_wrapped`, `create_backbone`: models around a timm model;
- `check_plain` and the functions after it: running a plain timm ViT part by part, and counting its multiply-adds;
- `untrained_cfgs`, `build`, the `DEIT_*` sizes: timm's registry.
"""

from __future__ import annotations

import copy
import inspect
import math
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar, cast

import timm
import torch
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import PatchEmbed, trunc_normal_
from timm.models import build_model_with_cfg, generate_default_cfgs, get_pretrained_cfg
from timm.models.vision_transformer import Attention, Block, VisionTransformer
from torch import Tensor, nn

from zpipe.train.models.checks import refuse_nan
from zpipe.train.models.operating_points import ImageCost, OperatingPoint, count_patches
from zpipe.train.models.warm_start import WarmStart, load_weights


class StandaloneModel(nn.Module):
    """A model made of its own layers, with one linear `head`, and the methods that timm's tools require.

    `undecayed` are the parameters without weight decay, besides the one-dimensional ones. `stem_pattern` matches the
    names of the parameters before the first block, for layer-wise learning rates.
    """

    undecayed: ClassVar[tuple[str, ...]]
    stem_pattern: ClassVar[str]
    num_classes: int
    embed_dim: int
    head: nn.Module

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Return the names of parameters without weight decay, besides the one-dimensional ones."""
        return set(self.undecayed)

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Return which parameters belong to which layer, for layer-wise learning rates."""
        return {"stem": self.stem_pattern, "blocks": [(r"^blocks\.(\d+)", None), (r"^norm", (99999,))]}

    def get_classifier(self) -> nn.Module:
        """Return the head."""
        return self.head

    def reset_classifier(self, num_classes: int) -> None:
        """Replace the head by a freshly initialised one."""
        self.num_classes = num_classes
        self.head = linear_head(self.embed_dim, num_classes).to(next(self.parameters())).apply(init_linear)


def linear_head(width: int, num_classes: int) -> nn.Module:
    """A linear classifier, or an identity for no classes; initialised by PyTorch's default."""
    return nn.Linear(width, num_classes) if num_classes else nn.Identity()


def init_linear(module: nn.Module) -> None:
    """Initialise a linear layer as timm's ViT does; leave other modules alone. To be used with `nn.Module.apply`."""
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def transformer_blocks(
    embed_dim: int,
    depth: int,
    num_heads: int,
    mlp_ratio: float,
    drop_path_rate: float,
    block: Callable[..., nn.Module] = Block,
    **changes: Any,
) -> nn.Sequential:
    """timm's pre-norm blocks, with biases and a LayerNorm as in DeiT.

    Args:
        embed_dim: width of the tokens.
        depth: number of blocks.
        num_heads: attention heads of a block.
        mlp_ratio: width of the MLPs, as a multiple of embed_dim.
        drop_path_rate: stochastic depth of the last block; it grows linearly from 0 at the first.
        block: creates a block.
        changes: further arguments of every block.
    """
    arguments = {"qkv_bias": True, "norm_layer": layer_norm} | changes
    rates = drop_path_rates(drop_path_rate, depth)
    return nn.Sequential(*(block(embed_dim, num_heads, mlp_ratio, drop_path=rate, **arguments) for rate in rates))


def drop_path_rates(last: float, depth: int) -> list[float]:
    """The rates of stochastic depth of `depth` blocks, growing linearly from 0 to `last`."""
    return [last * i / max(depth - 1, 1) for i in range(depth)]


class WrappedModel(nn.Module):
    """A model around a timm model: forwards what timm's optimizers and fine-tuning tools require of a model.

    The timm model is `backbone`; its parameters are under `backbone.` in the state dict.
    """

    own_prefix = "backbone."  # see `warm_start.StartsFromViT`
    backbone: Any  # a timm model, whose attributes differ from kind to kind
    num_classes: int

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.num_classes, self.num_features = self.backbone.num_classes, self.backbone.num_features

    def cost(self, point: OperatingPoint, kind: int | None = None) -> ImageCost:
        """Return the cost of an image, which is the same for every image; see `operating_points.cost`."""
        return ImageCost(count_patches(self.backbone), point.arguments)

    def load_from_vit(self, vit: nn.Module | Mapping[str, Tensor]) -> WarmStart:
        """Fill the backbone, in place, from a model of its kind; see `warm_start.load_weights`."""
        return load_weights(self.backbone, vit.state_dict() if isinstance(vit, nn.Module) else vit)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Return the names of parameters without weight decay, besides the one-dimensional ones."""
        names = self.backbone.no_weight_decay() if hasattr(self.backbone, "no_weight_decay") else ()
        return {f"backbone.{name}" for name in names}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Return which parameters belong to which layer of the backbone, for layer-wise learning rates."""

        def prefixed(pattern: str) -> str:
            unanchored = re.sub(r"(?<!\[)\^", "", pattern)  # a ^ after a bracket is no anchor
            return rf"^backbone\.(?:{unanchored})"

        return {
            name: prefixed(group)
            if isinstance(group, str)
            else [(prefixed(pattern), order) for pattern, order in group]
            for name, group in self.backbone.group_matcher(coarse=coarse).items()
        }

    def get_classifier(self) -> nn.Module:
        """Return the head of the backbone."""
        return self.backbone.get_classifier()

    def reset_classifier(self, num_classes: int) -> None:
        """Replace the head by a freshly initialised one."""
        self.num_classes = num_classes
        self.backbone.reset_classifier(num_classes)


def build_wrapped(kind: type[WrappedModel], name: str, pretrained: bool, **kwargs: Any) -> Any:
    """Build a wrapped model of timm's registry.

    A model without a `pretrained_cfg` of its own (saved models have one) takes from its backbone's the mean, standard
    deviation, interpolation and crop, and the names of the first convolution and the classifier.
    """
    if kwargs.get("pretrained_cfg") is None:
        inner = kwargs.get("backbone", inspect.signature(kind).parameters["backbone"].default)
        kwargs["pretrained_cfg_overlay"] = _cfg_of(inner) | (kwargs.get("pretrained_cfg_overlay") or {})
    return build_model_with_cfg(kind, name, pretrained, **kwargs)


def _cfg_of(backbone: str | nn.Module) -> dict[str, Any]:
    if isinstance(backbone, str):
        registered = get_pretrained_cfg(backbone, allow_unregistered=True)
        cfg = {} if registered is None else registered.to_dict()
    else:
        cfg = getattr(backbone, "pretrained_cfg", {})
    same = {key: cfg[key] for key in ("mean", "std", "interpolation", "crop_pct") if key in cfg}
    return same | {key: _prefixed(cfg[key]) for key in ("first_conv", "classifier") if cfg.get(key)}


def _prefixed(names: str | Sequence[str]) -> str | tuple[str, ...]:
    return f"backbone.{names}" if isinstance(names, str) else tuple(f"backbone.{name}" for name in names)


def create_backbone(
    name: str, img_size: int, num_classes: int, in_chans: int, backbone_args: dict[str, Any] | None, sized: bool = True
) -> nn.Module:
    """Create an untrained timm model.

    Args:
        name: its name in timm.
        img_size: pixels a side of its images.
        num_classes: number of classes.
        in_chans: channels of its images.
        backbone_args: further keyword arguments of the model, which override the ones above.
        sized: whether the model must have an `img_size`; without, a model that takes any size is accepted, too.

    Raises:
        ValueError: pretrained weights among the arguments, which would be stored with the model and fetched again each
            time it is loaded; or a model without `img_size` when sized.
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


def compiled(model: nn.Module, **options: Any) -> nn.Module:
    """A module to call in place of a model, with the same parameters, compiled; the model itself stays as it is.

    A model with a method `compiled` says itself which of its parts are compiled. Of timm's VisionTransformer these are
    the blocks, one graph for all of them, so that gradients can be sent block by block. Any other is compiled as a
    whole.

    Args:
        model: the model. A plain ViT stays in the mode, training or evaluation, in which it is now.
        options: of `torch.compile`.
    """
    own = getattr(model, "compiled", None)
    if own is not None:
        return cast(nn.Module, own(**options))
    if not has_blocks_to_compile(model):
        return cast(nn.Module, torch.compile(model, **options))
    twin: Any = copy.copy(model)  # shares parameters, buffers and all modules but those that are replaced here
    twin._modules = dict(model._modules)
    twin.blocks = nn.Sequential(*(cast(nn.Module, torch.compile(block, **options)) for block in twin.blocks))
    return cast(nn.Module, twin)


def has_blocks_to_compile(model: nn.Module) -> bool:
    """Whether `compiled` compiles the blocks of a model rather than the whole of it."""
    return hasattr(model, "compiled") or isinstance(model, VisionTransformer)


def check_plain(vit: nn.Module) -> int:
    """Check that the functions below can run a model part by part.

    Returns:
        Patches a side of the model's grid.

    Raises:
        ValueError: anything but timm's VisionTransformer with its standard blocks, square images and all patches.
    """
    problem = f"{type(vit).__name__} is no plain timm VisionTransformer"
    if not isinstance(vit, VisionTransformer) or type(vit).forward_features is not VisionTransformer.forward_features:
        raise ValueError(f"{problem}; choose a vit_*, deit_* or deit3_* model")
    for block in vit.blocks:
        if type(block) is not Block or not _is_standard(block.attn):
            raise ValueError(f"{problem}: its blocks are of another form than Block with Attention")
    if (
        vit.dynamic_img_size
        or not isinstance(vit.patch_drop, nn.Identity)
        or not isinstance(vit.patch_embed, PatchEmbed)
    ):
        raise ValueError(f"{problem}: it has patch dropout, a size that changes, or another patch embedding")
    height, width = vit.patch_embed.grid_size
    if height != width:
        raise ValueError(f"images must be square, got patches on a grid of {height} x {width}")
    return int(height)


def _is_standard(attn: nn.Module) -> bool:
    """Whether attention is what `project` and `attend` compute; newer versions of timm can add a gate and a norm."""
    additions = (getattr(attn, "gate", None), getattr(attn, "norm", None))
    return type(attn) is Attention and all(part is None or isinstance(part, nn.Identity) for part in additions)


def embed(vit: VisionTransformer, images: Tensor) -> Tensor:
    """Embed images as the tokens that enter the first block of a ViT.

    Args:
        vit: a plain ViT.
        images: [B, D, H, W].

    Returns:
        [B, prefix + N, E].

    Raises:
        ValueError: images of another shape than the model's.
    """
    side, chans = vit.patch_embed.img_size[0], vit.patch_embed.proj.in_channels
    if tuple(images.shape[1:]) != (chans, side, side):
        raise ValueError(f"images must be [batch, {chans}, {side}, {side}], got {list(images.shape)}")
    return vit.norm_pre(vit._pos_embed(vit.patch_embed(images)))


def project(attn: Attention, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of normalised tokens [B, N, E], each [B, heads, N, D]."""
    q, k, v = attn.qkv(x).unflatten(2, (3, attn.num_heads, attn.head_dim)).permute(2, 0, 3, 1, 4)
    return attn.q_norm(q), attn.k_norm(k), v


def attend(attn: Attention, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """The rest of timm's attention after `project`, [B, N, E]. bias is added to the logits [B, heads, N, N]."""
    dropout = attn.attn_drop.p if attn.training else 0.0
    x = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropout)
    return attn.proj_drop(attn.proj(x.transpose(1, 2).flatten(2)))


def class_attention_row(attn: Attention, q: Tensor, k: Tensor) -> Tensor:
    """How much the first token attends to each token, mean over heads. q, k [B, heads, N, D] -> [B, N], >= float32."""
    logits = q[:, :, :1] @ k.transpose(2, 3) * attn.scale  # [B, heads, 1, N]
    return logits.softmax(dim=3, dtype=torch.promote_types(logits.dtype, torch.float32)).mean(dim=1)[:, 0]


def read_scores(scores: Tensor, batch: int, side: int) -> Tensor:
    """Resample scores to one number per patch: the plain mean of the score cells that a patch overlaps.

    Where several patches lie in one score cell, all of them get its score.

    Args:
        scores: [batch, s * s], row-major, for any s; with s = side they are returned as they are.
        batch: number of images.
        side: patches a side.

    Returns:
        [batch, side * side], detached.

    Raises:
        ValueError: scores of another shape, or NaN (see `checks.refuse_nan`).
    """
    own = math.isqrt(scores.shape[-1]) if scores.ndim == 2 else 0
    if scores.ndim != 2 or len(scores) != batch or own * own != scores.shape[1] or not own:
        raise ValueError(f"scores must be [{batch}, s * s], a square map for each image, got {list(scores.shape)}")
    refuse_nan(scores)
    scores = scores.detach()
    if own == side:
        return scores
    return F.adaptive_avg_pool2d(scores.float().unflatten(1, (1, own, own)), side).flatten(1)


def embed_macs(vit: VisionTransformer) -> int:
    """Multiply-adds of the patch embedding of an image."""
    return int(vit.patch_embed.num_patches * vit.patch_embed.proj.weight.numel())


def block_macs(block: Block, length: int, mlp_length: int | None = None) -> int:
    """Multiply-adds of a block over `length` tokens, `mlp_length` of which reach its MLP; None is all of them."""
    mlp_length = length if mlp_length is None else mlp_length
    products = 2 * length**2 * attention_width(block.attn)
    return length * linear_macs(block.attn) + mlp_length * linear_macs(block.mlp) + products


def linear_macs(module: nn.Module) -> int:
    """Multiply-adds per token of all linear layers in a module."""
    return sum(layer.weight.numel() for layer in module.modules() if isinstance(layer, nn.Linear))


def attention_width(attn: Attention) -> int:
    """Channels of all heads together; not all versions of timm that we support have a name for it."""
    return int(attn.num_heads * attn.head_dim)


def head_macs(vit: VisionTransformer) -> int:
    """Multiply-adds of the head of an image; of both heads of a distilled DeiT."""
    heads = [vit.head, getattr(vit, "head_dist", None)]
    return sum(head.weight.numel() for head in heads if isinstance(head, nn.Linear))


def check_images(images: Tensor, chans: int, side: int) -> None:
    """Raise ValueError unless images are [B, chans, side, side], and at least one."""
    if images.ndim != 4 or tuple(images.shape[1:]) != (chans, side, side) or images.shape[0] == 0:
        raise ValueError(f"images must be [batch, {chans}, {side}, {side}], got {list(images.shape)}")


def square_side(img_size: int | tuple[int, int]) -> int:
    """The side of square images, in pixels.

    Raises:
        ValueError: images that are not square.
    """
    height, width = img_size if isinstance(img_size, (tuple, list)) else (img_size, img_size)
    if height != width:
        raise ValueError(f"images must be square, got {height} x {width}")
    return int(height)


# Arguments of DeiT's sizes, and the normalisation of their blocks.
DEIT_TINY = {"patch_size": 16, "embed_dim": 192, "depth": 12, "num_heads": 3}
DEIT_SMALL = {"patch_size": 16, "embed_dim": 384, "depth": 12, "num_heads": 6}
DEIT_BASE = {"patch_size": 16, "embed_dim": 768, "depth": 12, "num_heads": 12}
layer_norm = partial(nn.LayerNorm, eps=1e-6)

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
    """timm's `default_cfgs` of models without pretrained weights; a module that registers models must define them.

    Args:
        names: the names of the models.
        changes: entries that differ from DeiT's.
    """
    return generate_default_cfgs({f"{name}.untrained": _CFG | changes for name in names})


def build(
    cls: type[nn.Module], variant: str, pretrained: bool, defaults: dict[str, Any], kwargs: dict[str, Any]
) -> Any:
    """Build a model of timm's registry; keyword arguments of the caller override `defaults`."""
    return build_model_with_cfg(cls, variant, pretrained, **defaults | kwargs)
