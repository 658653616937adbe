"""Read relevance maps by key. Other experiments import this; it needs only msgspec, NumPy, pyarrow and zarr."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, overload

import numpy as np
import pyarrow as pa

from zpipe.schemas.errors import DamageError, UsageError, ZpipeError
from zpipe.schemas.image_digest import DIGEST_BYTES
from zpipe.schemas.image_join import DigestRows, digest_column
from zpipe.schemas.manifest import MANIFEST_NAME, MapShard, StoreManifest, read_manifest
from zpipe.schemas.relevance_store import (
    IndexFile,
    digest_maps,
    index_path,
    maps_path,
    read_stored,
)
from zpipe.schemas.storage import as_path, map_files
from zpipe.schemas.tensor_kinds import KINDS, decode

Normalise = Literal["minmax"] | None
MAPS_DIGEST = b"maps_sha256"  # in the metadata of index rows: the digest that the maps of their shard must have


def normalise_minmax(maps: np.ndarray) -> np.ndarray:
    """Scale each map [..., gh, gw] to [0, 1] by its own minimum and maximum, as float32.

    A constant map becomes zeros.
    """
    low = maps.min(axis=(-2, -1), keepdims=True)
    span = maps.max(axis=(-2, -1), keepdims=True) - low
    return ((maps - low) / np.where(span > 0, span, 1.0)).astype(np.float32)


def same_map(one: np.ndarray, other: np.ndarray) -> bool:
    """Whether two maps of one image differ by no more than batches and processors make them: 1 % of their range."""
    if one.dtype.kind == "i":
        return np.array_equal(one, other)
    span = max(float(np.ptp(one)), float(np.ptp(other)))
    return bool(np.abs(one - other).max() <= 0.01 * span) or np.array_equal(one, other, equal_nan=True)


class RelevanceMaps:
    """The maps of a finished store, by key and in order.

    `maps[key]` is one map, float32 [gh, gw]; `maps[10:20]` is float32 [10, gh, gw], in the order of `table()`;
    `maps[[key, key]]` is float32 [2, gh, gw]; `maps[zpipe.image_digest(data)]` is that of an image file, whatever its
    key. Other kinds of tensors (`manifest.provenance.kind`) have other shapes. The maps of a shard are read in one
    piece at the first look-up and kept: memory grows by 4 * gh * gw bytes per map (0.8 KB at 14 x 14), and by about 200
    bytes per key for the table of keys.

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
        self.kind = KINDS[self.manifest.provenance.kind]
        if normalise == "minmax" and not self.kind.is_relevance:
            raise UsageError(
                f"{self.path}: holds {self.manifest.provenance.kind}, which are not scaled to [0, 1]; "
                "open it without normalise"
            )
        self._fingerprint = self.manifest.provenance.fingerprint()
        self._shards: dict[str, np.ndarray] = {}
        self._checked: set[str] = set()  # stems of the shards whose maps were compared with their digest

    def __len__(self) -> int:
        return self.manifest.count

    def __contains__(self, key: object) -> bool:
        if isinstance(key, bytes):
            return len(key) == DIGEST_BYTES and len(self._digest_rows.rows(key)) > 0
        return key in self._places

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    @overload
    def __getitem__(self, key: str | bytes) -> np.ndarray: ...

    @overload
    def __getitem__(self, key: slice | Sequence[str]) -> np.ndarray: ...

    def __getitem__(self, key: Any) -> np.ndarray:
        if isinstance(key, str):
            stem, row = self.place(key)
            return self.shard(stem)[row]
        if isinstance(key, slice):
            return self._sliced(key)
        if isinstance(key, bytes):
            return self._of_image(key)
        if isinstance(key, Sequence):
            return np.stack([self[one] for one in key]) if key else self._empty(0)
        kind = type(key).__name__
        raise TypeError(f"maps[...] takes a key, a list of keys or a slice, got {kind}; or zpipe.image_digest(data)")

    def place(self, key: str) -> tuple[str, int]:
        """Stem of the shard that holds the map of a key, and its row. Raises KeyError for an unknown key."""
        place = self._places.get(key)
        if place is None:
            raise KeyError(f"{self.path}: no map for key {key!r}")
        return place

    def _of_image(self, digest: bytes) -> np.ndarray:
        rows = self._digest_rows.rows(digest) if len(digest) == DIGEST_BYTES else np.zeros(0, np.int64)
        if not len(rows):
            raise KeyError(f"{self.path}: no map for the image with digest {digest.hex()}")
        maps = [self.shard(stem)[row] for stem, row in map(self.place_of_row, rows.tolist())]
        if not all(same_map(maps[0], other) for other in maps[1:]):
            keys = [self.key_of_row(row) for row in rows[:2].tolist()]
            raise ZpipeError(
                f"{self.path}: keys {keys[0]} and {keys[1]} are the same image with different maps; look it up by key"
            )
        return maps[0]

    def place_of_row(self, row: int) -> tuple[str, int]:
        """Stem of the shard that holds a row of the whole store, in the order of `table()`, and the row in it."""
        shard = int(np.searchsorted(self._ends, row, side="right"))
        return self.manifest.shards[shard].stem, row - int(self._ends[shard]) + self.manifest.shards[shard].count

    def row(self, row: int) -> np.ndarray:
        """The map in a row of the whole store; its shard is not kept."""
        stem, place = self.place_of_row(row)
        index = self.index(stem, ["scale"])
        scale = index["scale"].to_numpy()[place : place + 1]
        return self.decoded(self.stored_shard(stem, index)[place : place + 1], scale)[0]

    def key_of_row(self, row: int) -> str:
        """Key of a row of the whole store."""
        stem, place = self.place_of_row(row)
        return str(self.index(stem, ["key"])["key"][place].as_py())

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
        return self.decoded(self.stored_shard(stem, index), index["scale"].to_numpy())

    def stored_shard(self, stem: str, index: pa.Table) -> np.ndarray:
        """The maps of one shard as they are stored, [n, ...], checked; large tensors are decoded sample by sample.

        Args:
            stem: Stem of the shard.
            index: Its index rows.
        """
        try:
            stored = read_stored(self.path, stem)
        except ZpipeError as error:
            raise self._explained(error) from error
        shape, dtype = (len(index), *self.manifest.provenance.sample_shape), self.kind.dtype
        if stored.shape != shape:
            raise self._damage(maps_path(self.path, stem), stem, f"its shape is {stored.shape}, not {shape}")
        if stored.dtype != dtype:
            raise self._damage(maps_path(self.path, stem), stem, f"its values are {stored.dtype}, not {dtype}")
        seal = (index.schema.metadata or {}).get(MAPS_DIGEST)
        if self.check and seal is not None and stem not in self._checked:
            if digest_maps(stored).encode() != seal:
                raise self._damage(maps_path(self.path, stem), stem, "its maps are not those that were written")
            self._checked.add(stem)
        return stored

    def decoded(self, stored: np.ndarray, scale: np.ndarray) -> np.ndarray:
        """What look-ups return for stored maps [n, ...] with scales [n]: float32, or int32 for label maps."""
        maps = decode(stored, scale)
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
        ends = self._ends
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
        dtype = np.int32 if self.kind.dtype.kind == "i" else np.float32
        return np.zeros((count, *self.manifest.provenance.sample_shape), dtype)

    def table(self, columns: list[str] | None = None) -> pa.Table:
        """The index of every shard as one table, with the stem of the shard in column `shard`.

        Args:
            columns: Names of columns; None for all that every shard has.
        """
        parts = []
        tables = map_files(self.path, lambda shard: self.index(shard.stem, columns), self.manifest.shards)
        for shard, part in zip(self.manifest.shards, tables, strict=True):
            stems = pa.DictionaryArray.from_arrays(pa.array(np.zeros(len(part), np.int32)), pa.array([shard.stem]))
            parts.append(part.replace_schema_metadata(None).append_column("shard", stems))
        if columns is None and parts:
            common = [name for name in parts[0].column_names if all(name in part.column_names for part in parts)]
            parts = [part.select(common) for part in parts]
        return pa.concat_tables(parts).unify_dictionaries()

    @cached_property
    def _ends(self) -> np.ndarray:
        return np.cumsum([shard.count for shard in self.manifest.shards], dtype=np.int64)

    @cached_property
    def _digest_rows(self) -> DigestRows:
        return DigestRows(digest_column(self.table(["image_digest"])["image_digest"]))

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
