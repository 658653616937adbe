"""Whole runs on a device: an extraction, resumed, and a training, stopped and resumed."""

from dataclasses import replace

import numpy as np
import pytest
import safetensors.torch
import torch
from tiny import BODY, SIDE, TEACHER

import zpipe
from zpipe.gpu_numbers import relative_error
from zpipe.pipeline.explainer import ExplainConfig
from zpipe.pipeline.extract import ExtractConfig, extract_teacher_maps
from zpipe.train.fit.loop import Stopped
from zpipe.train.fit.train_vit import VitConfig, train_vit


def extract(shards, out, device, **changes):
    config = ExtractConfig(
        teacher="deit_tiny_patch16_224",
        weights="random",
        num_classes=3,
        teacher_args=TEACHER,
        executor="local",
        threads=2,
        device=device.type,
        **changes,
    )
    return extract_teacher_maps(shards, out, config)


def test_an_extraction_resumes_and_gives_the_maps_of_float64(device, photo_shards, tmp_path):
    pytest.importorskip("zarr")
    assert extract(photo_shards, tmp_path / "maps", device).extracted == 4
    (tmp_path / "maps" / "manifest.json").unlink()
    (tmp_path / "maps" / "index" / "shard-00002.parquet").unlink()
    assert extract(photo_shards, tmp_path / "maps", device).extracted == 1
    extract(photo_shards, tmp_path / "exact", torch.device("cpu"), explain=ExplainConfig(precision="float64"))
    found, expected = zpipe.open_maps(tmp_path / "maps"), zpipe.open_maps(tmp_path / "exact")
    assert list(found) == list(expected) and len(found) == 24
    ranks = [np.corrcoef(rank(found[key]), rank(expected[key]))[0, 1] for key in found]
    assert np.median(ranks) > 0.99


def rank(values):
    return values.reshape(-1).argsort().argsort()


# As `zpipe train-vit` without flags but for sizes.
PLAIN = VitConfig(model="deit_tiny_patch16_224", model_args=BODY, image_size=SIDE, num_classes=3)


def train(shards, run, device, stop_at=None, **changes):
    """Train, and return all weights as one vector."""
    config = replace(PLAIN, train=replace(PLAIN.train, batch_size=4, device=device.type, **{"epochs": 2} | changes))
    calls = iter(range(1, 100))
    train_vit(shards, run, config, **{"stop": lambda: next(calls) == stop_at} if stop_at else {})
    return weights(run)


def weights(run):
    return torch.cat([value.flatten() for value in safetensors.torch.load_file(run / "model.safetensors").values()])


def test_a_training_with_the_defaults_resumes(device, photo_shards, tmp_path):
    with pytest.raises(Stopped, match="stopped in step 8 of 12"):
        train(photo_shards, tmp_path / "run", device, stop_at=8)
    resumed = train(photo_shards, tmp_path / "run", device)
    whole = train(photo_shards, tmp_path / "whole", device)
    assert relative_error(resumed, whole) <= (0 if device.type == "cpu" else 0.05)


def test_a_training_in_float32_equals_that_of_the_cpu(device, photo_shards, tmp_path):
    found = train(photo_shards, tmp_path / "there", device, precision="float32", epochs=1)
    expected = train(photo_shards, tmp_path / "here", torch.device("cpu"), precision="float32", epochs=1)
    assert relative_error(found, expected) < 0.02


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_train_as_one(photo_shards, tmp_path):
    pytest.importorskip("ray")
    from zpipe.train.fit.distributed import Workers, run_training

    loop = replace(PLAIN.train, epochs=1, batch_size=4, device="cuda", precision="float32")
    arguments = {"shards": photo_shards, "out": tmp_path / "two"}
    run_training(train_vit, arguments, replace(PLAIN, train=loop), Workers(count=2))
    one = train(photo_shards, tmp_path / "one", torch.device("cuda"), precision="float32", epochs=1)
    assert relative_error(weights(tmp_path / "two"), one) < 0.02
