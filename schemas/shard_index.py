"""The index of a folder of tar shards, `shards.json`: what each tar holds, to notice truncated or altered tars.

A tar that was truncated between two samples can be read without an error; only its count and digest reveal it.
"""

from __future__ import annotations

import hashlib
import os
import shlex
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from io import BufferedReader
from itertools import groupby
from pathlib import Path
from typing import Annotated, cast

import msgspec
import numpy as np

from zpipe.schemas.account import Account, AccountRecord
from zpipe.schemas.atomic import write_json
from zpipe.schemas.errors import UsageError, ZpipeError
from zpipe.schemas.formats import Count, Digest, Format, Text
from zpipe.schemas.names import printable
from zpipe.schemas.sample import LABEL_FIELD, MAX_LABEL_FIELD, shard_stem
from zpipe.schemas.shard_patterns import (
    ARCHIVE_SUFFIXES,
    expand,
    is_pattern,
    is_too_long,
    no_tar,
    remedy_for_name,
)
from zpipe.schemas.storage import (
    as_path,
    check_reachable,
    file_sizes,
    is_remote,
    is_web,
    names_in,
    open_file,
    storage_errors,
)
from zpipe.schemas.tar_file import TAR_BLOCK

INDEX_NAME = "shards.json"


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
    folder: Annotated[str, msgspec.Meta(max_length=4096)] = ""
    """Absolute path or URL of its folder; "" if it lies beside the index."""

    def __post_init__(self) -> None:
        # A name of a file, never a path. msgspec adds the place in the file to the message.
        if not self.name.endswith(".tar") or len(self.name) > 255 or "/" in self.name or "\\" in self.name:
            raise ValueError(f"{printable(self.name)[:80]!r} is no file name of a tar")
        if printable(self.name) != self.name:
            raise ValueError(f"the name '{printable(self.name)[:80]}' has unprintable characters")
        if self.folder:
            _folder_of(self.folder)

    @property
    def stem(self) -> str:
        """File name without its suffix."""
        return shard_stem(self.name)


@lru_cache(maxsize=1024)
def _folder_of(text: str) -> Path:
    """The folder of a tar that lies elsewhere. Raises ValueError for what is no absolute path or allowed URL."""
    try:
        folder = as_path(text)
    except UsageError as error:
        raise ValueError(str(error)) from error
    if printable(text) != text or not (is_remote(folder) or folder.is_absolute()):
        raise ValueError(f"the folder '{printable(text)[:80]}' is no absolute path or URL")
    return folder


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
    label_field: str | None = None
    """Field of the .json that every label comes from, dotted where nested; None for .cls, or `label` of the .json."""
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
            f"first dot of a name: rename them KEY.jpg in new tars, or run {index_command(self.source)} once to go on "
            "without them"
        )


@dataclass(frozen=True, kw_only=True)
class _IndexFile:
    """Content of `shards.json`."""

    shards: tuple[ShardEntry, ...]
    classes: tuple[Text, ...]
    source: Text
    count: Count
    account: AccountRecord = field(default_factory=AccountRecord)
    label_field: Annotated[str, msgspec.Meta(max_length=MAX_LABEL_FIELD, pattern=LABEL_FIELD)] | None = None


FORMAT = Format(
    name="zpipe-shards",
    version=2,  # 1 has no label field and no folders; written for indexes without these
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
    shards = [
        {name: value for name, value in vars(entry).items() if name != "folder" or value} for entry in index.shards
    ]
    content = {
        "count": index.count,
        "shards": shards,
        "classes": index.classes,
        "source": index.source,
        "account": index.account.to_json(),
    }
    if index.label_field is not None:
        content["label_field"] = index.label_field
    # A reader of version 1 would take other labels, and look for the tars beside the index.
    version = 2 if index.label_field is not None or any(entry.folder for entry in index.shards) else 1
    write_json(as_path(folder) / INDEX_NAME, FORMAT.header | {"version": version} | content)


def read_index(folder: Path) -> ShardIndex:
    """Read and check `shards.json`. Raises :class:`ZpipeError` if it is absent or damaged."""
    path = as_path(folder) / INDEX_NAME
    read = FORMAT.read(path)
    index = ShardIndex(
        shards=read.shards,
        classes=read.classes,
        source=read.source,
        account=Account.from_record(read.account),
        label_field=read.label_field,
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
        path: A folder of tars, one tar, or a pattern of tars in one folder; a path or a URL. A file or a folder that
            has the name of a pattern is taken as it is.

    Returns:
        The folder, and its tars (or those of the pattern, which need not be there) sorted by name. A folder whose
        `shards.json` names tars elsewhere may have none.

    Raises:
        UsageError: There are none.
        ZpipeError: The folder cannot be read.
    """
    path = as_path(path)
    if not is_pattern(path) or not is_too_long(path):
        check_reachable(path)
        try:
            # A web server may answer for a folder as for a file, so testing a tar with `is_dir` may download all of it.
            is_tar = path.suffix == ".tar" and path.is_file()
            is_folder = not is_tar and path.is_dir()
            is_file = is_tar or (not is_folder and path.is_file())
            found = [entry for entry in path.glob("*.tar") if not entry.name.startswith(".")] if is_folder else []
        except storage_errors() as error:
            raise ZpipeError(f"{path}: can't be read ({error}); check the address and your access to it") from error
        if is_tar:
            return path.parent, [path]
        if is_file:
            raise no_tar(path)
        if is_folder and not found and not has_index(path):
            archive = next((name for name in names_in(path) if name.lower().endswith(ARCHIVE_SUFFIXES)), "")
            held = f", but {archive}" if archive else ""
            raise UsageError(f"{path}: holds no .tar file{held}; {remedy_for_name(archive)}")
        if is_folder:
            return path, sorted(found, key=lambda tar: tar.name)  # paths compare ten times as slowly
    if is_pattern(path):
        return _find_by_pattern(path)
    raise UsageError(f"{path}: no such folder; give a folder of tar shards (zpipe make-shards makes one)")


def _find_by_pattern(path: Path) -> tuple[Path, list[Path]]:
    try:
        folder, names = expand(path)
    except storage_errors() as error:
        raise ZpipeError(f"{path}: can't be read ({error}); check the address and your access to it") from error
    return folder, [folder / name for name in names]


def check_there(tars: Sequence[Path]) -> None:
    """Raise :class:`ZpipeError` naming the first tar that is not there; one request for each remote folder."""
    for folder, group in groupby(sorted(tars, key=lambda tar: str(tar.parent)), key=lambda tar: tar.parent):
        names = [tar.name for tar in group]
        sizes = _sizes(folder, names)
        missing = next((name for name in names if name not in sizes), None)
        if missing is not None:
            raise _absent(folder / missing)


def _absent(tar: Path) -> ZpipeError:
    return ZpipeError(f"{tar}: no such file; restore it, or correct the pattern or list that names it")


def _sizes(folder: Path, names: list[str]) -> dict[str, int]:
    try:
        return file_sizes(folder, names)
    except storage_errors() as error:
        raise ZpipeError(f"{folder}: can't be read ({error}); check the address and your access to it") from error


def open_index(path: Path) -> tuple[list[Path], list[ShardEntry], ShardIndex | None]:
    """Find tar shards with their index, as the readers of both programs do.

    Args:
        path: As for :func:`find_shards`.

    Returns:
        The tars, sorted by name; their index entries; and the index of the folder. Without an index there are no
        entries, and None.

    Raises:
        UsageError: There are no tars.
        ZpipeError: A tar is not there, or does not agree with the index in name or size.
    """
    path = as_path(path)
    folder, tars = find_shards(path)
    if not has_index(folder):
        if is_pattern(path):
            check_there(tars)
        return tars, [], None
    index = read_index(folder)
    entries = check_listed(folder, tars, index, whole_folder=folder == path)
    elsewhere = [entry for entry in index.shards if entry.folder] if folder == path else []
    if elsewhere:
        pairs = [*zip(tars, entries, strict=True), *_check_elsewhere(folder, elsewhere)]
        pairs.sort(key=lambda pair: pair[1].name)
        tars, entries = [tar for tar, _ in pairs], [entry for _, entry in pairs]
    return tars, entries, index


def find_tar(path: Path, stem: str) -> tuple[Path | None, str | None]:
    """Find one tar by its stem, without looking at the others.

    Args:
        path: As for :func:`find_shards`.
        stem: Stem of the tar.

    Returns:
        The tar, None if there is none of that name; and the label field of the index.
    """
    folder, tars = find_shards(path)
    index = read_index(folder) if has_index(folder) else None
    tar = next((tar for tar in tars if shard_stem(tar.name) == stem), None)
    if tar is None and index is not None and folder == as_path(path):
        elsewhere = (entry for entry in index.shards if entry.folder and entry.stem == stem)
        tar = next((_folder_of(entry.folder) / entry.name for entry in elsewhere), None)
    return tar, index.label_field if index else None


def index_command(path: str | Path) -> str:
    """The command that writes the index of tars that have none."""
    path = as_path(path)
    if is_pattern(path) or is_web(path):
        return f"zpipe make-shards --index-only {shlex.quote(str(path))} OUTPUT"
    return f"zpipe make-shards --index-only {shlex.quote(str(path.parent if path.suffix == '.tar' else path))}"


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
    entries = {entry.name: entry for entry in index.shards if not entry.folder}
    names = [tar.name for tar in tars]
    if whole_folder:
        missing = sorted(set(entries) - set(names))
        if missing:
            raise ZpipeError(
                f"{folder / missing[0]}: listed in {INDEX_NAME} but not there; restore it or make the shards again"
            )
    sizes = _sizes(folder, names)
    picked = []
    for tar in tars:
        entry = entries.get(tar.name)
        if entry is None:
            raise ZpipeError(f"{tar}: not listed in {folder / INDEX_NAME}; remove it or make the shards again")
        _check_size(tar, sizes.get(tar.name), entry, folder)
        picked.append(entry)
    return picked


def _check_elsewhere(folder: Path, entries: list[ShardEntry]) -> Iterator[tuple[Path, ShardEntry]]:
    """The tars that an index in `folder` names in other folders, with their entries."""
    for text, group in groupby(sorted(entries, key=lambda entry: entry.folder), key=lambda entry: entry.folder):
        place, own = _folder_of(text), list(group)
        sizes = _sizes(place, [entry.name for entry in own])
        for entry in own:
            _check_size(place / entry.name, sizes.get(entry.name), entry, folder)
            yield place / entry.name, entry


def _check_size(tar: Path, size: int | None, entry: ShardEntry, folder: Path) -> None:
    if size is None:
        raise _absent(tar)
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
