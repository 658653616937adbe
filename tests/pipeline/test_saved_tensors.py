"""What else an extraction stores in its pass: class maps, logits, features; digests for earlier stores."""

import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from tiny import TEACHER, encode, scenes, write_tar

import zpipe
from zpipe.pipeline import add_digests as adding
from zpipe.pipeline import extract as extraction
from zpipe.pipeline.add_digests import add_digests
from zpipe.pipeline.explainer import ExplainConfig
from zpipe.pipeline.extract import ExtractConfig, extract_teacher_maps
from zpipe.pipeline.inspection import store_statistics
from zpipe.pipeline.make_shards import index_shards
from zpipe.pipeline.save_tensors import save_tensors
from zpipe.pipeline.shard_reader import framed_batches, open_shards, read_samples
from zpipe.pipeline.teacher import load_teacher
from zpipe.pipeline.verify import verify_store
from zpipe.pipeline.worker import frame_of
from zpipe.schemas.errors import UsageError, ZpipeError
from zpipe.schemas.manifest import read_manifest, write_manifest
from zpipe.schemas.relevance_store import index_path
from zpipe.schemas.shard_index import digest_file


def settings(target="ground-truth", **changes):
    return ExtractConfig(
        teacher="deit_tiny_patch16_224",
        weights="random",
        num_classes=10,
        teacher_args=TEACHER,
        executor="local",
        threads=1,
        explain=ExplainConfig(target=target),
        **changes,
    )


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return scenes(tmp_path_factory.mktemp("saved") / "shards", 12, shard_size=5)


@pytest.fixture(scope="module")
def saved(shards, tmp_path_factory):
    out = tmp_path_factory.mktemp("saved") / "store"
    extract_teacher_maps(shards, out, settings("top:3", save=("logits", "features")))
    return out


@pytest.fixture(scope="module")
def answers(shards):
    """Logits and patch tokens of the teacher by timm's own forward pass, by key."""
    teacher = load_teacher(settings().teacher_spec())
    model = teacher.model.model.eval()
    mean, std = (torch.tensor(value).view(1, 3, 1, 1) for value in (teacher.mean, teacher.std))
    found = {}
    for path, entry in open_shards(shards)[0]:
        for batch in framed_batches(read_samples(path, entry), frame_of(teacher, "full"), batch_size=4, threads=1):
            pixels = torch.from_numpy(np.stack([item.pixels for item in batch])).permute(0, 3, 1, 2) / 255.0
            with torch.no_grad():
                tokens = model.forward_features((pixels - mean) / std)
                logits = model.forward_head(tokens)
            for item, token, logit in zip(batch, tokens, logits, strict=True):
                found[item.key] = logit.numpy(), token[1:].unflatten(0, teacher.grid).numpy()
    return found


def test_logits_and_features_are_those_of_the_teacher(saved, answers):
    logits, features = zpipe.open_maps(saved / "logits"), zpipe.open_maps(saved / "features")
    assert len(logits) == len(features) == len(answers) == 12
    for key, (logit, feature) in answers.items():
        np.testing.assert_allclose(logits[key], logit, atol=2e-3 * np.abs(logit).max())
        np.testing.assert_allclose(features[key], feature, atol=2e-3 * np.abs(feature).max())


def test_the_class_maps_are_those_of_the_best_classes_one_by_one(saved, shards, answers, tmp_path):
    maps = zpipe.open_maps(saved)
    table = maps.table(["key", "target", "targets", "predicted"])
    best = {key: np.argsort(-logit)[:3].tolist() for key, (logit, _) in answers.items()}
    assert {row["key"]: row["targets"] for row in table.to_pylist()} == best
    assert table["target"].to_pylist() == table["predicted"].to_pylist() == [best[key][0] for key in maps]
    some = {number for classes in best.values() for number in classes[:2]}
    for number in sorted(some)[:2]:
        extract_teacher_maps(shards, tmp_path / str(number), settings(f"class:{number}"))
        alone = zpipe.open_maps(tmp_path / str(number))
        for key, classes in best.items():
            if number in classes:
                found = maps[key][classes.index(number)]
                np.testing.assert_allclose(found, alone[key], atol=2e-3 * np.abs(maps[key]).max())


def test_all_stores_of_a_pass_are_whole(saved, shards):
    assert [verify_store(root, shards) for root in (saved, saved / "logits", saved / "features")] == [[]] * 3
    origin = zpipe.open_maps(saved / "features").manifest.provenance
    assert (origin.kind, origin.shape, origin.method) == ("features", (4, 4, 24), "features")


def test_what_is_saved_may_be_asked_for_later_and_only_what_is_missing_is_written(shards, saved, tmp_path, contents):
    first = extract_teacher_maps(shards, tmp_path / "store", settings("top:3"))
    maps = contents(tmp_path / "store")
    second = extract_teacher_maps(shards, tmp_path / "store", settings("top:3", save=("logits",)))
    assert (first.extracted, second.extracted) == (3, 3)
    later = contents(tmp_path / "store")
    assert {name: later[name] for name in maps} == maps
    assert extract_teacher_maps(shards, tmp_path / "store", settings("top:3", save=("logits",))).extracted == 0
    index_path(tmp_path / "store" / "logits", "shard-00001").unlink()
    (tmp_path / "store" / "logits" / "manifest.json").unlink()
    assert extract_teacher_maps(shards, tmp_path / "store", settings("top:3", save=("logits",))).extracted == 1
    assert contents(tmp_path / "store") == later
    np.testing.assert_array_equal(
        zpipe.open_maps(tmp_path / "store" / "logits").array(), zpipe.open_maps(saved / "logits").array()
    )


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"target": "top:0"}, "--target top:0: K is at least 1; choose another target"),
        ({"target": "top:x"}, "choose ground-truth, predicted, class:K or top:K"),
        ({"target": "top:11"}, "has 10 classes"),
        ({"save": ("logit",)}, "--save"),
    ],
)
def test_wrong_requests_are_refused_before_any_work(shards, tmp_path, changes, told):
    with pytest.raises(UsageError, match=told):
        extract_teacher_maps(shards, tmp_path / "store", settings(**changes))
    with pytest.raises(UsageError, match="rollout gives the same map for every class"):
        ExplainConfig(method="rollout", target="top:2")


def test_an_interrupted_save_is_resumed_and_wrong_arrays_are_named(shards, tmp_path):
    calls = []

    def mask(sample):
        calls.append(sample.key)
        if len(calls) == 8:
            raise KeyboardInterrupt
        return np.full((2, 3), sample.label)

    with pytest.raises(KeyboardInterrupt):
        save_tensors(shards, tmp_path / "mask", mask, name="mask", kind="label-map", shape=(2, 3))
    with pytest.raises(ZpipeError, match="is not finished"):
        zpipe.open_maps(tmp_path / "mask")
    assert save_tensors(shards, tmp_path / "mask", mask, name="mask", kind="label-map", shape=(2, 3)) == 12
    assert len(calls) == 8 + 7  # the first tar of five was whole
    maps = zpipe.open_maps(tmp_path / "mask")
    table = maps.table(["key", "label"]).to_pylist()
    assert (
        all((maps[row["key"]] == row["label"]).all() for row in table) and verify_store(tmp_path / "mask", shards) == []
    )
    with pytest.raises(ZpipeError, match=r"key .*: an array of shape \(2, 3\), not \(3, 2\)"):
        save_tensors(shards, tmp_path / "other", mask, name="mask", kind="map", shape=(3, 2))
    with pytest.raises(ZpipeError, match="a label map holds whole numbers"):
        save_tensors(
            shards, tmp_path / "half", lambda _: np.full((1, 1), 0.5), name="m", kind="label-map", shape=(1, 1)
        )
    with pytest.raises(UsageError, match="shape .* has 1 axes, not 2; axes of map: h, w"):
        save_tensors(shards, tmp_path / "flat", mask, name="mask", kind="map", shape=(3,))
    with pytest.raises(ZpipeError, match="made with method = "):
        save_tensors(shards, tmp_path / "mask", mask, name="parts", kind="label-map", shape=(2, 3))


# ------------------------------------------------------------------------------------------------------------ digests


@pytest.fixture
def earlier(shards, tmp_path):
    """A store as earlier versions wrote it, without digests, and the names of the teacher's classes."""
    root = tmp_path / "earlier"
    extract_teacher_maps(shards, root, settings())
    manifest = read_manifest(root)
    entries = []
    for shard in manifest.shards:
        path = index_path(root, shard.stem)
        table = pq.read_table(path)
        pq.write_table(table.drop_columns("image_digest"), path, compression="zstd")
        entries.append(changed(shard, index_sha256=digest_file(path)))
    names = tuple(f"digit {number}" for number in range(10))
    write_manifest(root, changed(manifest, shards=tuple(entries), classes=names))
    return root


def changed(value, **changes):
    return type(value)(**{**vars(value), **changes})


def test_a_store_without_digests_says_how_to_add_them_and_gets_them(earlier, shards, cli):
    before = zpipe.open_maps(earlier).array()
    with pytest.raises(UsageError, match="add them: zpipe maps digest STORE SHARDS"):
        bytes(16) in zpipe.open_maps(earlier)  # noqa: B015
    assert cli("maps", "digest", earlier, shards).code == 0
    maps = zpipe.open_maps(earlier)
    np.testing.assert_array_equal(maps.array(), before)
    assert verify_store(earlier, shards) == [] and maps.manifest.classes[9] == "digit 9"
    for path, entry in open_shards(shards)[0]:
        for sample in read_samples(path, entry):
            np.testing.assert_array_equal(maps[zpipe.image_digest(sample.image)], maps[sample.key])
    assert "has digests already" in cli("maps", "digest", earlier, shards).stdout


def test_adding_digests_survives_an_interruption(earlier, shards, monkeypatch):
    add, done = adding._add, []

    def interrupted(*args):
        if done:
            raise KeyboardInterrupt
        done.append(1)
        return add(*args)

    monkeypatch.setattr(adding, "_add", interrupted)
    with pytest.raises(KeyboardInterrupt):
        add_digests(earlier, shards)
    with pytest.raises(ZpipeError, match="is not finished"):
        zpipe.open_maps(earlier)
    monkeypatch.undo()
    assert add_digests(earlier, shards) == 2
    assert verify_store(earlier, shards) == [] and read_manifest(earlier).classes[0] == "digit 0"
    assert sorted(path.name for path in earlier.iterdir()) == ["extraction.json", "index", "manifest.json", "maps"]


def test_digests_are_added_from_the_tars_of_the_store_only(earlier, shards, tmp_path):
    other = scenes(tmp_path / "other", 12, shard_size=5, seed=9)
    with pytest.raises(ZpipeError, match="made from a tar with SHA-256"):
        add_digests(earlier, other)
    assert read_manifest(earlier).count == 12  # untouched
    with pytest.raises(ZpipeError, match="not a relevance store"):
        add_digests(tmp_path, shards)


def test_a_store_that_mixes_shards_with_and_without_digests_is_read(earlier, shards):
    shutil.rmtree(earlier / "maps" / "shard-00002.zarr")
    index_path(earlier, "shard-00002").unlink()
    (earlier / "manifest.json").unlink()
    assert extract_teacher_maps(shards, earlier, settings()).extracted == 1
    table = zpipe.open_maps(earlier).table()
    assert len(table) == 12 and "image_digest" not in table.column_names and isinstance(table, pa.Table)
    assert add_digests(earlier, shards) == 2
    assert "image_digest" in zpipe.open_maps(earlier).table().column_names


# ------------------------------------------------------------------------------------- interruptions and replacements


def fail_at(monkeypatch, name, number):
    """Make a function of the extraction raise KeyboardInterrupt at its n-th call."""
    real, calls = getattr(extraction, name), []

    def counted(*args, **kwargs):
        calls.append(1)
        if len(calls) == number:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(extraction, name, counted)


BOTH = ("logits", "features")


@pytest.mark.parametrize(
    ("name", "number"), [("prepare", 1), ("prepare", 2), ("prepare", 3), ("audit", 2), ("commit_manifest", 2)]
)
def test_an_extraction_of_several_stores_is_resumed_wherever_it_was_interrupted(
    shards, saved, tmp_path, monkeypatch, contents, name, number
):
    out = tmp_path / "store"
    with monkeypatch.context() as patch:
        fail_at(patch, name, number)
        with pytest.raises(KeyboardInterrupt):
            extract_teacher_maps(shards, out, settings("top:3", save=BOTH))
    report = extract_teacher_maps(shards, out, settings("top:3", save=BOTH))
    assert report.extracted == (3 if name == "prepare" else 0)
    assert contents(out) == contents(saved)


def test_a_refused_extraction_leaves_no_store_behind(shards, tmp_path):
    extract_teacher_maps(shards, tmp_path / "store", settings())
    with pytest.raises(ZpipeError, match="made with target"):
        extract_teacher_maps(shards, tmp_path / "store", settings("predicted", save=BOTH))
    assert sorted(path.name for path in (tmp_path / "store").iterdir() if path.is_dir()) == ["index", "maps"]


def test_a_replacement_takes_all_stores_of_the_folder_and_keeps_what_it_finished(shards, saved, tmp_path, monkeypatch):
    out = shutil.copytree(saved, tmp_path / "store")
    extract_teacher_maps(shards, out, settings("predicted", replace=True))
    assert not list(out.glob("*/manifest.json")) and verify_store(out, shards) == []
    with monkeypatch.context() as patch:
        fail_at(patch, "commit_manifest", 2)  # that of the logits is written
        with pytest.raises(KeyboardInterrupt):
            extract_teacher_maps(shards, out, settings("top:2", replace=True, save=BOTH))
    assert extract_teacher_maps(shards, out, settings("top:2", replace=True, save=BOTH)).extracted == 0
    assert [verify_store(root, shards) for root in (out, out / "logits", out / "features")] == [[]] * 3


def test_the_size_of_a_store_is_its_own_and_logits_have_no_top1(shards, saved, tmp_path):
    extract_teacher_maps(shards, tmp_path / "alone", settings("top:3"))
    alone, both = store_statistics(tmp_path / "alone"), store_statistics(saved)
    assert alone.size_bytes == both.size_bytes and both.teacher_top1 == alone.teacher_top1 is not None
    assert store_statistics(saved / "logits").teacher_top1 is None


# ------------------------------------------------------------------------------------------- what verification notices


def test_empty_masks_are_whole_and_wrong_target_classes_are_damage(shards, saved, tmp_path):
    save_tensors(shards, tmp_path / "empty", lambda _: np.zeros((2, 2)), name="mask", kind="map", shape=(2, 2))
    assert verify_store(tmp_path / "empty", shards) == []
    for wrong in ([[99, -7, 5]], [[1, 2]], None):
        out = shutil.copytree(saved, tmp_path / f"wrong {wrong}")
        manifest = read_manifest(out)
        path = index_path(out, "shard-00000")
        table = pq.read_table(path)
        place, kept = table.schema.get_field_index("targets"), table["targets"].to_pylist()
        if wrong:
            column = pa.array(wrong * len(table), table.schema.field(place).type)
        else:  # the right classes in another order
            column = pa.array([row[::-1] for row in kept], table.schema.field(place).type)
        pq.write_table(table.set_column(place, table.schema.field(place), column), path)
        first = changed(manifest.shards[0], index_sha256=digest_file(path))
        write_manifest(out, changed(manifest, shards=(first, *manifest.shards[1:])))
        assert any("are not classes of its maps" in problem for problem in verify_store(out, shards))


@pytest.mark.parametrize("shape", [(0,), (2**40,), (5000, 1), (1, -1)])
def test_shapes_that_no_store_holds_are_refused(shards, tmp_path, shape):
    kind = "vector" if len(shape) == 1 else "map"
    with pytest.raises(UsageError, match="axes of"):
        save_tensors(shards, tmp_path / "x", lambda _: np.zeros(shape), name="x", kind=kind, shape=shape)
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("value", [2**40, np.nan, np.inf, -(2**31) - 1])
def test_label_maps_hold_whole_numbers_of_32_bits(shards, tmp_path, value):
    with pytest.raises(ZpipeError, match=r"shard-00000.tar: key .*: a label map holds whole numbers of 32 bits"):
        save_tensors(shards, tmp_path / "x", lambda _: np.full((1, 1), value), name="x", kind="label-map", shape=(1, 1))


def test_values_beyond_float32_are_not_finite(shards, tmp_path):
    save_tensors(shards, tmp_path / "x", lambda _: np.full(3, 1e300), name="x", kind="vector", shape=(np.int64(3),))
    assert zpipe.open_maps(tmp_path / "x").manifest.statuses == {"nonfinite": 12}


def test_a_manifest_of_empty_shards_is_refused(saved, tmp_path):
    out = shutil.copytree(saved, tmp_path / "store")
    manifest = read_manifest(out)
    write_manifest(out, changed(manifest, shards=(changed(manifest.shards[0], count=0), *manifest.shards[1:])))
    with pytest.raises(ZpipeError, match="has no samples"):
        zpipe.open_maps(out)


def test_a_store_with_a_lost_index_gets_no_digests_and_keeps_its_manifest(earlier, shards):
    index_path(earlier, "shard-00001").unlink()
    with pytest.raises(ZpipeError, match="shard shard-00001 is not finished; run the command that made the store"):
        add_digests(earlier, shards)
    assert read_manifest(earlier).classes[0] == "digit 0"
    with pytest.raises(ZpipeError, match=r"has maps of shard-00000.tar, which is not in .*; give all tars"):
        add_digests(earlier, shards / "shard-00002.tar")
    assert read_manifest(earlier).count == 12


def test_digests_are_added_where_labels_are_in_another_field(tmp_path):
    image = encode(np.full((8, 8, 3), 9, np.uint8))
    write_tar(tmp_path / "tars" / "a.tar", {"k.png": image, "k.json": b'{"label": "cat", "id": 3}'})
    index_shards(tmp_path / "tars", label_field="id")
    extract_teacher_maps(tmp_path / "tars", tmp_path / "store", settings())
    path, manifest = index_path(tmp_path / "store", "a"), read_manifest(tmp_path / "store")
    pq.write_table(pq.read_table(path).drop_columns("image_digest"), path)
    shard = changed(manifest.shards[0], index_sha256=digest_file(path))
    write_manifest(tmp_path / "store", changed(manifest, shards=(shard,)))
    assert add_digests(tmp_path / "store", tmp_path / "tars") == 1
    assert zpipe.image_digest(image) in zpipe.open_maps(tmp_path / "store")
