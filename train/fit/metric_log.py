"""A run's figures as they come: JSON lines always, TensorBoard and Weights & Biases when asked for."""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from zpipe.schemas.atomic import write_bytes
from zpipe.schemas.errors import UsageError, ZpipeError
from zpipe.train.checkpoint import METRICS_NAME, WANDB_ID_NAME

Log = Callable[[dict[str, float]], None]


@contextmanager
def metric_log(run: Path, tensorboard: bool = False, wandb: str | None = None, *, done: int = 0) -> Iterator[Log]:
    """A function that takes one line of figures, `step` among them. done: the step behind which the run goes on.

    Lines are appended to the run's metrics.jsonl. tensorboard: event files into the run's folder `tensorboard`. wandb: a
    project's name; there the run is called as its folder, and known by an id that the folder keeps. Errors:
    :class:`UsageError` when the package for one of them isn't installed; :class:`ZpipeError` when a line can't be written.
    """
    with ExitStack() as stack:
        sinks: list[Log] = [lambda line: _append(run / METRICS_NAME, line)]
        if tensorboard:
            sinks.append(_to_tensorboard(run, done, stack))
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


def _to_tensorboard(run: Path, done: int, stack: ExitStack) -> Log:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise UsageError("train.tensorboard: needs the package tensorboard; pip install tensorboard") from error
    writer = stack.enter_context(SummaryWriter(run / "tensorboard", purge_step=done + 1))  # those steps come again

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
    session = stack.enter_context(
        wandb.init(project=project, name=run.name, dir=str(run), id=_wandb_id(run), resume="allow")
    )
    return lambda line: session.log(line, step=line["step"])


def _wandb_id(run: Path) -> str:
    """Drawn once and kept in the run's folder: a folder's name alone may be another run's in the same project."""
    path = run / WANDB_ID_NAME
    if not path.is_file():
        write_bytes(path, f"{secrets.token_hex(8)}\n".encode())
    return path.read_text(encoding="utf-8").strip()
