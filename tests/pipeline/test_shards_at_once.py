"""Several shards on a device at once: whose turn it is, and that no byte depends on it."""

import threading
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from tiny import encode, write_shards

from zpipe.pipeline import worker
from zpipe.pipeline.device_turns import MAX_LAUNCHED, DeviceTurns
from zpipe.pipeline.explainer import NO_CLASS, Explained
from zpipe.pipeline.shard_reader import BATCHES_AHEAD, Frame, frame_image, pixel_batches
from zpipe.pipeline.shard_rows import append_rows
from zpipe.pipeline.worker import ShardWorker
from zpipe.schemas.errors import ZpipeError
from zpipe.schemas.sample import Sample

FRAME = Frame(kind="full", size=(16, 24), interpolation="bilinear")


def until(condition):
    for _ in range(2000):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("it never came")


# --------------------------------------------------------------------------------------------------------------- turns


class Batch:
    """A batch that the device has when `launch` is called, and that is done when the test says so."""

    def __init__(self, name, log):
        self.name, self.log, self.done = name, log, threading.Event()

    def launch(self):
        self.log.append(self.name)
        return self

    def result(self):
        assert self.done.wait(20)
        return self.name


def test_the_oldest_shard_has_the_next_turn():
    turns, log = DeviceTurns(), []
    batches = {age: Batch(age, log) for age in (5, 6, 3, 1, 2)}
    for age in (5, 6):  # as many as the device has at once
        turns.start(age, batches[age].launch)
    with ThreadPoolExecutor(3) as pool:
        started = [pool.submit(turns.start, age, batches[age].launch) for age in (3, 1, 2)]
        until(lambda: len(turns._waiting) == 3)
        assert log == [5, 6] and MAX_LAUNCHED == 2
        for age, expected in ((6, 1), (1, 2), (5, 3)):
            batches[age].done.set()
            until(lambda expected=expected: log[-1] == expected)
        for each in batches.values():
            each.done.set()
        assert sorted(each.result().result() for each in started) == [1, 2, 3]


def test_a_batch_that_fails_ends_its_turn():
    turns = DeviceTurns()

    class Broken(Batch):
        def result(self):
            raise RuntimeError("of the result")

    def fail():
        raise RuntimeError("of the launch")

    for _ in range(3 * MAX_LAUNCHED):
        with pytest.raises(RuntimeError, match="of the launch"):
            turns.start(0, fail)
        with pytest.raises(RuntimeError, match="of the result"):
            turns.start(0, Broken("", []).launch).result()


# ------------------------------------------------------------------------------------------------------------- reading


def samples(count, broken=()):
    rng = np.random.default_rng(0)
    for number in range(count):
        image = encode(rng.integers(0, 256, (20, 30, 3), dtype=np.uint8))
        yield Sample(key=f"k{number}", image=b"" if number in broken else image, label=number)


@pytest.mark.parametrize("threads", [1, 3, 16])
@pytest.mark.parametrize("batch_size", [1, 4, 5, 64])
def test_batches_hold_their_pixels_side_by_side(batch_size, threads):
    arrays = []

    def new_array(shape):
        arrays.append(np.zeros(shape, np.uint8))
        return arrays[-1]

    found = list(
        pixel_batches(samples(13, broken=[2]), FRAME, batch_size=batch_size, threads=threads, new_array=new_array)
    )
    images = [image for batch in found for image in batch.images]
    assert [image.key for image in images] == [f"k{number}" for number in range(13)]
    assert [len(batch.images) for batch in found[:-1]] == [batch_size] * (len(found) - 1)
    for batch, array in zip(found, arrays, strict=False):
        assert batch.pixels.base is array and len(batch.pixels) == len(batch.images)
        for image, row in zip(batch.images, batch.pixels, strict=True):
            assert image.pixels is None or np.shares_memory(image.pixels, row)
    for image, sample in zip(images, samples(13, broken=[2]), strict=True):
        np.testing.assert_equal(image.pixels, frame_image(sample, FRAME).pixels)


def test_an_error_of_the_reader_comes_after_the_batches_before_it():
    def some():
        yield from samples(6)
        raise ZpipeError("truncated")

    batches = pixel_batches(some(), FRAME, batch_size=2, threads=2)
    assert [next(batches).images[0].key for _ in range(3)] == ["k0", "k2", "k4"]
    with pytest.raises(ZpipeError, match="truncated"):
        next(batches)


def test_reading_is_bounded_and_ends_with_its_consumer():
    taken = []

    def endless():
        for sample in samples(10**6):
            taken.append(sample.key)
            yield sample

    before = threading.active_count()
    batches = pixel_batches(endless(), FRAME, batch_size=4, threads=2)
    next(batches)
    most = 4 * (BATCHES_AHEAD + 1)
    until(lambda: len(taken) == most)
    time.sleep(0.05)
    assert len(taken) == most
    batches.close()
    assert threading.active_count() == before


# --------------------------------------------------------------------------------------------------------------- bytes


@pytest.fixture
def tars(tmp_path):
    """Six tars of seven images, of which one can't be decoded."""

    def sample(number):
        rng = np.random.default_rng(number)
        image = encode(rng.integers(0, 256, (40, 60, 3), dtype=np.uint8))
        return {
            f"k{number}.png": b"\x89PNG\r\n\x1a\n" if number == 9 else image,
            f"k{number}.cls": b"%d" % (number % 5),
        }

    parts = [
        {name: data for number in range(7 * tar, 7 * tar + 7) for name, data in sample(number).items()}
        for tar in range(6)
    ]
    return write_shards(tmp_path / "tars", parts)


def files(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("options", [{}, {"stability": True, "save": ("logits", "features")}])
def test_no_byte_depends_on_the_shards_at_once(tars, tmp_path, extract, monkeypatch, options):
    settings = {"batch_size": 3, "device": "cpu", **options}
    extract(tars, tmp_path / "one", **settings)
    monkeypatch.setattr(worker, "shards_at_once", lambda device: 2)
    most, running = [], []
    process = ShardWorker.process

    def counted(self, task):
        running.append(task)
        most.append(len(running))
        until(lambda: max(most) == 2)
        report = process(self, task)
        running.remove(task)
        return report

    monkeypatch.setattr(ShardWorker, "process", counted)
    report = extract(tars, tmp_path / "two", **settings)
    assert max(most) == 2 and report.statuses == {"ok": 41, "undecodable": 1}
    assert files(tmp_path / "one") == files(tmp_path / "two")


def test_an_error_ends_its_shard_alone(tars, tmp_path, extract, monkeypatch):
    monkeypatch.setattr(worker, "shards_at_once", lambda device: 2)
    broken = sorted(tars.glob("*.tar"))[2]
    data = bytearray(broken.read_bytes())
    data[5000] ^= 1
    broken.write_bytes(data)
    with pytest.raises(ZpipeError, match="1 of 6 shards failed") as error:
        extract(tars, tmp_path / "maps")
    assert broken.name in error.value.details[0]


def test_the_end_of_a_run_does_not_wait_for_its_shards(tars, tmp_path, extract, monkeypatch):
    """As after Ctrl-C: the threads end at their next batch."""
    monkeypatch.setattr(worker, "shards_at_once", lambda device: 2)
    explain, ended = ShardWorker._explain, []

    def slow(self, *args):
        until(lambda: ended or len(batches) < 3)
        batches.append(args)
        return explain(self, *args)

    def interrupt(*args, **options):
        raise KeyboardInterrupt

    batches = []
    monkeypatch.setattr(ShardWorker, "_explain", slow)
    stop = ShardWorker.stop
    monkeypatch.setattr(ShardWorker, "stop", lambda self: (stop(self), ended.append(self)))
    monkeypatch.setattr(worker, "wait", interrupt)
    with pytest.raises(KeyboardInterrupt):
        extract(tars, tmp_path / "maps", batch_size=1)
    assert ended and len(batches) <= 12 and not list((tmp_path / "maps").rglob("*.parquet"))


# ---------------------------------------------------------------------------------------------------------------- rows


def test_rows_of_the_index_say_the_teachers_answer_and_the_first_target():
    rng = np.random.default_rng(0)
    logits = (10 * rng.standard_normal((6, 1000))).astype(np.float32)
    logits[1, 3], logits[2] = np.inf, np.nan
    targets = rng.integers(0, 1000, (6, 3))
    targets[4] = NO_CLASS
    images = [frame_image(sample, FRAME) for sample in samples(6, broken=[2])]
    columns = defaultdict(list)
    append_rows(columns, images[:4], Explained(np.zeros(4), logits[:4], targets[:4], np.zeros(4)))
    append_rows(columns, images[4:], Explained(np.zeros(2), logits[4:], targets[4:], np.zeros(2)))
    assert columns["key"] == [f"k{number}" for number in range(6)] and columns["label"] == list(range(6))
    assert columns["target"] == targets[:, 0].tolist() and columns["targets"] == targets.tolist()
    assert [columns[name][0] for name in ("width", "height", "frame_x2", "frame_y2")] == [30, 20, 30.0, 20.0]
    for row, logit in enumerate(logits):
        if row in (1, 2):
            assert columns["predicted"][row] == NO_CLASS
            assert np.isnan(columns["predicted_probability"][row]) and np.isnan(columns["target_probability"][row])
            continue
        shifted = np.exp(logit.astype(np.float64) - float(logit.max()))
        probability = shifted / shifted.sum()  # to the last bit
        assert columns["predicted"][row] == probability.argmax()
        assert columns["predicted_probability"][row] == probability.max()
        expected = np.nan if row == 4 else probability[targets[row, 0]]
        np.testing.assert_equal(columns["target_probability"][row], expected)
