"""Perturbation metrics: curves by hand, SaCo against its definition, and both against what is known to be right."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from zpipe.train.evaluation.faithfulness import Probe, agreement, area, emptied, perturbation_curves, saco

pytestmark = pytest.mark.usefixtures("one_thread")


class Bright(torch.nn.Module):
    """Class 1 to the extent that a given cell of 4 x 4 is bright."""

    def __init__(self, cell: int) -> None:
        super().__init__()
        self.cell = cell

    def forward(self, images):
        mean = torch.nn.functional.avg_pool2d(images, images.shape[-1] // 4).mean(1).flatten(1)[:, self.cell]
        return torch.stack([torch.zeros_like(mean), 10 * mean], dim=1)


class Linear(torch.nn.Module):
    """The log-odds of class 1 are the sum of the pixels, weighted by `weights` [S, S]."""

    def __init__(self, weights: torch.Tensor) -> None:
        super().__init__()
        self.weights = weights

    def forward(self, images):
        odds = (images.mean(1) * self.weights).sum((1, 2))
        return torch.stack([torch.zeros_like(odds), odds], dim=1)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 15), st.integers(1, 16), st.integers(0, 99))
def test_curves_fall_and_rise_where_the_deciding_cell_is(cell, steps, seed):
    torch.manual_seed(seed)
    images, empty = torch.ones(2, 3, 8, 8), torch.zeros(2, 3, 8, 8)
    maps = torch.rand(2, 4, 4)
    probe = Probe(model=Bright(cell), images=images, empty=empty, targets=torch.tensor([1, 0]))
    deletion, insertion = perturbation_curves(probe, maps, steps)
    full, none = float(torch.tensor(10.0).sigmoid()), 0.5
    for b, (there, gone) in enumerate(((full, none), (1 - full, none))):
        rank = int((maps[b].flatten() > maps[b].flatten()[cell]).sum())
        for step in range(steps + 1):
            taken = rank < round(step / steps * 16)
            assert deletion[b, step] == pytest.approx(gone if taken else there, abs=1e-4)
            assert insertion[b, step] == pytest.approx(there if taken else gone, abs=1e-4)


def test_insertion_is_least_relevant_first_removal_read_backwards():
    torch.manual_seed(0)
    images, empty, maps = torch.randn(3, 3, 8, 8), torch.randn(3, 3, 8, 8), torch.rand(3, 4, 4)
    probe = Probe(model=Linear(torch.randn(8, 8)), images=images, empty=empty, targets=torch.tensor([1, 0, 1]))
    _, insertion = perturbation_curves(probe, maps, 8)
    least_first, _ = perturbation_curves(probe, -maps, 8)
    torch.testing.assert_close(insertion.flip(1), least_first)
    torch.testing.assert_close(area(insertion), area(least_first))


def test_the_whole_image_and_the_baseline_are_asked_about_once():
    asked = []

    def model(images):
        asked.append(len(images))
        return images.mean((2, 3))

    probe = Probe(
        model=model, images=torch.rand(2, 3, 8, 8), empty=torch.zeros(2, 3, 8, 8), targets=torch.tensor([0, 1])
    )
    for maps in (torch.rand(2, 4, 4), torch.rand(2, 2, 2)):
        perturbation_curves(probe, maps, 4)
        saco(probe, maps, 4)
    assert asked == [2] * (2 + 2 * (2 * 3 + 4))


def test_areas():
    assert area(torch.tensor([[1.0, 1.0, 1.0], [0.0, 0.5, 1.0], [1.0, 0.0, 0.0]])).tolist() == [1.0, 0.5, 0.25]


def test_emptied_images_keep_their_colours_and_nothing_else():
    torch.manual_seed(0)
    images = torch.randn(2, 3, 32, 32) + torch.tensor([1.0, 0.0, -1.0]).view(1, 3, 1, 1)
    blurred = emptied(images, "blur")
    assert blurred.std(dim=(2, 3)).max() < 0.2 < images.std(dim=(2, 3)).min()
    torch.testing.assert_close(blurred.mean((2, 3)), images.mean((2, 3)), atol=0.15, rtol=0)
    assert not emptied(images, "mean").any()
    flat = torch.full((1, 3, 16, 16), 0.7)
    torch.testing.assert_close(emptied(flat, "blur"), flat)


def test_the_agreement_of_a_worked_example():
    # Pairs: (1, 2) differ by 2 and agree, (1, 3) by 3 and disagree, (2, 3) by 1 and disagree.
    salience, drop = torch.tensor([[4.0, 2.0, 1.0]]), torch.tensor([[0.2, 0.1, 0.3]])
    assert agreement(salience, drop).item() == pytest.approx((2 - 3 - 1) / 6)
    assert agreement(salience, torch.zeros(1, 3)).item() == 1  # equal drops are no violation
    assert agreement(torch.ones(1, 3), drop).item() == 0


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 999), st.integers(2, 20))
def test_saco_is_its_definition(seed, groups):
    """Algorithm 1 of the paper, written with loops over the pairs."""
    torch.manual_seed(seed)
    maps, weights = torch.rand(2, 4, 4), torch.randn(8, 8)
    images, empty, targets = torch.randn(2, 3, 8, 8), torch.zeros(2, 3, 8, 8), torch.tensor([1, 0])
    model = Linear(weights)
    found = saco(Probe(model=model, images=images, empty=empty, targets=targets), maps, groups)
    assert (found.abs() <= 1 + 1e-12).all()
    count = min(groups, 16)
    for b in range(2):
        before = model(images[b : b + 1]).softmax(1)[0, targets[b]]
        cells = maps[b].flatten().argsort(descending=True).tolist()
        salience, drop = [], []
        for group in range(count):
            own = cells[round(group / count * 16) : round((group + 1) / count * 16)]
            changed = images[b : b + 1].clone()
            for cell in own:
                y, x = divmod(cell, 4)
                changed[:, :, 2 * y : 2 * y + 2, 2 * x : 2 * x + 2] = 0
            salience.append(float(maps[b].flatten()[own].mean()))
            drop.append(float(before - model(changed).softmax(1)[0, targets[b]]))
        total = sum(salience[i] - salience[j] for i in range(count) for j in range(i + 1, count))
        signed = sum(
            (salience[i] - salience[j]) * (1 if drop[i] >= drop[j] else -1)
            for i in range(count)
            for j in range(i + 1, count)
        )
        assert found[b].item() == pytest.approx(signed / total, abs=1e-5)


def test_saco_of_right_reversed_and_indifferent_maps():
    weights = torch.arange(16.0).view(4, 4)
    model = Linear(weights.repeat_interleave(2, 0).repeat_interleave(2, 1) / 100)
    images = torch.ones(1, 3, 8, 8)
    probe = Probe(model=model, images=images, empty=torch.zeros_like(images), targets=torch.tensor([1]))
    assert saco(probe, weights[None], 8).item() == 1
    assert saco(probe, -weights[None], 8).item() == -1
    assert saco(probe, torch.ones(1, 4, 4), 8).item() == 0


def test_images_of_a_batch_do_not_influence_each_other():
    torch.manual_seed(0)
    images, maps, targets = torch.randn(4, 3, 8, 8), torch.rand(4, 4, 4), torch.tensor([0, 1, 1, 0])
    model = Linear(torch.randn(8, 8))

    def values(rows):
        probe = Probe(model=model, images=images[rows], empty=emptied(images[rows], "blur"), targets=targets[rows])
        return torch.cat([*perturbation_curves(probe, maps[rows], 5), saco(probe, maps[rows], 5)[:, None]], dim=1)

    alone = torch.cat([values(slice(row, row + 1)) for row in range(4)])
    torch.testing.assert_close(values(slice(None)), alone)


def test_deletion_is_what_quantus_calls_pixel_flipping():
    """Quantus removes single values, so that a cell is a pixel here, of images of one channel."""
    quantus = pytest.importorskip("quantus")
    torch.manual_seed(0)
    images, maps, targets = torch.rand(5, 1, 8, 8) + 0.1, torch.rand(5, 8, 8), torch.tensor([0, 1, 1, 0, 1])
    model = Linear(torch.randn(8, 8)).eval()
    probe = Probe(model=model, images=images, empty=torch.zeros_like(images), targets=targets)
    deletion, _ = perturbation_curves(probe, maps, 8)
    flipping = quantus.PixelFlipping(
        features_in_step=8, perturb_baseline=0.0, normalise=False, disable_warnings=True, display_progressbar=False
    )
    theirs = flipping(
        model=model,
        x_batch=images.numpy(),
        y_batch=targets.numpy(),
        a_batch=maps[:, None].numpy(),
        softmax=True,
        device="cpu",
    )
    torch.testing.assert_close(deletion[:, 1:].double(), torch.tensor(theirs).double(), atol=1e-5, rtol=0)
