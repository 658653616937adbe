"""The whole pipeline on very little embedded data: every stage fits the next, and the demo can be resumed."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image


@pytest.fixture(scope="module")
def demo(tmp_path_factory, process):
    out = tmp_path_factory.mktemp("demo") / "run"
    return out, process("demo", out, "--quick", timeout=300)


def test_it_ends_with_tables_a_report_and_a_picture(demo):
    out, done = demo
    assert done.code == 0, done.stderr
    report = json.loads((out / "report.json").read_text())
    models = [row["model"] for row in report["rows"]]
    assert models[:2] == ["teacher, plain 4 px", "plain 6 px"] and len(models) == 8
    assert all(model in done.stdout for model in models)
    for row in report["rows"]:
        assert 0 <= row["top1"] <= 1 and row["gmacs"] <= row["gmacs with zoomer"]
    tokens = {row["model"]: row["tokens"] for row in report["rows"]}
    assert (tokens["teacher, plain 4 px"], tokens["plain 6 px"], tokens["ZoomViT budget=4"]) == (144, 64, 48)
    assert report["maps"]["count"] == 64 and 0 < report["maps"]["mse"] < 1
    assert all(note in done.stdout.replace("\n", " ") for note in report["notes"])
    with Image.open(out / "contact_sheet.png") as image:
        sheet = np.asarray(image.convert("RGB"))
    page = (out / "report" / "index.html").read_text()
    for name in ("zoomvit", "plain", "teacher", "zoomer"):
        assert f'"{name}"' in page
    for study in ("errors", "pruning"):
        title = json.loads((out / "zoomvit" / "results" / f"{study}.json").read_text())["title"]
        assert title in page
    assert min(sheet.shape[:2]) > 500 and len(np.unique(sheet.reshape(-1, 3), axis=0)) > 1000


def test_every_stage_has_its_line(demo):
    lines = [line for line in demo[1].stderr.splitlines() if line[:1].isdigit()]
    total = len(lines)
    assert [line.split()[0] for line in lines] == [f"{n}/{total}" for n in range(1, total + 1)]
    assert "extracted on Ray" in demo[1].stderr


def test_the_example_of_reuse_runs_on_it(demo):
    """Token pruning by cached maps: if every patch is kept, the answers are the teacher's, whatever the order."""
    out, example = demo[0], Path(__file__).parents[2] / "docs" / "examples" / "prune_tokens.py"
    line = [
        sys.executable,
        str(example),
        str(out / "maps" / "val"),
        str(out / "scenes" / "val"),
        f"local-dir:{out / 'teacher'}",
    ]
    done = subprocess.run(line, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    shares = {int(row.split("%")[0]): row for row in done.stdout.splitlines()}
    assert list(shares) == [100, 50, 25, 10]
    top1 = next(row["top1"] for row in json.loads((out / "report.json").read_text())["rows"])
    assert shares[100].split("patches: ")[1] == f"relevant {top1:.1%}, random {top1:.1%}"


def test_an_interrupted_demo_goes_on_where_it_was(demo, process):
    out = demo[0]
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")}
    stores = {path: path.stat().st_mtime_ns for path in (out / "maps").rglob("*.parquet")}
    page = out / "report" / "index.html"
    page.unlink()
    done = process("demo", out, "--quick", timeout=300)
    assert done.code == 0, done.stderr
    assert page.is_file()
    assert {path: path.stat().st_mtime_ns for path in before} == before and len(before) == 6
    assert {path: path.stat().st_mtime_ns for path in stores} == stores
    again = process("demo", out, "--quick")
    assert again.code == 0 and "finished before" in again.stderr


def test_other_settings_and_other_folders_are_refused(demo, process, tmp_path):
    error = process("demo", demo[0], "--quick", "--seed", "1")
    assert error.code == 2 and "other settings" in error.error
    (tmp_path / "mine.txt").write_text("x")
    error = process("demo", tmp_path, "--quick")
    assert error.code == 2 and "holds something else (mine.txt)" in error.error
