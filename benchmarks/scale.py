"""What a data set of a given size takes: measurements of a store of that size, and a cost model for larger ones.

    python benchmarks/scale.py make FOLDER --shards 14000     # 14 million maps, 1,000 a shard
    python benchmarks/scale.py measure FOLDER
    python benchmarks/scale.py lists --shards 1000000         # manifest and shards.json of a billion samples
    python benchmarks/scale.py plan --shards 100000           # an epoch's order without files
    python benchmarks/scale.py requests                       # what a shard asks of an object store
    python benchmarks/scale.py model

`make` writes an index with keys of its own for every shard. Only 16 arrays are written, by the store's own writer; the
other shards are hard links to them, and the tars are sparse files that nothing reads. So 14 million maps take minutes
and 1.0 GB, and their arrays are read from the page cache. Each figure of `measure` comes from a process of its own;
memory is what its peak adds to the imports.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from measure import status_bytes
from store import made_up_shard, synthetic_provenance

from zpipe.pipeline.extract import ExtractConfig, extract_teacher_maps
from zpipe.pipeline.make_shards import SceneSource, make_shards
from zpipe.pipeline.scenes import SceneConfig
from zpipe.pipeline.verify import verify_store
from zpipe.schemas.manifest import MapShard, StoreManifest, read_manifest, write_extraction, write_manifest
from zpipe.schemas.relevance_maps import RelevanceMaps
from zpipe.schemas.relevance_store import index_path, maps_path, read_seal, write_shard
from zpipe.schemas.shard_index import ShardEntry, ShardIndex, digest_file, digest_keys, read_index, write_index
from zpipe.schemas.storage import as_path
from zpipe.train.data.loader import RelevanceLoader

DONORS = 16
TAR_BYTES = 110_000_000  # 1,000 photos of ImageNet
NO_DIGEST = "0" * 64


# -------------------------------------------------------------------------------------------------- a store of any size


def make(folder: Path, shards: int, samples: int) -> None:
    """A finished store in FOLDER/maps and its tars, sparse, in FOLDER/shards."""
    root, tars = folder / "maps", folder / "shards"
    tars.mkdir(parents=True)
    provenance = synthetic_provenance()
    write_extraction(root, provenance)
    rng = np.random.default_rng(0)
    donors: list[tuple[str, pa.Table, bytes]] = []
    listed, entries = [], []
    for number in range(shards):
        stem = f"shard-{number:06d}"
        if number < DONORS:
            stored, index = made_up_shard(rng, number, samples)
            write_shard(root, stem, stored, index, input_sha256=NO_DIGEST, fingerprint=provenance.fingerprint())
            keys = index["key"].to_pylist()
            donors.append((stem, index, (maps_path(root, stem) / "zarr.json").read_bytes()))
        else:
            donor, index, description = donors[number % DONORS]
            keys = [f"{key[:9]}_{number * samples + row}" for row, key in enumerate(index["key"].to_pylist())]
            _link_array(
                maps_path(root, donor), maps_path(root, stem), description.replace(donor.encode(), stem.encode())
            )
            seal = read_seal(root, donor)
            index = index.set_column(0, index.schema.field("key"), pa.array(keys))
            pq.write_table(index.replace_schema_metadata(vars(seal)), index_path(root, stem), compression="zstd")
        digest = digest_file(index_path(root, stem))
        listed.append(MapShard(stem=stem, count=samples, input_sha256=NO_DIGEST, index_sha256=digest))
        with open(tars / f"{stem}.tar", "wb") as file:
            file.truncate(TAR_BYTES)
        entries.append(
            ShardEntry(
                name=f"{stem}.tar",
                count=samples,
                bytes=TAR_BYTES,
                sha256=NO_DIGEST,
                keys_sha256=digest_keys(keys),
            )
        )
    write_index(tars, ShardIndex(shards=tuple(entries), source="synthetic"))
    manifest = StoreManifest(
        provenance=provenance,
        shards=tuple(listed),
        statuses={"ok": shards * samples},
        source="synthetic",
        zpipe_version="0",
    )
    write_manifest(root, manifest)


def _link_array(donor: Path, target: Path, description: bytes) -> None:
    for path in donor.rglob("*"):
        if path.is_file() and path.name != "zarr.json":
            (target / path.relative_to(donor)).parent.mkdir(parents=True, exist_ok=True)
            os.link(path, target / path.relative_to(donor))
    (target / "zarr.json").write_bytes(description)


# --------------------------------------------------------------------------------------------------------- measurements


@dataclass(frozen=True, kw_only=True)
class Setting:
    """The settings of a measurement; ranks, workers (per rank) and batch (per rank) are those of the training job."""

    folder: Path
    shards: int
    samples: int
    ranks: int
    workers: int
    batch: int


def _loader(setting: Setting, **options: Any) -> RelevanceLoader:
    return RelevanceLoader(
        setting.folder / "shards",
        setting.folder / "maps",
        batch_size=setting.batch,
        num_workers=setting.workers,
        world_size=setting.ranks,
        **options,
    )


def _opened(setting: Setting) -> Callable[[], Any]:
    return lambda: RelevanceMaps(setting.folder / "maps")


def _keys(setting: Setting) -> Callable[[], Any]:
    maps = RelevanceMaps(setting.folder / "maps")

    def run() -> RelevanceMaps:
        assert "none" not in maps
        return maps

    return run


def _verified(setting: Setting) -> Callable[[], Any]:
    def run() -> None:
        problems = verify_store(setting.folder / "maps", setting.folder / "shards")
        assert not problems, problems[:3]

    return run


def _planned(setting: Setting) -> Callable[[], Any]:
    loader = _loader(setting)
    return lambda: loader.plan(0)


def _planned_without_files(setting: Setting) -> Callable[[], Any]:
    """The loader's order alone, for sizes whose files would not fit here."""
    loader = RelevanceLoader.__new__(RelevanceLoader)
    loader.train, loader.seed, loader.repeats = True, 0, 1
    loader.batch_size, loader.num_workers = setting.batch, setting.workers
    loader.rank, loader.world_size = 0, setting.ranks
    entry = np.arange(setting.samples)
    loader.shards = [None] * setting.shards
    loader._rows = [entry] * setting.shards
    loader._lanes = loader._own_lanes()
    return lambda: loader.plan(0)


MEASURES: dict[str, Callable[[Setting], Callable[[], Any]]] = {
    "open the store": _opened,
    "find all keys": _keys,
    "verify, every byte, against the tars' index": _verified,
    "make a loader": lambda setting: lambda: _loader(setting),
    "make a loader that skips images without a map": lambda setting: lambda: _loader(setting, missing="skip"),
    "order of an epoch, one worker's": _planned,
}


def _measured(prepare: Callable[[], Callable[[], Any]]) -> dict[str, float]:
    """Seconds of what `prepare` returns, and bytes that its peak and what it returns add to this process."""
    run = prepare()
    before = status_bytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark back to what is held now
    begun, spent = time.perf_counter(), time.process_time()
    kept = run()
    seconds, cpu = time.perf_counter() - begun, time.process_time() - spent
    found = {"seconds": seconds, "cpu": cpu, "peak": status_bytes("VmHWM") - before}
    found["kept"] = status_bytes("VmRSS") - before
    del kept
    return found


def measure(args: argparse.Namespace) -> None:
    for name in MEASURES:
        if args.only not in name:
            continue
        command = [sys.executable, __file__, "one", str(args.folder), "--name", name]
        for option in ("ranks", "workers", "batch"):
            command += [f"--{option}", str(getattr(args, option))]
        done = subprocess.run(command, capture_output=True, text=True, env=dict(os.environ, OMP_NUM_THREADS="1"))
        if done.returncode:
            raise SystemExit(f"{name}: {done.stderr[-2000:]}")
        print_measurement(name, json.loads(done.stdout.splitlines()[-1]))


def print_measurement(name: str, found: dict[str, float]) -> None:
    print(
        f"{name:48s} {found['seconds']:8.2f} s ({found['cpu']:.2f} s of CPU)   "
        f"peak +{found['peak'] / 1e6:,.0f} MB, kept +{found['kept'] / 1e6:,.0f} MB",
        flush=True,
    )


def lists(shards: int, samples: int) -> None:
    """Manifest and shard index of that many shards, without the shards."""
    with tempfile.TemporaryDirectory(prefix="zpipe-benchmark-") as scratch:
        root = Path(scratch)
        stems = [f"shard-{number:07d}" for number in range(shards)]
        digests = [digest_keys([stem]) for stem in stems]
        pairs = list(zip(stems, digests, strict=True))
        manifest = StoreManifest(
            provenance=synthetic_provenance(),
            shards=tuple(MapShard(stem=s, count=samples, input_sha256=d, index_sha256=d) for s, d in pairs),
            statuses={"ok": shards * samples},
            source="synthetic",
            zpipe_version="0",
        )
        index = ShardIndex(
            shards=tuple(
                ShardEntry(name=f"{s}.tar", count=samples, bytes=TAR_BYTES, sha256=d, keys_sha256=d) for s, d in pairs
            )
        )
        print_measurement("write manifest.json", _measured(lambda: lambda: write_manifest(root, manifest)))
        print_measurement("write shards.json", _measured(lambda: lambda: write_index(root, index)))
        print_measurement("read manifest.json", _measured(lambda: lambda: read_manifest(root)))
        print_measurement("read shards.json", _measured(lambda: lambda: read_index(root)))
        for name in ("manifest.json", "shards.json"):
            size = (root / name).stat().st_size
            print(f"{name}: {size / 1e6:,.0f} MB, {size / shards:.0f} bytes a shard")


# ------------------------------------------------------------------------------------------------ requests of one shard


def requests() -> dict[str, dict[str, float]]:
    """Requests per shard by stage and method, counted by an S3 server in this process for 12 and for 4 shards."""
    few, many = _requests(4), _requests(12)
    found = {}
    for stage in few:
        methods = sorted(few[stage] | many[stage])
        found[stage] = {method: (many[stage][method] - few[stage][method]) / 8 for method in methods}
        found[stage]["once"] = sum(few[stage].values()) - 4 * sum(found[stage].values())
    return found


def _requests(shards: int) -> dict[str, Counter[str]]:
    from moto.server import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import WSGIRequestHandler, make_server

    counted: Counter[str] = Counter()
    backend = DomainDispatcherApplication(create_backend_app)

    def counting(environ: dict[str, Any], start_response: Any) -> Any:
        listing = "list-type" in environ.get("QUERY_STRING", "")
        counted["LIST" if listing else environ["REQUEST_METHOD"]] += 1
        return backend(environ, start_response)

    class Quiet(WSGIRequestHandler):
        def log(self, *_: object) -> None:
            pass

    server = make_server("127.0.0.1", 0, counting, threaded=True, request_handler=Quiet)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    os.environ.update(
        AWS_ACCESS_KEY_ID="a",
        AWS_SECRET_ACCESS_KEY="b",
        AWS_DEFAULT_REGION="us-east-1",
        AWS_ENDPOINT_URL=f"http://127.0.0.1:{server.server_port}",
    )
    name = f"bucket{shards}"
    bucket = as_path(f"s3://{name}")
    type(bucket.fs).clear_instance_cache()  # or the second server's bucket would be looked for on the first
    bucket = as_path(f"s3://{name}")
    bucket.fs.mkdir(name)
    with tempfile.TemporaryDirectory(prefix="zpipe-benchmark-") as scratch:
        tars = Path(scratch) / "shards"
        make_shards(SceneSource(count=4 * shards, split="train", seed=0, config=SceneConfig(), shard_size=4), tars)
        for path in tars.iterdir():
            bucket.fs.put_file(str(path), f"{name}/shards/{path.name}")
    config = ExtractConfig(
        teacher="deit_tiny_patch16_224",
        weights="random",
        num_classes=10,
        teacher_args={"depth": 1, "embed_dim": 48, "num_heads": 3},
        executor="local",
        device="cpu",
        threads=1,
    )
    tars_url, maps_url = f"s3://{name}/shards", f"s3://{name}/maps"
    found = {}

    def count(stage: str, run: Callable[[], Any]) -> None:
        counted.clear()
        run()
        found[stage] = Counter(counted)

    count("extract", lambda: extract_teacher_maps(tars_url, maps_url, config))
    count("extract again, nothing to do", lambda: extract_teacher_maps(tars_url, maps_url, config))
    count("verify against the tars' index", lambda: verify_store(as_path(maps_url), as_path(tars_url)))
    count("open and find all keys", lambda: list(RelevanceMaps(maps_url)))
    loader = RelevanceLoader(tars_url, maps_url, batch_size=4)
    count("an epoch of training, one reader a shard", lambda: deque(loader, maxlen=0))
    server.shutdown()
    return found


# ----------------------------------------------------------------------------------------------------------- cost model

# Bytes, seconds of one core and requests, of a sample or of a shard, as the commands above and benchmarks/store.py
# printed them; docs/scale.md names the machine.
A_SAMPLE = {
    "tar, GB": (110e3, 1e9),
    "store with index, GB": (395, 1e9),
    "verify, core hours": (6.9e-6, 3600),
    "verify, GB of memory": (30, 1e9),
    "find all keys, s": (1.2e-6, 1),
    "find all keys, GB of memory": (205, 1e9),
    "order of an epoch, s in each worker": (74e-9, 1),
    "order of an epoch, GB of memory in each worker": (18, 1e9),
    "skip images without a map: reading the index, s": (0.7e-6, 1),
}
A_SHARD = {
    "shards, Ray tasks": (1, 1),
    "manifest.json, MB": (244, 1e6),
    "shards.json, MB": (267, 1e6),
    "open the store, s": (3.7e-6, 1),
    "lists of shards in memory (driver, loader), MB": (673 + 750, 1e6),
    "extract, requests": (11, 1),
    "verify, requests": (11, 1),
    "find all keys, requests": (2, 1),
    "an epoch, requests, one reader a shard": (13, 1),
}
# Name, samples, samples a shard.
SIZES = (
    ("ImageNet-1k", 1_281_167, 1000),
    ("ImageNet-21k", 14_197_122, 1000),
    ("a billion", 10**9, 1000),
    ("in larger shards", 10**9, 10_000),
)


def model() -> list[str]:
    """The cost model as a Markdown table: every term is linear, in samples or in shards."""
    lines = ["| | " + " | ".join(name for name, _, _ in SIZES) + " |", "|---" * (len(SIZES) + 1) + "|"]
    for terms, of_shard in ((A_SHARD, True), (A_SAMPLE, False)):
        for name, (each, unit) in terms.items():
            cells = []
            for _, samples, size in SIZES:
                amount = each * (-(-samples // size) if of_shard else samples) / unit
                cells.append(f"{amount:,.0f}" if amount >= 100 else f"{amount:.2g}")
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["make", "measure", "one", "lists", "plan", "requests", "model"])
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--shards", type=int, default=14_000)
    parser.add_argument("--samples", type=int, default=1000, help="a shard")
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--workers", type=int, default=8, help="of each rank")
    parser.add_argument("--batch", type=int, default=128, help="of each rank")
    parser.add_argument("--only", default="", help="measurements whose name contains this")
    parser.add_argument("--name", help=argparse.SUPPRESS)
    args = parser.parse_args()
    pa.set_cpu_count(1)
    if args.what in ("make", "measure", "one") and args.folder is None:
        parser.error(f"{args.what} takes a FOLDER")
    setting = Setting(
        folder=args.folder or Path(),
        shards=args.shards,
        samples=args.samples,
        ranks=args.ranks,
        workers=args.workers,
        batch=args.batch,
    )
    if args.what == "make":
        begun = time.perf_counter()
        make(args.folder, args.shards, args.samples)
        print(f"made in {time.perf_counter() - begun:.0f} s")
    elif args.what == "measure":
        measure(args)
    elif args.what == "one":
        print(json.dumps(_measured(lambda: MEASURES[args.name](setting))))
    elif args.what == "lists":
        lists(args.shards, args.samples)
    elif args.what == "requests":
        for stage, counts in requests().items():
            print(f"{stage:44s} " + ", ".join(f"{method} {count:g}" for method, count in counts.items()))
    elif args.what == "model":
        print("\n".join(model()))
    elif args.what == "plan":
        print_measurement(
            f"order of {args.shards * args.samples:,} samples", _measured(lambda: _planned_without_files(setting))
        )


if __name__ == "__main__":
    main()
