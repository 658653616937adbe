"""What a source of images is to `zpipe.pipeline.make_shards`, and the embedded scenes.

`zpipe.pipeline.open_source` opens all sources by name. Image folders are in `zpipe.pipeline.image_folder`; ImageNet is
in `zpipe.pipeline.imagenet`, data sets in Parquet in `zpipe.pipeline.parquet`, VOC and COCO in
`zpipe.pipeline.annotations`, CIFAR-10 and Flowers-102 in `zpipe.pipeline.datasets`.
"""

from __future__ import annotations

import errno
import io
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Protocol, TypeVar

import numpy as np
from PIL import Image

from zpipe.pipeline.scenes import SPLITS, SceneBatch, SceneConfig, make_scenes
from zpipe.schemas.choices import check_choice
from zpipe.schemas.errors import UsageError, ZpipeError
from zpipe.schemas.image_formats import SUFFIX_OF_FORMAT
from zpipe.schemas.images import DECODE_ERRORS, open_image, pixel_notes, to_rgb
from zpipe.schemas.names import printable
from zpipe.schemas.storage import read_file

MAX_IMAGE_BYTES = 1 << 29  # of a file: 8,192 x 8,192 pixels of 8 bytes
IMAGES_PER_TASK = 8

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True, kw_only=True)
class Record:
    """One sample to be written into a tar."""

    key: str
    """Its key, unique in the data set."""
    suffix: str
    """Suffix of the image file, by its format."""
    image: bytes
    """The image file."""
    label: int | None
    """Class index; None for images without a class of their own, as those of detection data sets."""
    meta: dict[str, Any]
    """Content of `key.json`: width, height, source, ..."""
    notes: tuple[str, ...] = ()
    """What is worth telling of the image, for the account."""


@dataclass(frozen=True, kw_only=True)
class Rejected:
    """A source file that looks like an image and cannot be used."""

    file: str
    """The file."""
    reason: str
    """Why it cannot be used."""


class Source(Protocol):
    """Where images come from. Part i is what shard i will hold; parts do not depend on each other.

    A source that leaves files out has an `account` of them (:class:`~zpipe.schemas.account.Account`), and `rejected`,
    those that look like images and belong to no part.
    """

    classes: tuple[str, ...]
    """Class names; empty if only indices are known."""

    def describe(self) -> dict[str, Any]:
        """What determines the samples, as JSON values: a folder of shards is only resumed by an equal source."""

    def parts(self) -> int:
        """Number of parts."""

    def records(self, part: int) -> Iterator[Record | Rejected]:
        """The samples of one part, in order, and the files that cannot be read."""


class SceneSource:
    """The embedded data: handwritten digits hidden in scenes, encoded as JPEG. `key.json` has the box of the digit.

    Args:
        count: Number of scenes.
        split: ``train`` or ``val``.
        seed: Seed of the scenes.
        config: What a scene looks like.
        shard_size: Scenes per part.

    Raises:
        UsageError: An argument makes no sense.
    """

    classes = tuple(str(digit) for digit in range(10))
    JPEG_QUALITY = 92

    def __init__(self, *, count: int, split: str, seed: int, config: SceneConfig, shard_size: int) -> None:
        check_choice("--split", split, SPLITS)
        if count < 1:
            raise UsageError(f"--count {count}: give a number of scenes >= 1")
        check_seed(seed)
        self.count, self.split, self.seed, self.config, self.shard_size = count, split, seed, config, shard_size

    def describe(self) -> dict[str, Any]:
        """See `Source`."""
        settings = {"count": self.count, "split": self.split, "seed": self.seed, "shard_size": self.shard_size}
        return {"source": "scenes", "config": json.loads(json.dumps(asdict(self.config)))} | settings

    def parts(self) -> int:
        """See `Source`."""
        return -(-self.count // self.shard_size)

    def records(self, part: int) -> Iterator[Record]:
        """See `Source`."""
        number = part * self.shard_size
        for batch in self._batches(part):
            for image, label, box in zip(batch.images, batch.labels, batch.boxes, strict=True):
                buffer = io.BytesIO()
                Image.fromarray(image).save(buffer, "JPEG", quality=self.JPEG_QUALITY)
                height, width = image.shape[:2]
                meta = {"width": width, "height": height, "source": "scenes", "box": [float(edge) for edge in box]}
                yield Record(key=self._key(number), suffix="jpg", image=buffer.getvalue(), label=int(label), meta=meta)
                number += 1

    def write_masks(self, folder: Path) -> None:
        """Write the mask of each digit to FOLDER/KEY.png: 1 for its pixels, else 0."""
        folder.mkdir(parents=True, exist_ok=True)
        for part in range(self.parts()):
            masks = (mask for batch in self._batches(part) for mask in batch.masks)
            for number, mask in enumerate(masks, start=part * self.shard_size):
                Image.fromarray(mask).save(folder / f"{self._key(number)}.png")

    def _batches(self, part: int) -> Iterator[SceneBatch]:
        count = min(self.shard_size, self.count - part * self.shard_size)
        seed = int(np.random.SeedSequence([self.seed, part]).generate_state(1)[0])
        return make_scenes(count, split=self.split, seed=seed, config=self.config)

    def _key(self, number: int) -> str:
        return f"{self.split}_{number:07d}"


class NumberedSource(ABC):
    """A source whose images are numbered from 0, in this order or in one drawn from a seed, in parts of `shard_size`.

    Args:
        path: What the user named, without the name of the source.
        split: The split.
        count: Number of images.
        shard_size: Images per part.
        shuffle_seed: Seed of the order of images; None keeps the order of the source.
        check: Whether images that keep their bytes are decoded as a check.
    """

    name: str
    """Name of the source on the command line."""
    classes: tuple[str, ...]
    """Class names."""
    warning = ""
    """What the user should know, one line."""

    def __init__(
        self, path: Path, split: str, count: int, shard_size: int, shuffle_seed: int | None, *, check: bool = True
    ) -> None:
        self._settings = {"split": split, "shard_size": shard_size, "shuffle_seed": shuffle_seed} | unchecked(check)
        self._check = check
        self._source = f"{self.name}:{path}"
        self._shard_size = shard_size
        self._order = np.arange(count)
        if shuffle_seed is not None:
            check_seed(shuffle_seed)
            self._order = np.random.default_rng(shuffle_seed).permutation(count)

    def describe(self) -> dict[str, Any]:
        """See `Source`."""
        return {"source": self._source} | self._settings | {"content_sha256": self.digest()}

    def parts(self) -> int:
        """See `Source`."""
        return -(-len(self._order) // self._shard_size)

    def records(self, part: int) -> Iterator[Record | Rejected]:
        """See `Source`."""
        numbers = self._order[part * self._shard_size : (part + 1) * self._shard_size].tolist()
        yield from in_threads(self.record, numbers)

    @abstractmethod
    def digest(self) -> str:
        """SHA-256 (hex) of what determines the images and labels."""

    @abstractmethod
    def record(self, number: int) -> Record | Rejected:
        """The image of a number."""


def in_threads(read: Callable[[T], R], items: Sequence[T]) -> Iterator[R]:
    """Read items on every core, and yield the results in order. PIL releases the interpreter lock while it decodes."""
    # Handing over a single image takes as long as reading its header.
    groups = [items[first : first + IMAGES_PER_TASK] for first in range(0, len(items), IMAGES_PER_TASK)]
    with ThreadPoolExecutor(max_workers=os.cpu_count() or 1) as pool:
        for results in pool.map(lambda group: [read(item) for item in group], groups):
            yield from results


def choose_split(name: str, split: str, splits: Collection[str]) -> None:
    """Raise :class:`UsageError` unless the source `name` has that split."""
    if split not in splits:
        raise UsageError(f"--split {split}: {name} has {', '.join(splits)}")


def unchecked(check: bool) -> dict[str, bool]:
    """What `Source.describe` says of images that are not decoded; nothing of others, as in folders begun before."""
    return {} if check else {"check": False}


def refuse_repeated(names: Sequence[str], where: Path | str) -> None:
    """Raise :class:`ZpipeError` if two classes have one name, because labels are compared by names."""
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise ZpipeError(f"{where}: two classes are named '{printable(name)[:60]}'; rename one of them")
        seen.add(name)


def state_of(file: BinaryIO) -> tuple[int, ...]:
    """What tells whether a local file is still the one that was listed: its device, number, size and time of change."""
    found = os.fstat(file.fileno())
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def altered(where: Path | str) -> ZpipeError:
    """The error of a file that is no longer the one that was listed."""
    return ZpipeError(f"{where}: was altered since it was listed; run again")


def check_seed(seed: int) -> None:
    """Raise :class:`UsageError` for a seed below 0."""
    if seed < 0:
        raise UsageError(f"--seed {seed}: give a whole number >= 0")


class InspectedImage(NamedTuple):
    """An image as it goes into a tar."""

    suffix: str
    """Suffix of its format."""
    width: int
    """In pixels."""
    height: int
    """In pixels."""
    image: bytes
    """The file as it came, or a PNG of the same pixels if shards do not hold its format."""
    notes: tuple[str, ...]
    """What is worth telling, for an account."""


def inspect_image(data: bytes, *, check: bool = True) -> InspectedImage:
    """Decode an image completely, and write it as PNG if its format is none that shards hold.

    Args:
        data: The file.
        check: Whether an image that keeps its bytes is decoded, too. If not, only its header is read, and damage after
            it passes unnoticed.

    Raises:
        OSError, ValueError: It cannot be decoded, or is a decompression bomb.
    """
    try:
        with open_image(data) as image:
            notes = pixel_notes(image)
            kept = SUFFIX_OF_FORMAT.get(image.format or "")
            width, height = image.size
            if kept is not None and not (check and image.mode.startswith(("I", "F"))):
                if check:
                    # Of a JPEG all data are decoded, but few pixels computed of them: half the time, the same errors.
                    image.draft(None, (1, 1))
                    image.load()
                return InspectedImage(kept, width, height, data, notes)
            rgb = to_rgb(image)
            if kept is not None:
                return InspectedImage(kept, image.width, image.height, data, notes)
        encoded = io.BytesIO()
        rgb.save(encoded, "PNG")
        return InspectedImage("png", rgb.width, rgb.height, encoded.getvalue(), (*notes, "re-encoded as PNG"))
    except (OSError, ValueError):
        raise
    except DECODE_ERRORS as error:
        raise ValueError(f"broken image: {error}") from error


def read_record(path: Path, file: str, *, key: str, label: int | None, check: bool = True) -> Record | Rejected:
    """Read an image file into a record.

    Args:
        path: The file.
        file: What the source calls it.
        key: Its key.
        label: Its class.
        check: Whether it is decoded as a check.

    Raises:
        ZpipeError: This process has too many open files, which is no fault of the image.
    """
    try:
        data = read_file(path, MAX_IMAGE_BYTES)
    except OSError as error:
        if error.errno in (errno.EMFILE, errno.ENFILE):
            raise ZpipeError(f"{path}: can't be read ({error.strerror}); raise `ulimit -n`") from error
        return Rejected(file=file, reason=error.strerror or str(error))
    return record_of(data, file, key=key, label=label, check=check)


def record_of(data: bytes, file: str, *, key: str, label: int | None, check: bool = True) -> Record | Rejected:
    """The same for an image file that is in memory."""
    try:
        found = inspect_image(data, check=check)
    except (OSError, ValueError) as error:
        return Rejected(file=file, reason=str(error).split("\n")[0])
    meta = {"width": found.width, "height": found.height, "source": file}
    return Record(key=key, suffix=found.suffix, image=found.image, label=label, meta=meta, notes=found.notes)


def scene_config(image_size: int | None, overrides: dict[str, Any]) -> SceneConfig:
    """The default scene configuration with some fields replaced. Raises :class:`UsageError` for an unknown field."""
    if image_size is not None:
        overrides = overrides | {"image_size": image_size}
    try:
        return replace(SceneConfig(), **overrides)
    except (TypeError, ValueError) as error:
        raise UsageError(f"scenes: {error}; see `zpipe make-shards --help`") from error
