"""One map shard on disk, whatever the scale of its maps; and the reader that other experiments import."""

import dataclasses
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

import zpipe
from zpipe.schemas import relevance_store as rs
from zpipe.schemas.errors import ZpipeError
from zpipe.schemas.manifest import read_manifest
from zpipe.schemas.relevance_maps import RelevanceMaps, normalise_minmax
from zpipe.schemas.shard_index import read_index


def index_of(count, scale):
    columns = {name: np.zeros(count, np.int32) for name in rs.INDEX_SCHEMA.names}
    columns |= {"key": [f"k{i}" for i in range(count)], "status": ["ok"] * count, "scale": scale}
    return pa.table(columns).cast(rs.INDEX_SCHEMA)


def write(root, stem="s", count=3, seed=0):
    raw = np.random.default_rng(seed).normal(size=(count, 4, 6)).astype(np.float32)
    stored, scale = rs.encode_maps(raw)
    rs.write_shard(root, stem, stored, index_of(count, scale), input_sha256="1" * 64, fingerprint="2" * 64)
    return raw


# ------------------------------------------------------------------------------------------------------- encoding


@given(st.integers(-37, 37), st.integers(0, 2**32 - 1))
def test_maps_of_any_scale_come_back_to_float16_precision(decade, seed):
    raw = np.random.default_rng(seed).normal(size=(3, 4, 6)).astype(np.float32) * np.float32(10.0**decade)
    stored, scale = rs.encode_maps(raw)
    assert stored.dtype == np.float16 and scale.dtype == np.float32
    np.testing.assert_array_equal(np.abs(stored).max(axis=(1, 2)), 1.0)
    found = rs.decode_maps(stored, scale)
    assert found.dtype == np.float32
    # Relative to the map's largest value: half a unit of float16 at 1.
    assert (np.abs(found - raw).max(axis=(1, 2)) <= 2.0**-11 * np.abs(raw).max(axis=(1, 2)) * 1.001).all()


def test_maps_of_different_scales_do_not_disturb_each_other():
    raw = np.ones((3, 2, 2), np.float32) * np.array([1e-30, 1.0, 1e30], np.float32)[:, None, None]
    np.testing.assert_allclose(rs.decode_maps(*rs.encode_maps(raw)), raw, rtol=1e-6)


def test_zero_and_broken_maps():
    raw = np.ones((4, 2, 3), np.float32)
    raw[0] = 0
    raw[1, 0, 0] = np.nan
    raw[2, 1, 2] = -np.inf
    stored, scale = rs.encode_maps(raw)
    assert scale[0] == 0 and (stored[0] == 0).all() and scale[3] == 1
    assert np.isnan(scale[1:3]).all() and np.isnan(stored[1:3]).all()
    found = rs.decode_maps(stored, scale)
    assert (found[0] == 0).all() and np.isnan(found[1:3]).all() and (found[3] == 1).all()
    stored, scale = rs.encode_maps(np.zeros((0, 2, 3), np.float32))
    assert stored.shape == (0, 2, 3) and scale.shape == (0,)


def test_concentration_of_known_maps():
    one = np.zeros((4, 5))
    one[2, 3] = 7.0
    uniform = np.full((4, 5), 1e-20)
    negative = np.full((4, 5), -1.0)
    entropy, top = rs.concentration(np.stack([one, uniform, negative]))
    assert entropy[0] == 0 and top[0] == 1
    assert entropy[1] == pytest.approx(np.log(20)) and top[1] == pytest.approx(2 / 20)
    assert np.isnan(entropy[2]) and np.isnan(top[2])
    # 11 cells: 10 % rounded up are 2
    assert rs.concentration(np.arange(11.0).reshape(1, 1, 11))[1][0] == pytest.approx((10 + 9) / 55)


# ------------------------------------------------------------------------------------------------------ on the disk


def test_a_shard_comes_back_as_it_was_written(tmp_path):
    raw = write(tmp_path)
    stored = rs.read_stored(tmp_path, "s")
    np.testing.assert_array_equal(stored, rs.encode_maps(raw)[0])
    index = rs.read_index(tmp_path, "s")
    assert index.schema == rs.INDEX_SCHEMA and index["key"].to_pylist() == ["k0", "k1", "k2"]
    assert rs.read_index(tmp_path, "s", ["scale"]).column_names == ["scale"]
    seal = rs.read_seal(tmp_path, "s")
    assert (seal.input_sha256, seal.fingerprint) == ("1" * 64, "2" * 64)
    assert seal.maps_sha256 == rs.digest_maps(stored) and rs.read_seal(tmp_path, "t") is None


def test_equal_content_is_equal_bytes_on_every_run(tmp_path, contents):
    for name in ("a", "b"):
        write(tmp_path / name)
    write(tmp_path / "b")  # over what is there
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert sorted(contents(tmp_path / "a")) == ["index/s.parquet", "maps/s.zarr/c/0/0/0", "maps/s.zarr/zarr.json"]
    write(tmp_path / "c", seed=1)
    assert contents(tmp_path / "a") != contents(tmp_path / "c")


def test_the_array_is_one_chunk_that_plain_zarr_reads(tmp_path):
    import zarr

    write(tmp_path, count=5)
    array = zarr.open_array(tmp_path / "maps" / "s.zarr", mode="r")
    assert array.shape == array.chunks == (5, 4, 6) and array.dtype == np.float16
    assert (tmp_path / "maps" / "s.zarr" / array.attrs["key_index"]).resolve() == rs.index_path(tmp_path, "s").resolve()


def test_a_column_that_is_not_there_is_named(tmp_path):
    write(tmp_path)
    with pytest.raises(ZpipeError, match=r"s\.parquet: map index can't be read \('no column nobody'\)"):
        rs.read_index(tmp_path, "s", ["key", "nobody"])


def test_rows_and_maps_must_agree(tmp_path):
    stored, scale = rs.encode_maps(np.ones((3, 4, 6), np.float32))
    for maps, rows in ((stored, index_of(2, scale[:2])), (stored.astype(np.float32), index_of(3, scale))):
        with pytest.raises(ValueError, match="rows for . maps of"):
            rs.write_shard(tmp_path, "s", maps, rows, input_sha256="", fingerprint="")
    assert rs.read_seal(tmp_path, "s") is None


@pytest.mark.parametrize("leave", [0, 8_000, 100_000])
def test_a_full_disk_leaves_nothing_that_looks_whole(small_disk, leave):
    """Room for nothing; for the array's metadata but not its chunk; for most of the chunk."""
    raw = np.random.default_rng(0).normal(size=(500, 14, 14)).astype(np.float32)
    stored, scale = rs.encode_maps(raw)
    index = index_of(500, scale)
    rs.write_shard(small_disk.root, "s", stored, index, input_sha256="1", fingerprint="2")
    rs.write_shard(small_disk.root, "other", stored, index, input_sha256="1", fingerprint="2")
    small_disk.fill(leave)
    with pytest.raises(ZpipeError, match="could not be written.*No space left on device") as error:
        rs.write_shard(small_disk.root, "s", stored[::-1], index, input_sha256="1", fingerprint="2")
    assert "\n" not in str(error.value)
    # The index was taken away before its array was touched, so the shard counts as not there; the other one stays.
    assert rs.read_seal(small_disk.root, "s") is None and rs.read_seal(small_disk.root, "other") is not None
    assert not list(small_disk.root.rglob(".tmp-*"))
    small_disk.fill(400_000)
    rs.write_shard(small_disk.root, "s", stored, index, input_sha256="1", fingerprint="2")
    assert rs.read_seal(small_disk.root, "s") == rs.read_seal(small_disk.root, "other")


def test_a_full_disk_between_array_and_index(small_disk):
    """The array fits, the index doesn't: without an index there is no shard."""
    stored, scale = rs.encode_maps(np.zeros((2000, 4, 6), np.float32))  # an array of zeros takes no chunk
    table = index_of(2000, scale).set_column(
        0,
        rs.INDEX_SCHEMA.field("key"),
        pa.array(np.random.default_rng(0).bytes(30).hex() + str(i) for i in range(2000)),
    )
    small_disk.fill(12_000)
    with pytest.raises(ZpipeError, match=r"s\.parquet: could not be written"):
        rs.write_shard(small_disk.root, "s", stored, table, input_sha256="1", fingerprint="2")
    assert rs.maps_path(small_disk.root, "s").is_dir() and rs.read_seal(small_disk.root, "s") is None
    assert not list(small_disk.root.rglob(".tmp-*"))


@pytest.mark.parametrize("file", ["index/s.parquet", "maps/s.zarr/zarr.json", "maps/s.zarr/c/0/0/0"])
def test_whatever_byte_is_damaged_the_error_is_one_line(tmp_path, file):
    write(tmp_path)
    path = tmp_path / file
    good = path.read_bytes()
    rng = np.random.default_rng(0)
    reads = [lambda: rs.read_stored(tmp_path, "s")]
    if "index" in file:
        reads = [lambda: rs.read_seal(tmp_path, "s"), lambda: rs.read_index(tmp_path, "s", ["status", "scale"])]
    failed = 0
    damaged = [good[:cut] for cut in (0, 1, len(good) // 2, len(good) - 1)]
    damaged += [
        good[:place] + bytes([good[place] ^ int(rng.choice([1, 16, 128, 255]))]) + good[place + 1 :]
        for place in rng.integers(0, len(good), 400)
    ]
    for data in damaged:
        path.write_bytes(data)
        for read in reads:
            try:
                read()
            except ZpipeError as error:
                failed += 1
                assert "\n" not in str(error) and "extract again" in str(error)
    assert failed > 4


@pytest.mark.parametrize(("limit", "value"), [("MAX_ROWS", 5), ("MAX_MAP_BYTES", 5 * 4 * 6 * 2)])
def test_what_is_written_can_be_read(tmp_path, monkeypatch, limit, value):
    monkeypatch.setattr(rs, limit, value)
    assert rs.max_rows((4, 6)) == 5
    write(tmp_path, count=5)
    assert len(rs.read_stored(tmp_path, "s")) == len(rs.read_index(tmp_path, "s")) == 5
    with pytest.raises(ZpipeError, match=r"t\.zarr: 6 maps of 4 x 6 are more than the 5 of a shard; make smaller tars"):
        write(tmp_path, stem="t", count=6)
    assert not rs.maps_path(tmp_path, "t").exists() and rs.read_seal(tmp_path, "t") is None


def test_a_missing_index_or_array_is_named(tmp_path):
    with pytest.raises(ZpipeError, match=r"s\.parquet: map index can't be read"):
        rs.read_index(tmp_path, "s")
    with pytest.raises(ZpipeError, match=r"s\.zarr: maps can't be read"):
        rs.read_stored(tmp_path, "s")


# --------------------------------------------------------------------------------------------------------- reading


def test_maps_by_key_and_in_order(store, shards):
    maps = zpipe.open_maps(store)
    table, array = maps.table(), maps.array()
    assert len(maps) == len(table) == len(array) == 18 and array.shape == (18, 4, 6) and array.dtype == np.float32
    assert list(maps) == table["key"].to_pylist()
    for row in (0, 4, 5, 17):  # the first and last of a shard, the first of the next, the last of all
        key = table["key"][row].as_py()
        assert key in maps
        np.testing.assert_array_equal(maps[key], array[row])
        stem, place = maps.place(key)
        assert table["shard"][row].as_py() == stem
        np.testing.assert_array_equal(maps.read_shard(stem)[place], array[row])
        assert maps.index(stem)["key"][place].as_py() == key
    np.testing.assert_allclose(np.abs(array).max(axis=(1, 2)), table["scale"].to_numpy(), rtol=1e-6)
    assert maps.manifest == read_manifest(store)
    assert [shard.stem for shard in maps.manifest.shards] == [entry.stem for entry in read_index(shards).shards]
    assert maps.table(["key", "status"]).column_names == ["key", "status", "shard"]


def test_several_maps_at_once(store):
    maps = RelevanceMaps(store)
    keys = list(maps)[3:0:-1]
    np.testing.assert_array_equal(maps[keys], np.stack([maps[key] for key in keys]))
    assert maps[[]].shape == (0, 4, 6)
    with pytest.raises(TypeError, match="a key, a list of keys or a slice, got int"):
        maps[3]


def test_unknown_keys(store):
    maps = RelevanceMaps(store)
    assert "nobody" not in maps and 7 not in maps
    with pytest.raises(KeyError, match="no map for key 'nobody'"):
        maps["nobody"]


def test_maps_handed_out_cannot_be_written_to(store):
    maps = RelevanceMaps(store)
    with pytest.raises(ValueError, match="read-only"):
        maps[next(iter(maps))][0, 0] = 1


def test_normalised_maps_span_zero_to_one(store):
    raw, scaled = RelevanceMaps(store).array(), RelevanceMaps(store, normalise="minmax").array()
    np.testing.assert_array_equal(scaled.min(axis=(1, 2)), 0)
    np.testing.assert_array_equal(scaled.max(axis=(1, 2)), 1)
    for a, b in zip(raw, scaled, strict=True):
        assert (np.argsort(a.ravel(), kind="stable") == np.argsort(b.ravel(), kind="stable")).all()
    with pytest.raises(ValueError, match="minmax"):
        RelevanceMaps(store, normalise="softmax")
    constant = normalise_minmax(np.full((2, 3, 3), 5.0))
    assert (constant == 0).all() and constant.dtype == np.float32


def test_a_folder_that_is_no_store(tmp_path, shards):
    for path in (tmp_path, tmp_path / "none", shards):
        with pytest.raises(ZpipeError, match="not a relevance store"):
            RelevanceMaps(path)


def test_a_key_in_two_shards_is_an_error_not_a_choice(store_copy):
    stems = [shard.stem for shard in read_manifest(store_copy).shards]
    first, second = (rs.index_path(store_copy, stem) for stem in stems[:2])
    second.write_bytes(first.read_bytes())
    with pytest.raises(ZpipeError, match=f"is in shards {stems[0]} and {stems[1]}"):
        "x" in RelevanceMaps(store_copy)  # noqa: B015


def test_an_array_shorter_than_its_index_is_an_error(store_copy):
    path = store_copy / "manifest.json"
    shard = json.loads(path.read_text())["shards"][-1]
    table = pq.read_table(rs.index_path(store_copy, shard["stem"]), partitioning=None)
    pq.write_table(pa.concat_tables([table, table]), rs.index_path(store_copy, shard["stem"]))
    with pytest.raises(ZpipeError, match="has 3 maps for 6 rows"):
        RelevanceMaps(store_copy).array()


def test_the_index_says_what_the_teacher_saw(store, shards, photos):
    table = RelevanceMaps(store).table()
    labels = {"ant": 0, "bee": 1, "cat": 2}
    from PIL import Image

    for row in table.to_pylist():
        name = row["key"].partition("_")[0]
        with Image.open(photos / name / f"{row['key']}.jpg") as image:
            width, height = image.size
        assert (row["label"], row["target"]) == (labels[name], labels[name])
        assert (row["width"], row["height"]) == (width, height)
        assert [row[f"frame_{edge}"] for edge in ("x1", "y1", "x2", "y2")] == [0, 0, width, height]
        assert 0 <= row["target_probability"] <= row["predicted_probability"] <= 1 and 0 <= row["predicted"] < 5
        assert row["status"] == "ok" and 0 <= row["entropy"] <= np.log(24) and 0 < row["top10_mass"] <= 1
    assert dataclasses.asdict(read_manifest(store).provenance)["grid"] == (4, 6)


def test_a_lost_chunk_is_no_map_of_zeros(store_copy):
    stem = RelevanceMaps(store_copy).manifest.shards[0].stem
    (chunk,) = [
        path
        for path in (store_copy / "maps" / f"{stem}.zarr").rglob("*")
        if path.is_file() and path.name != "zarr.json"
    ]
    chunk.unlink()
    with pytest.raises(ZpipeError, match="a chunk is missing"):
        RelevanceMaps(store_copy).array()
