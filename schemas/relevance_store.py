"""The format of a map shard, a Zarr v3 array of maps and a Parquet index: its only writer and its only reader.

    STORE/extraction.json        provenance; marks the folder as a store from the first moment
    STORE/maps/<stem>.zarr       float16 [n, gh, gw], one chunk, each map divided by its own scale
    STORE/index/<stem>.parquet   one row per sample, in the order of the array; committed last: no index, no shard
    STORE/manifest.json          written when every shard is finished

STORE is a folder or an fsspec URL. On an object store the two files of an array are written one after the other, and
the index, a single request, after them: there too, a shard without an index does not count.

Raw relevance spans many decades between images, so each map is stored as map / max|map| in float16, and its scale as
float32 in the index. A sample takes about 330 to 400 bytes with 14 x 14 maps, index included.
"""

from __future__ import annotations

import errno
import hashlib
import math
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from zpipe.schemas.atomic import commit
from zpipe.schemas.errors import DamageError, UsageError, ZpipeError, first_line, remedy_for
from zpipe.schemas.image_digest import DIGEST_BYTES
from zpipe.schemas.map_array import MAX_MAP_BYTES, read_array, write_array
from zpipe.schemas.names import MAX_KEY_BYTES, check_key, printable
from zpipe.schemas.storage import as_path, read_file, remove, storage_errors
from zpipe.schemas.tensor_kinds import KINDS, TensorKind, decode, encode

# Status of a sample. Only `ok` maps may be used in training: the others contain no relevance.
BY_NAME = "ground-truth by name"  # a target of the provenance: the label's class, found by its name
OK, UNDECODABLE, NONFINITE, ZERO = "ok", "undecodable", "nonfinite", "zero"
STATUSES = (OK, UNDECODABLE, NONFINITE, ZERO)

FLOAT16 = np.dtype(np.float16)

# Limits of an index, as a few kilobytes can claim to be terabytes; `max_rows` gives them in samples.
MAX_ROWS = 4_000_000
MAX_INDEX_BYTES = 1 << 30  # of the file, and of its columns unpacked

# What the operating system says of something that lies in place of a file of ours: none, a folder, a device, ...
_NOT_OURS = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EINVAL, errno.EFBIG, errno.ELOOP)

INDEX_SCHEMA = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),
        pa.field("label", pa.int32(), nullable=False),
        pa.field("target", pa.int32(), nullable=False),
        pa.field("predicted", pa.int32(), nullable=False),
        pa.field("predicted_probability", pa.float32(), nullable=False),
        pa.field("target_probability", pa.float32(), nullable=False),
        pa.field("scale", pa.float32(), nullable=False),
        pa.field("entropy", pa.float32(), nullable=False),
        pa.field("top10_mass", pa.float32(), nullable=False),
        pa.field("width", pa.int32(), nullable=False),
        pa.field("height", pa.int32(), nullable=False),
        pa.field("frame_x1", pa.float32(), nullable=False),
        pa.field("frame_y1", pa.float32(), nullable=False),
        pa.field("frame_x2", pa.float32(), nullable=False),
        pa.field("frame_y2", pa.float32(), nullable=False),
        pa.field("status", pa.string(), nullable=False),
    ]
)
# Columns that an index may have besides: the digest of the original image, which no earlier version wrote; the classes
# of a sample's class maps, of which `target` is the first; and the stability of its map, where it was measured.
MORE_COLUMNS = pa.schema(
    [
        pa.field("image_digest", pa.binary(DIGEST_BYTES), nullable=False),
        pa.field("targets", pa.list_(pa.field("element", pa.int32(), nullable=False)), nullable=False),
        pa.field("stability", pa.float32(), nullable=False),
    ]
)
# What to do where a store was written without one of them.
ABSENT = {
    "image_digest": "has no digests of the images; add them: zpipe maps digest STORE SHARDS",
    "stability": "has no stability of the maps; extract them with --stability",
}

TEXTS = [field.name for field in INDEX_SCHEMA if pa.types.is_string(field.type)]


def index_schema(names: Collection[str]) -> pa.Schema:
    """The schema of an index: `INDEX_SCHEMA`, and those of `MORE_COLUMNS` that are among the names."""
    if not any(name in names for name in MORE_COLUMNS.names):
        return INDEX_SCHEMA
    return pa.schema([*INDEX_SCHEMA, *(field for field in MORE_COLUMNS if field.name in names)])


@dataclass(frozen=True, kw_only=True)
class ShardSeal:
    """What an index file states about its shard."""

    input_sha256: str
    """SHA-256 (hex) of the tar that the maps were made from."""
    fingerprint: str
    """Fingerprint of the provenance."""
    maps_sha256: str
    """`digest_maps` of the maps."""


def maps_path(root: Path, stem: str) -> Path:
    """The Zarr array of a shard."""
    return as_path(root) / "maps" / f"{stem}.zarr"


def index_path(root: Path, stem: str) -> Path:
    """The Parquet index of a shard."""
    return as_path(root) / "index" / f"{stem}.parquet"


def max_rows(shape: tuple[int, ...], dtype: np.dtype = FLOAT16) -> int:
    """How many samples of this shape, such as (gh, gw), a shard may have; readers refuse larger ones."""
    return min(MAX_ROWS, MAX_MAP_BYTES // (math.prod(shape) * dtype.itemsize))


def encode_maps(raw: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Split raw maps [n, gh, gw] into maps with a largest magnitude of 1, float16 [n, gh, gw], and scales, float32 [n].

    A map that is all zero has scale 0. One that is not finite is stored as NaN with scale NaN.
    """
    return encode(KINDS["map"], raw)


def decode_maps(stored: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Raw maps, float32 [n, gh, gw], from stored maps [n, gh, gw] and scales [n]."""
    return decode(stored, scale)


def concentration(raw: np.ndarray, kind: TensorKind = KINDS["map"]) -> tuple[np.ndarray, np.ndarray]:
    """How concentrated maps are. Negative relevance counts as zero.

    Args:
        raw: Maps [n, gh, gw]; of class maps [n, k, gh, gw] the first ones are measured, other tensors not at all.
        kind: What they are.

    Returns:
        Entropy in nats of each map as a distribution, and the fraction of its mass in the top 10 % of cells (rounded
        up): float32 [n] each, NaN where a map has no mass.
    """
    if not kind.is_relevance:
        return np.full(len(raw), np.nan, np.float32), np.full(len(raw), np.nan, np.float32)
    raw = raw if raw.ndim == 3 else raw[:, 0]
    flat = np.clip(raw.reshape(len(raw), -1).astype(np.float64), 0.0, None)  # [n, cells]
    with np.errstate(invalid="ignore", divide="ignore"):
        share = flat / flat.sum(axis=1, keepdims=True)
        logs = np.where(share > 0, np.log(share), 0.0)
    top = -(-flat.shape[1] // 10)
    top_mass = -np.sort(-share, axis=1)[:, :top].sum(axis=1)
    return (-(share * logs).sum(axis=1)).astype(np.float32), top_mass.astype(np.float32)


def digest_maps(stored: np.ndarray) -> str:
    """SHA-256 (hex) of stored maps or other tensors, as little-endian values in C order."""
    return hashlib.sha256(np.ascontiguousarray(stored, dtype=stored.dtype.newbyteorder("<")).tobytes()).hexdigest()


def write_shard(
    root: Path, stem: str, stored: np.ndarray, index: pa.Table, *, input_sha256: str, fingerprint: str
) -> None:
    """Write one shard: the array first, then the index, renamed into place. The same content gives the same bytes.

    Args:
        root: Folder or URL of the store.
        stem: Stem of the tar.
        stored: Maps from `encode_maps`, float16 [n, gh, gw]; or other tensors from `tensor_kinds.encode` [n, ...].
        index: n rows of `INDEX_SCHEMA` and maybe `MORE_COLUMNS`, in the same order.
        input_sha256: SHA-256 (hex) of the tar.
        fingerprint: Fingerprint of the provenance.

    Raises:
        ZpipeError: A file could not be written, or would be larger than readers accept. No index is left then.
        ValueError: The number of rows or the dtype is wrong.
    """
    index = index.cast(index_schema(index.column_names))
    if len(index) != len(stored) or stored.dtype not in (np.float16, np.int32):
        raise ValueError(f"{stem}: {len(index)} rows for {len(stored)} maps of {stored.dtype}")
    if len(stored) > (most := max_rows(stored.shape[1:], stored.dtype)):
        shape = " x ".join(map(str, stored.shape[1:]))
        raise ZpipeError(
            f"{maps_path(root, stem)}: {len(stored)} maps of {shape} are more than the {most} of a shard; "
            "make smaller tars"
        )
    seal = {"input_sha256": input_sha256, "fingerprint": fingerprint, "maps_sha256": digest_maps(stored)}
    # The old index must not stay beside the new array.
    remove(index_path(root, stem))
    with commit(maps_path(root, stem)) as tmp:
        write_array(tmp, stored, key_index=f"../../index/{stem}.parquet")
    with commit(index_path(root, stem)) as tmp:
        pq.write_table(index.replace_schema_metadata(seal), tmp, compression="zstd")


def read_seal(root: Path, stem: str) -> ShardSeal | None:
    """The seal of a committed shard; None if there is no such shard."""
    path = index_path(root, stem)
    return IndexFile(path).seal if path.is_file() else None


def read_index(root: Path, stem: str, columns: list[str] | None = None) -> pa.Table:
    """The index rows of one shard."""
    return IndexFile(index_path(root, stem)).table(columns)


def count_correct_labels(table: pa.Table, target: str) -> tuple[int, int]:
    """Count how often the teacher's best class is the label.

    Args:
        table: Index rows with columns `label`, `target`, `predicted` and `status`.
        target: The target of the store's provenance. Labels that were matched by name have other numbers than the
            teacher's classes; the class that a map explains is then the label's.

    Returns:
        The number of usable, labelled samples whose label is predicted, and the number of usable, labelled samples.
    """
    label = table["label"].to_numpy()  # int32 [n]
    usable = (table["status"].to_numpy(zero_copy_only=False) == OK) & (label >= 0)
    truth = table["target"].to_numpy() if target.startswith(BY_NAME) else label
    return int((truth == table["predicted"].to_numpy())[usable].sum()), int(usable.sum())


class IndexFile:
    """The index of one shard, read in one piece: some 50 bytes per sample.

    Whoever wrote the file: what comes out of it has the types of `INDEX_SCHEMA` and no nulls, keys follow the rule of
    :func:`~zpipe.schemas.names.check_key` and are unique, scales are not negative, statuses are those of `STATUSES`.

    Args:
        path: The file.
        what: What messages call it. The index of a tar's images has some of the columns only.
        again: What makes it again.
        texts: Its columns of texts; naming them is only faster.

    Raises:
        DamageError: The file is not what was written, or larger than an index is; the properties raise it too.
        ZpipeError: The file is absent or can't be read.
    """

    def __init__(
        self, path: Path, *, what: str = "map index", again: str = "extract again", texts: Sequence[str] = TEXTS
    ) -> None:
        self.path = path
        self._what, self._again, self._texts = what, again, list(texts)
        try:
            self._data = read_file(path, MAX_INDEX_BYTES)
        except FileNotFoundError as error:
            raise ZpipeError(f"{path}: {what} can't be read (no such file); {again} to make it") from error
        except storage_errors() as error:
            if getattr(error, "errno", None) in _NOT_OURS:
                raise self._damage(first_line(error)) from error
            raise ZpipeError(
                f"{path}: {what} can't be read ({first_line(error)}); {remedy_for(error)}, then run again"
            ) from error

    @cached_property
    def sha256(self) -> str:
        """SHA-256 (hex) of the file."""
        return hashlib.sha256(self._data).hexdigest()

    @cached_property
    def seal(self) -> ShardSeal:
        """What the file states about its shard."""
        metadata = self._about.metadata or {}
        try:
            values = {name: metadata[name.encode()].decode() for name in ShardSeal.__dataclass_fields__}
        except KeyError as error:
            raise self._damage(f"its seal has no {error.args[0].decode()}") from error
        except UnicodeDecodeError as error:
            raise self._damage("its seal is no text") from error
        if odd := [name for name, value in values.items() if not re.fullmatch("[0-9a-f]{1,64}", value)]:
            raise self._damage(f"its {odd[0]} is no digest")
        return ShardSeal(**values)

    @cached_property
    def _file(self) -> pq.ParquetFile:
        try:
            try:
                # Texts are read as dictionaries: a text that is repeated a million times takes no more than one.
                return pq.ParquetFile(pa.BufferReader(self._data), read_dictionary=self._texts)
            except KeyError:  # one is missing; `table` raises the error when it is read
                schema = pq.read_metadata(pa.BufferReader(self._data)).schema
                paths = {schema.column(number).path for number in range(len(schema))}
                texts = [name for name in self._texts if name in paths]
                return pq.ParquetFile(pa.BufferReader(self._data), read_dictionary=texts)
        except (pa.ArrowException, OSError, ValueError) as error:  # ValueError: names that are not UTF-8
            raise self._damage(first_line(error)) from error

    @cached_property
    def _about(self) -> pq.FileMetaData:
        return self._file.metadata

    @cached_property
    def _schema(self) -> pa.Schema:
        try:
            return self._about.schema.to_arrow_schema()
        except (pa.ArrowException, OSError, KeyError, ValueError, NotImplementedError) as error:
            raise self._damage(first_line(error)) from error

    @cached_property
    def columns(self) -> list[str]:
        """The names of its columns: those of `INDEX_SCHEMA`, and those of `MORE_COLUMNS` that it has."""
        return index_schema(self._schema.names).names

    def table(self, columns: Sequence[str] | None = None) -> pa.Table:
        """The rows, with all columns or with those that are named.

        Raises:
            UsageError: An index has no such column, or this one was written without it.
        """
        names = self.columns if columns is None else list(columns)
        schema = index_schema(names)
        if unknown := [name for name in names if name not in schema.names]:
            known = ", ".join(index_schema(MORE_COLUMNS.names).names)
            raise UsageError(f"{self.path}: no column {unknown[0]!r}; the columns of an index are {known}")
        for name in names:
            if name in ABSENT and name not in self._schema.names:
                raise UsageError(f"{self.path}: {ABSENT[name]}")
        try:
            self._check_description(self._about, [schema.field(name) for name in names])
            # One thread, because callers read many shards in parallel.
            with self._file as file:
                table = file.read(columns=names, use_threads=False).replace_schema_metadata(None)
            parts = [self._column(name, table[name]) for name in names]
        except (pa.ArrowException, OSError, KeyError, ValueError, NotImplementedError) as error:
            raise self._damage(first_line(error)) from error
        finally:
            self.__dict__.pop(
                "_file", None
            )  # closed: an open one would keep the data until the next garbage collection
        return pa.table(parts, schema=pa.schema([schema.field(name) for name in names]))

    def _check_description(self, about: pq.FileMetaData, fields: Sequence[pa.Field]) -> None:
        """Check what the file says about its columns, before any of them is unpacked."""
        groups = [about.row_group(number) for number in range(about.num_row_groups)]
        rows = max(about.num_rows, sum(group.num_rows for group in groups))
        if rows > MAX_ROWS:
            raise self._damage(f"{rows} rows are more than {MAX_ROWS}")
        for name, wanted in ((field.name, field.type) for field in fields):
            found = [field.type for field in self._schema if field.name == name]
            found = [each.value_type if pa.types.is_dictionary(each) else each for each in found]
            if found != [wanted]:
                said = printable(", ".join(map(str, found)))[:60] or "missing"
                raise self._damage(f"column {name} is {said}, not {wanted}")
        unpacked = sum(
            group.column(place).total_uncompressed_size for group in groups for place in range(group.num_columns)
        )
        if unpacked > MAX_INDEX_BYTES:
            raise self._damage(f"it unpacks to {unpacked} bytes, more than {MAX_INDEX_BYTES}")

    def _column(self, name: str, column: pa.ChunkedArray) -> pa.ChunkedArray:
        """Check the values of a column; texts come as dictionaries and leave as texts."""
        if column.null_count:
            raise self._damage(f"column {name} has {column.null_count} rows without a value")
        if name == "key":
            column = self._plain(column, MAX_KEY_BYTES)
            self._check_keys(column)
        elif name == "status":
            column = self._plain(column, max(map(len, STATUSES)))
            odd = pc.unique(column.filter(pc.invert(pc.is_in(column, pa.array(STATUSES)))))
            if len(odd):
                raise self._damage(f"status '{printable(odd[0])}' is none of {', '.join(STATUSES)}")
        elif name == "targets" and pc.list_flatten(column).null_count:
            raise self._damage("column targets has lists without a value")
        elif name == "scale":
            values = column.to_numpy()
            if len(rows := np.flatnonzero((values < 0) | np.isinf(values))):
                raise self._damage(f"scale {values[rows[0]]:g} in row {rows[0]}")
        elif name.startswith("frame_") and not np.isfinite(column.to_numpy()).all():
            raise self._damage(f"column {name} has rows that are not finite")
        return column

    def _plain(self, column: pa.ChunkedArray, longest: int) -> pa.ChunkedArray:
        for chunk in column.chunks:
            sizes = pc.binary_length(chunk.dictionary)
            if len(sizes) and pc.max(sizes).as_py() > longest:
                raise self._damage(f"a text of {pc.max(sizes)} bytes, at most {longest} are possible")
        column = column.cast(pa.string())
        column.validate(full=True)  # Arrow trusts a file that its texts are UTF-8
        return column

    def _check_keys(self, keys: pa.ChunkedArray) -> None:
        # What Unicode calls printable fulfils the rule; the few others are looked at one by one.
        odd = pc.or_(pc.equal(pc.binary_length(keys), 0), pc.invert(pc.utf8_is_printable(keys)))
        for key in keys.filter(odd).to_pylist():
            try:
                check_key(key, str(self.path))
            except ZpipeError as error:
                raise DamageError(str(error).removesuffix("rename it") + f"delete it and {self._again}") from error
        if pc.count_distinct(keys).as_py() != len(keys):
            raise self._damage("a key comes twice")

    def _damage(self, reason: str) -> DamageError:
        return DamageError(
            f"{self.path}: {self._what} can't be read ({printable(reason)}); delete it and {self._again}"
        )


def read_stored(root: Path, stem: str) -> np.ndarray:
    """The maps of one shard as they are stored, float16 [n, gh, gw]; or other tensors, float16 or int32 [n, ...].

    Raises:
        DamageError: They are not what was written, or larger than a shard is.
        ZpipeError: A file can't be read.
    """
    path = maps_path(root, stem)
    remedy = f"delete {index_path(root, stem)} and extract again"
    try:
        stored, is_there = read_array(path)
    except storage_errors(ValueError) as error:
        if isinstance(error, (ValueError, FileNotFoundError)) or getattr(error, "errno", None) in _NOT_OURS:
            raise DamageError(f"{path}: maps can't be read ({printable(first_line(error))}); {remedy}") from error
        raise ZpipeError(
            f"{path}: maps can't be read ({first_line(error)}); {remedy_for(error)}, then run again"
        ) from error
    if not is_there:
        # Zarr writes no chunk of zeros unless it is told to, and earlier versions didn't tell it.
        seal = read_seal(root, stem)
        if seal is None or seal.maps_sha256 != digest_maps(stored):
            raise DamageError(f"{path}: maps can't be read (a chunk is missing); {remedy}")
    return stored
