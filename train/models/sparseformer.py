"""SparseFormer v1 (Gao et al. 2023): a few latent tokens that look for themselves where in the image to sample.

A rival of ZoomViT: there a zoomer chooses the finer patches, here every token carries a region of interest (RoI) that it
moves and rescales itself, and reads 36 points of it. Importing this module registers sparseformer_{tiny,small,base}.
"""

from __future__ import annotations

import math
import re
from typing import Any, NamedTuple

import timm
import torch
import torch.nn.functional as F
from timm.layers import drop_path, trunc_normal_
from timm.models import build_model_with_cfg, register_model
from torch import Tensor, nn

from zpipe.train.models.backbone import untrained_cfgs
from zpipe.train.models.operating_points import ImageCost, OperatingPoint
from zpipe.train.models.released_weights import ReleasedWeights

_EPS = 1e-6  # of all LayerNorms with parameters


class Glimpse(NamedTuple):
    """Where the tokens of a batch look in one sampling stage. Units are image sides, the origin is the top left corner.

    rois    float32 [B, N, 4]: (left, top, right, bottom); they may reach beyond the image.
    points  float32 [B, N, P, 2]: (x, y) of every sample; outside of [0, 1] it reads zeros.
    """

    rois: Tensor
    points: Tensor


class SparseFormer(nn.Module):
    """SparseFormer v1; the default is the tiny variant: 31.52 M parameters, 2.178 GMACs at 224 px.

    `model(images)` -> logits, for images of any size: only the stem's cost grows with it. `glimpses(images)` tells where
    the tokens looked.

    The parts, in this order (section 3): the stem makes one feature map; the focusing unit runs `focus_repeats` times with
    the same weights; a linear layer widens the tokens; `cortex_depth` units follow, of which the first samples too.
    A unit is self-attention, RoI adjustment, sampling with adaptive mixing, and an FFN, pre-norm, each with a residual.

    Where the authors' code, which this follows, is not what the paper says:

    - Sampling offsets are not halved (Eq. 3 has a factor 0.5): normalised by three standard deviations, points spread over
      about a third of the RoI to each side instead of a sixth.
    - The weights that make offsets don't start at zero (A.3), but like other linear layers, after a LayerNorm of small gain.
    - Stochastic depth drops RoI adjustments too, for all tokens of an image.
    - Attention has 64 heads at every width, so 4 channels each in the focusing unit of the tiny variant.
    - Gradients with respect to sampling points are clamped to one feature-map cell, 1/56 at 224 px.
    - The paper's 2.0, 3.8 and 7.8 G leave out the mixing's products with generated matrices.

    Args:
        conv_dim: C, channels of the stem.
        num_tokens: N latent tokens.
        num_points: P samples of a token.
        focus_dim, cortex_dim: widths of the two parts.
        focus_repeats: how often the focusing unit runs.
        cortex_depth: units of the cortex, the sampling one included.
        num_heads: of attention, at both widths.
        num_classes: 0 makes the head an identity.
        in_chans: channels of the image.
        mlp_ratio: of the FFN.
        drop_path_rate: stochastic depth of the last unit; it grows linearly from 0 over repeats and units. The paper
            trains tiny, small and base with .2, .3 and .4.

    Raises:
        ValueError: widths that don't divide by num_heads or by 4, or counts below 1.
    """

    def __init__(
        self,
        conv_dim: int = 96,
        num_tokens: int = 49,
        num_points: int = 36,
        focus_dim: int = 256,
        cortex_dim: int = 512,
        focus_repeats: int = 4,
        cortex_depth: int = 8,
        num_heads: int = 64,
        num_classes: int = 1000,
        *,
        in_chans: int = 3,
        mlp_ratio: float = 4.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        for name, dim in (("focus_dim", focus_dim), ("cortex_dim", cortex_dim)):
            if dim < 4 or dim % 4 or dim % num_heads:
                raise ValueError(f"{name} must divide by 4 and by num_heads {num_heads}, got {dim}")
        counts = {"num_tokens": num_tokens, "focus_repeats": focus_repeats, "cortex_depth": cortex_depth}
        if low := [f"{name} {count}" for name, count in counts.items() if count < 1]:
            raise ValueError(f"num_tokens, focus_repeats and cortex_depth must be at least 1, got {low[0]}")
        if num_points < 2:
            raise ValueError(
                f"num_points must be at least 2, for offsets are normalised by their spread, got {num_points}"
            )
        self.num_classes = num_classes
        self.num_features = self.embed_dim = cortex_dim
        self.focus_repeats = focus_repeats
        uses = focus_repeats + cortex_depth
        self.drop_rates = [drop_path_rate * i / max(uses - 1, 1) for i in range(uses)]

        self.stem = nn.Conv2d(in_chans, conv_dim, 7, stride=2, padding=3)
        self.num_tokens = num_tokens
        self.token_embedding = nn.Parameter(torch.empty(num_tokens, focus_dim))
        self.token_roi = nn.Parameter(_initial_rois(num_tokens))  # [N, 4]
        sampling = {"conv_dim": conv_dim, "num_points": num_points}
        self.focus = Unit(focus_dim, num_heads, mlp_ratio, **sampling)
        self.bridge = nn.Sequential(nn.Linear(focus_dim, cortex_dim), nn.LayerNorm(cortex_dim, eps=_EPS))
        self.cortex = nn.ModuleList(
            Unit(cortex_dim, num_heads, mlp_ratio, **(sampling if i == 0 else {})) for i in range(cortex_depth)
        )
        self.norm = nn.LayerNorm(cortex_dim, eps=_EPS)
        self.head = nn.Linear(cortex_dim, num_classes) if num_classes else nn.Identity()
        self._initialise()

    @torch.no_grad()
    def _initialise(self) -> None:
        """Section A.3 as their code has it: token embeddings normal with standard deviation 1, cut at 2; see also `Sampler`."""
        nn.init.kaiming_normal_(self.stem.weight, mode="fan_out", nonlinearity="relu")
        trunc_normal_(self.token_embedding, std=1.0)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for module in self.modules():
            if isinstance(module, Sampler):
                module.initialise()

    def forward(self, images: Tensor) -> Tensor:
        """images [B, in_chans, H, W] -> logits [B, num_classes]. Raises ValueError for images of another shape."""
        return self.forward_head(self.forward_features(images))

    def forward_features(self, images: Tensor) -> Tensor:
        """The tokens after the last unit, [B, N, cortex_dim]; not normalised, for their mean is."""
        return self._run(images, [])

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        """Tokens [B, N, cortex_dim] -> logits [B, num_classes], or the normalised mean token with pre_logits."""
        pooled = self.norm(features.mean(dim=1))  # [B, cortex_dim]
        return pooled if pre_logits else self.head(pooled)

    @torch.no_grad()
    def glimpses(self, images: Tensor) -> list[Glimpse]:
        """Where each token looks, stage by stage: the focusing unit's repeats, then the cortex. Images as in `forward`."""
        seen: list[Glimpse] = []
        self._run(images, seen)
        return seen

    def _run(self, images: Tensor, seen: list[Glimpse]) -> Tensor:
        features = self._extract(images)
        tokens = self.token_embedding.repeat(len(images), 1, 1)  # [B, N, focus_dim]
        rois = self.token_roi.float().repeat(len(images), 1, 1)  # [B, N, 4]
        for i, rate in enumerate(self.drop_rates):
            if i == self.focus_repeats:
                tokens = self.bridge(tokens)  # [B, N, cortex_dim]
            unit = self.focus if i < self.focus_repeats else self.cortex[i - self.focus_repeats]
            tokens, rois = unit(tokens, rois, features, rate, seen)
        return tokens

    def _extract(self, images: Tensor) -> Tensor:
        """The stem: [B, in_chans, H, W] -> float32 [B, C, H/4, W/4], normalised over channels."""
        chans = self.stem.in_channels
        if images.ndim != 4 or images.shape[1] != chans or not images.shape[0] or min(images.shape[2:]) < 4:
            raise ValueError(
                f"images must be [batch, {chans}, height, width], >= 4 px a side, got {list(images.shape)}"
            )
        # Pooling and ReLU change places, which changes no value and spares three quarters of the ReLU; a CPU pools and
        # normalises over channels twice as fast when they lie side by side.
        x = self.stem(images.contiguous(memory_format=torch.channels_last))
        x = F.relu(F.max_pool2d(x, 3, stride=2, padding=1)).float()
        var, mean = torch.var_mean(x, dim=1, keepdim=True)  # unbiased, as in their code
        return (x - mean) * torch.rsqrt(var + 1e-7)

    # How it is run

    RELEASE_NAME = "SparseFormer v1"
    RELEASE_CONFIG = ("num_heads", "focus_repeats")

    def cost(self, point: OperatingPoint, kind: int | None = None) -> ImageCost:
        """The same for every image."""
        return ImageCost(float(self.num_tokens), point.arguments)

    @classmethod
    def load_release(cls, weights: ReleasedWeights, num_heads: int, focus_repeats: int) -> SparseFormer:
        """The model that published weights belong to, in eval mode. See `release.load_release`.

        Raises:
            ValueError: weights that aren't those of a published SparseFormer v1.
        """
        ours = weights.renamed(_our_name)
        focus_dim = ours.shape("focus.qkv.weight")[1]
        model: SparseFormer = timm.create_model(
            "sparseformer_tiny",
            conv_dim=ours.shape("stem.weight")[0],
            num_tokens=ours.shape("token_roi")[0],
            num_points=ours.shape("focus.sampler.offset_bias")[0] // 2,
            focus_dim=focus_dim,
            cortex_dim=ours.shape("bridge.0.weight")[0],
            focus_repeats=focus_repeats,
            cortex_depth=ours.count(r"cortex\.(\d+)\."),
            num_heads=num_heads,
            num_classes=ours.shape("head.weight")[0],
            in_chans=ours.shape("stem.weight")[1],
            mlp_ratio=ours.shape("focus.fc1.weight")[0] / focus_dim,
        )
        weights.fill(model, _our_name)
        return model.eval()

    def macs(self, img_size: int = 224) -> int:
        """Multiply-adds of an image of img_size x img_size pixels as torch's flop counter sees them: matrix products and
        the convolution, not bilinear sampling.
        """
        side = (img_size + 1) // 2
        tokens = self.num_tokens
        total = self.stem.weight.numel() * side * side + tokens * self.bridge[0].weight.numel()
        total += self.focus_repeats * self.focus.macs(tokens) + sum(unit.macs(tokens) for unit in self.cortex)
        return total + (self.head.weight.numel() if self.num_classes else 0)

    # What timm's optimizers and fine-tuning tools ask of a model.

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Parameters that weight decay leaves alone, besides the one-dimensional ones. Token embeddings do decay."""
        return {"token_roi"}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Which parameters belong to which layer, for layer-wise learning rates; the focusing unit is one layer."""
        blocks = [(r"^focus", (-2,)), (r"^bridge", (-1,)), (r"^cortex\.(\d+)", None), (r"^norm", (99999,))]
        return {"stem": r"^stem|^token_", "blocks": blocks}

    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int) -> None:
        """Replace the head by a freshly initialised one."""
        self.num_classes = num_classes
        self.head = nn.Identity()
        if num_classes:
            self.head = nn.Linear(self.embed_dim, num_classes).to(self.token_embedding)
            trunc_normal_(self.head.weight, std=0.02)
            nn.init.zeros_(self.head.bias)


class Unit(nn.Module):
    """One stage over tokens [B, N, d] and their RoIs [B, N, 4]; without conv_dim and num_points a plain transformer block."""

    def __init__(
        self, dim: int, num_heads: int, mlp_ratio: float, conv_dim: int | None = None, num_points: int | None = None
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm_attn = nn.LayerNorm(dim, eps=_EPS)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.sampler = None if conv_dim is None else Sampler(dim, conv_dim, num_points)
        self.norm_mlp = nn.LayerNorm(dim, eps=_EPS)
        self.fc1 = nn.Linear(dim, int(dim * mlp_ratio))
        self.fc2 = nn.Linear(int(dim * mlp_ratio), dim)

    def forward(
        self, tokens: Tensor, rois: Tensor, features: Tensor, rate: float, seen: list[Glimpse]
    ) -> tuple[Tensor, Tensor]:
        """features: the stem's. rate: of stochastic depth. A sampling unit appends to `seen` where it looked."""
        tokens = tokens + drop_path(self._attend(self.norm_attn(tokens)), rate, self.training)
        if self.sampler is not None:
            deltas = drop_path(self.sampler.deltas(tokens), rate, self.training)  # [B, N, 4]
            rois = adjust_rois(rois, deltas)
            points = place_points(rois, self.sampler.offsets(tokens))  # [B, N, P, 2]
            seen.append(Glimpse(rois, points))
            sampled = sample(features, points)  # [B, N, P, C]
            tokens = tokens + drop_path(self.sampler.mix(sampled, tokens), rate, self.training)
        x = self.fc2(F.gelu(self.fc1(self.norm_mlp(tokens))))
        return tokens + drop_path(x, rate, self.training), rois

    def _attend(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)  # [B, heads, N, d / heads]
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    def macs(self, tokens: int) -> int:
        """Multiply-adds for that many tokens."""
        linear = sum(layer.weight.numel() for layer in (self.qkv, self.proj, self.fc1, self.fc2))
        total = tokens * linear + 2 * tokens**2 * self.proj.in_features
        return total + (0 if self.sampler is None else tokens * self.sampler.macs())


class Sampler(nn.Module):
    """The weights by which a token moves its RoI, places its points, and mixes what it read there."""

    def __init__(self, dim: int, conv_dim: int, num_points: int) -> None:
        super().__init__()
        self.conv_dim, self.num_points = conv_dim, num_points
        self.norm_adjust = nn.LayerNorm(dim, eps=_EPS)
        self.adjust = nn.Linear(dim, 4, bias=False)
        self.norm_offset = nn.LayerNorm(dim, eps=_EPS)
        self.offset = nn.Linear(dim, 2 * num_points, bias=False)
        self.offset_bias = nn.Parameter(torch.empty(2 * num_points))  # x, y, x, y, ...; flat, so that it doesn't decay
        self.norm_mix = nn.LayerNorm(dim, eps=_EPS)
        self.reduce = nn.Linear(dim, dim // 4)
        self.generate = nn.Linear(dim // 4, conv_dim**2 + num_points**2)
        self.channel_bias = nn.Parameter(torch.zeros(conv_dim))
        self.point_bias = nn.Parameter(torch.zeros(num_points))
        self.out = nn.Linear(num_points * conv_dim, dim)

    @torch.no_grad()
    def initialise(self) -> None:
        """RoIs start still, points on a grid, mixing the same for every token (A.3)."""
        for norm in (self.norm_adjust, self.norm_offset, self.norm_mix):
            nn.init.constant_(norm.weight, norm.normalized_shape[0] ** -0.5)
        nn.init.zeros_(self.adjust.weight)
        nn.init.normal_(self.offset_bias)  # stays so for points beyond the largest square number
        side = math.isqrt(self.num_points)
        self.offset_bias[: 2 * side**2] = (_grid((torch.arange(side) + 0.5) / side) - 0.5).flatten()
        nn.init.zeros_(self.generate.weight)
        channel, point = self.generate.bias.split([self.conv_dim**2, self.num_points**2])
        nn.init.xavier_uniform_(channel.view(self.conv_dim, -1))
        nn.init.xavier_uniform_(point.view(self.num_points, -1))

    def deltas(self, tokens: Tensor) -> Tensor:
        """Eq. 9: tokens [B, N, d] -> [B, N, 4], (x, y, width, height)."""
        return self.adjust(self.norm_adjust(tokens))

    def offsets(self, tokens: Tensor) -> Tensor:
        """Eq. 2: tokens [B, N, d] -> float32 [B, N, P, 2], not yet normalised."""
        offsets = self.offset(self.norm_offset(tokens)).float() + self.offset_bias.float()
        return offsets.unflatten(2, (self.num_points, 2))

    def mix(self, sampled: Tensor, tokens: Tensor) -> Tensor:
        """Eq. 4 to 6: sampled [B, N, P, C], under matrices that tokens [B, N, d] make -> [B, N, d]."""
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


# -- where to look -----------------------------------------------------------------------------------------------------


def adjust_rois(rois: Tensor, deltas: Tensor) -> Tensor:
    """Eq. 7 and 8: centres move by a share of the size, sizes grow by an exponential.

    rois float32 [..., 4] as (left, top, right, bottom), deltas [..., 4] as (x, y, width, height) -> float32 [..., 4].
    """
    deltas = deltas.float()
    corner, opposite = rois.split(2, dim=-1)
    size = (opposite - corner).abs()  # learned RoIs could turn inside out
    centre = (corner + opposite) / 2 + deltas[..., :2] * size
    half = size * deltas[..., 2:].exp() / 2
    return torch.cat([centre - half, centre + half], dim=-1)


def place_points(rois: Tensor, offsets: Tensor) -> Tensor:
    """Eq. 3, without its factor 0.5 (see `SparseFormer`): points of each token in units of the image.

    Per token and axis the offsets are brought to mean 0 and a third of a standard deviation. rois float32 [B, N, 4],
    offsets float32 [B, N, P, 2] -> float32 [B, N, P, 2], (x, y).
    """
    std, mean = torch.std_mean(offsets, dim=2, keepdim=True)  # unbiased
    corner, opposite = rois[:, :, None].split(2, dim=3)  # [B, N, 1, 2]
    return (corner + opposite) / 2 + (offsets - mean) / (3 * (std + 1e-7)) * (opposite - corner)


def sample(features: Tensor, points: Tensor) -> Tensor:
    """Bilinear samples in float32, zeros outside. features float32 [B, C, h, w], points [B, N, P, 2] -> [B, N, P, C].

    A coordinate's gradient is clamped to one cell of the feature map, 1/w or 1/h: bilinear gradients hold no further. A
    scaled loss, as fp16 needs, would have it clamped sooner, for the scale isn't known here: train in bf16 or float32.
    """
    height, width = features.shape[2:]
    if points.requires_grad:
        limit = points.new_tensor([1 / width, 1 / height])
        points.register_hook(lambda grad: grad.clamp(-limit, limit))
    with torch.autocast(features.device.type, enabled=False):
        sampled = F.grid_sample(features, 2 * points - 1, "bilinear", "zeros", align_corners=False)  # [B, C, N, P]
    return sampled.permute(0, 2, 3, 1)


def _grid(places: Tensor) -> Tensor:
    """All pairs (x, y) of [n] places, x fastest: [n * n, 2]."""
    y, x = torch.meshgrid(places, places, indexing="ij")
    return torch.stack([x.flatten(), y.flatten()], dim=1)


# Whole names, or parts of them. Two of the tensors were renamed between versions of their code.
_RELEASED_NAMES = {
    "feat_extractor.conv1.": "stem.",
    "token_roi.weight": "token_roi",
    "initial_roi.weight": "token_roi",
    "token_embedding.weight": "token_embedding",
    "initial_embedding.weight": "token_embedding",
    "layers.0.": "focus.",
    "layers.1.": "bridge.",
    "head.norm.": "norm.",
    "head.classifier.": "head.",
    ".attn.in_proj_": ".qkv.",
    ".attn.out_proj.": ".proj.",
    ".ln_attn.": ".norm_attn.",
    ".ffn.0.": ".norm_mlp.",
    ".ffn.1.": ".fc1.",
    ".ffn.3.": ".fc2.",
    ".roi_adjust_module.0.": ".sampler.norm_adjust.",
    ".roi_adjust_module.1.": ".sampler.adjust.",
    ".roi_offset_module.0.": ".sampler.norm_offset.",
    ".roi_offset_module.1.": ".sampler.offset.",
    ".roi_offset_bias": ".sampler.offset_bias",
    ".adaptive_mixing.parameter_generator.0.": ".sampler.norm_mix.",
    ".adaptive_mixing.parameter_generator.1.": ".sampler.reduce.",
    ".adaptive_mixing.parameter_generator.2.": ".sampler.generate.",
    ".adaptive_mixing.m_beta": ".sampler.channel_bias",
    ".adaptive_mixing.s_beta": ".sampler.point_bias",
    ".adaptive_mixing.tuo_proj.": ".sampler.out.",
    ".adaptive_mixing.out_proj.": ".sampler.out.",
}


def _our_name(theirs: str) -> str:
    ours = theirs
    for part, replacement in _RELEASED_NAMES.items():
        ours = ours.replace(part, replacement)
    return re.sub(r"^layers\.(\d+)\.", lambda found: f"cortex.{int(found[1]) - 2}.", ours)


def _initial_rois(num_tokens: int) -> Tensor:
    """Half the image a side, spread evenly over all of it; tokens beyond the largest square number see the whole. [N, 4]"""
    side = math.isqrt(num_tokens)
    corner = _grid(torch.linspace(0, 0.5, side) if side > 1 else torch.tensor([0.25]))
    rois = torch.tensor([0.0, 0.0, 1.0, 1.0]).repeat(num_tokens, 1)
    rois[: side**2] = torch.cat([corner, corner + 0.5], dim=1)
    return rois


# -- timm registry -----------------------------------------------------------------------------------------------------

_SIZES = {
    "tiny": (49, 256, 512, 8),
    "small": (64, 320, 640, 8),
    "base": (81, 384, 768, 10),
}  # Table 1: N, d_f, d_c, L_c

default_cfgs = untrained_cfgs(*(f"sparseformer_{size}" for size in _SIZES), fixed_input_size=False, first_conv="stem")


def _build(size: str, pretrained: bool, kwargs: dict[str, Any]) -> SparseFormer:
    defaults = dict(zip(("num_tokens", "focus_dim", "cortex_dim", "cortex_depth"), _SIZES[size], strict=True))
    return build_model_with_cfg(SparseFormer, f"sparseformer_{size}", pretrained, **defaults | kwargs)


@register_model
def sparseformer_tiny(pretrained: bool = False, **kwargs: Any) -> SparseFormer:
    """SparseFormer-T (Table 1). Takes the arguments of `SparseFormer`."""
    return _build("tiny", pretrained, kwargs)


@register_model
def sparseformer_small(pretrained: bool = False, **kwargs: Any) -> SparseFormer:
    """SparseFormer-S: 47.58 M parameters, 3.990 GMACs. Takes the arguments of `SparseFormer`."""
    return _build("small", pretrained, kwargs)


@register_model
def sparseformer_base(pretrained: bool = False, **kwargs: Any) -> SparseFormer:
    """SparseFormer-B: 81.08 M parameters, 7.987 GMACs. Takes the arguments of `SparseFormer`."""
    return _build("base", pretrained, kwargs)
