"""The one training loop: a task says what the loss is, the loop does the rest."""

from __future__ import annotations

import json
import math
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import torch
from timm.layers import convert_sync_batchnorm
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3, dispatch_clip_grad
from torch import Tensor, nn

from zpipe.schemas.atomic import write_bytes
from zpipe.schemas.errors import UsageError, ZpipeError
from zpipe.schemas.progress import Progress, silent
from zpipe.train.checkpoint import (
    CHECKPOINT_NAME,
    METRICS_NAME,
    forget_attempt,
    keep_epoch,
    load_checkpoint,
    save_checkpoint,
)
from zpipe.train.data.loader import RelevanceLoader
from zpipe.train.device import keep_freed_memory, resolve_device
from zpipe.train.fit.config import TrainConfig
from zpipe.train.fit.metric_log import metric_log
from zpipe.train.ranks import Ranks, ranks


class Task(Protocol):
    """What is trained.

    model: its parameters. call: how to run it, the model itself unless the loop wraps it. draws: for random numbers that
    all ranks must draw alike, and one process too; everything else draws from torch's global generator. The loop seeds
    both for every epoch and keeps their states. done: the share of the training that lies behind, set by the loop. loss: of a batch, with figures worth
    logging, scalars where the model is. validate: figures of a model on held-out data, after every epoch (may be empty); `val_top1` among them
    decides which epoch was the best.
    """

    model: nn.Module
    call: Callable[..., Any]
    draws: torch.Generator
    done: float

    def loss(self, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]: ...
    def validate(self, model: nn.Module) -> dict[str, float]: ...


class Stopped(ZpipeError):
    """The run was asked to stop; it has saved its state."""


def never() -> bool:
    """Nobody asks us to stop."""
    return False


def train(
    task: Task,
    loader: RelevanceLoader,
    config: TrainConfig,
    run: Path,
    *,
    stage: str,
    progress: Progress = silent,
    stop: Callable[[], bool] = never,
) -> dict[str, float]:
    """Train to the end, from the run's checkpoint when there is one; return the last validation's figures.

    Several processes that torch.distributed has joined train one model: each calls this with its rank's loader, and a
    step takes the mean of their gradients. The first alone writes to the run, which all must be able to read. BatchNorm
    takes its statistics over all ranks on CUDA, over each rank's part of the batch on a CPU.

    A checkpoint is written every `checkpoint_s` seconds and after every epoch, with the loader's place and the state of the
    random numbers, so a run that was interrupted and gone on with equals an undisturbed one. `stop` is asked once a batch;
    what one rank hears all do. Errors: :class:`ZpipeError` for a loss that is not finite, naming the last good checkpoint, and
    where a device has too little memory; :class:`Stopped`.
    """
    team = ranks()
    model = task.model
    device = resolve_device(config.device)
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)  # what asks for no device by name should take this one
    if not team.alone and device.type == "cuda":
        convert_sync_batchnorm(model)  # in place
    if device.type == "cpu":
        keep_freed_memory()
    loader.set_epoch(0)
    steps_per_epoch = len(loader) // config.accumulate
    if len(loader) and not steps_per_epoch:
        raise UsageError(f"train.accumulate {config.accumulate}: an epoch has {len(loader)} batches")
    total = max(1, round(config.epochs * steps_per_epoch))
    optimizer = _optimizer(model, config)
    scheduler = _scheduler(optimizer, config, total, steps_per_epoch)
    scaler = torch.amp.GradScaler(device.type) if config.precision == "fp16" else None
    average = ModelEmaV3(model, decay=config.ema) if config.ema else None
    step, epoch, position = 0, 0, None
    state = load_checkpoint(run)
    if state is not None:
        try:
            model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
            step, epoch = state["step"], state["epoch"]
            position = state["position"]
            if position is not None and not {"loader", "draws", "ranks"} <= position.keys():
                raise KeyError("position")
            if average is not None:
                average.module.load_state_dict(state["average"])
            if scaler is not None:
                scaler.load_state_dict(state["scaler"])
        except (KeyError, RuntimeError, ValueError) as error:
            raise ZpipeError(f"{run / CHECKPOINT_NAME}: not this run's checkpoint; delete it to start over") from error
    task.call = team.share(torch.compile(model) if config.compile else model)
    del state  # as large as model and optimizer together, and from here on nobody's
    if team.first:
        if step == 0:
            forget_attempt(run)
        _trim_log(run, step, epoch_ended=position is None)
    else:
        progress = silent
    figures: dict[str, float] = {}
    begun, seen = time.monotonic(), 0
    saved, stopping = begun, False
    clock = Clock()

    def save(position: dict[str, Any] | None) -> None:
        if not team.first:
            return
        with clock("save"):
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step, "epoch": epoch}
            if average is not None:
                state["average"] = average.module.state_dict()
            if scaler is not None:
                state["scaler"] = scaler.state_dict()
            save_checkpoint(run, state | {"position": position})

    with (
        _interrupts_kept() as check_interrupt,
        _stop_on_sigterm() as stopped,
        metric_log(run, config.tensorboard, config.wandb, done=step) if team.first else nullcontext(_to_nobody) as log,
        _want_of_memory_said(run, device),
    ):

        def signs() -> tuple[bool, bool]:  # to stop, and to save; only one clock says when
            return stopped() or stop(), team.first and time.monotonic() - saved >= config.checkpoint_s

        # A position says that an epoch's end is still to come, be it only that: its validation and its weights.
        while step < total or position is not None:
            model.train()
            torch.manual_seed(_epoch_seed(config.seed, epoch, team.rank))
            task.draws.manual_seed(_epoch_seed(config.seed, epoch))
            loader.set_epoch(epoch)
            if position is not None:
                _take_position(position, loader, task.draws, team, device)
                position = None
            saved = time.monotonic()
            batches = clock.of("data", loader)
            for group in _steps(batches, config.accumulate, total - step):
                task.done = step / total
                scheduler.step(step)
                optimizer.zero_grad(set_to_none=True)
                value, facts, (stopping, due) = _accumulate(task, group, device, config, scaler, clock, team, signs)
                if not math.isfinite(value):
                    kept = (
                        f"the last good state is {run / CHECKPOINT_NAME}"
                        if (run / CHECKPOINT_NAME).is_file()
                        else "no epoch was finished"
                    )
                    raise ZpipeError(f"{run}: the loss became {value} in step {step} of {total}; lower --lr; {kept}")
                with clock("backward"):
                    _update(model, optimizer, scaler, config)
                    if average is not None:
                        average.update(model, step)
                check_interrupt()
                step += 1
                seen += sum(len(batch["label"]) for batch in group) * team.size
                if step % config.log_every == 0 or step == total:
                    rate = seen / (time.monotonic() - begun)
                    highest = max(group["lr"] for group in optimizer.param_groups)  # layer_decay lowers the others
                    facts = {"loss": value, **facts, "lr": highest, "images_per_s": rate}
                    log({"step": step, "steps": total, "epoch": epoch, **facts, **clock.shares()})
                    progress(stage, step, total, **facts)
                if stopping or due:
                    save(_position(loader, task.draws, team, device))
                    saved = time.monotonic()
                if stopping:
                    team.total([0.0])  # all wait for the one that saves: when the first leaves, Ray ends the others
                    break
            if stopping:
                break
            epoch += 1
            counts = loader.epoch_counts()
            damaged = {line for lines in team.gather(loader.damaged_shards) for line in lines}
            if len(counts) > 2 or damaged:  # samples without a map, tars left out
                progress(stage, step, total, epoch=epoch, **counts, damaged_shards=len(damaged))
            best = average.module if average is not None else model
            best.eval()
            figures = task.validate(best)
            if team.first:
                with clock("save"):
                    keep_epoch(run, best, epoch, config.keep, figures.get("val_top1"))
            if figures:
                log({"step": step, "steps": total, "epoch": epoch, **figures})
            save(None)  # last: who is killed before it does all of this again, to the same end
    if stopping:
        raise Stopped(f"{run}: stopped in step {step} of {total}; run the same command again to go on")
    if average is not None:
        model.load_state_dict(average.module.state_dict())
    task.call = model
    model.eval()
    return figures


def _accumulate(
    task: Task,
    group: list[dict[str, Any]],
    device: torch.device,
    config: TrainConfig,
    scaler: torch.amp.GradScaler | None,
    clock: Clock,
    team: Ranks,
    signs: Callable[[], tuple[bool, ...]],
) -> tuple[float, dict[str, float], list[bool]]:
    """Gradients of the mean loss of the batches of all ranks; that loss, the means of what the task told, and which of the
    `signs` any rank gives."""
    low = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(config.precision)
    value, facts, given = 0.0, Counter(), []
    for number, batch in enumerate(group):
        more = number + 1 < len(group)
        with task.call.no_sync() if more and not team.alone else nullcontext():
            with clock("forward"), torch.autocast(device.type, dtype=low) if low is not None else nullcontext():
                loss, told = task.loss(batch)
            asked = signs()
            with clock("backward"):
                share = loss / len(group)
                (share if scaler is None else scaler.scale(share)).backward()
                # Only now do we wait for an accelerator: it has the whole batch's work by then. Of a loss that isn't finite no
                # step is taken. It is the mean of all ranks before we look at it: one that went on alone would wait for the
                # others' gradients for ever.
                sums = team.total([*_numbers(loss, *told.values()), *asked])
        figures = [total / team.size / len(group) for total in sums[: 1 + len(told)]]
        given = [total > 0 for total in sums[1 + len(told) :]]
        value += figures[0]
        if not math.isfinite(value):
            break
        for name, figure in zip(told, figures[1:], strict=True):
            facts[name] += figure
    return value, dict(facts), given


def _numbers(*scalars: Tensor) -> list[float]:
    """All of them read from their device at once."""
    return torch.stack([each.detach().double() for each in scalars]).tolist()


def _update(
    model: nn.Module, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler | None, config: TrainConfig
) -> None:
    if scaler is not None:
        scaler.unscale_(optimizer)
    if config.clip_grad:
        # As timm's trainer does: adaptive clipping leaves the classifier alone (Brock et al. 2021, section 4.1).
        spared = _classifier(model) if config.clip_mode == "agc" else set()
        clipped = [parameter for parameter in model.parameters() if parameter not in spared]
        dispatch_clip_grad(clipped, config.clip_grad, mode=config.clip_mode)
    if scaler is None:
        optimizer.step()
    else:
        scaler.step(optimizer)
        scaler.update()


def _classifier(model: nn.Module) -> set[nn.Parameter]:
    """The parameters of a model's last layer or layers, as timm's interface names them; none where it has no such thing.

    timm's own choice, the last two parameters, would be others in a CF-ViT.
    """
    if not hasattr(model, "get_classifier"):
        return set()
    heads = model.get_classifier()
    return {each for head in (heads if isinstance(heads, tuple) else (heads,)) for each in head.parameters()}


class Clock:
    """Where the time goes: data, forward, backward (with the optimizer's step), save. An accelerator is waited for behind the
    backward pass, and the wait counts there: forward is then the time that it takes to hand the work over.
    """

    def __init__(self) -> None:
        self._spent: Counter[str] = Counter()

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        begun = time.perf_counter()
        try:
            yield
        finally:
            self._spent[name] += time.perf_counter() - begun

    def of(self, name: str, items: Iterable[Any]) -> Iterator[Any]:
        """The items, the waiting for each counted."""
        iterator = iter(items)
        while True:
            with self(name):
                item = next(iterator, None)
            if item is None:
                return
            yield item

    def shares(self) -> dict[str, float]:
        """Of the time counted since the last call; counting begins anew."""
        total = sum(self._spent.values())
        shares = {f"share_{name}": self._spent[name] / total for name in ("data", "forward", "backward", "save")}
        self._spent.clear()
        return shares


@contextmanager
def _interrupts_kept() -> Iterator[Callable[[], None]]:
    """A check that raises KeyboardInterrupt when Ctrl-C came and its KeyboardInterrupt was lost.

    Python prints and drops one that is raised inside a finaliser or a callback from C, and the run would go on.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return
    came: list[int] = []
    before = signal.getsignal(signal.SIGINT)

    def interrupt(number: int, frame: Any) -> None:
        came.append(number)
        if callable(before):
            before(number, frame)

    def check() -> None:
        if came:
            raise KeyboardInterrupt

    signal.signal(signal.SIGINT, interrupt)
    try:
        yield check
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def _stop_on_sigterm() -> Iterator[Callable[[], bool]]:
    """Whether SIGTERM came since. What it would have done is done at the end of the block."""
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    came: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: came.append(number))
    try:
        yield lambda: bool(came)
    finally:
        signal.signal(signal.SIGTERM, before)
    if came:
        os.kill(os.getpid(), signal.SIGTERM)


@contextmanager
def _want_of_memory_said(run: Path, device: torch.device) -> Iterator[None]:
    """A device's lack of memory as one line that says what takes less."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise ZpipeError(
            f"{run}: a step doesn't fit into the memory of {device}; lower --batch-size (train.accumulate=2 makes the step as "
            "large as before), or set train.precision=bf16"
        ) from error


def _optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    options = config.opt_args if config.layer_decay is None else config.opt_args | {"layer_decay": config.layer_decay}
    try:
        return create_optimizer_v2(model, opt=config.opt, lr=config.lr, weight_decay=config.weight_decay, **options)
    except (AssertionError, AttributeError, TypeError, ValueError) as error:
        raise UsageError(
            f"optimizer {config.opt}: {' '.join(str(error).split())[:200]}; check train.opt, train.opt_args and "
            "train.layer_decay"
        ) from error


def _scheduler(optimizer: torch.optim.Optimizer, config: TrainConfig, total: int, steps_per_epoch: int) -> Scheduler:
    """timm's scheduler, its epochs being our steps."""
    kind, decay, every = config.sched, config.decay_rate, round(config.decay_epochs * steps_per_epoch)
    if kind == "constant":
        kind, decay = "step", 1.0
    elif kind == "poly":
        decay = 1.0  # timm takes it for the polynomial's power; at 0.1 the rate would stay up until the last steps
    scheduler, _ = create_scheduler_v2(
        optimizer,
        sched=kind,
        num_epochs=total,
        warmup_epochs=round(config.warmup_epochs * steps_per_epoch),
        warmup_lr=0.0,
        min_lr=config.min_lr,
        decay_epochs=max(every, 1),
        decay_rate=decay,
    )
    return scheduler


def _position(loader: RelevanceLoader, draws: torch.Generator, team: Ranks, device: torch.device) -> dict[str, Any]:
    """Where in an epoch we are: the loader's place, and the state of every generator that draws, on all ranks."""
    # Asking for a device's generator opens the device, which a run on the CPU has no business with.
    own = {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None}
    return {"loader": loader.state_dict(), "draws": draws.get_state(), "ranks": team.gather(own)}


def _take_position(
    position: dict[str, Any], loader: RelevanceLoader, draws: torch.Generator, team: Ranks, device: torch.device
) -> None:
    loader.load_state_dict(position["loader"])
    draws.set_state(position["draws"])
    if team.rank >= len(position["ranks"]):
        return  # there were fewer ranks: this one begins with the epoch's seed
    own = position["ranks"][team.rank]
    torch.set_rng_state(own["cpu"])
    if own["cuda"] is not None and device.type == "cuda":
        torch.cuda.set_rng_state(own["cuda"], device)


def _epoch_seed(seed: int, epoch: int, rank: int = 0) -> int:
    return (seed * 1_000_003 + epoch + rank * 2_000_000_000_003) % 2**63


def _to_nobody(line: dict[str, float]) -> None:
    """The log of a rank that isn't the first."""


def _steps(batches: Iterator[dict[str, Any]], accumulate: int, count: int) -> Iterator[list[dict[str, Any]]]:
    """Groups of `accumulate` batches, at most `count` of them; an incomplete last one is dropped."""
    for _ in range(count):
        group = list(islice(batches, accumulate))
        if len(group) < accumulate:
            return
        yield group


def _trim_log(run: Path, step: int, *, epoch_ended: bool) -> None:
    """Drop the lines of what is done again, and a torn last one: the steps behind the checkpoint, and, where it was taken
    before its epoch's end, the validation there, whose line names the same step."""
    path = run / METRICS_NAME
    if path.is_file():
        read = [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]]
        kept = [
            line for line in read if line["step"] < step or line["step"] == step and ("loss" in line or epoch_ended)
        ]
        write_bytes(path, b"".join(json.dumps(line).encode() + b"\n" for line in kept))
