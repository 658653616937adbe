"""Which sample comes when: pure functions of counts, seed and epoch. No file is touched.

An epoch of training permutes the shards and reads them in `lanes`, side by side: each lane goes through its shards one
after the other, each shard's samples shuffled, and samples are taken from the lanes in turn. Batches are consecutive
samples of that sequence, so which samples a batch holds depends on (seed, epoch, batch size, repeats, lanes), not on how
many ranks and processes work at it; an epoch can be entered at any batch.

A batch is that of all ranks together. A lane belongs to one rank and to one of its workers, which alone read its shards,
as long as that gives every rank its equal part of the batch. Where it doesn't, because lanes have ended or there are fewer
than ranks, the ranks that have too little take from the others' lanes and read these shards too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Self

import numpy as np

LEAST_LANES = 8  # shards that a batch is mixed from, at least
DEALT_AT_ONCE = 1 << 20  # samples whose ranks are counted in one piece: bounds what counting needs beside the plan


@dataclass(frozen=True)
class Plan:
    """An epoch, sample by sample: shard (position in the data set's list), row in that shard, lane, and which of its
    repeats this is, from 0. int32 [n] each, `copy` int16: every worker of every rank holds the plan of all of them.
    """

    shard: np.ndarray
    row: np.ndarray
    lane: np.ndarray
    copy: np.ndarray

    def __len__(self) -> int:
        return len(self.shard)

    def __getitem__(self, places: np.ndarray | slice) -> Self:
        """The samples at these places."""
        return replace(self, **{field.name: getattr(self, field.name)[places] for field in fields(self)})


def lane_count(num_workers: int, *, train: bool) -> int:
    """Lanes for that many workers: the least number from 8 on that they share evenly, which is 8 for 0, 1, 2, 4 and 8 workers.

    Training counts the workers of all ranks. Evaluation shuffles nothing and takes a lane a worker, so that one process
    reads in the order of the shards.
    """
    workers = max(1, num_workers)
    return -(-LEAST_LANES // workers) * workers if train else workers


def shard_order(count: int, seed: int, epoch: int, *, shuffle: bool) -> np.ndarray:
    """The shards in the order in which an epoch begins them. int64 [count]"""
    return np.random.default_rng([seed, epoch]).permutation(count) if shuffle else np.arange(count)


def plan_epoch(
    shards: Sequence[int], rows: Sequence[np.ndarray], lanes: int, *, seed: int, epoch: int, shuffle: bool
) -> Plan:
    """The sequence of samples, each once.

    shards: in order; rows: for each of them, the rows that take part. 14 bytes a sample, 18 MB for ImageNet.
    """
    lanes = min(lanes, len(shards))
    counts = np.array([sum(len(own) for own in rows[lane::lanes]) for lane in range(lanes)], np.int64)
    even, total = int(counts.min()) if lanes else 0, int(counts.sum())
    columns = [np.empty(total, np.int32) for _ in range(3)]
    tails: list[tuple[np.ndarray, ...]] = []
    for lane in range(lanes):
        chosen, own_rows = shards[lane::lanes], rows[lane::lanes]
        if shuffle:
            own_rows = [
                np.random.default_rng([seed, epoch, int(shard)]).permutation(own)
                for shard, own in zip(chosen, own_rows, strict=True)
            ]
        row = np.concatenate([np.zeros(0, np.int32), *own_rows]).astype(np.int32)
        shard = np.repeat(np.asarray(chosen, np.int32), [len(own) for own in own_rows])
        # Until the first lane ends, each has every so-manieth place; sorting is for what is behind that.
        for column, values in zip(columns, (shard, row, lane), strict=True):
            column[lane : even * lanes : lanes] = values if values is lane else values[:even]
        turn = np.arange(even, len(row), dtype=np.int32)
        tails.append((shard[even:].copy(), row[even:].copy(), np.full(len(turn), lane, np.int32), turn))
    if tails:
        *values, turn = (np.concatenate(parts) for parts in zip(*tails, strict=True))
        order = np.argsort(turn, kind="stable")  # in turn; a lane that has ended is passed over
        for column, tail in zip(columns, values, strict=True):
            column[even * lanes :] = tail[order]
    return Plan(*columns, np.zeros(total, np.int16))


def fresh_per_batch(batch_size: int, repeats: int) -> int:
    """Different samples in a batch when each of them comes `repeats` times."""
    least = -(-batch_size // repeats)
    if repeats == 1 or least < LEAST_LANES**2:
        return least
    # Some come once less, so that every lane gives equally many to each batch, and ranks needn't share shards.
    return -(-least // LEAST_LANES) * LEAST_LANES


def whole_batches(plan: Plan, batch_size: int, repeats: int) -> Plan:
    """The samples of an epoch's full batches, [batches * batch_size]; what is left over is dropped.

    With `repeats` a batch holds `fresh_per_batch` samples, one after the other, then all of them again, and so on until it
    is full. There are as many batches as without, so an epoch sees a part of the samples only: another part every time.
    """
    batches = len(plan) // batch_size
    if repeats == 1:
        return plan[: batches * batch_size]
    place = np.arange(batch_size)
    fresh = fresh_per_batch(batch_size, repeats)
    taken = plan[(np.arange(batches)[:, None] * fresh + place % fresh).ravel()]
    return replace(taken, copy=np.tile((place // fresh).astype(np.int16), batches))


def deal(plan: Plan, batch_size: int, world_size: int) -> np.ndarray:
    """The rank that takes each sample of the full batches in `plan`: `batch_size / world_size` of every batch. int32 [n]

    A sample goes to the rank of its lane. Those beyond a rank's part, always of its last lanes, go to ranks with room.
    """
    rank = plan.lane % world_size
    if world_size == 1:
        return rank
    part, batches = batch_size // world_size, len(plan) // batch_size
    held = np.zeros((batches, world_size), np.int32)
    some = max(1, DEALT_AT_ONCE // batch_size)
    for first in range(0, batches, some):
        dealt = rank[first * batch_size : (first + some) * batch_size].reshape(-1, batch_size)
        own = np.arange(len(dealt))[:, None] * world_size
        held[first : first + some] = np.bincount((own + dealt).ravel(), minlength=len(dealt) * world_size).reshape(
            -1, world_size
        )
    mixed = np.flatnonzero((held != part).any(axis=1))
    if not len(mixed):
        return rank
    held = held[mixed]
    places = (mixed[:, None] * batch_size + np.arange(batch_size)).ravel()
    batch, dealt = np.repeat(np.arange(len(mixed)), batch_size), rank[places]
    order = np.lexsort((places, plan.lane[places], dealt, batch))
    group = batch[order] * world_size + dealt[order]  # ascending
    starts = np.flatnonzero(np.diff(group, prepend=-1))
    place = np.arange(len(order)) - np.repeat(starts, np.diff(starts, append=len(order)))  # within (batch, rank)
    excess = places[order[place >= part]]
    room = np.maximum(part - held, 0)  # [batches, ranks]; in every batch it adds up to the excess
    rank[excess] = np.repeat(np.tile(np.arange(world_size), len(held)), room.ravel())
    return rank


def last_uses(plan: Plan) -> np.ndarray:
    """Which samples of the plan don't come again in it. bool [n]"""
    if not plan.copy.any():
        return np.ones(len(plan), bool)
    order = np.lexsort((plan.row, plan.shard))  # stable: of equal samples the one that comes last is behind the others
    shard, row = plan.shard[order], plan.row[order]
    last = np.ones(len(plan), bool)
    last[order[:-1]] = (shard[1:] != shard[:-1]) | (row[1:] != row[:-1])
    return last
