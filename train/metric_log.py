"""A run's figures as they come: JSON lines always, TensorBoard and Weights & Biases when asked for."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from zpipe.schemas.errors import UsageError, ZpipeError
from zpipe.train.checkpoint import METRICS_NAME

Log = Callable[[dict[str, float]], None]


@contextmanager
def metric_log(run: Path, tensorboard: bool = False, wandb: str | None = None) -> Iterator[Log]:
    """A function that takes one line of figures, `step` among them.

    Lines are appended to the run's metrics.jsonl. tensorboard: event files into the run's folder `tensorboard`. wandb: a
    project's name. Errors: :class:`UsageError` when the package for one of them isn't installed; :class:`ZpipeError` when
    a line can't be written.
    """
    with ExitStack() as stack:
        sinks: list[Log] = [lambda line: _append(run / METRICS_NAME, line)]
        if tensorboard:
            sinks.append(_to_tensorboard(run, stack))
        if wandb is not None:
            sinks.append(_to_wandb(run, wandb, stack))

        def log(line: dict[str, float]) -> None:
            for sink in sinks:
                sink(line)

        yield log


def _append(path: Path, line: dict[str, float]) -> None:
    try:
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
    except OSError as error:
        raise ZpipeError(f"{path}: could not be written ({error.strerror}); free space, then run again") from error


def _to_tensorboard(run: Path, stack: ExitStack) -> Log:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise UsageError("train.tensorboard: needs the package tensorboard; pip install tensorboard") from error
    writer = stack.enter_context(SummaryWriter(run / "tensorboard"))

    def log(line: dict[str, float]) -> None:
        for name, value in line.items():
            if name not in ("step", "steps"):
                writer.add_scalar(name, value, line["step"])

    return log


def _to_wandb(run: Path, project: str, stack: ExitStack) -> Log:
    try:
        import wandb
    except ImportError as error:
        raise UsageError("train.wandb: needs the package wandb; pip install wandb") from error
    session = stack.enter_context(wandb.init(project=project, name=run.name, dir=str(run), id=run.name, resume="allow"))
    return lambda line: session.log(line, step=line["step"])
