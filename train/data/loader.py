"""Batches of images, labels and relevance maps from tar shards and a relevance store."""

from __future__ import annotations

import random
import signal
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import webdataset as wds
from PIL import Image
from torch.utils.data import DataLoader, get_worker_info

from zpipe.schemas.errors import UsageError, ZpipeError
from zpipe.schemas.relevance_maps import RelevanceMaps
from zpipe.schemas.storage import as_path
from zpipe.train.data.join import MISSING_POLICIES, Missing, check_store, join_maps, usable_counts
from zpipe.train.data.stream import Shard, list_shards, read_tar, shard_order, split_shards
from zpipe.train.data.transforms import Augment, ViewConfig, decode, draw_view, view_box, view_image, view_map

# Samples (undecoded) that wait in each worker to be drawn at random; at ImageNet's 110 KB a photo, 110 MB.
SHUFFLE_BUFFER = 1000


class RelevanceLoader:
    """Iterates over batches, each a dictionary:

        image      uint8 [B, 3, S, S], not normalised: the model's mean and std are applied where it runs
        label      int64 [B]
        relevance  float32 [B, gh, gw] in [0, 1], the map under the same crop and flip (when `maps` is given)
        box        float32 [B, 4], the crop in source pixels (x1, y1, x2, y2)
        flipped    bool [B]
        key        list of B str
        object_box float32 [B, 4], the object's box in fractions of the crop (when every sample's .json has a `box`)

    Order: an epoch's shards are permuted by (seed, epoch), dealt to ranks and workers, and samples shuffled within a
    buffer. `augment="train"` drops each worker's last partial batch, and the batches by which a rank exceeds the
    shortest one, so that all ranks take `len(loader)` steps; `augment="eval"` keeps every sample, in order.

    Args:
        shards: folder that `zpipe make-shards` wrote, or one of its tars.
        maps: relevance store (path or an open one) made from these shards.
        missing: what a sample without a usable map does: "error", "skip", "uniform".
        view: crop and flip settings; `augment` overrides its mode.

    Errors: :class:`UsageError` / :class:`ZpipeError` naming folder, tar or key.
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
        view: ViewConfig | None = None,
    ) -> None:
        if batch_size < 1 or image_size < 1 or not 0 <= rank < world_size or num_workers < 0 or seed < 0:
            raise UsageError(
                f"batch_size={batch_size}, image_size={image_size}, rank={rank} of {world_size}, "
                f"num_workers={num_workers}, seed={seed}: out of range"
            )
        if missing not in MISSING_POLICIES:
            raise UsageError(f"missing={missing!r}; choose one of {', '.join(MISSING_POLICIES)}")
        self.shards, self.index = list_shards(as_path(shards))
        self.path = as_path(shards)
        self.batch_size, self.image_size, self.seed = batch_size, image_size, seed
        self.num_workers, self.rank, self.world_size = num_workers, rank, world_size
        self.missing: Missing = missing
        self.view = replace(view or ViewConfig(), augment=augment)
        self.train = augment == "train"
        self.epoch = 0
        self.maps: RelevanceMaps | None = None
        self._counts = {shard.entry.stem: shard.entry.count for shard in self.shards}
        if maps is not None:
            path = maps.path if isinstance(maps, RelevanceMaps) else maps
            self.maps = RelevanceMaps(path, normalise="minmax")
            check_store(self.maps, self.shards)
            if missing == "skip":
                self._counts = usable_counts(self.maps, self.shards)

    @property
    def sample_count(self) -> int:
        """Samples in the data set (all ranks), those left out by `missing="skip"` not counted."""
        return sum(self._counts.values())

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of the next iteration."""
        self.epoch = epoch

    def __len__(self) -> int:
        """Batches that the next iteration yields on this rank; equal on all ranks when training."""
        if self.train:
            return min(self._batches_of(rank) for rank in range(self.world_size))
        return self._batches_of(self.rank)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        epoch = self.epoch
        left = len(self)
        if left == 0:
            raise UsageError(
                f"{self.path}: too few samples ({self.sample_count}) for one batch of {self.batch_size} on each of "
                f"{self.world_size} x {max(1, self.num_workers)} readers; lower the batch size or the number of workers"
            )
        with _interrupts_held():
            batches = iter(DataLoader(_Batches(self, epoch), batch_size=None, num_workers=self.num_workers))
        try:
            for batch in batches:
                if isinstance(batch, ZpipeError):
                    raise batch
                if left == 0:
                    return
                left -= 1
                yield batch
        finally:
            with _interrupts_held():
                del batches
        if left:
            raise ZpipeError(
                f"{self.path}: the epoch ended {left} batches early; run the same command with --num-workers 0 to see why"
            )

    def _mine(self, rank: int, worker: int) -> np.ndarray:
        order = shard_order(len(self.shards), self.seed, self.epoch, shuffle=self.train)
        return split_shards(order, rank=rank, world_size=self.world_size, worker=worker, num_workers=self.num_workers)

    def _batches_of(self, rank: int) -> int:
        total = 0
        for worker in range(max(1, self.num_workers)):
            samples = sum(self._counts[self.shards[i].entry.stem] for i in self._mine(rank, worker))
            total += samples // self.batch_size if self.train else -(-samples // self.batch_size)
        return total


@contextmanager
def _interrupts_held() -> Iterator[None]:
    """Delivers Ctrl-C after the block that starts or ends processes.

    Inside a fork's hooks or a finaliser Python prints a KeyboardInterrupt and drops it. Processes started in the block
    inherit the deafness: a terminal sends Ctrl-C to all of them, and it is for the parent to end them.
    """
    if threading.current_thread() is not threading.main_thread():
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


class _Batches(torch.utils.data.IterableDataset):
    """One epoch as WebDataset's pipeline sees it: each worker reads its own shards and makes its own batches."""

    def __init__(self, loader: RelevanceLoader, epoch: int) -> None:
        self.loader = loader
        self.epoch = epoch

    def __iter__(self) -> Iterator[dict[str, Any] | ZpipeError]:
        # An exception that crosses worker processes arrives wrapped in a traceback; an object arrives as it is.
        try:
            yield from self._pipeline()
        except ZpipeError as error:
            yield error

    def _pipeline(self) -> Iterable[dict[str, Any]]:
        loader = self.loader
        info = get_worker_info()
        worker = info.id if info else 0
        mine = [loader.shards[i] for i in loader._mine(loader.rank, worker)]
        lane = [loader.seed, self.epoch, loader.rank, worker]
        stages: list[Any] = [partial(iter, mine), _read_all]
        if loader.maps is not None:
            stages.append(join_maps(loader.maps, loader.missing))
        if loader.train:
            shuffler = random.Random(int(np.random.SeedSequence(lane).generate_state(1)[0]))
            stages.append(wds.shuffle(SHUFFLE_BUFFER, initial=SHUFFLE_BUFFER, rng=shuffler))
        stages.append(_viewer(loader, np.random.default_rng([*lane, 1])))
        stages.append(_batcher(loader.batch_size, keep_partial=not loader.train))
        return iter(wds.DataPipeline(*stages)) if mine else iter(())


def _read_all(shards: Iterable[Shard]) -> Iterator[dict]:
    for shard in shards:
        yield from read_tar(shard)


def _viewer(loader: RelevanceLoader, rng: np.random.Generator):
    """A stage: decode, draw one view, apply it to image, map and box."""

    def stage(samples: Iterable[dict]) -> Iterator[dict]:
        for item in samples:
            sample = item["sample"]
            where = f"{item['shard'].path}: key {sample.key}"
            if sample.label is None:
                raise ZpipeError(f"{where}: has no label (.cls, or label in .json); add one")
            try:
                image = decode(sample.image)
            except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
                raise ZpipeError(
                    f"{where}: can't be decoded ({error}); make the shards again, which puts it aside"
                ) from error
            view = draw_view(rng, *image.size, loader.view)
            out = {
                "image": view_image(image, view, loader.image_size),
                "label": sample.label,
                "box": np.asarray(view.box.as_tuple(), np.float32),
                "flipped": view.flipped,
                "key": sample.key,
            }
            if "relevance" in item:
                out["relevance"] = view_map(item["relevance"], view, *image.size)
            if "box" in sample.meta:
                out["object_box"] = np.asarray(view_box(sample.meta["box"], view), np.float32)
            yield out

    return stage


def _batcher(batch_size: int, *, keep_partial: bool):
    """A stage: lists of samples into one dictionary of stacked tensors."""

    def stage(samples: Iterable[dict]) -> Iterator[dict[str, Any]]:
        batch: list[dict] = []
        for item in samples:
            batch.append(item)
            if len(batch) == batch_size:
                yield _stack(batch)
                batch = []
        if batch and keep_partial:
            yield _stack(batch)

    return stage


def _stack(batch: list[dict]) -> dict[str, Any]:
    out: dict[str, Any] = {
        "image": torch.from_numpy(np.stack([item["image"] for item in batch])),  # [B, 3, S, S]
        "label": torch.tensor([item["label"] for item in batch]),  # [B]
        "box": torch.from_numpy(np.stack([item["box"] for item in batch])),  # [B, 4]
        "flipped": torch.tensor([item["flipped"] for item in batch]),  # [B]
        "key": [item["key"] for item in batch],
    }
    for name in ("relevance", "object_box"):
        if all(name in item for item in batch):
            out[name] = torch.from_numpy(np.stack([item[name] for item in batch]))
    return out
