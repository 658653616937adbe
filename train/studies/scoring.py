"""Studies of the scores: their source, the zoomer's depth, and the selection of models of two stages."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch

from zpipe.schemas.errors import UsageError
from zpipe.train.checkpoint import load_run, load_zoomer
from zpipe.train.evaluation.evaluate import measure_zoomer, zoomer_results
from zpipe.train.evaluation.inference import trained_with
from zpipe.train.evaluation.results import Result
from zpipe.train.macs import count_macs
from zpipe.train.studies.bench import Bench


def score_sources(bench: Bench) -> list[Result]:
    """Every source of scores, both in evaluation only and in training (Table 11)."""
    bench.need_zoomvit()
    own = bench.vit_config().scores or ("zoomer" if bench.opened.zoomer is not None else "maps")
    rows: list[Result] = []
    for name in ("zoomer", "maps", "attention", "entropy", "centre", "random"):
        if name == "zoomer" and bench.opened.zoomer is None:
            bench.notes.append("zoomer: left out, the run has none")
            continue
        if name == "maps" and bench.maps is None:
            bench.notes.append("maps: left out, without --maps")
            continue
        rows += bench.measured(bench.opened, {"trained with": own}, bench.sweep(), scores=name)
        if name in ("zoomer", "maps") and name != own:
            bench.notes.append(f"{name}: in evaluation only; the run was trained with {own}")
            continue
        if name == own and not bench.config.seeds:
            continue
        changes: dict[str, Any] = {} if name == own else {"scores": name}
        for seed in bench.seeds:
            opened = bench.variant(name, seed, **changes)
            if opened is not bench.opened:
                rows += bench.measured(opened, {"trained with": name}, bench.sweep(), scores=name)
    return rows


def zoomer_depth(bench: Bench) -> list[Result]:
    """Zoomers of 2, 4 and 6 residual blocks: distance to the teacher, cost, and accuracy of a ViT with their scores."""
    if bench.maps is None:
        raise UsageError("study zoomer-depth: zoomers are measured against their teacher's maps; give --maps")
    vit = bench.opened if bench.opened.kind == "vit" else None
    if vit is not None:
        bench.need_zoomvit()
        if vit.settings.get("zoomer") is None:
            raise UsageError(f"{vit.path}: was trained without a zoomer; give a zoomer's run, or one that has one")
    base = load_run(Path(vit.settings["zoomer"])) if vit is not None else bench.opened
    rows: list[Result] = []
    for blocks in (2, 4, 6):
        for seed in bench.seeds:
            opened = bench.zoomer_variant(f"blocks-{blocks}", seed, base, num_blocks=blocks)
            size = opened.preprocessing.image_size
            loader = bench.loader(opened, missing="skip")
            row = measure_zoomer(
                opened, bench.images(loader), bench.device, precision=bench.config.evaluation.precision
            )
            about = bench.about(opened) | {"setting": {"blocks": blocks}}
            rows += zoomer_results(row, about)
            image = torch.zeros(1, 3, size, size, device=bench.device)
            macs = count_macs(partial(opened.model, image))
            weights = sum(weight.numel() for weight in opened.model.parameters())
            about["setting"] |= {"precision": row["precision"]} if "precision" in row else {}
            rows.append(Result(**about, metric="gmacs", n=1, value=macs / 1e9))
            rows.append(Result(**about, metric="parameters", n=1, value=weights))
            if vit is not None:
                zoomer, _ = load_zoomer(opened.path)
                measured = bench.measured(vit, about["setting"], bench.sweep(), scores="zoomer", zoomer=zoomer)
                rows += [each for each in measured if each.metric != "parameters"]  # above are those of the zoomer
    return rows


def selection(bench: Bench) -> list[Result]:
    """What the second stage of a CF-ViT or LF-ViT refines."""
    model: Any = bench.opened.model
    if not hasattr(model, "SELECTIONS"):
        raise UsageError(f"{bench.opened.path}: study selection needs a cfvit_* or lfvit_* run")
    if trained_with(bench.opened) != "own":
        raise UsageError(f"{bench.opened.path}: study selection compares how the model chooses by itself")
    rows: list[Result] = []
    for name in model.SELECTIONS:
        changes: dict[str, Any] = {}
        if name != model.selection:
            changes = {"model_args": bench.vit_config().model_args | {"selection": name}}
        for seed in bench.seeds:
            rows += bench.measured(bench.variant(name, seed, **changes), {"selection": name}, bench.sweep())
    return rows
