"""A batch size that follows the memory there is."""

from hypothesis import given
from hypothesis import strategies as st

from zpipe.pipeline.batch_size import GROW_AFTER, MAX_FAILURES, BatchSize


def run(batch, room, times):
    """Compute full batches in the room there is; returns the sizes that failed."""
    failed = []
    for _ in range(times):
        if (size := batch.size) > room:
            failed.append(size)
            batch.failed(size)
        else:
            batch.fitted(size)
    return failed


def test_it_grows_back_when_the_shortage_is_over():
    batch = BatchSize(64)
    assert run(batch, room=10, times=3) == [64, 32, 16] and batch.size == 8
    assert run(batch, room=100, times=3 * GROW_AFTER) == [] and batch.size == 64


def test_it_stays_below_what_failed_twice():
    batch = BatchSize(64)
    assert run(batch, room=10, times=10 * GROW_AFTER) == [64, 32, 16, 16] and batch.size == 8


def test_parts_smaller_than_a_batch_prove_nothing():
    batch = BatchSize(64)
    assert batch.failed(64) == "lowered to 32"
    for _ in range(2 * GROW_AFTER):
        batch.fitted(31)
    assert batch.size == 32
    for _ in range(GROW_AFTER):
        batch.fitted(32)
    assert batch.size == 64
    assert batch.failed(64) == "32 from now on"


@given(st.integers(2, 1024), st.lists(st.integers(1, 2048), min_size=1, max_size=8))
def test_it_never_exceeds_what_was_asked_and_failures_end(most, rooms):
    batch, failed = BatchSize(most), []
    for room in rooms:
        failed += run(batch, room, times=100)
        assert 1 <= batch.size <= most
    assert all(failed.count(size) <= MAX_FAILURES for size in failed)
    assert run(batch, min(rooms), times=1000)[MAX_FAILURES * 11 :] == []
