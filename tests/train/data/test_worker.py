"""Workers share an epoch: each place of each batch is filled by one of them."""

import ast
from pathlib import Path

import numpy as np
import pytest

from zpipe.train.data import worker
from zpipe.train.data.order import plan_epoch
from zpipe.train.data.transforms import ViewConfig
from zpipe.train.data.worker import EpochSpec


def spec(lane_stride=1, **changes):
    plan = plan_epoch(range(6), [np.arange(4)] * 6, 6, seed=0, epoch=0, shuffle=True)
    fields = {"epoch": 0, "seed": 0, "batches": range(1, 5), "batch_size": 4, "plan": lambda: plan}
    fields |= {
        "lane_stride": lane_stride,
        "shards": [],
        "stores": {},
        "missing": "error",
        "damaged": "error",
        "check": True,
    }
    return EpochSpec(**fields | {"image_size": 8, "view": ViewConfig()} | changes)


@pytest.mark.parametrize("workers", [1, 2, 3])
@pytest.mark.parametrize("lane_stride", [1, 2])
def test_every_place_has_one_worker_and_every_lane_too(workers, lane_stride):
    epoch = spec(lane_stride)
    whole = epoch.plan()[4:20]  # batches 1 to 4
    parts = [epoch.own(number, workers) for number in range(workers)]
    assert sorted(np.concatenate([places for _, places in parts]).tolist()) == list(range(16))
    for plan, places in parts:
        np.testing.assert_array_equal(plan.row, whole.row[places])
        np.testing.assert_array_equal(plan.shard, whole.shard[places])
    lanes = [set(plan.lane.tolist()) for plan, _ in parts]
    assert sum(map(len, lanes)) == len(set.union(*lanes)) == 6


def test_workers_do_not_know_the_loader():
    """The loader imports them, and gives them a spec."""
    tree = ast.parse(Path(worker.__file__).read_text())
    imported = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert "zpipe.train.data.order" in imported and "zpipe.train.data.loader" not in imported
