"""What judging maps needs of the teacher that made them: one teacher, its weights, the stability of its maps."""

import dataclasses
import math
import shutil

import pytest
from tiny import BODY, SIDE, scenes
from typer.testing import CliRunner

from zpipe import open_maps
from zpipe.cli import app
from zpipe.judging import stability_of, teacher_of
from zpipe.pipeline.explainer import ExplainConfig
from zpipe.pipeline.extract import ExtractConfig, extract_teacher_maps
from zpipe.schemas.errors import UsageError
from zpipe.schemas.manifest import write_manifest
from zpipe.train.evaluation.judge import row_names
from zpipe.train.evaluation.results import read_results

pytestmark = pytest.mark.usefixtures("one_thread")
METHOD = "gradient-attention"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("judging")
    scenes(root / "shards", 12, shard_size=4)
    for name, stability in (("maps", False), ("stable", True)):
        config = ExtractConfig(
            teacher="deit_tiny_patch16_224",
            weights="random",
            num_classes=10,
            teacher_args=BODY | {"img_size": SIDE},
            explain=ExplainConfig(method=METHOD),
            classes="by-index",
            executor="local",
            device="cpu",
            stability=stability,
        )
        extract_teacher_maps(root / "shards", root / name, config)
    return root


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("teacher_digest", "0" * 64),
        ("mean", (0.1, 0.1, 0.1)),
        ("std", (0.1, 0.1, 0.1)),
        ("interpolation", "nearest"),
        ("image_size", (2 * SIDE, 2 * SIDE)),
    ],
)
def test_stores_of_several_teachers_are_refused(data, tmp_path, field, value):
    """Equal weights that see their images otherwise give other answers."""
    shutil.copytree(data / "maps", tmp_path / "maps")
    manifest = open_maps(data / "maps").manifest
    changed = dataclasses.replace(manifest.provenance, **{field: value})
    write_manifest(tmp_path / "maps", dataclasses.replace(manifest, provenance=changed))
    with pytest.raises(UsageError, match=rf"made by different teachers \({field}\); give --model RUN to judge by"):
        teacher_of([open_maps(data / "maps"), open_maps(tmp_path / "maps")], device="cpu")


def test_weights_that_are_not_there(data):
    with pytest.raises(
        UsageError, match=r"maps: its teacher's weights gone.pth are not .*--weights, or judge by --mod"
    ):
        teacher_of([open_maps(data / "maps")], weights="gone.pth", device="cpu")


def test_a_column_is_read_as_far_as_it_is_looked_up(data, monkeypatch):
    store = open_maps(data / "stable")
    read = []
    index = store.index
    monkeypatch.setattr(store, "index", lambda stem, columns: read.append(stem) or index(stem, columns))
    (column,) = stability_of([store], data / "shards", limit=0, device="cpu").values()
    table = open_maps(data / "stable").table(["key", "stability"]).to_pydict()
    stems = [shard.stem for shard in store.manifest.shards]
    assert read == [] and len(column) == 12
    assert column[table["key"][3]] == table["stability"][3] and read == stems[:1]
    assert column.get(table["key"][4]) == table["stability"][4] and read == stems[:2]
    assert column.get("nobody", math.nan) is math.nan and read == stems
    assert dict(column) == dict(zip(table["key"], table["stability"], strict=True))


def test_a_measured_one_has_no_more_images_than_its_limit(data):
    stores = [open_maps(data / "maps"), open_maps(data / "stable")]
    found = stability_of(stores, data / "shards", limit=5, device="cpu")
    assert list(found) == row_names(stores)
    measured, stored = found.values()
    assert len(measured) == 5 and all(stored[key] == pytest.approx(value, abs=0.02) for key, value in measured.items())
    assert len(stability_of(stores, data / "shards", limit=0, device="cpu")) == 1


def test_the_command_measures_no_more_than_it_judges(data, tmp_path):
    line = ["maps", "judge", str(data / "maps"), str(data / "stable"), str(data / "shards"), "--device", "cpu"]
    line += ["--steps", "1", "--json", str(tmp_path / "judge.json"), "--classes", "by-index"]
    result = CliRunner().invoke(app, [*line, "--limit", "3"])
    assert result.exit_code == 0, result.output
    rows = read_results(tmp_path / "judge.json")[0]["rows"]
    assert [row["counts"].get("stability", row["count"]) for row in rows[:2]] == [3, 3]
    assert rows[1]["difference"]["stability"][0] == pytest.approx(rows[1]["stability"] - rows[0]["stability"])

    result = CliRunner().invoke(app, [*line, "--join", "image"])
    assert result.exit_code == 0, result.output
    assert "stability is left out: with --join image" in " ".join(result.output.split())
    assert not any("stability" in row for row in read_results(tmp_path / "judge.json")[0]["rows"])
