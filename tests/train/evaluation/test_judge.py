"""Tests of maps: curves by hand, and maps that are known to be right or wrong."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import BODY, GRID, SIDE, rewrite_store, scenes, store
from typer.testing import CliRunner

from zpipe import open_maps
from zpipe.cli import app
from zpipe.schemas.errors import UsageError
from zpipe.train.data.loader import RelevanceLoader
from zpipe.train.evaluation.judge import JudgeConfig, area, emptied, judge_maps, perturbation_curves
from zpipe.train.fit.config import TrainConfig
from zpipe.train.fit.train_vit import VitConfig, train_vit

torch.set_num_threads(1)
CPU = JudgeConfig(device="cpu", steps=4)


class Bright(torch.nn.Module):
    """Class 1 to the extent that a given cell of 4 x 4 is bright."""

    def __init__(self, cell: int) -> None:
        super().__init__()
        self.cell = cell

    def forward(self, images):
        mean = torch.nn.functional.avg_pool2d(images, images.shape[-1] // 4).mean(1).flatten(1)[:, self.cell]
        return torch.stack([torch.zeros_like(mean), 10 * mean], dim=1)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 15), st.integers(1, 16), st.integers(0, 99))
def test_curves_fall_and_rise_where_the_deciding_cell_is(cell, steps, seed):
    torch.manual_seed(seed)
    images, empty = torch.ones(2, 3, 8, 8), torch.zeros(2, 3, 8, 8)
    maps = torch.rand(2, 4, 4)
    deletion, insertion = perturbation_curves(Bright(cell), images, maps, torch.tensor([1, 0]), steps, empty)
    full, none = float(torch.tensor(10.0).sigmoid()), 0.5
    for b, (there, gone) in enumerate(((full, none), (1 - full, none))):
        rank = int((maps[b].flatten() > maps[b].flatten()[cell]).sum())
        for step in range(steps + 1):
            taken = rank < round(step / steps * 16)
            assert deletion[b, step] == pytest.approx(gone if taken else there, abs=1e-4)
            assert insertion[b, step] == pytest.approx(there if taken else gone, abs=1e-4)


def test_areas():
    assert area(torch.tensor([[1.0, 1.0, 1.0], [0.0, 0.5, 1.0], [1.0, 0.0, 0.0]])).tolist() == [1.0, 0.5, 0.25]


def test_emptied_images_keep_their_colours_and_nothing_else():
    torch.manual_seed(0)
    images = torch.randn(2, 3, 32, 32) + torch.tensor([1.0, 0.0, -1.0]).view(1, 3, 1, 1)
    blurred = emptied(images, "blur")
    assert blurred.std(dim=(2, 3)).max() < 0.2 < images.std(dim=(2, 3)).min()
    torch.testing.assert_close(blurred.mean((2, 3)), images.mean((2, 3)), atol=0.15, rtol=0)
    assert not emptied(images, "mean").any()
    flat = torch.full((1, 3, 16, 16), 0.7)
    torch.testing.assert_close(emptied(flat, "blur"), flat)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("judge")
    scenes(root / "shards", 20)
    loop = TrainConfig(epochs=1, batch_size=10, data_workers=0, device="cpu")
    config = VitConfig(model="deit_tiny_patch16_224", model_args=BODY, image_size=SIDE, train=loop)
    train_vit(root / "shards", root / "run", config)
    store(root / "shards", root / "maps")
    return root


def test_rows_of_maps_and_controls(data, tmp_path):
    rows = judge_maps(data / "run", data / "shards", data / "maps", CPU, out=tmp_path / "rows.json")
    assert [row["setting"] for row in rows] == ["maps", "centre", "random"]
    assert json.loads((tmp_path / "rows.json").read_text())["rows"] == rows
    for row in rows:
        assert row["count"] == 20 and row["deletion_interval"] > 0
        assert all(0 <= row[name] <= 1 for name in ("deletion", "insertion", "pointing_game"))
    few = judge_maps(data / "run", data / "shards", data / "maps", JudgeConfig(device="cpu", limit=7, batch_size=4))
    assert few[0]["count"] == 7
    again = judge_maps(data / "run", data / "shards", data / "maps", JudgeConfig(device="cpu", steps=4, batch_size=3))
    for row, same in zip(rows, again, strict=True):
        assert row == pytest.approx(same, abs=1e-5)  # random orders do not depend on the batch size, either


def test_maps_that_point_at_the_box_win_the_pointing_game(data, tmp_path):

    loader = RelevanceLoader(data / "shards", data / "maps", batch_size=20, image_size=SIDE, augment="eval")
    # The evaluation view is a centre crop; the store's maps cover the whole image.
    maps = {}
    for batch in loader:
        for key, box, view in zip(batch["key"], batch["object_box"], batch["box"], strict=True):
            x = float(view[0] + (box[0] + box[2]) / 2 * (view[2] - view[0])) / SIDE
            y = float(view[1] + (box[1] + box[3]) / 2 * (view[3] - view[1])) / SIDE
            maps[key] = np.zeros((GRID, GRID), np.float32)
            maps[key][min(int(y * GRID), GRID - 1), min(int(x * GRID), GRID - 1)] = 1

    shutil.copytree(data / "maps", tmp_path / "maps")
    rewrite_store(tmp_path / "maps", maps)
    pointing = judge_maps(data / "run", data / "shards", tmp_path / "maps", CPU)
    assert pointing[0]["pointing_game"] > 0.5 > pointing[2]["pointing_game"]
    assert len(open_maps(tmp_path / "maps")) == 20


def test_the_command(data):
    line = ["maps", "judge", str(data / "maps"), str(data / "shards"), "--model", str(data / "run"), "--steps", "2"]
    result = CliRunner().invoke(app, [*line, "--device", "cpu"])
    assert result.exit_code == 0, result.output
    assert all(word in result.output for word in ("deletion", "insertion", "pointing", "random", "centre"))


@pytest.mark.parametrize(
    ("options", "message"),
    [({"steps": 0}, "steps 0"), ({"limit": 0}, "limit 0"), ({"baseline": "black"}, "choose mean or blur")],
)
def test_wrong_settings(options, message):
    with pytest.raises(UsageError, match=message):
        JudgeConfig(**options)
