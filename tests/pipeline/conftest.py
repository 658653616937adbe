"""Extractions with the tiny teacher, in this process and in a process of their own."""

import contextlib
import os
import signal
import subprocess

import pytest
from extraction_runs import SLOWER, descendants
from fake_hub import FakeHub
from hub_stores import DATASET, TOKEN

from zpipe.pipeline.extract import ExtractConfig, extract_teacher_maps
from zpipe.pipeline.make_shards import FolderSource, make_shards
from zpipe.pipeline.publish import push_store
from zpipe.schemas import lease as leases


@pytest.fixture
def extract(teacher_settings):
    """Extract in this process with the tiny teacher: `extract(shards, out, **changes) -> ExtractReport`."""

    def run(shards, out, **changes):
        return extract_teacher_maps(shards, out, ExtractConfig(**(teacher_settings | {"executor": "local"} | changes)))

    return run


@pytest.fixture(scope="session")
def many(tmp_path_factory, photos):
    """18 shards of one image: a run can be interrupted between any two of them."""
    out = tmp_path_factory.mktemp("many") / "shards"
    make_shards(FolderSource(photos, shard_size=1, shuffle_seed=0, key_rule="stem"), out)
    return out


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory, many, teacher_settings):
    """The store of `many` by the local executor, never interrupted. Leave it unchanged."""
    out = tmp_path_factory.mktemp("undisturbed") / "store"
    config = ExtractConfig(**(teacher_settings | {"teacher_args": SLOWER, "executor": "local", "batch_size": 1}))
    extract_teacher_maps(many, out, config)
    return out


@pytest.fixture
def start(command, teacher_flags, many, tmp_path):
    """Start an extraction of `many` as a process. What is left of it and its children at the end is killed."""
    started: list[tuple[subprocess.Popen, set[int]]] = []

    def run(out, *flags):
        log = tmp_path / f"log{len(started)}"
        slower = [part for name, value in SLOWER.items() for part in ("--model-arg", f"{name}={value}")]
        all_flags = [*teacher_flags, *slower, "--batch-size", "1", *flags]
        line = command("extract-teacher-maps", many, "--out", out, *all_flags)
        environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
        with log.open("w") as out_and_err:
            running = subprocess.Popen(
                line, stdout=out_and_err, stderr=out_and_err, stdin=subprocess.DEVNULL, env=environment
            )
        running.said = log.read_text
        started.append(running)
        return running

    yield run
    for running in started:
        below = descendants(running.pid) if running.poll() is None else []
        for pid in [running.pid, *below]:
            if running.poll() is None or pid != running.pid:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        running.wait(30)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    from huggingface_hub.utils import close_session

    with FakeHub(tmp_path / "hub", token=TOKEN) as served:
        served.patch(monkeypatch)
        monkeypatch.setattr(leases, "SETTLE_S", 0)  # no other process takes these folders
        yield served
        assert served.leaked == []
        close_session()


@pytest.fixture(scope="module")
def published(store, tmp_path_factory):
    """What a push of the store leaves in its repository."""
    from huggingface_hub.utils import close_session

    with FakeHub(tmp_path_factory.mktemp("hub")) as served, pytest.MonkeyPatch.context() as patch:
        served.patch(patch)
        push_store(store, DATASET)
        close_session()
        return served.files("me/maps")


@pytest.fixture
def pushed(hub, published):
    """A Hub that holds the store."""
    hub.put("me/maps", published)
    return hub
