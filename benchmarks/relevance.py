"""What a relevance map costs in multiply-adds, time and memory, relative to the model's own inference forward pass.

    python benchmarks/relevance.py --threads 2
    python benchmarks/relevance.py --device cuda --batches 16,64,256

Weights are random: no figure depends on them. Baseline and candidates take turns in one process; a figure is the median
over the rounds, with minimum and maximum.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

import timm
import torch
from measure import peak_bytes, seconds

from zpipe.pipeline.methods import METHODS
from zpipe.pipeline.relevance import SWEEPS, attribute
from zpipe.train.macs import count_macs


def spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="deit_base_patch16_224")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batches", default="1,4,8,16")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--sweeps", default="model", help=f"comma-separated, of {', '.join(SWEEPS)}")
    parser.add_argument("--methods", action="store_true", help="time every method, not only the default one")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    model = timm.create_model(args.model).eval().requires_grad_(False).to(args.device)
    batches = [int(part) for part in args.batches.split(",")]
    size = (3, *model.patch_embed.img_size)

    def request(batch: int) -> tuple[torch.Tensor, torch.Tensor]:
        images = torch.randn(batch, *size, device=args.device)
        return images, torch.randint(model.num_classes, (batch,), device=args.device)

    @torch.inference_mode()
    def forward(images):
        return model(images)

    one, target = request(1)
    counts = {"forward": count_macs(lambda: model(one))}
    counts |= {name: count_macs(lambda m=method: m(model, one, target)) for name, method in METHODS.items()}
    counts["top-5"] = count_macs(lambda: attribute(model, one, lambda logits: logits.topk(5).indices))
    print(f"{args.model} on {args.device}, torch {torch.__version__}, {torch.get_num_threads()} threads")
    print(f"multiply-adds of a forward pass: {counts['forward'] / 1e9:.2f} G")
    for name, count in counts.items():
        if name != "forward":
            print(f"  {name:26s}{count / counts['forward']:6.2f} forward passes")

    inputs = {batch: request(batch) for batch in batches}
    forward_rates = {}
    for batch, (images, _) in inputs.items():
        forward(images)
        times = [seconds(lambda x=images: forward(x), args.device) for _ in range(3)]
        forward_rates[batch] = batch / min(times)
    best = max(forward_rates, key=forward_rates.get)
    print(f"the forward's best batch: {best}, {forward_rates[best]:.2f} images/s")

    candidates = {}
    for sweep in args.sweeps.split(","):
        for batch in batches:
            candidates[f"transformer-attribution, sweep {sweep}", batch] = lambda b=batch, s=sweep: attribute(
                model, *inputs[b], sweep=s
            )
    if args.methods:
        for name, method in METHODS.items():
            candidates[name, batches[-1]] = lambda m=method: m(model, *inputs[batches[-1]])
    rows, speeds = [], {}
    for (name, batch), run in candidates.items():
        run()  # allocation and kernel choice
        ratios, rates = [], []
        for _ in range(args.rounds):
            yardstick = seconds(lambda: forward(inputs[best][0]), args.device) / best
            own = seconds(run, args.device) / batch
            ratios.append(own / yardstick)
            rates.append(1 / own)
        row = {"what": name, "batch": batch, "forwards": spread(ratios), "images_per_s": spread(rates)}
        speeds[f"{name}, batch {batch}"] = [1 / ratio for ratio in ratios]
        row["peak_bytes_per_image"] = peak_bytes(run, args.device) / batch
        rows.append(row)
        forwards = row["forwards"]
        print(
            f"  {name:40s} batch {batch:4d}: {forwards['median']:5.2f} forwards "
            f"[{forwards['min']:.2f}, {forwards['max']:.2f}], "
            f"{row['images_per_s']['median']:8.2f} images/s, {row['peak_bytes_per_image'] / 1e6:6.0f} MB an image"
        )
    if args.json:
        report = {"model": args.model, "device": args.device, "torch": torch.__version__, "threads": args.threads}
        report |= {"multiply_adds": counts, "forward_images_per_s": forward_rates, "rows": rows}
        report["ratios"] = speeds  # of the forward's images per second
        args.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
