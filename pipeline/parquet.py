"""Image data sets in Parquet, such as those of the Hugging Face Hub, as a source of shards.

A row group is the unit of reading. In memory are the row groups of one tar; while a data set is opened, also 24 bytes
for each of its images, by which names are compared; and of a remote data set the footer of each file, some 100 kB.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from zpipe.pipeline.imagenet_names import canonical_key
from zpipe.pipeline.parquet_columns import Columns, check_classes, choose_columns, shown
from zpipe.pipeline.parquet_files import find_parquet, reading
from zpipe.pipeline.parquet_scan import (
    ROWS_AT_ONCE,
    SMALLER,
    Scan,
    begins_like_image,
    bytes_and_path,
    check_size,
    files_beside,
    first_value,
    scan_file,
    why_numbered,
)
from zpipe.pipeline.sources import (
    MAX_IMAGE_BYTES,
    Record,
    Rejected,
    altered,
    check_seed,
    record_of,
    state_of,
    unchecked,
)
from zpipe.schemas.errors import UsageError, ZpipeError
from zpipe.schemas.shard_index import digest_keys
from zpipe.schemas.storage import is_remote, map_files, open_file

MAX_PART_BYTES = 1 << 33  # of the row groups of one tar
MAX_TEXT_BYTES = 1 << 10  # of a plain value
RECORDS_AT_ONCE = 64


class _Group(NamedTuple):
    """A row group."""

    file: str
    """Its file, by its path below the root."""
    number: int
    """Its number in the file."""
    rows: int
    """How many rows it has."""
    size: int
    """Bytes, unpacked, as for `Scan.sizes`."""
    first: int
    """Number of its first row in the data set."""
    first_in_file: int
    """Number of its first row in its file."""


class ParquetSource:
    """A split of an image data set in Parquet files.

    Images keep their bytes. An image of ImageNet has its published name as key, any other the name of its file (of the
    `path` of the column of images); where a name is missing or repeated, all keys are the split and the number of the
    row, ``train-00000000``. Plain values of other columns go into `key.json`. A label of -1 or null is none.

    The order is drawn in three steps: of all row groups, of the rows in each of them, and of the images in each part.
    A part holds whole row groups but for its first and last, so that each is read about once.

    Args:
        path: A file, or a folder of files; a path or a URL.
        split: The split, by the name in use for it: ``val`` finds ``validation``.
        shard_size: Images per part.
        shuffle_seed: Seed of the order of images; None keeps the order of the source.
        image_column: Name of the column of images; None to find it by its content.
        label_column: Name of the column of labels; None to find it by its name or the metadata, ``none`` for none.
        check: Whether images are decoded as a check.

    Raises:
        UsageError: There is no such data set, split or column, or several can be meant.
        ZpipeError: A file is damaged or cannot be read, a label is none, or a row group is too large.
    """

    def __init__(
        self,
        path: Path,
        *,
        split: str,
        shard_size: int,
        shuffle_seed: int | None,
        image_column: str | None = None,
        label_column: str | None = None,
        check: bool = True,
    ) -> None:
        if shuffle_seed is not None:
            check_seed(shuffle_seed)
        self._path, self._shard_size, self._seed, self._check = path, shard_size, shuffle_seed, check
        found = find_parquet(path, split)
        self._root, self._split, self._sizes = found.root, found.split, found.sizes
        self._footers: dict[str, pq.FileMetaData] = {}
        self._states: dict[str, tuple[int, ...]] = {}
        self._columns = self._choose_columns(image_column, label_column)
        names = list(self._sizes)
        scans = dict(zip(names, map_files(self._root, self._scan, names), strict=True))
        named = {name for scan in scans.values() for name in scan.classes}
        self.classes = tuple(sorted(named)) if self._columns.is_named else self._columns.classes
        check_classes(self.classes, str(path))
        self._label_of = {name: label for label, name in enumerate(self.classes)}
        self._unnamed = why_numbered(scans)
        self._groups = _groups_in(scans)
        self._draw_order()
        content = [scan.content for scan in scans.values()]
        self._listing = digest_keys(
            [*map(repr, self._sizes.items()), *map(repr, self._groups), *content, *self.classes]
        )
        self.warning = "; ".join(filter(None, (found.warning, *self._warnings())))
        self._last: dict[int, pa.Table] = {}  # the last row group of a part, which the next part begins with

    def _draw_order(self) -> None:
        """Draw the order of the row groups, and check what the parts will take."""
        count = len(self._groups)
        self._order = np.arange(count) if self._seed is None else np.random.default_rng(self._seed).permutation(count)
        rows, sizes = (
            np.array([getattr(self._groups[group], what) for group in self._order], np.int64)
            for what in ("rows", "size")
        )
        # The place of each row group's first image in this order, and the number of images.
        self._starts = np.concatenate([[0], np.cumsum(rows)])
        self._count = int(self._starts[-1])
        if not self._count:
            raise UsageError(f"{self._path}: its files hold no rows; give another data set")
        upto = np.concatenate([[0], np.cumsum(sizes)])
        largest = max(int(upto[last + 1] - upto[first]) for first, last in map(self._ends_of, range(self.parts())))
        self._check_part(largest)

    def _check_part(self, size: int) -> None:
        if size > MAX_PART_BYTES:
            raise ZpipeError(
                f"{self._path}: the row groups of one tar unpack to {size} bytes, more than {MAX_PART_BYTES}; give a "
                f"smaller --shard-size, or {SMALLER}"
            )

    def _ends_of(self, part: int) -> tuple[int, int]:
        """The places of the first and the last row group of a part in the order."""
        start, stop = part * self._shard_size, min((part + 1) * self._shard_size, self._count)
        return int(np.searchsorted(self._starts, start, "right")) - 1, int(np.searchsorted(self._starts, stop)) - 1

    def _warnings(self) -> Iterator[str]:
        if self._unnamed:
            yield f"{self._path}: {self._unnamed}, so that all keys are numbers of rows, {self._key(0, None)}"
        if self._columns.label is None:
            yield f"{self._path}: without labels; --label-column names a column that has them"
        if self._columns.is_named:
            yield f"{self._path}: {len(self.classes)} classes, numbered as they occur in this split"
        if self._columns.left_out:
            yield f"{self._path}: columns that are left out: {shown(self._columns.left_out)}"

    def describe(self) -> dict[str, Any]:
        """See `Source`."""
        return {
            "source": f"parquet:{self._path}",
            "split": self._split,
            "shard_size": self._shard_size,
            "shuffle_seed": self._seed,
            "image_column": self._columns.image,
            "label_column": self._columns.label,
            "keys": "row" if self._unnamed else "stem",
            **unchecked(self._check),
            "listing_sha256": self._listing,
        }

    def parts(self) -> int:
        """See `Source`."""
        return -(-self._count // self._shard_size)

    def records(self, part: int) -> Iterator[Record | Rejected]:
        """See `Source`."""
        order = self._order_of(part)
        first, last = self._ends_of(part)
        groups = [int(group) for group in self._order[first : last + 1]]
        tables, self._last = {group: self._last[group] for group in groups if group in self._last}, {}
        missing = [group for group in groups if group not in tables]
        size = 0
        for group, table in zip(missing, map_files(self._root, self._read_group, missing), strict=True):
            tables[group] = table
            size += table.nbytes
            self._check_part(size)  # a file may state less than it holds
        self._last = {groups[-1]: tables[groups[-1]]}
        # PIL releases the interpreter lock. The images of a few records at a time are copied out of the row groups.
        with ThreadPoolExecutor(max_workers=os.cpu_count() or 1) as pool:
            for start in range(0, len(order), RECORDS_AT_ONCE):
                few = order[start : start + RECORDS_AT_ONCE]
                yield from pool.map(lambda place: self._record(tables[place[0]], *place), few)

    def _order_of(self, part: int) -> list[tuple[int, int]]:
        """Row group and row of each image of a part."""
        start, stop = part * self._shard_size, (part + 1) * self._shard_size
        first, last = self._ends_of(part)
        places: list[tuple[int, int]] = []
        for place in range(first, last + 1):
            group, before = int(self._order[place]), int(self._starts[place])
            rows = np.arange(self._groups[group].rows)
            if self._seed is not None:
                rows = np.random.default_rng([self._seed, 1, group]).permutation(rows)
            places += [(group, row) for row in rows[max(start - before, 0) : stop - before].tolist()]
        if self._seed is None:
            return places
        return [places[i] for i in np.random.default_rng([self._seed, 2, part]).permutation(len(places))]

    @contextmanager
    def _opened(self, name: str, **options: Any) -> Iterator[pq.ParquetFile]:
        path = self._root / name
        options |= {"page_checksum_verification": True, "metadata": self._footers.get(name)}
        with reading(path), _open(path, self._sizes[name]) as file:
            # If the file was replaced since it was scanned, its labels have not been checked. Object stores have no
            # state to compare; there, each label is compared when it is used.
            if not is_remote(path) and self._states.setdefault(name, state_of(file)) != state_of(file):
                raise altered(path)
            with pq.ParquetFile(file, **options) as parquet:
                if is_remote(path):
                    self._footers[name] = parquet.metadata
                yield parquet

    def _choose_columns(self, image: str | None, label: str | None) -> Columns:
        name = next(iter(self._sizes))
        where = str(self._root / name)
        # With a buffer, a first value takes a page, some 1 MB, and not the whole of its row group.
        with self._opened(name, pre_buffer=False, buffer_size=1 << 16) as file:
            value_of = cache(partial(first_value, file))
            columns = choose_columns(
                file.schema_arrow,
                where,
                image=image,
                label=label,
                is_image=lambda column: begins_like_image(*value_of(column)),
            )
            data, path = value_of(columns.image)
            if not data and path:
                raise files_beside(where, path)
        return columns

    def _scan(self, name: str) -> Scan:
        with self._opened(name) as file:
            return scan_file(file, self._columns, str(self._root / name), next(iter(self._sizes)))

    def _read_group(self, number: int) -> pa.Table:
        group = self._groups[number]
        where = f"{self._root / group.file}: row group {group.number}"
        batches, size = [], 0
        with self._opened(group.file) as file:
            columns = list(self._columns.types)
            for batch in file.iter_batches(batch_size=ROWS_AT_ONCE, row_groups=[group.number], columns=columns):
                size += batch.nbytes
                check_size(size, where)
                batches.append(batch)
        if sum(batch.num_rows for batch in batches) != group.rows:
            raise ZpipeError(f"{where}: has other than the {group.rows} rows that it says; fetch it again")
        return pa.Table.from_batches(batches)

    def _record(self, table: pa.Table, number: int, row: int) -> Record | Rejected:
        group, columns = self._groups[number], self._columns
        where = f"{group.file}:{group.first_in_file + row}"
        with reading(f"{self._root}/{where}"):
            image = table[columns.image][row].as_py()
            value = table[columns.label][row].as_py() if columns.label else None
            values = {name: table[name][row].as_py() for name in columns.values}
        data, path = bytes_and_path(image)
        if not data:
            if path:
                raise files_beside(f"{self._root}/{where}", path)
            return Rejected(file=where, reason="has no image")
        if len(data) > MAX_IMAGE_BYTES:
            return Rejected(file=where, reason=f"has more than {MAX_IMAGE_BYTES} bytes")
        label = self._label_of.get(value, -2) if columns.is_named and value is not None else value
        if label is not None and not -1 <= label <= columns.top:  # all labels were checked before
            raise altered(f"{self._root}/{where}")
        label = None if label == -1 else label
        record = record_of(data, where, key=self._key(group.first + row, path), label=label, check=self._check)
        if isinstance(record, Rejected):
            return record
        meta, notes = _plain_values(values)
        if columns.label and label is None:
            notes.append("without a label")
        named = {"path": path} if path and len(path.encode()) <= MAX_TEXT_BYTES else {}
        return replace(record, meta=record.meta | named | meta, notes=(*record.notes, *notes))

    def _key(self, number: int, path: str | None) -> str:
        if self._unnamed or path is None:
            return f"{self._split.replace('.', '_').replace('/', '_')}-{number:08d}"
        return canonical_key(path)


def _open(path: Path, size: int) -> BinaryIO:
    if not is_remote(path):
        return open_file(path)
    remote: Any = path
    # pyarrow asks for what it needs; a cache would read more than that. The size spares a request.
    opened: BinaryIO = remote.fs.open(remote.path, "rb", cache_type="none", size=size)
    return opened


def _groups_in(scans: Mapping[str, Scan]) -> list[_Group]:
    """The row groups of all files that have rows; others would be in no part."""
    groups = []
    first = 0
    for name, scan in scans.items():
        first_in_file = 0
        for number, (rows, size) in enumerate(zip(scan.rows.tolist(), scan.sizes.tolist(), strict=True)):
            if rows:
                groups.append(_Group(name, number, rows, size, first, first_in_file))
            first += rows
            first_in_file += rows
    return groups


def _plain_values(values: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """What of the plain values of a row goes into `key.json`, and notes on what does not."""
    kept, notes = {}, []
    for name, value in values.items():
        if isinstance(value, str) and len(value.encode()) > MAX_TEXT_BYTES:
            notes.append(f"with a text of more than {MAX_TEXT_BYTES} bytes (left out)")
        elif isinstance(value, float) and not math.isfinite(value):
            notes.append("with a number that is not finite (left out)")
        elif value is not None:
            kept[name] = value
    return kept, notes
