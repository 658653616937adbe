"""The corrected backward pass of LibraGrad, for any vision transformer and without changing it.

Source: Mehri, Soleymani Baghshah and Pilehvar, "LibraGrad: Balancing Gradient Flow for Universally Better Vision
Transformer Attributions", CVPR 2025. The gradient of a transformer is not complete: input times gradient and bias times
gradient do not sum to the output. It is, once the network is seen as linear in its activations:

    attention            the probabilities count as constants: A V is linear in V
    normalisation        the standard deviation counts as a constant, the mean does not: that one is linear
    GELU, SiLU           f(x) = x (f(x) / x), and the factor counts as a constant
    sigmoid              counts as a constant: it is the factor of a gate
    product of two       each activation gets half of the gradient: the product has degree two
    quotient             the divisor counts as a constant

The forward pass is unchanged.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from zpipe.pipeline.attention_recorder import AttentionRecorder


class BalancedGradients(AttentionRecorder):
    """While it is active, a forward pass records the corrected backward pass for autograd.

    Args:
        differentiate: Whether the attention probabilities become leaves whose gradient can be asked for; they are
            constants otherwise.
    """

    def __init__(self, *, differentiate: bool = False) -> None:
        super().__init__(change=lambda p: p.detach().requires_grad_(differentiate))

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        rule = RULES.get(func)
        if rule is None:
            return super().__torch_function__(func, types, args, kwargs)
        return rule(func, *args, **(kwargs or {}))


def layer_norm(
    func: Any, x: Tensor, shape: Any, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    axes = tuple(range(-len(shape), 0))
    centred = x - x.mean(dim=axes, keepdim=True)
    out = centred * (centred.detach().square().mean(dim=axes, keepdim=True) + eps).rsqrt()
    if weight is not None:
        out = out * weight
    return out if bias is None else out + bias


def rms_norm(func: Any, x: Tensor, shape: Any, weight: Tensor | None = None, eps: float | None = None) -> Tensor:
    axes = tuple(range(-len(shape), 0))
    eps = torch.finfo(x.dtype).eps if eps is None else eps
    out = x * (x.detach().square().mean(dim=axes, keepdim=True) + eps).rsqrt()
    return out if weight is None else out * weight


def gate(func: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    kwargs.pop("inplace", None)
    values = x.detach()
    factor = func(values, *args, **kwargs).div_(values).nan_to_num_(0.5)
    return x * factor


def constant(func: Any, *args: Any, **kwargs: Any) -> Tensor:
    with torch.no_grad():
        return func(*args, **kwargs)


def product(func: Any, a: Any, b: Any, **kwargs: Any) -> Any:
    if _is_activation(a) and _is_activation(b):
        half = (a.detach() * b + a * b.detach()) / 2
        return half
    return func(a, b, **kwargs)


def quotient(func: Any, a: Any, b: Any, **kwargs: Any) -> Any:
    return func(a, b.detach() if isinstance(b, Tensor) else b, **kwargs)


def _is_activation(x: Any) -> bool:
    return isinstance(x, Tensor) and x.requires_grad and not x.is_leaf


RULES: dict[Any, Callable[..., Any]] = {
    F.layer_norm: layer_norm,
    F.rms_norm: rms_norm,
    **dict.fromkeys((F.gelu, F.silu), gate),
    **dict.fromkeys((torch.sigmoid, Tensor.sigmoid, F.sigmoid, torch.rsqrt, Tensor.rsqrt), constant),
    **dict.fromkeys((torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__), product),
    **dict.fromkeys((torch.div, Tensor.div, Tensor.__truediv__), quotient),
}
