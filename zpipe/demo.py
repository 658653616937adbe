"""The whole pipeline on embedded data: scenes, teacher, maps, Zoomer, ZoomViT, evaluation, report.

Every stage is the one that users run on their own data; this file only decides on the settings and on the order.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from zpipe.pipeline.extract import ExtractConfig, extract_teacher_maps
from zpipe.pipeline.make_shards import SceneSource, make_shards
from zpipe.pipeline.scenes import SceneConfig
from zpipe.schemas.atomic import claim_folder, write_json
from zpipe.schemas.errors import UsageError
from zpipe.schemas.formats import check_format, header, read_json
from zpipe.schemas.progress import Progress, silent
from zpipe.train.data.transforms import ViewConfig
from zpipe.train.evaluation.evaluate import evaluate
from zpipe.train.evaluation.operating_points import EvalConfig
from zpipe.train.evaluation.pictures import contact_sheet
from zpipe.train.evaluation.results import Result, results_path, write_results
from zpipe.train.fit.config import TrainConfig
from zpipe.train.fit.train_vit import VitConfig, train_vit
from zpipe.train.fit.train_zoomer import ZoomerConfig, train_zoomer
from zpipe.train.report import ReportConfig
from zpipe.train.report import report as write_report
from zpipe.train.studies.bench import StudyConfig, StudyInputs
from zpipe.train.studies.registry import run_study

MARKER = "demo.json"
FORMAT = "zpipe-demo"
VERSION = 1
REPORT = "report.json"
SHEET = "contact_sheet.png"
PAGE = "report"
STUDIES = ("errors", "pruning")  # those that train nothing and suit a ZoomViT
SHOWN_RUNS = ("zoomvit", "plain", "teacher", "zoomer")

SIDE = 48  # pixels of a scene
COARSE = 8  # pixels of an unzoomed patch; the digits are 11 to 13
PLAIN = 6  # pixels of the control's patches: 64 tokens, a ZoomViT with 9 zoomed cells has 63
ALPHAS = (0.05, 0.1, 0.2)  # thresholds beside them, on the page only
BUDGETS = (0, 3, 4, 6, 9)  # zoomed cells; a digit touches four at most places
SHOWN_BUDGET = 4
BODY = {"embed_dim": 96, "depth": 6, "num_heads": 3}
TEACHER_PATCH = 4
BATCH = 64


@dataclass(frozen=True, kw_only=True)
class Lesson:
    """One step of the teacher's curriculum: a small scene with few distractors first, then the real one.

    A plain ViT that starts on the real scenes stays at chance for as long as the whole demo may take.
    """

    side: int
    pieces: tuple[int, int]
    scenes: int
    steps: int
    lr: float


@dataclass(frozen=True, kw_only=True)
class DemoSize:
    """How much of everything there is. The last lesson's scenes also train both students."""

    lessons: tuple[Lesson, ...]
    map_scenes: int
    val_scenes: int
    zoomer_steps: int
    vit_steps: int


FULL = DemoSize(
    lessons=(
        Lesson(side=16, pieces=(0, 0), scenes=16_000, steps=400, lr=5e-3),
        Lesson(side=24, pieces=(1, 2), scenes=20_000, steps=300, lr=5e-3),
        Lesson(side=SIDE, pieces=(4, 5), scenes=15_000, steps=220, lr=4e-3),
    ),
    map_scenes=2_000,
    val_scenes=1_000,
    zoomer_steps=200,
    vit_steps=200,
)
QUICK = DemoSize(
    lessons=(
        Lesson(side=16, pieces=(0, 0), scenes=192, steps=3, lr=5e-3),
        Lesson(side=SIDE, pieces=(4, 5), scenes=192, steps=3, lr=4e-3),
    ),
    map_scenes=192,
    val_scenes=64,
    zoomer_steps=3,
    vit_steps=3,
)


@dataclass(frozen=True, kw_only=True)
class Marker:
    """The content of `demo.json`."""

    format: str | None = None
    version: int | None = None
    seed: int
    quick: bool


@dataclass(frozen=True, kw_only=True)
class Report:
    """What is shown of `report.json`."""

    rows: list[dict[str, str | float | None]]
    maps: dict[str, str | float | None]
    seconds: dict[str, float] = field(default_factory=dict)
    notes: list[str]


def run_demo(
    out: Path,
    *,
    seed: int = 0,
    quick: bool = False,
    progress: Progress = silent,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Run every stage into `out`; a demo that was begun there is resumed.

    Args:
        out: the folder, new, empty, or that of a demo with the same settings.
        seed: of everything that is random.
        quick: run the same stages on too little data to learn anything.
        progress: called within the stages.
        say: called with a line per stage.

    Returns:
        What `report.json` holds, see `results`, with {rows, maps, seconds, notes}. `report/index.html` and
        `contact_sheet.png` lie beside it.

    Raises:
        UsageError: `out` holds something else.
    """
    out = Path(out)
    claim_folder(out, MARKER, "demo")
    settings = {"seed": seed, "quick": quick}
    remedy = "give another folder"
    if (out / MARKER).is_file():
        marker = read_json(out / MARKER, "a demo's settings", type=Marker, remedy=remedy)
        if marker.version is not None:  # earlier demos don't state one
            check_format(out / MARKER, asdict(marker), FORMAT, VERSION, remedy=remedy)
        if (marker.seed, marker.quick) != (seed, quick):
            raise UsageError(f"{out}: holds a demo with other settings; give another folder")
    else:
        write_json(out / MARKER, header(FORMAT, VERSION) | settings)
    if (out / REPORT).is_file() and (out / PAGE / "index.html").is_file():
        report = read_json(out / REPORT, "a demo's report", type=Report, remedy="delete it to make it again")
        say(f"{out}: finished before; this is its report")
        return asdict(report)
    demo = Demo(out, seed, QUICK if quick else FULL, progress, say)
    demo.run()
    about = settings | {"maps": demo.map_metrics(), "seconds": demo.seconds, "notes": demo.notes()}
    return write_results(out / REPORT, "demo", about, demo.rows(), demo.measured)


class Demo:
    """The stages of the demo. A stage whose output exists is not repeated."""

    def __init__(self, out: Path, seed: int, size: DemoSize, progress: Progress, say: Callable[[str], None]) -> None:
        self.out, self.seed, self.size, self._progress, self.say = out, seed, size, progress, say
        self._stage = ""
        self.train_shards = self.out / "scenes" / f"{SIDE}px"
        self.map_shards = self.out / "scenes" / "maps"
        self.val_shards = self.out / "scenes" / "val"
        self.seconds: dict[str, float] = {}
        self.results: dict[str, Any] = {}  # rows of evaluations by what they are of
        self.measured: list[Result] = []

    def run(self) -> None:
        """Run every stage."""
        stages: list[tuple[str, Callable[[], str]]] = [("scenes", self._scenes)]
        stages += [
            (f"teacher-{lesson.side}px", partial(self.lesson, number))
            for number, lesson in enumerate(self.size.lessons)
        ]
        stages += [
            ("teacher-evaluation", self._evaluate_teacher),
            ("maps", self._maps),
            ("zoomer", self._zoomer),
            ("zoomer-evaluation", self._evaluate_zoomer),
            ("zoomvit", self.zoomvit),
            ("plain-vit", self.plain),
            ("evaluation", self._evaluate_vits),
            ("contact-sheet", self._sheet),
            ("studies", self._studies),
            ("report", self._report),
        ]
        for number, (name, stage) in enumerate(stages, start=1):
            self.seconds[name] = self.run_stage(f"{number}/{len(stages)} {name}", stage)
        self.seconds["all"] = round(sum(self.seconds.values()), 1)

    def run_stage(self, title: str, stage: Callable[[], str]) -> float:
        """Run a stage and say what it did; returns how many seconds it took."""
        self._stage = title
        begun = time.monotonic()
        outcome = stage()
        seconds = round(time.monotonic() - begun, 1)
        self.say(f"{title}: {outcome} ({seconds:.0f} s)")
        return seconds

    def show(self, stage: str, done: int, total: int, **facts: object) -> None:
        """Report the progress of the present stage."""
        self._progress(self._stage, done, total, **facts)

    def _scenes(self) -> str:
        wanted = [(f"{lesson.side}px", lesson.scenes, "train", lesson, 0) for lesson in self.size.lessons]
        last = self.size.lessons[-1]
        wanted += [("maps", self.size.map_scenes, "train", last, 1), ("val", self.size.val_scenes, "val", last, 2)]
        for name, count, split, lesson, offset in wanted:
            config = SceneConfig(image_size=lesson.side, pieces=lesson.pieces)
            source = SceneSource(
                count=count, split=split, seed=3 * self.seed + offset, config=config, shard_size=min(1000, count // 2)
            )
            make_shards(source, self.out / "scenes" / name, progress=self.show)
        return f"{sum(count for _, count, *_ in wanted):,} made"

    def _recipe(self, scenes: int, steps: int, lr: float) -> TrainConfig:
        epoch = scenes // BATCH  # steps in an epoch; its last batch, not full, is dropped
        return TrainConfig(
            epochs=steps / epoch,
            warmup_epochs=min(20, steps // 3) / epoch,
            batch_size=BATCH,
            opt="muon",
            opt_args={"nesterov": True},
            lr=lr,
            clip_grad=1.0,
            seed=self.seed,
            device="cpu",
        )

    def _view(self, shift: int, side: int) -> ViewConfig:
        """Only small shifts: digits can't be mirrored, and their size within the frame tells them from distractors."""
        smallest = ((side - shift) / side) ** 2
        return ViewConfig(crop_scale=(smallest, 1.0), crop_ratio=(1.0, 1.0), flip=0.0, crop_pct=1.0)

    def vit_config(self, steps: int, lr: float, lesson: Lesson, **settings: Any) -> VitConfig:
        """The settings of a ViT's training on a lesson's scenes."""
        return VitConfig(
            image_size=lesson.side,
            view=self._view(1 if lesson.side < 24 else 2, lesson.side),
            train=self._recipe(lesson.scenes, steps, lr),
            **settings,
        )

    def teacher_run(self, number: int, width: int = BODY["embed_dim"]) -> Path:
        """The folder of a lesson's run; that of the last lesson is the teacher."""
        last = number == len(self.size.lessons) - 1
        name = "teacher" if last else f"teacher-{self.size.lessons[number].side}px"
        return self.out / (name + width_suffix(width))

    def lesson(self, number: int, width: int = BODY["embed_dim"]) -> str:
        """Train a lesson of the teacher."""
        lesson = self.size.lessons[number]
        before = str(self.teacher_run(number - 1, width)) if number else None
        body = {"patch_size": TEACHER_PATCH} | BODY | {"embed_dim": width}
        config = self.vit_config(
            lesson.steps, lesson.lr, lesson, model="deit_tiny_patch16_224", model_args=body, init_from=before
        )
        shards = self.out / "scenes" / f"{lesson.side}px"
        train_vit(shards, self.teacher_run(number, width), config, progress=self.show)
        return f"{lesson.steps} steps"

    def _evaluate_teacher(self) -> str:
        self.results["teacher"] = self.evaluate("teacher")[0]
        return f"top-1 {self.results['teacher']['top1']:.1%}"

    def evaluate(self, run: str, **settings: Any) -> list[dict[str, Any]]:
        """The rows of a run's evaluation on the validation scenes; settings: of `EvalConfig`."""
        by_maps = settings.get("scores") == "maps"
        maps = self.out / "maps" / "val" if by_maps or run == "zoomer" else None
        config = EvalConfig(batch_size=100, device="cpu", **settings)
        folder = self.out / run
        target = folder / "evaluation-maps.json" if by_maps else results_path(folder, "evaluation")
        results = evaluate(folder, self.val_shards, config, maps=maps, out=target, progress=self.show)
        self.measured += [Result(**result) for result in results["results"]]
        return results["rows"]

    def _maps(self) -> str:
        config = ExtractConfig(weights=str(self.out / "teacher"), batch_size=32, device="cpu")
        count = 0
        for shards, name in ((self.map_shards, "train"), (self.val_shards, "val")):
            count += extract_teacher_maps(shards, self.out / "maps" / name, config, progress=self.show).count
        return f"{count:,} extracted on Ray"

    def _zoomer(self) -> str:
        config = ZoomerConfig(
            num_blocks=2,
            width=32,
            image_size=SIDE,
            view=self._view(8, SIDE),
            train=self._recipe(self.size.map_scenes, self.size.zoomer_steps, 4e-3),
        )
        train_zoomer(self.map_shards, self.out / "maps" / "train", self.out / "zoomer", config, progress=self.show)
        return f"{self.size.zoomer_steps} steps"

    def _evaluate_zoomer(self) -> str:
        self.results["zoomer"] = self.evaluate("zoomer")[0]
        row = self.results["zoomer"]
        return f"peak in the digit's box: teacher {row['teacher_pointing_game']:.1%}, zoomer {row['pointing_game']:.1%}"

    def zoomvit(self, scores: str | None = None) -> str:
        """Train the ZoomViT, or one under another source of scores."""
        config = self.vit_config(
            self.size.vit_steps,
            3e-3,
            self.size.lessons[-1],
            model="zoomvit_tiny_patch16_224",
            model_args={"patch_size": COARSE // 2, "zoom_factor": 0.5} | BODY,
            init_from=str(self.out / "teacher"),
            zoom_draw="budget",
            max_zoomed=max(BUDGETS),
            scores=scores,
        )
        out = self.out / ("zoomvit" if scores is None else f"zoomvit-{scores}")
        zoomer = self.out / "zoomer" if scores is None else None
        train_vit(self.train_shards, out, config, zoomer=zoomer, progress=self.show)
        return f"{self.size.vit_steps} steps from the teacher's weights"

    def plain(self, width: int = BODY["embed_dim"]) -> str:
        """Train the plain ViT, or one of another width."""
        config = self.vit_config(
            self.size.vit_steps,
            3e-3,
            self.size.lessons[-1],
            model="deit_tiny_patch16_224",
            model_args={"patch_size": PLAIN} | BODY | {"embed_dim": width},
            init_from=str(self.teacher_run(len(self.size.lessons) - 1, width)),
        )
        train_vit(self.train_shards, self.out / f"plain{width_suffix(width)}", config, progress=self.show)
        return f"{self.size.vit_steps} steps from the teacher's weights"

    def _evaluate_vits(self) -> str:
        rows = self.evaluate("zoomvit", alphas=ALPHAS, budgets=BUDGETS)
        self.results["zoomvit"] = [row for row in rows if "budget" in row]
        self.results["zoomvit-maps"] = self.evaluate("zoomvit", alphas=(), budgets=(SHOWN_BUDGET,), scores="maps")
        self.results["plain"] = self.evaluate("plain")[0]
        best = max(self.results["zoomvit"], key=lambda row: row["top1"])
        return f"ZoomViT at best {best['top1']:.1%}, plain ViT {self.results['plain']['top1']:.1%}"

    def _sheet(self) -> str:
        path = self.out / SHEET
        contact_sheet(self.out / "zoomvit", self.val_shards, self.out / "maps" / "val", path, budget=SHOWN_BUDGET)
        return str(path)

    def _studies(self) -> str:
        evaluation = EvalConfig(alphas=(), batch_size=100, device="cpu")
        for name in STUDIES:
            inputs = StudyInputs(run=self.out / "zoomvit", shards=self.val_shards)
            run_study(name, inputs, StudyConfig(evaluation=evaluation), progress=self.show)
        return f"{', '.join(STUDIES)}: {self.out / 'zoomvit' / 'results'}"

    def _report(self) -> str:
        config = ReportConfig(shards=self.val_shards, maps=self.out / "maps" / "val", device="cpu")
        return str(write_report([self.out / name for name in SHOWN_RUNS], self.out / PAGE, config, self.show))

    def rows(self) -> list[dict[str, Any]]:
        """The table of the models."""
        rows = [("teacher, plain 4 px", self.results["teacher"]), (f"plain {PLAIN} px", self.results["plain"])]
        rows += [(f"ZoomViT {row['setting']}", row) for row in self.results["zoomvit"]]
        rows += [(f"ZoomViT {row['setting']}, teacher's maps", row) for row in self.results["zoomvit-maps"]]
        return [_row(name, row) for name, row in rows]

    def map_metrics(self) -> dict[str, Any]:
        """How far the zoomer's maps are from the teacher's."""
        return {name: value for name, value in self.results["zoomer"].items() if name != "setting"}

    def notes(self) -> list[str]:
        """What to know about the table, in whole sentences."""
        zoomer, plain = self.results["zoomer"], self.results["plain"]
        notes = [
            f"the peak of the map lies in the digit's box (share of the area: {zoomer['box_share']:.1%}) in "
            f"{zoomer['teacher_pointing_game']:.1%} of scenes for the teacher, "
            f"{zoomer['pointing_game']:.1%} for the zoomer",
            f"both students start from the teacher's weights and take {self.size.vit_steps} steps",
            "the teacher's maps as scores know the label; they show what a perfect imitation of the teacher would give",
        ]
        for counted, word in ((0, "not counted"), (1, "counted")):
            zoomed = [(row["gmacs"] + counted * row["gmacs_zoomer"], row) for row in self.results["zoomvit"]]
            macs, row = min(zoomed, key=lambda pair: abs(pair[0] - plain["gmacs"]))
            notes.append(
                f"plain ViT: {plain['top1']:.1%} at {plain['gmacs']:.4f} GMACs; "
                f"ZoomViT {row['setting']}: {row['top1']:.1%} at {macs:.4f}, the zoomer {word}"
            )
        return [
            *notes,
            f"this run took {self.seconds['all'] / 60:.1f} minutes; the page: {self.out / PAGE / 'index.html'}",
        ]


def width_suffix(width: int) -> str:
    """The end of a run's name that states its width; empty for BODY's."""
    return "" if width == BODY["embed_dim"] else f"-width-{width}"


def _row(name: str, row: dict[str, Any]) -> dict[str, Any]:
    return {
        "model": name,
        "top1": row["top1"],
        "+-": row["top1_interval"],
        "tokens": row["tokens"],
        "gmacs": row["gmacs"],
        "gmacs with zoomer": row["gmacs"] + row["gmacs_zoomer"],
        "images/s": row["images_per_s"],
    }
