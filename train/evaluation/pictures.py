"""Pictures of what teacher, zoomer and ZoomViT look at."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from zpipe.schemas.atomic import commit
from zpipe.schemas.errors import UsageError
from zpipe.schemas.names import printable
from zpipe.train.checkpoint import load_run
from zpipe.train.evaluation.answers import match_run
from zpipe.train.evaluation.inference import OpenRun, choose_run_source, eval_loader
from zpipe.train.evaluation.operating_points import one_point

COLUMNS = ("image", "teacher map", "zoomer map", "patch map")
PICTURE_MARK = b"Software\0zpipe"  # in the first bytes of each PNG that is written here


class ErrorPicture(NamedTuple):
    """A wrong answer, as `error_sheet` shows it.

    Attributes:
        image: uint8 [S, S, 3].
        patches: int64 [n, 4] as (left, top, right, bottom) in pixels.
        cell: pixels per side of a cell.
        target: the object's box in pixels, or None.
        title: the kind of the error and the classes.
    """

    image: np.ndarray
    patches: Tensor
    cell: int
    target: Tensor | None
    title: str


def contact_sheet(run: Path, shards: Path, maps: Path, out: Path, *, budget: int, images: int = 8) -> None:
    """Write a PNG with one row per image: the image and its object's box, the teacher's map, the zoomer's, the patches.

    Args:
        run: the folder of a finished ZoomViT run with a zoomer.
        shards: the images.
        maps: their relevance store.
        out: the PNG.
        budget: zoomed cells per image.
        images: the number of rows.

    Raises:
        UsageError: the run is not a ZoomViT, or has no zoomer.
    """
    run_opened = load_run(run)
    zoomer = run_opened.zoomer
    if not hasattr(run_opened.model, "tokenise") or zoomer is None:
        raise UsageError(f"{run}: the contact sheet needs a ZoomViT that was trained with a zoomer")
    opened = OpenRun(run_opened, choose_run_source(run_opened, "zoomer", None), device="cpu")
    point = one_point(opened.model, opened.source, {"budget": budget})
    loader = eval_loader(run_opened.preprocessing, shards, maps, batch_size=images)
    batch = next(iter(loader))
    prepared = opened.prepare(batch)
    logits, scores, _ = opened.respond(prepared, point)
    boxes = opened.token_boxes(prepared, scores, point)
    assert scores is not None and boxes is not None  # a ZoomViT with a zoomer has both
    match_run(run_opened, loader.index, loader.path)
    names, side = loader.index.classes, run_opened.preprocessing.image_size
    count = len(batch["key"])
    figure, axes = plt.subplots(count, len(COLUMNS), figsize=(8, 2 * count + 0.4), squeeze=False)
    for title, panel in zip(COLUMNS, axes[0], strict=True):
        panel.set_title(title, fontsize=10)
    for row, panels in enumerate(axes):
        for panel in panels:
            _show(panel, batch["image"][row].permute(1, 2, 0).numpy())
        label, predicted = (class_name(names, int(n)) for n in (batch["label"][row], logits[row].argmax()))
        style: dict[str, Any] = {"fontsize": 7, "color": "white", "backgroundcolor": "#00000090", "va": "bottom"}
        panels[0].text(1, side - 1, _plain(f"{label}, seen as {predicted}", 24), **style)
        if "object_box" in batch:
            _outline(panels[0], batch["object_box"][row] * side, "lime", 1.2)
        overlay(panels[1], batch["relevance"][row].numpy(), side)
        overlay(panels[2], scores[row].view(zoomer.grid, zoomer.grid).numpy(), side)
        patches(panels[3], boxes[row], side // opened.model.coarse_grid)
    _save(figure, out)


def picture(
    out: Path, image: np.ndarray, scores: np.ndarray | None, boxes: Tensor | None, cell: int, title: str
) -> None:
    """Write a PNG of one image beside its score map and its patches.

    Args:
        out: the PNG.
        image: uint8 [S, S, 3].
        scores: the score map [gh, gw], or None.
        boxes: the patches, see `patches`, or None.
        cell: pixels per side of a cell.
        title: of the image.
    """
    panels = 1 + (scores is not None) + (boxes is not None)
    figure, axes = plt.subplots(1, panels, figsize=(3 * panels, 3.2), squeeze=False)
    for panel in axes[0]:
        _show(panel, image)
    axes[0, 0].set_title(_plain(title, 36), fontsize=10)
    if scores is not None:
        axes[0, 1].set_title("scores", fontsize=10)
        overlay(axes[0, 1], scores, len(image))
    if boxes is not None:
        axes[0, -1].set_title(f"{len(boxes)} patches", fontsize=10)
        patches(axes[0, -1], boxes, cell)
    _save(figure, out)


def error_sheet(out: Path, rows: Sequence[Sequence[ErrorPicture]], columns: int) -> None:
    """Write a PNG of wrong answers, one row per kind of error and at most `columns` images in each."""
    figure, axes = plt.subplots(len(rows), columns, figsize=(1.6 * columns, 1.9 * len(rows)), squeeze=False)
    for panels, row in zip(axes, rows, strict=True):
        for panel in panels:
            panel.set_axis_off()
        for panel, item in zip(panels, row, strict=False):
            _show(panel, item.image)
            patches(panel, item.patches, item.cell)
            if item.target is not None:
                _outline(panel, item.target, "lime", 1.2)
            panel.set_title(_plain(item.title, 28), fontsize=7)
    _save(figure, out)


def patches(axes: Axes, boxes: Tensor, cell: int) -> None:
    """Outline patches, those of zoomed cells in red.

    Args:
        axes: the panel to draw on.
        boxes: int64 [n, 4] as (left, top, right, bottom) in pixels.
        cell: pixels per side of a cell.
    """
    for box in boxes:
        is_zoomed = box[2] - box[0] < cell
        _outline(axes, box, *(("red", 0.8) if is_zoomed else ("white", 0.4)))


def overlay(axes: Axes, relevance: np.ndarray, side: int) -> None:
    """Lay a map [gh, gw] over the image of `side` pixels that `axes` shows."""
    axes.imshow(relevance, extent=(0, side, side, 0), cmap="inferno", alpha=0.65, interpolation="bilinear", vmin=0.0)


def class_name(names: Sequence[str], index: int) -> str:
    """The name of a class; its number if it has no name."""
    return names[index] if index < len(names) and names[index] else str(index)


def _plain(text: str, width: int) -> str:
    """Text for matplotlib as it is, in at most three lines of `width` characters: a name may look like mathematics."""
    lines = textwrap.wrap(printable(text), width, max_lines=3, placeholder=" ...")
    return "\n".join(lines).replace("$", r"\$")


def _show(axes: Axes, image: np.ndarray) -> None:
    side = len(image)
    axes.imshow(image, extent=(0, side, side, 0), interpolation="nearest")
    axes.set_axis_off()


def _outline(axes: Axes, box: Tensor, color: str, width: float) -> None:
    x1, y1, x2, y2 = box.tolist()
    axes.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, edgecolor=color, linewidth=width))


def _save(figure: Figure, out: Path) -> None:
    figure.tight_layout(pad=0.3)
    with commit(out) as tmp:
        figure.savefig(tmp, format="png", dpi=130, metadata={"Software": "zpipe"})
    plt.close(figure)
