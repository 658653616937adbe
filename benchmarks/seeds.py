"""The demo over several seeds, beside further plain ViTs, ZoomViTs under other scores, and all rival models: one table.

    python benchmarks/seeds.py FOLDER --seeds 3

Every seed's demo and its further models lie in FOLDER/seed-N; interrupted, the same command resumes. The results of all
models go to FOLDER/results/accuracy-gmacs.json and .parquet, where `zpipe report FOLDER` finds them. --quick runs the
same steps on too little data to learn anything.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any

import typer

from zpipe.console import print_rows, reporting, tell, warn
from zpipe.demo import BODY, BUDGETS, COARSE, FULL, PLAIN, QUICK, TEACHER_PATCH, Demo, run_demo, width_suffix
from zpipe.schemas.atomic import claim_folder, write_json
from zpipe.schemas.formats import header
from zpipe.schemas.progress import Progress, silent
from zpipe.train.evaluation.results import Result, share, write_study
from zpipe.train.fit.train_vit import train_vit

MARKER = "demo-seeds.json"
FORMAT = "zpipe-demo-seeds"
VERSION = 1
STUDY = "accuracy-gmacs"
WIDTHS = (48,)  # of further plain ViTs, beside BODY's
OTHER_SCORES = ("random", "centre", "entropy")  # what further ZoomViTs are trained with


@dataclass(frozen=True, kw_only=True)
class Rival:
    """A model to compare with ZoomViT at the cost of the plain ViT of PLAIN pixels."""

    model: str
    args: dict[str, Any]
    scores: str | None = None
    """The source of its scores."""
    evaluation: dict[str, Any] = field(default_factory=dict)
    """Settings of its evaluation. A model with early exit is calibrated to that cost instead."""
    from_teacher: bool = True
    """Whether it starts from the teacher's weights."""


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


def run_seeds(
    out: Path,
    count: int,
    *,
    quick: bool = False,
    progress: Progress = silent,
    say: Callable[[str], None] = print,
) -> list[dict[str, Any]]:
    """Run the demo and the further models for the seeds 0 to `count` - 1.

    Args:
        out: the folder; what was begun there is resumed.
        count: the number of seeds.
        quick: as of `run_demo`.
        progress: called within the stages.
        say: called with a line per stage.

    Returns:
        The rows of `over_seeds`.
    """
    out = Path(out)
    claim_folder(out, MARKER, "demo over seeds")
    write_json(out / MARKER, header(FORMAT, VERSION) | {"quick": quick})
    rows: list[Result] = []
    for seed in range(count):
        folder = out / f"seed-{seed}"

        def say_of_seed(line: str, seed: int = seed) -> None:
            say(f"seed {seed}: {line}")

        run_demo(folder, seed=seed, quick=quick, progress=progress, say=say_of_seed)
        rows += SeedDemo(folder, seed, QUICK if quick else FULL, progress, say_of_seed).further()
    about = {"study": STUDY, "title": "Accuracy and cost of every model of the demo", "shards": "scenes/val"}
    write_study(out, about, rows)
    return over_seeds(rows)


def over_seeds(rows: list[Result]) -> list[dict[str, Any]]:
    """A row per model: means over the seeds, and the lowest and the highest top-1."""
    table: dict[str, dict[str, list[float]]] = {}
    for row in rows:
        table.setdefault(str(row.setting["model"]), {}).setdefault(row.metric, []).append(row.value)
    return [
        {
            "model": name,
            "top1": fmean(metrics["top1"]),
            "lowest": min(metrics["top1"]),
            "highest": max(metrics["top1"]),
            "gmacs": fmean(metrics["gmacs"]),
            "gmacs with zoomer": fmean(metrics["gmacs"]) + fmean(metrics["gmacs_scores"]),
            "images/s": fmean(metrics["images_per_s"]),
            "parameters": round(fmean(metrics["parameters"])),
        }
        for name, metrics in table.items()
    ]


class SeedDemo(Demo):
    """A seed's demo and the models beyond it: plain ViTs of other widths, ZoomViTs under other scores, and rivals."""

    def further(self) -> list[Result]:
        """Train the further models and evaluate all of them."""
        lessons = range(len(self.size.lessons))
        stages: list[tuple[str, Callable[[], str]]] = []
        for width in WIDTHS:
            stages += [(f"lesson-{n}-width-{width}", partial(self.lesson, n, width)) for n in lessons]
            stages.append((f"plain-width-{width}", partial(self.plain, width)))
        stages += [(f"zoomvit-{name}", partial(self.zoomvit, name)) for name in OTHER_SCORES]
        stages += [(name, partial(self._rival, name)) for name in RIVALS]
        for number, (name, stage) in enumerate(stages, start=1):
            self.run_stage(f"further {number}/{len(stages)} {name}", stage)
        return self._evaluate_all()

    def _evaluate_all(self) -> list[Result]:
        self._stage = "evaluation"
        rows: list[Result] = []
        for width in (BODY["embed_dim"], *WIDTHS):
            for name, patch in (("teacher", TEACHER_PATCH), ("plain", PLAIN)):
                run = name + width_suffix(width)
                (row,) = self.evaluate(run)
                rows += self._results(f"plain {patch} px, width {width}", run, row)
        for name in ("zoomer", *OTHER_SCORES):
            run = "zoomvit" if name == "zoomer" else f"zoomvit-{name}"
            for row in self.evaluate(run, alphas=(), budgets=BUDGETS):
                rows += self._results(f"ZoomViT, {name}, {row['setting']}", run, row)
        for row in self.evaluate("zoomvit", alphas=(), budgets=BUDGETS, scores="maps"):
            rows += self._results(f"ZoomViT, teacher's maps in evaluation, {row['setting']}", "zoomvit", row)
        for name, rival in RIVALS.items():
            run = _rival_run(name)
            settings = rival.evaluation
            if rival.model in ("cfvit_small", "lfvit_small"):
                settings = {"target_gmacs": MATCHED_GMACS, "calibration": self.map_shards}
            (row,) = self.evaluate(run, **settings)
            exits = row["exited"] is not None
            rows += self._results(f"{name}, exit calibrated" if exits else name, run, row)
            shown = f"{name}, {row['exited']:.0%} exit" if exits else name
            self.say(f"{shown}: top-1 {row['top1']:.1%} at {row['gmacs'] + row['gmacs_zoomer']:.4f} GMACs")
        return rows

    def _rival(self, name: str) -> str:
        rival = RIVALS[name]
        config = self.vit_config(
            self.size.vit_steps,
            3e-3,
            self.size.lessons[-1],
            model=rival.model,
            model_args=rival.args,
            init_from=str(self.out / "teacher") if rival.from_teacher else None,
            scores=rival.scores,
        )
        zoomer = self.out / "zoomer" if rival.scores == "zoomer" else None
        train_vit(self.train_shards, self.out / _rival_run(name), config, zoomer=zoomer, progress=self.show)
        return f"{self.size.vit_steps} steps{' from the teacher' if rival.from_teacher else ' from scratch'}"

    def _results(self, model: str, run: str, row: dict[str, Any]) -> list[Result]:
        about: dict[str, Any] = {
            "study": STUDY,
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


def _rival_run(name: str) -> str:
    return "rival-" + name.lower().replace(", ", "-").replace(" ", "-")


def main(
    folder: Annotated[Path, typer.Argument(help="New, empty, or that of a run of this benchmark to resume.")],
    seeds: Annotated[int, typer.Option(min=1, help="Number of seeds, from 0 on.")] = 3,
    quick: Annotated[bool, typer.Option("--quick", help="Too little data to learn anything.")] = False,
) -> None:
    """Run the demo and further models over several seeds, and print one table."""
    with reporting() as progress:
        rows = run_seeds(folder, seeds, quick=quick, progress=progress, say=warn)
    print_rows(rows, title=f"validation scenes, {seeds} seeds")
    tell(f"written to {folder / 'results'}")


if __name__ == "__main__":
    typer.run(main)
