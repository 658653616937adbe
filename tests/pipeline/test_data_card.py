"""The data card of a published store: its front matter parses, its numbers are those of the store."""

import re
from dataclasses import replace

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

import zpipe
from zpipe.pipeline.data_card import data_card
from zpipe.pipeline.inspection import store_statistics

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
@given(source=st.text(max_size=40), weights=st.text(max_size=40), license=st.none() | st.text(min_size=1, max_size=20))
def test_whatever_names_are_they_stay_text(statistics, source, weights, license):
    """A store may have been pulled from anybody: its texts end neither the front matter nor a row of a table."""
    provenance = replace(statistics.manifest.provenance, weights=weights)
    manifest = replace(statistics.manifest, source=source, provenance=provenance)
    card = data_card(replace(statistics, manifest=manifest), ADDRESS, license=license)
    front, rows = parts(card)
    assert front["size_categories"] == ["n<1K"] and rows["grid"] == "4 x 6 cells"
    assert "<" not in card.split("---\n", 2)[2].replace("&lt;", "").replace("n<", "")
