"""The report: it gathers all results, is one safe file, and works in a real browser."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser

import plotly.graph_objects
import pytest
import torch
from tiny import BODY, GRID, SIDE, scenes, store

from zpipe.schemas.atomic import read_json, write_json
from zpipe.schemas.errors import UsageError, ZpipeError
from zpipe.schemas.manifest import read_manifest, write_manifest
from zpipe.schemas.shard_index import INDEX_NAME
from zpipe.train.checkpoint import load_run, save_model
from zpipe.train.data.loader import RelevanceLoader
from zpipe.train.evaluation.evaluate import evaluate
from zpipe.train.evaluation.operating_points import EvalConfig
from zpipe.train.evaluation.predict import Classifier, PredictConfig
from zpipe.train.evaluation.results import EVALUATION, Result, write_results, write_study
from zpipe.train.fit.config import TrainConfig
from zpipe.train.fit.initialise import build_vit
from zpipe.train.fit.train_vit import VitConfig, train_vit
from zpipe.train.fit.train_zoomer import ZoomerConfig, train_zoomer
from zpipe.train.models import zoom_tokens
from zpipe.train.report import ReportConfig, report
from zpipe.train.report.figures import curves, histograms
from zpipe.train.report.page import describe, embedded_json, render
from zpipe.train.report.points import base_name, points
from zpipe.train.report.runs import gather
from zpipe.train.report.tables import headline, tables
from zpipe.train.scoring import SOURCES

torch.set_num_threads(1)
COUNT = 24
LOOP = TrainConfig(epochs=1, batch_size=8, data_workers=0, device="cpu", lr=1e-3, log_every=1)
HOSTILE = "</script><img src=x onerror=\"document.title='owned'\"><a href='https://example.org'>"
CONFIG = ReportConfig(gallery=20, device="cpu")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Shards with a hostile class name, a store, and evaluated runs: both zoom factors and a plain model."""
    root = tmp_path_factory.mktemp("report")
    shards = scenes(root / "shards", COUNT, shard_size=6)
    index = read_json(shards / INDEX_NAME, "a shard index")
    index["classes"][3] = HOSTILE
    write_json(shards / INDEX_NAME, index)
    maps = store(shards, root / "maps")
    zoomer = ZoomerConfig(num_blocks=2, width=8, image_size=SIDE, train=LOOP)
    train_zoomer(shards, maps, root / "zoomer", zoomer)
    evaluate(root / "zoomer", shards, EvalConfig(device="cpu"), maps=maps, out=root / "zoomer" / "evaluation.json")
    vit = VitConfig(model="zoomvit_tiny_patch16_224", model_args=BODY, image_size=SIDE, train=LOOP)
    train_vit(shards, root / "double", vit, zoomer=root / "zoomer")
    train_vit(shards, root / "half", replace(vit, model_args=BODY | {"zoom_factor": 0.5}), zoomer=root / "zoomer")
    train_vit(shards, root / "plain", replace(vit, model="deit_tiny_patch16_224"))
    for run, config in (
        ("double", EvalConfig(alphas=(0.4, 0.5, 0.6), device="cpu")),
        ("half", EvalConfig(alphas=(), budgets=(0, 1, 4), device="cpu")),
        ("plain", EvalConfig(device="cpu")),
    ):
        evaluate(root / run, shards, config, out=root / run / "evaluation.json")
    return root


@pytest.fixture(scope="module")
def page_file(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("page")
    error_kinds = [{"key": f"train_{n:07d}", "label": 0, "predicted": 0, "kind": "zoomer"} for n in range(0, COUNT, 2)]
    samples = data / "double" / "results" / "errors_samples.json"
    samples.parent.mkdir()
    write_json(samples, {"samples": error_kinds})
    yield report([data], out, replace(CONFIG, maps=data / "maps"))
    shutil.rmtree(samples.parent)


def embedded(html: str, name: str):
    return json.loads(re.search(rf'id="{name}">(.*?)</script>', html, re.S)[1])


def without_header(path):
    """An evaluation as in files of before the header."""
    found = read_json(path, "an evaluation")
    return {name: found[name] for name in ("kind", "run", "model", "seed", "shards", "maps", "rows")}


def result(**fields):
    usual = {"study": "evaluation", "run": "vit", "model": "m", "metric": "top1", "n": 100, "value": 0.5}
    return Result(**usual | fields)


# -- gathering ---------------------------------------------------------------------------------------------------------


def test_runs_of_a_folder_with_their_results(data):
    found = gather([data])
    assert [(run.name, run.kind, run.finished) for run in found.runs] == [
        ("double", "vit", True),
        ("half", "vit", True),
        ("plain", "vit", True),
        ("zoomer", "zoomer", True),
    ]
    assert found.runs[0].zooms == [{"alpha": 0.4}, {"alpha": 0.5}, {"alpha": 0.6}]
    assert found.runs[1].zooms == [{"budget": 0}, {"budget": 1}, {"budget": 4}]
    evaluation = read_json(data / "half" / "evaluation.json", "an evaluation")["rows"][2]
    rows = {row.metric: row for row in found.results if row.run == "half" and row.setting.get("budget") == 4}
    assert rows["top1"].value == evaluation["top1"] and rows["top1"].n == COUNT
    assert rows["top1"].low <= rows["top1"].value <= rows["top1"].high
    assert rows["gmacs_scores"].value == evaluation["gmacs_zoomer"] > 0
    (point,) = [p for p in points(found.results) if p.series == "half" and p.setting.get("budget") == 4]
    total = evaluation["gmacs"] + evaluation["gmacs_zoomer"]
    assert point.measures["total_gmacs"].value == pytest.approx(total)
    assert [run.name for run in gather([data / "plain", data / "plain", data]).runs][:2] == ["plain", "double"]


def test_every_field_of_an_evaluation_and_its_token_histogram(data, tmp_path):
    run = shutil.copytree(data / "double", tmp_path / "double")
    path = run / "evaluation.json"
    found = without_header(path)
    found["rows"][0] |= {
        "alpha": 0.4,
        "scores": "zoomer",
        "top5": 0.75,
        "images_per_s_low": 1.0,
        "images_per_s_high": 9e9,
    }
    found["rows"][0] |= {"seed": 7, "budget": None, "keep": None, "token_histogram": {"16": 18, "31": 6}}
    write_json(path, found)
    rows = [row for row in gather([run]).results if row.setting.get("alpha") == 0.4]
    assert {row.seed for row in rows} == {7}
    (point,) = points(rows)
    assert point.histogram == {16: 0.75, 31: 0.25} and point.series == "double"
    assert (point.measures["images_per_s"].low, point.measures["images_per_s"].high) == (1.0, 9e9)
    (figure,) = histograms([point])
    assert figure["data"][0]["x"] == [16, 31] and figure["data"][0]["y"] == [75, 25]
    assert "top-5" in tables([point], {})[0]["columns"]


def test_seeds_are_a_mean_with_its_range(tmp_path):
    rows = [
        result(study="seeds", run=f"seed-{seed}/vit", seed=seed, value=value, setting={"budget": 4}, low=0.1, high=0.9)
        for seed, value in ((0, 0.4), (1, 0.5), (2, 0.9))
    ]
    rows += [replace(row, metric="gmacs", value=1.0, low=None, high=None) for row in rows]
    (point,) = points(rows)
    top1 = point.measures["top1"]
    assert (round(top1.value, 6), top1.low, top1.high, top1.seeds) == (0.6, 0.4, 0.9, 3)
    (figure,) = curves([point], {"seeds": "Three seeds"})
    (trace,) = figure["data"]
    assert trace["error_y"]["array"] == [pytest.approx(30)] and trace["error_y"]["arrayminus"] == [pytest.approx(20)]
    (table,) = tables([point], {"seeds": "Three seeds"})
    assert table["caption"] == "Three seeds" and table["rows"][0][-1] == "3"
    # Two runs of one seed are two series.
    assert len(points([result(run="a", seed=0), result(run="b", seed=0)])) == 2
    assert len(points([result(run="a-seed0", seed=0), result(run="a-seed1", seed=0)])) == 2


@pytest.mark.parametrize(
    ("run", "base"),
    [
        ("zoomvit-seed1", "zoomvit"),
        ("seed-1/zoomvit", "zoomvit"),
        ("seeded", "seeded"),
        ("seed3", "seed3"),
        ("s1", "s1"),
    ],
)
def test_names_of_runs_without_their_seed(run, base):
    assert base_name(run) == base


def test_studies_alone_and_metrics_nobody_foresaw(tmp_path):
    rows = [
        result(study="zfe", setting={"zfe": kind, "alpha": 0.1}, metric="glow", value=3.0) for kind in ("soft", "none")
    ]
    write_study(tmp_path / "study", {"study": "zfe", "title": "Zoom factor embedding", "shards": "shards"}, rows)
    found = gather([tmp_path / "study"])
    assert found.runs == [] and found.titles == {"zfe": "Zoom factor embedding"}
    (table,) = describe(found)["tables"]["accuracy"]
    assert table["columns"] == ["run", "setting", "glow", "n"]
    assert table["rows"][0] == ["vit, zfe soft", "alpha 0.1", "3", "100"]
    html = report([tmp_path / "study"], tmp_path / "out", CONFIG).read_text()
    assert "zpipe evaluate RUN" in embedded(html, "about-data")["notes"][0]


@pytest.mark.parametrize("evaluated", [True, False])
def test_studies_stand_back_behind_evaluations(evaluated):
    rows = [result(study="pruning", value=0.1), result(study="pruning", metric="gmacs", value=1.0)]
    if evaluated:
        rows += [result(study=EVALUATION, value=0.9), result(study=EVALUATION, metric="gmacs", value=1.0)]
    (figure,) = curves(points(rows), {})
    shown = {trace.get("legendgroup"): trace.get("visible", True) for trace in figure["data"]}
    assert shown == ({None: True, "pruning": "legendonly"} if evaluated else {"pruning": True})
    assert ("by a click" in figure["note"]) == evaluated


def test_results_that_are_there_twice_are_shown_once(data, tmp_path):
    run = shutil.copytree(data / "double", tmp_path / "double")
    rows = [row for row in gather([run]).results if row.metric == "top1"]
    tidy = [replace(row, value=0.25, setting=row.setting | {"scores": "zoomer", "keep": None}) for row in rows]
    write_study(run, {"study": "evaluation", "title": "Evaluation", "shards": "shards"}, tidy)
    found = points(gather([run]).results)
    assert [point.setting for point in found] == [{"alpha": 0.4}, {"alpha": 0.5}, {"alpha": 0.6}]
    assert all(point.measures["top1"].value == 0.25 and "gmacs" in point.measures for point in found)


def test_other_weights_and_precisions_are_settings_of_their_own(data, tmp_path):
    run = shutil.copytree(data / "half", tmp_path / "half")
    final = without_header(run / "evaluation.json")
    rows = [row | {"top1": 0.25} for row in final["rows"]]
    write_json(run / "evaluation-best.json", final | {"weights": "best", "rows": rows})
    write_json(run / "evaluation-bf16.json", final | {"rows": [row | {"precision": "bf16"} for row in rows]})
    write_json(run / "evaluation-other-labels.json", final | {"rows": rows})
    found = [p for p in points(gather([run]).results) if p.setting.get("budget") == 4]
    best = {"half": final["rows"][2]["top1"]}
    others = ("weights best", "precision bf16", "evaluation-other-labels")
    assert {p.series: p.measures["top1"].value for p in found} == best | {f"half, {other}": 0.25 for other in others}


def test_results_follow_a_run_that_was_renamed(data, tmp_path):
    run = shutil.copytree(data / "double", tmp_path / "other")
    about = {"study": "s", "title": "S", "run": str(data / "double"), "shards": "shards"}
    write_study(run, about, [result(study="s", run="double"), result(study="s", run="double/studies/s/a-seed-0")])
    found = gather([run]).results
    assert {row.run for row in found if row.study == "s"} == {"other", "double/studies/s/a-seed-0"}
    assert {row.run for row in found if row.study != "s"} == {"other"} and len(found) > 10


def test_files_of_other_content_in_a_run_are_left_alone(data, tmp_path):
    run = shutil.copytree(data / "double", tmp_path / "double")
    (run / "predictions.json").write_text("[]")
    (run / "notes.json").write_text("{}")
    write_results(run / "evaluation-like.json", "calibration", {"run": "double"}, [], [result(study="calibration")])
    assert gather([run]).results == gather([data / "double"]).results
    (run / "broken.json").write_text("{")
    with pytest.raises(ZpipeError, match="broken.json: not readable as JSON"):
        gather([run])


def test_equal_names_in_two_folders_stay_apart(tmp_path):
    for name, value in (("a", 0.1), ("b", 0.2)):
        about = {"study": "study", "title": "Study", "shards": "shards"}
        write_study(tmp_path / name, about, [result(study="study", value=value)])
    found = points(gather([tmp_path / "a", tmp_path / "b"]).results)
    assert [(point.series, point.measures["top1"].value) for point in found] == [("vit", 0.1), ("vit, b", 0.2)]


def test_the_headline_compares_at_no_higher_cost(data):
    rows = []
    for run, setting, top1, gmacs in (
        ("zoom", {"budget": 1}, 0.7, 0.8),
        ("zoom", {"budget": 9}, 0.9, 1.2),
        ("zoom", {"budget": 9, "scores": "maps"}, 1.0, 0.1),
        ("plain", {}, 0.6, 1.0),
    ):
        about = {"run": run, "setting": setting}
        rows += [result(**about, value=top1, low=top1 - 0.01, high=top1 + 0.01)]
        rows += [result(**about, metric="gmacs", value=gmacs)]
    found = headline(points(rows))
    assert [(tile["name"], tile["value"]) for tile in found["tiles"]] == [("zoom", "90.0 %"), ("plain", "60.0 %")]
    (sentence,) = found["comparisons"]
    assert "zoom at budget 1 is 10.0 points more accurate than plain" in sentence and "0.80 of its" in sentence


def seeded(run, gmacs, values, *, budget=None):
    """Results of top-1 and multiply-adds, of one run per value, each with a 95 % interval."""
    setting = {} if budget is None else {"budget": budget}
    rows = []
    for seed, value in enumerate(values):
        about = {"run": f"seed-{seed}/{run}" if len(values) > 1 else run, "seed": seed, "setting": setting}
        rows += [result(**about, value=value, low=value - 0.05, high=value + 0.05)]
        rows += [result(**about, metric="gmacs", value=gmacs)]
    return rows


@pytest.mark.parametrize(
    ("zoom", "plain", "tile", "ending"),
    [
        ((0.90, 0.92, 0.94), (0.80, 0.93), "range of 3 seeds: 90.0 to 94.0", "; the ranges of their seeds overlap."),
        ((0.92,), (0.90,), "95 % interval: 87.0 to 97.0", "included; the intervals overlap."),
        ((0.92,), (0.80, 0.89), "95 % interval: 87.0 to 97.0",
         "; the 95 % interval of the one and the range of 2 seeds of the other overlap."),
        ((0.90, 0.94), (0.88,), "range of 2 seeds: 90.0 to 94.0",
         "; the range of 2 seeds of the one and the 95 % interval of the other overlap."),
        ((0.90, 0.94), (0.70, 0.89), "range of 2 seeds: 90.0 to 94.0", "the source of the scores included."),
    ],
)  # fmt: skip
def test_a_range_over_seeds_is_not_called_an_interval(zoom, plain, tile, ending):
    found = headline(points(seeded("zoom", 0.5, zoom, budget=4) + seeded("plain", 1.0, plain)))
    assert found["tiles"][0]["interval"] == tile
    (line,) = found["comparisons"]
    assert line.endswith(ending)


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("run.json", "{", "run.json: not readable as"),
        ("run.json", "{}", "run.json: is None version None, expected 'zpipe-run' version 1"),
        ("run.json", '{"format": "zpipe-run", "version": 1}', "run.json: not the settings of a run"),
        ("evaluation.json", '{"rows": 3}', "evaluation.json: not an evaluation"),
        ("evaluation.json", '{"rows": [{"setting": "alpha=x", "count": 3}]}', "evaluation.json: not an evaluation"),
        ("metrics.jsonl", '{"step": 1}\n{"st', "metrics.jsonl: line 2 is not a line of metrics"),
        ("results/study.json", "{}", "study.json: is None version None"),
        ("results/errors_samples.json", '{"samples": [1]}', "errors_samples.json: not an error analysis"),
    ],
)
def test_broken_files_are_named(data, tmp_path, file, text, message):
    run = shutil.copytree(data / "double", tmp_path / "double")
    (run / file).parent.mkdir(exist_ok=True)
    (run / file).write_text(text)
    with pytest.raises(ZpipeError, match=re.escape(message)) as error:
        report([run], tmp_path / "out", replace(CONFIG, gallery=0))
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


def test_wrong_use(data, tmp_path, cli):
    with pytest.raises(UsageError, match="holds no training run and no results"):
        gather([data / "shards"])
    with pytest.raises(UsageError, match="no such folder"):
        gather([tmp_path / "nothing"])
    done = cli("report", data / "plain", "--shards", tmp_path / "nothing", "--out", tmp_path / "out")
    assert done.code == 2 and "no such folder" in done.error
    done = cli("report", data / "plain", "--gallery", 3, "--device", "cpu", "--out", tmp_path / "out")
    assert done.code == 0 and (tmp_path / "out" / "index.html").is_file() and "MB" in done.stdout


def test_a_run_that_was_never_evaluated_has_its_curves(data, tmp_path):
    run = shutil.copytree(data / "half", tmp_path / "half")
    (run / "evaluation.json").unlink()
    (run / "config.json").unlink()
    about = embedded(report([run], tmp_path / "out", CONFIG).read_text(), "about-data")
    assert [figure["id"] for figure in about["figures"]["training"]] == [
        "train-loss",
        "train-accuracy",
        "train-lr",
        "train-speed",
    ]
    assert about["figures"]["accuracy"] == [] and any("zpipe evaluate" in note for note in about["notes"])


# -- the gallery's data ------------------------------------------------------------------------------------------------


def test_entries_are_what_the_models_say(data, page_file):
    found = embedded(page_file.read_text(), "gallery-data")
    assert [model["name"] for model in found["models"]] == ["double", "half", "plain"]
    assert [model["zoom"] and model["zoom"]["chosen"] for model in found["models"]] == [
        {"alpha": 0.5},
        {"budget": 1},
        None,
    ]
    assert [model["zoom"] and model["zoom"]["scores"] for model in found["models"]] == [
        0,
        0,
        None,
    ]  # both have the same zoomer
    opened = load_run(data / "half")
    batch = next(
        iter(RelevanceLoader(data / "shards", data / "maps", batch_size=COUNT, image_size=SIDE, augment="eval"))
    )
    places = {key: n for n, key in enumerate(batch["key"])}
    table = store_table(data)
    with torch.inference_mode():
        images = opened.preprocessing.normalise(batch["image"])
        scores = opened.zoomer(images)
        probabilities = opened.model(images, scores, budget=1).softmax(1)
    assert len(found["entries"]) == len({entry["key"] for entry in found["entries"]}) == 20
    for entry in found["entries"]:
        place = places[entry["key"]]
        assert entry["label"] == int(batch["label"][place])
        exact = torch.frombuffer(bytearray(base64.b64decode(entry["scores"][0])), dtype=torch.float32)
        assert len(exact) == GRID**2 and torch.allclose(exact, scores[place], atol=1e-6)
        # By probability and not by rank: in a batch of another size, two nearly equal classes may swap.
        best = probabilities[place].topk(5).values.tolist()
        assert [share for _, share in entry["top"][1]] == pytest.approx(best, abs=1e-4)
        indices = [index for index, _ in entry["top"][1]]
        assert len(set(indices)) == 5 and probabilities[place][indices].tolist() == pytest.approx(best, abs=2e-4)
        grey = torch.frombuffer(bytearray(base64.b64decode(entry["views"][0]["map"])), dtype=torch.uint8) / 255
        assert torch.allclose(grey, batch["relevance"][place].flatten(), atol=1 / 255)
        assert entry["views"][0]["box"] == pytest.approx(batch["object_box"][place].tolist(), abs=1e-4)
        assert entry["ease"] == pytest.approx(table[entry["key"]], abs=1e-4)
    assert "teacher" in found["difficulty"]


def store_table(data):
    import zpipe

    table = zpipe.open_maps(data / "maps").table(["key", "target_probability"])
    return dict(zip(table["key"].to_pylist(), table["target_probability"].to_pylist(), strict=True))


def test_samples_are_drawn_from_all_shards_or_from_few(data):
    def keys(count, shards, seed=0):
        loader = RelevanceLoader(data / "shards", None, batch_size=4, image_size=SIDE, augment="eval")
        read = loader.draw(count, shards=shards, seed=seed)
        return read, [key for batch in loader for key in batch["key"]]

    everything = keys(COUNT, 4)[1]
    assert everything == keys(10 * COUNT, 1)[1] and len(everything) == COUNT
    read, drawn = keys(12, 4)
    assert read > 2 and len(set(drawn)) == 12 and [key for key in everything if key in drawn] == drawn
    assert drawn == keys(12, 4)[1] != keys(12, 4, seed=1)[1]
    assert keys(5, 1)[0] == 1 and keys(12, 1)[0] == 2  # a shard holds six
    with pytest.raises(UsageError, match="training takes all"):
        RelevanceLoader(data / "shards", None, batch_size=4, image_size=SIDE).draw(3, shards=1)


def test_without_maps_and_with_a_model_that_needs_them(data, tmp_path):
    config = VitConfig(model="zoomvit_tiny_patch16_224", model_args=BODY, image_size=SIDE, train=LOOP)
    train_vit(data / "shards", tmp_path / "mapped", config, maps=data / "maps")
    chosen = replace(CONFIG, shards=data / "shards", gallery=4)
    html = report([tmp_path / "mapped", data / "plain"], tmp_path / "out", chosen).read_text()
    found = embedded(html, "gallery-data")
    assert [model["name"] for model in found["models"]] == ["plain"]
    assert found["map_grid"] is None and "plain gives to the true class" in found["difficulty"]
    html = report([tmp_path / "mapped"], tmp_path / "out", replace(chosen, maps=data / "maps")).read_text()
    assert embedded(html, "gallery-data")["models"][0]["zoom"]["source"] == "maps"
    html = report([tmp_path / "mapped"], tmp_path / "out", chosen).read_text()
    assert embedded(html, "gallery-data") is None
    assert any("give --maps" in note for note in embedded(html, "about-data")["notes"])


def test_runs_of_another_data_set_are_left_out_with_a_note(data, tmp_path):
    """With as many classes as the gallery's labels, more and fewer; fewer would fail the whole report."""
    for name, classes in (("as-many", 10), ("more", 12), ("fewer", 2)):
        other = shutil.copytree(data / "shards", tmp_path / f"{name}-shards")
        index = read_json(other / INDEX_NAME, "a shard index")
        index["classes"] = [f"{name} {n}" for n in range(classes)]
        write_json(other / INDEX_NAME, index)
        run = shutil.copytree(data / "plain", tmp_path / name)
        record = read_json(run / "run.json", "a run")
        record["settings"]["classes"] = index["classes"]
        write_json(run / "run.json", record)
    few = VitConfig(model="deit_tiny_patch16_224", model_args=BODY, image_size=SIDE, num_classes=2)
    save_model(
        tmp_path / "fewer",
        build_vit(few.model, 2, few.image_size, few.model_args),
        load_run(data / "plain").preprocessing,
    )
    runs = [data / "plain", *(tmp_path / name for name in ("as-many", "more", "fewer"))]
    html = report(runs, tmp_path / "out", replace(CONFIG, gallery=4)).read_text()
    assert [model["name"] for model in embedded(html, "gallery-data")["models"]] == ["plain"]
    notes = embedded(html, "about-data")["notes"]
    for name, classes in (("as-many", 10), ("more", 12), ("fewer", 2)):
        (note,) = [note for note in notes if note.startswith(f"{name}: ")]
        assert f"its {classes} classes are not the 10 of {data / 'shards'}; report it separately" in note
    # The same run is shown in a gallery of its own data.
    chosen = replace(CONFIG, gallery=4, shards=tmp_path / "more-shards")
    html = report([tmp_path / "more", data / "plain"], tmp_path / "out", chosen).read_text()
    assert [model["name"] for model in embedded(html, "gallery-data")["models"]] == ["more"]


# -- one safe file -----------------------------------------------------------------------------------------------------


class _Reader(HTMLParser):
    """Collects the attributes of all elements and the text of the scripts."""

    def __init__(self):
        super().__init__()
        self.elements, self.scripts, self._script = [], [], None

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self._script = dict(attrs) if tag == "script" else None

    def handle_data(self, text):
        if self._script is not None and self._script.get("type") is None:
            self.scripts.append(text)

    def handle_endtag(self, tag):
        self._script = None


def test_the_page_reaches_for_nothing_and_runs_only_its_own_scripts(page_file):
    html = page_file.read_text()
    reader = _Reader()
    reader.feed(html)
    for tag, attributes in reader.elements:
        for name in ("src", "href", "action", "data", "srcset"):
            assert re.match(r"#|data:,$", attributes.get(name, "#")), (tag, attributes)
    (policy,) = [found["content"] for tag, found in reader.elements if found.get("http-equiv")]
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "http" not in policy and "unsafe-eval" not in policy and "connect-src" not in policy
    digests = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in reader.scripts]
    assert len(digests) == 2 and all(f"'sha256-{digest}'" in policy for digest in digests)
    ours = render({}, None).replace(reader.scripts[0], "")
    assert not re.search(r"https?://|innerHTML|outerHTML|insertAdjacent|document\.write|eval\(", ours)
    assert HOSTILE not in html and "<img src=x" not in html


def test_the_page_is_made_where_the_locale_knows_only_ascii():
    """Its files contain arrows and Greek letters, and Python's default encoding is that of the locale."""
    command = "from zpipe.train.report.page import render; print(ascii(render({}, None)))"
    settings = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run([sys.executable, "-c", command], env=settings, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-500:]
    assert done.stdout.strip() == ascii(render({}, None))


def test_embedded_json_ends_no_script():
    text = embedded_json({HOSTILE: "<!--<script>\u2028\ud800"})
    assert "<" not in text and json.loads(text) == {HOSTILE: "<!--<script>\u2028\ud800"}
    text.encode("ascii")


def test_the_same_inputs_give_the_same_bytes(data, page_file, tmp_path):
    again = report([data], tmp_path, replace(CONFIG, maps=data / "maps"))
    assert again.read_bytes() == page_file.read_bytes()


def test_figures_are_what_plotly_takes(page_file):
    about = embedded(page_file.read_text(), "about-data")
    drawn = [figure for part in about["figures"].values() for figure in part]
    assert len(drawn) >= 7
    for figure in drawn:
        traces = [{k: v for k, v in trace.items() if k not in ("series", "dashed")} for trace in figure["data"]]
        plotly.graph_objects.Figure(data=traces, layout=figure["layout"])
        tables_there = {table["id"] for part in about["tables"].values() for table in part}
        assert figure["table"] in tables_there  # the text alternative


# -- in a browser ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser():
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        pytest.skip("no Chromium on this machine (apt-get install chromium)")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        # Chromium's sandbox does not run as root, as in containers; the page is our own.
        running = driver.chromium.launch(executable_path=found, args=["--no-sandbox", "--disable-dev-shm-usage"])
        yield running
        running.close()


@pytest.fixture
def open_page(browser):
    """Open a file; the test fails on console errors, exceptions, and requests to anything but the file."""
    troubles, contexts = [], []

    def run(path, **options):
        context = browser.new_context(**{"viewport": {"width": 1300, "height": 900}} | options)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda line: troubles.append(line.text) if line.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: troubles.append(str(error)))
        page.on(
            "request",
            lambda request: None if request.url.startswith(("file:", "data:")) else troubles.append(request.url),
        )
        page.goto(path.as_uri())
        page.wait_for_selector("html[data-ready]", timeout=20_000)
        return page

    yield run
    for context in contexts:
        context.close()
    assert troubles == []


def status(page) -> int:
    return int(page.locator(".status").inner_text().split()[0])


BOXES_SHOWN = "at => zpipe.gallery.shownPatches(document.querySelector(`#gallery .entry[data-at='${at}']`))"


@pytest.mark.parametrize("model", ["double", "half"])
def test_the_slider_cuts_patches_as_zoom_tokens_does(data, page_file, open_page, model):
    found = embedded(page_file.read_text(), "gallery-data")
    number = [each["name"] for each in found["models"]].index(model)
    zoom = found["models"][number]["zoom"]
    page = open_page(page_file)
    page.select_option("#patch-model", str(number))

    def expected(entry, alpha, budget):
        scores = torch.frombuffer(bytearray(base64.b64decode(entry["scores"][zoom["scores"]])), dtype=torch.float32)[
            None
        ]
        zoomed = zoom_tokens.choose_cells(scores, 1, GRID, alpha, budget, zoom["factor"])
        cells = zoom_tokens.coarse_scores(scores, zoom["factor"])
        order = zoom_tokens.order_tokens(cells, zoom_tokens.fine_scores(scores, zoom["factor"]), zoomed)
        return zoom_tokens.token_boxes(order.ids[0, : order.counts[0]], zoom["side"], SIDE).tolist()

    slider, box = page.locator("#gallery input[type=range]"), page.locator("#gallery input[type=number]")
    scores = torch.frombuffer(bytearray(base64.b64decode(found["entries"][0]["scores"][0])), dtype=torch.float32)
    page.check("#gallery input[value=alpha]")
    counts = set()
    for value in (0, 1, 0.4, float(scores.median()), float(scores.max()), "slider 940", "slider 960", "slider 980"):
        if isinstance(value, str):
            slider.fill(value.removeprefix("slider "))
            value = float(box.input_value())
        else:
            box.fill(repr(value))
        page.wait_for_timeout(40)
        for at in (0, 1):
            shown = page.evaluate(BOXES_SHOWN, at)
            assert shown["boxes"] == expected(found["entries"][at], value, None), (value, at)
            assert shown["tokens"] == len(shown["boxes"])
            counts.add(shown["tokens"])
    assert len(counts) > 2
    page.check("#gallery input[value=budget]")
    for budget in range(0, zoom["side"] ** 2 + 1, max(1, zoom["side"] // 2)):
        slider.fill(str(budget))
        page.wait_for_timeout(40)
        shown = page.evaluate(BOXES_SHOWN, 0)
        assert shown["boxes"] == expected(found["entries"][0], None, budget)
    assert page.locator(".entry figcaption").last.inner_text() == f"patches: {4 * zoom['side'] ** 2} tokens"


def test_the_rules_of_patches_on_ties_and_thresholds(page_file, open_page):
    """Scores that equal each other or the threshold, in float32, at both zoom factors."""
    page = open_page(page_file)
    generator = torch.Generator().manual_seed(0)
    levels = torch.tensor([0.0, 0.1, 0.2, 0.3, 1.0])
    for factor, side in ((2.0, 6), (0.5, 6)):
        scores = levels[torch.randint(0, 5, (12, side * side), generator=generator)]
        cells = zoom_tokens.coarse_scores(scores, factor)
        for zoom in ({"alpha": 0.1}, {"alpha": 0.2}, {"alpha": 0.3}, {"alpha": 0.0}, {"budget": 4}, {"budget": 0}):
            zoomed = zoom_tokens.choose_cells(scores, 12, side, zoom.get("alpha"), zoom.get("budget"), factor)
            order = zoom_tokens.order_tokens(cells, zoom_tokens.fine_scores(scores, factor), zoomed)
            call = "([rows, factor, zoom]) => rows.map(r => zpipe.patches.tokenIds(Float32Array.from(r), factor, zoom))"
            found = page.evaluate(call, [scores.tolist(), factor, zoom])
            assert found == [ids[:count].tolist() for ids, count in zip(order.ids, order.counts, strict=True)]


def test_filters_filter_and_two_models_answer(data, page_file, open_page):
    found = embedded(page_file.read_text(), "gallery-data")
    entries = found["entries"]
    page = open_page(page_file)
    assert status(page) == 20
    first = page.locator(".entry").first
    assert first.locator(".answer").count() == 2
    names = [found["classes"][label] or str(label) for label, _ in entries[0]["top"][0]]
    assert [
        text.replace(" (true class)", "")
        for text in first.locator(".answer").first.locator(".class").all_text_contents()
    ] == names
    page.select_option("#left-model", "2")
    page.select_option("#right-model", "1")
    assert [text.split()[0] for text in first.locator("h4").all_inner_texts()] == ["plain", "half"]
    right = [entry["top"][2][0][0] == entry["label"] for entry in entries]
    page.select_option("#filter-outcome", "left-right")
    assert status(page) == sum(right)
    page.select_option("#filter-outcome", "left-wrong")
    assert status(page) == 20 - sum(right)
    both = [right[n] and entry["top"][1][0][0] == entry["label"] for n, entry in enumerate(entries)]
    page.select_option("#filter-outcome", "both")
    assert status(page) == sum(both)
    page.click("#reset")
    assert status(page) == 20
    label = entries[0]["label"]
    page.select_option("#filter-class", str(label))
    assert status(page) == sum(entry["label"] == label for entry in entries)
    page.click("#reset")
    page.select_option("#filter-ease", "hard")
    hard = sum(entry["ease"] < 0.5 for entry in entries)
    assert status(page) == hard
    page.click("#reset")
    page.select_option("#left-model", "0")
    page.select_option("#filter-kind", "zoomer")
    assert status(page) == sum("0" in entry.get("kinds", {}) for entry in entries) > 0
    heads = page.locator(".answer h4").all_inner_texts()
    assert heads and not [head for head in heads if "right" in head and "(zoomer)" in head]
    page.click("#reset")
    page.select_option("#filter-order", "hard")
    hardest = min(entries, key=lambda entry: entry["ease"])["key"]
    assert page.locator(".entry .key").first.inner_text() == hardest


def test_the_panel_of_the_scores_says_what_they_know(data, open_page, tmp_path):
    captions = {
        "zoomer": "The Zoomer's map, from the image alone.",
        "maps": "The teacher's maps as scores, made with knowledge of the true class.",
        "attention": "The model's own class attention with nothing zoomed, from the image alone.",
        "entropy": "The entropy of the grey values, from the image alone.",
        "centre": "A Gaussian around the centre, the same for every image.",
        "random": "Random scores, which know nothing of the image.",
    }
    assert captions.keys() | {"own", "none"} == SOURCES.keys()
    for source in captions:
        run = shutil.copytree(data / "double", tmp_path / source)
        record = read_json(run / "run.json", "a run")
        record["settings"]["scores"] = source
        write_json(run / "run.json", record)
    runs = [tmp_path / source for source in captions]
    page = open_page(report(runs, tmp_path / "out", replace(CONFIG, gallery=2, maps=data / "maps")))
    for source, words in captions.items():
        page.select_option("#patch-model", label=source)
        _, teacher, scores, _ = page.locator(".entry[data-at='0'] canvas").all()
        assert scores.get_attribute("aria-label") == words
        assert teacher.get_attribute("aria-label") == "The teacher's map, made with knowledge of the true class."


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("predicted", "made for the class that the teacher predicts"),
        ("class:3", "made for class 3"),
        ("none", "made for no class in particular"),
    ],
)
def test_maps_that_do_not_know_the_true_class_are_not_said_to(data, tmp_path, target, words):
    maps = shutil.copytree(data / "maps", tmp_path / "maps")
    manifest = read_manifest(maps)
    write_manifest(maps, replace(manifest, provenance=replace(manifest.provenance, target=target)))
    html = report([data / "plain"], tmp_path / "out", replace(CONFIG, gallery=2, maps=maps)).read_text()
    assert embedded(html, "gallery-data")["map_caption"] == f"The teacher's map, {words}."


def test_the_gallery_says_at_which_settings_the_models_answer(data, page_file, open_page, tmp_path):
    about = open_page(page_file).locator("#gallery-about").inner_text()
    assert "at the middle setting of the evaluation: double (alpha 0.5), half (budget 1)." in about
    assert "default zoom" not in about and "own settings" not in about
    merging = VitConfig(
        model="tome_vit",
        model_args={"backbone": "deit_tiny_patch16_224", "backbone_args": BODY, "r": 2},
        image_size=SIDE,
        train=replace(LOOP, batch_size=COUNT),
    )
    train_vit(data / "shards", tmp_path / "merging", merging)
    fresh = shutil.copytree(data / "double", tmp_path / "fresh")
    for run in (fresh, shutil.copytree(data / "plain", tmp_path / "plain")):
        (run / "evaluation.json").unlink()
    runs = [fresh, tmp_path / "merging", tmp_path / "plain"]
    about = open_page(report(runs, tmp_path / "out", replace(CONFIG, gallery=4, shards=data / "shards")))
    about = about.locator("#gallery-about").inner_text()
    assert "at a default zoom, as none was evaluated: fresh (alpha 0.1)." in about
    assert "with the model's own settings, as none were evaluated: merging." in about
    assert "middle setting" not in about


def test_the_gallery_shows_rivals_at_the_settings_that_were_evaluated(data, tmp_path):
    config = VitConfig(
        model="cfvit_small",
        model_args={"patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 3},
        image_size=SIDE,
        train=replace(LOOP, batch_size=COUNT),
    )
    train_vit(data / "shards", tmp_path / "stages", config)
    evaluation = EvalConfig(exits=(0.0, 1.0), batch_size=COUNT, device="cpu")
    for threshold in (0.0, 1.0):
        only = replace(evaluation, exits=(threshold,))
        evaluate(tmp_path / "stages", data / "shards", only, out=tmp_path / "stages" / "evaluation.json")
        html = report([tmp_path / "stages"], tmp_path / "out", replace(CONFIG, gallery=4, shards=data / "shards"))
        gallery = embedded(html.read_text(), "gallery-data")
        assert gallery["settings"] == [f"Shown at the middle setting of the evaluation: stages (exit {threshold})."]
        classifier = Classifier(
            load_run(tmp_path / "stages"), PredictConfig(settings={"exit": threshold}, device="cpu")
        )
        loader = RelevanceLoader(data / "shards", batch_size=COUNT, image_size=SIDE, augment="eval")
        answers = {}
        for batch in loader:
            answers |= dict(zip(batch["key"], classifier(batch["image"]).softmax(1), strict=True))
        for entry in gallery["entries"]:
            shown = torch.zeros(len(gallery["classes"]))
            for index, probability in entry["top"][0]:
                shown[index] = probability
            expected = answers[entry["key"]].topk(5)
            torch.testing.assert_close(shown[expected.indices], expected.values, atol=1e-3, rtol=0)


def wait_until(page, expression):
    """Wait until an expression is true. Playwright's own function uses eval, which the policy of the page forbids."""
    for _ in range(500):
        if page.evaluate(expression):
            return
        page.wait_for_timeout(20)
    pytest.fail(f"never came true: {expression}")


def test_by_keyboard_alone(page_file, open_page):
    page = open_page(page_file)
    page.locator("#reset").focus()
    page.keyboard.press("Tab")
    at = "document.activeElement.dataset.at"
    assert page.evaluate(at) == "0"
    for key, expected in (
        ("ArrowDown", "1"),
        ("ArrowRight", "2"),
        ("ArrowUp", "1"),
        ("End", "19"),
        ("Home", "0"),
        ("ArrowUp", "0"),
    ):
        page.keyboard.press(key)
        assert page.evaluate(at) == expected, key
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    dialog = page.locator("#enlarged")
    assert dialog.is_visible() and dialog.locator("canvas").count() == 4
    key = dialog.locator(".key").inner_text()
    page.keyboard.press("ArrowRight")
    assert dialog.locator(".key").inner_text() != key and "3 of 20" in dialog.locator(".key").inner_text()
    page.keyboard.press("Escape")
    assert dialog.is_hidden()
    wait_until(page, f"{at} === '2'")  # the close event of a dialog comes a moment later
    unnamed = """() => [
        ...document.querySelectorAll("canvas, select, input, button, article, dialog, [role=img]")].filter(
        (node) => !(node.getAttribute("aria-label") || node.getAttribute("aria-labelledby") || node.labels?.length
        || node.textContent.trim())).map((node) => node.outerHTML)"""
    assert page.evaluate(unnamed) == []
    assert page.locator("table").count() == page.locator("table caption").count() > 2


def test_a_plot_hides_no_button_and_points_to_its_table(page_file, open_page):
    page = open_page(page_file)
    plot = page.locator("#figure-gmacs .plot")
    plot.locator("svg").first.wait_for()
    focusable = "node => [...node.querySelectorAll('*')].filter((one) => one.tabIndex >= 0).length"
    assert plot.evaluate(focusable) > 0
    assert page.locator("[role=img] *").count() == 0
    assert plot.get_attribute("role") == "group" and "Accuracy and multiply-adds" in plot.get_attribute("aria-label")
    captions = {}
    for plot in page.locator(".plot").all():
        name = plot.evaluate("node => node.closest('figure').id")
        captions[name] = page.locator("#" + plot.get_attribute("aria-details")).locator("caption").inner_text()
    assert captions["figure-gmacs"].startswith("Evaluation")
    assert captions["figure-train-lr"].startswith("Training")


def test_tables_are_sorted_by_their_headers(data, open_page, tmp_path):
    about = describe(gather([data]))
    rows = [
        ["b", "alpha 0.1", "9.5 % (3.0 to 99.0)", "1,200", "1e-05", ""],
        ["run-10", "alpha 0.05", "80.0 % (70.1 to 88.2)", "900", "0.001", "yes"],
        ["run-2", "budget 9", "9.5 % (2.0 to 12.0)", "", "-3", "no"],
        ["a", "budget 12", "100.0 %", "1,000,000", "2", ""],
    ]
    columns = ["run", "setting", "top-1", "images/s", "lr", "finished"]
    made = {"id": "made", "caption": "Made", "note": "", "columns": columns, "rows": rows}
    about["tables"]["accuracy"] = [made, made | {"id": "other", "caption": "Other"}]
    (tmp_path / "index.html").write_text(render(about, None))
    page = open_page(tmp_path / "index.html")
    first, other = page.locator("#accuracy table").all()
    runs = first.locator("tbody th")
    assert runs.all_inner_texts() == ["b", "run-10", "run-2", "a"] and first.locator("[aria-sort]").count() == 0
    for column, key, direction, expected in (
        ("run", "Enter", "ascending", ["a", "b", "run-2", "run-10"]),
        ("run", "Space", "descending", ["run-10", "run-2", "b", "a"]),
        ("top-1", "Enter", "ascending", ["run-2", "b", "run-10", "a"]),  # equal rows keep their order
        ("top-1", "Enter", "descending", ["a", "run-10", "run-2", "b"]),
        ("images/s", "Enter", "ascending", ["run-10", "b", "a", "run-2"]),
        ("images/s", "Enter", "descending", ["a", "b", "run-10", "run-2"]),  # empty cells come last
        ("lr", "Space", "ascending", ["run-2", "b", "run-10", "a"]),
        ("setting", "Enter", "ascending", ["run-10", "b", "run-2", "a"]),
        ("finished", "Enter", "ascending", ["run-2", "run-10", "b", "a"]),
    ):
        head = first.locator("thead th").nth(columns.index(column))
        head.get_by_role("button", name=column, exact=True).focus()
        page.keyboard.press(key)
        assert runs.all_inner_texts() == expected, (column, direction)
        assert head.get_attribute("aria-sort") == direction and first.locator("[aria-sort]").count() == 1
        assert page.evaluate("document.activeElement.textContent") == column
    values = [row.locator("td").all_inner_texts() for row in first.locator("tbody tr").all()]
    assert values == [{row[0]: row[1:] for row in rows}[run] for run in expected]
    assert other.locator("tbody th").all_inner_texts() == ["b", "run-10", "run-2", "a"]
    assert other.locator("[aria-sort]").count() == 0


def test_focus_stays_at_the_ends_of_the_enlarged_view(page_file, open_page):
    page = open_page(page_file)
    page.locator(".entry[data-at='0']").focus()
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    focused, shown = "document.activeElement.id", page.locator("#enlarged .key")
    ends = (("before", "ArrowRight", "1 of 20", "2 of 20"), ("after", "ArrowLeft", "20 of 20", "19 of 20"))
    for button, back, last, beside in ends:
        page.locator(f"#{button}").focus()
        while last not in (before := shown.inner_text()):
            page.keyboard.press("Enter")
            assert shown.inner_text() != before
        assert page.evaluate(focused) == button
        assert page.locator(f"#{button}").get_attribute("aria-disabled") == "true"
        page.keyboard.press("Enter")  # a disabled button does nothing
        assert last in shown.inner_text() and page.evaluate(focused) == button
        page.keyboard.press(back)
        assert beside in shown.inner_text() and page.locator("#enlarged [aria-disabled='true']").count() == 0


def test_focus_stays_when_the_window_changes(page_file, open_page):
    page = open_page(page_file)
    height = "document.querySelector('.entries').offsetHeight"
    page.locator(".entry[data-at='0']").focus()
    page.keyboard.press("ArrowDown")
    for width in (900, 1300):
        before = page.evaluate(height)
        page.set_viewport_size({"width": width, "height": 900})
        wait_until(page, f"{height} !== {before}")
        assert page.evaluate("document.activeElement.dataset.at") == "1"
    page.keyboard.press("ArrowDown")
    assert page.evaluate("document.activeElement.dataset.at") == "2"
    # Focus outside of the list stays.
    page.locator("#reset").focus()
    before = page.evaluate(height)
    page.set_viewport_size({"width": 900, "height": 900})
    wait_until(page, f"{height} !== {before}")
    assert page.evaluate("document.activeElement.id") == "reset"


def test_hostile_names_stay_names(data, page_file, open_page):
    page = open_page(page_file)
    assert page.title() == "zpipe report" and page.locator("img[src='x']").count() == 0
    assert HOSTILE in page.locator("#filter-class option").all_text_contents()
    assert page.locator("a[href^='http']").count() == 0


def test_names_in_plots_are_text(data, open_page, tmp_path):
    about = describe(gather([data]))
    for figure in about["figures"]["accuracy"]:
        assert figure["data"]
    rows = [result(run=HOSTILE, value=0.5), result(run=HOSTILE, metric="gmacs", value=1.0)]
    about["figures"]["accuracy"] = curves(points(rows), {})
    (tmp_path / "index.html").write_text(render(about, None))
    page = open_page(tmp_path / "index.html")
    page.wait_for_selector(".legendtext")
    assert page.locator(".legendtext").first.text_content().startswith("</script><img")
    assert page.locator("svg a").count() == 0 and page.title() == "zpipe report"


def test_text_stands_out_from_its_ground_and_a_narrow_screen_is_enough(page_file, open_page):
    """WCAG AA: a contrast of 4.5 to 1 for every pair of text and background."""
    page = open_page(page_file)
    read = "name => getComputedStyle(document.documentElement).getPropertyValue(name).trim()"

    def luminance(name):
        colour = page.evaluate(read, name)
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        for ink in ("--text", "--quiet", "--link", "--good", "--bad"):
            for ground in ("--back", "--card"):
                high, low = sorted((luminance(ink), luminance(ground)), reverse=True)
                assert (high + 0.05) / (low + 0.05) >= 4.5, (scheme, ink, ground)
    page.set_viewport_size({"width": 390, "height": 800})
    page.wait_for_timeout(300)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390


def test_two_thousand_entries(page_file, open_page, tmp_path):
    html = page_file.read_text()
    gallery = embedded(html, "gallery-data")
    some = gallery["entries"]
    gallery["entries"] = [some[n % len(some)] | {"key": f"copy {n}"} for n in range(2000)]
    (tmp_path / "index.html").write_text(render(embedded(html, "about-data"), gallery))
    page = open_page(tmp_path / "index.html")
    assert status(page) == 2000
    few = "document.querySelectorAll('.entry').length"
    assert 1 <= page.evaluate(few) < 20
    page.evaluate("document.getElementById('gallery-body').scrollIntoView()")
    # The median time of a frame while the page scrolls.
    middle = page.evaluate("""() => new Promise((resolve) => {
        const times = []; let last = performance.now(); let step = 0;
        const tick = (now) => { times.push(now - last); last = now; scrollBy(0, 400);
            if (++step < 60) requestAnimationFrame(tick);
            else resolve(times.sort((a, b) => a - b)[Math.floor(times.length / 2)]); };
        requestAnimationFrame(tick); })""")
    assert middle < 100
    page.evaluate("scrollTo(0, document.body.scrollHeight)")
    page.wait_for_selector(".entry[data-at='1999']")
    page.wait_for_timeout(100)
    assert page.evaluate(few) < 20 and page.evaluate("document.querySelectorAll('#gallery *').length") < 1000
    assert page.locator(".entry[data-at='1999'] .key").inner_text() == "copy 1999"
    page.locator(".entry[data-at='1999']").focus()
    page.keyboard.press("Home")
    assert page.evaluate("document.activeElement.dataset.at") == "0"
