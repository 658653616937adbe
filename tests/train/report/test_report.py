"""The report: all results are gathered, and points, tables and headline are right."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from report_page import CONFIG, COUNT, embedded, result

from zpipe.schemas.atomic import write_json
from zpipe.schemas.errors import UsageError, ZpipeError
from zpipe.train.evaluation.results import EVALUATION, write_results, write_study
from zpipe.train.report import report
from zpipe.train.report.figures import curves, histograms
from zpipe.train.report.page import describe
from zpipe.train.report.points import base_name, points
from zpipe.train.report.runs import Gathered, RunRecord, gather
from zpipe.train.report.tables import headline, tables

pytestmark = pytest.mark.usefixtures("one_thread")


def without_header(path):
    """An evaluation as in files of before the header."""
    found = json.loads(path.read_bytes())
    return {name: found[name] for name in ("kind", "run", "model", "seed", "shards", "maps", "rows")}


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
    evaluation = json.loads((data / "half" / "evaluation.json").read_bytes())["rows"][2]
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
        ("run.json", '{"format": "zpipe-run", "version": 1}', "run.json: not readable as the settings of a run"),
        ("evaluation.json", '{"rows": 3}', "evaluation.json: not an evaluation"),
        ("evaluation.json", '{"rows": [{"setting": "alpha=x", "count": 3}]}', "evaluation.json: not an evaluation"),
        ("metrics.jsonl", '{"step": 1}\n{"st\n', "metrics.jsonl: line 2 is not a line of metrics"),
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


def evaluated(name, digest, **stated):
    """A run that was evaluated on the images of a digest."""
    content = {"shards": f"shards/{name}", "samples": 10, "skipped": 0, "images_digest": digest} | stated
    return RunRecord(
        path=Path(name),
        name=name,
        kind="vit",
        model="m",
        settings={},
        finished=True,
        curve=[{"step": 1}],
        shards=content["shards"],
        measured=[content],
    )


def test_the_page_says_which_images_the_evaluations_are_of():
    left_out = evaluated("b", "1", skipped=3, skipped_by={"damaged": 3})
    same = describe(Gathered(runs=[evaluated("a", "1"), left_out], results=[], titles={}))["notes"]
    assert "3 of 10 images in an evaluation of b: damaged." in same and not any("different images" in n for n in same)
    notes = describe(Gathered(runs=[evaluated("a", "1"), evaluated("c", "2")], results=[], titles={}))["notes"]
    assert any("different images (a on shards/a; c on shards/c); accuracies do not compare" in note for note in notes)
    older = [evaluated("a", "1"), evaluated("d", "2", shards="shards/a")]
    del older[0].measured[0]["images_digest"]
    assert not any(
        "different images" in note for note in describe(Gathered(runs=older, results=[], titles={}))["notes"]
    )
