"""Training in processes of torchrun: as good as those of Ray, one line for an error, and resumed after a kill."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from tiny import BODY, SIDE, scenes

from zpipe.schemas.errors import UsageError
from zpipe.schemas.progress import silent
from zpipe.train.fit import torchrun
from zpipe.train.fit.config import TrainConfig
from zpipe.train.fit.distributed import Workers, run_training
from zpipe.train.fit.train_vit import VitConfig, train_vit
from zpipe.train.resume_state import load_checkpoint

LOOP = TrainConfig(epochs=2, batch_size=8, data_workers=0, log_every=1, device="cpu", lr=1e-3)
DROP = VitConfig(
    model="deit_tiny_patch16_224", model_args=BODY | {"drop_path_rate": 0.3}, image_size=SIDE, mixup=0.8, train=LOOP
)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("torchrun")
    scenes(root / "shards")
    return root


def lines(run):
    path = run / "metrics.jsonl"
    return path.read_text().splitlines() if path.is_file() else []


def rank_of_two(rank, port, data, out, config):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    train_vit(data / "shards", out, config)
    dist.destroy_process_group()


def two_ranks(data, out, config):
    """The run of two processes that gloo alone joins, as Ray's are."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(rank_of_two, (port, data, out, config), nprocs=2)
    return (out / "model.safetensors").read_bytes()


class Running:
    """`torchrun ... -m zpipe train-vit` with two processes."""

    def __init__(self, data, out, log, config, *options, restarts=0):
        sets = {"model_args": config.model_args, "mixup": config.mixup, "train.log_every": 1}
        sets |= {"train.checkpoint_s": config.train.checkpoint_s, "train.warmup_epochs": 0.0}
        line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2]
        line += ["--max-restarts", restarts, "-m", "zpipe", "train-vit", data / "shards", "--out", out]
        line += ["--model", config.model, "--image-size", SIDE, "--batch-size", 8, "--epochs", config.train.epochs]
        line += ["--lr", 1e-3, "--device", "cpu", "--data-workers", 0, *options]
        line += [f"--set={name}={json.dumps(value)}" for name, value in sets.items()]
        self.out, self.log = out, log
        with open(log, "w") as file:
            environment = os.environ | {"OMP_NUM_THREADS": "1"}
            self.process = subprocess.Popen(list(map(str, line)), stdout=file, stderr=file, env=environment)

    def ranks(self):
        """The process ids of the ranks."""
        found = Path(f"/proc/{self.process.pid}/task").glob("*/children")
        return [int(pid) for path in found for pid in path.read_text().split()]

    def until(self, steps):
        end = time.monotonic() + 240
        while len(lines(self.out)) < steps:
            assert self.process.poll() is None and time.monotonic() < end, self.log.read_text()
            time.sleep(0.05)

    def said(self, limit=300):
        """What the ranks said, without the lines of progress and those of torchrun itself."""
        self.process.wait(limit)
        ours = ("error: ", "warning: ", "note: ", str(self.out))
        return [line for line in self.log.read_text().splitlines() if line.startswith(ours)]

    def end(self):
        with contextlib.suppress(ProcessLookupError):
            for pid in [self.process.pid, *self.ranks()] if self.process.poll() is None else []:
                os.kill(pid, signal.SIGKILL)
        self.process.wait(30)


@pytest.fixture
def launch(data, tmp_path):
    started = []

    def run(config, *options, **more):
        started.append(Running(data, tmp_path / "run", tmp_path / "log", config, *options, **more))
        return started[-1]

    yield run
    for running in started:
        running.end()


def test_the_processes_of_torchrun_equal_those_of_ray(data, launch, tmp_path):
    """Bit for bit. Only the first of them speaks."""
    running = launch(DROP)
    said = running.said()
    assert running.process.returncode == 0, running.log.read_text()
    assert said == [f"{tmp_path / 'run'}: model ready; measure it with: zpipe evaluate {tmp_path / 'run'} VAL_SHARDS"]
    assert [json.loads(line)["step"] for line in lines(tmp_path / "run")] == list(range(1, 11))
    progress = [line for line in running.log.read_text().splitlines() if line.startswith("{")]
    assert sum(json.loads(line)["done"] == 10 for line in progress) == 1
    assert (tmp_path / "run/model.safetensors").read_bytes() == two_ranks(data, tmp_path / "other", DROP)


@pytest.mark.slow
def test_a_killed_rank_is_started_again_and_changes_nothing(data, launch, tmp_path):
    config = replace(DROP, train=replace(LOOP, epochs=16, checkpoint_s=0.0))
    running = launch(config, restarts=1)
    running.until(8)
    os.kill(running.ranks()[-1], signal.SIGKILL)
    assert len(lines(running.out)) < 60
    said = running.said()
    assert running.process.returncode == 0, running.log.read_text()
    assert len([line for line in said if line.startswith("error: ")]) <= 1  # of the rank that missed it
    assert [json.loads(line)["step"] for line in lines(running.out)] == list(range(1, 81))
    assert (running.out / "model.safetensors").read_bytes() == two_ranks(data, tmp_path / "whole", config)


@pytest.mark.slow
def test_without_restarts_a_killed_rank_ends_all_and_the_same_command_resumes(data, launch, tmp_path):
    config = replace(DROP, train=replace(LOOP, epochs=16, checkpoint_s=0.0))
    running = launch(config)
    running.until(8)
    os.kill(running.ranks()[-1], signal.SIGKILL)
    said = running.said()
    assert (
        running.process.returncode == 1 and len(said) == 1 and said[0].endswith("run the same command again to resume")
    )
    assert 7 <= load_checkpoint(running.out)["step"] < 80  # a line is logged before its step is saved
    running = launch(config)
    running.said()
    assert (running.out / "model.safetensors").read_bytes() == two_ranks(data, tmp_path / "whole", config)


@pytest.mark.slow
def test_a_signal_to_torchrun_saves_and_is_one_line(launch):
    running = launch(replace(DROP, train=replace(LOOP, epochs=4000, checkpoint_s=600.0)))
    running.until(3)
    running.process.send_signal(signal.SIGTERM)
    assert running.said() == ["error: terminated; run the same command again to resume"]
    state = load_checkpoint(running.out)
    assert state["step"] == len(lines(running.out)) and len(state["position"]["ranks"]) == 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--num-workers", 2], "error: --num-workers, --address: torchrun has started the training processes; leave"),
        (["--batch-size", 5], "error: train.batch_size 5: can't be shared evenly by 2 training processes; give"),
        (["--num-classes", 9], "error: key "),  # found by one of them while the other waits for it
        (["--set", "train.nothing=1"], "error: setting train.nothing: unknown"),
    ],
)
def test_an_error_of_any_rank_is_one_line(launch, options, told):
    running = launch(DROP, *options)
    (line,) = running.said()
    assert line.startswith(told) and running.process.returncode == 1


# ------------------------------------------------------------------------------------------- without other processes


def environment(monkeypatch, **more):
    names = {"TORCHELASTIC_RUN_ID": "run", "TORCHELASTIC_RESTART_COUNT": "0", "RANK": "1", "LOCAL_RANK": "1"}
    names |= {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "GROUP_WORLD_SIZE": "2"}
    for name, value in (names | more).items():
        monkeypatch.setenv(name, value)


def test_a_process_that_torchrun_has_not_started_is_the_first():
    assert not torchrun.is_launched() and torchrun.is_first()
    with pytest.raises(KeyError), torchrun.first_error_alone():
        raise KeyError


def test_a_gpu_for_each_process(cuda, monkeypatch):
    environment(monkeypatch)
    with pytest.raises(UsageError, match=r"started 2 processes .* sees 1 CUDA devices; give --nproc-per-node 1, or "):
        run_training(train_vit, {}, replace(DROP, train=replace(LOOP, device="auto")), Workers())
    with pytest.raises(UsageError, match="--device cuda:0: training processes take a GPU each; give --device cuda,"):
        run_training(train_vit, {}, replace(DROP, train=replace(LOOP, device="cuda:0")), Workers())


@pytest.mark.parametrize(("device", "backend"), [("cpu", "gloo"), ("auto", "nccl")])
def test_a_rank_joins_takes_its_gpu_and_resumes_if_it_was_started_again(cuda, monkeypatch, device, backend):
    environment(monkeypatch, TORCHELASTIC_RESTART_COUNT="1", RANK="9")
    calls = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: calls.append(f"cuda:{device}"))
    monkeypatch.setattr(dist, "init_process_group", calls.append)
    monkeypatch.setattr(dist, "destroy_process_group", lambda: calls.append("left"))
    config = replace(DROP, train=replace(LOOP, device=device))
    given = {}
    run_training(lambda **arguments: given.update(arguments), {"out": Path("x"), "resume": "never"}, config, Workers())
    assert calls == [*(["cuda:1"] if device == "auto" else []), backend, "left"]
    assert given["resume"] == "auto" and given["config"] is config
    assert given["progress"] is torchrun.silent


def test_restarts_on_several_machines_are_refused(monkeypatch):
    """Each machine counts its own, so that their processes would not find each other."""
    for name, value in {"GROUP_WORLD_SIZE": "2", "TORCHELASTIC_MAX_RESTARTS": "3"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match="--max-restarts works on one machine only"):
        torchrun.run_as_rank(train_vit, {}, "cpu", silent)
