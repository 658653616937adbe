"""Settings by dotted name: what `--set train.opt=muon` does to a frozen dataclass."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, is_dataclass, replace
from typing import Any, TypeVar

from zpipe.schemas.errors import UsageError

Config = TypeVar("Config")


def with_settings(config: Config, settings: Mapping[str, Any]) -> Config:
    """`config` with fields replaced; dotted names reach into nested dataclasses, lists become tuples.

    Errors: :class:`UsageError` for an unknown name or a value of another type than the field's present one.
    """
    for name, value in settings.items():
        config = _replace(config, name.split("."), value, name)
    return config


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
    return replace(config, **{path[0]: _coerce(value, present, full)})


def _coerce(value: Any, present: Any, full: str) -> Any:
    if isinstance(present, tuple) and isinstance(value, list):
        return tuple(value)
    if isinstance(present, float) and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if present is not None and value is not None and type(value) is not type(present):
        raise UsageError(f"setting {full}: {value!r} is not of type {type(present).__name__}")
    return value
