"""The zoomer: the paper's sizes, its output, and that a frozen one stays as it was trained."""

from __future__ import annotations

import pytest
import torch
from pretend_cuda import host
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from zpipe.train.models.zoomer import Zoomer

torch.set_num_threads(1)


@pytest.mark.parametrize(("blocks", "params", "gmacs"), [(2, 0.3114, 0.581), (4, 0.8371, 0.992), (6, 2.9369, 1.403)])
def test_sizes_of_table_10(blocks, params, gmacs):
    zoomer = Zoomer(blocks).eval()
    assert sum(p.numel() for p in zoomer.parameters()) / 1e6 == pytest.approx(params, abs=5e-5)
    # The counter sees convolutions and matrix products, two operations for each multiply-add.
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        scores = zoomer(torch.rand(1, 3, 224, 224))
    assert counter.get_total_flops() / 2e9 == pytest.approx(gmacs, abs=5e-4)
    assert scores.shape == (1, 196)


@pytest.mark.parametrize(("size", "grid", "width"), [(32, 8, 16), (56, 7, 8), (65, 4, 8)])
def test_scores_lie_in_the_unit_interval_at_any_image_size(size, grid, width):
    scores = Zoomer(4, grid, width=width)(50 * torch.randn(3, 3, size, size))
    assert scores.shape == (3, grid * grid)
    assert 0 <= scores.min() < scores.max() <= 1


@torch.no_grad()
def test_the_map_is_rectified_before_the_projection():
    zoomer = Zoomer(2, 4, width=8).eval()
    nn.init.constant_(zoomer.reduce.bias, -1e4)
    scores = zoomer(torch.randn(2, 3, 32, 32))
    torch.testing.assert_close(scores, zoomer.project.bias.sigmoid().expand(2, -1))


def test_gradients_reach_every_parameter():
    torch.manual_seed(0)
    zoomer = Zoomer(4, 4, width=8)
    nn.init.constant_(zoomer.reduce.bias, 0.5)  # keeps the ReLU before the projection open
    for module in zoomer.modules():  # the last BatchNorm of a block starts at zero, which blocks its gradient
        if isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)
    zoomer(torch.randn(4, 3, 32, 32)).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in zoomer.parameters())


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_scores_under_autocast_are_as_fine_as_float32(cuda, device):
    torch.manual_seed(0)
    zoomer, images = Zoomer(2, 14, width=8).eval().to(device), torch.randn(4, 3, 64, 64)
    with torch.no_grad(), torch.autocast(device, dtype=torch.bfloat16):
        scores = host(zoomer(images.to(device)))
    assert scores.dtype == torch.float32
    assert all(len(row.unique()) > 180 for row in scores)  # of 196; bfloat16 tells 8 apart
    assert zoomer.cpu().double()(images.double()).dtype == torch.float64
    assert zoomer.bfloat16()(images.bfloat16()).dtype == torch.float32


def test_a_frozen_zoomer_stays_in_eval_whatever_its_owner_does():
    zoomer = Zoomer(2, 4, width=8).freeze()
    owner = nn.Sequential(zoomer).train()
    before = {name: value.clone() for name, value in zoomer.state_dict().items()}
    first = owner(torch.randn(4, 3, 32, 32))
    assert not zoomer.training and not first.requires_grad
    assert all(torch.equal(value, before[name]) for name, value in zoomer.state_dict().items())
    assert not any(module.training for module in zoomer.modules())


def test_a_zoomer_that_is_not_frozen_follows_train():
    zoomer = Zoomer(2, 4, width=8).eval().train()
    before = zoomer.trunk[1].running_mean.clone()
    zoomer(torch.randn(4, 3, 32, 32))
    assert not torch.equal(zoomer.trunk[1].running_mean, before)


@pytest.mark.parametrize("kwargs", [{"num_blocks": 3}, {"num_blocks": 8}, {"grid": 0}, {"width": 0}])
def test_bad_sizes_are_refused(kwargs):
    with pytest.raises(ValueError, match=next(iter(kwargs))):
        Zoomer(**kwargs)
