"""The threshold that makes a zooming model cost what it may, on average over a data set."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from zpipe.schemas.atomic import write_json
from zpipe.schemas.errors import UsageError
from zpipe.schemas.progress import Progress, silent
from zpipe.train.checkpoint import load_run
from zpipe.train.evaluate import EvalConfig, choose_run_source, eval_loader
from zpipe.train.loop import resolve_device
from zpipe.train.models.zoom_tokens import calibrate_alpha, coarse_scores, parse_budget
from zpipe.train.models.zoomvit import ZoomViT


@dataclass(frozen=True, kw_only=True)
class CalibrationConfig:
    """budget: mean cost of an image, such as "300 tokens", "2.3 GMACs" or a number of zoomed cells; the source of the
    scores isn't counted. limit: images looked at; their scores are held in memory, 4 bytes a cell.
    """

    budget: str
    scores: str | None = None
    limit: int = 50_000
    batch_size: int = 128
    data_workers: int = 0
    device: str = "auto"


@torch.inference_mode()
def calibrate(
    run: Path,
    shards: Path,
    config: CalibrationConfig,
    *,
    maps: Path | None = None,
    out: Path | None = None,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Find alpha for a mean budget; returns, and writes as JSON to `out` when given, alpha and what it costs.

    {alpha, unit, budget, mean, std, images}: mean and standard deviation over images of the cost at alpha, in the
    budget's unit. The mean stays within the budget and falls short of it only where many cells score alike.
    Errors: :class:`UsageError` for a model without thresholds, or a budget that nothing fits into.
    """
    if config.limit < 1:
        raise UsageError(f"limit {config.limit}: give a number >= 1")
    opened = load_run(run)
    model = opened.model
    if not isinstance(model, ZoomViT):
        raise UsageError(f"{run}: only a zoomvit_* model costs more or less by its threshold")
    device = resolve_device(config.device)
    loader = eval_loader(opened.preprocessing, shards, maps, config.batch_size, config.data_workers, "uniform")
    model.to(device)
    source = choose_run_source(opened, EvalConfig(scores=config.scores), loader.maps)
    if source.zoomer is not None:
        source.zoomer.to(device)
    value, unit, table = _costs(model, config.budget)
    found: list[Tensor] = []
    images = 0
    for batch in loader:
        scores = source.score(opened.preprocessing.normalise(batch["image"].to(device)), batch)
        if scores is None:
            raise UsageError("--scores none: nothing is zoomed, whatever the threshold")
        found.append(coarse_scores(scores, model.zoom_factor).cpu())
        images += len(scores)
        progress("calibrate", min(images, config.limit), config.limit)
        if images >= config.limit:
            break
    cell_scores = torch.cat(found)[: config.limit]  # [N, C]
    alpha, mean = calibrate_alpha(cell_scores, value, lambda zoomed: table[zoomed])
    spread = table[(cell_scores > alpha).sum(dim=1)].std(correction=0)
    result = {
        "alpha": alpha,
        "unit": unit,
        "budget": value,
        "mean": mean,
        "std": float(spread),
        "images": len(cell_scores),
    }
    if out is not None:
        write_json(out, result)
    return result


def _costs(model: ZoomViT, budget: str) -> tuple[float, str, Tensor]:
    """The budget, its unit, and in that unit the cost of an image with 0, 1, .. C zoomed cells, float64 [C + 1]."""
    try:
        value, unit = parse_budget(budget, mean=True)
    except ValueError as error:
        raise UsageError(f"--budget {budget}: {error}") from error
    cells = model.coarse_grid**2
    costs = {
        "cells": [float(k) for k in range(cells + 1)],
        "tokens": [float(cells + 3 * k) for k in range(cells + 1)],
        "GMACs": [model.macs(k) / 1e9 for k in range(cells + 1)],
    }[unit]
    if value < costs[0]:
        raise UsageError(f"--budget {budget}: below the {costs[0]:g} {unit} of an image in which nothing is zoomed")
    return value, unit, torch.tensor(costs, dtype=torch.float64)
