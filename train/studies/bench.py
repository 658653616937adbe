"""The workbench of a study: its settings, the finished run, and ways to train and measure variants of the run.

Variants are trained under the run's own settings into RUN/studies, where they are kept and resumed. The same study
takes minutes on the demo and days on ImageNet.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

from zpipe.schemas.atomic import refuse_links
from zpipe.schemas.errors import UsageError
from zpipe.schemas.model_config import CONFIG_NAME
from zpipe.schemas.progress import Progress, silent
from zpipe.schemas.storage import as_path
from zpipe.train.checkpoint import Run, load_run
from zpipe.train.data.join import Missing
from zpipe.train.data.loader import RelevanceLoader
from zpipe.train.device import resolve_device
from zpipe.train.evaluation.evaluate import answers_for, measure
from zpipe.train.evaluation.inference import OpenRun, Tally, choose_run_source, eval_loader
from zpipe.train.evaluation.judge import Classifier
from zpipe.train.evaluation.operating_points import EvalConfig, operating_points
from zpipe.train.evaluation.results import Result, identity, results_of
from zpipe.train.fit.distributed import Workers, run_training
from zpipe.train.fit.train_vit import VitConfig, train_vit
from zpipe.train.fit.train_zoomer import ZoomerConfig, train_zoomer
from zpipe.train.models.operating_points import setting_names
from zpipe.train.models.zoomer import Zoomer
from zpipe.train.scoring import ScoreSource, choose_source
from zpipe.train.settings import rebuild, with_settings

PAPER_ALPHAS = (1.0, 0.15, 0.05, 0.01, 0.005)  # Table 9
PAPER_ALPHA = 0.03  # section 5.1, the default of the paper


@dataclass(frozen=True, kw_only=True)
class StudyConfig:
    """Settings of a study."""

    evaluation: EvalConfig = field(default_factory=lambda: EvalConfig(alphas=()))
    """How to measure. If it has alphas or budgets, they replace those that the study chooses."""
    seeds: tuple[int, ...] = ()
    """The seeds of the runs to compare; empty for the seed of the finished run."""
    epochs: float | None = None
    """The epochs of the trainings of the study; None for those of the finished run."""
    workers: Workers = field(default_factory=Workers)
    """The training processes; they share the batch of the finished run."""


@dataclass(frozen=True, kw_only=True)
class WantedMaps:
    """What `map-methods` asks for: the maps of several attribution methods, of the images to train and to measure on.

    They differ from a store that exists in their method only.
    """

    own: Path
    """The store that the zoomer of the run learned from."""
    train: Path
    """The shards that the zoomer was trained on."""
    val: Path
    """The shards to measure on."""
    val_maps: Path | None
    """A store of the shards to measure on, if there is one already."""
    out: Path
    """The folder for the stores that are made, by method and name."""
    val_name: str
    """The name of the stores of the shards to measure on; other shards have another name."""


@dataclass(frozen=True, kw_only=True)
class MethodMaps:
    """The relevance stores of several attribution methods; both mappings have the methods as keys, in one order."""

    train: Mapping[str, Path]
    """The stores of the shards that the zoomer was trained on."""
    val: Mapping[str, Path]
    """The stores of the shards to measure on."""
    teacher: Classifier | None
    """The teacher, which can judge the maps; None if its images are not square."""
    classes: str | None
    """How the labels of the shards become classes of the teacher, as in `JudgeConfig`."""
    notes: tuple[str, ...] = ()
    """Lines for the user about what was left out and why."""


@dataclass(frozen=True, kw_only=True)
class StudyInputs:
    """The inputs of a study."""

    run: Path
    """The finished run that the study is about."""
    shards: Path
    """The images to measure on."""
    maps: Path | None = None
    """The relevance store of these shards, for studies that need one."""
    zoomer: Path | None = None
    """A finished zoomer, for `test-time-zoom`."""
    method_maps: Callable[[WantedMaps], MethodMaps] | None = None
    """For `map-methods`: makes the maps that it asks for. Training does not know the pipeline, which makes maps."""


@dataclass(frozen=True)
class Study:
    """An experiment of the paper."""

    title: str
    """What it shows, and where the paper has it."""
    trains: bool
    """Whether it trains variants of the run."""
    run: Callable[[Bench], list[Result]]
    """The function that runs it."""


class Bench:
    """The finished run, the shards to measure on, and ways to train and to measure.

    Args:
        study: the name of the study.
        inputs: its inputs.
        config: its settings.
        progress: called while models train and are measured.
        say: called with lines about training processes, see `run_training`.

    Attributes:
        opened: the finished run.
        seeds: the seeds to train with.
        notes: lines for the user about what the study left out and why.
        tallies: the passes over the images so far.
    """

    def __init__(
        self,
        study: str,
        inputs: StudyInputs,
        config: StudyConfig,
        progress: Progress = silent,
        say: Callable[[str], None] = lambda line: None,
    ) -> None:
        self.study, self.config, self.progress, self.say = study, config, progress, say
        self.shards, self.maps, self.zoomer = inputs.shards, inputs.maps, inputs.zoomer
        self.method_maps = inputs.method_maps
        self.opened = load_run(inputs.run)
        self.device = resolve_device(config.evaluation.device)
        self.seeds: list[int | None] = list(config.seeds) or [identity(self.opened, study)["seed"]]
        self.notes: list[str] = []
        self.tallies: list[Tally] = []

    # -- settings

    def vit_config(self, opened: Run | None = None) -> VitConfig:
        """The settings of a run, with its normalisation, so that its variants share it."""
        run = opened or self.opened
        config = rebuild(VitConfig(), run.settings)
        return replace(config, mean=run.preprocessing.mean, std=run.preprocessing.std)

    def need_zoomvit(self) -> Any:
        """The run's model.

        Raises:
            UsageError: it is no ZoomViT.
        """
        if not hasattr(self.opened.model, "tokenise"):
            raise UsageError(f"{self.opened.path}: study {self.study} needs a zoomvit_* run")
        return self.opened.model

    def sweep(self, times: float = 1.0) -> dict[str, Any]:
        """The alphas and budgets to measure: those of the config, or else some that fit the training of the run.

        Args:
            times: factor of the budgets if they are not those of the config.
        """
        evaluation = self.config.evaluation
        if evaluation.alphas or evaluation.budgets:
            return {"alphas": evaluation.alphas or (), "budgets": evaluation.budgets}
        model = self.opened.model
        if "alpha" not in setting_names(model):
            return {"alphas": (), "budgets": ()}
        if self.vit_config().zoom_draw == "alpha" or not hasattr(model, "tokenise"):
            return {"alphas": PAPER_ALPHAS, "budgets": ()}
        return {"alphas": (), "budgets": self.quarters(times)}

    def quarters(self, times: float = 1.0) -> tuple[int, ...]:
        """Budgets of a ZoomViT from none to all of the cells that its training may zoom, in quarters."""
        model: Any = self.opened.model
        limit = self.vit_config().max_zoomed
        max_zoomed = model.coarse_grid**2 if limit is None else limit
        return tuple(sorted({round(max_zoomed * times * quarter / 4) for quarter in range(5)}))

    def one_zoom(self) -> dict[str, Any]:
        """A single alpha or budget to measure the run at."""
        if "alpha" not in setting_names(self.opened.model):
            return {"alphas": (), "budgets": ()}
        sweep = self.sweep()
        if budgets := sweep["budgets"]:
            return {"alphas": (), "budgets": (budgets[len(budgets) // 2],)}
        return {"alphas": (sweep["alphas"][0] if self.config.evaluation.alphas else PAPER_ALPHA,), "budgets": ()}

    # -- training

    def variant(self, label: str, seed: int | None, *, zoomer: Path | None = None, **changes: Any) -> Run:
        """Train the finished run with some settings changed, unless this was done before.

        Args:
            label: the folder's name without the seed.
            seed: of the training; None for the run's own.
            zoomer: another finished zoomer than the run's own.
            changes: settings by dotted name, such as "train.lr".

        Returns:
            The variant; the finished run itself if nothing changes.
        """
        own = self.vit_config()
        config = with_settings(own, self._common(own.train.seed, seed) | changes)
        settings = self.opened.settings
        places: dict[str, Path | None] = {
            name: None if settings.get(name) is None else as_path(settings[name]) for name in ("zoomer", "maps")
        }
        if config == own and zoomer in (None, places["zoomer"]):
            return self.opened
        if zoomer is not None:
            places["zoomer"] = zoomer
        folder = self.folder / f"{label}-seed-{config.train.seed}"
        if config.scores not in (None, "zoomer"):
            places["zoomer"] = None
        if config.scores not in (None, "maps"):
            places["maps"] = None
        self._train(train_vit, places | {"shards": self.train_shards(self.opened), "out": folder}, config)
        return load_run(folder)

    def zoomer_variant(
        self, label: str, seed: int | None, base: Run, *, maps: Path | None = None, **changes: Any
    ) -> Run:
        """As `variant`, for the zoomer `base`; `maps` is another relevance store of its shards than its own."""
        own = rebuild(ZoomerConfig(), base.settings)
        config = with_settings(own, self._common(own.train.seed, seed) | changes)
        own_maps = as_path(base.settings["maps"])
        if config == own and maps in (None, own_maps):
            return base
        folder = self.folder / f"{label}-seed-{config.train.seed}"
        places: dict[str, Path | None] = {"shards": self.train_shards(base), "maps": maps or own_maps, "out": folder}
        self._train(train_zoomer, places, config)
        return load_run(folder)

    def _train(
        self, function: Callable[..., Any], places: dict[str, Path | None], config: VitConfig | ZoomerConfig
    ) -> None:
        out, begun = cast(Path, places["out"]), time.monotonic()
        is_new = not (out / CONFIG_NAME).is_file()

        def show(stage: str, done: int, total: int, **facts: object) -> None:
            self.progress(stage, done, total, **facts, of=out.name)

        run_training(function, places, config, self.config.workers, progress=show, say=self.say)
        took = f"trained in {time.monotonic() - begun:.0f} s" if is_new else "was trained before"
        self.say(f"study {self.study}: {out.name} {took}")

    def _common(self, own_seed: int, seed: int | None) -> dict[str, Any]:
        changes: dict[str, Any] = {"train.seed": own_seed if seed is None else seed}
        return changes if self.config.epochs is None else changes | {"train.epochs": self.config.epochs}

    @property
    def folder(self) -> Path:
        """The folder for what the study makes.

        Raises:
            UsageError: it is a link.
        """
        refuse_links(self.opened.path, ("studies", f"studies/{self.study}"), "training run")
        return self.opened.path / "studies" / self.study

    def train_shards(self, opened: Run) -> Path:
        """The shards that a run was trained on.

        Raises:
            UsageError: the run does not say.
        """
        if "shards" not in opened.settings:
            raise UsageError(f"{opened.path}: doesn't say what it was trained on; study {self.study} needs to train")
        return as_path(opened.settings["shards"])

    # -- measuring

    def loader(
        self,
        opened: Run,
        image_size: int | None = None,
        missing: Missing = "uniform",
        maps: Path | None = None,
    ) -> RelevanceLoader:
        """The images to measure on, in the view of a run.

        Args:
            opened: the run.
            image_size: another size than that of the run.
            missing: how to handle samples without a usable map, see `RelevanceLoader`.
            maps: another relevance store than that of the inputs.
        """
        preprocessing = opened.preprocessing
        if image_size is not None:
            preprocessing = replace(preprocessing, image_size=image_size)
        config = self.config.evaluation
        return eval_loader(
            preprocessing,
            self.shards,
            maps or self.maps,
            batch_size=config.batch_size,
            data_workers=config.data_workers,
            missing=missing,
            damaged=config.damaged,
            join=config.join,
            device=config.device,
        )

    def images(self, loader: RelevanceLoader) -> Tally:
        """The batches of a loader; what they leave out is added to the account of the study."""
        self.tallies.append(Tally(loader))
        return self.tallies[-1]

    def ready(
        self, opened: Run, loader: RelevanceLoader, *, scores: str | None = None, zoomer: Zoomer | None = None
    ) -> OpenRun:
        """Open a run so that it can answer.

        Args:
            opened: the run.
            loader: the images, with their relevance store for the source "maps".
            scores: the name of the source of the scores; None for that of the training.
            zoomer: the zoomer to use instead of the run's own.
        """
        if zoomer is not None:
            source: ScoreSource | None = choose_source(
                "zoomer", opened.model, zoomer=zoomer, origin=self.zoomer or "the zoomer", store=loader.maps
            )
        else:
            source = choose_run_source(opened, scores, loader.maps)
        evaluation = self.config.evaluation
        return OpenRun(opened, source, device=evaluation.device, precision=evaluation.precision)

    def measured(
        self,
        opened: Run,
        setting: dict[str, Any],
        *zoomings: dict[str, Any],
        scores: str | None = None,
        zoomer: Zoomer | None = None,
    ) -> list[Result]:
        """Measure a run at the operating points of each of `zoomings`, in one pass.

        Args:
            opened: the run.
            setting: what the study varied.
            zoomings: fields of `EvalConfig`: alphas, budgets, keeps or prune.
            scores: the name of the source of the scores; None for that of the training.
            zoomer: the zoomer to use instead of the run's own.
        """
        loader = self.loader(opened)
        ready = self.ready(opened, loader, scores=scores, zoomer=zoomer)
        config = self.config.evaluation
        each = (operating_points(opened.model, ready.source, replace(config, **zooming)) for zooming in zoomings)
        points = list({point.name: point for point in itertools.chain.from_iterable(each)}.values())
        rows = measure(ready, self.images(loader), points, answers_for(opened, loader, config), self._evaluating)
        about = self.about(opened) | {"setting": setting}
        return [result for row in rows for result in results_of(row, about)]

    def about(self, opened: Run) -> dict[str, Any]:
        """The fields of a `Result` that identify its run; a variant's name is its path from the folder of the run."""
        about = identity(opened, self.study)
        if self.opened.path in opened.path.parents:
            about["run"] = str(opened.path.relative_to(self.opened.path.parent))
        return about

    def _evaluating(self, stage: str, done: int, total: int, **facts: object) -> None:
        self.progress(f"{self.study}: {stage}", done, total, **facts)
