"""Filling a model from other weights: what is filled, what is left, and what a model can start from."""

import pytest
import timm
import torch

import zpipe.train.models  # noqa: F401  registers the models
from zpipe.train.models.warm_start import StartsFromViT, load_weights

BODY = {"patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3}
SIZED = BODY | {"img_size": 32}
WRAPPED = {"backbone": "deit_tiny_patch16_224", "img_size": 32, "backbone_args": BODY}


def plain(num_classes: int = 5, **changes):
    return timm.create_model("deit_tiny_patch16_224", num_classes=num_classes, **SIZED | changes)


def test_a_head_for_other_classes_is_left():
    model, source = plain(), plain(num_classes=7)
    head = model.head.weight.clone()
    result = load_weights(model, source.state_dict())
    assert result.left == ("head.weight: of other classes", "head.bias: of other classes")
    assert set(result.filled) == model.state_dict().keys() - {"head.weight", "head.bias"}
    assert torch.equal(model.head.weight, head)
    assert torch.equal(model.blocks[1].mlp.fc1.weight, source.blocks[1].mlp.fc1.weight)


def test_two_heads_are_left_together():
    model = timm.create_model("lvvit_small", num_classes=5, **SIZED)
    state = timm.create_model("lvvit_small", num_classes=7, **SIZED).state_dict()
    result = load_weights(model, state)
    names = ("head.weight", "head.bias", "aux_head.weight", "aux_head.bias")
    assert result.left == tuple(f"{name}: of other classes" for name in names)


@pytest.mark.parametrize("name", ["tome_vit", "token_pruned_vit", "image_zoom", "fused_vit"])
def test_a_wrapped_model_starts_from_its_kind_and_from_a_plain_vit(name):
    options = {"prune_block": 1} if name == "token_pruned_vit" else {}
    model = timm.create_model(name, num_classes=5, **WRAPPED, **options)
    other = timm.create_model(name, num_classes=5, **WRAPPED, **options)
    assert isinstance(model, StartsFromViT)
    assert load_weights(model, other.state_dict()).filled == tuple(model.state_dict())
    vit = plain()
    assert load_weights(model, vit.state_dict()).left == ()
    assert all(torch.equal(value, model.state_dict()[f"backbone.{key}"]) for key, value in vit.state_dict().items())


@pytest.mark.parametrize("name", ["zoomvit_tiny_patch16_224", "cfvit_tiny", "lfvit_tiny"])
def test_a_model_of_two_grids_starts_from_its_kind_and_from_a_plain_vit(name):
    options = {"region_size": 1} if name == "lfvit_tiny" else {}
    model = timm.create_model(name, num_classes=5, **SIZED, **options)
    other = timm.create_model(name, num_classes=7, **SIZED, **options)
    result = load_weights(model, other.state_dict())
    assert result.left == ("head.weight: of other classes", "head.bias: of other classes")
    assert torch.equal(model.pos_fine, other.pos_fine)
    vit = plain()
    assert "pos_fine" in load_weights(model, vit.state_dict()).filled
    assert torch.equal(model.head.weight, vit.head.weight)
    with pytest.raises(ValueError, match="not the state dict of a plain ViT"):
        load_weights(model, timm.create_model("tome_vit", **WRAPPED).state_dict())


def test_a_plain_vit_takes_another_image_size():
    model, source = plain(), plain(img_size=64)
    assert not isinstance(model, StartsFromViT)
    assert load_weights(model, source.state_dict()).left == ()
    assert model.pos_embed.shape == (1, 17, 24)


def test_weights_of_another_kind_are_refused():
    with pytest.raises(RuntimeError, match="pos_fine"):
        load_weights(plain(), timm.create_model("zoomvit_tiny_patch16_224", num_classes=5, **SIZED).state_dict())
