"""A teacher, a method and a precision as one function from pixels to maps, with bounded memory."""

from __future__ import annotations

import gc
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from zpipe.pipeline.batch_size import BatchSize
from zpipe.pipeline.classifier import Classifier, Targets
from zpipe.pipeline.methods import CLASS_BLIND, CLOSED_FORM, DEFAULT_METHOD, METHODS, methods_of, refusal_of
from zpipe.pipeline.prepared import Prepared
from zpipe.pipeline.recorded_forward import Attribution
from zpipe.pipeline.relevance import attribute
from zpipe.pipeline.supported import check_values, values_are_checked
from zpipe.pipeline.teacher import Teacher
from zpipe.schemas.choices import check_choice
from zpipe.schemas.devices import float32_arithmetic, is_out_of_memory
from zpipe.schemas.errors import UsageError, ZpipeError

T = TypeVar("T")

# FORWARD or FORWARD+SWEEP: the dtype of the model, and the arithmetic of the downward sweep where it is another.
PRECISIONS: dict[str, tuple[torch.dtype, str]] = {
    "float32": (torch.float32, "model"),
    "float64": (torch.float64, "model"),
    "float64+float32": (torch.float64, "float32"),
    "float64+bfloat16": (torch.float64, "bfloat16"),
    "float32+bfloat16": (torch.float32, "bfloat16"),
    "float32+tf32": (torch.float32, "tf32"),
    "bfloat16": (torch.bfloat16, "model"),
}
AUTO = "auto"  # a precision that `zpipe.pipeline.choose_precision` replaces by one of these
NO_CLASS = -1  # the target of a method that depends on no class, and the label of an image that has none


def precisions_of(method: str, device: str = "cuda") -> list[str]:
    """The names of `PRECISIONS` that a method has on a device.

    Methods in closed form divide by numbers near zero, so their forward pass needs float32; no other method has a
    downward sweep.
    """
    names = [name for name in PRECISIONS if (name != "bfloat16" if method in CLOSED_FORM else "+" not in name)]
    return [name for name in names if device.startswith("cuda") or not name.endswith("+tf32")]


@dataclass(frozen=True, kw_only=True)
class ExplainConfig:
    """What a map explains and how it is computed.

    Raises:
        UsageError: A value is none of its choices, or the method does not have the precision.
    """

    method: str = DEFAULT_METHOD
    """Attribution method: a name of `zpipe.pipeline.methods.METHODS`."""
    target: str = "ground-truth"
    """Class that a map explains: ``ground-truth``, ``predicted`` (the teacher's best class) or ``class:K``; ``top:K``:
    one map for each of the teacher's K best classes."""
    symmetrise: bool = False
    """Average each map with that of the mirrored image, mirrored back: then mirroring an image mirrors its map. Takes
    twice the time."""
    precision: str = "float32"
    """Precision of the forward pass and of the downward sweep: a name of `PRECISIONS`; ``auto`` is for
    `extract_teacher_maps`, which measures them."""

    def __post_init__(self) -> None:
        check_choice("--method", self.method, METHODS)
        check_choice("--precision", self.precision, (*PRECISIONS, AUTO))
        if self.precision != AUTO and self.precision not in (known := precisions_of(self.method)):
            raise UsageError(f"--precision {self.precision}: {self.method} does not have it; choose {', '.join(known)}")
        kind, colon, number = self.target.partition(":")
        numbered = kind in ("class", "top") and colon and number.isascii() and number.isdecimal() and len(number) < 10
        if not (self.target in ("ground-truth", "predicted") or numbered):
            raise UsageError(f"--target {self.target}: choose ground-truth, predicted, class:K or top:K")
        if self.top_classes == 0 or (self.top_classes and self.method in CLASS_BLIND):
            reason = f"{self.method} gives the same map for every class" if self.top_classes else "K is at least 1"
            raise UsageError(f"--target {self.target}: {reason}; choose another target, such as top:5 or predicted")

    @property
    def needs_label(self) -> bool:
        """Whether each image needs a label that is one of the teacher's classes."""
        return self.target == "ground-truth" and self.method not in CLASS_BLIND

    @property
    def fixed_class(self) -> int | None:
        """The K of ``class:K``; None for other targets."""
        return int(self.target.removeprefix("class:")) if self.target.startswith("class:") else None

    @property
    def top_classes(self) -> int | None:
        """The K of ``top:K``; None for other targets."""
        return int(self.target.removeprefix("top:")) if self.target.startswith("top:") else None

    def shape(self, grid: tuple[int, int]) -> tuple[int, ...]:
        """Shape of what is computed for an image: the grid (gh, gw), or (K, gh, gw)."""
        return grid if self.top_classes is None else (self.top_classes, *grid)

    @property
    def recorded_target(self) -> str:
        """The target that the manifest records: ``none`` for methods that depend on no class."""
        return "none" if self.method in CLASS_BLIND else self.target


class Explained(NamedTuple):
    """The maps of a batch, with what they explain."""

    maps: np.ndarray
    """float32 [n, gh, gw], or [n, K, gh, gw] for the target ``top:K``; raw; NaN where the logits are not finite."""
    logits: np.ndarray
    """float32 [n, classes]."""
    targets: np.ndarray
    """int64 [n] or [n, K], the classes that the maps explain; `NO_CLASS` for methods without one."""
    features: np.ndarray
    """float32 [n, gh, gw, D], the patch tokens that the teacher's head reads; D = 0 if they are not saved."""


class _Part(NamedTuple):
    """Some images of a batch, which the device computes."""

    tensors: tuple[Tensor, ...]
    """Results in the memory of the host, complete when the event has happened."""
    done: torch.cuda.Event | None
    """None for what is computed already."""
    pixels: np.ndarray
    """Kept until then, because the device copies them when it has the time."""

    def arrays(self) -> list[np.ndarray]:
        if self.done is not None:
            self.done.synchronize()
        return [tensor.numpy() for tensor in self.tensors]


Compute = Callable[[np.ndarray, np.ndarray], _Part]


class Launched(Generic[T]):
    """A batch that a GPU computes while the host does something else; on a CPU it is computed already."""

    def __init__(self, parts: Sequence[_Part], make: Callable[..., T]) -> None:
        self._parts, self._make = parts, make

    def result(self) -> T:
        """Wait for the result. May be called from any thread, once; faults of the device are raised here."""
        arrays = [part.arrays() for part in self._parts]
        self._parts = ()
        return self._make(*(np.concatenate(values) for values in zip(*arrays, strict=True)))


class Explainer:
    """Computes the maps of batches of any size, at most `batch_size` images at once.

    Several threads may call it. A batch that does not fit the memory of the device is halved and tried again; `notes`
    has a line about it. Later batches are larger again if they fit, see :class:`BatchSize`.

    On CUDA, all batches have the same shape, which kernels that are compiled or recorded for a shape need: a smaller
    one is filled up with copies of its last image, whose maps are dropped. No map depends on the other images of its
    batch.

    Args:
        teacher: The teacher; its model is moved to the device.
        config: Method, target class, symmetrisation and precision.
        batch_size: Most images at once.
        device: Device to compute on.
        features: Whether to compute the teacher's features, too, by a forward pass of their own.

    Raises:
        UsageError: The teacher does not have the class of the target, or the device not the precision.
        ZpipeError: Not even one image fits the memory; raised by the call.
    """

    def __init__(
        self, teacher: Teacher, config: ExplainConfig, *, batch_size: int, device: str, features: bool = False
    ) -> None:
        check_method(teacher, config.method)
        fixed = config.fixed_class
        if (config.top_classes or 0) > teacher.num_classes:
            raise UsageError(f"--target {config.target}: teacher {teacher.name} has {teacher.num_classes} classes")
        if fixed is not None and fixed >= teacher.num_classes:
            raise UsageError(f"--target {config.target}: teacher {teacher.name} has {teacher.num_classes} classes")
        if config.precision.endswith("+tf32") and not device.startswith("cuda"):
            raise UsageError(
                f"--precision {config.precision}: only CUDA devices have it, this is {device}; use float32"
            )
        self.config, self.batch_size, self.device, self.name = config, batch_size, device, teacher.name
        self.notes: list[str] = []
        self._batch = BatchSize(batch_size)
        self._lock = threading.Lock()
        self._cuda = device.startswith("cuda")
        self._copying = torch.cuda.Stream(torch.device(device)) if self._cuda else None
        self._with_features = features
        dtype, sweep = PRECISIONS[config.precision]
        self._dtype = dtype
        self._model = teacher.model.to(device=device, dtype=dtype)
        rope: Any = getattr(self._model.model, "rope", None)
        if self._cuda and hasattr(rope, "get_embed"):
            # timm makes the rotary embedding of DINOv3 on the CPU in each forward pass, and copying it waits for the
            # device. All images have one size, so the first one serves all.
            rope.get_embed = lru_cache(maxsize=1)(partial(type(rope).get_embed, rope))
        self._prepared: Prepared | None = None
        if config.method in CLOSED_FORM:
            # Workers share the memory of a CPU, where neither brings much.
            compiler = "inductor" if self._cuda else None
            self._prepared = Prepared(self._model.model, sweep, keep=self._cuda, compiler=compiler, notes=self.notes)
        # bfloat16 would round a pixel three times on its way.
        exact = torch.promote_types(dtype, torch.float32)
        self._mean = torch.tensor(teacher.mean, device=device, dtype=exact).view(1, 3, 1, 1)
        self._std = torch.tensor(teacher.std, device=device, dtype=exact).view(1, 3, 1, 1)

    def __call__(self, pixels: np.ndarray, labels: np.ndarray) -> Explained:
        """Explain a batch; see :meth:`begin`."""
        return self.begin(pixels, labels).result()

    def begin(self, pixels: np.ndarray, labels: np.ndarray) -> Launched[Explained]:
        """Begin to explain a batch; on CUDA the host does not wait for it.

        Args:
            pixels: uint8 [n, H, W, 3], in the size of the teacher's input; n is at least 1. They must not change before
                the result is there. To CUDA they are copied fastest from an array that `new_array` made.
            labels: int64 [n]; used for the target ``ground-truth`` only.
        """
        return Launched(self._parts(self._explain, pixels, labels), Explained)

    def maps_of(self, pixels: np.ndarray, targets: np.ndarray) -> np.ndarray:
        """Only the maps of a batch, for classes that are known; see :meth:`begin_maps`."""
        return self.begin_maps(pixels, targets).result()

    def begin_maps(self, pixels: np.ndarray, targets: np.ndarray) -> Launched[np.ndarray]:
        """Begin to compute only the maps of a batch, for classes that are known.

        Args:
            pixels: uint8 or float32 [n, H, W, 3] in grey levels, 0 to 255, in the size of the teacher's input.
            targets: int64 [n], the classes that the maps explain; `NO_CLASS` for methods without one.

        Returns:
            float32 [n, gh, gw]; raw.
        """
        return Launched(self._parts(self._maps, pixels, targets), lambda maps: maps)

    @property
    def current_batch_size(self) -> int:
        """How many images are computed at once now: fewer than `batch_size` where memory was short."""
        return self._batch.size

    def new_array(self, shape: tuple[int, ...]) -> np.ndarray:
        """An uninitialised uint8 array; for CUDA in pinned memory, which torch reuses when it is free again."""
        return torch.empty(shape, dtype=torch.uint8, pin_memory=self._cuda).numpy()

    def _parts(self, compute: Compute, pixels: np.ndarray, labels: np.ndarray) -> list[_Part]:
        parts = []
        start = 0
        # One thread at a time: the arithmetic of float32 is a setting of the process, the batch size one of the device.
        with self._lock:
            while start < len(pixels):
                chosen = slice(start, start + self._batch.size)
                count = self._batch.size if self._cuda else len(pixels[chosen])  # filled up on CUDA
                part = self._unless_out_of_memory(compute, pixels[chosen], labels[chosen])
                if part is None:
                    self._make_room(count)
                    continue
                self._batch.fitted(count)
                parts.append(part)
                start = chosen.stop
        return parts

    def _unless_out_of_memory(self, compute: Compute, pixels: np.ndarray, labels: np.ndarray) -> _Part | None:
        try:
            return compute(pixels, labels)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        return None

    def _make_room(self, tried: int) -> None:
        """Lower the batch size and give memory back to the device, once the error that holds all tensors is gone."""
        if tried == 1:
            raise ZpipeError(
                f"teacher {self.name}: not even one image fits the memory of {self.device}; "
                "run fewer workers, or take a smaller teacher"
            )
        change = self._batch.failed(tried)
        self.notes.append(f"a batch of {tried} did not fit the memory of {self.device}: {change}")
        gc.collect()  # a graph and its hooks may refer to each other
        if self.device.startswith("cuda"):
            torch.cuda.empty_cache()

    def _explain(self, pixels: np.ndarray, labels: np.ndarray) -> _Part:
        asked = self._targets(labels)
        images = self._normalised(pixels, asked)
        asked = self._filled_up(self._moved(asked)) if isinstance(asked, Tensor) else asked
        attribution = self._attribute(images, asked)
        targets = self._explained_classes(attribution.logits, asked)
        # Both maps explain the same class, even if the teacher predicts another one for the mirrored image.
        maps = self._symmetrised(attribution.maps, images, targets)
        # What leads to no class explains none: for methods that depend on the attention alone, the map may be finite.
        logits = attribution.logits.float()
        broken = ~logits.isfinite().all(dim=1).view(-1, *[1] * (maps.ndim - 1))
        maps = maps.float().masked_fill(broken, torch.nan)
        return self._to_host(pixels, maps, logits, targets.to(torch.int64), self._features(images))

    def _maps(self, pixels: np.ndarray, targets: np.ndarray) -> _Part:
        known = torch.from_numpy(targets).clamp(min=0)
        images, classes = self._normalised(pixels, known), self._filled_up(self._moved(known))
        maps = self._attribute(images, classes).maps
        return self._to_host(pixels, self._symmetrised(maps, images, classes).float())

    def _normalised(self, pixels: np.ndarray, targets: Targets) -> Tensor:
        """Images [n, 3, H, W] on the device. Pixels and targets are checked before, while the CPU has them."""
        given = torch.from_numpy(pixels)
        check_values(given, targets, self._model.num_classes)
        images = self._filled_up(self._moved(given)).permute(0, 3, 1, 2).to(self._mean.dtype) / 255.0
        return ((images - self._mean) / self._std).to(self._dtype)

    def _filled_up(self, tensor: Tensor) -> Tensor:
        """On CUDA, a tensor [n, ...] with copies of its last row up to the batch size."""
        lacking = self._batch.size - len(tensor)
        if not self._cuda or lacking <= 0:
            return tensor
        return torch.cat([tensor, tensor[-1:].expand(lacking, *tensor.shape[1:])])

    def _moved(self, tensor: Tensor) -> Tensor:
        """A tensor on the device; to CUDA it is copied from pinned memory while the device computes other batches."""
        if self._copying is None:
            return tensor.to(self.device)
        pinned = tensor if tensor.is_pinned() else tensor.pin_memory()
        with torch.cuda.stream(self._copying):
            moved = pinned.to(self.device, non_blocking=True)
        computing = torch.cuda.current_stream(torch.device(self.device))
        computing.wait_stream(self._copying)
        moved.record_stream(computing)  # or its memory would be reused while this stream still reads it
        return moved

    def _to_host(self, pixels: np.ndarray, *tensors: Tensor) -> _Part:
        """Begin to copy the results of the images; those of filling are left out."""
        copies = tuple(tensor[: len(pixels)].to("cpu", non_blocking=True) for tensor in tensors)
        if not self._cuda:
            return _Part(copies, None, pixels)
        done = torch.cuda.Event(blocking=True)  # who waits for it leaves its core to the decoding threads
        done.record(torch.cuda.current_stream(torch.device(self.device)))
        return _Part(copies, done, pixels)

    def _symmetrised(self, maps: Tensor, images: Tensor, targets: Tensor) -> Tensor:
        """Average the maps with those of the mirrored images if `symmetrise` is set, else return them."""
        if not self.config.symmetrise:
            return maps
        return (maps + self._attribute(images.flip(-1), targets.clamp(min=0)).maps.flip(-1)) / 2

    @torch.no_grad()
    @float32_arithmetic()
    def _features(self, images: Tensor) -> Tensor:
        if not self._with_features:
            return images.new_zeros(len(images), *self._model.grid, 0, dtype=torch.float32)
        return self._model.features(images).float()

    def _attribute(self, images: Tensor, targets: Targets) -> Attribution:
        with values_are_checked():
            if self._prepared is None:
                return METHODS[self.config.method](self._model, images, targets)
            return attribute(
                self._prepared.model, images, targets, split=CLOSED_FORM[self.config.method], prepared=self._prepared
            )

    def _targets(self, labels: np.ndarray) -> Targets:
        if self.config.target == "predicted":
            return lambda logits: logits.argmax(dim=1)
        if self.config.top_classes is not None:
            count = self.config.top_classes
            return lambda logits: logits.topk(count, dim=1).indices
        if self.config.needs_label:
            return torch.from_numpy(labels)
        return torch.full((len(labels),), self.config.fixed_class or 0)

    def _explained_classes(self, logits: Tensor, targets: Targets) -> Tensor:
        if self.config.method in CLASS_BLIND:
            return torch.full((len(logits),), NO_CLASS, device=logits.device)
        return targets if isinstance(targets, Tensor) else targets(logits)


def check_method(teacher: Teacher, method: str) -> None:
    """Raise :class:`ZpipeError` for a method that cannot explain the teacher; the message names those that can."""
    if reason := refusal_of(teacher.model, method):
        able = ", ".join(name for name, refusal in methods_of(teacher.model).items() if not refusal)
        remedy = f"choose --method {able}" if able else "no method can explain it; choose another teacher"
        raise ZpipeError(f"teacher {teacher.name}: --method {method}: {reason}; {remedy}")


def bytes_per_image(model: Classifier, dtype: torch.dtype = torch.float32) -> int:
    """Estimate of the peak memory of transformer attribution for one image, in bytes; no other method takes more.

    It counts the records of all blocks, and temporaries of one block: three arrays of the attention's size and six of
    the MLP's. Methods by autograd keep the attention of all blocks as well, but no second array of its size per block.
    """
    tokens, width, heads = model.tokens, model.width, model.num_heads
    # The MLP is the widest of a block's layers, or a gated one of twice its width.
    hidden = max(layer.out_features for layer in model.blocks[0].modules() if isinstance(layer, torch.nn.Linear))
    record = tokens * (10 * width + 2 * hidden) + heads * tokens**2
    work = 6 * tokens * hidden + 3 * heads * tokens**2
    return (len(model.blocks) * record + work) * torch.finfo(dtype).bits // 8


def batch_that_fits(batch_size: int, image_bytes: int, workers: int, available: int | None) -> int:
    """The largest batch size that fits the memory.

    Args:
        batch_size: The requested batch size.
        image_bytes: Memory of one image, in bytes.
        workers: Number of workers that share the memory.
        available: Memory in bytes; None if it is unknown.

    Returns:
        `batch_size`, or the largest power of two below it with which the workers take at most half of the memory.
    """
    if available is None or batch_size * image_bytes * workers * 2 <= available:
        return batch_size
    fits = max(1, available // (image_bytes * workers * 2))
    return min(batch_size, 1 << (fits.bit_length() - 1))


def available_memory() -> int | None:
    """Free main memory of the machine or the container, in bytes; None where the system does not report it."""
    if sys.platform != "linux":
        return None
    lines = Path("/proc/meminfo").read_text().splitlines()
    free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.is_file() and used.is_file() and (most := limit.read_text().strip()).isdecimal():
        free = min(free, int(most) - int(used.read_text()))
    return max(0, free)
