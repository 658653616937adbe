"""What a finished run is worth: accuracy against tokens, multiply-adds and measured speed; maps against their teacher."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from zpipe.schemas.atomic import write_json
from zpipe.schemas.errors import UsageError
from zpipe.schemas.progress import Progress, silent
from zpipe.schemas.relevance_maps import RelevanceMaps
from zpipe.train.checkpoint import Preprocessing, Run, load_run
from zpipe.train.data.loader import RelevanceLoader
from zpipe.train.data.transforms import ViewConfig
from zpipe.train.loop import keep_freed_memory, resolve_device
from zpipe.train.macs import count_macs
from zpipe.train.metrics import mae, mse, pointing_game, spearman, topk_overlap
from zpipe.train.models.fusion import FusedViT
from zpipe.train.models.zoomvit import ZoomViT
from zpipe.train.scoring import ScoreSource, check_grid, choose_source, zooms
from zpipe.train.train_vit import check_labels


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Settings of an evaluation.

    alphas: thresholds of a zooming model. budgets: beside or instead of them, numbers of zoomed cells per image, or
    "300 tokens" or "2.3 GMACs". scores: where its scores come from, one of `scoring.SOURCES`; None takes what it was
    trained with.
    """

    alphas: tuple[float, ...] = (0.0, 0.05, 0.1, 0.2, 0.5, 1.0)
    budgets: tuple[int | str, ...] = ()
    scores: str | None = None
    batch_size: int = 128
    data_workers: int = 0
    device: str = "auto"


@dataclass(frozen=True, kw_only=True)
class EvalRow:
    """One setting's figures.

    tokens: mean sequence length an image, class token not counted; None for a model without patches. gmacs: 1e9 multiply-adds an image of the ViT;
    gmacs_zoomer: those of the zoomer (or another source of scores) beside it. images_per_s: median over batches, after a
    warm-up, of both together. top1_interval: half width of the 95 % interval (normal approximation).
    """

    setting: str
    count: int
    top1: float
    top1_interval: float
    tokens: float | None
    gmacs: float
    gmacs_zoomer: float
    images_per_s: float


@dataclass
class _Tally:
    right: int = 0
    count: int = 0
    lengths: Counter[int] | None = None
    rates: list[float] | None = None


def evaluate(
    run: Path,
    shards: Path,
    config: EvalConfig,
    *,
    maps: Path | None = None,
    out: Path | None = None,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Evaluate a finished run on shards; returns, and writes as JSON to `out` when given, {kind, run, shards, rows}.

    Every sample is counted once, on the centre crop that the run was made for. A ViT's rows are `EvalRow`s; a zoomer has
    one row with its distance to the teacher's maps (needs `maps`). Errors: :class:`UsageError`, :class:`ZpipeError`.
    """
    opened = load_run(run)
    missing = "skip" if opened.kind == "zoomer" else "uniform"
    loader = eval_loader(opened.preprocessing, shards, maps, config.batch_size, config.data_workers, missing)
    device = resolve_device(config.device)
    if device.type == "cpu":
        keep_freed_memory()
    if opened.kind == "zoomer":
        if loader.maps is None:
            raise UsageError(f"{run}: a zoomer is measured against its teacher's maps; give --maps")
        check_grid(loader.maps, opened.model.grid)
        rows = [_evaluate_zoomer(opened, loader, device, progress)]
    else:
        rows = [asdict(row) for row in _evaluate_vit(opened, loader, config, device, progress)]
    result = {"kind": opened.kind, "run": str(run), "shards": str(shards), "rows": rows}
    if out is not None:
        write_json(out, result)
    return result


def eval_loader(
    preprocessing: Preprocessing, shards: Path, maps: Path | None, batch_size: int, num_workers: int, missing: str
) -> RelevanceLoader:
    """Every sample once, in the view that a run was made for. missing: as of `RelevanceLoader`."""
    return RelevanceLoader(
        shards,
        maps,
        batch_size=batch_size,
        image_size=preprocessing.image_size,
        augment="eval",
        num_workers=num_workers,
        missing=missing,
        view=ViewConfig(crop_pct=preprocessing.crop_pct),
    )


def choose_run_source(opened: Run, config: EvalConfig, store: RelevanceMaps | None) -> ScoreSource | None:
    """Where a run's scores come from: as asked for, or as in training; None for a model that doesn't zoom.

    Errors: :class:`UsageError` when what that source needs isn't there.
    """
    if not zooms(opened.model):
        return None
    name = config.scores or opened.settings.get("scores") or ("zoomer" if opened.zoomer is not None else "maps")
    if name == "zoomer" and opened.zoomer is None:
        raise UsageError(
            f"{opened.path}: was trained without a zoomer; give --scores, such as --maps STORE --scores maps"
        )
    return choose_source(name, opened.model, zoomer=opened.zoomer, origin=opened.path, store=store)


def _settings(model: nn.Module, source: ScoreSource | None, config: EvalConfig) -> list[tuple[str, dict[str, Any]]]:
    """A name and the keyword arguments of every zoom to evaluate."""
    if source is None:
        return [("plain", {})]
    if source.name == "none":
        return [("no zoom", {})]
    if not config.alphas and not config.budgets:
        raise UsageError("nothing to evaluate: give --alphas or --budgets")
    for alpha in config.alphas:
        if not 0.0 <= alpha <= 1.0:
            raise UsageError(f"--alphas {alpha}: a threshold lies in [0, 1]")
    # Alpha in full: cells may score exactly what it is, and a rounded one would zoom them or not.
    chosen: list[tuple[str, dict[str, Any]]] = [(f"alpha={_short(alpha)}", {"alpha": alpha}) for alpha in config.alphas]
    for budget in config.budgets:
        try:
            chosen.append((f"budget={budget}", {"budget": model.resolve_budget(budget)}))
        except ValueError as error:
            raise UsageError(f"--budgets {budget}: {error}") from error
    names = [name for name, _ in chosen]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UsageError(f"{twice[0]}: asked for twice")
    return chosen


def _short(alpha: float) -> str:
    """The shortest text that reads back as the same number."""
    return repr(alpha).removesuffix(".0")


@torch.inference_mode()
def _evaluate_vit(
    opened: Run, loader: RelevanceLoader, config: EvalConfig, device: torch.device, progress: Progress
) -> list[EvalRow]:
    model = opened.model.to(device)
    source = choose_run_source(opened, config, loader.maps)
    settings = _settings(model, source, config)
    if source is not None and source.zoomer is not None:
        source.zoomer.to(device)
    tallies = {name: _Tally(lengths=Counter(), rates=[]) for name, _ in settings}
    batches = len(loader)
    for number, batch in enumerate(loader):
        check_labels(batch["label"], batch["key"], model.num_classes)
        labels = batch["label"].to(device)
        images = opened.preprocessing.normalise(batch["image"].to(device))
        for name, zoom in settings:
            call = partial(_forward, model, source, images, batch, zoom)
            if number == 0:
                call()  # the first call of a shape pays for allocation and kernel choice
            (logits, scores), seconds = _timed(call, device)
            tally = tallies[name]
            tally.right += int((logits.argmax(dim=1) == labels).sum())
            tally.count += len(labels)
            tally.rates.append(len(labels) / seconds)
            if scores is not None:
                tally.lengths.update(model.token_counts(scores, **zoom).tolist())
        progress("evaluate", number + 1, batches, top1=tallies[settings[-1][0]].right / tallies[settings[-1][0]].count)
    shape = (1, 3, opened.preprocessing.image_size, opened.preprocessing.image_size)
    image = torch.zeros(shape, device=device)
    zoomer_macs = source.macs(image) if source is not None else 0
    macs = _MacsByLength(model, image)
    return [_row(name, tallies[name], macs, zoomer_macs) for name, _ in settings]


def _forward(
    model: nn.Module, source: ScoreSource | None, images: Tensor, batch: dict[str, Any], zoom: dict[str, Any]
) -> tuple[Tensor, Tensor | None]:
    """Logits [B, classes], and the scores [B, s * s] that guided a zooming model."""
    scores = source.score(images, batch) if source is not None else None
    if scores is None:
        return model(images), None
    return model(images, scores, **zoom), scores


def _timed(forward, device: torch.device) -> tuple[Any, float]:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    begun = time.perf_counter()
    result = forward()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return result, time.perf_counter() - begun


class _MacsByLength:
    """Multiply-adds of the model for one image of a given token count, counted once for each."""

    def __init__(self, model: nn.Module, image: Tensor) -> None:
        self.model, self.image = model, image
        self._known: dict[int, int] = {}

    def plain(self) -> int:
        return count_macs(lambda: self.model(self.image))

    def zoomed(self, length: int) -> int:
        if length not in self._known:
            scores = torch.zeros(1, self.model.score_grid**2, device=self.image.device)
            # A fused model costs the same whatever is zoomed.
            budget = (length - self.model.coarse_grid**2) // 3 if isinstance(self.model, ZoomViT) else 1
            self._known[length] = count_macs(lambda: self.model(self.image, scores, budget=budget))
        return self._known[length]


def _row(name: str, tally: _Tally, macs: _MacsByLength, zoomer_macs: int) -> EvalRow:
    if tally.lengths:
        total = sum(tally.lengths.values())
        tokens = sum(length * times for length, times in tally.lengths.items()) / total
        mean_macs = sum(macs.zoomed(length) * times for length, times in tally.lengths.items()) / total
    else:
        tokens = _plain_tokens(macs.model)
        mean_macs = macs.plain()
    top1 = tally.right / tally.count
    return EvalRow(
        setting=name,
        count=tally.count,
        top1=top1,
        top1_interval=1.96 * (top1 * (1 - top1) / tally.count) ** 0.5,
        tokens=tokens,
        gmacs=mean_macs / 1e9,
        gmacs_zoomer=zoomer_macs / 1e9,
        images_per_s=float(np.median(tally.rates)),
    )


def _plain_tokens(model: nn.Module) -> float | None:
    """Tokens of an image in which nothing is zoomed; None for a model without patches."""
    if isinstance(model, ZoomViT):
        return float(model.coarse_grid**2)
    if isinstance(model, FusedViT):
        return float(model.num_patches())
    patches = getattr(getattr(model, "patch_embed", None), "num_patches", None)
    return None if patches is None else float(patches)


@torch.inference_mode()
def _evaluate_zoomer(
    opened: Run, loader: RelevanceLoader, device: torch.device, progress: Progress
) -> dict[str, float]:
    """Means over images of the distance between zoomer and teacher; with object boxes, the pointing game of both."""
    zoomer = opened.model.to(device)
    sums: Counter[str] = Counter()
    count = with_box = ranked = 0
    batches = len(loader)
    for number, batch in enumerate(loader):
        scores = zoomer(opened.preprocessing.normalise(batch["image"].to(device))).cpu()  # [B, g * g]
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
    return {"setting": "zoomer", "count": count} | row
