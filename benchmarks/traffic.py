"""Bytes that a relevance map moves through the memory of a GPU, kernel by kernel, with and without fused kernels.

    python benchmarks/traffic.py [--model deit_base_patch16_224] [--precisions float32,float32+bfloat16] [--kernels]

No GPU is needed and nothing is computed: tensors only have shapes. A kernel reads each of its inputs and
writes each of its outputs once. Unfused, each operation is a kernel; fused, each group of operations that the scheduler
of Inductor makes for a GPU. Products are counted apart from all other kernels.
"""

from __future__ import annotations

import argparse
import types
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import timm
import torch
from torch._inductor import compile_fx, graph, scheduler
from torch._inductor import config as inductor_config
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from zpipe.pipeline import relevance
from zpipe.pipeline.explainer import PRECISIONS
from zpipe.pipeline.prepared import COMPILE_OPTIONS, Prepared
from zpipe.pipeline.recorded_forward import record_forward
from zpipe.pipeline.supported import values_are_checked

PRODUCTS = ("mm", "bmm", "addmm", "baddbmm", "convolution")
PROPERTIES = types.SimpleNamespace(  # of an H200, as far as Inductor asks
    name="NVIDIA H200",
    major=9,
    minor=0,
    multi_processor_count=132,
    total_memory=140 << 30,
    regs_per_multiprocessor=65536,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
    warp_size=32,
    gcnArchName="",
    L2_cache_size=50 << 20,
    shared_memory_per_block=48 << 10,
    shared_memory_per_block_optin=227 << 10,
    shared_memory_per_multiprocessor=228 << 10,
)


@contextmanager
def fake_gpu() -> Iterator[FakeTensorMode]:
    """Let fake tensors be on a GPU that is not there, and Inductor plan kernels for it."""
    answers = {
        "is_available": True,
        "device_count": 1,
        "current_device": 0,
        "get_device_properties": PROPERTIES,
        "get_device_capability": (9, 0),
        "_lazy_init": None,
        "_get_device_properties": PROPERTIES,
        "_exchange_device": 0,
        "_maybe_exchange_device": 0,
        "get_rng_state": torch.zeros(16, dtype=torch.uint8),
        "set_rng_state": None,
    }
    with ExitStack() as stack:
        for name, answer in answers.items():
            patch = mock.patch.object(torch.cuda, name, lambda *args, _answer=answer, **kwargs: _answer, create=True)
            stack.enter_context(patch)
        for passes in ("joint_graph", "post_grad"):  # what they would load runs on a GPU, and matches nothing of ours
            stack.enter_context(mock.patch(f"torch._inductor.fx_passes.{passes}.lazy_init"))
        stack.enter_context(inductor_config.patch(joint_graph_constant_folding=False, **COMPILE_OPTIONS))
        yield stack.enter_context(FakeTensorMode())


class Unfused(TorchDispatchMode):
    """Counts the bytes of every operation."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **kwargs or {})
        name = func._schema.name.removeprefix("aten::")
        if not func.is_view and not name.startswith(("empty", "new_empty", "_unsafe_view", "detach")):
            tensors = [x for x in tree_leaves((args, kwargs, result)) if isinstance(x, torch.Tensor)]
            self.bytes[name] += sum(x.nbytes for x in tensors)
        return result


class _Planned(Exception):
    """Carries the bytes of the planned kernels out of the compiler."""

    def __init__(self, kernels: Counter[str]) -> None:
        super().__init__()
        self.kernels = kernels


def fused(function: Callable[..., Any], args: Any, kwargs: Any) -> Counter[str]:
    """Bytes of the kernels that Inductor would make of a call."""
    leaves, structure = tree_flatten((args, kwargs))
    tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]

    def flat(*given: torch.Tensor) -> list[torch.Tensor]:
        rest = iter(given)
        filled = [next(rest) if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
        args, kwargs = tree_unflatten(filled, structure)
        return [leaf for leaf in tree_leaves(function(*args, **kwargs)) if isinstance(leaf, torch.Tensor)]

    def plan(self: graph.GraphLowering) -> None:
        self._update_scheduler()
        kernels: Counter[str] = Counter()
        for node in self.scheduler.nodes:
            external = isinstance(node, scheduler.ExternKernelSchedulerNode)
            name = node.node.python_kernel_name.rpartition(".")[2] if external else ""
            origins = {o.target.__name__.partition(".")[0] for n in node.get_nodes() for o in n.node.get_origins()}
            name = name or f"{node.get_name()}: {' '.join(sorted(origins))}"
            kernels[name] += node.get_read_write_buffers_sizes()
        raise _Planned(kernels)

    module = make_fx(flat)(*tensors)
    with fake_gpu(), torch.no_grad(), mock.patch.object(graph.GraphLowering, "_compile_to_module", plan):
        on_gpu = [torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cuda") for x in tensors]
        try:
            compile_fx.compile_fx(module, on_gpu)
        except torch._inductor.exc.InductorError as error:
            if isinstance(error.inner_exception, _Planned):
                return error.inner_exception.kernels
            raise
    raise RuntimeError("Inductor has planned nothing")


class Counting(Prepared):
    """Counts the bytes of each call of a function of a block, by the name of the function."""

    def __init__(self, *args: Any, fuse: bool, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.kernels: dict[str, Counter[str]] = defaultdict(Counter)
        self._fuse = fuse
        self._known: dict[Any, Counter[str]] = {}

    def call(self, function: Any, *args: Any, **kwargs: Any) -> Any:
        if not self._fuse:
            with Unfused() as counter:
                result = function(*args, **kwargs)
            self.kernels[function.__name__] += counter.bytes
            return result
        kind = function, tuple(getattr(x, "shape", x) for x in tree_leaves((args, kwargs)))
        if kind not in self._known:
            self._known[kind] = fused(function, args, kwargs)
        self.kernels[function.__name__] += self._known[kind]
        return function(*args, **kwargs)


def is_product(kernel: str) -> bool:
    return kernel.partition("_dtype")[0] in PRODUCTS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="deit_base_patch16_224")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--precisions", default="float32,float32+bfloat16")
    parser.add_argument("--kernels", action="store_true", help="print every kernel, too")
    args = parser.parse_args()
    print(f"{args.model}, batches of {args.batch_size}, torch {torch.__version__}: GB an image")
    print("                                 other kernels              products")
    print("precision            kernels   forward  sweep  total    forward  sweep")
    for precision in args.precisions.split(","):
        dtype, sweep = PRECISIONS[precision]
        for fuse in (False, True):
            model = timm.create_model(args.model).eval()
            with torch.no_grad(), values_are_checked():
                model.to("meta", dtype)
                images = torch.empty(args.batch_size, 3, *model.patch_embed.img_size, device="meta", dtype=dtype)
                targets = torch.zeros(args.batch_size, dtype=torch.int64, device="meta")
                counting = Counting(model, sweep, keep=fuse, fuse=fuse)
                matmul = relevance._bfloat16_on_cuda if sweep == "bfloat16" else torch.matmul
                rules = relevance.Rules(matmul, relevance.residual_rule)
                recorded = record_forward(model, images, targets, counting)
                relevance._sweep(counting, recorded, 0, rules, keep=False)
            parts = []
            for products in (False, True):
                for name in ("record_block", "sweep_block"):
                    kernels = counting.kernels[name].items()
                    total = sum(size for kernel, size in kernels if is_product(kernel) == products)
                    parts.append(total / args.batch_size / 1e9)
            forward, down, forward_products, down_products = parts
            print(
                f"{precision:20s} {'fused' if fuse else 'unfused':8s}{forward:9.3f}{down:7.3f}{forward + down:7.3f}"
                f"{forward_products:11.3f}{down_products:7.3f}",
                flush=True,
            )
            for name, kernels in counting.kernels.items() if args.kernels else ():
                for kernel, size in kernels.most_common():
                    print(f"    {name}  {size / args.batch_size / 1e6:9.2f} MB  {kernel}")


if __name__ == "__main__":
    main()
