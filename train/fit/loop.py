"""The training loop: a task defines the loss, the Trainer does the rest."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from timm.utils import ModelEmaV3
from torch import Tensor

from zpipe.schemas.devices import is_out_of_memory
from zpipe.schemas.errors import UsageError, ZpipeError, last_line
from zpipe.schemas.progress import Progress, silent
from zpipe.train.checkpoint import keep_epoch
from zpipe.train.data.loader import RelevanceLoader
from zpipe.train.device import autocast, evaluation_context, resolve_device, to_device
from zpipe.train.fit.clock import Clock
from zpipe.train.fit.config import TrainConfig
from zpipe.train.fit.defaults import resolved
from zpipe.train.fit.late_metrics import LateMetrics
from zpipe.train.fit.metric_log import Log, metric_log, trim_log
from zpipe.train.fit.optim import make_optimizer, make_scheduler, restore_optimizer, update_weights
from zpipe.train.fit.position import epoch_seed, position_of, restore_position
from zpipe.train.fit.task import Batch, Task
from zpipe.train.fit.wrapped import lay_out, stand_in, wrap
from zpipe.train.ranks import ranks
from zpipe.train.resume_state import check_weights, load_checkpoint, save_checkpoint
from zpipe.train.run_files import CHECKPOINT_NAME, damaged_remedy, forget_attempt
from zpipe.train.signals import stop_flag

VOTES = ("samples", "stop", "save")  # sums over the ranks, beside the metrics of a step


class Stopped(ZpipeError):
    """The run was asked to stop, and has saved its state."""


def never() -> bool:
    """The default of `stop`: nobody asks the run to stop."""
    return False


class Trainer:
    """The state of a training run, and the loop over it.

    Several processes that torch.distributed has joined train one model: each has a Trainer with its rank's loader, and
    a step takes the mean of their gradients. Only the first rank writes to the run folder, which all ranks must be able
    to read. BatchNorm takes its statistics over all ranks on CUDA, and over each rank's part of the batch on a CPU.

    Args:
        task: The model and its loss.
        loader: The training batches of this rank.
        config: Settings of the loop.
        run: The run folder. If it holds a checkpoint, training resumes from there.

    Raises:
        UsageError: If an epoch has fewer batches than `config.accumulate`, or the optimizer rejects its settings.
    """

    def __init__(self, task: Task, loader: RelevanceLoader, config: TrainConfig, run: Path) -> None:
        self.config = config = resolved(config, run)
        self.task, self.loader, self.run = task, loader, run
        self.ranks = ranks()
        self.device = resolve_device(config.device)
        lay_out(task.model, self.device)
        loader.set_epoch(0)
        steps_per_epoch = len(loader) // config.accumulate
        if len(loader) and not steps_per_epoch:
            raise UsageError(f"train.accumulate {config.accumulate}: an epoch has {len(loader)} batches")
        self.total_steps = max(1, round(config.epochs * steps_per_epoch))
        self.optimizer = make_optimizer(task.model, config)
        self.scheduler = make_scheduler(
            self.optimizer, config, total_steps=self.total_steps, steps_per_epoch=steps_per_epoch
        )
        self.scaler = torch.amp.GradScaler(self.device.type) if config.precision == "fp16" else None
        self.average = ModelEmaV3(task.model, decay=config.ema) if config.ema else None
        self.step, self.epoch = 0, 0
        self._in_epoch = False  # between the start of an epoch and the end of its validation
        self._position: dict[str, Any] | None = None  # of a loaded checkpoint, until its epoch is resumed
        self._autocast = autocast(config.precision, self.device)
        self._evaluation = evaluation_context(config.precision, self.device)
        self._clock = Clock()
        self._images = 0
        self._saved_at = time.monotonic()
        self._stop_requested = never
        self._stopping, self._save_due = False, False
        self._late = LateMetrics()
        self._metrics: dict[str, float] = {}  # of the last step that was read
        self._usable = True  # whether the epoch had a sample that is not damaged

    def train(self, stage: str, progress: Progress = silent, stop: Callable[[], bool] = never) -> dict[str, float]:
        """Train to the end, from the run's checkpoint if there is one.

        A checkpoint is written every `checkpoint_s` seconds and after every epoch. It holds the loader's position and
        the states of the random number generators, so a resumed run equals an uninterrupted one bit for bit.

        Args:
            stage: Name of the training stage, for `progress`.
            progress: Called with the step, the number of steps and metrics, on the first rank only.
            stop: Called once per batch; if it returns True on any rank, all ranks save and stop.

        Returns:
            The metrics of the last validation.

        Raises:
            Stopped: If `stop` asked for it.
            KeyboardInterrupt: If Ctrl-C was pressed; the state is saved first. So it is on SIGTERM, which then ends the
                process or does what its handler does.
            ZpipeError: If the loss is not finite, the device has too little memory, or a file can't be read or written.
        """
        self._resume()
        progress = progress if self.ranks.first else silent
        metrics: dict[str, float] = {}
        begun = time.monotonic()
        with (
            stop_flag() as signalled,
            self._open_log() as log,
            explain_out_of_memory(self.run, self.device, self.config.precision),
        ):
            self._stop_requested = lambda: signalled() or stop()
            batch = stand_in(self.loader, self.loader.batch_size)
            wrap(self.task, batch, self._autocast, compile=self.config.compile)
            while self._unfinished():
                self._begin_epoch()
                for batches in self._step_batches():
                    self.train_step(batches)
                    if self.step % self.config.log_every == 0 or self.step == self.total_steps:
                        step_metrics = self.metrics()
                        step_metrics["lr"] = max(group["lr"] for group in self.optimizer.param_groups)  # the head's
                        step_metrics["images_per_s"] = self._images / (time.monotonic() - begun)
                        log(self._log_line(step_metrics) | self._clock.shares())
                        progress(stage, self.step, self.total_steps, **step_metrics)
                    if self._stopping:
                        break
                    if self._save_due:
                        self.save()
                self.metrics()  # of the last step, with the votes of all ranks
                if self._stopping:
                    self.save()
                    self.ranks.total([0.0])  # a barrier: when the first rank ends, Ray ends those that still save
                else:
                    if self.loader.damaged == "skip" and not self._usable:
                        raise ZpipeError(f"{self.loader.path}: no sample of the epoch can be used; give sound shards")
                    self.epoch, self._in_epoch = self.epoch + 1, False
                    if data_notes := self._data_notes():
                        progress(stage, self.step, self.total_steps, **data_notes)
                    metrics = self.validate()
                    if metrics:
                        log(self._log_line(metrics))
                    self.save()  # last: a run that is killed before this repeats the end of the epoch
        if self._stopping:
            raise Stopped(
                f"{self.run}: stopped in step {self.step} of {self.total_steps}; run the same command again to resume"
            )
        self._finish()
        return metrics

    def train_step(self, batches: list[Batch]) -> None:
        """Take one optimizer step on `config.accumulate` batches.

        The loss is not waited for. It is read after the next step's gradients are launched, or by `metrics`, which
        comes before every checkpoint, log line and validation.

        Raises:
            ZpipeError: If the loss of the step before is not finite.
        """
        self.task.progress = self.step / self.total_steps
        self.scheduler.step(self.step)
        self.optimizer.zero_grad(set_to_none=True)
        self._accumulate_gradients(batches)
        with self._clock("backward"):
            self._read_metrics(keep=1)
            update_weights(self.task.model, self.optimizer, self.scaler, self.config)
            if self.average is not None:
                self.average.update(self.task.model, self.step)
        self.step += 1
        self._images += sum(len(batch["label"]) for batch in batches) * self.ranks.size

    def metrics(self) -> dict[str, float]:
        """Wait for the last step, and return its loss and the metrics of the task, means over the batches of all ranks.

        All ranks must call this together. Before the first step it is empty.

        Raises:
            ZpipeError: If a loss is not finite. The weights are then of no use, but no checkpoint holds them.
        """
        with self._clock("backward"):
            self._read_metrics()
        return dict(self._metrics)

    def validate(self) -> dict[str, float]:
        """Validate the weights that would be the finished ones, and keep them as the config says."""
        self.metrics()  # raises after a loss that is not finite
        model = self.average.module if self.average is not None else self.task.model
        model.eval()
        with self._evaluation():
            metrics = self.task.validate(model)
        if self.ranks.first:
            with self._clock("save"):
                keep_epoch(self.run, model, self.epoch, self.config.keep, metrics.get("val_top1"))
        return metrics

    def state_dict(self) -> dict[str, Any]:
        """The state to resume from. All ranks must call this together: it has the generator states of all."""
        state: dict[str, Any] = {"model": self.task.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        state |= {"step": self.step, "epoch": self.epoch}
        if self.average is not None:
            state["average"] = self.average.module.state_dict()
        if self.scaler is not None:
            state["scaler"] = self.scaler.state_dict()
        position = self._position
        if self._in_epoch:
            position = position_of(self.loader, self.task.draws, self.ranks, self.device)
        return state | {"position": position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state of `state_dict`.

        Raises:
            KeyError, RuntimeError, ValueError: If the state is not one of this model and these settings.
        """
        position = state["position"]
        if position is not None and not {"loader", "draws", "ranks"} <= position.keys():
            raise KeyError("position")
        # An epoch has at least one step.
        if state["step"] > self.total_steps or state["epoch"] > state["step"]:
            place = f"step {state['step']} and epoch {state['epoch']}"
            raise ValueError(f"it is in {place}, the run has {self.total_steps} steps")
        check_weights(state["model"], self.task.model)
        self.task.model.load_state_dict(state["model"])
        restore_optimizer(self.optimizer, state["optimizer"])
        self.step, self.epoch = state["step"], state["epoch"]
        self._position, self._in_epoch = position, False
        if self.average is not None:
            check_weights(state["average"], self.average.module)
            self.average.module.load_state_dict(state["average"])
        if self.scaler is not None:
            self.scaler.load_state_dict(state["scaler"])

    def save(self) -> None:
        """Write a checkpoint. All ranks must call this together; the first one writes."""
        self.metrics()  # raises after a loss that is not finite
        with self._clock("save"):
            state = self.state_dict()
            if self.ranks.first:
                save_checkpoint(self.run, state)
        self._saved_at, self._save_due = time.monotonic(), False

    def _resume(self) -> None:
        """Load the run's checkpoint, if there is one."""
        state = load_checkpoint(self.run)
        if state is not None:
            try:
                self.load_state_dict(state)
            except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
                reason = "no " + str(error) if isinstance(error, KeyError) else last_line(error)
                raise ZpipeError(
                    f"{self.run / CHECKPOINT_NAME}: not this run's checkpoint ({reason}); {damaged_remedy(self.run)}"
                ) from error
        if self.ranks.first:
            if self.step == 0:
                forget_attempt(self.run)
            trim_log(self.run, self.step, epoch_ended=self._position is None)

    def _open_log(self) -> AbstractContextManager[Log]:
        if not self.ranks.first:
            return nullcontext(_discard)
        return metric_log(self.run, self.config.tensorboard, self.config.wandb, completed_steps=self.step)

    def _log_line(self, metrics: dict[str, float]) -> dict[str, Any]:
        return {"step": self.step, "steps": self.total_steps, "epoch": self.epoch, **metrics}

    def _unfinished(self) -> bool:
        """Whether to start or resume an epoch. A position means that at least the end of its epoch is to be done."""
        return not self._stopping and (self.step < self.total_steps or self._position is not None)

    def _begin_epoch(self) -> None:
        """Seed all generators for the epoch, or restore them to where the loaded checkpoint was taken."""
        self.task.model.train()
        torch.manual_seed(epoch_seed(self.config.seed, self.epoch, self.ranks.rank))
        self.task.draws.manual_seed(epoch_seed(self.config.seed, self.epoch))
        self.loader.set_epoch(self.epoch)
        resumed = self._position is not None
        if self._position is not None:
            self._restore_position(self._position)
            self._position = None
        self._in_epoch, self._usable = True, resumed
        self._saved_at = time.monotonic()

    def _restore_position(self, position: dict[str, Any]) -> None:
        path = self.run / CHECKPOINT_NAME
        try:
            restore_position(position, self.loader, self.task.draws, self.ranks, self.device)
        except UsageError as error:
            raise UsageError(f"{path}: {error}") from error
        if self.loader.epoch != self.epoch:
            raise ZpipeError(
                f"{path}: in epoch {self.epoch}, but its data is in epoch {self.loader.epoch}; "
                + damaged_remedy(self.run)
            )

    def _step_batches(self) -> Iterator[list[Batch]]:
        """The rest of the epoch: the batches of each step."""
        return _groups(
            self._clock.of("data", self.loader), self.config.accumulate, max_groups=self.total_steps - self.step
        )

    def _accumulate_gradients(self, batches: list[Batch]) -> None:
        """Compute the gradients of the mean loss over the batches of all ranks, and send the metrics on their way."""
        means: Tensor | None = None
        names: list[str] = []
        counts = torch.zeros(3, dtype=torch.float64)  # samples, votes to stop, votes to save
        call: Any = self.task.call  # a DistributedDataParallel if there are several ranks
        for number, batch in enumerate(batches):
            last = number + 1 == len(batches)
            weight = self._weight(batch)
            counts[0] += len(batch["key"])
            if not batch["key"]:
                batch = stand_in(self.loader, 1)  # all ranks must take part in every step
            with nullcontext() if last or self.ranks.alone else call.no_sync():
                with self._clock("forward"), self._autocast():
                    loss, metrics = self.task.loss(batch)
                    loss, metrics = loss * weight, {name: value * weight for name, value in metrics.items()}
                counts[1:] += torch.tensor(self._poll())
                with self._clock("backward"):
                    scaled = loss / len(batches)
                    (scaled if self.scaler is None else self.scaler.scale(scaled)).backward()
            names = ["loss", *metrics]
            values = torch.stack([each.detach().double() for each in (loss, *metrics.values())])
            values = values / self.ranks.size / len(batches)
            means = values if means is None else means + values
        assert means is not None  # a step has at least one batch
        # Summed before they are checked: a rank that stopped alone would let the others wait for its gradients forever.
        sums = self.ranks.sum(torch.cat([means, to_device(counts, means.device)]))
        self._late.put(self.step, [*names, *VOTES], sums)

    def _read_metrics(self, *, keep: int = 0) -> None:
        """Read the metrics of all steps but the last `keep`, and what the ranks voted for in them."""
        for step, values in self._late.take(keep=keep):
            samples, stop, save = (values.pop(name) for name in VOTES)
            self._usable |= samples > 0
            self._stopping |= stop > 0
            self._save_due |= save > 0
            self._metrics = values
            if not math.isfinite(values["loss"]):
                path = self.run / CHECKPOINT_NAME
                kept = f"the last good state is {path}" if path.is_file() else "no epoch was finished"
                raise ZpipeError(
                    f"{self.run}: the loss became {values['loss']} in step {step} of {self.total_steps}; "
                    f"lower --lr; {kept}"
                )

    def _weight(self, batch: Batch) -> float | Tensor:
        """The weight of this rank's batch in the mean over the ranks, in proportion to its samples.

        Only damaged samples that were left out make batches unequal.
        """
        if self.loader.damaged == "error":
            return 1.0
        if self.ranks.alone:
            return 1.0 if batch["key"] else 0.0
        count = torch.full((), float(len(batch["key"])), device=self.device)
        total = self.ranks.sum(count.clone())
        return count * self.ranks.size / total.clamp(min=1)

    def _poll(self) -> tuple[bool, bool]:
        """Whether this rank wants to stop, and whether a checkpoint is due, by the clock of the first rank alone.

        Several ranks do what any of them wants, one step later, when they have read its vote.
        """
        due = self.ranks.first and time.monotonic() - self._saved_at >= self.config.checkpoint_s
        stop = self._stop_requested()
        if self.ranks.alone:
            self._stopping, self._save_due = self._stopping or stop, self._save_due or due
        return stop, due

    def _data_notes(self) -> dict[str, Any]:
        """How many samples had no usable map, and what was damaged so far; empty if all data was in order."""
        counts, damage = self.loader.epoch_counts(), self.loader.damage
        every = self.ranks.gather((damage.shards, damage.places, damage.samples[:1]))
        shards = {line for lines, _, _ in every for line in lines}
        samples = {place for _, places, _ in every for place in places}
        if len(counts) <= 2 and not shards and not samples:
            return {}
        notes: dict[str, Any] = {"epoch": self.epoch, **counts, "damaged_shards": len(shards)}
        notes |= {"damaged_samples": len(samples)}
        first = [*sorted(shards), *(line for _, _, lines in every for line in lines)][:1]
        return notes | ({"first_damage": first[0]} if first else {})

    def _finish(self) -> None:
        """Leave the finished weights in the model, in eval mode and without the trainer's wrapper."""
        model = self.task.model
        if self.average is not None:
            model.load_state_dict(self.average.module.state_dict())
        self.task.call = model
        model.eval()


@contextmanager
def explain_out_of_memory(run: Path, device: torch.device, precision: str = "float32") -> Iterator[None]:
    """Turn an error that says that memory is short into one line that says what needs less."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise ZpipeError(
            f"{run}: a step doesn't fit into the memory of {device}; lower --batch-size (train.accumulate=2 makes the "
            f"step as large as before){', or set train.precision=bf16' if precision == 'float32' else ''}"
        ) from error


def _groups(batches: Iterator[Any], size: int, *, max_groups: int) -> Iterator[list[Any]]:
    """Lists of `size` consecutive batches, at most `max_groups` of them; an incomplete last one is dropped."""
    for _ in range(max_groups):
        group = list(islice(batches, size))
        if len(group) < size:
            return
        yield group


def _discard(line: dict[str, Any]) -> None:
    """The log of every rank but the first."""
