"""A vision transformer as attribution sees it: its blocks, its tokens, and how the answer is read from them.

Families differ in where the answer is read (from a class token, the mean of the patches, a pooling attention) and in
the names of their parts. A `Classifier` hides that: attribution methods know nothing of families.

Symbols in the shape comments: B images, N tokens, D width, F features that the head reads.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from timm.models.beit import Beit
from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from timm.models.vision_transformer_relpos import VisionTransformerRelPos
from torch import Tensor, nn
from typing_extensions import override

# What a head reads: the class token, the distillation token, the mean of the patch tokens (or of all tokens), or the
# result of a pooling attention, whose query is a parameter.
Part = Literal["class", "distilled", "mean", "mean of all", "pool"]
DISTILLED: tuple[Part, ...] = ("class", "distilled")
OWN_HEADS = ("class", "distilled")
Targets = Tensor | Callable[[Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Sizes of a ViT, and what its own head reads."""

    blocks: Sequence[nn.Module]
    """The transformer blocks in order; each computes one self-attention."""
    parts: tuple[Part, ...]
    """What the head reads, each with an equal share in the answer."""
    image_size: tuple[int, int]
    """Height and width of the input in pixels."""
    grid: tuple[int, int]
    """Height and width of the input in patches."""
    channels: int
    """Number of channels of the input."""
    prefix_tokens: int
    """Number of tokens before the patches: class, distillation and register tokens."""
    width: int
    """D, the width of a token."""
    num_heads: int
    """Number of heads of a block's attention."""
    classes: int
    """Number of classes of the head; 0 for none."""

    def __post_init__(self) -> None:
        if not self.blocks:
            raise ValueError("a model without blocks has no attention")


class Classifier(nn.Module, ABC):
    """A ViT of any family; `forward` gives its logits [B, classes].

    Args:
        model: The model, with its own head or none.
        layout: Its sizes, which become attributes: `blocks`, `image_size`, `grid`, `channels`, `prefix_tokens`,
            `width`, `num_heads`, `num_classes`, and `tokens`, N.
        head: A head in place of the model's own; None keeps it.

    Attributes:
        model: The model.
        head: The head in place of its own, or None.
        parts: What the head reads.
        own_parts: What the model's own head reads.
    """

    def __init__(self, model: nn.Module, layout: Layout, head: nn.Module | None = None) -> None:
        super().__init__()
        self.model: Any = model
        self.head: Any = head
        self.blocks = tuple(layout.blocks)
        self.own_parts = layout.parts
        self.parts: tuple[Part, ...] = layout.parts if head is None else getattr(head, "parts", layout.parts)
        self.image_size, self.grid, self.channels = layout.image_size, layout.grid, layout.channels
        self.prefix_tokens, self.width, self.num_heads = layout.prefix_tokens, layout.width, layout.num_heads
        self.num_classes = layout.classes if head is None else int(cast(Any, head).num_classes)
        self.tokens = self.prefix_tokens + self.grid[0] * self.grid[1]

    # -- what a family says

    @abstractmethod
    def run_blocks(self, images: Tensor) -> None:
        """Run the model on images [B, C, H, W] at least up to its last block."""

    @abstractmethod
    def normalise(self, tokens: Tensor) -> Tensor:
        """Apply the norm after the last block to tokens [B, N, D]."""

    @abstractmethod
    def pool(self, tokens: Tensor) -> Tensor:
        """Compute what the model's own head reads [B, F] of normalised tokens [B, N, D]."""

    @abstractmethod
    def answer(self, pooled: Tensor) -> Tensor:
        """Apply the model's own head to what it reads; [B, F] -> [B, classes]."""

    # -- what follows from it

    def forward(self, images: Tensor) -> Tensor:
        """Classify normalised images; [B, C, H, W] -> [B, classes]."""
        return self.read(self.encode(images))

    def encode(self, images: Tensor) -> Tensor:
        """Compute the output of the last block [B, N, D]."""
        outputs: list[Tensor] = []
        handle = self.blocks[-1].register_forward_hook(lambda _block, _args, output: outputs.append(first(output)))
        try:
            self.run_blocks(images)
        finally:
            handle.remove()
        return outputs[0]

    def read(self, tokens: Tensor) -> Tensor:
        """Read the answer from tokens [B, N, D], those of the last block or of any other; -> [B, classes].

        Tokens may be of any number as long as the prefix tokens lead.
        """
        normed = self.normalise(tokens)
        if self.head is None:
            return self.answer(self.pool(normed))
        return self.head(self, normed)

    def features(self, images: Tensor) -> Tensor:
        """Compute the normalised patch tokens [B, gh, gw, D]."""
        return self.normalise(self.encode(images))[:, self.prefix_tokens :].unflatten(1, self.grid)

    def readout(self) -> Tensor | None:
        """The weight of each token in what the head reads, [N], summing to 1; None if a pooling attention reads them.

        Where the head reads several parts, each has an equal share.
        """
        if self.parts == ("pool",):
            return None
        weight = next(self.model.parameters())
        row = torch.zeros(self.tokens, dtype=weight.dtype, device=weight.device)
        for part in self.parts:
            share = torch.zeros_like(row)
            if part == "class":
                share[0] = 1
            elif part == "distilled":
                share[1] = 1
            elif part == "mean":
                share[self.prefix_tokens :] = 1 / (self.tokens - self.prefix_tokens)
            else:
                share[:] = 1 / self.tokens
            row += share / len(self.parts)
        return row


def first(output: Any) -> Tensor:
    """The tokens that a block returns, alone or as the first of several values."""
    return output[0] if isinstance(output, tuple) else output


class TimmClassifier(Classifier):
    """A timm model other than the distilled DeiT, with a class token, mean or attention pooling.

    Its class is VisionTransformer, VisionTransformerRelPos, Eva (EVA-02, DINOv3) or Beit.

    Args:
        model: The model.
        head: A head in place of its own; None keeps it.
    """

    def __init__(self, model: Any, head: nn.Module | None = None) -> None:
        super().__init__(model, _timm_layout(model, _timm_parts(model)), head)

    @override
    def run_blocks(self, images: Tensor) -> None:
        self.model.forward_features(images)

    @override
    def normalise(self, tokens: Tensor) -> Tensor:
        return self.model.norm(tokens)

    @override
    def pool(self, tokens: Tensor) -> Tensor:
        return self.model.forward_head(tokens, pre_logits=True)

    @override
    def answer(self, pooled: Tensor) -> Tensor:
        return self.model.head(pooled)


class DistilledClassifier(TimmClassifier):
    """timm's distilled DeiT, which has a head for each of two tokens.

    Args:
        model: The model.
        head: A head in place of its own; None keeps them.
        own: Whose answer counts: that of the class token, of the distillation token, or the mean of both.
    """

    def __init__(self, model: Any, head: nn.Module | None = None, own: tuple[Part, ...] = DISTILLED) -> None:
        Classifier.__init__(self, model, _timm_layout(model, own), head)
        heads = {"class": model.head, "distilled": model.head_dist}
        self._heads = tuple(heads[part] for part in own)

    @override
    def pool(self, tokens: Tensor) -> Tensor:
        return read_parts(tokens, self.own_parts, self.prefix_tokens)

    @override
    def answer(self, pooled: Tensor) -> Tensor:
        return mean_answer(self._heads, pooled)


def read_parts(tokens: Tensor, parts: Sequence[Part], prefix_tokens: int) -> Tensor:
    """Concatenate what a head reads of normalised tokens [B, N, D]: -> [B, D * number of parts]."""
    read = {
        "class": lambda: tokens[:, 0],
        "distilled": lambda: tokens[:, 1],
        "mean": lambda: tokens[:, prefix_tokens:].mean(dim=1),
        "mean of all": lambda: tokens.mean(dim=1),
    }
    return torch.cat([read[part]() for part in parts], dim=1)


def mean_answer(heads: Sequence[nn.Module], pooled: Tensor) -> Tensor:
    """Average the answers [B, classes] of heads, each of which reads its share of the features [B, F]."""
    logits = [head(share) for head, share in zip(heads, pooled.chunk(len(heads), dim=1), strict=True)]
    return torch.stack(logits).mean(dim=0)


def _timm_parts(model: Any) -> tuple[Part, ...]:
    pool = model.global_pool
    if getattr(model, "attn_pool", None) is not None:
        return ("pool",)
    if pool == "token":
        return ("class",)
    if pool == "avg":
        return ("mean of all" if getattr(model, "pool_include_prefix", False) else "mean",)
    raise ValueError(f"a {type(model).__name__} with global_pool={pool!r}: only 'token', 'avg' and 'map' are known")


def _timm_layout(model: Any, parts: tuple[Part, ...]) -> Layout:
    blocks, embed = tuple(model.blocks), model.patch_embed
    if getattr(embed, "dynamic_img_pad", False):
        raise ValueError(f"a {type(model).__name__} with dynamic_img_pad=True, whose grid depends on the padding")
    # A hybrid has a convolutional network before the projection of its features.
    stem = next(part for part in embed.modules() if isinstance(part, nn.Conv2d))
    parts_of_one = (part for block in blocks[:1] for part in block.modules())
    heads = next((part.num_heads for part in parts_of_one if hasattr(part, "num_heads")), 0)
    if blocks and not heads:
        raise ValueError(f"blocks of the class {type(blocks[0]).__name__} have no attention that is known")
    return Layout(
        blocks=blocks,
        parts=parts,
        image_size=tuple(embed.img_size),
        grid=tuple(embed.grid_size),
        channels=stem.in_channels,
        prefix_tokens=model.num_prefix_tokens,
        width=model.embed_dim,
        num_heads=heads,
        classes=model.num_classes,
    )


def as_classifier(model: nn.Module, head: nn.Module | None = None, own_head: str | None = None) -> Classifier:
    """Wrap a model of a known family; a `Classifier` is returned as it is.

    Args:
        model: A ViT of timm, torchvision or transformers.
        head: A head in place of the model's own; None keeps it.
        own_head: Which of two own heads answers, ``class`` or ``distilled``; None takes the only one, or the mean.

    Raises:
        ValueError: No family has the model, it reads its answer in a way that is not known, or it has no two heads; the
            message names it.
    """
    if isinstance(model, Classifier):
        return model
    own: tuple[Part, ...] | None = None if own_head is None else (cast(Part, own_head),)
    library = type(model).__module__.partition(".")[0]
    if library == "transformers":
        from zpipe.pipeline.transformers_models import TransformersClassifier

        return TransformersClassifier(model, head, own)
    if type(model) is VisionTransformerDistilled:
        return DistilledClassifier(model, head, own or DISTILLED)
    if own is not None:
        raise ValueError(f"a {type(model).__name__} has one head")
    if library == "torchvision":
        from zpipe.pipeline.torchvision_models import TorchvisionClassifier

        return TorchvisionClassifier(model, head)
    if type(model) not in (VisionTransformer, VisionTransformerRelPos, Eva, Beit):
        raise ValueError(f"no family of teachers has a {type(model).__name__}{_why_not(model)}")
    return TimmClassifier(model, head)


def _why_not(model: nn.Module) -> str:
    """The reason why a model has no maps, where it is known."""
    names = {type(part).__name__ for part in model.modules()}
    if any("Window" in name or "Swin" in name or "Hiera" in name for name in names):
        return ": its attention does not see all patches at once"
    if any("NaFlex" in name for name in names):
        return ": it takes patches instead of images"
    return "" if any("Attention" in name or "Attn" in name for name in names) else ": it has no attention"
