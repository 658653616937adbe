"""Zoom on the level of the image: crop the box around the important cells, enlarge it, and classify again.

This is the other mechanism of the small study (see `token_pruned_vit`), for any timm classifier: it changes no token,
and costs a whole pass. It is a control for ZoomViT, which gets its finer view for a few more tokens.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from timm.models import register_model
from torch import Tensor, nn

from zpipe.train.models.backbone import (
    WrappedModel,
    build_wrapped,
    create_backbone,
    read_scores,
    square_side,
    untrained_cfgs,
)
from zpipe.train.models.operating_points import ScoreUse

COMBINE = ("zoom", "mean")


@torch.no_grad()
def zoom_boxes(
    scores: Tensor, image_size: int, area: float = 0.3, min_side: float | None = None, square: bool = False
) -> Tensor:
    """The box around the most important cells of each image, in pixels.

    The most important cells are the best floor(area * s * s), at least one, and those that equal the last of them; but
    never those of the map's lowest value, unless all cells are equal: then the box is the whole image. So a mirrored
    map has the mirrored box, and a constant map crops nothing.

    The study says only "bounding box", so the box keeps its shape, and enlarging it to a square image distorts it.

    Args:
        scores: [B, s * s], row-major, of any range.
        image_size: pixels a side of the image.
        area: share of the cells that count as important, in (0, 1]; the study: .3 and .15.
        min_side: the minimum width and height in pixels; a smaller box grows around its centre, and is then moved into
            the image. None is 64 px for an image of 224, and in proportion for others.
        square: make the shorter side as long as the longer one, so that objects keep their proportions.

    Returns:
        float32 [B, 4] as (left, top, right, bottom), within 0 .. image_size.

    Raises:
        ValueError: scores of another shape or with NaN, area or min_side out of range.
    """
    if not 0.0 < area <= 1.0:
        raise ValueError(f"area must lie in (0, 1], got {area!r}")
    min_length = 64 / 224 * image_size if min_side is None else min_side
    if not 0 < min_length <= image_size:
        raise ValueError(f"min_side must lie above 0 and at most at the image's {image_size} px, got {min_side!r}")
    side = math.isqrt(scores.shape[-1]) if scores.ndim == 2 else 0
    scores = read_scores(scores, len(scores), side)  # [B, s * s]
    count = max(1, int(area * side * side + 1e-6))
    last = scores.topk(count, dim=1).values[:, -1:]
    low, high = scores.aminmax(dim=1, keepdim=True)
    important = (scores >= last) & ((scores > low) | (low == high))
    important = important.unflatten(1, (side, side))  # [B, rows, columns]
    edges = []
    for line in (important.any(dim=1), important.any(dim=2)):  # columns, then rows: [B, s]
        first = line.to(torch.uint8).argmax(dim=1)
        beyond = side - line.flip(1).to(torch.uint8).argmax(dim=1)
        edges.append(torch.stack([first, beyond], dim=1))
    bounds = torch.stack(edges, dim=1).float() * (image_size / side)  # [B, (x, y), (first, beyond)]
    length = (bounds[..., 1] - bounds[..., 0]).clamp(min=min_length)  # [B, 2]
    if square:
        length = length.amax(dim=1, keepdim=True).expand(-1, 2)
    start = (bounds.mean(dim=2) - length / 2).clamp(min=0).minimum(image_size - length)
    return torch.cat([start, start + length], dim=1)


def crop(images: Tensor, boxes: Tensor) -> Tensor:
    """Crop each image to its box, and enlarge that to the size of the image.

    Bilinear at pixel centres, in float32. A box is never larger than the image, so nothing is reduced and no
    antialiasing filter is needed; the box of the whole image gives the image itself. No gradient flows into the boxes.

    Args:
        images: [B, D, H, W].
        boxes: [B, 4] in pixels, as of `zoom_boxes`.

    Returns:
        [B, D, H, W].
    """
    height, width = images.shape[2:]
    edges = zip(boxes.detach().float().unbind(1), (width, height, width, height), strict=True)
    boxes = torch.stack([edge / length for edge, length in edges], dim=1)
    # The image spans -1 .. 1, as in affine_grid.
    size, centre = boxes[:, 2:] - boxes[:, :2], boxes[:, 2:] + boxes[:, :2] - 1
    places = [
        ((torch.arange(n, device=images.device) + 0.5) * 2 / n - 1) * size[:, i, None] + centre[:, i, None]
        for i, n in enumerate((width, height))
    ]  # [B, W], [B, H]
    grid = torch.stack(torch.broadcast_tensors(places[0][:, None], places[1][:, :, None]), dim=3)  # [B, H, W, 2]
    with torch.autocast(images.device.type, enabled=False):
        return F.grid_sample(images.float(), grid, padding_mode="border", align_corners=False).to(images.dtype)


class ImageZoom(WrappedModel):
    """A timm classifier of the box around what matters: `model(images, scores)`; with scores=None it is the backbone.

    Args:
        backbone: a timm classifier, or its name. Its state dict is under `backbone.`.
        area: of the box, see `zoom_boxes`; a call may give another.
        min_side: of the box, see `zoom_boxes`.
        square: of the box, see `zoom_boxes`.
        combine: "zoom" for the logits of the enlarged box alone, "mean" for the mean of those and the whole image's.
        img_size: pixels a side; images are square.
        patch_size: pixels a side of a score cell, which sets `score_grid`, the grid that a source of scores should
            have. Scores on other square grids are accepted, too.
        num_classes: number of classes of a backbone given by name.
        in_chans: channels of its images.
        backbone_args: its further keyword arguments.

    Raises:
        ValueError: area or min_side out of range, an unknown combine, sizes that don't divide.
    """

    def __init__(
        self,
        backbone: str | nn.Module = "deit_small_patch16_224",
        area: float = 0.3,
        min_side: float | None = None,
        square: bool = False,
        combine: str = "zoom",
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        num_classes: int = 1000,
        in_chans: int = 3,
        backbone_args: dict[str, Any] | None = None,
    ) -> None:
        img_size = square_side(img_size)
        if combine not in COMBINE:
            raise ValueError(f"combine must be one of {', '.join(COMBINE)}, got {combine!r}")
        if img_size % patch_size:
            raise ValueError(f"image size {img_size} doesn't divide into score cells of {patch_size} pixels")
        zoom_boxes(torch.zeros(1, 1), img_size, area, min_side)  # checks area and min_side
        if isinstance(backbone, str):
            backbone = create_backbone(backbone, img_size, num_classes, in_chans, backbone_args, sized=False)
        super().__init__(backbone)
        self.img_size = img_size
        self.area, self.min_side, self.square, self.combine = area, min_side, square, combine
        self.score_grid = img_size // patch_size

    def forward(self, images: Tensor, scores: Tensor | None = None, area: float | None = None) -> Tensor:
        """Classify images.

        Args:
            images: [B, in_chans, img_size, img_size].
            scores: [B, s * s], row-major, of any range; no gradient flows into them. None zooms nothing.
            area: share of the cells that count as important; None takes the model's.

        Returns:
            Logits [B, num_classes].

        Raises:
            ValueError: images or scores of another shape, NaN in scores, area outside (0, 1].
        """
        if images.ndim != 4 or tuple(images.shape[2:]) != (self.img_size, self.img_size):
            raise ValueError(
                f"images must be [batch, chans, {self.img_size}, {self.img_size}], got {list(images.shape)}"
            )
        if scores is None:
            return self.backbone(images)
        if len(scores) != len(images):
            raise ValueError(f"scores must be [{len(images)}, s * s], a map for each image, got {list(scores.shape)}")
        zoomed: Tensor = self.backbone(crop(images, self.boxes(scores, area)))
        return zoomed if self.combine == "zoom" else (self.backbone(images) + zoomed) / 2

    @property
    def score_use(self) -> ScoreUse:
        """How scores guide the model."""
        return ScoreUse(grid=self.score_grid, any_grid=True)

    def boxes(self, scores: Tensor, area: float | None = None) -> Tensor:
        """The boxes that the model crops for scores [B, s * s], float32 [B, 4]; see `zoom_boxes`."""
        return zoom_boxes(scores, self.img_size, self.area if area is None else area, self.min_side, self.square)

    @property
    def passes(self) -> int:
        """Passes of the backbone that an image with scores takes; the source of the scores is not included."""
        return 1 if self.combine == "zoom" else 2


default_cfgs = untrained_cfgs("image_zoom")


@register_model
def image_zoom(pretrained: bool = False, **kwargs: Any) -> ImageZoom:
    """`ImageZoom`, on DeiT-S unless `backbone` names another timm classifier. Takes its arguments."""
    return build_wrapped(ImageZoom, "image_zoom", pretrained, **kwargs)
