"""Tars of other programs, as they are: patterns and lists of them, their index elsewhere, labels from any field."""

import dataclasses
import gzip
import http.server
import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from tiny import encode as encoded
from tiny import store as make_store
from tiny import write_shards, write_tar
from web_server import WebServer

import zpipe
from zpipe.pipeline.extract import ExtractConfig, extract_teacher_maps
from zpipe.pipeline.inspection import show_map
from zpipe.pipeline.make_shards import FolderSource, index_shards, make_shards
from zpipe.pipeline.shard_reader import open_shards, read_samples
from zpipe.pipeline.verify import verify_store
from zpipe.schemas.errors import UsageError, ZpipeError
from zpipe.schemas.sample import group_samples
from zpipe.schemas.shard_index import read_index, write_index
from zpipe.train.data.loader import RelevanceLoader
from zpipe.train.data.stream import list_shards, read_tar

SPLITS = {"train": 3, "validation": 2}
PNG = encoded(np.zeros((4, 4, 3), np.uint8))


def listed(path):
    return [(shard.path, shard.entry) for shard in list_shards(path)[0]]


OPENED = {"extraction": lambda path: open_shards(path)[0], "training": listed}


def names(pairs):
    return [entry.name for _, entry in pairs]


@pytest.fixture
def public(tmp_path, encode):
    """Tars of two splits in one folder; labels in `label`, in `alt_label` (two less, digits) and nested."""
    root, number = tmp_path / "public", 0
    for split, tars in SPLITS.items():
        for tar in range(tars):
            members = {}
            for _ in range(2):
                key, label = f"{split}_{number:03d}", 2 + number % 3
                members[f"{key}.cls"] = b"ant"  # which is no number
                members[f"{key}.jpg"] = encode("JPEG", 40, 30, seed=number)
                meta = {"label": label, "alt_label": str(label - 2), "annotation": {"class_id": label - 1}}
                members[f"{key}.json"] = json.dumps(meta).encode()
                number += 1
            write_tar(root / f"i1k-{split}-{tar:04d}.tar", members)
    return root


@pytest.mark.parametrize(
    "option",
    [
        *(["--no-check"], ["--no-shuffle"], ["--split", "val"], ["--shard-size", "10"], ["--keys", "path"]),
        *(["--images", "x"], ["--image-column", "x"], ["--label-column", "x"], ["--seed", "1"], ["--count", "1"]),
        *(["--image-size", "32"], ["--set", "pieces=[1,2]"]),
    ],
)
def test_options_that_an_index_has_no_use_for_are_refused(public, cli, option):
    done = cli("make-shards", "--index-only", public, *option)
    assert done.code == 2 and f"{option[0]} has no meaning with --index-only" in done.error
    assert not (public / "shards.json").exists()


TRAIN = ["i1k-train-0000.tar", "i1k-train-0001.tar", "i1k-train-0002.tar"]
VALIDATION = ["i1k-validation-0000.tar", "i1k-validation-0001.tar"]
PATTERNS = [("i1k-train-*.tar", TRAIN), ("i1k-validation-{0000..0001}.tar", VALIDATION), ("*-000{1,2}.tar", None)]


@pytest.mark.parametrize("by", OPENED)
@pytest.mark.parametrize(("pattern", "expected"), PATTERNS)
def test_each_split_is_used_by_its_pattern_before_and_after_indexing(public, by, pattern, expected):
    expected = expected or [TRAIN[1], TRAIN[2], VALIDATION[1]]
    if by == "training":  # extraction reads the labels of tars without an index, and these have none in .cls
        assert names(OPENED[by](public / pattern)) == expected
    index = index_shards(public, label_field="label")
    found = OPENED[by](public / pattern)
    assert [path for path, _ in found] == [public / name for name in expected]
    assert [entry for _, entry in found] == [entry for entry in index.shards if entry.name in expected]
    (public / "i1k-validation-0009.tar").write_bytes(b"new")
    if "*-000" not in pattern:
        assert names(OPENED[by](public / pattern)) == expected  # tars that are not selected do not matter
        with pytest.raises(ZpipeError, match="i1k-validation-0009.tar: not listed"):
            OPENED[by](public)


@pytest.mark.parametrize("indexed", [True, False])
@pytest.mark.parametrize("by", OPENED)
def test_a_tar_of_the_braces_that_is_not_there_is_named(public, by, indexed):
    if indexed:
        index_shards(public, label_field="label")
    with pytest.raises(ZpipeError, match="i1k-train-0003.tar: (no such file|not listed)"):
        OPENED[by](public / "i1k-train-{0000..0003}.tar")
    (public / TRAIN[1]).unlink()
    with pytest.raises(ZpipeError, match="i1k-train-0001.tar: no such file"):
        OPENED[by](public / "i1k-train-{0000..0002}.tar")


@pytest.fixture
def web(tmp_path):
    """The address of a web server on loopback that serves the test's folder."""
    handler = partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path))
    handler.log_message = lambda *args: None
    with WebServer(handler) as server:
        yield server.url


@pytest.mark.parametrize("place", ["local", "web"])
@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("", TRAIN + VALIDATION),
        (TRAIN[1], [TRAIN[1]]),
        ("i1k-train-{0000..0002}.tar", TRAIN),
        ("@", TRAIN + VALIDATION),
    ],
)
def test_an_index_elsewhere_stands_for_its_tars(public, tmp_path, place, source, expected, request):
    base = str(public) if place == "local" else f"{request.getfixturevalue('web')}/public"
    given = f"{base}/{source}"
    if source == "@":
        given = f"@{tmp_path / 'list.txt'}"
        lines = ["# both splits", "", f"{base}/{VALIDATION[1]}", f"{base}/i1k-train-{{0000..0002}}.tar  "]
        (tmp_path / "list.txt").write_text("\n".join([*lines, f"{base}/{VALIDATION[0]}", f"{base}/{TRAIN[0]}"]))
    out = tmp_path / "index"
    index = index_shards(given, out, label_field="alt_label")
    assert read_index(out) == index and index.label_field == "alt_label"
    assert {entry.folder for entry in index.shards} == {base}
    for opened in OPENED.values():
        found = opened(out)
        assert names(found) == expected and [str(path) for path, _ in found] == [f"{base}/{n}" for n in expected]
    shard = list_shards(out)[0][0]
    labels = [sample.label for sample in read_samples(shard.path, shard.entry, label_field="alt_label")]
    assert labels == [sample.label for sample in read_tar(shard)] and None not in labels
    assert json.loads((out / "shards.json").read_bytes())["version"] == 2
    made = {"shards.json", *(f"{entry.stem}.images.parquet" for entry in index.shards)}
    assert {path.name for path in out.iterdir()} == made and not list(public.glob("*.images.parquet"))
    assert not (public / "shards.json").exists()


def test_an_index_beside_the_tars_serves_patterns_on_a_web_server(public, web):
    index_shards(public, label_field="label")
    for opened in OPENED.values():
        assert names(opened(f"{web}/public/i1k-train-{{0000..0002}}.tar")) == TRAIN
        assert names(opened(f"{web}/public/{TRAIN[0]}")) == TRAIN[:1]
        with pytest.raises(ZpipeError, match="i1k-train-0003.tar: not listed"):
            opened(f"{web}/public/i1k-train-{{0000..0003}}.tar")
    (public / "shards.json").unlink()
    with pytest.raises(UsageError, match="run `zpipe make-shards --index-only .* OUTPUT` once"):
        list_shards(f"{web}/public/i1k-train-{{0000..0002}}.tar")
    with pytest.raises(UsageError, match="can't be written to; give a folder for the index: zpipe make-shards"):
        index_shards(f"{web}/public", label_field="label")


def test_labels_of_a_field_reach_maps_and_training(public, tmp_path, cli):
    """One field, whose labels are the teacher's classes, and the same labels on both sides; .cls is not consulted."""
    out = tmp_path / "index"
    done = cli("make-shards", "--index-only", public / "i1k-train-*.tar", out, "--label-field", "alt_label")
    assert done.code == 0 and "6 images in 3 shards indexed" in done.stdout
    maps = make_store(out, tmp_path / "maps", num_classes=3)
    opened = zpipe.open_maps(maps)
    assert opened.manifest.provenance.target == "ground-truth, labels of alt_label"
    table = opened.table().select(["key", "label", "target"]).to_pylist()
    assert [(row["key"], row["label"], row["target"]) for row in table] == [
        (f"train_{number:03d}", number % 3, number % 3) for number in range(6)
    ]
    loader = RelevanceLoader(out, maps, batch_size=2, image_size=32, augment="eval", num_workers=0)
    found = {key: label for batch in loader for key, label in zip(batch["key"], batch["label"].tolist(), strict=True)}
    assert found == {row["key"]: row["label"] for row in table}
    assert verify_store(maps, out) == []
    assert show_map(maps, "train_003", tmp_path / "map.png").is_file()
    assert show_map(maps, "train_003", tmp_path / "map.png", out).is_file()


def test_other_labels_of_the_same_tars_are_not_mixed_into_a_store(public, tmp_path):
    for field in ("alt_label", "annotation.class_id"):
        index_shards(public, tmp_path / field, label_field=field)
    maps = make_store(tmp_path / "alt_label", tmp_path / "maps")
    with pytest.raises(ZpipeError, match="made with target = .*labels of alt_label.*, this run has .*annotation.class"):
        make_store(tmp_path / "annotation.class_id", maps)
    other = zpipe.open_maps(make_store(tmp_path / "annotation.class_id", tmp_path / "other"))
    assert other.table()["label"].to_pylist() == [1 + number % 3 for number in range(10)]


@pytest.mark.parametrize(
    ("meta", "label"),
    [
        ('{"a": {"b": 7}}', 7),
        ('{"a": {"b": "12"}}', 12),
        ('{"a": {"b": "-1"}}', -1),
        ('{"a.b": 3, "a": {"b": 7}}', 3),
        ('{"label": 1}', "is absent"),
        ('{"a": 7}', "is absent"),
        ('{"a": {"b": null}}', "is absent"),
        ('{"a": {"b": 7.0}}', "holds 7.0, not a class index"),
        ('{"a": {"b": true}}', "holds True, not a class index"),
        ('{"a": {"b": "ant"}}', "holds 'ant', not a class index"),
        ('{"a": {"b": [7]}}', r"holds \[7\], not a class index"),
        ('{"a": {"b": "99999999999999999999"}}', "no class index, which has 32 bits"),
        (None, "has no .json, and labels are taken from its field a.b"),
    ],
)
def test_a_label_is_a_whole_number_of_its_field(meta, label):
    members = [("k.cls", b"5"), ("k.jpg", b"A"), *([("k.json", meta.encode())] if meta else [])]
    group = partial(group_samples, members, "x.tar", label_field="a.b")
    if isinstance(label, int):
        assert [sample.label for sample in group()] == [label]
        return
    with pytest.raises(ZpipeError, match=f"x.tar: key k: .*{label}; (rebuild this shard|where)") as error:
        list(group())
    (damaged,) = group(keep_damaged=True)
    assert damaged.damage == str(error.value) and damaged.label is None


def test_errors_are_one_line_that_says_how_to_go_on(public, tmp_path, cli, encode):
    def refused(*args, code=2):
        done = cli("make-shards", "--index-only", *args)
        assert done.code == code and len(done.stderr.splitlines()) == 1
        return done.error

    out = tmp_path / "out"
    assert "key train_000: its .cls holds b'ant'" in refused(public, code=1)
    assert "the label field no of its .json is absent; rebuild" in refused(public, "--label-field", "no", code=1)
    assert "--label-field a..b: write the name" in refused(public, "--label-field", "a..b")
    done = cli("make-shards", public, out, "--label-field", "label")
    assert done.code == 2 and "give --index-only too" in done.error
    told = refused(public / "i1k-train-*.tar", "--label-field", "label")
    assert f"does not name {public / VALIDATION[0]}" in told and "i1k-train-*.tar' OUTPUT" in told
    assert "i1k-train-0000.tar: no such" not in told and not (public / "shards.json").exists()
    assert "holds something else (i1k-train-0000.tar); give an empty or new" in refused(public, public)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / TRAIN[0]).write_bytes((public / TRAIN[0]).read_bytes())
    (tmp_path / "list").write_text(f"{public}\n{tmp_path / 'other'}\n")
    told = refused(f"@{tmp_path / 'list'}", out)
    assert str(public / TRAIN[0]) in told and str(tmp_path / "other" / TRAIN[0]) in told and "rename one" in told
    (tmp_path / "other" / TRAIN[0]).rename(tmp_path / "other" / "x.tar")
    assert "tars of several folders" in refused(f"@{tmp_path / 'list'}")
    (tmp_path / "list").write_text(f"\n{public / 'i1k-*.tar.gz'}\n")
    assert f"{tmp_path / 'list'}: line 2: " in refused(f"@{tmp_path / 'list'}", out)
    (tmp_path / "list").write_text("# nothing\n")
    assert "names no tar" in refused(f"@{tmp_path / 'list'}", out)
    assert "can't be read as a list of tars (No such file" in refused("@none", out)
    (tmp_path / "list").write_text(f"{public / 'gone.tar'}\n")
    assert "gone.tar: no such file; restore it, or correct" in refused(f"@{tmp_path / 'list'}", out, code=1)
    index_shards(public, out, label_field="label")
    assert "is there already" in refused(public, out) and "OUTPUT" in refused(public, out)
    assert "holds no tar, only an index" in refused(out, tmp_path / "second")


@pytest.mark.parametrize("kind", ["compressed under another name", "members apart", "listed by a suffix"])
def test_tars_that_can_not_be_shards_are_named_by_the_indexer(public, tmp_path, encode, kind):
    source = f"@{tmp_path / 'list'}"
    bad = public / "i1k-train-0000.tar"
    if kind == "compressed under another name":
        bad.write_bytes(gzip.compress(bad.read_bytes()))
        told = "i1k-train-0000.tar: is a gzip file, and shards are plain tars; unpack it .gunzip"
    elif kind == "members apart":
        image = encode("JPEG", 30, 20)
        write_tar(bad, [("p.jpg", image), ("q.jpg", image), ("p.json", b'{"label": 1}')])
        told = "i1k-train-0000.tar: key p: its members stand apart .*`tar --sort=name`"
        with pytest.raises(ZpipeError, match=told):
            index_shards(public)
        told = "i1k-train-0000.tar: key p: has no .json, .*apart from the image, unpack .*`tar --sort=name`"
    else:
        bad = bad.rename(public / "i1k-train-0000.tar.zst")
        told = "i1k-train-0000.tar.zst: not a .tar file; shards are plain tars: unpack it"
    (tmp_path / "list").write_text(f"{bad}\n{public / TRAIN[1]}\n")
    with pytest.raises(ZpipeError, match=told):
        index_shards(source, tmp_path / "out", label_field="label")
    assert not (tmp_path / "out" / "shards.json").exists()


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"folder": "relative"}, "the folder 'relative' is no absolute path or URL"),
        ({"folder": "/a\nb"}, r"the folder '/a\\nb' is no absolute path"),
        ({"folder": "https://me:secret@host/x"}, "carries credentials"),
        ({"folder": "github://a/b"}, "Unsupported filesystem"),
        ({"folder": 7}, "got `int`"),
        ({"name": "../x.tar", "folder": "/tmp"}, "is no file name of a tar"),
        ({"folder": "/no/such/folder"}, "/no/such/folder/i1k-train-0000.tar: no such file"),
        ({"bytes": 5}, "bytes, but shards.json says 5: truncated or altered"),
    ],
)
def test_folders_in_an_index_are_checked(public, tmp_path, change, told):
    index_shards(public, tmp_path / "out", label_field="label")
    path = tmp_path / "out" / "shards.json"
    content = json.loads(path.read_bytes())
    content["shards"][0] |= change
    path.write_text(json.dumps(content))
    for opened in OPENED.values():
        with pytest.raises(ZpipeError, match=told) as error:
            opened(tmp_path / "out")
        assert "secret" not in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("field", ["", ".", "a..b", 7, "x" * 300])
def test_a_label_field_in_an_index_is_checked(public, field):
    index_shards(public, label_field="label")
    path = Path(public / "shards.json")
    path.write_text(json.dumps(json.loads(path.read_bytes()) | {"label_field": field}))
    with pytest.raises(ZpipeError, match="shards.json: not readable as a shard index"):
        open_shards(public)


def test_an_index_without_the_new_fields_is_one_that_earlier_versions_read(public):
    write_tar(public / TRAIN[0], {"a.jpg": b"A", "a.cls": b"1"})
    for name in (*TRAIN[1:], *VALIDATION):
        (public / name).unlink()
    index_shards(public)
    content = json.loads((public / "shards.json").read_bytes())
    assert content["version"] == 1 and "label_field" not in content and "folder" not in content["shards"][0]


def test_a_pattern_is_resumed_and_verified_like_a_folder(public, tmp_path, teacher_settings):
    index_shards(public, label_field="label")
    config = ExtractConfig(**teacher_settings, executor="local")
    done = extract_teacher_maps(public / "i1k-train-*.tar", tmp_path / "maps", config)
    assert (done.count, done.shards, done.extracted) == (6, 3, 3)
    again = extract_teacher_maps(public / "i1k-train-{0000..0002}.tar", tmp_path / "maps", config)
    assert again.extracted == 0
    assert verify_store(tmp_path / "maps", public / "i1k-train-*.tar") == []
    assert show_map(tmp_path / "maps", "train_002", tmp_path / "map.png").is_file()  # by the source it records
    state = RelevanceLoader(public / "i1k-train-*.tar", tmp_path / "maps", batch_size=2, image_size=32).state_dict()
    same = RelevanceLoader(public / "i1k-train-000[012].tar", tmp_path / "maps", batch_size=2, image_size=32)
    same.load_state_dict(state)
    other = RelevanceLoader(public / "i1k-train-000[01].tar", tmp_path / "maps", batch_size=2, image_size=32)
    with pytest.raises(UsageError, match="the state was taken over other shards"):
        other.load_state_dict(state)


def test_an_index_elsewhere_keeps_the_classes_and_can_be_made_again_after_a_failure(tmp_path):
    tars = write_shards(tmp_path / "tars", [{"a.png": PNG, "a.cls": b"0"}, {"b.png": PNG, "b.cls": b"1"}])
    write_index(tars, dataclasses.replace(read_index(tars), classes=("ant", "bee")))
    broken = (tars / "shard-00001.tar").read_bytes()
    (tars / "shard-00001.tar").write_bytes(broken[:700])
    with pytest.raises(ZpipeError):
        index_shards(tars, tmp_path / "out")
    (tars / "shard-00001.tar").write_bytes(broken)
    assert index_shards(tars, tmp_path / "out").classes == ("ant", "bee")
    assert len(list((tmp_path / "out").glob("*.images.parquet"))) == 2
    write_tar(tars / "shard-00001.tar", {"c.png": PNG, "c.cls": b"1"})
    with pytest.raises(ZpipeError, match=r"shard-00001.tar: its SHA-256 is .*: altered"):
        index_shards(f"{tars}/shard-0000?.tar", tmp_path / "other")


def test_digests_that_were_added_to_shards_stay_when_make_shards_runs_again(photos, tmp_path):
    source = FolderSource(photos, shard_size=5, shuffle_seed=0, key_rule="stem")
    make_shards(source, tmp_path / "out")
    progress = tmp_path / "out" / "make-shards.jsonl"
    lines = [json.loads(line) for line in progress.read_text().splitlines()]
    for line in lines[1:]:
        del line["entry"]["images_sha256"]  # as earlier versions wrote it
    progress.write_text("".join(json.dumps(line) + "\n" for line in lines))
    index = read_index(tmp_path / "out")
    bare = tuple(dataclasses.replace(entry, images_sha256="") for entry in index.shards)
    write_index(tmp_path / "out", dataclasses.replace(index, shards=bare))
    for path in (tmp_path / "out").glob("*.images.parquet"):
        path.unlink()
    index_shards(tmp_path / "out")
    assert read_index(tmp_path / "out") == index
    assert make_shards(source, tmp_path / "out").written == 0
    assert read_index(tmp_path / "out") == index
