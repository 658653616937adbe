"""Braces stand for the names that bash makes of them; globs, for files of one folder."""

import shutil
import subprocess
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zpipe.schemas.errors import UsageError, ZpipeError
from zpipe.schemas.shard_index import check_there, find_shards
from zpipe.schemas.shard_patterns import MAX_TARS, _number_of_names, expand, is_pattern
from zpipe.schemas.storage import as_path

NUMBERS = st.tuples(st.integers(-12, 120), st.integers(0, 4)).map(
    lambda made: f"{made[0]:0{made[1]}d}"  # some of them padded
)
RANGES = st.builds(
    lambda first, last, step: f"{{{first}..{last}{step}}}",
    NUMBERS,
    NUMBERS,
    st.sampled_from(["", "..1", "..3", "..-7", "..0"]),
)
LETTERS = st.sampled_from(["{a..e}", "{e..a}", "{A..G..3}"])
WORDS = st.text("abz.-_\\", max_size=4).map(lambda text: text.replace("\\", "\\{"))
PARTS = st.recursive(
    WORDS | RANGES | LETTERS,
    lambda inner: (
        st.lists(inner, min_size=1, max_size=3).map(lambda parts: "{" + ",".join(parts) + "}")
        | st.lists(inner, max_size=3).map("".join)
    ),
    max_leaves=5,
)


def test_dots_around_braces_are_no_range():
    for pattern in ("x{b..{47..49}}.tar", "x{b_\\{._.._{47..89..1}}x.tar"):
        with pytest.raises(UsageError, match="is no range"):
            expand(Path(pattern))
    assert expand(Path("x{b..,{1..2}}.tar"))[1] == ["x1.tar", "x2.tar", "xb...tar"]


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash, which the braces are compared with")
@settings(deadline=None, max_examples=60)
@given(st.lists(PARTS, min_size=1, max_size=15))
def test_braces_stand_for_what_bash_makes_of_them(patterns):
    # An x at either end: the shell drops empty words. A line each, because a name holds no line break.
    patterns = [f"x{pattern}x.tar" for pattern in patterns]
    script = "".join(f"printf '%s/' {pattern}; echo\n" for pattern in patterns)
    made = subprocess.run(["bash", "-fc", script], capture_output=True, text=True, check=True).stdout.splitlines()
    for pattern, line in zip(patterns, made, strict=True):
        names = line.split("/")[:-1]
        try:
            expand(Path(pattern))
        except UsageError as error:
            if "is no range" in str(error):
                assert any(".." in name and "{" in name for name in names)  # bash leaves braces, and what they hold
            else:
                assert _number_of_names(pattern) > MAX_TARS and "stands for more than" in str(error)
            continue
        assert expand(Path(pattern)) == (Path("."), sorted(set(names)))
        assert _number_of_names(pattern) >= len(names)
        assert "{" not in pattern.replace("\\{", "") or is_pattern(Path(pattern))


@pytest.mark.parametrize(
    ("pattern", "count", "ends"),
    [
        ("imagenet1k-train-{0000..1023}.tar", 1024, ("imagenet1k-train-0000.tar", "imagenet1k-train-1023.tar")),
        ("{b,a}-{8..10}.tar", 6, ("a-10.tar", "b-9.tar")),
        ("{t-{00..03},v-{0..1}}.tar", 6, ("t-00.tar", "v-1.tar")),
        (r"\{1,2\}-{1,2}.tar", 2, ("{1,2}-1.tar", "{1,2}-2.tar")),
        ("a{x}.tar", 1, ("a{x}.tar", "a{x}.tar")),
    ],
)
@pytest.mark.parametrize("folder", ["", "data/", "/data/", "s3://bucket/", "https://host.org/a/b/"])
def test_a_pattern_needs_no_listing(pattern, count, ends, folder):
    found, names = expand(as_path(folder + pattern))
    assert found == as_path(f"{folder}x").parent
    assert (len(names), names[0], names[-1]) == (count, *ends)


@pytest.mark.parametrize(
    ("pattern", "told"),
    [
        ("a-{0..9.tar", "its braces are not balanced"),
        ("{" * 1500 + "}" * 1500 + ".tar", "nested too deeply"),
        ("{0..99999999999}.tar", f"more than {MAX_TARS} tars"),
        ("{0..9" + "9" * 400 + "}.tar", f"more than {MAX_TARS} tars"),
        ("{x,{1..2000}{1..2000}}.tar", f"more than {MAX_TARS} tars"),
        ("{a,b}" * 40 + ".tar", f"more than {MAX_TARS} tars"),
        ("{" + "a," * 3000 + "b}.tar", "more than 4096 characters"),
        ("{a/x,b/y}.tar", "stands for tars of 2 folders .a, b.; give a pattern of one"),
        ("no*/x-{0..1}.tar", r"no such folder .no.*write \*, \? and"),
        ("a-{0..1}.tar.gz", "a-0.tar.gz: not a .tar file; shards are plain tars: unpack it"),
        ("a-{0..1}.zip", "a-0.zip: not a .tar file; shards are plain tars"),
        ("a-{0..1}", "a-0: not a .tar file; give a folder"),
        ("a-*.tar", "a-.*.tar: no tar among the 0 files in . has such a name; correct the pattern"),
    ],
)
def test_a_pattern_that_stands_for_no_tars_is_one_line(pattern, told, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=told) as error:
        find_shards(Path(pattern))
    assert "\n" not in str(error.value) and len(str(error.value)) < 700


@pytest.fixture
def folder(tmp_path):
    for name in ("a-0.tar", "a-1.tar", "b-0.tar", "a-0.json", ".a-9.tar", "c-0.tar", "c-1.tar.gz"):
        (tmp_path / name).write_bytes(b"x")
    return tmp_path


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("a-*", ["a-0.tar", "a-1.tar"]),
        ("?-0.tar", ["a-0.tar", "b-0.tar", "c-0.tar"]),
        ("[!bc]-0.tar", ["a-0.tar"]),
        ("{b,a}-*.tar", ["a-0.tar", "a-1.tar", "b-0.tar"]),
        ("{b-0,a-*}.tar", ["a-0.tar", "a-1.tar", "b-0.tar"]),
        ("*[0].tar", ["a-0.tar", "b-0.tar", "c-0.tar"]),
    ],
)
def test_globs_are_compared_with_the_names_in_the_folder(folder, pattern, names):
    assert find_shards(folder / pattern) == (folder, [folder / name for name in names])


def test_compressed_tars_that_a_glob_selects_are_refused_by_name(folder):
    with pytest.raises(UsageError, match="c-1.tar.gz: not a .tar file; shards are plain tars: unpack it .gunzip"):
        find_shards(folder / "c-*")


def test_a_file_or_folder_of_such_a_name_is_taken_as_it_is(tmp_path):
    odd = tmp_path / "a[1]{x,y}*?"
    odd.mkdir()
    for name in ("t-{0..1}.tar", "t-0.tar", "t-1.tar"):
        (odd / name).write_bytes(b"x")
    assert find_shards(odd / "t-{0..1}.tar") == (odd, [odd / "t-{0..1}.tar"])
    assert find_shards(odd)[1] == [odd / name for name in ("t-0.tar", "t-1.tar", "t-{0..1}.tar")]
    assert find_shards(odd / "t-[01].tar") == (odd, [odd / "t-0.tar", odd / "t-1.tar"])
    assert find_shards(odd / "t-{1,0}.tar")[1] == [odd / "t-0.tar", odd / "t-1.tar"]


def test_a_tar_that_braces_name_and_is_not_there_is_named(folder):
    with pytest.raises(ZpipeError, match="a-2.tar: no such file; restore it, or correct the pattern"):
        check_there(find_shards(folder / "a-{0..4}.tar")[1])
