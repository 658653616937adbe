"""Tar shards as a stream of samples: plain `Iterator -> Iterator` stages over dictionaries, for WebDataset's pipeline.

A sample dictionary gains fields as it passes: `tar` and `sample` here, `relevance` in `join`, pixels in `loader`.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from webdataset.tariterators import tar_file_iterator

from zpipe.schemas.errors import UsageError, ZpipeError
from zpipe.schemas.sample import group_samples
from zpipe.schemas.shard_index import (
    INDEX_NAME,
    ShardEntry,
    ShardIndex,
    check_listed,
    digest_keys,
    find_shards,
    read_index,
)
from zpipe.schemas.storage import as_path, storage_errors


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One tar of a data set and what its index says of it."""

    path: Path
    entry: ShardEntry


def list_shards(path: Path) -> tuple[list[Shard], ShardIndex]:
    """The tars under `path` with their index.

    Errors: :class:`UsageError` when there are none or they have no `shards.json`; :class:`ZpipeError` when folder and
    index disagree.
    """
    path = as_path(path)
    folder, tars = find_shards(path)
    if not (folder / INDEX_NAME).is_file():
        raise UsageError(
            f"{folder}: tar shards without {INDEX_NAME}; run `zpipe make-shards --index-only {folder}` once"
        )
    index = read_index(folder)
    entries = check_listed(folder, tars, index, whole_folder=path.is_dir())
    return [Shard(path=tar, entry=entry) for tar, entry in zip(tars, entries, strict=True)], index


def shard_order(count: int, seed: int, epoch: int, *, shuffle: bool) -> np.ndarray:
    """Order of the shards in an epoch: a function of seed and epoch only, the same on every rank."""
    if not shuffle:
        return np.arange(count)
    return np.random.default_rng([seed, epoch]).permutation(count)


def split_shards(order: np.ndarray, *, rank: int, world_size: int, worker: int, num_workers: int) -> np.ndarray:
    """The part of `order` that one worker of one rank reads: every shard goes to exactly one."""
    lanes = max(1, num_workers)
    return order[rank * lanes + worker :: world_size * lanes]


def read_tar(shard: Shard) -> Iterator[dict]:
    """The samples of one tar, in order. No member touches the disk; suffixes are those `zpipe.schemas.sample` allows.

    Errors: :class:`ZpipeError` naming the tar when it is truncated, or holds other keys than its index says.
    """
    keys: list[str] = []
    for sample in group_samples(_members(shard.path), str(shard.path)):
        keys.append(sample.key)
        yield {"shard": shard, "sample": sample}
    if len(keys) != shard.entry.count or digest_keys(keys) != shard.entry.keys_sha256:
        raise ZpipeError(
            f"{shard.path}: {len(keys)} samples, {INDEX_NAME} says {shard.entry.count}: truncated or altered; "
            "restore it or make the shards again"
        )


def _members(path: Path) -> Iterator[tuple[str, bytes]]:
    try:
        with as_path(path).open("rb") as file:
            for member in tar_file_iterator(file):
                yield member["fname"], member["data"]
    except (tarfile.TarError, EOFError) as error:
        raise ZpipeError(f"{path}: not a whole tar ({error}); restore it or make the shards again") from error
    except storage_errors() as error:
        told = getattr(error, "strerror", None) or error
        raise ZpipeError(f"{path}: can't be read ({told}); restore it or make the shards again") from error
