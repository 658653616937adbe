"""Extraction of a whole data set: plan, run the workers, audit, write the manifest."""

from __future__ import annotations

import hashlib
import os
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import torch

from zpipe.pipeline.choose_precision import choose_precision, some_images
from zpipe.pipeline.executor import Resources, device_of_cluster, run_local, run_ray
from zpipe.pipeline.explainer import AUTO, ExplainConfig, check_method
from zpipe.pipeline.shard_reader import FRAMES, open_shards
from zpipe.pipeline.store_plan import (
    Audit,
    Plan,
    WantedStore,
    audit,
    begun_with,
    claim_store,
    clear_unfinished,
    commit_manifest,
    is_being_replaced,
    prepare,
    remove_store,
)
from zpipe.pipeline.teacher import Teacher, TeacherSpec, load_teacher
from zpipe.pipeline.worker import MAPS, ShardReport, ShardTask, WorkerSpec, frame_of
from zpipe.schemas.account import Account
from zpipe.schemas.atomic import clear_temporaries
from zpipe.schemas.choices import check_choice
from zpipe.schemas.classes import ClassNames, Matching, match_classes
from zpipe.schemas.errors import UsageError, ZpipeError
from zpipe.schemas.lease import Lease, held_lease
from zpipe.schemas.manifest import Provenance, check_compatible
from zpipe.schemas.progress import Progress, silent
from zpipe.schemas.relevance_store import BY_NAME, OK
from zpipe.schemas.storage import as_path, is_remote
from zpipe.schemas.tensor_kinds import SAVED

Executor = Literal["ray", "local"]

# A teacher whose top-1 accuracy on the labels (0 to 1) is lower was most likely trained for other classes of the same
# numbers.
MIN_PLAUSIBLE_TOP1 = 0.1


@dataclass(frozen=True, kw_only=True)
class ExtractConfig:
    """Settings of an extraction.

    Raises:
        UsageError: A value is none of its choices or out of range.
    """

    teacher: str | None = None
    """Name of the teacher, see `TeacherSpec`. None takes the one of the weights folder, else deit_base_patch16_224."""
    weights: str = "pretrained"
    """A weights file, a folder that train-vit wrote, ``pretrained``, or ``random`` (to try things out)."""
    num_classes: int | None = None
    """Number of the teacher's classes. None takes it from the weights or the architecture."""
    teacher_args: dict[str, Any] = field(default_factory=dict)
    """Further arguments of the teacher's constructor, as JSON values."""
    seed: int = 0
    """Seed of random weights."""
    mean: tuple[float, float, float] | None = None
    """Mean of the teacher's images, see `TeacherSpec`, as for the next three."""
    std: tuple[float, float, float] | None = None
    """Standard deviation of the teacher's images."""
    interpolation: str | None = None
    """How images are resized."""
    crop_pct: float | None = None
    """Fraction of the image that the frame ``center`` shows."""
    head: str | None = None
    """File of a fitted head in place of the teacher's own."""
    class_embeddings: str | None = None
    """File of embeddings of the classes in place of a head, see `TeacherSpec`."""
    resize_positions: bool = False
    """Whether position embeddings of a weights file may be resized."""
    own_head: str | None = None
    """Whose answer counts of a distilled teacher, ``class`` or ``distilled``; None takes the mean of both."""
    classes: Matching = "same"
    """How the target ``ground-truth`` finds the teacher's class for a label: ``same``, the two number the same names;
    ``by-name``, the class of the same name; ``by-index``, the number, whatever the names."""
    explain: ExplainConfig = field(default_factory=ExplainConfig)
    """Method, target class, symmetrisation and precision of the maps."""
    save: tuple[str, ...] = ()
    """What else to store in the same pass, in stores of their own inside the output folder: ``logits`` [classes],
    ``features`` [gh, gw, D]."""
    stability: bool = False
    """Measure how stable each map is, see `zpipe.pipeline.stability`, and store it in the column ``stability`` of the
    index. Takes twice the time."""
    frame: str = "full"
    """``full``: the teacher sees the whole image, so that the map can serve any crop; ``center``: its evaluation
    view."""
    executor: Executor = "ray"
    """``ray``: workers on this machine or a cluster; ``local``: this process."""
    batch_size: int = 0
    """Images per batch; 0 takes 8 on a CPU and 64 on a GPU, fewer when memory is short."""
    actors: int = 0
    """Ray workers; 0 takes as many as there are resources for."""
    threads: int = 0
    """CPU threads of each worker; 0 chooses. Equal threads give equal bytes."""
    gpus_per_actor: float = 0.0
    """GPUs of each Ray worker, a fraction where workers share one; 0 takes 1 where the device is CUDA."""
    address: str | None = None
    """Address of a Ray cluster; None takes RAY_ADDRESS, else starts Ray on this machine."""
    device: str = "auto"
    """``cpu``, ``cuda``, for the executor ``local`` also ``cuda:N``, or ``auto``: CUDA where there is any, on a Ray
    cluster where the cluster has any."""
    image_timeout_s: float | None = None
    """Seconds per image of a shard, beside ten minutes, after which a silent Ray worker counts as hung and is replaced.
    None takes 10, and once a shard is finished 20 times as long as the slowest one took, if that is less."""
    replace: bool = False
    """Remove what the store holds and start over. A replacement that was interrupted is resumed."""

    def __post_init__(self) -> None:
        check_choice("--executor", self.executor, get_args(Executor))
        check_choice("--frame", self.frame, FRAMES)
        check_choice("--classes", self.classes, get_args(Matching))
        for name in self.save:
            check_choice("--save", name, SAVED)
        if self.crop_pct is not None and self.frame != "center":
            raise UsageError(f"--crop-pct {self.crop_pct}: --frame {self.frame} shows the whole image; leave it out")
        for name in ("batch_size", "actors", "threads", "gpus_per_actor"):
            if getattr(self, name) < 0:
                raise UsageError(f"--{name.replace('_', '-')} {getattr(self, name)}: give a number >= 0")
        if self.image_timeout_s is not None and not self.image_timeout_s > 0:
            raise UsageError(f"--image-timeout {self.image_timeout_s}: give a number of seconds > 0")
        if not re.fullmatch(r"auto|cpu|cuda(:[0-9]+)?", self.device):
            raise UsageError(f"--device {self.device}: choose auto, cpu or cuda")
        if self.executor == "ray" and ":" in self.device:
            raise UsageError(
                f"--device {self.device}: Ray gives each worker GPUs of its own; give --device cuda and choose GPUs by "
                "CUDA_VISIBLE_DEVICES, or give --executor local"
            )
        self.teacher_spec()

    def teacher_spec(self) -> TeacherSpec:
        """The fields that say which teacher to load."""
        return TeacherSpec(
            name=self.teacher,
            weights=self.weights,
            num_classes=self.num_classes,
            model_args=self.teacher_args,
            seed=self.seed,
            mean=self.mean,
            std=self.std,
            interpolation=self.interpolation,
            crop_pct=self.crop_pct,
            head=self.head,
            class_embeddings=self.class_embeddings,
            resize_positions=self.resize_positions,
            own_head=self.own_head,
        )


@dataclass(frozen=True, kw_only=True)
class ExtractReport:
    """What an extraction did."""

    count: int
    """Samples in the store."""
    shards: int
    """Map shards in the store."""
    extracted: int
    """Map shards that this run made."""
    statuses: dict[str, int]
    """Samples per status."""
    provenance: Provenance
    """What the maps were made with."""
    problems: tuple[str, ...]
    """One line for each image without a usable map, with the reason where this run met it."""
    top1: float | None = None
    """Fraction of the usable, labelled images whose label is the teacher's best class; None where there are none."""
    notes: tuple[str, ...] = ()
    """What the user should know: a batch size that was lowered, labels that are not the teacher's, damaged shards."""
    left_out: str = ""
    """A line about images of tars that belong to no sample; empty if there are none."""

    @property
    def account(self) -> Account:
        """How many samples the tars hold, how many have a usable map, and why the others have none."""
        left_out = Counter({status: count for status, count in self.statuses.items() if status != OK})
        return Account(seen=self.count, taken=self.statuses.get(OK, 0), left_out=left_out)


def extract_teacher_maps(
    shards: str | Path,
    out: str | Path,
    config: ExtractConfig,
    *,
    progress: Progress = silent,
    say: Callable[[str], None] | None = None,
) -> ExtractReport:
    """Run the frozen teacher over every shard and write its relevance maps to a store.

    Shards that are finished, with the digests of their input and of the teacher, are kept. The memory of this process
    grows by about 2 KB per shard.

    Args:
        shards: Folder or fsspec URL of tar shards, one tar, or a pattern of tars in one folder.
        out: Folder or fsspec URL of the store: new, empty, or that of an extraction to resume.
        config: Settings of the extraction.
        progress: Reports finished samples.
        say: Called before the work begins with the notes that are known by then; the report has them, too.

    Raises:
        UsageError: A folder or an option makes no sense.
        ZpipeError: The classes of the shards are not the teacher's, the store was made by another teacher or from other
            shards, another run is writing to it, or shards failed. These are listed in `details`; the others are
            committed, and no manifest is written until all are.
    """
    shards, out = as_path(shards), as_path(out)
    tars, index = open_shards(shards, progress=progress)
    config = replace(config, device=_device(config))
    teacher = load_teacher(config.teacher_spec())
    check_method(teacher, config.explain.method)
    classes = ClassNames(names=index.classes, where=str(shards))
    matched = match_labels(teacher, classes, config)
    store = WantedStore(
        root=out,
        source=shards,
        tars=tars,
        provenance=_as_begun(provenance_of(teacher, config, matched.numbers, index.label_field), out, config),
        classes=tuple(teacher.classes),
        label_field=index.label_field,
        stability=config.stability,
    )
    notes = [note for note in (teacher.note, _frame_note(teacher, config), matched.note) if note]
    if config.explain.precision == AUTO:
        store, note = _with_precision(store, teacher, config, progress)
        config = replace(config, explain=replace(config.explain, precision=store.provenance.precision))
        notes.append(note)
    stores = _stores(store, teacher, config)
    for each in stores.values():
        each.check_sizes()
    saved = {name: each.provenance.fingerprint() for name, each in stores.items() if name != MAPS}
    spec = replace(_worker_spec(store, teacher, config, matched.numbers), saved=saved)
    if say is not None:
        for note in notes:
            say(note)
    del teacher  # each worker loads its own
    claim_store(out)
    with held_lease(out) as lease:
        clear_temporaries(out)
        report = _extract(stores, spec, config, lease, progress)
    top1 = None if matched.note else report.top1
    return replace(report, notes=(*notes, *report.notes), top1=top1, left_out=index.left_out)


def _frame_note(teacher: Teacher, config: ExtractConfig) -> str:
    """What the user should know if a fitted head is used on another view of the images; empty if it is not."""
    if teacher.head_frame in ("", config.frame):
        return ""
    return f"{config.head}: was fitted to --frame {teacher.head_frame}, these maps are of --frame {config.frame}"


def _stores(store: WantedStore, teacher: Teacher, config: ExtractConfig) -> dict[str, WantedStore]:
    """The stores to fill, by name; that of the maps, whose shards are committed last, is the last one."""
    shapes = {"logits": (teacher.num_classes,), "features": (*teacher.grid, teacher.model.width)}
    stores = {}
    for name in SAVED:
        if name in config.save:
            origin = replace(
                store.provenance, method=name, target="none", symmetrised=False, kind=SAVED[name], shape=shapes[name]
            )
            stores[name] = replace(store, root=store.root / name, provenance=origin, stability=None)
    return stores | {MAPS: store}


def _with_precision(
    store: WantedStore, teacher: Teacher, config: ExtractConfig, progress: Progress
) -> tuple[WantedStore, str]:
    """Give the store the precision that it was begun with, wherever it is resumed, or else the measured one.

    Returns the store, and a line that says which precision it is.
    """
    claim_store(store.root)  # before the measurement, which takes a minute
    earlier = begun_with(store.root)
    if earlier is not None:
        resumed = replace(store, provenance=replace(store.provenance, precision=earlier.precision))
        if not config.replace:
            check_compatible(earlier, resumed.provenance, store.root)
        if not config.replace or is_being_replaced(resumed):
            return resumed, f"--precision auto: {earlier.precision}, with which {store.root} was begun"
    if config.device != "cpu" and not torch.cuda.is_available():
        raise UsageError(
            "--precision auto: measures where the command runs, and this machine has no CUDA device as the cluster "
            "has; name a precision, or give --device cpu"
        )
    path, entry = store.tars[0]
    images = some_images(path, entry, frame_of(teacher, config.frame))
    chosen, note = choose_precision(teacher, config.explain, images, device=config.device, progress=progress)
    return replace(store, provenance=replace(store.provenance, precision=chosen)), note


def _extract(
    stores: Mapping[str, WantedStore], spec: WorkerSpec, config: ExtractConfig, lease: Lease, progress: Progress
) -> ExtractReport:
    store = stores[MAPS]
    if config.replace and not is_being_replaced(store):
        for name in SAVED:  # before the maps, whose mark says that all of them were removed
            remove_store(store.root / name)
    # The maps first: their record marks the folder that holds the others as ours.
    plans = {MAPS: prepare(store, replace=config.replace, progress=progress)}
    for name, each in stores.items():
        if name != MAPS:
            claim_store(each.root)
            plans[name] = prepare(each, replace=False, progress=progress)
    tasks = []
    for path, entry in store.tars:
        if lacking := tuple(name for name in stores if entry.stem not in plans[name].kept):
            absolute = str(path if is_remote(path) else path.resolve())
            tasks.append(ShardTask(path=absolute, entry=entry, stores=lacking, label_field=store.label_field))
    done = store.count - sum(task.entry.count for task in tasks)
    tally = _Tally(done, store.count, len(tasks), progress)
    _run_workers(spec, tasks, config, lease.check, tally)
    lease.check()
    for each in stores.values():
        clear_unfinished(each.root)  # of workers that died in this run
    failed = [report.error for report in tally.reports if report.error]
    if failed:
        raise ZpipeError(
            f"{store.root}: {len(failed)} of {len(store.tars)} shards failed, the others are committed; "
            "correct their causes and run again to resume",
            failed,
        )
    for name, each in stores.items():
        audited = audit(each, plans[name], progress)
        lease.check()  # the audit of a million shards takes longer than a lease
        commit_manifest(each, audited)
    return ExtractReport(
        count=audited.manifest.count,
        shards=len(audited.manifest.shards),
        extracted=len(tasks),
        statuses=audited.manifest.statuses,
        provenance=store.provenance,
        problems=_problems(audited, tally.reports),
        top1=audited.top1,
        notes=_notes(audited, list(plans.values()), tally.reports, config),
    )


class MatchedLabels(NamedTuple):
    """How the labels of shards number the classes of a teacher."""

    numbers: tuple[int, ...] | None
    """The teacher's class for each label, -1 for none; None if labels are its numbers."""
    note: str = ""
    """Why labels cannot be compared with what the teacher predicts; empty if they can."""


def match_labels(teacher: Teacher, data: ClassNames, config: ExtractConfig) -> MatchedLabels:
    """Find the teacher's class for each label.

    Args:
        teacher: The teacher.
        data: The classes that the shards name.
        config: Its `explain` says whether labels are needed, its `classes` how they are matched.

    Raises:
        ZpipeError: Maps shall explain the labels, and the classes of the shards are not the teacher's.
    """
    model = ClassNames(names=teacher.classes, where=f"teacher {teacher.weights}")
    if config.explain.needs_label:
        return MatchedLabels(match_classes(data, model, config.classes))
    if config.classes == "by-index":
        return MatchedLabels(None)
    try:
        match_classes(data, model, "same")
    except ZpipeError as error:
        reason = str(error).partition(";")[0]
        return MatchedLabels(None, f"{reason}: the maps do not need labels, and no top-1 is told")
    return MatchedLabels(None)


def provenance_of(
    teacher: Teacher,
    config: ExtractConfig,
    numbers: tuple[int, ...] | None = None,
    label_field: str | None = None,
) -> Provenance:
    """The provenance of maps that `teacher` makes under `config`.

    Args:
        teacher: The teacher.
        config: Settings of the extraction.
        numbers: Its class for each label, where labels were matched by name.
        label_field: Where the labels are, if the index of the tars says it.
    """
    target = config.explain.recorded_target
    if numbers is not None:
        # Another matching gives other maps.
        target = f"{BY_NAME} ({hashlib.sha256(str(numbers).encode()).hexdigest()[:12]})"
    if label_field is not None:
        # The tars stay the same when other labels of theirs are chosen; the store keeps both labels and maps.
        target = f"{target}, labels of {label_field}"
    return Provenance(
        teacher=teacher.name,
        teacher_args=teacher.model_args,
        weights=teacher.weights,
        seed=config.seed if teacher.weights == "random" else None,
        head=config.head or "",
        class_embeddings=config.class_embeddings or "",
        positions_resized=config.resize_positions,
        teacher_digest=teacher.digest,
        num_classes=teacher.num_classes,
        method=config.explain.method,
        start_layer=0,
        target=target,
        frame=config.frame,
        grid=teacher.grid,
        kind="map" if config.explain.top_classes is None else "class-maps",
        shape=() if config.explain.top_classes is None else config.explain.shape(teacher.grid),
        image_size=teacher.image_size,
        mean=teacher.mean,
        std=teacher.std,
        interpolation=teacher.interpolation,
        crop_pct=frame_of(teacher, config.frame).crop_pct,
        symmetrised=config.explain.symmetrise,
        precision=config.explain.precision,
        device=config.device.partition(":")[0],
    )


def _as_begun(provenance: Provenance, out: Path, config: ExtractConfig) -> Provenance:
    """The provenance, without its device where the store was begun by an earlier version, which did not record it."""
    earlier = None if config.replace else begun_with(out)
    return provenance if earlier is None or earlier.device else replace(provenance, device="")


def _worker_spec(
    store: WantedStore, teacher: Teacher, config: ExtractConfig, numbers: tuple[int, ...] | None
) -> WorkerSpec:
    # Prepared alike on every machine, whatever the description beside its copy of the weights says.
    alike = {name: getattr(teacher, name) for name in ("mean", "std", "interpolation", "crop_pct")}
    return WorkerSpec(
        teacher=replace(config.teacher_spec().resolved(), **alike),
        classes=numbers,
        teacher_digest=teacher.digest,
        fingerprint=store.provenance.fingerprint(),
        stability=config.stability,
        out=str(store.root if is_remote(store.root) else store.root.resolve()),
        explain=config.explain,
        frame=config.frame,
        batch_size=config.batch_size,
        threads=_threads(config, len(store.tars)),
        sharing=len(store.tars),
        device=config.device,
    )


def _device(config: ExtractConfig) -> str:
    """The device of the workers."""
    if _is_elsewhere(config):
        return device_of_cluster(config.address) if config.device == "auto" else config.device
    if config.device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if config.device == "cpu":
        return "cpu"
    if not torch.cuda.is_available():
        raise UsageError(f"--device {config.device}: torch sees no CUDA device here; use --device cpu")
    if int(config.device.partition(":")[2] or 0) >= torch.cuda.device_count():
        raise UsageError(
            f"--device {config.device}: torch sees {torch.cuda.device_count()} CUDA devices; give a lower number"
        )
    return config.device


def _is_elsewhere(config: ExtractConfig) -> bool:
    """Whether the workers run on a Ray cluster whose machines may be others than this one."""
    return config.executor == "ray" and bool(config.address or os.environ.get("RAY_ADDRESS"))


def _threads(config: ExtractConfig, shards: int) -> int:
    """CPU threads of each worker.

    More processes with fewer threads are faster, fewer processes take less memory: up to 4 threads each. The number
    must not depend on how much is left to do, or a resumed run would sum in another order than an undisturbed one.
    GPU workers on Ray take theirs from the machines that they run on (0).
    """
    cpus = os.cpu_count() or 1
    if config.threads:
        return config.threads
    if config.executor == "local":
        return cpus
    if config.device == "cuda":
        return 0
    few = min(4, max(1, cpus // 2))
    if _is_elsewhere(config):
        return few  # how many CPUs the machines of a cluster have isn't known here
    # One worker takes a whole shard, so with fewer shards than workers the rest of the machine would be idle.
    return max(few, min(16, cpus // max(1, shards)))


class _Tally:
    """Counts shards as they are reported, and keeps the reports that say more than a count."""

    def __init__(self, done: int, samples: int, shards_left: int, progress: Progress) -> None:
        self.reports: list[ShardReport] = []
        self._done, self._samples, self._shards_left = done, samples, shards_left
        self._failed = 0  # counted as they come: over all reports each time would be quadratic in the shards
        self._statuses: Counter[str] = Counter()
        self._progress = progress

    def begin(self) -> None:
        """Report the progress before the first shard."""
        self._progress("extract-teacher-maps", self._done, self._samples, shards_left=self._shards_left)

    def add(self, report: ShardReport) -> None:
        """Count one shard that succeeded or failed."""
        self._shards_left -= 1
        self._done += report.count
        self._failed += bool(report.error)
        self._statuses.update(report.statuses)
        # The others have been counted: a million of them would stay in memory.
        if report.error or report.notes or report.problems:
            self.reports.append(report)
        self._progress(
            "extract-teacher-maps",
            self._done,
            self._samples,
            shards_left=self._shards_left,
            failed=self._failed,
            bad_images=sum(count for status, count in self._statuses.items() if status != OK),
        )


def _run_workers(
    spec: WorkerSpec, tasks: Sequence[ShardTask], config: ExtractConfig, check: Callable[[], None], tally: _Tally
) -> None:
    tally.begin()
    if not tasks:
        return
    run = run_ray if config.executor == "ray" else run_local
    resources = Resources(
        actors=config.actors,
        gpus_per_actor=config.gpus_per_actor,
        address=config.address,
        image_timeout_s=config.image_timeout_s,
    )
    run(spec, tasks, resources, tally.add, check)


def _problems(audited: Audit, reports: list[ShardReport]) -> tuple[str, ...]:
    """`shard.tar: key K: status` for every sample without a usable map, and the reason where this run met it."""
    reasons = {report.stem: report.problems for report in reports}
    lines = []
    for stem, key, status in audited.unusable:
        reason = reasons.get(stem, {}).get(key)
        lines.append(f"{stem}.tar: key {key}: {status}{f' ({reason})' if reason else ''}")
    return tuple(lines)


def _notes(audited: Audit, plans: Sequence[Plan], reports: list[ShardReport], config: ExtractConfig) -> tuple[str, ...]:
    notes = [*(note for plan in plans for note in plan.notes), *(note for report in reports for note in report.notes)]
    top1 = audited.top1
    if top1 is not None and top1 < MIN_PLAUSIBLE_TOP1 and config.explain.needs_label and config.weights != "random":
        notes.append(
            f"the teacher names only {100 * top1:.1f} % of these labels: are they its classes? A teacher for yours: "
            "zpipe train-vit ... --recipe finetune, then --weights RUN"
        )
    return tuple(dict.fromkeys(notes))
