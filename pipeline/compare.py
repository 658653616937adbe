"""Two stores of one data set, other methods or teachers: how far do their maps agree?"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from zpipe.schemas.errors import ZpipeError
from zpipe.schemas.progress import Progress, silent
from zpipe.schemas.relevance_maps import RelevanceMaps
from zpipe.schemas.relevance_store import OK

PIECE = 256  # maps at once: the pairs of 196 cells of one piece take 20 MB
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """How two stores agree on the samples that both have usable maps of.

    common: how many; only_a, only_b: keys of one store alone; unusable: common keys without a usable map in either.
    rank_correlation, top_overlap: (5, 25, 50, 75, 95) % quantiles over samples. differing: fields of provenance that differ,
    with both values. worst: (key, rank correlation, overlap) of the samples that agree least.
    """

    common: int
    only_a: int
    only_b: int
    unusable: int
    top: int
    rank_correlation: tuple[float, ...]
    top_overlap: tuple[float, ...]
    differing: tuple[tuple[str, object, object], ...]
    worst: tuple[tuple[str, float, float], ...]


def compare_stores(
    a: RelevanceMaps, b: RelevanceMaps, *, top: int = 20, worst: int = 10, progress: Progress = silent
) -> Comparison:
    """Compare maps key by key. About two minutes for ImageNet on a core; memory as for two open stores, plus B's maps where its
    shards are cut differently from A's.

    top: how many of the highest cells are held against each other. Errors: :class:`ZpipeError` when grids or frames differ.
    """
    first, second = a.manifest.provenance, b.manifest.provenance
    for name in ("grid", "frame"):
        if getattr(first, name) != getattr(second, name):
            raise ZpipeError(
                f"{a.path} has {name} {getattr(first, name)}, {b.path} has {getattr(second, name)}: "
                "their cells are not of the same places; extract one of them again"
            )
    cells = first.grid[0] * first.grid[1]
    top = min(top, cells)
    good_b = _usable(b)
    keys: list[str] = []
    ranks: list[np.ndarray] = []
    overlaps: list[np.ndarray] = []
    only_a = unusable = done = 0
    for shard in a.manifest.shards:
        table = a.index(shard.stem, ["key", "status"])
        names, statuses = table["key"].to_pylist(), table["status"].to_pylist()
        there = [name in b for name in names]
        usable = [
            ok and status == OK and name in good_b for ok, name, status in zip(there, names, statuses, strict=True)
        ]
        only_a += there.count(False)
        unusable += sum(there) - sum(usable)
        rows = np.flatnonzero(usable)
        if len(rows):
            chosen = [names[row] for row in rows]
            keys += chosen
            x = a.read_shard(shard.stem)[rows].reshape(len(rows), cells)
            y = _maps_of(b, shard.stem, chosen).reshape(len(rows), cells)
            for start in range(0, len(rows), PIECE):
                piece = slice(start, start + PIECE)
                ranks.append(spearman(x[piece], y[piece]))
                overlaps.append(top_overlap(x[piece], y[piece], top))
        done += shard.count
        progress("compare", done, len(a))
    if not keys:
        raise ZpipeError(f"{a.path} and {b.path} have no usable key in common; give two stores of one data set")
    rank, overlap = np.concatenate(ranks), np.concatenate(overlaps)
    order = np.argsort(np.where(np.isnan(rank), 2.0, rank), kind="stable")[:worst]
    old, new = first.compared(), second.compared()
    return Comparison(
        common=len(keys),
        only_a=only_a,
        only_b=len(b) - (len(a) - only_a),
        unusable=unusable,
        top=top,
        rank_correlation=_quantiles(rank[~np.isnan(rank)]),
        top_overlap=_quantiles(overlap),
        differing=tuple((name, old[name], new[name]) for name in old if old[name] != new[name]),
        worst=tuple((keys[i], float(rank[i]), float(overlap[i])) for i in order),
    )


def spearman(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Rank correlation of each row, equal values sharing their mean rank. [n, cells] twice -> float64 [n]; NaN where a map
    is constant."""
    a, b = _centred_ranks(x), _centred_ranks(y)
    with np.errstate(invalid="ignore"):
        return (a * b).sum(axis=1) / np.sqrt((a * a).sum(axis=1) * (b * b).sum(axis=1))


def top_overlap(x: np.ndarray, y: np.ndarray, top: int) -> np.ndarray:
    """Share of the `top` highest cells that two rows have in common; of equal values the first counts. -> float64 [n]"""
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
    """Maps of these keys; where one shard of that name holds them all, without keeping it in memory."""
    places = [maps.place(key) for key in keys]
    if all(place[0] == stem for place in places):
        return maps.read_shard(stem)[[row for _, row in places]]
    return maps[keys]


def _quantiles(values: np.ndarray) -> tuple[float, ...]:
    return tuple(float(value) for value in np.quantile(values, QUANTILES)) if len(values) else (float("nan"),) * 5
