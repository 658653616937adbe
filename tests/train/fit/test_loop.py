"""What the loop offers beyond plain steps: averages, accumulation, precision, schedules, best weights, logs."""

from __future__ import annotations

import copy
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny import BODY, GRID, SIDE, scenes, store

from zpipe.schemas.errors import UsageError, ZpipeError
from zpipe.train.checkpoint import Preprocessing, load_run
from zpipe.train.data.loader import RelevanceLoader
from zpipe.train.data.mix import mix_batch
from zpipe.train.evaluation.evaluate import evaluate
from zpipe.train.evaluation.operating_points import EvalConfig
from zpipe.train.fit import loop
from zpipe.train.fit.config import TrainConfig
from zpipe.train.fit.initialise import build_vit
from zpipe.train.fit.loop import Clock, Stopped, Trainer, _groups
from zpipe.train.fit.metric_log import metric_log
from zpipe.train.fit.optim import make_optimizer, make_scheduler, update_weights
from zpipe.train.fit.position import position_of, restore_position
from zpipe.train.fit.recipes import VIT_RECIPES, ZOOMER_RECIPES, recipe
from zpipe.train.fit.train_vit import ClassifyTask, VitConfig, train_vit
from zpipe.train.fit.train_zoomer import train_zoomer
from zpipe.train.models import ZoomViT
from zpipe.train.resume_state import load_checkpoint
from zpipe.train.run_files import BEST, RUN

torch.set_num_threads(1)
LOOP = TrainConfig(epochs=2, batch_size=4, data_workers=0, log_every=3, device="cpu", lr=1e-3)
PLAIN = VitConfig(model="deit_tiny_patch16_224", model_args=BODY, image_size=SIDE, train=LOOP)
ZOOM = replace(PLAIN, model="zoomvit_tiny_patch16_224", scores="centre")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("loop")
    scenes(root / "shards")
    scenes(root / "val", 20, split="val")
    store(root / "shards", root / "maps")
    return root


def with_loop(config: VitConfig, **changes) -> VitConfig:
    return replace(config, train=replace(config.train, **changes))


def weights(run):
    return safetensors.torch.load_file(run / "model.safetensors")


def lines(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


class Stop(Exception):
    pass


def interrupted(data, config, run, at, **more):
    """The run, stopped after step `at` and gone on with."""

    def stop(stage, done, total, **facts):
        if done == at:
            raise Stop

    with pytest.raises(Stop):
        train_vit(data / "shards", run, config, progress=stop, **more)
    train_vit(data / "shards", run, config, **more)


EVERYTHING = {
    "average": with_loop(PLAIN, ema=0.9),
    "bf16": with_loop(PLAIN, precision="bf16"),
    "fp16": with_loop(PLAIN, precision="fp16"),
    "accumulated": with_loop(PLAIN, accumulate=2, log_every=1),
    "mixed": replace(ZOOM, mixup=0.8, cutmix=1.0, loss="bce", label_smoothing=0.1),
    "all": replace(
        with_loop(ZOOM, ema=0.9, precision="fp16", accumulate=2, log_every=1, clip_grad=1.0, layer_decay=0.7),
        mixup=0.8,
        model_args=BODY | {"drop_path_rate": 0.2},
    ),
}


@pytest.mark.parametrize("name", EVERYTHING)
def test_interrupted_and_gone_on_with_equals_undisturbed(data, tmp_path, name):
    config = with_loop(EVERYTHING[name], checkpoint_s=0.0)
    train_vit(data / "shards", tmp_path / "whole", config)
    at = 6 if "log_every=3" in repr(config.train) else 7  # the second epoch has begun, or not
    interrupted(data, config, tmp_path / "run", at)
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == (
        tmp_path / "whole" / "model.safetensors"
    ).read_bytes()
    assert [line["step"] for line in lines(tmp_path / "run")] == [line["step"] for line in lines(tmp_path / "whole")]


@pytest.mark.parametrize("name", ["average", "fp16", "accumulated"])
def test_a_trainer_goes_on_from_the_state_of_another(data, tmp_path, name):
    """Without a file: after the same steps both have the same weights."""
    config = EVERYTHING[name]

    def trainer():
        torch.manual_seed(0)
        model = build_vit(config.model, 10, SIDE, config.model_args)
        preprocessing = Preprocessing(image_size=SIDE, mean=(0, 0, 0), std=(1, 1, 1))
        task = ClassifyTask(model, None, config, preprocessing, torch.device("cpu"))
        loader = RelevanceLoader(data / "shards", batch_size=4, image_size=SIDE)
        return Trainer(task, loader, config.train, tmp_path)

    first, second = trainer(), trainer()
    batches = list(first.loader)
    groups = [batches[start : start + config.train.accumulate] for start in (0, 2, 4)]
    for group in groups[:2]:
        first.train_step(group)
    state = copy.deepcopy(first.state_dict())
    own = {"average": {"average"}, "fp16": {"scaler"}, "accumulated": set()}[name]
    assert set(state) == {"model", "optimizer", "step", "epoch", "position"} | own
    second.load_state_dict(state)
    assert second.step == 2
    for trained in (first, second):
        trained.train_step(groups[2])
    assert first.metrics() == second.metrics() and first.metrics().keys() == {"loss", "train_top1"}
    for one, other in zip(first.task.model.parameters(), second.task.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_two_half_batches_are_one(data, tmp_path):
    """No BatchNorm and no dropout: the mean over both halves is the mean over the whole."""
    train_vit(data / "shards", tmp_path / "halves", with_loop(PLAIN, accumulate=2, log_every=1))
    train_vit(data / "shards", tmp_path / "whole", with_loop(PLAIN, batch_size=8, log_every=1))
    assert [line["step"] for line in lines(tmp_path / "halves")] == list(range(1, 11))
    for half, whole in zip(lines(tmp_path / "halves"), lines(tmp_path / "whole"), strict=True):
        assert half["loss"] == pytest.approx(whole["loss"], rel=1e-3)
    for name, value in weights(tmp_path / "halves").items():
        torch.testing.assert_close(value, weights(tmp_path / "whole")[name], atol=2e-3, rtol=0)


def test_the_average_of_the_weights_is_what_is_finished(data, tmp_path):
    train_vit(data / "shards", tmp_path / "run", with_loop(PLAIN, ema=0.9))
    state = load_checkpoint(tmp_path / "run")
    finished = weights(tmp_path / "run")
    assert all(torch.equal(value, state["average"][name]) for name, value in finished.items())
    assert not torch.equal(finished["head.weight"], state["model"]["head.weight"])

    train_vit(data / "shards", tmp_path / "short", with_loop(PLAIN, ema=0.5, epochs=0.5))
    torch.manual_seed(0)
    begun = build_vit(PLAIN.model, 10, PLAIN.image_size, PLAIN.model_args).state_dict()["cls_token"]
    after = load_checkpoint(tmp_path / "short")["model"]["cls_token"]
    assert not torch.equal(weights(tmp_path / "short")["cls_token"], after)
    assert (weights(tmp_path / "short")["cls_token"] - begun).abs().max() < (after - begun).abs().max()


def test_the_last_and_the_best_epochs_are_kept(data, tmp_path):
    run, config = tmp_path / "run", with_loop(PLAIN, epochs=5, keep=2)
    figures = train_vit(data / "shards", run, config, val=data / "val")
    assert sorted(path.name for path in (run / "epochs").iterdir()) == ["00004.safetensors", "00005.safetensors"]
    assert all(
        torch.equal(a, b) for a, b in zip(weights(run).values(), _load(run / "epochs/00005.safetensors"), strict=True)
    )
    by_epoch = {line["epoch"]: line["val_top1"] for line in lines(run) if "val_top1" in line}
    assert sorted(by_epoch) == [1, 2, 3, 4, 5] and figures["val_top1"] == by_epoch[5]
    best = json.loads((run / "best.json").read_text())
    assert best["val_top1"] == max(by_epoch.values()) == by_epoch[best["epoch"]]
    if best["epoch"] >= 4:
        name = f"epochs/{best['epoch']:05d}.safetensors"
        assert (run / "best.safetensors").read_bytes() == (run / name).read_bytes()
    assert load_run(run).model.num_classes == 10
    # An attempt that died before its first checkpoint: nothing of it passes for the next one's.
    for name in ("checkpoint.pt", "config.json", "metrics.jsonl", "run.json"):
        (run / name).unlink(missing_ok=True)
    (run / "run.json").write_text(json.dumps(RUN.header | {"kind": "vit", "settings": {}}))
    (run / "best.json").write_text(json.dumps(BEST.header | {"epoch": 5, "val_top1": 1.0}))
    (run / "epochs" / "00099.safetensors").write_bytes(b"")
    train_vit(data / "shards", run, with_loop(config, epochs=1), val=data / "val")
    assert [path.name for path in (run / "epochs").iterdir()] == ["00001.safetensors"]
    again = [line["val_top1"] for line in lines(run) if "val_top1" in line]
    stated = {"format": "zpipe-best-epoch", "version": 1}
    assert json.loads((run / "best.json").read_text()) == stated | {"epoch": 1, "val_top1": again[0]}
    assert len(again) == 1


def _load(path):
    return safetensors.torch.load_file(path).values()


def test_validation_counts_every_sample_once(data, tmp_path):
    config = with_loop(ZOOM, epochs=1)
    figures = train_vit(data / "shards", tmp_path / "run", config, val=data / "val")
    row = evaluate(tmp_path / "run", data / "val", EvalConfig(alphas=(config.val_alpha,), device="cpu"))["rows"][0]
    assert row["count"] == 20 and figures["val_top1"] == row["top1"]


def test_validation_with_maps_needs_their_maps(data, tmp_path):
    config = replace(ZOOM, scores="maps")
    with pytest.raises(UsageError, match="give --val-maps"):
        train_vit(data / "shards", tmp_path / "run", config, maps=data / "maps", val=data / "val")


def test_lines_tell_where_the_time_went(data, tmp_path):
    train_vit(data / "shards", tmp_path / "run", PLAIN)
    for line in lines(tmp_path / "run"):
        shares = {name: value for name, value in line.items() if name.startswith("share_")}
        assert set(shares) == {"share_data", "share_forward", "share_backward", "share_save"}
        assert sum(shares.values()) == pytest.approx(1) and min(shares.values()) >= 0
    clock = Clock()
    assert list(clock.of("data", range(1, 4))) == [1, 2, 3]
    with clock("save"):
        time.sleep(0.02)
    assert clock.shares()["share_save"] > 0.5


def test_event_files(data, tmp_path):
    train_vit(data / "shards", tmp_path / "run", with_loop(PLAIN, tensorboard=True))
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    told = {event.step: event.value for event in events.Scalars("loss")}
    assert told == {line["step"]: pytest.approx(line["loss"]) for line in lines(tmp_path / "run")}


def test_steps_that_are_done_again_are_events_once(data, tmp_path):
    interrupted(data, with_loop(PLAIN, tensorboard=True), tmp_path / "run", 12)  # the checkpoint is that of step 10
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("loss")] == [3, 6, 9, 12, 15, 18, 20]


def test_a_run_keeps_its_id_at_wandb_and_shares_it_with_no_other(tmp_path, monkeypatch):
    """The package itself is played: it would want an account."""
    begun = []

    class Session(nullcontext):
        def log(self, line, step):
            begun[-1]["logged"] = step

    def init(**options):
        begun.append(options)
        return Session(Session())

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    for folder in ("a", "a", "b"):
        run = tmp_path / folder / "run"
        run.mkdir(parents=True, exist_ok=True)
        with metric_log(run, wandb="project") as log:
            log({"step": 3, "loss": 1.0})
    fields = {tuple(each[name] for name in ("project", "name", "resume", "logged")) for each in begun}
    assert fields == {("project", "run", "allow", 3)}
    ids = [each["id"] for each in begun]
    assert ids[0] == ids[1] != ids[2] and all(ids)


def test_a_logger_that_is_not_installed_is_one_line(data, tmp_path):
    with pytest.raises(UsageError, match="pip install wandb"):
        train_vit(data / "shards", tmp_path / "run", with_loop(PLAIN, wandb="project"))


# -- steps, rates, losses ----------------------------------------------------------------------------------------------


def test_groups_of_batches():
    assert list(_groups(iter(range(7)), 3, max_groups=9)) == [[0, 1, 2], [3, 4, 5]]
    rest = iter(range(7))
    assert list(_groups(rest, 2, max_groups=2)) == [[0, 1], [2, 3]] and next(rest) == 4  # nothing is drawn in vain


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [0, 0.5, 1, 0.9045, 0.6545, 0.3455, 0.0955]),
        ({"sched": "poly"}, [0, 0.5, 0.7143, 0.5714, 0.4286, 0.2857, 0.1429]),
        ({"sched": "constant"}, [0, 0.5, 1, 1, 1, 1, 1]),
        ({"sched": "step", "decay_epochs": 1.5, "warmup_epochs": 0.0}, [1, 1, 1, 0.1, 0.1, 0.1, 0.01]),
    ],
)
def test_learning_rates(options, expected):
    config = TrainConfig(**{"lr": 1.0, "epochs": 3.5, "warmup_epochs": 1.0} | options)
    optimizer = make_optimizer(torch.nn.Linear(2, 2), config)
    scheduler = make_scheduler(optimizer, config, total_steps=7, steps_per_epoch=2)
    seen = []
    for step in range(7):
        scheduler.step(step)
        seen.append(optimizer.param_groups[0]["lr"])
    if "sched" not in options:
        assert seen[:3] == pytest.approx([0, 0.5, seen[2]]) and seen[2] > seen[3] > seen[-1] > 0
    else:
        assert seen == pytest.approx(expected, abs=1e-4)


def test_lower_layers_learn_more_slowly():
    model = ZoomViT(img_size=SIDE, num_classes=5, **BODY)
    optimizer = make_optimizer(model, TrainConfig(lr=1.0, layer_decay=0.5))
    scale = {id(p): group.get("lr_scale", 1.0) for group in optimizer.param_groups for p in group["params"]}
    order = [
        model.patch_embed.weight,
        model.blocks[0].attn.qkv.weight,
        model.blocks[1].attn.qkv.weight,
        model.head.weight,
    ]
    scales = [scale[id(p)] for p in order]
    assert scales == sorted(scales) and scales[-1] == 1 and scales[0] == pytest.approx(scales[1] / 2)
    assert scale[id(model.pos_fine)] == scale[id(model.cls_token)] == scales[0]


def test_the_rate_that_is_told_is_the_heads(data, tmp_path):
    train_vit(data / "shards", tmp_path / "run", with_loop(PLAIN, layer_decay=0.5, sched="constant", epochs=0.5))
    assert {line["lr"] for line in lines(tmp_path / "run")} == {LOOP.lr}


@pytest.mark.parametrize("name", ["zoomvit_tiny_patch16_224", "cfvit_small"])
def test_adaptive_clipping_leaves_the_classifier_alone(name):
    model = build_vit(name, 5, PLAIN.image_size, BODY if name != "cfvit_small" else {"depth": 4})
    before = {parameter: torch.full_like(parameter, 1e3) for parameter in model.parameters()}
    for parameter, gradient in before.items():
        parameter.grad = gradient.clone()
    update_weights(
        model, torch.optim.SGD(model.parameters(), lr=0.0), None, TrainConfig(clip_grad=0.01, clip_mode="agc")
    )
    untouched = {name for name, parameter in model.named_parameters() if torch.equal(parameter.grad, before[parameter])}
    assert untouched == {"head.weight", "head.bias"}


@pytest.mark.parametrize("loss", ["ce", "bce"])
@pytest.mark.parametrize("mixed", [False, True])
def test_losses_are_what_they_are_called(data, loss, mixed):
    config = replace(PLAIN, loss=loss, label_smoothing=0.2, mixup=0.8 if mixed else 0.0)
    preprocessing = Preprocessing(image_size=SIDE, mean=(0, 0, 0), std=(1, 1, 1))
    model = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(3, 5))
    model.num_classes = 5
    task = ClassifyTask(model, None, config, preprocessing, torch.device("cpu"))
    batch = {
        "image": torch.randint(256, (4, 3, 8, 8), dtype=torch.uint8),
        "label": torch.tensor([0, 1, 2, 4]),
        "key": list("abcd"),
    }
    torch.manual_seed(5)
    got, _ = task.loss(batch)
    images = preprocessing.normalise(batch["image"])
    target = F.one_hot(batch["label"], 5) * 0.8 + 0.2 / 5
    if mixed:
        torch.manual_seed(5)
        rng = np.random.default_rng(int(torch.randint(2**62, ())))
        both = mix_batch(batch | {"image": images}, config.mix(), rng, 5)
        images, target = both["image"], both["target"]
    logits = model(images)
    by_class = -(target * logits.sigmoid().log() + (1 - target) * (1 - logits.sigmoid()).log()).mean()
    expected = -(target * logits.log_softmax(1)).sum(1).mean() if loss == "ce" else by_class
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("loss", ["ce", "bce"])
def test_losses_of_half_precision_logits_are_float32(loss):
    model = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(3, 5))
    model.num_classes = 5
    preprocessing = Preprocessing(image_size=SIDE, mean=(0, 0, 0), std=(1, 1, 1))
    config = replace(PLAIN, loss=loss, label_smoothing=0.2)
    task = ClassifyTask(model, None, config, preprocessing, torch.device("cpu"))
    batch = {
        "image": torch.randint(256, (4, 3, 8, 8), dtype=torch.uint8),
        "label": torch.arange(4),
        "key": list("abcd"),
    }
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got, _ = task.loss(batch)
        logits = model(preprocessing.normalise(batch["image"])).detach()
    assert logits.dtype == torch.bfloat16 and got.dtype == torch.float32
    target = F.one_hot(batch["label"], 5) * 0.8 + 0.2 / 5
    exact = F.cross_entropy if loss == "ce" else F.binary_cross_entropy_with_logits
    torch.testing.assert_close(got.detach(), exact(logits.double(), target.double()).float())


@pytest.mark.parametrize("name", [*VIT_RECIPES, *ZOOMER_RECIPES])
def test_small_recipes_train_and_large_ones_stand(data, tmp_path, name):
    config = {**VIT_RECIPES, **ZOOMER_RECIPES}[name]
    if not name.endswith("-small"):
        small = {**VIT_RECIPES, **ZOOMER_RECIPES}[f"{name}-small"]
        assert config.train.epochs > small.train.epochs and config.view == small.view
        return
    loop = replace(config.train, data_workers=0, device="cpu", epochs=1.0, batch_size=8)
    if name in ZOOMER_RECIPES:
        train_zoomer(
            data / "shards", data / "maps", tmp_path / "run", replace(config, image_size=SIDE, width=8, train=loop)
        )
    else:
        config = replace(config, model="deit_tiny_patch16_224", image_size=SIDE, train=loop)
        train_vit(data / "shards", tmp_path / "run", replace(config, model_args=config.model_args | BODY))
    assert load_run(tmp_path / "run").settings["train"]["batch_size"] == 8


def test_recipes_by_name():
    assert recipe(None, VIT_RECIPES, 7) == 7
    assert recipe("deit3", VIT_RECIPES, 7).loss == "bce" and recipe("deit", VIT_RECIPES, 7).train.repeats == 3
    with pytest.raises(UsageError, match="--recipe resnet: choose one of deit, deit-small"):
        recipe("resnet", VIT_RECIPES, 7)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"ema": 1.0}, "train.ema 1"),
        ({"layer_decay": 0.0}, "train.layer_decay 0"),
        ({"accumulate": 0}, "train.accumulate 0"),
        ({"decay_epochs": 0.0}, "train.decay_epochs 0"),
        ({"keep": -1}, "train.keep -1"),
        ({"accumulate": 99}, "an epoch has 10 batches"),
    ],
)
def test_wrong_settings(data, tmp_path, change, told):
    with pytest.raises(UsageError, match=told):
        train_vit(data / "shards", tmp_path / "run", with_loop(PLAIN, **change))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"mixup": -1.0}, "mixup -1"),
        ({"mix_prob": 2.0}, "mix_prob 2"),
        ({"val_alpha": 2.0}, "val_alpha 2"),
        ({"token_label_weight": 1.0, "mixup": 0.5}, "without mixup"),
    ],
)
def test_wrong_settings_of_a_vit(change, told):
    with pytest.raises(UsageError, match=told):
        replace(PLAIN, **change)


@pytest.mark.parametrize("checkpoint_s", [0.0, 600.0])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_no_checkpoint_is_written_after_a_loss_that_is_not_finite(
    data, tmp_path, monkeypatch, accumulate, checkpoint_s
):
    """It is read one step late, but before a checkpoint: of the 16th batch, in the second epoch of ten batches."""
    original, update, calls, updates = ClassifyTask.loss, loop.update_weights, [], []

    def loss(task, batch):
        calls.append(batch)
        found, told = original(task, batch)
        return (found * float("nan") if len(calls) == 16 else found), told

    monkeypatch.setattr(ClassifyTask, "loss", loss)
    monkeypatch.setattr(loop, "update_weights", lambda *given: (updates.append(given), update(*given)))
    step = 16 // accumulate - 1
    config = with_loop(PLAIN, accumulate=accumulate, checkpoint_s=checkpoint_s, log_every=1000)
    with pytest.raises(ZpipeError, match=f"the loss became nan in step {step} of .*the last good state is "):
        train_vit(data / "shards", tmp_path / "run", config)
    late = 1 if checkpoint_s else 0  # a checkpoint that is due reads it in its own step
    assert len(updates) == step + 1 and len(calls) == (step + 1 + late) * accumulate
    state = load_checkpoint(tmp_path / "run")
    assert state["step"] == (10 // accumulate if checkpoint_s else step)
    assert all(value.isfinite().all() for value in state["model"].values())


@pytest.mark.parametrize("step", [5, 9, 19])
def test_a_loss_that_is_not_finite_ends_the_step_that_reads_it(data, tmp_path, monkeypatch, step):
    """In mid-epoch, in the last step of an epoch and in the last step of all."""
    original, calls = ClassifyTask.loss, []

    def loss(task, batch):
        calls.append(batch)
        found, told = original(task, batch)
        return (found / 0 if len(calls) == step + 1 else found), told

    monkeypatch.setattr(ClassifyTask, "loss", loss)
    with pytest.raises(ZpipeError, match=f"the loss became inf in step {step} of 20"):
        train_vit(data / "shards", tmp_path / "run", with_loop(PLAIN, log_every=1000), val=data / "val")
    assert not (tmp_path / "run" / "config.json").exists()
    assert (tmp_path / "run" / "checkpoint.pt").exists() == (step >= 10)


def test_normalising_is_the_same_wherever_it_was_asked_first():
    preprocessing = Preprocessing(image_size=2, mean=(0.25, 0.5, 0.125), std=(0.5, 0.25, 0.125))
    images = torch.randint(256, (2, 3, 2, 2), dtype=torch.uint8)
    with torch.inference_mode():
        first = preprocessing.normalise(images)
    weight = torch.ones(3, 1, 1, requires_grad=True)
    second = preprocessing.normalise(images) * weight
    second.sum().backward()  # what inference mode made could not be saved for this
    mean, std = (torch.tensor(each).view(1, 3, 1, 1) for each in (preprocessing.mean, preprocessing.std))
    assert torch.equal(first, (images.float() / 255.0 - mean) / std) and torch.equal(second, first)
    assert weight.grad.isfinite().all()


def test_a_device_without_memory_is_one_line(data, tmp_path, monkeypatch):
    loss = ClassifyTask.loss

    def full(task, batch):
        loss(task, batch)
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nSee the documentation")

    monkeypatch.setattr(ClassifyTask, "loss", full)
    with pytest.raises(ZpipeError) as error:
        train_vit(data / "shards", tmp_path / "run", PLAIN)
    told = str(error.value)
    assert str(tmp_path / "run") in told and "\n" not in told
    assert all(remedy in told for remedy in ("--batch-size", "train.accumulate", "train.precision=bf16"))


# -- devices -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "kind", "told"),
    [
        ("mps", UsageError, "choose auto, cpu or cuda"),
        ("meta", UsageError, "choose auto, cpu or cuda"),
        ("abacus", UsageError, "torch knows no such device"),
        ("cuda:2", ZpipeError, "torch sees 2 CUDA devices here, cuda:0 to cuda:1"),
    ],
)
def test_devices_that_are_not_to_be_had(monkeypatch, asked, kind, told):
    """On a machine of two GPUs."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ZpipeError, match=f"device {asked}: .*{told}") as error:
        loop.resolve_device(asked)
    assert type(error.value) is kind
    assert [str(loop.resolve_device(name)) for name in ("cuda", "cuda:1", "cpu")] == ["cuda", "cuda:1", "cpu"]


def test_a_run_on_the_cpu_opens_no_gpu(data, monkeypatch):
    def opened(*given):
        raise AssertionError("a GPU was opened")

    loader, draws, group = RelevanceLoader(data / "shards", batch_size=4), torch.Generator(), loop.ranks()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for name in ("get_rng_state", "set_rng_state"):
        monkeypatch.setattr(torch.cuda, name, opened)
    position = position_of(loader, draws, group, torch.device("cpu"))
    assert position["ranks"][0]["cuda"] is None
    position["ranks"][0]["cuda"] = torch.ones(3)  # the run was begun on a GPU
    restore_position(position, loader, draws, group, torch.device("cpu"))


def test_a_checkpoint_holds_the_generator_of_the_device_in_use(data, monkeypatch):
    device, states = torch.device("cuda", 1), {torch.device("cuda", 1): torch.ones(3)}
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda asked: states[asked])
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, asked: states.update({asked: state}))
    loader, draws, group = RelevanceLoader(data / "shards", batch_size=4), torch.Generator(), loop.ranks()
    position = position_of(loader, draws, group, device)
    states[device] = torch.zeros(3)
    restore_position(position, loader, draws, group, device)
    assert states == {device: position["ranks"][0]["cuda"]} and states[device].all()


# -- stopped at an epoch's end -----------------------------------------------------------------------------------------


KEPT = with_loop(PLAIN, keep=2, checkpoint_s=0.0)


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """An undisturbed run of two epochs of ten steps, with a validation after each."""
    run = tmp_path_factory.mktemp("kept") / "whole"
    train_vit(data / "shards", run, KEPT, val=data / "val")
    return run


def left_by(run):
    """What both runs must have alike: the lines but for their times, and every file of weights."""
    timed = ("share_", "images_per_s")
    told = [{name: value for name, value in line.items() if not name.startswith(timed)} for line in lines(run)]
    files = {str(path.relative_to(run)): path.read_bytes() for path in run.rglob("*.safetensors")}
    return told, files, (run / "best.json").read_text()


@pytest.mark.parametrize("step", [10, 20])
def test_a_stop_in_an_epochs_last_step_leaves_its_end_to_be_done(data, whole, tmp_path, step):
    asked = iter(range(1, step + 1))
    with pytest.raises(Stopped, match=f"stopped in step {step} of 20"):
        train_vit(data / "shards", tmp_path / "run", KEPT, val=data / "val", stop=lambda: next(asked) == step)
    train_vit(data / "shards", tmp_path / "run", KEPT, val=data / "val")
    assert left_by(tmp_path / "run") == left_by(whole)


@pytest.mark.parametrize("at", ["keep_epoch", "save_checkpoint"])
@pytest.mark.parametrize("epoch", [1, 2])
def test_a_kill_in_an_epochs_end_has_it_done_again(data, whole, tmp_path, monkeypatch, at, epoch):
    """Before its weights are kept, and when nothing but its checkpoint is left to be written."""
    original = getattr(loop, at)

    def killed(run, given, *others):
        number = others[0] if at == "keep_epoch" else given["epoch"] if given["position"] is None else None
        if number == epoch:
            raise Stop
        original(run, given, *others)

    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr(loop, at, killed)
        train_vit(data / "shards", tmp_path / "run", KEPT, val=data / "val")
    train_vit(data / "shards", tmp_path / "run", KEPT, val=data / "val")
    assert left_by(tmp_path / "run") == left_by(whole)


# -- stopped from outside ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def fifteen(data, tmp_path_factory):
    """The weights after an undisturbed run of 15 epochs."""
    run = tmp_path_factory.mktemp("fifteen") / "run"
    train_vit(data / "shards", run, replace(PLAIN, train=replace(LOOP, epochs=15.0, log_every=1, warmup_epochs=5.0)))
    return (run / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("number", "to", "workers"),
    [
        (signal.SIGTERM, "process", 1),
        (signal.SIGTERM, "both", 2),  # as from `timeout` and schedulers
        (signal.SIGINT, "group", 2),  # as from a terminal
    ],
)
def test_a_signal_saves_and_ends_and_the_run_resumes(data, fifteen, tmp_path, number, to, workers):
    """In a session of its own, with data processes; the checkpoint is written in mid-epoch, long before one is due."""
    sets = {"train.log_every": 1, "model_args": BODY, "train.batch_size": 4}
    options = [f"--set={name}={json.dumps(value)}" for name, value in sets.items()]
    options += ["--model", "deit_tiny_patch16_224", "--image-size", str(SIDE), "--epochs", "15", "--device", "cpu"]
    options += ["--data-workers", str(workers)]

    def start(out):
        command = [sys.executable, "-c", "from zpipe.cli import main; main()", "train-vit", str(data / "shards")]
        streams = {"stderr": subprocess.PIPE, "stdout": subprocess.DEVNULL, "text": True, "start_new_session": True}
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        return subprocess.Popen([*command, "--out", str(out), *options], env=environment, **streams)

    out = tmp_path / "run"
    process = start(out)
    try:
        end = time.monotonic() + 90
        while not (out / "metrics.jsonl").is_file() or len((out / "metrics.jsonl").read_bytes()) < 1000:
            assert process.poll() is None and time.monotonic() < end
            time.sleep(0.01)
        if to != "group":
            process.send_signal(number)
        if to != "process":
            os.killpg(process.pid, number)
        _, told = process.communicate(timeout=60)
    finally:
        process.kill()
    ends = {signal.SIGTERM: (1, "error: terminated"), signal.SIGINT: (130, "error: interrupted")}
    assert process.returncode == ends[number][0] and "Traceback" not in told
    assert told.splitlines()[-1].startswith(f"{ends[number][1]}; run the same command again to ")
    state = load_checkpoint(out)
    assert state["step"] == lines(out)[-1]["step"]
    process = start(out)
    _, told = process.communicate(timeout=120)
    assert process.returncode == 0, told
    assert (out / "model.safetensors").read_bytes() == fifteen


def test_a_second_signal_ends_training_that_does_not_come_to_its_next_step(data, tmp_path):
    """Without the command line: the first is held back, the second is as without training."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # shells let what runs in the background ignore it
    sent = []

    def hang(stage, done, total, **facts):
        for _ in range(2):
            sent.append(done)
            signal.raise_signal(signal.SIGINT)
            time.sleep(0.6)
        raise AssertionError("not ended")

    with pytest.raises(KeyboardInterrupt):
        train_vit(data / "shards", tmp_path / "run", PLAIN, progress=hang)
    assert sent == [3, 3] and signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"epoch": 1}, "in epoch 0, but its data is in epoch 1; restore the file, or delete"),
        ({"seed": 5}, "the state was taken with seed=5"),
        ({"batch": 99}, "the state was taken behind batch 99"),
    ],
)
def test_a_position_that_cannot_be_is_one_line(data, tmp_path, change, told):
    run = tmp_path / "run"
    asked = iter(range(1, 4))
    with pytest.raises(Stopped):
        train_vit(data / "shards", run, PLAIN, stop=lambda: next(asked) == 3)
    state = load_checkpoint(run)
    state["position"]["loader"] |= change
    loop.save_checkpoint(run, state)
    with pytest.raises(ZpipeError, match=f"checkpoint.pt: .*{told}") as error:
        train_vit(data / "shards", run, PLAIN)
    assert "\n" not in str(error.value)


def test_a_checkpoint_of_other_features_is_refused(data, tmp_path):
    run = tmp_path / "run"

    def stop(stage, done, total, **facts):
        if done == 15:
            raise Stop

    with pytest.raises(Stop):
        train_vit(data / "shards", run, PLAIN, progress=stop)
    with pytest.raises(ZpipeError, match="was begun with train.ema = 0.0, now it is 0.9"):
        train_vit(data / "shards", run, with_loop(PLAIN, ema=0.9))


def test_maps_are_mixed_with_their_images(data, tmp_path):
    config = replace(ZOOM, scores="maps", mixup=0.8, cutmix=1.0)
    train_vit(data / "shards", tmp_path / "run", config, maps=data / "maps")
    assert load_run(tmp_path / "run").model.score_grid == GRID
