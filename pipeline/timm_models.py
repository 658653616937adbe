"""What timm's descriptions of pretrained weights say about heads."""

from __future__ import annotations

import timm
from timm.models import split_model_name_tag


def embedding_widths(name: str) -> set[int]:
    """The widths of the embeddings, shared by images and texts, that pretrained weights of an architecture end in.

    timm describes the projection of a CLIP tower (Radford et al., ICML 2021, Section 2.3) as a head of so many classes.
    Only weights that were fine-tuned later, which have `_ft_` in their tag, are classifiers.

    Args:
        name: Name of the architecture, with or without a tag.
    """
    architecture = split_model_name_tag(name)[0]
    named = timm.list_pretrained(f"{architecture}.*")
    towers = [each for each in named if ("clip" in each or "pe_core" in each) and "_ft_" not in each]
    return {config.num_classes for each in towers if (config := timm.get_pretrained_cfg(each)) and config.num_classes}


def has_classes(name: str) -> bool:
    """Whether pretrained weights of that name are a classifier."""
    config = timm.get_pretrained_cfg(name)
    return config is not None and config.num_classes not in {0, *embedding_widths(name)}
