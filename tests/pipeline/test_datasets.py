"""CIFAR-10 and Flowers-102: small files in the published formats, and what may be wrong with them."""

import csv
import gzip
import io
import json
import pickle
import struct
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat
from tiny import header, write_tar

from zpipe.pipeline import datasets
from zpipe.pipeline.datasets import Cifar10Source, Flowers102Source
from zpipe.pipeline.make_shards import make_shards
from zpipe.pipeline.mat_file import read_numbers
from zpipe.pipeline.shard_reader import open_shards, read_samples
from zpipe.schemas.errors import ZpipeError
from zpipe.schemas.shard_index import read_index
from zpipe.train.data.loader import RelevanceLoader
from zpipe.train.data.transforms import ViewConfig
from zpipe.train.fit.recipes import VIT_RECIPES

CIFAR_NAMES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
TRAIN = tuple(f"data_batch_{number}.bin" for number in range(1, 6))
BIN = "cifar-10-batches-bin"
ROWS = 4  # of each batch; the official ones have 10,000


def samples_of(out):
    return [sample for path, entry in open_shards(out)[0] for sample in read_samples(path, entry)]


def pack(path, members, links=()):
    """A .tar.gz of {name: bytes}, as GNU tar makes it, with symbolic links (name, target) in front."""
    linked = [(header(name, tarfile.SYMTYPE, target), b"") for name, target in links]
    return write_tar(path, [*linked, *members.items()], "w:gz")


@pytest.fixture(scope="module")
def batches():
    """uint8 [4, 3073] of each batch: a label byte, then red, green and blue of 32 x 32 pixels."""
    rng = np.random.default_rng(0)
    found = {}
    for name in (*TRAIN, "test_batch.bin"):
        records = rng.integers(0, 256, (ROWS, 3073), dtype=np.uint8)
        records[:, 0] = rng.integers(0, 10, ROWS)
        found[name] = records
    return found


@pytest.fixture
def cifar_files(batches):
    files = {f"{BIN}/batches.meta.txt": ("\n".join(CIFAR_NAMES) + "\n\n").encode(), f"{BIN}/readme.html": b"<html>"}
    return files | {f"{BIN}/{name}": records.tobytes() for name, records in batches.items()}


@pytest.fixture
def cifar(tmp_path, cifar_files):
    return pack(tmp_path / "cifar-10-binary.tar.gz", cifar_files)


FLOWERS = 12
SPLITS = {"trnid": (5, 2, 11), "valid": (1, 12), "tstid": (3, 4, 6, 7, 8, 9, 10)}
FLOWER_LABELS = np.array([1, 102, 77, 3, 3, 50, 51, 1, 2, 102, 9, 8], dtype=np.uint8)


@pytest.fixture
def flowers(tmp_path, encode):
    """The folder of the three published files, and the JPEGs by name."""
    root = tmp_path / "flowers"
    root.mkdir()
    images = {f"image_{i:05d}.jpg": encode("JPEG", 30 + i, 20, seed=i) for i in range(1, FLOWERS + 1)}
    pack(root / "102flowers.tgz", {f"jpg/{name}": data for name, data in images.items()})
    savemat(root / "imagelabels.mat", {"labels": FLOWER_LABELS[None]})
    savemat(root / "setid.mat", {name: np.array([ids], dtype=np.uint16) for name, ids in SPLITS.items()})
    return root, images


def unpack(root):
    with tarfile.open(root / "102flowers.tgz") as tar:
        tar.extractall(root, filter="data")
    (root / "102flowers.tgz").unlink()


SOURCES = {"cifar10": Cifar10Source, "flowers102": Flowers102Source}


def make(source, out, split, **changes):
    name, _, path = str(source).partition(":")
    settings = {"shard_size": 5, "shuffle_seed": None} | changes
    return make_shards(SOURCES[name](Path(path), split=split, **settings), out)


# ---------------------------------------------------------------------------------------------------------- CIFAR-10


@pytest.mark.parametrize(("split", "names"), [("train", TRAIN), ("val", ("test_batch.bin",))])
def test_cifar_keeps_every_pixel_and_label(cifar, batches, tmp_path, cli, split, names):
    done = cli("make-shards", f"cifar10:{cifar}", tmp_path / "out", "--split", split, "--no-shuffle")
    assert done.code == 0 and f"{ROWS * len(names)} images in 1 shard " in done.stdout
    assert f"warning: {cifar}: {ROWS * len(names)} images; CIFAR-10's {split} split has {10_000 * len(names)}\n" in (
        done.stderr
    )
    samples = samples_of(tmp_path / "out")
    assert [sample.key for sample in samples] == [f"{split}-{number:05d}" for number in range(ROWS * len(names))]
    records = np.concatenate([batches[name] for name in names])
    for number, (sample, record) in enumerate(zip(samples, records, strict=True)):
        assert sample.label == record[0]
        with Image.open(io.BytesIO(sample.image)) as image:
            assert image.format == "PNG"
            np.testing.assert_array_equal(np.moveaxis(np.asarray(image), 2, 0), record[1:].reshape(3, 32, 32))
        place = f"{names[number // ROWS]}:{number % ROWS}"
        assert sample.meta == {"width": 32, "height": 32, "source": place}
    index = read_index(tmp_path / "out")
    assert index.classes == CIFAR_NAMES and index.source == f"cifar10:{cifar}"


def test_cifar_from_its_folder_is_the_same(cifar, tmp_path, contents):
    root = tmp_path / "unpacked"
    with tarfile.open(cifar) as tar:
        tar.extractall(root, filter="data")
    kept = {}
    for name, path in (("tar", cifar), ("beside", cifar.parent), ("folder", root / BIN), ("above", root)):
        make(f"cifar10:{path}", tmp_path / name, "train")
        kept[name] = [data for file, data in contents(tmp_path / name).items() if file.endswith(".tar")]
    assert len(kept["tar"]) == 4 and kept["tar"] == kept["beside"] == kept["folder"] == kept["above"]


def test_order_and_resuming_are_those_of_every_source(cifar, cifar_files, tmp_path, contents):
    orders = {}
    for seed in (None, 0, 1):
        make(f"cifar10:{cifar}", tmp_path / str(seed), "train", shuffle_seed=seed)
        orders[seed] = [sample.key for sample in samples_of(tmp_path / str(seed))]
    assert orders[0] != orders[1] != orders[None] and sorted(orders[0]) == sorted(orders[1]) == orders[None]
    whole = contents(tmp_path / "0")
    assert [entry.count for entry in read_index(tmp_path / "0").shards] == [5, 5, 5, 5]
    (tmp_path / "0" / "shard-00002.tar").unlink()
    assert make(f"cifar10:{cifar}", tmp_path / "0", "train", shuffle_seed=0).written == 1
    assert {name: data for name, data in contents(tmp_path / "0").items() if name.endswith((".tar", "s.json"))} == {
        name: data for name, data in whole.items() if name.endswith((".tar", "s.json"))
    }
    with pytest.raises(ZpipeError, match="split = 'train', now it is 'val'"):
        make(f"cifar10:{cifar}", tmp_path / "0", "val", shuffle_seed=0)
    changed = bytearray(cifar_files[f"{BIN}/data_batch_3.bin"])
    changed[100] ^= 1
    pack(cifar, cifar_files | {f"{BIN}/data_batch_3.bin": bytes(changed)})
    with pytest.raises(ZpipeError, match="content_sha256"):
        make(f"cifar10:{cifar}", tmp_path / "0", "train", shuffle_seed=0)


def test_the_python_version_is_refused_and_never_unpickled(tmp_path, cli):
    class Evil:
        def __reduce__(self):
            return open, (str(tmp_path / "pwned"), "w")

    members = {f"cifar-10-batches-py/data_batch_{i}": pickle.dumps(Evil()) for i in range(1, 6)}
    path = pack(tmp_path / "cifar-10-python.tar.gz", members)
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    (folder / "data_batch_1").write_bytes(pickle.dumps(Evil()))
    for source in (path, folder):
        done = cli("make-shards", f"cifar10:{source}", tmp_path / "out")
        assert done.code == 1 and str(source) in done.error
        assert "give cifar-10-binary.tar.gz" in done.error and "pickle" in done.error
    assert not (tmp_path / "pwned").exists() and not (tmp_path / "out").exists()


CIFAR_DAMAGE = {
    "a record cut": ({f"{BIN}/data_batch_2.bin": bytes(3073 * 2 - 1)}, "its data_batch_2.bin has 6145 bytes"),
    "no record": ({f"{BIN}/data_batch_2.bin": b""}, "its data_batch_2.bin has 0 bytes"),
    "a label too high": ({f"{BIN}/data_batch_5.bin": b"\0" * 3073 + b"\x0a" * 3073}, "record 1 .* has label 10"),
    "too long a batch": ({f"{BIN}/data_batch_1.bin": bytes(3073 * 10_001)}, "more than 30730000"),
    "no batch": ({f"{BIN}/data_batch_4.bin": None}, "has no cifar-10-batches-bin/data_batch_4.bin"),
    "no names": ({f"{BIN}/batches.meta.txt": None}, "has no cifar-10-batches-bin/batches.meta.txt"),
    "nine names": ({f"{BIN}/batches.meta.txt": b"a b c d e f g h i"}, "names 9 classes, not 10"),
    "a batch twice": ({f"./{BIN}/data_batch_1.bin": bytes(3073)}, "holds data_batch_1.bin twice"),
    "elsewhere": ({f"{BIN}/test_batch.bin": None, f"../{BIN}/test_batch.bin": bytes(3073)}, "has no .*/test_batch.bin"),
}


@pytest.mark.parametrize("damage", CIFAR_DAMAGE)
def test_wrong_cifar_files_are_told_in_a_line(cifar, cifar_files, tmp_path, damage):
    changes, told = CIFAR_DAMAGE[damage]
    pack(cifar, {name: data for name, data in (cifar_files | changes).items() if data is not None})
    with pytest.raises(ZpipeError, match=told) as error:
        make(f"cifar10:{cifar}", tmp_path / "out", "val" if damage == "elsewhere" else "train")
    assert str(cifar) in str(error.value) and "\n" not in str(error.value) and not (tmp_path / "out").exists()


def test_members_that_would_leave_the_archive_are_passed_over(cifar, cifar_files, tmp_path):
    hostile = {
        "../../x": b"x",
        "/etc/zpipe": b"x",
        f"{BIN}/../{BIN}/data_batch_1.bin": bytes(3073),
        "data_batch_1.bin": b"",
    }
    links = [(f"{BIN}/data_batch_2.bin", "/etc/hostname"), (f"{BIN}/y", "../../y")]
    pack(cifar, hostile | cifar_files, links)
    before = sorted(tmp_path.rglob("*"))
    assert make(f"cifar10:{cifar}", tmp_path / "out", "train").count == 5 * ROWS
    assert [path for path in sorted(tmp_path.rglob("*")) if tmp_path / "out" not in (path, *path.parents)] == before


# --------------------------------------------------------------------------------------------- archives of both kinds


def damaged(data, rng):
    data = bytearray(data)
    for place in rng.integers(0, len(data), 3):
        data[place] = rng.integers(0, 256)
    return bytes(data)


def test_a_cut_or_altered_archive_is_never_half_a_data_set(cifar, flowers, tmp_path):
    rng = np.random.default_rng(0)
    archive = flowers[0] / "102flowers.tgz"
    for source, path, split in (
        (f"cifar10:{cifar}", cifar, "train"),
        (f"flowers102:{flowers[0]}", archive, "trainval"),
    ):
        good = path.read_bytes()
        cuts = [good[: len(good) * part // 10] for part in range(10)] + [good[:-1], good[:-8], b"<html>404</html>"]
        altered = [damaged(good, rng) for _ in range(40)]
        # Damage inside the tar, under a checksum that fits.
        plain = gzip.decompress(good)
        inside = [gzip.compress(plain[: len(plain) * part // 10], 1) for part in range(9)]
        inside += [gzip.compress(b"\xff" * 512 + plain[512:], 1)]
        for number, data in enumerate([*cuts, *altered, *inside]):
            path.write_bytes(data)
            try:
                make(source, tmp_path / "out", split)
            except ZpipeError as error:
                assert str(path) in str(error) and "\n" not in str(error)
            else:  # bytes of the gzip header that say nothing about the data
                assert number >= len(cuts)
                path.write_bytes(good)
                assert make(source, tmp_path / "out", split).written == 0
        path.write_bytes(good)


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (["cifar10:{cifar}", "--split", "test"], "--split test: cifar10 has train, val"),
        (["flowers102:{flowers}", "--split", "all"], "--split all: flowers102 has train, val, test, trainval"),
        (["cifar10:{cifar}", "--keys", "path"], "--keys belongs to image folders"),
        (["cifar10:{cifar}", "--image-size", "48"], "belong to the embedded scenes"),
        (["cifar10:{cifar}", "--seed", "-1"], "--seed -1"),
        (["cifar10:{cifar}.gone"], "no such file or folder; give cifar-10-binary.tar.gz"),
        (["flowers102:{flowers}/gone"], "no such file or folder; give the folder"),
        (["{cifar}"], "no such folder; give a folder of images, 'scenes', or NAME:PATH; `zpipe make-shards --help`"),
    ],
)
def test_requests_that_make_no_sense(cifar, flowers, tmp_path, cli, args, told):
    source, *options = (arg.format(cifar=cifar, flowers=flowers[0]) for arg in args)
    done = cli("make-shards", source, tmp_path / "out", *options)
    assert done.code == 2 and told in done.error and not (tmp_path / "out").exists()


# -------------------------------------------------------------------------------------------------------- Flowers-102


@pytest.mark.parametrize("kind", ["archive", "folder", "archive named"])
@pytest.mark.parametrize(
    ("split", "lists"),
    [("train", ["trnid"]), ("val", ["valid"]), ("test", ["tstid"]), ("trainval", ["trnid", "valid"])],
)
def test_flowers_keep_their_bytes_and_splits(flowers, tmp_path, cli, kind, split, lists):
    root, images = flowers
    if kind == "folder":
        unpack(root)
    source = root / "102flowers.tgz" if kind == "archive named" else root
    done = cli("make-shards", f"flowers102:{source}", tmp_path / "out", "--split", split, "--no-shuffle")
    assert done.code == 0 and "warning" not in done.stderr
    samples = samples_of(tmp_path / "out")
    ids = [number for name in lists for number in SPLITS[name]]
    assert [sample.key for sample in samples] == [f"image_{number:05d}" for number in ids]
    classes = read_index(tmp_path / "out").classes
    assert len(classes) == 102
    for sample, number in zip(samples, ids, strict=True):
        assert sample.image == images[f"{sample.key}.jpg"]
        assert sample.label == FLOWER_LABELS[number - 1] - 1 and classes[sample.label] == str(FLOWER_LABELS[number - 1])
        assert sample.meta == {"width": 30 + number, "height": 20, "source": f"jpg/{sample.key}.jpg"}


def test_flowers_that_cannot_be_decoded_are_put_aside(flowers, tmp_path, cli):
    root, images = flowers
    images["image_00005.jpg"] = images["image_00005.jpg"][:300]
    pack(root / "102flowers.tgz", {f"jpg/{name}": data for name, data in images.items()})
    done = cli("make-shards", f"flowers102:{root}", tmp_path / "out")
    assert done.code == 1 and "1 image put aside" in done.error
    with open(tmp_path / "out" / "quarantine.csv", newline="") as file:
        assert [row["file"] for row in csv.DictReader(file)] == ["jpg/image_00005.jpg"]
    assert sorted(sample.key for sample in samples_of(tmp_path / "out")) == ["image_00002", "image_00011"]


@pytest.mark.parametrize("kind", ["archive", "folder"])
def test_an_image_that_is_not_there_is_named(flowers, tmp_path, kind):
    root, images = flowers
    links = []
    del images["image_00002.jpg"]
    if kind == "archive":  # a link is no image, wherever it leads
        links = [("jpg/image_00002.jpg", "/etc/hostname")]
    pack(root / "102flowers.tgz", {f"jpg/{name}": data for name, data in images.items()}, links)
    if kind == "folder":
        unpack(root)
    with pytest.raises(ZpipeError, match="lacks 1 of the images that setid.mat lists, image_00002.jpg the first"):
        make(f"flowers102:{root}", tmp_path / "out", "train")


MAT_DAMAGE = {
    "no labels file": ("imagelabels.mat", None, "can't be read .No such file or directory.; put it there"),
    "no splits file": ("setid.mat", None, "can't be read .No such file or directory.; put it there"),
    "other variables": ("setid.mat", {"trn": [1]}, "'trnid' is not a list of whole numbers from 1 to 12"),
    "a label of 103": (
        "imagelabels.mat",
        {"labels": [1, 103]},
        "'labels' is not a list of whole numbers from 1 to 102",
    ),
    "a label of 0": ("imagelabels.mat", {"labels": [0, 1]}, "'labels' is not"),
    "a fraction": ("imagelabels.mat", {"labels": [1.5]}, "'labels' is not"),
    "not a number": ("imagelabels.mat", {"labels": [np.nan]}, "'labels' is not"),
    "text": ("imagelabels.mat", {"labels": "rose"}, "'labels' is not"),
    "cells": ("imagelabels.mat", {"labels": np.array([1, "x"], dtype=object)}, "'labels' is not"),
    "nothing": ("imagelabels.mat", {"labels": []}, "'labels' is not"),
    "image 13": ("setid.mat", {"trnid": [1, 13]}, "'trnid' is not"),
    "an image twice": ("setid.mat", {"trnid": [1, 1]}, "trnid list an image more than once"),
    "a web page": ("setid.mat", b"<html>404</html>" * 20, "not a MATLAB 5 file"),
    "an empty file": ("setid.mat", b"", "not a MATLAB 5 file"),
}


@pytest.mark.parametrize("damage", MAT_DAMAGE)
def test_wrong_mat_files_are_told_in_a_line(flowers, tmp_path, damage):
    root = flowers[0]
    name, content, told = MAT_DAMAGE[damage]
    (root / name).unlink()
    if isinstance(content, dict):
        savemat(root / name, content)
    elif content is not None:
        (root / name).write_bytes(content)
    with pytest.raises(ZpipeError, match=told) as error:
        make(f"flowers102:{root}", tmp_path / "out", "train")
    assert str(root / name) in str(error.value) and "\n" not in str(error.value) and not (tmp_path / "out").exists()


@pytest.mark.parametrize("compressed", [False, True])
def test_no_damage_to_a_mat_file_is_more_than_a_line(flowers, tmp_path, compressed):
    root, rng = flowers[0], np.random.default_rng(0)
    savemat(root / "setid.mat", {name: np.array([ids]) for name, ids in SPLITS.items()}, do_compression=compressed)
    good = (root / "setid.mat").read_bytes()
    refused = 0
    for number in range(300):
        data = damaged(good, rng) if number % 3 else good[: rng.integers(0, len(good))]
        (root / "setid.mat").write_bytes(data)
        try:
            Flowers102Source(root, split="trainval", shard_size=5, shuffle_seed=None)
        except ZpipeError as error:
            assert "\n" not in str(error)
            refused += 1
    assert refused > 100


def test_every_kind_of_number_and_what_else_a_mat_file_holds(tmp_path):
    path = tmp_path / "x.mat"
    kinds = {f"a_{np.dtype(k)}": np.arange(1, 7).astype(k).reshape(2, 3) for k in "bBhHiIlLfd"}
    others = {"t": "text", "c": np.array([1, "x"], dtype=object), "s": {"f": [1, 2]}, "z": np.array([1j])}
    for compressed in (False, True):
        savemat(path, kinds | others, do_compression=compressed)
        found = read_numbers(path)
        assert found.keys() == kinds.keys()
        for name, values in kinds.items():
            np.testing.assert_array_equal(found[name], values.ravel(order="F"))


def test_a_mat_file_of_the_other_byte_order(tmp_path):
    def element(kind, data):
        return struct.pack(">II", kind, len(data)) + data + bytes(-len(data) % 8)

    parts = element(6, struct.pack(">II", 6, 0)) + element(5, struct.pack(">ii", 1, 3)) + b"\0\x02\0\x01ab\0\0"
    parts += element(9, struct.pack(">ddd", 1, 2, 300))
    (tmp_path / "x.mat").write_bytes(b"MATLAB 5.0".ljust(124) + b"\x01\0MI" + element(14, parts))
    assert read_numbers(tmp_path / "x.mat")["ab"].tolist() == [1, 2, 300]


def test_a_variable_that_unpacks_to_fill_the_memory_is_refused(tmp_path):
    bomb = zlib.compress(bytes((1 << 24) + 1))
    data = b"MATLAB 5.0".ljust(124) + b"\0\x01IM" + struct.pack("<II", 15, len(bomb)) + bomb
    (tmp_path / "x.mat").write_bytes(data)
    with pytest.raises(ZpipeError, match="larger than 16777216 bytes"):
        read_numbers(tmp_path / "x.mat")


# -------------------------------------------------------------------------------------------------------- what follows


def test_training_reads_what_was_made(cifar, batches, flowers, tmp_path):
    make(f"cifar10:{cifar}", tmp_path / "cifar", "train", shuffle_seed=3)
    loader = RelevanceLoader(
        tmp_path / "cifar", batch_size=8, image_size=32, augment="eval", view=ViewConfig(crop_pct=1.0)
    )
    records = np.concatenate([batches[name] for name in TRAIN])
    seen = 0
    for batch in loader:
        for key, image, label in zip(batch["key"], batch["image"], batch["label"], strict=True):
            record = records[int(key.removeprefix("train-"))]
            assert int(label) == record[0]
            np.testing.assert_array_equal(image, record[1:].reshape(3, 32, 32))
            seen += 1
    assert seen == 5 * ROWS
    make(f"flowers102:{flowers[0]}", tmp_path / "flowers-out", "trainval")
    batch = next(iter(RelevanceLoader(tmp_path / "flowers-out", batch_size=5, image_size=16)))
    labels = {f"image_{number:05d}": int(label) - 1 for number, label in enumerate(FLOWER_LABELS, start=1)}
    assert batch["label"].tolist() == [labels[key] for key in batch["key"]]


def test_the_recipe_trains_on_cifar_by_name(cifar, tmp_path, cli):
    make(f"cifar10:{cifar}", tmp_path / "shards", "train")
    assert VIT_RECIPES["cifar10"].image_size == 32 and VIT_RECIPES["flowers102"].image_size == 224
    line = ["train-vit", tmp_path / "shards", "--out", tmp_path / "run", "--model", "deit_tiny_patch16_224"]
    line += ["--recipe", "cifar10-small", "--batch-size", 8, "--epochs", 0.5, "--data-workers", 0, "--device", "cpu"]
    line += [f"--model-arg={name}" for name in ("embed_dim=24", "depth=1", "num_heads=3")]
    done = cli(*line)
    assert done.code == 0, done.stderr
    settings = json.loads((tmp_path / "run" / "run.json").read_text())["settings"]
    assert settings["image_size"] == 32 and settings["model_args"]["patch_size"] == 4


def test_an_archive_that_unpacks_to_fill_the_memory_is_refused(tmp_path, cifar_files, monkeypatch):
    monkeypatch.setattr(datasets, "MAX_UNPACKED_BYTES", 1 << 20)
    path = pack(tmp_path / "x.tar.gz", cifar_files | {"zeros": bytes(1 << 20)})
    with pytest.raises(ZpipeError, match="x.tar.gz: unpacks to more than 1048576 bytes; fetch it again"):
        make(f"cifar10:{path}", tmp_path / "out", "train")


def test_variables_together_are_bounded_and_have_few_dimensions(tmp_path):
    savemat(tmp_path / "many.mat", {f"v{n}": np.zeros((1, 1 << 20)) for n in range(3)}, do_compression=True)
    with pytest.raises(ZpipeError, match="all together are larger than 16777216 bytes"):
        read_numbers(tmp_path / "many.mat")
    savemat(tmp_path / "flat.mat", {"v": np.zeros((1,) * 33)})
    with pytest.raises(ZpipeError, match="more than 32 dimensions"):
        read_numbers(tmp_path / "flat.mat")


def test_an_image_folder_has_no_splits(photos, tmp_path, cli):
    done = cli("make-shards", photos, tmp_path / "out", "--split", "val")
    assert done.code == 2 and "--split val: an image folder has no splits; give the folder of that split" in done.error
