"""Finds the Parquet files of one split of a data set, as the Hugging Face Hub and others lay them out.

The names of files (`data/train-00000-of-00294.parquet`) or of folders (`default/train/0000.parquet`) tell the splits.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from zpipe.schemas.errors import UsageError, ZpipeError, first_line, remedy_for
from zpipe.schemas.names import printable
from zpipe.schemas.secrets import redacted
from zpipe.schemas.storage import is_remote, remedy_for_import, storage_errors

MAX_FILES = 100_000
MAX_DEPTH = 4  # folders below the one that is given
SUFFIX = ".parquet"
# Names of splits in use, and the one that stands for them here.
SPLIT_NAMES = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev"), "val"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
_NUMBERED = re.compile(r"(?P<split>.+)-\d{5,}-of-(?P<files>\d{5,})(?:-[0-9a-f]{16})?")
_SHOWN = 5


@dataclass(frozen=True, kw_only=True)
class ParquetFiles:
    """The files of one split."""

    root: Path
    """The folder that their names start from."""
    split: str
    """The split, by the name that stands for it here."""
    sizes: dict[str, int]
    """Size of each file in bytes, by its path below the root; sorted by name."""
    warning: str = ""
    """What the user should know, one line."""


@contextmanager
def reading(where: Path | str) -> Iterator[None]:
    """Turn what reading a Parquet file, or listing a folder of them, may raise into one line that names `where`.

    Raises:
        ZpipeError: It cannot be read.
        UsageError: It is absent, or a library for its store is missing.
    """
    try:
        yield
    except ImportError as error:
        raise UsageError(f"{where}: {first_line(error)}; {remedy_for_import(Path(str(where)))}") from error
    except storage_errors(pa.ArrowException, ValueError, NotImplementedError, KeyError) as error:
        reason = printable(redacted(first_line(error)))
        if (status := _http_status(error)) is not None:
            # The message of the library may hold a signed address.
            reason, remedy = f"HTTP {status}", _remedy_for_http(status, str(where))
        elif isinstance(error, FileNotFoundError):
            raise UsageError(f"{where}: no such file or folder; check the path") from error
        elif _is_damage(error):
            raise ZpipeError(f"{where}: not readable as Parquet ({reason}); fetch it again") from error
        elif getattr(error, "errno", None):
            remedy = remedy_for(error)
        else:
            remedy = "check the connection, and run the same command again to resume"
        raise ZpipeError(f"{where}: can't be read ({reason}); {remedy}") from error


def _is_damage(error: BaseException) -> bool:
    # pyarrow tells damaged pages by a plain OSError without a number.
    plain = type(error) is OSError and not error.errno
    return plain or isinstance(error, pa.ArrowException) or not isinstance(error, storage_errors())


def _http_status(error: BaseException | None) -> int | None:
    """The status that a server refused a request with, as the libraries of different stores keep it."""
    while error is not None:
        response = getattr(error, "response", None)
        for status in (getattr(error, "status", None), getattr(response, "status_code", None)):
            if isinstance(status, int):
                return status
        error = error.__cause__
    return None


def _remedy_for_http(status: int, where: str) -> str:
    if status in (401, 403, 404) and where.startswith("hf:"):
        return (
            "check the name; accept the data set's terms on its page if it has some, and log in with HF_TOKEN or "
            "`hf auth login`"
        )
    if status in (401, 403):
        return "check your access to it"
    if status in (404, 410):
        return "check the address"
    return "wait some minutes, and run the same command again to resume"


def find_parquet(path: Path, split: str) -> ParquetFiles:
    """Find the Parquet files of a split.

    Args:
        path: A file, or a folder of files, some levels deep; a path or a URL.
        split: The split. Files whose names tell no split are all of the split ``train``.

    Raises:
        UsageError: There are no Parquet files or none of this split, or they belong to several data sets.
        ZpipeError: The folder cannot be listed.
    """
    with reading(path):
        root, sizes, left_out = _list_remote(path) if is_remote(path) else _list_local(path)
    if not sizes:
        raise UsageError(f"{path}: holds no {SUFFIX} file; give a folder of them, or one of them")
    wanted = _canonical(split)
    places = {name: _place_of(name, root) for name in sorted(sizes)}
    splits = sorted({each for _, each in places.values() if each})
    if not splits:
        if wanted != "train":
            raise UsageError(
                f"--split {split}: the names of the files in {path} tell no splits; leave --split out, or give the "
                "folder of that split"
            )
        chosen = list(places)
    elif wanted in splits:
        chosen = [name for name, (_, each) in places.items() if each == wanted]
        left_out["files whose names tell no split"] = sum(each is None for _, each in places.values())
    else:
        raise UsageError(f"--split {split}: {path} has {_few(splits)}; give one of them")
    configs = sorted({places[name][0] for name in chosen})
    if len(configs) > 1:
        raise UsageError(
            f"{path}: holds several data sets with this split, in {_few([each or '.' for each in configs])}; give the "
            f"folder of one, such as {printable(str(root / configs[-1]))}"
        )
    counted = ", ".join(f"{what} {count}" for what, count in left_out.items() if count)
    lines = [f"{path}: left out: {counted}"] if counted else []
    lines += _missing(path, chosen) if root == path else []  # whoever gives one file wants no others
    warning = "; ".join(lines)
    return ParquetFiles(root=root, split=wanted, sizes={name: sizes[name] for name in chosen}, warning=warning)


def _list_local(path: Path) -> tuple[Path, dict[str, int], dict[str, int]]:
    """The folder, the sizes of the files below it, and how many of what are left out."""
    if path.is_file():
        return path.parent, {path.name: path.stat().st_size}, {}
    if not path.is_dir():
        raise FileNotFoundError(path)
    sizes: dict[str, int] = {}
    links = deep = 0

    def fail(error: OSError) -> None:
        raise error

    for folder, folders, names in os.walk(path, onerror=fail):
        inside = Path(folder).relative_to(path)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        links += sum(os.path.islink(os.path.join(folder, name)) for name in folders)
        if len(inside.parts) >= MAX_DEPTH:
            deep += len(folders)
            folders.clear()
        for name in names:
            if name.lower().endswith(SUFFIX) and not name.startswith("."):
                try:
                    sizes[(inside / name).as_posix()] = os.stat(os.path.join(folder, name)).st_size
                except FileNotFoundError as error:
                    raise UsageError(f"{path / inside / name}: is a link to no file; mend or remove it") from error
    left_out = {"links to folders": links, f"folders more than {MAX_DEPTH} levels deep": deep}
    return path, _bounded(path, sizes), left_out


def _list_remote(path: Path) -> tuple[Path, dict[str, int], dict[str, int]]:
    remote: Any = path
    store, inside = remote.fs, remote.path.rstrip("/")
    if path.name.lower().endswith(SUFFIX):
        found = store.info(inside)
        if found["type"] == "file":
            if found.get("size") is None:
                raise ZpipeError(f"{path}: the server does not tell its size; download it, and give the file")
            return path.parent, {path.name: int(found["size"])}, {}
    # Links of a web page may lead anywhere, so they are not followed.
    web = str(path).startswith("http")
    entries = (
        store.ls(remote.path, detail=True) if web else store.find(inside, maxdepth=MAX_DEPTH, detail=True).values()
    )
    sizes: dict[str, int] = {}
    for entry in entries:
        name = str(entry["name"]).removeprefix(f"{inside}/")
        if entry["type"] == "file" and name.lower().endswith(SUFFIX) and name != entry["name"]:
            size = entry["size"] if entry.get("size") is not None else store.info(entry["name"])["size"]
            sizes[name] = int(size)
    return path, _bounded(path, sizes), {}


def _bounded(path: Path, sizes: dict[str, int]) -> dict[str, int]:
    if len(sizes) > MAX_FILES:
        raise ZpipeError(f"{path}: holds {len(sizes)} Parquet files, more than {MAX_FILES}; give a folder with fewer")
    for name in sizes:
        if printable(name) != name or ".." in name.split("/"):
            raise ZpipeError(f"{path}: the name of {printable(name)} has unprintable characters or dots; rename it")
    return sizes


def _canonical(split: str) -> str:
    return SPLIT_NAMES.get(split.lower(), split)


def _place_of(name: str, root: Path) -> tuple[str, str | None]:
    """The data set that a file belongs to, by its folders, and its split; None if its name tells none."""
    *folders, file = name.split("/")
    stem = file[: -len(SUFFIX)]
    split = _canonical(numbered["split"]) if (numbered := _NUMBERED.fullmatch(stem)) else _split_in(stem)
    if split is None and folders:
        last = folders[-1]
        split = _split_in(last) or (last if stem.isdecimal() and last != "data" else None)
        if split is not None:
            folders.pop()
    if split is None:
        split = SPLIT_NAMES.get(root.name.lower())
    return "/".join(folder for folder in folders if folder != "data"), split


def _split_in(name: str) -> str | None:
    """The split whose name is among the words of a name, if there is exactly one."""
    found = {SPLIT_NAMES[word] for word in re.split("[^a-z]+", name.lower()) if word in SPLIT_NAMES}
    return found.pop() if len(found) == 1 else None


def _missing(path: Path, names: list[str]) -> list[str]:
    """A warning if files are numbered `of` more than there are."""
    stems = (name.rpartition("/")[2][: -len(SUFFIX)] for name in names)
    stated = {int(numbered["files"]) for stem in stems if (numbered := _NUMBERED.fullmatch(stem))}
    if not stated or stated == {len(names)}:
        return []
    return [f"{path}: {len(names)} files; their names say that there are {' or '.join(map(str, sorted(stated)))}"]


def _few(names: list[str]) -> str:
    more = ", ..." if len(names) > _SHOWN else ""
    return ", ".join(printable(name) for name in names[:_SHOWN]) + more
