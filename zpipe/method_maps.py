"""The maps of the study `map-methods`: for each attribution method, those of its training and of its validation shards.

The study itself belongs to training, which does not know the pipeline; here the two meet.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path

from zpipe.judging import as_judge
from zpipe.pipeline.explainer import ExplainConfig, precisions_of
from zpipe.pipeline.extract import Executor, ExtractConfig, extract_teacher_maps
from zpipe.pipeline.methods import CLASS_BLIND, METHODS, methods_of
from zpipe.pipeline.shard_reader import open_shards
from zpipe.pipeline.teacher import Teacher, TeacherSpec, load_teacher_of
from zpipe.schemas.choices import check_choice
from zpipe.schemas.classes import ClassNames, Matching, match_classes
from zpipe.schemas.errors import UsageError, ZpipeError
from zpipe.schemas.manifest import Provenance, StoreManifest, read_manifest
from zpipe.schemas.progress import Progress, silent
from zpipe.schemas.relevance_store import BY_NAME
from zpipe.train.device import resolve_device
from zpipe.train.studies.bench import MethodMaps, WantedMaps


@dataclass(frozen=True, kw_only=True)
class MethodsConfig:
    """Which methods to compare, and how to extract their maps.

    Raises:
        UsageError: A method is unknown, or named twice.
    """

    methods: tuple[str, ...] = ()
    """Attribution methods; empty for all that the teacher can be explained by."""
    weights: str | None = None
    """The teacher's weights, where they are no longer where the store says."""
    executor: Executor = "ray"
    """As of `ExtractConfig`, and so the next two."""
    address: str | None = None
    """Address of a Ray cluster."""
    device: str = "auto"
    """Device of the teacher."""

    def __post_init__(self) -> None:
        for method in self.methods:
            check_choice("--methods", method, METHODS)
            if self.methods.count(method) > 1:
                raise UsageError(f"--methods {method}: is named twice")


def extract_method_maps(
    wanted: WantedMaps,
    config: MethodsConfig,
    *,
    progress: Progress = silent,
    say: Callable[[str], None] = lambda line: None,
) -> MethodMaps:
    """Extract the maps that the study `map-methods` asks for; what was extracted before is kept.

    Teacher, target, frame and precision are those of the store that exists already, which is used as it is. A method
    without that precision is explained in float32.

    Args:
        wanted: What the study asks for.
        config: The methods.
        progress: Called as maps are extracted.
        say: Called with a line about each store.

    Raises:
        UsageError: The teacher can't be explained by a method that was named, or `wanted.val_maps` are other maps.
        ZpipeError: The store holds no maps of a teacher, the teacher's weights are gone or others lie in their place,
            or an extraction fails.
    """
    own = read_manifest(wanted.own)
    origin = own.provenance
    base = _extraction(wanted, own, config)
    teacher = load_teacher_of(wanted.own, origin, weights=config.weights, device=resolve_device(config.device))
    methods, notes = _methods(teacher, config.methods)
    if origin.method in CLASS_BLIND:
        notes.append(f"{wanted.own}: {origin.method} has no target; the other maps explain the images' own labels")
    judge = None
    if teacher.image_size[0] == teacher.image_size[1]:
        judge = as_judge(teacher)
    else:
        notes.append(f"the maps are not judged: images of the teacher {teacher.name} are not square")
    _check_val_maps(wanted, origin, methods)
    explained = {method: _explain(method, origin) for method in methods}  # a refusal comes before any extraction
    for method, explain in explained.items():
        if explain.precision not in (origin.precision, origin.precision.partition("+")[0]):
            notes.append(
                f"{method}: explained in {explain.precision}, as it has no {origin.precision}, that of {wanted.own}"
            )
    train: dict[str, Path] = {}
    val: dict[str, Path] = {}
    places = ((train, wanted.train, wanted.own, "train"), (val, wanted.val, wanted.val_maps, wanted.val_name))
    for method in methods:
        for stores, shards, given, name in places:
            if method == origin.method and given is not None:
                stores[method] = given
                continue
            stores[method] = wanted.out / method / name
            settings = replace(base, explain=explained[method])
            notes += _extract(method, shards, stores[method], settings, progress, say)
    classes = None if base.classes == "same" else base.classes
    return MethodMaps(train=train, val=val, teacher=judge, classes=classes, notes=tuple(dict.fromkeys(notes)))


def _extraction(wanted: WantedMaps, own: StoreManifest, config: MethodsConfig) -> ExtractConfig:
    """The settings that the store was made with, without those of the method."""
    origin = own.provenance
    if not origin.teacher or origin.kind != "map":
        what = f"holds {origin.kind}" if origin.teacher else "was made without a teacher"
        raise ZpipeError(f"{wanted.own}: {what}; study map-methods needs a zoomer that learned a teacher's maps")
    spec = TeacherSpec.of(origin, config.weights)
    named = {each.name: getattr(spec, each.name) for each in fields(ExtractConfig) if hasattr(spec, each.name)}
    return ExtractConfig(
        teacher=spec.name,
        teacher_args=spec.model_args,
        **named,
        classes=_matching(wanted, own),
        frame=origin.frame,
        executor=config.executor,
        address=config.address,
        device=config.device,
    )


def _matching(wanted: WantedMaps, own: StoreManifest) -> Matching:
    """How labels found the teacher's classes. The store was made from these shards: where names differ, by index."""
    if own.provenance.target.startswith(BY_NAME):
        return "by-name"
    data = ClassNames(names=open_shards(wanted.train)[1].classes, where=str(wanted.train))
    try:
        match_classes(data, ClassNames(names=own.classes, where=str(wanted.own)))
    except ZpipeError:
        return "by-index"
    return "same"


def _explain(method: str, origin: Provenance) -> ExplainConfig:
    """The settings of a method's maps: those of the store, as far as the method has them."""
    target = origin.target.partition(", labels of ")[0]  # the index of the shards says where their labels are
    if target == "none" or target.startswith(BY_NAME):
        target = "ground-truth"
    # The arithmetic of the downward sweep belongs to the store's own method.
    precision = origin.precision if method == origin.method else origin.precision.partition("+")[0]
    if precision not in precisions_of(method):
        precision = "float32"
    return ExplainConfig(method=method, target=target, symmetrise=origin.symmetrised, precision=precision)


def _methods(teacher: Teacher, named: tuple[str, ...]) -> tuple[list[str], list[str]]:
    """The methods to compare, and notes about those that the teacher can't be explained by.

    Raises:
        UsageError: It can't be explained by one that was named, or by none at all.
    """
    refusals = methods_of(teacher.model)
    chosen = named or tuple(METHODS)
    if named and (refused := next((method for method in named if refusals[method]), None)):
        raise UsageError(f"--methods {refused}: {refusals[refused]}; leave it out")
    able = [method for method in chosen if not refusals[method]]
    notes = [f"{method}: left out, {refusals[method]}" for method in chosen if refusals[method]]
    if not able:
        raise UsageError(f"teacher {teacher.weights}: {notes[0]}")
    return able, notes


def _check_val_maps(wanted: WantedMaps, origin: Provenance, methods: list[str]) -> None:
    if wanted.val_maps is None:
        return
    theirs = read_manifest(wanted.val_maps).provenance.compared()
    for name, value in origin.compared().items():
        if theirs.get(name) != value:
            raise UsageError(
                f"--maps {wanted.val_maps}: made with {name} = {theirs.get(name)!r}, the maps that the zoomer learned "
                f"from with {value!r}; leave it out, and the maps are extracted"
            )
    if origin.method not in methods:
        raise UsageError(f"--maps {wanted.val_maps}: of {origin.method}, which --methods leaves out; leave out --maps")


def _extract(
    method: str,
    shards: Path,
    out: Path,
    config: ExtractConfig,
    progress: Progress,
    say: Callable[[str], None],
) -> list[str]:
    """Extract the maps of a method, say so, and return notes for the user."""

    def show(stage: str, done: int, total: int, **facts: object) -> None:
        progress(stage, done, total, **facts, of=f"{method}/{out.name}")

    begun = time.monotonic()
    report = extract_teacher_maps(shards, out, config, progress=show)
    took = f"extracted in {time.monotonic() - begun:.0f} s" if report.extracted else "were extracted before"
    say(f"study map-methods: maps/{method}/{out.name}: {report.count} maps {took}")
    notes = list(report.notes)
    if report.problems:
        notes.append(f"{out}: {len(report.problems)} images have no usable map, such as {report.problems[0]}")
    return notes + ([report.left_out] if report.left_out else [])
