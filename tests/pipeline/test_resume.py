"""What an extraction makes of a store whose files were lost, damaged or replaced by links since."""

import json
import os
import shutil

import pytest
from tiny import rewrite_store

from zpipe.pipeline import store_plan
from zpipe.pipeline.inspection import show_map
from zpipe.pipeline.shard_reader import open_shards
from zpipe.pipeline.verify import verify_store
from zpipe.schemas import relevance_store as rs
from zpipe.schemas.errors import UsageError, ZpipeError
from zpipe.schemas.manifest import read_manifest
from zpipe.schemas.progress import silent
from zpipe.schemas.relevance_maps import RelevanceMaps

STEM = "shard-00001"


def zero(path):
    path.write_bytes(bytes(path.stat().st_size))


def chunk(root):
    return rs.maps_path(root, STEM) / "c" / "0" / "0" / "0"


def other_maps(root):
    """Maps that decode, of a digest that the index doesn't name."""
    shutil.copytree(rs.maps_path(root, "shard-00000"), rs.maps_path(root, STEM), dirs_exist_ok=True)


def fifo(path):
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda root: zero(chunk(root)), "shard-00001.zarr: maps can't be read"),
        (lambda root: chunk(root).unlink(), "shard-00001.zarr: maps can't be read (a chunk is missing); made again"),
        (lambda root: fifo(chunk(root)), "maps can't be read (is a FIFO, not a regular file); made again"),
        (other_maps, "shard-00001.zarr: its maps are not those that were written; made again"),
        (lambda root: zero(rs.index_path(root, STEM)), "shard-00001.parquet: map index can't be read"),
        (lambda root: fifo(rs.index_path(root, STEM)), "shard-00001.parquet: map index can't be read"),
        (lambda root: zero(rs.maps_path(root, STEM) / "zarr.json"), "zarr.json describes no array"),
    ],
    ids=["chunk zeroed", "chunk lost", "chunk a FIFO", "other maps", "index zeroed", "index a FIFO", "zarr.json"],
)
def test_without_a_manifest_damaged_shards_are_made_again(store, store_copy, shards, extract, contents, damage, told):
    damage(store_copy)
    (store_copy / "manifest.json").unlink()
    report = extract(shards, store_copy)
    assert report.extracted == 1 and len(report.notes) == 1 and told in report.notes[0], report.notes
    assert contents(store_copy) == contents(store)


def test_a_disk_that_fails_is_no_reason_to_make_shards_again(store_copy, shards, extract, monkeypatch, contents):
    (store_copy / "manifest.json").unlink()
    before = contents(store_copy)

    def fail(path, most):
        raise OSError(5, "Input/output error", str(path))

    monkeypatch.setattr(rs, "read_file", fail)
    with pytest.raises(ZpipeError, match="can't be read .Input/output error.; check the disk or mount"):
        extract(shards, store_copy)
    assert contents(store_copy) == before


def test_a_lost_extraction_record_is_written_anew(store, store_copy, shards, extract, contents):
    (store_copy / "extraction.json").unlink()
    report = extract(shards, store_copy)
    assert report.extracted == 0 and "extraction.json: was lost; written anew from manifest.json" in report.notes[0]
    assert contents(store_copy) == contents(store)
    (store_copy / "extraction.json").unlink()
    with pytest.raises(ZpipeError, match="--replace to start over"):
        extract(shards, store_copy, seed=1)


def test_a_foreign_manifest_makes_no_store(tmp_path, shards, extract, contents):
    (tmp_path / "manifest.json").write_text('{"name": "a web page"}')
    (tmp_path / ".tmp-theirs").touch()
    before = contents(tmp_path)
    with pytest.raises(UsageError, match="holds something else"):
        extract(shards, tmp_path)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("name", ["maps", "index"])
@pytest.mark.parametrize("replace", [False, True])
def test_no_link_leads_out_of_a_store(store_copy, shards, extract, tmp_path, contents, name, replace):
    outside = tmp_path / "outside"
    (store_copy / name).rename(outside)
    (outside / ".tmp-theirs").touch()
    (store_copy / name).symlink_to(outside)
    before = contents(tmp_path)
    with pytest.raises(UsageError, match=f"store/{name}: is a link, and the relevance store would be written to anoth"):
        extract(shards, store_copy, seed=int(replace), replace=replace)
    assert contents(tmp_path) == before


def test_links_of_single_files_are_replaced_and_not_followed(store, store_copy, shards, extract, tmp_path, contents):
    outside = tmp_path / "outside"
    (outside / "array").mkdir(parents=True)
    (outside / "file").write_text("theirs")
    before = contents(outside)
    for path in (rs.maps_path(store_copy, STEM), store_copy / "maps" / ".tmp-1"):
        if path.exists():
            shutil.rmtree(path)
        path.symlink_to(outside / "array")
    rs.index_path(store_copy, STEM).unlink()
    rs.index_path(store_copy, STEM).symlink_to(outside / "file")
    (store_copy / "manifest.json").unlink()
    (store_copy / "manifest.json").symlink_to(outside / "nowhere")
    assert extract(shards, store_copy).extracted == 1
    assert contents(store_copy) == contents(store) and contents(outside) == before
    assert not [path for path in store_copy.rglob("*") if path.is_symlink()]


def test_a_store_may_itself_be_a_link(store, store_copy, shards, extract, tmp_path):
    (tmp_path / "link").symlink_to(store_copy)
    assert extract(shards, tmp_path / "link").extracted == 0


@pytest.mark.parametrize("content", [{}, {"replacement": 7}, {"replacement": "x"}, {"replacement": ["a" * 64]}])
def test_a_mark_of_a_replacement_that_is_none_is_one_line(store_copy, shards, extract, content):
    (store_copy / "manifest.json").unlink()
    header = {"format": "zpipe-relevance-store", "version": 1}
    (store_copy / store_plan.REPLACING_NAME).write_text(json.dumps(header | content))
    with pytest.raises(ZpipeError, match="replacing.json: not readable as the mark of .*; delete it"):
        extract(shards, store_copy, replace=True)


def test_a_manifest_that_is_none_is_deleted_and_the_shards_kept(store, store_copy, shards, extract, contents):
    (store_copy / "manifest.json").write_text("{")
    with pytest.raises(ZpipeError, match="manifest.json: .*; delete it and extract again; finished shards are kept"):
        extract(shards, store_copy)
    (store_copy / "manifest.json").unlink()
    assert extract(shards, store_copy).extracted == 0 and contents(store_copy) == contents(store)


def test_classes_that_became_known_are_written_into_the_manifest(store_copy, shards):
    def finish(classes):
        wanted = store_plan.WantedStore(
            root=store_copy,
            source=shards,
            tars=open_shards(shards)[0],
            provenance=read_manifest(store_copy).provenance,
            classes=classes,
        )
        audited = store_plan.audit(wanted, store_plan.prepare(wanted, replace=False, progress=silent), silent)
        store_plan.commit_manifest(wanted, audited)
        return audited.is_written, read_manifest(store_copy).classes

    fingerprint = read_manifest(store_copy).provenance.fingerprint()
    assert finish(()) == (True, ())
    assert finish(("ant", "bee")) == (False, ("ant", "bee"))
    assert finish(()) == (True, ("ant", "bee"))  # not known in this run
    assert read_manifest(store_copy).provenance.fingerprint() == fingerprint


def test_a_picture_replaces_no_file_of_the_user(store, shards, tmp_path, cli):
    key = next(iter(RelevanceMaps(store)))
    photo, code = tmp_path / "photo.png", tmp_path / "api.py"
    for path in (photo, code):
        path.write_text("theirs")
        done = cli("maps", "show", store, key, "--shards", shards, "--out", path)
        assert done.code == 2 and path.read_text() == "theirs"
    for _ in range(2):
        assert show_map(store, key, tmp_path / "a.png", shards) == tmp_path / "a.png"
    assert b"zpipe" in (tmp_path / "a.png").read_bytes()[:4096]


def test_maps_of_zeros_make_a_store(store_copy, shards, tmp_path):
    """An earlier version wrote no chunk for them."""
    maps = RelevanceMaps(store_copy)
    zeros = {key: maps[key] * 0 for key in maps}
    rewrite_store(store_copy, zeros, dict.fromkeys(zeros, "zero"))
    assert not RelevanceMaps(store_copy).array().any()
    for path in store_copy.glob("maps/*/c/0/0/0"):
        path.unlink()
    assert not RelevanceMaps(store_copy).array().any()
    problems = verify_store(store_copy)
    assert len(problems) == 1 and "says 18 ok, the indexes 18 zero" in problems[0]
