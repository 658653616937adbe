"""What a finished run is worth: accuracy against tokens, multiply-adds and measured speed; maps against their teacher."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from zpipe.schemas.atomic import write_json
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
from zpipe.train.models.operating_points import OperatingPoint
from zpipe.train.scoring import check_grid

__all__ = ["EvalConfig", "EvalRow", "answers_for", "evaluate", "measure", "measure_zoomer"]


@dataclass(frozen=True, kw_only=True)
class EvalRow:
    """One setting's figures.

    scores, alpha, budget, keep, prune, exit, merge: the setting; None where it has none. count: images judged. top1_interval:
    half width of the 95 % interval (normal approximation). tokens: mean sequence length an image, class token not counted
    (see `modes.Cost`); None for a model without patches. token_histogram: images by sequence length, where it varies.
    exited: share of images that the first of two stages answered. gmacs: 1e9 multiply-adds an image of the ViT; gmacs_zoomer: those of
    the zoomer (or another source of scores) beside it. images_per_s: median over batches, after a warm-up, of both together;
    low and high are its quartiles. parameters: weights of the ViT. precision: as of `EvalConfig`.
    """

    setting: str
    scores: str | None = None
    alpha: float | None = None
    budget: int | str | None = None
    keep: int | None = None
    prune: str | None = None
    exit: float | None = None
    merge: int | None = None
    count: int
    top1: float
    top1_interval: float
    top5: float
    tokens: float | None
    token_histogram: dict[str, int]
    exited: float | None
    gmacs: float
    gmacs_zoomer: float
    images_per_s: float
    images_per_s_low: float
    images_per_s_high: float
    parameters: int
    precision: str = "float32"


def evaluate(
    run: Path,
    shards: Path,
    config: EvalConfig,
    *,
    maps: Path | None = None,
    out: Path | None = None,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Evaluate a finished run on shards; returns, and writes as JSON to `out` when given, {kind, run, model, seed, shards, maps, rows}.

    Every sample is counted once, on the centre crop that the run was made for. A ViT's rows are `EvalRow`s; a zoomer has
    one row with its distance to the teacher's maps (needs `maps`). Errors: :class:`UsageError`, :class:`ZpipeError`.
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
    if opened.kind == "zoomer":
        if loader.maps is None:
            raise UsageError(f"{run}: a zoomer is measured against its teacher's maps; give --maps")
        check_grid(loader.maps, opened.model.grid)
        rows = [measure_zoomer(opened, loader, device, progress, config.precision)]
    else:
        if config.target_gmacs is not None:
            config = _calibrated(run, config, progress)
        source = choose_run_source(opened, config.scores, loader.maps)
        points = operating_points(opened.model, source, config)
        ready = OpenRun(opened, source, device=config.device, precision=config.precision)
        measured = measure(ready, loader, points, answers_for(opened, loader, config), progress)
        rows = [asdict(row) for row in measured]
    about = {"kind": opened.kind, "run": str(run), "model": opened.settings.get("model", opened.kind)}
    about |= {} if config.weights == "final" else {"weights": config.weights}
    about["seed"] = opened.settings.get("train", {}).get("seed")
    result = about | {"shards": str(shards), "maps": None if maps is None else str(maps), "rows": rows}
    if out is not None:
        write_json(out, result)
    return result


def _calibrated(run: Path, config: EvalConfig, progress: Progress) -> EvalConfig:
    """With the threshold at which an image costs `target_gmacs` on average over the calibration shards."""
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
    found = calibrate(run, config.calibration, wanted, maps=config.calibration_maps, progress=progress)
    if "exit_threshold" in found:
        return replace(config, exits=(found["exit_threshold"],))
    return replace(config, alphas=(found["alpha"],), budgets=())


def answers_for(opened: Run, loader: RelevanceLoader, config: EvalConfig) -> Answers:
    """What is right for a run on these shards. Errors: as of `read_classes` and `read_several`."""
    number = opened.model.num_classes
    classes = several = None
    if config.classes is not None:
        classes = read_classes(config.classes, opened.settings.get("classes") or [], loader.index.classes)
        if max(classes) >= number:
            raise UsageError(f"--classes {config.classes}: class {max(classes)}; the model has {number}")
    if config.labels is not None:
        several = read_several(config.labels, number)
    return Answers(number, classes, several)


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
        **point.settings,
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
    """Means over images of the distance between zoomer and teacher; with object boxes, the pointing game of both.

    Errors: :class:`UsageError` for an unknown precision.
    """
    lowered = autocast(precision, device)
    zoomer = opened.model.to(device)
    sums: Counter[str] = Counter()
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
    row = {name: value / divisor.get(name, with_box) for name, value in sums.items() if divisor.get(name, with_box)}
    told = {} if precision == "float32" else {"precision": precision}
    return {"setting": "zoomer", "count": count} | told | row
