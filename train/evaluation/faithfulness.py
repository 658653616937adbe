"""Faithfulness of maps to a classifier, measured by removing parts of images. Pure: tensors in, tensors out.

A cell is removed by replacing its pixels with those of a baseline, an image without content. Curves remove or reveal
ever more cells; SaCo removes one group of cells at a time.

With one baseline for all curves, revealing the most relevant cells on the baseline shows the same images as removing
the least relevant cells from the image, in the opposite order. So `insertion` is the curve of least-relevant-first
removal (LeRF) read backwards, and both have the same area. `deletion` is most-relevant-first removal (MoRF).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Baseline = Literal["mean", "blur"]


@dataclass(frozen=True, kw_only=True)
class Probe:
    """A classifier, and the images that it is asked about with parts of them removed."""

    model: Callable[[Tensor], Tensor]
    """Normalised images [B, 3, S, S] -> logits [B, classes]."""
    images: Tensor
    """The images, [B, 3, S, S]."""
    empty: Tensor
    """What replaces removed cells, [B, 3, S, S]; see `emptied`."""
    targets: Tensor
    """The class whose probability counts, int64 [B]."""

    def without(self, removed: Tensor) -> Tensor:
        """The probability of the target without the cells that are `removed`, bool [B, gh, gw]. -> float [B]."""
        size = self.images.shape[-2:]
        mask = F.interpolate(removed[:, None].to(self.images.dtype), size, mode="nearest-exact") > 0  # [B, 1, S, S]
        return self._probability(torch.where(mask, self.empty, self.images))

    @cached_property
    def full(self) -> Tensor:
        """The probability of the target in the whole images, float [B]."""
        return self._probability(self.images)

    @cached_property
    def nothing(self) -> Tensor:
        """The probability of the target in the baselines, float [B]."""
        return self._probability(self.empty)

    def _probability(self, images: Tensor) -> Tensor:
        return self.model(images).float().softmax(dim=1).gather(1, self.targets[:, None])[:, 0]


def emptied(images: Tensor, baseline: Baseline) -> Tensor:
    """Normalised images without content: zero, which is the mean colour, or blurred over a quarter of the image."""
    if baseline == "mean":
        return torch.zeros_like(images)
    radius = max(images.shape[-1] // 8, 1)
    blurred = images
    for _ in range(3):  # three box blurs are close to a Gaussian
        padded = F.pad(blurred, (radius,) * 4, mode="replicate")
        blurred = F.avg_pool2d(padded, 2 * radius + 1, stride=1)
    return blurred


def perturbation_curves(probe: Probe, maps: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """The target's probability while cells are removed or revealed, the most relevant first (Petsiuk et al. 2018).

    Args:
        probe: the classifier and the images.
        maps: [B, gh, gw]; only the order of the cells matters, and of equal cells the first in row-major order leads.
        steps: points of a curve after the first; at point i, round(i / steps * cells) cells are removed or revealed.

    Returns:
        (deletion, insertion), each [B, steps + 1]. For a faithful map, deletion falls and insertion rises early.
    """
    rank = _rank(maps)
    deletion, insertion = [probe.full], [probe.nothing]
    for step in range(1, steps):
        taken = rank < round(step / steps * maps[0].numel())
        deletion.append(probe.without(taken))
        insertion.append(probe.without(~taken))
    return torch.stack([*deletion, probe.nothing], dim=1), torch.stack([*insertion, probe.full], dim=1)


def area(curves: Tensor) -> Tensor:
    """The area under curves [B, n] over [0, 1], by trapezoids. -> [B]."""
    return torch.trapezoid(curves, dx=1 / (curves.shape[1] - 1), dim=1)


def saco(probe: Probe, maps: Tensor, groups: int) -> Tensor:
    """The salience-guided faithfulness coefficient (SaCo; Wu et al., CVPR 2024, section 3 and algorithm 1).

    The cells are sorted by relevance and divided into groups of equal size, up to one cell. Each group is removed
    alone. Each pair of groups adds the difference of their salience if the more salient one lowers the target's
    probability at least as much as the other, and subtracts it otherwise. The sum is divided by that of all
    differences. The salience of a group is the mean of its cells; where all groups have the same size, that is the
    paper's sum up to a factor. The paper replaces pixels by the mean of their image and explains the predicted class;
    the probe decides both here.

    Args:
        probe: the classifier and the images.
        maps: [B, gh, gw].
        groups: the number of groups; the paper has 10. There are no more groups than cells.

    Returns:
        [B] in [-1, 1]; 1 if salience and drop order all pairs alike. 0 for a map whose groups are equally salient.
    """
    rank, cells = _rank(maps), maps[0].numel()
    groups = min(groups, cells)
    edges = [round(group / groups * cells) for group in range(groups + 1)]
    salience, drop = [], []
    for start, end in pairwise(edges):
        group = (rank >= start) & (rank < end)  # [B, gh, gw]
        salience.append((maps * group).sum(dim=(1, 2)) / (end - start))
        drop.append(probe.full - probe.without(group))
    return agreement(torch.stack(salience, dim=1), torch.stack(drop, dim=1))


def agreement(salience: Tensor, drop: Tensor) -> Tensor:
    """The agreement of groups' salience with their drop over all pairs, weighted by the difference of salience.

    Args:
        salience: [B, K], falling.
        drop: [B, K].

    Returns:
        float64 [B] in [-1, 1]; 0 where all groups are equally salient.
    """
    first, second = torch.triu_indices(salience.shape[1], salience.shape[1], offset=1)
    weight = (salience[:, first] - salience[:, second]).double()  # [B, pairs], none is negative
    sign = torch.where(drop[:, first] >= drop[:, second], 1.0, -1.0)
    total = weight.sum(dim=1)
    return torch.where(total > 0, (sign * weight).sum(dim=1) / total.clamp(min=torch.finfo(total.dtype).tiny), 0.0)


def _rank(maps: Tensor) -> Tensor:
    """The rank of each cell of [B, gh, gw], 0 for the most relevant one."""
    order = maps.flatten(1).argsort(dim=1, descending=True, stable=True)
    return order.argsort(dim=1).view_as(maps)
