"""LV-ViT (Jiang et al. 2021, "All Tokens Matter"): a ViT with a convolutional stem, whose patches learn labels, too.

It needs exactly one token per cell, so it is one of the two backbones of ZoomViT's appendix G; see `fusion`.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from timm.layers import trunc_normal_
from timm.models import register_model
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from zpipe.train.models.backbone import (
    StandaloneModel,
    build,
    init_linear,
    linear_head,
    square_side,
    transformer_blocks,
    untrained_cfgs,
)


class ConvPatchEmbed(nn.Module):
    """Three convolutions of 7x7, 3x3 and 3x3 at half resolution, then patches. [B, D, H, W] -> [B, N, E], row-major."""

    def __init__(self, img_size: int, patch_size: int, in_chans: int, embed_dim: int, width: int = 64) -> None:
        super().__init__()
        if patch_size % 2 or img_size % patch_size:
            raise ValueError(f"image size {img_size} must divide into even patches, got patch size {patch_size}")
        layers: list[nn.Module] = []
        for chans, kernel, stride in ((in_chans, 7, 2), (width, 3, 1), (width, 3, 1)):
            conv = nn.Conv2d(chans, width, kernel, stride=stride, padding=kernel // 2, bias=False)
            layers += [conv, nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
        self.stem = nn.Sequential(*layers)
        self.proj = nn.Conv2d(width, embed_dim, patch_size // 2, stride=patch_size // 2)
        self.num_patches = (img_size // patch_size) ** 2

    def forward(self, images: Tensor) -> Tensor:
        """[B, D, H, W] -> [B, N, E]."""
        x: Tensor = self.proj(self.stem(images))  # [B, E, h, w]
        return x.flatten(2).transpose(1, 2)


class LVViT(StandaloneModel):
    """LV-ViT; the default is LV-ViT-S: 26.2 M parameters, 6.6 GMACs, 224 px.

    With num_classes=0, forward returns the features of the class token. MixToken is not part of the model; mix images
    instead.

    Args:
        img_size: pixels a side; images are square.
        patch_size: pixels a side of a patch, even.
        embed_dim: width of the transformer.
        depth: number of blocks.
        num_heads: attention heads of a block.
        num_classes: number of classes; 0 makes both heads identities.
        in_chans: channels of the images.
        mlp_ratio: width of the MLPs, as a multiple of embed_dim.
        drop_path_rate: stochastic depth of the last block; it grows linearly from 0 at the first.
        skip_lam: divisor of the residual branches (the paper's value is 2).

    Raises:
        ValueError: sizes that don't divide.
    """

    dense_head = True  # its patches learn token labels
    undecayed = ("pos_embed", "cls_token")
    stem_pattern = r"^cls_token|^pos_embed|^patch_embed"

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        embed_dim: int = 384,
        depth: int = 16,
        num_heads: int = 6,
        num_classes: int = 1000,
        in_chans: int = 3,
        mlp_ratio: float = 3.0,
        drop_path_rate: float = 0.0,
        skip_lam: float = 2.0,
    ) -> None:
        super().__init__()
        img_size = square_side(img_size)
        self.num_classes = num_classes
        self.num_features = self.embed_dim = embed_dim
        self.num_prefix_tokens = 1
        self.patch_embed = ConvPatchEmbed(img_size, patch_size, in_chans, embed_dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + self.patch_embed.num_patches, embed_dim))
        norm = partial(nn.LayerNorm, eps=1e-5)
        changes = {"qkv_bias": False, "norm_layer": norm, "skip_lam": skip_lam}
        self.blocks = transformer_blocks(
            embed_dim, depth, num_heads, mlp_ratio, drop_path_rate, block=_ScaledBlock, **changes
        )
        self.norm = norm(embed_dim)
        self.head, self.aux_head = self._heads()
        trunc_normal_(self.pos_embed, std=0.02)
        trunc_normal_(self.cls_token, std=0.02)
        self.apply(init_linear)

    def forward_features(self, images: Tensor) -> Tensor:
        """[B, in_chans, H, W] -> normalised tokens [B, 1 + N, E], the class token first."""
        x = self.patch_embed(images)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1) + self.pos_embed
        return self.norm(self.blocks(x))

    def forward(self, images: Tensor, return_dense: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """Classify images.

        Args:
            images: [B, in_chans, H, W].
            return_dense: return the class token's logits and the patches', for `losses.TokenLabelLoss`.

        Returns:
            Logits [B, num_classes]: the class token's plus half of the patches' highest, which is the authors'
            evaluation rule. With return_dense the class token's [B, num_classes] and the patches' [B, N, num_classes].
        """
        x = self.forward_features(images)
        if not self.num_classes and not return_dense:
            return x[:, 0]
        logits, dense = self.head(x[:, 0]), self.aux_head(x[:, 1:])
        return (logits, dense) if return_dense else logits + 0.5 * dense.amax(dim=1)

    def reset_classifier(self, num_classes: int) -> None:
        """Replace both heads by freshly initialised ones."""
        self.num_classes = num_classes
        self.head, self.aux_head = (head.apply(init_linear).to(self.cls_token) for head in self._heads())

    def _heads(self) -> tuple[nn.Module, nn.Module]:
        return linear_head(self.embed_dim, self.num_classes), linear_head(self.embed_dim, self.num_classes)


class _ScaledBlock(Block):
    """timm's block with both residual branches divided by a constant."""

    def __init__(self, *args: Any, skip_lam: float, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.skip_lam = skip_lam

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path1(self.attn(self.norm1(x))) / self.skip_lam
        return x + self.drop_path2(self.mlp(self.norm2(x))) / self.skip_lam


default_cfgs = untrained_cfgs("lvvit_small", first_conv="patch_embed.stem.0", classifier=("head", "aux_head"))


@register_model
def lvvit_small(pretrained: bool = False, **kwargs: Any) -> LVViT:
    """LV-ViT-S. Takes the arguments of `LVViT`."""
    return build(LVViT, "lvvit_small", pretrained, {}, kwargs)
