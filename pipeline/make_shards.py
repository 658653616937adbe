"""Pack images into WebDataset tar shards with an index: `key.jpg` (original bytes), `key.cls`, `key.json`.

Shards are independent of each other: a killed run resumes with the first one that is missing. Memory holds up to the
images of one shard, where reading them is faster than writing the tar.
"""

from __future__ import annotations

import csv
import errno
import io
import json
import os
import shlex
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import msgspec

from zpipe.pipeline.image_folder import FolderSource
from zpipe.pipeline.shard_reader import read_samples, scan_shards
from zpipe.pipeline.sources import Record, Rejected, SceneSource, Source
from zpipe.pipeline.tar_lists import list_tars
from zpipe.schemas.account import Account
from zpipe.schemas.atomic import claim_folder, commit, write_bytes
from zpipe.schemas.errors import UsageError, ZpipeError
from zpipe.schemas.formats import Count, Text, check_format, decode_json, header
from zpipe.schemas.names import printable
from zpipe.schemas.progress import Progress, silent
from zpipe.schemas.sample import check_label_field
from zpipe.schemas.shard_images import (
    IMAGES_SUFFIX,
    Images,
    digest_images,
    has_images,
    image_row,
    images_path,
    write_images,
)
from zpipe.schemas.shard_index import (
    INDEX_NAME,
    ShardEntry,
    ShardIndex,
    digest_keys,
    find_shards,
    has_index,
    index_command,
    open_index,
    read_index,
    write_index,
)
from zpipe.schemas.storage import as_local, as_path, is_remote, is_web, read_file
from zpipe.schemas.tar_writer import TarWriter

__all__ = ["FolderSource", "MakeShardsReport", "Record", "Rejected", "SceneSource", "index_shards", "make_shards"]

PROGRESS_NAME = "make-shards.jsonl"
FORMAT = "zpipe-make-shards"
VERSION = 1
QUARANTINE_NAME = "quarantine.csv"
MAX_PROGRESS_BYTES = 1 << 30  # a line has 300 bytes, and 100 for each image that was put aside


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
    """Files that look like images and cannot be used."""
    account: Account
    """What the source held, and what became of it."""


@dataclass(frozen=True, kw_only=True)
class _Part:
    """A line of the progress file: what became of one part."""

    part: Count
    entry: ShardEntry | None
    """The tar; None if the part has not one usable image."""
    rejected: tuple[Rejected, ...]
    noted: dict[Text, Annotated[int, msgspec.Meta(ge=0, le=2**53)]] = field(default_factory=dict)

    @property
    def account(self) -> Account:
        """What the part held."""
        taken = self.entry.count if self.entry else 0
        return Account(
            seen=taken + len(self.rejected), taken=taken, quarantined=len(self.rejected), noted=Counter(self.noted)
        )


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
    done = _read_progress(out, first, source)
    _write_progress(out, [first, *(asdict(part) for part in done.values())])
    number = source.parts()
    parts: list[_Part] = []
    images = written = 0
    outside: tuple[Rejected, ...] = getattr(source, "rejected", ())
    account = getattr(source, "account", Account()) + Account(seen=len(outside), quarantined=len(outside))
    for place in range(number):
        part = done.get(place)
        named = part is not None and (part.entry is None or part.entry.name == _tar_name(place, number))
        if part is None or not named or not _is_whole(out, part):
            part = _write_shard(source, place, number, out)
            written += 1
            _append_progress(out, asdict(part))
        parts.append(part)
        images += part.account.taken
        account += part.account
        progress("make-shards", place + 1, number, images=images, quarantined=account.quarantined)
    rejected = [*outside, *(item for part in parts for item in part.rejected)]
    entries = tuple(part.entry for part in parts if part.entry)
    if not entries:
        raise ZpipeError(
            f"{out}: not one readable image, {printable(rejected[0].file)}: {rejected[0].reason}; "
            "check the source folder"
        )
    earlier = read_index(out) if has_index(out) else None
    if earlier is not None:  # digests of images that were added to it since
        added = {entry.sha256: entry.images_sha256 for entry in earlier.shards}
        entries = tuple(
            entry if entry.images_sha256 else replace(entry, images_sha256=added.get(entry.sha256, ""))
            for entry in entries
        )
    index = ShardIndex(shards=entries, classes=source.classes, source=str(first["source"]), account=account)
    if earlier != index:
        _write_quarantine(out, rejected)
        write_index(out, index)
    return MakeShardsReport(
        count=index.count,
        shards=len(entries),
        written=written,
        classes=len(source.classes),
        quarantined=tuple(rejected),
        account=account,
    )


def index_shards(
    source: str | Path,
    output: Path | None = None,
    *,
    label_field: str | None = None,
    progress: Progress = silent,
) -> ShardIndex:
    """Write `shards.json` for existing tars, by reading each of them once, and the digests of their images.

    An index that was written without these digests gets them; what else it says stays.

    Args:
        source: Folder or URL of the tars, a pattern of some of them, or ``@FILE``, a list; see
            `zpipe.pipeline.tar_lists.list_tars`.
        output: Folder or URL for the index, new or empty, which then stands for these tars; None writes it beside them.
        label_field: Field of the .json that every label comes from, dotted where nested; None for the usual ones.
        progress: Reports the tars that have been read.

    Raises:
        UsageError: There are no tars, the index exists already, or it cannot be written beside the tars.
        ZpipeError: A tar is broken, is not what an earlier index says, or two tars hold the same key; `shards.json` is
            not written then.
    """
    check_label_field(label_field)
    if output is None and not str(source).startswith("@") and has_index(as_path(source)):
        earlier = read_index(as_path(source))
        if label_field is None and not all(has_images(as_path(source), entry) for entry in earlier.shards):
            return _add_digests(as_path(source), earlier, progress)
    tars = list_tars(source)
    folder = _folder_of_all(source, tars) if output is None else as_path(output)
    if is_web(folder):
        raise UsageError(f"{folder}: can't be written to; give a folder for the index as OUTPUT")
    if output is not None:
        claim_folder(folder, INDEX_NAME, "shard index", own=IMAGES_SUFFIX)
    if has_index(folder):
        raise UsageError(
            f"{folder / INDEX_NAME}: is there already, and commands that read these shards use it; delete it to index "
            "them again, or give another OUTPUT folder"
        )
    # What an index beside the tars says of labels and classes holds for one elsewhere, too.
    one_folder = all(tar.parent == tars[0].parent for tar in tars)
    beside = read_index(tars[0].parent) if one_folder and has_index(tars[0].parent) else None
    if beside is not None and label_field is None:
        label_field = beside.label_field
    index = scan_shards(
        tars,
        source="" if output is None else str(source),
        label_field=label_field,
        images_to=folder,
        progress=progress,
    )
    if beside is not None:
        _check_unchanged(tars, index.shards, beside)
        index = replace(index, classes=beside.classes if label_field == beside.label_field else ())
    if output is not None:
        folders = {tar.parent: str(tar.parent if is_remote(tar) else tar.parent.absolute()) for tar in tars}
        entries = (replace(entry, folder=folders[tar.parent]) for tar, entry in zip(tars, index.shards, strict=True))
        index = replace(index, shards=tuple(entries))
    write_index(folder, index)
    return index


def _add_digests(folder: Path, earlier: ShardIndex, progress: Progress) -> ShardIndex:
    """Write an earlier index again, with the digests of the images."""
    if is_web(folder):
        raise UsageError(f"{folder}: can't be written to; give a folder for the index: {index_command(folder)}")
    tars, entries, _ = open_index(folder)
    scanned = scan_shards(tars, label_field=earlier.label_field, images_to=folder, progress=progress)
    _check_unchanged(tars, scanned.shards, earlier)
    pairs = zip(entries, scanned.shards, strict=True)
    index = replace(earlier, shards=tuple(replace(entry, images_sha256=found.images_sha256) for entry, found in pairs))
    write_index(folder, index)
    return index


def _check_unchanged(tars: Sequence[Path], scanned: Sequence[ShardEntry], earlier: ShardIndex) -> None:
    """Check that tars are still what an earlier index says of those of their names."""
    known = {entry.name: entry.sha256 for entry in earlier.shards}
    for tar, found in zip(tars, scanned, strict=True):
        if known.get(found.name) and known[found.name] != found.sha256:
            raise ZpipeError(
                f"{tar}: its SHA-256 is {found.sha256[:12]}, {INDEX_NAME} says {known[found.name][:12]}: altered; "
                "restore it or make the shards again"
            )


def _folder_of_all(source: str | Path, tars: Sequence[Path]) -> Path:
    """The folder of tars that get their index beside them: all tars of one folder, which can be written to."""
    folder = tars[0].parent
    remedy = f"give a folder for the index: zpipe make-shards --index-only {shlex.quote(str(source))} OUTPUT"
    other = next((tar for tar in tars if tar.parent != folder), None)
    if other is not None:
        raise UsageError(f"{source}: tars of several folders ({tars[0]}, {other}); {remedy}")
    if is_web(folder) or not (is_remote(folder) or os.access(folder, os.W_OK)):
        raise UsageError(f"{folder}: can't be written to; {remedy}")
    named = {tar.name for tar in tars}
    left = next((tar for tar in find_shards(folder)[1] if tar.name not in named), None)
    if left is not None:
        raise UsageError(f"{source}: does not name {left}, and an index beside tars names them all; {remedy}")
    return folder


def _write_shard(source: Source, part: int, parts: int, out: Path) -> _Part:
    path = out / _tar_name(part, parts)
    images: Images = []
    rejected: list[Rejected] = []
    noted: Counter[str] = Counter()
    with commit(path) as tmp, open(tmp, "wb") as file, TarWriter(file, owner="zpipe") as tar:
        for record in source.records(part):
            if isinstance(record, Rejected):
                rejected.append(record)
                continue
            images.append(image_row(record.key, record.label, record.image))
            noted.update(record.notes)
            members = {record.suffix: record.image, "json": json.dumps(record.meta).encode()}
            if record.label is not None:
                members["cls"] = str(record.label).encode()
            for suffix, data in sorted(members.items()):
                tar.add(f"{record.key}.{suffix}", data)
        digest = tar.finish()
    entry: ShardEntry | None = None
    if images:
        entry = ShardEntry(
            name=path.name,
            count=len(images),
            bytes=tar.size,
            sha256=digest,
            keys_sha256=digest_keys(key for key, _, _ in images),
            images_sha256=digest_images(images),
        )
        write_images(out, entry.stem, images)
    else:
        path.unlink()
    return _Part(part=part, entry=entry, rejected=tuple(rejected), noted=dict(noted))


def _tar_name(part: int, parts: int) -> str:
    return f"shard-{part:0{max(5, len(str(parts - 1)))}d}.tar"


def _is_whole(out: Path, part: _Part) -> bool:
    if part.entry is None:
        return True
    path = out / part.entry.name
    has_images = not part.entry.images_sha256 or images_path(out, part.entry.stem).is_file()
    return path.is_file() and path.stat().st_size == part.entry.bytes and has_images


def _read_progress(out: Path, first: dict[str, Any], source: Source) -> dict[int, _Part]:
    path = out / PROGRESS_NAME
    remedy = "give another output folder"
    try:
        lines = read_file(path, MAX_PROGRESS_BYTES).split(b"\n")
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise ZpipeError(f"{path}: can't be read ({error.strerror}); {remedy}") from error
    # A kill or a full disk may truncate the last line; every line that ends in a newline is whole.
    if len(lines) < 2:
        return {}
    what = "a record of make-shards"
    begun = decode_json(lines[0], f"{path}: line 1", type=dict[str, Any], what=what, remedy=remedy)
    check_format(path, begun, FORMAT, VERSION, remedy=remedy)
    parts = [
        decode_json(line, f"{path}: line {number}", type=_Part, what=what, remedy=remedy)
        for number, line in enumerate(lines[1:-1], 2)
    ]
    if first.get("check") != begun.get("check"):
        how = "without --no-check; leave it out" if "check" in first else "with --no-check; give it too"
        raise ZpipeError(f"{out}: was made {how}, or {remedy}")
    for name in first | begun:  # settings come before digests
        if first.get(name) != begun.get(name) and (name != "files" or name in begun):
            raise ZpipeError(
                f"{out}: was made with {name} = {_short(begun.get(name))}, now it is {_short(first.get(name))}"
                f"{_changed_files(out, name, parts, source)}; {remedy}"
            )
    return {part.part: part for part in parts}


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 200 else text[:197] + "..."


def _changed_files(out: Path, name: str, parts: list[_Part], source: Source) -> str:
    """Which files came or went since `out` was begun, as far as its tars tell; empty if another setting changed."""
    if name not in ("files", "listing_sha256") or not hasattr(source, "files"):
        return ""
    packed = {item.file for part in parts for item in part.rejected}
    for part in parts:
        if part.entry is not None and _is_whole(out, part):
            packed |= {str(sample.meta.get("source")) for sample in read_samples(out / part.entry.name)}
    now = set(source.files())
    gone = sorted(packed - now)
    came = sorted(now - packed) if has_index(out) else []  # else they may be in parts that are not made
    found = [
        f"{len(files)} {verb}, {printable(files[0])} the first"
        for files, verb in ((gone, "are gone"), (came, "are new"))
        if files
    ]
    return f" ({'; '.join(found)})" if found else ""


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
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        remedy = "free space" if full else "fix what the reason names"
        raise ZpipeError(
            f"{path}: could not be written ({error.strerror}); {remedy}, then run the same command again to resume"
        ) from error


def _write_quarantine(out: Path, rejected: list[Rejected]) -> None:
    if not rejected:
        return
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(["file", "reason"])
    writer.writerows([item.file, item.reason] for item in rejected)
    write_bytes(out / QUARANTINE_NAME, text.getvalue().encode())
