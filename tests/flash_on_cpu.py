"""The variable-length flash kernels of CUDA on the CPU, for tests: the same arguments, values by the definition."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

DTYPES = (torch.float16, torch.bfloat16)


@contextmanager
def flash_on_cpu() -> Iterator[None]:
    """Register the kernels; float32 tensors, for which CUDA has none, are an error."""
    library = torch.library.Library("aten", "IMPL")
    library.impl("_flash_attention_forward", _forward, "CPU")
    library.impl("_flash_attention_backward", _backward, "CPU")
    try:
        yield
    finally:
        library._destroy()


def _forward(q: Tensor, k: Tensor, v: Tensor, begins: Tensor, *rest: Any, **_: Any) -> tuple[Tensor, ...]:
    begins_k, longest, longest_k, dropout, causal, _ = rest
    assert (dropout, causal) == (0.0, False) and q.dtype in DTYPES and begins.dtype == torch.int32
    assert torch.equal(begins, begins_k) and begins[-1] == len(q) and q.stride(2) == 1
    assert longest == longest_k == begins.diff().max()
    parts = [_weights(q, k, rows) @ _heads(v, rows) for rows in _sequences(begins)]
    out = torch.cat([part.transpose(0, 1) for part in parts]).to(q.dtype)
    state = torch.zeros(2, dtype=torch.uint64)
    return out, torch.zeros(q.shape[1], len(q)), state, torch.empty(0), torch.empty(0)


def _backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any, **_: Any) -> tuple[Tensor, ...]:
    grads: list[list[Tensor]] = [[], [], []]
    scale = q.shape[2] ** -0.5
    for rows in _sequences(rest[2]):
        weights, above = _weights(q, k, rows), _heads(grad, rows)
        of_weights = above @ _heads(v, rows).transpose(1, 2)
        of_logits = weights * (of_weights - (of_weights * weights).sum(dim=2, keepdim=True)) * scale
        grads[0].append(of_logits @ _heads(k, rows))
        grads[1].append(of_logits.transpose(1, 2) @ _heads(q, rows))
        grads[2].append(weights.transpose(1, 2) @ above)
    of_q, of_k, of_v = (torch.cat([part.transpose(0, 1) for part in parts]).to(q.dtype) for parts in grads)
    return of_q, of_k, of_v


def _sequences(begins: Tensor) -> list[slice]:
    ends: list[int] = begins.tolist()
    return [slice(begin, end) for begin, end in pairwise(ends)]


def _heads(x: Tensor, rows: slice) -> Tensor:
    """A sequence of packed [T, H, D] as float32 [H, n, D]."""
    return x[rows].float().transpose(0, 1)


def _weights(q: Tensor, k: Tensor, rows: slice) -> Tensor:
    return (_heads(q, rows) @ _heads(k, rows).transpose(1, 2) * q.shape[2] ** -0.5).softmax(dim=2)  # [H, n, n]
