"""A worker's share of an epoch: fetch samples with their maps, augment them, collate them into parts of batches."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.queues import Queue
from typing import Any

import numpy as np
import webdataset as wds
from torch.utils.data import IterableDataset, get_worker_info

from zpipe.schemas.errors import ZpipeError, last_line
from zpipe.schemas.geometry import Box
from zpipe.schemas.images import DECODE_ERRORS
from zpipe.train.data.batches import Arrays, Part
from zpipe.train.data.damage import DamagedSample
from zpipe.train.data.join import Damaged, Joined, Missing, ShardJoin
from zpipe.train.data.map_stores import MapSource
from zpipe.train.data.order import Plan, last_uses
from zpipe.train.data.stream import Shard
from zpipe.train.data.transforms import (
    ViewConfig,
    change_colours,
    decode,
    draw_view,
    erase,
    erase_maps,
    view_box,
    view_image,
    view_tensors,
)
from zpipe.train.signals import STOP_SIGNALS


@dataclass(frozen=True, kw_only=True)
class EpochSpec:
    """What workers need to know of the epoch that a rank's loader iterates over."""

    epoch: int
    """Number of the epoch; with `seed` and a sample's place it seeds the sample's augmentation."""

    seed: int
    """Seed of the loader."""

    batches: range
    """The batches to deliver; an epoch that is resumed does not begin with batch 0."""

    batch_size: int
    """Samples of this rank in a batch."""

    plan: Callable[[], Plan]
    """Returns the rank's samples of the whole epoch, in order. Workers call it rather than receive its large result."""

    lane_stride: int
    """The rank reads every `lane_stride`-th lane."""

    shards: Sequence[Shard]
    """All shards of the data set."""

    stores: Mapping[str, MapSource]
    """The stores that each sample's tensors come from, by their names in a batch."""

    missing: Missing
    """How to handle samples without a usable map."""

    damaged: Damaged
    """How to handle damaged tars and samples."""

    check: bool
    """Whether to compare the digests of tars with their index."""

    image_size: int
    """Side of the images, in pixels."""

    view: ViewConfig
    """Crops, flips and colours."""

    def own(self, worker: int, workers: int) -> tuple[Plan, np.ndarray]:
        """The samples that one of the workers reads, those of its lanes.

        Returns:
            The plan of the samples, and their places counted from the first sample of the first batch. int64 [n]
        """
        plan = self.plan()[self.batches.start * self.batch_size : self.batches.stop * self.batch_size]
        places = np.flatnonzero(plan.lane // self.lane_stride % workers == worker)
        return plan[places], places


@dataclass(frozen=True)
class PartRequest:
    """A worker's part of one batch: the slots of the batch to fill, their samples, and whether each is used again."""

    slots: np.ndarray
    plan: Plan
    last: np.ndarray


class BatchParts(IterableDataset[Part | ZpipeError]):
    """The parts that one worker contributes: one of every batch, in order; a part may be empty.

    Args:
        spec: What to deliver.
        staging: Where images and maps are written, in turn: memory for one batch each.
    """

    def __init__(self, spec: EpochSpec, staging: Sequence[Arrays]) -> None:
        self.spec, self.staging = spec, staging

    def __iter__(self) -> Iterator[Part | ZpipeError]:
        # A DataLoader wraps an exception of a worker process into a traceback; an object arrives as it is.
        try:
            yield from self._pipeline()
        except ZpipeError as error:
            yield error

    def _pipeline(self) -> Iterable[Part]:
        spec, info = self.spec, get_worker_info()
        plan, places = spec.own(info.id, info.num_workers) if info else spec.own(0, 1)
        batch, slots, last = places // spec.batch_size, places % spec.batch_size, last_uses(plan)
        edges = np.searchsorted(batch, np.arange(len(spec.batches) + 1)).tolist()
        spans = (slice(*edges[number : number + 2]) for number in range(len(spec.batches)))
        requests = (PartRequest(slots[span], plan[span], last[span]) for span in spans)
        with ShardJoin(
            spec.shards, spec.stores, spec.missing, skip_damaged=spec.damaged == "skip", check=spec.check
        ) as join:
            join.expect(plan)
            yield from wds.DataPipeline(
                lambda: requests, fetch(join), augment(spec, join), collate(spec, join, self.staging)
            )


def begin_worker(_: int) -> None:
    """Set up a data-loading process: it outlives signals to its group, ends with its parent, and fails aloud.

    A terminal, a scheduler or `timeout` sends SIGINT or SIGTERM to all processes. The parent then ends its step, saves,
    and ends its workers itself.
    """
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    Queue._on_queue_feeder_error = _answer_failure  # type: ignore[attr-defined]
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    # Without the clean-up, which would wait until somebody reads what is queued.
    os._exit(1)


def _answer_failure(queue: Any, error: Exception, item: tuple[int, Any]) -> None:
    """Queue an error instead of what a queue's thread could not send; the parent would wait for it forever."""
    if isinstance(item[1], ZpipeError):
        os._exit(1)
    queue.put((item[0], ZpipeError(f"a data-loading process could not send a batch ({last_line(error)})")))


TENSOR, FRAME = "tensor ", "frame "  # keys of an augmented sample, before the name of a store
Fetched = list[tuple[int, int, Joined]]
Augmented = list[dict[str, Any]]


def fetch(join: ShardJoin) -> Callable[[Iterable[PartRequest]], Iterator[Fetched]]:
    """A stage: requests -> lists of (slot, repeat, sample with its map). Skipped tars and samples are left out."""

    def stage(requests: Iterable[PartRequest]) -> Iterator[Fetched]:
        for request in requests:
            plan = request.plan
            columns = (request.slots, plan.copy, plan.shard, plan.row, request.last)
            part = []
            for slot, copy, shard, row, last in zip(*(column.tolist() for column in columns), strict=True):
                try:
                    item = join.take(shard, row, last=last)
                except DamagedSample as error:
                    join.leave_out(shard, row, error)
                    continue
                if item is not None:
                    part.append((slot, copy, item))
            yield part

    return stage


def augment(spec: EpochSpec, join: ShardJoin) -> Callable[[Iterable[Fetched]], Iterator[Augmented]]:
    """A stage: decode each image, draw one view, and apply it to image, map and box. Damaged samples are left out."""

    def stage(parts: Iterable[Fetched]) -> Iterator[Augmented]:
        for part in parts:
            augmented = []
            for slot, copy, item in part:
                try:
                    augmented.append({"slot": slot} | _augment_sample(spec, copy, item))
                except DamagedSample as error:
                    join.leave_out(item.shard_number, item.row, error)
            yield augmented

    return stage


def _augment_sample(spec: EpochSpec, copy: int, item: Joined) -> dict[str, Any]:
    sample = item.sample
    where = f"{item.shard.path}: key {sample.key}"
    if sample.damage is not None:
        raise DamagedSample(sample.damage)
    if sample.label is None:
        raise DamagedSample(f"{where}: has no label (.cls, or label in .json); add one")
    # A generator of the sample's own, so that its view does not depend on which worker draws it, and when.
    rng = np.random.default_rng([spec.seed, spec.epoch, item.shard_number, item.row, *([copy] if copy else [])])
    try:
        image, view, source = decode(sample.image, lambda size: draw_view(rng, *size, spec.view), spec.image_size)
    except DECODE_ERRORS as error:
        raise DamagedSample(f"{where}: can't be decoded ({last_line(error)}); replace the tar") from error
    pixels = view_image(image, view, spec.image_size, source)
    erased = None
    if spec.view.augment == "train":
        pixels = change_colours(rng, pixels, spec.view.colour)
        pixels, erased = erase(rng, pixels, spec.view.erase) if spec.view.erase else (pixels, None)
    out: dict[str, Any] = {
        "image": pixels,
        "erased": erased,
        "label": sample.label,
        "box": np.asarray(view.box.as_tuple(), np.float32),
        "flipped": view.flipped,
        "key": sample.key,
    }
    for name, tensor in item.tensors.items():
        frame = tensor.frame or Box.full(*source)
        if not frame.contains(view.box):
            raise ZpipeError(f"{where}: its map covers {frame.as_tuple()} only; extract on the full frame")
        out |= {"view": view, f"{FRAME}{name}": frame, f"{TENSOR}{name}": tensor.values}
    if sample.box is not None:
        out["object_box"] = np.asarray(view_box(sample.box, view), np.float32)
    if spec.view.augment == "eval":
        try:
            boxes = sample.boxes
        except ZpipeError as error:
            raise DamagedSample(f"{item.shard.path}: {error}") from error
        out["object_boxes"] = np.array([view_box(box, view) for box in boxes], np.float32).reshape(-1, 4)
    return out


def collate(
    spec: EpochSpec, join: ShardJoin, staging: Sequence[Arrays]
) -> Callable[[Iterable[Augmented]], Iterator[Part]]:
    """A stage: lists of m augmented samples -> parts of batches, whose images and maps are written to `staging`."""

    def stage(parts: Iterable[Augmented]) -> Iterator[Part]:
        for number, part in enumerate(parts):
            yield _collate_part(spec, part, staging[number % len(staging)]) | {"damaged": join.pop_damaged()}

    return stage


def _collate_part(spec: EpochSpec, part: Augmented, staged: Arrays) -> Part:
    """Write images and maps to their slots; return the rest, by the names of a batch, and `slot`."""
    slots = np.array([item["slot"] for item in part], np.int64)  # [m]
    for slot, item in zip(slots.tolist(), part, strict=True):
        staged["image"][slot] = item["image"].transpose(1, 2, 0)
    if part:
        for name, store in spec.stores.items():
            staged[name][slots] = _view_tensors(spec, part, name, store)
    out: Part = {
        "slot": slots,
        "label": np.array([item["label"] for item in part], np.int64),  # [m]
        "box": _rows(part, "box"),  # [m, 4]
        "flipped": np.array([item["flipped"] for item in part], bool),  # [m]
        "key": [item["key"] for item in part],
    }
    if all("object_box" in item for item in part):
        out["object_box"] = _rows(part, "object_box")
    if spec.view.augment == "eval":
        out["object_boxes"] = [item["object_boxes"] for item in part]
    return out


def _view_tensors(spec: EpochSpec, part: Augmented, name: str, store: MapSource) -> np.ndarray:
    """What the views of a part show of one store's tensors, [m, ...]."""
    kind = store.maps.kind
    views, frames, erased = ([item[each] for item in part] for each in ("view", f"{FRAME}{name}", "erased"))
    values = view_tensors(kind, np.stack([item[f"{TENSOR}{name}"] for item in part]), views, frames)
    if kind.is_relevance and any(box is not None for box in erased):
        values = erase_maps(values, erased, spec.image_size)
    return values


def _rows(part: Augmented, name: str) -> np.ndarray:
    return np.array([item[name] for item in part], np.float32).reshape(-1, 4)
