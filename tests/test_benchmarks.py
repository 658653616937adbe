"""What benchmarks/run.py compares and calls worse, and the format that benchmarks write. Nothing is timed."""

import copy
import importlib.util
import json
import re
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def run():
    spec = importlib.util.spec_from_file_location("benchmarks_run", FOLDER / "run.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look up their module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.fixture
def last(run):
    ratios = {"models": {"eta=2": [1.0, 1.02, 0.98, 1.01]}, "store": {"verify": [0.5, 0.52, 0.49]}}
    settings = {name: run.arguments(name, quick=True, threads=2, device="cpu") for name in ratios}
    return {
        "machine": run.machine(quick=True, threads=2, device="cpu", notes=[]),
        "settings": settings,
        "ratios": ratios,
    }


def test_worse_is_a_fall_that_neither_spread_explains(run):
    old = [1.0, 1.02, 0.98, 1.01, 0.99]
    assert run.got_worse(old, [0.80, 0.81, 0.79, 0.80, 0.82]) == pytest.approx(0.2)
    assert (
        run.got_worse(old, [0.90, 0.91, 0.89, 0.90, 0.92]) is None
    )  # the ranges do not overlap, but it is only a tenth lower
    assert run.got_worse(old, [0.80, 0.50, 1.10, 0.79, 1.05]) is None  # the new range reaches up into the old one
    assert run.got_worse([1.0, 0.6, 1.3, 0.7, 1.2], [0.80] * 5) is None  # the old range reaches down into the new one
    assert run.got_worse(old, [2.0] * 5) is None and run.got_worse(old, old) is None


def test_one_disturbed_round_hides_no_loss(run):
    assert run.got_worse([1.0, 1.0, 1.0, 1.0, 0.5], [0.7, 0.7, 0.7, 0.7, 1.2]) == pytest.approx(0.3)


def test_fewer_than_three_rounds_show_no_spread(run):
    assert run.got_worse([1.0, 1.0], [0.1, 0.1, 0.1]) is None
    assert run.got_worse([1.0, 1.0, 1.0], [0.1]) is None


def test_what_got_worse_is_named_with_both_spreads_and_ends_with_1(run, last, capsys):
    new = copy.deepcopy(last)
    new["ratios"]["store"]["verify"] = [0.25, 0.26, 0.24]
    assert run.check(last, new) == 1
    printed = capsys.readouterr().out
    assert re.search(
        r"store: verify: 50% worse, 0\.500 \[0\.490, 0\.520\] on .*, 0\.250 \[0\.240, 0\.260\] now", printed
    )
    assert "models" not in printed
    assert run.check(last, last) == 0 and "nothing got worse" in capsys.readouterr().out


@pytest.mark.parametrize(("name", "value"), [("cpu", "abacus"), ("cores", 64), ("quick", False), ("threads", 1)])
def test_another_machine_is_not_compared(run, last, capsys, name, value):
    new = copy.deepcopy(last)
    new["machine"][name] = value
    new["ratios"]["store"]["verify"] = [0.1, 0.1, 0.1]
    assert run.check(last, new) == 2
    printed = capsys.readouterr().out
    assert "not comparable" in printed and f"{name}: " in printed and "worse" not in printed


def test_other_settings_are_not_compared_and_other_versions_are_told(run, last, capsys):
    new = copy.deepcopy(last)
    new["settings"]["store"][-1] = "77"
    assert run.check(last, new) == 2 and "settings of store" in capsys.readouterr().out
    new = copy.deepcopy(last)
    new["machine"]["versions"]["numpy"] = "0.1"
    assert run.check(last, new) == 0 and "numpy is 0.1 now" in capsys.readouterr().out


def test_what_only_one_run_has_is_said(run, last):
    new = copy.deepcopy(last)
    new["ratios"]["models"] = {"eta=3": [1.0]}
    del new["ratios"]["store"]
    worse, remarks = run.compare(last, new)
    assert worse == []
    assert remarks == ["models: eta=2: gone", "models: eta=3: new", "store: not measured now"]


@pytest.mark.parametrize(
    "ratios", [[], {"a": 1.0}, {"a": []}, {"a": ["1"]}, {"a": [0.0]}, {"a": [1.0, -1.0]}, {3: [1.0]}]
)
def test_a_benchmark_gives_names_with_lists_of_positive_numbers(run, ratios):
    with pytest.raises(ValueError, match="not names with lists"):
        run.check_ratios(ratios)
    assert run.check_ratios({"a": [1.0, 2]}) == {"a": [1.0, 2]}


def test_every_benchmark_that_is_run_has_a_script_that_writes_json(run):
    for name, benchmark in run.BENCHMARKS.items():
        text = (FOLDER / f"{name}.py").read_text()
        assert '"--json"' in text and '"ratios"' in text, name
        for flag in (word for word in (*benchmark.full, *benchmark.quick) if word.startswith("--")):
            assert f'"{flag}"' in text, (name, flag)
        assert ('"--threads"' in text) == benchmark.threads and ('"--device"' in text) == benchmark.device, name


def test_the_committed_run_has_the_shape(run):
    last = json.loads(run.LAST.read_text())
    assert {"cpu", "cores", "versions", "date", "quick", "threads", "device"} <= last["machine"].keys()
    assert last["settings"].keys() == last["ratios"].keys() <= run.BENCHMARKS.keys()
    for name, ratios in last["ratios"].items():
        run.check_ratios(ratios)
        arguments = run.arguments(
            name, quick=last["machine"]["quick"], threads=last["machine"]["threads"], device="cpu"
        )
        assert last["settings"][name] == arguments, f"{name}: its settings have changed since; run it again"
    assert run.check(last, last) == 0
