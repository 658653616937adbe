"""Labels of ImageNet's validation images from the organisers' development kit, `ILSVRC2012_devkit_t12`.

The kit numbers the classes from 1 in an order of its own, which no model uses: `meta.mat` says which wnid has which
number. Taking these numbers for labels gives wrong classes without any error.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from zpipe.pipeline.datasets import read_archive
from zpipe.pipeline.imagenet_names import NUM_CLASSES, synsets
from zpipe.pipeline.mat_file import MAX_MAT_BYTES, read_structs
from zpipe.schemas.errors import ZpipeError
from zpipe.schemas.names import printable
from zpipe.schemas.storage import read_file

KIT, TRUTH, META = "ILSVRC2012_devkit_t12", "ILSVRC2012_validation_ground_truth.txt", "meta.mat"
NUM_VAL = 50_000
_REMEDY = "fetch the development kit again"


def read_devkit(folder: Path) -> tuple[Path, np.ndarray] | None:
    """Find the development kit and read the labels of the validation images.

    Args:
        folder: The folder that holds `ILSVRC2012_devkit_t12.tar.gz`, what it unpacks to, or the ground truth alone.

    Returns:
        The file that they are in, and the label of the image of each number, less one: int16 [50000]. None if there is
        no such file.

    Raises:
        ZpipeError: A file of the kit is damaged or none of ILSVRC 2012's.
    """
    archive = folder / f"{KIT}.tar.gz"
    if archive.is_file():
        files = read_archive(archive, f"{KIT}/data", (TRUTH, META), MAX_MAT_BYTES)
        if TRUTH not in files:
            raise ZpipeError(f"{archive}: has no {KIT}/data/{TRUTH}; {_REMEDY}")
        return archive, _labels(files, archive)
    for place in (folder / KIT / "data", folder):
        if (place / TRUTH).is_file():
            files = {name: _read(place / name) for name in (TRUTH, META) if (place / name).exists()}
            return place / TRUTH, _labels(files, place)
    return None


def _read(path: Path) -> bytes:
    try:
        return read_file(path, MAX_MAT_BYTES)
    except OSError as error:
        raise ZpipeError(f"{path}: can't be read ({error.strerror}); {_REMEDY}") from error


def _labels(files: dict[str, bytes], kit: Path) -> np.ndarray:
    if META in files:
        _check_numbers(files[META], f"{kit}: {META}")
    label_of = {synset.ilsvrc2012_id: label for label, synset in enumerate(synsets())}
    where, lines = f"{kit}: {TRUTH}", files[TRUTH].split()
    if len(lines) != NUM_VAL:
        raise ZpipeError(f"{where}: has {len(lines)} numbers, ImageNet's val split {NUM_VAL} images; {_REMEDY}")
    labels = np.empty(NUM_VAL, np.int16)
    for i, line in enumerate(lines):
        label = label_of.get(int(line)) if line.isdigit() and len(line) < 5 else None
        if label is None:
            shown = printable(line[:20].decode("ascii", "backslashreplace"))
            raise ZpipeError(f"{where}: line {i + 1}: {shown!r} is no number from 1 to {NUM_CLASSES}; {_REMEDY}")
        labels[i] = label
    return labels


def _check_numbers(data: bytes, where: str) -> None:
    """Check that the kit numbers the classes as ILSVRC 2012 did. Higher numbers are synsets above them."""
    rows = read_structs(data, where, "synsets", ("ILSVRC2012_ID", "WNID"))
    found = {row[0]: row[1] for row in rows}
    for synset in synsets():
        wnid = found.get(synset.ilsvrc2012_id)
        if wnid != synset.wnid:
            shown = printable(str(wnid)[:20])
            raise ZpipeError(
                f"{where}: number {synset.ilsvrc2012_id} is {shown!r}, in ILSVRC 2012 it is {synset.wnid}; {_REMEDY}"
            )
