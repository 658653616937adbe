"""What else an extraction stores in its pass: class maps, logits, features; digests for earlier stores."""

import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from tiny import TEACHER, scenes

import zpipe
from zpipe.pipeline import add_digests as adding
from zpipe.pipeline.add_digests import add_digests
from zpipe.pipeline.explainer import ExplainConfig
from zpipe.pipeline.extract import ExtractConfig, extract_teacher_maps
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
    model = teacher.model.eval()
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
        ({"target": "top:0"}, "--target top:0: transformer-attribution has no map"),
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
