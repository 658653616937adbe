"""Several training processes are as good as one: same curve, same bits after a kill, same one line on an error.

What the loop does on several ranks is tested in two processes joined by gloo alone; what Ray adds, through the command.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import tarfile
import time
import traceback
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from listening import addresses, reachable
from tiny import BODY, SIDE, scenes, store, write_tar

from zpipe.schemas.errors import UsageError, ZpipeError
from zpipe.train.checkpoint import load_run
from zpipe.train.evaluation.evaluate import evaluate
from zpipe.train.evaluation.operating_points import EvalConfig
from zpipe.train.fit.config import TrainConfig
from zpipe.train.fit.distributed import Workers, _is_a_lost_process, run_training
from zpipe.train.fit.train_vit import VitConfig, train_vit
from zpipe.train.fit.train_zoomer import ZoomerConfig, train_zoomer
from zpipe.train.ranks import Ranks, check_batch
from zpipe.train.resume_state import load_checkpoint

torch.set_num_threads(1)
LOOP = TrainConfig(epochs=4, batch_size=8, data_workers=0, log_every=1, device="cpu", lr=1e-3)
ZOOM = VitConfig(model="zoomvit_tiny_patch16_224", model_args=BODY, image_size=SIDE, scores="centre", train=LOOP)
PLAIN = replace(ZOOM, model="deit_tiny_patch16_224", scores=None)
DROP = replace(PLAIN, model_args=BODY | {"drop_path_rate": 0.3}, mixup=0.8)
LONG = replace(DROP, train=replace(LOOP, epochs=16, checkpoint_s=0.0))
# 57 million parameters, 690 MB with the optimizer's: it takes a while to save.
LARGE_BODY = {"embed_dim": 768, "depth": 8, "num_heads": 12}
BROKEN = replace(PLAIN, num_classes=10, damaged="skip", train=replace(LOOP, batch_size=4))
LARGE = replace(DROP, model_args=DROP.model_args | LARGE_BODY, train=replace(LOOP, epochs=400, checkpoint_s=600.0))
STEPS = 20  # of four epochs

# Measured: 2e-7 in the losses and 6e-6 in the weights after 15 steps of AdamW, in float32.
LOSS_TOLERANCE, WEIGHT_TOLERANCE = 1e-5, 1e-3


def with_loop(config, **changes):
    return replace(config, train=replace(config.train, **changes))


def weights(run):
    return safetensors.torch.load_file(run / "model.safetensors")


def same_weights(one, other):
    return (one / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()


def furthest(one, other):
    return max(float((value - weights(other)[name]).abs().max()) for name, value in weights(one).items())


def lines(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def losses(run):
    return [line["loss"] for line in lines(run) if "loss" in line]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("distributed")
    scenes(root / "shards")
    scenes(root / "val", 20, split="val", shard_size=20)  # one shard: a second rank has none
    store(root / "shards", root / "maps")
    break_images(scenes(root / "broken", 16, shard_size=8))
    return root


def break_images(shards):
    """Leave three images of the first of two shards; a rank has one of the two, so some of its batches are empty."""
    (shards / "shards.json").unlink()
    path = min(shards.glob("*.tar"))
    with tarfile.open(path) as tar:
        members = [(member.name, tar.extractfile(member).read()) for member in tar]
    kept = sorted({name.partition(".")[0] for name, _ in members})[:3]
    broken = {name for name, _ in members if name.endswith(".jpg") and not name.startswith(tuple(kept))}
    write_tar(path, [(name, b"?" if name in broken else data) for name, data in members])


# ------------------------------------------------------------------------------------ two processes, joined by gloo


def stop_in_step(number):
    """Asks to stop in that step; the loop asks once a step. The votes of all ranks are read in it if it is logged."""
    asked = []

    def stop():
        asked.append(1)
        return len(asked) == number

    return stop


def jobs(data, out):
    """The jobs of both ranks, in order: name -> (function, arguments, step in which the second rank stops it)."""
    shards = data / "shards"

    def vit(name, config, stop=0, **more):
        return train_vit, (shards, out / name, config), more, stop

    return {
        "zoom": vit("zoom", ZOOM),
        "accumulated": vit("accumulated", with_loop(ZOOM, accumulate=2, batch_size=4, ema=0.9)),
        "validated": vit("validated", with_loop(ZOOM, epochs=1), val=data / "val"),
        "drop": vit("drop", DROP),
        "drop stopped": vit("again", DROP, stop=7),
        "drop gone on with": vit("again", with_loop(DROP, data_workers=1)),
        "for one": vit("for one", ZOOM, stop=8),
        "stopped late": vit("late", with_loop(ZOOM, log_every=1000), stop=3),
        "long": vit("long", LONG),
        "zoomer": (train_zoomer, (shards, data / "maps", out / "zoomer", zoomer_config()), {}, 0),
        "repeated": vit("repeated", with_loop(ZOOM, repeats=3)),
        "broken": (train_vit, (data / "broken", out / "broken", BROKEN), {}, 0),
        "not finite": vit("not finite", with_loop(PLAIN, lr=1e30, warmup_epochs=0.0)),
        "other settings": vit("zoom", with_loop(ZOOM, lr=0.5)),
        "wrong": vit("wrong", replace(ZOOM, scores=None)),
    }


def zoomer_config():
    return ZoomerConfig(num_blocks=2, width=8, image_size=SIDE, train=LOOP)


def work(rank, port, data, out, told):
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=2)
    for name, (function, arguments, more, at) in jobs(data, out).items():
        stop = {"stop": stop_in_step(at)} if at and rank == 1 else {}
        try:
            function(*arguments, **more, **stop)
        except ZpipeError as error:
            told.put((name, rank, type(error).__name__, str(error)))
            if at:  # what is saved at the moment in which this rank leaves
                told.put((f"{name}: saved", rank, "step", load_checkpoint(out / arguments[1].name)["step"]))
        except BaseException:
            traceback.print_exc()
            raise
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def pair(data, tmp_path_factory):
    """The folder of the runs of two ranks; their errors as (job, rank) -> (kind, text); what was saved then."""
    out = tmp_path_factory.mktemp("pair")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    told = mp.get_context("spawn").Queue()
    mp.spawn(work, (port, data, out, told), nprocs=2)
    errors = {}
    while not told.empty():
        name, rank, kind, text = told.get()
        errors[name, rank] = kind, text
    return out, errors


def test_two_ranks_give_the_curve_of_one_process(data, pair, tmp_path):
    """Under random thresholds: images of a batch zoom alike whichever rank has them."""
    train_vit(data / "shards", tmp_path / "one", ZOOM)
    one, two = losses(tmp_path / "one"), losses(pair[0] / "zoom")
    assert len(one) == len(two) == STEPS and len({round(loss, 3) for loss in one}) > 10
    assert two == pytest.approx(one, abs=LOSS_TOLERANCE)
    assert furthest(tmp_path / "one", pair[0] / "zoom") < WEIGHT_TOLERANCE
    top1 = [[line["train_top1"] for line in lines(run)] for run in (tmp_path / "one", pair[0] / "zoom")]
    assert top1[0] == pytest.approx(top1[1])


@pytest.mark.parametrize(
    ("name", "changes"), [("accumulated", {"accumulate": 2, "batch_size": 4, "ema": 0.9}), ("repeated", {"repeats": 3})]
)
def test_and_with_accumulated_gradients_averages_and_repeats(data, pair, tmp_path, name, changes):
    train_vit(data / "shards", tmp_path / "one", with_loop(ZOOM, **changes))
    assert losses(pair[0] / name) == pytest.approx(losses(tmp_path / "one"), abs=LOSS_TOLERANCE)
    assert furthest(tmp_path / "one", pair[0] / name) < WEIGHT_TOLERANCE
    assert len(losses(pair[0] / name)) == STEPS


def test_a_rank_whose_batch_is_all_damaged_takes_part_in_the_step(data, pair, tmp_path):
    """Every sample counts alike, whichever rank has it."""
    told = []
    train_vit(data / "broken", tmp_path / "one", BROKEN, progress=lambda *stage, **facts: told.append(facts))
    one, two = losses(tmp_path / "one"), losses(pair[0] / "broken")
    assert len(one) == 16 and two == pytest.approx(one, abs=LOSS_TOLERANCE)
    assert furthest(tmp_path / "one", pair[0] / "broken") < WEIGHT_TOLERANCE
    (notes,) = [facts for facts in told if facts.get("epoch") == 4 and "damaged_samples" in facts]
    assert notes["damaged_samples"] == 5 and notes["damaged_shards"] == 0
    assert "can't be decoded" in notes["first_damage"] and ": key " in notes["first_damage"]


def test_ranks_validate_every_sample_once(data, pair):
    run = pair[0] / "validated"
    row = evaluate(run, data / "val", EvalConfig(alphas=(ZOOM.val_alpha,), device="cpu"))["rows"][0]
    assert [line["val_top1"] for line in lines(run) if "val_top1" in line] == [pytest.approx(row["top1"])]
    assert json.loads((run / "best.json").read_text())["epoch"] == 1


def test_a_stop_that_one_rank_hears_of_ends_all_and_is_gone_on_with(pair):
    """Drop-path and mixing draw on each rank for itself; all of their generators come back."""
    out, errors = pair
    for rank in range(2):
        told = f"{out / 'again'}: stopped in step 7 of 20; run the same command again to resume"
        assert errors["drop stopped", rank] == ("Stopped", told)
    assert same_weights(out / "again", out / "drop")
    assert [line["step"] for line in lines(out / "again")] == list(range(1, STEPS + 1))


def test_no_rank_leaves_before_the_state_is_saved(pair):
    """Ray ends the others when the first of them leaves."""
    saved = {key: step for key, (kind, step) in pair[1].items() if kind == "step"}
    stops = (("drop stopped", 7), ("for one", 8), ("stopped late", 4))  # the last reads the votes one step late
    assert saved == {(f"{name}: saved", rank): step for name, step in stops for rank in (0, 1)}


def test_ranks_draw_apart_what_is_theirs(pair):
    first, second = (own["cpu"] for own in load_checkpoint(pair[0] / "for one")["position"]["ranks"])
    assert not torch.equal(first, second)


def test_what_two_ranks_began_one_process_ends(data, pair, tmp_path):
    run = pair[0] / "for one"
    assert load_checkpoint(run)["step"] == 8
    train_vit(data / "shards", run, with_loop(ZOOM, data_workers=1))
    train_vit(data / "shards", tmp_path / "one", ZOOM)
    assert losses(run) == pytest.approx(losses(tmp_path / "one"), abs=LOSS_TOLERANCE)
    assert furthest(run, tmp_path / "one") < WEIGHT_TOLERANCE


def test_a_zoomer_is_trained_by_two(pair):
    """BatchNorm sees a rank's part of the batch on a CPU, so the curve is another one than that of one process."""
    found = losses(pair[0] / "zoomer")
    assert len(found) == STEPS and max(found) < 0.5
    assert load_run(pair[0] / "zoomer").kind == "zoomer"


def test_all_ranks_end_with_one_error(pair):
    _, errors = pair
    for rank in range(2):
        assert "the loss became" in errors["not finite", rank][1]
        assert errors["wrong", rank][0] == "UsageError"
        assert "was begun with train.lr = 0.001, now it is 0.5" in errors["other settings", rank][1]
    assert {name for name, _ in errors if ": saved" not in name} == {
        "drop stopped",
        "for one",
        "not finite",
        "other settings",
        "stopped late",
        "wrong",
    }


# ------------------------------------------------------------------------------------------------- before Ray begins


def test_a_batch_must_come_out_even(process, data, tmp_path):
    assert Ranks(1, 4).part(12) == 3
    with pytest.raises(UsageError, match="train.batch_size 10: can't be shared evenly by 4"):
        check_batch(10, 4)
    told = process("train-vit", data / "shards", "--out", tmp_path / "run", "--batch-size", 5, "--num-workers", 2)
    assert told.code == 2 and "give --batch-size 4 or 6, or another number of processes" in told.error
    assert not (tmp_path / "run").exists()


def test_processes_share_no_gpu():
    config = with_loop(PLAIN, device="cuda:1")
    with pytest.raises(UsageError, match="--device cuda:1: training processes take a GPU each; give --device cuda,"):
        run_training(train_vit, {}, config, Workers(count=2))


def test_no_workers_is_this_process():
    seen = {}
    run_training(lambda **given: seen.update(given), {"out": Path("x")}, PLAIN, Workers(count=0))
    assert seen["out"] == Path("x") and seen["config"] is PLAIN and dist.is_initialized() is False


def test_an_address_where_nobody_answers(cli, data, tmp_path):
    options = ["--batch-size", 8, "--num-workers", 2, "--address", "127.0.0.1:1"]
    told = cli("train-vit", data / "shards", "--out", tmp_path / "run", *options)
    assert told.code == 1 and "Ray at 127.0.0.1:1 could not be reached" in told.error


def test_a_run_that_is_there_may_be_refused(cli, data, tmp_path):
    options = [
        "--out",
        tmp_path / "run",
        "--model",
        PLAIN.model,
        "--image-size",
        SIDE,
        "--epochs",
        1,
        "--batch-size",
        8,
    ]
    options += ["--data-workers", 0, "--device", "cpu", "--set", f"model_args={json.dumps(BODY)}"]
    assert cli("train-vit", data / "shards", *options, "--resume", "never").code == 0
    told = cli("train-vit", data / "shards", *options, "--resume", "never")
    assert told.code == 2
    assert told.error.endswith("holds a run already; give another --out, or --resume auto to resume it")
    assert cli("train-vit", data / "shards", *options, "--data-workers", 1).code == 0
    assert cli("train-vit", data / "shards", *options, "--resume", "always").code == 2


# ---------------------------------------------------------------------------------------------- the command, on Ray


def processes():
    """Of every process its parent and its name."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            found[int(folder.name)] = parent, (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode().strip()
        except (FileNotFoundError, ProcessLookupError):  # it ended meanwhile
            continue
    return found


class Running:
    """A command under way, and every process that was ever seen below it."""

    def __init__(self, line, log):
        environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
        self.log = log
        with open(log, "w") as file:
            streams = {"stdout": file, "stderr": file, "stdin": subprocess.DEVNULL}
            self.process = subprocess.Popen(line, env=environment | {"OMP_NUM_THREADS": "1"}, **streams)
        self.below = {}

    def said(self):
        return self.log.read_text()

    def look(self):
        """The names of its descendants that are alive, by process id. Remembers those that it saw."""
        now, known = processes(), {self.process.pid, *self.below}
        while more := {pid for pid, (parent, _) in now.items() if parent in known and pid not in known}:
            known |= more
            self.below |= {pid: now[pid][1] for pid in more}
        return {pid: now[pid][1] for pid in self.below if pid in now}

    def until(self, found, limit=240, every=0.02):
        end = time.monotonic() + limit
        while not (value := found(self.look())):
            assert self.process.poll() is None, self.said()
            assert time.monotonic() < end, self.said()
            time.sleep(every)
        return value

    def wait(self, limit=240):
        """Its exit code, when nothing that it started is left."""
        end = time.monotonic() + limit
        while self.process.poll() is None:
            self.look()
            assert time.monotonic() < end, self.said()
            time.sleep(0.1)
        end = time.monotonic() + 20  # data processes look for their parent every few seconds
        while left := self.look():
            assert time.monotonic() < end, left
            time.sleep(0.1)
        return self.process.returncode


@pytest.fixture
def on_ray(command, data, tmp_path):
    """Start `train-vit` in two processes on Ray: `on_ray(run, config, *options) -> Running`."""
    started = []

    def run(out, config, *options):
        sets = {"model_args": config.model_args, "mixup": config.mixup, "train.log_every": 1}
        sets |= {"train.checkpoint_s": config.train.checkpoint_s, "train.warmup_epochs": 0.0}
        flags = [f"--set={name}={json.dumps(value)}" for name, value in sets.items()]
        flags += ["--model", config.model, "--image-size", SIDE, "--batch-size", 8, "--epochs", config.train.epochs]
        flags += ["--device", "cpu", "--num-workers", 2, *options]
        running = Running(command("train-vit", data / "shards", "--out", out, *flags), tmp_path / "log")
        started.append(running)
        return running

    yield run
    for running in started:
        left = running.look()
        for pid in [running.process.pid, *left] if running.process.poll() is None else left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        running.process.wait(30)


def steps_done(run):
    path = run / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.is_file() else 0


def test_a_killed_worker_changes_nothing(pair, on_ray, tmp_path):
    """All ranks restart from the last checkpoint, in mid-epoch, and end bit for bit as an undisturbed run."""
    run = tmp_path / "run"
    running = on_ray(run, LONG, "--data-workers", 0)

    def worker(below):
        assert reachable([running.process.pid, *below]) == set()  # from other machines
        return steps_done(run) >= 8 and [pid for pid, name in below.items() if "RayTrainWorker" in name]

    victims = running.until(worker, every=0.2)
    os.kill(victims[-1], signal.SIGKILL)
    killed_at = steps_done(run)
    assert killed_at < 60
    assert running.wait() == 0, running.said()
    assert same_weights(run, pair[0] / "long")
    assert [line["step"] for line in lines(run)] == list(range(1, 81))
    said = running.said()
    warnings = [line for line in said.splitlines() if line.startswith("warning: ")]
    assert len(warnings) == 1 and "all begin again from the last checkpoint" in warnings[0] and len(warnings[0]) < 300
    assert "Traceback" not in said and "model ready" in said
    progress = [json.loads(line) for line in said.splitlines() if line.startswith("{")]
    assert progress[-1]["done"] == progress[-1]["total"] == 80


@pytest.mark.slow
def test_training_on_one_machine_listens_on_the_loopback_interface_alone(on_ray, tmp_path):
    """Ray, its workers, and what joins the ranks, so says the operating system. When it is killed, nobody is left."""
    running = on_ray(tmp_path / "run", LONG, "--data-workers", 1)

    def training(below):
        assert reachable([running.process.pid, *below]) == set()
        return steps_done(tmp_path / "run") >= 3

    running.until(training, every=0.2)
    ranks = [pid for pid, name in running.look().items() if "RayTrainWorker" in name]
    assert len(ranks) >= 2 and addresses(ranks)
    running.process.kill()
    assert running.wait() == -signal.SIGKILL, running.said()


@pytest.mark.slow
def test_an_interrupted_command_saves_and_leaves_nobody(data, on_ray, tmp_path):
    run = tmp_path / "run"
    running = on_ray(run, LARGE, "--data-workers", 1)
    running.until(lambda below: steps_done(run) >= 3)
    running.process.send_signal(signal.SIGTERM)
    assert running.wait() == 1
    said = [line for line in running.said().splitlines() if not line.startswith("{")]
    assert said[-1] == "error: terminated; run the same command again to resume" and len(said) == 2
    assert said[0].startswith("stopping: the training processes save their state")
    state = load_checkpoint(run)
    assert state["step"] == lines(run)[-1]["step"] < 2000 and len(state["position"]["ranks"]) == 2


@pytest.mark.slow
def test_an_interrupted_command_says_when_it_could_not_save(on_ray, small_disk):
    run = small_disk.root / "run"
    running = on_ray(run, LARGE, "--data-workers", 0, "--batch-size", 2)
    running.until(lambda below: steps_done(run) >= 3)
    running.process.send_signal(signal.SIGTERM)
    assert running.wait() == 1
    said = [line for line in running.said().splitlines() if not line.startswith("{")]
    assert len(said) == 3 and said[1].startswith("warning: their state was not saved (")
    assert "checkpoint.pt: could not be written" in said[1] and said[1].endswith("the last checkpoint stands")
    assert said[-1] == "error: terminated; run the same command again to resume"
    assert load_checkpoint(run) is None


@pytest.mark.slow
def test_what_one_process_would_fail_on_is_one_line(on_ray, tmp_path):
    """Found by one rank while the other waits for it; there is no second try."""
    running = on_ray(tmp_path / "run", PLAIN, "--num-classes", 9)
    assert running.wait() == 1
    said = [line for line in running.said().splitlines() if not line.startswith("{")]
    assert len(said) == 1 and "is outside the model's 9 classes" in said[0] and said[0].startswith("error: key ")


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        (RuntimeError("[/src/gloo/transport/tcp/pair.cc:561] Connection closed by peer [127.0.0.1]:56023."), True),
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed."), True),
        (RuntimeError("CUDA error: uncorrectable ECC error encountered"), True),
        (dist.DistBackendError("NCCL error: remote process exited"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied (2x3 and 2x3)"), False),
        (torch.OutOfMemoryError("CUDA out of memory."), False),
        (KeyError("gloo"), False),
    ],
)
def test_which_errors_mean_a_lost_process(error, lost):
    assert _is_a_lost_process(error) is lost


@pytest.mark.slow
def test_a_mistake_of_ours_is_no_lost_process(tmp_path):
    """One rank raises what is no ZpipeError while the other waits for it: the first one's error, and no second try."""

    def broken(told, **given):
        import torch.distributed

        (told / str(torch.distributed.get_rank()) / str(os.getpid())).mkdir(parents=True)
        torch.distributed.barrier()
        if torch.distributed.get_rank() == 1:
            raise LookupError("a mistake")
        torch.distributed.barrier()

    warnings = []
    with pytest.raises(LookupError, match="a mistake"):
        run_training(broken, {"told": tmp_path}, PLAIN, Workers(count=2), say=warnings.append)
    assert warnings == [] and [len(list((tmp_path / rank).iterdir())) for rank in "01"] == [1, 1]
