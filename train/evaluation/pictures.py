"""Pictures: a contact sheet that shows what teacher, zoomer and ZoomViT look at."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from torch import Tensor

from zpipe.schemas.atomic import commit
from zpipe.schemas.errors import UsageError
from zpipe.train.checkpoint import load_run
from zpipe.train.data.loader import RelevanceLoader
from zpipe.train.data.transforms import ViewConfig
from zpipe.train.evaluation.inference import OpenRun, choose_run_source
from zpipe.train.evaluation.operating_points import one_point
from zpipe.train.models.zoom_tokens import token_boxes


@torch.inference_mode()
def contact_sheet(
    run: Path,
    shards: Path,
    maps: Path,
    out: Path,
    *,
    budget: int | None = None,
    alpha: float | None = None,
    images: int = 8,
) -> None:
    """Write a PNG with one row an image: image (and object box), teacher map, zoomer map, patch map.

    run: a finished ZoomViT with its zoomer; the zoom is `budget` cells or those above `alpha`.
    Errors: :class:`UsageError` when the run has no zoomer.
    """
    opened = load_run(run)
    model, zoomer = opened.model, opened.zoomer
    if not hasattr(model, "tokenise") or zoomer is None:
        raise UsageError(f"{run}: the contact sheet needs a ZoomViT that was trained with a zoomer")
    side = opened.preprocessing.image_size
    view = ViewConfig(crop_pct=opened.preprocessing.crop_pct)
    loader = RelevanceLoader(
        shards, maps, batch_size=images, image_size=side, augment="eval", missing="uniform", view=view
    )
    batch = next(iter(loader))
    source = choose_run_source(opened, "zoomer", None)
    ready = OpenRun(opened, source, device="cpu")
    settings = {"alpha": alpha} if budget is None else {"budget": budget}
    point = one_point(model, source, settings)
    prepared = ready.prepare(batch)
    logits, scores, _ = ready.respond(prepared, point)
    tokens = model.tokenise(prepared["image"], scores, **point.arguments).by_image()
    names = loader.index.classes
    titles = ("image", "teacher map", "zoomer map", "patch map")
    count = len(batch["key"])
    figure, axes = plt.subplots(count, 4, figsize=(8, 2 * count + 0.4), squeeze=False)
    for row in range(count):
        image = batch["image"][row].permute(1, 2, 0).numpy()  # [S, S, 3]
        for column in range(4):
            axes[row, column].imshow(image, extent=(0, side, side, 0), interpolation="nearest")
            axes[row, column].set_axis_off()
            if row == 0:
                axes[row, column].set_title(titles[column], fontsize=10)
        label, guess = int(batch["label"][row]), int(logits[row].argmax())
        told = [names[index] if index < len(names) and names[index] else str(index) for index in (label, guess)]
        axes[row, 0].text(
            1,
            side - 1,
            f"{told[0]}, seen as {told[1]}",
            fontsize=7,
            color="white",
            backgroundcolor="#00000090",
            va="bottom",
        )
        if "object_box" in batch:
            x1, y1, x2, y2 = (batch["object_box"][row] * side).tolist()
            axes[row, 0].add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, edgecolor="lime", linewidth=1.2))
        overlay(axes[row, 1], batch["relevance"][row].numpy(), side)
        overlay(axes[row, 2], scores[row].view(zoomer.grid, zoomer.grid).numpy(), side)
        patches(axes[row, 3], token_boxes(tokens[row], model.coarse_grid, side), side // model.coarse_grid)
    figure.tight_layout(pad=0.3)
    with commit(out) as tmp:
        figure.savefig(tmp, format="png", dpi=130)
    plt.close(figure)


def picture(
    out: Path, image: np.ndarray, scores: np.ndarray | None, boxes: Tensor | None, cell: int, title: str
) -> None:
    """Write a PNG of one image, uint8 [S, S, 3], beside its score map [gh, gw] and its patches (see `patches`), where it has them."""
    panels = 1 + (scores is not None) + (boxes is not None)
    figure, axes = plt.subplots(1, panels, figsize=(3 * panels, 3.2), squeeze=False)
    side = len(image)
    for panel in axes[0]:
        panel.imshow(image, extent=(0, side, side, 0), interpolation="nearest")
        panel.set_axis_off()
    axes[0, 0].set_title(title, fontsize=10)
    if scores is not None:
        axes[0, 1].set_title("scores", fontsize=10)
        overlay(axes[0, 1], scores, side)
    if boxes is not None:
        axes[0, -1].set_title(f"{len(boxes)} patches", fontsize=10)
        patches(axes[0, -1], boxes, cell)
    figure.tight_layout(pad=0.3)
    with commit(out) as tmp:
        figure.savefig(tmp, format="png", dpi=130)
    plt.close(figure)


def patches(axes: Axes, boxes: Tensor, cell: int) -> None:
    """Outline patches, int64 [n, 4] as (left, top, right, bottom): in red those of zoomed cells. cell: pixels a side of a cell."""
    for x1, y1, x2, y2 in boxes.tolist():
        fine = x2 - x1 < cell
        color, width = ("red", 0.8) if fine else ("white", 0.4)
        axes.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, edgecolor=color, linewidth=width))


def overlay(axes: Axes, relevance: np.ndarray, side: int) -> None:
    """Lay a map [gh, gw] over the image that is shown on `axes`."""
    axes.imshow(relevance, extent=(0, side, side, 0), cmap="inferno", alpha=0.65, interpolation="bilinear", vmin=0.0)
