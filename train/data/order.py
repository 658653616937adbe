"""The order of samples: pure functions of counts, seed and epoch, without file access.

A training epoch permutes the shards and reads them in `lanes`, side by side: each lane goes through its shards one
after the other, the samples of each shard shuffled, and samples are taken from the lanes in turn. Batches are
consecutive samples of that sequence, so the samples of a batch depend on (seed, epoch, batch size, repeats, lanes), not
on the number of ranks and processes, and an epoch can be entered at any batch.

A batch is that of all ranks together. A lane belongs to one worker of one rank, which alone reads its shards, as long
as every rank then gets an equal part of the batch. Otherwise, because lanes have ended or there are fewer lanes than
ranks, the ranks with too few samples take some from the lanes of others, and read these shards too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import numpy as np

MIN_LANES = 8  # a batch is mixed from at least that many shards
DEAL_CHUNK = 1 << 20  # samples that `deal` counts at once, which bounds its memory beside the plan


@dataclass(frozen=True)
class Plan:
    """The samples of an epoch, in order. The types are small, because every worker holds the plan of all ranks."""

    shard: np.ndarray
    """Position of the shard in the list of the data set. int32 [n]"""
    row: np.ndarray
    """Position of the sample in its shard. int32 [n]"""
    lane: np.ndarray
    """The lane that the sample is taken from. int32 [n]"""
    copy: np.ndarray
    """Which of the repeats of its sample this is, from 0. int16 [n]"""

    def __len__(self) -> int:
        return len(self.shard)

    def __getitem__(self, places: np.ndarray | slice) -> Self:
        """The samples at these places."""
        return type(self)(self.shard[places], self.row[places], self.lane[places], self.copy[places])


def lane_count(num_workers: int, *, train: bool) -> int:
    """The number of lanes: the smallest multiple of the number of workers that is at least 8 (`MIN_LANES`).

    Training counts the workers of all ranks. Evaluation does not shuffle and has one lane per worker, so that a single
    process reads in the order of the shards.
    """
    workers = max(1, num_workers)
    return -(-MIN_LANES // workers) * workers if train else workers


def shard_order(count: int, seed: int, epoch: int, *, shuffle: bool) -> np.ndarray:
    """The order in which an epoch starts to read the shards, int64 [count]."""
    return np.random.default_rng([seed, epoch]).permutation(count) if shuffle else np.arange(count)


def plan_epoch(
    shards: Sequence[int], rows: Sequence[np.ndarray], lanes: int, *, seed: int, epoch: int, shuffle: bool
) -> Plan:
    """The sequence of all samples, each once. It takes 14 bytes per sample, 18 MB for ImageNet.

    Args:
        shards: The shards in the order in which they are read.
        rows: The rows of each of these shards that take part.
        lanes: Number of lanes; no more than shards are used.
        seed: Seed of the loader.
        epoch: Number of the epoch.
        shuffle: Whether to shuffle the samples of each shard.
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
        # Until the first lane ends, lane i fills every n-th position; only the tail needs sorting.
        positions = slice(lane, even * lanes, lanes)
        columns[0][positions], columns[1][positions], columns[2][positions] = shard[:even], row[:even], lane
        turn = np.arange(even, len(row), dtype=np.int32)
        tails.append((shard[even:].copy(), row[even:].copy(), np.full(len(turn), lane, np.int32), turn))
    if tails:
        *values, turn = (np.concatenate(parts) for parts in zip(*tails, strict=True))
        order = np.argsort(turn, kind="stable")  # in turn; lanes that have ended are skipped
        for column, tail in zip(columns, values, strict=True):
            column[even * lanes :] = tail[order]
    return Plan(columns[0], columns[1], columns[2], np.zeros(total, np.int16))


def fresh_per_batch(batch_size: int, repeats: int) -> int:
    """The number of different samples in a batch that holds each of them `repeats` times."""
    minimum = -(-batch_size // repeats)
    if repeats == 1 or minimum < MIN_LANES**2:
        return minimum
    # Some samples come once less, so that every lane gives equally many to each batch, and ranks needn't share shards.
    return -(-minimum // MIN_LANES) * MIN_LANES


def whole_batches(plan: Plan, batch_size: int, repeats: int) -> Plan:
    """The samples of an epoch's full batches, [batches * batch_size]; the rest is dropped.

    With `repeats` a batch holds `fresh_per_batch` samples, one after the other, then all of them again, and so on until
    it is full. There are as many batches as without repeats, so an epoch sees only a part of the samples, another one
    each time.
    """
    batches = len(plan) // batch_size
    if repeats == 1:
        return plan[: batches * batch_size]
    place = np.arange(batch_size)
    fresh = fresh_per_batch(batch_size, repeats)
    taken = plan[(np.arange(batches)[:, None] * fresh + place % fresh).ravel()]
    return replace(taken, copy=np.tile((place // fresh).astype(np.int16), batches))


def deal(plan: Plan, batch_size: int, world_size: int) -> np.ndarray:
    """The rank that takes each sample of the full batches in `plan`, `batch_size / world_size` of each; int32 [n].

    A sample goes to the rank of its lane. Samples beyond a rank's part, always of its last lanes, go to ranks with
    room.
    """
    rank = plan.lane % world_size
    if world_size == 1:
        return rank
    part, batches = batch_size // world_size, len(plan) // batch_size
    held = np.zeros((batches, world_size), np.int32)
    chunk = max(1, DEAL_CHUNK // batch_size)  # batches
    for first in range(0, batches, chunk):
        dealt = rank[first * batch_size : (first + chunk) * batch_size].reshape(-1, batch_size)
        own = np.arange(len(dealt))[:, None] * world_size
        held[first : first + chunk] = np.bincount((own + dealt).ravel(), minlength=len(dealt) * world_size).reshape(
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
    """Whether each sample of the plan is the last use of that sample, bool [n]."""
    if not plan.copy.any():
        return np.ones(len(plan), bool)
    order = np.lexsort((plan.row, plan.shard))  # stable: the last use of a sample comes after its others
    shard, row = plan.shard[order], plan.row[order]
    last = np.ones(len(plan), bool)
    last[order[:-1]] = (shard[1:] != shard[:-1]) | (row[1:] != row[:-1])
    return last
