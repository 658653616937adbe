"""The corrected backward pass of LibraGrad, for any vision transformer and without changing it.

Source: Mehri, Soleymani Baghshah and Pilehvar, "LibraGrad: Balancing Gradient Flow for Universally Better Vision
Transformer Attributions", CVPR 2025. The gradient of a transformer is not complete: input times gradient and bias times
gradient do not sum to the output. They do once these factors count as constants:

    attention            the probabilities: A V is linear in V
    normalisation        the standard deviation; the mean is linear and keeps its gradient
    GELU, SiLU, Mish     f(x) / x, so that f(x) = x (f(x) / x) is linear in x
    sigmoid, tanh, erf   all of it: it is the factor of a gate, as where a GELU is written out
    quotient             the divisor
    product of two       each activation gets half of its gradient, because the product has degree two

The values of the forward pass do not change.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from zpipe.pipeline.attention_recorder import AttentionRecorder


class BalancedGradients(AttentionRecorder):
    """While it is active, autograd records the corrected backward pass.

    Functions without a rule keep their gradient. It is right where they are linear in the activations, or piecewise
    linear through zero like ReLU; `check_activations` refuses other activations. A weight that multiplies activations,
    such as that of a LayerScale, must be a parameter or need no gradient, or else it counts as an activation.
    """

    def __init__(self) -> None:
        super().__init__(change=Tensor.detach, keep=lambda probabilities: probabilities[:0])

    @override
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        rule = RULES.get(func)
        if rule is None:
            return super().__torch_function__(func, types, args, kwargs)
        return rule(func, *args, **(kwargs or {}))


def check_activations(blocks: Iterable[nn.Module]) -> None:
    """Check that the corrected gradient of each kind of activation in the blocks is complete: x f'(x) = f(x).

    Checked are the innermost modules that take one tensor and have no weights, or one number.

    Raises:
        ValueError: One of them is not complete, such as a ReLU6 or a tanh that is no factor of a gate.
    """
    inner = [module for block in blocks for module in block.modules() if _is_activation_layer(module)]
    for module in {repr(module): module for module in inner}.values():
        like = next(module.parameters(), torch.empty(0))
        with torch.inference_mode(False), torch.enable_grad():
            x = torch.linspace(-32, 32, 64, dtype=like.dtype, device=like.device).requires_grad_()
            with BalancedGradients():
                y = module.forward(x * 1)
            score = (y * torch.linspace(1, 2, len(y), dtype=y.dtype, device=y.device)).sum()  # no errors cancel out
            # A function of constant factors alone is on no graph.
            grad = torch.autograd.grad(score, x)[0] if score.requires_grad else torch.zeros_like(x)
        if not torch.allclose((x * grad).sum(), score, rtol=0.02):  # bfloat16 rounds
            raise ValueError(f"no rule for the activation {type(module).__name__}: its gradient would not be complete")


def _is_activation_layer(module: nn.Module) -> bool:
    if any(module.children()) or any(parameter.numel() > 1 for parameter in module.parameters()):
        return False
    arguments = inspect.signature(module.forward).parameters.values()
    return sum(argument.default is argument.empty for argument in arguments) == 1


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


def _gate(func: Callable[..., Tensor], x: Tensor, *args: Any, limit: float = 0.5, **kwargs: Any) -> Tensor:
    kwargs.pop("inplace", None)
    values = x.detach()
    factor = func(values, *args, **kwargs).div_(values)
    return x * factor.masked_fill_(values == 0, limit)  # of f(x) / x at 0


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
    **dict.fromkeys((F.gelu, F.silu, F.hardswish), _gate),
    F.mish: partial(_gate, limit=0.6),
    **dict.fromkeys((torch.sigmoid, Tensor.sigmoid, F.sigmoid, torch.rsqrt, Tensor.rsqrt), _constant),
    **dict.fromkeys((torch.tanh, Tensor.tanh, F.tanh, torch.erf, Tensor.erf, torch.special.erf), _constant),
    **dict.fromkeys((torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__imul__), _product),
    **dict.fromkeys((torch.div, Tensor.div, Tensor.__truediv__), _quotient),
}
