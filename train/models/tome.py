"""Token merging (ToMe; Bolya et al., ICLR 2023) on a plain timm ViT: a control that needs no training and no scores.

In every block, between attention and MLP, r patch tokens are merged into the tokens most like them. Matching and
merging are pure functions, and the model runs the backbone's own blocks part by part: nothing of the backbone is
replaced.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from timm.models import register_model
from torch import Tensor, nn

from zpipe.train.models.backbone import (
    WrappedModel,
    attend,
    block_macs,
    build_wrapped,
    check_plain,
    create_backbone,
    embed,
    embed_macs,
    head_macs,
    project,
    square_side,
    untrained_cfgs,
)
from zpipe.train.models.operating_points import ImageCost, OperatingPoint, Requested, points_of


class Matching(NamedTuple):
    """Which tokens of a sequence of N are merged, as int64 places in the sequence.

    Attributes:
        source: [B, r], the tokens that are merged away.
        target: [B, r], the token that each of them is merged into; a token may take several.
        stay: [B, N - r], the tokens that stay, in their new order.
    """

    source: Tensor
    target: Tensor
    stay: Tensor


def match(metric: Tensor, r: int, prefix: int = 1) -> Matching:
    """Bipartite soft matching (section 3).

    Tokens at even places are set A, those at odd places set B. Every token of A has an edge to the token of B that is
    most like it, and the r strongest edges are merged; of equally strong edges those of the first tokens. The new
    order, as in the authors' code, is what remains of A, then B.

    Args:
        metric: [B, N, D], what tokens are compared by, with cosine similarity (the paper: keys, mean over heads).
        r: how many tokens to merge away, 0 .. `most_merged(N, prefix)`.
        prefix: this many tokens at the beginning (class, distillation, register tokens) are not merged and stay first.

    Raises:
        ValueError: r out of range.
    """
    batch, length, _ = metric.shape
    if not 0 <= r <= most_merged(length, prefix):
        raise ValueError(
            f"r must lie between 0 and the {most_merged(length, prefix)} that {length} tokens can lose, got {r!r}"
        )
    place = torch.arange(length, device=metric.device)
    with torch.autocast(metric.device.type, enabled=False):  # half precision would make many edges equally strong
        metric = metric.detach().to(torch.promote_types(metric.dtype, torch.float32))
        metric = F.normalize(metric, dim=-1)
        similarity = metric[:, ::2] @ metric[:, 1::2].transpose(1, 2)  # [B, A, B']
    protected = (place[::2, None] < prefix) | (place[None, 1::2] < prefix)
    strength, partner = similarity.masked_fill(protected, -torch.inf).max(dim=2)  # [B, A]
    ranked = strength.argsort(dim=1, descending=True, stable=True)
    source, left = 2 * ranked[:, :r], 2 * ranked[:, r:].sort(dim=1).values
    target = 2 * partner.gather(1, ranked[:, :r]) + 1
    stay = torch.cat([left, place[1::2].expand(batch, -1)], dim=1)  # [B, N - r]
    if prefix > 1:  # a single one has an even place, so it is already first
        stay = stay.gather(1, (stay >= prefix).to(torch.uint8).argsort(dim=1, stable=True))
    return Matching(source, target, stay)


def merge(x: Tensor, size: Tensor, matching: Matching) -> tuple[Tensor, Tensor]:
    """Merge tokens as means, weighted by how many patches each stands for (section 3, "tracking token size").

    Args:
        x: [B, N, E].
        size: patches of each token, [B, N].
        matching: which tokens to merge.

    Returns:
        The tokens [B, N - r, E] and their sizes [B, N - r], which have the same sum as before.
    """
    source, target, stay = (place[..., None] for place in matching)
    weighted, size = x * size[..., None], size[..., None]  # [B, N, E], [B, N, 1]

    def merged(values: Tensor) -> Tensor:
        wide = (-1, -1, values.shape[2])
        moved = values.gather(1, source.expand(wide))
        return values.scatter_add(1, target.expand(wide), moved).gather(1, stay.expand(wide))

    size = merged(size)
    return (merged(weighted) / size).to(x.dtype), size[..., 0]


def most_merged(length: int, prefix: int = 1) -> int:
    """The largest number of tokens that one matching can merge: half of those outside the prefix."""
    return max(length - prefix, 0) // 2


class ToMeViT(WrappedModel):
    """A plain timm ViT that merges r tokens in every block. `model(images, r=13)`; with r=0 it is the backbone.

    As in the paper, tokens are matched by their keys, the class token is protected, and attention is weighted by size
    (Eq.
    1: log size is added to its logits). The authors' code lowers an r that is too large for the last blocks; here it is
    refused, so that results state what ran.

    Args:
        backbone: a plain timm VisionTransformer that classifies its class token, or its name. Its state dict is under
            `backbone.`; any weights of it will do.
        r: tokens merged in each block, unless a call gives another number; 0 merges nothing.
        img_size: pixels a side; images are square.
        num_classes: number of classes of a backbone given by name.
        in_chans: channels of its images.
        backbone_args: its further keyword arguments.

    Raises:
        ValueError: another kind of backbone, r below 0 or too large (DeiT's 197 tokens and 12 blocks: above 15).
    """

    setting_names = ("merge",)

    def __init__(
        self,
        backbone: str | nn.Module = "deit_small_patch16_224",
        r: int = 0,
        img_size: int | tuple[int, int] = 224,
        num_classes: int = 1000,
        in_chans: int = 3,
        backbone_args: dict[str, Any] | None = None,
    ) -> None:
        if isinstance(backbone, str):
            backbone = create_backbone(backbone, square_side(img_size), num_classes, in_chans, backbone_args)
        super().__init__(backbone)
        check_plain(backbone)
        if self.backbone.cls_token is None or self.backbone.global_pool != "token":
            raise ValueError(
                f"merging needs a class token that is classified, got global_pool={self.backbone.global_pool!r}"
            )
        self.r = self.resolve_r(r)

    def forward(self, images: Tensor, r: int | None = None) -> Tensor:
        """Classify images.

        Args:
            images: [B, in_chans, img_size, img_size].
            r: tokens merged in each block; None takes the model's.

        Returns:
            Logits [B, num_classes].

        Raises:
            ValueError: images of another shape, or r below 0 or too large.
        """
        return self.forward_head(self.forward_features(images, r))

    def forward_features(self, images: Tensor, r: int | None = None) -> Tensor:
        """The normalised tokens after the last block, [B, prefix + N - depth * r, E]; arguments as in `forward`."""
        vit, r = self.backbone, self.resolve_r(self.r if r is None else r)
        x = embed(vit, images)
        return vit.norm(self._run_merging(x, r) if r else vit.blocks(x))

    def _run_merging(self, x: Tensor, r: int) -> Tensor:
        """All blocks over tokens [B, prefix + N, E], merging r tokens in each."""
        vit = self.backbone
        size = x.new_ones(x.shape[:2], dtype=torch.float32)  # [B, N]
        for i, block in enumerate(vit.blocks):
            q, k, v = project(block.attn, block.norm1(x))
            bias = size.log().to(q.dtype)[:, None, None] if i else None  # [B, 1, 1, N]; all sizes are 1 at first
            x = x + block.drop_path1(block.ls1(attend(block.attn, q, k, v, bias)))
            x, size = merge(x, size, match(k.mean(dim=1), r, vit.num_prefix_tokens))
            x = x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))
        return x

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        """Tokens of `forward_features` -> logits [B, num_classes], or with pre_logits what enters the classifier."""
        return self.backbone.forward_head(features, pre_logits=pre_logits)

    def operating_points(self, requested: Requested) -> list[OperatingPoint]:
        """A point for each number of tokens merged per block; for the model's own if none is requested."""
        return points_of("merge", requested.get("merge", (self.r,)), "r", self.resolve_r)

    def cost(self, point: OperatingPoint, kind: int | None = None) -> ImageCost:
        """The cost of an image, which is the same for every image."""
        merged = point.arguments.get("r", self.r) * (len(self.backbone.blocks) - 1) / 2  # mean over blocks
        return ImageCost(self.backbone.patch_embed.num_patches - merged, point.arguments)

    def resolve_r(self, r: int) -> int:
        """r itself.

        Raises:
            ValueError: r below 0, or more than every block can merge.
        """
        vit, depth = self.backbone, len(self.backbone.blocks)
        patches = vit.patch_embed.num_patches
        largest = patches // (depth + 1)  # the last block sees patches - (depth - 1) r, and may merge half of them
        if not 0 <= r <= largest:
            raise ValueError(f"r must lie between 0 and {largest} with {patches} patches and {depth} blocks, got {r!r}")
        return r

    def macs(self, r: int | None = None) -> int:
        """Multiply-adds of an image's forward pass, matching included, counted as by torch's flop counter."""
        vit, r = self.backbone, self.resolve_r(self.r if r is None else r)
        total, length = embed_macs(vit) + head_macs(vit), vit.num_prefix_tokens + vit.patch_embed.num_patches
        for block in vit.blocks:
            matching = (length - length // 2) * (length // 2) * block.attn.head_dim if r else 0
            total += block_macs(block, length, length - r) + matching
            length -= r
        return total


default_cfgs = untrained_cfgs("tome_vit")


@register_model
def tome_vit(pretrained: bool = False, **kwargs: Any) -> ToMeViT:
    """`ToMeViT`, on DeiT-S unless `backbone` names another plain timm ViT. Takes its arguments."""
    return build_wrapped(ToMeViT, "tome_vit", pretrained, **kwargs)
