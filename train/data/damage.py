"""Damaged tars and samples: what they are, and the record of those that a loader left out."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from zpipe.schemas.errors import ZpipeError

MAX_LINES = 100
SKIP = "give --damaged skip to leave it out"


class DamagedSample(ZpipeError):
    """A sample can't be used: its image, label or .json is broken. Its tar is sound."""


@dataclass(frozen=True)
class Damage:
    """A tar or a sample that was left out."""

    shard: int
    """Position of the tar in the list of the data set."""
    row: int | None
    """Position of the sample in its tar; None for the whole tar."""
    reason: str
    """One line that names the tar and, for a sample, its key."""


class DamageLog:
    """What a loader left out so far, each unit once, however many epochs come across it."""

    def __init__(self) -> None:
        self.shards: list[str] = []
        self.samples: list[str] = []
        self.places: set[tuple[int, int]] = set()
        self.shard_numbers: set[int] = set()

    def add(self, units: Iterable[Damage]) -> None:
        """Record units; the reasons of the first `MAX_LINES` samples are kept, all others are only counted."""
        for unit in units:
            if unit.row is None:
                if unit.shard not in self.shard_numbers:
                    self.shards.append(unit.reason)
                self.shard_numbers.add(unit.shard)
            elif (unit.shard, unit.row) not in self.places:
                self.places.add((unit.shard, unit.row))
                if len(self.samples) < MAX_LINES:
                    self.samples.append(unit.reason)
