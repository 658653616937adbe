"""Masks of objects from PNG files, in the view that a model has of the image."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from zpipe.schemas.errors import UsageError, ZpipeError, first_line, last_line
from zpipe.schemas.images import DECODE_ERRORS, open_image
from zpipe.schemas.storage import is_web, map_files, names_in, read_file, storage_errors
from zpipe.train.evaluation.localisation import BACKGROUND, IGNORED, OBJECT

MAX_MASK_BYTES = 64 << 20
IGNORED_VALUE, IGNORED_CLASS = 255, 1000  # in masks of one channel, and in those of ImageNet-S

REMEDY = "give a folder of KEY.png with 0 for background and 1 for the object (255 is ignored)"
NO_MASK, NO_OBJECT = "is missing", "has no object in view"


class MaskFolder:
    """A folder with one mask per image, KEY.png, in the folder itself or in any of its folders.

    The second is the layout of ImageNet-S, which has a folder for each class. A key with slashes is a path below the
    folder.

    A mask has the size of its image. In a mask of one channel 0 is background, 255 is ignored, and any other value is
    the object; of a palette the indices count. In one of three channels, as ImageNet-S has, a class is R + 256 * G,
    where 0 is background and 1000 is ignored.

    Args:
        folder: the folder or its URL; one of a web server, which lists nothing, has its masks in the folder itself.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.left_out: Counter[str] = Counter()
        self.first: dict[str, str] = {}
        self.used = 0

    def view(self, keys: Sequence[str], boxes: Tensor, side: int) -> tuple[Tensor, Tensor]:
        """Read the masks of a batch of centre crops.

        Args:
            keys: the key of each image.
            boxes: float32 [B, 4], the crop in source pixels (x1, y1, x2, y2), which is centred in the image.
            side: height and width of the model's images.

        Returns:
            The masks, uint8 [B, S, S], and whether an image has one with an object, bool [B].

        Raises:
            UsageError: the folder has no PNG file, or two of the same name in its folders.
            ZpipeError: a mask can't be read, or has another size than its image.
        """
        masks = np.full((len(keys), side, side), IGNORED, np.uint8)
        found = np.zeros(len(keys), bool)
        for row, (key, box) in enumerate(zip(keys, boxes.tolist(), strict=True)):
            reason = self._read(key, box, masks[row])
            found[row] = reason is None
            if reason is not None:
                self.left_out[reason] += 1
                self.first.setdefault(reason, key)
        self.used += int(found.sum())
        return torch.from_numpy(masks), torch.from_numpy(found)

    def _read(self, key: str, box: Sequence[float], out: np.ndarray) -> str | None:
        """Read one mask into `out` [S, S]; the reason if there is none."""
        path, data = self._find(key)
        if data is None:
            return NO_MASK
        try:
            with open_image(data) as image:
                values = classes(image)  # [H, W]
        except DECODE_ERRORS as error:
            raise ZpipeError(f"{path}: can't be decoded ({last_line(error)}); replace it, or remove it") from error
        # The centre of the crop is that of the image.
        width, height = round(box[0] + box[2]), round(box[1] + box[3])
        if values.shape != (height, width):
            raise ZpipeError(
                f"{path}: is {values.shape[1]} x {values.shape[0]} pixels, its image {width} x {height}; give a mask "
                "of the image's own size"
            )
        whole = Image.fromarray(values)
        crop = (box[0], box[1], min(box[2], width), min(box[3], height))
        out[:] = np.asarray(whole.resize(out.shape, Image.Resampling.NEAREST, box=crop))
        return None if (out == OBJECT).any() else NO_OBJECT

    def _find(self, key: str) -> tuple[Path, bytes | None]:
        """The file of a mask and its content; None if there is none."""
        name = f"{key}.png"
        path = self.folder / name
        data = _read(path)
        if data is None and "/" not in key and not is_web(self.folder):
            among = self._inner.get(name, [])
            if len(among) > 1:
                raise UsageError(
                    f"--masks {self.folder}: has {among[0]}/{name} and {among[1]}/{name}; give the folder of one split"
                )
            if among:
                path = self.folder / among[0] / name
                data = _read(path)
        return path, data

    @cached_property
    def _inner(self) -> dict[str, list[str]]:
        """The PNG files in the folders of the folder: the names of their folders, by that of the file."""
        names = names_in(self.folder)
        folders = [name for name in names if not name.endswith(".png")]
        found: dict[str, list[str]] = {}
        inside = map_files(self.folder, lambda name: names_in(self.folder / name), folders)
        for folder, files in zip(folders, inside, strict=True):
            for file in files:
                if file.endswith(".png"):
                    found.setdefault(file, []).append(folder)
        if not found and len(folders) == len(names):  # so that the error does not come after hours
            raise UsageError(f"--masks {self.folder}: has no PNG file; {REMEDY}")
        return found

    def check_used(self) -> None:
        """Check, after the last batch, that there was a mask. Raises UsageError if no image had a usable one."""
        if not self.used and self.first:
            reason, first = next(iter(self.first.items()))
            count = self.left_out.total()
            raise UsageError(
                f"--masks {self.folder}: none of {count} images has a usable mask ({first}.png {reason}); {REMEDY}"
            )

    def summary(self) -> str | None:
        """A line about the images without a usable mask; None if there are none."""
        if not self.left_out:
            return None
        parts = (
            f"of {count} the mask {reason} ({self.first[reason]} first)" for reason, count in self.left_out.items()
        )
        return f"{self.folder}: segmentation is measured on {self.used} images; {', '.join(parts)}"


def _read(path: Path) -> bytes | None:
    try:
        return read_file(path, MAX_MASK_BYTES)
    except FileNotFoundError:
        return None
    except storage_errors() as error:
        raise ZpipeError(f"{path}: can't be read ({first_line(error)}); check it and your access to it") from error


def classes(image: Image.Image) -> np.ndarray:
    """The mask of an opened image file: uint8 [H, W] of `BACKGROUND`, `OBJECT` and `IGNORED`.

    Raises:
        DECODE_ERRORS: the file is damaged, or its pixels are no classes.
    """
    values = np.asarray(image)
    ignored = IGNORED_VALUE
    if image.mode == "RGB":
        values, ignored = values[..., 0] + 256 * values[..., 1].astype(np.int32), IGNORED_CLASS
    elif image.mode not in ("1", "L", "P", "I", "I;16"):
        raise ValueError(f"pixels of mode {image.mode} are no classes; write one channel, or three as ImageNet-S")
    return np.select([values == ignored, values != 0], [IGNORED, OBJECT], BACKGROUND).astype(np.uint8)
