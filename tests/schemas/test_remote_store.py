"""Stores and shards behind a URL: a real S3 server on loopback, real requests."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

import zpipe
from zpipe.pipeline.extract import ExtractConfig, extract_teacher_maps
from zpipe.pipeline.make_shards import index_shards
from zpipe.pipeline.shard_reader import open_shards
from zpipe.pipeline.verify import verify_store
from zpipe.schemas.errors import UsageError, ZpipeError
from zpipe.schemas.relevance_store import index_path
from zpipe.schemas.storage import as_path, check_reachable, create_exclusively, file_sizes, is_remote, names_in
from zpipe.train.data.loader import RelevanceLoader
from zpipe.train.data.stream import list_shards, read_tar

SERVER = """
import sys, threading
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
server.start()
print(server.get_host_and_port()[1], flush=True)
sys.stdin.read()
"""


@pytest.fixture(scope="module")
def bucket():
    """`s3://bucket` of a server process that lives as long as this module's tests; the environment points to it."""
    names = {
        "AWS_ACCESS_KEY_ID": "a",
        "AWS_SECRET_ACCESS_KEY": "b",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    server = subprocess.Popen(
        [sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    names["AWS_ENDPOINT_URL"] = f"http://127.0.0.1:{int(server.stdout.readline())}"
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(names)
    try:
        as_path("s3://bucket").fs.mkdir("bucket")
        yield "s3://bucket"
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
        server.kill()
        server.wait(30)


@pytest.fixture
def folder(bucket, request):
    """A place in the bucket of this test alone."""
    return f"{bucket}/{request.node.name.replace('[', '-').replace(']', '')}"


def put(local, url):
    target = as_path(url)
    for path in sorted(local.rglob("*")):
        if path.is_file():
            target.fs.put_file(str(path), f"{target.path}/{path.relative_to(local).as_posix()}")
    return url


def fetched(url):
    root = as_path(url)
    return {path.path.removeprefix(root.path + "/"): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def without_source(files):
    manifest = json.loads(files["manifest.json"])
    return files | {"manifest.json": {name: value for name, value in manifest.items() if name != "source"}}


@pytest.fixture
def extract(teacher_settings):
    def run(shards, out, **changes):
        return extract_teacher_maps(shards, out, ExtractConfig(**(teacher_settings | {"executor": "local"} | changes)))

    return run


def test_a_store_behind_a_url_holds_the_same_bytes(shards, store, folder, extract, contents):
    tars = put(shards, f"{folder}/shards")
    report = extract(tars, f"{folder}/maps")
    assert (report.count, report.extracted) == (18, 4)
    assert without_source(fetched(f"{folder}/maps")) == without_source(contents(store))
    assert verify_store(as_path(f"{folder}/maps"), as_path(tars)) == []
    again = extract(tars, f"{folder}/maps")
    assert again.extracted == 0


@pytest.mark.parametrize("name", ["shard-0000{1..2}.tar", "shard-0000[12].tar", "shard-00002.tar"])
@pytest.mark.parametrize("indexed", ["beside", "elsewhere"])
def test_tars_are_selected_by_a_pattern_there(shards, folder, tmp_path, name, indexed):
    url = put(shards, f"{folder}/tars") + f"/{name}"
    wanted = [f"{folder}/tars/shard-0000{number}.tar" for number in (1, 2) if "{" in name or "[" in name or number == 2]
    given = url
    if indexed == "elsewhere":
        (tmp_path / "list").write_text(f"{url}\n")
        given = f"{folder}/index"
        index_shards(f"@{tmp_path / 'list'}", as_path(given))
    assert [str(path) for path, _ in open_shards(given)[0]] == wanted
    assert [str(shard.path) for shard in list_shards(given)[0]] == wanted
    assert [len(read_tar(shard)) for shard in list_shards(given)[0]] == [5, 5][: len(wanted)]
    with pytest.raises(ZpipeError, match="shard-00009.tar: not listed"):
        open_shards(f"{folder}/tars/shard-0000{{1,9}}.tar")


def test_it_is_read_like_any_other(store, folder):
    url = put(store, folder)
    near, far = zpipe.open_maps(store), zpipe.open_maps(url)
    assert list(near) == list(far) and near.table().equals(far.table())
    assert np.array_equal(near.array(), far.array())
    key = list(near)[7]
    assert np.array_equal(near[key], far[key]) and np.array_equal(near[3:12], far[3:12])


@pytest.mark.parametrize("num_workers", [0, 2])
def test_training_reads_images_and_maps_from_there(shards, store, folder, num_workers):
    tars, maps = put(shards, f"{folder}/shards"), put(store, f"{folder}/maps")
    near, far = (
        {
            key: (image, relevance)
            for batch in RelevanceLoader(*places, batch_size=4, image_size=32, augment="eval", num_workers=num_workers)
            for key, image, relevance in zip(batch["key"], batch["image"], batch["relevance"], strict=True)
        }
        for places in ((shards, store), (tars, maps))
    )
    assert sorted(near) == sorted(far) and len(far) == 18
    for key, (image, relevance) in near.items():
        assert (image == far[key][0]).all() and (relevance == far[key][1]).all()


def test_on_ray_it_is_the_same(shards, store, folder, extract, contents):
    extract(put(shards, f"{folder}/shards"), f"{folder}/maps", executor="ray", actors=1)
    assert without_source(fetched(f"{folder}/maps")) == without_source(contents(store))


def test_killed_and_run_again(shards, store, folder, extract, contents, command, teacher_flags):
    tars, out = put(shards, f"{folder}/shards"), f"{folder}/maps"
    line = command("extract-teacher-maps", tars, "--out", out, *teacher_flags, "--executor", "local")
    running = subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        end = time.monotonic() + 60
        while not names_in(as_path(out) / "index") and time.monotonic() < end and running.poll() is None:
            time.sleep(0.005)
    finally:
        running.send_signal(signal.SIGKILL)
        running.wait(30)
    left = 4 - len(names_in(as_path(out) / "index"))
    report = extract(tars, out)  # takes over the lease of the dead at once
    assert report.extracted == left
    assert without_source(fetched(out)) == without_source(contents(store))


def test_what_is_damaged_there_is_found(store, folder):
    url = put(store, folder)
    path = index_path(url, "shard-00002")
    path.write_bytes(path.read_bytes()[:-9] + b"*" + path.read_bytes()[-8:])
    chunk = as_path(url) / "maps" / "shard-00001.zarr" / "c" / "0" / "0" / "0"
    chunk.write_bytes(chunk.read_bytes()[:-1] + b"*")
    (as_path(url) / "maps" / "foreign.zarr" / "zarr.json").write_bytes(b"{}")
    problems = verify_store(as_path(url))
    assert len(problems) == 3
    for name in ("foreign.zarr", "shard-00001.zarr", "shard-00002.parquet"):
        assert sum(f"{url}/" in problem and name in problem for problem in problems) == 1


def test_another_teacher_is_refused_and_replace_starts_over(shards, folder, extract):
    extract(shards, folder)
    before = fetched(folder)
    with pytest.raises(ZpipeError, match="made with teacher_digest = .* this run has .* --replace to start over"):
        extract(shards, folder, seed=1)
    assert fetched(folder) == before
    assert extract(shards, folder, seed=1, replace=True).extracted == 4
    assert fetched(folder).keys() == before.keys() and fetched(folder) != before


def test_only_one_of_two_creates_a_file(folder):
    path = as_path(folder) / "lease.json"
    assert create_exclusively(path, b"one") and not create_exclusively(path, b"two")
    assert path.read_bytes() == b"one"


def test_sizes_come_from_one_listing(shards, folder):
    url = as_path(put(shards, folder))
    tars = sorted(path.name for path in shards.glob("*.tar"))
    assert file_sizes(url, [*tars, "none.tar"]) == {name: (shards / name).stat().st_size for name in tars}


@pytest.mark.parametrize("verb", ["extract", "info", "verify"])
def test_a_bucket_that_is_not_there_is_one_line(shards, cli, teacher_flags, bucket, verb):
    url = "s3://nowhere/store"
    if verb == "extract":
        done = cli("extract-teacher-maps", shards, "--out", url, *teacher_flags, "--executor", "local")
    else:
        done = cli("maps", verb, url)
    assert done.code == 1 and url in done.error


def test_an_endpoint_that_is_dead_is_one_line(process, shards, monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "x")
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
    done = process("maps", "info", "s3://bucket/store")
    assert done.code == 1 and "s3://bucket/store" in done.error and "can't be reached" in done.error


@pytest.mark.parametrize(
    ("source", "told"),
    [
        ("pipe:cat /etc/passwd", "no such folder"),
        ("pipe:curl http://x/y.tar", "no such folder"),
        ("pipe://cat", "Unsupported filesystem: 'pipe'"),
        ("http://127.0.0.1:9/x", "127.0.0.1:9"),
    ],
)
def test_nothing_in_a_path_is_run(source, told):
    """webdataset runs what follows `pipe:` in a shell; here it is a name like any other."""
    with pytest.raises(ZpipeError, match=told) as error:
        RelevanceLoader(source, batch_size=1)
    assert "\n" not in str(error.value)


def test_urls_and_paths_are_told_apart(tmp_path):
    assert as_path("a/b") == as_path(as_path("a/b")) and not is_remote(as_path("a/b"))
    assert as_path(f"file://{tmp_path}/a") == tmp_path / "a" and not is_remote(as_path(f"file://{tmp_path}"))
    url = as_path("memory://zpipe/a")
    assert is_remote(url) and str(as_path(url) / "b").endswith("zpipe/a/b")
    with pytest.raises(UsageError, match="nope://x/y: can't be opened"):
        check_reachable(as_path("nope://x/y"))


def test_a_local_copy_of_a_remote_store_is_a_store(store, folder, tmp_path):
    put(store, folder)
    for name, data in fetched(folder).items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(data)
    assert verify_store(tmp_path) == []
    shutil.rmtree(tmp_path / "maps" / "shard-00000.zarr")
    assert len(verify_store(tmp_path)) == 1
