"""Stores that are joined with images of other tars, and several stores of any kind under one crop."""

import dataclasses
import shutil
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from ramps import KEYS, load
from tiny import TEACHER, encode, rewrite_store, scenes, store, write_shards

import zpipe
from zpipe.pipeline.export import export_numpy, export_parquet
from zpipe.pipeline.extract import ExtractConfig, extract_teacher_maps
from zpipe.pipeline.make_shards import index_shards
from zpipe.pipeline.save_tensors import save_tensors
from zpipe.pipeline.shard_reader import open_shards, read_samples
from zpipe.schemas.errors import UsageError, ZpipeError
from zpipe.schemas.geometry import Box
from zpipe.schemas.image_join import DigestRows, digest_column
from zpipe.schemas.relevance_maps import same_map
from zpipe.schemas.shard_images import digest_images, images_path, write_images
from zpipe.schemas.shard_index import read_index, write_index
from zpipe.train.data import map_stores
from zpipe.train.data.loader import RelevanceLoader
from zpipe.train.data.transforms import View, ViewConfig, view_maps

GRID = 4


def samples_of(shards):
    return [sample for path, entry in open_shards(shards)[0] for sample in read_samples(path, entry)]


@pytest.fixture(scope="module")
def packed(data, tmp_path_factory):
    """The images of `data` as another packaging has them: other tars, other keys, another order."""
    samples = samples_of(data[0])
    order = np.random.default_rng(3).permutation(len(samples)).tolist()
    tars = []
    for start in range(0, len(order), 5):
        members = {}
        for number, place in enumerate(order[start : start + 5], start):
            members[f"{number:08d}.png"] = samples[place].image
            members[f"{number:08d}.cls"] = str(samples[place].label).encode()
        tars.append(members)
    return write_shards(tmp_path_factory.mktemp("packed") / "shards", tars)


@pytest.mark.parametrize("workers", [0, 2])
def test_maps_of_one_packaging_train_on_another(data, packed, workers):
    by_tar = {}
    for batch in load(data, augment="eval", batch_size=5):
        for row, label in enumerate(batch["label"].tolist()):
            by_tar[label] = {name: batch[name][row] for name in ("image", "relevance", "box", "flipped")}
    seen = 0
    for batch in load((packed, data[1]), augment="eval", batch_size=5, num_workers=workers, join="image"):
        for row, label in enumerate(batch["label"].tolist()):
            for name, expected in by_tar[label].items():
                assert torch.equal(batch[name][row], expected), name
            seen += 1
    assert seen == len(KEYS)


@pytest.mark.parametrize("workers", [0, 2])
def test_joining_by_image_changes_no_batch_of_the_packaging_itself(data, workers):
    for augment in ("train", "eval"):
        options = {"augment": augment, "num_workers": workers, "seed": 2}
        for one, other in zip(load(data, **options), load(data, join="image", **options), strict=True):
            assert one["key"] == other["key"]
            assert one.keys() == other.keys()
            for name in one.keys() - {"key"}:
                parts = [each if isinstance(each, list) else [each] for each in (one[name], other[name])]
                assert all(torch.equal(a, b) for a, b in zip(*parts, strict=True)), name


def test_another_packaging_is_refused_when_joined_by_tar_and_the_remedy_is_told(data, packed):
    with pytest.raises(ZpipeError, match="--join image"):
        RelevanceLoader(packed, data[1], batch_size=2)
    with pytest.raises(UsageError, match="choose tar or image"):
        RelevanceLoader(packed, data[1], batch_size=2, join="key")


@pytest.fixture(scope="module")
def half(data, tmp_path_factory):
    """A store of the first tars only."""
    folder = tmp_path_factory.mktemp("half")
    (folder / "shards").mkdir()
    for name in ("shard-00000.tar", "shard-00001.tar"):
        shutil.copy(data[0] / name, folder / "shards")
    return store(folder / "shards", folder / "maps", num_classes=len(KEYS))


def test_coverage_is_reported_and_images_without_a_map_are_an_error_skipped_or_uniform(half, packed):
    with pytest.raises(
        ZpipeError, match=r"14 of 24 images of .* have no map, shard-\d+.tar: key \d+ the first"
    ) as error:
        RelevanceLoader(packed, half, batch_size=2, join="image")
    assert "--missing skip" in str(error.value)
    loader = RelevanceLoader(packed, half, batch_size=2, image_size=8, augment="eval", join="image", missing="skip")
    said = []
    loader.report_coverage(lambda stage, done, total, **facts: said.append((stage, done, total)))
    assert said == [("images with a map", 10, 24)] and loader.coverage == [f"{half}: 10 of 24 images have a map"]
    assert sorted(label for batch in loader for label in batch["label"].tolist()) == list(range(10))
    assert loader.epoch_counts() == {"served": 10, "dropped": 0, "skipped": 14}
    uniform = load((packed, half), image_size=8, augment="eval", join="image", missing="uniform")
    flat = [
        one for batch in uniform for one, label in zip(batch["relevance"], batch["label"], strict=True) if label > 9
    ]
    assert len(flat) == 14 and all((one == 1).all() for one in flat)


def test_unusable_maps_are_skipped_whatever_the_tars(holes, packed):
    batches = load((packed, holes[1]), augment="eval", join="image", missing="skip")
    assert {label for batch in batches for label in batch["label"].tolist()} == set(range(24)) - {2, 12}
    with pytest.raises(ZpipeError, match=r"no usable map \((zero|nonfinite)\); give --missing skip"):
        load((packed, holes[1]), augment="eval", join="image")


def twins(tmp_path, maps_differ, labels=(0, 1), image_label=0):
    """A store of two tars that hold the same image, and tars with that image again."""
    image = encode(np.arange(48, dtype=np.uint8).reshape(4, 4, 3))
    made = [
        {f"{name}.png": image, f"{name}.cls": str(label).encode()} for name, label in zip("ab", labels, strict=True)
    ]
    shards = write_shards(tmp_path / "made", made)
    root = store(shards, tmp_path / "maps")
    slope = np.add.outer(np.arange(4.0), np.arange(4.0))
    rewrite_store(root, {"a": slope, "b": slope[::-1] if maps_differ else slope * (1 + 1e-4)})
    again = write_shards(tmp_path / "again", [{"c.png": image, "c.cls": str(image_label).encode()}])
    return again, root, image, slope


def first_map(shards, root):
    view = ViewConfig(crop_pct=1.0)
    return load((shards, root), image_size=8, batch_size=1, augment="eval", join="image", view=view)[0]["relevance"][0]


def test_of_two_maps_of_one_image_the_label_chooses(tmp_path):
    for label, name in ((0, "a"), (1, "b")):
        shards, root, image, _ = twins(tmp_path / name, maps_differ=True, image_label=label)
        expected = zpipe.open_maps(root, normalise="minmax")[name]
        np.testing.assert_allclose(first_map(shards, root).numpy(), expected, atol=1e-6)
        with pytest.raises(ZpipeError, match="keys a and b are the same image with different maps; look it up by key"):
            zpipe.open_maps(root)[zpipe.image_digest(image)]


@pytest.mark.parametrize(("labels", "image_label"), [((0, 1), 2), ((3, 3), 3)])
def test_two_maps_of_one_image_that_no_label_tells_apart_are_an_error(tmp_path, labels, image_label):
    shards, root, *_ = twins(tmp_path, maps_differ=True, labels=labels, image_label=image_label)
    with pytest.raises(
        ZpipeError, match=r"keys a and b have different maps of the image that is shard-00000.tar: key c"
    ):
        RelevanceLoader(shards, root, batch_size=1, join="image")


def test_two_maps_of_one_image_that_agree_are_one(tmp_path):
    shards, root, image, slope = twins(tmp_path, maps_differ=False, labels=(3, 3), image_label=3)
    np.testing.assert_allclose(first_map(shards, root).numpy(), slope / slope.max(), atol=1e-2)
    np.testing.assert_allclose(zpipe.open_maps(root)[zpipe.image_digest(image)], slope, rtol=1e-2)


def test_digests_that_are_absent_are_named_with_the_command_that_adds_them(data, packed, tmp_path):
    shards = shutil.copytree(packed, tmp_path / "shards")
    text = (shards / "shards.json").read_text()
    index = zpipe.schemas.formats.decode_json(text.encode(), "shards.json", type=dict, what="x", remedy="y")
    for entry in index["shards"]:
        del entry["images_sha256"]
    zpipe.schemas.atomic.write_json(shards / "shards.json", index)
    with pytest.raises(ZpipeError, match=f"no digests of its images; zpipe make-shards --index-only {shards}"):
        RelevanceLoader(shards, data[1], batch_size=2, join="image")
    (tmp_path / "other").mkdir()
    for tar in packed.glob("*.tar"):  # tars without an index
        shutil.copy(tar, tmp_path / "other")
    with pytest.raises(ZpipeError, match="no digests of its images"):
        RelevanceLoader(tmp_path / "other", data[1], batch_size=2, join="image")
    altered = shutil.copytree(packed, tmp_path / "altered")
    shutil.copy(altered / "shard-00000.images.parquet", altered / "shard-00001.images.parquet")
    with pytest.raises(ZpipeError, match="damaged or altered; zpipe make-shards --index-only"):
        RelevanceLoader(altered, data[1], batch_size=2, join="image")


def test_a_disk_that_is_too_small_for_the_join_is_named(data, packed, monkeypatch):
    monkeypatch.setattr(map_stores.shutil, "disk_usage", lambda folder: SimpleNamespace(free=10))
    with pytest.raises(ZpipeError, match="set TMPDIR to a larger disk, or join by tar"):
        load((packed, data[1]), join="image")


# ------------------------------------------------------------------------------------------------- kinds of tensors


@pytest.fixture(scope="module")
def kinds(tmp_path_factory):
    """Shards of scenes, their maps, and stores of every other kind, whose values follow from the key."""
    root = tmp_path_factory.mktemp("kinds")
    shards = scenes(root / "shards", 12, shard_size=5)
    numbers = {sample.key: number for number, sample in enumerate(samples_of(shards))}
    rng = {key: np.random.default_rng(number) for key, number in numbers.items()}
    made = {
        "mask": ("map", (GRID, GRID), lambda g: g.random((GRID, GRID))),
        "tops": ("class-maps", (2, GRID, GRID), lambda g: g.random((2, GRID, GRID))),
        "tokens": ("features", (GRID, GRID, 3), lambda g: g.normal(size=(GRID, GRID, 3))),
        "large": ("features", (GRID, GRID, 200), lambda g: g.normal(size=(GRID, GRID, 200))),
        "parts": ("label-map", (GRID, GRID), lambda g: g.integers(-5, 9, (GRID, GRID))),
        "logits": ("vector", (10,), lambda g: g.normal(size=10)),
    }
    values = {name: {key: function(rng[key]) for key in numbers} for name, (_, _, function) in made.items()}
    for name, (kind, shape, _) in made.items():
        function = lambda sample, name=name: values[name][sample.key]  # noqa: E731
        assert save_tensors(shards, root / name, function, name=name, kind=kind, shape=shape) == 12
    return shards, {"relevance": store(shards, root / "maps")} | {name: root / name for name in made}, values


@pytest.mark.parametrize("join", ["tar", "image"])
def test_every_kind_of_tensor_comes_under_the_crop_of_the_image(kinds, join):
    shards, stores, values = kinds
    loader = RelevanceLoader(shards, stores, batch_size=4, image_size=16, seed=1, num_workers=2, join=join)
    batches = list(loader)
    assert len(batches) == 3
    flipped = 0
    for batch in batches:
        for row, key in enumerate(batch["key"]):
            view, frame = View(Box(*batch["box"][row].tolist()), bool(batch["flipped"][row])), Box.full(32, 32)
            flipped += view.flipped

            def seen(array, view=view, frame=frame):
                return view_maps(np.asarray(array, np.float64)[None], [view], [frame])[0]

            expected = {name: values[name][key] for name in values}
            np.testing.assert_allclose(batch["mask"][row], seen(expected["mask"]), atol=1e-3)
            np.testing.assert_allclose(batch["tops"][row], seen(expected["tops"]), atol=1e-3)
            for name in ("tokens", "large"):
                channels = seen(np.moveaxis(expected[name], -1, 0))
                np.testing.assert_allclose(batch[name][row], np.moveaxis(channels, 0, -1), atol=6e-3)
            np.testing.assert_allclose(batch["logits"][row], expected["logits"], atol=2e-3)
            assert batch["parts"].dtype == torch.int32
            assert set(batch["parts"][row].flatten().tolist()) <= set(expected["parts"].flatten().tolist())
    assert 0 < flipped < 12
    alone = list(RelevanceLoader(shards, stores["relevance"], batch_size=4, image_size=16, seed=1))
    for one, other in zip(alone, batches, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one if name != "key")


def test_a_label_map_is_seen_by_the_nearest_cell(kinds):
    shards, stores, values = kinds
    view = ViewConfig(crop_pct=1.0)
    for batch in RelevanceLoader(
        shards, {"parts": stores["parts"]}, batch_size=4, image_size=8, augment="eval", view=view
    ):
        assert "relevance" not in batch
        for row, key in enumerate(batch["key"]):
            np.testing.assert_array_equal(batch["parts"][row], values["parts"][key])


def test_stores_that_a_loader_cannot_serve_are_refused(kinds):
    shards, stores, _ = kinds
    cases = [
        ({"image": stores["mask"]}, {}, "can't name a tensor of a batch"),
        ({"not a name": stores["mask"]}, {}, "can't name a tensor of a batch"),
        (stores["logits"], {}, "holds vector, not one map for each image"),
        ({"relevance": stores["tops"]}, {}, "holds class-maps, not one map for each image"),
        ({"logits": stores["logits"]}, {"missing": "uniform"}, "of which none is uniform"),
    ]
    for maps, options, told in cases:
        with pytest.raises(UsageError, match=told):
            RelevanceLoader(shards, maps, batch_size=2, **options)
    with pytest.raises(UsageError, match="holds vector, which are not scaled"):
        zpipe.open_maps(stores["logits"], normalise="minmax")


def test_opened_stores_have_the_values_that_were_written(kinds):
    _, stores, values = kinds
    for name, by_key in values.items():
        maps = zpipe.open_maps(stores[name])
        for key, expected in by_key.items():
            np.testing.assert_allclose(maps[key], expected, atol=2.0**-10 * np.abs(expected).max())
        assert maps.array().shape == (12, *maps.manifest.provenance.sample_shape)
    assert zpipe.open_maps(stores["parts"]).array().dtype == np.int32


@pytest.mark.parametrize("name", ["tops", "parts", "logits"])
def test_other_tensors_are_exported_as_they_are(kinds, tmp_path, name):
    _, stores, values = kinds
    maps = zpipe.open_maps(stores[name])
    expected = np.stack([values[name][key] for key in maps])
    export_numpy(maps, tmp_path / "numpy")
    np.testing.assert_array_equal(np.load(tmp_path / "numpy" / "maps.npy"), maps.array())
    export_parquet(maps, tmp_path / "all.parquet")
    table = pq.read_table(tmp_path / "all.parquet")
    flat = np.array(table["map"].to_pylist(), np.float64) * table["scale"].to_numpy()[:, None]
    np.testing.assert_allclose(flat.reshape(expected.shape), expected, atol=2.0**-10 * np.abs(expected).max())
    if name != "tops":
        with pytest.raises(UsageError, match="--values minmax: .* holds .*; choose raw"):
            export_parquet(maps, tmp_path / "minmax.parquet", values="minmax")


def test_an_index_elsewhere_joins_by_image(data, packed, tmp_path):
    (tmp_path / "tars").mkdir()
    for tar in packed.glob("*.tar"):
        shutil.copy(tar, tmp_path / "tars")
    index_shards(tmp_path / "tars", tmp_path / "index")
    one, other = (
        load((shards, data[1]), augment="eval", join="image", seed=4) for shards in (packed, tmp_path / "index")
    )
    assert all(torch.equal(a["relevance"], b["relevance"]) for a, b in zip(one, other, strict=True))


def test_logits_of_the_teachers_own_view_serve_every_crop(tmp_path):
    shards = scenes(tmp_path / "shards", 4, shard_size=4)
    config = ExtractConfig(
        teacher="deit_tiny_patch16_224",
        weights="random",
        num_classes=10,
        teacher_args=TEACHER,
        executor="local",
        frame="center",
        save=("logits",),
    )
    extract_teacher_maps(shards, tmp_path / "maps", config)
    for join in ("tar", "image"):
        loader = RelevanceLoader(
            shards, {"logits": tmp_path / "maps" / "logits"}, batch_size=4, image_size=8, join=join
        )
        assert next(iter(loader))["logits"].shape == (4, 10)


def test_indexes_of_images_that_do_not_fit_their_tars_are_refused(data, packed, tmp_path):
    shards = shutil.copytree(packed, tmp_path / "shards")
    index = read_index(shards)
    entry = index.shards[1]
    table = pq.read_table(images_path(shards, entry.stem)).slice(1)
    images = [tuple(row.values()) for row in table.to_pylist()]
    write_images(shards, entry.stem, images)
    forged = dataclasses.replace(entry, images_sha256=digest_images(images))
    write_index(shards, dataclasses.replace(index, shards=(index.shards[0], forged, *index.shards[2:])))
    with pytest.raises(ZpipeError, match="damaged or altered"):
        RelevanceLoader(shards, data[1], batch_size=2, join="image")


def test_a_lost_index_of_images_is_made_again_by_the_command_that_is_named(data, packed, tmp_path, cli):
    shards = shutil.copytree(packed, tmp_path / "shards")
    before = (shards / "shards.json").read_bytes()
    images_path(shards, "shard-00002").unlink()
    images_path(shards, "shard-00001").write_bytes(b"PAR1")
    for stem in ("shard-00001", "shard-00002"):
        with pytest.raises(ZpipeError, match=f"{stem}.*; .*zpipe make-shards --index-only {shards}") as error:
            RelevanceLoader(shards / f"{stem}.tar", data[1], batch_size=1, join="image")
        assert "\n" not in str(error.value)
    assert cli("make-shards", "--index-only", shards).code == 0
    assert (shards / "shards.json").read_bytes() == before
    assert len(RelevanceLoader(shards, data[1], batch_size=2, join="image")) == 12


def test_many_copies_of_one_image_take_no_more_than_their_rows(tmp_path):
    image = encode(np.zeros((4, 4, 3), np.uint8))
    members = {
        f"{number:05d}.{suffix}": value for number in range(800) for suffix, value in (("png", image), ("cls", b"1"))
    }
    shards = write_shards(tmp_path / "shards", [members])
    root = store(shards, tmp_path / "maps")
    slope = np.add.outer(np.arange(4.0), np.arange(4.0))
    rewrite_store(root, {f"{number:05d}": slope for number in range(800)})
    found = RelevanceLoader(shards, root, batch_size=2, join="image")
    assert found.coverage == [f"{root}: 800 of 800 images have a map"]
    maps = zpipe.open_maps(root)
    table = maps.table(["image_digest", "label"])
    digests = digest_column(table["image_digest"])
    matches = DigestRows(digests).match(table["label"].to_numpy(), digests, table["label"].to_numpy())
    assert len(matches.doubtful) == 1 and (matches.rows == 0).all()


def test_label_maps_of_one_image_are_the_same_only_if_all_labels_are():
    labels = np.array([[0, 1000]], np.int32)
    assert same_map(labels, labels) and not same_map(labels, labels + 7)
