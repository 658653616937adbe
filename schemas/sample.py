"""What one sample of a tar shard is: its key, its members, its label. Pure: names and bytes in, samples out."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from zpipe.schemas.choices import check_choice
from zpipe.schemas.errors import ZpipeError
from zpipe.schemas.image_formats import IMAGE_SUFFIXES
from zpipe.schemas.names import check_key

LABEL_SUFFIXES = ("cls", "json")
ALLOWED_SUFFIXES = IMAGE_SUFFIXES + LABEL_SUFFIXES
KEY_RULES = ("stem", "path")
TAR_BLOCK = 512  # bytes


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One sample of a tar."""

    key: str
    """Its key: the common name of its members."""
    image: bytes
    """The image file, not decoded."""
    label: int | None
    """Class index; None if there is none."""
    meta: dict[str, Any] = field(default_factory=dict)
    """Content of `key.json`."""
    damage: str | None = None
    """Why the sample can't be used, one line; it then has no image and no label."""


def split_name(name: str) -> tuple[str, str]:
    """Split a member name into key and lower-case suffix, at the first dot after the last slash (WebDataset's rule)."""
    folder, slash, base = name.rpartition("/")
    stem, _, suffix = base.partition(".")
    return folder + slash + stem, suffix.lower()


def shard_stem(name: str) -> str:
    """Name of a tar shard without folder and suffix; its map shard has the same stem."""
    base = str(name).replace("\\", "/").rpartition("/")[2]
    return base[: -len(".tar")] if base.endswith(".tar") else base


def key_for_file(relative_path: str, rule: str = "stem") -> str:
    """Key of a source file. Dots become underscores, because readers cut names at the first dot.

    Args:
        relative_path: Path of the file below the source folder.
        rule: ``stem``: the file name without its suffix; ``path``: its folders too, joined by ``__``.

    Raises:
        UsageError: `rule` is none of `KEY_RULES`.
    """
    check_choice("--keys", rule, KEY_RULES)
    path = relative_path.replace("\\", "/")
    folder, slash, base = path.rpartition("/")
    stem = base.rpartition(".")[0] or base
    return (folder + slash + stem if rule == "path" else stem).replace("/", "__").replace(".", "_")


def _label_from(key: str, parts: dict[str, bytes], meta: dict[str, Any], source: str) -> int | None:
    if "cls" in parts:
        text = parts["cls"]
        try:
            return _checked(int(text), key, source)
        except ValueError as error:
            raise ZpipeError(
                f"{source}: key {key}: its .cls holds {text[:20]!r}, not a class index; rebuild this shard"
            ) from error
    label = meta.get("label")
    if label is None:
        return None
    if isinstance(label, bool) or not isinstance(label, int):
        raise ZpipeError(f"{source}: key {key}: its .json has label {label!r}, not a class index; rebuild this shard")
    return _checked(label, key, source)


def _checked(label: int, key: str, source: str) -> int:
    if not -(2**31) <= label < 2**31:
        raise ZpipeError(
            f"{source}: key {key}: its label {str(label)[:20]} is no class index, which has 32 bits; rebuild this shard"
        )
    return label


def _sample_from(key: str, parts: dict[str, bytes], source: str) -> Sample:
    images = [suffix for suffix in parts if suffix in IMAGE_SUFFIXES]
    if len(images) != 1:
        members = ", ".join(sorted(parts)) or "nothing"
        raise ZpipeError(f"{source}: key {key}: expected one image, found {members}; rebuild or replace this shard")
    meta: dict[str, Any] = {}
    if "json" in parts:
        try:
            meta = json.loads(parts["json"])
        except (ValueError, RecursionError) as error:
            raise ZpipeError(f"{source}: key {key}: its .json can't be read ({error}); rebuild this shard") from error
        if not isinstance(meta, dict):
            raise ZpipeError(f"{source}: key {key}: its .json is not an object; rebuild this shard")
    return Sample(key=key, image=parts[images[0]], label=_label_from(key, parts, meta, source), meta=meta)


def _sample_or_damage(key: str, parts: dict[str, bytes], source: str) -> Sample:
    try:
        return _sample_from(key, parts, source)
    except ZpipeError as error:
        return Sample(key=key, image=b"", label=None, damage=str(error))


def group_samples(members: Iterable[tuple[str, bytes]], source: str, *, keep_damaged: bool = False) -> Iterator[Sample]:
    """Group the members of one tar, in order, into samples.

    Args:
        members: Name and content of each member. The members of a sample are adjacent; those whose suffix is not in
            `ALLOWED_SUFFIXES` are ignored.
        source: The tar, for messages.
        keep_damaged: Whether a sample without an image or with a bad label is yielded with its `damage`.

    Raises:
        ZpipeError: A key is repeated or not UTF-8; unless `keep_damaged`, a sample has no image or a bad label.
    """
    form = _sample_or_damage if keep_damaged else _sample_from
    seen: set[str] = set()
    key: str | None = None
    parts: dict[str, bytes] = {}
    for name, data in members:
        member_key, suffix = split_name(name)
        if suffix not in ALLOWED_SUFFIXES:
            continue
        if member_key != key:
            if key is not None:
                yield form(key, parts, source)
            if member_key in seen:
                raise ZpipeError(f"{source}: key {member_key}: comes twice; rebuild this shard with unique keys")
            check_key(member_key, source, "rebuild this shard with other names")
            seen.add(member_key)
            key, parts = member_key, {}
        if suffix in parts:
            raise ZpipeError(f"{source}: key {member_key}: two .{suffix} members; rebuild this shard")
        parts[suffix] = data
    if key is not None:
        yield form(key, parts, source)


def check_tar_end(read: Callable[[int], bytes], path: Path, *, blocks: int) -> None:
    """Check that a tar is whole: its last member is followed by blocks of zeros and nothing else.

    tarfile does not notice: it takes a truncated or damaged header for the end of the tar.

    Args:
        read: Reads the next bytes of the tar.
        path: The tar, for messages.
        blocks: How many blocks of zeros must still come.

    Raises:
        ZpipeError: The end mark is missing, or other data comes after it.
    """
    if read(blocks * TAR_BLOCK) != bytes(blocks * TAR_BLOCK):
        raise ZpipeError(f"{path}: has no end mark: truncated or altered; restore it or make the shards again")
    while rest := read(1 << 20):
        if rest.strip(b"\0"):
            raise ZpipeError(f"{path}: goes on behind its end mark, as two tars in one file do; make the shards again")
