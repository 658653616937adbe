"""The token arithmetic of ZoomViT (section 3.3, Fig. 4): tensors in, tensors out; no model is involved.

An image is covered by a coarse grid of c x c cells and a fine grid of 2c x 2c cells. A coarse cell is either kept
as one coarse token or *zoomed*: replaced by the four fine tokens that cover the same pixels. So every pixel lies in
exactly one token, and an image with z zoomed cells has c * c + 3 * z tokens.

Scores come on the grid of the relevance teacher, s x s cells of one patch each, flattened row-major. The zoom factor
(eta) says which of the two grids that is:

    zoom factor 2.0: coarse grid = score grid (c = s),      fine patches are half a patch a side
    zoom factor 0.5: fine grid   = score grid (c = s / 2),  coarse patches are two patches a side

Tokens of both grids share one numbering, the *token id*: 0 .. 4C-1 are the fine tokens, row-major over the fine grid,
4C .. 5C-1 the coarse ones, row-major over the coarse grid (C = c * c). All functions work for any batch size and
treat every image on its own.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from zpipe.train.models.checks import refuse_nan

ZOOM_FACTORS = (2.0, 0.5)
ZFE_KINDS = ("none", "fixed", "soft")
PRUNE_KINDS = ("backward", "forward", "backward-zoomed", "forward-zoomed", "backward-rest", "forward-rest")


class Zoom(NamedTuple):
    """How a forward pass of a ZoomViT chooses its tokens; see `ZoomViT.forward`.

    Attributes:
        alpha: threshold above which a coarse cell is zoomed.
        budget: instead of a threshold, the number of cells to zoom, or a text such as "300 tokens".
        keep_tokens: the length that sequences are pruned to; None prunes nothing.
        prune: which tokens pruning removes, one of `PRUNE_KINDS`.
    """

    alpha: float | None = None
    budget: int | str | None = None
    keep_tokens: int | None = None
    prune: str = "backward"


class TokenOrder(NamedTuple):
    """Which tokens cover each image of a batch, and in which order.

    Attributes:
        ids: int64 [B, 5C], token ids; the first counts[b] of row b are its sequence, the rest are absent tokens.
        counts: int64 [B], tokens in the sequence, without the class token.
        fine: int64 [B], fine tokens (N_k of Eq. 6), four for each zoomed cell; backward pruning does not change it.
    """

    ids: Tensor
    counts: Tensor
    fine: Tensor


# -- scores ------------------------------------------------------------------------------------------------------------


def check_zoom_factor(zoom_factor: float) -> float:
    """The zoom factor as a float.

    Raises:
        ValueError: anything but 2.0 or 0.5.
    """
    if zoom_factor not in ZOOM_FACTORS:
        raise ValueError(f"zoom_factor must be 2.0 or 0.5, got {zoom_factor!r}")
    return float(zoom_factor)


def check_alpha(alpha: float) -> float:
    """The threshold itself.

    Raises:
        ValueError: a threshold outside [0, 1].
    """
    if not 0.0 <= alpha <= 1.0:
        raise ValueError(f"alpha must lie in [0, 1], got {alpha!r}")
    return alpha


def coarse_scores(scores: Tensor, zoom_factor: float) -> Tensor:
    """The score of every coarse cell: its own at zoom factor 2, the highest of its 2 x 2 block at 0.5.

    Args:
        scores: [B, s * s].
        zoom_factor: 2.0 or 0.5.

    Returns:
        [B, C] in the dtype of the scores.

    Raises:
        ValueError: scores that form no square grid (at 0.5 an even one).
    """
    side = _side(scores)
    if check_zoom_factor(zoom_factor) == 2.0:
        return scores
    if side % 2:
        raise ValueError(f"zoom factor 0.5 needs an even score grid, got {side} x {side}")
    half = side // 2
    return scores.reshape(-1, half, 2, half, 2).amax((2, 4)).flatten(1)  # [B, C]


def fine_scores(scores: Tensor, zoom_factor: float) -> Tensor:
    """The score of every fine cell: that of the score cell it lies in. scores [B, s * s] -> [B, 4C], same dtype."""
    side = _side(scores)
    if check_zoom_factor(zoom_factor) == 0.5:
        return scores
    return _enlarge(scores.reshape(-1, side, side)).flatten(1)  # [B, 4C]


# -- selection and order -----------------------------------------------------------------------------------------------


def select_above(cell_scores: Tensor, alpha: float) -> Tensor:
    """Zoom every coarse cell whose score is strictly above the threshold. [B, C] -> bool [B, C].

    At alpha = 1 nothing is zoomed.

    Raises:
        ValueError: a threshold outside [0, 1].
    """
    return cell_scores > check_alpha(alpha)


def select_top(cell_scores: Tensor, budget: int) -> Tensor:
    """Zoom exactly `budget` coarse cells of each image, so that all images have the same number of tokens.

    Args:
        cell_scores: [B, C]; the highest-scored cells are zoomed, and of equal scores the lower index.
        budget: number of cells.

    Returns:
        bool [B, C].

    Raises:
        ValueError: a budget outside 0 .. C.
    """
    cells = cell_scores.shape[1]
    if not 0 <= budget <= cells:
        raise ValueError(f"budget must lie between 0 and the {cells} coarse cells, got {budget!r}")
    ranked = stable_argsort(cell_scores, descending=True)  # [B, C]
    return torch.zeros_like(cell_scores, dtype=torch.bool).scatter_(1, ranked[:, :budget], True)


def choose_cells(
    scores: Tensor, batch: int, side: int, alpha: float | None, budget: int | None, zoom_factor: float = 2.0
) -> Tensor:
    """The coarse cells that scores zoom, under a threshold or a budget.

    Args:
        scores: [B, side * side].
        batch: B.
        side: score cells a side.
        alpha: threshold, or None.
        budget: number of cells, or None.
        zoom_factor: 2.0 or 0.5.

    Returns:
        bool [B, C].

    Raises:
        ValueError: scores of another shape or with NaN (see `checks`), both or neither of alpha and budget, or values
            of them out of range.
    """
    if tuple(scores.shape) != (batch, side * side):
        raise ValueError(
            f"scores must be [{batch}, {side * side}], a {side} x {side} map for each image, got {list(scores.shape)}"
        )
    if (alpha is None) == (budget is None):
        raise ValueError(f"scores need either alpha or budget, got alpha={alpha}, budget={budget}")
    refuse_nan(scores)
    cell_scores = coarse_scores(scores.detach(), zoom_factor)
    if budget is not None:
        return select_top(cell_scores, budget)
    assert alpha is not None  # checked above
    return select_above(cell_scores, alpha)


def order_tokens(cell_scores: Tensor, place_scores: Tensor, zoomed: Tensor) -> TokenOrder:
    """The token sequence of every image: fine tokens by descending score, then coarse tokens by descending score.

    The sort is stable: equal scores keep the order of their token ids.

    Args:
        cell_scores: [B, C], see `coarse_scores`.
        place_scores: [B, 4C], see `fine_scores`.
        zoomed: bool [B, C].
    """
    cells = zoomed.shape[1]
    side = math.isqrt(cells)
    zoomed_fine = _enlarge(zoomed.reshape(-1, side, side)).flatten(1)  # [B, 4C]
    kind = torch.cat([torch.where(zoomed_fine, 0, 2), torch.where(zoomed, 2, 1)], dim=1)  # [B, 5C]; 2: absent
    # Two stable sorts, the minor key first, sort by (kind, descending score, id).
    by_score = stable_argsort(torch.cat([place_scores, cell_scores], dim=1), descending=True)
    ids = by_score.gather(1, stable_argsort(kind.gather(1, by_score)))  # [B, 5C]
    fine = 4 * zoomed.sum(1)
    return TokenOrder(ids=ids, counts=cells + 3 * zoomed.sum(1), fine=fine)


def prune(order: TokenOrder, keep_tokens: int, kind: str = "backward") -> TokenOrder:
    """Prune every ordered sequence to `keep_tokens` (section 3.3, inference strategy; section 5.3, Fig. 6 c and d).

    Args:
        order: the sequences; those of at most `keep_tokens` stay as they are.
        keep_tokens: tokens to keep.
        kind: which tokens to remove. "backward": the lowest-ranked, the way to use a model; "forward": the
            highest-ranked, to show that they matter. "backward-zoomed" and "forward-zoomed" remove only fine tokens,
            "backward-rest" and "forward-rest" only coarse ones, and stop when none of them is left.

    Raises:
        ValueError: keep_tokens outside 1 .. 4C (the longest sequence), or an unknown kind.
    """
    longest = order.ids.shape[1] // 5 * 4
    if not 1 <= keep_tokens <= longest:
        raise ValueError(f"keep_tokens must lie between 1 and the {longest} tokens of a full zoom, got {keep_tokens!r}")
    if kind not in PRUNE_KINDS:
        raise ValueError(f"prune must be one of {', '.join(PRUNE_KINDS)}, got {kind!r}")
    if kind == "backward":
        return order._replace(counts=order.counts.clamp(max=keep_tokens))
    direction, _, part = kind.partition("-")
    place = torch.arange(order.ids.shape[1], device=order.ids.device).expand_as(order.ids)  # [B, 5C]
    # The tokens at first .. last - 1 may be removed.
    first = order.fine if part == "rest" else torch.zeros_like(order.fine)
    last = order.fine if part == "zoomed" else order.counts
    drop = (order.counts - keep_tokens).clamp(min=0).minimum(last - first)
    lowest = first if direction == "forward" else last - drop
    removed = (place >= lowest[:, None]) & (place < (lowest + drop)[:, None])
    ids = order.ids.gather(1, stable_argsort(removed.to(torch.int32)))  # [B, 5C], removed tokens last
    removed_fine = (removed & (place < order.fine[:, None])).sum(1)
    return TokenOrder(ids=ids, counts=order.counts - drop, fine=order.fine - removed_fine)


def pruned_counts(fine: int, count: int, keep_tokens: int, kind: str) -> tuple[int, int]:
    """How many tokens `prune` leaves of a sequence of `count`, `fine` of them fine: (fine tokens, all tokens)."""
    direction, _, part = kind.partition("-")
    first, last = (fine if part == "rest" else 0), (fine if part == "zoomed" else count)
    drop = min(max(count - keep_tokens, 0), last - first)
    begin = first if direction == "forward" else last - drop
    return fine - max(min(fine, begin + drop) - begin, 0), count - drop


def parse_budget(text: str, mean: bool = False) -> tuple[float, str]:
    """Parse a budget such as "300 tokens".

    Args:
        text: a number and a unit: cells, tokens or GMACs (G for short); without a unit it counts cells.
        mean: the budget is a mean over images, and may be a fraction of a cell or token.

    Returns:
        The number, and "cells", "tokens" or "GMACs".

    Raises:
        ValueError: a text of another form.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(cells?|tokens?|g|gmacs?|)", text.strip().lower())
    if match is None or ("." in match[1] and not mean and not match[2].startswith("g")):
        raise ValueError(f"budget {text!r} is none: give a number of cells, or '300 tokens', or '2.3 GMACs'")
    return float(match[1]), {"t": "tokens", "g": "GMACs"}.get(match[2][:1], "cells")


def calibrate_alpha(
    cell_scores: Tensor, budget: float, cost: Callable[[Tensor], Tensor] | None = None
) -> tuple[float, float]:
    """Find the threshold at which images cost `budget` on average, or as little less as their scores allow.

    Args:
        cell_scores: [N, C], the coarse scores of N images in [0, 1] (see `coarse_scores`).
        budget: maximum of the mean cost of an image.
        cost: the costs of images, given their numbers of zoomed cells, int64 [N] -> [N]; it must not decrease. None
            counts the zoomed cells themselves.

    Returns:
        (alpha, mean cost at alpha): the smallest alpha within the budget, found by bisection over the distinct scores,
        since the cost changes only there. Time grows as N C log(N C), memory as N C.

    Raises:
        ValueError: scores of another shape, or a budget below the cost of images with nothing zoomed.
    """
    if cell_scores.ndim != 2 or not len(cell_scores):
        raise ValueError(f"cell_scores must be [images, cells], got {list(cell_scores.shape)}")

    def mean_cost(alpha: float) -> float:
        zoomed = (cell_scores > alpha).sum(dim=1)
        return float((zoomed if cost is None else cost(zoomed)).double().mean())

    scores = cell_scores.flatten().double()
    steps = torch.cat([scores, scores.new_tensor([0.0, 1.0])]).unique()
    low, high = 0, len(steps) - 1  # the answer lies in steps[low .. high]
    if (minimum := mean_cost(1.0)) > budget:
        raise ValueError(f"a budget of {budget:g} is below the {minimum:g} of an image in which nothing is zoomed")
    while low < high:
        middle = (low + high) // 2
        if mean_cost(float(steps[middle])) <= budget:
            high = middle
        else:
            low = middle + 1
    alpha = float(steps[low])
    return alpha, mean_cost(alpha)


# -- zoom factor embedding ---------------------------------------------------------------------------------------------


def zoom_factor_embedding(
    fine: Tensor, length: int, kind: str = "soft", omega: float = 0.1, dtype: torch.dtype = torch.float32
) -> Tensor:
    """What is added to every channel of the token at each place of the ordered sequence.

    With pos = 0 .. length-1 the place in the sequence, and N_k the fine tokens of an image:

        none   0
        fixed  1 where pos < N_k (fine tokens), else 0
        soft   Eq. 6: 1 - 1 / (1 + exp(omega (N_k - pos))) = sigmoid(omega (N_k - pos)); it tends to `fixed` as omega
               grows, except at pos = N_k, the first coarse token, where it is 1/2 for every omega

    Args:
        fine: int64 [B], N_k.
        length: places of a sequence.
        kind: one of `ZFE_KINDS`.
        omega: steepness of the soft embedding.
        dtype: of the result.

    Returns:
        [B, length].

    Raises:
        ValueError: an unknown kind.
    """
    ahead = fine[:, None] - torch.arange(length, device=fine.device)  # [B, length], N_k - pos
    if kind == "none":
        return torch.zeros_like(ahead, dtype=dtype)
    if kind == "fixed":
        return (ahead > 0).to(dtype)
    if kind == "soft":
        return torch.sigmoid(omega * ahead.to(dtype))
    raise ValueError(f"zoom factor embedding must be one of {', '.join(ZFE_KINDS)}, got {kind!r}")


# -- patches -----------------------------------------------------------------------------------------------------------


def patchify(images: Tensor, patch: int) -> Tensor:
    """Cut images [B, D, H, W] into patches [B, (H/patch) * (W/patch), D * patch^2], laid out as a flattened kernel."""
    batch, chans, height, width = images.shape
    x = images.reshape(batch, chans, height // patch, patch, width // patch, patch)
    return x.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def half_kernel(kernel: Tensor) -> Tensor:
    """The kernel for half-size patches: each 2 x 2 block of weights summed. [E, D, p, p] -> [E, D, p/2, p/2].

    Applied to a patch of p/2 pixels it equals the kernel applied to that patch enlarged x2 (nearest): the four copies
    of a pixel meet four weights.
    """
    width, chans, side, _ = kernel.shape
    return kernel.reshape(width, chans, side // 2, 2, side // 2, 2).sum((3, 5))


def double_kernel(kernel: Tensor) -> Tensor:
    """The kernel for double-size patches: each weight spread, divided by 4, over 2 x 2. [E, D, p, p] -> [E, D, 2p, 2p].

    Applied to a patch of 2p pixels it equals the kernel applied to the 2 x 2 means of that patch.
    """
    return _enlarge(kernel) / 4


def patches_and_kernels(images: Tensor, kernel: Tensor, zoom_factor: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Flattened patches of both grids and the flattened kernel that embeds each: one kernel serves all patch sizes.

    At zoom factor 2 the half-size patches meet `half_kernel`: the image is not enlarged, and a fine token costs a
    quarter of a coarse one. At 0.5 the image is averaged over 2 x 2 pixels first, which equals `double_kernel` on the
    double-size patches for a quarter of the multiply-adds.

    Args:
        images: [B, D, H, W].
        kernel: [E, D, p, p].
        zoom_factor: 2.0 or 0.5.

    Returns:
        Fine patches [B, 4C, Kf], fine kernel [E, Kf], coarse patches [B, C, Kc], coarse kernel [E, Kc]. A token's
        embedding is patch @ kernel.T + bias.
    """
    patch = kernel.shape[-1]
    if check_zoom_factor(zoom_factor) == 2.0:
        half = half_kernel(kernel)
        return patchify(images, patch // 2), half.flatten(1), patchify(images, patch), kernel.flatten(1)
    flat = kernel.flatten(1)
    return patchify(images, patch), flat, patchify(F.avg_pool2d(images, 2), patch), flat


# -- geometry ----------------------------------------------------------------------------------------------------------


def token_boxes(ids: Tensor, coarse_side: int, image_size: int) -> Tensor:
    """The pixels that tokens cover.

    Args:
        ids: token ids, int64 [...].
        coarse_side: c, coarse cells a side.
        image_size: pixels a side, a multiple of 2c.

    Returns:
        int64 [..., 4] as (left, top, right, bottom), right and bottom exclusive.
    """
    cells = coarse_side * coarse_side
    coarse = ids >= 4 * cells
    index = torch.where(coarse, ids - 4 * cells, ids)
    side = torch.where(coarse, coarse_side, 2 * coarse_side)  # cells a side of the token's own grid
    pixels = image_size // side
    corner = torch.stack([index % side, index // side], dim=-1) * pixels[..., None]  # [..., 2]
    return torch.cat([corner, corner + pixels[..., None]], dim=-1)


def _side(scores: Tensor) -> int:
    side = math.isqrt(scores.shape[-1])
    if scores.ndim != 2 or side * side != scores.shape[-1]:
        raise ValueError(f"scores must be [batch, side * side], got {list(scores.shape)}")
    return side


def stable_argsort(x: Tensor, descending: bool = False) -> Tensor:
    """The indices that sort each row of x [B, N]; of equal values the lower index comes first."""
    if not torch.compiler.is_exporting():
        return x.argsort(dim=1, descending=descending, stable=True)
    # ONNX has no stable sort, so the keys are made unique: scores in [0, 1] are lowered slightly by their place. Those
    # that differ by less than 3e-11 (at a thousand cells) then count as equal.
    place = torch.arange(x.shape[1], device=x.device, dtype=torch.float64)
    key = (x if descending else -x).double() - place * 2.0**-45
    return key.sort(dim=1, descending=True).indices


def _enlarge(x: Tensor) -> Tensor:
    """[..., h, w] -> [..., 2h, 2w], every entry repeated 2 x 2."""
    return x.repeat_interleave(2, dim=-2).repeat_interleave(2, dim=-1)
