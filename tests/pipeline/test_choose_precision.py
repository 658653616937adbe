"""`--precision auto`: what is chosen from measured errors and costs, and what an extraction makes of it."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from zpipe.pipeline import extract as extraction
from zpipe.pipeline.choose_precision import NEARLY, QUANTILES, Measured, decide
from zpipe.pipeline.explainer import PRECISIONS, ExplainConfig, precisions_of
from zpipe.schemas.errors import UsageError, ZpipeError
from zpipe.schemas.manifest import read_manifest

pytestmark = pytest.mark.usefixtures("one_thread")

EXACT = Measured(errors=np.zeros(16), seconds=1.0)
NOISE = np.linspace(0.01, 0.04, 16)
AUTO = ExplainConfig(precision="auto", method="gradient-attention")


def uniform(error, seconds):
    return Measured(errors=np.full(16, error), seconds=seconds)


def test_the_cheapest_precision_below_the_noise_is_chosen():
    measured = {"float64": EXACT, "float32": uniform(1e-4, 0.5), "float32+bfloat16": uniform(1e-3, 0.3)}
    assert decide(measured, NOISE) == "float32+bfloat16"
    assert decide(measured, NOISE / 100) == "float32"
    assert decide(measured, NOISE / 1e4) == "float64"


def test_a_method_with_heavy_rounding_errors_keeps_float64_where_they_arise():
    measured = {"float64": EXACT, "float32": uniform(0.1, 0.5), "float64+float32": uniform(1e-3, 0.8)}
    assert decide(measured, NOISE) == "float64+float32"


def test_a_precision_that_spoils_a_few_maps_is_not_chosen_for_its_median():
    few, one = np.full(16, 1e-4), np.full(16, 1e-4)
    few[:3], one[:1] = 0.5, 0.5
    cheap = {"float64": EXACT, "float32": Measured(errors=few, seconds=0.5)}
    assert decide(cheap, NOISE) == "float64"
    assert decide(cheap | {"float32": Measured(errors=one, seconds=0.5)}, NOISE) == "float32"
    lost = np.where(few > 0.1, np.inf, few)  # only float64 has a map of these images
    assert decide(cheap | {"float32": Measured(errors=lost, seconds=0.5)}, NOISE) == "float64"


def test_of_nearly_equal_costs_the_more_exact_is_chosen():
    measured = {"float64": uniform(0, 1.2), "float32": uniform(5e-3, 0.95), "float64+float32": uniform(2e-3, 0.98)}
    assert decide(measured, NOISE) == "float64+float32"
    assert decide(measured | {"float64": uniform(0, 1.0)}, NOISE) == "float64"  # the only one with negligible errors


@pytest.mark.parametrize("seconds", [0.92, 1.0, 1.06])
def test_of_nearly_equal_costs_and_negligible_errors_the_fewest_bits_are_chosen(seconds):
    measured = {"float64": EXACT, "float32": uniform(1e-6, seconds), "float64+float32": uniform(1e-7, 0.98)}
    assert decide(measured, NOISE) == "float32"
    assert decide(measured | {"bfloat16": uniform(1e-4, 1.0)}, NOISE) == "bfloat16"
    assert decide(measured | {"bfloat16": uniform(5e-3, 1.0)}, NOISE) == "float32"


@given(
    st.lists(st.tuples(st.floats(0, 1), st.floats(1e-3, 10)), max_size=len(PRECISIONS) - 1),
    st.lists(st.floats(0, 1), min_size=1, max_size=20),
)
def test_the_choice_is_below_the_noise_and_hardly_dearer_than_any_other_that_is(others, noise):
    bounds = np.quantile(noise, QUANTILES, method="higher")
    measured = {"float64": EXACT}
    names = [name for name in PRECISIONS if name != "float64"]
    measured |= {name: uniform(*facts) for name, facts in zip(names, others, strict=False)}
    chosen = measured[decide(measured, np.array(noise))]
    below = [each for each in measured.values() if (np.quantile(each.errors, QUANTILES) <= bounds).all()]
    assert any(chosen is each for each in below)
    assert chosen.seconds <= NEARLY * min(each.seconds for each in below)


def test_the_candidates_are_those_of_method_and_device():
    assert "float32+tf32" in precisions_of("transformer-attribution")
    assert "float32+tf32" not in precisions_of("transformer-attribution", "cpu")
    assert all("+" not in name for name in precisions_of("rollout"))
    assert {"float32", "float64"} <= set(precisions_of("rollout", "cpu"))


def test_an_extraction_measures_and_records_its_choice(extract, shards, tmp_path, contents):
    report = extract(shards, tmp_path / "auto", explain=AUTO)
    chosen = read_manifest(tmp_path / "auto").provenance.precision
    assert chosen in precisions_of(AUTO.method, "cpu") and report.provenance.precision == chosen
    (note,) = (note for note in report.notes if "--precision auto" in note)
    assert f"--precision auto: {chosen}; " in note and "noise of the method" in note and "\n" not in note
    extract(shards, tmp_path / "named", explain=ExplainConfig(precision=chosen, method=AUTO.method))
    assert contents(tmp_path / "auto") == contents(tmp_path / "named")


@pytest.mark.parametrize("precision", ["float64", "float32"])
def test_a_resumed_extraction_keeps_the_precision_that_it_began_with(precision, extract, shards, tmp_path):
    out, named = tmp_path / "store", ExplainConfig(precision=precision, method=AUTO.method)
    extract(shards, out, explain=named)
    (out / "index" / "shard-00001.parquet").unlink()
    if precision == "float64":
        (out / "extraction.json").unlink()  # the manifest says it, too
    report = extract(shards, out, explain=AUTO)
    assert report.extracted == 1 and report.provenance.precision == precision
    assert f"--precision auto: {precision}, with which {out} was begun" in report.notes
    with pytest.raises(ZpipeError, match="made with method = "):
        extract(shards, out, explain=ExplainConfig(precision="auto", method="rollout"))


def test_a_replacement_is_measured_anew(extract, shards, tmp_path):
    named = ExplainConfig(precision="float64", method="rollout")
    extract(shards, tmp_path / "store", explain=named)
    report = extract(shards, tmp_path / "store", explain=AUTO, replace=True)
    assert any("noise of the method" in note for note in report.notes)


def test_nothing_is_measured_for_machines_elsewhere(extract, shards, tmp_path, monkeypatch):
    monkeypatch.setattr(extraction, "device_of_cluster", lambda address: "cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UsageError, match="--precision auto: measures where the command runs, and this machine has no"):
        extract(shards, tmp_path / "store", explain=AUTO, executor="ray", address="ray://nowhere:1", device="auto")
