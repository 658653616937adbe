"""`--precision auto`: the cheapest precision whose errors are smaller than what the method makes of invisible noise.

A method that divides by numbers near zero changes its maps when a pixel changes by a quarter of a grey level. Digits
beyond that say nothing about the image, so a precision is good enough if its maps are as close to those of float64 as
the float64 maps of the clean and of the noisy image are to each other. Both are measured by 1 - rank correlation, on
some images of the first shard, with the noise of `zpipe.pipeline.stability`.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import numpy as np

from zpipe.pipeline.explainer import NO_CLASS, PRECISIONS, ExplainConfig, Explainer, precisions_of
from zpipe.pipeline.shard_reader import Frame, FramedImage, framed_batches, read_samples
from zpipe.pipeline.stability import add_noise, stability
from zpipe.pipeline.teacher import Teacher
from zpipe.schemas.errors import ZpipeError
from zpipe.schemas.progress import Progress, silent
from zpipe.schemas.shard_index import ShardEntry

REFERENCE = "float64"
IMAGES = 16  # four batches, of which the fastest one is timed
BATCH = 4
# The median says what happens to a typical map, the 90 % quantile what happens to the fragile ones, of which there may
# be few. The worst map would leave the choice to one image; of 16 images, the 90 % quantile is the second worst.
QUANTILES = (0.5, 0.9)
NEARLY = 1.1  # costs within this factor are equal: which is the cheapest of them is left to disturbances of the timing
NEGLIGIBLE = 0.1  # errors within this fraction of the noise are equal: fewer bits take less memory


@dataclass(frozen=True, kw_only=True)
class Measured:
    """How exact a precision is on some images, and what it costs."""

    errors: np.ndarray
    """1 - rank correlation with the map of float64, [n]; infinite where only float64 has a map."""
    seconds: float
    """Time of an image."""


def decide(measured: Mapping[str, Measured], noise: np.ndarray) -> str:
    """Choose a precision.

    Args:
        measured: Precision -> what was measured; `float64`, whose errors are 0, is one of them.
        noise: 1 - rank correlation of the float64 maps of the clean and the noisy image, [n].

    Returns:
        The cheapest precision of which both `QUANTILES` of the errors are at most those of the noise. Of several that
        cost nearly the same, the one whose model has the fewest bits, if its errors are negligible; if those of none
        are, the one with the smallest errors.
    """
    # "higher" takes a measured value: between two infinite ones there is none.
    bounds = np.quantile(noise, QUANTILES, method="higher")
    errors = {name: np.quantile(each.errors, QUANTILES, method="higher") for name, each in measured.items()}
    exact = [name for name in measured if (errors[name] <= bounds).all()]
    cheapest = min(measured[name].seconds for name in exact)
    near = [name for name in exact if measured[name].seconds <= NEARLY * cheapest]
    negligible = [name for name in near if (errors[name] <= NEGLIGIBLE * bounds).all()]

    def order(name: str) -> tuple[float, ...]:
        bits = PRECISIONS[name][0].itemsize if negligible else 0
        return (bits, *reversed(errors[name].tolist()), measured[name].seconds)

    return min(negligible or near, key=order)


def choose_precision(
    teacher: Teacher, config: ExplainConfig, images: Sequence[FramedImage], *, device: str, progress: Progress = silent
) -> tuple[str, str]:
    """Measure the precisions that the method has on the device, and choose one.

    Where maps shall explain labels or several classes, the teacher's best class is measured. The memory of a float64
    copy of the teacher is needed meanwhile.

    Args:
        teacher: The teacher; it is not changed.
        config: What a map explains and by which method.
        images: Decoded images in the teacher's frame.
        device: The device of the extraction.
        progress: Reports the precisions that have been measured.

    Returns:
        The precision, and a line that says why.

    Raises:
        ZpipeError: No image has a usable map.
    """
    target = config.target if config.fixed_class is not None else "predicted"
    config = replace(config, target=target)
    pixels = np.stack([image.pixels for image in images if image.pixels is not None])  # uint8 [n, H, W, 3]
    exact = _explainer(teacher, config, REFERENCE, device)
    explained = exact(pixels, np.full(len(pixels), NO_CLASS))
    reference, targets = explained.maps, explained.targets
    noise = 1 - stability(reference, exact.maps_of(add_noise(pixels, [image.key for image in images]), targets))
    usable = np.isfinite(noise)
    if not usable.any():
        raise ZpipeError(
            f"--precision auto: none of {len(images)} images has a usable map by {config.method}; name a precision"
        )
    measured = {REFERENCE: Measured(errors=np.zeros(usable.sum()), seconds=_timed(exact, pixels, targets)[1])}
    del exact
    names = [name for name in precisions_of(config.method, device) if name != REFERENCE]
    for number, name in enumerate(names, start=1):
        maps, seconds = _timed(_explainer(teacher, config, name, device), pixels, targets)
        errors = np.nan_to_num(1 - stability(reference, maps), nan=np.inf)
        measured[name] = Measured(errors=errors[usable], seconds=seconds)
        progress("choose-precision", number, len(names))
    chosen = decide(measured, noise[usable])
    return chosen, _reason(chosen, measured, noise[usable])


def some_images(path: Path, entry: ShardEntry, frame: Frame) -> list[FramedImage]:
    """The first images of a tar that can be decoded, `IMAGES` at most.

    Raises:
        ZpipeError: The tar cannot be read, or none of its images can be decoded.
    """
    batches = framed_batches(read_samples(path, entry), frame, batch_size=BATCH, threads=2)
    decoded = (image for batch in batches for image in batch if image.pixels is not None)
    images = list(islice(decoded, IMAGES))
    if not images:
        raise ZpipeError(f"--precision auto: {path} has no image that can be decoded; name a precision")
    return images


def _explainer(teacher: Teacher, config: ExplainConfig, precision: str, device: str) -> Explainer:
    """An explainer of a copy of the teacher, since it changes the dtype and the device of its model."""
    own = replace(teacher, model=copy.deepcopy(teacher.model))
    return Explainer(own, replace(config, precision=precision), batch_size=BATCH, device=device)


def _timed(explainer: Explainer, pixels: np.ndarray, targets: np.ndarray) -> tuple[np.ndarray, float]:
    """Maps, and seconds per image of the fastest batch: the first ones warm up, and others may be disturbed."""
    parts, seconds = [], []
    for chosen in (slice(start, start + BATCH) for start in range(0, len(pixels), BATCH)):
        before = time.perf_counter()
        parts.append(explainer.maps_of(pixels[chosen], targets[chosen]))  # in main memory, so that a GPU has finished
        seconds.append((time.perf_counter() - before) / len(parts[-1]))
    return np.concatenate(parts), min(seconds)


def _reason(chosen: str, measured: Mapping[str, Measured], noise: np.ndarray) -> str:
    def quantiles(values: np.ndarray) -> str:
        return ", ".join(f"{value:.1e}" for value in np.quantile(values, QUANTILES, method="higher"))

    rows = [
        f"{name} {quantiles(each.errors)}, {each.seconds / measured[REFERENCE].seconds:.2f}"
        for name, each in sorted(measured.items(), key=lambda item: item[1].seconds)
    ]
    return (
        f"--precision auto: {chosen}; 1 - rank correlation with {REFERENCE} on {len(noise)} images (median, 90 %) and "
        f"time: noise of the method {quantiles(noise)}; {'; '.join(rows)}"
    )
