"""The cost of images in tokens and in multiply-adds, from the answers of a model."""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor, nn

from zpipe.train.evaluation.inference import Answer
from zpipe.train.macs import count_macs
from zpipe.train.models.operating_points import ImageCost, OperatingPoint, cost, cost_kinds
from zpipe.train.scoring import score_use


class CostMeter:
    """Counts what the images of an evaluation cost at one operating point; `add` takes the answers batch by batch."""

    def __init__(self, model: nn.Module, point: OperatingPoint) -> None:
        self._model, self._point = model, point
        self._images: Counter[int | None] = Counter()  # by kind, see `operating_points.cost_kinds`
        self._scored = False

    def add(self, answer: Answer) -> None:
        """Count the images of a batch."""
        kinds = cost_kinds(self._model, self._point, answer.scores, answer.output)
        self._scored = answer.scores is not None
        self._images.update([None] * len(answer.logits) if kinds is None else kinds.tolist())

    def _costs(self) -> list[tuple[ImageCost, int]]:
        return [(cost(self._model, self._point, kind), images) for kind, images in self._images.items()]

    def histogram(self) -> dict[int, int]:
        """The number of images by their number of tokens; empty for a model that spends the same on all images."""
        images: Counter[int] = Counter()
        for kind, count in self._images.items():
            if kind is not None:
                images[int(cost(self._model, self._point, kind).tokens or 0)] += count
        return dict(sorted(images.items()))

    def tokens(self) -> float | None:
        """Tokens that enter a block without the class token, averaged over blocks and images.

        None for a model without tokens.
        """
        costs = self._costs()
        if any(image.tokens is None for image, _ in costs):
            return None
        return sum((image.tokens or 0.0) * images for image, images in costs) / self._images.total()

    def exited(self) -> float | None:
        """The fraction of images that the first of two stages answered; None for a model of one stage."""
        costs = self._costs()
        if all(image.exited is None for image, _ in costs):
            return None
        return sum(images for image, images in costs if image.exited) / self._images.total()

    def macs(self, image: Tensor) -> float:
        """Multiply-adds of the model per image, from torch's flop counter.

        Args:
            image: any image of the right size, [1, 3, S, S].
        """
        return sum(self._macs_of(each, image) * images for each, images in self._costs()) / self._images.total()

    def _macs_of(self, each: ImageCost, image: Tensor) -> int:
        arguments = dict(each.arguments)
        use = score_use(self._model)
        if self._scored and use is not None:
            arguments.setdefault("scores", torch.zeros(1, use.grid**2, device=image.device))
        return count_macs(lambda: self._model(image, **arguments))
