"""Batches of images, labels and relevance maps from tar shards and a relevance store."""

from __future__ import annotations

import hashlib
import signal
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import webdataset as wds
from PIL import Image
from torch.utils.data import DataLoader, get_worker_info

from zpipe.schemas.errors import UsageError, ZpipeError
from zpipe.schemas.geometry import Box
from zpipe.schemas.relevance_maps import RelevanceMaps
from zpipe.schemas.sample import DECODE_ERRORS
from zpipe.schemas.storage import as_path
from zpipe.train.data.join import MISSING_POLICIES, Joined, Missing, ShardJoin, check_store, usable_rows
from zpipe.train.data.order import (
    Plan,
    deal,
    fresh_per_batch,
    lane_count,
    last_uses,
    plan_epoch,
    shard_order,
    whole_batches,
)
from zpipe.train.data.stream import list_shards
from zpipe.train.data.transforms import (
    Augment,
    ViewConfig,
    change_colours,
    decode,
    draw_view,
    erase,
    erase_maps,
    view_box,
    view_image,
    view_maps,
)

Damaged = Literal["error", "skip"]


class RelevanceLoader:
    """Iterates over batches, each a dictionary:

        image      uint8 [B, 3, S, S], not normalised: the model's mean and std are applied where it runs
        label      int64 [B]
        relevance  float32 [B, gh, gw] in [0, 1], the map under the same crop and flip (when `maps` is given)
        box        float32 [B, 4], the crop in source pixels (x1, y1, x2, y2)
        flipped    bool [B]
        key        list of B str
        object_box float32 [B, 4], the object's box in fractions of the crop (when every sample's .json has a `box`)

    Order: see `zpipe.train.data.order`. An epoch holds every sample once; training leaves out the last samples that fill no
    batch (`epoch_counts` says how many). Of every batch of training each rank takes `batch_size` samples, so the batches of
    all ranks put together are those of one process with `batch_size * world_size`, and all ranks take `len(loader)` steps.
    Evaluation deals whole shards to ranks; one that gets none yields nothing. What a sample's view looks like depends on
    (seed, epoch, sample, repeat) alone.

    `state_dict()` after a batch, loaded into a new loader in the same or another process, goes on with the batch behind it:
    the same batches, also with another number of workers, and in training of ranks, where `batch_size * world_size` stays.

    Args:
        shards: folder or URL of tars that `zpipe make-shards` wrote, public tars (jpg + cls or json), or one tar.
        maps: relevance store (path, URL or an open one) made from these shards.
        batch_size: samples in a batch of this rank.
        augment: "train" (random crops and flips, shuffled) or "eval" (centre crops, every sample, in order).
        repeats: how often a batch of training holds each of its samples, in different views (repeated augmentation, Hoffer
            et al. 2020). An epoch has as many batches as without, and sees a part of the samples, another one every time.
        missing: what a sample without a usable map does: "error", "skip" (left out), "uniform" (a map of ones).
        damaged: what a tar does that is truncated or altered: "error", or "skip", which makes batches smaller by its
            samples and tells its name in `damaged_shards`.
        view: crop, flip and colour settings; `augment` overrides its mode.

    Memory: each of the 8 or so shards that an epoch is mixed from is held undecoded in one of the workers of all ranks,
    110 MB each for ImageNet in tars of 1,000. Errors: :class:`UsageError` / :class:`ZpipeError` naming folder, tar or key.
    """

    def __init__(
        self,
        shards: str | Path,
        maps: str | Path | RelevanceMaps | None = None,
        *,
        batch_size: int,
        image_size: int = 224,
        augment: Augment = "train",
        seed: int = 0,
        num_workers: int = 0,
        rank: int = 0,
        world_size: int = 1,
        missing: Missing = "error",
        damaged: Damaged = "error",
        repeats: int = 1,
        view: ViewConfig | None = None,
    ) -> None:
        low = batch_size < 1 or image_size < 1 or num_workers < 0 or seed < 0 or repeats < 1
        if low or not 0 <= rank < world_size:
            raise UsageError(
                f"batch_size={batch_size}, image_size={image_size}, rank={rank} of {world_size}, "
                f"num_workers={num_workers}, seed={seed}, repeats={repeats}: out of range"
            )
        if missing not in MISSING_POLICIES:
            raise UsageError(f"missing={missing!r}; choose one of {', '.join(MISSING_POLICIES)}")
        if damaged not in ("error", "skip"):
            raise UsageError(f"damaged={damaged!r}; choose error or skip")
        if augment not in ("train", "eval"):
            raise UsageError(f"augment={augment!r}; choose train or eval")
        self.path = as_path(shards)
        self.shards, self.index = list_shards(self.path)
        self.batch_size, self.image_size, self.seed = batch_size, image_size, seed
        self.num_workers, self.rank, self.world_size = num_workers, rank, world_size
        self.missing: Missing = missing
        self.damaged: Damaged = damaged
        self.damaged_shards: list[str] = []
        self.view = replace(view or ViewConfig(), augment=augment)
        self.train = augment == "train"
        self.repeats = repeats if self.train else 1
        self.epoch = 0
        self._lanes = self._own_lanes()
        self._start = self._next = 0  # the batch that the next iteration begins with; the one behind the last yielded
        self.maps: RelevanceMaps | None = None
        # Shards of one size share their rows: of a million shards each array would cost more than what it says.
        whole = {count: np.arange(count, dtype=np.int32) for count in {shard.entry.count for shard in self.shards}}
        self._rows = [whole[shard.entry.count] for shard in self.shards]
        self._unusable = 0
        if maps is not None:
            path = maps.path if isinstance(maps, RelevanceMaps) else maps
            self.maps = RelevanceMaps(path, normalise="minmax")
            check_store(self.maps, self.shards, self.view)
            if missing != "error":
                usable = usable_rows(self.maps, self.shards)
                self._unusable = self.sample_count - sum(map(len, usable))
                if missing == "skip":
                    pairs = zip(usable, self._rows, strict=True)
                    self._rows = [every if len(some) == len(every) else some for some, every in pairs]

    @property
    def sample_count(self) -> int:
        """Samples in the data set (all ranks), those left out by `missing="skip"` not counted."""
        return sum(map(len, self._rows))

    def draw(self, count: int, *, shards: int, seed: int = 0) -> int:
        """Serve only `count` samples from now on, drawn by seed, in the order they had; returns how many shards they are from.

        `shards` of the shards are drawn first, more only where these hold too few samples, so that a look at a large data
        set reads little of it. Errors: :class:`UsageError` when the loader trains.
        """
        if self.train:
            raise UsageError("samples are drawn for looking at them; training takes all of them")
        rng = np.random.default_rng(seed)
        chosen: list[int] = []
        held = 0
        for shard in rng.permutation(len(self.shards)).tolist():
            if len(chosen) >= shards and held >= count:
                break
            chosen.append(shard)
            held += len(self._rows[shard])
        chosen.sort()
        rows = [(shard, int(row)) for shard in chosen for row in self._rows[shard]]
        kept = np.sort(rng.choice(len(rows), size=min(count, len(rows)), replace=False)).tolist()
        drawn: dict[int, list[int]] = {shard: [] for shard in range(len(self.shards))}
        for shard, row in (rows[place] for place in kept):
            drawn[shard].append(row)
        self._rows = [np.asarray(drawn[shard], np.int64) for shard in range(len(self.shards))]
        return sum(1 for own in drawn.values() if own)

    @property
    def global_batch(self) -> int:
        """Samples in a batch of all ranks together, repeats counted."""
        return self.batch_size * self.world_size

    def epoch_counts(self) -> dict[str, int]:
        """What an epoch does with the samples of all ranks: `served`, `dropped` (they fill no batch, or the repeats of others
        took their place), and `skipped` or `uniform` (no usable map)."""
        fresh = fresh_per_batch(self.global_batch, self.repeats)
        served = len(self) * fresh if self.train else self.sample_count
        counts = {"served": served, "dropped": self.sample_count - served}
        if self.missing != "error":
            counts["skipped" if self.missing == "skip" else "uniform"] = self._unusable
        return counts

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of the next iteration. The epoch of a loaded state is gone on with, another begins at its start."""
        if epoch != self.epoch:
            self.epoch, self._start, self._next = epoch, 0, 0
            self._lanes = self._own_lanes()

    def _own_lanes(self) -> int:
        workers = max(1, self.num_workers)
        return lane_count(workers * self.world_size if self.train else workers, train=self.train)

    @cached_property
    def digest(self) -> str:
        """SHA-256 (hex) of how many samples each shard holds and of which keys, in order: the same data set has the same
        wherever it lies."""
        lines = (f"{shard.entry.count} {shard.entry.keys_sha256}\n" for shard in self.shards)
        return hashlib.sha256("".join(lines).encode()).hexdigest()

    def state_dict(self) -> dict[str, Any]:
        """Where we are, behind the batch that was yielded last, and in which data set. A handful of JSON values."""
        return {
            "epoch": self.epoch,
            "batch": self._next,
            "lanes": self._lanes,
            "seed": self.seed,
            "batch_size": self.batch_size,
            "world_size": self.world_size,
            "repeats": self.repeats,
            "digest": self.digest,
            "samples": self.sample_count,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict()` was taken. Errors: :class:`UsageError` when this loader orders its samples otherwise, or
        has others. A state of an earlier zpipe doesn't name its samples, and is taken at its word."""
        own = self.state_dict()
        names = ["seed", "repeats"]
        if not self.train or state["batch_size"] * state["world_size"] != self.global_batch:
            names += ["batch_size", "world_size"]
        for name in names:
            if state[name] != own[name]:
                raise UsageError(
                    f"{self.path}: the state was taken with {name}={state[name]}, this loader has {own[name]}; "
                    "use the same, or begin with the next epoch"
                )
        if state.get("digest", self.digest) != self.digest:
            raise UsageError(
                f"{self.path}: the state was taken over other shards (digest={state['digest'][:12]}, here "
                f"{self.digest[:12]}); use the same, or begin with the next epoch"
            )
        if state.get("samples", self.sample_count) != self.sample_count:
            raise UsageError(
                f"{self.path}: the state was taken over {state['samples']} samples, this loader has {self.sample_count} of the "
                "same shards; give the same maps and missing=, or begin with the next epoch"
            )
        if state["batch"] > len(self):
            raise UsageError(
                f"{self.path}: the state was taken behind batch {state['batch']}, an epoch here has {len(self)}; use the same "
                "data, or begin with the next epoch"
            )
        self.epoch, self._lanes = state["epoch"], state["lanes"]
        self._start = self._next = state["batch"]

    def __len__(self) -> int:
        """Batches of a whole epoch; equal on all ranks when training."""
        if self.train:
            return self.sample_count // self.global_batch
        return -(-sum(len(self._rows[shard]) for shard in self._shards_to_evaluate()) // self.batch_size)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        total = len(self)
        if total == 0 and not self.train and self.world_size > 1:  # the other ranks have them all
            return
        if total == 0:
            ranks = "" if self.world_size == 1 else f" on each of {self.world_size} ranks"
            raise UsageError(
                f"{self.path}: too few samples ({self.sample_count}) for one batch of {self.batch_size}{ranks}; lower "
                "the batch size, or add data"
            )
        start, self._start = self._start, 0
        self._next = start % total if start == total else start
        if start == total:  # the state of a finished epoch
            return
        parts_per_batch = max(1, self.num_workers)
        parts = _Parts(self, self.epoch, range(start, total))
        with _interrupts_held():
            # Its own generator: the user's random numbers don't depend on how we read.
            arrived = iter(
                DataLoader(parts, batch_size=None, num_workers=self.num_workers, generator=torch.Generator())
            )
        try:
            for number in range(start, total):
                found = []
                for _ in range(parts_per_batch):
                    part = next(arrived, None)
                    if part is None:
                        raise ZpipeError(
                            f"{self.path}: the epoch ended at batch {number} of {total}; "
                            "run the same command with --data-workers 0 to see why"
                        )
                    if isinstance(part, ZpipeError):
                        raise part
                    found.append(part)
                batch = _merge(found)
                self.damaged_shards += [line for line in batch.pop("damaged") if line not in self.damaged_shards]
                if not batch["key"]:
                    raise ZpipeError(f"{self.path}: no sample is left of batch {number}: {self.damaged_shards[-1]}")
                self._next = number + 1
                yield batch
        finally:
            with _interrupts_held():
                del arrived

    def _shards_to_evaluate(self) -> np.ndarray:
        return np.arange(len(self.shards))[self.rank :: self.world_size]

    def plan(self, epoch: int) -> Plan:
        """This rank's samples of an epoch, in order."""
        order = (
            shard_order(len(self.shards), self.seed, epoch, shuffle=True) if self.train else self._shards_to_evaluate()
        )
        rows = [self._rows[shard] for shard in order]
        plan = plan_epoch(order.tolist(), rows, self._lanes, seed=self.seed, epoch=epoch, shuffle=self.train)
        if not self.train:
            return plan
        plan = whole_batches(plan, self.global_batch, self.repeats)
        return plan[deal(plan, self.global_batch, self.world_size) == self.rank]

    def reader(self, lane: np.ndarray, workers: int) -> np.ndarray:
        """Which of this rank's workers reads each lane."""
        return (lane // self.world_size if self.train else lane) % workers


@contextmanager
def _interrupts_held() -> Iterator[None]:
    """Delivers Ctrl-C after the block that starts or ends processes.

    Inside a fork's hooks or a finaliser Python prints a KeyboardInterrupt and drops it. Processes started in the block
    inherit the deafness: a terminal sends Ctrl-C to all of them, and it is for the parent to end them.
    """
    # While Python shuts down, there is no handler any more that could be put back.
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGINT) is None:
        yield
        return
    held: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: held.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if held:
        signal.raise_signal(signal.SIGINT)


@dataclass
class _Request:
    """One worker's part of a batch: places in the batch, which samples belong there, and whether that is their last use."""

    slots: np.ndarray
    plan: Plan
    last: np.ndarray


class _Parts(torch.utils.data.IterableDataset):
    """What one worker adds to each batch: the samples of its own lanes, maybe none. A part of every batch, in order."""

    def __init__(self, loader: RelevanceLoader, epoch: int, batches: range) -> None:
        self.loader, self.epoch, self.batches = loader, epoch, batches

    def __iter__(self) -> Iterator[dict[str, Any] | ZpipeError]:
        # An exception that crosses worker processes arrives wrapped in a traceback; an object arrives as it is.
        try:
            yield from self._pipeline()
        except ZpipeError as error:
            yield error

    def _pipeline(self) -> Iterable[dict[str, Any]]:
        loader, info = self.loader, get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        plan = loader.plan(self.epoch)
        size = loader.batch_size
        plan = plan[self.batches.start * size : self.batches.stop * size]
        mine = np.flatnonzero(loader.reader(plan.lane, workers) == worker)
        plan, batch, slot = plan[mine], mine // size, mine % size
        last = last_uses(plan)
        edges = np.searchsorted(batch, np.arange(len(self.batches) + 1))
        spans = (slice(*edges[number : number + 2]) for number in range(len(self.batches)))
        requests = (_Request(slot[span], plan[span], last[span]) for span in spans)
        with ShardJoin(loader.shards, loader.maps, loader.missing, skip_damaged=loader.damaged == "skip") as join:
            join.expect(plan)
            stages = [lambda: requests, _taker(join), _viewer(loader, self.epoch), _stacker(loader, join)]
            yield from wds.DataPipeline(*stages)


def _taker(join: ShardJoin):
    """A stage: requests into lists of (slot, repeat, sample joined with its map). Samples of damaged tars are missing from them."""

    def stage(requests: Iterable[_Request]) -> Iterator[list[tuple[int, int, Joined]]]:
        for request in requests:
            wanted = request.plan
            columns = (request.slots, wanted.copy, wanted.shard, wanted.row, request.last)
            part = []
            for slot, copy, shard, row, last in zip(*(column.tolist() for column in columns), strict=True):
                item = join.take(shard, row, last=last)
                if item is not None:
                    part.append((slot, copy, item))
            yield part

    return stage


def _viewer(loader: RelevanceLoader, epoch: int):
    """A stage: decode, draw one view, apply it to image, map and box."""

    def stage(parts: Iterable[list[tuple[int, int, Joined]]]) -> Iterator[list[dict]]:
        for part in parts:
            yield [{"slot": slot} | _viewed(loader, epoch, copy, item) for slot, copy, item in part]

    return stage


def _viewed(loader: RelevanceLoader, epoch: int, copy: int, item: Joined) -> dict[str, Any]:
    sample = item.sample
    where = f"{item.shard.path}: key {sample.key}"
    if sample.label is None:
        raise ZpipeError(f"{where}: has no label (.cls, or label in .json); add one")
    # One draw for image, map and box; of its own seed, so that it doesn't matter who makes it and when.
    rng = np.random.default_rng([loader.seed, epoch, item.shard_number, item.row, *([copy] if copy else [])])
    try:
        image, view, source = decode(sample.image, lambda size: draw_view(rng, *size, loader.view), loader.image_size)
    except (*DECODE_ERRORS, Image.DecompressionBombError) as error:
        raise ZpipeError(f"{where}: can't be decoded ({error}); make the shards again, which puts it aside") from error
    pixels = view_image(image, view, loader.image_size, source)
    erased = None
    if loader.train:
        pixels = change_colours(rng, pixels, loader.view.colour)
        pixels, erased = erase(rng, pixels, loader.view.erase) if loader.view.erase else (pixels, None)
    out = {
        "image": pixels,
        "erased": erased,
        "label": sample.label,
        "box": np.asarray(view.box.as_tuple(), np.float32),
        "flipped": view.flipped,
        "key": sample.key,
    }
    if item.relevance is not None:
        frame = item.frame or Box.full(*source)
        if not frame.contains(view.box):
            raise ZpipeError(f"{where}: its map covers {frame.as_tuple()} only; extract on the full frame")
        out |= {"relevance": item.relevance, "view": view, "frame": frame}
    if "box" in sample.meta:
        out["object_box"] = np.asarray(view_box(sample.meta["box"], view), np.float32)
    return out


def _stacker(loader: RelevanceLoader, join: ShardJoin):
    """A stage: lists of viewed samples into dictionaries of stacked tensors."""

    def stage(parts: Iterable[list[dict]]) -> Iterator[dict[str, Any]]:
        for part in parts:
            side = loader.image_size
            out: dict[str, Any] = {
                "slot": torch.tensor([item["slot"] for item in part], dtype=torch.int64),  # [m]
                "image": _stack(part, "image", (3, side, side), np.uint8),  # [m, 3, S, S]
                "label": torch.tensor([item["label"] for item in part], dtype=torch.int64),  # [m]
                "box": _stack(part, "box", (4,), np.float32),  # [m, 4]
                "flipped": torch.tensor([item["flipped"] for item in part], dtype=torch.bool),  # [m]
                "key": [item["key"] for item in part],
                "damaged": join.pop_damaged(),
            }
            if loader.maps is not None:
                whole = _stack(part, "relevance", loader.maps.manifest.provenance.grid, np.float32)  # [m, gh, gw]
                views, frames = ([item[name] for item in part] for name in ("view", "frame"))
                out["relevance"] = torch.from_numpy(view_maps(whole.numpy(), views, frames)) if part else whole
                erased = [item["erased"] for item in part]
                if any(box is not None for box in erased):
                    out["relevance"] = torch.from_numpy(erase_maps(out["relevance"].numpy(), erased, side))
            if all("object_box" in item for item in part):
                out["object_box"] = _stack(part, "object_box", (4,), np.float32)
            yield out

    return stage


def _stack(part: list[dict], name: str, shape: tuple[int, ...], dtype: type) -> torch.Tensor:
    return torch.from_numpy(np.stack([item[name] for item in part]) if part else np.zeros((0, *shape), dtype))


def _merge(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """The parts of one batch in the order of the batch."""
    damaged = [line for part in parts for line in part["damaged"]]
    full = [part for part in parts if part["key"]] or parts[:1]
    order = torch.cat([part["slot"] for part in full]).argsort()
    out: dict[str, Any] = {"damaged": damaged}
    keys = [key for part in full for key in part["key"]]
    for name in full[0]:
        if name in ("slot", "damaged") or not all(name in part for part in full):
            continue
        if name == "key":
            out[name] = [keys[i] for i in order.tolist()]
        elif len(full) == 1:
            out[name] = full[0][name]  # slots of one part are in order already
        else:
            out[name] = torch.cat([part[name] for part in full])[order]
    return out
