"""The command line: each verb runs on real data, wrong use gives one `error:` line and overwrites nothing."""

import json
import os
import pty
import select
import shutil
import signal
import subprocess
import sys
import time
import typing

import numpy as np
import pytest
import timm
import typer.main
from PIL import Image
from timm.models import register_model
from tiny import BODY, SIDE, TEACHER, cut, encode, scenes, store, write_shards
from torch import nn
from typer.testing import CliRunner

import zpipe
from zpipe import open_maps
from zpipe.cli import app
from zpipe.console import local_path, parse_points, path_or_url
from zpipe.train.models.backbone import untrained_cfgs
from zpipe.train.models.operating_points import points_of

pytestmark = pytest.mark.usefixtures("one_thread")

LOOP = f"--epochs 1 --batch-size 4 --image-size {SIDE} --data-workers 0 --device cpu"
BODY_ARGS = " ".join(f"--model-arg {name}={value}" for name, value in BODY.items())


def zoomer(shards="{shards}", maps="{maps}", out="{out}", more=""):
    return f"train-zoomer {shards} --maps {maps} --out {out} {LOOP} --num-blocks 2 --set width=8 {more}"


def vit(shards="{shards}", out="{out}", scores="--zoomer {zoomer}", model="zoomvit_tiny_patch16_224", more=""):
    return f"train-vit {shards} --out {out} {LOOP} --model {model} {BODY_ARGS} {scores} {more}"


def evaluate(run="{vit}", shards="{shards}", more=""):
    return f"evaluate {run} {shards} --device cpu --json {{out}} {more}"


def call(line, places=None):
    """Run a command in this process. `line` is split at spaces, and {names} in it are filled in."""
    words = [word.format(**places) if places else word for word in line.split()]
    return CliRunner().invoke(app, words, env={"COLUMNS": "200"}, prog_name="zpipe")


def succeed(line, places=None):
    result = call(line, places)
    assert result.exit_code == 0, result.stderr
    return result


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """Folders by name: outputs of commands, and folders that are wrong in each possible way."""
    root = tmp_path_factory.mktemp("cli")
    names = "shards other_shards maps other_maps other_grid zoomer vit plain with_maps missing empty file foreign "
    names += "tars_only cut_on cut_inside unfinished_store broken_store unfinished_run unfinished_zoomer odd_label site"
    where = {name: root / name for name in names.split()}
    scenes(where["shards"])
    scenes(where["other_shards"], seed=5)
    store(where["shards"], where["maps"])
    store(where["other_shards"], where["other_maps"])
    store(where["shards"], where["other_grid"], patch_size=4)
    for line in (
        zoomer(out="{zoomer}"),
        vit(out="{vit}"),
        vit(out="{with_maps}", scores="--maps {maps}"),
        vit(out="{plain}", model="deit_tiny_patch16_224", scores=""),
    ):
        succeed(line, where)
    where["empty"].mkdir()
    where["file"].write_text("text")
    where["foreign"].mkdir()
    (where["foreign"] / "thesis.txt").write_text("mine")
    where["site"].mkdir()
    (where["site"] / "index.html").write_text("<title>mine</title>")
    for name in ("tars_only", "cut_on", "cut_inside"):
        shutil.copytree(where["shards"], where[name])
        if name == "tars_only":
            (where[name] / "shards.json").unlink()
        else:
            cut(where[name] / "shard-00002.tar", name.removeprefix("cut_"))
    for name in ("unfinished_store", "broken_store"):
        shutil.copytree(where["maps"], where[name])
    (where["unfinished_store"] / "manifest.json").unlink()
    (where["broken_store"] / "index" / "shard-00001.parquet").write_bytes(b"PAR1")
    for name, whole in (("unfinished_run", "vit"), ("unfinished_zoomer", "zoomer")):
        where[name].mkdir()
        shutil.copy(where[whole] / "run.json", where[name])
    image = encode(np.zeros((SIDE, SIDE, 3), np.uint8))
    write_shards(where["odd_label"], [{"odd.png": image, "odd.cls": b"77"}])
    return where


def snapshot(folder):
    return {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in folder.rglob("*")}


def errors_of(stderr):
    """The lines that are neither progress nor warnings: exactly one error, then its details."""
    assert "Traceback" not in stderr
    lines = [line for line in stderr.splitlines() if not line.startswith(("{", "warning: "))]
    assert lines and lines[0].startswith("error: ") and all(line.startswith("  ") for line in lines[1:]), stderr
    return lines


WRONG = {
    # train-zoomer
    "zoomer: no such shards": (zoomer("{missing}"), 2, "missing: no such folder"),
    "zoomer: empty shards": (zoomer("{empty}"), 2, "empty: holds no .tar"),
    "zoomer: shards are a file": (zoomer("{file}"), 2, "file: not a .tar file"),
    "zoomer: cut on a boundary": (zoomer("{cut_on}"), 1, "cut_on/shard-00002.tar: "),
    "zoomer: cut inside a sample": (zoomer("{cut_inside}"), 1, "cut_inside/shard-00002.tar: "),
    "zoomer: no such store": (zoomer(maps="{missing}"), 1, "missing: not a relevance store"),
    "zoomer: shards as store": (zoomer(maps="{shards}"), 1, "shards: not a relevance store"),
    "zoomer: store of other tars": (zoomer(maps="{other_maps}"), 1, "other_maps: made from a shard-00000.tar"),
    "zoomer: unfinished store": (zoomer(maps="{unfinished_store}"), 1, "run extract-teacher-maps again to resume"),
    "zoomer: broken store": (zoomer(maps="{broken_store}"), 1, "broken_store/index/shard-00001.parquet: "),
    "zoomer: foreign output": (zoomer(out="{foreign}"), 2, "foreign: holds something else (thesis.txt)"),
    "zoomer: output is a file": (zoomer(out="{file}"), 2, "file: is a file, not a folder"),
    "zoomer: output below a file": (zoomer(out="{file}/run"), 2, "file/run: can't be used"),
    "zoomer: output is the shards": (zoomer(out="{shards}"), 2, "shards: holds something else"),
    "zoomer: finished run, other maps": (zoomer(maps="{other_grid}", out="{zoomer}"), 1, "was begun with maps = "),
    "zoomer: finished run, other lr": (zoomer(out="{zoomer}", more="--lr 0.5"), 1, "was begun with train.lr = 0.01"),
    "zoomer: unknown setting": (zoomer(more="--set train.learning=1"), 2, "setting train.learning: unknown"),
    "zoomer: setting without value": (zoomer(more="--set train.opt"), 2, "--set train.opt: write it as key=value"),
    "zoomer: setting of another type": (zoomer(more="--set train.opt=3"), 2, "setting train.opt: 3 is not"),
    "zoomer: unknown optimizer": (zoomer(more="--set train.opt=adamwww"), 2, "optimizer adamwww"),
    "zoomer: lr is no number": (zoomer(more="--lr nan"), 2, "setting train.lr: nan"),
    "zoomer: no epochs": (zoomer(more="--epochs 0"), 2, "train.epochs 0"),
    "zoomer: blocks": (zoomer(more="--num-blocks 3"), 2, "num_blocks must be 2, 4 or 6"),
    "zoomer: missing policy": (
        zoomer(more="--missing ignore"),
        2,
        "setting missing: 'ignore'; choose one of error, skip",
    ),
    "zoomer: batch too large": (zoomer(more="--batch-size 64"), 2, "too few samples (40) for one batch of 64"),
    "zoomer: device": (zoomer(more="--device abacus"), 2, "device abacus"),
    "zoomer: image size": (zoomer(more="--image-size 0"), 2, "image_size 0: give"),
    # train-vit
    "vit: no such shards": (vit("{missing}"), 2, "missing: no such folder"),
    "vit: empty shards": (vit("{empty}"), 2, "empty: holds no .tar"),
    "vit: cut tar": (vit("{cut_on}"), 1, "cut_on/shard-00002.tar: "),
    "vit: no source of scores": (vit(scores=""), 2, "give --zoomer RUN or --maps STORE"),
    "vit: two sources of scores": (vit(scores="--zoomer {zoomer} --maps {maps}"), 2, "from one source"),
    "vit: zoomer missing": (vit(scores="--zoomer {missing}"), 2, "missing: not a finished zoomer"),
    "vit: zoomer unfinished": (vit(scores="--zoomer {unfinished_zoomer}"), 2, "not a finished zoomer"),
    "vit: zoomer is a vit": (vit(scores="--zoomer {plain}"), 2, "plain: holds a ViT, not a zoomer"),
    "vit: store of other tars": (vit(scores="--maps {other_maps}"), 1, "other_maps: made from a shard-00000.tar"),
    "vit: store of another grid": (vit(scores="--maps {other_grid}"), 2, "maps of 8 x 8, the model wants 4 x 4"),
    "vit: unfinished store": (vit(scores="--maps {unfinished_store}"), 1, "is not finished"),
    "vit: broken store": (vit(scores="--maps {broken_store}"), 1, "shard-00001.parquet: "),
    "vit: plain with zoomer": (vit(model="deit_tiny_patch16_224"), 2, "this model takes no scores"),
    "vit: unknown model": (vit(model="vit_enormous"), 2, "model vit_enormous: "),
    "vit: unknown model argument": (vit(more="--model-arg depht=3"), 2, "depht"),
    "vit: model argument without value": (vit(more="--model-arg depth"), 2, "--model-arg depth: write it as"),
    "vit: unknown setting": (vit(more="--set zoom=1"), 2, "setting zoom: unknown; choose one of model, "),
    "vit: foreign output": (vit(out="{foreign}"), 2, "foreign: holds something else"),
    "vit: output is a zoomer": (vit(out="{zoomer}"), 1, "holds a zoomer run, this is vit"),
    "vit: finished run, other model": (vit(out="{vit}", more="--model-arg depth=3"), 1, "begun with model_args.depth"),
    "vit: start from nothing": (vit(more="--init-from {missing}"), 2, "missing: no run, no checkpoint file"),
    "vit: start from unfinished": (vit(more="--init-from {unfinished_run}"), 2, "this run is not finished"),
    "vit: start from a zoomer": (vit(more="--init-from {zoomer}"), 1, "zoomer: can't start from it"),
    "vit: no classes": (vit("{odd_label}", more="--batch-size 1"), 2, "give --num-classes"),
    "vit: label": (vit("{odd_label}", more="--batch-size 1 --num-classes 9"), 1, "key odd: label 77 is outside"),
    # evaluate
    "evaluate: no such run": (evaluate("{missing}"), 2, "missing: not a training run"),
    "evaluate: empty run": (evaluate("{empty}"), 2, "empty: not a training run"),
    "evaluate: unfinished run": (evaluate("{unfinished_run}"), 2, "run its command again to resume it"),
    "evaluate: no such shards": (evaluate(shards="{missing}"), 2, "missing: no such folder"),
    "evaluate: cut tar": (evaluate(shards="{cut_inside}"), 1, "cut_inside/shard-00002.tar: "),
    "evaluate: zoomer without maps": (evaluate("{zoomer}"), 2, "give --maps"),
    "evaluate: zoomer, other tars": (evaluate("{zoomer}", more="--maps {other_maps}"), 1, "other_maps: made from"),
    "evaluate: zoomer, other grid": (evaluate("{zoomer}", more="--maps {other_grid}"), 2, "maps of 8 x 8"),
    "evaluate: zoomer, unfinished": (evaluate("{zoomer}", more="--maps {unfinished_store}"), 1, "is not finished"),
    "evaluate: alpha": (evaluate(more="--alphas 0,1.5"), 2, "--alphas 1.5: a threshold lies in [0, 1]"),
    "evaluate: alphas are words": (evaluate(more="--alphas some"), 2, "--alphas some: write numbers"),
    "evaluate: budget": (evaluate(more="--budgets 17"), 2, "--budgets 17: budget must lie between 0 and the 16"),
    "evaluate: half a budget": (
        evaluate(more="--budgets 1.5"),
        2,
        "--budgets 1.5: budget '1.5' is none: give a number of cells",
    ),
    "evaluate: no point": (evaluate(more="--alphas ,"), 2, "give --alphas or --budgets"),
    "evaluate: scores": (evaluate(more="--scores teacher"), 2, "choose one of zoomer, maps"),
    "evaluate: scores maps": (evaluate(more="--scores maps"), 2, "needs a relevance store; give --maps"),
    "evaluate: no value": (evaluate(more="--at side="), 2, "--at side=: write it as NAME=VALUE"),
    "evaluate: one value missing": (evaluate(more="--at side=2,,4"), 2, "--at side=2,,4: write it as NAME=VALUE"),
    "evaluate: no name": (evaluate(more="--at 2,4"), 2, "--at 2,4: write it as NAME=VALUE"),
    "evaluate: no such setting": (evaluate(more="--at side=2"), 2, "--at side: ZoomViT has no such setting"),
    "evaluate: a setting with an option": (evaluate(more="--at alpha=0.1,0.5"), 2, "--at alpha: give --alphas 0.1,0.5"),
    "study: malformed": ("study pruning {vit} {shards} --at side", 2, "--at side: write it as NAME=VALUE"),
    "study: no such setting": (
        "study pruning {vit} {shards} --at side=2 --device cpu",
        2,
        "--at side: ZoomViT has no such setting",
    ),
    "study: methods elsewhere": (
        "study pruning {vit} {shards} --methods rollout --device cpu",
        2,
        "--methods, --weights: study pruning has no use for it",
    ),
    "study: no such method": ("study map-methods {vit} {shards} --methods rollout,glow", 2, "--methods glow: choose"),
    "study: no zoomer for methods": (
        "study map-methods {with_maps} {shards} --device cpu",
        2,
        "was trained with scores from maps; study map-methods needs a run of train-vit --zoomer",
    ),
    "evaluate: no zoomer": (evaluate("{with_maps}"), 2, "needs a relevance store; give --maps"),
    "evaluate: label": (evaluate(shards="{odd_label}"), 1, "key odd: label 77 is outside the model's 10 classes"),
    "evaluate: results below a file": ("evaluate {vit} {shards} --json {file}/x.json", 2, "file/x.json: can't be"),
    "evaluate: results over a text": ("evaluate {vit} {shards} --json {file}", 2, "file: exists, and zpipe did not"),
    "evaluate: results over the run": ("evaluate {vit} {shards} --json {vit}/run.json", 2, "run.json: exists, and"),
    "evaluate: results over a device": (
        "evaluate {vit} {shards} --json /dev/null",
        2,
        "can't be replaced (is a device",
    ),
    "evaluate: alphas of a plain ViT": (evaluate("{plain}", more="--alphas 0.1"), 2, "--alphas: VisionTransformer has"),
    "evaluate: scores of a plain ViT": (evaluate("{plain}", more="--scores random"), 2, "plain takes no scores"),
    "evaluate: budget of a zoomer": (evaluate("{zoomer}", more="--maps {maps} --budgets 3"), 2, "--budgets: "),
    "evaluate: setting of a zoomer": (evaluate("{zoomer}", more="--maps {maps} --at x=1"), 2, "is a zoomer, which has"),
    "evaluate: large budget": (evaluate(more="--budgets 9999tokens"), 2, "is above the 64 tokens"),
    "evaluate: large target": (
        evaluate(more="--target-gmacs 99 --calibration {shards}"),
        2,
        "--target-gmacs 99 GMACs: above the",
    ),
    "evaluate: target and alphas": (evaluate(more="--target-gmacs 1 --alphas 0"), 2, "leave out --alphas"),
    "evaluate: calibration alone": (evaluate(more="--calibration {shards}"), 2, "is for --target-gmacs"),
    "evaluate: damaged": (evaluate(more="--damaged maybe"), 2, "--damaged maybe: choose error or skip"),
    "calibrate: large budget": (
        "calibrate {vit} {shards} --budget 9999tokens --device cpu",
        2,
        "above the 64 tokens of an image in which everything is zoomed",
    ),
    "report: another page": ("report {vit} --out {site}", 2, "index.html: exists, and zpipe did not write it"),
    "predict: scores maps": (
        "predict {file} --checkpoint {vit} --scores maps --device cpu",
        2,
        "--scores maps: single images have no maps in a store; choose zoomer, ",
    ),
    "predict: malformed": ("predict {file} --checkpoint {vit} --at keep", 2, "--at keep: write it as NAME=VALUE"),
    "predict: two values": ("predict {file} --checkpoint {vit} --at keep=4,8", 2, "--at keep=4,8: give one value"),
    "predict: repeated": (
        "predict {file} --checkpoint {vit} --at keep=4 --at keep=8",
        2,
        "--at keep=4,8: give one value",
    ),
    "predict: a setting with an option": (
        "predict {file} --checkpoint {vit} --at budget=4",
        2,
        "--at budget: give --budget 4",
    ),
    "predict: no number": (
        "predict {file} --checkpoint {vit} --at keep=some --device cpu",
        2,
        "vit: keep some: give a whole number",
    ),
    "predict: out of range": (
        "predict {file} --checkpoint {vit} --at keep=900 --device cpu",
        2,
        "vit: keep 900: give a number from 1 to 64",
    ),
    "predict: no such setting": (
        "predict {file} --checkpoint {vit} --at exit=0.7 --device cpu",
        2,
        "vit: exit: ZoomViT has no such setting",
    ),
    "predict: precision": (
        "predict {file} --checkpoint {vit} --precision half --device cpu",
        2,
        "precision half: choose",
    ),
    "report: precision": (
        "report {vit} --out {out} --shards {shards} --precision half --device cpu",
        2,
        "precision half: choose",
    ),
    # maps
    "info: nothing": ("maps info {missing}", 1, "missing: not a relevance store"),
    "info: shards": ("maps info {shards}", 1, "shards: not a relevance store"),
    "info: unfinished": ("maps info {unfinished_store}", 1, "is not finished"),
    "info: broken": ("maps info {broken_store}", 1, "shard-00001.parquet: "),
    "verify: nothing": ("maps verify {empty}", 1, "empty: not a relevance store"),
    "verify: unfinished": ("maps verify {unfinished_store}", 1, "is not finished"),
    "verify: broken": ("maps verify {broken_store}", 1, "broken_store: 1 problems"),
    "verify: other tars": ("maps verify {maps} --shards {other_shards}", 1, "maps: "),
    "verify: no such shards": ("maps verify {maps} --shards {missing}", 2, "missing: no such folder"),
    "judge: nothing": ("maps judge {missing} {shards} --model {plain}", 1, "missing: not a relevance store"),
    "judge: one of them is none": (
        "maps judge {maps} {missing} {shards} --model {plain}",
        1,
        "missing: not a relevance store",
    ),
    "judge: other tars": ("maps judge {other_maps} {shards} --model {plain}", 1, "other_maps: made from"),
    "judge: a store twice": ("maps judge {maps} {maps} {shards} --model {plain}", 2, "maps: is given twice"),
    "judge: no masks": (
        "maps judge {maps} {shards} --model {plain} --masks {empty} --device cpu",
        2,
        "--masks {empty}: has no PNG file; give a folder of KEY.png",
    ),
    "judge: a zoomer": ("maps judge {maps} {shards} --model {zoomer}", 2, "zoomer: holds a zoomer, no classifier"),
    "show: unknown key": ("maps show {maps} nobody --out {out}.png", 2, "no map for key 'nobody'"),
    "show: nothing": ("maps show {missing} train_0000000 --out {out}.png", 1, "missing: not a relevance store"),
    "show: no such shards": (
        "maps show {maps} train_0000000 --shards {empty} --out {out}.png",
        2,
        "empty: holds no .tar",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_use_is_one_line(places, tmp_path, case):
    line, code, message = WRONG[case]
    root, out = places["shards"].parent, tmp_path / "out"
    before = snapshot(root)
    result = call(line, places | {"out": out})
    assert isinstance(result.exception, SystemExit), repr(result.exception)
    first = errors_of(result.stderr)[0]
    assert message.format(**places) in first and result.exit_code == code, first
    assert len(first) < 600
    assert snapshot(root) == before
    # A run that never began may have claimed its folder, and holds no more than that.
    assert not out.exists() or (out.is_dir() and {path.name for path in out.iterdir()} <= {"run.json"})


@pytest.mark.parametrize(
    "line",
    ["train-zoomer", "train-vit {shards}", zoomer(more="--epochs many"), "evaluate {vit}", "maps", "nonsense", ""],
)
def test_an_incomplete_line_shows_how_to_go_on(places, tmp_path, line):
    result = call(line, places | {"out": tmp_path / "out"})
    assert result.exit_code == 2 and isinstance(result.exception, SystemExit)
    assert "Usage: zpipe" in result.output and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "line",
    [
        "make-shards photos s3://bucket/out",
        "make-shards scenes s3://bucket/out --count 2",
        "make-shards s3://bucket/photos out",
        "make-shards cifar10:s3://bucket/photos out",
        zoomer(out="s3://bucket/run"),
        vit(out="gs://bucket/run"),
        vit(scores="--zoomer s3://bucket/run"),
        evaluate("s3://bucket/run"),
        evaluate(more="--labels s3://bucket/real.json"),
        "calibrate s3://bucket/run {shards} --budget 3",
        "predict s3://bucket/a.jpg --checkpoint {vit}",
        "predict a.jpg --checkpoint s3://bucket/run",
        "predict a.jpg --checkpoint {vit} --out s3://bucket/pictures",
        "report s3://bucket/run --out out",
        "report {vit} --out s3://bucket/report",
        "maps judge {maps} {shards} --model s3://bucket/run",
        "maps export {maps} s3://bucket/maps.parquet",
        "demo s3://bucket/demo --quick",
    ],
)
def test_a_url_where_only_this_machine_will_do_is_refused(places, tmp_path, monkeypatch, line):
    """It is not taken for a folder named `s3:` below the working folder."""
    monkeypatch.chdir(tmp_path)
    result = call(line, places | {"out": tmp_path / "out"})
    (error,) = errors_of(result.stderr)
    assert result.exit_code == 2 and "://bucket" in error and "give a local path" in error
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------------------------------------------- what is printed


def verbs(command, path=()):
    for name, verb in getattr(command, "commands", {}).items():
        yield (*path, name), verb
        yield from verbs(verb, (*path, name))


VERBS = dict(verbs(typer.main.get_command(app)))


def test_all_verbs_are_there():
    assert {
        "make-shards",
        "extract-teacher-maps",
        "fit-head",
        "train-zoomer",
        "train-vit",
        "import",
        "evaluate",
        "study",
        "calibrate",
        "predict",
        "report",
        "maps",
        "demo",
        "doctor",
    } == {path[0] for path in VERBS}


@pytest.mark.parametrize("path", VERBS, ids=" ".join)
def test_help_of_a_verb_explains_every_option(path):
    printed = succeed(" ".join(path) + " --help").stdout
    assert f"Usage: zpipe {' '.join(path)}" in printed
    for parameter in VERBS[path].params:
        if parameter.param_type_name == "option":
            assert all(name in printed for name in parameter.opts)
        else:
            assert parameter.name in printed.lower()
        assert parameter.name == "help" or parameter.help, f"{parameter.name} has no help"


@pytest.mark.parametrize("path", ["", "maps "], ids=["zpipe", "maps"])
def test_the_list_of_verbs_is_in_whole_sentences(path):
    printed = succeed(f"{path}--help").stdout
    listed = printed.partition("Commands:")[2].strip().splitlines()
    assert len(listed) == sum(len(verb) == len(path.split()) + 1 and " ".join(verb).startswith(path) for verb in VERBS)
    assert all(line.endswith(".") and not line.endswith("...") for line in listed), listed


def test_the_version():
    assert succeed("--version").stdout == f"zpipe {zpipe.__version__}\n"


def test_help_offers_only_what_a_verb_takes():
    help_of = {path[0]: {option.name: option.help for option in VERBS[path].params} for path in VERBS if len(path) == 1}
    assert "maps" in help_of["evaluate"]["scores"] and "maps" not in help_of["predict"]["scores"]
    assert "train.opt" in help_of["train-vit"]["settings"] and "train.opt" not in help_of["make-shards"]["settings"]


@pytest.mark.parametrize("path", [path for path in VERBS if VERBS[path].callback], ids=" ".join)
def test_every_path_is_looked_at_for_a_url(path):
    """`Path` alone would take a URL for a folder of that name."""
    hints = typing.get_type_hints(VERBS[path].callback, include_extras=True)
    paths = {name: hint.__metadata__[0] for name, hint in hints.items() if "pathlib.Path" in str(hint)}
    assert [name for name, option in paths.items() if option.parser not in (local_path, path_or_url)] == []


def test_what_commands_say_on_success(places, tmp_path):
    out = tmp_path / "rows.json"
    result = succeed("evaluate {vit} {shards} --alphas 0,0.3,1 --budgets 3 --json {out}", places | {"out": out})
    rows = json.loads(out.read_text())["rows"]
    assert [row["setting"] for row in rows] == ["alpha=0", "alpha=0.3", "alpha=1", "budget=3"]
    for row in rows:
        assert row["setting"] in result.stdout and f"{row['gmacs']:.4g}" in result.stdout
    for name in ("setting", "count", "top1", "top5", "tokens", "gmacs", "gmacs_zoomer", "images_per_s"):
        assert name in rows[0] and name in result.stdout
    assert f"written to {out}" in result.stdout
    assert "…" not in result.stdout
    default = places["plain"] / "evaluation.json"
    assert f"written to {default}" in succeed("evaluate {plain} {shards}", places).stdout
    default.unlink()
    assert "again" not in succeed(zoomer(out="{zoomer}"), places).stdout


@pytest.fixture(scope="module")
def photo(tmp_path_factory):
    path = tmp_path_factory.mktemp("photo") / "photo.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)).save(path)
    return path


def predicted(places, photo, more=""):
    out = photo.with_suffix(".json")
    succeed(
        "predict {photo} --checkpoint {vit} --device cpu --json {out} " + more, places | {"photo": photo, "out": out}
    )
    (row,) = json.loads(out.read_text())
    return row


def test_a_prediction_at_a_point(places, photo):
    assert predicted(places, photo, "--alpha 0")["tokens"] == 4 * 16
    assert predicted(places, photo, "--alpha 0 --at keep=9")["tokens"] == 9
    assert predicted(places, photo, "--alpha 0 --at keep=9 --at prune=forward")["tokens"] == 9


def test_a_prediction_in_another_precision(places, photo):
    exact, rounded = (
        {
            each["index"]: each["probability"]
            for each in predicted(places, photo, f"--top 10 --precision {name}")["classes"]
        }
        for name in ("float32", "bf16")
    )
    assert exact != rounded
    assert [rounded[index] for index in exact] == pytest.approx(list(exact.values()), abs=0.05)


def test_the_report_takes_a_precision(places, tmp_path, monkeypatch):
    from zpipe.train.report import gallery

    built = []
    monkeypatch.setattr(gallery, "build_gallery", lambda *args: built.append(args[3]) or (None, []))
    line = "report {vit} --out {out} --shards {shards} --device cpu"
    for more in ("", " --precision bf16"):
        succeed(line + more, places | {"out": tmp_path / "page"})
    assert [config.precision for config in built] == ["float32", "bf16"]


@pytest.mark.parametrize(
    ("pairs", "points"),
    [
        ([], {}),
        (["side=2,4"], {"side": (2, 4)}),
        (["side=2", "side=4", "mode=fast"], {"side": (2, 4), "mode": ("fast",)}),
        (["share=0.5, 1e-3"], {"share": (0.5, 0.001)}),
        (["text=a=b"], {"text": ("a=b",)}),
    ],
)
def test_the_values_of_at(pairs, points):
    parsed = parse_points(pairs)
    assert parsed == points
    kinds = [[type(value) for value in values] for values in points.values()]
    assert [[type(value) for value in values] for values in parsed.values()] == kinds


@pytest.fixture(scope="module")
def sided(places, tmp_path_factory):
    """A run of a model that names a setting of its own."""
    out = tmp_path_factory.mktemp("sided") / "run"
    succeed(f"train-vit {{shards}} --out {{out}} {LOOP} --model sided_vit", places | {"out": out})
    return out


class SidedViT(nn.Module):
    """A classifier of the mean colour of the upper left `side` pixels."""

    setting_names = ("side",)

    def __init__(self, img_size=SIDE, num_classes=10, in_chans=3):
        super().__init__()
        self.num_classes = num_classes
        self.num_features = in_chans
        self.head = nn.Linear(in_chans, num_classes)

    def forward(self, images, side=SIDE):
        return self.head(images[:, :, :side, :side].mean(dim=(2, 3)))

    def check(self, side):
        if not 1 <= side <= SIDE:
            raise ValueError(f"give a number from 1 to {SIDE}")
        return side

    def operating_points(self, requested):
        return points_of("side", requested.get("side", (SIDE,)), "side", self.check)


default_cfgs = untrained_cfgs("sided_vit")


@register_model
def sided_vit(pretrained=False, **kwargs):
    return timm.models.build_model_with_cfg(SidedViT, "sided_vit", pretrained, **kwargs)


def test_settings_that_a_model_names_are_evaluated_and_predicted(places, sided, photo, tmp_path):
    where = places | {"run": sided, "out": tmp_path / "rows.json", "photo": photo}
    printed = succeed("evaluate {run} {shards} --device cpu --json {out} --at side=2,4 --at side=8", where).stdout
    rows = json.loads(where["out"].read_text())["rows"]
    assert [row["side"] for row in rows] == [2, 4, 8] and "side=8" in printed
    assert "photo.png: " in succeed("predict {photo} --checkpoint {run} --device cpu --at side=2", where).stdout
    for line, message in (
        ("evaluate {run} {shards} --device cpu --at side=2,wide", "--at side wide: this setting takes no such value"),
        ("evaluate {run} {shards} --device cpu --at side=0", "--at side 0: give a number from 1 to"),
        (
            "predict {photo} --checkpoint {run} --device cpu --at side=wide",
            "side wide: this setting takes no such value",
        ),
    ):
        result = call(line, where)
        (error,) = errors_of(result.stderr)
        assert result.exit_code == 2 and message in error, error


def test_maps_commands(places, tmp_path):
    assert "40 (40 ok) in 4 shards" in succeed("maps info {maps}", places).stdout
    assert "maps: intact" in succeed("maps verify {maps} --shards {shards}", places).stdout
    succeed("maps show {maps} train_0000003 --out {out}", places | {"out": tmp_path / "map.png"})
    with Image.open(tmp_path / "map.png") as picture:
        assert picture.format == "PNG" and picture.width > 300


def test_optimizer_arguments_on_the_command_line(places, tmp_path):
    more = '--set train.opt=muon --set train.opt_args={{"nesterov":true}} --set view.crop_scale=[0.5,1]'
    succeed(zoomer(more=more), places | {"out": tmp_path / "run"})
    settings = json.loads((tmp_path / "run" / "run.json").read_text())["settings"]
    assert settings["train"]["opt_args"] == {"nesterov": True} and settings["view"]["crop_scale"] == [0.5, 1.0]


# ------------------------------------------------------------------------------------------------------------ progress


def test_progress_is_json_lines_off_a_terminal(places, tmp_path):
    printed = succeed(zoomer(more="--set train.log_every=2"), places | {"out": tmp_path / "run"}).stderr.splitlines()
    lines = [json.loads(line) for line in printed]
    assert {line["stage"] for line in lines} == {"train-zoomer"}
    assert all(0 < line["done"] <= line["total"] == 10 and line["images_per_s"] > 0 for line in lines)
    # At most one every few seconds, and the last one always.
    assert len(lines) < 5 and lines[-1]["done"] == 10


def start(*words, **streams):
    command = [sys.executable, "-c", "from zpipe.cli import main; main()", *map(str, words)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TERM": "xterm", "COLUMNS": "120"}
    return subprocess.Popen(command, env=environment, **streams)


def test_progress_is_a_bar_on_a_terminal(places):
    ours, theirs = pty.openpty()
    process = start("maps", "verify", places["maps"], stdout=subprocess.PIPE, stderr=theirs)
    os.close(theirs)
    seen, end = b"", time.monotonic() + 60
    try:
        while time.monotonic() < end and select.select([ours], [], [], 60)[0]:
            try:
                chunk = os.read(ours, 4096)
            except OSError:  # what Linux says when the other side has closed
                break
            if not chunk:
                break
            seen += chunk
        stdout, _ = process.communicate(timeout=60)
    finally:
        process.kill()
        os.close(ours)
    printed = seen.decode()
    assert process.returncode == 0
    assert "verify" in printed and "4/4" in printed and "━" in printed and "problems 0" in printed
    assert '"stage"' not in printed
    assert stdout.decode().strip().endswith("maps: intact")


def test_a_wrong_use_by_subprocess(places, tmp_path):
    process = start(*evaluate("{missing}").format(**places, out=tmp_path).split(), stderr=subprocess.PIPE)
    try:
        stderr = process.communicate(timeout=60)[1].decode()
    finally:
        process.kill()
    assert process.returncode == 2 and len(errors_of(stderr)) == 1


def test_a_study_by_the_command_line(places, tmp_path, cli):
    run = tmp_path / "run"
    shutil.copytree(places["vit"], run)
    done = cli("study", "pruning", run, places["shards"], "--alphas", "0.3", "--device", "cpu")
    assert done.code == 0, done.stderr
    assert "Table 5" in done.stdout and "backward-zoomed" in done.stdout and "pruning.parquet" in done.stdout
    assert "…" not in done.stdout
    assert (run / "results" / "pruning.json").is_file() and not (run / "evaluation.json").exists()
    refused = cli("study", "pruning", run, places["shards"], "--seeds", "a")
    assert refused.code == 2 and "--seeds a: write" in refused.error
    refused = cli("study", "tables", run, places["shards"])
    assert refused.code == 2 and "study tables: choose one of alpha-eta" in refused.error


@pytest.mark.slow  # Ray starts and ends for each of the stores
def test_a_study_of_methods_by_the_command_line(places, tmp_path, cli):
    run = tmp_path / "run"
    shutil.copytree(places["vit"], run)
    line = ("study", "map-methods", run, places["shards"], "--methods", "rollout,class-attention", "--device", "cpu")
    done = cli(*line, "--budgets", "2", "--maps", places["maps"])
    assert done.code == 2 and "--maps" in done.error and not (run / "results").exists()
    done = cli(*line, "--budgets", "2")
    assert done.code == 0, done.stderr
    assert "do better-judged maps make better Zoomers?" in done.stdout and "rank correlations" in done.stdout
    assert "top-1 at budget 2, mean of 1 seed: " in done.stdout and "the maps are not judged" in done.stdout
    assert "vit-class-attention-seed-0 trained in" in done.stderr and '"next": "rollout"' in done.stderr
    again = cli(*line, "--budgets", "2")
    assert "vit-class-attention-seed-0 was trained before" in again.stderr and "trained in" not in again.stderr


def test_the_help_of_study_lists_the_studies():
    from zpipe.train.studies.registry import STUDIES

    printed = " ".join(succeed("study --help").stdout.split())
    assert all(f"{name} {study.title}" in printed for name, study in STUDIES.items())


@pytest.mark.parametrize(
    ("line", "instead"),
    [
        ("evaluate {vit} {shards} --study zfe --seeds 0,1", "zpipe study zfe RUN SHARDS"),
        ("evaluate --study=zfe {vit} {shards}", "zpipe study zfe RUN SHARDS"),
        ("demo {out} --seeds 3", "python benchmarks/seeds.py FOLDER --seeds 3"),
    ],
)
def test_what_moved_says_where(places, tmp_path, line, instead):
    result = call(line, places | {"out": tmp_path / "out"})
    (error,) = errors_of(result.stderr)
    assert result.exit_code == 2 and instead in error and not (tmp_path / "out").exists()


def test_results_of_other_weights_and_precisions_go_elsewhere(places, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(places["plain"], run)
    printed = succeed("evaluate {run} {shards} --precision bf16 --device cpu", places | {"run": run}).stdout
    assert f"written to {run / 'evaluation-bf16.json'}" in printed and not (run / "evaluation.json").exists()
    shutil.copy(run / "model.safetensors", run / "best.safetensors")
    printed = succeed("evaluate {run} {shards} --weights best --device cpu", places | {"run": run}).stdout
    results = json.loads((run / "evaluation-best.json").read_text())
    assert (results["content"], results["weights"], results["precision"]) == ("evaluation", "best", "float32")


def test_an_interrupt_is_one_line(places, tmp_path):
    """The signal reaches the command and its data process at once, like Ctrl-C at a terminal."""
    line = zoomer(more="--epochs 10000 --data-workers 1 --image-size 224").format(**places, out=tmp_path / "run")
    streams = {"stderr": subprocess.PIPE, "stdout": subprocess.PIPE, "start_new_session": True}
    process = start(*line.split(), **streams)
    try:
        end = time.monotonic() + 60
        while not (tmp_path / "run" / "checkpoint.pt").is_file():
            assert process.poll() is None and time.monotonic() < end
            time.sleep(0.01)
        time.sleep(0.5)  # into the next epoch
        os.killpg(process.pid, signal.SIGINT)
        stderr = process.communicate(timeout=60)[1].decode()
    finally:
        process.kill()
    assert errors_of(stderr) == ["error: interrupted; run the same command again to resume"]
    assert process.returncode == 130


# ----------------------------------------------------------------------------------------------------- the whole line


def test_odd_but_legal_images_go_all_the_way(tmp_path):
    rng = np.random.default_rng(0)
    pictures = {
        "a/cmyk.jpg": ("CMYK", (40, 30), "JPEG"),
        "a/grey.jpg": ("L", (31, 57), "JPEG"),
        "a/png-in-disguise.JPEG": ("RGB", (33, 20), "PNG"),
        "b/one-pixel.png": ("RGB", (1, 1), "PNG"),
        "b/ribbon.png": ("RGBA", (200, 1), "PNG"),
        "b/palette.png": ("P", (9, 9), "PNG"),
        "b/deep.png": ("I;16", (12, 8), "PNG"),
        "b/w.webp": ("RGB", (16, 16), "WEBP"),
    }
    for name, (mode, size, kind) in pictures.items():
        path = tmp_path / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        data = rng.integers(0, 256, size[0] * size[1] * 4, dtype=np.uint8).tobytes()
        Image.frombytes(mode, size, data[: len(Image.new(mode, size).tobytes())]).save(path, kind)
    where = {name: tmp_path / name for name in ("photos", "shards", "maps", "zoomer", "vit")} | {
        "out": tmp_path / "rows"
    }
    teacher = " ".join(f"--model-arg {name}={value}" for name, value in TEACHER.items())
    lines = (
        "make-shards {photos} {shards}",
        f"extract-teacher-maps {{shards}} --out {{maps}} --teacher deit_tiny_patch16_224 --weights random {teacher} "
        "--num-classes 2 --executor local --threads 1 --device cpu",
        zoomer(out="{zoomer}"),
        vit(out="{vit}"),
        evaluate(),
        evaluate("{zoomer}", more="--maps {maps}"),
    )
    for line in lines:
        result = succeed(line, where)
        noise = [line for line in result.stderr.splitlines() if not line.startswith(("{", "warning: "))]
        assert not noise, noise
    assert len(open_maps(where["maps"])) == len(pictures)
    assert json.loads(where["out"].read_text())["rows"][0]["count"] == len(pictures)


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--seed", 2**80], "train.seed"),
        (["--epochs", "1e18"], "train.epochs 1e+18"),
        (["--epochs", "nan"], "train.epochs"),
        (["--lr", "inf"], "train.lr"),
        (["--batch-size", 2**40], "train.batch_size"),
        (["--set", "train.opt_args=" + "[" * 100_000], "train.opt_args"),
        (["--set", 'train.opt_args={"betas": [0.9]}'], "train.opt_args"),
    ],
)
def test_settings_that_no_training_could_use_are_one_line(shards, tmp_path, cli, flags, told):
    model = ["--model", "deit_tiny_patch16_224", "--image-size", 32, "--device", "cpu", "--data-workers", 0]
    done = cli("train-vit", shards, "--out", tmp_path / "run", *model, "--batch-size", 4, *flags)
    assert done.code == 2 and told in done.error and len(done.error) < 300
    assert not (tmp_path / "run" / "checkpoint.pt").exists()


def test_a_warmup_that_is_shortened_is_told(shards, tmp_path, cli):
    model = ["--model", "deit_tiny_patch16_224", "--image-size", 32, "--device", "cpu", "--data-workers", 0]
    model += ["--model-arg", "depth=1", "--batch-size", 4]
    done = cli("train-vit", shards, "--out", tmp_path / "run", *model, "--epochs", 1)
    assert done.code == 0 and "a warm-up of 5 of 1 epochs is shortened to 0.25" in done.stderr
    done = cli("train-vit", shards, "--out", tmp_path / "whole", *model, "--epochs", 20, "--set", "nothing=1")
    assert done.code == 2 and "warm-up" not in done.stderr
