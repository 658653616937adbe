"""Models around a timm model: what timm's optimizers and fine-tuning tools ask of them is the backbone's answer."""

import pytest
import timm
import torch
from timm.models import group_parameters
from timm.optim import param_groups_layer_decay

from zpipe.train.models.fusion import FusedViT
from zpipe.train.models.image_zoom import ImageZoom
from zpipe.train.models.token_pruned_vit import TokenPrunedViT
from zpipe.train.models.tome import ToMeViT

VIT, SWIN = "deit_tiny_patch16_224", "swin_tiny_patch4_window7_224"
WRAPPED = [
    (TokenPrunedViT, VIT),
    (ToMeViT, VIT),
    (ImageZoom, VIT),
    (ImageZoom, "resnet18"),
    (FusedViT, SWIN),
    (FusedViT, VIT),
]


@pytest.mark.parametrize("kind, name", WRAPPED)
@pytest.mark.parametrize("coarse", [False, True])
def test_layers_are_those_of_the_backbone(kind, name, coarse):
    backbone = timm.create_model(name, num_classes=3)
    before = group_parameters(backbone, backbone.group_matcher(coarse=coarse), reverse=True)
    model = kind(backbone)
    after = group_parameters(model, model.group_matcher(coarse=coarse), reverse=True)
    assert after == {f"backbone.{name}": layer for name, layer in before.items()}
    assert len(set(before.values())) > 3


def test_layer_wise_learning_rates_reach_them():
    backbone = timm.create_model(VIT, num_classes=3)
    scales = [group["lr_scale"] for group in param_groups_layer_decay(backbone, layer_decay=0.5)]
    assert [group["lr_scale"] for group in param_groups_layer_decay(ToMeViT(backbone), layer_decay=0.5)] == scales
    assert min(scales) == 0.5**13 and max(scales) == 1  # embedding, 12 blocks, head


@pytest.mark.parametrize("kind, name", WRAPPED)
def test_the_head_is_the_backbones(kind, name):
    model = kind(timm.create_model(name, num_classes=3))
    assert model.get_classifier() is model.backbone.get_classifier() and model.num_classes == 3
    model.reset_classifier(7)
    assert model.num_classes == model.get_classifier().out_features == 7
    assert model.eval()(torch.zeros(1, 3, 224, 224)).shape == (1, 7)
    assert all(name.startswith("backbone.") for name in model.no_weight_decay())
