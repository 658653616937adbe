"""Kinds of per-sample tensors that a store may hold, and how their values are stored.

    map         [gh, gw]     relevance, a mask: any dense map, cropped and flipped with the image
    class-maps  [k, gh, gw]  one map for each of k classes
    features    [gh, gw, d]  one vector for each cell
    label-map   [gh, gw]     one whole number for each cell, resampled by the nearest one
    vector      [d]          logits: belongs to the image, not to a place in it

Real values are stored as float16 after division by the largest magnitude of their sample, whole numbers as int32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

Kind = Literal["map", "class-maps", "features", "label-map", "vector"]
BLOCK_VALUES = 1 << 20  # encoded at once: float64 takes four times as much as what is stored


@dataclass(frozen=True)
class TensorKind:
    """The axes of a sample's tensor, and its type."""

    axes: str
    """One letter per axis: h and w are rows and columns of the grid, k classes, d channels."""
    dtype: np.dtype
    """How values are stored: float16 or int32, little-endian."""

    @property
    def is_dense(self) -> bool:
        """Whether values have a place in the image."""
        return "h" in self.axes

    @property
    def is_relevance(self) -> bool:
        """Whether the last two axes are maps, each of which can be scaled to [0, 1] by itself."""
        return self.axes.endswith("hw") and self.dtype.kind == "f"

    def shape_error(self, shape: Sequence[int], grid: tuple[int, int]) -> str:
        """Why a tensor of that shape is none of this kind on that grid; empty if it is."""
        sizes = dict(zip(self.axes, shape, strict=False))
        if len(shape) != len(self.axes):
            return f"shape {tuple(shape)} has {len(shape)} axes, not {len(self.axes)}"
        if self.is_dense and (sizes["h"], sizes["w"]) != grid:
            return f"shape {tuple(shape)} has a grid of {sizes['h']} x {sizes['w']}, not {grid[0]} x {grid[1]}"
        return ""


KINDS: dict[str, TensorKind] = {
    "map": TensorKind("hw", np.dtype("<f2")),
    "class-maps": TensorKind("khw", np.dtype("<f2")),
    "features": TensorKind("hwd", np.dtype("<f2")),
    "label-map": TensorKind("hw", np.dtype("<i4")),
    "vector": TensorKind("d", np.dtype("<f2")),
}
# Stores that an extraction may fill in the same pass, in folders of these names inside the store of the maps.
SAVED: dict[str, Kind] = {"logits": "vector", "features": "features"}


def encode(kind: TensorKind, raw: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Split raw tensors [n, ...] into values of `kind.dtype` [n, ...] and scales, float32 [n].

    Real values are divided by the largest magnitude of their sample. A tensor that is all zero has scale 0. One that is
    not finite is stored as NaN with scale NaN. Whole numbers stay as they are, with scale 1.

    Raises:
        ValueError: Whole numbers do not fit into int32, or are none.
    """
    if kind.dtype.kind == "i":
        stored = raw.astype(kind.dtype)
        if not np.array_equal(stored, raw):
            raise ValueError("a label map holds whole numbers of 32 bits")
        return stored, np.ones(len(raw), np.float32)
    stored, scales = np.empty(raw.shape, kind.dtype), np.empty(len(raw), np.float32)
    step = max(1, BLOCK_VALUES // max(1, raw[:1].size))
    for start in range(0, len(raw), step):
        block = slice(start, start + step)
        stored[block], scales[block] = _encode_block(raw[block])
    return stored, scales


def _encode_block(raw: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    raw = raw.astype(np.float64)
    axes, broadcast = tuple(range(1, raw.ndim)), (-1, *[1] * (raw.ndim - 1))
    finite = np.isfinite(raw).all(axis=axes)  # [n]
    scale = np.where(finite, np.abs(raw).max(axis=axes, initial=0.0), np.nan).astype(np.float32)  # [n]
    divisor = np.where(scale == 0, 1.0, scale).astype(np.float64)
    with np.errstate(invalid="ignore"):
        values = np.where(finite.reshape(broadcast), raw, np.nan) / divisor.reshape(broadcast)  # [n, ...]
    return values.astype(np.float16), scale


def decode(stored: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Raw tensors [n, ...] from stored ones and their scales [n]: float32, or int32 where whole numbers are stored."""
    if stored.dtype.kind == "i":
        return stored
    return stored.astype(np.float32) * scale.astype(np.float32).reshape(-1, *[1] * (stored.ndim - 1))
