"""CIFAR-10 and Oxford Flowers-102 from the files that their authors publish.

Archives are read into memory: names in them never become paths, and links in them are not followed. Nothing is
unpickled.
"""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Collection
from pathlib import Path
from typing import ClassVar

import numpy as np
from PIL import Image

from zpipe.pipeline.mat_file import read_numbers
from zpipe.pipeline.sources import (
    NumberedSource,
    Record,
    Rejected,
    choose_split,
    read_record,
    record_of,
    refuse_repeated,
)
from zpipe.schemas.errors import UsageError, ZpipeError
from zpipe.schemas.shard_index import digest_keys
from zpipe.schemas.storage import read_file
from zpipe.schemas.tar_file import read_packed

MAX_UNPACKED_BYTES = 1 << 31  # the published archives unpack to 186 and 349 MB


class Cifar10Source(NumberedSource):
    """CIFAR-10's binary version: `cifar-10-binary.tar.gz`, or the folder that it unpacks to. Labels are 0 to 9.

    Each batch is a sequence of records: a label of one byte, then 3,072 bytes of a 32 x 32 image, channel by channel.
    The pixels are written as PNG, which is lossless. The split `val` is the official test batch. A key is the split and
    the position in it, `train-00000`. The split is held in memory, 154 MB at most.

    The Python version is not read: it is a pickle, which may run code when it is opened, and holds the same images.

    Args:
        path: The archive or its folder.
        split: ``train`` or ``val``.
        shard_size: Images per part.
        shuffle_seed: Seed of the order of images; None keeps the order of the source.
        check: Whether images that keep their bytes are decoded as a check.

    Raises:
        UsageError: The path is absent, or an argument makes no sense.
        ZpipeError: The archive or a batch is not whole.
    """

    name = "cifar10"
    SPLITS: ClassVar = {"train": tuple(f"data_batch_{i}.bin" for i in range(1, 6)), "val": ("test_batch.bin",)}
    FOLDER, ARCHIVE, NAMES = "cifar-10-batches-bin", "cifar-10-binary.tar.gz", "batches.meta.txt"
    SIDE, BATCH, NUM_CLASSES = 32, 10_000, 10
    RECORD = 1 + 3 * SIDE * SIDE  # bytes

    def __init__(
        self, path: Path, *, split: str, shard_size: int, shuffle_seed: int | None, check: bool = True
    ) -> None:
        choose_split(self.name, split, self.SPLITS)
        names = self.SPLITS[split]
        where, files = self._read(path, (*names, self.NAMES))
        self.classes = tuple(files[self.NAMES].decode("ascii", "replace").split())
        if len(self.classes) != self.NUM_CLASSES:
            raise ZpipeError(
                f"{where}: its {self.NAMES} names {len(self.classes)} classes, not {self.NUM_CLASSES}; fetch it again"
            )
        refuse_repeated(self.classes, f"{where}: its {self.NAMES}")
        self._batches = {name: self._records_of(name, files[name], where) for name in names}
        self._places = [(name, row) for name in names for row in range(len(self._batches[name]))]
        self._split = split
        expected = self.BATCH * len(names)
        if len(self._places) != expected:
            self.warning = f"{where}: {len(self._places)} images; CIFAR-10's {split} split has {expected}"
        super().__init__(path, split, len(self._places), shard_size, shuffle_seed, check=check)

    def _read(self, path: Path, wanted: tuple[str, ...]) -> tuple[Path, dict[str, bytes]]:
        """The archive or folder, and its files of these names."""
        _check_there(path, f"give {self.ARCHIVE} or the folder it unpacks to")
        largest = self.BATCH * self.RECORD
        folder = next((folder for folder in (path, path / self.FOLDER) if (folder / wanted[0]).is_file()), None)
        if folder is not None:
            where = folder
            files = {name: _read(folder / name, largest) for name in wanted if (folder / name).is_file()}
        else:
            where = path / self.ARCHIVE if path.is_dir() and (path / self.ARCHIVE).is_file() else path
            files = read_archive(where, self.FOLDER, wanted, largest) if where.is_file() else {}
        for name in wanted:
            if name not in files:
                raise ZpipeError(
                    f"{where}: has no {self.FOLDER}/{name}; give {self.ARCHIVE}, CIFAR-10's binary version, "
                    "or its folder (the Python version is a pickle, which may run code, and isn't read)"
                )
        return where, files

    def _records_of(self, name: str, data: bytes, where: Path) -> np.ndarray:
        if not data or len(data) % self.RECORD:
            raise ZpipeError(
                f"{where}: its {name} has {len(data)} bytes, not a whole number of records of {self.RECORD}; "
                "fetch it again"
            )
        records = np.frombuffer(data, np.uint8).reshape(-1, self.RECORD)
        wrong = np.flatnonzero(records[:, 0] >= self.NUM_CLASSES)
        if len(wrong):
            raise ZpipeError(
                f"{where}: record {wrong[0]} of its {name} has label {records[wrong[0], 0]}, CIFAR-10's end at 9; "
                "fetch it again"
            )
        return records

    def digest(self) -> str:
        """See `NumberedSource`."""
        digest = hashlib.sha256()
        for records in self._batches.values():
            digest.update(records.data)
        return digest.hexdigest()

    def record(self, number: int) -> Record:
        """See `NumberedSource`."""
        name, row = self._places[number]
        record = self._batches[name][row]
        pixels = record[1:].reshape(3, self.SIDE, self.SIDE).transpose(1, 2, 0)  # [H, W, 3]
        buffer = io.BytesIO()
        Image.fromarray(np.ascontiguousarray(pixels)).save(buffer, "PNG")
        meta = {"width": self.SIDE, "height": self.SIDE, "source": f"{name}:{row}"}
        key = f"{self._split}-{number:05d}"
        return Record(key=key, suffix="png", image=buffer.getvalue(), label=int(record[0]), meta=meta)


class Flowers102Source(NumberedSource):
    """Oxford Flowers-102: a folder with `imagelabels.mat`, `setid.mat`, and `102flowers.tgz` or its folder `jpg/`.

    The splits are those of `setid.mat`: train (trnid), val (valid), test (tstid), trainval (trnid, then valid). The
    files number the classes from 1 and name none: class `"1"` of `shards.json` has label 0. Keys are the file names,
    `image_00001`. JPEGs keep their bytes. Images from the archive are held in memory, 250 MB per split at most; those
    of `jpg/` are not.

    Args:
        path: The folder, or the archive in it.
        split: ``train``, ``val``, ``test`` or ``trainval``.
        shard_size: Images per part.
        shuffle_seed: Seed of the order of images; None keeps the order of the source.
        check: Whether images that keep their bytes are decoded as a check.

    Raises:
        UsageError: The path is absent, or an argument makes no sense.
        ZpipeError: A file is not whole, or an image is missing.
    """

    name = "flowers102"
    classes = tuple(str(number) for number in range(1, 103))
    SPLITS: ClassVar = {"train": ("trnid",), "val": ("valid",), "test": ("tstid",), "trainval": ("trnid", "valid")}
    FOLDER, ARCHIVE, LABELS, SPLIT_FILE = "jpg", "102flowers.tgz", "imagelabels.mat", "setid.mat"
    LARGEST = 16 << 20  # bytes of an image; the official ones are far smaller

    def __init__(
        self, path: Path, *, split: str, shard_size: int, shuffle_seed: int | None, check: bool = True
    ) -> None:
        choose_split(self.name, split, self.SPLITS)
        lists = self.SPLITS[split]
        _check_there(path, f"give the folder that holds {self.ARCHIVE}, {self.LABELS} and {self.SPLIT_FILE}")
        root = path.parent if path.is_file() else path
        labels = _read_lists(root / self.LABELS, ("labels",), len(self.classes))["labels"]
        ids = _read_lists(root / self.SPLIT_FILE, lists, len(labels))
        numbers = np.concatenate([ids[name] for name in lists])
        if len(np.unique(numbers)) != len(numbers):
            raise ZpipeError(
                f"{root / self.SPLIT_FILE}: {' and '.join(lists)} list an image more than once; fetch it again"
            )
        self._files = [f"image_{number:05d}.jpg" for number in numbers]
        self._labels = (labels[numbers - 1] - 1).tolist()
        self._folder, self._archived = self._find(path, frozenset(self._files))
        super().__init__(path, split, len(self._files), shard_size, shuffle_seed, check=check)

    def _find(self, path: Path, wanted: frozenset[str]) -> tuple[Path, dict[str, bytes]]:
        """The folder or archive of the images, and their bytes if it is an archive."""
        where = path / self.FOLDER if path.is_dir() else path
        if path.is_dir() and not where.is_dir():
            where = path / self.ARCHIVE
            _check_there(where, f"put it there, or what it unpacks to, {self.FOLDER}/")
        archived = read_archive(where, self.FOLDER, wanted, self.LARGEST) if where.is_file() else {}
        missing = sorted(wanted - (set(archived) if where.is_file() else set(os.listdir(where))))
        if missing:
            raise ZpipeError(
                f"{where}: lacks {len(missing)} of the images that {self.SPLIT_FILE} lists, {missing[0]} the first; "
                f"give the whole of {self.ARCHIVE}"
            )
        return where, archived

    def digest(self) -> str:
        """See `NumberedSource`."""
        # Like a folder source, it is identified by its files and their labels.
        return digest_keys(f"{file}\t{label}" for file, label in zip(self._files, self._labels, strict=True))

    def record(self, number: int) -> Record | Rejected:
        """See `NumberedSource`."""
        name = self._files[number]
        file, key, label = f"{self.FOLDER}/{name}", name.removesuffix(".jpg"), self._labels[number]
        if self._archived:
            return record_of(self._archived[name], file, key=key, label=label, check=self._check)
        return read_record(self._folder / name, file, key=key, label=label, check=self._check)


def _read(path: Path, largest: int) -> bytes:
    try:
        return read_file(path, largest)
    except OSError as error:
        raise ZpipeError(f"{path}: can't be read ({error.strerror}); fetch it again") from error


def _check_there(path: Path, remedy: str) -> None:
    if not path.exists():
        raise UsageError(f"{path}: no such file or folder; {remedy}")


def read_archive(path: Path, folder: str, wanted: Collection[str], largest: int) -> dict[str, bytes]:
    """The contents of the plain files `folder`/name of a .tar.gz, for each wanted name that it holds, by name."""
    contents: dict[str, bytes] = {}

    def place(member: str) -> str:
        parent, _, name = member.removeprefix("./").rpartition("/")
        return name if parent == folder and name in wanted else ""

    for member in read_packed(
        path, lambda member: bool(place(member)), largest=largest, max_bytes=MAX_UNPACKED_BYTES, remedy="fetch it again"
    ):
        if member.data is not None:
            name = place(member.name)
            if name in contents:
                raise ZpipeError(f"{path}: holds {name} twice; fetch it again")
            contents[name] = member.data
    return contents


def _read_lists(path: Path, names: tuple[str, ...], top: int) -> dict[str, np.ndarray]:
    """Variables of a MATLAB file, each as int64 [N], whole numbers from 1 to `top`."""
    variables = read_numbers(path)
    lists = {}
    for name in names:
        values = variables.get(name, np.empty(0))
        if not values.size or not np.all((values >= 1) & (values <= top) & (values == np.rint(values))):
            raise ZpipeError(f"{path}: its {name!r} is not a list of whole numbers from 1 to {top}; fetch it again")
        lists[name] = values.astype(np.int64)
    return lists
