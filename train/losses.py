"""Losses: distillation of the zoomer (ZoomViT, Eq. 5), token labelling (LV-ViT), and two stages (CF-ViT, LF-ViT)."""

from __future__ import annotations

from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zpipe.train.models.checks import check_values

Normalisation = Literal["sum", "softmax"]
KlDirection = Literal["student||teacher", "teacher||student"]
CoarseTarget = Literal["fine", "labels"]


def distribution(maps: Tensor, eps: float = 1e-4, normalisation: Normalisation = "sum") -> Tensor:
    """Turn maps into distributions over their cells.

    Args:
        maps: Non-negative scores [B, S].
        eps: Added to every score under "sum", so that an all-zero map becomes the uniform distribution. The default is
            far below the thresholds that select cells (0.005 and up, on maps in [0, 1]), and limits what an empty cell
            can contribute to a divergence.
        normalisation: "sum" for (map + eps) / sum(map + eps); "softmax" for exp(map) / sum(exp(map)), which is nearly
            uniform for maps in [0, 1].

    Returns:
        float32 [B, S].
    """
    if normalisation == "softmax":
        return maps.float().softmax(dim=1)
    maps = maps.float() + eps
    return maps / maps.sum(dim=1, keepdim=True)


def kl_divergence(first: Tensor, second: Tensor, eps: float = 1e-4, normalisation: Normalisation = "sum") -> Tensor:
    """KL(first || second) in nats of the `distribution` of two batches of maps [B, S]; mean over the batch, 0-d."""
    p, q = distribution(first, eps, normalisation), distribution(second, eps, normalisation)
    return (p * (p.log() - q.log())).sum(dim=1).mean()


def dice_loss(student: Tensor, teacher: Tensor, eps: float = 1e-6) -> Tensor:
    """1 - 2 <y, p> / (<y, y> + <p, p>) of soft maps [B, S] in [0, 1]; mean over the batch, 0-d.

    Because of the squares in the denominator it is 0 exactly if the maps are equal, soft maps included. eps, added to
    numerator and denominator, makes it 0 for two all-zero maps.
    """
    student, teacher = student.float(), teacher.float()
    overlap = 2 * (student * teacher).sum(dim=1)
    total = student.square().sum(dim=1) + teacher.square().sum(dim=1)
    return (1 - (overlap + eps) / (total + eps)).mean()


class ZoomerLoss(nn.Module):
    """MSE + w_kl * KL + w_dice * Dice (Eq. 5).

    Args:
        w_kl: Weight of KL, the paper's w1. The paper gives no values of its weights; 0.1 each is our choice. KL ignores
            the scale of a map; MSE and Dice bind it to [0, 1], the range of the threshold alpha.
        w_dice: Weight of Dice, the paper's w2.
        kl_direction: "student||teacher", as in the paper, or "teacher||student", which is usual in distillation.
        normalisation: How maps become the distributions that KL compares, see `distribution`; the paper does not say.

    Raises:
        ValueError: If a weight is negative, or the direction or normalisation is unknown.
    """

    def __init__(
        self,
        w_kl: float = 0.1,
        w_dice: float = 0.1,
        kl_direction: KlDirection = "student||teacher",
        normalisation: Normalisation = "sum",
    ) -> None:
        super().__init__()
        if w_kl < 0 or w_dice < 0:
            raise ValueError(f"loss weights must not be negative, got w_kl {w_kl}, w_dice {w_dice}")
        if kl_direction not in get_args(KlDirection):
            raise ValueError(f"kl_direction must be one of {', '.join(get_args(KlDirection))}, got {kl_direction!r}")
        if normalisation not in get_args(Normalisation):
            raise ValueError(
                f"normalisation must be one of {', '.join(get_args(Normalisation))}, got {normalisation!r}"
            )
        self.w_kl = w_kl
        self.w_dice = w_dice
        self.kl_direction = kl_direction
        self.normalisation: Normalisation = normalisation

    def forward(self, student: Tensor, teacher: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute the loss, in float32 for inputs of any dtype.

        Args:
            student: Maps [B, S] in [0, 1].
            teacher: Maps [B, S] in [0, 1].

        Returns:
            The total, 0-d float32, and its terms mse, kl and dice before weighting, detached.

        Raises:
            ValueError: If the two don't have the same shape [B, S].
        """
        if student.ndim != 2 or student.shape != teacher.shape:
            raise ValueError(
                f"student and teacher must be [batch, cells] alike, got {list(student.shape)} and {list(teacher.shape)}"
            )
        with torch.autocast(student.device.type, enabled=False):
            student, teacher = student.float(), teacher.float()
            first, second = (student, teacher) if self.kl_direction == "student||teacher" else (teacher, student)
            terms = {
                "mse": F.mse_loss(student, teacher),
                "kl": kl_divergence(first, second, normalisation=self.normalisation),
                "dice": dice_loss(student, teacher),
            }
            total = terms["mse"] + self.w_kl * terms["kl"] + self.w_dice * terms["dice"]
        return total, {name: term.detach() for name, term in terms.items()}


class CoarseToFineLoss(nn.Module):
    """Cross-entropy of the fine stage, plus a loss of the coarse stage (CF-ViT, Eq. 14; LF-ViT, Eq. 12).

    The coarse stage learns from the fine one by KL(fine || coarse), mean over the batch, at temperature 1. The papers
    write KL(p_c, p_f) without more detail; in the authors' code the fine stage is the target, and gets no gradient from
    it.

    Args:
        coarse: What the coarse stage learns from: "fine", or "labels", which replaces KL by cross-entropy (Eq. 15,
            Table 8).
        label_smoothing: Label smoothing of class indices; targets that are distributions are not smoothed.

    Raises:
        ValueError: If `coarse` is unknown, or label_smoothing is outside [0, 1].
    """

    def __init__(self, coarse: CoarseTarget = "fine", label_smoothing: float = 0.0) -> None:
        super().__init__()
        if coarse not in get_args(CoarseTarget):
            raise ValueError(f"coarse must be one of {', '.join(get_args(CoarseTarget))}, got {coarse!r}")
        if not 0 <= label_smoothing <= 1:
            raise ValueError(f"label_smoothing must lie in [0, 1], got {label_smoothing!r}")
        self.coarse = coarse
        self.label_smoothing = label_smoothing

    def forward(self, coarse: Tensor, fine: Tensor, target: Tensor) -> Tensor:
        """Compute the loss, in float32 for inputs of any dtype.

        Args:
            coarse: Logits of the coarse stage [B, K].
            fine: Logits of the fine stage [B, K].
            target: Class indices, int64 [B], or distributions [B, K].

        Returns:
            The loss, 0-d float32.

        Raises:
            ValueError: If the shapes disagree.
        """
        if coarse.ndim != 2 or coarse.shape != fine.shape:
            raise ValueError(
                f"coarse and fine must be [batch, classes] alike, got {list(coarse.shape)} and {list(fine.shape)}"
            )
        if target.shape not in (fine.shape, fine.shape[:1]):
            raise ValueError(
                f"target must be [{len(fine)}] or {list(fine.shape)}, as the logits are, got {list(target.shape)}"
            )
        smoothing = self.label_smoothing if target.ndim == 1 else 0.0
        with torch.autocast(coarse.device.type, enabled=False):
            coarse, fine = coarse.float(), fine.float()
            if target.ndim == 2:
                target = target.float()
            total = F.cross_entropy(fine, target, label_smoothing=smoothing)
            if self.coarse == "labels":
                return total + F.cross_entropy(coarse, target, label_smoothing=smoothing)
            teacher = fine.detach().softmax(dim=1)  # [B, K]
            return total + F.kl_div(coarse.log_softmax(dim=1), teacher, reduction="batchmean")


class TokenLabelLoss(nn.Module):
    """Cross-entropy of the class token, plus `weight` times the mean cross-entropy of the patches (LV-ViT, Eq. 4).

    Args:
        weight: Weight of the patches; LV-ViT's value is 0.5.

    Raises:
        ValueError: If the weight is negative.
    """

    def __init__(self, weight: float = 0.5) -> None:
        super().__init__()
        if weight < 0:
            raise ValueError(f"weight must not be negative, got {weight}")
        self.weight = weight

    def forward(self, logits: Tensor, dense: Tensor, labels: Tensor, token_labels: Tensor) -> Tensor:
        """Compute the loss, in float32 for inputs of any dtype.

        Args:
            logits: Logits of the class token [B, K].
            dense: Logits of the patches [B, N, K].
            labels: Class indices, int64 [B], or distributions [B, K].
            token_labels: Distributions [B, N, K].

        Returns:
            The loss, 0-d float32.

        Raises:
            ValueError: If the shapes disagree.
        """
        if dense.shape != token_labels.shape or dense.ndim != 3:
            raise ValueError(
                f"dense and token_labels must be [batch, patches, classes] alike, got {list(dense.shape)} and "
                f"{list(token_labels.shape)}"
            )
        patches = F.cross_entropy(dense.float().flatten(0, 1), token_labels.float().flatten(0, 1))
        return F.cross_entropy(logits.float(), labels if labels.ndim == 1 else labels.float()) + self.weight * patches


def relevance_token_labels(maps: Tensor, labels: Tensor, num_classes: int, side: int) -> Tensor:
    """Make token labels from relevance maps.

    The label of a patch of relevance r is r times the one-hot class plus (1 - r) times the uniform distribution.
    LV-ViT's own labels are the dense predictions of another network; these need only the stored maps.

    Args:
        maps: Relevance maps [B, gh, gw] in [0, 1].
        labels: Class indices, int64 [B].
        num_classes: Number of classes.
        side: Patches per row and column.

    Returns:
        Distributions [B, side * side, num_classes].

    Raises:
        ValueError: If a map has values outside [0, 1]. On an accelerator an assertion of its own fails instead, for
            which the host need not wait.
    """
    check_values(((maps >= 0) & (maps <= 1)).all(), "token labels need maps in [0, 1]; normalise them first")
    relevance = F.interpolate(maps[:, None].float(), (side, side), mode="area").flatten(1)[..., None]  # [B, N, 1]
    one_hot = F.one_hot(labels, num_classes).to(relevance.dtype)[:, None]  # [B, 1, K]
    return relevance * one_hot + (1 - relevance) / num_classes
