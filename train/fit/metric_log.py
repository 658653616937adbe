"""The metrics of a run: JSON lines always, TensorBoard and Weights & Biases on request."""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from math import isfinite
from pathlib import Path
from typing import Any

from zpipe.schemas.atomic import write_bytes
from zpipe.schemas.errors import UsageError, ZpipeError, first_line, remedy_for
from zpipe.schemas.storage import read_file, storage_errors
from zpipe.train.run_files import METRICS_NAME, TENSORBOARD, WANDB_ID_NAME, read_metrics

Log = Callable[[dict[str, Any]], None]


@contextmanager
def metric_log(
    run: Path, tensorboard: bool = False, wandb: str | None = None, *, completed_steps: int = 0
) -> Iterator[Log]:
    """Yield a function that logs one line of metrics, a dictionary with the key `step` among others.

    Args:
        run: The run folder; lines are appended to its metrics.jsonl.
        tensorboard: Also write event files into the folder `tensorboard` of the run.
        wandb: Also log to this project of Weights & Biases. The run has the name of its folder there, and is identified
            by an id that the folder keeps.
        completed_steps: The step that the run resumes from; later events of an earlier attempt are dropped.

    Raises:
        UsageError: If the package for TensorBoard or Weights & Biases is not installed.
        ZpipeError: If a line can't be written.
    """
    with ExitStack() as stack:
        sinks: list[Log] = [lambda line: _append(run / METRICS_NAME, line)]
        if tensorboard:
            sinks.append(_to_tensorboard(run, completed_steps, stack))
        if wandb is not None:
            sinks.append(_to_wandb(run, wandb, stack))

        def log(line: dict[str, Any]) -> None:
            for sink in sinks:
                sink(line)

        yield log


def trim_log(run: Path, step: int, *, epoch_ended: bool) -> None:
    """Drop the lines of metrics.jsonl that a resumed run writes again, and an incomplete last line.

    These are the lines of the steps after the checkpoint's `step`. If the checkpoint was taken before the end of its
    epoch (`epoch_ended` is False), the line of that epoch's validation, which has the same step, is dropped too.

    Raises:
        ZpipeError: If a line is broken, see `read_metrics`, or the file can't be written.
    """
    path = run / METRICS_NAME
    if path.is_file():
        kept = [
            line
            for line in read_metrics(path)
            if line["step"] < step or (line["step"] == step and ("loss" in line or epoch_ended))
        ]
        write_bytes(path, b"".join(json.dumps(line).encode() + b"\n" for line in kept))


def _append(path: Path, line: dict[str, Any]) -> None:
    # JSON has no NaN and no infinity.
    line = {name: None if isinstance(value, float) and not isfinite(value) else value for name, value in line.items()}
    try:
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(line, allow_nan=False) + "\n")
    except OSError as error:
        raise ZpipeError(
            f"{path}: could not be written ({first_line(error)}); {remedy_for(error)}, then run again to resume"
        ) from error


def _to_tensorboard(run: Path, completed_steps: int, stack: ExitStack) -> Log:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise UsageError("train.tensorboard: needs the package tensorboard; pip install tensorboard") from error
    writer = stack.enter_context(SummaryWriter(run / TENSORBOARD, purge_step=completed_steps + 1))

    def log(line: dict[str, Any]) -> None:
        for name, value in line.items():
            if name not in ("step", "steps"):
                writer.add_scalar(name, value, line["step"])

    return log


def _to_wandb(run: Path, project: str, stack: ExitStack) -> Log:
    try:
        import wandb  # type: ignore[import-not-found, unused-ignore]  # optional, not among the test dependencies
    except ImportError as error:
        raise UsageError("train.wandb: needs the package wandb; pip install wandb") from error
    session = stack.enter_context(
        wandb.init(project=project, name=run.name, dir=str(run), id=_wandb_id(run), resume="allow")
    )

    def log(line: dict[str, Any]) -> None:
        session.log(line, step=line["step"])

    return log


def _wandb_id(run: Path) -> str:
    """The id of the run, drawn once and kept in its folder, because the name of a folder is not unique in a project."""
    path = run / WANDB_ID_NAME
    if not path.exists():
        write_bytes(path, f"{secrets.token_hex(8)}\n".encode())
    try:
        found = read_file(path, 1000).decode().strip()
    except storage_errors(ValueError) as error:
        raise ZpipeError(f"{path}: can't be read ({first_line(error)}); restore or delete the file") from error
    if not re.fullmatch(r"[\w.-]{1,128}", found):
        raise ZpipeError(f"{path}: holds no id of Weights & Biases; restore or delete the file")
    return found
