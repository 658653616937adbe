"""Tests of maps: several stores beside two controls, and maps that are known to be right or wrong."""

from __future__ import annotations

import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import BODY, GRID, SIDE, encode, rewrite_store, scenes, store, write_shards
from typer.testing import CliRunner

from zpipe import open_maps
from zpipe.cli import app
from zpipe.schemas.errors import UsageError, ZpipeError
from zpipe.schemas.relevance_store import ZERO
from zpipe.train.checkpoint import Preprocessing
from zpipe.train.data.loader import RelevanceLoader
from zpipe.train.evaluation.judge import Classifier, JudgeConfig, judge, judge_maps, open_classifier, row_names
from zpipe.train.evaluation.results import read_results
from zpipe.train.fit.config import TrainConfig
from zpipe.train.fit.train_vit import VitConfig, train_vit

torch.set_num_threads(1)
CPU = JudgeConfig(device="cpu", steps=4, groups=4)
METHOD = "transformer-attribution"
FAITHFULNESS = ("deletion", "insertion", "abpc", "saco")
BOXES = ("pointing_game", "max_box_acc_30", "max_box_acc_50", "max_box_acc_70", "max_box_acc_v2")
MASKS = ("pixel_accuracy", "average_precision", "miou")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("judge")
    scenes(root / "shards", 20)
    loop = TrainConfig(epochs=1, batch_size=10, data_workers=0, device="cpu")
    config = VitConfig(model="deit_tiny_patch16_224", model_args=BODY, image_size=SIDE, train=loop)
    train_vit(root / "shards", root / "run", config)
    store(root / "shards", root / "maps")
    return root


@pytest.fixture(scope="module")
def pointing(data, tmp_path_factory):
    """A store whose maps are one cell in the box of the digit, and masks of these boxes."""
    root = tmp_path_factory.mktemp("pointing")
    maps = {}
    loader = RelevanceLoader(data / "shards", batch_size=20, image_size=SIDE, augment="eval")
    for batch in loader:
        for key, box, view in zip(batch["key"], batch["object_box"], batch["box"], strict=True):
            # The evaluation view is a centre crop; the store's maps and the masks cover the whole image.
            low, high = (view[:2] + box[corner] * (view[2:] - view[:2]) for corner in (slice(0, 2), slice(2, 4)))
            x, y = ((low + high) / 2 / SIDE * GRID).int().clamp(max=GRID - 1).tolist()
            maps[key] = np.zeros((GRID, GRID), np.float32)
            maps[key][y, x] = 1
            mask = np.zeros((SIDE, SIDE), np.uint8)
            (x1, y1), (x2, y2) = low.round().int().tolist(), high.round().int().tolist()
            mask[y1:y2, x1:x2] = 7
            (root / "masks").mkdir(exist_ok=True)
            Image.fromarray(mask).save(root / "masks" / f"{key}.png")
    shutil.copytree(data / "maps", root / "maps")
    rewrite_store(root / "maps", maps)
    return root


def test_rows_of_a_store_and_the_controls(data, tmp_path):
    rows = judge_maps(data / "run", data / "shards", data / "maps", CPU, out=tmp_path / "rows.json")
    assert [row["setting"] for row in rows] == [METHOD, "centre", "random"]
    assert json.loads((tmp_path / "rows.json").read_text())["rows"] == rows
    for row in rows:
        assert row["count"] == 20 and row["counts"] == {}
        for name in (*FAITHFULNESS, *BOXES):
            assert -1 <= row[f"{name}_low"] <= row[name] <= row[f"{name}_high"] <= 1
        assert row["deletion_low"] < row["deletion_high"]
        assert row["abpc"] == pytest.approx(row["insertion"] - row["deletion"])
        assert np.trapezoid(row["curves"]["deletion"], dx=1 / 4) == pytest.approx(row["deletion"])
        assert row["max_box_acc_30"] >= row["max_box_acc_50"] >= row["max_box_acc_70"]
    assert "difference" not in rows[0]
    for name in FAITHFULNESS:
        assert rows[1]["difference"][name][0] == pytest.approx(rows[1][name] - rows[0][name])


def test_neither_the_batch_size_nor_the_limit_changes_an_image(data):
    whole = judge_maps(data / "run", data / "shards", data / "maps", CPU)
    small = JudgeConfig(device="cpu", steps=4, groups=4, batch_size=3)
    for row, same in zip(whole, judge_maps(data / "run", data / "shards", data / "maps", small), strict=True):
        for name in (*FAITHFULNESS, *BOXES):  # random orders and resamples depend on the key only
            for end in ("", "_low", "_high"):
                assert row[name + end] == pytest.approx(same[name + end], abs=1e-5)
    few = JudgeConfig(device="cpu", steps=4, limit=7, batch_size=4)
    assert judge_maps(data / "run", data / "shards", data / "maps", few)[0]["count"] == 7


def test_maps_that_point_at_the_object_win(data, pointing):
    config = JudgeConfig(device="cpu", steps=2, masks=pointing / "masks")
    stores = [pointing / "maps", data / "maps"]
    right, other, _, random = judge_maps(data / "run", data / "shards", stores, config)
    assert right["setting"] == f"{METHOD} ({pointing / 'maps'})" and other["setting"] == f"{METHOD} ({data / 'maps'})"
    assert right["pointing_game"] > 0.5 > random["pointing_game"]
    for name in (*BOXES, *MASKS):
        assert right[name] > other[name] and right[name] > random[name], name
    assert other["difference"]["average_precision"][2] < 0  # not by chance
    assert len(open_maps(pointing / "maps")) == 20


def test_all_stores_are_judged_on_the_images_that_each_has(data, pointing, tmp_path):
    shutil.copytree(pointing / "maps", tmp_path / "maps")
    keys = list(open_maps(tmp_path / "maps"))
    whole = open_maps(pointing / "maps")
    rewrite_store(tmp_path / "maps", {key: whole[key] for key in keys}, dict.fromkeys(keys[:3], ZERO))
    classifier = open_classifier(data / "run", "cpu")
    content = judge(classifier, data / "shards", [data / "maps", tmp_path / "maps"], CPU)
    assert [row["count"] for row in content["rows"]] == [17] * 4
    assert content["skipped_by"] == {"without a usable map": 3} and content["samples"] == 20
    alone = judge(classifier, data / "shards", data / "maps", CPU)["rows"][0]
    assert content["rows"][0]["deletion"] != alone["deletion"]
    nothing = rewrite_store(tmp_path / "maps", {key: whole[key] for key in keys}, dict.fromkeys(keys, ZERO))
    with pytest.raises(UsageError, match="and 1 more: has no usable map of a sample in .*; judge stores of the same"):
        judge(classifier, data / "shards", [data / "maps", nothing], CPU)


def test_boxes_of_some_images(data, tmp_path):
    """Any of several boxes of the class counts; images without a box, or with none in the centre crop, are left out."""
    metas = {
        "hit": {"boxes": [[2, 2, 10, 10], [18, 18, 30, 30], [10, 2, 18, 10]], "box_labels": [1, 1, 2]},
        "miss": {"boxes": [[10, 2, 18, 10], [18, 18, 30, 30]], "box_labels": [1, 2]},
        "outside": {"box": [0, 0, 1, 1]},
        "none": {},
    }
    members = {}
    for key, meta in metas.items():
        members |= {f"{key}.png": encode(np.full((SIDE, SIDE, 3), 99, np.uint8)), f"{key}.cls": b"1"}
        members[f"{key}.json"] = json.dumps(meta).encode()
    shards = write_shards(tmp_path / "shards", [members])
    corner = np.zeros((GRID, GRID), np.float32)
    corner[3, 3] = 1
    maps = rewrite_store(store(shards, tmp_path / "maps"), dict.fromkeys(metas, corner))
    for batch_size in (4, 1):
        config = JudgeConfig(device="cpu", steps=1, batch_size=batch_size)
        row = judge_maps(data / "run", shards, maps, config)[0]
        assert row["counts"] == dict.fromkeys(BOXES, 2) and row["count"] == 4
        assert row["pointing_game"] == row["max_box_acc_30"] == 0.5


def test_the_results_file_states_the_setting_and_comes_back(data, pointing, tmp_path):
    config = JudgeConfig(device="cpu", steps=2, baseline="mean", masks=pointing / "masks")
    stores = [data / "maps", pointing / "maps"]
    judge_maps(data / "run", data / "shards", stores, config, out=tmp_path / "judge.json")
    about, results = read_results(tmp_path / "judge.json")
    assert about["content"] == "judge" and about["maps"] == [str(path) for path in stores]
    assert about["settings"]["baseline"] == "mean" and about["settings"]["steps"] == 2
    assert about["settings"]["image_size"] == SIDE and about["images_digest"]
    assert [each["grid"] for each in about["stores"]] == [[GRID, GRID]] * 2 and about["stores"][0]["frame"] == "full"
    assert {row.metric for row in results} == {*FAITHFULNESS, *BOXES, *MASKS}
    assert {row.setting["order"] for row in results} == {row["setting"] for row in about["rows"]}
    assert all(row.low <= row.high and row.n == 20 and row.study == "judge" for row in results)


def test_missing_masks_are_counted_and_said(data, pointing, tmp_path):
    shutil.copytree(pointing / "masks", tmp_path / "masks")
    for path in sorted((tmp_path / "masks").iterdir())[:4]:
        path.unlink()
    config = JudgeConfig(device="cpu", steps=1, masks=tmp_path / "masks")
    content = judge(open_classifier(data / "run", "cpu"), data / "shards", data / "maps", config)
    assert content["rows"][0]["counts"] == dict.fromkeys(MASKS, 16)
    assert content["masks_left_out"].endswith("measured on 16 images; of 4 the mask is missing (train_0000000 first)")
    assert {row["n"] for row in content["results"] if row["metric"] in MASKS} == {16}
    assert {row["n"] for row in content["results"] if row["metric"] in FAITHFULNESS} == {20}


def test_stability_is_a_column(data):
    keys = list(open_maps(data / "maps"))
    stability = {METHOD: {key: number / 20 for number, key in enumerate(keys[:10])}}
    content = judge(open_classifier(data / "run", "cpu"), data / "shards", data / "maps", CPU, stability=stability)
    row, *controls = content["rows"]
    assert row["stability"] == pytest.approx(np.arange(10).mean() / 20) and row["counts"] == {"stability": 10}
    assert row["stability_low"] < row["stability"] < row["stability_high"]
    assert all("stability" not in control and "stability" not in control["difference"] for control in controls)
    with pytest.raises(UsageError, match="stability of rollout: no such row; give those of transformer-attribution"):
        judge(open_classifier(data / "run", "cpu"), data / "shards", data / "maps", CPU, stability={"rollout": {}})


def test_a_difference_is_of_images_that_both_rows_have(data, tmp_path):
    shutil.copytree(data / "maps", tmp_path / "maps")
    stores = [open_maps(data / "maps"), open_maps(tmp_path / "maps")]
    names, keys = row_names(stores), list(stores[0])
    classifier = open_classifier(data / "run", "cpu")
    for own, other, alike in ((keys, keys, True), (keys, keys[:8], False), (keys[:8], keys[12:], False)):
        stability = {names[0]: dict.fromkeys(own, 0.9), names[1]: dict.fromkeys(other, 0.8)}
        row = judge(classifier, data / "shards", stores, CPU, stability=stability)["rows"][1]
        assert row["stability"] == pytest.approx(0.8) and ("stability" in row["difference"]) == alike
        assert set(FAITHFULNESS) <= set(row["difference"])


def test_a_metric_that_is_not_finite_is_left_out(data, tmp_path):
    """Where neither a mask nor a map has any background that counts, its union is empty, and mIoU is 0 / 0."""
    masks = tmp_path / "masks"
    masks.mkdir()
    keys = list(open_maps(data / "maps"))
    for key in keys:
        mask = np.full((SIDE, SIDE), 255, np.uint8)  # ignored, but for one pixel of the object, which the map finds
        mask[SIDE // 2, SIDE // 2] = 1
        Image.fromarray(mask).save(masks / f"{key}.png")
    peak = np.zeros((GRID, GRID), np.float32)
    peak[GRID // 2, GRID // 2] = 1
    maps = rewrite_store(shutil.copytree(data / "maps", tmp_path / "maps"), dict.fromkeys(keys, peak))
    config = JudgeConfig(device="cpu", steps=1, masks=masks)
    row, *controls = judge_maps(data / "run", data / "shards", maps, config, out=tmp_path / "judge.json")
    assert "miou" not in row and row["pixel_accuracy"] == 1
    assert all("miou" not in control["difference"] for control in controls)
    assert read_results(tmp_path / "judge.json")[1]


def test_masks_of_the_last_images_only(data, pointing, tmp_path):
    shutil.copytree(pointing / "masks", tmp_path / "masks")
    for path in sorted((tmp_path / "masks").iterdir())[:18]:
        path.unlink()
    config = JudgeConfig(device="cpu", steps=1, masks=tmp_path / "masks", batch_size=3)
    assert judge_maps(data / "run", data / "shards", data / "maps", config)[0]["counts"]["miou"] == 2
    few = dataclasses.replace(config, limit=18)
    with pytest.raises(UsageError, match="none of 18 images has a usable mask"):
        judge_maps(data / "run", data / "shards", data / "maps", few)


def test_maps_on_a_wide_grid_and_a_classifier_of_ones_own(data, tmp_path):
    """The classifier sees one half of the image, so that maps of this half are right, and of the other half wrong."""

    def logits(images, keys):
        assert len(images) == len(keys)
        seen = (images[:, :, :, : SIDE // 2] - background).abs().mean((1, 2, 3))
        return torch.stack([*[torch.zeros_like(seen)] * 9, 9 * seen], dim=1)

    background = 0.0
    classifier = Classifier(
        preprocessing=Preprocessing(image_size=SIDE, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)),
        num_classes=10,
        device=torch.device("cpu"),
        logits=logits,
        match=lambda index, shards, how: [9] * 10,
        about={"study": "judge", "run": "halves", "model": "halves", "seed": None},
        path="halves",
    )
    stores = []
    for name, half in (("left", slice(0, 4)), ("right", slice(4, 8))):
        shutil.copytree(data / "maps", tmp_path / name)
        wide = np.zeros((2, 8), np.float32)
        wide[:, half] = 1
        stores.append(rewrite_store(tmp_path / name, dict.fromkeys(open_maps(data / "maps"), wide)))
    config = JudgeConfig(device="cpu", steps=4, groups=2, baseline="mean")
    left, right, centre, random = judge(classifier, data / "shards", stores, config)["rows"]
    assert left["abpc_low"] > 0 > right["abpc_high"]
    assert left["saco"] == 1 and right["saco"] == -1
    assert right["abpc"] < min(centre["abpc"], random["abpc"]) and left["abpc"] > max(centre["abpc"], random["abpc"])
    assert right["difference"]["abpc"][2] < 0


def test_a_label_outside_the_model_is_named(data):
    classifier = open_classifier(data / "run", "cpu")
    few = Classifier(**{**vars(classifier), "num_classes": 2, "match": lambda index, shards, how: None})
    with pytest.raises(ZpipeError, match="key train_"):
        judge(few, data / "shards", data / "maps", CPU)


def test_the_command(data, pointing, tmp_path):
    line = ["maps", "judge", str(data / "maps"), str(data / "shards"), "--model", str(data / "run"), "--steps", "2"]
    result = CliRunner().invoke(app, [*line, "--device", "cpu"])
    assert result.exit_code == 0, result.output
    assert all(word in result.output for word in ("deletion", "insertion", "pointing", "random", "centre"))
    masks = shutil.copytree(pointing / "masks", tmp_path / "masks")
    (masks / "train_0000003.png").unlink()
    line.insert(3, str(pointing / "maps"))
    more = ["--masks", str(masks), "--json", str(tmp_path / "judge.json"), "--device", "cpu"]
    result = CliRunner().invoke(app, [*line, *more])
    assert result.exit_code == 0, result.output
    assert all(word in result.output for word in ("miou", "n = 19", "Difference to", "of 1 the mask is missing"))
    assert len(read_results(tmp_path / "judge.json")[0]["rows"]) == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps 0"),
        ({"limit": 0}, "limit 0"),
        ({"groups": 1}, "groups 1"),
        ({"baseline": "black"}, "choose mean or blur"),
    ],
)
def test_wrong_settings(options, message):
    with pytest.raises(UsageError, match=message):
        JudgeConfig(**options)


def test_wrong_stores(data):
    classifier = open_classifier(data / "run", "cpu")
    with pytest.raises(UsageError, match="maps: is given twice"):
        judge(classifier, data / "shards", [data / "maps", data / "maps"], CPU)
    with pytest.raises(UsageError, match="no store to judge"):
        judge(classifier, data / "shards", [], CPU)
