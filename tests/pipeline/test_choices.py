"""Values that are none of a field's choices: one line with the field, the value and the choices, from Python too."""

from pathlib import Path

import pytest

from zpipe.pipeline.datasets import Cifar10Source, Flowers102Source
from zpipe.pipeline.explainer import ExplainConfig
from zpipe.pipeline.export import export_numpy, export_parquet
from zpipe.pipeline.extract import ExtractConfig
from zpipe.pipeline.make_shards import FolderSource, SceneSource
from zpipe.pipeline.scenes import SceneConfig, make_scenes
from zpipe.pipeline.shard_reader import Frame
from zpipe.schemas.errors import UsageError
from zpipe.schemas.sample import key_for_file

NONE = Path("none")
SOURCE = {"shard_size": 1, "shuffle_seed": 0}

CASES = {
    "executor": (lambda: ExtractConfig(executor="rya"), "--executor rya: choose ray or local"),
    "frame": (lambda: ExtractConfig(frame="crop"), "--frame crop: choose full or center"),
    "frame of a worker": (
        lambda: Frame(kind="crop", size=(8, 8), interpolation="bicubic"),
        "--frame crop: choose full or center",
    ),
    "interpolation": (
        lambda: Frame(kind="full", size=(8, 8), interpolation="box"),
        "interpolation box: choose one of bicubic, bilinear, lanczos",
    ),
    "method": (
        lambda: ExplainConfig(method="lrp"),
        "--method lrp: choose one of transformer-attribution, transformer-attribution-stable, gradient-attention, "
        "legrad, libragrad, rollout, class-attention",
    ),
    "precision": (
        lambda: ExplainConfig(precision="half"),
        "--precision half: choose one of float32, float64, float64+float32, float64+bfloat16, float32+bfloat16, "
        "float32+tf32, bfloat16, auto",
    ),
    "target": (
        lambda: ExplainConfig(target="best"),
        "--target best: choose ground-truth, predicted, class:K or top:K",
    ),
    "keys": (lambda: FolderSource(NONE, key_rule="name", **SOURCE), "--keys name: choose stem or path"),
    "key": (lambda: key_for_file("a/b.jpg", "name"), "--keys name: choose stem or path"),
    "split of scenes": (
        lambda: SceneSource(count=1, split="test", seed=0, config=SceneConfig(), shard_size=1),
        "--split test: choose train or val",
    ),
    "split of a batch of scenes": (
        lambda: make_scenes(1, split="test", seed=0),
        "--split test: choose train or val",
    ),
    "split of cifar10": (
        lambda: Cifar10Source(NONE, split="test", **SOURCE),
        "--split test: cifar10 has train, val",
    ),
    "split of flowers102": (
        lambda: Flowers102Source(NONE, split="all", **SOURCE),
        "--split all: flowers102 has train, val, test, trainval",
    ),
    "values of Parquet": (
        lambda: export_parquet(None, NONE, values="log"),
        "--values log: choose raw or minmax",
    ),
    "values of NumPy": (lambda: export_numpy(None, NONE, values="log"), "--values log: choose raw or minmax"),
    "batch size": (lambda: ExtractConfig(batch_size=-1), "--batch-size -1: give a number >= 0"),
    "GPUs": (lambda: ExtractConfig(gpus_per_actor=-0.5), "--gpus-per-actor -0.5: give a number >= 0"),
    "device": (lambda: ExtractConfig(device="mps"), "--device mps: choose auto, cpu or cuda"),
    "one GPU on Ray": (
        lambda: ExtractConfig(device="cuda:1"),
        "--device cuda:1: Ray gives each worker GPUs of its own; give --device cuda and choose GPUs by "
        "CUDA_VISIBLE_DEVICES, or give --executor local",
    ),
    "image timeout": (lambda: ExtractConfig(image_timeout_s=0), "--image-timeout 0: give a number of seconds > 0"),
    "teacher arguments": (
        lambda: ExtractConfig(teacher_args={"num_classes": 3}),
        "model_args: num_classes=3 is its own option, give it there",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_a_value_that_is_no_choice_is_refused_where_it_is_defined(name):
    call, message = CASES[name]
    with pytest.raises(UsageError) as error:
        call()
    assert str(error.value) == message


@pytest.mark.parametrize("flags", [("--executor", "rya"), ("--frame", "crop"), ("--method", "lrp")])
def test_the_command_line_gives_the_same_error(cli, tmp_path, flags):
    field, value = flags[0].removeprefix("--"), flags[1]
    done = cli("extract-teacher-maps", tmp_path, "--out", tmp_path / "out", *flags)
    with pytest.raises(UsageError) as error:
        ExplainConfig(method=value) if field == "method" else ExtractConfig(**{field: value})
    assert done.code == 2 and done.error == f"error: {error.value}"
