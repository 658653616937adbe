"""Attach each sample's relevance map, by key. A shard's maps are read once, in one piece, and dropped after it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Literal

import numpy as np

from zpipe.schemas.errors import ZpipeError
from zpipe.schemas.relevance_maps import RelevanceMaps
from zpipe.schemas.relevance_store import OK
from zpipe.train.data.stream import Shard

Missing = Literal["error", "skip", "uniform"]
MISSING_POLICIES: tuple[Missing, ...] = ("error", "skip", "uniform")


def check_store(maps: RelevanceMaps, shards: list[Shard]) -> None:
    """Errors: :class:`ZpipeError` when the store's frame can't serve arbitrary crops, or it was made from other tars."""
    frame = maps.manifest.provenance.frame
    if frame != "full":
        raise ZpipeError(f"{maps.path}: maps on frame {frame!r} can't serve random crops; extract on the full frame")
    known = {shard.stem: shard for shard in maps.manifest.shards}
    for shard in shards:
        found = known.get(shard.entry.stem)
        if found is None:
            raise ZpipeError(
                f"{maps.path}: has no maps for {shard.path}; extract from these shards, or give the right store"
            )
        if found.input_sha256 != shard.entry.sha256:
            raise ZpipeError(
                f"{maps.path}: made from a {shard.path.name} with SHA-256 {found.input_sha256[:12]}, {shard.path} has "
                f"{shard.entry.sha256[:12]}; extract again"
            )


def join_maps(maps: RelevanceMaps, missing: Missing) -> Callable[[Iterable[dict]], Iterator[dict]]:
    """A stage that adds `relevance`, float32 [gh, gw] in [0, 1] over the whole image, to every sample.

    The min-max of a map is taken over the whole image, before any crop: a crop of background stays low.
    missing: what a sample without a usable map does: `error` stops and names it, `skip` leaves the sample out,
    `uniform` gives it a map of ones.
    """
    ones = np.ones(maps.manifest.provenance.grid, np.float32)

    def stage(samples: Iterable[dict]) -> Iterator[dict]:
        stem, by_key = None, {}
        for item in samples:
            if item["shard"].entry.stem != stem:
                stem = item["shard"].entry.stem
                by_key = _maps_by_key(maps, stem)
            key = item["sample"].key
            status, relevance = by_key.get(key, ("absent", None))
            if status != OK:
                if missing == "skip":
                    continue
                if missing == "error":
                    raise ZpipeError(
                        f"{Path(maps.path)}: shard {stem}: key {key}: no usable map ({status}); train with --missing skip"
                    )
                relevance = ones
            yield item | {"relevance": relevance}

    return stage


def usable_counts(maps: RelevanceMaps, shards: list[Shard]) -> dict[str, int]:
    """How many samples of each shard (by stem) have a usable map. Reads one index column a shard."""
    counts = {}
    for shard in shards:
        statuses = maps.index(shard.entry.stem, ["status"])["status"].to_pylist()
        counts[shard.entry.stem] = sum(status == OK for status in statuses)
    return counts


def _maps_by_key(maps: RelevanceMaps, stem: str) -> dict[str, tuple[str, np.ndarray]]:
    table = maps.index(stem, ["key", "status"])
    slab = maps.read_shard(stem)  # [n, gh, gw]
    return {
        key: (status, slab[row])
        for row, (key, status) in enumerate(zip(table["key"].to_pylist(), table["status"].to_pylist(), strict=True))
    }
