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
