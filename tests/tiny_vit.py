"""A small random ViT, whose every weight shows in its relevance maps, and images for it."""

import torch
from timm.models.vision_transformer import VisionTransformer


def tiny_vit(seed=0, dtype=torch.float64, **kwargs):
    """A small ViT with weights large enough for every rule and every bias to matter; LayerScale has both signs."""
    size = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 3, "num_heads": 3, "num_classes": 5}
    model = VisionTransformer(**(size | kwargs)).to(dtype).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.25
            parameter.copy_(noise + 1 if "norm" in name and name.endswith("weight") else noise)
    return model


def pixels(model, batch=3, seed=1):
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, model.patch_embed.proj.in_channels, *model.patch_embed.img_size)
    images = torch.randn(shape, generator=generator, dtype=torch.float64).to(model.head.weight.dtype)
    return images, torch.randint(model.num_classes, (batch,), generator=generator)
