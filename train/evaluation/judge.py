"""Are relevance maps true to a model? Deletion and insertion curves, and the pointing game where boxes are known."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from zpipe.schemas.errors import UsageError
from zpipe.schemas.progress import Progress, silent
from zpipe.train.checkpoint import load_run
from zpipe.train.data.labels import check_labels
from zpipe.train.evaluation.inference import OpenRun, eval_loader
from zpipe.train.evaluation.metrics import pointing_game
from zpipe.train.evaluation.results import identity, judge_results, write_results
from zpipe.train.models.scores import centre_prior
from zpipe.train.scoring import key_noise

Baseline = Literal["mean", "blur"]


@dataclass(frozen=True, kw_only=True)
class JudgeConfig:
    """steps: points of a curve beyond its first. baseline: what stands for a cell that isn't there, the data set's mean
    colour or the image itself, blurred until only its colours are left. limit: images looked at.
    """

    steps: int = 10
    baseline: Baseline = "blur"
    limit: int = 5_000
    batch_size: int = 64
    data_workers: int = 0
    device: str = "auto"

    def __post_init__(self) -> None:
        if self.steps < 1 or self.limit < 1:
            raise UsageError(f"steps {self.steps}, limit {self.limit}: give numbers >= 1")
        if self.baseline not in ("mean", "blur"):
            raise UsageError(f"--baseline {self.baseline}: choose mean or blur")


def perturbation_curves(
    model: Callable[[Tensor], Tensor], images: Tensor, maps: Tensor, targets: Tensor, steps: int, empty: Tensor
) -> tuple[Tensor, Tensor]:
    """The target's probability while cells go, and while they come, from the most relevant on (Petsiuk et al. 2018).

    Args:
        model: normalised images -> logits.
        images: [B, 3, S, S]; empty: the same with nothing in it, [B, 3, S, S].
        maps: [B, gh, gw], of which only the order of the cells counts; of equals the first in row-major order goes first.
        targets: int64 [B].
        steps: curve points beyond the first; point i has round(i / steps * cells) cells gone, or come.

    Returns:
        (deletion, insertion), each [B, steps + 1]. A faithful map's deletion falls early and its insertion rises early.
    """
    batch, height, width = maps.shape
    cells = height * width
    rank = (
        maps.flatten(1).argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    )  # [B, cells], 0 the most relevant
    curves: tuple[list[Tensor], list[Tensor]] = ([], [])
    for step in range(steps + 1):
        taken = (rank < round(step / steps * cells)).view(batch, 1, height, width)
        mask = F.interpolate(taken.to(images.dtype), images.shape[-2:], mode="nearest-exact") > 0  # [B, 1, S, S]
        for curve, on, off in ((curves[0], images, empty), (curves[1], empty, images)):
            probabilities = model(torch.where(mask, off, on)).float().softmax(dim=1)
            curve.append(probabilities.gather(1, targets[:, None])[:, 0])
    return torch.stack(curves[0], dim=1), torch.stack(curves[1], dim=1)


def area(curves: Tensor) -> Tensor:
    """The area under curves [B, n] over [0, 1], by trapezoids. -> [B]"""
    return torch.trapezoid(curves, dx=1 / (curves.shape[1] - 1), dim=1)


def emptied(images: Tensor, baseline: Baseline) -> Tensor:
    """Normalised images with nothing to see in them: zero, the mean colour, or blurred over a quarter of the image."""
    if baseline == "mean":
        return torch.zeros_like(images)
    radius = max(images.shape[-1] // 8, 1)
    blurred = images
    for _ in range(3):  # three box blurs are close to a Gaussian
        padded = F.pad(blurred, (radius,) * 4, mode="replicate")
        blurred = F.avg_pool2d(padded, 2 * radius + 1, stride=1)
    return blurred


@torch.inference_mode()
def judge_maps(
    run: Path,
    shards: Path,
    maps: Path,
    config: JudgeConfig,
    *,
    out: Path | None = None,
    progress: Progress = silent,
) -> list[dict[str, Any]]:
    """Hold a store's maps against a classifier, a finished vit run: rows for the maps and, as controls, for a centre prior
    and for random orders of the cells.

    Each row: setting, count, deletion and insertion (mean areas, with the half width of their 95 % intervals), and where the
    shards know boxes pointing_game. The target is the sample's label. Samples without a map are left out. A model that
    zooms sees all images unzoomed. Errors: :class:`UsageError`, :class:`ZpipeError`.
    """
    opened = load_run(run)
    ready = OpenRun(opened, None, device=config.device)
    model, device = ready.model, ready.device
    loader = eval_loader(
        opened.preprocessing,
        shards,
        maps,
        batch_size=config.batch_size,
        data_workers=config.data_workers,
        missing="skip",
    )
    found: dict[str, dict[str, list[Tensor]]] = {}
    count = 0
    for batch in loader:
        check_labels(batch["label"], batch["key"], model.num_classes)
        images = ready.prepare(batch)["image"]
        relevance = batch["relevance"].to(device)
        height, width = relevance.shape[1:]
        orders = {"maps": relevance}
        if height == width:
            orders["centre"] = centre_prior(height).to(device).view(1, height, width).expand_as(relevance)
        orders["random"] = key_noise(height * width, batch["key"]).to(device).view_as(relevance)
        empty = emptied(images, config.baseline)
        for name, order in orders.items():
            deletion, insertion = perturbation_curves(
                model, images, order, batch["label"].to(device), config.steps, empty
            )
            figures = found.setdefault(name, {})
            figures.setdefault("deletion", []).append(area(deletion).cpu())
            figures.setdefault("insertion", []).append(area(insertion).cpu())
            if "object_box" in batch:
                figures.setdefault("pointing_game", []).append(pointing_game(order.cpu(), batch["object_box"]).float())
        count += len(images)
        progress("judge", min(count, config.limit), min(config.limit, loader.sample_count))
        if count >= config.limit:
            break
    if not count:
        raise UsageError(f"{maps}: has no usable map of a sample in {shards}")
    rows = []
    for name, figures in found.items():
        row: dict[str, Any] = {"setting": name, "count": min(count, config.limit)}
        for figure, parts in figures.items():
            values = torch.cat(parts)[: config.limit].double()
            row[figure] = float(values.mean())
            row[f"{figure}_interval"] = 1.96 * float(values.std(correction=0)) / len(values) ** 0.5
        rows.append(row)
    about = identity(opened, "judge")
    stated = {"run": str(run), "model": about["model"], "seed": about["seed"]}
    stated |= {"shards": str(shards), "maps": str(maps)}
    write_results(out, "judge", stated, rows, judge_results(rows, about))
    return rows
