"""Teachers and images at the edge: whatever a teacher answers, each image gets a status, or the shard one line."""

import numpy as np
import pytest
import torch
from tiny import encode, write_shards

from zpipe.pipeline import worker
from zpipe.pipeline.verify import verify_store
from zpipe.schemas.errors import ZpipeError
from zpipe.schemas.relevance_maps import RelevanceMaps


@pytest.fixture
def odd_shards(tmp_path):
    """One tar of a black image, a white one, a noisy one and one that can't be decoded, labelled 0."""
    noise = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    images = {"black": np.zeros_like(noise), "white": np.full_like(noise, 255), "noise": noise}
    members = {f"{name}.png": encode(pixels) for name, pixels in images.items()} | {"broken.png": b"\x89PNG\r\n\x1a\n"}
    both = {}
    for name, data in members.items():
        both |= {name: data, name.replace(".png", ".cls"): b"0"}
    return write_shards(tmp_path / "odd", [both])


@pytest.fixture
def head(monkeypatch):
    """Change the head of the worker's teacher: `head(change)`, which gets its weight and its bias."""

    def run(change):
        def load(*args, **kwargs):
            teacher = load_teacher(*args, **kwargs)
            with torch.no_grad():
                change(teacher.model.model.head.weight, teacher.model.model.head.bias)
            return teacher

        load_teacher = worker.load_teacher
        monkeypatch.setattr(worker, "load_teacher", load)

    return run


def constant(weight, bias):
    weight.zero_()


def answering(*values):
    def change(weight, bias):
        weight.zero_()
        bias.copy_(torch.tensor(values))

    return change


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize("target", ["predicted", "ground-truth", "class:2"])
@pytest.mark.parametrize(
    ("change", "status"),
    [
        (constant, "zero"),
        (answering(1.0, 1.0, 1.0, 1.0, 1e38), "zero"),
        (answering(NAN, NAN, NAN, NAN, NAN), "nonfinite"),
        (answering(0.0, NAN, 0.0, 0.0, 0.0), "nonfinite"),
        (answering(0.0, INF, 0.0, 0.0, 0.0), "nonfinite"),
        (answering(-INF, -INF, -INF, -INF, -INF), "nonfinite"),
        (answering(0.0, -INF, 0.0, 0.0, 0.0), "nonfinite"),
    ],
    ids=["constant", "1e38", "NaN", "one NaN", "one inf", "-inf", "one -inf"],
)
def test_every_answer_of_a_teacher_has_a_status(odd_shards, tmp_path, extract, head, change, status, target):
    head(change)
    out = tmp_path / "store"
    report = extract(odd_shards, out, explain=worker.ExplainConfig(target=target))
    assert report.statuses == {status: 3, "undecodable": 1} and len(report.problems) == 4
    assert str(report.account) == f"seen 4, taken 0, left out 4 ({status} 3, undecodable 1), quarantined 0"
    assert verify_store(out, odd_shards) == []
    table = RelevanceMaps(out).table()
    answered = np.array([each == "zero" for each in table["status"].to_pylist()])
    assert (table["predicted"].to_numpy() >= 0).tolist() == answered.tolist()
    assert np.isfinite(table["predicted_probability"].to_numpy()).tolist() == answered.tolist()


def test_a_teacher_of_one_class_explains_it(odd_shards, tmp_path, extract):
    for target in ("predicted", "ground-truth"):
        report = extract(odd_shards, tmp_path / target, num_classes=1, explain=worker.ExplainConfig(target=target))
        assert report.count == 4 and verify_store(tmp_path / target, odd_shards) == []


@pytest.mark.parametrize("label", [b"5", b"-1", b"2147483647"])
def test_a_label_beyond_the_teachers_classes_is_one_line_or_no_matter(tmp_path, extract, label):
    noise = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    shards = write_shards(tmp_path / "labelled", [{"a.png": encode(noise), "a.cls": label}])
    with pytest.raises(ZpipeError, match="1 of 1 shards failed") as error:
        extract(shards, tmp_path / "refused")
    (detail,) = error.value.details
    assert f"key a: label {int(label)} is outside the teacher's 5 classes" in detail and detail.isprintable()
    report = extract(shards, tmp_path / "taken", explain=worker.ExplainConfig(target="predicted"))
    assert report.statuses == {"ok": 1} and verify_store(tmp_path / "taken", shards) == []
