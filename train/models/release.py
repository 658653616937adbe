"""Checkpoints that papers' authors published, opened so that they compute what their code computes at batch size 1."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from zpipe.train.models.cfvit import CFViT
from zpipe.train.models.lfvit import LFViT
from zpipe.train.models.released_weights import ReleasedWeights
from zpipe.train.models.released_zoomvit import ReleasedZoomViT
from zpipe.train.models.sparseformer import SparseFormer

__all__ = ["ReleasedZoomViT", "load_release"]

MODELS: dict[str, Any] = {"zoomvit": ReleasedZoomViT, "cfvit": CFViT, "lfvit": LFViT, "sparseformer": SparseFormer}


def load_release(source: str | Path | Mapping[str, Any], model: str = "zoomvit", **config: Any) -> Any:
    """Open a checkpoint that the authors of a model published.

    Args:
        source: a weights file, read without unpickling code, or a state dict. Either may be wrapped as {"model": state
            dict}; prefixes that all names in it carry, such as "module.", are removed.
        model: the model of the checkpoint: "zoomvit", "cfvit", "lfvit" or "sparseformer" (v1).
        config: what does not follow from the shapes of the weights. For zoomvit: num_heads, zoom_factor (2.0 or 0.5),
            alpha; for cfvit: num_heads; for lfvit: num_heads, region_size; for sparseformer: num_heads and
            focus_repeats, which are 64 and 4 in all published checkpoints.

    Returns:
        For zoomvit (ReleasedZoomViT, Zoomer), both in eval mode, the zoomer frozen: `vit(images, zoomer(images))`.
        For the others a CFViT, LFViT or SparseFormer in eval mode.

    Raises:
        ValueError: an unknown model, config missing or unknown, a file that is no checkpoint, keys missing from it or
            unknown in it, weights of unexpected shapes.
        OSError: the file can't be read.
    """
    if model not in MODELS:
        raise ValueError(f"model must be one of {', '.join(MODELS)}, got {model!r}")
    weights = ReleasedWeights.read(source, MODELS[model].RELEASE_NAME)
    wanted = MODELS[model].RELEASE_CONFIG
    if set(config) != set(wanted):
        given = ", ".join(sorted(config)) or "none"
        raise ValueError(f"{weights.name}: give {', '.join(wanted)} by keyword; got {given}")
    return MODELS[model].load_release(weights, **config)
