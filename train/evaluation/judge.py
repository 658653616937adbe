"""Are relevance maps faithful to a model? Deletion and insertion curves, and the pointing game if boxes are known."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from zpipe.schemas.atomic import write_json
from zpipe.schemas.errors import UsageError
from zpipe.schemas.progress import Progress, silent
from zpipe.train.checkpoint import load_run
from zpipe.train.data.join import Damaged
from zpipe.train.data.map_stores import Join
from zpipe.train.evaluation.answers import Answers, match_run
from zpipe.train.evaluation.inference import OpenRun, Tally, eval_loader
from zpipe.train.evaluation.metrics import pointing_game
from zpipe.train.evaluation.results import identity, judge_results, write_results
from zpipe.train.models.operating_points import OperatingPoint
from zpipe.train.models.scores import centre_prior
from zpipe.train.scoring import key_noise

Baseline = Literal["mean", "blur"]
UNZOOMED = OperatingPoint(name="plain")


@dataclass(frozen=True, kw_only=True)
class JudgeConfig:
    """Settings of a test of maps."""

    steps: int = 10
    """Points of a curve after the first."""
    baseline: Baseline = "blur"
    """What replaces a removed cell: the mean colour of the data set, or the image blurred until only colours remain."""
    limit: int = 5_000
    """The maximum number of images."""
    classes: str | None = None
    """How the labels of the shards become classes of the model, see `answers.match_run`; None if both are alike."""
    damaged: Damaged = "error"
    """How to handle damaged tars and samples: `error`, or `skip` to leave them out and count them."""
    join: Join = "tar"
    """How maps find their images: `tar` or `image`, see `RelevanceLoader`."""
    batch_size: int = 64
    """Images per batch."""
    data_workers: int = 0
    """Processes that load data; 0 to load in this one."""
    device: str = "auto"
    """`auto`, `cpu`, `cuda` or `cuda:N`."""

    def __post_init__(self) -> None:
        if self.steps < 1 or self.limit < 1:
            raise UsageError(f"--steps {self.steps}, --limit {self.limit}: give numbers >= 1")
        if self.damaged not in get_args(Damaged):
            raise UsageError(f"--damaged {self.damaged}: choose error or skip")
        if self.baseline not in ("mean", "blur"):
            raise UsageError(f"--baseline {self.baseline}: choose mean or blur")


def perturbation_curves(
    model: Callable[[Tensor], Tensor], images: Tensor, maps: Tensor, targets: Tensor, steps: int, empty: Tensor
) -> tuple[Tensor, Tensor]:
    """The target's probability while cells are removed or added, the most relevant first (Petsiuk et al. 2018).

    Args:
        model: normalised images -> logits.
        images: [B, 3, S, S].
        maps: [B, gh, gw]; only the order of the cells matters, and of equal cells the first in row-major order leads.
        targets: int64 [B].
        steps: points of a curve after the first; at point i, round(i / steps * cells) cells are removed or added.
        empty: what replaces removed cells, [B, 3, S, S].

    Returns:
        (deletion, insertion), each [B, steps + 1]. For a faithful map, deletion falls and insertion rises early.
    """
    batch, height, width = maps.shape
    cells = height * width
    order = maps.flatten(1).argsort(dim=1, descending=True, stable=True)
    rank = order.argsort(dim=1)  # [B, cells], 0 for the most relevant cell
    curves: tuple[list[Tensor], list[Tensor]] = ([], [])
    for step in range(steps + 1):
        taken = (rank < round(step / steps * cells)).view(batch, 1, height, width)
        mask = F.interpolate(taken.to(images.dtype), images.shape[-2:], mode="nearest-exact") > 0  # [B, 1, S, S]
        for curve, on, off in ((curves[0], images, empty), (curves[1], empty, images)):
            probabilities = model(torch.where(mask, off, on)).float().softmax(dim=1)
            curve.append(probabilities.gather(1, targets[:, None])[:, 0])
    return torch.stack(curves[0], dim=1), torch.stack(curves[1], dim=1)


def area(curves: Tensor) -> Tensor:
    """The area under curves [B, n] over [0, 1], by trapezoids. -> [B]."""
    return torch.trapezoid(curves, dx=1 / (curves.shape[1] - 1), dim=1)


def emptied(images: Tensor, baseline: Baseline) -> Tensor:
    """Normalised images without content: zero, which is the mean colour, or blurred over a quarter of the image."""
    if baseline == "mean":
        return torch.zeros_like(images)
    radius = max(images.shape[-1] // 8, 1)
    blurred = images
    for _ in range(3):  # three box blurs are close to a Gaussian
        padded = F.pad(blurred, (radius,) * 4, mode="replicate")
        blurred = F.avg_pool2d(padded, 2 * radius + 1, stride=1)
    return blurred


def judge_maps(
    run: Path,
    shards: Path,
    maps: Path,
    config: JudgeConfig,
    *,
    out: Path | None = None,
    progress: Progress = silent,
) -> list[dict[str, Any]]:
    """Test the maps of a store against a classifier, with a centre prior and random orders of the cells as controls.

    The target is the label of a sample. Samples without a map are left out. A model that zooms gets no scores.

    Args:
        run: the folder of a finished vit run.
        shards: the images.
        maps: their relevance store.
        config: settings.
        out: the JSON file to write; None to write none.
        progress: called once per batch.

    Returns:
        A row for the maps and for each control: setting, count, the mean areas `deletion` and `insertion` and, if the
        shards have boxes, `pointing_game`; each with the half width of its 95 % interval as `NAME_interval`.

    Raises:
        UsageError: the run is not a classifier, or the store has no map of these samples.
        ZpipeError: a file is broken, the classes of run and shards differ, or a label is outside the model's classes.
    """
    content = judge(run, shards, maps, config, progress=progress)
    if out is not None:
        write_json(out, content)
    return list(content["rows"])


def judge(run: Path, shards: Path, maps: Path, config: JudgeConfig, *, progress: Progress = silent) -> dict[str, Any]:
    """As `judge_maps`, but return the content of the results file, and write none."""
    run_opened = load_run(run)
    opened = OpenRun(run_opened, None, device=config.device)
    sizes = {"batch_size": config.batch_size, "data_workers": config.data_workers}
    loader = eval_loader(
        run_opened.preprocessing, shards, maps, **sizes, missing="skip", damaged=config.damaged, join=config.join
    )
    loader.report_coverage(progress)
    if not loader.sample_count:
        raise UsageError(f"{maps}: has no usable map of a sample in {shards}; give the shards that it was made from")
    answers = Answers(opened.model.num_classes, match_run(run_opened, loader.index, loader.path, config.classes))
    chunks: dict[tuple[str, str], list[Tensor]] = defaultdict(list)  # by order and metric
    batches = Tally(loader, config.limit)
    for batch in batches:
        for order, metric, values in _judge_batch(opened, batch, answers, config):
            chunks[order, metric].append(values.cpu())
        progress("judge", batches.taken, batches.most)
    rows: dict[str, dict[str, Any]] = {}
    for (order, metric), parts in chunks.items():
        values = torch.cat(parts).double()
        row = rows.setdefault(order, {"setting": order, "count": len(values)})
        row[metric] = float(values.mean())
        row[f"{metric}_interval"] = 1.96 * float(values.std(correction=0)) / len(values) ** 0.5
    about = identity(run_opened, "judge")
    stated = {"run": str(run), "model": about["model"], "seed": about["seed"]}
    stated |= {"shards": str(shards), "maps": str(maps)} | batches.stated()
    return write_results(None, "judge", stated, list(rows.values()), judge_results(rows.values(), about))


@torch.inference_mode()
def _judge_batch(
    opened: OpenRun, batch: dict[str, Any], answers: Answers, config: JudgeConfig
) -> Iterator[tuple[str, str, Tensor]]:
    """The order of the cells, the metric and its values [B], for each order and metric."""
    prepared = opened.prepare(batch)
    images, targets = prepared["image"], answers.labels(batch).to(opened.device)
    relevance = batch["relevance"].to(opened.device)  # [B, gh, gw]
    height, width = relevance.shape[1:]
    orders = {"maps": relevance}
    if height == width:
        orders["centre"] = centre_prior(height).to(opened.device).view(1, height, width).expand_as(relevance)
    orders["random"] = key_noise(height * width, batch["key"]).to(opened.device).view_as(relevance)

    def model(images: Tensor) -> Tensor:
        return opened.respond(prepared | {"image": images}, UNZOOMED).logits

    empty = emptied(images, config.baseline)
    for name, order in orders.items():
        deletion, insertion = perturbation_curves(model, images, order, targets, config.steps, empty)
        yield name, "deletion", area(deletion)
        yield name, "insertion", area(insertion)
        if "object_box" in batch:
            yield name, "pointing_game", pointing_game(order.cpu(), batch["object_box"]).float()
