"""Settings of frozen dataclasses by dotted name, as in `--set train.opt=muon`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import fields, is_dataclass, replace
from functools import cache
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from zpipe.schemas.errors import UsageError
from zpipe.schemas.names import printable
from zpipe.schemas.secrets import refuse_secret

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Config = TypeVar("Config", bound="DataclassInstance")


def with_settings(config: Config, settings: Mapping[str, Any]) -> Config:
    """Replace fields of a configuration; dotted names reach into nested dataclasses, lists become tuples.

    Raises:
        UsageError: If a name is unknown, or a value is not of its field's type.
    """
    for name, value in settings.items():
        config = _replace(config, name.split("."), value, name)
    return config


def rebuild(config: Config, recorded: Mapping[str, Any]) -> Config:
    """Replace the fields of a configuration, nested ones too, by those that a run recorded.

    Fields that the run did not record keep their values. Names that are no fields are ignored: runs record more than
    their settings, and earlier versions had other settings.

    Raises:
        UsageError: As `with_settings`.
    """
    for field in fields(config):
        if field.name in recorded:
            present, value = getattr(config, field.name), recorded[field.name]
            nested = is_dataclass(present) and isinstance(value, Mapping)
            new = (
                rebuild(present, value)
                if nested
                else _coerce(value, get_type_hints(type(config))[field.name], field.name)
            )
            config = replace(config, **{field.name: new})
    return config


def check_choices(config: DataclassInstance, prefix: str = "") -> None:
    """Check the choices of a dataclass, and that none of its texts carries credentials: settings are written down.

    To be called in its `__post_init__`.

    Args:
        config: The dataclass.
        prefix: What the names of its fields begin with in messages, such as `train.`.

    Raises:
        UsageError: Naming the field, and its choices if it has some.
    """
    for name, wanted in _choices(type(config)).items():
        _coerce(getattr(config, name), wanted, prefix + name)
    for field in fields(config):
        value = getattr(config, field.name)
        if isinstance(value, (str, Mapping)):
            refuse_secret(f"{prefix}{field.name}={value}")


def check_bounds(config: DataclassInstance, bounds: Mapping[str, tuple[float, float]], prefix: str = "") -> None:
    """Check fields that are numbers; to be called in `__post_init__`. A field that is None is left out.

    Args:
        config: The dataclass.
        bounds: The smallest and the largest value of each field.
        prefix: What the names of its fields begin with in messages, such as `train.`.

    Raises:
        UsageError: Naming the field and its bounds; NaN and infinity are out of any.
    """
    for name, (low, high) in bounds.items():
        value = getattr(config, name)
        if value is not None and not low <= value <= high:
            raise UsageError(f"{prefix}{name} {shown(value)}: give a number from {low:g} to {high:g}")


def shown(value: Any) -> str:
    """A value for a message: on one line, and not longer than 80 characters."""
    text = f"{value:g}" if isinstance(value, float) else printable(repr(value))
    return text if len(text) <= 80 else text[:77] + "..."


@cache
def _choices(config: type[DataclassInstance]) -> dict[str, Any]:
    """The fields of type Literal and their types. Cached, because resolving the annotations is slow."""
    hints = get_type_hints(config)
    return {field.name: hints[field.name] for field in fields(config) if get_origin(hints[field.name]) is Literal}


def _replace(config: Any, path: list[str], value: Any, full: str) -> Any:
    names = [field.name for field in fields(config)]
    if path[0] not in names:
        raise UsageError(f"setting {full}: unknown; choose one of {', '.join(names)}")
    present = getattr(config, path[0])
    if len(path) > 1:
        if not is_dataclass(present):
            raise UsageError(f"setting {full}: {path[0]} has no settings inside")
        return replace(config, **{path[0]: _replace(present, path[1:], value, full)})
    if is_dataclass(present):
        raise UsageError(f"setting {full}: give one of its own, such as {full}.{fields(present)[0].name}")
    return replace(config, **{path[0]: _coerce(value, get_type_hints(type(config))[path[0]], full)})


def _coerce(value: Any, wanted: Any, full: str) -> Any:
    """Convert `value` to the annotated type `wanted`: a plain type, `X | None`, a Literal, a tuple or a dict."""
    if get_origin(wanted) in (Union, UnionType):
        if value is None:
            return None
        wanted = next(option for option in get_args(wanted) if option is not NoneType)
    if get_origin(wanted) is Literal:
        if value not in get_args(wanted):
            raise UsageError(f"setting {full}: {shown(value)}; choose one of {', '.join(get_args(wanted))}")
        return value
    if get_origin(wanted) is tuple:
        parts = get_args(wanted)
        if not isinstance(value, (list, tuple)):
            raise UsageError(
                f"setting {full}: {shown(value)}; give a list of {len(parts)} values, such as "
                f"[{','.join(['0.5'] * len(parts))}]"
            )
        if len(value) != len(parts):
            raise UsageError(f"setting {full}: wants {len(parts)} values, got {len(value)}")
        return tuple(_coerce(item, part, full) for item, part in zip(value, parts, strict=True))
    plain = get_origin(wanted) or wanted
    if plain is float and type(value) is int and abs(value) < 2**63:
        value = float(value)
    if type(value) is not plain:
        raise UsageError(f"setting {full}: {shown(value)} is not of type {plain.__name__}")
    _check_json(value, full)
    return value


def _check_json(value: Any, full: str) -> None:
    """Check that a value can be written as JSON, which has no NaN and no halves of characters.

    Raises:
        UsageError: Naming the setting.
    """
    if isinstance(value, Mapping):
        for name, inner in value.items():
            _check_json(name, full)
            _check_json(inner, full)
    elif isinstance(value, (list, tuple)):
        for inner in value:
            _check_json(inner, full)
    elif isinstance(value, float) and not math.isfinite(value):
        raise UsageError(f"setting {full}: {value!r} is not a finite number")
    elif isinstance(value, int) and abs(value) >= 2**63:
        raise UsageError(f"setting {full}: {shown(value)} has more than 64 bits")
    elif isinstance(value, str) and not is_utf8(value):
        raise UsageError(f"setting {full}: {shown(value)} is not UTF-8")


def is_utf8(text: str) -> bool:
    """Whether a text can be written as UTF-8; arguments and paths in another encoding can't."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def to_json(value: Any) -> Any:
    """Convert settings to JSON values. Tuples become lists, so that a record equals itself after reading it back.

    Raises:
        UsageError: A text, such as a path, is not UTF-8.
    """
    if isinstance(value, str) and not is_utf8(value):
        raise UsageError(f"{printable(value)}: is not UTF-8, so that it can't be recorded; rename it")
    if isinstance(value, dict):
        return {name: to_json(item) for name, item in value.items()}
    return [to_json(item) for item in value] if isinstance(value, (list, tuple)) else value
