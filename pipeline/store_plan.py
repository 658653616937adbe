"""What an extraction has to do in its store before and after the work: plan, retract, audit. No torch, no ray.

The store decides what is done, not the reports of workers: a shard is finished when its index lies in the store with
the digest of its tar and the fingerprint of this run.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TypeVar

import numpy as np
import pyarrow as pa

from zpipe.schemas.atomic import clear_temporaries, read_json, write_json
from zpipe.schemas.errors import ZpipeError
from zpipe.schemas.formats import check_format, header
from zpipe.schemas.manifest import (
    EXTRACTION_NAME,
    FORMAT,
    MANIFEST_NAME,
    STORE_VERSION,
    MapShard,
    Provenance,
    StoreManifest,
    check_compatible,
    read_extraction,
    read_manifest,
    write_extraction,
    write_manifest,
)
from zpipe.schemas.progress import Progress
from zpipe.schemas.relevance_store import OK, IndexFile, count_correct_labels, index_path, maps_path, max_rows
from zpipe.schemas.shard_index import ShardEntry
from zpipe.schemas.storage import map_files, names_in, remove

T = TypeVar("T")

REPLACING_NAME = "replacing.json"  # exists while a replacement is in progress
PROGRESS_EVERY = 1000  # shards: seconds in a local store, a minute in a remote one


@dataclass(frozen=True, kw_only=True)
class WantedStore:
    """The store that a run shall make: where, from which tars, under which provenance."""

    root: Path
    """Folder or URL of the store."""
    source: Path
    """Folder or URL of the tars, as the user gave it."""
    tars: Sequence[tuple[Path, ShardEntry]]
    """The tars and their index entries, in order: one map shard each."""
    provenance: Provenance
    """What every shard must have been made with."""

    @property
    def entries(self) -> list[ShardEntry]:
        """The index entries of the tars."""
        return [entry for _, entry in self.tars]

    @property
    def count(self) -> int:
        """Number of samples."""
        return sum(entry.count for entry in self.entries)

    def check_sizes(self) -> None:
        """Raise :class:`ZpipeError` naming the first tar whose maps would make a shard that is too large to be read."""
        gh, gw = self.provenance.grid
        most = max_rows((gh, gw))
        for path, entry in self.tars:
            if entry.count > most:
                raise ZpipeError(
                    f"{path}: {entry.count} samples, a map shard holds {most} maps of {gh} x {gw}; make smaller tars "
                    f"(zpipe make-shards --shard-size {most} at most)"
                )


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a run has to do, and what it leaves as it is."""

    todo: list[tuple[Path, ShardEntry]]
    """Tars whose map shards are to be made."""
    kept: dict[str, str]
    """Of the finished shards: stem -> SHA-256 of the index."""

    @property
    def count(self) -> int:
        """Number of samples whose maps are to be made."""
        return sum(entry.count for _, entry in self.todo)


@dataclass(frozen=True, kw_only=True)
class Audit:
    """What lies in a store in which every shard is finished."""

    manifest: StoreManifest
    """The manifest that describes it."""
    is_written: bool
    """Whether that manifest is in the store already."""
    top1: float | None
    """Fraction of the usable, labelled images whose label is the teacher's best class; None where there are none."""
    unusable: list[tuple[str, str, str]]
    """Stem, key and status of each sample without a usable map."""


def prepare(store: WantedStore, *, replace: bool, progress: Progress) -> Plan:
    """Bring the store into a state in which the shards still to be made can be written, and list them.

    Args:
        store: The store to make. This run holds its lease.
        replace: Remove what the store holds. A replacement that was interrupted is resumed instead.
        progress: Reports the search for finished shards.

    Raises:
        ZpipeError: The store was made by another teacher or from other tars, or a file in it was altered.
    """
    if replace:
        _start_over(store)
    earlier = read_extraction(store.root)
    if earlier is None:
        write_extraction(store.root, store.provenance)
    else:
        check_compatible(earlier, store.provenance, store.root)
    clear_unfinished(store.root)
    plan = _plan(store, progress)
    _retract_manifest(store.root, plan)
    return plan


def clear_unfinished(root: Path) -> None:
    """Remove what killed workers left."""
    for folder in ("maps", "index"):
        clear_temporaries(root / folder)


def _start_over(store: WantedStore) -> None:
    """Remove what the store holds, unless this same replacement did so before and was interrupted: then it is resumed.

    A mark says what is being replaced by what. It is written after the removal and deleted after the manifest is
    written, so that neither an interrupted removal nor a finished store is resumed.
    """
    replacement = hashlib.sha256(store.provenance.fingerprint().encode())
    for entry in store.entries:
        replacement.update(f"\n{entry.stem} {entry.sha256}".encode())
    mark = store.root / REPLACING_NAME
    if mark.is_file() and not (store.root / MANIFEST_NAME).is_file():
        value = read_json(mark, "the mark of an interrupted --replace")
        check_format(mark, value, FORMAT, STORE_VERSION, remedy="delete it")
        if value.get("replacement") == replacement.hexdigest():
            return
    # The manifest goes before what it lists, and the file that marks a store last: in between, the store is unfinished.
    for name in (REPLACING_NAME, MANIFEST_NAME, "index", "maps", EXTRACTION_NAME):
        remove(store.root / name)
    write_extraction(store.root, store.provenance)
    write_json(mark, header(FORMAT, STORE_VERSION) | {"replacement": replacement.hexdigest()})


def _plan(store: WantedStore, progress: Progress) -> Plan:
    """Find the finished shards.

    While a replacement is in progress, remove what a worker of the replaced run left since.
    """
    root, stems = store.root, {entry.stem for entry in store.entries}
    if len(stems) != len(store.tars):
        raise ZpipeError(f"{store.tars[0][0].parent}: two tars share a name; rename one")
    indexed = {name.removesuffix(".parquet") for name in names_in(root / "index")}
    mapped = {name.removesuffix(".zarr") for name in names_in(root / "maps")}
    replacing = (root / REPLACING_NAME).is_file()
    foreign = sorted(indexed - stems)
    if foreign and not replacing:
        raise ZpipeError(
            f"{index_path(root, foreign[0])}: its input tar is not among these shards; "
            "give another --out folder, or --replace"
        )
    for stem in foreign:
        _remove_shard(root, stem)
    finished = [(path, entry) for path, entry in store.tars if entry.stem in indexed & mapped]
    fingerprint = store.provenance.fingerprint()
    kept: dict[str, str] = {}
    listed = _listed_digests(_earlier_manifest(root))
    files = map_files(root, lambda item: IndexFile(index_path(root, item[1].stem)), finished)
    for (path, entry), file in zip(_reported(finished, "find-finished-shards", progress), files, strict=True):
        if replacing and (file.seal.input_sha256, file.seal.fingerprint) != (entry.sha256, fingerprint):
            _remove_shard(root, entry.stem)
            continue
        _check_index(file, entry, fingerprint, listed.get(entry.stem), path)
        kept[entry.stem] = file.sha256
    return Plan(todo=[(path, entry) for path, entry in store.tars if entry.stem not in kept], kept=kept)


def _remove_shard(root: Path, stem: str) -> None:
    remove(index_path(root, stem))  # first: maps without an index do not count
    remove(maps_path(root, stem))


def _retract_manifest(root: Path, plan: Plan) -> None:
    """Delete the manifest if any shard that it lists will be made again: its bytes may differ in the last bits.

    A manifest whose shards are all kept stays, so that a store which only grows can be read meanwhile.
    """
    listed = _listed_digests(_earlier_manifest(root))
    if any(entry.stem in listed for _, entry in plan.todo):
        remove(root / MANIFEST_NAME)


def _earlier_manifest(root: Path) -> StoreManifest | None:
    return read_manifest(root) if (root / MANIFEST_NAME).is_file() else None


def _listed_digests(manifest: StoreManifest | None) -> dict[str, str]:
    """Stem -> SHA-256 of the index, as the manifest says."""
    return {shard.stem: shard.index_sha256 for shard in manifest.shards} if manifest else {}


def _check_index(file: IndexFile, entry: ShardEntry, fingerprint: str, known: str | None, tar: Path | str) -> None:
    """Check that an index is of this tar and this provenance, and is unchanged.

    A manifest that is written anew would vouch for whatever lies in the store by then.

    Args:
        file: The index.
        entry: Index entry of the tar.
        fingerprint: Fingerprint of the provenance.
        known: SHA-256 of the index in the manifest, or when it was read before; None where it is new.
        tar: What messages call the tar.

    Raises:
        ZpipeError: It is of another tar or provenance, or was altered.
    """
    seal = file.seal
    if seal.input_sha256 != entry.sha256:
        raise ZpipeError(
            f"{file.path}: made from a tar with SHA-256 {seal.input_sha256[:12]}, {tar} now has {entry.sha256[:12]}; "
            "give another --out folder, or --replace to start over"
        )
    if seal.fingerprint != fingerprint:
        raise ZpipeError(
            f"{file.path}: made under fingerprint {seal.fingerprint[:12]}, this run has {fingerprint[:12]}; "
            "give another --out folder, or --replace to start over"
        )
    if known is not None and file.sha256 != known:
        raise ZpipeError(f"{file.path}: its digest is not what it was: altered; delete it and run again")


def _reported(items: Sequence[T], stage: str, progress: Progress) -> Iterator[T]:
    """Yield the items and report progress every `PROGRESS_EVERY` of them."""
    for number, item in enumerate(items, start=1):
        yield item
        if number % PROGRESS_EVERY == 0:
            progress(stage, number, len(items))


def audit(store: WantedStore, plan: Plan, progress: Progress) -> Audit:
    """Read the index of every shard and describe the store by what lies in it, not by what workers reported.

    Args:
        store: The store to make.
        plan: The plan of this run; the indexes of kept shards must not have changed since.
        progress: Reports the shards as they are read.

    Raises:
        ZpipeError: A file is missing or is not what it should be.
    """
    root, fingerprint = store.root, store.provenance.fingerprint()
    statuses: Counter[str] = Counter()
    shards: list[MapShard] = []
    unusable: list[tuple[str, str, str]] = []
    correct = labelled = 0
    mapped = set(names_in(root / "maps"))
    files = map_files(root, lambda entry: IndexFile(index_path(root, entry.stem)), store.entries)
    for entry, file in zip(_reported(store.entries, "audit", progress), files, strict=True):
        _check_index(file, entry, fingerprint, plan.kept.get(entry.stem), entry.name)
        if maps_path(root, entry.stem).name not in mapped:
            raise ZpipeError(f"{maps_path(root, entry.stem)}: missing; run again to make it")
        table = file.table(["label", "target", "predicted", "status"])
        if len(table) != entry.count:
            raise ZpipeError(f"{file.path}: {len(table)} rows for {entry.count} samples; delete it and run again")
        shard_correct, shard_labelled = count_correct_labels(table, store.provenance.target)
        correct, labelled = correct + shard_correct, labelled + shard_labelled
        statuses.update(table["status"].to_pylist())
        unusable += _unusable_samples(entry.stem, file, table)
        shards.append(MapShard(stem=entry.stem, count=entry.count, input_sha256=entry.sha256, index_sha256=file.sha256))
    manifest = StoreManifest(
        provenance=store.provenance,
        shards=tuple(shards),
        statuses=dict(sorted(statuses.items())),
        source=str(store.source),
        zpipe_version=version("zpipe"),
    )
    is_written = False
    earlier = _earlier_manifest(root)
    if earlier and earlier.shards == manifest.shards and earlier.provenance.fingerprint() == fingerprint:
        manifest, is_written = earlier, True
    top1 = correct / labelled if labelled else None
    return Audit(manifest=manifest, is_written=is_written, top1=top1, unusable=unusable)


def _unusable_samples(stem: str, file: IndexFile, table: pa.Table) -> list[tuple[str, str, str]]:
    """Stem, key and status of the samples of a shard without a usable map; keys are read only where there are any."""
    status = table["status"].to_numpy(zero_copy_only=False)
    rows = np.flatnonzero(status != OK)
    if not len(rows):
        return []
    keys = file.table(["key"])["key"].take(rows).to_pylist()
    return [(stem, key, kind) for key, kind in zip(keys, status[rows].tolist(), strict=True)]


def commit_manifest(store: WantedStore, audit: Audit) -> None:
    """Write the manifest, the commit point of the store, unless it is there; a replacement ends here."""
    if not audit.is_written:
        write_manifest(store.root, audit.manifest)
    remove(store.root / REPLACING_NAME)
