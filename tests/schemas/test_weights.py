"""Weights of every form and origin: tensors are read, nothing is run, and what cannot be read is one line."""

import argparse
import collections
import io
import os
import pickle
import zipfile
from datetime import datetime
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from zpipe.schemas.errors import ZpipeError
from zpipe.schemas.weights import fit_names, not_finite, prefix_note, read_weights

STATE = {"head.weight": torch.arange(6.0).reshape(2, 3), "head.bias": torch.tensor([1.0, -1.0])}


class Settings:
    def __init__(self):
        self.lr = 1


class Counts(dict):
    pass


class Runs:
    def __reduce__(self):
        return os.system, ("exit 3",)


def saved(path, content, **options):
    torch.save(content, path, **options)
    return path


def refused(path):
    with pytest.raises(ZpipeError) as error:
        read_weights(path)
    assert str(error.value).startswith(f"{path}: cannot be read as weights (") and "\n" not in str(error.value)
    return str(error.value)


def assert_read(path):
    read = read_weights(path)
    assert read.keys() == STATE.keys() and all(torch.equal(read[name], STATE[name]) for name in STATE)


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("wrap", ["state_dict", "model", "model_ema", "state_dict_ema", "average"])
def test_what_stands_beside_the_tensors_is_left_out(tmp_path, wrap, old):
    beside = {
        "accuracy": np.float64(0.5),
        "counts": np.arange(3),
        "dtype": np.dtype("float32"),
        "args": argparse.Namespace(lr=1e-3, output=Path("out")),
        "settings": Settings(),
        "when": datetime(2026, 1, 1),
        "seen": collections.defaultdict(list),
        "epoch": 3,
    }
    assert_read(saved(tmp_path / "w.ckpt", {wrap: STATE} | beside, _use_new_zipfile_serialization=not old))


def test_the_kind_of_file_is_in_its_content(tmp_path):
    save_file(STATE, tmp_path / "weights")
    assert_read(tmp_path / "weights")
    assert_read(saved(tmp_path / "weights.safetensors", collections.OrderedDict(STATE)))
    both = {"state_dict_ema": STATE, "model": {name: value + 1 for name, value in STATE.items()}}
    assert_read(saved(tmp_path / "w.pth", both))
    assert_read(saved(tmp_path / "w.pth", {"state_dict_ema": None, "state_dict": STATE}))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"model": STATE, "x": Runs()}, "objects of posix.system, which need pickled code"),
        ({"model": Runs()}, "objects of posix.system, which need pickled code"),
        ({"state_dict": STATE, "x": Counts(a=1)}, "objects of test_weights.Counts, which need pickled code"),
        (torch.nn.Linear(2, 2), "a pickled object of torch.nn.modules.linear.Linear"),
        ({"model": torch.nn.Linear(2, 2)}, "model: it is a pickled object of torch.nn.modules.linear.Linear"),
        ([1, 2], "no state dict, but a list"),
        ({}, "the state dict is empty"),
        ({"epoch": 3}, "'epoch' holds int, no tensor"),
        ({0: torch.ones(2)}, "it has the key 0, no name"),
        ({"student": STATE, "teacher": STATE}, "save its student or teacher alone"),
        ({"a": torch.empty(10**9, device="meta")}, "a is no plain tensor"),
        ({"a": torch.eye(3).to_sparse()}, "a is no plain tensor"),
        ({"a": torch.ones(1).expand(10**12)}, "a is larger than its data"),
        ({"model": STATE, "x": bytearray(4)}, "bytearray"),
    ],
)
def test_what_is_no_state_dict(tmp_path, content, said):
    assert said in refused(saved(tmp_path / "w.pth", content))


def test_files_of_other_kinds(tmp_path):
    path = tmp_path / "weights.pth"
    for content, said in (
        (b"", "it is empty"),
        (b"not weights at all", "give a .safetensors file"),
        (b"<!DOCTYPE html>", "web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "git lfs pull"),
        (pickle.dumps({"a": 1}), "a pickle of another program"),
    ):
        path.write_bytes(content)
        assert said in refused(path)
    np.savez(tmp_path / "a.npz", a=np.zeros(2))
    assert "torch.save did not write" in refused(tmp_path / "a.npz")
    assert "No such file" in refused(tmp_path / "none.pth")
    os.mkfifo(tmp_path / "fifo.pth")
    assert "is a FIFO" in refused(tmp_path / "fifo.pth")
    assert "is a folder" in refused(tmp_path)


def test_an_archive_does_not_swell(tmp_path):
    path = tmp_path / "bomb.pth"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("bomb/data.pkl", b"\x80\x02}q\x00.")
        archive.writestr("bomb/data/0", bytes(50_000_000))
    assert path.stat().st_size < 100_000
    assert "larger than the file" in refused(path)


@pytest.mark.parametrize("kind", ["zip", "old", "safetensors"])
def test_truncated_files_say_so(tmp_path, kind):
    path = tmp_path / "w.pth"
    if kind == "safetensors":
        save_file(STATE, path)
    else:
        saved(path, STATE, _use_new_zipfile_serialization=kind == "zip")
    whole = path.read_bytes()
    for length in (20, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        message = refused(path)
        assert "truncated" in message or "it ends after" in message


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    path = tmp_path_factory.mktemp("flips") / "w.pth"
    saved(path, STATE)
    return path, path.read_bytes()


@given(place=st.integers(0, 10_000), change=st.integers(1, 255))
@example(place=1144, change=1)  # then the archive says that it is encrypted
@settings(max_examples=100, deadline=None)
def test_a_changed_byte_of_an_archive_is_noticed(archive, place, change):
    path, whole = archive
    changed = bytearray(whole)
    changed[place % len(whole)] ^= change
    path.write_bytes(changed)
    try:
        assert_read(path)  # the padding between entries does not matter
    except ZpipeError as error:
        assert str(path) in str(error) and "\n" not in str(error)


def test_usual_prefixes_are_removed_where_all_names_have_them():
    wanted = STATE.keys()
    for prefix in ("module.", "model.", "_orig_mod.", "backbone.", "encoder.", "model._orig_mod.module."):
        assert fit_names({prefix + name: value for name, value in STATE.items()}, wanted).keys() == wanted
    own = {"backbone." + name: value for name, value in STATE.items()}
    assert fit_names(own, own.keys()).keys() == own.keys()  # the model's own names
    mixed = {"model.a": torch.ones(1), "model.b": torch.ones(1), "loss.c": torch.ones(1)}
    assert fit_names(mixed, wanted).keys() == mixed.keys()
    assert "2 of its 3 names begin with 'model.'" in prefix_note(mixed)
    assert prefix_note(STATE) == ""


def test_not_finite_names_the_tensor():
    assert not_finite(STATE | {"n": torch.tensor(3)}) is None
    assert not_finite(STATE | {"b": torch.tensor([1.0, torch.inf])}) == "b"


def test_reading_leaves_the_file_to_others(tmp_path):
    data = io.BytesIO()
    torch.save(STATE, data)
    (tmp_path / "w.pth").write_bytes(data.getvalue())
    first = read_weights(tmp_path / "w.pth")
    first["head.bias"].add_(1)
    assert_read(tmp_path / "w.pth")
