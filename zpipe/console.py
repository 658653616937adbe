"""What the verbs share: the two consoles, exit codes, signals, and the parsing of settings."""

from __future__ import annotations

import errno
import io
import json
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from zpipe.interrupts import Terminated, stoppable
from zpipe.progress import ProgressBars, ProgressLines, note, progress_for
from zpipe.schemas.errors import UsageError, ZpipeError, first_line, remedy_for
from zpipe.schemas.names import printable
from zpipe.schemas.secrets import redacted
from zpipe.schemas.storage import as_local, as_path

# What torch's RuntimeErrors say, and what to do. It raises them wherever the main thread happens to be.
_TOO_SMALL = "the accelerator's memory is too small; give a smaller --batch-size"
_TORCH_ERRORS = (
    (
        "DataLoader worker (pid",
        "a data-loading process was killed, often because memory ran out; give fewer --data-workers",
    ),
    ("out of memory", _TOO_SMALL),
    ("_ALLOC_FAILED", _TOO_SMALL),
    ("allocate memory", "there is not enough memory; give a smaller --batch-size"),
    ("Too many open files", "too many files are open; raise the limit (ulimit -n), or give fewer --data-workers"),
)


class PlainConsole(Console):
    """A console that takes text for text: it obeys no markup, and shows control characters escaped."""

    def __init__(self, *, stderr: bool = False, width: int | None = None) -> None:
        super().__init__(stderr=stderr, width=width, markup=False, emoji=False, highlight=False)

    def render_str(self, text: str, **options: Any) -> Text:
        """As in rich, after escaping; all strings in tables and lines come through here."""
        return super().render_str(printable(text), **options)

    def on_broken_pipe(self) -> None:
        """Raise the error, which rich would hide."""
        raise


# Off a terminal rich assumes 80 columns and cuts what is wider; a file has room.
out = PlainConsole(width=None if sys.stdout is not None and sys.stdout.isatty() else 160)
err = PlainConsole(stderr=True)


def open_streams() -> None:
    """Prepare the standard streams of a process: closed ones lead nowhere, and what has no character is escaped."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free number; or a file of ours would, and be printed into
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # or print() would take None for standard output  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


@contextmanager
def printing() -> Iterator[None]:
    """Print results within: if standard output can't be written to, the program ends with one line and exit code 1."""
    try:
        if sys.stdout is None:
            raise OSError(errno.EBADF, "it is closed")
        yield
        sys.stdout.flush()
    except OSError as error:
        reason = "its reader has ended" if isinstance(error, BrokenPipeError) else first_line(error)
        note(f"error: standard output: the result could not be printed ({reason}); give another place for it")
        if isinstance(sys.stdout, io.TextIOWrapper):  # what is left would fail again when Python ends
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from error


@contextmanager
def reporting(*, bars: bool = True) -> Iterator[ProgressBars | ProgressLines]:
    """Show progress while a verb runs; turn errors that users can act on into one line and an exit code.

    Args:
        bars: Whether a terminal shows bars. Those of several processes would erase each other.
    """
    try:
        with stoppable(), _warnings_as_lines(), progress_for(err) if bars else ProgressLines() as progress:
            yield progress
    except ZpipeError as error:
        fail(str(error), error.details, error.exit_code)
    except OSError as error:
        fail(f"{error.filename or 'system'}: {first_line(error)}; {remedy_for(error)}, then run again", (), 1)
    except (RuntimeError, MemoryError) as error:
        text = "allocate memory" if isinstance(error, MemoryError) else str(error)
        line = next((line for part, line in _TORCH_ERRORS if part in text), None)
        if line is None:
            raise
        fail(f"{line}, then run again", (), 1)
    except Terminated:
        fail("terminated; run the same command again to resume", (), 1)
    except KeyboardInterrupt:
        fail("interrupted; run the same command again to resume", (), 130)


@contextmanager
def _warnings_as_lines() -> Iterator[None]:
    """Show the warnings of libraries and of ours as one line each, without the place in the code."""
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *place: warn(f"warning: {' '.join(str(message).split())}")
        yield


def tell(line: str) -> None:
    """Print a line of a result, unbroken however narrow the terminal is."""
    with printing():
        out.print(line, soft_wrap=True)


def warn(line: str) -> None:
    """Print a line that is not a result to standard error."""
    note(redacted(line))


def fail(message: str, details: tuple[str, ...], code: int) -> NoReturn:
    """Print `error: message` and its details to standard error, and exit."""
    # A library's message may quote a URL of the environment, such as AWS_ENDPOINT_URL.
    note(f"error: {redacted(message)}")
    for line in details:
        note(f"  {redacted(line)}")
    raise typer.Exit(code)


def count_or_auto(text: str) -> int:
    """A number of at least 1, or 0 for `auto`."""
    if text in ("auto", "0"):
        return 0
    if not text.isdecimal():
        raise typer.BadParameter("give a number of images, or auto")
    return int(text)


def parse_channels(text: str | None, option: str) -> tuple[float, float, float] | None:
    """Three numbers, separated by commas, or one for all channels; None stays."""
    if text is None:
        return None
    try:
        numbers = [float(part) for part in text.strip("[]() ").split(",")]
        red, green, blue = numbers * 3 if len(numbers) == 1 else numbers
    except ValueError as error:
        raise UsageError(f"{option} {text}: write it as R,G,B, such as 0.5,0.5,0.5") from error
    return red, green, blue


def parse_settings(pairs: list[str] | None, option: str) -> dict[str, Any]:
    """`key=value` pairs; values are JSON where they parse as such, text otherwise."""
    settings: dict[str, Any] = {}
    for pair in pairs or []:
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise UsageError(f"{option} {pair}: write it as key=value")
        try:
            settings[key] = json.loads(value)
        except (ValueError, RecursionError):
            settings[key] = value
    return settings


def parse_points(pairs: list[str] | None) -> dict[str, tuple[Any, ...]]:
    """`NAME=V1,V2` pairs of `--at`; values are int or float where they are numbers, text otherwise."""
    points: dict[str, tuple[Any, ...]] = {}
    for pair in pairs or []:
        name, _, text = pair.partition("=")
        values = [value.strip() for value in text.split(",")]
        if not name.strip() or not all(values):
            raise UsageError(f"--at {pair}: write it as NAME=VALUE or NAME=VALUE,VALUE, such as exit=0.7")
        points[name.strip()] = points.get(name.strip(), ()) + tuple(_number_or_text(value) for value in values)
    return points


def parse_point(pairs: list[str] | None) -> dict[str, Any]:
    """`NAME=VALUE` pairs of `--at`, where one operating point is wanted."""
    points = parse_points(pairs)
    for name, values in points.items():
        if len(values) > 1:
            raise UsageError(f"--at {name}={','.join(map(str, values))}: give one value")
    return {name: value for name, (value,) in points.items()}


def _number_or_text(text: str) -> int | float | str:
    for kind in (int, float):
        with suppress(ValueError):
            return kind(text)
    return text


def path_or_url(text: str) -> Path:
    """A local path or that of a URL. A URL that is refused ends the program with one line."""
    try:
        return as_path(text)
    except UsageError as error:
        fail(str(error), (), error.exit_code)


def local_path(text: str) -> Path:
    """A path on this machine. A URL ends the program with one line."""
    try:
        return as_local(text)
    except UsageError as error:
        fail(str(error), (), error.exit_code)


def parse_numbers(text: str, kind: type, option: str) -> tuple[Any, ...]:
    """A comma-separated list of numbers."""
    try:
        return tuple(kind(part) for part in text.split(",") if part.strip())
    except ValueError as error:
        raise UsageError(f"{option} {text}: write numbers separated by commas, such as 0,0.1,0.5") from error


def parse_budgets(text: str) -> tuple[int | str, ...]:
    """A comma-separated list of budgets: numbers of cells, or texts with a unit."""
    parts = [part.strip() for part in text.split(",") if part.strip()]
    return tuple(int(part) if part.isdecimal() else part for part in parts)


def parse_budget(text: str | None) -> int | str | None:
    """A single budget, or None."""
    budgets = parse_budgets(text or "")
    if len(budgets) > 1:
        raise UsageError(f"--budget {text}: give one budget")
    return budgets[0] if budgets else None


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return "-" if value is None else str(value)


def print_rows(rows: list[dict[str, Any]], title: str) -> None:
    """Print rows that have the same columns as a table on standard output; print nothing without rows."""
    if not rows:
        return
    table = Table(title=title, title_justify="left")
    for name in rows[0]:
        table.add_column(name, justify="left" if name in ("setting", "model") else "right")
    for row in rows:
        table.add_row(*(_cell(value) for value in row.values()))
    print_table(table)


def print_table(table: Table) -> None:
    """Print a table on standard output."""
    with printing():
        out.print(table)
