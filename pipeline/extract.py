"""Extraction of a whole data set: plan, execute, audit, manifest."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch

from zpipe.pipeline.executor import Resources, run_local, run_ray
from zpipe.pipeline.explainer import PRECISIONS, ExplainConfig, available_memory, batch_that_fits, bytes_per_image
from zpipe.pipeline.shard_reader import FRAMES, open_shards
from zpipe.pipeline.teacher import Teacher, load_teacher
from zpipe.pipeline.worker import ShardReport, ShardTask, WorkerSpec, frame_of
from zpipe.schemas.atomic import claim_folder, clear_temporaries
from zpipe.schemas.errors import UsageError, ZpipeError
from zpipe.schemas.manifest import (
    EXTRACTION_NAME,
    MANIFEST_NAME,
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
from zpipe.schemas.relevance_store import OK, index_path, maps_path, read_index, read_seal
from zpipe.schemas.shard_index import ShardEntry, digest_file


@dataclass(frozen=True, kw_only=True)
class ExtractConfig:
    """Settings of an extraction.

    teacher: timm model name; None takes what the weights folder says, else deit_base_patch16_224.
    weights: a file, a folder that train-vit wrote, `pretrained`, or `random` (for trying things out).
    explain: method, target, symmetrisation, precision. frame: `full` (the whole image, which can serve any crop) or
    `center` (the teacher's own evaluation view).
    batch_size, actors, threads: 0 chooses. threads are those of each worker; equal threads give equal bytes.
    device: `auto` takes a CUDA device when there is one.
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


@dataclass(frozen=True, kw_only=True)
class ExtractReport:
    """What an extraction did: samples in the store, shards in it, shards made by this run, samples per status,
    images without a usable map, and what had to be changed on the way (a batch size lowered)."""

    count: int
    shards: int
    extracted: int
    statuses: dict[str, int]
    provenance: Provenance
    problems: tuple[str, ...]
    notes: tuple[str, ...] = ()


def extract_teacher_maps(
    shards: Path, out: Path, config: ExtractConfig, *, progress: Progress = silent
) -> ExtractReport:
    """Run the frozen teacher over every shard and write its relevance maps to `out`.

    Shards that are there already, with the digest of their input and of the teacher, are kept. Errors:
    :class:`UsageError` for a folder or option that makes no sense; :class:`ZpipeError` when the store was made by another
    teacher or from other shards, or when shards failed (listed in `details`; the others are committed and no manifest is
    written until all are).
    """
    shards, out = Path(shards), Path(out)
    if config.frame not in FRAMES:
        raise UsageError(f"--frame {config.frame}: choose one of {', '.join(FRAMES)}")
    entries, _ = open_shards(shards)
    device = _device(config.device)
    teacher = load_teacher(
        config.teacher, config.weights, num_classes=config.num_classes, seed=config.seed, model_args=config.teacher_args
    )
    provenance = provenance_of(teacher, config)
    _begin(out, provenance)
    _clear_temporaries(out)
    todo, kept = _plan(out, entries, provenance)
    actors = _actors(config, device)
    batch_size, notes = _batch_size(config, teacher, device, actors)
    spec = WorkerSpec(
        teacher=config.teacher,
        weights=config.weights if config.weights in ("pretrained", "random") else str(Path(config.weights).resolve()),
        teacher_args=config.teacher_args,
        num_classes=config.num_classes,
        seed=config.seed,
        teacher_digest=teacher.digest,
        fingerprint=provenance.fingerprint(),
        out=str(out.resolve()),
        explain=config.explain,
        frame=config.frame,
        batch_size=batch_size,
        threads=_threads(config),
        device=device,
    )
    del teacher
    total = sum(entry.count for _, entry in entries)
    reports = _execute(spec, todo, config, actors, progress, kept=kept, total=total)
    failed = [report for report in reports if report.error]
    notes += [note for report in reports for note in report.notes]
    _clear_temporaries(out)  # of workers that died in this run
    if failed:
        raise ZpipeError(
            f"{out}: {len(failed)} of {len(entries)} shards failed, the others are committed; mend them and run again to go on",
            [report.error for report in failed],
        )
    manifest = _audit(out, [entry for _, entry in entries], provenance, shards)
    return ExtractReport(
        count=manifest.count,
        shards=len(manifest.shards),
        extracted=len(todo),
        statuses=manifest.statuses,
        provenance=provenance,
        problems=_problems(out, manifest),
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
        grid=tuple(teacher.grid),
        image_size=tuple(teacher.image_size),
        mean=tuple(teacher.mean),
        std=tuple(teacher.std),
        interpolation=teacher.interpolation,
        crop_pct=frame_of(teacher, config.frame).crop_pct,
        symmetrised=config.explain.symmetrise,
        precision=config.explain.precision,
    )


def _device(asked: str) -> str:
    if asked == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if asked.startswith("cuda") and not torch.cuda.is_available():
        raise UsageError(f"--device {asked}: torch sees no CUDA device here; use --device cpu")
    return asked


def _threads(config: ExtractConfig) -> int:
    cpus = os.cpu_count() or 1
    if config.threads:
        return config.threads
    if config.executor == "local":
        return cpus
    # More processes with fewer threads are faster, fewer processes take less memory: up to 4 threads each. It must not
    # depend on how much is left to do, or a resumed run would sum in another order than an undisturbed one.
    return min(4, max(1, cpus // 2))


def _gpus_per_actor(config: ExtractConfig, device: str) -> float:
    return config.gpus_per_actor or (1.0 if device.startswith("cuda") else 0.0)


def _actors(config: ExtractConfig, device: str) -> int:
    if config.executor == "local":
        return 1
    if config.actors:
        return config.actors
    gpus = _gpus_per_actor(config, device)
    return max(1, int(torch.cuda.device_count() / gpus)) if gpus else max(1, (os.cpu_count() or 1) // _threads(config))


def _batch_size(config: ExtractConfig, teacher: Teacher, device: str, actors: int) -> tuple[int, list[str]]:
    """The batch size to begin with, and what to say when it isn't the one asked for."""
    if device.startswith("cuda"):
        return config.batch_size or 64, []  # a GPU says when it is full, and the worker halves
    asked = config.batch_size or 8
    # A CPU doesn't say: the kernel ends a process that takes too much. So it is reckoned before.
    need = bytes_per_image(teacher.model, PRECISIONS[config.explain.precision][0])
    fits = batch_that_fits(asked, need, actors, available_memory())
    if fits == asked:
        return asked, []
    told = (
        f"a batch of {asked} would take {asked * need * actors / 2**30:.1f} GiB in {actors} workers: lowered to {fits}"
    )
    return fits, [told]


def _begin(out: Path, provenance: Provenance) -> None:
    claim_folder(out, EXTRACTION_NAME, "relevance store")
    found = read_extraction(out)
    if found is None:
        write_extraction(out, provenance)
    else:
        check_compatible(found, provenance, out)


def _clear_temporaries(out: Path) -> None:
    for folder in ("maps", "index"):
        clear_temporaries(out / folder)


def _plan(out: Path, entries: list[tuple[Path, ShardEntry]], provenance: Provenance) -> tuple[list[ShardTask], int]:
    """The shards still to do, and how many samples lie in those that are done."""
    known = {entry.stem for _, entry in entries}
    if len(known) != len(entries):
        raise ZpipeError(f"{entries[0][0].parent}: two tars share a name; rename one")
    for path in sorted((out / "index").glob("*.parquet")):
        if path.stem not in known:
            raise ZpipeError(f"{path}: its input tar is not among these shards; give another --out folder")
    todo, kept = [], 0
    for path, entry in entries:
        seal = read_seal(out, entry.stem)
        if seal is None or not maps_path(out, entry.stem).is_dir():
            todo.append(ShardTask(path=str(path.resolve()), entry=entry))
            continue
        if seal.input_sha256 != entry.sha256:
            raise ZpipeError(
                f"{index_path(out, entry.stem)}: made from a tar with SHA-256 {seal.input_sha256[:12]}, {path} now has "
                f"{entry.sha256[:12]}; give another --out folder"
            )
        if seal.fingerprint != provenance.fingerprint():
            raise ZpipeError(
                f"{index_path(out, entry.stem)}: made under fingerprint {seal.fingerprint[:12]}, this run has "
                f"{provenance.fingerprint()[:12]}; give another --out folder"
            )
        kept += entry.count
    return todo, kept


def _execute(
    spec: WorkerSpec,
    todo: list[ShardTask],
    config: ExtractConfig,
    actors: int,
    progress: Progress,
    *,
    kept: int,
    total: int,
) -> list[ShardReport]:
    if not todo:
        progress("extract-teacher-maps", total, total, shards_left=0)
        return []
    reports: list[ShardReport] = []
    done, left = kept, len(todo)
    statuses: Counter[str] = Counter()

    def on_report(report: ShardReport) -> None:
        nonlocal done, left
        left -= 1
        done += report.count
        statuses.update(report.statuses)
        reports.append(report)
        failed = sum(bool(report.error) for report in reports)
        bad = sum(count for status, count in statuses.items() if status != OK)
        progress("extract-teacher-maps", done, total, shards_left=left, failed=failed, bad_images=bad)

    progress("extract-teacher-maps", done, total, shards_left=left)
    gpus = _gpus_per_actor(config, spec.device)
    run = run_ray if config.executor == "ray" else run_local
    run(spec, todo, Resources(actors=actors, gpus_per_actor=gpus, address=config.address), on_report)
    return reports


def _audit(out: Path, entries: list[ShardEntry], provenance: Provenance, source: Path) -> StoreManifest:
    """Look at what lies on disk, not at what workers said, and write the manifest unless it says so already."""
    statuses: Counter[str] = Counter()
    map_shards = []
    for entry in entries:
        index = read_index(out, entry.stem, ["status"])
        if len(index) != entry.count:
            raise ZpipeError(
                f"{index_path(out, entry.stem)}: {len(index)} rows for {entry.count} samples; delete it and run again"
            )
        statuses.update(index["status"].to_pylist())
        digest = digest_file(index_path(out, entry.stem))
        map_shards.append(MapShard(stem=entry.stem, count=entry.count, input_sha256=entry.sha256, index_sha256=digest))
    manifest = StoreManifest(
        provenance=provenance,
        shards=tuple(map_shards),
        statuses=dict(sorted(statuses.items())),
        source=str(source),
        zpipe_version=version("zpipe"),
    )
    if (out / MANIFEST_NAME).is_file():
        found = read_manifest(out)
        if found.shards == manifest.shards and found.provenance.fingerprint() == provenance.fingerprint():
            return found
    write_manifest(out, manifest)
    return manifest


def _problems(out: Path, manifest: StoreManifest) -> tuple[str, ...]:
    """`shard.tar: key K: status` for every sample that has no usable map."""
    if set(manifest.statuses) <= {OK}:
        return ()
    lines = []
    for shard in manifest.shards:
        table = read_index(out, shard.stem, ["key", "status"])
        for key, status in zip(table["key"].to_pylist(), table["status"].to_pylist(), strict=True):
            if status != OK:
                lines.append(f"{shard.stem}.tar: key {key}: {status}")
    return tuple(lines)
