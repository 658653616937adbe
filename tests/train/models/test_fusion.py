"""Score fusion, and LV-ViT: the models that need a regular grid."""

from __future__ import annotations

import pytest
import timm
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.models.vision_transformer import VisionTransformer

from zpipe.train.losses import TokenLabelLoss, relevance_token_labels
from zpipe.train.macs import count_macs
from zpipe.train.models.fusion import FusedViT, fuse
from zpipe.train.models.lvvit import LVViT

torch.set_num_threads(1)
VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3, "num_classes": 5}
SWIN = {"img_size": 64, "patch_size": 4, "window_size": 4, "embed_dim": 12, "depths": (1, 1), "num_heads": (2, 2)}


def fused(kind: str) -> tuple[FusedViT, int]:
    """A backbone of that kind with score fusion on 4 x 4 score cells, and its image size."""
    torch.manual_seed(0)
    if kind == "vit":
        backbone, side = VisionTransformer(**VIT), 32
    elif kind == "lvvit":
        backbone, side = LVViT(**VIT), 32
    else:
        backbone, side = timm.create_model("swin_tiny_patch4_window7_224", **SWIN, num_classes=5), 64
    return FusedViT(backbone, img_size=side, patch_size=side // 4).eval(), side


KINDS = pytest.mark.parametrize("kind", ["vit", "lvvit", "swin"])


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 3), st.integers(1, 4), st.booleans(), st.integers(0, 10**6))
def test_equation_13(batch, grid, empty, seed):
    torch.manual_seed(seed)
    quarters, scores = torch.randn(batch, 5, 2 * grid, 2 * grid), torch.rand(batch, 2 * grid, 2 * grid)
    if empty:
        scores[:, :2, :2] = 0
    got = fuse(quarters, scores)
    for y in range(grid):
        for x in range(grid):
            t = quarters[:, :, 2 * y : 2 * y + 2, 2 * x : 2 * x + 2].flatten(2)  # [B, E, 4]
            s = scores[:, 2 * y : 2 * y + 2, 2 * x : 2 * x + 2].flatten(1)  # [B, 4]
            weight = torch.full_like(s, 0.25) if empty and y == x == 0 else s / s.sum(1, keepdim=True)
            torch.testing.assert_close(got[:, :, y, x], (t * weight[:, None]).sum(2), atol=1e-5, rtol=1e-5)


@KINDS
@torch.no_grad()
def test_with_nothing_zoomed_it_is_the_backbone(kind):
    model, side = fused(kind)
    images, scores = torch.randn(3, 3, side, side), torch.rand(3, 16)
    expected = model.backbone(images)
    for zoom in ({}, {"scores": scores, "alpha": 1.0}, {"scores": scores, "budget": 0}):
        assert torch.equal(model(images, **zoom), expected)
    assert (model(images, scores, budget=4) - expected).abs().max() > 1e-3
    assert torch.equal(model.backbone(images), expected)  # no state of the zoom is left
    alone = torch.cat([model(images[b : b + 1], scores[b : b + 1], alpha=0.5) for b in range(3)])
    torch.testing.assert_close(model(images, scores, alpha=0.5), alone, atol=1e-5, rtol=1e-5)


@KINDS
@torch.no_grad()
def test_the_tokens_of_zoomed_cells_are_fused_and_the_others_are_not(kind):
    model, side = fused(kind)
    images = torch.randn(2, 3, side, side)
    scores = torch.rand(2, 16)
    seen = []
    projection = model.backbone.patch_embed.proj
    projection.register_forward_hook(lambda module, inputs, output: seen.append((inputs[0], output)))
    model(images, scores, budget=3)
    inputs, got = seen[0]
    coarse = F.conv2d(inputs, projection.weight, projection.bias, stride=projection.stride)
    patch = projection.kernel_size[0]
    grid = got.shape[-1]
    enlarged = F.interpolate(inputs, scale_factor=2, mode="nearest")
    quarters = F.conv2d(enlarged, projection.weight, projection.bias, stride=patch)  # on the enlarged image
    read = F.interpolate(scores.view(2, 1, 4, 4), 2 * grid, mode="bilinear")[:, 0]
    expected = fuse(quarters, read)
    for b in range(2):
        zoomed = torch.zeros(16, dtype=torch.bool)
        zoomed[scores[b].argsort(descending=True)[:3]] = True
        mask = zoomed.view(4, 4).repeat_interleave(grid // 4, 0).repeat_interleave(grid // 4, 1)
        torch.testing.assert_close(got[b, :, mask], expected[b, :, mask], atol=1e-5, rtol=1e-5)
        assert torch.equal(got[b, :, ~mask], coarse[b, :, ~mask])


def test_gradients_reach_every_parameter():
    model, side = fused("swin")
    model.train()
    model(torch.randn(2, 3, side, side), torch.rand(2, 16), budget=4).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


@torch.no_grad()
def test_registry_on_swin_tiny():
    model = timm.create_model("fused_vit").eval()
    images, scores = torch.randn(1, 3, 224, 224), torch.rand(1, 196)
    assert model(images, scores, alpha=0.5).shape == (1, 1000)
    assert model.token_counts(scores, alpha=0.5).tolist() == [56 * 56]
    plain = count_macs(lambda: model.backbone(images))
    patches = 56 * 56 * 48 * 96
    assert count_macs(lambda: model(images, scores, alpha=0.5)) == plain + patches  # the half-size patches
    model.reset_classifier(7)
    assert model(images).shape == (1, 7) and model.get_classifier() is model.backbone.get_classifier()
    assert any("relative_position_bias_table" in name for name in model.no_weight_decay())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"alpha": 1.5}, r"alpha must lie in \[0, 1\]"),
        ({}, "either alpha or budget"),
        ({"budget": "3 cells"}, "budget must lie between 0 and the 16 score cells, got '3 cells'"),
        ({"scores": None, "alpha": 7.0}, r"alpha must lie in \[0, 1\]"),
        ({"budget": 17}, "budget must lie between 0 and the 16 score cells"),
        ({"alpha": 0.5, "scores": torch.rand(2, 9)}, r"scores must be \[2, 16\]"),
        ({"alpha": 0.5, "scores": torch.full((2, 16), float("nan"))}, "got NaN"),
        ({"scores": None, "budget": 3}, "needs scores"),
        ({"alpha": 0.5, "images": torch.rand(2, 3, 32, 48)}, r"images must be \[batch, chans, 32, 32\]"),
    ],
)
def test_bad_calls_are_refused(arguments, message):
    model, _ = fused("vit")
    with pytest.raises(ValueError, match=message) as caught:
        model(**{"images": torch.rand(2, 3, 32, 32), "scores": torch.rand(2, 16)} | arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("scale", [1e-2, 1e-6, 1e-12])
def test_tiny_scores_weigh_in_half_precision(scale):
    torch.manual_seed(0)
    quarters, scores = torch.randn(2, 5, 8, 8), scale * torch.rand(2, 8, 8)
    torch.testing.assert_close(fuse(quarters.half(), scores).float(), fuse(quarters, scores), atol=5e-3, rtol=0)


def test_weights_of_the_backbone_are_not_part_of_the_description():
    with pytest.raises(ValueError, match="pretrained_cfg_overlay is not for here"):
        FusedViT("deit_tiny_patch16_224", backbone_args={"pretrained_cfg_overlay": {}})
    with pytest.raises(TypeError, match="pretrained"):
        FusedViT("deit_tiny_patch16_224", pretrained=True)


def test_backbones_without_a_grid_are_refused():
    with pytest.raises(ValueError, match="no patch_embed.proj"):
        FusedViT(timm.create_model("resnet18"))
    with pytest.raises(ValueError, match="doesn't divide into score cells of 7"):
        FusedViT(VisionTransformer(**VIT), img_size=32, patch_size=7)
    with pytest.raises(ValueError, match="must divide into even patches"):
        LVViT(img_size=30, patch_size=4)


# -- LV-ViT ------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_lvvit_small_has_the_size_of_its_paper():
    model = timm.create_model("lvvit_small").eval()
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(26.2, abs=0.06)
    images = torch.randn(1, 3, 224, 224)
    assert count_macs(lambda: model(images)) / 1e9 == pytest.approx(6.6, abs=0.06)
    logits, dense = model(images, return_dense=True)
    assert (logits.shape, dense.shape) == ((1, 1000), (1, 196, 1000))
    torch.testing.assert_close(model(images), logits + 0.5 * dense.amax(1))
    bare = LVViT(**VIT | {"num_classes": 0})
    assert bare(torch.randn(2, 3, 32, 32)).shape == (2, 24)


def test_token_label_loss_is_its_two_terms():
    torch.manual_seed(0)
    logits, dense = torch.randn(3, 5), torch.randn(3, 4, 5)
    labels, token_labels = torch.tensor([0, 3, 4]), torch.rand(3, 4, 5).softmax(2)
    patches = -(token_labels * dense.log_softmax(2)).sum(2).mean()
    expected = F.cross_entropy(logits, labels) + 0.5 * patches
    torch.testing.assert_close(TokenLabelLoss()(logits, dense, labels, token_labels), expected)
    assert TokenLabelLoss(0)(logits, dense, labels, token_labels) == F.cross_entropy(logits, labels)
    with pytest.raises(ValueError, match="alike"):
        TokenLabelLoss()(logits, dense, labels, token_labels[:, :3])
    with pytest.raises(ValueError, match="must not be negative"):
        TokenLabelLoss(-1)


def test_token_labels_from_maps():
    maps = torch.tensor([[[1.0, 0.0], [0.5, 0.0]]])
    got = relevance_token_labels(maps, torch.tensor([2]), 4, 2)
    assert got[0].tolist() == [[0, 0, 1, 0], [0.25] * 4, [0.125, 0.125, 0.625, 0.125], [0.25] * 4]
    assert relevance_token_labels(maps, torch.tensor([2]), 4, 1)[0, 0, 2] == pytest.approx(0.375 + 0.625 / 4)
    with pytest.raises(ValueError, match="normalise them"):
        relevance_token_labels(2 * maps, torch.tensor([2]), 4, 2)
