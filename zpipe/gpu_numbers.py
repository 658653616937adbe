"""Numbers of a device against float64: products, maps of every method and precision, attention, ZoomViT.

Every function takes a device and works on a CPU, too.
"""

from __future__ import annotations

import copy
import tempfile
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

import zpipe.train.models  # noqa: F401  # registers the models
from zpipe.pipeline.explainer import PRECISIONS, ExplainConfig, Explainer, precisions_of
from zpipe.pipeline.make_shards import FolderSource, make_shards
from zpipe.pipeline.methods import METHODS
from zpipe.pipeline.stability import stability
from zpipe.pipeline.teacher import Teacher, TeacherSpec, load_teacher
from zpipe.schemas.devices import float32_arithmetic
from zpipe.train.checkpoint import Preprocessing
from zpipe.train.data.loader import RelevanceLoader
from zpipe.train.fit.config import TrainConfig
from zpipe.train.fit.initialise import build_vit
from zpipe.train.fit.loop import Trainer
from zpipe.train.fit.train_vit import ClassifyTask, VitConfig
from zpipe.train.models.packing import Packing, attend_flash, attend_padded, attend_runs, packing
from zpipe.train.models.zoomvit import ZoomViT

EXACT, ROUNDED = 0.9999, 0.995  # median rank correlations with float64 that a precision must reach
FLOAT32_ERROR = 3e-6  # of products and convolutions; factors in TF32, with 10 bits, give 3e-4
MODEL_ERROR = 1e-4  # of the values and gradients of a model in float32; TF32 gives more
BFLOAT16_ERROR = 0.05
CLASSES = 10


@dataclass(frozen=True, kw_only=True)
class NumbersConfig:
    """Sizes of what is computed."""

    images: int = 32
    """Images whose maps are compared."""
    side: int = 112
    """Width and height of the images in pixels."""
    depth: int = 4
    """Blocks of the models."""
    width: int = 192
    """Width of the models, of three heads."""


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """How well the maps of a precision agree with those of float64 on the same device; float64 with that of the CPU."""

    method: str
    """Attribution method."""
    precision: str
    """Name of `zpipe.pipeline.explainer.PRECISIONS`."""
    median: float
    """Median rank correlation over the images; -1 for images without a map."""
    worst: float
    """Lowest rank correlation."""

    @property
    def needed(self) -> float:
        """The median that the precision must reach."""
        dtype, sweep = PRECISIONS[self.precision]
        return ROUNDED if dtype == torch.bfloat16 or sweep in ("bfloat16", "tf32") else EXACT

    @property
    def ok(self) -> bool:
        """Whether it does."""
        return self.median >= self.needed


@dataclass(frozen=True, kw_only=True)
class Check:
    """A measured value and its limit."""

    name: str
    """What was computed."""
    value: float | None
    """The relative error, or the number of waits; None where a result is not finite."""
    limit: float
    """The largest value that is right."""

    @property
    def ok(self) -> bool:
        """Whether the value is within its limit."""
        return self.value is not None and self.value <= self.limit


@dataclass(frozen=True, kw_only=True)
class Numbers:
    """What `numbers` found."""

    agreement: tuple[Agreement, ...]
    """For each method and precision."""
    errors: tuple[Check, ...]
    """Errors relative to float64 on the CPU, in the Euclidean norm."""
    waits: tuple[Check, ...]
    """How often the host waited for the device; empty on a CPU."""


def numbers(device: torch.device, config: NumbersConfig) -> Numbers:
    """Compare the device with float64, and count what the host waits for."""
    errors = [*float32_errors(device), *attention_errors(device, config), *zoomvit_errors(device, config)]
    waits = waits_of(device, config) if device.type == "cuda" else []
    return Numbers(agreement=tuple(agreement(device, config)), errors=tuple(errors), waits=tuple(waits))


def made_up_teacher(config: NumbersConfig) -> Teacher:
    """A DeiT whose random weights are large enough for its answers and maps to depend on the image."""
    sizes = {"img_size": config.side, "depth": config.depth, "embed_dim": config.width}
    spec = TeacherSpec(name="deit_tiny_patch16_224", weights="random", num_classes=CLASSES, model_args=sizes)
    teacher = load_teacher(spec)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in teacher.model.parameters():
            if parameter.ndim in (2, 4):
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(noise / parameter[0].numel() ** 0.5)
    return teacher


def made_up_pixels(count: int, side: int) -> np.ndarray:
    """Smooth images of random colours, uint8 [count, side, side, 3]."""
    coarse = np.random.default_rng(0).integers(0, 256, (count, 7, 7, 3), dtype=np.uint8)
    smooth = [Image.fromarray(colours).resize((side, side), Image.Resampling.BICUBIC) for colours in coarse]
    return np.stack([np.asarray(image) for image in smooth])


def agreement(device: torch.device, config: NumbersConfig, methods: Iterable[str] = tuple(METHODS)) -> list[Agreement]:
    """Agreement of every precision of the methods that the device has."""
    teacher, pixels = made_up_teacher(config), made_up_pixels(config.images, config.side)
    targets = np.arange(config.images) % CLASSES

    def maps(method: str, precision: str, place: str) -> np.ndarray:
        own = replace(teacher, model=copy.deepcopy(teacher.model))  # an explainer changes the dtype of its model
        settings = ExplainConfig(method=method, precision=precision)
        return Explainer(own, settings, batch_size=config.images, device=place).maps_of(pixels, targets)

    found = []
    for method in methods:
        reference = maps(method, "float64", str(device))
        for precision in precisions_of(method, str(device)):
            if precision == "float64":
                ranks = stability(maps(method, precision, "cpu"), reference)
            else:
                ranks = stability(reference, maps(method, precision, str(device)))
            ranks = np.nan_to_num(ranks, nan=-1.0)
            median, worst = float(np.median(ranks)), float(ranks.min())
            found.append(Agreement(method=method, precision=precision, median=median, worst=worst))
    return found


def float32_errors(device: torch.device) -> list[Check]:
    """Errors of products and convolutions in float32, which must not be rounded to TF32 even if torch is set to."""
    generator = torch.Generator().manual_seed(0)
    images, kernel, matrix = (
        torch.randn(*shape, generator=generator) for shape in ((8, 64, 32, 32), (64, 64, 3, 3), (512, 512))
    )
    products: dict[str, tuple[Callable[..., Tensor], Tensor, Tensor]] = {
        "matrix product in float32": (torch.matmul, matrix, matrix),
        "convolution in float32": (torch.conv2d, images, kernel),
    }
    checks = []
    with float32_arithmetic("tf32"):
        for name, (compute, *args) in products.items():
            exact = compute(*(each.double() for each in args))
            with float32_arithmetic():
                found = compute(*(each.to(device) for each in args))
            checks.append(Check(name=name, value=relative_error(found, exact), limit=FLOAT32_ERROR))
    return checks


def attention_errors(device: torch.device, config: NumbersConfig) -> list[Check]:
    """Attention over packed sequences and its gradient, against a dense call for each sequence in float64.

    The flash kernels are used in bfloat16 where the device has them; the padded form, in float32, is on every device.
    """
    lengths = [1, 17, 64, 197, 5, 197, 33]
    generator = torch.Generator().manual_seed(0)
    heads = 3, config.width // 3
    qkv = torch.randn(sum(lengths), 3, *heads, generator=generator).to(torch.bfloat16)
    weight = torch.randn(sum(lengths), *heads, generator=generator).to(torch.bfloat16)
    exact = _attended(attend_runs, qkv.double(), weight.double(), packing(torch.tensor(lengths), lengths))
    packed = packing(torch.tensor(lengths, device=device), lengths)
    ways: list[tuple[str, Callable[..., Tensor], torch.dtype, float]]
    ways = [("padded attention in float32", attend_padded, torch.float32, MODEL_ERROR)]
    if packed.has_flash:
        ways.append(("packed flash attention in bfloat16", attend_flash, torch.bfloat16, BFLOAT16_ERROR))
    checks = []
    for name, attend, dtype, limit in ways:
        with float32_arithmetic():
            found = _attended(attend, qkv.to(device, dtype), weight.to(device, dtype), packed)
        for part, values, right in zip(("", ", backward"), found, exact, strict=True):
            checks.append(Check(name=name + part, value=relative_error(values, right), limit=limit))
    return checks


def _attended(attend: Callable[..., Tensor], qkv: Tensor, weight: Tensor, packed: Packing) -> tuple[Tensor, Tensor]:
    """Attention [T, H, D], and the gradient of its weighted sum by qkv [T, 3, H, D]."""
    qkv = qkv.requires_grad_()
    values = attend(qkv, packed)
    (gradient,) = torch.autograd.grad((values * weight).sum(), qkv)
    return values.detach(), gradient


def zoomvit_errors(device: torch.device, config: NumbersConfig) -> list[Check]:
    """Logits and gradients of a ZoomViT by threshold and by budget, against float64 on the CPU."""
    torch.manual_seed(0)
    model = ZoomViT(config.side, embed_dim=config.width, depth=config.depth, num_heads=3, num_classes=CLASSES)
    cells = model.score_grid**2
    images, scores = torch.randn(8, 3, config.side, config.side), torch.rand(8, cells)
    checks = []
    for zoom in ({"alpha": 0.5}, {"budget": cells // 3}):
        logits, gradients = _answer(copy.deepcopy(model).double(), images.double(), scores, zoom)
        for name, precision, limit in (("float32", None, MODEL_ERROR), ("bfloat16", torch.bfloat16, BFLOAT16_ERROR)):
            there = copy.deepcopy(model).to(device)
            with float32_arithmetic(), torch.autocast(device.type, precision, enabled=precision is not None):
                found, grads = _answer(there, images.to(device), scores.to(device), zoom)
            what = f"ZoomViT by {next(iter(zoom))} in {name}"
            checks.append(Check(name=what, value=relative_error(found, logits), limit=limit))
            checks.append(Check(name=f"{what}, backward", value=relative_error(grads, gradients), limit=limit))
    return checks


def _answer(model: nn.Module, images: Tensor, scores: Tensor, zoom: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Logits [B, C], and the gradients of their weighted sum by all parameters, as one vector."""
    logits = model(images, scores, **zoom)
    weight = torch.linspace(-1, 1, logits.numel(), dtype=torch.float64).view_as(logits).to(logits.device)
    (logits.double() * weight).sum().backward()
    gradients = [p.grad.flatten().double() for p in model.parameters() if p.grad is not None]
    return logits.detach(), torch.cat(gradients)


def relative_error(found: Tensor, exact: Tensor) -> float | None:
    """The norm of the difference, relative to that of the exact values; None if it is not finite."""
    exact = exact.double().cpu()
    error = (found.double().cpu() - exact).norm() / exact.norm()
    return float(error) if bool(error.isfinite()) else None


# ------------------------------------------------------------------------------------------------ waiting for a device


def waits_of(device: torch.device, config: NumbersConfig) -> list[Check]:
    """How often the host waits in an attribution batch, which reads its maps, and in a training step."""
    batch = attribution_batch(device, config)
    batch()  # the first one loads kernels
    checks = [Check(name="waits in an attribution batch", value=count_waits(batch), limit=1)]
    with tempfile.TemporaryDirectory(prefix="zpipe-doctor-") as folder:
        step = training_step(device, config, Path(folder))
        for _ in range(3):
            step()
        checks.append(Check(name="waits in a training step", value=count_waits(step), limit=0))
    return checks


def count_waits(run: Callable[[], object]) -> int:
    """How often the host waits for a CUDA device while `run` runs; waiting for an event does not count."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            run()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("called a synchronizing CUDA operation" in str(each.message) for each in caught)


def attribution_batch(device: torch.device, config: NumbersConfig) -> Callable[[], object]:
    """A function that computes the maps of a batch by the default method, as the extraction does."""
    explain = Explainer(made_up_teacher(config), ExplainConfig(), batch_size=8, device=str(device))
    pixels, labels = made_up_pixels(8, config.side), np.arange(8) % CLASSES
    return lambda: explain(pixels, labels)


def training_step(device: torch.device, config: NumbersConfig, folder: Path) -> Callable[[], object]:
    """A function that takes a step of the real training loop on a small ViT; `folder` is empty."""
    (folder / "photos" / "class").mkdir(parents=True)
    for number, pixels in enumerate(made_up_pixels(8, 64)):
        Image.fromarray(pixels).save(folder / "photos" / "class" / f"{number}.png")
    make_shards(FolderSource(folder / "photos", shard_size=8, shuffle_seed=0, key_rule="stem"), folder / "shards")
    loop = TrainConfig(epochs=10, batch_size=8, data_workers=0, device=str(device), precision="float32", compile=False)
    sizes = {"embed_dim": config.width, "depth": config.depth, "num_heads": 3}
    name = "deit_tiny_patch16_224"
    settings = VitConfig(model=name, model_args=sizes, image_size=config.side, train=loop)
    preprocessing = Preprocessing(image_size=config.side, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    model = build_vit(name, CLASSES, config.side, sizes).to(device)
    loader = RelevanceLoader(folder / "shards", batch_size=8, image_size=config.side)
    trainer = Trainer(ClassifyTask(model, None, settings, preprocessing, device), loader, loop, folder / "run")
    model.train()
    (batch,) = list(loader)
    return lambda: trainer.train_step([batch])
