"""95 % intervals by resampling the images of a data set, in one pass and in memory that does not grow with them.

In a resample of the bootstrap an image occurs a random number of times, which for many images is a Poisson variable of
mean 1, independently of the others. Drawing it that way (Hanley and MacGibbon 2006; Chamandy et al. 2012) needs no list
of the images. An image's numbers depend on its key and a seed only, so that all methods are resampled alike, and
neither the order of the images nor the batch size plays a role.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from torch import Tensor

RESAMPLES = 1_000


class Estimate(NamedTuple):
    """A value with its 95 % interval."""

    value: float
    low: float
    high: float


class ResampledSums:
    """Sums of values over images, in the data set itself and in each resample.

    Args:
        seed: seed of the resamples.
    """

    def __init__(self, seed: int = 0) -> None:
        self._seed = seed
        self._sums: dict[tuple[str, str], np.ndarray] = {}
        self._weights = np.zeros((0, RESAMPLES + 1))

    def begin(self, keys: Sequence[str]) -> None:
        """Draw how often each resample has the images of a batch. The first column, of ones, is the data set."""
        drawn = [np.random.default_rng([self._seed, zlib.crc32(key.encode())]).poisson(1, RESAMPLES) for key in keys]
        self._weights = np.column_stack([np.ones(len(keys)), np.array(drawn, np.float64)])  # [B, 1 + RESAMPLES]

    def add(self, row: str, name: str, values: Tensor) -> None:
        """Add values [B, m] of the images of the present batch to the sums that are named by `row` and `name`."""
        added = self._weights.T @ values.double().cpu().numpy()  # [1 + RESAMPLES, m]
        self._sums[row, name] = self._sums.get((row, name), 0.0) + added

    def names(self, row: str) -> list[str]:
        """The names of a row's sums, in the order in which they came."""
        return [name for own, name in self._sums if own == row]

    def of(self, row: str, name: str) -> np.ndarray:
        """The sums, float64 [1 + RESAMPLES, m]: of the data set, then of each resample."""
        return self._sums[row, name]


def ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """Divide sums; NaN where a resample has no image to divide by."""
    filled = np.where(denominator == 0, np.nan, denominator)
    return numerator / filled


def estimate(replicates: np.ndarray) -> Estimate:
    """The value of the data set and its percentile interval.

    Args:
        replicates: a statistic, float64 [1 + RESAMPLES]: of the data set, then of each resample.
    """
    low, high = np.nanquantile(replicates[1:], (0.025, 0.975))
    return Estimate(float(replicates[0]), float(low), float(high))
