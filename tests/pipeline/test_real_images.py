"""The whole line on photos, as a user would type it: shards, maps of a ViT-B on Ray, Zoomer, ZoomViT, evaluation.

ZPIPE_PHOTOS names a folder of photos with a labels.csv (file, class_index); without it they are made up.
"""

import csv
import json
import os
import shutil
import subprocess
import sys
import tarfile
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from zpipe import open_maps
from zpipe.cli import app

SAMPLE = Path(os.environ["ZPIPE_PHOTOS"]).absolute() if os.environ.get("ZPIPE_PHOTOS") else None
FEW = 6


def made_up_photos(folder: Path, count: int) -> list[dict[str, str]]:
    """Smooth colourful JPEGs of many sizes, some grey, some CMYK."""
    rows = []
    for number in range(count):
        rng = np.random.default_rng(number)
        width, height = (int(side) for side in rng.integers(120, 520, 2))
        coarse = Image.fromarray(rng.integers(0, 256, (7, 7, 3), dtype=np.uint8))
        photo = coarse.resize((width, height), Image.Resampling.BICUBIC)
        photo = photo.convert({1: "L", 2: "CMYK"}.get(number % 4, "RGB"))
        photo.save(folder / f"photo_{number}.JPEG", "JPEG", quality=90)
        rows.append({"file": f"photo_{number}.JPEG", "class_index": str(number * 7 % 1000)})
    return rows


def photos(folder: Path, count: int | None) -> list[dict[str, str]]:
    """Fill `folder` with photos and their labels.csv; all there are when count is None."""
    folder.mkdir()
    if SAMPLE is not None:
        with open(SAMPLE / "labels.csv", newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))[:count]
        for row in rows:
            shutil.copy(SAMPLE / row["file"], folder)
    else:
        rows = made_up_photos(folder, count or 40)
    with open(folder / "labels.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return rows


def on_ray(root: Path, line: str, limit: int) -> str:
    """In a process of its own, which ends together with all that Ray started."""
    command = [sys.executable, "-c", "from zpipe.cli import main; main()", *line.split()]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=limit)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    return done.stdout


def zpipe(line: str) -> None:
    result = CliRunner().invoke(app, line.split())
    assert result.exit_code == 0, result.output


@pytest.fixture(scope="module", params=[FEW, pytest.param(None, marks=pytest.mark.slow)], ids=["few", "all"])
def line(request, tmp_path_factory):
    """Rows of labels.csv and the folder in which every command has run."""
    root = tmp_path_factory.mktemp("photos")
    rows = photos(root / "photos", request.param)
    few = request.param is not None
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        zpipe(f"make-shards photos shards --shard-size {4 if few else 50}")
        extract = "extract-teacher-maps shards --out maps --teacher deit_base_patch16_224 --weights random"
        assert f"maps: {len(rows)} maps" in on_ray(root, extract, limit=150 if few else 2400)
        zpipe("train-zoomer shards --maps maps --out zoomer --epochs 2 --batch-size 4")
        model = "--model zoomvit_tiny_patch16_224 --model-arg depth=2 --num-classes 1000"
        zpipe(f"train-vit shards --out vit {model} --zoomer zoomer --epochs 1 --batch-size 4")
        zpipe("evaluate vit shards --alphas 0,0.3,1 --budgets 3")
        zpipe("evaluate zoomer shards --maps maps")
    return rows, root


def test_shards_hold_the_original_bytes(line):
    rows, root = line
    found = {}
    for path in sorted((root / "shards").glob("*.tar")):
        with tarfile.open(path) as tar:
            found |= {member.name: tar.extractfile(member).read() for member in tar}
    assert len(found) == 3 * len(rows)
    for row in rows:
        key = Path(row["file"]).stem
        data = (root / "photos" / row["file"]).read_bytes()
        assert data in (found.get(f"{key}.jpg"), found.get(f"{key}.png"))
        assert int(found[f"{key}.cls"]) == int(row["class_index"])


def test_every_photo_has_a_finite_map_of_its_own(line):
    rows, root = line
    maps = open_maps(root / "maps")
    assert sorted(maps) == sorted(Path(row["file"]).stem for row in rows) and len(maps) == len(rows)
    table = maps.table()
    assert set(table["status"].to_pylist()) == {"ok"}
    labels = {Path(row["file"]).stem: int(row["class_index"]) for row in rows}
    assert dict(zip(table["key"].to_pylist(), table["target"].to_pylist(), strict=True)) == labels
    shapes = []
    for key, width, height in zip(*(table[name].to_pylist() for name in ("key", "width", "height")), strict=True):
        relevance = maps[key]
        assert relevance.shape == (14, 14) and np.isfinite(relevance).all() and relevance.max() > 0
        shapes.append(relevance / np.linalg.norm(relevance))
        row = next(row for row in rows if Path(row["file"]).stem == key)
        with Image.open(root / "photos" / row["file"]) as image:
            assert image.size == (width, height)
    # A map that were the same for every photo, or another photo's, would show here.
    assert max(float((a * b).sum()) for a, b in combinations(shapes[:50], 2)) < 0.9999


def test_the_manifest_says_what_was_done(line):
    _, root = line
    origin = open_maps(root / "maps").manifest.provenance
    assert (origin.teacher, origin.weights, origin.seed) == ("deit_base_patch16_224", "random", 0)
    assert (origin.num_classes, origin.grid, origin.frame) == (1000, (14, 14), "full")


def test_rows_of_the_zoomvit(line):
    rows, root = line
    result = json.loads((root / "vit" / "evaluation.json").read_text())
    found = {row["setting"]: row for row in result["rows"]}
    assert list(found) == ["alpha=0", "alpha=0.3", "alpha=1", "budget=3"]
    assert [found[name]["tokens"] for name in ("alpha=0", "alpha=1", "budget=3")] == [784, 196, 205]
    assert 196 <= found["alpha=0.3"]["tokens"] <= 784
    for row in found.values():
        assert row["count"] == len(rows) and 0 <= row["top1"] <= 1 and row["images_per_s"] > 0
        assert row["gmacs_zoomer"] == pytest.approx(0.992, abs=0.002)
    assert found["alpha=1"]["gmacs"] < found["budget=3"]["gmacs"] < found["alpha=0"]["gmacs"]


def test_row_of_the_zoomer(line):
    rows, root = line
    (row,) = json.loads((root / "zoomer" / "evaluation.json").read_text())["rows"]
    assert row["count"] == len(rows) and 0 < row["mse"] < row["mae"] < 1 and -1 <= row["rank_correlation"] <= 1
