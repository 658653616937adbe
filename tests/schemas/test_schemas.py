"""The contracts: what a sample is, what a commit promises, where a crop lies in a map, what the index files hold."""

import dataclasses
import errno
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from any_json import any_json
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from provenances import PROVENANCE

from zpipe.schemas import atomic, manifest, shard_index, storage
from zpipe.schemas.account import Account
from zpipe.schemas.errors import UsageError, ZpipeError, remedy_for
from zpipe.schemas.geometry import Box, covered_share, crop_map, overlap_weights
from zpipe.schemas.relevance_store import STATUSES
from zpipe.schemas.sample import group_samples, key_for_file, shard_stem, split_name


def names_below(root):
    return sorted(str(path.relative_to(root)) for path in root.rglob("*"))


# ------------------------------------------------------------------------------------------------------- samples


@pytest.mark.parametrize(
    ("name", "key", "suffix"),
    [
        ("0001.jpg", "0001", "jpg"),
        ("0001.JPEG", "0001", "jpeg"),
        ("n01440764_10026.PNG", "n01440764_10026", "png"),
        ("a.b.jpg", "a", "b.jpg"),
        ("train.v2/a.b.cls", "train.v2/a", "b.cls"),
        ("train.v2/README", "train.v2/README", ""),
        ("./a.json", "./a", "json"),
    ],
)
def test_names_are_cut_at_the_first_dot_of_the_last_part(name, key, suffix):
    assert split_name(name) == (key, suffix)


def group(*members):
    return list(group_samples(members, "x.tar"))


def test_members_next_to_each_other_make_a_sample():
    found = group(
        ("a.JPEG", b"A"),
        ("a.cls", b" 3\n"),
        ("a.json", b'{"box": [1, 2]}'),
        ("dir/b.json", b'{"label": 4}'),
        ("dir/b.png", b"B"),
        ("c.webp", b"C"),
    )
    assert [(s.key, s.image, s.label) for s in found] == [("a", b"A", 3), ("dir/b", b"B", 4), ("c", b"C", None)]
    assert found[0].meta == {"box": [1, 2]} and found[2].meta == {}


def test_the_class_file_wins_over_the_label_in_json():
    assert group(("a.jpg", b"A"), ("a.json", b'{"label": 4}'), ("a.cls", b"7"))[0].label == 7


@pytest.mark.parametrize("name", ["a.pyd", "a.pkl", "a.pth", "a.seg.png", "__MACOSX/._a.jpg", "a.txt", "LICENSE"])
def test_members_of_other_kinds_are_not_looked_at(name):
    assert [s.key for s in group(("a.jpg", b"A"), (name, b"\x80bad"), ("a.cls", b"1"))] == ["a"]


@pytest.mark.parametrize(
    ("members", "told"),
    [
        ([("k.cls", b"1")], "one image, found cls"),
        ([("k.jpg", b"A"), ("k.png", b"B")], "one image, found jpg, png"),
        ([("k.jpg", b"A"), ("k.JPG", b"B")], "two .jpg members"),
        ([("k.jpg", b"A"), ("k.cls", b"ant")], "b'ant', not a class index"),
        ([("k.jpg", b"A"), ("k.cls", b"\xff\xfe")], "not a class index"),
        ([("k.jpg", b"A"), ("k.cls", b"")], "not a class index"),
        ([("k.jpg", b"A"), ("k.json", b"{")], ".json can't be read"),
        ([("k.jpg", b"A"), ("k.json", b"\xff")], ".json can't be read"),
        ([("k.jpg", b"A"), ("k.json", b"[1]")], ".json is not an object"),
        ([("k.jpg", b"A"), ("k.json", b'{"label": "3"}')], "label '3', not a class index"),
        ([("k.jpg", b"A"), ("k.json", b'{"label": true}')], "label True, not a class index"),
        ([("k.jpg", b"A"), ("k.cls", b"1099511627776")], "label 1099511627776 is no class index, which has 32 bits"),
        ([("k.jpg", b"A"), ("k.json", b'{"label": -2147483649}')], "label -2147483649 is no class index"),
        ([("k.jpg", b"A"), ("l.jpg", b"B"), ("k.jpg", b"A")], "comes twice; rebuild this shard with unique keys"),
        (
            [("k.jpg", b"A"), ("l.jpg", b"B"), ("k.cls", b"1")],
            "its members stand apart (.cls comes after other samples)",
        ),
        (
            [("k.cls", b"1"), ("l.cls", b"1"), ("k.jpg", b"A")],
            "found cls; where the image stands apart from it, unpack",
        ),
        ([("k.jpg", b"A"), ("k.json", b"[" + b" " * (1 << 24) + b"]")], "its .json has more than 16777216 bytes"),
        ([("k.jpg", b"A"), ("k.cls", b"1" * 2000)], "its .cls has more than 1024 bytes"),
    ],
)
def test_a_broken_sample_is_named_in_one_line(members, told):
    with pytest.raises(ZpipeError) as error:
        group(*members)
    text = str(error.value)
    assert told in text and text.startswith("x.tar: key k: ") and "\n" not in text


def test_labels_go_as_far_as_a_store_keeps_them():
    found = group(("a.jpg", b"A"), ("a.cls", b"2147483647"), ("b.jpg", b"B"), ("b.cls", b"-2147483648"))
    assert [sample.label for sample in found] == [2**31 - 1, -(2**31)]


@pytest.mark.parametrize(
    ("path", "stem", "whole"),
    [
        ("ant/a.jpg", "a", "ant__a"),
        ("ant/v1.2/a.b.JPEG", "a_b", "ant__v1_2__a_b"),
        ("a.jpg", "a", "a"),
        ("noend", "noend", "noend"),
        ("v1.0/img1", "img1", "v1_0__img1"),
        ("v1.0/.img", "_img", "v1_0___img"),
    ],
)
def test_keys_of_files_hold_no_dot(path, stem, whole):
    assert key_for_file(path) == stem and key_for_file(path, "path") == whole


@given(st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1))
def test_a_key_comes_back_from_the_member_name_it_gets(path):
    key = key_for_file(path, "path")
    assert split_name(f"{key}.jpg") == (key, "jpg")


@pytest.mark.parametrize(("name", "stem"), [("a/b-00.tar", "b-00"), ("b.v1.tar", "b.v1"), ("c", "c")])
def test_the_stem_of_a_shard(name, stem):
    assert shard_stem(name) == stem


# ------------------------------------------------------------------------------------------------ commit in one step


class Stop(Exception):
    pass


@pytest.mark.parametrize(("error", "seen"), [(Stop(), Stop), (OSError(28, "No space left on device"), ZpipeError)])
@pytest.mark.parametrize("before", [b"old", None])
def test_a_failed_commit_leaves_the_old_file_and_nothing_else(tmp_path, before, error, seen):
    path = tmp_path / "file.json"
    if before:
        path.write_bytes(before)
    with pytest.raises(seen) as caught, atomic.commit(path) as tmp:
        tmp.write_bytes(b"half")
        assert (path.read_bytes() if before else None) == before
        raise error
    assert names_below(tmp_path) == (["file.json"] if before else [])
    assert not before or path.read_bytes() == before
    if seen is ZpipeError:
        assert str(caught.value).startswith(f"{path}: ") and "No space left" in str(caught.value)


@pytest.mark.parametrize("before", [True, False])
def test_a_folder_is_committed_whole_or_not_at_all(tmp_path, before):
    path = tmp_path / "deep" / "folder"
    if before:
        path.mkdir(parents=True)
        (path / "old").write_text("old")
    with pytest.raises(Stop), atomic.commit(path) as tmp:
        tmp.mkdir()
        (tmp / "half").write_text("half")
        raise Stop
    assert names_below(path.parent) == (["folder", "folder/old"] if before else [])
    with atomic.commit(path) as tmp:
        (tmp / "c" / "0").mkdir(parents=True)
        (tmp / "c" / "0" / "new").write_text("new")
    assert names_below(path.parent) == ["folder", "folder/c", "folder/c/0", "folder/c/0/new"]


def test_names_of_any_legal_length_are_written(tmp_path):
    for name in ("n" * 240 + ".parquet", "ü" * 120 + ".json", "n" * 255, "\udcff" * 200):
        atomic.write_bytes(tmp_path / name, b"new")
        assert (tmp_path / name).read_bytes() == b"new"
        assert storage.temporary_sibling(tmp_path / name).suffix == (tmp_path / name).suffix
        assert not storage.create_exclusively(tmp_path / name, b"x")
    with pytest.raises(ZpipeError, match="could not be written .File name too long.; give a shorter name, then run"):
        atomic.write_bytes(tmp_path / ("n" * 256), b"new")
    assert len(os.listdir(tmp_path)) == 4


@pytest.mark.parametrize(
    ("number", "remedy"),
    [
        (errno.ENOSPC, "free space on that disk"),
        (errno.EDQUOT, "within your quota"),
        (errno.EACCES, "fix the permissions"),
        (errno.EROFS, "read-only: give a path on another one"),
        (errno.ENAMETOOLONG, "give a shorter name"),
        (errno.EMFILE, "ulimit -n"),
        (errno.EIO, "check the disk"),
        (errno.ENOTDIR, "a part of this one is a file"),
        (errno.ECHILD, "check the path and the disk"),
    ],
)
def test_the_remedy_fits_the_cause(tmp_path, number, remedy):
    with pytest.raises(ZpipeError) as error, atomic.commit(tmp_path / "x"):
        raise OSError(number, os.strerror(number), "x")
    assert str(error.value).startswith(f"{tmp_path / 'x'}: could not be written ({os.strerror(number)}); ")
    assert remedy in str(error.value) and ("free space" in str(error.value)) == (number in (errno.ENOSPC, errno.EDQUOT))


def test_the_remedy_for_what_has_no_number():
    assert remedy_for(PermissionError("Access Denied")) == remedy_for(OSError(errno.EACCES, ""))
    assert remedy_for(FileNotFoundError("the bucket")) == "check the path"
    assert remedy_for(RuntimeError("EndpointConnectionError")) == "check address, access and space"


def test_links_below_our_folders_are_refused(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "store").symlink_to("real")
    atomic.refuse_links(tmp_path / "store", ("maps", "index"), "store")  # absent, and the root may be a link
    (tmp_path / "real" / "maps").mkdir()
    for target in (tmp_path, "nowhere"):
        (tmp_path / "real" / "index").symlink_to(target)
        with pytest.raises(UsageError, match="index: is a link, and the store would be written to another place"):
            atomic.refuse_links(tmp_path / "store", ("maps", "index"), "store")
        (tmp_path / "real" / "index").unlink()
    (tmp_path / ".tmp-1").symlink_to("real")
    atomic.clear_temporaries(tmp_path)
    assert names_below(tmp_path) == ["real", "real/maps", "store"]


def test_a_folder_takes_the_place_of_a_link_and_not_of_its_target(tmp_path):
    (tmp_path / "far").mkdir()
    (tmp_path / "far" / "kept").touch()
    for target in ("far", "nowhere"):
        (tmp_path / "out").symlink_to(target)
        with atomic.commit(tmp_path / "out") as tmp:
            tmp.mkdir()
        assert not (tmp_path / "out").is_symlink() and names_below(tmp_path) == ["far", "far/kept", "out"]
        (tmp_path / "out").rmdir()


def test_only_files_of_ours_are_replaced(tmp_path):
    ours, photo = tmp_path / "ours.PNG", tmp_path / "photo.png"
    ours.write_bytes(b"PNG zpipe")
    photo.write_bytes(b"PNG" + bytes(10_000))
    (tmp_path / "folder.png").mkdir()
    os.mkfifo(tmp_path / "fifo.png")
    for path in (ours, tmp_path / "new.png", tmp_path / "none" / "new.png"):
        atomic.check_out_file(path, (".png",))
    for name, told in (
        ("photo.png", "exists, and zpipe did not write it; give another path"),
        ("api.py", r"ends in .png or .jpg; give such a name"),
        ("photo", r"ends in .png or .jpg"),
        ("folder.png", "can't be replaced .is a folder"),
        ("fifo.png", "can't be replaced .is a FIFO"),
    ):
        with pytest.raises(UsageError, match=told):
            atomic.check_out_file(tmp_path / name, (".png", ".jpg"))


def test_a_killed_commit_leaves_the_old_content_and_the_next_one_clears_up(tmp_path):
    (tmp_path / "marker").write_text("old")
    code = (
        "import sys, os, signal, pathlib; from zpipe.schemas.atomic import commit\n"
        "with commit(pathlib.Path(sys.argv[1])) as tmp:\n"
        "    tmp.write_text('half'); os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "marker")], timeout=60)
    assert done.returncode == -signal.SIGKILL
    assert (tmp_path / "marker").read_text() == "old" and len(names_below(tmp_path)) == 2
    atomic.claim_folder(tmp_path, "marker", "things")
    assert names_below(tmp_path) == ["marker"]


def test_a_full_disk_is_one_line_and_leaves_the_old_file(small_disk):
    path = small_disk.root / "file"
    atomic.write_bytes(path, b"old")
    small_disk.fill()
    with pytest.raises(ZpipeError, match=r"file: could not be written \(No space left on device\)"):
        atomic.write_bytes(path, bytes(100_000))
    assert path.read_bytes() == b"old" and names_below(small_disk.root) == ["file", "filler"]


def test_claiming_a_folder(tmp_path):
    new = tmp_path / "a" / "b"
    atomic.claim_folder(new, "marker", "things")
    assert new.is_dir()
    atomic.claim_folder(new, "marker", "things")  # empty
    (new / ".tmp-1-x").mkdir()
    atomic.claim_folder(new, "marker", "things")
    assert names_below(new) == []
    (new / "thesis.tex").write_text("dear")
    (new / ".tmp-1-x").write_text("not ours to remove")
    with pytest.raises(UsageError, match=r"holds something else \(thesis.tex\); give an empty or new folder"):
        atomic.claim_folder(new, "marker", "things")
    assert names_below(new) == [".tmp-1-x", "thesis.tex"]
    (new / "marker").write_text("")
    atomic.claim_folder(new, "marker", "things")
    assert names_below(new) == ["marker", "thesis.tex"]
    with pytest.raises(UsageError, match="is a file, not a folder"):
        atomic.claim_folder(new / "marker", "marker", "things")
    with pytest.raises(UsageError, match="can't be used"):
        atomic.claim_folder(new / "marker" / "below", "marker", "things")


def test_json_keeps_any_text_and_refuses_nan(tmp_path):
    value = {"class": "Bär 🐻", "n": [1, 2.5, None]}
    atomic.write_json(tmp_path / "x.json", value)
    assert json.loads((tmp_path / "x.json").read_bytes()) == value
    with pytest.raises(ValueError, match="not JSON compliant"):
        atomic.write_json(tmp_path / "x.json", {"n": float("nan")})
    assert json.loads((tmp_path / "x.json").read_bytes()) == value and names_below(tmp_path) == ["x.json"]


# ------------------------------------------------------------------------------------------------------- geometry

side = st.floats(1.0, 1000.0)
share = st.floats(0.0, 1.0)


@st.composite
def crops(draw):
    """A map grid, a frame and a crop inside it: neither square, nor at the origin, nor aligned to the grid."""
    gh, gw = draw(st.integers(2, 16)), draw(st.integers(2, 16))
    x, y, width, height = draw(share) * 50, draw(share) * 50, draw(side), draw(side)
    frame = Box(x, y, x + width, y + height)
    x1, y1 = frame.x1 + draw(share) * 0.9 * width, frame.y1 + draw(share) * 0.9 * height
    x2 = x1 + max(0.05, draw(share)) * (frame.x2 - x1)
    y2 = y1 + max(0.05, draw(share)) * (frame.y2 - y1)
    return (gh, gw), frame, Box(x1, y1, x2, y2), (draw(st.integers(1, 12)), draw(st.integers(1, 12)))


@given(crops(), st.booleans(), st.sampled_from("xy"))
def test_the_crop_of_a_ramp_is_the_ramp_at_the_crop(case, flip, axis):
    """A map that rises linearly in x (or y) through its cell centres, cropped to cells whose edges are cell edges.

    On such a staircase the mean over any stretch between cell edges is the value of the line at the stretch's centre.
    """
    (gh, gw), frame, crop, _ = case
    rows = sorted({round((edge - frame.y1) / frame.height * gh) for edge in (crop.y1, crop.y2)})
    cols = sorted({round((edge - frame.x1) / frame.width * gw) for edge in (crop.x1, crop.x2)})
    rows, cols = (rows if len(rows) == 2 else [0, gh]), (cols if len(cols) == 2 else [0, gw])
    aligned = Box(
        frame.x1 + cols[0] / gw * frame.width,
        frame.y1 + rows[0] / gh * frame.height,
        frame.x1 + cols[1] / gw * frame.width,
        frame.y1 + rows[1] / gh * frame.height,
    )
    centres_x = frame.x1 + (np.arange(gw) + 0.5) / gw * frame.width
    centres_y = frame.y1 + (np.arange(gh) + 0.5) / gh * frame.height
    ramp = np.broadcast_to(centres_x[None, :] if axis == "x" else centres_y[:, None], (gh, gw))
    found = crop_map(ramp, frame, aligned, (rows[1] - rows[0], cols[1] - cols[0]), flip=flip)
    xs = centres_x[cols[0] : cols[1]][:: -1 if flip else 1]
    ys = centres_y[rows[0] : rows[1]]
    expected = np.broadcast_to(xs[None, :] if axis == "x" else ys[:, None], found.shape)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-3)


@given(crops(), st.booleans())
def test_any_crop_of_a_ramp_stays_within_a_cell_of_it(case, flip):
    """Unaligned crops, too: a staircase is at most half a cell away from its line, in x and y at their own scales."""
    (gh, gw), frame, crop, (out_h, out_w) = case
    for n, origin, extent, low, high, out, axis in (
        (gw, frame.x1, frame.width, crop.x1, crop.x2, out_w, 1),
        (gh, frame.y1, frame.height, crop.y1, crop.y2, out_h, 0),
    ):
        line = origin + (np.arange(n) + 0.5) / n * extent
        ramp = np.broadcast_to(line[None, :] if axis else line[:, None], (gh, gw))
        found = crop_map(ramp, frame, crop, (out_h, out_w), flip=flip)
        centres = low + (np.arange(out) + 0.5) / out * (high - low)
        if axis and flip:
            centres = centres[::-1]
        along = found[0] if axis else found[:, 0]
        assert np.abs(along - centres).max() <= 0.5 * extent / n * 1.001 + 1e-3


def test_a_crop_on_the_hot_quadrant_is_hot():
    """Width and height swapped, or (top, left) taken for (x, y), reads zero here."""
    hot = np.zeros((6, 4))
    hot[0:3, 2:4] = 1.0  # the upper right quarter of a 400 x 300 image
    frame = Box.full(400, 300)
    found = crop_map(hot, frame, Box(200, 0, 400, 150), (5, 7))
    assert (found[:4, 1:] > 0.9).all() and found.min() >= 0.25  # next to the cold ones it is between the two
    assert (crop_map(hot, frame, Box(200, 0, 400, 150), (3, 2)) == 1).all()
    for cold in (Box(0, 0, 200, 150), Box(0, 150, 200, 300), Box(200, 150, 400, 300)):
        assert crop_map(hot, frame, cold, (5, 7)).mean() < 0.2
        assert (crop_map(hot, frame, cold, (3, 2)) == 0).all()
    assert crop_map(hot, frame, Box(100, 75, 300, 225), (1, 1)).item() == pytest.approx(0.25)


def shrinking(case):
    """The same crop, resampled to no more cells than the map has under it."""
    (gh, gw), frame, crop, (out_h, out_w) = case
    most = crop.height / frame.height * gh, crop.width / frame.width * gw
    return max(1, min(out_h, int(most[0]))), max(1, min(out_w, int(most[1])))


@given(crops(), st.integers(0, 2**32 - 1), st.booleans())
def test_mass_is_conserved(case, seed, flip):
    """Where a map shrinks: mean times area is the integral of the map over the crop, whatever the output size."""
    (gh, gw), frame, crop, _ = case
    size = shrinking(case)
    assume(crop.height / frame.height * gh >= size[0] and crop.width / frame.width * gw >= size[1])
    relevance = np.random.default_rng(seed).random((gh, gw))
    found = crop_map(relevance, frame, crop, size, flip=flip)
    rows, cols = (
        np.clip(np.minimum(high, np.arange(1, n + 1)) - np.maximum(low, np.arange(n)), 0, None)
        for low, high, n in (
            ((crop.y1 - frame.y1) / frame.height * gh, (crop.y2 - frame.y1) / frame.height * gh, gh),
            ((crop.x1 - frame.x1) / frame.width * gw, (crop.x2 - frame.x1) / frame.width * gw, gw),
        )
    )
    mass = rows @ relevance @ cols
    cells = rows.sum() * cols.sum()
    assert found.mean(dtype=np.float64) * cells == pytest.approx(mass, rel=1e-3, abs=1e-6)


@given(crops(), st.integers(0, 2**32 - 1))
def test_growing_is_bilinear_interpolation(case, seed):
    """Against torch's grid_sample at the centres of the output's cells."""
    (gh, gw), frame, crop, (out_h, out_w) = case
    out_h = max(out_h, int(np.ceil(crop.height / frame.height * gh)) + 1)
    out_w = max(out_w, int(np.ceil(crop.width / frame.width * gw)) + 1)
    relevance = np.random.default_rng(seed).normal(size=(gh, gw))
    ys = (crop.y1 + (np.arange(out_h) + 0.5) / out_h * crop.height - frame.y1) / frame.height * 2 - 1
    xs = (crop.x1 + (np.arange(out_w) + 0.5) / out_w * crop.width - frame.x1) / frame.width * 2 - 1
    grid = torch.from_numpy(np.stack(np.broadcast_arrays(xs[None, :], ys[:, None]), axis=-1))[None]
    wanted = torch.nn.functional.grid_sample(
        torch.from_numpy(relevance)[None, None], grid, mode="bilinear", padding_mode="border", align_corners=False
    )
    np.testing.assert_allclose(crop_map(relevance, frame, crop, (out_h, out_w)), wanted[0, 0], atol=1e-5)


@given(crops(), st.integers(0, 2**32 - 1))
def test_crop_then_look_up_is_look_up_then_crop(case, seed):
    """A crop of a crop is the crop, on maps that have no detail finer than the crop's cells: planes."""
    (gh, gw), frame, crop, _ = case
    a, b = np.random.default_rng(seed).normal(size=2)
    rows, cols = np.arange(gh) + 0.5, np.arange(gw) + 0.5
    plane = a * rows[:, None] / gh + b * cols[None, :] / gw
    found = crop_map(plane, frame, crop, (9, 7))
    y = (crop.y1 + (np.arange(9) + 0.5) / 9 * crop.height - frame.y1) / frame.height
    x = (crop.x1 + (np.arange(7) + 0.5) / 7 * crop.width - frame.x1) / frame.width
    # Beyond the outermost centres a map is continued by its last value.
    y, x = np.clip(y, 0.5 / gh, 1 - 0.5 / gh), np.clip(x, 0.5 / gw, 1 - 0.5 / gw)
    if crop.height / frame.height * gh <= 9 and crop.width / frame.width * gw <= 7:
        np.testing.assert_allclose(found, a * y[:, None] + b * x[None, :], atol=1e-5)


@given(crops(), st.integers(0, 2**32 - 1))
def test_a_flip_mirrors_columns_and_the_whole_frame_is_the_map(case, seed):
    grid, frame, crop, size = case
    relevance = np.random.default_rng(seed).normal(size=grid).astype(np.float32)
    plain, mirrored = (crop_map(relevance, frame, crop, size, flip=flip) for flip in (False, True))
    np.testing.assert_array_equal(mirrored, plain[:, ::-1])
    np.testing.assert_allclose(crop_map(relevance, frame, frame, grid), relevance, rtol=1e-5, atol=1e-6)


@given(st.integers(1, 20), share, share, st.integers(1, 20))
def test_weights_are_shares_of_each_output_cell(n_in, a, b, n_out):
    start, stop = sorted((a * n_in, b * n_in))
    if stop - start < 1e-6:
        start, stop = 0.0, float(n_in)
    weights = overlap_weights(n_in, start, stop, n_out)
    assert weights.shape == (n_out, n_in) and (weights >= 0).all()
    np.testing.assert_allclose(weights.sum(axis=1), 1.0)


@pytest.mark.parametrize("corners", [(1, 0, 1, 2), (2, 0, 1, 2), (0, 2, 1, 2), (0, 3, 1, 2), (0, 0, float("nan"), 1)])
def test_a_box_without_area_is_refused(corners):
    with pytest.raises(ValueError, match="x1 < x2 and y1 < y2"):
        Box(*corners)


def test_a_crop_that_leaves_the_frame_is_refused():
    frame = Box.full(400, 300)
    for outside in (Box(-1, 0, 100, 100), Box(0, -1, 100, 100), Box(0, 0, 401, 100), Box(0, 0, 100, 400)):
        assert not frame.contains(outside)
        with pytest.raises(ValueError, match="leaves the frame"):
            crop_map(np.ones((4, 4)), frame, outside, (2, 2))
    assert frame.contains(Box(-1e-4, 0, 400 + 1e-4, 300))
    assert np.isfinite(crop_map(np.ones((4, 4)), frame, Box(-1e-4, 0, 400 + 1e-4, 300), (2, 2))).all()
    assert Box(1, 2, 4, 8).as_tuple() == (1, 2, 4, 8) and (Box(1, 2, 4, 8).width, Box(1, 2, 4, 8).height) == (3, 6)


@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 50), st.integers(1, 50), st.data())
def test_the_shares_under_a_box_add_up_to_its_area(rows, columns, height, width, data):
    edge = st.floats(-5, 60, allow_nan=False)
    (x1, x2), (y1, y2) = (sorted((data.draw(edge), data.draw(edge))) for _ in range(2))
    assume(x1 < x2 and y1 < y2)
    shares = covered_share((rows, columns), Box(x1, y1, x2, y2), (height, width))
    assert shares.shape == (rows, columns) and (shares >= 0).all() and (shares <= 1 + 1e-9).all()
    inside = max(0.0, min(x2, width) - max(x1, 0)) * max(0.0, min(y2, height) - max(y1, 0))
    assert shares.sum() * (height / rows) * (width / columns) == pytest.approx(inside, rel=1e-6, abs=1e-6)


# ----------------------------------------------------------------------------------------------------- shard index


def entry(name="a.tar", **changes):
    return shard_index.ShardEntry(
        **({"name": name, "count": 3, "bytes": 2000, "sha256": "0" * 64, "keys_sha256": "1" * 64} | changes)
    )


def test_a_shard_index_comes_back_as_it_was_written(tmp_path):
    index = shard_index.ShardIndex(shards=(entry(), entry("b.tar", count=4)), classes=("ant", "Bär"), source="x")
    shard_index.write_index(tmp_path, index)
    assert shard_index.read_index(tmp_path) == index and index.count == 7
    assert json.loads((tmp_path / "shards.json").read_text())["count"] == 7


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"format": "other"}, "is 'other' version 1, expected 'zpipe-shards' version 2; run make-shards again"),
        ({"version": 3}, "version 3"),
        ({"shards": [{"name": "a.tar"}]}, "not readable as a shard index .Object missing required field `count`"),
        ({"shards": [7]}, r"Expected `object`, got `int` - at `\$.shards"),
        ({"classes": None}, "Expected `array`, got `null`"),
        ({"classes": "ant"}, "Expected `array`, got `str`"),
        ({"count": 4}, "its count is 4, that of its shards together 3"),
        *(
            ({"shards": [vars(entry()) | change]}, told)
            for change, told in [
                ({"count": -3}, "Expected `int` >= 0"),
                ({"count": 1.5}, "got `float`"),
                ({"count": 10**30}, "`int`"),
                ({"name": 7}, "got `int`"),
                ({"name": "../a.tar"}, r"'../a.tar' is no file name of a tar - at `\$.shards"),
                ({"name": "b/a.tar"}, "is no file name"),
                ({"name": "a\n.tar"}, r"'a\\n.tar' has unprintable"),
                ({"name": "a.zip"}, "is no file name"),
                ({"sha256": 7}, "got `int`"),
                ({"sha256": "a"}, "matching regex"),
                ({"bytes": None}, "got `null`"),
            ]
        ),
    ],
)
def test_a_damaged_shard_index_is_refused(tmp_path, change, told):
    shard_index.write_index(tmp_path, shard_index.ShardIndex(shards=(entry(),)))
    path = tmp_path / "shards.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ZpipeError, match=told):
        shard_index.read_index(tmp_path)


def test_two_shards_of_one_name_are_refused(tmp_path):
    shard_index.write_index(tmp_path, shard_index.ShardIndex(shards=(entry(), entry())))
    with pytest.raises(ZpipeError, match="two shards share a name"):
        shard_index.read_index(tmp_path)


def test_folder_and_index_must_name_the_same_tars(tmp_path):
    index = shard_index.ShardIndex(shards=(entry("a.tar"), entry("b.tar")))
    for name in ("a.tar", "b.tar"):
        (tmp_path / name).write_bytes(bytes(2000))
    folder, tars = shard_index.find_shards(tmp_path)
    assert folder == tmp_path and [tar.name for tar in tars] == ["a.tar", "b.tar"]
    assert shard_index.check_listed(tmp_path, tars, index, whole_folder=True) == list(index.shards)
    assert shard_index.check_listed(tmp_path, tars[:1], index, whole_folder=False) == [index.shards[0]]
    too_many = shard_index.ShardIndex(shards=(entry("a.tar", count=4), entry("b.tar")))
    with pytest.raises(ZpipeError, match="says that a.tar holds 4 samples, too many for its 2000 bytes"):
        shard_index.check_listed(tmp_path, tars, too_many, whole_folder=True)
    with pytest.raises(ZpipeError, match="b.tar: listed in shards.json but not there"):
        shard_index.check_listed(tmp_path, tars[:1], index, whole_folder=True)
    (tmp_path / "b.tar").write_bytes(bytes(1999))
    with pytest.raises(ZpipeError, match=r"b.tar: 1999 bytes, but shards.json says 2000: truncated or altered"):
        shard_index.check_listed(tmp_path, tars, index, whole_folder=True)
    (tmp_path / "b.tar").rename(tmp_path / "c.tar")
    with pytest.raises(ZpipeError, match="c.tar: not listed"):
        shard_index.check_listed(tmp_path, [tmp_path / "c.tar"], index, whole_folder=False)


def test_finding_shards(tmp_path):
    with pytest.raises(UsageError, match="no such folder"):
        shard_index.find_shards(tmp_path / "none")
    (tmp_path / ".tmp-1-a.tar").write_bytes(b"")
    with pytest.raises(UsageError, match="holds no .tar file"):
        shard_index.find_shards(tmp_path)
    (tmp_path / "a.zip").write_bytes(b"")
    with pytest.raises(UsageError, match="not a .tar file"):
        shard_index.find_shards(tmp_path / "a.zip")
    (tmp_path / "a.tar").write_bytes(b"")
    assert shard_index.find_shards(tmp_path / "a.tar") == (tmp_path, [tmp_path / "a.tar"])


def test_digests_know_order_and_content(tmp_path):
    assert shard_index.digest_keys(["a", "b"]) != shard_index.digest_keys(["b", "a"])
    (tmp_path / "x").write_bytes(b"abc")
    assert shard_index.digest_file(tmp_path / "x").startswith("ba7816bf")


# ------------------------------------------------------------------------------------------------ where files lie


def test_a_file_is_created_by_one_of_two(tmp_path):
    assert storage.create_exclusively(tmp_path / "x", b"mine")
    assert not storage.create_exclusively(tmp_path / "x", b"theirs")
    assert (tmp_path / "x").read_bytes() == b"mine" and names_below(tmp_path) == ["x"]
    assert storage.folder_bytes(tmp_path) == 4 and storage.storage_options(tmp_path) is None


def test_a_remote_write_that_fails_is_one_line(monkeypatch):
    path = storage.as_path("memory://failing/file.json")

    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(type(path.fs), "put_file", refuse)
    with pytest.raises(ZpipeError, match=r"file\.json: could not be written .Permission denied.; fix the permissions"):
        atomic.write_json(path, {})
    assert not path.exists()


def test_a_store_whose_library_is_missing_is_one_line(monkeypatch):
    path = storage.as_path("memory://somewhere")

    def absent(self, **kwargs):
        raise ImportError("Install gcsfs to access Google Storage\nmore of it")

    monkeypatch.setattr(type(path), "exists", absent)
    with pytest.raises(
        UsageError, match="Install gcsfs to access Google Storage; install the extra s3 or gcs"
    ) as error:
        storage.check_reachable(path)
    assert "\n" not in str(error.value)


# -------------------------------------------------------------------------------------------------------- manifest

MANIFEST = manifest.StoreManifest(
    provenance=PROVENANCE,
    shards=(manifest.MapShard(stem="a", count=3, input_sha256="1" * 64, index_sha256="2" * 64),),
    statuses={"ok": 2, "zero": 1},
    source="shards",
    zpipe_version="0.1.0",
)


def test_a_manifest_comes_back_as_it_was_written(tmp_path):
    manifest.write_manifest(tmp_path, MANIFEST)
    manifest.write_extraction(tmp_path, PROVENANCE)
    assert manifest.read_manifest(tmp_path) == MANIFEST and MANIFEST.count == 3
    assert manifest.read_extraction(tmp_path) == PROVENANCE
    assert manifest.read_extraction(tmp_path / "none") is None


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"num_classes": 6}, "made with num_classes = 5, this run has 6; give another --out folder"),
        ({"grid": (14, 14)}, r"grid = \[4, 6\], this run has \[14, 14\]"),
        ({"teacher_args": {"img_size": [96, 64]}}, r"\{\"img_size\": \[64, 96\]\}, this run has \{\"img_size\": \[96"),
        ({"teacher_digest": "b" * 64}, 'teacher_digest = "aaaa.*this run has "bbbb'),
        ({"frame": "center"}, 'frame = "full", this run has "center"'),
    ],
)
def test_another_provenance_is_told_with_both_values(tmp_path, change, told):
    other = dataclasses.replace(PROVENANCE, **change)
    assert other.fingerprint() != PROVENANCE.fingerprint()
    with pytest.raises(ZpipeError, match=told) as error:
        manifest.check_compatible(PROVENANCE, other, tmp_path)
    assert str(error.value).startswith(str(tmp_path)) and "\n" not in str(error.value)


def test_where_the_weights_lay_does_not_matter():
    other = dataclasses.replace(PROVENANCE, weights="/elsewhere/teacher.pth", seed=3)
    assert other.fingerprint() == PROVENANCE.fingerprint()
    manifest.check_compatible(PROVENANCE, other, "store")


def test_every_other_field_of_the_provenance_counts():
    different = {"teacher_args": {}, "grid": (1, 1), "image_size": (1, 1), "mean": (0.0,), "std": (1.0,)}
    different |= {"kind": "label-map", "shape": PROVENANCE.grid}
    for field in dataclasses.fields(PROVENANCE):
        value = different.get(field.name, -1 if isinstance(getattr(PROVENANCE, field.name), int) else "other")
        same = dataclasses.replace(PROVENANCE, **{field.name: value}).fingerprint() == PROVENANCE.fingerprint()
        # Where files lie counts for nothing: the digest of the teacher is of all weights, as they are after loading.
        places = ("weights", "seed", "head", "class_embeddings", "positions_resized")
        assert same == (field.name in places), field.name


def test_reading_what_is_no_manifest(tmp_path):
    with pytest.raises(ZpipeError, match="not a relevance store"):
        manifest.read_manifest(tmp_path)
    manifest.write_extraction(tmp_path, PROVENANCE)
    with pytest.raises(ZpipeError, match="extraction is not finished"):
        manifest.read_manifest(tmp_path)
    manifest.write_manifest(tmp_path, MANIFEST)
    good = json.loads((tmp_path / "manifest.json").read_text())
    shard, proof = good["shards"][0], good["provenance"]
    for change, told in [
        ({"version": 99}, "version 99"),
        ({"shards": [{}]}, r"missing required field `stem` - at `\$.shards\[0\]`"),
        ({"shards": {}}, "Expected `array`, got `object`"),
        ({"shards": [shard | {"count": -1}]}, "Expected `int` >= 0"),
        ({"shards": [shard | {"count": 4}]}, "its count is 3, its shards have 4 samples"),
        ({"shards": [shard, shard]}, "shard 'a' is listed twice"),
        ({"shards": [shard | {"stem": "a/../b"}]}, "no name of a file in this store"),
        ({"shards": [shard | {"stem": "a\x1b[2J"}]}, "no name of a file in this store"),
        ({"shards": [shard | {"index_sha256": "A" * 64}]}, "matching regex"),
        ({"statuses": {"fine": 3}}, "matching regex"),
        ({"statuses": [3]}, "Expected `object`"),
        ({"classes": "ab"}, "Expected `array`"),
        ({"provenance": proof | {"novel": 1}}, "provenance field 'novel' is unknown"),
        ({"provenance": {}}, "missing required field"),
        ({"provenance": proof | {"grid": "4 x 6"}}, r"Expected `array`, got `str` - at `\$.grid`"),
        ({"provenance": proof | {"grid": [4]}}, "Expected `array` of length 2"),
        ({"provenance": proof | {"grid": [0, 6]}}, "Expected `int` >= 1"),
        ({"provenance": proof | {"grid": [10**9, 6]}}, "Expected `int` <= 4096"),
        ({"provenance": proof | {"mean": "grey"}}, "Expected `array`"),
        ({"provenance": proof | {"teacher_args": {"x": "x" * 2**20}}}, "its provenance has 1049"),
    ]:
        (tmp_path / "manifest.json").write_text(json.dumps(good | change))
        with pytest.raises(ZpipeError, match=told) as error:
            manifest.read_manifest(tmp_path)
        assert len(str(error.value).splitlines()) == 1 and str(error.value).startswith(
            f"{tmp_path / 'manifest.json'}: "
        )
    (tmp_path / "extraction.json").write_text(json.dumps({"format": "zpipe-relevance-store", "version": 1}))
    with pytest.raises(ZpipeError, match="missing required field `provenance`.*; delete it if"):
        manifest.read_extraction(tmp_path)


@given(st.sampled_from(("shards", "statuses", "source", "zpipe_version", "classes", "count", "provenance")), any_json())
def test_whatever_a_field_of_a_manifest_says_it_is_read_or_refused_in_one_line(field, value):
    content = {"count": 3, "classes": []} | json.loads(json.dumps(dataclasses.asdict(MANIFEST)))
    read_or_refused({"manifest.json": content | {field: value}}, manifest.read_manifest)


@given(st.sampled_from([field.name for field in dataclasses.fields(PROVENANCE)]), any_json())
def test_whatever_a_field_of_a_provenance_says_it_is_read_or_refused_in_one_line(field, value):
    content = json.loads(json.dumps(dataclasses.asdict(PROVENANCE))) | {field: value}
    read_or_refused({"extraction.json": {"provenance": content}}, manifest.read_extraction)


def read_or_refused(files, read):
    """Read a store of these files; a wrong one is one line, and what is read has the declared types."""
    with tempfile.TemporaryDirectory() as folder:
        for name, content in files.items():
            header = {"format": "zpipe-relevance-store", "version": 1}
            (Path(folder) / name).write_text(json.dumps(header | content))
        try:
            found = read(folder)
        except ZpipeError as error:
            assert len(str(error).splitlines()) == 1 and str(error).isprintable()
            return
    for proof in (found, getattr(found, "provenance", found)):
        assert proof == msgspec.convert(dataclasses.asdict(proof), type(proof))


def test_a_manifest_names_the_classes_where_they_are_known(tmp_path):
    manifest.write_manifest(tmp_path, MANIFEST)
    assert "classes" not in json.loads((tmp_path / "manifest.json").read_text())
    named = dataclasses.replace(MANIFEST, classes=("ant", "bee"))
    manifest.write_manifest(tmp_path, named)
    assert manifest.read_manifest(tmp_path) == named


def test_the_manifest_knows_the_statuses_of_the_index():
    counts = dict.fromkeys(STATUSES, 1)
    assert msgspec.convert(counts, dict[manifest.Status, int]) == counts


@pytest.mark.parametrize("name", ["manifest.json", "extraction.json"])
@pytest.mark.parametrize("kind", ["fifo", "device", "folder", "endless"])
def test_what_lies_in_place_of_a_manifest_is_told_without_waiting(tmp_path, name, kind):
    path = tmp_path / name
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to("/dev/zero" if kind == "endless" else "/dev/null")
    read = manifest.read_manifest if name == "manifest.json" else manifest.read_extraction
    with pytest.raises(ZpipeError, match=f"{name}: not readable as .* .is a (FIFO|device|folder)"):
        read(tmp_path)


def test_errors_say_how_the_command_ends():
    assert (ZpipeError("x").exit_code, UsageError("x").exit_code) == (1, 2)
    assert ZpipeError("x", ["a", "b"]).details == ("a", "b")
    assert os.linesep not in str(ZpipeError("x", ["a"]))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)


def places_in(value, place=()):
    """Where values stand in a JSON value: the keys and positions that lead there."""
    yield place
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from places_in(inner, (*place, key))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_value_anywhere_in_a_shard_index_is_read_or_refused(tmp_path, data):
    account = Account(seen=8, taken=7, left_out=Counter({"hidden": 1}))
    index = shard_index.ShardIndex(shards=(entry(), entry("b.tar", count=4)), classes=("ant",), account=account)
    shard_index.write_index(tmp_path, index)
    path = tmp_path / "shards.json"
    content = json.loads(path.read_text())
    place = data.draw(st.sampled_from(list(places_in(content))))
    value = data.draw(JSON)
    if place:
        holder = content
        for key in place[:-1]:
            holder = holder[key]
        holder[place[-1]] = value
    else:
        content = value
    path.write_text(json.dumps(content))
    for name in ("a.tar", "b.tar"):
        (tmp_path / name).write_bytes(bytes(2000))
    try:
        folder, tars = shard_index.find_shards(tmp_path)
        found = shard_index.read_index(tmp_path)
        entries = shard_index.check_listed(folder, tars, found, whole_folder=True)
    except ZpipeError as error:
        assert len(str(error).splitlines()) == 1
    else:
        assert sum(each.count for each in entries) == found.count <= 7 and str(found.account)
