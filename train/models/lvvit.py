"""LV-ViT (Jiang et al. 2021, "All Tokens Matter"): a ViT with a convolutional stem whose patch tokens learn labels too.

It needs exactly one token per cell, and is thus one of the two backbones of ZoomViT's appendix G; see `fusion`.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from timm.layers import trunc_normal_
from timm.models import build_model_with_cfg, register_model
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from zpipe.train.models.backbone import square_side, untrained_cfgs


class ConvPatchEmbed(nn.Module):
    """Three 3x3-or-larger convolutions at half resolution, then patches. [B, D, H, W] -> [B, N, E], row-major."""

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
        return self.proj(self.stem(images)).flatten(2).transpose(1, 2)


class LVViT(nn.Module):
    """LV-ViT; the default is LV-ViT-S: 26.2 M parameters, 6.6 GMACs, 224 px.

    Residual branches are divided by `skip_lam` (their value, 2). `return_dense=True` gives the patch tokens' logits
    too, for `losses.TokenLabelLoss`; otherwise the logits are the class token's plus half of the highest of the patches',
    their evaluation rule. MixToken isn't part of the model; mix images instead.

    With num_classes=0 forward gives the class token's features. Raises ValueError for sizes that don't divide.
    """

    dense_head = True  # its patches learn token labels

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
        self.blocks = nn.Sequential(
            *(
                _ScaledBlock(
                    embed_dim,
                    num_heads,
                    mlp_ratio,
                    qkv_bias=False,
                    drop_path=drop_path_rate * i / max(depth - 1, 1),
                    norm_layer=norm,
                    skip_lam=skip_lam,
                )
                for i in range(depth)
            )
        )
        self.norm = norm(embed_dim)
        self.head, self.aux_head = self._heads()
        trunc_normal_(self.pos_embed, std=0.02)
        trunc_normal_(self.cls_token, std=0.02)
        self.apply(_init)

    def forward_features(self, images: Tensor) -> Tensor:
        """[B, in_chans, H, W] -> normalised tokens [B, 1 + N, E], the class token first."""
        x = self.patch_embed(images)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1) + self.pos_embed
        return self.norm(self.blocks(x))

    def forward(self, images: Tensor, return_dense: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """Logits [B, classes]; with return_dense the class token's [B, classes] and the patches' [B, N, classes]."""
        x = self.forward_features(images)
        if not self.num_classes and not return_dense:
            return x[:, 0]
        logits, dense = self.head(x[:, 0]), self.aux_head(x[:, 1:])
        return (logits, dense) if return_dense else logits + 0.5 * dense.amax(dim=1)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Parameters that weight decay leaves alone, besides the one-dimensional ones."""
        return {"pos_embed", "cls_token"}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Which parameters belong to which layer, for layer-wise learning rates."""
        return {
            "stem": r"^cls_token|^pos_embed|^patch_embed",
            "blocks": [(r"^blocks\.(\d+)", None), (r"^norm", (99999,))],
        }

    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int) -> None:
        """Replace both heads by freshly initialised ones."""
        self.num_classes = num_classes
        self.head, self.aux_head = (head.apply(_init).to(self.cls_token) for head in self._heads())

    def _heads(self) -> tuple[nn.Module, nn.Module]:
        if not self.num_classes:
            return nn.Identity(), nn.Identity()
        return nn.Linear(self.embed_dim, self.num_classes), nn.Linear(self.embed_dim, self.num_classes)


def _init(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


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
    return build_model_with_cfg(LVViT, "lvvit_small", pretrained, **kwargs)
