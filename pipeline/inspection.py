"""Look into a store: statistics of its maps, and one sample as a picture."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from PIL import Image

from zpipe.pipeline.shard_reader import read_samples
from zpipe.schemas.atomic import check_out_file, commit
from zpipe.schemas.errors import UsageError, ZpipeError
from zpipe.schemas.images import DECODE_ERRORS, open_image, to_rgb
from zpipe.schemas.manifest import EXTRACTION_NAME, MANIFEST_NAME, StoreManifest
from zpipe.schemas.names import printable
from zpipe.schemas.relevance_maps import RelevanceMaps
from zpipe.schemas.relevance_store import OK, IndexFile, count_correct_labels, index_path
from zpipe.schemas.sample import Sample
from zpipe.schemas.shard_index import find_tar
from zpipe.schemas.storage import as_path, file_sizes, folder_bytes


@dataclass(frozen=True, kw_only=True)
class StoreStatistics:
    """Statistics of a store. Quantiles are (5, 25, 50, 75, 95) %, over samples with a usable map."""

    manifest: StoreManifest
    """Its manifest."""
    size_bytes: int
    """Its size on disk in bytes."""
    teacher_top1: float | None
    """Fraction of the usable, labelled samples whose label is the teacher's best class; None where there are none."""
    entropy: tuple[float, ...]
    """Quantiles of the entropy of a map, in nats."""
    log10_scale: tuple[float, ...]
    """Quantiles of the decimal logarithm of the scale."""
    top10_mass: tuple[float, ...]
    """Quantiles of the mass in the top 10 % of cells, 0 to 1."""
    stability: tuple[float, ...] | None
    """Quantiles of the stability of a map, -1 to 1; None where it was not measured."""
    histograms: dict[str, Histogram]
    """Histograms of these four, by name."""


@dataclass(frozen=True, kw_only=True)
class Histogram:
    """Counts of values in bins of equal width."""

    counts: tuple[int, ...]
    """Number of values in each bin."""
    low: float
    """The smallest value."""
    high: float
    """The largest value."""

    def bars(self) -> str:
        """One character per bin, whose height is the bin's fraction of the fullest one."""
        most = max(self.counts, default=0) or 1
        return "".join(" ▁▂▃▄▅▆▇█"[-(-8 * count // most)] for count in self.counts)


def _histogram(values: np.ndarray, steps: int = 32) -> Histogram:
    # A map without positive cells has neither entropy nor mass; in float32 there may be no 32 bins between neighbours.
    values = values[np.isfinite(values)].astype(np.float64)
    if not len(values):
        return Histogram(counts=(), low=math.nan, high=math.nan)
    counts, edges = np.histogram(values, bins=steps)
    return Histogram(counts=tuple(int(count) for count in counts), low=float(edges[0]), high=float(edges[-1]))


def store_statistics(root: Path) -> StoreStatistics:
    """Compute the statistics of a store from its index, about 40 bytes per sample; the maps are not read."""
    maps = RelevanceMaps(root)
    more = ["stability"] if has_stability(maps) else []
    table = maps.table(["label", "target", "predicted", "entropy", "scale", "top10_mass", "status", *more])
    usable = table["status"].to_numpy(zero_copy_only=False) == OK
    usable &= table["scale"].to_numpy() > 0  # an index may lie
    columns = {name: table[name].to_numpy() for name in ("entropy", "scale", "top10_mass")}
    correct, labelled = count_correct_labels(table, maps.manifest.provenance.target)
    measures = {
        "entropy": columns["entropy"][usable],
        "log10_scale": np.log10(columns["scale"][usable]),
        "top10_mass": columns["top10_mass"][usable],
    }
    measures |= {name: table[name].to_numpy()[usable] for name in more}
    quantiles = {name: _quantiles(values) for name, values in measures.items()}
    return StoreStatistics(
        manifest=maps.manifest,
        size_bytes=_own_bytes(as_path(root)),
        teacher_top1=correct / labelled if labelled and maps.kind.is_relevance else None,
        stability=quantiles.pop("stability", None),
        **quantiles,
        histograms={name: _histogram(values) for name, values in measures.items()},
    )


def has_stability(maps: RelevanceMaps) -> bool:
    """Whether the store has the stability of its maps."""
    # All shards are alike in this, see `store_plan`, so that the index of one is enough.
    first = maps.manifest.shards[:1]
    return any("stability" in IndexFile(index_path(maps.path, shard.stem)).columns for shard in first)


def _own_bytes(root: Path) -> int:
    """Size of a store in bytes, without the stores inside it."""
    names = (EXTRACTION_NAME, MANIFEST_NAME)
    return sum(file_sizes(root, names).values()) + sum(folder_bytes(root / name) for name in ("index", "maps"))


def _quantiles(values: np.ndarray) -> tuple[float, ...]:
    values = values[np.isfinite(values)]
    if not len(values):
        return (float("nan"),) * 5
    return tuple(float(value) for value in np.quantile(values, (0.05, 0.25, 0.5, 0.75, 0.95)))


def show_map(root: Path, key: str, out: Path, shards: Path | None = None) -> Path:
    """Write a PNG of one sample: its image, its map (of several, the first), and the map over the image.

    Args:
        root: Folder or URL of the store.
        key: Key of the sample.
        out: The PNG to write.
        shards: Folder or URL of the tars; None takes the one in the manifest.

    Returns:
        `out`.

    Raises:
        UsageError: The store holds no maps, the key is unknown, or `out` is no name of a PNG, or a file that zpipe did
            not write.
        ZpipeError: The sample has no usable map, or its image is not there or cannot be decoded.
    """
    check_out_file(out, (".png",))
    maps = RelevanceMaps(root)
    if not maps.kind.is_relevance:
        kind = maps.manifest.provenance.kind
        raise UsageError(f"{root}: holds {kind}, of which there is no picture; give a store of maps")
    maps = RelevanceMaps(root, normalise="minmax")
    if key not in maps:
        some = ", ".join(list(maps)[:3])
        raise UsageError(f"{root}: no map for key {printable(key)!r}; keys look like {some}")
    stem, row = maps.place(key)
    status = maps.index(stem, ["status"])["status"][row].as_py()
    if status != OK:
        raise ZpipeError(f"{root}: key {key}: has no usable map ({status})")
    image = _find_image(as_path(shards or maps.manifest.source), stem, key)
    relevance = maps[key] if maps[key].ndim == 2 else maps[key][0]  # of several classes, that of the best one
    width, height = image.size
    extent = (0, width, height, 0)
    # A strip of a pixel's width is not to make a picture of a kilometre's height.
    figure, axes = plt.subplots(1, 3, figsize=(9, 3 * min(max(height / width, 0.1), 5) + 0.4))
    for axis, title in zip(axes, (key, "relevance", "overlay"), strict=True):
        axis.set_title(title, fontsize=9, parse_math=False)  # a key may hold dollar signs
        axis.set_axis_off()
    axes[0].imshow(image, extent=extent)
    axes[1].imshow(relevance, extent=extent, cmap="inferno", interpolation="nearest")
    axes[2].imshow(image, extent=extent)
    axes[2].imshow(relevance, extent=extent, cmap="inferno", interpolation="bilinear", alpha=0.6)
    figure.tight_layout(pad=0.4)
    with commit(out) as tmp:
        figure.savefig(tmp, format="png", dpi=120, metadata={"Software": "zpipe"})  # known by it as ours
    plt.close(figure)
    return out


def _find_image(shards: Path, stem: str, key: str) -> Image.Image:
    # The name of the tar is known, so without an index the other tars need not be read.
    tar, label_field = find_tar(shards, stem)
    if tar is not None:
        for sample in read_samples(tar, label_field=label_field):
            if sample.key == key:
                return _decoded(sample, tar)
    raise ZpipeError(f"{shards}: has no tar {stem}.tar with key {key}; give the shards of this store with --shards")


def _decoded(sample: Sample, tar: Path) -> Image.Image:
    try:
        with open_image(sample.image) as image:
            return to_rgb(image)
    except DECODE_ERRORS as error:
        raise ZpipeError(
            f"{tar}: key {sample.key}: can't be decoded ({error}); give the shards of this store with --shards"
        ) from error
