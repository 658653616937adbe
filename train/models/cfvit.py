"""CF-ViT (Chen et al., AAAI 2023): a ViT that looks at a coarse grid first and again, finer, where that one attended.

Both stages run through the same patch kernel, blocks, norm and head. The coarse stage sees the image at half its size,
n x n cells of one patch each; the fine stage sees some of these cells as 2 x 2 patches of the whole image, the others as
they were. Importing this module registers cfvit_tiny and cfvit_small with timm.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import timm
import torch
import torch.nn.functional as F
from timm.layers import Mlp, trunc_normal_
from timm.models import register_model
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from zpipe.train.models import zoom_tokens
from zpipe.train.models.backbone import build, square_side, untrained_cfgs
from zpipe.train.models.operating_points import ImageCost, OperatingPoint, Requested, ScoreUse, points_of
from zpipe.train.models.released_weights import ReleasedWeights
from zpipe.train.models.warm_start import WarmStart, fill_from_vit, resize_positions

__all__ = ["CFViT", "EarlyExit", "Stages"]

DEFAULT_EXITS = (0.0, 0.3, 0.5, 0.7, 0.9, 1.0)
REUSES = ("mlp", "linear", "none", "mlp+class", "mlp+uninformative")


class Stages(NamedTuple):
    """Logits of both stages, each [B, num_classes]."""

    coarse: Tensor
    fine: Tensor


class EarlyExit(NamedTuple):
    """What a batch gets under an exit threshold.

    logits  [B, num_classes]: the coarse stage's of images that exited, the fine stage's of the others.
    exited  bool [B].
    """

    logits: Tensor
    exited: Tensor


class _Plan(NamedTuple):
    """What a call asks for, checked.

    count      cells refined of every image.
    selection  the rule that chooses them.
    weights    of each block's class attention in the score; all 0 where the score isn't the model's own.
    scores     [B, C] given or drawn in place of the model's own, or None.
    positions  whether the fine grid has any.
    """

    count: int
    selection: str
    weights: tuple[float, ...]
    scores: Tensor | None
    positions: bool


class _Coarse(NamedTuple):
    """What the fine stage takes over from the coarse one. inputs, outputs [B, 1 + C, E]; scores [B, C], if any."""

    inputs: Tensor
    outputs: Tensor
    scores: Tensor | None

    def of(self, index: Tensor) -> _Coarse:
        """The same of some images of the batch."""
        return _Coarse(*(None if part is None else part.index_select(0, index) for part in self))


class CFViT(nn.Module):
    """A two-stage vision transformer with early exit; as `cfvit_small` 23.25 M parameters and 1.10 + 2.91 GMACs.

    `model(images)` gives the logits of the fine stage, `model(images, return_stages=True)` those of both, and
    `model(images, exit_threshold=0.75)` runs the fine stage on the images that the coarse one isn't sure of, as one
    smaller batch. Every image of a batch has the same number of tokens, so that without early exit all shapes are fixed.

    Where the paper is silent or its authors' code differs from it, this follows the code:

    - The coarse image is the whole image at half its size, bilinear with aligned corners, not each patch on its own.
    - The global class attention (Eq. 9) starts at zero before the fourth block, so that the blocks weigh nearly
      the same; begun with the fourth block's attention, as the equation suggests, that one would get 92 %.
    - Cells that aren't refined enter the fine stage as they entered the coarse one, with the coarse grid's positions.
    - A full split, the first phase of training, has no positions in the fine stage, where Eq. 11 adds them: they first
      join when cells are chosen. split_positions=True follows the equation.
    - Features are reused from the normalised output of the coarse stage, through a LayerNorm and the MLP.

    and it doesn't follow their code in that the position tables, as they intended, are kept from weight decay.

    Args:
        img_size: pixels a side; images are square. 224 gives 7 x 7 coarse cells, 288 gives 9 x 9 (the paper's CF-ViT*).
        patch_size: pixels a side of a patch, in both stages; img_size must divide by its double.
        embed_dim, depth, num_heads, mlp_ratio: of the transformer. mlp_ratio is that of the reuse MLP, too.
        num_classes: 0 makes the head an identity.
        in_chans: channels of the image.
        drop_path_rate: stochastic depth of the last block; it grows linearly from 0 at the first.
        keep: the share of the coarse cells that is refined (the paper's alpha, Table 6), rounded up; calls may give another.
        selection: which cells are (Table 4); calls may give another. "global": those of the highest global class attention,
            "negative": of the lowest, "last": of the highest class attention in the last block, "random": any.
        beta: decay of the global class attention (Eq. 9, Table 7).
        reuse: how the fine stage reuses features of the coarse one (Table 5): "mlp" for the refined cells, "linear" in
            place of the MLP, "none", "mlp+class" for the class token too, "mlp+uninformative" for all cells.
        split_positions: whether a full split has the fine grid's positions; after a warm start it should.

    Raises:
        ValueError: sizes that don't divide, keep outside [0, 1], beta outside [0, 1), an unknown selection or reuse.
    """

    SELECTIONS: tuple[str, ...] = ("global", "negative", "last", "random")
    WITHOUT_SCORES: tuple[str, ...] = ("last", "random")  # those that choose by nothing given
    RELEASE_NAME = "cfvit"
    RELEASE_CONFIG: tuple[str, ...] = ("num_heads",)

    two_stage = True  # trained by the losses of both stages
    own_prefix = "pos_fine"  # in state dicts of this model, and not in those of plain ViTs
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
        self.keep = _check_share(keep)
        self.selection = self._check_selection(selection)
        self.beta = beta
        self.num_classes = num_classes
        self.num_features = self.embed_dim = embed_dim

        cells = self.coarse_grid**2
        self.patch_embed = nn.Conv2d(in_chans, embed_dim, patch_size, stride=patch_size)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_coarse = nn.Parameter(torch.zeros(1, 1 + cells, embed_dim))
        self.pos_fine = nn.Parameter(torch.zeros(1, 1 + 4 * cells, embed_dim))
        norm = partial(nn.LayerNorm, eps=1e-6)
        rates = [drop_path_rate * i / max(depth - 1, 1) for i in range(depth)]
        self.blocks = nn.Sequential(
            *(Block(embed_dim, num_heads, mlp_ratio, qkv_bias=True, drop_path=r, norm_layer=norm) for r in rates)
        )
        self.norm = norm(embed_dim)
        self.head = nn.Linear(embed_dim, num_classes) if num_classes else nn.Identity()
        self.split_positions = split_positions
        self.reuse_kind = reuse
        self.reuse = None if reuse == "none" else _Reuse(embed_dim, mlp_ratio, reuse == "linear")

        for table in (self.cls_token, self.pos_coarse, self.pos_fine):
            trunc_normal_(table, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

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
        """Logits of every image.

        Args:
            images: [B, in_chans, img_size, img_size].
            scores: the importance of the cells, from somewhere else (a zoomer, stored maps), in place of the class
                attention: [B, n * n] by coarse cell, or [B, 4 * n * n] by patch, of which a cell takes its highest.
                Row-major and finite; no gradient flows into them.
            keep: the share of cells refined; None takes the model's.
            selection: which cells are; None takes the model's. With scores, "negative" takes the lowest-scored.
            full_split: the first phase of training (200 of 300 epochs in the paper): all cells are refined, and unless
                the model has split_positions the fine grid's positions take no part and have no gradient.
            return_stages: give the logits of both stages.
            exit_threshold: eta; images whose highest coarse probability reaches it keep the coarse logits, and the
                fine stage runs on the others alone. At 0 none goes on; at 1 all do, but those whose probability is 1
                to rounding.

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
        # The head runs on both whatever is returned: the cost is that of inference.
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
        """[B, embed_dim] -> logits [B, num_classes], or the features themselves with pre_logits."""
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
        if plan.count == chosen.shape[1]:
            return chosen
        order = self._order(self._coarse_stage(images, plan).scores, plan.selection)
        return chosen.scatter_(1, order[:, plan.count :], False)

    # How it is run

    @property
    def score_use(self) -> ScoreUse:
        return ScoreUse(grid=self.score_grid, has_own=True)

    def operating_points(self, requested: Requested) -> list[OperatingPoint]:
        """Thresholds of early exit; without any requested, DEFAULT_EXITS."""
        return points_of("exit", requested.get("exit", DEFAULT_EXITS), "exit_threshold", _check_exit)

    def cost_kinds(self, point: OperatingPoint, scores: Tensor | None, output: Any) -> Tensor | None:
        """1 for an image that exited, 0 for one that both stages saw. [B]"""
        return output.exited.long() if isinstance(output, EarlyExit) else None

    def cost(self, point: OperatingPoint, kind: int | None = None) -> ImageCost:
        """Tokens are those of both stages; of the coarse one alone for an image that exited."""
        coarse, fine = (length - 1 for length in self.lengths())
        if kind:
            return ImageCost(coarse, {"exit_threshold": 0.0}, exited=True)
        return ImageCost(coarse + fine, {"return_stages": True}, exited=False)

    def load_from_vit(self, vit: nn.Module | Mapping[str, Tensor]) -> WarmStart:
        """Start from a plain ViT or DeiT of the same width and depth, in place; see `warm_start.load_vit`.

        Both stages take the ViT's positions, resized to their grids, and its class position each. Where nothing is
        reused and all cells are refined, with positions, the fine stage's logits are those of the ViT.
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
        """The model that published weights belong to, in eval mode. See `release.load_release`.

        Raises:
            ValueError: weights that aren't those of a published model of this kind.
        """
        width, chans, patch, _ = weights.shape("patch_embed.proj.weight")
        model: CFViT = timm.create_model(
            f"{cls.__name__.lower()}_small",
            img_size=math.isqrt(weights.shape("pos_embed_list.1")[1] - 1) * patch,
            patch_size=patch,
            embed_dim=width,
            depth=weights.count(r"blocks\.(\d+)\."),
            num_heads=num_heads,
            num_classes=weights.shape("head.weight")[0],
            in_chans=chans,
            mlp_ratio=weights.shape("blocks.0.mlp.fc1.weight")[0] / width,
            **config,
        )
        weights.fill(model, _our_name)
        return model.eval()

    # Costs

    def lengths(self, keep: float | None = None, full_split: bool = False) -> tuple[int, int]:
        """Tokens of the coarse and of the fine stage, the class token counted: at 224 px 50 and 125 (Eq. 10), or 197."""
        cells = self.coarse_grid**2
        return 1 + cells, 1 + cells + 3 * (cells if full_split else self._count(keep))

    def macs(self, p_exit: float = 0.0, keep: float | None = None, full_split: bool = False) -> int:
        """Multiply-adds an image when a share p_exit of them exits early: the coarse stage, and the fine one of the rest.

        What runs, as torch's flop counter sees it: matrix products and convolutions, attention's two among them. Both
        stages embed all of their grid and reuse all cells' features, as the authors' do, whose figures these are; the
        source of given scores isn't in it. Raises ValueError for a share outside [0, 1].
        """
        if not 0 <= p_exit <= 1:
            raise ValueError(f"p_exit must lie in [0, 1], got {p_exit!r}")
        cells = self.coarse_grid**2
        patch, head = self.patch_embed.weight.numel(), self.head.weight.numel() if self.num_classes else 0
        coarse_length, fine_length = self.lengths(keep, full_split)
        coarse = cells * patch + self._blocks_macs(coarse_length) + head
        fine = 4 * cells * patch + self._blocks_macs(fine_length) + head
        if self.reuse is not None:
            fine += (cells + (self.reuse_kind == "mlp+class")) * self.reuse.macs
        return coarse + round((1 - p_exit) * fine)

    def _blocks_macs(self, length: int) -> int:
        total = 0
        for block in self.blocks:
            layers = (block.attn.qkv, block.attn.proj, block.mlp.fc1, block.mlp.fc2)
            total += length * sum(layer.weight.numel() for layer in layers) + 2 * length**2 * self.embed_dim
        return total

    # Choosing

    def _plan(
        self, images: Tensor, scores: Tensor | None, keep: float | None, selection: str | None, full_split: bool
    ) -> _Plan:
        chans, cells = self.patch_embed.in_channels, self.coarse_grid**2
        if images.ndim != 4 or tuple(images.shape[1:]) != (chans, self.img_size, self.img_size) or images.shape[0] == 0:
            raise ValueError(
                f"images must be [batch, {chans}, {self.img_size}, {self.img_size}], got {list(images.shape)}"
            )
        selection = self._check_selection(self.selection if selection is None else selection)
        count = self._count(keep)
        if scores is not None:
            if selection in self.WITHOUT_SCORES:
                raise ValueError(f"selection {selection!r} has no use for scores; leave them out")
            scores = self._by_cell(scores, images.shape[0])
        if full_split or count == cells:  # nothing to choose
            return _Plan(cells, selection, (0.0,) * len(self.blocks), None, self.split_positions or not full_split)
        weights = self._attention_weights(selection, scores is not None)
        if scores is None and not any(weights):
            scores = torch.rand(images.shape[0], cells, device=images.device)
        return _Plan(count, selection, weights, scores, True)

    def _by_cell(self, scores: Tensor, batch: int) -> Tensor:
        """Scores by coarse cell or by patch -> [B, C]."""
        cells = self.coarse_grid**2
        if scores.ndim != 2 or scores.shape[0] != batch or scores.shape[1] not in (cells, 4 * cells):
            raise ValueError(
                f"scores must be [{batch}, {cells}], by coarse cell, or [{batch}, {4 * cells}], by patch, "
                f"got {list(scores.shape)}"
            )
        if not torch.compiler.is_compiling() and not scores.isfinite().all():
            raise ValueError("scores must be finite, got NaN or infinity")
        scores = scores.detach().float()
        return scores if scores.shape[1] == cells else zoom_tokens.coarse_scores(scores, 0.5)

    def _check_selection(self, selection: str) -> str:
        if selection not in self.SELECTIONS:
            raise ValueError(f"selection must be one of {', '.join(self.SELECTIONS)}, got {selection!r}")
        return selection

    def _count(self, keep: float | None) -> int:
        """Cells refined of an image."""
        return share_of(self.coarse_grid**2, self.keep if keep is None else keep)

    def _attention_weights(self, selection: str, scores_given: bool) -> tuple[float, ...]:
        """The weight of each block's class attention in the score (Eq. 9, unrolled); 0 where it isn't read."""
        depth = len(self.blocks)
        if scores_given or selection == "random":
            return (0.0,) * depth
        return attention_weights(depth, 0.0 if selection == "last" else self.beta)

    def _order(self, scores: Tensor, selection: str) -> Tensor:
        """scores [B, C] -> int64 [B, C], the cells in the order in which they are refined."""
        return zoom_tokens.stable_argsort(scores, descending=selection != "negative")

    # The two stages

    def _coarse_stage(self, images: Tensor, plan: _Plan) -> _Coarse:
        half = F.interpolate(images, size=(self.img_size // 2,) * 2, mode="bilinear", align_corners=True)
        x = self.patch_embed(half).flatten(2).transpose(1, 2)  # [B, C, E]
        inputs = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1) + self.pos_coarse  # [B, 1 + C, E]
        x, scores = inputs, plan.scores
        for block, weight in zip(self.blocks, plan.weights, strict=True):
            if not weight:
                x = block(x)
                continue
            x, attention = _with_class_attention(block, x)
            scores = weight * attention if scores is None else scores + weight * attention
        return _Coarse(inputs, self.norm(x), scores)

    def _fine_stage(self, images: Tensor, coarse: _Coarse, plan: _Plan) -> Tensor:
        """The normalised class token, [B, E]."""
        n, width = self.coarse_grid, self.embed_dim
        grid = self.patch_embed(images).unflatten(3, (n, 2)).unflatten(2, (n, 2))  # [B, E, n, 2, n, 2]
        fine = grid.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)  # [B, C, 4 E], the patches of each cell together
        pos_fine = self.pos_fine if plan.positions else torch.zeros_like(self.pos_fine)
        pos = pos_fine[0, 1:].view(n, 2, n, 2, width).transpose(1, 2).reshape(n * n, 4 * width)
        cls = (self.cls_token + pos_fine[:, :1]).expand(fine.shape[0], -1, -1)
        rest = coarse.inputs[:, 1:]  # [B, C, E]
        reused = None
        if self.reuse_kind == "mlp+class":
            reused = self.reuse(coarse.outputs)
            cls, reused = cls + reused[:, :1], reused[:, 1:]
        elif self.reuse is not None:
            reused = self.reuse(coarse.outputs[:, 1:])  # [B, C, E]
        if self.reuse_kind == "mlp+uninformative":
            rest = rest + reused

        if plan.count == n * n:
            fine = (fine + pos).unflatten(2, (4, width))  # [B, C, 4, E]
            if reused is not None:
                fine = fine + reused[:, :, None]
            parts = [cls, fine.flatten(1, 2)]
        else:
            order = self._order(coarse.scores, plan.selection)
            chosen, others = order[:, : plan.count], order[:, plan.count :]
            parts = [cls]
            if plan.count:
                fine = _take(fine, chosen) + pos.index_select(0, chosen.flatten()).unflatten(0, chosen.shape)
                fine = fine.unflatten(2, (4, width))  # [B, K, 4, E]
                if reused is not None:
                    fine = fine + _take(reused, chosen)[:, :, None]
                parts.append(fine.flatten(1, 2))
            parts.append(_take(rest, others))
        tokens = torch.cat(parts, dim=1)  # [B, 1 + 4 K + (C - K), E]
        return self.norm(self.blocks(tokens)[:, 0])

    def _exit_early(self, images: Tensor, plan: _Plan, threshold: float) -> EarlyExit:
        coarse = self._coarse_stage(images, plan)
        logits = self.head(coarse.outputs[:, 0])
        exited = logits.float().softmax(dim=1).amax(dim=1) >= threshold
        stay = (~exited).nonzero()[:, 0]
        if stay.shape[0]:
            fine = self.head(self._fine_stage(images[stay], coarse.of(stay), plan))
            logits = logits.index_copy(0, stay, fine)
        return EarlyExit(logits, exited)

    # What timm's optimizers and fine-tuning tools ask of a model.

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Parameters that weight decay leaves alone, besides the one-dimensional ones."""
        return {"cls_token", "pos_coarse", "pos_fine"}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Which parameters belong to which layer, for layer-wise learning rates; reuse feeds the first block."""
        return {
            "stem": r"^cls_token|^pos_|^patch_embed|^reuse",
            "blocks": [(r"^blocks\.(\d+)", None), (r"^norm", (99999,))],
        }

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


class _Reuse(nn.Module):
    """What the fine stage adds to a cell's patches: its coarse features through an MLP (Fig. 4). [..., E] -> [..., E]."""

    def __init__(self, width: int, mlp_ratio: float, linear: bool) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.mlp = nn.Linear(width, width) if linear else Mlp(width, int(width * mlp_ratio))

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(self.norm(x))

    @property
    def macs(self) -> int:
        """Multiply-adds a token."""
        return sum(layer.weight.numel() for layer in self.modules() if isinstance(layer, nn.Linear))


_RELEASED_NAMES = {
    "patch_embed.proj.": "patch_embed.",
    "pos_embed_list.0": "pos_coarse",
    "pos_embed_list.1": "pos_fine",
    "reuse_block.0.": "reuse.norm.",
    "reuse_block.1.": "reuse.mlp.",
}


def _our_name(theirs: str) -> str:
    prefix = next((prefix for prefix in _RELEASED_NAMES if theirs.startswith(prefix)), "")
    return _RELEASED_NAMES.get(prefix, "") + theirs.removeprefix(prefix)


def _check_exit(threshold: float) -> float:
    if not 0.0 <= threshold <= 1.0:
        raise ValueError("a threshold of early exit lies in [0, 1]")
    return threshold


def share_of(cells: int, share: float) -> int:
    """That share of the cells, rounded up. Raises ValueError outside [0, 1]."""
    return math.ceil(_check_share(share) * cells - 1e-9)  # 0.07 * 100 comes out a hair above 7


def _check_share(share: float) -> float:
    if not 0 <= share <= 1:
        raise ValueError(f"keep must lie in [0, 1], got {share!r}")
    return share


def attention_weights(depth: int, beta: float) -> tuple[float, ...]:
    """Eq. 9 from zero, unrolled: the weight of each block's class attention. The first three blocks have none."""
    first = min(3, depth - 1)
    return tuple((1 - beta) * beta ** (depth - 1 - block) if block >= first else 0.0 for block in range(depth))


def _with_class_attention(block: Block, x: Tensor) -> tuple[Tensor, Tensor]:
    """A block of timm, and what its class token attends to: x [B, N, E] -> the output, [B, N - 1] float32, mean over heads.

    The class token's row of attention is written out, the others stay fused: nothing is computed twice.
    """
    attn = block.attn
    qkv = attn.qkv(block.norm1(x)).unflatten(2, (3, attn.num_heads, attn.head_dim))  # [B, N, 3, H, D]
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # [B, H, N, D] each
    row = ((q[:, :, :1] * attn.scale) @ k.transpose(2, 3)).softmax(dim=3)  # [B, H, 1, N]
    others = F.scaled_dot_product_attention(q[:, :, 1:], k, v)  # [B, H, N - 1, D]
    mixed = torch.cat([(row.to(v.dtype) @ v).transpose(1, 2), others.transpose(1, 2)], dim=1).flatten(2)  # [B, N, E]
    x = x + block.drop_path1(attn.proj(mixed))
    x = x + block.drop_path2(block.mlp(block.norm2(x)))
    return x, row.detach().float().mean(dim=1)[:, 0, 1:]


def _take(rows: Tensor, index: Tensor) -> Tensor:
    """Of each image the rows named: rows [B, C, W], index int64 [B, K] -> [B, K, W]."""
    first = torch.arange(rows.shape[0], device=index.device)[:, None] * rows.shape[1]
    return rows.flatten(0, 1).index_select(0, (first + index).flatten()).unflatten(0, (-1, index.shape[1]))


default_cfgs = untrained_cfgs("cfvit_tiny", "cfvit_small")


@register_model
def cfvit_tiny(pretrained: bool = False, **kwargs: Any) -> CFViT:
    """CF-ViT on DeiT-Ti. Takes the arguments of `CFViT`."""
    defaults = {"patch_size": 16, "embed_dim": 192, "depth": 12, "num_heads": 3}
    return build(CFViT, "cfvit_tiny", pretrained, defaults, kwargs)


@register_model
def cfvit_small(pretrained: bool = False, **kwargs: Any) -> CFViT:
    """CF-ViT on DeiT-S, the paper's main model. Takes the arguments of `CFViT`."""
    defaults = {"patch_size": 16, "embed_dim": 384, "depth": 12, "num_heads": 6}
    return build(CFViT, "cfvit_small", pretrained, defaults, kwargs)
