"""A teacher, a method and a precision as one function from pixels to maps, with memory that is bounded and told."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from zpipe.pipeline.methods import CLASS_BLIND, DEFAULT_METHOD, METHODS
from zpipe.pipeline.recorded_forward import Attribution
from zpipe.pipeline.relevance import attribute
from zpipe.pipeline.supported import Targets
from zpipe.pipeline.teacher import Teacher
from zpipe.schemas.choices import check_choice
from zpipe.schemas.errors import UsageError, ZpipeError

# FORWARD or FORWARD+SWEEP: the dtype of the model, and the arithmetic of the way down where it is another.
PRECISIONS: dict[str, tuple[torch.dtype, str]] = {
    "float32": (torch.float32, "model"),
    "float64": (torch.float64, "model"),
    "float64+float32": (torch.float64, "float32"),
    "float64+bfloat16": (torch.float64, "bfloat16"),
    "float32+bfloat16": (torch.float32, "bfloat16"),
    "float32+tf32": (torch.float32, "tf32"),
}
NO_CLASS = -1  # the target of a method that asks nothing about a class, and of an image that has none


@dataclass(frozen=True, kw_only=True)
class ExplainConfig:
    """What a map is of.

    method: a name of `zpipe.pipeline.methods.METHODS`. target: `ground-truth`, `predicted` (the teacher's own best
    class) or `class:K`. symmetrise: mean of the map and of the mirrored image's map mirrored back, for twice the price:
    such a map changes with the image when that is mirrored. precision: a name of `PRECISIONS`.
    """

    method: str = DEFAULT_METHOD
    target: str = "ground-truth"
    symmetrise: bool = False
    precision: str = "float32"

    def __post_init__(self) -> None:
        check_choice("--method", self.method, METHODS)
        check_choice("--precision", self.precision, PRECISIONS)
        if "+" in self.precision and self.method != DEFAULT_METHOD:
            raise UsageError(f"--precision {self.precision}: {self.method} has float32 and float64 only")
        kind, colon, number = self.target.partition(":")
        if not (self.target in ("ground-truth", "predicted") or (kind == "class" and colon and number.isdecimal())):
            raise UsageError(f"--target {self.target}: choose ground-truth, predicted or class:K")

    @property
    def asks_label(self) -> bool:
        """Whether images need a label that is one of the teacher's classes."""
        return self.target == "ground-truth" and self.method not in CLASS_BLIND

    @property
    def fixed_class(self) -> int | None:
        """The K of `class:K`."""
        return int(self.target.removeprefix("class:")) if self.target.startswith("class:") else None

    @property
    def recorded_target(self) -> str:
        """What the manifest says: `none` for methods that ask nothing about a class."""
        return "none" if self.method in CLASS_BLIND else self.target


class Explained(NamedTuple):
    """maps float32 [n, gh, gw], raw; logits float32 [n, classes]; targets int64 [n], -1 for methods without a class."""

    maps: np.ndarray
    logits: np.ndarray
    targets: np.ndarray


class Explainer:
    """Maps of pixel batches of any size, at most `batch_size` images at once.

    A batch that doesn't fit the device's memory is halved and tried again; `notes` says so. Errors: :class:`UsageError`
    for a class the teacher hasn't; :class:`ZpipeError` when not even one image fits.
    """

    def __init__(self, teacher: Teacher, config: ExplainConfig, *, batch_size: int, device: str) -> None:
        fixed = config.fixed_class
        if fixed is not None and fixed >= teacher.num_classes:
            raise UsageError(f"--target {config.target}: teacher {teacher.name} has {teacher.num_classes} classes")
        self.config, self.batch_size, self.device, self.name = config, batch_size, device, teacher.name
        self.notes: list[str] = []
        dtype, self._sweep = PRECISIONS[config.precision]
        self._dtype = dtype
        self._model = teacher.model.to(device=device, dtype=dtype)
        self._mean = torch.tensor(teacher.mean, device=device, dtype=dtype).view(1, 3, 1, 1)
        self._std = torch.tensor(teacher.std, device=device, dtype=dtype).view(1, 3, 1, 1)

    def __call__(self, pixels: np.ndarray, labels: np.ndarray) -> Explained:
        """pixels: uint8 [n, H, W, 3] in the teacher's size; labels: int64 [n], looked at for `ground-truth` only."""
        parts = list(self._parts(pixels, labels))
        return Explained(*(np.concatenate(values) for values in zip(*parts, strict=True)))

    def _parts(self, pixels: np.ndarray, labels: np.ndarray) -> Iterator[Explained]:
        start = 0
        while start < len(pixels):
            chosen = slice(start, start + self.batch_size)
            try:
                yield self._explain(pixels[chosen], labels[chosen])
            except (RuntimeError, MemoryError) as error:
                if not _is_out_of_memory(error):
                    raise
                self._lower_batch_size(min(self.batch_size, len(pixels) - start))
                continue
            start = chosen.stop

    def _lower_batch_size(self, tried: int) -> None:
        if tried == 1:
            raise ZpipeError(
                f"teacher {self.name}: not even one image fits the memory of {self.device}; "
                "run fewer workers, or take a smaller teacher"
            )
        self.batch_size = tried // 2
        self.notes.append(f"a batch of {tried} did not fit the memory of {self.device}: lowered to {self.batch_size}")
        if self.device.startswith("cuda"):
            torch.cuda.empty_cache()

    def _explain(self, pixels: np.ndarray, labels: np.ndarray) -> Explained:
        images = torch.from_numpy(pixels).to(self.device).permute(0, 3, 1, 2).to(self._dtype) / 255.0  # [n, 3, H, W]
        images = (images - self._mean) / self._std
        found = self._attribute(images, self._targets(labels))
        targets = self._settled(found.logits, labels)
        maps = found.maps
        if self.config.symmetrise:
            # The mirrored image is asked about the same class, also where the teacher would see another in it.
            mirrored = self._attribute(images.flip(-1), targets.clamp(min=0)).maps.flip(-1)
            maps = (maps + mirrored) / 2
        return Explained(
            maps.float().cpu().numpy(), found.logits.float().cpu().numpy(), targets.cpu().numpy().astype(np.int64)
        )

    def _attribute(self, images: Tensor, targets: Targets) -> Attribution:
        if self._sweep == "model":
            return METHODS[self.config.method](self._model, images, targets)
        return attribute(self._model, images, targets, sweep=self._sweep)

    def _targets(self, labels: np.ndarray) -> Targets:
        if self.config.target == "predicted":
            return lambda logits: logits.argmax(dim=1)
        if self.config.asks_label:
            return torch.from_numpy(labels).to(self.device)
        return torch.full((len(labels),), self.config.fixed_class or 0, device=self.device)

    def _settled(self, logits: Tensor, labels: np.ndarray) -> Tensor:
        if self.config.method in CLASS_BLIND:
            return torch.full((len(labels),), NO_CLASS, device=self.device)
        asked = self._targets(labels)
        return asked if isinstance(asked, Tensor) else asked(logits)


def _is_out_of_memory(error: RuntimeError | MemoryError) -> bool:
    # The CPU's allocators have no exception of their own. oneDNN's message has other causes too: one that isn't memory
    # stays when the batch is down to one image.
    told = ("can't allocate memory", "could not create a primitive", "could not create a memory object")
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or any(part in str(error) for part in told)


def bytes_per_image(model: VisionTransformer, dtype: torch.dtype = torch.float32) -> int:
    """About how much memory transformer attribution holds for one image at its peak, in bytes.

    The records of all blocks, and the work in one: three arrays of the attention's size and six of the MLP's.
    """
    tokens = model.patch_embed.num_patches + model.num_prefix_tokens
    block = model.blocks[0]
    width, hidden, heads = model.embed_dim, block.mlp.fc1.out_features, block.attn.num_heads
    record = tokens * (10 * width + 2 * hidden) + heads * tokens**2
    work = 6 * tokens * hidden + 3 * heads * tokens**2
    return (len(model.blocks) * record + work) * torch.finfo(dtype).bits // 8


def batch_that_fits(batch_size: int, image_bytes: int, workers: int, available: int | None) -> int:
    """`batch_size`, or the largest power of two below it whose images take half of the `available` bytes at most."""
    if available is None or batch_size * image_bytes * workers * 2 <= available:
        return batch_size
    fits = max(1, available // (image_bytes * workers * 2))
    return min(batch_size, 1 << (fits.bit_length() - 1))


def available_memory() -> int | None:
    """Bytes of main memory that are free to use, of the machine or of the container; None where it isn't told."""
    if sys.platform != "linux":
        return None
    lines = Path("/proc/meminfo").read_text().splitlines()
    free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.is_file() and used.is_file() and (told := limit.read_text().strip()).isdecimal():
        free = min(free, int(told) - int(used.read_text()))
    return max(0, free)
