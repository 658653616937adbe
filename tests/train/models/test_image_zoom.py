"""Zoom on the level of the image: the box, the crop, and the model around them."""

from __future__ import annotations

import pytest
import timm
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.models.vision_transformer import VisionTransformer

from zpipe.train.checkpoint import Preprocessing, load_run, save_model
from zpipe.train.fit.initialise import start_from
from zpipe.train.macs import count_macs
from zpipe.train.models import ImageZoom
from zpipe.train.models.image_zoom import crop, zoom_boxes

torch.set_num_threads(1)
VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3, "num_classes": 5}


def zooming(**arguments) -> ImageZoom:
    torch.manual_seed(0)
    return ImageZoom(VisionTransformer(**VIT), **{"img_size": 32, "patch_size": 8} | arguments).eval()


def marked(*cells: tuple[int, int], side: int = 14) -> torch.Tensor:
    """One map whose cells (row, column) score 1 and all others 0."""
    scores = torch.zeros(1, side, side)
    for row, column in cells:
        scores[0, row, column] = 1
    return scores.flatten(1)


def box(scores: torch.Tensor, size: int = 224, **arguments) -> list[float]:
    return zoom_boxes(scores, size, **arguments)[0].tolist()


def test_boxes_by_hand():
    assert box(marked((2, 3), (7, 9))) == [48, 32, 160, 128]  # cells of 16 px; columns 3 .. 9, rows 2 .. 7
    assert box(marked((6, 6))) == [72, 72, 136, 136]  # one cell grows to 64 px around its centre
    assert box(marked((0, 13))) == [160, 0, 224, 64]  # and is moved into the image
    assert box(marked((6, 0), (6, 13))) == [0, 72, 224, 136]
    assert box(marked((6, 0), (6, 13)), square=True) == [0, 0, 224, 224]
    assert box(marked((2, 3), (7, 9)), square=True) == [48, 24, 160, 136]
    assert box(marked((1, 1), side=4), size=32, min_side=8) == [8, 8, 16, 16]
    assert box(marked((1, 1), side=4), size=32, min_side=32) == [0, 0, 32, 32]
    for nothing in (torch.zeros(1, 196), torch.full((1, 196), 0.7)):
        assert box(nothing) == [0, 0, 224, 224]


def test_how_many_cells_are_important():
    scores = torch.arange(196.0)[None]  # falls from the lower right
    assert box(scores, area=0.15) == [0, 160, 224, 224]  # 29 cells: two rows and one more
    assert box(scores, area=0.3) == [0, 144, 224, 224]  # 58 cells: 4 rows and two cells
    assert box(scores, area=1.0) == [0, 0, 224, 224]
    assert box(scores, area=1e-9) == [160, 160, 224, 224]  # one, at least


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 9), st.sampled_from([7, 32, 224]), st.floats(0.01, 1), st.booleans(), st.data())
def test_boxes_of_any_map(side, size, area, square, data):
    torch.manual_seed(data.draw(st.integers(0, 10**6)))
    scores = torch.randint(0, data.draw(st.integers(2, 30)), (3, side * side)).float()
    boxes = zoom_boxes(scores, size, area, square=square)
    assert boxes.shape == (3, 4) and boxes.dtype == torch.float32
    assert boxes.min() >= 0 and boxes.max() <= size
    extent = boxes[:, 2:] - boxes[:, :2]
    assert (extent >= 64 / 224 * size - 1e-3).all()
    if square:
        torch.testing.assert_close(extent[:, 0], extent[:, 1])
    best = scores.argmax(1)
    centre = torch.stack([best % side, best // side], 1) * (size / side) + size / side / 2
    inside = (centre >= boxes[:, :2] - 1e-3) & (centre <= boxes[:, 2:] + 1e-3)
    assert inside.all()
    torch.testing.assert_close(zoom_boxes(scores[1:2], size, area, square=square), boxes[1:2])
    torch.testing.assert_close(zoom_boxes(3 * scores + 1, size, area, square=square), boxes)  # order alone counts
    mirrored = zoom_boxes(scores.unflatten(1, (side, side)).flip(2).flatten(1), size, area, square=square)
    expected = torch.stack([size - boxes[:, 2], boxes[:, 1], size - boxes[:, 0], boxes[:, 3]], 1)
    torch.testing.assert_close(mirrored, expected, atol=1e-3, rtol=1e-4)


def test_crops():
    torch.manual_seed(0)
    images = torch.randn(3, 3, 32, 32)
    boxes = torch.tensor([[0.0, 0, 32, 32], [8, 4, 24, 20], [3, 0, 19, 16]])
    cropped = crop(images, boxes)
    torch.testing.assert_close(cropped[0], images[0], atol=1e-5, rtol=0)
    for b, (left, top) in ((1, (8, 4)), (2, (3, 0))):
        piece = images[b : b + 1, :, top : top + 16, left : left + 16]
        plain = F.interpolate(piece, 32, mode="bilinear", align_corners=False)[0]
        torch.testing.assert_close(cropped[b, :, 1:-1, 1:-1], plain[:, 1:-1, 1:-1], atol=1e-5, rtol=0)
    ramp = torch.arange(32.0).expand(1, 1, 32, 32) + 0.5
    stretched = crop(ramp, torch.tensor([[8.0, 2, 16, 30]]))[0, 0]
    torch.testing.assert_close(stretched, (8 + 0.25 * (torch.arange(32) + 0.5)).expand(32, 32), atol=1e-4, rtol=0)
    assert crop(images.bfloat16(), boxes).dtype == torch.bfloat16


@torch.no_grad()
def test_it_exports():
    model = zooming()
    images, scores = torch.randn(2, 3, 32, 32), torch.rand(2, 16)
    program = torch.export.export(model, (images, scores)).module()
    torch.testing.assert_close(program(images, scores), model(images, scores), atol=1e-5, rtol=0)


@pytest.mark.parametrize("combine", ["zoom", "mean"])
@torch.no_grad()
def test_the_model(combine):
    model = zooming(combine=combine)
    images, scores = torch.randn(4, 3, 32, 32), torch.rand(4, 16)
    plain = model.backbone(images)
    assert torch.equal(model(images), plain)
    zoomed = model.backbone(crop(images, zoom_boxes(scores, 32, 0.15)))
    expected = zoomed if combine == "zoom" else (plain + zoomed) / 2
    torch.testing.assert_close(model(images, scores, area=0.15), expected)
    alone = [model(images[b : b + 1], scores[b : b + 1]) for b in range(4)]
    torch.testing.assert_close(model(images, scores), torch.cat(alone), atol=1e-5, rtol=0)
    torch.testing.assert_close(model(images, scores, area=1.0), plain, atol=1e-4, rtol=0)
    counted, one = count_macs(lambda: model(images[:1], scores[:1])), count_macs(lambda: model.backbone(images[:1]))
    assert counted == model.passes * one
    other = torch.rand(4, 9)  # a grid that isn't the model's
    torch.testing.assert_close(model.boxes(other), zoom_boxes(other, 32, 0.3))


def test_gradients_reach_every_parameter():
    model = zooming(combine="mean").train()
    scores = torch.rand(2, 16, requires_grad=True)
    model(torch.randn(2, 3, 32, 32), scores).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())
    assert scores.grad is None


@torch.no_grad()
def test_any_classifier_round_trip_and_warm_start(tmp_path):
    named = {"backbone": "resnet18", "backbone_args": {"block_args": {}}, "img_size": 64, "num_classes": 5}
    model = timm.create_model("image_zoom", **named, area=0.15, combine="mean", square=True, min_side=20)
    assert model.score_grid == 4
    resnet = timm.create_model("resnet18", num_classes=5)
    torch.save(resnet.state_dict(), tmp_path / "resnet.pth")
    start_from(model, str(tmp_path / "resnet.pth"))
    images, scores = torch.randn(2, 3, 64, 64), torch.rand(2, 16)
    assert torch.equal(model.eval()(images), resnet.eval()(images))
    (tmp_path / "run").mkdir()
    save_model(tmp_path / "run", model, Preprocessing(image_size=64, mean=(0.5,) * 3, std=(0.2,) * 3))
    again = load_run(tmp_path / "run").model
    assert (again.area, again.combine, again.square, again.min_side) == (0.15, "mean", True, 20)
    assert torch.equal(again(images, scores), model(images, scores))
    assert model.no_weight_decay() == set()
    assert zooming().no_weight_decay() >= {"backbone.cls_token", "backbone.pos_embed"}
    model.reset_classifier(7)
    assert model(images).shape == (2, 7) and model.get_classifier() is model.backbone.fc


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"area": 0.0}, r"area must lie in \(0, 1\], got 0.0"),
        ({"area": 1.1}, r"area must lie in \(0, 1\], got 1.1"),
        ({"scores": torch.rand(2, 15)}, r"scores must be \[2, s \* s\], a square map for each image, got \[2, 15\]"),
        ({"scores": torch.rand(1, 16)}, r"scores must be \[2, s \* s\]"),
        ({"scores": torch.rand(2, 4, 4)}, r"scores must be \[2, s \* s\]"),
        ({"scores": torch.full((2, 16), float("nan"))}, "scores must be numbers, got NaN"),
        ({"images": torch.rand(2, 3, 32, 48)}, r"images must be \[batch, chans, 32, 32\], got \[2, 3, 32, 48\]"),
    ],
)
def test_bad_calls_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message) as caught:
        zooming()(**{"images": torch.rand(2, 3, 32, 32), "scores": torch.rand(2, 16)} | arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"combine": "max"}, "combine must be one of zoom, mean, got 'max'"),
        ({"min_side": 33}, "min_side must lie above 0 and at most at the image's 32 px, got 33"),
        ({"min_side": 0}, "min_side must lie above 0"),
        ({"area": 2.0}, "area must lie"),
        ({"patch_size": 7}, "image size 32 doesn't divide into score cells of 7 pixels"),
    ],
)
def test_bad_settings_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        zooming(**arguments)
