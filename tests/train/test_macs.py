"""The counter sees all that runs; the paper's formula leaves out what it says it does."""

from __future__ import annotations

from functools import partial

import pytest
import timm
import torch

from zpipe.train.macs import count_macs, paper_macs
from zpipe.train.models import Zoomer

torch.set_num_threads(1)
IMAGE = torch.zeros(1, 3, 224, 224)


def test_deit_small_by_count_and_by_formula():
    counted = count_macs(partial(timm.create_model("deit_small_patch16_224").eval(), IMAGE))
    assert counted / 1e9 == pytest.approx(4.599, abs=1e-3)
    n, d, depth = 197, 384, 12
    left_out = depth * n * d * d + 196 * 768 * d + 1000 * d
    assert paper_macs(n, d, depth) + left_out == counted
    assert paper_macs(196, d, depth) / 1e9 == pytest.approx(4.169, abs=1e-3)


@pytest.mark.parametrize(("num_blocks", "gmacs"), [(2, 0.5806), (4, 0.9917), (6, 1.4029)])
def test_zoomers_cost_what_table_10_says(num_blocks, gmacs):
    assert count_macs(partial(Zoomer(num_blocks).eval(), IMAGE)) / 1e9 == pytest.approx(gmacs, abs=1e-4)


@pytest.mark.parametrize("factor", [2.0, 0.5])
def test_zoomvit_by_count_by_sum_and_by_formula(factor):
    model = timm.create_model("zoomvit_tiny_patch16_224", zoom_factor=factor, depth=3).eval()
    scores = torch.rand(1, 196)
    for alpha in (0.2, 0.9, 1.0):
        tokens = int(model.token_counts(scores, alpha))
        zoomed = (tokens - model.coarse_grid**2) // 3
        counted = count_macs(partial(model, IMAGE, scores, alpha=alpha))
        assert counted == model.macs(zoomed)
        fine = 4 * zoomed * (192 if factor == 2.0 else 768)  # a half-size patch has a quarter of the pixels
        embeddings = 192 * (fine + (model.coarse_grid**2 - zoomed) * 768)
        n = tokens + 1
        assert counted == paper_macs(n, 192, 3) + 3 * n * 192**2 + embeddings + 192 * 1000
