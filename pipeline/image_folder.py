"""Folders of images as a source of shards: class folders (ImageFolder trees), or a folder with `labels.csv`.

A file with the suffix of an image is an image, or it is put aside with the reason. Any other file is an image if its
first bytes are those of one; if not, it is left out and counted by its suffix. So a folder of plainly named images
costs no reads but those that pack them.

A source holds the list of its files in memory, some 170 bytes each.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from zpipe.pipeline.class_names import check_class_folders, order_warnings
from zpipe.pipeline.labels_csv import LABELS_NAME, read_labels
from zpipe.pipeline.sources import Record, Rejected, check_seed, in_threads, read_record, unchecked
from zpipe.schemas.account import Account, no_image
from zpipe.schemas.choices import check_choice
from zpipe.schemas.errors import UsageError, ZpipeError
from zpipe.schemas.image_formats import HEAD_BYTES, IMAGE_SUFFIXES, sniff_format
from zpipe.schemas.names import check_key, printable
from zpipe.schemas.sample import KEY_RULES, key_for_file
from zpipe.schemas.shard_index import digest_keys
from zpipe.schemas.storage import as_local, open_file

SYSTEM_FOLDERS = {
    *("@eadir", "#recycle", "@recycle", "$recycle.bin", "lost+found", "system volume information"),
    *("__macosx", "__pycache__"),
}
SYSTEM_FILES = {"thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r"}
# Files that make a folder one of ours; and what they begin with.
OUR_FILES = ("shards.json", "make-shards.jsonl", "manifest.json", "extraction.json", "run.json")
OUR_MARK = b'"zpipe-'
SNIFF_THREADS = 16


@dataclass(frozen=True)
class _SourceFile:
    path: str
    key: str
    label: int


class FolderSource:
    """Image files of an ImageFolder tree (one sub-folder per class) or of a folder with `labels.csv`.

    Classes are numbered in the plain order of their folders' names. A folder without images keeps its number. Hidden
    and system folders, and folders that zpipe wrote, are no classes. Links to folders are followed, once per class.

    Args:
        root: The folder.
        shard_size: Images per part.
        shuffle_seed: Seed of the order of images; None keeps the order of the source.
        key_rule: How a key is made of a file name: a name of `zpipe.schemas.sample.KEY_RULES`.
        check: Whether images that keep their bytes are decoded as a check.

    Raises:
        UsageError: The folder is absent, holds no images or splits in place of classes, or an argument makes no sense.
        ZpipeError: A line of `labels.csv` or the name of a file is wrong, or a folder cannot be read; the message names
            it.
    """

    def __init__(
        self, root: Path, *, shard_size: int, shuffle_seed: int | None, key_rule: str, check: bool = True
    ) -> None:
        check_choice("--keys", key_rule, KEY_RULES)
        self.root = as_local(root)
        if not self.root.is_dir():
            raise UsageError(
                f"{root}: no such folder; give a folder of images, 'scenes', or NAME:PATH; `zpipe make-shards --help` "
                "lists the names"
            )
        if shuffle_seed is not None:
            check_seed(shuffle_seed)
        self.shard_size = shard_size
        self._settings = {"shard_size": shard_size, "shuffle_seed": shuffle_seed, "key_rule": key_rule}
        self._settings |= unchecked(check)
        self._check = check
        self.account = Account()
        """What is no image, or in no part."""
        self.rejected: tuple[Rejected, ...] = ()
        """Images in no part."""
        self.warnings: tuple[str, ...] = ()
        """What the user should know about the classes."""
        self.classes: tuple[str, ...] = ()
        labelled = self._from_csv() if (self.root / LABELS_NAME).is_file() else self._from_tree()
        self._files = self._with_keys(labelled, key_rule)
        if shuffle_seed is not None:
            order = np.random.default_rng(shuffle_seed).permutation(len(self._files))
            self._files = [self._files[i] for i in order]

    def _from_csv(self) -> list[tuple[str, int]]:
        rows, self.classes = read_labels(self.root)
        listed = {os.path.normpath(file) for file, _ in rows} | {LABELS_NAME}
        walk = _Walk(self.root, self.account)
        unlisted = sum(os.path.normpath(file) not in listed for file in walk.files(""))
        if unlisted:
            self.account.leave_out(f"not in {LABELS_NAME}", count=unlisted)
        return rows

    def _from_tree(self) -> list[tuple[str, int]]:
        folders, loose = _Walk(self.root, self.account).top()
        check_class_folders(self.root, folders)
        found = [
            sorted(find_images(self.root, _Walk(self.root, self.account).files(name), self.account)) for name in folders
        ]
        outside = find_images(self.root, iter(loose), self.account)
        rows = [(file, label) for label, files in enumerate(found) for _, file in files]
        if not rows:
            held = f"; {len(outside)} images lie in no class folder" if outside else ""
            raise UsageError(
                f"{self.root}: no images found; expected one sub-folder a class, or a {LABELS_NAME} "
                f"with columns file, class_index{held}"
            )
        with_images = [name for name, files in zip(folders, found, strict=True) if files]
        check_class_folders(self.root, with_images)
        self.rejected = tuple(Rejected(file=file, reason="lies in no class folder") for _, file in sorted(outside))
        self.classes = tuple(folders)
        self.warnings = order_warnings(self.root, folders, with_images)
        return rows

    def _with_keys(self, rows: list[tuple[str, int]], key_rule: str) -> list[_SourceFile]:
        owner: dict[str, str] = {}
        files = []
        for path, label in rows:
            key = key_for_file(path, key_rule)
            where = self.root / path
            try:
                path.encode()
            except UnicodeEncodeError as error:
                raise ZpipeError(f"{self.root}: the name of {path!r} is not UTF-8; rename the file") from error
            remedy = "rename the file or its folders, or use --keys stem" if key_rule == "path" else "rename the file"
            check_key(key, printable(where), remedy)
            if key in owner:
                apart = key_rule == "stem" and key_for_file(path, "path") != key_for_file(owner[key], "path")
                remedy = "rename one, or use --keys path" if apart else "rename one"
                raise ZpipeError(f"{where}: has the key {key!r} of {owner[key]}; {remedy}")
            owner[key] = path
            files.append(_SourceFile(path, key, label))
        return files

    def describe(self) -> dict[str, Any]:
        """See `Source`."""
        listing = "\n".join(f"{file.path}\t{file.label}" for file in self._files)
        count = {"files": len(self._files)}
        return {"source": str(self.root)} | self._settings | count | {"listing_sha256": digest_keys([listing])}

    def files(self) -> list[str]:
        """The images, by their paths below the folder."""
        return [file.path for file in self._files]

    def parts(self) -> int:
        """See `Source`."""
        return -(-len(self._files) // self.shard_size)

    def records(self, part: int) -> Iterator[Record | Rejected]:
        """See `Source`."""
        files = self._files[part * self.shard_size : (part + 1) * self.shard_size]
        yield from in_threads(self._read, files)

    def _read(self, file: _SourceFile) -> Record | Rejected:
        return read_record(self.root / file.path, file.path, key=file.key, label=file.label, check=self._check)


class _Walk:
    """Lists files below a folder; what it passes by is counted."""

    def __init__(self, root: Path, account: Account) -> None:
        self._root, self._account = root, account
        # A link to one of these would lead around in circles, or over the whole disk.
        self._entered = {_identity(os.stat(folder)) for folder in (root, *root.resolve().parents)}

    def top(self) -> tuple[list[str], list[str]]:
        """The names of the folders in the root that may be classes, sorted, and its files."""
        folders, files = self._entries("")
        return sorted(folders), files

    def files(self, inside: str) -> Iterator[str]:
        """The files below a folder, by their paths below the root."""
        if inside and _identity(os.stat(self._root / inside)) in self._entered:
            self._account.leave_out("folder linked again")
            return
        todo = [inside]
        while todo:
            folders, files = self._entries(todo.pop())
            yield from files
            for folder in folders:
                identity = _identity(os.stat(self._root / folder))
                if identity in self._entered:
                    self._account.leave_out("folder linked again")
                else:
                    self._entered.add(identity)
                    todo.append(folder)

    def _entries(self, inside: str) -> tuple[list[str], list[str]]:
        """The folders and files in a folder, by their paths below the root."""
        folders, files = [], []
        try:
            with os.scandir(self._root / inside) as entries:
                for entry in entries:
                    name = f"{inside}/{entry.name}" if inside else entry.name
                    # A link in a circle is no folder; is_dir() of an entry would raise an error.
                    if os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir():
                        reason = _folder_to_skip(entry)
                        if reason:
                            self._account.leave_out(reason)
                        else:
                            folders.append(name)
                    elif entry.name.startswith(".") or entry.name.lower() in SYSTEM_FILES:
                        self._account.leave_out("hidden")
                    else:
                        files.append(name)
        except OSError as error:
            where = printable(error.filename or self._root / inside)
            remedy = "give yourself permission, or move it out of the source"
            raise ZpipeError(f"{where}: can't be listed ({error.strerror}); {remedy}") from error
        return folders, files


def _identity(found: os.stat_result) -> tuple[int, int]:
    return found.st_dev, found.st_ino


def _folder_to_skip(entry: os.DirEntry[str]) -> str:
    """Why a folder holds no images of the user; empty if it may."""
    if entry.name.startswith(".") or entry.name.lower() in SYSTEM_FOLDERS:
        return "hidden or system folder"
    for name in OUR_FILES:
        path = os.path.join(entry.path, name)
        if os.path.isfile(path):
            with open_file(path) as file:
                if OUR_MARK in file.read(200):
                    return "folder written by zpipe"
    return ""


def find_images(root: Path, files: Iterator[str], account: Account) -> list[tuple[str, str]]:
    """Those of the files that are images, or are named so, with their folders; the others are counted."""
    found: list[str] = []
    others: list[str] = []
    for file in files:
        (found if _suffix(file) in IMAGE_SUFFIXES else others).append(file)
    if others:
        with ThreadPoolExecutor(max_workers=SNIFF_THREADS) as pool:
            for file, reason in zip(others, pool.map(lambda file: _reason_against(root / file), others), strict=True):
                if reason is None:
                    found.append(file)
                else:
                    account.leave_out(reason)
    return [(file.rpartition("/")[0], file) for file in found]


def _reason_against(path: Path) -> str | None:
    """Why a file is no image; None if it begins like one."""
    try:
        with open_file(path) as file:
            head = file.read(HEAD_BYTES)
    except FileNotFoundError:
        return "broken link"
    except OSError as error:
        return f"can't be read: {error.strerror}"
    return None if sniff_format(head) else no_image(_suffix(path.name))


def _suffix(file: str) -> str:
    return os.path.splitext(file)[1][1:].lower()
