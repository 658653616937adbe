"""zpipe import: other people's weights answer as a run just as their own code does, and what goes wrong on the way."""

from __future__ import annotations

import json

import numpy as np
import pytest
import timm
import torch
from golden_models import golden
from safetensors.torch import save_file
from tiny import scenes
from typer.testing import CliRunner

from zpipe.cli import app
from zpipe.train.checkpoint import Preprocessing, load_run, save_model, save_zoomer
from zpipe.train.evaluation.answers import class_names
from zpipe.train.evaluation.evaluate import evaluate
from zpipe.train.evaluation.operating_points import EvalConfig
from zpipe.train.fit.initialise import build_vit, start_from
from zpipe.train.models import Zoomer

pytestmark = pytest.mark.usefixtures("one_thread")

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3}
# The golden file, its kind, what its shapes don't say, and the crop of an evaluation.
RELEASES = {
    "release_eta2": ("zoomvit", {"num_heads": 3, "zoom_factor": 2.0, "alpha": 0.5}, 1.0),
    "release_eta05": ("zoomvit", {"num_heads": 3, "zoom_factor": 0.5, "alpha": 0.5}, 1.0),
    "cfvit_golden": ("cfvit", {"num_heads": 3}, 0.875),
    "lfvit_golden": ("lfvit", {"num_heads": 3, "region_size": 5}, 0.875),
    "sparseformer_golden": ("sparseformer", {"num_heads": 64, "focus_repeats": 4}, 0.875),
}


def call(*arguments):
    result = CliRunner().invoke(app, ["import", *map(str, arguments)])
    return result.exit_code, result.output


def flags(settings):
    return [part for name, value in settings.items() for part in ("--model-arg", f"{name}={value}")]


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    """Checkpoints as their authors save them, by name."""
    root = tmp_path_factory.mktemp("released")
    for name in RELEASES:
        torch.save({"model": golden(name)[1], "epoch": 300}, root / f"{name}.pth")
    return root


@pytest.mark.parametrize("name", RELEASES)
@torch.no_grad()
def test_a_release_answers_as_its_authors_code(released, tmp_path, name):
    kind, settings, crop = RELEASES[name]
    values, _, images = golden(name)
    if "alpha" in settings:
        settings = settings | {"alpha": float(values["config"][7])}
    if "region_size" in settings:
        settings = settings | {"region_size": int(values["config"][7])}
    code, output = call(f"{kind}:{released}/{name}.pth", "--out", tmp_path / "run", *flags(settings))
    assert code == 0 and "measure it with" in output
    run = load_run(tmp_path / "run")
    assert run.preprocessing == Preprocessing(image_size=224, mean=IMAGENET[0], std=IMAGENET[1], crop_pct=crop)
    scores = [] if run.zoomer is None else [run.zoomer(images)]
    expected = values.get("logits", values.get("fine_logits"))
    np.testing.assert_allclose(run.model(images, *scores).numpy(), expected, atol=1e-4)
    names = class_names(run).names
    assert names[:2] == ["n01440764", "n01443537"] if len(expected[0]) == 1000 else not names


def test_a_released_zoomvit_is_evaluated_by_its_own_tokens(released, tmp_path):
    values, _, _ = golden("release_eta2")
    settings = {"num_heads": 3, "zoom_factor": 2.0, "alpha": float(values["config"][7])}
    call(f"zoomvit:{released}/release_eta2.pth", "--out", tmp_path / "run", *flags(settings))
    scenes(tmp_path / "shards", 4)
    rows = evaluate(tmp_path / "run", tmp_path / "shards", EvalConfig(device="cpu", alphas=(0.0, 0.5, 1.0)))["rows"]
    least, _, none = sorted(rows, key=lambda row: -row["tokens"])
    assert none["setting"] == "alpha=1" and none["tokens"] == 196 + 2  # and two zero vectors
    assert least["tokens"] > none["tokens"] and least["gmacs"] > none["gmacs"] and least["gmacs_zoomer"] > 0


DEITS = {
    "deit_tiny_patch16_224": 0.875,
    "deit_tiny_distilled_patch16_224": 0.875,
    "deit3_small_patch16_224": 1.0,
}


@pytest.mark.parametrize("name", DEITS)
@torch.no_grad()
def test_a_deit_by_the_shapes_of_its_weights(tmp_path, name):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=7).eval()
    theirs = {
        key.replace("ls1.gamma", "gamma_1").replace("ls2.gamma", "gamma_2"): w for key, w in model.state_dict().items()
    }
    torch.save({"model": theirs}, tmp_path / "deit.pth")
    code, output = call(f"deit:{tmp_path}/deit.pth", "--out", tmp_path / "run")
    assert code == 0, output
    run = load_run(tmp_path / "run")
    images = torch.randn(1, 3, 224, 224)
    torch.testing.assert_close(run.model(images), model(images))
    assert run.preprocessing.crop_pct == DEITS[name] and run.preprocessing.mean == IMAGENET[0]
    assert json.loads((tmp_path / "run/config.json").read_text())["architecture"] == name


@torch.no_grad()
def test_a_model_of_timm_from_a_file(tmp_path):
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", num_classes=3, **TINY).eval()
    save_file(model.state_dict(), tmp_path / "vit.safetensors")
    (tmp_path / "names.txt").write_text("cat\ndog\nowl\n")
    given = ["--file", tmp_path / "vit.safetensors", "--classes", tmp_path / "names.txt", *flags(TINY)]
    code, output = call(
        "timm:vit_tiny_patch16_224", "--out", tmp_path / "run", *given, "--mean", "0.1", "--crop-pct", "1"
    )
    assert code == 0 and "cat to owl" in output, output
    run = load_run(tmp_path / "run")
    images = torch.randn(1, 3, 32, 32)
    torch.testing.assert_close(run.model(images), model(images))
    assert class_names(run).names == ["cat", "dog", "owl"]
    assert run.preprocessing == Preprocessing(image_size=32, mean=(0.1,) * 3, std=(0.5,) * 3, crop_pct=1.0)
    other = build_vit("vit_tiny_patch16_224", 3, 32, {key: TINY[key] for key in TINY if key != "img_size"})
    start_from(other, str(tmp_path / "run"))
    torch.testing.assert_close(other.eval()(images), model(images))


def test_a_folder_that_timm_saved(tmp_path):
    preprocessing = Preprocessing(image_size=32, mean=(0.5,) * 3, std=(0.2,) * 3, crop_pct=0.9)
    model = timm.create_model("vit_tiny_patch16_224", num_classes=2, **TINY)
    (tmp_path / "saved").mkdir()
    timm.models.save_for_hf(
        model, str(tmp_path / "saved"), model_config={"label_names": ["a", "b"]}, safe_serialization=True
    )
    code, output = call(tmp_path / "saved", "--out", tmp_path / "run", "--mean", "0.5", "--std", "0.2")
    assert code == 0, output
    run = load_run(tmp_path / "run")
    assert class_names(run).names == ["a", "b"] and run.preprocessing == preprocessing
    for name, value in model.state_dict().items():
        assert torch.equal(value, run.model.state_dict()[name])


BAD = {
    "no such folder": (["FOLDER/none"], "no folder; give one that timm's save_for_hf wrote"),
    "no such file": (["zoomvit:FOLDER/none.pth", "num_heads=3", "zoom_factor=2.0", "alpha=0.5"], "No such file"),
    "settings that the shapes do not say": (["zoomvit:FOLDER/release_eta2.pth"], "do not say alpha; give --model-arg"),
    "a setting too many": (["cfvit:FOLDER/cfvit_golden.pth", "num_heads=3", "alpha=1"], "takes no alpha"),
    "another model": (["cfvit:FOLDER/release_eta2.pth", "num_heads=3"], "expected a cfvit that its authors published"),
    "no deit": (["deit:FOLDER/cfvit_golden.pth"], "not a DeiT that its authors published"),
    "unknown to timm": (["timm:vit_enormous"], "timm knows no such model"),
    "weights of another model": (["timm:resnet18", "--file", "FOLDER/cfvit_golden.pth"], "not the weights of resnet18"),
    "a file for a release": (["cfvit:FOLDER/cfvit_golden.pth", "--file", "x"], "takes no --file"),
    "a crop that is none": (["timm:resnet18", "--crop-pct", "2"], "--crop-pct 2: give a fraction"),
    "names for other classes": (
        ["cfvit:FOLDER/cfvit_golden.pth", "num_heads=3", "--classes", "imagenet-1k"],
        "1000 names, the model has 10 classes",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_leaves_nothing(released, tmp_path, case):
    given, message = BAD[case]
    arguments = []
    for part in given:
        setting = "=" in part and not part.startswith("-")
        arguments += ["--model-arg", part] if setting else [part.replace("FOLDER", str(released))]
    code, output = call(*arguments, "--out", tmp_path / "run")
    assert code in (1, 2) and message in output and output.strip().count("\n") == 0, output
    assert not (tmp_path / "run").exists()


def test_neither_a_run_nor_a_zoomer_is_taken_for_something_else(tmp_path):
    preprocessing = Preprocessing(image_size=32, mean=(0.5,) * 3, std=(0.2,) * 3)
    save_zoomer(tmp_path / "zoomer", Zoomer(2, 4, width=8), preprocessing)
    code, output = call(tmp_path / "zoomer", "--out", tmp_path / "run")
    assert code == 2 and "holds a zoomer" in output
    (tmp_path / "model").mkdir()
    save_model(tmp_path / "model", timm.create_model("vit_tiny_patch16_224", num_classes=2, **TINY), preprocessing)
    code, output = call(tmp_path / "model", "--out", tmp_path / "zoomer")
    assert code == 2 and "holds a run; give a new folder" in output
