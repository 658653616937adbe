"""The manifest of a store, and the provenance of its maps: everything that determines their values."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from zpipe.schemas.atomic import read_json, write_json
from zpipe.schemas.errors import ZpipeError
from zpipe.schemas.formats import check_format, header
from zpipe.schemas.sample import shard_stem
from zpipe.schemas.storage import as_path, check_reachable

MANIFEST_NAME = "manifest.json"
EXTRACTION_NAME = "extraction.json"
FORMAT = "zpipe-relevance-store"
STORE_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """What determines the values of a store's maps. Stores with equal fingerprints hold the same kind of maps."""

    teacher: str
    """timm's name of the teacher."""
    teacher_args: dict[str, Any]
    """Arguments of its constructor, as JSON values."""
    weights: str
    """Where its weights were read from; for the reader, not compared."""
    seed: int | None
    """Seed of random weights, None for others; for the reader, not compared."""
    teacher_digest: str
    """SHA-256 (hex) of its weights."""
    num_classes: int
    """Number of its classes."""
    method: str
    """Attribution method."""
    start_layer: int
    """First block whose attention counts."""
    target: str
    """Class that a map explains: ``ground-truth``, ``predicted``, ``class:K``; ``none`` for methods without a class."""
    frame: str
    """What the teacher saw of an image: ``full`` or ``center``."""
    grid: tuple[int, int]
    """Height and width of a map in cells."""
    image_size: tuple[int, int]
    """Height and width of the teacher's input in pixels."""
    mean: tuple[float, ...]
    """Mean of each channel, subtracted from pixels in 0 to 1."""
    std: tuple[float, ...]
    """Standard deviation of each channel."""
    interpolation: str
    """How images were resized."""
    crop_pct: float
    """Fraction of an image that the frame shows."""
    symmetrised: bool
    """Whether maps are the mean of those of the image and of its mirror image."""
    precision: str
    """Precision of the forward pass and of the relevance sweep."""
    store_version: int = STORE_VERSION
    """Version of the store's format."""

    # The path that the weights were read from, and the seed, may differ while the weights are the same.
    NOT_COMPARED = ("weights", "seed")

    def compared(self) -> dict[str, Any]:
        """The fields that must agree, as JSON values."""
        plain = json.loads(json.dumps(asdict(self)))
        return {name: value for name, value in plain.items() if name not in self.NOT_COMPARED}

    def fingerprint(self) -> str:
        """SHA-256 (hex) over the compared fields."""
        return hashlib.sha256(json.dumps(self.compared(), sort_keys=True).encode()).hexdigest()

    @classmethod
    def from_json(cls, value: dict[str, Any], path: Path) -> Provenance:
        """The provenance in a JSON object of the file `path`.

        Raises :class:`ZpipeError` for a missing or unknown field.
        """
        names = {field.name for field in fields(cls)}
        if set(value) != names:
            odd = sorted(set(value) ^ names)[0]
            raise ZpipeError(f"{path}: provenance field {odd!r} missing or unknown; extract again with this version")
        tuples = {name: tuple(value[name]) for name in ("grid", "image_size", "mean", "std")}
        return cls(**(value | tuples))


def check_compatible(existing: Provenance, wanted: Provenance, path: Path) -> None:
    """Raise :class:`ZpipeError` with both values of the first field in which the store at `path` differs."""
    old, new = existing.compared(), wanted.compared()
    for name in old:
        if old[name] != new[name]:
            raise ZpipeError(
                f"{path}: made with {name} = {_short(old[name])}, this run has {_short(new[name])}; "
                "give another --out folder, the settings that made this store, or --replace to start over"
            )


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + '..."'


@dataclass(frozen=True, kw_only=True)
class MapShard:
    """One finished map shard."""

    stem: str
    """Stem of the tar that it was made from."""
    count: int
    """Number of samples."""
    input_sha256: str
    """SHA-256 (hex) of the tar."""
    index_sha256: str
    """SHA-256 (hex) of the index file."""


@dataclass(frozen=True, kw_only=True)
class StoreManifest:
    """The manifest of a finished store, written last."""

    provenance: Provenance
    """What the maps were made with."""
    shards: tuple[MapShard, ...]
    """The map shards, in the order of the tars."""
    statuses: dict[str, int]
    """Samples per status."""
    source: str
    """Folder or URL of the tars."""
    zpipe_version: str
    """Version of zpipe that wrote the manifest."""

    @property
    def count(self) -> int:
        """Number of samples."""
        return sum(shard.count for shard in self.shards)


def write_manifest(root: Path, manifest: StoreManifest) -> None:
    """Write `manifest.json`, about 250 bytes per shard."""
    value = header(FORMAT, STORE_VERSION) | {"count": manifest.count} | asdict(manifest)
    write_json(as_path(root) / MANIFEST_NAME, value)


def read_manifest(root: Path) -> StoreManifest:
    """Read and check `manifest.json`. Raises :class:`ZpipeError` if the store is unfinished or the file is damaged."""
    path = as_path(root) / MANIFEST_NAME
    check_reachable(path)
    if not path.is_file():
        if (as_path(root) / EXTRACTION_NAME).is_file():
            raise ZpipeError(
                f"{root}: the extraction is not finished (no {MANIFEST_NAME}); run extract-teacher-maps again to go on"
            )
        raise ZpipeError(f"{root}: not a relevance store (no {MANIFEST_NAME}); zpipe extract-teacher-maps makes one")
    value = read_json(path, "a store manifest")
    check_format(path, value, FORMAT, STORE_VERSION, remedy="extract again")
    try:
        odd = next((shard["stem"] for shard in value["shards"] if not _is_name(shard["stem"])), None)
        if odd is not None:
            raise ZpipeError(f"{path}: shard {odd!r} is no name of a file in this store; extract again")
        return StoreManifest(
            provenance=Provenance.from_json(value["provenance"], path),
            shards=tuple(MapShard(**shard) for shard in value["shards"]),
            statuses=value["statuses"],
            source=value["source"],
            zpipe_version=value["zpipe_version"],
        )
    except (KeyError, TypeError) as error:
        raise ZpipeError(f"{path}: not a complete manifest ({error}); extract again") from error


def _is_name(stem: Any) -> bool:
    """Whether it is a plain file name, which cannot lead out of the store."""
    return isinstance(stem, str) and shard_stem(stem) == stem and stem not in ("", ".", "..") and "\0" not in stem


def write_extraction(root: Path, provenance: Provenance) -> None:
    """Mark `root` as a store in progress, with the provenance its shards will have."""
    write_json(as_path(root) / EXTRACTION_NAME, header(FORMAT, STORE_VERSION) | {"provenance": asdict(provenance)})


def read_extraction(root: Path) -> Provenance | None:
    """The provenance that the store at `root` was begun with; None if there is none."""
    path = as_path(root) / EXTRACTION_NAME
    if not path.is_file():
        return None
    value = read_json(path, "an extraction record")
    remedy = "give another --out folder"
    check_format(path, value, FORMAT, STORE_VERSION, remedy=remedy)
    if not isinstance(value.get("provenance"), dict):
        raise ZpipeError(f"{path}: not an extraction record (no provenance); {remedy}")
    return Provenance.from_json(value["provenance"], path)
