"""The families of teachers, with examples and the methods that explain them: what `--list-teachers` prints."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import timm

from zpipe.pipeline import torchvision_models, transformers_models
from zpipe.pipeline.classifier import Part, as_classifier
from zpipe.pipeline.methods import methods_of
from zpipe.pipeline.timm_models import has_classes

SIZE = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3, "num_classes": 2}
TOWER = {
    "image_size": 32,
    "patch_size": 8,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 48,
}
READS: dict[Part, str] = {
    "class": "class token",
    "distilled": "distillation token",
    "mean": "mean of patches",
    "mean of all": "mean of all tokens",
    "pool": "pooling attention",
}


@dataclass(frozen=True, kw_only=True)
class Family:
    """Models that compute the same and read their answer in the same place."""

    name: str
    """What they are."""
    examples: tuple[str, ...]
    """Names of some of them, as `--teacher` takes them."""
    tiny: Callable[[], Any]
    """Builds a small model of the family with random weights."""
    needs: str = ""
    """The extra that must be installed; empty for none."""
    encoders: bool = False
    """Whether the examples have no classes; it is known of those that `tiny` builds without any."""

    def row(self) -> dict[str, str]:
        """What `--list-teachers` prints about it: family, answer read from, methods, examples."""
        examples = ", ".join(self.examples) or "a folder of save_pretrained"
        row = {"family": self.name, "answer read from": "", "methods": "", "examples": examples}
        if self.needs and not transformers_models.is_installed():
            return row | {"methods": f"pip install 'zpipe[{self.needs}]'"}
        classifier = as_classifier(self.tiny()).eval()
        refused = [name for name, reason in methods_of(classifier).items() if reason]
        head = "" if classifier.num_classes and not self.encoders else " (needs a head or class embeddings)"
        return row | {
            "answer read from": " and ".join(READS[part] for part in classifier.parts) + head,
            "methods": f"all but {', '.join(refused)}" if refused else "all",
        }


def _timm(name: str, *examples: str, **size: Any) -> Family:
    encoders = not any(has_classes(example) for example in examples)
    return Family(
        name=name,
        examples=examples,
        tiny=lambda: timm.create_model(examples[0], **SIZE | size),
        encoders=encoders,
    )


def _transformers(name: str, *examples: str, nested: bool = False) -> Family:
    """`nested`: the sizes are those of the part for images."""
    fields: dict[str, Any] = {"vision_config": TOWER} if nested else TOWER
    return Family(
        name=f"transformers {name}",
        examples=tuple(f"transformers:{example}" for example in examples),
        tiny=lambda: transformers_models.create(name, fields),
        needs="transformers",
    )


def _torchvision() -> Any:
    size = {"image_size": 32, "patch_size": 8, "num_layers": 2, "num_heads": 3, "hidden_dim": 24, "mlp_dim": 48}
    return torchvision_models.create("torchvision:vit_b_16", **size)


FAMILIES = (
    _timm("timm ViT, DeiT", "vit_base_patch16_224", "deit_base_patch16_224", "deit3_base_patch16_224"),
    _timm("timm ViT with registers", "vit_base_patch14_reg4_dinov2", "vit_base_patch14_dinov2"),
    _timm("timm CLIP", "vit_base_patch16_clip_224.openai", "vit_large_patch14_clip_224.laion2b"),
    _timm("timm ViT with SwiGLU", "vit_giant_patch14_dinov2", "vit_giant_patch14_reg4_dinov2"),
    _timm("timm ViT, mean pooling", "vit_so150m_patch16_reg4_gap_256", "vit_betwixt_patch16_reg4_gap_256"),
    _timm("timm AIMv2", "aimv2_large_patch14_224", "aimv2_huge_patch14_224"),
    _timm("timm SigLIP", "vit_base_patch16_siglip_224", "vit_large_patch16_siglip_256"),
    _timm("timm ViT, relative positions", "vit_relpos_base_patch16_224", "vit_relpos_base_patch16_clsgap_224"),
    _timm("timm distilled DeiT", "deit_base_distilled_patch16_224", "deit_tiny_distilled_patch16_224"),
    _timm("timm EVA-02", "eva02_base_patch14_448", "eva02_large_patch14_448"),
    _timm("timm EVA CLIP", "eva02_base_patch16_clip_224", "eva02_large_patch14_clip_224"),
    _timm("timm DINOv3", "vit_base_patch16_dinov3", "vit_small_plus_patch16_dinov3"),
    _timm("timm BEiT", "beit_base_patch16_224", "beitv2_base_patch16_224"),
    Family(
        name="torchvision ViT",
        examples=("torchvision:vit_b_16", "torchvision:vit_b_16.IMAGENET1K_SWAG_E2E_V1"),
        tiny=_torchvision,
    ),
    _transformers("ViTForImageClassification", "google/vit-base-patch16-224"),
    _transformers("DeiTForImageClassification", "facebook/deit-base-patch16-224"),
    _transformers("DeiTForImageClassificationWithTeacher", "facebook/deit-base-distilled-patch16-224"),
    _transformers("Dinov2ForImageClassification", "facebook/dinov2-base-imagenet1k-1-layer"),
    _transformers(
        "Dinov2WithRegistersForImageClassification", "facebook/dinov2-with-registers-base-imagenet1k-1-layer"
    ),
    _transformers("BeitForImageClassification", "microsoft/beit-base-patch16-224"),
    _transformers("CLIPForImageClassification", nested=True),
    _transformers("SiglipForImageClassification", nested=True),
    _transformers("ViTModel", "facebook/dino-vitb16"),
    _transformers("DeiTModel"),
    _transformers("Dinov2Model", "facebook/dinov2-base"),
    _transformers("Dinov2WithRegistersModel", "facebook/dinov2-with-registers-base"),
    _transformers("DINOv3ViTModel", "facebook/dinov3-vitb16-pretrain-lvd1689m"),
    _transformers("BeitModel", "microsoft/beit-base-patch16-224-pt22k"),
    _transformers("CLIPVisionModel"),
    _transformers("CLIPVisionModelWithProjection", "openai/clip-vit-base-patch16"),
    _transformers("SiglipVisionModel", "google/siglip-base-patch16-224"),
)


def family_rows() -> list[dict[str, str]]:
    """The rows of `--list-teachers`, one for each of `FAMILIES`."""
    return [family.row() for family in FAMILIES]
