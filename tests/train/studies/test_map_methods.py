"""The study of attribution methods: each value is what the models compute, and what was trained is kept."""

import dataclasses
import json
import shutil
from functools import partial

import numpy as np
import pytest
from tiny import BODY, SIDE, rewrite_store, scenes

from zpipe import open_maps
from zpipe.method_maps import MethodsConfig, extract_method_maps
from zpipe.pipeline.extract import ExtractConfig, extract_teacher_maps
from zpipe.schemas.errors import UsageError, ZpipeError
from zpipe.train.checkpoint import load_run
from zpipe.train.evaluation.evaluate import evaluate
from zpipe.train.evaluation.judge import JudgeConfig, judge_maps
from zpipe.train.evaluation.operating_points import EvalConfig
from zpipe.train.evaluation.results import Result, read_results
from zpipe.train.fit.config import TrainConfig
from zpipe.train.fit.train_vit import VitConfig, train_vit
from zpipe.train.fit.train_zoomer import ZoomerConfig, train_zoomer
from zpipe.train.report import ReportConfig, report
from zpipe.train.studies.bench import StudyConfig, StudyInputs
from zpipe.train.studies.map_methods import AGREEMENT, CONTROLS, agreement
from zpipe.train.studies.registry import run_study

pytestmark = pytest.mark.usefixtures("one_thread")

OWN, OTHER = METHODS = ("transformer-attribution", "gradient-attention")
LOOP = TrainConfig(epochs=1, batch_size=8, device="cpu", lr=3e-3)
EVALUATION = EvalConfig(alphas=(), budgets=(2, 6), batch_size=24, device="cpu")
ZOOM = VitConfig(
    model="zoomvit_tiny_patch16_224",
    model_args=BODY,
    image_size=SIDE,
    train=LOOP,
    zoom_draw="budget",
    max_zoomed=8,
)


def maker(*methods):
    """What extracts the maps of the methods, in this process."""
    config = MethodsConfig(methods=methods, executor="local", device="cpu")
    return partial(extract_method_maps, config=config)


def launch(data, run="zoom", methods=METHODS, evaluation=EVALUATION, **settings):
    seeds = settings.pop("seeds", ())
    inputs = StudyInputs(run=data / run, shards=data / "val", method_maps=methods and maker(*methods))
    return run_study("map-methods", inputs, StudyConfig(evaluation=evaluation, seeds=seeds), **settings)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("methods")
    scenes(root / "shards", 24, shard_size=12)
    scenes(root / "val", 24, shard_size=24, seed=1, split="val")
    plain = VitConfig(model="deit_tiny_patch16_224", model_args=BODY, image_size=SIDE, train=LOOP)
    train_vit(root / "shards", root / "teacher", plain)
    config = ExtractConfig(weights=str(root / "teacher"), executor="local", device="cpu")
    extract_teacher_maps(root / "shards", root / "maps", config)
    zoomer = ZoomerConfig(num_blocks=2, width=8, image_size=SIDE, train=LOOP)
    train_zoomer(root / "shards", root / "maps", root / "zoomer", zoomer)
    train_vit(root / "shards", root / "zoom", ZOOM, zoomer=root / "zoomer")
    return root


@pytest.fixture(scope="module")
def finished(data):
    """The results of two methods and two seeds, and the notes; the study is trained once for this module."""
    path, rows, notes = launch(data, seeds=(0, 1))
    return path, rows, notes


def chosen(rows, metric, **setting):
    """The values of a metric, of the rows with this setting, by seed."""
    found = [row for row in rows if row.metric == metric and setting.items() <= row.setting.items()]
    assert len({row.seed for row in found}) == len(found)
    return {row.seed: row.value for row in found}


def made(data):
    """What lies in the folder of the study, with the times at which weights and maps were written."""
    folder = data / "zoom" / "studies" / "map-methods"
    files = [*folder.rglob("*.safetensors"), *folder.rglob("*.parquet")]
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in files}


def test_every_value_is_that_of_a_training_of_its_own(data, finished):
    path, rows, _ = finished
    assert read_results(path)[1] == rows and {row.run for row in rows} == {"zoom", "teacher"}
    folder = data / "zoom" / "studies" / "map-methods"
    for method in METHODS:
        for seed in (0, 1):
            zoomer, vit = (folder / f"{kind}-{method}-seed-{seed}" for kind in ("zoomer", "vit"))
            if (method, seed) == (OWN, 0):
                assert not zoomer.exists() and not vit.exists()
                zoomer, vit = data / "zoomer", data / "zoom"
            settings = load_run(vit).settings
            assert settings["zoomer"] == str(zoomer) and settings["train"]["seed"] == seed
            store = data / "maps" if method == OWN else folder / "maps" / method / "train"
            assert load_run(zoomer).settings["maps"] == str(store)
            for row in evaluate(vit, data / "val", EVALUATION)["rows"]:
                assert chosen(rows, "top1", method=method, budget=row["budget"])[seed] == row["top1"]
            (val,) = (folder / "maps" / method).glob("val-*")
            (distance,) = evaluate(zoomer, data / "val", EvalConfig(device="cpu"), maps=val)["rows"]
            assert chosen(rows, "mse", method=method)[seed] == pytest.approx(distance["mse"])


def test_all_are_measured_at_equal_cost_and_beside_two_controls(data, finished):
    _, rows, _ = finished
    for budget in (2, 6):
        costs = [row.value for row in rows if row.metric == "gmacs" and row.setting["budget"] == budget]
        assert len(costs) == 2 * (len(METHODS) + len(CONTROLS)) and len(set(costs)) == 1
    for control in CONTROLS:
        run = data / "zoom" / "studies" / "map-methods" / f"vit-{control}-seed-1"
        assert load_run(run).settings["scores"] == control and load_run(run).zoomer is None
        (row,) = evaluate(run, data / "val", dataclasses.replace(EVALUATION, budgets=(6,)))["rows"]
        assert chosen(rows, "top1", scores=control, budget=6)[1] == row["top1"]


def test_maps_are_judged_on_the_teacher(data, finished):
    _, rows, _ = finished
    (store,) = (data / "zoom" / "studies" / "map-methods" / "maps" / OTHER).glob("val-*")
    expected = judge_maps(data / "teacher", data / "val", store, JudgeConfig(batch_size=24, device="cpu"))
    for row, name in zip(expected, (OTHER, "centre", "random"), strict=True):
        for metric in ("deletion", "insertion", "pointing_game"):
            assert list(chosen(rows, metric, maps=name).values()) == pytest.approx([row[metric]])
    assert {row.setting["maps"] for row in rows if row.run == "teacher"} == {*METHODS, "centre", "random"}


def test_the_notes_rank_the_methods(finished):
    _, rows, notes = finished
    (line,) = (note for note in notes if note.startswith("top-1 at budget 6, mean of 2 seeds: "))
    shares = [float(part.split()[-2]) for part in line.partition(": ")[2].split(", ")]
    assert shares == sorted(shares, reverse=True) and all(name in line for name in (*METHODS, *CONTROLS))
    mean = 50 * sum(chosen(rows, "top1", method=OTHER, budget=6).values())
    assert f"{OTHER} {mean:.1f} %" in line
    assert not any(row.metric == AGREEMENT for row in rows) and any("need 3 methods" in note for note in notes)


def results(metric, model, name, values, *, seed=0, **setting):
    """Results whose setting `name` is "a", "b", ... in the order of the values."""
    about = {"study": "map-methods", "run": "zoom", "model": model, "metric": metric, "n": 9, "seed": seed}
    return [
        Result(**about, setting={name: key} | setting, value=value) for key, value in zip("abcd", values, strict=False)
    ]


def test_the_agreement_of_metrics_with_accuracy():
    """Worked by hand: top-1 ranks a < b = c < d over means of two seeds, at the one budget that lets scores matter."""
    top1 = results("top1", "vit", "method", (0.1, 0.4, 0.3, 0.9), budget=4)
    top1 += results("top1", "vit", "method", (0.3, 0.2, 0.3, 0.9), seed=1, budget=4)
    top1 += [dataclasses.replace(row, setting=row.setting | {"budget": budget}) for row in top1 for budget in (0, 16)]
    top1 += results("top1", "vit", "scores", (1.0,), budget=4)  # a control
    zoomers = results("mse", "zoomer", "method", (4, 3, 2, 1)) + results("glow", "zoomer", "method", (1, 1, 1, 1))
    judged = results("insertion", "teacher", "maps", (1, 2, 3, 4)) + results("pointing_game", "teacher", "maps", (1,))
    judged += [dataclasses.replace(judged[0], setting={"maps": "centre"}, value=9.0)]
    found = {(row.setting["of"], row.setting["metric"]): row for row in agreement([*top1, *zoomers], judged, cells=16)}
    # Ranks 1, 2.5, 2.5, 4 against 1, 2, 3, 4: covariance 4.5, variances 4.5 and 5.
    assert found.keys() == {("maps", "insertion"), ("zoomer", "mse")}
    assert found["maps", "insertion"].value == pytest.approx(4.5 / (4.5 * 5) ** 0.5)
    assert found["zoomer", "mse"].value == pytest.approx(-4.5 / (4.5 * 5) ** 0.5)
    assert {(row.n, row.seed, row.setting["budget"]) for row in found.values()} == {(4, None, 4)}
    assert agreement([row for row in [*top1, *zoomers] if row.setting.get("method") in ("a", "b")], judged, 16) == []


def test_it_goes_on_where_it_was(data, finished):
    _, rows, _ = finished
    before, said = made(data), []
    again = launch(data, seeds=(0, 1), say=said.append)[1]
    assert made(data) == before and all("before" in line for line in said)
    timed = ("images_per_s",)
    assert [row for row in again if row.metric not in timed] == [row for row in rows if row.metric not in timed]


def test_an_interrupted_study_keeps_what_it_has(data, finished, tmp_path):
    """Interrupted within the training of the third of six models."""
    copy = tmp_path / "copy"
    shutil.copytree(data / "zoom", copy / "zoom", ignore=shutil.ignore_patterns("studies", "results"))
    inputs = StudyInputs(run=copy / "zoom", shards=data / "val", method_maps=maker(OWN, OTHER))
    config = StudyConfig(evaluation=EVALUATION, seeds=(1,))

    def interrupt(stage, done, total, of="", **facts):
        if stage == "train-zoomer" and of == f"zoomer-{OTHER}-seed-1":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_study("map-methods", inputs, config, progress=interrupt)
    assert not (copy / "zoom" / "results").exists()
    folder = copy / "zoom" / "studies" / "map-methods"
    assert sorted(path.parent.name for path in folder.glob("*/config.json")) == [
        f"vit-{OWN}-seed-1",
        f"zoomer-{OWN}-seed-1",
    ]
    said = []
    _, rows, _ = run_study("map-methods", inputs, config, say=said.append)
    assert [line.split()[2] for line in said if "was trained before" in line] == [
        f"zoomer-{OWN}-seed-1",
        f"vit-{OWN}-seed-1",
    ]
    undisturbed = {(row.metric, str(row.setting)): row.value for row in finished[1] if row.seed == 1}
    top1 = [row for row in rows if row.metric == "top1"]
    assert len(top1) == 2 * 4 and all(undisturbed["top1", str(row.setting)] == row.value for row in top1)


def test_the_report_shows_it(data, finished, tmp_path):
    config = ReportConfig(device="cpu")
    page = report([data / "zoom"], tmp_path / "page", config).read_text()
    assert "do better-judged maps make better Zoomers?" in page
    for name in (*METHODS, *CONTROLS):
        assert name in page
    assert "zoom, method gradient-attention" in page  # the two seeds are one series


def test_a_map_that_can_not_be_used_does_not_end_the_study(data, tmp_path):
    """A method may find nothing relevant in an image, which the zoomer at hand was not prepared for."""
    copy = tmp_path / "copy"
    shutil.copytree(data / "zoom", copy / "zoom", ignore=shutil.ignore_patterns("studies", "results"))

    def make(wanted):
        maps = maker(OTHER)(wanted)
        store = open_maps(maps.train[OTHER])
        keys = list(store)
        values = {key: np.asarray(store[key]) for key in keys}
        rewrite_store(maps.train[OTHER], values, {keys[0]: "zero"})
        manifest = json.loads((maps.train[OTHER] / "manifest.json").read_text())
        manifest["statuses"] = {"ok": len(keys) - 1, "zero": 1}
        (maps.train[OTHER] / "manifest.json").write_text(json.dumps(manifest))
        return maps

    inputs = StudyInputs(run=copy / "zoom", shards=data / "val", method_maps=make)
    _, rows, notes = run_study("map-methods", inputs, StudyConfig(evaluation=EVALUATION))
    zoomer = load_run(copy / "zoom" / "studies" / "map-methods" / f"zoomer-{OTHER}-seed-0")
    assert zoomer.settings["missing"] == "skip" and chosen(rows, "top1", method=OTHER, budget=2)
    assert any("whose maps can't be used (1 zero)" in note for note in notes)


def test_maps_of_a_url_and_the_name_of_a_validation_store(data, tmp_path):
    """Tars with the same keys and other contents are other images, so that they get a store of their own."""
    asked = []

    def ask(wanted):
        asked.append(wanted)
        raise ZpipeError("enough")

    shutil.copytree(data / "zoomer", tmp_path / "zoomer")
    settings = json.loads((tmp_path / "zoomer" / "run.json").read_text())
    url = "memory://bucket/maps"
    settings["settings"]["maps"] = url
    (tmp_path / "zoomer" / "run.json").write_text(json.dumps(settings))
    train_vit(data / "shards", tmp_path / "zoom", ZOOM, zoomer=tmp_path / "zoomer")
    scenes(tmp_path / "val", 24, shard_size=24, seed=2, split="val")
    for shards in (data / "val", data / "val", tmp_path / "val"):
        inputs = StudyInputs(run=tmp_path / "zoom", shards=shards, method_maps=ask)
        with pytest.raises(ZpipeError, match="enough"):
            run_study("map-methods", inputs, StudyConfig(evaluation=EVALUATION))
    assert str(asked[0].own) == url
    one, same, other = (wanted.val_name for wanted in asked)
    assert one == same != other


# -- what is refused, before anything is extracted or trained ----------------------------------------------------------


def never(wanted):
    raise AssertionError("nothing is extracted")


@pytest.mark.parametrize(
    ("run", "message"),
    [
        ("teacher", "teacher: study map-methods needs a zoomvit"),
        ("zoomer", "zoomer: study map-methods needs a zoomvit"),
        (
            "centred",
            "centred: was trained with scores from centre; study map-methods needs a run of train-vit --zoomer",
        ),
        ("replaced", "zoomer: is another zoomer than the one that .*replaced was trained with"),
    ],
)
def test_runs_that_do_not_fit(data, tmp_path, run, message):
    if run == "centred":
        train_vit(data / "shards", tmp_path / run, dataclasses.replace(ZOOM, scores="centre"))
    elif run == "replaced":
        zoomer = tmp_path / "zoomer"
        shutil.copytree(data / "zoomer", zoomer)
        train_vit(data / "shards", tmp_path / run, ZOOM, zoomer=zoomer)
        shutil.rmtree(zoomer)
        again = ZoomerConfig(num_blocks=2, width=8, image_size=SIDE, train=dataclasses.replace(LOOP, seed=7))
        train_zoomer(data / "shards", data / "maps", zoomer, again)
    folder = tmp_path / run if (tmp_path / run).exists() else data / run
    inputs = StudyInputs(run=folder, shards=data / "val", method_maps=never)
    with pytest.raises(UsageError, match=message):
        run_study("map-methods", inputs, StudyConfig(evaluation=EVALUATION))
    assert not (folder / "studies").exists()


def test_a_zoomer_that_is_gone(data, tmp_path):
    shutil.copytree(data / "zoomer", tmp_path / "zoomer")
    train_vit(data / "shards", tmp_path / "zoom", ZOOM, zoomer=tmp_path / "zoomer")
    shutil.rmtree(tmp_path / "zoomer")
    inputs = StudyInputs(run=tmp_path / "zoom", shards=data / "val", method_maps=never)
    with pytest.raises(UsageError, match=r"zoomer: not a training run"):
        run_study("map-methods", inputs, StudyConfig(evaluation=EVALUATION))


def test_thresholds_and_unmade_maps_are_refused(data):
    inputs = StudyInputs(run=data / "zoom", shards=data / "val", method_maps=never)
    config = StudyConfig(evaluation=dataclasses.replace(EVALUATION, alphas=(0.5,)))
    with pytest.raises(UsageError, match=r"--alphas: study map-methods compares models of equal cost; give --budgets"):
        run_study("map-methods", inputs, config)
    with pytest.raises(UsageError, match="give StudyInputs.method_maps"):
        run_study(
            "map-methods", StudyInputs(run=data / "zoom", shards=data / "val"), StudyConfig(evaluation=EVALUATION)
        )
    with pytest.raises(UsageError, match="--methods, --weights: study pruning has no use"):
        run_study("pruning", inputs, StudyConfig(evaluation=EVALUATION))
