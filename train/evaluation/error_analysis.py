"""Error analysis as in ZoomViT's section I: does the zoomer or the backbone cause a wrong answer?

The zoomer causes an error if the zoomed cells miss the object: if they cover less than half of its box or, for samples
without boxes, hold less than half of the relevance that the same number of cells could hold at most. The backbone
causes all other errors. The results also say how often the zoomed cells miss the object when the answer is right: the
shares of the errors alone say nothing about causes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from zpipe.schemas.errors import UsageError
from zpipe.schemas.geometry import Box, covered_share
from zpipe.schemas.progress import Progress, silent
from zpipe.train.evaluation.answers import Answers, class_names
from zpipe.train.evaluation.inference import OpenRun, Tally
from zpipe.train.evaluation.pictures import ErrorPicture, class_name, error_sheet
from zpipe.train.evaluation.results import FOLDER, Result, share, write_verdicts
from zpipe.train.models.operating_points import OperatingPoint
from zpipe.train.models.zoom_tokens import choose_cells

MIN_SEEN = 0.5
MAX_PICTURES = 8  # of each kind of error


class Verdict(NamedTuple):
    """What happened to a sample.

    Attributes:
        key: the sample.
        label: its class in the model's numbering; of several right ones the lowest.
        predicted: the class that the model answered.
        kind: `right`, or what caused the error: `zoomer` or `backbone`.
        seen: the fraction of the object in zoomed cells.
    """

    key: str
    label: int
    predicted: int
    kind: str
    seen: float


Pictures = dict[str, list[ErrorPicture]]  # by the kind of the error


@torch.inference_mode()
def analyse_errors(
    opened: OpenRun,
    samples: Tally,
    zoom: OperatingPoint,
    answers: Answers,
    progress: Progress = silent,
) -> tuple[list[Verdict], Pictures]:
    """Find out what caused the errors of a ZoomViT.

    Args:
        opened: the run, with a source of scores.
        samples: the images, with boxes or the teacher's maps.
        zoom: the operating point.
        answers: which answers are right.
        progress: called once per batch.

    Returns:
        A verdict for every sample that counts, and the first errors of each kind as pictures.

    Raises:
        UsageError: the model is no ZoomViT, or samples have neither boxes nor maps.
    """
    model = opened.model
    if not hasattr(model, "tokenise"):
        raise UsageError(f"{opened.run.path}: only errors of zoomvit_* models can be told apart by their zoom")
    names = class_names(opened.run).names
    verdicts: list[Verdict] = []
    pictures: Pictures = {"zoomer": [], "backbone": []}
    side, batches = model.coarse_grid, len(samples.loader)
    for number, batch in enumerate(samples):
        if "object_box" not in batch and "relevance" not in batch:
            raise UsageError(
                f"{samples.loader.path}: not all samples have a box, so errors need the teacher's maps; give --maps"
            )
        prepared = opened.prepare(batch)
        logits, scores, _ = opened.respond(prepared, zoom)
        assert scores is not None  # a ZoomViT with a source of scores
        ranks, predicted = answers.ranks(logits, batch), logits.argmax(1).tolist()
        labels = answers.labels(batch).tolist()
        budget, alpha = zoom.arguments.get("budget"), zoom.arguments.get("alpha")
        zoomed = choose_cells(scores, len(logits), model.score_grid, alpha, budget, model.zoom_factor).cpu().numpy()
        patches = None
        for row, rank in enumerate(ranks.tolist()):
            if rank < 0:
                continue
            seen = _seen(batch, row, zoomed[row].reshape(side, side))
            kind = "right" if rank == 0 else "backbone" if seen >= MIN_SEEN else "zoomer"
            verdict = Verdict(batch["key"][row], labels[row], predicted[row], kind, seen)
            verdicts.append(verdict)
            if kind != "right" and len(pictures[kind]) < MAX_PICTURES:
                patches = patches or opened.token_boxes(prepared, scores, zoom) or []
                image = batch["image"][row].permute(1, 2, 0).numpy()
                target = batch["object_box"][row] * len(image) if "object_box" in batch else None
                label, answer = class_name(names, verdict.label), class_name(names, verdict.predicted)
                title = f"{kind}: {label} as {answer}"
                pictures[kind].append(ErrorPicture(image, patches[row], len(image) // side, target, title))
        progress("errors", number + 1, batches, wrong=sum(verdict.kind != "right" for verdict in verdicts))
    return verdicts, pictures


def _seen(batch: dict[str, Any], row: int, zoomed: np.ndarray) -> float:
    """The fraction of the object in zoomed cells, bool [c, c]."""
    if "object_box" in batch:
        under = covered_share(zoomed.shape, Box(*batch["object_box"][row].tolist()), (1, 1))  # [c, c]
        return float(under[zoomed].sum() / under.sum()) if under.sum() else 1.0
    relevance = batch["relevance"][row].numpy()  # [s, s]
    factor = len(relevance) // len(zoomed)
    mass = relevance.reshape(len(zoomed), factor, len(zoomed), factor).sum((1, 3))  # [c, c]
    most = np.sort(mass.ravel())[::-1][: int(zoomed.sum())].sum()
    return float(mass[zoomed].sum() / most) if most else 0.0


def error_results(verdicts: Sequence[Verdict], about: Mapping[str, Any], zoom: OperatingPoint) -> list[Result]:
    """The shares of the kinds of errors, and how often the zoomed cells miss the object in right and wrong answers.

    Args:
        verdicts: of all samples.
        about: study, run, model and seed, as of `results.identity`.
        zoom: the operating point.
    """
    wrong = [verdict for verdict in verdicts if verdict.kind != "right"]
    right = [verdict for verdict in verdicts if verdict.kind == "right"]
    results = [share(**about, setting=dict(zoom.settings), metric="top1", n=len(verdicts), right=len(right))]
    for kind in ("zoomer", "backbone"):
        if wrong:
            count = sum(verdict.kind == kind for verdict in wrong)
            setting = {**zoom.settings, "kind": kind}
            results.append(share(**about, setting=setting, metric="share_of_errors", n=len(wrong), right=count))
    for name, group in (("right", right), ("wrong", wrong)):
        if group:
            count = sum(verdict.seen < MIN_SEEN for verdict in group)
            setting = {**zoom.settings, "answer": name}
            results.append(share(**about, setting=setting, metric="object_left_out", n=len(group), right=count))
    return results


def write_errors(run: Path, verdicts: Sequence[Verdict], pictures: Pictures) -> list[Path]:
    """Write every verdict to `results/errors_samples.json` in the run, and some errors to `results/errors.png`.

    Returns:
        The files.
    """
    samples, sheet = (Path(run) / FOLDER / name for name in ("errors_samples.json", "errors.png"))
    write_verdicts(samples, [verdict._asdict() for verdict in verdicts])
    rows = [items for items in pictures.values() if items]
    if not rows:
        return [samples]
    error_sheet(sheet, rows, columns=MAX_PICTURES)
    return [samples, sheet]
