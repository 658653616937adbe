"""Batches arrive whole and alike from any number of workers, and one that is kept stays what it is."""

import errno
import os
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest
import torch
from pretend_cuda import pretend_cuda
from ramps import keys_of, load
from tiny import encode, write_shards

from zpipe.schemas.errors import UsageError, ZpipeError
from zpipe.train.data import batches, processes, worker
from zpipe.train.data.batches import BatchMemory, Field, image_field, merge, stage, staged_batches
from zpipe.train.data.loader import RelevanceLoader
from zpipe.train.data.processes import _start_failure, descriptor_problem
from zpipe.train.data.transforms import ViewConfig
from zpipe.train.device import to_device

FIELDS = {"image": image_field(5), "relevance": Field((2, 2), np.dtype(np.float32))}


def same(one, other):
    """Whether two batches are equal to the bit, and lie alike in memory: else a model's sums would differ."""
    assert one.keys() == other.keys()
    for name, value in one.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, other[name]) and value.stride() == other[name].stride(), name
        else:
            assert str(value) == str(other[name])
    return True


# --------------------------------------------------------------------------------------------------- parts of a batch


@pytest.mark.parametrize("left_out", [(), (2,), (0, 6), tuple(range(7))])
def test_parts_become_one_batch_in_the_order_of_slots(left_out):
    """Whatever lies in the slots of samples that were left out."""
    rng = np.random.default_rng(0)
    staged = stage(FIELDS, 8)
    images = rng.integers(0, 256, (8, 5, 5, 3), np.uint8)
    staged["image"][:], staged["relevance"][:] = images, rng.random((8, 2, 2))
    parts = []
    for slots in ([5, 1, 4], [], [0, 2, 3, 6]):
        kept = [slot for slot in slots if slot not in left_out]
        part = {"slot": np.array(kept, np.int64), "label": np.array(kept, np.int64) * 10, "key": list(map(str, kept))}
        part["object_boxes"] = [np.full((slot, 4), slot, np.float32) for slot in kept]
        parts.append(part | {"damaged": [slot for slot in slots if slot in left_out]})
    batch = merge(parts, staged, BatchMemory(FIELDS, 8))
    kept = [slot for slot in range(7) if slot not in left_out]
    assert batch["label"].tolist() == [10 * slot for slot in kept] and batch["key"] == list(map(str, kept))
    assert sorted(batch["damaged"]) == list(left_out)
    assert [boxes.tolist() for boxes in batch["object_boxes"]] == [[[slot] * 4] * slot for slot in kept]
    assert torch.equal(batch["image"], torch.from_numpy(images[kept]).permute(0, 3, 1, 2))
    assert batch["image"].shape == (len(kept), 3, 5, 5) and batch["image"].stride() == (75, 1, 15, 3)
    assert torch.equal(batch["relevance"], torch.from_numpy(staged["relevance"][kept]))
    batch["image"] += 1  # it is the receiver's own
    np.testing.assert_array_equal(staged["image"], images)


def test_a_tensor_that_some_samples_lack_is_left_out():
    staged, memory = stage(FIELDS, 2), BatchMemory(FIELDS, 2)
    one = {"slot": np.array([0]), "key": ["a"], "damaged": [], "object_box": np.zeros((1, 4), np.float32)}
    other = {"slot": np.array([1]), "key": ["b"], "damaged": []}
    empty = {"slot": np.array([], np.int64), "key": [], "damaged": []}
    assert "object_box" not in merge([one, other], staged, memory)
    assert "object_box" in merge([one, empty], staged, memory)


@pytest.mark.parametrize("view", [{}, {"colour": "deit", "erase": 0.5}, {"colour": "deit3"}], ids=str)
def test_any_number_of_workers_gives_the_same_batches(data, view):
    def epoch(num_workers):
        options = {"num_workers": num_workers, "batch_size": 4, "image_size": 24, "view": ViewConfig(**view)}
        return list(RelevanceLoader(*data, **options))

    whole = epoch(0)
    assert all(batch["image"].is_contiguous(memory_format=torch.channels_last) for batch in whole)
    for num_workers in (1, 2):
        assert all(map(same, whole, epoch(num_workers)))


def test_no_batch_is_overwritten_before_it_is_copied(data, monkeypatch):
    """Workers run ahead as far as they may while the loader is slow."""

    def slow(*arguments):
        time.sleep(0.05)
        return merge(*arguments)

    whole = list(RelevanceLoader(*data, batch_size=2, image_size=8, num_workers=2))
    monkeypatch.setattr("zpipe.train.data.loader.merge", slow)
    assert all(map(same, whole, RelevanceLoader(*data, batch_size=2, image_size=8, num_workers=2)))
    # With one staged batch less it would be seen: the test can fail.
    monkeypatch.setattr("zpipe.train.data.loader.staged_batches", lambda workers: staged_batches(workers) - 1)
    late = list(RelevanceLoader(*data, batch_size=2, image_size=8, num_workers=2))
    assert any(not torch.equal(one["image"], other["image"]) for one, other in zip(whole, late, strict=True))


# --------------------------------------------------------------------------------------------------- kept batches


# What may be kept of a batch, and how its values are read later.
KEPT = (
    (lambda batch: batch["image"][1:, :, ::2], lambda kept: kept.tolist()),
    (lambda batch: batch["image"].numpy()[0], lambda kept: kept.tolist()),
    (lambda batch: memoryview(batch["relevance"].numpy()), lambda kept: kept.tolist()),
    (lambda batch: batch["relevance"].detach().view(-1).untyped_storage(), lambda kept: kept.tolist()),
    (  # what a gradient needs
        lambda batch: (torch.ones_like(batch["relevance"], requires_grad=True) * batch["relevance"]).sum(),
        lambda kept: kept.grad_fn.next_functions[0][0]._saved_other.tolist(),
    ),
)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_kept_batch_stays_what_it_is(data, num_workers):
    """Also when only a view of one of its tensors is kept."""
    kept = []
    for number, batch in enumerate(RelevanceLoader(*data, batch_size=2, image_size=8, num_workers=num_workers)):
        keep, read = KEPT[number % len(KEPT)]
        view = keep(batch)
        kept.append((view, read, read(view)))
    assert len(kept) == 12 and all(read(view) == values for view, read, values in kept)


def test_a_list_of_batches_holds_the_whole_epoch(data):
    options = {"batch_size": 2, "image_size": 8, "num_workers": 2}
    kept = list(RelevanceLoader(*data, **options))
    assert len({batch["image"].data_ptr() for batch in kept}) == len(kept) == 12
    assert all(map(same, kept, RelevanceLoader(*data, **options)))


def test_memory_is_used_again_when_nobody_holds_it(data):
    """A loop holds a batch while the next one is made, so two blocks take turns."""
    places = {batch["image"].data_ptr() for batch in RelevanceLoader(*data, batch_size=2, image_size=64)}
    assert len(places) == 2


def test_spare_memory_is_bounded_and_ends_with_its_loader():
    memory = BatchMemory(FIELDS, 4)
    held = [memory.empty("image", count) for count in (4, 4, 3, 0)]
    assert [tensor.shape for tensor in held] == [(count, 5, 5, 3) for count in (4, 4, 3, 0)]
    places = {tensor.data_ptr() for tensor in held[:3]}
    held.clear()
    assert len(memory._free["image"]) == batches.SPARE
    assert {memory.empty("image", 4).data_ptr()} < places
    last = memory.empty("image", 4)
    last[:] = 7
    del memory
    assert (last == 7).all()


def test_pinned_memory_needs_a_device(data, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UsageError, match="pin_memory=True: torch sees no CUDA device here"):
        RelevanceLoader(data[0], batch_size=4, pin_memory=True)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_pinned_batches_are_moved_as_they_are_and_nobody_waits(data, num_workers):
    options = {"batch_size": 4, "image_size": 8, "num_workers": num_workers}
    whole = list(RelevanceLoader(*data, **options))
    with pretend_cuda() as cuda:
        moved = []
        for batch in RelevanceLoader(*data, pin_memory=True, **options):
            assert all(batch[name].pin_memory() is batch[name] for name in ("image", "relevance"))
            moved.append({name: to_device(batch[name], torch.device("cuda")) for name in ("image", "relevance")})
        assert not cuda.syncs
        moved = [{name: value.cpu() for name, value in batch.items()} for batch in moved]
    for batch, values in zip(whole, moved, strict=True):
        assert all(torch.equal(values[name], batch[name]) for name in values)


# -------------------------------------------------------------------------------------------------- before the start


def test_memory_that_cannot_be_reserved_names_the_remedy(monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    monkeypatch.setattr(batches.mmap, "mmap", refuse)
    with pytest.raises(ZpipeError, match=r"MiB for the image of a batch of 8 .*Cannot allocate.*lower --batch-size"):
        stage(FIELDS, 8)


def test_a_batch_size_beyond_the_data_reserves_no_more_than_the_data(data):
    (batch,) = load(data, batch_size=10**9, augment="eval")
    assert len(batch["key"]) == 24


def test_descriptors_are_counted(monkeypatch):
    used = len(os.listdir("/proc/self/fd"))
    limits = {}
    monkeypatch.setattr(processes.resource, "getrlimit", lambda kind: (limits["soft"], 4096))
    for limit, enough in ((used + 500, True), (used + 40, True), (used + 10, False)):
        limits["soft"] = limit
        assert (descriptor_problem(4) is None) == enough
    assert f"ulimit -n: {used + 10} file descriptors are allowed, 4 data-loading" in descriptor_problem(4)
    limits["soft"] = processes.resource.RLIM_INFINITY
    assert descriptor_problem(10**6) is None


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


def test_shared_memory_may_be_small(shards):
    batches, warned, done = small_machine(shards, size="1m")
    assert batches == expected(shards, 2) and not warned, done.stderr


def test_shared_memory_may_fill_up_meanwhile(shards):
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
    assert batches == expected(shards, 2) and not warned, done.stderr


@pytest.mark.parametrize(("spare", "ok"), [(45, True), (10, False)])
def test_few_descriptors_are_enough_or_told(shards, spare, ok):
    limit = f"""
n = len(os.listdir("/proc/self/fd")) + {spare}
resource.setrlimit(resource.RLIMIT_NOFILE, (n, n))
"""
    batches, warned, done = small_machine(shards, before=limit, workers=4)
    if ok:
        assert batches == expected(shards, 2) and not warned, done.stderr  # there are two tars
    else:
        told = done.stderr.splitlines()[-1]
        assert done.returncode and "ZpipeError: ulimit -n: " in told and "4 data-loading processes need" in told


def test_the_folder_of_temporary_files_may_be_too_deep_for_sockets(shards, tmp_path):
    deep = tmp_path / ("x" * 100)
    deep.mkdir()
    batches, warned, done = small_machine(shards, environment={"TMPDIR": str(deep)})
    assert batches == expected(shards, 2) and not warned, done.stderr


# ------------------------------------------------------------------------------------------------------- no waiting


class Unsendable:
    def __reduce__(self):
        raise OSError(errno.ENOSPC, "No space left on device")


def test_what_a_queue_cannot_send_ends_the_epoch(data, monkeypatch):
    """The thread that sends is not the one that could answer; the loader would wait for the batch forever."""
    monkeypatch.setattr(worker, "_collate_part", lambda *_: {"key": Unsendable()})
    with pytest.raises(ZpipeError, match="a data-loading process could not send a batch .*No space left") as error:
        load(data, num_workers=2)
    assert "\n" not in str(error.value)


def test_an_error_of_a_worker_arrives_with_its_details(data, monkeypatch):
    def fail(*_):
        raise ZpipeError("one line", ["more"])

    monkeypatch.setattr(worker, "_collate_part", fail)
    with pytest.raises(ZpipeError, match="one line") as error:
        keys_of(RelevanceLoader(data[0], batch_size=2, num_workers=2))
    assert error.value.details == ("more",)
