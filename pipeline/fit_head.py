"""Fit a linear head to the frozen features of a teacher that has none, or one for other classes."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import cast

import torch

from zpipe.pipeline.heads import Channels, HeadRecord, write_head
from zpipe.pipeline.logistic_regression import Scaling, Score, fit, score
from zpipe.pipeline.probe_features import FeatureReader, TarFeatures, hold_out, rows_of
from zpipe.pipeline.shard_reader import FRAMES, open_shards
from zpipe.pipeline.teacher import load_teacher
from zpipe.pipeline.teacher_spec import TeacherSpec
from zpipe.pipeline.worker import frame_of
from zpipe.schemas.atomic import check_out_file, claim_folder, write_json
from zpipe.schemas.choices import check_choice
from zpipe.schemas.classes import ClassNames, match_classes
from zpipe.schemas.errors import UsageError, ZpipeError
from zpipe.schemas.formats import header
from zpipe.schemas.lease import LEASE_NAME, held_lease
from zpipe.schemas.model_config import MAX_CLASSES
from zpipe.schemas.progress import Progress, silent
from zpipe.schemas.storage import as_local, as_path, remove

MARKER = "fit-head.json"
STRENGTHS = tuple(10.0 ** (-step / 2) for step in range(11))  # 1 to 1e-5, two a decade
PATIENCE = 2  # how many weaker penalties are tried after the best one


@dataclass(frozen=True, kw_only=True)
class FitHeadConfig:
    """Settings of the fit of a head.

    Raises:
        UsageError: A value is none of its choices or out of range.
    """

    teacher: TeacherSpec
    """The teacher whose features are read. A head of its own is not used."""
    frame: str = "center"
    """What the teacher sees of an image: ``center``, its evaluation view, or ``full``, the whole image."""
    strength: float | None = None
    """Strength of the L2 penalty, see `zpipe.pipeline.logistic_regression.fit`; None takes the one of `STRENGTHS` with
    the lowest cross-entropy on held-out images."""
    batch_size: int = 0
    """Images per batch; 0 takes 8 on a CPU and 64 on a GPU."""
    threads: int = 0
    """CPU threads; 0 takes all."""
    device: str = "auto"
    """``cpu``, ``cuda`` or ``auto``: CUDA where there is any."""

    def __post_init__(self) -> None:
        check_choice("--frame", self.frame, FRAMES)
        if self.strength is not None and not 0 < self.strength < float("inf"):
            raise UsageError(f"--l2 {self.strength}: give a number > 0, or leave it out to have it chosen")
        for name in ("batch_size", "threads"):
            if getattr(self, name) < 0:
                raise UsageError(f"--{name.replace('_', '-')} {getattr(self, name)}: give a number >= 0")
        if self.teacher.crop_pct is not None and self.frame != "center":
            raise UsageError(f"--crop-pct {self.teacher.crop_pct}: --frame {self.frame} shows the whole image")
        if self.teacher.head or self.teacher.class_embeddings:
            raise UsageError("a head is fitted to the teacher alone; leave head and class_embeddings out")


@dataclass(frozen=True, kw_only=True)
class FitHeadReport:
    """What was fitted, and how well it classifies."""

    classes: int
    """Number of classes."""
    features: int
    """Number of features."""
    count: int
    """Number of images that the head was fitted to."""
    strength: float
    """Strength of the L2 penalty."""
    held_out: Score | None
    """The held-out images, classified by a fit without them; None if the strength was given."""
    val: Score | None
    """The validation images, classified by the head; None without validation shards."""
    unusable: tuple[str, ...]
    """A line for each image that could not be decoded, or whose features are not finite."""
    notes: tuple[str, ...]
    """What the user should know."""


def fit_head(
    shards: str | Path,
    out: str | Path,
    config: FitHeadConfig,
    *,
    val: str | Path | None = None,
    progress: Progress = silent,
    say: Callable[[str], None] | None = None,
) -> FitHeadReport:
    """Fit a linear head to the images of tar shards and write it to a file.

    The features of each tar are kept in the folder `OUT.features` until then, 4 bytes each, so that a run that was
    interrupted computes only those that are missing. Memory grows by 16 bytes per image.

    Args:
        shards: Folder or fsspec URL of tar shards, one tar, or a pattern of tars in one folder; each image has a label.
        out: The file to write, on this machine, with the suffix .safetensors; a head that is there is replaced.
        config: Teacher, frame and strength.
        val: Shards of the same classes on which to measure the head.
        progress: Reports images whose features are there, and strengths that were tried.
        say: Called before the work begins with a note about the teacher; the report has it, too.

    Raises:
        UsageError: A path or an option makes no sense.
        ZpipeError: An image has no label, a class has no images, the classes of `val` are others, a tar is damaged, or
            another run is fitting a head for the same file.
    """
    out = as_local(out)
    check_out_file(out, (".safetensors",))
    places = [as_path(shards)] if val is None else [as_path(shards), as_path(val)]
    sets = [open_shards(place, progress=progress) for place in places]
    names = [ClassNames(names=index.classes, where=str(place)) for place, (_, index) in zip(places, sets, strict=True)]
    match_classes(names[-1], names[0], remedy="give validation shards of the same classes")
    reader, note = _reader(out, config)
    if say is not None and note:
        say(note)
    with held_lease(reader.folder, "folder of features") as lease:
        write_json(reader.folder / MARKER, header("zpipe-head-features", 1))
        train, *others = (reader.read(tars, index.label_field, progress) for tars, index in sets)
        num_classes = _check_labels(train, names[0])
        for other in others:
            _check_labels(other, names[-1], num_classes)
        given, device = config.strength, reader.device
        strength, held_out = _choose(train, num_classes, device, progress) if given is None else (given, None)
        rows = rows_of(train, device)
        scaling = Scaling.of(rows)
        fitted = fit(rows, scaling, num_classes, strength)
        head = fitted.affine.after(scaling)
        report = FitHeadReport(
            classes=num_classes,
            features=head.weight.shape[1],
            count=sum(len(tar.labels) for tar in train),
            strength=strength,
            held_out=held_out,
            val=score(rows_of(others[0], device), head) if others else None,
            unusable=tuple(line for tars in (train, *others) for tar in tars for line in tar.problems),
            notes=tuple(each for each in (note, fitted.note) if each),
        )
        lease.check()
        write_head(out, head.weight, head.bias, _record(reader, config, report, names[0]))
        remove(reader.folder)
    return report


def _reader(out: Path, config: FitHeadConfig) -> tuple[FeatureReader, str]:
    """The reader of features, with its folder, and a note about the teacher."""
    device = ("cuda" if torch.cuda.is_available() else "cpu") if config.device == "auto" else config.device
    threads = config.threads or os.cpu_count() or 1
    torch.set_num_threads(threads)
    teacher = load_teacher(config.teacher, device=device, needs_classes=False)
    folder = out.with_name(f"{out.name}.features")
    claim_folder(folder, MARKER, "features of a head", lease=LEASE_NAME)
    batch_size = config.batch_size or (64 if device.startswith("cuda") else 8)
    frame = frame_of(teacher, config.frame)
    return FeatureReader(teacher, frame, folder, batch_size=batch_size, threads=threads), teacher.note


def _check_labels(tars: Sequence[TarFeatures], names: ClassNames, num_classes: int | None = None) -> int:
    """Check that each image has a label, and each class an image unless their number is given; return that number."""
    for tar in tars:
        if tar.unlabelled:
            raise ZpipeError(f"{tar.path}: key {tar.unlabelled}: has no label (.cls, or label in .json); add one")
    labels = torch.cat([tar.labels for tar in tars])
    if not len(labels):
        raise ZpipeError(f"{names.where}: no image has usable features; mend the images")
    largest = int(labels.max())
    limit = num_classes or len(names.names) or min(largest + 1, MAX_CLASSES)
    if largest >= limit:  # before memory is taken for the counts of so many
        among = f"there are {limit} classes" if limit < MAX_CLASSES else f"a head has at most {limit} classes"
        raise ZpipeError(f"{names.where}: has the label {largest}, {among}; correct the labels")
    empty = (torch.bincount(labels, minlength=limit) == 0).nonzero()[:, 0].tolist()
    if empty and num_classes is None:
        name = f", {names.names[empty[0]]!r}," if names.names else ""
        raise ZpipeError(
            f"{names.where}: class {empty[0]}{name} has no usable image, so that nothing could be learned of it; add "
            "images, or make the shards without that class"
        )
    if limit < 2:
        raise ZpipeError(f"{names.where}: has one class; a head needs two or more")
    return limit


def _choose(tars: Sequence[TarFeatures], num_classes: int, device: str, progress: Progress) -> tuple[float, Score]:
    """The strength with the lowest cross-entropy on held-out images, and what a fit without these makes of them.

    Strong penalties come first: their fits are cheap, and each one starts from the last.
    """
    held = hold_out(tars, num_classes)
    if not any(mask.any() for mask in held):
        raise ZpipeError("no class has two images, so that none can be held out to choose the L2 strength; give --l2")
    fitted_to, judged_by = rows_of(tars, device, [~mask for mask in held]), rows_of(tars, device, held)
    scaling, start = Scaling.of(fitted_to), None
    tried: list[tuple[float, Score]] = []
    for strength in STRENGTHS:
        progress("fit-head: L2", len(tried), len(STRENGTHS))
        start = fit(fitted_to, scaling, num_classes, strength, start).affine
        tried.append((strength, score(judged_by, start.after(scaling))))
        best = min(tried, key=lambda each: each[1].loss)
        if len(tried) - tried.index(best) > PATIENCE:
            break
    progress("fit-head: L2", len(STRENGTHS), len(STRENGTHS))
    return best


def _record(reader: FeatureReader, config: FitHeadConfig, report: FitHeadReport, names: ClassNames) -> HeadRecord:
    teacher = reader.teacher
    return HeadRecord(
        teacher=teacher.name,
        teacher_digest=teacher.digest,
        reads_mean=reader.with_mean,
        classes=tuple(names.names),
        frame=config.frame,
        own_parts=teacher.model.own_parts,
        mean=cast(Channels, teacher.mean),
        std=cast(Channels, teacher.std),
        interpolation=teacher.interpolation,
        crop_pct=teacher.crop_pct,
        count=report.count,
        strength=report.strength,
        held_out=report.held_out.count if report.held_out else 0,
        held_out_top1=report.held_out.top1 if report.held_out else 0.0,
        zpipe_version=version("zpipe"),
    )
