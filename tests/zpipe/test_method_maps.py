"""The maps of the study `map-methods`: what differs between the stores is the method, and nothing is made twice."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch
from tiny import BODY, SIDE, scenes

from zpipe import open_maps
from zpipe.judging import as_judge
from zpipe.method_maps import MethodsConfig, extract_method_maps
from zpipe.pipeline.explainer import ExplainConfig
from zpipe.pipeline.extract import ExtractConfig, extract_teacher_maps
from zpipe.pipeline.methods import CLASS_BLIND, CLOSED_FORM, METHODS
from zpipe.pipeline.teacher import load_teacher_of
from zpipe.schemas.errors import UsageError, ZpipeError
from zpipe.schemas.manifest import read_manifest, write_manifest
from zpipe.train.fit.config import TrainConfig
from zpipe.train.fit.train_vit import VitConfig, train_vit
from zpipe.train.studies.bench import WantedMaps

pytestmark = pytest.mark.usefixtures("one_thread")

OWN, OTHER = "transformer-attribution", "gradient-attention"
LOCAL = MethodsConfig(executor="local", device="cpu")


def local(*methods, **settings):
    return dataclasses.replace(LOCAL, methods=methods, **settings)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("method-maps")
    scenes(root / "shards", 12, shard_size=6)
    scenes(root / "val", 6, shard_size=6, seed=1, split="val")
    loop = TrainConfig(epochs=1, batch_size=6, device="cpu")
    config = VitConfig(model="deit_tiny_patch16_224", model_args=BODY, image_size=SIDE, train=loop)
    train_vit(root / "shards", root / "teacher", config)
    extract(root, root / "maps")
    return root


def extract(data, out, shards="shards", method=OWN, teacher=None, **settings):
    config = ExtractConfig(
        weights=str(teacher or data / "teacher"),
        explain=ExplainConfig(method=method, **settings.pop("explain", {})),
        executor="local",
        device="cpu",
        **settings,
    )
    extract_teacher_maps(data / shards, out, config)
    return out


def wanted(data, out, **changes):
    asked = WantedMaps(
        own=data / "maps", train=data / "shards", val=data / "val", val_maps=None, out=out, val_name="val-1"
    )
    return dataclasses.replace(asked, **changes)


def test_stores_differ_in_the_method_only_and_are_what_an_extraction_makes(data, tmp_path):
    said = []
    made = extract_method_maps(wanted(data, tmp_path / "out"), LOCAL, say=said.append)
    assert list(made.train) == list(made.val) == list(METHODS)
    assert made.train[OWN] == data / "maps" and not (tmp_path / "out" / OWN / "train").exists()
    own = read_manifest(data / "maps").provenance
    for method in METHODS:
        for stores, shards in ((made.train, "shards"), (made.val, "val")):
            maps = open_maps(stores[method])
            target = "none" if method in CLASS_BLIND else "ground-truth"
            assert maps.manifest.provenance == dataclasses.replace(own, method=method, target=target)
            assert len(maps) == {"shards": 12, "val": 6}[shards]
    same = open_maps(extract(data, tmp_path / "same", "val", OTHER))
    maps = open_maps(made.val[OTHER])
    assert all(np.array_equal(maps[key], same[key]) for key in same)
    assert made.teacher.path == str(data / "teacher") and made.classes is None
    assert all("names only" in note for note in made.notes)  # a teacher of two steps names few labels
    assert sum("extracted in" in line for line in said) == len(said) == 2 * len(METHODS) - 1

    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.parquet")}
    said.clear()
    again = extract_method_maps(wanted(data, tmp_path / "out"), LOCAL, say=said.append)
    assert (again.train, again.val) == (made.train, made.val)
    assert stamps == {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.parquet")}
    assert sum("were extracted before" in line for line in said) == len(said) == 2 * len(METHODS) - 1


def test_the_settings_of_the_store_are_those_of_the_others(data, tmp_path):
    explain = {"symmetrise": True, "target": "class:3", "precision": "float64+float32"}
    own = extract(data, tmp_path / "own", explain=explain)
    made = extract_method_maps(wanted(data, tmp_path / "out", own=own), local(OTHER))
    origin = read_manifest(made.train[OTHER]).provenance
    assert (origin.symmetrised, origin.target, origin.precision) == (True, "class:3", "float64")


def test_a_method_without_the_precision_of_the_store_is_explained_in_float32(data, tmp_path):
    own = extract(data, tmp_path / "own", method=OTHER, explain={"precision": "bfloat16"})
    made = extract_method_maps(wanted(data, tmp_path / "out", own=own), local(OTHER, "legrad", OWN))
    precisions = {method: read_manifest(store).provenance.precision for method, store in made.val.items()}
    assert precisions == {OTHER: "bfloat16", "legrad": "bfloat16", OWN: "float32"}
    notes = [note for note in made.notes if "explained in" in note]
    assert notes == [f"{OWN}: explained in float32, as it has no bfloat16, that of {own}"]


def test_the_judge_is_where_the_weights_are(data):
    teacher = load_teacher_of(data / "maps", read_manifest(data / "maps").provenance, device="cpu")
    assert as_judge(teacher).device == torch.device("cpu")
    teacher.model.to("meta")
    assert as_judge(teacher).device == torch.device("meta")


def test_a_store_without_a_target_leads_to_maps_of_the_labels(data, tmp_path):
    own = extract(data, tmp_path / "own", method="rollout")
    made = extract_method_maps(wanted(data, tmp_path / "out", own=own), local("rollout", OTHER))
    assert made.train["rollout"] == own
    assert read_manifest(made.train[OTHER]).provenance.target == "ground-truth"
    assert "rollout has no target" in made.notes[0]


@pytest.mark.parametrize("how", ["by-name", "by-index"])
def test_labels_find_the_classes_as_they_did_in_the_store(data, tmp_path, how):
    root = tmp_path / "data"
    for name in ("shards", "val"):
        shutil.copytree(data / name, root / name)
        index = json.loads((root / name / "shards.json").read_text())
        (root / name / "shards.json").write_text(json.dumps(index | {"classes": index["classes"][::-1]}))
    shutil.copytree(data / "teacher", root / "teacher")
    own = extract(root, root / "maps", classes=how)
    made = extract_method_maps(wanted(root, tmp_path / "out"), local(OTHER))
    target = read_manifest(own).provenance.target
    assert ("by name" in target) == (how == "by-name")
    assert read_manifest(made.train[OTHER]).provenance.target == target and made.classes == how


def test_maps_that_exist_already_are_used(data, tmp_path):
    val = extract(data, tmp_path / "val", "val")
    made = extract_method_maps(wanted(data, tmp_path / "out", val_maps=val), local(OWN))
    assert made.val == {OWN: val} and not (tmp_path / "out").exists()
    with pytest.raises(UsageError, match=r"--maps .*val: of transformer-attribution, which --methods leaves out"):
        extract_method_maps(wanted(data, tmp_path / "out", val_maps=val), local(OTHER))
    predicted = extract(data, tmp_path / "predicted", "val", explain={"target": "predicted"})
    with pytest.raises(UsageError, match="made with target = 'predicted'"):
        extract_method_maps(wanted(data, tmp_path / "out", val_maps=predicted), local(OWN))


def test_weights_that_are_gone_or_others(data, tmp_path):
    root = tmp_path / "moved"
    shutil.copytree(data / "teacher", root / "teacher")
    own = extract(data, tmp_path / "own", teacher=root / "teacher")
    (root / "teacher").rename(root / "elsewhere")
    asked = wanted(data, tmp_path / "out", own=own)
    with pytest.raises(UsageError, match=r"own: its teacher's weights .*teacher are not there .*; put.* --weights"):
        extract_method_maps(asked, local(OTHER))
    made = extract_method_maps(asked, local(OTHER, weights=str(root / "elsewhere")))
    assert read_manifest(made.train[OTHER]).provenance.compared() == dict(
        read_manifest(own).provenance.compared(), method=OTHER
    )
    assert made.teacher.path == str(root / "elsewhere")
    loop = TrainConfig(epochs=1, batch_size=6, device="cpu", seed=5)
    config = VitConfig(model="deit_tiny_patch16_224", model_args=BODY, image_size=SIDE, train=loop)
    train_vit(data / "shards", root / "teacher", config)
    with pytest.raises(ZpipeError, match=r"teacher: holds other weights \(digest .*\) than those that .*own was made"):
        extract_method_maps(asked, local(OTHER))


def of_random_teacher(data, out, name, **args):
    """A store of maps of a teacher with random weights, of which closed forms know no rule."""
    config = ExtractConfig(
        teacher=name,
        weights="random",
        num_classes=10,
        teacher_args=BODY | args,
        explain=ExplainConfig(method=OTHER),
        classes="by-index",
        executor="local",
        device="cpu",
    )
    extract_teacher_maps(data / "shards", out, config)
    return out


def test_a_method_that_the_teacher_can_not_be_explained_by(data, tmp_path):
    own = of_random_teacher(data, tmp_path / "own", "deit_tiny_distilled_patch16_224", img_size=SIDE)
    asked = wanted(data, tmp_path / "out", own=own)
    with pytest.raises(UsageError, match=f"--methods {OWN}: no relevance rules for VisionTransformerDis.*leave it out"):
        extract_method_maps(asked, local(OWN))
    made = extract_method_maps(asked, LOCAL)
    assert list(made.train) == [method for method in METHODS if method not in CLOSED_FORM]
    assert [note.partition(":")[0] for note in made.notes if "left out" in note] == list(CLOSED_FORM)


def test_a_teacher_that_can_not_judge(data, tmp_path):
    own = of_random_teacher(data, tmp_path / "own", "deit_tiny_patch16_224", img_size=[SIDE, 2 * SIDE])
    made = extract_method_maps(wanted(data, tmp_path / "out", own=own), local(OTHER))
    assert made.teacher is None and "the maps are not judged" in made.notes[0] and "not square" in made.notes[0]


def test_what_is_no_store_of_a_teachers_maps(data, tmp_path):
    own = extract(data, tmp_path / "own", save=("logits",))
    with pytest.raises(ZpipeError, match=r"logits: holds vector; study map-methods needs"):
        extract_method_maps(wanted(data, tmp_path / "out", own=own / "logits"), LOCAL)
    manifest = read_manifest(own)
    write_manifest(own, dataclasses.replace(manifest, provenance=dataclasses.replace(manifest.provenance, teacher="")))
    with pytest.raises(ZpipeError, match=r"own: was made without a teacher"):
        extract_method_maps(wanted(data, tmp_path / "out", own=own), LOCAL)


@pytest.mark.parametrize(
    ("methods", "message"), [(("glow",), "--methods glow"), ((OWN, OWN), "--methods transformer.* named twice")]
)
def test_wrong_methods(methods, message):
    with pytest.raises(UsageError, match=message):
        MethodsConfig(methods=methods)
