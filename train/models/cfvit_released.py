"""The weights of CF-ViT and LF-ViT that their authors published: our arguments and names for them."""

from __future__ import annotations

import math
from typing import Any

from zpipe.train.models.released_weights import ReleasedWeights

_RELEASED_NAMES = {
    "patch_embed.proj.": "patch_embed.",
    "pos_embed_list.0": "pos_coarse",
    "pos_embed_list.1": "pos_fine",
    "reuse_block.0.": "reuse.norm.",
    "reuse_block.1.": "reuse.mlp.",
}


def our_name(theirs: str) -> str:
    """Our name of a tensor, from the authors'."""
    prefix = next((prefix for prefix in _RELEASED_NAMES if theirs.startswith(prefix)), "")
    return _RELEASED_NAMES.get(prefix, "") + theirs.removeprefix(prefix)


def released_arguments(weights: ReleasedWeights) -> dict[str, Any]:
    """The arguments of the constructor that follow from the shapes of the weights.

    Raises:
        ValueError: weights of anything but a published model of this kind.
    """
    width, chans, patch, _ = weights.shape("patch_embed.proj.weight")
    return {
        "img_size": math.isqrt(weights.shape("pos_embed_list.1")[1] - 1) * patch,
        "patch_size": patch,
        "embed_dim": width,
        "depth": weights.count(r"blocks\.(\d+)\."),
        "num_classes": weights.shape("head.weight")[0],
        "in_chans": chans,
        "mlp_ratio": weights.shape("blocks.0.mlp.fc1.weight")[0] / width,
    }
