"""Images per second and core of the loader and of other loaders, on the same JPEGs, transform and core.

    python benchmarks/loader.py --photos FOLDER [--pillow FOLDER]
    python benchmarks/loader.py --parent 2 8

Each loader runs in a process of its own, with one thread and no workers, in turn with the others. The baseline is this
loader without maps. The transform is a random resized crop to 224, a flip, and a uint8 tensor (webdataset's documented
pipeline ends with ToTensor and Normalize, and so it does here). FOLDER is an ImageFolder tree or has a labels.csv;
without it, photos are generated. --pillow names a folder with plain Pillow (pip install --no-deps --target FOLDER
pillow), for the loaders named +pillow. litdata and streaming are run where they are installed.

--parent measures something else: the CPU time per image of the process that iterates over the loader, with that many
data-loading processes, which decode tiny JPEGs. The yardstick is one copy of as many bytes in the same process.
"""

from __future__ import annotations

import argparse
import importlib.util
import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SIZE, BATCH = 224, 64
PARENT_BATCH, PARENT_BATCHES, WARM_UP = 256, 16, 4
YARDSTICK = "zpipe, no maps"


def transform() -> Any:
    from torchvision.transforms import v2

    steps = [
        v2.RandomResizedCrop(SIZE, interpolation=v2.InterpolationMode.BICUBIC),
        v2.RandomHorizontalFlip(),
        v2.PILToTensor(),
    ]
    return v2.Compose(steps)


def ours(root: Path) -> Iterator[Any]:
    from zpipe.train.data.loader import RelevanceLoader

    return forever(RelevanceLoader(root / "shards", root / "maps", batch_size=BATCH))


def ours_without_maps(root: Path) -> Iterator[Any]:
    from zpipe.train.data.loader import RelevanceLoader

    return forever(RelevanceLoader(root / "shards", batch_size=BATCH))


def webdataset_documented(root: Path) -> Iterator[Any]:
    """The pipeline of webdataset's documentation for ImageNet."""
    import webdataset as wds
    from torchvision import transforms

    steps = transforms.Compose(
        [
            transforms.RandomResizedCrop(SIZE),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ]
    )
    urls = sorted(str(path) for path in (root / "shards").glob("*.tar"))
    data = (
        wds.WebDataset(urls, resampled=True, shardshuffle=False, empty_check=False)
        .shuffle(1000)
        .decode("pil")
        .to_tuple("jpg;png;jpeg", "cls")
        .map_tuple(lambda image: steps(image.convert("RGB")), lambda label: label)
        .batched(BATCH)
    )
    return iter(wds.WebLoader(data, batch_size=None, num_workers=0))


def torchvision_folder(root: Path) -> Iterator[Any]:
    from torch.utils.data import DataLoader
    from torchvision.datasets import ImageFolder

    return forever(DataLoader(ImageFolder(root / "photos", transform()), batch_size=BATCH, shuffle=True, num_workers=0))


def litdata(root: Path) -> Iterator[Any]:
    from litdata import StreamingDataLoader, StreamingDataset
    from PIL import Image

    class Photos(StreamingDataset):
        steps = transform()

        def __getitem__(self, index):
            item = super().__getitem__(index)
            return self.steps(Image.open(io.BytesIO(item["image"])).convert("RGB")), item["label"]

    return forever(StreamingDataLoader(Photos(str(root / "litdata"), shuffle=True), batch_size=BATCH, num_workers=0))


def streaming(root: Path) -> Iterator[Any]:
    from PIL import Image
    from streaming import StreamingDataset
    from torch.utils.data import DataLoader

    class Photos(StreamingDataset):
        steps = transform()

        def __getitem__(self, index):
            item = super().__getitem__(index)
            return self.steps(Image.open(io.BytesIO(item["image"])).convert("RGB")), item["label"]

    data = Photos(local=str(root / "mds"), shuffle=True, batch_size=BATCH)
    return forever(DataLoader(data, batch_size=BATCH, num_workers=0))


CONTENDERS = {
    "zpipe, no maps": ours_without_maps,
    "zpipe with maps": ours,
    "webdataset": webdataset_documented,
    "torchvision": torchvision_folder,
    "litdata": litdata,
    "streaming": streaming,
}


def forever(loader: Any) -> Iterator[Any]:
    while True:
        yield from loader


def child(name: str, root: Path, images: int) -> None:
    import torch

    torch.set_num_threads(1)
    begun = time.perf_counter()
    batches = CONTENDERS[name](root)
    next(batches)
    first = time.perf_counter() - begun
    begun, spent = time.perf_counter(), time.process_time()
    for _ in range(images // BATCH):
        next(batches)
    images = images // BATCH * BATCH
    wall, cpu = time.perf_counter() - begun, time.process_time() - spent
    print(json.dumps({"wall": images / wall, "cpu": images / cpu, "first": first}), flush=True)
    os._exit(0)  # some contenders leave threads behind


def parent_child(workers: int, root: Path) -> None:
    """CPU time of this process in microseconds per image: of the loader, and of a copy of its images."""
    import numpy as np
    import torch

    from zpipe.train.data.loader import RelevanceLoader

    torch.set_num_threads(1)
    batches = iter(RelevanceLoader(root / "shards", batch_size=PARENT_BATCH, image_size=SIZE, num_workers=workers))
    for _ in range(WARM_UP):
        batch = next(batches)
    spent = time.process_time()
    for _ in range(WARM_UP, PARENT_BATCHES):
        batch = next(batches)  # which is held while the next one is made, as in a loop
    loader = (time.process_time() - spent) / (PARENT_BATCHES - WARM_UP) / PARENT_BATCH * 1e6
    source = np.ones(batch["image"].nbytes, np.uint8)
    target = source.copy()
    spent = time.process_time()
    for _ in range(PARENT_BATCHES):
        np.copyto(target, source)
    copy = (time.process_time() - spent) / PARENT_BATCHES / PARENT_BATCH * 1e6
    print(json.dumps({"loader": loader, "copy": copy}))


def measure_parent(counts: list[int], rounds: int) -> dict[str, list[float]]:
    """Print the parent's CPU time with each number of workers; return the ratios to the yardstick, higher is better."""
    import numpy as np
    from PIL import Image

    from zpipe.pipeline.make_shards import FolderSource, make_shards

    found: dict[int, list[dict[str, float]]] = {count: [] for count in counts}
    with tempfile.TemporaryDirectory(prefix="zpipe-benchmark-") as scratch:
        rng, root = np.random.default_rng(0), Path(scratch)
        for number in range(PARENT_BATCH * PARENT_BATCHES):
            target = root / "photos" / f"c{number % 10}" / f"{number:06d}.jpg"
            target.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(target)
        make_shards(FolderSource(root / "photos", shard_size=256, shuffle_seed=0, key_rule="stem"), root / "shards")
        for _ in range(rounds):
            for count in counts:
                line = [sys.executable, "-W", "ignore", __file__, "--parent-child", str(count), scratch]
                done = subprocess.run(line, capture_output=True, text=True, env=dict(os.environ, OMP_NUM_THREADS="1"))
                if done.returncode:
                    raise SystemExit(f"{count} workers: {done.stderr[-2000:]}")
                found[count].append(json.loads(done.stdout.splitlines()[-1]))
    print(f"{rounds} rounds; microseconds of the parent's CPU time per image; of a copy of its bytes; their ratio")
    report = {}
    for count, runs in found.items():
        columns = [[run["loader"] for run in runs], [run["copy"] for run in runs]]
        columns.append([loader / copy for loader, copy in zip(*columns, strict=True)])
        shown = (f"{statistics.median(each):7.2f} [{min(each):.2f}, {max(each):.2f}]" for each in columns)
        print(f"{count} workers", *shown)
        report[f"copy, of the parent of {count} workers"] = [1 / ratio for ratio in columns[2]]
    return report


def prepare(root: Path, photos: Path | None, copies: int) -> list[str]:
    """The same JPEGs as ImageFolder, tars, and the other formats that can be made here; what can be run."""
    from extraction import make_photos

    from zpipe.pipeline.extract import ExtractConfig, extract_teacher_maps
    from zpipe.pipeline.make_shards import FolderSource, make_shards

    if photos is None:
        make_photos(root / "some", 250)
        photos = root / "some"
    images = sorted(path for path in photos.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg", ".png"))
    for number in range(copies * len(images)):
        target = root / "photos" / f"c{number % 10}" / f"{number:06d}.jpg"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(images[number % len(images)].read_bytes())
    make_shards(FolderSource(root / "photos", shard_size=500, shuffle_seed=0, key_rule="stem"), root / "shards")
    teacher = {"depth": 1, "embed_dim": 48, "num_heads": 3}
    config = ExtractConfig(
        teacher="deit_tiny_patch16_224",
        weights="random",
        num_classes=10,
        teacher_args=teacher,
        executor="local",
        device="cpu",
    )
    extract_teacher_maps(root / "shards", root / "maps", config)
    paths = sorted((root / "photos").rglob("*.jpg"))
    names = [name for name in CONTENDERS if name not in ("litdata", "streaming")]
    if importlib.util.find_spec("streaming"):
        from streaming import MDSWriter

        with MDSWriter(out=str(root / "mds"), columns={"image": "bytes", "label": "int"}) as writer:
            for path in paths:
                writer.write({"image": path.read_bytes(), "label": int(path.parent.name[1:])})
        names.append("streaming")
    if importlib.util.find_spec("litdata"):
        from litdata.streaming.writer import BinaryWriter

        writer = BinaryWriter(str(root / "litdata"), chunk_bytes="64MB")
        for number, path in enumerate(paths):
            writer.add_item(number, {"image": path.read_bytes(), "label": int(path.parent.name[1:])})
        writer.done()
        writer.merge()
        names.append("litdata")
    return names


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=Path)
    parser.add_argument("--pillow", type=Path)
    parser.add_argument("--copies", type=int, default=16)
    parser.add_argument("--images", type=int, default=1500)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--names", nargs="+", choices=list(CONTENDERS), help="only these, beside the yardstick")
    parser.add_argument("--parent", nargs="+", type=int, metavar="WORKERS", help="measure the parent process only")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--parent-child", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.parent_child:
        parent_child(int(args.parent_child[0]), Path(args.parent_child[1]))
        return
    if args.parent:
        report = measure_parent(args.parent, args.rounds)
        if args.json:
            args.json.write_text(json.dumps({"ratios": report}, indent=2) + "\n")
        return
    if args.child:
        child(args.child[0], Path(args.child[1]), args.images)
    with tempfile.TemporaryDirectory(prefix="zpipe-benchmark-") as scratch:
        names = prepare(Path(scratch), args.photos, args.copies)
        if args.names:
            names = [name for name in names if name in (YARDSTICK, *args.names)]
        if args.pillow:
            names += ["webdataset+pillow", "torchvision+pillow"]
        found: dict[str, list[dict[str, float]]] = {name: [] for name in names}
        for _ in range(args.rounds):
            for name in names:
                environment = dict(os.environ, OMP_NUM_THREADS="1")
                if name.endswith("+pillow"):
                    environment["PYTHONPATH"] = str(args.pillow)
                line = [
                    sys.executable,
                    __file__,
                    "--images",
                    str(args.images),
                    "--child",
                    name.removesuffix("+pillow"),
                    scratch,
                ]
                done = subprocess.run(line, capture_output=True, text=True, env=environment)
                if done.returncode:
                    raise SystemExit(f"{name}: {done.stderr[-2000:]}")
                found[name].append(json.loads(done.stdout.splitlines()[-1]))
    import PIL

    print(f"PIL {PIL.__version__}, {args.images} images a run, {args.rounds} rounds")
    print(
        "images/s of wall clock; images per second of CPU time and its ratio to this loader's without maps; first batch"
    )
    base, report = found[YARDSTICK], {}
    for name, runs in found.items():
        walls, cpus = [run["wall"] for run in runs], [run["cpu"] for run in runs]
        ratios = [run["cpu"] / other["cpu"] for run, other in zip(runs, base, strict=True)]
        first = statistics.median(run["first"] for run in runs)
        if name.startswith("zpipe"):
            report[f"{name}, of {YARDSTICK}"] = ratios
        else:  # so that higher is better for us
            report[f"{YARDSTICK}, of {name}"] = [1 / ratio for ratio in ratios]
        print(
            f"{name:20s} {statistics.median(walls):5.0f} [{min(walls):.0f}, {max(walls):.0f}]"
            f"   {statistics.median(cpus):5.0f} [{min(cpus):.0f}, {max(cpus):.0f}]"
            f"   {statistics.median(ratios):6.3f} [{min(ratios):.3f}, {max(ratios):.3f}]   {first:5.2f} s"
        )
    if args.json:
        del report[f"{YARDSTICK}, of {YARDSTICK}"]
        args.json.write_text(json.dumps({"ratios": report}, indent=2) + "\n")


if __name__ == "__main__":
    main()
