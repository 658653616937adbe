"""Write any tensor of each sample, such as a mask or a label map, to a store that loaders join like relevance maps."""

from __future__ import annotations

import hashlib
import operator
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import numpy as np
import pyarrow as pa

from zpipe.pipeline.shard_reader import open_shards, read_samples
from zpipe.pipeline.store_plan import WantedStore, audit, claim_store, commit_manifest, prepare
from zpipe.schemas.choices import check_choice
from zpipe.schemas.errors import UsageError, ZpipeError
from zpipe.schemas.images import DECODE_ERRORS, open_image
from zpipe.schemas.lease import held_lease
from zpipe.schemas.manifest import Provenance
from zpipe.schemas.progress import Progress, silent
from zpipe.schemas.relevance_store import NONFINITE, OK, concentration, index_schema, write_shard
from zpipe.schemas.sample import Sample
from zpipe.schemas.shard_images import COLUMNS, image_row
from zpipe.schemas.shard_index import ShardEntry
from zpipe.schemas.storage import as_path
from zpipe.schemas.tensor_kinds import KINDS, Kind, encode

NO_CLASS = -1


def save_tensors(
    shards: str | Path,
    out: str | Path,
    function: Callable[[Sample], np.ndarray],
    *,
    name: str,
    kind: Kind,
    shape: tuple[int, ...],
    progress: Progress = silent,
) -> int:
    """Call a function for each sample of tar shards and write what it returns to a store.

    An interrupted call is resumed shard by shard. Memory holds the tensors of one shard.

    Args:
        shards: Folder or fsspec URL of tar shards, or one tar.
        out: Folder or fsspec URL of the store: new, empty, or that of a call to resume.
        function: Takes a sample (its `key`, `image`, the encoded file, `label` and `meta`) and returns an array of that
            shape. Dense tensors cover the whole image.
        name: What the tensors are, such as ``mask``; recorded, and compared when a store is resumed.
        kind: A name of `zpipe.schemas.tensor_kinds.KINDS`.
        shape: Shape of each tensor: (gh, gw) for a map or a label map, (k, gh, gw), (gh, gw, d) or (d,).
        progress: Reports the samples that are stored.

    Returns:
        The number of samples in the store.

    Raises:
        UsageError: The kind is unknown, the shape is none of its shapes, or the folder holds something else.
        ZpipeError: An array has another shape, a label map holds no whole numbers, or an image can't be opened; shards
            that are finished are kept.
    """
    check_choice("kind", kind, KINDS)
    shape = tuple(map(operator.index, shape))
    root, source, origin = as_path(out), as_path(shards), _provenance(name, kind, shape)
    tars, index = open_shards(source)
    store = WantedStore(root=root, source=source, tars=tars, provenance=origin, label_field=index.label_field)
    store.check_sizes()
    claim_store(root)
    with held_lease(root) as lease:
        plan = prepare(store, replace=False, progress=progress)
        done = store.count - plan.count
        for path, entry in plan.todo:
            _write(store, path, entry, function)
            lease.check()
            done += entry.count
            progress(name, done, store.count)
        commit_manifest(store, audit(store, plan, progress))
    return store.count


def _provenance(name: str, kind: Kind, shape: tuple[int, ...]) -> Provenance:
    sizes = dict(zip(KINDS[kind].axes, shape, strict=False))
    grid = (sizes.get("h", 1), sizes.get("w", 1))
    try:
        origin = Provenance(
            teacher="",
            teacher_args={},
            weights="",
            seed=None,
            teacher_digest=hashlib.sha256().hexdigest(),
            num_classes=1,
            method=name,
            start_layer=0,
            target="none",
            frame="full",
            grid=grid,
            image_size=grid,
            mean=(),
            std=(),
            interpolation="",
            crop_pct=1.0,
            symmetrised=False,
            precision="float32",
            kind=kind,
            shape=shape,
        )
        return msgspec.convert(origin.to_json(), Provenance)  # within the bounds of a file that is read again
    except (ValueError, msgspec.ValidationError) as error:
        raise UsageError(f"{error}; axes of {kind}: {', '.join(KINDS[kind].axes)}") from error


def _write(store: WantedStore, path: Path, entry: ShardEntry, function: Callable[[Sample], np.ndarray]) -> None:
    kind, shape = KINDS[store.provenance.kind], store.provenance.sample_shape
    raw = np.empty((entry.count, *shape), np.int32 if kind.dtype.kind == "i" else np.float32)
    rows = []
    for number, sample in enumerate(_samples(path, entry, store.label_field)):
        array = np.asarray(function(sample))
        if array.shape != shape:
            raise ZpipeError(
                f"{path}: key {sample.key}: an array of shape {array.shape}, not {shape}; mend the function"
            )
        if kind.dtype.kind == "i" and not _is_int32(array):
            raise ZpipeError(f"{path}: key {sample.key}: a label map holds whole numbers of 32 bits; mend the function")
        with np.errstate(over="ignore"):  # what is too large becomes infinite, and its sample nonfinite
            raw[number] = array
        try:
            with open_image(sample.image) as image:
                size = image.size
        except DECODE_ERRORS as error:
            raise ZpipeError(f"{path}: key {sample.key}: can't be opened ({error}); leave it out of the tar") from error
        rows.append((*image_row(sample.key, sample.label, sample.image), *size))
    stored, scale = encode(kind, raw)
    entropy, mass = concentration(raw, kind)
    key, label, digest, width, height = (list(column) for column in zip(*rows, strict=True))
    none, zero = np.full(entry.count, np.nan, np.float32), np.zeros(entry.count, np.float32)
    classes = np.full(entry.count, NO_CLASS, np.int32)
    columns = {
        **dict(zip(COLUMNS, (key, label, digest), strict=True)),
        **{"target": classes, "predicted": classes, "predicted_probability": none, "target_probability": none},
        **{"scale": scale, "entropy": entropy, "top10_mass": mass, "width": width, "height": height},
        **{"frame_x1": zero, "frame_y1": zero, "frame_x2": width, "frame_y2": height},
        "status": [OK if good else NONFINITE for good in np.isfinite(scale)],
    }
    if kind.axes == "khw":
        columns["targets"] = [[NO_CLASS] * shape[0]] * entry.count
    index = pa.table({field.name: pa.array(columns[field.name], field.type) for field in index_schema(columns)})
    fingerprint = store.provenance.fingerprint()
    write_shard(store.root, entry.stem, stored, index, input_sha256=entry.sha256, fingerprint=fingerprint)


def _is_int32(array: np.ndarray) -> bool:
    """Whether an array holds whole numbers of 32 bits, whatever its type."""
    if array.dtype.kind not in "iufb":
        return False
    return bool(np.all((array >= -(2**31)) & (array < 2**31)) and np.all(array == np.floor(array)))


def _samples(path: Path, entry: ShardEntry, label_field: str | None) -> Iterator[Sample]:
    for number, sample in enumerate(read_samples(path, entry, label_field=label_field)):
        if number == entry.count:
            raise ZpipeError(f"{path}: more than the {entry.count} samples its index names; make the shards again")
        yield sample
