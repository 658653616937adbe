"""Studies of the zoom: threshold, factor, embedding, its choice in training, and pruning."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from zpipe.schemas.errors import UsageError
from zpipe.train.checkpoint import load_zoomer
from zpipe.train.evaluation.results import Result
from zpipe.train.fit.normalisation import check_normalisation
from zpipe.train.models.warm_start import zooming_twin
from zpipe.train.models.zoom_tokens import PRUNE_KINDS
from zpipe.train.studies.bench import PAPER_ALPHAS, Bench


def alpha_eta(bench: Bench) -> list[Result]:
    """Thresholds or budgets at both zoom factors (Table 9)."""
    model, rows = bench.need_zoomvit(), []
    max_zoomed = bench.vit_config().max_zoomed
    for eta in (2.0, 0.5):
        # The other factor has four times, or a quarter, as many cells, and so the budgets.
        times = 1.0 if eta == model.zoom_factor else 4.0 if eta == 2.0 else 0.25
        changes: dict[str, Any] = {"model_args": bench.vit_config().model_args | {"zoom_factor": eta}}
        if eta == model.zoom_factor:
            changes = {}
        elif max_zoomed is not None:
            changes["max_zoomed"] = round(max_zoomed * times)
        for seed in bench.seeds:
            opened = bench.variant(f"eta-{eta:g}", seed, **changes)
            rows += bench.measured(opened, {"eta": eta}, bench.sweep(times))
    return rows


def zfe(bench: Bench) -> list[Result]:
    """No zoom factor embedding, a fixed one and a soft one (Table 4)."""
    model = bench.need_zoomvit()
    rows = []
    for kind in ("none", "fixed", "soft"):
        changes: dict[str, Any] = {}
        if kind != model.zfe:
            changes = {"model_args": bench.vit_config().model_args | {"zfe": kind}}
        for seed in bench.seeds:
            rows += bench.measured(bench.variant(kind, seed, **changes), {"zfe": kind}, bench.sweep())
    return rows


def zoom_in_training(bench: Bench) -> list[Result]:
    """A random zoom for each training batch, or a fixed one (Table 3)."""
    model, rows = bench.need_zoomvit(), []
    if bench.vit_config().zoom_draw == "alpha":
        fixed: tuple[float, ...] = (0.03, 0.1)
    else:
        max_zoomed = bench.vit_config().max_zoomed or model.coarse_grid**2
        fixed = (round(max_zoomed / 2), max_zoomed)
    for value in (None, *fixed):
        label = "random" if value is None else f"fixed-{value:g}"
        for seed in bench.seeds:
            opened = bench.variant(label, seed, fixed_zoom=value)
            rows += bench.measured(opened, {"zoom in training": label}, bench.sweep())
    return rows


def pruning(bench: Bench) -> list[Result]:
    """Pruning the highest or the lowest tokens first, of all, of the zoomed ones or of the rest (Table 5, Fig. 6)."""
    model = bench.need_zoomvit()
    sweep = bench.sweep()
    alphas, budgets = sweep["alphas"], sweep["budgets"]
    most_zoomed = {"alphas": alphas[-1:], "budgets": budgets[-1:]}
    longest = model.coarse_grid**2 + 3 * (budgets[-1] if budgets else model.coarse_grid**2)
    keeps = tuple(sorted({max(1, round(longest * share_kept)) for share_kept in (0.25, 0.4, 0.55, 0.7, 0.85)}))
    kinds = ({"keeps": keeps, "prune": kind} for kind in PRUNE_KINDS)
    return bench.measured(bench.opened, {}, *(most_zoomed | kind for kind in kinds))


def test_time_zoom(bench: Bench) -> list[Result]:
    """A plain ViT that zooms at test time, without training (Table 13)."""
    if bench.zoomer is None:
        raise UsageError("study test-time-zoom: give --zoomer RUN, whose scores a plain ViT is to zoom by")
    zoomer, wanted = load_zoomer(bench.zoomer)
    check_normalisation(wanted, bench.opened.preprocessing.mean, bench.opened.preprocessing.std)
    size = bench.opened.preprocessing.image_size
    try:
        twins = {eta: zooming_twin(bench.opened.model, size, eta) for eta in (2.0, 0.5)}
    except ValueError as error:
        raise UsageError(f"{bench.opened.path}: study test-time-zoom: {error}") from error
    rows = bench.measured(bench.opened, {"zoom": "none"}, {"alphas": (), "budgets": ()})
    evaluation = bench.config.evaluation
    alphas = evaluation.alphas or (() if evaluation.budgets else PAPER_ALPHAS)
    for eta, twin in twins.items():
        rows += bench.measured(
            replace(bench.opened, model=twin),
            {"zoom": "at test time", "eta": eta},
            {"alphas": alphas, "budgets": evaluation.budgets},
            scores="zoomer",
            zoomer=zoomer,
        )
    return rows
