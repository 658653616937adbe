"""How fast a store of ImageNet's size opens, answers and is verified.

    python benchmarks/store.py FOLDER [--shards 1281] [--samples 1000]

FOLDER keeps the synthetic store of 1,281 shards (0.5 GB); a second call measures it again without making it. Thread
counts are set to 1. The baselines take turns with it: the same content read by pyarrow and Python alone, which know
nothing of shards and check nothing.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import statistics
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import zarr

from zpipe import open_maps
from zpipe.pipeline.verify import verify_store
from zpipe.schemas.image_digest import DIGEST_BYTES
from zpipe.schemas.manifest import MANIFEST_NAME, MapShard, Provenance, StoreManifest, write_extraction, write_manifest
from zpipe.schemas.relevance_store import concentration, encode_maps, index_path, index_schema, write_shard
from zpipe.schemas.shard_index import digest_file
from zpipe.schemas.storage import folder_bytes

GRID = (14, 14)
COLUMNS = ["key", "label", "predicted", "entropy"]


def synthetic_provenance() -> Provenance:
    """That of a store which no teacher made."""
    return Provenance(
        teacher="deit_base_patch16_224",
        teacher_args={},
        weights="synthetic",
        seed=None,
        teacher_digest="0" * 64,
        num_classes=1000,
        method="transformer-attribution",
        start_layer=0,
        target="ground-truth",
        frame="full",
        grid=GRID,
        image_size=(224, 224),
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
        interpolation="bicubic",
        crop_pct=1.0,
        symmetrised=False,
        precision="float32",
    )


def made_up_shard(rng: np.random.Generator, number: int, samples: int) -> tuple[np.ndarray, pa.Table]:
    """Stored maps [samples, 14, 14] drawn at random, with the spread of scales that real ones have, and their index."""
    raw = (rng.gamma(0.3, size=(samples, *GRID)) * 10 ** rng.normal(-3, 1, (samples, 1, 1))).astype(np.float32)
    stored, scale = encode_maps(raw)
    entropy, top10 = concentration(raw)
    label = rng.integers(0, 1000, samples)
    width, height = rng.integers(100, 600, (2, samples))
    probability = rng.random((2, samples))
    columns = {
        "key": [f"n{label[i]:08d}_{number * samples + i}" for i in range(samples)],
        "label": label,
        "target": label,
        "predicted": np.where(rng.random(samples) < 0.8, label, 0),
        "predicted_probability": probability[0],
        "target_probability": probability[1],
        "scale": scale,
        "entropy": entropy,
        "top10_mass": top10,
        "width": width,
        "height": height,
        "frame_x1": np.zeros(samples),
        "frame_y1": np.zeros(samples),
        "frame_x2": width,
        "frame_y2": height,
        "status": ["ok"] * samples,
        "image_digest": [bytes(row) for row in rng.integers(0, 256, (samples, DIGEST_BYTES), np.uint8)],
    }
    schema = index_schema(columns)
    return stored, pa.table({field.name: pa.array(columns[field.name]).cast(field.type) for field in schema}, schema)


def make_store(root: Path, shards: int, samples: int) -> None:
    provenance = synthetic_provenance()
    write_extraction(root, provenance)
    rng = np.random.default_rng(0)
    listed = []
    for number in range(shards):
        stem = f"shard-{number:06d}"
        stored, index = made_up_shard(rng, number, samples)
        write_shard(root, stem, stored, index, input_sha256="0" * 64, fingerprint=provenance.fingerprint())
        digest = digest_file(index_path(root, stem))
        listed.append(MapShard(stem=stem, count=samples, input_sha256="0" * 64, index_sha256=digest))
    manifest = StoreManifest(
        provenance=provenance,
        shards=tuple(listed),
        statuses={"ok": shards * samples},
        source="synthetic",
        zpipe_version="0",
    )
    write_manifest(root, manifest)


def bare_index(path: Path, columns: list[str] | None = None) -> pa.Table:
    with pq.ParquetFile(path, pre_buffer=False) as file:
        return file.read(columns=columns, use_threads=False)


def bare_keys(root: Path) -> dict[str, int]:
    """Every key with its row, by pyarrow alone: nothing is checked, and shards are not distinguished."""
    rows: dict[str, int] = {}
    for path in sorted((root / "index").iterdir()):
        keys = bare_index(path, ["key"])["key"].to_pylist()
        rows.update(zip(keys, range(len(keys)), strict=True))
    return rows


def bare_table(root: Path) -> pa.Table:
    """The columns of the index by pyarrow alone."""
    return pa.concat_tables(bare_index(path, COLUMNS) for path in sorted((root / "index").iterdir()))


def bare_pass(root: Path) -> None:
    """Every byte read and decoded by zarr and pyarrow, and hashed once: what no check can do without."""
    for path in sorted((root / "index").iterdir()):
        hashlib.sha256(path.read_bytes()).digest()
        bare_index(path)
    for path in sorted((root / "maps").iterdir()):
        hashlib.sha256(np.asarray(zarr.open_array(store=str(path), mode="r")[:]).tobytes()).digest()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shards", type=int, default=1281)
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    pa.set_cpu_count(1)
    if not (args.folder / MANIFEST_NAME).is_file():
        begun = time.perf_counter()
        make_store(args.folder, args.shards, args.samples)
        print(f"made in {time.perf_counter() - begun:.0f} s")
    count = args.shards * args.samples
    print(f"{count:,} maps in {args.shards} shards, {folder_bytes(args.folder) / count:.0f} bytes a sample")
    report: dict[str, list[float]] = {}

    def compare(what: str, run, yardstick, bare) -> None:
        times, ratios = [], []
        for _ in range(args.rounds):
            begun = time.perf_counter()
            bare()
            between = time.perf_counter()
            run()
            times.append(time.perf_counter() - between)
            ratios.append((between - begun) / times[-1])
        report[f"{what}, of {yardstick}"] = ratios
        print(f"{what:28s} {statistics.median(times):7.2f} s [{min(times):.2f}, {max(times):.2f}]   {yardstick} in "
              f"{statistics.median(ratios):.2f} [{min(ratios):.2f}, {max(ratios):.2f}] of it")  # fmt: skip

    def opened():
        maps = open_maps(args.folder)
        assert "none" not in maps  # asks for the keys
        return maps

    compare("open and find keys", opened, "pyarrow's columns in a dict", lambda: bare_keys(args.folder))
    maps = opened()
    keys = list(maps)
    asked = random.Random(0).choices(keys[: 100 * args.samples], k=200_000)
    plain = {key: maps[key] for key in asked}

    def look_up(source):
        for key in asked:
            source[key]

    compare("200,000 look-ups, warm", lambda: look_up(maps), "a dict of arrays", lambda: look_up(plain))
    compare("table of four columns", lambda: maps.table(COLUMNS), "pyarrow alone", lambda: bare_table(args.folder))
    compare(
        "verify, every byte",
        lambda: verify_store(args.folder),
        "zarr, pyarrow and SHA-256",
        lambda: bare_pass(args.folder),
    )
    if args.json:
        args.json.write_text(json.dumps({"ratios": report}, indent=2) + "\n")


if __name__ == "__main__":
    main()
