"""Images that are pictures of their own relevance maps: ramps, each in a direction of its own."""

from __future__ import annotations

import numpy as np

from zpipe.train.data.loader import RelevanceLoader

SIZES = [(96, 48), (40, 100), (64, 64), (33, 57)]  # width, height
CELLS = 32
# Tars of unequal length: the hard case for ranks that must take equally many steps.
LENGTHS = (7, 3, 6, 1, 5, 2)
KEYS = [f"img_{number:03d}" for number in range(sum(LENGTHS))]


def ramp(angle: float, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """A plane over the unit square that rises towards `angle`, 0 and 1 at the outermost cell centres of a map."""
    cos, sin = np.cos(angle), np.sin(angle)
    edge = 0.5 / CELLS
    corners = [cos * a + sin * b for a in (edge, 1 - edge) for b in (edge, 1 - edge)]
    return (cos * x + sin * y - min(corners)) / (max(corners) - min(corners))


def plane(angle: float, width: int, height: int) -> np.ndarray:
    x, y = np.meshgrid((np.arange(width) + 0.5) / width, (np.arange(height) + 0.5) / height)
    return ramp(angle, x, y)


def angle_of(number: int) -> float:
    return 2 * np.pi * number / len(KEYS)


def load(data, **options) -> list[dict]:
    loader = RelevanceLoader(*data, **{"batch_size": 4, "image_size": CELLS} | options)
    batches = list(loader)
    assert len(batches) == len(loader)
    return batches


def keys_of(batches: list[dict]) -> list[str]:
    return [key for batch in batches for key in batch["key"]]


def copy_shards(data, folder):
    folder.mkdir()
    for path in data[0].iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder
