"""Shards and maps of ramps, see ramps.py. Leave them unchanged; `copy_shards` copies them."""

import numpy as np
import pytest
from ramps import CELLS, KEYS, LENGTHS, SIZES, angle_of, plane
from tiny import encode, rewrite_store, store, write_shards


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """Shards and maps in which every image shows its own map: a ramp in a direction that no other image has."""
    root = tmp_path_factory.mktemp("loader")
    tars, number = [], 0
    for length in LENGTHS:
        members = {}
        for _ in range(length):
            grey = np.clip(plane(angle_of(number), *SIZES[number % len(SIZES)]) * 255, 0, 255).round().astype(np.uint8)
            members[f"{KEYS[number]}.png"] = encode(grey)
            members[f"{KEYS[number]}.cls"] = str(number).encode()
            number += 1
        tars.append(members)
    shards = write_shards(root / "shards", tars)
    maps = {key: plane(angle_of(number), CELLS, CELLS) for number, key in enumerate(KEYS)}
    return shards, rewrite_store(store(shards, root / "maps", num_classes=len(KEYS)), maps)


@pytest.fixture(scope="session")
def holes(data, tmp_path_factory):
    """The same store, with two maps that hold no relevance."""
    shards = data[0]
    maps = {key: plane(angle_of(number), CELLS, CELLS) for number, key in enumerate(KEYS)}
    root = store(shards, tmp_path_factory.mktemp("holes") / "maps", num_classes=len(KEYS))
    return shards, rewrite_store(root, maps, {KEYS[2]: "zero", KEYS[12]: "nonfinite"})
