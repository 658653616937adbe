"""Boxes in source pixels, and maps resampled from one box to another. Pure NumPy.

Coordinates are continuous: a W x H image covers [0, W] x [0, H]. The cells of a map [gh, gw] that lies over a box
divide it into gh x gw equal rectangles. Boxes are always (x1, y1, x2, y2).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Box:
    """A rectangle in source pixels, x1 < x2 and y1 < y2."""

    x1: float
    y1: float
    x2: float
    y2: float

    def __post_init__(self) -> None:
        if not (self.x1 < self.x2 and self.y1 < self.y2):
            raise ValueError(f"a box needs x1 < x2 and y1 < y2, got {self.as_tuple()}")

    @classmethod
    def full(cls, width: int, height: int) -> Box:
        """The whole image."""
        return cls(0.0, 0.0, float(width), float(height))

    @property
    def width(self) -> float:
        """x2 - x1."""
        return self.x2 - self.x1

    @property
    def height(self) -> float:
        """y2 - y1."""
        return self.y2 - self.y1

    def as_tuple(self) -> tuple[float, float, float, float]:
        """(x1, y1, x2, y2)."""
        return (self.x1, self.y1, self.x2, self.y2)

    def contains(self, other: Box, slack: float = 1e-3) -> bool:
        """Whether `other` lies inside this box, with a tolerance of `slack` pixels."""
        return (
            other.x1 >= self.x1 - slack
            and other.y1 >= self.y1 - slack
            and other.x2 <= self.x2 + slack
            and other.y2 <= self.y2 + slack
        )


def overlap_weights(n_in: int, start: float | np.ndarray, stop: float | np.ndarray, n_out: int) -> np.ndarray:
    """Weights that resample `n_in` unit cells over the interval [start, stop] into `n_out` equal cells.

    Each output cell is the mean of the input over an interval around its centre, which is as wide as the output cell or
    as an input cell, whichever is wider. Where output cells are wider, the map shrinks: sum(out) * (stop - start) /
    n_out is conserved. Where they are narrower, it grows: this is linear interpolation between the centres of the input
    cells, with the outermost values continued outwards. At equal width the two agree.

    Args:
        n_in: Number of input cells.
        start: Begin of the interval in input cells, a number or an array [...] of many.
        stop: End of the interval in input cells, 0 <= start < stop <= n_in.
        n_out: Number of output cells.

    Returns:
        float64 [..., n_out, n_in]; rows sum to 1.
    """
    start, stop = np.asarray(start, np.float64)[..., None], np.asarray(stop, np.float64)[..., None]
    step = (stop - start) / n_out  # [..., 1]
    centres = start + (np.arange(n_out) + 0.5) * step  # [..., n_out]
    reach = np.maximum(step, 1.0) / 2
    cells = np.arange(n_in, dtype=np.float64)  # [n_in]
    lower, upper = cells.copy(), cells + 1
    lower[0], upper[-1] = -np.inf, np.inf
    low = np.maximum((centres - reach)[..., None], lower)  # [..., n_out, n_in]
    high = np.minimum((centres + reach)[..., None], upper)
    overlap = np.maximum(high - low, 0.0)
    return overlap / overlap.sum(axis=-1, keepdims=True)


def crop_map(relevance: np.ndarray, frame: Box, crop: Box, size: tuple[int, int], *, flip: bool = False) -> np.ndarray:
    """Resample one map to the part of its frame that a crop shows; `crop_maps` for many.

    Args:
        relevance: The map [gh, gw].
        frame: The box that the map lies over, in source pixels.
        crop: The box that the crop shows, in source pixels.
        size: Height and width of the result in cells.
        flip: Whether the cropped image was mirrored left to right.

    Returns:
        float32 [out_h, out_w].

    Raises:
        ValueError: The crop leaves the frame, where the map has no values.
    """
    return crop_maps(relevance[None], [frame], [crop], size, flips=np.array([flip]))[0]


def crop_maps(
    relevance: np.ndarray, frames: Sequence[Box], crops: Sequence[Box], size: tuple[int, int], *, flips: np.ndarray
) -> np.ndarray:
    """Resample many maps, each to the part of its frame that its crop shows.

    Along each axis, a cell is the area-weighted mean of the map under it where the map shrinks, and a linear
    interpolation where it grows (see `overlap_weights`).

    Args:
        relevance: The maps [m, gh, gw], or several for each crop [m, k, gh, gw].
        frames: The box that each map lies over, in source pixels.
        crops: The box that each crop shows, in source pixels.
        size: Height and width of the result in cells.
        flips: bool [m], whether each cropped image was mirrored left to right.

    Returns:
        float32 [m, out_h, out_w] or [m, k, out_h, out_w].

    Raises:
        ValueError: A crop leaves its frame.
    """
    (top, bottom), (left, right) = _shown_cells(relevance.shape[-2:], frames, crops)
    rows = overlap_weights(relevance.shape[-2], top, bottom, size[0])  # [m, out_h, gh]
    cols = overlap_weights(relevance.shape[-1], left, right, size[1])  # [m, out_w, gw]
    if relevance.ndim == 4:
        rows, cols = rows[:, None], cols[:, None]
    out = (rows @ relevance.astype(np.float64) @ cols.swapaxes(-1, -2)).astype(np.float32)
    out[flips] = out[flips, ..., ::-1]
    return out


def crop_labels(
    labels: np.ndarray, frames: Sequence[Box], crops: Sequence[Box], size: tuple[int, int], *, flips: np.ndarray
) -> np.ndarray:
    """Resample label maps, each to the part of its frame that its crop shows, by the cell under each centre.

    Args:
        labels: Whole numbers [m, gh, gw].
        frames: The box that each map lies over, in source pixels.
        crops: The box that each crop shows, in source pixels.
        size: Height and width of the result in cells.
        flips: bool [m], whether each cropped image was mirrored left to right.

    Returns:
        [m, out_h, out_w], of the type of `labels`.

    Raises:
        ValueError: A crop leaves its frame.
    """
    shown = _shown_cells(labels.shape[1:], frames, crops)
    rows, cols = (
        np.minimum(low[:, None] + (np.arange(n_out) + 0.5) * ((high - low) / n_out)[:, None], n_in - 1).astype(np.int64)
        for (low, high), n_in, n_out in zip(shown, labels.shape[1:], size, strict=True)
    )  # [m, out_h], [m, out_w]
    out = labels[np.arange(len(labels))[:, None, None], rows[:, :, None], cols[:, None, :]]
    out[flips] = out[flips, :, ::-1]
    return out


def _shown_cells(
    grid: Sequence[int], frames: Sequence[Box], crops: Sequence[Box]
) -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """Top and bottom, left and right of each crop, in the cells of its frame's grid: [m] each."""
    for frame, crop in zip(frames, crops, strict=True):
        if not frame.contains(crop):
            raise ValueError(f"crop {crop.as_tuple()} leaves the frame {frame.as_tuple()} of the map")
    x1, y1, x2, y2 = np.array([frame.as_tuple() for frame in frames], np.float64).T  # [m] each
    left, top, right, bottom = np.array([crop.as_tuple() for crop in crops], np.float64).T
    return _in_cells(grid[0], y1, y2, top, bottom), _in_cells(grid[1], x1, x2, left, right)


def _in_cells(
    n_in: int, origin: np.ndarray, end: np.ndarray, low: np.ndarray, high: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    scale = n_in / (end - origin)
    return np.clip((low - origin) * scale, 0.0, n_in), np.clip((high - origin) * scale, 0.0, n_in)


def covered_share(grid: tuple[int, int], box: Box, size: tuple[int, int]) -> np.ndarray:
    """Fraction of each cell that a box covers, for a grid over a whole image.

    Args:
        grid: Height and width of the grid in cells.
        box: The box in pixels.
        size: Height and width of the image in pixels.

    Returns:
        float64 [gh, gw], 0 to 1.
    """
    shares = []
    for cells, low, high, pixels in ((grid[0], box.y1, box.y2, size[0]), (grid[1], box.x1, box.x2, size[1])):
        edges = np.arange(cells + 1, dtype=np.float64) * pixels / cells
        inside = np.minimum(edges[1:], high) - np.maximum(edges[:-1], low)
        shares.append(np.clip(inside, 0, None) * cells / pixels)
    return shares[0][:, None] * shares[1][None, :]
