"""Parts of an examination in processes of their own, each with a time limit: a fault ends one part, not the others.

A child is `python -m zpipe.gpu_children PART DEVICE SETTINGS`; the last line of its output is its answer, in JSON.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import msgspec

LATE = "no answer within"

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Part(Generic[T]):
    """A part of the examination."""

    name: str
    """Its name, see `compute`."""
    device: str
    """Device that it examines."""
    answer: type[T]
    """Type of its result, as for `msgspec`."""
    settings: Any = field(default_factory=dict)
    """Its settings, a dataclass."""


@dataclass(frozen=True, kw_only=True)
class Answer(Generic[T]):
    """The result of a part."""

    value: T | None
    """The result; None if there is none."""
    problem: str = ""
    """Why there is none, one line."""


def ask(part: Part[T], limit_s: float) -> Answer[T]:
    """Run a part in a process of its own."""
    return ask_together([part], limit_s)[0]


def ask_together(parts: Sequence[Part[T]], limit_s: float) -> list[Answer[T]]:
    """Run parts at the same time; after `limit_s` seconds those that have not answered are killed."""
    deadline = time.monotonic() + limit_s
    running = [_start(part) for part in parts]
    try:
        return [_answer_of(part, each, deadline, limit_s) for part, each in zip(parts, running, strict=True)]
    finally:
        for each in running:
            each.kill()  # does nothing to one that has ended
            each.communicate()


def _start(part: Part[Any]) -> subprocess.Popen[bytes]:
    settings = msgspec.json.encode(part.settings).decode()
    # -P: files of the working folder are not imported.
    line = [sys.executable, "-P", "-m", "zpipe.gpu_children", part.name, part.device, settings]
    return subprocess.Popen(line, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def _answer_of(part: Part[T], running: subprocess.Popen[bytes], deadline: float, limit_s: float) -> Answer[T]:
    try:
        output, errors = running.communicate(timeout=max(0.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        return Answer(value=None, problem=f"{LATE} {limit_s:g} s")
    if running.returncode < 0:
        return Answer(value=None, problem=f"its process was ended by {signal.Signals(-running.returncode).name}")
    if running.returncode:
        lines = [line.strip() for line in errors.decode(errors="replace").splitlines() if line.strip()]
        # A traceback ends with the error, whose text may go on for some lines.
        named = [line for line in lines if re.match(r"[\w.]+(Error|Exception)\b", line)] or lines
        return Answer(value=None, problem=named[-1][:200] if named else f"exit code {running.returncode}")
    try:
        return Answer(value=msgspec.json.decode(output.strip().rpartition(b"\n")[2], type=part.answer))
    except msgspec.MsgspecError as error:
        return Answer(value=None, problem=f"its answer can't be read ({error})")


def compute(name: str, device: Any, settings: str) -> object:
    """Run a part here. It imports what the part needs, and no more: importing all of it takes seconds.

    Args:
        name: Name of the part.
        device: A torch.device.
        settings: Its settings in JSON.

    Returns:
        Its result, as `msgspec` encodes it.
    """
    if name == "numbers":
        from zpipe.gpu_numbers import NumbersConfig, numbers

        return numbers(device, msgspec.json.decode(settings, type=NumbersConfig))
    if name == "rates":
        from zpipe.gpu_rates import RatesConfig, rates

        return rates(device, msgspec.json.decode(settings, type=RatesConfig))
    if name == "shortage":
        from zpipe.gpu_numbers import NumbersConfig
        from zpipe.gpu_shortage import provoke_shortage

        return provoke_shortage(device, msgspec.json.decode(settings, type=NumbersConfig))
    from zpipe import gpu_faults

    if name == "sum":
        return gpu_faults.sum_over_devices(device, msgspec.json.decode(settings, type=gpu_faults.SumConfig))
    return {"poison": gpu_faults.poison, "alive": gpu_faults.is_alive}[name](device)


def main(name: str, device: str, settings: str) -> None:
    """Run a part and print its answer."""
    import torch

    answer = compute(name, torch.device(device), settings)
    sys.stdout.write("\n" + msgspec.json.encode(answer).decode() + "\n")
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # a context that a failed assertion has broken may abort the process at its end


if __name__ == "__main__":
    main(*sys.argv[1:])
