"""The settings that are left to the machine: on a CPU as ever, on CUDA such that it is kept busy."""

from __future__ import annotations

import copy
import importlib.util
import json
import os
from dataclasses import replace

import pytest
import safetensors.torch
import timm
import torch
from tiny import BODY, GRID, SIDE, scenes, store
from torch import nn

from zpipe.schemas.errors import ZpipeError
from zpipe.train import device as devices
from zpipe.train.checkpoint import Preprocessing
from zpipe.train.data.loader import RelevanceLoader
from zpipe.train.device import available_cores, best_precision, data_workers_for
from zpipe.train.evaluation.inference import eval_loader
from zpipe.train.fit.config import TrainConfig
from zpipe.train.fit.defaults import resolved
from zpipe.train.fit.initialise import build_vit
from zpipe.train.fit.loop import Stopped, Trainer
from zpipe.train.fit.optim import make_optimizer, restore_optimizer
from zpipe.train.fit.train_vit import ClassifyTask, VitConfig, train_vit
from zpipe.train.fit.train_zoomer import ZoomerTask
from zpipe.train.fit.wrapped import channels_last, compiles_by_default
from zpipe.train.losses import ZoomerLoss
from zpipe.train.models import Zoomer
from zpipe.train.ranks import Ranks

pytestmark = pytest.mark.usefixtures("one_thread")

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
LOOP = TrainConfig(epochs=1, batch_size=4, data_workers=0, device="cpu", lr=1e-3)
PLAIN = VitConfig(model="deit_tiny_patch16_224", model_args=BODY, image_size=SIDE, train=LOOP)
PREPROCESSING = Preprocessing(image_size=SIDE, mean=(0.5, 0.4, 0.3), std=(0.3, 0.4, 0.5))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("defaults")
    scenes(root / "shards")
    store(root / "shards", root / "maps")
    return root


def with_loop(config, **changes):
    return replace(config, train=replace(config.train, **changes))


def weights(run):
    return safetensors.torch.load_file(run / "model.safetensors")


def zoomer_trainer(data, run, config):
    torch.manual_seed(0)
    device = torch.device(config.device)
    task = ZoomerTask(Zoomer(2, GRID, width=8).to(device), ZoomerLoss(), PREPROCESSING, device)
    return Trainer(task, RelevanceLoader(data / "shards", data / "maps", batch_size=4, image_size=SIDE), config, run)


# ------------------------------------------------------------------------------------------------- what they are


def test_on_a_cpu_they_are_as_ever(tmp_path):
    config = resolved(TrainConfig(device="cpu"), tmp_path)
    assert (config.precision, config.data_workers) == ("float32", 1)
    assert data_workers_for(CPU, on_cpu=0) == 0
    assert not compiles_by_default(build_vit("zoomvit_tiny_patch16_224", 10, SIDE, BODY))


def test_on_cuda_a_step_is_bf16_fused_and_channels_last(cuda, data, tmp_path):
    """Through the trainer, without any setting but the device."""
    trainer = zoomer_trainer(data, tmp_path, TrainConfig(device="cuda", batch_size=4))
    kernels = [each for each in trainer.task.model.modules() if isinstance(each, nn.Conv2d)]
    assert len(kernels) > 4
    assert all(each.weight.is_contiguous(memory_format=torch.channels_last) for each in kernels)
    dtypes = set()
    kernels[0].register_forward_hook(lambda module, inputs, output: dtypes.add(output.dtype))
    for batch in list(trainer.loader)[:2]:
        trainer.train_step([batch])
    assert dtypes == {torch.bfloat16}
    assert trainer.config.precision == "bf16" and trainer.metrics()["loss"] > 0
    assert cuda.ops["_fused_adamw_"] == 4  # one for each group of weights, twice


def test_a_run_on_cuda_validates_in_its_precision(cuda, data, tmp_path, monkeypatch):
    seen = []
    original = ClassifyTask.validate

    def validate(task, model):
        hook = model.blocks[0].mlp.fc1.register_forward_hook(lambda *call: seen.append(call[2].dtype))
        found = original(task, model)
        hook.remove()
        return found

    monkeypatch.setattr(ClassifyTask, "validate", validate)
    for name, precision in (("auto", "auto"), ("exact", "float32")):
        config = with_loop(PLAIN, device="cuda", precision=precision, compile=False, epochs=0.2)
        train_vit(data / "shards", tmp_path / name, config, val=data / "shards")
        recorded = json.loads((tmp_path / name / "run.json").read_text())["settings"]["train"]["precision"]
        assert (set(seen), recorded) == (({torch.bfloat16}, "bf16") if name == "auto" else ({torch.float32}, "float32"))
        seen.clear()


def test_a_device_without_bf16_trains_in_float32(cuda, monkeypatch):
    assert best_precision(CUDA) == "bf16"
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    assert best_precision(CUDA) == "float32"


@pytest.mark.parametrize(
    ("cores", "processes", "workers"), [(1, 1, 1), (2, 1, 1), (16, 1, 15), (64, 1, 16), (96, 8, 11), (8, 8, 1)]
)
def test_data_workers_for_a_gpu_follow_the_cores(monkeypatch, cores, processes, workers):
    monkeypatch.setattr(devices, "available_cores", lambda: cores)
    assert data_workers_for(CUDA, processes=processes, on_cpu=1) == workers
    assert data_workers_for(CPU, processes=processes, on_cpu=1) == 1


@pytest.mark.parametrize(("quota", "cores"), [("150000 100000", 1), ("300000 100000", 3), ("50000 100000", 1)])
def test_cores_are_those_of_the_container(monkeypatch, tmp_path, quota, cores):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(4)), raising=False)
    monkeypatch.setattr(devices, "CPU_QUOTA", tmp_path / "cpu.max")
    for free in (None, "max 100000"):
        if free is not None:
            devices.CPU_QUOTA.write_text(free)
        assert available_cores() == 4
    devices.CPU_QUOTA.write_text(quota)
    assert available_cores() == cores


def test_what_is_compiled_by_default(cuda, monkeypatch):
    """Blocks of transformers, where Triton can make kernels of them."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    models = {
        name: build_vit(name, 10, SIDE, arguments).to(CUDA)
        for name, arguments in (("zoomvit_tiny_patch16_224", BODY), (PLAIN.model, BODY), ("resnet10t", {}))
    }
    assert [compiles_by_default(model) for model in models.values()] == [True, True, False]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (6, 1))
    assert not any(compiles_by_default(model) for model in models.values())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert not any(compiles_by_default(model) for model in models.values())


def test_a_patch_embedding_stays_a_matrix():
    vit, conv = build_vit(PLAIN.model, 10, SIDE, BODY), timm.create_model("resnet10t")
    for model in (vit, conv):
        channels_last(model)
    assert vit.patch_embed.proj.weight.is_contiguous()
    assert conv.layer1[0].conv1.weight.is_contiguous(memory_format=torch.channels_last)


# ----------------------------------------------------------------------------------------- what a run keeps of them


def test_a_run_keeps_the_precision_and_the_workers_that_it_began_with(data, tmp_path):
    """As one does that began on a GPU and is resumed on a CPU, where the defaults are others."""
    begun = with_loop(PLAIN, precision="bf16", data_workers=2)
    with pytest.raises(Stopped):
        train_vit(data / "shards", tmp_path / "run", begun, stop=iter([False] * 3 + [True]).__next__)
    left_open = with_loop(PLAIN, precision="auto", data_workers=None)
    config = resolved(left_open.train, tmp_path / "run")
    assert (config.precision, config.data_workers) == ("bf16", 2)
    with pytest.raises(ZpipeError, match=r"begun with train.precision = 'bf16', now it is 'float32'; give another"):
        train_vit(data / "shards", tmp_path / "run", with_loop(PLAIN, precision="float32"))
    train_vit(data / "shards", tmp_path / "run", left_open)
    train_vit(data / "shards", tmp_path / "whole", begun)
    assert weights(tmp_path / "run").keys() == weights(tmp_path / "whole").keys()
    for name, value in weights(tmp_path / "run").items():
        assert torch.equal(value, weights(tmp_path / "whole")[name])


@pytest.mark.parametrize(("other", "agreed"), [(("float32", 5), ("float32", 5)), (("bf16", 20), ("bf16", 7))])
def test_ranks_on_different_machines_agree(cuda, monkeypatch, tmp_path, other, agreed):
    """Ranks with other numbers of workers would disagree on who has which sample."""
    monkeypatch.setattr(devices, "available_cores", lambda: 8)
    monkeypatch.setattr(Ranks, "gather", lambda self, value: [value, other])
    config = resolved(TrainConfig(device="cuda"), tmp_path)
    assert (config.precision, config.data_workers) == agreed


def test_a_run_of_an_earlier_version_goes_on_in_float32(data, tmp_path, cuda):
    config = with_loop(PLAIN, precision="float32", device="cuda", compile=False)
    with pytest.raises(Stopped):
        train_vit(data / "shards", tmp_path, config, stop=iter([False] * 3 + [True]).__next__)
    path = tmp_path / "run.json"
    record = json.loads(path.read_text())
    for name in ("precision", "compile", "data_workers"):
        del record["settings"]["train"][name]
    path.write_text(json.dumps(record))
    left_open = with_loop(PLAIN, device="cuda", compile=False, precision="auto", data_workers=None)
    for name, value in (("data_workers", "many"), ("precision", 16)):
        broken = copy.deepcopy(record)
        broken["settings"]["train"][name] = value
        path.write_text(json.dumps(broken))
        with pytest.raises(ZpipeError, match=rf"run.json: setting {name}: .*; restore the file, or give another"):
            resolved(left_open.train, tmp_path)
    path.write_text(json.dumps(record))
    assert resolved(left_open.train, tmp_path).precision == "float32"
    train_vit(data / "shards", tmp_path, with_loop(left_open, data_workers=0))


# -------------------------------------------------------------------------------- the order of samples and the workers


def order(data, workers, **more):
    loader = RelevanceLoader(data / "shards", batch_size=4, image_size=SIDE, num_workers=workers, **more)
    return [key for batch in loader for key in batch["key"]]


def test_up_to_eight_workers_take_the_samples_in_one_order(data):
    """The order is that of the lanes, see `zpipe.train.data.order`: 9 workers have 9 of them."""
    assert order(data, 0) == order(data, 1) == order(data, 2)
    lanes = {
        workers: RelevanceLoader(data / "shards", batch_size=4, num_workers=workers)._lanes for workers in range(17)
    }
    assert [workers for workers, count in lanes.items() if count == 8] == [0, 1, 2, 4, 8]


def test_a_limit_takes_the_same_samples_on_every_machine(cuda, data, monkeypatch):
    monkeypatch.setattr(devices, "available_cores", lambda: 4)

    def workers(**options):
        loader = eval_loader(PREPROCESSING, data / "shards", None, batch_size=4, **options)
        return loader.num_workers

    assert workers(data_workers=None, device="cuda") == workers(data_workers=None, device="cuda", limit=40) == 3
    assert workers(data_workers=None, device="cuda", limit=39) == workers(data_workers=None, device="cpu") == 0
    assert workers(data_workers=2, device="cuda", limit=1) == 2


# -------------------------------------------------------------------------------------- optimizers between devices


def stepped(optimizer, model, images):
    optimizer.zero_grad()
    model(images).square().mean().backward()
    optimizer.step()


@pytest.mark.parametrize("opt", ["adamw", "sgd", "lookahead_adamw"])
def test_only_on_cuda_the_kernels_are_fused(cuda, opt):
    config = TrainConfig(opt=opt, device="cuda")
    assert not any(group.get("fused") for group in make_optimizer(nn.Linear(2, 2), config).param_groups)
    assert all(group["fused"] for group in make_optimizer(nn.Linear(2, 2).to(CUDA), config).param_groups)
    config = replace(config, opt_args={"foreach": True})
    assert not any(group.get("fused") for group in make_optimizer(nn.Linear(2, 2).to(CUDA), config).param_groups)


def test_an_optimizer_without_a_fused_kernel_is_left_alone(cuda):
    model = nn.Linear(2, 2).to(CUDA)
    optimizer = make_optimizer(model, TrainConfig(opt="lamb", device="cuda"))
    assert not any(group.get("fused") for group in optimizer.param_groups)


@pytest.mark.parametrize("opt", ["adamw", "lookahead_adamw"])
@pytest.mark.parametrize("fused", [True, False], ids=["from a CPU", "from a GPU"])
def test_a_state_moves_between_fused_and_other_kernels(fused, opt):
    """And between memory formats; the steps after it are the same up to rounding."""
    torch.manual_seed(0)
    images = torch.randn(2, 3, 8, 8)
    first = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3))
    second = copy.deepcopy(first).to(memory_format=torch.channels_last)
    before = make_optimizer(first, TrainConfig(opt=opt, lr=0.1, opt_args={"fused": not fused}))
    after = make_optimizer(second, TrainConfig(opt=opt, lr=0.1, opt_args={"fused": fused}))
    stepped(before, first, images)
    second.load_state_dict(first.state_dict())
    restore_optimizer(after, copy.deepcopy(before.state_dict()))
    assert all(group["fused"] is fused for group in after.param_groups)
    state = getattr(after, "_base_optimizer", after).state
    assert len(state) == 4
    for weight, held in state.items():
        assert held["exp_avg"].stride() == weight.stride() and float(held["step"]) == 1
    stepped(before, first, images)
    stepped(after, second, images)
    for one, other in zip(first.parameters(), second.parameters(), strict=True):
        torch.testing.assert_close(other, one, atol=1e-6, rtol=1e-5)
