"""The check of a value that must be one of a few names, with one message for Python users and the command line."""

from __future__ import annotations

from collections.abc import Iterable

from zpipe.schemas.errors import UsageError


def check_choice(option: str, value: object, choices: Iterable[str]) -> None:
    """Check that a value is one of its choices.

    Args:
        option: What the message calls the field, by the name of its command-line option: ``--executor``.
        value: The value of the field.
        choices: The values that are allowed.

    Raises:
        UsageError: The value is none of them; the message names the option, the value and the choices.
    """
    names = tuple(choices)
    if value not in names:
        allowed = " or ".join(names) if len(names) == 2 else f"one of {', '.join(names)}"
        raise UsageError(f"{option} {value}: choose {allowed}")
