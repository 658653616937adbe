"""Tests of maps in the report: they are found, and stores and controls stand beside each other with intervals."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import plotly.graph_objects
import pytest
from report_page import CONFIG, HOSTILE, embedded

from zpipe.schemas.atomic import write_json
from zpipe.schemas.errors import UsageError
from zpipe.train.evaluation.results import judge_results, write_results
from zpipe.train.report import ReportConfig, report
from zpipe.train.report.judged import judged_figures, judged_tables
from zpipe.train.report.runs import gather

pytestmark = pytest.mark.usefixtures("one_thread")
NO_GALLERY = ReportConfig(gallery=0, device="cpu")
GOLDEN = Path(__file__).parents[2] / "golden" / "formats"


def write_judged(path, names=("rollout", "gradient-attention", "centre", "random"), run="runs/teacher"):
    """A file as `zpipe maps judge` writes it, of made-up values."""
    rows = []
    for place, name in enumerate(names):
        row = {"setting": name, "count": 200, "counts": {"miou": 150}}
        for metric, value in (("deletion", 0.3), ("miou", 0.5), ("abpc", 0.2 - place / 8)):
            row |= {metric: value, f"{metric}_low": value - 0.05, f"{metric}_high": value + 0.05}
        if place:
            row["difference"] = {"deletion": [0.0, -0.02, 0.02], "abpc": [-place / 8, -place / 8 - 0.1, -0.01]}
        rows.append(row)
    settings = {"baseline": "blur", "steps": 10, "groups": 10, "image_size": 224, "crop_pct": 0.875}
    about = {"run": run, "model": "m", "seed": 0, "shards": "data/val", "settings": settings}
    path.parent.mkdir(parents=True, exist_ok=True)
    results = judge_results(rows, {"study": "judge", "run": "teacher", "model": "m", "seed": 0})
    return write_results(path, "judge", about, rows, results)


def test_files_are_found_where_the_user_puts_them(tmp_path):
    write_judged(tmp_path / "judge.json")
    write_judged(tmp_path / "maps" / "of-val.json")
    write_judged(tmp_path / "maps" / "results" / "more.json")
    (tmp_path / "broken.json").write_text("{no JSON")  # other people's files are left alone
    write_json(tmp_path / "other.json", {"rows": [1]})
    found = gather([tmp_path])
    assert len(found.judged) == 3 and not found.runs
    assert len(gather([tmp_path, tmp_path / "maps"]).judged) == 3  # each once
    for path in (tmp_path / "judge.json", *(tmp_path / "maps").rglob("*.json")):
        path.unlink()
    with pytest.raises(UsageError, match="holds no training run and no results"):
        gather([tmp_path])


def test_rows_and_differences_with_intervals(tmp_path):
    write_judged(tmp_path / "judge.json")
    judged = gather([tmp_path]).judged
    table, differences = judged_tables(judged)
    assert table["caption"] == f"Maps judged on teacher, val ({tmp_path.name}/judge.json)"
    assert "Removed cells: blur; 10 steps" in table["note"] and "Deletion: lower is better" in table["note"]
    assert table["columns"] == ["maps", "deletion", "ABPC", "mIoU", "n"]
    assert [row[0] for row in table["rows"]] == ["rollout", "gradient-attention", "centre", "random"]
    assert table["rows"][0][1:] == ["0.3 (0.25 to 0.35)", "0.2 (0.15 to 0.25)", "50.0 % (45.0 to 55.0), n = 150", "200"]
    assert differences["caption"].endswith("differences to rollout")
    assert [row[0] for row in differences["rows"]] == ["gradient-attention", "centre", "random"]
    assert differences["rows"][0][1:] == ["0 (-0.02 to 0.02)", "-0.125 (-0.225 to -0.01)", "200"]


def test_bars_of_all_rows(tmp_path):
    write_judged(tmp_path / "judge.json")
    (figure,) = judged_figures(gather([tmp_path]).judged)
    assert [trace["name"] for trace in figure["data"]] == ["rollout", "gradient-attention", "centre", "random"]
    assert figure["data"][1]["x"] == ["deletion", "ABPC", "mIoU"]
    assert figure["data"][1]["y"] == pytest.approx([0.3, 0.075, 0.5])
    assert figure["data"][0]["error_y"]["array"] == pytest.approx([0.05] * 3)
    traces = [{name: value for name, value in trace.items() if name != "series"} for trace in figure["data"]]
    plotly.graph_objects.Figure(data=traces, layout=figure["layout"])


def test_files_of_earlier_versions_are_shown(tmp_path):
    examples = sorted(GOLDEN.glob("*/zoomvit/judge.json"))
    assert examples
    for example in examples:
        run = shutil.copytree(example.parent, tmp_path / example.parents[1].name / "zoomvit")
        (test,) = gather([run]).judged
        table = judged_tables([test])[0]
        assert [row[0] for row in table["rows"]][-2:] == ["centre", "random"]
        assert {"deletion", "insertion", "peak in the box"} <= set(table["columns"])
        if "settings" not in test.about:
            assert table["note"].startswith("The file does not state its settings.")


def test_a_page_of_tests_of_maps_alone(tmp_path, open_page):
    write_judged(tmp_path / "judged" / "judge.json", names=("rollout", HOSTILE, "centre", "random"))
    path = report([tmp_path / "judged"], tmp_path / "page", NO_GALLERY)
    about = embedded(path.read_text(), "about-data")
    assert about["notes"] == [] and len(about["tables"]["maps"]) == 2
    page = open_page(path)
    section = page.locator("#maps")
    table = section.locator("table").first
    assert table.locator("caption").inner_text().startswith("Maps judged on teacher, val")
    assert table.locator("tbody tr").count() == 4 and HOSTILE in table.inner_text()
    assert section.locator(".plot").get_attribute("aria-details") == table.get_attribute("id")
    region = section.locator(".table").first
    assert region.get_attribute("tabindex") == "0" and region.get_attribute("aria-label")
    table.get_by_role("button", name="ABPC").focus()
    page.keyboard.press("Enter")  # sorts by the column
    assert table.locator("tbody th").first.inner_text() == "random"
    assert page.title() == "zpipe report"
    section.scroll_into_view_if_needed()
    page.wait_for_selector("#maps .plot .legend", timeout=20_000)


def test_a_page_without_tests_of_maps_names_the_command(data, tmp_path):
    path = report([data / "plain"], tmp_path, NO_GALLERY)
    assert embedded(path.read_text(), "about-data")["tables"]["maps"] == []
    assert "zpipe maps judge STORES SHARDS" in path.read_text()


def test_names_of_json_files_are_data_only(tmp_path):
    written = write_judged(tmp_path / "judge.json", run=HOSTILE)
    text = report([tmp_path], tmp_path / "page", CONFIG).read_text()
    assert HOSTILE not in text and json.loads(json.dumps(written))["run"] == HOSTILE
