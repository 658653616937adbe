"""How the loop runs a model: compiled, with a retreat, and without traces of the steps that it tries."""

from __future__ import annotations

import copy
import json
import socket
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import safetensors.torch
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from tiny import BODY, GRID, SIDE, scenes
from torch._dynamo.utils import counters
from torch.nn.parallel import DistributedDataParallel

from zpipe.schemas.errors import ZpipeError
from zpipe.train.fit import wrapped
from zpipe.train.fit.config import TrainConfig
from zpipe.train.fit.initialise import build_vit
from zpipe.train.fit.loop import Stopped
from zpipe.train.fit.train_vit import VitConfig, train_vit
from zpipe.train.models import Zoomer, backbone

# While it compiles, torch looks at the gradients of all that it meets.
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor"),
]

LOOP = TrainConfig(epochs=1, batch_size=4, data_workers=0, log_every=1, device="cpu", lr=1e-3, compile=True)
ZOOM = VitConfig(
    model="zoomvit_tiny_patch16_224",
    model_args=BODY | {"drop_path_rate": 0.1},
    image_size=SIDE,
    scores="centre",
    train=LOOP,
)
CONFIGS = {"zoomvit": ZOOM, "plain": replace(ZOOM, model="deit_tiny_patch16_224", scores=None)}
ROWS = {"embed_dim": 24, "depth": 4, "num_heads": 3, "patch_size": 4}
TWELVE = {"backbone": "deit_tiny_patch16_224", "backbone_args": ROWS}
SPARSE = {"conv_dim": 16, "num_tokens": 4, "focus_dim": 64, "cortex_dim": 64, "num_heads": 8, "num_points": 9}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("wrapped")
    scenes(root / "shards")
    return root


def eagerly(config):
    return replace(config, train=replace(config.train, compile=False))


def compile_by(monkeypatch, backend):
    torch._dynamo.reset()
    monkeypatch.setattr(wrapped, "compiled", partial(backbone.compiled, backend=backend))


def weights(run):
    return safetensors.torch.load_file(run / "model.safetensors")


def losses(run):
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


# --------------------------------------------------------------------------------------------------------- compiled


@pytest.mark.parametrize("name", CONFIGS)
def test_a_compiled_run_equals_an_eager_one_and_resumes(data, tmp_path, monkeypatch, name):
    config = CONFIGS[name]
    train_vit(data / "shards", tmp_path / "eager", eagerly(config))
    compile_by(monkeypatch, "aot_eager")
    counters.clear()
    train_vit(data / "shards", tmp_path / "whole", config)
    assert counters["stats"]["unique_graphs"] in (1, 2) and not counters["graph_break"]  # with and without drop path
    assert losses(tmp_path / "whole") == pytest.approx(losses(tmp_path / "eager"), abs=1e-5)
    torch.testing.assert_close(weights(tmp_path / "whole"), weights(tmp_path / "eager"), atol=1e-3, rtol=1e-3)
    with pytest.raises(Stopped):
        train_vit(data / "shards", tmp_path / "run", config, stop=iter([False] * 5 + [True]).__next__)
    train_vit(data / "shards", tmp_path / "run", config)
    assert (tmp_path / "run/model.safetensors").read_bytes() == (tmp_path / "whole/model.safetensors").read_bytes()


def test_a_run_may_be_resumed_without_a_compiler(data, tmp_path, monkeypatch):
    compile_by(monkeypatch, "eager")
    with pytest.raises(Stopped):
        train_vit(data / "shards", tmp_path, ZOOM, stop=iter([False] * 5 + [True]).__next__)
    train_vit(data / "shards", tmp_path, eagerly(ZOOM))
    assert (tmp_path / "model.safetensors").is_file()


def broken(graph, inputs):
    raise OSError("no compiler\nhere")


def test_what_cannot_be_compiled_runs_as_it_is_or_is_refused_if_it_must(data, tmp_path, monkeypatch):
    compile_by(monkeypatch, broken)
    with pytest.raises(
        ZpipeError, match=r"^train.compile: the model can't be compiled \(.*\); set train.compile=false$"
    ):
        train_vit(data / "shards", tmp_path / "must", ZOOM)
    monkeypatch.setattr(wrapped, "compiles_by_default", lambda model: True)
    by_default = replace(ZOOM, train=replace(LOOP, compile=None))
    with pytest.warns(UserWarning, match=r"^the model can't be compiled \(.*\), and is trained uncompiled$") as warned:
        train_vit(data / "shards", tmp_path / "may", by_default)
    assert len(warned) == 1
    train_vit(data / "shards", tmp_path / "eager", eagerly(ZOOM))
    assert (tmp_path / "may/model.safetensors").read_bytes() == (tmp_path / "eager/model.safetensors").read_bytes()


def test_an_error_that_is_not_of_the_compiler_is_not_hidden(data, tmp_path, monkeypatch):
    def wrong(task, batch):
        raise KeyError("a mistake")

    monkeypatch.setattr("zpipe.train.fit.train_vit.ClassifyTask.loss", wrong)
    with pytest.raises(KeyError, match="a mistake"):
        train_vit(data / "shards", tmp_path, ZOOM)


def test_a_plain_vit_has_compiled_blocks_and_stays_as_it_is():
    model = build_vit("deit_tiny_patch16_224", 10, SIDE, BODY)
    twin = backbone.compiled(model, backend="eager")
    assert all(a is b for a, b in zip(twin.parameters(), model.parameters(), strict=True))
    assert twin.blocks is not model.blocks and list(model.state_dict()) == list(copy.deepcopy(model).state_dict())
    images = torch.rand(2, 3, SIDE, SIDE)
    torch.testing.assert_close(twin.eval()(images), model.eval()(images))


# -------------------------------------------------------------------------------------------------- a step to try


def rehearsed(model, call):
    """Whether a step gives all parameters gradients, and what it leaves behind."""
    task = SimpleNamespace(model=model, loss=lambda batch: (call(model), {}))
    return wrapped._rehearse(task, {}, torch.enable_grad)


def summed(output):
    return sum(each.sum() for each in output) if isinstance(output, tuple) else output.sum()


SCORES = torch.linspace(0, 1, GRID**2).expand(3, -1)
ZOOMS = [{"scores": SCORES, "alpha": alpha} for alpha in (0.0, 0.5, 1.0)]
ZOOMS += [{"scores": SCORES, "budget": budget} for budget in (0, 2, 4)]
# A model, its arguments, and the ways in which a training may call it. The first is that of a run's beginning.
MODELS = {
    "zoomvit": ("zoomvit_tiny_patch16_224", BODY, [*ZOOMS, {}]),
    "zoomvit of large cells": ("zoomvit_tiny_patch16_224", BODY | {"zoom_factor": 0.5}, [*ZOOMS, {}]),
    "plain": ("deit_tiny_patch16_224", BODY, [{}]),
    "distilled": ("deit_tiny_distilled_patch16_224", BODY, [{}]),
    "lvvit": ("lvvit_small", ROWS, [{"return_dense": True}, {}]),
    "pruned": ("token_pruned_vit", TWELVE | {"prune_block": 2}, [{}]),
    "merged": ("tome_vit", TWELVE | {"r": 4}, [{}]),
    "box": ("image_zoom", TWELVE | {"patch_size": 8}, [{"scores": SCORES}]),
    "sparse": ("sparseformer_tiny", SPARSE, [{}]),
    "convolutional": ("resnet10t", {}, [{}]),
}


@pytest.mark.parametrize("name", MODELS)
def test_every_step_gives_all_parameters_gradients(name):
    """So that ranks need not look for those without."""
    kind, arguments, calls = MODELS[name]
    model = build_vit(kind, 10, SIDE, arguments)
    images = torch.rand(3, 3, SIDE, SIDE)
    for call in calls:
        assert rehearsed(model, lambda model, call=call: summed(model(images, **call))), call


@pytest.mark.parametrize(("kind", "more"), [("cfvit_small", {}), ("lfvit_small", {"region_size": 3})])
def test_two_stages_that_refine_all_cells_leave_one_out(kind, more):
    """A run that begins so looks for those parameters to its end; one that never does so need not."""
    model = build_vit(kind, 10, SIDE, ROWS | more)
    images = torch.rand(3, 3, SIDE, SIDE)
    found = [
        rehearsed(model, lambda model, full=full: summed(model(images, return_stages=True, full_split=full)))
        for full in (True, False)
    ]
    assert found == [False, True]


def test_the_step_leaves_no_trace():
    model = Zoomer(2, GRID, width=8)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert rehearsed(model, lambda model: model(torch.rand(4, 3, SIDE, SIDE)).sum())
    assert all(each.grad is None for each in model.parameters()) and len(list(model.buffers())) > 3
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


# ------------------------------------------------------------------------------------------------------- two ranks


def work(rank, port, data, out):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    wrapped.compiled = partial(backbone.compiled, backend="aot_eager")
    shared = []
    original = DistributedDataParallel.__init__

    def init(self, *args, **options):
        shared.append(options["find_unused_parameters"])
        original(self, *args, **options)

    DistributedDataParallel.__init__ = init
    for name, config in CONFIGS.items():
        train_vit(data / "shards", out / name, config)
        train_vit(data / "shards", out / f"{name}-eager", eagerly(config))
        wrapped.compiled = partial(backbone.compiled, backend=broken if rank == 0 else "aot_eager")
        torch._dynamo.reset()
        wrapped.compiles_by_default = lambda model: True
        train_vit(data / "shards", out / f"{name}-half", replace(config, train=replace(config.train, compile=None)))
        wrapped.compiled = partial(backbone.compiled, backend="aot_eager")
        torch._dynamo.reset()
    assert shared == [False] * 6
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_ranks_with_compiled_blocks(data, tmp_path):
    """They equal eager ranks; if one of them can't compile, both do without."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(work, (port, data, tmp_path), nprocs=2)
    for name in CONFIGS:
        assert losses(tmp_path / name) == pytest.approx(losses(tmp_path / f"{name}-eager"), abs=1e-5)
        half, eager = (tmp_path / f"{name}-{kind}" / "model.safetensors" for kind in ("half", "eager"))
        assert half.read_bytes() == eager.read_bytes()
