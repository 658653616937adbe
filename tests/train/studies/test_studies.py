"""Studies: every value is what the models compute, nothing is trained twice, results are read back as written."""

import itertools
import json
import shutil
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from tiny import BODY, GRID, SIDE, scenes, store

from zpipe.schemas.errors import UsageError, ZpipeError
from zpipe.train.checkpoint import load_run
from zpipe.train.data.loader import RelevanceLoader
from zpipe.train.evaluation.evaluate import evaluate
from zpipe.train.evaluation.operating_points import EvalConfig
from zpipe.train.evaluation.results import Result, read_results, wide, wilson, write_study
from zpipe.train.fit.config import TrainConfig
from zpipe.train.fit.distributed import Workers
from zpipe.train.fit.train_vit import VitConfig, train_vit
from zpipe.train.fit.train_zoomer import ZoomerConfig, train_zoomer
from zpipe.train.models.warm_start import zooming_twin
from zpipe.train.settings import rebuild
from zpipe.train.studies.bench import StudyConfig, StudyInputs
from zpipe.train.studies.registry import STUDIES, run_study

pytestmark = pytest.mark.usefixtures("one_thread")

COUNT = 40
LOOP = TrainConfig(epochs=0.5, batch_size=8, device="cpu", lr=3e-3)
CONFIG = StudyConfig(evaluation=EvalConfig(alphas=(), batch_size=16, device="cpu"))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("studies")
    shards, maps = scenes(root / "shards", COUNT), store(root / "shards", root / "maps")
    train_zoomer(shards, maps, root / "zoomer", ZoomerConfig(num_blocks=2, width=8, image_size=SIDE, train=LOOP))
    train_vit(
        shards, root / "plain", VitConfig(model="deit_tiny_patch16_224", model_args=BODY, image_size=SIDE, train=LOOP)
    )
    zoom = VitConfig(model="zoomvit_tiny_patch16_224", model_args=BODY, image_size=SIDE, train=LOOP)
    zoom = replace(zoom, zoom_draw="budget", max_zoomed=8, init_from=str(root / "plain"))
    train_vit(shards, root / "zoom", zoom, zoomer=root / "zoomer")
    return root


def launch(name, run, shards, config, **inputs):
    return run_study(name, StudyInputs(run=run, shards=shards, **inputs), config)


def study(data, name, run="zoom", config=CONFIG, **inputs):
    path, rows, notes = launch(name, data / run, data / "shards", config, **inputs)
    about, read = read_results(path)
    assert read == rows and about["study"] == name and about["title"] == STUDIES[name].title
    assert pq.read_table(path.with_suffix(".parquet")).num_rows == len(rows)
    return rows, notes


def values(rows, metric, *names):
    """The values of a metric by the settings `names`, which must identify them."""
    found = [(tuple(row.setting.get(name) for name in names), row.value) for row in rows if row.metric == metric]
    assert len(dict(found)) == len(found)
    return dict(found)


def test_pruning(data):
    rows, _ = study(data, "pruning")
    tokens = values(rows, "tokens", "prune", "keep")
    longest = GRID * GRID + 3 * 8
    assert tokens.pop((None, None)) == longest
    kinds, keeps = {kind for kind, _ in tokens}, {keep for _, keep in tokens}
    assert len(kinds) == 6 and len(keeps) == 5
    for (kind, keep), count in tokens.items():
        least = {"backward": 0, "forward": 0}.get(kind, 4 * 8 if kind.endswith("rest") else longest - 4 * 8)
        assert count == max(keep, least)
    top1 = values(rows, "top1", "prune", "keep")
    config = replace(CONFIG.evaluation, budgets=(8,), keeps=(min(keeps),), prune="forward")
    row = evaluate(data / "zoom", data / "shards", config)["rows"][1]
    assert row["keep"] == min(keeps) and row["prune"] == "forward"
    assert top1["forward", min(keeps)] == pytest.approx(row["top1"])
    macs = values(rows, "gmacs", "prune", "keep")
    assert macs["backward", min(keeps)] == pytest.approx(row["gmacs"], rel=0.2) and macs[None, None] == max(
        macs.values()
    )


def test_zoom_factor_embeddings_and_what_is_trained(data):
    rows, _ = study(data, "zfe")
    trained = sorted(path.name for path in (data / "zoom" / "studies" / "zfe").iterdir())
    assert trained == ["fixed-seed-0", "none-seed-0"]  # the finished run has the soft one
    assert load_run(data / "zoom" / "studies" / "zfe" / "none-seed-0").model.zfe == "none"
    top1 = values(rows, "top1", "zfe", "budget")
    assert {kind for kind, _ in top1} == {"none", "fixed", "soft"} and {budget for _, budget in top1} == {0, 2, 4, 6, 8}
    stamps = {path: path.stat().st_mtime_ns for path in (data / "zoom" / "studies").rglob("*.safetensors")}
    again, _ = study(data, "zfe")
    assert stamps == {path: path.stat().st_mtime_ns for path in (data / "zoom" / "studies").rglob("*.safetensors")}
    assert values(again, "top1", "zfe", "budget") == top1


def test_seeds_are_runs_of_their_own(data):
    config = replace(CONFIG, seeds=(0, 5), epochs=0.25)
    rows, _ = study(data, "zoom-in-training", config=config)
    assert {(row.setting["zoom in training"], row.seed) for row in rows} == set(
        itertools.product(("random", "fixed-4", "fixed-8"), (0, 5))
    )
    settings = load_run(data / "zoom" / "studies" / "zoom-in-training" / "fixed-4-seed-5").settings
    assert settings["fixed_zoom"] == 4 and settings["train"]["seed"] == 5 and settings["train"]["epochs"] == 0.25
    assert settings["zoomer"] == str(data / "zoomer")


@pytest.mark.slow  # Ray starts and ends
def test_two_processes_train_what_one_does(data, tmp_path):
    found = []
    for count in (1, 2):
        run = tmp_path / str(count)
        shutil.copytree(data / "zoom", run, ignore=shutil.ignore_patterns("studies", "results"))
        wanted = replace(CONFIG, workers=Workers(count=count))
        found.append(values(launch("alpha-eta", run, data / "shards", wanted)[1], "top1", "eta", "budget"))
    one, two = found
    assert one.keys() == two.keys()
    assert all(two[setting] == pytest.approx(top1, abs=2 / COUNT) for setting, top1 in one.items())


def test_both_zoom_factors(data):
    rows, _ = study(data, "alpha-eta")
    tokens = values(rows, "tokens", "eta", "budget")
    assert {budget for eta, budget in tokens if eta == 2.0} == {0, 2, 4, 6, 8}
    assert tokens[2.0, 8] == 16 + 24 and tokens[0.5, 0] == 4 and tokens[0.5, 2] == 4 + 6


def test_score_sources_cost_the_same_and_say_what_is_left_out(data):
    rows, notes = study(data, "score-sources", maps=data / "maps")
    tokens = values(rows, "tokens", "scores", "trained with", "budget")
    assert all(count == 16 + 3 * budget for (*_, budget), count in tokens.items())
    pairs = {names[:2] for names in tokens}
    assert {
        ("zoomer", "zoomer"),
        ("maps", "zoomer"),
        ("random", "zoomer"),
        ("random", "random"),
        ("entropy", "entropy"),
    } <= pairs
    assert any(note.startswith("maps: in evaluation only") for note in notes)
    _, notes = study(data, "score-sources")
    assert any(note.startswith("maps: left out, without --maps") for note in notes)


def test_zoomers_of_every_depth(data):
    rows, _ = study(data, "zoomer-depth", maps=data / "maps")
    weights = values(rows, "parameters", "blocks")
    for (blocks,), count in weights.items():
        run = data / ("zoomer" if blocks == 2 else f"zoom/studies/zoomer-depth/blocks-{blocks}-seed-0")
        assert count == sum(weight.numel() for weight in load_run(run).model.parameters())
        (row,) = evaluate(run, data / "shards", CONFIG.evaluation, maps=data / "maps")["rows"]
        assert values(rows, "mse", "blocks")[blocks,] == pytest.approx(row["mse"])
    assert sorted(weights) == [(2,), (4,), (6,)] and weights[2,] < weights[4,] < weights[6,]
    assert set(values(rows, "top1", "blocks", "budget")) == set(itertools.product((2, 4, 6), (0, 2, 4, 6, 8)))
    with pytest.raises(UsageError, match="give --maps"):
        launch("zoomer-depth", data / "zoom", data / "shards", CONFIG)


def test_a_plain_vit_that_zooms_is_itself_where_nothing_is_zoomed(data):
    plain = load_run(data / "plain").model
    images = torch.randn(3, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = plain(images)
        assert torch.allclose(zooming_twin(plain, SIDE, 2.0)(images), expected, atol=1e-5)
        everything = torch.ones(3, GRID * GRID)
        assert torch.allclose(zooming_twin(plain, SIDE, 0.5)(images, everything, alpha=0.0), expected, atol=1e-5)
    rows, _ = study(data, "test-time-zoom", "plain", zoomer=data / "zoomer")
    top1 = values(rows, "top1", "zoom", "eta", "alpha")
    # Rounding may change the answer to an image with two nearly equal logits.
    assert top1["at test time", 2.0, 1.0] == pytest.approx(top1["none", None, None], abs=1.01 / COUNT)
    with pytest.raises(UsageError, match="give --zoomer RUN"):
        launch("test-time-zoom", data / "plain", data / "shards", CONFIG)
    with pytest.raises(UsageError, match="zooms with a plain ViT"):
        launch("test-time-zoom", data / "zoom", data / "shards", CONFIG, zoomer=data / "zoomer")


def test_what_is_trained_is_normalised_as_the_run_is(data, tmp_path):
    """Otherwise two things would differ: without the frozen zoomer, --init-from determines the normalisation."""
    begun = Path(shutil.copytree(data / "plain", tmp_path / "begun"))
    config = json.loads((begun / "config.json").read_text())
    config["pretrained_cfg"] |= {"mean": [0.5] * 3, "std": [0.25] * 3}
    (begun / "config.json").write_text(json.dumps(config))
    zoom = rebuild(VitConfig(), load_run(data / "zoom").settings)
    zoom = replace(zoom, init_from=str(begun), mean=None, std=None)
    train_vit(data / "shards", tmp_path / "zoom", zoom, zoomer=data / "zoomer")
    wanted = load_run(tmp_path / "zoom").preprocessing
    assert wanted == load_run(data / "zoom").preprocessing
    config = replace(CONFIG, seeds=(1,), evaluation=replace(CONFIG.evaluation, budgets=(4,)))
    launch("score-sources", tmp_path / "zoom", data / "shards", config)
    trained = sorted((tmp_path / "zoom" / "studies" / "score-sources").glob("centre-*"))
    assert trained and all(load_run(path).preprocessing == wanted for path in trained)
    with pytest.raises(UsageError, match="--zoomer: was trained with mean"):
        launch("test-time-zoom", begun, data / "shards", CONFIG, zoomer=data / "zoomer")


@pytest.mark.parametrize(
    ("name", "options", "changes", "message"),
    [
        ("pruning", {}, {"seeds": (1,)}, "--seeds: study pruning has no use for it"),
        ("errors", {}, {"epochs": 3.0}, "--epochs"),
        ("errors", {}, {"workers": Workers(count=2)}, "--num-workers"),
        ("zfe", {"zoomer": Path("zoomer")}, {}, "--zoomer: study zfe"),
        ("zfe", {}, {"evaluation": EvalConfig(target_gmacs=1.0)}, "--target-gmacs"),
        ("zfe", {}, {"evaluation": EvalConfig(calibration=Path("shards"))}, "--calibration"),
    ],
)
def test_what_a_study_has_no_use_for_is_refused(data, name, options, changes, message):
    with pytest.raises(UsageError, match=message):
        launch(name, data / "zoom", data / "shards", replace(CONFIG, **changes), **options)


@pytest.mark.parametrize(("name", "run"), [("nine-crops", "plain"), ("errors", "zoom")])
def test_studies_in_half_precision(data, name, run):
    low = replace(CONFIG, evaluation=replace(CONFIG.evaluation, precision="bf16"))
    with torch.no_grad(), expect_autocast() as seen:
        rows, _ = study(data, name, run, low)
    in_float32 = {width for width, dtype in seen if dtype == torch.float32}
    assert in_float32 == ({GRID**2} if run == "zoom" else set())  # the zoomer's scores
    assert {dtype for _, dtype in seen} - {torch.float32} == {torch.bfloat16} and rows


def test_zoomers_in_half_precision(data):
    low = replace(CONFIG, evaluation=replace(CONFIG.evaluation, precision="bf16"))
    rows, _ = study(data, "zoomer-depth", "zoomer", low, maps=data / "maps")
    assert {row.setting.get("precision") for row in rows} == {"bf16"}
    config = EvalConfig(batch_size=16, device="cpu")
    usual, lowered = (
        evaluate(data / "zoomer", data / "shards", each, maps=data / "maps")["rows"][0]
        for each in (config, replace(config, precision="bf16"))
    )
    assert "precision" not in usual and lowered["precision"] == "bf16"
    assert lowered["mse"] != usual["mse"] and lowered["mse"] == pytest.approx(usual["mse"], rel=0.05)
    with pytest.raises(UsageError, match="--precision int8: choose"):
        evaluate(data / "zoomer", data / "shards", replace(config, precision="int8"), maps=data / "maps")


@contextmanager
def expect_autocast():
    """Collect widths and dtypes of the outputs of linear layers."""
    seen = []

    def look(module, given, out):
        if isinstance(module, torch.nn.Linear) and len(out) > 1:  # multiply-adds are counted on one image, in float32
            seen.append((out.shape[-1], out.dtype))

    handle = torch.nn.modules.module.register_module_forward_hook(look)
    try:
        yield seen
    finally:
        handle.remove()


@pytest.mark.parametrize("run", ["plain", "zoom"])
@torch.no_grad()
def test_nine_crops(data, run):
    rows, _ = study(data, "nine-crops", run)
    top1 = values(rows, "top1", "view")
    opened = load_run(data / run)
    large = round(SIDE * 384 / 224)
    loader = RelevanceLoader(data / "shards", batch_size=COUNT, image_size=large, augment="eval")
    (batch,) = list(loader)
    images = opened.preprocessing.normalise(batch["image"])
    right = []
    for top in (0, round((large - SIDE) / 2), large - SIDE):
        for left in (0, round((large - SIDE) / 2), large - SIDE):
            crop = images[:, :, top : top + SIDE, left : left + SIDE]
            logits = opened.model(crop) if run == "plain" else opened.model(crop, opened.zoomer(crop), budget=4)
            right.append(logits.argmax(1) == batch["label"])
    right = torch.stack(right)
    assert top1["any of 9",] == pytest.approx(float(right.any(0).float().mean()))
    assert top1["centre of 9",] == pytest.approx(float(right[4].float().mean()))
    macs = values(rows, "gmacs", "view")
    assert macs["any of 9",] == pytest.approx(9 * macs["whole image",])


def test_sizes_of_the_backbone(data):
    rows, _ = study(data, "backbone-size")
    assert {row.setting["backbone"] for row in rows} == {"width 12", "width 24", "width 48"}
    assert load_run(data / "zoom/studies/backbone-size/width-48-seed-0").model.embed_dim == 48


@pytest.mark.parametrize("boxes", [True, False], ids=["boxes", "maps"])
@torch.no_grad()
def test_errors_are_told_apart_by_what_was_zoomed(data, tmp_path, boxes, monkeypatch):
    if not boxes:
        without = RelevanceLoader.__iter__

        def iterate(self):
            for batch in without(self):
                batch.pop("object_box")
                yield batch

        monkeypatch.setattr(RelevanceLoader, "__iter__", iterate)
    rows, _ = study(data, "errors", maps=None if boxes else data / "maps")
    samples = json.loads((data / "zoom/results/errors_samples.json").read_text())["samples"]
    assert (data / "zoom/results/errors.png").stat().st_size > 1000
    opened = load_run(data / "zoom")
    (batch,) = list(RelevanceLoader(data / "shards", data / "maps", batch_size=COUNT, image_size=SIDE, augment="eval"))
    images = opened.preprocessing.normalise(batch["image"])
    scores = opened.zoomer(images)
    predicted = opened.model(images, scores, budget=4).argmax(1)
    assert [sample["key"] for sample in samples] == batch["key"]
    for row, sample in enumerate(samples):
        chosen = set(scores[row].argsort(descending=True, stable=True)[:4].tolist())
        if boxes:
            x1, y1, x2, y2 = batch["object_box"][row].double().tolist()
            # The fraction of the points of a fine raster in the box that lie in zoomed cells.
            ticks = (np.arange(800) + 0.5) / 800
            xs, ys = ticks[(ticks > x1) & (ticks < x2)], ticks[(ticks > y1) & (ticks < y2)]
            cells = [int(y * GRID) * GRID + int(x * GRID) for y in ys[::4] for x in xs[::4]]
            seen = np.mean([cell in chosen for cell in cells])
        else:
            mass = batch["relevance"][row].flatten()
            seen = float(mass[list(chosen)].sum() / mass.sort(descending=True).values[:4].sum())
        assert sample["seen"] == pytest.approx(seen, abs=0.03 if boxes else 1e-5)
        assert sample["predicted"] == int(predicted[row])
        wrong = int(predicted[row]) != int(batch["label"][row])
        assert sample["kind"] == ("right" if not wrong else "zoomer" if sample["seen"] < 0.5 else "backbone")
    shares = values(rows, "share_of_errors", "kind")
    wrong = [sample for sample in samples if sample["kind"] != "right"]
    assert shares["zoomer",] == sum(sample["kind"] == "zoomer" for sample in wrong) / len(wrong)
    assert shares["zoomer",] + shares["backbone",] == 1


@pytest.mark.parametrize(
    ("name", "run", "message"),
    [
        ("tables", "zoom", "study tables: choose one of alpha-eta"),
        ("pruning", "plain", "plain: study pruning needs a zoomvit_* run"),
        ("zfe", "zoomer", "zoomer: study zfe needs a zoomvit_* run"),
        ("errors", "plain", "needs a zoomvit_* run"),
    ],
)
def test_wrong_usage(data, name, run, message):
    with pytest.raises(UsageError) as error:
        launch(name, data / run, data / "shards", CONFIG)
    assert message in str(error.value) and "\n" not in str(error.value)


# ------------------------------------------------------------------------------------------------------ results files


def test_results_come_back_as_they_were(tmp_path):
    rows = [
        Result(
            study="s",
            run="r",
            model="m",
            setting={"alpha": 0.1, "budget": 3},
            seed=1,
            metric="top1",
            n=9,
            value=0.5,
            low=0.2,
            high=0.8,
        ),
        Result(study="s", run="r", model="m", setting={"budget": "2 GMACs"}, metric="gmacs", n=1, value=2.0),
    ]
    path = write_study(tmp_path, {"study": "s", "title": "a title", "shards": "shards"}, rows)
    assert read_results(path)[1] == rows
    table = pq.read_table(path.with_suffix(".parquet")).to_pylist()
    assert [line["setting.alpha"] for line in table] == [0.1, None]
    assert [line["setting.budget"] for line in table] == ["3", "2 GMACs"]
    assert wide(rows)[0] == {"run": "r", "alpha": 0.1, "budget": 3, "seed": 1, "top1": 0.5, "gmacs": None}
    for text in (
        "{}",
        '{"format": "zpipe-results", "version": 99, "rows": []}',
        '{"format": "zpipe-results", "version": 1, "rows": [{"x": 1}]}',
        "[",
    ):
        path.write_text(text)
        with pytest.raises(ZpipeError, match=r"s\.json: (not|is)"):
            read_results(path)


@pytest.mark.parametrize(
    ("right", "n", "low", "high"),
    [(0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (5, 10, 0.2366, 0.7634), (81, 263, 0.2553, 0.3662)],
)
def test_wilsons_interval(right, n, low, high):
    """81 of 263 is an example of Newcombe 1998, Table I; the other values are of the closed form."""
    assert wilson(right, n) == pytest.approx((low, high), abs=5e-5)
