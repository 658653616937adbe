"""The whole line on the embedded data: scenes, teacher, maps, Zoomer, ZoomViT, evaluation, report.

Every stage is the one that users run on their own data; this file only says with which settings and in which order.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from zpipe.pipeline.extract import ExtractConfig, extract_teacher_maps
from zpipe.pipeline.make_shards import SceneSource, make_shards
from zpipe.pipeline.scenes import SceneConfig
from zpipe.schemas.atomic import claim_folder, read_json, write_json
from zpipe.schemas.errors import UsageError
from zpipe.schemas.progress import Progress, silent
from zpipe.train.data.transforms import ViewConfig
from zpipe.train.evaluation.evaluate import evaluate
from zpipe.train.evaluation.operating_points import EvalConfig
from zpipe.train.evaluation.pictures import contact_sheet
from zpipe.train.evaluation.results import Result, share, write_results
from zpipe.train.fit.config import TrainConfig
from zpipe.train.fit.train_vit import VitConfig, train_vit
from zpipe.train.fit.train_zoomer import ZoomerConfig, train_zoomer
from zpipe.train.report import ReportConfig
from zpipe.train.report import report as write_report
from zpipe.train.studies.bench import StudyConfig, run_study

MARKER = "demo.json"
SEEDS_MARKER = "demo-seeds.json"
REPORT = "report.json"
SHEET = "contact_sheet.png"
PAGE = "report"
STUDIES = ("errors", "pruning")  # those that train nothing
SHOWN_RUNS = ("zoomvit", "plain", "teacher", "zoomer")

SIDE = 48  # pixels of a scene
COARSE = 8  # pixels of an unzoomed patch; the digits are 11 to 13
PLAIN = 6  # pixels of the control's patches: 64 tokens, a ZoomViT with 9 zoomed cells has 63
ALPHAS = (0.05, 0.1, 0.2)  # thresholds beside them, on the page only
BUDGETS = (0, 3, 4, 6, 9)  # zoomed cells; a digit touches four at most places
SHOWN_BUDGET = 4
BODY = {"embed_dim": 96, "depth": 6, "num_heads": 3}
TEACHER_PATCH = 4
WIDTHS = (48,)  # of further plain ViTs in the table over seeds, beside BODY's
OTHER_SCORES = ("random", "centre", "entropy")  # what further ZoomViTs in that table are trained with
BATCH = 64


@dataclass(frozen=True, kw_only=True)
class Rival:
    """A model to be held against ZoomViT at the cost of the plain ViT of PLAIN pixels.

    evaluation: the modes it is evaluated in; one with early exit is calibrated to that cost. scores: the source of its scores.
    """

    model: str
    args: dict[str, Any]
    scores: str | None = None
    evaluation: dict[str, Any] = field(default_factory=dict)
    from_teacher: bool = True


_FINE = {"patch_size": TEACHER_PATCH} | BODY
_AROUND = {"backbone": "deit_tiny_patch16_224", "backbone_args": _FINE}
MATCHED_GMACS = 0.0487  # of the plain ViT of PLAIN pixels
RIVALS = {
    "CF-ViT": Rival(model="cfvit_small", args=_FINE | {"keep": 0.25, "split_positions": True}),
    "LF-ViT": Rival(model="lfvit_small", args=_FINE | {"region_size": 3, "split_positions": True}),
    "pruned": Rival(model="token_pruned_vit", args=_AROUND | {"prune_block": 2}, evaluation={"keeps": (16,)}),
    "pruned, zoomer": Rival(
        model="token_pruned_vit", args=_AROUND | {"prune_block": 2}, scores="zoomer", evaluation={"keeps": (16,)}
    ),
    # The most that six blocks can merge, and still dearer than the others.
    "ToMe": Rival(model="tome_vit", args=_AROUND | {"r": 20}),
    "image zoom": Rival(
        model="image_zoom",
        args={
            "backbone": "deit_tiny_patch16_224",
            "backbone_args": BODY | {"patch_size": COARSE},
            "patch_size": TEACHER_PATCH,
            "combine": "mean",
            "area": 0.05,
        },
        scores="zoomer",
    ),
    "SparseFormer": Rival(
        model="sparseformer_tiny",
        args={
            "conv_dim": 32,
            "num_tokens": 16,
            "num_points": 16,
            "focus_dim": 96,
            "cortex_dim": 192,
            "cortex_depth": 4,
            "num_heads": 16,
        },
        from_teacher=False,
    ),
}


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
    """How much of everything. The last lesson's scenes also train both students."""

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


def run_demo(
    out: Path,
    *,
    seed: int = 0,
    quick: bool = False,
    progress: Progress = silent,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Run every stage into `out`; a folder that a demo was begun in is gone on with.

    Returns {rows, maps, seconds, notes} and leaves them as `report.json`, beside `report/index.html` and `contact_sheet.png`. quick: the same
    line on almost no data, to see that it runs. Errors: :class:`UsageError` when `out` holds something else.
    """
    out = Path(out)
    claim_folder(out, MARKER, "demo")
    settings = {"format": "zpipe-demo", "seed": seed, "quick": quick}
    if (out / MARKER).is_file():
        if read_json(out / MARKER, "a demo's settings") != settings:
            raise UsageError(f"{out}: holds a demo with other settings; give another folder")
    else:
        write_json(out / MARKER, settings)
    if (out / REPORT).is_file() and (out / PAGE / "index.html").is_file():
        say(f"{out}: finished before; this is its report")
        return read_json(out / REPORT, "a demo's report")
    report = _Demo(out, seed, QUICK if quick else FULL, progress, say).run()
    write_json(out / REPORT, report)
    return report


def run_seeds(
    out: Path,
    count: int,
    *,
    quick: bool = False,
    progress: Progress = silent,
    say: Callable[[str], None] = print,
) -> list[dict[str, Any]]:
    """The demo for seeds 0 to `count` - 1, each with a plain ViT of another width, ZoomViTs under other scores, and rivals.

    Leaves every seed's demo in `out`/seed-N and all figures in `out`/results/accuracy-gmacs.json; returns a row for each
    model: means over seeds, and the lowest and highest top-1. A folder that was begun is gone on with.
    """
    out = Path(out)
    claim_folder(out, SEEDS_MARKER, "demo over seeds")
    write_json(out / SEEDS_MARKER, {"format": "zpipe-demo-seeds", "quick": quick})
    rows: list[Result] = []
    for seed in range(count):
        folder = out / f"seed-{seed}"
        told = lambda line, seed=seed: say(f"seed {seed}: {line}")  # noqa: E731
        run_demo(folder, seed=seed, quick=quick, progress=progress, say=told)
        rows += _Demo(folder, seed, QUICK if quick else FULL, progress, told).further()
    write_results(out, "accuracy-gmacs", "Accuracy and cost of every model of the demo", "scenes/val", rows)
    return _over_seeds(rows)


def _over_seeds(rows: list[Result]) -> list[dict[str, Any]]:
    table: dict[str, dict[str, list[float]]] = {}
    for row in rows:
        table.setdefault(str(row.setting["model"]), {}).setdefault(row.metric, []).append(row.value)
    return [
        {
            "model": name,
            "top1": fmean(found["top1"]),
            "lowest": min(found["top1"]),
            "highest": max(found["top1"]),
            "gmacs": fmean(found["gmacs"]),
            "gmacs with zoomer": fmean(found["gmacs"]) + fmean(found["gmacs_scores"]),
            "images/s": fmean(found["images_per_s"]),
            "parameters": round(fmean(found["parameters"])),
        }
        for name, found in table.items()
    ]


class _Demo:
    def __init__(self, out: Path, seed: int, size: DemoSize, progress: Progress, say: Callable[[str], None]) -> None:
        self.out, self.seed, self.size, self._progress, self._say = out, seed, size, progress, say
        self._stage = ""
        self.train_shards = self.out / "scenes" / f"{SIDE}px"
        self.map_shards = self.out / "scenes" / "maps"
        self.val_shards = self.out / "scenes" / "val"
        self.seconds: dict[str, float] = {}
        self.results: dict[str, Any] = {}

    def run(self) -> dict[str, Any]:
        stages: list[tuple[str, Callable[[], str]]] = [("scenes", self._scenes)]
        for number in range(len(self.size.lessons)):
            stages.append((f"teacher-{self.size.lessons[number].side}px", lambda n=number: self._lesson(n)))
        stages += [
            ("teacher-evaluation", self._evaluate_teacher),
            ("maps", self._maps),
            ("zoomer", self._zoomer),
            ("zoomer-evaluation", self._evaluate_zoomer),
            ("zoomvit", self._zoomvit),
            ("plain-vit", self._plain),
            ("evaluation", self._evaluate_vits),
            ("contact-sheet", self._sheet),
            ("studies", self._studies),
            ("report", self._report),
        ]
        for number, (name, stage) in enumerate(stages, start=1):
            self._stage = f"{number}/{len(stages)} {name}"
            begun = time.monotonic()
            told = stage()
            self.seconds[name] = round(time.monotonic() - begun, 1)
            self._say(f"{self._stage}: {told} ({self.seconds[name]:.0f} s)")
        return {
            "rows": self._rows(),
            "maps": self._map_figures(),
            "seconds": self.seconds | {"all": round(sum(self.seconds.values()), 1)},
            "notes": self._notes(),
        }

    def further(self) -> list[Result]:
        """Beyond the demo itself: plain ViTs of further widths, ZoomViTs under other scores, rivals; all models' figures."""
        lessons = range(len(self.size.lessons))
        stages: list[tuple[str, Callable[[], str]]] = []
        for width in WIDTHS:
            stages += [(f"lesson-{n}-width-{width}", lambda n=n, w=width: self._lesson(n, w)) for n in lessons]
            stages.append((f"plain-width-{width}", lambda w=width: self._plain(w)))
        stages += [(f"zoomvit-{name}", lambda name=name: self._zoomvit(name)) for name in OTHER_SCORES]
        stages += [(name, lambda name=name: self._rival(name)) for name in RIVALS]
        for number, (name, stage) in enumerate(stages, start=1):
            self._stage = f"further {number}/{len(stages)} {name}"
            begun = time.monotonic()
            self._say(f"{self._stage}: {stage()} ({time.monotonic() - begun:.0f} s)")
        self._stage = "evaluation"
        rows: list[Result] = []
        for width in (BODY["embed_dim"], *WIDTHS):
            for name, patch in (("teacher", TEACHER_PATCH), ("plain", PLAIN)):
                run = name + _width_suffix(width)
                (row,) = self._evaluate(run)
                rows += self._results(f"plain {patch} px, width {width}", run, row)
        for name in ("zoomer", *OTHER_SCORES):
            run = "zoomvit" if name == "zoomer" else f"zoomvit-{name}"
            for row in self._evaluate(run, alphas=(), budgets=BUDGETS):
                rows += self._results(f"ZoomViT, {name}, {row['setting']}", run, row)
        for row in self._evaluate("zoomvit", alphas=(), budgets=BUDGETS, scores="maps"):
            rows += self._results(f"ZoomViT, teacher's maps in evaluation, {row['setting']}", "zoomvit", row)
        for name, rival in RIVALS.items():
            run = _rival_run(name)
            asked = rival.evaluation
            if rival.model in ("cfvit_small", "lfvit_small"):
                asked = {"target_gmacs": MATCHED_GMACS, "calibration": self.map_shards}
            (row,) = self._evaluate(run, **asked)
            told = name if row["exit"] is None else f"{name}, {row['exited']:.0%} exit"
            rows += self._results(name if row["exit"] is None else f"{name}, exit calibrated", run, row)
            self._say(f"{told}: top-1 {row['top1']:.1%} at {row['gmacs'] + row['gmacs_zoomer']:.4f} GMACs")
        return rows

    def _rival(self, name: str) -> str:
        rival = RIVALS[name]
        config = self._vit(
            self.size.vit_steps,
            3e-3,
            self.size.lessons[-1],
            model=rival.model,
            model_args=rival.args,
            init_from=str(self.out / "teacher") if rival.from_teacher else None,
            scores=rival.scores,
        )
        zoomer = self.out / "zoomer" if rival.scores == "zoomer" else None
        train_vit(self.train_shards, self.out / _rival_run(name), config, zoomer=zoomer, progress=self._show)
        return f"{self.size.vit_steps} steps{' from the teacher' if rival.from_teacher else ' from scratch'}"

    def _results(self, model: str, run: str, row: dict[str, Any]) -> list[Result]:
        about: dict[str, Any] = {
            "study": "accuracy-gmacs",
            "run": f"seed-{self.seed}/{run}",
            "model": model.split(",")[0],
        }
        about |= {"setting": {"model": model}, "seed": self.seed, "n": row["count"]}
        return [
            share(**about, metric="top1", right=round(row["top1"] * row["count"])),
            Result(**about, metric="gmacs", value=row["gmacs"]),
            Result(**about, metric="gmacs_scores", value=row["gmacs_zoomer"]),
            Result(**about, metric="tokens", value=row["tokens"]),
            Result(**about, metric="images_per_s", value=row["images_per_s"]),
            Result(**about, metric="parameters", value=row["parameters"]),
        ]

    def _show(self, stage: str, done: int, total: int, **facts: object) -> None:
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
            make_shards(source, self.out / "scenes" / name, progress=self._show)
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
        """Digits can't be mirrored, and filling the frame is what they are told by: only small shifts."""
        least = ((side - shift) / side) ** 2
        return ViewConfig(crop_scale=(least, 1.0), crop_ratio=(1.0, 1.0), flip=0.0, crop_pct=1.0)

    def _vit(self, steps: int, lr: float, lesson: Lesson, **settings: Any) -> VitConfig:
        return VitConfig(
            image_size=lesson.side,
            view=self._view(1 if lesson.side < 24 else 2, lesson.side),
            train=self._recipe(lesson.scenes, steps, lr),
            **settings,
        )

    def _teacher_run(self, number: int, width: int = BODY["embed_dim"]) -> Path:
        last = number == len(self.size.lessons) - 1
        name = "teacher" if last else f"teacher-{self.size.lessons[number].side}px"
        return self.out / (name + _width_suffix(width))

    def _lesson(self, number: int, width: int = BODY["embed_dim"]) -> str:
        lesson = self.size.lessons[number]
        before = str(self._teacher_run(number - 1, width)) if number else None
        body = {"patch_size": TEACHER_PATCH} | BODY | {"embed_dim": width}
        config = self._vit(
            lesson.steps, lesson.lr, lesson, model="deit_tiny_patch16_224", model_args=body, init_from=before
        )
        shards = self.out / "scenes" / f"{lesson.side}px"
        train_vit(shards, self._teacher_run(number, width), config, progress=self._show)
        return f"{lesson.steps} steps"

    def _evaluate_teacher(self) -> str:
        self.results["teacher"] = self._evaluate("teacher")[0]
        return f"top-1 {self.results['teacher']['top1']:.1%}"

    def _evaluate(self, run: str, **settings: Any) -> list[dict[str, Any]]:
        maps = self.out / "maps" / "val" if settings.get("scores") == "maps" or run == "zoomer" else None
        config = EvalConfig(batch_size=100, device="cpu", **settings)
        name = "evaluation-maps.json" if settings.get("scores") == "maps" else "evaluation.json"
        target = self.out / run / name
        return evaluate(self.out / run, self.val_shards, config, maps=maps, out=target, progress=self._show)["rows"]

    def _maps(self) -> str:
        config = ExtractConfig(weights=str(self.out / "teacher"), batch_size=32, device="cpu")
        count = 0
        for shards, name in ((self.map_shards, "train"), (self.val_shards, "val")):
            count += extract_teacher_maps(shards, self.out / "maps" / name, config, progress=self._show).count
        return f"{count:,} extracted on Ray"

    def _zoomer(self) -> str:
        config = ZoomerConfig(
            num_blocks=2,
            width=32,
            image_size=SIDE,
            view=self._view(8, SIDE),
            train=self._recipe(self.size.map_scenes, self.size.zoomer_steps, 4e-3),
        )
        train_zoomer(self.map_shards, self.out / "maps" / "train", self.out / "zoomer", config, progress=self._show)
        return f"{self.size.zoomer_steps} steps"

    def _evaluate_zoomer(self) -> str:
        self.results["zoomer"] = self._evaluate("zoomer")[0]
        row = self.results["zoomer"]
        return f"peak in the digit's box: teacher {row['teacher_pointing_game']:.1%}, zoomer {row['pointing_game']:.1%}"

    def _zoomvit(self, scores: str | None = None) -> str:
        config = self._vit(
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
        train_vit(self.train_shards, out, config, zoomer=zoomer, progress=self._show)
        return f"{self.size.vit_steps} steps from the teacher's weights"

    def _plain(self, width: int = BODY["embed_dim"]) -> str:
        config = self._vit(
            self.size.vit_steps,
            3e-3,
            self.size.lessons[-1],
            model="deit_tiny_patch16_224",
            model_args={"patch_size": PLAIN} | BODY | {"embed_dim": width},
            init_from=str(self._teacher_run(len(self.size.lessons) - 1, width)),
        )
        train_vit(self.train_shards, self.out / f"plain{_width_suffix(width)}", config, progress=self._show)
        return f"{self.size.vit_steps} steps from the teacher's weights"

    def _evaluate_vits(self) -> str:
        rows = self._evaluate("zoomvit", alphas=ALPHAS, budgets=BUDGETS)
        self.results["zoomvit"] = [row for row in rows if row["budget"] is not None]
        self.results["zoomvit-maps"] = self._evaluate("zoomvit", alphas=(), budgets=(SHOWN_BUDGET,), scores="maps")
        self.results["plain"] = self._evaluate("plain")[0]
        best = max(self.results["zoomvit"], key=lambda row: row["top1"])
        return f"ZoomViT at best {best['top1']:.1%}, plain ViT {self.results['plain']['top1']:.1%}"

    def _sheet(self) -> str:
        path = self.out / SHEET
        contact_sheet(self.out / "zoomvit", self.val_shards, self.out / "maps" / "val", path, budget=SHOWN_BUDGET)
        return str(path)

    def _studies(self) -> str:
        evaluation = EvalConfig(alphas=(), batch_size=100, device="cpu")
        for name in STUDIES:
            run_study(
                name, self.out / "zoomvit", self.val_shards, StudyConfig(evaluation=evaluation), progress=self._show
            )
        return f"{', '.join(STUDIES)}: {self.out / 'zoomvit' / 'results'}"

    def _report(self) -> str:
        config = ReportConfig(shards=self.val_shards, maps=self.out / "maps" / "val", device="cpu")
        return str(write_report([self.out / name for name in SHOWN_RUNS], self.out / PAGE, config, self._show))

    def _rows(self) -> list[dict[str, Any]]:
        rows = [("teacher, plain 4 px", self.results["teacher"]), (f"plain {PLAIN} px", self.results["plain"])]
        rows += [(f"ZoomViT {row['setting']}", row) for row in self.results["zoomvit"]]
        rows += [(f"ZoomViT {row['setting']}, teacher's maps", row) for row in self.results["zoomvit-maps"]]
        return [_row(name, row) for name, row in rows]

    def _map_figures(self) -> dict[str, Any]:
        return {name: value for name, value in self.results["zoomer"].items() if name != "setting"}

    def _notes(self) -> list[str]:
        zoomer, plain = self.results["zoomer"], self.results["plain"]
        notes = [
            f"the peak of the map lies in the digit's box (share of the area: {zoomer['box_share']:.1%}) in "
            f"{zoomer['teacher_pointing_game']:.1%} of scenes for the teacher, {zoomer['pointing_game']:.1%} for the zoomer",
            f"both students start from the teacher's weights and take {self.size.vit_steps} steps",
            "the teacher's maps as scores know the label; they show what a perfect imitation of the teacher would give",
        ]
        for counted, told in ((0, "not counted"), (1, "counted")):
            zoomed = [(row["gmacs"] + counted * row["gmacs_zoomer"], row) for row in self.results["zoomvit"]]
            macs, row = min(zoomed, key=lambda pair: abs(pair[0] - plain["gmacs"]))
            notes.append(
                f"plain ViT: {plain['top1']:.1%} at {plain['gmacs']:.4f} GMACs; ZoomViT {row['setting']}: {row['top1']:.1%} "
                f"at {macs:.4f}, the zoomer {told}"
            )
        return [
            *notes,
            f"this run took {sum(self.seconds.values()) / 60:.1f} minutes; the page: {self.out / PAGE / 'index.html'}",
        ]


def _rival_run(name: str) -> str:
    return "rival-" + name.lower().replace(", ", "-").replace(" ", "-")


def _width_suffix(width: int) -> str:
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
