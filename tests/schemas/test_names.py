"""Keys that may be used, names that are shown, and classes that are compared."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zpipe.schemas.classes import ClassNames, match_classes
from zpipe.schemas.errors import ZpipeError
from zpipe.schemas.names import MAX_KEY_BYTES, check_key, printable


@pytest.mark.parametrize("key", ["n01440764_10026", "a/b c", "bär", "犬　1", "$x$", "[/bold]", "x" * MAX_KEY_BYTES])
def test_keys_that_are_fine(key):
    check_key(key, "a.tar")
    assert printable(key) == key


@pytest.mark.parametrize(
    ("key", "reason"),
    [
        ("", "has 0 bytes"),
        ("x" * 241, "has 241 bytes"),
        ("ä" * 121, "has 242 bytes"),
        ("a\nb", r"'a\nb': its name holds the unprintable character U\+000A"),
        ("a\x1b[31mb", r"U\+001B"),
        ("a\u2028b", r"U\+2028"),
        ("a\u202eb", r"U\+202E"),
        ("a\x85b", r"U\+0085"),
        ("a\udcffb", "is not UTF-8"),
    ],
)
def test_keys_that_are_refused(key, reason):
    with pytest.raises(ZpipeError, match=reason.replace("\\n", r"\\n")) as refused:
        check_key(key, "a.tar", "rename it")
    assert str(refused.value).startswith("a.tar: key '") and len(str(refused.value).splitlines()) == 1


@given(st.text())
def test_printable_text_is_one_line_that_no_terminal_obeys(text):
    shown = printable(text)
    assert len(shown.splitlines()) <= 1 and printable(shown) == shown
    assert not any(ord(char) < 32 or 127 <= ord(char) < 160 for char in shown)
    shown.encode()


def names(*each, where="a"):
    return ClassNames(names=each, where=where)


def test_equal_classes_need_no_mapping():
    assert match_classes(names("cat", "dog"), names("cat", "dog", "fox", where="run")) is None
    assert match_classes(names(), names("cat")) is None and match_classes(names("cat"), names()) is None
    assert match_classes(names("", "dog"), names("cat", "dog")) is None
    assert match_classes(names("dog"), names("cat"), "by-index") is None


def test_the_first_difference_is_named():
    with pytest.raises(ZpipeError, match="a: its class 1 is 'fox', that of run is 'dog'; give --classes by-name"):
        match_classes(names("cat", "fox"), names("cat", "dog", "fox", where="run"))
    with pytest.raises(ZpipeError, match="a: its class 1 is 'dog', run has 1 classes"):
        match_classes(names("cat", "dog"), names("cat", where="run"))


def test_classes_are_matched_by_name():
    run = names("cat", "dog", "fox", where="run")
    assert match_classes(names("fox", "", "cat"), run, "by-name") == (2, -1, 0)
    assert match_classes(names("cat", "dog"), run, "by-name") is None
    for data, model, reason in [
        (names("cow"), run, "a: its class 0, 'cow', is none of run"),
        (names("crane"), names("crane", "crane", where="run"), "run: has two classes named 'crane'"),
        (names("cat", "cat"), run, "a: has two classes named 'cat'"),
        (names(), run, "a: names no classes"),
        (names("cat"), names(where="run"), "run: names no classes"),
    ]:
        with pytest.raises(ZpipeError, match=reason):
            match_classes(data, model, "by-name")


@given(st.lists(st.text(min_size=1), unique=True, min_size=1), st.data())
def test_a_mapping_keeps_every_name(model, data):
    part = data.draw(st.permutations(model))[: data.draw(st.integers(1, len(model)))]
    mapping = match_classes(names(*part), names(*model, where="run"), "by-name")
    numbers = range(len(part)) if mapping is None else mapping
    assert [model[number] for number in numbers] == part
