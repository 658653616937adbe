"""ZoomViT: a vision transformer that sees high-scored regions through finer patches (section 3.3).

The model takes images and the score maps that a zoomer (or anything else) made of them; it owns no zoomer.
`zoom_tokens` decides which tokens an image gets, `zoomvit_embedding` embeds them, and timm's transformer blocks run
over them. Importing this module registers zoomvit_{tiny,small,base}_patch16_224 with timm.
"""

from __future__ import annotations

import copy
from bisect import bisect_right
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from timm.models import register_model
from torch import Tensor, nn

from zpipe.train.models import zoom_tokens
from zpipe.train.models.backbone import (
    DEIT_BASE,
    DEIT_SMALL,
    DEIT_TINY,
    StandaloneModel,
    block_macs,
    build,
    check_images,
    init_linear,
    layer_norm,
    linear_head,
    linear_macs,
    square_side,
    transformer_blocks,
    untrained_cfgs,
)
from zpipe.train.models.operating_points import (
    ImageCost,
    OperatingPoint,
    Requested,
    ScoreUse,
    SettingError,
    zoom_points,
)
from zpipe.train.models.packing import packing, run_block, run_blocks
from zpipe.train.models.warm_start import WarmStart, fill_from_vit, resize_positions
from zpipe.train.models.zoom_tokens import TokenOrder, Zoom
from zpipe.train.models.zoomvit_embedding import (
    POSITIONS,
    Embedding,
    TokenGroup,
    Tokens,
    embed_fixed,
    embed_packed,
    position_tables,
)

__all__ = ["TokenGroup", "Tokens", "ZoomViT"]


class _Choice(NamedTuple):
    """Which tokens a batch gets, and (fine tokens, all tokens) of an image if they are known to be the same for all."""

    order: TokenOrder
    fixed: tuple[int, int] | None


class ZoomViT(StandaloneModel):
    """A pre-norm vision transformer over two patch sizes, chosen by score.

    `model(images, scores, alpha=0.03)` zooms the cells scored above alpha; `budget=k` instead zooms exactly the k
    best cells of every image; with `scores=None` nothing is zoomed.

    Nothing is padded: under a threshold the images of a batch have different token counts and are packed end to end
    (see `packing`), so that an image's logits don't depend on its neighbours. Under a budget all shapes are fixed, and
    the model can be compiled and exported to ONNX; the values of the scores are then not checked.

    Args:
        img_size: pixels a side; images are square.
        patch_size: pixels a side of a score cell and of the patch kernel. At zoom factor 2 the patches have patch_size
            pixels and half as many a side, at 0.5 patch_size and twice as many.
        embed_dim: width of the transformer.
        depth: number of blocks.
        num_heads: attention heads of a block.
        num_classes: number of classes; 0 makes the head an identity.
        in_chans: channels of the images.
        mlp_ratio: width of the MLPs, as a multiple of embed_dim.
        drop_path_rate: stochastic depth of the last block; it grows linearly from 0 at the first, as in timm's ViT.
        init_values: initial value of LayerScale (DeiT-III: 1e-4); None leaves LayerScale out (DeiT).
        zoom_factor: 2.0 or 0.5 (eta).
        zfe: zoom factor embedding, "none", "fixed" or "soft" (Eq. 6). It adds one number to all channels of a token,
            which every LayerNorm of a pre-norm transformer removes again: all three give the same logits.
        omega: steepness of the soft embedding. The paper gives none; 0.1 is our choice.
        pos: "learned" positions, initialised by 2-D sine-cosine ones, or "sincos" to keep those fixed. Each grid has
            its own table, and both tables place a token at the centre of the pixels it covers. "sincos-1d" is what the
            authors released: fixed 1-D sine-cosine positions over each grid's row-major index, with the class token at
            0 and the two grids not aligned.

    Raises:
        ValueError: sizes that don't divide, an unknown zoom_factor, zfe or pos.
    """

    undecayed = ("cls_token", "pos_cls", "pos_coarse", "pos_fine")
    stem_pattern = r"^cls_token|^pos_|^patch_embed"
    own_prefix = "pos_fine"  # see `warm_start.StartsFromViT`
    setting_names: tuple[str, ...] = ("alpha", "budget", "keep", "prune")

    pos_cls: Tensor
    pos_coarse: Tensor
    pos_fine: Tensor

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
        for name, table in position_tables(pos, self.coarse_grid, coarse_patch / patch_size, embed_dim).items():
            if pos == "learned":
                self.register_parameter(name, nn.Parameter(table))
            else:
                self.register_buffer(name, table)
        self.blocks = transformer_blocks(
            embed_dim, depth, num_heads, mlp_ratio, drop_path_rate, init_values=init_values
        )
        self.norm = layer_norm(embed_dim)
        self.head = linear_head(embed_dim, num_classes)
        self._run_block: Callable[..., Tensor] = run_block

        nn.init.normal_(self.cls_token, std=1e-6)
        self.apply(init_linear)

    def forward(
        self,
        images: Tensor,
        scores: Tensor | None = None,
        alpha: float | None = None,
        keep_tokens: int | None = None,
        budget: int | str | None = None,
        prune: str = "backward",
    ) -> Tensor:
        """Classify images.

        Args:
            images: [B, in_chans, img_size, img_size].
            scores: [B, s * s] in [0, 1], s = img_size / patch_size, row-major; no gradient flows into them. None
                zooms nothing, whatever alpha is.
            alpha: threshold in [0, 1]; a coarse cell is zoomed if its score is strictly above it.
            keep_tokens: prune every ordered sequence to this many tokens, not counting the class token; shorter
                sequences stay as they are.
            budget: zoom exactly this many coarse cells of every image, instead of those above alpha: a number of cells,
                or "300 tokens" or "2.3 GMACs" for as many as fit (see `resolve_budget`).
            prune: which tokens keep_tokens removes, one of `zoom_tokens.PRUNE_KINDS`.

        Returns:
            Logits [B, num_classes].

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
        if choice.fixed is None:
            return self._run_packed(embed_packed(images, choice.order, self._embedding()))
        tokens, _ = embed_fixed(images, choice.order, choice.fixed, self._embedding())
        if self._run_block is not run_block:
            return self.norm(run_blocks(self.blocks, tokens, None, self._run_block)[:, 0])
        return self.norm(self.blocks(tokens)[:, 0])

    def _run_packed(self, sequences: Tokens) -> Tensor:
        tokens = run_blocks(self.blocks, sequences.tokens, sequences.packed, self._run_block)
        first = sequences.packed.offsets[:-1].index_select(0, sequences.index.argsort())
        return self.norm(tokens.index_select(0, first))  # [B, E]

    def compiled(self, **options: Any) -> ZoomViT:
        """The same model with the same parameters, its blocks compiled.

        All blocks share one graph (or two, with and without stochastic depth), which takes any batch size and any
        number of tokens. Tokens are chosen and embedded outside of it, since under a threshold the host has to read how
        many there are. A model that is bound to a budget can also be compiled as a whole, by `torch.compile`.

        Args:
            options: of `torch.compile`.
        """
        twin = copy.copy(self)  # shares parameters, buffers and blocks
        twin._run_block = torch.compile(run_block, **{"dynamic": True} | options)
        return twin

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        """Features [B, embed_dim] -> logits [B, num_classes], or with pre_logits the features themselves."""
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
            return embed_packed(images, choice.order, self._embedding())
        tokens, ids = embed_fixed(images, choice.order, choice.fixed, self._embedding())
        index = torch.arange(len(images), device=images.device)
        packed = packing(torch.full_like(index, tokens.shape[1]), [tokens.shape[1]] * len(images))
        return Tokens(tokens.flatten(0, 1), ids.flatten(), packed, index)

    def token_counts(
        self,
        scores: Tensor,
        alpha: float | None = None,
        keep_tokens: int | None = None,
        budget: int | str | None = None,
        prune: str = "backward",
    ) -> Tensor:
        """The number of tokens of each image, int64 [B]; the class token is not counted.

        Without pruning it is C + 3 * (zoomed cells). Arguments and errors as in `forward`.
        """
        return self._choose(scores, Zoom(alpha, budget, keep_tokens, prune), len(scores), scores.device).order.counts

    # Operating points and weights

    @property
    def score_use(self) -> ScoreUse:
        """How scores guide the model."""
        return ScoreUse(grid=self.score_grid, zooms=True, class_attention=True)

    def operating_points(self, requested: Requested) -> list[OperatingPoint]:
        """Thresholds and budgets, and each of them again with its sequences pruned to `keep` tokens by `prune`."""
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
        """The number of zoomed cells of each image, int64 [B]; None without scores."""
        if scores is None:
            return None
        zoom = {name: point.arguments[name] for name in ("alpha", "budget") if name in point.arguments}
        return (self.token_counts(scores, **zoom) - self.coarse_grid**2) // 3

    def cost(self, point: OperatingPoint, kind: int | None = None) -> ImageCost:
        """The cost of an image with `kind` zoomed cells; None is an image without scores, where nothing is zoomed."""
        length = self.coarse_grid**2 + 3 * (kind or 0)
        if kind is None:
            return ImageCost(length, {})
        pruning = {name: point.arguments[name] for name in ("keep_tokens", "prune") if name in point.arguments}
        if pruning:
            length = zoom_tokens.pruned_counts(4 * kind, length, pruning["keep_tokens"], pruning["prune"])[1]
        return ImageCost(length, {"budget": kind, **pruning})

    def load_from_vit(self, vit: nn.Module | Mapping[str, Tensor]) -> WarmStart:
        """Fill the model, in place, from a plain ViT or DeiT of the same width and depth; see `warm_start.load_vit`.

        The ViT's position table becomes that of the grid with its patch size. At zoom factor 2 this is the coarse grid,
        and the fine positions are the table enlarged x2 (bicubic). At 0.5 it is the fine grid, and the coarse positions
        are 2 x 2 means. With nothing zoomed at zoom factor 2, or everything at 0.5, the logits are those of the ViT.
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

        They are counted as by torch's flop counter: matrix products, the two of attention among them. The source of the
        scores is not included. Of a pruned image the highest-ranked tokens are counted, which are those that stay.
        """
        fine, coarse = 4 * zoomed, self.coarse_grid**2 - zoomed
        if keep_tokens is not None:
            fine = min(fine, keep_tokens)
            coarse = min(coarse, keep_tokens - fine)
        length = 1 + fine + coarse
        patch = self.patch_embed.weight[0].numel()
        fine_patch = patch // 4 if self.zoom_factor == 2.0 else patch
        total = self.embed_dim * (fine * fine_patch + coarse * patch)
        total += sum(block_macs(block, length) for block in self.blocks)
        return total + linear_macs(self.head)

    def resolve_budget(self, budget: int | str) -> int:
        """The number of cells to zoom under a budget.

        Args:
            budget: a number of cells; or "300 tokens" (without the class token) or "2.3 GMACs" (see `macs`), for the
                largest number of cells that fits.

        Raises:
            ValueError: a number of cells outside 0 .. C, a text of another form, or a budget below the cost of an image
                with nothing zoomed or above that of one with everything zoomed.
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
        if value >= 2 * costs[-1] - costs[-2]:  # a whole cell more would fit, if there were one
            raise ValueError(f"budget {budget!r} is above the {costs[-1]:g} {unit} of an image with everything zoomed")
        return fitting - 1

    # Tokens

    def _choose_for(self, images: Tensor, scores: Tensor | None, zoom: Zoom) -> _Choice:
        check_images(images, self.patch_embed.in_channels, self.img_size)
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

    def _embedding(self) -> Embedding:
        class_token = self.cls_token[0] + self.pos_cls[0]  # [1, E]
        positions = torch.cat([self.pos_fine[0], self.pos_coarse[0], class_token])  # [5C + 1, E], by token id
        kernel, bias = self.patch_embed.weight, cast(Tensor, self.patch_embed.bias)
        return Embedding(kernel, bias, positions, self.zoom_factor, self.zfe, self.omega)


# -- timm registry -----------------------------------------------------------------------------------------------------


default_cfgs = untrained_cfgs(*(f"zoomvit_{size}_patch16_224" for size in ("tiny", "small", "base")))


@register_model
def zoomvit_tiny_patch16_224(pretrained: bool = False, **kwargs: Any) -> ZoomViT:
    """ZoomViT on DeiT-Ti (Table 8). Takes the arguments of `ZoomViT`."""
    return build(ZoomViT, "zoomvit_tiny_patch16_224", pretrained, DEIT_TINY, kwargs)


@register_model
def zoomvit_small_patch16_224(pretrained: bool = False, **kwargs: Any) -> ZoomViT:
    """ZoomViT on DeiT-S, the paper's main model. Takes the arguments of `ZoomViT`."""
    return build(ZoomViT, "zoomvit_small_patch16_224", pretrained, DEIT_SMALL, kwargs)


@register_model
def zoomvit_base_patch16_224(pretrained: bool = False, **kwargs: Any) -> ZoomViT:
    """ZoomViT on DeiT-B (Table 8). Takes the arguments of `ZoomViT`."""
    return build(ZoomViT, "zoomvit_base_patch16_224", pretrained, DEIT_BASE, kwargs)
