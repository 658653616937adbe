"""The checkpoint that a run resumes from: what no training leaves is refused when it is loaded."""

import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from zpipe.schemas.errors import ZpipeError
from zpipe.train.resume_state import load_checkpoint, save_checkpoint

FORMATS = Path(__file__).parents[1] / "golden" / "formats"


@pytest.fixture
def stopped(tmp_path) -> Path:
    return Path(shutil.copytree(FORMATS / "v2" / "stopped", tmp_path / "stopped"))


def altered(state: dict[str, Any], place: str, change: Callable[[Any], Any]) -> None:
    *path, last = [int(name) if name.isdecimal() else name for name in place.split("/")]
    for name in path:
        state = state[name]
    state[last] = change(state[last])


def with_nan(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.clone()
    tensor.view(-1)[-1] = float("nan")
    return tensor


@pytest.mark.parametrize(
    ("place", "change", "told"),
    [
        ("model/head.weight", with_nan, "model.head.weight is NaN or infinite"),
        ("model/head.weight", lambda value: value * float("inf"), "model.head.weight is NaN or infinite"),
        ("optimizer/state/0/exp_avg", with_nan, "optimizer.state.0.exp_avg is NaN or infinite"),
        ("optimizer/param_groups/0/weight_decay", lambda value: float("nan"), "weight_decay is NaN or infinite"),
        ("optimizer/param_groups", lambda value: {}, "optimizer.param_groups"),
        ("model", lambda value: [], "model"),
        ("model/head.weight", lambda value: "x", "Expected a tensor, got str"),
        ("step", lambda value: -5, "step"),
        ("step", lambda value: 2.5, "step"),
        ("step", lambda value: True, "step"),
        ("epoch", lambda value: -1, "epoch"),
        ("epoch", lambda value: None, "epoch"),
        ("position", lambda value: 3, "position"),
        ("position/draws", lambda value: value[:7], "position.draws is no state of a random number generator"),
        ("position/draws", lambda value: value.float(), "position.draws is no state of a random number generator"),
        ("position/ranks", lambda value: [], "position.ranks"),
        ("position/ranks/0/cpu", lambda value: value[:7], "position.ranks.0.cpu is no state of a random number"),
        ("position/ranks/0/cuda", lambda value: torch.ones(3), "position.ranks.0.cuda is no state of a random number"),
        ("position/loader/batch", lambda value: -1, "position.loader.batch"),
        ("position/loader/lanes", lambda value: 10**12, "position.loader.lanes"),
    ],
)
def test_what_no_training_leaves_is_one_line(stopped, place, change, told):
    path = stopped / "checkpoint.pt"
    state = torch.load(path, weights_only=True)
    altered(state, place, change)
    torch.save(state, path)
    with pytest.raises(ZpipeError, match="checkpoint.pt: not a checkpoint that a run can resume from") as error:
        load_checkpoint(stopped)
    message = str(error.value)
    assert told in message and "\n" not in message
    assert message.endswith(f"restore the file, or delete {stopped} to start over")


@pytest.mark.parametrize("name", ["model", "optimizer", "step", "epoch", "position"])
def test_a_part_that_is_missing_is_named(stopped, name):
    path = stopped / "checkpoint.pt"
    state = torch.load(path, weights_only=True)
    del state[name]
    torch.save(state, path)
    with pytest.raises(ZpipeError, match=f"missing required field `{name}`"):
        load_checkpoint(stopped)


@pytest.mark.parametrize("lost", [1, 4096, 8192])
def test_bytes_that_were_lost_are_noticed(stopped, lost):
    path = stopped / "checkpoint.pt"
    data = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        largest = max(archive.infolist(), key=lambda record: record.file_size)
    # Past the record's own header; the places before it are padding.
    place = data.index(torch.load(path, weights_only=True)["position"]["draws"].numpy().tobytes())
    assert largest.header_offset < place + len(data)
    path.write_bytes(data[:place] + bytes(byte ^ 255 for byte in data[place : place + lost]) + data[place + lost :])
    with pytest.raises(ZpipeError, match="checkpoint.pt: not a readable checkpoint .*; restore the file, or delete"):
        load_checkpoint(stopped)


def test_kept_epochs_are_offered(stopped):
    (stopped / "epochs").mkdir()
    for epoch in (3, 4):
        (stopped / "epochs" / f"{epoch:05d}.safetensors").touch()
    (stopped / "checkpoint.pt").write_bytes(b"PK")
    with pytest.raises(ZpipeError, match=r"\(--init-from .*/epochs/00004.safetensors\), or delete .* to start over"):
        load_checkpoint(stopped)


def test_a_file_that_is_compressed_is_not_torchs(stopped):
    path = stopped / "checkpoint.pt"
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in records.items():
            archive.writestr(name, data)
    with pytest.raises(ZpipeError, match="it is compressed, which torch.save doesn't do"):
        load_checkpoint(stopped)


def test_what_was_saved_comes_back(stopped, tmp_path):
    state = load_checkpoint(stopped)
    (tmp_path / "run").mkdir()
    save_checkpoint(tmp_path / "run", state)
    again = load_checkpoint(tmp_path / "run")
    assert again["step"] == state["step"] and torch.equal(again["model"]["head.weight"], state["model"]["head.weight"])
