"""How well the rivals use the machine: throughput x GMACs per image, relative to timm's DeiT-S.

    python benchmarks/rivals.py --threads 2
    python benchmarks/rivals.py --device cuda --dtype bfloat16 --batch 256 --only sparseformer

As in benchmarks/models.py, a model that does its multiply-adds as fast as the plain ViT scores 1, baseline and
candidates take turns in one process, and a figure is the median over the rounds, with minimum and maximum. Weights and
scores are random; the cost of the scores' source is not counted.
"""

from __future__ import annotations

import argparse
import json
import statistics
from contextlib import nullcontext
from pathlib import Path

import timm
import torch
from measure import seconds
from models import with_range

import zpipe.train.models  # noqa: F401  (registers our models with timm)
from zpipe.train.device import keep_freed_memory
from zpipe.train.macs import count_macs

# What is run: model, its arguments, those of a call, and whether it takes scores.
RIVALS = {
    "sparseformer_tiny": ("sparseformer_tiny", {}, {}, False),
    "sparseformer_small": ("sparseformer_small", {}, {}, False),
    "token pruning, 30 % by scores": ("token_pruned_vit", {}, {"keep": 0.3}, True),
    "token pruning, 30 % by attention": ("token_pruned_vit", {}, {"keep": 0.3}, False),
    "ToMe, r=13": ("tome_vit", {}, {"r": 13}, False),
    "image zoom": ("image_zoom", {}, {"area": 0.3}, True),
    "image zoom, mean of both": ("image_zoom", {"combine": "mean"}, {"area": 0.3}, True),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", default="", help="those whose name contains this")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    device = args.device
    if device == "cpu":
        keep_freed_memory()  # as training and evaluation do; the yardstick has it too
    precision = torch.autocast(device, dtype=torch.bfloat16) if args.dtype != "float32" else nullcontext()

    deit = timm.create_model("deit_small_patch16_224").to(device).eval()
    images = torch.randn(args.batch, 3, 224, 224, device=device)
    scores = torch.rand(args.batch, 196, device=device)
    deit_macs = count_macs(lambda: deit(images[:1]))
    print(f"{device}, {args.dtype}, torch {torch.__version__}, {torch.get_num_threads()} threads, batch {args.batch}; "
          f"DeiT-S {deit_macs / 1e9:.3f} GMACs")  # fmt: skip
    report = {"device": device, "dtype": args.dtype, "torch": torch.__version__, "rivals": {}, "ratios": {}}
    for title, (name, arguments, call, scored) in RIVALS.items():
        if args.only not in title:
            continue
        model = timm.create_model(name, **arguments).to(device).eval()

        def run(count, model=model, call=call, scored=scored):
            given = (images[:count], scores[:count]) if scored else (images[:count],)
            return model(*given, **call)

        macs = count_macs(lambda run=run: run(1))
        with torch.inference_mode(), precision:
            run(args.batch), deit(images)
            ratios, rates = [], []
            for _ in range(args.rounds):
                yardstick = seconds(lambda: deit(images), device)
                own = seconds(lambda run=run: run(args.batch), device)
                ratios.append(macs / own / (deit_macs / yardstick))
                rates.append(args.batch / own)
        report["ratios"][title] = ratios
        report["rivals"][title] = {"gmacs": macs / 1e9, "efficiency": ratios, "images_per_s": rates}
        print(f"  {title:34s}{macs / 1e9:6.2f} GMACs  efficiency {with_range(ratios)}  "
              f"{statistics.median(rates):8.1f} images/s")  # fmt: skip
    if args.json:
        args.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
