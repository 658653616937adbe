"""The corrected backward pass of LibraGrad, for any vision transformer and without changing it.

Source: Mehri, Soleymani Baghshah and Pilehvar, "LibraGrad: Balancing Gradient Flow for Universally Better Vision
Transformer Attributions", CVPR 2025. The gradient of a transformer is not complete: input times gradient and bias times
gradient do not sum to the output. They do once these factors count as constants:

    attention            the probabilities: A V is linear in V
    normalisation        the standard deviation; the mean is linear and keeps its gradient
    GELU, SiLU           f(x) / x, so that f(x) = x (f(x) / x) is linear in x
    sigmoid              all of it: it is the factor of a gate
    quotient             the divisor
    product of two       each activation gets half of its gradient, because the product has degree two

The values of the forward pass do not change.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import override

from zpipe.pipeline.attention_recorder import AttentionRecorder


class BalancedGradients(AttentionRecorder):
    """While it is active, autograd records the corrected backward pass.

    Functions without a rule keep their gradient. It is right where they are linear in the activations, or piecewise
    linear through zero like ReLU. A weight that multiplies activations, such as that of a LayerScale, must be a
    parameter or need no gradient, or else it counts as an activation.
    """

    def __init__(self) -> None:
        super().__init__(change=Tensor.detach, keep=lambda probabilities: probabilities[:0])

    @override
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        rule = RULES.get(func)
        if rule is None:
            return super().__torch_function__(func, types, args, kwargs)
        return rule(func, *args, **(kwargs or {}))


def _layer_norm(
    _func: object,
    x: Tensor,
    shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    normed = _by_root_mean_square(x - x.mean(dim=_last(shape), keepdim=True), shape, weight, eps)
    return normed if bias is None else normed + bias


def _rms_norm(
    _func: object, x: Tensor, shape: Sequence[int], weight: Tensor | None = None, eps: float | None = None
) -> Tensor:
    return _by_root_mean_square(x, shape, weight, torch.finfo(x.dtype).eps if eps is None else eps)


def _by_root_mean_square(x: Tensor, shape: Sequence[int], weight: Tensor | None, eps: float) -> Tensor:
    """Divide by the root mean square over the last axes, a constant, and scale."""
    normed = x * (x.detach().square().mean(dim=_last(shape), keepdim=True) + eps).rsqrt()
    return normed if weight is None else normed * weight


def _last(shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(range(-len(shape), 0))


def _gate(func: Callable[..., Tensor], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    kwargs.pop("inplace", None)
    values = x.detach()
    factor = func(values, *args, **kwargs).div_(values)
    return x * factor.masked_fill_(values == 0, 0.5)  # the limit of GELU and SiLU


def _constant(func: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
    return func(*args, **kwargs).detach()


def _product(func: Callable[..., Any], a: Any, b: Any, **kwargs: Any) -> Any:
    if not (_is_activation(a) and _is_activation(b)):
        return func(a, b, **kwargs)
    return (a.detach() * b + a * b.detach()) / 2


def _quotient(func: Callable[..., Any], a: Any, b: Any, **kwargs: Any) -> Any:
    return func(a, b.detach() if isinstance(b, Tensor) else b, **kwargs)


def _normalize(_func: object, x: Tensor, p: float = 2.0, dim: int = 1, eps: float = 1e-12, **_out: None) -> Tensor:
    return x / x.detach().norm(p, dim, keepdim=True).clamp_min(eps)


def _is_activation(x: object) -> bool:
    return isinstance(x, Tensor) and x.requires_grad and not x.is_leaf


RULES: dict[Any, Callable[..., Any]] = {
    F.layer_norm: _layer_norm,
    F.rms_norm: _rms_norm,
    F.normalize: _normalize,
    **dict.fromkeys((F.gelu, F.silu), _gate),
    **dict.fromkeys((torch.sigmoid, Tensor.sigmoid, F.sigmoid, torch.rsqrt, Tensor.rsqrt), _constant),
    **dict.fromkeys((torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__imul__), _product),
    **dict.fromkeys((torch.div, Tensor.div, Tensor.__truediv__), _quotient),
}
