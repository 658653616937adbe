"""Which answers count as right: by rank, among fewer classes, with several labels."""

import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from zpipe.schemas.errors import UsageError, ZpipeError
from zpipe.schemas.shard_index import ShardIndex
from zpipe.train.evaluation.answers import Answers, class_names, match_run, read_classes, read_several


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
    for value, shown in ((float("nan"), "nan"), (-torch.inf, "-inf"), (torch.inf, "inf"), (1e38, "1e"), (-1e38, "-1e")):
        logits = torch.tensor([[1.0, 2.0], [value, 0.0]])
        with pytest.raises(ZpipeError, match=f"key k1: the model's logits hold {shown}.*; its weights have diverged"):
            Answers(2).ranks(logits, batch([0, 0]))


OWN = ["ant", "bee", "cat", "dog"]


def matched(names, how=None, own=OWN):
    """The classes of a run named `own` for shards named `names`."""
    run = SimpleNamespace(settings={"classes": own}, path=Path("run"), model=SimpleNamespace(num_classes=4))
    return match_run(run, ShardIndex(shards=(), classes=tuple(names)), "shards", how)


def test_classes_of_other_names_are_refused_with_the_first_one():
    assert matched(OWN) is matched(OWN[:2]) is matched([]) is None
    with pytest.raises(ZpipeError, match="shards: its class 1 is 'cat', that of run is 'bee'; give --classes by-name"):
        matched(["ant", "cat", "dog"])
    with pytest.raises(ZpipeError, match="its class 4 is 'elk', run has 4 classes"):
        matched([*OWN, "elk"])
    assert matched(["ant", "cat", "dog"], "by-index") is None


def test_classes_by_name():
    assert matched(["dog", "bee"], "by-name") == [3, 1]
    assert matched(["ant", "bee"], "by-name") == [0, 1]  # only these count as answers
    with pytest.raises(ZpipeError, match="its class 1, 'elk', is none of run"):
        matched(["dog", "elk"], "by-name")
    with pytest.raises(ZpipeError, match="shards: names no classes"):
        matched([], "by-name")


def test_a_class_without_a_name_is_no_answer_and_has_none():
    among = Answers(4, matched(["", "dog", "bee"], "by-name"))
    logits = torch.tensor([[9.0, 1.0, 8.0, 2.0]])
    assert among.ranks(logits, batch([1])).tolist() == [0]  # of bee and dog, but not of class -1
    assert among.ranks(logits, batch([2])).tolist() == [1]
    with pytest.raises(ZpipeError, match="key k0: class 0 of its label has no name"):
        among.ranks(logits, batch([0]))


def test_right_classes_are_in_the_numbering_of_the_model():
    assert Answers(4, [3, 1]).labels(batch([1, 0])).tolist() == [1, 3]
    assert Answers(4, several={"k0": [3, 2], "k1": []}).labels(batch([0, 0])).tolist() == [2, -1]


def test_classes_from_a_file(tmp_path):
    path = tmp_path / "classes.txt"
    path.write_text("2\nbee\n\n0\n")
    assert read_classes(str(path), OWN, 4) == matched([], str(path)) == [2, 1, 0]
    with pytest.raises(UsageError, match="has 3 lines, shards has 2 classes"):
        matched(["x", "y"], str(path))
    for text, message in (
        ("elk", "label 0, elk: the model knows no such class"),
        ("1\nbee", "names a class twice"),
        ("4", "no such class"),
        ("9" * 5000, "no such class"),
        ("\n", "is empty"),
    ):
        path.write_text(text)
        with pytest.raises(UsageError, match=message):
            read_classes(str(path), OWN, 4)
    os.mkfifo(tmp_path / "fifo")
    for name, reason in (("none", "No such file"), ("fifo", "is a FIFO"), ("", "is a folder")):
        with pytest.raises(UsageError, match=f"can't be read .{reason}.*; give by-name, by-index or a text file"):
            read_classes(str(tmp_path / name), OWN, 4)


def test_the_classes_of_a_model_that_timm_saved(tmp_path):
    run = SimpleNamespace(settings={}, path=tmp_path, model=SimpleNamespace(num_classes=2))
    (tmp_path / "config.json").write_text('{"label_names": ["ant", "bee", "none"]}')
    assert class_names(run).names == ["ant", "bee"]
    (tmp_path / "config.json").write_text('{"label_names": [1]}')
    with pytest.raises(ZpipeError, match="config.json: not readable as a model description"):
        class_names(run)


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
    for text in ("[1, 2]", '{"a": 3}', '"a"', "{", '{"a": ["x"]}', '{"a": [-1]}', '{"a": [1.5]}', '{"a": [1e30]}'):
        path.write_text(text)
        with pytest.raises(ZpipeError, match="not readable as labels"):
            read_several(path, 3)
    path.write_text('{"a": [0, 3]}')
    with pytest.raises(ZpipeError, match="key a: class 3; the model has 3 classes"):
        read_several(path, 3)


def test_the_labels_of_real_come_along():
    """50,000 images, of which 3,163 have none of the classes, the first one among them."""
    labels = read_several(Path("real"), 1000)
    assert len(labels) == 50_000 and sum(not classes for classes in labels.values()) == 3163
    first = [labels[f"ILSVRC2012_val_{number:08d}"] for number in (1, 2, 3)]
    assert first[0] == [] and 970 in first[1] and 230 in first[2]  # these two are ImageNet's own labels
