"""How near each precision comes to float64: maps of a trained teacher against published values, or float64 maps.

    python benchmarks/agreement.py [--device cuda]
    python benchmarks/agreement.py --methods [--teacher RUN --shards SHARDS --limit 200]

The first form compares transformer attribution with the values of `tests/golden/relevance_small_vit.npz`, 24 images of
a small trained ViT. Maps are compared after min-max per image: largest difference, rank correlation, and how many of
the 20 highest cells are the same. The second form compares each method, in each precision that it has without a sweep
of another, with itself in float64: rank correlation per image, and the time of a batch relative to float32. The teacher
is that of the golden values, or a finished run with photos of its classes.
"""

from __future__ import annotations

import argparse
import copy
import statistics
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from measure import seconds
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from zpipe.pipeline.classifier import Classifier, as_classifier
from zpipe.pipeline.explainer import PRECISIONS, precisions_of
from zpipe.pipeline.methods import DEFAULT_METHOD, METHODS, methods_of
from zpipe.pipeline.relevance import attribute
from zpipe.pipeline.shard_reader import frame_image, open_shards, read_samples
from zpipe.pipeline.teacher import load_teacher
from zpipe.pipeline.teacher_spec import TeacherSpec
from zpipe.pipeline.worker import frame_of
from zpipe.train.evaluation.metrics import spearman, topk_overlap

GOLDEN = Path(__file__).parents[1] / "tests" / "golden" / "relevance_small_vit.npz"
TOP = 20


def min_max(maps: Tensor) -> Tensor:
    low, high = maps.amin(dim=1, keepdim=True), maps.amax(dim=1, keepdim=True)
    return (maps - low) / (high - low)  # [B, N]


def golden() -> tuple[Classifier, Tensor, Tensor, Tensor]:
    """The small teacher, its normalised images [24, 3, H, W], targets [24] and published maps [24, 64]."""
    data = np.load(GOLDEN)
    img_size, patch_size, embed_dim, depth, num_heads, num_classes = (int(value) for value in data["config"])
    sizes = {"img_size": img_size, "patch_size": patch_size, "embed_dim": embed_dim}
    model = VisionTransformer(**sizes, depth=depth, num_heads=num_heads, num_classes=num_classes)
    model.load_state_dict({name[2:]: torch.from_numpy(data[name]) for name in data.files if name.startswith("w/")})
    images, targets, expected = (torch.from_numpy(data[name]) for name in ("images", "targets", "relevance"))
    return as_classifier(model.eval().requires_grad_(False)), images, targets, expected


def photos(run: Path, shards: Path, limit: int) -> tuple[Classifier, Tensor, Tensor]:
    """The teacher of a run, and normalised photos [limit, 3, H, W] with their classes, spread over the shards."""
    teacher = load_teacher(TeacherSpec(weights=str(run)))
    tars, _ = open_shards(shards)
    frame, step = frame_of(teacher, "full"), max(1, sum(entry.count for _, entry in tars) // limit)
    samples = (sample for path, entry in tars for sample in read_samples(path, entry))
    framed = [frame_image(sample, frame) for sample in islice(samples, 0, step * limit, step)]
    pixels = torch.from_numpy(np.stack([item.pixels for item in framed])).permute(0, 3, 1, 2) / 255
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (teacher.mean, teacher.std))
    return teacher.model, (pixels - mean) / std, torch.tensor([item.label for item in framed])


def against_published(device: str) -> None:
    classifier, images, targets, expected = golden()
    print("                     largest difference            rank correlation     top 20 kept")
    print("precision            median      90 %     worst     median     worst     mean   worst")
    for name in precisions_of(DEFAULT_METHOD):
        dtype, sweep = PRECISIONS[name]
        if sweep == "tf32" and device == "cpu":
            continue
        inputs = images.to(device, dtype), targets.to(device)
        model = copy.deepcopy(classifier.model).to(device, dtype)
        maps = attribute(model, *inputs, sweep=sweep).maps.cpu().double().flatten(1)  # [24, 64]
        gap = (min_max(maps) - min_max(expected)).abs().amax(dim=1)
        rank, kept = spearman(maps, expected), topk_overlap(maps, expected, TOP)
        print(
            f"{name:18s} {gap.median():8.1e}  {gap.quantile(0.9):8.1e}  {gap.max():8.1e}"
            f"{rank.median():11.5f}{rank.min():10.5f}{kept.mean():9.1%}{kept.min():8.0%}"
        )


def against_float64(classifier: Classifier, images: Tensor, targets: Tensor, batch_size: int, device: str) -> None:
    models = {dtype: copy.deepcopy(classifier).to(device, dtype) for dtype in {d for d, _ in PRECISIONS.values()}}
    batches = [slice(start, start + batch_size) for start in range(0, len(images), batch_size)]

    def maps(method: str, precision: str) -> tuple[Tensor, list[float]]:
        """Maps [n, cells] in float64, and the seconds of each batch."""
        dtype, results, times = PRECISIONS[precision][0], [], []
        for batch in batches:
            inputs = images[batch].to(device, dtype), targets[batch].to(device)
            times.append(
                seconds(lambda i=inputs: results.append(METHODS[method](models[dtype], *i).maps.cpu()), device)
            )
        return torch.cat(results).double().flatten(1), times

    print("                                            rank correlation        time of a batch")
    print("method                          precision  median     worst        of float32's")
    for method, refusal in methods_of(classifier).items():
        if refusal:
            print(f"{method}: {refusal}")
            continue
        exact, _ = maps(method, "float64")
        base, base_times = maps(method, "float32")
        rows = {"float32": (base, base_times)}
        if "bfloat16" in precisions_of(method):
            rows["bfloat16"] = maps(method, "bfloat16")
        for precision, (found, times) in rows.items():
            rank = spearman(found, exact)
            ratio = statistics.median(a / b for a, b in zip(times, base_times, strict=True))
            print(f"{method:32s}{precision:10s}{rank.median():8.5f}  {rank.min():8.5f}{ratio:14.2f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--methods", action="store_true", help="compare every method with itself in float64")
    parser.add_argument("--teacher", type=Path, help="a finished train-vit run; needs --shards")
    parser.add_argument("--shards", type=Path, help="photos of the teacher's classes")
    parser.add_argument("--limit", type=int, default=200, help="number of photos")
    parser.add_argument("--batch-size", type=int, default=8)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if not args.methods:
        against_published(args.device)
    elif args.teacher is None:
        against_float64(*golden()[:3], args.batch_size, args.device)
    else:
        against_float64(*photos(args.teacher, args.shards, args.limit), args.batch_size, args.device)


if __name__ == "__main__":
    main()
