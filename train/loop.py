"""The one training loop: a task says what the loss is, the loop does the rest."""

from __future__ import annotations

import ctypes
import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from torch import Tensor, nn

from zpipe.schemas.atomic import write_bytes
from zpipe.schemas.errors import UsageError, ZpipeError
from zpipe.schemas.progress import Progress, silent
from zpipe.train.checkpoint import CHECKPOINT_NAME, METRICS_NAME, load_checkpoint, save_checkpoint
from zpipe.train.data.loader import RelevanceLoader


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Settings of the loop. Durations are in epochs of the training shards; fractions are allowed.

    opt: any optimizer name of timm; opt_args: further keyword arguments of its constructor (betas, nesterov).
    The learning rate rises linearly over `warmup_epochs` and falls as a cosine to `min_lr`. clip_grad: bound of the
    global gradient norm, 0 for none. num_workers: data-loading processes. checkpoint_s: seconds between checkpoints within
    an epoch; at its end there is one always.
    """

    epochs: float = 100.0
    batch_size: int = 128
    opt: str = "adamw"
    lr: float = 1e-3
    min_lr: float = 0.0
    warmup_epochs: float = 0.0
    weight_decay: float = 0.05
    opt_args: dict[str, Any] = field(default_factory=dict)
    clip_grad: float = 0.0
    seed: int = 0
    num_workers: int = 1
    log_every: int = 20
    checkpoint_s: float = 600.0
    device: str = "auto"

    def __post_init__(self) -> None:
        if self.epochs <= 0:
            raise UsageError(f"train.epochs {self.epochs:g}: give a number above 0")
        for name in (
            "lr",
            "min_lr",
            "warmup_epochs",
            "weight_decay",
            "clip_grad",
            "seed",
            "num_workers",
            "checkpoint_s",
        ):
            if getattr(self, name) < 0:
                raise UsageError(f"train.{name} {getattr(self, name):g}: give a number >= 0")
        for name in ("batch_size", "log_every"):
            if getattr(self, name) < 1:
                raise UsageError(f"train.{name} {getattr(self, name)}: give a number >= 1")


class Task(Protocol):
    """What is trained: `model`, its loss on a batch with figures worth logging, and a validation (may be empty)."""

    model: nn.Module

    def loss(self, batch: dict[str, Any]) -> tuple[Tensor, dict[str, float]]: ...
    def validate(self) -> dict[str, float]: ...


def resolve_device(asked: str) -> torch.device:
    """`auto` is the CUDA device when there is one. Errors: :class:`ZpipeError` for a device that isn't there."""
    if asked == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if asked.startswith("cuda") and not torch.cuda.is_available():
        raise ZpipeError(f"device {asked}: torch sees no CUDA device here; use --device cpu")
    try:
        return torch.device(asked)
    except RuntimeError as error:
        raise UsageError(f"device {asked}: torch knows no such device; choose auto, cpu or cuda") from error


def keep_freed_memory() -> None:
    """Make glibc keep what tensors on the CPU give back, for the next ones to take.

    It would return every large block to the kernel at once, and have each of its pages cleared and mapped again a moment
    later: a sixth of the time of a training step whose activations are large. What the process holds stays at its peak.
    Does nothing where the C library has no mallopt (macOS, musl).
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        m_mmap_max, m_trim_threshold = -4, -1
        mallopt(m_mmap_max, 0)
        mallopt(m_trim_threshold, 2**31 - 1)


def train(
    task: Task, loader: RelevanceLoader, config: TrainConfig, run: Path, *, stage: str, progress: Progress = silent
) -> dict[str, float]:
    """Train to the end, from the run's checkpoint when there is one; return the last validation's figures.

    A checkpoint is written every `checkpoint_s` seconds and after every epoch, with the loader's place and the state of the
    random numbers, so a run that was interrupted and gone on with equals an undisturbed one. Errors: :class:`ZpipeError` for a loss that is not
    finite, naming the last good checkpoint.
    """
    model = task.model
    if resolve_device(config.device).type == "cpu":
        keep_freed_memory()
    loader.set_epoch(0)
    steps_per_epoch = len(loader)
    total = max(1, round(config.epochs * steps_per_epoch))
    optimizer = _optimizer(model, config)
    scheduler = CosineLRScheduler(
        optimizer,
        t_initial=total,
        lr_min=config.min_lr,
        warmup_t=round(config.warmup_epochs * steps_per_epoch),
        warmup_prefix=False,
        t_in_epochs=False,
    )
    step, epoch, position = 0, 0, None
    state = load_checkpoint(run)
    if state is not None:
        try:
            model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
            step, epoch = state["step"], state["epoch"]
            position = state["position"]
        except (KeyError, RuntimeError, ValueError) as error:
            raise ZpipeError(f"{run / CHECKPOINT_NAME}: not this run's checkpoint; delete it to start over") from error
    _trim_log(run, step)
    figures: dict[str, float] = {}
    begun, seen = time.monotonic(), 0
    while step < total:
        model.train()
        torch.manual_seed(_epoch_seed(config.seed, epoch))
        loader.set_epoch(epoch)
        if position is not None:
            _take_position(loader, position)
            position = None
        saved = time.monotonic()
        for batch in _up_to(loader, total - step):
            scheduler.step_update(step)
            loss, facts = task.loss(batch)
            value = loss.item()
            if not math.isfinite(value):
                kept = (
                    f"the last good state is {run / CHECKPOINT_NAME}"
                    if (run / CHECKPOINT_NAME).is_file()
                    else "no epoch was finished"
                )
                raise ZpipeError(f"{run}: the loss became {value} in step {step} of {total}; lower --lr; {kept}")
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            if config.clip_grad:
                nn.utils.clip_grad_norm_(model.parameters(), config.clip_grad)
            optimizer.step()
            step += 1
            seen += len(batch["label"])
            if step % config.log_every == 0 or step == total:
                rate = seen / (time.monotonic() - begun)
                facts = {"loss": value, **facts, "lr": optimizer.param_groups[0]["lr"], "images_per_s": rate}
                _log(run, {"step": step, "epoch": epoch, **facts})
                progress(stage, step, total, **facts)
            if time.monotonic() - saved >= config.checkpoint_s:
                _save(run, model, optimizer, step, epoch, _position(loader))
                saved = time.monotonic()
        epoch += 1
        counts = loader.epoch_counts()
        if len(counts) > 2 or loader.damaged_shards:  # samples without a map, tars left out
            progress(stage, step, total, epoch=epoch, **counts, damaged_shards=len(loader.damaged_shards))
        _save(run, model, optimizer, step, epoch, None)
    model.eval()
    figures = task.validate()
    _log(run, {"step": step, "epoch": epoch, **{f"val_{name}": value for name, value in figures.items()}})
    return figures


def _optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    try:
        return create_optimizer_v2(
            model, opt=config.opt, lr=config.lr, weight_decay=config.weight_decay, **config.opt_args
        )
    except (AssertionError, TypeError, ValueError) as error:
        raise UsageError(
            f"optimizer {config.opt}: {' '.join(str(error).split())[:200]}; check train.opt and train.opt_args"
        ) from error


def _save(
    run: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    step: int,
    epoch: int,
    position: dict[str, Any] | None,
) -> None:
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step, "epoch": epoch}
    save_checkpoint(run, state | {"position": position})


def _position(loader: RelevanceLoader) -> dict[str, Any]:
    """Where in an epoch we are: the loader's place, and the state of every generator that draws."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {"loader": loader.state_dict(), "cpu": torch.get_rng_state(), "cuda": cuda}


def _take_position(loader: RelevanceLoader, position: dict[str, Any]) -> None:
    loader.load_state_dict(position["loader"])
    torch.set_rng_state(position["cpu"])
    if len(position["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(position["cuda"])


def _epoch_seed(seed: int, epoch: int) -> int:
    return (seed * 1_000_003 + epoch) % 2**63


def _up_to(loader: RelevanceLoader, count: int) -> Iterator[dict[str, Any]]:
    for number, batch in enumerate(loader):
        if number == count:
            return
        yield batch


def _trim_log(run: Path, step: int) -> None:
    """Drop the lines of steps behind the checkpoint (and a torn last one): these steps are done again."""
    path = run / METRICS_NAME
    if path.is_file():
        lines = path.read_bytes().split(b"\n")[:-1]
        write_bytes(path, b"".join(line + b"\n" for line in lines if json.loads(line)["step"] <= step))


def _log(run: Path, line: dict[str, float]) -> None:
    try:
        with open(run / METRICS_NAME, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
    except OSError as error:
        raise ZpipeError(
            f"{run / METRICS_NAME}: could not be written ({error.strerror}); free space, then run again"
        ) from error
