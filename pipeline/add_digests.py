"""Add the digests of images to a store that was written without them, so that it can be joined by image."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from zpipe.pipeline.shard_reader import open_shards, read_samples
from zpipe.pipeline.store_plan import WantedStore, audit, claim_store, commit_manifest, prepare
from zpipe.schemas.atomic import commit, write_bytes
from zpipe.schemas.errors import ZpipeError
from zpipe.schemas.image_digest import DIGEST_BYTES, image_digest
from zpipe.schemas.lease import held_lease
from zpipe.schemas.manifest import MANIFEST, MANIFEST_NAME, read_extraction, read_manifest
from zpipe.schemas.progress import Progress, silent
from zpipe.schemas.relevance_store import IndexFile, index_path, index_schema
from zpipe.schemas.shard_index import ShardEntry
from zpipe.schemas.storage import as_path, names_in, remove

PREVIOUS_NAME = "manifest.previous.json"  # while digests are being added


def add_digests(root: str | Path, shards: str | Path, *, progress: Progress = silent) -> int:
    """Read the tars that a store was made from, and write the digests of their images into its index.

    The maps stay as they are. While it runs the store has no manifest; the same call resumes an interrupted one.

    Args:
        root: Folder or URL of the store.
        shards: Folder or URL of the tars.
        progress: Reports the shards that have digests.

    Returns:
        The number of shards that this call changed.

    Raises:
        UsageError: `root` holds no store.
        ZpipeError: The store was made from other tars, or is not finished.
    """
    root, source = as_path(root), as_path(shards)
    provenance = read_extraction(root) or read_manifest(root).provenance
    before = next((path for path in (root / MANIFEST_NAME, root / PREVIOUS_NAME) if path.exists()), None)
    classes = () if before is None else MANIFEST.read(before).classes
    tars, index = open_shards(source, progress=progress)
    field = index.label_field
    store = WantedStore(root=root, source=source, tars=tars, provenance=provenance, classes=classes, label_field=field)
    _check_whole(store)
    claim_store(root)
    with held_lease(root) as lease:
        plan = prepare(store, replace=False, progress=progress)
        if plan.todo:
            raise _unfinished(root, plan.todo[0][1].stem)
        lacking = [item for item in tars if "image_digest" not in IndexFile(index_path(root, item[1].stem)).columns]
        if lacking and (root / MANIFEST_NAME).exists():
            # It lists the digests of the indexes as they were; the names of the classes are needed again.
            write_bytes(root / PREVIOUS_NAME, (root / MANIFEST_NAME).read_bytes())
            remove(root / MANIFEST_NAME)
        for number, (path, entry) in enumerate(lacking, start=1):
            plan.kept[entry.stem] = _add(root, path, entry, field)
            lease.check()
            progress("digest", number, len(lacking))
        commit_manifest(store, audit(store, plan, progress))
        remove(root / PREVIOUS_NAME)
    return len(lacking)


def _check_whole(store: WantedStore) -> None:
    """Check, before anything is changed, that the tars are those of the store and that no shard of it is missing."""
    stems = {entry.stem for entry in store.entries}
    found = {name.removesuffix(".parquet") for name in names_in(store.root / "index")}
    if other := sorted(found - stems):
        raise ZpipeError(
            f"{store.root}: has maps of {other[0]}.tar, which is not in {store.source}; give all tars of the store"
        )
    if missing := sorted(stems - found):
        raise _unfinished(store.root, missing[0])


def _unfinished(root: Path, stem: str) -> ZpipeError:
    return ZpipeError(
        f"{root}: shard {stem} is not finished; run the command that made the store again, then add the digests"
    )


def _add(root: Path, path: Path, entry: ShardEntry, label_field: str | None) -> str:
    """Write the index of a shard anew, with digests. Returns its SHA-256."""
    file = IndexFile(index_path(root, entry.stem))
    table = file.table()
    digests = {sample.key: image_digest(sample.image) for sample in read_samples(path, entry, label_field=label_field)}
    if list(digests) != table["key"].to_pylist():
        raise ZpipeError(f"{file.path}: its keys are not those of {path}; extract again")
    column = pa.array(list(digests.values()), pa.binary(DIGEST_BYTES))
    table = table.append_column("image_digest", column)
    table = table.select(index_schema(table.column_names).names).cast(index_schema(table.column_names))
    with commit(file.path) as tmp:
        pq.write_table(table.replace_schema_metadata(vars(file.seal)), tmp, compression="zstd")
    return IndexFile(file.path).sha256
