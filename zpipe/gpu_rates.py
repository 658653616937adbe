"""Rates of a device and its host: products, copies, decoding, maps and training. A CPU has them, too."""

from __future__ import annotations

import copy
import io
import os
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import timm
import torch
import torch.nn.functional as F
from PIL import Image

from zpipe.pipeline.explainer import ExplainConfig, Explainer, precisions_of
from zpipe.pipeline.methods import DEFAULT_METHOD
from zpipe.pipeline.shard_reader import Frame, frame_image
from zpipe.pipeline.teacher import Teacher, TeacherSpec, load_teacher
from zpipe.schemas.devices import float32_arithmetic, is_out_of_memory
from zpipe.schemas.sample import Sample

# dtype and float32 arithmetic of each kind of product.
PRODUCTS: dict[str, tuple[torch.dtype, bool]] = {
    "float64": (torch.float64, False),
    "float32": (torch.float32, False),
    "tf32": (torch.float32, True),
    "bfloat16": (torch.bfloat16, False),
    "float16": (torch.float16, False),
}
LOW = {"bf16": torch.bfloat16, "fp16": torch.float16, "float32": None}  # of train.precision
CLEARLY = 1.5  # a lower precision of training is worth its rounding if its products are so many times as fast


@dataclass(frozen=True, kw_only=True)
class RatesConfig:
    """Sizes of what is timed."""

    seconds: float = 1.0
    """Time for each figure, beside its warm-up."""
    matrix: int = 4096
    """Rows and columns of the factors of a product; twice as many in half precision."""
    copy_bytes: int = 1 << 28
    """Size of a copy."""
    photo: tuple[int, int] = (500, 375)
    """Width and height of the JPEG that is decoded, in pixels."""
    teacher: str = "deit_base_patch16_224"
    """Teacher whose maps are timed."""
    student: str = "deit_small_patch16_224"
    """Model whose training is timed."""
    model_args: dict[str, int] | None = None
    """Arguments of both constructors."""
    map_batch: int = 64
    """Images whose maps are computed at once."""
    train_batch: int = 128
    """Images of a training step."""


@dataclass(frozen=True, kw_only=True)
class Rate:
    """How fast images are computed."""

    images_per_s: float
    """Images per second."""
    batch_size: int
    """Images that were computed at once."""
    image_bytes: int | None = None
    """Memory of the device that an image takes at its peak; None on a CPU."""


@dataclass(frozen=True, kw_only=True)
class Rates:
    """What `rates` measured."""

    matmul_tflops: dict[str, float]
    """Products of square matrices, in 1e12 operations per second, by the names of `PRODUCTS`; TF32 on CUDA only."""
    copy_gb_per_s: dict[str, float]
    """Copies in GB per second: from `pageable` and, on CUDA, `pinned` memory to the device, and within the `device`."""
    decode_images_per_s: dict[str, float]
    """JPEG files to pixels of the teacher's input, on `one_core` and on `all_cores`."""
    maps: dict[str, Rate]
    """Maps by the default method, from pixels in main memory to maps in main memory, by precision."""
    training: dict[str, Rate]
    """Forward pass, backward pass and AdamW step of a bare loop, by `train.precision`."""


def rates(device: torch.device, config: RatesConfig) -> Rates:
    """Measure all rates."""
    matmul = matmul_rates(device, config)
    teacher = load_teacher(TeacherSpec(name=config.teacher, weights="random", model_args=config.model_args or {}))
    return Rates(
        matmul_tflops=matmul,
        copy_gb_per_s=copy_rates(device, config),
        decode_images_per_s=decode_rates(config),
        maps={name: map_rate(teacher, name, device, config) for name in precisions_of(DEFAULT_METHOD, str(device))},
        training={(name := training_precision(matmul)): training_rate(name, device, config)},
    )


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def training_precision(matmul_tflops: dict[str, float]) -> str:
    """The `train.precision` for a device with these products: half precision where it has fast ones."""
    enough = CLEARLY * matmul_tflops["float32"]
    return next((name for name, kind in (("bf16", "bfloat16"), ("fp16", "float16")) if matmul_tflops[kind] >= enough),
                "float32")  # fmt: skip


def seconds_of(run: Callable[[], object], device: torch.device, limit_s: float) -> float:
    """Median seconds of a call that is already warm; at least one call, and no new one after the time is over."""
    times: list[float] = []
    begun = time.perf_counter()
    while not times or (time.perf_counter() - begun < limit_s and len(times) < 1000):
        _finish(device)
        before = time.perf_counter()
        run()
        _finish(device)
        times.append(time.perf_counter() - before)
    return statistics.median(times)


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def matmul_rates(device: torch.device, config: RatesConfig) -> dict[str, float]:
    """As `Rates.matmul_tflops`."""
    found = {}
    for name, (dtype, tf32) in PRODUCTS.items():
        if tf32 and device.type != "cuda":
            continue
        side = config.matrix * (2 if dtype.itemsize == 2 else 1)  # or the fastest would be over too soon to be timed
        matrix = torch.randn(side, side).to(device, dtype)
        with float32_arithmetic("tf32" if tf32 else "ieee"):
            matrix @ matrix
            seconds = seconds_of(partial(torch.matmul, matrix, matrix), device, config.seconds / 2)
        found[name] = 2 * side**3 / seconds / 1e12
    return found


def copy_rates(device: torch.device, config: RatesConfig) -> dict[str, float]:
    """As `Rates.copy_gb_per_s`."""
    there = torch.empty(config.copy_bytes, dtype=torch.uint8, device=device)
    sources = {"pageable": torch.zeros(config.copy_bytes, dtype=torch.uint8), "device": torch.zeros_like(there)}
    if device.type == "cuda":
        sources["pinned"] = sources["pageable"].pin_memory()
    found = {}
    for name, source in sources.items():
        there.copy_(source, non_blocking=True)
        seconds = seconds_of(partial(there.copy_, source, non_blocking=True), device, config.seconds / 4)
        found[name] = config.copy_bytes / seconds / 1e9
    return found


def made_up_photo(width: int, height: int) -> bytes:
    """A JPEG of smooth colours under noise: of its size, as many bytes as a photo has."""
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 256, (9, 12, 3), dtype=np.uint8))
    pixels = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), np.int16)
    noisy = (pixels + rng.integers(-12, 13, pixels.shape)).clip(0, 255).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noisy).save(buffer, "JPEG", quality=93)
    return buffer.getvalue()


def decode_rates(config: RatesConfig) -> dict[str, float]:
    """As `Rates.decode_images_per_s`, by the decoder of the extraction."""
    sample = Sample(key="photo", image=made_up_photo(*config.photo), label=None)
    frame = Frame(kind="full", size=(224, 224), interpolation="bicubic")

    def decode(until: float) -> int:
        count = 0
        while not count or time.perf_counter() < until:
            frame_image(sample, frame)
            count += 1
        return count

    found = {}
    for name, threads in (("one_core", 1), ("all_cores", cores())):
        with ThreadPoolExecutor(threads) as pool:
            begun = time.perf_counter()
            count = sum(pool.map(decode, [begun + config.seconds] * threads))
        found[name] = count / (time.perf_counter() - begun)
    return found


def map_rate(teacher: Teacher, precision: str, device: torch.device, config: RatesConfig) -> Rate:
    """The rate of maps by the default method; on a slow device with fewer images at once."""
    own = replace(teacher, model=copy.deepcopy(teacher.model))
    explain = Explainer(own, ExplainConfig(precision=precision), batch_size=config.map_batch, device=str(device))
    count, (height, width) = config.map_batch, teacher.image_size
    pixels = np.random.default_rng(0).integers(0, 256, (count, height, width, 3), dtype=np.uint8)
    targets = np.arange(count) % teacher.num_classes

    def maps(count: int) -> object:
        return explain.maps_of(pixels[:count], targets[:count])

    if device.type != "cuda":  # where smaller batches are filled up, and a batch takes less than a second
        few = max(1, count // 16)
        maps(few)
        one = seconds_of(lambda: maps(few), device, 0) / few
        while count > few and count * one > 2 * config.seconds:
            count //= 2
    maps(count)  # kernels are compiled, and a batch that does not fit is halved
    before = _begin_peak(device)
    maps(count)
    taken = None if before is None else torch.cuda.max_memory_allocated(device) - before
    seconds = seconds_of(lambda: maps(count), device, config.seconds)
    batch = min(count, explain.current_batch_size)
    image_bytes = None if taken is None else taken // batch
    return Rate(images_per_s=count / seconds, batch_size=batch, image_bytes=image_bytes)


def training_rate(precision: str, device: torch.device, config: RatesConfig) -> Rate:
    """The rate of a bare training loop; with fewer images at once where memory is short."""
    count = config.train_batch
    while True:
        try:
            return _training_rate(precision, device, config, count)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error) or count == 1:
                raise
        count //= 2
        if device.type == "cuda":
            torch.cuda.empty_cache()


def _training_rate(precision: str, device: torch.device, config: RatesConfig, count: int) -> Rate:
    torch.manual_seed(0)
    model = timm.create_model(config.student, num_classes=10, **config.model_args or {}).to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    side = model.patch_embed.img_size[0]
    images, labels = torch.randn(count, 3, side, side, device=device), torch.arange(count, device=device) % 10

    def step() -> None:
        low = LOW[precision]
        with torch.autocast(device.type, low) if low is not None else nullcontext():
            loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

    step()
    before = _begin_peak(device)
    step()
    image_bytes = None if before is None else (torch.cuda.max_memory_allocated(device) - before) // count
    return Rate(
        images_per_s=count / seconds_of(step, device, config.seconds), batch_size=count, image_bytes=image_bytes
    )


def _begin_peak(device: torch.device) -> int | None:
    """Forget the peak of memory so far; returns what is held now, or None on a CPU."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)
