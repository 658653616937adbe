"""LF-ViT (Hu et al., AAAI 2024): CF-ViT whose refined cells all lie in one square region, the one most attended to.

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
from zpipe.train.models.backbone import build, untrained_cfgs
from zpipe.train.models.cfvit import CFViT, attention_weights, share_of

__all__ = ["LFViT"]


class LFViT(CFViT):
    """A two-stage vision transformer that focuses on one region; as `lfvit_small` 1.10 + 2.70 GMACs.

    Everything but the choice of cells is as in `CFViT`, its notes on paper and code included. The score is summed over every
    window of region_size x region_size coarse cells (Eq. 9); in the best window (Eq. 10) the highest-scored cells are
    refined, as many as `keep` of its area. Where the authors' code differs from the paper, this follows the code:

    - Cells that aren't refined enter the focus stage as they entered the localization stage; the paper's text has its features
      reused for them.
    - Confidence that equals the threshold exits; the paper writes p > eta in one place and p < eta goes on in another.

    and it doesn't follow their code in that any region fits any image size: at 288 px theirs is fixed at 5, the paper
    says 8.

    Args:
        region_size: coarse cells a side of the region (the paper's m; Table 2). It may be changed on the model.
        keep: the share of the region's cells that is refined (the paper's alpha, Table 5), rounded up.
        selection: which region it is (Table 6): "region" of the highest sum, "negative" of the lowest, "maximum" around the
            highest-scored cell, "minimum" around the lowest-scored, moved where it would leave the image, "random"
            anywhere. In each of them the highest-scored cells are refined. The paper doesn't say where in the region
            the highest- or lowest-scored cell lies.
        Others as of `CFViT`.

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

    def _attention_weights(self, selection: str, scores_given: bool) -> tuple[float, ...]:
        # A region at random still needs scores to choose its cells by.
        depth = len(self.blocks)
        return (0.0,) * depth if scores_given else attention_weights(depth, self.beta)

    def _order(self, scores: Tensor, selection: str) -> Tensor:
        row, column = region_corner(scores, self.region_size, selection)  # [B, 1] each
        place = torch.arange(self.coarse_grid, device=scores.device)
        inside = [(place >= first) & (place < first + self.region_size) for first in (row, column)]  # [B, n] each
        region = (inside[0][:, :, None] & inside[1][:, None]).flatten(1)  # [B, C]
        return zoom_tokens.stable_argsort(scores.masked_fill(~region, -torch.inf), descending=True)


def region_corner(scores: Tensor, size: int, selection: str = "region") -> tuple[Tensor, Tensor]:
    """The upper left cell of each image's region: scores [B, n * n] -> row and column, int64 [B, 1].

    Selections as of `LFViT`; of equal regions the first, row by row.
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
        centred = (cell // side - size // 2, cell % side - size // 2)
        return tuple(first.clamp(0, places - 1) for first in centred)
    return corner // places, corner % places


default_cfgs = untrained_cfgs("lfvit_tiny", "lfvit_small")


@register_model
def lfvit_tiny(pretrained: bool = False, **kwargs: Any) -> LFViT:
    """LF-ViT on DeiT-Ti. Takes the arguments of `LFViT`."""
    defaults = {"patch_size": 16, "embed_dim": 192, "depth": 12, "num_heads": 3}
    return build(LFViT, "lfvit_tiny", pretrained, defaults, kwargs)


@register_model
def lfvit_small(pretrained: bool = False, **kwargs: Any) -> LFViT:
    """LF-ViT on DeiT-S, the paper's main model. Takes the arguments of `LFViT`."""
    defaults = {"patch_size": 16, "embed_dim": 384, "depth": 12, "num_heads": 6}
    return build(LFViT, "lfvit_small", pretrained, defaults, kwargs)
