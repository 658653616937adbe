"""What the zoomer is trained to minimise: the distillation loss of ZoomViT, Eq. 5, term by term."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

KL_DIRECTIONS = ("student||teacher", "teacher||student")


def distribution(maps: Tensor, eps: float = 1e-4) -> Tensor:
    """Maps [B, S] of non-negative scores -> distributions over their S cells, (map + eps) / sum(map + eps), float32.

    An all-zero map becomes the uniform distribution. The default eps lies far below the thresholds that select cells
    (0.005 and up, on maps in [0, 1]), yet bounds what an empty cell can cost in a divergence.
    """
    maps = maps.float() + eps
    return maps / maps.sum(dim=1, keepdim=True)


def kl_divergence(first: Tensor, second: Tensor, eps: float = 1e-4) -> Tensor:
    """KL(first || second) in nats, of the `distribution` of two batches of maps [B, S]; mean over the batch, 0-d."""
    p, q = distribution(first, eps), distribution(second, eps)
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
        w_kl, w_dice: the paper's w1 and w2, whose values it doesn't give; 0.1 each is our choice. KL and Dice ignore
            or nearly ignore a map's scale; MSE alone ties it to the [0, 1] that the threshold alpha is read against.
        kl_direction: "student||teacher", as the paper writes it, or "teacher||student", usual in distillation.

    Raises:
        ValueError: negative weights, an unknown direction.
    """

    def __init__(self, w_kl: float = 0.1, w_dice: float = 0.1, kl_direction: str = "student||teacher") -> None:
        super().__init__()
        if w_kl < 0 or w_dice < 0:
            raise ValueError(f"loss weights must not be negative, got w_kl {w_kl}, w_dice {w_dice}")
        if kl_direction not in KL_DIRECTIONS:
            raise ValueError(f"kl_direction must be one of {', '.join(KL_DIRECTIONS)}, got {kl_direction!r}")
        self.w_kl = w_kl
        self.w_dice = w_dice
        self.kl_direction = kl_direction

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
                "kl": kl_divergence(first, second),
                "dice": dice_loss(student, teacher),
            }
            total = terms["mse"] + self.w_kl * terms["kl"] + self.w_dice * terms["dice"]
        return total, {name: term.detach() for name, term in terms.items()}
