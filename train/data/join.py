"""Joins samples with their relevance maps by key. A shard and its maps are read once, and dropped after use."""

from __future__ import annotations

import errno
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, Self

import numpy as np

from zpipe.schemas.errors import ZpipeError
from zpipe.schemas.geometry import Box
from zpipe.schemas.relevance_maps import RelevanceMaps
from zpipe.schemas.relevance_store import OK, UNDECODABLE
from zpipe.schemas.sample import Sample
from zpipe.schemas.storage import map_files
from zpipe.train.data.damage import SKIP, Damage, DamagedSample
from zpipe.train.data.order import Plan
from zpipe.train.data.stream import Shard, read_tar
from zpipe.train.data.transforms import ViewConfig

Missing = Literal["error", "skip", "uniform"]
Damaged = Literal["error", "skip"]
# Of this process, not of a tar: skipping would leave sound tars out.
OWN_ERRORS = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)
FRAME_COLUMNS = ("frame_x1", "frame_y1", "frame_x2", "frame_y2")


def check_store(maps: RelevanceMaps, shards: list[Shard], view: ViewConfig) -> None:
    """Check that a store has the maps of these shards, on a frame that covers the views.

    Raises:
        ZpipeError: If the frame of the store can't serve the views, or the store was made from other tars.
    """
    origin = maps.manifest.provenance
    if origin.frame == "center" and view.augment == "eval" and view.crop_pct > origin.crop_pct + 1e-6:
        raise ZpipeError(
            f"{maps.path}: maps on the centre {origin.crop_pct:g} of the shorter side can't serve views of "
            f"{view.crop_pct:g}; lower view.crop_pct, or extract on the full frame"
        )
    if origin.frame != "full" and not (origin.frame == "center" and view.augment == "eval"):
        raise ZpipeError(
            f"{maps.path}: maps on frame {origin.frame!r} can't serve random crops; extract on the full frame"
        )
    known = {shard.stem: shard for shard in maps.manifest.shards}
    for shard in shards:
        stored = known.get(shard.entry.stem)
        if stored is None:
            raise ZpipeError(
                f"{maps.path}: has no maps for {shard.path}; extract from these shards, or give the right store"
            )
        # The digest of a tar without an index is unknown; its keys are compared when it is read.
        if shard.entry.sha256 and stored.input_sha256 != shard.entry.sha256:
            raise ZpipeError(
                f"{maps.path}: made from a {shard.path.name} with SHA-256 {stored.input_sha256[:12]}, {shard.path} has "
                f"{shard.entry.sha256[:12]}; extract again"
            )
        if stored.count != shard.entry.count:
            raise ZpipeError(
                f"{maps.path}: made from a {shard.path.name} of {stored.count} samples, {shard.path} has "
                f"{shard.entry.count}; extract again"
            )


def usable_rows(maps: RelevanceMaps, shards: list[Shard]) -> list[np.ndarray]:
    """The rows of each shard whose sample has a usable map, int32. Reads one column of each shard's index."""
    tables = map_files(maps.path, lambda shard: maps.index(shard.entry.stem, ["status"]), shards)
    usable = (table["status"].to_numpy(zero_copy_only=False) == OK for table in tables)
    return [np.flatnonzero(rows).astype(np.int32) for rows in usable]


@dataclass(frozen=True)
class Joined:
    """A sample with its place and, if there is a store, its map."""

    shard: Shard
    shard_number: int
    """Position of the shard in the list of the data set."""
    row: int
    """Position of the sample in the shard."""
    sample: Sample
    relevance: np.ndarray | None
    """float32 [gh, gw] in [0, 1], min-max normalised before any crop, so that a crop of background stays low."""
    frame: Box | None
    """What the map covers, in source pixels; None for the whole image."""


@dataclass
class _Held:
    """A shard in memory."""

    samples: list[Sample | None]  # None after their last use
    maps: np.ndarray | None  # [n, gh, gw], in the order of the index
    statuses: list[str]
    row_of: dict[str, int]
    frames: np.ndarray | None  # [n, 4]


class ShardJoin:
    """Hands out the samples of a plan; reads the next shard of a lane in the background."""

    def __init__(
        self,
        shards: Sequence[Shard],
        maps: RelevanceMaps | None,
        missing: Missing,
        *,
        skip_damaged: bool,
        check: bool = True,
    ) -> None:
        self._check = check
        self._shards, self._maps, self._missing, self._skip_damaged = shards, maps, missing, skip_damaged
        self._held: dict[int, _Held | None] = {}
        self._prefetched: dict[int, Future[_Held | None]] = {}
        self._left: dict[int, int] = {}  # shard -> how many of its samples are still to be taken
        self._prefetch_at: dict[int, tuple[int, int]] = {}  # shard -> (samples left at which to prefetch, next shard)
        self._damaged: list[Damage] = []
        self._pool = ThreadPoolExecutor(max_workers=1)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    def expect(self, plan: Plan) -> None:
        """Announce all samples that will be taken, in order, to know when a shard is used up and which is next."""
        shards, first, counts = np.unique(plan.shard, return_index=True, return_counts=True)
        self._left = dict(zip(shards.tolist(), counts.tolist(), strict=True))
        lane_of = dict(zip(shards.tolist(), plan.lane[first].tolist(), strict=True))
        lanes: dict[int, list[int]] = {}
        for shard in shards[np.argsort(first)].tolist():
            lanes.setdefault(lane_of[shard], []).append(shard)
        for lane in lanes.values():
            for shard, following in pairwise(lane):
                self._prefetch_at[shard] = (self._left[shard] // 2, following)

    def take(self, shard_number: int, row: int, *, last: bool = True) -> Joined | None:
        """Take one sample.

        Args:
            shard_number: Position of the shard in the list.
            row: Position of the sample in the shard.
            last: Whether this is the sample's last use, after which it is freed.

        Returns:
            The sample, or None if its tar is damaged and damaged data is skipped.

        Raises:
            DamagedSample: If the sample has no map because it could not be decoded.
            ZpipeError: If a tar or the store is damaged, or the sample has no usable map and must have one.
        """
        if shard_number not in self._held:
            prefetched = self._prefetched.pop(shard_number, None)
            self._held[shard_number] = prefetched.result() if prefetched else self._read(shard_number)
        held = self._held[shard_number]
        self._left[shard_number] -= 1
        prefetch_at, following = self._prefetch_at.get(shard_number, (-1, -1))
        if self._left[shard_number] == prefetch_at:
            self._prefetched[following] = self._pool.submit(self._read, following)
        if self._left[shard_number] == 0:
            del self._held[shard_number]
        return None if held is None else self._joined(shard_number, row, held, last)

    def leave_out(self, shard_number: int, row: int, error: DamagedSample) -> None:
        """Record a damaged sample, if damaged data is skipped.

        Raises:
            DamagedSample: If it is not.
        """
        if not self._skip_damaged:
            raise DamagedSample(f"{error}, or {SKIP}") from error
        self._damaged.append(Damage(shard_number, row, str(error)))

    def pop_damaged(self) -> list[Damage]:
        """What was left out since the last call."""
        damaged, self._damaged = self._damaged, []
        return damaged

    def _joined(self, shard_number: int, row: int, held: _Held, last: bool) -> Joined:
        shard, sample = self._shards[shard_number], held.samples[row]
        assert sample is not None  # freed after its last use only
        if last:
            held.samples[row] = None
        if self._maps is None or held.maps is None:
            return Joined(shard, shard_number, row, sample, None, None)
        place = held.row_of.get(sample.key)
        status = "absent" if place is None else held.statuses[place]
        if status != OK or place is None:
            if self._missing != "uniform":
                kind = DamagedSample if status == UNDECODABLE else ZpipeError
                raise kind(
                    f"{self._maps.path}: shard {shard.entry.stem}: key {sample.key}: no usable map ({status}); "
                    "give --missing skip"
                )
            ones = np.ones(self._maps.manifest.provenance.grid, np.float32)
            return Joined(shard, shard_number, row, sample, ones, None)
        frame = None if held.frames is None else Box(*(float(edge) for edge in held.frames[place]))
        return Joined(shard, shard_number, row, sample, held.maps[place], frame)

    def _read(self, shard_number: int) -> _Held | None:
        shard = self._shards[shard_number]
        try:
            samples: list[Sample | None] = list(read_tar(shard, check=self._check))
        except ZpipeError as error:
            if getattr(error.__cause__, "errno", None) in OWN_ERRORS:
                raise
            if not self._skip_damaged:
                raise ZpipeError(f"{error}, or {SKIP}") from error
            self._damaged.append(Damage(shard_number, None, str(error)))
            return None
        if self._maps is None:
            return _Held(samples, None, [], {}, None)
        centre = self._maps.manifest.provenance.frame != "full"
        table = self._maps.index(shard.entry.stem, ["key", "status", "scale", *(FRAME_COLUMNS if centre else ())])
        row_of = {key: row for row, key in enumerate(table["key"].to_pylist())}
        frames = np.stack([table[name].to_numpy() for name in FRAME_COLUMNS], axis=1) if centre else None
        return _Held(
            samples, self._maps.read_shard(shard.entry.stem, table), table["status"].to_pylist(), row_of, frames
        )
