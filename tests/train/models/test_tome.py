"""Token merging: the matching against one written with loops, what merging preserves, what the model costs."""

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
from zpipe.train.models import ToMeViT
from zpipe.train.models.tome import match, merge, most_merged

torch.set_num_threads(1)
VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 3, "num_classes": 5}
BACKBONES = ("deit_tiny_patch16_224", "deit_tiny_distilled_patch16_224", "vit_small_patch14_reg4_dinov2")
BACKBONE = pytest.mark.parametrize("backbone", BACKBONES)


def merging(backbone: str = BACKBONES[0], **arguments) -> ToMeViT:
    torch.manual_seed(0)
    vit = timm.create_model(backbone, **VIT)
    for name, parameter in vit.named_parameters():
        if name.endswith("gamma"):  # LayerScale starts so small that no token would matter
            torch.nn.init.ones_(parameter)
    return ToMeViT(vit, **arguments).eval()


def by_loops(metric: torch.Tensor, r: int, prefix: int) -> tuple[dict[int, int], list[int]]:
    """Of one image [N, D]: which place goes into which, and the new order of those that stay."""
    places = range(len(metric))
    edges = []
    for a in places[prefix + prefix % 2 :: 2]:
        likeness = {b: float(F.cosine_similarity(metric[a], metric[b], dim=0)) for b in places[1::2] if b >= prefix}
        if likeness:
            partner = max(likeness, key=likeness.get)
            edges.append((likeness[partner], a, partner))
    gone = {a: b for _, a, b in sorted(edges, reverse=True)[:r]}
    left = [a for a in places[::2] if a not in gone] + list(places[1::2])
    return gone, [p for p in left if p < prefix] + [p for p in left if p >= prefix]


@settings(max_examples=80, deadline=None)
@given(st.integers(1, 3), st.integers(0, 5), st.integers(0, 14), st.data())
def test_matching_is_the_one_of_the_paper(batch, prefix, patches, data):
    length = max(prefix + patches, 2)
    r = data.draw(st.integers(0, most_merged(length, prefix)))
    torch.manual_seed(data.draw(st.integers(0, 10**6)))
    metric = torch.randn(batch, length, 4)
    matching = match(metric, r, prefix)
    for b in range(batch):
        gone, order = by_loops(metric[b], r, prefix)
        assert dict(zip(matching.source[b].tolist(), matching.target[b].tolist(), strict=True)) == gone
        assert matching.stay[b].tolist() == order


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 3), st.integers(1, 2), st.integers(2, 14), st.data())
def test_merging_keeps_the_total_and_takes_weighted_means(batch, prefix, patches, data):
    length = prefix + patches
    r = data.draw(st.integers(0, most_merged(length, prefix)))
    torch.manual_seed(data.draw(st.integers(0, 10**6)))
    x, size = torch.randn(batch, length, 3), torch.randint(1, 5, (batch, length)).float()
    matching = match(torch.randn(batch, length, 4), r, prefix)
    merged, sizes = merge(x, size, matching)
    assert merged.shape == (batch, length - r, 3) and torch.equal(sizes.sum(1), size.sum(1))
    total = (x * size[..., None]).sum(1)
    torch.testing.assert_close((merged * sizes[..., None]).sum(1), total, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(merged[:, :prefix], x[:, :prefix], atol=1e-6, rtol=1e-5)  # protected
    for b in range(batch):
        for new, old in enumerate(matching.stay[b].tolist()):
            members = [old, *matching.source[b][matching.target[b] == old].tolist()]
            mean = (x[b, members] * size[b, members, None]).sum(0) / size[b, members].sum()
            torch.testing.assert_close(merged[b, new], mean, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_it_exports():
    model = merging(r=3)
    images = torch.randn(2, 3, 32, 32)
    program = torch.export.export(model, (images,)).module()
    torch.testing.assert_close(program(images), model(images), atol=1e-5, rtol=0)


@BACKBONE
@torch.no_grad()
def test_without_merging_it_is_the_backbone(backbone):
    model = merging(backbone)
    images = torch.randn(3, 3, 32, 32)
    assert torch.equal(model(images), model.backbone(images))
    assert not torch.allclose(model(images, r=3), model.backbone(images))


@BACKBONE
@pytest.mark.parametrize("r", [1, 4])
@torch.no_grad()
def test_cost_length_and_batch(backbone, r):
    model = merging(backbone)
    images = torch.randn(4, 3, 32, 32)
    logits = model(images, r=r)
    assert count_macs(lambda: model(images[:1], r=r)) == model.macs(r)
    assert count_macs(lambda: model(images[:1], r=0)) == model.macs()
    assert model.forward_features(images, r).shape[1] == model.backbone.num_prefix_tokens + 16 - 3 * r
    torch.testing.assert_close(logits, torch.cat([model(i[None], r=r) for i in images]), atol=1e-5, rtol=0)


@torch.no_grad()
def test_merging_equal_tokens_changes_nothing():
    """Proportional attention: a merged token counts as often as the equal ones that went into it."""
    model = merging()
    model.backbone.pos_embed[:, 1:] = 0
    flat = torch.randn(2, 3, 1, 1).expand(-1, -1, 32, 32)
    torch.testing.assert_close(model(flat, r=4), model.backbone(flat), atol=1e-5, rtol=0)


def test_deit_small_costs_what_its_table_says():
    """The paper's appendix has 2.7 G for DeiT-S at r = 13; matching is a hundredth of it."""
    with torch.device("meta"):
        model = timm.create_model("tome_vit", r=13)
    assert model.macs() / 1e9 == pytest.approx(2.7, abs=0.06)
    with pytest.raises(ValueError, match="r must lie between 0 and 15 with 196 patches and 12 blocks, got 16"):
        model.macs(16)


def test_gradients_reach_every_parameter():
    model = merging(r=3).train()
    model(torch.randn(2, 3, 32, 32)).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())


@torch.no_grad()
def test_bfloat16_autocast():
    model = merging()
    images = torch.randn(2, 3, 32, 32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(images, r=3)
    assert logits.dtype == torch.bfloat16
    torch.testing.assert_close(logits.float(), model(images, r=3), atol=0.15, rtol=0)


@torch.no_grad()
def test_round_trip_and_warm_start(tmp_path):
    arguments = {key: value for key, value in VIT.items() if key not in ("img_size", "num_classes")}
    named = {"backbone": BACKBONES[0], "backbone_args": arguments, "img_size": 32, "num_classes": 5}
    model = timm.create_model("tome_vit", **named, r=2)
    vit = VisionTransformer(**VIT)
    torch.save(vit.state_dict(), tmp_path / "vit.pth")
    start_from(model, str(tmp_path / "vit.pth"))
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(model.eval()(images, r=0), vit.eval()(images))
    (tmp_path / "run").mkdir()
    save_model(tmp_path / "run", model, Preprocessing(image_size=32, mean=(0.5,) * 3, std=(0.2,) * 3))
    again = load_run(tmp_path / "run").model
    assert again.r == 2 and torch.equal(again(images), model(images))
    assert model.no_weight_decay() == {f"backbone.{name}" for name in vit.no_weight_decay()}
    model.reset_classifier(7)
    assert model(images).shape == (2, 7) and model.get_classifier() is model.backbone.head


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"r": 5}, "r must lie between 0 and 4 with 16 patches and 3 blocks, got 5"),
        ({"r": -1}, "r must lie between 0 and 4"),
        ({"images": torch.rand(2, 3, 32, 48)}, r"images must be \[batch, 3, 32, 32\], got \[2, 3, 32, 48\]"),
    ],
)
def test_bad_calls_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message) as caught:
        merging()(**{"images": torch.rand(2, 3, 32, 32)} | arguments)
    assert "\n" not in str(caught.value)


def test_bad_settings_are_refused():
    with pytest.raises(ValueError, match="r must lie between 0 and 4"):
        merging(r=5)
    with pytest.raises(ValueError, match="needs a class token that is classified, got global_pool='avg'"):
        ToMeViT(VisionTransformer(**VIT, global_pool="avg"))
    with pytest.raises(ValueError, match="ResNet is no plain timm VisionTransformer; choose"):
        ToMeViT(timm.create_model("resnet18"))
    with pytest.raises(ValueError, match="r must lie between 0 and the 2 that 5 tokens can lose, got 3"):
        match(torch.rand(1, 5, 2), 3)
