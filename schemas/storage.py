"""Where files lie: on this machine, or behind an fsspec URL (s3://, gs://, ...). One path type for both.

Local paths are `pathlib.Path`; others are `upath.UPath`, which has the same methods. Credentials and endpoints come from where
each store's own library looks (AWS_ENDPOINT_URL, GOOGLE_APPLICATION_CREDENTIALS, fsspec's configuration). URLs that carry
them are refused: a path is written into manifests, settings and messages.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from zpipe.schemas.errors import UsageError, ZpipeError

# Of the file systems that fsspec knows. Others read archives, caches or repositories, or fill in templates from a file.
PROTOCOLS = ("s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "hdfs", "http", "https", "memory")
# Of these, whose ordinary URLs have a container (container@account.dfs.core.windows.net) or a user's name before an @.
AT_PROTOCOLS = ("az", "abfs", "abfss", "hdfs")

T = TypeVar("T")
R = TypeVar("R")


def as_path(value: str | os.PathLike[str]) -> Path:
    """A local path, or the UPath of a URL. A UPath comes back fresh: its connection doesn't survive a fork.

    Errors: :class:`UsageError` for a URL of another kind than `PROTOCOLS`, for one that leads through another (``::``), and
    for one with a name, password or signature in it, which the message leaves out.
    """
    if isinstance(value, Path):
        return value
    text = str(value)
    protocol, separator, rest = text.partition("://")
    if separator and protocol in ("file", "local"):
        return Path(rest)
    if not separator or not re.fullmatch(r"[A-Za-z][A-Za-z0-9+.:-]*", protocol):
        return Path(text)
    _check_url(protocol, rest)
    from upath import UPath

    options = dict(getattr(value, "storage_options", {}))
    try:
        # fsspec's memory of listings would hide what other processes write.
        opened: Any = UPath(text, **(options | {"use_listings_cache": False}))
    except (ImportError, ValueError) as error:
        raise UsageError(f"{text}: can't be opened ({str(error).splitlines()[0]}); give another path") from error
    # Workers and manifests know a path by its text, and UPath leaves an account or a host out of some.
    host, kept = (each.partition("://")[2].partition("/")[0] for each in (text, str(opened)))
    if host and host != kept:
        raise UsageError(
            f"{text}: account or host ({host}) would be lost on the way to workers and manifests; give {protocol}://{kept}/..., "
            "and the rest by the environment (AZURE_STORAGE_ACCOUNT_NAME for Azure, core-site.xml for hdfs)"
        )
    return opened


def as_local(value: str | os.PathLike[str]) -> Path:
    """A path on this machine, for what can't lie elsewhere. Errors: :class:`UsageError` for a URL, which `Path` alone would take
    for a folder named `s3:`."""
    path = as_path(value)
    if is_remote(path):
        raise UsageError(f"{path}: a URL is not supported here; give a local path, and copy the files")
    return path


def _check_url(protocol: str, rest: str) -> None:
    host, slash, _ = rest.partition("/")
    query = protocol in ("http", "https") and "?" in rest
    user, at, _ = host.rpartition("@")
    if (at and (protocol not in AT_PROTOCOLS or ":" in user)) or query:
        bare = f"{protocol}://{host.rpartition('@')[2].partition('?')[0]}{slash}..."
        raise UsageError(
            f"{bare}: the URL carries credentials or a query, which would be written down; leave them out, and give them "
            "by the environment (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY for s3)"
        )
    if protocol not in PROTOCOLS or "::" in rest:
        told = f"Unsupported filesystem: {protocol!r}" if protocol not in PROTOCOLS else "it leads through another URL"
        raise UsageError(
            f"{protocol}://{rest}: can't be opened ({told}); give a folder or one of {', '.join(PROTOCOLS)}"
        )


def is_remote(path: Path) -> bool:
    """Whether it is a UPath that isn't local."""
    # It isn't a pathlib.Path, whatever annotations here say: the two share their methods, not a class.
    return not isinstance(path, Path)


def _upath(path: Path) -> Any:
    """A remote path with what only UPath has: `fs` and `path`."""
    return path


def storage_options(path: Path) -> dict[str, Any] | None:
    """What opens the store of a remote path in other libraries; None for a local one."""
    return dict(_upath(path).storage_options) if is_remote(path) else None


def storage_errors(*more: type[Exception]) -> tuple[type[Exception], ...]:
    """What reading and writing may raise, and `more`. Libraries of object stores have exceptions beyond OSError; only those that are
    loaded can be raised."""
    found: list[type[Exception]] = [OSError, *more]
    for module, name in (
        ("botocore.exceptions", "BotoCoreError"),
        ("botocore.exceptions", "ClientError"),
        ("google.auth.exceptions", "GoogleAuthError"),
        ("gcsfs.retry", "HttpError"),
        ("aiohttp", "ClientError"),
    ):
        if module in sys.modules:
            found.append(getattr(sys.modules[module], name))
    return tuple(found)


def check_reachable(path: Path) -> None:
    """Ask a remote store once, so that a wrong key or a dead endpoint is one line. Errors: :class:`ZpipeError`."""
    if not is_remote(path):
        return
    try:
        path.exists()
    except ImportError as error:
        raise UsageError(f"{path}: {str(error).splitlines()[0]}; install the extra s3 or gcs") from error
    except storage_errors() as error:
        raise ZpipeError(
            f"{path}: can't be reached ({str(error).splitlines()[0]}); check credentials and endpoint"
        ) from error


def upload(local: Path, path: Path) -> None:
    """Put a local file or folder in the place of a remote one. A file appears in one step, a folder's files one by one."""
    if not local.is_dir():
        _upath(path).fs.put_file(str(local), _upath(path).path)
        return
    remove(path)
    for child in sorted(local.rglob("*")):
        if child.is_file():
            _upath(path).fs.put_file(str(child), f"{_upath(path).path}/{child.relative_to(local).as_posix()}")


def remove(path: Path) -> None:
    """Remove a file or a folder tree that may be absent."""
    if is_remote(path):
        if path.exists():
            _upath(path).fs.rm(_upath(path).path, recursive=True)
    elif path.is_dir() and not path.is_symlink():
        import shutil

        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def file_sizes(folder: Path, names: Iterable[str]) -> dict[str, int]:
    """Bytes of each named file of a folder that is there; one request for a remote folder."""
    if is_remote(folder):
        entries = _upath(folder).fs.ls(_upath(folder).path, detail=True)
        listed = {entry["name"].rpartition("/")[2]: entry["size"] for entry in entries}
        return {name: listed[name] for name in names if name in listed}
    return {name: (folder / name).stat().st_size for name in names if (folder / name).is_file()}


def folder_bytes(folder: Path) -> int:
    """Bytes of all files below a folder."""
    if is_remote(folder):
        return int(_upath(folder).fs.du(_upath(folder).path))
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def map_files(root: Path, function: Callable[[T], R], items: Sequence[T]) -> Iterator[R]:
    """`function` of each item, in order; 16 at a time where each waits for a remote store."""
    if not is_remote(root):
        yield from map(function, items)
        return
    with ThreadPoolExecutor(max_workers=16) as pool:
        # A bounded window: what is fetched ahead lies in memory.
        for start in range(0, len(items), 64):
            yield from pool.map(function, items[start : start + 64])


def names_in(folder: Path) -> list[str]:
    """Names of what lies in a folder, sorted; none where there is no folder."""
    try:
        return sorted({entry.name for entry in folder.iterdir()} - {""})
    except (FileNotFoundError, NotADirectoryError):
        return []


def create_exclusively(path: Path, data: bytes) -> bool:
    """Write a small file in one step unless it exists; whether it was written. The store decides between two writers."""
    if is_remote(path):
        try:
            _upath(path).fs.pipe_file(_upath(path).path, data, mode="create")
        except FileExistsError:
            return False
        return True
    tmp = path.with_name(f".tmp-{os.getpid()}-{os.urandom(4).hex()}-{path.name}")
    try:
        tmp.write_bytes(data)
        os.link(tmp, path)  # fails if `path` exists, also between machines on one network file system
    except FileExistsError:
        return False
    finally:
        tmp.unlink(missing_ok=True)
    return True
