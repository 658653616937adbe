"""Pack images into WebDataset tar shards with an index: `key.jpg` (original bytes), `key.cls`, `key.json`.

Shards are independent of each other: a killed run resumes with the first one that is missing. Memory holds up to the
images of one shard, where reading them is faster than writing the tar.
"""

from __future__ import annotations

import csv
import io
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import webdataset as wds

from zpipe.pipeline.shard_reader import scan_shards
from zpipe.pipeline.sources import FolderSource, Record, Rejected, SceneSource, Source
from zpipe.schemas.atomic import claim_folder, commit, write_bytes
from zpipe.schemas.errors import UsageError, ZpipeError
from zpipe.schemas.formats import check_format, header
from zpipe.schemas.progress import Progress, silent
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

__all__ = ["FolderSource", "MakeShardsReport", "Record", "Rejected", "SceneSource", "index_shards", "make_shards"]

PROGRESS_NAME = "make-shards.jsonl"
FORMAT = "zpipe-make-shards"
VERSION = 1
QUARANTINE_NAME = "quarantine.csv"


@dataclass(frozen=True, kw_only=True)
class MakeShardsReport:
    """What a run did."""

    count: int
    """Samples in the folder."""
    shards: int
    """Shards in the folder."""
    written: int
    """Shards that this run wrote."""
    classes: int
    """Number of class names."""
    quarantined: tuple[Rejected, ...]
    """Files that cannot be read as images."""


def make_shards(source: Source, out: Path, *, progress: Progress = silent) -> MakeShardsReport:
    """Write every part of a source as a tar, then the index `shards.json`.

    A folder that was begun from this source is resumed; a finished one is left as it is. Unreadable images are listed
    in `quarantine.csv` and in the report; the others are written.

    Args:
        source: The images.
        out: Folder on this machine.
        progress: Reports the parts that have been written.

    Raises:
        UsageError: `out` holds something else or is a URL.
        ZpipeError: `out` was made from another source or with other settings, or it cannot be written.
    """
    # Finished parts are recorded line by line, and object stores cannot append to a file.
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
    """Write `shards.json` for existing tars, by reading each of them once.

    Args:
        folder: Folder or URL of the tars.
        progress: Reports the tars that have been read.

    Raises:
        UsageError: There are no tars, or the index exists already.
        ZpipeError: A tar is broken, or two tars hold the same key; nothing is written then.
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
        # With a fixed time and owner, the same source gives the same bytes.
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
    # A kill or a full disk may truncate the last line; every line that ends in a newline is whole.
    try:
        values = [json.loads(line) for line in lines[:-1]]
    except ValueError as error:
        raise ZpipeError(f"{path}: not readable ({error}); give another output folder") from error
    if not values:
        return {}
    check_format(path, values[0], FORMAT, VERSION, remedy="give another output folder")
    for name in first | values[0]:  # settings come before digests
        if first.get(name) != values[0].get(name):
            raise ZpipeError(
                f"{out}: was made with {name} = {values[0].get(name)!r}, now it is {first.get(name)!r}; "
                "give another output folder"
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
