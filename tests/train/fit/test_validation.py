"""The validation set chooses the best epoch, so it is checked as the training set is; and who else writes to a run."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from leases import holder_of
from tiny import BODY, SIDE, encode, scenes, write_shards

from zpipe.schemas.errors import UsageError, ZpipeError
from zpipe.train.checkpoint import load_run
from zpipe.train.fit.config import TrainConfig
from zpipe.train.fit.train_vit import VitConfig, train_vit

LOOP = TrainConfig(epochs=1, batch_size=4, data_workers=0, log_every=3, device="cpu", lr=1e-3)
PLAIN = VitConfig(model="deit_tiny_patch16_224", model_args=BODY, image_size=SIDE, train=LOOP)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("validation")
    scenes(root / "shards", 12)
    return root


def labelled(folder, labels, classes=()):
    """Shards of one tar of grey images with these labels, None for no label; the index names the classes."""
    image = encode(np.full((SIDE, SIDE, 3), 128, np.uint8))
    members = {}
    for number, label in enumerate(labels):
        members[f"k{number}.png"] = image
        if label is not None:
            members[f"k{number}.cls"] = str(label).encode()
    write_shards(folder, [members])
    index = folder / "shards.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"classes": list(classes)}))
    return folder


def refused(data, tmp_path, val) -> str:
    with pytest.raises(ZpipeError) as error:
        train_vit(data / "shards", tmp_path / "run", PLAIN, val=val)
    assert not (tmp_path / "run" / "metrics.jsonl").exists() and "\n" not in str(error.value)
    return str(error.value)


def test_validation_classes_of_other_names_are_refused_before_training(data, tmp_path):
    names = [str(number) for number in range(10)]
    val = labelled(tmp_path / "val", [0, 1], [*names[:3], "x", *names[4:]])
    told = refused(data, tmp_path, val)
    assert f"--val {val}: its class 3 is 'x', that of {data / 'shards'} is '3'" in told
    val = labelled(tmp_path / "more", [0, 1], [*names, "ten"])
    assert "its class 10 is 'ten'" in refused(data, tmp_path, val)


@pytest.mark.parametrize(
    ("label", "told"), [(10, "key k1: label 10 is outside the model's 10 classes"), (None, "key k1: has no label")]
)
def test_validation_labels_are_checked_before_training(data, tmp_path, label, told):
    assert told in refused(data, tmp_path, labelled(tmp_path / "val", [0, label]))


def test_labels_of_later_tars_are_checked_when_they_are_read(data, tmp_path):
    image = encode(np.full((SIDE, SIDE, 3), 128, np.uint8))
    tars = [{f"{name}.png": image, f"{name}.cls": label} for name, label in (("a", b"1"), ("b", b"10"))]
    with pytest.raises(ZpipeError, match="key b: label 10 is outside the model's 10 classes"):
        train_vit(data / "shards", tmp_path / "run", PLAIN, val=write_shards(tmp_path / "val", tars))
    assert not (tmp_path / "run" / "best.json").exists()


def test_answers_that_are_not_finite_choose_no_epoch(data, tmp_path, monkeypatch):
    def spoiled(model, source, batch, point):
        logits = torch.zeros(len(batch["key"]), 10)
        logits[-1, 3] = float("nan")
        return logits, None

    monkeypatch.setattr("zpipe.train.fit.train_vit.run_model", spoiled)
    with pytest.raises(ZpipeError, match="key .*: the model's answer is NaN or infinite, which is no accuracy"):
        train_vit(data / "shards", tmp_path / "run", PLAIN, val=data / "shards")
    assert not (tmp_path / "run" / "best.json").exists()


def test_a_head_of_classes_of_other_names_is_not_taken(data, tmp_path):
    names = [f"animal {number}" for number in range(10)]
    animals = labelled(tmp_path / "animals", range(10), names)
    slow = replace(PLAIN, train=replace(LOOP, lr=1e-30, weight_decay=0.0, batch_size=10))
    train_vit(animals, tmp_path / "first", slow)
    other = replace(slow, init_from=str(tmp_path / "first"), train=replace(slow.train, seed=1))
    same = labelled(tmp_path / "same", range(10), names)
    train_vit(same, tmp_path / "again", other)
    plants = labelled(tmp_path / "plants", range(10), [f"plant {number}" for number in range(10)])
    train_vit(plants, tmp_path / "third", other)
    first, again, third = (load_run(tmp_path / name).model.state_dict() for name in ("first", "again", "third"))
    assert torch.allclose(first["head.weight"], again["head.weight"])
    assert not torch.allclose(first["head.weight"], third["head.weight"])
    assert torch.allclose(first["cls_token"], third["cls_token"])


def test_a_run_that_another_process_trains_is_left_alone(data, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    holder_of(run)
    with pytest.raises(ZpipeError, match="has been writing to this run since noon; wait for it, or give another"):
        train_vit(data / "shards", run, PLAIN)
    assert [path.name for path in run.iterdir()] == ["lease.json"]
    (run / "lease.json").unlink()
    train_vit(data / "shards", run, PLAIN)
    assert not (run / "lease.json").exists() and (run / "config.json").is_file()


def test_a_lease_that_was_lost_ends_the_training(data, tmp_path, monkeypatch):
    def lost(lease):
        raise ZpipeError("the lease is another's")

    monkeypatch.setattr("zpipe.schemas.lease.Lease.check", lost)
    with pytest.raises(ZpipeError, match="the lease is another's"):
        train_vit(data / "shards", tmp_path / "run", PLAIN)
    assert not (tmp_path / "run" / "config.json").exists()


def test_a_run_whose_checkpoint_vanished_is_not_begun_anew(data, tmp_path):
    run = tmp_path / "run"
    train_vit(data / "shards", run, replace(PLAIN, train=replace(LOOP, keep=1)))
    for name in ("config.json", "checkpoint.pt"):
        (run / name).unlink()
    with pytest.raises(ZpipeError, match="checkpoint.pt: is gone, .*epochs/00001.safetensors.*delete the folder"):
        train_vit(data / "shards", run, replace(PLAIN, train=replace(LOOP, keep=1)))
    shutil.rmtree(run)
    train_vit(data / "shards", run, PLAIN)


@pytest.mark.parametrize("name", ["shards", "val", "maps"])
def test_an_address_with_a_password_is_not_recorded(data, tmp_path, name):
    paths = {"shards": data / "shards", name: "s3://user:secret@bucket/x"}
    with pytest.raises(UsageError) as error:
        train_vit(paths.pop("shards"), tmp_path / "run", PLAIN, **paths)
    assert "secret" not in str(error.value) and not (tmp_path / "run").exists()
