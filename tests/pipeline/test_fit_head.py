"""zpipe fit-head: a head for a frozen encoder, from shards to a file, and what goes wrong on the way."""

import io
import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from sklearn.linear_model import LogisticRegression
from tiny import write_tar

from zpipe.pipeline.fit_head import STRENGTHS, FitHeadConfig, fit_head
from zpipe.pipeline.heads import read_head
from zpipe.pipeline.make_shards import index_shards
from zpipe.pipeline.probe_features import TarFeatures, hold_out
from zpipe.pipeline.shard_reader import Frame, frame_image, open_shards, read_samples
from zpipe.pipeline.teacher import TeacherSpec, load_teacher
from zpipe.schemas.errors import UsageError, ZpipeError
from zpipe.schemas.lease import held_lease
from zpipe.schemas.shard_index import read_index, write_index

pytestmark = pytest.mark.usefixtures("one_thread")

NAME = "vit_small_patch14_dinov2"
ARGS = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3}
SPEC = TeacherSpec(name=NAME, weights="random", num_classes=0, model_args=ARGS)
FLAGS = ["--teacher", NAME, "--weights", "random", "--threads", "1"]
FLAGS += [part for name, value in ARGS.items() for part in ("--model-arg", f"{name}={value}")]
COLOURS = ((200, 40, 40), (40, 200, 40), (40, 40, 200))


def config(**changes):
    return FitHeadConfig(**({"teacher": SPEC, "threads": 1, "device": "cpu"} | changes))


def sample(label, number):
    """A noisy image of the class's colour, as the members of a tar."""
    rng = np.random.default_rng(100 * label + number)
    pixels = np.clip(COLOURS[label] + rng.normal(0, 60, (40, 56, 3)), 0, 255).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    key = f"image-{number}-of-{label}"
    return {f"{key}.png": buffer.getvalue(), f"{key}.cls": str(label).encode()}


def tars(folder, counts, first=0, per_tar=12):
    """Tars of images, `counts` of each class, the classes mixed."""
    every = [(label, number) for label, count in enumerate(counts) for number in range(first, first + count)]
    every = [every[i] for i in np.random.default_rng(1).permutation(len(every))]
    for start in range(0, len(every), per_tar):
        members = {name: data for each in every[start : start + per_tar] for name, data in sample(*each).items()}
        write_tar(folder / f"{start:05d}.tar", members)
    return folder


@pytest.fixture(scope="module")
def train(tmp_path_factory):
    return tars(tmp_path_factory.mktemp("train"), (10, 10, 10))


@pytest.fixture(scope="module")
def val(tmp_path_factory):
    return tars(tmp_path_factory.mktemp("val"), (6, 6, 6), first=50)


def test_a_head_from_shards_to_a_teacher(cli, train, val, tmp_path):
    out = tmp_path / "head.safetensors"
    done = cli("fit-head", train, "--out", out, "--val", val, *FLAGS)
    assert done.code == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith(f"{out}: 3 classes from 48 features of 30 images, L2 strength ")
    assert "of 6 images, held out to choose the strength; the head was then fitted to all images" in lines[1]
    assert lines[2].startswith("top-1 ") and lines[2].endswith(f"of 18 images in {val}")
    assert [path.name for path in tmp_path.iterdir()] == ["head.safetensors"]
    found = load_teacher(TeacherSpec(name=NAME, weights="random", model_args=ARGS, head=str(out)))
    assert found.num_classes == 3


def by_hand(teacher, shards):
    """Features (class token and mean of the patches), labels and keys, one image at a time."""
    frame = Frame(kind="center", size=(32, 32), interpolation=teacher.interpolation, crop_pct=teacher.crop_pct)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (teacher.mean, teacher.std))
    features, labels = [], []
    for path, entry in open_shards(shards)[0]:
        for each in read_samples(path, entry):
            pixels = torch.tensor(frame_image(each, frame).pixels).permute(2, 0, 1) / 255
            tokens = teacher.model.model.forward_features(((pixels - mean) / std)[None])[0]
            features.append(torch.cat([tokens[0], tokens[1:].mean(0)]))
            labels.append(each.label)
    return torch.stack(features).double().numpy(), np.array(labels)


def test_the_head_is_scikit_learns_on_standardised_features(train, val, tmp_path):
    out = tmp_path / "head.safetensors"
    strength = 0.02
    report = fit_head(train, out, config(strength=strength), val=val)
    teacher = load_teacher(SPEC, needs_classes=False)
    with torch.no_grad():
        features, labels = by_hand(teacher, train)
        others, their_labels = by_hand(teacher, val)
    mean, std = features.mean(0), features.std(0)
    theirs = LogisticRegression(C=1 / (strength * len(labels)), tol=1e-8, max_iter=10_000)
    theirs.fit((features - mean) / std, labels)
    expected = theirs.decision_function((others - mean) / std)
    head = load_teacher(TeacherSpec(**vars(SPEC) | {"head": str(out)})).model.head
    logits = others @ head.weight.double().numpy().T + head.bias.double().numpy()
    found, wanted = logits - logits.mean(1, keepdims=True), expected - expected.mean(1, keepdims=True)
    np.testing.assert_allclose(found, wanted, atol=5e-3)
    assert report.val.correct == (logits.argmax(1) == their_labels).sum() and report.val.count == 18
    assert (report.held_out, report.strength, report.count) == (None, strength, 30)
    assert report.val.top1 > 0.8  # the colours are far apart


def test_the_strength_is_the_best_on_held_out_images(train, tmp_path):
    report = fit_head(train, tmp_path / "head.safetensors", config())
    assert report.strength in STRENGTHS and report.held_out.count == 6 and report.held_out.top1 > 0.6


def test_on_a_gpu(cuda, train, tmp_path):
    """The features are those of the CPU, so that the head is, too, up to rounding."""
    for device in ("cpu", "cuda"):
        fit_head(train, tmp_path / f"{device}.safetensors", config(strength=0.1, device=device))
    expected, found = (load_file(tmp_path / f"{device}.safetensors") for device in ("cpu", "cuda"))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-3)


class Interrupted(Exception):
    pass


def stop(stage, done, total, **facts):
    """End a run after the features of its first tar."""
    if stage == "fit-head: features" and done:
        raise Interrupted


def test_an_interrupted_run_computes_only_what_is_missing(train, tmp_path):
    out, times = tmp_path / "head.safetensors", []

    with pytest.raises(Interrupted):
        fit_head(train, out, config(), progress=stop)
    (first,) = (tmp_path / "head.safetensors.features").glob("*.features.safetensors")
    before = first.stat()

    def look(stage, done, total, **facts):
        if stage == "fit-head: features" and done == total:
            times.append((len(list(first.parent.glob("*.features.safetensors"))), first.stat() == before))

    fit_head(train, out, config(), progress=look)
    assert times == [(3, True)] and not first.parent.exists()
    undisturbed = tmp_path / "undisturbed.safetensors"
    fit_head(train, undisturbed, config())
    one, other = load_file(out), load_file(undisturbed)
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_features_of_another_frame_are_not_taken(train, tmp_path):
    out = tmp_path / "head.safetensors"

    for frame in ("center", "full"):
        with pytest.raises(Interrupted):
            fit_head(train, out, config(frame=frame), progress=stop)
    assert len(list((tmp_path / "head.safetensors.features").glob("*.features.safetensors"))) == 2


def features_after(train, out, config):
    """Names of the files of features after a run that was ended after its first tar."""
    with pytest.raises(Interrupted):
        fit_head(train, out, config, progress=stop)
    return {path.name for path in out.with_name(f"{out.name}.features").glob("*.features.safetensors")}


def test_features_of_the_other_own_head_are_not_taken(train, tmp_path):
    """The weights, and so their digest, are the same."""
    distilled = {"name": "deit_tiny_distilled_patch16_224", "weights": "random", "model_args": ARGS}
    counts = [
        len(features_after(train, tmp_path / "h.safetensors", config(teacher=TeacherSpec(**distilled, own_head=own))))
        for own in ("class", "distilled", None, "class")
    ]
    assert counts == [1, 2, 3, 3]


def test_labels_of_another_field_are_not_taken(train, tmp_path):
    """A field is a property of the index: the tars, and so their digests, are the same."""
    members = {}
    for label in range(2):
        for number in range(4):
            named = sample(label, number)
            key = next(iter(named)).removesuffix(".png")
            members |= named | {f"{key}.json": json.dumps({"other": 1 - label}).encode()}
    write_tar(tmp_path / "a" / "0.tar", members)
    counts = []
    for field in (None, "other"):
        (tmp_path / "a" / "shards.json").unlink(missing_ok=True)
        index_shards(str(tmp_path / "a"), None, label_field=field)
        counts.append(len(features_after(tmp_path / "a", tmp_path / "head.safetensors", config())))
    assert counts == [1, 2]
    resumed, undisturbed = tmp_path / "head.safetensors", tmp_path / "undisturbed.safetensors"
    for out in (resumed, undisturbed):
        fit_head(tmp_path / "a", out, config(strength=0.1))
    assert torch.equal(load_file(resumed)["weight"], load_file(undisturbed)["weight"])


def test_one_run_at_a_time_fits_a_head(cli, train, tmp_path):
    out = tmp_path / "head.safetensors"
    kept = features_after(train, out, config())
    folder = tmp_path / "head.safetensors.features"
    with held_lease(folder):
        assert "has been writing to this folder of features since" in failure(cli, 1, train, out)
    assert {path.name for path in folder.glob("*.features.safetensors")} == kept and not out.exists()


def test_a_head_says_how_its_images_were_prepared(train, tmp_path):
    out = tmp_path / "head.safetensors"
    prepared = {"mean": (0.25, 0.5, 0.75), "std": (0.5, 0.5, 0.5), "interpolation": "lanczos", "crop_pct": 0.75}
    spec = TeacherSpec(**vars(SPEC) | prepared)
    fit_head(train, out, config(teacher=spec, strength=0.1))
    teacher = load_teacher(spec, needs_classes=False)
    record = read_head(out, teacher.model, teacher.digest)[1]
    said = prepared | {"frame": "center", "own_parts": ("class",), "reads_mean": True}
    assert vars(record) | said == vars(record)


def test_the_choice_depends_on_neither_order_nor_tars():
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 3, (40,), generator=generator)
    hashes = torch.randint(-(2**60), 2**60, (40,), generator=generator)

    def tar(rows):
        return TarFeatures(None, torch.zeros(len(rows), 2), labels[rows], hashes[rows], "", {})

    def chosen(parts):
        masks = hold_out([tar(rows) for rows in parts], 3)
        return {int(row) for rows, mask in zip(parts, masks, strict=True) for row in rows[mask]}

    whole = chosen([torch.arange(40)])
    assert whole == chosen(list(torch.randperm(40, generator=generator).split(7)))
    for number in range(3):
        rows = (labels == number).nonzero()[:, 0].tolist()
        assert len(whole & set(rows)) == round(0.2 * len(rows))


def test_small_classes():
    one = TarFeatures(None, torch.zeros(4, 2), torch.tensor([0, 1, 1, 0]), torch.arange(4), "", {})
    assert hold_out([one], 2)[0].tolist() == [True, True, False, False]
    alone = TarFeatures(None, torch.zeros(2, 2), torch.tensor([0, 1]), torch.arange(2), "", {})
    assert not hold_out([alone], 2)[0].any()


# ------------------------------------------------------------------------------------------------ what goes wrong


def failure(cli, code, shards, out, *flags):
    done = cli("fit-head", shards, "--out", out, *FLAGS, *flags)
    assert done.code == code, done.stderr
    return done.error


def test_an_image_without_a_label_is_named(cli, tmp_path):
    members = {name: data for name, data in sample(0, 1).items() if name.endswith("png")}
    write_tar(tmp_path / "a" / "0.tar", sample(1, 1) | members)
    message = failure(cli, 1, tmp_path / "a", tmp_path / "head.safetensors")
    assert "0.tar: key image-1-of-0: has no label (.cls, or label in .json); add one" in message


def test_a_class_without_images_is_named(cli, tmp_path):
    shards = tars(tmp_path / "a", (3, 0, 3))
    out = tmp_path / "head.safetensors"
    assert "a: class 1 has no usable image" in failure(cli, 1, shards, out)
    assert "b: has one class" in failure(cli, 1, tars(tmp_path / "b", (3,)), out)
    single = tars(tmp_path / "c", (1, 1))
    assert "no class has two images" in failure(cli, 1, single, out) and not out.exists()
    assert cli("fit-head", single, "--out", out, *FLAGS, "--l2", "0.1").code == 0


def test_a_label_that_no_model_has_takes_no_memory(cli, tmp_path):
    broken = sample(1, 90)
    name = next(name for name in broken if name.endswith("cls"))
    shards = tars(tmp_path / "a", (3, 3))
    write_tar(shards / "broken.tar", broken | {name: b"2000000000"})
    message = failure(cli, 1, shards, tmp_path / "head.safetensors")
    assert "has the label 2000000000, a head has at most 1000000 classes; correct the labels" in message


def test_random_weights_are_warned_of(cli, train, tmp_path):
    done = cli("fit-head", train, "--out", tmp_path / "head.safetensors", *FLAGS, "--l2", "0.1")
    assert done.code == 0 and "warning: random weights were asked for" in done.stderr


def test_classes_of_the_validation_shards_must_be_the_same(cli, shards, tmp_path):
    other = shutil.copytree(shards, tmp_path / "other")
    index = read_index(other)
    write_index(other, type(index)(**vars(index) | {"classes": ("ant", "cat", "bee")}))
    message = failure(cli, 1, shards, tmp_path / "head.safetensors", "--val", other)
    assert "its class 1 is 'cat', that of" in message and "give validation shards of the same classes" in message
    more = tars(tmp_path / "more", (3, 3, 3))
    few = tars(tmp_path / "few", (3, 3))
    assert "has the label 2, there are 2 classes" in failure(
        cli, 1, few, tmp_path / "head.safetensors", "--val", more, "--l2", "0.1"
    )


def test_images_that_cannot_be_used_are_listed_and_left_out(cli, tmp_path):
    shards = tars(tmp_path / "a", (4, 4))
    broken = sample(0, 90)
    name = next(name for name in broken if name.endswith("png"))
    write_tar(shards / "broken.tar", broken | {name: broken[name][:200]})
    out = tmp_path / "head.safetensors"
    done = cli("fit-head", shards, "--out", out, *FLAGS)
    assert done.code == 1 and "written without 1 image that could not be used" in done.error
    assert done.details[0].startswith(f"{shards / 'broken.tar'}: key image-90-of-0: ")
    assert "of 8 images" in done.stdout and out.is_file()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--l2", "0"], "--l2 0.0: give a number > 0"),
        (["--frame", "crop"], "--frame crop: choose full or center"),
        (["--frame", "full", "--crop-pct", "0.9"], "--crop-pct 0.9: --frame full shows the whole image"),
        (["--device", "cuda:99"], "device cuda:99: "),
    ],
)
def test_options_that_make_no_sense(cli, train, tmp_path, flags, message):
    assert message in failure(cli, 2, train, tmp_path / "head.safetensors", *flags)


def test_nothing_of_others_is_replaced(cli, train, tmp_path):
    assert "ends in .safetensors" in failure(cli, 2, train, tmp_path / "head.pt")
    (tmp_path / "head.safetensors").write_bytes(b"mine")
    assert "exists, and zpipe did not write it" in failure(cli, 2, train, tmp_path / "head.safetensors")
    mine = tmp_path / "new.safetensors.features"
    mine.mkdir()
    (mine / "notes.txt").touch()
    assert "holds something else (notes.txt)" in failure(cli, 2, train, tmp_path / "new.safetensors")


def test_a_head_is_fitted_to_the_teacher_alone():
    with pytest.raises(UsageError, match="leave head and class_embeddings out"):
        config(teacher=TeacherSpec(weights="random", head="head.safetensors"))


def test_a_damaged_file_of_features_is_named(train, tmp_path):
    out = tmp_path / "head.safetensors"

    with pytest.raises(Interrupted):
        fit_head(train, out, config(), progress=stop)
    (first,) = (tmp_path / "head.safetensors.features").glob("*.features.safetensors")
    first.write_bytes(first.read_bytes()[:-8])
    with pytest.raises(ZpipeError, match="is damaged .*; remove .* and run again"):
        fit_head(train, out, config())
