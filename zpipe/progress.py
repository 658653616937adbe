"""How a command shows its progress: a bar on a terminal, one JSON line per interval elsewhere."""

from __future__ import annotations

import json
import sys
import time
from contextlib import suppress

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from zpipe.schemas.names import printable

LINE_EVERY_S = 5.0


def note(line: str) -> None:
    """Print one line to standard error, names in it escaped. If that can't be written to, there is nobody to tell."""
    with suppress(OSError):
        print(printable(line), file=sys.stderr, flush=True)


class ProgressLines:
    """JSON lines on standard error: for each stage at most one every `LINE_EVERY_S` seconds, and always the last."""

    def __init__(self) -> None:
        self._last: dict[str, float] = {}

    def __call__(self, stage: str, done: int, total: int, **facts: object) -> None:
        """See `zpipe.schemas.progress.Progress`."""
        now = time.monotonic()
        if done < total and now - self._last.get(stage, -LINE_EVERY_S) < LINE_EVERY_S:
            return
        self._last[stage] = now
        note(json.dumps({"stage": stage, "done": done, "total": total, **_rounded(facts)}))

    def __enter__(self) -> ProgressLines:
        return self

    def __exit__(self, *exception: object) -> None:
        pass


class ProgressBars:
    """One bar for each stage, followed by its latest metrics."""

    def __init__(self, console: Console) -> None:
        self._bars = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[facts]}", style="dim", markup=False),
            console=console,
        )
        self._tasks: dict[str, TaskID] = {}

    def __call__(self, stage: str, done: int, total: int, **facts: object) -> None:
        """See `zpipe.schemas.progress.Progress`."""
        if stage not in self._tasks:
            self._tasks[stage] = self._bars.add_task(printable(stage), total=total, facts="")
        text = printable("  ".join(f"{name} {value}" for name, value in _rounded(facts).items()))
        self._bars.update(self._tasks[stage], completed=done, total=total, facts=text)

    def __enter__(self) -> ProgressBars:
        self._bars.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._bars.stop()


def progress_for(console: Console) -> ProgressBars | ProgressLines:
    """Bars when standard error is a terminal, lines otherwise."""
    return ProgressBars(console) if console.is_terminal else ProgressLines()


def _rounded(facts: dict[str, object]) -> dict[str, object]:
    return {name: float(f"{value:.4g}") if isinstance(value, float) else value for name, value in facts.items()}
