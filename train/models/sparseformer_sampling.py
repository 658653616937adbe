"""Where the tokens of a SparseFormer look, and how they mix what they read there. Tensors in, tensors out."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zpipe.train.models.backbone import layer_norm


class Glimpse(NamedTuple):
    """Where the tokens of a batch look in one sampling stage, in image sides from the top left corner.

    Attributes:
        rois: float32 [B, N, 4] as (left, top, right, bottom); they may extend beyond the image.
        points: float32 [B, N, P, 2], the (x, y) of every sample; outside of [0, 1] it reads zeros.
    """

    rois: Tensor
    points: Tensor


class Sampler(nn.Module):
    """The weights by which a token moves its RoI, places its points, and mixes what it reads there.

    Args:
        dim: width d of the tokens.
        conv_dim: C, channels of the feature map.
        num_points: P, points of a token.
    """

    def __init__(self, dim: int, conv_dim: int, num_points: int) -> None:
        super().__init__()
        self.conv_dim, self.num_points = conv_dim, num_points
        self.norm_adjust = layer_norm(dim)
        self.adjust = nn.Linear(dim, 4, bias=False)
        self.norm_offset = layer_norm(dim)
        self.offset = nn.Linear(dim, 2 * num_points, bias=False)
        self.offset_bias = nn.Parameter(torch.empty(2 * num_points))  # x, y, x, y, ...; flat, so that it doesn't decay
        self.norm_mix = layer_norm(dim)
        self.reduce = nn.Linear(dim, dim // 4)
        self.generate = nn.Linear(dim // 4, conv_dim**2 + num_points**2)
        self.channel_bias = nn.Parameter(torch.zeros(conv_dim))
        self.point_bias = nn.Parameter(torch.zeros(num_points))
        self.out = nn.Linear(num_points * conv_dim, dim)

    @torch.no_grad()
    def initialise(self) -> None:
        """Initialise so that RoIs stay, points lie on a grid, and the mixing is the same for every token (A.3)."""
        for norm in (self.norm_adjust, self.norm_offset, self.norm_mix):
            nn.init.constant_(norm.weight, norm.normalized_shape[0] ** -0.5)
        nn.init.zeros_(self.adjust.weight)
        nn.init.normal_(self.offset_bias)  # final for points beyond the largest square number
        side = math.isqrt(self.num_points)
        self.offset_bias[: 2 * side**2] = (_pairs((torch.arange(side) + 0.5) / side) - 0.5).flatten()
        nn.init.zeros_(self.generate.weight)
        channel, point = self.generate.bias.split([self.conv_dim**2, self.num_points**2])
        nn.init.xavier_uniform_(channel.view(self.conv_dim, -1))
        nn.init.xavier_uniform_(point.view(self.num_points, -1))

    def deltas(self, tokens: Tensor) -> Tensor:
        """Eq. 9: tokens [B, N, d] -> [B, N, 4], (x, y, width, height)."""
        return self.adjust(self.norm_adjust(tokens))

    def offsets(self, tokens: Tensor) -> Tensor:
        """Eq. 2: tokens [B, N, d] -> float32 [B, N, P, 2], before their normalisation."""
        offsets: Tensor = self.offset(self.norm_offset(tokens)).float() + self.offset_bias.float()
        return offsets.unflatten(2, (self.num_points, 2))

    def mix(self, sampled: Tensor, tokens: Tensor) -> Tensor:
        """Eq. 4 to 6: mix samples [B, N, P, C] by matrices that tokens [B, N, d] generate -> [B, N, d]."""
        matrices = self.generate(self.reduce(self.norm_mix(tokens))).flatten(0, 1)  # [B * N, C * C + P * P]
        channel, point = matrices.split([self.conv_dim**2, self.num_points**2], dim=1)
        channel = channel.unflatten(1, (self.conv_dim, self.conv_dim))
        point = point.unflatten(1, (self.num_points, self.num_points))
        x = sampled.flatten(0, 1).to(matrices.dtype)  # [B * N, P, C]
        x = F.gelu(torch.baddbmm(self.channel_bias.to(x.dtype), x, channel))
        x = F.gelu(torch.baddbmm(self.point_bias.to(x.dtype)[:, None], point, x))
        return self.out(x.flatten(1)).unflatten(0, tokens.shape[:2])

    def macs(self) -> int:
        """Multiply-adds of one token."""
        linear = sum(x.weight.numel() for x in (self.adjust, self.offset, self.reduce, self.generate, self.out))
        return linear + self.num_points * self.conv_dim * (self.conv_dim + self.num_points)


def adjust_rois(rois: Tensor, deltas: Tensor) -> Tensor:
    """Eq. 7 and 8: centres move by a fraction of the size, sizes are multiplied by an exponential.

    Args:
        rois: float32 [..., 4] as (left, top, right, bottom).
        deltas: [..., 4] as (x, y, width, height).

    Returns:
        float32 [..., 4].
    """
    deltas = deltas.float()
    corner, opposite = rois.split(2, dim=-1)
    size = (opposite - corner).abs()  # learned RoIs could turn inside out
    centre = (corner + opposite) / 2 + deltas[..., :2] * size
    half = size * deltas[..., 2:].exp() / 2
    return torch.cat([centre - half, centre + half], dim=-1)


def place_points(rois: Tensor, offsets: Tensor) -> Tensor:
    """Eq. 3, without its factor 0.5 (see `SparseFormer`): points of each token, in image sides.

    The offsets are normalised to mean 0 and standard deviation 1/3, per token and axis.

    Args:
        rois: float32 [B, N, 4].
        offsets: float32 [B, N, P, 2].

    Returns:
        float32 [B, N, P, 2] as (x, y).
    """
    std, mean = torch.std_mean(offsets, dim=2, keepdim=True)  # unbiased
    corner, opposite = rois[:, :, None].split(2, dim=3)  # [B, N, 1, 2]
    return (corner + opposite) / 2 + (offsets - mean) / (3 * (std + 1e-7)) * (opposite - corner)


def sample(features: Tensor, points: Tensor) -> Tensor:
    """Sample features bilinearly in float32, with zeros outside of the image.

    A coordinate's gradient is clamped to one cell of the feature map, 1/w or 1/h: bilinear gradients are valid no
    further. The scale of a scaled loss, as fp16 needs, is not known here, so the gradient would be clamped too early:
    train in bf16 or float32.

    Args:
        features: float32 [B, C, h, w].
        points: [B, N, P, 2], in image sides.

    Returns:
        float32 [B, N, P, C].
    """
    height, width = features.shape[2:]
    if points.requires_grad:
        points.register_hook(lambda grad: _clamped(grad, (1 / width, 1 / height)))
    with torch.autocast(features.device.type, enabled=False):
        sampled = F.grid_sample(features, 2 * points - 1, "bilinear", "zeros", align_corners=False)  # [B, C, N, P]
    return sampled.permute(0, 2, 3, 1)


def _clamped(grad: Tensor, limits: tuple[float, float]) -> Tensor:
    """[..., 2], each of the two clamped to its limit: by numbers, since a tensor of them would have to be copied."""
    return torch.stack([x.clamp(-limit, limit) for x, limit in zip(grad.unbind(-1), limits, strict=True)], dim=-1)


def _pairs(values: Tensor) -> Tensor:
    """All pairs (x, y) of values [n], x fastest: [n * n, 2]."""
    y, x = torch.meshgrid(values, values, indexing="ij")
    return torch.stack([x.flatten(), y.flatten()], dim=1)


def initial_rois(num_tokens: int) -> Tensor:
    """The initial RoIs of N tokens, [N, 4].

    They are half as wide and high as the image and evenly spread; tokens beyond the largest square number see all of
    it.
    """
    side = math.isqrt(num_tokens)
    corner = _pairs(torch.linspace(0, 0.5, side) if side > 1 else torch.tensor([0.25]))
    rois = torch.tensor([0.0, 0.0, 1.0, 1.0]).repeat(num_tokens, 1)
    rois[: side**2] = torch.cat([corner, corner + 0.5], dim=1)
    return rois
