"""How fast a store of ImageNet's size opens, answers and is verified. Makes a synthetic one of 1,281 shards.

    python benchmarks/store.py FOLDER [--shards 1281] [--samples 1000]

FOLDER keeps the store (0.5 GB); a second call measures it again without making it. One core: thread counts are set to 1.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from pathlib import Path

import numpy as np
import pyarrow as pa

from zpipe import open_maps
from zpipe.pipeline.verify import verify_store
from zpipe.schemas.manifest import MANIFEST_NAME, MapShard, Provenance, StoreManifest, write_extraction, write_manifest
from zpipe.schemas.relevance_store import INDEX_SCHEMA, concentration, encode_maps, index_path, write_shard
from zpipe.schemas.shard_index import digest_file
from zpipe.schemas.storage import folder_bytes

GRID = (14, 14)


def make_store(root: Path, shards: int, samples: int) -> None:
    """Maps drawn at random, with the spread of scales that real ones have."""
    provenance = Provenance(
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
    write_extraction(root, provenance)
    rng = np.random.default_rng(0)
    listed = []
    for number in range(shards):
        stem = f"shard-{number:06d}"
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
        }
        index = pa.table({name: pa.array(columns[name]).cast(INDEX_SCHEMA.field(name).type) for name in columns})
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shards", type=int, default=1281)
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    pa.set_cpu_count(1)
    if not (args.folder / MANIFEST_NAME).is_file():
        begun = time.perf_counter()
        make_store(args.folder, args.shards, args.samples)
        print(f"made in {time.perf_counter() - begun:.0f} s")
    count = args.shards * args.samples
    print(f"{count:,} maps in {args.shards} shards, {folder_bytes(args.folder) / count:.0f} bytes a sample")

    def told(what: str, run) -> None:
        times = []
        for _ in range(args.rounds):
            begun = time.perf_counter()
            run()
            times.append(time.perf_counter() - begun)
        print(f"{what:44s} {statistics.median(times):7.2f} s [{min(times):.2f}, {max(times):.2f}]")

    def opened():
        maps = open_maps(args.folder)
        assert "none" not in maps  # asks for the keys
        return maps

    told("open and find keys", opened)
    maps = opened()
    keys = list(maps)
    asked = random.Random(0).choices(keys[: 100 * args.samples], k=200_000)
    for key in asked:
        maps[key]

    def look_up():
        for key in asked:
            maps[key]

    told(f"{len(asked):,} look-ups, warm", look_up)
    told("table of four columns", lambda: maps.table(["key", "label", "predicted", "entropy"]))
    args.rounds = min(args.rounds, 2)
    told("verify, every byte", lambda: verify_store(args.folder))


if __name__ == "__main__":
    main()
