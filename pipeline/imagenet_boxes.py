"""The boxes that are published with ImageNet: Kaggle's CSV files, and the organisers' XML files (as of PASCAL VOC).

Coordinates are kept as published, in pixels of the image file. An image may have several boxes or none; the training
split has boxes for 544,546 of its images.
"""

from __future__ import annotations

import csv
import io
import math
from array import array
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from zpipe.pipeline.imagenet_names import WNID, canonical_key, labels
from zpipe.pipeline.voc_xml import MAX_XML_BYTES, read_voc_xml
from zpipe.schemas.errors import ZpipeError
from zpipe.schemas.names import printable
from zpipe.schemas.storage import open_file
from zpipe.schemas.tar_file import read_packed

COLUMNS = ["ImageId", "PredictionString"]
MAX_LINE = 1 << 16  # characters of a line of a CSV file; the longest published one has some 2,000
MAX_UNPACKED_BYTES = 1 << 33  # of an archive of XML files; that of the training split unpacks to some 1 GB
MAX_COORDINATE = 1 << 24
_REMEDY = "fetch it again"


class LabelledBox(NamedTuple):
    """A box in pixels of the image file, and the class of what it holds."""

    x1: float
    """Left edge."""
    y1: float
    """Upper edge."""
    x2: float
    """Right edge."""
    y2: float
    """Lower edge."""
    label: int | None
    """Class index; None where the published file has words in place of a wnid, as for some dogs."""

    @property
    def is_degenerate(self) -> bool:
        """Whether it has no area."""
        return self.x1 >= self.x2 or self.y1 >= self.y2


class BoxTable:
    """The boxes of numbered images, about 40 bytes a box.

    Args:
        found: Key and boxes of images, each key at most once.
        keys: The keys of the images, sorted; their positions are the numbers. Boxes of other images are passed over.
        where: The file that they come from, for messages.

    Raises:
        ZpipeError: An image is listed twice.
    """

    def __init__(self, found: Iterable[tuple[str, list[LabelledBox]]], keys: Sequence[str], where: Path) -> None:
        owners, edges, classes = array("q"), array("d"), array("h")
        listed = np.zeros(len(keys), bool)
        for key, boxes in found:
            number = bisect_left(keys, key)
            if number == len(keys) or keys[number] != key:
                continue
            if listed[number]:
                raise ZpipeError(f"{where}: lists {printable(key)} twice; {_REMEDY}")
            listed[number] = True
            for box in boxes:
                owners.append(number)
                edges.extend(box[:4])
                classes.append(-1 if box.label is None else box.label)
        order = np.argsort(np.asarray(owners, np.int64), kind="stable")
        self._edges = np.asarray(edges, np.float64).reshape(-1, 4)[order]
        self._classes = np.asarray(classes, np.int16)[order]
        self._first = np.searchsorted(np.asarray(owners, np.int64)[order], np.arange(len(keys) + 1))

    def of(self, number: int) -> list[LabelledBox]:
        """The boxes of an image, in the order of the file."""
        first, end = self._first[number : number + 2]
        rows = zip(self._edges[first:end].tolist(), self._classes[first:end].tolist(), strict=True)
        return [LabelledBox(x1, y1, x2, y2, None if label < 0 else label) for (x1, y1, x2, y2), label in rows]

    def content(self) -> bytes:
        """What determines the boxes, for a digest."""
        return self._first.tobytes() + self._edges.tobytes() + self._classes.tobytes()


def box_meta(boxes: list[LabelledBox], label: int | None) -> tuple[dict[str, object], tuple[str, ...]]:
    """What `key.json` says of the boxes of an image.

    Args:
        boxes: Its boxes as published.
        label: Its class, for boxes without a class of their own.

    Returns:
        `boxes` [[x1, y1, x2, y2], ...] and `box_labels` [class index, ...] of equal length; if there is exactly one
        box, also `box`. Boxes without area are left out; without a box there are no entries. And notes for an account.
    """
    whole = [box for box in boxes if not box.is_degenerate]
    notes = ("with a box without area (left out)",) * (len(whole) < len(boxes))
    if any(box.label is None for box in whole):
        notes += ("with a box named in words (taken for the image's class)",)
    if not whole:
        return {}, notes
    meta: dict[str, object] = {
        "boxes": [list(box[:4]) for box in whole],
        "box_labels": [label if box.label is None else box.label for box in whole],
    }
    if len(whole) == 1:
        meta["box"] = list(whole[0][:4])
    return meta, notes


def read_solutions(path: Path) -> Iterator[tuple[str, list[LabelledBox]]]:
    """Yield the key and the boxes of each image of `LOC_train_solution.csv` or `LOC_val_solution.csv`.

    Raises:
        ZpipeError: A line is not `ImageId,PredictionString` with a prediction of `wnid x1 y1 x2 y2`, repeated, or the
            file cannot be read; the message names the line.
    """
    try:
        with open_file(path) as binary, io.TextIOWrapper(binary, newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(iter(lambda: file.readline(MAX_LINE), ""))
            if next(reader, []) != COLUMNS:
                raise ZpipeError(f"{path}: line 1: is not {','.join(COLUMNS)}; give the file as Kaggle has it")
            for row in reader:
                where = f"{path}: line {reader.line_num}"
                words = row[1].split() if len(row) == 2 else []
                if not words or len(words) % 5:
                    raise ZpipeError(f"{where}: is not an image and boxes of 'wnid x1 y1 x2 y2'; {_REMEDY}")
                yield row[0], [_box(words[i + 1 : i + 5], words[i], where) for i in range(0, len(words), 5)]
    except (UnicodeDecodeError, csv.Error) as error:
        raise ZpipeError(f"{path}: not readable as a UTF-8 CSV file ({error}); {_REMEDY}") from error
    except OSError as error:
        raise ZpipeError(f"{path}: can't be read ({error.strerror}); fix its permissions") from error


def read_box_archive(path: Path) -> Iterator[tuple[str, list[LabelledBox]]]:
    """Yield the key and the boxes of each XML file of an archive, such as `ILSVRC2012_bbox_val_v3.tgz`.

    Raises:
        ZpipeError: The archive is not whole, or an XML file is malformed; the message names it.
    """
    for member in read_packed(
        path, lambda name: name.endswith(".xml"), largest=MAX_XML_BYTES, max_bytes=MAX_UNPACKED_BYTES, remedy=_REMEDY
    ):
        # A link has no content, and no content is no XML.
        yield canonical_key(member.name), read_xml(member.data or b"", f"{path}: {printable(member.name)}")


def read_xml(data: bytes, where: str) -> list[LabelledBox]:
    """The boxes of an XML file: of each `object` its `name` and its `bndbox` with xmin, ymin, xmax and ymax.

    Args:
        data: The file.
        where: The file, for messages.

    Raises:
        ZpipeError: It is malformed, or names a wnid that is none of ImageNet's 1,000 classes.
    """
    _, objects = read_voc_xml(data, where)
    return [_box(item.box, item.name, where, words=True) for item in objects]


def _box(edges: Sequence[str | float], name: str, where: str, *, words: bool = False) -> LabelledBox:
    """A box with the class `name`, a wnid, or with `words` also any other name."""
    try:
        x1, y1, x2, y2 = (float(edge) for edge in edges)
    except ValueError:
        x1 = y1 = x2 = y2 = math.nan
    if not all(abs(edge) <= MAX_COORDINATE for edge in (x1, y1, x2, y2)):  # neither is one that is no number
        raise ZpipeError(f"{where}: a box has the edges {_shown(' '.join(map(str, edges)))}; {_REMEDY}")
    label = labels().get(name)
    if label is None and (not name or not words or WNID.fullmatch(name)):
        raise ZpipeError(f"{where}: a box has the class {_shown(name)}, none of ImageNet's 1,000 wnids; {_REMEDY}")
    return LabelledBox(x1, y1, x2, y2, label)


def _shown(text: str) -> str:
    text = printable(text)
    return repr(text if len(text) <= 60 else text[:57] + "...")
