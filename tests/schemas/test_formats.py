"""Files of earlier versions are read to the values they were written with; those of later ones are refused in one line.

tests/golden/formats/v* were made once by the script beside them. They are never made again: that is the point of them.
"""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import zpipe
from zpipe.pipeline.make_shards import SceneSource, make_shards
from zpipe.pipeline.scenes import SceneConfig
from zpipe.pipeline.verify import verify_store
from zpipe.schemas.errors import ZpipeError
from zpipe.schemas.formats import check_format
from zpipe.schemas.manifest import read_extraction, read_manifest
from zpipe.schemas.shard_index import check_listed, find_shards, read_index
from zpipe.train.checkpoint import load_run, load_zoomer
from zpipe.train.evaluation.results import Result, content_of, read_results, read_verdicts
from zpipe.train.report.runs import gather
from zpipe.train.resume_state import load_checkpoint
from zpipe.train.run_files import read_record

FORMATS = Path(__file__).parents[1] / "golden" / "formats"
VERSIONS = sorted(path.name for path in FORMATS.glob("v*"))


@pytest.fixture(params=VERSIONS)
def example_version(request):
    return request.param


@pytest.fixture
def example(example_version, tmp_path, monkeypatch):
    """A copy of one version's files, as the working folder: they hold the relative paths they were made with."""
    monkeypatch.chdir(shutil.copytree(FORMATS / example_version, tmp_path / "example"))
    return Path(".")


@pytest.fixture
def expected(example):
    with np.load(example / "expected.npz") as found:
        return dict(found)


def test_there_is_an_example():
    assert VERSIONS == ["v1", "v2"]


def test_a_store_opens_to_the_same_maps(example, expected):
    maps = zpipe.open_maps(example / "maps")
    assert list(maps) == list(expected["keys"])
    np.testing.assert_array_equal(maps.array(), expected["maps"])
    np.testing.assert_array_equal(maps.table()["scale"].to_numpy(), expected["scale"])
    assert read_extraction(example / "maps") == maps.manifest.provenance
    assert verify_store(example / "maps", example / "shards") == []


def test_shards_open_and_count_as_made(example):
    index = read_index(example / "shards")
    folder, tars = find_shards(example / "shards")
    assert index.count == 6 and check_listed(folder, tars, index, whole_folder=True) == list(index.shards)
    config = SceneConfig(image_size=16, digit_size=(7, 8), pieces=(1, 1))
    source = SceneSource(count=6, split="train", seed=0, config=config, shard_size=3)
    assert make_shards(source, example / "shards").written == 0


def test_finished_runs_compute_the_same(example, expected):
    images, scores = torch.linspace(0, 1, 2 * 3 * 16 * 16).view(2, 3, 16, 16), torch.linspace(0, 1, 32).view(2, 16)
    run = load_run(example / "zoomvit")
    assert run.settings == read_record(example / "zoomvit")["settings"] and run.settings["image_size"] == 16
    zoomer, preprocessing = load_zoomer(example / "zoomer")
    assert preprocessing.image_size == 16
    with torch.inference_mode():
        np.testing.assert_allclose(run.model(images, scores, alpha=0.5), expected["logits"], atol=1e-5)
        np.testing.assert_allclose(zoomer(images), expected["predicted"], atol=1e-5)


def test_a_stopped_run_goes_on_to_the_same_end(example, expected, monkeypatch):
    state = load_checkpoint(example / "stopped")
    assert state["step"] == expected["step"] == 2
    np.testing.assert_array_equal(state["model"]["head.weight"], expected["checkpoint_head"])
    monkeypatch.syspath_prepend(str(FORMATS))
    monkeypatch.delitem(sys.modules, "make", raising=False)
    import make

    from zpipe.train.fit.train_vit import train_vit

    train = make.dataclasses.replace(make.TRAIN, checkpoint_s=0.0)
    train_vit(
        example / "shards",
        example / "stopped",
        make.dataclasses.replace(make.VIT, train=train),
        maps=example / "maps",
    )
    head = load_run(example / "stopped").model.head.weight.detach().numpy()
    assert np.abs(head - expected["checkpoint_head"]).max() > 1e-4
    np.testing.assert_allclose(head, expected["finished_head"], atol=1e-4)


def test_results_come_back(example):
    about, rows = read_results(example / "zoomvit" / "results" / "example.json")
    assert about["study"] == "example" and rows == [
        Result(study="example", run="zoomvit", model="zoomvit", setting={"alpha": 0.5}, metric="top1", n=6, value=0.5)
    ]


@pytest.mark.parametrize(
    ("file", "content", "study", "metrics"),
    [
        ("zoomvit/results/example.json", "study", "example", {"top1"}),
        (
            "zoomvit/evaluation.json",
            "evaluation",
            "evaluation",
            {"top1", "top5", "tokens", "gmacs", "gmacs_scores", "images_per_s", "parameters", "images_with_tokens"},
        ),
        (
            "zoomer/evaluation.json",
            "evaluation",
            "zoomer evaluation",
            {"mse", "mae", "top10_overlap", "rank_correlation", "pointing_game", "teacher_pointing_game", "box_share"},
        ),
        ("zoomvit/calibration.json", "calibration", "calibration", {"alpha", "mean", "std"}),
        ("zoomvit/judge.json", "judge", "judge", {"deletion", "insertion", "pointing_game"}),
    ],
)
def test_results_of_every_content_come_back(example, file, content, study, metrics):
    about, results = read_results(example / file)
    assert content_of(example / file) == about["content"] == content and about["rows"]
    assert {row.metric for row in results} == metrics and {(row.study, row.n) for row in results} == {(study, 6)}
    assert {row.run for row in results} == {Path(file).parts[0]}


def test_an_evaluation_comes_back_row_for_row(example):
    about, results = read_results(example / "zoomvit" / "evaluation.json")
    assert (about["kind"], about["shards"], about["seed"]) == ("vit", "shards", 0)
    names = ("alpha=0", "alpha=0.5", "budget=4")
    settings = [{"scores": "maps", "alpha": 0.0}, {"scores": "maps", "alpha": 0.5}, {"scores": "maps", "budget": 4}]
    assert tuple(row["setting"] for row in about["rows"]) == names
    for row, setting in zip(about["rows"], settings, strict=True):
        found = {each.metric: each for each in results if each.setting == setting}
        assert found["top1"].value == row["top1"] and found["top1"].low <= row["top1"] <= found["top1"].high
        assert found["gmacs"].value == row["gmacs"] and found["tokens"].value == row["tokens"]
        speed = found["images_per_s"]
        assert (speed.low, speed.value, speed.high) == tuple(row[f"images_per_s{end}"] for end in ("_low", "", "_high"))
        tokens = {each.setting["tokens"]: each.value for each in results if setting.items() < each.setting.items()}
        assert tokens == {int(length): count / 6 for length, count in row["token_histogram"].items()}


def test_a_demo_and_verdicts_come_back(example):
    about, _ = read_results(example / "demo" / "report.json")
    assert about["content"] == "demo" and about["notes"] and about["rows"][0]["model"]
    path = example / "zoomvit" / "results" / "errors_samples.json"
    assert content_of(path) == "verdicts" and read_verdicts(path)[0]["kind"] == "zoomer"


def test_the_report_reads_what_a_run_holds(example):
    found = gather([example / "zoomvit", example / "zoomer"])
    assert {row.study for row in found.results} == {"example", "evaluation", "zoomer evaluation"}
    assert found.titles == {"example": "An example"}
    vit = found.runs[0]
    assert vit.shards == "shards" and vit.zooms == [{"alpha": 0.0}, {"alpha": 0.5}, {"budget": 4}]
    assert set(vit.error_kinds.values()) == {"zoomer"}


# ------------------------------------------------------------------------------------------------- other versions

READERS = {
    "maps/manifest.json": lambda: read_manifest(Path("maps")),
    "maps/extraction.json": lambda: read_extraction(Path("maps")),
    "shards/shards.json": lambda: read_index(Path("shards")),
    "shards/make-shards.jsonl": lambda: make_shards(
        SceneSource(count=6, split="train", seed=0, config=SceneConfig(image_size=16), shard_size=3), Path("shards")
    ),
    "zoomvit/run.json": lambda: load_run(Path("zoomvit")),
    "zoomvit/results/example.json": lambda: read_results(Path("zoomvit/results/example.json")),
    "stopped/checkpoint.pt": lambda: load_checkpoint(Path("stopped")),
}


def change(path: Path, **fields: object) -> None:
    """Set fields of a file of ours."""
    if path.suffix == ".pt":
        torch.save(torch.load(path, weights_only=True) | fields, path)
        return
    first, *rest = path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]
    path.write_text("\n".join([json.dumps(json.loads(first) | fields), *rest]) + "\n")


@pytest.mark.parametrize("file", READERS)
@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"version": 99}, "version 99, made by a newer zpipe; this one reads up to version {newest}: upgrade zpipe"),
        ({"version": 0}, "version 0, which is no longer read; "),
        ({"format": "zpipe-else"}, "is 'zpipe-else' version {stated}, expected 'zpipe-"),
        ({"version": "1"}, "version '1', expected 'zpipe-"),
        ({"version": True}, "version True, expected "),
    ],
)
def test_another_version_is_one_line(example, example_version, file, fields, told):
    change(example / file, **fields)
    with pytest.raises(ZpipeError) as error:
        READERS[file]()
    text = str(error.value)
    newest = 2 if "results" in file or file == "shards/shards.json" else 1
    stated = 2 if "results" in file and example_version == "v2" else 1  # an index without version 2's fields is a 1
    told = told.format(newest=newest, stated=stated)
    assert text.startswith(f"{file}: is ") and told in text and "\n" not in text


def test_the_report_refuses_a_newer_run(example):
    change(example / "zoomvit" / "run.json", version=2)
    with pytest.raises(ZpipeError, match="upgrade zpipe"):
        gather([example / "zoomvit"])


def test_older_versions_are_read_as_far_back_as_said():
    for version in (2, 3):
        assert check_format(Path("x"), {"format": "f", "version": version}, "f", 3, oldest=2, remedy="") == version
    with pytest.raises(ZpipeError, match="x: is 'f' version 1, which is no longer read; make it again"):
        check_format(Path("x"), {"format": "f", "version": 1}, "f", 3, oldest=2, remedy="make it again")


def test_a_run_older_than_a_setting_goes_on_under_its_default(example):
    """Settings come without a new version of the format; before them, a run was as their default is now."""
    import dataclasses

    from zpipe.train.fit.defaults import of_earlier_versions
    from zpipe.train.fit.train_vit import VitConfig
    from zpipe.train.run_files import begin_run
    from zpipe.train.settings import to_json

    record = read_record(example / "stopped")
    settings = record["settings"]
    older = settings | {"train": {name: value for name, value in settings["train"].items() if name != "precision"}}
    change(example / "stopped" / "run.json", settings=older)
    defaults = of_earlier_versions(to_json(dataclasses.asdict(VitConfig())))
    assert not begin_run(example / "stopped", "vit", settings, defaults=defaults)
    other = settings | {"train": settings["train"] | {"precision": "bf16"}}
    with pytest.raises(ZpipeError, match="was begun with train.precision = 'float32', now it is 'bf16'"):
        begin_run(example / "stopped", "vit", other, defaults=defaults)
