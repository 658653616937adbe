"""Data, maps and models small enough for tests, made by the real commands."""

from __future__ import annotations

import dataclasses
import io
import tarfile
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
from PIL import Image

from zpipe.pipeline.explainer import ExplainConfig
from zpipe.pipeline.extract import ExtractConfig, extract_teacher_maps
from zpipe.pipeline.make_shards import SceneSource, index_shards, make_shards
from zpipe.pipeline.scenes import SceneConfig
from zpipe.pipeline.teacher import TeacherSpec
from zpipe.pipeline.worker import WorkerSpec
from zpipe.schemas.manifest import read_manifest, write_manifest
from zpipe.schemas.relevance_store import OK, encode_maps, index_path, read_index, write_shard
from zpipe.schemas.shard_index import digest_file

SIDE, GRID = 32, 4
BODY = {"patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3}
TEACHER = {"img_size": SIDE} | BODY
# A worker on a GPU that loads no teacher; with `threads` 0 it takes its share of the machine.
GPU_WORKER = WorkerSpec(
    teacher=TeacherSpec(name="none", weights="random"),
    teacher_digest="",
    fingerprint="",
    out="",
    explain=ExplainConfig(),
    frame="full",
    batch_size=0,
    threads=0,
    sharing=1,
    device="cuda",
)


def scenes(out: Path, count: int = 40, *, shard_size: int = 10, seed: int = 0, split: str = "train") -> Path:
    """Tar shards of the embedded scenes, 32 x 32 pixels."""
    config = SceneConfig(image_size=SIDE, digit_size=(9, 10), pieces=(1, 2))
    make_shards(SceneSource(count=count, split=split, seed=seed, config=config, shard_size=shard_size), out)
    return out


def store(shards: Path, out: Path, *, num_classes: int = 10, seed: int = 0, **teacher: int) -> Path:
    """The maps of a random teacher for `shards`, computed in this process."""
    config = ExtractConfig(
        teacher="deit_tiny_patch16_224",
        weights="random",
        num_classes=num_classes,
        teacher_args=TEACHER | teacher,
        seed=seed,
        executor="local",
        threads=1,
        device="cpu",
    )
    extract_teacher_maps(shards, out, config)
    return out


def encode(pixels: np.ndarray, kind: str = "PNG") -> bytes:
    """uint8 [H, W, 3] or [H, W] as an image file."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def late_profile(image: bytes) -> bytes:
    """A PNG with an empty colour profile chunk after its pixels; Pillow 13 opens it, and decoding raises IndexError."""
    end = image.rindex(b"IEND") - 4
    return image[:end] + bytes(4) + b"iCCP" + zlib.crc32(b"iCCP").to_bytes(4, "big") + image[end:]


def write_tar(
    path: Path,
    members: Mapping[str, bytes] | Iterable[tuple[str | tarfile.TarInfo, bytes]],
    mode: Literal["w", "w:gz"] = "w",
) -> Path:
    """Write a tar with members of the given names or headers, in this order; `mode` as in `tarfile.open`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as tar:
        for name, data in members.items() if isinstance(members, Mapping) else members:
            info = name if isinstance(name, tarfile.TarInfo) else tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def header(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    """The header of a member that is no regular file: `kind` as `tarfile.SYMTYPE`, `target` of a link."""
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def write_shards(folder: Path, tars: list[dict[str, bytes]]) -> Path:
    """Tars with the given members, and their index."""
    for number, members in enumerate(tars):
        write_tar(folder / f"shard-{number:05d}.tar", members)
    index_shards(folder)
    return folder


def rewrite_store(root: Path, maps: dict[str, np.ndarray], statuses: dict[str, str] | None = None) -> Path:
    """Replace the maps [gh, gw] of a finished store, and the statuses of some keys, through the store's own writer."""
    manifest = read_manifest(root)
    provenance = dataclasses.replace(manifest.provenance, grid=next(iter(maps.values())).shape)
    shards = []
    for shard in manifest.shards:
        table = read_index(root, shard.stem)
        keys = table["key"].to_pylist()
        stored, scale = encode_maps(np.stack([maps[key] for key in keys]))
        columns = {name: table[name] for name in table.column_names}
        columns |= {"scale": pa.array(scale), "status": pa.array([(statuses or {}).get(key, OK) for key in keys])}
        write_shard(
            root,
            shard.stem,
            stored,
            pa.table(columns),
            input_sha256=shard.input_sha256,
            fingerprint=provenance.fingerprint(),
        )
        shards.append(dataclasses.replace(shard, index_sha256=digest_file(index_path(root, shard.stem))))
    write_manifest(root, dataclasses.replace(manifest, provenance=provenance, shards=tuple(shards)))
    return root


def cut(path: Path, where: str) -> None:
    """Truncate a tar about half way through, `on` a sample boundary or `inside` the data of a member."""
    with tarfile.open(path) as tar:
        members = tar.getmembers()
    middle = len(members) // 2
    first_of_sample = next(
        member for member in members[middle:] if member.name.endswith((".jpg", ".png"))
    )  # every sample begins with its image
    end = first_of_sample.offset if where == "on" else first_of_sample.offset_data + first_of_sample.size // 2
    with open(path, "r+b") as file:
        file.truncate(end)
