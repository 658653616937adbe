"""Teachers and images of every odd kind: each image gets a recorded status, never a traceback or a warning."""

import numpy as np
import pyarrow as pa
import pytest
import torch
from tiny_vit import tiny_vit

from zpipe.pipeline.classifier import as_classifier
from zpipe.pipeline.explainer import ExplainConfig, Explainer, precisions_of
from zpipe.pipeline.methods import CLASS_BLIND, METHODS
from zpipe.pipeline.shard_reader import FramedImage
from zpipe.pipeline.shard_rows import Tensors, append_rows
from zpipe.pipeline.teacher import Teacher
from zpipe.schemas.errors import UsageError
from zpipe.schemas.geometry import Box
from zpipe.schemas.relevance_store import INDEX_SCHEMA, MORE_COLUMNS, NONFINITE, OK, ZERO, index_schema
from zpipe.schemas.tensor_kinds import KINDS

pytestmark = pytest.mark.usefixtures("one_thread")
SIDE = 16
TARGETS = ("ground-truth", "predicted", "class:0")


def constant(model):
    model.head.weight.zero_()


def zero(model):
    for parameter in model.parameters():
        parameter.zero_()


def one_weight(value):
    def change(model):
        model.blocks[0].mlp.fc1.weight[0, 0] = value

    return change


def one_logit(value):
    def change(model):
        model.head.bias[0] = value

    return change


def scaled(factor):
    def change(model):
        for parameter in model.parameters():
            parameter.mul_(factor)

    return change


# What becomes of a teacher, and the statuses that its maps may have, for methods with a target class and without.
TEACHERS = {
    "usual": (lambda model: None, {OK}, {OK}),
    "one class": (lambda model: None, {OK}, {OK}),
    "constant logits": (constant, {ZERO}, {OK}),
    "all zero": (zero, {ZERO}, {OK}),
    "NaN in one weight": (one_weight(torch.nan), {NONFINITE}, {NONFINITE}),
    "infinity in one weight": (one_weight(torch.inf), {NONFINITE}, {NONFINITE}),
    "NaN in one logit": (one_logit(torch.nan), {NONFINITE}, {NONFINITE}),
    "infinity in one logit": (one_logit(torch.inf), {NONFINITE}, {NONFINITE}),
    "minus infinity in one logit": (one_logit(-torch.inf), {NONFINITE}, {NONFINITE}),
    "overflow": (scaled(1e20), {NONFINITE}, {NONFINITE}),
    "underflow": (scaled(1e-30), {ZERO}, {OK}),
}


def teacher_of(kind, mean=0.5, std=0.5):
    model = tiny_vit(dtype=torch.float32, depth=2, num_classes=1 if kind == "one class" else 5)
    with torch.no_grad():
        TEACHERS[kind][0](model)
    return Teacher(
        model=as_classifier(model.requires_grad_(False)),
        name="tiny",
        weights="random",
        digest="",
        num_classes=model.num_classes,
        image_size=(SIDE, SIDE),
        grid=(4, 4),
        mean=(mean,) * 3,
        std=(std,) * 3,
        interpolation="bicubic",
        crop_pct=1.0,
        model_args={},
    )


def images():
    noise = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
    return np.stack([np.zeros_like(noise), noise, np.full_like(noise, 255)])


def statuses(explained):
    """The statuses of a batch, after all that a worker does with it up to the store."""
    columns = {name: [] for name in index_schema(MORE_COLUMNS.names).names}
    frame = {"width": SIDE, "height": SIDE, "frame": Box(0, 0, SIDE, SIDE), "digest": bytes(16)}
    batch = [FramedImage(key=f"k{i}", label=0, pixels=logit, **frame) for i, logit in enumerate(explained.logits)]
    append_rows(columns, batch, explained)
    tensors = Tensors(KINDS["map"])
    tensors.add(batch, explained.logits, explained.maps.copy())
    columns |= tensors.columns()
    index = pa.table({field.name: pa.array(columns[field.name], field.type) for field in INDEX_SCHEMA})
    for row in index.to_pylist():
        assert row["status"] == NONFINITE or 0 <= row["predicted_probability"] <= 1
    return columns["status"]


def precisions(method):
    return [name for name in precisions_of(method) if "tf32" not in name]


@pytest.mark.parametrize("kind", TEACHERS)
@pytest.mark.parametrize("method", METHODS)
def test_every_image_gets_a_status(kind, method):
    _, with_class, without = TEACHERS[kind]
    for precision in precisions(method):
        # float64 holds what overflows or vanishes in float32.
        allowed = {OK, ZERO, NONFINITE} if kind.endswith("flow") else without if method in CLASS_BLIND else with_class
        for target in TARGETS:
            config = ExplainConfig(method=method, target=target, precision=precision, symmetrise=target == "predicted")
            explain = Explainer(teacher_of(kind), config, batch_size=2, device="cpu")  # two images, then one
            assert set(statuses(explain(images(), np.zeros(3, np.int64)))) <= allowed, (precision, target)


@pytest.mark.parametrize("method", METHODS)
def test_the_smallest_deviation_that_a_description_may_have(method):
    explain = Explainer(
        teacher_of("usual", mean=-10, std=1e-4), ExplainConfig(method=method), batch_size=3, device="cpu"
    )
    assert set(statuses(explain(images(), np.zeros(3, np.int64)))) == {OK}


def test_a_precision_that_the_device_lacks():
    with pytest.raises(UsageError, match="--precision float32\\+tf32: only CUDA devices have it, this is cpu"):
        Explainer(teacher_of("usual"), ExplainConfig(precision="float32+tf32"), batch_size=1, device="cpu")
