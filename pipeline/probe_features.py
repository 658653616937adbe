"""The features of a linear probe for all images of tar shards, kept on disk while a head is fitted.

A frozen teacher computes them once. Each tar gives one file, so that an interrupted run computes only what is missing;
the files are mapped into memory, of which they take none that the system could not take back.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor

from zpipe.pipeline.heads import probe_features, reads_mean
from zpipe.pipeline.logistic_regression import Rows
from zpipe.pipeline.shard_reader import Frame, FramedImage, framed_batches, read_samples
from zpipe.pipeline.teacher import Teacher
from zpipe.schemas.atomic import commit
from zpipe.schemas.devices import float32_arithmetic
from zpipe.schemas.errors import ZpipeError, first_line
from zpipe.schemas.progress import Progress
from zpipe.schemas.shard_index import ShardEntry

SUFFIX = ".features.safetensors"
NO_LABEL = -1
HELD_OUT = 0.2  # fraction of each class


@dataclass(frozen=True, eq=False)
class TarFeatures:
    """The usable images of one tar."""

    path: Path
    """The tar."""
    features: Tensor
    """float32 [n, F], mapped from a file."""
    labels: Tensor
    """int64 [n]; `NO_LABEL` for an image without one."""
    hashes: Tensor
    """int64 [n], of the keys: the order in which images are held out."""
    unlabelled: str
    """Key of the first image without a label; empty if all have one."""
    unusable: dict[str, str]
    """Key -> why the image has no features."""

    @property
    def problems(self) -> list[str]:
        """A line for each image that has no features."""
        return [f"{self.path}: key {key}: {why}" for key, why in self.unusable.items()]


class FeatureReader:
    """Computes the features of tars, or reads those that an earlier run has left.

    Args:
        teacher: The frozen teacher, on its device.
        frame: What it sees of an image.
        folder: Where the files of features are, on this machine.
        batch_size: Images per batch.
        threads: Threads that decode images.
    """

    def __init__(self, teacher: Teacher, frame: Frame, folder: Path, *, batch_size: int, threads: int) -> None:
        self.teacher, self.frame, self.folder = teacher, frame, folder
        self.batch_size, self.threads = batch_size, threads
        self.with_mean = reads_mean(teacher.model)
        weight = next(teacher.model.parameters())
        self.device = str(weight.device)
        self._mean, self._std = (
            torch.tensor(values, dtype=weight.dtype, device=weight.device).view(1, 3, 1, 1)
            for values in (teacher.mean, teacher.std)
        )

    def read(
        self, tars: Sequence[tuple[Path, ShardEntry]], label_field: str | None, progress: Progress
    ) -> list[TarFeatures]:
        """Compute or read the features of tars, in order.

        Raises:
            ZpipeError: A tar is damaged, or a file of features is.
        """
        read, done, total = [], 0, sum(entry.count for _, entry in tars)
        for path, entry in tars:
            progress("fit-head: features", done, total)
            file = self.folder / f"{entry.stem}-{self._fingerprint(entry, label_field)}{SUFFIX}"
            if not file.exists():
                self._compute(path, entry, label_field, file)
            read.append(_load(file, path))
            done += entry.count
        progress("fit-head: features", done, total)
        return read

    def _fingerprint(self, entry: ShardEntry, label_field: str | None) -> str:
        """Names what determines the features and labels of a tar."""
        teacher = self.teacher
        of_teacher = (teacher.digest, teacher.mean, teacher.std, teacher.model.own_parts, self.with_mean)
        of_images = (self.frame.kind, self.frame.size, self.frame.interpolation, self.frame.crop_pct)
        facts = (*of_teacher, *of_images, entry.sha256, entry.keys_sha256, label_field)
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]

    def _compute(self, path: Path, entry: ShardEntry, label_field: str | None, file: Path) -> None:
        features: list[Tensor] = []
        labels: list[int] = []
        keys: list[str] = []
        unusable: dict[str, str] = {}
        samples = read_samples(path, entry, label_field=label_field)
        for batch in framed_batches(samples, self.frame, batch_size=self.batch_size, threads=self.threads):
            unusable |= {item.key: item.problem for item in batch if item.pixels is None}
            good = [item for item in batch if item.pixels is not None]
            if not good:
                continue
            computed = self._features(good)
            finite = computed.isfinite().all(dim=1)
            unusable |= {item.key: "nonfinite" for item, ok in zip(good, finite, strict=True) if not ok}
            features.append(computed[finite])
            kept = [item for item, ok in zip(good, finite, strict=True) if ok]
            labels += [NO_LABEL if item.label is None else item.label for item in kept]
            keys += [item.key for item in kept]
        unlabelled = next((key for key, label in zip(keys, labels, strict=True) if label < 0), "")
        tensors = {
            "features": torch.cat(features) if features else torch.zeros(0, 1),
            "labels": torch.tensor(labels, dtype=torch.int64),
            "hashes": torch.tensor([_hash(key) for key in keys], dtype=torch.int64),
        }
        about = {"unusable": json.dumps(unusable), "unlabelled": unlabelled}
        with commit(file) as tmp:
            tmp.write_bytes(safetensors.torch.save(tensors, metadata=about))

    @torch.inference_mode()
    @float32_arithmetic()
    def _features(self, images: Sequence[FramedImage]) -> Tensor:
        pixels = torch.from_numpy(np.stack([image.pixels for image in images if image.pixels is not None]))
        x = pixels.to(self._mean.device).permute(0, 3, 1, 2).to(self._mean.dtype) / 255.0  # [n, 3, H, W]
        model = self.teacher.model
        normed = model.normalise(model.encode((x - self._mean) / self._std))
        return probe_features(model, normed, self.with_mean).float().cpu()


def _hash(key: str) -> int:
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big", signed=True)


def _load(file: Path, path: Path) -> TarFeatures:
    try:
        with safetensors.safe_open(file, "pt") as opened:
            about: dict[str, Any] = opened.metadata()
            features, labels, hashes = (opened.get_tensor(name) for name in ("features", "labels", "hashes"))
    except safetensors.SafetensorError as error:
        raise ZpipeError(f"{file}: is damaged ({first_line(error)}); remove {file.parent} and run again") from error
    return TarFeatures(path, features, labels, hashes, about["unlabelled"], json.loads(about["unusable"]))


def hold_out(tars: Sequence[TarFeatures], num_classes: int) -> list[Tensor]:
    """Choose the images by which the strength of the penalty is chosen: `HELD_OUT` of each class, by hash of the key.

    The choice does not depend on the order of the images. A class of one image has none held out, of two to five one.

    Returns:
        For each tar a mask, bool [n].
    """
    labels, hashes = torch.cat([tar.labels for tar in tars]), torch.cat([tar.hashes for tar in tars])
    chosen = torch.zeros(len(labels), dtype=torch.bool)
    for number in range(num_classes):
        rows = (labels == number).nonzero()[:, 0]
        count = max(1, round(HELD_OUT * len(rows))) if len(rows) > 1 else 0
        chosen[rows[hashes[rows].argsort(stable=True)[:count]]] = True
    return list(chosen.split([len(tar.labels) for tar in tars]))


def rows_of(tars: Sequence[TarFeatures], device: str, masks: Sequence[Tensor] | None = None) -> Rows:
    """The rows of tars on a device: all, or those that masks, bool [n] each, choose."""
    return partial(_rows, tars, device, masks)


def _rows(tars: Sequence[TarFeatures], device: str, masks: Sequence[Tensor] | None) -> Iterator[tuple[Tensor, Tensor]]:
    for number, tar in enumerate(tars):
        if not len(tar.labels):
            continue
        if masks is None:
            yield tar.features.to(device), tar.labels.to(device)
        elif masks[number].any():
            yield tar.features[masks[number]].to(device), tar.labels[masks[number]].to(device)
