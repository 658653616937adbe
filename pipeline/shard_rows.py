"""The rows of the index of a shard, and its tensors as they are stored."""

from __future__ import annotations

from typing import Any

import numpy as np

from zpipe.pipeline.explainer import NO_CLASS, Explained
from zpipe.pipeline.shard_reader import FramedImage
from zpipe.schemas.relevance_store import NONFINITE, OK, UNDECODABLE, ZERO, concentration
from zpipe.schemas.tensor_kinds import TensorKind, encode


class Tensors:
    """What one store gets of a shard, encoded batch by batch, and what its index says of it."""

    def __init__(self, kind: TensorKind) -> None:
        self.kind = kind
        self.stored: list[np.ndarray] = []
        self.statuses: list[str] = []
        self._scales: list[np.ndarray] = []
        self._measures: list[tuple[np.ndarray, np.ndarray]] = []

    def add(self, images: list[FramedImage], logits: np.ndarray, raw: np.ndarray) -> None:
        """Add the tensors [n, ...] of a batch."""
        values = raw.reshape(len(raw), -1)
        finite = np.isfinite(values).all(axis=1) & np.isfinite(logits).all(axis=1)
        zero = ~values.any(axis=1) & self.kind.is_relevance
        undecodable = [item.pixels is None for item in images]
        self.statuses += np.select([undecodable, ~finite, zero], [UNDECODABLE, NONFINITE, ZERO], OK).tolist()
        # An answer that is no number has no map, even if the sweep made one of it.
        raw[~finite] = np.nan
        stored, scale = encode(self.kind, raw)
        self.stored.append(stored)
        self._scales.append(scale)
        self._measures.append(concentration(raw, self.kind))

    def columns(self) -> dict[str, Any]:
        """The columns of the index that depend on the tensors."""
        entropy, top_mass = (np.concatenate(parts) for parts in zip(*self._measures, strict=True))
        scale = np.concatenate(self._scales)
        return {"scale": scale, "entropy": entropy, "top10_mass": top_mass, "status": self.statuses}


def append_rows(columns: dict[str, list[Any]], images: list[FramedImage], explained: Explained) -> None:
    """Add what an index says of images, whatever their tensors; the first one of their target classes counts."""
    targets = explained.targets.reshape(len(images), -1)  # [n, K]
    target, logits, rows = targets[:, 0], explained.logits, np.arange(len(images))
    answered = np.isfinite(logits).all(axis=1)  # an image that could not be decoded has NaN
    probability = np.full(logits.shape, np.nan)
    probability[answered] = _softmax(logits[answered])
    predicted = np.where(answered, probability.argmax(axis=1), NO_CLASS)
    values = {
        "key": [item.key for item in images],
        "label": [NO_CLASS if item.label is None else item.label for item in images],
        "target": target.tolist(),
        "predicted": predicted.tolist(),
        "predicted_probability": probability[rows, predicted].tolist(),
        "target_probability": np.where(target == NO_CLASS, np.nan, probability[rows, target]).tolist(),
        "width": [item.width for item in images],
        "height": [item.height for item in images],
        "frame_x1": [item.frame.x1 for item in images],
        "frame_y1": [item.frame.y1 for item in images],
        "frame_x2": [item.frame.x2 for item in images],
        "frame_y2": [item.frame.y2 for item in images],
        "targets": targets.tolist(),
        "image_digest": [item.digest for item in images],
    }
    for name, more in values.items():
        columns[name] += more


def _softmax(logits: np.ndarray) -> np.ndarray:
    shifted = np.exp(logits.astype(np.float64) - logits.max(axis=1, keepdims=True))
    return shifted / shifted.sum(axis=1, keepdims=True)
