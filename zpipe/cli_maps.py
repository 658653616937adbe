"""The verbs of `zpipe maps`, which inspect, check, export, judge and compare relevance stores."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, cast

import typer
from rich.table import Table

from zpipe.cli_options import BatchSize, Classes, Damaged, Device, Join, LoadingProcesses, Store
from zpipe.cli_results import conclude
from zpipe.console import local_path, path_or_url, print_rows, print_table, reporting, tell, warn
from zpipe.schemas.errors import UsageError, ZpipeError

maps_app = typer.Typer(
    no_args_is_help=True, rich_markup_mode=None, help="Inspect, check, export and compare relevance stores."
)


@maps_app.command("info")
def maps_info(store: Store) -> None:
    """Show what a store holds and where it comes from."""
    with reporting():
        from zpipe.pipeline.inspection import store_statistics

        statistics = store_statistics(store)
        origin = statistics.manifest.provenance
        table = Table(show_header=False, title=str(store), title_justify="left")
        statuses = ", ".join(f"{count} {status}" for status, count in statistics.manifest.statuses.items())
        table.add_row("maps", f"{statistics.manifest.count} ({statuses}) in {len(statistics.manifest.shards)} shards")
        table.add_row(
            "size",
            f"{statistics.size_bytes / 1e6:.1f} MB, "
            f"{statistics.size_bytes / max(1, statistics.manifest.count):.0f} bytes a sample",
        )
        teacher = f"{origin.teacher}, weights {origin.weights}{origin.head_note}, digest {origin.teacher_digest[:12]}"
        table.add_row("teacher", teacher)
        method = f"{origin.method}{' symmetrised' if origin.symmetrised else ''}"
        table.add_row(
            "method",
            f"{method}, target {origin.target}, {origin.precision}{f' on {origin.device}' if origin.device else ''}",
        )
        table.add_row("frame", f"{origin.frame}, grid {origin.grid[0]} x {origin.grid[1]}")
        if origin.kind != "map":
            table.add_row("kind", f"{origin.kind} of {' x '.join(map(str, origin.sample_shape))}")
        if statistics.teacher_top1 is not None:
            table.add_row("teacher's top-1", f"{statistics.teacher_top1:.1%} on these labels")
        table.add_row("quantiles", "5 %, 25 %, 50 %, 75 %, 95 %")
        for name, histogram in statistics.histograms.items():
            table.add_row(name, ", ".join(f"{value:.3g}" for value in getattr(statistics, name)))
            table.add_row("", f"{histogram.low:.3g} {histogram.bars()} {histogram.high:.3g}")
        table.add_row("made from", statistics.manifest.source)
        print_table(table)


@maps_app.command("verify", short_help="Read every byte of a store and check it.")
def maps_verify(
    store: Store,
    shards: Annotated[
        Path | None,
        typer.Option(
            parser=path_or_url,
            metavar="PATH|URL",
            help="The tars it was made from; its keys and digests are compared with theirs.",
        ),
    ] = None,
) -> None:
    """Read every byte of a store and check it; exit code 1 and one line per problem if it is damaged or incomplete."""
    with reporting() as progress:
        from zpipe.pipeline.verify import verify_store

        problems = verify_store(store, shards, progress=progress)
        if problems:
            raise ZpipeError(f"{store}: {len(problems)} problems", problems)
        tell(f"{store}: intact")


@maps_app.command("digest", short_help="Add the digests of images to a store of an earlier version.")
def maps_digest(
    store: Store,
    shards: Annotated[
        Path, typer.Argument(parser=path_or_url, metavar="SHARDS", help="The tars that the store was made from.")
    ],
) -> None:
    """Add the digests of images to a store that was written without them, so that it can be joined by image."""
    with reporting() as progress:
        from zpipe.pipeline.add_digests import add_digests

        changed = add_digests(store, shards, progress=progress)
        tell(f"{store}: digests added to {changed} shards" if changed else f"{store}: has digests already")


@maps_app.command("show")
def maps_show(
    store: Store,
    key: Annotated[str, typer.Argument(help="Key of a sample.")],
    shards: Annotated[
        Path | None,
        typer.Option(
            parser=path_or_url,
            metavar="PATH|URL",
            help="The tars it was made from; default: those named in the manifest.",
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--out",
            parser=path_or_url,
            metavar="PATH|URL",
            help="PNG to write; default KEY.png in the current folder.",
        ),
    ] = None,
) -> None:
    """Draw image, map and overlay of one sample as a PNG."""
    with reporting():
        from zpipe.pipeline.inspection import show_map

        path = show_map(store, key, output or Path(f"{key.replace('/', '_')}.png"), shards)
        tell(f"{path}: written")


@maps_app.command("export", short_help="Convert a store to Parquet, NumPy or Lance.")
def maps_export(
    store: Store,
    output: Annotated[
        Path,
        typer.Argument(
            parser=path_or_url,  # the export itself refuses URLs
            metavar="OUTPUT",
            help="Parquet file, or folder with --per-shard, --numpy or --lance; must not exist.",
        ),
    ],
    parquet: Annotated[bool, typer.Option("--parquet", help="Index and maps as Parquet (the default).")] = False,
    numpy: Annotated[
        bool, typer.Option("--numpy", help="A folder of maps.npy (float32), keys.txt, index.parquet.")
    ] = False,
    lance: Annotated[bool, typer.Option("--lance", help="A Lance data set of index and maps.")] = False,
    per_shard: Annotated[bool, typer.Option("--per-shard", help="One Parquet file per shard.")] = False,
    values: Annotated[
        str, typer.Option(help="'raw' (in Parquet: map * scale is the relevance) or 'minmax' (each map in [0, 1]).")
    ] = "raw",
) -> None:
    """Convert a store for pandas, polars, duckdb, Hugging Face datasets, or plain NumPy."""
    with reporting() as progress:
        from zpipe import open_maps
        from zpipe.pipeline.export import Values, export_lance, export_numpy, export_parquet

        if numpy + lance + (parquet or per_shard) > 1:
            raise UsageError("choose one of --parquet, --numpy and --lance; --per-shard goes with --parquet")
        maps, kind = open_maps(store), cast(Values, values)
        if numpy:
            export_numpy(maps, output, values=kind, progress=progress)
        elif lance:
            export_lance(maps, output, values=kind, progress=progress)
        else:
            export_parquet(maps, output, per_shard=per_shard, values=kind, progress=progress)
        tell(f"{output}: {len(maps)} maps")


MapsOnly = Annotated[
    bool, typer.Option("--maps-only", help="Leave out the stores inside it, such as its logits and features.")
]
Address = Annotated[str, typer.Argument(metavar="ADDRESS", help="hf://datasets/OWNER/NAME, or with @BRANCH.")]


@maps_app.command("push", short_help="Publish a store on the Hugging Face Hub.")
def maps_push(
    store: Annotated[Path, typer.Argument(parser=local_path, metavar="STORE", help="Finished relevance store.")],
    address: Address,
    revision: Annotated[str | None, typer.Option(help="Branch to push to; default main.")] = None,
    private: Annotated[bool, typer.Option("--private", help="Create a private repository.")] = False,
    maps_only: MapsOnly = False,
    license: Annotated[
        str | None, typer.Option(help="Licence of the maps, an identifier of the Hub such as cc-by-4.0.")
    ] = None,
    replace: Annotated[bool, typer.Option("--replace", help="Replace another store in the repository.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Verify the store, print its card, send nothing.")] = False,
) -> None:
    """Publish a store as a data set on the Hugging Face Hub, with a data card; run again to resume.

    The stores inside it (of `--save logits,features`) are published with it. Log in with `hf auth login` or set
    HF_TOKEN. Of the source of the shards and of the place of the weights, only the last part of the path is published.
    """
    with reporting() as progress:
        from zpipe.pipeline.hub import parse_address
        from zpipe.pipeline.publish import PushConfig, push_store

        dataset = parse_address(address)
        if revision is not None:
            if "@" in address:
                raise UsageError(f"{address}: names a branch, and --revision {revision} too; give one of them")
            dataset = parse_address(f"{address.rstrip('/')}@{revision}")
        config = PushConfig(maps_only=maps_only, private=private, license=license, replace=replace, dry_run=dry_run)
        pushed = push_store(store, dataset, config, progress=progress)
        size = f"{pushed.files} files, {pushed.size_bytes / 1e6:.1f} MB"
        tell(f"{pushed.card}\n{dataset}: would hold {size}" if dry_run else f"{dataset}: {size}, {pushed.sent} sent")
        if pushed.left_out:
            names = ", ".join(pushed.left_out[:5])
            warn(f"{store}: {len(pushed.left_out)} names are no part of the store and stay here: {names}")


@maps_app.command("pull", short_help="Download a store that others published.")
def maps_pull(
    source: Annotated[
        str,
        typer.Argument(metavar="SOURCE", help="hf://datasets/OWNER/NAME[@REVISION], another URL, or a folder."),
    ],
    store: Annotated[
        Path,
        typer.Argument(parser=path_or_url, metavar="STORE", help="Folder or URL: new, empty, or of the same store."),
    ],
    maps_only: MapsOnly = False,
) -> None:
    """Download a store, check every shard against its digests, and write the manifest last; run again to resume."""
    with reporting() as progress:
        from zpipe.pipeline.download import pull_store

        pulled = pull_store(source, store, maps_only=maps_only, progress=progress)
        for note in pulled.notes:
            warn(note)
        origin = pulled.manifest.provenance
        what = "maps" if origin.kind == "map" else f"samples of kind {origin.kind}"
        inner = f", with {' and '.join(pulled.inner)}," if pulled.inner else ""
        shards = f"{pulled.shards} shards, {pulled.kept} of them were there"
        tell(f"{store}: {pulled.manifest.count} {what}{inner} in {shards}")


@maps_app.command("judge", short_help="Test how good the maps of one or several stores are.")
def maps_judge(
    stores: Annotated[
        list[Path],
        typer.Argument(parser=path_or_url, metavar="STORE", help="Relevance store; or several of the same images."),
    ],
    shards: Annotated[Path, typer.Argument(parser=path_or_url, metavar="SHARDS", help="The shards of these images.")],
    model: Annotated[
        Path | None,
        typer.Option(
            parser=local_path,
            metavar="RUN",
            help="Finished train-vit run of the classifier that the maps are tested on; default: the teacher that made "
            "them.",
        ),
    ] = None,
    weights: Annotated[
        str | None, typer.Option(help="The teacher's weights, if they are no longer where the store says.")
    ] = None,
    stability: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Images whose stability to measure, for stores that were extracted without --stability; 0 for none. "
            "Default: 200 of the images to judge, if the teacher can be loaded.",
        ),
    ] = None,
    masks: Annotated[
        Path | None,
        typer.Option(
            parser=path_or_url,
            metavar="PATH|URL",
            help="Folder of masks, KEY.png in the size of the image: 0 is background, 255 is ignored, all else is the "
            "object; or a folder of ImageNet-S, with its folders of classes.",
        ),
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Points per curve.")] = 10,
    baseline: Annotated[str, typer.Option(help="What replaces a removed cell: blur or mean.")] = "blur",
    limit: Annotated[int, typer.Option(min=1, help="Most images to use.")] = 5_000,
    classes: Classes = None,
    damaged: Damaged = "error",
    join: Join = "tar",
    batch_size: BatchSize = 64,
    data_workers: LoadingProcesses = None,
    device: Device = "auto",
    json_path: Annotated[
        Path | None,
        typer.Option("--json", parser=path_or_url, metavar="PATH|URL", help="Also write the results to this file."),
    ] = None,
) -> None:
    """Test how good the maps of one or several stores are, beside two controls, with 95 % intervals.

    Deletion (lower is better), insertion, the area between them (ABPC) and SaCo say how faithful maps are to a model;
    with boxes or masks of the objects, the pointing game, MaxBoxAcc and segmentation say how well they find them.
    """
    with reporting() as progress:
        from zpipe import open_maps
        from zpipe.judging import stability_of, teacher_of
        from zpipe.pipeline.inspection import has_stability
        from zpipe.train.data.join import Damaged as DamagedChoice
        from zpipe.train.data.map_stores import Join as JoinChoice
        from zpipe.train.evaluation.faithfulness import Baseline
        from zpipe.train.evaluation.judge import JudgeConfig, judge, open_classifier
        from zpipe.train.evaluation.results import check_results_file

        config = JudgeConfig(
            steps=steps,
            baseline=cast(Baseline, baseline),
            limit=limit,
            masks=masks,
            classes=classes,
            damaged=cast(DamagedChoice, damaged),
            join=cast(JoinChoice, join),
            batch_size=batch_size,
            data_workers=data_workers,
            device=device,
        )
        if json_path is not None:
            check_results_file(json_path)
        opened = [open_maps(store) for store in stores]
        judged_on = open_classifier(model, device) if model else teacher_of(opened, weights=weights, device=device)
        stable: Mapping[str, Mapping[str, float]] = {}
        note = ""
        if join == "tar":
            find = partial(stability_of, opened, shards, weights=weights, device=device, progress=progress)
            try:
                stable = find(limit=min(200, limit) if stability is None else stability)
            except ZpipeError as error:
                if stability is not None:
                    raise
                note = f"note: stability is not measured: {error}"
        elif stability:
            raise UsageError(
                "--stability: the maps are computed anew from the store's own tars; leave out --join image"
            )
        elif any(map(has_stability, opened)):
            note = "note: stability is left out: with --join image, keys of the stores may be those of other images"
        content = judge(judged_on, shards, opened, config, stability=stable, progress=progress)
        if note:  # only now, because judging may end with an error for the same reason
            warn(note)
    rows = content["rows"]
    _print_judged(rows, f"{rows[0]['count']} images of {shards}, baseline {baseline}, {steps} steps")
    if content["masks_left_out"]:
        tell(content["masks_left_out"])
    conclude(content, json_path)


def _print_judged(rows: Sequence[Mapping[str, Any]], title: str) -> None:
    """Print a line per metric and a column per row, with intervals; then the differences to the first row."""
    metrics = list(dict.fromkeys(name for row in rows for name in row if f"{name}_low" in row))
    values = [{m: [row[m + end] for end in ("", "_low", "_high")] for m in metrics if m in row} for row in rows]
    differences = [row["difference"] for row in rows[1:]]
    parts = [(title, rows, values), (f"Difference to {rows[0]['setting']}", rows[1:], differences)]
    for heading, members, columns in parts:
        table = Table(title=heading, title_justify="left")
        table.add_column("metric")
        for row in members:
            table.add_column(row["setting"], justify="right")
        for metric in (name for name in metrics if any(name in column for column in columns)):
            pairs = zip(members, columns, strict=True)
            table.add_row(metric, *(_judged_cell(row, metric, column.get(metric)) for row, column in pairs))
        print_table(table)


def _judged_cell(row: Mapping[str, Any], metric: str, cell: Sequence[float] | None) -> str:
    """A value with its interval, and with the number of images where these are not all images of the row."""
    if cell is None:
        return ""
    text = "{:.3f} ({:.3f} to {:.3f})".format(*cell)
    return f"{text}, n = {row['counts'][metric]}" if metric in row["counts"] else text


@maps_app.command("compare", short_help="Show how far the maps of two stores agree.")
def maps_compare(
    first: Annotated[Path, typer.Argument(parser=path_or_url, metavar="FIRST", help="Relevance store.")],
    second: Annotated[
        Path, typer.Argument(parser=path_or_url, metavar="SECOND", help="Another relevance store of the same data set.")
    ],
    top: Annotated[int, typer.Option(min=1, help="How many of the highest cells to compare.")] = 20,
    worst: Annotated[
        int, typer.Option(min=0, help="How many of the samples with the lowest agreement to list; 0 for none.")
    ] = 10,
) -> None:
    """Show how far the maps of two stores agree: rank correlation, overlap of the highest cells, the worst samples."""
    with reporting() as progress:
        from zpipe import open_maps
        from zpipe.pipeline.compare import compare_stores

        comparison = compare_stores(open_maps(first), open_maps(second), top=top, worst=worst, progress=progress)
        table = Table(show_header=False, title=f"{first} and {second}", title_justify="left")
        table.add_row("samples", f"{comparison.common} compared, {comparison.unusable} without a usable map in both")
        table.add_row("in one alone", f"{comparison.only_a} in the first, {comparison.only_b} in the second")
        for name, one, other in comparison.differing:
            table.add_row(name, f"{json.dumps(one)[:60]} and {json.dumps(other)[:60]}")
        table.add_row("quantiles", "5 %, 25 %, 50 %, 75 %, 95 %")
        table.add_row("rank correlation", ", ".join(f"{value:.4f}" for value in comparison.rank_correlation))
        table.add_row(f"top {comparison.top} shared", ", ".join(f"{value:.2f}" for value in comparison.top_overlap))
        print_table(table)
        rows = [{"key": key, "rank_correlation": rank, "shared": shared} for key, rank, shared in comparison.worst]
        print_rows(rows, title="lowest agreement")
