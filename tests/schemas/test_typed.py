"""Files of ours, and those of others, are read as the types that are declared, or refused in one line."""

import json
import os
from dataclasses import dataclass
from typing import Annotated, Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from zpipe.pipeline.shard_reader import open_shards
from zpipe.schemas.errors import ZpipeError
from zpipe.schemas.formats import Count, Digest, Format, decode_json, read_json
from zpipe.schemas.storage import open_file, read_file
from zpipe.train.data.stream import list_shards


@dataclass(frozen=True, kw_only=True)
class Part:
    """One part."""

    name: str
    count: Count
    sha256: Digest = "0" * 64


@dataclass(frozen=True, kw_only=True)
class Whole:
    """A file."""

    parts: tuple[Part, ...]
    share: Annotated[float, msgspec.Meta(ge=0, le=1)] = 0.5
    facts: dict[str, Any] | None = None


WHOLE = Format(name="zpipe-whole", version=2, content=Whole, what="a whole", remedy="make it again", max_bytes=10_000)
FINE = {"format": "zpipe-whole", "version": 1, "parts": [{"name": "a", "count": 3}], "unknown": 1}
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


def test_a_file_is_read_as_its_type(tmp_path):
    path = tmp_path / "whole.json"
    path.write_text(json.dumps(FINE))
    assert WHOLE.read(path) == Whole(parts=(Part(name="a", count=3),))
    assert WHOLE.header == {"format": "zpipe-whole", "version": 2}
    assert read_json(path, "facts", type=dict[str, Any], remedy="r") == FINE


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"parts": "x"}, r"Expected `array`, got `str` - at `\$.parts`"),
        ({"parts": [{"name": "a", "count": -1}]}, r"Expected `int` >= 0 - at `\$.parts\[.+\].count`"),
        ({"parts": [{"name": "a", "count": 1.5}]}, "Expected `int`, got `float`"),
        ({"parts": [{"name": "a", "count": 1, "sha256": 7}]}, "Expected `str`, got `int`"),
        ({"parts": [{"name": "a", "count": 1, "sha256": "x"}]}, "matching regex"),
        ({"parts": [{"count": 1}]}, "missing required field `name`"),
        ({"share": 2}, "Expected `float` <= 1"),
        ({"facts": []}, "Expected `object | null`"),
        ({"format": "other"}, "is 'other' version 1, expected 'zpipe-whole' version 2"),
        ({"format": ["x" * 1000]}, r"is \['x+\.\.\. version 1"),
        ({"version": 3}, "made by a newer zpipe"),
        ({"version": 0}, "no longer read"),
        ({"version": True}, "version True, expected"),
        ({"version": 10**5000}, "Integer value out of range"),
        ({"share": "x" * 10_000}, "has more than 10000 bytes"),
    ],
)
def test_a_wrong_value_is_one_line_that_names_its_place(tmp_path, change, reason):
    path = tmp_path / "whole.json"
    try:
        path.write_text(json.dumps(FINE | change))
    except ValueError:  # Python prints no such number
        path.write_text(json.dumps(FINE | {"version": 12345}).replace("12345", "1" + "0" * 5000))
    with pytest.raises(ZpipeError, match=reason) as refused:
        WHOLE.read(path)
    assert str(refused.value).startswith(f"{path}: ") and len(str(refused.value).splitlines()) == 1


@pytest.mark.parametrize(
    "data",
    [b"", b"[", b"\xff", b"[1]", b"7", b'"x"', b"[" * 100_000, b'{"a":' * 100_000, b'{"share": NaN}', b'{"a": 1e999}'],
)
def test_what_is_no_json_is_one_line(data):
    for decode in (
        lambda: WHOLE.decode(data, "f"),
        lambda: decode_json(data, "f", type=Whole, what="a whole", remedy="r"),
    ):
        with pytest.raises(ZpipeError, match="^f: ") as refused:
            decode()
        assert len(str(refused.value).splitlines()) == 1


@given(st.sampled_from(sorted(FINE)), JSON)
def test_any_value_at_any_field_is_read_or_refused(field, value):
    try:
        assert isinstance(WHOLE.decode(json.dumps(FINE | {field: value}).encode(), "f"), Whole)
    except ZpipeError as error:
        assert len(str(error).splitlines()) == 1


def test_only_regular_files_are_opened(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "link").symlink_to("/dev/zero")
    for name, reason in (
        ("fifo", "is a FIFO"),
        ("link", "is a device"),
        (".", "is a folder"),
        ("absent", "No such file"),
    ):
        for read in (open_file, lambda path: read_file(path, 10)):
            with pytest.raises(OSError, match=reason):
                read(tmp_path / name)
        with pytest.raises(ZpipeError, match=f"{reason}|no such file"):
            WHOLE.read(tmp_path / name)
    (tmp_path / "file").write_bytes(b"12345")
    assert read_file(tmp_path / "file", 5) == b"12345"
    with pytest.raises(OSError, match="has more than 4 bytes"):
        read_file(tmp_path / "file", 4)


@pytest.mark.parametrize("target", ["/dev/zero", "nowhere"])
def test_what_lies_in_place_of_a_shard_index_is_not_passed_by(tmp_path, target):
    """Without an index the tars would be read as public ones, and nothing would be compared."""
    (tmp_path / "a.tar").write_bytes(bytes(1024))
    (tmp_path / "shards.json").symlink_to(target)
    for opened in (open_shards, list_shards):
        with pytest.raises(ZpipeError, match="shards.json: (not readable as|no such file)"):
            opened(tmp_path)
