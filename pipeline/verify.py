"""Is this store whole and true? Reads every byte of it; with the shards at hand, holds its keys against theirs."""

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
    """Check a finished store; return one line per problem, none when it is whole.

    Checked: every shard of the manifest is there, no other is; digests of index files and maps; counts and grid; statuses
    and finiteness agree; no key twice. With `shards`: input digests and key sets agree with the tars' index.
    """
    root = as_path(root)
    manifest = read_manifest(root)
    problems: list[str] = []
    listed = {shard.stem for shard in manifest.shards}
    there = {folder: set(names_in(root / folder)) for folder in ("index", "maps")}
    for folder, suffix in (("index", ".parquet"), ("maps", ".zarr")):
        problems += [
            f"{root / folder / name}: not listed in the manifest; remove it"
            for name in sorted(there[folder])
            if name.removesuffix(suffix) not in listed
        ]
    hashes: list[np.ndarray] = []  # of keys: 8 bytes each, where the keys themselves would take more than 100
    key_digests: dict[str, str] = {}

    def check(shard: MapShard) -> tuple[list[str], list[str]]:
        found: list[str] = []
        try:
            return _check_shard(root, manifest, shard, there, found), found
        except ZpipeError as error:
            return [], [*found, str(error)]

    for number, (shard, (keys, found)) in enumerate(
        zip(manifest.shards, map_files(root, check, manifest.shards), strict=True)
    ):
        problems += found
        key_digests[shard.stem] = digest_keys(keys)
        hashes.append(np.fromiter(map(hash, keys), np.int64, len(keys)))
        progress("verify", number + 1, len(manifest.shards), problems=len(problems))
    problems += _doubled_keys(root, [shard.stem for shard in manifest.shards], hashes)
    if shards is not None:
        problems += _check_against(manifest, key_digests, shards, progress)
    return problems


def _check_shard(
    root: Path, manifest: StoreManifest, shard: MapShard, there: dict[str, set[str]], problems: list[str]
) -> list[str]:
    """The shard's keys; what is wrong with single samples goes to `problems`, what spoils the whole shard is raised."""
    path = index_path(root, shard.stem)
    if path.name not in there["index"]:
        raise ZpipeError(f"{path}: missing; extract again")
    if maps_path(root, shard.stem).name not in there["maps"]:
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
            f"{maps_path(root, shard.stem)}: shape {stored.shape}, {len(table)} rows, expected {expected}; extract again"
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


def _doubled_keys(root: Path, stems: list[str], hashes: list[np.ndarray]) -> list[str]:
    """Keys that are there twice. Only shards where a hash is met again are read again, to compare the keys themselves."""
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
