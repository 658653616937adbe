"""Boxes in source pixels and their place in a map grid. Pure NumPy.

Coordinates are continuous: a W x H image covers [0, W] x [0, H], and cell (r, c) of a map [gh, gw] laid over a box covers
an equal rectangle of it. Boxes are always (x1, y1, x2, y2).
"""

from __future__ import annotations

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
        return self.x2 - self.x1

    @property
    def height(self) -> float:
        return self.y2 - self.y1

    def as_tuple(self) -> tuple[float, float, float, float]:
        return (self.x1, self.y1, self.x2, self.y2)

    def contains(self, other: Box, slack: float = 1e-3) -> bool:
        """Whether `other` lies inside, give or take `slack` pixels."""
        return (
            other.x1 >= self.x1 - slack
            and other.y1 >= self.y1 - slack
            and other.x2 <= self.x2 + slack
            and other.y2 <= self.y2 + slack
        )


def overlap_weights(n_in: int, start: float, stop: float, n_out: int) -> np.ndarray:
    """Weights that resample `n_in` unit cells over the interval [start, stop] into `n_out` equal cells.

    start, stop: in cells of the input, 0 <= start < stop <= n_in. Returns float64 [n_out, n_in], rows sum to 1.
    Shrinking (an output cell is wider than one of the input): each output cell is the mean of the input over the stretch it
    covers, so sum(out) * (stop - start) / n_out is conserved. Growing: linear interpolation between the centres of the input's
    cells, the outermost continued outwards. Both are the mean over a stretch around the output cell's centre, as wide as
    that cell or as one of the input, whichever is wider; at equal width they agree.
    """
    step = (stop - start) / n_out
    centres = start + (np.arange(n_out) + 0.5) * step  # [n_out]
    reach = max(step, 1.0) / 2
    cells = np.arange(n_in, dtype=np.float64)  # [n_in]
    lower, upper = cells.copy(), cells + 1
    lower[0], upper[-1] = -np.inf, np.inf
    low = np.maximum(centres[:, None] - reach, lower[None, :])  # [n_out, n_in]
    high = np.minimum(centres[:, None] + reach, upper[None, :])
    overlap = np.clip(high - low, 0.0, None)
    return overlap / overlap.sum(axis=1, keepdims=True)


def crop_map(relevance: np.ndarray, frame: Box, crop: Box, size: tuple[int, int], *, flip: bool = False) -> np.ndarray:
    """Resample a map that lies over `frame` to the part that `crop` shows.

    relevance: [gh, gw]; frame, crop: in the same source pixels; size: (out_h, out_w); flip: mirror left and right, as the
    cropped image was. Returns float32 [out_h, out_w]: the area-weighted mean of the map under each cell where the
    map shrinks, bilinear interpolation where it grows, for each axis.
    Errors: ValueError when the crop leaves the frame (the map says nothing there).
    """
    if not frame.contains(crop):
        raise ValueError(f"crop {crop.as_tuple()} leaves the frame {frame.as_tuple()} of the map")
    gh, gw = relevance.shape
    rows = _axis_weights(gh, frame.y1, frame.height, crop.y1, crop.y2, size[0])  # [out_h, gh]
    cols = _axis_weights(gw, frame.x1, frame.width, crop.x1, crop.x2, size[1])  # [out_w, gw]
    if flip:
        cols = cols[::-1]
    return (rows @ relevance.astype(np.float64) @ cols.T).astype(np.float32)


def _axis_weights(n_in: int, origin: float, extent: float, low: float, high: float, n_out: int) -> np.ndarray:
    start = min(max((low - origin) / extent * n_in, 0.0), float(n_in))
    stop = min(max((high - origin) / extent * n_in, 0.0), float(n_in))
    return overlap_weights(n_in, start, stop, n_out)
