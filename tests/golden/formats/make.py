"""Makes an example of every file of ours that has a version, in the folder given: how tests/golden/formats/v2 was made.

    python tests/golden/formats/make.py FOLDER

An example is made once, when a version is new, and never again: later zpipes must read what this one wrote. When a
version changes, make a new folder and leave the old ones to tests/schemas/test_formats.py. An earlier state of this
file made v1.
"""

import contextlib
import dataclasses
import os
import sys
from pathlib import Path

import numpy as np
import torch

import zpipe
from zpipe.pipeline.extract import ExtractConfig, extract_teacher_maps
from zpipe.pipeline.make_shards import SceneSource, make_shards
from zpipe.pipeline.scenes import SceneConfig
from zpipe.train.checkpoint import load_run
from zpipe.train.data.transforms import ViewConfig
from zpipe.train.evaluation.calibrate import CalibrationConfig, calibrate
from zpipe.train.evaluation.evaluate import evaluate
from zpipe.train.evaluation.judge import JudgeConfig, judge_maps
from zpipe.train.evaluation.operating_points import EvalConfig
from zpipe.train.evaluation.results import Result, write_results, write_study, write_verdicts
from zpipe.train.fit.config import TrainConfig
from zpipe.train.fit.train_vit import VitConfig, train_vit
from zpipe.train.fit.train_zoomer import ZoomerConfig, train_zoomer
from zpipe.train.resume_state import load_checkpoint

SIDE = 16
BODY = {"patch_size": 4, "embed_dim": 12, "depth": 1, "num_heads": 3}
TRAIN = TrainConfig(epochs=2, batch_size=2, data_workers=0, log_every=1, device="cpu", lr=1e-3, warmup_epochs=0)
VIT = VitConfig(
    model="zoomvit_tiny_patch16_224", model_args=BODY, num_classes=10, image_size=SIDE, view=ViewConfig(), train=TRAIN
)


class Stop(Exception):
    """Ends a run in its middle."""


def main(folder: Path) -> None:
    """Write shards, a store, two finished runs, one that was stopped, results, and what they held (expected.npz)."""
    torch.set_num_threads(1)
    folder.mkdir()
    os.chdir(folder)  # files hold the paths they were made with: short ones
    shards, maps = Path("shards"), Path("maps")
    scene = SceneConfig(image_size=SIDE, digit_size=(7, 8), pieces=(1, 1))
    make_shards(SceneSource(count=6, split="train", seed=0, config=scene, shard_size=3), shards)
    teacher = ExtractConfig(
        teacher="deit_tiny_patch16_224",
        weights="random",
        num_classes=10,
        teacher_args={"img_size": SIDE} | BODY,
        executor="local",
        threads=1,
        device="cpu",
    )
    extract_teacher_maps(shards, maps, teacher)
    zoomer = ZoomerConfig(num_blocks=2, width=4, image_size=SIDE, train=TRAIN)
    train_zoomer(shards, maps, Path("zoomer"), zoomer)
    train_vit(shards, Path("zoomvit"), VIT, maps=maps)

    def stop(stage: str, done: int, total: int, **facts: object) -> None:
        if done == 3:
            raise Stop

    saving = dataclasses.replace(VIT, train=dataclasses.replace(TRAIN, checkpoint_s=0.0))
    with contextlib.suppress(Stop):
        train_vit(shards, Path("stopped"), saving, maps=maps, progress=stop)
    for run in ("zoomer", "zoomvit"):
        (Path(run) / "checkpoint.pt").unlink()  # the stopped run has one
    row = Result(study="example", run="zoomvit", model="zoomvit", setting={"alpha": 0.5}, metric="top1", n=6, value=0.5)
    about = {"study": "example", "title": "An example", "run": "zoomvit", "shards": "shards"}
    write_study(Path("zoomvit"), about, [row])
    measure(shards, maps)
    write_expected(maps)


def measure(shards: Path, maps: Path) -> None:
    """Write an example of every other content that a results file has, and of verdicts."""
    config = EvalConfig(alphas=(0.0, 0.5), budgets=(4,), device="cpu", batch_size=3)
    for run in ("zoomvit", "zoomer"):
        evaluate(Path(run), shards, config, maps=maps, out=Path(run, "evaluation.json"))
    budget = CalibrationConfig(budget="20 tokens", device="cpu")
    calibrate(Path("zoomvit"), shards, budget, maps=maps, out=Path("zoomvit/calibration.json"))
    judge_maps(Path("zoomvit"), shards, maps, JudgeConfig(steps=2, device="cpu"), out=Path("zoomvit/judge.json"))
    rows = [{"model": "plain 6 px", "top1": 0.5}]
    about = {"seed": 0, "quick": True, "maps": {"count": 6}, "seconds": {"all": 1.0}, "notes": ["a note"]}
    row = Result(study="evaluation", run="plain", model="deit", metric="top1", n=6, value=0.5)
    write_results(Path("demo/report.json"), "demo", about, rows, [row])
    verdict = {"key": "train_0000000", "label": 2, "predicted": 9, "kind": "zoomer", "seen": 0.0}
    write_verdicts(Path("zoomvit/results/errors_samples.json"), [verdict])


def write_expected(maps: Path) -> None:
    """What a reader has to find, as plain arrays."""
    opened, images = zpipe.open_maps(maps), torch.linspace(0, 1, 2 * 3 * SIDE * SIDE).view(2, 3, SIDE, SIDE)
    scores = torch.linspace(0, 1, 2 * 16).view(2, 16)
    state = load_checkpoint(Path("stopped"))
    with torch.inference_mode():
        logits = load_run(Path("zoomvit")).model(images, scores, alpha=0.5).numpy()
        predicted = load_run(Path("zoomer")).model(images).numpy()
    np.savez_compressed(
        "expected.npz",
        keys=np.array(list(opened)),
        maps=opened.array(),
        scale=opened.table()["scale"].to_numpy(),
        logits=logits,
        predicted=predicted,
        step=state["step"],
        checkpoint_head=state["model"]["head.weight"].numpy(),
        finished_head=load_run(Path("zoomvit")).model.head.weight.detach().numpy(),
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]).absolute())
