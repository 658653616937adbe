"""LF-ViT: its authors' numbers and costs, and where the region lies."""

from __future__ import annotations

from functools import partial

import pytest
import timm
import torch
from golden_models import check_golden, golden
from hypothesis import given
from hypothesis import strategies as st
from tiny_cfvit import GRIDS, few, pixels, small

from zpipe.train.macs import count_macs
from zpipe.train.models import LFViT, load_release
from zpipe.train.models.lfvit import region_corner

torch.set_num_threads(1)


@pytest.mark.parametrize(("name", "region"), [("lfvit_golden", 5), ("lfvit_golden_m4", 4)])
@torch.no_grad()
def test_the_authors_numbers(name, region):
    check_golden(name, "lfvit", region_size=region)


@pytest.mark.parametrize(
    ("img_size", "region", "tokens", "gmacs"),
    [(224, 4, 95, 3.316), (224, 5, 116, 3.803), (224, 6, 146, 4.512), (288, 8, 253, 7.981)],
)
def test_costs_of_the_paper(img_size, region, tokens, gmacs):
    model = timm.create_model("lfvit_small", img_size=img_size, region_size=region).eval()
    assert model.lengths()[1] == tokens
    assert model.macs() / 1e9 == pytest.approx(gmacs, abs=5e-4)
    assert count_macs(partial(model, torch.zeros(1, 3, img_size, img_size))) == model.macs()


@GRIDS
@pytest.mark.parametrize("selection", LFViT.SELECTIONS)
@torch.no_grad()
def test_refined_cells_lie_in_one_region(img_size, selection):
    model, images = small(LFViT, img_size=img_size, region_size=4), pixels(6, img_size)
    n = model.coarse_grid
    scores = torch.rand(6, n * n)
    for given_scores in (None, scores):
        chosen = model.refined(images, given_scores, selection=selection).view(6, n, n)
        assert chosen.sum((1, 2)).tolist() == [15] * 6
        for cells in chosen:
            rows, columns = cells.any(1).nonzero(), cells.any(0).nonzero()
            assert rows.max() - rows.min() < 4 and columns.max() - columns.min() < 4
        counted = count_macs(partial(model, images, given_scores, selection=selection))
        assert counted == 6 * model.macs()


@few
@given(st.integers(1, 7), st.integers(1, 7), st.integers(0, 2**31))
def test_regions_by_brute_force(side, size, seed):
    size = min(size, side)
    scores = torch.randint(0, 50, (3, side * side), generator=torch.Generator().manual_seed(seed)).float()
    grids = scores.view(3, side, side)
    for selection, sign in (("region", 1), ("negative", -1)):
        rows, columns = region_corner(scores, size, selection)
        for grid, row, column in zip(grids, rows, columns, strict=True):
            sums = grid.unfold(0, size, 1).unfold(1, size, 1).sum((2, 3)) * sign
            assert sums[row, column] >= sums.max() - 1e-3
    for selection, sign in (("maximum", 1), ("minimum", -1)):
        rows, columns = region_corner(scores, size, selection)
        for grid, row, column in zip(grids, rows, columns, strict=True):
            window = grid[row : row + size, column : column + size]
            assert window.shape == (size, size) and (sign * window).max() == (sign * grid).max()
    rows, columns = region_corner(scores, size, "random")
    assert min(rows.min(), columns.min()) >= 0 and max(rows.max(), columns.max()) <= side - size


@torch.no_grad()
def test_of_a_region_the_best_cells_are_refined():
    model, images = small(LFViT, region_size=3, keep=4 / 9), pixels(1)
    scores = torch.zeros(1, 6, 6)
    scores[0, 2:5, 1:4] = torch.arange(1.0, 10).view(3, 3) / 10
    expected = torch.zeros(1, 6, 6, dtype=torch.bool)
    expected[0, 3, 3] = expected[0, 4, 1:4] = True
    assert torch.equal(model.refined(images, scores.flatten(1)), expected.flatten(1))


@torch.no_grad()
def test_the_whole_grid_as_region_is_cf_vit():
    model, images = small(LFViT, region_size=6, keep=0.5), pixels()
    torch.testing.assert_close(model(images), small()(images), atol=1e-5, rtol=1e-5)


@GRIDS
@torch.no_grad()
def test_alone_in_a_batch_and_with_early_exit(img_size):
    model, images = small(LFViT, img_size=img_size), pixels(5, img_size)
    coarse, fine = model(images, return_stages=True)
    for b in range(5):
        torch.testing.assert_close(model(images[b : b + 1])[0], fine[b], atol=1e-5, rtol=1e-5)
    confidence = coarse.softmax(1).amax(1)
    for threshold in [0.0, *confidence.tolist(), 1.0]:
        logits, exited = model(images, exit_threshold=threshold)
        assert torch.equal(exited, confidence >= threshold)
        torch.testing.assert_close(logits, torch.where(exited[:, None], coarse, fine), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_compiled_in_one_graph():
    model, images = small(LFViT, depth=1), pixels()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(images), model(images), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("region", [0, 7, 8])
def test_regions_that_do_not_fit(region):
    with pytest.raises(ValueError, match=f"between 1 and the 6 coarse cells a side, got {region}"):
        small(LFViT, region_size=region)
    model = small(LFViT)
    model.region_size = region
    with pytest.raises(ValueError, match="region_size must lie"):
        model(pixels(1))


def test_bad_input():
    with pytest.raises(ValueError, match="selection must be one of region, negative, maximum, minimum, random"):
        small(LFViT)(pixels(1), selection="global")
    _, state, _ = golden("lfvit_golden")
    with pytest.raises(ValueError, match="give num_heads, region_size by keyword"):
        load_release(state, model="lfvit", num_heads=3)
    with pytest.raises(ValueError, match="region_size must lie between 1 and the 7"):
        load_release(state, model="lfvit", num_heads=3, region_size=8)
