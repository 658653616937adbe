"""Where the processes of a training run meet the one that started them. Imports nothing of weight, and so starts fast."""

from __future__ import annotations

import asyncio
from typing import Any

News = tuple[str, int, int, dict[str, Any]]


class Mailbox:
    """Here the first rank tells its progress, any rank its error, and the driver that it is time to stop. An actor of Ray,
    whose calls may wait side by side.
    """

    def __init__(self) -> None:
        self._news: list[News] = []
        self._error: Exception | None = None
        self._begun = False
        self._stop = asyncio.Event()

    async def begin(self) -> None:
        self._begun = True

    async def tell(self, stage: str, done: int, total: int, facts: dict[str, Any]) -> None:
        self._news.append((stage, done, total, facts))

    async def news(self) -> list[News]:
        news, self._news = self._news, []
        return news

    async def fail(self, error: Exception) -> None:
        self._error = self._error or error

    async def error(self) -> Exception | None:
        return self._error

    async def ask_to_stop(self) -> bool:
        """Whether anybody is there to hear it."""
        self._stop.set()
        return self._begun

    async def stopped(self) -> None:
        await self._stop.wait()
