"""How busy an extraction keeps a GPU, with a stand-in for the GPU: a thread that takes `--ms` for each batch.

    python benchmarks/busy.py --shards 20 --samples 1000 --ms 64

Everything else is real: tars with members as large as JPEGs, which are read and hashed; the worker with its threads;
the store. Images are not decoded but filled with one row of pixels, as if enough threads had decoded them, and
launching a batch takes `--launch-ms` of the interpreter, as some thousand kernels do. Batches have 64 images, so 64 ms
are 1,000 images/s. Printed is the share of the time from the first to the last batch in which the stand-in worked, with
one shard at once and with two.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import tarfile
import tempfile
import threading
import time
from concurrent.futures import Future
from io import BytesIO
from pathlib import Path
from queue import SimpleQueue
from unittest import mock

import numpy as np

from zpipe.pipeline import shard_reader, worker
from zpipe.pipeline.explainer import ExplainConfig, Explained
from zpipe.pipeline.shard_reader import FramedImage, open_shards
from zpipe.pipeline.teacher import TeacherSpec, load_teacher
from zpipe.pipeline.worker import ShardTask, ShardWorker, WorkerSpec, process_all
from zpipe.schemas.geometry import Box
from zpipe.schemas.image_digest import image_digest

CLASSES = 1000


class StandIn:
    """A device that takes its time for each batch, one after the other.

    As a GPU it begins a batch when it is launched and the one before is done, whenever the host hears of that.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._queue: SimpleQueue = SimpleQueue()
        self.worked = self.begun = self.ended = 0.0
        threading.Thread(target=self._run, daemon=True).start()

    def launch(self) -> Future:
        """Queue a batch."""
        done: Future = Future()
        self._queue.put((time.perf_counter(), done))
        return done

    def _run(self) -> None:
        while True:
            launched, done = self._queue.get()
            self.begun = self.begun or launched
            self.ended = max(launched, self.ended) + self._seconds
            self.worked += self._seconds
            time.sleep(max(0.0, self.ended - time.perf_counter()))
            done.set_result(None)


class StandInExplainer:
    """As `Explainer` on CUDA, but the stand-in computes, and all maps are alike."""

    batch_size, notes = 64, ()

    def __init__(self, device: StandIn, launch_s: float) -> None:
        self._device, self._launch_s = device, launch_s
        self._lock = threading.Lock()
        rng = np.random.default_rng(0)
        self._maps = rng.random((self.batch_size, 14, 14), np.float32)
        self._logits = rng.random((self.batch_size, CLASSES), np.float32)

    def new_array(self, shape):
        return np.empty(shape, np.uint8)

    def begin(self, pixels, labels):
        with self._lock:
            end = time.thread_time() + self._launch_s
            while time.thread_time() < end:
                pass
            return _Launched(self._device.launch(), self._explained(len(pixels), labels))

    def _explained(self, count, labels):
        return Explained(
            self._maps[:count].copy(),
            self._logits[:count].copy(),
            labels,
            np.zeros((count, 14, 14, 0), np.float32),
        )


class _Launched:
    def __init__(self, done, value) -> None:
        self._done, self._value = done, value

    def result(self):
        self._done.result()
        return self._value


def fake_frame_image(sample, frame, out):
    """As `frame_image`, without decoding."""
    out[...] = 128
    box = Box(0.0, 0.0, 500.0, 375.0)
    digest = image_digest(sample.image)
    return FramedImage(key=sample.key, label=sample.label, pixels=out, width=500, height=375, frame=box, digest=digest)


def make_tars(folder: Path, shards: int, samples: int) -> list[ShardTask]:
    folder.mkdir()
    rng = np.random.default_rng(0)
    noise = rng.bytes(1 << 20)
    for number in range(shards):
        with tarfile.open(folder / f"shard-{number:05}.tar", "w") as tar:
            for index in range(samples):
                start, size = int(rng.integers(0, 1 << 19)), int(rng.integers(60_000, 110_000))
                image = b"\xff\xd8\xff\xe0" + noise[start : start + size]
                for suffix, data in (("jpg", image), ("cls", str(index % CLASSES).encode())):
                    info = tarfile.TarInfo(f"n{number:05}_{index:05}.{suffix}")
                    info.size = len(data)
                    tar.addfile(info, BytesIO(data))
    return [ShardTask(path=str(path), entry=entry) for path, entry in open_shards(folder)[0]]


def run(tasks: list[ShardTask], spec: WorkerSpec, at_once: int, args: argparse.Namespace) -> float:
    """The share of the time in which the device was busy."""
    device = StandIn(args.ms / 1000)
    explainer = StandInExplainer(device, args.launch_ms / 1000)
    with (
        mock.patch.object(worker, "load_teacher", side_effect=lambda spec, device: load_teacher(spec)),
        mock.patch.object(worker, "Explainer", return_value=explainer),
        mock.patch.object(worker, "shards_at_once", return_value=at_once),
        mock.patch.object(shard_reader, "frame_image", fake_frame_image),
    ):
        for report in process_all(ShardWorker(spec), tasks, lambda: None):
            assert not report.error and report.count == args.samples, report.error
    return device.worked / (device.ended - device.begun)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=20)
    parser.add_argument("--samples", type=int, default=1000, help="images a shard")
    parser.add_argument("--ms", type=float, default=64.0, help="time of the device for a batch of 64 images")
    parser.add_argument("--launch-ms", type=float, default=8.0, help="time of the host to launch a batch")
    parser.add_argument("--threads", type=int, default=4, help="decoding threads")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    scratch = Path(tempfile.mkdtemp(prefix="zpipe-benchmark-"))
    try:
        tasks = make_tars(scratch / "shards", args.shards, args.samples)
        teacher_spec = TeacherSpec(name="deit_tiny_patch16_224", weights="random")
        spec = WorkerSpec(
            teacher=teacher_spec,
            teacher_digest=load_teacher(teacher_spec).digest,
            fingerprint="benchmark",
            out=str(scratch / "out"),
            explain=ExplainConfig(),
            frame="full",
            batch_size=StandInExplainer.batch_size,
            threads=args.threads,
            sharing=1,
            device="cuda",
        )
        shares: dict[int, list[float]] = {1: [], 2: []}
        for _ in range(args.rounds):
            for at_once, found in shares.items():
                shutil.rmtree(scratch / "out", ignore_errors=True)
                found.append(run(tasks, spec, at_once, args))
    finally:
        shutil.rmtree(scratch)
    for at_once, found in shares.items():
        print(
            f"shards at once: {at_once}   busy {statistics.median(found):.1%} [{min(found):.1%}, {max(found):.1%}] "
            f"at {64_000 / args.ms:.0f} images/s"
        )
    if args.json:
        args.json.write_text(json.dumps({"busy": {str(key): value for key, value in shares.items()}}, indent=2) + "\n")


if __name__ == "__main__":
    main()
