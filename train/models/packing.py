"""Transformer blocks over sequences of different lengths, packed end to end: without padding, hence without masks.

A batch is one [T, E] tensor, sequence after sequence. Everything in a block but attention treats tokens one by one and
runs over all T at once. Attention runs per sequence: on the CPU in one call for each run of consecutive sequences of
equal length, on an accelerator in one call on a jagged nested tensor (variable-length flash attention in half
precision).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import NamedTuple

import torch
import torch.nn.functional as F
from timm.layers import DropPath
from timm.models.vision_transformer import Attention, Block
from torch import Tensor, nn


class Packing(NamedTuple):
    """Where the sequences of a packed batch lie.

    Attributes:
        lengths: tokens of each sequence, in the order they are packed; if sorted, equal ones share a call.
        offsets: int64 [B + 1], where each begins, and the end of the last; on the tokens' device.
    """

    lengths: tuple[int, ...]
    offsets: Tensor


def packing(lengths: Sequence[int], device: torch.device) -> Packing:
    """The packing of sequences of the given lengths.

    Raises:
        ValueError: an empty sequence, or no sequence.
    """
    if not lengths or min(lengths) < 1:
        raise ValueError("a packed batch needs sequences of at least one token")
    offsets = torch.tensor([0, *lengths], device=device).cumsum(0)
    return Packing(tuple(lengths), offsets)


def rows_of(lengths: Tensor, total: int) -> tuple[Tensor, Tensor]:
    """The sequence that each packed row belongs to, and its place in it.

    Args:
        lengths: [B].
        total: their sum, so that nothing waits for an accelerator.

    Returns:
        int64 [total] each.
    """
    sequence = torch.arange(len(lengths), device=lengths.device).repeat_interleave(lengths, output_size=total)
    begin = lengths.cumsum(0) - lengths
    return sequence, torch.arange(total, device=lengths.device) - begin.index_select(0, sequence)


def run_blocks(blocks: Iterable[Block], tokens: Tensor, packed: Packing) -> Tensor:
    """Run timm's pre-norm blocks over packed tokens [T, E], each sequence as if it were alone in the batch.

    Stochastic depth drops a block for whole sequences, as timm does for whole samples.
    """
    for block in blocks:
        tokens = tokens + _drop(
            block.drop_path1, block.ls1(_attention(block.attn, block.norm1(tokens), packed)), packed
        )
        tokens = tokens + _drop(block.drop_path2, block.ls2(block.mlp(block.norm2(tokens))), packed)
    return tokens


def _attention(attn: Attention, x: Tensor, packed: Packing) -> Tensor:
    """timm's Attention on packed x [T, E]."""
    qkv = attn.qkv(x).unflatten(1, (3, attn.num_heads, attn.head_dim))  # [T, 3, H, D]
    dropout = attn.attn_drop.p if attn.training else 0.0
    attend = attend_runs if x.device.type == "cpu" else attend_jagged
    return attn.proj_drop(attn.proj(attend(qkv, packed, dropout).flatten(1)))


def attend_runs(qkv: Tensor, packed: Packing, dropout: float = 0.0) -> Tensor:
    """Attention within each sequence, with a call for each run of equal lengths. qkv [T, 3, H, D] -> [T, H, D]."""
    parts, start = [], 0
    for length, run in groupby(packed.lengths):
        count = len(list(run))
        part = qkv[start : start + count * length].unflatten(0, (count, length))  # [G, n, 3, H, D]
        q, k, v = part.permute(2, 0, 3, 1, 4).unbind(0)  # [G, H, n, D] each
        parts.append(F.scaled_dot_product_attention(q, k, v, dropout_p=dropout).transpose(1, 2).flatten(0, 1))
        start += count * length
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def attend_jagged(qkv: Tensor, packed: Packing, dropout: float = 0.0) -> Tensor:
    """As `attend_runs`, in one call for all sequences, on a nested tensor of jagged layout."""
    shortest, longest = min(packed.lengths), max(packed.lengths)
    q, k, v = (
        torch.nested.nested_tensor_from_jagged(
            part.contiguous(), packed.offsets, min_seqlen=shortest, max_seqlen=longest
        ).transpose(1, 2)
        for part in qkv.unbind(1)
    )
    return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout).transpose(1, 2).values()


def _drop(drop_path: nn.Module, x: Tensor, packed: Packing) -> Tensor:
    if not isinstance(drop_path, DropPath) or not drop_path.training or not drop_path.drop_prob:
        return x
    keep = 1 - drop_path.drop_prob
    kept = torch.bernoulli(x.new_full((len(packed.lengths),), keep))  # [B]
    if drop_path.scale_by_keep and keep:
        kept = kept / keep
    return x * kept.repeat_interleave(packed.offsets.diff(), output_size=len(x))[:, None]
