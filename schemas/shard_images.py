"""The images of a tar: their keys, labels and digests, in a Parquet file beside it: `shard-00000.images.parquet`.

It takes some 40 bytes per image. By it maps of other tars find these images; nothing else needs it.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from zpipe.schemas.atomic import commit
from zpipe.schemas.errors import ZpipeError
from zpipe.schemas.image_digest import image_digest
from zpipe.schemas.image_join import digest_column
from zpipe.schemas.relevance_store import IndexFile, index_schema
from zpipe.schemas.shard_index import INDEX_NAME, ShardEntry, index_command
from zpipe.schemas.storage import as_path

COLUMNS = ("key", "label", "image_digest")
NO_LABEL = -1
IMAGES_SUFFIX = ".images.parquet"
Images = list[tuple[str, int, bytes]]  # key, label and digest of each image of a tar


def images_path(folder: Path, stem: str) -> Path:
    """The index of a tar's images, in the folder of `shards.json`."""
    return as_path(folder) / f"{stem}{IMAGES_SUFFIX}"


def image_row(key: str, label: int | None, image: bytes) -> tuple[str, int, bytes]:
    """Key, label and digest of an image."""
    return key, NO_LABEL if label is None else label, image_digest(image)


def digest_images(images: Images) -> str:
    """SHA-256 (hex) of the labels of a tar's images, int32, and then of their digests, which `shards.json` holds."""
    return _digest_table(_table(images))


def write_images(folder: Path, stem: str, images: Images) -> None:
    """Write the index of a tar's images.

    Args:
        folder: Folder of `shards.json`, a path or a URL.
        stem: Stem of the tar.
        images: Its images, in order.
    """
    with commit(images_path(folder, stem)) as tmp:
        pq.write_table(_table(images), tmp, compression="zstd")


def read_images(folder: Path, entry: ShardEntry) -> tuple[np.ndarray, np.ndarray]:
    """Read what joins the images of a tar with maps: their labels, int32 [n], and their digests, uint8 [n, 16].

    Args:
        folder: Folder of `shards.json`, a path or a URL.
        entry: The entry of the tar.

    Raises:
        ZpipeError: The tar was indexed without digests, or the file is not what was written.
    """
    file = _index_of_images(folder, entry)
    table = file.table(["label", "image_digest"])
    if len(table) != entry.count or _digest_table(table) != entry.images_sha256:
        raise ZpipeError(f"{file.path}: is not what {INDEX_NAME} lists: damaged or altered; {_remedy(folder)}")
    return table["label"].to_numpy(), digest_column(table["image_digest"])


def read_keys(folder: Path, entry: ShardEntry) -> list[str]:
    """The keys of a tar's images, in order, from the index of its images."""
    return list(_index_of_images(folder, entry).table(["key"])["key"].to_pylist())


def _index_of_images(folder: Path, entry: ShardEntry) -> IndexFile:
    if not entry.images_sha256:
        raise ZpipeError(
            f"{as_path(folder) / INDEX_NAME}: {entry.name} has no digests of its images; {_remedy(folder)}"
        )
    again = f"run {index_command(folder)}"
    return IndexFile(images_path(folder, entry.stem), what="index of images", again=again, texts=["key"])


def has_images(folder: Path, entry: ShardEntry) -> bool:
    """Whether the index of a tar's images is there and whole; it costs reading it."""
    if not entry.images_sha256 or not images_path(folder, entry.stem).is_file():
        return False
    try:
        read_images(folder, entry)
    except ZpipeError:
        return False
    return True


def _remedy(folder: Path) -> str:
    return f"{index_command(folder)} reads the tars once and adds them"


def _table(images: Images) -> pa.Table:
    schema = pa.schema([field for field in index_schema(COLUMNS) if field.name in COLUMNS])
    columns = list(zip(*images, strict=True)) or [()] * len(COLUMNS)
    return pa.table([pa.array(values, field.type) for values, field in zip(columns, schema, strict=True)], schema)


def _digest_table(table: pa.Table) -> str:
    digest = hashlib.sha256(np.ascontiguousarray(table["label"].to_numpy(), "<i4").tobytes())
    digest.update(np.ascontiguousarray(digest_column(table["image_digest"])).tobytes())
    return digest.hexdigest()
