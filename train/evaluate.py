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
from zpipe.schemas.errors import UsageError, ZpipeError
from zpipe.schemas.progress import Progress, silent
from zpipe.schemas.relevance_maps import RelevanceMaps
from zpipe.train.answers import Answers, read_classes, read_several
from zpipe.train.checkpoint import Preprocessing, Run, load_run
from zpipe.train.data.loader import RelevanceLoader
from zpipe.train.data.transforms import ViewConfig
from zpipe.train.loop import keep_freed_memory, resolve_device
from zpipe.train.macs import count_macs
from zpipe.train.metrics import mae, mse, pointing_game, spearman, topk_overlap
from zpipe.train.models.fusion import FusedViT
from zpipe.train.models.zoom_tokens import PRUNE_KINDS
from zpipe.train.models.zoomvit import ZoomViT
from zpipe.train.scoring import ScoreSource, check_grid, choose_source, zooms


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Settings of an evaluation.

    alphas: thresholds of a zooming model. budgets: beside or instead of them, numbers of zoomed cells per image, or
    "300 tokens" or "2.3 GMACs". keeps: each of these also with its sequences pruned to so many tokens, as `prune` says
    (one of `zoom_tokens.PRUNE_KINDS`). scores: where its scores come from, one of `scoring.SOURCES`; None takes what it
    was trained with. classes: of data that knows fewer than the model, see `answers.read_classes`. labels: a file of
    labels in place of the data's, several for an image, see `answers.read_several`.
    """

    alphas: tuple[float, ...] = (0.0, 0.05, 0.1, 0.2, 0.5, 1.0)
    budgets: tuple[int | str, ...] = ()
    keeps: tuple[int, ...] = ()
    prune: str = "backward"
    scores: str | None = None
    classes: str | None = None
    labels: Path | None = None
    batch_size: int = 128
    data_workers: int = 0
    device: str = "auto"


@dataclass(frozen=True, kw_only=True)
class EvalRow:
    """One setting's figures.

    alpha, budget, keep, prune, scores: the setting; None where it has none. count: images judged. top1_interval: half
    width of the 95 % interval (normal approximation). tokens: mean sequence length an image, class token not counted;
    None for a model without patches. token_histogram: images by sequence length. gmacs: 1e9 multiply-adds an image of the
    ViT; gmacs_zoomer: those of the zoomer (or another source of scores) beside it. images_per_s: median over batches,
    after a warm-up, of both together; low and high are its quartiles.
    """

    setting: str
    scores: str | None = None
    alpha: float | None = None
    budget: int | str | None = None
    keep: int | None = None
    prune: str | None = None
    count: int
    top1: float
    top1_interval: float
    top5: float
    tokens: float | None
    token_histogram: dict[str, int]
    gmacs: float
    gmacs_zoomer: float
    images_per_s: float
    images_per_s_low: float
    images_per_s_high: float


@dataclass(frozen=True)
class Zoom:
    """One way to run a model. arguments: of its forward, beside images and scores. asked: the setting, as in `EvalRow`."""

    name: str
    arguments: dict[str, Any]
    asked: dict[str, Any]


class _Tally:
    def __init__(self) -> None:
        self.ranks: list[Tensor] = []
        self.rates: list[float] = []
        self.lengths: Counter[int] = Counter()
        self.zoomed: Counter[int] = Counter()  # by tokens before pruning


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
        rows = [measure_zoomer(opened, loader, device, progress)]
    else:
        source = choose_run_source(opened, config, loader.maps)
        zooms = zooms_asked(opened.model, source, config)
        answers = answers_for(opened, loader, config)
        measured = measure(opened.model, opened.preprocessing, loader, source, zooms, answers, device, progress)
        rows = [asdict(row) for row in measured]
    about = {"kind": opened.kind, "run": str(run), "model": opened.settings.get("model", opened.kind)}
    about["seed"] = opened.settings.get("train", {}).get("seed")
    result = about | {"shards": str(shards), "maps": None if maps is None else str(maps), "rows": rows}
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


def answers_for(opened: Run, loader: RelevanceLoader, config: EvalConfig) -> Answers:
    """What is right for a run on these shards. Errors: as of `read_classes` and `read_several`."""
    if config.classes is not None and config.labels is not None:
        raise UsageError("--classes, --labels: give one of them; the file of labels is in the model's numbering")
    number = opened.model.num_classes
    classes = several = None
    if config.classes is not None:
        classes = read_classes(config.classes, opened.settings.get("classes") or [], loader.index.classes)
        if max(classes) >= number:
            raise UsageError(f"--classes {config.classes}: class {max(classes)}; the model has {number}")
    if config.labels is not None:
        several = read_several(config.labels, number)
    return Answers(number, classes, several)


def zooms_asked(model: nn.Module, source: ScoreSource | None, config: EvalConfig) -> list[Zoom]:
    """Every zoom to evaluate. Errors: :class:`UsageError` naming the value that is out of range, or none at all."""
    if source is None:
        return [Zoom("plain", {}, {})]
    if source.name == "none":
        return [Zoom("no zoom", {}, {})]
    if not config.alphas and not config.budgets:
        raise UsageError("nothing to evaluate: give --alphas or --budgets")
    if config.keeps and not isinstance(model, ZoomViT):
        raise UsageError("--keep: only zoomvit_* models prune their sequences")
    if config.prune not in PRUNE_KINDS:
        raise UsageError(f"--prune {config.prune}: choose one of {', '.join(PRUNE_KINDS)}")
    for alpha in config.alphas:
        if not 0.0 <= alpha <= 1.0:
            raise UsageError(f"--alphas {alpha}: a threshold lies in [0, 1]")
    # Alpha in full: cells may score exactly what it is, and a rounded one would zoom them or not.
    chosen = [Zoom(f"alpha={_short(alpha)}", {"alpha": alpha}, {"alpha": alpha}) for alpha in config.alphas]
    for budget in config.budgets:
        try:
            chosen.append(Zoom(f"budget={budget}", {"budget": model.resolve_budget(budget)}, {"budget": budget}))
        except ValueError as error:
            raise UsageError(f"--budgets {budget}: {error}") from error
    pruned = []
    for keep in config.keeps:
        if not 1 <= keep <= 4 * model.coarse_grid**2:
            raise UsageError(f"--keep {keep}: give a number from 1 to {4 * model.coarse_grid**2}")
        how = {"keep_tokens": keep, "prune": config.prune}
        told = {"keep": keep, "prune": config.prune}
        suffix = f" keep={keep}" + ("" if config.prune == "backward" else f" {config.prune}")
        pruned += [Zoom(zoom.name + suffix, zoom.arguments | how, zoom.asked | told) for zoom in chosen]
    names = [zoom.name for zoom in chosen + pruned]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UsageError(f"{twice[0]}: asked for twice")
    return chosen + pruned


def _short(alpha: float) -> str:
    """The shortest text that reads back as the same number."""
    return repr(alpha).removesuffix(".0")


@torch.inference_mode()
def measure(
    model: nn.Module,
    preprocessing: Preprocessing,
    loader: RelevanceLoader,
    source: ScoreSource | None,
    zooms: list[Zoom],
    answers: Answers,
    device: torch.device,
    progress: Progress = silent,
) -> list[EvalRow]:
    """A row for every zoom, all of them judged on the same batches."""
    model = model.to(device)
    if source is not None and source.zoomer is not None:
        source.zoomer.to(device)
    tallies = [_Tally() for _ in zooms]
    batches = len(loader)
    for number, batch in enumerate(loader):
        images = preprocessing.normalise(batch["image"].to(device))
        for zoom, tally in zip(zooms, tallies, strict=True):
            call = partial(_forward, model, source, images, batch, zoom.arguments)
            if number == 0:
                call()  # the first call of a shape pays for allocation and kernel choice
            (logits, scores), seconds = _timed(call, device)
            tally.ranks.append(answers.ranks(logits, batch))
            tally.rates.append(len(images) / seconds)
            if scores is not None:
                counts = model.token_counts(scores, **zoom.arguments)
                tally.lengths.update(counts.tolist())
                if "keep_tokens" in zoom.arguments:
                    unpruned = {name: zoom.arguments[name] for name in ("alpha", "budget") if name in zoom.arguments}
                    counts = model.token_counts(scores, **unpruned)
                tally.zoomed.update(counts.tolist())
        progress("evaluate", number + 1, batches, top1=float((tallies[-1].ranks[-1] == 0).float().mean()))
    image = torch.zeros(1, 3, preprocessing.image_size, preprocessing.image_size, device=device)
    macs = _Macs(model, image)
    told: dict[str, Any] = {"scores": None, "gmacs_zoomer": 0.0}
    if source is not None:
        told = {"scores": source.name, "gmacs_zoomer": source.macs(image) / 1e9}
    return [EvalRow(**_figures(zoom, tally, macs), **told) for zoom, tally in zip(zooms, tallies, strict=True)]


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


class _Macs:
    """Multiply-adds of the model for one image, counted once for each number of zoomed cells."""

    def __init__(self, model: nn.Module, image: Tensor) -> None:
        self.model, self.image = model, image
        self._known: dict[tuple, int] = {}

    def plain(self) -> int:
        return count_macs(lambda: self.model(self.image))

    def zoomed(self, length: int, arguments: dict[str, Any]) -> int:
        """Of an image that has `length` tokens before it is pruned."""
        pruning = {name: arguments[name] for name in ("keep_tokens", "prune") if name in arguments}
        place = (length, *pruning.values())
        if place not in self._known:
            scores = torch.zeros(1, self.model.score_grid**2, device=self.image.device)
            # A fused model costs the same whatever is zoomed.
            budget = (length - self.model.coarse_grid**2) // 3 if isinstance(self.model, ZoomViT) else 1
            self._known[place] = count_macs(lambda: self.model(self.image, scores, budget=budget, **pruning))
        return self._known[place]


def _figures(zoom: Zoom, tally: _Tally, macs: _Macs) -> dict[str, Any]:
    if tally.lengths:
        total = sum(tally.lengths.values())
        tokens = sum(length * times for length, times in tally.lengths.items()) / total
        mean_macs = sum(macs.zoomed(n, zoom.arguments) * times for n, times in tally.zoomed.items()) / total
    else:
        tokens = _plain_tokens(macs.model)
        mean_macs = macs.plain()
    ranks = torch.cat(tally.ranks)
    ranks = ranks[ranks >= 0]
    if not len(ranks):
        raise ZpipeError("no image of these shards has a label to be judged by; check --labels")
    top1 = float((ranks == 0).double().mean())
    low, middle, high = np.quantile(tally.rates, (0.25, 0.5, 0.75)).tolist()
    return {
        "setting": zoom.name,
        **zoom.asked,
        "count": len(ranks),
        "top1": top1,
        "top1_interval": 1.96 * (top1 * (1 - top1) / len(ranks)) ** 0.5,
        "top5": float((ranks < 5).double().mean()),
        "tokens": tokens,
        "token_histogram": {str(length): times for length, times in sorted(tally.lengths.items())},
        "gmacs": mean_macs / 1e9,
        "images_per_s": middle,
        "images_per_s_low": low,
        "images_per_s_high": high,
    }


def _plain_tokens(model: nn.Module) -> float | None:
    """Tokens of an image in which nothing is zoomed; None for a model without patches."""
    if isinstance(model, ZoomViT):
        return float(model.coarse_grid**2)
    if isinstance(model, FusedViT):
        return float(model.num_patches())
    patches = getattr(getattr(model, "patch_embed", None), "num_patches", None)
    return None if patches is None else float(patches)


@torch.inference_mode()
def measure_zoomer(
    opened: Run, loader: RelevanceLoader, device: torch.device, progress: Progress = silent
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
