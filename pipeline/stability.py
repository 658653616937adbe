"""How stable the map of an image is: does it survive noise that nobody can see?

The stability of a map is the Spearman rank correlation of its cells with those of the map, for the same class, of the
image plus uniform noise of a quarter of a grey level. Rounding to 8 bits moves a pixel by up to half a grey level, so a
map that changes under this noise shows more than its image. 1 is a stable map; 0 is one that the noise made anew.

The noise of an image depends on its key alone, not on the batch, the order of the images or the machine.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
import torch

from zpipe.pipeline.compare import spearman
from zpipe.pipeline.explainer import ExplainConfig, Explainer
from zpipe.pipeline.shard_reader import Frame, FramedImage, framed_batches, open_shards, read_samples
from zpipe.pipeline.teacher import load_teacher_of
from zpipe.schemas.errors import UsageError, ZpipeError
from zpipe.schemas.progress import Progress, silent
from zpipe.schemas.relevance_maps import RelevanceMaps
from zpipe.schemas.relevance_store import OK
from zpipe.schemas.shard_index import ShardEntry
from zpipe.schemas.storage import as_path

NOISE = 0.25  # largest change of a pixel, in grey levels of 255
BATCH_SIZE = 8
DECODERS = 2


def noise_of(key: str, shape: tuple[int, ...]) -> np.ndarray:
    """Uniform noise in [-NOISE, NOISE], float32 of that shape, in grey levels. The same key gets the same noise."""
    # A stream that is defined by its standard (FIPS 202): NumPy may change what its generators draw.
    stream = hashlib.shake_128(key.encode()).digest(2 * math.prod(shape))
    uniform = np.frombuffer(stream, "<u2").astype(np.float32) / np.float32(65535)  # [0, 1]
    return (NOISE * (2 * uniform - 1)).reshape(shape)


def add_noise(pixels: np.ndarray, keys: Sequence[str]) -> np.ndarray:
    """Images with the noise of their keys.

    Args:
        pixels: uint8 [n, H, W, 3].
        keys: Their n keys.

    Returns:
        float32 [n, H, W, 3], in grey levels; not clipped, as no model needs it.
    """
    noisy = pixels.astype(np.float32)
    for image, key in zip(noisy, keys, strict=True):
        image += noise_of(key, image.shape)
    return noisy


def stability(maps: np.ndarray, noisy: np.ndarray) -> np.ndarray:
    """The rank correlation of each map with that of the noisy image.

    Args:
        maps: Maps [n, gh, gw].
        noisy: Maps of the noisy images [n, gh, gw].

    Returns:
        float64 [n], -1 to 1; NaN where one of the two maps is constant or not finite.
    """
    values = np.full(len(maps), np.nan)
    for row, (a, b) in enumerate(zip(maps, noisy, strict=True)):  # one by one: the pairs of 1,369 cells take 4 MB
        if np.isfinite(a).all() and np.isfinite(b).all():
            values[row] = np.clip(spearman(a.reshape(1, -1), b.reshape(1, -1))[0], -1, 1)
    return values


def measure_stability(
    maps: RelevanceMaps,
    shards: str | Path,
    *,
    limit: int = 1_000,
    device: str = "auto",
    weights: str | None = None,
    progress: Progress = silent,
) -> dict[str, float]:
    """Measure the stability of the maps of a store that has no column of it, with the teacher that made them.

    Both maps are computed anew, in the precision of the store: it takes two maps' time per image.

    Args:
        maps: The store.
        shards: Folder or URL of the tars that it was made from.
        limit: The maximum number of images: the first ones of the store that have a usable map.
        device: `cpu`, `cuda` or `auto`, which takes CUDA where there is any.
        weights: Where the teacher's weights are now; None looks where the store says that they were.
        progress: Reports the images that have been measured.

    Returns:
        Key -> stability, in the order of the store; without images whose map is constant.

    Raises:
        UsageError: The store holds no maps of a teacher, `limit` is less than 1, or the weights are not there.
        ZpipeError: The weights or the tars are not those that the maps were made from, or cannot be read.
    """
    origin = maps.manifest.provenance
    if limit < 1:
        raise UsageError(f"--limit {limit}: give a number >= 1")
    if not maps.kind.is_relevance:
        raise UsageError(f"{maps.path}: holds no maps of a teacher; give a store that does")
    explainer = _explainer_of(maps, device, weights)
    frame = Frame(
        kind=origin.frame, size=origin.image_size, interpolation=origin.interpolation, crop_pct=origin.crop_pct
    )
    total = min(limit, maps.manifest.statuses.get(OK, 0))
    values: dict[str, float] = {}
    for path, entry, targets, label_field in _shards_of(maps, as_path(shards), progress):
        chosen = dict(islice(targets.items(), total - len(values)))
        if not chosen:
            continue
        found = (sample for sample in read_samples(path, entry, label_field=label_field) if sample.key in chosen)
        # The tar in which `limit` is reached is not read to its end, at which the digests of others are compared.
        samples = islice(found, len(chosen)) if len(chosen) < len(targets) else found
        for batch in framed_batches(samples, frame, batch_size=BATCH_SIZE, threads=DECODERS):
            values |= _of_batch(explainer, batch, np.array([chosen[item.key] for item in batch], np.int64))
            progress("stability", len(values), total)
        if len(values) >= total:
            break
    return {key: value for key, value in values.items() if not math.isnan(value)}


def _of_batch(explainer: Explainer, batch: list[FramedImage], targets: np.ndarray) -> dict[str, float]:
    keys = [item.key for item in batch]
    if unseen := [item for item in batch if item.pixels is None]:
        raise ZpipeError(f"key {unseen[0].key}: has a map, but its image can't be decoded here ({unseen[0].problem})")
    pixels = np.stack([item.pixels for item in batch if item.pixels is not None])  # uint8 [n, H, W, 3]
    clean, noisy = explainer.maps_of(pixels, targets), explainer.maps_of(add_noise(pixels, keys), targets)
    return dict(zip(keys, stability(clean, noisy).tolist(), strict=True))


def _shards_of(
    maps: RelevanceMaps, shards: Path, progress: Progress
) -> Iterator[tuple[Path, ShardEntry, dict[str, int], str | None]]:
    """Of each shard of the store: its tar, the tar's index entry, key -> class of its usable maps, and its labels."""
    tars, index = open_shards(shards, progress=progress)
    entries = {entry.stem: (path, entry) for path, entry in tars}
    remedy = f"give the tars that {maps.path} was made from"
    for shard in maps.manifest.shards:
        if shard.stem not in entries:
            raise ZpipeError(f"{shards}: has no {shard.stem}.tar; {remedy}")
        path, entry = entries[shard.stem]
        if entry.sha256 != shard.input_sha256:
            raise ZpipeError(
                f"{path}: SHA-256 {entry.sha256[:12]}, its maps were made from {shard.input_sha256[:12]}; {remedy}"
            )
        rows = maps.index(shard.stem, ["key", "target", "status"]).to_pylist()
        yield path, entry, {row["key"]: row["target"] for row in rows if row["status"] == OK}, index.label_field


def _explainer_of(maps: RelevanceMaps, device: str, weights: str | None) -> Explainer:
    origin = maps.manifest.provenance
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    teacher = load_teacher_of(maps.path, origin, weights=weights, device=device)
    config = ExplainConfig(
        method=origin.method, target="predicted", symmetrise=origin.symmetrised, precision=origin.precision
    )
    return Explainer(teacher, config, batch_size=BATCH_SIZE, device=device)
