"""The folder of a training run: the files in it, its settings, its log, and who may write to it.

RUN/run.json           the resolved settings; marks the folder as a run
RUN/lease.json         the process that trains, while it does
RUN/checkpoint.pt      the state to resume from: weights, optimizer, position; replaced within and after epochs
RUN/metrics.jsonl      one line per logging interval and per validation
RUN/model.safetensors  the finished weights
RUN/config.json        timm's model description, written last: a run without it is not finished
RUN/epochs/            the weights of the last epochs, as many as train.keep says
RUN/best.safetensors   the weights of the epoch with the best validation, with best.json, if there was a validation
RUN/wandb-id.txt       the id of the run at Weights & Biases, if it logs there
RUN/tensorboard/       event files, if the run logs them
RUN/zoomer/            the zoomer of a ZoomViT, if it has one, in the same form
RUN/results/           the results of its studies
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

from zpipe.schemas.atomic import claim_folder, clear_temporaries, refuse_links, write_json
from zpipe.schemas.errors import UsageError, ZpipeError, first_line
from zpipe.schemas.formats import Count, Format, Text
from zpipe.schemas.lease import LEASE_NAME, held_lease
from zpipe.schemas.model_config import CONFIG_NAME
from zpipe.schemas.relevance_maps import RelevanceMaps
from zpipe.schemas.storage import read_file, remove, storage_errors
from zpipe.train.ranks import ranks

RUN_NAME = "run.json"
CHECKPOINT_NAME = "checkpoint.pt"
METRICS_NAME = "metrics.jsonl"
WANDB_ID_NAME = "wandb-id.txt"
WEIGHTS_NAME = "model.safetensors"
BEST_NAME, BEST_WEIGHTS_NAME = "best.json", "best.safetensors"
EPOCHS, ZOOMER, TENSORBOARD, RESULTS = "epochs", "zoomer", "tensorboard", "results"  # folders
OWN_NAMES = (
    *(RUN_NAME, LEASE_NAME, CHECKPOINT_NAME, METRICS_NAME, WANDB_ID_NAME, WEIGHTS_NAME, CONFIG_NAME),
    *(BEST_NAME, BEST_WEIGHTS_NAME, EPOCHS, ZOOMER, TENSORBOARD, RESULTS, "studies", "wandb"),
)
MAX_LOG_BYTES = 1 << 30  # of metrics.jsonl: three million lines

# Settings that may change when a run is resumed: how the work is distributed, logged and kept, not what is computed.
# Another device, or compiled code, computes the same up to rounding.
FREE_SETTINGS = (
    "maps_teacher",  # covered by the fingerprint of the maps
    "train.checkpoint_s",
    "train.compile",
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
Finite = Annotated[float, msgspec.Meta(ge=-1e100, le=1e100)]  # JSON has neither NaN nor infinity; plots scale it
Whole = Annotated[int, msgspec.Meta(ge=-(2**53), le=2**53)]
Channels = tuple[Finite, Finite, Finite]


@dataclass(frozen=True, kw_only=True)
class _Train:
    """What is read of the settings of the loop, besides by `settings.rebuild`, which checks types itself."""

    epochs: Finite | None = None
    opt: Text | None = None
    lr: Finite | None = None
    seed: Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)] | None = None


@dataclass(frozen=True, kw_only=True)
class _Settings:
    """What is read of the settings of a run, besides by `settings.rebuild`."""

    model: Text | None = None
    scores: Text | None = None
    shards: Text | None = None
    maps: Text | None = None
    zoomer: Text | None = None
    classes: list[Text] | None = None
    mean: Channels | None = None
    std: Channels | None = None
    train: _Train = field(default_factory=_Train)


@dataclass(frozen=True, kw_only=True)
class RunContent:
    """The content of `run.json`."""

    kind: Literal["zoomer", "vit"]
    """What is trained."""
    settings: dict[str, Any]
    """The resolved settings, as JSON values."""
    has_checkpoint: bool = False
    """Whether the run has ever written a checkpoint; one that is gone must not go unnoticed."""

    def __post_init__(self) -> None:
        try:
            msgspec.convert(self.settings, _Settings)
        except msgspec.ValidationError as error:
            raise ValueError(str(error).replace("`$.", "`$.settings.")) from error


@dataclass(frozen=True, kw_only=True)
class BestEpoch:
    """The content of `best.json`."""

    epoch: Count
    """Number of the epoch, from 1."""
    val_top1: Annotated[float, msgspec.Meta(ge=0, le=1)]
    """Its top-1 accuracy."""


RUN = Format(
    name="zpipe-run",
    version=1,
    content=RunContent,
    what="the settings of a run",
    remedy="restore the file, or give another --out folder",
)
BEST = Format(
    name="zpipe-best-epoch",
    version=1,
    content=BestEpoch,
    what="the best epoch",
    remedy="delete it with best.safetensors; the next validation writes both",
)


def read_record(run: Path) -> dict[str, Any]:
    """Read `run.json`.

    Returns:
        {format, version, kind, settings, has_checkpoint}.

    Raises:
        ZpipeError: The file is missing, broken, or a value that is read has another type.
    """
    content = RUN.read(Path(run) / RUN_NAME)
    return RUN.header | {name: getattr(content, name) for name in ("kind", "settings", "has_checkpoint")}


# -- claiming a folder -------------------------------------------------------------------------------------------------


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
        UsageError: The folder holds something else, or a run and `resume` is "never".
        ZpipeError: Naming the first setting that differs from those of the run in the folder; or a checkpoint is gone,
            or a file of the run is a link.
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


@contextmanager
def run_lease(run: Path) -> Iterator[Callable[[], None]]:
    """Hold the lease of a run that is not finished, so that no other process trains into its folder.

    If several processes train, the first one holds it for all of them.

    Args:
        run: The folder; it is created where it is absent, and refused where it holds something else.

    Yields:
        A function that raises :class:`ZpipeError` if the lease was lost.

    Raises:
        UsageError: The folder holds something else, or a file of the run is a link.
        ZpipeError: Another process has the lease.
    """
    with ExitStack() as stack:
        checks: list[Callable[[], None]] = []

        def take() -> None:
            refuse_links(run, OWN_NAMES, "training run")
            if (run / CONFIG_NAME).is_file():
                return  # a finished run is only read
            claim_folder(run, RUN_NAME, "training run", lease=LEASE_NAME)
            checks.append(stack.enter_context(held_lease(run, "run")).check)
            clear_temporaries(run)

        ranks().from_first(take)
        yield checks[0] if checks else lambda: None


def _claim(run: Path, kind: str, settings: dict[str, Any], resume: Resume, defaults: dict[str, Any]) -> bool:
    refuse_links(run, OWN_NAMES, "training run")
    if resume == "never" and (run / RUN_NAME).is_file():
        raise UsageError(f"{run}: holds a run already; give another --out, or --resume auto to resume it")
    claim_folder(run, RUN_NAME, "training run", lease=LEASE_NAME)
    wanted = RUN.header | {"kind": kind, "settings": settings}
    path = run / RUN_NAME
    record = read_record(run) if path.is_file() else wanted
    if record["kind"] != kind:
        raise ZpipeError(f"{run}: holds a {record['kind']} run, this is {kind}; give another --out folder")
    if not (run / CHECKPOINT_NAME).is_file() and not (run / CONFIG_NAME).is_file():
        _check_nothing_is_lost(run, record.get("has_checkpoint", False))
        write_json(path, wanted)
        return False
    recorded = record["settings"]
    _check_same_settings(run, settings, recorded, defaults)
    moved = {name: settings[name] for name in KNOWN_BY if name in recorded and recorded[name] != settings.get(name)}
    if moved:
        write_json(path, record | {"settings": recorded | moved})
    return (run / CONFIG_NAME).is_file()


def _check_nothing_is_lost(run: Path, has_checkpoint: bool) -> None:
    """Refuse to start a run over whose checkpoint is gone."""
    # Runs of earlier versions don't record that they had one. It is written before the first step of a second epoch.
    if has_checkpoint or any(line.get("epoch", 0) and "loss" in line for line in read_metrics(run / METRICS_NAME)):
        raise ZpipeError(
            f"{run / CHECKPOINT_NAME}: is gone, though this run has trained past its first checkpoint; restore the "
            f"file{_kept(run)}, or delete the folder to start over"
        )


def damaged_remedy(run: Path) -> str:
    """What to do about a checkpoint that can't be used."""
    return f"restore the file{_kept(run)}, or delete {run} to start over"


def _kept(run: Path) -> str:
    """The remedy that the weights of kept epochs offer, if there are any."""
    kept = sorted(path for path in (run / EPOCHS).glob("*.safetensors") if not path.name.startswith("."))
    return f", start another run from the last weights that are kept (--init-from {kept[-1]})" if kept else ""


def _check_same_settings(
    run: Path, settings: dict[str, Any], recorded: dict[str, Any], defaults: dict[str, Any]
) -> None:
    new, was = _dotted(settings), _dotted(recorded)
    old = {name: value for name, value in _dotted(defaults).items() if name in new} | was
    for name in sorted(set(old) | set(new)):
        if name in RECORDED_LATER and name not in was:
            continue
        digest = KNOWN_BY.get(name)
        if digest and was.get(digest) is not None and was[digest] == new.get(digest):
            continue
        if name not in FREE_SETTINGS and old.get(name) != new.get(name):
            place, before, now = _first_difference(name, old.get(name), new.get(name))
            raise ZpipeError(
                f"{run}: was begun with {place} = {before!r}, now it is {now!r}; give another --out folder, or the "
                "settings it was begun with"
            )


def _first_difference(name: str, old: Any, new: Any) -> tuple[str, Any, Any]:
    """The name and the values; of two long lists, such as class names, the first item that differs, None for none."""
    if not (isinstance(old, list) and isinstance(new, list)) or max(len(old), len(new)) <= 3:
        return name, old, new
    place = next((at for at, (a, b) in enumerate(zip(old, new, strict=False)) if a != b), min(len(old), len(new)))
    before, now = (values[place] if place < len(values) else None for values in (old, new))
    return f"{name}[{place}]", before, now


def _dotted(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        flat |= _dotted(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat


def note_checkpoint(run: Path) -> None:
    """Record in `run.json` that the run has a checkpoint from now on, if it has a `run.json`."""
    path = run / RUN_NAME
    if path.is_file():
        record = read_record(run)
        if not record["has_checkpoint"]:
            write_json(path, record | {"has_checkpoint": True})


def forget_attempt(run: Path) -> None:
    """Remove the files of an earlier attempt when a run starts over, so that they aren't taken for its own."""
    for name in (BEST_NAME, BEST_WEIGHTS_NAME, EPOCHS, WANDB_ID_NAME):
        remove(Path(run) / name)


def maps_record(store: RelevanceMaps | None) -> dict[str, Any]:
    """What run.json says about the maps that a run learns from: their fingerprint and the digest of their teacher."""
    if store is None:
        return {"maps_fingerprint": None, "maps_teacher": None}
    provenance = store.manifest.provenance
    return {"maps_fingerprint": provenance.fingerprint(), "maps_teacher": provenance.teacher_digest}


# -- metrics.jsonl -----------------------------------------------------------------------------------------------------

MetricLine = dict[str, Whole | Finite | bool | Annotated[str, msgspec.Meta(max_length=1000)] | None]


@dataclass(frozen=True, kw_only=True)
class _Place:
    step: Count
    epoch: Count = 0


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Read the lines of a metrics.jsonl; none if the file is absent.

    A last line that is incomplete is left out: it is being written, or the run was killed while it wrote it.

    Raises:
        ZpipeError: The file can't be read; or naming the first line that is no line of metrics.
    """
    try:
        data = read_file(path, MAX_LOG_BYTES)
    except FileNotFoundError:
        return []
    except storage_errors() as error:
        raise ZpipeError(f"{path}: can't be read ({first_line(error)}); restore the file, or move it away") from error
    *whole, end = data.split(b"\n")
    lines = []
    for number, text in enumerate(whole, start=1):
        try:
            lines.append(_metric_line(text))
        except (msgspec.MsgspecError, ValueError, RecursionError) as error:
            reason = (str(error).splitlines() or ["nested too deeply"])[0][:200]
            raise ZpipeError(f"{path}: line {number} is not a line of metrics ({reason}); remove the line") from error
    with suppress(msgspec.MsgspecError, ValueError, RecursionError):
        lines.append(_metric_line(end))
    return lines


def _metric_line(text: bytes) -> dict[str, Any]:
    line = msgspec.json.decode(text, type=MetricLine)
    msgspec.convert(line, _Place)
    return line
