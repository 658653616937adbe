"""Read tar shards as batches of decoded images in the teacher's frame. Extraction opens tars only here."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from zpipe.schemas.account import Account
from zpipe.schemas.choices import check_choice
from zpipe.schemas.errors import ZpipeError
from zpipe.schemas.geometry import Box
from zpipe.schemas.image_digest import image_digest
from zpipe.schemas.images import DECODE_ERRORS, open_image, to_rgb
from zpipe.schemas.names import printable
from zpipe.schemas.progress import Progress, silent
from zpipe.schemas.sample import Sample, group_samples, member_bytes, no_samples
from zpipe.schemas.shard_images import Images, digest_images, image_row, write_images
from zpipe.schemas.shard_index import (
    INDEX_NAME,
    ShardEntry,
    ShardIndex,
    digest_keys,
    index_command,
    open_index,
    rows_with_repeated_hashes,
)
from zpipe.schemas.shard_patterns import is_pattern
from zpipe.schemas.storage import as_path, open_file, storage_errors
from zpipe.schemas.tar_file import HashingFile, read_members

SCAN_THREADS = 8
BATCHES_AHEAD = 2  # read and decoded while the consumer has another one
MAX_GROUP = 8  # images that a decoding thread takes at once
PIL_FILTERS = {
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
    "lanczos": Image.Resampling.LANCZOS,
}


@dataclass(frozen=True, kw_only=True)
class FramedImage:
    """One sample, decoded and brought to the size of the teacher's input."""

    key: str
    """Its key."""
    label: int | None
    """Its class index; None if it has none."""
    pixels: np.ndarray | None
    """uint8 [H, W, 3]; None if the image could not be decoded."""
    width: int
    """Width of the source image in pixels."""
    height: int
    """Height of the source image in pixels."""
    frame: Box
    """The part of the source image that the pixels show."""
    digest: bytes
    """Digest of the image file, see `zpipe.schemas.image_digest`."""
    problem: str = ""
    """Why the image could not be decoded."""


def read_samples(path: Path, entry: ShardEntry | None = None, *, label_field: str | None = None) -> Iterator[Sample]:
    """Yield the samples of a tar, in order.

    Nothing is written to disk, and members that are not plain files are ignored.

    Args:
        path: The tar, a path or a URL.
        entry: Its index entry; if there is one, count, keys and digest are compared after the last sample.
        label_field: As for :func:`zpipe.schemas.sample.group_samples`.

    Raises:
        ZpipeError: The tar is truncated or altered, or a sample breaks the rules of `zpipe.schemas.sample`.
    """
    keys: list[str] = []
    with _open_tar(path) as file:
        members = read_members(file, path, member_bytes)
        for sample in group_samples(members, str(path), label_field=label_field):
            keys.append(sample.key)
            yield sample
        digest = file.hexdigest()
    if entry is not None and (
        len(keys) != entry.count or digest_keys(keys) != entry.keys_sha256 or digest != entry.sha256
    ):
        raise ZpipeError(
            f"{path}: {len(keys)} samples, SHA-256 {digest[:12]}; {INDEX_NAME} says {entry.count}, "
            f"{entry.sha256[:12]}: truncated or altered; restore it or make the shards again"
        )


@contextmanager
def _open_tar(path: Path) -> Iterator[HashingFile]:
    try:
        file = open_file(as_path(path))
    except storage_errors() as error:
        reason = getattr(error, "strerror", None) or error
        raise ZpipeError(f"{path}: can't be read ({reason}); restore it or make the shards again") from error
    with file:
        yield HashingFile(file)


def open_shards(path: Path, *, progress: Progress = silent) -> tuple[list[tuple[Path, ShardEntry]], ShardIndex]:
    """Find tar shards and their index entries.

    Folders that `make-shards` made contain `shards.json`. In others (public shards), every tar is read once for its
    count and digests, which takes as long as reading the data, at every start.

    Args:
        path: A folder of tars, one tar, or a pattern of tars in one folder; a path or a URL.
        progress: Reports the tars that are read for want of an index.

    Returns:
        The tars with their entries, and the index of the folder, or what its index would be.

    Raises:
        UsageError: There are no tars.
        ZpipeError: A tar cannot be read, or does not agree with the index.
    """
    tars, entries, index = open_index(path)
    if index is None:
        source = str(path) if is_pattern(path) else ""
        index = scan_shards(tars, source=source, progress=progress, remedy=f"{index_command(path)} spares this")
        entries = list(index.shards)
    return list(zip(tars, entries, strict=True)), index


def scan_shards(
    tars: Sequence[Path],
    *,
    source: str = "",
    label_field: str | None = None,
    images_to: Path | None = None,
    progress: Progress = silent,
    remedy: str = "",
) -> ShardIndex:
    """Make the index of tars by reading them, several at a time. Memory grows by 8 bytes per sample.

    Args:
        tars: The tars.
        source: What names them; the folder of the first one by default.
        label_field: As for :func:`zpipe.schemas.sample.group_samples`; every sample must have it.
        images_to: Folder, a path or a URL, in which to write the index of each tar's images.
        progress: Reports the tars that have been read.
        remedy: How to avoid this work, shown with the progress.

    Raises:
        ZpipeError: A tar is broken or empty, its name is unfit for an index, or two tars hold the same key.
    """
    entries: list[ShardEntry] = []
    hashes: list[np.ndarray] = []  # of the keys of each tar
    account = Account()
    facts = {"hint": remedy} if remedy else {}

    def scan(tar: Path) -> tuple[ShardEntry, np.ndarray, Account]:
        images, size, digest, read = _read_images(tar, label_field)
        keys = [key for key, _, _ in images]
        try:
            entry = ShardEntry(
                name=tar.name,
                count=len(keys),
                bytes=size,
                sha256=digest,
                keys_sha256=digest_keys(keys),
                images_sha256=digest_images(images),
            )
        except ValueError as error:
            raise ZpipeError(f"{printable(tar)}: {error}; rename it") from error
        if images_to is not None:
            write_images(images_to, entry.stem, images)
        return entry, np.fromiter(map(hash, keys), np.int64, len(keys)), read

    # Reading and hashing release the interpreter lock, and a remote store answers several requests at once.
    with ThreadPoolExecutor(max_workers=SCAN_THREADS) as pool:
        try:
            for entry, key_hashes, read in pool.map(scan, tars):
                entries.append(entry)
                hashes.append(key_hashes)
                account += read
                progress("index-shards", len(entries), len(tars), images=account.taken, **facts)
        finally:
            pool.shutdown(cancel_futures=True)  # after an error, the other tars need not be read
    _check_unique(tars, hashes, label_field)
    return ShardIndex(
        shards=tuple(entries),
        source=source or str(tars[0].parent),
        account=account,
        label_field=label_field,
        is_file=False,
    )


def _check_unique(tars: Sequence[Path], hashes: Sequence[np.ndarray], label_field: str | None) -> None:
    """Compare the keys themselves where hashes are repeated; only those tars are read again."""
    owner: dict[str, Path] = {}
    for number, rows in rows_with_repeated_hashes(hashes):
        tar = tars[number]
        images = _read_images(tar, label_field)[0]
        for key in (images[row][0] for row in rows):
            if key in owner:
                raise ZpipeError(
                    f"{tar}: key {key}: is in {owner[key].name} too, and maps are found by key; "
                    "make the shards again with unique keys"
                )
            owner[key] = tar


def _read_images(path: Path, label_field: str | None = None) -> tuple[Images, int, str, Account]:
    """The images of a tar, its size in bytes, its SHA-256 (hex), and the account of its members."""
    account = Account()
    with _open_tar(path) as file:
        members = read_members(file, path, member_bytes)
        samples = group_samples(members, str(path), account, label_field=label_field)
        images = [image_row(sample.key, sample.label, sample.image) for sample in samples]
        digest = file.hexdigest()
    if not images:
        raise no_samples(path, account)
    return images, file.count, digest, account


FRAMES = ("full", "center")


@dataclass(frozen=True, kw_only=True)
class Frame:
    """Which part of an image the teacher sees, and at which size.

    Raises:
        UsageError: `kind` or `interpolation` is none of its choices.
    """

    kind: str
    """``full`` squashes the whole image to `size`. ``center`` takes the centred box of the aspect ratio of `size` that
    fills `crop_pct` of the image: the teacher's own evaluation view, whose two steps (resize, crop) round to pixels."""
    size: tuple[int, int]
    """Height and width of the teacher's input in pixels."""
    interpolation: str
    """How the image is resized: a name of `PIL_FILTERS`."""
    crop_pct: float = 1.0
    """Fraction of the image, 0 to 1, that ``center`` takes."""

    def __post_init__(self) -> None:
        check_choice("--frame", self.kind, FRAMES)
        check_choice("interpolation", self.interpolation, PIL_FILTERS)

    def box(self, width: int, height: int) -> Box:
        """The part of a width x height image that the frame shows, in source pixels."""
        if self.kind == "full":
            return Box.full(width, height)
        scale = self.crop_pct * min(width / self.size[1], height / self.size[0])
        half_w, half_h = self.size[1] * scale / 2, self.size[0] * scale / 2
        left, right = max(0.0, width / 2 - half_w), min(float(width), width / 2 + half_w)
        top, bottom = max(0.0, height / 2 - half_h), min(float(height), height / 2 + half_h)
        return Box(left, top, right, bottom)


def frame_image(sample: Sample, frame: Frame, out: np.ndarray | None = None) -> FramedImage:
    """Decode a sample and resize the part that the frame shows to the size of the teacher's input.

    The EXIF orientation is ignored, as it is by the usual ImageNet loaders, so that boxes refer to the pixels as
    stored. If the image cannot be decoded, `pixels` is None and `problem` says why.

    Args:
        sample: The sample.
        frame: The part of the image that is shown.
        out: Where to put the pixels, uint8 [H, W, 3]; by default, in an array of their own.
    """
    digest = image_digest(sample.image)
    try:
        with open_image(sample.image) as image:
            width, height = image.size
            rgb = to_rgb(image)
    except DECODE_ERRORS as error:
        problem = str(error).split("\n")[0] or type(error).__name__
        return FramedImage(
            key=sample.key,
            label=sample.label,
            pixels=None,
            width=0,
            height=0,
            frame=Box(0.0, 0.0, 1.0, 1.0),
            digest=digest,
            problem=problem,
        )
    box, (out_h, out_w) = frame.box(width, height), frame.size
    pixels = np.asarray(rgb.resize((out_w, out_h), PIL_FILTERS[frame.interpolation], box=box.as_tuple()))  # [H, W, 3]
    if out is not None:
        out[...] = pixels
        pixels = out
    return FramedImage(
        key=sample.key, label=sample.label, pixels=pixels, width=width, height=height, frame=box, digest=digest
    )


class PixelBatch(NamedTuple):
    """Some images and their pixels, side by side."""

    images: list[FramedImage]
    """The images, whose `pixels` are rows of the array."""
    pixels: np.ndarray
    """uint8 [n, H, W, 3]; the rows of images that could not be decoded hold anything."""


def new_array(shape: tuple[int, ...]) -> np.ndarray:
    """An uninitialised uint8 array."""
    return np.empty(shape, np.uint8)


def pixel_batches(
    samples: Iterable[Sample],
    frame: Frame,
    *,
    batch_size: int,
    threads: int,
    new_array: Callable[[tuple[int, ...]], np.ndarray] = new_array,
) -> Iterator[PixelBatch]:
    """Read samples in one thread, decode them in others, and yield them in order.

    `BATCHES_AHEAD` batches are read and decoded ahead. The pixels are written straight to their place in a batch.

    Args:
        samples: The samples.
        frame: The part of each image that is shown.
        batch_size: Images per batch; the last one may be smaller.
        threads: Number of decoding threads.
        new_array: Makes the uint8 array of a batch from its shape.
    """
    source = iter(samples)
    group = max(1, min(MAX_GROUP, batch_size // threads))

    def read_batch() -> tuple[list[Future[list[FramedImage]]], np.ndarray]:
        pixels = new_array((batch_size, *frame.size, 3))
        decoded, start = [], 0
        while some := list(islice(source, min(group, batch_size - start))):
            decoded.append(pool.submit(_frame_images, some, frame, pixels[start : start + len(some)]))
            start += len(some)
        return decoded, pixels[:start]

    with ThreadPoolExecutor(threads) as pool, ThreadPoolExecutor(1) as reader:
        batches = deque(reader.submit(read_batch) for _ in range(BATCHES_AHEAD))
        try:
            while True:
                decoded, pixels = batches.popleft().result()
                if not decoded:
                    return
                batches.append(reader.submit(read_batch))
                yield PixelBatch([image for images in decoded for image in images.result()], pixels)
        finally:  # after an error, or if the consumer wants no more
            reader.shutdown(cancel_futures=True)
            pool.shutdown(cancel_futures=True)


def _frame_images(samples: list[Sample], frame: Frame, out: np.ndarray) -> list[FramedImage]:
    return [frame_image(sample, frame, pixels) for sample, pixels in zip(samples, out, strict=True)]


def framed_batches(
    samples: Iterable[Sample], frame: Frame, *, batch_size: int, threads: int
) -> Iterator[list[FramedImage]]:
    """As :func:`pixel_batches`, but yields the images alone."""
    return (batch.images for batch in pixel_batches(samples, frame, batch_size=batch_size, threads=threads))
