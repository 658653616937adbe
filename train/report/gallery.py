"""The models on a few samples: what the page's gallery shows, as JSON.

Measured, an entry takes 3.5 KB of the page for scenes of 48 pixels and some 20 KB for photos of 224, of which the JPEG is 18
and the scores, in full, 1. Two thousand photos make a page of 45 MB; while it is made they are held in memory.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from PIL import Image
from torch import Tensor

from zpipe.schemas.progress import Progress
from zpipe.schemas.relevance_maps import RelevanceMaps
from zpipe.schemas.shard_index import INDEX_NAME, find_shards, read_index
from zpipe.schemas.storage import as_path
from zpipe.train.checkpoint import Preprocessing, load_run
from zpipe.train.data.labels import check_labels
from zpipe.train.evaluation.inference import OpenRun, choose_run_source, eval_loader, trained_with
from zpipe.train.evaluation.operating_points import one_point
from zpipe.train.models.operating_points import OperatingPoint, cost, setting_names
from zpipe.train.report.runs import RunRecord
from zpipe.train.scoring import zooms

THUMBNAIL = 224  # pixels a side at most
JPEG_QUALITY = 85
TOP = 5
SHARDS_READ = 16  # of a large data set; an ImageNet tar is 110 MB
# What the panel of the scores shows, by source. "own" and "none" give a model no scores, so no panel.
SCORES_SAID = {
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
    """Samples that are shown."""
    seed: int
    """The seed that they are drawn by."""
    batch_size: int
    """Images a batch."""
    device: str
    """`auto`, `cpu`, `cuda` or `cuda:N`."""
    precision: str = "float32"
    """The precision of scores and models, see `EvalConfig`."""


@dataclass
class _Shown:
    """A model in the gallery. view: its place among the crops; source: the place of its scores in an entry."""

    record: RunRecord
    opened: OpenRun
    point: OperatingPoint
    view: int = 0
    top: list[list[list[float]]] = field(default_factory=list)  # an entry, a class: [index, probability]
    truth: list[float] = field(default_factory=list)  # probability of the true class
    scores: list[np.ndarray] = field(default_factory=list)  # float32 [s * s] an entry

    @property
    def preprocessing(self) -> Preprocessing:
        return self.opened.run.preprocessing


@dataclass
class _View:
    """One crop of the data set. side: pixels of the pictures made of it so far."""

    crop_pct: float
    side: int = 0
    pictures: list[str] = field(default_factory=list)
    maps: list[str] = field(default_factory=list)
    grid: tuple[int, int] | None = None
    boxes: list[list[float] | None] = field(default_factory=list)


@torch.inference_mode()
def build_gallery(
    records: Sequence[RunRecord],
    shards: Path,
    maps: Path | None,
    config: GalleryConfig,
    progress: Progress,
) -> tuple[dict[str, Any] | None, list[str]]:
    """Run the finished classifiers among `records` on samples of `shards`.

    Every model runs at the middle operating point of its evaluation, or at a default one; "settings" says which.

    Returns:
        The gallery, None when no model can be shown, and a line for every run that was left out, with the reason: a run
        of other classes than the shards' would answer with names that aren't its own.

    Raises:
        UsageError, ZpipeError: naming shards, store or key.
    """
    store = None if maps is None else RelevanceMaps(maps, normalise="minmax")
    fitting, notes = _of_these_classes(records, shards)
    shown, more = _open(fitting, store, config)
    notes += more
    if not shown:
        return None, notes
    views: list[_View] = []
    groups: dict[tuple[float, int], list[_Shown]] = {}
    for model in shown:
        crop = model.preprocessing.crop_pct
        groups.setdefault((crop, model.preprocessing.image_size), []).append(model)
        if all(view.crop_pct != crop for view in views):
            views.append(_View(crop_pct=crop))
        model.view = [view.crop_pct for view in views].index(crop)
    keys: list[str] = []
    labels: list[int] = []
    drawn_from = (0, 0)
    classes: tuple[str, ...] = ()
    total = 0
    done = 0
    for (_, side), models in groups.items():
        loader = eval_loader(
            models[0].preprocessing,
            shards,
            store,
            batch_size=config.batch_size,
            missing="error" if store is None else "skip",
        )
        total, classes = loader.sample_count, loader.index.classes
        drawn_from = (loader.draw(config.count, shards=SHARDS_READ, seed=config.seed), len(loader.shards))
        view = views[models[0].view]
        larger = side > view.side
        if larger:  # of two models with one crop, the one that sees more pixels gives the pictures
            view.side, view.pictures, view.maps, view.boxes = side, [], [], []
        keys, labels = [], []
        for batch in loader:
            keys += batch["key"]
            labels += batch["label"].tolist()
            if larger:
                _look(view, batch)
            for model in models:
                _run(model, batch)
            done += len(batch["key"])
            progress("gallery", done, len(groups) * min(config.count, total))
    return _assemble(shown, views, keys, labels, classes, store, total, drawn_from, shards, config.seed), notes


def _of_these_classes(records: Sequence[RunRecord], shards: Path) -> tuple[list[RunRecord], list[str]]:
    """The records whose classes are those of the shards, or of which one side names none; a line for every other."""
    folder, _ = find_shards(as_path(shards))
    # Tars without an index name no classes; to list them takes long, and the loader does it anyway.
    classes = read_index(folder).classes if (folder / INDEX_NAME).is_file() else ()
    fitting, notes = [], []
    for record in records:
        own = tuple(record.settings.get("classes") or ())
        if own and classes and own != classes:
            notes.append(
                f"{record.name}: not in the gallery, its {len(own)} classes are not the {len(classes)} of {shards}; "
                "report it separately"
            )
        else:
            fitting.append(record)
    return fitting, notes


def _open(
    records: Sequence[RunRecord], store: RelevanceMaps | None, config: GalleryConfig
) -> tuple[list[_Shown], list[str]]:
    vits = [record for record in records if record.kind == "vit"]
    evaluated = [record for record in vits if record.evaluated]
    notes = [f"{record.name}: not in the gallery, it has not been evaluated" for record in vits if evaluated and not record.evaluated]  # fmt: skip
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
        shown.append(_Shown(record, opened, one_point(run.model, source, middle)))
    return shown, notes


def _run(model: _Shown, batch: dict[str, Any]) -> None:
    """Run one batch through one model; its answers are added to those before."""
    check_labels(batch["label"], batch["key"], model.opened.model.num_classes)
    logits, scores, _ = model.opened.answer(batch, model.point)
    probabilities = logits.float().softmax(dim=1).cpu()
    best = probabilities.topk(min(TOP, probabilities.shape[1]), dim=1)
    for values, indices in zip(best.values.tolist(), best.indices.tolist(), strict=True):
        model.top.append([[index, round(value, 4)] for index, value in zip(indices, values, strict=True)])
    model.truth += probabilities.gather(1, batch["label"][:, None])[:, 0].tolist()
    if scores is not None:
        # What is compared with the threshold here must be what was compared there, to the last bit.
        model.scores += list(scores.float().cpu().numpy().astype("<f4"))


def _look(view: _View, batch: dict[str, Any]) -> None:
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
    # Of small images every pixel counts, and they are small anyway.
    small = picture.width < THUMBNAIL // 2
    picture.save(buffer, "JPEG", quality=95 if small else JPEG_QUALITY, subsampling=0 if small else 2)
    return _base64(buffer.getvalue())


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _assemble(
    shown: list[_Shown],
    views: list[_View],
    keys: list[str],
    labels: list[int],
    classes: tuple[str, ...],
    store: RelevanceMaps | None,
    total: int,
    drawn_from: tuple[int, int],
    shards: Path,
    seed: int,
) -> dict[str, Any]:
    sources, place = _distinct_scores(shown)
    said, difficulty = _difficulty(shown, keys, store)
    entries = []
    for i, key in enumerate(keys):
        entry: dict[str, Any] = {
            "key": key,
            "label": labels[i],
            "views": [
                {"jpeg": view.pictures[i], "map": view.maps[i] if view.maps else None, "box": view.boxes[i]}
                for view in views
            ],
            "scores": [_base64(model.scores[i].tobytes()) for model in sources],
            "top": [model.top[i] for model in shown],
            "ease": difficulty[i],
        }
        kinds = {str(n): model.record.error_kinds[key] for n, model in enumerate(shown) if key in model.record.error_kinds}  # fmt: skip
        entries.append(entry | ({"kinds": kinds} if kinds else {}))
    read, shard_count = drawn_from
    return {
        "shards": str(shards),
        "total": total,
        "shards_read": read,
        "shard_count": shard_count,
        "seed": seed,
        "classes": list(classes),
        "difficulty": said,
        "settings": _settings(shown),
        "map_said": f"The teacher's map, {_made_for(store)}.",
        "map_grid": list(views[0].grid) if views[0].grid else None,
        "pixels": [view.side for view in views],
        "models": [_model(model, place[number], store) for number, model in enumerate(shown)],
        "entries": entries,
    }


def _made_for(store: RelevanceMaps | None) -> str:
    """What the maps of a store were made for, as words behind "maps, ..."; of no store, nothing."""
    target = "" if store is None else store.manifest.provenance.target
    known = {
        "": "",
        "ground-truth": "made with knowledge of the true class",
        "predicted": "made for the class that the teacher predicts",
        "none": "made for no class in particular",
    }
    return known.get(target, f"made for {target.replace(':', ' ')}")


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
        "scores_said": SCORES_SAID[source.name].format(made_for=_made_for(store)),
        "factor": getattr(net, "zoom_factor", 2.0),
        "side": net.coarse_grid,
        "fixed_tokens": None if hasattr(net, "cost_kinds") else cost(net, model.point).tokens,
        "chosen": chosen,
        "evaluated": model.record.zooms,
    }
    return described


def _settings(shown: list[_Shown]) -> list[str]:
    """In words, at which settings the models answer. Of those that have none, such as a plain ViT, nothing is said."""
    evaluated, fallback, usual = [], [], []
    for model in shown:
        net, name = model.opened.model, model.record.name
        if model.point.settings:
            values = ", ".join(f"{setting} {value}" for setting, value in model.point.settings.items())
            (evaluated if model.record.points else fallback).append(f"{name} ({values})")
        elif setting_names(net) and not zooms(net):
            usual.append(name)
    groups = (
        ("Shown at the middle setting of the evaluation", evaluated),
        ("Shown at a default zoom, as none was evaluated", fallback),
        ("Shown with the model's own settings, as none were evaluated", usual),
    )
    return [f"{said}: {', '.join(names)}." for said, names in groups if names]


def _distinct_scores(shown: list[_Shown]) -> tuple[list[_Shown], list[int | None]]:
    """One model for each source of scores, and of every model the place of its scores among them: students of one zoomer
    share it, and the page should hold its scores once."""
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
    """How easy each sample is, in [0, 1], and the words for it."""
    if store is not None and store.manifest.provenance.target == "ground-truth":
        table = store.table(["key", "target_probability"])
        # Rows of Python objects are made of the few that are shown: a store may hold millions.
        table = table.filter(pc.is_in(table["key"], value_set=pa.array(keys, table["key"].type)))
        known = dict(zip(table["key"].to_pylist(), table["target_probability"].to_pylist(), strict=True))
        said = "the probability that the teacher of the maps gives to the true class"
        return said, [None if not np.isfinite(known[key]) else round(known[key], 4) for key in keys]
    judge = next((model for model in shown if model.opened.source is None), shown[0])
    said = f"the probability that {judge.record.name} gives to the true class"
    return said, [round(value, 4) for value in judge.truth]
