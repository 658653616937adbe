"""Extraction that is left running: signals, two runs at once, starting over, several machines and the loss of one."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest
from extraction_runs import SLOWER, committed, descendants, name_of, state, wait_for
from leases import foreign
from tiny import write_tar

from zpipe.pipeline import executor, store_plan
from zpipe.pipeline import extract as extraction
from zpipe.pipeline.extract import ExtractConfig, extract_teacher_maps
from zpipe.pipeline.verify import verify_store
from zpipe.schemas import lease as leases
from zpipe.schemas.errors import ZpipeError
from zpipe.schemas.lease import LEASE_NAME, held_lease
from zpipe.schemas.relevance_store import index_path, maps_path

RAY = ("--executor", "ray", "--actors", "2")
LOCAL = ("--executor", "local")


def errors_in(said):
    return [line for line in said.splitlines() if line.startswith("error: ")]


# -------------------------------------------------------------------------------------------------------------- SIGTERM


@pytest.mark.parametrize("flags", [LOCAL, RAY])
def test_termination_drops_the_shard_in_hand_and_tells_how_to_go_on(
    undisturbed,
    tmp_path,
    start,
    contents,
    flags,
):
    out = tmp_path / "store"
    running = start(out, *flags)
    assert wait_for(lambda: committed(out) >= 2, 120, running), running.said()
    running.send_signal(signal.SIGTERM)
    assert running.wait(60) == 1
    assert errors_in(running.said()) == ["error: terminated; run the same command again to resume"]
    assert "Traceback" not in running.said()
    assert 2 <= committed(out) < 18 and not (out / "manifest.json").exists() and not (out / LEASE_NAME).exists()
    again = start(out, *LOCAL)
    assert again.wait(120) == 0, again.said()
    assert contents(out) == contents(undisturbed)


@pytest.mark.slow
def test_killed_at_ten_random_moments(undisturbed, tmp_path, start, contents):
    """Kills begin before the first shard and end when a run gets through between two of them."""
    import random

    out, rng = tmp_path / "store", random.Random(0)
    for _ in range(10):
        running = start(out, *LOCAL)
        wait_for(lambda: False, rng.uniform(3, 9), running)
        running.kill()
        running.wait(30)
    again = start(out, *LOCAL)
    assert again.wait(120) == 0, again.said()
    assert contents(out) == contents(undisturbed)


# ---------------------------------------------------------------------------------------------------------------- lease


def test_a_second_run_is_refused_while_the_first_is_at_work(undisturbed, tmp_path, start, contents):
    out = tmp_path / "store"
    first = start(out, *LOCAL)
    assert wait_for(lambda: (out / LEASE_NAME).exists(), 120, first), first.said()
    first.send_signal(signal.SIGSTOP)  # or it may be done before the second begins
    try:
        second = start(out, *LOCAL)
        assert second.wait(120) == 1
    finally:
        first.send_signal(signal.SIGCONT)
    (error,) = errors_in(second.said())
    assert f"process {first.pid} on {socket.gethostname()} has been writing to this store since" in error
    assert first.wait(120) == 0, first.said()
    assert contents(out) == contents(undisturbed)  # the lease is given back


def test_a_dead_run_holds_nothing(tmp_path, start):
    out = tmp_path / "store"
    first = start(out, *LOCAL)
    assert wait_for(lambda: committed(out) >= 1, 120, first), first.said()
    first.kill()
    first.wait(30)
    assert (out / LEASE_NAME).exists()
    begun = time.monotonic()
    with held_lease(out):
        assert time.monotonic() - begun < leases.EXPIRY_S / 2  # its process is gone: no need to wait
    assert not (out / LEASE_NAME).exists()


def test_a_lease_that_is_lost_during_the_audit_signs_nothing(store_copy, shards, monkeypatch, teacher_settings):
    """Of a million shards the audit takes longer than a lease lasts."""

    def audit(*given):
        found = really(*given)
        foreign(store_copy, age=0)
        assert wait_for(lambda: json.loads((store_copy / LEASE_NAME).read_text())["host"] == "elsewhere", 10)
        time.sleep(0.5)  # ten beats
        foreign(store_copy, age=0)
        time.sleep(0.5)
        return found

    really = extraction.audit
    monkeypatch.setattr(extraction, "audit", audit)
    monkeypatch.setattr(leases, "BEAT_S", 0.05)
    (store_copy / "manifest.json").unlink()
    with pytest.raises(ZpipeError, match="the lease is process 1 on elsewhere's now"):
        extract_teacher_maps(shards, store_copy, ExtractConfig(**(teacher_settings | {"executor": "local"})))
    assert not (store_copy / "manifest.json").exists()


# -------------------------------------------------------------------------------------------------------- starting over


def test_replace_starts_over(store_copy, store, shards, extract, contents):
    with pytest.raises(ZpipeError, match="--replace to start over"):
        extract(shards, store_copy, seed=1)
    assert extract(shards, store_copy, seed=1, replace=True).extracted == 4
    assert contents(store_copy) != contents(store) and verify_store(store_copy, shards) == []
    assert extract(shards, store_copy, replace=True).extracted == 4
    assert contents(store_copy) == contents(store)


@pytest.fixture
def interrupted(teacher_settings):
    """Begin a replacement and interrupt it, as Ctrl-C would, when two shards are committed."""

    def run(shards, out, **changes):
        def progress(stage, done, total, **facts):
            if facts["shards_left"] == 2:
                raise KeyboardInterrupt

        settings = teacher_settings | {"executor": "local", "replace": True} | changes
        with pytest.raises(KeyboardInterrupt):
            extract_teacher_maps(shards, out, ExtractConfig(**settings), progress=progress)
        assert committed(out) == 2 and not (out / LEASE_NAME).exists()

    return run


def test_an_interrupted_replacement_goes_on_a_finished_one_starts_over(
    store_copy,
    store,
    shards,
    extract,
    interrupted,
    contents,
):
    interrupted(shards, store_copy, seed=1)
    made = state(store_copy / "index")
    assert extract(shards, store_copy, seed=1, replace=True).extracted == 2
    assert made.items() <= state(store_copy / "index").items() and verify_store(store_copy, shards) == []
    assert extract(shards, store_copy, seed=1, replace=True).extracted == 4
    interrupted(shards, store_copy, seed=1)
    assert extract(shards, store_copy, replace=True).extracted == 4  # by another teacher
    assert contents(store_copy) == contents(store)


def test_an_interrupted_replacement_goes_on_without_the_flag_too(
    store_copy,
    store,
    shards,
    extract,
    interrupted,
    contents,
):
    interrupted(shards, store_copy)
    assert extract(shards, store_copy).extracted == 2 and contents(store_copy) == contents(store)
    assert extract(shards, store_copy, replace=True).extracted == 4


def test_what_the_replaced_run_finishes_late_is_removed(store_copy, store, shards, extract, interrupted, contents):
    """Its worker on a lost machine went on: it commits a shard, and one of a tar that isn't there any more."""
    interrupted(shards, store_copy, seed=1)
    for late, of in (("shard-00003", "shard-00003"), ("shard-00009", "shard-00000")):
        shutil.copytree(maps_path(store, of), maps_path(store_copy, late), dirs_exist_ok=True)
        shutil.copy(index_path(store, of), index_path(store_copy, late))
    assert extract(shards, store_copy, seed=1, replace=True).extracted == 2
    assert verify_store(store_copy, shards) == []
    fresh = extract(shards, store_copy.with_name("fresh"), seed=1)
    assert contents(store_copy) == contents(store_copy.with_name("fresh")) and fresh.extracted == 4


def test_a_replacement_from_other_tars_starts_over(store_copy, shards, shards_copy, extract, interrupted):
    interrupted(shards, store_copy)
    for name in ("shards.json", "make-shards.jsonl", "shard-00000.tar"):
        (shards_copy / name).unlink()
    report = extract(shards_copy, store_copy, replace=True)
    assert (report.extracted, report.shards) == (3, 3) and verify_store(store_copy, shards_copy) == []


def test_an_interrupted_removal_is_done_again(store_copy, store, shards, extract, contents, monkeypatch):
    """What it left is what was to be removed, not what the replacement made."""

    def remove(path):
        if path.name == "maps":
            raise KeyboardInterrupt
        really(path)

    really = store_plan.remove
    with monkeypatch.context() as patched:
        patched.setattr(store_plan, "remove", remove)
        with pytest.raises(KeyboardInterrupt):
            extract(shards, store_copy, replace=True)
    assert maps_path(store_copy, "shard-00000").is_dir() and not (store_copy / "manifest.json").exists()
    assert extract(shards, store_copy, replace=True).extracted == 4 and contents(store_copy) == contents(store)


def test_replace_removes_nothing_that_is_not_a_store(shards, tmp_path, cli, teacher_flags):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("dear")
    done = cli("extract-teacher-maps", shards, "--out", tmp_path / "home", *teacher_flags, *LOCAL, "--replace")
    assert done.code == 2 and "holds something else" in done.error
    assert state(tmp_path / "home").keys() == {"thesis.tex"}


def test_batch_size_is_a_number_or_auto(shards, tmp_path, process, teacher_flags):
    for wrong in ("many", "-1", "1.5"):
        done = process("extract-teacher-maps", shards, "--out", tmp_path / "o", *teacher_flags, "--batch-size", wrong)
        assert done.code == 2 and "give a number of images, or auto" in done.stderr
    done = process(
        "extract-teacher-maps", shards, "--out", tmp_path / "o", *teacher_flags, *LOCAL, "--batch-size", "auto"
    )
    assert done.code == 0


# --------------------------------------------------------------------------------------------------- workers that die


@pytest.fixture
def uneven(tmp_path, encode):
    """Two tars, one of a single image and one of 8 that keeps a worker busy for a while."""
    for name, count in (("a", 1), ("b", 8)):
        images = [(f"{name}{i}.jpg", encode("JPEG", 60, 40, seed=i)) for i in range(count)]
        members = [member for file, data in images for member in ((file, data), (file.replace("jpg", "cls"), b"0"))]
        write_tar(tmp_path / "uneven" / f"{name}.tar", members)
    return tmp_path / "uneven"


def workers():
    """Ray's workers of this process: process id -> what it is at."""
    names = {pid: name_of(pid) for pid in descendants(os.getpid())}
    return {pid: name for pid, name in names.items() if "ray::ShardActor" in name}


def test_a_shard_is_not_handed_to_workers_that_died_while_idle(uneven, tmp_path, extract, monkeypatch):
    """An idle worker dies, then the other one dies at work. Its shard has one more try, which must succeed."""
    monkeypatch.setattr(executor, "MAX_RETRIES", 1)
    out, killed = tmp_path / "out", []

    def at_work():
        return [pid for pid, name in workers().items() if ".process" in name]

    def kill_both():
        # The short shard is done and its worker has seen so: who is still at work has the long one.
        wait_for(lambda: list(out.glob("index/a.parquet")) and len(at_work()) == 1, 90)
        busy = at_work()[0]
        os.kill(busy, signal.SIGSTOP)  # keeps it there
        wait_for(lambda: len(workers()) == 1, 3)
        for pid in [*(workers().keys() - {busy}), busy]:
            os.kill(pid, signal.SIGKILL)
            killed.append(pid)

    killer = threading.Thread(target=kill_both)
    killer.start()
    changes = {"executor": "ray", "actors": 2, "batch_size": 1, "teacher_args": SLOWER}
    report = extract(uneven, out, **changes)
    killer.join()
    assert killed and (report.count, report.extracted) == (9, 2) and verify_store(out, uneven) == []


def test_a_worker_that_hangs_is_replaced(uneven, tmp_path, extract, monkeypatch):
    """Stopped at work it answers no more; the time it has is that of `image_timeout_s`."""
    monkeypatch.setattr(executor, "GRACE_S", 0.0)
    stopped = []

    def stop():
        busy = wait_for(lambda: [pid for pid, name in workers().items() if ".process" in name], 90)
        os.kill(busy[0], signal.SIGSTOP)
        stopped.append(busy[0])

    stopper = threading.Thread(target=stop)
    stopper.start()
    changes = {"executor": "ray", "actors": 1, "batch_size": 1, "image_timeout_s": 8.0}
    report = extract(uneven, tmp_path / "out", **changes)
    stopper.join()
    assert stopped and (report.count, report.extracted) == (9, 2) and verify_store(tmp_path / "out", uneven) == []


# ----------------------------------------------------------------------------------------------------- several machines

CLUSTER = """
import sys
import ray
from ray.cluster_utils import Cluster
memory = 80 * 1024 * 1024
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "object_store_memory": memory})
nodes = [cluster.add_node(num_cpus=1, object_store_memory=memory) for _ in range(2)]
cluster.wait_for_nodes()
print(cluster.address, flush=True)
for line in sys.stdin:
    cluster.remove_node(nodes.pop(), allow_graceful=False)
    print("removed", flush=True)
cluster.shutdown()
"""


@pytest.fixture
def cluster():
    """Ray's own cluster for tests: a head without CPUs and two nodes of one CPU. `remove()` takes a node away."""
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    running = subprocess.Popen(
        [sys.executable, "-c", CLUSTER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=environment,
        start_new_session=True,
    )

    def next_line():
        while line := running.stdout.readline():  # Ray prints lines of its own
            if line.startswith(("removed", "127.")) or line.strip().rpartition(":")[2].isdecimal():
                return line.strip()
        raise AssertionError("the cluster did not start")

    class Nodes:
        address = next_line()

        def remove(self):
            running.stdin.write("remove\n")
            running.stdin.flush()
            assert next_line() == "removed"

    yield Nodes()
    try:
        running.communicate(timeout=60)
    except subprocess.TimeoutExpired:
        pass
    finally:
        if running.poll() is None:
            os.killpg(running.pid, signal.SIGKILL)
        running.wait(30)


def test_two_machines_and_the_loss_of_one(undisturbed, tmp_path, start, cluster, contents):
    """The shard that was on the lost machine is done by the other; the store is that of an undisturbed run.

    More images at once than any memory holds are asked for, which tells how many workers each takes to share it: one on
    each machine, however many CPUs this one has. Every shard here is of one image anyway.
    """
    out = tmp_path / "store"
    running = start(out, "--address", cluster.address, "--batch-size", "100000000")
    assert wait_for(lambda: committed(out) >= 4, 180, running), running.said()
    cluster.remove()
    assert committed(out) < 18
    assert running.wait(180) == 0, running.said()
    assert "18 maps in 18 shards (18 extracted now)" in running.said()
    assert "GiB in 1 workers: lowered to" in running.said()
    assert contents(out) == contents(undisturbed)
