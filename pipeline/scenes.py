"""A demo data set that needs no download: small photo scenes, each with one whole handwritten digit to find and name.

A scene is a crop of a real photograph of reduced contrast, with one whole handwritten digit on it and a handful of
distractors: pieces cut from other digits, drawn with the same pens at the same stroke width. A model has to find the
one whole digit among the pieces before it can name it. The digit covers only a few per cent of the scene, so most of
the image does not matter for the class. Every scene comes with the box of its digit.

Digits and photographs both ship inside scikit-learn (``load_digits``: 1,797 digits of 8 x 8 pixels;
``load_sample_images``: two photographs). ``train`` and ``val`` share neither a digit nor a photo pixel.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from zpipe.schemas.choices import check_choice
from zpipe.schemas.errors import UsageError, ZpipeError

SPLITS = ("train", "val")

NUM_CLASSES = 10

# Scenes per batch. Every batch has its own random stream and is always drawn in full, so the first n scenes do not
# depend on the number of scenes. It also bounds the memory, to about 70 MB per batch at 48 px.
_BATCH = 1024
_GLYPH = 8  # scikit-learn's digits are 8 x 8 cells with 17 grey levels, 0 to 16
_PIECE = 4  # a distractor is a window of 4 x 4 cells out of such a digit: half its height and width
_VAL_SHARE = 0.25  # of the digits, and of the width of each photograph (its right edge)
_SPLIT_SEED = 20240  # of the validation digits; not a setting, or splits of two data sets would mix
_PLACEMENT_TRIES = 24
_MAX_IMAGE = 80  # width of the validation area of a photograph at half size


@dataclass(frozen=True, kw_only=True)
class SceneConfig:
    """What a scene looks like. Ranges are inclusive ``(low, high)`` pairs, drawn uniformly.

    Raises:
        UsageError: A value is out of range.
    """

    image_size: int = 48
    """Height and width of a scene in pixels."""
    digit_size: tuple[int, int] = (11, 13)
    """Height and width of the 8 x 8 cells of the whole digit in pixels; the box of its ink is a little narrower."""
    pieces: tuple[int, int] = (4, 5)
    """Number of distractors."""
    piece_size: tuple[int, int] = (5, 6)
    """Height and width of a distractor in pixels; half of `digit_size` gives it the stroke width of the digit."""
    photo_contrast: float = 0.35
    """Remaining contrast of the photograph around its mean, 0 to 1."""
    photo_level: tuple[int, int] = (50, 90)
    """Mean grey level of the background, 0 to 255."""
    ink_level: tuple[int, int] = (200, 255)
    """Grey level of the pens, 0 to 255, drawn per channel, so that pens are slightly tinted."""

    def __post_init__(self) -> None:
        for name in ("digit_size", "pieces", "piece_size", "photo_level", "ink_level"):
            try:
                low, high = getattr(self, name)
            except (TypeError, ValueError) as error:
                raise UsageError(f"SceneConfig.{name} is {getattr(self, name)}; give two whole numbers") from error
            if not (_whole(low) and _whole(high)):
                raise UsageError(f"SceneConfig.{name} is ({low}, {high}); give two whole numbers")
            floor = 2 if name.endswith("size") else 0
            if not floor <= low <= high:
                raise UsageError(f"SceneConfig.{name} is ({low}, {high}); give {floor} <= low <= high")
        for name in ("photo_level", "ink_level"):
            if getattr(self, name)[1] > 255:
                raise UsageError(f"SceneConfig.{name} ends at {getattr(self, name)[1]}; grey levels end at 255")
        if not 0.0 <= self.photo_contrast <= 1.0:
            raise UsageError(f"SceneConfig.photo_contrast is {self.photo_contrast}; give a number from 0 to 1")
        if not _whole(self.image_size):
            raise UsageError(f"SceneConfig.image_size is {self.image_size}; give a whole number")
        if not max(self.digit_size[1], self.piece_size[1]) <= self.image_size <= _MAX_IMAGE:
            raise UsageError(
                f"SceneConfig.image_size is {self.image_size}; it must hold a digit of {self.digit_size[1]} px "
                f"and pieces of {self.piece_size[1]} px, and be at most {_MAX_IMAGE}, "
                "the width of the photo area kept for val"
            )


def _whole(value: object) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


@dataclass(frozen=True, kw_only=True)
class SceneBatch:
    """Up to 1,024 scenes."""

    images: np.ndarray
    """uint8 [B, H, W, 3], RGB."""
    labels: np.ndarray
    """int64 [B], the digit, 0 to 9."""
    boxes: np.ndarray
    """float32 [B, 4], the ink of the whole digit as x1, y1, x2, y2 in pixels; x2 and y2 are exclusive."""
    masks: np.ndarray
    """uint8 [B, H, W], 1 where the pen of the whole digit shows more than the ground, else 0."""


def make_scenes(count: int, *, split: str, seed: int, config: SceneConfig | None = None) -> Iterator[SceneBatch]:
    """Yield scenes in batches of up to 1,024. The same arguments always give the same scenes.

    The first n scenes are the same for every ``count >= n``. Labels are drawn uniformly from the ten digits. The
    arguments are checked by the call, not when the first batch is drawn.

    Args:
        count: Number of scenes.
        split: ``train`` or ``val``, which share neither a digit nor a photo pixel.
        seed: Seed of the scenes.
        config: What a scene looks like; None takes the defaults.

    Raises:
        UsageError: The split is unknown, or a number is negative.
        ZpipeError: scikit-learn is not installed.
    """
    check_choice("--split", split, SPLITS)
    if count < 0 or seed < 0:
        raise UsageError(f"count {count} and seed {seed} must not be negative")
    return _batches(count, _load_source(split), split, seed, config or SceneConfig())


def _batches(count: int, source: _Source, split: str, seed: int, config: SceneConfig) -> Iterator[SceneBatch]:
    for index, start in enumerate(range(0, count, _BATCH)):
        # The split is part of the seed: train and val must not share layouts either.
        rng = np.random.default_rng([seed, int(split == "val"), index])
        batch = _draw(rng, source, config)
        keep = min(_BATCH, count - start)
        yield SceneBatch(**{name: values[:keep] for name, values in vars(batch).items()})


class _Source(NamedTuple):
    """The digits and photographs of one split."""

    glyphs: np.ndarray  # float32 [N, 8, 8], ink 0 to 1
    labels: np.ndarray  # int64 [N]
    extents: np.ndarray  # float32 [N, 4], x1 y1 x2 y2 of the ink as fractions of the width and height of the glyph
    by_label: tuple[np.ndarray, ...]  # ten int64 arrays: the glyphs of each digit
    pieces: np.ndarray  # float32 [M, 4, 4], all windows of all glyphs that hold enough ink to distract
    photos: tuple[np.ndarray, ...]  # float32 [H, W, 3] each: both photographs at full and at half size


@lru_cache(maxsize=2)
def _load_source(split: str) -> _Source:
    try:
        from sklearn.datasets import load_digits, load_sample_images
    except ImportError as error:
        raise ZpipeError("the demo scenes need scikit-learn: pip install 'zpipe[demo]'") from error

    digits = load_digits()
    # Shuffled before it is split, because the file is partly ordered by writer and both splits should have all writers.
    order = np.random.default_rng(_SPLIT_SEED).permutation(len(digits.target))
    num_val = round(len(order) * _VAL_SHARE)
    chosen = np.sort(order[:num_val] if split == "val" else order[num_val:])
    glyphs = (digits.images[chosen] / 16.0).astype(np.float32)
    labels = digits.target[chosen].astype(np.int64)

    windows = np.lib.stride_tricks.sliding_window_view(glyphs, (_PIECE, _PIECE), axis=(1, 2))
    windows = windows.reshape(-1, _PIECE, _PIECE)
    pieces = windows[windows.mean(axis=(1, 2)) > 0.3]

    photos = []
    for photo in load_sample_images().images:
        cut = round(photo.shape[1] * (1.0 - _VAL_SHARE)) // 2 * 2
        area = photo[:, cut:] if split == "val" else photo[:, :cut]
        area = area[: area.shape[0] // 2 * 2, : area.shape[1] // 2 * 2].astype(np.float32)
        height, width, channels = area.shape
        photos.append(area)
        photos.append(area.reshape(height // 2, 2, width // 2, 2, channels).mean(axis=(1, 3)))

    return _Source(
        glyphs=glyphs,
        labels=labels,
        extents=_ink_extents(glyphs),
        by_label=tuple(np.flatnonzero(labels == digit) for digit in range(NUM_CLASSES)),
        pieces=np.ascontiguousarray(pieces),
        photos=tuple(photos),
    )


def _ink_extents(glyphs: np.ndarray) -> np.ndarray:
    """The smallest box around the ink of glyphs, float32 [N, G, G] -> float32 [N, 4], as fractions of their side."""
    side = glyphs.shape[1]
    ink = glyphs > 0.2  # fainter cells are the blur around a stroke
    edges = []
    for axis in (1, 2):  # x comes from the columns, which stay when rows are reduced, and the other way round
        line: np.ndarray = np.any(ink, axis=axis)
        edges.append((line.argmax(axis=1), side - line[:, ::-1].argmax(axis=1)))
    (x1, x2), (y1, y2) = edges
    return np.stack([x1, y1, x2, y2], axis=1).astype(np.float32) / side


def _draw(rng: np.random.Generator, source: _Source, config: SceneConfig) -> SceneBatch:
    """Draw one full batch."""
    size = config.image_size
    canvas = _backgrounds(rng, source, config)

    labels = rng.integers(0, NUM_CLASSES, _BATCH)
    picks = rng.random(_BATCH)
    glyph = np.array([source.by_label[y][int(p * len(source.by_label[y]))] for y, p in zip(labels, picks, strict=True)])
    digit_size = _uniform(rng, config.digit_size, _BATCH)
    corner = (rng.random((_BATCH, 2)) * (size - digit_size + 1)[:, None]).astype(np.int64)  # x, y
    digit = _enlarge(source.glyphs[glyph], digit_size)
    _stamp(canvas, digit, corner, _pens(rng, config))
    inked = np.zeros((*canvas.shape[:3], 1), np.float32)
    _stamp(inked, digit, corner, np.ones((_BATCH, 1), np.float32))

    # The whole glyph and a margin of one pixel are kept free: a piece that touches the digit would change it.
    taken = [np.concatenate([corner - 1, corner + digit_size[:, None] + 1], axis=1)]
    pieces_here = _uniform(rng, config.pieces, _BATCH)
    for number in range(config.pieces[1]):
        piece_size = _uniform(rng, config.piece_size, _BATCH)
        piece = source.pieces[rng.integers(0, len(source.pieces), _BATCH)]
        place = _free_corner(rng, taken, piece_size, size)
        pens = _pens(rng, config)
        present = number < pieces_here
        sprite = _enlarge(piece, piece_size) * present[:, None, None]
        _stamp(canvas, sprite, place, pens)
        taken.append(np.concatenate([place, place + piece_size[:, None]], axis=1))

    # Sprites are padded to the largest size, so the canvas has a margin on the right and at the bottom.
    images = np.clip(np.rint(canvas[:, :size, :size]), 0, 255).astype(np.uint8)
    boxes = np.tile(corner, 2) + source.extents[glyph] * digit_size[:, None]
    masks = (inked[:, :size, :size, 0] > 0.5).astype(np.uint8)
    return SceneBatch(images=images, labels=labels.astype(np.int64), boxes=boxes.astype(np.float32), masks=masks)


def _uniform(rng: np.random.Generator, bounds: tuple[int, int], count: int) -> np.ndarray:
    return rng.integers(bounds[0], bounds[1] + 1, count)


def _pens(rng: np.random.Generator, config: SceneConfig) -> np.ndarray:
    """Float32 ``[B, 3]``: one ink colour per scene."""
    low, high = config.ink_level
    return rng.uniform(low, high, (_BATCH, 3)).astype(np.float32)


def _backgrounds(rng: np.random.Generator, source: _Source, config: SceneConfig) -> np.ndarray:
    """Random photo crops of reduced contrast with a blank margin: float32 [B, H + margin, W + margin, 3]."""
    size = config.image_size
    margin = max(config.digit_size[1], config.piece_size[1])
    canvas = np.zeros((_BATCH, size + margin, size + margin, 3), dtype=np.float32)
    which = rng.integers(0, len(source.photos), _BATCH)
    offset = rng.random((_BATCH, 2))
    level = rng.uniform(*config.photo_level, _BATCH).astype(np.float32)
    for number, photo in enumerate(source.photos):
        scenes = np.flatnonzero(which == number)
        room = np.array(photo.shape[:2]) - size + 1
        top, left = (offset[scenes] * room).astype(np.int64).T
        windows = np.lib.stride_tricks.sliding_window_view(photo, (size, size), axis=(0, 1))
        crops = windows[top, left].transpose(0, 2, 3, 1)
        mean = crops.mean(axis=(1, 2, 3), keepdims=True)
        flat = level[scenes, None, None, None] + config.photo_contrast * (crops - mean)
        canvas[scenes, :size, :size] = np.clip(flat, 0, 255)
    return canvas


def _enlarge(sprites: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Resize sprites, float32 [B, G, G], bilinearly to sizes, int [B]. Returns [B, P, P], zero beyond each size."""
    side = sprites.shape[1]
    padded = int(sizes.max())
    weights = np.zeros((padded + 1, padded, side), dtype=np.float32)
    for size in np.unique(sizes):
        centre = np.clip((np.arange(size) + 0.5) * side / size - 0.5, 0, side - 1)
        weights[size, :size] = np.maximum(0.0, 1.0 - np.abs(centre[:, None] - np.arange(side)))
    each = weights[sizes]
    return each @ sprites @ each.transpose(0, 2, 1)


def _stamp(canvas: np.ndarray, sprites: np.ndarray, corners: np.ndarray, pens: np.ndarray) -> None:
    """Paint ink [B, P, P] (0 to 1) in the colours `pens` [B, channels] at the x, y of `corners` [B, 2], in place."""
    reach = np.arange(sprites.shape[1])
    scene = np.arange(len(sprites))[:, None, None]
    rows = (corners[:, 1:] + reach)[:, :, None]
    columns = (corners[:, :1] + reach)[:, None, :]
    under = canvas[scene, rows, columns]
    canvas[scene, rows, columns] = under + sprites[..., None] * (pens[:, None, None, :] - under)


def _free_corner(rng: np.random.Generator, taken: list[np.ndarray], sizes: np.ndarray, image_size: int) -> np.ndarray:
    """Find a place for a square of each of `sizes` [B] that overlaps none of the boxes `taken`.

    The first free place of a few random ones is taken; in a scene that is too crowded, the one that covers least.

    Returns:
        int64 [B, 2], x and y.
    """
    tries = rng.random((len(sizes), _PLACEMENT_TRIES, 2))
    low = (tries * (image_size - sizes + 1)[:, None, None]).astype(np.int64)
    high = low + sizes[:, None, None]
    covered = np.zeros((len(sizes), _PLACEMENT_TRIES))
    for box in taken:
        overlap = np.minimum(high, box[:, None, 2:]) - np.maximum(low, box[:, None, :2])
        covered += np.prod(np.maximum(overlap, 0), axis=2)
    return low[np.arange(len(sizes)), covered.argmin(axis=1)]
