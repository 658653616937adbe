"""How well ZoomViT uses the machine: throughput x GMACs per image, relative to timm's DeiT of the same width.

    python benchmarks/models.py --threads 2
    python benchmarks/models.py --device cuda --dtype bfloat16 --batch 256

A model that does its multiply-adds as fast as the plain ViT scores 1. The time and the multiply-adds of the zoomer are
counted. Weights are random; the scores are synthetic, as sparse and as different from image to image as maps are.
Baseline and candidates take turns in one process; a figure is the median over the rounds, with minimum and maximum.
"""

from __future__ import annotations

import argparse
import json
import statistics
from contextlib import nullcontext
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from measure import peak_bytes, seconds

import zpipe.train.models  # noqa: F401  (registers our models with timm)
from zpipe.train.device import keep_freed_memory
from zpipe.train.macs import count_macs
from zpipe.train.models import Zoomer
from zpipe.train.models.zoom_tokens import calibrate_alpha, coarse_scores


def with_range(values: list[float]) -> str:
    return f"{statistics.median(values):.3f} [{min(values):.3f}, {max(values):.3f}]"


def made_up_scores(batch: int, device: str) -> torch.Tensor:
    """[batch, 196] in [0, 1]: smooth noise, raised to a power that differs from image to image."""
    noise = F.avg_pool2d(torch.rand(batch, 1, 16, 16), 3, stride=1).flatten(1)
    low, high = noise.amin(1, keepdim=True), noise.amax(1, keepdim=True)
    return (((noise - low) / (high - low)) ** torch.linspace(1, 4, batch)[:, None]).to(device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="small", choices=["tiny", "small", "base"])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--train-batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--memory-rounds", type=int, default=5)
    parser.add_argument("--zoomer", type=int, default=4, help="blocks of the zoomer")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    device = args.device
    if device == "cpu":
        keep_freed_memory()  # as training and evaluation do; the yardstick has it too
    low_precision = args.dtype != "float32"

    def precision():
        return torch.autocast(device, dtype=torch.bfloat16) if low_precision else nullcontext()

    deit = timm.create_model(f"deit_{args.size}_patch16_224").to(device)
    zoomer = Zoomer(args.zoomer).freeze().to(device)
    image = torch.zeros(1, 3, 224, 224, device=device)
    deit_macs, zoomer_macs = count_macs(lambda: deit(image)), count_macs(lambda: zoomer(image))
    images = torch.randn(args.batch, 3, 224, 224, device=device)
    scores = made_up_scores(args.batch, device)
    print(f"DeiT-{args.size}, {device}, {args.dtype}, torch {torch.__version__}, {torch.get_num_threads()} threads, "
          f"batch {args.batch}; {deit_macs / 1e9:.3f} GMACs, "
          f"the zoomer's {zoomer_macs / 1e9:.3f} beside ZoomViT's")  # fmt: skip

    scale = deit_macs / 4.6e9  # the paper's budgets are those of DeiT-S
    half, double = (
        timm.create_model(f"zoomvit_{args.size}_patch16_224", zoom_factor=factor).to(device) for factor in (0.5, 2.0)
    )
    settings = {}
    for name, model, target in (("eta=.5", half, 2.3 * scale), ("eta=2", double, 6.3 * scale)):
        table = torch.tensor([model.macs(k) / 1e9 for k in range(model.coarse_grid**2 + 1)], dtype=torch.float64)
        cell_scores = coarse_scores(scores, model.zoom_factor).cpu()
        alpha, mean = calibrate_alpha(cell_scores, target, lambda zoomed, table=table: table[zoomed])
        settings[f"{name}, alpha for {target:.1f} G"] = (model, {"alpha": alpha}, mean * 1e9)
        budget = model.resolve_budget(f"{target:.3f} GMACs")
        settings[f"{name}, budget {budget} cells"] = (model, {"budget": budget}, model.macs(budget))
    most = double.coarse_grid**2
    keep = max(n for n in range(1, 4 * most) if double.macs(most, n) <= 6.3e9 * scale)
    settings["eta=2, alpha 0.01, pruned"] = (double, {"alpha": 0.01, "keep_tokens": keep}, None)

    report = {"size": args.size, "device": device, "dtype": args.dtype, "torch": torch.__version__, "inference": {}}
    with torch.inference_mode(), precision():
        deit.eval(), half.eval(), double.eval()

        def zoomed(model, zoom):
            zoomer(images)  # its scores are thrown away: random weights give none worth having
            return model(images, scores, **zoom)

        rows = {}
        for name, (model, zoom, macs) in settings.items():
            if macs is None:
                zoomed_cells = (scores > zoom["alpha"]).sum(1).tolist()
                macs = statistics.mean(model.macs(k, zoom["keep_tokens"]) for k in zoomed_cells)
            zoomed(model, zoom)
            deit(images)
            ratios, shares, rates = [], [], []
            for _ in range(args.rounds):
                yardstick = seconds(lambda: deit(images), device)
                own = seconds(lambda m=model, z=zoom: zoomed(m, z), device)
                vit = seconds(lambda m=model, z=zoom: m(images, scores, **z), device)
                tokens = seconds(lambda m=model, z=zoom: m.tokenise(images, scores, **z), device)
                ratios.append((macs + zoomer_macs) / own / (deit_macs / yardstick))
                shares.append(tokens / vit)
                rates.append(args.batch / own)
            rows[name] = {"gmacs": macs / 1e9, "efficiency": ratios, "tokenising": shares, "images_per_s": rates}
            print(f"  {name:32s}{macs / 1e9:6.2f} GMACs  efficiency {with_range(ratios)}  "
                  f"tokenising {with_range(shares)}  {statistics.median(rates):8.1f} images/s")  # fmt: skip
        for family in ("cfvit", "lfvit") if args.size != "base" else ():
            model = timm.create_model(f"{family}_{args.size}").to(device).eval()
            coarse, _ = model(images, return_stages=True)
            falling = coarse.float().softmax(1).amax(1).sort(descending=True).values.tolist()
            for count in (0, args.batch // 2, args.batch * 3 // 4, args.batch):
                threshold = falling[count - 1] if count else 1.0  # random weights are sure of nothing
                share = float(model(images, exit_threshold=threshold).exited.float().mean())
                deit(images)
                macs, ratios, rates = model.macs(p_exit=share), [], []
                for _ in range(args.rounds):
                    yardstick = seconds(lambda: deit(images), device)
                    own = seconds(lambda m=model, t=threshold: m(images, exit_threshold=t), device)
                    ratios.append(macs / own / (deit_macs / yardstick))
                    rates.append(args.batch / own)
                name = f"{family}, {share:.0%} exit early"
                rows[name] = {"gmacs": macs / 1e9, "efficiency": ratios, "images_per_s": rates}
                print(f"  {name:32s}{macs / 1e9:6.2f} GMACs  efficiency {with_range(ratios)}  "
                      f"{statistics.median(rates):8.1f} images/s")  # fmt: skip
        report["inference"] = rows

    images, scores = images[: args.train_batch], scores[: args.train_batch]
    labels = torch.randint(1000, (len(images),), device=device)

    def step(model, optimizer, *inputs, **zoom):
        optimizer.zero_grad(set_to_none=True)
        with precision():
            if zoom:
                with torch.no_grad():
                    zoomer(images)
            loss = F.cross_entropy(model(images, *inputs, **zoom).float(), labels)
        loss.backward()
        optimizer.step()

    deit.train()
    plain = torch.optim.AdamW(deit.parameters(), lr=1e-5)
    report["training"] = {}
    for name, model in (("eta=.5", half), ("eta=2", double)):
        model.train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
        alphas = [(i + 0.5) / args.rounds for i in torch.randperm(args.rounds).tolist()]  # uniform in [0, 1]
        step(model, optimizer, scores, alpha=0.0)
        step(deit, plain)
        cell_scores = coarse_scores(scores, model.zoom_factor)
        own_macs, own_time, plain_time, ratios = 0, 0, 0, []
        for alpha in alphas:
            macs = statistics.mean(model.macs(k) for k in (cell_scores > alpha).sum(1).tolist())
            yardstick = seconds(lambda: step(deit, plain), device)
            own = seconds(lambda m=model, o=optimizer, a=alpha: step(m, o, scores, alpha=a), device)
            # Backward costs two forwards; the frozen zoomer has none.
            work = 3 * macs + zoomer_macs
            own_macs, own_time, plain_time = own_macs + work, own_time + own, plain_time + yardstick
            ratios.append(work / own / (3 * deit_macs / yardstick))
        whole = own_macs / own_time / (3 * deit_macs * args.rounds / plain_time)
        equal = {"budget": 0} if name == "eta=2" else {"budget": model.coarse_grid**2}  # 196 tokens, as the DeiT has
        memory = []
        for _ in range(args.memory_rounds):
            held_plain = peak_bytes(lambda: step(deit, plain), device)
            held = peak_bytes(lambda m=model, o=optimizer, z=equal: step(m, o, scores, **z), device)
            memory.append(held / held_plain)
        epoch = own_time / plain_time  # what an epoch takes, in epochs of the plain ViT
        report["training"][name] = {"efficiency": whole, "by_step": ratios, "memory": memory, "epoch": epoch}
        print(f"  {name} training, alpha over [0, 1]: efficiency {whole:.3f} of all steps, "
              f"by step {with_range(ratios)}; an epoch takes {epoch:.2f} of the plain ViT's; "
              f"memory at 196 tokens {with_range(memory)} of DeiT's {held_plain / 1e6:.0f} MB")  # fmt: skip
    if args.json:
        ratios = {name: row["efficiency"] for name, row in report["inference"].items()}
        for name, row in report["training"].items():
            ratios[f"{name}, training, by step"] = row["by_step"]
            ratios[f"{name}, training, memory of DeiT's"] = [1 / share for share in row["memory"]]  # higher is better
        report["ratios"] = ratios
        args.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
