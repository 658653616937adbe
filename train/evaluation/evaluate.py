"""Evaluation of finished runs: accuracy beside tokens, multiply-adds and speed; zoomers against their teacher."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from zpipe.schemas.errors import UsageError, ZpipeError
from zpipe.schemas.progress import Progress, silent
from zpipe.train.checkpoint import Run, load_run
from zpipe.train.data.loader import RelevanceLoader
from zpipe.train.device import autocast, keep_freed_memory, resolve_device
from zpipe.train.evaluation.answers import Answers, read_classes, read_several
from zpipe.train.evaluation.calibrate import CalibrationConfig, calibrate
from zpipe.train.evaluation.costs import CostMeter
from zpipe.train.evaluation.inference import Answer, OpenRun, choose_run_source, eval_loader
from zpipe.train.evaluation.metrics import mae, mse, pointing_game, spearman, topk_overlap
from zpipe.train.evaluation.operating_points import EvalConfig, operating_points
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
from zpipe.train.models.operating_points import OperatingPoint
from zpipe.train.models.zoomer import Zoomer
from zpipe.train.scoring import check_grid

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
    loader = eval_loader(
        opened.preprocessing,
        shards,
        maps,
        batch_size=config.batch_size,
        data_workers=config.data_workers,
        missing=missing,
    )
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
        source = choose_run_source(opened, config.scores, loader.maps)
        points = operating_points(opened.model, source, config)
        ready = OpenRun(opened, source, device=config.device, precision=config.precision)
        measured = measure(ready, loader, points, answers_for(opened, loader, config), progress)
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
        UsageError: `classes` does not suit the model.
        ZpipeError: the file of labels is broken, see `read_several`.
    """
    num_classes: int = opened.model.num_classes  # type: ignore[assignment]  # a classifier has an int there
    classes = several = None
    if config.classes is not None:
        classes = read_classes(config.classes, opened.settings.get("classes") or [], loader.index.classes)
        if max(classes) >= num_classes:
            raise UsageError(f"--classes {config.classes}: class {max(classes)}; the model has {num_classes}")
    if config.labels is not None:
        several = read_several(config.labels, num_classes)
    return Answers(num_classes, classes, several)


def measure(
    opened: OpenRun,
    loader: RelevanceLoader,
    points: Sequence[OperatingPoint],
    answers: Answers,
    progress: Progress = silent,
) -> list[EvalRow]:
    """A row for every operating point, all of them judged on the same batches."""
    meters = [CostMeter(opened.model, point) for point in points]
    ranks: list[list[Tensor]] = [[] for _ in points]
    rates: list[list[float]] = [[] for _ in points]
    batches = len(loader)
    for number, batch in enumerate(loader):
        prepared = opened.prepare(batch)
        for place, point in enumerate(points):
            respond = partial(opened.respond, prepared, point)
            if number == 0:
                respond()  # the first call of a shape pays for allocation and the choice of kernels
            answer, seconds = _timed(respond, opened.device)
            ranks[place].append(answers.ranks(answer.logits, batch))
            rates[place].append(len(answer.logits) / seconds)
            meters[place].add(answer)
        progress("evaluate", number + 1, batches, top1=float((ranks[-1][-1] == 0).float().mean()))
    size = opened.run.preprocessing.image_size
    image = torch.zeros(1, 3, size, size, device=opened.device)
    source = opened.source
    about = {
        "scores": None if source is None else source.name,
        "gmacs_zoomer": 0.0 if source is None else source.macs(image) / 1e9,
        "precision": opened.precision,
        "parameters": sum(weight.numel() for weight in opened.model.parameters()),
    }
    return [
        EvalRow(**_metrics(point, torch.cat(found), speed, meter, image), **about)
        for point, found, speed, meter in zip(points, ranks, rates, meters, strict=True)
    ]


def _timed(function: Callable[[], Answer], device: torch.device) -> tuple[Answer, float]:
    """What the function returns, and the seconds that it took."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    begun = time.perf_counter()
    result = function()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return result, time.perf_counter() - begun


def _metrics(
    point: OperatingPoint, ranks: Tensor, rates: list[float], meter: CostMeter, image: Tensor
) -> dict[str, Any]:
    ranks = ranks[ranks >= 0]
    if not len(ranks):
        raise ZpipeError("no image of these shards has a label to be judged by; check --labels")
    top1 = float((ranks == 0).double().mean())
    low, middle, high = np.quantile(rates, (0.25, 0.5, 0.75)).tolist()
    return {
        "setting": point.name,
        "settings": dict(point.settings),
        "count": len(ranks),
        "top1": top1,
        "top1_interval": 1.96 * (top1 * (1 - top1) / len(ranks)) ** 0.5,
        "top5": float((ranks < 5).double().mean()),
        "tokens": meter.tokens(),
        "token_histogram": {str(length): images for length, images in meter.histogram().items()},
        "exited": meter.exited(),
        "gmacs": meter.macs(image) / 1e9,
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
    lowered = autocast(precision, device)
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
