"""Which files of a folder are images, which folders are classes, and what is told of the rest."""

import io
import json
import os
import re

import numpy as np
import pytest
from PIL import Image

from zpipe.pipeline.class_names import order_warnings
from zpipe.pipeline.image_folder import FolderSource
from zpipe.pipeline.make_shards import make_shards
from zpipe.pipeline.shard_reader import open_shards, read_samples
from zpipe.schemas.errors import UsageError, ZpipeError
from zpipe.schemas.images import open_image, to_rgb
from zpipe.schemas.shard_index import read_index


def put(root, files):
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


def source_of(root, **changes):
    return FolderSource(root, **({"shard_size": 100, "shuffle_seed": None, "key_rule": "stem"} | changes))


def made(root, out, **changes):
    """The report, and the samples by their files."""
    report = make_shards(source_of(root, **changes), out)
    return report, {s.meta["source"]: s for path, entry in open_shards(out)[0] for s in read_samples(path, entry)}


def image(form, **options):
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    found = Image.fromarray(pixels)
    if form == "GIF":
        found = found.quantize(64)
    buffer = io.BytesIO()
    found.save(buffer, form, **options)
    return buffer.getvalue()


# ------------------------------------------------------------------------------------------------ what an image is

KEPT = {
    "JPEG": ("a.jpg", "b.jfif", "c.jpe", "d", "e.txt", "f.png", "g.JPG"),
    "PNG": ("h", "i.png", "j.data"),
    "WEBP": ("k.webp", "l.img"),
}
REWRITTEN = {
    "BMP": ("m.bmp", "n", "o.dib"),
    "GIF": ("p.gif", "q.jpg"),
    "TIFF": ("r.tif", "s.tiff", "t.raw"),
    "PPM": ("u.ppm", "v.pnm"),
}


@pytest.mark.parametrize("listed", [False, True])
def test_an_image_is_known_by_its_content_in_class_folders_and_in_a_labels_csv(tmp_path, listed):
    files = {f"ant/{name}": image(form) for form, names in (KEPT | REWRITTEN).items() for name in names}
    put(tmp_path / "in", files)
    if listed:
        (tmp_path / "in" / "labels.csv").write_text("file,class_index\n" + "".join(f"{name},0\n" for name in files))
    report, samples = made(tmp_path / "in", tmp_path / "out")
    assert sorted(samples) == sorted(files) and report.quarantined == ()
    rewritten = sum(map(len, REWRITTEN.values()))
    assert report.account.noted["re-encoded as PNG"] == rewritten and report.account.taken == len(files)
    for name, sample in samples.items():
        if any(name.endswith(f"/{kept}") for names in KEPT.values() for kept in names):
            assert sample.image == files[name]
        else:
            with open_image(files[name]) as before, open_image(sample.image) as after:
                assert after.format == "PNG"
                np.testing.assert_array_equal(np.asarray(to_rgb(after)), np.asarray(to_rgb(before)))


def test_the_rest_is_counted_or_put_aside(tmp_path, cli):
    files = {
        "ant/a.jpg": image("JPEG"),
        "ant/text.jpg": b"<html>",
        "ant/x.heic": b"\0\0\0\x18ftypheic",
        "ant/notes.txt": b"hello",
        "ant/README": b"hello",
        "ant/.DS_Store": b"",
        "ant/Thumbs.db": b"",
        "ant/@eaDir/a.jpg": image("JPEG"),
        "__MACOSX/ant/._a.jpg": b"",
        ".ipynb_checkpoints/b.jpg": image("JPEG"),
        "bee/b.jpg": image("JPEG"),
        "loose.jpg": image("JPEG"),
        "README.md": b"",
    }
    put(tmp_path / "in", files)
    os.mkfifo(tmp_path / "in" / "ant" / "pipe.png")
    os.mkfifo(tmp_path / "in" / "ant" / "pipe")
    (tmp_path / "in" / "ant" / "gone.jpg").symlink_to("nowhere.jpg")
    out = tmp_path / "out"
    done = cli("make-shards", tmp_path / "in", out)
    counts = {
        "hidden or system folder": 3,
        "hidden": 2,
        "no image: .heic": 1,
        "no image: .txt": 1,
        "no image: no suffix": 1,
        "can't be read: is a FIFO, not a regular file": 1,
        "no image: .md": 1,
    }
    assert done.code == 1 and "4 images put aside" in done.error
    assert f"{out}: 2 images in 1 shard (1 written now), 2 classes; seen 16, taken 2, left out 10 (" in done.stdout
    account = read_index(out).account
    assert account.left_out == counts and account.seen == 16 and account.quarantined == 4
    assert sorted(done.details) == [
        "ant/gone.jpg: No such file or directory",
        "ant/pipe.png: is a FIFO, not a regular file",
        "ant/text.jpg: not a readable JPEG, PNG, WEBP, BMP, GIF, TIFF, PPM image",
        "loose.jpg: lies in no class folder",
    ]
    assert "loose.jpg,lies in no class folder" in (out / "quarantine.csv").read_text()
    again = cli("make-shards", tmp_path / "in", out)
    assert again.code == 1 and again.stdout == done.stdout.replace("(1 written now)", "(0 written now)")


def test_what_is_done_to_pixels_is_counted(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    deep = Image.fromarray(np.full((4, 4), 40_000, np.uint16))
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    buffer = {}
    for name, (picture, options) in {
        "turned.jpg": (Image.new("RGB", (4, 4)), {"exif": exif}),
        "clear.png": (Image.new("RGBA", (4, 4)), {}),
        "deep.png": (deep, {}),
        "moves.gif": (frames[0].convert("P"), {"save_all": True, "append_images": frames[1:]}),
        "plain.jpg": (frames[0], {}),
    }.items():
        file = io.BytesIO()
        picture.save(file, Image.registered_extensions()[f".{name.rpartition('.')[2]}"], **options)
        buffer[f"ant/{name}"] = file.getvalue()
    report, samples = made(put(tmp_path / "in", buffer), tmp_path / "out")
    assert report.account.noted == {
        "with an EXIF orientation (not applied)": 1,
        "transparent (on white)": 1,
        "with 16 bits per channel (the upper 8 count)": 1,
        "with several pages or frames (the first counts)": 1,
        "re-encoded as PNG": 1,
    }
    with open_image(samples["ant/moves.gif"].image) as first:
        assert to_rgb(first).getpixel((0, 0)) == (254, 0, 0) or to_rgb(first).getpixel((0, 0)) == (255, 0, 0)
    assert read_index(tmp_path / "out").account == report.account
    assert make_shards(source_of(tmp_path / "in"), tmp_path / "out").account == report.account


# ---------------------------------------------------------------------------------------------- what a class is


@pytest.mark.parametrize(
    "names",
    [
        ("train", "val"),
        ("train", "validation", "test"),
        ("Training", "Testing"),
        ("train2017", "val2017"),
        ("train_images", "dev"),
        ("test",),
        ("train", "val", "annotations"),
        ("train", "test", "more"),
    ],
)
def test_splits_are_not_taken_for_classes(tmp_path, names):
    put(tmp_path / "in", {f"{name}/{name}.jpg": image("JPEG") for name in names if name != "annotations"})
    put(tmp_path / "in", {f"{name}/x.txt": b"" for name in names})
    with pytest.raises(
        UsageError, match=f"{names[0]}.* looks? like .*splits? of a data set, .* give one of them, such as"
    ):
        source_of(tmp_path / "in")


def test_a_class_may_be_named_like_one_split(tmp_path):
    put(tmp_path / "in", {f"{name}/{name}.jpg": image("JPEG") for name in ("boat", "train", "truck")})
    assert source_of(tmp_path / "in").classes == ("boat", "train", "truck")


def test_folders_of_ours_are_no_classes(tmp_path, cli):
    root = put(tmp_path / "in", {"ant/a.jpg": image("JPEG"), "bee/b.jpg": image("JPEG")})
    assert cli("make-shards", root, root / "shards").code == 0
    put(root, {"store/manifest.json": b'{\n  "format": "zpipe-relevance-store"', "cat/manifest.json": b'{"format": 7}'})
    put(root, {"cat/c.jpg": image("JPEG")})
    source = source_of(root)
    assert source.classes == ("ant", "bee", "cat") and source.account.left_out["folder written by zpipe"] == 2


def test_one_class_and_empty_classes_are_told(tmp_path, cli):
    put(tmp_path / "in", {"imagenet/n01/a.jpg": image("JPEG"), "imagenet/n02/b.jpg": image("JPEG")})
    done = cli("make-shards", tmp_path / "in", tmp_path / "out")
    assert done.code == 0 and "1 class;" in done.stdout
    assert f"warning: {tmp_path / 'in'}: there is one class, 'imagenet'; if its sub-folders are the classes, give " in (
        done.stderr
    )
    for name in ("empty", "void"):
        (tmp_path / "in" / name).mkdir()
    source = source_of(tmp_path / "in")
    assert source.classes == ("empty", "imagenet", "void")
    assert any(
        "2 of 3 classes have no images (empty, void); they keep their numbers" in line for line in source.warnings
    )


@pytest.mark.parametrize(
    ("names", "told"),
    [
        ([str(number) for number in range(12)], "'10' is class 2; .*such as timm, number it 10"),
        (["class1", "class10", "class2"], "'class10' is class 1; .* number it 2"),
        (["Zebra", "ant"], "'Zebra' is class 0; .* number it 1"),
        (["ant", "bee"], None),
        (["00", "01", "10"], None),
        (["n01440764", "n01443537"], None),
        (["Ant", "ant"], "'Ant' and 'ant' differ in case"),
        (["caf\u00e9", "cafe\u0301"], "differ in case or in the form"),
    ],
)
def test_an_order_that_other_tools_do_not_share_is_told(tmp_path, names, told):
    lines = order_warnings(tmp_path, sorted(names), names)
    assert bool(lines) == (told is not None)
    if told:
        assert any(re.search(told, line) for line in lines)


def test_links_to_folders_are_followed_once(tmp_path):
    root = put(tmp_path / "in", {"ant/a.jpg": image("JPEG"), "bee/b.jpg": image("JPEG")})
    put(tmp_path / "more", {"c.jpg": image("JPEG"), "deep/d.jpg": image("JPEG")})
    (root / "ant" / "more").symlink_to(tmp_path / "more")
    (root / "ant" / "again").symlink_to(tmp_path / "more")
    (root / "ant" / "up").symlink_to("..")
    (root / "ant" / "top").symlink_to("/")
    (root / "ant" / "self").symlink_to("self")
    (root / "cat").symlink_to(tmp_path / "more")
    (root / "dog").symlink_to(".")
    source = source_of(root, key_rule="path")
    assert source.classes == ("ant", "bee", "cat", "dog")
    assert len(source.files()) == 6 and {"cat/c.jpg", "cat/deep/d.jpg"} < set(source.files())
    assert source.account.left_out["folder linked again"] == 4


def test_a_folder_that_can_not_be_listed_is_named(tmp_path, monkeypatch):
    root = put(tmp_path / "in", {"ant/a.jpg": image("JPEG"), "bee/b.jpg": image("JPEG")})
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("bee"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(ZpipeError, match="bee: can't be listed .Permission denied.; give yourself permission"):
        source_of(root)


# --------------------------------------------------------------------------------------------------- keys and labels


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("a\nb.jpg", r"ant/a\\nb.jpg: key 'a\\nb': its name holds the unprintable character U.000A; rename the file"),
        ("a\u202eb.jpg", "U.202E"),
        ("x" * 245 + ".jpg", "its name has 245 bytes, a key has 1 to 240; rename the file"),
    ],
)
def test_a_file_whose_name_makes_no_key_is_named(tmp_path, name, told):
    put(tmp_path / "in", {f"ant/{name}": image("JPEG"), "bee/b.jpg": image("JPEG")})
    with pytest.raises(ZpipeError, match=told) as error:
        source_of(tmp_path / "in")
    assert str(error.value).isprintable()


def test_a_long_legal_name_is_a_key(tmp_path):
    name = "x" * 240
    _, samples = made(put(tmp_path / "in", {f"ant/{name}.jpg": image("JPEG")}), tmp_path / "out")
    assert [sample.key for sample in samples.values()] == [name]


def test_two_files_of_one_key_get_a_remedy_that_works(tmp_path):
    put(tmp_path / "in", {"ant/a.jpg": image("JPEG"), "ant/a.png": image("PNG")})
    with pytest.raises(ZpipeError, match=r"ant/a.png: has the key 'a' of ant/a.jpg; rename one$"):
        source_of(tmp_path / "in")
    put(tmp_path / "in2", {"ant/a.jpg": image("JPEG"), "bee/a.jpg": image("JPEG")})
    with pytest.raises(ZpipeError, match=r"rename one, or use --keys path$"):
        source_of(tmp_path / "in2")


@pytest.mark.parametrize("separator", [",", ";", "\t", ", "])
def test_a_labels_csv_may_be_separated_by_what_spreadsheets_use(tmp_path, separator):
    put(tmp_path / "in", {"a.jpg": image("JPEG"), "b.jpg": image("JPEG"), "c.jpg": image("JPEG")})
    rows = [("file", "class_index", "class_name"), ("a.jpg", "0", "ant"), ("b.jpg", "1", '"bee, wild; or not"')]
    (tmp_path / "in" / "labels.csv").write_text("".join(separator.join(row) + "\n" for row in rows))
    source = source_of(tmp_path / "in")
    assert source.classes == ("ant", "bee, wild; or not") and source.files() == ["a.jpg", "b.jpg"]
    assert source.account.left_out == {"not in labels.csv": 1}


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("file|class_index\na.jpg|0\n", "no column .*separated by a comma, semicolon or tab"),
        ("file,class_index\na.jpg,0\n./a.jpg,0\n", "line 3: lists ./a.jpg again, after line 2; remove one line"),
        (
            "file,class_index,class_name\na.jpg,0,ant\nb.jpg,0,bee\n",
            "line 3: class 0 is named 'bee' here and 'ant' in line 2",
        ),
        (
            "file,class_index,class_name\na.jpg,0,ant\nb.jpg,1,ant\n",
            "classes 0 and 1 are both named 'ant'.*; rename one",
        ),
        ("file,class_index,class_name\na.jpg,0,tench, fish\n", "line 2: has more fields than the header; put quotes"),
        ("file,class_index,class_name\na.jpg,0,\x1b[1mant\n", r"class 0 is named '\\x1b\[1mant', with an unprintable"),
        ("file,class_index,file\na.jpg,0,b.jpg\n", "two columns 'file'"),
        (f"file,class_index\n{'x' * 300}.jpg,0\n", "line 2: no file 'xxx"),
        ("file,class_index\na\0.jpg,0\n", "labels.csv"),
        ("file,class_index\na.jpg,\u0663\n", "is not a whole number"),
    ],
)
def test_a_labels_csv_that_means_two_things_is_refused(tmp_path, text, told):
    put(tmp_path / "in", {"a.jpg": image("JPEG"), "b.jpg": image("JPEG"), "labels.csv": text.encode()})
    with pytest.raises(ZpipeError, match=told) as error:
        source_of(tmp_path / "in")
    assert "\n" not in str(error.value)


# ------------------------------------------------------------------------------------------------- a changed source


def test_files_that_came_and_went_are_told(tmp_path):
    root = put(tmp_path / "in", {f"ant/{name}.jpg": image("JPEG") for name in "abcd"})
    make_shards(source_of(root, shard_size=2), tmp_path / "out")
    (root / "ant" / "b.jpg").rename(root / "ant" / "e.jpg")
    with pytest.raises(
        ZpipeError, match=r"listing_sha256 = .*1 are gone, ant/b.jpg the first; 1 are new, ant/e.jpg the fi"
    ):
        make_shards(source_of(root, shard_size=2), tmp_path / "out")
    (root / "ant" / "e.jpg").unlink()
    (tmp_path / "out" / "shards.json").unlink()
    with pytest.raises(ZpipeError, match=r"files = 4, now it is 3 .1 are gone, ant/b.jpg the first.; give another out"):
        make_shards(source_of(root, shard_size=2), tmp_path / "out")


def test_a_folder_begun_before_files_were_counted_is_resumed(tmp_path):
    root = put(tmp_path / "in", {f"ant/{name}.jpg": image("JPEG") for name in "abcd"})
    make_shards(source_of(root, shard_size=2), tmp_path / "out")
    log = tmp_path / "out" / "make-shards.jsonl"
    first, *rest = log.read_text().splitlines()
    kept = {name: value for name, value in json.loads(first).items() if name != "files"}
    parts = [{key: json.loads(line)[key] for key in ("part", "entry", "rejected")} for line in rest]
    log.write_text("".join(json.dumps(line) + "\n" for line in (kept, *parts)))
    assert make_shards(source_of(root, shard_size=2), tmp_path / "out").written == 0


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("7", "line 2: not readable as a record of make-shards"),
        ('{"part": -1, "entry": null, "rejected": []}', "line 2: .*`int` >= 0"),
        (
            '{"part": 0, "entry": {"name": "../x.tar"}, "rejected": []}',
            r"line 2: .*missing required field|line 2: .*no file name",
        ),
        ('{"part": 0, "entry": null, "rejected": [7]}', "line 2: "),
        ("{", "line 2: "),
    ],
)
def test_a_record_of_make_shards_is_typed(tmp_path, line, told):
    root = put(tmp_path / "in", {"ant/a.jpg": image("JPEG")})
    make_shards(source_of(root), tmp_path / "out")
    log = tmp_path / "out" / "make-shards.jsonl"
    log.write_text(log.read_text().splitlines()[0] + "\n" + line + "\n")
    with pytest.raises(ZpipeError, match=told) as error:
        make_shards(source_of(root), tmp_path / "out")
    assert "\n" not in str(error.value)
