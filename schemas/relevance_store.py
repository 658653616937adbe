"""One map shard on disk: a Zarr v3 array of maps and a Parquet index, written, committed and read here and nowhere else.

    STORE/extraction.json        provenance; marks the folder as a store from the first moment
    STORE/maps/<stem>.zarr       float16 [n, gh, gw], one chunk, each map divided by its own scale
    STORE/index/<stem>.parquet   one row a sample, in the order of the array; committed last: no index, no shard
    STORE/manifest.json          written when every shard is there

STORE is a folder or an fsspec URL. On an object store the two files of an array are put one after the other and the index,
one request, behind them: there as here, no index, no shard.

Raw relevance spans many decades between images, so each map is stored as map / max|map| in float16 and its scale as
float32 in the index. About 330-400 bytes a sample for 14 x 14 maps, index included.
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

# What became of a sample. Only `ok` maps may be trained on: the others have no relevance to give.
OK, UNDECODABLE, NONFINITE, ZERO = "ok", "undecodable", "nonfinite", "zero"
STATUSES = (OK, UNDECODABLE, NONFINITE, ZERO)

# What a shard may unpack to: a few kilobytes can claim to be terabytes. `max_rows` says what that is in samples.
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
    """What an index file says about itself: which input and which provenance made it, and the digest of its maps."""

    input_sha256: str
    fingerprint: str
    maps_sha256: str


def maps_path(root: Path, stem: str) -> Path:
    return as_path(root) / "maps" / f"{stem}.zarr"


def index_path(root: Path, stem: str) -> Path:
    return as_path(root) / "index" / f"{stem}.parquet"


def max_rows(grid: tuple[int, int]) -> int:
    """How many samples a shard of (gh, gw) maps may have, to be one that is read."""
    return min(MAX_ROWS, MAX_MAP_BYTES // (grid[0] * grid[1] * np.dtype(np.float16).itemsize))


def encode_maps(raw: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Split raw maps [n, gh, gw] into float16 maps of maximum 1 and float32 scales [n].

    A map that is all zero keeps scale 0; one that is not finite is stored as NaN with scale NaN.
    """
    raw = raw.astype(np.float64)
    finite = np.isfinite(raw).all(axis=(1, 2))  # [n]
    scale = np.where(finite, np.abs(raw).max(axis=(1, 2), initial=0.0), np.nan).astype(np.float32)  # [n]
    divisor = np.where(scale == 0, 1.0, scale).astype(np.float64)
    with np.errstate(invalid="ignore"):
        stored = np.where(finite[:, None, None], raw, np.nan) / divisor[:, None, None]  # [n, gh, gw]
    return stored.astype(np.float16), scale


def decode_maps(stored: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Raw float32 maps [n, gh, gw] from stored maps and scales [n]."""
    return stored.astype(np.float32) * scale[:, None, None].astype(np.float32)


def concentration(raw: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How concentrated maps [n, gh, gw] are: entropy in nats of the map as a distribution, and the share of its mass in
    the top 10 % of cells (rounded up). float32 [n] each; NaN where a map has no mass. Negative relevance counts as zero.
    """
    flat = np.clip(raw.reshape(len(raw), -1).astype(np.float64), 0.0, None)  # [n, cells]
    with np.errstate(invalid="ignore", divide="ignore"):
        share = flat / flat.sum(axis=1, keepdims=True)
        logs = np.where(share > 0, np.log(share), 0.0)
    top = -(-flat.shape[1] // 10)
    top_mass = -np.sort(-share, axis=1)[:, :top].sum(axis=1)
    return (-(share * logs).sum(axis=1)).astype(np.float32), top_mass.astype(np.float32)


def digest_maps(stored: np.ndarray) -> str:
    """SHA-256 (hex) of stored maps as little-endian float16 bytes in C order."""
    return hashlib.sha256(np.ascontiguousarray(stored, dtype="<f2").tobytes()).hexdigest()


def write_shard(
    root: Path, stem: str, stored: np.ndarray, index: pa.Table, *, input_sha256: str, fingerprint: str
) -> None:
    """Write one map shard: array first, then the index renamed into place.

    stored: float16 [n, gh, gw]; index: n rows of `INDEX_SCHEMA`, in the same order. The same content gives the same
    bytes. Errors: :class:`ZpipeError` naming the file that could not be written, or that would be larger than what is read;
    nothing is left that looks whole.
    """
    import zarr
    from zarr.codecs import BloscCodec

    index = index.cast(INDEX_SCHEMA)
    if len(index) != len(stored) or stored.dtype != np.float16:
        raise ValueError(f"{stem}: {len(index)} rows for {len(stored)} maps of {stored.dtype}")
    gh, gw = stored.shape[1:]
    if len(stored) > (most := max_rows((gh, gw))):
        raise ZpipeError(
            f"{maps_path(root, stem)}: {len(stored)} maps of {gh} x {gw} are more than the {most} of a shard; make smaller tars"
        )
    seal = {"input_sha256": input_sha256, "fingerprint": fingerprint, "maps_sha256": digest_maps(stored)}
    # An index that no longer fits its array must not stay while the array is replaced.
    remove(index_path(root, stem))
    with commit(maps_path(root, stem)) as tmp:
        array = zarr.create_array(
            store=str(tmp),
            shape=stored.shape,
            chunks=stored.shape,
            dtype="float16",
            # Bytes of one significance side by side: float16 exponents compress, mantissas hardly do.
            compressors=BloscCodec(cname="zstd", clevel=5, shuffle="shuffle", typesize=2),
            fill_value=0.0,
            attributes={"key_index": f"../../index/{stem}.parquet"},
        )
        array[:] = stored
    with commit(index_path(root, stem)) as tmp:
        pq.write_table(index.replace_schema_metadata(seal), tmp, compression="zstd")


def read_seal(root: Path, stem: str) -> ShardSeal | None:
    """The seal of a committed shard, or None when the shard is not there."""
    path = index_path(root, stem)
    return IndexFile(path).seal if path.is_file() else None


def read_index(root: Path, stem: str, columns: list[str] | None = None) -> pa.Table:
    """The index rows of one shard."""
    return IndexFile(index_path(root, stem)).table(columns)


def labels_named(table: pa.Table) -> tuple[int, int]:
    """Of a table with label, predicted and status: of how many samples the teacher names the label, and of how many it could:
    the usable ones that have a label."""
    label = table["label"].to_numpy()  # int32 [n]
    usable = (table["status"].to_numpy(zero_copy_only=False) == OK) & (label >= 0)
    return int((label == table["predicted"].to_numpy())[usable].sum()), int(usable.sum())


class IndexFile:
    """The index of one shard, fetched in one piece (some 50 bytes a sample). Errors: :class:`ZpipeError` naming the file."""

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
        """What the file says about itself."""
        try:
            metadata = pq.read_schema(pa.BufferReader(self._data)).metadata or {}
            return ShardSeal(**{name: metadata[name.encode()].decode() for name in ShardSeal.__dataclass_fields__})
        except (pa.ArrowException, OSError, KeyError, UnicodeDecodeError) as error:
            raise self._unreadable(error) from error

    def table(self, columns: list[str] | None = None) -> pa.Table:
        """The rows, or those columns of them."""
        try:
            # One thread: callers read many shards side by side.
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
    """The stored float16 maps [n, gh, gw] of one shard, read in one piece."""
    import zarr

    path = maps_path(root, stem)
    try:
        # Other formats and codecs are never ours, and some of Zarr's unpickle or call other libraries.
        array = zarr.open_array(store=str(path), mode="r", storage_options=storage_options(path), zarr_format=3)
        codecs = [*array.filters, array.serializer, *array.compressors]
        if odd := [type(codec).__name__ for codec in codecs if type(codec).__name__ not in CODECS]:
            raise ValueError(f"its codec {odd[0]} is not one of a relevance store")
        unpacked = max(array.size, math.prod(array.chunks)) * array.dtype.itemsize
        if array.dtype != np.float16 or array.ndim != 3 or unpacked > MAX_MAP_BYTES:
            raise ValueError(f"{array.dtype} {array.shape} is no shard of maps below {MAX_MAP_BYTES >> 20} MiB")
        if array.nchunks_initialized != array.nchunks:  # Zarr would read zeros where a chunk is gone
            raise ValueError("a chunk is missing")
        return np.asarray(array[:])
    # A damaged array fails wherever Zarr or its codec happens to notice, each in its own way.
    except storage_errors(ValueError, RuntimeError, LookupError, TypeError, SystemError) as error:
        raise ZpipeError(
            f"{path}: maps can't be read ({first_line(error)}); delete {index_path(root, stem)} and extract again"
        ) from error
