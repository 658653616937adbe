"""Score-fused patches for backbones that need a regular grid (ZoomViT, appendix G).

Swin's windows and LV-ViT's token labels need one token per cell. So a zoomed cell is cut into 2 x 2 half-size patches,
each is embedded by the backbone's own kernel, and the four are fused into one token by a score-weighted mean (Eq. 13).
The number of tokens stays the backbone's.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from timm.models import register_model
from torch import Tensor, nn

from zpipe.train.models import zoom_tokens
from zpipe.train.models.backbone import WrappedModel, build_wrapped, create_backbone, square_side, untrained_cfgs
from zpipe.train.models.operating_points import OperatingPoint, Requested, ScoreUse, zoom_points


def fuse(quarters: Tensor, scores: Tensor) -> Tensor:
    """Eq. 13: the mean of each 2 x 2 group, weighted by scores; the plain mean where all four scores are 0.

    Args:
        quarters: [B, E, 2g, 2g].
        scores: [B, 2g, 2g], >= 0.

    Returns:
        [B, E, g, g].
    """
    weight = scores[:, None].float()  # [B, 1, 2g, 2g]; float32, since scores may be tiny
    mean = F.avg_pool2d(weight, 2).repeat_interleave(2, dim=-2).repeat_interleave(2, dim=-1)
    share = torch.where(mean > 0, weight / mean, 1.0)  # 4 s_i / sum of s_j
    return F.avg_pool2d(quarters * share.to(quarters.dtype), 2)


class FusedViT(WrappedModel):
    """A timm model whose patches are score-fused where the scores are high.

    `model(images, scores, alpha=...)` or `budget=`, as of `ZoomViT`; with scores=None, or with nothing zoomed, it is
    the backbone. Every cell of the backbone's grid belongs to the score cell that its centre lies in. The four quarters
    of a zoomed cell are weighted by the score map read at their centres (bilinear), since within one score cell the
    paper's weights would all be equal.

    Both embeddings are computed for the whole image, which costs twice the backbone's patch embedding: little, and
    regular.

    Args:
        backbone: a timm model (or its name) whose patches come from a convolution as large as its stride, even, without
            padding, such as ViT, DeiT, Swin and `lvvit_small`. Its state dict is under `backbone.`.
        img_size: pixels a side; images are square.
        patch_size: pixels a side of a score cell; the zoomer's grid is img_size / patch_size.
        num_classes: number of classes of a backbone given by name.
        in_chans: channels of its images.
        backbone_args: its further keyword arguments.

    Raises:
        ValueError: a backbone without such a convolution, or sizes that don't divide.
    """

    setting_names = ("alpha", "budget")

    def __init__(
        self,
        backbone: str | nn.Module = "swin_tiny_patch4_window7_224",
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        num_classes: int = 1000,
        in_chans: int = 3,
        backbone_args: dict[str, Any] | None = None,
    ) -> None:
        img_size = square_side(img_size)
        if isinstance(backbone, str):
            backbone = create_backbone(backbone, img_size, num_classes, in_chans, backbone_args)
        super().__init__(backbone)
        self.img_size, self.patch_size = img_size, patch_size
        projection = _projection(backbone)
        if img_size % patch_size:
            raise ValueError(f"image size {img_size} doesn't divide into score cells of {patch_size} pixels")
        self.score_grid = self.coarse_grid = img_size // patch_size
        self._zoom: tuple[Tensor, Tensor] | None = None  # scores and zoomed cells, during a forward pass
        projection.register_forward_hook(self._embed)

    def forward(
        self,
        images: Tensor,
        scores: Tensor | None = None,
        alpha: float | None = None,
        budget: int | None = None,
        **backbone_args: Any,
    ) -> Any:
        """Run the backbone on fused patches.

        Args:
            images: [B, in_chans, img_size, img_size].
            scores: [B, s * s], s = img_size / patch_size, row-major; None zooms nothing.
            alpha: as of `ZoomViT.forward`.
            budget: a number of score cells to zoom, instead of those above alpha.
            **backbone_args: further arguments of the backbone's forward pass.

        Returns:
            What the backbone returns.

        Raises:
            ValueError: as of `ZoomViT.forward`.
        """
        if alpha is not None:
            zoom_tokens.check_alpha(alpha)
        if tuple(images.shape[2:]) != (self.img_size, self.img_size):
            raise ValueError(
                f"images must be [batch, chans, {self.img_size}, {self.img_size}], got {list(images.shape)}"
            )
        if scores is None:
            if budget is not None:
                raise ValueError("budget needs scores to choose by, got scores=None")
            return self.backbone(images, **backbone_args)
        count = None if budget is None else self.resolve_budget(budget)
        zoomed = zoom_tokens.choose_cells(scores, len(images), self.score_grid, alpha, count)
        side = self.score_grid
        self._zoom = (scores.detach().reshape(-1, 1, side, side), zoomed.reshape(-1, 1, side, side))
        try:
            return self.backbone(images, **backbone_args)
        finally:
            self._zoom = None

    def _embed(self, projection: nn.Conv2d, inputs: tuple[Tensor], coarse: Tensor) -> Tensor:
        """Hook of the patch convolution: its output [B, E, g, g], with fused tokens in the zoomed cells."""
        if self._zoom is None:
            return coarse
        scores, zoomed = self._zoom
        kernel = zoom_tokens.half_kernel(projection.weight)
        quarters = F.conv2d(inputs[0], kernel, projection.bias, stride=kernel.shape[-1])  # [B, E, 2g, 2g]
        read = F.interpolate(scores.float(), quarters.shape[-2:], mode="bilinear", align_corners=False)[:, 0]
        mask = F.interpolate(zoomed.float(), coarse.shape[-2:], mode="nearest-exact") > 0
        return torch.where(mask, fuse(quarters, read), coarse)

    def token_counts(self, scores: Tensor, alpha: float | None = None, budget: int | None = None) -> Tensor:
        """The backbone's number of patches for each image, int64 [B], whatever is zoomed. Errors as in `forward`."""
        zoom_tokens.choose_cells(scores, len(scores), self.score_grid, alpha, budget)
        return torch.full((len(scores),), self.backbone.patch_embed.num_patches, device=scores.device)

    @property
    def score_use(self) -> ScoreUse:
        """How scores guide the model."""
        return ScoreUse(grid=self.score_grid, zooms=True)

    @property
    def dense_head(self) -> bool:
        """Whether the backbone learns token labels."""
        return bool(getattr(self.backbone, "dense_head", False))

    def operating_points(self, requested: Requested) -> list[OperatingPoint]:
        """Thresholds and budgets, as of `ZoomViT`; the cost is the same for all."""
        return zoom_points(requested, self.resolve_budget)

    def cost_kinds(self, point: OperatingPoint, scores: Tensor | None, output: Any) -> Tensor | None:
        """0 for every image with scores, int64 [B]: results state the number of tokens of a model that zooms."""
        return None if scores is None else torch.zeros(len(scores), dtype=torch.int64)

    def resolve_budget(self, budget: int | str) -> int:
        """A number of score cells.

        Raises:
            ValueError: anything but a number in 0 .. s * s.
        """
        cells = self.score_grid**2
        if isinstance(budget, str) or not 0 <= budget <= cells:
            raise ValueError(f"budget must lie between 0 and the {cells} score cells, got {budget!r}")
        return budget


def _projection(backbone: nn.Module) -> nn.Conv2d:
    """The convolution that makes the backbone's patches."""
    projection = getattr(getattr(backbone, "patch_embed", None), "proj", None)
    if isinstance(projection, nn.Conv2d):
        side = projection.kernel_size[0]
        like_patches = projection.kernel_size == projection.stride == (side, side) and projection.padding == (0, 0)
        if like_patches and side % 2 == 0 and projection.groups == 1:
            return projection
    raise ValueError(
        f"{type(backbone).__name__} has no patch_embed.proj that cuts the image into even square patches; "
        "score fusion needs a regular grid, such as a ViT's or Swin's"
    )


default_cfgs = untrained_cfgs("fused_vit")


@register_model
def fused_vit(pretrained: bool = False, **kwargs: Any) -> FusedViT:
    """`FusedViT`, on Swin-T unless `backbone` names another timm model. Takes its arguments."""
    return build_wrapped(FusedViT, "fused_vit", pretrained, **kwargs)
