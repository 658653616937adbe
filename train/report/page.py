"""The report: one self-contained HTML file that requests nothing."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch

from zpipe.schemas.atomic import check_out_file, write_bytes
from zpipe.schemas.errors import UsageError
from zpipe.schemas.names import printable
from zpipe.schemas.progress import Progress, silent
from zpipe.schemas.storage import as_local
from zpipe.train.device import autocast
from zpipe.train.report.figures import curves, histograms, training_figures
from zpipe.train.report.judged import judged_figures, judged_tables
from zpipe.train.report.points import points
from zpipe.train.report.runs import Gathered, RunRecord, gather
from zpipe.train.report.tables import headline, tables, token_table, training_table

PAGE_NAME = "index.html"
PAGE_MARK = b"<title>zpipe report</title>"  # in the first bytes of each page
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
    """The seed of the choice of the images."""
    batch_size: int = 64
    """Images per batch in the gallery."""
    device: str = "auto"
    """`auto`, `cpu`, `cuda` or `cuda:N`."""
    precision: str = "float32"
    """The precision of scores and models in the gallery: float32, or bf16 or fp16 under autocast."""

    def __post_init__(self) -> None:
        autocast(self.precision, torch.device("cpu"))  # refuses an unknown precision
        if self.gallery < 0 or self.seed < 0 or self.batch_size < 1:
            raise UsageError(
                f"gallery {self.gallery}, seed {self.seed}, batch size {self.batch_size}: "
                "give numbers of at least 0, 0 and 1"
            )


def report(runs: Sequence[Path], out: Path, config: ReportConfig | None = None, progress: Progress = silent) -> Path:
    """Write one HTML page about runs; equal inputs give equal bytes.

    Args:
        runs: runs, studies, folders with tests of maps, or folders of them.
        out: the folder of the page.
        config: settings; None for the defaults.
        progress: called while the models run on the images of the gallery.

    Returns:
        The page, OUT/index.html. If results are missing, it names the command that makes them.

    Raises:
        UsageError: a path holds neither a run nor results, or is a URL; or OUT/index.html is another page.
        ZpipeError: a file is broken.
    """
    config = config or ReportConfig()
    path = as_local(out) / PAGE_NAME
    check_out_file(path, (), PAGE_MARK)
    gathered = gather([as_local(run) for run in runs])
    gallery, notes = _gallery(gathered.runs, config, progress)
    write_bytes(path, render(describe(gathered, notes), gallery).encode())
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
        if not shards.exists():  # a URL neither: what a results file names is not fetched unasked
            return None, [
                f"No gallery: the evaluation was on {named}, which does not exist here. Give --shards VAL_SHARDS."
            ]
    # The gallery imports the models and data loading, which a page without one does not need.
    from zpipe.train.report.gallery import GalleryConfig, build_gallery

    settings = GalleryConfig(
        count=config.gallery,
        seed=config.seed,
        batch_size=config.batch_size,
        device=config.device,
        precision=config.precision,
    )
    gallery, notes = build_gallery(vits, shards, config.maps, settings, progress)
    if gallery is not None and config.maps is None:
        notes.append("No teacher's maps in the gallery. Give --maps VAL_MAPS.")
    return gallery, notes


def describe(gathered: Gathered, gallery_notes: Sequence[str] = ()) -> dict[str, Any]:
    """The page without its gallery, as JSON.

    Args:
        gathered: the runs and their results.
        gallery_notes: what the gallery lacks and why.
    """
    runs, titles = gathered.runs, gathered.titles
    known = points(gathered.results)
    zoomed_tokens = {point.measures["tokens"].value for point in known if point.zooms and "tokens" in point.measures}
    notes = []
    if not any("top1" in point.measures for point in known) and (runs or known or not gathered.judged):
        notes.append("Nothing has been evaluated. To get accuracies: zpipe evaluate RUN VAL_SHARDS")
    elif len(zoomed_tokens) > 1 and not any(point.histogram for point in known):
        notes.append(
            "The evaluations hold no token histograms. To get them, evaluate again: zpipe evaluate RUN VAL_SHARDS"
        )
    notes += _about_images(runs)
    unfinished = [run.name for run in runs if run.kind == "vit" and not run.finished]
    notes += [f"{name} is not finished. To continue it, run its command again." for name in unfinished]
    if runs and not any(run.curve for run in runs):
        notes.append("No training curves: no run has a metrics.jsonl.")
    return {
        "zpipe": version("zpipe"),
        "runs": [run.name for run in runs],
        "headline": headline(known, comparable=len(_image_sets(runs)) < 2),
        "notes": [*notes, *gallery_notes],
        "figures": {
            "accuracy": curves(known, titles, runs) + histograms(known),
            "maps": judged_figures(gathered.judged),
            "training": training_figures(runs),
        },
        "tables": {
            "accuracy": tables(known, titles) + token_table(known),
            "maps": judged_tables(gathered.judged),
            "training": training_table(runs),
        },
    }


def _image_sets(runs: Sequence[RunRecord]) -> dict[str, RunRecord]:
    """The first run that was evaluated on each set of images, by the digest of the set."""
    evaluated = [run for run in runs if run.kind == "vit" and run.measured]
    # Files of earlier versions have no digest.
    name = "images_digest" if all("images_digest" in run.measured[0] for run in evaluated) else "shards"
    sets: dict[str, RunRecord] = {}
    for run in evaluated:
        sets.setdefault(str(run.measured[0].get(name)), run)
    return sets


def _about_images(runs: Sequence[RunRecord]) -> list[str]:
    """What to know about the images of the evaluations: that they differ, or that some were left out."""
    notes = []
    if len(sets := _image_sets(runs)) > 1:
        named = "; ".join(f"{run.name} on {run.shards}" for run in sets.values())
        notes.append(f"Comparisons: the runs were evaluated on different images ({named}); accuracies do not compare.")
    for run in runs:
        for content in run.measured:
            skipped, samples = content.get("skipped"), content.get("samples")
            if isinstance(skipped, int) and skipped > 0:
                why = content.get("skipped_by")
                reasons = ", ".join(map(str, why)) if isinstance(why, dict) else "left out"
                notes.append(f"{skipped} of {samples} images in an evaluation of {run.name}: {reasons}.")
    return notes


def render(about: dict[str, Any], gallery: dict[str, Any] | None) -> str:
    """Fill in the page. Its policy forbids all requests; it allows scripts by digest, and images as data."""
    source = files("zpipe.train.report")
    # A plot of a dozen models needs hover, zoom and a legend that hides series. Plotly has them, comes as a Python
    # package with all of its JavaScript, runs without eval under a strict policy, and is maintained. It adds 4.8 MB to
    # a page. The SVG of matplotlib would be small but static; Vega and Bokeh need eval or more than one file.
    from plotly.offline import get_plotlyjs  # type: ignore[import-untyped]  # plotly has no stubs

    plotly = get_plotlyjs()
    ours = "\n".join(source.joinpath(name).read_text(encoding="utf-8") for name in SCRIPTS)
    allowed = " ".join(f"'sha256-{_digest(script)}'" for script in (plotly, ours))
    policy = (
        # Plotly sets style attributes, for which there are no digests.
        f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )
    parts = {
        "policy": policy,
        "style": source.joinpath("page.css").read_text(encoding="utf-8"),
        "about": embedded_json(_shown(about)),
        "gallery": embedded_json(_shown(gallery)),
        "plotly": plotly,
        "script": ours,
    }
    # In one pass, or a placeholder in the filled-in text would be replaced, too.
    return re.sub(
        r"\{\{(\w+)\}\}", lambda match: parts[match[1]], source.joinpath("page.html").read_text(encoding="utf-8")
    )


def embedded_json(value: Any) -> str:
    """JSON for a <script> element, without `<`, which could end the element or begin a comment."""
    text = json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c")


def _shown(value: Any) -> Any:
    """A JSON value in whose texts characters that are not seen, or reorder what is around them, are escapes."""
    if isinstance(value, str):
        return printable(value)
    if isinstance(value, Mapping):
        return {printable(name): _shown(item) for name, item in value.items()}
    return [_shown(item) for item in value] if isinstance(value, list | tuple) else value


def _digest(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
