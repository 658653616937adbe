"""The exceptions that users are meant to see. Each message is one line that names the file, the key and the remedy."""

from __future__ import annotations

import errno
from collections.abc import Sequence


class ZpipeError(Exception):
    """Something failed for a reason the user can act on. The command line prints it as one line and exits 1.

    Args:
        message: One line.
        details: Further lines, one per item: shards that failed, images that were put aside.
    """

    exit_code = 1

    def __init__(self, message: str, details: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.details = tuple(details)


class UsageError(ZpipeError):
    """The request itself is wrong: a folder is missing, options exclude each other. The command line exits 2."""

    exit_code = 2


class DamageError(ZpipeError):
    """A file of ours is not what was written: cut off, altered, of other types. It has to be made again."""


def first_line(error: BaseException) -> str:
    """First line of the message of another library's exception, at most 200 characters; its type if it has none.

    Of an OSError, its reason without number and file: ``No space left on device``.
    """
    if isinstance(error, OSError) and error.strerror:
        return str(error.strerror)
    return _lines(error)[0][:200]


# What to do about an error of the operating system. The phrases end a sentence, or go before ", then run again".
_REMEDIES = {
    errno.ENOSPC: "free space on that disk, or inodes if df -i shows none",
    errno.EDQUOT: "free space within your quota, or ask for more",
    errno.EFBIG: "give a smaller file, raise ulimit -f, or take a file system for larger ones",
    errno.EACCES: "fix the permissions of the file and of its folder",
    errno.EPERM: "fix the permissions of the file and of its folder, or take a file system that allows it",
    errno.EROFS: "that file system is read-only: give a path on another one",
    errno.ENAMETOOLONG: "give a shorter name",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
    errno.ENFILE: "end programs that hold files open, or raise fs.file-max",
    errno.ENOMEM: "free memory",
    errno.EIO: "check the disk or mount",
    errno.ESTALE: "mount the file system again",
    errno.ENOTCONN: "mount the file system again",
    errno.ETIMEDOUT: "check that the server of that file system answers",
    errno.EHOSTDOWN: "check that the server of that file system answers",
    errno.ENOENT: "check the path",
    errno.ELOOP: "remove the link that leads back to itself",
    errno.ENOTDIR: "give another path: a part of this one is a file",
    errno.EISDIR: "give another path, or move the folder away",
    errno.EEXIST: "move away what lies there",
    errno.ENOTEMPTY: "move away what lies there",
    errno.EBUSY: "end what uses the file",
    errno.ETXTBSY: "end what uses the file",
    errno.EINVAL: "give the path of a regular file on another file system",
    errno.ENOTSUP: "take a file system that supports it",
    errno.ENOSYS: "take a file system that supports it",
    errno.EXDEV: "give a path on one file system",
}
_OF_TYPES = {PermissionError: errno.EACCES, FileNotFoundError: errno.ENOENT, TimeoutError: errno.ETIMEDOUT}


def remedy_for(error: BaseException) -> str:
    """What the user can do about an error of reading or writing, by its cause: ``free space on that disk ...``.

    Args:
        error: An OSError, or what the library of an object store raises.

    Returns:
        A phrase for the end of a message, without a full stop.
    """
    number = getattr(error, "errno", None) or next(
        (code for kind, code in _OF_TYPES.items() if isinstance(error, kind)), None
    )
    if number in _REMEDIES:
        return _REMEDIES[number]
    # Those of object stores have no number, and few of them are subclasses that say more.
    return "check the path and the disk" if isinstance(error, OSError) and number else "check address, access and space"


def last_line(error: BaseException) -> str:
    """Last line of the message: the cause, if the message includes a traceback."""
    return _lines(error)[-1][:200]


def _lines(error: BaseException) -> list[str]:
    return [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
