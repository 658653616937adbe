"""What is minimised: the zoomer's distillation loss (ZoomViT, Eq. 5), term by term, LV-ViT's token labelling, and the loss
of a model of two stages (CF-ViT, LF-ViT).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NORMALISATIONS = ("sum", "softmax")
KL_DIRECTIONS = ("student||teacher", "teacher||student")
COARSE_TARGETS = ("fine", "labels")


def distribution(maps: Tensor, eps: float = 1e-4, normalisation: str = "sum") -> Tensor:
    """Maps [B, S] of non-negative scores -> distributions over their S cells, float32: "sum" gives
    (map + eps) / sum(map + eps), "softmax" exp(map) / sum(exp(map)), which is nearly uniform for maps in [0, 1].

    With "sum" an all-zero map becomes the uniform distribution. The default eps lies far below the thresholds that select cells
    (0.005 and up, on maps in [0, 1]), yet bounds what an empty cell can cost in a divergence.
    """
    if normalisation == "softmax":
        return maps.float().softmax(dim=1)
    maps = maps.float() + eps
    return maps / maps.sum(dim=1, keepdim=True)


def kl_divergence(first: Tensor, second: Tensor, eps: float = 1e-4, normalisation: str = "sum") -> Tensor:
    """KL(first || second) in nats, of the `distribution` of two batches of maps [B, S]; mean over the batch, 0-d."""
    p, q = distribution(first, eps, normalisation), distribution(second, eps, normalisation)
    return (p * (p.log() - q.log())).sum(dim=1).mean()


def dice_loss(student: Tensor, teacher: Tensor, eps: float = 1e-6) -> Tensor:
    """1 - 2 <y, p> / (<y, y> + <p, p>) of soft maps [B, S] in [0, 1]; mean over the batch, 0-d.

    The squared denominator makes it 0 exactly where the maps agree, soft ones included. eps, added above and below,
    makes two all-zero maps agree.
    """
    student, teacher = student.float(), teacher.float()
    overlap = 2 * (student * teacher).sum(dim=1)
    total = student.square().sum(dim=1) + teacher.square().sum(dim=1)
    return (1 - (overlap + eps) / (total + eps)).mean()


class ZoomerLoss(nn.Module):
    """MSE + w_kl * KL + w_dice * Dice (Eq. 5).

    Args:
        w_kl, w_dice: the paper's w1 and w2, whose values it doesn't give; 0.1 each is our choice. KL ignores a
            map's scale; MSE and Dice tie it to the [0, 1] that the threshold alpha is read against.
        kl_direction: "student||teacher", as the paper writes it, or "teacher||student", usual in distillation.
        normalisation: how maps become the distributions that KL compares, see `distribution`; the paper doesn't say.

    Raises:
        ValueError: negative weights, an unknown direction or normalisation.
    """

    def __init__(
        self,
        w_kl: float = 0.1,
        w_dice: float = 0.1,
        kl_direction: str = "student||teacher",
        normalisation: str = "sum",
    ) -> None:
        super().__init__()
        if w_kl < 0 or w_dice < 0:
            raise ValueError(f"loss weights must not be negative, got w_kl {w_kl}, w_dice {w_dice}")
        if kl_direction not in KL_DIRECTIONS:
            raise ValueError(f"kl_direction must be one of {', '.join(KL_DIRECTIONS)}, got {kl_direction!r}")
        self.w_kl = w_kl
        self.w_dice = w_dice
        if normalisation not in NORMALISATIONS:
            raise ValueError(f"normalisation must be one of {', '.join(NORMALISATIONS)}, got {normalisation!r}")
        self.kl_direction = kl_direction
        self.normalisation = normalisation

    def forward(self, student: Tensor, teacher: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """student, teacher [B, S] in [0, 1] -> the total, 0-d float32, and its terms before weighting, detached.

        The terms are named mse, kl and dice. Computed in float32 whatever comes in. Raises ValueError unless both are
        [B, S] alike.
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
    """Cross-entropy of the fine stage, plus what ties the coarse stage to it (CF-ViT, Eq. 14; LF-ViT, Eq. 12).

    The tie is KL(fine || coarse), mean over the batch, at temperature 1. The papers write KL(p_c, p_f) and say no more;
    in the authors' code the fine stage is the target, and no gradient flows into it.

    Args:
        coarse: "fine", to learn from the fine stage, or "labels", cross-entropy in place of KL (Eq. 15, Table 8).
        label_smoothing: of class indices; distributions are taken as they are.

    Raises:
        ValueError: an unknown coarse, label_smoothing outside [0, 1].
    """

    def __init__(self, coarse: str = "fine", label_smoothing: float = 0.0) -> None:
        super().__init__()
        if coarse not in COARSE_TARGETS:
            raise ValueError(f"coarse must be one of {', '.join(COARSE_TARGETS)}, got {coarse!r}")
        if not 0 <= label_smoothing <= 1:
            raise ValueError(f"label_smoothing must lie in [0, 1], got {label_smoothing!r}")
        self.coarse = coarse
        self.label_smoothing = label_smoothing

    def forward(self, coarse: Tensor, fine: Tensor, target: Tensor) -> Tensor:
        """coarse, fine logits [B, K]; target int64 [B], or distributions [B, K] -> 0-d float32.

        Computed in float32 whatever comes in. Raises ValueError when the shapes disagree.
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
            taught = fine.detach().softmax(dim=1)  # [B, K]
            return total + F.kl_div(coarse.log_softmax(dim=1), taught, reduction="batchmean")


class TokenLabelLoss(nn.Module):
    """Cross-entropy of the class token, plus `weight` times the mean over patches of theirs (LV-ViT, Eq. 4).

    Args:
        weight: of the patches' part; their value, 0.5.
    """

    def __init__(self, weight: float = 0.5) -> None:
        super().__init__()
        if weight < 0:
            raise ValueError(f"weight must not be negative, got {weight}")
        self.weight = weight

    def forward(self, logits: Tensor, dense: Tensor, labels: Tensor, token_labels: Tensor) -> Tensor:
        """logits [B, K], dense [B, N, K], labels [B] or [B, K], token_labels [B, N, K], distributions -> 0-d.

        Raises ValueError when the shapes disagree.
        """
        if dense.shape != token_labels.shape or dense.ndim != 3:
            raise ValueError(
                f"dense and token_labels must be [batch, patches, classes] alike, got {list(dense.shape)} and "
                f"{list(token_labels.shape)}"
            )
        patches = F.cross_entropy(dense.flatten(0, 1), token_labels.flatten(0, 1))
        return F.cross_entropy(logits, labels) + self.weight * patches


def relevance_token_labels(maps: Tensor, labels: Tensor, num_classes: int, side: int) -> Tensor:
    """Token labels from relevance maps: the class to the extent that a patch is relevant, else no class in particular.

    maps [B, gh, gw] in [0, 1], labels int64 [B] -> [B, side * side, num_classes], distributions. A patch of relevance r
    is labelled r of the class and (1 - r) of the uniform distribution. LV-ViT's own labels come from another network's
    dense predictions; these need nothing but the stored maps. Raises ValueError for maps outside [0, 1].
    """
    if maps.numel() and not 0 <= float(maps.min()) <= float(maps.max()) <= 1:
        raise ValueError("token labels need maps in [0, 1]; normalise them first")
    relevance = F.interpolate(maps[:, None].float(), (side, side), mode="area").flatten(1)[..., None]  # [B, N, 1]
    one_hot = F.one_hot(labels, num_classes).to(relevance.dtype)[:, None]  # [B, 1, K]
    return relevance * one_hot + (1 - relevance) / num_classes
