"""Verification of a store: every byte of it is read, and its keys are compared with the tars where these are given."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from zpipe.pipeline.shard_reader import open_shards
from zpipe.schemas.errors import ZpipeError
from zpipe.schemas.manifest import MapShard, StoreManifest, read_manifest
from zpipe.schemas.progress import Progress, silent
from zpipe.schemas.relevance_store import (
    NONFINITE,
    STATUSES,
    UNDECODABLE,
    IndexFile,
    digest_maps,
    index_path,
    maps_path,
    read_stored,
)
from zpipe.schemas.shard_index import digest_keys, rows_with_repeated_hashes
from zpipe.schemas.storage import as_path, map_files, names_in


def verify_store(root: Path, shards: Path | None = None, *, progress: Progress = silent) -> list[str]:
    """Check a finished store.

    The store must hold every shard of the manifest and no other. Digests of index files and maps, counts and grid are
    checked, that statuses agree with the maps, and that no key is repeated.

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
    hashes: list[np.ndarray] = []  # of the keys of each shard: 8 bytes each, the keys themselves take more than 100
    key_digests: dict[str, str] = {}

    def check(shard: MapShard) -> tuple[list[str], list[str]]:
        shard_problems: list[str] = []
        try:
            return _check_shard(root, manifest, shard, names, shard_problems), shard_problems
        except ZpipeError as error:
            return [], [*shard_problems, str(error)]

    for number, (shard, (keys, shard_problems)) in enumerate(
        zip(manifest.shards, map_files(root, check, manifest.shards), strict=True)
    ):
        problems += shard_problems
        key_digests[shard.stem] = digest_keys(keys)
        hashes.append(np.fromiter(map(hash, keys), np.int64, len(keys)))
        progress("verify", number + 1, len(manifest.shards), problems=len(problems))
    problems += _repeated_keys(root, [shard.stem for shard in manifest.shards], hashes)
    if shards is not None:
        problems += _check_against(manifest, key_digests, shards, progress)
    return problems


def _check_shard(
    root: Path, manifest: StoreManifest, shard: MapShard, names: dict[str, set[str]], problems: list[str]
) -> list[str]:
    """Check one shard and return its keys. Problems of single samples are appended, those of the whole shard raised."""
    path = index_path(root, shard.stem)
    if path.name not in names["index"]:
        raise ZpipeError(f"{path}: missing; extract again")
    if maps_path(root, shard.stem).name not in names["maps"]:
        raise ZpipeError(f"{maps_path(root, shard.stem)}: missing; delete {path} and extract again")
    index = IndexFile(path)
    if index.sha256 != shard.index_sha256:
        raise ZpipeError(f"{path}: its digest is not the manifest's: altered; delete it and extract again")
    seal = index.seal
    if seal.fingerprint != manifest.provenance.fingerprint() or seal.input_sha256 != shard.input_sha256:
        problems.append(f"{path}: made by another teacher or from another tar; delete it and extract again")
    stored = read_stored(root, shard.stem)
    table = index.table()
    expected = (shard.count, *manifest.provenance.grid)
    if stored.shape != expected or len(table) != shard.count:
        raise ZpipeError(
            f"{maps_path(root, shard.stem)}: shape {stored.shape}, {len(table)} rows, expected {expected}; "
            "extract again"
        )
    if digest_maps(stored) != seal.maps_sha256:
        problems.append(
            f"{maps_path(root, shard.stem)}: its bytes are not those that were written; delete {path} and extract again"
        )
    statuses = table["status"].to_numpy(zero_copy_only=False)
    finite = np.isfinite(stored).all(axis=(1, 2))  # [n]
    wrong = finite == np.isin(statuses, [UNDECODABLE, NONFINITE])
    wrong |= ~np.isin(statuses, STATUSES)
    keys = table["key"].to_pylist()
    problems += [
        f"{path}: key {keys[row]}: status {statuses[row]} does not fit its map; extract again"
        for row in np.flatnonzero(wrong)
    ]
    return keys


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
