"""Both training stages: interrupted runs end as undisturbed ones, and what can't go on says so in one line."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from tiny import BODY, SIDE, TEACHER, encode, scenes, store, write_shards

from zpipe import open_maps
from zpipe.schemas.errors import UsageError, ZpipeError
from zpipe.train.checkpoint import load_run, load_zoomer
from zpipe.train.fit.config import TrainConfig
from zpipe.train.fit.initialise import build_vit
from zpipe.train.fit.train_vit import VitConfig, train_vit
from zpipe.train.fit.train_zoomer import ZoomerConfig, train_zoomer
from zpipe.train.models.zoomvit import ZoomViT
from zpipe.train.resume_state import load_checkpoint
from zpipe.train.settings import with_settings

pytestmark = pytest.mark.usefixtures("one_thread")

ZOOMER, ZOOM, MAPS, PLAIN = "zoomer", "zoomvit with zoomer", "zoomvit with maps", "plain vit"
KINDS = (ZOOMER, ZOOM, MAPS, PLAIN)
each_kind = pytest.mark.parametrize("kind", KINDS)
LOOP = TrainConfig(epochs=2, batch_size=4, data_workers=0, log_every=3, device="cpu", lr=1e-3, warmup_epochs=0.5)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Shards, maps and a finished zoomer."""
    root = tmp_path_factory.mktemp("training")
    scenes(root / "shards")
    store(root / "shards", root / "maps")
    train_zoomer(root / "shards", root / "maps", root / "zoomer", config_of(ZOOMER))
    return root


def config_of(kind, **settings):
    """Dotted settings are written with two underscores."""
    if kind == ZOOMER:
        config = ZoomerConfig(num_blocks=2, width=8, image_size=SIDE, train=LOOP)
    else:
        model = "deit_tiny_patch16_224" if kind == PLAIN else "zoomvit_tiny_patch16_224"
        config = VitConfig(model=model, model_args=BODY, image_size=SIDE, train=LOOP)
    return with_settings(config, {name.replace("__", "."): value for name, value in settings.items()})


def run(data, kind, out, progress=None, **settings):
    config = config_of(kind, **settings)
    more = {"progress": progress} if progress else {}
    if kind == ZOOMER:
        return train_zoomer(data / "shards", data / "maps", out, config, **more)
    source = {ZOOM: {"zoomer": data / "zoomer"}, MAPS: {"maps": data / "maps"}, PLAIN: {}}[kind]
    return train_vit(data / "shards", out, config, **source, **more)


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory):
    """An undisturbed run of every kind."""
    root = tmp_path_factory.mktemp("finished")
    runs = {kind: root / kind.replace(" ", "-") for kind in KINDS}
    for kind, out in runs.items():
        run(data, kind, out)
    return runs


def weights(out):
    return (out / "model.safetensors").read_bytes()


def steps(out):
    return [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines()]


def snapshot(folder):
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.rglob("*") if path.is_file()}


def failure(kind, *args, **kwargs):
    with pytest.raises(ZpipeError) as error:
        run(*args, **kwargs)
    assert type(error.value) is kind and "\n" not in str(error.value), str(error.value)
    return str(error.value)


# ------------------------------------------------------------------------------------------------- a finished run


@each_kind
def test_a_finished_run_holds_what_it_says(finished, kind):
    out = finished[kind]
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [3, 6, 9, 12, 15, 18, 20]
    assert all(np.isfinite(list(line.values())).all() for line in lines)
    assert lines[0]["lr"] < lines[1]["lr"] > lines[6]["lr"]  # warm-up, then the cosine
    opened = load_run(out)
    assert opened.kind == ("zoomer" if kind == ZOOMER else "vit") and not opened.model.training
    assert opened.preprocessing.image_size == SIDE
    assert opened.settings["train"]["epochs"] == 2 and opened.settings["shards"].endswith("shards")
    assert not [path for path in out.iterdir() if path.name.startswith(".tmp-")]


@each_kind
def test_a_finished_run_is_left_alone(data, finished, kind):
    before = snapshot(finished[kind])
    assert run(data, kind, finished[kind]) == {}
    assert snapshot(finished[kind]) == before


def test_the_zoomer_travels_with_its_zoomvit_unchanged(data, finished):
    assert weights(finished[ZOOM] / "zoomer") == weights(data / "zoomer")
    copy, preprocessing = load_zoomer(finished[ZOOM] / "zoomer")
    assert copy.frozen and preprocessing == load_zoomer(data / "zoomer")[1]
    assert load_run(finished[ZOOM]).zoomer is not None and load_run(finished[MAPS]).zoomer is None


@pytest.mark.parametrize("kind", [ZOOM, MAPS, PLAIN])
@torch.no_grad()
def test_timm_opens_a_finished_run_by_itself(finished, kind):
    model = timm.create_model(f"local-dir:{finished[kind]}", pretrained=True).eval()
    ours = load_run(finished[kind]).model
    assert type(model) is type(ours) and model.pretrained_cfg["input_size"] == (3, SIDE, SIDE)
    images = torch.rand(3, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    assert torch.equal(model(images), ours(images))
    assert model(images).std() > 0


def test_another_seed_gives_other_weights(data, finished, tmp_path):
    run(data, PLAIN, tmp_path / "run", train__seed=1)
    assert weights(tmp_path / "run") != weights(finished[PLAIN])


def test_training_fits_what_it_sees(data, tmp_path):
    run(
        data,
        PLAIN,
        tmp_path / "run",
        train__epochs=15,
        train__lr=0.05,
        train__opt="muon",
        view__crop_scale=[1, 1],
        view__flip=0,
    )
    losses = [json.loads(line).get("loss") for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert losses[-2] < 0.3 * losses[0]


@pytest.mark.parametrize("settings", [{"train__opt_args": {"nesterov": True}}, {}], ids=str)
def test_muon(data, tmp_path, settings):
    run(data, MAPS, tmp_path / "run", train__opt="muon", train__clip_grad=1.0, **settings)
    assert load_run(tmp_path / "run").settings["train"]["opt"] == "muon"


def test_zoom_by_budget(data, finished, tmp_path):
    run(data, MAPS, tmp_path / "run", zoom_draw="budget", max_zoomed=3)
    assert weights(tmp_path / "run") != weights(finished[MAPS])


def test_a_convolutional_classifier_trains_too(data, tmp_path):
    run(data, PLAIN, tmp_path / "run", model="test_resnet", model_args={}, train__epochs=0.2)
    assert load_run(tmp_path / "run").model.num_classes == 10


# ------------------------------------------------------------------------------------------------ interrupted runs


class Stop(Exception):
    pass


@each_kind
@pytest.mark.parametrize("step", [3, 12, 20])
def test_a_run_that_was_stopped_ends_as_an_undisturbed_one(data, finished, tmp_path, kind, step):
    def stop(stage, done, total, **facts):
        if done == step:
            raise Stop

    out = tmp_path / "run"
    with pytest.raises(Stop):
        run(data, kind, out, progress=stop)
    assert not (out / "config.json").exists()
    run(data, kind, out)
    assert weights(out) == weights(finished[kind])
    assert (out / "config.json").read_bytes() == (finished[kind] / "config.json").read_bytes()
    assert steps(out) == steps(finished[kind])


@pytest.mark.parametrize("num_workers", [0, 2])
@each_kind
def test_a_run_that_was_stopped_in_mid_epoch_goes_on_at_that_step(data, finished, tmp_path, kind, num_workers):
    def stop(stage, done, total, **facts):
        if done == 12:
            raise Stop

    out, settings = tmp_path / "run", {"train__checkpoint_s": 0.0, "train__data_workers": num_workers}
    with pytest.raises(Stop):
        run(data, kind, out, progress=stop, **settings)
    state = load_checkpoint(out)
    assert state["step"] == 11 and state["position"]["loader"]["batch"] > 0
    first = []
    run(data, kind, out, progress=lambda stage, done, total, **facts: first.append(done), **settings)
    assert first[0] == 12
    assert weights(out) == weights(finished[kind]) and steps(out) == steps(finished[kind])


def test_state_of_the_optimizer_is_kept(data, tmp_path):
    """Momentum that is lost on the way would show in the weights."""
    settings = {"train__opt": "muon", "train__opt_args": {"nesterov": True}, "train__epochs": 3}

    def stop(stage, done, total, **facts):
        if done == 12:
            raise Stop

    run(data, MAPS, tmp_path / "whole", **settings)
    with pytest.raises(Stop):
        run(data, MAPS, tmp_path / "run", progress=stop, **settings)
    run(data, MAPS, tmp_path / "run", **settings)
    assert weights(tmp_path / "run") == weights(tmp_path / "whole")


def start(*arguments):
    """The command itself, in a process of its own."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", "from zpipe.cli import main; main()", *map(str, arguments)]
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)


def wait_for(found, process, limit=90):
    end = time.monotonic() + limit
    while not (value := found()):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < end, "took too long"
        time.sleep(0.005)
    return value


@pytest.mark.parametrize("kind", [ZOOMER, ZOOM])
def test_a_killed_run_ends_as_an_undisturbed_one(data, tmp_path, kind):
    sets = {"train.epochs": 8, "train.data_workers": 1, "train.batch_size": 4, "train.lr": 1e-3, "train.log_every": 3}
    sets |= {"train.warmup_epochs": 0.5, "train.device": "cpu", "image_size": SIDE}
    sets |= {"num_blocks": 2, "width": 8} if kind == ZOOMER else {"model_args": BODY}
    options = [f"--set={name}={json.dumps(value)}" for name, value in sets.items()]
    stage = ["train-zoomer", data / "shards", "--maps", data / "maps"]
    if kind == ZOOM:
        options += ["--model", "zoomvit_tiny_patch16_224"]
        stage = ["train-vit", data / "shards", "--zoomer", data / "zoomer"]
    whole = tmp_path / "whole"
    for i in range(5):  # on a busy machine a run may be done before it is killed
        out = tmp_path / f"run{i}"
        process = start(*stage, "--out", out, *options)
        try:
            wait_for(lambda out=out: (out / "checkpoint.pt").is_file(), process)
        finally:
            process.kill()
            process.communicate(timeout=30)
        if not (out / "config.json").exists():
            break
    else:
        pytest.fail("no run could be killed before its end")
    settings = {"train__epochs": 8, "train__data_workers": 1}
    run(data, kind, out, **settings)
    run(data, kind, whole, **settings)
    assert weights(out) == weights(whole)
    assert steps(out) == steps(whole)


def test_a_killed_data_process_is_one_line(data, tmp_path):
    options = ["--out", tmp_path / "run", "--epochs", 500, "--batch-size", 4, "--image-size", SIDE, "--data-workers", 1]
    process = start("train-zoomer", data / "shards", "--maps", data / "maps", "--num-blocks", 2, *options)
    try:
        wait_for(lambda: (tmp_path / "run" / "checkpoint.pt").is_file(), process)

        def kill_worker():
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
            for child in children:
                os.kill(int(child), signal.SIGKILL)
            return children

        wait_for(kill_worker, process)
        told = process.communicate(timeout=60)[1]
    finally:
        process.kill()
    errors = [line for line in told.splitlines() if not line.startswith("{")]
    assert len(errors) == 1 and errors[0].startswith("error: a data-loading process was killed"), told
    assert process.returncode == 1


# -------------------------------------------------------------------------------------- settings and foreign folders


@pytest.mark.parametrize(
    ("kind", "name", "value"),
    [
        (ZOOMER, "train__lr", 0.5),
        (ZOOMER, "num_blocks", 4),
        (ZOOM, "train__epochs", 3.0),
        (MAPS, "model_args", BODY | {"depth": 3}),
        (PLAIN, "train__opt_args", {"betas": [0.9, 0.9]}),
        (PLAIN, "view__flip", 0.0),
    ],
)
def test_other_settings_are_refused_by_name(data, finished, kind, name, value):
    before = snapshot(finished[kind])
    told = failure(ZpipeError, data, kind, finished[kind], **{name: value})
    leaf = {"model_args": "model_args.depth", "train__opt_args": "train.opt_args.betas"}.get(name, name)
    assert f"was begun with {leaf.replace('__', '.')} = " in told and "--out" in told and len(told) < 400
    assert snapshot(finished[kind]) == before


def test_another_source_or_stage_is_refused(data, finished):
    with pytest.raises(ZpipeError, match="begun with maps"):
        train_vit(data / "shards", finished[MAPS], config_of(MAPS), zoomer=data / "zoomer")
    with pytest.raises(ZpipeError, match="holds a vit run, this is zoomer"):
        run(data, ZOOMER, finished[MAPS])


def test_settings_can_be_corrected_before_the_first_checkpoint(data, tmp_path, finished):
    assert "train.opt" in failure(UsageError, data, PLAIN, tmp_path / "run", train__opt="sdg")
    run(data, PLAIN, tmp_path / "run")
    assert weights(tmp_path / "run") == weights(finished[PLAIN])
    assert steps(tmp_path / "run") == steps(finished[PLAIN])


def test_another_zoomer_or_other_shards_at_the_same_path_are_refused(data, tmp_path):
    scenes(tmp_path / "shards")
    shutil.copytree(data / "zoomer", tmp_path / "zoomer")

    def go(stop_at=None, root=tmp_path):
        def stop(stage, done, total, **facts):
            if done == stop_at:
                raise Stop

        config = config_of(ZOOM, train__checkpoint_s=0.0)
        train_vit(root / "shards", tmp_path / "run", config, zoomer=root / "zoomer", progress=stop)

    with pytest.raises(Stop):
        go(6)
    path = tmp_path / "zoomer" / "model.safetensors"
    own = path.read_bytes()
    path.write_bytes(own[:-4] + bytes(4))
    with pytest.raises(ZpipeError, match="damaged: their digest is not the one in the file"):
        go()
    save_file({name: tensor + 1 for name, tensor in load_file(path).items()}, path)
    with pytest.raises(ZpipeError, match="was begun with zoomer_digest = "):
        go()
    path.write_bytes(own)
    shutil.rmtree(tmp_path / "shards")
    scenes(tmp_path / "shards", 36)
    with pytest.raises(ZpipeError, match="was begun with shards_digest = "):
        go()
    shutil.rmtree(tmp_path / "shards")
    scenes(tmp_path / "shards")
    # Moved they are the same.
    (tmp_path / "moved").mkdir()
    for name in ("shards", "zoomer"):
        (tmp_path / name).rename(tmp_path / "moved" / name)
    with pytest.raises(Stop):
        go(9, tmp_path / "moved")
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["settings"]["zoomer"] == str(tmp_path / "moved" / "zoomer")
    # A run of an earlier zpipe says neither, and is gone on with.
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    del record["settings"]["shards_digest"], record["settings"]["zoomer_digest"]
    (tmp_path / "run" / "run.json").write_text(json.dumps(record))
    with pytest.raises(Stop):
        go(12, tmp_path / "moved")


def test_what_computes_nothing_may_change_in_mid_run(data, finished, tmp_path):
    def stop(stage, done, total, **facts):
        if done == 12:
            raise Stop

    with pytest.raises(Stop):
        run(data, PLAIN, tmp_path / "run", progress=stop)
    changed = {"checkpoint_s": 0.0, "log_every": 1, "keep": 1, "tensorboard": True, "device": "cpu:0"}
    run(data, PLAIN, tmp_path / "run", **{f"train__{name}": value for name, value in changed.items()})
    assert weights(tmp_path / "run") == weights(finished[PLAIN])
    assert (tmp_path / "run" / "epochs").is_dir() and (tmp_path / "run" / "tensorboard").is_dir()


def test_what_a_run_started_from_and_its_zoomers_folder_may_go(data, finished, tmp_path):
    """The first once there is a checkpoint, the second once the run is under way."""
    shutil.copytree(finished[MAPS], tmp_path / "init")
    shutil.copytree(data / "zoomer", tmp_path / "zoomer")

    def go(progress):
        config = config_of(ZOOM, init_from=str(tmp_path / "init"))
        train_vit(data / "shards", tmp_path / "run", config, zoomer=tmp_path / "zoomer", progress=progress)

    def stop(stage, done, total, **facts):
        if done == 12:
            raise Stop

    def clear(stage, done, total, **facts):
        shutil.rmtree(tmp_path / "zoomer", ignore_errors=True)

    with pytest.raises(Stop):
        go(stop)
    shutil.rmtree(tmp_path / "init")
    go(clear)
    assert load_run(tmp_path / "run").zoomer is not None


@each_kind
def test_a_foreign_folder_is_not_touched(data, tmp_path, kind):
    (tmp_path / "notes.txt").write_text("mine")
    assert "notes.txt" in failure(UsageError, data, kind, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


# --------------------------------------------------------------------------------------------------- broken states


@pytest.fixture
def stopped(data, tmp_path):
    def stop(stage, done, total, **facts):
        if done == 12:
            raise Stop

    with pytest.raises(Stop):
        run(data, PLAIN, tmp_path / "run", progress=stop)
    return tmp_path / "run"


@pytest.mark.parametrize("damage", ["empty", "3 bytes", "half", "garbage", "other", "other shapes"])
def test_a_broken_checkpoint_is_one_line(data, stopped, damage):
    path = stopped / "checkpoint.pt"
    whole = path.read_bytes()
    if damage == "other":
        torch.save({"something": 1}, path)
    elif damage == "other shapes":
        torch.save(torch.load(path) | {"model": {"x": torch.ones(1)}}, path)
    else:
        path.write_bytes(
            {"empty": b"", "3 bytes": whole[:3], "half": whole[: len(whole) // 2], "garbage": b"garbage\n" * 99}[damage]
        )
    told = failure(ZpipeError, data, PLAIN, stopped)
    assert str(path) in told and told.endswith(f"restore the file, or delete {stopped} to start over")
    assert not (stopped / "config.json").exists()


@pytest.mark.parametrize("file", ["model.safetensors", "config.json"])
@pytest.mark.parametrize("damage", ["empty", "half", "gone"])
def test_a_broken_model_file_is_one_line(finished, tmp_path, file, damage):
    for path in finished[PLAIN].iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    path = tmp_path / file
    data = path.read_bytes()
    path.unlink()
    if damage != "gone":
        path.write_bytes(b"" if damage == "empty" else data[: len(data) // 2])
    with pytest.raises(ZpipeError) as error:
        load_run(tmp_path)
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


@each_kind
def test_a_loss_that_is_not_finite_stops_the_run(data, tmp_path, kind):
    told = failure(ZpipeError, data, kind, tmp_path / "run", train__lr=1e30, train__warmup_epochs=0)
    assert "the loss became" in told and "lower --lr" in told
    assert not (tmp_path / "run" / "config.json").exists()
    assert not (tmp_path / "run" / "model.safetensors").exists()


@pytest.fixture
def small_disk(tmp_path):
    """A folder on a file system of its own, and a way to set its size."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8k", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, timeout=30).returncode:
        pytest.skip("mounting a small file system needs root and the right to mount")

    def resize(size):
        disk = os.statvfs(folder)
        used = (disk.f_blocks - disk.f_bfree) * disk.f_frsize
        size = max(size, used) // 4096 * 4096
        subprocess.run(["mount", "-o", f"remount,size={size}", str(folder)], check=True, timeout=30)

    yield folder, resize
    subprocess.run(["umount", "-l", str(folder)], check=True, timeout=30)


@each_kind
def test_a_full_disk_is_one_line_and_the_run_goes_on_later(data, finished, small_disk, kind):
    folder, resize = small_disk
    out = folder / "run"
    needed = sum(path.stat().st_size for path in finished[kind].rglob("*") if path.is_file())
    checkpoint = (finished[kind] / "checkpoint.pt").stat().st_size
    failures = 0
    # Full at the first file, in the checkpoint, beside it, and while the model is written.
    for size in (4096, checkpoint // 2, checkpoint + 16384, 2 * checkpoint + 16384, needed + 4096, 3 * needed):
        resize(size)
        try:
            run(data, kind, out)
        except ZpipeError as error:
            assert "\n" not in str(error) and str(folder) in str(error) and "free space" in str(error)
            assert not (out / "config.json").exists()
            failures += 1
    assert failures >= 3
    assert weights(out) == weights(finished[kind])


# ------------------------------------------------------------------------------------------------------- warm start


def test_a_plain_vit_starts_a_zoomvit(data, finished, tmp_path):
    source = load_run(finished[PLAIN]).model
    run(data, MAPS, tmp_path / "run", init_from=str(finished[PLAIN]), train__lr=1e-12, train__weight_decay=0)
    model = load_run(tmp_path / "run").model
    assert isinstance(model, ZoomViT)
    images = torch.rand(4, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.allclose(model(images), source(images), atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        (PLAIN, {"model_args": BODY | {"patch_size": 4}}),
        (PLAIN, {"image_size": 48}),
        (MAPS, {}),
    ],
    ids=str,
)
def test_a_run_starts_another_of_its_kind_and_other_sizes(data, finished, tmp_path, kind, settings):
    run(data, kind, tmp_path / "run", init_from=str(finished[kind]), train__lr=1e-12, train__epochs=0.1, **settings)
    body, source = (load_run(out).model.state_dict() for out in (tmp_path / "run", finished[kind]))
    for name in ("blocks.1.mlp.fc1.weight", "head.weight", "cls_token"):
        assert torch.allclose(body[name], source[name], atol=1e-6)


def test_images_are_normalised_as_the_weights_to_start_from_want(data, finished, tmp_path):
    """Many of timm's vit_* have a mean of .5; a frozen zoomer, which can't adapt, comes first."""
    begun = tmp_path / "begun"
    shutil.copytree(finished[PLAIN], begun)
    config = json.loads((begun / "config.json").read_text())
    config["pretrained_cfg"] |= {"mean": [0.5] * 3, "std": [0.25] * 3}
    (begun / "config.json").write_text(json.dumps(config))
    run(data, PLAIN, tmp_path / "plain", init_from=str(begun))
    found = load_run(tmp_path / "plain").preprocessing
    assert (found.mean, found.std) == ((0.5,) * 3, (0.25,) * 3)
    run(data, ZOOM, tmp_path / "zoom", init_from=str(begun))
    assert load_run(tmp_path / "zoom").preprocessing.mean == load_run(data / "zoomer").preprocessing.mean != found.mean

    def stop(stage, done, total, **facts):
        if done == 12:
            raise Stop

    halfway, settings = tmp_path / "halfway", {"init_from": str(begun), "train__checkpoint_s": 0.0}
    with pytest.raises(Stop):
        run(data, PLAIN, halfway, progress=stop, **settings)
    # A model that wants another normalisation than its zoomer is refused; an attempt that left no state binds nothing.
    with pytest.raises(
        UsageError, match=r"--zoomer: was trained with mean \[0.485,.* --set mean=\[0.485,0.456,0.406\] --set std"
    ):
        run(data, ZOOM, tmp_path / "other", mean=(0.5,) * 3, std=(0.5,) * 3)
    with pytest.raises(UsageError, match="mean, std: give both, or neither"):
        run(data, PLAIN, tmp_path / "other", mean=(0.5,) * 3)
    with pytest.raises(ZpipeError, match="outside the model's 1 classes"):
        run(data, PLAIN, tmp_path / "twice", num_classes=1)
    assert not (tmp_path / "twice" / "checkpoint.pt").exists()
    run(data, PLAIN, tmp_path / "twice", init_from=str(begun / "model.safetensors"))
    assert load_run(tmp_path / "twice").preprocessing == found and (tmp_path / "twice" / "run.json").is_file()
    run(data, PLAIN, tmp_path / "told", mean=(0.25, 0.5, 0.75), std=(0.1, 0.2, 0.3), init_from=str(begun))
    assert load_run(tmp_path / "told").preprocessing.std == (0.1, 0.2, 0.3)
    shutil.rmtree(begun)  # what a run was begun with is in its own folder
    run(data, PLAIN, halfway, **settings)
    assert load_run(halfway).preprocessing == found and weights(halfway) == weights(tmp_path / "plain")


@pytest.mark.parametrize(
    ("source", "told"),
    [(ZOOMER, "can't start from it"), ("deep", "can't start from it"), ("none", "no run, no checkpoint file")],
)
def test_what_no_run_can_start_from(data, finished, tmp_path, source, told):
    if source == "deep":
        run(data, PLAIN, tmp_path / "deep", model_args=BODY | {"depth": 3}, train__epochs=0.1)
    path = finished.get(source, tmp_path / source)
    kind = UsageError if source == "none" else ZpipeError
    assert told in failure(kind, data, MAPS, tmp_path / "run", init_from=str(path))
    # The mistake doesn't bind the folder.
    run(data, MAPS, tmp_path / "run", init_from=str(finished[PLAIN]), train__epochs=0.1)


@pytest.mark.parametrize("name", ["deit_tiny_patch16_224.bogus", "deit_nano_patch16_224"])
def test_weights_that_timm_does_not_have(data, tmp_path, name):
    told = failure(ZpipeError, data, PLAIN, tmp_path / "run", init_from=f"timm:{name}")
    assert told.startswith(f"timm:{name}: ") and told.endswith("see timm.list_pretrained()")


# ------------------------------------------------------------------------------------------------------ wrong input


def test_a_label_outside_the_classes_names_its_key(tmp_path):
    image = encode(np.zeros((SIDE, SIDE, 3), np.uint8))
    members = {f"k{number}.{suffix}": data for number in range(8) for suffix, data in (("png", image), ("cls", b"1"))}
    shards = write_shards(tmp_path / "s", [members | {"odd.png": image, "odd.cls": b"7"}])
    config = config_of(PLAIN, train__batch_size=9)
    with pytest.raises(UsageError, match="names no classes; give --num-classes"):
        train_vit(shards, tmp_path / "run", config)
    with pytest.raises(ZpipeError, match="key odd: label 7 is outside the model's 2 classes"):
        train_vit(shards, tmp_path / "run", replace(config, num_classes=2))


@pytest.mark.parametrize(
    ("kind", "settings", "told"),
    [
        (ZOOMER, {"num_blocks": 3}, "num_blocks must be 2, 4 or 6"),
        (ZOOMER, {"w_kl": -1.0}, "loss weights"),
        (ZOOMER, {"kl_direction": "both"}, "kl_direction"),
        (ZOOMER, {"missing": "ignore"}, "setting missing: 'ignore'; choose one of error, skip, uniform"),
        (ZOOMER, {"image_size": 0}, "image_size 0"),
        (PLAIN, {"model": "vit_enormous"}, "model vit_enormous"),
        (PLAIN, {"model_args": {"depht": 2}}, "depht"),
        (PLAIN, {"model_args": BODY | {"num_heads": 5}}, "model deit_tiny"),
        (PLAIN, {"model_args": BODY | {"patch_size": 0}}, "model deit_tiny"),
        (PLAIN, {"model_args": BODY | {"num_classes": 3}}, "--num-classes"),
        (PLAIN, {"model_args": BODY | {"img_size": 64}}, "--image-size"),
        (PLAIN, {"train__opt": "adamwww"}, "train.opt"),
        (PLAIN, {"train__opt_args": {"beta": 1}}, "train.opt_args"),
        (PLAIN, {"train__device": "tpu9"}, "device tpu9"),
        (PLAIN, {"train__batch_size": 100}, "too few samples"),
        (PLAIN, {"num_classes": -2}, "num_classes -2"),
        (MAPS, {"model_args": BODY | {"patch_size": 4}}, "maps of 4 x 4, the model wants 8 x 8"),
        (ZOOM, {"model_args": BODY | {"patch_size": 4}}, "scores of 4 x 4, the model wants 8 x 8"),
        (MAPS, {"zoom_draw": "budget", "max_zoomed": 17}, "max_zoomed 17: this model has 16 cells"),
        (MAPS, {"zoom_draw": "budget", "max_zoomed": -1}, "max_zoomed -1"),
    ],
    ids=str,
)
def test_wrong_settings(data, tmp_path, kind, settings, told):
    assert told in failure(UsageError, data, kind, tmp_path / "run", **settings)
    assert not (tmp_path / "run" / "checkpoint.pt").exists()


@pytest.mark.parametrize("source", ["none", "both", "plain with zoomer", "vit as zoomer", "folder as zoomer"])
def test_a_model_and_its_source_of_scores_must_fit(data, finished, tmp_path, source):
    kind = PLAIN if source == "plain with zoomer" else ZOOM
    zoomer = {"none": None, "vit as zoomer": finished[PLAIN], "folder as zoomer": tmp_path}.get(source, data / "zoomer")
    with pytest.raises(UsageError) as error:
        train_vit(
            data / "shards",
            tmp_path / "run",
            config_of(kind),
            zoomer=zoomer,
            maps=data / "maps" if source == "both" else None,
        )
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_maps_must_be_square_for_a_zoomer(data, tmp_path):
    store(data / "shards", tmp_path / "maps", img_size=[32, 48])
    with pytest.raises(UsageError, match="maps of 4 x 6 cells"):
        train_zoomer(data / "shards", tmp_path / "maps", tmp_path / "run", config_of(ZOOMER))


def test_a_model_argument_of_the_teacher_is_a_plain_vits_too():
    model = build_vit(config_of(PLAIN).model, 3, TEACHER["img_size"], config_of(PLAIN).model_args)
    assert model.patch_embed.grid_size == (4, 4) and model.num_classes == 3


@pytest.mark.parametrize("kind", [ZOOMER, MAPS, PLAIN])
def test_a_run_says_which_maps_and_which_teacher_it_learned_from(data, finished, kind):
    provenance = open_maps(data / "maps").manifest.provenance
    settings = load_run(finished[kind]).settings
    expected = (None, None) if kind == PLAIN else (provenance.fingerprint(), provenance.teacher_digest)
    assert (settings["maps_fingerprint"], settings["maps_teacher"]) == expected
