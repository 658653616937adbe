"""Look into a store: what it holds in numbers, and one sample as a picture."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from PIL import Image

from zpipe.pipeline.shard_reader import open_image, read_samples
from zpipe.schemas.atomic import commit
from zpipe.schemas.errors import UsageError, ZpipeError
from zpipe.schemas.manifest import StoreManifest
from zpipe.schemas.relevance_maps import RelevanceMaps
from zpipe.schemas.relevance_store import OK, labels_named
from zpipe.schemas.sample import DECODE_ERRORS, Sample
from zpipe.schemas.shard_index import find_shards
from zpipe.schemas.storage import as_path, check_reachable, folder_bytes


@dataclass(frozen=True, kw_only=True)
class StoreFigures:
    """A store in numbers. `bytes` is its size on disk; `teacher_top1` the share of usable, labelled samples whose label the
    teacher predicts, None where there are none; the quantiles are (5, 25, 50, 75, 95) % of entropy (nats), decimal logarithm of the scale, and mass in the
    top 10 % of cells, over samples with a usable map.
    """

    manifest: StoreManifest
    bytes: int
    teacher_top1: float | None
    entropy: tuple[float, ...]
    log10_scale: tuple[float, ...]
    top10_mass: tuple[float, ...]
    histograms: dict[str, Histogram]


@dataclass(frozen=True, kw_only=True)
class Histogram:
    """Counts in equal steps from the smallest value to the largest."""

    counts: tuple[int, ...]
    low: float
    high: float

    def bars(self) -> str:
        """One character a step, its height the share of the fullest step."""
        most = max(self.counts, default=0) or 1
        return "".join(" ▁▂▃▄▅▆▇█"[-(-8 * count // most)] for count in self.counts)


def _histogram(values: np.ndarray, steps: int = 32) -> Histogram:
    if not len(values):
        return Histogram(counts=(), low=math.nan, high=math.nan)
    counts, edges = np.histogram(values, bins=steps)
    return Histogram(counts=tuple(int(count) for count in counts), low=float(edges[0]), high=float(edges[-1]))


def store_figures(root: Path) -> StoreFigures:
    """Read a store's index (not its maps). About 40 bytes a sample are read."""
    maps = RelevanceMaps(root)
    table = maps.table(["label", "predicted", "entropy", "scale", "top10_mass", "status"])
    usable = table["status"].to_numpy(zero_copy_only=False) == OK
    columns = {name: table[name].to_numpy() for name in ("entropy", "scale", "top10_mass")}
    named, labelled = labels_named(table)
    shown = {
        "entropy": columns["entropy"][usable],
        "log10_scale": np.log10(columns["scale"][usable]),
        "top10_mass": columns["top10_mass"][usable],
    }
    return StoreFigures(
        manifest=maps.manifest,
        bytes=folder_bytes(as_path(root)),
        teacher_top1=named / labelled if labelled else None,
        **{name: _quantiles(values) for name, values in shown.items()},
        histograms={name: _histogram(values) for name, values in shown.items()},
    )


def _quantiles(values: np.ndarray) -> tuple[float, ...]:
    if not len(values):
        return (float("nan"),) * 5
    return tuple(float(value) for value in np.quantile(values, (0.05, 0.25, 0.5, 0.75, 0.95)))


def show_map(root: Path, key: str, out: Path, shards: Path | None = None) -> Path:
    """Write a PNG of one sample: image, map, map over image. `shards` defaults to where the manifest says they were.

    Errors: :class:`UsageError` for an unknown key; :class:`ZpipeError` when the shards aren't there.
    """
    maps = RelevanceMaps(root, normalise="minmax")
    if key not in maps:
        some = ", ".join(list(maps)[:3])
        raise UsageError(f"{root}: no map for key {key!r}; keys look like {some}")
    stem, row = maps.place(key)
    status = maps.index(stem, ["status"])["status"][row].as_py()
    if status != OK:
        raise ZpipeError(f"{root}: key {key}: has no usable map ({status})")
    image = _find_image(as_path(shards or maps.manifest.source), stem, key)
    width, height = image.size
    extent = (0, width, height, 0)
    figure, axes = plt.subplots(1, 3, figsize=(9, 3 * height / width + 0.4))
    for axis, title in zip(axes, (key, "relevance", "overlay"), strict=True):
        axis.set_title(title, fontsize=9)
        axis.set_axis_off()
    axes[0].imshow(image, extent=extent)
    axes[1].imshow(maps[key], extent=extent, cmap="inferno", interpolation="nearest")
    axes[2].imshow(image, extent=extent)
    axes[2].imshow(maps[key], extent=extent, cmap="inferno", interpolation="bilinear", alpha=0.6)
    figure.tight_layout(pad=0.4)
    with commit(out) as tmp:
        figure.savefig(tmp, format="png", dpi=120)
    plt.close(figure)
    return out


def _find_image(shards: Path, stem: str, key: str) -> Image.Image:
    check_reachable(shards)
    # Its name is known: neither the index nor, where there is none, all other tars need be read.
    tar = shards if shards.name == f"{stem}.tar" else shards / f"{stem}.tar"
    if tar.is_file():
        for sample in read_samples(tar):
            if sample.key == key:
                return _decoded(sample, tar)
    find_shards(shards)  # has more to say about a folder that isn't there or holds no tar
    raise ZpipeError(f"{shards}: has no tar {stem}.tar with key {key}; give the shards of this store with --shards")


def _decoded(sample: Sample, tar: Path) -> Image.Image:
    try:
        with open_image(sample.image) as image:
            return image.convert("RGB")
    except DECODE_ERRORS as error:
        raise ZpipeError(
            f"{tar}: key {sample.key}: can't be decoded ({error}); give the shards of this store with --shards"
        ) from error
