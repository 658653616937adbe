"""Which requests an attribution can answer, and which models the closed form can explain.

`zpipe.pipeline.recorded_forward` computes the forward pass of a ViT part by part, so a part that it does not know would
silently give wrong maps. These checks refuse such a part by name.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from timm.layers import GELU, GELUTanh, LayerNorm, LayerScale, Mlp, PatchEmbed
from timm.models.vision_transformer import Attention, Block, VisionTransformer
from torch import Tensor, nn

from zpipe.pipeline.classifier import Classifier, Targets


def check_supported(model: nn.Module) -> None:
    """Check that the relevance rules of every part of a model are implemented.

    timm's VisionTransformer is supported with a class token that alone feeds the head, and with pre-norm blocks of
    plain attention and a GELU MLP, with or without LayerScale, biases, register tokens and a norm before the blocks
    (CLIP).

    Raises:
        ValueError: A part has no rule; the message names it.
    """
    if type(model) is not VisionTransformer:
        raise ValueError(f"no relevance rules for {type(model).__name__}: a timm VisionTransformer is needed")
    vit: VisionTransformer = model
    top = {
        "class_token=False": not vit.has_class_token,
        f"global_pool={vit.global_pool!r} (only 'token')": vit.global_pool != "token",
        "num_classes=0 (no classifier head)": type(vit.head) is nn.Identity,
        "fc_norm=True (a norm after the pooling)": type(vit.fc_norm) is not nn.Identity,
        "attention pooling": getattr(vit, "attn_pool", None) is not None,
        "no blocks": len(vit.blocks) == 0,
        "dynamic_img_pad=True": vit.patch_embed.dynamic_img_pad if type(vit.patch_embed) is PatchEmbed else False,
    }
    for part, present in top.items():
        if present:
            raise ValueError(f"no relevance rules for a VisionTransformer with {part}")
    _check_part("patch_embed", vit.patch_embed, PatchEmbed)
    _check_part("norm", vit.norm, LayerNorm, nn.LayerNorm)
    _check_part("head", vit.head, nn.Linear)
    for number, block in enumerate(vit.blocks):
        name = f"blocks.{number}"
        _check_part(name, block, Block)
        attn, mlp = block.attn, block.mlp
        _check_part(f"{name}.attn", attn, Attention)
        for norm in ("q_norm", "k_norm"):
            if type(getattr(attn, norm)) is not nn.Identity:
                raise ValueError(f"no relevance rules for a VisionTransformer with qk_norm=True ({name}.attn.{norm})")
        _check_part(f"{name}.attn.norm", getattr(attn, "norm", None) or nn.Identity(), nn.Identity)
        _check_part(f"{name}.attn.gate", getattr(attn, "gate", None) or nn.Identity(), nn.Identity)
        _check_part(f"{name}.mlp", mlp, Mlp)
        _check_part(f"{name}.mlp.act", mlp.act, nn.GELU, GELU, GELUTanh)
        _check_part(f"{name}.mlp.norm", mlp.norm, nn.Identity)
        for part in ("norm1", "norm2"):
            _check_part(f"{name}.{part}", getattr(block, part), LayerNorm, nn.LayerNorm)
        for part in ("ls1", "ls2"):
            _check_part(f"{name}.{part}", getattr(block, part), LayerScale, nn.Identity)
        for part, layer in (
            ("attn.qkv", attn.qkv),
            ("attn.proj", attn.proj),
            ("mlp.fc1", mlp.fc1),
            ("mlp.fc2", mlp.fc2),
        ):
            _check_part(f"{name}.{part}", layer, nn.Linear)


def _check_part(name: str, module: nn.Module, *kinds: type[nn.Module]) -> None:
    # Only the exact class, because a subclass may compute something else.
    if type(module) not in kinds:
        wanted = " or ".join(dict.fromkeys(kind.__name__ for kind in kinds))
        raise ValueError(f"no relevance rule for {name}, a {type(module).__name__}: {wanted} is needed")


def check_request(classifier: Classifier, images: Tensor, targets: Targets) -> None:
    """Check the arguments of an attribution, for a classifier of any family; an attribution method calls this first.

    Args:
        classifier: The model.
        images: [B, C, H, W].
        targets: Class numbers [B] or [B, K]; what a function computes from the logits is checked by `resolve_targets`.

    Raises:
        ValueError: The attribution cannot work with one of them; the message says which and why.
    """
    if classifier.num_classes == 0:
        raise ValueError(f"a {type(classifier.model).__name__} with num_classes=0 has no classifier head: give it one")
    weight = _check_parts(classifier)
    shape = (classifier.channels, *classifier.image_size)
    if images.ndim != 4 or tuple(images.shape[1:]) != shape:
        wanted = ", ".join(map(str, shape))
        raise ValueError(f"images have shape {list(images.shape)}, the model takes [B, {wanted}]")
    if (images.dtype, images.device) != (weight.dtype, weight.device):
        raise ValueError(
            f"images are {images.dtype} on {images.device}, the model is {weight.dtype} on {weight.device}"
        )
    if isinstance(targets, Tensor):
        _check_targets(targets, len(images))
    if _read_values.get():
        check_values(images, targets, classifier.num_classes)


def check_values(images: Tensor, targets: Targets, classes: int) -> None:
    """Check that pixels are finite and targets classes of the model. It waits for an accelerator that has them.

    Args:
        images: Pixels of any layout, the image first.
        targets: Class numbers [B] or [B, K]; what a function computes from the logits is not checked.
        classes: Number of classes.

    Raises:
        ValueError: A value is wrong; the message says which.
    """
    if images.is_floating_point():
        broken = ~images.isfinite().flatten(1).all(dim=1)
        if broken.any():
            raise ValueError(f"image {int(broken.nonzero()[0])} of the batch has pixels that are NaN or infinite")
    if isinstance(targets, Tensor):
        _check_classes(targets, classes)


# Whether values are read to check them.
_read_values: ContextVar[bool] = ContextVar("_read_values", default=True)


@contextmanager
def values_are_checked() -> Iterator[None]:
    """Skip the checks of values of images and targets in this context, because the caller has made them.

    On an accelerator, reading them would wait until it has done all its work. See `check_values`.
    """
    token = _read_values.set(False)
    try:
        yield
    finally:
        _read_values.reset(token)


def resolve_targets(targets: Targets, logits: Tensor) -> tuple[Tensor, bool]:
    """Determine the target classes of a batch with logits [B, classes].

    Returns:
        Class numbers, int64 [B, K] on the device of the logits, and whether the targets were [B] instead of [B, K].

    Raises:
        ValueError: Targets that were computed from the logits do not fit.
    """
    if not isinstance(targets, Tensor):
        targets = targets(logits)
        _check_targets(targets, len(logits))
        if _read_values.get():
            _check_classes(targets, logits.shape[1])
    targets = targets.to(logits.device, torch.int64, copy=True)  # autograd does not take one of inference mode
    single = targets.ndim == 1
    return (targets[:, None] if single else targets), single


def _check_parts(classifier: Classifier) -> Tensor:
    """Check that model and head are in eval mode and have one dtype and device. Returns the weight that tells them."""
    parts = [classifier.model] if classifier.head is None else [classifier.model, classifier.head]
    for part in parts:
        training = next((name for name, module in part.named_modules() if module.training), None)
        if training is not None:
            raise ValueError(f"the model is in train mode ({training or 'all of it'}): call model.eval() first")
    weights = [named for part in parts for named in part.named_parameters()]
    first_name, first = weights[0]
    for name, tensor in weights:
        if (tensor.dtype, tensor.device) != (first.dtype, first.device):
            raise ValueError(
                f"the model mixes dtypes or devices: {name} is {tensor.dtype} on {tensor.device}, "
                f"{first_name} {first.dtype} on {first.device}"
            )
    return first


def _check_targets(targets: Tensor, count: int) -> None:
    if targets.dtype not in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8):
        raise ValueError(f"targets are {targets.dtype}, class numbers are integers")
    if targets.ndim not in (1, 2) or len(targets) != count or (targets.ndim == 2 and targets.shape[1] == 0):
        raise ValueError(f"targets have shape {list(targets.shape)}, {count} images need [{count}] or [{count}, K]")


def _check_classes(targets: Tensor, classes: int) -> None:
    outside = (targets < 0) | (targets >= classes)
    if outside.any():
        number = int(targets[outside][0])
        raise ValueError(f"target class {number} is outside 0..{classes - 1}, the classes of the model")
