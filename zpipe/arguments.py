"""The check of the command line as a whole, before any verb reads it."""

from __future__ import annotations

from typing import Any

from typer.core import TyperGroup

from zpipe.console import fail
from zpipe.schemas.errors import UsageError
from zpipe.schemas.secrets import refuse_secret


class SecretlessGroup(TyperGroup):
    """A group of commands none of whose arguments may carry credentials.

    Any argument may end in a message, in the settings of a run, or in Ray's log, so all are checked in one place.
    """

    # The context is that of click, which some versions of typer bundle.
    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse the arguments, or end with one line that names the option and leaves out its value."""
        before = ""
        for argument in args:
            try:
                refuse_secret(argument)
            except UsageError as error:
                fail(f"{before} {error}".lstrip(), error.details, error.exit_code)
            before = argument if argument.startswith("--") else ""
        return super().parse_args(ctx, args)
