"""The fit of a linear head: scikit-learn's minimum, whatever the batches, and a standardisation that folds away."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from zpipe.pipeline.logistic_regression import Scaling, Score, fit, score

pytestmark = pytest.mark.usefixtures("one_thread")


def rows_in(*batches):
    return lambda: iter(batches)


@pytest.fixture(scope="module")
def data():
    """Four overlapping classes of 120 points; features of different scale, the last one constant."""
    rng = np.random.default_rng(3)
    labels = rng.integers(0, 4, 120)
    centres = rng.normal(size=(4, 6))
    features = (centres[labels] + rng.normal(size=(120, 6))) * [1, 10, 0.1, 1, 5, 0] + [0, 3, -2, 0, 100, 7]
    return torch.tensor(features, dtype=torch.float32), torch.tensor(labels)


@pytest.mark.parametrize("strength", [0.3, 0.01])
def test_the_minimum_is_that_of_scikit_learn(data, strength):
    features, labels = data
    scaler = StandardScaler().fit(features.double().numpy())
    theirs = LogisticRegression(C=1 / (strength * len(labels)), tol=1e-8, max_iter=10_000)
    theirs.fit(scaler.transform(features.double().numpy()), labels.numpy())
    rows = rows_in((features[:50], labels[:50]), (features[50:], labels[50:]))
    scaling = Scaling.of(rows)
    found = fit(rows, scaling, 4, strength)
    assert found.note == ""
    np.testing.assert_allclose(found.affine.weight, theirs.coef_, atol=2e-4)
    # The mean of the biases is free: adding a number to all logits changes nothing.
    bias, their_bias = found.affine.bias.numpy(), theirs.intercept_
    np.testing.assert_allclose(bias - bias.mean(), their_bias - their_bias.mean(), atol=2e-4)
    ours = found.affine.after(scaling)(features)
    expected = theirs.decision_function(scaler.transform(features.double().numpy()))
    np.testing.assert_allclose(ours - ours.mean(1, keepdim=True), expected - expected.mean(1, keepdims=True), atol=1e-3)


def test_the_standardisation_folds_into_weight_and_bias(data):
    features, _ = data
    rows = rows_in(data)
    scaling = Scaling.of(rows)
    torch.testing.assert_close(scaling.mean, features.double().mean(0))
    expected = features.double().std(0, correction=0)
    torch.testing.assert_close(scaling.std, torch.where(expected > 0, expected, 1.0))
    affine = fit(rows, scaling, 4, 0.1).affine
    standardised = (features.double() - scaling.mean) / scaling.std
    torch.testing.assert_close(affine.after(scaling)(features), affine(standardised), rtol=0, atol=1e-9)


def test_a_start_changes_the_way_but_not_the_end(data):
    rows = rows_in(data)
    scaling = Scaling.of(rows)
    far = fit(rows, scaling, 4, 1.0).affine
    direct, warm = fit(rows, scaling, 4, 0.02).affine, fit(rows, scaling, 4, 0.02, far).affine
    torch.testing.assert_close(direct.weight, warm.weight, rtol=0, atol=1e-4)


def test_a_stronger_penalty_gives_smaller_weights(data):
    rows = rows_in(data)
    scaling = Scaling.of(rows)
    norms = [float(fit(rows, scaling, 4, strength).affine.weight.norm()) for strength in (0.001, 0.03, 1.0)]
    assert norms[0] > norms[1] > norms[2]


def test_the_score_counts_rows_of_all_batches(data):
    features, labels = data
    rows = rows_in((features[:7], labels[:7]), (features[7:], labels[7:]))
    scaling = Scaling.of(rows)
    affine = fit(rows, scaling, 4, 0.01).affine.after(scaling)
    found, logits = score(rows, affine), affine(features)
    assert (found.count, found.correct) == (120, int((logits.argmax(1) == labels).sum()))
    assert found.loss == pytest.approx(float(torch.nn.functional.cross_entropy(logits, labels)))
    assert found.top1 > 0.6


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 5000), st.data())
def test_the_interval_holds_the_accuracy_and_stays_within_bounds(count, data):
    found = Score(0.0, data.draw(st.integers(0, count)), count)
    low, high = found.interval
    assert -1e-9 <= low <= found.top1 + 1e-9 and found.top1 - 1e-9 <= high <= 1 + 1e-9


def test_the_interval_of_wilson():
    low, high = Score(0.0, 90, 100).interval
    assert (round(low, 4), round(high, 4)) == (0.8256, 0.9448)
