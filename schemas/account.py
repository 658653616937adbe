"""An account of what was read: nothing that a user brought may vanish without a word."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(kw_only=True)
class Account:
    """How many units (images, or samples) a command saw, and what became of them."""

    seen: int = 0
    """All units."""
    taken: int = 0
    """Units that were read."""
    left_out: Counter[str] = field(default_factory=Counter)
    """Units that were not read, by reason: a suffix (``.xyz``), ``hidden``, ..."""
    quarantined: int = 0
    """Units that look like images and cannot be used; they are listed with their reasons."""
    noted: Counter[str] = field(default_factory=Counter)
    """Units that were taken with a change worth telling, by change: ``re-encoded as PNG``, ..."""

    def __add__(self, other: Account) -> Account:
        """The account of both."""
        return Account(
            seen=self.seen + other.seen,
            taken=self.taken + other.taken,
            left_out=self.left_out + other.left_out,
            quarantined=self.quarantined + other.quarantined,
            noted=self.noted + other.noted,
        )

    def __str__(self) -> str:
        """One line: ``seen 12, taken 9, left out 2 (.xyz 2), quarantined 1``."""
        parts = [f"seen {self.seen}", f"taken {self.taken}", f"left out {self.left_out.total()}{_by(self.left_out)}"]
        parts.append(f"quarantined {self.quarantined}")
        parts += [f"{change} {count}" for change, count in self.noted.most_common()]
        return ", ".join(parts)

    def to_json(self) -> dict[str, Any]:
        """The account as JSON values."""
        return {
            "seen": self.seen,
            "taken": self.taken,
            "left_out": dict(self.left_out.most_common()),
            "quarantined": self.quarantined,
            "noted": dict(self.noted.most_common()),
        }


def _by(counts: Mapping[str, int]) -> str:
    if not counts:
        return ""
    first = Counter(counts).most_common(5)
    more = ", ..." if len(counts) > len(first) else ""
    return " (" + ", ".join(f"{reason} {count}" for reason, count in first) + more + ")"
