"""Commit a file or a folder in one step: write a temporary sibling, fsync, rename. A reader never sees half of it.

On an object store a file is one request, which is one step too. A folder is not: writers that need it commit an index
file after it.
"""

from __future__ import annotations

import errno
import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from zpipe.schemas.errors import UsageError, ZpipeError, first_line, remedy_for
from zpipe.schemas.storage import (
    TMP_PREFIX,
    as_path,
    check_reachable,
    is_remote,
    names_in,
    open_file,
    remove,
    storage_errors,
    temporary_sibling,
    upload,
)


def _fsync_path(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    except OSError as error:
        # Some network file systems and FUSE mounts flush files, but can't flush folders.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS) or not path.is_dir():
            raise
    finally:
        os.close(fd)


@contextmanager
def commit(path: Path) -> Iterator[Path]:
    """Yield a temporary local path for the caller to create, and rename it to `path`, or upload it, on success.

    On any error the temporary is removed and `path` is left as it was.

    Args:
        path: The file or folder to commit; a path or a URL.

    Raises:
        ZpipeError: An OSError, above all a full disk; the message names `path` and a remedy for the cause.
    """
    path = as_path(path)
    if is_remote(path):
        with _committed_remotely(path) as tmp:
            yield tmp
        return
    tmp = temporary_sibling(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield tmp
        if tmp.is_dir():
            for child in sorted(tmp.rglob("*")):
                _fsync_path(child)
        _fsync_path(tmp)
        if tmp.is_dir() and os.path.lexists(path):
            # rename() cannot replace a folder that has content, or a link to one. Readers wait for the index file, so
            # removing it first is safe.
            remove(path)
        os.replace(tmp, path)
        _fsync_path(path.parent)
    except OSError as error:
        raise ZpipeError(_unwritten(path, error)) from error
    finally:
        if os.path.lexists(tmp):
            remove(tmp)


@contextmanager
def _committed_remotely(path: Path) -> Iterator[Path]:
    try:
        with tempfile.TemporaryDirectory(prefix="zpipe-") as scratch:
            tmp = Path(scratch) / path.name
            yield tmp
            upload(tmp, path)
    except storage_errors() as error:
        raise ZpipeError(_unwritten(path, error)) from error


def _unwritten(path: Path, error: BaseException) -> str:
    return f"{path}: could not be written ({first_line(error)}); {remedy_for(error)}, then run again"


def write_bytes(path: Path, data: bytes) -> None:
    """Write `data` to `path` atomically."""
    with commit(path) as tmp:
        tmp.write_bytes(data)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON to `path` atomically."""
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    # File names that are not UTF-8 hold lone surrogates; escaped as \udcXX they are JSON.
    write_bytes(path, text.encode(errors="backslashreplace"))


def claim_folder(path: Path, marker: str, what: str, *, lease: str | None = None, own: str = "/") -> None:
    """Make sure that `path` is a folder that we may write to: absent, empty, or one that holds our marker file.

    Args:
        path: The folder, a path or a URL. It is created where it is absent.
        marker: Name of the file that only our folders of this kind hold.
        what: What messages call the content of the folder.
        lease: Name of the file by which runs agree on who writes. The folder may hold it alone, and only the run that
            has the lease may remove temporary files (``.tmp-*``); without a lease they are removed here.

        own: Suffix of files that an interrupted run may have left before the marker.

    Raises:
        UsageError: The folder holds something else, or cannot be used.
    """
    path = as_path(path)
    check_reachable(path)
    if not is_remote(path) and path.exists() and not path.is_dir():
        raise UsageError(f"{path}: is a file, not a folder; give another path for the {what}")
    try:
        if not is_remote(path):
            path.mkdir(parents=True, exist_ok=True)
        entries = names_in(path)
    except OSError as error:
        raise UsageError(
            f"{path}: can't be used for the {what} ({first_line(error)}); {remedy_for(error)}, or give another path"
        ) from error
    foreign = [name for name in entries if not name.startswith(TMP_PREFIX) and name != lease and not name.endswith(own)]
    if foreign and not (path / marker).is_file():
        raise UsageError(f"{path}: holds something else ({foreign[0]}); give an empty or new folder for the {what}")
    if lease is None:
        clear_temporaries(path)


def clear_temporaries(folder: Path) -> None:
    """Remove the temporary files (``.tmp-*``) that killed runs left in `folder`, which may be absent."""
    folder = as_path(folder)
    if is_remote(folder):
        return  # uploads have no temporary files
    for entry in sorted(folder.glob(f"{TMP_PREFIX}*")):
        remove(entry)


def refuse_links(root: Path, names: Iterable[str], what: str) -> None:
    """Check that none of the files and folders that we write to below `root` is a symbolic link.

    What is written to a linked folder, or deleted from it, would lie outside `root`. `root` itself may be a link.

    Args:
        root: Our folder, a path or a URL.
        names: Names below it, which may be absent.
        what: What messages call the content of `root`: ``relevance store``.

    Raises:
        UsageError: One of them is a link.
    """
    root = as_path(root)
    if is_remote(root):
        return  # object stores have none
    for name in names:
        path = root / name
        if path.is_symlink():
            raise UsageError(
                f"{path}: is a link, and the {what} would be written to another place ({os.readlink(path)}); "
                "remove the link, or move what it leads to into its place"
            )


def check_out_file(path: Path, suffixes: Sequence[str], mark: bytes = b"zpipe") -> None:
    """Check, before any work, that `path` may be written: that it is absent, or a file of ours that may be replaced.

    Args:
        path: The file to write, a path or a URL.
        suffixes: Suffixes that it may have, in lower case: ``(".png",)``; none allows any.
        mark: What the first 4 KB of each file of ours hold.

    Raises:
        UsageError: It has another suffix, or something else lies there.
    """
    path = as_path(path)
    if suffixes and path.suffix.lower() not in suffixes:
        raise UsageError(f"{path}: the file that is written ends in {' or '.join(suffixes)}; give such a name")
    try:
        with open_file(path) as file:
            is_ours = mark in file.read(4096)
    except FileNotFoundError:
        return
    except storage_errors() as error:
        raise UsageError(f"{path}: can't be replaced ({first_line(error)}); give another path") from error
    if not is_ours:
        raise UsageError(f"{path}: exists, and zpipe did not write it; give another path, or move it away")
