"""The report: one HTML file that holds everything it shows and reaches for nothing."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any

from zpipe.schemas.atomic import write_bytes
from zpipe.schemas.errors import UsageError
from zpipe.schemas.progress import Progress, silent
from zpipe.train.report.figures import curves, histograms, training_figures
from zpipe.train.report.points import points
from zpipe.train.report.runs import Gathered, RunRecord, gather
from zpipe.train.report.tables import headline, tables, token_table, training_table

PAGE_NAME = "index.html"
SCRIPTS = ("patches.js", "figures.js", "gallery.js", "main.js")


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """Settings of a report."""

    shards: Path | None = None
    """The images of the gallery; None for those of the first evaluated ViT."""
    maps: Path | None = None
    """The relevance store of these shards."""
    gallery: int = 200
    """The number of images in the gallery; 0 for no gallery."""
    seed: int = 0
    """The seed of the choice of images."""
    batch_size: int = 64
    """Images per batch when the models run on them."""
    precision: str = "float32"
    """The precision of the gallery's scores and models: float32, or bf16 or fp16 under autocast."""
    device: str = "auto"
    """auto, cpu or cuda."""

    def __post_init__(self) -> None:
        if self.gallery < 0 or self.seed < 0 or self.batch_size < 1:
            raise UsageError(
                f"gallery {self.gallery}, seed {self.seed}, batch size {self.batch_size}: "
                "give numbers of at least 0, 0 and 1"
            )


def report(runs: Sequence[Path], out: Path, config: ReportConfig | None = None, progress: Progress = silent) -> Path:
    """Write one HTML page about runs. The same inputs give the same bytes.

    Args:
        runs: runs, studies, or folders of them.
        out: the folder of the page.
        config: settings; None for the defaults.
        progress: called while the models run on the images of the gallery.

    Returns:
        The page, OUT/index.html. Where results are missing, it names the command that makes them.

    Raises:
        UsageError: a path holds neither a run nor results.
        ZpipeError: a file is broken.
    """
    config = config or ReportConfig()
    found = gather(runs)
    gallery, missing = _gallery(found.runs, config, progress)
    path = Path(out) / PAGE_NAME
    write_bytes(path, render(describe(found, missing), gallery).encode())
    return path


def _gallery(
    runs: list[RunRecord], config: ReportConfig, progress: Progress
) -> tuple[dict[str, Any] | None, list[str]]:
    if not config.gallery:
        return None, []
    vits = [run for run in runs if run.kind == "vit"]
    if not vits:
        return None, ["No gallery: no vit run was given."]
    shards = config.shards
    if shards is None:
        named = next((run.shards for run in vits if run.shards), None)
        if named is None:
            return None, ["No gallery: no run was evaluated, so no shards are known. Give --shards VAL_SHARDS."]
        shards = Path(named)
        if "://" not in named and not shards.exists():
            return None, [
                f"No gallery: the evaluation was on {named}, which does not exist here. Give --shards VAL_SHARDS."
            ]
    # The gallery imports torch and the models, which a page without one does not need.
    from zpipe.train.report.gallery import GalleryConfig, build_gallery

    gallery, notes = build_gallery(
        vits,
        shards,
        config.maps,
        GalleryConfig(
            count=config.gallery,
            seed=config.seed,
            batch_size=config.batch_size,
            device=config.device,
            precision=config.precision,
        ),
        progress,
    )
    if gallery is not None and config.maps is None:
        notes.append("No teacher's maps in the gallery. Give --maps VAL_MAPS.")
    return gallery, notes


def describe(found: Gathered, missing: Sequence[str] = ()) -> dict[str, Any]:
    """Everything on the page but the gallery, as JSON."""
    known = points(found.results)
    vits = [run for run in found.runs if run.kind == "vit"]
    notes = []
    if not any("top1" in point.measures for point in known):
        notes.append("Nothing has been evaluated. To get accuracies: zpipe evaluate RUN VAL_SHARDS")
    elif not any(point.histogram for point in known) and any(point.zooms for point in known):
        notes.append(
            "The evaluations hold no token histograms. To get them, evaluate again: zpipe evaluate RUN VAL_SHARDS"
        )
    for run in vits:
        if not run.finished:
            notes.append(f"{run.name} is not finished. To continue it, run its command again.")
    if not any(run.curve for run in found.runs) and found.runs:
        notes.append("No training curves: no run has a metrics.jsonl.")
    return {
        "zpipe": version("zpipe"),
        "runs": [run.name for run in found.runs],
        "headline": headline(known),
        "notes": [*notes, *missing],
        "figures": {
            "accuracy": curves(known, found.titles, found.runs) + histograms(known),
            "training": training_figures(found.runs),
        },
        "tables": {
            "accuracy": tables(known, found.titles) + token_table(known),
            "training": training_table(found.runs),
        },
    }


def render(about: dict[str, Any], gallery: dict[str, Any] | None) -> str:
    """Fill in the page. Its policy forbids all requests: scripts are allowed by digest, images are data in the file."""
    source = files("zpipe.train.report")
    # Plotly is the one library here that draws with hover, zoom and a legend that hides series, which a dozen models in
    # one plot need. It comes as a Python package with all of its JavaScript, runs without eval under a strict policy,
    # and is maintained. The price is 4.8 MB a page, however many plots. matplotlib's SVG would be small but static;
    # Vega and Bokeh need eval or more than one file.
    from plotly.offline import get_plotlyjs  # type: ignore[import-untyped]  # plotly has no stubs

    plotly = get_plotlyjs()
    ours = "\n".join(source.joinpath(name).read_text(encoding="utf-8") for name in SCRIPTS)
    allowed = " ".join(f"'sha256-{_digest(script)}'" for script in (plotly, ours))
    policy = (
        # Plotly sizes and colours its SVG with style attributes, which have no digest.
        f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )
    parts = {
        "policy": policy,
        "style": source.joinpath("page.css").read_text(encoding="utf-8"),
        "about": embedded_json(about),
        "gallery": embedded_json(gallery),
        "plotly": plotly,
        "script": ours,
    }
    # In one pass, so that no text that is filled in is mistaken for a placeholder.
    return re.sub(
        r"\{\{(\w+)\}\}", lambda found: parts[found[1]], source.joinpath("page.html").read_text(encoding="utf-8")
    )


def embedded_json(value: Any) -> str:
    """JSON for a <script>: without `<`, so that nothing in it ends the element or begins a comment."""
    text = json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c")


def _digest(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
