"""Verification of a store: every byte of it is read, and its keys are compared with the tars where these are given."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa

from zpipe.pipeline.shard_reader import open_shards
from zpipe.schemas.errors import ZpipeError
from zpipe.schemas.manifest import MANIFEST, MANIFEST_NAME, MapShard, Provenance, StoreManifest, read_manifest
from zpipe.schemas.progress import Progress, silent
from zpipe.schemas.relevance_store import (
    OK,
    UNDECODABLE,
    ZERO,
    IndexFile,
    concentration,
    digest_maps,
    index_path,
    maps_path,
    read_stored,
)
from zpipe.schemas.shard_index import digest_keys, rows_with_repeated_hashes
from zpipe.schemas.storage import as_path, map_files, names_in
from zpipe.schemas.tensor_kinds import KINDS

# Maps are stored in float16, and measured before that.
ENTROPY_SLACK = 0.01  # nats
MASS_SLACK = 0.002
MEASURABLE = 2.0**-10  # of the largest magnitude
FRAME_SLACK = 0.01  # pixels


def verify_store(root: Path, shards: Path | None = None, *, progress: Progress = silent) -> list[str]:
    """Check a finished store.

    The store must hold every shard of the manifest and no other. Digests of index files and maps, counts and grid are
    checked, that no key is repeated, and that the index says of each map what the map is: status, scale, entropy, and
    mass are computed again, classes and probabilities must be possible ones of the teacher.

    Args:
        root: Folder or URL of the store.
        shards: Folder or URL of the tars; if given, their digests and keys must agree with the store.
        progress: Reports the shards that have been checked.

    Returns:
        One line per problem; empty if the store is whole.

    Raises:
        ZpipeError: The store has no manifest, or it cannot be read.
    """
    root = as_path(root)
    manifest = read_manifest(root)
    problems: list[str] = []
    listed = {shard.stem for shard in manifest.shards}
    names = {folder: set(names_in(root / folder)) for folder in ("index", "maps")}
    for folder, suffix in (("index", ".parquet"), ("maps", ".zarr")):
        problems += [
            f"{root / folder / name}: not listed in the manifest; remove it"
            for name in sorted(names[folder])
            if name.removesuffix(suffix) not in listed
        ]
    statuses: Counter[str] = Counter()
    hashes: list[np.ndarray] = []  # of the keys of each shard: 8 bytes each, the keys themselves take more than 100
    key_digests: dict[str, str] = {}

    def check(shard: MapShard) -> tuple[list[str], Counter[str], list[str]]:
        shard_problems: list[str] = []
        try:
            table = _check_shard(root, manifest, shard, names, shard_problems)
        except ZpipeError as error:
            return [], Counter(), [*shard_problems, str(error)]
        return table["key"].to_pylist(), Counter(table["status"].to_pylist()), shard_problems

    for number, (shard, (keys, counts, shard_problems)) in enumerate(
        zip(manifest.shards, map_files(root, check, manifest.shards), strict=True)
    ):
        problems += shard_problems
        statuses += counts
        key_digests[shard.stem] = digest_keys(keys)
        hashes.append(np.fromiter(map(hash, keys), np.int64, len(keys)))
        progress("verify", number + 1, len(manifest.shards), problems=len(problems))
    if not problems and statuses != Counter(manifest.statuses):  # else some shards were not counted
        problems.append(
            f"{root / MANIFEST_NAME}: says {_counts(manifest.statuses)}, the indexes {_counts(statuses)}; "
            f"{MANIFEST.remedy}"
        )
    problems += _repeated_keys(root, [shard.stem for shard in manifest.shards], hashes)
    if shards is not None:
        problems += _check_against(manifest, key_digests, shards, progress)
    return problems


def _check_shard(
    root: Path, manifest: StoreManifest, shard: MapShard, names: dict[str, set[str]], problems: list[str]
) -> pa.Table:
    """Check one shard and return its rows. Problems of single samples are appended, those of the whole shard raised."""
    path = index_path(root, shard.stem)
    again = f"delete {path} and extract again"
    if path.name not in names["index"]:
        raise ZpipeError(f"{path}: missing; extract again")
    if maps_path(root, shard.stem).name not in names["maps"]:
        raise ZpipeError(f"{maps_path(root, shard.stem)}: missing; {again}")
    index = IndexFile(path)
    if index.sha256 != shard.index_sha256:
        raise ZpipeError(f"{path}: its digest is not the manifest's: altered; delete it and extract again")
    seal = index.seal
    if seal.fingerprint != manifest.provenance.fingerprint() or seal.input_sha256 != shard.input_sha256:
        problems.append(f"{path}: made by another teacher or from another tar; delete it and extract again")
    stored = read_stored(root, shard.stem)
    table = index.table()
    expected = (shard.count, *manifest.provenance.sample_shape)
    if stored.shape != expected or len(table) != shard.count:
        raise ZpipeError(
            f"{maps_path(root, shard.stem)}: shape {stored.shape}, {len(table)} rows, expected {expected}; {again}"
        )
    if stored.dtype != KINDS[manifest.provenance.kind].dtype:
        raise ZpipeError(f"{maps_path(root, shard.stem)}: its values are {stored.dtype}; {again}")
    if digest_maps(stored) != seal.maps_sha256:
        problems.append(f"{maps_path(root, shard.stem)}: its bytes are not those that were written; {again}")
        return table
    for said, rows in _contradictions(table, stored, manifest.provenance).items():
        if len(rows):
            key, more = table["key"][int(rows[0])], f", and {len(rows) - 1} others" if len(rows) > 1 else ""
            problems.append(f"{path}: key {key}{more}: {said.format(**_values(table, rows[0]))}; {again}")
    return table


def _contradictions(table: pa.Table, stored: np.ndarray, origin: Provenance) -> dict[str, np.ndarray]:
    """Rows of an index that its maps, or the rules of the format, contradict, by what to say of them.

    Args:
        table: All columns of the index.
        stored: Its maps as they are stored, float16 [n, gh, gw], or other tensors [n, ...].
        origin: The provenance of the store.
    """
    values = {name: table[name].to_numpy(zero_copy_only=False) for name in table.column_names}
    status, scale = values["status"], values["scale"]
    kind, axes = KINDS[origin.kind], tuple(range(1, stored.ndim))
    peak = np.abs(stored).max(axis=axes).astype(np.float32)  # [n], NaN where a map has one
    finite, usable, seen = np.isfinite(peak) & np.isfinite(scale), status == OK, status != UNDECODABLE
    whole = (peak == 1) & (scale > 0)
    if not kind.is_relevance or not origin.teacher:  # logits and masks may be zeros; whole numbers stay as they are
        whole |= (scale == 1) if kind.dtype.kind == "i" else (peak == 0) & (scale == 0)
    fits = np.where(usable, finite & whole, ~finite | (kind.dtype.kind == "i"))
    fits = np.where(status == ZERO, finite & (peak == 0) & (scale == 0), fits)
    probable = values["predicted_probability"], values["target_probability"]
    classes = np.stack([values["predicted"], values["target"]])  # [2, n]
    known = (classes >= 0) & (classes < origin.num_classes)
    sizes = np.stack([values["width"], values["height"]])
    left, top, right, bottom = (values[f"frame_{edge}"] for edge in ("x1", "y1", "x2", "y2"))
    inside = (left >= 0) & (top >= 0) & (left < right) & (top < bottom)
    inside &= (right <= sizes[0] + FRAME_SLACK) & (bottom <= sizes[1] + FRAME_SLACK)
    first = stored[:, 0] if kind.axes == "khw" else stored
    entropy, mass = concentration(first.astype(np.float32), KINDS["map"] if kind.is_relevance else kind)
    # Where nearly all of a map is negative, float16 has lost the rest, which these two measure.
    measured = usable & (first.max(axis=tuple(range(1, first.ndim))) > MEASURABLE)
    is_answered = usable & bool(origin.teacher)  # a store of other tensors knows no classes
    wrong = {
        "status {status} does not fit its map, of scale {scale:g}": ~fits,
        "predicted class {predicted} is none of the teacher's": ~known[0] & ((classes[0] != -1) | is_answered),
        "target class {target} is none of the teacher's": ~known[1] & (classes[1] != -1),
        "its targets {targets} are not classes of its maps": _odd_targets(table, origin),
        "predicted probability {predicted_probability:g} is impossible": _impossible(probable[0], known[0]),
        "target probability {target_probability:g} is impossible": _impossible(probable[1], known[0] & known[1]),
        "target probability {target_probability:g} is above the predicted class's": probable[1] > probable[0] + 1e-6,
        "entropy {entropy:g} is not that of its map": measured & ~_near(values["entropy"], entropy, ENTROPY_SLACK),
        "top10_mass {top10_mass:g} is not that of its map": measured & ~_near(values["top10_mass"], mass, MASS_SLACK),
        "stability {stability:g} is impossible": _odd_stability(values, usable),
        "its size of {width} x {height} pixels is impossible": (sizes <= 0).any(axis=0) & seen,
        "its frame does not lie in the image": seen & (sizes > 0).all(axis=0) & ~inside,
    }
    return {said: np.flatnonzero(rows) for said, rows in wrong.items()}


def _odd_targets(table: pa.Table, origin: Provenance) -> np.ndarray:
    """Where the classes of class maps are not the teacher's, not one for each map, or do not begin with `target`."""
    if origin.kind != "class-maps":
        return np.zeros(len(table), bool)
    if "targets" not in table.column_names:
        return np.ones(len(table), bool)
    count, lists = origin.sample_shape[0], table["targets"].to_pylist()
    pairs = zip(lists, table["target"].to_pylist(), strict=True)
    fits = [
        len(classes) == count and classes[0] == first and all(-1 <= one < origin.num_classes for one in classes)
        for classes, first in pairs
    ]
    return ~np.array(fits, bool)


def _impossible(probability: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Where a probability is not in [0, 1], or not NaN where no class is known."""
    possible = (probability >= 0) & (probability <= 1 + 1e-6)
    return np.where(known, ~possible, ~np.isnan(probability))


def _odd_stability(values: Mapping[str, np.ndarray], usable: np.ndarray) -> np.ndarray:
    """Where a stability is outside -1 to 1, or not NaN though there is no usable map."""
    if "stability" not in values:
        return np.zeros(len(usable), bool)
    stability = values["stability"]
    return ~np.isnan(stability) & ~(usable & (np.abs(stability) <= 1))


def _near(said: np.ndarray, found: np.ndarray, slack: float) -> np.ndarray:
    return np.isclose(said, found, rtol=0, atol=slack, equal_nan=True)


def _values(table: pa.Table, row: int) -> dict[str, object]:
    return {name: table[name][int(row)].as_py() for name in table.column_names}


def _counts(statuses: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {status}" for status, count in sorted(statuses.items())) or "none"


def _repeated_keys(root: Path, stems: list[str], hashes: list[np.ndarray]) -> list[str]:
    """Find keys that occur more than once. Only shards with repeated hashes are read again."""
    problems = []
    owner: dict[str, str] = {}
    for number, rows in rows_with_repeated_hashes(hashes):
        stem = stems[number]
        for key in IndexFile(index_path(root, stem)).table(["key"])["key"].take(rows).to_pylist():
            if key in owner:
                problems.append(f"{index_path(root, stem)}: key {key} is in {owner[key]} too; extract again")
            owner[key] = stem
    return problems


def _check_against(manifest: StoreManifest, key_digests: dict[str, str], shards: Path, progress: Progress) -> list[str]:
    problems = []
    entries = {entry.stem: (path, entry) for path, entry in open_shards(shards, progress=progress)[0]}
    for shard in manifest.shards:
        if shard.stem not in entries:
            problems.append(f"{shards}: no tar for map shard {shard.stem}; restore it or extract again")
            continue
        path, entry = entries[shard.stem]
        if entry.sha256 != shard.input_sha256:
            problems.append(
                f"{path}: SHA-256 {entry.sha256[:12]}, its maps were made from {shard.input_sha256[:12]}; extract again"
            )
        if entry.keys_sha256 != key_digests[shard.stem]:
            problems.append(f"{path}: its keys are not those of map shard {shard.stem}; extract again")
    missing = sorted(set(entries) - {shard.stem for shard in manifest.shards})
    return problems + [f"{entries[stem][0]}: has no map shard; extract again" for stem in missing]
