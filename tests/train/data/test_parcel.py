"""Batches arrive whole and alike, in shared memory or through pipes; a failure is one line, and nobody waits."""

import errno
import os
import pickle
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
from ramps import keys_of, load
from tiny import encode, write_shards

from zpipe.schemas.errors import ZpipeError
from zpipe.train.data import parcel
from zpipe.train.data.parcel import Packer, descriptor_problem, part_bytes, shared_memory_problem
from zpipe.train.data.processes import _start_failure

PART = {
    "slot": torch.arange(3),
    "image": torch.arange(3 * 3 * 5 * 5, dtype=torch.uint8).view(3, 5, 5, 3).permute(0, 3, 1, 2),  # as from PIL
    "flipped": torch.tensor([True, False, True]),
    "relevance": torch.rand(3, 2, 2).transpose(1, 2),
    "key": ["a", "b", "c"],
    "damaged": [],
}


@pytest.mark.parametrize("shared", [True, False])
def test_a_part_arrives_as_it_was_sent(shared):
    arrived = pickle.loads(pickle.dumps(Packer(shared=shared).pack(PART)))
    assert arrived.keys() == PART.keys() and arrived["image"].is_shared() == shared
    for name, value in PART.items():
        assert torch.equal(arrived[name], value) if isinstance(value, torch.Tensor) else arrived[name] == value
    assert arrived["image"].stride() == PART["image"].stride()  # or a model's sums would differ in their last bits
    arrived["image"] += 1  # it is the receiver's own


def test_a_part_without_samples_and_an_error_arrive_too():
    empty = {"image": torch.zeros(0, 3, 5, 5, dtype=torch.uint8), "key": []}
    arrived = pickle.loads(pickle.dumps(Packer(shared=True).pack(empty)))
    assert arrived["image"].shape == (0, 3, 5, 5) and arrived["key"] == []
    error = pickle.loads(pickle.dumps(Packer(shared=True).pack(ZpipeError("one line", ["more"]))))
    assert isinstance(error, ZpipeError) and str(error) == "one line"


# -------------------------------------------------------------------------------------------------- before the start


def test_shared_memory_is_measured_against_the_batches_in_flight(tmp_path):
    assert part_bytes(256, 224, None) >= 256 * 3 * 224 * 224
    assert part_bytes(2, 8, (4, 6)) >= 2 * (3 * 8 * 8 + 4 * 4 * 6)
    assert shared_memory_problem(0, tmp_path) is None
    told = shared_memory_problem(2**60, tmp_path)
    assert told.startswith(f"{tmp_path}: ") and "docker run --shm-size" in told and "\n" not in told
    assert "No such file" in shared_memory_problem(0, tmp_path / "none")


def test_descriptors_are_counted(monkeypatch):
    used = len(os.listdir("/proc/self/fd"))
    limits = {}
    monkeypatch.setattr(parcel.resource, "getrlimit", lambda kind: (limits["soft"], 4096))
    for limit, pipes, shared in ((used + 500, True, True), (used + 40, True, False), (used + 10, False, False)):
        limits["soft"] = limit
        assert (descriptor_problem(4, shared=False) is None) == pipes
        assert (descriptor_problem(4, shared=True) is None) == shared
    assert f"ulimit -n: {used + 10} file descriptors are allowed, 4 data-loading" in descriptor_problem(4, shared=False)
    limits["soft"] = parcel.resource.RLIM_INFINITY
    assert descriptor_problem(10**6, shared=True) is None


@pytest.mark.parametrize(
    ("number", "remedy"),
    [
        (errno.EMFILE, "ulimit -n"),
        (errno.EAGAIN, "ulimit -u"),
        (errno.ENOSPC, "--shm-size"),
        (errno.ENOSYS, "/dev/shm"),
    ],
)
def test_processes_that_cannot_be_started_name_the_remedy(number, remedy):
    told = _start_failure(4, OSError(number, os.strerror(number)))
    assert os.strerror(number) in told and remedy in told and told.startswith("4 data-loading processes can't")


# ----------------------------------------------------------------------------------------------------- small machines

EPOCH = """
import os, resource, sys, warnings
import torch
torch.set_num_threads(1)
warnings.simplefilter("always")
from zpipe.train.data.loader import RelevanceLoader
loader = RelevanceLoader(sys.argv[1], batch_size=8, image_size=128, num_workers=int(sys.argv[2]), augment="eval")
{before}
for number, batch in enumerate(loader):
    {first}
    print(*batch["key"], int(batch["image"].sum()))
"""


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Two tars of 48 photos, twelve batches of 8; one takes 0.4 MB."""
    rng = np.random.default_rng(0)
    tars = []
    for tar in range(2):
        members = {}
        for number in range(48):
            members[f"{tar}-{number:02d}.png"] = encode(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
            members[f"{tar}-{number:02d}.cls"] = b"0"
        tars.append(members)
    return write_shards(tmp_path_factory.mktemp("small") / "shards", tars)


def expected(shards, workers):
    batches = load((shards,), batch_size=8, image_size=128, augment="eval", num_workers=workers)
    return [[*batch["key"], str(int(batch["image"].sum()))] for batch in batches]


def small_machine(shards, *, size="", before="", first="", workers=2, environment=None):
    """An epoch in a process of its own, with a /dev/shm of `size`."""
    script = textwrap.dedent(EPOCH).format(before=before, first=first)
    line = [sys.executable, "-c", script, str(shards), str(workers)]
    if size:
        mount = f'mount -t tmpfs -o size={size} tmpfs /dev/shm && exec "$@"'
        line = ["unshare", "-m", "sh", "-c", mount, "sh", *line]
        probe = subprocess.run([*line[:5], "sh", "true"], capture_output=True)
        if probe.returncode:
            pytest.skip("a small /dev/shm can't be mounted here")
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | (environment or {})
    done = subprocess.run(line, capture_output=True, text=True, timeout=100, env=environment)
    warned = [line.partition("RuntimeWarning: ")[2] for line in done.stderr.splitlines() if "RuntimeWarning" in line]
    return [line.split() for line in done.stdout.splitlines()], warned, done


def test_too_little_shared_memory_is_told_and_done_without(shards):
    batches, warned, _ = small_machine(shards, size="1m")
    assert batches == expected(shards, 2)
    (told,) = warned
    assert told.startswith("/dev/shm: 1 MiB of 1 are free, the batches in flight need 1.5; make it larger")
    assert "docker run --shm-size=1g" in told and told.endswith("through pipes, which is slower")


def test_shared_memory_that_fills_up_meanwhile_is_done_without(shards):
    """The space was there at the start; other processes took it."""
    fill = """
def fill():
    with open("/dev/shm/filler", "wb", buffering=0) as file:
        try:
            while file.write(bytes(4096)):
                pass
        except OSError:
            pass
"""
    batches, warned, done = small_machine(shards, size="3m", before=fill, first="if number == 0: fill()")
    assert batches == expected(shards, 2), done.stderr
    assert warned and all(told.startswith("/dev/shm: too small (") and "--shm-size" in told for told in warned)


@pytest.mark.parametrize(("spare", "ok"), [(45, True), (10, False)])
def test_few_descriptors_are_told_and_done_without(shards, spare, ok):
    limit = f"""
n = len(os.listdir("/proc/self/fd")) + {spare}
resource.setrlimit(resource.RLIMIT_NOFILE, (n, n))
"""
    batches, warned, done = small_machine(shards, before=limit, workers=4)
    if ok:
        assert batches == expected(shards, 2)  # there are two tars
        assert len(warned) == 1 and warned[0].startswith("ulimit -n: ") and "fewer --data-workers" in warned[0]
    else:
        told = done.stderr.splitlines()[-1]
        assert done.returncode and "ZpipeError: ulimit -n: " in told and "4 data-loading processes need" in told


def test_a_folder_of_temporary_files_too_deep_for_sockets_is_done_without(shards, tmp_path):
    deep = tmp_path / ("x" * 100)
    deep.mkdir()
    batches, warned, _ = small_machine(shards, environment={"TMPDIR": str(deep)})
    assert batches == expected(shards, 2)
    assert warned and all(told.startswith("TMPDIR: too long for the sockets") for told in warned)


# ------------------------------------------------------------------------------------------------------- no waiting


class Unsendable:
    def __reduce__(self):
        raise OSError(errno.ENOSPC, "No space left on device")


def test_what_a_queue_cannot_send_ends_the_epoch(data, monkeypatch):
    """The thread that sends is not the one that could answer; the loader would wait for the batch forever."""
    monkeypatch.setattr(Packer, "pack", lambda self, part: Unsendable())
    with pytest.raises(ZpipeError, match="a data-loading process could not send a batch .*No space left") as error:
        load(data, num_workers=2)
    assert "\n" not in str(error.value)


def test_one_worker_or_several_pipes_or_shared_memory_give_the_same(data, monkeypatch):
    whole = keys_of(load(data, num_workers=2))
    monkeypatch.setattr("zpipe.train.data.processes.shared_memory_problem", lambda size: "/dev/shm: none")
    with pytest.warns(RuntimeWarning, match="go through pipes"):
        piped = load(data, num_workers=2)
    assert keys_of(piped) == whole
