"""An account of what was read: nothing that a user brought may vanish without a word."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

import msgspec

from zpipe.schemas.names import printable

MAX_REASONS = 100  # further ones are counted together, because a stranger's tar may have any number of suffixes
_Counts = dict[Annotated[str, msgspec.Meta(max_length=200)], Annotated[int, msgspec.Meta(ge=0, le=2**53)]]
_Number = Annotated[int, msgspec.Meta(ge=0, le=2**53)]


@dataclass(frozen=True, kw_only=True)
class AccountRecord:
    """An account as our JSON files hold it."""

    seen: _Number = 0
    taken: _Number = 0
    left_out: _Counts = field(default_factory=dict)
    images_left_out: _Number = 0
    quarantined: _Number = 0
    noted: _Counts = field(default_factory=dict)


@dataclass(kw_only=True)
class Account:
    """How many units (images, or samples) a command saw, and what became of them."""

    seen: int = 0
    """All units."""
    taken: int = 0
    """Units that were read."""
    left_out: Counter[str] = field(default_factory=Counter)
    """Units that were not read, by reason: ``no image: .xyz``, ``hidden``, ..."""
    images_left_out: int = 0
    """How many of those are images that the user may miss; a command then ends with exit code 1."""
    quarantined: int = 0
    """Units that look like images and cannot be used; they are listed with their reasons."""
    noted: Counter[str] = field(default_factory=Counter)
    """Units that were taken with a change worth telling, by change: ``re-encoded as PNG``, ..."""

    def take(self) -> None:
        """Count a unit that was read."""
        self.seen += 1
        self.taken += 1

    def leave_out(self, reason: str, *, image: bool = False, count: int = 1) -> None:
        """Count units that were not read; `image` if they are images that the user may miss."""
        if reason not in self.left_out and len(self.left_out) >= MAX_REASONS:
            reason = "other"
        self.left_out[reason] += count
        self.seen += count
        self.images_left_out += count * image

    @property
    def is_whole(self) -> bool:
        """Whether every image was taken."""
        return not self.quarantined and not self.images_left_out

    def __add__(self, other: Account) -> Account:
        """The account of both."""
        return Account(
            seen=self.seen + other.seen,
            taken=self.taken + other.taken,
            left_out=self.left_out + other.left_out,
            images_left_out=self.images_left_out + other.images_left_out,
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
            "images_left_out": self.images_left_out,
            "quarantined": self.quarantined,
            "noted": dict(self.noted.most_common()),
        }

    @classmethod
    def from_record(cls, record: AccountRecord) -> Account:
        """The account that a file holds."""
        return cls(
            seen=record.seen,
            taken=record.taken,
            left_out=Counter(record.left_out),
            images_left_out=record.images_left_out,
            quarantined=record.quarantined,
            noted=Counter(record.noted),
        )


def no_image(suffix: str) -> str:
    """The reason for leaving out what is no image, by its suffix (without the dot)."""
    shown = printable(suffix)
    return f"no image: .{shown if len(shown) <= 30 else shown[:27] + '...'}" if suffix else "no image: no suffix"


def _by(counts: Mapping[str, int]) -> str:
    if not counts:
        return ""
    first = Counter(counts).most_common(5)
    more = ", ..." if len(counts) > len(first) else ""
    return " (" + ", ".join(f"{reason} {count}" for reason, count in first) + more + ")"
