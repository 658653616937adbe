"""What a long job tells whoever started it. The job doesn't know whether a terminal or a log file listens."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Called as work gets done. `stage` names the work, `done` of `total` say how far, `facts` are figures worth seeing."""

    def __call__(self, stage: str, done: int, total: int, **facts: object) -> None: ...


def silent(stage: str, done: int, total: int, **facts: object) -> None:
    """A listener that says nothing."""
