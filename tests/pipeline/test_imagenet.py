"""ImageNet as its owners publish it: all packagings give the same samples, and what may be wrong with them."""

import gzip
import io
import json
import os
import struct
import zlib

import numpy as np
import packagings
import pytest
from killing import kill_after_three_tars
from packagings import KIT, devkit, hugging_face, image_folder, kaggle, official, published, tar_of, unpack_devkit, xml
from scipy.io import loadmat, savemat
from tiny import write_tar

from zpipe.pipeline import imagenet_boxes
from zpipe.pipeline.imagenet import ImageNetSource
from zpipe.pipeline.imagenet_names import labels, synsets, wnids
from zpipe.pipeline.make_shards import make_shards
from zpipe.pipeline.mat_file import read_structs
from zpipe.pipeline.open_source import SourceConfig, open_source
from zpipe.pipeline.shard_reader import open_shards, read_samples
from zpipe.schemas.errors import UsageError, ZpipeError
from zpipe.schemas.shard_index import read_index

SPLITS = ("train", "val")
# In the order of an archive, not sorted; a crane of each kind, and the first and last classes.
WNIDS = ("n02119789", "n01440764", "n03126707", "n15075141", "n02012849")
PACKAGINGS = {
    "official": (official, "imagenet"),
    "Kaggle": (kaggle, "imagenet"),
    "folder": (image_folder, "imagenet"),
    "Parquet": (hugging_face, "parquet"),
}


@pytest.fixture(scope="module")
def images(encode):
    """Three JPEGs of each of five classes; one is in truth a PNG, as one of the published images is."""
    found = {
        wnid: [encode("JPEG", 30 + 5 * number, 24 + place, seed=10 * place + number) for number in range(3)]
        for place, wnid in enumerate(WNIDS)
    }
    found["n03126707"][1] = encode("PNG", 20, 22, seed=77)
    return found


@pytest.fixture(scope="module")
def boxes(images):
    """Boxes of the images of each split: two, one, none; one without area."""
    found = {}
    for split in SPLITS:
        rows = list(published(images, split))
        found[split] = {key: [(wnid, 1, 2, 10 + place, 12)] for place, (key, wnid, _) in enumerate(rows)}
        (first, wnid, _), (second, other, _) = rows[0], rows[1]
        found[split][first] = [(wnid, 0, 0, 5, 6), (wnid, 3, 4, 9, 20)]
        found[split][second] = [(other, 7, 3, 7, 9), (other, 0, 1, 2, 3)]
        if split == "train":
            del found[split][rows[2][0]]
    return found


def make(root, out, split, **changes):
    settings = {"shard_size": 4, "shuffle_seed": 0} | changes
    return make_shards(ImageNetSource(root, split=split, **settings), out)


def samples_of(out):
    return {sample.key: sample for path, entry in open_shards(out)[0] for sample in read_samples(path, entry)}


def tars(out, contents):
    return {name: data for name, data in contents(out).items() if name.endswith(".tar")}


# ------------------------------------------------------------------------------------------------ what all have alike


@pytest.mark.parametrize("split", ["train", "val", "test"])
@pytest.mark.parametrize("packaging", PACKAGINGS)
def test_keys_labels_bytes_and_class_names_are_those_of_the_publication(tmp_path, images, boxes, packaging, split):
    build, name = PACKAGINGS[packaging]
    labelled = (boxes["val"],) if (packaging, split) == ("Kaggle", "val") else ()
    root = build(tmp_path / "in", images, split, *labelled)
    make_shards(open_source(f"{name}:{root}", SourceConfig(split=split), lambda line: None), tmp_path / "out")
    samples = samples_of(tmp_path / "out")
    assert {key: (sample.label, sample.image) for key, sample in samples.items()} == {
        key: (None if split == "test" else labels()[wnid], data) for key, wnid, data in published(images, split)
    }
    assert read_index(tmp_path / "out").classes == wnids()


@pytest.mark.parametrize("split", SPLITS)
def test_official_archives_and_kaggle_s_tree_give_the_same_tars(tmp_path, images, boxes, contents, split):
    make(official(tmp_path / "archives", images, split, boxes[split]), tmp_path / "a", split)
    make(kaggle(tmp_path / "kaggle", images, split, boxes[split]), tmp_path / "k", split)
    assert tars(tmp_path / "a", contents) == tars(tmp_path / "k", contents) != {}
    make(official(tmp_path / "plain", images, split), tmp_path / "p", split)
    make(image_folder(tmp_path / "tree", images, split), tmp_path / "t", split)
    assert tars(tmp_path / "p", contents) == tars(tmp_path / "t", contents) != tars(tmp_path / "a", contents)


@pytest.mark.parametrize("split", SPLITS)
def test_boxes_from_csv_and_xml_files_are_the_same(tmp_path, images, boxes, contents, split):
    make(kaggle(tmp_path / "csv", images, split, boxes[split]), tmp_path / "c", split)
    root = kaggle(tmp_path / "xml", images, split, boxes[split], as_xml=True)
    if split == "val":
        write_tar(root / f"{KIT}.tar.gz", devkit([wnid for _, wnid, _ in published(images, split)]), "w:gz")
    report = make(root, tmp_path / "x", split)
    assert tars(tmp_path / "c", contents) == tars(tmp_path / "x", contents)
    assert report.account.noted == {"with a box without area (left out)": 1}
    samples = samples_of(tmp_path / "c")
    (first, _, _), (second, _, _), (third, _, _) = list(published(images, split))[:3]
    label = samples[first].label
    assert samples[first].meta["boxes"] == [[0, 0, 5, 6], [3, 4, 9, 20]]
    assert samples[first].meta["box_labels"] == [label, label]
    assert samples[first].box is None
    assert samples[second].box == (0, 1, 2, 3) and samples[second].meta["boxes"] == [[0, 1, 2, 3]]
    assert ("boxes" in samples[third].meta) == (split == "val")
    assert samples[third].meta["source"] == f"{third}.JPEG"


def test_dogs_whose_boxes_are_named_in_words_are_of_their_image_s_class(tmp_path, images):
    key = "n02119789_10026"
    root = official(tmp_path / "in", images, "train", {key: [("kit_fox", 1, 2, 3, 4), ("n01440764", 5, 5, 9, 9)]})
    report = make(root, tmp_path / "out", "train")
    meta = samples_of(tmp_path / "out")[key].meta
    assert meta["box_labels"] == [labels()["n02119789"], 0]
    assert report.account.noted == {"with a box named in words (taken for the image's class)": 1}


# -------------------------------------------------------------------------------------------------------------- labels


def test_each_of_the_1000_classes_gets_its_own_label_through_the_kit(tmp_path, encode):
    image = encode("JPEG", 8, 8)
    root = official(tmp_path / "in", {wnid: [image] for wnid in reversed(wnids())}, "val")
    source = ImageNetSource(root, split="val", shard_size=1000, shuffle_seed=None, check=False)
    found = {record.key: record.label for record in source.records(0)}
    assert found == {f"ILSVRC2012_val_{number:08d}": 1000 - number for number in range(1, 1001)}


def test_published_labels_of_the_first_validation_images(tmp_path, encode):
    # The first ten lines of the published ground truth, and the classes that other sources list for these images.
    numbers = (490, 361, 171, 822, 297, 482, 13, 704, 599, 164)
    classes = ("n01751748", "n09193705", "n02105855", "n04263257", "n03125729", "n01735189", "n02346627", "n02776631")
    classes += ("n03794056", "n02328150")
    root = tmp_path / "in"
    write_tar(
        root / "ILSVRC2012_img_val.tar",
        {f"ILSVRC2012_val_{number:08d}.JPEG": encode("JPEG", 8, 8) for number in range(1, 11)},
    )
    truth = "\n".join(str(number) for number in (*numbers, *[1] * 49_990))
    (root / "ILSVRC2012_validation_ground_truth.txt").write_text(truth)
    make(root, tmp_path / "out", "val")
    found = [sample.label for _, sample in sorted(samples_of(tmp_path / "out").items())]
    assert found == [65, 970, 230, 809, 516, 57, 334, 415, 674, 332]
    assert tuple(wnids()[label] for label in found) == classes


def test_the_test_split_has_no_labels_in_class_folders_either(tmp_path, images):
    root = image_folder(tmp_path / "in", images, "val")
    (root / "val").rename(root / "test")
    make(root, tmp_path / "out", "test")
    assert [sample.label for sample in samples_of(tmp_path / "out").values()] == [None] * 15


def test_the_kit_may_be_unpacked_and_is_checked(tmp_path, images, contents):
    root = official(tmp_path / "in", images, "val")
    make(root, tmp_path / "packed", "val")
    unpack_devkit(root)
    make(root, tmp_path / "unpacked", "val")
    assert tars(tmp_path / "packed", contents) == tars(tmp_path / "unpacked", contents)


def test_an_image_keeps_its_label_where_others_are_missing(tmp_path, images, cli):
    root = official(tmp_path / "in", images, "val")
    rows = list(published(images, "val"))
    write_tar(root / "ILSVRC2012_img_val.tar", {f"{key}.JPEG": data for key, _, data in rows[3:5]})
    done = cli("make-shards", f"imagenet:{root}", tmp_path / "out", "--split", "val")
    assert done.code == 0
    assert f"note: {root}: the official archives (ILSVRC2012_img_val.tar, {KIT}.tar.gz)\n" in done.stderr
    assert f"warning: {root}: 2 images of 2 classes; ImageNet's val split has 50000 of 1000\n" in done.stderr
    found = {key: sample.label for key, sample in samples_of(tmp_path / "out").items()}
    assert found == {key: labels()[wnid] for key, wnid, _ in rows[3:5]}


def test_a_struct_array_is_read_as_scipy_reads_it_or_refused_in_a_line():
    fields = ("ILSVRC2012_ID", "WNID", "words", "children")
    data = packagings.meta_mat()
    rows = read_structs(data, "meta.mat", "synsets", fields)
    expected = loadmat(io.BytesIO(data), squeeze_me=True)["synsets"]
    assert [row[:3] for row in rows] == [tuple(item)[:3] for item in expected]
    assert {row[3] for row in rows} == {None}  # an array, not a number
    buffer = io.BytesIO()
    savemat(buffer, {"synsets": loadmat(io.BytesIO(data))["synsets"][:20]}, do_compression=True)
    data = buffer.getvalue()
    assert read_structs(data, "meta.mat", "synsets", fields) == rows[:20]
    rng = np.random.default_rng(0)
    damaged = [data[: len(data) * part // 20] for part in range(20)]
    for _ in range(60):
        changed = bytearray(data)
        changed[rng.integers(124, len(data))] = rng.integers(0, 256)
        damaged.append(bytes(changed))
    # Damage under a checksum that fits.
    (size,) = struct.unpack_from("<I", data, 132)
    plain = zlib.decompress(data[136 : 136 + size])
    for _ in range(200):
        changed = bytearray(plain)
        changed[rng.integers(0, 4000)] = rng.integers(0, 256)
        packed = zlib.compress(bytes(changed), 1)
        damaged.append(data[:128] + struct.pack("<II", 15, len(packed)) + packed)
    refused = 0
    for part in damaged:
        try:
            read_structs(part, "meta.mat", "synsets", fields)
        except ZpipeError as error:
            assert str(error).startswith("meta.mat: ") and "\n" not in str(error)
            refused += 1
    assert refused > 80
    with pytest.raises(ZpipeError, match=r"meta\.mat: has no struct array 'synsets' with ID; fetch it again"):
        read_structs(data, "meta.mat", "synsets", ("ID",))


# ------------------------------------------------------------------------------------------------- what lies elsewhere


def test_what_is_no_image_is_counted(tmp_path, images):
    root = image_folder(tmp_path / "in", images, "train")
    wnid = root / "train" / WNIDS[0]
    (wnid / "notes.txt").write_text("x")
    (wnid / ".DS_Store").write_text("x")
    (wnid / "loop.JPEG").symlink_to("loop.JPEG")
    (root / "train" / "held out").mkdir()
    os.mkfifo(wnid / "fifo.JPEG")
    (root / "train" / "stray.JPEG").write_bytes(images[WNIDS[0]][0])
    (wnid / f"{WNIDS[0]}_5.JPEG").write_bytes(b"no image")
    report = make(root, tmp_path / "out", "train")
    assert report.account.left_out == {
        "no image: .txt": 1,
        "hidden": 1,
        "no file": 2,
        "folder that is no class of ImageNet": 1,
    }
    assert [item.file for item in report.quarantined] == ["stray.JPEG", f"{WNIDS[0]}/{WNIDS[0]}_5.JPEG"]
    assert report.count == 15 and report.account.seen == 15 + 5 + 2


def test_content_decides_what_is_an_image_and_folders_inside_a_class_are_told(tmp_path, images, cli):
    root = image_folder(tmp_path / "in", {WNIDS[0]: images[WNIDS[0]]}, "train")
    wnid = root / "train" / WNIDS[0]
    for number, path in enumerate(sorted(wnid.iterdir())):
        path.rename(path.with_suffix(("", ".data", ".JPEG")[number]))
    (wnid / "images").mkdir()
    (wnid / "images" / f"{WNIDS[0]}_7.JPEG").write_bytes(images[WNIDS[0]][0])
    done = cli("make-shards", f"imagenet:{root}", tmp_path / "out")
    assert done.code == 0 and "seen 4, taken 3, left out 1 (folder inside a class 1), quarantined 0" in done.stdout
    assert f"{root}: folders inside class folders (1) are not read; move their images up" in done.stderr
    assert samples_of(tmp_path / "out").keys() == {
        key for key, _, _ in published({WNIDS[0]: images[WNIDS[0]]}, "train")
    }


def test_the_archive_is_taken_where_a_tree_is_there_too(tmp_path, images):
    root = image_folder(official(tmp_path / "in", images, "train"), {WNIDS[0]: images[WNIDS[0]]}, "train")
    assert make(root, tmp_path / "out", "train").count == 15


def official_val(root, images):
    return official(root, images, "val")


def rewritten(path, change):
    path.write_bytes(change(path.read_bytes()))


def with_kit(**changes):
    """Change files of the kit, by the stem of their names; None removes one."""

    def damage(root):
        files = dict(devkit(["n01440764"] * 15))
        for stem, data in changes.items():
            name = next(name for name in files if stem in name)
            files[name] = data
        members = {name: data for name, data in files.items() if data is not None}
        write_tar(root / f"{KIT}.tar.gz", members, "w:gz")

    return damage


def with_csv(*lines):
    def damage(root):
        (root / f"{KIT}.tar.gz").unlink(missing_ok=True)
        (root / "LOC_val_solution.csv").write_text("\n".join(lines))

    return damage


HEAD = "ImageId,PredictionString"
ARCHIVE = "ILSVRC2012_img_val.tar"
DAMAGE = {
    "no kit": (
        lambda root: (root / f"{KIT}.tar.gz").unlink(),
        f"the labels of the val split are missing; put {KIT}.tar.gz there, or Kaggle's LOC_val_solution.csv",
    ),
    "a ground truth too short": (
        with_kit(ground_truth=b"1\n" * 49_999),
        f"{KIT}.tar.gz: ILSVRC2012_validation_ground_truth.txt: has 49999 numbers, ImageNet's val split 50000 images",
    ),
    "a ground truth of another kind": (with_kit(ground_truth=b"1001\n" * 50_000), "line 1: '1001' is no number from 1"),
    "a ground truth of words": (with_kit(ground_truth=b"1\n" * 7 + b"\xb2\n" * 49_993), "line 8: .* is no number"),
    "no ground truth": (with_kit(ground_truth=None), f"has no {KIT}/data/ILSVRC2012_validation_ground_truth.txt"),
    "a meta.mat that is none": (with_kit(meta=b"<html>404</html>" * 20), "meta.mat: not a MATLAB 5 file; fetch it"),
    "a meta.mat that is cut": (
        with_kit(meta=packagings.meta_mat()[:9000]),
        r"meta.mat: not a whole MATLAB 5 file \(.*; fetch it again",
    ),
    "a kit that is cut": (
        lambda root: rewritten(root / f"{KIT}.tar.gz", lambda data: data[: len(data) // 2]),
        "not a whole .tar.gz",
    ),
    "an archive that is cut": (
        lambda root: rewritten(root / ARCHIVE, lambda data: data[: len(data) // 2]),
        f"{ARCHIVE}: not a whole tar .*; fetch it again",
    ),
    "an archive that is compressed": (
        lambda root: rewritten(root / ARCHIVE, gzip.compress),
        f"{ARCHIVE}: is a gzip file, .*unpack it .gunzip.",
    ),
    "an archive of other files": (
        lambda root: write_tar(root / ARCHIVE, {"flowers/image_00001.jpg": b"x"}),
        f"{ARCHIVE}: its member 'flowers/image_00001.jpg' is no image of ImageNet's val split; give ImageNet's own",
    ),
    "the archive of another split": (
        lambda root: write_tar(root / ARCHIVE, {"n01440764.tar": b""}),
        f"its member 'n01440764.tar' is no image of ImageNet's val split; give ImageNet's own {ARCHIVE}",
    ),
    "an empty archive": (lambda root: write_tar(root / ARCHIVE, {}), "holds no image of ImageNet's val split"),
    "an image beyond the last": (
        lambda root: write_tar(root / ARCHIVE, {"ILSVRC2012_val_00050001.JPEG": b"x"}),
        "has no label for ILSVRC2012_val_00050001; give that of ImageNet's val split",
    ),
    "an image twice": (
        lambda root: write_tar(root / ARCHIVE, {f"{x}ILSVRC2012_val_00000001.JPEG": b"x" for x in ("", "./")}),
        "has the key 'ILSVRC2012_val_00000001' of another image",
    ),
    "an unknown wnid": (
        with_csv(HEAD, "ILSVRC2012_val_00000001,n01440764 1 2 3 4 n99999999 1 2 3 4 "),
        "LOC_val_solution.csv: line 2: a box has the class 'n99999999', none of ImageNet's 1,000 wnids; fetch it again",
    ),
    "a box cut off": (with_csv(HEAD, "ILSVRC2012_val_00000001,n01440764 1 2 3"), "line 2: is not an image and boxes"),
    "an edge that is no number": (with_csv(HEAD, "x,n01440764 1 nan 3 4"), "line 2: a box has the edges '1 nan 3 4'"),
    "no boxes": (with_csv(HEAD, "ILSVRC2012_val_00000001,"), "line 2: is not an image and boxes of 'wnid x1 y1 x2 y2'"),
    "another table": (with_csv("a,b", "1,2"), "LOC_val_solution.csv: line 1: is not ImageId,PredictionString"),
    "not all images": (with_csv(HEAD, "ILSVRC2012_val_00000009,n01440764 1 2 3 4"), "no label for ILSVRC2012_val_"),
    "two classes": (
        with_csv(HEAD, "ILSVRC2012_val_00000001,n01440764 1 2 3 4 n02119789 1 2 3 4"),
        "ILSVRC2012_val_00000001: its boxes have several classes",
    ),
    "a line without an end": (with_csv(HEAD, "x" * 200_000), "LOC_val_solution.csv: "),
    "boxes that are no XML": (
        lambda root: write_tar(root / "ILSVRC2012_bbox_val_v3.tgz", {"val/ILSVRC2012_val_00000001.xml": b"<a"}, "w:gz"),
        "bbox_val_v3.tgz: val/ILSVRC2012_val_00000001.xml: not readable as XML .*; fetch it again",
    ),
    "boxes with entities": (
        lambda root: write_tar(
            root / "ILSVRC2012_bbox_val_v3.tgz",
            {"val/ILSVRC2012_val_00000001.xml": b'<!DOCTYPE a [<!ENTITY b "c">]><a>&b;</a>'},
            "w:gz",
        ),
        "declares a document type",
    ),
    "boxes with entities in UTF-16": (
        lambda root: write_tar(
            root / "ILSVRC2012_bbox_val_v3.tgz",
            {
                "val/ILSVRC2012_val_00000001.xml": '<!DOCTYPE a [<!ENTITY b "c">]><annotation>&b;</annotation>'.encode(
                    "utf-16"
                )
            },
            "w:gz",
        ),
        "declares a document type",
    ),
    "boxes without a byte": (
        lambda root: write_tar(root / "ILSVRC2012_bbox_val_v3.tgz", {"val/ILSVRC2012_val_00000001.xml": b""}, "w:gz"),
        "bbox_val_v3.tgz: val/ILSVRC2012_val_00000001.xml: not readable as XML .*no element found",
    ),
    "boxes of an unknown class": (
        lambda root: write_tar(
            root / "ILSVRC2012_bbox_val_v3.tgz",
            {"val/ILSVRC2012_val_00000001.xml": xml([("n00000001", 1, 2, 3, 4)])},
            "w:gz",
        ),
        "ILSVRC2012_val_00000001.xml: a box has the class 'n00000001', none of",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_wrong_files_are_told_in_a_line(tmp_path, images, damage):
    root = official(tmp_path / "in", images, "val")
    change, told = DAMAGE[damage]
    change(root)
    with pytest.raises(ZpipeError, match=told) as error:
        make(root, tmp_path / "out", "val")
    assert str(root) in str(error.value) and "\n" not in str(error.value) and not (tmp_path / "out").exists()


def test_an_archive_of_boxes_that_unpacks_without_end_is_refused(tmp_path, images, boxes, monkeypatch):
    root = official(tmp_path / "in", images, "val", boxes["val"])
    monkeypatch.setattr(imagenet_boxes, "MAX_UNPACKED_BYTES", 5000)
    with pytest.raises(ZpipeError, match="ILSVRC2012_bbox_val_v3.tgz: unpacks to more than 5000 bytes; fetch it again"):
        make(root, tmp_path / "out", "val")
    monkeypatch.undo()
    write_tar(root / "ILSVRC2012_bbox_val_v3.tgz", {"val/a.xml": bytes((1 << 20) + 1)}, "w:gz")
    with pytest.raises(ZpipeError, match="its val/a.xml has 1048577 bytes, more than 1048576; fetch it again"):
        make(root, tmp_path / "out", "val")


TRAIN_DAMAGE = {
    "images without class tars": (lambda tar: tar_of({"n01440764_1.JPEG": b"x"}), "'n01440764_1.JPEG' is no nXXXXXXXX"),
    "a class of another ImageNet": (lambda tar: tar_of({"n00007846.tar": tar_of({})}), "'n00007846.tar' is no nXXXX"),
    "a class tar that is cut": (
        lambda tar: tar_of({"n01440764.tar": tar_of({"n01440764_1.JPEG": bytes(2000)})[:1024]}),
        "ILSVRC2012_img_train.tar: n01440764.tar: not a whole tar",
    ),
    "an image of another class": (
        lambda tar: tar_of({"n01440764.tar": tar_of({"n02119789_1.JPEG": b"x"})}),
        "n01440764.tar: its member 'n02119789_1.JPEG' is no image of ImageNet's train split",
    ),
}


@pytest.mark.parametrize("damage", TRAIN_DAMAGE)
def test_wrong_training_archives_are_told_in_a_line(tmp_path, images, damage):
    root = official(tmp_path / "in", images, "train")
    change, told = TRAIN_DAMAGE[damage]
    rewritten(root / "ILSVRC2012_img_train.tar", change)
    with pytest.raises(ZpipeError, match=told) as error:
        make(root, tmp_path / "out", "train")
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("split", "prepare", "told"),
    [
        ("trainval", lambda root: None, "--split trainval: imagenet has train, val, test"),
        ("train", lambda root: None, "holds nothing of ImageNet's train split; give the folder with ILSVRC2012_img_tr"),
        ("train", lambda root: (root / "train").mkdir(), "holds no image of ImageNet's train split"),
        (
            "test",
            lambda root: [write_tar(root / f"ILSVRC2012_img_test{x}.tar", {}) for x in ("", "_v10102019")],
            "holds ILSVRC2012_img_test.tar and ILSVRC2012_img_test_v10102019.tar; move one of them away",
        ),
    ],
)
def test_a_wrong_request_is_told(tmp_path, split, prepare, told):
    (tmp_path / "in").mkdir()
    prepare(tmp_path / "in")
    with pytest.raises(UsageError, match=told):
        make(tmp_path / "in", tmp_path / "out", split)


def test_a_class_folder_of_another_imagenet_is_refused(tmp_path, images):
    root = image_folder(tmp_path / "in", images | {"n00007846": images[WNIDS[0]]}, "train")
    with pytest.raises(ZpipeError, match="n00007846: is none of ImageNet's 1,000 classes; move it away"):
        make(root, tmp_path / "out", "train")


@pytest.mark.parametrize("cut", [True, False])
def test_an_archive_altered_after_it_was_listed_is_told(tmp_path, images, cut):
    """In another archive the places of the images would hold other images."""
    root = official(tmp_path / "in", images, "train")
    source = ImageNetSource(root, split="train", shard_size=20, shuffle_seed=0)
    path = root / "ILSVRC2012_img_train.tar"
    if cut:
        os.truncate(path, 20_000)
    else:
        path.unlink()
        official(root, dict(reversed(images.items())), "train")
    with pytest.raises(ZpipeError, match="ILSVRC2012_img_train.tar: was altered since it was listed; run again"):
        list(source.records(0))


# ------------------------------------------------------------------------------------------------ resuming and checking


def test_a_killed_run_resumes_to_the_same_tars(tmp_path, images, boxes, contents, command):
    root = official(tmp_path / "in", images, "train", boxes["train"])
    make(root, tmp_path / "whole", "train", shard_size=1)
    out = tmp_path / "out"
    line = command("make-shards", f"imagenet:{root}", out, "--shard-size", 1)
    made = kill_after_three_tars(line, out)
    report = make(root, out, "train", shard_size=1)
    assert report.count == 15 and 15 - made <= report.written <= 13
    assert tars(out, contents) == tars(tmp_path / "whole", contents)
    assert not [name for name in contents(out) if ".tmp-" in name]


def test_other_boxes_or_labels_are_another_source(tmp_path, images, boxes):
    root = official(tmp_path / "in", images, "val")
    make(root, tmp_path / "out", "val")
    assert make(root, tmp_path / "out", "val").written == 0
    with_kit()(root)  # the same images with other labels
    with pytest.raises(ZpipeError, match="content_sha256"):
        make(root, tmp_path / "out", "val")
    official(root, images, "val", boxes["val"])
    with pytest.raises(ZpipeError, match="content_sha256"):
        make(root, tmp_path / "out", "val")


def test_an_archive_of_other_images_with_the_same_names_is_another_source(tmp_path, images):
    root = official(tmp_path / "in", images, "train")
    make(root, tmp_path / "out", "train")
    assert make(root, tmp_path / "out", "train").written == 0
    first, second, *others = images.items()
    official(root, dict([(first[0], second[1]), (second[0], first[1]), *others]), "train")
    with pytest.raises(ZpipeError, match="content_sha256"):
        make(root, tmp_path / "out", "train")


def test_a_run_begun_without_xml_boxes_is_not_resumed_with_them(tmp_path, images, boxes):
    root = kaggle(tmp_path / "in", images, "train", boxes["train"], as_xml=True)
    folder = root / "ILSVRC" / "Annotations"
    folder.rename(tmp_path / "boxes")
    make(root, tmp_path / "out", "train")
    assert make(root, tmp_path / "out", "train").written == 0
    (tmp_path / "boxes").rename(folder)
    with pytest.raises(ZpipeError, match="content_sha256"):
        make(root, tmp_path / "out", "train")


def test_without_the_check_only_headers_are_read(tmp_path, images, cli):
    """A JPEG that is cut is taken then; what is no image, or no format of shards, is treated as ever."""
    cut = images[WNIDS[0]][0][:-200]
    root = image_folder(tmp_path / "in", images | {WNIDS[0]: [cut, b"no image"]}, "train")
    checked = cli("make-shards", f"imagenet:{root}", tmp_path / "checked")
    assert checked.code == 1 and "2 images put aside" in checked.error
    quick = cli("make-shards", f"imagenet:{root}", tmp_path / "quick", "--no-check")
    assert quick.code == 1 and "1 image put aside" in quick.error
    extra = samples_of(tmp_path / "quick").keys() - samples_of(tmp_path / "checked").keys()
    assert extra == {f"{WNIDS[0]}_10026"} and samples_of(tmp_path / "quick")[extra.pop()].image == cut
    again = cli("make-shards", f"imagenet:{root}", tmp_path / "quick")
    assert again.code == 1 and "was made with --no-check; give it too, or give another output folder" in again.error
    again = cli("make-shards", f"imagenet:{root}", tmp_path / "checked", "--no-check")
    assert again.code == 1 and "was made without --no-check; leave it out, or give another output" in again.error
    first = json.loads((tmp_path / "checked" / "make-shards.jsonl").read_text().splitlines()[0])
    assert "check" not in first  # so that folders begun before there was a choice are still resumed
    assert cli("make-shards", "scenes", tmp_path / "scenes", "--no-check").code == 2


def test_the_names_of_the_parquet_files_are_those_of_the_classes(tmp_path, images):
    """The recognition of class names is tested on the file that the Parquet source reads."""
    import pyarrow.parquet as pq

    from zpipe.pipeline.imagenet_names import wnids_of

    root = hugging_face(tmp_path, images, "val")
    schema = pq.read_schema(root / "data" / "validation-00000-of-00002.parquet")
    names = json.loads(schema.metadata[b"huggingface"])["info"]["features"]["label"]["names"]
    assert wnids_of(names) == tuple(synset.wnid for synset in synsets())
