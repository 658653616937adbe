"""Finished runs: their weights and the description of their model, written and read only here.

`run_files.py` lists the files of a run, `resume_state.py` has the checkpoint that an unfinished run resumes from.
timm opens a finished ViT by itself: `timm.create_model("local-dir:RUN", pretrained=True)`.
"""

from __future__ import annotations

import math
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

import safetensors.torch
import timm
import torch
from timm.models import is_model, save_for_hf
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import zpipe.train.models  # noqa: F401  (registers our models with timm)
from zpipe.schemas.atomic import commit, write_json
from zpipe.schemas.errors import UsageError, ZpipeError, first_line, remedy_for
from zpipe.schemas.model_config import CONFIG_NAME, NOT_OF_THE_MODEL, ModelConfig, read_model_config
from zpipe.schemas.shard_index import digest_file
from zpipe.schemas.weights_file import DIGEST, NO_DIGEST, check_digest, seal
from zpipe.train.models.zoomer import Zoomer
from zpipe.train.resume_state import is_finite
from zpipe.train.run_files import (
    BEST,
    BEST_NAME,
    BEST_WEIGHTS_NAME,
    CHECKPOINT_NAME,
    EPOCHS,
    RUN_NAME,
    WEIGHTS_NAME,
    ZOOMER,
    read_record,
)


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """What the images of a model must be: square, of one size, and normalised per channel."""

    image_size: int
    """Side of the images, in pixels."""
    mean: tuple[float, float, float]
    """Mean of each channel, of values in [0, 1]."""
    std: tuple[float, float, float]
    """Standard deviation of each channel."""
    crop_pct: float = 1.0
    """Side of the centre crop in evaluation, as a fraction of the shorter side of an image."""

    def normalise(self, images: torch.Tensor) -> torch.Tensor:
        """Normalise images uint8 [B, 3, S, S] to float32 [B, 3, S, S], on their device."""
        mean, std = _on_device(tuple(self.mean), tuple(self.std), images.device)
        return (images.float() / 255.0 - mean) / std


@lru_cache(maxsize=16)
def _on_device(mean: tuple[float, ...], std: tuple[float, ...], device: torch.device) -> tuple[torch.Tensor, ...]:
    """Both as [1, 3, 1, 1]. Cached, because a copy to an accelerator waits for all of its queued work."""
    with torch.inference_mode(False):  # an inference tensor in the cache could not be used in training later
        return tuple(torch.tensor(values, device=device).view(1, 3, 1, 1) for values in (mean, std))


@dataclass(frozen=True, kw_only=True)
class Run:
    """A finished run."""

    path: Path
    kind: str
    """`zoomer` or `vit`."""
    model: nn.Module
    """The model, in eval mode."""
    preprocessing: Preprocessing
    zoomer: Zoomer | None
    """The zoomer that the model was trained with, frozen, if there is one."""
    settings: dict[str, Any]
    """The settings of run.json; empty for a model that timm saved."""


def keep_epoch(run: Path, model: nn.Module, epoch: int, keep: int, score: float | None) -> None:
    """Keep the weights after an epoch.

    Args:
        run: The run folder.
        model: The model with the weights.
        epoch: Number of the epoch, from 1.
        keep: How many epochs' weights to keep; older ones are removed.
        score: Score of the validation; if it is the best so far, the weights are also kept as the best. May be None.
    """
    run = Path(run)
    folder = run / EPOCHS
    if keep:
        folder.mkdir(exist_ok=True)
        _write_weights(folder / f"{epoch:05d}.safetensors", model)
    if folder.is_dir():
        for path in sorted(folder.glob("*.safetensors"))[: -keep or None]:
            path.unlink()
    if score is None:
        return
    path = run / BEST_NAME
    if not path.is_file() or score > BEST.read(path).val_top1:
        _write_weights(run / BEST_WEIGHTS_NAME, model)
        write_json(path, BEST.header | {"epoch": epoch, "val_top1": score})


def _write_weights(path: Path, model: nn.Module) -> None:
    with commit(path) as tmp, _explained(path):
        _save_sealed(tmp, model.state_dict())


def _save_sealed(path: Path, state: Mapping[str, Tensor]) -> None:
    """Save weights with their digest, readable by whom the umask allows; the library alone makes the file private."""
    path.touch()
    mode = path.stat().st_mode
    tensors = {name: tensor.contiguous() for name, tensor in state.items()}
    safetensors.torch.save_file(tensors, path, metadata={DIGEST: NO_DIGEST})
    path.chmod(mode)
    seal(path)


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Turn an error of the library that writes weights into one line."""
    try:
        yield
    except safetensors.SafetensorError as error:
        full = "No space left" in str(error)
        remedy = "free space" if full else "remove this cause"
        raise ZpipeError(f"{path}: could not be written ({first_line(error)}); {remedy}, then run again") from error


def save_model(run: Path, model: nn.Module, preprocessing: Preprocessing, classes: Sequence[str] = ()) -> None:
    """Write a timm model's finished weights and, last, the model description, which marks the run as finished.

    Args:
        run: The run folder.
        model: The model.
        preprocessing: How its images are prepared.
        classes: Names of the classes, for a folder whose settings do not name them.

    Raises:
        ZpipeError: If they can't be written.
    """
    data = _data_config(preprocessing)

    def write(folder: Path) -> None:
        names = {"label_names": list(classes)} if classes else None
        save_for_hf(model, str(folder), model_config=names, safe_serialization=True, data_config=data)
        (folder / WEIGHTS_NAME).unlink()
        _save_sealed(folder / WEIGHTS_NAME, model.state_dict())

    _write_finished(Path(run), write)


def save_zoomer(run: Path, zoomer: Zoomer, preprocessing: Preprocessing) -> None:
    """Write a zoomer's finished weights and, last, its description, into a run folder or into `zoomer` of a ZoomViT's.

    Raises:
        ZpipeError: If they can't be written.
    """

    def write(folder: Path) -> None:
        _save_sealed(folder / WEIGHTS_NAME, zoomer.state_dict())
        data = _data_config(preprocessing)
        config = {"architecture": ZOOMER, "model_args": zoomer.model_args(), "pretrained_cfg": data}
        write_json(folder / CONFIG_NAME, config)

    Path(run).mkdir(exist_ok=True)
    _write_finished(Path(run), write)


def _data_config(preprocessing: Preprocessing) -> dict[str, Any]:
    return {
        "input_size": (3, preprocessing.image_size, preprocessing.image_size),
        "mean": preprocessing.mean,
        "std": preprocessing.std,
        "interpolation": "bicubic",
        "crop_pct": preprocessing.crop_pct,
    }


def _write_finished(run: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary folder, then move weights and description into place, the description last."""
    try:
        with _explained(run), tempfile.TemporaryDirectory(dir=run, prefix=".tmp-") as folder:
            write(Path(folder))
            for name in (WEIGHTS_NAME, CONFIG_NAME):
                with commit(run / name) as tmp:
                    os.replace(Path(folder) / name, tmp)
    except OSError as error:
        raise ZpipeError(
            f"{run}: the model could not be written ({first_line(error)}); {remedy_for(error)}, then run the same "
            "command again, which writes it"
        ) from error


def digest_zoomer(run: Path) -> str:
    """SHA-256 (hex) of the weights file of a finished zoomer, to notice another zoomer at the same path."""
    return digest_file(Path(run) / WEIGHTS_NAME)


def load_run(run: Path, weights: str = "final") -> Run:
    """Open a finished run, or a model that timm saved.

    All weights come from the file: a description that makes a model of other weights is refused, as are weights that
    are damaged, NaN or infinite.

    Args:
        run: The run folder.
        weights: "final" for those of the last step (of the moving average, if there is one); "best" for those of the
            epoch with the best validation; or the number of an epoch that `train.keep` kept, counted from 1.

    Raises:
        UsageError: If it is not a finished run, or has no such weights.
        ZpipeError: If a file is broken.
    """
    run = Path(run)
    if not os.path.lexists(run / CONFIG_NAME):
        if (run / RUN_NAME).is_file():
            raise UsageError(f"{run}: this run is not finished; run its command again to resume it")
        raise UsageError(f"{run}: not a training run (no {CONFIG_NAME}); train-zoomer, train-vit and import make them")
    config = read_model_config(run / CONFIG_NAME)
    # A folder that timm saved is a model too, but has no settings.
    settings = read_record(run)["settings"] if os.path.lexists(run / RUN_NAME) else {}
    model, preprocessing = _load_model(run, config, _weights_file(run, weights))
    zoomer = load_zoomer(run / ZOOMER)[0] if (run / ZOOMER / CONFIG_NAME).is_file() else None
    return Run(
        path=run,
        kind="zoomer" if config.architecture == ZOOMER else "vit",
        model=model.eval(),
        preprocessing=preprocessing,
        zoomer=zoomer,
        settings=settings,
    )


def _weights_file(run: Path, weights: str) -> Path:
    if weights == "final":
        return run / WEIGHTS_NAME
    if weights == "best":
        path, hint = run / BEST_WEIGHTS_NAME, "train with --val SHARDS"
    elif weights.isdecimal() and len(weights) < 10:
        path, hint = run / EPOCHS / f"{int(weights):05d}.safetensors", "train with --set train.keep=N"
    else:
        raise UsageError(f"--weights {weights}: choose final, best, or the number of an epoch that was kept")
    if not path.is_file():
        raise UsageError(f"{path}: this run has no such weights; {hint}")
    return path


def load_zoomer(run: Path) -> tuple[Zoomer, Preprocessing]:
    """Open the zoomer of a finished run, frozen, and its preprocessing.

    Raises:
        UsageError: If it is not a finished zoomer.
        ZpipeError: If a file is broken.
    """
    run = Path(run)
    if not (run / CONFIG_NAME).is_file():
        raise UsageError(f"{run}: not a finished zoomer (no {CONFIG_NAME}); zpipe train-zoomer makes one")
    config = read_model_config(run / CONFIG_NAME)
    if config.architecture != ZOOMER:
        raise UsageError(f"{run}: holds a ViT, not a zoomer; zpipe train-zoomer makes one")
    model, preprocessing = _load_model(run, config, run / WEIGHTS_NAME)
    return cast(Zoomer, model).freeze(), preprocessing


def _load_model(run: Path, config: ModelConfig, weights: Path) -> tuple[nn.Module, Preprocessing]:
    described = run / CONFIG_NAME
    preprocessing = _preprocessing(described, config)
    remedy = _remedy(run, weights)
    check_digest(weights, remedy)
    try:
        state = safetensors.torch.load_file(weights)
    except (OSError, RuntimeError, safetensors.SafetensorError) as error:
        raise ZpipeError(f"{weights}: weights can't be read ({first_line(error)}); {remedy}") from error
    model = _build(described, config, sum(tensor.numel() for tensor in state.values()))
    try:
        _fill(model, state)
    except ValueError as error:
        raise ZpipeError(f"{weights}: not the weights of {described} ({error}); {remedy}") from error
    return model, preprocessing


def _remedy(run: Path, weights: Path) -> str:
    """What to do about weights that can't be used."""
    if weights.name != WEIGHTS_NAME:
        return "restore the file, or take --weights final"
    if (run / CHECKPOINT_NAME).is_file():
        return f"restore the file, or delete {run / CONFIG_NAME} and run the training again, which writes them anew"
    return "restore the file, or train again in another folder"


def _preprocessing(path: Path, config: ModelConfig) -> Preprocessing:
    given = config.pretrained_cfg
    absent = [name for name in ("input_size", "mean", "std", "crop_pct") if getattr(given, name) is None]
    if absent or given.input_size is None or given.mean is None or given.std is None or given.crop_pct is None:
        raise ZpipeError(f"{path}: not a complete model description (no pretrained_cfg.{absent[0]}); restore the file")
    channels, height, width = given.input_size
    if channels != 3 or height != width:
        raise ZpipeError(
            f"{path}: the model is for images of {channels} x {height} x {width} (input_size); zpipe runs models of "
            "square images of 3 channels"
        )
    return Preprocessing(image_size=height, mean=given.mean, std=given.std, crop_pct=given.crop_pct)


class _Allowance(TorchDispatchMode):
    """Refuses to make tensors of more numbers than a model of the given weights needs."""

    def __init__(self, numbers: int) -> None:
        super().__init__()
        self._left = 2 * numbers + (1 << 22)  # a part for tables that are computed, and not saved

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if args and isinstance(args[0], list | tuple) and all(isinstance(side, int) for side in args[0]):
            self._left -= math.prod(args[0])
            if self._left < 0:
                raise ValueError("it is larger than the weights beside it")
        return func(*args, **(kwargs or {}))


def _build(path: Path, config: ModelConfig, numbers: int) -> nn.Module:
    """The model that a description describes, which has at most as many weights as given."""
    arguments = dict(config.model_args)
    cfg = config.pretrained_cfg
    try:
        _check_arguments(arguments)
        with _Allowance(numbers), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of models without weights, say: they don't fit the file
            if config.architecture == ZOOMER:
                return Zoomer(**arguments)
            if not is_model(config.architecture):
                raise ValueError(f"Unknown model {config.architecture!r}")
            if config.class_count is not None:
                arguments["num_classes"] = config.class_count
            overlay = {"input_size": cfg.input_size, "mean": cfg.mean, "std": cfg.std, "crop_pct": cfg.crop_pct}
            model = timm.create_model(config.architecture, pretrained_cfg_overlay=overlay, **arguments)
    except (RuntimeError, TypeError, ValueError, LookupError, AttributeError, AssertionError, ArithmeticError) as error:
        raise ZpipeError(
            f"{path}: describes no model that can be built ({first_line(error)}); restore the file"
        ) from error
    if config.num_classes not in (None, model.num_classes):
        raise ZpipeError(
            f"{path}: says {config.num_classes} classes, its model has {model.num_classes}; restore the file"
        )
    return model


def _check_arguments(value: Any) -> None:
    """Check that no argument, nor one of a backbone inside, leads to other weights.

    Raises:
        ValueError: Naming the argument.
    """
    for name, inner in value.items():
        if name in NOT_OF_THE_MODEL or (isinstance(inner, str) and ":" in inner):
            raise ValueError(f"its argument {name} leads to other weights")
        if isinstance(inner, dict):
            _check_arguments(inner)


def _fill(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copy weights into a model, all of them.

    Raises:
        ValueError: The model has others, or a weight is NaN or infinite.
    """
    own = model.state_dict()
    if odd := sorted(own.keys() ^ state.keys()):
        raise ValueError(f"{odd[0]} is in the {'description' if odd[0] in own else 'weights'} only")
    for name, tensor in state.items():
        if tensor.shape != own[name].shape:
            raise ValueError(f"{name} is {list(tensor.shape)}, the description makes it {list(own[name].shape)}")
        if not is_finite(tensor) and is_finite(own[name]):
            raise ValueError(f"{name} is NaN or infinite")
    model.load_state_dict(dict(state))
