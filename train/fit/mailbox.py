"""The channel between training processes and the driver. It imports nothing large, so that its actor starts fast."""

from __future__ import annotations

import asyncio
from typing import Any

Report = tuple[str, int, int, dict[str, Any]]
"""The arguments of a progress callback: stage, done, total and metrics."""


class Mailbox:
    """Ray actor: rank 0 reports progress, any rank reports an error, the driver requests a stop.

    Its methods are coroutines, so that one call may wait while others are served.
    """

    def __init__(self) -> None:
        self._reports: list[Report] = []
        self._error: Exception | None = None
        self._begun = False
        self._stop = asyncio.Event()

    async def begin(self) -> None:
        """Called by rank 0 before it trains."""
        self._begun = True

    async def report(self, stage: str, done: int, total: int, metrics: dict[str, Any]) -> None:
        """Called by rank 0 with its progress."""
        self._reports.append((stage, done, total, metrics))

    async def take_reports(self) -> list[Report]:
        """The reports since the last call."""
        reports, self._reports = self._reports, []
        return reports

    async def fail(self, error: Exception) -> None:
        """Called by a rank that failed; the first error counts."""
        self._error = self._error or error

    async def error(self) -> Exception | None:
        """The error that a rank reported, if any."""
        return self._error

    async def request_stop(self) -> bool:
        """Ask the ranks to save and stop; returns whether training has begun."""
        self._stop.set()
        return self._begun

    async def wait_for_stop(self) -> None:
        """Return once a stop is requested."""
        await self._stop.wait()
