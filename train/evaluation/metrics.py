"""Agreement of score maps with a teacher's maps: one number per map, [B].

Also the check of what models return, before anything is computed from it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from zpipe.schemas.errors import ZpipeError

# Beyond it float32 does not tell whole numbers apart, so that a softmax is 0 or 1 by rounding.
LARGEST_LOGIT = 2.0**24


def check_numbers(values: Tensor, keys: Sequence[str], what: str, *, limit: float = torch.inf, where: str = "") -> None:
    """Check that what a model returned for the samples of a batch are numbers to compute with.

    Comparisons with NaN are false, and infinities of equal sign are ranked by their classes, so that an accuracy of
    such logits would look like any other.

    Args:
        values: logits or scores [B, n].
        keys: the key of each sample.
        what: what they are, for messages: `the model's logits`.
        limit: the largest magnitude that is accepted.
        where: the run and its precision, for messages; empty if they are not known.

    Raises:
        ZpipeError: a value is NaN or infinite, or its magnitude is above the limit; the message names the key.
    """
    usable = values.isfinite() & (values.abs() <= limit)
    if usable.all():
        return
    row, place = usable.logical_not().nonzero()[0].tolist()
    remedy = "its weights have diverged or are damaged: choose other weights, or train again with a lower --lr"
    if where.endswith((" in fp16", " in bf16")):
        remedy = "give --precision float32 or, if that is no better, other weights"
    raise ZpipeError(
        f"{where}{': ' if where else ''}key {keys[row]}: {what} hold {float(values[row, place]):g}; {remedy}"
    )


def mse(maps: Tensor, target: Tensor) -> Tensor:
    """Mean squared error over the cells (Table 2 averages it over images). Both [B, S] -> [B]."""
    return (maps - target).square().mean(dim=1)


def mae(maps: Tensor, target: Tensor) -> Tensor:
    """Mean absolute error over the cells (Table 2 averages it over images). Both [B, S] -> [B]."""
    return (maps - target).abs().mean(dim=1)


def spearman(maps: Tensor, target: Tensor) -> Tensor:
    """Spearman's rank correlation over the cells, in [-1, 1]; equal scores share their mean rank. Both [B, S] -> [B].

    The result is float64, and NaN for an image where either map is constant.
    """
    x, y = _centred_ranks(maps), _centred_ranks(target)
    return (x * y).sum(dim=1) / (x.square().sum(dim=1) * y.square().sum(dim=1)).sqrt()


def topk_overlap(maps: Tensor, target: Tensor, k: int) -> Tensor:
    """The fraction of the target's k highest cells that are among the map's k highest, in [0, 1]. Both [B, S] -> [B].

    Of equal scores the one with the lower index counts as higher.

    Raises:
        ValueError: unless 1 <= k <= S.
    """
    if not 1 <= k <= maps.shape[1]:
        raise ValueError(f"k must lie between 1 and the {maps.shape[1]} cells, got {k!r}")
    return (_top(maps, k) & _top(target, k)).sum(dim=1) / k


def _centred_ranks(x: Tensor) -> Tensor:
    """[B, S] -> ranks minus their mean, float64: cells below minus cells above, halved."""
    return (x[:, :, None] - x[:, None, :]).sign().sum(dim=2).double() / 2


def _top(x: Tensor, k: int) -> Tensor:
    order = x.argsort(dim=1, descending=True, stable=True)
    return torch.zeros_like(x, dtype=torch.bool).scatter_(1, order[:, :k], True)
