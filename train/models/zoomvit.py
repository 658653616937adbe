"""ZoomViT: a vision transformer that sees scored regions through finer patches (section 3.3).

The model takes images and the score maps that a zoomer (or anything else) made of them; it owns no zoomer. Which
tokens an image gets is decided in `zoom_tokens`; here they are embedded, given positions and run through timm's
transformer blocks. Importing this module registers zoomvit_{tiny,small,base}_patch16_224 with timm.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping
from functools import partial
from itertools import groupby
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from timm.layers import trunc_normal_
from timm.models import register_model
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from zpipe.train.models import zoom_tokens
from zpipe.train.models.backbone import build, square_side, untrained_cfgs
from zpipe.train.models.operating_points import (
    ImageCost,
    OperatingPoint,
    Requested,
    ScoreUse,
    SettingError,
    zoom_points,
)
from zpipe.train.models.packing import packing, rows_of, run_blocks
from zpipe.train.models.warm_start import WarmStart, fill_from_vit, resize_positions
from zpipe.train.models.zoom_tokens import TokenOrder, Zoom

__all__ = ["TokenGroup", "Tokens", "ZoomViT"]

POSITIONS = ("learned", "sincos", "sincos-1d")


class TokenGroup(NamedTuple):
    """The images of a batch whose sequences have the same length n, ready for the first block.

    index   int64 [G]: their places in the batch.
    ids     int64 [G, n]: token ids in sequence order (see `zoom_tokens`; `zoom_tokens.token_boxes` gives their pixels).
    tokens  float [G, 1 + n, E]: the class token, then the embedded patches.
    """

    index: Tensor
    ids: Tensor
    tokens: Tensor


class Tokens(NamedTuple):
    """The sequences of a batch, packed end to end in the order of their lengths, ready for the first block.

    tokens   float [T, E]: of each image the class token, then its embedded patches.
    ids      int64 [T]: token ids (see `zoom_tokens`); 5C for class tokens, -1 for what stands for no patch.
    lengths  tokens of each sequence, class token included, rising.
    index    int64 [B]: the place in the batch of each sequence.
    """

    tokens: Tensor
    ids: Tensor
    lengths: tuple[int, ...]
    index: Tensor

    def by_image(self) -> list[Tensor]:
        """The token ids of each image in the batch's order, int64 [n], the class token not among them."""
        ids: dict[int, Tensor] = {}
        for group in self.groups():
            ids |= dict(zip(group.index.tolist(), group.ids, strict=True))
        return [ids[image] for image in range(len(ids))]

    def groups(self) -> list[TokenGroup]:
        """The same, images of equal token count together, shortest first."""
        found, image, start = [], 0, 0
        for length, run in groupby(self.lengths):
            count = len(list(run))
            stop = start + count * length
            ids = self.ids[start:stop].view(count, length)[:, 1:]
            tokens = self.tokens[start:stop].view(count, length, -1)
            found.append(TokenGroup(self.index[image : image + count], ids, tokens))
            image, start = image + count, stop
        return found


class _Choice(NamedTuple):
    """Which tokens a batch gets. fixed: (fine tokens, all tokens) when that is known to be the same for every image."""

    order: TokenOrder
    fixed: tuple[int, int] | None


class ZoomViT(nn.Module):
    """A pre-norm vision transformer over two patch sizes, chosen by score.

    `model(images, scores, alpha=0.03)` zooms the cells scored above alpha; `budget=k` instead zooms exactly the k
    best cells of every image; with `scores=None` nothing is zoomed.

    Nothing is padded: under a threshold the images of a batch have different token counts and are packed end to end (see
    `packing`), so that an image's logits don't depend on its neighbours. Under a budget all shapes are fixed, and the
    model can be compiled, exported and turned into ONNX; checks of the scores' values are then left out.

    Args:
        img_size: pixels a side; images are square.
        patch_size: pixels a side of a score cell and of the patch kernel. At zoom factor 2 the patches are patch_size
            and half of it, at 0.5 patch_size and its double.
        embed_dim, depth, num_heads, mlp_ratio: of the transformer.
        num_classes: 0 makes the head an identity.
        in_chans: channels of the image.
        drop_path_rate: stochastic depth of the last block; it grows linearly from 0 at the first, as in timm's ViT.
        init_values: initial value of LayerScale (DeiT-III: 1e-4); None leaves LayerScale out (DeiT).
        zoom_factor: 2.0 or 0.5 (eta).
        zfe: zoom factor embedding, "none", "fixed" or "soft" (Eq. 6). It adds one number to all channels of a token,
            which every LayerNorm of a pre-norm transformer takes away again: the three give the same logits.
        omega: steepness of the soft embedding. The paper gives none; 0.1 is our choice.
        pos: "learned" positions, started from 2-D sine-cosine ones, or "sincos" to keep those fixed. Both grids have
            their own table, and both tables put a token at the centre of the pixels it covers. "sincos-1d" is what the
            authors released: fixed 1-D sine-cosine positions over each grid's row-major index, the class token at 0,
            the two grids not aligned.

    Raises:
        ValueError: sizes that don't divide, an unknown zoom_factor, zfe or pos.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        embed_dim: int = 384,
        depth: int = 12,
        num_heads: int = 6,
        num_classes: int = 1000,
        *,
        in_chans: int = 3,
        mlp_ratio: float = 4.0,
        drop_path_rate: float = 0.0,
        init_values: float | None = None,
        zoom_factor: float = 2.0,
        zfe: str = "soft",
        omega: float = 0.1,
        pos: str = "learned",
    ) -> None:
        super().__init__()
        self.zoom_factor = zoom_tokens.check_zoom_factor(zoom_factor)
        self.img_size = square_side(img_size)
        self.patch_size = patch_size
        coarse_patch = patch_size if self.zoom_factor == 2.0 else 2 * patch_size
        if self.img_size % coarse_patch or coarse_patch % 2:
            raise ValueError(
                f"zoom factor {self.zoom_factor:g} splits an image into even patches of {coarse_patch} pixels: "
                f"image size {self.img_size} or patch size {patch_size} doesn't divide"
            )
        if zfe not in zoom_tokens.ZFE_KINDS:
            raise ValueError(f"zfe must be one of {', '.join(zoom_tokens.ZFE_KINDS)}, got {zfe!r}")
        if pos not in POSITIONS:
            raise ValueError(f"pos must be one of {', '.join(POSITIONS)}, got {pos!r}")
        if embed_dim % 4 or embed_dim % num_heads:
            raise ValueError(f"embed_dim must divide by 4 and by num_heads {num_heads}, got {embed_dim}")
        self.score_grid = self.img_size // patch_size  # s, cells a side of the score map
        self.coarse_grid = self.img_size // coarse_patch  # c
        self.zfe = zfe
        self.omega = omega
        self.pos = pos
        self.num_classes = num_classes
        self.num_features = self.embed_dim = embed_dim

        # Holds the kernel: tokens are embedded by matrix products on the patches that are present.
        self.patch_embed = nn.Conv2d(in_chans, embed_dim, patch_size, stride=patch_size)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        if pos == "sincos-1d":
            coarse = _sincos_1d(self.coarse_grid**2 + 1, embed_dim)
            tables = {
                "pos_cls": coarse[None, :1],
                "pos_coarse": coarse[None, 1:],
                "pos_fine": _sincos_1d(4 * self.coarse_grid**2 + 1, embed_dim)[None, 1:],
            }
        else:
            tables = {
                "pos_cls": torch.zeros(1, 1, embed_dim),
                "pos_coarse": _sincos_table(self.coarse_grid, coarse_patch / patch_size, embed_dim)[None],
                "pos_fine": _sincos_table(2 * self.coarse_grid, coarse_patch / patch_size / 2, embed_dim)[None],
            }
        for name, table in tables.items():
            if pos == "learned":
                self.register_parameter(name, nn.Parameter(table))
            else:
                self.register_buffer(name, table)
        norm = partial(nn.LayerNorm, eps=1e-6)
        rates = [drop_path_rate * i / max(depth - 1, 1) for i in range(depth)]
        self.blocks = nn.Sequential(
            *(
                Block(
                    embed_dim,
                    num_heads,
                    mlp_ratio,
                    qkv_bias=True,
                    init_values=init_values,
                    drop_path=rate,
                    norm_layer=norm,
                )
                for rate in rates
            )
        )
        self.norm = norm(embed_dim)
        self.head = nn.Linear(embed_dim, num_classes) if num_classes else nn.Identity()

        nn.init.normal_(self.cls_token, std=1e-6)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(
        self,
        images: Tensor,
        scores: Tensor | None = None,
        alpha: float | None = None,
        keep_tokens: int | None = None,
        budget: int | str | None = None,
        prune: str = "backward",
    ) -> Tensor:
        """Logits of every image.

        Args:
            images: [B, in_chans, img_size, img_size].
            scores: [B, s * s] in [0, 1], s = img_size / patch_size, row-major; no gradient flows into them. None
                zooms nothing, whatever alpha says.
            alpha: threshold in [0, 1]; a coarse cell is zoomed if its score is strictly above it.
            keep_tokens: prune every ordered sequence to this many tokens, class token not counted; a shorter one stays.
            budget: zoom exactly as many coarse cells of every image, instead of those above alpha: a number of cells, or
                "300 tokens" or "2.3 GMACs" for as many as fit into that (see `resolve_budget`).
            prune: which tokens keep_tokens takes away, one of `zoom_tokens.PRUNE_KINDS`.

        Returns:
            [B, num_classes].

        Raises:
            ValueError: images or scores of another shape, NaN in scores, alpha outside [0, 1], budget or keep_tokens
                out of range, scores with both or neither of alpha and budget, keep_tokens or budget without scores.
        """
        return self.forward_head(self.forward_features(images, scores, alpha, keep_tokens, budget, prune))

    def forward_features(
        self,
        images: Tensor,
        scores: Tensor | None = None,
        alpha: float | None = None,
        keep_tokens: int | None = None,
        budget: int | str | None = None,
        prune: str = "backward",
    ) -> Tensor:
        """The normalised class token after the last block, [B, embed_dim]. Arguments and errors as in `forward`."""
        choice = self._choose_for(images, scores, Zoom(alpha, budget, keep_tokens, prune))
        if choice.fixed is not None:
            return self.norm(self.blocks(self._embed_fixed(images, choice)[0])[:, 0])
        return self._run_packed(self._embed_packed(images, choice))

    def _run_packed(self, sequences: Tokens) -> Tensor:
        packed = packing(sequences.lengths, sequences.tokens.device)
        tokens = run_blocks(self.blocks, sequences.tokens, packed)
        return self.norm(tokens[packed.offsets[:-1][sequences.index.argsort()]])  # [B, E]

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        """[B, embed_dim] -> logits [B, num_classes], or the features themselves with pre_logits."""
        return features if pre_logits else self.head(features)

    def tokenise(
        self,
        images: Tensor,
        scores: Tensor | None = None,
        alpha: float | None = None,
        keep_tokens: int | None = None,
        budget: int | str | None = None,
        prune: str = "backward",
    ) -> Tokens:
        """The sequences that enter the first block. Arguments and errors as in `forward`."""
        choice = self._choose_for(images, scores, Zoom(alpha, budget, keep_tokens, prune))
        if choice.fixed is None:
            return self._embed_packed(images, choice)
        tokens, ids = self._embed_fixed(images, choice)
        index = torch.arange(len(images), device=images.device)
        return Tokens(tokens.flatten(0, 1), ids.flatten(), (tokens.shape[1],) * len(images), index)

    def token_counts(
        self,
        scores: Tensor,
        alpha: float | None = None,
        keep_tokens: int | None = None,
        budget: int | str | None = None,
        prune: str = "backward",
    ) -> Tensor:
        """How many tokens each image gets, int64 [B]; the class token is not counted.

        Without pruning that is C + 3 * (zoomed cells). Arguments and errors as in `forward`.
        """
        return self._choose(scores, Zoom(alpha, budget, keep_tokens, prune), len(scores), scores.device).order.counts

    # How it is run

    own_prefix = "pos_fine"  # in state dicts of this model, and not in those of plain ViTs
    setting_names = ("alpha", "budget", "keep", "prune")

    @property
    def score_use(self) -> ScoreUse:
        return ScoreUse(grid=self.score_grid, zooms=True, class_attention=True)

    def operating_points(self, requested: Requested) -> list[OperatingPoint]:
        """Thresholds and budgets, and each of them also pruned to `keep` tokens, as `prune` says."""
        points = zoom_points(requested, self.resolve_budget)
        (prune,) = requested.get("prune", ("backward",))
        if prune not in zoom_tokens.PRUNE_KINDS:
            raise SettingError("prune", prune, f"choose one of {', '.join(zoom_tokens.PRUNE_KINDS)}")
        pruned = []
        for keep in requested.get("keep", ()):
            if not 1 <= keep <= 4 * self.coarse_grid**2:
                raise SettingError("keep", keep, f"give a number from 1 to {4 * self.coarse_grid**2}")
            suffix = f" keep={keep}" + ("" if prune == "backward" else f" {prune}")
            pruned += [
                OperatingPoint(
                    name=zoom.name + suffix,
                    arguments={**zoom.arguments, "keep_tokens": keep, "prune": prune},
                    settings={**zoom.settings, "keep": keep, "prune": prune},
                )
                for zoom in points
            ]
        return points + pruned

    def cost_kinds(self, point: OperatingPoint, scores: Tensor | None, output: Any) -> Tensor | None:
        """The number of cells zoomed of each image, int64 [B]."""
        if scores is None:
            return None
        zoom = {name: point.arguments[name] for name in ("alpha", "budget") if name in point.arguments}
        return (self.token_counts(scores, **zoom) - self.coarse_grid**2) // 3

    def cost(self, point: OperatingPoint, kind: int | None = None) -> ImageCost:
        """The cost of an image with `kind` cells zoomed; None is an image without scores, of which nothing is."""
        length = self.coarse_grid**2 + 3 * (kind or 0)
        if kind is None:
            return ImageCost(length, {})
        pruning = {name: point.arguments[name] for name in ("keep_tokens", "prune") if name in point.arguments}
        if pruning:
            length = zoom_tokens.pruned_counts(4 * kind, length, pruning["keep_tokens"], pruning["prune"])[1]
        return ImageCost(length, {"budget": kind, **pruning})

    def load_from_vit(self, vit: nn.Module | Mapping[str, Tensor]) -> WarmStart:
        """Start from a plain ViT or DeiT of the same width and depth, in place; see `warm_start.load_vit`.

        The ViT's position table goes to the grid of its patch size: the coarse one at zoom factor 2, whose fine
        positions are it enlarged x2 (bicubic), the fine one at 0.5, whose coarse positions are its 2 x 2 means. With
        nothing zoomed at zoom factor 2, or everything at 0.5, the logits are those of the ViT.
        """

        def positions(class_position: Tensor, grid: Tensor) -> dict[str, Tensor]:
            grid = resize_positions(grid, self.score_grid)  # [1, E, s, s]
            if self.zoom_factor == 2.0:
                coarse, fine = grid, resize_positions(grid, 2 * self.score_grid)
            else:
                coarse, fine = F.avg_pool2d(grid, 2), grid
            return {
                "pos_cls": class_position,
                "pos_coarse": coarse.flatten(2).transpose(1, 2),  # [1, C, E]
                "pos_fine": fine.flatten(2).transpose(1, 2),  # [1, 4C, E]
            }

        return fill_from_vit(self, vit, positions if self.pos == "learned" else None)

    # Budgets

    def macs(self, zoomed: int, keep_tokens: int | None = None) -> int:
        """Multiply-adds of the forward pass of an image with `zoomed` cells, both embeddings and the head included.

        What runs, as torch's flop counter sees it: matrix products, attention's two among them. The scores' source is
        not in it. Of a pruned image the tokens that stay are counted, the highest-ranked ones.
        """
        fine, coarse = 4 * zoomed, self.coarse_grid**2 - zoomed
        if keep_tokens is not None:
            fine = min(fine, keep_tokens)
            coarse = min(coarse, keep_tokens - fine)
        length = 1 + fine + coarse
        patch = self.patch_embed.weight[0].numel()
        fine_patch = patch // 4 if self.zoom_factor == 2.0 else patch
        total = self.embed_dim * (fine * fine_patch + coarse * patch)
        for block in self.blocks:
            linear = sum(
                layer.weight.numel() for layer in (block.attn.qkv, block.attn.proj, block.mlp.fc1, block.mlp.fc2)
            )
            total += length * linear + 2 * length**2 * self.embed_dim
        return total + (self.head.weight.numel() if self.num_classes else 0)

    def resolve_budget(self, budget: int | str) -> int:
        """The number of cells to zoom under a budget: itself if a number, else the most that fit into
        "300 tokens" (class token not counted) or "2.3 GMACs" (see `macs`).

        Raises ValueError for a number of cells outside 0 .. C, a text of another form, or a budget below what an image
        with nothing zoomed takes.
        """
        cells = self.coarse_grid**2
        if not isinstance(budget, str):
            if not 0 <= budget <= cells:
                raise ValueError(
                    f"budget must lie between 0 and the {cells} coarse cells, got {budget!r}; "
                    "for tokens or multiply-adds give '300 tokens' or '2.3 GMACs'"
                )
            return budget
        value, unit = zoom_tokens.parse_budget(budget)
        if unit == "cells":
            return self.resolve_budget(int(value))
        costs = [cells + 3 * k if unit == "tokens" else self.macs(k) / 1e9 for k in range(cells + 1)]
        fitting = bisect_right(costs, value)
        if not fitting:
            raise ValueError(f"budget {budget!r} is below the {costs[0]:g} {unit} of an image with nothing zoomed")
        return fitting - 1

    # Choosing and embedding

    def _choose_for(self, images: Tensor, scores: Tensor | None, zoom: Zoom) -> _Choice:
        chans = self.patch_embed.in_channels
        if images.ndim != 4 or tuple(images.shape[1:]) != (chans, self.img_size, self.img_size) or images.shape[0] == 0:
            raise ValueError(
                f"images must be [batch, {chans}, {self.img_size}, {self.img_size}], got {list(images.shape)}"
            )
        return self._choose(scores, zoom, images.shape[0], images.device)

    def _choose(self, scores: Tensor | None, zoom: Zoom, batch: int, device: torch.device) -> _Choice:
        if zoom.alpha is not None:
            zoom_tokens.check_alpha(zoom.alpha)
        if scores is None:
            if zoom.keep_tokens is not None or zoom.budget is not None:
                raise ValueError("keep_tokens and budget need scores to choose by, got scores=None")
            scores, zoom = torch.zeros(batch, self.score_grid**2, device=device), Zoom(budget=0)
        count = None if zoom.budget is None else self.resolve_budget(zoom.budget)
        zoomed = zoom_tokens.choose_cells(scores, batch, self.score_grid, zoom.alpha, count, self.zoom_factor)
        fixed = None if count is None else (4 * count, self.coarse_grid**2 + 3 * count)
        cell_scores = zoom_tokens.coarse_scores(scores.detach(), self.zoom_factor)
        places = zoom_tokens.fine_scores(scores.detach(), self.zoom_factor)
        order = zoom_tokens.order_tokens(cell_scores, places, zoomed)
        if zoom.keep_tokens is not None:
            order = zoom_tokens.prune(order, zoom.keep_tokens, zoom.prune)
            if fixed is not None:
                fixed = zoom_tokens.pruned_counts(*fixed, zoom.keep_tokens, zoom.prune)
        return _Choice(order, fixed)

    def _positions(self) -> Tensor:
        """[5C + 1, E], by token id; the class token's comes last."""
        return torch.cat([self.pos_fine[0], self.pos_coarse[0], self.pos_cls[0]])

    def _embed_fixed(self, images: Tensor, choice: _Choice) -> tuple[Tensor, Tensor]:
        """Tokens [B, 1 + n, E] and their ids [B, 1 + n], every shape known beforehand."""
        fine, count = choice.fixed
        batch, fine_cells = images.shape[0], self.pos_fine.shape[1]
        ids = choice.order.ids[:, :count]  # [B, n]
        fine_patches, fine_kernel, coarse_patches, coarse_kernel = zoom_tokens.patches_and_kernels(
            images, self.patch_embed.weight, self.zoom_factor
        )
        parts = [self.cls_token.expand(batch, -1, -1)]
        for chosen, patches, kernel in (
            (ids[:, :fine], fine_patches, fine_kernel),
            (ids[:, fine:] - fine_cells, coarse_patches, coarse_kernel),
        ):
            if chosen.shape[1]:
                first = torch.arange(batch, device=ids.device)[:, None] * patches.shape[1]
                taken = patches.flatten(0, 1).index_select(0, (first + chosen).flatten())  # [B * f, K]
                parts.append(F.linear(taken, kernel, self.patch_embed.bias).unflatten(0, (-1, chosen.shape[1])))
        dtype = parts[-1].dtype
        tokens = torch.cat([part.to(dtype) for part in parts], dim=1)  # [B, 1 + n, E]
        ids = F.pad(ids, (1, 0), value=5 * self.coarse_grid**2)
        tokens = tokens + self._positions().index_select(0, ids.flatten()).unflatten(0, ids.shape)
        if self.zfe != "none":
            added = zoom_tokens.zoom_factor_embedding(choice.order.fine, count, self.zfe, self.omega, dtype)
            tokens = tokens + F.pad(added, (1, 0))[..., None]
        return tokens, ids

    def _embed_packed(self, images: Tensor, choice: _Choice) -> Tokens:
        """Sequences of different lengths, shortest first."""
        order, fine_cells = choice.order, self.pos_fine.shape[1]
        index = order.counts.argsort(stable=True)  # [B]
        lengths = order.counts[index] + 1  # [B]; the class token is one more
        fine = order.fine[index].minimum(lengths - 1)  # [B]; N_k, less what was pruned
        # The one wait for an accelerator: from here on all shapes are known.
        known_lengths, known_fine = torch.stack([lengths, fine]).tolist()
        total, total_fine, longest = sum(known_lengths), sum(known_fine), known_lengths[-1]
        ids = F.pad(
            order.ids[index, : longest - 1], (1, 0), value=5 * self.coarse_grid**2
        )  # [B, N], the class token first
        sequence, place = rows_of(lengths, total)  # [T] each
        there = sequence * longest + place  # [T], in [B, N] laid out flat
        flat, image = ids.flatten().index_select(0, there), index.index_select(0, sequence)  # [T] each

        # Embed the tokens that are present, all fine ones in one product and all coarse ones in another.
        # In a sequence the class token comes first, then fine tokens, then coarse ones.
        begin = lengths.cumsum(0) - lengths + 1  # [B]
        owner, number = rows_of(fine, total_fine)
        fine_rows = begin.index_select(0, owner) + number
        owner, number = rows_of(lengths - 1 - fine, total - len(known_lengths) - total_fine)
        coarse_rows = (begin + fine).index_select(0, owner) + number
        fine_patches, fine_kernel, coarse_patches, coarse_kernel = zoom_tokens.patches_and_kernels(
            images, self.patch_embed.weight, self.zoom_factor
        )
        parts = []
        for rows, first_id, patches, kernel in (
            (fine_rows, 0, fine_patches, fine_kernel),
            (coarse_rows, fine_cells, coarse_patches, coarse_kernel),
        ):
            place = image[rows] * patches.shape[1] + flat[rows] - first_id
            parts.append(F.linear(patches.flatten(0, 1).index_select(0, place), kernel, self.patch_embed.bias))
        embedded = torch.cat([*parts, self.cls_token[0].to(parts[0].dtype)])  # [fine + coarse + 1, E]
        row = torch.full_like(flat, len(embedded) - 1)  # the row of `embedded` that holds each token
        row[fine_rows] = torch.arange(len(fine_rows), device=flat.device)
        row[coarse_rows] = torch.arange(len(fine_rows), len(embedded) - 1, device=flat.device)
        tokens = embedded.index_select(0, row) + self._positions().index_select(0, flat)  # [T, E]
        if self.zfe != "none":
            added = zoom_tokens.zoom_factor_embedding(
                order.fine[index], longest - 1, self.zfe, self.omega, tokens.dtype
            )
            tokens = tokens + F.pad(added, (1, 0)).flatten().index_select(0, there)[:, None]
        return Tokens(tokens, flat, tuple(known_lengths), index)

    # What timm's optimizers and fine-tuning tools ask of a model.

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Parameters that weight decay leaves alone, besides the one-dimensional ones."""
        return {"cls_token", "pos_cls", "pos_coarse", "pos_fine"}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Which parameters belong to which layer, for layer-wise learning rates."""
        return {"stem": r"^cls_token|^pos_|^patch_embed", "blocks": [(r"^blocks\.(\d+)", None), (r"^norm", (99999,))]}

    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int) -> None:
        """Replace the head by a freshly initialised one."""
        self.num_classes = num_classes
        self.head = nn.Identity()
        if num_classes:
            self.head = nn.Linear(self.embed_dim, num_classes).to(self.cls_token)
            trunc_normal_(self.head.weight, std=0.02)
            nn.init.zeros_(self.head.bias)


# -- positions ---------------------------------------------------------------------------------------------------------


def _sincos_table(side: int, step: float, dim: int) -> Tensor:
    """2-D sine-cosine positions of a side x side grid, [side * side, dim]: a quarter of the channels each for the sine
    and cosine of row and column. step is a cell's size in score cells, so that grids of different cells share
    one ruler: a cell's coordinate is that of its centre, and score cell i lies at i.
    """
    centre = (torch.arange(side) + 0.5) * step - 0.5
    frequency = 10000.0 ** -(torch.arange(dim // 4) / (dim // 4))
    angle = centre[:, None] * frequency  # [side, dim / 4]
    wave = torch.cat([angle.sin(), angle.cos()], dim=1)  # [side, dim / 2]
    rows, columns = wave[:, None].expand(-1, side, -1), wave[None].expand(side, -1, -1)
    return torch.cat([rows, columns], dim=2).flatten(0, 1)


def _sincos_1d(length: int, dim: int) -> Tensor:
    """Sine-cosine positions 0 .. length-1, [length, dim]: sine on even channels, cosine on odd ones."""
    frequency = 10000.0 ** -(torch.arange(dim // 2, dtype=torch.float64) / (dim // 2))
    angle = torch.arange(length, dtype=torch.float64)[:, None] * frequency  # [length, dim / 2]
    return torch.stack([angle.sin(), angle.cos()], dim=2).flatten(1).float()


# -- timm registry -----------------------------------------------------------------------------------------------------


default_cfgs = untrained_cfgs(*(f"zoomvit_{size}_patch16_224" for size in ("tiny", "small", "base")))


@register_model
def zoomvit_tiny_patch16_224(pretrained: bool = False, **kwargs: Any) -> ZoomViT:
    """ZoomViT on DeiT-Ti (Table 8). Takes the arguments of `ZoomViT`."""
    defaults = {"patch_size": 16, "embed_dim": 192, "depth": 12, "num_heads": 3}
    return build(ZoomViT, "zoomvit_tiny_patch16_224", pretrained, defaults, kwargs)


@register_model
def zoomvit_small_patch16_224(pretrained: bool = False, **kwargs: Any) -> ZoomViT:
    """ZoomViT on DeiT-S, the paper's main model. Takes the arguments of `ZoomViT`."""
    defaults = {"patch_size": 16, "embed_dim": 384, "depth": 12, "num_heads": 6}
    return build(ZoomViT, "zoomvit_small_patch16_224", pretrained, defaults, kwargs)


@register_model
def zoomvit_base_patch16_224(pretrained: bool = False, **kwargs: Any) -> ZoomViT:
    """ZoomViT on DeiT-B (Table 8). Takes the arguments of `ZoomViT`."""
    defaults = {"patch_size": 16, "embed_dim": 768, "depth": 12, "num_heads": 12}
    return build(ZoomViT, "zoomvit_base_patch16_224", pretrained, defaults, kwargs)
