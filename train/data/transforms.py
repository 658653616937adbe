"""One random draw per sample, applied to image and map alike."""

from __future__ import annotations

import io
import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image

from zpipe.schemas.errors import UsageError
from zpipe.schemas.geometry import Box, crop_map
from zpipe.schemas.sample import IMAGE_FORMATS

Augment = Literal["train", "eval"]


@dataclass(frozen=True, kw_only=True)
class ViewConfig:
    """How a view of an image is chosen.

    train: random resized crop with an area share in `crop_scale` and an aspect ratio in `crop_ratio`, mirrored with
    probability `flip`. eval: the centre square of `crop_pct` of the shorter side, never mirrored.
    """

    augment: Augment = "train"
    crop_scale: tuple[float, float] = (0.08, 1.0)
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.5
    crop_pct: float = 0.875

    def __post_init__(self) -> None:
        low, high = self.crop_scale
        if not 0.0 < low <= high <= 1.0:
            raise UsageError(f"view.crop_scale {low:g}, {high:g}: give 0 < low <= high <= 1")
        low, high = self.crop_ratio
        if not 0.0 < low <= high:
            raise UsageError(f"view.crop_ratio {low:g}, {high:g}: give 0 < low <= high")
        if not 0.0 <= self.flip <= 1.0:
            raise UsageError(f"view.flip {self.flip:g}: give a probability in [0, 1]")
        if not 0.0 < self.crop_pct <= 1.0:
            raise UsageError(f"view.crop_pct {self.crop_pct:g}: give a share in (0, 1]")


@dataclass(frozen=True)
class View:
    """What is looked at: the crop in source pixels, and whether it is mirrored left to right."""

    box: Box
    flipped: bool


def draw_view(rng: np.random.Generator, width: int, height: int, config: ViewConfig) -> View:
    """Draw a view of a width x height image (Inception-style random resized crop, or the centre crop for eval)."""
    if config.augment == "eval":
        side = config.crop_pct * min(width, height)
        left, top = (width - side) / 2, (height - side) / 2
        return View(Box(left, top, left + side, top + side), False)
    flipped = bool(rng.random() < config.flip)
    for _ in range(10):
        area = width * height * rng.uniform(*config.crop_scale)
        ratio = math.exp(rng.uniform(math.log(config.crop_ratio[0]), math.log(config.crop_ratio[1])))
        crop_w, crop_h = math.sqrt(area * ratio), math.sqrt(area / ratio)
        # A hair of slack, so that a crop of the whole image is one whatever the rounding.
        if crop_w <= width * (1 + 1e-9) and crop_h <= height * (1 + 1e-9):
            crop_w, crop_h = min(crop_w, width), min(crop_h, height)
            left, top = rng.uniform(0, width - crop_w), rng.uniform(0, height - crop_h)
            return View(Box(left, top, min(left + crop_w, width), min(top + crop_h, height)), flipped)
    # No crop fits: the largest centred one whose aspect ratio is allowed.
    ratio = min(max(width / height, config.crop_ratio[0]), config.crop_ratio[1])
    crop_w, crop_h = min(width, height * ratio), min(height, width / ratio)
    left, top = (width - crop_w) / 2, (height - crop_h) / 2
    return View(Box(left, top, left + crop_w, top + crop_h), flipped)


def decode(data: bytes) -> Image.Image:
    """Decode to RGB; EXIF orientation is ignored, as boxes are in the stored pixel matrix.

    Errors: OSError, ValueError or SyntaxError for what PIL can't decode, formats that shards don't carry, and images of
    more pixels than PIL takes for harmless.
    """
    with Image.open(io.BytesIO(data), formats=IMAGE_FORMATS) as image:
        if Image.MAX_IMAGE_PIXELS and image.width * image.height > Image.MAX_IMAGE_PIXELS:
            raise ValueError(f"{image.width} x {image.height} pixels are more than {Image.MAX_IMAGE_PIXELS}")
        return image.convert("RGB")


def view_image(image: Image.Image, view: View, size: int) -> np.ndarray:
    """The view as uint8 [3, size, size], resized with antialiasing (bicubic)."""
    resized = image.resize((size, size), Image.Resampling.BICUBIC, box=view.box.as_tuple())
    pixels = np.asarray(resized)  # [size, size, 3]
    if view.flipped:
        pixels = pixels[:, ::-1]
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))


def view_map(relevance: np.ndarray, view: View, width: int, height: int) -> np.ndarray:
    """The part of a whole-image map [gh, gw] that the view shows, resampled to the same grid: float32 [gh, gw]."""
    return crop_map(relevance, Box.full(width, height), view.box, relevance.shape, flip=view.flipped)


def view_box(box: tuple[float, float, float, float], view: View) -> tuple[float, float, float, float]:
    """An object's box (source pixels) in fractions of the view, clipped to it: (x1, y1, x2, y2) in [0, 1]."""
    x1, x2 = ((edge - view.box.x1) / view.box.width for edge in (box[0], box[2]))
    y1, y2 = ((edge - view.box.y1) / view.box.height for edge in (box[1], box[3]))
    if view.flipped:
        x1, x2 = 1 - x2, 1 - x1
    return tuple(min(max(edge, 0.0), 1.0) for edge in (x1, y1, x2, y2))
