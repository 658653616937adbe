"""Sources of scores: the values of each, and their use in training and evaluation."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from tiny import BODY, GRID, SIDE, scenes, store
from typer.testing import CliRunner

from zpipe.cli import app
from zpipe.schemas.errors import UsageError
from zpipe.train.checkpoint import load_run
from zpipe.train.data.loader import RelevanceLoader
from zpipe.train.evaluation.calibrate import CalibrationConfig, calibrate
from zpipe.train.evaluation.evaluate import evaluate
from zpipe.train.evaluation.operating_points import EvalConfig
from zpipe.train.fit.config import TrainConfig
from zpipe.train.fit.train_vit import VitConfig, train_vit
from zpipe.train.fit.train_zoomer import ZoomerConfig, train_zoomer
from zpipe.train.models import Zoomer, ZoomViT
from zpipe.train.models.scores import centre_prior, class_attention, entropy_scores
from zpipe.train.scoring import SOURCES, choose_source
from zpipe.train.settings import with_settings

torch.set_num_threads(1)
LOOP = TrainConfig(epochs=1, batch_size=10, data_workers=0, device="cpu", lr=1e-3)
VIT = VitConfig(model="zoomvit_tiny_patch16_224", model_args=BODY, image_size=SIDE, train=LOOP)


def model(factor: float = 2.0) -> ZoomViT:
    torch.manual_seed(0)
    return ZoomViT(img_size=SIDE, num_classes=5, zoom_factor=factor, **BODY).eval()


# -- the maps ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", [1, 4, 7])
def test_centre_prior(side):
    prior = centre_prior(side).view(side, side)
    assert prior.max() == 1 and prior.min() > 0
    for same in (prior.T, prior.flip(0), prior.flip(1)):
        torch.testing.assert_close(prior, same)
    assert prior.argmax() == (side // 2) * (side + 1) or side % 2 == 0
    wide = centre_prior(40)
    assert wide.view(40, 40)[20, 30] == pytest.approx(math.exp(-((10.5 / 40) ** 2 + (0.5 / 40) ** 2) * 8), rel=0.02)


def test_the_centre_prior_of_a_wide_grid_spans_the_image():
    prior = centre_prior(4, 8).view(4, 8)
    torch.testing.assert_close(prior[:, 3:5].mean(1) / prior[1, 3], centre_prior(4).view(4, 4)[:, 1])
    torch.testing.assert_close(prior[1], prior[1].flip(0))
    assert prior.max() == 1 and prior[0, 0] == prior.min()


def test_entropy_is_that_of_the_histogram():
    torch.manual_seed(0)
    images = torch.randn(2, 3, 16, 16)
    images[:, :, :8, :8] = 0.5  # a flat cell
    got = entropy_scores(images, 2, bins=8)
    assert got.shape == (2, 4) and got[0, 0] == 0
    grey = images[1].mean(0).numpy()
    cell = grey[8:, 8:]
    share = np.histogram(cell, bins=8, range=(grey.min(), grey.max()))[0] / 64
    assert got[1, 3] == pytest.approx(-(share[share > 0] * np.log(share[share > 0])).sum() / math.log(8), abs=0.02)
    torch.testing.assert_close(entropy_scores(3 * images + 1, 2, bins=8), got)  # independent of the normalisation
    with pytest.raises(ValueError, match="don't divide into 3 x 3"):
        entropy_scores(images, 3)
    assert entropy_scores(torch.zeros(1, 3, 16, 16), 2).tolist() == [[0, 0, 0, 0]]
    even = torch.arange(64.0).view(1, 1, 8, 8).expand(1, 3, 8, 8)  # all levels equally often: the maximum, 1
    assert entropy_scores(even, 1).item() == pytest.approx(1) and entropy_scores(even, 1).item() <= 1


@torch.no_grad()
def test_class_attention_is_that_of_the_last_block():
    torch.manual_seed(0)
    # In float64: the attention of random weights is nearly uniform, so subtracting its minimum cancels digits.
    vit = VisionTransformer(img_size=SIDE, num_classes=5, reg_tokens=2, **BODY).eval().double()
    images = torch.randn(3, 3, SIDE, SIDE).double()
    attn = vit.blocks[-1].attn
    attn.fused_attn = False  # so that timm computes the attention matrix
    seen = []
    attn.attn_drop.register_forward_hook(lambda module, inputs, output: seen.append(output))
    vit(images)
    row = seen[0][:, :, 0, 3:].mean(1)  # from the class token to the patches, after two registers
    expected = (row - row.amin(1, keepdim=True)) / (row.amax(1, keepdim=True) - row.amin(1, keepdim=True))
    torch.testing.assert_close(class_attention(vit, images, GRID), expected, atol=1e-10, rtol=1e-10)
    twice = class_attention(vit, images, 2 * GRID).view(3, 2 * GRID, 2 * GRID)
    torch.testing.assert_close(twice[:, 1::2, ::2].flatten(1), expected, atol=1e-10, rtol=1e-10)
    assert not attn._forward_pre_hooks


@pytest.mark.parametrize("factor", [2.0, 0.5])
@torch.no_grad()
def test_class_attention_of_a_zoomvit(factor):
    zoomvit = model(factor)
    dropping = ZoomViT(img_size=SIDE, num_classes=5, zoom_factor=factor, drop_path_rate=0.5, **BODY).train()
    images = torch.randn(2, 3, SIDE, SIDE)
    assert torch.equal(class_attention(dropping, images, GRID), class_attention(dropping, images, GRID))
    assert dropping.training and dropping.blocks[0].training
    scores = class_attention(zoomvit, torch.randn(3, 3, SIDE, SIDE), GRID)
    assert scores.shape == (3, GRID * GRID)
    assert scores.amin(1).tolist() == [0] * 3 and scores.amax(1).tolist() == [1] * 3
    if factor == 0.5:
        blocks = scores.view(3, 2, 2, 2, 2).permute(0, 1, 3, 2, 4).flatten(3)
        assert torch.equal(blocks, blocks[..., :1].expand_as(blocks))


def test_class_attention_wants_a_class_token():
    pooled = VisionTransformer(img_size=SIDE, class_token=False, global_pool="avg", **BODY)
    for other in (pooled, torch.nn.Linear(3, 3)):
        with pytest.raises(ValueError, match="needs a ViT with a class token"):
            class_attention(other, torch.randn(1, 3, SIDE, SIDE), GRID)


# -- by name -----------------------------------------------------------------------------------------------------------


def test_noise_is_the_samples_own_in_evaluation_and_new_in_training():
    images = torch.zeros(3, 3, SIDE, SIDE)
    fixed = choose_source("random", model()).score
    first = fixed(images, {"key": ["a", "b", "c"]})
    assert torch.equal(fixed(images[:2], {"key": ["c", "a"]}), first[[2, 0]])
    fresh = choose_source("random", model(), training=True).score
    assert not torch.equal(fresh(images, {"key": ["a", "b", "c"]}), fresh(images, {"key": ["a", "b", "c"]}))


def test_what_a_source_costs():
    zoomvit, image = model(), torch.zeros(1, 3, SIDE, SIDE)
    zoomer = Zoomer(2, GRID, width=8).freeze()
    attention = choose_source("attention", zoomvit)
    assert attention.macs(image) > zoomvit.macs(0) * 0.9
    assert choose_source("zoomer", zoomvit, zoomer=zoomer).macs(image) > 0
    assert [choose_source(name, zoomvit).macs(image) for name in ("entropy", "centre", "random", "none")] == [0] * 4


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("sources")
    scenes(root / "shards")
    store(root / "shards", root / "maps")
    zoomer = ZoomerConfig(num_blocks=2, width=8, image_size=SIDE, train=LOOP)
    train_zoomer(root / "shards", root / "maps", root / "zoomer", zoomer)
    return root


@pytest.mark.parametrize("name", [name for name in SOURCES if name != "own"])
def test_every_source_trains_and_evaluates(data, tmp_path, name):
    given = {"zoomer": {"zoomer": data / "zoomer"}, "maps": {"maps": data / "maps"}}.get(name, {})
    train_vit(data / "shards", tmp_path / "run", replace(VIT, scores=name), **given)
    maps = data / "maps" if name == "maps" else None
    config = EvalConfig(alphas=(0.3,), budgets=(4, "25 tokens"), device="cpu")
    rows = evaluate(tmp_path / "run", data / "shards", config, maps=maps)["rows"]
    settings = ["no zoom"] if name == "none" else ["alpha=0.3", "budget=4", "budget=25 tokens"]
    assert [row["setting"] for row in rows] == settings
    assert rows[-1]["tokens"] == (GRID * GRID if name == "none" else 25)
    assert (rows[0]["gmacs_zoomer"] > 0) == (name in ("zoomer", "attention"))
    if name not in ("zoomer", "maps"):
        other = evaluate(tmp_path / "run", data / "shards", replace(config, scores="centre"))["rows"]
        assert len(other) == 3
    with pytest.raises(UsageError, match="--scores own: this model can't choose by itself"):
        evaluate(tmp_path / "run", data / "shards", replace(config, scores="own"), maps=maps)


def test_fused_backbones_and_token_labels_train_and_evaluate(data, tmp_path):
    args = {"backbone": "lvvit_small", "patch_size": 8, "backbone_args": BODY}
    config = replace(VIT, model="fused_vit", model_args=args, token_label_weight=0.5)
    train_vit(data / "shards", tmp_path / "run", config, zoomer=data / "zoomer", maps=data / "maps")
    rows = evaluate(tmp_path / "run", data / "shards", EvalConfig(alphas=(0.1, 1.0), device="cpu"))["rows"]
    assert [row["tokens"] for row in rows] == [GRID * GRID] * 2
    assert rows[0]["gmacs"] >= rows[1]["gmacs"] > 0
    opened = load_run(tmp_path / "run")
    assert type(opened.model.backbone).__name__ == "LVViT" and opened.model.score_grid == GRID
    plain = replace(config, model="lvvit_small", model_args=BODY)
    train_vit(data / "shards", tmp_path / "plain", plain, maps=data / "maps")
    assert evaluate(tmp_path / "plain", data / "shards", EvalConfig(device="cpu"))["rows"][0]["tokens"] == GRID * GRID


def test_runs_start_others_with_other_heads_and_a_fused_model_from_its_backbone(data, zoom, tmp_path):
    def start(source, **changes):
        config = replace(VIT, init_from=str(source), num_classes=13, **changes)
        out = tmp_path / f"from-{source.name}"
        train_vit(data / "shards", out, with_settings(config, {"train.lr": 0.0, "train.weight_decay": 0.0}))
        return load_run(out).model.state_dict()

    of_zoom = load_run(zoom).model.state_dict()
    started = start(zoom, scores="centre")
    assert started["head.bias"].shape == (13,) and torch.equal(started["pos_fine"], of_zoom["pos_fine"])
    plain = replace(VIT, model="lvvit_small")
    train_vit(data / "shards", tmp_path / "lv", plain)
    of_plain = load_run(tmp_path / "lv").model.state_dict()
    started = start(tmp_path / "lv", model="lvvit_small")
    assert started["aux_head.bias"].shape == (13,) and torch.equal(started["pos_embed"], of_plain["pos_embed"])
    (tmp_path / "from-lv").rename(tmp_path / "lv13")
    args = {"backbone": "lvvit_small", "patch_size": 8, "backbone_args": BODY}
    fused = start(tmp_path / "lv", model="fused_vit", model_args=args, scores="centre")
    assert torch.equal(fused["backbone.pos_embed"], of_plain["pos_embed"])


@pytest.mark.parametrize(
    ("options", "given", "message"),
    [
        ({"scores": "magic"}, (), "choose one of zoomer, maps, attention"),
        ({"scores": "zoomer"}, (), "give --zoomer RUN"),
        ({"scores": "maps"}, (), "give --maps STORE"),
        ({"scores": "centre"}, ("zoomer",), "--scores centre: has no use for --zoomer"),
        ({"scores": "zoomer"}, ("zoomer", "maps"), "has no use for --maps"),
        ({}, (), "needs its scores from one source"),
        ({"model": "deit_tiny_patch16_224", "scores": "centre"}, (), "takes no scores"),
        ({"token_label_weight": 0.5}, ("maps",), "needs an lvvit_"),
        ({"token_label_weight": -1.0}, (), "give a number from 0 to"),
        ({"token_label_weight": 1.0, "label_smoothing": 0.1}, (), "without mixup, cutmix and label_smoothing"),
        ({"model": "fused_vit", "model_args": {"backbone": "resnet18"}, "scores": "centre"}, (), "regular grid"),
        (
            {
                "model": "fused_vit",
                "model_args": {"backbone": "deit_tiny_patch16_224", "patch_size": 8, "backbone_args": BODY},
                "scores": "attention",
            },
            (),
            "needs a zoomvit_",
        ),
    ],
)
def test_sources_that_do_not_fit(data, tmp_path, options, given, message):
    with pytest.raises(UsageError, match=message.replace("(", r"\(")) as error:
        config = replace(VIT, **options)
        train_vit(data / "shards", tmp_path / "run", config, **{name: data / name for name in given})
    assert "\n" not in str(error.value)


# -- calibration -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def zoom(data):
    train_vit(data / "shards", data / "zoom", VIT, zoomer=data / "zoomer")
    return data / "zoom"


@pytest.mark.parametrize(("budget", "unit"), [("5", "cells"), ("28 tokens", "tokens")])
def test_calibrated_alpha_costs_the_budget(data, zoom, tmp_path, budget, unit):
    found = calibrate(zoom, data / "shards", CalibrationConfig(budget=budget, device="cpu"), out=tmp_path / "c.json")
    assert (tmp_path / "c.json").is_file() and found["unit"] == unit and found["images"] == 40
    row = evaluate(zoom, data / "shards", EvalConfig(alphas=(found["alpha"],), device="cpu"))["rows"][0]
    mean = row["tokens"] if unit == "tokens" else (row["tokens"] - GRID * GRID) / 3
    assert mean == pytest.approx(found["mean"]) and mean <= found["budget"]
    assert mean > 0.9 * found["budget"]


def test_calibrated_to_multiply_adds(data, zoom):
    zoomvit = load_run(zoom).model
    target = zoomvit.macs(4) / 1e9
    found = calibrate(zoom, data / "shards", CalibrationConfig(budget=f"{target:.9f} GMACs", device="cpu"))
    row = evaluate(zoom, data / "shards", EvalConfig(alphas=(found["alpha"],), device="cpu"))["rows"][0]
    assert row["gmacs"] == pytest.approx(found["mean"]) and found["mean"] <= target


@pytest.mark.parametrize("budget", ["5", "10.5"])
def test_the_alpha_that_is_printed_is_the_one_that_was_found(data, zoom, tmp_path, budget):
    """The scores of a prior have ties: a rounded threshold would zoom a whole ring of cells more, or less."""
    out = tmp_path / "c.json"
    line = ["calibrate", str(zoom), str(data / "shards"), "--budget", budget, "--scores", "centre", "--json", str(out)]
    result = CliRunner().invoke(app, [*line, "--device", "cpu"])
    assert result.exit_code == 0, result.output
    found = json.loads(out.read_text())
    printed = float(result.output.split("alpha ")[1].split(":")[0])
    config = EvalConfig(alphas=(printed,), scores="centre", device="cpu")
    row = evaluate(zoom, data / "shards", config)["rows"][0]
    assert (row["tokens"] - GRID * GRID) / 3 == pytest.approx(found["mean"]) and found["mean"] <= float(budget)


def test_calibration_on_some_images(data, zoom):
    found = calibrate(zoom, data / "shards", CalibrationConfig(budget="5", limit=15, batch_size=10, device="cpu"))
    assert found["images"] == 15


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": "3 tokens"}, "below the 16 tokens of an image in which nothing is zoomed"),
        ({"budget": "lots"}, "is none: give a number of cells"),
        ({"budget": "4", "scores": "none"}, "nothing is zoomed"),
        ({"budget": "4", "limit": 0}, "limit 0"),
    ],
)
def test_what_cannot_be_calibrated(data, zoom, options, message):
    with pytest.raises(UsageError, match=message) as error:
        calibrate(zoom, data / "shards", CalibrationConfig(device="cpu", **options))
    assert "\n" not in str(error.value)


def test_models_whose_cost_has_no_threshold_are_not_calibrated(data, tmp_path):
    args = {"backbone": "deit_tiny_patch16_224", "patch_size": 8, "backbone_args": BODY}
    fused = replace(VIT, model="fused_vit", model_args=args, scores="centre")  # it zooms, at the same cost
    train_vit(data / "shards", tmp_path / "fused", fused)
    for run in (data / "zoomer", tmp_path / "fused"):
        with pytest.raises(UsageError, match=r"only zoomvit_\*, cfvit_"):
            calibrate(run, data / "shards", CalibrationConfig(budget="4", device="cpu"))


def test_maps_as_scores_reach_the_model_as_they_are(data):
    from zpipe import open_maps

    source = choose_source("maps", model(), store=open_maps(data / "maps"))
    batch = next(iter(RelevanceLoader(data / "shards", data / "maps", batch_size=4, image_size=SIDE, augment="eval")))
    assert torch.equal(source.score(batch["image"], batch), batch["relevance"].flatten(1))
