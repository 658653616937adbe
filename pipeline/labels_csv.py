"""`labels.csv`: the images of a folder and their classes, in columns `file`, `class_index` and maybe `class_name`."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterator
from pathlib import Path

from zpipe.schemas.errors import UsageError, ZpipeError
from zpipe.schemas.names import printable
from zpipe.schemas.storage import open_file

LABELS_NAME = "labels.csv"
MAX_NAMED_CLASSES = 1_000_000  # each index up to the highest takes a place in the list of names
NEEDED = {"file", "class_index"}
SEPARATORS = (",", ";", "\t")


def read_labels(root: Path) -> tuple[list[tuple[str, int]], tuple[str, ...]]:
    """Read and check the `labels.csv` of a folder. Fields are separated by commas, semicolons or tabs.

    Args:
        root: The folder.

    Returns:
        The files with their class numbers, in order; and the names of the classes, "" for a class without a name, none
        if there is no column `class_name`.

    Raises:
        UsageError: The file lists no images.
        ZpipeError: It cannot be read, or a line is wrong; the message names the line.
    """
    path = root / LABELS_NAME
    rows: list[tuple[str, int]] = []
    line_of: dict[str, int] = {}
    names: dict[int, tuple[str, int]] = {}  # and the line
    for number, row in _lines(path):
        where = f"{path}: line {number}"
        if any(row.get(None) or ()):  # type: ignore[call-overload]
            raise ZpipeError(
                f"{where}: has more fields than the header; put quotes around those with a separator in them"
            )
        file, label = _checked(root, row, where)
        place = os.path.normpath(file)
        if place in line_of:
            raise ZpipeError(f"{where}: lists {printable(file)} again, after line {line_of[place]}; remove one line")
        line_of[place] = number
        rows.append((file, label))
        name = (row.get("class_name") or "").strip()
        if name and names.setdefault(label, (name, number))[0] != name:
            other, line = names[label]
            raise ZpipeError(
                f"{where}: class {label} is named {name!r} here and {other!r} in line {line}; give it one name"
            )
    if not rows:
        raise UsageError(f"{path}: lists no images; add a line per image")
    return rows, _names(path, {label: name for label, (name, _) in names.items()}, max(label for _, label in rows))


def _lines(path: Path) -> Iterator[tuple[int, dict[str, str]]]:
    try:
        # utf-8-sig, because spreadsheets begin the file with a byte order mark.
        with open_file(path) as binary, io.TextIOWrapper(binary, newline="", encoding="utf-8-sig") as file:
            first = file.readline(100_000)
            header, separator = _header(path, first)
            reader = csv.DictReader(file, header, delimiter=separator, skipinitialspace=True)
            for row in reader:
                yield reader.line_num + 1, row
    except (UnicodeDecodeError, csv.Error) as error:
        raise ZpipeError(f"{path}: not readable as a UTF-8 CSV file ({error}); save it as one") from error
    except OSError as error:
        raise ZpipeError(f"{path}: can't be read ({error.strerror}); fix its permissions") from error


def _header(path: Path, line: str) -> tuple[list[str], str]:
    """The names of the columns, and what separates them."""
    missing = NEEDED
    for separator in SEPARATORS:
        names = [name.strip() for name in next(csv.reader([line], delimiter=separator), [])]
        if set(names) >= NEEDED:
            twice = next((name for name in names if names.count(name) > 1), None)
            if twice is not None:
                raise ZpipeError(f"{path}: has two columns {twice!r}; rename one")
            return names, separator
        missing = min(missing, NEEDED - set(names), key=len)
    raise ZpipeError(
        f"{path}: no column {sorted(missing)[0]!r}; the header must name file and class_index, separated by a comma, "
        "semicolon or tab"
    )


def _checked(root: Path, row: dict[str, str], where: str) -> tuple[str, int]:
    label = (row["class_index"] or "").strip()
    # Longer numbers do not fit into the int32 of a relevance store.
    if not (label.isascii() and label.isdecimal()) or len(label) > 9:
        raise ZpipeError(f"{where}: class_index {label!r} is not a whole number from 0 to 999999999; correct it")
    name = row["file"] or ""
    if os.path.isabs(name) or ".." in Path(name).parts or not os.path.isfile(root / name):
        raise ZpipeError(f"{where}: no file {name!r} in this folder; correct or remove the line")
    return name, int(label)


def _names(path: Path, names: dict[int, str], highest: int) -> tuple[str, ...]:
    if not names:
        return ()
    if highest >= MAX_NAMED_CLASSES:
        raise ZpipeError(
            f"{path}: class_index {highest} with a column class_name: names are kept up to index "
            f"{MAX_NAMED_CLASSES - 1}; number the classes from 0, or remove the column"
        )
    number_of: dict[str, int] = {}
    for label, name in sorted(names.items()):
        if printable(name) != name:
            raise ZpipeError(
                f"{path}: class {label} is named '{printable(name)}', with an unprintable character; rename it"
            )
        if name in number_of:
            raise ZpipeError(
                f"{path}: classes {number_of[name]} and {label} are both named {name!r}, and names tell classes apart; "
                "rename one"
            )
        number_of[name] = label
    # Only the names of classes that occur are known; the others are empty, so that each name is at its index.
    return tuple(names.get(label, "") for label in range(highest + 1))
