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

import hashlib
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from zpipe.schemas.atomic import commit
from zpipe.schemas.errors import ZpipeError, first_line
from zpipe.schemas.storage import as_path, remove, storage_errors, storage_options

# Status of a sample. Only `ok` maps may be used in training: the others contain no relevance.
BY_NAME = "ground-truth by name"  # a target of the provenance: the label's class, found by its name
OK, UNDECODABLE, NONFINITE, ZERO = "ok", "undecodable", "nonfinite", "zero"
STATUSES = (OK, UNDECODABLE, NONFINITE, ZERO)

# Limits of what a shard may unpack to, as a few kilobytes can claim to be terabytes; `max_rows` gives them in samples.
MAX_MAP_BYTES = 1 << 30
MAX_ROWS = 4_000_000
CODECS = ("BytesCodec", "BloscCodec")

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


def max_rows(grid: tuple[int, int]) -> int:
    """How many samples a shard of maps of this grid (gh, gw) may have; readers refuse larger ones."""
    return min(MAX_ROWS, MAX_MAP_BYTES // (grid[0] * grid[1] * np.dtype(np.float16).itemsize))


def encode_maps(raw: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Split raw maps [n, gh, gw] into maps with a largest magnitude of 1, float16 [n, gh, gw], and scales, float32 [n].

    A map that is all zero has scale 0. One that is not finite is stored as NaN with scale NaN.
    """
    raw = raw.astype(np.float64)
    finite = np.isfinite(raw).all(axis=(1, 2))  # [n]
    scale = np.where(finite, np.abs(raw).max(axis=(1, 2), initial=0.0), np.nan).astype(np.float32)  # [n]
    divisor = np.where(scale == 0, 1.0, scale).astype(np.float64)
    with np.errstate(invalid="ignore"):
        stored = np.where(finite[:, None, None], raw, np.nan) / divisor[:, None, None]  # [n, gh, gw]
    return stored.astype(np.float16), scale


def decode_maps(stored: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Raw maps, float32 [n, gh, gw], from stored maps [n, gh, gw] and scales [n]."""
    return stored.astype(np.float32) * scale[:, None, None].astype(np.float32)


def concentration(raw: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How concentrated maps are. Negative relevance counts as zero.

    Args:
        raw: Maps [n, gh, gw].

    Returns:
        Entropy in nats of each map as a distribution, and the fraction of its mass in the top 10 % of cells (rounded
        up): float32 [n] each, NaN where a map has no mass.
    """
    flat = np.clip(raw.reshape(len(raw), -1).astype(np.float64), 0.0, None)  # [n, cells]
    with np.errstate(invalid="ignore", divide="ignore"):
        share = flat / flat.sum(axis=1, keepdims=True)
        logs = np.where(share > 0, np.log(share), 0.0)
    top = -(-flat.shape[1] // 10)
    top_mass = -np.sort(-share, axis=1)[:, :top].sum(axis=1)
    return (-(share * logs).sum(axis=1)).astype(np.float32), top_mass.astype(np.float32)


def digest_maps(stored: np.ndarray) -> str:
    """SHA-256 (hex) of stored maps, as little-endian float16 in C order."""
    return hashlib.sha256(np.ascontiguousarray(stored, dtype="<f2").tobytes()).hexdigest()


def write_shard(
    root: Path, stem: str, stored: np.ndarray, index: pa.Table, *, input_sha256: str, fingerprint: str
) -> None:
    """Write one map shard: the array first, then the index, renamed into place. The same content gives the same bytes.

    Args:
        root: Folder or URL of the store.
        stem: Stem of the tar.
        stored: Maps from `encode_maps`, float16 [n, gh, gw].
        index: n rows of `INDEX_SCHEMA`, in the same order.
        input_sha256: SHA-256 (hex) of the tar.
        fingerprint: Fingerprint of the provenance.

    Raises:
        ZpipeError: A file could not be written, or would be larger than readers accept. No index is left then.
        ValueError: The number of rows or the dtype is wrong.
    """
    import zarr
    from zarr.codecs import BloscCodec

    index = index.cast(INDEX_SCHEMA)
    if len(index) != len(stored) or stored.dtype != np.float16:
        raise ValueError(f"{stem}: {len(index)} rows for {len(stored)} maps of {stored.dtype}")
    gh, gw = stored.shape[1:]
    if len(stored) > (most := max_rows((gh, gw))):
        raise ZpipeError(
            f"{maps_path(root, stem)}: {len(stored)} maps of {gh} x {gw} are more than the {most} of a shard; "
            "make smaller tars"
        )
    seal = {"input_sha256": input_sha256, "fingerprint": fingerprint, "maps_sha256": digest_maps(stored)}
    # The old index must not stay beside the new array.
    remove(index_path(root, stem))
    with commit(maps_path(root, stem)) as tmp:
        array = zarr.create_array(
            store=str(tmp),
            shape=stored.shape,
            chunks=stored.shape,
            dtype="float16",
            # Shuffling puts bytes of equal significance together: float16 exponents compress, mantissas hardly do.
            compressors=BloscCodec(cname="zstd", clevel=5, shuffle="shuffle", typesize=2),
            fill_value=0.0,
            attributes={"key_index": f"../../index/{stem}.parquet"},
        )
        array[:] = stored
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

    Raises:
        ZpipeError: The file cannot be read; the properties raise it too.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._data = path.read_bytes()
        except storage_errors() as error:
            raise self._unreadable(error) from error

    @property
    def sha256(self) -> str:
        """SHA-256 (hex) of the file."""
        return hashlib.sha256(self._data).hexdigest()

    @property
    def seal(self) -> ShardSeal:
        """What the file states about its shard."""
        try:
            metadata = pq.read_schema(pa.BufferReader(self._data)).metadata or {}
            return ShardSeal(**{name: metadata[name.encode()].decode() for name in ShardSeal.__dataclass_fields__})
        except (pa.ArrowException, OSError, KeyError, UnicodeDecodeError) as error:
            raise self._unreadable(error) from error

    def table(self, columns: list[str] | None = None) -> pa.Table:
        """The rows, with all columns or with those that are named."""
        try:
            # One thread, because callers read many shards in parallel.
            with pq.ParquetFile(pa.BufferReader(self._data)) as file:
                if file.metadata.num_rows > MAX_ROWS:
                    raise KeyError(f"{file.metadata.num_rows} rows are more than {MAX_ROWS}")
                missing = set(columns or ()) - set(file.schema_arrow.names)
                if missing:
                    raise KeyError(f"no column {min(missing)}")
                return file.read(columns=columns, use_threads=False).replace_schema_metadata(None)
        except (pa.ArrowException, OSError, KeyError, UnicodeDecodeError) as error:
            raise self._unreadable(error) from error

    def _unreadable(self, error: Exception) -> ZpipeError:
        return ZpipeError(f"{self.path}: map index can't be read ({first_line(error)}); delete it and extract again")


def read_stored(root: Path, stem: str) -> np.ndarray:
    """The maps of one shard as they are stored, float16 [n, gh, gw].

    Raises :class:`ZpipeError` if they cannot be read.
    """
    import zarr

    path = maps_path(root, stem)
    try:
        # We write no other format or codec, and some of Zarr's codecs unpickle or call other libraries.
        array = zarr.open_array(store=str(path), mode="r", storage_options=storage_options(path), zarr_format=3)
        codecs = [*array.filters, array.serializer, *array.compressors]
        if odd := [type(codec).__name__ for codec in codecs if type(codec).__name__ not in CODECS]:
            raise ValueError(f"its codec {odd[0]} is not one of a relevance store")
        unpacked = max(array.size, math.prod(array.chunks)) * array.dtype.itemsize
        if array.dtype != np.float16 or array.ndim != 3 or unpacked > MAX_MAP_BYTES:
            raise ValueError(f"{array.dtype} {array.shape} is no shard of maps below {MAX_MAP_BYTES >> 20} MiB")
        if array.nchunks_initialized != array.nchunks:  # Zarr reads a missing chunk as zeros
            raise ValueError("a chunk is missing")
        return np.asarray(array[:])
    # Zarr and its codecs raise different exceptions for a damaged array, depending on where they notice it.
    except storage_errors(ValueError, RuntimeError, LookupError, TypeError, SystemError) as error:
        raise ZpipeError(
            f"{path}: maps can't be read ({first_line(error)}); delete {index_path(root, stem)} and extract again"
        ) from error
