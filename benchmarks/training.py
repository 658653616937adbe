"""What the training loop costs: images per second, relative to a bare loop over the same model and loader.

    python benchmarks/training.py FOLDER --threads 2

FOLDER receives scenes to train on. The two loops take turns, an epoch each; a figure is the median over the rounds,
with minimum and maximum. The shares of time in data, forward, backward and saving are those that the loop itself logs.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import time
from pathlib import Path

import timm
import torch
import torch.nn.functional as F

from zpipe.pipeline.make_shards import SceneSource, make_shards
from zpipe.pipeline.scenes import SceneConfig
from zpipe.train.checkpoint import Preprocessing
from zpipe.train.data.loader import RelevanceLoader
from zpipe.train.device import autocast, keep_freed_memory
from zpipe.train.fit.config import TrainConfig
from zpipe.train.fit.loop import Trainer
from zpipe.train.fit.train_vit import ClassifyTask, VitConfig


def with_range(values: list[float]) -> str:
    return f"{statistics.median(values):.3f} [{min(values):.3f}, {max(values):.3f}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", default="deit_tiny_patch16_224")
    parser.add_argument("--image-size", type=int, default=96)
    parser.add_argument("--images", type=int, default=2048)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--precision", default="float32", choices=["float32", "bf16"], help="of both loops")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    keep_freed_memory()
    shards = args.folder / "shards"
    if not shards.exists():
        config = SceneConfig(image_size=min(args.image_size, 80))
        make_shards(SceneSource(count=args.images, split="train", seed=0, config=config, shard_size=128), shards)
    device = torch.device(args.device)
    preprocessing = Preprocessing(image_size=args.image_size, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    loop = TrainConfig(
        epochs=1.0,
        batch_size=args.batch,
        data_workers=0,
        device=args.device,
        log_every=5,
        precision=args.precision,
        compile=False,  # the bare loop isn't compiled either
    )
    config = VitConfig(model=args.model, image_size=args.image_size, train=loop)

    def parts():
        torch.manual_seed(0)
        model = timm.create_model(args.model, img_size=args.image_size, num_classes=10).to(device).train()
        return model, RelevanceLoader(shards, batch_size=args.batch, image_size=args.image_size, num_workers=0)

    def ours(run: Path) -> float:
        model, loader = parts()
        shutil.rmtree(run, ignore_errors=True)
        run.mkdir()
        begun = time.perf_counter()
        task = ClassifyTask(model, None, config, preprocessing, device)
        Trainer(task, loader, loop, run).train("benchmark")
        return time.perf_counter() - begun

    def bare() -> float:
        model, loader = parts()
        begun = time.perf_counter()
        optimizer = torch.optim.AdamW(model.parameters(), lr=loop.lr, weight_decay=loop.weight_decay)
        loader.set_epoch(0)
        for batch in loader:
            images = preprocessing.normalise(batch["image"].to(device))
            with autocast(args.precision, device)():
                loss = F.cross_entropy(model(images), batch["label"].to(device))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - begun

    run = args.folder / "run"
    ours(run), bare()
    ratios, rates = [], []
    for _ in range(args.rounds):
        plain, own = bare(), ours(run)
        ratios.append(plain / own)
        rates.append(args.images / own)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    shares = {name: statistics.mean(line[name] for line in lines) for name in lines[0] if name.startswith("share_")}
    print(f"{args.model} at {args.image_size} px, batch {args.batch}, {args.device}, torch {torch.__version__}, "
          f"{torch.get_num_threads()} threads")  # fmt: skip
    print(f"  loop: {statistics.median(rates):.1f} images/s, {with_range(ratios)} of the bare loop, "
          "one checkpoint an epoch included")  # fmt: skip
    if args.json:
        report = {"ratios": {"of the bare loop": ratios}, "shares": shares}
        args.json.write_text(json.dumps(report, indent=2) + "\n")
    print("  " + ", ".join(f"{name.removeprefix('share_')} {share:.1%}" for name, share in shares.items()))


if __name__ == "__main__":
    main()
