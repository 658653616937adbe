"""Stores that are pushed to a Hub: whole or not there, nothing twice, nothing private, no other store overwritten."""

import io
import json
import shutil
import socket
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hub_stores import ADDRESS, DATASET, SHAPES, TOKEN, copied, killed_when, of_shards, saved, started, with_logits

import zpipe
from zpipe.pipeline import hub as hub_module
from zpipe.pipeline import publish
from zpipe.pipeline.download import pull_store
from zpipe.pipeline.hub import HubDataset
from zpipe.pipeline.publish import PushConfig, push_store
from zpipe.pipeline.verify import verify_store
from zpipe.schemas.errors import UsageError, ZpipeError
from zpipe.schemas.manifest import read_manifest, write_manifest
from zpipe.schemas.relevance_store import INDEX_SCHEMA, IndexFile, index_path, write_shard

# huggingface_hub uploads large files by an argument that its HTTP library has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>':DeprecationWarning")


# ----------------------------------------------------------------------------------------------------- there and back


def test_a_store_comes_back_as_it_was(hub, store, tmp_path, contents, cli):
    done = cli("maps", "push", store, ADDRESS, "--license", "cc-by-4.0")
    assert done.code == 0 and f"{ADDRESS}: 15 files" in done.stdout and "15 sent" in done.stdout
    done = cli("maps", "pull", ADDRESS, tmp_path / "back")
    assert done.code == 0 and "18 maps in 4 shards, 0 of them were there" in done.stdout
    assert of_shards(contents(tmp_path / "back")) == of_shards(contents(store)) == of_shards(hub.files("me/maps"))
    assert cli("maps", "verify", tmp_path / "back").code == 0
    assert read_manifest(tmp_path / "back").provenance.fingerprint() == read_manifest(store).provenance.fingerprint()
    assert set(contents(tmp_path / "back")) == set(contents(store))  # no lease, no card, nothing temporary


@pytest.mark.parametrize("kind", SHAPES)
def test_stores_of_all_kinds_come_back_with_their_values(hub, shards, tmp_path, contents, kind):
    own = saved(shards, tmp_path / "own", kind)
    assert push_store(own, DATASET).files == 15  # three files for each of the four shards
    pull_store(ADDRESS, tmp_path / "back")
    assert of_shards(contents(tmp_path / "back")) == of_shards(contents(own))
    assert verify_store(tmp_path / "back", shards) == []
    np.testing.assert_array_equal(zpipe.open_maps(tmp_path / "back").array(), zpipe.open_maps(own).array())
    assert pull_store(ADDRESS, tmp_path / "back").kept == 4


def test_a_chunk_that_would_not_be_sent_is_an_error(hub, shards, tmp_path, monkeypatch):
    own = saved(shards, tmp_path / "own", "vector")
    monkeypatch.setattr(publish, "chunk_name", lambda axes: "c/0/0/0")
    with pytest.raises(ZpipeError, match="shard-00000.zarr: its chunk is not c/0/0/0"):
        push_store(own, DATASET)
    assert hub.requests == []


def test_the_stores_inside_a_store_come_with_it(hub, store_copy, shards, tmp_path, contents, cli, monkeypatch):
    monkeypatch.setattr(publish, "COMMIT_FILES", 10)
    own = with_logits(shards, store_copy)
    done = cli("maps", "push", own, ADDRESS)
    assert done.code == 0 and "43 files" in done.stdout and "no part of the store" not in done.stderr
    trees = list(hub.repositories["datasets/me/maps"].commits.values())
    manifests = ["manifest.json", "logits/manifest.json", "features/manifest.json"]
    assert [[name in tree for name in manifests] for tree in trees] == [[False] * 3] * (len(trees) - 1) + [[True] * 3]
    assert push_store(own, DATASET).sent == 0
    done = cli("maps", "pull", ADDRESS, tmp_path / "back")
    assert done.code == 0
    assert "18 maps, with logits and features, in 12 shards, 0 of them were there" in done.stdout
    assert set(contents(tmp_path / "back")) == set(contents(own))
    for name in ("", "logits", "features"):
        assert verify_store(tmp_path / "back" / name, shards) == []
    assert pull_store(ADDRESS, tmp_path / "back").kept == 12


def test_the_stores_inside_are_verified_and_unfinished_ones_are_named(hub, store_copy, shards):
    own = with_logits(shards, store_copy)
    (own / "features" / "manifest.json").unlink()
    assert push_store(own, DATASET).left_out == ("features",)
    assert "logits/manifest.json" in hub.files("me/maps") and "features/manifest.json" not in hub.files("me/maps")
    index_path(own / "logits", "shard-00001").unlink()
    with pytest.raises(ZpipeError, match="problems; nothing was sent"):
        push_store(own, DATASET)
    assert push_store(own, HubDataset(name="me/other"), PushConfig(maps_only=True)).left_out == ("features", "logits")
    assert not [name for name in hub.files("me/other") if name.startswith("logits/")]


def test_another_store_inside_replaces_the_whole(hub, store_copy, shards, tmp_path):
    """Until the last commit there is no store, not one with a part of the other; what is the same is not sent again."""
    push_store(with_logits(shards, store_copy), DATASET)
    shutil.rmtree(store_copy / "features")
    with pytest.raises(
        UsageError, match="me/maps/features: holds a store, and the one to push has none there; give --r"
    ):
        push_store(store_copy, DATASET)
    shutil.rmtree(store_copy / "logits")
    saved(shards, store_copy / "logits", "vector", (5,))
    with pytest.raises(UsageError, match="me/maps/logits: holds another store, of other maps; give --replace"):
        push_store(store_copy, DATASET)
    before = len(hub.repositories["datasets/me/maps"].commits)
    push_store(store_copy, DATASET, PushConfig(replace=True))
    trees = list(hub.repositories["datasets/me/maps"].commits.values())[before:]
    assert [[name for name in tree if name.endswith("manifest.json")] for tree in trees[:-1]] == [[]] * (len(trees) - 1)
    assert {"manifest.json", "logits/manifest.json"} <= set(trees[-1])
    assert not [name for name in trees[-1] if name.startswith("features/")]
    assert pull_store(ADDRESS, tmp_path / "back").inner == ("logits",)
    assert zpipe.open_maps(tmp_path / "back" / "logits").array().shape == (18, 5)
    assert verify_store(tmp_path / "back") == verify_store(tmp_path / "back" / "logits") == []


def test_only_files_of_the_store_go(hub, store_copy):
    for name in ("lease.json", ".tmp-1-x", "notes.txt", "maps/.tmp-2-y", "replacing.json", "wandb/secret"):
        (store_copy / name).parent.mkdir(exist_ok=True)
        (store_copy / name).write_text("{}")
    with pytest.raises(ZpipeError, match="1 problems; nothing was sent"):
        push_store(store_copy, DATASET)
    assert hub.requests == []
    (store_copy / "maps" / ".tmp-2-y").unlink()
    left_out = push_store(store_copy, DATASET).left_out
    assert left_out == (".tmp-1-x", "lease.json", "notes.txt", "replacing.json", "wandb")
    described = {"README.md", "manifest.json", "extraction.json", ".gitattributes"}
    assert set(hub.files("me/maps")) - described == set(of_shards(hub.files("me/maps")))


def test_the_manifest_is_in_the_last_commit(hub, store, monkeypatch):
    monkeypatch.setattr(publish, "COMMIT_FILES", 5)
    push_store(store, DATASET)
    trees = list(hub.repositories["datasets/me/maps"].commits.values())
    assert [len(tree) for tree in trees] == [1, 2, 7, 12, 14, 16]
    assert ["manifest.json" in tree for tree in trees] == [False] * 5 + [True]


def test_nothing_is_sent_twice(pushed, store):
    assert push_store(store, DATASET).sent == 0
    assert not pushed.sent
    assert not [line for line in pushed.requests if "/commit/" in line or "preupload" in line]


def test_the_listing_may_have_many_pages(hub, store):
    hub.page = 3
    push_store(store, DATASET)
    assert push_store(store, DATASET).sent == 0 and max(hub.sent.values()) == 1


def test_a_store_that_has_grown_is_sent_in_part(hub, store, tmp_path):
    part = copied(store, tmp_path / "part", stems=["shard-00000", "shard-00001"])
    push_store(part, DATASET)
    pull_store(ADDRESS, tmp_path / "back")
    assert len(zpipe.open_maps(tmp_path / "back")) == 10
    before = hub.sent.copy()
    push_store(store, DATASET)
    new = {sha256 for sha256 in hub.sent if sha256 not in before}
    assert len(new) == 8 and max(hub.sent.values()) == 1  # 6 of two shards, manifest and card
    assert pull_store(ADDRESS, tmp_path / "back").kept == 2
    assert verify_store(tmp_path / "back") == []


def test_another_branch(hub, store, tmp_path, cli):
    assert cli("maps", "push", store, ADDRESS, "--revision", "v2").code == 0
    assert set(hub.files("me/maps")) == {".gitattributes"}
    with pytest.raises(ZpipeError, match=r"maps: holds no finished relevance store \(no manifest.json\); check the a"):
        pull_store(ADDRESS, tmp_path / "a")
    assert not (tmp_path / "a").exists()
    assert pull_store(f"{ADDRESS}@v2", tmp_path / "a").manifest.count == 18


def test_a_branch_is_named_once(hub, store, cli):
    done = cli("maps", "push", store, f"{ADDRESS}@v1", "--revision", "v2")
    assert done.code == 2 and f"{ADDRESS}@v1: names a branch, and --revision v2 too; give one of them" in done.error
    assert hub.requests == []


def test_a_dry_run_asks_nothing(hub, store, cli):
    done = cli("maps", "push", store, ADDRESS, "--dry-run")
    assert (
        done.code == 0 and "would hold 15 files" in done.stdout and "| method | transformer-attribution" in done.stdout
    )
    assert hub.requests == []


def test_private_means_private(hub, store):
    push_store(store, DATASET, PushConfig(private=True))
    assert hub.repositories["datasets/me/maps"].private
    push_store(store, DATASET, PushConfig(private=True))
    hub.put("me/open", {})
    with pytest.raises(UsageError, match="me/open: exists and is public; make it private on its page, or leave"):
        push_store(store, HubDataset(name="me/open"), PushConfig(private=True))
    assert set(hub.files("me/open")) == {".gitattributes"}


def test_an_array_of_zeros_needs_no_chunk(hub, store, tmp_path):
    own = Path(shutil.copytree(store, tmp_path / "own"))
    manifest = read_manifest(own)
    first = manifest.shards[0]
    index = IndexFile(index_path(own, first.stem)).table().to_pydict()
    rows = len(index["key"])
    index |= {"status": ["zero"] * rows, "scale": [0.0] * rows}
    index |= {name: [float("nan")] * rows for name in ("entropy", "top10_mass")}
    zeros = np.zeros((rows, *manifest.provenance.grid), np.float16)
    seal = {"input_sha256": first.input_sha256, "fingerprint": manifest.provenance.fingerprint()}
    write_shard(own, first.stem, zeros, pa.table(index, schema=INDEX_SCHEMA), **seal)
    shutil.rmtree(own / "maps" / f"{first.stem}.zarr" / "c")
    shards = (replace(first, index_sha256=IndexFile(index_path(own, first.stem)).sha256), *manifest.shards[1:])
    write_manifest(own, replace(manifest, shards=shards, statuses={"ok": 18 - rows, "zero": rows}))
    assert verify_store(own) == []
    assert "`image_digest`" not in push_store(own, DATASET).card  # the index of this shard has none
    pull_store(ADDRESS, tmp_path / "back")
    assert verify_store(tmp_path / "back") == [] and not (tmp_path / "back/maps" / f"{first.stem}.zarr" / "c").exists()


def test_the_index_opens_as_a_table(pushed):
    """What the viewer of the Hub does with the files that the card names."""
    rows = [
        pq.read_table(io.BytesIO(data)).num_rows
        for name, data in pushed.files("me/maps").items()
        if name.startswith("index/")
    ]
    assert sum(rows) == 18


# ---------------------------------------------------------------------------------------------------- what is private


def test_nothing_private_is_published(hub, store, tmp_path):
    private = tmp_path / "home" / "me"
    manifest = read_manifest(store)
    own = copied(store, private / "store", weights=f"{private}/runs/teacher:best")
    write_manifest(own, replace(read_manifest(own), source=f"{private}/shards/train/"))
    push_store(own, DATASET)
    files = hub.files("me/maps")
    for name, data in files.items():
        assert str(tmp_path).encode() not in data and b"/home" not in data, name
        assert socket.gethostname().encode() not in data and TOKEN.encode() not in data, name
    published = json.loads(files["manifest.json"])
    assert published["source"] == "train" and published["provenance"]["weights"] == "teacher:best"
    pull_store(ADDRESS, tmp_path / "back")
    assert read_manifest(tmp_path / "back").provenance.fingerprint() == manifest.provenance.fingerprint()
    assert read_manifest(own).source.startswith(str(private))  # the store itself is as it was


def test_a_path_in_the_fingerprint_is_refused(hub, store, tmp_path):
    arguments = read_manifest(store).provenance.teacher_args | {"pretrained_cfg_overlay": {"file": "/home/me/w.bin"}}
    own = copied(store, tmp_path / "own", teacher_args=arguments)
    with pytest.raises(ZpipeError, match=r"holds a path of this machine \(/home/me/w.bin\), which decides"):
        push_store(own, DATASET)
    assert hub.requests == []


# ------------------------------------------------------------------------------------------------------- other stores


def test_another_store_is_not_overwritten(pushed, store, tmp_path):
    other = copied(store, tmp_path / "other", method="rollout")
    part = copied(store, tmp_path / "part", stems=["shard-00001"])
    before = pushed.files("me/maps")
    with pytest.raises(UsageError, match="maps: holds another store, of other maps; give --replace, or another"):
        push_store(other, DATASET)
    with pytest.raises(UsageError, match="holds another store, has a shard shard-00000 that this one lacks; give"):
        push_store(part, DATASET)
    assert pushed.files("me/maps") == before
    push_store(part, DATASET, PushConfig(replace=True))
    assert {Path(name).parts[1] for name in of_shards(pushed.files("me/maps"))} == {
        "shard-00001.zarr",
        "shard-00001.parquet",
    }
    # While the shards of one were exchanged for those of the other, there was no manifest.
    trees = list(pushed.repositories["datasets/me/maps"].commits.values())[-2:]
    assert ["manifest.json" in tree for tree in trees] == [False, True]
    assert pull_store(ADDRESS, tmp_path / "back").manifest.count == 5


def test_what_an_interrupted_push_began_is_known(hub, store, tmp_path):
    hub.refuse(r"PUT /lfs/", 400, times=1)
    with pytest.raises(ZpipeError, match=r"maps: the request was refused \(400"):
        push_store(store, DATASET)
    other = copied(store, tmp_path / "other", method="rollout")
    with pytest.raises(UsageError, match="holds another store, of other maps; give --replace"):
        push_store(other, DATASET)
    push_store(store, DATASET)
    assert max(hub.sent.values()) == 1


def test_a_repository_of_something_else_is_left_alone(hub, store):
    hub.put("me/maps", {"data/train.csv": b"a,b\n"})
    with pytest.raises(UsageError, match=r"maps: holds something else \(data/train.csv\); give a new repository"):
        push_store(store, DATASET)
    assert set(hub.files("me/maps")) == {".gitattributes", "data/train.csv"}


def test_a_file_that_the_hub_ignores_leaves_the_store_unfinished(hub, store, monkeypatch):
    original = publish._Repository.commit

    def forgetful(self, message, files, removed):
        original(self, message, {name: data for name, data in files.items() if "00002.parquet" not in name}, removed)

    monkeypatch.setattr(publish._Repository, "commit", forgetful)
    with pytest.raises(ZpipeError, match=r"maps: lacks 1 files after the upload \(index/shard-00002.parquet\)"):
        push_store(store, DATASET)
    assert "manifest.json" not in hub.files("me/maps")


# ---------------------------------------------------------------------------------------------- resuming and refusals


def test_a_push_that_was_killed_is_resumed(hub, store, command):
    held = threading.Event()
    original = hub.blob

    def slow(data, *, lfs):  # the twelve files of the four shards come five at a time
        if sum(hub.sent.values()) > 6:
            held.wait(30)
        return original(data, lfs=lfs)

    hub.blob = slow
    try:
        running = started(command, hub, "maps", "push", store, ADDRESS)
        killed_when(running, lambda: sum(hub.sent.values()) > 6)
    finally:
        held.set()
    assert "manifest.json" not in hub.files("me/maps")
    push_store(store, DATASET)
    settled = {name: count for name, count in hub.sent.items() if count > 1}
    assert len(settled) <= 5  # what was in flight when the process was killed
    assert "manifest.json" in hub.files("me/maps")


@pytest.mark.parametrize(
    ("pattern", "status", "headers", "told"),
    [
        (r"create", 401, {}, "access is denied (401)"),
        (r"create", 403, {}, "access is forbidden (403); set HF_TOKEN to a token that may do this"),
        (r"/tree/", 429, {"Retry_After": "4000"}, "too many requests (429); wait 4000 s"),
        (r"/preupload/", 429, {"RateLimit": '"api";r=0;t=4000'}, "too many requests (429); wait 4000 s"),
        (r"/commit/", 403, {}, "access is forbidden (403)"),
        (r"/commit/", 429, {"Retry_After": "4000"}, "too many requests (429); wait 4000 s, then run again to resume"),
        (r"/commit/", 502, {}, "the server fails (502)"),
        (r"PUT /lfs/", 403, {}, "access is forbidden (403)"),
        (r"validate-yaml", 400, {}, "the request was refused (400"),
    ],
)
def test_a_push_that_is_refused_is_one_line(hub, store, cli, monkeypatch, pattern, status, headers, told):
    monkeypatch.setattr(hub_module, "RETRIES", 1)
    hub.refuse(pattern, status, body=json.dumps({"error": f"token {TOKEN} is bad"}).encode(), **headers)
    done = cli("maps", "push", store, ADDRESS)
    assert done.code == 1 and done.error.startswith(f"error: {ADDRESS}") and told in done.error
    assert TOKEN not in done.stderr
    hub.faults.clear()
    assert cli("maps", "push", store, ADDRESS).code == 0


def test_without_the_token_a_private_repository_is_unknown(hub, store, tmp_path, monkeypatch, cli):
    push_store(store, DATASET, PushConfig(private=True))
    monkeypatch.setenv("HF_TOKEN", "")
    done = cli("maps", "pull", ADDRESS, tmp_path / "back")
    assert done.code == 1 and "is private, or is gated; check the address, and log in with hf auth login" in done.error
    assert cli("maps", "push", store, ADDRESS).code == 1


def test_a_hub_that_is_dead_is_one_line(hub, store, tmp_path, cli, monkeypatch):
    monkeypatch.setattr(hub_module, "RETRIES", 1)
    hub.server.shutdown()
    hub.server.server_close()
    for arguments in (("pull", ADDRESS, tmp_path / "back"), ("push", store, ADDRESS)):
        done = cli("maps", *arguments)
        assert done.code == 1 and "can't be reached" in done.error and "check the network" in done.error
    assert not (tmp_path / "back").exists()
