"""The classes of shards and teacher are compared by name, and what prepares a teacher's images is its provenance."""

import json
from dataclasses import replace

import pytest
import torch
from timm.models import save_for_hf

from zpipe.pipeline import extract as module
from zpipe.pipeline.explainer import ExplainConfig
from zpipe.pipeline.extract import ExtractConfig, extract_teacher_maps, match_labels, provenance_of
from zpipe.pipeline.teacher import TeacherSpec, load_teacher
from zpipe.pipeline.worker import ShardWorker
from zpipe.schemas.classes import ClassNames
from zpipe.schemas.errors import UsageError, ZpipeError
from zpipe.schemas.relevance_maps import RelevanceMaps

NAMES = ["cat", "bee", "ant", "dog", "eel"]  # those of the shards are ant, bee, cat


@pytest.fixture(scope="module")
def folder(tmp_path_factory, teacher_settings):
    """The tiny teacher as a folder that names its classes."""
    path = tmp_path_factory.mktemp("teacher")
    spec = TeacherSpec(
        name=teacher_settings["teacher"],
        weights="random",
        num_classes=len(NAMES),
        model_args=teacher_settings["teacher_args"],
    )
    model = load_teacher(spec).model.model
    save_for_hf(model, path, safe_serialization=True, model_config={"label_names": NAMES})
    return path


def of(folder, **settings):
    return ExtractConfig(weights=str(folder), executor="local", threads=1, **settings)


def rows(store, *columns):
    table = RelevanceMaps(store).table(["key", *columns])
    return {row.pop("key"): row for row in table.to_pylist()}


@pytest.fixture
def run(shards, folder, tmp_path):
    """Extract with the folder as the teacher: `run(name, **settings) -> (store, report)`."""

    def extract(name, **settings):
        return tmp_path / name, extract_teacher_maps(shards, tmp_path / name, of(folder, **settings))

    return extract


def test_other_classes_are_refused_with_the_first_one_named(run, shards, folder):
    with pytest.raises(ZpipeError) as error:
        run("store")
    assert str(error.value) == (
        f"{shards}: its class 0 is 'ant', that of teacher {folder} is 'cat'; give --classes by-name to match them by "
        "name, or --classes by-index where they mean the same"
    )


def test_labels_are_matched_by_name(run):
    store, report = run("named", classes="by-name")
    by_name = rows(store, "label", "target", "predicted")
    assert {(row["label"], row["target"]) for row in by_name.values()} == {(0, 2), (1, 1), (2, 0)}
    right = sum(row["target"] == row["predicted"] for row in by_name.values())
    assert report.top1 == right / len(by_name)
    assert report.provenance.target.startswith("ground-truth by name (")
    numbered, _ = run("numbered", classes="by-index")
    assert all(row["label"] == row["target"] for row in rows(numbered, "label", "target").values())
    # A map is that of the class of the same name: for cats, of the teacher's class 0.
    named, numbered, cats = map(
        RelevanceMaps, (store, numbered, run("cat", explain=ExplainConfig(target="class:0"))[0])
    )
    for key, row in by_name.items():
        assert (named[key] == numbered[key]).all() == (row["label"] == row["target"])
        assert (named[key] == cats[key]).all() == (row["target"] == 0)
    with pytest.raises(ZpipeError, match="made with target"):
        run("named", classes="by-index")


def test_maps_that_need_no_label_are_made_without_a_top1(run):
    _, report = run("store", explain=ExplainConfig(target="predicted"))
    assert report.top1 is None
    assert any("its class 0 is 'ant'" in note and "no top-1" in note for note in report.notes)


def test_what_is_compared(folder, shards):
    teacher = load_teacher(TeacherSpec(weights=str(folder)))
    data = ClassNames(names=("ant", "bee"), where="shards")
    assert match_labels(teacher, data, of(folder, classes="by-name")).numbers == (2, 1)
    unnamed = replace(teacher, classes=())
    assert match_labels(unnamed, data, of(folder)).numbers is None
    assert match_labels(teacher, replace(data, names=()), of(folder)).numbers is None
    with pytest.raises(ZpipeError, match="names no classes"):
        match_labels(unnamed, data, of(folder, classes="by-name"))
    with pytest.raises(ZpipeError, match="its class 1, 'fox', is none of"):
        match_labels(teacher, replace(data, names=("ant", "fox")), of(folder, classes="by-name"))
    with pytest.raises(UsageError, match="--classes name: choose same, by-name or by-index|choose one of same"):
        of(folder, classes="name")


@pytest.mark.parametrize(
    "change",
    [
        {"mean": (0.1, 0.2, 0.3)},
        {"std": (0.1, 0.2, 0.3)},
        {"interpolation": "bilinear"},
        {"crop_pct": 0.5, "frame": "center"},
    ],
)
def test_what_prepares_the_images_is_part_of_the_provenance(folder, change):
    frame = {"frame": change["frame"]} if "frame" in change else {}
    one, other = (
        provenance_of(load_teacher(config.teacher_spec()), config).fingerprint()
        for config in (of(folder, **frame), of(folder, **change))
    )
    assert one != other


def test_a_crop_needs_a_frame_that_crops(folder):
    with pytest.raises(UsageError, match="--crop-pct 0.5: --frame full shows the whole image"):
        of(folder, crop_pct=0.5)


def test_every_machine_prepares_images_alike(folder, shards, tmp_path, monkeypatch):
    """The description beside a machine's own copy of the weights has no say."""
    seen = []

    def local(spec, tasks, resources, add, check):
        config = json.loads((folder / "config.json").read_text())
        whole = json.dumps(config)
        config["pretrained_cfg"]["mean"] = [0.9, 0.9, 0.9]
        (folder / "config.json").write_text(json.dumps(config))
        try:
            seen.append(ShardWorker(spec).teacher.mean)
        finally:
            (folder / "config.json").write_text(whole)
        return run_local(spec, tasks, resources, add, check)

    run_local = module.run_local
    monkeypatch.setattr(module, "run_local", local)
    report = extract_teacher_maps(shards, tmp_path / "store", of(folder, classes="by-name"))
    assert seen == [report.provenance.mean] and seen != [(0.9, 0.9, 0.9)]


def test_the_command_says_what_it_assumes_and_takes_options(cli, folder, shards, tmp_path, teacher_flags):
    file = tmp_path / "w.pth"
    torch.save(load_teacher(TeacherSpec(weights=str(folder))).model.state_dict(), file)
    flags = [flag if flag != "random" else file for flag in teacher_flags]
    common = ["extract-teacher-maps", shards, *flags, "--executor", "local"]
    done = cli(*common, "--out", tmp_path / "assumed")
    assert done.code == 0 and "note: teacher" in done.stderr
    assert "no config.json is beside it: mean [0.485, 0.456, 0.406]" in done.stderr.replace("\n", " ")
    told = ["--mean", "0.5,0.5,0.5", "--std", "0.25", "--interpolation", "bilinear", "--crop-pct", "1"]
    done = cli(*common, "--out", tmp_path / "told", *told, "--frame", "center")
    assert done.code == 0 and "assumed" not in done.stderr
    made = RelevanceMaps(tmp_path / "told").manifest.provenance
    assert (made.mean, made.std, made.interpolation) == ((0.5,) * 3, (0.25,) * 3, "bilinear")
    assert "write it as R,G,B" in cli(*common, "--out", tmp_path / "x", "--mean", "0.5,0.5").error
    assert "names no classes" in cli(*common, "--out", tmp_path / "x", "--classes", "by-name").error
