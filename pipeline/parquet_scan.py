"""A Parquet file of images before its images are read: its row groups, labels and names, within bounds."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import xxhash

from zpipe.pipeline.imagenet_names import canonical_key
from zpipe.pipeline.parquet_columns import NO_LABEL, Columns, check_classes
from zpipe.schemas.errors import ZpipeError
from zpipe.schemas.image_formats import HEAD_BYTES, IMAGE_SUFFIXES, sniff_format
from zpipe.schemas.names import check_key, printable
from zpipe.schemas.shard_index import rows_with_repeated_hashes

MAX_GROUP_BYTES = 1 << 30
MAX_GROUP_ROWS = 1 << 24
MAX_PATH_LENGTH = 1 << 12
# A repeated value is stored once and unpacked for each row, so that the bound above is checked every few rows.
ROWS_AT_ONCE, SMALL_ROWS_AT_ONCE = 16, 1 << 10
SMALLER = "write it again with smaller row groups"


@dataclass(frozen=True, kw_only=True)
class Scan:
    """What is known of a file before its images are read."""

    rows: np.ndarray
    """Rows of each row group, int64."""
    sizes: np.ndarray
    """Bytes of each row group, unpacked, int64; where they are many, of the columns that are read."""
    content: str
    """SHA-256 (hex) of the labels and the names of files of all rows."""
    hashes: np.ndarray
    """Hash of the key that each image would have by the name of its file, int64 [sum of `rows`]."""
    nameless: str = ""
    """Why an image has no key by the name of its file, if one has none."""
    classes: frozenset[str] = frozenset()
    """The labels, if they are names of classes."""


def scan_file(file: pq.ParquetFile, columns: Columns, where: str, first: str) -> Scan:
    """Read everything of a file but its images and plain values, and check it.

    Args:
        file: The file.
        columns: The columns of the data set.
        where: The file, for messages.
        first: The file that the columns were chosen in, for messages.

    Raises:
        ZpipeError: It has other columns, a row group is too large, or a label is none.
    """
    columns.check(file.schema_arrow, where, first)
    rows, sizes = _groups_of(file.metadata, columns, where)
    hashes: list[np.ndarray] = []
    nameless = "" if columns.has_path else "the images have no names of files"
    classes: set[str] = set()
    content = hashlib.sha256()
    small = [columns.label] if columns.label else []
    small += [f"{columns.image}.path"] if columns.has_path else []
    row = 0
    for batch in file.iter_batches(batch_size=SMALL_ROWS_AT_ONCE, columns=small) if small else ():
        labels: list[Any] = batch[columns.label].to_pylist() if columns.label else [None] * batch.num_rows
        paths: list[str | None] = [None] * batch.num_rows
        if columns.label:
            found = _checked_labels(batch[columns.label], columns, where, row)
            check_classes(found - classes, where)
            classes |= found
        if columns.has_path:
            paths = pc.struct_field(batch[columns.image], "path").to_pylist()
        content.update("".join(f"{path!r}\t{label!r}\n" for path, label in zip(paths, labels, strict=True)).encode())
        if not nameless:
            keys = [_key_of(path) for path in paths]
            nameless = _why_nameless(keys, where, row)
            hashes.append(np.array([xxhash.xxh3_64_intdigest(key.encode()) for key in keys], np.uint64))
        row += batch.num_rows
    if small and row != rows.sum():
        raise ZpipeError(f"{where}: says that it has {rows.sum()} rows, and has {row}; fetch it again")
    joined = np.concatenate([np.zeros(0, np.uint64), *hashes]).view(np.int64)
    digest = content.hexdigest()
    return Scan(rows=rows, sizes=sizes, content=digest, hashes=joined, nameless=nameless, classes=frozenset(classes))


def bytes_and_path(image: Any) -> tuple[bytes | None, str | None]:
    """The bytes and the path of a value of the column of images."""
    if not isinstance(image, dict):
        return image, None
    path = image.get("path")
    return image.get("bytes"), path if isinstance(path, str) else None


def first_value(file: pq.ParquetFile, column: str) -> tuple[bytes | None, str | None]:
    """Bytes and path of the first image of a file that has either."""
    for group in range(file.metadata.num_row_groups):
        for batch in file.iter_batches(batch_size=ROWS_AT_ONCE, row_groups=[group], columns=[column]):
            for value in batch[column]:
                data, path = bytes_and_path(value.as_py())
                if data or path:
                    return data, path
    return None, None


def begins_like_image(data: bytes | None, path: str | None) -> bool:
    """Whether a value is an image file by its first bytes, or the name of one where it has no bytes."""
    if data:
        return sniff_format(data[:HEAD_BYTES]) is not None
    return path is not None and path.rpartition(".")[2].lower() in IMAGE_SUFFIXES


def files_beside(where: str, path: str) -> ZpipeError:
    """The error of a row that holds no image, but the name of its file."""
    return ZpipeError(
        f"{where}: holds the name of an image file, {printable(path)[:80]}, and not the image; pack the folder of "
        "these files instead"
    )


def _groups_of(about: pq.FileMetaData, columns: Columns, where: str) -> tuple[np.ndarray, np.ndarray]:
    """Rows of each row group of a file, and the bytes that it unpacks to."""
    rows, sizes = [], []
    for number in range(about.num_row_groups):
        group = about.row_group(number)
        size = group.total_byte_size
        # pyarrow ends the process where it can't read what a damaged file says of a column, so columns are asked last.
        if size > MAX_GROUP_BYTES:
            chunks = [group.column(place) for place in range(group.num_columns)]
            read = tuple(f"{name}." for name in columns.types)
            size = sum(c.total_uncompressed_size for c in chunks if f"{c.path_in_schema}.".startswith(read))
        check_size(size, f"{where}: row group {number}")
        if not 0 <= group.num_rows <= MAX_GROUP_ROWS:
            raise ZpipeError(
                f"{where}: row group {number} has {group.num_rows} rows, not 0 to {MAX_GROUP_ROWS}; {SMALLER}"
            )
        rows.append(group.num_rows)
        sizes.append(size)
    return np.array(rows, np.int64), np.array(sizes, np.int64)


def check_size(size: int, where: str) -> None:
    """Check the bytes that a row group unpacks to. Raises :class:`ZpipeError` if they are too many."""
    if not 0 <= size <= MAX_GROUP_BYTES:
        raise ZpipeError(f"{where} unpacks to {size} bytes, not 0 to {MAX_GROUP_BYTES}; {SMALLER}")


def _checked_labels(labels: pa.Array, columns: Columns, where: str, first: int) -> set[str]:
    """The names of classes among the labels of some rows; whole numbers are checked, `first` is that of the first."""
    if columns.is_named:
        return set(labels.unique().to_pylist()) - {None}
    bounds = pc.min_max(labels).as_py()
    if bounds["min"] is not None and (bounds["min"] < -1 or bounds["max"] > columns.top):
        top = columns.top
        number, label = next((n, label) for n, label in enumerate(labels.to_pylist()) if not -1 <= (label or 0) <= top)
        raise ZpipeError(
            f"{where}:{first + number}: has label {label}, not one of 0 to {top}, or -1 for none; correct the file, or "
            f"give --label-column {NO_LABEL}"
        )
    return set()


def _key_of(path: str | None) -> str:
    """Key by the name of a file; empty if there is none."""
    return canonical_key(path) if path and len(path) <= MAX_PATH_LENGTH else ""


def _why_nameless(keys: Sequence[str], where: str, first: int) -> str:
    """Why a row has no key by the name of its file, if one has none."""
    for row, key in enumerate(keys, first):
        if not key:
            return f"row {row} of {where} has no name of a file"
        try:
            check_key(key, where)
        except ZpipeError:
            return f"the name of a file, {printable(key)[:80]}, makes no key"
    return ""


def why_numbered(scans: Mapping[str, Scan]) -> str:
    """Why the keys of a data set are not made from names of files, if they are not."""
    if nameless := next((scan.nameless for scan in scans.values() if scan.nameless), ""):
        return nameless
    # Different names with one hash of 64 bits count as one name: their keys are numbers, too.
    repeated = next(rows_with_repeated_hashes([scan.hashes for scan in scans.values()]), None)
    return f"names of files are repeated, in {list(scans)[repeated[0]]}" if repeated else ""
