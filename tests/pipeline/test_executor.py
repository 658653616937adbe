"""Workers whose GPU fails, or who hang: on Ray, which believes in GPUs, and in this process."""

import os
import threading
import time

import pytest
import torch
from tiny import GPU_WORKER

from zpipe.pipeline import executor
from zpipe.pipeline.executor import GRACE_S, Resources, _Fleet, hang_limit, run_local
from zpipe.pipeline.sick_gpus import Place, SickGpus
from zpipe.pipeline.worker import ShardReport, ShardTask, ShardWorker
from zpipe.schemas.devices import device_fault
from zpipe.schemas.errors import ZpipeError
from zpipe.schemas.ray_session import ray_session
from zpipe.schemas.shard_index import ShardEntry

SPEC = GPU_WORKER
ECC = "CUDA error: uncorrectable ECC error encountered"


def tasks(count):
    stems = [f"shard-{number:02}" for number in range(count)]
    entries = [
        ShardEntry(name=f"{stem}.tar", count=1000, bytes=1, sha256="0" * 64, keys_sha256="0" * 64) for stem in stems
    ]
    return [ShardTask(path=f"/tars/{entry.name}", entry=entry) for entry in entries]


@pytest.fixture(scope="module")
def session():
    """Ray on this machine, which believes in two GPUs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("RAY_ADDRESS", raising=False)
        patch.setenv("RAY_OVERRIDE_RESOURCES", '{"GPU": 2, "CPU": 8}')
        with ray_session(executor._import_ray, None, 1, instead="") as opened:
            yield opened


@pytest.fixture
def run(session, tmp_path):
    """Run 20 shards on two GPUs: `run(faults) -> reports`.

    faults: (GPU, shard, number of shards that this worker did before) -> None, or what it raises or does; the shard is
    "" while the worker starts.
    """

    def run_shards(faults, count=20):
        class Faulty(ShardWorker):
            def __init__(self, spec):
                self.gpu = os.environ["CUDA_VISIBLE_DEVICES"]
                self.done, self.fault = 0, None
                self.computing = threading.Lock()  # a GPU computes one thing after the other
                assert spec.threads == 4  # of eight for two GPUs
                self.fail("")

            def fail(self, stem):
                fault = self.fault or faults(self.gpu, stem, self.done)
                if isinstance(fault, Exception):
                    self.fault = fault if device_fault(fault) else None  # which the process doesn't survive
                    raise fault
                time.sleep(fault or 0.01)

            def _process(self, task):
                with self.computing:
                    self.fail(task.entry.stem)
                    self.done += 1
                with (tmp_path / self.gpu).open("a") as file:
                    file.write(f"{task.entry.stem}\n")
                return ShardReport(stem=task.entry.stem, count=task.entry.count)

        reports: list[ShardReport] = []
        _Fleet(session, SPEC, tasks(count), Resources(), reports.append).run(lambda: None, Faulty)
        assert sorted(report.stem for report in reports) == [task.entry.stem for task in tasks(count)]
        return reports

    return run_shards


def lost(reports):
    return {report.stem: report.error for report in reports if report.error}


def notes(reports):
    return [note.partition(" of ")[0] + note.partition("failed")[2] for report in reports for note in report.notes]


def test_no_shard_is_lost_to_a_sick_gpu(run, tmp_path):
    """One of two is broken from its second shard on, so that its next worker does not even start."""
    deaths = tmp_path / "deaths"
    deaths.touch()

    def break_gpu_0(gpu, stem, done):
        if gpu == "0" and (done or deaths.read_text()):
            with deaths.open("a") as file:
                file.write("x")
            return RuntimeError(f"{ECC}\nmore")
        if gpu == "1" and done == 3:  # leave some shards to the next worker
            while deaths.read_text() != "xx":
                time.sleep(0.05)
        return None

    reports = run(break_gpu_0)
    assert lost(reports) == {}
    assert notes(reports) == [f"GPU 0 ({ECC}): its worker was replaced", f"GPU 0 again ({ECC}): not used any more"]
    on_0, on_1 = ((tmp_path / gpu).read_text().split() for gpu in "01")
    assert len(on_0) == 1 and len(on_1) == 19


@pytest.mark.slow
def test_what_is_no_fault_of_the_gpu_costs_its_shard_alone(run, tmp_path, monkeypatch):
    """A shard that is deadly everywhere, a value that a kernel refuses, a defect of ours, and a worker that hangs.

    By the limit without a finished shard, the last would be waited for 10,000 s.
    """
    monkeypatch.setattr(executor, "GRACE_S", 2.0)
    hung = tmp_path / "hung"
    deaths = {
        "shard-01": RuntimeError("cuDNN error: CUDNN_STATUS_NOT_SUPPORTED"),
        "shard-03": torch.AcceleratorError("CUDA error: device-side assert triggered"),
        "shard-05": RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
    }

    def fail(gpu, stem, done):
        if stem == "shard-09" and not hung.exists():
            hung.touch()
            return 600.0
        return deaths.get(stem)

    reports = run(fail)
    errors = lost(reports)
    assert errors.keys() == deaths.keys()
    assert errors["shard-01"].startswith("/tars/shard-01.tar: GPU ")
    assert errors["shard-01"].endswith("failed: cuDNN error: CUDNN_STATUS_NOT_SUPPORTED")
    assert errors["shard-03"] == "/tars/shard-03.tar: CUDA error: device-side assert triggered"
    assert "shapes cannot be multiplied" in errors["shard-05"]
    assert hung.exists()


@pytest.mark.slow
def test_a_shard_beside_a_deadly_one_uses_up_no_try(run, monkeypatch):
    monkeypatch.setattr(executor, "MAX_RETRIES", 0)
    deadly = {
        "shard-01": RuntimeError("cuDNN error: CUDNN_STATUS_NOT_SUPPORTED"),
        "shard-04": torch.AcceleratorError("CUDA error: device-side assert triggered"),
    }
    assert lost(run(lambda gpu, stem, done: deadly.get(stem), count=8)).keys() == deadly.keys()


@pytest.mark.slow
def test_without_a_sound_gpu_the_run_ends_with_one_line(run):
    with pytest.raises(ZpipeError) as raised:
        run(lambda gpu, stem, done: torch.AcceleratorError(ECC))
    said = str(raised.value)
    assert said.startswith("no GPU is left: GPU ") and said.count(ECC) == 2 and "\n" not in said
    assert "look at nvidia-smi and dmesg there" in said and "run again to resume" in said


# -------------------------------------------------------------------------------------------------- pure and local


def test_the_hang_limit_follows_the_pace():
    assert hang_limit(1000, None) == GRACE_S + 10_000
    assert hang_limit(1000, 0.004) == pytest.approx(GRACE_S + 80)  # a shard takes 4 s
    assert hang_limit(1000, 5.0) == GRACE_S + 10_000
    assert hang_limit(1000, 0.004, 30.0) == hang_limit(1000, None, 30.0) == GRACE_S + 30_000


def test_which_gpus_are_sick():
    first, second = Place("a", "1", ("0",)), Place("a", "1", ("1",))
    sick = SickGpus()
    assert not sick.died(first, {"x"}, "one") and not sick.died(second, {"x"}, "one")
    sick.worked(first)
    assert not sick.died(first, {"x"}, "one")  # the shard is to blame
    assert sick.died(second, {"x"}, "two")  # twice without success in between
    assert second in sick and first not in sick and str(sick) == "GPU 1 of a (two)"
    sick.worked(first)
    assert sick.died(first, {"y"}, "three") and first in sick


def test_two_deaths_of_one_shard_beside_others_make_no_gpu_sick():
    place, sick = Place("a", "1", ("0",)), SickGpus()
    for suspects, is_sick in (({"x", "y"}, False), ({"x"}, False), ({"x", "z"}, False), ({"y"}, True)):
        assert sick.died(place, suspects, "one") == is_sick
        sick.worked(place)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (torch.AcceleratorError(ECC), f"/tars/shard-00.tar: {ECC}: cuda has failed; look at nvidia-smi"),
        (
            RuntimeError("CUDA error: device-side assert triggered"),
            "a value in this shard is out of range, or in the other one that the device had; leave",
        ),
    ],
)
def test_in_this_process_a_fault_ends_the_run_with_one_line(monkeypatch, error, said):
    def fail(self, task):
        raise error

    monkeypatch.setattr(ShardWorker, "__init__", lambda self, spec: setattr(self, "spec", spec))
    monkeypatch.setattr(ShardWorker, "_process", fail)
    with pytest.raises(ZpipeError) as raised:
        run_local(SPEC, tasks(2), Resources(), lambda report: None, lambda: None)
    assert said in str(raised.value) and "\n" not in str(raised.value)
