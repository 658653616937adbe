"""Images and maps in one stream: each map with its image, every sample once, and no broken tar unnoticed."""

import dataclasses
import json
import struct
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ramps import CELLS, KEYS, LENGTHS, SIZES, angle_of, copy_shards, keys_of, load, ramp
from tiny import cut, encode, late_profile, store, write_shards, write_tar

from zpipe.schemas.errors import UsageError, ZpipeError
from zpipe.schemas.manifest import read_manifest, write_manifest
from zpipe.train.data.loader import RelevanceLoader
from zpipe.train.data.transforms import ViewConfig, draw_view

torch.set_num_threads(1)
# ------------------------------------------------------------------------------------- a map belongs to its image


@pytest.mark.parametrize("augment", ["train", "eval"])
@pytest.mark.parametrize("num_workers", [0, 1, 2])
def test_the_map_shows_what_the_image_shows(data, augment, num_workers):
    view = ViewConfig(crop_scale=(0.2, 1.0))
    seen, flips = 0, 0
    for epoch in range(3 if augment == "train" else 1):
        loader = RelevanceLoader(
            *data, batch_size=2, image_size=CELLS, augment=augment, num_workers=num_workers, view=view
        )
        loader.set_epoch(epoch)
        for batch in loader:
            assert batch["image"].shape[1:] == (3, CELLS, CELLS) and batch["image"].dtype == torch.uint8
            assert batch["relevance"].shape[1:] == (CELLS, CELLS) and batch["relevance"].dtype == torch.float32
            difference = (batch["image"][:, 0] / 255 - batch["relevance"]).abs().flatten(1)
            # Half a cell of the map, at most; a mirrored or shifted map is off by tenths.
            assert difference.max() < 0.08 and difference.mean(dim=1).max() < 0.02, batch["key"]
            assert [KEYS[label] for label in batch["label"]] == batch["key"]
            seen += len(batch["key"])
            flips += int(batch["flipped"].sum())
    assert seen >= 20
    assert (0 < flips < seen) if augment == "train" else flips == 0


def test_the_box_is_the_crop_that_was_taken(data):
    for batch in load(data, augment="train"):
        for key, box, flipped, relevance in zip(
            batch["key"], batch["box"], batch["flipped"], batch["relevance"], strict=True
        ):
            number = KEYS.index(key)
            width, height = SIZES[number % len(SIZES)]
            x1, y1, x2, y2 = box.tolist()
            x, y = np.meshgrid(
                np.linspace(x1, x2, CELLS * 2 + 1)[1::2] / width, np.linspace(y1, y2, CELLS * 2 + 1)[1::2] / height
            )
            wanted = np.clip(ramp(angle_of(number), x[:, ::-1] if flipped else x, y), 0, 1)
            assert np.abs(relevance.numpy() - wanted).max() < 0.05


def test_an_objects_box_follows_crop_and_flip(tmp_path):
    members = {}
    rng = np.random.default_rng(0)
    for number in range(24):
        width, height = SIZES[number % len(SIZES)]
        x1, y1 = rng.integers(0, width // 2), rng.integers(0, height // 2)
        x2, y2 = x1 + width // 3, y1 + height // 3
        pixels = np.zeros((height, width), np.uint8)
        pixels[y1:y2, x1:x2] = 255
        meta = {"box": [int(x1), int(y1), int(x2), int(y2)]}
        members |= {f"{number}.png": encode(pixels), f"{number}.cls": b"0", f"{number}.json": json.dumps(meta).encode()}
    loader = RelevanceLoader(
        write_shards(tmp_path / "s", [members]), batch_size=24, image_size=64, view=ViewConfig(crop_scale=(0.6, 1.0))
    )
    batch = next(iter(loader))
    assert 0 < batch["flipped"].sum() < 24
    for image, box in zip(batch["image"][:, 0], batch["object_box"] * 64, strict=True):
        lit = image > 127
        columns, rows = lit.any(dim=0).nonzero(), lit.any(dim=1).nonzero()
        found = torch.tensor([columns[0, 0], rows[0, 0], columns[-1, 0] + 1, rows[-1, 0] + 1])
        assert (found - box).abs().max() <= 1.01


@settings(max_examples=150, deadline=None)
@given(
    width=st.integers(1, 4000),
    height=st.integers(1, 4000),
    augment=st.sampled_from(["train", "eval"]),
    scale=st.tuples(st.floats(0.01, 1), st.floats(0.01, 1)).map(sorted).map(tuple),
    ratio=st.tuples(st.floats(0.2, 5), st.floats(0.2, 5)).map(sorted).map(tuple),
    crop_pct=st.floats(0.05, 1),
    seed=st.integers(0, 2**32),
)
def test_a_view_lies_inside_its_image(width, height, augment, scale, ratio, crop_pct, seed):
    config = ViewConfig(augment=augment, crop_scale=scale, crop_ratio=ratio, crop_pct=crop_pct)
    view = draw_view(np.random.default_rng(seed), width, height, config)
    x1, y1, x2, y2 = view.box.as_tuple()
    assert 0 <= x1 < x2 <= width and 0 <= y1 < y2 <= height
    if augment == "eval":
        assert not view.flipped
        assert view.box.width == pytest.approx(view.box.height) == pytest.approx(crop_pct * min(width, height))


# --------------------------------------------------------------------------------------------- order and coverage


@pytest.mark.parametrize("num_workers", [0, 1, 2])
@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_eval_has_every_sample_once(data, num_workers, batch_size):
    keys = keys_of(load(data, augment="eval", num_workers=num_workers, batch_size=batch_size))
    assert sorted(keys) == KEYS
    if num_workers < 2:
        assert keys == KEYS


@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_epoch_is_a_function_of_seed_and_epoch(data, num_workers):
    def epoch(seed, number):
        loader = RelevanceLoader(*data, batch_size=2, image_size=8, seed=seed, num_workers=num_workers)
        loader.set_epoch(number)
        batches = list(loader)
        return keys_of(batches), torch.cat([batch["box"] for batch in batches]).tolist()

    first = epoch(0, 0)
    assert epoch(0, 0) == first
    assert epoch(0, 1)[0] != first[0] and epoch(1, 0)[0] != first[0]
    # The same shards in another epoch are not enough: crops are drawn anew as well.
    boxes = [dict(zip(keys, boxes, strict=True)) for keys, boxes in (first, epoch(0, 1))]
    assert all(boxes[0][key] != boxes[1][key] for key in boxes[0].keys() & boxes[1].keys())


def test_one_loader_gives_the_epochs_that_fresh_ones_give(data):
    loader = RelevanceLoader(*data, batch_size=2, image_size=8)
    list(loader)
    loader.set_epoch(5)
    fresh = RelevanceLoader(*data, batch_size=2, image_size=8)
    fresh.set_epoch(5)
    assert keys_of(loader) == keys_of(fresh)


@settings(max_examples=40, deadline=None)
@given(
    batch_size=st.integers(1, 6),
    world_size=st.integers(1, 4),
    epoch=st.integers(0, 50),
    seed=st.integers(0, 1000),
)
def test_ranks_take_equally_many_steps_over_disjoint_samples(data, batch_size, world_size, epoch, seed):
    lengths, seen = set(), []
    for rank in range(world_size):
        loader = RelevanceLoader(
            data[0], batch_size=batch_size, image_size=4, seed=seed, rank=rank, world_size=world_size
        )
        loader.set_epoch(epoch)
        lengths.add(len(loader))
        if len(loader):
            batches = list(loader)
            assert len(batches) == len(loader) and all(len(batch["key"]) == batch_size for batch in batches)
            seen += keys_of(batches)
        else:
            with pytest.raises(UsageError, match="too few samples"):
                next(iter(loader))
    assert len(lengths) == 1
    assert lengths == {len(KEYS) // (batch_size * world_size)}  # only the last batch, not full, is dropped
    assert len(seen) == len(set(seen)) == world_size * batch_size * lengths.pop()


def test_a_rank_reads_other_shards_in_other_epochs(data):
    def shards(epoch):
        loader = RelevanceLoader(data[0], batch_size=1, image_size=4, rank=0, world_size=2)
        loader.set_epoch(epoch)
        return frozenset(np.searchsorted(np.cumsum(LENGTHS), KEYS.index(key), side="right") for key in keys_of(loader))

    assert len({shards(epoch) for epoch in range(6)}) > 2


@pytest.mark.parametrize("world_size", [2, 3, 9])  # of 9 ranks three have no shard
def test_ranks_together_evaluate_every_sample_once(data, world_size):
    keys = [
        key
        for rank in range(world_size)
        for key in keys_of(load(data, augment="eval", rank=rank, world_size=world_size))
    ]
    assert sorted(keys) == KEYS


def test_training_drops_partial_batches_of_each_worker(data):
    assert [len(batch["key"]) for batch in load(data, batch_size=5)] == [5] * (len(KEYS) // 5)
    for batch in load(data, batch_size=3, num_workers=2):
        assert len(batch["key"]) == 3


# -------------------------------------------------------------------------------------------- samples without a map


@pytest.mark.parametrize("num_workers", [0, 1])
def test_missing_error_names_the_key(holes, num_workers):
    with pytest.raises(ZpipeError, match=rf"shard-0000.*{KEYS[2]}.*zero.*skip") as error:
        load(holes, augment="eval", num_workers=num_workers)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("augment", ["train", "eval"])
def test_missing_skip_leaves_them_out_and_counts_right(holes, augment, num_workers):
    keys = keys_of(load(holes, augment=augment, batch_size=1, missing="skip", num_workers=num_workers))
    assert sorted(keys) == [key for key in KEYS if key not in (KEYS[2], KEYS[12])]


def test_missing_uniform_gives_ones(holes):
    for batch in load(holes, augment="eval", missing="uniform"):
        for key, relevance in zip(batch["key"], batch["relevance"], strict=True):
            assert bool((relevance == 1).all()) == (key in (KEYS[2], KEYS[12]))


# ------------------------------------------------------------------------------------------ stores that don't belong


def test_a_store_of_other_tars_is_refused(data, tmp_path):
    other = copy_shards(data, tmp_path / "other")
    (other / "shards.json").unlink()
    pixels = np.zeros((8, 8, 3), np.uint8)
    write_tar(other / "shard-00003.tar", {"img_016.png": encode(pixels), "img_016.cls": b"16"})
    write_shards(other, [])
    with pytest.raises(ZpipeError, match="shard-00003.tar.*SHA-256.*extract again"):
        RelevanceLoader(other, data[1], batch_size=1)


def test_a_store_that_lacks_a_tar_is_refused(data, tmp_path):
    more = copy_shards(data, tmp_path / "more")
    (more / "shards.json").unlink()
    write_tar(more / "more.tar", {"x.png": encode(np.zeros((8, 8, 3), np.uint8)), "x.cls": b"0"})
    write_shards(more, [])
    with pytest.raises(ZpipeError, match="no maps for .*more.tar"):
        RelevanceLoader(more, data[1], batch_size=1)


def test_a_store_on_a_narrower_frame_is_refused(data, tmp_path):
    root = store(data[0], tmp_path / "maps", num_classes=len(KEYS))
    manifest = read_manifest(root)
    write_manifest(
        root, dataclasses.replace(manifest, provenance=dataclasses.replace(manifest.provenance, frame="center"))
    )
    with pytest.raises(ZpipeError, match="frame 'center'"):
        RelevanceLoader(data[0], root, batch_size=1)


def test_one_tar_of_a_folder_is_enough(data):
    keys = keys_of(load((data[0] / "shard-00001.tar", data[1]), augment="eval"))
    assert keys == KEYS[7:10]


# ----------------------------------------------------------------------------------------------------- broken tars


@pytest.mark.parametrize("where", ["on", "inside"])
def test_a_cut_tar_is_noticed_before_training(data, tmp_path, where):
    shards = copy_shards(data, tmp_path / "s")
    cut(shards / "shard-00002.tar", where)
    with pytest.raises(ZpipeError, match="shard-00002.tar.*truncated"):
        RelevanceLoader(shards, batch_size=1)


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("where", ["on", "inside"])
@pytest.mark.parametrize("augment", ["train", "eval"])
def test_a_tar_cut_while_it_is_in_use_is_noticed(data, tmp_path, where, num_workers, augment):
    shards = copy_shards(data, tmp_path / "s")
    loader = RelevanceLoader(shards, data[1], batch_size=1, image_size=8, augment=augment, num_workers=num_workers)
    cut(shards / "shard-00002.tar", where)
    with pytest.raises(ZpipeError, match="shard-00002.tar") as error:
        list(loader)
    assert type(error.value) is ZpipeError and "\n" not in str(error.value)


def test_a_tar_that_vanished_is_named(data, tmp_path):
    shards = copy_shards(data, tmp_path / "s")
    loader = RelevanceLoader(shards, batch_size=1, image_size=8)
    (shards / "shard-00004.tar").unlink()
    with pytest.raises(ZpipeError, match="shard-00004.tar: can't be read"):
        list(loader)


def bomb() -> bytes:
    """A PNG that says it has 30,000 x 30,000 pixels."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", 30000, 30000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


GOOD = encode(np.arange(192, dtype=np.uint8).reshape(8, 8, 3))
BAD_SAMPLES = {
    "cut": ({"k.png": GOOD[: len(GOOD) // 2], "k.cls": b"1"}, "key k: can't be decoded"),
    "not an image": ({"k.jpg": b"hello", "k.cls": b"1"}, "key k: can't be decoded"),
    "profile behind the pixels": ({"k.png": late_profile(GOOD), "k.cls": b"1"}, "key k: can't be decoded"),
    "bomb": ({"k.png": bomb(), "k.cls": b"1"}, "key k: can't be decoded"),
    "no label": ({"k.png": GOOD}, "key k: has no label"),
    "json without label": ({"k.png": GOOD, "k.json": b'{"width": 8}'}, "key k: has no label"),
}


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize("case", BAD_SAMPLES)
def test_a_bad_sample_is_one_line_with_tar_and_key(tmp_path, case, num_workers):
    members, told = BAD_SAMPLES[case]
    shards = write_shards(tmp_path / "s", [{"a.png": GOOD, "a.cls": b"0"}, {"b.png": GOOD, "b.cls": b"0"} | members])
    with pytest.raises(ZpipeError, match=f"shard-00001.tar: {told}") as error:
        list(RelevanceLoader(shards, batch_size=1, image_size=8, num_workers=num_workers))
    assert "\n" not in str(error.value)


def test_labels_may_stand_in_json_and_images_may_be_tiny_or_odd(tmp_path):
    members = {
        "a.PNG": encode(np.zeros((1, 1), np.uint8)),
        "a.json": b'{"label": 3}',
        "b.jpeg": encode(np.full((1, 200, 3), 128, np.uint8), "JPEG"),
        "b.cls": b"4",
        "b.txt": b"not looked at",
    }
    shards = write_shards(tmp_path / "s", [members])
    for augment in ("train", "eval"):
        (batch,) = list(RelevanceLoader(shards, batch_size=2, image_size=8, augment=augment))
        assert dict(zip(batch["key"], batch["label"].tolist(), strict=True)) == {"a": 3, "b": 4}


# ------------------------------------------------------------------------------------------------------ wrong usage


@pytest.mark.parametrize(
    "options",
    [
        {"batch_size": 0},
        {"image_size": 0},
        {"num_workers": -1},
        {"rank": 1},
        {"rank": -1},
        {"seed": -1},
        {"repeats": 0},
        {"missing": "ignore"},
    ],
    ids=str,
)
def test_options_out_of_range(data, options):
    with pytest.raises(UsageError, match=next(iter(options))):
        RelevanceLoader(data[0], **{"batch_size": 1} | options)


@pytest.mark.parametrize(
    "options",
    [
        {"crop_scale": (0.0, 1.0)},
        {"crop_scale": (0.9, 0.5)},
        {"crop_scale": (0.5, 2.0)},
        {"crop_ratio": (0.0, 1.0)},
        {"flip": 1.5},
        {"crop_pct": 0.0},
        {"crop_pct": 1.5},
    ],
    ids=str,
)
def test_views_out_of_range(options):
    with pytest.raises(UsageError, match=f"view.{next(iter(options))}"):
        ViewConfig(**options)


def test_too_few_samples_say_what_to_lower(data):
    with pytest.raises(UsageError, match="too few samples .24. for one batch of 25"):
        next(iter(RelevanceLoader(data[0], batch_size=25)))


@pytest.mark.parametrize("kind", ["missing", "empty", "a file", "not indexed", "gone"])
def test_folders_that_hold_no_shards(data, tmp_path, kind):
    folder = tmp_path / "s"
    if kind in ("not indexed", "gone"):
        copy_shards(data, folder)
    if kind == "empty":
        folder.mkdir()
    elif kind == "a file":
        folder.write_text("x")
    elif kind == "not indexed":
        write_tar(folder / "more.tar", {"x.png": GOOD, "x.cls": b"0"})
    elif kind == "gone":
        (folder / "shard-00001.tar").unlink()
    with pytest.raises(ZpipeError, match=str(tmp_path)) as error:
        RelevanceLoader(folder, batch_size=1)
    assert isinstance(error.value, UsageError) == (kind not in ("not indexed", "gone"))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_flipped_bit_in_a_tar_is_noticed_in_the_first_epoch(data, tmp_path, num_workers):
    shards = copy_shards(data, tmp_path / "s")
    tar = shards / "shard-00002.tar"
    altered = bytearray(tar.read_bytes())
    altered[512 + 60] ^= 1  # among the pixels of the first image
    arguments = {"batch_size": 1, "image_size": 8, "num_workers": num_workers}
    loader = RelevanceLoader(shards, **arguments)
    list(loader)
    tar.write_bytes(altered)
    with pytest.raises(
        ZpipeError, match="shard-00002.tar: its SHA-256 is .*, shards.json says .*: altered; restore it"
    ):
        list(RelevanceLoader(shards, **arguments))
    skipping = RelevanceLoader(shards, damaged="skip", **arguments | {"batch_size": len(KEYS) - 1})
    assert list(skipping) and "shard-00002.tar" in skipping.damaged_shards[0]


def test_digests_are_compared_once_and_not_if_that_is_switched_off(data, tmp_path, monkeypatch):
    shards = copy_shards(data, tmp_path / "s")
    index = json.loads((shards / "shards.json").read_text())
    loader = RelevanceLoader(shards, batch_size=1, image_size=8)
    list(loader)
    index["shards"][2]["sha256"] = "0" * 64
    (shards / "shards.json").write_text(json.dumps(index))
    loader.set_epoch(1)
    assert len(list(loader)) == len(KEYS)  # the loader has read the index, and compared the digests, before
    with pytest.raises(ZpipeError, match="altered"):
        list(RelevanceLoader(shards, batch_size=1, image_size=8))
    monkeypatch.setenv("ZPIPE_CHECK_DIGESTS", "0")
    assert len(list(RelevanceLoader(shards, batch_size=1, image_size=8))) == len(KEYS)


@pytest.mark.parametrize(
    "box", [[1, 2], {"x": 1}, "1,2,3,4", [1, 2, 3, None], [1, 2, 1e400, 4], [5, 6, 2, 3], 7, None, [[1, 2, 3, 4]]]
)
def test_a_box_of_another_form_is_none(tmp_path, box):
    members = {}
    for key, value in (("a", [0, 0, 4, 4]), ("b", box)):
        members |= {f"{key}.png": encode(np.zeros((8, 8, 3), np.uint8)), f"{key}.cls": b"0"}
        members[f"{key}.json"] = json.dumps({"box": value}).replace("Infinity", "1e400").encode()
    shards = write_shards(tmp_path / "s", [members])
    batches = list(RelevanceLoader(shards, batch_size=1, image_size=8, augment="eval"))
    assert ["object_box" in batch for batch in batches] == [True, False]
    assert [len(batch["object_boxes"][0]) for batch in batches] == [1, 0]


def test_boxes_and_their_labels_go_together(tmp_path):
    members = {}
    for key, labels in (("a", [3, 3]), ("b", [3])):
        members |= {f"{key}.png": encode(np.zeros((8, 8, 3), np.uint8)), f"{key}.cls": b"3"}
        members[f"{key}.json"] = json.dumps({"boxes": [[0, 0, 4, 4]] * 2, "box_labels": labels}).encode()
    shards = write_shards(tmp_path / "s", [members])
    loader = RelevanceLoader(shards, batch_size=2, image_size=8, augment="eval")
    with pytest.raises(ZpipeError, match=r"00000.tar: key b: its .json has 2 boxes and 1 box_labels; give each"):
        list(loader)
    loader = RelevanceLoader(shards, batch_size=2, image_size=8, augment="eval", damaged="skip")
    assert [batch["key"] for batch in loader] == [["a"]]


@pytest.mark.parametrize("workers", [0, 2])
def test_all_boxes_of_the_class_of_an_image(tmp_path, workers):
    """Of an image with several objects those of its label count; a batch keeps the order of its samples."""
    two = [[0, 0, 4, 4], [4, 4, 8, 8]]
    metas = {
        "a": {"boxes": [*two, [1, 1, 2, 2]], "box_labels": [3, 3, 5]},
        "b": {"boxes": two},
        "c": {},
        "d": {"box": two[1], "boxes": [two[1], [5, 6, 2, 3]], "box_labels": [3, 3]},
        "e": {"box": two[0]},
        "f": {"boxes": two, "box_labels": [4, 4]},
    }
    members = {}
    for key, meta in metas.items():
        members |= {f"{key}.png": encode(np.zeros((8, 8, 3), np.uint8)), f"{key}.cls": b"3"}
        members[f"{key}.json"] = json.dumps(meta).encode()
    shards = write_shards(tmp_path / "s", [members])
    whole = ViewConfig(crop_pct=1.0)
    loader = RelevanceLoader(shards, batch_size=4, image_size=8, augment="eval", num_workers=workers, view=whole)
    found = {}
    for batch in loader:
        found |= dict(zip(batch["key"], batch["object_boxes"], strict=True))
    first, second = [0, 0, 0.5, 0.5], [0.5, 0.5, 1, 1]
    expected = {"a": [first, second], "b": [first, second], "c": [], "d": [second], "e": [first], "f": []}
    assert {key: boxes.tolist() for key, boxes in found.items()} == expected
    assert "object_boxes" not in next(iter(RelevanceLoader(shards, batch_size=4, image_size=8)))
