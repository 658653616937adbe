"""Transformer blocks over sequences of different lengths, packed end to end: without padding, hence without masks.

A batch is one [T, E] tensor, sequence after sequence. Everything in a block but attention treats tokens one by one and
runs over all T at once. Attention runs per sequence, in one of three ways; the device, the dtype and the width of a
head alone decide which:

- `attend_flash`: one call of the variable-length flash kernels. On CUDA from compute capability 8.0 on, in half
  precision, for heads whose width is a multiple of 8 up to 128.
- `attend_padded`: one dense call on sequences padded to the longest, under a mask. On any other accelerator, in float32
  or for other heads; and on a CPU while a graph is compiled, which has no fixed runs of equal lengths.
- `attend_runs`: one dense call for each run of consecutive sequences of equal length. On a CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import cache
from itertools import groupby
from typing import NamedTuple

import torch
import torch.nn.functional as F
from timm.layers import DropPath
from timm.models.vision_transformer import Attention, Block
from torch import Tensor, nn

FLASH_DTYPES = (torch.float16, torch.bfloat16)


class Packing(NamedTuple):
    """Where the sequences of a packed batch lie. Tensors are on the tokens' device.

    Attributes:
        lengths: tokens of each sequence, in the order they are packed; if sorted, equal ones share a call on a CPU.
        longest: the greatest of them.
        offsets: int32 [B + 1], where each sequence begins, and the end of the last.
        sequence: int64 [T], the sequence of each token.
        rows: int64 [T], the row of each token in the padded batch, flattened from [B, longest].
        has_flash: whether the device has the variable-length flash kernels.
    """

    lengths: tuple[int, ...]
    longest: int
    offsets: Tensor
    sequence: Tensor
    rows: Tensor
    has_flash: bool


def packing(lengths: Tensor, known_lengths: Sequence[int]) -> Packing:
    """The packing of sequences of the given lengths.

    Args:
        lengths: int64 [B], on the device of the tokens.
        known_lengths: the same on the host, so that nothing waits for an accelerator.

    Raises:
        ValueError: an empty sequence, or no sequence.
    """
    if not known_lengths or min(known_lengths) < 1:
        raise ValueError("a packed batch needs sequences of at least one token")
    longest = max(known_lengths)
    sequence, place = rows_of(lengths, sum(known_lengths))
    return Packing(
        lengths=tuple(known_lengths),
        longest=longest,
        offsets=F.pad(lengths.cumsum(0), (1, 0)).to(torch.int32),
        sequence=sequence,
        rows=sequence * longest + place,
        has_flash=_has_flash(lengths.device),
    )


@cache
def _has_flash(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


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


def run_block(
    block: Block, tokens: Tensor, packed: Packing | None, kept: tuple[Tensor | None, Tensor | None]
) -> Tensor:
    """Run one of timm's pre-norm blocks.

    It reads no number that differs from block to block or from batch to batch but shapes and `packed.longest`, so that
    one compiled graph serves all blocks and all batches.

    Args:
        block: the block.
        tokens: [T, E] if packed, else [B, N, E].
        packed: where the sequences lie, or None.
        kept: the factor of each token in the two branches, see `_kept`.
    """
    x = block.norm1(tokens)
    x = block.attn(x) if packed is None else _attention(block.attn, x, packed)
    tokens = tokens + _scaled(block.ls1(x), kept[0])
    return tokens + _scaled(block.ls2(block.mlp(block.norm2(tokens))), kept[1])


def run_blocks(
    blocks: Iterable[Block], tokens: Tensor, packed: Packing | None, run: Callable[..., Tensor] = run_block
) -> Tensor:
    """Run timm's pre-norm blocks over tokens, each sequence as if it were alone in the batch.

    Stochastic depth drops a block for whole sequences, as timm does for whole samples.

    Args:
        blocks: the blocks.
        tokens: [T, E] if packed, else [B, N, E].
        packed: where the sequences lie, or None.
        run: `run_block`, or what compiling it gave.
    """
    for block in blocks:
        kept = _kept(block.drop_path1, tokens, packed), _kept(block.drop_path2, tokens, packed)
        tokens = run(block, tokens, packed, kept)
    return tokens


def _attention(attn: Attention, x: Tensor, packed: Packing) -> Tensor:
    """timm's Attention on packed x [T, E]."""
    qkv = attn.qkv(x).unflatten(1, (3, attn.num_heads, attn.head_dim))  # [T, 3, H, D]
    dropout = attn.attn_drop.p if attn.training else 0.0
    attend = _attend_on(qkv.device.type, qkv.dtype, attn.head_dim, packed.has_flash)
    return attn.proj_drop(attn.proj(attend(qkv, packed, dropout).flatten(1)))


def _attend_on(device: str, dtype: torch.dtype, head_dim: int, has_flash: bool) -> Callable[..., Tensor]:
    """The way to attend, see the module."""
    if has_flash and dtype in FLASH_DTYPES and head_dim % 8 == 0 and head_dim <= 128:
        return attend_flash
    if device == "cpu" and not torch.compiler.is_compiling():
        return attend_runs
    return attend_padded


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


def attend_flash(qkv: Tensor, packed: Packing, dropout: float = 0.0) -> Tensor:
    """As `attend_runs`, in one call of the variable-length flash kernels, in half precision.

    This is the operator that `torch.nn.attention.varlen.varlen_attn` calls, too. That function wraps it in Python,
    which costs the host several times as much as the operator itself, and prefers cuDNN for some lengths.
    """
    q, k, v = qkv.unbind(1)  # [T, H, D] each
    offsets, longest = packed.offsets, packed.longest
    attended: Tensor = torch.ops.aten._flash_attention_forward(
        q, k, v, offsets, offsets, longest, longest, dropout, False, False
    )[0]
    return attended


def attend_padded(qkv: Tensor, packed: Packing, dropout: float = 0.0) -> Tensor:
    """As `attend_runs`, in one call on sequences padded to the longest; no token attends to the padding."""
    count, longest = len(packed.offsets) - 1, packed.longest
    padded = qkv.new_zeros(count * longest, *qkv.shape[1:]).index_copy(0, packed.rows, qkv)
    q, k, v = padded.unflatten(0, (count, longest)).permute(2, 0, 3, 1, 4).unbind(0)  # [B, H, N, D] each
    present = torch.arange(longest, device=qkv.device) < packed.offsets.diff()[:, None]  # [B, N]
    attended = F.scaled_dot_product_attention(q, k, v, attn_mask=present[:, None, None], dropout_p=dropout)
    return attended.transpose(1, 2).flatten(0, 1).index_select(0, packed.rows)


def _kept(drop_path: nn.Module, tokens: Tensor, packed: Packing | None) -> Tensor | None:
    """The factor of stochastic depth, [T, 1] or [B, 1, 1]: 0 for the tokens of dropped sequences; None for 1."""
    if not isinstance(drop_path, DropPath) or not drop_path.training or not drop_path.drop_prob:
        return None
    keep = 1 - drop_path.drop_prob
    count = len(tokens) if packed is None else len(packed.lengths)
    kept = torch.bernoulli(tokens.new_full((count,), keep))
    if drop_path.scale_by_keep and keep:
        kept = kept / keep
    return kept[:, None, None] if packed is None else kept.index_select(0, packed.sequence)[:, None]


def _scaled(x: Tensor, factor: Tensor | None) -> Tensor:
    return x if factor is None else x * factor
