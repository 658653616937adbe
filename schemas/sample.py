"""What one sample of a tar shard is: its key, its members, its label. Pure: names and bytes in, samples out."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from zpipe.schemas.account import Account, no_image
from zpipe.schemas.choices import check_choice
from zpipe.schemas.errors import UsageError, ZpipeError
from zpipe.schemas.image_formats import HEAD_BYTES, IMAGE_SUFFIXES, sniff_format
from zpipe.schemas.names import check_key, printable

MAX_LABEL_BYTES = {"cls": 1 << 10, "json": 1 << 24}
ALLOWED_SUFFIXES = (*IMAGE_SUFFIXES, *MAX_LABEL_BYTES)
_SOME_SUFFIXES = "jpeg, png, webp"
KEY_RULES = ("stem", "path")
MAX_LABEL_FIELD = 256  # characters
LABEL_FIELD = r"^[^.]+(\.[^.]+)*$"
_WHOLE_NUMBER = re.compile(r"-?[0-9]{1,20}")


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

    @property
    def box(self) -> tuple[float, float, float, float] | None:
        """The object's box in pixels, x1 < x2 and y1 < y2; None if `box` of the .json is absent or of another form."""
        return _box(self.meta.get("box"))

    @property
    def boxes(self) -> list[tuple[float, float, float, float]]:
        """The boxes of the objects of the image's class, in pixels as `box`.

        They are those in `boxes` of the .json whose entry in `box_labels` is the label, or all where it has no
        `box_labels`; of a .json without `boxes`, its `box`. Those of another form are left out.

        Raises:
            ZpipeError: `boxes` and `box_labels` have different lengths.
        """
        boxes, labels = self.meta.get("boxes"), self.meta.get("box_labels")
        if not isinstance(boxes, list):
            boxes, labels = [self.meta.get("box")], None
        own = labels if isinstance(labels, list) else [self.label] * len(boxes)
        if len(own) != len(boxes):
            raise ZpipeError(
                f"key {self.key}: its .json has {len(boxes)} boxes and {len(own)} box_labels; give each box one label"
            )
        found = (_box(box) for box, label in zip(boxes, own, strict=True) if label == self.label)
        return [box for box in found if box is not None]


def _box(box: object) -> tuple[float, float, float, float] | None:
    """A box of a .json if it is one with an area; else None."""
    if not isinstance(box, list) or len(box) != 4:
        return None
    if not all(isinstance(edge, int | float) and not isinstance(edge, bool) for edge in box):
        return None
    x1, y1, x2, y2 = box
    bounded = all(abs(edge) < 2**53 for edge in box)  # NaN is not
    return (x1, y1, x2, y2) if bounded and x1 < x2 and y1 < y2 else None


def check_label_field(name: str | None) -> None:
    """Raise :class:`UsageError` for what is no name of a field, dotted where nested; None stands for no field."""
    if name is None or (len(name) <= MAX_LABEL_FIELD and re.search(LABEL_FIELD, name) and printable(name) == name):
        return
    raise UsageError(
        f"--label-field {printable(name)[:80]}: write the name of a field of the .json, such as label or "
        "annotation.class_id"
    )


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


def member_bytes(name: str, size: int) -> int:
    """How many of the first bytes of a tar's member are needed to read samples: all, or enough to tell an image."""
    suffix = split_name(name)[1]
    if suffix in IMAGE_SUFFIXES:
        return size
    return min(size, MAX_LABEL_BYTES[suffix] + 1 if suffix in MAX_LABEL_BYTES else HEAD_BYTES)


def head_bytes(name: str, size: int) -> int:
    """The same to list the keys of a tar."""
    return 0 if split_name(name)[1] in ALLOWED_SUFFIXES else min(size, HEAD_BYTES)


def group_samples(
    members: Iterable[tuple[str, bytes | None]],
    source: str,
    account: Account | None = None,
    *,
    label_field: str | None = None,
    keep_damaged: bool = False,
) -> Iterator[Sample]:
    """Group the members of one tar, in order, into samples.

    Args:
        members: Name and content of each member, read as `member_bytes` says; see :func:`group_members`.
        source: The tar, for messages.
        account: Counts samples, and the members that belong to none.
        label_field: Field of the .json that every label comes from, dotted where nested; the .cls is then not read.
            None takes the .cls or, where there is none, `label` of the .json.
        keep_damaged: Whether a sample without one image or with a bad label is yielded with its `damage`.

    Raises:
        ZpipeError: As :func:`group_members`; unless `keep_damaged`, a sample has no image or two, or a bad label.
    """
    for key, parts in group_members(members, source, account):
        try:
            yield _sample_from(key, parts, source, label_field)
        except ZpipeError as error:
            if not keep_damaged:
                raise
            yield Sample(key=key, image=b"", label=None, damage=str(error))


def group_members(
    members: Iterable[tuple[str, bytes | None]], source: str, account: Account | None = None
) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Group the members of one tar, in order, by their keys.

    A member belongs to a sample if its name is KEY.SUFFIX, with a suffix of `ALLOWED_SUFFIXES`. An image with another
    suffix (`v3.0.jpg`, whose key is `v3`) that has no such image beside it is left out, with its label.

    Args:
        members: Name and content of each member; None as the content of what is no file. The members of a sample are
            adjacent.
        source: The tar, for messages.
        account: Counts samples, and the members that belong to none.

    Yields:
        The key and the members of each sample, by suffix.

    Raises:
        ZpipeError: The members of a sample stand apart, or a key is repeated or breaks the rule of
            `zpipe.schemas.names`.
    """
    account = Account() if account is None else account
    seen: dict[str, frozenset[str]] = {}
    kinds: dict[frozenset[str], frozenset[str]] = {}  # equal sets are kept once
    strays: dict[str, list[str]] = {}  # images with another suffix, by key
    key: str | None = None
    parts: dict[str, bytes] = {}
    for name, data in members:
        member_key, suffix = split_name(name)
        if name.rpartition("/")[2].startswith("."):
            account.leave_out("hidden")
            continue
        if data is None:
            account.leave_out("link or device")
            continue
        if suffix not in ALLOWED_SUFFIXES:
            if sniff_format(data[:HEAD_BYTES]):
                strays.setdefault(member_key, []).append(suffix)
            else:
                account.leave_out(no_image(suffix))
            continue
        if member_key != key:
            if key is not None and _is_sample(key, parts, strays):
                account.take()
                yield key, parts
            if member_key in seen:
                raise _repeated(source, member_key, suffix, seen[member_key])
            check_key(member_key, source, "rebuild this shard with other names")
            key, parts = member_key, {}
        if suffix in parts:
            raise ZpipeError(f"{source}: key {member_key}: two .{suffix} members; rebuild this shard")
        parts[suffix] = data
        suffixes = frozenset(parts)
        seen[member_key] = kinds.setdefault(suffixes, suffixes)
    if key is not None and _is_sample(key, parts, strays):
        account.take()
        yield key, parts
    for member_key, others in strays.items():
        beside = any(suffix in IMAGE_SUFFIXES for suffix in seen.get(member_key, ()))
        for suffix in others:
            account.leave_out(no_image(suffix) if beside else f"image named KEY.{suffix}", image=not beside)


def _is_sample(key: str, parts: Mapping[str, bytes], strays: Mapping[str, object]) -> bool:
    """Whether the members are a sample, maybe a damaged one, and not the label of a stray image."""
    return key not in strays or any(suffix in IMAGE_SUFFIXES for suffix in parts)


def _sample_from(key: str, parts: Mapping[str, bytes], source: str, label_field: str | None) -> Sample:
    images = [suffix for suffix in parts if suffix in IMAGE_SUFFIXES]
    if len(images) != 1:
        remedy = (
            "rebuild this shard with one image per key"
            if images
            else "where the image stands apart from it, unpack the tar and pack it with `tar --sort=name`"
        )
        raise ZpipeError(f"{source}: key {key}: expected one image, found {', '.join(sorted(parts))}; {remedy}")
    meta = _meta_from(key, parts, source)
    if label_field is None:
        label = _label_from(key, parts, meta, source)
    elif "json" not in parts:
        raise ZpipeError(
            f"{source}: key {key}: has no .json, and labels are taken from its field {printable(label_field)}; where "
            "it stands apart from the image, unpack the tar and pack it with `tar --sort=name`"
        )
    else:
        label = _label_at(label_field, meta, key, source)
    return Sample(key=key, image=parts[images[0]], label=label, meta=meta)


def _repeated(source: str, key: str, suffix: str, before: frozenset[str]) -> ZpipeError:
    if suffix in before:
        return ZpipeError(f"{source}: key {key}: comes twice; rebuild this shard with unique keys")
    return ZpipeError(
        f"{source}: key {key}: its members stand apart (.{suffix} comes after other samples); unpack the tar and pack "
        "it with `tar --sort=name`"
    )


def no_samples(source: Path | str, account: Account) -> ZpipeError:
    """What is wrong with a tar without samples, whose members `account` has counted."""
    if not account.seen:
        return ZpipeError(f"{source}: holds no files; remove it")
    found = ", ".join(f"{reason} ({count})" for reason, count in account.left_out.most_common(5))
    return ZpipeError(
        f"{source}: holds no samples: {found}; a sample is KEY.jpg (or {_SOME_SUFFIXES}, ...) with KEY.cls "
        "or KEY.json, and KEY has no dot: rename the members, or remove the tar"
    )


def _meta_from(key: str, parts: Mapping[str, bytes], source: str) -> dict[str, Any]:
    for suffix, most in MAX_LABEL_BYTES.items():
        if len(parts.get(suffix, b"")) > most:
            raise ZpipeError(f"{source}: key {key}: its .{suffix} has more than {most} bytes; rebuild this shard")
    if "json" not in parts:
        return {}
    try:
        # Not msgspec: other people's files hold NaN, which is no JSON, in fields that do not matter here.
        meta = json.loads(parts["json"])
    except (ValueError, RecursionError) as error:
        raise ZpipeError(f"{source}: key {key}: its .json can't be read ({error}); rebuild this shard") from error
    if not isinstance(meta, dict):
        raise ZpipeError(f"{source}: key {key}: its .json is not an object; rebuild this shard")
    return meta


def _label_from(key: str, parts: Mapping[str, bytes], meta: dict[str, Any], source: str) -> int | None:
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
        raise ZpipeError(
            f"{source}: key {key}: its .json has label {_short(label)}, not a class index; rebuild this shard"
        )
    return _checked(label, key, source)


def _label_at(field: str, meta: Mapping[str, Any], key: str, source: str) -> int:
    """The label in a field that the user named. Digits in quotes are a number too, as they are in a .cls."""
    value: Any = meta
    for name in (field,) if field in meta else field.split("."):
        value = value.get(name) if isinstance(value, dict) else None
    if isinstance(value, str) and _WHOLE_NUMBER.fullmatch(value):
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int):
        reason = "is absent" if value is None else f"holds {_short(value)}, not a class index"
        raise ZpipeError(
            f"{source}: key {key}: the label field {printable(field)} of its .json {reason}; rebuild this shard, or "
            "index the tars again with another --label-field"
        )
    return _checked(value, key, source)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."


def _checked(label: int, key: str, source: str) -> int:
    if not -(2**31) <= label < 2**31:
        raise ZpipeError(
            f"{source}: key {key}: its label {str(label)[:20]} is no class index, which has 32 bits; rebuild this shard"
        )
    return label
