"""SparseFormer v1 (Gao et al. 2023): a few latent tokens that decide for themselves where to sample the image.

A rival of ZoomViT: there a zoomer chooses the finer patches; here every token has a region of interest (RoI), which it
moves and rescales itself, and reads 36 points of it. Importing this module registers sparseformer_{tiny,small,base}.
"""

from __future__ import annotations

import re
from typing import Any, cast

import timm
import torch
import torch.nn.functional as F
from timm.layers import drop_path, trunc_normal_
from timm.models import register_model
from torch import Tensor, nn

from zpipe.train.models.backbone import (
    StandaloneModel,
    build,
    drop_path_rates,
    init_linear,
    layer_norm,
    linear_head,
    linear_macs,
    untrained_cfgs,
)
from zpipe.train.models.operating_points import ImageCost, OperatingPoint
from zpipe.train.models.released_weights import ReleasedWeights
from zpipe.train.models.sparseformer_sampling import Glimpse, Sampler, adjust_rois, initial_rois, place_points, sample

__all__ = ["Glimpse", "SparseFormer"]


class SparseFormer(StandaloneModel):
    """SparseFormer v1; the default is the tiny variant: 31.52 M parameters, 2.178 GMACs at 224 px.

    `model(images)` returns logits, for images of any size: only the stem's cost grows with it. `glimpses(images)` shows
    where the tokens looked.

    The parts, in this order (section 3): the stem makes one feature map; the focusing unit runs `focus_repeats` times
    with the same weights; a linear layer widens the tokens; `cortex_depth` units follow, of which the first samples,
    too. A unit is self-attention, RoI adjustment, sampling with adaptive mixing, and an FFN, pre-norm, each with a
    residual.

    Where the authors' code, which this follows, differs from the paper:

    - Sampling offsets are not halved (Eq. 3 has a factor 0.5): normalised by three standard deviations, points spread
      over about a third of the RoI to each side instead of a sixth.
    - The weights that generate offsets don't start at zero (A.3), but like other linear layers, after a LayerNorm of
      small gain.
    - Stochastic depth drops RoI adjustments, too, for all tokens of an image.
    - Attention has 64 heads at every width, hence 4 channels each in the focusing unit of the tiny variant.
    - Gradients with respect to sampling points are clamped to one feature-map cell, 1/56 at 224 px.
    - The paper's 2.0, 3.8 and 7.8 G leave out the products of the mixing with generated matrices.

    Args:
        conv_dim: C, channels of the stem.
        num_tokens: N, latent tokens.
        num_points: P, samples of a token.
        focus_dim: width of the focusing unit.
        cortex_dim: width of the cortex.
        focus_repeats: how often the focusing unit runs.
        cortex_depth: units of the cortex, including the one that samples.
        num_heads: attention heads, at both widths.
        num_classes: number of classes; 0 makes the head an identity.
        in_chans: channels of the images.
        mlp_ratio: width of the FFN, as a multiple of the unit's.
        drop_path_rate: stochastic depth of the last unit; it grows linearly from 0 over repeats and units. The paper
            trains tiny, small and base with .2, .3 and .4.

    Raises:
        ValueError: widths that don't divide by num_heads or by 4, or counts below 1.
    """

    undecayed = ("token_roi",)  # token embeddings do decay
    RELEASE_NAME = "SparseFormer v1"
    RELEASE_CONFIG = ("num_heads", "focus_repeats")

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
        self.drop_rates = drop_path_rates(drop_path_rate, focus_repeats + cortex_depth)

        self.stem = nn.Conv2d(in_chans, conv_dim, 7, stride=2, padding=3)
        self.num_tokens = num_tokens
        self.token_embedding = nn.Parameter(torch.empty(num_tokens, focus_dim))
        self.token_roi = nn.Parameter(initial_rois(num_tokens))  # [N, 4]
        sampling = (conv_dim, num_points)
        self.focus = Unit(focus_dim, num_heads, mlp_ratio, sampling)
        self.bridge = nn.Sequential(nn.Linear(focus_dim, cortex_dim), layer_norm(cortex_dim))
        self.cortex = nn.ModuleList(
            Unit(cortex_dim, num_heads, mlp_ratio, sampling if i == 0 else None) for i in range(cortex_depth)
        )
        self.norm = layer_norm(cortex_dim)
        self.head = linear_head(cortex_dim, num_classes)
        self._initialise()

    @torch.no_grad()
    def _initialise(self) -> None:
        """Initialise as the authors' code does (A.3): token embeddings by a normal distribution cut at 2."""
        nn.init.kaiming_normal_(self.stem.weight, mode="fan_out", nonlinearity="relu")
        trunc_normal_(self.token_embedding, std=1.0)
        self.apply(init_linear)
        for module in self.modules():
            if isinstance(module, Sampler):
                module.initialise()

    def forward(self, images: Tensor) -> Tensor:
        """Classify images.

        Args:
            images: [B, in_chans, H, W].

        Returns:
            Logits [B, num_classes].

        Raises:
            ValueError: images of another number of channels, or below 4 pixels a side.
        """
        return self.forward_head(self.forward_features(images))

    def forward_features(self, images: Tensor) -> Tensor:
        """The tokens after the last unit, [B, N, cortex_dim]; not normalised, since their mean will be."""
        return self._run(images, [])

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        """Tokens [B, N, cortex_dim] -> logits [B, num_classes], or with pre_logits the normalised mean token."""
        pooled: Tensor = self.norm(features.mean(dim=1))  # [B, cortex_dim]
        return pooled if pre_logits else self.head(pooled)

    @torch.no_grad()
    def glimpses(self, images: Tensor) -> list[Glimpse]:
        """Where each token looks in each sampling stage: the repeats of the focusing unit, then the cortex."""
        glimpses: list[Glimpse] = []
        self._run(images, glimpses)
        return glimpses

    def _run(self, images: Tensor, glimpses: list[Glimpse]) -> Tensor:
        features = self._extract(images)
        tokens = self.token_embedding.repeat(len(images), 1, 1)  # [B, N, focus_dim]
        rois = self.token_roi.float().repeat(len(images), 1, 1)  # [B, N, 4]
        for i, (unit, rate) in enumerate(zip(self._units(), self.drop_rates, strict=True)):
            if i == self.focus_repeats:
                tokens = self.bridge(tokens)  # [B, N, cortex_dim]
            tokens, rois = unit(tokens, rois, features, rate, glimpses)
        return tokens

    def _units(self) -> list[Unit]:
        """The units in the order in which they run."""
        return [self.focus] * self.focus_repeats + cast("list[Unit]", list(self.cortex))

    def _extract(self, images: Tensor) -> Tensor:
        """The stem: [B, in_chans, H, W] -> float32 [B, C, H/4, W/4], normalised over channels."""
        chans = self.stem.in_channels
        if images.ndim != 4 or images.shape[1] != chans or not images.shape[0] or min(images.shape[2:]) < 4:
            raise ValueError(
                f"images must be [batch, {chans}, height, width], >= 4 px a side, got {list(images.shape)}"
            )
        # Pooling comes before ReLU, which gives the same values and saves three quarters of the ReLU; a CPU pools and
        # normalises over channels twice as fast in the channels-last format.
        x = self.stem(images.contiguous(memory_format=torch.channels_last))
        x = F.relu(F.max_pool2d(x, 3, stride=2, padding=1)).float()
        var, mean = torch.var_mean(x, dim=1, keepdim=True)  # unbiased, as in their code
        return (x - mean) * torch.rsqrt(var + 1e-7)

    # Costs and weights

    def cost(self, point: OperatingPoint, kind: int | None = None) -> ImageCost:
        """The cost of an image, which is the same for every image."""
        return ImageCost(float(self.num_tokens), point.arguments)

    @classmethod
    def load_release(cls, weights: ReleasedWeights, num_heads: int, focus_repeats: int) -> SparseFormer:
        """Build the model of published weights, in eval mode; see `release.load_release`.

        Raises:
            ValueError: weights of anything but a published SparseFormer v1.
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
        """Multiply-adds of an image of img_size x img_size pixels.

        They are counted as by torch's flop counter: matrix products and the convolution, not bilinear sampling.
        """
        side = (img_size + 1) // 2
        tokens = self.num_tokens
        total = self.stem.weight.numel() * side * side + tokens * linear_macs(self.bridge)
        total += sum(unit.macs(tokens) for unit in self._units())
        return total + linear_macs(self.head)

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Return which parameters belong to which layer, for layer-wise learning rates; focusing is one layer."""
        blocks = [(r"^focus", (-2,)), (r"^bridge", (-1,)), (r"^cortex\.(\d+)", None), (r"^norm", (99999,))]
        return {"stem": r"^stem|^token_", "blocks": blocks}


class Unit(nn.Module):
    """One stage over tokens [B, N, d] and their RoIs [B, N, 4]; without `sampling` a plain transformer block.

    Args:
        dim: width d of the tokens.
        num_heads: attention heads.
        mlp_ratio: width of the FFN, as a multiple of dim.
        sampling: channels of the feature map and points of a token; None for a unit that does not sample.
    """

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float, sampling: tuple[int, int] | None) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm_attn = layer_norm(dim)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.sampler = None if sampling is None else Sampler(dim, *sampling)
        self.norm_mlp = layer_norm(dim)
        self.fc1 = nn.Linear(dim, int(dim * mlp_ratio))
        self.fc2 = nn.Linear(int(dim * mlp_ratio), dim)

    def forward(
        self, tokens: Tensor, rois: Tensor, features: Tensor, rate: float, glimpses: list[Glimpse]
    ) -> tuple[Tensor, Tensor]:
        """Run the unit.

        Args:
            tokens: [B, N, d].
            rois: float32 [B, N, 4].
            features: the stem's, float32 [B, C, h, w].
            rate: of stochastic depth.
            glimpses: a sampling unit appends where it looked.

        Returns:
            The new tokens and RoIs.
        """
        tokens = tokens + drop_path(self._attend(self.norm_attn(tokens)), rate, self.training)
        if self.sampler is not None:
            deltas = drop_path(self.sampler.deltas(tokens), rate, self.training)  # [B, N, 4]
            rois = adjust_rois(rois, deltas)
            points = place_points(rois, self.sampler.offsets(tokens))  # [B, N, P, 2]
            glimpses.append(Glimpse(rois, points))
            sampled = sample(features, points)  # [B, N, P, C]
            tokens = tokens + drop_path(self.sampler.mix(sampled, tokens), rate, self.training)
        x = self.fc2(F.gelu(self.fc1(self.norm_mlp(tokens))))
        return tokens + drop_path(x, rate, self.training), rois

    def _attend(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)  # [B, heads, N, d / heads]
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    def macs(self, tokens: int) -> int:
        """Multiply-adds for a number of tokens."""
        linear = sum(layer.weight.numel() for layer in (self.qkv, self.proj, self.fc1, self.fc2))
        total = tokens * linear + 2 * tokens**2 * self.proj.in_features
        return total + (0 if self.sampler is None else tokens * self.sampler.macs())


# Whole names of tensors, or parts of them. Two tensors were renamed between versions of the authors' code.
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
    return re.sub(r"^layers\.(\d+)\.", lambda match: f"cortex.{int(match[1]) - 2}.", ours)


# -- timm registry -----------------------------------------------------------------------------------------------------

# Table 1: N, d_f, d_c, L_c
_SIZES = {"tiny": (49, 256, 512, 8), "small": (64, 320, 640, 8), "base": (81, 384, 768, 10)}

default_cfgs = untrained_cfgs(*(f"sparseformer_{size}" for size in _SIZES), fixed_input_size=False, first_conv="stem")


def _build(size: str, pretrained: bool, kwargs: dict[str, Any]) -> SparseFormer:
    defaults = dict(zip(("num_tokens", "focus_dim", "cortex_dim", "cortex_depth"), _SIZES[size], strict=True))
    return build(SparseFormer, f"sparseformer_{size}", pretrained, defaults, kwargs)


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
