"""A relevance store read without zpipe: zarr, pyarrow and numpy are enough.

docs/store-format.md describes the files that are read here.

python docs/examples/read_store.py STORE
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import zarr


def read_store(root: Path) -> Iterator[tuple[str, np.ndarray, dict]]:
    """key, raw relevance float32 [gh, gw], and the index row of every sample whose map can be used."""
    manifest = json.loads((root / "manifest.json").read_text())  # no manifest: not finished
    if (manifest["format"], manifest["version"]) != ("zpipe-relevance-store", 1):
        raise SystemExit(f"{root}: a store of another version")
    for shard in manifest["shards"]:
        # partitioning=None, or pyarrow takes folders called a=b for columns.
        rows = pq.read_table(root / "index" / f"{shard['stem']}.parquet", partitioning=None).to_pylist()
        stored = zarr.open_array(root / "maps" / f"{shard['stem']}.zarr", mode="r")[:]  # float16 [n, gh, gw]
        assert len(rows) == len(stored) == shard["count"]
        for row, values in zip(rows, stored, strict=True):
            if row["status"] == "ok":
                yield row["key"], values.astype(np.float32) * np.float32(row["scale"]), row


if __name__ == "__main__":
    for key, relevance, row in read_store(Path(sys.argv[1])):
        y, x = np.unravel_index(relevance.argmax(), relevance.shape)
        print(f"{key}: class {row['target']}, most relevant cell: row {y}, column {x}")
