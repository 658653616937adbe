"""Single images: the same answers as in evaluation, pictures, and errors for files that are no images."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
from dataclasses import replace

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from PIL import Image
from tiny import BODY, GRID, SIDE, encode, late_profile, scenes, store
from typer.testing import CliRunner

from zpipe.cli import app
from zpipe.schemas.errors import UsageError
from zpipe.train.checkpoint import load_run
from zpipe.train.data.loader import RelevanceLoader
from zpipe.train.evaluation.evaluate import evaluate
from zpipe.train.evaluation.inference import OpenRun, choose_run_source
from zpipe.train.evaluation.operating_points import EvalConfig, operating_points
from zpipe.train.evaluation.pictures import ErrorPicture, error_sheet, patches, picture
from zpipe.train.evaluation.predict import Classifier, PredictConfig, predict
from zpipe.train.fit.config import TrainConfig
from zpipe.train.fit.train_vit import VitConfig, train_vit
from zpipe.train.fit.train_zoomer import ZoomerConfig, train_zoomer

torch.set_num_threads(1)
LOOP = TrainConfig(epochs=1, batch_size=10, data_workers=0, device="cpu", lr=1e-3)
CPU = PredictConfig(device="cpu")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("predict")
    scenes(root / "shards", 20)
    store(root / "shards", root / "maps")
    zoomer = ZoomerConfig(num_blocks=2, width=8, image_size=SIDE, train=LOOP)
    train_zoomer(root / "shards", root / "maps", root / "zoomer", zoomer)
    config = VitConfig(model="zoomvit_tiny_patch16_224", model_args=BODY, image_size=SIDE, train=LOOP)
    train_vit(root / "shards", root / "zoom", config, zoomer=root / "zoomer")
    train_vit(root / "shards", root / "plain", replace(config, model="deit_tiny_patch16_224"))
    train_vit(root / "shards", root / "with-maps", config, maps=root / "maps")
    (root / "images").mkdir()
    with tarfile.open(sorted((root / "shards").glob("*.tar"))[0]) as tar:
        for member in tar:
            if member.name.endswith(".jpg"):
                (root / "images" / member.name).write_bytes(tar.extractfile(member).read())
    return root


@pytest.mark.parametrize("run", ["zoom", "plain"])
def test_the_same_answer_as_in_evaluation(data, run):
    config = replace(CPU, alpha=0.45) if run == "zoom" else CPU
    files = sorted((data / "images").iterdir())
    rows = {row["file"]: row for row in predict(data / run, files, config)}
    classifier = Classifier(load_run(data / run), config)
    names = load_run(data / run).settings["classes"]
    batch = next(iter(RelevanceLoader(data / "shards", None, batch_size=10, image_size=SIDE, augment="eval")))
    probabilities = classifier(batch["image"], batch["key"]).softmax(1)
    assert len(rows) == 10 and len(names) == 10
    for key, expected in zip(batch["key"], probabilities, strict=True):
        found = rows[str(data / "images" / f"{key}.jpg")]["classes"]
        # By probability and not by rank: in a batch of another size, two nearly equal classes may swap.
        best = expected.sort(descending=True).values[:5].tolist()
        assert [each["probability"] for each in found] == pytest.approx(best, abs=1e-5)
        assert expected[[each["index"] for each in found]].tolist() == pytest.approx(best, abs=2e-5)
        assert len({each["index"] for each in found}) == 5
        assert [each["name"] for each in found] == [names[each["index"]] for each in found]


STAGES = {"patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 3}
BACKBONE = {"backbone": "deit_tiny_patch16_224", "backbone_args": BODY}


@pytest.mark.parametrize(
    ("model", "arguments", "settings", "sweep", "default"),
    [
        ("cfvit_small", STAGES, {"exit": 1.0}, {"exits": (1.0,)}, {"exit": 0.0}),
        ("token_pruned_vit", BACKBONE | {"prune_block": 1}, {"keep": 2}, {"keeps": (2,)}, {}),
        ("tome_vit", BACKBONE | {"r": 0}, {"merge": 5}, {"merges": (5,)}, {}),
    ],
)
def test_rivals_answer_at_the_operating_points_of_evaluation(
    data, tmp_path, model, arguments, settings, sweep, default
):
    run = tmp_path / "run"
    train_vit(
        data / "shards",
        run,
        VitConfig(model=model, model_args=arguments, image_size=SIDE, train=replace(LOOP, lr=1e-2)),
    )
    opened = load_run(run)
    (point,) = operating_points(opened.model, None, EvalConfig(**sweep))
    answer = OpenRun(opened, choose_run_source(opened, None, None), device="cpu").answer
    shard = sorted((data / "shards").glob("*.tar"))[0]
    (batch,) = RelevanceLoader(shard, batch_size=10, image_size=SIDE, augment="eval")
    expected = answer(batch, point).logits.softmax(1)
    classifier = Classifier(load_run(run), replace(CPU, settings=settings))
    assert torch.equal(classifier(batch["image"], batch["key"]).softmax(1), expected)
    other = Classifier(load_run(run), replace(CPU, settings=default))(batch["image"], batch["key"]).softmax(1)
    assert not torch.equal(other, expected)
    files = [data / "images" / f"{key}.jpg" for key in batch["key"]]
    rows = predict(run, files, replace(CPU, settings=settings, top=1))
    for row, probabilities in zip(rows, expected, strict=True):
        assert row["classes"][0]["probability"] == pytest.approx(float(probabilities.max()), abs=1e-5)
    (measured,) = evaluate(run, shard, EvalConfig(**sweep, batch_size=10, device="cpu"))["rows"]
    assert measured["top1"] == pytest.approx(float((expected.argmax(1) == batch["label"]).float().mean()))


def test_half_precision(data, tmp_path):
    """The model runs under autocast; the zoomer's head, which runs first, makes its scores in float32."""
    seen = []

    def look(module, inputs, output):
        if isinstance(module, torch.nn.Linear):
            seen.append(output.dtype)

    file = sorted((data / "images").iterdir())[0]
    handle = torch.nn.modules.module.register_module_forward_hook(look)
    try:
        (low,) = predict(data / "zoom", [file], replace(CPU, budget=3, precision="bf16"), out=tmp_path)
    finally:
        handle.remove()
    assert seen[0] == torch.float32 and set(seen[1:]) == {torch.bfloat16}
    assert (tmp_path / f"{file.stem}.png").is_file()
    (full,) = predict(data / "zoom", [file], replace(CPU, budget=3))
    assert low["tokens"] == full["tokens"] == GRID**2 + 9
    assert low["classes"] != full["classes"]
    assert low["classes"][0]["probability"] == pytest.approx(full["classes"][0]["probability"], abs=0.05)


def test_zoom_and_pictures(data, tmp_path):
    files = sorted((data / "images").iterdir())[:2]
    rows = predict(data / "zoom", files, replace(CPU, budget="25 tokens"), out=tmp_path / "pictures")
    assert [row["tokens"] for row in rows] == [25, 25]
    for file in files:
        with Image.open(tmp_path / "pictures" / f"{file.stem}.png") as picture:
            assert picture.width > 2 * picture.height  # three panels
            assert np.asarray(picture.convert("RGB")).std() > 10
    (row,) = predict(data / "plain", files[:1], CPU, out=tmp_path / "pictures")
    assert row["tokens"] is None
    assert len(predict(data / "zoom", files[:1], replace(CPU, scores="none"))) == 1
    assert predict(data / "zoom", files[:1], replace(CPU, scores="centre", budget=2))[0]["tokens"] == GRID**2 + 6


def test_scores_on_a_grid_that_is_not_the_models(data, tmp_path):
    """A model that crops takes scores on any grid; its own grid has 8 x 8 cells, the zoomer's 4 x 4."""
    backbone = {"backbone": "deit_tiny_patch16_224", "backbone_args": BODY, "patch_size": 4}
    config = VitConfig(model="image_zoom", model_args=backbone, image_size=SIDE, train=LOOP)
    train_vit(data / "shards", tmp_path / "box", config, zoomer=data / "zoomer")
    assert load_run(tmp_path / "box").model.score_grid == 8 == 2 * GRID
    files = sorted((data / "images").iterdir())[:1]
    assert predict(tmp_path / "box", files, CPU, out=tmp_path / "pictures")[0]["tokens"] is None
    assert (tmp_path / "pictures" / f"{files[0].stem}.png").is_file()


@pytest.mark.parametrize("zoomed", [0, 1, 4])
def test_red_are_the_patches_of_zoomed_cells(zoomed):
    """Of 2 x 2 cells of 16 pixels, even if all of them are zoomed."""
    corners = [(x, y) for y in (0, 16) for x in (0, 16)]
    fine = [(x + i, y + j, x + i + 8, y + j + 8) for x, y in corners[:zoomed] for i in (0, 8) for j in (0, 8)]
    coarse = [(x, y, x + 16, y + 16) for x, y in corners[zoomed:]]
    axes = plt.figure().add_subplot()
    patches(axes, torch.tensor(fine + coarse), cell=16)
    red = [patch for patch in axes.patches if patch.get_edgecolor()[:3] == (1.0, 0.0, 0.0)]
    plt.close()
    assert len(axes.patches) == len(fine + coarse) and len(red) == len(fine)


def test_the_command(data, tmp_path):
    file = sorted((data / "images").iterdir())[0]
    out = tmp_path / "rows.json"
    line = ["predict", str(file), "--checkpoint", str(data / "zoom"), "--budget", "3", "--top", "2", "--json", str(out)]
    result = CliRunner().invoke(app, [*line, "--device", "cpu"])
    assert result.exit_code == 0, result.output
    (row,) = json.loads(out.read_text())
    first = row["classes"][0]
    assert f"{file}: {first['name']} {first['probability']:.1%}" in result.output
    assert "(25 tokens)" in result.output and len(row["classes"]) == 2


@pytest.mark.parametrize(
    ("run", "options", "kind", "message"),
    [
        ("zoomer", {}, UsageError, "holds a zoomer, no classifier"),
        ("with-maps", {}, UsageError, "with-maps: was trained with maps as scores, .*: single images have no maps"),
        ("zoom", {"scores": "maps"}, UsageError, "--scores maps: single images have no maps in a store; choose zoomer"),
        ("zoom", {"alpha": 0.1, "budget": 3}, UsageError, "not both"),
        ("zoom", {"alpha": 0.1, "settings": {"budget": 3}}, UsageError, "not both"),
        ("zoom", {"settings": {"exit": 0.5}}, UsageError, "zoom: exit: ZoomViT has no such setting; it takes alpha, "),
        ("zoom", {"settings": {"exit": 0.5}, "scores": "none"}, UsageError, "exit: ZoomViT has no such setting"),
        ("plain", {"settings": {"keep": 3}}, UsageError, "keep: VisionTransformer has no such setting; it takes none"),
        ("zoom", {"precision": "int8"}, UsageError, "--precision int8: choose float32, bf16 or fp16"),
        ("zoom", {"alpha": 1.5}, UsageError, r"zoom: alpha 1.5: a threshold lies in \[0, 1\]"),
        ("zoom", {"budget": 99}, UsageError, "budget must lie between"),
        ("nothing", {}, UsageError, "not a training run"),
    ],
)
def test_wrong_use(data, run, options, kind, message):
    with pytest.raises(kind, match=message) as error:
        predict(data / run, sorted((data / "images").iterdir())[:1], replace(CPU, **options))
    assert "\n" not in str(error.value)


def test_what_is_no_image(data, tmp_path):
    text, whole = tmp_path / "note.jpg", sorted((data / "images").iterdir())[0]
    text.write_text("not an image")
    cut = tmp_path / "cut.jpg"
    cut.write_bytes(whole.read_bytes()[:300])
    profile = tmp_path / "profile.png"
    profile.write_bytes(late_profile(encode(np.zeros((8, 8, 3), np.uint8))))
    os.mkfifo(tmp_path / "fifo.png")
    bad = [text, cut, profile, tmp_path / "missing.jpg", tmp_path / "fifo.png", tmp_path]
    rows = predict(data / "zoom", [*bad[:3], whole, *bad[3:]], CPU, out=tmp_path / "pictures")
    assert [row["file"] for row in rows if "error" in row] == [str(file) for file in bad]
    assert all(row["error"].startswith(f"{row['file']}: can't be read as an image (") for row in rows if "error" in row)
    assert "missing.jpg" in rows[4]["error"] and rows[4]["error"].endswith("; check the path")
    assert len(rows[3]["classes"]) == 5 and [path.stem for path in (tmp_path / "pictures").iterdir()] == [whole.stem]


def test_a_picture_replaces_nothing_but_its_like(data, tmp_path):
    image = tmp_path / "a.png"
    Image.open(sorted((data / "images").iterdir())[0]).save(image)
    before = image.read_bytes()
    with pytest.raises(UsageError, match="a.png would replace an image; give another folder"):
        predict(data / "plain", [image], CPU, out=tmp_path)
    other = tmp_path / "others"
    other.mkdir()
    (other / "a.png").write_bytes(before)
    with pytest.raises(UsageError, match="a.png: exists, and zpipe did not write it"):
        predict(data / "plain", [image], CPU, out=other)
    with pytest.raises(UsageError, match="would have the same picture"):
        predict(data / "plain", [image, other / "a.png"], CPU, out=tmp_path / "pictures")
    assert image.read_bytes() == (other / "a.png").read_bytes() == before
    for _ in range(2):  # our own may be drawn again
        predict(data / "plain", [image], CPU, out=tmp_path / "pictures")
    with pytest.raises(UsageError, match="would replace an image"):
        predict(data / "plain", [tmp_path / "pictures" / "a.png"], CPU, out=tmp_path / "pictures")


@pytest.mark.parametrize("name", [r"$\frac{$", r"\$x$", "$" * 3, "a\x1b[31m", "long " * 60, "[/bold]"])
def test_any_name_is_a_title(tmp_path, name):
    picture(tmp_path / "p.png", np.zeros((8, 8, 3), np.uint8), None, None, 0, name)
    error_sheet(tmp_path / "e.png", [[ErrorPicture(np.zeros((8, 8, 3), np.uint8), [], 4, None, name)]], columns=1)
    assert (tmp_path / "p.png").is_file() and (tmp_path / "e.png").is_file()


def test_names_and_files_on_the_terminal(data, tmp_path):
    """Names with escape sequences, markup and no UTF-8, in a process whose standard output is ASCII."""
    run = shutil.copytree(data / "plain", tmp_path / "run")
    record = json.loads((run / "run.json").read_text())
    record["settings"]["classes"] = ["\x1b[31mred", "[/bold]", "[bold]", "\u202eback", "ü", *"abcde"]
    (run / "run.json").write_text(json.dumps(record))
    whole = sorted((data / "images").iterdir())[0]
    files = [tmp_path / name for name in ("ünï.jpg", "e\x1b[2J.jpg", os.fsdecode(b"bad\xff.jpg"))]
    for file in files:
        shutil.copy(whole, file)
    line = [sys.executable, "-c", "from zpipe.cli import main; main()", "predict", *map(str, files), "--top", "10"]
    line += ["--checkpoint", str(run), "--device", "cpu", "--json", str(tmp_path / "rows.json")]
    done = subprocess.run(line, capture_output=True, timeout=120, env=os.environ | {"PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0, done.stderr
    printed = done.stdout.decode("ascii")
    for shown in (r"\xfcn\xef.jpg", r"e\x1b[2J.jpg", r"bad\udcff.jpg", r"\x1b[31mred", "[/bold]", r"\u202eback"):
        assert shown in printed
    assert "\x1b" not in printed and len(printed.splitlines()) == 3
    assert [row["file"] for row in json.loads((tmp_path / "rows.json").read_text())] == [str(file) for file in files]


@pytest.mark.parametrize(
    ("redirect", "reason"), [(">/dev/full", "No space left"), (">&-", "closed"), ("| :", "reader")]
)
def test_a_result_that_cannot_be_printed(data, redirect, reason):
    line = (
        f'"{sys.executable}" -c "from zpipe.cli import main; main()" predict "{sorted((data / "images").iterdir())[0]}"'
    )
    line += f' --checkpoint "{data / "plain"}" --device cpu {redirect}'
    line += "; exit ${PIPESTATUS[0]}"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, timeout=120)
    errors = [text for text in done.stderr.splitlines() if not text.startswith("{")]
    assert len(errors) == 1 and errors[0].startswith("error: standard output: ") and reason in errors[0]
    assert done.returncode == 1


def test_images_of_another_size_are_refused(data):
    classifier = Classifier(load_run(data / "plain"), CPU)
    for images in (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), torch.zeros(1, 3, SIDE, SIDE)):
        with pytest.raises(ValueError, match="images must be uint8"):
            classifier(images)
