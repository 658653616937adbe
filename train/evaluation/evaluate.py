"""Evaluation of finished runs: accuracy beside tokens, multiply-adds and speed; zoomers against their teacher."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from zpipe.schemas.errors import UsageError, ZpipeError
from zpipe.schemas.progress import Progress, silent
from zpipe.train.checkpoint import Preprocessing, Run, load_run
from zpipe.train.data.loader import RelevanceLoader
from zpipe.train.device import autocast_of, keep_freed_memory, resolve_device
from zpipe.train.evaluation.answers import Answers, read_classes, read_several
from zpipe.train.evaluation.calibrate import CalibrationConfig, calibrate
from zpipe.train.evaluation.metrics import mae, mse, pointing_game, spearman, topk_overlap
from zpipe.train.evaluation.operating_points import (
    Cost,
    EvalConfig,
    ExitCost,
    Mode,
    choose_run_source,
    cost_of,
    eval_loader,
    forward,
    logits_of,
    modes_asked,
)
from zpipe.train.evaluation.results import (
    EVALUATION,
    ZOOMER_EVALUATION,
    EvalRow,
    Result,
    identity,
    metric_results,
    results_of,
    unusual,
    write_results,
)
from zpipe.train.models.zoomer import Zoomer
from zpipe.train.scoring import ScoreSource, check_grid

__all__ = ["EvalConfig", "EvalRow", "answers_for", "evaluate", "measure", "measure_zoomer"]


def evaluate(
    run: Path,
    shards: Path,
    config: EvalConfig,
    *,
    maps: Path | None = None,
    out: Path | None = None,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Evaluate a finished run on shards, each sample once, in the centre crop that the run was made for.

    Args:
        run: the run's folder.
        shards: the images.
        config: what to measure, and how.
        maps: the relevance store of these shards; a zoomer needs it.
        out: the JSON file to write; None to write none.
        progress: called once per batch.

    Returns:
        What the file holds, see `results`: {kind, run, model, seed, weights, precision, shards, maps, rows, results}.
        The rows of a ViT are those of `EvalRow.flat`; a zoomer has one row, its distance to the teacher's maps.

    Raises:
        UsageError: the run is not finished, or a setting does not suit it.
        ZpipeError: a file is broken, or a label is outside the model's classes.
    """
    opened = load_run(run, config.weights)
    missing = "skip" if opened.kind == "zoomer" else "uniform"
    loader = eval_loader(opened.preprocessing, shards, maps, config.batch_size, config.data_workers, missing)
    device = resolve_device(config.device)
    if device.type == "cpu":
        keep_freed_memory()
    about = identity(opened, EVALUATION if opened.kind == "vit" else ZOOMER_EVALUATION)
    about["setting"] = unusual({"weights": config.weights})
    for name, value in (("classes", config.classes), ("labels", config.labels)):
        about["setting"] |= {} if value is None else {name: Path(value).name}
    rows: list[dict[str, Any]]
    if opened.kind == "zoomer":
        if loader.maps is None:
            raise UsageError(f"{run}: a zoomer is measured against its teacher's maps; give --maps")
        check_grid(loader.maps, cast(Zoomer, opened.model).grid)
        rows = [measure_zoomer(opened, loader, device, progress, config.precision)]
        results = zoomer_results(rows[0], about)
    else:
        if config.target_gmacs is not None:
            config = _calibrated(run, config, progress)
        source = choose_run_source(opened, config, loader.maps)
        modes = modes_asked(opened.model, source, config)
        answers = answers_for(opened, loader, config)
        measured = measure(
            opened.model, opened.preprocessing, loader, source, modes, answers, device, progress, config.precision
        )
        rows = [row.flat() for row in measured]
        results = [result for row in measured for result in results_of(row, about)]
    stated = {"kind": opened.kind, "run": str(run), "model": about["model"], "seed": about["seed"]}
    stated |= {"weights": config.weights, "precision": config.precision}
    stated |= {"shards": str(shards), "maps": None if maps is None else str(maps)}
    return write_results(out, "evaluation", stated, rows, results)


def _calibrated(run: Path, config: EvalConfig, progress: Progress) -> EvalConfig:
    """The config with the threshold at which an image of the calibration shards costs `target_gmacs` on average."""
    if config.calibration is None:
        raise UsageError("--target-gmacs: give --calibration SHARDS, images to choose the threshold by")
    wanted = CalibrationConfig(
        budget=f"{config.target_gmacs:g} GMACs",
        scores=config.scores,
        weights=config.weights,
        batch_size=config.batch_size,
        data_workers=config.data_workers,
        device=config.device,
    )
    result = calibrate(run, config.calibration, wanted, maps=config.calibration_maps, progress=progress)
    if "exit_threshold" in result:
        return replace(config, exits=(result["exit_threshold"],))
    return replace(config, alphas=(result["alpha"],), budgets=())


def answers_for(opened: Run, loader: RelevanceLoader, config: EvalConfig) -> Answers:
    """Which answers are right for a run on these shards.

    Raises:
        UsageError: both `classes` and `labels` are given, or `classes` does not suit the model.
        ZpipeError: the file of labels is broken, see `read_several`.
    """
    if config.classes is not None and config.labels is not None:
        raise UsageError("--classes, --labels: give one of them; the file of labels is in the model's numbering")
    num_classes: int = opened.model.num_classes  # type: ignore[assignment]  # a classifier has an int there
    classes = several = None
    if config.classes is not None:
        classes = read_classes(config.classes, opened.settings.get("classes") or [], loader.index.classes)
        if max(classes) >= num_classes:
            raise UsageError(f"--classes {config.classes}: class {max(classes)}; the model has {num_classes}")
    if config.labels is not None:
        several = read_several(config.labels, num_classes)
    return Answers(num_classes, classes, several)


@torch.inference_mode()
def measure(
    model: nn.Module,
    preprocessing: Preprocessing,
    loader: RelevanceLoader,
    source: ScoreSource | None,
    modes: list[Mode],
    answers: Answers,
    device: torch.device,
    progress: Progress = silent,
    precision: str = "float32",
) -> list[EvalRow]:
    """A row for every mode, all of them measured on the same batches.

    Raises:
        UsageError: the precision is unknown.
    """
    lowered = autocast_of(precision, device)
    model = model.to(device)
    if source is not None and source.zoomer is not None:
        source.zoomer.to(device)
    costs = [cost_of(model, mode) for mode in modes]
    ranks: list[list[Tensor]] = [[] for _ in modes]
    rates: list[list[float]] = [[] for _ in modes]
    batches = len(loader)
    for number, batch in enumerate(loader):
        images = preprocessing.normalise(batch["image"].to(device))
        for place, mode in enumerate(modes):
            call = partial(forward, model, source, images, batch, mode)
            with lowered():
                if number == 0:
                    call()  # the first call of a shape pays for allocation and kernel choice
                (answer, scores), seconds = _timed(call, device)
            ranks[place].append(answers.ranks(logits_of(answer), batch))
            rates[place].append(len(images) / seconds)
            costs[place].add(answer, scores)
        progress("evaluate", number + 1, batches, top1=float((ranks[-1][-1] == 0).float().mean()))
    image = torch.zeros(1, 3, preprocessing.image_size, preprocessing.image_size, device=device)
    told: dict[str, Any] = {"scores": None, "gmacs_zoomer": 0.0}
    if source is not None:
        told = {"scores": source.name, "gmacs_zoomer": source.macs(image) / 1e9}
    told["precision"] = precision
    told["parameters"] = sum(weight.numel() for weight in model.parameters())
    return [
        EvalRow(**_figures(mode, torch.cat(found), speed, cost, image), **told)
        for mode, found, speed, cost in zip(modes, ranks, rates, costs, strict=True)
    ]


def _timed(forward: Callable[[], Any], device: torch.device) -> tuple[Any, float]:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    begun = time.perf_counter()
    result = forward()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return result, time.perf_counter() - begun


def _figures(mode: Mode, ranks: Tensor, rates: list[float], cost: Cost, image: Tensor) -> dict[str, Any]:
    ranks = ranks[ranks >= 0]
    if not len(ranks):
        raise ZpipeError("no image of these shards has a label to be judged by; check --labels")
    top1 = float((ranks == 0).double().mean())
    low, middle, high = np.quantile(rates, (0.25, 0.5, 0.75)).tolist()
    return {
        "setting": mode.name,
        "settings": mode.asked,
        "count": len(ranks),
        "top1": top1,
        "top1_interval": 1.96 * (top1 * (1 - top1) / len(ranks)) ** 0.5,
        "top5": float((ranks < 5).double().mean()),
        "tokens": cost.tokens(),
        "token_histogram": {str(length): times for length, times in cost.histogram().items()},
        "exited": cost.exit_share() if isinstance(cost, ExitCost) else None,
        "gmacs": cost.macs(image) / 1e9,
        "images_per_s": middle,
        "images_per_s_low": low,
        "images_per_s_high": high,
    }


@torch.inference_mode()
def measure_zoomer(
    opened: Run,
    loader: RelevanceLoader,
    device: torch.device,
    progress: Progress = silent,
    precision: str = "float32",
) -> dict[str, Any]:
    """Measure how far a zoomer's scores are from its teacher's maps.

    Returns:
        {setting, count, metrics}: means over images of the distances of Table 2, the rank correlation and the overlap
        of the highest cells; with object boxes also the pointing game of zoomer and teacher. `precision` is there if it
        is not float32.

    Raises:
        UsageError: the precision is unknown.
    """
    lowered = autocast_of(precision, device)
    zoomer = cast(Zoomer, opened.model).to(device)
    sums: dict[str, float] = defaultdict(float)
    count = with_box = ranked = 0
    batches = len(loader)
    for number, batch in enumerate(loader):
        with lowered():
            scores = zoomer(opened.preprocessing.normalise(batch["image"].to(device))).float().cpu()  # [B, g * g]
        target = batch["relevance"].flatten(1)  # [B, g * g]
        sums["mse"] += float(mse(scores, target).sum())
        sums["mae"] += float(mae(scores, target).sum())
        sums["top10_overlap"] += float(topk_overlap(scores, target, max(1, target.shape[1] // 10)).sum())
        correlation = spearman(scores, target)
        sums["rank_correlation"] += float(correlation.nansum())
        ranked += int(correlation.isfinite().sum())
        count += len(target)
        if "object_box" in batch:
            boxes = batch["object_box"]
            side = zoomer.grid
            sums["pointing_game"] += int(pointing_game(scores.view(-1, side, side), boxes).sum())
            sums["teacher_pointing_game"] += int(pointing_game(batch["relevance"], boxes).sum())
            sums["box_share"] += float(((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])).sum())
            with_box += len(boxes)
        progress("evaluate", number + 1, batches, mse=sums["mse"] / count)
    divisor = {"mse": count, "mae": count, "top10_overlap": count, "rank_correlation": ranked}
    means = {name: value / divisor.get(name, with_box) for name, value in sums.items() if divisor.get(name, with_box)}
    return {"setting": "zoomer", "count": count} | unusual({"precision": precision}) | means


def zoomer_results(row: dict[str, Any], about: dict[str, Any]) -> list[Result]:
    """The row of `measure_zoomer` as results; about: as of `results_of`."""
    precision = {"precision": row["precision"]} if "precision" in row else {}
    return metric_results(row, about | {"setting": about.get("setting", {}) | precision})
