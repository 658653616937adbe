"""The study of attribution methods: do better-judged maps make better Zoomers?

For each method its maps of the training shards, a Zoomer that learns from them, and a ZoomViT that zooms by this
Zoomer. The ZoomViTs are measured at the same budgets of zoomed cells, and so at equal multiply-adds. Two ZoomViTs
without a Zoomer are the controls: one zooms around the centre of the image, the other at random.

Trainings of one seed differ in the maps only: they share their first weights and the order of their images.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from zpipe.schemas.errors import UsageError, ZpipeError
from zpipe.schemas.manifest import read_manifest
from zpipe.schemas.relevance_store import OK
from zpipe.schemas.storage import as_path
from zpipe.train.checkpoint import Run, digest_zoomer, load_run
from zpipe.train.evaluation.evaluate import measure_zoomer, zoomer_results
from zpipe.train.evaluation.inference import Tally, trained_with
from zpipe.train.evaluation.judge import CONTROLS as JUDGE_CONTROLS
from zpipe.train.evaluation.judge import JudgeConfig, judge
from zpipe.train.evaluation.metrics import spearman
from zpipe.train.evaluation.results import Result, identity, metric_results
from zpipe.train.run_files import ZOOMER
from zpipe.train.studies.bench import Bench, MethodMaps, WantedMaps

CONTROLS = ("centre", "random")  # sources of scores that need no zoomer
AGREEMENT = "rank_correlation_with_top1"
LEAST_METHODS = 3  # the ranks of two always agree or disagree perfectly


@dataclass(frozen=True, kw_only=True)
class _Trained:
    """What was trained for a method, or for a control, with one seed."""

    source: str
    """The method, or the control."""
    zoomer: Path | None
    """The run of the zoomer; None for a control."""
    vit: Path
    """The run of the ZoomViT."""


def map_methods(bench: Bench) -> list[Result]:
    """Zoomers and ZoomViTs from the maps of several attribution methods, beside the metrics that judge the maps.

    Everything is trained before anything is measured, so that an interrupted study loses no more than a measurement.
    """
    model = bench.need_zoomvit()
    budgets = _budgets(bench)
    base = _own_zoomer(bench)
    if bench.method_maps is None:
        raise UsageError(
            f"study {bench.study}: nothing makes its maps; give StudyInputs.method_maps, or run zpipe study"
        )
    maps = bench.method_maps(
        WantedMaps(
            own=as_path(base.settings["maps"]),
            train=bench.train_shards(base),
            val=bench.shards,
            val_maps=bench.maps,
            out=bench.folder / "maps",
            # Other tars with equal keys have another name, as they may hold other images.
            val_name=f"val-{Tally(bench.loader(bench.opened)).digest[:8]}",
        )
    )
    bench.notes += maps.notes
    trained = _train_all(bench, base, maps)
    rows: list[Result] = []
    for done, each in enumerate(trained):
        bench.progress(f"{bench.study}: measured", done, len(trained))
        if each.zoomer is not None:
            rows += _measured_zoomer(bench, load_run(each.zoomer), each.source, maps.val[each.source])
        vit, is_control = load_run(each.vit), each.zoomer is None
        setting = {} if is_control else {"method": each.source}
        scores = each.source if is_control else "zoomer"
        rows += bench.measured(vit, setting, {"alphas": (), "budgets": budgets}, scores=scores)
    bench.progress(f"{bench.study}: measured", len(trained), len(trained))
    # A row's method and seed tell the trainings apart, so that the report can take the mean over the seeds.
    rows = [replace(row, run=identity(bench.opened, bench.study)["run"]) for row in rows]
    judged = _judged(bench, maps)
    agreements = agreement(rows, judged, model.coarse_grid**2)
    bench.notes += [*_standings(rows), _caution(len(maps.train))]
    return [*rows, *judged, *agreements]


def _budgets(bench: Bench) -> tuple[int | str, ...]:
    """The budgets to compare the ZoomViTs at.

    Raises:
        UsageError: thresholds were given, under which every model has its own cost.
    """
    if bench.config.evaluation.alphas:
        raise UsageError(f"--alphas: study {bench.study} compares models of equal cost; give --budgets")
    return bench.config.evaluation.budgets or bench.quarters()


def _own_zoomer(bench: Bench) -> Run:
    """The finished zoomer that the run was trained with, which says what it learned from.

    Raises:
        UsageError: the run has none, or another one lies in its place.
    """
    opened = bench.opened
    path = opened.settings.get("zoomer")
    if trained_with(opened) != "zoomer" or path is None:
        raise UsageError(
            f"{opened.path}: was trained with scores from {trained_with(opened)}; study {bench.study} needs a run of "
            "train-vit --zoomer"
        )
    base = load_run(Path(path))
    if base.kind != "zoomer" or "maps" not in base.settings:
        raise UsageError(f"{path}: doesn't say what maps it learned from; study {bench.study} needs a train-zoomer run")
    if opened.settings.get("zoomer_digest") not in (None, digest_zoomer(base.path)):
        raise UsageError(
            f"{path}: is another zoomer than the one that {opened.path} was trained with; put that one back, or "
            "train the ZoomViT again"
        )
    return base


def _train_all(bench: Bench, base: Run, maps: MethodMaps) -> list[_Trained]:
    """Train what is not trained yet, seed by seed."""
    steps = [(seed, source) for seed in bench.seeds for source in (*maps.train, *CONTROLS)]
    trained = []
    for done, (seed, source) in enumerate(steps):
        bench.progress(f"{bench.study}: trained", done, len(steps), next=source)
        if source in CONTROLS:
            vit = bench.variant(f"vit-{source}", seed, scores=source)
            trained.append(_Trained(source=source, zoomer=None, vit=vit.path))
            continue
        changes = _without_unusable(bench, source, base, maps.train[source])
        zoomer = bench.zoomer_variant(f"zoomer-{source}", seed, base, maps=maps.train[source], **changes)
        vit = bench.variant(f"vit-{source}", seed, zoomer=zoomer.path)
        trained.append(_Trained(source=source, zoomer=zoomer.path, vit=vit.path))
    bench.progress(f"{bench.study}: trained", len(steps), len(steps))
    return trained


def _without_unusable(bench: Bench, method: str, base: Run, store: Path) -> dict[str, Any]:
    """The change of settings that a store needs some of whose maps can't be used: a method may find nothing relevant.

    The setting of the zoomer at hand was chosen for the maps of its own method.
    """
    statuses = read_manifest(store).statuses
    lost = {status: count for status, count in statuses.items() if status != OK and count}
    if not lost or store == as_path(base.settings["maps"]) or base.settings.get("missing", "error") != "error":
        return {}
    counts = ", ".join(f"{count} {status}" for status, count in lost.items())
    note = f"{method}: its zoomers do without the images whose maps can't be used ({counts})"
    if note not in bench.notes:  # once for all seeds
        bench.notes.append(note)
    return {"missing": "skip"}


def _measured_zoomer(bench: Bench, zoomer: Run, method: str, store: Path) -> list[Result]:
    """The distance of a zoomer to the maps that it learned to predict."""
    loader = bench.loader(zoomer, missing="skip", maps=store)
    if not loader.sample_count:
        raise ZpipeError(f"{store}: has no map that can be used; leave {method} out of --methods")
    precision = bench.config.evaluation.precision
    row = measure_zoomer(zoomer, bench.images(loader), bench.device, precision=precision)
    return zoomer_results(row, bench.about(zoomer) | {"setting": {"method": method}})


def _judged(bench: Bench, maps: MethodMaps) -> list[Result]:
    """The metrics of `maps judge` for the maps of each method and for the controls, on the teacher."""
    if maps.teacher is None:
        return []
    evaluation = bench.config.evaluation
    config = JudgeConfig(
        classes=maps.classes,
        damaged=evaluation.damaged,
        join=evaluation.join,
        batch_size=evaluation.batch_size,
        data_workers=evaluation.data_workers,
        device=evaluation.device,
    )
    rows = judge(maps.teacher, bench.shards, list(maps.val.values()), config, progress=bench.progress)["rows"]
    about = {**maps.teacher.about, "study": bench.study}
    names = (*maps.val, *JUDGE_CONTROLS)
    return [
        result
        for name, row in zip(names, rows, strict=True)
        for result in metric_results(row, about | {"setting": {"maps": name}})
    ]


# -- what follows from the results -------------------------------------------------------------------------------------


def _means(rows: Sequence[Result], metric: str, *names: str) -> dict[tuple[Any, ...], float]:
    """The values of a metric by the settings `names`, as means over the seeds, of the rows that have these settings."""
    found = defaultdict(list)
    for row in rows:
        if row.metric == metric and all(name in row.setting for name in names):
            found[tuple(row.setting[name] for name in names)].append(row.value)
    return {key: fmean(values) for key, values in found.items()}


def _standings(rows: Sequence[Result]) -> list[str]:
    """For each budget a line with the top-1 of every ZoomViT, the best one first."""
    top1 = {(budget, name): value for (name, budget), value in _means(rows, "top1", "method", "budget").items()}
    by_source = _means(rows, "top1", "scores", "budget")
    top1 |= {(budget, name): value for (name, budget), value in by_source.items() if name in CONTROLS}
    seeds = len({row.seed for row in rows})
    lines = []
    for budget in dict.fromkeys(budget for budget, _ in top1):
        best_first = sorted(((value, name) for (of, name), value in top1.items() if of == budget), reverse=True)
        figures = ", ".join(f"{name} {100 * value:.1f} %" for value, name in best_first)
        lines.append(f"top-1 at budget {budget}, mean of {seeds} seed{'s' * (seeds > 1)}: {figures}")
    return lines


def _caution(methods: int) -> str:
    if methods < LEAST_METHODS:
        return f"rank correlations with top-1 are left out: they need {LEAST_METHODS} methods or more"
    return (
        f"rank correlations with top-1 are over {methods} methods only, so that chance alone makes large ones; of "
        "deletion, mse and mae, lower is better: there a negative one means that better maps go with a higher top-1"
    )


def agreement(rows: Sequence[Result], judged: Sequence[Result], cells: int) -> list[Result]:
    """Spearman's rank correlation over the methods of each metric of their maps and zoomers with top-1, by budget.

    Args:
        rows: the results of the ZoomViTs and zoomers, whose setting has the `method`.
        judged: those of the maps, whose setting `maps` is the method, or a control.
        cells: the cells of the ZoomViT; at budgets of none and of all of them, scores make no difference.

    Returns:
        A result per metric and budget, with the number of methods as n, of means over the seeds. None where the metric
        or the accuracy is the same for all methods, and none at all for fewer than `LEAST_METHODS` methods.
    """
    top1 = _means(rows, "top1", "method", "budget")
    methods = list(dict.fromkeys(method for method, _ in top1))
    if len(methods) < LEAST_METHODS:
        return []
    zoomers = [row for row in rows if row.model == ZOOMER]
    metrics = {("maps", row.metric): _means(judged, row.metric, "maps") for row in judged}
    metrics |= {("zoomer", row.metric): _means(zoomers, row.metric, "method") for row in zoomers}
    vit = next(row for row in rows if row.model != ZOOMER)
    about: dict[str, Any] = {"study": vit.study, "run": vit.run, "model": vit.model, "metric": AGREEMENT}
    results = []
    for budget in dict.fromkeys(budget for _, budget in top1):
        if budget in (0, cells):
            continue
        accuracy = _row(top1[method, budget] for method in methods)
        for (of, metric), values in metrics.items():
            if any((method,) not in values for method in methods):
                continue  # it is not finite for one of them
            correlation = float(spearman(_row(values[method,] for method in methods), accuracy))
            setting = {"metric": metric, "of": of, "budget": budget}
            if math.isfinite(correlation):
                results.append(Result(**about, n=len(methods), setting=setting, value=correlation))
    return results


def _row(values: Iterable[float]) -> Tensor:
    """Values as float64 [1, n], rounded: means of equal accuracies may differ in their last bits, and are no ranks."""
    return torch.tensor([list(values)], dtype=torch.float64).round(decimals=9)
