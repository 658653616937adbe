"""Tars are the same, byte for byte, as Python's tarfile and webdataset write them."""

import hashlib
import io
import tarfile

import webdataset as wds
from hypothesis import given, settings
from hypothesis import strategies as st

from zpipe.schemas.tar_file import list_members, read_members
from zpipe.schemas.tar_writer import TarWriter

NAMES = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=240)


def written(members):
    buffer = io.BytesIO()
    with TarWriter(buffer, owner="zpipe") as tar:
        for name, data in members:
            tar.add(name, data)
        digest = tar.finish()
    assert digest == hashlib.sha256(buffer.getvalue()).hexdigest() and tar.size == len(buffer.getvalue())
    return buffer.getvalue()


@given(st.lists(st.tuples(NAMES, st.binary(max_size=2000)), max_size=30))
@settings(deadline=None)
def test_a_tar_is_that_of_tarfile_and_is_read_back(members):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size, info.mode, info.uname, info.gname = len(data), 0o444, "zpipe", "zpipe"
            tar.addfile(info, io.BytesIO(data))
    data = written(members)
    assert data == buffer.getvalue()
    # A slash at the end of a name says that it is a folder.
    expected = [member for member in members if not member[0].endswith("/")]
    found = list(read_members(io.BytesIO(data), "x.tar", lambda name, size: size))
    assert [tuple(member) for member in found if not member.name.endswith("/")] == expected
    for place, member in zip(list_members(io.BytesIO(data), "x.tar"), found, strict=True):
        assert data[place.offset : place.offset + place.size] == member.data and place.name == member.name


def test_a_tar_is_that_of_webdataset():
    long = "n01440764_10026" * 10
    samples = [("a", b"x" * 513, b"0"), ("größe", b"", b"999"), (long, b"y" * 9_000_000, b"1"), ("b" * 95, b"z", b"2")]
    buffer = io.BytesIO()
    with wds.TarWriter(buffer, user="zpipe", group="zpipe", mtime=0, format="PAX_FORMAT") as tar:
        for key, image, label in samples:
            tar.write({"__key__": key, "jpg": image, "cls": label, "json": b"{}"})
    members = [
        (f"{key}.{suffix}", data)
        for key, image, label in samples
        for suffix, data in (("cls", label), ("jpg", image), ("json", b"{}"))
    ]
    assert written(members) == buffer.getvalue()
