"""Evaluation of finished runs: accuracy, tokens, multiply-adds and speed; for a zoomer, the distance to its teacher."""

from __future__ import annotations

import re
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
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
from zpipe.train.device import autocast, keep_freed_memory, resolve_device, to_device
from zpipe.train.evaluation.answers import BY_INDEX, BY_NAME, Answers, match_run, read_several
from zpipe.train.evaluation.calibrate import CalibrationConfig, calibrate
from zpipe.train.evaluation.costs import CostMeter
from zpipe.train.evaluation.inference import Answer, OpenRun, Tally, choose_run_source, eval_loader
from zpipe.train.evaluation.localisation import pointing_game
from zpipe.train.evaluation.metrics import check_numbers, mae, mse, spearman, topk_overlap
from zpipe.train.evaluation.operating_points import EvalConfig, operating_points, option_of
from zpipe.train.evaluation.results import (
    EVALUATION,
    ZOOMER_EVALUATION,
    EvalRow,
    Result,
    identity,
    metric_results,
    read_results,
    results_of,
    results_path,
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
        The content of the file, see `results`: {kind, run, model, seed, weights, precision, shards, maps, rows,
        results}, and what `Tally.stated` says of the images. The rows of a ViT are those of `EvalRow.flat`; a zoomer
        has one row, its distance to the teacher's maps.

    Raises:
        UsageError: the run is not finished, or a setting does not suit it.
        ZpipeError: a file is broken, or a label is outside the model's classes.
    """
    opened = load_run(run, config.weights)
    loader = eval_loader(
        opened.preprocessing,
        shards,
        maps,
        batch_size=config.batch_size,
        data_workers=config.data_workers,
        missing="skip" if opened.kind == "zoomer" else "uniform",
        damaged=config.damaged,
        join=config.join,
    )
    loader.report_coverage(progress)
    batches = Tally(loader)
    about = identity(opened, EVALUATION if opened.kind == "vit" else ZOOMER_EVALUATION)
    about["setting"] = unusual({"weights": config.weights})
    for name, value in (("classes", config.classes), ("labels", config.labels)):
        about["setting"] |= {} if value is None else {name: Path(value).name}
    if opened.kind == "zoomer":
        row = _evaluate_zoomer(opened, batches, config, progress)
        rows, results = [row], zoomer_results(row, about)
    else:
        measured = _evaluate_vit(opened, batches, config, progress)
        rows = [row.flat() for row in measured]
        results = [result for row in measured for result in results_of(row, about)]
    stated = {"kind": opened.kind, "run": str(run), "model": about["model"], "seed": about["seed"]}
    stated |= {"weights": config.weights, "precision": config.precision}
    stated |= {"shards": str(shards), "maps": None if maps is None else str(maps)} | batches.stated()
    return write_results(out, "evaluation", stated, rows, results)


def evaluation_path(run: Path, config: EvalConfig, content: Mapping[str, Any]) -> Path:
    """The file in a run's folder for the content of an evaluation.

    It is `evaluation.json` for the run as it is, on the images that were first evaluated. What was asked for besides
    (other scores, classes or labels, a cost) and other images are part of other names, so that one evaluation does not
    take the place of another.

    Raises:
        ZpipeError: the file holds no results.
    """
    target = None if config.target_gmacs is None else f"{config.target_gmacs:g} GMACs"
    asked = (config.scores, config.classes, None if config.labels is None else config.labels.name, target)
    words = [re.sub(r"[^A-Za-z0-9.]+", "-", Path(word).name.removesuffix(".json")) for word in asked if word]
    path = partial(results_path, run, "evaluation", weights=config.weights, precision=config.precision)
    if not (first := path(more=words)).is_file():
        return first
    before, _ = read_results(first)
    # Files of earlier versions have no digest.
    name = "images_digest" if "images_digest" in before else "shards"
    return first if before.get(name) == content[name] else path(more=[*words, content["images_digest"][:8]])


def _evaluate_vit(opened: Run, batches: Tally, config: EvalConfig, progress: Progress) -> list[EvalRow]:
    if config.target_gmacs is None:
        if config.calibration is not None or config.calibration_maps is not None:
            raise UsageError("--calibration: is for --target-gmacs; give that too, or leave it out")
    elif config.alphas or config.budgets or config.exits:
        raise UsageError("--target-gmacs: chooses the threshold itself; leave out --alphas, --budgets and --exits")
    answers = answers_for(opened, batches.loader, config)
    if config.target_gmacs is not None:
        config = _calibrated(opened.path, config, progress)
    source = choose_run_source(opened, config.scores, batches.loader.maps)
    points = operating_points(opened.model, source, config)
    ready = OpenRun(opened, source, device=config.device, precision=config.precision)
    return measure(ready, batches, points, answers, progress)


def _evaluate_zoomer(opened: Run, batches: Tally, config: EvalConfig, progress: Progress) -> dict[str, Any]:
    given: dict[str, object] = {option_of(name): values for name, values in config.requested().items()}
    given |= {"--target-gmacs": config.target_gmacs, "--calibration": config.calibration, "--scores": config.scores}
    given |= {"--classes": config.classes, "--labels": config.labels}
    for option, value in given.items():
        if value is not None:
            raise UsageError(f"{option}: {opened.path} is a zoomer, which has no use for it; leave it out")
    maps = batches.loader.maps
    if maps is None:
        raise UsageError(f"{opened.path}: a zoomer is measured against its teacher's maps; give --maps")
    check_grid(maps, cast(Zoomer, opened.model).grid)
    device = resolve_device(config.device)
    if device.type == "cpu":
        keep_freed_memory()
    return measure_zoomer(opened, batches, device, progress, config.precision)


def _calibrated(run: Path, config: EvalConfig, progress: Progress) -> EvalConfig:
    """The config with the threshold at which an image of the calibration shards costs `target_gmacs` on average."""
    if config.calibration is None:
        raise UsageError("--target-gmacs: give --calibration SHARDS, images to choose the threshold by")
    calibration = CalibrationConfig(
        budget=f"{config.target_gmacs:g} GMACs",
        scores=config.scores,
        # A file is about the labels of the other shards.
        classes=config.classes if config.classes in (None, BY_NAME) and config.labels is None else BY_INDEX,
        damaged=config.damaged,
        join=config.join,
        weights=config.weights,
        batch_size=config.batch_size,
        data_workers=config.data_workers,
        device=config.device,
    )
    try:
        result = calibrate(run, config.calibration, calibration, maps=config.calibration_maps, progress=progress)
    except UsageError as error:  # in the words of this command
        raise UsageError(str(error).replace("--budget", "--target-gmacs", 1)) from error
    if "exit_threshold" in result:
        return replace(config, exits=(result["exit_threshold"],))
    return replace(config, alphas=(result["alpha"],), budgets=())


def answers_for(opened: Run, loader: RelevanceLoader, config: EvalConfig) -> Answers:
    """The right answers of a run on these shards.

    Raises:
        UsageError: `classes` does not suit the model.
        ZpipeError: the classes of run and shards differ, or the file of labels is broken, see `read_several`.
    """
    num_classes = cast(int, opened.model.num_classes)
    if config.labels is not None:  # instead of the labels of the shards, whatever these number
        return Answers(num_classes, several=read_several(config.labels, num_classes))
    return Answers(num_classes, match_run(opened, loader.index, loader.path, config.classes))


def measure(
    opened: OpenRun,
    samples: Tally,
    points: Sequence[OperatingPoint],
    answers: Answers,
    progress: Progress = silent,
) -> list[EvalRow]:
    """Measure a run at operating points, all of them on the same batches.

    Args:
        opened: the run.
        samples: the images.
        points: the operating points.
        answers: which answers are right.
        progress: called once per batch.

    Returns:
        A row for each operating point.

    Raises:
        ZpipeError: a label is outside the model's classes, or no sample has a label.
    """
    tallies = [_Measured(point, CostMeter(opened.model, point)) for point in points]
    batches = len(samples.loader)
    for number, batch in enumerate(samples):
        prepared = opened.prepare(batch)
        for tally in tallies:
            respond = partial(opened.respond, prepared, tally.point)
            if number == 0:
                respond()  # the first call with a shape pays for allocation and the choice of kernels
            answer, seconds = _timed(respond, opened.device)
            tally.ranks.append(answers.ranks(answer.logits, batch))
            tally.rates.append(len(answer.logits) / seconds)
            tally.cost.add(answer)
        progress("evaluate", number + 1, batches, top1=float((tallies[-1].ranks[-1] == 0).float().mean()))
    size = opened.run.preprocessing.image_size
    image = torch.zeros(1, 3, size, size, device=opened.device)
    score_macs = 0 if opened.source is None else opened.source.macs(image)
    return [_row(opened, tally, image, score_macs) for tally in tallies]


@dataclass
class _Measured:
    """What is collected at an operating point, batch by batch."""

    point: OperatingPoint
    cost: CostMeter
    ranks: list[Tensor] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)  # images/s


def _timed(function: Callable[[], Answer], device: torch.device) -> tuple[Answer, float]:
    """The result of a function, and the seconds that it took."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    begin = time.perf_counter()
    result = function()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return result, time.perf_counter() - begin


def _row(opened: OpenRun, tally: _Measured, image: Tensor, score_macs: int) -> EvalRow:
    ranks = torch.cat(tally.ranks)
    ranks = ranks[ranks >= 0]
    if not len(ranks):
        raise ZpipeError(
            f"{opened.run.path}: --labels has no class for any image of these shards; check that it is of these images"
        )
    top1 = float((ranks == 0).double().mean())
    low, middle, high = np.quantile(tally.rates, (0.25, 0.5, 0.75)).tolist()
    return EvalRow(
        setting=tally.point.name,
        scores=None if opened.source is None else opened.source.name,
        settings=dict(tally.point.settings),
        count=len(ranks),
        top1=top1,
        top1_interval=1.96 * (top1 * (1 - top1) / len(ranks)) ** 0.5,
        top5=float((ranks < 5).double().mean()),
        tokens=tally.cost.tokens(),
        token_histogram={str(length): images for length, images in tally.cost.histogram().items()},
        exited=tally.cost.exited(),
        gmacs=tally.cost.macs(image) / 1e9,
        gmacs_zoomer=score_macs / 1e9,
        images_per_s=middle,
        images_per_s_low=low,
        images_per_s_high=high,
        parameters=sum(weight.numel() for weight in opened.model.parameters()),
        precision=opened.precision,
    )


@torch.inference_mode()
def measure_zoomer(
    opened: Run,
    samples: Tally,
    device: torch.device,
    progress: Progress = silent,
    precision: str = "float32",
) -> dict[str, Any]:
    """Measure the distance of a zoomer's scores to its teacher's maps.

    Args:
        opened: the zoomer's run.
        samples: the images with their maps.
        device: where to run.
        progress: called once per batch.
        precision: of the zoomer: float32, or bf16 or fp16 under autocast.

    Returns:
        {setting, count, metrics}: means over images of the distances of Table 2, the rank correlation and the overlap
        of the highest cells; with object boxes also the pointing game of zoomer and teacher. There is a `precision`
        unless it is float32.

    Raises:
        UsageError: the precision is unknown.
    """
    autocasting = autocast(precision, device)
    zoomer = cast(Zoomer, opened.model).to(device)
    sums: dict[str, float] = defaultdict(float)
    count = with_box = ranked = 0
    batches = len(samples.loader)
    where = str(opened.path) if precision == "float32" else f"{opened.path} in {precision}"
    for number, batch in enumerate(samples):
        with autocasting():
            images = opened.preprocessing.normalise(to_device(batch["image"], device))
            scores = zoomer(images).float().cpu()  # [B, g * g]
        check_numbers(scores, batch["key"], "the zoomer's scores", where=where)
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
    """Convert the row of `measure_zoomer` to results; `about` as in `results_of`."""
    precision = {"precision": row["precision"]} if "precision" in row else {}
    return metric_results(row, about | {"setting": about.get("setting", {}) | precision})
