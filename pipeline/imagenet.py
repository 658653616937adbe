"""ImageNet (ILSVRC 2012) as a source of shards, from whichever of its packagings lies on the disk.

A folder holds the official archives, Kaggle's tree, or an unpacked tree. All give the same keys, labels and class
names; the images are in the order of their keys before they are shuffled. So the same images with the same boxes give
the same tars, byte for byte. Memory holds some 210 bytes an image, its boxes included, and 260 while they are listed.
"""

from __future__ import annotations

import hashlib
import os
from array import array
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import ClassVar, Protocol

import numpy as np

from zpipe.pipeline.image_folder import find_images
from zpipe.pipeline.imagenet_archives import ArchiveImages, find_archive
from zpipe.pipeline.imagenet_boxes import (
    BoxTable,
    LabelledBox,
    box_meta,
    read_box_archive,
    read_solutions,
    read_xml,
)
from zpipe.pipeline.imagenet_devkit import KIT, NUM_VAL, read_devkit
from zpipe.pipeline.imagenet_names import NUM_CLASSES, WNID, canonical_key, labels, wnids
from zpipe.pipeline.sources import NumberedSource, Record, Rejected, choose_split, read_record
from zpipe.pipeline.voc_xml import MAX_XML_BYTES
from zpipe.schemas.account import Account
from zpipe.schemas.errors import UsageError, ZpipeError
from zpipe.schemas.names import check_key, printable
from zpipe.schemas.storage import read_file

KAGGLE_DATA, KAGGLE_BOXES = Path("ILSVRC", "Data", "CLS-LOC"), Path("ILSVRC", "Annotations", "CLS-LOC")
NESTED = "folder inside a class"
BOX_ARCHIVES = {"train": "ILSVRC2012_bbox_train_v2.tar.gz", "val": "ILSVRC2012_bbox_val_v3.tgz"}


class _Images(Protocol):
    """The images of one split, numbered as they were found."""

    names: list[str]
    labels: array[int]
    sizes: array[int]

    def record(self, number: int, *, key: str, label: int | None, check: bool) -> Record | Rejected: ...


class ImageNetSource(NumberedSource):
    """ImageNet's 1,000 classes: a folder with the official archives, Kaggle's tree, or an unpacked tree.

    A label is the index of the class among the sorted wnids, also if only some classes are there; the test split has
    no labels. Boxes are read from `LOC_*_solution.csv`, `ILSVRC2012_bbox_*`, or Kaggle's XML files, the first of these
    that is there; `key.json` has them as `boxes` and `box_labels`, and a single one as `box`.

    Args:
        path: The folder.
        split: ``train``, ``val`` or ``test``.
        shard_size: Images per part.
        shuffle_seed: Seed of the order of images; None takes them in the order of their keys.
        check: Whether images that keep their bytes are decoded as a check.

    Raises:
        UsageError: The folder holds nothing of this split, or an argument makes no sense.
        ZpipeError: A file is not ImageNet's or not whole, or the labels of the validation images are missing.
    """

    name = "imagenet"
    SPLITS: ClassVar = {"train": 1_281_167, "val": NUM_VAL, "test": 100_000}

    def __init__(
        self, path: Path, *, split: str, shard_size: int, shuffle_seed: int | None, check: bool = True
    ) -> None:
        choose_split(self.name, split, self.SPLITS)
        self.classes = wnids()
        self.account = Account()
        """What is no image."""
        self._split = split
        self.rejected: tuple[Rejected, ...] = ()
        """Images in no part."""
        self._images, what, used = self._find(path, split)
        keys = self._sort(path)
        self._table: BoxTable | None = None
        self._xml_folder: Path | None = None
        if split == "val":
            used += self._label(path, keys)
        if split != "test":
            used += self._find_boxes(path, keys)
        self.note = f"{path}: {what} ({', '.join(dict.fromkeys(used))})"
        """What the folder was taken for, and which of its files are used."""
        self.warning = "; ".join(filter(None, (self._incomplete(path), self._nested(path))))
        super().__init__(path, split, len(keys), shard_size, shuffle_seed, check=check)

    def _find(self, path: Path, split: str) -> tuple[_Images, str, list[str]]:
        """The images, the kind of packaging, and what of it is used."""
        if path.is_dir() and (archive := find_archive(path, split)) is not None:
            images = ArchiveImages(archive, split)
            return images, "the official archives", [archive.name]
        for below, what in ((KAGGLE_DATA, "Kaggle's tree"), (Path(), "an unpacked tree")):
            if (path / below / split).is_dir():
                tree = _TreeImages(path / below / split, split, self.account)
                self.rejected = tuple(tree.rejected)
                return tree, what, [f"{below / split}/"]
        raise UsageError(
            f"{path}: holds nothing of ImageNet's {split} split; give the folder with ILSVRC2012_img_{split}.tar, with "
            f"Kaggle's ILSVRC/, or with {split}/"
        )

    def _sort(self, path: Path) -> list[str]:
        """Number the images in the order of their keys; the keys."""
        names = self._images.names
        if not names:
            raise UsageError(f"{path}: holds no image of ImageNet's {self._split} split; give the folder above it")
        found = np.array([canonical_key(name) for name in names], object)
        self._places = np.argsort(found, kind="stable")
        keys: list[str] = found[self._places].tolist()
        before = ""
        for key, place in zip(keys, self._places, strict=True):
            check_key(key, f"{path}: {printable(names[place])}")
            if key == before:
                raise ZpipeError(
                    f"{path}: {printable(names[place])} has the key {key!r} of another image; remove one of them"
                )
            before = key
        return keys

    def _label(self, path: Path, keys: list[str]) -> list[str]:
        """Label the validation images that lie in no class folder; what their labels were read from."""
        found = self._images.labels
        if -1 not in found:
            return []
        solutions = path / f"LOC_{self._split}_solution.csv"
        if solutions.exists():
            wanted = set(keys)  # so that a file of any length takes no more memory than the images
            listed = ((key, boxes) for key, boxes in read_solutions(solutions) if key in wanted)
            label_of = {key: _label_of(boxes, key, solutions) for key, boxes in listed}
            used = solutions
        else:
            kit = read_devkit(path)
            if kit is None:
                raise ZpipeError(
                    f"{path}: the labels of the val split are missing; put {KIT}.tar.gz there, or Kaggle's "
                    f"{solutions.name}"
                )
            used, numbered = kit
            label_of = {f"ILSVRC2012_val_{number:08d}": label for number, label in enumerate(numbered.tolist(), 1)}
        for key, place in zip(keys, self._places, strict=True):
            if found[place] < 0:
                if key not in label_of:
                    raise ZpipeError(f"{used}: has no label for {printable(key)}; give that of ImageNet's val split")
                found[place] = label_of[key]
        return [str(used.relative_to(path))]

    def _find_boxes(self, path: Path, keys: list[str]) -> list[str]:
        """Open the boxes; what they are read from."""
        solutions, archive = path / f"LOC_{self._split}_solution.csv", path / BOX_ARCHIVES[self._split]
        folder = path / KAGGLE_BOXES / self._split
        for file, read in ((solutions, read_solutions), (archive, read_box_archive)):
            if file.exists():
                self._table = BoxTable(read(file), keys, file)
                return [file.name]
        if folder.is_dir():
            self._xml_folder = folder
            return [f"{KAGGLE_BOXES / self._split}/"]
        return []

    def _boxes(self, number: int, key: str) -> list[LabelledBox]:
        if self._table is not None:
            return self._table.of(number)
        if self._xml_folder is None:
            return []
        folder = self._xml_folder / key.partition("_")[0] if self._split == "train" else self._xml_folder
        path = folder / f"{key}.xml"
        try:
            data = read_file(path, MAX_XML_BYTES)
        except FileNotFoundError:  # not every training image has boxes
            return []
        except OSError as error:
            raise ZpipeError(f"{path}: can't be read ({error.strerror}); fix its permissions") from error
        return read_xml(data, str(path))

    def _incomplete(self, path: Path) -> str:
        count, expected = len(self._images.names), self.SPLITS[self._split]
        present = len(set(self._images.labels) - {-1})
        if count == expected and (present == NUM_CLASSES or self._split == "test"):
            return ""
        of = "" if self._split == "test" else f" of {present} classes"
        wanted = "" if self._split == "test" else f" of {NUM_CLASSES}"
        return f"{path}: {count} images{of}; ImageNet's {self._split} split has {expected}{wanted}"

    def _nested(self, path: Path) -> str:
        count = self.account.left_out[NESTED]
        return f"{path}: folders inside class folders ({count}) are not read; move their images up" if count else ""

    def digest(self) -> str:
        """See `NumberedSource`."""
        # Like a folder source, it is identified by its files and their labels; an archive also by the sizes of its
        # images. Boxes are part of it if they are in memory; of XML files, which are read one by one, that they exist.
        digest = hashlib.sha256()
        for place in self._places:
            digest.update(f"{self._images.names[place]}\t{self._images.labels[place]}\n".encode())
        if len(self._images.sizes):
            digest.update(np.asarray(self._images.sizes, "<i8")[self._places].tobytes())
        digest.update(self._table.content() if self._table else b"xml" if self._xml_folder else b"")
        return digest.hexdigest()

    def record(self, number: int) -> Record | Rejected:
        """See `NumberedSource`."""
        place = int(self._places[number])
        name, label = self._images.names[place], self._images.labels[place]
        key = canonical_key(name)
        record = self._images.record(place, key=key, label=None if label < 0 else label, check=self._check)
        if isinstance(record, Rejected):
            return record
        boxes, notes = box_meta(self._boxes(number, key), record.label)
        # The published name, wherever the file lies, so that all packagings give the same tars.
        meta = record.meta | {"source": name.rpartition("/")[2]} | boxes
        return replace(record, meta=meta, notes=record.notes + notes)


def _label_of(boxes: list[LabelledBox], key: str, path: Path) -> int:
    found = {box.label for box in boxes}
    label = found.pop()
    if found or label is None:
        raise ZpipeError(
            f"{path}: {printable(key)}: its boxes have several classes, a val image has one; fetch it again"
        )
    return label


class _TreeImages:
    """The images in the folder of a split: in folders named by wnid, or flat, except for the training split."""

    def __init__(self, root: Path, split: str, account: Account) -> None:
        self._root = root
        self.names: list[str] = []
        """Paths of the image files below the folder."""
        self.labels = array("h")
        """Label of each image; -1 if it lies in no class folder."""
        self.sizes = array("q")
        """Empty: a look at each file would take as long as their listing."""
        self.rejected: list[Rejected] = []
        """Training images that lie in no class folder."""
        loose: list[str] = []
        for entry in self._entries(root, account):
            if not _is(entry, os.path.isdir, entry.is_dir):
                loose += self._files(entry, entry.name, account)
            elif WNID.fullmatch(entry.name) is None:
                account.leave_out("folder that is no class of ImageNet")
            elif entry.name not in labels():
                raise ZpipeError(f"{entry.path}: is none of ImageNet's 1,000 classes; move it away")
            else:
                inside = self._entries(Path(entry.path), account)
                files = [name for file in inside for name in self._files(file, f"{entry.name}/{file.name}", account)]
                # The labels of the test split are not published: a folder says nothing of its images.
                self._add(files, -1 if split == "test" else labels()[entry.name], account)
        self._add(loose, -1, account)
        if split == "train" and -1 in self.labels:
            flat = [place for place, label in enumerate(self.labels) if label < 0]
            self.rejected = [Rejected(file=self.names[place], reason="lies in no class folder") for place in flat]
            self.names = [name for name, label in zip(self.names, self.labels, strict=True) if label >= 0]
            self.labels = array("h", (label for label in self.labels if label >= 0))

    def _entries(self, folder: Path, account: Account) -> Iterator[os.DirEntry[str]]:
        try:
            with os.scandir(folder) as entries:
                for entry in entries:
                    if entry.name.startswith("."):
                        account.leave_out("hidden")
                    else:
                        yield entry
        except OSError as error:
            raise ZpipeError(f"{folder}: can't be listed ({error.strerror}); give yourself permission") from error

    def _files(self, entry: os.DirEntry[str], name: str, account: Account) -> list[str]:
        """The name of an entry if it is a file."""
        if _is(entry, os.path.isfile, entry.is_file):
            return [name]
        account.leave_out(NESTED if _is(entry, os.path.isdir, entry.is_dir) else "no file")
        return []

    def _add(self, files: list[str], label: int, account: Account) -> None:
        found = find_images(self._root, iter(files), account)
        self.names += [name for _, name in found]
        self.labels.extend([label] * len(found))

    def record(self, number: int, *, key: str, label: int | None, check: bool) -> Record | Rejected:
        """Read an image."""
        name = self.names[number]
        return read_record(self._root / name, name, key=key, label=label, check=check)


def _is(entry: os.DirEntry[str], of_link: Callable[[str], bool], of_entry: Callable[[], bool]) -> bool:
    # The methods of an entry raise errors for links in a circle; the functions for paths cost a look at each file.
    return of_link(entry.path) if entry.is_symlink() else of_entry()
