"""What an extraction has to do in its store before and after the work: plan, retract, audit. No torch, no ray.

The store decides what is done, not the reports of workers: a shard is finished when its index lies in the store with
the digest of its tar and the fingerprint of this run.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TypeVar

import numpy as np
import pyarrow as pa

from zpipe.schemas.atomic import claim_folder, clear_temporaries, refuse_links, write_json
from zpipe.schemas.errors import DamageError, ZpipeError
from zpipe.schemas.formats import Digest, Format
from zpipe.schemas.lease import LEASE_NAME
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
from zpipe.schemas.relevance_store import (
    OK,
    IndexFile,
    count_correct_labels,
    digest_maps,
    index_path,
    maps_path,
    max_rows,
    read_stored,
)
from zpipe.schemas.shard_index import ShardEntry
from zpipe.schemas.storage import check_reachable, map_files, names_in, remove
from zpipe.schemas.tensor_kinds import KINDS

T = TypeVar("T")

REPLACING_NAME = "replacing.json"  # exists while a replacement is in progress
PROGRESS_EVERY = 1000  # shards: seconds in a local store, a minute in a remote one


@dataclass(frozen=True, kw_only=True)
class _Replacing:
    """The mark of a replacement that is in progress."""

    replacement: Digest
    """Digest of what replaces the store: provenance and tars."""


REPLACING = Format(
    name=FORMAT,
    version=STORE_VERSION,
    content=_Replacing,
    what="the mark of an interrupted --replace",
    remedy="delete it",
    max_bytes=64 << 10,
)


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
    classes: tuple[str, ...] = ()
    """Names of the teacher's classes, where they are known."""
    label_field: str | None = None
    """Where the labels of the tars are, if their index says it; see `zpipe.schemas.sample.group_samples`."""
    stability: bool | None = None
    """Whether its indexes shall have the column `stability`; None if either is right."""

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
        shape, dtype = self.provenance.sample_shape, KINDS[self.provenance.kind].dtype
        most = max_rows(shape, dtype)
        for path, entry in self.tars:
            if entry.count > most:
                raise ZpipeError(
                    f"{path}: {entry.count} samples, a map shard holds {most} maps of {' x '.join(map(str, shape))}; "
                    f"make smaller tars (zpipe make-shards --shard-size {most} at most)"
                )


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a run has to do, and what it leaves as it is."""

    todo: list[tuple[Path, ShardEntry]]
    """Tars whose map shards are to be made."""
    kept: dict[str, str]
    """Of the finished shards: stem -> SHA-256 of the index."""
    notes: tuple[str, ...] = ()
    """What the user should know: files that were damaged or lost."""

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


def claim_store(root: Path) -> None:
    """Make sure that the folder is ours to write to: new, empty, or a store, finished or not.

    Raises:
        UsageError: It holds something else, or a link that leads out of it.
    """
    check_reachable(root)
    # A store whose extraction record was lost is known by its manifest, if that is one of ours.
    lost = not (root / EXTRACTION_NAME).exists() and _is_store(root)
    claim_folder(root, MANIFEST_NAME if lost else EXTRACTION_NAME, "relevance store", lease=LEASE_NAME)
    refuse_links(root, ("maps", "index"), "relevance store")


def begun_with(root: Path) -> Provenance | None:
    """The provenance that the store at `root` was begun with; None if there is no store."""
    earlier = read_extraction(root)
    return read_manifest(root).provenance if earlier is None and _is_store(root) else earlier


def _is_store(root: Path) -> bool:
    try:
        return bool(read_manifest(root))
    except ZpipeError:
        return False


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
    manifest = _earlier_manifest(store.root)
    earlier = read_extraction(store.root)
    notes = []
    if earlier is None and manifest is not None:
        notes.append(f"{store.root / EXTRACTION_NAME}: was lost; written anew from {MANIFEST_NAME}")
        earlier = manifest.provenance
        write_extraction(store.root, earlier)
    if earlier is None:
        write_extraction(store.root, store.provenance)
    else:
        check_compatible(earlier, store.provenance, store.root)
    clear_unfinished(store.root)
    kept, damaged = _finished_shards(store, _listed_digests(manifest), progress)
    notes += [f"{str(damage).rpartition('; ')[0] or damage}; made again" for damage in damaged]
    plan = Plan(todo=[item for item in store.tars if item[1].stem not in kept], kept=kept, notes=tuple(notes))
    _retract_manifest(store.root, manifest, plan)
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
    if is_being_replaced(store):
        return
    # The manifest goes before what it lists. The file that marks a store is replaced: in between, it is unfinished.
    for name in (REPLACING_NAME, MANIFEST_NAME, "index", "maps"):
        remove(store.root / name)
    write_extraction(store.root, store.provenance)
    write_json(store.root / REPLACING_NAME, REPLACING.header | {"replacement": _replacement(store)})


def is_being_replaced(store: WantedStore) -> bool:
    """Whether a replacement by this same store was begun and interrupted; what it replaces is gone then."""
    mark = store.root / REPLACING_NAME
    interrupted = mark.is_file() and not (store.root / MANIFEST_NAME).exists()
    return interrupted and REPLACING.read(mark).replacement == _replacement(store)


def _replacement(store: WantedStore) -> str:
    """Digest of what replaces a store: provenance, whether stability is measured, and tars."""
    replacement = hashlib.sha256(store.provenance.fingerprint().encode())
    if store.stability:
        replacement.update(b"\nstability")
    for entry in store.entries:
        replacement.update(f"\n{entry.stem} {entry.sha256}".encode())
    return replacement.hexdigest()


def remove_store(root: Path) -> None:
    """Remove a store inside another one; the file that marks it as ours goes last."""
    if (root / EXTRACTION_NAME).exists():
        for name in (REPLACING_NAME, MANIFEST_NAME, "index", "maps", EXTRACTION_NAME):
            remove(root / name)


def _finished_shards(
    store: WantedStore, listed: dict[str, str], progress: Progress
) -> tuple[dict[str, str], list[DamageError]]:
    """Find the finished shards.

    A shard that no manifest vouches for is read whole, about 0.4 KB a sample: its files may have been damaged since
    they were written, and the manifest to come will vouch for them. One that is damaged is removed, and made again.
    While a replacement is in progress, remove what a worker of the replaced run left since.

    Args:
        store: The store to make.
        listed: Of the shards in the manifest: stem -> SHA-256 of the index.
        progress: Reports the search.

    Returns:
        Of the finished shards, stem -> SHA-256 of the index; and the damages that were found.
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
    kept: dict[str, str] = {}
    damaged: list[DamageError] = []
    inspect = partial(_inspected, store, listed, replacing, is_being_replaced(store))
    found = map_files(root, inspect, finished)
    for (_, entry), state in zip(_reported(finished, "find-finished-shards", progress), found, strict=True):
        if isinstance(state, str):
            kept[entry.stem] = state
            continue
        _remove_shard(root, entry.stem)
        if state is not None:
            damaged.append(state)
    return kept, damaged


def _inspected(
    store: WantedStore, listed: dict[str, str], replacing: bool, resumed: bool, item: tuple[Path, ShardEntry]
) -> str | DamageError | None:
    """SHA-256 of the index of a finished shard; else its damage, or None for a shard of the replaced run.

    That run may have had the same provenance: if this run resumes the replacement (`resumed`), a shard is also of the
    replaced run if only its column `stability` does not fit.
    """
    path, entry = item
    fingerprint, known = store.provenance.fingerprint(), listed.get(entry.stem)
    try:
        file = IndexFile(index_path(store.root, entry.stem))
        made_of = (file.seal.input_sha256, file.seal.fingerprint)
        if replacing and made_of != (entry.sha256, fingerprint):
            return None
        if resumed and not _fits_stability(store, file):
            return None
        _check_index(file, entry, fingerprint, known, path)
        _check_stability(store, file)
        if known is None:
            _check_content(store, entry, file)
    except DamageError as error:
        if known is not None:
            raise
        return error
    return file.sha256


def _fits_stability(store: WantedStore, file: IndexFile) -> bool:
    return store.stability in (None, "stability" in file.columns)


def _check_stability(store: WantedStore, file: IndexFile) -> None:
    """Check that a finished shard has the column `stability` if this run gives it to others, so that all are alike."""
    if not _fits_stability(store, file):
        has = "stability" in file.columns
        raise ZpipeError(
            f"{store.root}: made {'with' if has else 'without'} --stability; resume {'with' if has else 'without'} it, "
            "give another --out folder, or --replace to start over"
        )


def _check_content(store: WantedStore, entry: ShardEntry, file: IndexFile) -> None:
    """Check the rows and the maps of a shard against its own seal. Raises :class:`DamageError`."""
    rows, stored = len(file.table()), read_stored(store.root, entry.stem)
    if rows != entry.count or stored.shape != (entry.count, *store.provenance.sample_shape):
        raise DamageError(f"{file.path}: {rows} rows and maps {stored.shape} for {entry.count} samples")
    if digest_maps(stored) != file.seal.maps_sha256:
        raise DamageError(f"{maps_path(store.root, entry.stem)}: its maps are not those that were written")


def _remove_shard(root: Path, stem: str) -> None:
    remove(index_path(root, stem))  # first: maps without an index do not count
    remove(maps_path(root, stem))


def _retract_manifest(root: Path, manifest: StoreManifest | None, plan: Plan) -> None:
    """Delete the manifest if any shard that it lists will be made again: its bytes may differ in the last bits.

    A manifest whose shards are all kept stays, so that a store which only grows can be read meanwhile.
    """
    listed = _listed_digests(manifest)
    if any(entry.stem in listed for _, entry in plan.todo):
        remove(root / MANIFEST_NAME)


def _earlier_manifest(root: Path) -> StoreManifest | None:
    return read_manifest(root) if (root / MANIFEST_NAME).exists() else None


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
        raise ZpipeError(f"{file.path}: its digest is not what it was: altered; delete it and extract again")


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
            raise ZpipeError(f"{maps_path(root, entry.stem)}: missing; extract again to make it")
        table = file.table(["label", "target", "predicted", "status"])
        if len(table) != entry.count:
            raise ZpipeError(f"{file.path}: {len(table)} rows for {entry.count} samples; delete it and extract again")
        shard_correct, shard_labelled = count_correct_labels(table, store.provenance.target)
        correct, labelled = correct + shard_correct, labelled + shard_labelled
        statuses.update(table["status"].to_pylist())
        unusable += _unusable_samples(entry.stem, file, table)
        shards.append(MapShard(stem=entry.stem, count=entry.count, input_sha256=entry.sha256, index_sha256=file.sha256))
    earlier = _earlier_manifest(root)
    manifest = StoreManifest(
        provenance=store.provenance,
        shards=tuple(shards),
        statuses=dict(sorted(statuses.items())),
        source=str(store.source),
        zpipe_version=version("zpipe"),
        classes=store.classes or (earlier.classes if earlier else ()),
    )
    is_written = False
    same = earlier is not None and (earlier.shards, earlier.classes) == (manifest.shards, manifest.classes)
    if earlier and same and earlier.provenance.fingerprint() == fingerprint:
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
