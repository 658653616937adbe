"""Weights to start from: every form of file that people have, the weights of a run, and one line for the rest."""

import json
import os

import numpy as np
import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from zpipe.schemas.errors import UsageError, ZpipeError
from zpipe.train.checkpoint import Preprocessing, keep_epoch, save_model
from zpipe.train.fit.initialise import assumed, check_source, described, start_from

NAME = "deit_tiny_patch16_224"
ARGS = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 3, "num_classes": 5}
MEAN, STD = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)


def build(seed):
    torch.manual_seed(seed)
    return timm.create_model(NAME, **ARGS)


def state_of(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(model, state):
    return all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run with three sets of weights: those of seeds 1 (final), 2 (best, epoch 7)."""
    folder = tmp_path_factory.mktemp("run")
    keep_epoch(folder, build(2), 7, 1, 0.5)
    save_model(folder, build(1), Preprocessing(image_size=32, mean=MEAN, std=STD))
    return folder


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "model.", "backbone.", "encoder.", "model._orig_mod."])
def test_prefixes_that_all_names_carry(tmp_path, prefix):
    state = state_of(build(1))
    content = {"state_dict": {prefix + name: value for name, value in state.items()}, "best": np.float32(0.5)}
    torch.save(content, tmp_path / "last.ckpt")
    model = build(2)
    start_from(model, str(tmp_path / "last.ckpt"))
    assert same(model, state)


@pytest.mark.parametrize(("choice", "seed"), [("", 1), (":final", 1), (":best", 2), (":7", 2)])
def test_the_weights_of_a_run_are_chosen_by_word(run, choice, seed):
    model = build(3)
    start_from(model, f"{run}{choice}")
    assert same(model, state_of(build(seed)))
    assert described(f"{run}{choice}") == {"mean": MEAN, "std": STD}


def test_the_description_is_read_from_beside_every_weights_file(run):
    for name in ("model.safetensors", "best.safetensors", "epochs/00007.safetensors"):
        assert described(str(run / name)) == {"mean": MEAN, "std": STD}


def test_a_file_without_a_description(tmp_path):
    save_file(state_of(build(1)), tmp_path / "model.safetensors")
    assert described(str(tmp_path / "model.safetensors")) == {}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "vit"}))  # of the transformers library
    assert described(str(tmp_path / "model.safetensors")) == {}
    assert "assumed: ImageNet's mean and std" in assumed(str(tmp_path / "model.safetensors"))


def test_what_is_described_is_not_assumed(run):
    assert assumed(f"{run}:best") == "" and assumed("timm:vit_tiny_patch16_224") == ""


def test_what_cannot_be_started_from(tmp_path, run):
    state = state_of(build(1))

    def refused(content, kind=ZpipeError):
        path = tmp_path / "w.pth"
        torch.save(content, path)
        with pytest.raises(kind) as error:
            start_from(build(2), str(path))
        assert str(path) in str(error.value) and "\n" not in str(error.value)
        return str(error.value)

    assert "norm.bias holds NaN" in refused(state | {"norm.bias": torch.full((24,), torch.nan)})
    huge = state["norm.bias"].double() + 1e300  # finite in the file, infinite in the model
    assert "norm.bias holds NaN or infinity" in refused(state | {"norm.bias": huge})
    assert "norm.bias is torch.int8" in refused(state | {"norm.bias": state["norm.bias"].to(torch.int8)})
    mixed = {f"model.{name}": value for name, value in state.items()} | {"loss.weight": torch.ones(1)}
    assert "names begin with 'model.'" in refused(mixed)
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(ZpipeError, match="is a FIFO"):
        start_from(build(2), str(tmp_path / "fifo"))
    with pytest.raises(UsageError, match="give .*:final, .*:best, or the number"):
        start_from(build(2), f"{run}:last")
    with pytest.raises(UsageError, match="this run has no such weights"):
        start_from(build(2), f"{run}:8")


def test_a_url_is_no_source_and_its_secret_is_not_shown():
    with pytest.raises(UsageError) as error:
        check_source("https://user:hunter2@host/w.pth")
    assert "hunter2" not in str(error.value)
    with pytest.raises(UsageError, match="copy the files"):
        check_source("s3://bucket/w.pth")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@given(key=st.sampled_from(["mean", "std", "input_size", "num_classes", None]), value=JSON)
@settings(max_examples=100, deadline=None)
def test_any_json_in_a_description_is_read_or_one_line(tmp_path_factory, key, value):
    folder = tmp_path_factory.mktemp("any")
    config = {"architecture": NAME, "pretrained_cfg": {key: value} if key else value}
    (folder / "config.json").write_text(json.dumps(config))
    try:
        assert all(len(each) == 3 for each in described(str(folder)).values())
    except ZpipeError as error:
        assert "config.json" in str(error) and "\n" not in str(error)
