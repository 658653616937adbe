"""Models around a timm model: timm's optimizers and fine-tuning tools treat them as they treat the backbone."""

import pytest
import timm
import torch
from timm.models import group_parameters, save_for_hf
from timm.optim import param_groups_layer_decay

import zpipe.train.models  # noqa: F401  (registers them)
from zpipe.train.models.fusion import FusedViT
from zpipe.train.models.image_zoom import ImageZoom
from zpipe.train.models.token_pruned_vit import TokenPrunedViT
from zpipe.train.models.tome import ToMeViT

VIT, SWIN = "deit_tiny_patch16_224", "swin_tiny_patch4_window7_224"
LVVIT = "lvvit_small"
WRAPPED = [
    (TokenPrunedViT, VIT),
    (ToMeViT, VIT),
    (ImageZoom, VIT),
    (ImageZoom, "resnet18"),
    (FusedViT, SWIN),
    (FusedViT, VIT),
    (FusedViT, LVVIT),
]


@pytest.mark.parametrize(("kind", "name"), WRAPPED)
@pytest.mark.parametrize("coarse", [False, True])
def test_layers_are_those_of_the_backbone(kind, name, coarse):
    backbone = timm.create_model(name, num_classes=3)
    before = group_parameters(backbone, backbone.group_matcher(coarse=coarse), reverse=True)
    model = kind(backbone)
    after = group_parameters(model, model.group_matcher(coarse=coarse), reverse=True)
    assert after == {f"backbone.{name}": layer for name, layer in before.items()}
    assert len(set(before.values())) > 3


def test_blocks_of_lvvit_are_layers_of_their_own():
    model = timm.create_model(LVVIT)
    layers = group_parameters(model, model.group_matcher(), reverse=True)
    for i, block in enumerate(model.blocks):
        assert {layers[f"blocks.{i}.{name}"] for name, _ in block.named_parameters()} == {i + 1}
    assert {layers[name] for name in layers if "head" in name} == {len(model.blocks) + 1}


def test_layer_wise_learning_rates_reach_them():
    backbone = timm.create_model(VIT, num_classes=3)
    scales = [group["lr_scale"] for group in param_groups_layer_decay(backbone, layer_decay=0.5)]
    assert [group["lr_scale"] for group in param_groups_layer_decay(ToMeViT(backbone), layer_decay=0.5)] == scales
    assert min(scales) == 0.5**13 and max(scales) == 1  # embedding, 12 blocks, head


@pytest.mark.parametrize(("kind", "name"), WRAPPED)
def test_the_head_is_the_backbones(kind, name):
    model = kind(timm.create_model(name, num_classes=3))
    assert model.get_classifier() is model.backbone.get_classifier() and model.num_classes == 3
    model.reset_classifier(7)
    assert model.num_classes == model.get_classifier().out_features == 7
    assert model.eval()(torch.zeros(1, 3, 224, 224)).shape == (1, 7)
    assert all(name.startswith("backbone.") for name in model.no_weight_decay())


# --------------------------------------------------------------------------------------------------- our models in timm

BODY = {"embed_dim": 24, "depth": 2, "num_heads": 2}
INSIDE = {"backbone": VIT, "backbone_args": BODY | {"patch_size": 8}}
REGISTERED = {
    "zoomvit_tiny_patch16_224": BODY | {"patch_size": 8},
    "cfvit_tiny": BODY | {"patch_size": 8},
    "lfvit_tiny": BODY | {"patch_size": 8, "region_size": 2},
    "lvvit_small": BODY | {"patch_size": 8},
    "token_pruned_vit": INSIDE | {"prune_block": 1},
    "tome_vit": INSIDE,
    "image_zoom": INSIDE | {"patch_size": 8},
    "fused_vit": INSIDE | {"patch_size": 8},
    "sparseformer_tiny": {"conv_dim": 16, "num_tokens": 4, "focus_dim": 64, "cortex_dim": 64, "num_heads": 8},
}


@pytest.fixture(scope="module", params=sorted(REGISTERED))
def saved(request, tmp_path_factory):
    """A registered model, small, of five classes, and the folder that it was saved in."""
    arguments = REGISTERED[request.param]
    sized = {} if request.param.startswith("sparseformer") else {"img_size": 32}
    model = timm.create_model(request.param, num_classes=5, **arguments, **sized).eval()
    folder = tmp_path_factory.mktemp(request.param)
    save_for_hf(model, folder, safe_serialization=True, model_args=arguments | sized)
    return model, folder


def test_saved_it_opens_again_by_its_description_alone(saved):
    model, folder = saved
    again = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(again(images), model(images))


def test_saved_it_opens_with_a_new_head(saved):
    model, folder = saved
    again = timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=7).eval()
    assert again(torch.randn(2, 3, 32, 32)).shape == (2, 7)
    heads = model.pretrained_cfg["classifier"]
    heads = [heads] if isinstance(heads, str) else heads
    before, after = model.state_dict(), again.state_dict()
    assert any(name.startswith(tuple(heads)) for name in before)
    for name, value in before.items():
        if not name.startswith(tuple(heads)):
            torch.testing.assert_close(after[name], value)


def test_saved_it_opens_for_grey_images(saved):
    _, folder = saved
    again = timm.create_model(f"local-dir:{folder}", pretrained=True, in_chans=1).eval()
    assert again(torch.randn(2, 1, 32, 32)).shape == (2, 5)


def test_a_wrapped_model_has_the_preprocessing_of_its_backbone():
    inner = timm.create_model("vit_tiny_patch16_224").pretrained_cfg
    model = timm.create_model("tome_vit", backbone="vit_tiny_patch16_224")
    assert inner["mean"] == (0.5, 0.5, 0.5)
    for name in ("mean", "std", "crop_pct", "interpolation"):
        assert model.pretrained_cfg[name] == inner[name]
    assert timm.create_model("image_zoom", backbone="resnet18").pretrained_cfg["classifier"] == "backbone.fc"
