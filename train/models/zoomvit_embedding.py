"""The sequences that enter a ZoomViT's first block: embedding and positions of the tokens chosen for each image.

Tensors in, tensors out; the parameters belong to `zoomvit.ZoomViT`. A token's embedding is its patch times the kernel,
plus its position, plus the zoom factor embedding of its place in the sequence.
"""

from __future__ import annotations

from itertools import groupby
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from zpipe.train.models import zoom_tokens
from zpipe.train.models.packing import Packing, packing, rows_of
from zpipe.train.models.zoom_tokens import TokenOrder

POSITIONS = ("learned", "sincos", "sincos-1d")


class TokenGroup(NamedTuple):
    """The images of a batch whose sequences have the same length n, ready for the first block.

    Attributes:
        index: int64 [G], their places in the batch.
        ids: int64 [G, n], token ids in sequence order (see `zoom_tokens`; `zoom_tokens.token_boxes` gives their
            pixels).
        tokens: float [G, 1 + n, E], the class token, then the embedded patches.
    """

    index: Tensor  # type: ignore[assignment]  # a public name that hides tuple.index, which nobody needs here
    ids: Tensor
    tokens: Tensor


class Tokens(NamedTuple):
    """The sequences of a batch, packed end to end in the order of their lengths, ready for the first block.

    Attributes:
        tokens: float [T, E], for each image the class token, then its embedded patches.
        ids: int64 [T], token ids (see `zoom_tokens`); 5C for class tokens, -1 for a vector that stands for no patch.
        packed: where the sequences lie; their lengths, with the class tokens, ascend.
        index: int64 [B], the place of each sequence in the batch.
    """

    tokens: Tensor
    ids: Tensor
    packed: Packing
    index: Tensor  # type: ignore[assignment]  # a public name that hides tuple.index, which nobody needs here

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each sequence with its class token, ascending."""
        return self.packed.lengths

    def by_image(self) -> list[Tensor]:
        """The token ids of each image in the order of the batch, int64 [n], without the class token."""
        ids: dict[int, Tensor] = {}
        for group in self.groups():
            ids |= dict(zip(group.index.tolist(), group.ids, strict=True))
        return [ids[image] for image in range(len(ids))]

    def groups(self) -> list[TokenGroup]:
        """The same sequences with images of equal length together, shortest first."""
        groups, image, start = [], 0, 0
        for length, run in groupby(self.lengths):
            count = len(list(run))
            stop = start + count * length
            ids = self.ids[start:stop].view(count, length)[:, 1:]
            tokens = self.tokens[start:stop].view(count, length, -1)
            groups.append(TokenGroup(self.index[image : image + count], ids, tokens))
            image, start = image + count, stop
        return groups


class Embedding(NamedTuple):
    """The parameters that embed tokens.

    Attributes:
        kernel: [E, D, p, p], the patch kernel of both grids.
        bias: [E].
        positions: [5C + 1, E], by token id; the last one is the class token, its own position added. Many tokens read
            one row, so the table stays in float32 under autocast, and its gradients are summed in float32.
        zoom_factor: 2.0 or 0.5.
        zfe: kind of the zoom factor embedding.
        omega: steepness of the soft one.
    """

    kernel: Tensor
    bias: Tensor
    positions: Tensor
    zoom_factor: float
    zfe: str
    omega: float

    def zoom_factor_embedding(self, fine: Tensor, length: int, dtype: torch.dtype) -> Tensor:
        """What is added to every channel of each token, [B, 1 + length]: 0 for the class token. fine: int64 [B]."""
        return F.pad(zoom_tokens.zoom_factor_embedding(fine, length, self.zfe, self.omega, dtype), (1, 0))


def embed_fixed(
    images: Tensor, order: TokenOrder, lengths: tuple[int, int], embedding: Embedding
) -> tuple[Tensor, Tensor]:
    """Embed sequences of one length, with every shape known beforehand.

    Args:
        images: [B, D, H, W].
        order: the tokens of each image.
        lengths: fine tokens and all tokens n of every image.
        embedding: the parameters.

    Returns:
        The tokens [B, 1 + n, E] and their ids [B, 1 + n].
    """
    fine, length = lengths
    batch = images.shape[0]
    class_id = len(embedding.positions) - 1  # 5C
    fine_cells = class_id // 5 * 4
    ids = order.ids[:, :length]  # [B, n]
    fine_patches, fine_kernel, coarse_patches, coarse_kernel = zoom_tokens.patches_and_kernels(
        images, embedding.kernel, embedding.zoom_factor
    )
    parts = [embedding.bias.new_zeros(()).expand(batch, 1, len(embedding.bias))]  # the class token's: see `positions`
    for chosen, patches, kernel in (
        (ids[:, :fine], fine_patches, fine_kernel),
        (ids[:, fine:] - fine_cells, coarse_patches, coarse_kernel),
    ):
        if chosen.shape[1]:
            first = torch.arange(batch, device=ids.device)[:, None] * patches.shape[1]
            present = patches.flatten(0, 1).index_select(0, (first + chosen).flatten())  # [B * f, K]
            parts.append(F.linear(present, kernel, embedding.bias).unflatten(0, (-1, chosen.shape[1])))
    dtype = parts[-1].dtype
    tokens = torch.cat([part.to(dtype) for part in parts], dim=1)  # [B, 1 + n, E]
    ids = F.pad(ids, (1, 0), value=class_id)
    tokens = tokens + embedding.positions.index_select(0, ids.flatten()).unflatten(0, ids.shape)
    if embedding.zfe != "none":
        tokens = tokens + embedding.zoom_factor_embedding(order.fine, length, dtype)[..., None]
    return tokens, ids


def embed_packed(images: Tensor, order: TokenOrder, embedding: Embedding) -> Tokens:
    """Embed sequences of different lengths, shortest first. Arguments as of `embed_fixed`."""
    class_id = len(embedding.positions) - 1  # 5C
    index = order.counts.argsort(stable=True)  # [B]
    lengths = order.counts[index] + 1  # [B]; the class token is one more
    fine = order.fine[index].minimum(lengths - 1)  # [B]; N_k, less what was pruned
    # The only synchronisation with an accelerator: from here on all shapes are known.
    known_lengths, known_fine = torch.stack([lengths, fine]).tolist()
    packed = packing(lengths, known_lengths)
    ids = F.pad(order.ids[index, : packed.longest - 1], (1, 0), value=class_id)  # [B, N], the class token first
    flat, image = ids.flatten().index_select(0, packed.rows), index.index_select(0, packed.sequence)  # [T] each

    # Embed the tokens that are present, all fine ones in one product and all coarse ones in another.
    # A sequence is the class token, then fine tokens, then coarse ones.
    begin = packed.offsets[:-1] + 1  # [B]
    owner, number = rows_of(fine, sum(known_fine))
    fine_rows = begin.index_select(0, owner) + number
    owner, number = rows_of(lengths - 1 - fine, len(flat) - len(known_lengths) - sum(known_fine))
    coarse_rows = (begin + fine).index_select(0, owner) + number
    fine_patches, fine_kernel, coarse_patches, coarse_kernel = zoom_tokens.patches_and_kernels(
        images, embedding.kernel, embedding.zoom_factor
    )
    parts = []
    for rows, first_id, patches, kernel in (
        (fine_rows, 0, fine_patches, fine_kernel),
        (coarse_rows, class_id // 5 * 4, coarse_patches, coarse_kernel),
    ):
        place = image[rows] * patches.shape[1] + flat[rows] - first_id
        parts.append(F.linear(patches.flatten(0, 1).index_select(0, place), kernel, embedding.bias))
    patches = torch.cat(parts)  # [fine + coarse, E]
    embedded = patches.new_zeros(len(flat), patches.shape[1])  # of class tokens nothing: see `positions`
    embedded.index_copy_(0, torch.cat([fine_rows, coarse_rows]), patches)
    tokens = embedded + embedding.positions.index_select(0, flat)  # [T, E]
    if embedding.zfe != "none":
        added = embedding.zoom_factor_embedding(order.fine[index], packed.longest - 1, tokens.dtype)
        tokens = tokens + added.flatten().index_select(0, packed.rows)[:, None]
    return Tokens(tokens, flat, packed, index)


# -- positions ---------------------------------------------------------------------------------------------------------


def position_tables(pos: str, side: int, cell: float, dim: int) -> dict[str, Tensor]:
    """The initial positions of the class token [1, 1, dim] and of both grids [1, cells, dim], by parameter name.

    Args:
        pos: one of `POSITIONS`.
        side: coarse cells a side.
        cell: side of a coarse cell, in score cells.
        dim: channels.
    """
    if pos == "sincos-1d":
        coarse, fine = _sincos_1d(side**2 + 1, dim), _sincos_1d(4 * side**2 + 1, dim)
        return {"pos_cls": coarse[None, :1], "pos_coarse": coarse[None, 1:], "pos_fine": fine[None, 1:]}
    return {
        "pos_cls": torch.zeros(1, 1, dim),
        "pos_coarse": _sincos_2d(side, cell, dim)[None],
        "pos_fine": _sincos_2d(2 * side, cell / 2, dim)[None],
    }


def _sincos_2d(side: int, cell: float, dim: int) -> Tensor:
    """2-D sine-cosine positions of a side x side grid, [side * side, dim].

    A quarter of the channels each for the sine and the cosine of row and column. `cell` is the side of a cell in score
    cells, so that grids of different cells share one scale: a cell's coordinate is that of its centre, and score cell i
    lies at i.
    """
    centre = (torch.arange(side) + 0.5) * cell - 0.5
    frequency = 10000.0 ** -(torch.arange(dim // 4) / (dim // 4))
    angle = centre[:, None] * frequency  # [side, dim / 4]
    wave = torch.cat([angle.sin(), angle.cos()], dim=1)  # [side, dim / 2]
    rows, columns = wave[:, None].expand(-1, side, -1), wave[None].expand(side, -1, -1)
    return torch.cat([rows, columns], dim=2).flatten(0, 1)


def _sincos_1d(length: int, dim: int) -> Tensor:
    """Sine-cosine positions 0 .. length - 1, [length, dim]: sine on even channels, cosine on odd ones."""
    frequency = 10000.0 ** -(torch.arange(dim // 2, dtype=torch.float64) / (dim // 2))
    angle = torch.arange(length, dtype=torch.float64)[:, None] * frequency  # [length, dim / 2]
    return torch.stack([angle.sin(), angle.cos()], dim=2).flatten(1).float()
