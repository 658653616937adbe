"""A store is whole and true, or every damage to it is named; and what `zpipe maps` says of a store."""

import json
import shutil
import tracemalloc

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from zpipe.pipeline import verify
from zpipe.pipeline.verify import verify_store
from zpipe.schemas.errors import ZpipeError
from zpipe.schemas.relevance_maps import RelevanceMaps
from zpipe.schemas.relevance_store import INDEX_SCHEMA, index_path, maps_path, read_index, read_seal, write_shard
from zpipe.schemas.shard_index import digest_file

KEY = INDEX_SCHEMA.field("key")


def flip(path, place=None):
    data = bytearray(path.read_bytes())
    data[len(data) // 2 if place is None else place] ^= 1
    path.write_bytes(data)


def chunk(root, stem):
    return maps_path(root, stem) / "c" / "0" / "0" / "0"


def test_a_whole_store_has_no_problems(store, shards):
    told = []
    assert verify_store(store, shards, progress=lambda *args, **facts: told.append(args)) == []
    assert told[-1] == ("verify", 4, 4)
    assert verify_store(store) == []


def test_every_byte_of_a_chunk_counts(store_copy):
    """Also where the codec decodes the damaged chunk without complaint."""
    path = chunk(store_copy, "shard-00001")
    good = path.read_bytes()
    # The first 16 bytes are Blosc's header, in which some bits have no meaning.
    for place in range(16, len(good), max(1, len(good) // 40)):
        flip(path, place)
        problems = verify_store(store_copy)
        assert len(problems) == 1 and "shard-00001.zarr" in problems[0] and "extract again" in problems[0], place
        path.write_bytes(good)
    assert verify_store(store_copy) == []


def damage_index(root):
    flip(index_path(root, "shard-00002"))


def cut_index(root):
    path = index_path(root, "shard-00002")
    path.write_bytes(path.read_bytes()[:100])


def lose_index(root):
    index_path(root, "shard-00002").unlink()


def lose_maps(root):
    shutil.rmtree(maps_path(root, "shard-00002"))


def lose_chunk(root):
    chunk(root, "shard-00002").unlink()


def swap_maps(root):
    """Maps of another shard of the same size."""
    shutil.copytree(maps_path(root, "shard-00001"), maps_path(root, "shard-00002"), dirs_exist_ok=True)


def other_grid(root):
    path = maps_path(root, "shard-00002") / "zarr.json"
    path.write_text(path.read_text().replace("[\n    5,\n    4,\n    6\n  ]", "[\n    5,\n    6,\n    4\n  ]", 1))


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (damage_index, "shard-00002.parquet: its digest is not the manifest's"),
        (cut_index, "shard-00002.parquet: its digest is not the manifest's"),
        (lose_index, "shard-00002.parquet: missing"),
        (lose_maps, "shard-00002.zarr: missing"),
        (lose_chunk, "shard-00002.zarr: maps can't be read (a chunk is missing)"),
        (swap_maps, "shard-00002.zarr: its bytes are not those that were written"),
        (other_grid, "shard-00002.zarr: "),
    ],
)
def test_damage_to_one_shard_is_named(store_copy, shards, damage, told):
    damage(store_copy)
    problems = verify_store(store_copy)
    assert len(problems) == 1 and told in problems[0] and "\n" not in problems[0]
    assert verify_store(store_copy, shards)  # and with the tars at hand


@pytest.mark.parametrize("foreign", ["index/stranger.parquet", "maps/stranger.zarr", "maps/.tmp-7-shard-00000.zarr"])
def test_what_does_not_belong_is_named(store_copy, foreign):
    (store_copy / foreign).mkdir()
    assert verify_store(store_copy) == [f"{store_copy / foreign}: not listed in the manifest; remove it"]


def rewrite(root, stem, change, **seal):
    """Replace a shard by an altered one whose digests all fit, as another run would have left it."""
    import zarr

    old = read_seal(root, stem)
    stored = zarr.open_array(maps_path(root, stem), mode="r")[:]
    stored, table = change(stored, read_index(root, stem))
    write_shard(
        root, stem, stored, table, **({"input_sha256": old.input_sha256, "fingerprint": old.fingerprint} | seal)
    )
    path = root / "manifest.json"
    manifest = json.loads(path.read_text())
    for shard in manifest["shards"]:
        if shard["stem"] == stem:
            shard["index_sha256"] = digest_file(index_path(root, stem))
    path.write_text(json.dumps(manifest))


def test_a_shard_of_another_teacher_is_named(store_copy):
    rewrite(store_copy, "shard-00000", lambda maps, table: (maps, table), fingerprint="0" * 64)
    (problem,) = verify_store(store_copy)
    assert "shard-00000.parquet: made by another teacher or from another tar" in problem


def test_a_status_that_does_not_fit_its_map_is_named(store_copy):
    def spoil(maps, table):
        maps = maps.copy()
        maps[1] = np.nan
        return maps, table

    key = read_index(store_copy, "shard-00000")["key"][1].as_py()
    rewrite(store_copy, "shard-00000", spoil)
    (problem,) = verify_store(store_copy)
    assert f"key {key}: status ok does not fit its map" in problem


def lie(root, **columns):
    """Change values of the second row of a shard, with digests that fit."""

    def change(maps, table):
        for name, value in columns.items():
            values = table[name].to_pylist()
            values[1] = value
            place = table.column_names.index(name)
            table = table.set_column(place, table.schema.field(name), pa.array(values, table.schema.field(name).type))
        return maps, table

    rewrite(root, "shard-00000", change)


@pytest.mark.parametrize(
    ("columns", "told"),
    [
        ({"status": "zero"}, "status zero does not fit its map, of scale"),
        ({"status": "undecodable"}, "status undecodable does not fit its map"),
        ({"status": "nonfinite"}, "status nonfinite does not fit its map"),
        ({"scale": 0.0}, "status ok does not fit its map, of scale 0"),
        ({"scale": np.nan}, "status ok does not fit its map, of scale nan"),
        ({"predicted": 5}, "predicted class 5 is none of the teacher's"),
        ({"predicted": -1}, "predicted class -1 is none of the teacher's"),
        ({"target": 2**31 - 1}, "target class 2147483647 is none of the teacher's"),
        ({"predicted_probability": 1.5}, "predicted probability 1.5 is impossible"),
        ({"predicted_probability": np.nan}, "predicted probability nan is impossible"),
        ({"target_probability": -0.1}, "target probability -0.1 is impossible"),
        ({"predicted_probability": 0.0}, "is above the predicted class's"),
        ({"entropy": 0.5}, "entropy 0.5 is not that of its map"),
        ({"entropy": np.inf}, "entropy inf is not that of its map"),
        ({"top10_mass": np.nan}, "top10_mass nan is not that of its map"),
        ({"width": 0}, "pixels is impossible"),
        ({"height": -3}, "pixels is impossible"),
        ({"frame_x1": 1e9}, "its frame does not lie in the image"),
        ({"frame_y2": -1.0}, "its frame does not lie in the image"),
    ],
)
def test_an_index_that_lies_about_a_map_is_named(store_copy, columns, told):
    lie(store_copy, **columns)
    key = read_index(store_copy, "shard-00000", ["key"])["key"][1].as_py()
    problems = verify_store(store_copy)
    assert any(told in problem and f"shard-00000.parquet: key {key}: " in problem for problem in problems), problems
    assert all(problem.isprintable() and problem.endswith("extract again") for problem in problems)


def test_many_samples_of_one_lie_are_one_line(store_copy):
    rewrite(store_copy, "shard-00000", lambda maps, table: (np.zeros_like(maps), table))
    assert any(", and 4 others: status ok does not fit" in problem for problem in verify_store(store_copy))


@pytest.mark.parametrize("statuses", [{"ok": 17, "zero": 1}, {"ok": 19}, {}])
def test_a_manifest_that_lies_about_its_statuses_is_named(store_copy, statuses):
    path = store_copy / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"statuses": statuses}))
    (problem,) = verify_store(store_copy)
    assert "manifest.json: says " in problem and "the indexes 18 ok; " in problem


def test_too_few_rows_are_named(store_copy):
    rewrite(store_copy, "shard-00000", lambda maps, table: (maps[:4], table.slice(0, 4)))
    (problem,) = verify_store(store_copy)
    assert "shape (4, 4, 6), 4 rows, expected (5, 4, 6)" in problem


def test_keys_in_another_order_than_in_the_tar_are_named(store_copy, shards):
    rewrite(store_copy, "shard-00000", lambda maps, table: (maps[[1, 0, 2, 3, 4]], table.take([1, 0, 2, 3, 4])))
    assert verify_store(store_copy) == []
    (problem,) = verify_store(store_copy, shards)
    assert "shard-00000.tar: its keys are not those of map shard shard-00000" in problem


def test_a_key_that_comes_twice_is_named(store_copy):
    other = read_index(store_copy, "shard-00001")
    rewrite(store_copy, "shard-00000", lambda maps, table: (maps, table.set_column(0, KEY, other["key"])))
    problems = verify_store(store_copy)
    assert len(problems) == 5 and all("is in shard-00000 too" in problem for problem in problems)


def test_keys_of_one_hash_are_told_apart(store, store_copy, monkeypatch):
    """Of keys only the hashes are kept: where these agree, the keys themselves decide."""
    monkeypatch.setattr(verify, "hash", lambda key: 7, raising=False)
    assert verify_store(store) == []
    other = read_index(store_copy, "shard-00001")
    rewrite(store_copy, "shard-00000", lambda maps, table: (maps, table.set_column(0, KEY, other["key"])))
    assert len(verify_store(store_copy)) == 5


def test_a_look_for_keys_that_come_twice_holds_a_few_bytes_a_key(tmp_path):
    hashes = [np.random.default_rng(number).integers(-(2**62), 2**62, 10_000) for number in range(20)]
    tracemalloc.start()
    try:
        assert verify._repeated_keys(tmp_path, [str(number) for number in range(20)], hashes) == []
        assert tracemalloc.get_traced_memory()[1] < 20 * 200_000
    finally:
        tracemalloc.stop()


def test_other_tars_are_named(store, shards_copy, tmp_path, encode):
    from zpipe.pipeline.make_shards import FolderSource, make_shards

    root = tmp_path / "photos" / "a"
    root.mkdir(parents=True)
    for number in range(12):
        (root / f"x{number}.jpg").write_bytes(encode("JPEG", 30, 20, seed=number))
    others = tmp_path / "others"
    make_shards(FolderSource(root.parent, shard_size=5, shuffle_seed=0, key_rule="stem"), others)
    problems = verify_store(store, others)  # three tars of other images, and none for the fourth shard
    assert sum("its maps were made from" in problem for problem in problems) == 3
    assert sum("its keys are not those" in problem for problem in problems) == 3
    assert sum("no tar for map shard shard-00003" in problem for problem in problems) == 1 and len(problems) == 7
    (shards_copy / "shards.json").unlink()
    shutil.copy(others / "shard-00000.tar", shards_copy / "more.tar")
    assert verify_store(store, shards_copy) == [f"{shards_copy / 'more.tar'}: has no map shard; extract again"]
    assert verify_store(store, str(shards_copy))


def test_a_folder_that_is_no_store(tmp_path):
    with pytest.raises(ZpipeError, match="not a relevance store"):
        verify_store(tmp_path)


# -------------------------------------------------------------------------------------------------------- zpipe maps


def test_the_verb_verify(store_copy, shards, cli):
    done = cli("maps", "verify", store_copy, "--shards", shards)
    assert (done.code, done.stdout.strip()) == (0, f"{store_copy}: intact")
    flip(chunk(store_copy, "shard-00001"), 40)
    flip(index_path(store_copy, "shard-00002"))
    done = cli("maps", "verify", store_copy)
    assert done.code == 1 and done.error == f"error: {store_copy}: 2 problems"
    assert ["shard-00001.zarr" in done.details[0], "shard-00002.parquet" in done.details[1]] == [True, True]
    assert cli("maps", "verify", shards).code == 1


def test_the_verb_info(store, shards, cli):
    done = cli("maps", "info", store)
    assert done.code == 0
    for told in (
        "18 (18 ok) in 4 shards",
        "deit_tiny_patch16_224, weights random",
        "full, grid 4 x 6",
        "quantiles",
    ):
        assert told in done.stdout
    table = RelevanceMaps(store).table()
    share = np.mean(table["label"].to_numpy() == table["predicted"].to_numpy())
    assert f"{share:.1%} on these labels" in done.stdout
    assert "not a relevance store" in cli("maps", "info", shards).error


def test_the_verb_show(store, shards, cli, tmp_path):
    key = next(iter(RelevanceMaps(store)))
    done = cli("maps", "show", store, key, "--out", tmp_path / "x.png")
    assert done.code == 0 and [path.name for path in tmp_path.iterdir()] == ["x.png"]
    with Image.open(tmp_path / "x.png") as image:
        assert image.format == "PNG" and np.asarray(image.convert("RGB")).std() > 10
    done = cli("maps", "show", store, "nobody", "--out", tmp_path / "y.png")
    assert done.code == 2 and "no map for key 'nobody'; keys look like" in done.error
    (tmp_path / "empty").mkdir()
    done = cli("maps", "show", store, key, "--shards", tmp_path / "empty", "--out", tmp_path / "y.png")
    assert done.code == 2 and "holds no .tar file" in done.error and not (tmp_path / "y.png").exists()
