"""The embedded scenes: the same on every machine, honest splits, and a box that holds the digit."""

import dataclasses
import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from typer.testing import CliRunner

from zpipe.cli import app
from zpipe.pipeline.scenes import SceneConfig, make_scenes
from zpipe.pipeline.sources import SceneSource
from zpipe.schemas.errors import UsageError

# Nothing but the digit, in full ink on black, one pixel a cell: the scene shows the digit's own 8 x 8 values.
BARE = SceneConfig(
    image_size=24,
    digit_size=(8, 8),
    pieces=(0, 0),
    photo_contrast=0.0,
    photo_level=(0, 0),
    ink_level=(255, 255),
)


def scenes(count, *, split="train", seed=0, config=None):
    batches = list(make_scenes(count, split=split, seed=seed, config=config))
    return tuple(np.concatenate([getattr(batch, name) for batch in batches]) for name in ("images", "labels", "boxes"))


def test_the_same_arguments_give_the_same_scenes():
    first, again = scenes(40, seed=3), scenes(40, seed=3)
    for a, b in zip(first, again, strict=True):
        np.testing.assert_array_equal(a, b)
    for other in (scenes(40, seed=4), scenes(40, seed=3, split="val")):
        assert (first[0] != other[0]).any() and (first[2] != other[2]).any()


def test_shapes_types_and_labels():
    images, labels, boxes = scenes(1500)
    assert images.shape == (1500, 48, 48, 3) and images.dtype == np.uint8
    assert labels.shape == (1500,) and labels.dtype == np.int64 and boxes.dtype == np.float32
    assert set(labels) == set(range(10)) and np.bincount(labels).min() > 100
    # Small data sets are the beginning of large ones, across batches too.
    short = scenes(1100)
    for a, b in zip(short, (images, labels, boxes), strict=True):
        np.testing.assert_array_equal(a, b[:1100])


def test_the_splits_share_no_digit():
    """The digits themselves, as they lie in the scenes, and not only their numbers."""
    found = {}
    for split in ("train", "val"):
        images, _, boxes = scenes(6 * 1024, split=split, config=BARE)
        digits = set()
        for image, (x1, y1, x2, y2) in zip(images[..., 0], boxes.astype(int), strict=True):
            assert image[y1:y2, x1:x2].max() > 200
            rows, cols = np.flatnonzero(image.any(axis=1)), np.flatnonzero(image.any(axis=0))
            digits.add(image[rows[0] : rows[-1] + 1, cols[0] : cols[-1] + 1].tobytes())
        found[split] = digits
    assert len(found["train"]) > 1000 and len(found["val"]) > 400
    assert not found["train"] & found["val"]


def check_box(image, box, slack):
    """All strong ink of a scene on a black ground lies in the box, and the box is no larger than the ink needs."""
    ink = image.max(axis=-1) > 127
    rows, cols = np.flatnonzero(ink.any(axis=1)), np.flatnonzero(ink.any(axis=0))
    x1, y1, x2, y2 = box
    assert x1 - 1 <= cols[0] and cols[-1] + 1 <= x2 + 1 and y1 - 1 <= rows[0] and rows[-1] + 1 <= y2 + 1
    assert cols[0] - x1 <= slack and x2 - cols[-1] - 1 <= slack and rows[0] - y1 <= slack and y2 - rows[-1] - 1 <= slack


@pytest.mark.parametrize("size", [8, 13, 20])
def test_the_box_holds_the_ink_of_the_digit(size):
    config = dataclasses.replace(BARE, image_size=40, digit_size=(size, size))
    images, _, boxes = scenes(200, config=config)
    for image, box in zip(images, boxes, strict=True):
        # Faint rims of up to two cells count as ink of the digit but not as strong ink.
        check_box(image, box, slack=2.5 * size / 8)
        assert 0 <= box[0] < box[2] <= 40 and 0 <= box[1] < box[3] <= 40
    assert np.ptp(boxes[:, 0]) > 5 and np.ptp(boxes[:, 1]) > 5  # anywhere, not in one place


def test_pieces_leave_the_digit_alone():
    """With the same seed, scenes with pieces show the digit as it is without them."""
    config = dataclasses.replace(BARE, image_size=48, digit_size=(12, 12))
    bare, labels, boxes = scenes(200, config=config)
    busy, labels2, boxes2 = scenes(200, config=dataclasses.replace(config, pieces=(4, 4)))
    np.testing.assert_array_equal(labels, labels2)
    np.testing.assert_array_equal(boxes, boxes2)
    for a, b, (x1, y1, x2, y2) in zip(bare, busy, np.rint(boxes).astype(int), strict=True):
        np.testing.assert_array_equal(a[y1:y2, x1:x2], b[y1:y2, x1:x2])
        assert (a != b).any()


sizes = st.integers(2, 24)


@settings(max_examples=12, deadline=None)
@given(
    sizes,
    sizes,
    sizes,
    sizes,
    st.integers(0, 5),
    st.integers(0, 3),
    st.integers(0, 16),
    st.sampled_from(["train", "val"]),
)
def test_any_config_that_is_accepted_can_be_drawn(d1, d2, p1, p2, pieces, more, room, split):
    config = SceneConfig(
        digit_size=(min(d1, d2), max(d1, d2)),
        piece_size=(min(p1, p2), max(p1, p2)),
        pieces=(pieces, pieces + more),
        image_size=max(d1, d2, p1, p2) + room,
    )
    images, labels, boxes = scenes(8, split=split, config=config)
    assert images.shape == (8, config.image_size, config.image_size, 3)
    assert ((labels >= 0) & (labels <= 9)).all()
    assert (boxes[:, :2] >= 0).all() and (boxes[:, 2:] <= config.image_size).all()
    assert (boxes[:, :2] < boxes[:, 2:]).all()
    assert (boxes[:, 2:] - boxes[:, :2] <= config.digit_size[1]).all()


@pytest.mark.parametrize(
    "changes",
    [
        {"digit_size": (12, 11)},
        {"digit_size": (1, 4)},
        {"digit_size": (11.0, 13.0)},
        {"pieces": (-1, 2)},
        {"photo_level": (0, 300)},
        {"photo_contrast": 1.5},
        {"photo_contrast": float("nan")},
        {"image_size": 12},
        {"image_size": 81},
        {"image_size": True},
    ],
)
def test_a_config_that_makes_no_sense_is_refused(changes):
    with pytest.raises(UsageError, match=f"SceneConfig.({next(iter(changes))}|image_size)"):
        SceneConfig(**changes)


@pytest.mark.parametrize("arguments", [{"split": "test"}, {"count": -1}, {"seed": -1}])
def test_arguments_are_checked_at_the_call(arguments):
    with pytest.raises(UsageError):
        make_scenes(**({"count": 1, "split": "train", "seed": 0} | arguments))
    assert list(make_scenes(0, split="train", seed=0)) == []


def test_the_mask_is_the_ink_of_the_digit():
    (batch,) = make_scenes(300, split="train", seed=0, config=BARE)
    assert batch.masks.shape == (300, 24, 24) and batch.masks.dtype == np.uint8
    np.testing.assert_array_equal(batch.masks, batch.images[..., 0] > 130)  # 8 of 16 grey levels are 128
    (busy,) = make_scenes(300, split="train", seed=0)
    for mask, (x1, y1, x2, y2) in zip(busy.masks, busy.boxes, strict=True):
        rows, columns = np.nonzero(mask)
        assert len(rows) > 5 and set(np.unique(mask)) == {0, 1}
        assert x1 - 1 <= columns.min() and columns.max() < x2 + 1 and y1 - 1 <= rows.min() and rows.max() < y2 + 1


def test_masks_are_written_beside_the_shards(tmp_path):
    source = SceneSource(count=7, split="val", seed=1, config=BARE, shard_size=3)
    source.write_masks(tmp_path / "masks")
    keys = [record.key for part in range(source.parts()) for record in source.records(part)]
    assert sorted(path.stem for path in (tmp_path / "masks").iterdir()) == sorted(keys)
    for part in range(source.parts()):
        for record in source.records(part):
            image = np.asarray(Image.open(io.BytesIO(record.image)).convert("L"))
            mask = np.asarray(Image.open(tmp_path / "masks" / f"{record.key}.png"))
            assert ((image > 127) == (mask == 1)).mean() > 0.97  # the image is a JPEG


def test_the_command_writes_masks_of_scenes_only(tmp_path):
    def call(*words):
        return CliRunner().invoke(app, ["make-shards", *map(str, words)])

    done = call("scenes", tmp_path / "scenes", "--count", 5, "--masks", tmp_path / "masks")
    assert done.exit_code == 0 and len(list((tmp_path / "masks").iterdir())) == 5, done.output
    (tmp_path / "photos" / "cats").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(tmp_path / "photos" / "cats" / "a.png")
    refused = call(tmp_path / "photos", tmp_path / "shards", "--masks", tmp_path / "more")
    assert refused.exit_code == 2 and "only the embedded scenes have masks" in refused.output
    assert not (tmp_path / "shards").exists() and not (tmp_path / "more").exists()
