"""Export a store to formats that other programs read: Parquet files that include the maps, NumPy files, or Lance."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from zpipe.schemas.atomic import commit, write_bytes, write_json
from zpipe.schemas.choices import check_choice
from zpipe.schemas.errors import UsageError
from zpipe.schemas.manifest import MapShard
from zpipe.schemas.progress import Progress, silent
from zpipe.schemas.relevance_maps import RelevanceMaps, normalise_minmax
from zpipe.schemas.storage import is_remote

Values = Literal["raw", "minmax"]


def export_parquet(
    maps: RelevanceMaps, out: Path, *, per_shard: bool = False, values: Values = "raw", progress: Progress = silent
) -> int:
    """Write index and maps as Parquet. One shard is in memory at a time.

    The column `map` is FixedSizeList<float16>[gh * gw], row-major; label maps are int32. The metadata of the field has
    its grid (`shape`), those of the file the provenance of the store (`zpipe`).

    Args:
        maps: The store.
        out: File to write, or folder with `per_shard`; it must not exist.
        per_shard: Write one file per shard.
        values: ``raw`` divides each map by its `scale`, because float16 alone would lose small maps: the relevance is
            `map * scale`. ``minmax`` scales each map to [0, 1].
        progress: Reports the samples that have been written.

    Returns:
        Number of files.

    Raises:
        UsageError: `out` exists or is a URL, or `values` is none of its choices.
        ZpipeError: A file cannot be read or written.
    """
    _check_values(maps, values)
    _check_free(out)
    schema = _schema(maps)
    if not per_shard:
        if out.suffix.lower() not in ("", ".parquet", ".pq"):
            raise UsageError(f"{out}: a Parquet file is written; give a name that ends in .parquet")
        with commit(out) as tmp, pq.ParquetWriter(tmp, schema, compression="zstd") as writer:
            for table in _tables(maps, schema, values, progress):
                writer.write_table(table, row_group_size=len(table))
        return 1
    _check_folder(out)
    with commit(out) as folder:
        folder.mkdir()
        for shard, table in zip(maps.manifest.shards, _tables(maps, schema, values, progress), strict=True):
            pq.write_table(table, folder / f"{shard.stem}.parquet", compression="zstd")
    return len(maps.manifest.shards)


def export_numpy(maps: RelevanceMaps, out: Path, *, values: Values = "raw", progress: Progress = silent) -> None:
    """Write a folder of NumPy maps.

    It holds maps.npy (float32 [N, gh, gw], or the shape and type of other tensors), keys.txt and index.parquet, in the
    same order, and manifest.json. It takes 0.8 KB per map at 14 x 14 on disk. One shard is in memory at a time.
    Arguments and exceptions are those of :func:`export_parquet`.
    """
    _check_values(maps, values)
    _check_free(out)
    _check_folder(out)
    with commit(out) as folder:
        folder.mkdir()
        shape = (len(maps), *maps.manifest.provenance.sample_shape)
        kind = "<i4" if maps.kind.dtype.kind == "i" else "<f4"
        done = 0
        # Not through a memory map, where a full disk kills the process with SIGBUS.
        with open(folder / "maps.npy", "wb") as file:
            header = {"descr": kind, "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(file, header)
            for shard in maps.manifest.shards:
                file.write(np.ascontiguousarray(_shard_values(maps, shard, values), kind).data)
                done += shard.count
                progress("export", done, len(maps))
        table = maps.table()
        pq.write_table(table, folder / "index.parquet", compression="zstd")
        write_bytes(folder / "keys.txt", "".join(f"{key}\n" for key in table["key"].to_pylist()).encode())
        write_json(folder / "manifest.json", {"values": values, "provenance": maps.manifest.provenance.compared()})


def export_lance(maps: RelevanceMaps, out: Path, *, values: Values = "raw", progress: Progress = silent) -> None:
    """Write a Lance data set, a folder, with the columns of :func:`export_parquet`.

    One shard is in memory at a time. Arguments and exceptions are those of :func:`export_parquet`.
    """
    _check_values(maps, values)
    _check_free(out)
    _check_folder(out)
    try:
        import lance
    except ImportError as error:
        raise UsageError(f"{out}: Lance needs pylance; install the extra lance") from error
    schema = _schema(maps)
    batches = (batch for table in _tables(maps, schema, values, progress) for batch in table.to_batches())
    with commit(out) as folder:
        lance.write_dataset(pa.RecordBatchReader.from_batches(schema, batches), str(folder))


def _check_values(maps: RelevanceMaps, values: Values) -> None:
    check_choice("--values", values, get_args(Values))
    if values == "minmax" and not maps.kind.is_relevance:
        raise UsageError(f"--values minmax: {maps.path} holds {maps.manifest.provenance.kind}; choose raw")


def _check_free(out: Path) -> None:
    if is_remote(out):
        raise UsageError(f"{out}: exports are written to this machine; give a local path, then copy it")
    if os.path.lexists(out):
        raise UsageError(f"{out}: exists already; remove it, or give another path")


def _check_folder(out: Path) -> None:
    if out.suffix.lower() in (".parquet", ".pq", ".csv", ".json", ".npy", ".npz"):
        raise UsageError(f"{out}: a folder is written; give a name without {out.suffix}")


def _schema(maps: RelevanceMaps) -> pa.Schema:
    shape = maps.manifest.provenance.sample_shape
    rows = maps.table(["key"]).schema if not maps.manifest.shards else maps.index(maps.manifest.shards[0].stem).schema
    # A plain list, not arrow.fixed_shape_tensor, which Hugging Face's datasets refuses.
    values = pa.list_(pa.from_numpy_dtype(maps.kind.dtype), math.prod(shape))
    field = pa.field("map", values, nullable=False, metadata={"shape": json.dumps(shape)})
    provenance = json.dumps(maps.manifest.provenance.compared())
    return pa.schema([*rows, field], metadata={"zpipe": provenance})


def _tables(maps: RelevanceMaps, schema: pa.Schema, values: Values, progress: Progress) -> Iterator[pa.Table]:
    done = 0
    for shard in maps.manifest.shards:
        table = maps.index(shard.stem, schema.names[:-1])
        if values == "raw":
            stored = maps.stored_shard(shard.stem, table)
        else:
            stored = _shard_values(maps, shard, values).astype(np.float16)
        flat = pa.FixedSizeListArray.from_arrays(pa.array(stored.reshape(-1)), math.prod(stored.shape[1:]))
        yield pa.table([*table.columns, flat], schema=schema)
        done += shard.count
        progress("export", done, len(maps))


def _shard_values(maps: RelevanceMaps, shard: MapShard, values: Values) -> np.ndarray:
    shard_maps = maps.read_shard(shard.stem)
    return normalise_minmax(shard_maps) if values == "minmax" else shard_maps
