"""Read relevance maps by key. This is what other experiments import; NumPy, pyarrow and zarr only."""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa

from zpipe.schemas.errors import ZpipeError
from zpipe.schemas.manifest import StoreManifest, read_manifest
from zpipe.schemas.relevance_store import decode_maps, read_index, read_stored

Normalise = Literal["minmax"] | None


def normalise_minmax(maps: np.ndarray) -> np.ndarray:
    """Scale each map [..., gh, gw] to [0, 1] by its own minimum and maximum; a constant map becomes zeros. float32."""
    low = maps.min(axis=(-2, -1), keepdims=True)
    span = maps.max(axis=(-2, -1), keepdims=True) - low
    return ((maps - low) / np.where(span > 0, span, 1.0)).astype(np.float32)


class RelevanceMaps:
    """The maps of a finished store, by key and in order.

    `maps[key]` is float32 [gh, gw]: raw relevance, or min-max per map with ``normalise="minmax"``. A shard's maps are read
    in one piece at the first look-up and kept; memory grows to 4 * gh * gw bytes a map read (0.8 KB at 14 x 14), and the
    key table to about 100 bytes a key.

    Errors: :class:`ZpipeError` when `path` is no finished store; KeyError for an unknown key.
    """

    def __init__(self, path: str | os.PathLike[str], normalise: Normalise = None) -> None:
        if normalise not in (None, "minmax"):
            raise ValueError(f"normalise must be None or 'minmax', got {normalise!r}")
        self.path = Path(path)
        self.manifest: StoreManifest = read_manifest(self.path)
        self.normalise = normalise
        self._shards: dict[str, np.ndarray] = {}

    def __len__(self) -> int:
        return self.manifest.count

    def __contains__(self, key: object) -> bool:
        return key in self._places

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __getitem__(self, key: str) -> np.ndarray:
        stem, row = self.place(key)
        return self.shard(stem)[row]

    def place(self, key: str) -> tuple[str, int]:
        """The shard (stem) and row where a key's map lies. Errors: KeyError."""
        place = self._places.get(key)
        if place is None:
            raise KeyError(f"{self.path}: no map for key {key!r}")
        return place

    def shard(self, stem: str) -> np.ndarray:
        """All maps of one shard, float32 [n, gh, gw], in the order of its index; read once and kept."""
        maps = self._shards.get(stem)
        if maps is None:
            maps = self._shards[stem] = self.read_shard(stem)
        return maps

    def read_shard(self, stem: str) -> np.ndarray:
        """All maps of one shard, float32 [n, gh, gw], read from disk and not kept: for passes over whole data sets."""
        stored = read_stored(self.path, stem)
        scale = read_index(self.path, stem, ["scale"])["scale"].to_numpy()
        if len(stored) != len(scale):
            raise ZpipeError(f"{self.path}: shard {stem} has {len(stored)} maps for {len(scale)} rows; extract again")
        maps = decode_maps(stored, scale)
        if self.normalise == "minmax":
            maps = normalise_minmax(maps)
        maps.flags.writeable = False
        return maps

    def index(self, stem: str, columns: list[str] | None = None) -> pa.Table:
        """The index rows of one shard."""
        return read_index(self.path, stem, columns)

    def array(self) -> np.ndarray:
        """Every map, float32 [N, gh, gw], in the order of `table()`. 0.8 KB a map at 14 x 14: 1 GB for ImageNet."""
        gh, gw = self.manifest.provenance.grid
        if not self.manifest.shards:
            return np.zeros((0, gh, gw), np.float32)
        return np.concatenate([self.shard(shard.stem) for shard in self.manifest.shards])

    def table(self, columns: list[str] | None = None) -> pa.Table:
        """The index of every shard as one table, with the shard's stem in column `shard`."""
        parts = []
        for shard in self.manifest.shards:
            part = read_index(self.path, shard.stem, columns)
            stems = pa.DictionaryArray.from_arrays(pa.array(np.zeros(len(part), np.int32)), pa.array([shard.stem]))
            parts.append(part.append_column("shard", stems))
        return pa.concat_tables(parts).unify_dictionaries()

    @cached_property
    def _places(self) -> dict[str, tuple[str, int]]:
        places: dict[str, tuple[str, int]] = {}
        for shard in self.manifest.shards:
            for row, key in enumerate(read_index(self.path, shard.stem, ["key"])["key"].to_pylist()):
                if key in places:
                    raise ZpipeError(
                        f"{self.path}: key {key!r} is in shards {places[key][0]} and {shard.stem}; run zpipe maps verify"
                    )
                places[key] = (shard.stem, row)
        return places
