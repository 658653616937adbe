"""A vision transformer as attribution sees it: its blocks, its tokens, and how the answer is read from them.

Families differ in where the answer is read (from a class token, the mean of the patches, a pooling attention) and in the
names of their parts. A `Classifier` hides that: attribution methods know nothing of families.

Symbols in the shape comments: B images, N tokens, D width, F features that the head reads.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from timm.models.beit import Beit
from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

# What a head reads: the class token, the distillation token, the mean of the patch tokens (or of all tokens), or the
# result of a pooling attention, whose query is a parameter.
Part = Literal["class", "distilled", "mean", "mean of all", "pool"]
Targets = Tensor | Callable[[Tensor], Tensor]


class Classifier(nn.Module, ABC):
    """A ViT of any family; `forward` gives its logits [B, classes].

    Args:
        model: The model, with its own head or none.
        head: A head in place of the model's own; None keeps it.

    Attributes:
        model: The model.
        head: The head in place of its own, or None.
    """

    def __init__(self, model: nn.Module, head: nn.Module | None = None) -> None:
        super().__init__()
        self.model: Any = model
        self.head = head

    # -- what a family says

    @property
    @abstractmethod
    def blocks(self) -> Sequence[nn.Module]:
        """The transformer blocks in order; each computes one self-attention."""

    @property
    @abstractmethod
    def parts(self) -> tuple[Part, ...]:
        """What the model's own head reads, each with an equal share in the answer."""

    @property
    @abstractmethod
    def image_size(self) -> tuple[int, int]:
        """Height and width of the input in pixels."""

    @property
    @abstractmethod
    def grid(self) -> tuple[int, int]:
        """Height and width of the input in patches."""

    @property
    @abstractmethod
    def channels(self) -> int:
        """Number of channels of the input."""

    @property
    @abstractmethod
    def prefix_tokens(self) -> int:
        """Number of tokens before the patches: class, distillation and register tokens."""

    @property
    @abstractmethod
    def width(self) -> int:
        """D, the width of a token."""

    @property
    @abstractmethod
    def num_heads(self) -> int:
        """Number of heads of a block's attention."""

    @property
    @abstractmethod
    def own_classes(self) -> int:
        """Number of classes of the model's own head; 0 for none."""

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

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return self.own_classes if self.head is None else int(self.head.num_classes)

    @property
    def tokens(self) -> int:
        """N, the number of tokens of an image."""
        return self.prefix_tokens + self.grid[0] * self.grid[1]

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
        parts = self.parts if self.head is None else getattr(self.head, "parts", self.parts)
        if parts == ("pool",):
            return None
        weight = next(self.model.parameters())
        row = torch.zeros(self.tokens, dtype=weight.dtype, device=weight.device)
        for part in parts:
            share = torch.zeros_like(row)
            if part == "class":
                share[0] = 1
            elif part == "distilled":
                share[1] = 1
            elif part == "mean":
                share[self.prefix_tokens :] = 1 / (self.tokens - self.prefix_tokens)
            else:
                share[:] = 1 / self.tokens
            row += share / len(parts)
        return row


def first(output: Any) -> Tensor:
    """The tokens that a block returns, alone or as the first of several values."""
    return output[0] if isinstance(output, tuple) else output


class TimmClassifier(Classifier):
    """timm's VisionTransformer, Eva (EVA-02, DINOv3) and Beit, with a class token, mean or attention pooling."""

    @property
    def blocks(self) -> Sequence[nn.Module]:
        return list(self.model.blocks)

    @property
    def parts(self) -> tuple[Part, ...]:
        if getattr(self.model, "attn_pool", None) is not None:
            return ("pool",)
        if self.model.global_pool == "token":
            return ("class",)
        return ("mean of all" if getattr(self.model, "pool_include_prefix", False) else "mean",)

    @property
    def image_size(self) -> tuple[int, int]:
        height, width = self.model.patch_embed.img_size
        return height, width

    @property
    def grid(self) -> tuple[int, int]:
        height, width = self.model.patch_embed.grid_size
        return height, width

    @property
    def channels(self) -> int:
        return int(self.model.patch_embed.proj.in_channels)

    @property
    def prefix_tokens(self) -> int:
        return int(self.model.num_prefix_tokens)

    @property
    def width(self) -> int:
        return int(self.model.embed_dim)

    @property
    def num_heads(self) -> int:
        return int(self.model.blocks[0].attn.num_heads)

    @property
    def own_classes(self) -> int:
        return int(self.model.num_classes)

    def run_blocks(self, images: Tensor) -> None:
        self.model.forward_features(images)

    def normalise(self, tokens: Tensor) -> Tensor:
        return self.model.norm(tokens)

    def pool(self, tokens: Tensor) -> Tensor:
        return self.model.forward_head(tokens, pre_logits=True)

    def answer(self, pooled: Tensor) -> Tensor:
        return self.model.head(pooled)


class DistilledClassifier(TimmClassifier):
    """timm's distilled DeiT, which has a head for each of two tokens.

    Args:
        model: The model.
        head: A head in place of its own; None keeps them.
        parts: Whose answer counts: that of the class token, of the distillation token, or the mean of both.
    """

    def __init__(
        self, model: nn.Module, head: nn.Module | None = None, parts: tuple[Part, ...] = ("class", "distilled")
    ) -> None:
        super().__init__(model, head)
        self._parts = parts

    @property
    def parts(self) -> tuple[Part, ...]:
        return self._parts

    def pool(self, tokens: Tensor) -> Tensor:
        return torch.cat([tokens[:, ("class", "distilled").index(part)] for part in self._parts], dim=1)  # [B, 1-2 D]

    def answer(self, pooled: Tensor) -> Tensor:
        heads = {"class": self.model.head, "distilled": self.model.head_dist}
        read = pooled.unflatten(1, (len(self._parts), -1))  # [B, 1 or 2, D]
        logits = [heads[part](read[:, place]) for place, part in enumerate(self._parts)]
        return torch.stack(logits).mean(dim=0)


def as_classifier(model: nn.Module, head: nn.Module | None = None) -> Classifier:
    """Wrap a model of a known family; a `Classifier` is returned as it is.

    Raises:
        ValueError: No family has it, or its family reads the answer in a way that is not known; the message names it.
    """
    if isinstance(model, Classifier):
        return model
    if type(model) is VisionTransformerDistilled:
        return DistilledClassifier(model, head)
    if type(model) not in (VisionTransformer, Eva, Beit):
        raise ValueError(f"no family of teachers has a {type(model).__name__}")
    pool = model.global_pool
    if getattr(model, "attn_pool", None) is None and pool not in ("token", "avg"):
        raise ValueError(f"a {type(model).__name__} with global_pool={pool!r}: only 'token', 'avg' and 'map' are known")
    return TimmClassifier(model, head)
