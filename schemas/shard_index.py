"""The index of a folder of tar shards, `shards.json`: what each tar holds, to notice truncated or altered tars.

A tar that was truncated between two samples can be read without an error; only its count and digest reveal it.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from io import BufferedReader
from pathlib import Path
from typing import Annotated, cast

import msgspec
import numpy as np

from zpipe.schemas.account import Account, AccountRecord
from zpipe.schemas.atomic import write_json
from zpipe.schemas.errors import UsageError, ZpipeError
from zpipe.schemas.formats import Count, Digest, Format, Text
from zpipe.schemas.names import printable
from zpipe.schemas.sample import shard_stem
from zpipe.schemas.storage import as_path, check_reachable, file_sizes, is_remote, names_in, open_file, storage_errors
from zpipe.schemas.tar_file import TAR_BLOCK

INDEX_NAME = "shards.json"
ARCHIVE_SUFFIXES = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".zip", ".gz", ".zst")


@dataclass(frozen=True, kw_only=True)
class ShardEntry:
    """One tar."""

    name: str
    """File name."""
    count: Count
    """Number of samples."""
    bytes: Count
    """Size of the file in bytes."""
    sha256: Annotated[str, msgspec.Meta(pattern="^([0-9a-f]{64})?$")]
    """SHA-256 (hex) of the file; "" for a tar that was only listed."""
    keys_sha256: Digest
    """`digest_keys` of its keys, in order."""
    images_sha256: Annotated[str, msgspec.Meta(pattern="^([0-9a-f]{64})?$")] = ""
    """`zpipe.schemas.shard_images.digest_images` of its images, in order; "" if that is not known."""

    def __post_init__(self) -> None:
        # A name of a file, never a path. msgspec adds the place in the file to the message.
        if not self.name.endswith(".tar") or len(self.name) > 255 or "/" in self.name or "\\" in self.name:
            raise ValueError(f"{printable(self.name)[:80]!r} is no file name of a tar")
        if printable(self.name) != self.name:
            raise ValueError(f"the name '{printable(self.name)[:80]}' has unprintable characters")

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
    account: Account = field(default_factory=Account)
    """What the source held, and what of it is in the tars; nothing seen if that is not known."""
    is_file: bool = field(default=True, compare=False)
    """Whether there is a `shards.json`; False if the tars were only listed."""

    @property
    def count(self) -> int:
        """Number of samples."""
        return sum(entry.count for entry in self.shards)

    @property
    def left_out(self) -> str:
        """A line about images of tars without a `shards.json` that belong to no sample; empty if there are none.

        A command that read such tars ends with it. Whoever wrote a `shards.json` has been told.
        """
        if self.is_file or not self.account.images_left_out:
            return ""
        return (
            f"{self.source}: {self.account.images_left_out} images were left out ({self.account}); a key ends at the "
            f"first dot of a name: rename them KEY.jpg in new tars, or run zpipe make-shards --index-only "
            f"{self.source} once to go on without them"
        )


@dataclass(frozen=True, kw_only=True)
class _IndexFile:
    """Content of `shards.json`."""

    shards: tuple[ShardEntry, ...]
    classes: tuple[Text, ...]
    source: Text
    count: Count
    account: AccountRecord = field(default_factory=AccountRecord)


FORMAT = Format(
    name="zpipe-shards",
    version=1,
    content=_IndexFile,
    what="a shard index",
    remedy="run make-shards again, with --index-only for tars that it did not make",
    max_bytes=1 << 30,  # a million shards take 267 MB
)


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
    with open_file(path) as file:
        return hashlib.file_digest(cast(BufferedReader, file), "sha256").hexdigest()


def write_index(folder: Path, index: ShardIndex) -> None:
    """Write `shards.json`, the commit point of a shard folder: about 250 bytes per shard."""
    content = {
        "count": index.count,
        "shards": [vars(entry) for entry in index.shards],
        "classes": index.classes,
        "source": index.source,
        "account": index.account.to_json(),
    }
    write_json(as_path(folder) / INDEX_NAME, FORMAT.header | content)


def read_index(folder: Path) -> ShardIndex:
    """Read and check `shards.json`. Raises :class:`ZpipeError` if it is absent or damaged."""
    path = as_path(folder) / INDEX_NAME
    read = FORMAT.read(path)
    index = ShardIndex(
        shards=read.shards, classes=read.classes, source=read.source, account=Account.from_record(read.account)
    )
    stems = Counter(entry.stem for entry in read.shards)
    if len(stems) != len(read.shards):
        raise ZpipeError(f"{path}: two shards share a name, {stems.most_common(1)[0][0]}; {FORMAT.remedy}")
    if index.count != read.count:
        raise ZpipeError(
            f"{path}: its count is {read.count}, that of its shards together {index.count}; {FORMAT.remedy}"
        )
    return index


def has_index(folder: Path) -> bool:
    """Whether something lies at `shards.json` of a folder, be it readable or not; it must not be passed by."""
    path = as_path(folder) / INDEX_NAME
    return path.is_file() if is_remote(path) else os.path.lexists(path)


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
            raise UsageError(f"{path}: not a .tar file; {_remedy_for(path.name)}")
        return path.parent, [path]
    if not is_folder:
        raise UsageError(f"{path}: no such folder; give a folder of tar shards (zpipe make-shards makes one)")
    if not tars:
        archive = next((name for name in names_in(path) if name.lower().endswith(ARCHIVE_SUFFIXES)), "")
        held = f", but {archive}" if archive else ""
        raise UsageError(f"{path}: holds no .tar file{held}; {_remedy_for(archive)}")
    return path, tars


def _remedy_for(name: str) -> str:
    if name.lower().endswith(ARCHIVE_SUFFIXES):
        return (
            "shards are plain tars: unpack it (gunzip, unxz, unzstd or unzip) and give the .tar, or make shards of it"
        )
    return "give a folder of tar shards (zpipe make-shards makes one), or one tar"


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
        if entry.count > size // TAR_BLOCK:  # each sample has a header of its own
            raise ZpipeError(
                f"{folder / INDEX_NAME}: says that {tar.name} holds {entry.count} samples, too many for its {size} "
                f"bytes; {FORMAT.remedy}"
            )
        picked.append(entry)
    return picked
