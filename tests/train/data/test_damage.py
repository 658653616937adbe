"""One policy for what is damaged: tars, images, labels and descriptions; skipped ones are counted and told."""

import errno
import os

import numpy as np
import pytest
import torch
from ramps import CELLS, KEYS, copy_shards, keys_of, load
from tiny import encode, rewrite_store, store, write_tar

from zpipe.schemas.account import Account
from zpipe.schemas.errors import ZpipeError
from zpipe.train.data import damage, join
from zpipe.train.data.loader import RelevanceLoader

GOOD = encode(np.arange(192, dtype=np.uint8).reshape(8, 8, 3))
BAD = {
    "truncated": ({"k.png": GOOD[: len(GOOD) // 2], "k.cls": b"1"}, "can't be decoded"),
    "not an image": ({"k.jpg": b"hello", "k.cls": b"1"}, "can't be decoded"),
    "empty": ({"k.png": b"", "k.cls": b"1"}, "can't be decoded"),
    "no label": ({"k.png": GOOD}, "has no label"),
    "a word for a label": ({"k.png": GOOD, "k.cls": b"cat"}, "its .cls holds b'cat', not a class index"),
    "a label too large": ({"k.png": GOOD, "k.cls": b"9" * 12}, "is no class index"),
    "broken json": ({"k.png": GOOD, "k.json": b"{nope"}, "its .json can't be read"),
    "a list for json": ({"k.png": GOOD, "k.json": b"[1]"}, "its .json is not an object"),
    "a label of true": ({"k.png": GOOD, "k.json": b'{"label": true}'}, "has label True"),
    "no image": ({"k.cls": b"1"}, "expected one image, found cls"),
    "two images": ({"k.png": GOOD, "k.jpg": GOOD, "k.cls": b"1"}, "expected one image"),
}


def sound(*keys):
    return {name: data for key in keys for name, data in ((f"{key}.png", GOOD), (f"{key}.cls", b"0"))}


def public(folder, tars):
    """Tars without an index, as other programs write them."""
    for number, members in enumerate(tars):
        write_tar(folder / f"shard-{number:05d}.tar", members)
    return folder


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("augment", ["train", "eval"])
def test_a_damaged_sample_is_an_error_or_left_out(tmp_path, case, augment):
    members, reason = BAD[case]
    shards = public(tmp_path / "s", [sound("a", "b"), sound("c") | members])
    with pytest.raises(
        ZpipeError, match="shard-00001.tar: key k: .*; .*, or give --damaged skip to leave it out"
    ) as told:
        load((shards,), augment=augment)
    assert reason in str(told.value) and "\n" not in str(told.value)
    loader = RelevanceLoader(shards, batch_size=2, image_size=8, augment=augment, damaged="skip")
    for _ in range(2):  # it is counted once, however often it is met
        assert sorted(keys_of(loader)) == ["a", "b", "c"]
    (line,) = loader.damaged_samples
    assert line.startswith(f"{shards / 'shard-00001.tar'}: key k: ") and reason in line and "--damaged" not in line
    assert loader.damaged_shards == [] and loader.damage.places == {(1, 1)}
    assert loader.account() == Account(seen=4, taken=3, left_out={"damaged": 1})


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_training_batch_may_become_empty_and_an_evaluation_has_none(tmp_path, num_workers):
    bad = {"k.png": b"x", "k.cls": b"1", "l.png": b"x", "l.cls": b"1"}
    shards = public(tmp_path / "s", [sound("a", "b"), bad])
    loader = RelevanceLoader(shards, batch_size=1, image_size=8, num_workers=num_workers, damaged="skip")
    batches = list(loader)
    assert sorted(len(batch["key"]) for batch in batches) == [0, 0, 1, 1] and len(loader) == 4
    assert all(len(batch[name]) == len(batch["key"]) for batch in batches for name in ("image", "label", "box"))
    told = RelevanceLoader(shards, batch_size=1, image_size=8, num_workers=num_workers, augment="eval", damaged="skip")
    assert keys_of(told) == ["a", "b"] and all(batch["key"] for batch in told)


def test_an_epoch_without_a_sample_is_an_error(tmp_path):
    shards = public(tmp_path / "s", [{"k.png": b"x", "k.cls": b"1"}, {"l.png": b"x", "l.cls": b"1"}])
    with pytest.raises(
        ZpipeError, match="no sample of the epoch can be used; the first one: .*shard-0000[01].tar: key"
    ):
        load((shards,), batch_size=1, damaged="skip")


def test_only_the_first_reasons_are_kept_and_all_are_counted(tmp_path, monkeypatch):
    monkeypatch.setattr(damage, "MAX_LINES", 3)
    bad = {name: data for number in range(7) for name, data in ((f"{number}.png", b"x"), (f"{number}.cls", b"0"))}
    loader = RelevanceLoader(
        public(tmp_path / "s", [sound("a"), bad]), batch_size=4, image_size=8, damaged="skip", augment="eval"
    )
    assert keys_of(loader) == ["a"]
    assert len(loader.damaged_samples) == 3 and len(loader.damage.places) == 7
    assert str(loader.account()) == "seen 8, taken 1, left out 7 (damaged 7), quarantined 0"


def test_a_map_missing_because_of_a_damaged_image_is_damage_too(data, tmp_path):
    shards = data[0]
    maps = {key: np.ones((CELLS, CELLS)) for key in KEYS}
    root = rewrite_store(
        store(shards, tmp_path / "maps", num_classes=len(KEYS)), maps, {KEYS[2]: "undecodable", KEYS[12]: "zero"}
    )
    with pytest.raises(ZpipeError, match=rf"{KEYS[12]}: no usable map \(zero\)"):
        load((shards, root), augment="eval", damaged="skip")
    rewrite_store(root, maps, {KEYS[2]: "undecodable"})
    with pytest.raises(ZpipeError, match=rf"{KEYS[2]}: no usable map \(undecodable\)"):
        load((shards, root), augment="eval")
    assert keys_of(load((shards, root), augment="eval", damaged="skip")) == [key for key in KEYS if key != KEYS[2]]


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENOMEM])
def test_what_the_process_lacks_is_no_damage_of_a_tar(data, tmp_path, monkeypatch, number):
    shards = copy_shards(data, tmp_path / "s")

    def read_tar(shard, check):
        raise ZpipeError(f"{shard.path}: can't be read") from OSError(number, os.strerror(number))

    monkeypatch.setattr(join, "read_tar", read_tar)
    with pytest.raises(ZpipeError, match="can't be read"):
        load((shards,), damaged="skip")


# ------------------------------------------------------------------------------------------------------------- boxes


@pytest.mark.parametrize(
    "box",
    [
        *(
            "{}",
            '{"x": 1}',
            "[]",
            "[1, 2, 3]",
            "[1, 2, 3, 4, 5]",
            '[1, 2, "3", 4]',
            "[1, 2, null, 4]",
            "[1, 2, true, 4]",
        ),
        *('"1 2 3 4"', "7", "null", "[[1, 2], [3, 4]]", "[5, 5, 1, 1]", "[1, 1, 1, 1]", "[NaN, 0, 1, 1]"),
        *("[0, 0, Infinity, 1]", "[0, 0, 1e300, 1]", f"[0, 0, 1{'0' * 400}, 1]"),
    ],
)
def test_what_others_call_a_box_stops_nobody(tmp_path, box):
    members = sound("a", "b") | {"b.json": f'{{"box": {box}}}'.encode()}
    (batch,) = load((public(tmp_path / "s", [members]),), batch_size=2)
    assert sorted(batch["key"]) == ["a", "b"] and "object_box" not in batch


def test_a_box_of_numbers_is_the_objects(tmp_path):
    members = {"a.png": GOOD, "a.cls": b"0", "a.json": b'{"box": [2, 2.0, 6, 6]}'}
    (batch,) = load((public(tmp_path / "s", [members]),), batch_size=1, augment="eval")
    assert torch.allclose(batch["object_box"], torch.tensor([[1.5 / 7, 1.5 / 7, 5.5 / 7, 5.5 / 7]]), atol=1e-6)
