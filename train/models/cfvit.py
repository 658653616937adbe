"""CF-ViT (Chen et al., AAAI 2023): a ViT that first sees a coarse grid, and then more finely where it attended most.

Both stages share the patch kernel, the blocks, the norm and the head. The coarse stage sees the image at half its size,
as n x n cells of one patch each; the fine stage sees some of these cells as 2 x 2 patches of the whole image, and the
others as they were. Importing this module registers cfvit_tiny and cfvit_small with timm.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.layers import trunc_normal_
from timm.models import register_model
from torch import Tensor, nn

from zpipe.train.models import zoom_tokens
from zpipe.train.models.backbone import (
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
from zpipe.train.models.cfvit_released import our_name, released_arguments
from zpipe.train.models.cfvit_stages import (
    REUSES,
    Coarse,
    EarlyExit,
    Plan,
    Reuse,
    Stages,
    attention_weights,
    cell_scores,
    check_share,
    run_with_class_attention,
    share_of,
    take_rows,
)
from zpipe.train.models.operating_points import ImageCost, OperatingPoint, Requested, ScoreUse, points_of
from zpipe.train.models.released_weights import ReleasedWeights
from zpipe.train.models.warm_start import WarmStart, fill_from_vit, resize_positions

__all__ = ["CFViT", "EarlyExit", "Stages"]

DEFAULT_EXITS = (0.0, 0.3, 0.5, 0.7, 0.9, 1.0)


class CFViT(StandaloneModel):
    """A two-stage vision transformer with early exit; as `cfvit_small` 23.25 M parameters and 1.10 + 2.91 GMACs.

    `model(images)` returns the logits of the fine stage, `model(images, return_stages=True)` those of both, and
    `model(images, exit_threshold=0.75)` runs the fine stage only on the images of which the coarse one is not sure, as
    one smaller batch. Every image of a batch has the same number of tokens, so without early exit all shapes are fixed.

    Where the paper is silent or its authors' code differs from it, this follows the code:

    - The coarse image is the whole image at half its size, bilinear with aligned corners, not each patch on its own.
    - The global class attention (Eq. 9) is zero before the fourth block, so that the blocks have nearly equal weights;
      if it began as the fourth block's attention, as the equation suggests, that block would get 92 %.
    - Cells that aren't refined enter the fine stage as they entered the coarse one, with the coarse grid's positions.
    - In a full split, the first phase of training, the fine stage has no positions, where Eq. 11 adds them: positions
      are added only once cells are chosen. split_positions=True follows the equation.
    - Features are reused from the normalised output of the coarse stage, through a LayerNorm and the MLP.

    It differs from their code in one point: the position tables have no weight decay, as the authors intended.

    Args:
        img_size: pixels a side; images are square. 224 gives 7 x 7 coarse cells, 288 gives 9 x 9 (the paper's CF-ViT*).
        patch_size: pixels a side of a patch, in both stages; img_size must be a multiple of twice as many.
        embed_dim: width of the transformer.
        depth: number of blocks.
        num_heads: attention heads of a block.
        num_classes: number of classes; 0 makes the head an identity.
        in_chans: channels of the images.
        mlp_ratio: width of the MLPs, that of the reuse MLP included, as a multiple of embed_dim.
        drop_path_rate: stochastic depth of the last block; it grows linearly from 0 at the first.
        keep: the share of coarse cells to refine (the paper's alpha, Table 6), rounded up, unless a call gives another.
        selection: which cells to refine (Table 4), unless a call gives another. "global": those of the highest global
            class attention, "negative": of the lowest, "last": of the highest class attention in the last block,
            "random": any.
        beta: decay of the global class attention (Eq. 9, Table 7).
        reuse: how the fine stage reuses features of the coarse one (Table 5): "mlp" for the refined cells, "linear" for
            a linear layer instead of the MLP, "none", "mlp+class" for the class token too, "mlp+uninformative" for all
            cells.
        split_positions: whether a full split has the fine grid's positions; it should after a warm start.

    Raises:
        ValueError: sizes that don't divide, keep outside [0, 1], beta outside [0, 1), an unknown selection or reuse.
    """

    SELECTIONS: tuple[str, ...] = ("global", "negative", "last", "random")
    WITHOUT_SCORES: tuple[str, ...] = ("last", "random")  # selections that have no use for given scores
    RELEASE_NAME = "cfvit"
    RELEASE_CONFIG: tuple[str, ...] = ("num_heads",)

    two_stage = True  # trained by the losses of both stages
    undecayed = ("cls_token", "pos_coarse", "pos_fine")
    stem_pattern = r"^cls_token|^pos_|^patch_embed|^reuse"  # reuse feeds the first block
    own_prefix = "pos_fine"  # see `warm_start.StartsFromViT`
    setting_names = ("exit",)

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
        keep: float = 0.5,
        selection: str = "global",
        beta: float = 0.99,
        reuse: str = "mlp",
        split_positions: bool = False,
    ) -> None:
        super().__init__()
        self.img_size = square_side(img_size)
        self.patch_size = patch_size
        if self.img_size % (2 * patch_size):
            raise ValueError(
                f"two stages need an image of whole pairs of patches: image size {self.img_size} doesn't divide "
                f"by {2 * patch_size}"
            )
        if embed_dim % num_heads:
            raise ValueError(f"embed_dim must divide by num_heads {num_heads}, got {embed_dim}")
        if not 0 <= beta < 1:
            raise ValueError(f"beta must lie in [0, 1), got {beta!r}")
        if reuse not in REUSES:
            raise ValueError(f"reuse must be one of {', '.join(REUSES)}, got {reuse!r}")
        self.score_grid = self.img_size // patch_size  # 2n, patches a side
        self.coarse_grid = self.score_grid // 2  # n, coarse cells a side
        self.keep = check_share(keep)
        self.selection = self._check_selection(selection)
        self.beta = beta
        self.num_classes = num_classes
        self.num_features = self.embed_dim = embed_dim

        cells = self.coarse_grid**2
        self.patch_embed = nn.Conv2d(in_chans, embed_dim, patch_size, stride=patch_size)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_coarse = nn.Parameter(torch.zeros(1, 1 + cells, embed_dim))
        self.pos_fine = nn.Parameter(torch.zeros(1, 1 + 4 * cells, embed_dim))
        self.blocks = transformer_blocks(embed_dim, depth, num_heads, mlp_ratio, drop_path_rate)
        self.norm = layer_norm(embed_dim)
        self.head = linear_head(embed_dim, num_classes)
        self.split_positions = split_positions
        self.reuse_kind = reuse
        self.reuse = None if reuse == "none" else Reuse(embed_dim, mlp_ratio, reuse == "linear")

        for table in (self.cls_token, self.pos_coarse, self.pos_fine):
            trunc_normal_(table, std=0.02)
        self.apply(init_linear)

    def forward(
        self,
        images: Tensor,
        scores: Tensor | None = None,
        *,
        keep: float | None = None,
        selection: str | None = None,
        full_split: bool = False,
        return_stages: bool = False,
        exit_threshold: float | None = None,
    ) -> Tensor | Stages | EarlyExit:
        """Classify images.

        Args:
            images: [B, in_chans, img_size, img_size].
            scores: the importance of the cells from another source (a zoomer, stored maps), instead of the class
                attention: [B, n * n] by coarse cell, or [B, 4 * n * n] by patch, of which a cell takes its highest.
                Row-major and finite; no gradient flows into them.
            keep: the share of cells to refine; None takes the model's.
            selection: which cells to refine; None takes the model's. With scores, "negative" takes the lowest-scored.
            full_split: the first phase of training (200 of 300 epochs in the paper): all cells are refined, and unless
                the model has split_positions the fine grid's positions are not used and get no gradient.
            return_stages: return the logits of both stages.
            exit_threshold: eta; images whose highest coarse probability reaches it keep the coarse logits, and the
                fine stage runs only on the others. At 0 all images exit; at 1 only those whose probability rounds to 1.

        Returns:
            [B, num_classes] of the fine stage; `Stages` with return_stages; `EarlyExit` under an exit threshold.

        Raises:
            ValueError: images or scores of another shape, scores that aren't finite, keep or exit_threshold outside
                [0, 1], an unknown selection or one that has no use for scores, exit_threshold with return_stages or
                without classes.
        """
        plan = self._plan(images, scores, keep, selection, full_split)
        if exit_threshold is not None:
            if not 0 <= exit_threshold <= 1:
                raise ValueError(f"exit_threshold must lie in [0, 1], got {exit_threshold!r}")
            if return_stages or not self.num_classes:
                raise ValueError(
                    "exit_threshold chooses between the logits of two stages: give no return_stages, and classes"
                )
            return self._exit_early(images, plan, exit_threshold)
        coarse = self._coarse_stage(images, plan)
        # The head runs on both stages whatever is returned, so that the cost is that of inference.
        stages = Stages(self.head(coarse.outputs[:, 0]), self.head(self._fine_stage(images, coarse, plan)))
        return stages if return_stages else stages.fine

    def forward_features(
        self,
        images: Tensor,
        scores: Tensor | None = None,
        *,
        keep: float | None = None,
        selection: str | None = None,
        full_split: bool = False,
    ) -> Tensor:
        """The normalised class token of the fine stage, [B, embed_dim]. Arguments and errors as in `forward`."""
        plan = self._plan(images, scores, keep, selection, full_split)
        return self._fine_stage(images, self._coarse_stage(images, plan), plan)

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        """Features [B, embed_dim] -> logits [B, num_classes], or with pre_logits the features themselves."""
        return features if pre_logits else self.head(features)

    @torch.no_grad()
    def refined(
        self,
        images: Tensor,
        scores: Tensor | None = None,
        *,
        keep: float | None = None,
        selection: str | None = None,
        full_split: bool = False,
    ) -> Tensor:
        """Which coarse cells the fine stage refines, bool [B, n * n]. Arguments and errors as in `forward`."""
        plan = self._plan(images, scores, keep, selection, full_split)
        chosen = torch.ones(len(images), self.coarse_grid**2, dtype=torch.bool, device=images.device)
        if plan.refined == chosen.shape[1]:
            return chosen
        order = self._order(self._coarse_stage(images, plan), plan)
        return chosen.scatter_(1, order[:, plan.refined :], False)

    # Operating points and weights

    @property
    def score_use(self) -> ScoreUse:
        """How scores guide the model."""
        return ScoreUse(grid=self.score_grid, has_own=True)

    def operating_points(self, requested: Requested) -> list[OperatingPoint]:
        """A point for each threshold of early exit; for DEFAULT_EXITS if none is requested."""
        return points_of("exit", requested.get("exit", DEFAULT_EXITS), "exit_threshold", _check_exit)

    def cost_kinds(self, point: OperatingPoint, scores: Tensor | None, output: Any) -> Tensor | None:
        """1 for an image that exited, 0 for one that both stages saw, int64 [B]; None without early exit."""
        return output.exited.long() if isinstance(output, EarlyExit) else None

    def cost(self, point: OperatingPoint, kind: int | None = None) -> ImageCost:
        """The cost of an image: of both stages, or of the coarse one alone for an image that exited (kind 1)."""
        coarse, fine = (length - 1 for length in self.lengths())
        if kind:
            return ImageCost(coarse, {"exit_threshold": 0.0}, exited=True)
        return ImageCost(coarse + fine, {"return_stages": True}, exited=False)

    def load_from_vit(self, vit: nn.Module | Mapping[str, Tensor]) -> WarmStart:
        """Fill the model, in place, from a plain ViT or DeiT of the same width and depth; see `warm_start.load_vit`.

        Each stage takes the ViT's positions, resized to its grid, and its class position. If nothing is reused and all
        cells are refined, with positions, the logits of the fine stage are those of the ViT.
        """

        def positions(class_position: Tensor, grid: Tensor) -> dict[str, Tensor]:
            tables = {}
            for name, side in (("pos_coarse", self.coarse_grid), ("pos_fine", self.score_grid)):
                resized = resize_positions(grid, side).flatten(2).transpose(1, 2)  # [1, side * side, E]
                tables[name] = torch.cat([class_position, resized], dim=1)
            return tables

        return fill_from_vit(self, vit, positions, [] if self.reuse is None else ["reuse: a ViT has none"])

    @classmethod
    def load_release(cls, weights: ReleasedWeights, num_heads: int, **config: Any) -> CFViT:
        """Build the model of published weights, in eval mode; see `release.load_release`.

        Raises:
            ValueError: weights of anything but a published model of this kind.
        """
        arguments = released_arguments(weights) | config
        model: CFViT = timm.create_model(f"{cls.__name__.lower()}_small", num_heads=num_heads, **arguments)
        weights.fill(model, our_name)
        return model.eval()

    # Costs

    def lengths(self, keep: float | None = None, full_split: bool = False) -> tuple[int, int]:
        """Tokens of the coarse and the fine stage, the class token included: at 224 px 50 and 125 (Eq. 10), or 197."""
        cells = self.coarse_grid**2
        return 1 + cells, 1 + cells + 3 * (cells if full_split else self._count(keep))

    def macs(self, p_exit: float = 0.0, keep: float | None = None, full_split: bool = False) -> int:
        """Mean multiply-adds of an image: the coarse stage for all images, the fine one for those that don't exit.

        They are counted as by torch's flop counter: matrix products, the two of attention among them, and convolutions.
        Both stages embed all of their grid, and features of all cells go through the reuse MLP, as in the authors' code
        and numbers. The source of given scores is not included.

        Args:
            p_exit: the share of images that exit.
            keep: as of `forward`.
            full_split: as of `forward`.

        Raises:
            ValueError: a share outside [0, 1].
        """
        if not 0 <= p_exit <= 1:
            raise ValueError(f"p_exit must lie in [0, 1], got {p_exit!r}")
        cells = self.coarse_grid**2
        patch, head = self.patch_embed.weight.numel(), linear_macs(self.head)
        coarse_length, fine_length = self.lengths(keep, full_split)
        coarse = cells * patch + sum(block_macs(block, coarse_length) for block in self.blocks) + head
        fine = 4 * cells * patch + sum(block_macs(block, fine_length) for block in self.blocks) + head
        if self.reuse is not None:
            fine += (cells + (self.reuse_kind == "mlp+class")) * linear_macs(self.reuse)
        return coarse + round((1 - p_exit) * fine)

    # Choosing

    def _plan(
        self, images: Tensor, scores: Tensor | None, keep: float | None, selection: str | None, full_split: bool
    ) -> Plan:
        check_images(images, self.patch_embed.in_channels, self.img_size)
        cells = self.coarse_grid**2
        selection = self._check_selection(self.selection if selection is None else selection)
        refined = self._count(keep)
        if scores is not None:
            if selection in self.WITHOUT_SCORES:
                raise ValueError(f"selection {selection!r} has no use for scores; leave them out")
            scores = cell_scores(scores, images.shape[0], cells)
        if full_split or refined == cells:  # nothing to choose
            return Plan(cells, selection, (0.0,) * len(self.blocks), None, self.split_positions or not full_split)
        weights = self._attention_weights(selection, scores is not None)
        if scores is None and not any(weights):
            scores = torch.rand(images.shape[0], cells, device=images.device)
        return Plan(refined, selection, weights, scores, True)

    def _check_selection(self, selection: str) -> str:
        if selection not in self.SELECTIONS:
            raise ValueError(f"selection must be one of {', '.join(self.SELECTIONS)}, got {selection!r}")
        return selection

    def _count(self, keep: float | None) -> int:
        """Cells to refine per image."""
        return share_of(self.coarse_grid**2, self.keep if keep is None else keep)

    def _attention_weights(self, selection: str, has_scores: bool) -> tuple[float, ...]:
        """The weight of each block's class attention in the score (Eq. 9, unrolled); 0 where it is not read."""
        depth = len(self.blocks)
        if has_scores or selection == "random":
            return (0.0,) * depth
        return attention_weights(depth, 0.0 if selection == "last" else self.beta)

    def _order(self, coarse: Coarse, plan: Plan) -> Tensor:
        """All cells of each image in the order in which they are refined, int64 [B, C]."""
        assert coarse.scores is not None  # a plan that chooses cells has scores or reads attention
        return self._rank(coarse.scores, plan.selection)

    def _rank(self, scores: Tensor, selection: str) -> Tensor:
        """Scores [B, C] -> int64 [B, C], the cells in the order in which they are refined."""
        return zoom_tokens.stable_argsort(scores, descending=selection != "negative")

    # The two stages

    def _coarse_stage(self, images: Tensor, plan: Plan) -> Coarse:
        half = F.interpolate(images, size=(self.img_size // 2,) * 2, mode="bilinear", align_corners=True)
        x = self.patch_embed(half).flatten(2).transpose(1, 2)  # [B, C, E]
        inputs = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1) + self.pos_coarse  # [B, 1 + C, E]
        x, scores = inputs, plan.scores
        for block, weight in zip(self.blocks, plan.weights, strict=True):
            if not weight:
                x = block(x)
                continue
            x, attention = run_with_class_attention(block, x)
            scores = weight * attention if scores is None else scores + weight * attention
        return Coarse(inputs, self.norm(x), scores)

    def _fine_stage(self, images: Tensor, coarse: Coarse, plan: Plan) -> Tensor:
        """The normalised class token, [B, E]."""
        n, width = self.coarse_grid, self.embed_dim
        grid = self.patch_embed(images).unflatten(3, (n, 2)).unflatten(2, (n, 2))  # [B, E, n, 2, n, 2]
        fine = grid.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)  # [B, C, 4 E], the patches of each cell together
        pos_fine = self.pos_fine if plan.positions else torch.zeros_like(self.pos_fine)
        pos = pos_fine[0, 1:].view(n, 2, n, 2, width).transpose(1, 2).reshape(n * n, 4 * width)
        cls = (self.cls_token + pos_fine[:, :1]).expand(fine.shape[0], -1, -1)
        rest = coarse.inputs[:, 1:]  # [B, C, E]
        reused: Tensor | None = None
        if self.reuse is not None:
            with_class = self.reuse_kind == "mlp+class"
            reused = self.reuse(coarse.outputs if with_class else coarse.outputs[:, 1:])  # [B, (1 +) C, E]
            if with_class:
                cls, reused = cls + reused[:, :1], reused[:, 1:]
            if self.reuse_kind == "mlp+uninformative":
                rest = rest + reused

        if plan.refined == n * n:
            fine = (fine + pos).unflatten(2, (4, width))  # [B, C, 4, E]
            if reused is not None:
                fine = fine + reused[:, :, None]
            parts = [cls, fine.flatten(1, 2)]
        else:
            order = self._order(coarse, plan)
            chosen, others = order[:, : plan.refined], order[:, plan.refined :]
            parts = [cls]
            if plan.refined:
                fine = take_rows(fine, chosen) + pos.index_select(0, chosen.flatten()).unflatten(0, chosen.shape)
                fine = fine.unflatten(2, (4, width))  # [B, K, 4, E]
                if reused is not None:
                    fine = fine + take_rows(reused, chosen)[:, :, None]
                parts.append(fine.flatten(1, 2))
            parts.append(take_rows(rest, others))
        tokens = torch.cat(parts, dim=1)  # [B, 1 + 4 K + (C - K), E]
        return self.norm(self.blocks(tokens)[:, 0])

    def _exit_early(self, images: Tensor, plan: Plan, threshold: float) -> EarlyExit:
        coarse = self._coarse_stage(images, plan)
        logits = self.head(coarse.outputs[:, 0])
        exited = logits.float().softmax(dim=1).amax(dim=1) >= threshold
        unsure = (~exited).nonzero()[:, 0]
        if unsure.shape[0]:
            fine = self.head(self._fine_stage(images[unsure], coarse.select(unsure), plan))
            logits = logits.index_copy(0, unsure, fine)
        return EarlyExit(logits, exited)


def _check_exit(threshold: float) -> float:
    if not 0.0 <= threshold <= 1.0:
        raise ValueError("a threshold of early exit lies in [0, 1]")
    return threshold


default_cfgs = untrained_cfgs("cfvit_tiny", "cfvit_small")


@register_model
def cfvit_tiny(pretrained: bool = False, **kwargs: Any) -> CFViT:
    """CF-ViT on DeiT-Ti. Takes the arguments of `CFViT`."""
    return build(CFViT, "cfvit_tiny", pretrained, DEIT_TINY, kwargs)


@register_model
def cfvit_small(pretrained: bool = False, **kwargs: Any) -> CFViT:
    """CF-ViT on DeiT-S, the paper's main model. Takes the arguments of `CFViT`."""
    return build(CFViT, "cfvit_small", pretrained, DEIT_SMALL, kwargs)
