"""Images into tars: the bytes stay, what can't be read is listed, and a killed run goes on where it was."""

import csv
import io
import json
import os
import re
import tarfile
import threading
import warnings

import numpy as np
import pytest
from killing import kill_after_three_tars
from PIL import Image
from tiny import header, late_profile, write_tar

from zpipe.pipeline.explainer import ExplainConfig
from zpipe.pipeline.extract import ExtractConfig, extract_teacher_maps
from zpipe.pipeline.make_shards import FolderSource, SceneSource, index_shards, make_shards
from zpipe.pipeline.shard_reader import Frame, frame_image, open_shards, read_samples, scan_shards
from zpipe.pipeline.sources import inspect_image, scene_config
from zpipe.schemas import images
from zpipe.schemas.errors import UsageError, ZpipeError
from zpipe.schemas.sample import Sample
from zpipe.schemas.shard_index import digest_file, read_index
from zpipe.schemas.storage import as_path
from zpipe.train.data.stream import list_shards


def folder(root, **changes):
    return FolderSource(root, **({"shard_size": 5, "shuffle_seed": 0, "key_rule": "stem"} | changes))


def squashed(height, width):
    return Frame(kind="full", size=(height, width), interpolation="bicubic")


def samples_of(out):
    return [sample for path, entry in open_shards(out)[0] for sample in read_samples(path, entry)]


def times(root):
    return {path.name: path.stat().st_mtime_ns for path in root.iterdir()}


def put(root, files):
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


# ------------------------------------------------------------------------------------------------ what is in a tar


def test_every_image_is_there_once_with_its_own_bytes(photos, shards):
    samples = samples_of(shards)
    assert sorted(s.key for s in samples) == sorted(path.stem for path in photos.glob("*/*.jpg"))
    for sample in samples:
        name = sample.key.partition("_")[0]
        source = photos / name / f"{sample.key}.jpg"
        assert sample.image == source.read_bytes()
        assert sample.label == ["ant", "bee", "cat"].index(name)
        with Image.open(source) as image:
            size = {"width": image.width, "height": image.height}
        assert sample.meta == size | {"source": f"{name}/{source.name}"}


def test_the_index_says_what_the_tars_hold(shards):
    index = read_index(shards)
    assert index.classes == ("ant", "bee", "cat") and [entry.count for entry in index.shards] == [5, 5, 5, 3]
    assert sorted(path.name for path in shards.iterdir()) == sorted(
        ["make-shards.jsonl", "shards.json"]
        + [f"{entry.stem}{suffix}" for entry in index.shards for suffix in (".tar", ".images.parquet")]
    )
    for entry in index.shards:
        assert (entry.bytes, entry.sha256) == ((shards / entry.name).stat().st_size, digest_file(shards / entry.name))
        assert scan_shards([shards / entry.name]).shards == (entry,)
        with tarfile.open(shards / entry.name) as tar:
            names = tar.getnames()
        assert len(names) == 3 * entry.count and {name.partition(".")[2] for name in names} == {"jpg", "cls", "json"}


def test_the_same_source_gives_the_same_bytes(photos, shards, tmp_path, contents):
    report = make_shards(folder(photos), tmp_path / "again")
    assert (report.count, report.shards, report.written, report.classes, report.quarantined) == (18, 4, 4, 3, ())
    assert contents(tmp_path / "again") == contents(shards)


def test_the_order_follows_the_seed(photos, tmp_path):
    orders = {}
    for seed in (None, 0, 1):
        make_shards(folder(photos, shuffle_seed=seed), tmp_path / str(seed))
        orders[seed] = [sample.key for sample in samples_of(tmp_path / str(seed))]
    assert orders[None] == [path.stem for path in sorted(photos.glob("*/*.jpg"))]
    assert orders[0] != orders[1] != orders[None] and sorted(orders[0]) == sorted(orders[1]) == sorted(orders[None])


@pytest.mark.parametrize(("size", "counts"), [(1, [1] * 18), (18, [18]), (100, [18]), (17, [17, 1])])
def test_no_shard_holds_more_than_its_size(photos, tmp_path, size, counts):
    make_shards(folder(photos, shard_size=size), tmp_path / "out")
    assert [entry.count for entry in read_index(tmp_path / "out").shards] == counts


def test_images_of_every_kind_keep_their_bytes_under_their_true_suffix(tmp_path, encode, cli):
    files = {
        "a/png_named.JPEG": encode("PNG", 30, 20),
        "a/cmyk.jpg": encode("JPEG", 30, 20, mode="CMYK"),
        "a/grey.jpeg": encode("JPEG", 30, 20, mode="L"),
        "b/one_pixel.jpg": encode("JPEG", 1, 1),
        "b/palette.png": encode("PNG", 30, 20, mode="P"),
        "b/alpha.PNG": encode("PNG", 30, 20, mode="RGBA"),
        "b/web.webp": encode("WEBP", 30, 20),
        "b/deep/below.v2.jpg": encode("JPEG", 30, 20),
        "b/notes.txt": b"not an image",
        "b/.hidden.jpg": b"",
    }
    put(tmp_path / "in", files)
    out = tmp_path / "out"
    done = cli("make-shards", tmp_path / "in", out)
    assert (done.code, done.stdout.strip()) == (
        0,
        f"{out}: 8 images in 1 shard (1 written now), 2 classes; seen 10, taken 8, "
        "left out 2 (hidden 1, no image: .txt 1), quarantined 0, transparent (on white) 1",
    )
    found = {sample.meta["source"]: sample for sample in samples_of(out)}
    assert sorted(found) == sorted(name for name in files if not name.endswith(("txt", ".hidden.jpg")))
    for name, sample in found.items():
        assert sample.image == files[name]
        assert frame_image(sample, squashed(16, 24)).pixels.shape == (16, 24, 3)
    with tarfile.open(out / "shard-00000.tar") as tar:
        names = tar.getnames()
    assert {"png_named.png", "cmyk.jpg", "grey.jpg", "one_pixel.jpg", "alpha.png", "web.webp", "below_v2.jpg"} <= {
        *names
    }


# ------------------------------------------------------------------------------------------- what can't be decoded


@pytest.fixture
def spoilt(tmp_path, encode):
    """Ten good images and five that can't be read, in two classes."""
    whole = encode("JPEG", 60, 40)
    files = {f"a/good{number}.jpg": encode("JPEG", 60, 40, seed=number) for number in range(10)}
    files |= {
        "b/empty.jpg": b"",
        "b/cut.jpg": whole[: len(whole) // 2],
        "b/text.jpg": b"<html>404</html>",
        "b/cut_too.jpg": encode("GIF", 60, 40, mode="P")[:60],
        "b/cut.png": encode("PNG", 60, 40)[:200],
    }
    files["b/cut2.png"] = files.pop("b/cut.png")
    return put(tmp_path / "in", files)


def test_unreadable_images_are_listed_and_the_rest_is_written(spoilt, tmp_path, cli):
    out = tmp_path / "out"
    done = cli("make-shards", spoilt, out, "--shard-size", 4)
    assert done.code == 1 and "5 images put aside" in done.error and str(out) in done.error
    assert sorted(line.partition(":")[0] for line in done.details) == sorted(
        ["b/empty.jpg", "b/cut.jpg", "b/text.jpg", "b/cut_too.jpg", "b/cut2.png"]
    )
    assert f"{out}: 10 images in" in done.stdout
    with open(out / "quarantine.csv", newline="") as file:
        reasons = {row["file"]: row["reason"] for row in csv.DictReader(file)}
    assert len(reasons) == 5 and reasons["b/empty.jpg"] == "zero bytes" and "truncated" in reasons["b/cut.jpg"].lower()
    assert "JPEG" in reasons["b/text.jpg"]
    assert sorted(sample.key for sample in samples_of(out)) == [f"good{number}" for number in range(10)]
    before = times(out)
    assert cli("make-shards", spoilt, out, "--shard-size", 4).code == 1  # still not all of the source
    assert times(out) == before


def test_a_shard_without_one_good_image_is_left_out(spoilt, tmp_path):
    report = make_shards(folder(spoilt, shard_size=5, shuffle_seed=None), tmp_path / "out")
    assert (report.shards, report.count, len(report.quarantined)) == (2, 10, 5)
    assert sorted(path.name for path in (tmp_path / "out").glob("*.tar")) == ["shard-00000.tar", "shard-00001.tar"]


def test_not_one_good_image(tmp_path, cli):
    put(tmp_path / "in", {"a/x.jpg": b"", "a/y.jpg": b"no"})
    done = cli("make-shards", tmp_path / "in", tmp_path / "out")
    assert done.code == 1 and "not one readable image" in done.error
    assert not (tmp_path / "out" / "shards.json").exists() and not list((tmp_path / "out").glob("*.tar"))


@pytest.mark.parametrize(
    ("form", "mode"), [("JPEG", "RGB"), ("JPEG", "CMYK"), ("PNG", "P"), ("PNG", "RGB"), ("WEBP", "RGB")]
)
def test_no_damage_to_an_image_is_more_than_a_rejection(encode, form, mode):
    """And what make-shards accepts can be extracted from."""
    rng = np.random.default_rng(0)
    good = encode(form, 30, 20, mode=mode)
    rejected = 0
    for _ in range(300):
        data = bytearray(good)
        for place in rng.integers(0, len(good), 4):
            data[place] = rng.integers(0, 256)
        data = bytes(data[: rng.integers(0, len(good))] if rng.random() < 0.3 else data)
        try:
            inspect_image(data)
            readable = True
        except (OSError, ValueError):
            readable = False
        framed = frame_image(Sample(key="k", image=data, label=0), squashed(8, 8))
        assert (framed.pixels is not None) == readable and bool(framed.problem) != readable
        rejected += not readable
    assert rejected > 0


def test_an_image_that_breaks_the_decoder_is_put_aside(tmp_path, encode, cli):
    """Pillow opens it and raises IndexError, which it has for no other damage, only when the pixels are read."""
    broken = late_profile(encode("PNG", 30, 20))
    source = put(tmp_path / "in", {"a/good.png": encode("PNG", 30, 20), "a/profile.png": broken})
    done = cli("make-shards", source, tmp_path / "out")
    assert done.code == 1 and "1 image put aside" in done.error
    assert [line.partition(":")[0] for line in done.details] == ["a/profile.png"]
    assert [sample.key for sample in samples_of(tmp_path / "out")] == ["good"]


def test_an_image_that_breaks_the_decoder_does_not_keep_its_shard_from_extraction(tmp_path, encode, teacher_settings):
    members = {"good.png": encode("PNG", 30, 20), "profile.png": late_profile(encode("PNG", 30, 20))}
    write_tar(tmp_path / "in" / "x.tar", members)
    config = ExtractConfig(**teacher_settings, executor="local", explain=ExplainConfig(target="predicted"))
    report = extract_teacher_maps(tmp_path / "in", tmp_path / "out", config)
    assert report.statuses == {"ok": 1, "undecodable": 1} and len(report.problems) == 1
    assert report.problems[0].startswith("x.tar: key profile: undecodable (")


def test_formats_that_shards_do_not_carry_are_never_decoded():
    """PIL hands PostScript to a program of its own."""
    data = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n"
    with pytest.raises(ValueError, match="not a readable JPEG"):
        inspect_image(data)
    assert frame_image(Sample(key="k", image=data, label=0), squashed(8, 8)).pixels is None


def test_a_decompression_bomb_is_rejected_in_every_thread(monkeypatch, encode):
    """The limit holds for each thread, and no thread leaves the process's warning filters changed."""
    monkeypatch.setattr(images, "MAX_PIXELS", 1000)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1700)
    bombs = [encode("PNG", 40, 40), encode("PNG", 60, 60)]  # over the limit, and over twice the limit
    fine = encode("PNG", 40, 25)
    accepted: list[int] = []

    def decode(number: int) -> None:
        for _ in range(60):
            accepted.append(
                frame_image(Sample(key="k", image=bombs[number % 2], label=0), squashed(8, 8)).pixels is not None
            )
            assert inspect_image(fine)[:3] == ("png", 40, 25)
            with pytest.raises(ValueError, match="pixels are more than|exceeds limit"):
                inspect_image(bombs[number % 2])

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        before = list(warnings.filters)
        threads = [threading.Thread(target=decode, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert warnings.filters == before
    assert len(accepted) == 480 and not any(accepted)


# -------------------------------------------------------------------------------------------------------- labels.csv


@pytest.fixture
def flat(tmp_path, encode):
    return put(tmp_path / "in", {f"{name}.JPEG": encode("JPEG", 30, 20, seed=ord(name)) for name in "abc"})


def test_labels_come_from_the_csv(flat, tmp_path, cli):
    # With the byte order mark that spreadsheets write.
    (flat / "labels.csv").write_text(
        "class_index,file,class_name\n3,a.JPEG,Bär\n0,b.JPEG,tench\n3,c.JPEG,Bär\n", encoding="utf-8-sig"
    )
    assert cli("make-shards", flat, tmp_path / "out", "--no-shuffle").code == 0
    assert [(s.key, s.label) for s in samples_of(tmp_path / "out")] == [("a", 3), ("b", 0), ("c", 3)]
    assert read_index(tmp_path / "out").classes == ("tench", "", "", "Bär")


def test_names_are_not_needed(flat, tmp_path):
    (flat / "labels.csv").write_text("file,class_index\nb.JPEG,999\n")
    make_shards(folder(flat), tmp_path / "out")
    assert [(s.key, s.label) for s in samples_of(tmp_path / "out")] == [("b", 999)]
    assert read_index(tmp_path / "out").classes == ()


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("file,label\na.JPEG,1\n", "no column 'class_index'"),
        ("", "no column"),
        ("file,class_index\n", "lists no images"),
        ("file,class_index\na.JPEG,ant\n", "line 2: class_index 'ant' is not a whole number"),
        ("file,class_index\na.JPEG,1\nb.JPEG,-1\n", "line 3: class_index '-1'"),
        ("file,class_index\na.JPEG,1.5\n", "class_index '1.5'"),
        ("file,class_index\na.JPEG\n", "class_index ''"),
        ("file,class_index\na.JPEG,99999999999\n", "class_index '99999999999'"),
        (
            "file,class_index,class_name\na.JPEG,1000000,ant\n",
            "class_index 1000000 with a column class_name: names are kept up to index 999999",
        ),
        ("file,class_index\nz.JPEG,1\n", "line 2: no file 'z.JPEG' in this folder"),
        ("file,class_index\n../in/a.JPEG,1\n", "no file '../in/a.JPEG'"),
        ("file,class_index\n/etc/hostname,1\n", "no file '/etc/hostname'"),
        ("file,class_index\n,1\n", "no file ''"),
        ("file,class_index\na.JPEG,1\na.JPEG,1\n", "has the key 'a' of a.JPEG"),
        (b"file,class_index\nb\xe4r.JPEG,1\n", "not readable as a UTF-8 CSV file"),
        (b"file,class_index\n" + b"x" * 200_000 + b",1\n", "not readable as a UTF-8 CSV file"),
    ],
)
def test_a_wrong_labels_csv_is_told_with_its_line(flat, tmp_path, cli, text, told):
    (flat / "labels.csv").write_bytes(text if isinstance(text, bytes) else text.encode())
    done = cli("make-shards", flat, tmp_path / "out")
    assert (done.code in (1, 2) and told in done.error and "labels.csv" in done.error) or told.startswith("has the key")
    assert not (tmp_path / "out").exists()


# ----------------------------------------------------------------------------------------------------- wrong requests


def test_a_source_without_images(tmp_path, encode, cli):
    put(tmp_path / "flat", {"a.jpg": encode("JPEG", 30, 20)})
    (tmp_path / "empty").mkdir()
    for source, told in [
        (tmp_path / "none", "no such folder"),
        (tmp_path / "empty", "no images found"),
        (tmp_path / "flat", "no images found"),
        (tmp_path / "flat" / "a.jpg", "no such folder"),
    ]:
        done = cli("make-shards", source, tmp_path / "out")
        assert done.code == 2 and told in done.error and str(source) in done.error
    assert not (tmp_path / "out").exists()


def test_two_files_of_one_key(tmp_path, encode, cli):
    source = put(tmp_path / "in", {f"{name}/x.jpg": encode("JPEG", 30, 20) for name in ("a", "b")})
    done = cli("make-shards", source, tmp_path / "out")
    assert done.code == 1 and "b/x.jpg: has the key 'x' of a/x.jpg; rename one, or use --keys path" in done.error
    assert not (tmp_path / "out").exists()
    assert cli("make-shards", source, tmp_path / "out", "--keys", "path", "--no-shuffle").code == 0
    assert [sample.key for sample in samples_of(tmp_path / "out")] == ["a__x", "b__x"]
    put(source, {"a/x.png": encode("PNG", 30, 20)})
    done = cli("make-shards", source, tmp_path / "out2", "--keys", "path")
    assert done.code == 1 and done.error.endswith("rename one")


def test_folders_with_dots_keep_files_without_suffix_apart(tmp_path, encode):
    source = put(tmp_path / "in", {f"v1.0/img{number}": encode("PNG", 30, 20) for number in range(2)})
    (source / "labels.csv").write_text("file,class_index\nv1.0/img0,0\nv1.0/img1,1\n")
    make_shards(folder(source, key_rule="path", shuffle_seed=None), tmp_path / "out")
    assert [s.key for s in samples_of(tmp_path / "out")] == ["v1_0__img0", "v1_0__img1"]


def test_a_file_name_that_is_not_text(tmp_path, encode, cli):
    source = put(tmp_path / "in", {"a/x.jpg": encode("JPEG", 30, 20)})
    try:
        (source / "a" / os.fsdecode(b"caf\xe9.jpg")).write_bytes(b"x")
    except OSError:
        pytest.skip("this file system takes no such names")
    done = cli("make-shards", source, tmp_path / "out")
    assert done.code == 1 and "not UTF-8; rename the file" in done.error


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (["--seed", "-1"], "--seed -1"),
        (["--keys", "hash"], "--keys hash: choose stem or path"),
        (["--image-size", "48"], "belong to the embedded scenes"),
        (["--set", "pieces=1"], "belong to the embedded scenes"),
    ],
)
def test_options_that_make_no_sense(photos, tmp_path, cli, args, told):
    done = cli("make-shards", photos, tmp_path / "out", *args)
    assert done.code == 2 and told in done.error and not (tmp_path / "out").exists()


def test_no_output_folder(photos, cli):
    done = cli("make-shards", photos)
    assert done.code == 2 and "give an output folder" in done.error


# -------------------------------------------------------------------------------------------------- the output folder


def test_a_finished_folder_is_left_alone(photos, shards_copy):
    before = times(shards_copy)
    report = make_shards(folder(photos), shards_copy)
    assert (report.count, report.written) == (18, 0)
    after = times(shards_copy)
    del before["make-shards.jsonl"], after["make-shards.jsonl"]
    assert after == before


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"shard_size": 6}, "shard_size = 5, now it is 6"),
        ({"shuffle_seed": 1}, "shuffle_seed = 0, now it is 1"),
        ({"key_rule": "path"}, "key_rule = 'stem', now it is 'path'"),
    ],
)
def test_other_settings_are_refused(photos, shards_copy, contents, changes, told):
    before = contents(shards_copy)
    with pytest.raises(ZpipeError, match=told):
        make_shards(folder(photos, **changes), shards_copy)
    with pytest.raises(ZpipeError, match="source = .*, now it is 'scenes'"):
        make_shards(SceneSource(count=2, split="val", seed=0, config=scene_config(None, {}), shard_size=5), shards_copy)
    assert contents(shards_copy) == before


def test_a_folder_that_holds_something_else_is_refused(photos, tmp_path, cli):
    put(tmp_path / "home", {"thesis.tex": b"dear"})
    done = cli("make-shards", photos, tmp_path / "home")
    assert done.code == 2 and "holds something else (thesis.tex)" in done.error
    done = cli("make-shards", photos, tmp_path / "home" / "thesis.tex")
    assert done.code == 2 and "is a file, not a folder" in done.error
    assert [path.name for path in (tmp_path / "home").iterdir()] == ["thesis.tex"]


def test_a_killed_run_goes_on(photos, shards, tmp_path, contents, command):
    """Killed with some shards written, then again with the last line of its list torn."""
    out = tmp_path / "out"
    args = ("make-shards", photos, out, "--shard-size", 1)
    make_shards(folder(photos, shard_size=1), tmp_path / "undisturbed")
    made = kill_after_three_tars(command(*args), out)
    assert made < 18
    log = out / "make-shards.jsonl"
    log.write_bytes(log.read_bytes() + b'{"part": 17, "entry": nu')
    report = make_shards(folder(photos, shard_size=1), out)
    assert report.count == 18 and 18 - made <= report.written <= 18 - made + 1
    assert contents(out) == contents(tmp_path / "undisturbed")


def test_a_shard_that_was_lost_or_cut_is_made_again(photos, shards_copy, shards, contents):
    (shards_copy / "shard-00001.tar").unlink()
    cut = shards_copy / "shard-00002.tar"
    cut.write_bytes(cut.read_bytes()[:-512])
    assert make_shards(folder(photos), shards_copy).written == 2
    (shards_copy / "make-shards.jsonl").write_bytes((shards / "make-shards.jsonl").read_bytes())  # it has more lines
    assert contents(shards_copy) == contents(shards)


def test_a_full_disk(photos, small_disk, tmp_path, cli, contents, encode):
    """One line, nothing that looks whole; with room again the same command goes on."""
    noise = np.random.default_rng(0)
    source = tmp_path / "in"
    files = {}
    for number in range(12):
        pixels = noise.integers(0, 256, (100, 100, 3), dtype=np.uint8)
        path = tmp_path / "one.png"
        Image.fromarray(pixels).save(path)
        files[f"a/{number:02d}.png"] = path.read_bytes()  # 30 KB each
    put(source, files)
    out = small_disk.root / "out"
    small_disk.fill(170_000)
    args = ("make-shards", source, out, "--shard-size", 2)
    done = cli(*args)
    assert done.code == 1 and "could not be written (No space left on device)" in done.error and str(out) in done.error
    left = sorted(path.name for path in out.iterdir())
    made = [f"shard-{number:05d}{suffix}" for number in (0, 1) for suffix in (".images.parquet", ".tar")]
    assert left == ["make-shards.jsonl", *made]
    small_disk.fill(0)
    assert cli(*args).code == 1
    (small_disk.root / "filler").unlink()
    done = cli(*args)
    assert done.code == 0 and "12 images in 6 shards (4 written now)" in done.stdout
    make_shards(folder(source, shard_size=2), tmp_path / "undisturbed")
    assert contents(out) == contents(tmp_path / "undisturbed")


# ----------------------------------------------------------------------------------------------- tars of other people


@pytest.fixture
def public(tmp_path, encode):
    """Two tars like those of public data sets: folders in names, .JPEG, labels in .json, files that aren't ours."""
    root = tmp_path / "public"
    for number in range(2):
        members = {"README.md": b"hello"}
        for sample in range(3):
            key = f"n0144/n0144_{number}{sample}"
            members[f"{key}.JPEG"] = encode("JPEG", 30 + sample, 20, seed=sample)
            members[f"{key}.json"] = json.dumps({"label": sample, "filename": "x"}).encode()
            members[f"{key}.txt"] = b"a fish"
        write_tar(root / f"imagenet-{number:04d}.tar", members)
    return root


def test_tars_of_other_people_can_be_indexed(public, cli, tmp_path):
    unindexed = open_shards(public)[0]
    done = cli("make-shards", public, "--index-only")
    assert done.code == 0 and "6 images in 2 shards indexed" in done.stdout
    index = read_index(public)
    assert [(entry.name, entry.count) for entry in index.shards] == [("imagenet-0000.tar", 3), ("imagenet-0001.tar", 3)]
    assert [entry for _, entry in unindexed] == list(index.shards)
    assert [(s.key, s.label) for s in samples_of(public)][:2] == [("n0144/n0144_00", 0), ("n0144/n0144_01", 1)]
    done = cli("make-shards", public, "--index-only")
    assert done.code == 2 and "is there already" in done.error
    (tmp_path / "empty").mkdir()
    done = cli("make-shards", tmp_path / "empty", "--index-only")
    assert done.code == 2 and "holds no .tar file" in done.error


def test_tars_behind_a_url_can_be_indexed(public, cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    url = as_path("memory://test-make-shards/public")
    for tar in public.glob("*.tar"):
        (url / tar.name).write_bytes(tar.read_bytes())
    done = cli("make-shards", url, "--index-only")
    assert done.code == 0 and "6 images in 2 shards indexed" in done.stdout
    assert read_index(url).shards == index_shards(public).shards
    assert [path.name for path in tmp_path.iterdir()] == ["public"]


def test_shards_are_made_on_this_machine_alone(photos, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="s3://bucket/out: a URL is not supported here"):
        make_shards(folder(photos), "s3://bucket/out")
    with pytest.raises(UsageError, match="s3://bucket/in: a URL is not supported here"):
        folder("s3://bucket/in")
    assert list(tmp_path.iterdir()) == []


def test_a_key_in_two_tars_is_noticed_before_anything_is_computed(public, cli):
    write_tar(public / "imagenet-0002.tar", {"other.png": b"A", "n0144/n0144_11.png": b"B"})
    told = (
        f"{public / 'imagenet-0002.tar'}: key n0144/n0144_11: is in imagenet-0001.tar too, and maps are found by key; "
        "make the shards again with unique keys"
    )
    done = cli("make-shards", public, "--index-only")
    assert (done.code, done.error) == (1, f"error: {told}") and not (public / "shards.json").exists()
    with pytest.raises(ZpipeError) as error:
        open_shards(public)
    assert str(error.value) == told


def test_reading_tars_without_an_index_is_told_as_it_goes_on(public):
    told = []
    open_shards(public, progress=lambda *call, **facts: told.append((call, facts)))
    hint = {"hint": f"zpipe make-shards --index-only {public} spares this"}
    assert told == [
        (("index-shards", 1, 2), {"images": 3} | hint),
        (("index-shards", 2, 2), {"images": 6} | hint),
    ]
    index_shards(public)
    told.clear()
    open_shards(public, progress=lambda *call, **facts: told.append((call, facts)))
    assert told == []


@pytest.mark.parametrize("whole_folder", [True, False])
def test_one_picture_is_found_without_reading_the_other_tars(shards_copy, store, tmp_path, cli, whole_folder):
    (shards_copy / "shards.json").unlink()
    for name in ("shard-00000.tar", "shard-00002.tar"):
        (shards_copy / name).write_bytes(b"no tar")
    with tarfile.open(shards_copy / "shard-00001.tar") as tar:
        key = tar.getnames()[-1].partition(".")[0]
    given = shards_copy if whole_folder else shards_copy / "shard-00001.tar"
    done = cli("maps", "show", store, key, "--shards", given, "--out", tmp_path / "map.png")
    assert done.code == 0, done.stderr
    with Image.open(tmp_path / "map.png") as picture:
        assert picture.width > 300


LISTED = {"extraction": open_shards, "training": list_shards}


@pytest.mark.parametrize("by", LISTED)
def test_two_tars_in_one_file_are_not_taken_for_the_first(public, by):
    """tarfile ends at the first end mark, and so half of the samples would be missing unnoticed."""
    first, second = (public / f"imagenet-{number:04d}.tar" for number in range(2))
    first.write_bytes(first.read_bytes() + second.read_bytes())
    second.unlink()
    with pytest.raises(ZpipeError, match="imagenet-0000.tar: not a whole tar .it goes on behind its end mark"):
        LISTED[by](public)


@pytest.mark.parametrize("by", LISTED)
def test_zeros_behind_the_end_mark_are_padding(public, by):
    path = public / "imagenet-0000.tar"
    path.write_bytes(path.read_bytes() + bytes(3 << 20))
    assert [entry.count for entry in index_shards(public).shards] == [3, 3]
    (public / "shards.json").unlink()
    LISTED[by](public)


@pytest.mark.parametrize("by", LISTED)
def test_a_name_in_another_encoding_is_one_line(public, encode, by):
    with tarfile.open(public / "imagenet-0002.tar", "w", format=tarfile.GNU_FORMAT, encoding="latin-1") as tar:
        data = encode("JPEG", 30, 20)
        info = tarfile.TarInfo("caf\u00e9.jpg")
        info.size = len(data)
        tar.addfile(info, io.BytesIO(data))
    with pytest.raises(ZpipeError, match="imagenet-0002.tar: key 'caf.+udce9': its name is not UTF-8") as error:
        LISTED[by](public)
    assert str(error.value).isprintable()


def test_a_label_that_a_store_can_not_keep_is_named(public, tmp_path, encode, teacher_settings):
    for tar in public.glob("*.tar"):
        tar.unlink()
    write_tar(public / "x.tar", {"big.png": encode("PNG", 30, 20), "big.cls": str(2**40).encode()})
    config = ExtractConfig(**teacher_settings, executor="local", explain=ExplainConfig(target="predicted"))
    with pytest.raises(ZpipeError, match="x.tar: key big: its label 1099511627776 is no class index"):
        extract_teacher_maps(public, tmp_path / "out", config)


def header_of(tar, name):
    """Where the header of a member lies, in bytes."""
    with tarfile.open(tar) as file:
        return file.getmember(name).offset


CUTS = {
    "between two samples": lambda tar, data: data[: header_of(tar, "n0144/n0144_12.JPEG")],
    "between image and label": lambda tar, data: data[: header_of(tar, "n0144/n0144_12.json")],
    "inside a header": lambda tar, data: data[: header_of(tar, "n0144/n0144_12.JPEG") + 100],
    "inside an image": lambda tar, data: data[: header_of(tar, "n0144/n0144_12.JPEG") + 700],
    "to nothing": lambda tar, data: b"",
    "to a web page": lambda tar, data: b"<html>404</html>" * 100,
    "a header overwritten": lambda tar, data: (
        data[: header_of(tar, "n0144/n0144_12.JPEG")] + b"x" * 512 + data[header_of(tar, "n0144/n0144_12.JPEG") + 512 :]
    ),
}


@pytest.mark.parametrize("cut", CUTS)
def test_a_tar_that_was_cut_is_not_indexed_as_a_short_one(public, cut):
    tar = public / "imagenet-0001.tar"
    tar.write_bytes(CUTS[cut](tar, tar.read_bytes()))
    with pytest.raises(ZpipeError, match=re.escape(str(tar))) as error:
        index_shards(public)
    assert "\n" not in str(error.value) and not (public / "shards.json").exists()


@pytest.mark.parametrize("cut", CUTS)
def test_a_tar_that_was_cut_after_indexing_is_noticed_on_reading(public, cut):
    index = index_shards(public)
    tar = public / "imagenet-0001.tar"
    tar.write_bytes(CUTS[cut](tar, tar.read_bytes()))
    with pytest.raises(ZpipeError, match=re.escape(str(tar))):
        list(read_samples(tar, index.shards[1]))


def test_one_altered_byte_is_noticed_on_reading(public):
    index = index_shards(public)
    tar = public / "imagenet-0001.tar"
    data = bytearray(tar.read_bytes())
    data[header_of(tar, "n0144/n0144_12.txt") + 512] ^= 1  # in a member that nobody looks at
    tar.write_bytes(data)
    with pytest.raises(ZpipeError, match="3 samples, SHA-256 .*; shards.json says 3, .*: truncated or altered"):
        list(read_samples(tar, index.shards[1]))


def test_a_tar_that_is_gone_or_a_folder(tmp_path):
    (tmp_path / "dir.tar").mkdir()
    for name in ("gone.tar", "dir.tar"):
        with pytest.raises(ZpipeError, match=f"{name}: can't be read"):
            list(read_samples(tmp_path / name))


def test_links_and_devices_in_a_tar_are_not_followed(tmp_path, encode):
    kinds = (("a.cls", tarfile.SYMTYPE), ("b.jpg", tarfile.LNKTYPE), ("c.png", tarfile.CHRTYPE))
    special = [(header(name, kind, "/etc/hostname"), b"") for name, kind in kinds]
    path = write_tar(tmp_path / "x.tar", [*special, ("../../d.jpg", encode("JPEG", 30, 20))])
    assert [(s.key, s.label) for s in read_samples(path)] == [("../../d", None)]
    assert [entry.name for entry in tmp_path.iterdir()] == ["x.tar"]


# ------------------------------------------------------------------------------------------------------------ scenes


def test_scenes_carry_label_and_box(tmp_path, cli):
    args = ("--count", 7, "--shard-size", 3, "--split", "val", "--image-size", 40, "--set", "pieces=[1,2]")
    done = cli("make-shards", "scenes", tmp_path / "out", *args)
    assert done.code == 0 and "7 images in 3 shards" in done.stdout
    samples = samples_of(tmp_path / "out")
    assert [s.key for s in samples] == [f"val_{number:07d}" for number in range(7)]
    assert read_index(tmp_path / "out").classes == tuple("0123456789")
    for sample in samples:
        x1, y1, x2, y2 = sample.meta["box"]
        assert 0 <= x1 < x2 <= 40 and 0 <= y1 < y2 <= 40 and sample.label in range(10)
        framed = frame_image(sample, squashed(40, 40))
        # Pens are brighter than any background, JPEG or not; the box is where the brightest ink is.
        assert framed.pixels.shape == (40, 40, 3)
        inside = framed.pixels[int(y1) : int(np.ceil(y2)), int(x1) : int(np.ceil(x2))]
        assert inside.max() > 160
    assert len({sample.image for sample in samples}) == 7


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (["--count", "0"], "--count 0"),
        (["--split", "test"], "--split test"),
        (["--seed", "-1"], "--seed -1"),
        (["--image-size", "500"], "at most 80"),
        (["--set", "novel=1"], "novel"),
        (["--set", "pieces=4"], "pieces is 4; give two whole numbers"),
        (["--set", "pieces=[1.5,2]"], "pieces is (1.5, 2); give two whole numbers"),
        (["--set", "image_size=48.5"], "image_size is 48.5; give a whole number"),
        (["--set", "image_size=big"], "image_size is big; give a whole number"),
        (["--set", "pieces"], "write it as key=value"),
        (["--no-shuffle"], "--no-shuffle and --keys belong to images that are read"),
        (["--keys", "path"], "--no-shuffle and --keys belong to images that are read"),
    ],
)
def test_scene_options_that_make_no_sense(tmp_path, cli, args, told):
    done = cli("make-shards", "scenes", tmp_path / "out", *args)
    assert done.code == 2 and told in done.error and not (tmp_path / "out").exists()


def test_the_command_as_a_process(photos, tmp_path, process, shards):
    """Exit code and the two streams as a shell sees them."""
    done = process("make-shards", photos, tmp_path / "out", "--shard-size", 5)
    assert (done.code, done.stdout) == (
        0,
        f"{tmp_path / 'out'}: 18 images in 4 shards (4 written now), 3 classes; seen 18, taken 18, left out 0, "
        "quarantined 0\n",
    )
    told = [json.loads(line) for line in done.stderr.splitlines()]
    assert told[-1] == {"stage": "make-shards", "done": 4, "total": 4, "images": 18, "quarantined": 0}
    assert read_index(tmp_path / "out") == read_index(shards)
    done = process("make-shards", tmp_path / "none", tmp_path / "out2")
    assert done.code == 2 and done.stdout == "" and done.stderr.count("\n") == 1 and "no such folder" in done.error


def test_usage_errors_are_their_own_type(tmp_path):
    with pytest.raises(UsageError):
        folder(tmp_path / "none")


def test_images_of_tars_that_are_left_out_end_a_command_with_1(tmp_path, cli, encode, teacher_flags):
    png = encode("PNG", 30, 20)
    write_tar(tmp_path / "in" / "x.tar", {"a.png": png, "a.cls": b"1", "v3.0.png": png, "v3.0.cls": b"1"})
    told = "1 images were left out"
    done = cli(
        "extract-teacher-maps", tmp_path / "in", "--out", tmp_path / "maps", "--executor", "local", *teacher_flags
    )
    assert done.code == 1 and told in done.error and "image named KEY.0.png 1" in done.error and "1 maps" in done.stdout
    done = cli("make-shards", tmp_path / "in", "--index-only")
    assert done.code == 1 and told in done.error and "1 images in 1 shard indexed; seen 3, taken 1," in done.stdout
    assert read_index(tmp_path / "in").account.images_left_out == 1
    again = tmp_path / "again"
    done = cli("extract-teacher-maps", tmp_path / "in", "--out", again, "--executor", "local", *teacher_flags)
    assert done.code == 0
