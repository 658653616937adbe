"""Reads tar shards as samples.

A shard is read as a whole and checked before any of its samples is used, so that a truncated tar gives an error and not
a short epoch. Nothing in a tar is unpickled, run or written to disk, whatever the names of its members.
"""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from zpipe.schemas.errors import UsageError, ZpipeError
from zpipe.schemas.names import check_key
from zpipe.schemas.sample import ALLOWED_SUFFIXES, Sample, check_tar_end, group_samples, split_name
from zpipe.schemas.shard_index import (
    INDEX_NAME,
    ShardEntry,
    ShardIndex,
    check_listed,
    digest_keys,
    find_shards,
    read_index,
)
from zpipe.schemas.storage import as_path, is_remote, storage_errors


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One tar of a data set."""

    path: Path
    entry: ShardEntry
    """Its entry in the shard index."""


def list_shards(path: Path) -> tuple[list[Shard], ShardIndex]:
    """List the tars under `path`, with their index.

    Public tars without a `shards.json` are listed by their headers, which takes some tenths of a second per shard;
    changes of their contents are then not noticed.

    Raises:
        UsageError: If there are no tars.
        ZpipeError: If folder and index disagree.
    """
    path = as_path(path)
    folder, tars = find_shards(path)
    if (folder / INDEX_NAME).is_file():
        index = read_index(folder)
        entries = check_listed(folder, tars, index, whole_folder=path.is_dir())
        return [Shard(path=tar, entry=entry) for tar, entry in zip(tars, entries, strict=True)], index
    if is_remote(folder):
        raise UsageError(
            f"{folder}: tar shards without {INDEX_NAME}; run `zpipe make-shards {folder} --index-only` once"
        )
    shards = [Shard(path=tar, entry=_scan_headers(tar)) for tar in tars]
    return shards, ShardIndex(shards=tuple(shard.entry for shard in shards), source=str(folder))


def _scan_headers(path: Path) -> ShardEntry:
    try:
        with open(path, "rb") as file:
            keys = dict.fromkeys(
                split_name(member.name)[0]
                for member in _headers(file, path)
                if split_name(member.name)[1] in ALLOWED_SUFFIXES
            )
    except OSError as error:
        raise _unreadable(path, error) from error
    if not keys:
        raise ZpipeError(f"{path}: holds no samples; remove it")
    for key in keys:
        check_key(key, str(path), "rebuild this shard with other names")
    return ShardEntry(
        name=path.name, count=len(keys), bytes=path.stat().st_size, sha256="", keys_sha256=digest_keys(keys)
    )


def read_tar(shard: Shard) -> list[Sample]:
    """Read the samples of one tar, in order. Images stay encoded, about 110 MB for 1,000 photos of ImageNet.

    A sample that can't be used is among them, with its `damage`.

    Raises:
        ZpipeError: If the tar is truncated, or its keys are not those of the index.
    """
    samples = list(group_samples(_members(shard.path), str(shard.path), keep_damaged=True))
    if len(samples) != shard.entry.count or digest_keys(item.key for item in samples) != shard.entry.keys_sha256:
        raise ZpipeError(
            f"{shard.path}: {len(samples)} samples, {INDEX_NAME} says {shard.entry.count}: truncated or altered; "
            "restore it or make the shards again"
        )
    return samples


def _members(path: Path) -> Iterator[tuple[str, bytes]]:
    try:
        # Opened anew: a remote path that comes from another process has lost its connection.
        data = as_path(path).read_bytes()
    except storage_errors() as error:
        raise _unreadable(path, error) from error
    for member in _headers(io.BytesIO(data), path):
        yield member.name, data[member.offset_data : member.offset_data + member.size]


def _headers(file: BinaryIO, path: Path) -> Iterator[tarfile.TarInfo]:
    """The regular files of a tar. Seeking over their contents is 2.5 times as fast as tarfile's streaming mode."""
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                if member.issparse():
                    raise ZpipeError(f"{path}: {member.name} is a sparse member; make the shards again")
                if member.isfile():
                    yield member
            file.seek(tar.offset)
            check_tar_end(file.read, path, blocks=2)
    except (tarfile.TarError, EOFError, ValueError) as error:
        raise ZpipeError(f"{path}: not a whole tar ({error}); restore it or make the shards again") from error


def _unreadable(path: Path, error: Exception) -> ZpipeError:
    reason = getattr(error, "strerror", None) or error
    return ZpipeError(f"{path}: can't be read ({reason}); restore it or make the shards again")
