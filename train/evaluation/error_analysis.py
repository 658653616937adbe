"""Error analysis as in ZoomViT's section I: is a wrong answer the zoomer's doing, or the backbone's?

An error is the zoomer's when the zoomed cells leave out the object: less than half of its box lies in them, or, where samples
have no boxes, less than half of the teacher's relevance that as many cells could hold at most. All others are the backbone's.
How often the object is left out when the answer is right stands beside it: without it the shares say nothing about causes.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import torch
from torch import Tensor

from zpipe.schemas.atomic import commit
from zpipe.schemas.errors import UsageError
from zpipe.schemas.geometry import Box, covered_share
from zpipe.schemas.progress import Progress, silent
from zpipe.train.data.loader import RelevanceLoader
from zpipe.train.evaluation.answers import Answers
from zpipe.train.evaluation.inference import OpenRun
from zpipe.train.evaluation.pictures import patches
from zpipe.train.evaluation.results import Result, share, write_verdicts
from zpipe.train.models.operating_points import OperatingPoint
from zpipe.train.models.zoom_tokens import choose_cells, token_boxes

LEAST_SEEN = 0.5
PICTURED = 8  # errors of each kind in the picture


class Verdict(NamedTuple):
    key: str
    label: int
    predicted: int
    kind: str  # right, zoomer or backbone
    seen: float  # share of the object that lies in zoomed cells


@dataclass(frozen=True)
class _Pictured:
    verdict: Verdict
    image: np.ndarray  # uint8 [S, S, 3]
    boxes: Tensor  # int64 [n, 4]
    cell: int  # pixels a side of a cell
    target: np.ndarray | None  # the object's box in pixels


@torch.inference_mode()
def analyse_errors(
    opened: OpenRun,
    loader: RelevanceLoader,
    zoom: OperatingPoint,
    answers: Answers,
    progress: Progress = silent,
) -> tuple[list[Verdict], list[_Pictured]]:
    """What became of every sample, and the first errors of each kind to be shown.

    Errors: :class:`UsageError` for a model that doesn't zoom, an unknown precision, and for samples with neither boxes nor maps.
    """
    model = opened.model
    if not hasattr(model, "tokenise"):
        raise UsageError(f"{opened.run.path}: only errors of zoomvit_* models can be told apart by their zoom")
    verdicts: list[Verdict] = []
    pictured: list[_Pictured] = []
    shown: Counter[str] = Counter()
    side, batches = model.coarse_grid, len(loader)
    for number, batch in enumerate(loader):
        if "object_box" not in batch and "relevance" not in batch:
            raise UsageError(f"{loader.path}: samples have no box, so errors need the teacher's maps; give --maps")
        prepared = opened.prepare(batch)
        images = prepared["image"]
        logits, scores, _ = opened.respond(prepared, zoom)
        ranks, predicted = answers.ranks(logits, batch), logits.argmax(1).tolist()
        count, alpha = zoom.arguments.get("budget"), zoom.arguments.get("alpha")
        zoomed = choose_cells(scores, len(images), model.score_grid, alpha, count, model.zoom_factor).cpu().numpy()
        cells: list[Tensor] = []
        for row, rank in enumerate(ranks.tolist()):
            if rank < 0:
                continue
            seen = _seen(batch, row, zoomed[row].reshape(side, side))
            kind = "right" if rank == 0 else "backbone" if seen >= LEAST_SEEN else "zoomer"
            verdict = Verdict(batch["key"][row], int(batch["label"][row]), predicted[row], kind, seen)
            verdicts.append(verdict)
            if kind != "right" and shown[kind] < PICTURED:
                shown[kind] += 1
                cells = cells or model.tokenise(images, scores, **zoom.arguments).by_image()
                boxes = token_boxes(cells[row].cpu(), side, opened.run.preprocessing.image_size)
                target = batch["object_box"][row].numpy() * images.shape[-1] if "object_box" in batch else None
                pixels = batch["image"][row].permute(1, 2, 0).numpy()
                pictured.append(_Pictured(verdict, pixels, boxes, images.shape[-1] // side, target))
        progress("errors", number + 1, batches, wrong=sum(verdict.kind != "right" for verdict in verdicts))
    return verdicts, pictured


def _seen(batch: dict[str, Any], row: int, zoomed: np.ndarray) -> float:
    """The share of the object in zoomed cells. zoomed: bool [c, c]."""
    if "object_box" in batch:
        under = covered_share(zoomed.shape, Box(*batch["object_box"][row].tolist()), (1, 1))  # [c, c]
        return float(under[zoomed].sum() / under.sum()) if under.sum() else 1.0
    relevance = batch["relevance"][row].numpy()  # [s, s]
    factor = len(relevance) // len(zoomed)
    mass = relevance.reshape(len(zoomed), factor, len(zoomed), factor).sum((1, 3))  # [c, c]
    most = np.sort(mass.ravel())[::-1][: int(zoomed.sum())].sum()
    return float(mass[zoomed].sum() / most) if most else 0.0


def error_results(
    verdicts: list[Verdict], run: str, model: str, seed: int | None, zoom: OperatingPoint
) -> list[Result]:
    """Shares of the errors by kind, and of all right answers given without a look at the object."""
    wrong = [verdict for verdict in verdicts if verdict.kind != "right"]
    right = [verdict for verdict in verdicts if verdict.kind == "right"]
    about: dict[str, Any] = {"study": "errors", "run": run, "model": model, "seed": seed}
    rows = [share(**about, setting=zoom.settings, metric="top1", n=len(verdicts), right=len(right))]
    for kind in ("zoomer", "backbone"):
        if wrong:
            found = sum(verdict.kind == kind for verdict in wrong)
            setting = zoom.settings | {"kind": kind}
            rows.append(share(**about, setting=setting, metric="share_of_errors", n=len(wrong), right=found))
    for name, group in (("right", right), ("wrong", wrong)):
        if group:
            found = sum(verdict.seen < LEAST_SEEN for verdict in group)
            setting = zoom.settings | {"answer": name}
            rows.append(share(**about, setting=setting, metric="object_left_out", n=len(group), right=found))
    return rows


def write_errors(run: Path, verdicts: list[Verdict], pictured: list[_Pictured], names: list[str]) -> list[Path]:
    """Write `results/errors_samples.json`, every sample's verdict, and `results/errors.png`, some of the errors."""
    folder = Path(run) / "results"
    samples = folder / "errors_samples.json"
    write_verdicts(samples, [verdict._asdict() for verdict in verdicts])
    if not pictured:
        return [samples]
    kinds = [kind for kind in ("zoomer", "backbone") if any(item.verdict.kind == kind for item in pictured)]
    figure, axes = plt.subplots(len(kinds), PICTURED, figsize=(1.6 * PICTURED, 1.9 * len(kinds)), squeeze=False)
    for line, kind in zip(axes, kinds, strict=True):
        chosen = [item for item in pictured if item.verdict.kind == kind]
        for panel in line:
            panel.set_axis_off()
        for panel, item in zip(line, chosen, strict=False):
            side = len(item.image)
            panel.imshow(item.image, extent=(0, side, side, 0), interpolation="nearest")
            patches(panel, item.boxes, item.cell)
            if item.target is not None:
                x1, y1, x2, y2 = item.target.tolist()
                panel.plot([x1, x2, x2, x1, x1], [y1, y1, y2, y2, y1], color="lime", linewidth=1.2)
            told = [
                names[n] if n < len(names) and names[n] else str(n)
                for n in (item.verdict.label, item.verdict.predicted)
            ]
            panel.set_title(f"{kind}: {told[0]} as {told[1]}", fontsize=7)
    figure.tight_layout(pad=0.3)
    with commit(folder / "errors.png") as tmp:
        figure.savefig(tmp, format="png", dpi=130)
    plt.close(figure)
    return [samples, folder / "errors.png"]
