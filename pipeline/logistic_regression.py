"""Multinomial logistic regression on features that need not fit the memory.

The objective is convex and smooth, and L-BFGS with a line search finds its minimum. Each evaluation reads all rows.

Symbols in the shape comments: n rows of a batch, F features, C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# Yields all rows in batches: features [n, F], of any floating-point dtype, and labels int64 [n], on the device that
# shall compute. It is called once for each evaluation and must yield the same rows every time.
Rows = Callable[[], Iterator[tuple[Tensor, Tensor]]]
MAX_ITERATIONS = 500
TOLERANCE = 1e-6  # of the largest component of the gradient


@dataclass(frozen=True, eq=False)
class Affine:
    """A function of features: x W^T + b."""

    weight: Tensor
    """W, float64 [C, F]."""
    bias: Tensor
    """b, float64 [C]."""

    def __call__(self, features: Tensor) -> Tensor:
        """Compute the logits [n, C] of features [n, F]."""
        return F.linear(features.to(self.weight), self.weight, self.bias)

    def after(self, scaling: Scaling) -> Affine:
        """The same function of features that are not standardised, with the standardisation in weight and bias."""
        weight = self.weight / scaling.std
        return Affine(weight, self.bias - weight @ scaling.mean)


@dataclass(frozen=True, eq=False)
class Scaling:
    """Standardisation of features: each has mean 0 and variance 1 over the rows that it was measured on."""

    mean: Tensor
    """float64 [F]."""
    std: Tensor
    """float64 [F]; 1 for a feature that is the same in all rows."""

    @classmethod
    def of(cls, rows: Rows) -> Scaling:
        """Measure mean and standard deviation, in two passes."""
        count, total = 0, torch.zeros((), dtype=torch.float64)
        for features, _ in rows():
            count, total = count + len(features), total + features.double().sum(dim=0)
        mean = total / count
        squares = torch.zeros_like(mean)
        for features, _ in rows():
            squares += (features.double() - mean).square().sum(dim=0)
        std = (squares / count).sqrt()
        # The mean of equal numbers is off by rounding, which would otherwise become a feature.
        return cls(mean, torch.where(std > 1e-7 * mean.abs(), std, torch.ones_like(std)))


class Fitted(NamedTuple):
    """The result of a fit."""

    affine: Affine
    """Logits of standardised features."""
    note: str
    """A line if the minimum was not reached; else empty."""


def fit(rows: Rows, scaling: Scaling, num_classes: int, strength: float, start: Affine | None = None) -> Fitted:
    """Minimise the mean cross-entropy + strength / 2 times the squared norm of W.

    The minimum is over the affine functions of standardised features. In scikit-learn's LogisticRegression, strength is
    1 / (C * number of rows). The bias has no penalty.

    Args:
        rows: The rows.
        scaling: Standardisation of the features, which the penalty refers to.
        num_classes: C.
        strength: Strength of the penalty, > 0.
        start: Where to start; None starts at zero.
    """
    mean = scaling.mean
    weight = mean.new_zeros(num_classes, len(mean)) if start is None else start.weight.clone()
    bias = mean.new_zeros(num_classes) if start is None else start.bias.clone()
    weight.requires_grad_()
    bias.requires_grad_()
    count = sum(len(labels) for _, labels in rows())
    optimizer = torch.optim.LBFGS(
        [weight, bias],
        max_iter=MAX_ITERATIONS,
        tolerance_grad=TOLERANCE,
        tolerance_change=1e-12,
        history_size=20,
        line_search_fn="strong_wolfe",
    )

    def objective() -> Tensor:
        optimizer.zero_grad()
        penalty = strength / 2 * weight.square().sum()
        penalty.backward()
        value = penalty.detach()
        for features, labels in rows():
            # Standardisation goes into weight and bias, which are smaller than the features.
            logits = Affine(weight, bias).after(scaling)(features)  # [n, C]
            loss = F.cross_entropy(logits, labels, reduction="sum") / count
            loss.backward()
            value = value + loss.detach()
        return value

    optimizer.step(objective)
    iterations = optimizer.state[weight]["n_iter"]
    note = f"L-BFGS was stopped after {iterations} steps, short of the minimum" if iterations >= MAX_ITERATIONS else ""
    return Fitted(Affine(weight.detach(), bias.detach()), note)


@dataclass(frozen=True)
class Score:
    """How well logits agree with labels."""

    loss: float
    """Mean cross-entropy."""
    correct: int
    """Rows whose label has the largest logit."""
    count: int
    """Rows."""

    @property
    def top1(self) -> float:
        """Top-1 accuracy, 0 to 1."""
        return self.correct / self.count

    @property
    def interval(self) -> tuple[float, float]:
        """95 % interval of the top-1 accuracy (Wilson, 1927)."""
        z = 1.959964
        centre = (self.correct + z**2 / 2) / (self.count + z**2)
        half = z / (self.count + z**2) * (self.count * self.top1 * (1 - self.top1) + z**2 / 4) ** 0.5
        return centre - half, centre + half

    def __str__(self) -> str:
        """Accuracy with its interval: ``top-1 91.2 % [88.0, 93.6] of 400 images``."""
        low, high = self.interval
        return f"top-1 {100 * self.top1:.1f} % [{100 * low:.1f}, {100 * high:.1f}] of {self.count} images"


@torch.no_grad()
def score(rows: Rows, affine: Affine) -> Score:
    """Compare the logits of features, as they are in the rows, with the labels."""
    loss, correct, count = 0.0, 0, 0
    for features, labels in rows():
        logits = affine(features)
        loss += float(F.cross_entropy(logits, labels, reduction="sum"))
        correct += int((logits.argmax(dim=1) == labels).sum())
        count += len(labels)
    return Score(loss / count, correct, count)
