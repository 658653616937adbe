"""Token arithmetic: every pixel once, the paper's counts and order, and one kernel for all patch sizes."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from zpipe.train.models import zoom_tokens as zt

torch.set_num_threads(1)
few = settings(max_examples=60, deadline=None)


@st.composite
def cases(draw):
    """(zoom factor, scores [B, s*s] with many ties, coarse side, image size)."""
    factor = draw(st.sampled_from(zt.ZOOM_FACTORS))
    coarse = draw(st.integers(1, 4))
    side = coarse if factor == 2.0 else 2 * coarse
    batch = draw(st.integers(1, 3))
    levels = st.sampled_from([0.0, 0.1, 0.25, 0.5, 1.0])
    cells = batch * side * side
    values = draw(st.lists(st.one_of(levels, st.floats(0, 1, width=32)), min_size=cells, max_size=cells))
    image_size = 2 * coarse * draw(st.integers(1, 3))
    return factor, torch.tensor(values).reshape(batch, side * side), coarse, image_size


choices = st.one_of(
    st.tuples(st.just("alpha"), st.sampled_from([0.0, 0.1, 0.25, 0.5, 1.0])),
    st.tuples(st.just("alpha"), st.floats(0, 1)),
    st.tuples(st.just("budget"), st.floats(0, 1)),
)


def choose(factor, scores, choice):
    cell_scores = zt.coarse_scores(scores, factor)
    how, value = choice
    if how == "alpha":
        zoomed = zt.select_above(cell_scores, value)
    else:
        zoomed = zt.select_top(cell_scores, round(value * cell_scores.shape[1]))
    return zoomed, zt.order_tokens(cell_scores, zt.fine_scores(scores, factor), zoomed)


@few
@given(cases(), choices)
def test_every_pixel_lies_in_exactly_one_token(case, choice):
    factor, scores, coarse, image_size = case
    zoomed, order = choose(factor, scores, choice)
    assert torch.equal(order.counts, coarse**2 + 3 * zoomed.sum(1))
    assert torch.equal(order.fine, 4 * zoomed.sum(1))
    for row, count in zip(order.ids, order.counts.tolist(), strict=True):
        covered = torch.zeros(image_size, image_size, dtype=torch.int64)
        for left, top, right, bottom in zt.token_boxes(row[:count], coarse, image_size).tolist():
            covered[top:bottom, left:right] += 1
        assert bool((covered == 1).all())


@few
@given(cases(), choices)
def test_tokens_are_fine_then_coarse_each_by_falling_score_then_id(case, choice):
    factor, scores, coarse, _ = case
    zoomed, order = choose(factor, scores, choice)
    side = coarse if factor == 2.0 else 2 * coarse  # of the score map
    for b, count in enumerate(order.counts.tolist()):
        expected = []
        for cell in range(coarse**2):
            y, x = divmod(cell, coarse)
            if factor == 2.0:
                places = [(scores[b, cell].item())] * 4
            else:
                places = [scores[b, (2 * y + dy) * side + 2 * x + dx].item() for dy in (0, 1) for dx in (0, 1)]
            if zoomed[b, cell]:
                children = [(2 * y + dy) * 2 * coarse + 2 * x + dx for dy in (0, 1) for dx in (0, 1)]
                expected += [(0, -score, child) for score, child in zip(places, children, strict=True)]
            else:
                expected.append((1, -max(places), 4 * coarse**2 + cell))
        assert order.ids[b, :count].tolist() == [token for _, _, token in sorted(expected)]


@few
@given(cases(), choices)
def test_an_image_is_ordered_alike_alone_and_in_a_batch(case, choice):
    factor, scores, *_ = case
    _, order = choose(factor, scores, choice)
    for b in range(len(scores)):
        _, alone = choose(factor, scores[b : b + 1], choice)
        assert torch.equal(alone.ids[0], order.ids[b])


def test_a_score_equal_to_alpha_stays_coarse():
    scores = torch.tensor([[0.1, 0.5, 0.50001, 1.0]])
    assert zt.select_above(scores, 0.5).tolist() == [[False, False, True, True]]
    assert not zt.select_above(scores, 1.0).any()
    assert zt.select_above(scores, 0.0).all()


def test_a_budget_breaks_ties_by_index_and_is_exact():
    scores = torch.tensor([[0.5, 0.9, 0.5, 0.5], [0.0, 0.0, 0.0, 0.0]])
    assert zt.select_top(scores, 2).tolist() == [[True, True, False, False], [True, True, False, False]]
    assert zt.select_top(scores, 0).sum() == 0
    assert zt.select_top(scores, 4).all()


def test_coarse_score_is_the_highest_of_its_block_at_half_zoom():
    scores = torch.arange(16.0)[None] / 16
    assert (zt.coarse_scores(scores, 0.5) * 16).tolist() == [[5.0, 7.0, 13.0, 15.0]]
    assert zt.coarse_scores(scores, 2.0) is scores
    assert zt.fine_scores(torch.tensor([[1.0, 2.0, 3.0, 4.0]]), 2.0).reshape(4, 4).tolist() == [
        [1, 1, 2, 2],
        [1, 1, 2, 2],
        [3, 3, 4, 4],
        [3, 3, 4, 4],
    ]


@few
@given(cases(), choices, st.integers(1, 200))
def test_pruning_keeps_the_head_of_the_sequence(case, choice, keep):
    factor, scores, coarse, _ = case
    _, order = choose(factor, scores, choice)
    keep = min(keep, 4 * coarse**2)
    pruned = zt.prune(order, keep)
    assert torch.equal(pruned.ids, order.ids)
    assert pruned.counts.tolist() == [min(keep, count) for count in order.counts.tolist()]
    assert torch.equal(pruned.fine, order.fine)


@few
@given(cases(), choices, st.integers(1, 200), st.sampled_from(zt.PRUNE_KINDS))
def test_pruning_from_either_end(case, choice, keep, kind):
    factor, scores, coarse, _ = case
    _, order = choose(factor, scores, choice)
    keep = min(keep, 4 * coarse**2)
    pruned = zt.prune(order, keep, kind)
    for b, count in enumerate(order.counts.tolist()):
        sequence = order.ids[b, :count].tolist()
        fine = int(order.fine[b])
        part = {"zoomed": range(fine), "rest": range(fine, count)}.get(kind.partition("-")[2], range(count))
        drop = min(max(count - keep, 0), len(part))
        gone = set(part[:drop] if kind.startswith("forward") else part[len(part) - drop :])
        expected = [token for place, token in enumerate(sequence) if place not in gone]
        assert pruned.ids[b, : pruned.counts[b]].tolist() == expected
        left_fine = sum(token < 4 * coarse**2 for token in expected)
        assert zt.pruned_counts(fine, count, keep, kind) == (left_fine, len(expected))
        if kind != "backward":
            assert pruned.fine[b] == left_fine
    assert torch.equal(pruned.ids.sort(1).values, order.ids.sort(1).values)


@few
@given(cases(), st.floats(0, 1), st.booleans())
def test_calibration_finds_the_lowest_threshold_within_the_budget(case, share, by_tokens):
    factor, scores, coarse, _ = case
    cell_scores = zt.coarse_scores(scores, factor)
    cost = (lambda zoomed: coarse**2 + 3 * zoomed) if by_tokens else None

    def mean_at(alpha):
        zoomed = (cell_scores > alpha).sum(1)
        return float((cost(zoomed) if cost else zoomed).double().mean())

    budget = mean_at(1.0) + share * (mean_at(0.0) - mean_at(1.0))
    alpha, mean = zt.calibrate_alpha(cell_scores, budget, cost)
    assert mean == mean_at(alpha) <= budget
    lower = [value for value in [0.0, *cell_scores.flatten().tolist()] if value < alpha]
    assert all(mean_at(value) > budget for value in lower)


def test_calibration_refuses_what_cannot_be_met():
    with pytest.raises(ValueError, match="a budget of 3 is below the 4"):
        zt.calibrate_alpha(torch.rand(5, 4), 3, lambda zoomed: 4 + 3 * zoomed)
    with pytest.raises(ValueError, match=r"\[images, cells\]"):
        zt.calibrate_alpha(torch.rand(0, 4), 3)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("300 tokens", (300.0, "tokens")),
        ("1 token", (1.0, "tokens")),
        ("2.3 GMACs", (2.3, "GMACs")),
        ("2.3G", (2.3, "GMACs")),
        ("4 cells", (4.0, "cells")),
        (" 12 ", (12.0, "cells")),
    ],
)
def test_budgets_in_words(text, expected):
    assert zt.parse_budget(text) == expected


@pytest.mark.parametrize("text", ["", "many", "-3", "2.5 tokens", "3 GB", "nan", "1e3 G", "3 tokens more"])
def test_what_is_no_budget(text):
    with pytest.raises(ValueError, match="is none: give a number of cells"):
        zt.parse_budget(text)


def test_paper_token_counts():
    assert [zt.order_tokens(*triple).counts.item() for triple in _nothing_and_everything(14)] == [196, 784]
    assert [zt.order_tokens(*triple).counts.item() for triple in _nothing_and_everything(7)] == [49, 196]


def _nothing_and_everything(side):
    for zoom in (False, True):
        yield torch.rand(1, side**2), torch.rand(1, 4 * side**2), torch.full((1, side**2), zoom)


# -- zoom factor embedding ---------------------------------------------------------------------------------------------


def test_soft_embedding_is_equation_6():
    got = zt.zoom_factor_embedding(torch.tensor([8, 0]), 20, "soft", omega=0.3, dtype=torch.float64)
    for row, fine in zip(got.tolist(), (8, 0), strict=True):
        assert row == pytest.approx([1 - 1 / (1 + math.exp(0.3 * (fine - pos))) for pos in range(20)], abs=1e-12)


def test_soft_embedding_limits():
    fine = torch.tensor([8, 12])
    fixed = zt.zoom_factor_embedding(fine, 20, "fixed")
    assert fixed.sum(1).tolist() == [8, 12] and fixed[0, 7] == 1 and fixed[0, 8] == 0
    steep = zt.zoom_factor_embedding(fine, 20, "soft", omega=1e4)
    edge = torch.arange(20) == fine[:, None]
    assert torch.equal(steep[~edge], fixed[~edge])
    assert bool((steep[edge] == 0.5).all())
    assert bool((zt.zoom_factor_embedding(fine, 20, "soft", omega=0.0) == 0.5).all())
    gentle = zt.zoom_factor_embedding(fine, 20, "soft", omega=0.1)
    assert bool((gentle.diff(dim=1) < 0).all())
    assert not zt.zoom_factor_embedding(fine, 20, "none").any()


# -- one kernel for all patch sizes ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("patch", "side"), [(16, 64), (4, 16), (2, 8)])
def test_half_kernel_equals_enlarging_the_patch(patch, side):
    images, kernel = torch.randn(2, 3, side, side), torch.randn(8, 3, patch, patch) / patch
    enlarged = F.interpolate(images, scale_factor=2, mode="nearest")
    plain = F.conv2d(enlarged, kernel, stride=patch)
    trick = F.conv2d(images, zt.half_kernel(kernel), stride=patch // 2)
    torch.testing.assert_close(trick, plain, atol=1e-5, rtol=1e-5)
    fine, fine_kernel, _, _ = zt.patches_and_kernels(images, kernel, 2.0)
    torch.testing.assert_close(fine @ fine_kernel.T, plain.flatten(2).transpose(1, 2), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("patch", "side"), [(16, 64), (4, 16), (2, 8)])
def test_double_kernel_equals_averaging_the_patch(patch, side):
    images, kernel = torch.randn(2, 3, side, side), torch.randn(8, 3, patch, patch) / patch
    plain = F.conv2d(images.reshape(2, 3, side // 2, 2, side // 2, 2).mean((3, 5)), kernel, stride=patch)
    trick = F.conv2d(images, zt.double_kernel(kernel), stride=2 * patch)
    torch.testing.assert_close(trick, plain, atol=1e-5, rtol=1e-5)
    _, _, coarse, coarse_kernel = zt.patches_and_kernels(images, kernel, 0.5)
    torch.testing.assert_close(coarse @ coarse_kernel.T, plain.flatten(2).transpose(1, 2), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("factor", zt.ZOOM_FACTORS)
def test_patches_are_the_pixels_of_their_boxes(factor):
    patch, coarse = 4, 3
    size = coarse * (patch if factor == 2.0 else 2 * patch)
    images, kernel = torch.randn(2, 3, size, size), torch.randn(5, 3, patch, patch)
    fine, fine_kernel, big, big_kernel = zt.patches_and_kernels(images, kernel, factor)
    embedded = torch.cat([fine @ fine_kernel.T, big @ big_kernel.T], dim=1)  # [2, 5C, 5], in the order of token ids
    boxes = zt.token_boxes(torch.arange(5 * coarse**2), coarse, size)
    for token, (left, top, right, bottom) in enumerate(boxes.tolist()):
        pixels = images[:, :, top:bottom, left:right]
        resize = {"mode": "nearest"} if right - left < patch else {"mode": "area"}
        resized = F.interpolate(pixels, size=(patch, patch), **resize)
        expected = torch.einsum("bdhw,edhw->be", resized, kernel)
        torch.testing.assert_close(embedded[:, token], expected, atol=1e-5, rtol=1e-5)


# -- bad input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [-0.1, 1.1, float("nan")])
def test_alpha_outside_the_unit_interval_is_refused(alpha):
    with pytest.raises(ValueError, match=r"alpha must lie in \[0, 1\]"):
        zt.select_above(torch.rand(1, 4), alpha)


def test_other_bad_input_is_refused():
    with pytest.raises(ValueError, match="zoom_factor must be 2.0 or 0.5"):
        zt.coarse_scores(torch.rand(1, 4), 1.0)
    with pytest.raises(ValueError, match="side \\* side"):
        zt.coarse_scores(torch.rand(1, 5), 2.0)
    with pytest.raises(ValueError, match="even score grid"):
        zt.coarse_scores(torch.rand(1, 9), 0.5)
    for budget in (-1, 5):
        with pytest.raises(ValueError, match="budget must lie between 0 and the 4"):
            zt.select_top(torch.rand(1, 4), budget)
    with pytest.raises(ValueError, match="none, fixed, soft"):
        zt.zoom_factor_embedding(torch.tensor([4]), 8, "hard")
    order = zt.order_tokens(torch.rand(1, 4), torch.rand(1, 16), torch.ones(1, 4, dtype=torch.bool))
    for keep in (0, 17):
        with pytest.raises(ValueError, match="keep_tokens must lie between 1 and the 16"):
            zt.prune(order, keep)
    with pytest.raises(ValueError, match="prune must be one of backward, forward"):
        zt.prune(order, 3, "sideways")
