"""Token pruning half way through a plain ViT: the smallest mechanism that spends tokens by importance.

A small study of ZoomViT's idea on Flowers-102 drops all but the most important patch tokens after the sixth block.
There, importance is the L2 norm of features; here it is any score: relevance maps, a zoomer's scores, or the model's
own.
"""

from __future__ import annotations

from typing import Any

import torch
from timm.models import register_model
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from zpipe.train.models.backbone import (
    WrappedModel,
    attend,
    attention_width,
    block_macs,
    build_wrapped,
    check_plain,
    class_attention_row,
    create_backbone,
    embed,
    embed_macs,
    head_macs,
    project,
    read_scores,
    square_side,
    untrained_cfgs,
)
from zpipe.train.models.operating_points import ImageCost, OperatingPoint, Requested, ScoreUse, points_of


class TokenPrunedViT(WrappedModel):
    """A plain timm ViT that keeps only its most important patch tokens after one of its blocks.

    `model(images, scores, keep=0.3)` runs the first `prune_block` blocks on all tokens, and the others on the class
    token (with the distillation or register tokens, if any) and the best 30 % of the patch tokens. With scores=None,
    the class attention of block `prune_block` decides, mean over heads: it is available there, and costs next to
    nothing. With keep=1 the logits are the backbone's. The settings fix all shapes, so the model can be compiled and
    exported.

    Args:
        backbone: a plain timm VisionTransformer, or its name. Its state dict is under `backbone.`.
        prune_block: how many blocks see all tokens: 6 prunes after the sixth block, between `blocks[5]` and
            `blocks[6]`.
        keep: the share of patch tokens to keep, rounded down (.3 of 196 are 58), unless a call gives another.
        img_size: pixels a side; images are square.
        num_classes: number of classes of a backbone given by name.
        in_chans: channels of its images.
        backbone_args: its further keyword arguments.

    Raises:
        ValueError: another kind of backbone, prune_block outside 1 .. depth - 1, keep outside (0, 1].
    """

    setting_names = ("keep",)

    def __init__(
        self,
        backbone: str | nn.Module = "deit_small_patch16_224",
        prune_block: int = 6,
        keep: float = 0.3,
        img_size: int | tuple[int, int] = 224,
        num_classes: int = 1000,
        in_chans: int = 3,
        backbone_args: dict[str, Any] | None = None,
    ) -> None:
        if isinstance(backbone, str):
            backbone = create_backbone(backbone, square_side(img_size), num_classes, in_chans, backbone_args)
        super().__init__(backbone)
        self.score_grid = check_plain(backbone)  # cells a side of the patch grid; scores of other grids are resampled
        depth = len(self.backbone.blocks)
        if not 1 <= prune_block < depth:
            raise ValueError(f"prune_block must lie between 1 and {depth - 1} with {depth} blocks, got {prune_block!r}")
        self.prune_block = prune_block
        self.keep = check_keep(keep)

    def forward(
        self, images: Tensor, scores: Tensor | None = None, keep: float | None = None, keep_tokens: int | None = None
    ) -> Tensor:
        """Classify images.

        Args:
            images: [B, in_chans, img_size, img_size].
            scores: [B, s * s], row-major, of any range; no gradient flows into them. If s isn't `score_grid`, a patch's
                score is the mean of the cells it overlaps. None takes the class attention of block `prune_block`.
            keep: the share of patch tokens to keep, in (0, 1], rounded down but at least one; None takes the model's.
            keep_tokens: a number of patch tokens to keep instead of a share.

        Returns:
            Logits [B, num_classes].

        Raises:
            ValueError: images or scores of another shape, NaN in scores, keep or keep_tokens out of range or both
                given, scores=None on a backbone without class token.
        """
        return self.forward_head(self.forward_features(images, scores, keep, keep_tokens))

    def forward_features(
        self, images: Tensor, scores: Tensor | None = None, keep: float | None = None, keep_tokens: int | None = None
    ) -> Tensor:
        """The normalised tokens after the last block, [B, prefix + kept, E]; arguments and errors as in `forward`."""
        vit, count = self.backbone, self.resolve_keep(keep, keep_tokens)
        if scores is not None:
            scores = read_scores(scores, len(images), self.score_grid)
        elif vit.cls_token is None:
            raise ValueError("the backbone has no class token whose attention could choose: give scores")
        x = vit.blocks[: self.prune_block - 1](embed(vit, images))
        block = vit.blocks[self.prune_block - 1]
        if scores is None:
            x, scores = self._run_with_class_attention(block, x)
        else:
            x = block(x)
        if count < scores.shape[1]:
            x = prune_tokens(x, scores, count)
        return vit.norm(vit.blocks[self.prune_block :](x))

    def _run_with_class_attention(self, block: Block, x: Tensor) -> tuple[Tensor, Tensor]:
        """A block's output, and the attention that its class token paid to each patch [B, N], mean over heads."""
        q, k, v = project(block.attn, block.norm1(x))
        with torch.no_grad():
            attention = class_attention_row(block.attn, q, k)[:, self.backbone.num_prefix_tokens :]
        x = x + block.drop_path1(block.ls1(attend(block.attn, q, k, v)))
        return x + block.drop_path2(block.ls2(block.mlp(block.norm2(x)))), attention

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        """Tokens of `forward_features` -> logits [B, num_classes], or with pre_logits what enters the classifier."""
        return self.backbone.forward_head(features, pre_logits=pre_logits)

    @property
    def score_use(self) -> ScoreUse:
        """How scores guide the model."""
        return ScoreUse(grid=self.score_grid, any_grid=True, has_own=True)

    def operating_points(self, requested: Requested) -> list[OperatingPoint]:
        """A point for each number of patch tokens kept; for the model's own if none is requested."""
        keeps = requested.get("keep", (self.resolve_keep(),))
        return points_of("keep", keeps, "keep_tokens", lambda keep: self.resolve_keep(keep_tokens=keep))

    def cost(self, point: OperatingPoint, kind: int | None = None) -> ImageCost:
        """The cost of an image, which is the same for every image."""
        depth, first = len(self.backbone.blocks), self.prune_block
        kept = self.resolve_keep(keep_tokens=point.arguments.get("keep_tokens"))
        return ImageCost((first * self.score_grid**2 + (depth - first) * kept) / depth, point.arguments)

    def resolve_keep(self, keep: float | None = None, keep_tokens: int | None = None) -> int:
        """How many patch tokens stay; arguments and errors as in `forward`."""
        patches = self.score_grid**2
        if keep_tokens is None:
            # Slightly more, since .29 * 100 comes out below 29.
            return max(1, int(check_keep(self.keep if keep is None else keep) * patches + 1e-6))
        if keep is not None:
            raise ValueError(f"give keep or keep_tokens, not both; got keep={keep!r}, keep_tokens={keep_tokens!r}")
        if not 1 <= keep_tokens <= patches:
            raise ValueError(f"keep_tokens must lie between 1 and the {patches} patches, got {keep_tokens!r}")
        return keep_tokens

    def macs(self, keep: float | None = None, keep_tokens: int | None = None, scored: bool = True) -> int:
        """Multiply-adds of an image's forward pass, counted as by torch's flop counter.

        Args:
            keep: as of `forward`.
            keep_tokens: as of `forward`.
            scored: whether scores are given, whose source is not included; otherwise the class attention is.
        """
        vit = self.backbone
        kept = vit.num_prefix_tokens + self.resolve_keep(keep, keep_tokens)
        length = vit.num_prefix_tokens + self.score_grid**2
        total = embed_macs(vit) + head_macs(vit) + (0 if scored else length * attention_width(vit.blocks[0].attn))
        lengths = [length if i < self.prune_block else kept for i in range(len(vit.blocks))]
        return total + sum(block_macs(block, n) for block, n in zip(vit.blocks, lengths, strict=True))


def check_keep(keep: float) -> float:
    """The share of tokens to keep.

    Raises:
        ValueError: a share outside (0, 1].
    """
    if not 0.0 < keep <= 1.0:
        raise ValueError(f"keep must lie in (0, 1], got {keep!r}")
    return keep


def prune_tokens(x: Tensor, scores: Tensor, count: int) -> Tensor:
    """Keep the `count` highest-scored patch tokens in their order; of equal scores the first.

    Args:
        x: [B, prefix + N, E].
        scores: [B, N].
        count: how many of the N patch tokens stay.

    Returns:
        [B, prefix + count, E].
    """
    prefix = x.shape[1] - scores.shape[1]
    best = scores.argsort(dim=1, descending=True, stable=True)[:, :count].sort(dim=1).values  # [B, count]
    kept = x[:, prefix:].gather(1, best[..., None].expand(-1, -1, x.shape[2]))
    return torch.cat([x[:, :prefix], kept], dim=1)


default_cfgs = untrained_cfgs("token_pruned_vit")


@register_model
def token_pruned_vit(pretrained: bool = False, **kwargs: Any) -> TokenPrunedViT:
    """`TokenPrunedViT`, on DeiT-S unless `backbone` names another plain timm ViT. Takes its arguments."""
    return build_wrapped(TokenPrunedViT, "token_pruned_vit", pretrained, **kwargs)
