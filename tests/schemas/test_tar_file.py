"""Tars are read as tarfile reads them, and hostile ones within bounds."""

import bz2
import gzip
import io
import lzma
import os
import tarfile
import tracemalloc
import zipfile
from functools import partial

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zpipe.pipeline.shard_reader import open_shards
from zpipe.schemas.errors import ZpipeError
from zpipe.schemas.sample import group_members, group_samples, head_bytes, member_bytes
from zpipe.schemas.tar_file import HashingFile, Section, list_members, read_members
from zpipe.train.data.stream import list_shards

READERS = {"extraction": open_shards, "training": list_shards}
FORMATS = (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)
END = bytes(1024)


def members(data, path="x.tar"):
    """What the reader finds, whether it seeks or not."""
    sought = list(read_members(io.BytesIO(data), path, lambda _, size: size))
    read = list(read_members(HashingFile(io.BytesIO(data)), path, lambda _, size: size))
    assert read == sought
    return [tuple(member) for member in sought]


def block(name="a.jpg", size=0, kind=b"0", **changes):
    """A header with any field, such as tarfile would not write."""
    info = tarfile.TarInfo(name)
    info.type = kind
    data = bytearray(info.tobuf(tarfile.USTAR_FORMAT))
    data[124:136] = size if isinstance(size, bytes) else f"{size:011o}\0".encode()
    for place, value in changes.values():
        data[place : place + len(value)] = value
    data[148:156] = b" " * 8
    data[148:156] = f"{sum(data):06o}\0 ".encode()
    return bytes(data)


def padded(data):
    return data + bytes(-len(data) % 512)


def record(key, value):
    """A record of a pax header."""
    size = len(key) + len(value) + 3
    while len(str(size)) + len(key) + len(value) + 3 != size:
        size = len(str(size)) + len(key) + len(value) + 3
    return b"%d %s=%s\n" % (size, key, value)


def pax(records, kind=b"x", then=None):
    return block("PaxHeader", len(records), kind) + padded(records) + (block() if then is None else then)


# ------------------------------------------------------------------------------------------------- as tarfile reads


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(FORMATS),
    st.lists(
        st.tuples(
            st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=40),
            st.integers(1, 8),
            st.binary(max_size=1100),
            st.sampled_from([tarfile.REGTYPE, tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.FIFOTYPE]),
        ),
        max_size=6,
    ),
)
def test_any_tar_has_the_members_that_tarfile_finds(form, wanted):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form) as tar:
        for name, times, data, kind in wanted:
            info = tarfile.TarInfo("/".join([name] * times))
            info.type = kind
            if kind == tarfile.REGTYPE:
                info.size = len(data)
            if kind == tarfile.SYMTYPE:
                info.linkname = name * times
            try:
                tar.addfile(info, io.BytesIO(data))
            except ValueError:  # too long a name for ustar
                continue
    expected = []
    with tarfile.open(fileobj=io.BytesIO(buffer.getvalue())) as tar:
        for member in tar:
            if member.isfile():
                expected.append((member.name, tar.extractfile(member).read()))
            elif not member.isdir():
                expected.append((member.name, None))
    assert members(buffer.getvalue()) == expected


def test_only_as_much_is_read_as_was_asked_for():
    data = block("a.jpg", 700) + padded(b"x" * 700) + block("b.jpg", 3) + padded(b"abc") + END
    found = list(read_members(io.BytesIO(data), "x.tar", lambda name, size: 5 if name == "a.jpg" else 99))
    assert found == [("a.jpg", b"xxxxx"), ("b.jpg", b"abc")]


def test_the_digest_is_that_of_the_whole_file():
    import hashlib

    data = block("a.jpg", 700) + padded(b"x" * 700) + END + bytes(9000)
    file = HashingFile(io.BytesIO(data))
    list(read_members(file, "x.tar", lambda name, size: 0))
    assert (file.hexdigest(), file.count) == (hashlib.sha256(data).hexdigest(), len(data))


@pytest.mark.parametrize(
    ("data", "name"),
    [
        (pax(record(b"path", b"long.jpg")), "long.jpg"),
        (pax(record(b"path", "b\u00e4r\n.jpg".encode()) + record(b"mtime", b"1.5")), "b\u00e4r\n.jpg"),
        (block("x", 9, b"L") + padded(b"long.jpg\0") + block(), "long.jpg"),
        (block("x", 4, b"K") + padded(b"abc\0") + block(), "a.jpg"),
        (pax(record(b"comment", b"0" * 40), kind=b"g"), "a.jpg"),
        (block(prefix=(345, b"dir")), "dir/a.jpg"),
        (block(magic=(257, b"ustar  \0"), atime=(345, b"01234567012")), "a.jpg"),
        (block(size=b"\x80" + bytes(11)), "a.jpg"),
        (block(size=b"          0 "), "a.jpg"),
        (block("dir/", kind=b"\0") + block(kind=b"\0"), "a.jpg"),
        (block("\u00e4.jpg"), "\u00e4.jpg"),
    ],
)
def test_names_and_sizes_of_every_format(data, name):
    assert members(data + END) == [(name, b"")]


# ------------------------------------------------------------------------------------------------------ hostile tars

HOSTILE = {
    "negative size": (block(size=b"-0000001000\0") + END, "no valid size"),
    "negative binary size": (block(size=b"\xff" * 10 + b"\xfe\0") + END, "no valid size"),
    "huge size": (block(size=b"\x80" + bytes(3) + b"\x7f" + b"\xff" * 7) + END, "ends inside a.jpg|more than"),
    "size beyond the end": (block(size=10**9) + bytes(1000) + END, "ends inside a.jpg|no end mark"),
    "unread size beyond the end": (block("a.txt", 10**9) + bytes(1000) + END, "no end mark|ends inside"),
    "unread huge size": (block("a.txt", b"\x80" + bytes(3) + b"\x7f" + b"\xff" * 7) + END, "ends inside a.txt"),
    "size in digits that are none": (block(size=b"99999999999\0") + END, "no valid size"),
    "pax size negative": (pax(record(b"size", b"-512")) + END, "no valid size"),
    "pax size huge": (pax(record(b"size", b"9" * 400)) + END, "no valid size"),
    "pax of zero length": (pax(b"0 path=a\n") + END, "extended header is damaged"),
    "pax beyond its end": (pax(b"99 path=a\n") + END, "extended header is damaged"),
    "pax without a number": (pax(b"path=a\n") + END, "extended header is damaged"),
    "pax of digits": (pax(b"1" * 100_000) + END, "extended header is damaged"),
    "pax header too large": (block("x", 1 << 21, b"x") + bytes(1 << 21) + block() + END, "extended header of 2097152"),
    "global header too large": (block("x", b"\x80" + bytes(6) + b"\1" + bytes(4), b"g") + END, "extended header of"),
    "long name too large": (block("x", 1 << 30, b"L") + bytes(5000) + END, "extended header of 1073741824"),
    "long name cut": (block("x", 5000, b"L") + bytes(512), "ends inside an extended header"),
    "sparse": (block(kind=b"S") + END, "a.jpg is a sparse member"),
    "sparse in pax": (pax(record(b"GNU.sparse.major", b"1")) + END, "is a sparse member"),
    "damaged header": (block() + b"x" * 512 + END, "a header is damaged"),
    "damaged last header": (block()[:-1] + b"\1" + END, "a header is damaged"),
    "no end mark": (block(), "no end mark"),
    "half an end mark": (block() + bytes(512), "no end mark"),
    "nothing": (b"", "no end mark"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_tar_is_one_line_to_both_readers(tmp_path, case):
    data, told = HOSTILE[case]
    (tmp_path / "x.tar").write_bytes(data)
    tracemalloc.start()
    try:
        for read in READERS.values():
            with pytest.raises(ZpipeError, match=told) as error:
                read(tmp_path)
            assert str(error.value).startswith(f"{tmp_path}/x.tar: ") and "\n" not in str(error.value)
        assert tracemalloc.get_traced_memory()[1] < 32 << 20
    finally:
        tracemalloc.stop()


def test_extended_headers_take_time_and_memory_in_proportion():
    """With tarfile, 1.3 MB of global headers took .8 GB, and a row of them ended in a RecursionError."""
    many = b"".join(
        block("g", 30, b"g") + padded(record(b"k%08d" % number, b"x" * 14)) + block(f"{number}.txt")
        for number in range(1500)
    )
    chain = block("x", 4, b"K") + padded(b"abc\0")
    tracemalloc.start()
    try:
        assert len(members(many + 3000 * chain + block() + END)) == 1501
        assert tracemalloc.get_traced_memory()[1] < 32 << 20
    finally:
        tracemalloc.stop()


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5119), st.integers(0, 255)), max_size=8), st.integers(0, 5120))
def test_any_damage_is_noticed_or_harmless(changes, length):
    data = bytearray(
        pax(record(b"path", b"a.jpg"), then=block(size=3) + padded(b"abc")) + block("a.cls", 1) + padded(b"1") + END
    )
    data += bytes(5120 - len(data))
    for place, value in changes:
        data[place] = value
    data = bytes(data[:length])
    try:
        kept = [(name, content) for name, content in members(data)]
    except ZpipeError as error:
        assert len(str(error).splitlines()) == 1
    else:
        assert length >= 4096 and len(kept) <= 3


@pytest.mark.parametrize(
    ("pack", "told"),
    [
        (gzip.compress, "is a gzip file, and shards are plain tars; unpack it .gunzip."),
        (bz2.compress, "is a bzip2 file"),
        (lzma.compress, "is a xz file"),
    ],
)
@pytest.mark.parametrize("by", READERS)
def test_a_compressed_tar_is_refused_by_name(tmp_path, pack, told, by):
    (tmp_path / "x.tar").write_bytes(pack(block() + END))
    with pytest.raises(ZpipeError, match=told):
        READERS[by](tmp_path)


@pytest.mark.parametrize("by", READERS)
def test_a_zip_and_archives_beside_no_tar(tmp_path, by):
    with zipfile.ZipFile(tmp_path / "x.tar", "w") as archive:
        archive.writestr("a.jpg", b"x")
    with pytest.raises(ZpipeError, match="is a zip file"):
        READERS[by](tmp_path)
    (tmp_path / "x.tar").rename(tmp_path / "x.tar.gz")
    with pytest.raises(ZpipeError, match="holds no .tar file, but x.tar.gz; shards are plain tars: unpack it"):
        READERS[by](tmp_path)


@pytest.mark.parametrize("by", READERS)
def test_what_is_no_file_is_not_waited_for(tmp_path, by):
    os.mkfifo(tmp_path / "x.tar")
    with pytest.raises(ZpipeError, match="x.tar: can't be read .is a FIFO, not a regular file"):
        READERS[by](tmp_path)
    (tmp_path / "x.tar").unlink()
    (tmp_path / "x.tar").symlink_to("/dev/zero")
    with pytest.raises(ZpipeError, match="x.tar: can't be read .is a device, not a regular file"):
        READERS[by](tmp_path)


# -------------------------------------------------------------------------------------------- both readers, one rule

PNG = b"\x89PNG\r\n\x1a\n" + bytes(30)
TARS = {
    "dotted": ([("v3.0.jpg", PNG), ("v3.0.cls", b"1"), ("a.jpg", PNG), ("a.cls", b"1")], ["a"], 1),
    "two dotted of a key": ([("v3.0.jpg", PNG), ("v3.1.jpg", PNG), ("a.jpg", PNG)], ["a"], 2),
    "a dotted label": ([("0.cls", b"1"), ("0.input.jpg", PNG), ("a.jpg", PNG)], ["a"], 1),
    "beside its image": ([("a.jpg", PNG), ("a.seg.png", PNG), ("a.cls", b"1")], ["a"], 0),
    "before its image": ([("a.a.png", PNG), ("a.jpg", PNG)], ["a"], 0),
    "an image of another name": ([("a.jpg", PNG), ("b.dat", PNG), ("c", PNG)], ["a"], 2),
    "no images": ([("README", b""), ("a.jpg", PNG), ("a.txt", b"a"), ("a.npy", b"x" * 99), ("._a.jpg", b"")], ["a"], 0),
    "every suffix": (
        [(f"{suffix}.{suffix}", PNG) for suffix in ("jpe", "jfif", "bmp", "gif", "tif", "ppm")],
        ["jpe", "jfif", "bmp", "gif", "tif", "ppm"],
        0,
    ),
    "links": ([("a.jpg", PNG), ("b.jpg", None)], ["a"], 0),
}


def tar_of(files):
    parts = [
        block(name, len(data)) + padded(data) if data is not None else block(name, 0, b"2") for name, data in files
    ]
    return b"".join(parts) + END


@pytest.mark.parametrize("case", TARS)
def test_both_readers_take_the_same_and_count_the_rest(tmp_path, case):
    files, keys, images_left_out = TARS[case]
    (tmp_path / "x.tar").write_bytes(tar_of(files))
    (entries, extracted), (shards, listed) = open_shards(tmp_path), list_shards(tmp_path)
    assert extracted.account == listed.account and extracted.account.taken == len(keys)
    assert extracted.account.images_left_out == images_left_out
    assert [entry.keys_sha256 for _, entry in entries] == [shard.entry.keys_sha256 for shard in shards]
    found = group_samples(read_members(io.BytesIO(tar_of(files)), "x.tar", member_bytes), "x.tar")
    assert [sample.key for sample in found] == keys
    account = extracted.account
    assert account.seen == account.taken + account.left_out.total()
    images = sum(name.rpartition("/")[2][0] != "." and name.endswith((".cls", ".json")) for name, _ in files)
    assert images + account.seen >= len(files)  # each member is a sample's, or counted


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from(["a", "b", "d/a"]), st.sampled_from(["jpg", "cls", "txt", "0.jpg", "json", ""])),
        max_size=8,
    )
)
def test_both_readers_agree_on_any_members(names):
    contents = {"cls": b"1", "json": b"{}", "txt": b"x"}
    data = tar_of([(f"{key}.{suffix}".rstrip("."), contents.get(suffix, PNG)) for key, suffix in names])
    results = []
    whole = partial(group_samples, keep_damaged=True)
    for amount, group in ((member_bytes, whole), (head_bytes, group_members)):
        try:
            found = list(group(read_members(io.BytesIO(data), "x.tar", amount), "x.tar"))
            results.append([item.key if group is whole else item[0] for item in found])
        except ZpipeError as error:
            results.append(str(error))
    assert results[0] == results[1]


@pytest.mark.parametrize("by", READERS)
def test_a_good_tar_without_samples_is_told_what_it_holds(tmp_path, by):
    (tmp_path / "x.tar").write_bytes(tar_of([("0.input.jpg", PNG), ("0.output.cls", b"1"), ("1.input.jpg", PNG)]))
    with pytest.raises(ZpipeError) as error:
        READERS[by](tmp_path)
    assert str(error.value) == (
        f"{tmp_path / 'x.tar'}: holds no samples: image named KEY.input.jpg (2), no image: .output.cls (1); a sample "
        "is KEY.jpg (or jpeg, png, webp, ...) with KEY.cls or KEY.json, and KEY has no dot: rename the members, or "
        "remove the tar"
    )


# ----------------------------------------------------------------------------------------- places, and tars inside tars


def archive(files, form):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form) as tar:
        for name, data in files:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


FILES = st.lists(
    st.tuples(st.text("abc\u00e4/", min_size=1, max_size=300).map(lambda name: name + "x"), st.binary(max_size=1500)),
    max_size=5,
)


@given(st.lists(FILES, max_size=4), st.sampled_from(FORMATS))
@settings(deadline=None)
def test_members_of_tars_inside_a_tar_lie_where_they_are_listed(inner, form):
    tars = [(f"{number}.tar", archive(files, form)) for number, files in enumerate(inner)]
    data = archive(tars, form)
    file = io.BytesIO(data)
    places = list(list_members(file, "x.tar"))
    assert [(place.name, data[place.offset : place.offset + place.size]) for place in places] == tars
    for place, files in zip(places, inner, strict=True):
        found = list(list_members(Section(file, place.offset, place.size), "x.tar: inner"))
        starts = [place.offset + member.offset for member in found]
        contents = [data[start : start + member.size] for start, member in zip(starts, found, strict=True)]
        assert list(zip((member.name for member in found), contents, strict=True)) == files


@pytest.mark.parametrize("size", [0, 100, 512, 2560, 5000, 12_288, 13_000, 13_311])
def test_a_tar_inside_a_tar_ends_where_its_part_of_the_file_ends(size):
    inner = archive([("a.jpg", bytes(2000)), ("b.jpg", bytes(9000))], tarfile.PAX_FORMAT)
    file = io.BytesIO(inner + inner)
    # Headers, contents and the end mark take 512 + 2,048 + 512 + 9,216 + 1,024 bytes.
    assert len(list(list_members(Section(file, 0, 13_312), "x.tar"))) == 2
    with pytest.raises(ZpipeError, match="not a whole tar"):
        list(list_members(Section(file, 0, size), "x.tar"))
