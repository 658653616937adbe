"""The forward pass of a timm ViT, with records of everything that a downward sweep needs.

Symbols in the shape comments: B images, N tokens, Q live rows (N, or 1 in the last block, where only the class token
reaches the logits), D width, F hidden width of the MLP, H heads, E width of all heads together, d width of one head,
K target classes per image.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
import torch.nn.functional as F
from timm.layers import GELUTanh, LayerScale
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from zpipe.pipeline.classifier import Targets
from zpipe.pipeline.supported import resolve_targets


class Attribution(NamedTuple):
    """Maps and logits of a batch, in the dtype and on the device of the model."""

    maps: Tensor
    """[B, gh, gw] for targets [B], or [B, K, gh, gw] for targets [B, K]; raw, not normalised."""
    logits: Tensor
    """[B, classes]."""


class Linear(NamedTuple):
    """Weight and bias of a linear layer."""

    weight: Tensor  # [out, in]
    bias: Tensor | None  # [out]

    @classmethod
    def of(cls, layer: nn.Linear, scale: nn.Module | None = None) -> Linear:
        """The layer, merged with the LayerScale that may follow it.

        A linear layer and a factor per channel are one linear layer with scaled rows, and get relevance as such. So a
        network has the same map whether the factor is stored separately or multiplied in.
        """
        if not isinstance(scale, LayerScale):
            return cls(layer.weight, layer.bias)
        bias = None if layer.bias is None else layer.bias * scale.gamma
        return cls(layer.weight * scale.gamma[:, None], bias)

    def rows(self, rows: slice) -> Linear:
        """The layer that computes only these outputs."""
        return Linear(self.weight[rows], None if self.bias is None else self.bias[rows])

    def to(self, dtype: torch.dtype) -> Linear:
        """The layer in another dtype."""
        return Linear(self.weight.to(dtype), None if self.bias is None else self.bias.to(dtype))

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        return F.linear(x, self.weight, self.bias)


class Normed(NamedTuple):
    """The output of a LayerNorm, with what its gradient needs."""

    out: Tensor  # [B, tokens, D]
    mean: Tensor  # [B, tokens, 1]
    rstd: Tensor  # [B, tokens, 1]

    @classmethod
    def of(cls, norm: nn.LayerNorm, x: Tensor) -> Normed:
        """Normalise x [B, tokens, D]."""
        return cls(*torch.native_layer_norm(x, norm.normalized_shape, norm.weight, norm.bias, norm.eps))

    def to(self, dtype: torch.dtype) -> Normed:
        """The record in another dtype."""
        return Normed(*(part.to(dtype) for part in self))

    def grad(self, norm: nn.LayerNorm, x: Tensor, grad: Tensor) -> Tensor:
        """Gradient of the input x, from that of the output; all [B, tokens, D]."""
        weight = None if norm.weight is None else norm.weight.to(grad.dtype)
        args = (norm.normalized_shape, self.mean, self.rstd, weight, None)
        return torch.ops.aten.native_layer_norm_backward(grad, x, *args, [True, False, False])[0]


@dataclass(slots=True)
class BlockRecord:
    """What the sweep needs from one block."""

    x: Tensor  # [B, N, D] input
    norm1: Normed
    q: Tensor  # [B, H, Q, d]
    k: Tensor  # [B, H, N, d]
    v: Tensor  # [B, H, N, d]
    scores: Tensor  # [B, H, Q, N] Q K^T before it is scaled; the softmax is computed again rather than kept
    context: Tensor  # [B, H, Q, d] A V
    attended: Tensor  # [B, Q, D] output of the attention branch
    middle: Tensor  # [B, Q, D] input plus attended
    norm2: Normed
    hidden: Tensor  # [B, Q, F] before GELU
    active: Tensor  # [B, Q, F] after GELU
    mixed: Tensor  # [B, Q, D] output of the MLP branch
    out: Tensor  # [B, Q, D]

    def to(self, dtype: torch.dtype) -> BlockRecord:
        """The record in another dtype."""
        return BlockRecord(**{field.name: getattr(self, field.name).to(dtype) for field in fields(self)})


@dataclass(slots=True)
class TopRecord:
    """What the sweep needs from the final norm and the head."""

    x: Tensor  # [B, 1, D]
    norm: Normed
    logits: Tensor  # [B, 1, classes]

    def to(self, dtype: torch.dtype) -> TopRecord:
        """The record in another dtype."""
        return TopRecord(self.x.to(dtype), self.norm.to(dtype), self.logits.to(dtype))


class Recorded(NamedTuple):
    """A forward pass with everything that a downward sweep needs."""

    blocks: list[BlockRecord]
    top: TopRecord
    targets: Tensor  # int64 [B, K]
    single: bool  # the targets were [B], so the maps are [B, gh, gw]
    logits: Tensor  # [B, classes], in the dtype of the model, whatever that of the records

    def one_hot(self, k: int) -> Tensor:
        """The k-th target of each image as [B, classes], in the dtype of the records."""
        return F.one_hot(self.targets[:, k], self.logits.shape[1]).to(self.top.logits.dtype)

    def as_maps(self, model: VisionTransformer, rows: list[Tensor]) -> Tensor:
        """Turn the class token's rows [B, N], one for each of the K targets, into maps [B, gh, gw] or [B, K, gh, gw].

        Prefix tokens have no place in the image and are left out.
        """
        grid = model.patch_embed.grid_size
        maps = torch.stack([row[:, model.num_prefix_tokens :].unflatten(1, grid) for row in rows], dim=1)
        return maps[:, 0] if self.single else maps


def record_forward(
    model: VisionTransformer, images: Tensor, targets: Targets, dtype: torch.dtype | None = None
) -> Recorded:
    """Run the model on a batch in its own dtype and determine the target classes.

    Args:
        model: The model; it and the other arguments have passed `check_request`.
        images: [B, C, H, W].
        targets: Class numbers [B] or [B, K], or a function that computes them from the logits [B, classes].
        dtype: The dtype of the records, in which the sweep computes; None keeps the dtype of the model.

    Raises:
        ValueError: Targets that were computed from the logits do not fit.
    """
    dtype = dtype or images.dtype
    blocks, top = _forward(model, images, dtype)
    logits = top.logits[:, 0]
    chosen, single = resolve_targets(targets, logits)
    return Recorded(blocks, top.to(dtype), chosen, single, logits)


def _forward(model: VisionTransformer, images: Tensor, dtype: torch.dtype) -> tuple[list[BlockRecord], TopRecord]:
    # Relevance ends at the attention of block 1, so timm's own embedding needs no record; in eval mode it drops
    # nothing.
    x = model._pos_embed(model.patch_embed(images))  # [B, N, D]
    records = []
    for number, block in enumerate(model.blocks, start=1):
        record = _record_block(block, x, only_class_token=number == len(model.blocks))
        x = record.out
        records.append(record if dtype == x.dtype else record.to(dtype))
    norm = Normed.of(model.norm, x)  # [B, 1, D]
    logits = Linear.of(model.head).forward(norm.out)  # [B, 1, classes]
    return records, TopRecord(x, norm, logits)


def _record_block(block: Block, x: Tensor, only_class_token: bool) -> BlockRecord:
    attn, live = block.attn, slice(0, 1) if only_class_token else slice(None)
    qkv, width = Linear.of(attn.qkv), attn.num_heads * attn.head_dim
    norm1 = Normed.of(block.norm1, x)
    if only_class_token:
        q = split_heads(qkv.rows(slice(0, width)).forward(norm1.out[:, live]), attn.num_heads, 1)[0]
        k, v = split_heads(qkv.rows(slice(width, None)).forward(norm1.out), attn.num_heads, 2)
    else:
        q, k, v = split_heads(qkv.forward(norm1.out), attn.num_heads, 3)
    scores = q @ k.mT  # [B, H, Q, N]
    context = softmax(scores, attn.scale) @ v  # [B, H, Q, d]
    attended = Linear.of(attn.proj, block.ls1).forward(join_heads(context))  # [B, Q, D]
    middle = x[:, live] + attended

    norm2 = Normed.of(block.norm2, middle)
    hidden = Linear.of(block.mlp.fc1).forward(norm2.out)  # [B, Q, F]
    active = F.gelu(hidden, approximate=gelu_kind(block.mlp.act))
    mixed = Linear.of(block.mlp.fc2, block.ls2).forward(active)  # [B, Q, D]
    out = middle + mixed
    return BlockRecord(x, norm1, q, k, v, scores, context, attended, middle, norm2, hidden, active, mixed, out)


def split_heads(x: Tensor, heads: int, parts: int) -> tuple[Tensor, ...]:
    """Split [B, tokens, parts * E] into `parts` views [B, H, tokens, d]."""
    return x.unflatten(-1, (parts, heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)


def join_heads(*parts: Tensor) -> Tensor:
    """The inverse of `split_heads`: join parts [B, H, tokens, d] to [B, tokens, parts * E]."""
    return torch.stack([part.transpose(1, 2) for part in parts], dim=2).flatten(2)


def softmax(scores: Tensor, scale: float) -> Tensor:
    """Attention [B, H, Q, N] from the scores before they are scaled."""
    return torch.softmax(scores * scale, dim=-1)


def gelu_kind(act: nn.Module) -> str:
    """The approximation of a GELU module, as torch names it."""
    return "tanh" if isinstance(act, GELUTanh) else getattr(act, "approximate", "none")


def softmax_grad(attention: Tensor, grad: Tensor) -> Tensor:
    """Gradient of the input of a softmax over the last axis, from its output and the gradient of its output."""
    return torch.ops.aten._softmax_backward_data(grad, attention, -1, attention.dtype)
