"""Joins samples with their tensors from stores. A shard is read once, and dropped after use."""

from __future__ import annotations

import errno
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, NamedTuple, Self

import numpy as np

from zpipe.schemas.errors import ZpipeError
from zpipe.schemas.geometry import Box
from zpipe.schemas.relevance_store import UNDECODABLE
from zpipe.schemas.sample import Sample
from zpipe.train.data.damage import SKIP, Damage, DamagedSample
from zpipe.train.data.map_stores import HeldTensors, MapSource
from zpipe.train.data.order import Plan
from zpipe.train.data.stream import Shard, read_tar

Missing = Literal["error", "skip", "uniform"]
Damaged = Literal["error", "skip"]
# Of this process, not of a tar: skipping would leave sound tars out.
OWN_ERRORS = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)


class JoinedTensor(NamedTuple):
    """What a store has for a sample."""

    values: np.ndarray
    """float32, or int32 for a label map; see `map_stores.Found`."""
    frame: Box | None
    """What it covers, in source pixels; None for the whole image."""


@dataclass(frozen=True)
class Joined:
    """A sample with its place and what the stores have for it."""

    shard: Shard
    shard_number: int
    """Position of the shard in the list of the data set."""
    row: int
    """Position of the sample in the shard."""
    sample: Sample
    tensors: dict[str, JoinedTensor]
    """Its tensors, by the names of the stores."""


@dataclass
class _Held:
    """A shard in memory."""

    samples: list[Sample | None]  # None after their last use
    tensors: dict[str, HeldTensors]  # by the names of the stores


class ShardJoin:
    """Hands out the samples of a plan; reads the next shard of a lane in the background."""

    def __init__(
        self,
        shards: Sequence[Shard],
        stores: Mapping[str, MapSource],
        missing: Missing,
        *,
        skip_damaged: bool,
        check: bool = True,
    ) -> None:
        self._check = check
        self._shards, self._stores, self._missing, self._skip_damaged = shards, stores, missing, skip_damaged
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
        tensors = {name: self._tensor(name, held, shard, row, sample.key) for name in self._stores}
        return Joined(shard, shard_number, row, sample, tensors)

    def _tensor(self, name: str, held: _Held, shard: Shard, row: int, key: str) -> JoinedTensor:
        maps = self._stores[name].maps
        status, values, frame = held.tensors[name].find(row, key)
        if values is not None:
            return JoinedTensor(values, frame)
        if self._missing != "uniform":
            kind = DamagedSample if status == UNDECODABLE else ZpipeError
            raise kind(
                f"{maps.path}: shard {shard.entry.stem}: key {key}: no usable map ({status}); give --missing skip"
            )
        return JoinedTensor(np.ones(maps.manifest.provenance.sample_shape, np.float32), None)

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
        return _Held(samples, {name: store.read(shard_number) for name, store in self._stores.items()})
