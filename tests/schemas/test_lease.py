"""One writer at a time in a folder: real processes, dead ones, other machines, files that are no lease."""

import dataclasses
import errno
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest
from any_json import any_json
from extraction_runs import wait_for
from hypothesis import given
from hypothesis import strategies as st
from leases import a_lease, foreign, holder_of

from zpipe.schemas import lease as leases
from zpipe.schemas.errors import ZpipeError
from zpipe.schemas.lease import LEASE_NAME, held_lease


def test_a_run_on_another_machine_is_believed_while_it_renews(tmp_path, monkeypatch):
    monkeypatch.setattr(leases, "EXPIRY_S", 2.0)
    foreign(tmp_path, age=0)
    told = "process 1 on elsewhere has been writing to this store since noon"
    with pytest.raises(ZpipeError, match=told), held_lease(tmp_path):
        pytest.fail("both hold it")
    # Its clock is behind ours, but it renews: not dead.
    renewing = subprocess.Popen(
        [sys.executable, "-c", RENEW, str(tmp_path / LEASE_NAME)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    try:
        assert renewing.stdout.readline()
        with pytest.raises(ZpipeError, match="process 1 on elsewhere"), held_lease(tmp_path):
            pytest.fail("both hold it")
    finally:
        renewing.kill()
        renewing.communicate(timeout=30)
    foreign(tmp_path, age=100)
    with held_lease(tmp_path) as lease:
        lease.check()


RENEW = """
import json, os, sys, time
beat = time.time() - 1000
while True:
    beat += 0.1
    holder = json.load(open(sys.argv[1])) | {"beat": beat}
    with open(sys.argv[1] + ".new", "w") as file:
        json.dump(holder, file)
    os.replace(sys.argv[1] + ".new", sys.argv[1])
    print("renewed", flush=True)
    time.sleep(0.1)
"""


HOLD = """
import sys
from pathlib import Path
from zpipe.schemas.lease import held_lease
from zpipe.schemas.errors import ZpipeError
try:
    with held_lease(Path(sys.argv[1])):
        print("holds", flush=True)
except ZpipeError as error:
    print(error, flush=True)
"""


def test_containers_of_one_name_do_not_take_each_other_for_dead(tmp_path):
    """In a PID namespace of its own a run has the same host name, and finds no process of the holder's number."""
    apart = ["unshare", "--user", "--pid", "--fork", "--mount-proc"]
    if subprocess.run([*apart, "true"], capture_output=True).returncode:
        pytest.skip("a PID namespace can't be made here")
    with held_lease(tmp_path) as lease:
        line = [*apart, sys.executable, "-c", HOLD, str(tmp_path)]
        second = subprocess.run(line, capture_output=True, text=True, timeout=120)
        assert f"process {os.getpid()} on {socket.gethostname()} has been writing" in second.stdout, second
        lease.check()


@pytest.mark.parametrize(
    "change",
    [{"namespace": "pid:[1]"}, {"namespace": None}, {"process": "another-boot:7"}, {"process": None}],
    ids=["namespace", "no namespace", "boot", "no process"],
)
def test_of_another_boot_or_namespace_only_the_beat_counts(tmp_path, monkeypatch, change):
    dead = subprocess.Popen([sys.executable, "-c", "pass"])
    dead.wait(30)
    monkeypatch.setattr(leases, "EXPIRY_S", 1.5)
    holder_of(tmp_path, pid=dead.pid, **change)
    with pytest.raises(ZpipeError, match=f"process {dead.pid} on"), held_lease(tmp_path):
        pytest.fail("both hold it")
    holder_of(tmp_path, pid=dead.pid, beat=time.time() - 100, **change)
    with held_lease(tmp_path) as lease:
        lease.check()


def test_who_loses_the_lease_stops(tmp_path, monkeypatch):
    monkeypatch.setattr(leases, "BEAT_S", 0.05)
    with held_lease(tmp_path) as lease:
        lease.check()
        time.sleep(0.2)
        first = json.loads((tmp_path / LEASE_NAME).read_text())["beat"]
        assert wait_for(lambda: json.loads((tmp_path / LEASE_NAME).read_text())["beat"] > first, 10)
        foreign(tmp_path, age=0)
        # A process that writes at the same moment as the heir may overwrite its lease once; the heir then notices it.
        time.sleep(0.3)
        mine = json.loads((tmp_path / LEASE_NAME).read_text())["host"] != "elsewhere"
        if mine:
            foreign(tmp_path, age=0)
            time.sleep(0.3)
        with pytest.raises(ZpipeError, match="the lease is process 1 on elsewhere's now"):
            lease.check()
    assert json.loads((tmp_path / LEASE_NAME).read_text())["host"] == "elsewhere"  # not ours to remove


def test_of_many_that_begin_together_one_works(tmp_path):
    """Real processes at a dead run's lease: never do two hold it at once."""
    dead = subprocess.Popen([sys.executable, "-c", "pass"])
    dead.wait(30)
    holder_of(tmp_path, pid=dead.pid, process=leases._process(os.getpid()).partition(":")[0] + ":1", beat=0)
    racers = [
        subprocess.Popen([sys.executable, "-c", RACE, str(tmp_path)], stdout=subprocess.PIPE, text=True)
        for _ in range(6)
    ]
    said = [racer.communicate(timeout=120)[0].strip() for racer in racers]
    spans = sorted(tuple(map(float, line.split())) for line in said if line)
    assert spans and all(before[1] <= after[0] for before, after in itertools.pairwise(spans))
    assert not (tmp_path / LEASE_NAME).exists()


RACE = """
import sys, time
from pathlib import Path
from zpipe.schemas.lease import held_lease
from zpipe.schemas.errors import ZpipeError
try:
    with held_lease(Path(sys.argv[1])) as lease:
        begun = time.time()
        time.sleep(1)
        lease.check()
        print(begun, time.time())
except ZpipeError:
    pass
"""


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("not json", "not readable as a lease"),
        ("[]", "Expected `object`, got `array`"),
        ("{}", "expected 'zpipe-lease' version 1"),
        ('{"format": "zpipe-lease", "version": 2}', "upgrade zpipe"),
        ('{"format": "zpipe-lease", "version": 1}', "missing required field `token`"),
    ],
)
def test_a_lease_that_is_no_lease_is_one_line(tmp_path, text, told):
    (tmp_path / LEASE_NAME).write_text(text)
    with pytest.raises(ZpipeError, match=told) as error, held_lease(tmp_path):
        pass
    assert "\n" not in str(error.value) and ("upgrade" in told or "delete it when no run" in str(error.value))


@given(st.sampled_from([field.name for field in dataclasses.fields(leases.Holder)]), st.none() | any_json())
def test_whatever_a_field_of_a_lease_says_it_is_read_or_refused_in_one_line(field, value):
    try:
        found = leases.LEASE.decode(json.dumps(a_lease() | {field: value}).encode(), "lease.json")
        assert isinstance(str(found), str) and len(f"{found}{found.since}") < 200_000
    except ZpipeError as error:
        assert len(str(error).splitlines()) == 1 and "delete it when" in str(error)


def test_a_lease_without_one_of_its_fields_is_one_line(tmp_path):
    for field in dataclasses.fields(leases.Holder):
        holder_of(tmp_path)
        lease = json.loads((tmp_path / LEASE_NAME).read_text())
        del lease[field.name]
        (tmp_path / LEASE_NAME).write_text(json.dumps(lease))
        told = f"not readable as a lease .*missing required field `{field.name}`.*; delete it when"
        with pytest.raises(ZpipeError, match=told), held_lease(tmp_path):
            pass


@pytest.mark.parametrize(
    ("target", "told"),
    [
        ("fifo", "is a FIFO, not a regular file"),
        ("folder", "is a folder, not a file"),
        ("nowhere", "is a link, not a lease"),
        ("/dev/zero", "is a link, not a lease"),
        ("large", "has more than 65536 bytes"),
    ],
)
def test_what_lies_in_place_of_a_lease_is_told_without_waiting(tmp_path, target, told):
    path = tmp_path / LEASE_NAME
    if target == "fifo":
        os.mkfifo(path)
    elif target == "folder":
        path.mkdir()
    elif target == "large":
        path.write_bytes(b" " * 100_000)
    else:
        path.symlink_to(target)
    with pytest.raises(ZpipeError, match=f"{told}.*; delete it when no run is writing here"), held_lease(tmp_path):
        pass


def test_without_hard_links_a_lease_is_taken_all_the_same(tmp_path, monkeypatch):
    """As on gcsfuse, FAT and some network mounts; there another process may see it empty, which is waited for."""
    asked = []

    def refuse(source, target):
        asked.append(target)
        raise OSError(errno.ENOTSUP, "Operation not supported")

    monkeypatch.setattr(os, "link", refuse)
    monkeypatch.setattr(leases, "SETTLE_S", 0.1)
    with held_lease(tmp_path):
        with pytest.raises(ZpipeError, match="has been writing to this run since"), held_lease(tmp_path, "run"):
            pytest.fail("both hold it")
        assert os.listdir(tmp_path) == [LEASE_NAME]
    assert len(asked) == 2 and os.listdir(tmp_path) == []
    (tmp_path / LEASE_NAME).touch()
    with pytest.raises(ZpipeError, match="not readable as a lease .*; delete it when"), held_lease(tmp_path):
        pass


def test_a_host_that_a_terminal_would_obey_is_shown_escaped(tmp_path):
    holder_of(tmp_path, host="a\x1b[2Jb", since="no\non")
    with pytest.raises(ZpipeError) as error, held_lease(tmp_path, "run"):
        pass
    assert r"on a\x1b[2Jb has been writing to this run since no\non;" in str(error.value)


def test_the_lease_of_an_heir_is_not_removed(tmp_path):
    """It came between two renewals, so that we haven't learnt of it."""
    with held_lease(tmp_path):
        foreign(tmp_path, age=0)
    assert json.loads((tmp_path / LEASE_NAME).read_text())["host"] == "elsewhere"


@pytest.fixture
def stuck(tmp_path):
    """Writing to the store hangs: the lease's thread opens a pipe that nobody reads. `free()` reads from it."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)

    def write(path, data):
        with open(pipe, "wb") as file:
            file.write(data)

    def free():
        with open(pipe, "rb") as file:
            file.read()

    return write, free


def test_a_lease_whose_renewal_hangs_is_not_held(tmp_path, monkeypatch, stuck):
    write, free = stuck
    monkeypatch.setattr(leases, "BEAT_S", 0.05)
    monkeypatch.setattr(leases, "EXPIRY_S", 1.0)
    monkeypatch.setattr(leases, "RENEWAL_S", 0.1)
    monkeypatch.setattr(leases, "write_bytes", write)
    with held_lease(tmp_path) as lease:
        lease.check()
        time.sleep(1.3)
        with pytest.raises(ZpipeError, match=r"last renewed \d+ s ago, .* run again to resume"):
            lease.check()
    assert (tmp_path / LEASE_NAME).exists()  # giving it back would hang too: it expires
    free()


def test_a_run_that_was_stopped_for_long_renews_and_goes_on(tmp_path):
    """Stopped, as by Ctrl-Z, until its lease would have expired."""
    held = subprocess.Popen(
        [sys.executable, "-c", CHECKING, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert held.stdout.readline() == "holds\n"
        held.send_signal(signal.SIGSTOP)
        time.sleep(2)
        held.send_signal(signal.SIGCONT)
        assert held.communicate("\n", timeout=60)[0] == "still\n"
    finally:
        held.kill()
        held.wait(30)


CHECKING = """
import sys
from pathlib import Path
from zpipe.schemas import lease
lease.EXPIRY_S, lease.BEAT_S = 1.5, 0.5
with lease.held_lease(Path(sys.argv[1])) as held:
    print("holds", flush=True)
    sys.stdin.readline()
    held.check()
    print("still", flush=True)
"""


def test_a_lease_that_can_not_be_given_back_hides_nothing(tmp_path):
    with pytest.raises(ZpipeError, match="^3 of 9 shards failed$"), held_lease(tmp_path):
        (tmp_path / LEASE_NAME).write_text("no lease")
        raise ZpipeError("3 of 9 shards failed")
    (tmp_path / LEASE_NAME).unlink()
    with held_lease(tmp_path):
        (tmp_path / LEASE_NAME).write_text("no lease")


def test_a_dead_run_whose_clock_was_ahead_is_taken_over(tmp_path, monkeypatch):
    monkeypatch.setattr(leases, "EXPIRY_S", 0.5)
    foreign(tmp_path, age=-3600)
    with held_lease(tmp_path) as lease:
        lease.check()
