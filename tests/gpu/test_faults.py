"""A GPU whose memory is short, or whose context a failed assertion has broken; a sum over several GPUs."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch
from tiny import GPU_WORKER

from zpipe.gpu_children import Part, ask, ask_together
from zpipe.gpu_faults import Poisoned, Sum, SumConfig
from zpipe.gpu_numbers import NumbersConfig
from zpipe.gpu_shortage import Shortage
from zpipe.pipeline.executor import Resources, run_local, run_ray
from zpipe.pipeline.shard_reader import open_shards
from zpipe.pipeline.worker import ShardReport, ShardTask, ShardWorker
from zpipe.schemas.errors import ZpipeError

pytestmark = pytest.mark.gpu

LIMIT_S = 120
SPEC = replace(GPU_WORKER, threads=1)


def test_a_batch_that_does_not_fit_is_halved_and_its_memory_given_back():
    answer = ask(Part(name="shortage", device="cuda", answer=Shortage, settings=NumbersConfig()), LIMIT_S)
    assert answer.problem == "" and answer.value.ok, answer
    assert "did not fit the memory of cuda: lowered to 64" in answer.value.notes[0]


def test_a_failed_assertion_is_recognised_and_ends_with_its_process():
    answer = ask(Part(name="poison", device="cuda", answer=Poisoned), LIMIT_S)
    assert answer.value.fault == "assert" and not answer.value.usable, answer
    assert ask(Part(name="alive", device="cuda", answer=bool), LIMIT_S).value is True


def poisoning():
    """A class of workers that provoke a failed assertion in their second shard; Ray takes it along, as it is local."""

    class Poisoning(ShardWorker):
        def __init__(self, spec):
            self.table = torch.zeros(4, device="cuda")

        def _process(self, task):
            row = 9 if task.entry.stem.endswith("1") else 0
            assert self.table[torch.full((1,), row, device="cuda")].sum().item() == 0
            return ShardReport(stem=task.entry.stem, count=task.entry.count)

    return Poisoning


def tasks_of(shards):
    return [ShardTask(path=str(path), entry=entry) for path, entry in open_shards(shards)[0]]


def test_workers_on_ray_are_replaced_after_a_failed_assertion(photo_shards, monkeypatch):
    pytest.importorskip("ray")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    reports = []
    run_ray(SPEC, tasks_of(photo_shards), Resources(actors=1), reports.append, lambda: None, poisoning())
    assert {report.stem: bool(report.error) for report in reports} == {
        f"shard-{number:05}": number == 1 for number in range(4)
    }


IN_A_PROCESS = """
import sys
sys.path.insert(0, sys.argv[1])
import test_faults
test_faults.run_in_this_process(sys.argv[2])
"""


def run_in_this_process(shards):
    """The local executor with the worker above; its process can't use the GPU afterwards."""
    reports = []
    with mock.patch("zpipe.pipeline.executor.ShardWorker", poisoning()):
        try:
            run_local(SPEC, tasks_of(Path(shards)), Resources(), reports.append, lambda: None)
        except ZpipeError as error:
            print(len(reports), error)


def test_the_local_executor_ends_with_one_line(photo_shards, tmp_path):
    line = [sys.executable, "-c", IN_A_PROCESS, str(Path(__file__).parent), str(photo_shards)]
    done = subprocess.run(line, capture_output=True, text=True, timeout=LIMIT_S)
    assert done.stdout.startswith("1 ") and "device-side assert" in done.stdout, done.stderr
    assert "leave the shard out" in done.stdout


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_gpus_sum(tmp_path):
    count = torch.cuda.device_count()
    parts = [
        Part(
            name="sum",
            device=f"cuda:{rank}",
            answer=Sum,
            settings=SumConfig(rank=rank, count=count, meeting=str(tmp_path / "meeting"), size=1 << 26),
        )
        for rank in range(count)
    ]
    answers = ask_together(parts, LIMIT_S)
    assert all(not each.problem and each.value.right for each in answers), answers
