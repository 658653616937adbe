"""Reads tar shards as samples.

A shard is read as a whole and checked before any of its samples is used, so that a truncated tar gives an error and not
a short epoch. Nothing in a tar is unpickled, run or written to disk, whatever the names of its members.
"""

from __future__ import annotations

import hashlib
import io
import os
from dataclasses import dataclass
from pathlib import Path

from zpipe.schemas.account import Account
from zpipe.schemas.errors import UsageError, ZpipeError
from zpipe.schemas.sample import Sample, group_members, group_samples, head_bytes, member_bytes, no_samples
from zpipe.schemas.shard_index import (
    INDEX_NAME,
    ShardEntry,
    ShardIndex,
    digest_keys,
    index_command,
    open_index,
)
from zpipe.schemas.shard_patterns import is_pattern
from zpipe.schemas.storage import as_path, is_remote, open_file, read_file, storage_errors
from zpipe.schemas.tar_file import read_members


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One tar of a data set."""

    path: Path
    entry: ShardEntry
    """Its entry in the shard index."""
    label_field: str | None = None
    """Where its labels are, if the index says it; see `zpipe.schemas.sample.group_samples`."""


def list_shards(path: Path) -> tuple[list[Shard], ShardIndex]:
    """List the tars of a folder, one tar, or those of a pattern, with their index.

    Public tars without a `shards.json` are listed by their headers, which takes some tenths of a second per shard;
    changes of their contents are then not noticed.

    Raises:
        UsageError: If there are no tars.
        ZpipeError: If folder and index disagree.
    """
    tars, entries, index = open_index(path)
    if index is None:
        index = _list_unindexed(path, tars)
        entries = list(index.shards)
    field = index.label_field
    pairs = zip(tars, entries, strict=True)
    return [Shard(path=tar, entry=entry, label_field=field) for tar, entry in pairs], index


def _list_unindexed(path: Path, tars: list[Path]) -> ShardIndex:
    if is_remote(tars[0]):
        raise UsageError(f"{path}: tar shards without {INDEX_NAME}; run `{index_command(path)}` once")
    source = str(path if is_pattern(path) else tars[0].parent)
    account = Account()
    entries = []
    for tar in tars:
        entry, counted = _scan_headers(tar)
        entries.append(entry)
        account += counted
    return ShardIndex(shards=tuple(entries), source=source, account=account, is_file=False)


def _scan_headers(path: Path) -> tuple[ShardEntry, Account]:
    account = Account()
    try:
        with open_file(path) as file:
            members = read_members(file, path, head_bytes)
            keys = [key for key, _ in group_members(members, str(path), account)]
            size = file.tell()
    except OSError as error:
        raise _unreadable(path, error) from error
    if not keys:
        raise no_samples(path, account)
    return ShardEntry(name=path.name, count=len(keys), bytes=size, sha256="", keys_sha256=digest_keys(keys)), account


def read_tar(shard: Shard, *, check: bool = True) -> list[Sample]:
    """Read the samples of one tar, in order. Images stay encoded, about 110 MB for 1,000 photos of ImageNet.

    A sample that can't be used is among them, with its `damage`.

    Args:
        shard: The tar.
        check: Whether to compare its digest with that of the index, if the index has one. A flipped bit in a JPEG is
            seldom noticed otherwise.

    Raises:
        ZpipeError: If the tar is truncated or altered.
    """
    path, entry = shard.path, shard.entry
    try:
        # Opened anew: a remote path that comes from another process has lost its connection.
        data = read_file(as_path(path), entry.bytes)
    except storage_errors() as error:
        raise _unreadable(path, error) from error
    members = read_members(io.BytesIO(data), path, member_bytes)
    samples = list(group_samples(members, str(path), label_field=shard.label_field, keep_damaged=True))
    if len(samples) != entry.count or digest_keys(item.key for item in samples) != entry.keys_sha256:
        raise ZpipeError(
            f"{path}: {len(samples)} samples, {INDEX_NAME} says {entry.count}: truncated or altered; "
            "restore it or make the shards again"
        )
    if check and entry.sha256 and (digest := hashlib.sha256(data).hexdigest()) != entry.sha256:
        raise ZpipeError(
            f"{path}: its SHA-256 is {digest[:12]}, {INDEX_NAME} says {entry.sha256[:12]}: altered; restore it or make "
            "the shards again"
        )
    return samples


def digests_are_checked() -> bool:
    """Whether digests of tars are compared with the index; ZPIPE_CHECK_DIGESTS=0 in the environment says no."""
    return os.environ.get("ZPIPE_CHECK_DIGESTS", "1") != "0"


def _unreadable(path: Path, error: Exception) -> ZpipeError:
    reason = getattr(error, "strerror", None) or error
    return ZpipeError(f"{path}: can't be read ({reason}); restore it or make the shards again")
