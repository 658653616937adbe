"""The forward pass of a timm ViT, with records of everything that a downward sweep needs.

Symbols in the shape comments: B images, N tokens, Q live rows (N, or 1 in the last block, where only the class token
reaches the logits), D width, F hidden width of the MLP, H heads, E width of all heads together, d width of one head,
K target classes per image.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from zpipe.pipeline.block_weights import BlockWeights, Linear, Norm
from zpipe.pipeline.classifier import Targets
from zpipe.pipeline.prepared import Prepared
from zpipe.pipeline.supported import resolve_targets


class Attribution(NamedTuple):
    """Maps and logits of a batch, in the dtype and on the device of the model."""

    maps: Tensor
    """[B, gh, gw] for targets [B], or [B, K, gh, gw] for targets [B, K]; raw, not normalised."""
    logits: Tensor
    """[B, classes]."""


class Normed(NamedTuple):
    """The output of a LayerNorm, with what its gradient needs."""

    out: Tensor  # [B, tokens, D]
    mean: Tensor  # [B, tokens, 1]
    rstd: Tensor  # [B, tokens, 1]

    @classmethod
    def of(cls, norm: Norm, x: Tensor) -> Normed:
        """Normalise x [B, tokens, D]."""
        return cls(*torch.native_layer_norm(x, x.shape[-1:], norm.weight, norm.bias, norm.eps))

    def to(self, dtype: torch.dtype) -> Normed:
        """The record in another dtype."""
        return Normed(*(part.to(dtype) for part in self))

    def grad(self, norm: Norm, x: Tensor, grad: Tensor) -> Tensor:
        """Gradient of the input x, from that of the output; all [B, tokens, D]."""
        args = (x.shape[-1:], self.mean, self.rstd, norm.weight, None)
        return torch.ops.aten.native_layer_norm_backward(grad, x, *args, [True, False, False])[0]


class BlockRecord(NamedTuple):
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
        return self._replace(**{name: getattr(self, name).to(dtype) for name in self._fields})


class TopRecord(NamedTuple):
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


def record_forward(model: VisionTransformer, images: Tensor, targets: Targets, prepared: Prepared) -> Recorded:
    """Run the model on a batch in its own dtype and determine the target classes.

    Args:
        model: The model; it and the other arguments have passed `check_request`.
        images: [B, C, H, W].
        targets: Class numbers [B] or [B, K], or a function that computes them from the logits [B, classes].
        prepared: The weights, the dtype of the records, and how the function of a block is called.

    Raises:
        ValueError: Targets that were computed from the logits do not fit.
    """
    # Relevance ends at the attention of block 1, so timm's own embedding, and a norm after it, need no record; in eval
    # mode it drops nothing.
    x = model.norm_pre(model._pos_embed(model.patch_embed(images)))  # [B, N, D]
    records = []
    for number in range(len(model.blocks)):
        last = number + 1 == len(model.blocks)
        x, record = prepared.call(record_block, prepared.forward(number), x, prepared.dtype, only_class_token=last)
        records.append(record)
    norm = Normed.of(Norm.of(model.norm), x)  # [B, 1, D]
    logits = Linear.of(model.head).forward(norm.out)  # [B, 1, classes]
    top = TopRecord(x, norm, logits).to(prepared.dtype)
    chosen, single = resolve_targets(targets, logits[:, 0])
    return Recorded(records, top, chosen, single, logits[:, 0])


def record_block(
    block: BlockWeights, x: Tensor, dtype: torch.dtype, *, only_class_token: bool
) -> tuple[Tensor, BlockRecord]:
    """Run a block on its input [B, N, D]. Returns its output [B, Q, D], and the record in the given dtype."""
    live = slice(0, 1) if only_class_token else slice(None)
    norm1 = Normed.of(block.norm1, x)
    if only_class_token:
        width = block.qkv.weight.shape[0] // 3
        to_q, to_kv = block.qkv.rows(slice(0, width)), block.qkv.rows(slice(width, None))
        (q,) = split_heads(to_q.forward(norm1.out[:, live]), block.heads, 1)
        k, v = split_heads(to_kv.forward(norm1.out), block.heads, 2)
    else:
        parts = split_heads(block.qkv.forward(norm1.out), block.heads, 3)
        q, k, v = (part.clone(memory_format=torch.contiguous_format) for part in parts)  # products would copy views
    scores = q @ k.mT  # [B, H, Q, N]
    context = softmax(scores, block.scale) @ v  # [B, H, Q, d]
    attended = block.proj.forward(join_heads(context))  # [B, Q, D]
    middle = x[:, live] + attended

    norm2 = Normed.of(block.norm2, middle)
    hidden = block.fc1.forward(norm2.out)  # [B, Q, F]
    active = F.gelu(hidden, approximate=block.gelu)
    mixed = block.fc2.forward(active)  # [B, Q, D]
    out = middle + mixed
    record = BlockRecord(x, norm1, q, k, v, scores, context, attended, middle, norm2, hidden, active, mixed, out)
    return out, record if dtype == x.dtype else record.to(dtype)


def split_heads(x: Tensor, heads: int, parts: int) -> tuple[Tensor, ...]:
    """Split [B, tokens, parts * E] into `parts` views [B, H, tokens, d]."""
    return x.unflatten(-1, (parts, heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)


def join_heads(*parts: Tensor) -> Tensor:
    """The inverse of `split_heads`: join parts [B, H, tokens, d] to [B, tokens, parts * E]."""
    by_token = [part.transpose(1, 2) for part in parts]  # [B, tokens, H, d] each
    return (torch.stack(by_token, dim=2) if len(parts) > 1 else by_token[0]).flatten(2)


def softmax(scores: Tensor, scale: float) -> Tensor:
    """Attention [B, H, Q, N] from the scores before they are scaled."""
    return torch.softmax(scores * scale, dim=-1)


def softmax_grad(attention: Tensor, grad: Tensor) -> Tensor:
    """Gradient of the input of a softmax over the last axis, from its output and the gradient of its output."""
    return torch.ops.aten._softmax_backward_data(grad, attention, -1, attention.dtype)
