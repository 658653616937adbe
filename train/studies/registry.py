"""The paper's experiments by name, and how to run one: `zpipe study NAME RUN SHARDS`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from zpipe.schemas.errors import UsageError
from zpipe.schemas.progress import Progress, silent
from zpipe.train.device import keep_freed_memory
from zpipe.train.evaluation.results import Result, write_study
from zpipe.train.fit.distributed import Workers
from zpipe.train.studies.bench import Bench, Study, StudyConfig, StudyInputs
from zpipe.train.studies.classifying import backbone_size, errors, nine_crops
from zpipe.train.studies.map_methods import map_methods
from zpipe.train.studies.scoring import score_sources, selection, zoomer_depth
from zpipe.train.studies.zooming import alpha_eta, pruning, test_time_zoom, zfe, zoom_in_training

STUDIES: dict[str, Study] = {
    "alpha-eta": Study("Threshold and zoom factor (Table 9)", True, alpha_eta),
    "pruning": Study("Tokens taken away, highest or lowest first (Table 5, Fig. 6)", False, pruning),
    "zfe": Study("Zoom factor embedding (Table 4)", True, zfe),
    "zoom-in-training": Study("Random or fixed zoom in training (Table 3)", True, zoom_in_training),
    "zoomer-depth": Study("Residual blocks of the zoomer (Tables 2 and 10)", True, zoomer_depth),
    "score-sources": Study("What tells where to zoom (Table 11)", True, score_sources),
    "test-time-zoom": Study("A plain ViT that zooms without training (Table 13)", False, test_time_zoom),
    "nine-crops": Study("Nine crops of a larger image (Table 14)", False, nine_crops),
    "backbone-size": Study("Size of the backbone (Table 8)", True, backbone_size),
    "selection": Study("What the second stage refines (CF-ViT, Table 4; LF-ViT, Table 6)", True, selection),
    "map-methods": Study("Attribution methods: do better-judged maps make better Zoomers?", True, map_methods),
    "errors": Study("Errors of the zoomer and of the backbone (section I)", False, errors),
}


def run_study(
    name: str,
    inputs: StudyInputs,
    config: StudyConfig,
    *,
    progress: Progress = silent,
    say: Callable[[str], None] = lambda line: None,
) -> tuple[Path, list[Result], list[str]]:
    """Run a study and write its results into the run's folder, as `measure_study` and `write_study`.

    Returns:
        The results file, the results, and notes about what was left out and why.
    """
    about, results, notes = measure_study(name, inputs, config, progress=progress, say=say)
    return write_study(inputs.run, about, results), results, notes


def measure_study(
    name: str,
    inputs: StudyInputs,
    config: StudyConfig,
    *,
    progress: Progress = silent,
    say: Callable[[str], None] = lambda line: None,
) -> tuple[dict[str, Any], list[Result], list[str]]:
    """Run a study; what it trains is written into the run's folder, its results are not.

    Args:
        name: one of `STUDIES`.
        inputs: the run, the shards and other inputs.
        config: its settings.
        progress: called while models train and are measured.
        say: called with lines about training processes, see `run_training`.

    Returns:
        What the results file says beside the results, the results, and notes about what was left out and why.

    Raises:
        UsageError: the name is unknown, the study does not use a setting that was given, or it does not suit the run.
        ZpipeError: a file is broken, or a training fails.
    """
    if name not in STUDIES:
        raise UsageError(f"study {name}: choose one of {', '.join(STUDIES)}")
    evaluation, trains = config.evaluation, STUDIES[name].trains
    unused = {
        "--seeds": config.seeds and not trains,
        "--epochs": config.epochs is not None and not trains,
        "--num-workers": config.workers != Workers() and not trains,
        "--zoomer": inputs.zoomer is not None and name != "test-time-zoom",
        "--methods, --weights": inputs.method_maps is not None and name != "map-methods",
        "--target-gmacs": evaluation.target_gmacs is not None,
        "--calibration": evaluation.calibration is not None or evaluation.calibration_maps is not None,
    }
    for option, is_given in unused.items():
        if is_given:
            raise UsageError(f"{option}: study {name} has no use for it; leave it out")
    bench = Bench(name, inputs, config, progress, say)
    if bench.device.type == "cpu":
        keep_freed_memory()
    results = STUDIES[name].run(bench)
    about: dict[str, Any] = {"study": name, "title": STUDIES[name].title, "run": str(inputs.run)}
    about |= {"precision": evaluation.precision, "shards": str(inputs.shards)}
    about |= {"maps": None if inputs.maps is None else str(inputs.maps)} | bench.tallies[-1].stated()
    return about, results, bench.notes
