"""The mean and standard deviation that a model's images are normalised by."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from zpipe.schemas.errors import UsageError
from zpipe.schemas.model_config import CONFIG_NAME
from zpipe.train.checkpoint import Preprocessing
from zpipe.train.fit.initialise import described
from zpipe.train.run_files import CHECKPOINT_NAME, read_record

Channels = tuple[float, float, float]


def choose_normalisation(
    run: Path,
    mean: Channels | None,
    std: Channels | None,
    *,
    zoomer: Preprocessing | None,
    init_from: str | None,
) -> tuple[Channels, Channels]:
    """Choose the mean and standard deviation of the three channels.

    A resumed run keeps those it began with. Otherwise they are those of the zoomer, else those of the weights to start
    from, else ImageNet's.

    Args:
        run: The run folder.
        mean: The mean that the user chose, or None.
        std: The standard deviation that the user chose, or None.
        zoomer: The preprocessing of the frozen zoomer, if there is one.
        init_from: The weights to start from, if any.

    Raises:
        UsageError: If only one of mean and std is given, or they are not those of the zoomer.
    """
    if (mean is None) != (std is None):
        raise UsageError("mean, std: give both, or neither")
    if mean is not None and std is not None:
        check_normalisation(zoomer, mean, std)
        return mean, std
    recorded: Mapping[str, Any] = {}
    if (run / CHECKPOINT_NAME).is_file() or (run / CONFIG_NAME).is_file():
        recorded = read_record(run)["settings"]
    elif zoomer is not None:
        return zoomer.mean, zoomer.std
    elif init_from is not None:
        recorded = described(init_from)
    return _channels(recorded.get("mean") or IMAGENET_DEFAULT_MEAN), _channels(
        recorded.get("std") or IMAGENET_DEFAULT_STD
    )


def check_normalisation(zoomer: Preprocessing | None, mean: Sequence[float], std: Sequence[float]) -> None:
    """Check that a frozen zoomer was trained with the normalisation of the model, whose images it is given.

    Raises:
        UsageError: If it was not, with both normalisations.
    """
    if zoomer is not None and (tuple(zoomer.mean), tuple(zoomer.std)) != (tuple(mean), tuple(std)):
        wanted, given = (
            [json.dumps(list(each), separators=(",", ":")) for each in pair]
            for pair in ((zoomer.mean, zoomer.std), (mean, std))
        )
        raise UsageError(
            f"--zoomer: was trained with mean {wanted[0]} and std {wanted[1]}, the model with {given[0]} and "
            f"{given[1]}; train the model with --set mean={wanted[0]} --set std={wanted[1]}"
        )


def _channels(values: Sequence[float]) -> Channels:
    red, green, blue = values
    return red, green, blue
