"""VOC and COCO: small data sets in the published layouts, their boxes in shards, and what may be wrong with them."""

import csv
import json
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings
from killing import kill_after_three_tars

from zpipe.pipeline import annotations
from zpipe.pipeline.annotations import VOC_CLASSES, CocoSource, VocSource
from zpipe.pipeline.make_shards import make_shards
from zpipe.pipeline.shard_reader import open_shards, read_samples
from zpipe.pipeline.voc_xml import MAX_XML_BYTES, read_voc_xml
from zpipe.schemas.errors import UsageError, ZpipeError
from zpipe.schemas.shard_index import read_index

# Width, height, and the objects of each image: class, box as VOC has it, difficult.
VOC = {
    "2007_000027": (48, 50, [("person", (18, 11, 35, 36), 0)]),
    "2007_000032": (50, 28, [("aeroplane", (11, 8, 38, 19), 0), ("person", (20, 19, 21, 26), 1)]),
    "2007_000033": (30, 20, []),
    "2007_000039": (50, 37, [("tvmonitor", (1, 1, 50, 37), 0), ("tvmonitor", ("16.5", "9.0", 34, 27), 0)]),
}
TRAIN, VAL = ("2007_000032", "2007_000033", "2007_000027"), ("2007_000039",)
# Images: id, file, width, height. Annotations: id, image, category, x, y, width, height, crowd.
COCO_IMAGES = [
    (397133, "000000397133.jpg", 64, 42),
    (37777, "000000037777.jpg", 35, 23),
    (252219, "252219.jpg", 40, 28),
]
COCO_BOXES = [
    (1768, 252219, 18, 3.5, 4.25, 10, 12.5, 0),
    (900100, 397133, 90, 0.0, 2, 63.99, 8, 1),
    (82445, 397133, 1, 21.0, 1.0, 5.0, 6.0, 0),
]
CATEGORIES = [(90, "toothbrush"), (1, "person"), (18, "dog")]


def xml_of(stem, width, height, objects):
    items = "".join(
        f"<object><name>{name}</name><pose>Left</pose><difficult>{difficult}</difficult>"
        f"<part><name>head</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>2</xmax><ymax>2</ymax></bndbox></part>"
        f"<bndbox><xmin>{x1}</xmin><ymin>{y1}</ymin><xmax>{x2}</xmax><ymax>{y2}</ymax></bndbox></object>"
        for name, (x1, y1, x2, y2), difficult in objects
    )
    size = f"<size><width>{width}</width><height>{height}</height><depth>3</depth></size>"
    return f"<annotation><folder>VOC2012</folder><filename>{stem}.jpg</filename>{size}{items}</annotation>"


@pytest.fixture
def voc(tmp_path, encode):
    """The folder above VOCdevkit, and the JPEGs by name."""
    root = tmp_path / "voc" / "VOCdevkit" / "VOC2012"
    for name in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (root / name).mkdir(parents=True)
    images = {}
    for seed, (stem, (width, height, objects)) in enumerate(VOC.items()):
        images[stem] = encode("JPEG", width, height, seed=seed)
        (root / "JPEGImages" / f"{stem}.jpg").write_bytes(images[stem])
        (root / "Annotations" / f"{stem}.xml").write_text(xml_of(stem, width, height, objects))
    for split, stems in {"train": TRAIN, "val": VAL, "trainval": TRAIN + VAL}.items():
        (root / "ImageSets" / "Main" / f"{split}.txt").write_text("\n".join(stems) + "\n")
    (root / "ImageSets" / "Main" / "dog_train.txt").write_text("2007_000032 -1\n")
    return root, images


def coco_json(**changes):
    return {
        "info": {"year": 2017},
        "licenses": [{"id": 1}],
        "images": [
            {"id": id, "file_name": name, "width": width, "height": height, "license": 1, "coco_url": "http://x"}
            for id, name, width, height in COCO_IMAGES
        ],
        "annotations": [
            {
                "id": id,
                "image_id": image,
                "category_id": category,
                "bbox": box,
                "iscrowd": crowd,
                "area": 1.5,
                "segmentation": {"counts": [1, 2], "size": [3, 4]} if crowd else [[1.5, 2.5, 3.5]],
            }
            for id, image, category, *box, crowd in COCO_BOXES
        ],
        "categories": [{"id": id, "name": name, "supercategory": "x"} for id, name in CATEGORIES],
    } | changes


@pytest.fixture
def coco(tmp_path, encode):
    """The file of annotations, and the JPEGs by name."""
    root = tmp_path / "coco"
    (root / "val2017").mkdir(parents=True)
    (root / "annotations").mkdir()
    images = {}
    for seed, (_, name, width, height) in enumerate(COCO_IMAGES):
        images[name] = encode("JPEG", width, height, seed=seed)
        (root / "val2017" / name).write_bytes(images[name])
    path = root / "annotations" / "instances_val2017.json"
    path.write_text(json.dumps(coco_json()))
    return path, images


def make_voc(root, out, split="train", **changes):
    return make_shards(VocSource(root, **({"split": split, "shard_size": 2, "shuffle_seed": None} | changes)), out)


def make_coco(path, out, **changes):
    return make_shards(CocoSource(path, **({"images": None, "shard_size": 2, "shuffle_seed": None} | changes)), out)


def samples_of(out):
    return {sample.key: sample for path, entry in open_shards(out)[0] for sample in read_samples(path, entry)}


# ----------------------------------------------------------------------------------------------------------------- VOC


@pytest.mark.parametrize("place", ["VOC2012", "VOCdevkit", "above"])
def test_voc_keeps_its_bytes_and_its_boxes_go_from_edge_to_edge(voc, tmp_path, cli, place):
    root, images = voc
    given = {"VOC2012": root, "VOCdevkit": root.parent, "above": root.parents[1]}[place]
    done = cli("make-shards", f"voc:{given}", tmp_path / "out", "--split", "trainval", "--no-shuffle")
    assert done.code == 0 and "warning" not in done.stderr and ", 20 classes" in done.stdout
    samples = samples_of(tmp_path / "out")
    assert list(samples) == [*TRAIN, *VAL]
    assert read_index(tmp_path / "out").classes == VOC_CLASSES == tuple(sorted(VOC_CLASSES))
    for stem, (width, height, objects) in VOC.items():
        sample = samples[stem]
        assert sample.image == images[stem] and sample.label is None
        expected = {
            "width": width,
            "height": height,
            "source": f"{stem}.jpg",
            "boxes": [[float(x1) - 1, float(y1) - 1, float(x2), float(y2)] for _, (x1, y1, x2, y2), _ in objects],
            "box_labels": [VOC_CLASSES.index(name) for name, _, _ in objects],
            "difficult": [difficult for _, _, difficult in objects],
        }
        assert sample.meta == expected | ({"box": expected["boxes"][0]} if len(objects) == 1 else {})
    assert samples["2007_000027"].box == (17, 10, 35, 36)
    assert samples["2007_000039"].meta["boxes"] == [[0, 0, 50, 37], [15.5, 8, 34, 27]]


def test_splits_are_the_lists_and_classes_are_numbered_alike_in_all(voc, tmp_path, cli):
    root, _ = voc
    assert list(samples_of(made(make_voc, root, tmp_path / "val", split="val"))) == list(VAL)
    assert read_index(tmp_path / "val").classes == VOC_CLASSES
    done = cli("make-shards", f"voc:{root}", tmp_path / "out", "--split", "test")
    assert done.code == 2 and f"--split test: {root} has train, trainval, val" in done.error


def made(make, source, out, **settings):
    make(source, out, **settings)
    return out


def test_classes_of_other_data_in_this_layout_are_those_that_occur(voc, tmp_path, cli):
    root, _ = voc
    path = root / "Annotations" / "2007_000027.xml"
    path.write_text(path.read_text().replace("person", "zebra"))
    done = cli("make-shards", f"voc:{root}", tmp_path / "out", "--no-shuffle")
    assert done.code == 0 and "3 classes, not VOC's; they are numbered as they occur in this split" in done.stderr
    assert read_index(tmp_path / "out").classes == ("aeroplane", "person", "zebra")
    assert samples_of(tmp_path / "out")["2007_000032"].meta["box_labels"] == [0, 1]


def test_boxes_are_cut_at_the_edge_and_those_without_area_left_out_and_counted(voc, tmp_path, cli):
    root, _ = voc
    objects = [
        ("dog", (-3, 5, 60, 20), 0),
        ("cat", (10, 9, 9, 12), 1),
        ("cow", (49, 1, 70, 9), 0),
        ("cat", (5, 5, 5, 5), 1),
    ]
    (root / "Annotations" / "2007_000027.xml").write_text(xml_of("2007_000027", 48, 50, objects))
    done = cli("make-shards", f"voc:{root}", tmp_path / "out")
    assert done.code == 0
    assert "with a box without area (left out) 2, with a box cut at the edge of its image 1" in done.stdout
    meta = samples_of(tmp_path / "out")["2007_000027"].meta
    assert meta["boxes"] == [[0, 4, 48, 20], [4, 4, 5, 5]] and meta["difficult"] == [0, 1] and "box" not in meta
    assert meta["box_labels"] == [VOC_CLASSES.index("dog"), VOC_CLASSES.index("cat")]


def test_an_annotation_of_another_size_than_its_image_puts_the_image_aside(voc, tmp_path, cli):
    root, _ = voc
    (root / "Annotations" / "2007_000027.xml").write_text(xml_of("2007_000027", 50, 48, []))
    done = cli("make-shards", f"voc:{root}", tmp_path / "out")
    assert done.code == 1
    with open(tmp_path / "out" / "quarantine.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows == [{"file": "2007_000027.jpg", "reason": "has 48 x 50 pixels, and its annotation says 50 x 48"}]


XML_DAMAGE = {
    "nothing": (b"", "no element found"),
    "cut": (b"<annotation><size>", "no element found"),
    "a web page": (b"<html></html>", "its root is not <annotation> but <html>"),
    "entities": (
        b'<!DOCTYPE a [<!ENTITY a "ha"><!ENTITY b "&a;&a;">]><annotation>&b;</annotation>',
        "it declares a document type",
    ),
    "an entity elsewhere": (
        b'<!DOCTYPE a SYSTEM "/etc/passwd"><annotation>&a;</annotation>',
        "declares a document type",
    ),
    "entities in UTF-16": (
        '<!DOCTYPE a [<!ENTITY a "ha"><!ENTITY b "&a;&a;">]><annotation>&b;</annotation>'.encode("utf-16"),
        "it declares a document type",
    ),
    "too large": (b" " * (MAX_XML_BYTES + 1), "more than 1048576 bytes"),
    "an unknown encoding": (b"<?xml version='1.0' encoding='hex'?><annotation/>", "hex"),
    "no text": (b"\xff\xfe\0", "not well-formed|no element|unclosed"),
    "no box": (b"<annotation><object><name>dog</name></object></annotation>", "object 0 has no bndbox"),
    "no name": (b"<annotation><object><bndbox/></object></annotation>", "object 0 has no name"),
    "no edge": (
        b"<annotation><object><name>a</name><bndbox><xmin>1</xmin></bndbox></object></annotation>",
        "number ymin",
    ),
    "not a number": (b"<annotation><size><width>nan</width><height>1</height></size></annotation>", "no number width"),
    "too large a number": (b"<annotation><size><width>1e300</width></size></annotation>", "no number width"),
    "an escape": (b"<annotation><size><width>\xc2\x9b31m</width></size></annotation>", r"x9b31m"),
}


@pytest.mark.parametrize("damage", XML_DAMAGE)
def test_a_malformed_annotation_is_told_in_a_line(voc, tmp_path, damage):
    root, _ = voc
    data, told = XML_DAMAGE[damage]
    path = root / "Annotations" / "2007_000033.xml"
    path.write_bytes(data)
    with pytest.raises(ZpipeError, match=told) as error:
        make_voc(root, tmp_path / "out")
    assert str(error.value).startswith(f"{path}: ") and str(error.value).isprintable()
    assert not (tmp_path / "out").exists()


@settings(deadline=None)
@given(st.binary(max_size=60) | st.text("<>/abnotidxmsze &;!?'\"=1.", max_size=80).map(str.encode))
def test_no_bytes_are_more_than_an_annotation_or_a_line(data):
    for content in (data, b"<annotation>" + data + b"</annotation>"):
        try:
            size, objects = read_voc_xml(content, "x.xml")
        except ZpipeError as error:
            assert str(error).startswith("x.xml: not readable") and "\n" not in str(error)
        else:
            assert (size is None or min(size) > 0) and all(len(item.box) == 4 for item in objects)


@pytest.mark.parametrize(
    ("change", "error", "told"),
    [
        (
            lambda root: (root / "Annotations" / "2007_000032.xml").unlink(),
            ZpipeError,
            "32.xml: can't be read",
        ),
        (
            lambda root: (root / "JPEGImages" / "2007_000032.jpg").unlink(),
            ZpipeError,
            "lacks 1 of the 3 .*32.jpg",
        ),
        (lambda root: (root / "ImageSets/Main/train.txt").write_text("../../../x\n"), ZpipeError, "outside of"),
        (lambda root: (root / "ImageSets/Main/train.txt").write_text("a\na\n"), ZpipeError, "has the key 'a' of a.jpg"),
        (lambda root: (root / "ImageSets/Main/train.txt").write_text("\n"), UsageError, "lists no images"),
        (lambda root: (root / "ImageSets/Main/train.txt").write_bytes(b"\xff"), ZpipeError, "can't be read"),
        (lambda root: (root / "JPEGImages").rename(root / "images"), UsageError, "no folder with JPEGImages"),
    ],
)
def test_what_voc_lacks_is_told_in_a_line(voc, tmp_path, change, error, told):
    change(voc[0])
    with pytest.raises(error, match=told) as caught:
        make_voc(voc[0], tmp_path / "out")
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()


def test_two_years_are_ambiguous(voc, tmp_path):
    root, _ = voc
    for name in ("JPEGImages", "ImageSets/Main"):
        (root.parent / "VOC2007" / name).mkdir(parents=True)
    with pytest.raises(UsageError, match="holds VOC2007, VOC2012; give one of these folders"):
        make_voc(root.parent, tmp_path / "out")


# ---------------------------------------------------------------------------------------------------------------- COCO


def test_coco_keeps_its_bytes_boxes_and_ids(coco, tmp_path, cli):
    path, images = coco
    done = cli("make-shards", f"coco:{path}", tmp_path / "out", "--no-shuffle")
    assert done.code == 0 and "warning" not in done.stderr
    assert read_index(tmp_path / "out").classes == ("person", "dog", "toothbrush")  # by id: 1, 18, 90
    samples = samples_of(tmp_path / "out")
    assert [f"{key}.jpg" for key in samples] == [name for _, name, _, _ in COCO_IMAGES]
    for _, name, width, height in COCO_IMAGES:
        sample = samples[Path(name).stem]
        assert sample.image == images[name] and sample.label is None
        assert (sample.meta["width"], sample.meta["height"], sample.meta["source"]) == (width, height, name)
    crowd = samples["000000397133"].meta
    assert crowd["boxes"] == [[0, 2, 63.99, 10], [21, 1, 26, 7]] and crowd["box_labels"] == [2, 0]
    assert crowd["iscrowd"] == [1, 0] and crowd["image_id"] == 397133 and "box" not in crowd
    assert samples["000000037777"].meta["boxes"] == samples["000000037777"].meta["box_labels"] == []
    assert samples["252219"].box == (3.5, 4.25, 13.5, 16.75)


def test_images_of_coco_may_lie_elsewhere_and_in_folders(coco, tmp_path, cli):
    path, _ = coco
    folder = path.parents[1] / "val2017"
    whole = samples_of(made(make_coco, path, tmp_path / "a"))
    (tmp_path / "elsewhere").mkdir()
    folder.rename(tmp_path / "elsewhere" / "val")
    done = cli("make-shards", f"coco:{path}", tmp_path / "b", "--no-shuffle")
    assert done.code == 2 and f"there is no folder {folder} of its images; give it by --images" in done.error
    done = cli(
        "make-shards", f"coco:{path}", tmp_path / "b", "--no-shuffle", "--images", tmp_path / "elsewhere" / "val"
    )
    assert done.code == 0 and samples_of(tmp_path / "b") == whole
    content = coco_json()
    for image in content["images"]:
        image["file_name"] = f"val/{image['file_name']}"
    path.write_text(json.dumps(content))
    inside = samples_of(made(make_coco, path, tmp_path / "c", images=tmp_path / "elsewhere"))
    assert [(key, sample.image) for key, sample in inside.items()] == [(k, s.image) for k, s in whole.items()]


def changed(kind, place, **values):
    content = coco_json()
    content[kind][place] |= values
    return content


COCO_DAMAGE = {
    "not JSON": (b"<html>", "not readable as COCO's annotations of boxes"),
    "a list": ([], "not readable as COCO"),
    "another object": ({"shards": []}, "missing required field `images`"),
    "captions": (coco_json(annotations=[{"id": 1, "image_id": 37777, "caption": "x"}]), "category_id"),
    "three edges": (changed("annotations", 1, bbox=[1, 2, 3]), r"annotations\[1\].bbox"),
    "a text as edge": (changed("annotations", 0, bbox=[1, 2, 3, "4"]), "Expected `float`, got `str`"),
    "an edge too far": (changed("annotations", 0, bbox=[1, 2, 3, 1e300]), "2147483648"),
    "another image": (changed("annotations", 2, image_id=5), "annotation 82445 is of image 5, which"),
    "another category": (changed("annotations", 2, category_id=2), "annotation 82445 is of category 2, which"),
    "an id of 2 ** 63": (changed("images", 0, id=2**63), "not readable as COCO"),
    "an id twice": (changed("images", 0, id=37777), "two images have one id"),
    "a category twice": (changed("categories", 0, id=1), "two categories have one id"),
    "an escape in a name": (changed("categories", 0, name="\x1b[31m"), "category 90 has no printable name"),
    "a file elsewhere": (changed("images", 1, file_name="../../secret.jpg"), "outside of"),
    "an absolute file": (changed("images", 1, file_name="/etc/passwd"), "outside of"),
    "a file twice": (changed("images", 1, file_name="252219.png"), "252219.jpg has the key '252219' of 252219.png"),
    "a category of the same name": (changed("categories", 0, name="dog"), "two classes are named 'dog'; rename one"),
    "a file twice with long names": (
        coco_json(images=[{"id": n, "file_name": "x" * 5000 + f"{n}/b", "width": 1, "height": 1} for n in (1, 2)]),
        "x{77}[.]{3} has the key 'b' of x{77}[.]{3}; rename one",
    ),
    "an absent file": (changed("images", 1, file_name="\u202ex.jpg"), "U.202E"),
    "no images": (coco_json(images=[]), "lists no images"),
}


@pytest.mark.parametrize("damage", COCO_DAMAGE)
def test_a_json_that_is_no_coco_is_told_in_a_line(coco, tmp_path, damage):
    path, _ = coco
    content, told = COCO_DAMAGE[damage]
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    with pytest.raises(ZpipeError, match=told) as error:
        make_coco(path, tmp_path / "out")
    assert str(error.value).startswith(f"{path}: ") and str(error.value).isprintable()
    assert not (tmp_path / "out").exists() and len(str(error.value)) < 400 + 2 * len(str(path))


def test_annotations_of_coco_are_bounded(coco, tmp_path, monkeypatch):
    monkeypatch.setattr(annotations, "MAX_COCO_BYTES", coco[0].stat().st_size - 1)
    with pytest.raises(ZpipeError, match=f"{coco[0]}: .*has more than .* bytes, too many for a file of its kind"):
        make_coco(coco[0], tmp_path / "out")


def test_an_absent_file_with_a_name_that_no_file_has_is_told_in_a_short_line(coco, voc, tmp_path):
    coco[0].write_text(json.dumps(changed("images", 1, file_name="x" * 5000 + "/b.jpg")))
    with pytest.raises(ZpipeError, match="lacks 1 of the 3 images .* lists, x{77}[.]{3} the first"):
        make_coco(coco[0], tmp_path / "out")
    (voc[0] / "ImageSets" / "Main" / "train.txt").write_text("x" * 5000 + "/b")
    with pytest.raises(ZpipeError, match="lacks 1 of the 1 images .* lists, x{77}[.]{3} the first"):
        make_voc(voc[0], tmp_path / "out")


@settings(deadline=None, max_examples=50)
@given(
    st.lists(
        st.tuples(*[st.floats(-(2**31), 2**31) | st.integers(-5, 25)] * 4, st.sampled_from([1, 18, 90])), max_size=6
    )
)
def test_every_box_of_coco_is_kept_cut_or_counted(tmp_path_factory, boxes):
    from PIL import Image

    root = tmp_path_factory.mktemp("coco")
    Image.new("RGB", (20, 10)).save(root / "a.png")
    content = coco_json(
        images=[{"id": 1, "file_name": "a.png", "width": 20, "height": 10}],
        annotations=[
            {"id": n, "image_id": 1, "category_id": category, "bbox": box} for n, (*box, category) in enumerate(boxes)
        ],
    )
    (root / "x.json").write_text(json.dumps(content))
    source = CocoSource(root / "x.json", images=root, shard_size=1, shuffle_seed=None)
    (record,) = source.records(0)
    left_out = sum("left out" in note for note in record.notes)
    kept = np.array(record.meta["boxes"]).reshape(-1, 4)
    assert len(kept) + left_out == len(boxes) == len(record.meta["box_labels"]) + left_out
    assert (kept >= 0).all() and (kept[:, 2] <= 20).all() and (kept[:, 3] <= 10).all()
    assert (kept[:, 0] < kept[:, 2]).all() and (kept[:, 1] < kept[:, 3]).all()


# ---------------------------------------------------------------------------------------------------------------- both


@pytest.mark.parametrize("kind", ["voc", "coco"])
def test_order_and_changes_are_those_of_every_source(voc, coco, tmp_path, kind):
    make, source = {"voc": (make_voc, voc[0]), "coco": (make_coco, coco[0])}[kind]
    orders = [list(samples_of(made(make, source, tmp_path / str(seed), shuffle_seed=seed))) for seed in range(6)]
    assert len({tuple(order) for order in orders}) > 1 and len({tuple(sorted(order)) for order in orders}) == 1
    (tmp_path / "0" / "shard-00001.tar").unlink()
    assert make(source, tmp_path / "0", shuffle_seed=0).written == 1
    path = source if kind == "coco" else source / "Annotations" / "2007_000027.xml"
    path.write_text(path.read_text().replace("21.0", "22.0").replace("<xmin>18", "<xmin>17"))
    with pytest.raises(ZpipeError, match="content_sha256"):
        make(source, tmp_path / "0", shuffle_seed=0)


def test_a_killed_run_goes_on(coco, encode, tmp_path, contents, command):
    path, _ = coco
    count = 40
    content = coco_json(annotations=[])
    for number in range(count):
        (path.parents[1] / "val2017" / f"x{number}.jpg").write_bytes(encode("JPEG", 64, 42, seed=number))
        content["images"].append({"id": number, "file_name": f"x{number}.jpg", "width": 64, "height": 42})
    path.write_text(json.dumps(content))
    make_coco(path, tmp_path / "whole", shard_size=1, shuffle_seed=0)
    out = tmp_path / "out"
    args = command("make-shards", f"coco:{path}", out, "--shard-size", 1)
    kill_after_three_tars(args, out)
    assert make_coco(path, out, shard_size=1, shuffle_seed=0).written < count + len(COCO_IMAGES)
    assert contents(out) == contents(tmp_path / "whole")


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (["coco:{coco}", "--split", "val"], "--split val: a file of COCO is one split"),
        (["coco:{coco}.gone"], "no such file; give a file of annotations"),
        (["coco:{coco}", "--images", "{coco}"], "can't be listed"),
        (["voc:{voc}", "--images", "x"], "--images belongs to coco:"),
        (["voc:{voc}/gone"], "no folder with JPEGImages"),
        (["voc:{voc}", "--label-column", "x"], "--label-column belongs to parquet:"),
        (["voc:s3://bucket/voc"], "a URL is not supported here"),
    ],
)
def test_requests_that_make_no_sense_for_them(voc, coco, tmp_path, cli, args, told):
    done = cli(
        "make-shards",
        *(arg.format(coco=coco[0], voc=voc[0]) for arg in args[:1]),
        tmp_path / "out",
        *(arg.format(coco=coco[0], voc=voc[0]) for arg in args[1:]),
    )
    assert done.code == 2 and told in done.error and not (tmp_path / "out").exists()
