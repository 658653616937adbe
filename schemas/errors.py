"""The exceptions that users are meant to see: a single line that names the file, the key and the remedy."""

from __future__ import annotations

from collections.abc import Sequence


class ZpipeError(Exception):
    """Something failed for a reason the user can act on. The command line prints it as one line and exits 1.

    `details` are further lines, one per item (shards that failed, images that were put aside).
    """

    exit_code = 1

    def __init__(self, message: str, details: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.details = tuple(details)


class UsageError(ZpipeError):
    """The request itself is wrong (a folder that is missing, options that exclude each other). Exit code 2."""

    exit_code = 2


def first_line(error: BaseException) -> str:
    """The first line of what another library says, at most 200 characters of it; its type where it says nothing."""
    return _lines(error)[0][:200]


def last_line(error: BaseException) -> str:
    """The last line, where the cause stands below a traceback."""
    return _lines(error)[-1][:200]


def _lines(error: BaseException) -> list[str]:
    return [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
