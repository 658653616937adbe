"""Files of earlier versions are read to the values they were written with; those of later ones are refused in one line.

tests/golden/formats/v1 was made once by the script beside it. It is never made again: that is the point of it.
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
from zpipe.train.checkpoint import load_checkpoint, load_run, load_zoomer, read_record
from zpipe.train.evaluation.results import Result, read_results
from zpipe.train.report.runs import gather

FORMATS = Path(__file__).parents[1] / "golden" / "formats"
VERSIONS = sorted(path.name for path in FORMATS.glob("v*"))


@pytest.fixture(params=VERSIONS)
def example(request, tmp_path, monkeypatch):
    """A copy of one version's files, as the working folder: they hold the relative paths they were made with."""
    monkeypatch.chdir(shutil.copytree(FORMATS / request.param, tmp_path / "example"))
    return Path(".")


@pytest.fixture
def expected(example):
    with np.load(example / "expected.npz") as found:
        return dict(found)


def test_there_is_an_example():
    assert "v1" in VERSIONS


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
        ({"version": 99}, "version 99, made by a newer zpipe; this one reads up to version 1: upgrade zpipe"),
        ({"version": 0}, "version 0, which is no longer read; "),
        ({"format": "zpipe-else"}, "is 'zpipe-else' version 1, expected 'zpipe-"),
        ({"version": "1"}, "version '1', expected "),
        ({"version": True}, "version True, expected "),
    ],
)
def test_another_version_is_one_line(example, file, fields, told):
    change(example / file, **fields)
    with pytest.raises(ZpipeError) as error:
        READERS[file]()
    text = str(error.value)
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

    from zpipe.train.checkpoint import begin_run
    from zpipe.train.fit.train_vit import VitConfig
    from zpipe.train.settings import to_json

    record = read_record(example / "stopped")
    settings = record["settings"]
    older = settings | {"train": {name: value for name, value in settings["train"].items() if name != "precision"}}
    change(example / "stopped" / "run.json", settings=older)
    defaults = to_json(dataclasses.asdict(VitConfig()))
    assert not begin_run(example / "stopped", "vit", settings, defaults=defaults)
    other = settings | {"train": settings["train"] | {"precision": "bf16"}}
    with pytest.raises(ZpipeError, match="was begun with train.precision = 'float32', now it is 'bf16'"):
        begin_run(example / "stopped", "vit", other, defaults=defaults)
