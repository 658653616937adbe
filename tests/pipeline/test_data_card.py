"""The data card of a published store: its front matter parses, its numbers are those of the store."""

import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
import yaml
from hub_stores import SHAPES, saved
from hypothesis import given, settings
from hypothesis import strategies as st

import zpipe
from zpipe.pipeline.data_card import data_card
from zpipe.pipeline.inspection import store_statistics
from zpipe.train.data.loader import RelevanceLoader

ADDRESS = "hf://datasets/me/maps"


@pytest.fixture(scope="module")
def statistics(store):
    return store_statistics(store)


def parts(card):
    """The front matter, and the rows of all tables by their first cell."""
    _, front, text = card.split("---\n", 2)
    rows = re.findall(r"^\| (.*?) \| (.*) \|$", text, re.MULTILINE)
    return yaml.safe_load(front), {name: re.sub(r"\\(.)", r"\1", value) for name, value in rows}


def test_the_front_matter(statistics):
    front, _ = parts(data_card(statistics, ADDRESS, license="cc-by-4.0"))
    assert front["license"] == "cc-by-4.0" and front["size_categories"] == ["n<1K"]
    assert {"zpipe", "relevance-maps"} <= set(front["tags"]) and "deit_tiny_patch16_224" in front["pretty_name"]
    assert front["configs"] == [{"config_name": "index", "data_files": "index/*.parquet"}]
    card = data_card(statistics, ADDRESS)
    assert "license" not in parts(card)[0] and "No licence is stated" in card


def test_its_numbers_are_those_of_the_store(store, statistics):
    _, rows = parts(data_card(statistics, ADDRESS))
    table, origin = zpipe.open_maps(store).table(), statistics.manifest.provenance
    assert rows["maps"] == f"{len(table)} ({len(table)} ok) in 4 shards"
    assert rows["weights"] == f"random, SHA-256 {origin.teacher_digest}"
    assert rows["grid"] == "4 x 6 cells" and rows["input"].startswith("96 x 64 pixels, bicubic")
    assert rows["method"].startswith(origin.method) and rows["target class"] == origin.target
    assert rows["frame"].startswith(origin.frame) and rows["fingerprint"] == origin.fingerprint()
    assert "img_size=[64, 96]" in rows["teacher"] and "5 classes" in rows["teacher"]
    hits = np.mean(table["label"].to_numpy() == table["predicted"].to_numpy())
    assert float(rows["teacher's top-1"].rstrip("%")) == pytest.approx(100 * hits, abs=0.05)
    for name, column in (("entropy", "entropy"), ("top-10 % mass", "top10_mass")):
        found = [float(value) for value in rows[name].split(", ")]
        assert found == pytest.approx(np.quantile(table[column].to_numpy(), (0.05, 0.25, 0.5, 0.75, 0.95)), rel=0.01)
    size = sum(path.stat().st_size for path in store.rglob("*") if path.is_file())
    assert float(rows["bytes a sample"]) == pytest.approx(size / 18, abs=0.51)


def test_it_says_how_to_get_and_join_the_maps(statistics):
    card = data_card(statistics, ADDRESS)
    for said in (f"zpipe maps pull {ADDRESS} maps", 'zpipe.open_maps("maps")', 'join="image"', "--join image"):
        assert said in card


def runs_as_it_says(card, shards):
    """Run the code of a card in a folder that holds the store as `maps`."""
    namespace = {"shards": shards, "RelevanceLoader": RelevanceLoader}
    exec(re.search(r"```python\n(.*?)```", card, re.DOTALL)[1], namespace)
    loader = eval(re.search(r"`(RelevanceLoader\(.*?\))`", card)[1], namespace)
    assert len(namespace["maps"]) == 18
    return loader


def test_its_examples_run(store, shards, statistics, tmp_path, monkeypatch, capsys):
    shutil.copytree(store, tmp_path / "maps")
    monkeypatch.chdir(tmp_path)
    runs_as_it_says(data_card(statistics, ADDRESS), shards)
    assert "(4, 6)" in capsys.readouterr().out


@pytest.mark.parametrize("kind", SHAPES)
def test_of_tensors_without_a_teacher_it_says_no_more_than_is_true(shards, tmp_path, monkeypatch, capsys, kind):
    monkeypatch.chdir(tmp_path)
    card = data_card(store_statistics(saved(shards, tmp_path / "maps", kind)), ADDRESS)
    runs_as_it_says(card, shards)
    assert str(SHAPES[kind]) in capsys.readouterr().out
    front, rows = parts(card)
    assert front["tags"] == ["zpipe"] and "task_categories" not in front
    assert not re.search("teacher|relevance map|transformer|extract-|explain", card) and "save_tensors" in card
    assert ("entropy" in card.lower()) == (kind in ("map", "class-maps")) and ("grid" in rows) == (kind != "vector")
    assert ("log10 of the scale" in rows) == (kind != "label-map")
    if kind != "map":
        assert rows["shape"] == " x ".join(map(str, SHAPES[kind])) + (", int32" if kind == "label-map" else ", float16")


@pytest.mark.parametrize(
    ("kind", "shape", "method", "title"),
    [
        ("vector", (10,), "logits", "Logits of deit_tiny_patch16_224 on"),
        ("features", (4, 6, 24), "features", "Features of deit_tiny_patch16_224 on"),
        ("class-maps", (3, 4, 6), "transformer-attribution", "Relevance maps of deit_tiny_patch16_224 on"),
    ],
)
def test_other_tensors_of_a_teacher(statistics, kind, shape, method, title):
    provenance = replace(statistics.manifest.provenance, kind=kind, shape=shape, method=method)
    card = data_card(replace(statistics, manifest=replace(statistics.manifest, provenance=provenance)), ADDRESS)
    front, rows = parts(card)
    assert front["pretty_name"].startswith(title) and "5 classes" in rows["teacher"]
    is_relevance = kind == "class-maps"
    assert ("method" in rows) == ("target class" in rows) == ("entropy" in rows) == is_relevance
    assert ("`targets`" in card) == ("3 relevance maps per image" in card) == is_relevance
    assert "frozen vision transformer" in card and "zpipe extract-teacher-maps" in card


def test_the_stores_inside_are_listed(statistics):
    provenance = replace(statistics.manifest.provenance, kind="vector", shape=(5,), method="logits")
    inner = {"logits": replace(statistics.manifest, provenance=provenance)}
    _, rows = parts(data_card(statistics, ADDRESS, inner=inner))
    assert rows["`logits`"] == "18 vectors of 5, method logits"


def test_an_index_without_digests_is_joined_by_key_alone(statistics):
    card = data_card(statistics, ADDRESS, has_digests=False)
    assert "by the keys" in card and "join image" not in card and "`image_digest`" not in card
    assert "`image_digest`" in data_card(statistics, ADDRESS)


@pytest.mark.parametrize(
    ("count", "category"),
    [
        (0, "n<1K"),
        (999, "n<1K"),
        (1000, "1K<n<10K"),
        (50_000, "10K<n<100K"),
        (1_281_167, "1M<n<10M"),
        (14_000_000, "10M<n<100M"),
        (3 * 10**9, "1B<n<10B"),
    ],
)
def test_size_categories_are_the_words_of_the_hub(statistics, count, category):
    shard = replace(statistics.manifest.shards[0], count=count)
    manifest = replace(statistics.manifest, shards=(shard,))
    assert parts(data_card(replace(statistics, manifest=manifest), ADDRESS))[0]["size_categories"] == [category]


@settings(deadline=None, max_examples=60)
@given(
    source=st.text(max_size=40),
    weights=st.text(max_size=40),
    license=st.none() | st.text(min_size=1, max_size=20),
    changes=st.just({}) | st.builds(dict, teacher=st.just(""), method=st.text(min_size=1, max_size=40)),
)
def test_whatever_names_are_they_stay_text(statistics, source, weights, license, changes):
    """A store may have been pulled from anybody: its texts end neither the front matter nor a row of a table."""
    provenance = replace(statistics.manifest.provenance, weights=weights, **changes)
    manifest = replace(statistics.manifest, source=source, provenance=provenance)
    card = data_card(replace(statistics, manifest=manifest), ADDRESS, license=license)
    front, rows = parts(card)
    assert front["size_categories"] == ["n<1K"] and rows["grid"] == "4 x 6 cells"
    assert "<" not in card.split("---\n", 2)[2].replace("&lt;", "").replace("n<", "")
