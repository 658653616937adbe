"""Stores that are pulled from a Hub, object stores, web servers and folders: checked, resumed, never half there."""

import functools
import hashlib
import http.server
import json
import os
import shutil
import signal
import subprocess
import threading
import time
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
from hub_stores import ADDRESS, DATASET, TOKEN, copied, damaged, killed_when, of_shards, saved, started, with_logits
from leases import holder_of
from web_server import WebServer

from zpipe.pipeline import download
from zpipe.pipeline import hub as hub_module
from zpipe.pipeline.download import pull_store
from zpipe.pipeline.hub import HubDataset, parse_address
from zpipe.pipeline.publish import push_store
from zpipe.pipeline.verify import verify_store
from zpipe.schemas.errors import DamageError, UsageError, ZpipeError
from zpipe.schemas.manifest import read_manifest
from zpipe.schemas.relevance_store import index_path
from zpipe.schemas.storage import as_path

# huggingface_hub uploads large files by an argument that its HTTP library has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>':DeprecationWarning")


def test_a_pull_reads_one_commit(pushed, store, tmp_path, monkeypatch):
    """What is pushed meanwhile is not mixed in."""
    original = download.claim_store

    def meanwhile(root):
        files = dict.fromkeys(of_shards(pushed.files("me/maps")))
        pushed.put("me/maps", files)
        original(root)

    monkeypatch.setattr(download, "claim_store", meanwhile)
    pull_store(ADDRESS, tmp_path / "back")
    assert verify_store(tmp_path / "back") == []


# ------------------------------------------------------------------------------------------------------- other stores


def test_a_folder_of_something_else_is_left_alone(pushed, store, tmp_path, contents, cli):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    done = cli("maps", "pull", ADDRESS, tmp_path / "mine")
    assert done.code == 2 and "holds something else (thesis.tex); give an empty or new folder" in done.error
    assert contents(tmp_path / "mine") == {"thesis.tex": b"x"}
    other = copied(store, tmp_path / "other", method="rollout")
    before = contents(other)
    done = cli("maps", "pull", ADDRESS, other)
    assert done.code == 2 and f"other: holds a store of other maps than {ADDRESS}; give a new folder" in done.error
    assert contents(other) == before


def test_shards_of_ones_own_are_not_replaced(hub, store, tmp_path):
    """The same teacher on another machine: maps that differ in the last bits, or of other tars."""
    push_store(copied(store, tmp_path / "part", stems=["shard-00000"]), DATASET)
    own = Path(shutil.copytree(store, tmp_path / "own"))
    with pytest.raises(UsageError, match="own: holds shard shard-00001, which hf://datasets/me/maps lacks; give a new"):
        pull_store(ADDRESS, own)
    assert verify_store(own) == []


def test_a_store_that_is_whole_keeps_its_manifest(pushed, store_copy, contents):
    """The one that was pushed knows where its shards are."""
    before = contents(store_copy)
    assert pull_store(ADDRESS, store_copy).kept == 4
    assert contents(store_copy) == before and b"/" in before["manifest.json"]


def test_one_writer_at_a_time(pushed, tmp_path):
    (tmp_path / "back").mkdir()
    holder_of(tmp_path / "back")
    with pytest.raises(ZpipeError, match="has been writing to this store since noon; wait for it"):
        pull_store(ADDRESS, tmp_path / "back")


# ----------------------------------------------------------------------------------------------------------- resuming


def test_a_pull_that_was_killed_is_resumed(pushed, published, store, tmp_path, command, contents):
    back = tmp_path / "back"
    held = threading.Event()
    last = hashlib.sha256(published["maps/shard-00003.zarr/c/0/0/0"]).hexdigest()
    original = pushed.content

    def slow(sha256):
        if sha256 == last:
            held.wait(30)
        return original(sha256)

    pushed.content = slow
    try:
        running = started(command, pushed, "maps", "pull", ADDRESS, back)
        killed_when(running, lambda: len(list(back.glob("index/shard-*.parquet"))) == 3)
    finally:
        held.set()
    assert not (back / "manifest.json").exists()
    pushed.requests.clear()
    assert pull_store(ADDRESS, back).kept == 3
    assert {line.partition("shard-")[2][:5] for line in pushed.requests if "shard-" in line} == {"00003"}
    assert of_shards(contents(back)) == of_shards(contents(store)) and verify_store(back) == []


def test_a_signal_ends_a_pull_that_waits_for_the_server(pushed, tmp_path, command):
    pushed.refuse(r"resolve/.*/maps/", 429, Retry_After="300")
    environment = os.environ | pushed.environment()
    line = command("maps", "pull", ADDRESS, tmp_path / "back")
    with subprocess.Popen(line, env=environment, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL) as running:
        end = time.monotonic() + 60
        while not any("/maps/" in line for line in pushed.requests) and time.monotonic() < end:
            time.sleep(0.01)
        time.sleep(0.2)
        running.send_signal(signal.SIGTERM)
        error = running.communicate(timeout=30)[1].decode()
    assert "error: terminated; run the same command again to resume" in error and "Traceback" not in error
    pushed.faults.clear()
    assert pull_store(ADDRESS, tmp_path / "back").manifest.count == 18


def test_a_damaged_shard_is_fetched_again(pushed, store, tmp_path, contents):
    back = tmp_path / "back"
    pull_store(ADDRESS, back)
    chunk = back / "maps" / "shard-00001.zarr" / "c" / "0" / "0" / "0"
    chunk.write_bytes(damaged(chunk.read_bytes()))
    index_path(back, "shard-00002").unlink()
    assert pull_store(ADDRESS, back).kept == 2
    assert of_shards(contents(back)) == of_shards(contents(store)) and verify_store(back) == []


# ----------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("pattern", "status", "headers", "told"),
    [
        (r"GET /api", 401, {}, "access is denied (401): it does not exist, is private, or is gated; check the address"),
        (r"resolve", 403, {"X_Error_Code": "GatedRepo"}, "access is gated (403); accept its terms on its page"),
        (r"resolve", 403, {}, "access is forbidden (403); set HF_TOKEN to a token that may do this"),
        (r"GET /api", 404, {"X_Error_Code": "RepoNotFound"}, "there is no such repository or file (404)"),
        (r"GET /api", 404, {"X_Error_Code": "RevisionNotFound"}, "there is no such revision (404)"),
        (r"resolve", 429, {"Retry_After": "4000"}, "too many requests (429); wait 4000 s, then run again to resume"),
        (r"cdn", 429, {"RateLimit": '"api";r=0;t=1234'}, "too many requests (429); wait 1234 s"),
        (r"resolve", 500, {}, "the server fails (500); wait some minutes, then run again to resume"),
        (r"cdn", 503, {}, "the server fails (503)"),
        (r"resolve", 418, {}, "the request was refused (418"),
    ],
)
def test_a_pull_that_is_refused_is_one_line(pushed, tmp_path, cli, monkeypatch, pattern, status, headers, told):
    monkeypatch.setattr(hub_module, "RETRIES", 1)
    pushed.refuse(pattern, status, body=json.dumps({"error": f"token {TOKEN} is bad"}).encode(), **headers)
    done = cli("maps", "pull", ADDRESS, tmp_path / "back")
    assert done.code == 1 and done.error.startswith(f"error: {ADDRESS}") and told in done.error
    assert TOKEN not in done.stderr and not (tmp_path / "back" / "manifest.json").exists()


def test_patience_is_rewarded(pushed, tmp_path):
    pushed.refuse(r"shard-00001.parquet", 429, times=1, Retry_After="1")
    pushed.refuse(r"shard-00002.parquet", 503, times=2)
    pushed.cut(r"cdn", times=3)
    pull_store(ADDRESS, tmp_path / "back")
    assert verify_store(tmp_path / "back") == []


def test_a_long_wait_is_announced(pushed, tmp_path, monkeypatch):
    monkeypatch.setattr(hub_module, "ANNOUNCED_WAIT_S", 1)
    pushed.refuse(r"shard-00001.parquet", 429, times=1, Retry_After="1")
    with pytest.warns(UserWarning, match="too many requests: the server asks to wait 1 s"):
        pull_store(ADDRESS, tmp_path / "back")


def test_a_token_that_no_header_may_hold_is_not_shown(pushed, tmp_path, cli, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", f"{TOKEN}\u00e4")
    done = cli("maps", "pull", ADDRESS, tmp_path / "back")
    assert done.code == 1 and "CANARY" not in done.error


@pytest.mark.parametrize(
    "address",
    [
        "hf://me/maps",
        "hf://models/me/maps",
        "hf://datasets/me",
        "hf://datasets/me/maps/index",
        "hf://datasets/../maps",
        "hf://datasets/me/maps@../x",
        "hf://datasets/me/maps@a b",
        "hf://datasets/me/ma--ps",
        "hf://datasets/me/maps?token=x",
        "hf://me:secret@datasets/me/maps",
        "s3://bucket/maps",
        "",
    ],
)
def test_addresses_that_are_none(address):
    with pytest.raises(UsageError):
        parse_address(address)


def test_addresses():
    assert parse_address("hf://datasets/me/maps.v1_a-b/") == HubDataset(name="me/maps.v1_a-b")
    assert str(parse_address("hf://datasets/me/maps@refs/pr/1")) == "hf://datasets/me/maps@refs/pr/1"


# ---------------------------------------------------------------------------------------------------- hostile remotes


def altered(pushed, **changes):
    manifest = json.loads(pushed.files("me/maps")["manifest.json"])
    manifest["shards"][0] |= changes
    manifest.pop("count", None)
    pushed.put("me/maps", {"manifest.json": json.dumps(manifest).encode()})


@pytest.mark.parametrize("stem", ["../../x", "/etc/x", "a/b", "..", "", "x\n", "shard-00001"])
def test_a_manifest_that_names_other_files_is_refused(pushed, tmp_path, contents, cli, stem):
    altered(pushed, stem=stem)
    done = cli("maps", "pull", ADDRESS, tmp_path / "back")
    assert done.code == 1 and f"{ADDRESS}/manifest.json: shard" in done.error
    assert not (tmp_path / "back").exists()


@pytest.mark.parametrize("count", [10**9, 2**53])
def test_a_manifest_of_huge_shards_is_refused(pushed, tmp_path, count):
    altered(pushed, count=count)
    with pytest.raises(DamageError, match=f"shard shard-00000 has {count} samples, more than the"):
        pull_store(ADDRESS, tmp_path / "back")


def test_files_larger_than_they_can_be_are_not_read(pushed, tmp_path, monkeypatch, cli):
    zeros = bytes(1 << 21)
    names = ["index/shard-00000.parquet", "maps/shard-00001.zarr/zarr.json", "maps/shard-00002.zarr/c/0/0/0"]
    pushed.put("me/maps", dict.fromkeys(names, zeros))
    done = cli("maps", "pull", ADDRESS, tmp_path / "back")
    assert done.code == 1 and "3 of 4 shards are damaged there or on the way; run again to resume" in done.error
    assert len(done.details) == 3 and all("too many for a file of its kind" in line for line in done.details)
    assert [path.name for path in (tmp_path / "back" / "index").iterdir()] == ["shard-00003.parquet"]


def test_damage_is_named_after_two_attempts(pushed, store, tmp_path, contents, cli):
    files = pushed.files("me/maps")
    chunk = "maps/shard-00002.zarr/c/0/0/0"
    changes = {
        "index/shard-00000.parquet": files["index/shard-00001.parquet"],  # the index of another shard
        "maps/shard-00001.zarr/zarr.json": files["maps/shard-00001.zarr/zarr.json"].replace(b"float16", b"float64"),
        chunk: damaged(files[chunk]),
        "maps/shard-00003.zarr/zarr.json": None,
    }
    pushed.put("me/maps", changes)
    done = cli("maps", "pull", ADDRESS, tmp_path / "back")
    assert done.code == 1 and "4 of 4 shards are damaged" in done.error
    for line, said in zip(
        done.details,
        (
            "shard-00000: its index is not the one that the manifest lists",
            "shard-00001: its maps can't be read (zarr.json describes no array of maps",
            "shard-00002: its maps",
            "shard-00003: a file of it is missing",
        ),
        strict=True,
    ):
        assert said in line
    assert len([line for line in pushed.requests if chunk in line]) == 2
    assert of_shards(contents(tmp_path / "back")) == {} and not (tmp_path / "back" / "manifest.json").exists()
    pushed.put("me/maps", {name: files[name] for name in changes})
    assert pull_store(ADDRESS, tmp_path / "back").kept == 0
    assert of_shards(contents(tmp_path / "back")) == of_shards(contents(store))


def test_an_index_of_another_store_that_the_manifest_lists_is_refused(pushed, store, tmp_path):
    other = copied(store, tmp_path / "other", method="rollout")
    data = index_path(other, "shard-00000").read_bytes()
    pushed.put("me/maps", {"index/shard-00000.parquet": data})
    altered(pushed, index_sha256=hashlib.sha256(data).hexdigest())
    with pytest.raises(ZpipeError, match="1 of 4 shards") as error:
        pull_store(ADDRESS, tmp_path / "back")
    assert "its index is that of other maps than the manifest's" in error.value.details[0]


def test_an_index_that_is_no_index_is_refused(pushed, tmp_path):
    for data in (b"PAR1 nothing PAR1", b""):
        pushed.put("me/maps", {"index/shard-00000.parquet": data})
        altered(pushed, index_sha256=hashlib.sha256(data).hexdigest())
        with pytest.raises(ZpipeError, match="1 of 4 shards") as error:
            pull_store(ADDRESS, tmp_path / "back")
        assert "its map index can't be read" in error.value.details[0] and ".tmp-" not in error.value.details[0]


@pytest.mark.parametrize(
    "data", [b"", b"[]", b"{}", b"[" * 100_000, b"\xff\xfe", b'{"format": "zpipe-relevance-store"}']
)
def test_a_manifest_that_is_none_is_one_line(pushed, tmp_path, cli, data):
    pushed.put("me/maps", {"manifest.json": data})
    done = cli("maps", "pull", ADDRESS, tmp_path / "back")
    assert done.code == 1 and f"{ADDRESS}/manifest.json" in done.error and not (tmp_path / "back").exists()


# -------------------------------------------------------------------------------------------------- from other places


@pytest.fixture
def website(tmp_path):
    """A plain web server that lists nothing: `website(folder) -> URL`."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *arguments):
            pass

        def list_directory(self, path):
            self.send_error(403)

    with ExitStack() as servers:

        def serve(folder):
            return servers.enter_context(WebServer(functools.partial(Quiet, directory=folder))).url

        yield serve


def test_from_a_web_server(website, store, tmp_path, cli, contents):
    pytest.importorskip("aiohttp")
    url = website(store)
    done = cli("maps", "pull", url, tmp_path / "back")
    assert done.code == 0, done.stderr
    assert contents(tmp_path / "back") == contents(store)
    (tmp_path / "empty").mkdir()
    done = cli("maps", "pull", website(tmp_path / "empty"), tmp_path / "other")
    assert done.code == 1 and "holds no finished relevance store" in done.error


@pytest.mark.parametrize(
    ("status", "headers", "told"),
    [
        (403, {}, "access is denied (403); check the address, or ask its owner"),
        (429, {"Retry-After": "4000"}, "too many requests (429); wait 4000 s"),
        (503, {}, "the server fails (503)"),
        (None, {}, "can't be reached"),
    ],
)
def test_a_web_server_that_refuses_is_one_line(tmp_path, cli, monkeypatch, status, headers, told):
    pytest.importorskip("aiohttp")
    monkeypatch.setattr(hub_module, "RETRIES", 1)

    class Refusing(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_HEAD = do_GET

        def log_message(self, *arguments):
            pass

    server = WebServer(Refusing)
    url = f"{server.url}/store"
    if status is None:
        server.server_close()  # nobody listens
    with nullcontext() if status is None else server:
        done = cli("maps", "pull", url, tmp_path / "back")
        assert done.code == 1 and done.error.startswith(f"error: {url}/manifest.json: ") and told in done.error
    assert not (tmp_path / "back").exists()


def test_from_a_folder(store, store_copy, tmp_path, contents, cli):
    pull_store(str(store), tmp_path / "back")
    assert contents(tmp_path / "back") == contents(store)
    done = cli("maps", "pull", tmp_path / "back", tmp_path / "back")
    assert done.code == 2 and "is the store itself" in done.error
    done = cli("maps", "pull", tmp_path / "nowhere", tmp_path / "x")
    assert done.code == 1 and "nowhere: holds no finished relevance store" in done.error
    chunk = store_copy / "maps" / "shard-00000.zarr" / "c" / "0" / "0" / "0"
    chunk.unlink()
    os.mkfifo(chunk)
    done = cli("maps", "pull", store_copy, tmp_path / "y")
    assert done.code == 1 and "is a FIFO, not a regular file" in done.error


def test_from_and_to_an_object_store(store, tmp_path, contents):
    there = f"memory://{tmp_path.name}/store"
    pull_store(str(store), as_path(there))
    assert verify_store(as_path(there)) == [] and pull_store(str(store), as_path(there)).kept == 4
    pull_store(there, tmp_path / "back")
    assert contents(tmp_path / "back") == contents(store)
    with pytest.raises(ZpipeError, match="nowhere: holds no finished relevance store"):
        pull_store("memory://nowhere", tmp_path / "x")


@pytest.mark.parametrize("place", ["folder", "memory", "web"])
def test_the_stores_inside_are_found_without_a_listing(website, store_copy, shards, tmp_path, contents, place):
    own = with_logits(shards, store_copy)
    source = str(own)
    if place == "memory":
        source = f"memory://{tmp_path.name}/inner"
        pull_store(str(own), as_path(source))
    elif place == "web":
        pytest.importorskip("aiohttp")
        source = website(own)
    pulled = pull_store(source, tmp_path / "back")
    assert (pulled.shards, set(pulled.inner), pulled.notes) == (12, {"logits", "features"}, ())
    assert contents(tmp_path / "back") == contents(own)
    assert pull_store(source, tmp_path / "alone", maps_only=True).inner == ()
    assert not (tmp_path / "alone" / "logits").exists()
    later = pull_store(source, tmp_path / "alone")
    assert later.kept == 4 and contents(tmp_path / "alone") == contents(own)


def test_a_store_inside_that_is_damaged_leaves_the_whole_unfinished(store_copy, shards, tmp_path):
    own = with_logits(shards, store_copy)
    chunk = own / "logits/maps/shard-00001.zarr/c/0/0"
    data = chunk.read_bytes()
    chunk.write_bytes(damaged(data))
    with pytest.raises(ZpipeError, match="1 of 12 shards are damaged") as error:
        pull_store(str(own), tmp_path / "back")
    assert error.value.details[0].startswith(f"{own}/logits: shard shard-00001: its maps")
    assert not list((tmp_path / "back").rglob("manifest.json"))
    chunk.write_bytes(data)
    assert pull_store(str(own), tmp_path / "back").kept == 11
    assert verify_store(tmp_path / "back" / "logits", shards) == []


def test_a_folder_in_the_place_of_a_store_inside_is_left_alone(store_copy, shards, tmp_path):
    own = with_logits(shards, store_copy)
    pull_store(str(own), tmp_path / "back", maps_only=True)
    (tmp_path / "back" / "logits").mkdir()
    (tmp_path / "back" / "logits" / "thesis.tex").write_text("x")
    with pytest.raises(UsageError, match="back/logits: holds something else"):
        pull_store(str(own), tmp_path / "back")
    assert [path.name for path in (tmp_path / "back" / "logits").iterdir()] == ["thesis.tex"]
    assert verify_store(tmp_path / "back") == []


def test_a_server_that_denies_what_is_absent_is_asked_no_more(store, tmp_path, cli):
    """As object stores answer those who may not list a bucket."""
    pytest.importorskip("aiohttp")

    class Denying(http.server.SimpleHTTPRequestHandler):
        def send_error(self, code, *arguments):
            super().send_error(403 if code == 404 else code, *arguments)

        def log_message(self, *arguments):
            pass

    serving = functools.partial(Denying, directory=store.parent)
    with WebServer(serving) as server:
        url = f"{server.url}/{store.name}"
        done = cli("maps", "pull", url, tmp_path / "back")
    assert done.code == 0 and verify_store(tmp_path / "back") == []
    assert f"{url}/logits: access is denied, if it exists, and left out; ask its owner" in done.stderr


def test_the_index_of_many_classes_is_not_too_large(shards, tmp_path):
    """Each row of the index of class maps lists its classes."""
    manifest = read_manifest(saved(shards, tmp_path / "own", "class-maps", (1000, 1, 1)))
    wide = replace(manifest.shards[0], count=10_000)
    few = read_manifest(saved(shards, tmp_path / "few", "class-maps", (1, 1, 1)))
    assert download._limits(manifest, wide)[0] - download._limits(few, wide)[0] >= 10_000 * 999 * 4


def test_a_full_disk_is_one_line(pushed, small_disk, cli):
    small_disk.fill(leave=30_000)
    done = cli("maps", "pull", ADDRESS, small_disk.root / "back")
    assert done.code == 1 and "No space left on device" in done.error
    small_disk.fill(leave=1 << 19)
    assert cli("maps", "pull", ADDRESS, small_disk.root / "back").code == 0
