"""Detection data sets as sources of shards: Pascal VOC and COCO.

Their images have no class of their own, but boxes, which go into `key.json` with their classes. A source holds the
annotations of its split in memory, of COCO some 50 bytes a box beside the list of its images; while COCO's file is
read, also that file and some 300 bytes a box.
"""

from __future__ import annotations

import hashlib
import os
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, ClassVar

import msgspec
import numpy as np

from zpipe.pipeline.sources import NumberedSource, Record, Rejected, read_record, refuse_repeated
from zpipe.pipeline.voc_xml import MAX_PIXEL, MAX_XML_BYTES, VocObject, read_voc_xml
from zpipe.schemas.errors import UsageError, ZpipeError
from zpipe.schemas.formats import Text, read_json
from zpipe.schemas.names import check_key, printable
from zpipe.schemas.sample import key_for_file
from zpipe.schemas.storage import read_file

MAX_LIST_BYTES = 1 << 26  # of a split's names
MAX_COCO_BYTES = 1 << 31  # the annotations of COCO's training split have 450 MB
VOC_CLASSES = (
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog"),
    *("horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
)


@dataclass(frozen=True, kw_only=True)
class Objects:
    """What is annotated in an image."""

    size: tuple[int, int] | None
    """Width and height of the image in pixels, as the annotation has them; None if it does not."""
    boxes: np.ndarray
    """Boxes in pixels, x1, y1, x2, y2, counted from the edge of the image; float64 [n, 4]."""
    labels: Sequence[int]
    """Class of each box."""
    flag: Sequence[int]
    """1 for each box that is a special case, by the name of `DetectionSource.FLAG`, else 0."""
    more: Mapping[str, Any] = field(default_factory=dict)
    """What else goes into `key.json`."""


class DetectionSource(NumberedSource):
    """Images with boxes. `key.json` has `boxes`, `box_labels` and a flag of each box, and `box` if there is just one.

    Boxes are cut at the edges of their image; those without an area are left out. Both are counted.
    """

    FLAG: ClassVar[str]
    """Name of the flag in `key.json`."""

    def _list_images(self, folder: Path, files: Sequence[str], where: Path) -> None:
        """Keep the folder and the names of the images, after a check of the names and of what is there."""
        self._folder, self._files, self._keys = folder, files, [key_for_file(file) for file in files]
        owner: dict[str, str] = {}
        for file, key in zip(files, self._keys, strict=True):
            if PurePosixPath(file).is_absolute() or ".." in PurePosixPath(file).parts or "\\" in file:
                raise ZpipeError(f"{where}: names the file {_shown(file)}, outside of {folder}; correct it")
            check_key(key, f"{where}: {_shown(file)}")
            if key in owner:
                raise ZpipeError(f"{where}: {_shown(file)} has the key {key!r} of {_shown(owner[key])}; rename one")
            owner[key] = file
        try:
            there = set(os.listdir(folder))
        except OSError as error:
            raise UsageError(f"{folder}: can't be listed ({error.strerror}); give the folder of the images") from error
        missing = [file for file in files if file not in there and not ("/" in file and os.path.isfile(folder / file))]
        if missing:
            raise ZpipeError(
                f"{folder}: lacks {len(missing)} of the {len(files)} images that {where} lists, "
                f"{_shown(missing[0])} the first; fetch the whole of it"
            )

    @abstractmethod
    def objects(self, number: int) -> Objects:
        """What is annotated in the image of a number."""

    def record(self, number: int) -> Record | Rejected:
        """See `NumberedSource`."""
        file = self._files[number]
        record = read_record(self._folder / file, file, key=self._keys[number], label=None, check=self._check)
        if isinstance(record, Rejected):
            return record
        found = self.objects(number)
        size = record.meta["width"], record.meta["height"]
        if found.size is not None and found.size != size:
            said = "{} x {} pixels, and its annotation says {} x {}".format(*size, *found.size)
            return Rejected(file=file, reason=f"has {said}")
        boxes = np.clip(found.boxes, 0, np.array([*size, *size], np.float64))
        kept = np.flatnonzero((boxes[:, 0] < boxes[:, 2]) & (boxes[:, 1] < boxes[:, 3])).tolist()
        cut = int((boxes[kept] != found.boxes[kept]).any(axis=1).sum())
        notes = ["with a box cut at the edge of its image"] * cut
        notes += ["with a box without area (left out)"] * (len(boxes) - len(kept))
        meta = {
            "boxes": boxes[kept].tolist(),
            "box_labels": [found.labels[i] for i in kept],
            self.FLAG: [int(found.flag[i]) for i in kept],
        }
        alone = {"box": meta["boxes"][0]} if len(kept) == 1 else {}
        return replace(record, meta=record.meta | meta | alone | dict(found.more), notes=(*record.notes, *notes))


def _shown(file: str) -> str:
    shown = printable(file)
    return shown if len(shown) <= 80 else shown[:77] + "..."


class VocSource(DetectionSource):
    """Pascal VOC: the folder `VOC2012` (or of another year), the `VOCdevkit` above it, or the folder that holds that.

    The classes are VOC's 20, sorted by name; if an annotation names another one, those that occur. `key.json` has the
    flag `difficult`. VOC counts pixels from 1 and its boxes end with their last pixel; here they go from edge to edge.

    Args:
        path: The folder.
        split: Name of a list in `ImageSets/Main`: ``train``, ``val``, ``trainval`` or ``test``.
        shard_size: Images per part.
        shuffle_seed: Seed of the order of images; None keeps the order of the source.
        check: Whether images are decoded as a check.

    Raises:
        UsageError: The folder is none of these, holds several years, or has no such split.
        ZpipeError: An annotation is absent or malformed, or an image is missing.
    """

    name = "voc"
    FLAG = "difficult"
    IMAGES, ANNOTATIONS, LISTS = "JPEGImages", "Annotations", "ImageSets/Main"

    def __init__(
        self, path: Path, *, split: str, shard_size: int, shuffle_seed: int | None, check: bool = True
    ) -> None:
        root = self._find(path)
        stems = self._read_split(root, split)
        self._list_images(root / self.IMAGES, [f"{stem}.jpg" for stem in stems], root / self.LISTS / f"{split}.txt")
        self._found = [self._read(root / self.ANNOTATIONS / f"{stem}.xml") for stem in stems]
        names = sorted({item.name for _, objects in self._found for item in objects})
        self.classes = VOC_CLASSES if set(names) <= set(VOC_CLASSES) else tuple(names)
        for name in names:
            if printable(name) != name:
                raise ZpipeError(f"{root}: the class '{printable(name)[:60]}' has an unprintable character; rename it")
        if self.classes is not VOC_CLASSES:
            self.warning = f"{root}: {len(names)} classes, not VOC's; they are numbered as they occur in this split"
        self._label_of = {name: label for label, name in enumerate(self.classes)}
        super().__init__(path, split, len(stems), shard_size, shuffle_seed, check=check)

    def _find(self, path: Path) -> Path:
        """The folder of one year."""
        above = [path, *sorted(path.glob("VOC2*")), *sorted(path.glob("VOCdevkit/VOC2*"))]
        found = [folder for folder in above if (folder / self.IMAGES).is_dir() and (folder / self.LISTS).is_dir()]
        if not found:
            raise UsageError(
                f"{path}: no folder with {self.IMAGES}, {self.ANNOTATIONS} and {self.LISTS}; give VOCdevkit/VOC2012, "
                "as the archives unpack to"
            )
        if len(found) > 1:
            raise UsageError(f"{path}: holds {', '.join(folder.name for folder in found)}; give one of these folders")
        return found[0]

    def _read_split(self, root: Path, split: str) -> list[str]:
        lists = root / self.LISTS
        there = sorted(path.stem for path in lists.glob("*.txt") if "_" not in path.stem)
        if split not in there:
            raise UsageError(f"--split {split}: {root} has {', '.join(map(printable, there)) or 'no list of a split'}")
        try:
            stems = read_file(lists / f"{split}.txt", MAX_LIST_BYTES).decode().split()
        except (OSError, UnicodeDecodeError) as error:
            raise ZpipeError(f"{lists / f'{split}.txt'}: can't be read ({error}); fetch it again") from error
        if not stems:
            raise UsageError(f"{lists / f'{split}.txt'}: lists no images; give another split")
        return stems

    def _read(self, path: Path) -> tuple[tuple[int, int] | None, list[VocObject]]:
        try:
            return read_voc_xml(read_file(path, MAX_XML_BYTES), str(path))
        except OSError as error:
            remedy = "fetch the annotations of this split"
            raise ZpipeError(f"{path}: can't be read ({error.strerror}); {remedy}") from error

    def digest(self) -> str:
        """See `NumberedSource`."""
        return hashlib.sha256(repr([self.classes, self._files, self._found]).encode()).hexdigest()

    def objects(self, number: int) -> Objects:
        """See `DetectionSource`."""
        size, objects = self._found[number]
        boxes = np.array([item.box for item in objects], np.float64).reshape(-1, 4)
        boxes[:, :2] -= 1
        labels = [self._label_of[item.name] for item in objects]
        return Objects(size=size, boxes=boxes, labels=labels, flag=[item.difficult for item in objects])


_Id = Annotated[int, msgspec.Meta(ge=-(2**53), le=2**53)]
_Edge = Annotated[float, msgspec.Meta(ge=-MAX_PIXEL, le=MAX_PIXEL)]


class _CocoImage(msgspec.Struct, gc=False):
    id: _Id
    file_name: Text
    width: int
    height: int


class _CocoBox(msgspec.Struct, gc=False):
    id: _Id
    image_id: _Id
    category_id: _Id
    bbox: tuple[_Edge, _Edge, _Edge, _Edge]
    iscrowd: int = 0


class _CocoCategory(msgspec.Struct):
    id: _Id
    name: Text


class _Coco(msgspec.Struct):
    images: list[_CocoImage]
    categories: list[_CocoCategory]
    annotations: list[_CocoBox] = []  # those of test images are not published


class CocoSource(DetectionSource):
    """COCO: a file of annotations, `instances_val2017.json`, and the folder of its images. Masks are not read.

    The classes are COCO's categories in the order of their ids, which have gaps. `key.json` has the flag `iscrowd` and
    the `image_id`.

    Args:
        path: The file of annotations.
        images: The folder of the images; None for the one that the file is named after, such as `val2017`, beside the
            folder of the file.
        shard_size: Images per part.
        shuffle_seed: Seed of the order of images; None keeps the order of the source.
        check: Whether images are decoded as a check.

    Raises:
        UsageError: There is no such file or folder.
        ZpipeError: The file is none of COCO, or an image is missing.
    """

    name = "coco"
    FLAG = "iscrowd"

    def __init__(
        self, path: Path, *, images: Path | None, shard_size: int, shuffle_seed: int | None, check: bool = True
    ) -> None:
        if not path.is_file():
            raise UsageError(f"{path}: no such file; give a file of annotations, instances_*.json")
        what, remedy = "COCO's annotations of boxes", "give instances_*.json, or fetch it again"
        found = read_json(path, what, type=_Coco, remedy=remedy, max_bytes=MAX_COCO_BYTES)
        if not found.images:
            raise UsageError(f"{path}: lists no images; {remedy}")
        self._list_images(self._find(path, images), [image.file_name for image in found.images], path)
        self._ids = np.array([image.id for image in found.images], np.int64)
        self._image_sizes = [(image.width, image.height) for image in found.images]
        categories = sorted(found.categories, key=lambda category: category.id)
        self.classes = tuple(category.name for category in categories)
        refuse_repeated(self.classes, path)
        self._keep_boxes(path, found, {category.id: label for label, category in enumerate(categories)})
        super().__init__(path, path.stem, len(self._files), shard_size, shuffle_seed, check=check)

    def _find(self, path: Path, images: Path | None) -> Path:
        if images is not None:
            return images
        name = path.stem.rpartition("_")[2]
        near = [path.absolute().parent.parent / name, path.absolute().parent.parent / "images" / name]
        folder = next((folder for folder in near if folder.is_dir()), None)
        if folder is None:
            raise UsageError(f"{path}: there is no folder {near[0]} of its images; give it by --images")
        return folder

    def _keep_boxes(self, path: Path, found: _Coco, label_of: Mapping[int, int]) -> None:
        """Keep the boxes as arrays, in the order of the images."""
        for category in found.categories:
            if printable(category.name) != category.name or not category.name:
                raise ZpipeError(f"{path}: category {category.id} has no printable name; correct it")
        number_of = {image.id: number for number, image in enumerate(found.images)}
        for what, ids, all_ids in (
            ("categories", label_of, found.categories),
            ("images", number_of, found.images),
        ):
            if len(ids) != len(all_ids):
                raise ZpipeError(f"{path}: two {what} have one id; correct it")
        for box in found.annotations:
            if box.image_id not in number_of or box.category_id not in label_of:
                unknown = f"category {box.category_id}" if box.image_id in number_of else f"image {box.image_id}"
                raise ZpipeError(
                    f"{path}: annotation {box.id} is of {unknown}, which the file does not have; correct it"
                )
        images = np.array([number_of[box.image_id] for box in found.annotations], np.int64)
        order = np.argsort(images, kind="stable")
        boxes = np.array([box.bbox for box in found.annotations], np.float64).reshape(-1, 4)[order]
        boxes[:, 2:] += boxes[:, :2]  # from width and height
        self._boxes = boxes
        self._labels = np.array([label_of[box.category_id] for box in found.annotations], np.int32)[order]
        self._crowds = np.array([box.iscrowd != 0 for box in found.annotations], np.uint8)[order]
        self._starts = np.searchsorted(images[order], np.arange(len(found.images) + 1))

    def digest(self) -> str:
        """See `NumberedSource`."""
        digest = hashlib.sha256(repr([self.classes, self._files, self._image_sizes]).encode())
        for array in (self._ids, self._boxes, self._labels, self._crowds, self._starts):
            digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()

    def objects(self, number: int) -> Objects:
        """See `DetectionSource`."""
        rows = slice(self._starts[number], self._starts[number + 1])
        return Objects(
            size=self._image_sizes[number],
            boxes=self._boxes[rows],
            labels=self._labels[rows].tolist(),
            flag=self._crowds[rows].tolist(),
            more={"image_id": int(self._ids[number])},
        )
