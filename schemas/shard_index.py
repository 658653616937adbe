"""The index of a folder of tar shards, `shards.json`: what each tar holds, to notice truncated or altered tars.

A tar that was truncated between two samples can be read without an error; only its count and digest reveal it.
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
    """One tar."""

    name: str
    """File name."""
    count: int
    """Number of samples."""
    bytes: int
    """Size of the file in bytes."""
    sha256: str
    """SHA-256 (hex) of the file."""
    keys_sha256: str
    """`digest_keys` of its keys, in order."""

    @property
    def stem(self) -> str:
        """File name without its suffix."""
        return shard_stem(self.name)


@dataclass(frozen=True, kw_only=True)
class ShardIndex:
    """All tars of one data set."""

    shards: tuple[ShardEntry, ...]
    """The tars, in order."""
    classes: tuple[str, ...] = ()
    """Class names; empty if only indices are known."""
    source: str = ""
    """What the tars were made from."""

    @property
    def count(self) -> int:
        """Number of samples."""
        return sum(entry.count for entry in self.shards)


def digest_keys(keys: Iterable[str]) -> str:
    """SHA-256 (hex) of keys joined by newlines, in their order."""
    return hashlib.sha256("\n".join(keys).encode()).hexdigest()


def rows_with_repeated_hashes(hashes: Sequence[np.ndarray]) -> Iterator[tuple[int, np.ndarray]]:
    """Find the rows whose keys may occur more than once, so that only those keys need to be compared.

    Args:
        hashes: Hashes of the keys of each shard, int64 [n] each.

    Yields:
        For each shard that has any: its position in `hashes`, and its rows whose hash occurs more than once. Equal keys
        are always among them; different keys may be.
    """
    ordered = np.sort(np.concatenate([np.zeros(0, np.int64), *hashes]))
    repeated = np.unique(ordered[1:][ordered[1:] == ordered[:-1]])
    if not len(repeated):
        return
    for number, shard in enumerate(hashes):
        if len(rows := np.flatnonzero(np.isin(shard, repeated))):
            yield number, rows


def digest_file(path: Path) -> str:
    """SHA-256 (hex) of a file's bytes."""
    with as_path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_index(folder: Path, index: ShardIndex) -> None:
    """Write `shards.json`, the commit point of a shard folder: about 250 bytes per shard."""
    write_json(as_path(folder) / INDEX_NAME, header(FORMAT, VERSION) | {"count": index.count} | asdict(index))


def read_index(folder: Path) -> ShardIndex:
    """Read and check `shards.json`. Raises :class:`ZpipeError` if it is absent or damaged."""
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
    """Find tar shards.

    Args:
        path: A folder of tars, or one tar; a path or a URL.

    Returns:
        The folder, and its tars (or the one tar) sorted by name.

    Raises:
        UsageError: There are none.
        ZpipeError: The folder cannot be read.
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
    """Check that the tars of a folder are those of its index, by name and size.

    Args:
        folder: The folder.
        tars: The tars to look up.
        index: The index of the folder.
        whole_folder: Whether every tar of the index must be among `tars`.

    Returns:
        The index entry of each tar.

    Raises:
        ZpipeError: A tar is missing, unknown to the index, or of another size (truncated or altered).
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
                f"{tar}: {size} bytes, but {INDEX_NAME} says {entry.bytes}: truncated or altered; "
                "restore it or make the shards again"
            )
        picked.append(entry)
    return picked
