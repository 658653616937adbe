"""Images into WebDataset tar shards with an index: `key.jpg` (original bytes), `key.cls`, `key.json`.

Sources: an ImageFolder tree (one folder a class), a flat folder with a `labels.csv`, and the embedded scenes; published
data sets are in `zpipe.pipeline.datasets`. Shards are independent of each other: a killed run goes on with the first one that
is missing. Memory holds the list of all files, some 170 bytes each, and up to one shard's images, where reading them is faster
than writing the tar; `shards.json` grows by about 250 bytes a shard.
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
import webdataset as wds
from PIL import Image

from zpipe.pipeline.scenes import SPLITS, SceneConfig, make_scenes
from zpipe.pipeline.shard_reader import open_image, scan_shards
from zpipe.schemas.atomic import claim_folder, commit, write_bytes
from zpipe.schemas.choices import check_choice
from zpipe.schemas.errors import UsageError, ZpipeError
from zpipe.schemas.formats import check_format, header
from zpipe.schemas.progress import Progress, silent
from zpipe.schemas.sample import DECODE_ERRORS, IMAGE_SUFFIXES, KEY_RULES, key_for_file
from zpipe.schemas.shard_index import (
    INDEX_NAME,
    ShardEntry,
    ShardIndex,
    digest_file,
    digest_keys,
    find_shards,
    read_index,
    write_index,
)
from zpipe.schemas.storage import as_local

PROGRESS_NAME = "make-shards.jsonl"
FORMAT = "zpipe-make-shards"
VERSION = 1
QUARANTINE_NAME = "quarantine.csv"
LABELS_NAME = "labels.csv"
MOST_CLASSES = 1_000_000  # that have names: each index up to the highest takes a place in the list of them
# What PIL calls a format -> the suffix its bytes get in the tar. MPO is a JPEG with further pictures behind the first.
SUFFIX_OF_FORMAT = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}


@dataclass(frozen=True, kw_only=True)
class Record:
    """One image on its way into a tar."""

    key: str
    suffix: str
    image: bytes
    label: int
    meta: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Rejected:
    """One source file that can't be read as an image, and why."""

    file: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class MakeShardsReport:
    """What a run made: samples and shards in the folder now, shards written by this run, files put in quarantine."""

    count: int
    shards: int
    written: int
    classes: int
    quarantined: tuple[Rejected, ...]


class Source(Protocol):
    """Where images come from. Part i is what shard i will hold; parts don't depend on each other."""

    classes: tuple[str, ...]

    def describe(self) -> dict[str, Any]: ...
    def parts(self) -> int: ...
    def records(self, part: int) -> Iterator[Record | Rejected]: ...


@dataclass(frozen=True)
class _SourceFile:
    path: str
    key: str
    label: int


class FolderSource:
    """Image files of an ImageFolder tree (class = sorted sub-folder) or of a flat folder with `labels.csv`.

    `labels.csv` has columns `file` and `class_index`, and may have `class_name`.
    Errors: :class:`UsageError` / :class:`ZpipeError` naming the folder, file or line.
    """

    def __init__(self, root: Path, *, shard_size: int, shuffle_seed: int | None, key_rule: str) -> None:
        check_choice("--keys", key_rule, KEY_RULES)
        self.root = as_local(root)
        if not self.root.is_dir():
            raise UsageError(
                f"{root}: no such folder; give a folder of images, cifar10:PATH, flowers102:PATH, or 'scenes' for the embedded data"
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
            # Spreadsheets put a byte order mark in front.
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
        if names and highest >= MOST_CLASSES:
            raise ZpipeError(
                f"{path}: class_index {highest} with a column class_name: names are kept up to index {MOST_CLASSES - 1}; "
                "number the classes from 0, or remove the column"
            )
        # Names are known only for classes that occur; an index of a larger label set keeps its place.
        self.classes = tuple(names.get(i, "") for i in range(highest + 1)) if names else ()
        return rows

    def _checked(self, row: dict[str, str | None], where: str) -> tuple[str, int]:
        label = row["class_index"] or ""
        # Longer numbers don't fit the int32 that a relevance store keeps.
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
                f"{self.root}: no images found; expected one sub-folder a class, or a {LABELS_NAME} with columns file, class_index"
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
        listing = "\n".join(f"{file.path}\t{file.label}" for file in self._files)
        return {"source": str(self.root)} | self._settings | {"listing_sha256": digest_keys([listing])}

    def parts(self) -> int:
        return -(-len(self._files) // self.shard_size)

    def records(self, part: int) -> Iterator[Record | Rejected]:
        files = self._files[part * self.shard_size : (part + 1) * self.shard_size]
        # PIL decodes outside the interpreter lock, so threads are enough to check images on every core.
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
    """The embedded data: handwritten digits hidden in scenes, encoded as JPEG; `key.json` carries the digit's box."""

    classes = tuple(str(digit) for digit in range(10))
    JPEG_QUALITY = 92

    def __init__(self, *, count: int, split: str, seed: int, config: SceneConfig, shard_size: int) -> None:
        check_choice("--split", split, SPLITS)
        if count < 1:
            raise UsageError(f"--count {count}: give a number of scenes >= 1")
        check_seed(seed)
        self.count, self.split, self.seed, self.config, self.shard_size = count, split, seed, config, shard_size

    def describe(self) -> dict[str, Any]:
        settings = {"count": self.count, "split": self.split, "seed": self.seed, "shard_size": self.shard_size}
        return {"source": "scenes", "config": json.loads(json.dumps(asdict(self.config)))} | settings

    def parts(self) -> int:
        return -(-self.count // self.shard_size)

    def records(self, part: int) -> Iterator[Record]:
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
    """Errors: :class:`UsageError` below 0."""
    if seed < 0:
        raise UsageError(f"--seed {seed}: give a whole number >= 0")


def _looks_like_image(name: str) -> bool:
    return not name.startswith(".") and name.rpartition(".")[2].lower() in IMAGE_SUFFIXES


def inspect_image(data: bytes) -> tuple[str, int, int]:
    """Decode an image fully; return the suffix of its true format, width and height.

    Errors: OSError or ValueError when it can't be decoded, is of a format that shards don't carry, or is a decompression bomb.
    """
    try:
        with open_image(data) as image:
            image.load()
            return SUFFIX_OF_FORMAT[image.format or ""], image.width, image.height
    except (OSError, ValueError):
        raise
    except DECODE_ERRORS as error:
        raise ValueError(f"broken image: {error}") from error


def make_shards(source: Source, out: Path, *, progress: Progress = silent) -> MakeShardsReport:
    """Write every part of `source` as a tar into `out`, then the index `shards.json`.

    A folder that this source has begun is gone on with; one that is finished is left as it is. Unreadable images are
    listed in `quarantine.csv` and in the report; the rest is written.
    Errors: :class:`UsageError` when `out` holds something else or is a URL; :class:`ZpipeError` when it was made from another source or
    settings, or can't be written.
    """
    # What is done is noted line by line, and object stores can't append.
    out = as_local(out)
    claim_folder(out, PROGRESS_NAME, "shards")
    first = header(FORMAT, VERSION) | source.describe()
    done = _read_progress(out, first)
    parts = source.parts()
    entries: list[ShardEntry] = []
    rejected: list[Rejected] = []
    log = [first, *done.values()]
    _write_progress(out, log)
    written = images = 0
    for part in range(parts):
        line = done.get(part)
        if line is not None and _is_whole(out, line):
            entry = ShardEntry(**line["entry"]) if line["entry"] else None
            bad = [Rejected(**item) for item in line["rejected"]]
        else:
            entry, bad = _write_shard(source, part, parts, out)
            written += 1
            _append_progress(
                out, {"part": part, "entry": asdict(entry) if entry else None, "rejected": [asdict(r) for r in bad]}
            )
        if entry:
            entries.append(entry)
            images += entry.count
        rejected += bad
        progress("make-shards", part + 1, parts, images=images, quarantined=len(rejected))
    if not entries:
        raise ZpipeError(
            f"{out}: not one readable image, {rejected[0].file}: {rejected[0].reason}; check the source folder"
        )
    index = ShardIndex(shards=tuple(entries), classes=source.classes, source=str(first["source"]))
    if not (out / INDEX_NAME).is_file() or read_index(out) != index:
        _write_quarantine(out, rejected)
        write_index(out, index)
    return MakeShardsReport(
        count=index.count,
        shards=len(entries),
        written=written,
        classes=len(source.classes),
        quarantined=tuple(rejected),
    )


def index_shards(folder: Path, *, progress: Progress = silent) -> ShardIndex:
    """Write `shards.json` for tars that somebody else made, by reading each of them once. `folder` may be a URL.

    Errors: :class:`ZpipeError` naming a tar that is broken, or two that hold the same key; nothing is written then.
    """
    folder, tars = find_shards(folder)
    if (folder / INDEX_NAME).is_file():
        raise UsageError(f"{folder / INDEX_NAME}: is there already; delete it to index the folder again")
    index = ShardIndex(shards=tuple(scan_shards(tars, progress=progress)), source=str(folder))
    write_index(folder, index)
    return index


def _write_shard(source: Source, part: int, parts: int, out: Path) -> tuple[ShardEntry | None, list[Rejected]]:
    path = out / f"shard-{part:0{max(5, len(str(parts - 1)))}d}.tar"
    keys: list[str] = []
    rejected: list[Rejected] = []
    entry = None
    with commit(path) as tmp, open(tmp, "wb") as file:
        # A fixed time and owner: the same source gives the same bytes.
        with wds.TarWriter(file, user="zpipe", group="zpipe", mtime=0, format="PAX_FORMAT") as tar:
            for record in source.records(part):
                if isinstance(record, Rejected):
                    rejected.append(record)
                    continue
                keys.append(record.key)
                tar.write(
                    {
                        "__key__": record.key,
                        record.suffix: record.image,
                        "cls": str(record.label).encode(),
                        "json": json.dumps(record.meta).encode(),
                    }
                )
        file.flush()
        size, digest = os.path.getsize(tmp), digest_file(tmp)
        entry = ShardEntry(name=path.name, count=len(keys), bytes=size, sha256=digest, keys_sha256=digest_keys(keys))
    if not keys:
        path.unlink()
        return None, rejected
    return entry, rejected


def _is_whole(out: Path, line: dict[str, Any]) -> bool:
    if line["entry"] is None:
        return True
    path = out / line["entry"]["name"]
    return path.is_file() and path.stat().st_size == line["entry"]["bytes"]


def _read_progress(out: Path, first: dict[str, Any]) -> dict[int, dict[str, Any]]:
    path = out / PROGRESS_NAME
    if not path.is_file():
        return {}
    lines = path.read_bytes().split(b"\n")
    # A kill or a full disk may leave the last line torn; every line that ends in a newline is whole.
    try:
        values = [json.loads(line) for line in lines[:-1]]
    except ValueError as error:
        raise ZpipeError(f"{path}: not readable ({error}); give another output folder") from error
    if not values:
        return {}
    check_format(path, values[0], FORMAT, VERSION, remedy="give another output folder")
    for name in first | values[0]:  # what people set comes before digests
        if first.get(name) != values[0].get(name):
            raise ZpipeError(
                f"{out}: was made with {name} = {values[0].get(name)!r}, now it is {first.get(name)!r}; give another output folder"
            )
    return {value["part"]: value for value in values[1:]}


def _write_progress(out: Path, lines: list[dict[str, Any]]) -> None:
    path, data = out / PROGRESS_NAME, b"".join(json.dumps(line).encode() + b"\n" for line in lines)
    if not path.is_file() or path.read_bytes() != data:
        write_bytes(path, data)


def _append_progress(out: Path, line: dict[str, Any]) -> None:
    path = out / PROGRESS_NAME
    try:
        with open(path, "ab") as file:
            file.write(json.dumps(line).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise ZpipeError(f"{path}: could not be written ({error.strerror}); free space, then run again") from error


def _write_quarantine(out: Path, rejected: list[Rejected]) -> None:
    if not rejected:
        return
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(["file", "reason"])
    writer.writerows([item.file, item.reason] for item in rejected)
    write_bytes(out / QUARANTINE_NAME, text.getvalue().encode())


def scene_config(image_size: int | None, overrides: dict[str, Any]) -> SceneConfig:
    """The default scene configuration with fields replaced. Errors: :class:`UsageError` for an unknown field."""
    if image_size is not None:
        overrides = overrides | {"image_size": image_size}
    try:
        return replace(SceneConfig(), **overrides)
    except (TypeError, ValueError) as error:
        raise UsageError(f"scenes: {error}; see `zpipe make-shards --help`") from error
