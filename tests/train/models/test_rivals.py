"""The rivals through the same loop, the same evaluation and the same report as ZoomViT."""

import json
from dataclasses import replace

import pytest
import torch
from tiny import GRID, SIDE, scenes, store

from zpipe.schemas.errors import UsageError
from zpipe.train.checkpoint import load_run
from zpipe.train.data.loader import RelevanceLoader
from zpipe.train.evaluation.calibrate import CalibrationConfig, calibrate
from zpipe.train.evaluation.evaluate import evaluate
from zpipe.train.evaluation.operating_points import EvalConfig
from zpipe.train.evaluation.predict import Classifier
from zpipe.train.evaluation.results import read_results
from zpipe.train.fit.config import TrainConfig
from zpipe.train.fit.train_vit import ClassifyTask, VitConfig, train_vit
from zpipe.train.fit.train_zoomer import ZoomerConfig, train_zoomer
from zpipe.train.losses import CoarseToFineLoss
from zpipe.train.macs import count_macs
from zpipe.train.report import ReportConfig, report
from zpipe.train.studies.bench import StudyConfig, StudyInputs
from zpipe.train.studies.registry import run_study

pytestmark = pytest.mark.usefixtures("one_thread")

COUNT = 40
BODY = {"embed_dim": 24, "depth": 4, "num_heads": 3, "patch_size": 4}
PLAIN = {"backbone": "deit_tiny_patch16_224", "backbone_args": BODY}
LOOP = TrainConfig(epochs=0.5, batch_size=8, device="cpu", lr=3e-3)
RIVALS = {
    "cfvit": ("cfvit_small", BODY),
    "lfvit": ("lfvit_small", BODY | {"region_size": 3}),
    "pruned": ("token_pruned_vit", PLAIN | {"prune_block": 2}),
    "merged": ("tome_vit", PLAIN | {"r": 4}),
    "box": ("image_zoom", PLAIN | {"patch_size": 8}),
    "sparse": (
        "sparseformer_tiny",
        {"conv_dim": 16, "num_tokens": 4, "focus_dim": 64, "cortex_dim": 64, "num_heads": 8, "num_points": 9},
    ),
}
CONFIG = EvalConfig(batch_size=16, device="cpu")


def config_of(name, **changes):
    model, arguments = RIVALS[name]
    return replace(VitConfig(model=model, model_args=arguments, image_size=SIDE, train=LOOP), **changes)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("rivals")
    shards, maps = scenes(root / "shards", COUNT), store(root / "shards", root / "maps")
    train_zoomer(shards, maps, root / "zoomer", ZoomerConfig(num_blocks=2, width=8, image_size=SIDE, train=LOOP))
    for name in RIVALS:
        train_vit(shards, root / name, config_of(name), zoomer=root / "zoomer" if name == "box" else None)
    return root


def batch_of(data, opened, maps=None):
    loader = RelevanceLoader(data / "shards", maps, batch_size=COUNT, image_size=SIDE, augment="eval")
    (batch,) = list(loader)
    return batch, opened.preprocessing.normalise(batch["image"])


@pytest.mark.parametrize("name", RIVALS)
@torch.no_grad()
def test_it_trains_and_is_evaluated(data, name):
    rows = evaluate(data / name, data / "shards", CONFIG)["rows"]
    opened = load_run(data / name)
    batch, images = batch_of(data, opened)
    image = torch.zeros(1, 3, SIDE, SIDE)
    for row in rows:
        if name in ("cfvit", "lfvit"):
            coarse, fine = opened.model(images, return_stages=True)
            sure = coarse.softmax(1).amax(1) >= row["exit"]
            logits = torch.where(sure[:, None], coarse, fine)
            assert row["exited"] == pytest.approx(float(sure.float().mean()))
            macs = opened.model.macs(row["exited"])
        else:
            scores = (opened.zoomer(images),) if name == "box" else ()
            logits = opened.model(images, *scores)
            blank = (torch.zeros(1, GRID * GRID),) if name == "box" else ()
            macs = count_macs(lambda blank=blank: opened.model(image, *blank))
        assert row["top1"] == pytest.approx(float((logits.argmax(1) == batch["label"]).float().mean()))
        assert row["gmacs"] * 1e9 == pytest.approx(macs, rel=1e-6) and row["count"] == COUNT
    settings = [row["setting"] for row in rows]
    expected = {
        "cfvit": ["exit=0", "exit=0.3", "exit=0.5", "exit=0.7", "exit=0.9", "exit=1"],
        "pruned": ["keep=19"],
        "merged": ["merge=4"],
        "box": ["zoomer"],
        "sparse": ["plain"],
    }
    assert settings == expected.get(name, expected["cfvit"])
    tokens = {"pruned": (2 * 64 + 2 * 19) / 4, "merged": 64 - 4 * 1.5, "box": 64, "sparse": 4}
    if name in tokens:
        assert [row["tokens"] for row in rows] == [tokens[name]]
    else:
        assert rows[0]["tokens"] == 16 and rows[0]["exited"] == 1


def test_sweeps_over_own_settings(data):
    kept = evaluate(data / "pruned", data / "shards", replace(CONFIG, keeps=(1, 64)))["rows"]
    assert [row["keep"] for row in kept] == [1, 64] and kept[0]["gmacs"] < kept[1]["gmacs"]
    merged = evaluate(data / "merged", data / "shards", replace(CONFIG, merges=(0, 12)))["rows"]
    assert merged[0]["tokens"] == 64 and merged[1]["tokens"] == 64 - 18
    for run, options, message in (
        ("cfvit", {"exits": (1.2,)}, "--exits 1.2"),
        ("cfvit", {"exits": (0.5, 0.5)}, "exit=0.5: asked for twice"),
        ("cfvit", {"scores": "none"}, "choose own"),
        ("cfvit", {"merges": (2,)}, "--merge: CFViT has no such setting; it takes --exits"),
        ("merged", {"merges": (40,)}, "--merge 40: r must lie between 0 and 12"),
        ("pruned", {"keeps": (65,)}, "--keep 65"),
        ("sparse", {"exits": (0.5,)}, "--exits: SparseFormer has no such setting; it takes none"),
        ("box", {"scores": "own"}, "can't choose by itself"),
    ):
        with pytest.raises(UsageError) as error:
            evaluate(data / run, data / "shards", replace(CONFIG, **options))
        assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["cfvit", "lfvit", "pruned", "box"])
@torch.no_grad()
def test_scores_from_elsewhere_choose_what_is_refined(data, name):
    config = replace(CONFIG, scores="maps", exits=(1.0,) if name.endswith("fvit") else ())
    fine = store(data / "shards", data / "fine", patch_size=4) if not (data / "fine").exists() else data / "fine"
    maps = fine if name.endswith("fvit") else data / "maps"
    (row,) = evaluate(data / name, data / "shards", config, maps=maps)["rows"]
    opened = load_run(data / name)
    batch, images = batch_of(data, opened, maps)
    view = {"crop_pct": opened.preprocessing.crop_pct}
    assert view["crop_pct"] == 0.875  # as the loader's own
    logits = opened.model(images, batch["relevance"].flatten(1))
    assert row["top1"] == pytest.approx(float((logits.argmax(1) == batch["label"]).float().mean()))
    assert row["scores"] == "maps"


@pytest.mark.parametrize("name", ["cfvit", "lfvit"])
def test_the_exit_threshold_meets_a_target(data, name):
    model = load_run(data / name).model
    coarse, whole = model.macs(1.0) / 1e9, model.macs(0.0) / 1e9
    for share in (0.0, 0.3, 0.75, 1.0):
        target = coarse + share * (whole - coarse)
        config = replace(CONFIG, target_gmacs=target * (1 + 1e-6), calibration=data / "shards")
        (row,) = evaluate(data / name, data / "shards", config)["rows"]
        assert target - (whole - coarse) / COUNT - 1e-9 <= row["gmacs"] <= target * (1 + 1e-5)
    result = calibrate(
        data / name, data / "shards", CalibrationConfig(budget=f"{whole:.9f} GMACs", limit=30, device="cpu")
    )
    assert result["images"] == 30 and result["exit_threshold"] == 1.0
    for budget, message in (
        ("30 tokens", "early exit is calibrated to '2.3 GMACs'"),
        ("0.00001 GMACs", "of the coarse stage"),
    ):
        with pytest.raises(UsageError, match=message):
            calibrate(data / name, data / "shards", CalibrationConfig(budget=budget, device="cpu"))
    with pytest.raises(UsageError, match="give --calibration SHARDS"):
        evaluate(data / name, data / "shards", replace(CONFIG, target_gmacs=1.0))


def test_a_target_of_a_zooming_model(data, tmp_path):
    zoom = VitConfig(model="zoomvit_tiny_patch16_224", model_args=BODY | {"patch_size": 8}, image_size=SIDE, train=LOOP)
    train_vit(data / "shards", tmp_path / "zoom", zoom, zoomer=data / "zoomer")
    model = load_run(tmp_path / "zoom").model
    target = (model.macs(4) + model.macs(5)) / 2e9
    config = replace(CONFIG, target_gmacs=target, calibration=data / "shards")
    (row,) = evaluate(tmp_path / "zoom", data / "shards", config)["rows"]
    assert model.macs(0) / 1e9 < row["gmacs"] <= target


def test_the_two_stages_learn_in_two_phases(data):
    opened = load_run(data / "cfvit")
    config = config_of("cfvit", label_smoothing=0.1)
    task = ClassifyTask(opened.model.train(), None, config, opened.preprocessing, torch.device("cpu"))
    batch, images = batch_of(data, opened)
    criterion = CoarseToFineLoss(label_smoothing=0.1)
    losses = []
    for done, full in ((0.0, True), (0.66, True), (0.67, False), (1.0, False)):
        task.progress = done
        expected = criterion(*opened.model(images, return_stages=True, full_split=full), batch["label"])
        losses.append(task.loss(batch)[0].item())
        assert losses[-1] == pytest.approx(expected.item(), rel=1e-6)
    assert abs(losses[0] - losses[-1]) > 1e-6
    with pytest.raises(UsageError, match="learn by ce"):
        train_vit(data / "shards", data / "nothing", replace(config, loss="bce", label_smoothing=0.0))
    with pytest.raises(UsageError, match="full_split 2"):
        config_of("cfvit", full_split=2.0)


def test_wrong_input_is_refused(data, tmp_path):
    for name, options, message in (
        ("merged", {"zoomer": data / "zoomer"}, "this model takes no scores"),
        ("sparse", {"maps": data / "maps"}, "this model takes no scores"),
        ("box", {}, "needs its scores from one source"),
        ("cfvit", {"zoomer": data / "zoomer"}, "scores of 4 x 4, the model wants 8 x 8"),
    ):
        with pytest.raises(UsageError, match=message):
            train_vit(data / "shards", tmp_path / "run", config_of(name), **options)
    for name, arguments, message in (
        ("lfvit", {"region_size": 5}, "region_size must lie between 1 and the 4"),
        ("pruned", {"prune_block": 9}, "prune_block must lie between 1 and 3"),
    ):
        config = config_of(name)
        with pytest.raises(UsageError, match=message):
            train_vit(data / "shards", tmp_path / "run", replace(config, model_args=config.model_args | arguments))


@pytest.mark.parametrize("name", RIVALS)
def test_it_predicts(data, name):
    opened = load_run(data / name)
    classify = Classifier(opened)
    batch, images = batch_of(data, opened)
    with torch.no_grad():
        scores = (opened.zoomer(images),) if name == "box" else ()
        assert torch.allclose(classify(batch["image"]), opened.model(images, *scores), atol=1e-6)


def test_all_of_them_are_in_one_report(data, tmp_path):
    for name in RIVALS:
        evaluate(data / name, data / "shards", CONFIG, out=data / name / "evaluation.json")
    page = report([data / name for name in RIVALS], tmp_path, ReportConfig(gallery=10, device="cpu")).read_text()
    for name in RIVALS:
        assert f'"{name}"' in page
    assert "exit 0.5" in page and "merge 4" in page and "keep 19" in page


@pytest.mark.parametrize("name", ["cfvit", "lfvit"])
def test_the_study_of_selections(data, name):
    config = StudyConfig(evaluation=replace(CONFIG, alphas=()))
    path, _, _ = run_study("selection", StudyInputs(run=data / name, shards=data / "shards"), config)
    _, rows = read_results(path)
    selections = load_run(data / name).model.SELECTIONS
    assert {row.setting["selection"] for row in rows} == set(selections)
    assert len([row for row in rows if row.metric == "top1"]) == 6 * len(selections)
    trained = {
        json.loads((path / "run.json").read_text())["settings"]["model_args"]["selection"]
        for path in (data / name / "studies" / "selection").iterdir()
    }
    assert trained == set(selections[1:])
    with pytest.raises(UsageError, match="needs a cfvit_"):
        run_study("selection", StudyInputs(run=data / "merged", shards=data / "shards"), StudyConfig())
