"""One shard from tar to committed shards of maps and what is saved beside them, with a small report.

A worker knows nothing of a cluster.
"""

from __future__ import annotations

import threading
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import torch

from zpipe.pipeline.device_turns import MAX_LAUNCHED, DeviceTurns
from zpipe.pipeline.explainer import (
    NO_CLASS,
    PRECISIONS,
    ExplainConfig,
    Explained,
    Explainer,
    Launched,
    available_memory,
    batch_that_fits,
    bytes_per_image,
)
from zpipe.pipeline.shard_reader import Frame, FramedImage, PixelBatch, pixel_batches, read_samples
from zpipe.pipeline.shard_rows import Tensors, append_rows
from zpipe.pipeline.stability import add_noise, stability
from zpipe.pipeline.teacher import Teacher, TeacherSpec, load_teacher
from zpipe.schemas.devices import Fault, device_fault
from zpipe.schemas.errors import ZpipeError, first_line
from zpipe.schemas.relevance_store import MORE_COLUMNS, index_schema, write_shard
from zpipe.schemas.shard_index import ShardEntry
from zpipe.schemas.storage import as_path
from zpipe.schemas.tensor_kinds import KINDS, SAVED, TensorKind


@dataclass(frozen=True, kw_only=True)
class WorkerSpec:
    """Everything that a worker process needs to begin. Small and picklable: paths, names and numbers."""

    teacher: TeacherSpec
    """The teacher to load."""
    teacher_digest: str
    """Digest that its weights must have."""
    fingerprint: str
    """Fingerprint of the provenance, sealed into each shard."""
    out: str
    """Folder or URL of the store."""
    explain: ExplainConfig
    """Method, target class, symmetrisation and precision of the maps."""
    frame: str
    """What the teacher sees of an image: a name of `zpipe.pipeline.shard_reader.FRAMES`."""
    batch_size: int
    """Images per batch; 0 takes the default of the device."""
    threads: int
    """CPU threads of this worker; 0 for a GPU worker on Ray takes its share of the machine that it runs on."""
    sharing: int
    """How many workers share the memory of a machine at most: the number of shards, fewer where an executor knows
    better."""
    device: str
    """Device of the teacher."""
    classes: tuple[int, ...] | None = None
    """The teacher's class for each label, -1 for none; None if labels are its numbers."""
    stability: bool = False
    """Whether to measure the stability of each map, by a second one."""
    saved: Mapping[str, str] = field(default_factory=dict)
    """Fingerprints of the stores that are filled beside the maps, by their names in `SAVED`."""


S = TypeVar("S")
T = TypeVar("T")

MAPS = ""  # name of the store of maps among those that are filled in one pass


@dataclass(frozen=True, kw_only=True)
class ShardTask:
    """One tar to be turned into a shard of each store."""

    path: str
    """Path or URL of the tar."""
    entry: ShardEntry
    """What the index of its folder says about it."""
    stores: tuple[str, ...] = (MAPS,)
    """Names of the stores that lack it: `MAPS` or names in `SAVED`. The last one is committed last."""
    label_field: str | None = None
    """Where its labels are, if the index says it; see `zpipe.schemas.sample.group_samples`."""


@dataclass(frozen=True, kw_only=True)
class ShardReport:
    """The result of one task."""

    stem: str
    """Stem of the shard."""
    count: int = 0
    """Samples that were committed."""
    statuses: dict[str, int] = field(default_factory=dict)
    """Samples per status."""
    problems: dict[str, str] = field(default_factory=dict)
    """Key -> why the image could not be decoded, which the store doesn't keep."""
    error: str = ""
    """Why nothing was committed; empty on success."""
    fault: Fault | None = None
    """What the error says about the device, with which this worker can do nothing more; None if it says nothing."""
    notes: tuple[str, ...] = ()
    """What the worker had to change on the way."""


class ShardWorker:
    """Holds one frozen teacher and runs shards through it.

    On a GPU `process` may run in several threads at once, so that the GPU computes one shard while another one is read
    or written. Each shard makes its own batches, so its maps do not depend on the others.

    Raises:
        ZpipeError: The weights on this machine are not those that the run began with.
    """

    _stopped = False

    def __init__(self, spec: WorkerSpec) -> None:
        torch.set_num_threads(spec.threads)
        self.spec = spec
        self.teacher: Teacher = load_teacher(spec.teacher, device=spec.device)
        if self.teacher.digest != spec.teacher_digest:
            raise ZpipeError(
                f"{spec.teacher.weights}: weights with digest {self.teacher.digest[:12]}, the run began with "
                f"{spec.teacher_digest[:12]}; every machine needs the same file"
            )
        batch_size, note = _batch_size(spec, self.teacher)
        self._explainer = Explainer(
            self.teacher,
            spec.explain,
            batch_size=batch_size,
            device=spec.device,
            features="features" in spec.saved,
        )
        self._notes = [note] if note else []
        self._noted = 0  # how many notes of the explainer have been reported
        self._lock = threading.Lock()
        self._turns = DeviceTurns() if shards_at_once(spec.device) > 1 else None
        self._ages = count()
        self._frame = frame_of(self.teacher, spec.frame)

    def ready(self) -> bool:
        """Return True: a call that is answered once the teacher is loaded."""
        return True

    def process(self, task: ShardTask) -> ShardReport:
        """Run one shard and commit its maps.

        After a :class:`ZpipeError` or a fault of the device, the report's `error`, nothing is committed.
        """
        try:
            return self._process(task)
        except ZpipeError as error:
            return ShardReport(stem=task.entry.stem, error=str(error))
        except RuntimeError as error:
            # Here, where the exception still has its type.
            fault = device_fault(error)
            if fault is None:
                raise
            return ShardReport(stem=task.entry.stem, error=f"{task.path}: {first_line(error)}", fault=fault)

    def stop(self) -> None:
        """Let the shards that are being processed in other threads fail at their next batch."""
        self._stopped = True

    def _process(self, task: ShardTask) -> ShardReport:
        path, count = as_path(task.path), task.entry.count
        columns: dict[str, list[Any]] = {name: [] for name in index_schema(MORE_COLUMNS.names).names}
        tensors = {name: Tensors(self._kind(name)) for name in task.stores}
        problems: dict[str, str] = {}
        for images, explained, stable in self._explained(path, task):
            if self._stopped:
                raise ZpipeError(f"{path}: the run was ended; run again to resume")
            if len(columns["key"]) + len(images) > count:
                raise ZpipeError(
                    f"{path}: more than the {count} samples its index names: altered; make the shards again"
                )
            problems |= {item.key: item.problem for item in images if item.problem}
            append_rows(columns, images, explained)
            columns["stability"] += stable.tolist()
            for name, part in tensors.items():
                part.add(images, explained.logits, getattr(explained, name or "maps"))
        if len(columns["key"]) != count:
            raise ZpipeError(
                f"{path}: {len(columns['key'])} samples, its index names {count}: truncated or altered; "
                "restore it or make the shards again"
            )
        for name in task.stores:
            self._write(task.entry, name, columns, tensors[name])
        statuses = dict(Counter(tensors[task.stores[-1]].statuses))
        return ShardReport(
            stem=task.entry.stem, count=count, statuses=statuses, problems=problems, notes=self._new_notes()
        )

    def _new_notes(self) -> tuple[str, ...]:
        """The notes that no shard has reported."""
        with self._lock:
            found = self._explainer.notes[self._noted :]  # once: another thread may add to them
            self._noted += len(found)
            notes = (*self._notes, *found)
            self._notes.clear()
            return notes

    def _kind(self, name: str) -> TensorKind:
        if name != MAPS:
            return KINDS[SAVED[name]]
        return KINDS["map" if self.spec.explain.top_classes is None else "class-maps"]

    def _write(self, entry: ShardEntry, name: str, columns: Mapping[str, list[Any]], tensors: Tensors) -> None:
        """Commit the shard of one store."""
        values: dict[str, Any] = {**columns, **tensors.columns()}
        if name != MAPS:  # logits and features explain no class
            values |= {"target": [NO_CLASS] * entry.count, "target_probability": [np.nan] * entry.count}
        if name != MAPS or not self.spec.stability:
            del values["stability"]
        if tensors.kind.axes != "khw":
            del values["targets"]
        index = pa.table({each.name: pa.array(values[each.name], each.type) for each in index_schema(values)})
        write_shard(
            as_path(self.spec.out) / name if name else as_path(self.spec.out),
            entry.stem,
            np.concatenate(tensors.stored),
            index,
            input_sha256=entry.sha256,
            fingerprint=self.spec.saved[name] if name else self.spec.fingerprint,
        )

    def _explained(self, path: Path, task: ShardTask) -> Iterator[tuple[list[FramedImage], Explained, np.ndarray]]:
        """The images of a shard in batches, with what was computed of them, and the stability of their maps."""
        age = next(self._ages)
        ahead = MAX_LAUNCHED if self._turns else 0
        batches = pixel_batches(
            read_samples(path, task.entry, label_field=task.label_field),
            self._frame,
            batch_size=self._explainer.batch_size,
            threads=max(1, self.spec.threads),
            new_array=self._explainer.new_array,
        )
        explained = _ahead(((batch, self._explain(batch, path, age)) for batch in batches), ahead)
        if not (self.spec.stability and MAPS in task.stores):
            for batch, found in explained:
                yield batch.images, found, np.zeros(0)
            return
        measured = _ahead((((each, self._stability(*each, age)) for each in explained)), ahead)
        for (batch, found), stable in measured:
            yield batch.images, found, stable

    def _explain(self, batch: PixelBatch, path: Path, age: int) -> Callable[[], Explained]:
        """Begin to explain a batch; images that could not be decoded get NaN maps and logits, and no class."""
        truth = np.array([self._class_of(item, path) for item in batch.images], np.int64)
        rows = [i for i, item in enumerate(batch.images) if item.pixels is not None]
        if len(rows) == len(truth):
            return self._start(age, lambda: self._explainer.begin(batch.pixels, truth))
        shape, grid = self.spec.explain.shape(self.teacher.grid), self.teacher.grid
        width = self.teacher.model.width if "features" in self.spec.saved else 0
        all_rows = Explained(
            np.full((len(truth), *shape), np.nan, np.float32),
            np.full((len(truth), self.teacher.num_classes), np.nan, np.float32),
            np.full((len(truth), *shape[:-2]), NO_CLASS, np.int64),
            np.full((len(truth), *grid, width), np.nan, np.float32),
        )
        if not rows:
            return lambda: all_rows
        decoded = self._start(age, lambda: self._explainer.begin(batch.pixels[rows], truth[rows]))

        def fill() -> Explained:
            for array, found in zip(all_rows, decoded(), strict=True):
                array[rows] = found
            return all_rows

        return fill

    def _stability(self, batch: PixelBatch, explained: Explained, age: int) -> Callable[[], np.ndarray]:
        """Begin to measure how stable the maps are, of several the first one.

        The result is float64 [n], NaN where there is no usable map.
        """
        first = explained.maps if self.spec.explain.top_classes is None else explained.maps[:, 0]
        targets = explained.targets if explained.targets.ndim == 1 else explained.targets[:, 0]
        values = np.full(len(first), np.nan)
        usable = np.isfinite(first).all(axis=(1, 2)) & np.isfinite(explained.logits).all(axis=1)
        rows = np.flatnonzero(usable)
        if not len(rows):
            return lambda: values
        noisy = add_noise(batch.pixels[rows], [batch.images[row].key for row in rows])
        maps = self._start(age, lambda: self._explainer.begin_maps(noisy, targets[rows]))

        def fill() -> np.ndarray:
            values[rows] = stability(first[rows], maps())
            return values

        return fill

    def _start(self, age: int, launch: Callable[[], Launched[T]]) -> Callable[[], T]:
        """Launch a batch of a shard: on a GPU when it is its turn. Returns what waits for the result."""
        return launch().result if self._turns is None else self._turns.start(age, launch).result

    def _class_of(self, item: FramedImage, path: Path) -> int:
        """The teacher's class of an image's label; `NO_CLASS` where maps do not explain the label."""
        if not self.spec.explain.needs_label:
            return NO_CLASS
        if item.label is None:
            raise ZpipeError(
                f"{path}: key {item.key}: has no label (.cls, or label in .json); add one, it is the target class, "
                "or choose --target predicted"
            )
        known = self.spec.classes
        limit = self.teacher.num_classes if known is None else len(known)
        if not 0 <= item.label < limit:
            whose = "the teacher's" if known is None else "the shards'"
            raise ZpipeError(
                f"{path}: key {item.key}: label {item.label} is outside {whose} {limit} classes; "
                "correct the label or take a teacher with more classes"
            )
        number = item.label if known is None else known[item.label]
        if number < 0:
            raise ZpipeError(
                f"{path}: key {item.key}: its class {item.label} has no name, by which it could be the teacher's; name "
                "it, or give --classes by-index"
            )
        return number


def shards_at_once(device: str) -> int:
    """How many shards a worker has: on a GPU a second one, which is read or written while the first is computed."""
    return 2 if device.startswith("cuda") else 1


def process_all(worker: ShardWorker, tasks: Sequence[ShardTask], check: Callable[[], None]) -> Iterator[ShardReport]:
    """Run tasks, `shards_at_once`, and yield their reports in the order of completion.

    Args:
        worker: The worker.
        tasks: The tasks.
        check: Called before each of them; it may raise to end the run.
    """
    at_once = shards_at_once(worker.spec.device)
    if at_once == 1:
        for task in tasks:
            check()
            yield worker.process(task)
        return
    queue, running = deque(tasks), set[Future[ShardReport]]()
    with ThreadPoolExecutor(at_once) as pool:
        try:
            while queue or running:
                while queue and len(running) < at_once:
                    check()
                    running.add(pool.submit(worker.process, queue.popleft()))
                done, running = wait(running, return_when=FIRST_COMPLETED)
                yield from (future.result() for future in done)
        finally:
            worker.stop()  # after an error or Ctrl-C, the threads need not finish their shards


def _batch_size(spec: WorkerSpec, teacher: Teacher) -> tuple[int, str]:
    """The batch size to begin with, and a note where it is lower than the requested one."""
    if spec.device.startswith("cuda"):
        return spec.batch_size or 64, ""  # a GPU raises an error when it is full, and the explainer halves the batch
    requested = spec.batch_size or 8
    # A CPU raises none: the kernel kills a process that takes too much. So the memory is estimated beforehand.
    need = bytes_per_image(teacher.model, PRECISIONS[spec.explain.precision][0])
    fits = batch_that_fits(requested, need, spec.sharing, available_memory())
    if fits == requested:
        return requested, ""
    gib = requested * need * spec.sharing / 2**30
    return fits, f"a batch of {requested} would take {gib:.1f} GiB in {spec.sharing} workers: lowered to {fits}"


def frame_of(teacher: Teacher, kind: str) -> Frame:
    """The frame of that kind, `full` or `center`, at the input size of the teacher."""
    crop_pct = teacher.crop_pct if kind == "center" else 1.0
    return Frame(kind=kind, size=teacher.image_size, interpolation=teacher.interpolation, crop_pct=crop_pct)


def _ahead(started: Iterable[tuple[S, Callable[[], T]]], ahead: int) -> Iterator[tuple[S, T]]:
    """Yield results in order, with up to `ahead` later ones started."""
    waiting: deque[tuple[S, Callable[[], T]]] = deque()
    for each in started:
        waiting.append(each)
        if len(waiting) > ahead:
            item, result = waiting.popleft()
            yield item, result()
    for item, result in waiting:
        yield item, result()
