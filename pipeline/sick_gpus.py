"""Which GPUs of a run are not to be used any more, because workers on them failed."""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass

MAX_DEATHS = 2  # of workers on one GPU, in a row


@dataclass(frozen=True)
class Place:
    """Where a worker runs."""

    node: str
    """Name of the machine."""
    node_id: str
    """Ray's number of the machine."""
    gpus: tuple[str, ...] = ()
    """Numbers of the GPUs that Ray gave the worker; empty for a worker on the CPU."""

    def __str__(self) -> str:
        return f"GPU {','.join(self.gpus)} of {self.node}"


@dataclass
class _Deaths:
    suspects: Set[str]  # the shards that may be to blame for all of them
    in_a_row: int = 0
    last: str = ""


class SickGpus:
    """Counts the deaths of workers on each GPU.

    A GPU is sick when its workers died of different shards, or `MAX_DEATHS` times in a row. One shard that is deadly
    everywhere makes no GPU sick that computes other shards in between.
    """

    def __init__(self) -> None:
        self._deaths: dict[Place, _Deaths] = {}

    def died(self, place: Place, shards: Set[str], reason: str) -> bool:
        """A worker died; returns whether its GPU is sick.

        Args:
            place: Where it was.
            shards: Those that it had, of which one may be to blame; {""} while it started.
            reason: What its last error said.
        """
        deaths = self._deaths.setdefault(place, _Deaths(shards))
        deaths.suspects &= shards
        deaths.in_a_row += 1
        deaths.last = reason
        return place in self

    def worked(self, place: Place) -> None:
        """A worker finished a shard."""
        if place in self._deaths:
            self._deaths[place].in_a_row = 0

    def __contains__(self, place: Place) -> bool:
        deaths = self._deaths.get(place)
        return deaths is not None and (not deaths.suspects or deaths.in_a_row >= MAX_DEATHS)

    def __str__(self) -> str:
        """The sick GPUs, each with why its last worker died."""
        return ", ".join(f"{place} ({deaths.last})" for place, deaths in self._deaths.items() if place in self)
