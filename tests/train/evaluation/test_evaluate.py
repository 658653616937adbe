"""Evaluation: every metric of a row equals its value computed by hand."""

import errno
import io
import json
import shutil
import tarfile
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tiny import BODY, GRID, SIDE, encode, rewrite_store, scenes, store, write_shards
from typer.testing import CliRunner

from zpipe import open_maps
from zpipe.cli import app
from zpipe.schemas.errors import UsageError, ZpipeError
from zpipe.schemas.shard_index import read_index as read_shard_index
from zpipe.schemas.shard_index import write_index as write_shard_index
from zpipe.train.checkpoint import load_run
from zpipe.train.data.loader import RelevanceLoader
from zpipe.train.data.transforms import ViewConfig
from zpipe.train.evaluation.calibrate import CalibrationConfig, calibrate
from zpipe.train.evaluation.evaluate import evaluate, evaluation_path
from zpipe.train.evaluation.inference import OpenRun, choose_run_source
from zpipe.train.evaluation.operating_points import EvalConfig
from zpipe.train.fit.config import TrainConfig
from zpipe.train.fit.train_vit import VitConfig, train_vit
from zpipe.train.fit.train_zoomer import ZoomerConfig, train_zoomer
from zpipe.train.models.operating_points import OperatingPoint
from zpipe.train.studies.bench import StudyConfig, StudyInputs
from zpipe.train.studies.registry import run_study

pytestmark = pytest.mark.usefixtures("one_thread")

COUNT, CELLS, WIDTH, CLASSES = 50, GRID * GRID, BODY["embed_dim"], 10
CONFIG = EvalConfig(alphas=(0.0, 1.0), budgets=(0, 3, CELLS), batch_size=16, device="cpu")
VIEW = ViewConfig(crop_pct=0.875)
SQUARE = encode(np.zeros((SIDE, SIDE, 3), np.uint8))
NO_ZOOM = replace(CONFIG, alphas=None, budgets=())  # for runs without thresholds
LOOP = TrainConfig(epochs=3, batch_size=8, data_workers=0, device="cpu", lr=3e-3)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Shards of unequal length, maps, and one finished run of each kind."""
    root = tmp_path_factory.mktemp("evaluate")
    shards, maps = scenes(root / "shards", COUNT, shard_size=12), store(root / "shards", root / "maps")
    zoomer = ZoomerConfig(num_blocks=2, width=8, image_size=SIDE, train=replace(LOOP, lr=3e-4))
    train_zoomer(shards, maps, root / "zoomer", zoomer)
    vit = VitConfig(model="zoomvit_tiny_patch16_224", model_args=BODY, image_size=SIDE, train=LOOP)
    train_vit(shards, root / "zoom", vit, zoomer=root / "zoomer")
    train_vit(shards, root / "with-maps", vit, maps=maps)
    half = replace(vit, model_args=BODY | {"zoom_factor": 0.5})
    train_vit(shards, root / "half", half, zoomer=root / "zoomer")
    train_vit(shards, root / "plain", replace(vit, model="deit_tiny_patch16_224"))
    return root


def samples(shards):
    """(key, image, label) of every sample, read without the loader."""
    for path in sorted(shards.glob("*.tar")):
        with tarfile.open(path) as tar:
            found = {}
            for member in tar:
                found[member.name] = tar.extractfile(member).read()
        for name in found:
            key, _, suffix = name.partition(".")
            if suffix == "jpg":
                yield key, Image.open(io.BytesIO(found[name])).convert("RGB"), int(found[f"{key}.cls"])


def centre_crop(image, share=0.875):
    width, height = image.size
    side = share * min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    resized = image.resize((SIDE, SIDE), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side))
    pixels = torch.from_numpy(np.array(resized)).permute(2, 0, 1).float() / 255
    return (pixels - torch.tensor([0.485, 0.456, 0.406])[:, None, None]) / torch.tensor([0.229, 0.224, 0.225])[
        :, None, None
    ]


@pytest.fixture(scope="module")
def by_hand(data):
    keys, images, labels = zip(*samples(data / "shards"), strict=True)
    return list(keys), torch.stack([centre_crop(image) for image in images]), torch.tensor(labels)


def rows_of(data, run, config=None, **options):
    config = config or (NO_ZOOM if run in ("plain", "zoomer") else CONFIG)
    rows = evaluate(data / run, data / "shards", config, **options)["rows"]
    return {row["setting"]: row for row in rows}


def block_macs(tokens):
    """Multiply-adds of one block over a sequence with its class token: qkv, attention's two products, out, MLP."""
    length = tokens + 1
    return length * WIDTH * 3 * WIDTH + 2 * length * length * WIDTH + length * WIDTH**2 + 2 * length * WIDTH * 4 * WIDTH


def macs(coarse, fine=0, fine_weights=0):
    """Multiply-adds of a ViT with `coarse` patches of 8 x 8 x 3 weights and `fine` ones of `fine_weights` weights."""
    embedding = (coarse * 192 + fine * fine_weights) * WIDTH
    return embedding + BODY["depth"] * block_macs(coarse + fine) + WIDTH * CLASSES


# ----------------------------------------------------------------------------------------------------------- ViT rows


@torch.no_grad()
def test_top1_of_a_zoomvit(data, by_hand):
    _, images, labels = by_hand
    opened = load_run(data / "zoom")
    found = rows_of(data, "zoom")
    assert list(found) == ["alpha=0", "alpha=1", "budget=0", "budget=3", f"budget={CELLS}"]
    for zoom, name in (({"alpha": 0.0}, "alpha=0"), ({"alpha": 1.0}, "alpha=1"), ({"budget": 3}, "budget=3")):
        right = (opened.model(images, opened.zoomer(images), **zoom).argmax(1) == labels).float()
        top1 = float(right.mean())
        assert found[name]["top1"] == pytest.approx(top1) and found[name]["count"] == COUNT
        assert found[name]["top1_interval"] == pytest.approx(1.96 * (top1 * (1 - top1) / COUNT) ** 0.5, rel=1e-5)
        assert found[name]["images_per_s"] > 0


@torch.no_grad()
def test_top1_of_a_plain_vit(data, by_hand):
    _, images, labels = by_hand
    (row,) = rows_of(data, "plain").values()
    assert row["setting"] == "plain" and row["count"] == COUNT and row["gmacs_zoomer"] == 0
    assert row["top1"] == pytest.approx(
        float((load_run(data / "plain").model(images).argmax(1) == labels).float().mean())
    )
    assert row["tokens"] == CELLS
    assert row["gmacs"] * 1e9 == pytest.approx(macs(CELLS), rel=1e-6)


@torch.no_grad()
def test_top1_with_the_teachers_maps_as_scores(data, by_hand):
    keys, images, labels = by_hand
    maps = data / "maps"
    config = replace(CONFIG, alphas=(), budgets=(5,), scores="maps")
    whole = open_maps(maps)
    # The crop_pct of a run applies to its maps, too; by hand, the map of a centre crop is an average over its cells.
    weights = np.zeros((GRID, GRID))
    edges = np.linspace(0.0625, 0.9375, GRID + 1) * GRID
    for row in range(GRID):
        for cell in range(GRID):
            weights[row, cell] = max(0.0, min(edges[row + 1], cell + 1) - max(edges[row], cell))
    weights /= weights.sum(1, keepdims=True)
    scores = []
    for key in keys:
        low, high = whole[key].min(), whole[key].max()
        scores.append(weights @ ((whole[key] - low) / (high - low)) @ weights.T)
    scores = torch.tensor(np.stack(scores), dtype=torch.float32).flatten(1)
    for run in ("with-maps", "zoom"):
        (row,) = rows_of(data, run, config, maps=maps).values()
        right = load_run(data / run).model(images, scores, budget=5).argmax(1) == labels
        assert row["top1"] == pytest.approx(float(right.float().mean()))
        assert row["tokens"] == CELLS + 3 * 5 and row["gmacs_zoomer"] == 0


# A fine patch is half the kernel at zoom factor 2, and the kernel itself at 0.5.
@pytest.mark.parametrize(("run", "cells", "fine_weights"), [("zoom", CELLS, 48), ("half", CELLS // 4, 192)])
def test_tokens_and_macs_in_closed_form(data, run, cells, fine_weights):
    zoomed = {"alpha=0": cells, "alpha=1": 0} | {f"budget={count}": count for count in (0, 3, cells)}
    found = rows_of(data, run, replace(CONFIG, budgets=(0, 3, cells)))
    assert set(found) == set(zoomed)
    for name, count in zoomed.items():  # a sigmoid is above 0 everywhere: alpha=0 zooms all
        assert found[name]["tokens"] == cells + 3 * count
        assert found[name]["gmacs"] * 1e9 == pytest.approx(macs(cells - count, 4 * count, fine_weights), rel=1e-9)


def test_thresholds_that_look_alike_are_told_apart(data):
    config = replace(CONFIG, alphas=(0.5, 0.50000001), budgets=())
    rows = evaluate(data / "zoom", data / "shards", config)["rows"]
    assert [row["setting"] for row in rows] == ["alpha=0.5", "alpha=0.50000001"]
    assert [row["count"] for row in rows] == [COUNT, COUNT]
    with pytest.raises(UsageError, match="alpha=0.1: asked for twice"):
        evaluate(data / "zoom", data / "shards", replace(config, alphas=(0.1, 0.2, 0.1)))


def test_a_model_without_patches(data, tmp_path):
    config = VitConfig(model="test_resnet", image_size=SIDE, train=replace(LOOP, epochs=1))
    train_vit(data / "shards", tmp_path / "run", config)
    out = tmp_path / "rows.json"
    row = evaluate(tmp_path / "run", data / "shards", NO_ZOOM, out=out)["rows"][0]
    assert row["tokens"] is None and row["gmacs"] > 0
    assert json.loads(out.read_text())["rows"][0]["tokens"] is None


def test_mean_tokens_between_the_extremes(data, by_hand):
    opened = load_run(data / "zoom")
    with torch.no_grad():
        scores = opened.zoomer(by_hand[1])
    spread = scores[:, scores.std(dim=0).argmax()].double().sort().values
    # This cell is above the threshold in half of the images. The threshold lies between two scores: rounding differs
    # between batch sizes, so a score equal to the threshold would be above it at one size and not at another.
    alpha = float(spread[COUNT // 2 - 1] + spread[COUNT // 2]) / 2
    row = rows_of(data, "zoom", replace(CONFIG, alphas=(alpha,), budgets=()))[f"alpha={alpha!r}"]
    tokens = CELLS + 3 * (scores > alpha).sum(1).float()
    assert tokens.unique().numel() > 1
    assert row["tokens"] == pytest.approx(float(tokens.mean()))
    extremes = rows_of(data, "zoom")
    assert extremes["alpha=1"]["gmacs"] < row["gmacs"] < extremes["alpha=0"]["gmacs"]


@pytest.mark.parametrize("run", ["zoom", "plain", "half"])
def test_batch_size_and_workers_change_nothing(data, run):
    config = NO_ZOOM if run == "plain" else replace(CONFIG, alphas=(0.0, 0.4, 0.5, 1.0), budgets=(2,))

    def metrics(**options):
        rows = rows_of(data, run, replace(config, **options)).values()
        return [(row["setting"], row["count"], row["top1"], row["tokens"], round(row["gmacs"], 12)) for row in rows]

    first = metrics()
    for options in ({"batch_size": 1}, {"batch_size": 7}, {"batch_size": 1000}, {"data_workers": 2}):
        assert metrics(**options) == first


# -------------------------------------------------------------------------------------------------------- zoomer row


@torch.no_grad()
def test_a_zoomers_row(data, by_hand):
    zoomer = load_run(data / "zoomer").model
    scores = zoomer(by_hand[1])
    (row,) = rows_of(data, "zoomer", maps=data / "maps").values()
    loader = RelevanceLoader(data / "shards", data / "maps", batch_size=COUNT, image_size=SIDE, augment="eval")
    (batch,) = list(loader)
    assert batch["key"] == by_hand[0]
    target = batch["relevance"].flatten(1)
    assert row["mse"] == pytest.approx(float(((scores - target) ** 2).mean()), rel=1e-4)
    assert row["mae"] == pytest.approx(float((scores - target).abs().mean()), rel=1e-4)
    ranks = [[values.argsort().argsort().double() for values in pair] for pair in zip(scores, target, strict=True)]
    by_rank = np.mean([np.corrcoef(*pair)[0, 1] for pair in ranks])
    # Scores that differ by rounding only may swap in batches of another size. A swap of neighbours among n cells
    # changes the rank correlation of an image by at most 12 / (n (n + 1)).
    close = int((scores.sort(1).values.diff(dim=1) < 1e-6).sum())
    swaps = close * 12 / (CELLS * (CELLS + 1)) / COUNT
    assert row["rank_correlation"] == pytest.approx(by_rank, abs=1e-6 + swaps)
    peaks = target.argmax(1)
    x, y = (peaks % GRID + 0.5) / GRID, (peaks // GRID + 0.5) / GRID
    x1, y1, x2, y2 = batch["object_box"].unbind(1)
    hits = (x1 <= x) & (x <= x2) & (y1 <= y) & (y <= y2)
    assert row["teacher_pointing_game"] == pytest.approx(float(hits.float().mean()))
    assert row["box_share"] == pytest.approx(float(((x2 - x1) * (y2 - y1)).mean()), rel=1e-4)
    assert row["setting"] == "zoomer" and row["count"] == COUNT


def test_a_zoomer_is_not_measured_on_samples_without_a_map(data, tmp_path):
    root = store(data / "shards", tmp_path / "maps")
    maps = {key: open_maps(root)[key] for key in open_maps(root)}
    gone = list(maps)[3]
    rewrite_store(root, maps, {gone: "zero"})
    (row,) = rows_of(data, "zoomer", maps=root).values()
    assert row["count"] == COUNT - 1


# --------------------------------------------------------------------------------------------------- files and misuse


def test_json_is_what_was_returned(data, tmp_path):
    result = evaluate(data / "zoom", data / "shards", CONFIG, out=tmp_path / "deep" / "rows.json")
    assert json.loads((tmp_path / "deep" / "rows.json").read_text()) == result
    assert result["kind"] == "vit" and result["run"] == str(data / "zoom") and result["shards"] == str(data / "shards")


def test_progress_names_each_batch(data):
    seen = []
    evaluate(
        data / "plain", data / "shards", NO_ZOOM, progress=lambda *position, **facts: seen.append((*position, *facts))
    )
    assert seen == [("evaluate", number, 4, "top1") for number in range(1, 5)]


@pytest.mark.parametrize(
    ("run", "options", "message"),
    [
        ("zoomer", {"alphas": None, "budgets": ()}, "give --maps"),
        ("zoom", {"alphas": (1.5,)}, "--alphas 1.5"),
        ("zoom", {"alphas": (-0.1,)}, "--alphas -0.1"),
        ("zoom", {"alphas": (float("nan"),)}, "--alphas nan"),
        ("zoom", {"budgets": (CELLS + 1,)}, f"--budgets {CELLS + 1}"),
        ("zoom", {"budgets": (-1,)}, "--budgets -1"),
        ("zoom", {"alphas": (), "budgets": ()}, "give --alphas or --budgets"),
        ("zoom", {"scores": "maps"}, "give --maps"),
        ("zoom", {"scores": "teacher"}, "choose one of zoomer, maps, attention"),
        ("with-maps", {}, "--scores maps: needs a relevance store; give --maps STORE"),
        ("zoom", {"batch_size": 0}, "batch_size=0"),
        ("zoom", {"device": "abacus"}, "device abacus"),
        ("nothing", {}, "not a training run"),
        ("shards", {}, "not a training run"),
        ("maps", {}, "not a training run"),
    ],
)
def test_wrong_usage(data, tmp_path, run, options, message):
    out = tmp_path / "rows.json"
    with pytest.raises(UsageError) as error:
        evaluate(data / run, data / "shards", replace(CONFIG, **options), out=out)
    assert message in str(error.value) and "\n" not in str(error.value) and not out.exists()


@pytest.mark.parametrize(("run", "scores"), [("zoomer", None), ("with-maps", "maps")])
def test_maps_of_another_grid(data, tmp_path, run, scores):
    other = store(data / "shards", tmp_path / "maps", patch_size=4)
    with pytest.raises(UsageError, match="maps of 8 x 8, the model wants 4 x 4"):
        rows_of(data, run, NO_ZOOM if run == "zoomer" else replace(CONFIG, scores=scores), maps=other)


def test_maps_of_other_shards(data, tmp_path):
    other = scenes(tmp_path / "shards", COUNT, shard_size=12, seed=1)
    with pytest.raises(ZpipeError, match="SHA-256"):
        evaluate(data / "zoomer", other, NO_ZOOM, maps=data / "maps")


def test_an_unfinished_run(data, tmp_path):
    (tmp_path / "run.json").write_bytes((data / "plain" / "run.json").read_bytes())
    with pytest.raises(UsageError, match="not finished; run its command again"):
        evaluate(tmp_path, data / "shards", CONFIG)


def test_labels_beyond_the_models_classes(data, tmp_path):
    vit = VitConfig(model="deit_tiny_patch16_224", model_args=BODY, image_size=SIDE, train=LOOP, num_classes=10)
    train_vit(data / "shards", tmp_path / "run", replace(vit, train=replace(LOOP, epochs=0.1)))
    path = tmp_path / "run" / "config.json"
    assert json.loads(path.read_text())["num_classes"] == 10
    image = encode(np.zeros((SIDE, SIDE, 3), np.uint8))
    shards = write_shards(tmp_path / "s", [{"odd.png": image, "odd.cls": b"10"}])
    with pytest.raises(ZpipeError, match="key odd: label 10 is outside the model's 10 classes"):
        evaluate(tmp_path / "run", shards, NO_ZOOM)


# -------------------------------------------------------------------------------------------------- names and accounts


def renamed(shards, out, names):
    """A copy of shards whose classes have other names."""
    shutil.copytree(shards, out)
    write_shard_index(out, replace(read_shard_index(out), classes=tuple(names)))
    return out


def test_classes_of_other_names(data, tmp_path):
    """Shards whose ten digits are named in another order: by number, another digit is right."""
    names = load_run(data / "plain").settings["classes"]
    other = renamed(data / "shards", tmp_path / "other", [*names[1:], names[0]])
    message = f"its class 0 is '{names[1]}', that of .*plain is '{names[0]}'; give --classes by-name"
    calibration = CalibrationConfig(budget="20 tokens", device="cpu")
    for refused in (
        lambda: evaluate(data / "plain", other, NO_ZOOM),
        lambda: run_study("nine-crops", StudyInputs(run=data / "plain", shards=other), StudyConfig()),
        lambda: calibrate(data / "plain", other, replace(calibration, classes="by-name")),
    ):
        with pytest.raises(ZpipeError, match=f"{message}|only zoomvit"):
            refused()
    with pytest.raises(ZpipeError, match=message.replace("plain", "zoom")):
        calibrate(data / "zoom", other, calibration)
    by_name, by_index = (
        evaluate(data / "plain", other, replace(NO_ZOOM, classes=how))["rows"][0]["top1"]
        for how in ("by-name", "by-index")
    )
    loader = RelevanceLoader(data / "shards", batch_size=COUNT, image_size=SIDE, augment="eval", view=VIEW)
    (batch,) = list(loader)
    opened = load_run(data / "plain")
    with torch.no_grad():
        answers = opened.model(opened.preprocessing.normalise(batch["image"])).argmax(1)
    assert by_name == pytest.approx(float((answers == (batch["label"] + 1) % 10).float().mean()))
    assert by_index == pytest.approx(float((answers == batch["label"]).float().mean()))


def test_damaged_images_are_left_out_and_counted(data, tmp_path):
    shards = write_shards(tmp_path / "shards", [{"a.png": SQUARE, "a.cls": b"1", "b.png": b"\x89PNG", "b.cls": b"1"}])
    with pytest.raises(ZpipeError, match="key b: "):
        evaluate(data / "plain", shards, NO_ZOOM)
    content = evaluate(data / "plain", shards, replace(NO_ZOOM, damaged="skip"))
    assert (content["samples"], content["skipped"], content["skipped_by"]) == (2, 1, {"damaged": 1})
    assert content["rows"][0]["count"] == 1 and "key b: " in content["damaged"][0]
    result = CliRunner().invoke(
        app, ["evaluate", str(data / "plain"), str(shards), "--damaged", "skip", "--json", str(tmp_path / "x.json")]
    )
    assert result.exit_code == 1 and "seen 2, taken 1, left out 1 (damaged 1)" in result.stdout
    assert "left out by --damaged skip: 1" in result.stderr and "key b: " in result.stderr
    found = calibrate(data / "zoom", shards, CalibrationConfig(budget="20 tokens", damaged="skip", device="cpu"))
    assert (found["images"], found["skipped"]) == (1, 1)


def test_one_evaluation_does_not_replace_another(data, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(data / "plain", run)
    first = evaluate(run, data / "shards", NO_ZOOM)
    name = lambda config, content: evaluation_path(run, config, content).name  # noqa: E731
    assert name(NO_ZOOM, first) == "evaluation.json"
    assert name(replace(NO_ZOOM, scores="random", weights="best"), first) == "evaluation-best-random.json"
    assert name(replace(NO_ZOOM, target_gmacs=2.3), first) == "evaluation-2.3-GMACs.json"
    assert name(replace(NO_ZOOM, labels=tmp_path / "real.json"), first) == "evaluation-real.json"
    (run / "evaluation.json").write_text(json.dumps(first))
    assert name(NO_ZOOM, first) == "evaluation.json"  # the same images again, wherever they are
    assert name(NO_ZOOM, first | {"shards": "elsewhere"}) == "evaluation.json"
    other = evaluate(run, scenes(tmp_path / "other", 10, seed=3), NO_ZOOM)
    assert name(NO_ZOOM, other) == f"evaluation-{other['images_digest'][:8]}.json"


def test_the_figures_come_before_a_file_that_cannot_be_written(data, tmp_path, monkeypatch):
    def full(path, content):
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr("zpipe.schemas.atomic.write_json", full)
    result = CliRunner().invoke(app, ["evaluate", str(data / "plain"), str(data / "shards"), "--device", "cpu"])
    assert result.exit_code == 1 and "top1" in result.stdout
    errors = [line for line in result.stderr.splitlines() if not line.startswith("{")]
    assert len(errors) == 1 and "evaluation.json: No space left on device; free space" in errors[0]


@pytest.mark.parametrize(("value", "shown"), [(float("nan"), "nan"), (-torch.inf, "-inf"), (1e38, "1e[+]38")])
def test_logits_that_are_no_numbers(data, tmp_path, value, shown):
    opened = replace(load_run(data / "zoom"), path=tmp_path / "run")
    with torch.no_grad():
        opened.model.head.bias[0] = value
    ready = OpenRun(opened, None, device="cpu")
    batch = {"image": torch.zeros(1, 3, SIDE, SIDE, dtype=torch.uint8), "key": ["k"]}
    with pytest.raises(ZpipeError, match=f"run: key k: the model's logits hold {shown}; its weights have diverged"):
        ready.answer(batch, OperatingPoint(name="plain"))


def test_scores_that_are_no_numbers(data):
    opened = load_run(data / "zoom")
    for weight in opened.zoomer.parameters():
        weight.data.fill_(float("nan"))
    ready = OpenRun(opened, choose_run_source(opened, None, None), device="cpu")
    batch = {"image": torch.zeros(1, 3, SIDE, SIDE, dtype=torch.uint8), "key": ["k"]}
    for refused in (ready.scores, lambda batch: ready.answer(batch, OperatingPoint(name="", arguments={"alpha": 0.1}))):
        with pytest.raises(ZpipeError, match=r"zoom: key k: the scores \(zoomer\) hold nan"):
            refused(batch)


# ------------------------------------------------------------------------------------------------ weights and precision


def test_an_evaluation_in_float32_is_never_rounded_to_tf32(data):
    ready = OpenRun(load_run(data / "plain"), None, device="cpu")
    seen = []
    ready.model.head.register_forward_hook(lambda *_: seen.append(torch.backends.cuda.matmul.fp32_precision))
    batch = {"image": torch.zeros(1, 3, SIDE, SIDE, dtype=torch.uint8), "key": ["k"]}
    torch.set_float32_matmul_precision("high")
    try:
        ready.answer(batch, OperatingPoint(name="plain"))
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert seen == ["ieee"]


def test_the_weights_of_the_best_epoch_and_of_a_kept_one(data, tmp_path):
    run, loop = tmp_path / "run", replace(LOOP, epochs=3, keep=2)
    config = VitConfig(model="deit_tiny_patch16_224", model_args=BODY, image_size=SIDE, train=loop)
    train_vit(data / "shards", run, config, val=data / "shards")
    best = json.loads((run / "best.json").read_text())
    found = evaluate(run, data / "shards", replace(NO_ZOOM, weights="best"))
    assert found["weights"] == "best"
    assert found["rows"][0]["top1"] == pytest.approx(best["val_top1"])
    kept = sorted(path.stem for path in (run / "epochs").iterdir())
    assert len(kept) == 2
    for epoch in kept:
        expected = load_file(run / "epochs" / f"{epoch}.safetensors")
        state = load_run(run, weights=epoch).model.state_dict()
        assert all(torch.equal(state[name], value) for name, value in expected.items())
    assert all(torch.equal(state[name], value) for name, value in load_run(run).model.state_dict().items())


@pytest.mark.parametrize(
    ("weights", "message"), [("best", "train with --val"), ("7", "train.keep"), ("first", "--weights first: choose")]
)
def test_weights_that_are_not_there(data, weights, message):
    with pytest.raises(UsageError, match=message):
        evaluate(data / "plain", data / "shards", replace(CONFIG, weights=weights))


def test_in_half_precision_the_answers_are_nearly_the_same(data, by_hand):
    _, images, _ = by_hand
    opened = load_run(data / "zoom")
    rows = rows_of(data, "zoom", replace(CONFIG, precision="bf16"))
    assert {row["precision"] for row in rows.values()} == {"bf16"}
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        answers = opened.model(images, opened.zoomer(images), alpha=0.0).argmax(1)
    labels = by_hand[2]
    assert rows["alpha=0"]["top1"] == pytest.approx(float((answers == labels).float().mean()), abs=2 / COUNT)
    assert {row["precision"] for row in rows_of(data, "plain").values()} == {"float32"}
    with pytest.raises(UsageError, match="--precision int8: choose float32, bf16 or fp16"):
        rows_of(data, "zoom", replace(CONFIG, precision="int8"))
