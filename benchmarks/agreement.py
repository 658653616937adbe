"""How near each precision comes to float64: maps of a trained teacher against published values.

    python benchmarks/agreement.py [--device cuda]

The values are those of `tests/golden/relevance_small_vit.npz`, 24 images of a small trained ViT. Maps are compared
after min-max per image: largest difference, rank correlation, and how many of the 20 highest cells are the same.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from zpipe.pipeline.explainer import PRECISIONS
from zpipe.pipeline.relevance import attribute
from zpipe.train.evaluation.metrics import spearman, topk_overlap

GOLDEN = Path(__file__).parents[1] / "tests" / "golden" / "relevance_small_vit.npz"
TOP = 20


def min_max(maps: Tensor) -> Tensor:
    low, high = maps.amin(dim=1, keepdim=True), maps.amax(dim=1, keepdim=True)
    return (maps - low) / (high - low)  # [B, N]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    device = parser.parse_args().device
    data = np.load(GOLDEN)
    img_size, patch_size, embed_dim, depth, num_heads, num_classes = (int(value) for value in data["config"])
    sizes = {"img_size": img_size, "patch_size": patch_size, "embed_dim": embed_dim}
    sizes |= {"depth": depth, "num_heads": num_heads}
    state = {name[2:]: torch.from_numpy(data[name]) for name in data.files if name.startswith("w/")}
    images, targets = torch.from_numpy(data["images"]), torch.from_numpy(data["targets"])
    expected = torch.from_numpy(data["relevance"])  # [24, 64]
    torch.set_num_threads(1)
    print("                     largest difference            rank correlation     top 20 kept")
    print("precision            median      90 %     worst     median     worst     mean   worst")
    for name, (dtype, sweep) in PRECISIONS.items():
        if sweep == "tf32" and device == "cpu":
            continue
        model = VisionTransformer(**sizes, num_classes=num_classes).eval()
        model.load_state_dict(state)
        inputs = images.to(device, dtype), targets.to(device)
        maps = attribute(model.to(device, dtype), *inputs, sweep=sweep).maps.cpu().double().flatten(1)  # [24, 64]
        gap = (min_max(maps) - min_max(expected)).abs().amax(dim=1)
        rank, kept = spearman(maps, expected), topk_overlap(maps, expected, TOP)
        print(
            f"{name:18s} {gap.median():8.1e}  {gap.quantile(0.9):8.1e}  {gap.max():8.1e}"
            f"{rank.median():11.5f}{rank.min():10.5f}{kept.mean():9.1%}{kept.min():8.0%}"
        )


if __name__ == "__main__":
    main()
