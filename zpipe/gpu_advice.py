"""Settings for extraction and training on a machine, from what was measured on it. Pure functions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from zpipe.gpu_numbers import ROUNDED, Agreement
from zpipe.gpu_rates import Rate, Rates
from zpipe.pipeline.explainer import PRECISIONS, batch_that_fits
from zpipe.pipeline.methods import DEFAULT_METHOD

NEARLY = 1.15  # a precision that takes so many times as long as the fastest one costs about the same
AHEAD = 1.1  # images that are decoded for each one that the GPU takes
# Decoding and augmenting as the recipe `deit` does, relative to decoding alone.
AUGMENTED = 0.7
MAX_BATCH = 256  # of training, on each GPU


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What the advice depends on beside rates."""

    gpus: int
    """Number of GPUs, which are taken to be alike."""
    cores: int
    """CPU cores."""
    memory_bytes: int
    """Memory of each GPU."""


@dataclass(frozen=True, kw_only=True)
class Advice:
    """A flag to give."""

    command: str
    """Verb of the command line."""
    flag: str
    """The flag with its value."""
    reason: str
    """Why, in a few words."""


def advise(machine: Machine, rates: Rates, agreement: Sequence[Agreement]) -> list[Advice]:
    """Flags for `zpipe extract-teacher-maps` and `zpipe train-vit`.

    Args:
        machine: The machine.
        rates: What was measured on one GPU and on all cores.
        agreement: How well each precision agrees with float64.
    """
    return [*_extraction(machine, rates, agreement), *_training(machine, rates)]


def choose_precision(rates: Rates, agreement: Sequence[Agreement]) -> str:
    """The precision for the default method.

    Returns:
        Of the precisions that agree with float64 and are nearly as fast as the fastest of them, the one whose worst map
        agrees best; where that is equal to three digits, the one with the most digits in its forward pass.
    """
    found = {each.precision: each for each in agreement if each.method == DEFAULT_METHOD}
    usable = [name for name in rates.maps if name in found and found[name].median >= ROUNDED] or ["float32"]
    fastest = max(rates.maps[name].images_per_s for name in usable)
    near = [name for name in usable if rates.maps[name].images_per_s * NEARLY >= fastest]

    def order(name: str) -> tuple[float, ...]:
        worst = found[name].worst if name in found else -1.0
        return round(worst, 3), PRECISIONS[name][0].itemsize, rates.maps[name].images_per_s

    return max(near, key=order)


def _extraction(machine: Machine, rates: Rates, agreement: Sequence[Agreement]) -> list[Advice]:
    precision = choose_precision(rates, agreement)
    rate = rates.maps[precision]
    found = next(
        (each for each in agreement if (each.method, each.precision) == (DEFAULT_METHOD, precision)),
        Agreement(method=DEFAULT_METHOD, precision=precision, median=-1.0, worst=-1.0),
    )
    ratio = rates.matmul_tflops["float64"] / rates.matmul_tflops["float32"]
    how = f"{rate.images_per_s:,.0f} maps/s, rank correlation with float64 {found.median:.4f}, worst {found.worst:.3f}"
    how += f"; FP64 has {ratio:.0%} of the rate of FP32 here; --precision auto measures it on your images"
    batch = batch_that_fits(rate.batch_size, rate.image_bytes or 0, 1, machine.memory_bytes)
    size = "" if rate.image_bytes is None else f"; {batch * rate.image_bytes / 2**30:.1f} GiB"
    per_core = rates.decode_images_per_s["all_cores"] / machine.cores
    cores = max(1, machine.cores // machine.gpus)
    needed = math.ceil(AHEAD * rate.images_per_s / per_core)
    feeding = f"{needed} cores decode {AHEAD * rate.images_per_s:,.0f} images/s"
    if needed > cores:
        feeding = (
            f"WARNING: decoding can't feed the GPU: {cores} cores decode {cores * per_core:,.0f} images/s, and "
            f"{rate.images_per_s:,.0f} maps/s need {needed} cores for each GPU"
        )
    flags = [
        ("--device cuda", "the GPU that was measured"),
        (f"--precision {precision}", how),
        (f"--batch-size {batch}", f"the size that was measured{size}" if batch == rate.batch_size else f"fits{size}"),
        (f"--actors {machine.gpus}", "one worker for each GPU"),
        (f"--threads {min(needed, cores)}", feeding),
    ]
    return [Advice(command="extract-teacher-maps", flag=flag, reason=reason) for flag, reason in flags]


def _training(machine: Machine, rates: Rates) -> list[Advice]:
    ((precision, rate),) = rates.training.items()
    ratio = rates.matmul_tflops[{"bf16": "bfloat16", "fp16": "float16"}.get(precision, "float32")]
    ratio /= rates.matmul_tflops["float32"]
    batch = _training_batch(rate, machine.memory_bytes)
    per_worker = AUGMENTED * rates.decode_images_per_s["all_cores"] / machine.cores
    cores = max(1, machine.cores // machine.gpus - 1)  # one core trains
    needed = math.ceil(AHEAD * rate.images_per_s / per_worker)
    feeding = f"{needed} decode and augment {AHEAD * rate.images_per_s:,.0f} images/s"
    if needed > cores:
        feeding = (
            f"WARNING: decoding can't feed the GPU: {cores} cores beside the one that trains decode and augment about "
            f"{cores * per_worker:,.0f} images/s, and a DeiT-S at {rate.images_per_s:,.0f} images/s needs {needed}"
        )
    each = f"{batch} on each of {machine.gpus} GPUs" if machine.gpus > 1 else f"{batch} on the GPU"
    flags = [
        ("--device cuda", "the GPU that was measured"),
        (
            f"--set train.precision={precision}",
            f"its products are {ratio:.1f} times as fast as those of float32; DeiT-S: {rate.images_per_s:,.0f} images/s"
            if precision != "float32"
            else f"products in half precision are hardly faster here; DeiT-S: {rate.images_per_s:,.0f} images/s",
        ),
        (f"--batch-size {batch * machine.gpus}", f"{each}, which fits a DeiT-S; the learning rate is yours to scale"),
        (f"--data-workers {min(needed, cores)}", feeding),
        (f"--num-workers {machine.gpus}", "one training process for each GPU"),
    ]
    return [Advice(command="train-vit", flag=flag, reason=reason) for flag, reason in flags]


def _training_batch(rate: Rate, memory_bytes: int) -> int:
    """The largest power of two up to `MAX_BATCH` that takes at most half of the memory; as measured on a CPU."""
    if rate.image_bytes is None:
        return rate.batch_size
    return batch_that_fits(MAX_BATCH, rate.image_bytes, 1, memory_bytes)
