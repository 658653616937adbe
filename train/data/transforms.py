"""Augmentation: one random view per sample, applied to its image and its map alike."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from zpipe.schemas.errors import UsageError
from zpipe.schemas.geometry import Box, covered_share, crop_labels, crop_maps
from zpipe.schemas.images import open_image, to_rgb
from zpipe.schemas.tensor_kinds import TensorKind
from zpipe.train.settings import check_choices

Augment = Literal["train", "eval"]
Colour = Literal["none", "deit", "deit3"]


@dataclass(frozen=True, kw_only=True)
class ViewConfig:
    """How the view of an image is chosen, and how its colours change."""

    augment: Augment = "train"
    """`train`: a random resized crop, mirrored at random; `eval`: the centre square, never mirrored."""

    crop_scale: tuple[float, float] = (0.08, 1.0)
    """Range of the random crop's area, as a fraction of the image."""

    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Range of the random crop's aspect ratio, width / height."""

    flip: float = 0.5
    """Probability that a training view is mirrored left to right."""

    crop_pct: float = 0.875
    """Side of the evaluation crop, as a fraction of the shorter side of the image."""

    colour: Colour = "none"
    """Colour augmentation in training, see `change_colours`."""

    erase: float = 0.0
    """Probability that training erases a rectangle, see `erase`."""

    def __post_init__(self) -> None:
        check_choices(self, "view.")
        low, high = self.crop_scale
        if not 1e-4 <= low <= high <= 1.0:
            raise UsageError(f"view.crop_scale {low:g}, {high:g}: give 0.0001 <= low <= high <= 1")
        low, high = self.crop_ratio
        if not 0.01 <= low <= high <= 100:
            raise UsageError(f"view.crop_ratio {low:g}, {high:g}: give 0.01 <= low <= high <= 100")
        if not 0.0 <= self.flip <= 1.0:
            raise UsageError(f"view.flip {self.flip:g}: give a probability in [0, 1]")
        if not 0.0 <= self.erase <= 1.0:
            raise UsageError(f"view.erase {self.erase:g}: give a probability in [0, 1]")
        if not 0.01 <= self.crop_pct <= 1.0:
            raise UsageError(f"view.crop_pct {self.crop_pct:g}: give a share in [0.01, 1]")


@dataclass(frozen=True)
class View:
    """A crop of an image."""

    box: Box
    """The crop, in source pixels."""
    flipped: bool
    """Whether it is mirrored left to right."""


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
        # A tolerance, so that rounding does not reject a crop of the whole image.
        if crop_w <= width * (1 + 1e-9) and crop_h <= height * (1 + 1e-9):
            crop_w, crop_h = min(crop_w, width), min(crop_h, height)
            left, top = rng.uniform(0, width - crop_w), rng.uniform(0, height - crop_h)
            return View(Box(left, top, min(left + crop_w, width), min(top + crop_h, height)), flipped)
    # No crop fits: the largest centred one whose aspect ratio is allowed.
    ratio = min(max(width / height, config.crop_ratio[0]), config.crop_ratio[1])
    crop_w, crop_h = min(width, height * ratio), min(height, width / ratio)
    left, top = (width - crop_w) / 2, (height - crop_h) / 2
    return View(Box(left, top, left + crop_w, top + crop_h), flipped)


def decode(
    data: bytes, choose: Callable[[tuple[int, int]], View], size: int
) -> tuple[Image.Image, View, tuple[int, int]]:
    """Decode an image to RGB, at the resolution that its view needs.

    A JPEG whose view is shrunk to half or less is decoded at 1/2, 1/4 or 1/8 of its size, which costs a fraction of the
    time. The pixels follow the rules of `zpipe.schemas.images`.

    Args:
        data: The encoded image.
        choose: Chooses the view of an image of (width, height).
        size: Side of the square that the view will be resized to, in pixels.

    Returns:
        The image, maybe smaller than the source; its view, in source pixels; and the source's (width, height).

    Raises:
        DECODE_ERRORS: The image cannot be decoded, or is none that `open_image` accepts.
    """
    with open_image(data) as image:
        width, height = image.size
        view = choose((width, height))
        shrink = min(view.box.width, view.box.height) / size
        if image.format == "JPEG" and shrink >= 2 and image.mode in ("RGB", "L"):
            image.draft(image.mode, (int(width / shrink), int(height / shrink)))
        return to_rgb(image), view, (width, height)


def view_image(image: Image.Image, view: View, size: int, source: tuple[int, int]) -> np.ndarray:
    """The view as uint8 [3, size, size], resized with antialiasing (bicubic).

    The array shares PIL's memory and is not contiguous, so that it is copied only once, when a batch is stacked.

    Args:
        image: The decoded image, maybe smaller than its source.
        view: The view, in source pixels.
        size: Side of the result, in pixels.
        source: (width, height) of the source.
    """
    across, down = image.width / source[0], image.height / source[1]
    box = view.box
    resized = image.resize(
        (size, size),
        Image.Resampling.BICUBIC,
        box=(box.x1 * across, box.y1 * down, min(box.x2 * across, image.width), min(box.y2 * down, image.height)),
    )
    pixels = np.asarray(resized)  # [size, size, 3]
    if view.flipped:
        pixels = pixels[:, ::-1]
    return pixels.transpose(2, 0, 1)


def view_maps(relevance: np.ndarray, views: Sequence[View], frames: Sequence[Box]) -> np.ndarray:
    """The part of each map that its view shows, resampled to the same grid.

    Args:
        relevance: Maps [m, gh, gw], or several of each view [m, k, gh, gw].
        views: The view of each map.
        frames: What each map covers, in the same pixels as the views.

    Returns:
        float32, of the same shape.

    Raises:
        ValueError: If a view leaves its frame.
    """
    boxes, flips = _seen(views)
    return crop_maps(relevance, frames, boxes, relevance.shape[-2:], flips=flips)


def view_tensors(kind: TensorKind, values: np.ndarray, views: Sequence[View], frames: Sequence[Box]) -> np.ndarray:
    """What the views show of tensors [m, ...] of any kind; vectors stay as they are. See `view_maps`."""
    if not kind.is_dense:
        return values
    if kind.dtype.kind == "i":
        boxes, flips = _seen(views)
        return crop_labels(values, frames, boxes, values.shape[-2:], flips=flips)
    if kind.axes == "hwd":
        return np.ascontiguousarray(np.moveaxis(view_maps(np.moveaxis(values, -1, 1), views, frames), 1, -1))
    return view_maps(values, views, frames)


def _seen(views: Sequence[View]) -> tuple[list[Box], np.ndarray]:
    return [view.box for view in views], np.array([view.flipped for view in views], bool)


def change_colours(rng: np.random.Generator, pixels: np.ndarray, colour: Colour) -> np.ndarray:
    """Change the colours of an image, uint8 [3, S, S]. No pixel moves, so the map stays valid.

    `deit` is RandAugment (2 operations of magnitude 9, standard deviation 0.5) without its geometric operations (shear,
    translate, rotate), which would have to be applied to maps too. `deit3` is one of greyscale, solarisation and
    Gaussian blur, then colour jitter of 0.3 (3-Augment, Touvron et al. 2022).
    """
    if colour == "none":
        return pixels
    image = Image.fromarray(pixels.transpose(1, 2, 0))
    image = _rand_augment(rng, image) if colour == "deit" else _three_augment(rng, image)
    return np.asarray(image).transpose(2, 0, 1)


PHOTO_MEAN, PHOTO_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's
ERASED_AREA = (0.02, 1 / 3)  # of the image, as in DeiT and timm
ERASED_RATIO = (0.3, 1 / 0.3)


def erase(rng: np.random.Generator, pixels: np.ndarray, probability: float) -> tuple[np.ndarray, Box | None]:
    """Random erasing (Zhong et al. 2020): replace a rectangle of 2 to 33 % of the image by noise.

    The noise has the mean and standard deviation of ImageNet's photos.
    The map does not hold for the erased pixels, see `erase_maps`.

    Args:
        rng: Generator of the draw.
        pixels: The image, uint8 [3, S, S].
        probability: Probability that anything is erased.

    Returns:
        The image, and the erased rectangle in its pixels, or None.
    """
    if rng.random() >= probability:
        return pixels, None
    _, height, width = pixels.shape
    for _ in range(10):
        area = rng.uniform(*ERASED_AREA) * height * width
        ratio = math.exp(rng.uniform(math.log(ERASED_RATIO[0]), math.log(ERASED_RATIO[1])))
        tall, wide = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < tall < height and 0 < wide < width:
            top, left = int(rng.integers(height - tall + 1)), int(rng.integers(width - wide + 1))
            mean, std = (np.array(value)[:, None, None] for value in (PHOTO_MEAN, PHOTO_STD))
            noise = 255 * (mean + std * rng.standard_normal((3, tall, wide)))
            pixels = pixels.copy("K")  # channels last, as PIL left them
            pixels[:, top : top + tall, left : left + wide] = np.clip(noise, 0, 255).astype(np.uint8)
            return pixels, Box(left, top, left + wide, top + tall)
    return pixels, None


def erase_maps(relevance: np.ndarray, boxes: Sequence[Box | None], size: int) -> np.ndarray:
    """Scale each cell of maps [m, gh, gw] or [m, k, gh, gw] by the fraction of it that was not erased.

    Args:
        relevance: The maps of views of size x size pixels.
        boxes: The erased rectangle of each view, in its pixels, or None.
        size: Side of the views, in pixels.

    Returns:
        float32, of the same shape.
    """
    grid = relevance.shape[-2:]
    kept = np.stack([np.ones(grid) if box is None else 1 - covered_share(grid, box, (size, size)) for box in boxes])
    return (relevance * (kept[:, None] if relevance.ndim == 4 else kept)).astype(np.float32)


RAND_AUGMENT = (
    "AutoContrast",
    "Equalize",
    "Invert",
    "PosterizeIncreasing",
    "SolarizeIncreasing",
    "SolarizeAdd",
    "ColorIncreasing",
    "ContrastIncreasing",
    "BrightnessIncreasing",
    "SharpnessIncreasing",
)


def _rand_augment(rng: np.random.Generator, image: Image.Image) -> Image.Image:
    from timm.data.auto_augment import RandAugment, rand_augment_ops

    # At the maximal magnitude, 10 by default, timm posterises to 0 bits: Pillow rejects that since version 13, and
    # painted the image black before. Just below the maximum it is 1 bit.
    strength = {"magnitude_std": 0.5, "magnitude_max": 9.999}
    operations = rand_augment_ops(magnitude=9, hparams=strength, transforms=list(RAND_AUGMENT))
    # timm draws from the two global generators, whose states are restored afterwards.
    python_state, numpy_state = random.getstate(), np.random.get_state()
    try:
        seeds = rng.integers(0, 2**32, 2)
        random.seed(int(seeds[0]))
        np.random.seed(int(seeds[1]))
        return RandAugment(operations, num_layers=2)(image)
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)


def _three_augment(rng: np.random.Generator, image: Image.Image) -> Image.Image:
    choice = rng.integers(3)
    if choice == 0:
        image = ImageOps.grayscale(image).convert("RGB")
    elif choice == 1:
        image = ImageOps.solarize(image, 128)
    else:
        image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0.1, 2.0)))
    jitters = [ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color]
    for number in rng.permutation(3):
        image = jitters[number](image).enhance(rng.uniform(0.7, 1.3))
    return image


def view_box(box: tuple[float, float, float, float], view: View) -> tuple[float, float, float, float]:
    """An object's box, given in source pixels, in fractions of the view, clipped to it: (x1, y1, x2, y2) in [0, 1]."""
    x1, x2 = ((edge - view.box.x1) / view.box.width for edge in (box[0], box[2]))
    y1, y2 = ((edge - view.box.y1) / view.box.height for edge in (box[1], box[3]))
    if view.flipped:
        x1, x2 = 1 - x2, 1 - x1
    x1, y1, x2, y2 = (min(max(edge, 0.0), 1.0) for edge in (x1, y1, x2, y2))
    return x1, y1, x2, y2
