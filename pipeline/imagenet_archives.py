"""The images of ImageNet's official archives, read where they lie: nothing is unpacked to the disk.

A first pass reads the headers of the tars, of those inside `ILSVRC2012_img_train.tar` too, and notes where each image
lies. Images are then read in any order. A listing takes some 100 bytes an image.
"""

from __future__ import annotations

import os
import re
from array import array
from pathlib import Path
from typing import BinaryIO

from zpipe.pipeline.imagenet_names import labels
from zpipe.pipeline.sources import MAX_IMAGE_BYTES, Record, Rejected, altered, record_of, state_of
from zpipe.schemas.errors import UsageError, ZpipeError
from zpipe.schemas.names import printable
from zpipe.schemas.storage import open_file
from zpipe.schemas.tar_file import ListedMember, Section, list_members

ARCHIVES = {"train": "ILSVRC2012_img_train.tar", "val": "ILSVRC2012_img_val.tar", "test": "ILSVRC2012_img_test*.tar"}
_REMEDY = "fetch it again"
_CLASS_TAR = re.compile(r"(?:\./)?(n[0-9]{8})\.tar")
_IMAGES = {
    "train": re.compile(r"n[0-9]{8}_[0-9]{1,8}\.JPEG"),
    "val": re.compile(r"ILSVRC2012_val_[0-9]{8}\.JPEG"),
    "test": re.compile(r"ILSVRC2012_test_[0-9]{8}\.JPEG"),
}


def find_archive(folder: Path, split: str) -> Path | None:
    """The archive of a split in a folder; None if there is none. Raises :class:`UsageError` if there are several."""
    found = sorted(path for path in folder.glob(ARCHIVES[split]) if path.is_file())
    if len(found) > 1:
        raise UsageError(f"{folder}: holds {found[0].name} and {found[1].name}; move one of them away")
    return found[0] if found else None


class ArchiveImages:
    """The images of one archive.

    Args:
        path: The archive.
        split: Its split.

    Raises:
        ZpipeError: It is not whole, compressed, or holds other things than ImageNet's archive.
    """

    def __init__(self, path: Path, split: str) -> None:
        self.path = path
        self.names: list[str] = []
        """Names of the image files."""
        self.labels = array("h")
        """Label of each image; -1 if the archive does not say it."""
        self.sizes = array("q")
        """Bytes of each image."""
        self._split = split
        self._offsets = array("q")
        try:
            with open_file(path) as file:
                self._state = state_of(file)
                if split == "train":
                    self._list_classes(file)
                else:
                    for member in list_members(file, path, remedy=_REMEDY):
                        self._add(member, 0, -1, str(path))
        except OSError as error:
            raise ZpipeError(f"{path}: can't be read ({error.strerror}); fix its permissions") from error

    def _list_classes(self, file: BinaryIO) -> None:
        tars: dict[str, ListedMember] = {}
        for member in list_members(file, self.path, remedy=_REMEDY):
            match = _CLASS_TAR.fullmatch(member.name)
            if match is None or match[1] not in labels() or member.size < 0:
                raise self._unknown(str(self.path), member.name, "nXXXXXXXX.tar of one of the 1,000 classes")
            if match[1] in tars:
                raise ZpipeError(f"{self.path}: holds {match[1]}.tar twice; {_REMEDY}")
            tars[match[1]] = member
        for wnid, tar in tars.items():
            where = f"{self.path}: {wnid}.tar"
            for member in list_members(Section(file, tar.offset, tar.size), where, remedy=_REMEDY):
                self._add(member, tar.offset, labels()[wnid], where, wnid)

    def _add(self, member: ListedMember, start: int, label: int, where: str, wnid: str = "") -> None:
        name = member.name.rpartition("/")[2]
        if not _IMAGES[self._split].fullmatch(name) or not name.startswith(wnid) or member.size < 0:
            raise self._unknown(where, member.name, f"image of ImageNet's {self._split} split")
        if member.size > MAX_IMAGE_BYTES:
            raise ZpipeError(f"{where}: its {name} has {member.size} bytes, more than {MAX_IMAGE_BYTES}; {_REMEDY}")
        self.names.append(name)
        self.labels.append(label)
        self._offsets.append(start + member.offset)
        self.sizes.append(member.size)

    def _unknown(self, where: str, name: str, expected: str) -> ZpipeError:
        shown = printable(name)
        shown = shown if len(shown) <= 80 else shown[:77] + "..."
        return ZpipeError(
            f"{where}: its member {shown!r} is no {expected}; give ImageNet's own {ARCHIVES[self._split]}"
        )

    def record(self, number: int, *, key: str, label: int | None, check: bool) -> Record | Rejected:
        """Read an image. Any threads may do so at the same time.

        Raises:
            ZpipeError: The archive cannot be read, or was altered since it was listed.
        """
        name, size = self.names[number], self.sizes[number]
        try:
            with open_file(self.path) as file:
                # In another file, the places that were listed would be those of other images.
                same = state_of(file) == self._state
                data = os.pread(file.fileno(), size, self._offsets[number])
        except OSError as error:
            raise ZpipeError(f"{self.path}: can't be read ({error.strerror}); check the disk or mount") from error
        if not same or len(data) != size:
            raise altered(self.path)
        return record_of(data, f"{self.path.name}: {name}", key=key, label=label, check=check)
