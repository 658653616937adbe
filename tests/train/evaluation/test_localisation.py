"""Agreement with boxes and masks: small cases by hand, and the definitions written out."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage
from sklearn.metrics import average_precision_score

from zpipe.train.evaluation.localisation import (
    IGNORED,
    THRESHOLDS,
    average_precision,
    box_iou,
    box_overlaps,
    has_area,
    hits,
    pointing_game,
    segment,
    upsample,
)

pytestmark = pytest.mark.usefixtures("one_thread")
NONE = [torch.nan] * 4


def test_pointing_game_on_a_grid_that_is_not_square():
    maps = torch.zeros(1, 2, 4)
    maps[0, 1, 2] = 1.0  # centre at (5/8, 3/4)
    maps = maps.expand(5, -1, -1)
    boxes = torch.tensor(
        [
            [0.5, 0.5, 0.75, 1.0],
            [0.625, 0.75, 1.0, 1.0],  # on its corner
            [0.0, 0.0, 0.62, 1.0],
            [0.5, 0.0, 1.0, 0.74],
            [0.74, 0.5, 0.76, 1.0],  # would hold it if x and y were swapped
        ]
    )
    assert pointing_game(maps, boxes).tolist() == [True, True, False, False, False]
    flat = pointing_game(torch.zeros(1, 2, 4), torch.tensor([[0.0, 0.0, 0.2, 0.3]]))
    assert flat.tolist() == [True]  # equal cells: the first counts


def test_any_of_several_boxes_counts_and_nan_is_no_box():
    maps = torch.zeros(3, 2, 2)
    maps[:, 0, 1] = 1
    hit, miss = [0.6, 0.0, 1.0, 0.5], [0.0, 0.0, 0.4, 1.0]
    boxes = torch.tensor([[miss, hit], [miss, NONE], [NONE, hit]])
    assert pointing_game(maps, boxes).tolist() == [True, False, True]
    assert has_area(boxes).tolist() == [[True, True], [True, False], [False, True]]
    assert not has_area(torch.tensor([0.5, 0.0, 0.5, 1.0]))


def test_the_pointing_game_of_quantus():
    """Its maps and masks have pixels, so that a cell is a pixel, and boxes end between pixels."""
    quantus = pytest.importorskip("quantus")
    generator = np.random.default_rng(0)
    maps = generator.random((40, 6, 6)).astype(np.float32)
    edges = np.sort(generator.choice(7, (40, 2, 2)), axis=2)
    edges[..., 1] += edges[..., 0] == edges[..., 1]
    masks = np.zeros((40, 1, 6, 6))
    for mask, ((x1, x2), (y1, y2)) in zip(masks, edges, strict=True):
        mask[0, y1:y2, x1:x2] = 1
    empty = ~masks.any((1, 2, 3))
    masks, maps, edges = masks[~empty], maps[~empty], edges[~empty]
    game = quantus.PointingGame(normalise=False, disable_warnings=True, display_progressbar=False)
    theirs = game(
        model=torch.nn.Identity().eval(),
        x_batch=np.repeat(masks, 3, axis=1),
        y_batch=np.zeros(len(masks), int),
        a_batch=maps[:, None],
        s_batch=masks,
        device="cpu",
    )
    boxes = torch.tensor(edges.transpose(0, 2, 1).reshape(-1, 4) / 6)
    assert pointing_game(torch.tensor(maps), boxes).tolist() == [bool(hit) for hit in theirs]
    assert 0 < np.mean(theirs) < 1


def test_upsampled_maps_span_0_to_1():
    large = upsample(torch.tensor([[[0.0, 1.0], [2.0, 3.0]], [[5.0, 5.0], [5.0, 5.0]]]), 8)
    assert large.shape == (2, 8, 8) and large[0].min() == 0 and large[0].max() == 1
    assert not large[1].any()
    assert (large[0].diff(dim=0) >= 0).all() and (large[0].diff(dim=1) >= 0).all()


def test_iou_of_boxes():
    found = box_iou(np.array([[0, 0, 2, 2], [5, 5, 6, 6]], float), np.array([[1, 1, 3, 3], [0, 0, 2, 2]], float))
    np.testing.assert_allclose(found, [[1 / 7, 1], [0, 0]])


def test_overlaps_of_one_and_of_two_blobs():
    maps = torch.zeros(2, 16, 16)
    maps[0, 2:8, 4:12] = 1  # rows 2 to 8, columns 4 to 12
    maps[1, 2:8, 4:12] = 1
    maps[1, 12:14, 1:3] = 0.5  # a smaller, fainter part
    big, small = [4 / 16, 2 / 16, 12 / 16, 8 / 16], [1 / 16, 12 / 16, 3 / 16, 14 / 16]
    at = {threshold: place for place, threshold in enumerate(THRESHOLDS)}
    one = box_overlaps(maps, torch.tensor([big, big]), 16)
    assert one.largest[0].tolist() == one.best[0].tolist() == [1.0] * len(THRESHOLDS)
    other = box_overlaps(maps, torch.tensor([small, small]), 16)
    assert other.largest[1].max() == 0
    assert other.best[1, at[0.48]] == 1 and other.best[1, at[0.5]] == 0  # above the threshold, not on it
    both = box_overlaps(maps, torch.tensor([[small, big], [small, NONE]]), 16)
    assert both.largest[:, at[0.3]].tolist() == [1, 0] and both.best[:, at[0.3]].tolist() == [1, 1]
    nothing = box_overlaps(torch.ones(1, 4, 4), torch.tensor([big]), 16)
    assert not nothing.best.any()


@pytest.mark.parametrize("power", [1, 6])
def test_overlaps_are_those_of_whole_thresholded_maps(power):
    """The definition without any short cut: label the whole map at each threshold."""
    torch.manual_seed(power)
    maps, boxes = torch.rand(3, 5, 7) ** power, torch.tensor([[[0.1, 0.2, 0.6, 0.5], [0.5, 0.4, 0.9, 1.0]]] * 3)
    found = box_overlaps(maps, boxes, 30)
    for image, values in enumerate(upsample(maps, 30).numpy()):
        for place, threshold in enumerate(THRESHOLDS):
            labels, count = ndimage.label(values > threshold, np.ones((3, 3)))
            parts = []
            for part in range(1, count + 1):
                rows, columns = np.nonzero(labels == part)
                box = np.array([[columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]]) / 30
                parts.append((len(rows), box_iou(box, boxes[image].numpy()).max()))
            largest = {iou for size, iou in parts if size == max(parts)[0]}
            assert min(abs(found.largest[image, place].item() - iou) for iou in largest) < 1e-5
            assert found.best[image, place].item() == pytest.approx(max(iou for _, iou in parts), abs=1e-5)


def test_parts_are_connected_at_their_corners():
    maps = torch.zeros(1, 4, 4)
    maps[0, 0, 0] = maps[0, 1, 1] = 1
    assert box_overlaps(maps, torch.tensor([[0.0, 0.0, 0.5, 0.5]]), 4).largest[0, 25] == 1


def test_the_best_part_is_never_worse_than_the_largest():
    torch.manual_seed(0)
    found = box_overlaps(torch.rand(8, 7, 7), torch.tensor([[0.2, 0.3, 0.7, 0.9]] * 8), 28)
    assert (found.best >= found.largest).all() and (found.best > found.largest).any()
    alone = box_overlaps(torch.rand(1, 7, 7), torch.tensor([[0.2, 0.3, 0.7, 0.9]]), 28)
    assert alone.best.shape == (1, len(THRESHOLDS))


def test_hits_at_levels():
    reached = hits(torch.tensor([[0.1, 0.5], [0.8, 0.3]]), (0.3, 0.5))
    assert reached.tolist() == [[[False, True], [False, True]], [[True, True], [True, False]]]


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 9_999), st.integers(2, 40), st.integers(1, 6))
def test_average_precision_is_that_of_scikit_learn(seed, count, levels):
    generator = np.random.default_rng(seed)
    scores = generator.integers(0, levels, (3, count)).astype(np.float32)  # many are equal
    right = generator.random((3, count)) < 0.4
    right[:, 0] = True
    found = average_precision(torch.tensor(scores), torch.tensor(right))
    expected = [average_precision_score(truth, values) for truth, values in zip(right, scores, strict=True)]
    np.testing.assert_allclose(found, expected, atol=1e-12)


def test_segmentation_by_hand():
    # The map is 1 on the left half; the object is the left half of the upper half.
    maps = torch.tensor([[1.0, 1.0, 0.0, 0.0]] * 4)[None]
    masks = torch.zeros(1, 4, 4, dtype=torch.uint8)
    masks[0, :2, :2] = 1
    found = segment(maps, masks)
    assert found.accuracy.item() == 12 / 16
    assert found.intersection.tolist() == [[8, 4]] and found.union.tolist() == [[12, 8]]
    # Half of all entries rank first, 4 + 8 of their 16 are right; the other half holds 4.
    assert found.average_precision.item() == pytest.approx((12 * 12 / 16 + 4 * 16 / 32) / 16)
    masks[0, 2:] = IGNORED
    perfect = segment(maps, masks)
    assert perfect.accuracy.item() == perfect.average_precision.item() == 1
    assert perfect.intersection.tolist() == perfect.union.tolist() == [[4, 4]]


def test_segmentation_is_the_protocol_written_with_numpy():
    """Threshold at the mean, average precision of both classes' pixels together, counts for the mean IoU."""
    generator = np.random.default_rng(0)
    maps = torch.tensor(generator.random((4, 7, 7)), dtype=torch.float32)
    masks = torch.tensor(generator.integers(0, 3, (4, 28, 28)), dtype=torch.uint8)
    found = segment(maps, masks)
    for b, (values, mask) in enumerate(zip(upsample(maps, 28).numpy(), masks.numpy(), strict=True)):
        counts = mask != IGNORED
        guess, truth = (values > values.mean())[counts], (mask == 1)[counts]
        assert found.accuracy[b].item() == pytest.approx(np.mean(guess == truth))
        for kind, (one, other) in enumerate(((~guess, ~truth), (guess, truth))):
            assert found.intersection[b, kind] == (one & other).sum() and found.union[b, kind] == (one | other).sum()
        scores = np.concatenate([1 - values[counts], values[counts]])
        expected = average_precision_score(np.concatenate([~truth, truth]), scores)
        assert found.average_precision[b].item() == pytest.approx(expected)
