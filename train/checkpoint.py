"""A training run on disk, written and read only here.

    RUN/run.json           the resolved settings; marks the folder as a run
    RUN/checkpoint.pt      the state to resume from: weights, optimizer, position; replaced within and after epochs
    RUN/metrics.jsonl      one line per logging interval and per validation
    RUN/model.safetensors  the finished weights
    RUN/config.json        timm's model description, written last: a run without it is not finished
    RUN/epochs/            the weights of the last epochs, as many as train.keep says
    RUN/best.safetensors   the weights of the epoch with the best validation, with best.json, if there was a validation
    RUN/wandb-id.txt       the id of the run at Weights & Biases, if it logs there
    RUN/zoomer/            the zoomer of a ZoomViT, if it has one, in the same form

timm opens a finished ViT by itself: `timm.create_model("local-dir:RUN", pretrained=True)`.
"""

from __future__ import annotations

import os
import pickle
import socket
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, cast

import safetensors.torch
import timm
import torch
from timm.models import save_for_hf
from torch import nn

import zpipe.train.models  # noqa: F401  (registers our models with timm)
from zpipe.schemas.atomic import claim_folder, commit, read_json, write_json
from zpipe.schemas.errors import UsageError, ZpipeError, first_line
from zpipe.schemas.formats import check_format, header
from zpipe.schemas.relevance_maps import RelevanceMaps
from zpipe.schemas.shard_index import digest_file
from zpipe.schemas.storage import remove
from zpipe.train.models.zoomer import Zoomer
from zpipe.train.ranks import ranks

RUN_NAME = "run.json"
CHECKPOINT_NAME = "checkpoint.pt"
METRICS_NAME = "metrics.jsonl"
WANDB_ID_NAME = "wandb-id.txt"
CONFIG_NAME = "config.json"
ZOOMER = "zoomer"  # the architecture that a zoomer's description states
WEIGHTS_NAME = "model.safetensors"
FORMAT = "zpipe-run"
VERSION = 1
CHECKPOINT_FORMAT = "zpipe-checkpoint"
CHECKPOINT_VERSION = 1
BEST_FORMAT = "zpipe-best-epoch"
BEST_VERSION = 1
# Settings that may change when a run is resumed: how the work is distributed, logged and kept, not what is computed.
# Another device computes the same up to rounding.
FREE_SETTINGS = (
    "maps_teacher",  # covered by the fingerprint of the maps
    "train.checkpoint_s",
    "train.data_workers",
    "train.device",
    "train.keep",
    "train.log_every",
    "train.tensorboard",
    "train.wandb",
)
# Settings that runs of earlier versions don't record.
RECORDED_LATER = ("maps_fingerprint", "shards_digest", "zoomer_digest", "mean", "std")
# Paths whose contents a digest identifies; they may have moved when a run is resumed.
KNOWN_BY = {"shards": "shards_digest", "zoomer": "zoomer_digest", "maps": "maps_fingerprint"}

Resume = Literal["auto", "never"]


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


def begin_run(
    run: Path, kind: str, settings: dict[str, Any], resume: Resume = "auto", *, defaults: dict[str, Any] | None = None
) -> bool:
    """Claim a folder for a run with these settings.

    From the first checkpoint on the settings must stay the same; before it, nothing is lost, and a mistake in them can
    be corrected. Shards, maps and zoomer may have moved: a path with the same contents is updated. If several processes
    train, the first one claims the folder, and the others check that they see it.

    Args:
        run: The folder.
        kind: `zoomer` or `vit`.
        settings: The settings, as JSON values.
        resume: "never" to refuse a folder that holds a run already.
        defaults: Values of the settings that a run of an earlier version may lack: it had no other values then.

    Returns:
        Whether the run is finished already.

    Raises:
        UsageError: If the folder holds something else, or a run and `resume` is "never".
        ZpipeError: Naming the first setting that differs from those of the run in the folder.
    """
    run = Path(run)
    if resume not in ("auto", "never"):
        raise UsageError(f"--resume {resume}: choose auto or never")
    finished = ranks().from_first(lambda: _claim(run, kind, settings, resume, defaults or {}))
    if not (run / RUN_NAME).is_file():
        raise ZpipeError(
            f"{run}: {socket.gethostname()} doesn't see what the first training process wrote there; give --out a "
            "folder that all machines share"
        )
    return finished


def _claim(run: Path, kind: str, settings: dict[str, Any], resume: Resume, defaults: dict[str, Any]) -> bool:
    if resume == "never" and (run / RUN_NAME).is_file():
        raise UsageError(f"{run}: holds a run already; give another --out, or --resume auto to go on with it")
    claim_folder(run, RUN_NAME, "training run")
    wanted = header(FORMAT, VERSION) | {"kind": kind, "settings": settings}
    path = run / RUN_NAME
    record = read_record(run) if path.is_file() else wanted
    if record["kind"] != kind:
        raise ZpipeError(f"{run}: holds a {record['kind']} run, this is {kind}; give another --out folder")
    if (run / CHECKPOINT_NAME).is_file() or (run / CONFIG_NAME).is_file():
        new = _dotted(settings)
        recorded = _dotted(record["settings"])
        old = {name: value for name, value in _dotted(defaults).items() if name in new} | recorded
        for name in sorted(set(old) | set(new)):
            if name in RECORDED_LATER and name not in recorded:
                continue
            digest = KNOWN_BY.get(name)
            if digest and recorded.get(digest) is not None and recorded[digest] == new.get(digest):
                continue
            if name not in FREE_SETTINGS and old.get(name) != new.get(name):
                raise ZpipeError(
                    f"{run}: was begun with {name} = {old.get(name)!r}, now it is {new.get(name)!r}; "
                    "give another --out folder, or the settings it was begun with"
                )
        moved = {name: settings[name] for name in KNOWN_BY if name in recorded and recorded[name] != settings.get(name)}
        if moved:
            write_json(path, record | {"settings": record["settings"] | moved})
    else:
        write_json(path, wanted)
    return (run / CONFIG_NAME).is_file()


def read_record(run: Path) -> dict[str, Any]:
    """Read `run.json`: kind and settings.

    Raises:
        ZpipeError: If the file is missing or broken.
    """
    path = Path(run) / RUN_NAME
    record = read_json(path, "the settings of a run")
    check_format(path, record, FORMAT, VERSION, remedy="restore the file, or give another --out folder")
    if not isinstance(record.get("settings"), dict) or not isinstance(record.get("kind"), str):
        raise ZpipeError(f"{path}: not the settings of a run; restore the file")
    return record


def _dotted(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        flat |= _dotted(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat


def save_checkpoint(run: Path, state: dict[str, Any]) -> None:
    """Replace the run's checkpoint.

    Raises:
        ZpipeError: If it can't be written; the previous checkpoint is then still there.
    """
    path = Path(run) / CHECKPOINT_NAME
    with commit(path) as tmp:
        try:
            torch.save(header(CHECKPOINT_FORMAT, CHECKPOINT_VERSION) | state, tmp)
        except RuntimeError as error:  # torch's zip writer raises it on a full disk
            raise ZpipeError(f"{path}: could not be written; free space, then run again to go on") from error


def load_checkpoint(run: Path) -> dict[str, Any] | None:
    """Load the run's checkpoint to the CPU; None if it has none.

    Raises:
        ZpipeError: If the file is not a readable checkpoint.
    """
    path = Path(run) / CHECKPOINT_NAME
    if not path.is_file():
        return None
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, OSError, EOFError, ValueError, KeyError, pickle.UnpicklingError) as error:
        raise ZpipeError(f"{path}: not a readable checkpoint ({first_line(error)}); delete it to start over") from error
    remedy = "delete it to start over"
    if not isinstance(state, dict):
        raise ZpipeError(f"{path}: not a checkpoint of a run; {remedy}")
    check_format(path, state, CHECKPOINT_FORMAT, CHECKPOINT_VERSION, remedy=remedy)
    return state


def forget_attempt(run: Path) -> None:
    """Remove the files of an earlier attempt when a run starts over, so that they aren't taken for its own."""
    for name in ("best.json", "best.safetensors", "epochs", WANDB_ID_NAME):
        remove(Path(run) / name)


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
    folder = run / "epochs"
    if keep:
        folder.mkdir(exist_ok=True)
        _write_weights(folder / f"{epoch:05d}.safetensors", model)
    if folder.is_dir():
        for path in sorted(folder.glob("*.safetensors"))[: -keep or None]:
            path.unlink()
    if score is None:
        return
    path = run / "best.json"
    if not path.is_file() or score > read_json(path, "the best epoch")["val_top1"]:
        _write_weights(run / "best.safetensors", model)
        write_json(path, header(BEST_FORMAT, BEST_VERSION) | {"epoch": epoch, "val_top1": score})


def _write_weights(path: Path, model: nn.Module) -> None:
    try:
        with commit(path) as tmp:
            safetensors.torch.save_file({name: t.contiguous() for name, t in model.state_dict().items()}, tmp)
    except (OSError, safetensors.SafetensorError) as error:
        raise ZpipeError(f"{path}: could not be written ({error}); free space, then run again") from error


def save_model(run: Path, model: nn.Module, preprocessing: Preprocessing) -> None:
    """Write a timm model's finished weights and, last, the model description, which marks the run as finished.

    Raises:
        ZpipeError: If they can't be written.
    """
    data = _data_config(preprocessing)
    _write_finished(Path(run), lambda folder: save_for_hf(model, folder, safe_serialization=True, data_config=data))


def save_zoomer(run: Path, zoomer: Zoomer, preprocessing: Preprocessing) -> None:
    """Write a zoomer's finished weights and, last, its description, into a run folder or into `zoomer` of a ZoomViT's.

    Raises:
        ZpipeError: If they can't be written.
    """

    def write(folder: str) -> None:
        safetensors.torch.save_file(zoomer.state_dict(), Path(folder) / WEIGHTS_NAME)
        data = _data_config(preprocessing)
        config = {"architecture": ZOOMER, "model_args": zoomer.model_args(), "pretrained_cfg": data}
        write_json(Path(folder) / CONFIG_NAME, config)

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


def _write_finished(run: Path, write: Callable[[str], object]) -> None:
    """Let `write` fill a temporary folder, then move weights and description into place, the description last."""
    try:
        with tempfile.TemporaryDirectory(dir=run, prefix=".tmp-") as folder:
            write(folder)
            for name in (WEIGHTS_NAME, CONFIG_NAME):
                with commit(run / name) as tmp:
                    os.replace(Path(folder) / name, tmp)
    except (OSError, safetensors.SafetensorError) as error:
        raise ZpipeError(f"{run}: the model could not be written ({error}); free space, then run again") from error


def digest_zoomer(run: Path) -> str:
    """SHA-256 (hex) of the weights file of a finished zoomer, to notice another zoomer at the same path."""
    return digest_file(Path(run) / WEIGHTS_NAME)


def load_run(run: Path, weights: str = "final") -> Run:
    """Open a finished run.

    Args:
        run: The run folder.
        weights: "final" for those of the last step (of the moving average, if there is one); "best" for those of the
            epoch with the best validation; or the number of an epoch that `train.keep` kept, counted from 1.

    Raises:
        UsageError: If it is not a finished run, or has no such weights.
        ZpipeError: If a file is broken.
    """
    run = Path(run)
    if not (run / CONFIG_NAME).is_file():
        if (run / RUN_NAME).is_file():
            raise UsageError(f"{run}: this run is not finished; run its command again to go on")
        raise UsageError(f"{run}: not a training run (no {CONFIG_NAME}); train-zoomer and train-vit make them")
    config = read_json(run / CONFIG_NAME, "a model description")
    model, preprocessing = _load_model(run, config)
    if weights != "final":
        _load_weights(model, _weights_file(run, weights))
    # A folder that timm saved is a model too, but has no settings.
    settings = read_record(run)["settings"] if (run / RUN_NAME).is_file() else {}
    zoomer = None
    if (run / "zoomer" / CONFIG_NAME).is_file():
        zoomer = load_zoomer(run / "zoomer")[0]
    kind = "zoomer" if config["architecture"] == ZOOMER else "vit"
    return Run(
        path=run,
        kind=kind,
        model=model.eval(),
        preprocessing=preprocessing,
        zoomer=zoomer,
        settings=settings,
    )


def _weights_file(run: Path, weights: str) -> Path:
    if weights == "best":
        path, hint = run / "best.safetensors", "train with --val SHARDS"
    elif weights.isdecimal():
        path, hint = run / "epochs" / f"{int(weights):05d}.safetensors", "train with --set train.keep=N"
    else:
        raise UsageError(f"--weights {weights}: choose final, best, or the number of an epoch that was kept")
    if not path.is_file():
        raise UsageError(f"{path}: this run has no such weights; {hint}")
    return path


def _load_weights(model: nn.Module, path: Path) -> None:
    try:
        model.load_state_dict(safetensors.torch.load_file(path))
    except (OSError, RuntimeError, safetensors.SafetensorError) as error:
        raise ZpipeError(f"{path}: weights can't be read ({first_line(error)}); take --weights final") from error


def load_zoomer(run: Path) -> tuple[Zoomer, Preprocessing]:
    """Open the zoomer of a finished run, frozen, and its preprocessing.

    Raises:
        UsageError: If it is not a finished zoomer.
        ZpipeError: If a file is broken.
    """
    run = Path(run)
    if not (run / CONFIG_NAME).is_file():
        raise UsageError(f"{run}: not a finished zoomer (no {CONFIG_NAME}); zpipe train-zoomer makes one")
    config = read_json(run / CONFIG_NAME, "a model description")
    model, preprocessing = _load_model(run, config)
    if config["architecture"] != ZOOMER:
        raise UsageError(f"{run}: holds a ViT, not a zoomer; zpipe train-zoomer makes one")
    return cast(Zoomer, model).freeze(), preprocessing


def _load_model(run: Path, config: dict[str, Any]) -> tuple[nn.Module, Preprocessing]:
    path = run / WEIGHTS_NAME
    try:
        data = config["pretrained_cfg"]
        preprocessing = Preprocessing(
            image_size=int(data["input_size"][1]),
            mean=tuple(data["mean"]),
            std=tuple(data["std"]),
            crop_pct=float(data["crop_pct"]),
        )
        if config["architecture"] == ZOOMER:
            model: nn.Module = Zoomer(**config["model_args"])
            model.load_state_dict(safetensors.torch.load_file(path))
        else:
            model = timm.create_model(f"local-dir:{run}", pretrained=True)
    except (KeyError, TypeError, ValueError) as error:
        raise ZpipeError(f"{run / CONFIG_NAME}: not a complete model description ({error}); train again") from error
    except (OSError, RuntimeError, safetensors.SafetensorError) as error:
        raise ZpipeError(f"{path}: weights can't be read ({first_line(error)}); train again") from error
    return model, preprocessing


def maps_record(store: RelevanceMaps | None) -> dict[str, Any]:
    """What run.json says about the maps that a run learns from: their fingerprint and the digest of their teacher."""
    if store is None:
        return {"maps_fingerprint": None, "maps_teacher": None}
    provenance = store.manifest.provenance
    return {"maps_fingerprint": provenance.fingerprint(), "maps_teacher": provenance.teacher_digest}
