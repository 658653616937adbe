"""The paper's experiments by name: `zpipe evaluate RUN SHARDS --study NAME`.

A study takes a finished run, trains what it compares it with under the run's own settings (into RUN/studies, kept and gone on
with), and leaves tidy results in RUN/results. The same command does it on the demo in minutes and on ImageNet in days.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from zpipe.schemas.errors import UsageError
from zpipe.schemas.progress import Progress, silent
from zpipe.schemas.storage import as_path
from zpipe.train.checkpoint import Run, load_run, load_zoomer
from zpipe.train.data.loader import RelevanceLoader
from zpipe.train.device import keep_freed_memory, resolve_device
from zpipe.train.evaluation.answers import Answers
from zpipe.train.evaluation.error_analysis import analyse_errors, error_results, write_errors
from zpipe.train.evaluation.evaluate import EvalRow, answers_for, measure, measure_zoomer
from zpipe.train.evaluation.inference import OpenRun, choose_run_source, eval_loader, trained_with
from zpipe.train.evaluation.operating_points import EvalConfig, operating_points
from zpipe.train.evaluation.results import Result, share, write_results
from zpipe.train.fit.distributed import Workers, run_training
from zpipe.train.fit.normalisation import check_normalisation
from zpipe.train.fit.train_vit import VitConfig, train_vit
from zpipe.train.fit.train_zoomer import ZoomerConfig, train_zoomer
from zpipe.train.macs import count_macs
from zpipe.train.models.operating_points import setting_names
from zpipe.train.models.warm_start import zooming_twin
from zpipe.train.models.zoom_tokens import PRUNE_KINDS
from zpipe.train.models.zoomer import Zoomer
from zpipe.train.scoring import ScoreSource, choose_source
from zpipe.train.settings import rebuild, with_settings

PAPER_ALPHAS = (1.0, 0.15, 0.05, 0.01, 0.005)  # Table 9
PAPER_ALPHA = 0.03  # section 5.1: unless stated otherwise


@dataclass(frozen=True, kw_only=True)
class StudyConfig:
    """Settings of a study.

    evaluation: batch size and device; its alphas and budgets, when there are any, instead of the study's own. seeds: of the
    runs that are compared; none takes the seed of the run at hand. epochs: of what is trained for the study; None trains
    as long as the run at hand was. workers: the processes that train, as of the run at hand; they share its batch.
    """

    evaluation: EvalConfig = field(default_factory=lambda: EvalConfig(alphas=()))
    seeds: tuple[int, ...] = ()
    epochs: float | None = None
    workers: Workers = field(default_factory=Workers)


@dataclass(frozen=True)
class Study:
    """title: what it shows, and where the paper has it. trains: whether it trains anything."""

    title: str
    trains: bool
    run: Callable[[Bench], list[Result]]


class Bench:
    """What a study works with: the run at hand, the shards to judge by, and ways to train and measure."""

    def __init__(
        self,
        study: str,
        opened: Run,
        shards: Path,
        config: StudyConfig,
        maps: Path | None,
        zoomer: Path | None,
        progress: Progress,
        say: Callable[[str], None],
    ) -> None:
        self.study, self.opened, self.shards, self.config = study, opened, shards, config
        self.maps, self.zoomer, self.progress, self.say = maps, zoomer, progress, say
        self.device = resolve_device(config.evaluation.device)
        self.seeds: list[int | None] = list(config.seeds) or [seed_of(opened)]
        self.notes: list[str] = []

    # What a run was told

    def vit_config(self, opened: Run | None = None) -> VitConfig:
        """Its settings, with the normalisation that came of them, which its variants share."""
        run = opened or self.opened
        config = rebuild(VitConfig(), run.settings)
        return replace(config, mean=tuple(run.preprocessing.mean), std=tuple(run.preprocessing.std))

    def need_zoomvit(self) -> Any:
        if not hasattr(self.opened.model, "tokenise"):
            raise UsageError(f"{self.opened.path}: --study {self.study} needs a zoomvit_* run")
        return self.opened.model

    def sweep(self, times: float = 1.0) -> dict[str, Any]:
        """Alphas and budgets to look at: as asked for, else by how the run was trained. times: of the budgets."""
        asked = self.config.evaluation
        if asked.alphas or asked.budgets:
            return {"alphas": asked.alphas, "budgets": asked.budgets}
        config = self.vit_config()
        if config.zoom_draw == "alpha" or not hasattr(self.opened.model, "tokenise"):
            return {"alphas": PAPER_ALPHAS, "budgets": ()}
        most = self.opened.model.coarse_grid**2 if config.max_zoomed is None else config.max_zoomed
        budgets = sorted({round(most * times * quarter / 4) for quarter in range(5)})
        return {"alphas": (), "budgets": tuple(budgets)}

    def one_zoom(self) -> dict[str, Any]:
        """The one alpha or budget that stands for the run."""
        asked = self.sweep()
        if asked["budgets"]:
            return {"alphas": (), "budgets": (asked["budgets"][len(asked["budgets"]) // 2],)}
        return {"alphas": (PAPER_ALPHA if self.config.evaluation.alphas == () else asked["alphas"][0],), "budgets": ()}

    # Training

    def variant(self, label: str, seed: int | None, **changes: Any) -> Run:
        """The run at hand with settings changed, trained if need be; the run itself where nothing changes."""
        own = self.vit_config()
        config = with_settings(own, self._common(own.train.seed, seed) | changes)
        if config == own:
            return self.opened
        folder = self._folder(label, config.train.seed)
        told = self.opened.settings
        sources = {name: None if told.get(name) is None else as_path(told[name]) for name in ("zoomer", "maps")}
        if config.scores not in (None, "zoomer"):
            sources["zoomer"] = None
        if config.scores not in (None, "maps"):
            sources["maps"] = None
        self._train(train_vit, {"shards": self.train_shards(self.opened), "out": folder} | sources, config)
        return load_run(folder)

    def zoomer_variant(self, label: str, seed: int | None, base: Run, **changes: Any) -> Run:
        own = rebuild(ZoomerConfig(), base.settings)
        config = with_settings(own, self._common(own.train.seed, seed) | changes)
        if config == own:
            return base
        folder = self._folder(label, config.train.seed)
        places = {"shards": self.train_shards(base), "maps": as_path(base.settings["maps"]), "out": folder}
        self._train(train_zoomer, places, config)
        return load_run(folder)

    def _train(
        self, function: Callable[..., Any], places: dict[str, Path | None], config: VitConfig | ZoomerConfig
    ) -> None:
        run_training(function, places, config, self.config.workers, progress=self.progress, say=self.say)

    def _common(self, own_seed: int, seed: int | None) -> dict[str, Any]:
        changes: dict[str, Any] = {"train.seed": own_seed if seed is None else seed}
        return changes if self.config.epochs is None else changes | {"train.epochs": self.config.epochs}

    def _folder(self, label: str, seed: int) -> Path:
        return self.opened.path / "studies" / self.study / f"{label}-seed-{seed}"

    def train_shards(self, opened: Run) -> Path:
        if "shards" not in opened.settings:
            raise UsageError(f"{opened.path}: doesn't say what it was trained on; --study {self.study} needs to train")
        return as_path(opened.settings["shards"])

    # Measuring

    def loader(self, opened: Run, image_size: int | None = None, missing: str = "uniform") -> RelevanceLoader:
        preprocessing = opened.preprocessing
        if image_size is not None:
            preprocessing = replace(preprocessing, image_size=image_size)
        given = self.config.evaluation
        return eval_loader(
            preprocessing,
            self.shards,
            self.maps,
            batch_size=given.batch_size,
            data_workers=given.data_workers,
            missing=missing,
        )

    def measured(
        self,
        opened: Run,
        setting: dict[str, Any],
        *zoomings: dict[str, Any],
        scores: str | None = None,
        zoomer: Zoomer | None = None,
    ) -> list[Result]:
        """Results of a run for every zoom of each of `zoomings` (alphas, budgets, keeps, prune), in one pass."""
        loader = self.loader(opened)
        config = replace(self.config.evaluation, scores=scores)
        if zoomer is not None:
            source: ScoreSource | None = choose_source(
                "zoomer", opened.model, zoomer=zoomer, origin=self.zoomer or "the zoomer", store=loader.maps
            )
        else:
            source = choose_run_source(opened, config.scores, loader.maps)
        each = (operating_points(opened.model, source, replace(config, **zooming)) for zooming in zoomings)
        asked = list({zoom.name: zoom for zoom in itertools.chain.from_iterable(each)}.values())
        answers = answers_for(opened, loader, config)
        ready = OpenRun(opened, source, device=config.device, precision=config.precision)
        rows = measure(ready, loader, asked, answers, self._evaluating)
        return list(itertools.chain.from_iterable(self.tidy(opened, row, setting) for row in rows))

    def tidy(self, opened: Run, row: EvalRow, setting: dict[str, Any]) -> list[Result]:
        names = ("scores", "alpha", "budget", "keep", "prune", "exit", "merge")
        asked = {name: getattr(row, name) for name in names}
        asked["precision"] = row.precision if row.precision != "float32" else None
        return results_of(row, self.about(opened) | {"setting": setting | drop_none(asked)})

    def about(self, opened: Run) -> dict[str, Any]:
        path = opened.path
        name = str(path.relative_to(self.opened.path.parent)) if self.opened.path in path.parents else path.name
        model = opened.settings.get("model", opened.kind)
        return {"study": self.study, "run": name, "model": model, "seed": seed_of(opened)}

    def _evaluating(self, stage: str, done: int, total: int, **facts: object) -> None:
        self.progress(f"{self.study}: {stage}", done, total, **facts)


def seed_of(opened: Run) -> int | None:
    return opened.settings.get("train", {}).get("seed")


def drop_none(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def results_of(row: EvalRow, about: dict[str, Any]) -> list[Result]:
    """A row of an evaluation as tidy results. about: study, run, model, setting and seed."""
    n = row.count
    results = [
        share(**about, metric="top1", n=n, right=round(row.top1 * n)),
        share(**about, metric="top5", n=n, right=round(row.top5 * n)),
        Result(**about, metric="gmacs", n=n, value=row.gmacs),
        Result(**about, metric="gmacs_scores", n=n, value=row.gmacs_zoomer),
        Result(**about, metric="images_per_s", n=n, value=row.images_per_s),
    ]
    if row.exited is not None:
        results.append(share(**about, metric="exited", n=n, right=round(row.exited * n)))
    if row.tokens is not None:
        results.append(Result(**about, metric="tokens", n=n, value=row.tokens))
    images = sum(row.token_histogram.values())
    for tokens, times in row.token_histogram.items():
        setting = {"setting": about["setting"] | {"tokens": int(tokens)}}
        results.append(Result(**about | setting, metric="images_with_tokens", n=images, value=times / images))
    return results


def run_study(
    name: str,
    run: Path,
    shards: Path,
    config: StudyConfig,
    *,
    maps: Path | None = None,
    zoomer: Path | None = None,
    progress: Progress = silent,
    say: Callable[[str], None] = lambda line: None,
) -> tuple[Path, list[Result], list[str]]:
    """Run a study; returns its results file, its rows, and what it left out and why.

    maps: the relevance store of `shards`, where a study needs one. zoomer: a finished run, for `test-time-zoom`. say: what it
    is told of training processes, see `run_training`. Errors: :class:`UsageError` for an unknown name, a setting that the
    study has no use for, or a run that it can't use; :class:`ZpipeError`.
    """
    if name not in STUDIES:
        raise UsageError(f"--study {name}: choose one of {', '.join(STUDIES)}")
    asked = config.evaluation
    trains = STUDIES[name].trains
    unused = {
        "--seeds": config.seeds and not trains,
        "--epochs": config.epochs is not None and not trains,
        "--num-workers": config.workers != Workers() and not trains,
        "--zoomer": zoomer is not None and name != "test-time-zoom",
        "--target-gmacs": asked.target_gmacs is not None,
        "--calibration": asked.calibration is not None or asked.calibration_maps is not None,
    }
    for option, given in unused.items():
        if given:
            raise UsageError(f"{option}: --study {name} has no use for it; leave it out")
    opened = load_run(run)
    bench = Bench(name, opened, shards, config, maps, zoomer, progress, say)
    if bench.device.type == "cpu":
        keep_freed_memory()
    rows = STUDIES[name].run(bench)
    return write_results(opened.path, name, STUDIES[name].title, str(shards), rows), rows, bench.notes


def _alpha_eta(bench: Bench) -> list[Result]:
    model, rows = bench.need_zoomvit(), []
    most = bench.vit_config().max_zoomed
    for eta in (2.0, 0.5):
        # The other factor's cells are four times, or a quarter of, as many; budgets go with them.
        times = 1.0 if eta == model.zoom_factor else 4.0 if eta == 2.0 else 0.25
        changes: dict[str, Any] = {"model_args": bench.vit_config().model_args | {"zoom_factor": eta}}
        if eta == model.zoom_factor:
            changes = {}
        elif most is not None:
            changes["max_zoomed"] = round(most * times)
        for seed in bench.seeds:
            opened = bench.variant(f"eta-{eta:g}", seed, **changes)
            rows += bench.measured(opened, {"eta": eta}, bench.sweep(times))
    return rows


def _pruning(bench: Bench) -> list[Result]:
    model = bench.need_zoomvit()
    asked = bench.sweep()
    fullest = {"alphas": asked["alphas"][-1:], "budgets": asked["budgets"][-1:]}
    longest = model.coarse_grid**2 + 3 * (asked["budgets"][-1] if asked["budgets"] else model.coarse_grid**2)
    keeps = tuple(sorted({max(1, round(longest * share_kept)) for share_kept in (0.25, 0.4, 0.55, 0.7, 0.85)}))
    kinds = ({"keeps": keeps, "prune": kind} for kind in PRUNE_KINDS)
    return bench.measured(bench.opened, {}, *(fullest | kind for kind in kinds))


def _zfe(bench: Bench) -> list[Result]:
    model = bench.need_zoomvit()
    rows = []
    for kind in ("none", "fixed", "soft"):
        changes = {"model_args": bench.vit_config().model_args | {"zfe": kind}} if kind != model.zfe else {}
        for seed in bench.seeds:
            rows += bench.measured(bench.variant(kind, seed, **changes), {"zfe": kind}, bench.sweep())
    return rows


def _zoom_in_training(bench: Bench) -> list[Result]:
    model, rows = bench.need_zoomvit(), []
    if bench.vit_config().zoom_draw == "alpha":
        fixed: tuple[float, ...] = (0.03, 0.1)
    else:
        most = bench.vit_config().max_zoomed or model.coarse_grid**2
        fixed = (round(most / 2), most)
    for value in (None, *fixed):
        label = "random" if value is None else f"fixed-{value:g}"
        for seed in bench.seeds:
            opened = bench.variant(label, seed, fixed_zoom=value)
            rows += bench.measured(opened, {"zoom in training": label}, bench.sweep())
    return rows


def _zoomer_depth(bench: Bench) -> list[Result]:
    if bench.maps is None:
        raise UsageError("--study zoomer-depth: zoomers are measured against their teacher's maps; give --maps")
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
            found = measure_zoomer(opened, loader, bench.device, precision=bench.config.evaluation.precision)
            n = int(found.pop("count"))
            setting = {"blocks": blocks} | drop_none({"precision": found.pop("precision", None)})
            about = bench.about(opened) | {"setting": setting}
            rows += [
                Result(**about, metric=name, n=n, value=value) for name, value in found.items() if name != "setting"
            ]
            image = torch.zeros(1, 3, size, size, device=bench.device)
            macs = count_macs(lambda opened=opened, image=image: opened.model(image))
            weights = sum(weight.numel() for weight in opened.model.parameters())
            rows.append(Result(**about, metric="gmacs", n=1, value=macs / 1e9))
            rows.append(Result(**about, metric="parameters", n=1, value=weights))
            if vit is not None:
                zoomer, _ = load_zoomer(opened.path)
                rows += bench.measured(vit, setting, bench.sweep(), scores="zoomer", zoomer=zoomer)
    return rows


def _score_sources(bench: Bench) -> list[Result]:
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
        for seed in bench.seeds:
            opened = bench.variant(name, seed, **({} if name == own else {"scores": name}))
            if opened is not bench.opened:
                rows += bench.measured(opened, {"trained with": name}, bench.sweep(), scores=name)
    return rows


def _test_time_zoom(bench: Bench) -> list[Result]:
    if bench.zoomer is None:
        raise UsageError("--study test-time-zoom: give --zoomer RUN, whose scores a plain ViT is to zoom by")
    zoomer, wanted = load_zoomer(bench.zoomer)
    check_normalisation(wanted, bench.opened.preprocessing.mean, bench.opened.preprocessing.std)
    rows = bench.measured(bench.opened, {"zoom": "none"}, {"alphas": (), "budgets": ()})
    asked = bench.config.evaluation
    for eta in (2.0, 0.5):
        try:
            twin = zooming_twin(bench.opened.model, bench.opened.preprocessing.image_size, eta)
        except ValueError as error:
            raise UsageError(f"{bench.opened.path}: --study test-time-zoom: {error}") from error
        opened = replace(bench.opened, model=twin)
        sweep = {"alphas": asked.alphas or (() if asked.budgets else PAPER_ALPHAS), "budgets": asked.budgets}
        rows += bench.measured(opened, {"zoom": "at test time", "eta": eta}, sweep, scores="zoomer", zoomer=zoomer)
    return rows


@torch.inference_mode()
def _nine_crops(bench: Bench) -> list[Result]:
    opened = bench.opened
    side = opened.preprocessing.image_size
    large = round(side * 384 / 224)
    loader = bench.loader(opened, image_size=large)
    config = replace(bench.config.evaluation, **bench.one_zoom())
    source = choose_run_source(opened, config.scores, loader.maps)
    if source is not None and source.name == "maps":
        raise UsageError("--study nine-crops: maps are of whole images; choose --scores zoomer or another")
    zoom = operating_points(opened.model, source, config)[0]
    ready = OpenRun(opened, source, device=config.device, precision=config.precision)
    answers: Answers = answers_for(opened, loader, config)
    places = [round((large - side) * step / 2) for step in range(3)]
    ranks: dict[str, list[torch.Tensor]] = {"any of 9": [], "centre of 9": [], "mean of 9": []}
    for number, batch in enumerate(loader):
        prepared = ready.prepare(batch)
        each, logits = [], []
        for top, left in itertools.product(places, places):
            crop = prepared["image"][:, :, top : top + side, left : left + side]
            found = ready.respond(prepared | {"image": crop}, zoom).logits
            logits.append(found.softmax(1))
            each.append(answers.ranks(found, batch))
        ranks["any of 9"].append(torch.stack(each).amin(0))
        ranks["centre of 9"].append(each[4])
        ranks["mean of 9"].append(answers.ranks(torch.stack(logits).mean(0), batch))
        bench.progress("nine-crops", number + 1, len(loader))
    rows = bench.measured(
        opened, {"view": "whole image"}, bench.one_zoom() if "alpha" in setting_names(opened.model) else {"alphas": ()}
    )
    for name, found in ranks.items():
        judged = torch.cat(found)
        judged = judged[judged >= 0]
        about = bench.about(opened) | {"setting": {"view": name, **zoom.settings}}
        rows.append(share(**about, metric="top1", n=len(judged), right=int((judged == 0).sum())))
    once = next(row.value for row in rows if row.metric == "gmacs")
    about = bench.about(opened) | {"setting": {"view": "any of 9", **zoom.settings}}
    return [*rows, Result(**about, metric="gmacs", n=1, value=9 * once)]


def _backbone_size(bench: Bench) -> list[Result]:
    bench.need_zoomvit()
    config = bench.vit_config()
    named = "embed_dim" not in config.model_args
    rows: list[Result] = []
    for name, times in (("tiny", 0.5), ("small", 1.0), ("base", 2.0)):
        changes: dict[str, Any] = {"init_from": None}
        if named:
            changes["model"] = f"zoomvit_{name}_patch16_224"
        else:
            heads, width = config.model_args.get("num_heads", 6), config.model_args["embed_dim"]
            width = max(1, round(width * times / heads / 4)) * heads * 4
            name = f"width {width}"
            changes["model_args"] = config.model_args | {"embed_dim": width}
        for seed in bench.seeds:
            opened = bench.variant(name.replace(" ", "-"), seed, **changes)
            rows += bench.measured(opened, {"backbone": name}, bench.sweep())
    bench.notes.append("every size is trained from scratch, the run at hand is not among them if it was not")
    return rows


def _selection(bench: Bench) -> list[Result]:
    model = bench.opened.model
    if "exit" not in setting_names(model):
        raise UsageError(f"{bench.opened.path}: --study selection needs a cfvit_* or lfvit_* run")
    if trained_with(bench.opened) != "own":
        raise UsageError(f"{bench.opened.path}: --study selection compares how the model chooses by itself")
    rows: list[Result] = []
    for name in model.SELECTIONS:
        changes = {"model_args": bench.vit_config().model_args | {"selection": name}} if name != model.selection else {}
        for seed in bench.seeds:
            rows += bench.measured(bench.variant(name, seed, **changes), {"selection": name}, bench.sweep())
    return rows


def _errors(bench: Bench) -> list[Result]:
    opened, loader = bench.opened, bench.loader(bench.opened)
    bench.need_zoomvit()
    config = replace(bench.config.evaluation, **bench.one_zoom())
    source = choose_run_source(opened, config.scores, loader.maps)
    zoom = operating_points(opened.model, source, config)[0]
    if source is None or source.name == "none":
        raise UsageError("--study errors: nothing is zoomed")
    ready = OpenRun(opened, source, device=config.device, precision=config.precision)
    answers = answers_for(opened, loader, config)
    verdicts, pictured = analyse_errors(ready, loader, zoom, answers, bench.progress)
    write_errors(opened.path, verdicts, pictured, opened.settings.get("classes") or [])
    about = bench.about(opened)
    return error_results(verdicts, about["run"], about["model"], about["seed"], zoom)


STUDIES: dict[str, Study] = {
    "alpha-eta": Study("Threshold and zoom factor (Table 9)", True, _alpha_eta),
    "pruning": Study("Tokens taken away, highest or lowest first (Table 5, Fig. 6)", False, _pruning),
    "zfe": Study("Zoom factor embedding (Table 4)", True, _zfe),
    "zoom-in-training": Study("Random or fixed zoom in training (Table 3)", True, _zoom_in_training),
    "zoomer-depth": Study("Residual blocks of the zoomer (Tables 2 and 10)", True, _zoomer_depth),
    "score-sources": Study("What tells where to zoom (Table 11)", True, _score_sources),
    "test-time-zoom": Study("A plain ViT that zooms without training (Table 13)", False, _test_time_zoom),
    "nine-crops": Study("Nine crops of a larger image (Table 14)", False, _nine_crops),
    "backbone-size": Study("Size of the backbone (Table 8)", True, _backbone_size),
    "selection": Study("What the second stage refines (CF-ViT, Table 4; LF-ViT, Table 6)", True, _selection),
    "errors": Study("Errors of the zoomer and of the backbone (section I)", False, _errors),
}
