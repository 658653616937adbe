"""One shard, end to end: tar in, committed map shard out, a small report back. Knows no cluster."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
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
from zpipe.pipeline.teacher import Teacher, load_teacher
from zpipe.schemas.errors import ZpipeError
from zpipe.schemas.relevance_store import (
    INDEX_SCHEMA,
    NONFINITE,
    OK,
    UNDECODABLE,
    ZERO,
    concentration,
    encode_maps,
    write_shard,
)
from zpipe.schemas.shard_index import ShardEntry
from zpipe.schemas.storage import as_path


@dataclass(frozen=True, kw_only=True)
class WorkerSpec:
    """Everything a worker process needs to begin. Small and picklable: paths, names and numbers."""

    teacher: str | None
    weights: str
    teacher_args: dict[str, Any]
    num_classes: int | None
    seed: int
    teacher_digest: str
    fingerprint: str
    out: str
    explain: ExplainConfig
    frame: str
    batch_size: int
    threads: int
    sharing: int  # how many workers share a machine's memory at most: as many as there are shards, fewer where an executor knows
    device: str


@dataclass(frozen=True, kw_only=True)
class ShardTask:
    """One input tar and what its index says of it."""

    path: str
    entry: ShardEntry


@dataclass(frozen=True, kw_only=True)
class ShardReport:
    """What became of one shard. `error` is set when nothing was committed; `problems` says of images that could not be decoded
    why (key -> reason, which the store doesn't keep), `notes` what the worker had to change on the way."""

    stem: str
    count: int = 0
    statuses: dict[str, int] = field(default_factory=dict)
    problems: dict[str, str] = field(default_factory=dict)
    error: str = ""
    notes: tuple[str, ...] = ()


class ShardWorker:
    """Holds one frozen teacher and runs shards through it, one at a time."""

    def __init__(self, spec: WorkerSpec) -> None:
        torch.set_num_threads(spec.threads)
        self.spec = spec
        self.teacher: Teacher = load_teacher(
            spec.teacher,
            spec.weights,
            num_classes=spec.num_classes,
            seed=spec.seed,
            model_args=spec.teacher_args,
            device=spec.device,
        )
        if self.teacher.digest != spec.teacher_digest:
            raise ZpipeError(
                f"{spec.weights}: weights with digest {self.teacher.digest[:12]}, the run began with {spec.teacher_digest[:12]}; "
                "every machine needs the same file"
            )
        # A reduced precision is asked for by name; no setting that lies about in the process may bring it in unasked.
        torch.set_float32_matmul_precision("highest")
        batch_size, note = _batch_size(spec, self.teacher)
        self._explainer = Explainer(self.teacher, spec.explain, batch_size=batch_size, device=spec.device)
        self._notes = [note] if note else []
        self._frame = frame_of(self.teacher, spec.frame)

    def ready(self) -> bool:
        """Answers once the teacher is loaded."""
        return True

    def process(self, task: ShardTask) -> ShardReport:
        """Run one shard and commit its maps. A :class:`ZpipeError` becomes the report's `error`; nothing is committed then."""
        try:
            return self._process(task)
        except ZpipeError as error:
            return ShardReport(stem=task.entry.stem, error=str(error))

    def _process(self, task: ShardTask) -> ShardReport:
        path = as_path(task.path)
        gh, gw = self.teacher.grid
        count = task.entry.count
        raw = np.full((count, gh, gw), np.nan, np.float32)
        columns: dict[str, list] = {name: [] for name in INDEX_SCHEMA.names}
        problems: dict[str, str] = {}
        told = len(self._explainer.notes)
        before, self._notes = self._notes, []
        row = 0
        for batch in self._batches(path, task.entry):
            maps, logits, targets = self._explain(batch, path)
            for item, relevance, logit, target in zip(batch, maps, logits, targets, strict=True):
                if row == count:
                    raise ZpipeError(
                        f"{path}: more than the {count} samples its index names: altered; make the shards again"
                    )
                raw[row] = relevance
                if item.problem:
                    problems[item.key] = item.problem
                _append_row(columns, item, logit, int(target), _status(item, relevance))
                row += 1
        if row != count:
            raise ZpipeError(
                f"{path}: {row} samples, its index names {count}: truncated or altered; restore it or make the shards again"
            )
        stored, scale = encode_maps(raw)
        entropy, top_mass = concentration(raw)
        figures = {"scale": scale, "entropy": entropy, "top10_mass": top_mass}
        index = pa.table(columns | figures).cast(INDEX_SCHEMA)
        write_shard(
            as_path(self.spec.out),
            task.entry.stem,
            stored,
            index,
            input_sha256=task.entry.sha256,
            fingerprint=self.spec.fingerprint,
        )
        statuses = dict(Counter(columns["status"]))
        notes = (*before, *self._explainer.notes[told:])
        return ShardReport(stem=task.entry.stem, count=count, statuses=statuses, problems=problems, notes=notes)

    def _batches(self, path: Path, entry: ShardEntry) -> Iterator[list[FramedImage]]:
        samples = read_samples(path, entry)
        return framed_batches(
            samples,
            self._frame,
            batch_size=self._explainer.batch_size,
            threads=max(1, self.spec.threads),
        )

    def _explain(self, batch: list[FramedImage], path: Path) -> Explained:
        """Maps, logits and targets of a batch; NaN and no class for images that could not be decoded."""
        for item in batch if self.spec.explain.asks_label else ():
            if item.label is None:
                raise ZpipeError(
                    f"{path}: key {item.key}: has no label (.cls, or label in .json); add one, it is the target class, "
                    "or choose --target predicted"
                )
            if not 0 <= item.label < self.teacher.num_classes:
                raise ZpipeError(
                    f"{path}: key {item.key}: label {item.label} is outside the teacher's {self.teacher.num_classes} classes; "
                    "correct the label or take a teacher with more classes"
                )
        gh, gw = self.teacher.grid
        maps = np.full((len(batch), gh, gw), np.nan, np.float32)
        logits = np.full((len(batch), self.teacher.num_classes), np.nan, np.float32)
        targets = np.full(len(batch), NO_CLASS, np.int64)
        seen = {i: item.pixels for i, item in enumerate(batch) if item.pixels is not None}
        if seen:
            good, pixels = list(seen), np.stack(list(seen.values()))  # uint8 [n, H, W, 3]
            labels = np.array([NO_CLASS if batch[i].label is None else batch[i].label for i in good], np.int64)
            maps[good], logits[good], targets[good] = self._explainer(pixels, labels)
        return Explained(maps, logits, targets)


def _batch_size(spec: WorkerSpec, teacher: Teacher) -> tuple[int, str]:
    """The batch size to begin with, and what to say when it isn't the one asked for."""
    if spec.device.startswith("cuda"):
        return spec.batch_size or 64, ""  # a GPU says when it is full, and the explainer halves
    asked = spec.batch_size or 8
    # A CPU doesn't say: the kernel ends a process that takes too much. So it is reckoned before.
    need = bytes_per_image(teacher.model, PRECISIONS[spec.explain.precision][0])
    fits = batch_that_fits(asked, need, spec.sharing, available_memory())
    if fits == asked:
        return asked, ""
    gib = asked * need * spec.sharing / 2**30
    return fits, f"a batch of {asked} would take {gib:.1f} GiB in {spec.sharing} workers: lowered to {fits}"


def _status(item: FramedImage, relevance: np.ndarray) -> str:
    if item.pixels is None:
        return UNDECODABLE
    if not np.isfinite(relevance).all():
        return NONFINITE
    return OK if relevance.any() else ZERO


def frame_of(teacher: Teacher, kind: str) -> Frame:
    """The teacher's frame of that kind."""
    crop_pct = teacher.crop_pct if kind == "center" else 1.0
    return Frame(kind=kind, size=teacher.image_size, interpolation=teacher.interpolation, crop_pct=crop_pct)


def _append_row(columns: dict[str, list], item: FramedImage, logit: np.ndarray, target: int, status: str) -> None:
    decoded = item.pixels is not None
    probability = _softmax(logit) if decoded else logit
    predicted = int(probability.argmax()) if decoded else -1
    values = {
        "key": item.key,
        "label": NO_CLASS if item.label is None else item.label,
        "target": target,
        "predicted": predicted,
        "predicted_probability": probability[predicted] if decoded else np.nan,
        "target_probability": probability[target] if decoded and target != NO_CLASS else np.nan,
        "width": item.width,
        "height": item.height,
        "frame_x1": item.frame.x1,
        "frame_y1": item.frame.y1,
        "frame_x2": item.frame.x2,
        "frame_y2": item.frame.y2,
        "status": status,
    }
    for name, value in values.items():
        columns[name].append(value)


def _softmax(logit: np.ndarray) -> np.ndarray:
    shifted = np.exp(logit.astype(np.float64) - logit.max())
    return shifted / shifted.sum()
