"""What a training step of ZoomViT costs the host, apart from kernels: under a threshold and under a budget.

    python benchmarks/host_time.py

The model has twelve blocks so narrow that kernels on the CPU cost next to nothing, and the flash kernels do nothing at
all. What is left is Python, autograd and the launch of every operation, which a GPU has to wait for. `step` is forward
and backward; `attention` is the attention of the twelve blocks alone, forward and backward, by packed sequences, by
`torch.nn.attention.varlen`, and by one dense call. Both take turns in one process; a figure is the median over the
rounds, with minimum and maximum.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from unittest import mock

import torch
import torch.nn.functional as F
from torch.nn.attention.varlen import varlen_attn

from zpipe.train.models import packing
from zpipe.train.models.zoomvit import ZoomViT

DEPTH = 12


def forward(q, k, v, *rest, **options):
    return torch.empty_like(q), q.new_empty(q.shape[1], len(q)), torch.empty(2), torch.empty(0), torch.empty(0)


def backward(gradient, q, k, v, *rest, **options):
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def steps(batch: int) -> dict[str, Callable[[], None]]:
    size = {"img_size": 32, "patch_size": 8, "embed_dim": 8, "num_heads": 1, "num_classes": 2}
    model = ZoomViT(**size, depth=DEPTH)
    images = torch.randn(batch, 3, 32, 32)
    scores = torch.rand(batch, 16)

    def step(**zoom) -> None:
        model(images, scores, **zoom).sum().backward()

    return {"step, alpha": lambda: step(alpha=0.5), "step, budget": lambda: step(budget=8)}


def attentions(batch: int) -> dict[str, Callable[[], None]]:
    lengths = [5 + i % 8 for i in range(batch)]
    packed = packing.packing(torch.tensor(lengths), lengths)
    x = torch.randn(sum(lengths), 3, 1, 8, requires_grad=True)  # [T, 3, H, D]
    dense = torch.randn(1, 8, 3, 1, 8, requires_grad=True)  # [B, N, 3, H, D]

    def wrapped() -> torch.Tensor:
        ends, most = packed.offsets, packed.longest
        return varlen_attn(*x.unbind(1), ends, ends, most, most)

    def at_once() -> torch.Tensor:
        return F.scaled_dot_product_attention(*dense.permute(2, 0, 3, 1, 4).unbind(0))

    ways = {"packed": lambda: packing.attend_flash(x, packed), "varlen_attn": wrapped, "dense": at_once}

    def run(way: Callable[[], torch.Tensor]) -> None:
        for _ in range(DEPTH):
            way().sum().backward()

    return {f"attention, {name}": lambda way=way: run(way) for name, way in ways.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=50)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    library = torch.library.Library("aten", "IMPL")
    library.impl("_flash_attention_forward", forward, "CPU")
    library.impl("_flash_attention_backward", backward, "CPU")
    # In float32, since half precision is slow on a CPU.
    stubs = {"_has_flash": lambda device: True, "FLASH_DTYPES": (torch.float32,)}
    with mock.patch.multiple(packing, **stubs):
        candidates = steps(args.batch) | attentions(args.batch)
        milliseconds: dict[str, list[float]] = {name: [] for name in candidates}
        for _ in range(args.rounds + 5):
            for name, run in candidates.items():
                begun = time.thread_time()
                run()
                milliseconds[name].append(1e3 * (time.thread_time() - begun))
    for name, values in milliseconds.items():
        values = values[5:]
        print(f"{name:24s}{statistics.median(values):8.2f} ms [{min(values):.2f}, {max(values):.2f}]")


if __name__ == "__main__":
    main()
