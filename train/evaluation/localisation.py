"""Agreement of maps with the boxes and masks of objects. Pure: tensors in, tensors out.

Maps cover the image. Where pixels count, maps are upsampled bilinearly, as all protocols below do.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

IOU_LEVELS = (0.3, 0.5, 0.7)
THRESHOLDS = tuple(step / 50 for step in range(50))  # of a map whose values span [0, 1]
BACKGROUND, OBJECT, IGNORED = 0, 1, 2  # the values of a mask


def pointing_game(maps: Tensor, boxes: Tensor) -> Tensor:
    """Whether the centre of the highest cell lies in a box or on its edge (Zhang et al. 2018).

    Args:
        maps: [B, gh, gw]; of equally high cells the first in row-major order counts.
        boxes: [B, 4] or, for several of each image, [B, n, 4] as (left, top, right, bottom) in fractions of the image.
            A box of NaN stands for none.

    Returns:
        bool [B].
    """
    _, height, width = maps.shape
    peak = maps.flatten(1).argsort(dim=1, descending=True, stable=True)[:, 0]  # argmax leaves the order of ties open
    x = ((peak % width + 0.5) / width)[:, None]  # [B, 1]
    y = ((peak // width + 0.5) / height)[:, None]
    left, top, right, bottom = boxes.view(len(maps), -1, 4).unbind(dim=2)  # [B, n] each
    return ((left <= x) & (x <= right) & (top <= y) & (y <= bottom)).any(dim=1)


def upsample(maps: Tensor, side: int) -> Tensor:
    """Resize maps [B, gh, gw] bilinearly and scale each to [0, 1]; a constant map becomes 0. -> float32 [B, S, S]."""
    large = F.interpolate(maps[:, None].float(), (side, side), mode="bilinear", align_corners=False)[:, 0]
    low, high = large.amin(dim=(1, 2), keepdim=True), large.amax(dim=(1, 2), keepdim=True)
    return (large - low) / torch.where(high > low, high - low, torch.ones_like(high))


class Overlaps(NamedTuple):
    """How well the boxes around parts of a map overlap the boxes of the objects, at each of `THRESHOLDS`."""

    largest: Tensor
    """The intersection over union of the box around the largest part, float32 [B, T]."""
    best: Tensor
    """That of the part with the highest one, float32 [B, T]."""


def box_overlaps(maps: Tensor, boxes: Tensor, side: int) -> Overlaps:
    """Overlaps of objects' boxes with those around the parts of thresholded maps, for MaxBoxAcc (Choe et al.).

    MaxBoxAcc (CVPR 2020) is the fraction of images whose `largest` overlap is at least 0.5, at the threshold that is
    best for the data set. MaxBoxAccV2 (TPAMI 2022) takes the `best` overlap, and the mean over 0.3, 0.5 and 0.7, each
    with a best threshold of its own. A part is an 8-connected component of the pixels above the threshold, where the
    map is upsampled to the size of the image and scaled to [0, 1]. The authors' code takes 1,000 thresholds of 8-bit
    maps, the area within a part's contour instead of its pixels, and holes as further parts.

    Args:
        maps: [B, gh, gw].
        boxes: [B, 4] or [B, n, 4] as for `pointing_game`; the best of several counts.
        side: height and width of the upsampled map.
    """
    # Loaded here, because an evaluation needs only the pointing game. scipy has no stubs.
    from scipy import ndimage

    overlaps = np.zeros((2, len(maps), len(THRESHOLDS)), np.float32)
    wanted = boxes.view(len(maps), -1, 4).double().cpu().numpy() * side  # [B, n, 4], pixels
    for image, (values, own) in enumerate(zip(upsample(maps, side).cpu().numpy(), wanted, strict=True)):
        own = own[~np.isnan(own).any(axis=1)]
        corner = np.zeros(2)  # x and y of what is left of the image
        for place, threshold in enumerate(THRESHOLDS):
            above = values > threshold
            if not above.any() or not len(own):
                break
            # Higher thresholds leave nothing outside of the box around what is above this one.
            (down,) = ndimage.find_objects(above.astype(np.int8))
            values, above = values[down], above[down]
            corner += (down[1].start, down[0].start)
            labels, _ = ndimage.label(above, np.ones((3, 3)))
            parts = ndimage.find_objects(labels)
            found = np.array([(x.start, y.start, x.stop, y.stop) for y, x in parts]) + np.tile(corner, 2)  # [parts, 4]
            best = box_iou(found, own).max(axis=1)  # [parts]
            overlaps[:, image, place] = best[np.bincount(labels[above])[1:].argmax()], best.max()
    return Overlaps(*torch.from_numpy(overlaps))


def box_iou(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """The intersection over union of boxes [n, 4] and [m, 4] as (left, top, right, bottom). -> [n, m]."""
    low = np.maximum(one[:, None, :2], other[None, :, :2])
    high = np.minimum(one[:, None, 2:], other[None, :, 2:])
    shared = np.maximum(high - low, 0).prod(axis=2)
    sizes = [(boxes[:, 2:] - boxes[:, :2]).prod(axis=1) for boxes in (one, other)]
    return shared / (sizes[0][:, None] + sizes[1][None, :] - shared)


class Segmentation(NamedTuple):
    """How well maps segment the objects of images."""

    accuracy: Tensor
    """The fraction of the pixels that are right, float64 [B]."""
    intersection: Tensor
    """The number of pixels that map and mask share, of background and object, float64 [B, 2]."""
    union: Tensor
    """The number of pixels that either has, of background and object, float64 [B, 2]."""
    average_precision: Tensor
    """The average precision of the pixels, float64 [B]."""


def segment(maps: Tensor, masks: Tensor) -> Segmentation:
    """Compare maps with masks as Chefer et al. (CVPR 2021) do on ImageNet-Segmentation.

    A map is upsampled bilinearly and scaled to [0, 1]; its object is what is above its mean. Average precision is that
    of all pixels of both classes together, background by 1 - map, object by map. The paper's pixel accuracy is over all
    pixels of the data set, which is the mean of `accuracy` over images where none is ignored. Its mIoU divides the sum
    of `intersection` over the data set by that of `union`, and is the mean of background and object.

    Args:
        maps: [B, gh, gw].
        masks: uint8 [B, S, S] of `BACKGROUND`, `OBJECT` and `IGNORED`, on the device of the maps; ignored pixels do not
            count.
    """
    relevance = upsample(maps, masks.shape[-1])  # [B, S, S]
    found = relevance > relevance.mean(dim=(1, 2), keepdim=True)
    counts, truth = masks != IGNORED, masks == OBJECT
    pairs = [(~found & counts, ~truth & counts), (found & counts, truth & counts)]
    shared = torch.stack([(one & other).sum(dim=(1, 2)) for one, other in pairs], dim=1).double()  # [B, 2]
    either = torch.stack([(one | other).sum(dim=(1, 2)) for one, other in pairs], dim=1).double()
    accuracy = shared.sum(dim=1) / counts.sum(dim=(1, 2))
    scores = torch.stack([1 - relevance, relevance], dim=1).flatten(1)  # [B, 2 * S * S]
    right = torch.stack([~truth & counts, truth & counts], dim=1).flatten(1)
    scores = scores.masked_fill(~counts.flatten(1).repeat(1, 2), -1.0)  # after all others
    return Segmentation(accuracy, shared, either, average_precision(scores, right))


def average_precision(scores: Tensor, right: Tensor) -> Tensor:
    """The average precision of ranked items: the mean over the right ones of the precision among those ranked as high.

    Equal scores share a rank, as in scikit-learn.

    Args:
        scores: [B, n].
        right: bool [B, n].

    Returns:
        float64 [B]; NaN without right items.
    """
    scores, order = scores.sort(dim=1, descending=True)
    right = right.gather(1, order)
    n = scores.shape[1]
    place = torch.arange(n, device=scores.device)
    is_last = torch.ones_like(right)
    is_last[:, :-1] = scores[:, 1:] != scores[:, :-1]  # of the items with its score
    # Items of equal score share a rank, which ends at the last of them.
    ends = torch.where(is_last, place, n).flip(1).cummin(dim=1).values.flip(1)
    precision = right.double().cumsum(dim=1) / (place + 1)
    return (precision.gather(1, ends) * right).sum(dim=1) / right.sum(dim=1)


def has_area(boxes: Tensor) -> Tensor:
    """Whether boxes [..., 4] have an area; NaN stands for no box. -> bool [...]."""
    left, top, right, bottom = boxes.unbind(dim=-1)
    return (left < right) & (top < bottom)


def hits(overlaps: Tensor, levels: Sequence[float] = IOU_LEVELS) -> Tensor:
    """Whether overlaps [B, T] reach each of the levels. -> bool [B, levels, T]."""
    return overlaps[:, None] >= torch.tensor(levels, dtype=overlaps.dtype, device=overlaps.device)[:, None]
