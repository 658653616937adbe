"""The order of an epoch: every sample once, whoever reads; and going on in the middle of one."""

import itertools
import json
import random
import subprocess
import sys
import time
import tracemalloc
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ramps import CELLS, KEYS, copy_shards, keys_of, load
from tiny import cut, encode, write_shards

from zpipe.schemas.errors import UsageError, ZpipeError
from zpipe.train.data import order as ordering
from zpipe.train.data.loader import RelevanceLoader
from zpipe.train.data.order import (
    deal,
    fresh_per_batch,
    lane_count,
    last_uses,
    plan_epoch,
    shard_order,
    whole_batches,
)

torch.set_num_threads(1)
# Four readers on two cores are what is tested here.
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")


def loader_of(data, **options):
    return RelevanceLoader(*data, **{"batch_size": 4, "image_size": CELLS} | options)


def same_batches(found, wanted):
    assert len(found) == len(wanted)
    for one, other in zip(found, wanted, strict=True):
        assert one.keys() == other.keys() and one["key"] == other["key"]
        for name in one.keys() - {"key"}:
            parts = [each if isinstance(each, list) else [each] for each in (one[name], other[name])]
            assert all(torch.equal(a, b) for a, b in zip(*parts, strict=True)), name


# ------------------------------------------------------------------------------------------------------- pure functions


def epoch_plan(counts, lanes, *, epoch=0, train=True):
    order = shard_order(len(counts), 3, epoch, shuffle=train)
    return plan_epoch(order.tolist(), [np.arange(counts[i]) for i in order], lanes, seed=3, epoch=epoch, shuffle=train)


def samples(plan):
    return list(zip(plan.shard.tolist(), plan.row.tolist(), strict=True))


@settings(deadline=None)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=30), st.integers(0, 12), st.booleans(), st.integers(0, 5))
def test_an_epoch_has_every_sample_once(counts, num_workers, train, epoch):
    plan = epoch_plan(counts, lane_count(num_workers, train=train), epoch=epoch, train=train)
    assert sorted(samples(plan)) == [(i, row) for i, count in enumerate(counts) for row in range(count)]
    # A lane reads one shard after the other, and each shard lies in one lane.
    for lane in set(plan.lane.tolist()):
        own = plan.shard[plan.lane == lane]
        assert (np.flatnonzero(np.diff(own)) + 1).size + 1 == len(set(own.tolist()))


@settings(deadline=None)
@given(
    st.lists(st.integers(0, 40), min_size=1, max_size=30),
    st.integers(1, 9),
    st.integers(1, 6),
    st.integers(1, 20),
    st.integers(1, 4),
)
def test_every_rank_takes_its_part_of_every_batch(counts, part, world_size, lanes, repeats):
    size = part * world_size
    plan = whole_batches(epoch_plan(counts, lanes), size, repeats)
    assert len(plan) == sum(counts) // size * size
    rank = deal(plan, size, world_size)
    for batch in rank.reshape(-1, size):
        assert np.bincount(batch, minlength=world_size).tolist() == [part] * world_size
    # Nobody reads what is not needed: a rank that takes from others' lanes has nothing of its own left in that batch.
    for ranks, lanes_of_batch in zip(rank.reshape(-1, size), plan.lane.reshape(-1, size), strict=True):
        own = lanes_of_batch % world_size
        for number in range(world_size):
            if (own[ranks == number] != number).any():
                assert (ranks[own == number] == number).all()


@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
@pytest.mark.parametrize(("batch_size", "repeats"), [(64, 1), (1024, 3), (48, 2)])
def test_a_shard_is_read_by_one_rank_when_the_lanes_come_out_even(world_size, batch_size, repeats):
    plan = whole_batches(epoch_plan([150] * 32, 8), batch_size, repeats)
    rank = deal(plan, batch_size, world_size)
    readers = [len(set(rank[plan.shard == shard].tolist())) for shard in sorted(set(plan.shard.tolist()))]
    assert max(readers) == 1 and np.array_equal(rank, plan.lane % world_size)


def test_when_a_lane_has_ended_few_shards_get_a_second_reader():
    plan = whole_batches(epoch_plan([1000] * 83, 8), 256, 1)
    rank = deal(plan, 256, 4)
    readers = [len(set(rank[plan.shard == shard].tolist())) for shard in range(83)]
    assert sum(readers) <= 83 + 8 and min(readers) == 1


@settings(deadline=None)
@given(st.lists(st.integers(0, 60), min_size=1, max_size=20), st.integers(1, 400), st.integers(1, 5), st.integers(0, 3))
def test_repeats_stand_in_one_batch_each_in_another_view(counts, size, repeats, epoch):
    once = epoch_plan(counts, 8, epoch=epoch)
    plan = whole_batches(once, size, repeats)
    fresh = fresh_per_batch(size, repeats)
    assert min(size, -(-size // repeats)) <= fresh <= size
    seen = []
    for start in range(0, len(plan), size):
        batch = plan[start : start + size]
        times = set(Counter(samples(batch)).values())
        assert times <= {size // fresh, -(-size // fresh)} and max(times) <= repeats
        if size % repeats == 0 and size // repeats < 64:
            assert times == {repeats}
        assert len(set(zip(samples(batch), batch.copy.tolist(), strict=True))) == size
        assert sorted(set(batch.copy.tolist())) == list(range(-(-size // fresh)))
        seen += sorted(set(samples(batch)))
    assert len(seen) == len(set(seen)) == len(plan) // size * fresh
    if repeats == 1:
        assert samples(plan) == samples(once)[: len(plan)] and not plan.copy.any()


@settings(deadline=None)
@given(st.lists(st.integers(0, 60), min_size=1, max_size=9), st.integers(1, 50), st.integers(1, 5))
def test_the_last_use_of_a_sample_is_known(counts, size, repeats):
    plan = whole_batches(epoch_plan(counts, 8), size, repeats)
    found = samples(plan)
    assert last_uses(plan).tolist() == [sample not in found[place + 1 :] for place, sample in enumerate(found)]


def test_over_the_epochs_every_sample_comes():
    seen = set()
    for epoch in range(40):
        seen |= set(samples(whole_batches(epoch_plan([20] * 6, 8, epoch=epoch), 12, 3)))
    assert len(seen) == 120


@given(st.integers(0, 200))
def test_workers_share_lanes_evenly(num_workers):
    assert lane_count(num_workers, train=True) % max(1, num_workers) == 0
    assert lane_count(num_workers, train=True) >= 8
    assert {lane_count(n, train=True) for n in (0, 1, 2, 4, 8)} == {8}
    assert lane_count(num_workers, train=False) == max(1, num_workers)


@given(st.integers(1, 300), st.integers(0, 3))
def test_evaluation_in_one_process_is_in_the_order_of_the_shards(count, seed):
    counts = np.random.default_rng(seed).integers(1, 5, count)
    plan = plan_epoch(range(count), [np.arange(n) for n in counts], 1, seed=seed, epoch=0, shuffle=False)
    assert plan.shard.tolist() == np.repeat(np.arange(count), counts).tolist()


def test_a_batch_is_mixed_from_many_shards():
    plan = plan_epoch(range(40), [np.arange(1000)] * 40, 8, seed=0, epoch=0, shuffle=True)
    for start in range(0, 40_000, 4096):
        assert len(set(plan.shard[start : start + 128].tolist())) >= 8
    rows = plan.row[plan.shard == 7]
    assert abs(np.corrcoef(rows, np.arange(1000))[0, 1]) < 0.1


# ------------------------------------------------------------------------------------------------------ real loaders


@pytest.mark.parametrize("num_workers", [1, 2, 4])
def test_how_many_processes_read_changes_nothing(data, num_workers):
    same_batches(load(data, num_workers=num_workers), load(data))


@pytest.mark.parametrize("workers", [(0, 2), (2, 0), (2, 4), (3, 1), (1, 3)])
def test_gone_on_with_in_the_middle_it_is_the_same_epoch(data, workers):
    """From every batch on, in a new loader with another number of workers."""
    before, after = workers
    first = loader_of(data, num_workers=before)
    first.set_epoch(3)
    states, batches = [first.state_dict()], []
    for batch in first:
        batches.append(batch)
        states.append(json.loads(json.dumps(first.state_dict())))
    for done, state in enumerate(states):
        second = loader_of(data, num_workers=after)
        second.load_state_dict(state)
        second.set_epoch(3)
        same_batches(list(second), batches[done:])
    # Behind it comes the next epoch, whole and with this loader's own lanes.
    second.set_epoch(4)
    fresh = loader_of(data, num_workers=after)
    fresh.set_epoch(4)
    same_batches(list(second), list(fresh))


def test_a_state_of_another_order_is_refused(data):
    state = loader_of(data).state_dict()
    for options in ({"seed": 1}, {"batch_size": 3}, {"world_size": 2}, {"repeats": 2}):
        with pytest.raises(UsageError, match=f"taken with {next(iter(options))}="):
            loader_of(data, **options).load_state_dict(state)


def test_a_state_over_other_shards_is_refused(data, tmp_path):
    loader = loader_of(data)
    next(iter(loader))
    state = json.loads(json.dumps(loader.state_dict()))
    options = {"batch_size": 4, "image_size": CELLS}
    RelevanceLoader(copy_shards(data, tmp_path / "moved"), **options).load_state_dict(state)
    fewer = RelevanceLoader(min(data[0].glob("*.tar")), **options)
    with pytest.raises(UsageError, match="over other shards .*use the same, or begin with the next epoch"):
        fewer.load_state_dict(state)
    # Nor one of other samples of the same shards, as missing= and the maps choose them.
    with pytest.raises(
        UsageError, match=r"over 5 samples, this loader has \d+ of the same shards; give the same maps and mis"
    ):
        loader_of(data).load_state_dict(state | {"samples": 5})
    del state["samples"]
    # One of an earlier zpipe doesn't say which shards; it can't be behind the last batch.
    del state["digest"]
    fewer.load_state_dict(state | {"batch": len(fewer)})
    with pytest.raises(UsageError, match=f"behind batch {len(fewer) + 1}, an epoch here has {len(fewer)}"):
        fewer.load_state_dict(state | {"batch": len(fewer) + 1})


def together(data, world_size, *, batch_size, **options):
    """The batches of all ranks, put together."""
    ranks = [
        loader_of(data, batch_size=batch_size // world_size, rank=rank, world_size=world_size, **options)
        for rank in range(world_size)
    ]
    return ranks, [[item for part in parts for item in entries(part)] for parts in zip(*ranks, strict=True)]


def entries(batch):
    """What a batch holds, sample by sample: key and crop."""
    return sorted(zip(batch["key"], map(tuple, batch["box"].tolist()), strict=True))


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 3), st.integers(0, 20), st.integers(0, 100))
def test_ranks_together_have_the_batches_of_one_process(data, world_size, part, repeats, epoch, seed):
    options = {"batch_size": part * world_size, "repeats": repeats, "seed": seed, "image_size": 4}
    one = loader_of(data, **options, num_workers=0)
    one._lanes = loader_of(data, **options | {"batch_size": part}, world_size=world_size)._lanes  # 9 for 3 ranks
    ranks, batches = together(data, world_size, **options)
    assert [sorted(batch) for batch in batches] == [entries(batch) for batch in one]
    assert len({len(rank) for rank in ranks}) == 1


def test_a_rank_keeps_the_order_of_the_batch(data):
    wholes = [batch["key"] for batch in loader_of(data, batch_size=6)]
    for rank in range(2):
        for whole, batch in zip(wholes, loader_of(data, batch_size=3, rank=rank, world_size=2), strict=True):
            assert batch["key"] == [key for key in whole if key in batch["key"]]


def test_gone_on_with_by_another_number_of_ranks(data):
    wholes = [entries(batch) for batch in loader_of(data, batch_size=6)]
    first = loader_of(data, batch_size=3, rank=1, world_size=2)
    next(iter(first))
    state = first.state_dict()
    for world_size in (1, 2, 3):
        parts = []
        for rank in range(world_size):
            loader = loader_of(data, batch_size=6 // world_size, rank=rank, world_size=world_size)
            loader.load_state_dict(state)
            parts.append([entries(batch) for batch in loader])
        assert [sorted(itertools.chain(*part)) for part in zip(*parts, strict=True)] == wholes[1:]
    # In evaluation ranks have other batches altogether.
    state = loader_of(data, augment="eval", rank=1, world_size=2).state_dict()
    with pytest.raises(UsageError, match="taken with batch_size=4, this loader has 8"):
        loader_of(data, augment="eval", batch_size=8).load_state_dict(state)


def test_repeats_are_gone_on_with_and_let_go(data):
    first, second = (loader_of(data, repeats=3, num_workers=workers) for workers in (2, 0))
    batches = list(first)
    assert all(len(set(batch["key"])) == 2 and len(set(entries(batch))) == 4 for batch in batches)
    begun = next(iter(second))
    third = loader_of(data, repeats=3)
    third.load_state_dict(second.state_dict())
    same_batches([begun, *third], batches)
    assert first.epoch_counts() == {"served": 12, "dropped": 12}


def test_the_first_of_the_repeats_is_what_comes_without_them(data):
    alone = {item for batch in loader_of(data) for item in entries(batch)}
    batch = next(iter(loader_of(data, repeats=2)))
    assert sum(item in alone for item in entries(batch)) == 2


def test_reading_draws_nothing_from_the_users_random_numbers(data):
    for colour in ("none", "deit", "deit3"):
        torch.manual_seed(0)
        random.seed(0)
        np.random.seed(0)
        loader = loader_of(data, num_workers=2 if colour == "none" else 0, view=view(colour))
        for _ in loader:
            pass
        found = torch.rand(1).item(), random.random(), np.random.rand()
        torch.manual_seed(0)
        random.seed(0)
        np.random.seed(0)
        assert found == (torch.rand(1).item(), random.random(), np.random.rand())


def view(colour):
    from zpipe.train.data.transforms import ViewConfig

    return ViewConfig(colour=colour)


KILLED = """
import json, os, sys, time
from pathlib import Path
import torch
torch.set_num_threads(1)
from zpipe.train.data import order as ordering
from zpipe.train.data.loader import RelevanceLoader
shards, maps, folder, workers = sys.argv[1], sys.argv[2], Path(sys.argv[3]), int(sys.argv[4])
loader = RelevanceLoader(shards, maps, batch_size=2, image_size=16, num_workers=workers, seed=5)
if (folder / "state.json").is_file():
    loader.load_state_dict(json.loads((folder / "state.json").read_text())["loader"])
seen = json.loads((folder / "state.json").read_text())["seen"] if (folder / "state.json").is_file() else []
print("begun", flush=True)
for batch in loader:
    seen += batch["key"]
    (folder / "new.json").write_text(json.dumps({"loader": loader.state_dict(), "seen": seen}))
    os.replace(folder / "new.json", folder / "state.json")
    time.sleep(0.03)
(folder / "done").write_text("")
"""


def killed_and_gone_on_with(data, folder, times, rng):
    kills = 0
    for _ in range(200):
        line = [sys.executable, "-c", KILLED, str(data[0]), str(data[1]), str(folder), str(rng.choice([0, 1, 2, 3]))]
        running = subprocess.Popen(line, stdout=subprocess.PIPE)
        assert running.stdout.readline() == b"begun\n"
        if kills < times:
            time.sleep(rng.uniform(0.0, 0.12))
            running.kill()
            kills += 1
        running.wait(120)
        if (folder / "done").exists():
            break
    return json.loads((folder / "state.json").read_text())["seen"], kills


def test_killed_in_mid_epoch_no_sample_is_lost_or_doubled(data, tmp_path):
    seen, _ = killed_and_gone_on_with(data, tmp_path, 2, random.Random(0))
    whole = keys_of(load(data, batch_size=2, image_size=16, seed=5))
    assert seen == whole and sorted(whole) == sorted(KEYS)


@pytest.mark.slow
def test_killed_at_twenty_points(data, tmp_path):
    rng, kills, round_number = random.Random(1), 0, 0
    while kills < 20:
        folder = tmp_path / str(round_number)
        folder.mkdir()
        seen, more = killed_and_gone_on_with(data, folder, 20 - kills, rng)
        kills, round_number = kills + more, round_number + 1
        assert seen == keys_of(load(data, batch_size=2, image_size=16, seed=5))


# ---------------------------------------------------------------------------------------- counts, damage, public tars


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("epoch", value) for value in (-1, "0", None, 0.5, float("nan"), True, 10**30)),
        *(("batch", value) for value in (-1, "x", float("inf"), 1.5, [])),
        *(("lanes", value) for value in (0, -8, 10**12, "8")),
        *(("batch_size", value) for value in (0, None, "4")),
        *(("world_size", value) for value in (0, 1.5)),
        *(("repeats", value) for value in (0, "1")),
        *(("seed", value) for value in ("0", None, [])),
        *(("digest", value) for value in (5, b"x")),
        *(("samples", value) for value in (-1, "24")),
    ],
)
def test_a_state_of_other_values_is_one_line(data, name, value):
    loader = loader_of(data)
    with pytest.raises(UsageError, match=f"not a state of a RelevanceLoader .*{name}") as error:
        loader.load_state_dict(loader.state_dict() | {name: value})
    assert "\n" not in str(error.value) and loader.state_dict() == loader_of(data).state_dict()


@pytest.mark.parametrize("state", [{}, None, 5, "state", [], {"epoch": 0}])
def test_what_is_no_state_is_one_line(data, state):
    with pytest.raises(UsageError, match="not a state of a RelevanceLoader"):
        loader_of(data).load_state_dict(state)


def test_a_position_behind_the_end_is_one_line(data):
    loader = loader_of(data)
    with pytest.raises(UsageError, match="behind batch 99, an epoch here has 6"):
        loader.load_state_dict(loader.state_dict() | {"batch": 99})


def test_what_became_of_the_samples_is_told(data, holes):
    assert loader_of(data, batch_size=5).epoch_counts() == {"served": 20, "dropped": 4}
    assert loader_of(data, batch_size=5, augment="eval").epoch_counts() == {"served": 24, "dropped": 0}
    two = loader_of(data, batch_size=2, world_size=2)
    assert sum(two.epoch_counts().values()) == 24
    usable = 22
    counts = loader_of(holes, batch_size=1, missing="skip").epoch_counts()
    assert counts == {"served": usable, "dropped": 0, "skipped": 24 - usable}
    counts = loader_of(holes, batch_size=1, missing="uniform").epoch_counts()
    assert counts == {"served": 24, "dropped": 0, "uniform": 24 - usable}


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_damaged_tar_may_be_left_out_and_is_told(data, tmp_path, num_workers):
    folder = copy_shards(data, tmp_path / "s")
    loader = RelevanceLoader(folder, data[1], batch_size=6, image_size=CELLS, num_workers=num_workers, damaged="skip")
    cut(folder / "shard-00002.tar", "on")
    seen = [key for batch in loader for key in batch["key"]]
    lost = KEYS[10:16]  # the third tar's
    assert sorted(seen) == sorted(set(KEYS) - set(lost))
    assert len(loader.damaged_shards) == 1 and "shard-00002.tar" in loader.damaged_shards[0]
    with pytest.raises(ZpipeError, match="shard-00002.tar"):
        list(RelevanceLoader(data[0], batch_size=6, image_size=CELLS)) and list(
            RelevanceLoader(folder, data[1], batch_size=6, image_size=CELLS)
        )


def test_public_tars_are_read_as_they_are(data, tmp_path):
    """No index beside them; the same order and the same samples as with one."""
    folder = copy_shards(data, tmp_path / "s")
    for name in ("shards.json",):
        (folder / name).unlink()
    same_batches(load((folder, data[1])), load(data))
    same_batches(load((folder,), augment="eval", num_workers=2), load((data[0],), augment="eval", num_workers=2))


def test_public_tars_that_are_not_those_of_the_maps_are_noticed(data, tmp_path):
    folder = copy_shards(data, tmp_path / "s")
    (folder / "shards.json").unlink()
    (folder / "shard-00001.tar").unlink()
    (folder / "shard-00002.tar").rename(folder / "shard-00001.tar")
    with pytest.raises(ZpipeError, match="made from a shard-00001.tar of 3 samples, .* has 6"):
        RelevanceLoader(folder, data[1], batch_size=1)


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_a_mutated_tar_gives_its_samples_or_an_error(tmp_path_factory, draw):
    """Bytes changed, cut or repeated anywhere: the loader ends, with every label or with one line, never in between."""
    pixels = np.zeros((8, 8, 3), np.uint8)
    members = {}
    for number in range(3):
        members[f"{number}.png"] = encode(pixels + number)
        members[f"{number}.cls"] = str(number).encode()
    folder = write_shards(tmp_path_factory.mktemp("fuzz") / "s", [members])
    tar = folder / "shard-00000.tar"
    whole = bytearray(tar.read_bytes())
    kind = draw.draw(st.sampled_from(["flip", "cut", "repeat", "zero"]))
    at = draw.draw(st.integers(0, len(whole) - 1))
    size = draw.draw(st.integers(1, 600))
    if kind == "flip":
        for offset in draw.draw(st.lists(st.integers(0, len(whole) - 1), min_size=1, max_size=8)):
            whole[offset] ^= draw.draw(st.integers(1, 255))
    elif kind == "cut":
        del whole[at:]
    elif kind == "repeat":
        whole[at:at] = whole[at : at + size]
    else:
        whole[at : at + size] = bytes(len(whole[at : at + size]))
    tar.write_bytes(whole)
    for indexed in (True, False):
        if not indexed:
            (folder / "shards.json").unlink()
        try:
            batches = list(RelevanceLoader(folder, batch_size=2, image_size=8, augment="eval"))
        except ZpipeError as error:
            assert str(folder) in str(error) and "\n" not in str(error)
            continue
        found = [
            (key, int(label)) for batch in batches for key, label in zip(batch["key"], batch["label"], strict=True)
        ]
        if indexed:
            assert [key for key, _ in found] == ["0", "1", "2"]
        assert all(isinstance(label, int) for _, label in found)


# ----------------------------------------------------------------------------------------------------------- large data


def test_the_order_of_a_large_epoch_takes_little_memory():
    """Every worker of every rank makes it: what a sample costs here is paid tens of times on one machine."""
    shards, size = 400, 1000
    rows = [np.arange(size, dtype=np.int32)] * shards
    order = shard_order(shards, 0, 0, shuffle=True).tolist()
    tracemalloc.start()
    try:
        plan = plan_epoch(order, rows, 64, seed=0, epoch=0, shuffle=True)
        held = tracemalloc.get_traced_memory()[0]
        plan = whole_batches(plan, 1024, 1)
        mine = plan[deal(plan, 1024, 8) == 0]
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(mine) == shards * size // 1024 * 128
    assert held < 15 * shards * size and peak < 50 * shards * size


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(0, 40), min_size=1, max_size=20), st.integers(1, 4), st.integers(1, 8), st.integers(1, 3))
def test_ranks_are_dealt_the_same_in_pieces_of_any_size(counts, world_size, part, repeats):
    lanes, size = lane_count(world_size, train=True), part * world_size
    plan = whole_batches(epoch_plan(counts, lanes), size, repeats)
    whole = deal(plan, size, world_size)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ordering, "DEAL_CHUNK", 1)
        assert np.array_equal(deal(plan, size, world_size), whole)
    dealt = whole.reshape(-1, size)
    assert all((np.bincount(own, minlength=world_size) == part).all() for own in dealt)
