"""Extraction of a whole data set: plan, execute, audit, manifest."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import torch

from zpipe.pipeline.executor import Resources, run_local, run_ray
from zpipe.pipeline.explainer import ExplainConfig
from zpipe.pipeline.lease import LEASE_NAME, Lease, held_lease
from zpipe.pipeline.shard_reader import FRAMES, open_shards
from zpipe.pipeline.teacher import Teacher, load_teacher
from zpipe.pipeline.worker import ShardReport, ShardTask, WorkerSpec, frame_of
from zpipe.schemas.atomic import claim_folder, clear_temporaries, read_json, write_json
from zpipe.schemas.errors import UsageError, ZpipeError
from zpipe.schemas.formats import check_format, header
from zpipe.schemas.manifest import (
    EXTRACTION_NAME,
    FORMAT,
    MANIFEST_NAME,
    STORE_VERSION,
    MapShard,
    Provenance,
    StoreManifest,
    check_compatible,
    read_extraction,
    read_manifest,
    write_extraction,
    write_manifest,
)
from zpipe.schemas.progress import Progress, silent
from zpipe.schemas.relevance_store import OK, IndexFile, index_path, labels_named, maps_path, max_rows
from zpipe.schemas.shard_index import ShardEntry
from zpipe.schemas.storage import as_path, is_remote, map_files, names_in, remove

T = TypeVar("T")

REPLACING_NAME = "replacing.json"  # there while a replacement is at work

# Looking through a store is told of every so many shards: seconds of a local one, a minute of a remote one.
TOLD_EVERY = 1000

# A teacher that names fewer of the labels than this (0 to 1) was most likely trained for other classes of the same numbers.
FOREIGN_LABELS = 0.1


@dataclass(frozen=True, kw_only=True)
class ExtractConfig:
    """Settings of an extraction.

    teacher: timm model name; None takes what the weights folder says, else deit_base_patch16_224.
    weights: a file, a folder that train-vit wrote, `pretrained`, or `random` (for trying things out).
    explain: method, target, symmetrisation, precision. frame: `full` (the whole image, which can serve any crop) or
    `center` (the teacher's own evaluation view).
    batch_size, actors, threads: 0 chooses. threads are those of each worker; equal threads give equal bytes.
    device: `auto` takes CUDA devices when there are any, on a Ray cluster when the cluster has any.
    image_timeout_s: on Ray, a worker that takes longer than this for each image of its shard (and ten minutes) is taken for hung
    and replaced. An image takes about a second on a slow CPU; the largest teachers in float64 can want more than the default.
    replace: remove what the store holds and start over; a replacement that was interrupted goes on where it was.
    """

    teacher: str | None = None
    weights: str = "pretrained"
    num_classes: int | None = None
    teacher_args: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    explain: ExplainConfig = field(default_factory=ExplainConfig)
    frame: str = "full"
    executor: Literal["ray", "local"] = "ray"
    batch_size: int = 0
    actors: int = 0
    threads: int = 0
    gpus_per_actor: float = 0.0
    address: str | None = None
    device: str = "auto"
    image_timeout_s: float = 10.0
    replace: bool = False


@dataclass(frozen=True, kw_only=True)
class ExtractReport:
    """What an extraction did: samples in the store, shards in it, shards made by this run, samples per status,
    images without a usable map (and why, of this run's), how often the teacher's best class is an image's label (0 to 1, of the usable images that have a
    label; None where there is none), and what there is to note (a batch size lowered, labels that aren't the teacher's)."""

    count: int
    shards: int
    extracted: int
    statuses: dict[str, int]
    provenance: Provenance
    problems: tuple[str, ...]
    top1: float | None = None
    notes: tuple[str, ...] = ()


def extract_teacher_maps(
    shards: str | Path, out: str | Path, config: ExtractConfig, *, progress: Progress = silent
) -> ExtractReport:
    """Run the frozen teacher over every shard and write its relevance maps to `out`.

    `shards` and `out` are folders or fsspec URLs. Shards that are there already, with the digest of their input and of the
    teacher, are kept. Memory of this process grows by about 2 KB a shard. Errors: :class:`UsageError` for a folder or option
    that makes no sense; :class:`ZpipeError` when the store was made by another teacher or from other shards, when another
    run is writing to it, or when shards failed (listed in `details`; the others are committed and no manifest is written
    until all are).
    """
    shards, out = as_path(shards), as_path(out)
    if config.frame not in FRAMES:
        raise UsageError(f"--frame {config.frame}: choose one of {', '.join(FRAMES)}")
    entries, _ = open_shards(shards, progress=progress)
    device = _device(config)
    teacher = load_teacher(
        config.teacher, config.weights, num_classes=config.num_classes, seed=config.seed, model_args=config.teacher_args
    )
    provenance = provenance_of(teacher, config)
    _check_sizes(entries, provenance)
    claim_folder(out, EXTRACTION_NAME, "relevance store", lease=LEASE_NAME)
    with held_lease(out) as lease:
        clear_temporaries(out)
        return _extract(shards, out, entries, teacher, provenance, config, device, lease, progress)


def _extract(
    shards: Path,
    out: Path,
    entries: list[tuple[Path, ShardEntry]],
    teacher: Teacher,
    provenance: Provenance,
    config: ExtractConfig,
    device: str,
    lease: Lease,
    progress: Progress,
) -> ExtractReport:
    if config.replace:
        _start_over(out, [entry for _, entry in entries], provenance)
    _begin(out, provenance)
    _clear_temporaries(out)
    todo, kept = _plan(out, entries, provenance, progress)
    _retract(out, todo)
    total = sum(entry.count for _, entry in entries)
    threads = _threads(config, len(entries))
    spec = WorkerSpec(
        teacher=config.teacher,
        weights=config.weights if config.weights in ("pretrained", "random") else str(Path(config.weights).resolve()),
        teacher_args=config.teacher_args,
        num_classes=config.num_classes,
        seed=config.seed,
        teacher_digest=teacher.digest,
        fingerprint=provenance.fingerprint(),
        out=str(out if is_remote(out) else out.resolve()),
        explain=config.explain,
        frame=config.frame,
        batch_size=config.batch_size,
        threads=threads,
        sharing=len(entries),
        device=device,
    )
    del teacher
    left = sum(task.entry.count for task in todo)
    reports = _execute(spec, todo, config, lease.check, progress, kept=total - left, total=total)
    lease.check()
    failed = [report for report in reports if report.error]
    notes = [note for report in reports for note in report.notes]
    _clear_temporaries(out)  # of workers that died in this run
    if failed:
        raise ZpipeError(
            f"{out}: {len(failed)} of {len(entries)} shards failed, the others are committed; mend them and run again to go on",
            [report.error for report in failed],
        )
    audit = _audit(out, [entry for _, entry in entries], provenance, shards, kept, progress)
    manifest, top1 = audit.manifest, audit.top1
    lease.check()  # of a million shards the audit takes longer than a lease
    if not audit.listed:
        write_manifest(out, manifest)
    remove(out / REPLACING_NAME)
    if top1 is not None and top1 < FOREIGN_LABELS and config.explain.asks_label and config.weights != "random":
        notes.append(
            f"the teacher names only {100 * top1:.1f} % of these labels: are they its classes? A teacher for yours: "
            "zpipe train-vit ... --recipe finetune, then --weights RUN"
        )
    return ExtractReport(
        count=manifest.count,
        shards=len(manifest.shards),
        extracted=len(todo),
        statuses=manifest.statuses,
        provenance=provenance,
        problems=_problems(audit.unusable, reports),
        top1=top1,
        notes=tuple(dict.fromkeys(notes)),
    )


def provenance_of(teacher: Teacher, config: ExtractConfig) -> Provenance:
    """The provenance of maps made by `teacher` under `config`."""
    return Provenance(
        teacher=teacher.name,
        teacher_args=teacher.model_args,
        weights=config.weights,
        seed=config.seed if config.weights == "random" else None,
        teacher_digest=teacher.digest,
        num_classes=teacher.num_classes,
        method=config.explain.method,
        start_layer=0,
        target=config.explain.recorded_target,
        frame=config.frame,
        grid=teacher.grid,
        image_size=teacher.image_size,
        mean=teacher.mean,
        std=teacher.std,
        interpolation=teacher.interpolation,
        crop_pct=frame_of(teacher, config.frame).crop_pct,
        symmetrised=config.explain.symmetrise,
        precision=config.explain.precision,
    )


def _check_sizes(entries: list[tuple[Path, ShardEntry]], provenance: Provenance) -> None:
    """Whether the maps of each tar make a shard that can be read. Errors: :class:`ZpipeError` naming the tar."""
    gh, gw = provenance.grid
    most = max_rows((gh, gw))
    for path, entry in entries:
        if entry.count > most:
            raise ZpipeError(
                f"{path}: {entry.count} samples, a map shard holds {most} maps of {gh} x {gw}; make smaller tars "
                f"(zpipe make-shards --shard-size {most} at most)"
            )


def _device(config: ExtractConfig) -> str:
    """The device, or `auto` where only Ray knows what the machines have."""
    cluster = config.executor == "ray"
    if config.device == "auto":
        return "auto" if cluster else "cuda" if torch.cuda.is_available() else "cpu"
    remote = cluster and (config.address or os.environ.get("RAY_ADDRESS"))
    if config.device.startswith("cuda") and not remote and not torch.cuda.is_available():
        raise UsageError(f"--device {config.device}: torch sees no CUDA device here; use --device cpu")
    return config.device


def _threads(config: ExtractConfig, shards: int) -> int:
    cpus = os.cpu_count() or 1
    if config.threads:
        return config.threads
    if config.executor == "local":
        return cpus
    # More processes with fewer threads are faster, fewer processes take less memory: up to 4 threads each. It must not
    # depend on how much is left to do, or a resumed run would sum in another order than an undisturbed one.
    few = min(4, max(1, cpus // 2))
    if config.address or os.environ.get("RAY_ADDRESS"):
        return few  # how many CPUs a cluster's machines have isn't known here
    # A shard is one worker's: with fewer shards than that makes workers, the rest of the machine would idle.
    return max(few, min(16, cpus // max(1, shards)))


def _begin(out: Path, provenance: Provenance) -> None:
    found = read_extraction(out)
    if found is None:
        write_extraction(out, provenance)
    else:
        check_compatible(found, provenance, out)


def _start_over(out: Path, entries: list[ShardEntry], provenance: Provenance) -> None:
    """Remove what the store holds, unless this same replacement did so before and was interrupted: that one goes on.

    A mark says what is being replaced by what. It is written behind the removal and taken away behind the manifest, so neither
    an interrupted removal nor a finished store is gone on with.
    """
    asked = hashlib.sha256(provenance.fingerprint().encode())
    for entry in entries:
        asked.update(f"\n{entry.stem} {entry.sha256}".encode())
    mark = out / REPLACING_NAME
    if mark.is_file() and not (out / MANIFEST_NAME).is_file():
        found = read_json(mark, "the mark of an interrupted --replace")
        check_format(mark, found, FORMAT, STORE_VERSION, remedy="delete it")
        if found.get("replacement") == asked.hexdigest():
            return
    # The manifest goes before what it lists and the mark of a store last: in between it is an unfinished store.
    for name in (REPLACING_NAME, MANIFEST_NAME, "index", "maps", EXTRACTION_NAME):
        remove(out / name)
    write_extraction(out, provenance)
    write_json(mark, header(FORMAT, STORE_VERSION) | {"replacement": asked.hexdigest()})


def _clear_temporaries(out: Path) -> None:
    for folder in ("maps", "index"):
        clear_temporaries(out / folder)


def _plan(
    out: Path, entries: list[tuple[Path, ShardEntry]], provenance: Provenance, progress: Progress
) -> tuple[list[ShardTask], dict[str, str]]:
    """The shards still to do; of those that are done, stem -> SHA-256 of the index.

    While a replacement is at work, what a worker of the replaced run finished late is removed.
    """
    known = {entry.stem for _, entry in entries}
    if len(known) != len(entries):
        raise ZpipeError(f"{entries[0][0].parent}: two tars share a name; rename one")
    indexed = {name.removesuffix(".parquet") for name in names_in(out / "index")}
    mapped = {name.removesuffix(".zarr") for name in names_in(out / "maps")}
    replacing = (out / REPLACING_NAME).is_file()
    foreign = sorted(indexed - known)
    if foreign and not replacing:
        raise ZpipeError(
            f"{index_path(out, foreign[0])}: its input tar is not among these shards; give another --out folder, or --replace"
        )
    for stem in foreign:
        _remove_shard(out, stem)
    done = [(path, entry) for path, entry in entries if entry.stem in indexed & mapped]
    wanted = provenance.fingerprint()
    kept: dict[str, str] = {}
    _, listed = _earlier(out)
    files = map_files(out, lambda item: IndexFile(index_path(out, item[1].stem)), done)
    for (path, entry), file in zip(_told(done, "find-finished-shards", progress), files, strict=True):
        if replacing and (file.seal.input_sha256, file.seal.fingerprint) != (entry.sha256, wanted):
            _remove_shard(out, entry.stem)
            continue
        _check_index(file, entry, wanted, listed.get(entry.stem), path)
        kept[entry.stem] = file.sha256
    todo = [
        ShardTask(path=str(path if is_remote(path) else path.resolve()), entry=entry)
        for path, entry in entries
        if entry.stem not in kept
    ]
    return todo, kept


def _remove_shard(out: Path, stem: str) -> None:
    remove(index_path(out, stem))  # first: maps without an index count for nothing
    remove(maps_path(out, stem))


def _retract(out: Path, todo: list[ShardTask]) -> None:
    """Take the manifest away when shards that it lists are made again: their bytes may differ in the last bits, and until all
    are there the store is not what it says. Shards that only come to those it lists leave it as it is.
    """
    _, listed = _earlier(out)
    if any(task.entry.stem in listed for task in todo):
        remove(out / MANIFEST_NAME)


def _earlier(out: Path) -> tuple[StoreManifest | None, dict[str, str]]:
    """The manifest that is there already, if any, and stem -> SHA-256 of the index as it says."""
    if not (out / MANIFEST_NAME).is_file():
        return None, {}
    manifest = read_manifest(out)
    return manifest, {shard.stem: shard.index_sha256 for shard in manifest.shards}


def _check_index(file: IndexFile, entry: ShardEntry, fingerprint: str, listed: str | None, tar: Path | str) -> None:
    """Whether an index is of this tar and this provenance, and still the one that was `listed` in a manifest or found before.

    A manifest that is written anew would vouch for what lies there now. Errors: :class:`ZpipeError` naming the file.
    """
    seal = file.seal
    if seal.input_sha256 != entry.sha256:
        raise ZpipeError(
            f"{file.path}: made from a tar with SHA-256 {seal.input_sha256[:12]}, {tar} now has {entry.sha256[:12]}; "
            "give another --out folder, or --replace to start over"
        )
    if seal.fingerprint != fingerprint:
        raise ZpipeError(
            f"{file.path}: made under fingerprint {seal.fingerprint[:12]}, this run has {fingerprint[:12]}; "
            "give another --out folder, or --replace to start over"
        )
    if listed is not None and file.sha256 != listed:
        raise ZpipeError(f"{file.path}: its digest is not what it was: altered; delete it and run again")


def _execute(
    spec: WorkerSpec,
    todo: list[ShardTask],
    config: ExtractConfig,
    check: Callable[[], None],
    progress: Progress,
    *,
    kept: int,
    total: int,
) -> list[ShardReport]:
    """Run what is to do; the reports of shards that failed or have something to say of images or on the way."""
    if not todo:
        progress("extract-teacher-maps", total, total, shards_left=0)
        return []
    reports: list[ShardReport] = []
    done, left, failed = kept, len(todo), 0
    statuses: Counter[str] = Counter()

    def on_report(report: ShardReport) -> None:
        nonlocal done, left, failed
        left -= 1
        done += report.count
        statuses.update(report.statuses)
        if (
            report.error or report.notes or report.problems
        ):  # the others have said all: of a million shards they would stay in memory
            reports.append(report)
        failed += bool(report.error)  # not counted anew each time: that is the square of the shards
        bad = sum(count for status, count in statuses.items() if status != OK)
        progress("extract-teacher-maps", done, total, shards_left=left, failed=failed, bad_images=bad)

    progress("extract-teacher-maps", done, total, shards_left=left)
    run = run_ray if config.executor == "ray" else run_local
    resources = Resources(
        actors=config.actors,
        gpus_per_actor=config.gpus_per_actor,
        address=config.address,
        image_timeout_s=config.image_timeout_s,
    )
    run(spec, todo, resources, on_report, check)
    return reports


@dataclass(frozen=True, kw_only=True)
class _Audit:
    """What lies on disk. listed: whether the manifest that is there says so already. top1: share of usable, labelled images whose label the teacher names, None where there are none;
    unusable: stem, key and status of each sample without a usable map."""

    manifest: StoreManifest
    listed: bool
    top1: float | None
    unusable: list[tuple[str, str, str]]


def _told(items: Sequence[T], stage: str, progress: Progress) -> Iterator[T]:
    """The items, progress told of on the way where there are many."""
    for number, item in enumerate(items, start=1):
        yield item
        if number % TOLD_EVERY == 0:
            progress(stage, number, len(items))


def _audit(
    out: Path,
    entries: list[ShardEntry],
    provenance: Provenance,
    source: Path,
    kept: dict[str, str],
    progress: Progress,
) -> _Audit:
    """Look at what lies on disk, not at what workers said.

    kept: of the shards that were there when the run began, stem -> SHA-256 of the index. Errors: :class:`ZpipeError` naming
    the file that isn't what it should be.
    """
    statuses: Counter[str] = Counter()
    map_shards = []
    unusable: list[tuple[str, str, str]] = []
    named = labelled = 0
    fingerprint, mapped = provenance.fingerprint(), set(names_in(out / "maps"))
    before, _ = _earlier(out)
    files = map_files(out, lambda entry: IndexFile(index_path(out, entry.stem)), entries)
    for entry, file in zip(_told(entries, "audit", progress), files, strict=True):
        _check_index(file, entry, fingerprint, kept.get(entry.stem), entry.name)
        if maps_path(out, entry.stem).name not in mapped:
            raise ZpipeError(f"{maps_path(out, entry.stem)}: missing; run again to make it")
        table = file.table(["label", "predicted", "status"])
        if len(table) != entry.count:
            raise ZpipeError(f"{file.path}: {len(table)} rows for {entry.count} samples; delete it and run again")
        right, of = labels_named(table)
        named, labelled = named + right, labelled + of
        status = table["status"].to_numpy(zero_copy_only=False)
        statuses.update(status.tolist())
        if len(bad := np.flatnonzero(status != OK)):
            keys = file.table(["key"])["key"].take(bad).to_pylist()
            unusable += [(entry.stem, key, kind) for key, kind in zip(keys, status[bad].tolist(), strict=True)]
        map_shards.append(
            MapShard(stem=entry.stem, count=entry.count, input_sha256=entry.sha256, index_sha256=file.sha256)
        )
    top1 = named / labelled if labelled else None
    manifest = StoreManifest(
        provenance=provenance,
        shards=tuple(map_shards),
        statuses=dict(sorted(statuses.items())),
        source=str(source),
        zpipe_version=version("zpipe"),
    )
    same = before and before.shards == manifest.shards and before.provenance.fingerprint() == fingerprint
    return _Audit(manifest=before if before and same else manifest, listed=bool(same), top1=top1, unusable=unusable)


def _problems(unusable: list[tuple[str, str, str]], reports: list[ShardReport]) -> tuple[str, ...]:
    """`shard.tar: key K: status`, and the reason where this run met it, for every sample that has no usable map."""
    reasons = {report.stem: report.problems for report in reports}
    lines = []
    for stem, key, status in unusable:
        reason = reasons.get(stem, {}).get(key)
        lines.append(f"{stem}.tar: key {key}: {status}{f' ({reason})' if reason else ''}")
    return tuple(lines)
