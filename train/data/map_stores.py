"""Where the tensors of a sample come from: a store made from the same tars, or one that knows the same images.

A store that is joined by tar is read shard by shard, along with the tars. One that is joined by image may hold the
images of a tar anywhere: its values are copied once to a temporary file, and read from there.
"""

from __future__ import annotations

import math
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal, NamedTuple, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from zpipe.schemas.errors import ZpipeError, first_line, remedy_for
from zpipe.schemas.geometry import Box
from zpipe.schemas.image_digest import DIGEST_BYTES
from zpipe.schemas.image_join import DigestRows, digest_column
from zpipe.schemas.relevance_maps import RelevanceMaps, same_map
from zpipe.schemas.relevance_store import OK, STATUSES
from zpipe.schemas.shard_images import read_images, read_keys
from zpipe.schemas.storage import map_files
from zpipe.train.data.stream import Shard
from zpipe.train.data.transforms import ViewConfig

Join = Literal["tar", "image"]
ABSENT = "absent"  # status of a sample that the store does not know
EAGER_BYTES = 4096  # a sample's values up to this size are decoded with their shard, larger ones when they are used
FRAME_COLUMNS = ("frame_x1", "frame_y1", "frame_x2", "frame_y2")


class Found(NamedTuple):
    """What a store has for a sample."""

    status: str
    """Its status in the store, or `ABSENT`; only `ok` has values."""
    values: np.ndarray | None = None
    """The tensor, float32 or int32; maps of relevance min-max normalised to [0, 1] before any crop, so that a crop of
    background stays low."""
    frame: Box | None = None
    """What it covers, in source pixels; None for the whole image."""


class HeldTensors(Protocol):
    """The tensors of one tar's samples, in memory or at hand."""

    def find(self, row: int, key: str) -> Found:
        """The tensor of the sample in that row of the tar."""


class MapSource(Protocol):
    """A store, joined with the tars of a data set."""

    maps: RelevanceMaps
    """The store."""

    def usable(self) -> list[np.ndarray]:
        """The rows of each tar whose sample has a usable tensor, int32."""

    def read(self, number: int) -> HeldTensors:
        """The tensors of a tar, by its position in the list of the data set. Called ahead, in a thread."""


def check_frame(maps: RelevanceMaps, view: ViewConfig) -> None:
    """Raise :class:`ZpipeError` if what the maps of a store cover can't serve the views."""
    origin = maps.manifest.provenance
    if origin.frame == "full" or not maps.kind.is_dense:
        return
    if origin.frame != "center" or view.augment != "eval":
        raise ZpipeError(
            f"{maps.path}: maps on frame {origin.frame!r} can't serve random crops; extract on the full frame"
        )
    if view.crop_pct > origin.crop_pct + 1e-6:
        raise ZpipeError(
            f"{maps.path}: maps on the centre {origin.crop_pct:g} of the shorter side can't serve views of "
            f"{view.crop_pct:g}; lower view.crop_pct, or extract on the full frame"
        )


class TarStore:
    """A store that was made from these very tars. Memory: the maps of the tars that are in use.

    Args:
        maps: The store.
        shards: The tars.

    Raises:
        ZpipeError: The store was made from other tars.
    """

    def __init__(self, maps: RelevanceMaps, shards: Sequence[Shard]) -> None:
        self.maps, self._shards = maps, shards
        known = {shard.stem: shard for shard in maps.manifest.shards}
        for shard in shards:
            stored = known.get(shard.entry.stem)
            other = "extract again, give the right store, or join by image (--join image)"
            if stored is None:
                raise ZpipeError(f"{maps.path}: has no maps for {shard.path}; {other}")
            # The digest of a tar without an index is unknown; its keys are compared when it is read.
            if shard.entry.sha256 and stored.input_sha256 != shard.entry.sha256:
                raise ZpipeError(
                    f"{maps.path}: made from a {shard.path.name} with SHA-256 {stored.input_sha256[:12]}, "
                    f"{shard.path} has {shard.entry.sha256[:12]}; {other}"
                )
            if stored.count != shard.entry.count:
                raise ZpipeError(
                    f"{maps.path}: made from a {shard.path.name} of {stored.count} samples, {shard.path} has "
                    f"{shard.entry.count}; {other}"
                )

    def usable(self) -> list[np.ndarray]:
        """See `MapSource`. Reads one column of each shard's index."""
        tables = map_files(
            self.maps.path, lambda shard: self.maps.index(shard.entry.stem, ["status"]), list(self._shards)
        )
        usable = (table["status"].to_numpy(zero_copy_only=False) == OK for table in tables)
        return [np.flatnonzero(rows).astype(np.int32) for rows in usable]

    def read(self, number: int) -> _TarTensors:
        """See `MapSource`."""
        stem, maps = self._shards[number].entry.stem, self.maps
        centre = maps.manifest.provenance.frame != "full" and maps.kind.is_dense
        table = maps.index(stem, ["key", "status", "scale", *(FRAME_COLUMNS if centre else ())])
        scale = table["scale"].to_numpy()
        stored = maps.stored_shard(stem, table)
        is_small = math.prod(stored.shape[1:]) * stored.itemsize <= EAGER_BYTES
        return _TarTensors(
            maps,
            stored,
            scale,
            maps.decoded(stored, scale) if is_small else None,
            table["status"].to_pylist(),
            {key: row for row, key in enumerate(table["key"].to_pylist())},
            _frames(table) if centre else None,
        )


@dataclass
class _TarTensors:
    maps: RelevanceMaps
    stored: np.ndarray  # [n, ...], in the order of the index
    scale: np.ndarray  # [n]
    decoded: np.ndarray | None  # [n, ...]
    statuses: list[str]
    row_of: dict[str, int]
    frames: np.ndarray | None  # [n, 4]

    def find(self, row: int, key: str) -> Found:
        place = self.row_of.get(key)
        if place is None or self.statuses[place] != OK:
            return Found(ABSENT if place is None else self.statuses[place])
        if self.decoded is not None:
            values = self.decoded[place]
        else:
            values = self.maps.decoded(self.stored[place : place + 1], self.scale[place : place + 1])[0]
        return Found(OK, values, _frame(self.frames, place))


class ImageStore:
    """A store that is searched by the digests of images. About 100 bytes of memory per image, and the temporary file.

    Args:
        maps: The store.
        shards: The tars.
        folder: Folder of their `shards.json`.

    Raises:
        ZpipeError: Digests are missing, or an image has several maps of which none is its own.
    """

    def __init__(self, maps: RelevanceMaps, shards: Sequence[Shard], folder: Path) -> None:
        self.maps, self._shards, self._folder = maps, shards, folder
        centre = maps.manifest.provenance.frame != "full" and maps.kind.is_dense
        digests, labels = np.empty((len(maps), DIGEST_BYTES), np.uint8), np.empty(len(maps), np.int32)
        self._scale, self._status = np.empty(len(maps), np.float32), np.empty(len(maps), np.int8)
        self._frames = np.empty((len(maps), 4), np.float32) if centre else None
        names = ["image_digest", "label", "status", "scale", *(FRAME_COLUMNS if centre else ())]
        tables = map_files(maps.path, lambda shard: maps.index(shard.stem, names), maps.manifest.shards)
        for rows, table in zip(_spans(shard.count for shard in maps.manifest.shards), tables, strict=True):
            digests[rows], labels[rows] = digest_column(table["image_digest"]), table["label"].to_numpy()
            self._scale[rows] = table["scale"].to_numpy()
            self._status[rows] = pc.index_in(table["status"], pa.array(STATUSES)).to_numpy()
            if self._frames is not None:
                self._frames[rows] = _frames(table)
        known, count = DigestRows(digests), sum(shard.entry.count for shard in shards)
        digests, wanted = np.empty((count, DIGEST_BYTES), np.uint8), np.empty(count, np.int32)
        images = map_files(folder, lambda shard: read_images(folder, shard.entry), list(shards))
        for rows, (label, digest) in zip(_spans(shard.entry.count for shard in shards), images, strict=True):
            wanted[rows], digests[rows] = label, digest
        matches = known.match(labels, digests, wanted)
        self._ends = np.cumsum([shard.entry.count for shard in shards], dtype=np.int64)
        self._rows = matches.rows
        for image, candidates in matches.doubtful:
            self._check_alike(image, candidates)
        found = self._rows >= 0
        self.count, self.found = len(self._rows), int(found.sum())
        other = labels[self._rows[found]] != wanted[found]
        self.relabelled = int((other & (labels[self._rows[found]] >= 0) & (wanted[found] >= 0)).sum())

    def _check_alike(self, image: int, rows: np.ndarray) -> None:
        """Check that these rows of the store, which are one image, have the same map."""
        first = self.maps.row(int(rows[0]))
        for row in rows[1:].tolist():
            if not same_map(first, self.maps.row(row)):
                keys = [self.maps.key_of_row(int(one)) for one in (rows[0], row)]
                raise ZpipeError(
                    f"{self.maps.path}: keys {keys[0]} and {keys[1]} have different maps of the image that is "
                    f"{self._name(image)}, and its label does not decide; leave one out, or join by tar"
                )

    def _name(self, image: int) -> str:
        number = int(np.searchsorted(self._ends, image, side="right"))
        entry = self._shards[number].entry
        return f"{entry.name}: key {read_keys(self._folder, entry)[image - self._begin(number)]}"

    def _begin(self, number: int) -> int:
        return int(self._ends[number]) - self._shards[number].entry.count

    @property
    def first_missing(self) -> str:
        """Tar and key of the first image without a map."""
        return self._name(int(np.flatnonzero(self._rows < 0)[0]))

    def usable(self) -> list[np.ndarray]:
        """See `MapSource`."""
        usable = (self._status[self._rows] == STATUSES.index(OK)) & (self._rows >= 0)
        return [np.flatnonzero(rows).astype(np.int32) for rows in np.split(usable, self._ends[:-1])]

    def read(self, number: int) -> _ImageTensors:
        """See `MapSource`."""
        rows = self._rows[self._begin(number) : int(self._ends[number])]
        return _ImageTensors(self, rows)

    def find(self, row: int) -> Found:
        """The tensor in a row of the store; -1 for none."""
        if row < 0:
            return Found(ABSENT)
        status = STATUSES[self._status[row]]
        if status != OK:
            return Found(status)
        values = self.maps.decoded(np.asarray(self._values[row : row + 1]), self._scale[row : row + 1])[0]
        return Found(OK, values, _frame(self._frames, row))

    def copy(self) -> None:
        """Copy the values to a temporary file, in the order of the store; data-loading processes share it.

        Raises:
            ZpipeError: It does not fit onto the disk, or the store can't be read.
        """
        _ = self._values

    @cached_property
    def _values(self) -> np.ndarray:
        """The values as they are stored, [N, ...], mapped from a file that has no name and ends with its users."""
        origin = self.maps.manifest.provenance
        shape = (len(self.maps), *origin.sample_shape)
        size, folder = math.prod(shape) * self.maps.kind.dtype.itemsize, tempfile.gettempdir()
        if not size:
            return np.zeros(shape, self.maps.kind.dtype)
        free = shutil.disk_usage(folder).free
        if size > free:
            raise ZpipeError(
                f"{folder}: {free / 1e9:.1f} GB are free, joining {self.maps.path} by image takes {size / 1e9:.1f}; "
                "set TMPDIR to a larger disk, or join by tar"
            )
        try:
            with tempfile.TemporaryFile(prefix="zpipe-") as file:
                # Not through the map: a full disk would kill the process.
                for shard in self.maps.manifest.shards:
                    stored = self.maps.stored_shard(shard.stem, self.maps.index(shard.stem, ["scale"]))
                    file.write(np.ascontiguousarray(stored).data)
                file.flush()
                return np.memmap(file, self.maps.kind.dtype, mode="r", shape=shape)
        except OSError as error:
            raise ZpipeError(f"{folder}: can't be written ({first_line(error)}); {remedy_for(error)}") from error


@dataclass
class _ImageTensors:
    store: ImageStore
    rows: np.ndarray  # [n], of the store

    def find(self, row: int, key: str) -> Found:
        return self.store.find(int(self.rows[row]))


def _spans(counts: Iterable[int]) -> Iterator[slice]:
    """Where parts of these lengths lie, one after the other."""
    end = 0
    for count in counts:
        end += count
        yield slice(end - count, end)


def _frames(table: pa.Table) -> np.ndarray:
    return np.stack([table[name].to_numpy() for name in FRAME_COLUMNS], axis=1)  # [n, 4]


def _frame(frames: np.ndarray | None, row: int) -> Box | None:
    return None if frames is None else Box(*(float(edge) for edge in frames[row]))
