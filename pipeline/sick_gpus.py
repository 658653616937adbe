"""Which GPUs of a run are not to be used any more, because workers on them failed."""

from __future__ import annotations

from dataclasses import dataclass, field

MAX_DEATHS = 2  # of workers on one GPU


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
    shards: set[str] = field(default_factory=set)
    in_a_row: int = 0
    last: str = ""


class SickGpus:
    """Counts the deaths of workers on each GPU.

    A GPU is sick when its workers died of `MAX_DEATHS` different shards, or as often in a row. One shard that is deadly
    everywhere makes no GPU sick that computes other shards in between.
    """

    def __init__(self) -> None:
        self._deaths: dict[Place, _Deaths] = {}

    def died(self, place: Place, shard: str, reason: str) -> bool:
        """A worker died of a shard ("" while it started); returns whether its GPU is sick."""
        deaths = self._deaths.setdefault(place, _Deaths())
        deaths.shards.add(shard)
        deaths.in_a_row += 1
        deaths.last = reason
        return place in self

    def worked(self, place: Place) -> None:
        """A worker finished a shard."""
        if place in self._deaths:
            self._deaths[place].in_a_row = 0

    def __contains__(self, place: Place) -> bool:
        deaths = self._deaths.get(place)
        return deaths is not None and max(len(deaths.shards), deaths.in_a_row) >= MAX_DEATHS

    def __str__(self) -> str:
        """The sick GPUs, each with why its last worker died."""
        return ", ".join(f"{place} ({deaths.last})" for place, deaths in self._deaths.items() if place in self)
