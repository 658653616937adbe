"""Trainings of tests take the lease of their run without waiting for another process that might take it, too."""

import pytest

from zpipe.schemas import lease


@pytest.fixture(scope="session", autouse=True)
def lease_without_waiting():
    patch = pytest.MonkeyPatch()
    patch.setattr(lease, "SETTLE_S", 0.0)
    yield
    patch.undo()
