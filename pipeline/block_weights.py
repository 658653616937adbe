"""The layers of a ViT's block, as the forward pass and the downward sweep multiply with them.

Symbols in the shape comments are those of `zpipe.pipeline.recorded_forward`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from timm.layers import GELUTanh, LayerScale
from timm.models.vision_transformer import Block
from torch import Tensor, nn


class Linear(NamedTuple):
    """Weight and bias of a linear layer."""

    weight: Tensor  # [out, in]
    bias: Tensor | None  # [out]
    magnitude: Tensor | None = None  # [out, in], abs(weight), where it is kept

    @classmethod
    def of(cls, layer: nn.Linear, scale: nn.Module | None = None) -> Linear:
        """The layer, merged with the LayerScale that may follow it.

        A linear layer and a factor per channel are one linear layer with scaled rows, and get relevance as such. So a
        network has the same map whether the factor is stored separately or multiplied in.
        """
        if not isinstance(scale, LayerScale):
            return cls(layer.weight, layer.bias)
        bias = None if layer.bias is None else layer.bias * scale.gamma
        return cls(layer.weight * scale.gamma[:, None], bias)

    def rows(self, rows: slice) -> Linear:
        """The layer that computes only these outputs."""
        bias, magnitude = (None if part is None else part[rows] for part in (self.bias, self.magnitude))
        return Linear(self.weight[rows], bias, magnitude)

    def to(self, dtype: torch.dtype) -> Linear:
        """The layer in another dtype."""
        return Linear(self.weight.to(dtype), None if self.bias is None else self.bias.to(dtype))

    def keep(self, factors: torch.dtype) -> Linear:
        """The layer with the magnitude of its weight; both are rounded as factors of products are."""
        return Linear(self.weight.to(factors), self.bias, self.weight.abs().to(factors))

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        return F.linear(x, self.weight, self.bias)


class Norm(NamedTuple):
    """A LayerNorm."""

    weight: Tensor | None  # [D]
    bias: Tensor | None  # [D]
    eps: float

    @classmethod
    def of(cls, norm: nn.LayerNorm) -> Norm:
        """The parameters of a module."""
        return cls(norm.weight, norm.bias, norm.eps)

    def to(self, dtype: torch.dtype) -> Norm:
        """The layer in another dtype."""
        weight, bias = (None if part is None else part.to(dtype) for part in (self.weight, self.bias))
        return Norm(weight, bias, self.eps)


class BlockWeights(NamedTuple):
    """The layers of a block, as the functions of this package compute with them."""

    norm1: Norm
    qkv: Linear
    proj: Linear  # merged with its LayerScale, as fc2 is
    norm2: Norm
    fc1: Linear
    fc2: Linear
    heads: int
    scale: float
    gelu: str

    @classmethod
    def of(cls, block: Block) -> BlockWeights:
        """The layers in the dtype of the model."""
        attn, mlp = block.attn, block.mlp
        layers = Linear.of(attn.qkv), Linear.of(attn.proj, block.ls1), Linear.of(mlp.fc1), Linear.of(mlp.fc2, block.ls2)
        qkv, proj, fc1, fc2 = layers
        norm1, norm2 = Norm.of(block.norm1), Norm.of(block.norm2)
        return cls(norm1, qkv, proj, norm2, fc1, fc2, attn.num_heads, attn.scale, gelu_kind(mlp.act))

    def to(self, dtype: torch.dtype) -> BlockWeights:
        """The layers in another dtype."""
        return self._replace(**{name: getattr(self, name).to(dtype) for name in self._fields[:6]})

    def keep(self, factors: torch.dtype) -> BlockWeights:
        """The layers with the magnitudes of their weights, see `Linear.keep`."""
        return self._replace(**{name: getattr(self, name).keep(factors) for name in ("qkv", "proj", "fc1", "fc2")})


def gelu_kind(act: nn.Module) -> str:
    """The approximation of a GELU module, as torch names it."""
    return "tanh" if isinstance(act, GELUTanh) else getattr(act, "approximate", "none")
