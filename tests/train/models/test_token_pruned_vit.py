"""Token pruning: which tokens stay, what stays the same, what it costs."""

from __future__ import annotations

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.models.vision_transformer import VisionTransformer

from zpipe.train.checkpoint import Preprocessing, load_run, save_model
from zpipe.train.fit.initialise import start_from
from zpipe.train.macs import count_macs
from zpipe.train.models import TokenPrunedViT
from zpipe.train.models.backbone import read_scores
from zpipe.train.models.scores import class_attention
from zpipe.train.models.token_pruned_vit import prune_tokens

torch.set_num_threads(1)
VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 4, "num_heads": 3, "num_classes": 5}
BACKBONES = {
    "deit": "deit_tiny_patch16_224",
    "deit3": "deit3_small_patch16_224",
    "distilled": "deit_tiny_distilled_patch16_224",
    "mean": "vit_base_patch16_clip_224",
    "registers": "vit_small_patch14_reg4_dinov2",
}
EXTRA = {"mean": {"global_pool": "avg", "fc_norm": True, "pre_norm": False}}


def pruned(kind: str = "deit", **arguments) -> TokenPrunedViT:
    torch.manual_seed(0)
    vit = timm.create_model(BACKBONES[kind], **VIT | EXTRA.get(kind, {}))
    torch.nn.init.normal_(vit.cls_token)  # or all images' class tokens would attend much alike
    for name, parameter in vit.named_parameters():
        if name.endswith("gamma"):  # LayerScale starts so small that no token would matter
            torch.nn.init.ones_(parameter)
    return TokenPrunedViT(vit, **{"prune_block": 2} | arguments).eval()


@pytest.mark.parametrize("kind", BACKBONES)
@torch.no_grad()
def test_keeping_all_it_is_the_backbone(kind):
    model = pruned(kind)
    images, scores = torch.randn(3, 3, 32, 32), torch.rand(3, 16)
    expected = model.backbone(images)
    torch.testing.assert_close(model(images, scores, keep=1.0), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(model(images, keep=1.0), expected, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(model(images, scores, keep=0.5), expected)


@pytest.mark.parametrize("kind", BACKBONES)
@pytest.mark.parametrize("scored", [True, False])
@torch.no_grad()
def test_cost_and_batch(kind, scored):
    model = pruned(kind)
    images, scores = torch.randn(4, 3, 32, 32), torch.rand(4, 16) if scored else None
    for setting in ({"keep": 0.3}, {"keep_tokens": 1}, {"keep_tokens": 16}, {}):
        one = None if scores is None else scores[:1]
        counted = count_macs(lambda one=one, setting=setting: model(images[:1], one, **setting))
        assert counted == model.macs(**setting, scored=scored)
        alone = [model(images[b : b + 1], None if scores is None else scores[b : b + 1], **setting) for b in range(4)]
        torch.testing.assert_close(model(images, scores, **setting), torch.cat(alone), atol=1e-5, rtol=0)


@torch.no_grad()
def test_it_prunes_after_the_sixth_block_and_keeps_58_of_196():
    model = timm.create_model("token_pruned_vit", backbone_args={"embed_dim": 12, "num_heads": 3}).eval()
    lengths = []
    for block in model.backbone.blocks:
        block.register_forward_pre_hook(lambda _, inputs: lengths.append(inputs[0].shape[1]))
    model(torch.randn(1, 3, 224, 224), torch.rand(1, 196))
    assert lengths == [197] * 6 + [59] * 6
    assert [model.resolve_keep(share) for share in (1e-6, 0.15, 0.29, 0.5, 1)] == [1, 29, 56, 98, 196]


@torch.no_grad()
def test_small_deit_costs_what_the_counter_says():
    with torch.device("meta"):
        model = timm.create_model("token_pruned_vit", num_classes=1000)
    assert round(model.macs() / 1e9, 3) == 2.971
    assert model.macs(keep=1.0) == pytest.approx(4.599e9, rel=1e-3)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 3), st.integers(0, 2), st.integers(1, 20), st.data())
def test_the_best_stay_in_their_order(batch, prefix, patches, data):
    count = data.draw(st.integers(1, patches))
    torch.manual_seed(data.draw(st.integers(0, 10**6)))
    scores = torch.randint(0, 4, (batch, patches)).float()  # with ties
    x = torch.arange(prefix + patches).float().expand(batch, -1)[..., None]
    kept = prune_tokens(x, scores, count)[..., 0].long()
    for row, score in zip(kept.tolist(), scores.tolist(), strict=True):
        best = sorted(sorted(range(patches), key=lambda i: (-score[i], i))[:count])
        assert row == [*range(prefix), *(prefix + i for i in best)]


@torch.no_grad()
def test_a_pruned_patch_no_longer_matters_and_a_kept_one_does():
    model, scores = pruned(prune_block=1), torch.zeros(1, 16)
    scores[0, :4] = 1
    seen = []
    model.backbone.blocks[1].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    images = torch.randn(1, 3, 32, 32)
    model(images, scores, keep_tokens=4)
    after = model.backbone.blocks[0](model.backbone._pos_embed(model.backbone.patch_embed(images)))
    assert torch.equal(seen[0], after[:, :5])


@torch.no_grad()
def test_class_attention_is_that_of_its_block():
    model = pruned()
    images = torch.randn(2, 3, 32, 32)
    vit = timm.create_model(BACKBONES["deit"], **VIT | {"depth": 2})
    vit.load_state_dict(model.backbone.state_dict(), strict=False)  # ends with the block that prunes
    scores = class_attention(vit, images, 4)
    torch.testing.assert_close(model(images, keep_tokens=5), model(images, scores, keep_tokens=5), atol=1e-5, rtol=0)
    other = model(images, -scores, keep_tokens=5)
    assert not torch.allclose(model(images, keep_tokens=5), other)


def test_scores_of_another_grid():
    scores = torch.rand(2, 64)
    means = scores.view(2, 4, 2, 4, 2).mean((2, 4)).flatten(1)
    torch.testing.assert_close(read_scores(scores, 2, 4), means)
    coarse = torch.rand(2, 4)
    enlarged = coarse.view(2, 2, 2).repeat_interleave(2, 1).repeat_interleave(2, 2).flatten(1)
    torch.testing.assert_close(read_scores(coarse, 2, 4), enlarged)
    torch.testing.assert_close(read_scores(torch.full((1, 9), 0.3), 1, 4), torch.full((1, 16), 0.3))
    model = pruned()
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(model(images, scores, keep=0.5), model(images, means, keep=0.5))


def test_gradients_reach_every_parameter():
    for scores in (torch.rand(2, 16, requires_grad=True), None):
        model = pruned().train()
        model(torch.randn(2, 3, 32, 32), scores).square().sum().backward()
        assert all(p.grad is not None and p.grad.any() for p in model.parameters())
        assert scores is None or scores.grad is None


@torch.no_grad()
def test_round_trip_and_warm_start(tmp_path):
    arguments = {key: value for key, value in VIT.items() if key not in ("img_size", "num_classes")}
    model = timm.create_model(
        "token_pruned_vit",
        backbone="deit_tiny_patch16_224",
        backbone_args=arguments,
        img_size=32,
        num_classes=5,
        prune_block=3,
        keep=0.4,
    )
    vit = VisionTransformer(**VIT)
    torch.save(vit.state_dict(), tmp_path / "vit.pth")
    start_from(model, str(tmp_path / "vit.pth"))
    images, scores = torch.randn(2, 3, 32, 32), torch.rand(2, 16)
    assert torch.equal(model.eval()(images, keep=1.0), vit.eval()(images))
    (tmp_path / "run").mkdir()
    save_model(tmp_path / "run", model, Preprocessing(image_size=32, mean=(0.5,) * 3, std=(0.2,) * 3))
    again = load_run(tmp_path / "run").model
    assert (again.prune_block, again.keep, again.score_grid) == (3, 0.4, 4)
    assert torch.equal(again(images, scores), model(images, scores))
    assert model.no_weight_decay() == {f"backbone.{name}" for name in vit.no_weight_decay()}
    model.reset_classifier(7)
    assert model(images).shape == (2, 7) and model.get_classifier() is model.backbone.head


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"keep": 0.0}, r"keep must lie in \(0, 1\], got 0.0"),
        ({"keep": 1.5}, r"keep must lie in \(0, 1\], got 1.5"),
        ({"keep": float("nan")}, r"keep must lie in \(0, 1\], got nan"),
        ({"keep_tokens": 0}, "keep_tokens must lie between 1 and the 16 patches, got 0"),
        ({"keep_tokens": 17}, "keep_tokens must lie between 1 and the 16 patches, got 17"),
        ({"keep": 0.5, "keep_tokens": 3}, "give keep or keep_tokens, not both"),
        ({"scores": torch.rand(2, 15)}, r"scores must be \[2, s \* s\], a square map for each image, got \[2, 15\]"),
        ({"scores": torch.rand(3, 16)}, r"scores must be \[2, s \* s\]"),
        ({"scores": torch.rand(2, 4, 4)}, r"scores must be \[2, s \* s\]"),
        ({"scores": torch.rand(2, 0)}, r"scores must be \[2, s \* s\]"),
        ({"scores": torch.full((2, 16), float("nan"))}, "scores must be numbers, got NaN"),
        ({"images": torch.rand(2, 3, 32, 48)}, r"images must be \[batch, 3, 32, 32\], got \[2, 3, 32, 48\]"),
    ],
)
def test_bad_calls_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message) as caught:
        pruned()(**{"images": torch.rand(2, 3, 32, 32), "scores": torch.rand(2, 16)} | arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("backbone", "arguments", "message"),
    [
        ("resnet18", {}, "resnet18 has no img_size"),
        ("swin_tiny_patch4_window7_224", {}, "SwinTransformer is no plain timm VisionTransformer"),
        (
            "vit_base_patch16_18x2_224",
            {"backbone_args": {"embed_dim": 12, "num_heads": 3, "depth": 1}},
            "its blocks are",
        ),
        ("deit_tiny_patch16_224", {"backbone_args": {"patch_drop_rate": 0.5}}, "it has patch dropout"),
        ("deit_tiny_patch16_224", {"backbone_args": {"pretrained": True}}, "pretrained is not for here"),
        ("deit_tiny_patch16_224", {"prune_block": 12}, "prune_block must lie between 1 and 11 with 12 blocks, got 12"),
        ("deit_tiny_patch16_224", {"prune_block": 0}, "prune_block must lie between 1 and 11"),
        ("deit_tiny_patch16_224", {"keep": 2.0}, "keep must lie"),
    ],
)
def test_bad_settings_are_refused(backbone, arguments, message):
    with torch.device("meta"), pytest.raises(ValueError, match=message):
        TokenPrunedViT(backbone, **arguments)


def test_without_class_token_there_must_be_scores():
    vit = VisionTransformer(**VIT, class_token=False, global_pool="avg")
    model = TokenPrunedViT(vit, prune_block=2)
    assert model(torch.rand(2, 3, 32, 32), torch.rand(2, 16)).shape == (2, 5)
    with pytest.raises(ValueError, match="no class token whose attention could choose: give scores"):
        model(torch.rand(2, 3, 32, 32))


@torch.no_grad()
def test_it_exports():
    model = pruned()
    images, scores = torch.randn(2, 3, 32, 32), torch.rand(2, 16)
    program = torch.export.export(model, (images, scores)).module()
    torch.testing.assert_close(program(images, scores), model(images, scores), atol=1e-5, rtol=0)
