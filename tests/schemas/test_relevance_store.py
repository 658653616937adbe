"""One map shard on disk, whatever the scale of its maps; and the reader that other experiments import."""

import dataclasses
import errno
import json
import os
import re
import shutil
import tempfile
import tracemalloc
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from any_json import any_json
from hypothesis import given, settings
from hypothesis import strategies as st

import zpipe
from zpipe.pipeline.extract import ExtractConfig, extract_teacher_maps
from zpipe.schemas import map_array, relevance_maps
from zpipe.schemas import relevance_store as rs
from zpipe.schemas.errors import DamageError, UsageError, ZpipeError
from zpipe.schemas.manifest import read_manifest, write_manifest
from zpipe.schemas.relevance_maps import RelevanceMaps, normalise_minmax
from zpipe.schemas.shard_index import digest_file, read_index

DESCRIPTION = (Path(__file__).parents[1] / "golden/formats/v1/maps/maps/shard-00000.zarr/zarr.json").read_text()


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
    with pytest.raises(UsageError, match=r"s\.parquet: no column 'nobody'; the columns of an index are key, label,"):
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


def vouch(root, stem):
    """Enter the digest that the index of a shard has now into the manifest, as whoever forges a store would."""
    path = root / "manifest.json"
    manifest = json.loads(path.read_text())
    for shard in manifest["shards"]:
        if shard["stem"] == stem:
            shard["index_sha256"] = digest_file(rs.index_path(root, stem))
    path.write_text(json.dumps(manifest))


def test_a_key_in_two_shards_is_an_error_not_a_choice(store_copy):
    first, second = (shard.stem for shard in read_manifest(store_copy).shards[:2])
    keys = rs.read_index(store_copy, first)["key"]
    seal = pq.read_schema(rs.index_path(store_copy, second)).metadata
    table = rs.read_index(store_copy, second).set_column(0, rs.INDEX_SCHEMA.field("key"), keys)
    pq.write_table(table.replace_schema_metadata(seal), rs.index_path(store_copy, second))
    vouch(store_copy, second)
    with pytest.raises(ZpipeError, match=f"is in shards {first} and {second}"):
        "x" in RelevanceMaps(store_copy)  # noqa: B015


def test_an_array_shorter_than_its_index_is_an_error(store_copy):
    stem = read_manifest(store_copy).shards[-1].stem
    stored, table = rs.read_stored(store_copy, stem), rs.read_index(store_copy, stem)
    seal = rs.read_seal(store_copy, stem)
    proof = {"input_sha256": seal.input_sha256, "fingerprint": seal.fingerprint}
    for rows in (2, 3):
        rs.write_shard(store_copy, stem, stored[:2], table[:2], **proof)
        if rows == 3:
            pq.write_table(
                table.replace_schema_metadata(proof | {"maps_sha256": seal.maps_sha256}),
                rs.index_path(store_copy, stem),
            )
        vouch(store_copy, stem)
        told = "it has 2 rows, the manifest says 3" if rows == 2 else r"its shape is \(2, 4, 6\), not \(3, 4, 6\)"
        with pytest.raises(ZpipeError, match=f"{stem}.*{told}"):
            RelevanceMaps(store_copy).array()


@pytest.mark.parametrize("file", ["index/{}.parquet", "maps/{}.zarr/zarr.json", "maps/{}.zarr/c/0/0/0"])
def test_a_flipped_bit_is_named_and_changes_no_map(store, store_copy, file):
    """Also where the damaged file still decodes. What changes nothing, such as a blank in zarr.json, is let pass."""
    path = store_copy / file.format("shard-00001")
    good, expected = path.read_bytes(), RelevanceMaps(store).array()
    rng, told = np.random.default_rng(0), 0
    for place in rng.integers(0, len(good), 40):
        path.write_bytes(good[:place] + bytes([good[place] ^ (1 << int(rng.integers(8)))]) + good[place + 1 :])
        try:
            np.testing.assert_array_equal(RelevanceMaps(store_copy).array(), expected)
        except ZpipeError as error:
            told += 1
            assert f"{store_copy}" in str(error) and "shard-00001" in str(error) and "extract again" in str(error)
    assert told > (20 if "zarr.json" in file else 35)


def test_digests_are_compared_once_or_not_at_all(store, store_copy, monkeypatch):
    counted = []
    monkeypatch.setattr(relevance_maps, "digest_maps", lambda maps: counted.append(1) or rs.digest_maps(maps))
    maps = RelevanceMaps(store)
    for _ in range(2):
        maps.read_shard("shard-00000")
        maps.read_shard("shard-00000", maps.index("shard-00000", ["scale", "status"]))
    assert len(counted) == 1
    stored, table, seal = (read(store_copy, "shard-00000") for read in (rs.read_stored, rs.read_index, rs.read_seal))
    proof = {"input_sha256": seal.input_sha256, "fingerprint": seal.fingerprint}
    rs.write_shard(store_copy, "shard-00000", stored[::-1], table, **proof)
    found = zpipe.open_maps(store_copy, check=False).read_shard("shard-00000")
    np.testing.assert_array_equal(found, rs.decode_maps(stored[::-1], table["scale"].to_numpy()))
    assert len(counted) == 1
    with pytest.raises(ZpipeError, match="shard-00000.parquet: it is not the index that the manifest lists"):
        zpipe.open_maps(store_copy).read_shard("shard-00000")


@pytest.mark.parametrize("check", [True, False])
def test_a_store_that_is_replaced_while_it_is_open_mixes_no_teachers(store_copy, shards, teacher_settings, check):
    maps = zpipe.open_maps(store_copy, check=check)
    first, *_, last = [shard.stem for shard in maps.manifest.shards]
    maps.shard(first)
    settings = teacher_settings | {"executor": "local", "seed": 1, "replace": True}
    extract_teacher_maps(shards, store_copy, ExtractConfig(**settings))
    for read in (lambda: maps.shard(last), maps.array, maps.table, lambda: maps.index(first), lambda: list(maps)):
        with pytest.raises(ZpipeError, match=r"store: was replaced or removed since it was opened; open it again"):
            read()
    shutil.rmtree(store_copy)
    with pytest.raises(ZpipeError, match="was replaced or removed"):
        maps.shard(last)


def test_a_store_that_grows_while_it_is_open_goes_on(store_copy):
    maps = zpipe.open_maps(store_copy)
    manifest = read_manifest(store_copy)
    write_manifest(store_copy, dataclasses.replace(manifest, shards=manifest.shards[:3], statuses={"ok": 15}))
    assert len(maps.array()) == 18


def test_what_keeps_a_file_from_being_read_is_no_reason_to_delete_it(store, monkeypatch):
    def out_of_files(path, most):
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE), str(path))

    maps = zpipe.open_maps(store)
    monkeypatch.setattr(rs, "read_file", out_of_files)
    monkeypatch.setattr(map_array, "read_file", out_of_files)
    for read in (lambda: maps.index("shard-00000"), lambda: rs.read_stored(store, "shard-00000")):
        with pytest.raises(
            ZpipeError, match=r"can't be read \(Too many open files\); raise the limit .*, then"
        ) as error:
            read()
        assert "delete" not in str(error.value) and not isinstance(error.value, DamageError)


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
    (rs.maps_path(store_copy, stem) / "c" / "0" / "0" / "0").unlink()
    with pytest.raises(ZpipeError, match="a chunk is missing"):
        RelevanceMaps(store_copy).array()


def test_a_shard_of_zeros_is_read_with_and_without_a_chunk(tmp_path):
    stored, scale = rs.encode_maps(np.zeros((3, 4, 6), np.float32))
    rs.write_shard(tmp_path, "s", stored, index_of(3, scale), input_sha256="1", fingerprint="2")
    chunk = rs.maps_path(tmp_path, "s") / "c" / "0" / "0" / "0"
    assert chunk.is_file()  # for readers that take a missing chunk for damage
    chunk.unlink()  # as Zarr writes it by default
    np.testing.assert_array_equal(rs.read_stored(tmp_path, "s"), stored)
    rs.index_path(tmp_path, "s").unlink()
    with pytest.raises(DamageError, match="a chunk is missing"):
        rs.read_stored(tmp_path, "s")


# ------------------------------------------------------------------------------------------- what strangers may bring


def described(root, change):
    """Write a shard and change the description of its array; returns the text that reading it gives, or None."""
    write(root)
    path = rs.maps_path(root, "s") / "zarr.json"
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))
    try:
        assert rs.read_stored(root, "s").shape == (3, 4, 6)
    except DamageError as error:
        assert str(error).isprintable()
        return str(error)
    return None


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"shape": [3]}, r"Expected `array` of length >= 2 - at `\$.shape`"),
        ({"shape": [3, 4]}, r"its chunks are \(3, 4, 6\), not one of \(3, 4\)"),
        ({"shape": [-3, 4, 6]}, "Expected `int` >= 0"),
        ({"shape": [5 * 10**7, 4, 6]}, "is no shard of maps below 1024 MiB"),
        ({"data_type": "float64"}, "Invalid enum value 'float64'"),
        ({"fill_value": "NaN"}, "Expected `float`, got `str`"),
        ({"fill_value": 7.0}, "Expected `float` <= 0"),
        ({"zarr_format": 2}, "Invalid enum value 2"),
        ({"node_type": "group"}, "Invalid enum value 'group'"),
        ({"storage_transformers": ["x"]}, "Expected `array` of length <= 0"),
        ({"chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [1, 1, 1]}}}, "not one of"),
        ({"chunk_key_encoding": {"name": "v2"}}, "Invalid enum value 'v2'"),
        ({"codecs": []}, "is not one of a relevance store"),
        ({"codecs": [{"name": "bytes", "configuration": {"endian": "big"}}, {"name": "blosc"}]}, "not little-endian"),
        ({"codecs": [{"name": "bytes"}, {"name": "blosc"}, {"name": "crc32c"}]}, "codec crc32c is not one"),
        ({"codecs": [{"name": "sharding_indexed", "configuration": {}}]}, "codec sharding_indexed is not one"),
        ({"codecs": [{"name": "bytes"}, {"name": "blosc"}, {"name": "blosc"}]}, "bytes and blosc and blosc is not one"),
        ({"unknown": [1]}, None),
        ({"dimension_names": None}, None),
    ],
)
def test_an_array_of_another_layout_is_refused(tmp_path, change, told):
    found = described(tmp_path, lambda value: value.update(change))
    assert (found is None) == (told is None) and (told is None or re.search(told, found)), found


@given(st.sampled_from(sorted(json.loads(DESCRIPTION))), any_json())
def test_whatever_the_description_of_an_array_says_it_is_read_or_refused_in_one_line(field, value):
    try:
        shape, dtype = map_array._described(json.dumps(json.loads(DESCRIPTION) | {field: value}).encode())
        assert dtype.itemsize * np.prod(shape) <= map_array.MAX_MAP_BYTES
    except ValueError as error:
        assert str(error).isprintable()


def test_a_chunk_that_claims_more_than_its_shape_is_not_unpacked(tmp_path):
    from numcodecs import blosc

    write(tmp_path)
    chunk = rs.maps_path(tmp_path, "s") / "c" / "0" / "0" / "0"
    good = chunk.read_bytes()
    large = blosc.compress(bytes(200 << 20), b"zstd", 5, 1)
    tracemalloc.start()
    try:
        for data, told in (
            (large, "has more than 160 bytes|claims"),
            (large[:150], "its chunk claims"),
            (good[:4] + (2**31 - 1).to_bytes(4, "little") + good[8:], "its chunk claims 1.. bytes for 2147483647"),
            (good[:12] + (2**31 - 1).to_bytes(4, "little") + good[16:], "its chunk claims 2147483647 bytes"),
            (good[:8] + (2**31 - 1).to_bytes(4, "little") + good[12:], "can't be unpacked"),
            (good[:-1], "its chunk claims"),
            (good[:7], "its chunk is cut off"),
            (b"", "its chunk is cut off"),
        ):
            chunk.write_bytes(data)
            with pytest.raises(DamageError, match=told):
                rs.read_stored(tmp_path, "s")
        assert tracemalloc.get_traced_memory()[1] < 2 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("kind", ["fifo", "folder", "/dev/zero", "nowhere"])
@pytest.mark.parametrize("file", ["index/s.parquet", "maps/s.zarr/zarr.json", "maps/s.zarr/c/0/0/0"])
def test_what_lies_in_place_of_a_file_is_told_without_waiting(tmp_path, file, kind):
    write(tmp_path)
    path = tmp_path / file
    path.unlink()
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to(kind)
    read = rs.read_index if "index" in file else rs.read_stored
    with pytest.raises(
        ZpipeError, match="is a FIFO|is a folder|is a device|no such file|No such file|is missing"
    ) as error:
        read(tmp_path, "s")
    assert "extract again" in str(error.value) and str(error.value).isprintable()


def altered(column, values):
    """A change to the index of three rows: another column of that name."""
    return lambda table: table.set_column(table.column_names.index(column), column, values)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (altered("label", pa.array(["a", "b", "c"])), "column label is string, not int32"),
        (altered("label", pa.array([1, 2, 3], pa.int64())), "column label is int64, not int32"),
        (altered("key", pa.array([b"a", b"b", b"c"])), "column key is binary, not string"),
        (altered("key", pa.array([["a"], ["b"], ["c"]])), "column key is list"),
        (altered("scale", pa.array([1.0, 2.0, 3.0])), "column scale is double, not float"),
        (altered("scale", pa.array([1, None, 3], pa.float32())), "column scale has 1 rows without a value"),
        (altered("scale", pa.array([1, np.inf, 3], pa.float32())), "scale inf in row 1"),
        (altered("scale", pa.array([1, 2, -3], pa.float32())), "scale -3 in row 2"),
        (altered("frame_x2", pa.array([1, 2, np.nan], pa.float32())), "column frame_x2 has rows that are not finite"),
        (altered("key", pa.array(["a", "b", "a"])), "a key comes twice"),
        (altered("key", pa.array(["a", None, "c"])), "column key has 1 rows without a value"),
        (altered("key", pa.array(["a", "", "c"])), "has 0 bytes, a key has 1 to 240; delete it and extract again"),
        (altered("key", pa.array(["a", "b\n", "c"])), r"unprintable character U\+000A; delete it and extract again"),
        (altered("key", pa.array(["a", "b", "x" * 10**6])), "a text of 1000000 bytes, at most 240 are possible"),
        (altered("status", pa.array(["ok", "ok", "fine"])), "status 'fine' is none of ok, undecodable"),
        (altered("status", pa.array(["ok", "ok", "\x1b[2J\x1b[2J"])), r"status '.x1b\[2J.x1b\[2J' is none of"),
        (lambda table: table.drop(["status"]), "column status is missing"),
        (lambda table: table.append_column("extra", pa.array([None] * 3)), None),
        (lambda table: table.select(table.column_names[::-1]), None),
    ],
)
def test_an_index_of_other_columns_is_refused(tmp_path, change, told):
    write(tmp_path)
    path = rs.index_path(tmp_path, "s")
    pq.write_table(change(rs.read_index(tmp_path, "s")), path)
    if told is None:
        assert rs.read_index(tmp_path, "s").schema == rs.INDEX_SCHEMA
        return
    with pytest.raises(DamageError, match=told) as error:
        rs.read_index(tmp_path, "s")
    assert str(error.value).isprintable() and str(error.value).endswith("delete it and extract again")


def test_joiners_in_a_key_are_part_of_a_word(tmp_path):
    write(tmp_path)
    path = rs.index_path(tmp_path, "s")
    keys = pa.array(["क्\u200cष", "👩\u200d🔬", "ü/ñ c"])
    pq.write_table(altered("key", keys)(rs.read_index(tmp_path, "s")), path)
    assert rs.read_index(tmp_path, "s", ["key"])["key"].to_pylist() == keys.to_pylist()


def test_an_index_that_unpacks_to_gigabytes_is_not_unpacked(tmp_path):
    """Kilobytes of repeated values: 5 million rows; a key of a megabyte a hundred thousand times over, 100 GB."""
    path, long = tmp_path / "x.parquet", "x" * (1 << 20)
    many = pa.DictionaryArray.from_arrays(pa.array(np.zeros(100_000, np.int32)), pa.array([long]))
    for keys, told in (
        (pa.array(np.zeros(5_000_000, np.int32)), "5000000 rows are more than 4000000"),
        (many, "a text of 1048576 bytes, at most 240"),
    ):
        pq.write_table(pa.table({"key": keys}), path, compression="zstd", write_statistics=False)
        assert path.stat().st_size < 100_000
        before = pa.total_allocated_bytes()
        with pytest.raises(DamageError, match=told):
            rs.IndexFile(path).table(["key"])
        assert pa.total_allocated_bytes() - before < 10 << 20
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rs, "MAX_INDEX_BYTES", 1 << 20)
        with pytest.raises(DamageError, match="it unpacks to 1048767 bytes, more than 1048576"):
            rs.IndexFile(path).table(["key"])


ARROW_TYPES = st.sampled_from(
    [
        pa.bool_(), pa.int8(), pa.int32(), pa.uint64(), pa.float16(), pa.float32(), pa.float64(), pa.string(),
        pa.large_string(), pa.binary(), pa.binary(4), pa.date32(), pa.timestamp("ns", "UTC"), pa.duration("s"),
        pa.decimal128(5, 2), pa.list_(pa.int32()), pa.struct([("a", pa.int32())]),
        pa.dictionary(pa.int32(), pa.string()),
        pa.map_(pa.string(), pa.int32()), pa.null(), pa.time64("us"), pa.string_view(),
    ]
)  # fmt: skip


@given(st.sampled_from(rs.INDEX_SCHEMA.names), ARROW_TYPES, st.data())
@settings(deadline=None)
def test_whatever_a_column_of_an_index_holds_it_is_read_or_refused_in_one_line(name, kind, data):
    plain = pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_string(kind)
    values = data.draw(st.lists(any_json(), min_size=3, max_size=3)) if plain else [None] * 3
    try:
        column = pa.array(values, kind)
    except (pa.ArrowException, OverflowError, TypeError, ValueError):
        column = pa.nulls(3, kind)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "s.parquet"
        pq.write_table(altered(name, column)(index_of(3, np.ones(3, np.float32))), path)
        try:
            found = rs.IndexFile(path).table()
        except DamageError as error:
            assert str(error).isprintable() and str(path) in str(error)
            return
    assert found.schema == rs.INDEX_SCHEMA and len(found) == 3 and not any(each.null_count for each in found)
    assert found[name].to_pylist() == pytest.approx(column.to_pylist(), nan_ok=True)
