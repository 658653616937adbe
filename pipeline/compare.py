"""How far the maps of two stores of one data set agree, made by different methods or teachers."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from zpipe.schemas.errors import ZpipeError
from zpipe.schemas.progress import Progress, silent
from zpipe.schemas.relevance_maps import RelevanceMaps
from zpipe.schemas.relevance_store import OK

CHUNK = 256  # maps at once: the pairs of 196 cells of one chunk take 20 MB
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """How far two stores agree on the samples of which both have usable maps."""

    common: int
    """Number of these samples."""
    only_a: int
    """Number of keys that only the first store has."""
    only_b: int
    """Number of keys that only the second store has."""
    unusable: int
    """Number of common keys without a usable map in both stores."""
    top: int
    """How many of the highest cells were compared."""
    rank_correlation: tuple[float, ...]
    """Rank correlation of the maps: (5, 25, 50, 75, 95) % quantiles over samples."""
    top_overlap: tuple[float, ...]
    """Fraction of the highest cells that the maps share: the same quantiles."""
    differing: tuple[tuple[str, object, object], ...]
    """Fields of the provenance that differ, with both values."""
    worst: tuple[tuple[str, float, float], ...]
    """Key, rank correlation and overlap of the samples with the lowest agreement."""


def compare_stores(
    a: RelevanceMaps, b: RelevanceMaps, *, top: int = 20, worst: int = 10, progress: Progress = silent
) -> Comparison:
    """Compare the maps of two stores key by key.

    It takes about two minutes for ImageNet on one core, and the memory of two open stores, plus all maps of the second
    one if the two divide the samples into different shards.

    Args:
        a: The first store.
        b: The second store.
        top: How many of the highest cells to compare.
        worst: How many of the samples with the lowest agreement to list.
        progress: Reports the samples that have been compared.

    Raises:
        ZpipeError: The stores differ in grid or frame, or have no usable key in common.
    """
    _check_comparable(a, b)
    cells = math.prod(a.manifest.provenance.grid)
    top = min(top, cells)
    good_b = _usable(b)
    keys: list[str] = []
    ranks: list[np.ndarray] = []
    overlaps: list[np.ndarray] = []
    only_a = unusable = done = 0
    for shard in a.manifest.shards:
        table = a.index(shard.stem, ["key", "status"])
        names, statuses = table["key"].to_pylist(), table["status"].to_pylist()
        in_b = [name in b for name in names]
        usable = [
            both and status == OK and name in good_b for both, name, status in zip(in_b, names, statuses, strict=True)
        ]
        only_a += in_b.count(False)
        unusable += sum(in_b) - sum(usable)
        if len(rows := np.flatnonzero(usable)):
            chosen = [names[row] for row in rows]
            keys += chosen
            x = a.read_shard(shard.stem)[rows].reshape(len(rows), cells)
            y = _maps_of(b, shard.stem, chosen).reshape(len(rows), cells)
            for chunk in (slice(start, start + CHUNK) for start in range(0, len(rows), CHUNK)):
                ranks.append(spearman(x[chunk], y[chunk]))
                overlaps.append(top_overlap(x[chunk], y[chunk], top))
        done += shard.count
        progress("compare", done, len(a))
    if not keys:
        raise ZpipeError(f"{a.path} and {b.path} have no usable key in common; give two stores of one data set")
    rank, overlap = np.concatenate(ranks), np.concatenate(overlaps)
    lowest = np.argsort(np.where(np.isnan(rank), 2.0, rank), kind="stable")[:worst]
    return Comparison(
        common=len(keys),
        only_a=only_a,
        only_b=len(b) - (len(a) - only_a),
        unusable=unusable,
        top=top,
        rank_correlation=_quantiles(rank[~np.isnan(rank)]),
        top_overlap=_quantiles(overlap),
        differing=_differing(a, b),
        worst=tuple((keys[i], float(rank[i]), float(overlap[i])) for i in lowest),
    )


def _check_comparable(a: RelevanceMaps, b: RelevanceMaps) -> None:
    first, second = a.manifest.provenance, b.manifest.provenance
    for store in (a, b):
        if store.manifest.provenance.kind != "map":
            raise ZpipeError(f"{store.path}: holds {store.manifest.provenance.kind}; give stores of one map per image")
    for name in ("grid", "frame"):
        if getattr(first, name) != getattr(second, name):
            raise ZpipeError(
                f"{a.path} has {name} {getattr(first, name)}, {b.path} has {getattr(second, name)}: "
                "their cells are not of the same places; extract one of them again"
            )


def _differing(a: RelevanceMaps, b: RelevanceMaps) -> tuple[tuple[str, object, object], ...]:
    first, second = a.manifest.provenance.compared(), b.manifest.provenance.compared()
    return tuple(
        (name, first.get(name), second.get(name)) for name in first | second if first.get(name) != second.get(name)
    )


def spearman(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Spearman's rank correlation of each pair of rows; equal values share their mean rank.

    Args:
        x: Maps [n, cells].
        y: Other maps [n, cells].

    Returns:
        float64 [n], NaN where a map is constant.
    """
    a, b = _centred_ranks(x), _centred_ranks(y)
    with np.errstate(invalid="ignore"):
        return (a * b).sum(axis=1) / np.sqrt((a * a).sum(axis=1) * (b * b).sum(axis=1))


def top_overlap(x: np.ndarray, y: np.ndarray, top: int) -> np.ndarray:
    """Fraction of the `top` highest cells that each pair of rows has in common; of equal values the first counts.

    Args:
        x: Maps [n, cells].
        y: Other maps [n, cells].
        top: How many cells.

    Returns:
        float64 [n], 0 to 1.
    """
    hits = [np.zeros(x.shape, bool), np.zeros(x.shape, bool)]
    for values, hit in zip((x, y), hits, strict=True):
        np.put_along_axis(hit, np.argsort(-values, axis=1, kind="stable")[:, :top], True, axis=1)
    return (hits[0] & hits[1]).sum(axis=1) / top


def _centred_ranks(x: np.ndarray) -> np.ndarray:
    below = (x[:, :, None] > x[:, None, :]).sum(axis=2, dtype=np.int32)
    above = (x[:, :, None] < x[:, None, :]).sum(axis=2, dtype=np.int32)
    return (below - above) / 2.0  # [n, cells]


def _usable(maps: RelevanceMaps) -> set[str]:
    table = maps.table(["key", "status"])
    return {
        key for key, status in zip(table["key"].to_pylist(), table["status"].to_pylist(), strict=True) if status == OK
    }


def _maps_of(maps: RelevanceMaps, stem: str, keys: list[str]) -> np.ndarray:
    """Maps of these keys. If one shard of that stem holds them all, it is not kept in memory."""
    places = [maps.place(key) for key in keys]
    if all(place[0] == stem for place in places):
        return maps.read_shard(stem)[[row for _, row in places]]
    return maps[keys]


def _quantiles(values: np.ndarray) -> tuple[float, ...]:
    return tuple(float(value) for value in np.quantile(values, QUANTILES)) if len(values) else (float("nan"),) * 5
