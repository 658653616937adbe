"""The exceptions that users are meant to see. Each message is one line that names the file, the key and the remedy."""

from __future__ import annotations

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


def first_line(error: BaseException) -> str:
    """First line of the message of another library's exception, at most 200 characters; its type if it has none.

    Of an OSError, its reason without number and file: ``No space left on device``.
    """
    if isinstance(error, OSError) and error.strerror:
        return str(error.strerror)
    return _lines(error)[0][:200]


def last_line(error: BaseException) -> str:
    """Last line of the message: the cause, if the message includes a traceback."""
    return _lines(error)[-1][:200]


def _lines(error: BaseException) -> list[str]:
    return [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
