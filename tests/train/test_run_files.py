"""The files of a run, as strangers and accidents leave them: every fault is one line, nothing outside is touched."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import timm
from any_json import any_json
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from leases import a_lease, holder_of
from timm.models import save_for_hf

from zpipe.schemas import weights_file
from zpipe.schemas.errors import UsageError, ZpipeError
from zpipe.train.checkpoint import Preprocessing, load_run, save_model
from zpipe.train.evaluation.results import Result, read_results, write_study
from zpipe.train.report.runs import gather
from zpipe.train.run_files import (
    RUN,
    begin_run,
    note_checkpoint,
    read_metrics,
    read_record,
    run_lease,
)

FORMATS = Path(__file__).parents[1] / "golden" / "formats"
SETTINGS = {"model": "m", "classes": ["a", "b", "c", "d"], "train": {"seed": 0}}


@pytest.fixture
def run(tmp_path) -> Path:
    """A finished run with results."""
    return Path(shutil.copytree(FORMATS / "v2" / "zoomvit", tmp_path / "run"))


def change(path: Path, place: tuple, value: object) -> None:
    """Set the value at a place of a JSON file."""
    content = json.loads(path.read_text())
    inner = content
    for step in place[:-1]:
        inner = inner[step]
    inner[place[-1]] = value
    path.write_text(json.dumps(content))


def one_line(function, *args) -> str:
    with pytest.raises(ZpipeError) as error:
        function(*args)
    assert "\n" not in str(error.value)
    return str(error.value)


def places(value: object, here: tuple = ()) -> list[tuple]:
    """The places of all values inside a JSON value, of lists the first four."""
    found = [here] if here else []
    items = value.items() if isinstance(value, dict) else enumerate(value[:4]) if isinstance(value, list) else ()
    for name, inner in items:
        found += places(inner, (*here, name))
    return found


# ----------------------------------------------------------------------------------------------------- typed files

READERS = {
    "run.json": lambda run: (load_run(run), gather([run])),
    "config.json": load_run,
    "evaluation.json": lambda run: (read_results(run / "evaluation.json"), gather([run])),
    "judge.json": lambda run: (read_results(run / "judge.json"), gather([run])),
    "calibration.json": lambda run: (read_results(run / "calibration.json"), gather([run])),
    "results/example.json": lambda run: (read_results(run / "results" / "example.json"), gather([run])),
    "results/errors_samples.json": lambda run: gather([run]),
}


@pytest.mark.parametrize("version", ["v1", "v2"])
@pytest.mark.parametrize("file", READERS)
@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_json_value_at_any_field_is_read_or_one_line(tmp_path, file, version, data):
    run = tmp_path / version
    shutil.copytree(FORMATS / version / "zoomvit", run, dirs_exist_ok=True)
    place = data.draw(st.sampled_from(places(json.loads((run / file).read_text()))))
    change(run / file, place, data.draw(any_json()))
    try:
        READERS[file](run)
    except ZpipeError as error:
        assert "\n" not in str(error) and str(run) in str(error)


@pytest.mark.parametrize(
    ("place", "value", "told"),
    [
        (("architecture",), [], "architecture"),
        (("architecture",), "resnet999", "Unknown model 'resnet999'"),
        (("model_args",), [], "model_args"),
        (("model_args", "features_only"), True, "features_only"),
        (("model_args", "checkpoint_path"), "/etc/passwd", "checkpoint_path"),
        (("model_args", "backbone"), "hf-hub:some/model", "leads to other weights"),
        (("model_args", "embed_dim"), 60_000, "larger than the weights beside it"),
        (("model_args", "num_heads"), "three", "describes no model that can be built"),
        (("model_args", "num_classes"), 7, "says 10 classes, its model has 7"),
        (("num_classes",), 7, "says 7 classes, its model has 10"),
        (("pretrained_cfg", "mean"), "0.5", "mean"),
        (("pretrained_cfg", "std"), [0, 0, 0], "std"),
        (("pretrained_cfg", "input_size"), [3, 10**9, 10**9], "input_size"),
        (("pretrained_cfg", "input_size"), [3, 16, 32], "square images"),
        (("pretrained_cfg",), {}, "no pretrained_cfg.input_size"),
    ],
    ids=str,
)
def test_a_description_that_makes_another_model_is_refused(run, place, value, told):
    change(run / "config.json", place, value)
    assert told in one_line(load_run, run)


@pytest.mark.parametrize(
    ("field", "value"),
    [("kind", "resnet"), ("settings", []), ("has_checkpoint", "yes"), ("settings", {"train": {"seed": -1}})],
)
def test_settings_of_another_type_are_one_line(run, field, value):
    change(run / "run.json", (field,), value)
    assert "run.json: not readable as the settings of a run" in one_line(load_run, run)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ('{"step": 1}\0\0\n{"step": 2}\n', "line 1 is not a line of metrics"),
        ('{"step": 1}\n{"loss": 2}\n', "line 2 is not a line of metrics"),
        ('{"step": 1}\n[]\n', "line 2 is not a line of metrics"),
        ('{"step": -1}\n', "line 1 is not a line of metrics"),
        ('{"step": 1, "loss": 1e999}\n', "line 1 is not a line of metrics"),
        ('{"step": 1, "loss": [1]}\n', "line 1 is not a line of metrics"),
        ("[" * 100_000 + "\n", "line 1 is not a line of metrics"),
    ],
)
def test_a_line_that_is_no_line_of_metrics_is_named(tmp_path, text, told):
    (tmp_path / "metrics.jsonl").write_text(text)
    assert told in one_line(read_metrics, tmp_path / "metrics.jsonl")


@pytest.mark.parametrize("end", ["", '{"step": 2, "lo', "\0" * 4096])
def test_an_end_that_was_not_written_is_left_out(tmp_path, end):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n' + end)
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 1}]


@pytest.mark.parametrize("file", ["run.json", "config.json", "evaluation.json", "metrics.jsonl", "model.safetensors"])
def test_a_device_in_place_of_a_file_is_not_read(run, file):
    (run / file).unlink()
    (run / file).symlink_to("/dev/zero")
    assert file in one_line(lambda: (load_run(run), gather([run])))


# --------------------------------------------------------------------------------------------------------- weights


@pytest.mark.parametrize("offset", [8, 200, 2000, 5000, -4096, -1])
def test_bytes_that_were_lost_are_noticed(tmp_path, offset):
    model = timm.create_model("deit_tiny_patch16_224", img_size=32, depth=1, num_classes=3)
    save_model(tmp_path, model, Preprocessing(image_size=32, mean=(0.5,) * 3, std=(0.5,) * 3))
    load_run(tmp_path)
    path = tmp_path / "model.safetensors"
    data = bytearray(path.read_bytes())
    lost = data[offset : offset + 1 or None] if offset in (8, -1) else data[offset:][:4096]
    start = offset % len(data)
    data[start : start + len(lost)] = bytes(byte ^ 1 for byte in lost)
    path.write_bytes(data)
    told = one_line(load_run, tmp_path)
    assert "model.safetensors: weights can't be read" in told and "restore the file" in told


def test_weights_without_a_digest_are_read(tmp_path):
    model = timm.create_model("deit_tiny_patch16_224", img_size=32, depth=1, num_classes=3)
    save_for_hf(model, tmp_path, safe_serialization=True)
    assert load_run(tmp_path).model.num_classes == 3
    timm.create_model(f"local-dir:{tmp_path}", pretrained=True)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(run, value):
    path = run / "model.safetensors"
    state = safetensors.torch.load_file(path)
    state["head.bias"][3] = value
    safetensors.torch.save_file(state, path)
    assert "head.bias is NaN or infinite" in one_line(load_run, run)


def test_weights_are_readable_by_whom_the_umask_allows(tmp_path):
    model = timm.create_model("deit_tiny_patch16_224", img_size=32, depth=1, num_classes=3)
    save_model(tmp_path, model, Preprocessing(image_size=32, mean=(0.5,) * 3, std=(0.5,) * 3))
    (tmp_path / "plain").touch()
    modes = {(tmp_path / name).stat().st_mode for name in ("plain", "model.safetensors", "config.json")}
    assert len(modes) == 1
    weights_file.check_digest(tmp_path / "model.safetensors", "")


# ----------------------------------------------------------------------------------------- who writes, and to where


def test_two_processes_do_not_train_into_one_folder(tmp_path):
    with run_lease(tmp_path / "run") as check:
        check()
        code = (
            "import sys; from pathlib import Path; from zpipe.train.run_files import run_lease\n"
            "with run_lease(Path(sys.argv[1])): pass"
        )
        done = subprocess.run(
            [sys.executable, "-c", code, tmp_path / "run"], capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 1 and "has been writing to this run since" in done.stderr.splitlines()[-1]
    assert not list((tmp_path / "run").iterdir())
    with run_lease(tmp_path / "run"):
        pass


def test_the_lease_of_a_killed_training_is_taken_over_at_once(tmp_path):
    boot = a_lease()["process"].rpartition(":")[0]
    holder_of(tmp_path, process=f"{boot}:1")
    with run_lease(tmp_path):
        assert (tmp_path / "lease.json").is_file()


def test_a_finished_run_needs_no_lease(run, contents):
    before = contents(run)
    with run_lease(run) as check:
        check()
        assert contents(run) == before


@pytest.mark.parametrize("name", ["epochs", "zoomer", "metrics.jsonl", "checkpoint.pt", "run.json", "best.json"])
def test_no_link_inside_a_run_leads_out_of_it(tmp_path, name):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "mine").write_text("mine")
    run = tmp_path / "run"
    run.mkdir()
    (run / "run.json").write_text(json.dumps(RUN.header | {"kind": "vit", "settings": SETTINGS}))
    (run / name).unlink(missing_ok=True)
    (run / name).symlink_to(outside if name in ("epochs", "zoomer") else outside / "mine")
    told = one_line(begin_run, run, "vit", SETTINGS)
    assert f"{run / name}: is a link" in told and (outside / "mine").read_text() == "mine"
    with pytest.raises(UsageError, match="is a link"), run_lease(run):
        pass
    (tmp_path / "linked").symlink_to(tmp_path / "other")  # the folder of a run may be a link
    (tmp_path / "other").mkdir()
    assert not begin_run(tmp_path / "linked", "vit", SETTINGS)


def test_results_are_not_written_through_a_link(tmp_path):
    (tmp_path / "outside").mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "results").symlink_to(tmp_path / "outside")
    row = Result(study="s", run="r", model="m", metric="top1", n=1, value=0.5)
    assert "is a link" in one_line(write_study, tmp_path / "run", {"study": "s"}, [row])
    assert not list((tmp_path / "outside").iterdir())


# -------------------------------------------------------------------------------------------------- a resumed run


def test_a_checkpoint_that_is_gone_is_noticed(tmp_path):
    assert not begin_run(tmp_path, "vit", SETTINGS)
    assert not begin_run(tmp_path, "vit", SETTINGS | {"model": "n"})  # nothing is lost so far
    note_checkpoint(tmp_path)
    told = one_line(begin_run, tmp_path, "vit", SETTINGS)
    assert f"{tmp_path / 'checkpoint.pt'}: is gone" in told and "delete the folder to start over" in told
    (tmp_path / "epochs").mkdir()
    (tmp_path / "epochs" / "00002.safetensors").touch()
    assert f"(--init-from {tmp_path / 'epochs' / '00002.safetensors'})" in one_line(
        begin_run, tmp_path, "vit", SETTINGS
    )


@pytest.mark.parametrize(("epoch", "lost"), [(0, False), (1, True)])
def test_a_checkpoint_of_an_earlier_version_that_is_gone_is_noticed(tmp_path, epoch, lost):
    begin_run(tmp_path, "vit", SETTINGS)
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 20, "epoch": epoch, "loss": 1.0}) + "\n")
    if lost:
        assert "is gone" in one_line(begin_run, tmp_path, "vit", SETTINGS)
    else:
        assert not begin_run(tmp_path, "vit", SETTINGS)


def test_a_run_remembers_that_it_has_a_checkpoint(tmp_path):
    begin_run(tmp_path, "vit", SETTINGS)
    assert not read_record(tmp_path)["has_checkpoint"]
    note_checkpoint(tmp_path)
    assert read_record(tmp_path)["has_checkpoint"] and read_record(tmp_path)["settings"] == SETTINGS
    note_checkpoint(tmp_path / "nothing")


@pytest.mark.parametrize(
    ("classes", "told"),
    [(["a", "x", "c", "d"], "classes[1] = 'b', now it is 'x'"), (["a", "b", "c"], "classes[3] = 'd', now it is None")],
)
def test_other_classes_are_named_by_the_first_that_differs(tmp_path, classes, told):
    begin_run(tmp_path, "vit", SETTINGS)
    (tmp_path / "checkpoint.pt").touch()
    assert told in one_line(begin_run, tmp_path, "vit", SETTINGS | {"classes": classes})


def test_a_text_that_is_no_utf8_is_not_recorded(tmp_path):
    from zpipe.train.settings import to_json

    assert to_json({"a": ("x", 1, np.pi)}) == {"a": ["x", 1, np.pi]}
    with pytest.raises(UsageError, match=r"\\udcff: is not UTF-8"):
        to_json({"shards": ["\udcff"]})
