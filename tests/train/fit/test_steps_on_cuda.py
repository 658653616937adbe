"""Training on a pretend CUDA device: it equals that on the CPU, and a step waits only for the loss of the last one."""

from __future__ import annotations

from dataclasses import replace

import pytest
import safetensors.torch
import torch
from tiny import BODY, GRID, SIDE, scenes, store

from zpipe.schemas.errors import ZpipeError
from zpipe.schemas.relevance_maps import RelevanceMaps
from zpipe.train.checkpoint import Preprocessing
from zpipe.train.data.loader import RelevanceLoader
from zpipe.train.fit.config import TrainConfig
from zpipe.train.fit.initialise import build_vit
from zpipe.train.fit.loop import Stopped, Trainer
from zpipe.train.fit.train_vit import ClassifyTask, VitConfig, train_vit
from zpipe.train.fit.train_zoomer import ZoomerConfig, ZoomerTask, train_zoomer
from zpipe.train.losses import ZoomerLoss
from zpipe.train.models import Zoomer
from zpipe.train.resume_state import load_checkpoint
from zpipe.train.scoring import choose_source

pytestmark = pytest.mark.usefixtures("one_thread")

LOOP = TrainConfig(
    epochs=2, batch_size=4, data_workers=0, log_every=3, device="cuda", lr=1e-3, precision="float32", compile=False
)
PLAIN = VitConfig(model="deit_tiny_patch16_224", model_args=BODY, image_size=SIDE, train=LOOP)
ZOOM = replace(PLAIN, model="zoomvit_tiny_patch16_224", scores="zoomer", zoom_draw="budget")
SMALL = BODY | {"depth": 4, "patch_size": 4}
LABELLED = replace(PLAIN, model="lvvit_small", token_label_weight=0.5, scores=None)
PREPROCESSING = Preprocessing(image_size=SIDE, mean=(0.5, 0.4, 0.3), std=(0.3, 0.4, 0.5))


def with_loop(config, **changes):
    return replace(config, train=replace(config.train, **changes))


# The settings of a run, and what the host waits for in a step beside the loss.
STEPS = {
    "plain": (PLAIN, {}),
    "everything": (
        replace(with_loop(PLAIN, ema=0.9, clip_grad=1.0, layer_decay=0.7, accumulate=2), mixup=0.8, cutmix=1.0),
        {},
    ),
    "bce, adaptive clipping": (replace(with_loop(PLAIN, clip_grad=0.1, clip_mode="agc"), loss="bce"), {}),
    "bf16": (with_loop(PLAIN, precision="bf16"), {}),
    "fp16": (with_loop(PLAIN, precision="fp16"), {}),
    "budget": (ZOOM, {}),
    "alpha": (replace(ZOOM, zoom_draw="alpha"), {"tolist": 1}),  # the lengths of the sequences
    "alpha, bf16": (replace(with_loop(ZOOM, precision="bf16"), zoom_draw="alpha"), {"tolist": 1}),
    "maps": (replace(ZOOM, scores="maps"), {}),
    "centre": (replace(ZOOM, scores="centre"), {}),
    "random": (replace(ZOOM, scores="random"), {}),
    "entropy": (replace(ZOOM, scores="entropy"), {}),
    "attention": (replace(ZOOM, scores="attention"), {}),
    "two stages": (replace(PLAIN, model="cfvit_small", model_args=SMALL), {}),
    "token labels": (LABELLED, {}),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("cuda")
    scenes(root / "shards")
    scenes(root / "val", 20, split="val")
    store(root / "shards", root / "maps")
    return root


def trainer(data, config, run):
    torch.manual_seed(0)
    device = torch.device("cuda")
    model = build_vit(config.model, 10, SIDE, config.model_args).to(device)
    source = None
    if config.scores is not None:
        zoomer = Zoomer(2, GRID, width=8).requires_grad_(False).to(device)
        source = choose_source(config.scores, model, zoomer=zoomer, store=RelevanceMaps(data / "maps"), training=True)
    task = ClassifyTask(model, source, config, PREPROCESSING, device)
    loader = RelevanceLoader(data / "shards", data / "maps", batch_size=4, image_size=SIDE)
    return Trainer(task, loader, config.train, run)


def kinds(cuda):
    """How often the host waited, by what for, without the places."""
    found = {}
    for line, count in cuda.syncs.items():
        what = line.partition(" at ")[0]
        found[what] = found.get(what, 0) + count
    return found


@pytest.mark.parametrize("name", STEPS)
def test_a_step_waits_for_the_loss_of_the_one_before_alone(cuda, data, tmp_path, name):
    config, more = STEPS[name]
    training = trainer(data, config, tmp_path)
    training.task.model.train()
    batches = list(training.loader)
    size = config.train.accumulate
    steps = [batches[start : start + size] for start in range(0, 4 * size, size)]
    training.train_step(steps[0])  # what is kept is put on the device here
    training.train_step(steps[1])
    for step in steps[2:]:
        cuda.reset()
        training.train_step(step)
        assert kinds(cuda) == {"event": 1} | more, cuda.syncs
    assert training.metrics()["loss"] > 0


def test_a_step_of_the_zoomer_waits_for_the_loss_of_the_one_before_alone(cuda, data, tmp_path):
    device = torch.device("cuda")
    task = ZoomerTask(Zoomer(2, GRID, width=8).to(device), ZoomerLoss(), PREPROCESSING, device)
    loader = RelevanceLoader(data / "shards", data / "maps", batch_size=4, image_size=SIDE)
    training = Trainer(task, loader, LOOP, tmp_path)
    for number, batch in enumerate(loader):
        cuda.reset()
        training.train_step([batch])
        assert number < 2 or kinds(cuda) == {"event": 1}


# ------------------------------------------------------------------------------------------------------ whole runs


def weights(run):
    return safetensors.torch.load_file(run / "model.safetensors")


def both(data, config, out, **more):
    for device in ("cpu", "cuda"):
        train_vit(data / "shards", out / device, with_loop(config, device=device), val=data / "val", **more)
    return weights(out / "cpu"), weights(out / "cuda")


def test_a_run_equals_that_of_the_cpu(cuda, data, tmp_path):
    """With an average of the weights, validation, checkpoints, and all that draws random numbers."""
    config = replace(with_loop(PLAIN, ema=0.5, checkpoint_s=0.0), mixup=0.8, scores=None)
    here, there = both(data, config, tmp_path)
    torch.testing.assert_close(there, here, atol=1e-4, rtol=1e-3)


def test_a_run_of_the_zoomer_equals_that_of_the_cpu(cuda, data, tmp_path):
    config = ZoomerConfig(num_blocks=2, width=8, image_size=SIDE, train=replace(LOOP, lr=1e-3))
    for device in ("cpu", "cuda"):
        loop = replace(config.train, device=device)
        train_zoomer(data / "shards", data / "maps", tmp_path / device, replace(config, train=loop))
    torch.testing.assert_close(weights(tmp_path / "cuda"), weights(tmp_path / "cpu"), atol=1e-3, rtol=1e-3)


def test_a_run_that_is_stopped_and_resumed_equals_an_undisturbed_one(cuda, data, tmp_path):
    asked = iter(range(1, 8))
    with pytest.raises(Stopped, match="stopped in step 7 of 20"):
        train_vit(data / "shards", tmp_path / "run", PLAIN, stop=lambda: next(asked) == 7)
    train_vit(data / "shards", tmp_path / "run", PLAIN)
    train_vit(data / "shards", tmp_path / "whole", PLAIN)
    assert (tmp_path / "run/model.safetensors").read_bytes() == (tmp_path / "whole/model.safetensors").read_bytes()


def test_a_loss_that_is_not_finite_is_found_before_a_checkpoint(cuda, data, tmp_path, monkeypatch):
    original, calls = ClassifyTask.loss, []

    def loss(task, batch):
        calls.append(batch)
        found, metrics = original(task, batch)
        return (found * float("nan") if len(calls) == 14 else found), metrics

    monkeypatch.setattr(ClassifyTask, "loss", loss)
    with pytest.raises(ZpipeError, match="the loss became nan in step 13 of 20"):
        train_vit(data / "shards", tmp_path / "run", with_loop(PLAIN, log_every=100))
    assert len(calls) == 15
    state = load_checkpoint(tmp_path / "run")
    assert state["step"] == 10 and all(value.isfinite().all() for value in state["model"].values())
