"""The ZoomViT that its authors released: evaluation code and weights, whose tokens differ from the paper.

These differences are kept, so that published weights give published numbers. Importing this module registers
zoomvit_released.
"""

from __future__ import annotations

import re
from typing import Any, cast

import timm
import torch
from timm.models import register_model
from torch import Tensor

from zpipe.train.models import zoom_tokens
from zpipe.train.models.backbone import DEIT_SMALL, build, untrained_cfgs
from zpipe.train.models.operating_points import (
    ImageCost,
    OperatingPoint,
    Requested,
    ScoreUse,
    zoom_points,
)
from zpipe.train.models.packing import packing
from zpipe.train.models.released_weights import ReleasedWeights
from zpipe.train.models.zoom_tokens import Zoom
from zpipe.train.models.zoomer import Zoomer
from zpipe.train.models.zoomvit import Tokens, ZoomViT

_ZOOMER = "Importance_Score.model."


class ReleasedZoomViT(ZoomViT):
    """The ZoomViT of the authors' public code: DeiT-III blocks, 1-D sine-cosine positions, fixed zoom factor embedding.

    Its tokens differ from those of `ZoomViT`:

    - A zero vector follows the fine tokens and another the coarse ones, and both take part in attention.
    - Fine tokens are those whose own place scores above alpha. At zoom factor 0.5 a cell is split if any of its four
      places does, and its other places are then not covered by any token.
    - Cells that score exactly alpha are not covered either.

    The authors' batches pad shorter images with more zero vectors, so their logits depend on the batch; here every
    image is computed as their code computes it alone. Images are normalised with ImageNet's mean and standard
    deviation.

    Args:
        args: as of `ZoomViT`.
        alpha: the threshold, which the authors fix at construction (Small .01, Tiny .03); calls may give another.
        init_values: initial value of LayerScale.
        kwargs: as of `ZoomViT`.
    """

    RELEASE_NAME = "ZoomViT"
    RELEASE_CONFIG = ("num_heads", "zoom_factor", "alpha")
    setting_names = ("alpha",)

    def __init__(self, *args: Any, alpha: float, init_values: float | None = 1e-4, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs, init_values=init_values, pos="sincos-1d", zfe="fixed")
        self.alpha = zoom_tokens.check_alpha(alpha)

    def forward_features(
        self,
        images: Tensor,
        scores: Tensor | None = None,
        alpha: float | None = None,
        keep_tokens: int | None = None,
        budget: int | str | None = None,
        prune: str = "backward",
    ) -> Tensor:
        """As of `ZoomViT`, but only under the threshold: keep_tokens and budget raise ValueError."""
        return self._run_packed(self.tokenise(images, scores, alpha, keep_tokens, budget, prune))

    def tokenise(
        self,
        images: Tensor,
        scores: Tensor | None = None,
        alpha: float | None = None,
        keep_tokens: int | None = None,
        budget: int | str | None = None,
        prune: str = "backward",
    ) -> Tokens:
        """As of `ZoomViT`; the two zero vectors have id -1."""
        if keep_tokens is not None or budget is not None:
            raise ValueError("the released ZoomViT works by threshold: give no keep_tokens and no budget")
        alpha = self.alpha if alpha is None else alpha
        if scores is None:  # all cells are below the threshold
            scores, alpha = images.new_zeros(len(images), self.score_grid**2), 1.0
        self._choose_for(images, scores, Zoom(alpha, prune=prune))  # checks the arguments
        cell_scores = zoom_tokens.coarse_scores(scores, self.zoom_factor)
        place_scores = zoom_tokens.fine_scores(scores, self.zoom_factor)
        fine_patches, fine_kernel, coarse_patches, coarse_kernel = zoom_tokens.patches_and_kernels(
            images, self.patch_embed.weight, self.zoom_factor
        )
        bias = cast(Tensor, self.patch_embed.bias)
        sequences, ids = [], []
        for b in range(len(images)):
            fine = (place_scores[b] > alpha).nonzero()[:, 0]
            coarse = (cell_scores[b] < alpha).nonzero()[:, 0]
            # The 1 is the fixed zoom factor embedding.
            fine_tokens = fine_patches[b, fine] @ fine_kernel.T + bias + self.pos_fine[0, fine] + 1
            coarse_tokens = coarse_patches[b, coarse] @ coarse_kernel.T + bias + self.pos_coarse[0, coarse]
            zero, cls = images.new_zeros(1, self.embed_dim), (self.cls_token + self.pos_cls)[0]
            sequences.append(torch.cat([cls, fine_tokens, zero, coarse_tokens, zero]))
            gap, last = fine.new_tensor([-1]), fine.new_tensor([5 * self.coarse_grid**2])
            ids.append(torch.cat([last, fine, gap, coarse + self.pos_fine.shape[1], gap]))
        by_length = sorted(range(len(images)), key=lambda b: len(ids[b]))
        lengths = [len(ids[b]) for b in by_length]
        return Tokens(
            tokens=torch.cat([sequences[b] for b in by_length]),
            ids=torch.cat([ids[b] for b in by_length]),
            packed=packing(torch.tensor(lengths, device=images.device), lengths),
            index=torch.tensor(by_length, device=images.device),
        )

    def token_counts(
        self,
        scores: Tensor,
        alpha: float | None = None,
        keep_tokens: int | None = None,
        budget: int | str | None = None,
        prune: str = "backward",
    ) -> Tensor:
        """As of `ZoomViT`, including the two zero vectors."""
        if keep_tokens is not None or budget is not None:
            raise ValueError("the released ZoomViT works by threshold: give no keep_tokens and no budget")
        fine, coarse = self._present(scores, alpha)
        return fine.sum(1) + coarse.sum(1) + 2

    def _present(self, scores: Tensor, alpha: float | None) -> tuple[Tensor, Tensor]:
        """Which fine and which coarse tokens images have, bool [B, 4C] and [B, C]."""
        alpha = self.alpha if alpha is None else zoom_tokens.check_alpha(alpha)
        fine = zoom_tokens.fine_scores(scores, self.zoom_factor) > alpha
        return fine, zoom_tokens.coarse_scores(scores, self.zoom_factor) < alpha

    def macs(self, zoomed: int, keep_tokens: int | None = None) -> int:
        """Raise ValueError: the length of a sequence depends on more than the number of zoomed cells."""
        raise ValueError("what the released ZoomViT costs depends on the scores; count it by train.macs.count_macs")

    def operating_points(self, requested: Requested) -> list[OperatingPoint]:
        """A point for each threshold."""
        return zoom_points(requested, self.resolve_budget)

    def cost_kinds(self, point: OperatingPoint, scores: Tensor | None, output: Any) -> Tensor | None:
        """The number of fine tokens times C + 1, plus that of coarse tokens, of each image, int64 [B]."""
        if scores is None:
            return None
        fine, coarse = self._present(scores, point.arguments.get("alpha"))
        return fine.sum(1) * (self.coarse_grid**2 + 1) + coarse.sum(1)

    def cost(self, point: OperatingPoint, kind: int | None = None) -> ImageCost:
        """The cost of an image of a kind; its tokens include the two zero vectors."""
        c, alpha = self.coarse_grid, 0.5
        if kind is None:  # without scores
            return ImageCost(c * c + 2, {})
        fine, coarse = divmod(kind, c * c + 1)
        # Scores that make as many tokens: the first places are above the threshold and the last cells below it.
        cells = torch.full((c * c, 4), alpha, device=self.cls_token.device)
        cells.view(-1)[:fine] = 1.0
        cells[c * c - coarse :] = 0.0
        scores = cells[:, 0] if self.zoom_factor == 2.0 else cells.view(c, c, 2, 2).transpose(1, 2)
        return ImageCost(fine + coarse + 2, {"scores": scores.reshape(1, -1), "alpha": alpha})

    @property
    def score_use(self) -> ScoreUse:
        """How scores guide the model."""
        return ScoreUse(grid=self.score_grid, zooms=True)

    @classmethod
    def load_release(
        cls, weights: ReleasedWeights, num_heads: int, zoom_factor: float, alpha: float
    ) -> tuple[ReleasedZoomViT, Zoomer]:
        """Build the model and its frozen zoomer, both in eval mode; see `release.load_release`.

        Raises:
            ValueError: weights of anything but a published ZoomViT.
        """
        of_zoomer, of_vit = weights.part(_ZOOMER), weights.part(_ZOOMER, inside=False)
        width, chans, patch, _ = of_vit.shape("patch_embed.proj.weight")
        grid = int(of_zoomer.shape("project.bias")[0] ** 0.5)
        stages = of_zoomer.count(r"features\.(\d+)\.\d+\.conv1") - 4
        zoomer = Zoomer(2 * stages, grid, width=of_zoomer.shape("features.0.weight")[0], in_chans=chans)
        vit: ReleasedZoomViT = timm.create_model(
            "zoomvit_released",
            img_size=grid * patch,
            patch_size=patch,
            embed_dim=width,
            depth=of_vit.count(r"blocks\.(\d+)\."),
            num_heads=num_heads,
            num_classes=of_vit.shape("head.weight")[0],
            in_chans=chans,
            mlp_ratio=of_vit.shape("blocks.0.mlp.fc1.weight")[0] / width,
            zoom_factor=zoom_factor,
            alpha=alpha,
        )
        of_zoomer.fill(zoomer, _our_zoomer_name)
        of_vit.fill(vit, _our_name)
        return vit.eval(), zoomer.freeze()


def _our_name(theirs: str) -> str:
    ours = re.sub(r"^(blocks\.\d+)\.gamma_([12])$", r"\1.ls\2.gamma", theirs)
    return ours.replace("patch_embed.proj.", "patch_embed.")


def _our_zoomer_name(theirs: str) -> str:
    """Their `features` has conv, bn, relu, pool, then stages of two blocks; ours has the blocks one after another."""
    if match := re.match(r"features\.(\d+)\.([01])\.(.*)", theirs):
        return f"trunk.{4 + 2 * (int(match[1]) - 4) + int(match[2])}.{match[3]}"
    return theirs.replace("features.", "trunk.").replace("new_fc.0.", "reduce.")


default_cfgs = untrained_cfgs("zoomvit_released")


@register_model
def zoomvit_released(pretrained: bool = False, **kwargs: Any) -> ReleasedZoomViT:
    """`ReleasedZoomViT` as DeiT-III-S. Takes its arguments; alpha is .01 unless given."""
    return build(ReleasedZoomViT, "zoomvit_released", pretrained, DEIT_SMALL | {"alpha": 0.01}, kwargs)
