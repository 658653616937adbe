"""Where relevance maps come from: everything that decides their values, its fingerprint, and the check of two of them."""

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
    """What decides the values of a store's maps. Two stores with equal fingerprints hold the same kind of maps.

    `weights` and `seed` are said for the reader; the digest of the teacher's weights is what counts.
    """

    teacher: str
    teacher_args: dict[str, Any]
    weights: str
    seed: int | None
    teacher_digest: str
    num_classes: int
    method: str
    start_layer: int
    target: str
    frame: str
    grid: tuple[int, int]
    image_size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str
    crop_pct: float
    symmetrised: bool
    precision: str
    store_version: int = STORE_VERSION

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
        names = {field.name for field in fields(cls)}
        if set(value) != names:
            odd = sorted(set(value) ^ names)[0]
            raise ZpipeError(f"{path}: provenance field {odd!r} missing or unknown; extract again with this version")
        tuples = {name: tuple(value[name]) for name in ("grid", "image_size", "mean", "std")}
        return cls(**(value | tuples))


def check_compatible(found: Provenance, wanted: Provenance, path: Path) -> None:
    """Errors: :class:`ZpipeError` showing the first differing field, both values side by side."""
    old, new = found.compared(), wanted.compared()
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
    """One finished map shard: the input tar's stem, count and digest, and the digest of the index file."""

    stem: str
    count: int
    input_sha256: str
    index_sha256: str


@dataclass(frozen=True, kw_only=True)
class StoreManifest:
    """The manifest of a finished store, written last. `statuses` counts samples per status."""

    provenance: Provenance
    shards: tuple[MapShard, ...]
    statuses: dict[str, int]
    source: str
    zpipe_version: str

    @property
    def count(self) -> int:
        return sum(shard.count for shard in self.shards)


def write_manifest(root: Path, manifest: StoreManifest) -> None:
    """Write `manifest.json`. Grows by about 250 bytes a shard."""
    value = header(FORMAT, STORE_VERSION) | {"count": manifest.count} | asdict(manifest)
    write_json(as_path(root) / MANIFEST_NAME, value)


def read_manifest(root: Path) -> StoreManifest:
    """Read and check `manifest.json`. Errors: :class:`ZpipeError` naming file and remedy."""
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
    """Whether it names a file of the store and leads nowhere else."""
    return isinstance(stem, str) and shard_stem(stem) == stem and stem not in ("", ".", "..") and "\0" not in stem


def write_extraction(root: Path, provenance: Provenance) -> None:
    """Mark `root` as a store in progress, with the provenance its shards will have."""
    write_json(as_path(root) / EXTRACTION_NAME, header(FORMAT, STORE_VERSION) | {"provenance": asdict(provenance)})


def read_extraction(root: Path) -> Provenance | None:
    """The provenance that the store at `root` was begun with; None when it was not begun."""
    path = as_path(root) / EXTRACTION_NAME
    if not path.is_file():
        return None
    value = read_json(path, "an extraction record")
    remedy = "give another --out folder"
    check_format(path, value, FORMAT, STORE_VERSION, remedy=remedy)
    if not isinstance(value.get("provenance"), dict):
        raise ZpipeError(f"{path}: not an extraction record (no provenance); {remedy}")
    return Provenance.from_json(value["provenance"], path)
