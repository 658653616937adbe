"""Image data sets in Parquet: small ones in the layouts of the Hugging Face Hub, and what may be wrong with them."""

import io
import json
import os
import re
import subprocess
import sys
from collections import Counter
from http.server import BaseHTTPRequestHandler
from urllib.parse import unquote, urlsplit

import hypothesis.strategies as st
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from killing import kill_after_three_tars
from PIL import Image
from web_server import WebServer

from zpipe.pipeline import parquet, parquet_scan
from zpipe.pipeline.imagenet_names import synsets, wnids
from zpipe.pipeline.make_shards import make_shards
from zpipe.pipeline.parquet import ParquetSource
from zpipe.pipeline.parquet_files import find_parquet
from zpipe.pipeline.shard_reader import open_shards, read_samples
from zpipe.schemas.errors import UsageError, ZpipeError
from zpipe.schemas.shard_index import read_index
from zpipe.schemas.storage import as_path, create_exclusively, upload
from zpipe.train.data.loader import RelevanceLoader

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
NAMES = ["tabby", "Zebra", "ant"]  # not sorted


@pytest.fixture(scope="module")
def pictures(encode):
    """JPEGs of different sizes."""
    return [encode("JPEG", 20 + n, 30, seed=n) for n in range(24)]


def described(**features):
    """The metadata of the library `datasets`."""
    features = {"image": {"_type": "Image"}} | features
    return {b"huggingface": json.dumps({"info": {"features": features}}).encode()}


def class_label(names=NAMES):
    return {"names": list(names), "_type": "ClassLabel"}


def write(path, columns, *, rows_per_group=3, metadata=None, **options):
    """Write columns (name: type, values) as a Parquet file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    schema = pa.schema([(name, kind) for name, (kind, _) in columns.items()], metadata=metadata)
    table = pa.table({name: pa.array(values, kind) for name, (kind, values) in columns.items()}, schema=schema)
    pq.write_table(table, path, row_group_size=rows_per_group, **options)
    return path


def images(data, paths=None):
    return IMAGE, [{"bytes": each, "path": paths and paths[n]} for n, each in enumerate(data)]


@pytest.fixture
def plain(tmp_path, pictures):
    """Three files of 10, 10 and 4 rows with labels and names of files, as the Hub holds a data set."""
    root = tmp_path / "plain"
    for number, rows in enumerate((range(10), range(10, 20), range(20, 24))):
        columns = {
            "image": images([pictures[row] for row in rows], [f"photos/p.{row}.jpg" for row in rows]),
            "label": (pa.int64(), [row % 3 for row in rows]),
        }
        path = root / "data" / f"train-{number:05d}-of-00003.parquet"
        write(path, columns, metadata=described(label=class_label()))
    return root


def open_parquet(path, **changes):
    return ParquetSource(as_path(path), **({"split": "train", "shard_size": 5, "shuffle_seed": None} | changes))


def make(path, out, **changes):
    return make_shards(open_parquet(path, **changes), out)


def samples_of(out):
    return [sample for path, entry in open_shards(out)[0] for sample in read_samples(path, entry)]


def refused(*args, match, error=ZpipeError, **changes):
    with pytest.raises(error, match=match) as caught:
        open_parquet(*args, **changes)
    assert "\n" not in str(caught.value) and str(caught.value).isprintable()
    return str(caught.value)


# ------------------------------------------------------------------------------------------------- images and labels


def test_images_keep_their_bytes_labels_and_names(plain, pictures, tmp_path, cli):
    done = cli("make-shards", f"parquet:{plain}", tmp_path / "out", "--no-shuffle", "--shard-size", 7)
    assert done.code == 0 and "warning" not in done.stderr
    assert "24 images in 4 shards (4 written now), 3 classes" in done.stdout
    index = read_index(tmp_path / "out")
    assert index.classes == tuple(NAMES) and index.source == f"parquet:{plain}"
    samples = samples_of(tmp_path / "out")
    assert [sample.key for sample in samples] == [f"p_{row}" for row in range(24)]
    for row, sample in enumerate(samples):
        assert sample.image == pictures[row] and sample.label == row % 3
        file, place = divmod(row, 10)
        assert sample.meta == {
            "width": 20 + row,
            "height": 30,
            "source": f"data/train-{file:05d}-of-00003.parquet:{place}",
            "path": f"photos/p.{row}.jpg",
        }


def test_imagenet_has_its_wnids_and_published_keys(tmp_path, pictures, encode):
    png = encode("PNG", 9, 8)
    paths = ["n01440764_10026_n01440764.JPEG", "n02105855_2933_n02105855.JPEG"]
    features = described(label=class_label(synset.name for synset in synsets()))
    columns = {"image": images([pictures[0], png], paths), "label": (pa.int64(), [0, 999])}
    write(tmp_path / "in" / "data" / "train-00000-of-00001.parquet", columns, metadata=features)
    make(tmp_path / "in", tmp_path / "out")
    assert read_index(tmp_path / "out").classes == wnids()
    samples = samples_of(tmp_path / "out")
    assert [(sample.key, sample.label) for sample in samples] == [("n01440764_10026", 0), ("n02105855_2933", 999)]
    assert samples[1].image == png
    columns["image"] = images([pictures[0], png], ["ILSVRC2012_val_00000001_n01751748.JPEG", "ILSVRC2012_val_2.JPEG"])
    write(tmp_path / "in" / "data" / "validation-00000-of-00001.parquet", columns, metadata=features)
    make(tmp_path / "in", tmp_path / "val", split="val")
    assert samples_of(tmp_path / "val")[0].key == "ILSVRC2012_val_00000001"


def test_labels_of_minus_one_or_null_are_none_and_counted(tmp_path, pictures, cli):
    columns = {"image": images(pictures[:4]), "label": (pa.int8(), [-1, 2, None, 0])}
    path = write(tmp_path / "x.parquet", columns, metadata=described(label=class_label()))
    done = cli("make-shards", f"parquet:{path}", tmp_path / "out", "--no-shuffle")
    assert done.code == 0 and "quarantined 0, without a label 2" in done.stdout
    assert [sample.label for sample in samples_of(tmp_path / "out")] == [None, 2, None, 0]


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())])
def test_labels_that_are_names_are_numbered_in_their_order(tmp_path, pictures, kind):
    names = ["cat", "ant", None, "Zoo", "ant"]
    columns = {"image": images(pictures[:5]), "class": (kind, names)}
    path = write(tmp_path / "x.parquet", columns)
    assert "3 classes, numbered as they occur in this split" in open_parquet(path).warning
    make(path, tmp_path / "out")
    assert read_index(tmp_path / "out").classes == ("Zoo", "ant", "cat")
    assert [sample.label for sample in samples_of(tmp_path / "out")] == [2, 1, None, 0, 1]


@pytest.mark.parametrize(
    "feature",
    [
        {"dtype": {"class_label": {"names": {"1": "b", "0": "a", "2": "c"}}}},
        {"class_label": {"names": ["a", "b", "c"]}},
        {"_type": "ClassLabel", "names": ["a", "b", "c"], "num_classes": 3, "id": None},
    ],
)
def test_class_names_in_every_form_that_descriptions_have(tmp_path, pictures, feature):
    columns = {"image": images(pictures[:3]), "y": (pa.uint16(), [0, 2, 1])}
    path = write(tmp_path / "x.parquet", columns, metadata=described(y=feature))
    assert open_parquet(path).classes == ("a", "b", "c")
    refused(write(path, columns, metadata=described(y=class_label("ab"))), match="x.parquet:1: has label 2, not one")


def test_plain_values_go_into_the_json_of_each_image(tmp_path, pictures, cli):
    columns = {
        "image": images(pictures[:3]),
        "width": (pa.int32(), [1, 2, 3]),
        "score": (pa.float32(), [0.5, float("nan"), None]),
        "caption": (pa.string(), ["a\x1b[31m", "b" * 1025, "c"]),
        "is_good": (pa.bool_(), [True, False, None]),
        "seed": (pa.uint64(), [2**64 - 1, 0, 1]),
        "half": (pa.float16(), np.array([1, 2, 3], np.float16)),
        "boxes": (pa.list_(pa.int32()), [[1], [2], []]),
        "when": (pa.timestamp("s"), [1, 2, 3]),
    }
    path = write(tmp_path / "x.parquet", columns)
    done = cli("make-shards", f"parquet:{path}", tmp_path / "out", "--no-shuffle")
    assert done.code == 0 and "columns that are left out: width, boxes, when" in done.stderr
    assert "without labels; --label-column names a column that has them" in done.stderr
    assert "with a text of more than 1024 bytes (left out) 1" in done.stdout
    assert "with a number that is not finite (left out) 1" in done.stdout
    metas = [sample.meta for sample in samples_of(tmp_path / "out")]
    kept = [{name: meta[name] for name in meta if name not in ("width", "height", "source")} for meta in metas]
    assert kept == [
        {"score": 0.5, "caption": "a\x1b[31m", "is_good": True, "seed": 2**64 - 1, "half": 1.0},
        {"is_good": False, "seed": 0, "half": 2.0},
        {"caption": "c", "seed": 1, "half": 3.0},
    ]
    assert [meta["width"] for meta in metas] == [20, 21, 22]


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary(), pa.struct([("bytes", pa.large_binary())])])
def test_images_of_every_binary_type(tmp_path, pictures, kind):
    values = [{"bytes": data} for data in pictures[:4]] if pa.types.is_struct(kind) else pictures[:4]
    path = write(tmp_path / "x.parquet", {"id": (pa.binary(), [b"a"] * 4), "jpg": (kind, values)})
    make(path, tmp_path / "out")
    assert [sample.image for sample in samples_of(tmp_path / "out")] == pictures[:4]


def test_a_path_that_is_no_text_names_nothing(tmp_path, pictures):
    kind = pa.struct([("path", pa.int64()), ("bytes", pa.binary())])
    path = write(tmp_path / "x.parquet", {"image": (kind, [{"bytes": data, "path": 7} for data in pictures[:2]])})
    assert keys_of(open_parquet(path), 0) == ["train-00000000", "train-00000001"]


# ---------------------------------------------------------------------------------------------------------------- keys


@pytest.mark.parametrize(
    ("paths", "why"),
    [
        (["a.jpg", "b.jpg", None, "d.jpg"], "row 2 of .* has no name of a file"),
        (["a.jpg", "x/b.jpg", "c.jpg", "y/b.png"], "names of files are repeated, in x.parquet"),
        (["a.jpg", "b.jpg", "c\u202e.jpg", "d.jpg"], "the name of a file, .*u202e, makes no key"),
        (["a.jpg", "b.jpg", "c" * 300, "d.jpg"], "makes no key"),
        (["a.jpg", "b.jpg", "", "d.jpg"], "has no name of a file"),
        (None, "has no name of a file"),
    ],
)
def test_where_a_name_is_missing_or_repeated_all_keys_are_numbers(tmp_path, pictures, cli, paths, why):
    path = write(tmp_path / "x.parquet", {"image": images(pictures[:4], paths)}, rows_per_group=2)
    for seed in (0, 1):
        done = cli("make-shards", f"parquet:{path}", tmp_path / str(seed), "--seed", seed)
        assert done.code == 0
        assert re.search(f"warning: .*{why}, so that all keys are numbers of rows, train-00000000", done.stderr)
        found = {sample.key: sample.image for sample in samples_of(tmp_path / str(seed))}
        assert found == {f"train-{row:08d}": pictures[row] for row in range(4)}


def test_names_are_compared_over_all_files(plain, pictures, tmp_path):
    columns = {"image": images(pictures[:1], ["p_3.jpg"]), "label": (pa.int64(), [0])}
    write(plain / "data" / "train-extra.parquet", columns, metadata=described(label=class_label()))
    source = open_parquet(plain)
    assert "names of files are repeated, in data/train-00000-of-00003.parquet" in source.warning
    assert source.describe()["keys"] == "row"


# --------------------------------------------------------------------------------------------------------------- order


def keys_of(source, part):
    return [record.key for record in source.records(part)]


@settings(deadline=None, max_examples=60)
@given(
    files=st.lists(st.tuples(st.integers(0, 9), st.integers(1, 9)), min_size=1, max_size=4),
    shard_size=st.integers(1, 12),
    seed=st.none() | st.integers(0, 2**63),
)
def test_every_row_is_in_one_part_whatever_the_sizes(tmp_path_factory, files, shard_size, seed):
    root = tmp_path_factory.mktemp("rows")
    tiny = io.BytesIO()
    Image.new("RGB", (1, 1)).save(tiny, "PNG")
    first = 0
    for number, (rows, rows_per_group) in enumerate(files):
        names = [f"{row}.png" for row in range(first, first + rows)]
        columns = {"image": images([tiny.getvalue()] * rows, names), "row": (pa.int64(), range(first, first + rows))}
        write(root / f"{number}.parquet", columns, rows_per_group=rows_per_group)
        first += rows
    if not first:
        refused(root, match="hold no rows|no column holds image", error=UsageError)
        return
    if not files[0][0]:
        return  # columns are found by the images of the first file
    source = open_parquet(root, shard_size=shard_size, shuffle_seed=seed)
    parts = [list(source.records(part)) for part in range(source.parts())]
    assert [len(part) for part in parts[:-1]] == [shard_size] * (len(parts) - 1)
    rows = [int(record.key) for part in parts for record in part]
    assert sorted(rows) == list(range(first)) and all(int(r.key) == r.meta["row"] for part in parts for r in part)
    assert seed is not None or rows == sorted(rows)
    part = len(parts) // 2  # a part alone, in another process
    again = open_parquet(root, shard_size=shard_size, shuffle_seed=seed)
    assert list(again.records(part)) == parts[part] and again.describe() == source.describe()


def test_the_order_is_drawn_from_the_seed_and_the_samples_are_the_same(plain, tmp_path):
    found = {}
    for seed in (None, 0, 1):
        make(plain, tmp_path / str(seed), shuffle_seed=seed, shard_size=24)
        found[seed] = {sample.key: sample for sample in samples_of(tmp_path / str(seed))}
    assert found[None] == found[0] == found[1]
    orders = [list(samples) for samples in found.values()]
    assert orders[0] != orders[1] != orders[2] != orders[0]
    labels = [sample.label for sample in found[0].values()]  # row groups hold three labels in a row
    assert any(labels[n] == labels[n + 1] for n in range(23))


def test_a_row_group_is_read_once_and_its_images_are_not_kept(plain, monkeypatch):
    read = Counter()
    whole = ParquetSource._read_group

    def counted(self, number):
        read[number] += 1
        return whole(self, number)

    monkeypatch.setattr(ParquetSource, "_read_group", counted)
    for shard_size in (1, 2, 5, 24):
        for seed in (None, 3):
            read.clear()
            source = open_parquet(plain, shard_size=shard_size, shuffle_seed=seed)
            for part in range(source.parts()):
                keys_of(source, part)
            assert set(read.values()) == {1} and len(read) == 10
            assert len(source._last) == 1


def test_a_killed_run_goes_on(plain, tmp_path, contents, command):
    out = tmp_path / "out"
    make(plain, tmp_path / "whole", shard_size=1, shuffle_seed=0)
    args = command("make-shards", f"parquet:{plain}", out, "--shard-size", 1)
    made = kill_after_three_tars(args, out)
    assert made < 24
    report = make(plain, out, shard_size=1, shuffle_seed=0)
    assert report.count == 24 and 24 - made <= report.written <= 24 - made + 1
    assert contents(out) == contents(tmp_path / "whole")


def test_a_data_set_that_changed_is_not_gone_on_with(plain, pictures, tmp_path):
    make(plain, tmp_path / "out")
    path = plain / "data" / "train-00002-of-00003.parquet"
    table = pq.read_table(path)
    pq.write_table(table, path, row_group_size=2)
    with pytest.raises(ZpipeError, match="listing_sha256"):
        make(plain, tmp_path / "out")
    pq.write_table(table, path, row_group_size=3)
    assert make(plain, tmp_path / "out").written == 0
    with pytest.raises(ZpipeError, match="label_column = 'label', now it is None"):
        make(plain, tmp_path / "out", label_column="none")


def test_a_file_that_changes_while_it_is_packed_is_noticed(plain, tmp_path):
    source = open_parquet(plain)
    path = plain / "data" / "train-00001-of-00003.parquet"
    pq.write_table(pq.read_table(path), path, row_group_size=3)
    assert len(list(source.records(0))) == 5
    with pytest.raises(ZpipeError, match=f"{path}: was altered since it was listed; run again"):
        list(source.records(2))


@pytest.mark.parametrize(("kind", "before", "after"), [(pa.string(), "ant", "cat"), (pa.int64(), 1, 10**9)])
def test_a_remote_label_that_was_not_there_before_is_noticed(tmp_path, pictures, kind, before, after):
    url = as_path(f"memory://{tmp_path.name}/x.parquet")

    def wrote(label):
        columns = {"label": (kind, [label] * 2), "image": images(pictures[:2])}
        path = write(tmp_path / "x.parquet", columns, compression="none", use_dictionary=False, write_statistics=False)
        url.write_bytes(path.read_bytes())

    wrote(before)
    source = open_parquet(url)
    wrote(after)
    with pytest.raises(ZpipeError, match="x.parquet:0: was altered since it was listed; run again"):
        list(source.records(0))


@pytest.mark.parametrize("kind", [pa.int64(), pa.string()])
def test_other_labels_or_names_in_a_file_of_the_same_size_are_another_data_set(tmp_path, pictures, kind):
    path, labels, names = tmp_path / "x.parquet", [0, 1, 2, 1], ["a.jpg", "b.jpg", "c.jpg", "d.jpg"]
    sizes = set()

    def wrote(labels, names):
        columns = {"label": (kind, pa.array(labels).cast(kind)), "image": images(pictures[:4], names)}
        write(path, columns, compression="none", use_dictionary=False, write_statistics=False)
        sizes.add(path.stat().st_size)

    wrote(labels, names)
    make(path, tmp_path / "out")
    wrote(labels[::-1], names)
    with pytest.raises(ZpipeError, match="listing_sha256"):
        make(path, tmp_path / "out")
    wrote(labels, names[::-1])
    with pytest.raises(ZpipeError, match="listing_sha256"):
        make(path, tmp_path / "out")
    wrote(labels, names)
    assert make(path, tmp_path / "out").written == 0 and len(sizes) == 1


def test_training_reads_what_was_made(plain, tmp_path):
    make(plain, tmp_path / "out", shuffle_seed=2)
    seen = {}
    for batch in RelevanceLoader(tmp_path / "out", batch_size=8, image_size=32, augment="eval"):
        seen |= dict(zip(batch["key"], batch["label"].tolist(), strict=True))
    assert seen == {f"p_{row}": row % 3 for row in range(24)}


# --------------------------------------------------------------------------------------------------- files and splits

LAYOUTS = {
    "of the Hub": (
        ["data/train-00000-of-00001", "data/validation-00000-of-00001", "data/test-00000-of-00001"],
        "val",
        1,
    ),
    "with hashes": (
        ["data/train-00000-of-00002-b42a775f407cee45", "data/train-00001-of-00002-b42a775f407cee45"],
        "train",
        2,
    ),
    "of a config": (["plain/train-00000-of-00001", "plain/test-00000-of-00001"], "test", 1),
    "converted": (["default/train/0000", "default/train/0001", "default/validation/0000"], "train", 2),
    "flat": (["train", "val"], "val", 1),
    "by words": (["photos_train_00", "photos_train_01", "photos_test_00"], "training", 2),
    "folders": (["train/part-0", "train/part-1", "dev/part-0"], "validation", 2 - 1),
    "a split of its own": (["data/unlabeled-00000-of-00001", "data/train-00000-of-00001"], "unlabeled", 1),
    "no splits": (["a", "b", "more/../c"], "train", 3),
    "upper case": (["TRAIN.PARQUET", "Val.Parquet"], "val", 1),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("place", ["local", "remote"])
def test_the_files_of_a_split_are_found_by_their_names(tmp_path, layout, place):
    names, split, count = LAYOUTS[layout]
    root = as_path(f"memory://{tmp_path.name}/{layout.replace(' ', '-')}") if place == "remote" else tmp_path / "root"
    for name in names:
        path = root / (name if name.lower().endswith(".parquet") else f"{name}.parquet").replace("more/../", "")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x" * len(name))
    found = find_parquet(root, split)
    assert len(found.sizes) == count and list(found.sizes) == sorted(found.sizes) and not found.warning
    assert all((found.root / name).is_file() for name in found.sizes)


@pytest.mark.parametrize(
    ("names", "split", "told"),
    [
        (["data/train-00000-of-00001"], "val", "--split val: {root} has train; give one of them"),
        (["a", "b"], "test", "--split test: the names of the files in {root} tell no splits; leave --split out"),
        (
            ["en/train-00000-of-00001", "de/train-00000-of-00001"],
            "train",
            "several data sets with this split, in de, en",
        ),
        (["train/a", "cfg/train/a"], "train", "several data sets with this split, in ., cfg; give the folder of one"),
        ([], "train", "{root}: holds no .parquet file"),
        ([".hidden/train", "a/b/c/d/e/train"], "train", "{root}: holds no .parquet file"),
    ],
)
def test_files_that_are_not_one_split_are_refused(tmp_path, names, split, told):
    root = tmp_path / "root"
    root.mkdir()
    for name in names:
        (root / f"{name}.parquet").parent.mkdir(parents=True, exist_ok=True)
        (root / f"{name}.parquet").write_bytes(b"x")
    with pytest.raises(UsageError, match=re.escape(told.format(root=root))):
        find_parquet(root, split)


def test_files_and_folders_that_are_passed_by_are_counted(plain, tmp_path, cli):
    for name in ("extra", "more/a", "a/b/c/d/e/train"):
        (plain / f"{name}.parquet").parent.mkdir(parents=True, exist_ok=True)
        (plain / f"{name}.parquet").write_bytes(b"x")
    (plain / "linked").symlink_to(plain / "data")
    done = cli("make-shards", f"parquet:{plain}", tmp_path / "out")
    counted = "links to folders 1, folders more than 4 levels deep 1, files whose names tell no split 2"
    assert done.code == 0 and f"warning: {plain}: left out: {counted}\n" in done.stderr


def test_a_data_set_that_lacks_files_is_told(plain, tmp_path, cli):
    (plain / "data" / "train-00001-of-00003.parquet").unlink()
    done = cli("make-shards", f"parquet:{plain}", tmp_path / "out")
    assert done.code == 0 and f"warning: {plain}: 2 files; their names say that there are 3" in done.stderr
    done = cli("make-shards", f"parquet:{plain}/data/train-00000-of-00003.parquet", tmp_path / "one")
    assert done.code == 0 and "warning" not in done.stderr


def test_the_folder_of_a_split_and_a_file_have_the_split_that_they_are_named_after(plain, tmp_path):
    (tmp_path / "validation").mkdir()
    for path in (plain / "data").iterdir():
        path.rename(tmp_path / "validation" / f"{path.name[6:11]}.parquet")
    refused(tmp_path / "validation", match="--split train: .* has val", error=UsageError)
    source = open_parquet(tmp_path / "validation", split="val")
    assert source.describe()["split"] == "val" and sum(len(keys_of(source, n)) for n in range(5)) == 24
    one = tmp_path / "validation" / "00002.parquet"
    assert keys_of(open_parquet(one, split="validation"), 0) == ["p_20", "p_21", "p_22", "p_23"]


# ------------------------------------------------------------------------------------------------------- wrong columns


def test_what_can_be_several_columns_is_named(tmp_path, pictures):
    two = {"image": images(pictures[:2]), "thumb": (pa.binary(), pictures[:2])}
    labels = {"label": (pa.int32(), [0, 1]), "target": (pa.int32(), [5, 6]), "flag": (pa.bool_(), [True, False])}
    path = write(tmp_path / "x.parquet", two | labels)
    refused(path, match="the columns image, thumb hold images; give one of them by --image-column", error=UsageError)
    again = {"image_column": "thumb"}
    refused(
        path, match="columns label, target may be the labels; give one .* --label-column", error=UsageError, **again
    )
    source = open_parquet(path, **again, label_column="target")
    records = list(source.records(0))
    assert [(record.image, record.label) for record in records] == list(zip(pictures, [5, 6], strict=False))
    assert records[0].meta["flag"] is True and "columns that are left out: image, label" in source.warning
    assert [record.label for record in open_parquet(path, **again, label_column="none").records(0)] == [None, None]
    for option, name in (("image_column", "nope"), ("label_column", "nope"), ("label_column", "x\x1b")):
        refused(path, match="has no such column; it has image, thumb", error=UsageError, **(again | {option: name}))
    refused(path, match="--image-column label: .* is int32; images are binary", error=UsageError, image_column="label")
    refused(path, match="column flag, are bool", error=UsageError, **again, label_column="flag")


def test_of_several_described_labels_the_usual_name_is_taken(tmp_path, pictures):
    columns = {"img": images(pictures[:2])}
    columns |= {"coarse_label": (pa.int64(), [0, 1]), "fine_label": (pa.int64(), [2, 0])}
    metadata = described(coarse_label=class_label("ab"), fine_label=class_label("xyz"))
    path = write(tmp_path / "x.parquet", columns, metadata=metadata)
    assert [record.label for record in open_parquet(path).records(0)] == [2, 0]
    assert open_parquet(path, label_column="coarse_label").classes == ("a", "b")
    columns["coarser_label"] = columns.pop("fine_label")
    metadata = described(coarse_label=class_label("ab"), coarser_label=class_label("xyz"))
    refused(write(path, columns, metadata=metadata), match="coarse_label, coarser_label may be", error=UsageError)


DAMAGE = {
    "no images": ({"image": (pa.binary(), [b"abc", b"d"])}, None, "no column holds image files, of image"),
    "no binary column": (
        {"a": (pa.int8(), [1]), "b": (pa.string(), ["x"])},
        None,
        "no column holds image files, of a, b",
    ),
    "labels of floats": ({"label": (pa.float64(), [0.5, 1])}, None, "column label, are double, not whole numbers"),
    "labels of lists": ({"labels": (pa.list_(pa.int8()), [[1], [2]])}, None, "column labels, are list"),
    "a label too high": ({"label": (pa.int64(), [1, 3])}, "label", "x.parquet:1: has label 3, not one of 0 to 2"),
    "a label too low": ({"label": (pa.int64(), [1, -2])}, "label", "x.parquet:1: has label -2, not one of 0 to 2"),
    "a huge label": ({"label": (pa.uint64(), [1, 2**64 - 1])}, None, "has label 18446744073709551615, not one of 0 to"),
    "a class with an escape": ({"label": (pa.string(), ["a", "\x1b[31m"])}, None, "a class is named '.x1b"),
    "a class without a name": ({"label": (pa.string(), ["a", ""])}, None, "a class is named ''"),
    "a class with a long name": ({"label": (pa.string(), ["a", "b" * 201])}, None, "a class is named 'bbb"),
    "files beside": ({"image": (IMAGE, [{"path": "a.jpg"}] * 2)}, None, "holds the name of an image file, a.jpg, and"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_wrong_columns_are_told_in_a_line(tmp_path, pictures, damage):
    columns, named, told = DAMAGE[damage]
    image = {} if "image" in columns or "a" in columns else {"image": images(pictures[:2])}
    metadata = described(**{named: class_label()}) if named else None
    path = write(tmp_path / "x.parquet", image | columns, metadata=metadata)
    assert refused(path, match=told).startswith(str(path))


@pytest.mark.parametrize("text", [b"{", b"[]", b'{"info": 3}', b'{"info": {"features": []}}', b"\xff"])
def test_a_damaged_description_is_told_in_a_line(tmp_path, pictures, text):
    path = write(tmp_path / "x.parquet", {"image": images(pictures[:2])}, metadata={b"huggingface": text})
    refused(path, match="x.parquet: not readable as the description of a data set")


@pytest.mark.parametrize("names", [["a", "\x07"], [""], ["a" * 201]])
def test_class_names_that_are_none_are_refused(tmp_path, pictures, names):
    columns = {"image": images(pictures[:2]), "label": (pa.int8(), [0, 0])}
    refused(
        write(tmp_path / "x.parquet", columns, metadata=described(label=class_label(names))), match="a class is named"
    )


def test_two_classes_of_one_name_are_refused(tmp_path, pictures):
    columns = {"image": images(pictures[:2]), "label": (pa.int8(), [0, 2])}
    path = write(tmp_path / "x.parquet", columns, metadata=described(label=class_label("abcbc")))
    refused(path, match="x.parquet: two classes are named 'b'; rename one of them")


def test_files_of_different_data_sets_are_refused(plain, pictures):
    path = plain / "data" / "train-00003-of-00004.parquet"
    columns = {"image": images(pictures[:1], ["z.jpg"]), "label": (pa.int64(), [0])}
    write(path, columns, metadata=described(label=class_label("xyz")))
    refused(plain, match="00003-of-00004.parquet: names other classes than data/train-00000-of-00003.parquet")
    write(path, columns | {"label": (pa.int32(), [0])}, metadata=described(label=class_label()))
    refused(plain, match="its column label is int32, that of data/train-00000-of-00003.parquet is int64")
    write(path, {"image": columns["image"]})
    refused(plain, match="its column label is missing")


# ---------------------------------------------------------------------------------------------------------------- URLs


class FakeHub(BaseHTTPRequestHandler):
    """The requests of the Hugging Face Hub by which a data set is read, and plain files below /files."""

    protocol_version = "HTTP/1.1"
    files: dict[str, bytes]
    served: list[tuple[str, int]]
    answer: dict[str, int]

    def do_GET(self):
        path, query = unquote(urlsplit(self.path).path), urlsplit(self.path).query
        for part, status in self.answer.items():
            if part in path:
                return self.reply(status, b'{"error": "no"}', **{"X-Error-Message": "no\nsecond line"})
        if path.startswith("/api/datasets/owner/photos/tree/main"):
            inside = path.partition("/tree/main")[2].strip("/")
            return self.reply(200, json.dumps(self.tree(inside, "recursive=true" in query)).encode())
        if path.startswith("/api/datasets/owner/photos"):
            return self.reply(200, json.dumps({"id": "owner/photos", "sha": "a" * 40, "private": False}).encode())
        name = path.removeprefix("/datasets/owner/photos/resolve/main/").removeprefix("/files/")
        if path == "/files/":
            links = "".join(f'<a href="{each}">{each}</a>' for each in self.files)
            return self.reply(200, f'<html><a href="/secret/">up</a>{links}</html>'.encode())
        if name not in self.files:
            return self.reply(404, b"")
        data = self.files[name]
        if asked := re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", "")):
            data = data[int(asked[1]) : int(asked[2]) + 1]
            self.served.append((name, len(data)))
            place = f"bytes {asked[1]}-{int(asked[1]) + len(data) - 1}/{len(self.files[name])}"
            return self.reply(206, data, **{"Content-Range": place})
        return self.reply(200, data, **{"Accept-Ranges": "bytes"})

    do_HEAD = do_GET

    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        self.reply(200, json.dumps(self.tree("")).encode())

    def tree(self, inside, below=False):
        folders = {name.rpartition("/")[0] for name in self.files if "/" in name}
        found = [{"type": "directory", "path": name, "oid": "b"} for name in folders]
        found += [{"type": "file", "path": name, "size": len(data), "oid": "c"} for name, data in self.files.items()]
        return [
            entry
            for entry in found
            if entry["path"].rpartition("/")[0] == inside or (below and entry["path"].startswith(inside))
        ]

    def reply(self, status, data, **headers):
        self.send_response(status)
        for name, value in (headers | {"Content-Length": len(data), "ETag": '"e"', "X-Repo-Commit": "a" * 40}).items():
            self.send_header(name, str(value).replace("\n", " "))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(plain, monkeypatch):
    """A server of the files of `plain`; processes take it for the Hugging Face Hub."""
    files = {path.relative_to(plain).as_posix(): path.read_bytes() for path in sorted(plain.rglob("*.parquet"))}
    handler = type("Handler", (FakeHub,), {"files": files | {"README.md": b"#"}, "served": [], "answer": {}})
    with WebServer(handler) as server:
        handler.url = server.url
        monkeypatch.setenv("HF_ENDPOINT", handler.url)
        monkeypatch.setenv("HF_TOKEN", "hf_" + "canary" * 6)
        monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
        yield handler


def tars_of(contents, out):
    return {name: data for name, data in contents(out).items() if name.endswith(".tar")}


def test_a_data_set_of_the_hub_is_read_by_its_name(hub, plain, process, tmp_path, contents):
    make(plain, tmp_path / "local", shuffle_seed=0)
    done = process("make-shards", "parquet:hf://datasets/owner/photos", tmp_path / "out", "--shard-size", 5)
    assert done.code == 0, done.stderr
    assert tars_of(contents, tmp_path / "out") == tars_of(contents, tmp_path / "local")
    assert read_index(tmp_path / "out").source == "parquet:hf://datasets/owner/photos"
    assert "canary" not in done.stdout + done.stderr
    line = ("make-shards", "parquet:hf://datasets/owner/photos@main/data", tmp_path / "of", "--shard-size", 5)
    assert process(*line).code == 0
    assert read_index(tmp_path / "of").classes == tuple(NAMES)


@pytest.mark.parametrize(
    ("part", "status", "told"),
    [
        (
            "/resolve/",
            403,
            r"parquet: can't be read \(HTTP 403\); check the name; accept the data set's terms on its page",
        ),
        ("/api/datasets", 404, r"can't be read \(HTTP 404\); check the name"),
        (
            "/api/datasets",
            429,
            r"can't be read \(HTTP 429\); wait some minutes, and run the same command again to resume",
        ),
    ],
)
def test_what_the_hub_refuses_is_told_in_a_line(hub, process, tmp_path, part, status, told):
    hub.answer[part] = status
    done = process("make-shards", "parquet:hf://datasets/owner/photos", tmp_path / "out")
    assert done.code == 1 and re.search(told, done.error) and "canary" not in done.stdout + done.stderr
    assert "hf://datasets/owner/photos" in done.error and not (tmp_path / "out").exists()


def test_files_and_listings_of_a_web_server_are_read(hub, plain, tmp_path, contents, cli):
    name = "data/train-00002-of-00003.parquet"
    make(plain / name, tmp_path / "local")
    make(f"{hub.url}/files/{name}", tmp_path / "out")
    assert tars_of(contents, tmp_path / "out") == tars_of(contents, tmp_path / "local")
    flat = {each.removeprefix("data/"): data for each, data in hub.files.items()}
    hub.files.clear()
    hub.files.update(flat)
    source = open_parquet(f"{hub.url}/files/")
    assert sum(len(keys_of(source, part)) for part in range(source.parts())) == 24
    done = cli("make-shards", f"parquet:{hub.url}/files/gone.parquet", tmp_path / "gone")
    assert done.code != 0 and "gone.parquet" in done.error and not (tmp_path / "gone").exists()


def test_no_more_is_fetched_than_is_needed(tmp_path, hub, pictures):
    """What is beside the images of the whole file: the footer, the small columns, the page of the first image."""
    rng = np.random.default_rng(0)
    data = [pictures[row % 24] + rng.bytes(100_000) for row in range(60)]
    path = write(
        tmp_path / "x.parquet", {"image": images(data, [f"{row}.jpg" for row in range(60)])}, rows_per_group=10
    )
    hub.files["x.parquet"] = path.read_bytes()
    source = open_parquet(f"{hub.url}/files/x.parquet", shard_size=7, shuffle_seed=1)
    opened = sum(size for _, size in hub.served)
    assert opened < 1_300_000  # of 6 MB; the first page has 1 MB
    for part in range(source.parts()):
        keys_of(source, part)
    assert sum(size for _, size in hub.served) - opened < 1.01 * path.stat().st_size
    before = len(hub.served)
    keys_of(open_parquet(f"{hub.url}/files/x.parquet", shard_size=10), 3)
    assert len(hub.served) - before < 14 and hub.served[-1][1] < 1_100_000


def test_a_dead_server_and_a_missing_library_are_told_in_a_line(tmp_path, process, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    done = process("make-shards", "parquet:hf://datasets/owner/photos", tmp_path / "out")
    assert done.code == 1 and "hf://datasets/owner/photos: can't be read" in done.error
    assert "check the connection, and run the same command again to resume" in done.error
    (tmp_path / "lib" / "huggingface_hub").mkdir(parents=True)
    (tmp_path / "lib" / "huggingface_hub" / "__init__.py").write_text("raise ImportError('not installed')")
    code = "import sys; sys.modules['huggingface_hub'] = None; from zpipe.cli import main; main()"
    line = [sys.executable, "-c", code, "make-shards", "parquet:hf://datasets/owner/photos", str(tmp_path / "out")]
    ended = subprocess.run(line, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 2 and ended.stderr.count("error: ") == 1
    assert "pip install huggingface_hub" in ended.stderr and "Traceback" not in ended.stderr


def test_nothing_is_written_to_the_hub(plain, tmp_path, cli):
    done = cli("make-shards", f"parquet:{plain}", "hf://datasets/owner/photos")
    assert done.code == 2 and "a URL is not supported here" in done.error
    for write_to in (lambda url: create_exclusively(url, b""), lambda url: upload(tmp_path / "x", url)):
        (tmp_path / "x").write_bytes(b"x")
        with pytest.raises(UsageError, match="hf://datasets/owner/photos/x: is only read here"):
            write_to(as_path("hf://datasets/owner/photos/x"))


# -------------------------------------------------------------------------------------------------------- wrong images


def test_images_that_are_none_are_put_aside(tmp_path, pictures, cli):
    columns = {"image": images([pictures[0], None, pictures[1][:300], b"text", pictures[3]], list("abcde"))}
    columns["image"][1][1]["path"] = None
    path = write(tmp_path / "x.parquet", columns, rows_per_group=2)
    done = cli("make-shards", f"parquet:{path}", tmp_path / "out", "--no-shuffle")
    assert done.code == 1 and "3 images put aside" in done.error
    assert done.details[0] == "x.parquet:1: has no image"
    assert [line.partition(":")[2][0] for line in done.details] == ["1", "2", "3"]
    assert {sample.image for sample in samples_of(tmp_path / "out")} == {pictures[0], pictures[3]}


def test_damage_after_the_header_passes_where_nothing_is_decoded(tmp_path, pictures):
    cut = pictures[1][:-20]
    path = write(tmp_path / "x.parquet", {"image": images([pictures[0], cut, b"text"], ["a", "b", "c"])})
    report = make(path, tmp_path / "out", check=False)
    assert [item.file for item in report.quarantined] == ["x.parquet:2"]
    assert [sample.image for sample in samples_of(tmp_path / "out")] == [pictures[0], cut]
    with pytest.raises(ZpipeError, match="was made with --no-check; give it too"):
        make(path, tmp_path / "out")


def test_an_image_that_lies_beside_is_named_with_its_row(tmp_path, pictures, cli):
    columns = {"image": images([pictures[0], pictures[1], None], ["a.jpg", "b.jpg", "c\x1b.jpg"])}
    path = write(tmp_path / "x.parquet", columns)
    done = cli("make-shards", f"parquet:{path}", tmp_path / "out", "--no-shuffle")
    assert done.code == 1
    assert "x.parquet:2: holds the name of an image file, c\\x1b.jpg, and not the image; pack the folder" in done.error


def test_a_truncated_or_altered_file_is_never_half_a_data_set(plain, tmp_path):
    path = plain / "data" / "train-00001-of-00003.parquet"
    good = path.read_bytes()
    for size in (0, 3, 11, len(good) // 2, len(good) - 1):
        path.write_bytes(good[:size])
        assert str(path) in refused(plain, match="not readable as Parquet .*; fetch it again")
    path.write_bytes(b"<html>404</html>" * 100)
    refused(plain, match="not readable as Parquet")
    path.unlink()
    path.mkdir()
    assert len(find_parquet(plain, "train").sizes) == 2


def test_a_page_that_was_altered_is_noticed(plain, tmp_path, pictures):
    path = plain / "data" / "train-00001-of-00003.parquet"
    pq.write_table(pq.read_table(path), path, row_group_size=3, write_page_checksum=True, compression="none")
    data = bytearray(path.read_bytes())
    place = bytes(data).index(pictures[12][100:200])
    data[place + 5] ^= 1
    path.write_bytes(data)
    with pytest.raises(ZpipeError, match=f"{path}: not readable as Parquet .*; fetch it again"):
        make(plain, tmp_path / "out")


def test_sizes_are_bounded_before_and_while_they_are_unpacked(tmp_path, pictures, monkeypatch, cli):
    data = [pictures[0]] * 500  # stored once
    path = write(tmp_path / "x.parquet", {"image": images(data)}, rows_per_group=500)
    assert path.stat().st_size < 5 * len(pictures[0]) + 3000
    monkeypatch.setattr(parquet_scan, "MAX_GROUP_BYTES", 50 * len(pictures[0]))
    done = cli("make-shards", f"parquet:{path}", tmp_path / "out")
    assert done.code == 1 and "row group 0 unpacks to " in done.error and "smaller row groups" in done.error
    monkeypatch.setattr(parquet_scan, "MAX_GROUP_BYTES", len(pictures[0]) // 2)
    refused(path, match="x.parquet: row group 0 unpacks to .*; write it again with smaller row groups")
    monkeypatch.undo()
    monkeypatch.setattr(parquet, "MAX_PART_BYTES", 1000)
    refused(path, match="the row groups of one tar unpack to .*; give a smaller --shard-size")
    monkeypatch.setattr(parquet, "MAX_PART_BYTES", 60 * len(pictures[0]))
    done = cli("make-shards", f"parquet:{path}", tmp_path / "part")
    assert done.code == 1 and "the row groups of one tar unpack to" in done.error
    monkeypatch.undo()
    monkeypatch.setattr(parquet_scan, "MAX_GROUP_ROWS", 499)
    refused(path, match="row group 0 has 500 rows, not 0 to 499")


def test_nothing_but_regular_files_is_read(tmp_path, cli):
    os.mkfifo(tmp_path / "x.parquet")
    (tmp_path / "gone.parquet").symlink_to(tmp_path / "nowhere")
    done = cli("make-shards", f"parquet:{tmp_path / 'x.parquet'}", tmp_path / "out")
    assert done.code == 2 and "no such file or folder" in done.error
    done = cli("make-shards", f"parquet:{tmp_path}", tmp_path / "out")
    assert done.code == 2 and not (tmp_path / "out").exists()
    assert f"{tmp_path / 'gone.parquet'}: is a link to no file; mend or remove it" in done.error


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (["parquet:{plain}/gone"], "gone: no such file or folder; check the path"),
        (["parquet:{plain}", "--keys", "path"], "--keys belongs to image folders"),
        (["parquet:{plain}", "--seed", "-1"], "--seed -1"),
        (["parquet:{plain}", "--count", "9"], "--count, --image-size and --set belong to the embedded scenes"),
        (["parquet:{plain}", "--images", "x"], "--images belongs to coco:"),
        (["{plain}", "--image-column", "image"], "--image-column belongs to parquet:"),
        (["scenes", "--label-column", "label"], "--label-column belongs to parquet:"),
        (["parquet:zip://{plain}"], "Unsupported filesystem: 'zip'"),
        (["parquet:https://user:secret@host/x.parquet"], "credentials"),
    ],
)
def test_requests_that_make_no_sense_for_parquet(plain, tmp_path, cli, args, told):
    source, *options = (arg.format(plain=plain) for arg in args)
    done = cli("make-shards", source, tmp_path / "out", *options)
    assert done.code == 2 and told in done.error and "secret" not in done.error and not (tmp_path / "out").exists()
