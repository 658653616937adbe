"""How a long job reports its progress. The job does not know whether a terminal or a log file shows it."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """A function that is called as work is completed."""

    def __call__(self, stage: str, done: int, total: int, **facts: object) -> None:
        """Show that `done` of `total` items of `stage` are completed, with `facts`, further numbers worth showing."""


def silent(stage: str, done: int, total: int, **facts: object) -> None:
    """Show nothing."""
