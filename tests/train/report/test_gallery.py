"""The gallery: its data are what the models answer, and its patches those of the models."""

from __future__ import annotations

import base64
import json
import shutil
from dataclasses import replace

import pyarrow.parquet as pq
import pytest
import torch
from report_page import CONFIG, COUNT, LOOP, embedded, status
from tiny import BODY, GRID, SIDE

from zpipe.schemas.atomic import write_json
from zpipe.schemas.errors import UsageError
from zpipe.schemas.manifest import read_manifest, write_manifest
from zpipe.schemas.relevance_store import index_path
from zpipe.schemas.shard_index import INDEX_NAME, digest_file
from zpipe.train.checkpoint import load_run, save_model
from zpipe.train.data.loader import RelevanceLoader
from zpipe.train.evaluation.evaluate import evaluate
from zpipe.train.evaluation.operating_points import EvalConfig
from zpipe.train.evaluation.predict import Classifier, PredictConfig
from zpipe.train.fit.initialise import build_vit
from zpipe.train.fit.train_vit import VitConfig, train_vit
from zpipe.train.models import zoom_tokens
from zpipe.train.report import report
from zpipe.train.scoring import SOURCES

pytestmark = pytest.mark.usefixtures("one_thread")


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
        index = json.loads((other / INDEX_NAME).read_bytes())
        index["classes"] = [f"{name} {n}" for n in range(classes)]
        write_json(other / INDEX_NAME, index)
        run = shutil.copytree(data / "plain", tmp_path / name)
        record = json.loads((run / "run.json").read_bytes())
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


# -- in a browser ------------------------------------------------------------------------------------------------------


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
        record = json.loads((run / "run.json").read_bytes())
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
    provenance = replace(manifest.provenance, target=target)
    shards = []
    for shard in manifest.shards:
        path = index_path(maps, shard.stem)
        table = pq.read_table(path)
        seal = table.schema.metadata | {b"fingerprint": provenance.fingerprint().encode()}
        pq.write_table(table.replace_schema_metadata(seal), path)
        shards.append(replace(shard, index_sha256=digest_file(path)))
    write_manifest(maps, replace(manifest, provenance=provenance, shards=tuple(shards)))
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
