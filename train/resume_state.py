"""The checkpoint that a run resumes from, `checkpoint.pt`, written and read only here.

It is a zip file of `torch.save`, whose records have checksums; PyTorch writes them and doesn't read them, so they are
compared here. What was read is checked before anything is resumed from it.
"""

from __future__ import annotations

import pickle
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import msgspec
import torch
from torch import Tensor

from zpipe.schemas.atomic import commit
from zpipe.schemas.errors import ZpipeError, first_line
from zpipe.schemas.formats import Count, check_format, header
from zpipe.schemas.storage import open_file
from zpipe.train.run_files import CHECKPOINT_NAME, damaged_remedy, note_checkpoint

CHECKPOINT_FORMAT = "zpipe-checkpoint"
CHECKPOINT_VERSION = 1
CUDA_STATE_BYTES = 16  # of the random number generator of a CUDA device

Positive = Annotated[int, msgspec.Meta(ge=1, le=2**53)]
Lanes = Annotated[int, msgspec.Meta(ge=1, le=2**20)]
Weights = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class _Optimizer:
    state: dict[int, dict[str, Any]]
    param_groups: list[dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class _LoaderState:
    epoch: Count
    batch: Count
    lanes: Lanes
    seed: Annotated[int, msgspec.Meta(ge=0)]
    batch_size: Positive
    world_size: Positive
    repeats: Positive
    digest: str | None = None
    samples: Count | None = None


@dataclass(frozen=True, kw_only=True)
class _Generators:
    cpu: Tensor
    cuda: Tensor | None


@dataclass(frozen=True, kw_only=True)
class _Position:
    loader: _LoaderState
    draws: Tensor
    ranks: Annotated[list[_Generators], msgspec.Meta(min_length=1)]


@dataclass(frozen=True, kw_only=True)
class _State:
    """What `Trainer.state_dict` returns."""

    model: Weights
    optimizer: _Optimizer
    step: Count
    epoch: Count
    position: _Position | None
    average: Weights | None = None
    scaler: dict[str, Annotated[float, msgspec.Meta(ge=0, le=1e38)]] | None = None


def save_checkpoint(run: Path, state: dict[str, Any]) -> None:
    """Replace the run's checkpoint.

    Raises:
        ZpipeError: If it can't be written; the previous checkpoint is then still there.
    """
    path = Path(run) / CHECKPOINT_NAME
    with commit(path) as tmp:
        try:
            torch.save(header(CHECKPOINT_FORMAT, CHECKPOINT_VERSION) | state, tmp)
        except RuntimeError as error:  # torch's zip writer raises it on a full disk, without a reason
            raise ZpipeError(f"{path}: could not be written; free space, then run again to resume") from error
    note_checkpoint(run)


def load_checkpoint(run: Path) -> dict[str, Any] | None:
    """Load the run's checkpoint to the CPU, and check it; None if the run has none.

    Raises:
        ZpipeError: If the file is not a readable checkpoint, is damaged, or holds what no training leaves: another
            structure, negative steps, weights that are NaN or infinite.
    """
    path = Path(run) / CHECKPOINT_NAME
    if not path.is_file():
        return None
    remedy = damaged_remedy(Path(run))
    try:
        _check_records(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (
        RuntimeError,
        OSError,
        EOFError,
        ValueError,
        LookupError,
        AttributeError,
        TypeError,
        pickle.UnpicklingError,
        zipfile.BadZipFile,
        zlib.error,
    ) as error:
        raise ZpipeError(f"{path}: not a readable checkpoint ({first_line(error)}); {remedy}") from error
    if not isinstance(state, dict):
        raise ZpipeError(f"{path}: not a checkpoint of a run; {remedy}")
    check_format(path, state, CHECKPOINT_FORMAT, CHECKPOINT_VERSION, remedy=remedy)
    try:
        _check_state(state)
    except (ValueError, LookupError, TypeError, RuntimeError, msgspec.ValidationError) as error:
        reason = first_line(error)
        raise ZpipeError(f"{path}: not a checkpoint that a run can resume from ({reason}); {remedy}") from error
    return state


def _check_records(path: Path) -> None:
    """Compare the checksums of all records: a file whose blocks were lost still opens.

    Raises:
        ValueError, zipfile.BadZipFile, OSError: A record is damaged, or the file is none of torch.save's.
    """
    with open_file(path) as file, zipfile.ZipFile(file) as archive:
        if any(record.compress_type != zipfile.ZIP_STORED for record in archive.infolist()):
            raise ValueError("it is compressed, which torch.save doesn't do")
        damaged = archive.testzip()
        if damaged is not None:
            raise ValueError(f"its record {damaged.partition('/')[2] or damaged} is damaged")


def _check_state(state: dict[str, Any]) -> None:
    """Check a checkpoint's content.

    Raises:
        ValueError, msgspec.ValidationError: Saying what is wrong.
    """
    typed = msgspec.convert(state, _State, dec_hook=_tensor)
    for place, tensor in _tensors({name: state.get(name) for name in ("model", "average", "optimizer")}):
        if not is_finite(tensor):
            raise ValueError(f"{place} is NaN or infinite")
        if tensor.is_complex() and place.startswith("optimizer."):  # PyTorch would drop its imaginary part
            raise ValueError(f"{place} is complex")
    if typed.position is None:
        return
    generators = {"position.draws": typed.position.draws}
    generators |= {f"position.ranks.{rank}.cpu": own.cpu for rank, own in enumerate(typed.position.ranks)}
    for place, value in generators.items():
        try:
            torch.Generator().set_state(value)
        except (RuntimeError, TypeError) as error:
            raise ValueError(f"{place} is no state of a random number generator") from error
    for rank, own in enumerate(typed.position.ranks):
        if own.cuda is not None and (own.cuda.dtype, own.cuda.numel()) != (torch.uint8, CUDA_STATE_BYTES):
            raise ValueError(f"position.ranks.{rank}.cuda is no state of a random number generator")


def check_weights(state: Mapping[str, Tensor], model: torch.nn.Module) -> None:
    """Check that the weights of a checkpoint have the types of a model's; PyTorch would convert them, complex ones too.

    Raises:
        ValueError: Naming the first one of another type.
    """
    for name, own in model.state_dict().items():
        if name in state and state[name].dtype != own.dtype:
            raise ValueError(f"{name} is {state[name].dtype}, the model has {own.dtype}")


def _tensor(wanted: type, value: Any) -> Any:
    if isinstance(value, wanted):
        return value
    raise ValueError(f"Expected a tensor, got {type(value).__name__}")


def _tensors(value: Any, place: str = "") -> Iterator[tuple[str, Tensor]]:
    """The tensors and numbers with a fraction in a nested value, with their places."""
    if isinstance(value, Tensor):
        yield place, value
    elif isinstance(value, float):
        yield place, torch.tensor(value, dtype=torch.float64)
    elif isinstance(value, Mapping | list | tuple):
        items = value.items() if isinstance(value, Mapping) else enumerate(value)
        for name, inner in items:
            yield from _tensors(inner, f"{place}.{name}" if place else str(name))


def is_finite(tensor: Tensor) -> bool:
    """Whether a tensor has neither NaN nor infinity."""
    if not tensor.is_floating_point() and not tensor.is_complex():
        return True
    # A sum is several times as fast, and finite unless a value isn't, or finite values add up beyond the largest.
    return bool(tensor.sum().isfinite()) or bool(tensor.isfinite().all())
