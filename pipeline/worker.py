"""One shard from tar to committed shards of maps and what is saved beside them, with a small report.

A worker knows nothing of a cluster.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from zpipe.pipeline.explainer import (
    NO_CLASS,
    PRECISIONS,
    ExplainConfig,
    Explained,
    Explainer,
    available_memory,
    batch_that_fits,
    bytes_per_image,
)
from zpipe.pipeline.shard_reader import Frame, FramedImage, framed_batches, read_samples
from zpipe.pipeline.stability import add_noise, stability
from zpipe.pipeline.teacher import Teacher, TeacherSpec, load_teacher
from zpipe.schemas.devices import Fault, device_fault
from zpipe.schemas.errors import ZpipeError, first_line
from zpipe.schemas.relevance_store import (
    MORE_COLUMNS,
    NONFINITE,
    OK,
    UNDECODABLE,
    ZERO,
    concentration,
    index_schema,
    write_shard,
)
from zpipe.schemas.shard_index import ShardEntry
from zpipe.schemas.storage import as_path
from zpipe.schemas.tensor_kinds import KINDS, SAVED, TensorKind, encode


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
    """Holds one frozen teacher and runs shards through it, one at a time.

    Raises:
        ZpipeError: The weights on this machine are not those that the run began with.
    """

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

    def _process(self, task: ShardTask) -> ShardReport:
        path, count = as_path(task.path), task.entry.count
        columns: dict[str, list[Any]] = {name: [] for name in index_schema(MORE_COLUMNS.names).names}
        measure = self.spec.stability and MAPS in task.stores
        tensors = {name: _Tensors(self._kind(name)) for name in task.stores}
        problems: dict[str, str] = {}
        first_notes, self._notes = self._notes, []
        explainer_notes = len(self._explainer.notes)
        for batch in self._batches(path, task):
            explained = self._explain(batch, path)
            if len(columns["key"]) + len(batch) > count:
                raise ZpipeError(
                    f"{path}: more than the {count} samples its index names: altered; make the shards again"
                )
            for item, logit, target in zip(batch, explained.logits, explained.targets, strict=True):
                if item.problem:
                    problems[item.key] = item.problem
                _append_row(columns, item, logit, np.atleast_1d(target))
            if measure:
                columns["stability"] += self._stability(batch, explained).tolist()
            for name, part in tensors.items():
                part.add(batch, explained.logits, getattr(explained, name or "maps"))
        if len(columns["key"]) != count:
            raise ZpipeError(
                f"{path}: {len(columns['key'])} samples, its index names {count}: truncated or altered; "
                "restore it or make the shards again"
            )
        for name in task.stores:
            self._write(task.entry, name, columns, tensors[name])
        statuses = dict(Counter(tensors[task.stores[-1]].statuses))
        notes = (*first_notes, *self._explainer.notes[explainer_notes:])
        return ShardReport(stem=task.entry.stem, count=count, statuses=statuses, problems=problems, notes=notes)

    def _kind(self, name: str) -> TensorKind:
        if name != MAPS:
            return KINDS[SAVED[name]]
        return KINDS["map" if self.spec.explain.top_classes is None else "class-maps"]

    def _write(self, entry: ShardEntry, name: str, columns: Mapping[str, list[Any]], tensors: _Tensors) -> None:
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

    def _batches(self, path: Path, task: ShardTask) -> Iterator[list[FramedImage]]:
        samples = read_samples(path, task.entry, label_field=task.label_field)
        return framed_batches(
            samples,
            self._frame,
            batch_size=self._explainer.batch_size,
            threads=max(1, self.spec.threads),
        )

    def _explain(self, batch: list[FramedImage], path: Path) -> Explained:
        """Explain a batch; images that could not be decoded get NaN maps and logits, and no class."""
        truth = [self._class_of(item, path) for item in batch]
        shape, grid = self.spec.explain.shape(self.teacher.grid), self.teacher.grid
        width = self.teacher.model.width if "features" in self.spec.saved else 0
        maps = np.full((len(batch), *shape), np.nan, np.float32)
        logits = np.full((len(batch), self.teacher.num_classes), np.nan, np.float32)
        targets = np.full((len(batch), *shape[:-2]), NO_CLASS, np.int64)
        features = np.full((len(batch), *grid, width), np.nan, np.float32)
        decoded = {i: item.pixels for i, item in enumerate(batch) if item.pixels is not None}
        if decoded:
            rows, pixels = list(decoded), np.stack(list(decoded.values()))  # uint8 [n, H, W, 3]
            labels = np.array([truth[i] for i in rows], np.int64)
            maps[rows], logits[rows], targets[rows], features[rows] = self._explainer(pixels, labels)
        return Explained(maps, logits, targets, features)

    def _stability(self, batch: list[FramedImage], explained: Explained) -> np.ndarray:
        """The stability of the maps, of several the first one: float64 [n], NaN where there is no usable map."""
        first = explained.maps if self.spec.explain.top_classes is None else explained.maps[:, 0]
        targets = explained.targets if explained.targets.ndim == 1 else explained.targets[:, 0]
        values = np.full(len(batch), np.nan)
        usable = np.isfinite(first).all(axis=(1, 2)) & np.isfinite(explained.logits).all(axis=1)
        if len(rows := np.flatnonzero(usable)):
            chosen = [batch[row] for row in rows]
            pixels = np.stack([item.pixels for item in chosen if item.pixels is not None])  # uint8 [n, H, W, 3]
            noisy = self._explainer.maps_of(add_noise(pixels, [item.key for item in chosen]), targets[rows])
            values[rows] = stability(first[rows], noisy)
        return values

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


class _Tensors:
    """What one store gets of a shard, encoded batch by batch, and what its index says of it."""

    def __init__(self, kind: TensorKind) -> None:
        self.kind = kind
        self.stored: list[np.ndarray] = []
        self.statuses: list[str] = []
        self._scales: list[np.ndarray] = []
        self._measures: list[tuple[np.ndarray, np.ndarray]] = []

    def add(self, batch: list[FramedImage], logits: np.ndarray, raw: np.ndarray) -> None:
        """Add the tensors [n, ...] of a batch."""
        statuses = [self._status(item, one, logit) for item, one, logit in zip(batch, raw, logits, strict=True)]
        # An answer that is no number has no map, even if the sweep made one of it.
        raw[[status == NONFINITE for status in statuses]] = np.nan
        stored, scale = encode(self.kind, raw)
        self.stored.append(stored)
        self.statuses += statuses
        self._scales.append(scale)
        self._measures.append(concentration(raw, self.kind))

    def columns(self) -> dict[str, Any]:
        """The columns of the index that depend on the tensors."""
        entropy, top_mass = (np.concatenate(parts) for parts in zip(*self._measures, strict=True))
        scale = np.concatenate(self._scales)
        return {"scale": scale, "entropy": entropy, "top10_mass": top_mass, "status": self.statuses}

    def _status(self, item: FramedImage, tensor: np.ndarray, logit: np.ndarray) -> str:
        if item.pixels is None:
            return UNDECODABLE
        if not (np.isfinite(tensor).all() and np.isfinite(logit).all()):
            return NONFINITE
        return OK if tensor.any() or not self.kind.is_relevance else ZERO


def frame_of(teacher: Teacher, kind: str) -> Frame:
    """The frame of that kind, `full` or `center`, at the input size of the teacher."""
    crop_pct = teacher.crop_pct if kind == "center" else 1.0
    return Frame(kind=kind, size=teacher.image_size, interpolation=teacher.interpolation, crop_pct=crop_pct)


def _append_row(columns: dict[str, list[Any]], item: FramedImage, logit: np.ndarray, targets: np.ndarray) -> None:
    """Add what an index says of a sample, whatever its tensor; the first one of its target classes counts."""
    target = int(targets[0])
    answered = item.pixels is not None and bool(np.isfinite(logit).all())
    probability = _softmax(logit) if answered else logit
    predicted = int(probability.argmax()) if answered else NO_CLASS
    values = {
        "key": item.key,
        "label": NO_CLASS if item.label is None else item.label,
        "target": target,
        "predicted": predicted,
        "predicted_probability": probability[predicted] if answered else np.nan,
        "target_probability": probability[target] if answered and target != NO_CLASS else np.nan,
        "width": item.width,
        "height": item.height,
        "frame_x1": item.frame.x1,
        "frame_y1": item.frame.y1,
        "frame_x2": item.frame.x2,
        "frame_y2": item.frame.y2,
        "targets": targets,
        "image_digest": item.digest,
    }
    for name, value in values.items():
        columns[name].append(value)


def _softmax(logit: np.ndarray) -> np.ndarray:
    shifted = np.exp(logit.astype(np.float64) - float(logit.max()))
    return shifted / shifted.sum()
