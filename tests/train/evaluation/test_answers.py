"""Which answers count as right: by rank, among fewer classes, with several labels."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from zpipe.schemas.errors import UsageError, ZpipeError
from zpipe.train.evaluation.answers import Answers, read_classes, read_several


def batch(labels):
    return {"label": torch.tensor(labels), "key": [f"k{n}" for n in range(len(labels))]}


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 9), st.integers(1, 6), st.data())
def test_a_rank_is_the_place_in_the_sorted_classes(classes, count, data):
    # Small integers, so that equal logits are common.
    rows = data.draw(
        st.lists(st.lists(st.integers(0, 3), min_size=classes, max_size=classes), min_size=count, max_size=count)
    )
    labels = data.draw(st.lists(st.integers(0, classes - 1), min_size=count, max_size=count))
    ranks = Answers(classes).ranks(torch.tensor(rows, dtype=torch.float32), batch(labels))
    for row, label, rank in zip(rows, labels, ranks.tolist(), strict=True):
        assert sorted(range(classes), key=lambda c: (-row[c], c)).index(label) == rank


def test_equal_logits_are_not_all_right():
    ranks = Answers(4).ranks(torch.zeros(4, 4), batch([0, 1, 2, 3]))
    assert ranks.tolist() == [0, 1, 2, 3]


def test_fewer_classes_hide_the_others():
    logits = torch.tensor([[9.0, 1.0, 8.0, 2.0]])
    assert Answers(4).ranks(logits, batch([3])).tolist() == [2]
    among = Answers(4, classes=[3, 1])  # label 0 is the model's class 3
    assert among.ranks(logits, batch([0])).tolist() == [0]
    assert among.ranks(logits, batch([1])).tolist() == [1]
    with pytest.raises(ZpipeError, match="key k0: label 2 is outside the model's 2 classes"):
        among.ranks(logits, batch([2]))


def test_any_of_several_labels_is_right_and_none_does_not_count():
    logits = torch.tensor([[3.0, 2.0, 1.0]] * 3)
    several = {"k0": [2, 1], "k1": [], "k2": [0]}
    assert Answers(3, several=several).ranks(logits, batch([0, 0, 0])).tolist() == [1, -1, 0]
    with pytest.raises(ZpipeError, match="key k2: the file of labels has no entry"):
        Answers(3, several={"k0": [1], "k1": [1]}).ranks(logits, batch([0, 0, 0]))


def test_logits_that_are_no_numbers_name_their_key():
    logits = torch.tensor([[1.0, 2.0], [float("nan"), 0.0]])
    with pytest.raises(ZpipeError, match="key k1: the model's logits are NaN"):
        Answers(2).ranks(logits, batch([0, 0]))


def test_classes_by_name_and_from_a_file(tmp_path):
    own = ["ant", "bee", "cat", "dog"]
    assert read_classes("by-name", own, ["dog", "bee"]) == [3, 1]
    path = tmp_path / "classes.txt"
    path.write_text("2\nbee\n\n0\n")
    assert read_classes(str(path), own, []) == [2, 1, 0]
    for text, message in (
        ("elk", "label 0, elk: the model knows no such class"),
        ("1\nbee", "names a class twice"),
        ("4", "no such class"),
    ):
        path.write_text(text)
        with pytest.raises(UsageError, match=message):
            read_classes(str(path), own, [])
    with pytest.raises(UsageError, match="label 1, elk"):
        read_classes("by-name", own, ["dog", "elk"])
    with pytest.raises(UsageError, match="must both name their classes"):
        read_classes("by-name", [], ["dog"])
    with pytest.raises(UsageError, match="can't be read"):
        read_classes(str(tmp_path / "none"), own, [])


def test_labels_by_key_and_as_real_has_them(tmp_path):
    path = tmp_path / "real.json"
    path.write_text(json.dumps({"a": [1, 2], "b": []}))
    assert read_several(path, 3) == {"a": [1, 2], "b": []}
    path.write_text("[[1], [], [0, 2]]")
    assert read_several(path, 3) == {
        "ILSVRC2012_val_00000001": [1],
        "ILSVRC2012_val_00000002": [],
        "ILSVRC2012_val_00000003": [0, 2],
    }
    for text in ("[1, 2]", '{"a": 3}', '"a"', "{", '{"a": ["x"]}'):
        path.write_text(text)
        with pytest.raises(ZpipeError, match="no labels"):
            read_several(path, 3)
    path.write_text('{"a": [3]}')
    with pytest.raises(ZpipeError, match=r"key a: classes \[3\]; the model has 3"):
        read_several(path, 3)
