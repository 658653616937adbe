"""Paths on this machine and fsspec URLs (s3://, gs://, ...) behind one interface.

Local paths are `pathlib.Path`; others are `upath.UPath`, which has the same methods. The library of each store finds
credentials and endpoints itself (AWS_ENDPOINT_URL, GOOGLE_APPLICATION_CREDENTIALS, fsspec's configuration). URLs that
contain them are refused, because paths are written into manifests, settings and messages.
"""

from __future__ import annotations

import errno
import os
import re
import stat
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from zpipe.schemas.errors import UsageError, ZpipeError
from zpipe.schemas.secrets import refuse_secret

# The file systems of fsspec that are allowed. Others read archives, caches or repositories, or fill in templates.
PROTOCOLS = ("s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "hdfs", "http", "https", "hf", "memory")
READ_ONLY = ("hf",)  # each file that is written to the Hugging Face Hub is a commit of its own

TMP_PREFIX = ".tmp-"
MAX_NAME_BYTES = 255  # of a file name, on nearly all file systems
# A mount that has no hard links says so in one of these ways.
NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EINVAL)

T = TypeVar("T")
R = TypeVar("R")


def as_path(value: str | os.PathLike[str]) -> Path:
    """A local path, or the UPath of a URL. A UPath is built anew, because its connection does not survive a fork.

    Args:
        value: A path, or the text of a path or URL.

    Raises:
        UsageError: The protocol is none of `PROTOCOLS`, the URL leads through another one (``::``), or it contains a
            user name, password, query or fragment, which the message leaves out.
    """
    if isinstance(value, Path) and ":/" not in str(value):
        return value  # what pathlib leaves of a URL is checked below
    text = str(value)
    refuse_secret(text)
    protocol, separator, rest = text.partition("://")
    protocol = protocol.lower()
    if separator and protocol in ("file", "local"):
        return Path(rest)
    if not separator or not re.fullmatch(r"[a-z][a-z0-9+.:-]*", protocol):
        return Path(text)
    _check_url(protocol, rest)
    text = f"{protocol}://{rest}"
    from upath import UPath

    options = dict(getattr(value, "storage_options", {}))
    try:
        # A cache of listings would hide what other processes write.
        opened: Any = UPath(text, **(options | {"use_listings_cache": False}))
    except (ImportError, ValueError) as error:
        raise UsageError(f"{text}: can't be opened ({str(error).splitlines()[0]}); give another path") from error
    # Workers and manifests store a path as text, and for some protocols UPath drops the account or the host from it.
    host, kept = (each.partition("://")[2].partition("/")[0] for each in (text, str(opened)))
    if host and host != kept:
        raise UsageError(
            f"{text}: account or host ({host}) would be lost on the way to workers and manifests; "
            f"give {protocol}://{kept}/..., and the rest by the environment "
            "(AZURE_STORAGE_ACCOUNT_NAME for Azure, core-site.xml for hdfs)"
        )
    return opened


def as_local(value: str | os.PathLike[str]) -> Path:
    """A path on this machine, for files that cannot lie elsewhere.

    Raises:
        UsageError: `value` is a URL, which `Path` alone would take for a folder named `s3:`.
    """
    path = as_path(value)
    if is_remote(path):
        raise UsageError(f"{path}: a URL is not supported here; give a local path, and copy the files")
    return path


def _check_url(protocol: str, rest: str) -> None:
    if protocol not in PROTOCOLS or "::" in rest:
        reason = (
            f"Unsupported filesystem: {protocol!r}" if protocol not in PROTOCOLS else "it leads through another URL"
        )
        raise UsageError(
            f"{protocol}://{rest}: can't be opened ({reason}); give a folder or one of {', '.join(PROTOCOLS)}"
        )


def is_remote(path: Path) -> bool:
    """Whether the path is a UPath, which is never local here."""
    # A UPath is no pathlib.Path, whatever the annotations here say: the two share their methods, not a class.
    return not isinstance(path, Path)


def is_web(path: Path) -> bool:
    """Whether the path is that of a web server, which takes no files, and lists none with their sizes."""
    return is_remote(path) and _upath(path).protocol in ("http", "https")


def _upath(path: Path) -> Any:
    """A remote path, typed so that what only UPath has can be used: `fs` and `path`."""
    return path


def _writable(path: Path) -> Any:
    """The same for a path that will be written to. Raises :class:`UsageError` if its protocol is one of `READ_ONLY`."""
    if str(path).partition("://")[0] in READ_ONLY:
        raise UsageError(f"{path}: is only read here; give a local path or one of an object store")
    return path


def storage_options(path: Path) -> dict[str, Any] | None:
    """The options with which other libraries open the store of a remote path; None for a local path."""
    return dict(_upath(path).storage_options) if is_remote(path) else None


def storage_errors(*more: type[Exception]) -> tuple[type[Exception], ...]:
    """The exceptions that reading and writing may raise, and `more`.

    Libraries of object stores raise exceptions that are no OSError; only those that are imported can be raised.
    """
    errors: list[type[Exception]] = [OSError, *more]
    for module, name in (
        ("botocore.exceptions", "BotoCoreError"),
        ("botocore.exceptions", "ClientError"),
        ("google.auth.exceptions", "GoogleAuthError"),
        ("gcsfs.retry", "HttpError"),
        ("aiohttp", "ClientError"),
        # of huggingface_hub, where the connection fails
        ("httpx", "HTTPError"),
        ("httpx2", "HTTPError"),
    ):
        if module in sys.modules:
            errors.append(getattr(sys.modules[module], name))
    return tuple(errors)


def check_reachable(path: Path) -> None:
    """Make one request to a remote store; a wrong key or a dead endpoint raises :class:`ZpipeError`."""
    if not is_remote(path):
        return
    try:
        path.exists()
    except ImportError as error:
        raise UsageError(f"{path}: {str(error).splitlines()[0]}; {remedy_for_import(path)}") from error
    except storage_errors() as error:
        raise ZpipeError(
            f"{path}: can't be reached ({str(error).splitlines()[0]}); check credentials and endpoint"
        ) from error


def remedy_for_import(path: Path) -> str:
    """What to install where the library of a store is missing."""
    return "pip install huggingface_hub" if str(path).startswith("hf:") else "install the extra s3 or gcs"


def open_file(path: str | os.PathLike[str]) -> BinaryIO:
    """Open a regular file for reading, without ever waiting for a FIFO or reading from a device.

    Raises:
        OSError: The file is absent, unreadable, or no regular file; `strerror` is a phrase for a message.
    """
    path = as_path(path)
    if is_remote(path):
        return path.open("rb")
    # Opening a FIFO for reading waits for a writer, unless it is non-blocking; reads of regular files ignore the flag.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        mode = os.fstat(descriptor).st_mode
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, "is a folder, not a file", str(path))
        if not stat.S_ISREG(mode):
            kind = "a FIFO" if stat.S_ISFIFO(mode) else "a device"
            raise OSError(errno.EINVAL, f"is {kind}, not a regular file", str(path))
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def read_file(path: str | os.PathLike[str], max_bytes: int) -> bytes:
    """Read a regular file whole, if it has at most `max_bytes` bytes.

    Raises:
        OSError: As for :func:`open_file`, or the file is larger.
    """
    with open_file(path) as file:
        # A read allocates what it asks for.
        size = max_bytes if is_remote(as_path(path)) else min(os.fstat(file.fileno()).st_size, max_bytes)
        data = file.read(size + 1)
        if size < len(data) <= max_bytes:  # it grows, or states no size as those in /proc
            data += file.read(max_bytes + 1 - len(data))
    if len(data) > max_bytes:
        raise OSError(errno.EFBIG, f"has more than {max_bytes} bytes, too many for a file of its kind", str(path))
    return data


def upload(local: Path, path: Path) -> None:
    """Replace a remote file or folder by a local one. A file appears in one step, the files of a folder one by one."""
    if not local.is_dir():
        _writable(path).fs.put_file(str(local), _upath(path).path)
        return
    remove(path)
    for child in sorted(local.rglob("*")):
        if child.is_file():
            _upath(path).fs.put_file(str(child), f"{_upath(path).path}/{child.relative_to(local).as_posix()}")


def remove(path: Path) -> None:
    """Remove a file or a folder tree, which may be absent."""
    if is_remote(path):
        if path.exists():
            _writable(path).fs.rm(_upath(path).path, recursive=True)
    elif path.is_dir() and not path.is_symlink():
        import shutil

        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def file_sizes(folder: Path, names: Iterable[str]) -> dict[str, int]:
    """Size in bytes of each named file that exists in a folder; one request for a remote folder.

    On a web server, one request per file.

    Raises:
        ZpipeError: A web server does not say the size of a file.
    """
    if is_web(folder):
        names = list(names)
        found = zip(names, map_files(folder, lambda name: _web_size(folder / name), names), strict=True)
        return {name: size for name, size in found if size is not None}
    if is_remote(folder):
        entries = _upath(folder).fs.ls(_upath(folder).path, detail=True)
        listed = {entry["name"].rpartition("/")[2]: entry["size"] for entry in entries}
        return {name: listed[name] for name in names if name in listed}
    return {name: (folder / name).stat().st_size for name in names if (folder / name).is_file()}


def _web_size(path: Path) -> int | None:
    try:
        size = _upath(path).fs.info(str(path))["size"]
    except FileNotFoundError:
        return None
    if size is None:
        raise ZpipeError(f"{path}: the server does not say its size; copy the files to this machine")
    return int(size)


def folder_bytes(folder: Path) -> int:
    """Size in bytes of all files below a folder."""
    if is_remote(folder):
        return int(_upath(folder).fs.du(_upath(folder).path))
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def map_files(root: Path, function: Callable[[T], R], items: Sequence[T]) -> Iterator[R]:
    """Yield `function(item)` for each item, in order; 16 at a time if `root` is remote."""
    if not is_remote(root):
        yield from map(function, items)
        return
    with ThreadPoolExecutor(max_workers=16) as pool:
        # A bounded window, because results that are fetched ahead stay in memory.
        for start in range(0, len(items), 64):
            yield from pool.map(function, items[start : start + 64])


def names_in(folder: Path) -> list[str]:
    """Names of the entries of a folder, sorted; none if there is no folder."""
    try:
        return sorted({entry.name for entry in folder.iterdir()} - {""})
    except (FileNotFoundError, NotADirectoryError):
        return []


def temporary_sibling(path: Path) -> Path:
    """A new path beside `path` for a file that will be renamed to it, with its suffix."""
    unique = f"{TMP_PREFIX}{os.getpid()}-{os.urandom(6).hex()}-".encode()
    tail = path.name.encode(errors="surrogateescape")[len(unique) - MAX_NAME_BYTES :]
    return path.with_name((unique + tail).decode(errors="ignore"))


def create_exclusively(path: Path, data: bytes) -> bool:
    """Write a small file in one step unless it exists.

    Where the file system has no hard links, another process may see the file while it is still empty, and whether one
    of two machines fails depends on the mount.

    Returns whether it was written; of two writers only one succeeds.
    """
    if is_remote(path):
        try:
            _writable(path).fs.pipe_file(_upath(path).path, data, mode="create")
        except FileExistsError:
            return False
        return True
    tmp = temporary_sibling(path)
    try:
        tmp.write_bytes(data)
        os.link(tmp, path)  # fails if `path` exists, also between machines on one network file system
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise
        return _create_unlinked(path, data)
    finally:
        tmp.unlink(missing_ok=True)
    return True


def _create_unlinked(path: Path, data: bytes) -> bool:
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    except FileExistsError:
        return False
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
    except OSError:
        path.unlink(missing_ok=True)
        raise
    return True
