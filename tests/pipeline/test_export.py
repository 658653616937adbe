"""Maps in other people's formats, two stores side by side, and the histograms of one."""

import json

import datasets
import duckdb
import numpy as np
import pandas
import polars
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

import zpipe
from zpipe.pipeline.compare import compare_stores, spearman, top_overlap
from zpipe.pipeline.export import export_lance, export_numpy, export_parquet
from zpipe.pipeline.extract import ExtractConfig, extract_teacher_maps
from zpipe.pipeline.inspection import store_statistics
from zpipe.schemas.errors import UsageError, ZpipeError
from zpipe.schemas.relevance_maps import normalise_minmax

GRID = (4, 6)


@pytest.fixture(scope="module")
def parquet(store, tmp_path_factory):
    out = tmp_path_factory.mktemp("export") / "maps.parquet"
    assert export_parquet(zpipe.open_maps(store), out) == 1
    return out


@pytest.fixture
def expected(store):
    maps = zpipe.open_maps(store)
    return {key: maps[key].reshape(-1) for key in maps}


def same(found, expected):
    """{key: (stored map, scale)} against raw maps: exact, since both come from the same float16."""
    assert list(found) == list(expected)
    for key, (values, scale) in found.items():
        values = np.asarray(values, np.float32)
        assert np.array_equal(values * np.float32(scale), expected[key])


# ----------------------------------------------------------------------------------------------- other people's readers


def test_pandas_opens_it(parquet, expected):
    frame = pandas.read_parquet(parquet)
    same({row.key: (row.map, row.scale) for row in frame.itertuples()}, expected)


def test_polars_opens_it(parquet, expected):
    frame = polars.read_parquet(parquet)
    assert isinstance(frame.schema["map"], polars.Array) and frame.schema["map"].shape == (24,)
    same({row["key"]: (row["map"], row["scale"]) for row in frame.iter_rows(named=True)}, expected)


def test_duckdb_opens_it(parquet, expected):
    rows = duckdb.sql(f"select key, map, scale from '{parquet}'").fetchall()
    same({key: (values, scale) for key, values, scale in rows}, expected)
    (strongest,) = duckdb.sql(f"select key from '{parquet}' order by scale desc limit 1").fetchall()[0]
    assert strongest == max(expected, key=lambda key: np.abs(expected[key]).max())


def test_hugging_face_opens_it(parquet, expected, tmp_path):
    data = datasets.Dataset.from_parquet(str(parquet), cache_dir=str(tmp_path))
    assert data.features["map"].length == 24
    same({row["key"]: (row["map"], row["scale"]) for row in data}, expected)


def test_lance_opens_it(store, tmp_path, expected):
    lance = pytest.importorskip("lance")
    export_lance(zpipe.open_maps(store), tmp_path / "maps.lance")
    data = lance.dataset(str(tmp_path / "maps.lance"))
    rows = data.to_table().to_pylist()
    same({row["key"]: (row["map"], row["scale"]) for row in rows}, expected)
    table = zpipe.open_maps(store).table()
    assert data.to_table(columns=table.column_names[:-1]).equals(table.drop_columns("shard"))
    assert data.schema.field("map").type == pa.list_(pa.float16(), 24)
    assert json.loads(data.schema.field("map").metadata[b"shape"]) == list(GRID)
    assert json.loads(data.schema.metadata[b"zpipe"]) == zpipe.open_maps(store).manifest.provenance.compared()
    some = [3, 17, 0]
    assert data.take(some, columns=["key"])["key"].to_pylist() == [list(expected)[row] for row in some]


def test_the_file_says_what_the_maps_are(parquet, store):
    schema = pq.read_schema(parquet)
    assert json.loads(schema.field("map").metadata[b"shape"]) == list(GRID)
    said = json.loads(schema.metadata[b"zpipe"])
    assert said == zpipe.open_maps(store).manifest.provenance.compared()


def test_one_file_a_shard(store, tmp_path, expected):
    out = tmp_path / "parts"
    assert export_parquet(zpipe.open_maps(store), out, per_shard=True) == 4
    assert sorted(path.stem for path in out.iterdir()) == [f"shard-0000{i}" for i in range(4)]
    rows = duckdb.sql(f"select key, map, scale from '{out}/*.parquet' order by filename, file_row_number").fetchall()
    same({key: (values, scale) for key, values, scale in rows}, expected)


def test_minmax_maps_are_those_of_the_loader(store, tmp_path):
    maps = zpipe.open_maps(store, normalise="minmax")
    export_parquet(maps, tmp_path / "a.parquet", values="minmax")
    found = np.stack(pandas.read_parquet(tmp_path / "a.parquet")["map"].to_list())
    assert np.array_equal(found, maps.array().reshape(18, -1).astype(np.float16))
    export_numpy(maps, tmp_path / "b", values="minmax")
    assert np.array_equal(np.load(tmp_path / "b" / "maps.npy"), maps.array())


def test_numpy_files_need_no_zpipe(store, tmp_path, expected):
    export_numpy(zpipe.open_maps(store), tmp_path / "out")
    array = np.load(tmp_path / "out" / "maps.npy", mmap_mode="r")
    assert array.shape == (18, *GRID) and array.dtype == np.float32
    keys = (tmp_path / "out" / "keys.txt").read_text().splitlines()
    assert keys == pq.read_table(tmp_path / "out" / "index.parquet")["key"].to_pylist() == list(expected)
    assert np.array_equal(array.reshape(18, -1), np.stack(list(expected.values())))


def test_a_full_disk_ends_an_export_with_one_line(store, small_disk):
    """No SIGBUS, which writing through a memory map would raise, and nothing half-written is left."""
    maps = zpipe.open_maps(store)
    small_disk.fill(1000)
    for export in (export_numpy, export_parquet):
        with pytest.raises(ZpipeError, match="could not be written .*No space left on device.; free space"):
            export(maps, small_disk.root / "out")
    assert [path.name for path in small_disk.root.iterdir()] == ["filler"]


def test_a_full_disk_ends_an_export_to_lance_with_one_line(store, small_disk, cli):
    pytest.importorskip("lance")
    small_disk.fill(1000)
    done = cli("maps", "export", store, small_disk.root / "out", "--lance")
    assert done.code == 1 and "out: could not be written" in done.error and "No space left" in done.error
    assert [path.name for path in small_disk.root.iterdir()] == ["filler"]


@pytest.mark.parametrize(
    ("name", "flags", "told"),
    [
        ("x.csv", [], "a Parquet file is written; give a name that ends in .parquet"),
        ("x.npy", [], "a Parquet file is written"),
        ("x.npy", ["--numpy"], "a folder is written; give a name without .npy"),
        ("x.parquet", ["--per-shard"], "a folder is written; give a name without .parquet"),
        ("x.parquet", ["--lance"], "a folder is written; give a name without .parquet"),
    ],
)
def test_a_name_promises_no_other_format(store, tmp_path, cli, name, flags, told):
    done = cli("maps", "export", store, tmp_path / name, *flags)
    assert done.code == 2 and told in done.error and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("flags", [["--numpy"], ["--parquet"], ["--per-shard"], ["--lance"]])
def test_nothing_is_overwritten(store, tmp_path, cli, flags):
    if "--lance" in flags:
        pytest.importorskip("lance")
    out = tmp_path / "out"
    assert cli("maps", "export", store, out, *flags).code == 0
    done = cli("maps", "export", store, out, *flags)
    assert done.code == 2 and f"{out}: exists already" in done.error


def test_wrong_choices_are_one_line(store, tmp_path, cli):
    for flags in (
        ["--numpy", "--parquet"],
        ["--numpy", "--per-shard"],
        ["--numpy", "--lance"],
        ["--lance", "--per-shard"],
        ["--values", "log"],
    ):
        assert cli("maps", "export", store, tmp_path / "x", *flags).code == 2
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_no_half_export(store, small_disk, cli):
    small_disk.fill(leave=4096)
    done = cli("maps", "export", store, small_disk.root / "a.parquet")
    assert done.code == 1 and "could not be written" in done.error
    assert [path.name for path in small_disk.root.iterdir()] == ["filler"]


# --------------------------------------------------------------------------------------------------------- comparison


@pytest.fixture(scope="module")
def rollout(shards, teacher_settings, tmp_path_factory):
    from zpipe.pipeline.explainer import ExplainConfig

    out = tmp_path_factory.mktemp("other") / "store"
    config = ExtractConfig(**teacher_settings, executor="local", explain=ExplainConfig(method="rollout"))
    extract_teacher_maps(shards, out, config)
    return out


def test_a_store_agrees_with_itself(store):
    maps = zpipe.open_maps(store)
    found = compare_stores(maps, zpipe.open_maps(store), top=5)
    assert (found.common, found.only_a, found.only_b, found.unusable, found.differing) == (18, 0, 0, 0, ())
    assert found.rank_correlation == (1.0,) * 5 and found.top_overlap == (1.0,) * 5


def test_two_methods_are_held_against_each_other(store, rollout):
    a, b = zpipe.open_maps(store), zpipe.open_maps(rollout)
    found = compare_stores(a, b, top=5, worst=3)
    assert {name for name, _, _ in found.differing} == {"method", "target"}
    ranks = {key: spearman(a[key].reshape(1, -1), b[key].reshape(1, -1))[0] for key in a}
    assert found.rank_correlation[2] == pytest.approx(np.median(list(ranks.values())))
    assert [key for key, _, _ in found.worst] == sorted(ranks, key=ranks.get)[:3]


def test_shards_may_be_cut_differently(store, photos, teacher_settings, tmp_path):
    from zpipe.pipeline.make_shards import FolderSource, make_shards

    make_shards(FolderSource(photos, shard_size=7, shuffle_seed=3, key_rule="stem"), tmp_path / "shards")
    (tmp_path / "shards" / "shard-00002.tar").unlink()
    (tmp_path / "shards" / "shards.json").unlink()
    out = tmp_path / "store"
    extract_teacher_maps(tmp_path / "shards", out, ExtractConfig(**teacher_settings, executor="local"))
    found = compare_stores(zpipe.open_maps(store), zpipe.open_maps(out), top=5)
    assert (found.common, found.only_a, found.only_b) == (14, 4, 0)
    assert min(found.rank_correlation) > 0.99  # the same maps, up to the rounding of other batches
    other_way = compare_stores(zpipe.open_maps(out), zpipe.open_maps(store), top=5)
    assert (other_way.common, other_way.only_a, other_way.only_b) == (14, 0, 4)


def test_other_places_can_not_be_compared(store, shards, teacher_settings, tmp_path, cli):
    out = tmp_path / "center"
    extract_teacher_maps(shards, out, ExtractConfig(**teacher_settings, executor="local", frame="center"))
    with pytest.raises(ZpipeError, match="has frame full, .* has center"):
        compare_stores(zpipe.open_maps(store), zpipe.open_maps(out))
    assert cli("maps", "compare", store, out).code == 1


def test_compare_prints_a_table(store, rollout, cli):
    done = cli("maps", "compare", store, rollout, "--top", "5", "--worst", "2")
    assert done.code == 0 and "18 compared" in done.stdout and "rollout" in done.stdout
    assert "top 5 shared" in done.stdout and "lowest agreement" in done.stdout
    done = cli("maps", "compare", store, rollout, "--worst", "0")
    assert done.code == 0 and "18 compared" in done.stdout and "lowest agreement" not in done.stdout


@given(st.integers(0, 2**32 - 1), st.integers(2, 30), st.booleans())
def test_rank_correlation_is_that_of_mean_ranks(seed, cells, ties):
    rng = np.random.default_rng(seed)
    x, y = rng.integers(0, 4 if ties else 10**6, (2, 3, cells)).astype(np.float32)
    found = spearman(x, y)
    for i in range(3):
        a, b = (pandas.Series(values[i]).rank() for values in (x, y))
        wanted = a.corr(b) if a.std() and b.std() else np.nan
        assert found[i] == pytest.approx(wanted, abs=1e-12, nan_ok=True)
    assert np.array_equal(spearman(x, x * 3 + 1), np.where(np.ptp(x, axis=1) > 0, 1.0, np.nan), equal_nan=True)


@given(st.integers(0, 2**32 - 1), st.integers(1, 20))
def test_overlap_of_the_highest(seed, top):
    rng = np.random.default_rng(seed)
    x, y = np.stack([rng.permutation(20) for _ in range(2)])[:, None].astype(np.float32)
    wanted = len({*np.argsort(-x[0])[:top]} & {*np.argsort(-y[0])[:top]}) / top
    assert top_overlap(x, y, top)[0] == wanted


# --------------------------------------------------------------------------------------------------- slices, histograms


@given(st.data())
def test_slices_are_those_of_the_whole_array(store, data):
    maps = zpipe.open_maps(store)
    whole = np.stack([maps[key] for key in maps])
    bound = st.none() | st.integers(-25, 25)
    rows = slice(data.draw(bound), data.draw(bound), data.draw(st.none() | st.integers(-5, 5).filter(bool)))
    assert np.array_equal(maps[rows], whole[rows]) and maps[rows].dtype == np.float32


def test_keys_and_wrong_keys(store):
    maps = zpipe.open_maps(store, normalise="minmax")
    keys = list(maps)[::-5]
    assert np.array_equal(maps[keys], normalise_minmax(np.stack([zpipe.open_maps(store)[key] for key in keys])))
    assert maps[[]].shape == (0, *GRID)
    with pytest.raises(KeyError, match="none"):
        maps[[keys[0], "none"]]
    with pytest.raises(TypeError, match="takes a key, a list of keys or a slice, got int"):
        maps[3]


def test_histograms_count_every_sample(store):
    figures = store_statistics(store)
    for name, histogram in figures.histograms.items():
        assert sum(histogram.counts) == 18
        assert histogram.low <= getattr(figures, name)[2] <= histogram.high
        assert len(histogram.bars()) == len(histogram.counts)
        assert (histogram.bars().count(" ")) == histogram.counts.count(0)


def test_export_refuses_a_url(store):
    with pytest.raises(UsageError, match="exports are written to this machine"):
        export_parquet(zpipe.open_maps(store), zpipe.schemas.storage.as_path("memory://x/a.parquet"))
