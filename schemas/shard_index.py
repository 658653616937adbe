"""The index of a folder of tar shards, `shards.json`: what each tar holds, so that a cut or altered one is noticed.

A tar cut on a sample boundary reads without an error; only the count and the digest tell (see `ShardEntry`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from zpipe.schemas.atomic import read_json, write_json
from zpipe.schemas.errors import UsageError, ZpipeError
from zpipe.schemas.formats import check_format, header
from zpipe.schemas.sample import shard_stem
from zpipe.schemas.storage import as_path, check_reachable, file_sizes, storage_errors

INDEX_NAME = "shards.json"
FORMAT = "zpipe-shards"
VERSION = 1


@dataclass(frozen=True, kw_only=True)
class ShardEntry:
    """One tar: file name, samples, bytes, SHA-256 of the file, SHA-256 of its keys (in order, newline-joined)."""

    name: str
    count: int
    bytes: int
    sha256: str
    keys_sha256: str

    @property
    def stem(self) -> str:
        return shard_stem(self.name)


@dataclass(frozen=True, kw_only=True)
class ShardIndex:
    """All tars of one data set in order. `classes` are the class names, or empty when only indices are known."""

    shards: tuple[ShardEntry, ...]
    classes: tuple[str, ...] = ()
    source: str = ""

    @property
    def count(self) -> int:
        return sum(entry.count for entry in self.shards)


def digest_keys(keys: Iterable[str]) -> str:
    """SHA-256 (hex) of keys joined by newlines, in the order given."""
    return hashlib.sha256("\n".join(keys).encode()).hexdigest()


def met_again(hashes: Sequence[np.ndarray]) -> Iterator[tuple[int, np.ndarray]]:
    """Of arrays of int64 hashes of keys, one a shard, each one's number and its rows whose hash is met more than once: keys
    that are worth a comparison, and where two are equal surely among them."""
    ordered = np.sort(np.concatenate([np.zeros(0, np.int64), *hashes]))
    doubled = np.unique(ordered[1:][ordered[1:] == ordered[:-1]])
    if not len(doubled):
        return
    for number, own in enumerate(hashes):
        if len(rows := np.flatnonzero(np.isin(own, doubled))):
            yield number, rows


def digest_file(path: Path) -> str:
    """SHA-256 (hex) of a file's bytes."""
    with as_path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_index(folder: Path, index: ShardIndex) -> None:
    """Write `shards.json`: the commit point of a shard folder. Grows by about 250 bytes a shard."""
    write_json(as_path(folder) / INDEX_NAME, header(FORMAT, VERSION) | {"count": index.count} | asdict(index))


def read_index(folder: Path) -> ShardIndex:
    """Read and check `shards.json`. Errors: :class:`ZpipeError` naming the file and what is wrong."""
    path = as_path(folder) / INDEX_NAME
    value = read_json(path, "a shard index")
    check_format(path, value, FORMAT, VERSION, remedy="run make-shards again")
    try:
        shards = tuple(ShardEntry(**entry) for entry in value["shards"])
        index = ShardIndex(shards=shards, classes=tuple(value["classes"]), source=value["source"])
    except (KeyError, TypeError) as error:
        raise ZpipeError(f"{path}: not a complete shard index ({error}); run make-shards again") from error
    stems = [entry.stem for entry in shards]
    if len(set(stems)) != len(stems):
        raise ZpipeError(f"{path}: two shards share a name; run make-shards again")
    return index


def find_shards(path: Path) -> tuple[Path, list[Path]]:
    """The folder and the tars that `path` (a folder of tars, or one tar) stands for, sorted by name.

    Errors: :class:`UsageError` when nothing is there.
    """
    path = as_path(path)
    check_reachable(path)
    try:
        is_file, is_folder = path.is_file(), path.is_dir()
        tars = sorted(entry for entry in path.glob("*.tar") if not entry.name.startswith(".")) if is_folder else []
    except storage_errors() as error:
        raise ZpipeError(f"{path}: can't be read ({error}); check the address and your access to it") from error
    if is_file:
        if path.suffix != ".tar":
            raise UsageError(f"{path}: not a .tar file; give a folder of tar shards or one tar")
        return path.parent, [path]
    if not is_folder:
        raise UsageError(f"{path}: no such folder; give a folder of tar shards (zpipe make-shards makes one)")
    if not tars:
        raise UsageError(f"{path}: holds no .tar file; give a folder of tar shards (zpipe make-shards makes one)")
    return path, tars


def check_listed(folder: Path, tars: list[Path], index: ShardIndex, *, whole_folder: bool) -> list[ShardEntry]:
    """The index entries of `tars`; the folder and its index must name the same files, of the same size.

    Errors: :class:`ZpipeError` naming the tar that is missing, unknown to the index, or of another size (cut, altered).
    """
    entries = {entry.name: entry for entry in index.shards}
    names = [tar.name for tar in tars]
    sizes = file_sizes(folder, names)
    if whole_folder:
        missing = sorted(set(entries) - set(names))
        if missing:
            raise ZpipeError(
                f"{folder / missing[0]}: listed in {INDEX_NAME} but not there; restore it or make the shards again"
            )
    picked = []
    for tar in tars:
        entry = entries.get(tar.name)
        if entry is None:
            raise ZpipeError(f"{tar}: not listed in {folder / INDEX_NAME}; remove it or make the shards again")
        size = sizes.get(tar.name, 0)
        if size != entry.bytes:
            raise ZpipeError(
                f"{tar}: {size} bytes, but {INDEX_NAME} says {entry.bytes}: truncated or altered; restore it or make the shards again"
            )
        picked.append(entry)
    return picked
