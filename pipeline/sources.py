"""Sources of images for `zpipe.pipeline.make_shards`: image folders and the embedded scenes.

Published data sets are in `zpipe.pipeline.datasets`. A source holds the list of its files in memory, some 170 bytes
each.
"""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from zpipe.pipeline.scenes import SPLITS, SceneConfig, make_scenes
from zpipe.schemas.choices import check_choice
from zpipe.schemas.errors import UsageError, ZpipeError
from zpipe.schemas.image_formats import IMAGE_SUFFIXES, SUFFIX_OF_FORMAT
from zpipe.schemas.images import DECODE_ERRORS, open_image
from zpipe.schemas.sample import KEY_RULES, key_for_file
from zpipe.schemas.shard_index import digest_keys
from zpipe.schemas.storage import as_local

LABELS_NAME = "labels.csv"
MAX_NAMED_CLASSES = 1_000_000  # each index up to the highest takes a place in the list of names


@dataclass(frozen=True, kw_only=True)
class Record:
    """One sample to be written into a tar."""

    key: str
    """Its key, unique in the data set."""
    suffix: str
    """Suffix of the image file, by its format."""
    image: bytes
    """The image file."""
    label: int
    """Class index."""
    meta: dict[str, Any]
    """Content of `key.json`: width, height, source, ..."""


@dataclass(frozen=True, kw_only=True)
class Rejected:
    """A source file that cannot be read as an image."""

    file: str
    """The file."""
    reason: str
    """Why it cannot be read."""


class Source(Protocol):
    """Where images come from. Part i is what shard i will hold; parts do not depend on each other."""

    classes: tuple[str, ...]
    """Class names; empty if only indices are known."""

    def describe(self) -> dict[str, Any]:
        """What determines the samples, as JSON values: a folder of shards is only resumed by an equal source."""

    def parts(self) -> int:
        """Number of parts."""

    def records(self, part: int) -> Iterator[Record | Rejected]:
        """The samples of one part, in order, and the files that cannot be read."""


@dataclass(frozen=True)
class _SourceFile:
    path: str
    key: str
    label: int


class FolderSource:
    """Image files of an ImageFolder tree (one sub-folder per class, sorted) or of a folder with `labels.csv`.

    `labels.csv` has columns `file` and `class_index`, and may have `class_name`.

    Args:
        root: The folder.
        shard_size: Images per part.
        shuffle_seed: Seed of the order of images; None keeps the order of the source.
        key_rule: How a key is made of a file name: a name of `zpipe.schemas.sample.KEY_RULES`.

    Raises:
        UsageError: The folder is absent or holds no images, or an argument makes no sense.
        ZpipeError: A line of `labels.csv` or the name of a file is wrong; the message names it.
    """

    def __init__(self, root: Path, *, shard_size: int, shuffle_seed: int | None, key_rule: str) -> None:
        check_choice("--keys", key_rule, KEY_RULES)
        self.root = as_local(root)
        if not self.root.is_dir():
            raise UsageError(
                f"{root}: no such folder; give a folder of images, cifar10:PATH, flowers102:PATH, "
                "or 'scenes' for the embedded data"
            )
        if shuffle_seed is not None:
            check_seed(shuffle_seed)
        self.shard_size = shard_size
        self._settings = {"shard_size": shard_size, "shuffle_seed": shuffle_seed, "key_rule": key_rule}
        labelled = self._from_csv() if (self.root / LABELS_NAME).is_file() else self._from_tree()
        self._files = self._with_keys(labelled, key_rule)
        if shuffle_seed is not None:
            order = np.random.default_rng(shuffle_seed).permutation(len(self._files))
            self._files = [self._files[i] for i in order]

    def _from_csv(self) -> list[tuple[str, int]]:
        path = self.root / LABELS_NAME
        rows: list[tuple[str, int]] = []
        names: dict[int, str] = {}
        try:
            # utf-8-sig, because spreadsheets begin the file with a byte order mark.
            with open(path, newline="", encoding="utf-8-sig") as file:
                reader = csv.DictReader(file)
                missing = {"file", "class_index"} - set(reader.fieldnames or ())
                if missing:
                    raise ZpipeError(
                        f"{path}: no column {sorted(missing)[0]!r}; the header must name file and class_index"
                    )
                for row in reader:
                    name, label = self._checked(row, f"{path}: line {reader.line_num}")
                    rows.append((name, label))
                    if row.get("class_name"):
                        names[label] = row["class_name"]
        except (UnicodeDecodeError, csv.Error) as error:
            raise ZpipeError(f"{path}: not readable as a UTF-8 CSV file ({error}); save it as one") from error
        if not rows:
            raise UsageError(f"{path}: lists no images; add a line per image")
        highest = max(label for _, label in rows)
        if names and highest >= MAX_NAMED_CLASSES:
            raise ZpipeError(
                f"{path}: class_index {highest} with a column class_name: names are kept up to index "
                f"{MAX_NAMED_CLASSES - 1}; number the classes from 0, or remove the column"
            )
        # Only the names of classes that occur are known; the others are empty, so that each name is at its index.
        self.classes = tuple(names.get(i, "") for i in range(highest + 1)) if names else ()
        return rows

    def _checked(self, row: dict[str, str | None], where: str) -> tuple[str, int]:
        label = row["class_index"] or ""
        # Longer numbers do not fit into the int32 of a relevance store.
        if not label.isdecimal() or len(label) > 9:
            raise ZpipeError(f"{where}: class_index {label!r} is not a whole number from 0 to 999999999; correct it")
        name = row["file"] or ""
        if os.path.isabs(name) or ".." in Path(name).parts or not (self.root / name).is_file():
            raise ZpipeError(f"{where}: no file {name!r} in this folder; correct or remove the line")
        return name, int(label)

    def _from_tree(self) -> list[tuple[str, int]]:
        folders = sorted(
            entry.name for entry in os.scandir(self.root) if entry.is_dir() and not entry.name.startswith(".")
        )
        rows: list[tuple[str, int]] = []
        for label, folder in enumerate(folders):
            for where, _, names in sorted(os.walk(self.root / folder)):
                inside = os.path.relpath(where, self.root)
                rows += [(f"{inside}/{name}", label) for name in sorted(names) if _looks_like_image(name)]
        if not rows:
            raise UsageError(
                f"{self.root}: no images found; expected one sub-folder a class, or a {LABELS_NAME} "
                "with columns file, class_index"
            )
        self.classes = tuple(folders)
        return rows

    def _with_keys(self, rows: list[tuple[str, int]], key_rule: str) -> list[_SourceFile]:
        owner: dict[str, str] = {}
        files = []
        for path, label in rows:
            key = key_for_file(path, key_rule)
            try:
                path.encode()
            except UnicodeEncodeError as error:
                raise ZpipeError(f"{self.root}: the name of {path!r} is not UTF-8; rename the file") from error
            if not key:
                raise ZpipeError(f"{self.root / path}: its name gives an empty key; rename the file")
            if key in owner:
                remedy = "rename one" if key_rule == "path" else "rename one, or use --keys path"
                raise ZpipeError(f"{self.root / path}: has the key {key!r} of {owner[key]}; {remedy}")
            owner[key] = path
            files.append(_SourceFile(path, key, label))
        return files

    def describe(self) -> dict[str, Any]:
        """See `Source`."""
        listing = "\n".join(f"{file.path}\t{file.label}" for file in self._files)
        return {"source": str(self.root)} | self._settings | {"listing_sha256": digest_keys([listing])}

    def parts(self) -> int:
        """See `Source`."""
        return -(-len(self._files) // self.shard_size)

    def records(self, part: int) -> Iterator[Record | Rejected]:
        """See `Source`."""
        files = self._files[part * self.shard_size : (part + 1) * self.shard_size]
        # PIL releases the interpreter lock while it decodes, so threads use every core.
        with ThreadPoolExecutor(max_workers=os.cpu_count() or 1) as pool:
            yield from pool.map(self._read, files)

    def _read(self, file: _SourceFile) -> Record | Rejected:
        try:
            data = (self.root / file.path).read_bytes()
            suffix, width, height = inspect_image(data)
        except (OSError, ValueError) as error:
            return Rejected(file=file.path, reason=str(error).split("\n")[0])
        meta = {"width": width, "height": height, "source": file.path}
        return Record(key=file.key, suffix=suffix, image=data, label=file.label, meta=meta)


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
        first = part * self.shard_size
        count = min(self.shard_size, self.count - first)
        seed = int(np.random.SeedSequence([self.seed, part]).generate_state(1)[0])
        number = first
        for batch in make_scenes(count, split=self.split, seed=seed, config=self.config):
            for image, label, box in zip(batch.images, batch.labels, batch.boxes, strict=True):
                buffer = io.BytesIO()
                Image.fromarray(image).save(buffer, "JPEG", quality=self.JPEG_QUALITY)
                height, width = image.shape[:2]
                meta = {"width": width, "height": height, "source": "scenes", "box": [float(edge) for edge in box]}
                yield Record(
                    key=f"{self.split}_{number:07d}", suffix="jpg", image=buffer.getvalue(), label=int(label), meta=meta
                )
                number += 1


def check_seed(seed: int) -> None:
    """Raise :class:`UsageError` for a seed below 0."""
    if seed < 0:
        raise UsageError(f"--seed {seed}: give a whole number >= 0")


def _looks_like_image(name: str) -> bool:
    return not name.startswith(".") and name.rpartition(".")[2].lower() in IMAGE_SUFFIXES


def inspect_image(data: bytes) -> tuple[str, int, int]:
    """Decode an image completely. Returns the suffix of its true format, its width and its height.

    Raises:
        OSError, ValueError: It cannot be decoded, has a format that shards do not hold, or is a decompression bomb.
    """
    try:
        with open_image(data) as image:
            image.load()
            if image.format not in SUFFIX_OF_FORMAT:
                raise ValueError(f"{image.format} is none of {', '.join(SUFFIX_OF_FORMAT)}")
            return SUFFIX_OF_FORMAT[image.format], image.width, image.height
    except (OSError, ValueError):
        raise
    except DECODE_ERRORS as error:
        raise ValueError(f"broken image: {error}") from error


def scene_config(image_size: int | None, overrides: dict[str, Any]) -> SceneConfig:
    """The default scene configuration with some fields replaced. Raises :class:`UsageError` for an unknown field."""
    if image_size is not None:
        overrides = overrides | {"image_size": image_size}
    try:
        return replace(SceneConfig(), **overrides)
    except (TypeError, ValueError) as error:
        raise UsageError(f"scenes: {error}; see `zpipe make-shards --help`") from error
