"""Download a store that others published: from the Hugging Face Hub, an object store, a web server, or a folder.

All names follow from the manifest, so nothing needs to be listed. Each shard is checked against the digests of the
manifest before it is kept; the manifest is written last.
"""

from __future__ import annotations

import errno
import hashlib
import math
import threading
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from zpipe.pipeline.hub import http_errors, is_denied, is_hub_address, parse_address, patiently, pinned, read_from_hub
from zpipe.pipeline.store_plan import claim_store, clear_unfinished
from zpipe.schemas.atomic import commit, write_bytes
from zpipe.schemas.errors import DamageError, UsageError, ZpipeError, first_line, remedy_for
from zpipe.schemas.lease import held_lease
from zpipe.schemas.manifest import (
    EXTRACTION_NAME,
    MANIFEST,
    MANIFEST_NAME,
    MapShard,
    StoreManifest,
    decode_manifest,
    read_extraction,
    read_manifest,
    write_extraction,
)
from zpipe.schemas.map_array import BLOSC_HEADER, MAX_DESCRIPTION_BYTES, chunk_name, read_array
from zpipe.schemas.progress import Progress, silent
from zpipe.schemas.relevance_store import (
    MAX_INDEX_BYTES,
    IndexFile,
    ShardSeal,
    digest_maps,
    index_path,
    maps_path,
    max_rows,
    read_stored,
)
from zpipe.schemas.storage import as_path, check_reachable, is_remote, names_in, read_file, remove, storage_errors
from zpipe.schemas.tensor_kinds import KINDS, SAVED

THREADS = 16  # shards that are downloaded at a time, as far as `MEMORY` allows
MEMORY = 1 << 30  # bytes that these shards may take
WINDOW = 64  # shards that are begun ahead of the first unfinished one

# A row of an index: a key and 15 numbers, some 60 bytes packed. The rest of the file is its description.
INDEX_ROW_BYTES = 1024
INDEX_CLASS_BYTES = 8  # in a row, for each of the classes of class maps
INDEX_BYTES = 1 << 20

# Reads the file of a name, of at most so many bytes.
Read = Callable[[str, int], bytes]


@dataclass(frozen=True, kw_only=True)
class _Source:
    """A place from which a store is downloaded."""

    where: str
    """What messages call it."""
    read: Read
    """Reads a file. Raises FileNotFoundError, DamageError for one that is too large, or ZpipeError for all else."""
    stopped: threading.Event
    """Ends waiting for the server when it is set."""


@dataclass(frozen=True, kw_only=True)
class _Store:
    """One of the stores that are downloaded: the requested store, or a store inside it."""

    folder: str
    """Its folder inside the requested store, a name of `SAVED`; empty for the requested store."""
    where: str
    """What messages call it."""
    data: bytes
    """Its manifest file."""
    manifest: StoreManifest
    """Its manifest."""

    @property
    def prefix(self) -> str:
        """What the names of its files begin with at the source."""
        return f"{self.folder}/" if self.folder else ""

    def below(self, root: Path) -> Path:
        """The folder to write this store to when the requested store is written to `root`."""
        return root / self.folder if self.folder else root


@dataclass(frozen=True, kw_only=True)
class Pulled:
    """What became of a download."""

    manifest: StoreManifest
    """The manifest of the store."""
    shards: int
    """Number of its shards, those of the stores inside it included."""
    kept: int
    """Number of these shards that were there already."""
    inner: tuple[str, ...]
    """Names of the stores inside it that were downloaded too."""
    notes: tuple[str, ...] = ()
    """What the user should know: whether there is a store inside it could not be found out."""


def pull_store(source: str, root: Path, *, maps_only: bool = False, progress: Progress = silent) -> Pulled:
    """Download a store and the stores inside it, such as its logits, or what is missing of them.

    At most 16 shards are in memory at a time; the disk takes what the stores do.

    Args:
        source: ``hf://datasets/OWNER/NAME[@REVISION]``, another URL, or a folder.
        root: Folder or URL of the store: new, empty, or one that the same download has begun.
        maps_only: Leave the stores inside it out.
        progress: Reports the shards.

    Returns:
        The manifest, and how many shards were there.

    Raises:
        UsageError: `root` holds something else, or a store of other maps.
        ZpipeError: There is no store at `source`, it can't be read, or shards are damaged there.
    """
    root = as_path(root)
    opened = _opened(source)
    stores, notes = _published_stores(opened, maps_only)
    if not is_remote(root) and not is_hub_address(source) and root.resolve() == Path(source).resolve():
        raise UsageError(f"{root}: is the store itself; give another folder")
    claim_store(root)
    with held_lease(root) as lease:
        todo: list[tuple[_Store, MapShard]] = []
        for store in reversed(stores):  # that of the maps first: its record marks the folder as ours
            place = store.below(root)
            claim_store(place)
            clear_unfinished(place)
            todo = [(store, shard) for shard in _missing_shards(place, store, progress)] + todo
        total = sum(len(store.manifest.shards) for store in stores)
        kept = total - len(todo)
        problems: list[str] = []
        with closing(_in_threads(partial(_fetched, root, opened.read), todo, opened)) as fetched:
            for number, problem in enumerate(fetched, start=1):
                lease.check()
                problems += [problem] if problem else []
                progress("pull", kept + number, total, kept=kept, problems=len(problems))
        if problems:
            raise ZpipeError(
                f"{opened.where}: {len(problems)} of {total} shards are damaged there or on the way; run again to "
                "resume, or ask its owner",
                problems,
            )
        for store in stores:
            place = store.below(root)
            # A store that was whole keeps its own manifest, which may know the folder of its shards.
            if not (place / MANIFEST_NAME).exists() or read_manifest(place).shards != store.manifest.shards:
                write_bytes(place / MANIFEST_NAME, store.data)
    inner = tuple(store.folder for store in stores[:-1])
    return Pulled(manifest=stores[-1].manifest, shards=total, kept=kept, inner=inner, notes=notes)


def _opened(source: str) -> _Source:
    """Open a source; what it holds is not looked at yet."""
    stopped = threading.Event()
    if is_hub_address(source):
        dataset = parse_address(source)
        at = pinned(dataset, stopped)

        def read(name: str, max_bytes: int) -> bytes:
            request = partial(_bounded, partial(read_from_hub, at), name, max_bytes)
            return patiently(request, f"{dataset}/{name}", stopped)

        return _Source(where=str(dataset), read=read, stopped=stopped)
    folder = as_path(source)
    check_reachable(folder)

    def read_path(name: str, max_bytes: int) -> bytes:
        path = folder / name
        request = partial(_bounded, partial(_read_below, folder), name, max_bytes)
        if is_remote(folder):
            return patiently(request, path, stopped, storage_errors())
        try:
            return request()
        except FileNotFoundError:
            raise
        except OSError as error:
            raise ZpipeError(
                f"{path}: can't be read ({first_line(error)}); {remedy_for(error)}, then run again"
            ) from error

    return _Source(where=str(folder), read=read_path, stopped=stopped)


def _read_below(folder: Path, name: str, max_bytes: int) -> bytes:
    try:
        return read_file(folder / name, max_bytes)
    except FileNotFoundError as error:
        # fsspec calls a file of a web server absent whatever the answer was, or if there was none.
        cause = error.__cause__
        of_server = isinstance(cause, (*http_errors(), TimeoutError)) and getattr(cause, "status", None) != 404
        if cause is not None and of_server:
            raise cause from None
        raise


def _bounded(request: Read, name: str, max_bytes: int) -> bytes:
    try:
        return request(name, max_bytes)
    except OSError as error:
        if error.errno == errno.EFBIG:
            raise DamageError(f"{name} {first_line(error)}") from error
        raise


def _published_stores(source: _Source, maps_only: bool) -> tuple[list[_Store], tuple[str, ...]]:
    """Find the stores at a source.

    Returns:
        The stores, the requested one last; and a line for each store whose presence the server does not reveal.
    """
    # Stores inside it are found by their manifests, as web servers list nothing.
    try:
        stores = [_published_store(source, "")]
    except FileNotFoundError as error:
        raise ZpipeError(
            f"{source.where}: holds no finished relevance store (no {MANIFEST_NAME}); check the address, or wait until "
            "its upload is finished"
        ) from error
    notes = []
    for folder in () if maps_only else SAVED:
        try:
            stores.insert(-1, _published_store(source, folder))
        except FileNotFoundError:
            continue
        except ZpipeError as error:
            if not is_denied(error):
                raise
            # Some servers say so of every file that is absent.
            notes.append(f"{source.where}/{folder}: access is denied, if it exists, and left out; ask its owner")
    return stores, tuple(notes)


def _published_store(source: _Source, folder: str) -> _Store:
    name = f"{folder}/{MANIFEST_NAME}" if folder else MANIFEST_NAME
    data = source.read(name, MANIFEST.max_bytes)
    manifest = decode_manifest(data, f"{source.where}/{name}")
    most = max_rows(manifest.provenance.sample_shape, KINDS[manifest.provenance.kind].dtype)
    for shard in manifest.shards:
        if shard.count > most:
            raise DamageError(
                f"{source.where}/{name}: shard {shard.stem} has {shard.count} samples, more than the {most} of a "
                "shard; ask its owner"
            )
    where = f"{source.where}/{folder}" if folder else source.where
    return _Store(folder=folder, where=where, data=data, manifest=manifest)


def _missing_shards(root: Path, store: _Store, progress: Progress) -> list[MapShard]:
    """The shards that have to be downloaded to `root`; those that are there are read whole.

    A manifest that lists one of them is removed: the store is not whole any more.

    Raises:
        UsageError: The folder holds a store of other maps.
    """
    manifest, where = store.manifest, store.where
    earlier = read_manifest(root) if (root / MANIFEST_NAME).exists() else None
    begun = earlier.provenance if earlier else read_extraction(root)
    if begun is None:
        write_extraction(root, manifest.provenance)
    elif begun.fingerprint() != manifest.provenance.fingerprint():
        raise UsageError(f"{root}: holds a store of other maps than {where}; give a new folder")
    elif earlier and not (root / EXTRACTION_NAME).exists():
        write_extraction(root, begun)
    listed = {shard.stem for shard in manifest.shards}
    indexed = {name.removesuffix(".parquet") for name in names_in(root / "index")}
    others = sorted((indexed | {name.removesuffix(".zarr") for name in names_in(root / "maps")}) - listed)
    if others or (earlier and not set(earlier.shards) <= set(manifest.shards)):
        why = f"shard {others[0]}, which {where} lacks" if others else f"shards that differ from those of {where}"
        raise UsageError(f"{root}: holds {why}; give a new folder")
    todo = []
    for number, shard in enumerate(manifest.shards, start=1):
        if shard.stem not in indexed or not _is_whole(root, manifest, shard):
            todo.append(shard)
        if indexed:
            progress("find-finished-shards", number, len(manifest.shards))
    if earlier and set(earlier.shards) & set(todo):
        remove(root / MANIFEST_NAME)
    return todo


def _is_whole(root: Path, manifest: StoreManifest, shard: MapShard) -> bool:
    """Whether a shard lies in the store as the manifest says."""
    try:
        file = IndexFile(index_path(root, shard.stem))
        if file.sha256 != shard.index_sha256:
            return False
        _check_maps(read_stored(root, shard.stem), manifest, shard, file.seal)
    except DamageError:
        return False
    return True


def _threads(todo: Sequence[tuple[_Store, MapShard]]) -> int:
    """How many shards may be downloaded at a time: each is in memory packed and unpacked."""
    largest = max((sum(_limits(store.manifest, shard)) * 2 for store, shard in todo), default=1)
    return max(1, min(THREADS, MEMORY // largest))


def _limits(manifest: StoreManifest, shard: MapShard) -> tuple[int, int]:
    """Largest sizes in bytes of the index and of the chunk of a shard."""
    origin = manifest.provenance
    values = shard.count * math.prod(origin.sample_shape) * KINDS[origin.kind].dtype.itemsize
    row = INDEX_ROW_BYTES + (origin.sample_shape[0] * INDEX_CLASS_BYTES if origin.kind == "class-maps" else 0)
    return min(MAX_INDEX_BYTES, INDEX_BYTES + shard.count * row), values + BLOSC_HEADER.size


def _in_threads(
    function: Callable[[tuple[_Store, MapShard]], str], todo: Sequence[tuple[_Store, MapShard]], source: _Source
) -> Generator[str, None, None]:
    """Yield `function(each)` for each store and shard, in order."""
    with ThreadPoolExecutor(max_workers=_threads(todo)) as pool:
        try:
            for start in range(0, len(todo), WINDOW):
                yield from pool.map(function, todo[start : start + WINDOW])
        finally:
            source.stopped.set()  # or the pool would wait for threads that wait for the server


def _fetched(root: Path, read: Read, item: tuple[_Store, MapShard]) -> str:
    """Download a shard; a damaged one twice. Returns what is wrong with it, empty if nothing is."""
    store, shard = item
    problem = ""
    for _ in range(2):
        try:
            _fetch(store.below(root), store, read, shard)
            return ""
        except FileNotFoundError:
            problem = f"{store.where}: shard {shard.stem}: a file of it is missing"
        except DamageError as error:
            problem = f"{store.where}: shard {shard.stem}: {error}"
    return problem


def _fetch(root: Path, store: _Store, read: Read, shard: MapShard) -> None:
    """Download a shard of a store, check it, and write it to `root`: the index last.

    Raises:
        FileNotFoundError: The source lacks one of its files.
        DamageError: It is not what the manifest says.
        ZpipeError: It can't be read or written.
    """
    manifest = store.manifest
    index_limit, maps_limit = _limits(manifest, shard)
    index = read(f"{store.prefix}index/{shard.stem}.parquet", index_limit)
    if hashlib.sha256(index).hexdigest() != shard.index_sha256:
        raise DamageError("its index is not the one that the manifest lists")
    folder, chunk = f"{store.prefix}maps/{shard.stem}.zarr", chunk_name(1 + len(manifest.provenance.sample_shape))
    files = {"zarr.json": read(f"{folder}/zarr.json", MAX_DESCRIPTION_BYTES)}
    with suppress(FileNotFoundError):  # Zarr may leave out a chunk of zeros; the digest of the maps says whether it did
        files[chunk] = read(f"{folder}/{chunk}", maps_limit)
    with commit(index_path(root, shard.stem)) as index_tmp:
        index_tmp.write_bytes(index)
        seal = _checked_index(index_tmp, manifest, shard)
        with commit(maps_path(root, shard.stem)) as tmp:
            for name, data in files.items():
                (tmp / name).parent.mkdir(parents=True, exist_ok=True)
                (tmp / name).write_bytes(data)
            try:
                stored = read_array(tmp)[0]
            except ValueError as error:
                raise DamageError(f"its maps can't be read ({first_line(error)})") from error
            _check_maps(stored, manifest, shard, seal)
            # The old index must not stay beside the new array.
            remove(index_path(root, shard.stem))


def _checked_index(path: Path, manifest: StoreManifest, shard: MapShard) -> ShardSeal:
    file = IndexFile(path)
    try:
        seal, rows = file.seal, len(file.table())
    except DamageError as error:
        said = str(error).removeprefix(f"{path}: ").rpartition("; ")[0]
        raise DamageError(f"its {said}") from error
    if (seal.fingerprint, seal.input_sha256) != (manifest.provenance.fingerprint(), shard.input_sha256):
        raise DamageError("its index is that of other maps than the manifest's")
    if rows != shard.count:
        raise DamageError(f"its index has {rows} rows, the manifest says {shard.count}")
    return seal


def _check_maps(stored: np.ndarray, manifest: StoreManifest, shard: MapShard, seal: ShardSeal) -> None:
    shape, dtype = (shard.count, *manifest.provenance.sample_shape), KINDS[manifest.provenance.kind].dtype
    if (stored.shape, stored.dtype.name) != (shape, dtype.name) or digest_maps(stored) != seal.maps_sha256:
        raise DamageError("its maps are not those that its index was written for")
