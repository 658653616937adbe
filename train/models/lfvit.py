"""LF-ViT (Hu et al., AAAI 2024): CF-ViT whose refined cells all lie in one square region, the most attended one.

Importing this module registers lfvit_tiny and lfvit_small with timm.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from timm.models import register_model
from torch import Tensor

from zpipe.train.models import zoom_tokens
from zpipe.train.models.backbone import DEIT_SMALL, DEIT_TINY, build, untrained_cfgs
from zpipe.train.models.cfvit import CFViT
from zpipe.train.models.cfvit_stages import attention_weights, share_of

__all__ = ["LFViT"]


class LFViT(CFViT):
    """A two-stage vision transformer that focuses on one region; as `lfvit_small` 1.10 + 2.70 GMACs.

    Everything but the choice of cells is as in `CFViT`, including its notes on paper and code. The scores are summed
    over every window of region_size x region_size coarse cells (Eq. 9); in the best window (Eq. 10) the highest-scored
    cells are refined, as many as `keep` of its area. Where the authors' code differs from the paper, this follows the
    code:

    - Cells that aren't refined enter the focus stage as they entered the localization stage; in the paper's text their
      features are reused.
    - A confidence equal to the threshold exits; the paper writes p > eta in one place, and that p < eta continues in
      another.

    It differs from their code in one point: any region fits any image size; at 288 px theirs is fixed at 5, while the
    paper says 8.

    Args:
        args: as of `CFViT`.
        region_size: coarse cells a side of the region (the paper's m; Table 2). It may be changed on the model.
        keep: the share of the region's cells to refine (the paper's alpha, Table 5), rounded up.
        selection: which region to choose (Table 6): "region" with the highest sum, "negative" with the lowest,
            "maximum" around the highest-scored cell, "minimum" around the lowest-scored one, both moved to lie within
            the image, or "random". In each of them the highest-scored cells are refined. The paper doesn't say where in
            the region the highest- or lowest-scored cell lies.
        kwargs: as of `CFViT`.

    Raises:
        ValueError: as of `CFViT`; a region that doesn't fit the grid of coarse cells.
    """

    SELECTIONS = ("region", "negative", "maximum", "minimum", "random")
    WITHOUT_SCORES = ()
    RELEASE_NAME = "lfvit"
    RELEASE_CONFIG = ("num_heads", "region_size")

    def __init__(
        self, *args: Any, region_size: int = 5, keep: float = 0.88, selection: str = "region", **kwargs: Any
    ) -> None:
        super().__init__(*args, keep=keep, selection=selection, **kwargs)
        self.region_size = region_size
        self._count(keep)  # checks the region

    def _count(self, keep: float | None) -> int:
        size = self.region_size
        if not 1 <= size <= self.coarse_grid:
            raise ValueError(
                f"region_size must lie between 1 and the {self.coarse_grid} coarse cells a side, got {size!r}"
            )
        return share_of(size**2, self.keep if keep is None else keep)

    def _attention_weights(self, selection: str, has_scores: bool) -> tuple[float, ...]:
        # A random region still needs scores, to choose its cells.
        depth = len(self.blocks)
        return (0.0,) * depth if has_scores else attention_weights(depth, self.beta)

    def _rank(self, scores: Tensor, selection: str) -> Tensor:
        row, column = region_corner(scores, self.region_size, selection)  # [B, 1] each
        place = torch.arange(self.coarse_grid, device=scores.device)
        inside = [(place >= first) & (place < first + self.region_size) for first in (row, column)]  # [B, n] each
        region = (inside[0][:, :, None] & inside[1][:, None]).flatten(1)  # [B, C]
        return zoom_tokens.stable_argsort(scores.masked_fill(~region, -torch.inf), descending=True)


def region_corner(scores: Tensor, size: int, selection: str = "region") -> tuple[Tensor, Tensor]:
    """The upper left cell of each image's region.

    Args:
        scores: [B, n * n].
        size: cells a side of the region.
        selection: as of `LFViT`; of equal regions the first in row-major order is taken.

    Returns:
        Row and column, int64 [B, 1] each.
    """
    side = math.isqrt(scores.shape[1])
    places = side - size + 1  # of a region, along each side
    if selection == "random":
        corner = torch.rand(scores.shape[0], places**2, device=scores.device).argmax(dim=1, keepdim=True)
    elif selection in ("region", "negative"):
        mean = F.avg_pool2d(scores.view(-1, 1, side, side), size, stride=1).flatten(1)  # [B, places * places]
        corner = (mean if selection == "region" else -mean).argmax(dim=1, keepdim=True)
    else:
        cell = (scores if selection == "maximum" else -scores).argmax(dim=1, keepdim=True)  # [B, 1]
        row, column = cell // side - size // 2, cell % side - size // 2
        return row.clamp(0, places - 1), column.clamp(0, places - 1)
    return corner // places, corner % places


default_cfgs = untrained_cfgs("lfvit_tiny", "lfvit_small")


@register_model
def lfvit_tiny(pretrained: bool = False, **kwargs: Any) -> LFViT:
    """LF-ViT on DeiT-Ti. Takes the arguments of `LFViT`."""
    return build(LFViT, "lfvit_tiny", pretrained, DEIT_TINY, kwargs)


@register_model
def lfvit_small(pretrained: bool = False, **kwargs: Any) -> LFViT:
    """LF-ViT on DeiT-S, the paper's main model. Takes the arguments of `LFViT`."""
    return build(LFViT, "lfvit_small", pretrained, DEIT_SMALL, kwargs)
