"""How a finished run is run: on which view, with which scores, in which modes, and what each of these costs."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from zpipe.schemas.errors import UsageError
from zpipe.schemas.relevance_maps import RelevanceMaps
from zpipe.train.checkpoint import Preprocessing, Run
from zpipe.train.data.loader import RelevanceLoader
from zpipe.train.data.transforms import ViewConfig
from zpipe.train.macs import count_macs
from zpipe.train.models.cfvit import CFViT, EarlyExit
from zpipe.train.models.fusion import FusedViT
from zpipe.train.models.sparseformer import SparseFormer
from zpipe.train.models.token_pruned_vit import TokenPrunedViT
from zpipe.train.models.tome import ToMeViT
from zpipe.train.models.zoom_tokens import PRUNE_KINDS
from zpipe.train.models.zoomvit import ZoomViT
from zpipe.train.scoring import ScoreSource, choose_source, chooses_itself, takes_scores, zooms

DEFAULT_EXITS = (0.0, 0.3, 0.5, 0.7, 0.9, 1.0)


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Settings of an evaluation.

    alphas: thresholds of a zooming model. budgets: beside or instead of them, numbers of zoomed cells per image, or
    "300 tokens" or "2.3 GMACs". keeps: each of these also with its sequences pruned to so many tokens, as `prune` says
    (one of `zoom_tokens.PRUNE_KINDS`); of a token_pruned_vit, the patch tokens it keeps. exits: thresholds of early exit of a
    model of two stages; none given, DEFAULT_EXITS. merges: tokens that a tome_vit merges in each block; none given, its own.
    target_gmacs: instead of alphas or exits, the one at which an image of the shards `calibration` costs so many GMACs on
    average. scores: where the scores come from, one of `scoring.SOURCES`; None takes what it was trained with. classes:
    of data that knows fewer than the model, see `answers.read_classes`. labels: a file of labels in place of the data's,
    several for an image, see `answers.read_several`. weights: of the run, see `checkpoint.load_run`. precision: what model and
    scores are computed in: float32, or under autocast bf16 or fp16, as most GPUs are meant to be used.
    """

    alphas: tuple[float, ...] = (0.0, 0.05, 0.1, 0.2, 0.5, 1.0)
    budgets: tuple[int | str, ...] = ()
    keeps: tuple[int, ...] = ()
    prune: str = "backward"
    exits: tuple[float, ...] = ()
    merges: tuple[int, ...] = ()
    target_gmacs: float | None = None
    calibration: Path | None = None
    calibration_maps: Path | None = None
    scores: str | None = None
    classes: str | None = None
    labels: Path | None = None
    weights: str = "final"
    precision: str = "float32"
    batch_size: int = 128
    data_workers: int = 0
    device: str = "auto"


@dataclass(frozen=True)
class Mode:
    """One way to run a model. arguments: of its forward, beside images and scores. asked: the setting, as in `EvalRow`."""

    name: str
    arguments: dict[str, Any]
    asked: dict[str, Any]


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


def trained_with(opened: Run) -> str | None:
    """The name of the source whose scores a run was trained with; None for a model that takes none."""
    if not takes_scores(opened.model):
        return None
    if opened.settings.get("scores") is not None:
        return opened.settings["scores"]
    if opened.zoomer is not None:
        return "zoomer"
    return "own" if chooses_itself(opened.model) and opened.settings.get("maps") is None else "maps"


def choose_run_source(opened: Run, config: EvalConfig, store: RelevanceMaps | None) -> ScoreSource | None:
    """Where a run's scores come from: as asked for, or as in training; None for a model that takes none.

    Errors: :class:`UsageError` when what that source needs isn't there.
    """
    if not takes_scores(opened.model):
        return None
    name = config.scores or trained_with(opened)
    if name == "zoomer" and opened.zoomer is None:
        raise UsageError(
            f"{opened.path}: was trained without a zoomer; give --scores, such as --maps STORE --scores maps"
        )
    return choose_source(name, opened.model, zoomer=opened.zoomer, origin=opened.path, store=store)


def modes_asked(model: nn.Module, source: ScoreSource | None, config: EvalConfig) -> list[Mode]:
    """Every mode to evaluate a model in. Errors: :class:`UsageError` naming the value that is out of range, or none at all."""
    for option, values, kind, told in (
        ("--keep", config.keeps, (ZoomViT, TokenPrunedViT), "zoomvit_* and token_pruned_vit models prune"),
        ("--exits", config.exits, CFViT, "models of two stages, cfvit_* and lfvit_*, exit early"),
        ("--merge", config.merges, ToMeViT, "tome_vit models merge tokens"),
    ):
        if values and not isinstance(model, kind):
            raise UsageError(f"{option}: only {told}")
    if isinstance(model, CFViT):
        return _once([_exit_mode(eta) for eta in config.exits or DEFAULT_EXITS])
    if isinstance(model, ToMeViT):
        return _once([_merge_mode(model, r) for r in config.merges or (model.r,)])
    if isinstance(model, TokenPrunedViT):
        keeps = config.keeps or (model.resolve_keep(),)
        return _once([_keep_mode(model, keep) for keep in keeps])
    if source is None or not zooms(model):
        return [Mode("plain" if source is None else source.name, {}, {})]
    if source.name == "none":
        return [Mode("no zoom", {}, {})]
    return _once(_zoom_modes(model, config))


def _exit_mode(eta: float) -> Mode:
    if not 0.0 <= eta <= 1.0:
        raise UsageError(f"--exits {eta}: a threshold of early exit lies in [0, 1]")
    return Mode(f"exit={_short(eta)}", {"exit_threshold": eta}, {"exit": eta})


def _merge_mode(model: ToMeViT, r: int) -> Mode:
    try:
        return Mode(f"merge={r}", {"r": model.resolve_r(r)}, {"merge": r})
    except ValueError as error:
        raise UsageError(f"--merge {r}: {error}") from error


def _keep_mode(model: TokenPrunedViT, keep: int) -> Mode:
    try:
        return Mode(f"keep={keep}", {"keep_tokens": model.resolve_keep(keep_tokens=keep)}, {"keep": keep})
    except ValueError as error:
        raise UsageError(f"--keep {keep}: {error}") from error


def _zoom_modes(model: nn.Module, config: EvalConfig) -> list[Mode]:
    if not config.alphas and not config.budgets:
        raise UsageError("nothing to evaluate: give --alphas or --budgets")
    if config.prune not in PRUNE_KINDS:
        raise UsageError(f"--prune {config.prune}: choose one of {', '.join(PRUNE_KINDS)}")
    for alpha in config.alphas:
        if not 0.0 <= alpha <= 1.0:
            raise UsageError(f"--alphas {alpha}: a threshold lies in [0, 1]")
    # Alpha in full: cells may score exactly what it is, and a rounded one would zoom them or not.
    chosen = [Mode(f"alpha={_short(alpha)}", {"alpha": alpha}, {"alpha": alpha}) for alpha in config.alphas]
    for budget in config.budgets:
        try:
            chosen.append(Mode(f"budget={budget}", {"budget": model.resolve_budget(budget)}, {"budget": budget}))
        except ValueError as error:
            raise UsageError(f"--budgets {budget}: {error}") from error
    pruned = []
    for keep in config.keeps:
        if not 1 <= keep <= 4 * model.coarse_grid**2:
            raise UsageError(f"--keep {keep}: give a number from 1 to {4 * model.coarse_grid**2}")
        how = {"keep_tokens": keep, "prune": config.prune}
        told = {"keep": keep, "prune": config.prune}
        suffix = f" keep={keep}" + ("" if config.prune == "backward" else f" {config.prune}")
        pruned += [Mode(zoom.name + suffix, zoom.arguments | how, zoom.asked | told) for zoom in chosen]
    return chosen + pruned


def _once(modes: list[Mode]) -> list[Mode]:
    names = [mode.name for mode in modes]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UsageError(f"{twice[0]}: asked for twice")
    return modes


def _short(number: float) -> str:
    """The shortest text that reads back as the same number."""
    return repr(number).removesuffix(".0")


def forward(
    model: nn.Module, source: ScoreSource | None, images: Tensor, batch: dict[str, Any], mode: Mode
) -> tuple[Tensor | EarlyExit, Tensor | None]:
    """What a model answers in a mode, and the scores [B, s * s] it was given, if any."""
    scores = source.score(images, batch) if source is not None else None
    if scores is None:
        return model(images, **mode.arguments), None
    return model(images, scores, **mode.arguments), scores


def logits_of(answer: Tensor | EarlyExit) -> Tensor:
    """[B, classes], of whichever stage answered."""
    return answer.logits if isinstance(answer, EarlyExit) else answer


# -- costs -------------------------------------------------------------------------------------------------------------


def cost_of(model: nn.Module, mode: Mode) -> Cost:
    """What will be known of the cost of a model in a mode, once it has run."""
    if isinstance(model, (ZoomViT, FusedViT)):
        return ZoomCost(model, mode)
    return ExitCost(model, mode) if isinstance(model, CFViT) else Cost(model, mode)


class Cost:
    """Tokens and multiply-adds of a model that spends the same on every image.

    tokens: those that enter a block, class token not counted, as a mean over blocks and images; None for a model
    without patches.
    """

    def __init__(self, model: nn.Module, mode: Mode) -> None:
        self.model, self.mode = model, mode
        self._scored = False
        self._images = 0

    def add(self, answer: Tensor | EarlyExit, scores: Tensor | None) -> None:
        """Count a batch."""
        self._scored = scores is not None
        self._images += len(logits_of(answer))

    def histogram(self) -> dict[int, int]:
        """Images by tokens; empty where all have the same."""
        return {}

    def tokens(self) -> float | None:
        model, arguments = self.model, self.mode.arguments
        if isinstance(model, SparseFormer):
            return float(model.num_tokens)
        if isinstance(model, TokenPrunedViT):
            depth, first = len(model.backbone.blocks), model.prune_block
            kept = model.resolve_keep(keep_tokens=arguments.get("keep_tokens"))
            return (first * model.score_grid**2 + (depth - first) * kept) / depth
        if isinstance(model, ToMeViT):
            merged = arguments.get("r", model.r) * (len(model.backbone.blocks) - 1) / 2
            return model.backbone.patch_embed.num_patches - merged
        body = getattr(model, "backbone", model)
        patches = getattr(getattr(body, "patch_embed", None), "num_patches", None)
        return None if patches is None else float(patches)

    def macs(self, image: Tensor) -> float:
        """Multiply-adds an image of the model, as torch's flop counter sees them; image [1, 3, S, S]."""
        scores = {"scores": self._blank(image)} if self._scored else {}
        return count_macs(lambda: self.model(image, **scores, **self.mode.arguments))

    def _blank(self, image: Tensor) -> Tensor:
        return torch.zeros(1, self.model.score_grid**2, device=image.device)


class ZoomCost(Cost):
    """Of a model whose tokens depend on the scores; each length is counted once."""

    def __init__(self, model: nn.Module, mode: Mode) -> None:
        super().__init__(model, mode)
        self._lengths: Counter[int] = Counter()
        self._unpruned: Counter[int] = Counter()

    def add(self, answer: Tensor | EarlyExit, scores: Tensor | None) -> None:
        super().add(answer, scores)
        if scores is None:
            return
        arguments = self.mode.arguments
        counts = self.model.token_counts(scores, **arguments)
        self._lengths.update(counts.tolist())
        if "keep_tokens" in arguments:
            unpruned = {name: arguments[name] for name in ("alpha", "budget") if name in arguments}
            counts = self.model.token_counts(scores, **unpruned)
        self._unpruned.update(counts.tolist())

    def histogram(self) -> dict[int, int]:
        return dict(sorted(self._lengths.items()))

    def tokens(self) -> float | None:
        if self._lengths:
            return sum(length * times for length, times in self._lengths.items()) / sum(self._lengths.values())
        return float(self.model.coarse_grid**2 if isinstance(self.model, ZoomViT) else self.model.num_patches())

    def macs(self, image: Tensor) -> float:
        if not self._unpruned:
            return count_macs(lambda: self.model(image))
        total = sum(self._unpruned.values())
        return sum(self._macs_of(length, image) * times for length, times in self._unpruned.items()) / total

    def _macs_of(self, length: int, image: Tensor) -> int:
        """Of an image that has `length` tokens before it is pruned."""
        arguments = self.mode.arguments
        pruning = {name: arguments[name] for name in ("keep_tokens", "prune") if name in arguments}
        # A fused model costs the same whatever is zoomed.
        budget = (length - self.model.coarse_grid**2) // 3 if isinstance(self.model, ZoomViT) else 1
        return count_macs(lambda: self.model(image, self._blank(image), budget=budget, **pruning))


class ExitCost(Cost):
    """Of a model of two stages: the coarse one for all, the fine one for those that don't exit. tokens: of both stages."""

    def __init__(self, model: CFViT, mode: Mode) -> None:
        super().__init__(model, mode)
        self._exited = 0

    def add(self, answer: Tensor | EarlyExit, scores: Tensor | None) -> None:
        super().add(answer, scores)
        if isinstance(answer, EarlyExit):
            self._exited += int(answer.exited.sum())

    def exit_share(self) -> float:
        return self._exited / self._images

    def histogram(self) -> dict[int, int]:
        coarse, fine = (length - 1 for length in self.model.lengths())
        found = {coarse: self._exited, coarse + fine: self._images - self._exited}
        return {length: times for length, times in found.items() if times}

    def tokens(self) -> float | None:
        return sum(length * times for length, times in self.histogram().items()) / self._images

    def macs(self, image: Tensor) -> float:
        whole, coarse = self.model.macs(0.0), self.model.macs(1.0)
        return coarse + (1 - self.exit_share()) * (whole - coarse)
