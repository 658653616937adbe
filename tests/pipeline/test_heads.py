"""Heads in place of a teacher's own: what they compute, their files, and maps that explain their classes."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F

import zpipe
from zpipe.pipeline.classifier import as_classifier
from zpipe.pipeline.explainer import ExplainConfig
from zpipe.pipeline.extract import ExtractConfig, extract_teacher_maps
from zpipe.pipeline.heads import HeadRecord, LinearHead, ZeroShotHead, probe_features, read_head, reads_mean, write_head
from zpipe.pipeline.libragrad import BalancedGradients
from zpipe.pipeline.methods import METHODS, methods_of
from zpipe.pipeline.teacher import TeacherSpec, load_teacher, state_digest
from zpipe.pipeline.verify import verify_store
from zpipe.schemas.errors import UsageError, ZpipeError
from zpipe.schemas.manifest import read_manifest
from zpipe.schemas.weights_file import DIGEST

pytestmark = pytest.mark.usefixtures("one_thread")

ARGS = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3}
NAME = "vit_small_patch14_dinov2"
CLIP = "vit_base_patch16_clip_224"
NAMES = ("ant", "bee", "cat")
CLOSED_FORM = [name for name in METHODS if name.startswith("transformer-attribution")]
# Families that differ in what their own head reads.
READS = {
    NAME: ("class", "mean"),
    CLIP: ("class", "mean"),
    "deit_tiny_distilled_patch16_224": ("class", "distilled", "mean"),
    "vit_base_patch16_siglip_224": ("pool",),
    "beit_base_patch16_224": ("mean",),
    "vit_small_patch16_dinov3": ("mean",),
}


def encoder(name=NAME, **spec):
    settings = {"weights": "random", "num_classes": 0, "model_args": ARGS} | spec
    return load_teacher(TeacherSpec(name=name, **settings), needs_classes=False)


def record_for(teacher, **changes):
    record = {
        "teacher": teacher.name,
        "teacher_digest": teacher.digest,
        "reads_mean": reads_mean(teacher.model),
        "classes": NAMES,
        "frame": "center",
        "count": 30,
        "strength": 0.01,
        "held_out": 6,
        "held_out_top1": 0.5,
        "zpipe_version": "0",
    }
    return HeadRecord(**(record | changes))


def numbers(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def head_file(path, teacher, *, seed=0, classes=3, features=None, **changes):
    width = probe_features(teacher.model, numbers(1, teacher.model.tokens, 24), reads_mean(teacher.model)).shape[1]
    weight = numbers(classes, features or width, seed=seed)
    write_head(path, weight, numbers(classes, seed=seed + 1), record_for(teacher, **changes))
    return path


@pytest.fixture(scope="module")
def teacher():
    return encoder()


@pytest.fixture
def file(teacher, tmp_path):
    return head_file(tmp_path / "head.safetensors", teacher)


def spec(**changes):
    return TeacherSpec(**({"name": NAME, "weights": "random", "num_classes": 0, "model_args": ARGS} | changes))


def failure(kind, **changes):
    with pytest.raises(kind) as error:
        load_teacher(spec(**changes))
    assert type(error.value) is kind and "\n" not in str(error.value)
    return str(error.value)


# -------------------------------------------------------------------------------------------------- what they compute


@pytest.mark.parametrize("name", READS)
def test_a_linear_head_reads_its_parts(name):
    teacher = encoder(name)
    own = teacher.model
    with_mean = reads_mean(own)
    normed = own.normalise(own.encode(numbers(2, 3, 32, 32)))
    features = probe_features(own, normed, with_mean)
    head = LinearHead(numbers(3, features.shape[1]), numbers(3, seed=1), own_parts=own.parts, reads_mean=with_mean)
    model = as_classifier(own.model, head).eval()
    assert (model.parts, model.num_classes) == (READS[name], 3)
    patches = normed[:, own.prefix_tokens :].mean(1)
    expected = torch.cat([own.pool(normed), patches], 1) if "mean" in READS[name][1:] else own.pool(normed)
    torch.testing.assert_close(model(numbers(2, 3, 32, 32)), F.linear(expected, head.weight, head.bias))
    # LeGrad reads the answer from the prefix tokens and a single patch.
    few = numbers(2, model.prefix_tokens + 1, 24)
    assert model.read(few).shape == (2, 3)
    readout = model.readout()
    assert readout is None if name.endswith("siglip_224") else float(readout.sum()) == pytest.approx(1)


def test_the_parts_of_the_readout_have_equal_shares(teacher, file):
    row = load_teacher(spec(head=str(file))).model.readout()
    torch.testing.assert_close(row, torch.tensor([0.5] + [0.5 / 16] * 16))


def test_zero_shot_logits_are_scaled_cosines():
    own = encoder(CLIP, num_classes=5).model
    embeddings = numbers(3, 5)
    model = as_classifier(own.model, ZeroShotHead(7 * embeddings, 50.0)).eval()
    images = numbers(2, 3, 32, 32, seed=4)
    expected = 50 * F.cosine_similarity(own(images)[:, None], embeddings[None], dim=2)
    torch.testing.assert_close(model(images), expected)
    assert (
        model.parts == own.parts
        and model.num_classes == 3
        and {"head.scale", "head.embeddings"} <= {name for name in model.state_dict() if name.startswith("head.")}
    )


@pytest.mark.parametrize("method", [name for name in METHODS if name not in CLOSED_FORM])
@pytest.mark.parametrize("kind", ["linear", "zero-shot"])
@pytest.mark.parametrize("name", [CLIP, "vit_base_patch16_siglip_224"])
def test_methods_explain_the_classes_of_a_head(name, kind, method):
    own = encoder(name).model
    if kind == "linear":
        width = 48 if reads_mean(own) else 24
        head = LinearHead(numbers(3, width), numbers(3, seed=1), own_parts=own.parts, reads_mean=reads_mean(own))
    else:
        head = ZeroShotHead(numbers(3, 24))
    model = as_classifier(own.model, head).double().eval().requires_grad_(False)
    images = numbers(2, 3, 32, 32).double()
    maps, logits = METHODS[method](model, images, torch.tensor([[0, 2], [0, 2]]))
    assert maps.shape == (2, 2, 4, 4) and maps.isfinite().all()
    torch.testing.assert_close(logits, model(images))
    assert (maps[:, 0] == maps[:, 1]).all() == (method in ("rollout", "class-attention"))
    alone = METHODS[method](model, images[1:], torch.tensor([2])).maps
    torch.testing.assert_close(maps[1:, 1], alone, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", ["linear", "zero-shot"])
def test_the_corrected_gradient_is_complete(kind):
    """The logit is the sum of tokens times gradient and biases times gradient (LibraGrad)."""
    own = encoder(CLIP).model
    linear = LinearHead(numbers(3, 48), numbers(3, seed=1), own_parts=own.parts, reads_mean=True)
    model = as_classifier(own.model, linear if kind == "linear" else ZeroShotHead(numbers(3, 24))).double().eval()
    parts = [value.requires_grad_() for name, value in model.named_parameters() if name.endswith("bias")]

    def enter(_block, args):
        parts.append(args[0].detach().requires_grad_())
        return (parts[-1],)

    handle = model.blocks[0].register_forward_pre_hook(enter)
    with BalancedGradients():
        logit = model(numbers(1, 3, 32, 32).double())[0, 1]
    handle.remove()
    grads = torch.autograd.grad(logit, parts, allow_unused=True)
    total = sum((part * grad).sum() for part, grad in zip(parts, grads, strict=True) if grad is not None)
    torch.testing.assert_close(total, logit, rtol=0, atol=1e-9)


def test_the_closed_form_is_refused_with_a_head(teacher, file):
    refusals = methods_of(load_teacher(spec(head=str(file))).model)
    assert [name for name, reason in refusals.items() if reason] == CLOSED_FORM


# ------------------------------------------------------------------------------------------------- files of heads


def test_a_head_comes_back_from_its_file(teacher, file):
    loaded = load_teacher(spec(head=str(file)))
    assert (loaded.num_classes, loaded.classes, loaded.name) == (3, NAMES, NAME)
    torch.testing.assert_close(loaded.model.head.weight, numbers(3, 48), rtol=0, atol=0)
    torch.testing.assert_close(loaded.model.head.bias, numbers(3, seed=1), rtol=0, atol=0)


def test_the_digest_is_that_of_model_and_head(teacher, file, tmp_path):
    loaded = load_teacher(spec(head=str(file)))
    other = load_teacher(spec(head=str(head_file(tmp_path / "other.safetensors", teacher, seed=9))))
    assert len({teacher.digest, loaded.digest, other.digest}) == 3
    assert load_teacher(spec(head=str(shutil.copy(file, tmp_path / "copy")))).digest == loaded.digest
    # Without a head it stays what it was in earlier versions.
    assert teacher.digest == state_digest(teacher.model.model.state_dict())


def test_a_head_of_another_teacher_is_refused(file):
    assert "was fitted to vit_small_patch14_dinov2 with digest" in failure(ZpipeError, head=str(file), seed=5)


def test_a_head_of_other_features_is_refused(teacher, tmp_path):
    file = head_file(tmp_path / "head.safetensors", teacher, features=24)
    assert "reads 24 features, this teacher has 48" in failure(ZpipeError, head=str(file))


def test_a_head_of_the_other_of_two_own_heads_is_refused(tmp_path):
    """Both features have the same width, and the weights are the same."""
    name = "deit_tiny_distilled_patch16_224"
    fitted = encoder(name, own_head="class", num_classes=5)
    file = head_file(tmp_path / "head.safetensors", fitted, own_parts=fitted.model.own_parts)
    assert encoder(name, own_head="class", num_classes=5, head=str(file)).num_classes == 3
    for own_head, parts in (("distilled", "distilled"), (None, "class and distilled")):
        message = failure(ZpipeError, name=name, num_classes=5, own_head=own_head, head=str(file))
        assert f"reads class of the teacher, not {parts}; give --own-head as it was fitted with" in message


def test_a_head_of_images_that_are_normalised_differently_is_refused(teacher, tmp_path):
    prepared = {"mean": teacher.mean, "std": (0.5, 0.25, 0.125), "interpolation": teacher.interpolation}
    file = head_file(tmp_path / "head.safetensors", teacher, **prepared)
    message = failure(ZpipeError, head=str(file))
    assert "was fitted to images of the std [0.5, 0.25, 0.125], these have [0.229, 0.224, 0.225]" in message
    assert "give --std 0.5,0.25,0.125, or fit a head" in message
    rounded = (0.50001, 0.25, 0.125)
    assert load_teacher(spec(head=str(file), std=rounded)).note == ""
    note = load_teacher(spec(head=str(file), std=rounded, interpolation="lanczos")).note
    assert note == f"{file}: was fitted to {teacher.interpolation} images, these are lanczos"


def test_a_head_with_other_names_is_refused(teacher, tmp_path):
    file = head_file(tmp_path / "head.safetensors", teacher, classes=4)
    assert "names 3 classes and has 4" in failure(ZpipeError, head=str(file))


def test_a_head_that_is_not_finite_is_refused(teacher, tmp_path):
    weight = torch.full((3, 48), torch.nan)
    write_head(tmp_path / "head.safetensors", weight, torch.zeros(3), record_for(teacher))
    assert "weight holds NaN" in failure(ZpipeError, head=str(tmp_path / "head.safetensors"))


@pytest.mark.parametrize("place", [-1, 200, 8])
def test_a_damaged_head_is_refused(file, place):
    data = bytearray(file.read_bytes())
    data[place] ^= 1
    file.write_bytes(data)
    assert "can't be read" in failure(ZpipeError, head=str(file))


@pytest.mark.parametrize("size", [0, 5, 300, -20])
def test_a_truncated_head_is_refused(file, size):
    file.write_bytes(file.read_bytes()[:size])
    assert "can't be read" in failure(ZpipeError, head=str(file))


def test_what_is_no_head_is_refused(teacher, tmp_path):
    state = {name: value.clone() for name, value in teacher.model.model.state_dict().items()}
    safetensors.torch.save_file(state, tmp_path / "weights.safetensors")
    message = failure(ZpipeError, head=str(tmp_path / "weights.safetensors"))
    assert "is no head that zpipe fit-head wrote" in message
    torch.save({"weight": numbers(3, 48)}, tmp_path / "head.pt")
    assert "no safetensors file" in failure(ZpipeError, head=str(tmp_path / "head.pt"))
    assert "no such head" in failure(UsageError, head=str(tmp_path / "none.safetensors"))
    assert "is a folder" in failure(ZpipeError, head=str(tmp_path))


def test_a_head_of_a_newer_version_is_refused(file):
    tensors = safetensors.torch.load_file(file)
    with safetensors.safe_open(file, "pt") as opened:
        about = json.loads(opened.metadata()["zpipe_head"])
    for change, message in (({"version": 2}, "upgrade zpipe"), ({"teacher_digest": "x"}, "not readable as a head")):
        text = json.dumps(about | change)
        safetensors.torch.save_file(tensors, file, metadata={"zpipe_head": text, DIGEST: ""})
        assert message in failure(ZpipeError, head=str(file))


def test_a_file_of_version_1_reads_as_it_was_written(teacher):
    file = Path(__file__).parents[1] / "golden" / "formats" / "head_v1.safetensors"
    head, record = read_head(file, teacher.model, "0123456789abcdef" * 4)
    assert torch.equal(head.weight, torch.linspace(-1, 1, 144).view(3, 48)) and head.bias.tolist() == [0, 0.5, 1]
    expected = {"reads_mean": True, "classes": NAMES, "frame": "center", "count": 30, "strength": 0.01}
    expected |= {"held_out": 6, "held_out_top1": 0.5, "zpipe_version": "0.1"}
    assert vars(record) | expected == vars(record)


# ------------------------------------------------------------------------------------------- embeddings of classes


def embeddings_in(folder, kind, values, **metadata):
    file = folder / f"classes.{kind}"
    if kind == "npy":
        np.save(file, np.asarray(values))
    elif kind == "pt":
        torch.save(values, file)
    else:
        tensors = values if isinstance(values, dict) else {"embeddings": values}
        safetensors.torch.save_file(tensors, file, metadata=metadata or None)
    return file


@pytest.mark.parametrize("kind", ["npy", "safetensors", "pt"])
def test_embeddings_of_each_kind_of_file(tmp_path, kind):
    file = embeddings_in(tmp_path, kind, F.normalize(numbers(3, 24), dim=1))
    (tmp_path / "classes.txt").write_text("ant\nbee\ncat\n")
    loaded = load_teacher(spec(class_embeddings=str(file)))
    assert (loaded.num_classes, loaded.classes) == (3, NAMES)
    torch.testing.assert_close(loaded.model.head.embeddings, F.normalize(numbers(3, 24), dim=1))
    assert loaded.note.endswith(f"{file}: names no logit_scale, that of CLIP is assumed: 100")


def test_metadata_names_classes_and_scale(tmp_path):
    metadata = {"classes": json.dumps(["ant", "bee", "cat"]), "logit_scale": "12.5"}
    file = embeddings_in(tmp_path, "safetensors", 3 * F.normalize(numbers(3, 24), dim=1), **metadata)
    loaded = load_teacher(spec(class_embeddings=str(file)))
    assert loaded.classes == NAMES and float(loaded.model.head.scale) == 12.5
    assert loaded.note.endswith(f"{file}: rows have norms of 3 to 3 and were normalised")
    assert loaded.model.head.embeddings.norm(dim=1).tolist() == pytest.approx([1, 1, 1])


BROKEN = {
    "of another model": (lambda: numbers(3, 20), "[3, 20], images of this teacher have 24 numbers; give those of the"),
    "turned": (lambda: numbers(24, 3), "it has a column per class: transpose it"),
    "one vector": (lambda: numbers(24), "give a row per class: [classes, 24]"),
    "empty": (lambda: numbers(0, 24), "give a row per class"),
    "with NaN": (lambda: numbers(3, 24).index_fill(0, torch.tensor([1]), torch.nan), "row 1 holds NaN"),
    "with a zero row": (lambda: numbers(3, 24).index_fill(0, torch.tensor([2]), 0), "row 2 is zero"),
    "of integers": (lambda: torch.ones(3, 24, dtype=torch.int64), "holds 0 arrays"),
}


@pytest.mark.parametrize("kind", ["npy", "safetensors", "pt"])
@pytest.mark.parametrize("case", BROKEN)
def test_embeddings_that_do_not_fit_are_one_line(tmp_path, case, kind):
    values, message = BROKEN[case]
    file = embeddings_in(tmp_path, kind, values())
    found = failure(ZpipeError, class_embeddings=str(file))
    assert found.startswith(f"{file}: ")
    assert message in found


def test_files_that_are_no_embeddings_are_one_line(tmp_path):
    def message(file):
        return failure(ZpipeError, class_embeddings=str(file))

    assert "no such embeddings" in failure(UsageError, class_embeddings=str(tmp_path / "none.npy"))
    cut = embeddings_in(tmp_path, "npy", numbers(3, 24))
    cut.write_bytes(cut.read_bytes()[:200])
    assert "cannot be read as an array" in message(cut)
    np.save(tmp_path / "objects.npy", np.array([{}], object), allow_pickle=True)
    assert "cannot be read as an array" in message(tmp_path / "objects.npy")
    (tmp_path / "page.pt").write_text("<html>")
    assert "it is a web page" in message(tmp_path / "page.pt")
    two = embeddings_in(tmp_path, "safetensors", {"a": numbers(3, 24), "b": numbers(3, 24)})
    assert "holds 2 arrays of floating-point numbers (a, b, ...)" in message(two)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"logit_scale": "-1"}, "logit_scale '-1'; give a number > 0"),
        ({"logit_scale": "nan"}, "logit_scale 'nan'"),
        ({"classes": "ant, bee"}, "not readable as names of classes"),
        ({"classes": '["ant", "bee"]'}, "names 2 classes, classes.safetensors has 3 rows"),
    ],
)
def test_metadata_that_makes_no_sense_is_one_line(tmp_path, metadata, message):
    file = embeddings_in(tmp_path, "safetensors", numbers(3, 24), **metadata)
    assert message in failure(ZpipeError, class_embeddings=str(file))


def test_a_teacher_takes_one_head(file, tmp_path):
    with pytest.raises(UsageError, match="takes the place of --head"):
        spec(head=str(file), class_embeddings="e.npy")
    for option in ("head", "class_embeddings"):
        with pytest.raises(UsageError, match="URL is not supported"):
            spec(**{option: "s3://bucket/head"})
    assert spec(head="head.safetensors").resolved().head.startswith("/")
    assert "has no classification head; fit one with zpipe fit-head" in failure(ZpipeError)


# --------------------------------------------------------------------------------------- positions of another size


@pytest.fixture
def larger(tmp_path):
    """Weights for images of 48 pixels, in a file."""
    model = encoder(model_args=ARGS | {"img_size": 48}).model.model
    safetensors.torch.save_file(model.state_dict(), tmp_path / "weights.safetensors")
    return model, tmp_path / "weights.safetensors"


def test_positions_are_resized_where_that_is_allowed(larger):
    model, file = larger
    assert "--model-arg img_size=48), or --resize-positions" in failure(ZpipeError, weights=str(file), num_classes=None)
    loaded = encoder(weights=str(file), num_classes=None, resize_positions=True)
    table = model.pos_embed[:, 1:].transpose(1, 2).unflatten(2, (6, 6))
    expected = F.interpolate(table, (4, 4), mode="bicubic", antialias=False).flatten(2).transpose(1, 2)
    torch.testing.assert_close(loaded.model.model.pos_embed[:, 1:], expected)
    torch.testing.assert_close(loaded.model.model.pos_embed[:, :1], model.pos_embed[:, :1])
    for name, value in loaded.model.model.state_dict().items():
        assert name == "pos_embed" or torch.equal(value, model.state_dict()[name])


def test_positions_of_the_right_size_are_left_alone(larger):
    model, file = larger
    args = ARGS | {"img_size": 48}
    loaded = encoder(weights=str(file), num_classes=None, model_args=args, resize_positions=True)
    assert loaded.digest == state_digest(model.state_dict())


def test_resizing_is_for_weights_files(tmp_path):
    for weights in ("pretrained", "random", str(tmp_path)):
        with pytest.raises(UsageError, match="--resize-positions: is for a weights file"):
            spec(weights=weights, resize_positions=True)


# ------------------------------------------------------------------------------------------------------ extraction


def extract(shards, out, **changes):
    explain = changes.pop("explain", {"method": "gradient-attention"})
    settings = {"teacher": NAME, "weights": "random", "num_classes": 0, "teacher_args": ARGS, "executor": "local"}
    config = ExtractConfig(**(settings | {"threads": 1, "explain": ExplainConfig(**explain)} | changes))
    return extract_teacher_maps(shards, out, config)


def test_maps_explain_the_classes_of_a_fitted_head(shards, teacher, file, tmp_path):
    report = extract(shards, tmp_path / "maps", head=str(file))
    assert report.account.taken == 18 and report.top1 is not None
    maps = zpipe.open_maps(tmp_path / "maps")
    origin = maps.manifest.provenance
    loaded = load_teacher(spec(head=str(file)))
    assert (origin.teacher_digest, origin.num_classes, origin.head) == (loaded.digest, 3, str(file))
    assert maps.manifest.classes == NAMES and verify_store(tmp_path / "maps", shards) == []
    assert extract(shards, tmp_path / "maps", head=str(file)).extracted == 0
    # A copy elsewhere is the same head; another one is another teacher.
    moved = shutil.copy(file, tmp_path / "moved.safetensors")
    assert extract(shards, tmp_path / "maps", head=str(moved)).extracted == 0
    other = head_file(tmp_path / "other.safetensors", teacher, seed=9)
    with pytest.raises(ZpipeError, match="made with teacher_digest"):
        extract(shards, tmp_path / "maps", head=str(other))


def test_a_head_of_another_view_of_the_images_is_noted(shards, file, tmp_path):
    notes = {
        frame: extract(shards, tmp_path / frame, head=str(file), frame=frame).notes for frame in ("full", "center")
    }
    assert notes == {
        "full": (f"{file}: was fitted to --frame center, these maps are of --frame full",),
        "center": (),
    }


def test_maps_of_zero_shot_classes(shards, tmp_path):
    metadata = {"classes": json.dumps(NAMES), "logit_scale": "30"}
    file = embeddings_in(tmp_path, "safetensors", numbers(3, 24), **metadata)
    extract(shards, tmp_path / "maps", class_embeddings=str(file), explain={"method": "legrad"}, classes="by-name")
    manifest = read_manifest(tmp_path / "maps")
    assert manifest.classes == NAMES and manifest.provenance.class_embeddings == str(file)
    assert manifest.statuses == {"ok": 18}
    unnamed = embeddings_in(tmp_path, "npy", numbers(2, 24))
    with pytest.raises(ZpipeError) as error:
        extract(shards, tmp_path / "other", class_embeddings=str(unnamed))
    assert "label 2 is outside the teacher's 2 classes" in error.value.details[0]


def test_what_was_always_written_stays_as_it_was(store):
    """A store without a head has no field that earlier versions do not know."""
    text = (store / "manifest.json").read_text()
    assert not any(f'"{name}"' in text for name in ("head", "class_embeddings", "positions_resized"))


def test_the_command_line_takes_a_head(cli, shards, file, tmp_path):
    flags = ["--teacher", NAME, "--weights", "random", "--num-classes", "0", "--executor", "local", "--threads", "1"]
    flags += [part for name, value in ARGS.items() for part in ("--model-arg", f"{name}={value}")]
    flags += ["--head", file]
    done = cli("extract-teacher-maps", shards, "--out", tmp_path / "maps", *flags)
    assert done.code == 1 and "no relevance rules for a head" in done.error and "choose --method" in done.error
    done = cli("extract-teacher-maps", shards, "--out", tmp_path / "maps", *flags, "--method", "gradient-attention")
    assert done.code == 0
    assert f"head {file}" in " ".join(cli("maps", "info", tmp_path / "maps").stdout.split())
