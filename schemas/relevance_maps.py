"""Read relevance maps by key. Other experiments import this; it needs only msgspec, NumPy, pyarrow and zarr."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa

from zpipe.schemas.errors import DamageError, UsageError, ZpipeError
from zpipe.schemas.manifest import MANIFEST_NAME, MapShard, StoreManifest, read_manifest
from zpipe.schemas.relevance_store import IndexFile, decode_maps, digest_maps, index_path, maps_path, read_stored
from zpipe.schemas.storage import as_path, map_files

Normalise = Literal["minmax"] | None
MAPS_DIGEST = b"maps_sha256"  # in the metadata of index rows: the digest that the maps of their shard must have


def normalise_minmax(maps: np.ndarray) -> np.ndarray:
    """Scale each map [..., gh, gw] to [0, 1] by its own minimum and maximum, as float32.

    A constant map becomes zeros.
    """
    low = maps.min(axis=(-2, -1), keepdims=True)
    span = maps.max(axis=(-2, -1), keepdims=True) - low
    return ((maps - low) / np.where(span > 0, span, 1.0)).astype(np.float32)


class RelevanceMaps:
    """The maps of a finished store, by key and in order.

    `maps[key]` is one map, float32 [gh, gw]; `maps[10:20]` is float32 [10, gh, gw], in the order of `table()`;
    `maps[[key, key]]` is float32 [2, gh, gw]. The maps of a shard are read in one piece at the first look-up and kept:
    memory grows by 4 * gh * gw bytes per map (0.8 KB at 14 x 14), and by about 200 bytes per key for the table of keys.

    What is read must be what the manifest vouched for when the store was opened: a file that was damaged since it was
    written, or a store that was replaced meanwhile, is an error that says which.

    Args:
        path: Folder or fsspec URL of the store.
        normalise: None for raw relevance, ``minmax`` for each map scaled to [0, 1], as the training loader reads them.
        check: Compare the digest of each index that is read, and of the maps of each shard when they are first read.
            Without it damage may go unnoticed, but a store that was replaced by other maps does not.

    Raises:
        ZpipeError: `path` is no finished store.
        ValueError: `normalise` is none of its choices.
        KeyError: A key that is looked up is not in the store.
    """

    def __init__(self, path: str | os.PathLike[str], normalise: Normalise = None, *, check: bool = True) -> None:
        if normalise not in (None, "minmax"):
            raise ValueError(f"normalise must be None or 'minmax', got {normalise!r}")
        self.path = as_path(path)
        self.manifest: StoreManifest = read_manifest(self.path)
        self.normalise = normalise
        self.check = check
        self._fingerprint = self.manifest.provenance.fingerprint()
        self._shards: dict[str, np.ndarray] = {}
        self._checked: set[str] = set()  # stems of the shards whose maps were compared with their digest

    def __len__(self) -> int:
        return self.manifest.count

    def __contains__(self, key: object) -> bool:
        return key in self._places

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __getitem__(self, key: str | slice | Sequence[str]) -> np.ndarray:
        if isinstance(key, str):
            stem, row = self.place(key)
            return self.shard(stem)[row]
        if isinstance(key, slice):
            return self._sliced(key)
        if isinstance(key, Sequence):
            return np.stack([self[one] for one in key]) if key else self._empty(0)
        raise TypeError(f"maps[...] takes a key, a list of keys or a slice, got {type(key).__name__}")

    def place(self, key: str) -> tuple[str, int]:
        """Stem of the shard that holds the map of a key, and its row. Raises KeyError for an unknown key."""
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

    def read_shard(self, stem: str, index: pa.Table | None = None) -> np.ndarray:
        """All maps of one shard, float32 [n, gh, gw], read from disk and not kept: for passes over whole data sets.

        Args:
            stem: Stem of the shard.
            index: Its index rows with column `scale`, where the caller has read them already.
        """
        index = self.index(stem, ["scale"]) if index is None else index
        try:
            stored = read_stored(self.path, stem)
        except ZpipeError as error:
            raise self._explained(error) from error
        shape = (len(index), *self.manifest.provenance.grid)
        if stored.shape != shape:
            raise self._damage(maps_path(self.path, stem), stem, f"its shape is {stored.shape}, not {shape}")
        seal = (index.schema.metadata or {}).get(MAPS_DIGEST)
        if self.check and seal is not None and stem not in self._checked:
            if digest_maps(stored).encode() != seal:
                raise self._damage(maps_path(self.path, stem), stem, "its maps are not those that were written")
            self._checked.add(stem)
        maps = decode_maps(stored, index["scale"].to_numpy())
        if self.normalise == "minmax":
            maps = normalise_minmax(maps)
        maps.flags.writeable = False
        return maps

    def index(self, stem: str, columns: list[str] | None = None) -> pa.Table:
        """The index rows of one shard."""
        shard = self._listed.get(stem)
        if shard is None:
            raise KeyError(f"{self.path}: no shard {stem!r}")
        try:
            file = IndexFile(index_path(self.path, stem))
            seal, table = file.seal, file.table(columns)
        except ZpipeError as error:
            raise self._explained(error) from error
        origin = (seal.fingerprint, seal.input_sha256)
        if origin != (self._fingerprint, shard.input_sha256) or (self.check and file.sha256 != shard.index_sha256):
            raise self._damage(file.path, stem, "it is not the index that the manifest lists")
        if columns != [] and len(table) != shard.count:
            raise self._damage(file.path, stem, f"it has {len(table)} rows, the manifest says {shard.count}")
        return table.replace_schema_metadata({MAPS_DIGEST: seal.maps_sha256})

    def _damage(self, file: Path, stem: str, reason: str) -> ZpipeError:
        remedy = f"delete {index_path(self.path, stem)} and extract again"
        return self._explained(DamageError(f"{file}: {reason}: damaged or altered; {remedy}"))

    def _explained(self, error: ZpipeError) -> ZpipeError:
        """The error, unless its cause is that the store was replaced since it was opened."""
        try:
            replaced = read_manifest(self.path) != self.manifest
        except ZpipeError:
            replaced = not (self.path / MANIFEST_NAME).exists()
        if not replaced or isinstance(error, UsageError):
            return error
        return ZpipeError(f"{self.path}: was replaced or removed since it was opened; open it again")

    def array(self) -> np.ndarray:
        """All maps, float32 [N, gh, gw], in the order of `table()`: 0.8 KB per map at 14 x 14, 1 GB for ImageNet."""
        return self._sliced(slice(None))

    def _sliced(self, rows: slice) -> np.ndarray:
        wanted = range(*rows.indices(len(self)))
        order = np.asarray(wanted if wanted.step > 0 else wanted[::-1], np.int64)
        try:
            out = self._empty(len(order))
        except (MemoryError, ValueError) as error:  # NumPy's for what no array can hold
            raise ZpipeError(f"{self.path}: {len(order)} maps do not fit into memory; read them in slices") from error
        ends = np.cumsum([shard.count for shard in self.manifest.shards], dtype=np.int64)
        touched = [int(i) for i in np.unique(np.searchsorted(ends, order, side="right"))]
        # Shards that were not read by key are not kept: the caller has their maps in the result.
        parts = map_files(self.path, self._shard_unkept, [self.manifest.shards[i].stem for i in touched])
        for i, maps in zip(touched, parts, strict=True):
            start = ends[i] - self.manifest.shards[i].count
            first, end = np.searchsorted(order, [start, ends[i]])
            out[first:end] = maps[order[first:end] - start]
        return out if wanted.step > 0 else out[::-1]

    def _shard_unkept(self, stem: str) -> np.ndarray:
        kept = self._shards.get(stem)
        return self.read_shard(stem) if kept is None else kept

    def _empty(self, count: int) -> np.ndarray:
        return np.zeros((count, *self.manifest.provenance.grid), np.float32)

    def table(self, columns: list[str] | None = None) -> pa.Table:
        """The index of every shard as one table, with the stem of the shard in column `shard`."""
        parts = []
        tables = map_files(self.path, lambda shard: self.index(shard.stem, columns), self.manifest.shards)
        for shard, part in zip(self.manifest.shards, tables, strict=True):
            stems = pa.DictionaryArray.from_arrays(pa.array(np.zeros(len(part), np.int32)), pa.array([shard.stem]))
            parts.append(part.replace_schema_metadata(None).append_column("shard", stems))
        return pa.concat_tables(parts).unify_dictionaries()

    @cached_property
    def _listed(self) -> dict[str, MapShard]:
        return {shard.stem: shard for shard in self.manifest.shards}

    @cached_property
    def _places(self) -> dict[str, tuple[str, int]]:
        places: dict[str, tuple[str, int]] = {}
        tables = map_files(self.path, lambda shard: self.index(shard.stem, ["key"]), self.manifest.shards)
        for shard, table in zip(self.manifest.shards, tables, strict=True):
            for row, key in enumerate(table["key"].to_pylist()):
                if key in places:
                    raise ZpipeError(
                        f"{self.path}: key {key!r} is in shards {places[key][0]} and {shard.stem}; "
                        "run zpipe maps verify"
                    )
                places[key] = (shard.stem, row)
        return places
