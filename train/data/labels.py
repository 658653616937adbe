"""Checks of the labels of a batch."""

from __future__ import annotations

from torch import Tensor

from zpipe.schemas.errors import ZpipeError


def check_labels(
    labels: Tensor,
    keys: list[str],
    num_classes: int,
    remedy: str = "correct the label or give --num-classes",
) -> None:
    """Check the labels int64 [B] of a batch.

    Raises:
        ZpipeError: Naming the first key whose label is outside the classes.
    """
    outside = (labels < 0) | (labels >= num_classes)
    if outside.any():
        first = int(outside.nonzero()[0])
        raise ZpipeError(
            f"key {keys[first]}: label {int(labels[first])} is outside the model's {num_classes} classes; {remedy}"
        )
