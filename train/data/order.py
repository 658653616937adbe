"""Which sample comes when: pure functions of counts, seed and epoch. No file is touched.

An epoch permutes the shards and deals them to ranks. A rank reads its shards in `lanes`, side by side: each lane goes
through its shards one after the other, each shard's samples shuffled, and samples are taken from the lanes in turn. Batches are
consecutive samples of that sequence, so which samples a batch holds depends on (seed, epoch, rank, world size, batch size,
lanes), not on how many processes work at it; an epoch can be entered at any batch. A lane belongs to one worker, which is the only
one that reads its shards.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

LEAST_LANES = 8  # shards that a batch is mixed from, at least


@dataclass(frozen=True)
class Plan:
    """One rank's epoch, sample by sample: shard (position in the data set's list), row in that shard, lane. int64 [n] each."""

    shard: np.ndarray
    row: np.ndarray
    lane: np.ndarray

    def __len__(self) -> int:
        return len(self.shard)


def lane_count(num_workers: int, *, train: bool) -> int:
    """Lanes for that many workers: the least number from 8 on that they share evenly, which is 8 for 0, 1, 2, 4 and 8 workers.

    Evaluation shuffles nothing and takes a lane a worker, so that one process reads in the order of the shards.
    """
    workers = max(1, num_workers)
    return -(-LEAST_LANES // workers) * workers if train else workers


def shards_of_rank(count: int, seed: int, epoch: int, *, rank: int, world_size: int, shuffle: bool) -> np.ndarray:
    """The shards that one rank reads in an epoch, in order; every shard goes to exactly one rank."""
    order = np.random.default_rng([seed, epoch]).permutation(count) if shuffle else np.arange(count)
    return order[rank::world_size]


def plan_epoch(
    shards: Sequence[int], rows: Sequence[np.ndarray], lanes: int, *, seed: int, epoch: int, shuffle: bool
) -> Plan:
    """The sequence of one rank's samples.

    shards: its shards in order; rows: for each of them, the rows that take part. 24 bytes a sample, 30 MB for ImageNet on
    one rank.
    """
    parts: list[tuple[np.ndarray, ...]] = []
    for lane in range(min(lanes, len(shards))):
        chosen, own_rows = shards[lane::lanes], rows[lane::lanes]
        if shuffle:
            own_rows = [
                np.random.default_rng([seed, epoch, int(shard)]).permutation(own)
                for shard, own in zip(chosen, own_rows, strict=True)
            ]
        row = np.concatenate([np.zeros(0, np.int64), *own_rows])
        shard = np.repeat(np.asarray(chosen, np.int64), [len(own) for own in own_rows])
        parts.append((shard, row, np.full(len(row), lane), np.arange(len(row))))
    if not parts:
        empty = np.zeros(0, np.int64)
        return Plan(empty, empty, empty)
    shard, row, lane, turn = (np.concatenate(columns) for columns in zip(*parts, strict=True))
    order = np.lexsort((lane, turn))  # in turn; a lane that has ended is passed over
    return Plan(shard[order], row[order].astype(np.int64), lane[order])
