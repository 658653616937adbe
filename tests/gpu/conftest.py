"""The devices of the tests in this folder: a CUDA device for tests marked `gpu`, and the CPU, which runs most of them.

On the CPU, small inputs show that a test itself is right.
"""

import numpy as np
import pytest
import torch
from tiny import encode, write_shards

from zpipe.schemas import lease


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("torch sees no CUDA device here")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    """Each test runs on the CPU and, marked `gpu`, on a CUDA device."""
    return torch.device(request.param)


@pytest.fixture(autouse=True)
def lease_without_waiting(monkeypatch):
    monkeypatch.setattr(lease, "SETTLE_S", 0.0)


@pytest.fixture(scope="session")
def photo_shards(tmp_path_factory):
    """24 images of three classes in four tars."""
    pixels = np.random.default_rng(0).integers(0, 256, (24, 8, 8, 3), dtype=np.uint8)
    members = [
        (name, data)
        for number, image in enumerate(pixels)
        for name, data in ((f"{number:03}.png", encode(image)), (f"{number:03}.cls", str(number % 3).encode()))
    ]
    return write_shards(tmp_path_factory.mktemp("gpu") / "shards", [dict(members[i : i + 12]) for i in (0, 12, 24, 36)])
