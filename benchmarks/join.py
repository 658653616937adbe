"""What it costs to join maps with images by image: at the start for a data set of ImageNet's size, and for each image.

    python benchmarks/join.py FOLDER --photos FOLDER [--shards 1281] [--samples 1000] [--rounds 7]

FOLDER keeps a synthetic store (see store.py) and indexes of the same images in another order, 0.6 GB. The join runs in
a process of its own, whose largest memory is reported with that of the same imports alone. Then loaders of the photos
take turns in one process, block by block of batches: without maps, with one map and with three tensors, by tar and by
image. The yardstick is the loader without maps; ratios are of images per second of CPU time. One thread, no workers.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from store import make_store

from zpipe import open_maps
from zpipe.pipeline.make_shards import FolderSource, make_shards
from zpipe.pipeline.save_tensors import save_tensors
from zpipe.schemas.image_join import digest_column
from zpipe.schemas.manifest import MANIFEST_NAME
from zpipe.schemas.shard_images import digest_images, write_images
from zpipe.schemas.shard_index import ShardEntry, ShardIndex, digest_keys, read_index, write_index
from zpipe.train.data.loader import RelevanceLoader
from zpipe.train.data.map_stores import ImageStore
from zpipe.train.data.stream import Shard, read_tar

BATCH = 64


def make_indexes(store: Path, folder: Path, samples: int) -> None:
    """Indexes of the images of a store, shuffled over tars, which are not made."""
    table = open_maps(store, check=False).table(["image_digest", "label"])
    digests, labels = digest_column(table["image_digest"]), table["label"].to_numpy()
    order = np.random.default_rng(1).permutation(len(labels))
    entries = []
    for start in range(0, len(order), samples):
        rows = order[start : start + samples].tolist()
        images = [(f"{start + i:08d}", int(labels[row]), bytes(digests[row])) for i, row in enumerate(rows)]
        stem = f"other-{start // samples:06d}"
        write_images(folder, stem, images)
        keys = digest_keys(key for key, *_ in images)
        sizes = {"count": len(images), "bytes": 512 * len(images)}
        entry = ShardEntry(
            name=f"{stem}.tar", sha256="0" * 64, keys_sha256=keys, images_sha256=digest_images(images), **sizes
        )
        entries.append(entry)
    write_index(folder, ShardIndex(shards=tuple(entries)))


def join(store: Path, folder: Path) -> None:
    """Print how long the join takes, and the memory of the process before and after."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    shards = [Shard(path=folder / entry.name, entry=entry) for entry in read_index(folder).shards]
    start = time.perf_counter()
    found = ImageStore(open_maps(store), shards, folder)
    joined = time.perf_counter()
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    found.copy()
    copied = time.perf_counter()
    times = {"join_s": round(joined - start, 2), "copy_s": round(copied - joined, 2)}
    print(json.dumps({"found": found.found, "of": found.count, "mb": round(after - before)} | times))


def loaders(photos: Path, root: Path) -> dict[str, RelevanceLoader]:
    shards = root / "shards"
    source = FolderSource(photos, shard_size=100, shuffle_seed=0, key_rule="path")
    make_shards(source, shards)
    rng = np.random.default_rng(0)
    shapes = {"relevance": ("map", (14, 14)), "logits": ("vector", (1000,)), "top": ("class-maps", (5, 14, 14))}
    for name, (kind, shape) in shapes.items():
        save_tensors(shards, root / name, lambda _, shape=shape: rng.random(shape), name=name, kind=kind, shape=shape)
    one, three = {"relevance": root / "relevance"}, {name: root / name for name in shapes}
    made = {"no maps": {}, "one map": {"maps": one}, "three tensors": {"maps": three}}
    made |= {f"{name}, by image": options | {"join": "image"} for name, options in made.items() if options}
    return {name: RelevanceLoader(shards, batch_size=BATCH, **options) for name, options in made.items()}


def compare(photos: Path, rounds: int) -> None:
    """Print the images/s of each loader relative to that without maps, medians and ranges over blocks."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as root:
        streams = {}
        for name, loader in loaders(photos, Path(root)).items():
            streams[name] = forever(loader)
            next(streams[name])
            print(json.dumps({"loader": name, "microseconds a sample": finding(loader)}))
        seconds: dict[str, list[float]] = {name: [] for name in streams}
        for _ in range(rounds):
            for name, stream in streams.items():
                start = time.process_time()
                for _ in range(4):
                    next(stream)
                seconds[name].append(time.process_time() - start)
        base = seconds["no maps"]
        for name, values in seconds.items():
            ratios = sorted(one / other for one, other in zip(base, values, strict=True))
            rate = 4 * BATCH / statistics.median(values)
            spread = f"{statistics.median(ratios):.3f} [{ratios[0]:.3f}, {ratios[-1]:.3f}]"
            print(json.dumps({"loader": name, "images_per_s": round(rate, 1), "of no maps": spread}))


def finding(loader: RelevanceLoader) -> dict[str, str]:
    """Microseconds of CPU time that finding a sample's tensor takes, by the name of the store."""
    keys = [[sample.key for sample in read_tar(shard)] for shard in loader.shards]
    found = {}
    for name, store in loader.stores.items():
        held = [store.read(number) for number in range(len(loader.shards))]
        passes = []
        for _ in range(7):
            start = time.process_time()
            for tensors, names in zip(held, keys, strict=True):
                for row, key in enumerate(names):
                    tensors.find(row, key)
            passes.append((time.process_time() - start) / sum(map(len, keys)) * 1e6)
        found[name] = f"{statistics.median(passes):.1f} [{min(passes):.1f}, {max(passes):.1f}]"
    return found


def forever(loader: RelevanceLoader):
    epoch = 0
    while True:
        loader.set_epoch(epoch)
        yield from loader
        epoch += 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--photos", type=Path)
    parser.add_argument("--shards", type=int, default=1281)
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--join-only", action="store_true", help=argparse.SUPPRESS)  # the process of its own
    args = parser.parse_args()
    store, folder = args.folder / "store", args.folder / "indexes"
    if args.join_only:
        join(store, folder)
        return
    if not (store / MANIFEST_NAME).exists():
        make_store(store, args.shards, args.samples)
    if not (folder / "shards.json").exists():
        make_indexes(store, folder, args.samples)
    for _ in range(3):
        subprocess.run([sys.executable, __file__, str(args.folder), "--join-only"], check=True)
    if args.photos is not None:
        compare(args.photos, args.rounds)


if __name__ == "__main__":
    main()
