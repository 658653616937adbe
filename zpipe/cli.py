"""The command line: one verb per stage. Each verb parses its options, calls one function and prints the outcome."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from zpipe import __version__
from zpipe.arguments import SecretlessGroup
from zpipe.cli_data import extract_command, fit_head_command, make_shards_command
from zpipe.cli_import import import_command
from zpipe.cli_maps import maps_app
from zpipe.cli_options import Seed, moved
from zpipe.cli_results import (
    StudyCommand,
    calibrate_command,
    evaluate_command,
    predict_command,
    report_command,
    study_command,
)
from zpipe.cli_train import train_vit_command, train_zoomer_command
from zpipe.console import fail, local_path, open_streams, print_rows, print_table, printing, reporting, tell, warn
from zpipe.limits import Finding
from zpipe.schemas.errors import ZpipeError

app = typer.Typer(
    cls=SecretlessGroup,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Relevance maps of a frozen ViT teacher at data-set scale, and ViTs that zoom where the class is decided. "
    "Try `zpipe demo`.",
)


def _show_version(show: bool) -> None:
    if show:
        tell(f"zpipe {__version__}")
        raise typer.Exit


@app.callback()
def zpipe_command(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_show_version, help="Show the version and exit.")
    ] = False,
) -> None:
    """The options before the verb."""


app.command("make-shards", short_help="Pack images into WebDataset tars.")(make_shards_command)
app.command("extract-teacher-maps", short_help="Store a frozen teacher's maps of tar shards.")(extract_command)
app.command("fit-head", short_help="Fit a linear head to a frozen encoder.")(fit_head_command)
app.command("train-zoomer", short_help="Stage 1: teach a Zoomer to predict the maps.")(train_zoomer_command)
app.command("train-vit", short_help="Stage 2: train a ZoomViT, a plain ViT or a rival.")(train_vit_command)
app.command("import", short_help="Open other people's weights as a run.")(import_command)
app.command(
    "evaluate",
    short_help="Measure accuracy, tokens, GMACs and images/s.",
    cls=moved("--study", "studies are a verb of their own; run zpipe study {} RUN SHARDS"),
)(evaluate_command)
app.command("study", short_help="Repeat one of the paper's experiments around a run.", cls=StudyCommand)(study_command)
app.command("predict", short_help="Classify image files.")(predict_command)
app.command("calibrate", short_help="Find the threshold for a budget per image.")(calibrate_command)
app.command("report", short_help="Write one HTML page about runs.")(report_command)
app.add_typer(maps_app, name="maps")


@app.command(
    "demo",
    short_help="Run the whole pipeline on embedded data.",
    cls=moved("--seeds", "the demo over seeds is a benchmark; run python benchmarks/seeds.py FOLDER --seeds {}"),
)
def demo_command(
    output: Annotated[
        Path,
        typer.Argument(
            parser=local_path,
            metavar="OUTPUT",
            help="Folder for everything the demo makes: new, empty, or that of a demo to resume.",
        ),
    ] = Path("demo-run"),
    seed: Seed = 0,
    quick: Annotated[
        bool, typer.Option("--quick", help="Run the same steps in a minute, on too little data to learn anything.")
    ] = False,
) -> None:
    """Run the whole pipeline on embedded data in minutes.

    It makes scenes, teacher, maps, Zoomer, ZoomViT, evaluation and report.
    """
    with reporting() as progress:
        from zpipe.demo import run_demo

        report = run_demo(output, seed=seed, quick=quick, progress=progress, say=warn)
    print_rows(report["rows"], title="validation scenes")
    print_rows([report["maps"]], title="maps on validation scenes")
    for line in report["notes"]:
        tell(line)


@app.command("doctor", short_help="Check whether this machine has what is needed.")
def doctor_command(
    folder: Annotated[
        Path | None,
        typer.Argument(
            parser=local_path, metavar="[FOLDER]", help="Where shards, stores or runs will go: check it too."
        ),
    ] = None,
    gpu: Annotated[
        bool,
        typer.Option(
            "--gpu",
            help="Instead: compare what the first GPU computes with float64, provoke faults, measure rates, and "
            "recommend flags for extraction and training; two minutes.",
        ),
    ] = False,
    json_file: Annotated[
        Path | None,
        typer.Option(
            "--json",
            parser=local_path,
            metavar="FILE",
            help="(--gpu only) File of all that was measured; default zpipe-doctor-gpu.json.",
        ),
    ] = None,
) -> None:
    """Check versions, PIL build, devices, Ray, and limits: shared memory, descriptors, sockets, memory, clock, disk.

    The exit code is 1 if something would fail later, or with --gpu if there is no GPU or it computes wrong values.
    """
    from zpipe.doctor import examine

    if gpu:
        if folder is not None:
            fail(f"doctor --gpu {folder}: checks no folder; run zpipe doctor {folder} for that", (), 2)
        _examine_gpu(json_file or Path("zpipe-doctor-gpu.json"))
        return
    if json_file is not None:
        fail(f"doctor --json {json_file}: is for --gpu; give both", (), 2)
    _print_findings(examine(folder))


def _examine_gpu(json_file: Path) -> None:
    with reporting() as progress:
        from zpipe.doctor import missing_gpu
        from zpipe.schemas.atomic import check_out_file

        check_out_file(json_file, (".json",))
        if reason := missing_gpu():
            raise ZpipeError(f"doctor --gpu: no GPU that torch can use: {reason}")
        import torch

        from zpipe.gpu_report import commands_of, examine_gpu, findings_of, write_report

        report = examine_gpu("cuda", torch.cuda.device_count(), progress=progress)
        write_report(json_file, report)
    for line in commands_of(report):
        tell(line)
    tell(f"all measurements: {json_file}")
    _print_findings(findings_of(report))


def _print_findings(findings: list[Finding]) -> None:
    """Print findings as a table; if there are problems, repeat them as an error with exit code 1."""
    table = Table(show_header=False)
    for finding in findings:
        table.add_row("ok" if finding.ok else "PROBLEM", finding.name, finding.value)
    print_table(table)
    bad = [finding for finding in findings if not finding.ok]
    if bad:
        fail(f"{len(bad)} problems", tuple(f"{finding.name}: {finding.value}" for finding in bad), 1)


def main() -> None:
    """Entry point of the `zpipe` command."""
    open_streams()
    try:
        app(prog_name="zpipe")
    except OSError as error:
        if error.filename is not None:
            raise
        with printing():  # typer printed its help
            raise
