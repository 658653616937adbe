"""The data card of a published store: README.md, with the front matter that the Hub reads."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from types import MappingProxyType

from zpipe.pipeline.inspection import StoreStatistics
from zpipe.schemas.manifest import Provenance, StoreManifest
from zpipe.schemas.names import printable
from zpipe.schemas.tensor_kinds import KINDS

TAGS = ("zpipe",)
RELEVANCE_TAGS = ("relevance-maps", "explainability")
TEACHER_TAGS = ("vision-transformer",)

_PAGE = """{front}
# {title}

{what}

{facts}
{inner}
## What was measured

{measures}

{quantiles}

## Use

```sh
pip install 'zpipe[hub]'
zpipe maps pull {address} maps
```

```python
import zpipe

maps = zpipe.open_maps("maps")
key = next(iter(maps))
print(maps[key].shape, maps.table({columns}))
```

The images are not part of this data set. Training joins these {noun} with your own copy of the images: {join}

`index/*.parquet` holds one row per image: {row}, and the size of the image.
`maps/*.zarr` holds the {noun}, Zarr v3 arrays that any reader of Zarr opens.

## Licence

{licence}
The {noun} were computed from images that are not distributed here; the licence of the images is that of their owners.
"""

_NOUNS = {
    "map": "maps",
    "class-maps": "class maps",
    "features": "features",
    "label-map": "label maps",
    "vector": "vectors",
}
_JOIN = """by the keys
of the samples, or with {choice} by a digest of the bytes of
each image, whatever your shards and keys are."""
_JOIN_BY_KEY = """by the keys
of the samples, in the tars that they were made from. The index has no digests of the images, by which other tars
could be joined."""


def data_card(
    statistics: StoreStatistics,
    address: str,
    *,
    license: str | None = None,
    has_digests: bool = True,
    inner: Mapping[str, StoreManifest] = MappingProxyType({}),
) -> str:
    """The data card of a store.

    Args:
        statistics: Statistics of the store, of its publishable manifest.
        address: Where the store is published, for the command that downloads it.
        license: Identifier of the licence of the maps, as the Hub lists them (``cc-by-4.0``); None if none is stated.
        has_digests: Whether every index has the digests of the images.
        inner: Folder -> manifest of the stores inside it that are published too.

    Returns:
        Markdown with YAML front matter.
    """
    from huggingface_hub import DatasetCardData

    manifest = statistics.manifest
    origin = manifest.provenance
    noun = _NOUNS[origin.kind]
    title = printable(_title(manifest))
    tags = (*TAGS, *(RELEVANCE_TAGS if _is_relevance(origin) else ()), *(TEACHER_TAGS if origin.teacher else ()))
    front = DatasetCardData(
        license=license,
        pretty_name=title,
        task_categories=["image-classification"] if origin.teacher else None,
        tags=list(tags),
        size_categories=[_size_category(manifest.count)],
        configs=[{"config_name": "index", "data_files": "index/*.parquet"}],
    )
    licence = (
        f"The {noun} are published under `{_plain(license)}`." if license else f"No licence is stated for the {noun}."
    )
    return _PAGE.format(
        front=f"---\n{front.to_yaml()}\n---",
        title=_plain(title),
        what=_what(origin),
        facts=_table("", "", _facts(manifest)),
        inner=_inner(inner),
        measures=_table("", "5 %, 25 %, 50 %, 75 %, 95 %", _measures(statistics)),
        quantiles=_quantiles(origin),
        address=address,
        columns=json.dumps(_shown_columns(origin)),
        noun=noun,
        join=_JOIN.format(choice=_image_join(origin)) if has_digests else _JOIN_BY_KEY,
        row=_row(origin, has_digests),
        licence=licence,
    )


def _is_relevance(origin: Provenance) -> bool:
    """Whether the tensors are maps of a teacher's relevance; a mask is a map, too."""
    return bool(origin.teacher) and KINDS[origin.kind].is_relevance


def _title(manifest: StoreManifest) -> str:
    origin = manifest.provenance
    if _is_relevance(origin):
        return f"Relevance maps of {origin.teacher} on {manifest.source}"
    if origin.teacher:
        return f"{origin.method.capitalize()} of {origin.teacher} on {manifest.source}"
    return f"{origin.method}: {_NOUNS[origin.kind]} on {manifest.source}"


def _image_join(origin: Provenance) -> str:
    """How the tensors are joined by the digests of images."""
    if _is_relevance(origin) and origin.kind == "map":
        return '`--join image` (in Python `RelevanceLoader(shards, "maps", batch_size=128, join="image")`)'
    name = origin.method if origin.method.isidentifier() else "tensors"
    stores = json.dumps({"relevance" if _is_relevance(origin) else name: "maps"})
    return f'`RelevanceLoader(shards, {stores}, batch_size=128, join="image")`'


def _what(origin: Provenance) -> str:
    """What the tensors are, in two sentences."""
    first = origin.sample_shape[0]
    if _is_relevance(origin):
        one = "One relevance map" if origin.kind == "map" else f"{first} relevance maps"
        classes = "a class" if origin.kind == "map" else f"each of {first} classes"
        what = f"{one} per image: where a frozen vision transformer found the evidence for {classes}."
    else:
        what = {
            "map": "One map per image.",
            "class-maps": f"{first} maps per image, one for each class.",
            "features": f"{origin.sample_shape[-1]} values for each cell of a grid over each image.",
            "label-map": "One label map per image: a whole number for each cell of a grid.",
            "vector": f"One vector of {first} values per image.",
        }[origin.kind]
        if origin.teacher:
            what += f" They are the {_plain(origin.method)} of a frozen vision transformer."
    command = "zpipe extract-teacher-maps" if origin.teacher else "zpipe.pipeline.save_tensors"
    return f"{what}\nThe {_NOUNS[origin.kind]} were computed by `{command}`."


def _facts(manifest: StoreManifest) -> list[tuple[str, str]]:
    origin = manifest.provenance
    statuses = ", ".join(f"{count} {status}" for status, count in manifest.statuses.items())
    shape = " x ".join(map(str, origin.sample_shape))
    rows = [
        (_NOUNS[origin.kind], f"{manifest.count} ({statuses}) in {len(manifest.shards)} shards"),
        ("images", f"{manifest.source}"),
    ]
    if origin.kind != "map":
        rows.append(("shape", f"{shape}, {KINDS[origin.kind].dtype.name}"))
    rows += _teacher_facts(origin) if origin.teacher else [("name", origin.method)]
    if KINDS[origin.kind].is_dense:
        rows.append(("grid", f"{origin.grid[0]} x {origin.grid[1]} cells"))
    return [*rows, ("fingerprint", origin.fingerprint()), ("zpipe", manifest.zpipe_version)]


def _teacher_facts(origin: Provenance) -> list[tuple[str, str]]:
    arguments = ", ".join(f"{name}={value}" for name, value in origin.teacher_args.items()) or "none"
    height, width = origin.image_size
    rows = [
        ("teacher", f"{origin.teacher}, {origin.num_classes} classes, arguments: {arguments}"),
        ("weights", f"{origin.weights}{origin.head_note}, SHA-256 {origin.teacher_digest}"),
    ]
    if _is_relevance(origin):
        method = f"{origin.method}{', symmetrised' if origin.symmetrised else ''}, from block {origin.start_layer}"
        rows += [("method", method), ("target class", origin.target)]
    return [
        *rows,
        ("frame", f"{origin.frame}, {origin.crop_pct:g} of the image"),
        ("input", f"{width} x {height} pixels, {origin.interpolation}, mean {origin.mean}, std {origin.std}"),
        ("precision", f"{origin.precision} on {origin.device}" if origin.device else origin.precision),
    ]


def _inner(stores: Mapping[str, StoreManifest]) -> str:
    """The stores inside a store: a table, or nothing."""
    if not stores:
        return ""
    rows = []
    for folder, manifest in stores.items():
        origin = manifest.provenance
        shape = " x ".join(map(str, origin.sample_shape))
        rows.append((f"`{folder}`", f"{manifest.count} {_NOUNS[origin.kind]} of {shape}, method {origin.method}"))
    table = _table("", "", rows)
    return f"\nStores inside this one, in folders of these names; `zpipe maps pull` brings them too:\n\n{table}\n"


def _measures(statistics: StoreStatistics) -> list[tuple[str, str]]:
    origin = statistics.manifest.provenance
    kind = KINDS[origin.kind]
    rows = []
    if _is_relevance(origin):
        top1 = "no labels" if statistics.teacher_top1 is None else f"{statistics.teacher_top1:.1%}"
        rows.append(("teacher's top-1", top1))
    measures = {"entropy": statistics.entropy, "top-10 % mass": statistics.top10_mass} if kind.is_relevance else {}
    if kind.dtype.kind == "f":  # whole numbers have no scale
        measures["log10 of the scale"] = statistics.log10_scale
    for name, values in measures.items():
        rows.append((name, ", ".join("-" if math.isnan(value) else f"{value:.3g}" for value in values)))
    rows.append(("bytes a sample", f"{statistics.size_bytes / max(1, statistics.manifest.count):.0f}"))
    return rows


def _quantiles(origin: Provenance) -> str:
    """What the measures are."""
    kind = KINDS[origin.kind]
    if kind.is_relevance:
        which = "a map" if kind.axes == "hw" else "the first map of a sample"
        measured = (
            f"Entropy is that of {which} as a distribution, in nats; the mass is the share of its positive values\n"
            "in its best 10 % of cells. Quantiles are over the samples with a usable map."
        )
    elif kind.dtype.kind == "f":
        measured = (
            "The scale of a sample is its largest magnitude. Quantiles are over the samples whose scale is not zero."
        )
    else:
        measured = "Whole numbers are stored as they are."
    return measured


def _shown_columns(origin: Provenance) -> list[str]:
    """The columns of the index that the example shows."""
    return ["key", "label", *(["predicted"] if origin.teacher else []), *(["entropy"] if _is_relevance(origin) else [])]


def _row(origin: Provenance, has_digests: bool) -> str:
    """What a row of the index holds."""
    parts = ["key", "label"]
    if has_digests:
        parts.append("the digest of the image (`image_digest`)")
    if _is_relevance(origin):
        parts.append("the class that the map explains")
        if origin.kind == "class-maps":
            parts[-1] = "the classes that the maps explain, in their order (`targets`)"
    if origin.teacher:
        parts += ["the teacher's best class", "probabilities"]
    if KINDS[origin.kind].is_relevance:
        parts.append("entropy")
    return ", ".join(parts)


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
