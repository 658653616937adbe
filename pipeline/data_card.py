"""The data card of a published store: README.md, with the front matter that the Hub reads."""

from __future__ import annotations

import math

from zpipe.pipeline.inspection import StoreStatistics
from zpipe.schemas.manifest import StoreManifest
from zpipe.schemas.names import printable

TAGS = ("zpipe", "relevance-maps", "explainability", "vision-transformer")

_PAGE = """{front}
# {title}

One relevance map per image: where a frozen vision transformer found the evidence for a class. The maps were computed by
`zpipe extract-teacher-maps`.

{facts}

## What was measured

{measures}

Entropy is that of a map as a distribution, in nats; the mass is the share of a map's positive relevance in its best
10 % of cells. Quantiles are over the samples with a usable map.

## Use

```sh
pip install 'zpipe[hub]'
zpipe maps pull {address} maps
```

```python
import zpipe

maps = zpipe.open_maps("maps")
key = next(iter(maps))
print(maps[key].shape, maps.table(["key", "label", "predicted", "entropy"]))
```

The images are not part of this data set. Training joins these maps with your own copy of the images: by the keys of the
samples, or with `--join image` (in Python `RelevanceLoader(shards, "maps", join="image")`) by a digest of the bytes of
each image, whatever your shards and keys are.

`index/*.parquet` holds one row per image: key, label, the class that the map explains, the teacher's best class,
probabilities, entropy, and the size of the image. `maps/*.zarr` holds the maps, Zarr v3 arrays that any reader of Zarr
opens.

## Licence

{licence}
The maps were computed from images that are not distributed here; the licence of the images is that of their owners.
"""


def data_card(statistics: StoreStatistics, address: str, *, license: str | None = None) -> str:
    """The data card of a store.

    Args:
        statistics: Statistics of the store, of its publishable manifest.
        address: Where the store is published, for the command that downloads it.
        license: Identifier of the licence of the maps, as the Hub lists them (``cc-by-4.0``); None if none is stated.

    Returns:
        Markdown with YAML front matter.
    """
    from huggingface_hub import DatasetCardData

    manifest = statistics.manifest
    title = printable(f"Relevance maps of {manifest.provenance.teacher} on {manifest.source}")
    front = DatasetCardData(
        license=license,
        pretty_name=title,
        task_categories=["image-classification"],
        tags=list(TAGS),
        size_categories=[_size_category(manifest.count)],
        configs=[{"config_name": "index", "data_files": "index/*.parquet"}],
    )
    licence = f"The maps are published under `{_plain(license)}`." if license else "No licence is stated for the maps."
    return _PAGE.format(
        front=f"---\n{front.to_yaml()}\n---",
        title=_plain(title),
        facts=_table("", "", _facts(manifest)),
        measures=_table("", "5 %, 25 %, 50 %, 75 %, 95 %", _measures(statistics)),
        address=address,
        licence=licence,
    )


def _facts(manifest: StoreManifest) -> list[tuple[str, str]]:
    origin = manifest.provenance
    arguments = ", ".join(f"{name}={value}" for name, value in origin.teacher_args.items()) or "none"
    statuses = ", ".join(f"{count} {status}" for status, count in manifest.statuses.items())
    height, width = origin.image_size
    return [
        ("maps", f"{manifest.count} ({statuses}) in {len(manifest.shards)} shards"),
        ("images", f"{manifest.source}"),
        ("teacher", f"{origin.teacher}, {origin.num_classes} classes, arguments: {arguments}"),
        ("weights", f"{origin.weights}, SHA-256 {origin.teacher_digest}"),
        ("method", f"{origin.method}{', symmetrised' if origin.symmetrised else ''}, from block {origin.start_layer}"),
        ("target class", origin.target),
        ("frame", f"{origin.frame}, {origin.crop_pct:g} of the image"),
        ("grid", f"{origin.grid[0]} x {origin.grid[1]} cells"),
        ("input", f"{width} x {height} pixels, {origin.interpolation}, mean {origin.mean}, std {origin.std}"),
        ("precision", origin.precision),
        ("fingerprint", origin.fingerprint()),
        ("zpipe", manifest.zpipe_version),
    ]


def _measures(statistics: StoreStatistics) -> list[tuple[str, str]]:
    rows = [("teacher's top-1", "no labels" if statistics.teacher_top1 is None else f"{statistics.teacher_top1:.1%}")]
    for name, values in (
        ("entropy", statistics.entropy),
        ("top-10 % mass", statistics.top10_mass),
        ("log10 of the scale", statistics.log10_scale),
    ):
        rows.append((name, ", ".join("-" if math.isnan(value) else f"{value:.3g}" for value in values)))
    rows.append(("bytes a sample", f"{statistics.size_bytes / max(1, statistics.manifest.count):.0f}"))
    return rows


def _table(left: str, right: str, rows: list[tuple[str, str]]) -> str:
    lines = [f"| {left} | {right} |", "|---|---|", *(f"| {name} | {_plain(value)} |" for name, value in rows)]
    return "\n".join(lines)


def _plain(text: str) -> str:
    """A text that Markdown and HTML show as it is, and that ends no row of a table."""
    text = printable(text).replace("&", "&amp;").replace("<", "&lt;")
    return "".join(f"\\{letter}" if letter in "\\`*_[]|#!" else letter for letter in text)


def _size_category(count: int) -> str:
    """The Hub's word for a number of samples."""
    steps = ["1K", "10K", "100K", "1M", "10M", "100M", "1B"]
    place = next((place for place, step in enumerate(range(3, 10)) if count < 10**step), len(steps))
    if place == 0:
        return "n<1K"
    return f"{steps[place - 1]}<n<{steps[place]}" if place < len(steps) else "1B<n<10B"
