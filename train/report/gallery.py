"""The gallery of the page: the answers of the models to a few samples, as JSON.

An entry takes 3.5 KB of the page for scenes of 48 pixels, and about 20 KB for photos of 224 pixels: 18 KB are the JPEG,
1 KB the scores in full precision. Two thousand photos make a page of 45 MB, and are in memory while it is made.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from PIL import Image
from torch import Tensor

from zpipe.schemas.classes import ClassNames, match_classes
from zpipe.schemas.errors import ZpipeError
from zpipe.schemas.progress import Progress
from zpipe.schemas.relevance_maps import RelevanceMaps
from zpipe.schemas.shard_index import find_shards, has_index, read_index
from zpipe.schemas.storage import as_path
from zpipe.train.checkpoint import Preprocessing, load_run
from zpipe.train.data.labels import check_labels
from zpipe.train.data.loader import RelevanceLoader
from zpipe.train.device import autocast
from zpipe.train.evaluation.inference import OpenRun, choose_run_source, eval_loader, trained_with
from zpipe.train.evaluation.operating_points import one_point
from zpipe.train.models.operating_points import OperatingPoint, cost, setting_names
from zpipe.train.report.runs import RunRecord
from zpipe.train.scoring import zooms

THUMBNAIL = 224  # pixels a side at most
JPEG_QUALITY = 85
TOP = 5
MAX_SHARDS_READ = 16  # an ImageNet tar has 110 MB
# The description of the scores by source. With "own" and "none" a model gets no scores, so there is none to describe.
SCORE_CAPTIONS = {
    "zoomer": "The Zoomer's map, from the image alone.",
    "maps": "The teacher's maps as scores, {made_for}.",
    "attention": "The model's own class attention with nothing zoomed, from the image alone.",
    "entropy": "The entropy of the grey values, from the image alone.",
    "centre": "A Gaussian around the centre, the same for every image.",
    "random": "Random scores, which know nothing of the image.",
}


@dataclass(frozen=True, kw_only=True)
class GalleryConfig:
    """Settings of the gallery."""

    count: int
    """The number of samples."""
    seed: int
    """The seed of their choice."""
    batch_size: int
    """Images per batch."""
    device: str
    """`auto`, `cpu`, `cuda` or `cuda:N`."""
    precision: str = "float32"
    """The precision of both scores and models: float32, or bf16 or fp16 under autocast."""

    def __post_init__(self) -> None:
        autocast(self.precision, torch.device("cpu"))  # refuses an unknown precision


@dataclass
class _Shown:
    """A model in the gallery and its answers."""

    record: RunRecord
    opened: OpenRun
    point: OperatingPoint
    evaluated: bool
    """Whether the operating point is one of its evaluation."""
    view: int = 0
    """The number of the crop that it sees."""
    top: list[list[list[float]]] = field(default_factory=list)
    """The most probable classes of each sample, as [index, probability]."""
    truth: list[float] = field(default_factory=list)
    """The probability of the true class of each sample."""
    scores: list[np.ndarray] = field(default_factory=list)
    """The scores of each sample, float32 [s * s]."""

    @property
    def preprocessing(self) -> Preprocessing:
        return self.opened.run.preprocessing


@dataclass
class _View:
    """The samples in one crop."""

    crop_pct: float
    side: int = 0
    """Pixels per side of the image that the pictures were made from."""
    pictures: list[str] = field(default_factory=list)
    maps: list[str] = field(default_factory=list)
    grid: tuple[int, int] | None = None
    """The size of the maps."""
    boxes: list[list[float] | None] = field(default_factory=list)


@dataclass
class _Samples:
    """The samples in the gallery and where they come from."""

    shards: str
    total: int
    """The number of samples in the shards."""
    shards_read: int
    shard_count: int
    classes: tuple[str, ...] = ()
    keys: list[str] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)


def build_gallery(
    records: Sequence[RunRecord],
    shards: Path,
    maps: Path | None,
    config: GalleryConfig,
    progress: Progress,
) -> tuple[dict[str, Any] | None, list[str]]:
    """Run finished classifiers on samples of a data set.

    Every model runs at the middle operating point of its evaluation, or at a default one; "settings" says which.

    Args:
        records: vit runs.
        shards: the images.
        maps: their relevance store; None to show no maps.
        config: settings.
        progress: called once per batch.

    Returns:
        The gallery, or None if there is no model to show, and a line with the reason for each run that was left out.
        Runs with other classes than the shards are left out: their answers would get wrong names.

    Raises:
        UsageError: a setting does not suit a model.
        ZpipeError: shards or store are broken, or a label is outside the classes of a model.
    """
    store = None if maps is None else RelevanceMaps(maps, normalise="minmax")
    candidates, classes, notes = _of_these_classes(records, shards)
    shown, more_notes = _open(candidates, store, config)
    notes += more_notes
    views: list[_View] = []
    groups: dict[tuple[float, int], list[_Shown]] = {}
    for model in shown:
        crop = model.preprocessing.crop_pct
        groups.setdefault((crop, model.preprocessing.image_size), []).append(model)
        if all(view.crop_pct != crop for view in views):
            views.append(_View(crop_pct=crop))
        model.view = [view.crop_pct for view in views].index(crop)

    def report(group: int, done: int, total: int) -> None:
        progress("gallery", group * total + done, len(groups) * total)

    samples = None
    for group, models in enumerate(groups.values()):
        loader = eval_loader(
            models[0].preprocessing,
            shards,
            store,
            batch_size=config.batch_size,
            missing="error" if store is None else "skip",
        )
        samples = _run_group(models, views[models[0].view], loader, config, partial(report, group))
    if samples is None:
        return None, notes
    return _assemble(shown, views, replace(samples, classes=tuple(classes)), store, config), notes


def _run_group(
    models: Sequence[_Shown],
    view: _View,
    loader: RelevanceLoader,
    config: GalleryConfig,
    report: Callable[[int, int], None],
) -> _Samples:
    """Run models that see the same view on the samples; `report` takes the number of samples done and their total."""
    read = loader.draw(config.count, shards=MAX_SHARDS_READ, seed=config.seed)
    samples = _Samples(str(loader.path), loader.sample_count, read, len(loader.shards))
    side = models[0].preprocessing.image_size
    larger = side > view.side
    if larger:  # the pictures are made from the largest images that a model sees in this crop
        view.side, view.pictures, view.maps, view.boxes = side, [], [], []
    for batch in loader:
        samples.keys += batch["key"]
        samples.labels += batch["label"].tolist()
        if larger:
            _add_pictures(view, batch)
        for model in models:
            _run(model, batch)
        report(len(samples.keys), min(config.count, samples.total))
    return samples


def _of_these_classes(records: Sequence[RunRecord], shards: Path) -> tuple[list[RunRecord], Sequence[str], list[str]]:
    """The records that number their classes as the shards do, the names of the classes, and a line for each other one.

    If the shards name no classes, those of the first record that does are the ones to compare with.
    """
    folder, _ = find_shards(as_path(shards))
    # Tars without an index name no classes. Listing them takes long, and the loader does it later.
    names = read_index(folder).classes if has_index(folder) else ()
    known = ClassNames(names=names, where=str(shards))
    fitting, notes = [], []
    for record in records:
        own = ClassNames(names=record.settings.get("classes") or (), where=record.name)
        try:
            match_classes(known, own, remedy="their numbers mean other things")
        except ZpipeError as error:
            notes.append(
                f"{record.name}: not in the gallery, its {len(own.names)} classes are not the {len(known.names)} of "
                f"{known.where}; report it separately ({error})"
            )
            continue
        fitting.append(record)
        if len(own.names) > len(known.names):
            known = own if not known.names else replace(known, names=own.names)
    return fitting, known.names, notes


def _open(
    records: Sequence[RunRecord], store: RelevanceMaps | None, config: GalleryConfig
) -> tuple[list[_Shown], list[str]]:
    vits = [record for record in records if record.kind == "vit"]
    evaluated = [record for record in vits if record.evaluated]
    unevaluated = [record for record in vits if evaluated and not record.evaluated]
    notes = [f"{record.name}: not in the gallery, it has not been evaluated" for record in unevaluated]
    shown = []
    for record in evaluated or vits:
        if not record.finished:
            notes.append(f"{record.name}: not in the gallery, it is not finished")
            continue
        run = load_run(record.path)
        if trained_with(run) == "maps" and store is None:
            notes.append(f"{record.name}: not in the gallery, its scores are the teacher's maps; give --maps")
            continue
        source = choose_run_source(run, None, store)
        names = setting_names(run.model)
        points = [{name: value for name, value in point.items() if name in names} for point in record.points]
        points = [point for point in points if point]
        alike = [point for point in points if point.keys() == points[0].keys()]  # such as all thresholds
        middle = alike[len(alike) // 2] if alike else {}
        opened = OpenRun(run, source, device=config.device, precision=config.precision)
        shown.append(_Shown(record, opened, one_point(run.model, source, middle), evaluated=bool(middle)))
    return shown, notes


def _run(model: _Shown, batch: dict[str, Any]) -> None:
    """Run one model on one batch, and add its answers to those of earlier batches."""
    num_classes = model.opened.model.num_classes
    remedy = f"correct the label, or leave {model.record.name} out of this report"
    check_labels(batch["label"], batch["key"], num_classes, remedy)
    logits, scores, _ = model.opened.answer(batch, model.point)
    probabilities = logits.float().softmax(dim=1).cpu()
    best = probabilities.topk(min(TOP, probabilities.shape[1]), dim=1)
    for values, indices in zip(best.values.tolist(), best.indices.tolist(), strict=True):
        model.top.append([[index, round(value, 4)] for index, value in zip(indices, values, strict=True)])
    model.truth += probabilities.gather(1, batch["label"][:, None])[:, 0].tolist()
    if scores is not None:
        # In full precision: the page compares them with the threshold as the model does.
        model.scores += list(scores.float().cpu().numpy().astype("<f4"))


def _add_pictures(view: _View, batch: dict[str, Any]) -> None:
    view.pictures += [_jpeg(image) for image in batch["image"]]
    if "relevance" in batch:
        relevance = batch["relevance"]
        view.grid = (relevance.shape[1], relevance.shape[2])
        view.maps += [_base64((one * 255).round().to(torch.uint8).numpy().tobytes()) for one in relevance]
    boxes = batch.get("object_box")
    count = len(batch["key"])
    view.boxes += [None] * count if boxes is None else [[round(edge, 4) for edge in box] for box in boxes.tolist()]


def _jpeg(image: Tensor) -> str:
    """uint8 [3, S, S] -> base64 of a JPEG of at most THUMBNAIL pixels a side."""
    picture = Image.fromarray(np.ascontiguousarray(image.permute(1, 2, 0).numpy()))
    if picture.width > THUMBNAIL:
        picture = picture.resize((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    # In small images every pixel counts, and their files are small at any quality.
    small = picture.width < THUMBNAIL // 2
    picture.save(buffer, "JPEG", quality=95 if small else JPEG_QUALITY, subsampling=0 if small else 2)
    return _base64(buffer.getvalue())


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _assemble(
    shown: list[_Shown], views: list[_View], samples: _Samples, store: RelevanceMaps | None, config: GalleryConfig
) -> dict[str, Any]:
    sources, place = _distinct_scores(shown)
    difficulty, ease = _difficulty(shown, samples.keys, store)
    entries = []
    for i, key in enumerate(samples.keys):
        entry: dict[str, Any] = {
            "key": key,
            "label": samples.labels[i],
            "views": [
                {"jpeg": view.pictures[i], "map": view.maps[i] if view.maps else None, "box": view.boxes[i]}
                for view in views
            ],
            "scores": [_base64(model.scores[i].tobytes()) for model in sources],
            "top": [model.top[i] for model in shown],
            "ease": ease[i],
        }
        error_kinds = [(str(n), model.record.error_kinds.get(key)) for n, model in enumerate(shown)]
        if kinds := {n: kind for n, kind in error_kinds if kind is not None}:
            entry["kinds"] = kinds
        entries.append(entry)
    return {
        "shards": samples.shards,
        "total": samples.total,
        "shards_read": samples.shards_read,
        "shard_count": samples.shard_count,
        "seed": config.seed,
        "classes": list(samples.classes),
        "difficulty": difficulty,
        "settings": _settings(shown, config.precision),
        "map_caption": f"The teacher's map, {_made_for(store)}.",
        "map_grid": list(views[0].grid) if views[0].grid else None,
        "pixels": [view.side for view in views],
        "models": [_model(model, place[number], store) for number, model in enumerate(shown)],
        "entries": entries,
    }


def _made_for(store: RelevanceMaps | None) -> str:
    """What the maps of a store were made for, in words that follow "maps, "; empty without a store."""
    target = "" if store is None else store.manifest.provenance.target
    words = {
        "": "",
        "ground-truth": "made with knowledge of the true class",
        "predicted": "made for the class that the teacher predicts",
        "none": "made for no class in particular",
    }
    return words.get(target.partition(" ")[0], f"made for {target.replace(':', ' ')}")


def _model(model: _Shown, scores: int | None, store: RelevanceMaps | None) -> dict[str, Any]:
    net = model.opened.model
    described: dict[str, Any] = {
        "name": model.record.name,
        "model": model.record.model,
        "view": model.view,
        "pixels": model.preprocessing.image_size,
        "zoom": None,
    }
    source = model.opened.source
    if scores is None or source is None or not zooms(net):
        return described
    chosen = {name: model.point.arguments[name] for name in ("alpha", "budget") if name in model.point.arguments}
    described["zoom"] = {
        "scores": scores,
        "source": source.name,
        "scores_caption": SCORE_CAPTIONS[source.name].format(made_for=_made_for(store)),
        "factor": getattr(net, "zoom_factor", 2.0),
        "side": net.coarse_grid,
        "fixed_tokens": None if hasattr(net, "tokenise") else cost(net, model.point).tokens,
        "chosen": chosen,
        "evaluated": model.record.zooms,
    }
    return described


def _settings(shown: list[_Shown], precision: str) -> list[str]:
    """The settings at which the models answer, in words; models without settings, such as a plain ViT, are left out."""
    evaluated: list[str] = []
    fallback: list[str] = []
    usual: list[str] = []
    for model in shown:
        net, name = model.opened.model, model.record.name
        if model.point.settings:
            values = ", ".join(f"{setting} {value}" for setting, value in model.point.settings.items())
            (evaluated if model.evaluated else fallback).append(f"{name} ({values})")
        elif setting_names(net) and not zooms(net):
            usual.append(name)
    groups = (
        ("Shown at the middle setting of the evaluation", evaluated),
        ("Shown at a default zoom, as none was evaluated", fallback),
        ("Shown with the model's own settings, as none were evaluated", usual),
    )
    sentences = [f"{words}: {', '.join(names)}." for words, names in groups if names]
    return sentences if precision == "float32" else [*sentences, f"The models ran in {precision}."]


def _distinct_scores(shown: list[_Shown]) -> tuple[list[_Shown], list[int | None]]:
    """One model for each distinct set of scores, and the number of each model's set.

    Models with the same zoomer have the same scores, which the page holds once.
    """
    sources: list[_Shown] = []
    place: list[int | None] = []
    for model in shown:
        if not model.scores:
            place.append(None)
            continue
        same = (n for n, other in enumerate(sources) if np.array_equal(np.stack(other.scores), np.stack(model.scores)))
        number = next(same, len(sources))
        if number == len(sources):
            sources.append(model)
        place.append(number)
    return sources, place


def _difficulty(shown: list[_Shown], keys: list[str], store: RelevanceMaps | None) -> tuple[str, list[float | None]]:
    """What tells how easy a sample is, in words, and its value in [0, 1] for each sample."""
    if store is not None and store.manifest.provenance.target.startswith("ground-truth"):
        table = store.table(["key", "target_probability"])
        # A store may hold millions of rows; only the few that are shown become Python objects.
        table = table.filter(pc.is_in(table["key"], value_set=pa.array(keys, table["key"].type)))
        known = dict(zip(table["key"].to_pylist(), table["target_probability"].to_pylist(), strict=True))
        words = "the probability that the teacher of the maps gives to the true class"
        return words, [None if not np.isfinite(known[key]) else round(known[key], 4) for key in keys]
    judge = next((model for model in shown if model.opened.source is None), shown[0])
    words = f"the probability that {judge.record.name} gives to the true class"
    return words, [round(value, 4) for value in judge.truth]
