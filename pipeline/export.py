"""A store in the formats of others: Parquet with the maps in it, or plain NumPy files."""

from __future__ import annotations

import json
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
from zpipe.schemas.relevance_store import encode_maps
from zpipe.schemas.storage import is_remote

Values = Literal["raw", "minmax"]


def export_parquet(
    maps: RelevanceMaps, out: Path, *, per_shard: bool = False, values: Values = "raw", progress: Progress = silent
) -> int:
    """Write index and maps as one Parquet file, or as one a shard in the folder `out`; returns how many files.

    Column `map` is FixedSizeList<float16>[gh * gw], row-major, its grid in the field's metadata (`shape`) and the store's
    provenance in the file's (`zpipe`). values: "raw" divides each map by its `scale` (float16 alone would lose small maps:
    relevance is `map * scale`), "minmax" scales it to [0, 1]. One shard is in memory at a time. Errors: :class:`UsageError`
    when `out` exists; :class:`ZpipeError` for what can't be read or written.
    """
    check_choice("--values", values, get_args(Values))
    schema = _schema(maps)
    if not per_shard:
        _check_free(out)
        with commit(out) as tmp, pq.ParquetWriter(tmp, schema, compression="zstd") as writer:
            for table in _tables(maps, schema, values, progress):
                writer.write_table(table, row_group_size=len(table))
        return 1
    _check_free(out)
    with commit(out) as folder:
        folder.mkdir()
        for shard, table in zip(maps.manifest.shards, _tables(maps, schema, values, progress), strict=True):
            pq.write_table(table, folder / f"{shard.stem}.parquet", compression="zstd")
    return len(maps.manifest.shards)


def export_numpy(maps: RelevanceMaps, out: Path, *, values: Values = "raw", progress: Progress = silent) -> None:
    """Write the folder `out`: maps.npy float32 [N, gh, gw], keys.txt, index.parquet and manifest.json, in one order.

    0.8 KB a map at 14 x 14 on disk, one shard in memory. Errors as :func:`export_parquet`.
    """
    check_choice("--values", values, get_args(Values))
    _check_free(out)
    with commit(out) as folder:
        folder.mkdir()
        shape = (len(maps), *maps.manifest.provenance.grid)
        array = np.lib.format.open_memmap(folder / "maps.npy", mode="w+", dtype=np.float32, shape=shape)
        done = 0
        for shard in maps.manifest.shards:
            array[done : done + shard.count] = _shard_values(maps, shard, values)
            done += shard.count
            progress("export", done, len(maps))
        array.flush()
        del array
        table = maps.table()
        pq.write_table(table, folder / "index.parquet", compression="zstd")
        write_bytes(folder / "keys.txt", "".join(f"{key}\n" for key in table["key"].to_pylist()).encode())
        write_json(folder / "manifest.json", {"values": values, "provenance": maps.manifest.provenance.compared()})


def _check_free(out: Path) -> None:
    if is_remote(out):
        raise UsageError(f"{out}: exports are written to this machine; give a local path, then copy it")
    if out.exists():
        raise UsageError(f"{out}: exists already; remove it, or give another path")


def _schema(maps: RelevanceMaps) -> pa.Schema:
    gh, gw = maps.manifest.provenance.grid
    rows = maps.table(["key"]).schema if not maps.manifest.shards else maps.index(maps.manifest.shards[0].stem).schema
    # A plain list, not arrow.fixed_shape_tensor: Hugging Face's datasets refuses that.
    field = pa.field("map", pa.list_(pa.float16(), gh * gw), nullable=False, metadata={"shape": json.dumps([gh, gw])})
    provenance = json.dumps(maps.manifest.provenance.compared())
    return pa.schema([*rows, field], metadata={"zpipe": provenance})


def _tables(maps: RelevanceMaps, schema: pa.Schema, values: Values, progress: Progress) -> Iterator[pa.Table]:
    done = 0
    for shard in maps.manifest.shards:
        found = _shard_values(maps, shard, values)
        stored = encode_maps(found)[0] if values == "raw" else found.astype(np.float16)
        flat = pa.FixedSizeListArray.from_arrays(pa.array(stored.reshape(-1)), stored[0].size)
        table = maps.index(shard.stem)
        yield pa.table([*table.columns, flat], schema=schema)
        done += shard.count
        progress("export", done, len(maps))


def _shard_values(maps: RelevanceMaps, shard: MapShard, values: Values) -> np.ndarray:
    found = maps.read_shard(shard.stem)
    return normalise_minmax(found) if values == "minmax" else found
