"""Which columns of a Parquet data set hold the images, their labels and plain values; and the names of its classes.

Classes are named in the metadata that Hugging Face's library `datasets` writes into each file, under `huggingface`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from zpipe.pipeline.imagenet_names import wnids_of
from zpipe.pipeline.sources import refuse_repeated
from zpipe.schemas.errors import UsageError, ZpipeError
from zpipe.schemas.formats import decode_json
from zpipe.schemas.names import printable

NO_LABEL = "none"
LABEL_NAMES = ("label", "labels", "fine_label", "cls", "class", "target")
# What key.json says of an image itself, or zpipe reads from it with a meaning of its own.
RESERVED = ("width", "height", "source", "path", "box", "boxes", "box_labels", "label")
MAX_VALUES = 64  # columns of plain values
MAX_NAME_BYTES = 200
MAX_CLASSES = 1_000_000
MAX_LABEL = 999_999_999  # as in a labels.csv
_SHOWN = 10
_REMEDY = "write the file again"


@dataclass(frozen=True, kw_only=True)
class Columns:
    """The columns of a data set that are read."""

    image: str
    """Its image files: bytes, or a struct of bytes and path."""
    has_path: bool
    """Whether the images have the names of their files."""
    label: str | None
    """Whole numbers, or names of classes; None if there are no labels."""
    is_named: bool
    """Whether the labels are names of classes."""
    classes: tuple[str, ...]
    """Names of the classes as the metadata has them; empty if it has none."""
    values: tuple[str, ...]
    """Columns of plain values, which go into `key.json`."""
    left_out: tuple[str, ...]
    """Columns that are not read."""
    types: dict[str, pa.DataType]
    """Type of each column that is read."""

    @property
    def top(self) -> int:
        """The largest number that may be a label."""
        return len(self.classes) - 1 if self.classes else MAX_LABEL

    def check(self, schema: pa.Schema, where: str, first: str) -> None:
        """Check that another file has the same columns and classes.

        Args:
            schema: Its schema.
            where: The file, for messages.
            first: The file that the columns were chosen in, for messages.

        Raises:
            ZpipeError: They differ.
        """
        for name, kind in self.types.items():
            found = [entry.type for entry in schema if entry.name == name]
            if found != [kind]:
                said = ", ".join(map(_shown_type, found)) or "missing"
                raise ZpipeError(
                    f"{where}: its column {printable(name)} is {said}, that of {first} is {_shown_type(kind)}; give "
                    "the folder of one data set"
                )
        if self.label and (_classes(_features(schema, where), self.label, where) or ()) != self.classes:
            raise ZpipeError(f"{where}: names other classes than {first}; give the folder of one data set")


def choose_columns(
    schema: pa.Schema, where: str, *, image: str | None, label: str | None, is_image: Callable[[str], bool]
) -> Columns:
    """Choose the columns of a data set by their types and names, and by the metadata.

    Args:
        schema: Schema of a file.
        where: The file, for messages.
        image: Name of the column of images; None to find it.
        label: Name of the column of labels; None to find it, `NO_LABEL` for none.
        is_image: Tells whether the first values of a column begin like image files.

    Raises:
        UsageError: There is no such column, or none or several columns fit.
        ZpipeError: The metadata is damaged.
    """
    twice = next((name for name in schema.names if schema.names.count(name) > 1), None)
    if twice is not None:
        raise ZpipeError(f"{where}: has two columns {printable(twice)}; {_REMEDY}")
    image = _choose_image(schema, where, image, is_image)
    features = _features(schema, where)
    label = _choose_label(schema, features, where, label, image)
    values = [
        entry.name
        for entry in schema
        if entry.name not in (image, label, *RESERVED)
        and _is_plain(entry.type)
        and len(entry.name.encode()) <= MAX_NAME_BYTES
    ][:MAX_VALUES]
    read = [image, *([label] if label else []), *values]
    kind = schema.field(image).type
    return Columns(
        image=image,
        has_path=pa.types.is_struct(kind) and any(entry.name == "path" and _is_text(entry.type) for entry in kind),
        label=label,
        is_named=label is not None and _is_text(schema.field(label).type),
        classes=(_classes(features, label, where) or ()) if label else (),
        values=tuple(values),
        left_out=tuple(name for name in schema.names if name not in read),
        types={name: schema.field(name).type for name in read},
    )


def _choose_image(schema: pa.Schema, where: str, given: str | None, is_image: Callable[[str], bool]) -> str:
    if given is not None:
        kind = _field(schema, given, where, "--image-column").type
        if not _may_hold_images(kind):
            raise UsageError(
                f"--image-column {given}: that column of {where} is {_shown_type(kind)}; images are binary, or a "
                "struct of bytes and path"
            )
        return given
    found = [entry.name for entry in schema if _may_hold_images(entry.type) and is_image(entry.name)]
    if not found:
        raise UsageError(
            f"{where}: no column holds image files, of {shown(schema.names)}; give --image-column NAME if one does"
        )
    if len(found) > 1:
        raise UsageError(f"{where}: the columns {shown(found)} hold images; give one of them by --image-column NAME")
    return found[0]


def _choose_label(schema: pa.Schema, features: dict[str, Any], where: str, given: str | None, image: str) -> str | None:
    if given == NO_LABEL and NO_LABEL not in schema.names:
        return None
    if given is not None:
        label = _field(schema, given, where, "--label-column").name
    else:
        others = [name for name in schema.names if name != image]
        described = [name for name in others if _classes(features, name, where) is not None]
        named = [name for name in LABEL_NAMES if name in others]
        found = described if len(described) == 1 else named or described
        if not found:
            return None
        if len(found) > 1:
            raise UsageError(
                f"{where}: the columns {shown(found)} may be the labels; give one of them by --label-column NAME, or "
                f"--label-column {NO_LABEL}"
            )
        label = found[0]
    kind = schema.field(label).type
    if not pa.types.is_integer(kind) and not _is_text(kind):
        raise UsageError(
            f"{where}: its labels, column {printable(label)}, are {_shown_type(kind)}, not whole numbers or names of "
            f"classes; give another one by --label-column NAME, or --label-column {NO_LABEL}"
        )
    return label


def _field(schema: pa.Schema, name: str, where: str, option: str) -> pa.Field:
    if name not in schema.names:
        raise UsageError(f"{option} {printable(name)}: {where} has no such column; it has {shown(schema.names)}")
    return schema.field(name)


def _may_hold_images(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return any(entry.name == "bytes" and _is_binary(entry.type) for entry in kind)
    return _is_binary(kind)


def _is_binary(kind: pa.DataType) -> bool:
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind))


def _is_text(kind: pa.DataType) -> bool:
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def _is_plain(kind: pa.DataType) -> bool:
    number = pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)
    return bool(number or _is_text(kind))


@dataclass(frozen=True, kw_only=True)
class _Info:
    features: dict[str, Any] | None = None


@dataclass(frozen=True, kw_only=True)
class _Description:
    info: _Info = field(default_factory=_Info)


def _features(schema: pa.Schema, where: str) -> dict[str, Any]:
    """What the metadata says about the columns."""
    text = (schema.metadata or {}).get(b"huggingface", b"{}")
    what = "the description of a data set, in its metadata"
    return decode_json(text, where, type=_Description, what=what, remedy=_REMEDY).info.features or {}


def _classes(features: dict[str, Any], column: str, where: str) -> tuple[str, ...] | None:
    """The names of the classes of a column, by the metadata; those of ImageNet are its wnids. None if it has none."""
    names = _listed_names(features.get(column))
    if names is None:
        return None
    check_classes(names, where)
    wnids = wnids_of(names)  # their English names are no class names: two of them are those of two classes
    if wnids is None:
        refuse_repeated(names, where)
    return wnids or tuple(names)


def _listed_names(feature: Any) -> list[str] | None:
    """The names in the description of a column: a ClassLabel, or one in the form that data cards have."""
    if isinstance(feature, dict) and isinstance(feature.get("dtype"), dict):
        feature = feature["dtype"]
    if isinstance(feature, dict) and isinstance(feature.get("class_label"), dict):
        feature = {"_type": "ClassLabel"} | feature["class_label"]
    if not isinstance(feature, dict) or feature.get("_type") != "ClassLabel":
        return None
    names = feature.get("names")
    if isinstance(names, dict):  # by their numbers
        names = [names.get(str(number), "") for number in range(len(names))]
    return [str(name) for name in names] if isinstance(names, list) else []


def check_classes(names: Iterable[str], where: str) -> None:
    """Check the names of classes. Raises :class:`ZpipeError` if there are too many, or one is not printable."""
    for number, name in enumerate(names):
        if number >= MAX_CLASSES:
            raise ZpipeError(f"{where}: names more than {MAX_CLASSES} classes; give --label-column {NO_LABEL}")
        if not name or printable(name) != name or len(name.encode()) > MAX_NAME_BYTES:
            raise ZpipeError(
                f"{where}: a class is named '{printable(name)[:60]}': a name has 1 to {MAX_NAME_BYTES} bytes and no "
                f"unprintable character; write the file again, or give --label-column {NO_LABEL}"
            )


def shown(names: Iterable[str]) -> str:
    """Names of columns for a message, at most ten of them."""
    names = list(names)
    more = ", ..." if len(names) > _SHOWN else ""
    return ", ".join(printable(name)[:60] for name in names[:_SHOWN]) + more


def _shown_type(kind: pa.DataType) -> str:
    return printable(kind)[:80]
