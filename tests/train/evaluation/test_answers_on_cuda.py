"""Finished runs on a pretend CUDA device: answers are those of the CPU, and what the host waits for is counted."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from pretend_cuda import host
from tiny import BODY, SIDE, scenes, store

from zpipe.train.checkpoint import load_run
from zpipe.train.evaluation.calibrate import CalibrationConfig, calibrate
from zpipe.train.evaluation.evaluate import evaluate
from zpipe.train.evaluation.inference import OpenRun, choose_run_source, eval_loader
from zpipe.train.evaluation.judge import JudgeConfig, judge_maps
from zpipe.train.evaluation.operating_points import EvalConfig
from zpipe.train.evaluation.predict import PredictConfig, predict
from zpipe.train.fit.config import TrainConfig
from zpipe.train.fit.train_vit import VitConfig, train_vit
from zpipe.train.models.operating_points import OperatingPoint

pytestmark = pytest.mark.usefixtures("one_thread")

LOOP = TrainConfig(epochs=0.5, batch_size=8, data_workers=0, device="cpu")
PLAIN = VitConfig(model="deit_tiny_patch16_224", model_args=BODY, image_size=SIDE, train=LOOP)
RUNS = {
    "plain": PLAIN,
    "zoomvit": replace(PLAIN, model="zoomvit_tiny_patch16_224", scores="centre"),
    "cfvit": replace(PLAIN, model="cfvit_small", model_args=BODY | {"depth": 4, "patch_size": 4}),
}
# A run, its operating point and how often the host reads values: those of the scores and of the logits, to check them,
# and the lengths of the sequences, or which images are sure.
ANSWERS = {
    "plain": ("plain", {}, 1),
    "budget": ("zoomvit", {"budget": 2}, 2),
    "alpha": ("zoomvit", {"alpha": 0.3}, 3),
    "two stages": ("cfvit", {}, 1),
    "early exit": ("cfvit", {"exit_threshold": 0.2}, 2),
}


SCORES = ("deletion", "insertion", "abpc", "saco", "pointing_game", "max_box_acc_v2")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("answers")
    scenes(root / "shards", 20)
    for name, config in RUNS.items():
        train_vit(root / "shards", root / name, config)
    store(root / "shards", root / "maps")
    return root


@pytest.mark.parametrize("name", ANSWERS)
def test_an_answer(cuda, data, name):
    path, arguments, waits = ANSWERS[name]
    point = OperatingPoint(name="point", arguments=arguments)
    answers = []
    for device in ("cpu", "cuda"):
        run = load_run(data / path)
        opened = OpenRun(run, choose_run_source(run, None, None), device=device)
        batches = list(eval_loader(run.preprocessing, data / "shards", None, batch_size=8))
        opened.answer(batches[0], point)  # the mean of the pixels and the like are put on the device
        cuda.reset()
        answers.append([opened.answer(batch, point).logits for batch in batches])
    assert cuda.syncs.total() == waits * len(batches), cuda.syncs
    torch.testing.assert_close(host(answers[1]), answers[0], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", RUNS)
def test_an_evaluation(cuda, data, name):
    rows = [
        evaluate(data / name, data / "shards", EvalConfig(device=device, batch_size=8))["rows"]
        for device in ("cpu", "cuda")
    ]
    same = ("mode", "top1", "top5", "tokens", "gmacs")
    found, expected = ([{key: row.get(key) for key in same} for row in each] for each in rows)
    assert found == expected


@pytest.mark.parametrize("name", RUNS)
def test_a_prediction(cuda, data, name, tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "noise.png")
    files = [tmp_path / "noise.png"]
    ((here,), (there,)) = (predict(data / name, files, PredictConfig(device=device)) for device in ("cpu", "cuda"))
    assert there["tokens"] == here["tokens"]
    for found, expected in zip(there["classes"], here["classes"], strict=True):
        assert found == expected | {"probability": pytest.approx(expected["probability"], rel=1e-3)}


@pytest.mark.parametrize(("name", "budget"), [("zoomvit", "20 tokens"), ("cfvit", "0.001 GMACs")])
def test_a_threshold(cuda, data, name, budget):
    found, expected = (
        calibrate(data / name, data / "shards", CalibrationConfig(budget=budget, device=device, batch_size=8))
        for device in ("cuda", "cpu")
    )
    numbers = {name: pytest.approx(value, rel=1e-4) for name, value in expected.items() if name != "unit"}
    assert found == {"unit": expected["unit"]} | numbers


def test_judged_maps(cuda, data):
    config = JudgeConfig(device="cpu", steps=4, groups=4, batch_size=8)
    found, expected = (
        judge_maps(data / "plain", data / "shards", data / "maps", replace(config, device=device))
        for device in ("cuda", "cpu")
    )
    for row, other in zip(found, expected, strict=True):
        assert {name: row[name] for name in SCORES} == pytest.approx({name: other[name] for name in SCORES}, abs=1e-4)
