"""Extraction: the same bytes whoever computes them and however often they are interrupted; one line for what fails."""

import json
import os
import shutil
import signal
import tarfile
import time
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from extraction_runs import committed, descendants, name_of, state, wait_for
from listening import addresses, reachable
from tiny import write_tar

from zpipe.pipeline import extract as extraction
from zpipe.pipeline import store_plan
from zpipe.pipeline.executor import Resources, run_ray
from zpipe.pipeline.explainer import ExplainConfig
from zpipe.pipeline.extract import ExtractConfig, _threads, extract_teacher_maps, provenance_of
from zpipe.pipeline.make_shards import index_shards
from zpipe.pipeline.relevance import transformer_attribution
from zpipe.pipeline.shard_reader import frame_image, open_shards, read_samples
from zpipe.pipeline.teacher import load_teacher
from zpipe.pipeline.verify import verify_store
from zpipe.pipeline.worker import ShardReport, ShardTask, WorkerSpec, frame_of
from zpipe.schemas import relevance_store
from zpipe.schemas.errors import UsageError, ZpipeError
from zpipe.schemas.manifest import read_manifest, write_extraction
from zpipe.schemas.relevance_maps import RelevanceMaps
from zpipe.schemas.relevance_store import index_path, maps_path, read_index, read_stored, write_shard


@pytest.fixture
def failing(cli, teacher_flags):
    """The same through the command line; returns what it said. It must fail with one line."""

    def run(shards, out, *flags, code=1):
        done = cli("extract-teacher-maps", shards, "--out", out, *teacher_flags, "--executor", "local", *flags)
        assert done.code == code, done.stderr
        assert done.error
        return done

    return run


def tar_members(path):
    with tarfile.open(path) as tar:
        return [(member.name, tar.extractfile(member).read()) for member in tar]


# ------------------------------------------------------------------------------------------------ what is in a store


def test_every_sample_has_the_map_of_its_own_image_and_label(store, shards, teacher_settings):
    """Against the attribution itself, one image at a time: no map may come to lie under another key."""
    settings = teacher_settings
    teacher = load_teacher(ExtractConfig(**settings).teacher_spec())
    mean, std = (torch.tensor(value).view(1, 3, 1, 1) for value in (teacher.mean, teacher.std))
    maps, frame = RelevanceMaps(store), frame_of(teacher, "full")
    model, expected, labels = teacher.model.model.double(), {}, {}
    for path, entry in open_shards(shards)[0]:
        for sample in read_samples(path, entry):
            pixels = frame_image(sample, frame).pixels
            image = (torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None].double() / 255 - mean) / std
            for target in range(5):
                wanted = transformer_attribution(model, image, torch.tensor([target]))[0].numpy()
                expected[sample.key, target] = wanted
            labels[sample.key] = sample.label
    assert labels.keys() == set(maps) and len(maps) == 18
    own = []
    for key, label in labels.items():
        error = {each: np.abs(maps[key] - wanted).max() / np.abs(wanted).max() for each, wanted in expected.items()}
        assert min(error, key=error.get) == (key, label)
        own.append(error[key, label])
    # Storing in float16 takes 2^-11 of the largest value at most. What float32 takes depends on how near zero the
    # denominators of an image come, and on the processor, so the bound is on the typical image and not on each.
    assert np.median(own) <= 2e-3
    provenance = maps.manifest.provenance
    assert provenance.teacher_digest == teacher.digest and provenance.grid == (4, 6)
    assert (provenance.weights, provenance.seed, provenance.teacher_args) == ("random", 0, settings["teacher_args"])
    assert maps.manifest.statuses == {"ok": 18} and maps.manifest.source == str(shards)


def test_a_second_run_does_nothing(store_copy, shards, extract):
    before = state(store_copy)
    report = extract(shards, store_copy)
    assert (report.count, report.shards, report.extracted, report.problems) == (18, 4, 0, ())
    assert state(store_copy) == before


def test_a_fresh_run_gives_the_same_bytes(store, shards, extract, tmp_path, contents):
    report = extract(shards, tmp_path / "again")
    assert (report.count, report.extracted, report.statuses) == (18, 4, {"ok": 18})
    assert contents(tmp_path / "again") == contents(store)
    assert contents(extract(shards, tmp_path / "other", seed=1) and tmp_path / "other") != contents(store)


@pytest.mark.parametrize("lost", ["index", "maps", "manifest"])
def test_what_was_lost_is_made_again_and_the_rest_is_left(store_copy, store, shards, extract, contents, lost):
    before = state(store_copy)
    if lost == "index":
        index_path(store_copy, "shard-00001").unlink()
    elif lost == "maps":
        shutil.rmtree(maps_path(store_copy, "shard-00001"))
    else:
        (store_copy / "manifest.json").unlink()
    # And what a killed worker leaves.
    (store_copy / "maps" / ".tmp-7-shard-00001.zarr").mkdir()
    (store_copy / "index" / ".tmp-7-shard-00001.parquet").write_bytes(b"half")
    assert extract(shards, store_copy).extracted == (lost != "manifest")
    assert contents(store_copy) == contents(store) and verify_store(store_copy, shards) == []
    kept = {
        name: time
        for name, time in state(store_copy).items()
        if name.startswith(("index/shard-00000", "maps/shard-00000"))
    }
    assert kept and all(before[name] == time for name, time in kept.items())


def altered(path):
    """Rewrite an index with other scales and the seal it had."""
    table = pq.read_table(path, partitioning=None)
    scale = table["scale"].to_numpy() * 2
    pq.write_table(
        table.set_column(table.column_names.index("scale"), table.schema.field("scale"), pa.array(scale)), path
    )


@pytest.mark.parametrize("also", [None, "manifest's shard"])
def test_damage_is_not_signed_anew(store_copy, shards, extract, contents, also):
    path = index_path(store_copy, "shard-00001")
    altered(path)
    if also:  # there is something to do, and the manifest is written again
        index_path(store_copy, "shard-00002").unlink()
    before = contents(store_copy)
    with pytest.raises(ZpipeError, match="shard-00001.parquet: its digest is not what it was.*delete it and extract"):
        extract(shards, store_copy)
    assert contents(store_copy) == before and any(str(path) in problem for problem in verify_store(store_copy))
    path.unlink()
    assert extract(shards, store_copy).extracted == 1 + bool(also) and verify_store(store_copy, shards) == []


def other_seal(root):
    table = read_index(root, "shard-00001")
    write_shard(root, "shard-00001", read_stored(root, "shard-00001"), table, input_sha256="0", fingerprint="0")


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda root: shutil.rmtree(maps_path(root, "shard-00001")), "shard-00001.zarr: missing; extract again"),
        (lambda root: altered(index_path(root, "shard-00001")), "its digest is not what it was"),
        (other_seal, "made from a tar with SHA-256 0, shard-00001.tar now has"),
    ],
    ids=["maps lost", "index altered", "other seal"],
)
def test_what_is_damaged_during_the_run_is_not_signed(store_copy, shards, teacher_settings, damage, told):
    """It was in order when the run began, which made another shard."""
    index_path(store_copy, "shard-00003").unlink()

    def progress(stage, done, total, **facts):
        if done == total:
            damage(store_copy)

    config = ExtractConfig(**(teacher_settings | {"executor": "local"}))
    with pytest.raises(ZpipeError, match=told):
        extract_teacher_maps(shards, store_copy, config, progress=progress)
    assert not (store_copy / "manifest.json").exists()
    with pytest.raises(ZpipeError, match="no manifest.json"):
        verify_store(store_copy)


def test_looking_through_many_shards_is_told(store_copy, shards, teacher_settings, monkeypatch):
    monkeypatch.setattr(store_plan, "PROGRESS_EVERY", 2)
    told = []
    config = ExtractConfig(**(teacher_settings | {"executor": "local"}))
    extract_teacher_maps(shards, store_copy, config, progress=lambda *given, **facts: told.append(given))
    looked = [[stage, done, total] for stage, done, total in told if stage != "extract-teacher-maps"]
    assert looked == [["find-finished-shards", 2, 4], ["find-finished-shards", 4, 4], ["audit", 2, 4], ["audit", 4, 4]]


def test_a_second_go_at_a_damaged_store_may_be_interrupted(store_copy, shards, extract, teacher_settings, contents):
    """A recomputed shard need not have the bytes in the manifest: another batch size adds in another order."""
    before = contents(store_copy)
    for stem in ("shard-00000", "shard-00001"):
        index_path(store_copy, stem).unlink()

    def progress(stage, done, total, **facts):
        if facts["shards_left"] == 1:
            raise KeyboardInterrupt

    config = ExtractConfig(**(teacher_settings | {"executor": "local", "batch_size": 2}))
    with pytest.raises(KeyboardInterrupt):
        extract_teacher_maps(shards, store_copy, config, progress=progress)
    made = index_path(store_copy, "shard-00000").read_bytes()
    assert not (store_copy / "manifest.json").exists()
    assert extract(shards, store_copy).extracted == 1 and verify_store(store_copy, shards) == []
    assert index_path(store_copy, "shard-00000").read_bytes() == made
    after = contents(store_copy)
    assert {name for name in before if before[name] != after[name]} <= {
        name for name in before if "00000" in name or name == "manifest.json"
    }


def test_a_store_that_only_grows_can_be_read_meanwhile(shards, shards_copy, tmp_path, extract, teacher_settings):
    """Its manifest goes on listing what was there."""
    (shards_copy / "shard-00003.tar").rename(tmp_path / "later.tar")
    for name in ("shards.json", "make-shards.jsonl"):
        (shards_copy / name).unlink()
    extract(shards_copy, tmp_path / "out")
    (tmp_path / "later.tar").rename(shards_copy / "shard-00003.tar")
    seen = []

    def progress(stage, done, total, **facts):
        if stage == "extract-teacher-maps":
            seen.append(len(RelevanceMaps(tmp_path / "out")))

    config = ExtractConfig(**(teacher_settings | {"executor": "local"}))
    extract_teacher_maps(shards_copy, tmp_path / "out", config, progress=progress)
    assert set(seen) == {seen[0]} and len(RelevanceMaps(tmp_path / "out")) == seen[0] + 3


def test_one_tar_is_enough(shards, tmp_path, extract):
    report = extract(shards / "shard-00003.tar", tmp_path / "out")
    assert (report.count, report.shards) == (3, 1) and len(RelevanceMaps(tmp_path / "out")) == 3


def test_tars_without_an_index_are_read_too(shards_copy, store, tmp_path, extract, contents):
    for name in ("shards.json", "make-shards.jsonl"):
        (shards_copy / name).unlink()
    extract(shards_copy, tmp_path / "out")
    found, expected = contents(tmp_path / "out"), contents(store)
    del found["manifest.json"], expected["manifest.json"]  # it names the folder of the tars
    assert found == expected


@pytest.fixture(scope="module")
def sure(tmp_path_factory, teacher_settings):
    """Weights of the tiny teacher that name class 4 whatever they see, which none of the photos' labels is."""
    settings = teacher_settings
    teacher = load_teacher(ExtractConfig(**settings).teacher_spec())
    with torch.no_grad():
        teacher.model.model.head.bias[4] = 1e3
    path = tmp_path_factory.mktemp("sure") / "teacher.pt"
    torch.save(teacher.model.model.state_dict(), path)
    return path


def test_labels_that_the_teacher_never_names_are_noted(sure, shards, tmp_path, extract, cli, teacher_flags):
    told = "the teacher names only 0.0 % of these labels: are they its classes?"
    report = extract(shards, tmp_path / "out", weights=str(sure))
    assert report.top1 == 0 and [note.startswith(told) for note in report.notes] == [False, True]
    flags = [*teacher_flags, "--weights", sure, "--executor", "local"]
    done = cli("extract-teacher-maps", shards, "--out", tmp_path / "out", *flags)
    assert done.code == 0 and "(0 extracted now); the teacher names 0.0 % of these labels" in done.stdout
    _, note = [line for line in done.stderr.splitlines() if line.startswith("note: ")]
    assert told in note and note.endswith("zpipe train-vit ... --recipe finetune, then --weights RUN")
    # Maps of another class than the label, or of none, don't ask for the teacher's word on labels.
    report = extract(shards, tmp_path / "predicted", weights=str(sure), explain=ExplainConfig(target="predicted"))
    assert report.top1 == 0 and not any(told in note for note in report.notes)


def test_images_without_a_label_or_a_map_do_not_count_as_missed(sure, odd, tmp_path, extract, encode):
    predicted = ExplainConfig(target="predicted")
    root = odd({"a.cls": b"4", "b.cls": None, "c.jpg": b""})
    report = extract(root, tmp_path / "some", weights=str(sure), explain=predicted)
    assert (report.top1, report.statuses) == (1.0, {"ok": 2, "undecodable": 1})
    root = odd({"a.cls": None, "b.cls": None, "c.cls": None})
    assert extract(root, tmp_path / "none", weights=str(sure), explain=predicted).top1 is None


def test_a_random_teacher_is_not_held_against_the_labels(odd, tmp_path, extract):
    extract(odd({}), tmp_path / "first")
    unseen = min(set(range(5)) - set(RelevanceMaps(tmp_path / "first").table()["predicted"].to_pylist()))
    report = extract(odd({f"{key}.cls": str(unseen).encode() for key in "abc"}), tmp_path / "out")
    assert (report.top1, report.notes) == (0.0, ())


# ----------------------------------------------------------------------------------------------------- interruptions


def kill_in_mid_run(running, out):
    """SIGKILL once some but not all shards are committed; waits until its children are gone too. Returns how many."""
    assert wait_for(lambda: committed(out) >= 3, 120, running), running.said()
    below = descendants(running.pid)
    running.kill()
    running.wait(30)
    assert wait_for(lambda: not any("ShardActor" in name_of(pid) for pid in below), 30)
    made = committed(out)
    assert 3 <= made < 18 and not (out / "manifest.json").exists()
    return made


def test_killed_and_run_again_gives_the_same_store(many, undisturbed, tmp_path, start, contents):
    out = tmp_path / "store"
    made = kill_in_mid_run(start(out, "--executor", "local"), out)
    with pytest.raises(ZpipeError, match="extraction is not finished"):
        RelevanceMaps(out)
    before = state(out / "index")
    again = start(out, "--executor", "local")
    assert again.wait(120) == 0, again.said()
    assert f"18 maps in 18 shards ({18 - made} extracted now)" in again.said()
    assert contents(out) == contents(undisturbed)
    after = state(out / "index")
    assert {name: time for name, time in after.items() if name in before} == {
        name: time for name, time in before.items() if not name.startswith(".tmp-")
    }


def test_on_ray_with_a_worker_killed_the_store_is_the_same(undisturbed, tmp_path, start, contents):
    """Byte for byte that of the local executor, though a worker died in mid-run and its shard was done again."""
    out = tmp_path / "store"
    running = start(out, "--executor", "ray", "--actors", "2")

    def worker_at_work():
        if committed(out) < 2:
            return None
        return next((pid for pid in descendants(running.pid) if "ShardActor.process" in name_of(pid)), None)

    worker = wait_for(worker_at_work, 150, running)
    assert worker, running.said()
    os.kill(worker, signal.SIGKILL)
    assert committed(out) < 18
    assert running.wait(150) == 0, running.said()
    assert "18 maps in 18 shards (18 extracted now)" in running.said()
    assert contents(out) == contents(undisturbed)


def test_ray_on_one_machine_listens_on_the_loopback_interface_alone(tmp_path, start):
    """So says the operating system. A run whose raylet is killed ends with one line, and nothing of it is left."""
    out = tmp_path / "store"
    running = start(out, "--executor", "ray", "--actors", "1")

    def processes_at_work():
        time.sleep(0.3)
        below = descendants(running.pid)
        assert reachable([running.pid, *below]) == set()
        return below if committed(out) else None

    below = wait_for(processes_at_work, 150, running)
    assert below and addresses(below), running.said()
    (raylet,) = [pid for pid in below if name_of(pid).partition(" ")[0].endswith("/raylet")]
    os.kill(raylet, signal.SIGKILL)
    assert running.wait(60) == 1
    told = [line for line in running.said().splitlines() if not line.startswith(("{", "warning: random weights"))]
    assert len(told) == 1, told
    (error,) = told
    assert error.startswith("error: Ray on this machine was lost (its raylet was killed by signal 9")
    assert error.endswith("run the same command again to resume")
    assert wait_for(lambda: not any(map(name_of, below)), 20), [name_of(pid) for pid in below]


@pytest.mark.slow
def test_ray_killed_and_run_again_gives_the_same_store(undisturbed, tmp_path, start, contents):
    out = tmp_path / "store"
    flags = ("--executor", "ray", "--actors", "2")
    made = kill_in_mid_run(start(out, *flags), out)
    again = start(out, *flags)
    assert again.wait(150) == 0, again.said()
    # A worker may have committed one more shard after its driver had gone.
    left = int(again.said().rpartition("18 maps in 18 shards (")[2].split()[0])
    assert 18 - made - 2 <= left <= 18 - made
    assert contents(out) == contents(undisturbed)


@pytest.mark.slow
def test_a_shard_that_kills_every_worker_is_reported_and_the_rest_goes_on(undisturbed, tmp_path, start, many, contents):
    """The only worker is killed while it is at the last shard, as often as that shard is tried."""
    out = tmp_path / "store"
    running = start(out, "--executor", "ray", "--actors", "1")
    dead: set[int] = set()

    def kill_who_is_at_work():
        for pid in descendants(running.pid):
            if pid not in dead and "ShardActor.process" in name_of(pid) and committed(out) >= 17:
                os.kill(pid, signal.SIGKILL)
                dead.add(pid)
        return running.poll() is not None

    assert wait_for(kill_who_is_at_work, 300), running.said()
    assert running.returncode == 1 and len(dead) >= 3, running.said()
    said = running.said()
    # One is left when the killing begins, and the one before may be committed without having been told of.
    failed = said.count("worker failed")
    assert 1 <= failed <= 2 and f"{failed} of 18 shards failed, the others are committed" in said
    assert "Traceback" not in said and committed(out) >= 17 and not (out / "manifest.json").exists()
    again = start(out, "--executor", "local")
    assert again.wait(120) == 0, again.said()
    assert contents(out) == contents(undisturbed)


@pytest.mark.slow
def test_a_worker_that_cannot_begin_is_one_line(shards, tmp_path, teacher_settings):
    """Weights that differ between machines, which here is a digest that no weights have."""
    path, entry = open_shards(shards)[0][0]
    spec = WorkerSpec(
        teacher=ExtractConfig(**teacher_settings).teacher_spec(),
        teacher_digest="0" * 64,
        fingerprint="1" * 64,
        out=str(tmp_path),
        explain=ExplainConfig(),
        frame="full",
        batch_size=1,
        threads=1,
        sharing=1,
        device="cpu",
    )
    reports = []
    with pytest.raises(ZpipeError, match="a worker could not begin: .*every machine needs the same file") as error:
        run_ray(spec, [ShardTask(path=str(path), entry=entry)], Resources(actors=1), reports.append, lambda: None)
    assert "\n" not in str(error.value) and not reports and not list(tmp_path.iterdir())


@pytest.mark.parametrize("address", ["127.0.0.1:1", "ray://127.0.0.1:1", "127.0.0.1:99999"])
def test_a_cluster_that_does_not_answer_is_one_line_at_once(shards, tmp_path, extract, address):
    begun = time.monotonic()
    with pytest.raises(ZpipeError, match=f"Ray at {address} could not be reached .*use --executor local") as error:
        extract(shards, tmp_path / "out", executor="ray", address=address)
    assert "\n" not in str(error.value) and time.monotonic() - begun < 60


# --------------------------------------------------------------------------------------- stores that aren't this run's


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--seed", "1"], "made with teacher_digest = "),
        (["--num-classes", "6"], "made with teacher_digest = "),
        (["--model-arg", "depth=1"], '"depth": 2'),
    ],
)
def test_another_teacher_is_refused(store_copy, shards, contents, failing, flags, told):
    before = contents(store_copy)
    error = failing(shards, store_copy, *flags).error
    assert told in error and "this run has" in error and "give another --out folder" in error
    assert contents(store_copy) == before


def test_other_tars_are_refused(store_copy, shards_copy, contents, failing, encode):
    before = contents(store_copy)
    tar = shards_copy / "shard-00003.tar"
    members = tar_members(tar)
    write_tar(tar, [(n, encode("JPEG", 900, 900) if n.endswith("jpg") else data) for n, data in members])
    assert "truncated or altered" in failing(shards_copy, store_copy).error
    (shards_copy / "shards.json").unlink()
    old = read_manifest(store_copy).shards[3].input_sha256[:12]
    error = failing(shards_copy, store_copy).error
    assert f"made from a tar with SHA-256 {old}" in error and "now has" in error
    tar.rename(shards_copy / "renamed.tar")
    assert "its input tar is not among these shards" in failing(shards_copy, store_copy).error
    assert contents(store_copy) == before


def test_a_folder_that_holds_something_else_is_refused(shards, tmp_path, failing, contents):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("dear")
    assert "holds something else (thesis.tex)" in failing(shards, tmp_path / "home", code=2).error
    assert "is a file, not a folder" in failing(shards, tmp_path / "home" / "thesis.tex", code=2).error
    before = contents(shards)
    assert "holds something else" in failing(shards, shards, code=2).error
    assert contents(shards) == before and list(contents(tmp_path)) == ["home/thesis.tex"]


# ------------------------------------------------------------------------------------------------ tars that are broken


def test_a_truncated_tar_fails_alone(shards_copy, tmp_path, failing, extract, store, contents, shards):
    """It has the right size, so that only reading it finds the damage; mended, it completes the store."""
    tar = shards_copy / "shard-00001.tar"
    good = tar.read_bytes()
    tar.write_bytes(good[: len(good) // 2] + bytes(len(good) - len(good) // 2))
    out = tmp_path / "out"
    done = failing(shards_copy, out)
    assert "1 of 4 shards failed, the others are committed; correct their causes and run again" in done.error
    assert len(done.details) == 1 and str(tar) in done.details[0]
    assert committed(out) == 3 and not (out / "manifest.json").exists()
    assert not maps_path(out, "shard-00001").exists() and not list(out.rglob(".tmp-*"))
    tar.write_bytes(good)
    assert extract(shards_copy, out).extracted == 1
    found, expected = contents(out), contents(store)
    del found["manifest.json"], expected["manifest.json"]
    assert found == expected


def test_a_shortened_tar_is_refused_before_any_work(shards_copy, tmp_path, failing):
    tar = shards_copy / "shard-00001.tar"
    size = tar.stat().st_size
    os.truncate(tar, size - 512)
    error = failing(shards_copy, tmp_path / "out").error
    assert f"{tar}: {size - 512} bytes, but shards.json says {size}: truncated or altered" in error
    tar.unlink()
    assert f"{tar}: listed in shards.json but not there" in failing(shards_copy, tmp_path / "out").error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("limit", "value"), [("MAX_ROWS", 4), ("MAX_MAP_BYTES", 4 * 4 * 6 * 2)])
def test_a_tar_whose_maps_could_not_be_read_is_refused_before_any_work(
    shards, tmp_path, extract, monkeypatch, limit, value
):
    monkeypatch.setattr(relevance_store, limit, value)
    told = r"shard-00000.tar: 5 samples, a map shard holds 4 maps of 4 x 6; make smaller tars .*--shard-size 4 at most"
    with pytest.raises(ZpipeError, match=told):
        extract(shards, tmp_path / "out", replace=True)
    assert not (tmp_path / "out").exists()
    report = extract(shards / "shard-00003.tar", tmp_path / "small")  # of 3
    assert report.count == len(RelevanceMaps(tmp_path / "small").array()) == 3


@pytest.fixture
def odd(tmp_path, encode):
    """A tar of three samples whose members a test may replace: `odd({"b.cls": b"7"}) -> folder`."""

    def run(changes):
        members = {}
        for number, key in enumerate("abc"):
            members |= {f"{key}.jpg": encode("JPEG", 60, 40, seed=number), f"{key}.cls": str(number).encode()}
        members |= changes
        root = tmp_path / "odd"
        write_tar(root / "one.tar", [(name, data) for name, data in members.items() if data is not None])
        return root

    return run


def test_images_that_cannot_be_decoded_are_named_and_the_rest_is_there(odd, tmp_path, failing, encode):
    whole = encode("JPEG", 60, 40)
    root = odd({"a.jpg": b"", "b.jpg": whole[: len(whole) // 2]})
    index_shards(root)
    out = tmp_path / "out"
    done = failing(root, out)
    assert "2 images have no usable map; the store is whole and says which" in done.error
    told = ["one.tar: key a: undecodable", "one.tar: key b: undecodable"]
    assert done.details[0] == f"{told[0]} (zero bytes)"
    assert done.details[1].startswith(f"{told[1]} (") and "truncated" in done.details[1].lower()  # PIL's words
    assert verify_store(out, root) == []
    maps = RelevanceMaps(out)
    assert maps.manifest.statuses == {"ok": 1, "undecodable": 2}
    assert np.isnan(maps["a"]).all() and np.isfinite(maps["c"]).all() and maps["c"].any()
    rows = {row["key"]: row for row in maps.table().to_pylist()}
    assert (rows["a"]["label"], rows["a"]["predicted"], rows["a"]["width"]) == (0, -1, 0) and np.isnan(
        rows["a"]["scale"]
    )
    before = state(out)
    assert failing(root, out).details == told  # still so; nothing is done again, so nobody knows why
    assert state(out) == before


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"b.cls": b"5"}, "key b: label 5 is outside the teacher's 5 classes"),
        ({"b.cls": b"-1"}, "key b: label -1 is outside"),
        ({"b.cls": None}, "key b: has no label"),
        ({"b.cls": b"bee"}, "key b: its .cls holds b'bee'"),
        ({"b.jpg": None}, "key b: expected one image, found cls"),
    ],
)
def test_samples_that_have_no_target_or_image_fail_their_shard(odd, tmp_path, failing, changes, told):
    out = tmp_path / "out"
    done = failing(odd(changes), out)
    assert told in done.error + "".join(done.details) and "one.tar" in done.error + "".join(done.details)
    assert not list(out.rglob("*.parquet")) and not (out / "manifest.json").exists() and not list(out.rglob("*.zarr"))


def test_a_tar_altered_after_it_was_indexed(odd, tmp_path, failing):
    """Of the same size, with other keys."""
    root = odd({})
    index_shards(root)
    write_tar(root / "one.tar", [(name.replace("c.", "d."), data) for name, data in tar_members(root / "one.tar")])
    done = failing(root, tmp_path / "out")
    assert "3 samples, SHA-256" in done.details[0] and "truncated or altered" in done.details[0]
    assert committed(tmp_path / "out") == 0


# ------------------------------------------------------------------------------------------------------ wrong requests


def test_a_source_without_tars(tmp_path, failing):
    (tmp_path / "empty").mkdir()
    (tmp_path / "x.zip").write_bytes(b"")
    for source, told in [("none", "no such folder"), ("empty", "holds no .tar file"), ("x.zip", "not a .tar file")]:
        error = failing(tmp_path / source, tmp_path / "out", code=2).error
        assert told in error and str(tmp_path / source) in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--executor", "spark"], "--executor spark: choose ray or local"),
        (["--teacher", "deit_tinny"], "timm has no such model"),
        (["--weights", "/none/teacher.pth"], "/none/teacher.pth: no such weights"),
        (["--model-arg", "depth"], "write it as key=value"),
        (["--model-arg", "patch_size=[1"], "cannot be built"),
    ],
)
def test_options_that_make_no_sense(shards, tmp_path, failing, flags, told):
    assert told in failing(shards, tmp_path / "out", *flags, code=2).error
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a CUDA device")
def test_a_device_that_is_not_there(shards, tmp_path, extract):
    with pytest.raises(UsageError, match="--device cuda: torch sees no CUDA device"):
        extract(shards, tmp_path / "out", device="cuda")


def test_the_kind_of_device_is_recorded_and_kept(shards, tmp_path, extract):
    out = tmp_path / "out"
    provenance = extract(shards, out).provenance
    assert provenance.device == read_manifest(out).provenance.device == "cpu"
    write_extraction(out, replace(provenance, device="cuda"))
    (out / "manifest.json").unlink()
    with pytest.raises(ZpipeError, match='made with device = "cuda", this run has "cpu"; .*, --device cuda, or --repl'):
        extract(shards, out)


def test_a_store_without_a_recorded_device_is_resumed_as_it_was_begun(shards, tmp_path, extract, monkeypatch):
    """As stores of earlier versions are."""
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(extraction, "provenance_of", lambda *args: replace(provenance_of(*args), device=""))
        extract(shards, out)
    index_path(out, "shard-00001").unlink()
    (out / "manifest.json").unlink()
    report = extract(shards, out)
    assert report.extracted == 1 and report.provenance.device == read_manifest(out).provenance.device == ""
    assert verify_store(out, shards) == []
    assert extract(shards, out, replace=True).provenance.device == "cpu"


def test_gpu_workers_take_their_threads_from_their_machines():
    assert _threads(ExtractConfig(device="cuda"), 8) == 0
    assert _threads(ExtractConfig(device="cuda", threads=3), 8) == 3
    assert _threads(ExtractConfig(device="cuda", executor="local"), 8) == (os.cpu_count() or 1)


@pytest.mark.parametrize("leave", [0, 6_000, 30_000])
def test_a_full_disk(small_disk, shards, failing, extract, store, contents, leave):
    """Room for nothing, for the record of the run, for some shards: one line; with room again the run goes on."""
    out = small_disk.root / "out"
    small_disk.fill(leave)
    done = failing(shards, out)
    told = done.error + " ".join(done.details)
    assert "could not be written" in told and "No space left on device" in told and str(out) in told
    assert not (out / "manifest.json").exists() and not list(out.rglob(".tmp-*")) and committed(out) < 4
    small_disk.fill(400_000)
    extract(shards, out)
    assert contents(out) == contents(store)


# --------------------------------------------------------------------------------------------------------- as a process


def test_the_command_as_a_process(shards, store, tmp_path, process, teacher_flags, contents):
    """Exit codes and the two streams as a shell sees them: results on one, progress and errors on the other."""
    out = tmp_path / "out"
    flags = [*teacher_flags, "--executor", "local"]
    done = process("extract-teacher-maps", shards, "--out", out, *flags)
    table = RelevanceMaps(store).table()
    share = 100 * np.mean(table["label"].to_numpy() == table["predicted"].to_numpy())
    told = (
        f"18 maps in 4 shards (4 extracted now); the teacher names {share:.1f} % of these labels; seen 18, taken 18, "
    )
    told += "left out 0, quarantined 0"
    assert (done.code, done.stdout) == (0, f"{out}: {told}\n")
    first, *lines = done.stderr.splitlines()
    assert first.startswith("warning: random weights") and json.loads(lines[-1])["done"] == 18
    assert contents(out) == contents(store)
    done = process("extract-teacher-maps", shards, "--out", out, *flags, "--seed", "1")
    assert done.code == 1 and done.stdout == "" and "teacher_digest" in done.error and done.details == []


def test_reports_are_counted_as_they_come_and_those_that_say_nothing_are_let_go(monkeypatch):
    def run(spec, tasks, resources, on_report, check):
        for number, task in enumerate(tasks):
            error = f"{task}: broken" if number % 2 else ""
            on_report(ShardReport(stem=task, count=1, statuses={} if error else {"ok": 1}, error=error))

    told = []
    monkeypatch.setattr(extraction, "run_local", run)
    tally = extraction._Tally(
        10, 16, 6, lambda stage, done, total, **facts: told.append((done, facts.get("failed"), facts["shards_left"]))
    )
    tasks = [f"shard-{number}" for number in range(6)]
    extraction._run_workers(None, tasks, ExtractConfig(executor="local"), lambda: None, tally)
    assert [report.stem for report in tally.reports] == ["shard-1", "shard-3", "shard-5"]
    assert told == [(10, None, 6), (11, 0, 5), (12, 1, 4), (13, 1, 3), (14, 2, 2), (15, 2, 1), (16, 3, 0)]


# -------------------------------------------------------------------------------------------------------------- threads


@pytest.mark.parametrize(
    ("cpus", "shards", "expected"),
    [
        (2, 1, 2),
        (2, 2, 1),
        (2, 1000, 1),
        (8, 1, 8),
        (8, 3, 4),
        (64, 1, 16),
        (64, 2, 16),
        (64, 8, 8),
        (64, 1000, 4),
        (1, 1, 1),
    ],
)
def test_few_shards_get_more_threads_each(monkeypatch, cpus, shards, expected):
    monkeypatch.setattr("os.cpu_count", lambda: cpus)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert _threads(ExtractConfig(), shards) == expected
    assert _threads(ExtractConfig(threads=3), shards) == 3
    assert _threads(ExtractConfig(executor="local"), shards) == cpus
    assert _threads(ExtractConfig(address="auto"), shards) == min(4, max(1, cpus // 2))
