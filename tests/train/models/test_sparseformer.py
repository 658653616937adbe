"""SparseFormer: what its authors' code printed, the sizes it should have, and where its tokens look."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.optim import create_optimizer_v2

from zpipe.train.checkpoint import Preprocessing, load_run, save_model
from zpipe.train.macs import count_macs
from zpipe.train.models import SparseFormer, load_release
from zpipe.train.models.sparseformer_sampling import adjust_rois, place_points, sample

torch.set_num_threads(1)
GOLDEN = Path(__file__).parents[2] / "golden" / "sparseformer_golden.npz"
MEAN = torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1)
STD = torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1)
CONFIG = {"num_heads": 64, "focus_repeats": 4}
SMALL = {"conv_dim": 8, "num_tokens": 9, "num_points": 16, "focus_dim": 16, "cortex_dim": 32, "cortex_depth": 2}
SMALL |= {"num_heads": 4, "num_classes": 5}


def golden() -> tuple[torch.Tensor, dict[str, torch.Tensor], torch.Tensor]:
    """Logits, state dict, and the images as the model sees them."""
    with np.load(GOLDEN) as file:
        values = {key: torch.from_numpy(file[key]) for key in file.files}
    state = {key[2:]: value for key, value in values.items() if key.startswith("w/")}
    pixels = values["images_uint8"].float().repeat_interleave(4, 2).repeat_interleave(4, 3)
    return values["logits"], state, (F.avg_pool2d(pixels, 5, 1, 2) / 255 - MEAN) / STD


def small(**changes) -> SparseFormer:
    """A small model whose tokens have begun to move."""
    torch.manual_seed(0)
    model = SparseFormer(**SMALL | changes).eval()
    for name, parameter in model.named_parameters():
        if "adjust.weight" in name or "generate.weight" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


@torch.no_grad()
def test_the_authors_numbers(tmp_path):
    logits, state, images = golden()
    model = load_release(state, "sparseformer", **CONFIG)
    torch.testing.assert_close(model(images), logits, atol=1e-4, rtol=0)
    assert logits.std() > 0.5 and not model.training
    # In batches of another size sums may run in another order, as on the authors' machine: the same bound. Rounding
    # grows on the way, since places are computed in float32, and each repeat looks where the one before it decided.
    torch.testing.assert_close(torch.cat([model(image[None]) for image in images]), model(images), atol=1e-4, rtol=0)
    assert count_macs(lambda: model(images[:1])) == model.macs()
    later = {"token_roi.weight": "initial_roi.weight", "token_embedding.weight": "initial_embedding.weight"}
    renamed = {later.get(key, key).replace("tuo_proj", "out_proj"): value for key, value in state.items()}
    torch.save({"model": {f"module.{key}": value for key, value in renamed.items()}}, tmp_path / "checkpoint.pth")
    assert torch.equal(load_release(tmp_path / "checkpoint.pth", "sparseformer", **CONFIG)(images), model(images))


@pytest.mark.parametrize(
    ("change", "config", "message"),
    [
        ({"head.classifier.weight": None}, {}, "has nothing for head.weight; expected a SparseFormer v1"),
        ({"layers.3.ffn.0.weight": None}, {}, r"has nothing for cortex.1.norm_mlp.weight \(1 such\)"),
        ({"layers.3.ffn.0.weight": torch.zeros(7)}, {}, r"layers.3.ffn.0.weight is \[7\], expected \[128\]"),
        ({"layers.3.norm2.weight": torch.zeros(7)}, {}, "layers.3.norm2.weight is not known"),
        ({}, {"num_heads": 5}, "focus_dim must divide by 4 and by num_heads 5, got 64"),
        ({}, {"focus_repeats": None}, "give num_heads, focus_repeats by keyword"),
    ],
)
def test_other_checkpoints_are_refused_in_one_line(change, config, message):
    state = {key: value for key, value in (golden()[1] | change).items() if value is not None}
    config = {key: value for key, value in (CONFIG | config).items() if value is not None}
    with pytest.raises(ValueError, match=message) as caught:
        load_release(state, "sparseformer", **config)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("size", "parameters", "gmacs"), [("tiny", 31.52, 2.178), ("small", 47.58, 3.990), ("base", 81.08, 7.987)]
)
def test_sizes(size, parameters, gmacs):
    with torch.device("meta"):
        model = timm.create_model(f"sparseformer_{size}")
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 2) == parameters
    assert round(model.macs() / 1e9, 3) == gmacs


@torch.no_grad()
@pytest.mark.parametrize("size", [(40, 40), (64, 64), (37, 50), (4, 4)])
def test_any_image_size(size):
    model = small()
    images = torch.randn(3, 3, *size)
    logits = model(images)
    assert logits.shape == (3, 5)
    torch.testing.assert_close(model(images.flip(0)).flip(0), logits, atol=1e-5, rtol=0)
    if size[0] == size[1]:
        assert count_macs(lambda: model(images[:1])) == model.macs(size[0])


def test_how_it_starts():
    torch.manual_seed(0)
    model = timm.create_model("sparseformer_tiny", cortex_depth=2)
    first, *_, last = model.glimpses(torch.randn(2, 3, 64, 64))
    torch.testing.assert_close(first.rois, last.rois, atol=1e-5, rtol=0)  # adjustments are 0
    centres = (first.rois[0, :, :2] + first.rois[0, :, 2:]) / 2
    torch.testing.assert_close(first.rois[0, :, 2:] - first.rois[0, :, :2], torch.full((49, 2), 0.5))
    ticks = torch.linspace(0.25, 0.75, 7)
    torch.testing.assert_close(centres, torch.cartesian_prod(ticks, ticks).flip(1))
    assert abs(model.token_embedding.std() - 0.88) < 0.03 and model.token_embedding.abs().max() <= 2  # cut at two
    for unit, dim in ((model.focus, 256), (model.cortex[0], 512)):
        sampler = unit.sampler
        for norm in (sampler.norm_adjust, sampler.norm_offset, sampler.norm_mix):
            assert torch.equal(norm.weight, torch.full((dim,), dim**-0.5))
        offsets = sampler.offset_bias.detach().view(36, 2)
        cells = (torch.arange(6) + 0.5) / 6 - 0.5
        torch.testing.assert_close(offsets, torch.cartesian_prod(cells, cells).flip(1))
        channel, point = sampler.generate.bias.detach().split([96**2, 36**2])
        for values, side in ((channel, 96), (point, 36)):  # Xavier: uniform, the bound is sqrt(3 / side)
            assert abs(values.std() * side**0.5 - 1) < 0.05 and values.abs().max() <= (3 / side) ** 0.5
        assert not sampler.generate.weight.any() and not sampler.adjust.weight.any() and sampler.offset.weight.any()
    assert model.cortex[1].sampler is None
    assert SparseFormer(**SMALL | {"num_tokens": 6, "num_points": 6}).token_roi[4:].tolist() == [[0, 0, 1, 1]] * 2


@torch.no_grad()
def test_glimpses_are_what_the_forward_pass_saw():
    model = small()
    images = torch.randn(2, 3, 32, 32)
    stages = model.glimpses(images)
    assert len(stages) == 5  # four repeats, and the cortex
    assert stages[0].rois.shape == (2, 9, 4) and stages[0].points.shape == (2, 9, 16, 2)
    moved = [not torch.equal(a.rois, b.rois) for a, b in itertools.pairwise(stages)]
    assert all(moved)
    for rois, points in stages:  # the points are centred on the RoI; a third of a standard deviation from it
        centre, extent = (rois[..., :2] + rois[..., 2:]) / 2, rois[..., 2:] - rois[..., :2]
        torch.testing.assert_close(points.mean(2), centre, atol=1e-5, rtol=0)
        torch.testing.assert_close(points.std(2), extent / 3, atol=1e-5, rtol=1e-4)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10**6))
def test_rois_and_points_follow_shift_and_scale(seed):
    """Moving and scaling the frame moves and scales what equations 3, 7 and 8 give."""
    torch.manual_seed(seed)
    corner = torch.rand(2, 3, 2)
    rois, deltas = torch.cat([corner, corner + 0.1 + torch.rand(2, 3, 2)], 2), 0.3 * torch.randn(2, 3, 4)
    shift, scale = torch.randn(2), 0.5 + torch.rand(2)
    offsets = torch.randn(2, 3, 7, 2)
    adjusted = adjust_rois(rois, deltas)
    moved = adjust_rois(rois * scale.repeat(2) + shift.repeat(2), deltas)
    torch.testing.assert_close(moved, adjusted * scale.repeat(2) + shift.repeat(2), atol=1e-4, rtol=1e-4)
    points = place_points(adjusted, offsets)
    torch.testing.assert_close(place_points(moved, 3 * offsets - 1), points * scale + shift, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(adjust_rois(rois, torch.zeros(2, 3, 4)), rois)


def test_sampling_reads_cell_centres_and_clamps_its_gradient():
    features = torch.randn(2, 3, 4, 8)
    y, x = torch.meshgrid((torch.arange(4) + 0.5) / 4, (torch.arange(8) + 0.5) / 8, indexing="ij")
    points = torch.stack([x, y], 2).flatten(0, 1).expand(2, 1, 32, 2).clone().requires_grad_()
    sampled = sample(features, points)
    torch.testing.assert_close(sampled[:, 0].transpose(1, 2).unflatten(2, (4, 8)), features)
    (100 * sampled).sum().backward()
    assert points.grad.abs().amax((0, 1, 2)).tolist() == [1 / 8, 1 / 4]
    assert not sample(features, points.detach() + 2).any()


@torch.no_grad()
def test_bfloat16_autocast_samples_in_float32():
    _, state, images = golden()
    model = load_release(state, "sparseformer", **CONFIG)
    expected, exact = model(images), model.glimpses(images)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits, rough = model(images), model.glimpses(images)
    assert logits.dtype == torch.bfloat16
    assert (logits.float() - expected).abs().mean() < 0.05 * expected.std()
    for a, b in zip(exact, rough, strict=True):
        assert b.points.dtype == b.rois.dtype == torch.float32
        assert (a.points - b.points).abs().mean() < 0.02


def test_gradients_reach_every_parameter_in_half_precision_too():
    model = small(drop_path_rate=0.2).train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(torch.randn(4, 3, 32, 32)).float().square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all() and parameter.grad.any(), name


@torch.no_grad()
def test_it_exports():
    model, images = small(), torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(torch.export.export(model, (images,)).module()(images), model(images), atol=1e-5, rtol=0)


def test_optimizer_groups_and_round_trip(tmp_path):
    model = timm.create_model("sparseformer_tiny", **SMALL)
    optimizer = create_optimizer_v2(model, "adamw", lr=1e-3, weight_decay=0.05)
    free = {id(p) for group in optimizer.param_groups if not group["weight_decay"] for p in group["params"]}
    names = {name for name, p in model.named_parameters() if id(p) in free}
    assert {"token_roi", "focus.sampler.offset_bias", "focus.sampler.point_bias", "norm.weight"} <= names
    assert not {"token_embedding", "focus.sampler.generate.weight", "stem.weight"} & names
    by_layer = create_optimizer_v2(model, "adamw", lr=1.0, layer_decay=0.5).param_groups
    scales = {id(parameter): group["lr_scale"] for group in by_layer for parameter in group["params"]}
    scale = {name: scales[id(parameter)] for name, parameter in model.named_parameters()}
    order = ["stem.weight", "focus.fc1.weight", "bridge.0.weight", "cortex.0.fc1.weight", "cortex.1.fc1.weight"]
    assert [scale[name] for name in order] == sorted({scale[name] for name in order})
    assert scale["token_roi"] == scale["stem.weight"] and scale["head.weight"] == 1
    save_model(tmp_path, model, Preprocessing(image_size=32, mean=(0.5,) * 3, std=(0.2,) * 3))
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(load_run(tmp_path).model(images), model.eval()(images))
    model.reset_classifier(7)
    assert model(images).shape == (2, 7)
    model.reset_classifier(0)
    assert model(images).shape == (2, 32)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"focus_dim": 18}, "focus_dim must divide by 4 and by num_heads 4, got 18"),
        ({"num_points": 1}, "num_points must be at least 2"),
        ({"cortex_depth": 0}, "must be at least 1, got cortex_depth 0"),
    ],
)
def test_bad_settings_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        SparseFormer(**SMALL | arguments)


@pytest.mark.parametrize("shape", [(2, 1, 32, 32), (3, 32, 32), (0, 3, 32, 32), (1, 3, 2, 32)])
def test_bad_images_are_refused(shape):
    with pytest.raises(ValueError, match=r"images must be \[batch, 3, height, width\], >= 4 px a side, got"):
        small()(torch.zeros(shape))
