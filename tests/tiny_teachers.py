"""Small models of torchvision and transformers, whose every weight shows in their answers and maps."""

import torch

from zpipe.pipeline import torchvision_models, transformers_models
from zpipe.pipeline.families import TOWER

OF_TORCHVISION = {"image_size": 32, "patch_size": 8, "num_layers": 2, "num_heads": 3, "hidden_dim": 24, "mlp_dim": 48}
NESTED = ("CLIPForImageClassification", "SiglipForImageClassification")  # with a configuration for texts, too


def of_torchvision(**size):
    return shaken(torchvision_models.create("torchvision:vit_b_16", num_classes=5, **OF_TORCHVISION | size))


def of_transformers(name, **fields):
    size = TOWER | fields
    return shaken(transformers_models.create(name, {"vision_config": size} if name in NESTED else size, 5))


def shaken(model, seed=0):
    """The model in eval mode with weights large enough for every part of it to matter."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator) * 0.25
            parameter.copy_(noise + 1 if "norm" in key and key.endswith("weight") else noise)
    return model.eval().requires_grad_(False)
