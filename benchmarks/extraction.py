"""What extraction adds to the attribution itself, in one process and on Ray.

    python benchmarks/extraction.py --threads 2

Three variants take turns: the kernel alone, on decoded pixels in memory; `--executor local`, from a tar to the
committed map shard; and Ray with one actor. Teacher, batch and threads are the same, and one process works at a time.
Rates count from the first committed shard to the last, so they leave out loading the teacher and starting Ray, which
are printed separately. The images are synthetic: smooth colours under noise, 500 x 375, some 60 KB.
"""

from __future__ import annotations

import argparse
import io
import json
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from zpipe.pipeline.executor import Resources, run_local, run_ray
from zpipe.pipeline.explainer import PRECISIONS, ExplainConfig, Explainer
from zpipe.pipeline.make_shards import FolderSource, make_shards
from zpipe.pipeline.shard_reader import frame_image, open_shards, read_samples
from zpipe.pipeline.teacher import TeacherSpec, load_teacher
from zpipe.pipeline.worker import ShardTask, WorkerSpec, frame_of


def make_photos(folder: Path, count: int) -> None:
    rng = np.random.default_rng(0)
    (folder / "class").mkdir(parents=True)
    for number in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (9, 12, 3), dtype=np.uint8)).resize((500, 375), Image.BICUBIC)
        pixels = np.asarray(coarse, np.int16) + rng.integers(-12, 13, (375, 500, 3))
        buffer = io.BytesIO()
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=85)
        (folder / "class" / f"{number:05d}.jpg").write_bytes(buffer.getvalue())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", default="deit_small_patch16_224")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--shards", type=int, default=4)
    parser.add_argument("--samples", type=int, default=16, help="images a shard")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--precision", default="float32", choices=PRECISIONS)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    scratch = Path(tempfile.mkdtemp(prefix="zpipe-benchmark-"))
    make_photos(scratch / "photos", args.shards * args.samples)
    make_shards(
        FolderSource(scratch / "photos", shard_size=args.samples, shuffle_seed=0, key_rule="stem"), scratch / "shards"
    )
    tasks = [ShardTask(path=str(path), entry=entry) for path, entry in open_shards(scratch / "shards")[0]]

    begun = time.perf_counter()
    teacher_spec = TeacherSpec(name=args.teacher, weights="random")
    teacher = load_teacher(teacher_spec)
    load_s = time.perf_counter() - begun
    frame = frame_of(teacher, "full")
    settings = ExplainConfig(precision=args.precision)
    explain = Explainer(teacher, settings, batch_size=args.batch_size, device=args.device)
    pixels = np.stack(
        [frame_image(sample, frame).pixels for task in tasks for sample in read_samples(Path(task.path), task.entry)]
    )
    labels = np.zeros(len(pixels), np.int64)

    def spec(out: Path) -> WorkerSpec:
        return WorkerSpec(
            teacher=teacher_spec,
            teacher_digest=teacher.digest,
            fingerprint="benchmark",
            out=str(out),
            explain=settings,
            frame="full",
            batch_size=args.batch_size,
            threads=args.threads,
            sharing=1,
            device=args.device,
        )

    def kernel() -> float:
        first = args.samples
        explain(pixels[:first], labels[:first])
        begun = time.perf_counter()
        explain(pixels[first:], labels[first:])
        return (len(pixels) - first) / (time.perf_counter() - begun)

    first_maps = []

    def executor(run) -> float:
        out = scratch / "out"
        shutil.rmtree(out, ignore_errors=True)
        moments = [time.perf_counter()]

        def on_report(report) -> None:
            assert not report.error, report.error
            moments.append(time.perf_counter())

        run(spec(out), tasks, Resources(actors=1), on_report, lambda: None)
        if run is run_ray:
            first_maps.append(moments[1] - moments[0] - (moments[2] - moments[1]))
        return (len(pixels) - args.samples) / (moments[-1] - moments[1])

    candidates = {"local": lambda: executor(run_local), "ray": lambda: executor(run_ray)}
    print(
        f"{args.teacher} on {args.device} in {args.precision}, batch {args.batch_size}, {args.threads} threads, "
        f"torch {torch.__version__}"
    )
    kernel()
    rates: dict[str, list[float]] = {"kernel": [], "local": [], "ray": []}
    for _ in range(args.rounds):
        rates["kernel"].append(kernel())
        for name, run in candidates.items():
            rates[name].append(run())
    report: dict[str, list[float]] = {}
    for name, base in (("kernel", None), ("local", "kernel"), ("ray", "kernel"), ("ray", "local")):
        values = rates[name]
        line = f"{name:8s} {statistics.median(values):8.2f} images/s [{min(values):.2f}, {max(values):.2f}]"
        if base:
            ratios = [own / other for own, other in zip(values, rates[base], strict=True)]
            report[f"{name} of {base}"] = ratios
            line += f"   {statistics.median(ratios):.1%} of {base} [{min(ratios):.1%}, {max(ratios):.1%}]"
        print(line)
    print(f"loading the teacher here: {load_s:.1f} s")
    print(f"Ray, start to first map, its teacher's loading included: {statistics.median(first_maps):.1f} s")
    if args.json:
        args.json.write_text(json.dumps({"ratios": report}, indent=2) + "\n")
    shutil.rmtree(scratch)


if __name__ == "__main__":
    main()
