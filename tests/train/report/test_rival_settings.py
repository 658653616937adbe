"""The report of models with settings of their own: swept like any other, and shown in the gallery where evaluated."""

from __future__ import annotations

import shutil
from dataclasses import replace

import pytest
import timm
from report_page import embedded
from timm.models import register_model
from tiny import BODY, SIDE, scenes
from torch import nn

from zpipe.schemas.errors import UsageError
from zpipe.train.checkpoint import load_run
from zpipe.train.data.loader import RelevanceLoader
from zpipe.train.evaluation.evaluate import evaluate
from zpipe.train.evaluation.operating_points import EvalConfig
from zpipe.train.evaluation.predict import Classifier, PredictConfig
from zpipe.train.fit.config import TrainConfig
from zpipe.train.fit.train_vit import VitConfig, train_vit
from zpipe.train.models.backbone import square_side, untrained_cfgs
from zpipe.train.models.operating_points import ImageCost, points_of
from zpipe.train.report import ReportConfig, report
from zpipe.train.report.figures import curves
from zpipe.train.report.points import points
from zpipe.train.report.runs import gather

pytestmark = pytest.mark.usefixtures("one_thread")

COUNT = 24
CONFIG = ReportConfig(gallery=6, batch_size=COUNT, device="cpu")
SIDES = EvalConfig(points={"side": (2, 4)}, batch_size=COUNT, device="cpu")
default_cfgs = untrained_cfgs("central_patches")


class CentralPatches(nn.Module):
    """The mean of the embeddings of the side x side central patches, then a linear classifier."""

    setting_names = ("side",)

    def __init__(self, img_size=SIDE, patch_size=8, num_classes=10, in_chans=3):
        super().__init__()
        self.num_classes, self.num_features = num_classes, 16
        self.grid = square_side(img_size) // patch_size
        self.embed = nn.Conv2d(in_chans, 16, patch_size, patch_size)
        self.head = nn.Linear(16, num_classes)

    def forward(self, images, side=None):  # [B, 3, S, S] -> [B, num_classes]
        border = (self.grid - (side or self.grid)) // 2 * self.embed.stride[0]
        stop = images.shape[-1] - border
        return self.head(self.embed(images[:, :, border:stop, border:stop]).flatten(2).mean(dim=2))

    def operating_points(self, requested):
        return points_of("side", requested.get("side", (self.grid,)), "side", int)

    def cost(self, point, kind=None):
        return ImageCost(float(point.arguments["side"] ** 2), point.arguments)


@register_model
def central_patches(pretrained=False, **kwargs):
    return timm.models.build_model_with_cfg(CentralPatches, "central_patches", pretrained, **kwargs)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Shards, and an evaluated run."""
    root = tmp_path_factory.mktemp("rival-settings")
    scenes(root / "shards", COUNT)
    train = TrainConfig(epochs=1, batch_size=8, data_workers=0, device="cpu", lr=0.1)
    train_vit(root / "shards", root / "central", VitConfig(model="central_patches", image_size=SIDE, train=train))
    evaluate(root / "central", root / "shards", SIDES, out=root / "central" / "evaluation.json")
    plain = VitConfig(model="deit_tiny_patch16_224", model_args=BODY, image_size=SIDE, train=train)
    train_vit(root / "shards", root / "plain", plain)
    return root


def test_its_setting_is_swept(data):
    gathered = gather([data / "central"])
    found = points(gathered.results)
    assert [(point.series, point.setting, point.sweep) for point in found] == [
        ("central", {"side": 2}, "side"),
        ("central", {"side": 4}, "side"),
    ]
    assert [point.measures["tokens"].value for point in found] == [4, 16]
    costs, _ = curves(found, {})
    (trace,) = costs["data"]
    assert trace["name"] == "central" and len(trace["x"]) == 2 and trace["x"][0] < trace["x"][1]


def test_its_points_are_on_the_page(data, tmp_path):
    about = embedded(report([data / "central"], tmp_path, replace(CONFIG, gallery=0)).read_text(), "about-data")
    (table,) = about["tables"]["accuracy"]
    assert [row[:2] for row in table["rows"]] == [["central", "side 2"], ["central", "side 4"]]
    (tile,) = about["headline"]["tiles"]
    assert tile["name"] == "central" and tile["of"] == "best of 2 settings"


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_the_gallery_answers_at_its_setting_and_in_the_precision(data, tmp_path, precision):
    config = replace(CONFIG, shards=data / "shards", precision=precision)
    gallery = embedded(report([data / "central"], tmp_path, config).read_text(), "gallery-data")
    sentences = ["Shown at the middle setting of the evaluation: central (side 4)."]
    assert gallery["settings"] == sentences + ([] if precision == "float32" else ["The models ran in bf16."])
    settings = PredictConfig(settings={"side": 4}, precision=precision, device="cpu")
    classifier = Classifier(load_run(data / "central"), settings)
    (batch,) = RelevanceLoader(data / "shards", batch_size=COUNT, image_size=SIDE, augment="eval")
    expected = dict(zip(batch["key"], classifier(batch["image"]).float().softmax(1), strict=True))
    assert len(gallery["entries"]) == 6
    for entry in gallery["entries"]:
        for index, probability in entry["top"][0]:
            assert probability == pytest.approx(float(expected[entry["key"]][index]), abs=1e-4)


def test_models_without_settings_are_said_to_run_in_the_precision(data, tmp_path):
    config = replace(CONFIG, shards=data / "shards", precision="bf16")
    gallery = embedded(report([data / "plain"], tmp_path, config).read_text(), "gallery-data")
    assert gallery["settings"] == ["The models ran in bf16."]
    with pytest.raises(UsageError, match="--precision int8: choose float32, bf16 or fp16"):
        replace(CONFIG, precision="int8")


def test_the_data_is_no_setting_of_the_model(data, tmp_path):
    """An evaluation with --classes or --labels states them beside the settings of the model."""
    run = shutil.copytree(data / "central", tmp_path / "central")
    evaluate(run, data / "shards", replace(SIDES, classes="by-name"), out=run / "evaluation.json")
    gathered = gather([run])
    assert gathered.runs[0].points == [{"side": 2}, {"side": 4}]
    found = points(gathered.results)
    assert [(point.series, point.setting) for point in found] == [
        ("central, classes by-name", {"side": 2}),
        ("central, classes by-name", {"side": 4}),
    ]
    evaluate(run, data / "shards", replace(SIDES, points={}, classes="by-name"), out=run / "evaluation.json")
    assert gather([run]).runs[0].points == [{"side": 4}]
