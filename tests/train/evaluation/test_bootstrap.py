"""Intervals: against those of the textbook, paired, and independent of order and batches."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from zpipe.train.evaluation.bootstrap import RESAMPLES, ResampledSums, estimate, ratio


def replicates(values, batch=100, order=None, seed=0):
    """The mean of values by image, in the data set and in every resample."""
    sums = ResampledSums(seed)
    order = np.arange(len(values)) if order is None else order
    for start in range(0, len(values), batch):
        rows = order[start : start + batch]
        sums.begin([f"image-{row}" for row in rows])
        sums.add("row", "mean", torch.tensor(np.stack([values[rows], np.ones(len(rows))], axis=1)))
    total = sums.of("row", "mean")
    return ratio(total[:, 0], total[:, 1])


def test_intervals_of_means_are_those_of_the_textbook():
    generator = np.random.default_rng(0)
    for values in (generator.normal(3, 2, 500), generator.random(500) ** 4, (generator.random(500) < 0.9) * 1.0):
        value, low, high = estimate(replicates(values))
        half = 1.96 * values.std() / len(values) ** 0.5
        assert value == pytest.approx(values.mean())
        assert low == pytest.approx(value - half, abs=0.15 * half) and high == pytest.approx(
            value + half, abs=0.15 * half
        )


def test_intervals_of_ratios_are_those_of_the_usual_bootstrap():
    generator = np.random.default_rng(1)
    shared, either = generator.random(300) * 50, 50 + generator.random(300) * 100
    sums = ResampledSums()
    sums.begin([str(row) for row in range(300)])
    sums.add("row", "iou", torch.tensor(np.stack([shared, either], axis=1)))
    total = sums.of("row", "iou")
    found = estimate(ratio(total[:, 0], total[:, 1]))
    rows = generator.integers(0, 300, (4000, 300))
    low, high = np.quantile(shared[rows].sum(1) / either[rows].sum(1), (0.025, 0.975))
    assert found.value == pytest.approx(shared.sum() / either.sum())
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.1 * (high - low))


def test_resamples_depend_on_keys_and_seed_only():
    values = np.random.default_rng(2).random(50)
    whole = replicates(values)
    assert whole.shape == (1 + RESAMPLES,)
    np.testing.assert_allclose(replicates(values, batch=7), whole)
    np.testing.assert_allclose(replicates(values, order=np.random.default_rng(3).permutation(50)), whole)
    assert not np.allclose(replicates(values, seed=1)[1:], whole[1:])


def test_differences_are_paired():
    """Two methods that differ by a constant differ by it in every resample."""
    values = np.random.default_rng(4).random(60)
    value, low, high = estimate(replicates(values + 0.25) - replicates(values))
    assert value == pytest.approx(0.25) and low == pytest.approx(0.25) and high == pytest.approx(0.25)


def test_one_image_has_an_interval_of_no_width():
    assert estimate(replicates(np.array([0.5]))) == (0.5, 0.5, 0.5)


def test_sums_are_kept_apart_by_row_and_name():
    sums = ResampledSums()
    sums.begin(["a", "b"])
    sums.add("one", "x", torch.ones(2, 1))
    sums.add("one", "y", torch.ones(2, 3))
    sums.add("other", "x", 2 * torch.ones(2, 1))
    assert sums.names("one") == ["x", "y"] and sums.names("other") == ["x"]
    np.testing.assert_allclose(sums.of("other", "x"), 2 * sums.of("one", "x"))
