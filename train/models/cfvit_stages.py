"""The two stages of CF-ViT and LF-ViT: what passes between them, and which cells the second one refines."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from timm.layers import Mlp
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from zpipe.train.models import zoom_tokens
from zpipe.train.models.backbone import layer_norm
from zpipe.train.models.checks import check_values

REUSES = ("mlp", "linear", "none", "mlp+class", "mlp+uninformative")


class Stages(NamedTuple):
    """Logits of both stages, each [B, num_classes]."""

    coarse: Tensor
    fine: Tensor


class EarlyExit(NamedTuple):
    """The answers to a batch under an exit threshold.

    Attributes:
        logits: [B, num_classes], the coarse stage's for images that exited, the fine stage's for the others.
        exited: bool [B].
    """

    logits: Tensor
    exited: Tensor


class Coarse(NamedTuple):
    """What the fine stage reuses of the coarse one: inputs and outputs of the blocks [B, 1 + C, E], scores [B, C]."""

    inputs: Tensor
    outputs: Tensor
    scores: Tensor | None

    def select(self, index: Tensor) -> Coarse:
        """The same for some images of the batch."""
        scores = None if self.scores is None else self.scores.index_select(0, index)
        return Coarse(self.inputs.index_select(0, index), self.outputs.index_select(0, index), scores)


class Plan(NamedTuple):
    """What a forward pass does, after its arguments are checked.

    Attributes:
        refined: cells refined per image.
        selection: the rule that chooses them.
        weights: of each block's class attention in the score; all 0 where the model's own score is not used.
        scores: [B, C], given or drawn at random in place of the model's own, or None.
        positions: whether the tokens of the fine grid get its positions.
    """

    refined: int
    selection: str
    weights: tuple[float, ...]
    scores: Tensor | None
    positions: bool


class Reuse(nn.Module):
    """The coarse features of a cell through an MLP, which the fine stage adds to the cell's patches (Fig. 4)."""

    def __init__(self, width: int, mlp_ratio: float, linear: bool) -> None:
        super().__init__()
        self.norm = layer_norm(width)
        self.mlp = nn.Linear(width, width) if linear else Mlp(width, int(width * mlp_ratio))

    def forward(self, x: Tensor) -> Tensor:
        """Features [..., E] -> what is added to each patch, [..., E]."""
        return self.mlp(self.norm(x))


def cell_scores(scores: Tensor, batch: int, cells: int) -> Tensor:
    """Scores of coarse cells [B, C] from scores by cell [B, C] or by patch [B, 4C], of which a cell takes its highest.

    Raises:
        ValueError: scores of another shape, or not finite. On an accelerator an assertion of its own fails instead, for
            which the host need not wait; while a graph is compiled nothing is checked.
    """
    if scores.ndim != 2 or scores.shape[0] != batch or scores.shape[1] not in (cells, 4 * cells):
        raise ValueError(
            f"scores must be [{batch}, {cells}], by coarse cell, or [{batch}, {4 * cells}], by patch, "
            f"got {list(scores.shape)}"
        )
    check_values(scores.isfinite().all(), "scores must be finite, got NaN or infinity")
    scores = scores.detach().float()
    return scores if scores.shape[1] == cells else zoom_tokens.coarse_scores(scores, 0.5)


def share_of(cells: int, share: float) -> int:
    """A share of the cells, rounded up.

    Raises:
        ValueError: a share outside [0, 1].
    """
    return math.ceil(check_share(share) * cells - 1e-9)  # 0.07 * 100 comes out slightly above 7


def check_share(share: float) -> float:
    """The share itself.

    Raises:
        ValueError: a share outside [0, 1].
    """
    if not 0 <= share <= 1:
        raise ValueError(f"keep must lie in [0, 1], got {share!r}")
    return share


def attention_weights(depth: int, beta: float) -> tuple[float, ...]:
    """Eq. 9 from zero, unrolled: the weight of each block's class attention. The first three blocks have none."""
    first = min(3, depth - 1)
    return tuple((1 - beta) * beta ** (depth - 1 - block) if block >= first else 0.0 for block in range(depth))


def run_with_class_attention(block: Block, x: Tensor) -> tuple[Tensor, Tensor]:
    """Run a block of timm, and read what its class token attends to.

    The class token's row of attention is written out, the others stay fused: nothing is computed twice.

    Args:
        block: the block.
        x: [B, N, E], the class token first.

    Returns:
        The block's output [B, N, E], and the class token's attention to the others, float32 [B, N - 1], mean over
        heads.
    """
    attn = block.attn
    qkv = attn.qkv(block.norm1(x)).unflatten(2, (3, attn.num_heads, attn.head_dim))  # [B, N, 3, H, D]
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # [B, H, N, D] each
    logits = (q[:, :, :1] * attn.scale) @ k.transpose(2, 3)  # [B, H, 1, N]
    row = logits.softmax(dim=3, dtype=torch.promote_types(logits.dtype, torch.float32))
    others = F.scaled_dot_product_attention(q[:, :, 1:], k, v)  # [B, H, N - 1, D]
    mixed = torch.cat([(row.to(v.dtype) @ v).transpose(1, 2), others.transpose(1, 2)], dim=1).flatten(2)  # [B, N, E]
    x = x + block.drop_path1(attn.proj(mixed))
    x = x + block.drop_path2(block.mlp(block.norm2(x)))
    return x, row.detach().float().mean(dim=1)[:, 0, 1:]


def take_rows(rows: Tensor, index: Tensor) -> Tensor:
    """Some rows of each image, in the order of the index: rows [B, C, W], index int64 [B, K] -> [B, K, W]."""
    first = torch.arange(rows.shape[0], device=index.device)[:, None] * rows.shape[1]
    return rows.flatten(0, 1).index_select(0, (first + index).flatten()).unflatten(0, (-1, index.shape[1]))
