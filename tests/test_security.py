"""The promises of docs/security.md that no other module tests.

Files of strangers are not executed, lead to no other place and do not swell; secrets stay where they are. The page
names the test of each of its promises.
"""

import io
import itertools
import json
import pickle
import re
import shutil
import struct
import tarfile
import zlib
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import timm
import tiny
import torch
import typer
import zarr
from timm.models import save_for_hf

import zpipe
from zpipe.cli import app
from zpipe.pipeline.make_shards import index_shards
from zpipe.pipeline.shard_reader import Frame, frame_image, open_shards, read_samples
from zpipe.pipeline.teacher import TeacherSpec, load_teacher
from zpipe.schemas import images, relevance_store
from zpipe.schemas.errors import UsageError, ZpipeError
from zpipe.schemas.formats import read_json
from zpipe.schemas.relevance_store import IndexFile, maps_path, read_stored
from zpipe.schemas.sample import Sample
from zpipe.schemas.storage import as_path
from zpipe.train.checkpoint import load_run
from zpipe.train.data.loader import RelevanceLoader
from zpipe.train.data.stream import list_shards, read_tar
from zpipe.train.resume_state import load_checkpoint

ROOT = Path(__file__).parents[1]
CANARY = "hunter2canary"


def refused(function, *args, match="", error=ZpipeError, **kwargs):
    """The one-line error message of a call that must fail."""
    with pytest.raises(error, match=match) as caught:
        function(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ------------------------------------------------------------------------------------------------------ nothing is run


@pytest.fixture
def bomb(tmp_path):
    """An object whose unpickling creates a file; the test fails if the file exists at its end."""
    mark = tmp_path / "it-ran"

    class Bomb:
        def __reduce__(self):
            return (Path.touch, (mark,))

    pickle.loads(pickle.dumps(Bomb()))
    assert mark.exists()  # unpickling does create it
    mark.unlink()
    yield Bomb()
    assert not mark.exists()


@pytest.fixture
def members(encode):
    """The members of a whole sample by name."""
    return {"a.jpg": encode("JPEG", 20, 20), "a.cls": b"0"}


def test_pickles_in_a_tar_are_not_looked_at(tmp_path, bomb, members):
    for suffix in ("pyd", "pickle", "pkl", "pth", "pt", "npy", "npz", "ten", "mp"):
        members |= {f"a.{suffix}": pickle.dumps(bomb)}
    tiny.write_tar(tmp_path / "one.tar", members)
    (sample,) = read_samples(tmp_path / "one.tar")
    assert sample.key == "a" and sample.label == 0 and sample.meta == {}
    (batch,) = RelevanceLoader(tmp_path, batch_size=1, image_size=16)
    assert batch["key"] == ["a"]


@pytest.mark.parametrize("how", ["torch", "pickle"])
def test_pickles_in_weights_and_checkpoints_are_refused(tmp_path, bomb, how):
    run = tmp_path / "run"
    save_for_hf(
        timm.create_model("deit_tiny_patch16_224", img_size=32, depth=1, num_classes=3), run, safe_serialization=True
    )
    whole = (run / "model.safetensors").read_bytes()
    config = json.loads((run / "config.json").read_text())
    data = io.BytesIO()
    torch.save({"model": bomb}, data)
    evil = data.getvalue() if how == "torch" else pickle.dumps({"model": bomb})

    (run / "checkpoint.pt").write_bytes(evil)
    refused(load_checkpoint, run, match="checkpoint.pt: not a readable checkpoint")
    (tmp_path / "weights.pth").write_bytes(evil)
    spec = TeacherSpec(name="deit_tiny_patch16_224", weights=str(tmp_path / "weights.pth"))
    refused(load_teacher, spec, match="cannot be read as weights")
    # timm takes this name where there is no model.safetensors, and fields of the description may point to files.
    (run / "model.safetensors").unlink()
    (run / "pytorch_model.bin").write_bytes(evil)
    refused(load_run, run, match="weights can't be read")
    (run / "model.safetensors").write_bytes(whole)
    for field, value in (("file", str(run / "pytorch_model.bin")), ("url", f"file://{run}/pytorch_model.bin")):
        changed = config | {"pretrained_cfg": config["pretrained_cfg"] | {field: value}}
        (run / "config.json").write_text(json.dumps(changed))
        load_run(run)
    for name in ("hf-hub:someone/model", f"local-dir:{run}"):
        (run / "config.json").write_text(json.dumps(config | {"architecture": name}))
        refused(load_run, run, match="Unknown model")


def test_a_store_is_read_by_its_own_codecs_alone(tmp_path, bomb):
    path = maps_path(tmp_path, "s")
    path.mkdir(parents=True)
    layout = {"zarr_format": 2, "shape": [1, 2, 2], "chunks": [1, 2, 2], "dtype": "|O", "order": "C", "fill_value": 0}
    for codecs in ({"filters": [{"id": "pickle", "protocol": 5}]}, {"compressor": {"id": "pickle", "protocol": 5}}):
        (path / ".zarray").write_text(json.dumps(layout | {"filters": None, "compressor": None} | codecs))
        (path / "0.0.0").write_bytes(pickle.dumps(bomb))
        refused(read_stored, tmp_path, "s", match="maps can't be read")
    shutil.rmtree(path)
    array = zarr.create_array(store=str(path), shape=(1, 2, 2), chunks=(1, 2, 2), dtype="float16", compressors="auto")
    array[:] = 1
    refused(read_stored, tmp_path, "s", match="its codec zstd is not one of a relevance store")


@pytest.mark.parametrize(
    "source",
    [
        "pipe:touch {mark}",
        "pipe://touch {mark}",
        "reference://x.json",
        "simplecache::http://127.0.0.1:9/x",
        "zip://a.tar::http://127.0.0.1:9/x",
        "s3://bucket/x::http://127.0.0.1:9/y",
        "github://someone:repository@main/x",
        "{{touch {mark}}}",
        "$(touch {mark})",
    ],
)
def test_no_path_or_url_is_run_or_leads_through_another(tmp_path, cli, teacher_flags, source):
    mark = tmp_path / "it-ran"
    source = source.replace("{mark}", str(mark))
    for verb in (["extract-teacher-maps", source, "--out", tmp_path / "out", *teacher_flags], ["maps", "info", source]):
        done = cli(*verb)
        assert done.code in (1, 2) and done.error
    assert not mark.exists() and not (tmp_path / "out").exists()


def test_file_urls_are_paths(store, cli):
    assert cli("maps", "info", f"file://{store}").code == 0


# ---------------------------------------------------------------------------------------------- nothing leads elsewhere


@pytest.mark.parametrize("name", ["../../a.jpg", "/a.jpg", "b/../../a.jpg"])
def test_names_in_a_tar_are_keys_and_no_paths(tmp_path, encode, extract_store, contents, name):
    folder = tmp_path / "deep" / "shards"
    folder.mkdir(parents=True)
    tiny.write_tar(folder / "one.tar", {name: encode("JPEG", 20, 20), name.replace("jpg", "cls"): b"0"})
    index_shards(folder)
    maps = extract_store(folder, tmp_path / "deep" / "store")
    assert list(maps) == [name.removesuffix(".jpg")]
    inside = {path.partition("/")[0] for path in contents(tmp_path)}
    assert inside == {"deep"} and not Path("/a.jpg").exists()


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE])
def test_links_and_devices_in_a_tar_are_not_followed(tmp_path, members, kind):
    secret = tmp_path / "secret.jpg"
    secret.write_bytes(members["a.jpg"])
    link = tarfile.TarInfo("b.jpg")
    link.type, link.linkname = kind, str(secret)
    tiny.write_tar(tmp_path / "one.tar", {link: b""} | members)
    assert [sample.key for sample in read_samples(tmp_path / "one.tar")] == ["a"]
    (shard,), _ = list_shards(tmp_path)
    assert [sample.key for sample in read_tar(shard)] == ["a"]


@pytest.mark.parametrize("stem", ["../../elsewhere", "/etc/x", "a/b", "..", "", "x\\y", 3])
def test_a_manifest_names_only_shards_of_its_store(store_copy, stem):
    path = store_copy / "manifest.json"
    value = json.loads(path.read_text())
    value["shards"][0]["stem"] = stem
    path.write_text(json.dumps(value))
    refused(zpipe.open_maps, store_copy, match=r"is no name of a file in this store|Expected `str`, got `int`")


def test_a_shard_index_names_only_tars_of_its_folder(shards_copy, tmp_path):
    shutil.copy(shards_copy / "shard-00000.tar", tmp_path / "stolen.tar")
    path = shards_copy / "shards.json"
    value = json.loads(path.read_text())
    value["shards"].append(value["shards"][0] | {"name": "../stolen.tar"})
    path.write_text(json.dumps(value))
    refused(open_shards, shards_copy, match="is no file name of a tar")
    refused(list_shards, shards_copy, match="is no file name of a tar")


# ------------------------------------------------------------------------------------------------------- nothing swells


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width, height, *others):
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = zlib.compress(bytes(min(height * (width * 3 + 1), 1 << 20)))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        chunk(*part) for part in ((b"IHDR", header), *others, (b"IDAT", pixels), (b"IEND", b""))
    )


def jpeg(encode, width, height):
    """A small JPEG that claims another size."""
    data = encode("JPEG", 16, 16)
    at = data.index(b"\xff\xc0") + 5
    return data[:at] + struct.pack(">HH", height, width) + data[at + 4 :]


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_images_of_more_pixels_than_67_million_are_not_decoded(encode):
    assert images.MAX_PIXELS == 8192**2
    squash = Frame(kind="full", size=(8, 8), interpolation="bicubic")
    text = zlib.compress(bytes(100 << 20))
    for data in (png(8193, 8192), png(2**31 - 1, 2**31 - 1), jpeg(encode, 65535, 65535), jpeg(encode, 8193, 8192)):
        found = frame_image(Sample(key="k", image=data, label=0), squash)
        assert found.pixels is None and re.search("pixels|bomb", found.problem)
    for kind in (b"zTXt", b"iCCP"):  # chunks other than the pixels
        found = frame_image(Sample(key="k", image=png(4, 4, (kind, b"k\0\0" + text)), label=0), squash)
        assert found.pixels is None or found.pixels.shape == (8, 8, 3)


def test_a_hole_in_a_tar_is_refused(tmp_path):
    """1 KB that unpacks to three gigabytes of zeros."""
    hole = tarfile.TarInfo("a.jpg")
    hole.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.name": "a.jpg"}
    hole.pax_headers["GNU.sparse.realsize"] = "3000000000"
    tiny.write_tar(tmp_path / "one.tar", {hole: b"0\n".ljust(512, b"\0")})
    refused(lambda: list(read_samples(tmp_path / "one.tar")), match="one.tar: a.jpg is a sparse member")
    refused(list_shards, tmp_path, match="one.tar: a.jpg is a sparse member")


@pytest.mark.parametrize("field", ["shape", "chunk"])
def test_maps_that_claim_to_be_gigabytes_are_not_read(tmp_path, field):
    path = maps_path(tmp_path, "s")
    zarr.create_array(store=str(path), shape=(4, 4, 4), chunks=(4, 4, 4), dtype="float16", fill_value=0.0)[:] = 1
    value = json.loads((path / "zarr.json").read_text())
    value["chunk_grid"]["configuration"]["chunk_shape"] = [2_000_000_000, 4, 4]
    if field == "shape":
        value["shape"] = [2_000_000_000, 4, 4]
    value["codecs"] = [{"name": "bytes", "configuration": {"endian": "little"}}]
    (path / "zarr.json").write_text(json.dumps(value))
    refused(read_stored, tmp_path, "s", match="is no shard of maps below 1024 MiB")


def test_an_index_of_too_many_rows_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(relevance_store, "MAX_ROWS", 1000)
    pq.write_table(pa.table({"key": ["k"] * 1001}), tmp_path / "x.parquet")
    refused(IndexFile(tmp_path / "x.parquet").table, match="1001 rows are more than 1000")


def test_json_nested_without_end_is_one_line(tmp_path, members):
    (tmp_path / "deep.json").write_text("[" * 200_000)
    refused(
        read_json,
        tmp_path / "deep.json",
        "a manifest",
        type=dict,
        remedy="restore it",
        match="deep.json: not readable as a manifest",
    )
    tiny.write_tar(tmp_path / "one.tar", members | {"a.json": b"[" * 200_000})
    refused(lambda: list(read_samples(tmp_path / "one.tar")), match="key a: its .json can't be read")


# ------------------------------------------------------------------------------------------ secrets stay where they are


@pytest.mark.parametrize(
    "url",
    [
        f"s3://KEY:{CANARY}@bucket/x",
        f"https://user:{CANARY}@h/x",
        f"gs://{CANARY}@b/x",
        f"https://h/x?Signature={CANARY}",
        f"abfss://account:{CANARY}@account.dfs.core.windows.net/x",
        f"hdfs://user:{CANARY}@namenode:8020/x",
    ],
)
def test_urls_with_credentials_are_refused_and_not_repeated(shards, tmp_path, cli, teacher_flags, url):
    assert CANARY not in refused(as_path, url, error=UsageError, match="carries credentials or a query")
    for line in (
        ["extract-teacher-maps", url, "--out", tmp_path / "out", *teacher_flags],
        ["extract-teacher-maps", shards, "--out", url, *teacher_flags],
        ["train-vit", shards, "--out", tmp_path / "out", "--maps", url],
        ["maps", "info", url],
        ["maps", "export", url, tmp_path / "out"],
    ):
        done = cli(*line)
        assert done.code == 2 and CANARY not in done.stdout + done.stderr, done.stderr
    assert list(tmp_path.iterdir()) == []


def commands(group, path=()):
    """All commands below a group of typer's, as (words that call it, its parameters)."""
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, (*path, name))
        else:
            yield (*path, name), command.params


def test_no_argument_of_any_command_may_carry_credentials(tmp_path, capsys, contents, monkeypatch):
    """Whatever an option is for; the message names it, and nothing is printed or written before."""
    monkeypatch.chdir(tmp_path)
    url = f"https://user:{CANARY}@h/x"
    forms = itertools.cycle(
        [lambda name: (name, url), lambda name: (f"{name}={url}",), lambda name: (name, f"a={url}")]
    )
    given = [("maps", url), ("--nothing", url)]
    group = typer.main.get_command(app)  # once, because it takes a while
    for words, parameters in commands(group):
        options = [each.opts[0] for each in parameters if each.opts[0].startswith("--")]
        given += [
            (*words, "one", url),
            *((*words, *form(option)) for option, form in zip(options, forms, strict=False)),
        ]
    assert len(given) > 150
    for line in given:
        code = group.main(list(line), prog_name="zpipe", standalone_mode=False)
        said, error = capsys.readouterr()
        assert code == 2 and "carries credentials" in error and CANARY not in said + error, line
        option = next((word.partition("=")[0] for word in line if word.startswith("--")), "")
        assert error.startswith(f"error: {option}") and error.count("\n") == 1, line
    assert contents(tmp_path) == {}


@pytest.mark.parametrize(
    "url",
    [
        "abfss://container@account.dfs.core.windows.net/x",
        "abfs://container@account.dfs.core.windows.net/x",
        "az://container@account.blob.core.windows.net/x",
        "az://container@account/x",
        "hdfs://user@namenode:8020/x",
        "hdfs://namenode/x",
    ],
)
def test_what_a_path_would_lose_of_its_url_is_refused(url):
    """Workers open what the path names: without its account or host, another store. It is not called a credential."""
    with pytest.raises(
        UsageError, match=r"would be lost .*; give [a-z]+://(container)?/\.\.\., and the rest by the environ"
    ):
        as_path(url)
    bare = as_path("abfss://container/x" if "container" in url else "hdfs:///x")
    assert as_path(str(bare)) == bare


@pytest.fixture
def extract_store(cli, teacher_flags):
    def run(shards, out):
        done = cli("extract-teacher-maps", shards, "--out", out, *teacher_flags, "--executor", "local")
        assert done.code == 0, done.stderr
        return zpipe.open_maps(out)

    return run


def test_secrets_of_the_environment_are_written_nowhere(tmp_path, cli, contents, monkeypatch):
    for name in ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "HF_TOKEN", "WANDB_API_KEY", "RAY_AUTH_TOKEN"):
        monkeypatch.setenv(name, f"{CANARY}-{name}")
    shards, maps = tiny.scenes(tmp_path / "shards"), tmp_path / "maps"
    tiny.store(shards, maps)
    run, said = tmp_path / "zoomer", ""
    for line in (
        [
            "train-zoomer",
            shards,
            "--maps",
            maps,
            "--out",
            run,
            "--num-blocks",
            2,
            "--image-size",
            tiny.SIDE,
            "--epochs",
            1,
            "--batch-size",
            8,
            "--data-workers",
            0,
            "--set",
            "width=8",
        ],
        ["evaluate", run, shards, "--maps", maps],
        ["report", run, "--out", tmp_path / "report", "--gallery", 0],
        ["maps", "info", maps],
        ["doctor"],
    ):
        done = cli(*line)
        assert done.code == 0, done.stderr
        said += done.stdout + done.stderr
    written = contents(tmp_path)
    assert {"maps/manifest.json", "zoomer/run.json", "zoomer/metrics.jsonl", "report/index.html"} <= set(written)
    assert CANARY not in said
    assert [name for name, data in written.items() if CANARY.encode() in data] == []


# ------------------------------------------------------------------------------------------------------ the page itself


def test_every_proof_that_the_page_names_is_there():
    page = (ROOT / "docs" / "security.md").read_text()
    named = re.findall(r"`(test_\w+)`(?: \(`?(tests/[\w/]+\.py)`?\))?", page)
    sources = {path.relative_to(ROOT).as_posix(): path.read_text() for path in (ROOT / "tests").rglob("test_*.py")}
    assert len(named) >= 15
    for name, place in named:
        assert any(f"def {name}(" in source for path, source in sources.items() if place in ("", path)), (name, place)
