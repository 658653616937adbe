"""How good are relevance maps? Faithfulness to a classifier, localisation of objects, stability; and two controls."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from zpipe.schemas.atomic import write_json
from zpipe.schemas.errors import UsageError
from zpipe.schemas.progress import Progress, silent
from zpipe.schemas.relevance_maps import RelevanceMaps
from zpipe.schemas.shard_index import ShardIndex
from zpipe.train.checkpoint import Preprocessing, load_run
from zpipe.train.data.join import Damaged
from zpipe.train.data.loader import RelevanceLoader
from zpipe.train.data.map_stores import Join
from zpipe.train.device import to_device
from zpipe.train.evaluation.answers import Answers, match_run
from zpipe.train.evaluation.bootstrap import RESAMPLES, ResampledSums, estimate, ratio
from zpipe.train.evaluation.faithfulness import Baseline, Probe, area, emptied, perturbation_curves, saco
from zpipe.train.evaluation.inference import OpenRun, Tally, eval_loader
from zpipe.train.evaluation.localisation import (
    IOU_LEVELS,
    THRESHOLDS,
    box_overlaps,
    has_area,
    hits,
    pointing_game,
    segment,
)
from zpipe.train.evaluation.masks import MaskFolder
from zpipe.train.evaluation.results import identity, judge_results, write_results
from zpipe.train.models.operating_points import OperatingPoint
from zpipe.train.models.scores import centre_prior
from zpipe.train.scoring import key_noise

UNZOOMED = OperatingPoint(name="plain")
CONTROLS = ("centre", "random")
Maps = str | Path | RelevanceMaps
Stability = Mapping[str, Mapping[str, float]]


@dataclass(frozen=True, kw_only=True)
class JudgeConfig:
    """Settings of a test of maps."""

    steps: int = 10
    """Points of a curve after the first."""
    groups: int = 10
    """Groups of cells in SaCo."""
    baseline: Baseline = "blur"
    """What replaces a removed cell: the mean colour of the data set, or the image blurred until only colours remain."""
    limit: int = 5_000
    """The maximum number of images."""
    masks: Path | None = None
    """A folder of masks, see `MaskFolder`; None to leave out segmentation."""
    seed: int = 0
    """The seed of the intervals' resamples."""
    classes: str | None = None
    """How the labels of the shards become classes of the model, see `answers.match_run`; None if both are alike."""
    damaged: Damaged = "error"
    """How to handle damaged tars and samples: `error`, or `skip` to leave them out and count them."""
    join: Join = "tar"
    """How maps find their images: `tar` or `image`, see `RelevanceLoader`."""
    batch_size: int = 64
    """Images per batch."""
    data_workers: int | None = None
    """Processes that load data, see `eval_loader`."""
    device: str = "auto"
    """`auto`, `cpu`, `cuda` or `cuda:N`."""

    def __post_init__(self) -> None:
        if self.steps < 1 or self.limit < 1:
            raise UsageError(f"--steps {self.steps}, --limit {self.limit}: give numbers >= 1")
        if self.groups < 2 or self.seed < 0:
            raise UsageError(f"groups {self.groups}, seed {self.seed}: give numbers of at least 2 and 0")
        if self.damaged not in get_args(Damaged):
            raise UsageError(f"--damaged {self.damaged}: choose error or skip")
        if self.baseline not in get_args(Baseline):
            raise UsageError(f"--baseline {self.baseline}: choose mean or blur")


@dataclass(frozen=True, kw_only=True)
class Classifier:
    """The classifier that maps are judged on."""

    preprocessing: Preprocessing
    """How its images are cropped, resized and normalised."""
    num_classes: int
    """The number of its classes."""
    device: torch.device
    """Where it runs."""
    logits: Callable[[Tensor, Sequence[str]], Tensor]
    """Normalised images [B, 3, S, S] on its device, and their keys for messages -> logits [B, classes]."""
    match: Callable[[ShardIndex, Path, str | None], list[int] | None]
    """Its class for each label of shards, from their index, their path and `JudgeConfig.classes`; see `match_run`."""
    about: Mapping[str, Any]
    """The fields of a `Result` that identify it: run, model and seed."""
    path: str
    """Where it was read from."""


def open_classifier(run: Path, device: str = "auto") -> Classifier:
    """Open a finished vit run as a classifier. A model that zooms gets no scores.

    Raises:
        UsageError: the run is not a classifier.
        ZpipeError: the run can't be read.
    """
    loaded = load_run(run)
    opened = OpenRun(loaded, None, device=device)
    return Classifier(
        preprocessing=loaded.preprocessing,
        num_classes=opened.model.num_classes,
        device=opened.device,
        logits=lambda images, keys: opened.respond({"image": images, "key": keys}, UNZOOMED).logits,
        match=lambda index, shards, how: match_run(loaded, index, shards, how),
        about=identity(loaded, "judge"),
        path=str(run),
    )


def judge_maps(
    run: Path,
    shards: Path,
    maps: Maps | Sequence[Maps],
    config: JudgeConfig,
    *,
    out: Path | None = None,
    progress: Progress = silent,
) -> list[dict[str, Any]]:
    """Test the maps of stores against a finished run, see `judge`.

    Args:
        run: the folder of a finished vit run.
        shards: the images.
        maps: a relevance store of them, or several.
        config: settings.
        out: the JSON file to write; None to write none.
        progress: called once per batch.

    Returns:
        The rows of `judge`.

    Raises:
        UsageError: see `judge`, and `open_classifier`.
        ZpipeError: see `judge`.
    """
    content = judge(open_classifier(run, config.device), shards, maps, config, progress=progress)
    if out is not None:
        write_json(out, content)
    return list(content["rows"])


def judge(
    classifier: Classifier,
    shards: Path,
    maps: Maps | Sequence[Maps],
    config: JudgeConfig,
    *,
    stability: Stability | None = None,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Test the maps of stores against a classifier, beside a centre prior and random orders of the cells.

    The target is the label of a sample. All stores are judged on the images of which each has a usable map. Intervals
    are 95 % percentile intervals of a bootstrap over images; all rows have the same resamples, and the best threshold
    of a MaxBoxAcc is chosen anew in each.

    Args:
        classifier: the classifier.
        shards: the images.
        maps: a relevance store of them, or several.
        config: settings.
        stability: the stability of each image's map, by the name of the row (`row_names`) and by key; None for none.
        progress: called once per batch.

    Returns:
        The content of the results file. It has a row for each store and for each control, with `setting` (its name),
        `count` (images), and for each metric its value, `NAME_low` and `NAME_high`: `deletion`, `insertion`, `abpc`
        (their difference) and `saco`; if the shards have boxes, `pointing_game`, `max_box_acc_30`, `_50` and `_70`, and
        `max_box_acc_v2`; with masks, `pixel_accuracy`, `miou` and `average_precision`; and `stability`. `counts` has
        the number of images of the metrics that lack some; `curves` the mean curves; `difference` the difference to
        the first row as [value, low, high], of the metrics that both rows have of the same images. A metric that is not
        finite for the whole data set, such as the mIoU of masks without background, is left out.

    Raises:
        UsageError: a store has no maps, or they have no image in common; no image has a usable mask; or `stability` has
            other rows.
        ZpipeError: a file is broken, the classes of model and shards differ, or a label is outside the model's classes.
    """
    stores = _open(maps)
    names = row_names(stores)
    if unknown := next((name for name in stability or {} if name not in names), None):
        raise UsageError(f"stability of {unknown}: no such row; give those of {', '.join(names)}")
    batches = Tally(_load(classifier, shards, stores, config), config.limit)
    batches.loader.report_coverage(progress)
    matched = classifier.match(batches.loader.index, batches.loader.path, config.classes)
    answers = Answers(classifier.num_classes, matched)
    masks = None if config.masks is None else MaskFolder(config.masks)
    sums = ResampledSums(config.seed)
    for batch in batches:
        sums.begin(batch["key"])
        for row, metric, values in _judge_batch(classifier, batch, answers.labels(batch), names, config, masks):
            sums.add(row, metric, values)
        for row, by_key in (stability or {}).items():
            known = torch.tensor([by_key.get(key, torch.nan) for key in batch["key"]], dtype=torch.float64)
            sums.add(row, "stability", _counted(known))
        progress("judge", batches.taken, batches.most)
    if masks is not None:
        masks.check_used()
    rows = _rows(sums, [*names, *CONTROLS], batches.taken)
    about = _about(classifier, config, stores, names) | {"shards": str(shards)} | batches.stated()
    about["masks_left_out"] = masks and masks.summary()
    return write_results(None, "judge", about, rows, judge_results(rows, classifier.about))


def _load(
    classifier: Classifier, shards: Path, stores: Sequence[RelevanceMaps], config: JudgeConfig
) -> RelevanceLoader:
    loader = eval_loader(
        classifier.preprocessing,
        shards,
        {f"map_{number}": store for number, store in enumerate(stores)},
        batch_size=config.batch_size,
        data_workers=config.data_workers,
        limit=config.limit,
        missing="skip",
        damaged=config.damaged,
        join=config.join,
        device=str(classifier.device),
    )
    if not loader.sample_count:
        where, remedy = str(stores[0].path), "give the shards that it was made from"
        if len(stores) > 1:
            where, remedy = f"{where} and {len(stores) - 1} more", "judge stores of the same images"
        raise UsageError(f"{where}: has no usable map of a sample in {shards}; {remedy}")
    return loader


def _open(maps: Maps | Sequence[Maps]) -> list[RelevanceMaps]:
    listed = [maps] if isinstance(maps, str | Path | RelevanceMaps) else list(maps)
    stores = [store if isinstance(store, RelevanceMaps) else RelevanceMaps(store) for store in listed]
    for store in stores:
        if store.manifest.provenance.kind != "map":
            kind = store.manifest.provenance.kind
            raise UsageError(f"{store.path}: holds {kind}, not one map for each image; give a store of maps")
    if not stores:
        raise UsageError("no store to judge; give one or several")
    return stores


def row_names(stores: Sequence[RelevanceMaps]) -> list[str]:
    """The names of the stores' rows: their methods, with the paths where a method repeats.

    Raises:
        UsageError: a store is given twice.
    """
    origins = [store.manifest.provenance for store in stores]
    methods = [f"{origin.method}{' symmetrised' if origin.symmetrised else ''}" for origin in origins]
    names = [
        f"{method} ({store.path})" if methods.count(method) > 1 else method
        for method, store in zip(methods, stores, strict=True)
    ]
    if twice := next((store for name, store in zip(names, stores, strict=True) if names.count(name) > 1), None):
        raise UsageError(f"{twice.path}: is given twice; give each store once")
    return names


def _about(
    classifier: Classifier, config: JudgeConfig, stores: Sequence[RelevanceMaps], names: Sequence[str]
) -> dict[str, Any]:
    """What was judged, and what the values depend on."""
    paths = [str(store.path) for store in stores]
    fields = ("method", "symmetrised", "target", "teacher", "teacher_digest", "frame", "grid", "precision")
    described = [
        {"setting": name, "path": path} | {field: getattr(store.manifest.provenance, field) for field in fields}
        for name, path, store in zip(names, paths, stores, strict=True)
    ]
    settings = {
        "baseline": config.baseline,
        "steps": config.steps,
        "groups": config.groups,
        "target": "label",
        "image_size": classifier.preprocessing.image_size,
        "crop_pct": classifier.preprocessing.crop_pct,
        "interpolation": "bicubic",  # the loader knows no other
        "masks": None if config.masks is None else str(config.masks),
        "resamples": RESAMPLES,
        "resamples_seed": config.seed,
    }
    return {
        "run": classifier.path,
        "model": classifier.about["model"],
        "seed": classifier.about["seed"],
        "maps": paths[0] if len(paths) == 1 else paths,
        "settings": settings,
        "stores": described,
    }


@torch.inference_mode()
def _judge_batch(
    classifier: Classifier,
    batch: dict[str, Any],
    labels: Tensor,
    names: Sequence[str],
    config: JudgeConfig,
    masks: MaskFolder | None,
) -> Iterator[tuple[str, str, Tensor]]:
    """For each row of a batch, the names of sums and what its images add to them, [B, m]."""
    keys, side = batch["key"], classifier.preprocessing.image_size
    images = classifier.preprocessing.normalise(to_device(batch["image"], classifier.device))
    probe = Probe(
        model=lambda shown: classifier.logits(shown, keys),
        images=images,
        empty=emptied(images, config.baseline),
        targets=to_device(labels, classifier.device),
    )
    seen = None if masks is None else masks.view(keys, batch["box"], side)
    # [B, n, 4], NaN after the last box of an image; n is 0 if no image of the batch has any.
    boxes = pad_sequence(batch["object_boxes"], batch_first=True, padding_value=torch.nan)
    maps = {name: to_device(batch[f"map_{number}"], classifier.device) for number, name in enumerate(names)}
    for row, relevance in (maps | _controls(maps[names[0]], keys)).items():
        curves = torch.cat(perturbation_curves(probe, relevance, config.steps), dim=1)  # [B, 2 * (steps + 1)]
        yield row, "curves", torch.cat([torch.ones_like(curves[:, :1]), curves], dim=1)
        yield row, "saco", _counted(saco(probe, relevance, config.groups))
        if boxes.shape[1]:
            yield from ((row, metric, values) for metric, values in _judge_boxes(relevance, boxes, side))
        if seen is not None:
            yield from ((row, metric, values) for metric, values in _judge_masks(relevance, *seen))


def _controls(like: Tensor, keys: Sequence[str]) -> dict[str, Tensor]:
    """The maps of the controls, on the grid of the maps [B, gh, gw] of the first store."""
    _, height, width = like.shape
    # A wide grid has wide cells: the prior spans the image, whatever the grid.
    prior = centre_prior(height, width).to(like.device).view(1, height, width)
    return {
        "centre": prior.expand_as(like),
        "random": key_noise(height * width, keys).to(like.device).view_as(like),
    }


def _counted(values: Tensor) -> Tensor:
    """Values [B], NaN for images without one -> [B, 2], the value or 0, and the number of values."""
    known = ~values.isnan()
    return torch.stack([values.nan_to_num(0.0).double(), known.double()], dim=1)


def _judge_boxes(relevance: Tensor, boxes: Tensor, side: int) -> Iterator[tuple[str, Tensor]]:
    """What agreement with boxes, [B, n, 4], adds to sums. Objects outside of the view do not count."""
    boxes = boxes.where(has_area(boxes)[..., None], torch.nan)
    known = has_area(boxes).any(dim=1)  # [B]
    pointed = pointing_game(relevance.cpu(), boxes).double()
    yield "pointing_game", _counted(pointed.where(known, torch.nan))
    overlaps = box_overlaps(relevance, boxes, side)
    reached = torch.cat([hits(overlaps.largest), hits(overlaps.best)], dim=1).flatten(1)  # [B, 2 * levels * T]
    yield "boxes", torch.cat([known[:, None], reached], dim=1).double()


def _judge_masks(relevance: Tensor, masks: Tensor, known: Tensor) -> Iterator[tuple[str, Tensor]]:
    """What agreement with masks, [B, S, S], adds to sums."""
    found = segment(relevance, masks.to(relevance.device))
    known = known.to(relevance.device)
    yield "pixel_accuracy", _counted(found.accuracy.where(known, torch.nan))
    yield "average_precision", _counted(found.average_precision.where(known, torch.nan))
    pixels = torch.stack([found.intersection, found.union], dim=1).flatten(1)  # [B, 4]
    yield "miou", torch.cat([known[:, None].double(), pixels.where(known[:, None], 0.0)], dim=1)


# -- sums to rows ------------------------------------------------------------------------------------------------------


def _rows(sums: ResampledSums, names: Sequence[str], count: int) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    first: dict[str, np.ndarray] = {}
    first_counts: dict[str, np.ndarray] = {}
    for name in names:
        statistics, counts = _statistics(sums, name)
        if not rows:
            first, first_counts = statistics, counts
        row: dict[str, Any] = {"setting": name, "count": count}
        for metric, replicates in statistics.items():
            value, low, high = estimate(replicates)
            row |= {metric: value, f"{metric}_low": low, f"{metric}_high": high}
        row["counts"] = {metric: int(images[0]) for metric, images in counts.items() if images[0] < count}
        curves = sums.of(name, "curves")[0]
        deletion, insertion = np.split(curves[1:] / curves[0], 2)
        row["curves"] = {"deletion": deletion.tolist(), "insertion": insertion.tolist()}
        if rows:
            row["difference"] = {
                metric: list(estimate(replicates - first[metric]))
                for metric, replicates in statistics.items()
                # Other images would have other counts in some of the resamples.
                if metric in first and np.array_equal(counts[metric], first_counts[metric])
            }
        rows.append(row)
    return rows


def _statistics(sums: ResampledSums, row: str) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """The metrics of a row and their numbers of images, both of the data set and of each resample [1 + RESAMPLES]."""
    metrics: dict[str, np.ndarray] = {}
    counts: dict[str, np.ndarray] = {}
    for name in sums.names(row):
        total = sums.of(row, name)  # [1 + RESAMPLES, m]
        if name == "curves":
            found, images = _of_curves(total), total[:, 0]
        elif name == "boxes":
            found, images = _of_boxes(total), total[:, 0]
        elif name == "miou":
            found, images = {name: ratio(total[:, 1:3], total[:, 3:5]).mean(axis=1)}, total[:, 0]
        else:
            found, images = {name: ratio(total[:, 0], total[:, 1])}, total[:, 1]
        found = {metric: values for metric, values in found.items() if np.isfinite(values[0])}
        metrics |= found
        counts |= dict.fromkeys(found, images)
    return metrics, counts


def _of_curves(total: np.ndarray) -> dict[str, np.ndarray]:
    """The areas under the mean curves, which are the means of the areas."""
    mean = torch.from_numpy(ratio(total[:, 1:], total[:, :1]))
    deletion, insertion = (area(curves).numpy() for curves in mean.chunk(2, dim=1))
    return {"deletion": deletion, "insertion": insertion, "abpc": insertion - deletion}


def _of_boxes(total: np.ndarray) -> dict[str, np.ndarray]:
    """The accuracies at the best threshold of the data set or resample."""
    rates = ratio(total[:, 1:], total[:, :1]).reshape(len(total), 2, len(IOU_LEVELS), len(THRESHOLDS))
    best = rates.max(axis=3)  # [1 + RESAMPLES, 2, levels]
    largest = {f"max_box_acc_{round(100 * level)}": best[:, 0, place] for place, level in enumerate(IOU_LEVELS)}
    return largest | {"max_box_acc_v2": best[:, 1].mean(axis=1)}
