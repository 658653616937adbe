"""How a long job reports its progress. The job does not know whether a terminal or a log file shows it."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Called as work is completed: `done` of `total` items of `stage`, with `facts`, further numbers worth showing."""

    def __call__(self, stage: str, done: int, total: int, **facts: object) -> None: ...


def silent(stage: str, done: int, total: int, **facts: object) -> None:
    """Show nothing."""
