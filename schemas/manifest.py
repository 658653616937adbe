"""The manifest of a store, and the provenance of its maps: everything that determines their values."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Annotated, Any

import msgspec

from zpipe.schemas.atomic import write_json
from zpipe.schemas.errors import DamageError, ZpipeError, first_line, remedy_for
from zpipe.schemas.formats import Count, Digest, Format, Text, decode_json
from zpipe.schemas.names import printable
from zpipe.schemas.sample import shard_stem
from zpipe.schemas.storage import as_path, check_reachable, storage_errors
from zpipe.schemas.tensor_kinds import KINDS, Kind

MANIFEST_NAME = "manifest.json"
EXTRACTION_NAME = "extraction.json"
FORMAT = "zpipe-relevance-store"
STORE_VERSION = 1
MAX_PROVENANCE_BYTES = 1 << 20  # it has some 800

Cells = Annotated[int, msgspec.Meta(ge=1, le=4096)]
Size = Annotated[int, msgspec.Meta(ge=1, le=1 << 20)]
Channels = Annotated[tuple[float, ...], msgspec.Meta(max_length=64)]
Status = Annotated[str, msgspec.Meta(pattern="^(ok|undecodable|nonfinite|zero)$")]


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """What determines the values of a store's maps. Stores with equal fingerprints hold the same kind of maps."""

    teacher: Text
    """timm's name of the teacher."""
    teacher_args: dict[str, Any]
    """Arguments of its constructor, as JSON values."""
    weights: Text
    """Where its weights were read from; for the reader, not compared."""
    seed: int | None
    """Seed of random weights, None for others; for the reader, not compared."""
    teacher_digest: Text
    """SHA-256 (hex) of its weights, with those of a head in place of its own."""
    num_classes: Annotated[int, msgspec.Meta(ge=1, le=2**31 - 1)]
    """Number of its classes."""
    method: Text
    """Attribution method."""
    start_layer: Count
    """First block whose attention counts."""
    target: Text
    """Class that a map explains: ``ground-truth``, ``predicted``, ``class:K``; ``none`` for methods without a class."""
    frame: Text
    """What the teacher saw of an image: ``full`` or ``center``."""
    grid: tuple[Cells, Cells]
    """Height and width of a map in cells."""
    image_size: tuple[Size, Size]
    """Height and width of the teacher's input in pixels."""
    mean: Channels
    """Mean of each channel, subtracted from pixels in 0 to 1."""
    std: Channels
    """Standard deviation of each channel."""
    interpolation: Text
    """How images were resized."""
    crop_pct: float
    """Fraction of an image that the frame shows."""
    symmetrised: bool
    """Whether maps are the mean of those of the image and of its mirror image."""
    precision: Text
    """Precision of the forward pass and of the relevance sweep."""
    store_version: int = STORE_VERSION
    """Version of the store's format."""
    kind: Kind = "map"
    """What a sample's tensor is: a name of `zpipe.schemas.tensor_kinds.KINDS`."""
    shape: Annotated[tuple[Size, ...], msgspec.Meta(max_length=3)] = ()
    """Shape of a sample's tensor; () if it is the grid."""
    head: Text = ""
    """File of the head that took the place of the teacher's own, "" for none; for the reader, not compared."""
    class_embeddings: Text = ""
    """File of the embeddings of the classes that took the place of a head, "" for none; likewise."""
    positions_resized: bool = False
    """Whether the position embeddings in the weights file were resized if they had another size; likewise."""
    device: Text = ""
    """Kind of the device that computed them, ``cpu`` or ``cuda``, whose rounding differs; "" where it is not known."""

    # Where the weights come from may differ while they, and with them the digest of the teacher, are the same.
    NOT_COMPARED = ("weights", "seed", "head", "class_embeddings", "positions_resized")

    def __post_init__(self) -> None:
        if problem := KINDS[self.kind].shape_error(self.sample_shape, self.grid):
            raise ValueError(f"a tensor of kind {self.kind}: {problem}")  # msgspec adds the place in the file

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """Shape of a sample's tensor."""
        return self.shape or self.grid

    @property
    def head_note(self) -> str:
        """A phrase about what took the place of the teacher's own head; empty if nothing did."""
        if self.head:
            return f", head {self.head}"
        return f", class embeddings {self.class_embeddings}" if self.class_embeddings else ""

    def to_json(self) -> dict[str, Any]:
        """The fields as JSON values. Those that earlier versions do not know are left out if they say nothing."""
        plain: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return {name: value for name, value in plain.items() if name not in LATER or value != LATER[name]}

    def compared(self) -> dict[str, Any]:
        """The fields that must agree, as JSON values."""
        return {name: value for name, value in self.to_json().items() if name not in self.NOT_COMPARED}

    def fingerprint(self) -> str:
        """SHA-256 (hex) over the compared fields."""
        return hashlib.sha256(json.dumps(self.compared(), sort_keys=True).encode()).hexdigest()


# The fields that were added later, with the values for which they are not written.
LATER: dict[str, Any] = {
    "kind": "map",
    "shape": [],
    "head": "",
    "class_embeddings": "",
    "positions_resized": False,
    "device": "",
}


def check_compatible(existing: Provenance, wanted: Provenance, path: Path) -> None:
    """Raise :class:`ZpipeError` with both values of the first field in which the store at `path` differs."""
    old, new = existing.compared(), wanted.compared()
    for name in old | new:
        if old.get(name) != new.get(name):
            settings = f"--device {existing.device}" if name == "device" else "the settings that made this store"
            raise ZpipeError(
                f"{path}: made with {name} = {_short(old.get(name))}, this run has {_short(new.get(name))}; "
                f"give another --out folder, {settings}, or --replace to start over"
            )


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + '..."'


@dataclass(frozen=True, kw_only=True)
class MapShard:
    """One finished map shard."""

    stem: Text
    """Stem of the tar that it was made from."""
    count: Count
    """Number of samples."""
    input_sha256: Digest
    """SHA-256 (hex) of the tar."""
    index_sha256: Digest
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
    source: Text
    """Folder or URL of the tars."""
    zpipe_version: Text
    """Version of zpipe that wrote the manifest."""
    classes: tuple[Text, ...] = ()
    """Names of the teacher's classes, which `target` and `predicted` number; empty if only numbers are known."""

    @property
    def count(self) -> int:
        """Number of samples."""
        return sum(shard.count for shard in self.shards)


@dataclass(frozen=True, kw_only=True)
class _ExtractionFile:
    """`extraction.json`. The provenance is decoded apart, because it may hold no unknown field."""

    provenance: msgspec.Raw


@dataclass(frozen=True, kw_only=True)
class _ManifestFile(_ExtractionFile):
    """`manifest.json`."""

    shards: tuple[MapShard, ...]
    statuses: dict[Status, Count]
    source: Text
    zpipe_version: Text
    classes: tuple[Text, ...] = ()
    count: Count | None = None


EXTRACTION = Format(
    name=FORMAT,
    version=STORE_VERSION,
    content=_ExtractionFile,
    what="an extraction record",
    remedy=f"delete it if {MANIFEST_NAME} is there, from which it is written anew, or give another --out folder",
    max_bytes=2 * MAX_PROVENANCE_BYTES,
)
MANIFEST = Format(
    name=FORMAT,
    version=STORE_VERSION,
    content=_ManifestFile,
    what="a store manifest",
    remedy="delete it and extract again; finished shards are kept",
)


def write_manifest(root: Path, manifest: StoreManifest) -> None:
    """Write `manifest.json`, about 250 bytes per shard."""
    value = MANIFEST.header | {"count": manifest.count} | asdict(manifest)
    value["provenance"] = manifest.provenance.to_json()
    if not manifest.classes:
        del value["classes"]
    write_json(as_path(root) / MANIFEST_NAME, value)


def read_manifest(root: Path) -> StoreManifest:
    """Read and check `manifest.json`. Raises :class:`ZpipeError` if the store is unfinished or the file is damaged."""
    path = as_path(root) / MANIFEST_NAME
    check_reachable(path)
    if not _is_there(path):
        if _is_there(as_path(root) / EXTRACTION_NAME):
            raise ZpipeError(
                f"{root}: the extraction is not finished (no {MANIFEST_NAME}); run extract-teacher-maps again to resume"
            )
        raise ZpipeError(f"{root}: not a relevance store (no {MANIFEST_NAME}); zpipe extract-teacher-maps makes one")
    return _manifest(MANIFEST.read(path), path)


def decode_manifest(data: bytes, path: Path | str) -> StoreManifest:
    """Check the content of a `manifest.json`; `path` is for messages. Raises as :func:`read_manifest`."""
    return _manifest(MANIFEST.decode(data, path), path)


def _manifest(content: _ManifestFile, path: Path | str) -> StoreManifest:
    manifest = StoreManifest(
        provenance=_provenance(content, path, MANIFEST.remedy),
        shards=content.shards,
        statuses=dict[str, int](content.statuses.items()),
        source=content.source,
        zpipe_version=content.zpipe_version,
        classes=content.classes,
    )
    _check_shards(manifest, content.count, path)
    return manifest


def _check_shards(manifest: StoreManifest, count: int | None, path: Path | str) -> None:
    """Check what the types do not say: names of files in this store, and counts that add up."""
    names = Counter(shard.stem for shard in manifest.shards)
    for stem, times in names.items():
        if not _is_name(stem):
            raise DamageError(f"{path}: shard {stem!r} is no name of a file in this store; {MANIFEST.remedy}")
        if times > 1:
            raise DamageError(f"{path}: shard {stem!r} is listed twice; {MANIFEST.remedy}")
    if empty := [shard.stem for shard in manifest.shards if not shard.count]:
        raise DamageError(f"{path}: shard {empty[0]!r} has no samples; {MANIFEST.remedy}")
    if count is not None and count != manifest.count:
        raise DamageError(f"{path}: its count is {count}, its shards have {manifest.count} samples; {MANIFEST.remedy}")


def _is_name(stem: str) -> bool:
    """Whether it is a plain file name, which cannot lead out of the store, nor write to a terminal."""
    return shard_stem(stem) == stem and stem not in ("", ".", "..") and printable(stem) == stem


def _is_there(path: Path) -> bool:
    try:
        return path.exists()
    except storage_errors() as error:
        raise ZpipeError(f"{path}: can't be read ({first_line(error)}); {remedy_for(error)}") from error


def _provenance(content: _ExtractionFile, path: Path | str, remedy: str) -> Provenance:
    """The provenance in a file. An unknown field would determine values in a way that this version doesn't know."""
    data = bytes(content.provenance)
    if len(data) > MAX_PROVENANCE_BYTES:
        raise DamageError(f"{path}: its provenance has {len(data)} bytes; {remedy}")
    found = decode_json(data, path, type=dict[str, msgspec.Raw], what="the provenance of maps", remedy=remedy)
    known = [field.name for field in fields(Provenance)]
    if odd := sorted(set(found) - set(known)):
        name = printable(odd[0])[:40]
        raise ZpipeError(f"{path}: provenance field {name!r} is unknown: made by a newer zpipe; upgrade zpipe")
    return decode_json(data, path, type=Provenance, what="the provenance of maps", remedy=remedy)


def write_extraction(root: Path, provenance: Provenance) -> None:
    """Mark `root` as a store in progress, with the provenance its shards will have."""
    write_json(as_path(root) / EXTRACTION_NAME, EXTRACTION.header | {"provenance": provenance.to_json()})


def read_extraction(root: Path) -> Provenance | None:
    """The provenance that the store at `root` was begun with; None if there is none."""
    path = as_path(root) / EXTRACTION_NAME
    if not _is_there(path):
        return None
    return _provenance(EXTRACTION.read(path), path, EXTRACTION.remedy)


def decode_extraction(data: bytes, path: Path | str) -> Provenance:
    """The provenance in the content of an `extraction.json`; `path` is for messages."""
    return _provenance(EXTRACTION.decode(data, path), path, EXTRACTION.remedy)
