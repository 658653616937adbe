"""Calibration: the threshold of zoom or of early exit at which a model costs a given budget on average."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from zpipe.schemas.atomic import write_json
from zpipe.schemas.errors import UsageError
from zpipe.schemas.progress import Progress, silent
from zpipe.train.checkpoint import load_run
from zpipe.train.data.join import Damaged
from zpipe.train.data.map_stores import Join
from zpipe.train.evaluation.answers import match_run
from zpipe.train.evaluation.inference import OpenRun, Tally, choose_run_source, eval_loader
from zpipe.train.evaluation.results import calibration_results, identity, unusual, write_results
from zpipe.train.models.operating_points import OperatingPoint, setting_names
from zpipe.train.models.zoom_tokens import calibrate_alpha, coarse_scores, parse_budget

BOTH_STAGES = OperatingPoint(name="both stages", arguments={"return_stages": True})


@dataclass(frozen=True, kw_only=True)
class CalibrationConfig:
    """Settings of a calibration."""

    budget: str
    """The mean cost per image without the scores: "300 tokens", "2.3 GMACs" or a number of zoomed cells."""
    scores: str | None = None
    """The source of the scores, one of `scoring.SOURCES`; None for the one that the run was trained with."""
    classes: str | None = None
    """How the classes of the shards become those of the model, see `answers.match_run`. Labels are not used; but other
    classes mean other images than those that the run was trained for."""
    damaged: Damaged = "error"
    """How to handle damaged tars and samples: `error`, or `skip` to leave them out and count them."""
    join: Join = "tar"
    """How maps find their images: `tar` or `image`, see `RelevanceLoader`."""
    weights: str = "final"
    """The weights of the run to use, see `checkpoint.load_run`."""
    limit: int = 50_000
    """The maximum number of images; their scores are held in memory, 4 bytes per cell."""
    batch_size: int = 128
    """Images per batch."""
    data_workers: int | None = None
    """Processes that load data, see `eval_loader`."""
    device: str = "auto"
    """`auto`, `cpu`, `cuda` or `cuda:N`."""

    def __post_init__(self) -> None:
        if self.limit < 1:
            raise UsageError(f"--limit {self.limit}: give a number >= 1")
        if self.damaged not in get_args(Damaged):
            raise UsageError(f"--damaged {self.damaged}: choose error or skip")


MEASURED = ("alpha", "exit_threshold", "unit", "budget", "mean", "std", "images", "skipped")


def calibrate(
    run: Path,
    shards: Path,
    config: CalibrationConfig,
    *,
    maps: Path | None = None,
    out: Path | None = None,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Find the threshold at which a model costs a given budget per image on average.

    Args:
        run: the folder of a finished run.
        shards: the images to choose the threshold on.
        config: the budget, and how to measure.
        maps: the relevance store of these shards, if maps are the scores.
        out: the JSON file to write; None to write none.
        progress: called once per batch.

    Returns:
        {alpha, unit, budget, mean, std, images}: `mean` and `std`, over images, are of the cost at alpha in the unit of
        the budget. The mean is at most the budget, and clearly less only if many cells score alike. A model of two
        stages has `exit_threshold` instead of alpha. `images` were taken, and `skipped` were left out as damaged.

    Raises:
        UsageError: the model has no threshold, or the budget is below its least or above its highest cost.
        ZpipeError: a file is broken, or the classes of run and shards differ.
    """
    content = calibration(run, shards, config, maps=maps, progress=progress)
    if out is not None:
        write_json(out, content)
    return {name: content[name] for name in MEASURED if name in content}


@torch.inference_mode()
def calibration(
    run: Path, shards: Path, config: CalibrationConfig, *, maps: Path | None = None, progress: Progress = silent
) -> dict[str, Any]:
    """As `calibrate`, but return the content of the results file, and write none."""
    opened = load_run(run, config.weights)
    if "exit" not in setting_names(opened.model) and not hasattr(opened.model, "tokenise"):
        raise UsageError(f"{run}: only zoomvit_*, cfvit_* and lfvit_* models cost more or less by a threshold")
    loader = eval_loader(
        opened.preprocessing,
        shards,
        maps,
        batch_size=config.batch_size,
        data_workers=config.data_workers,
        limit=config.limit,
        damaged=config.damaged,
        join=config.join,
        device=config.device,
    )
    loader.report_coverage(progress)
    match_run(opened, loader.index, loader.path, config.classes)
    source = choose_run_source(opened, config.scores, loader.maps)
    ready = OpenRun(opened, source, device=config.device)
    calibrate_model = _exit_threshold if "exit" in setting_names(opened.model) else _alpha
    batches = Tally(loader, config.limit)
    result = calibrate_model(ready, _told(batches, progress), config)
    scores = {} if source is None else {"scores": source.name}
    about = identity(opened, "calibration") | {"setting": scores | unusual({"weights": config.weights})}
    stated = {"run": str(run), "model": about["model"], "seed": about["seed"], "weights": config.weights}
    stated |= {"shards": str(shards), "maps": None if maps is None else str(maps)} | batches.stated() | result
    rows = [{"setting": f"budget={config.budget}"} | result]
    return write_results(None, "calibration", stated, rows, calibration_results(result, about))


def _told(batches: Tally, progress: Progress) -> Iterator[dict[str, Any]]:
    """The batches; progress is told behind each of them."""
    for batch in batches:
        yield batch
        progress("calibrate", batches.taken, batches.most)


def _alpha(opened: OpenRun, batches: Iterator[dict[str, Any]], config: CalibrationConfig) -> dict[str, Any]:
    model = opened.model
    value, unit, table = _costs(model, config.budget)
    chunks: list[Tensor] = []
    for batch in batches:
        scores = opened.scores(batch)
        if scores is None:
            raise UsageError("--scores none: nothing is zoomed, whatever the threshold")
        chunks.append(coarse_scores(scores, model.zoom_factor).cpu())
    cell_scores = torch.cat(chunks)  # [N, C]
    alpha, mean = calibrate_alpha(cell_scores, value, lambda zoomed: table[zoomed])
    spread = table[(cell_scores > alpha).sum(dim=1)].std(correction=0)
    about = {"unit": unit, "budget": value, "mean": mean, "std": float(spread)}
    return {"alpha": alpha} | about | {"images": len(cell_scores)}


def _exit_threshold(opened: OpenRun, batches: Iterator[dict[str, Any]], config: CalibrationConfig) -> dict[str, Any]:
    """The highest threshold at which enough images exit: the more images reach the fine stage, the better."""
    model = opened.model
    try:
        value, unit = parse_budget(config.budget, mean=True)
    except ValueError as error:
        raise UsageError(f"--budget {config.budget}: {error}") from error
    if unit != "GMACs":
        raise UsageError(f"--budget {config.budget}: early exit is calibrated to '2.3 GMACs'")
    coarse, whole = model.macs(1.0) / 1e9, model.macs(0.0) / 1e9
    if value < coarse:
        raise UsageError(f"--budget {config.budget}: below the {coarse:.4g} GMACs of the coarse stage")
    if value > whole:
        raise UsageError(
            f"--budget {config.budget}: above the {whole:.4g} GMACs of both stages; no threshold reaches it"
        )
    chunks = []
    for batch in batches:
        stages = opened.answer(batch, BOTH_STAGES).output
        opened.check_logits(stages.coarse, batch)
        chunks.append(stages.coarse.float().softmax(1).amax(1).cpu())
    confidence = torch.cat(chunks).sort(descending=True).values  # [N]
    refined = min(1.0, (value - coarse) / (whole - coarse))
    exits = math.ceil((1 - refined) * len(confidence) - 1e-9)
    # If no image has to exit, only those exit whose probability rounds to 1.
    threshold = float(confidence[exits - 1]) if exits else 1.0
    exited = float((confidence >= threshold).double().mean())
    mean, spread = coarse + (1 - exited) * (whole - coarse), (whole - coarse) * (exited * (1 - exited)) ** 0.5
    about = {"unit": unit, "budget": value, "mean": mean, "std": spread}
    return {"exit_threshold": threshold} | about | {"images": len(confidence)}


def _costs(model: Any, budget: str) -> tuple[float, str, Tensor]:
    """The budget, its unit, and in this unit the cost of an image with 0, 1, ..., C zoomed cells, float64 [C + 1]."""
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
    if value > costs[-1]:
        raise UsageError(
            f"--budget {budget}: above the {costs[-1]:g} {unit} of an image in which everything is zoomed; "
            "no threshold reaches it"
        )
    return value, unit, torch.tensor(costs, dtype=torch.float64)
