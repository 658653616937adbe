"""One random draw per sample, applied to image and map alike."""

from __future__ import annotations

import io
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from zpipe.schemas.errors import UsageError
from zpipe.schemas.geometry import Box, covered_share, crop_maps
from zpipe.schemas.sample import IMAGE_FORMATS
from zpipe.train.settings import check_choices

Augment = Literal["train", "eval"]
Colour = Literal["none", "deit", "deit3"]


@dataclass(frozen=True, kw_only=True)
class ViewConfig:
    """How a view of an image is chosen.

    train: random resized crop with an area share in `crop_scale` and an aspect ratio in `crop_ratio`, mirrored with
    probability `flip`. eval: the centre square of `crop_pct` of the shorter side, never mirrored. colour: what is done to the
    colours when training, see `change_colours`. erase: the probability that training paints over a rectangle, see `erase`.
    """

    augment: Augment = "train"
    crop_scale: tuple[float, float] = (0.08, 1.0)
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.5
    crop_pct: float = 0.875
    colour: Colour = "none"
    erase: float = 0.0

    def __post_init__(self) -> None:
        check_choices(self, "view.")
        low, high = self.crop_scale
        if not 0.0 < low <= high <= 1.0:
            raise UsageError(f"view.crop_scale {low:g}, {high:g}: give 0 < low <= high <= 1")
        low, high = self.crop_ratio
        if not 0.0 < low <= high:
            raise UsageError(f"view.crop_ratio {low:g}, {high:g}: give 0 < low <= high")
        if not 0.0 <= self.flip <= 1.0:
            raise UsageError(f"view.flip {self.flip:g}: give a probability in [0, 1]")
        if not 0.0 <= self.erase <= 1.0:
            raise UsageError(f"view.erase {self.erase:g}: give a probability in [0, 1]")
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


def decode(
    data: bytes, choose: Callable[[tuple[int, int]], View], size: int
) -> tuple[Image.Image, View, tuple[int, int]]:
    """Decode to RGB as far as the view that `choose((width, height))` takes needs it: (image, view, source size).

    A JPEG whose view is shrunk to half or less is decoded at half, a quarter or an eighth, which the format offers at a
    fraction of the work; the image is then smaller than the source, the view stays in source pixels. EXIF orientation is
    ignored, as boxes are in the stored pixel matrix. Errors: `DECODE_ERRORS` and PIL's DecompressionBombError for what PIL
    can't decode, formats that shards don't carry, and images of more pixels than PIL takes for harmless.
    """
    with Image.open(io.BytesIO(data), formats=IMAGE_FORMATS) as image:
        width, height = image.size
        if Image.MAX_IMAGE_PIXELS and width * height > Image.MAX_IMAGE_PIXELS:
            raise ValueError(f"{width} x {height} pixels are more than {Image.MAX_IMAGE_PIXELS}")
        view = choose((width, height))
        shrink = min(view.box.width, view.box.height) / size
        if image.format == "JPEG" and shrink >= 2 and image.mode in ("RGB", "L"):
            image.draft(image.mode, (int(width / shrink), int(height / shrink)))
        if image.mode != "RGB":
            return image.convert("RGB"), view, (width, height)
        image.load()  # convert() would copy
        return image, view, (width, height)


def view_image(image: Image.Image, view: View, size: int, source: tuple[int, int]) -> np.ndarray:
    """The view as uint8 [3, size, size], resized with antialiasing (bicubic). source: width and height that the view is in.

    The array is a view of PIL's rows; whoever stacks it into a batch copies it then, once.
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
    """The part of each map [m, gh, gw] over its frame that its view shows, resampled to the same grid: float32 [m, gh, gw].

    Errors: ValueError when a view leaves its frame.
    """
    flips = np.array([view.flipped for view in views], bool)
    return crop_maps(relevance, frames, [view.box for view in views], relevance.shape[1:], flips=flips)


def change_colours(rng: np.random.Generator, pixels: np.ndarray, colour: Colour) -> np.ndarray:
    """The colour part of an augmentation, uint8 [3, S, S] to the same. Nothing here moves a pixel, so maps stay true.

    deit: RandAugment (2 operations of magnitude 9, standard deviation 0.5) without its geometric operations (shear, translate,
    rotate), which would have to act on maps too. deit3: one of greyscale, solarisation and Gaussian blur,
    then colour jitter of 0.3 (3-Augment, Touvron et al. 2022).
    """
    if colour == "none":
        return pixels
    image = Image.fromarray(pixels.transpose(1, 2, 0))
    if colour == "deit":
        image = _rand_augment(rng, image)
    else:
        image = _three_augment(rng, image)
    return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))


PHOTO_MEAN, PHOTO_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's
ERASED_AREA = (0.02, 1 / 3)  # DeiT's, by way of timm
ERASED_RATIO = (0.3, 1 / 0.3)


def erase(rng: np.random.Generator, pixels: np.ndarray, probability: float) -> tuple[np.ndarray, Box | None]:
    """Random erasing (Zhong et al. 2020): now and then a rectangle of 2 to 33 % of the image becomes noise of the colours
    that photos have.

    pixels uint8 [3, S, S] -> the same and the rectangle, in its pixels, or None. What the map says of the
    pixels under it is no longer true; see `erase_maps`.
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
            pixels = pixels.copy()
            pixels[:, top : top + tall, left : left + wide] = np.clip(noise, 0, 255).astype(np.uint8)
            return pixels, Box(left, top, left + wide, top + tall)
    return pixels, None


def erase_maps(relevance: np.ndarray, boxes: Sequence[Box | None], size: int) -> np.ndarray:
    """Maps [m, gh, gw] of views of size x size pixels, each cell less by the share of it that was erased. float32."""
    kept = [
        np.ones(relevance.shape[1:]) if box is None else 1 - covered_share(relevance.shape[1:], box, (size, size))
        for box in boxes
    ]
    return (relevance * np.stack(kept)).astype(np.float32)


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

    # At its upper bound, which is 10 unless we say otherwise, timm posterises to 0 bits: Pillow refuses that from 13 on, and
    # painted the image black before. A hair below the bound it is 1 bit.
    strength = {"magnitude_std": 0.5, "magnitude_max": 9.999}
    operations = rand_augment_ops(magnitude=9, hparams=strength, transforms=list(RAND_AUGMENT))
    # timm draws from the two global generators; they are lent to it and given back.
    mine, numpys = random.getstate(), np.random.get_state()
    try:
        seeds = rng.integers(0, 2**32, 2)
        random.seed(int(seeds[0]))
        np.random.seed(int(seeds[1]))
        return RandAugment(operations, num_layers=2)(image)
    finally:
        random.setstate(mine)
        np.random.set_state(numpys)


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
    """An object's box (source pixels) in fractions of the view, clipped to it: (x1, y1, x2, y2) in [0, 1]."""
    x1, x2 = ((edge - view.box.x1) / view.box.width for edge in (box[0], box[2]))
    y1, y2 = ((edge - view.box.y1) / view.box.height for edge in (box[1], box[3]))
    if view.flipped:
        x1, x2 = 1 - x2, 1 - x1
    return tuple(min(max(edge, 0.0), 1.0) for edge in (x1, y1, x2, y2))
