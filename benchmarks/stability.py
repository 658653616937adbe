"""How stable the maps of each method are under noise of a quarter of a grey level: a trained teacher on photos.

    python benchmarks/stability.py --weights RUN --shards SHARDS [--count 200] [--methods rollout,gradient-attention]

Maps explain the teacher's best class, in float32. The stability of a map is its rank correlation with the map of the
noisy image, see `zpipe.pipeline.stability`; brackets hold 95 % intervals by bootstrap over images. For the worst map
the interval says how much it depends on single images, not where the worst map of a larger set would be.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import numpy as np
import torch

from zpipe.pipeline.explainer import NO_CLASS, ExplainConfig, Explainer
from zpipe.pipeline.methods import METHODS, methods_of
from zpipe.pipeline.shard_reader import FramedImage, framed_batches, open_shards, read_samples
from zpipe.pipeline.stability import add_noise, stability
from zpipe.pipeline.teacher import Teacher, TeacherSpec, load_teacher
from zpipe.pipeline.worker import frame_of

BATCH = 4
RESAMPLES = 2_000
STATISTICS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "median": lambda values: np.median(values, axis=-1),
    "5 %": lambda values: np.quantile(values, 0.05, axis=-1),
    "worst": lambda values: values.min(axis=-1),
}


def images_of(teacher: Teacher, shards: Path, count: int) -> list[FramedImage]:
    """The first images of every tar, equally many of each."""
    tars, _ = open_shards(shards)
    each = -(-count // len(tars))
    images: list[FramedImage] = []
    for path, _ in tars:
        batches = framed_batches(read_samples(path), frame_of(teacher, "full"), batch_size=BATCH, threads=1)
        decoded = (image for batch in batches for image in batch if image.pixels is not None)
        images += islice(decoded, min(each, count - len(images)))
    return images


def measured(explainer: Explainer, images: list[FramedImage]) -> np.ndarray:
    """The stability of the usable maps of these images, [n]."""
    parts = []
    for start in range(0, len(images), BATCH):
        batch = images[start : start + BATCH]
        pixels = np.stack([image.pixels for image in batch if image.pixels is not None])  # uint8 [n, H, W, 3]
        clean = explainer(pixels, np.full(len(pixels), NO_CLASS))
        noisy = explainer.maps_of(add_noise(pixels, [image.key for image in batch]), clean.targets)
        parts.append(stability(clean.maps, noisy))
    values = np.concatenate(parts)
    return values[np.isfinite(values)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", required=True, help="The teacher: a run, or a weights file.")
    parser.add_argument("--shards", type=Path, required=True)
    parser.add_argument("--count", type=int, default=200, help="Images.")
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    args = parser.parse_args()
    torch.set_num_threads(1)
    teacher = load_teacher(TeacherSpec(weights=args.weights), device=args.device)
    images = images_of(teacher, args.shards, args.count)
    refusals = methods_of(teacher.model)
    print(f"{'method':32s} images  " + "  ".join(f"{name:26s}" for name in STATISTICS))
    for method in args.methods.split(","):
        if refusals[method]:
            print(f"{method:32s} {refusals[method]}")
            continue
        config = ExplainConfig(method=method, target="predicted")
        values = measured(Explainer(teacher, config, batch_size=BATCH, device=args.device), images)
        drawn = np.random.default_rng(0).integers(0, len(values), (RESAMPLES, len(values)))
        cells = []
        for statistic in STATISTICS.values():
            low, high = np.quantile(statistic(values[drawn]), (0.025, 0.975))
            cells.append(f"{statistic(values):.5f} [{low:.5f}, {high:.5f}]")
        print(f"{method:32s} {len(values):6d}  " + "  ".join(f"{cell:26s}" for cell in cells), flush=True)


if __name__ == "__main__":
    main()
