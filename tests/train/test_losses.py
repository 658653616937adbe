"""The zoomer's loss and the map metrics: known values, limits, and what they must not depend on."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from zpipe.train.evaluation import metrics
from zpipe.train.losses import CoarseToFineLoss, TokenLabelLoss, ZoomerLoss, dice_loss, distribution, kl_divergence

torch.set_num_threads(1)
few = settings(max_examples=40, deadline=None)
maps = st.lists(st.floats(0, 1, width=32), min_size=8, max_size=8).map(lambda cells: torch.tensor([cells]))


# -- loss terms --------------------------------------------------------------------------------------------------------


def test_kl_known_values():
    even, peak = torch.tensor([[0.5, 0.5]]), torch.tensor([[1.0, 0.0]])
    assert kl_divergence(peak, even, eps=1e-9).item() == pytest.approx(math.log(2), abs=1e-6)
    # KL(even || peak) is infinite without eps: here ln(1/2) - (ln(1.1/1.2) + ln(0.1/1.2)) / 2.
    expected = math.log(0.5) - (math.log(1.1 / 1.2) + math.log(0.1 / 1.2)) / 2
    assert kl_divergence(even, peak, eps=0.1).item() == pytest.approx(expected, abs=1e-6)


def test_an_empty_map_is_the_uniform_distribution():
    assert distribution(torch.zeros(1, 4)).tolist() == [[0.25] * 4]
    assert kl_divergence(torch.zeros(2, 4), torch.full((2, 4), 0.3)).item() == pytest.approx(0, abs=1e-7)


@few
@given(maps, maps)
def test_kl_is_never_negative_and_zero_for_equal_maps(first, second):
    assert distribution(first).sum().item() == pytest.approx(1, abs=1e-5)
    assert kl_divergence(first, second).item() >= -1e-6
    assert kl_divergence(first, first).item() == 0


def test_dice_known_values():
    ones, left, right = torch.tensor([[1.0, 1.0]]), torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    assert dice_loss(ones, left).item() == pytest.approx(1 / 3, abs=1e-5)
    assert dice_loss(left, right).item() == pytest.approx(1, abs=1e-5)
    assert dice_loss(torch.zeros(1, 2), torch.zeros(1, 2)).item() == 0


@few
@given(maps, maps)
def test_dice_lies_in_the_unit_interval_and_is_zero_for_equal_soft_maps(first, second):
    assert -1e-6 <= dice_loss(first, second).item() <= 1 + 1e-6
    assert dice_loss(first, first).item() == pytest.approx(0, abs=1e-6)


# -- the sum of Eq. 5 --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("direction", ["student||teacher", "teacher||student"])
def test_total_is_the_weighted_sum_and_the_direction_is_kept(direction):
    student, teacher = torch.rand(3, 16), torch.rand(3, 16) ** 4
    total, terms = ZoomerLoss(w_kl=0.7, w_dice=0.2, kl_direction=direction)(student, teacher)
    assert terms["mse"].item() == pytest.approx((student - teacher).pow(2).mean().item(), rel=1e-5)
    assert terms["dice"].item() == pytest.approx(dice_loss(student, teacher).item(), rel=1e-5)
    first, second = (student, teacher) if direction.startswith("student") else (teacher, student)
    assert terms["kl"].item() == pytest.approx(kl_divergence(first, second).item(), rel=1e-5)
    assert kl_divergence(first, second).item() != pytest.approx(kl_divergence(second, first).item(), rel=1e-3)
    assert total.item() == pytest.approx((terms["mse"] + 0.7 * terms["kl"] + 0.2 * terms["dice"]).item(), rel=1e-5)


def test_the_mean_over_a_batch_is_the_mean_of_its_images():
    student, teacher = torch.rand(5, 16), torch.rand(5, 16)
    alone = [ZoomerLoss()(student[i : i + 1], teacher[i : i + 1])[0].item() for i in range(5)]
    assert ZoomerLoss()(student, teacher)[0].item() == pytest.approx(sum(alone) / 5, rel=1e-5)


@pytest.mark.parametrize("direction", ["student||teacher", "teacher||student"])
def test_gradients_are_finite_with_empty_maps_and_saturated_students(direction):
    student = torch.stack([torch.zeros(16), torch.ones(16), torch.rand(16)]).requires_grad_()
    teacher = torch.stack([torch.zeros(16), torch.zeros(16), torch.rand(16).round()])
    total, terms = ZoomerLoss(kl_direction=direction)(student, teacher)
    total.backward()
    assert total.isfinite() and student.grad.isfinite().all() and student.grad.abs().sum() > 0
    assert not any(term.requires_grad for term in terms.values())


def test_half_precision_input_is_computed_in_float32():
    student, teacher = torch.rand(2, 16).half(), torch.rand(2, 16).half()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        total, _ = ZoomerLoss()(student, teacher)
    assert total.dtype == torch.float32
    assert total.item() == pytest.approx(ZoomerLoss()(student.float(), teacher.float())[0].item(), rel=1e-6)


@pytest.mark.parametrize("direction", ["student||teacher", "teacher||student"])
def test_minimising_it_finds_the_teacher(direction):
    torch.manual_seed(0)
    teacher = torch.rand(2, 16) ** 3
    raw = torch.zeros(2, 16, requires_grad=True)
    optimizer = torch.optim.Adam([raw], lr=0.1)
    for _ in range(300):
        optimizer.zero_grad()
        ZoomerLoss(kl_direction=direction)(raw.sigmoid(), teacher)[0].backward()
        optimizer.step()
    assert (raw.sigmoid() - teacher).abs().max().item() < 0.02


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="kl_direction must be one of"):
        ZoomerLoss(kl_direction="both")
    with pytest.raises(ValueError, match="must not be negative"):
        ZoomerLoss(w_kl=-1)
    for shapes in (((2, 16), (2, 9)), ((2, 4, 4), (2, 4, 4))):
        with pytest.raises(ValueError, match=r"\[batch, cells\]"):
            ZoomerLoss()(*(torch.rand(shape) for shape in shapes))


# -- two stages --------------------------------------------------------------------------------------------------------


def test_coarse_to_fine_known_values():
    coarse, fine = torch.tensor([[0.0, 0.0], [math.log(3), 0.0]]), torch.tensor([[math.log(3), 0.0]] * 2)
    kl = (0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)) / 2  # KL(fine || coarse), 0 for the second
    ce = -(math.log(0.75) + math.log(0.25)) / 2
    target = torch.tensor([0, 1])
    assert CoarseToFineLoss()(coarse, fine, target).item() == pytest.approx(ce + kl, abs=1e-6)
    soft = torch.eye(2)[target]
    assert CoarseToFineLoss()(coarse, fine, soft).item() == pytest.approx(ce + kl, abs=1e-6)
    both = ce - (math.log(0.5) + math.log(0.25)) / 2
    assert CoarseToFineLoss(coarse="labels")(coarse, fine, target).item() == pytest.approx(both, abs=1e-6)
    smoothed = torch.tensor([[0.95, 0.05], [0.05, 0.95]])
    by_index = CoarseToFineLoss(label_smoothing=0.1)(coarse, fine, target).item()
    assert by_index == pytest.approx(CoarseToFineLoss()(coarse, fine, smoothed).item(), abs=1e-6)


def test_the_fine_stage_learns_from_labels_alone():
    coarse, fine = torch.randn(4, 5, requires_grad=True), torch.randn(4, 5, requires_grad=True)
    target = torch.randint(5, (4,))
    CoarseToFineLoss()(coarse, fine, target).backward()
    gradient = fine.grad.clone()
    fine.grad = None
    torch.nn.functional.cross_entropy(fine, target).backward()
    torch.testing.assert_close(gradient, fine.grad)
    assert coarse.grad.abs().sum() > 0


def test_coarse_to_fine_in_half_precision_and_bad_input():
    coarse, fine, target = torch.randn(2, 3).bfloat16(), torch.randn(2, 3).bfloat16(), torch.tensor([0, 2])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = CoarseToFineLoss()(coarse, fine, target)
    assert loss.dtype == torch.float32 and loss == CoarseToFineLoss()(coarse.float(), fine.float(), target)
    with pytest.raises(ValueError, match="coarse must be one of fine, labels"):
        CoarseToFineLoss(coarse="both")
    with pytest.raises(ValueError, match=r"label_smoothing must lie in \[0, 1\]"):
        CoarseToFineLoss(label_smoothing=1.5)
    with pytest.raises(ValueError, match=r"\[batch, classes\] alike"):
        CoarseToFineLoss()(coarse, fine[:1], target)
    with pytest.raises(ValueError, match=r"target must be \[2\] or \[2, 3\]"):
        CoarseToFineLoss()(coarse, fine, target[:1])


# -- metrics -----------------------------------------------------------------------------------------------------------


def test_errors_for_each_map():
    first, second = torch.tensor([[0.0, 1.0], [0.5, 0.5]]), torch.tensor([[0.0, 0.0], [0.0, 1.0]])
    assert metrics.mse(first, second).tolist() == [0.5, 0.25]
    assert metrics.mae(first, second).tolist() == [0.5, 0.5]


def test_spearman_known_values():
    first = torch.tensor([[1.0, 2, 3, 4], [1, 2, 3, 4], [1, 1, 2, 2], [5, 5, 5, 5]])
    second = torch.tensor([[2.0, 1, 4, 3], [4, 3, 2, 1], [1, 2, 3, 4], [1, 2, 3, 4]])
    got = metrics.spearman(first, second).tolist()
    assert got[:3] == pytest.approx([0.6, -1.0, 2 / math.sqrt(5)], abs=1e-9)
    assert math.isnan(got[3])


@few
@given(st.permutations(range(10)), st.permutations(range(10)))
def test_spearman_without_ties_is_the_textbook_formula(first, second):
    squares = sum((a - b) ** 2 for a, b in zip(first, second, strict=True))
    x, y = torch.tensor([first]).float(), torch.tensor([second]).float()
    assert metrics.spearman(x.exp(), y).item() == pytest.approx(1 - 6 * squares / (10 * 99), abs=1e-9)


def test_topk_overlap():
    first, second = torch.tensor([[4.0, 3, 2, 1], [1, 1, 1, 1]]), torch.tensor([[1.0, 4, 3, 2], [4, 3, 2, 1]])
    assert metrics.topk_overlap(first, second, 2).tolist() == [0.5, 1.0]
    assert metrics.topk_overlap(first, second, 4).tolist() == [1.0, 1.0]
    for k in (0, 5):
        with pytest.raises(ValueError, match="k must lie between 1 and the 4"):
            metrics.topk_overlap(first, second, k)


@pytest.mark.parametrize("targets", ["indices", "distributions"])
def test_token_labels_in_half_precision_are_computed_in_float32(targets):
    torch.manual_seed(0)
    logits, dense = 8 * torch.randn(6, 10), 8 * torch.randn(6, 4, 10)
    labels = torch.arange(6) if targets == "indices" else torch.rand(6, 10).softmax(dim=1)
    token_labels = torch.rand(6, 4, 10).softmax(dim=2)
    loss = TokenLabelLoss()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = loss(logits.bfloat16(), dense.bfloat16(), labels, token_labels)
    exact = loss(logits.bfloat16().double(), dense.bfloat16().double(), labels, token_labels)
    assert low.dtype == torch.float32
    torch.testing.assert_close(low, exact.float())
