"""Teachers from every form of weights: the same weights are the same teacher, and a wrong request is one line."""

import dataclasses
import json
import os

import huggingface_hub.constants
import numpy as np
import pytest
import timm
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from timm.models import save_for_hf

from zpipe.pipeline.explainer import check_method
from zpipe.pipeline.relevance import transformer_attribution
from zpipe.pipeline.teacher import TeacherSpec, load_teacher, state_digest
from zpipe.schemas.errors import UsageError, ZpipeError

NAME = "deit_tiny_patch16_224"
ARGS = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3}


def load(name, weights, *, device="cpu", **spec):
    return load_teacher(TeacherSpec(name=name, weights=weights, **spec), device=device)


@pytest.fixture(scope="module")
def teacher():
    return load(NAME, "random", num_classes=7, seed=3, model_args=ARGS)


@pytest.fixture
def folder(teacher, tmp_path):
    save_for_hf(teacher.model.model, tmp_path / "run", safe_serialization=True)
    return tmp_path / "run"


def state_of(teacher):
    return {name: value.clone() for name, value in teacher.model.model.state_dict().items()}


def assert_same(loaded, teacher):
    assert loaded.digest == teacher.digest
    assert (loaded.num_classes, loaded.image_size, loaded.grid) == (7, (32, 32), (4, 4))
    images = torch.linspace(-1, 1, 3 * 32 * 32).reshape(1, 3, 32, 32)
    assert torch.equal(loaded.model(images), teacher.model(images))


def failure(kind, *args, **kwargs):
    with pytest.raises(kind) as error:
        load(*args, **kwargs)
    assert type(error.value) is kind and "\n" not in str(error.value)
    return str(error.value)


# ------------------------------------------------------------------------------------------------- what is loaded


def test_a_teacher_is_frozen_and_ready(teacher):
    assert not teacher.model.training and not any(p.requires_grad for p in teacher.model.parameters())
    assert (teacher.name, teacher.weights, teacher.model_args) == (NAME, "random", ARGS)
    assert teacher.mean == (0.485, 0.456, 0.406) and teacher.std == (0.229, 0.224, 0.225)
    assert teacher.interpolation == "bicubic"
    assert transformer_attribution(teacher.model.model, torch.rand(2, 3, 32, 32), torch.tensor([0, 6])).shape == (
        2,
        4,
        4,
    )
    with pytest.raises(dataclasses.FrozenInstanceError):
        teacher.name = "other"


def test_preprocessing_is_the_architectures_own():
    teacher = load("vit_tiny_patch16_224", "random", num_classes=2, model_args=ARGS)
    assert teacher.mean == teacher.std == (0.5, 0.5, 0.5)


def test_the_default_is_deit_base():
    assert load(None, "random", num_classes=2, model_args=ARGS).name == "deit_base_patch16_224"


def test_random_weights_come_from_the_seed_alone(teacher):
    torch.manual_seed(11)
    before = torch.get_rng_state()
    again = load(NAME, "random", num_classes=7, seed=3, model_args=ARGS)
    assert torch.equal(torch.get_rng_state(), before)
    assert again.digest == teacher.digest
    assert load(NAME, "random", num_classes=7, seed=4, model_args=ARGS).digest != teacher.digest


@pytest.mark.parametrize("wrap", [None, "model", "state_dict", "state_dict_ema"])
@pytest.mark.parametrize("suffix", [".pth", ".pt", ".bin", ".pth.tar"])
def test_a_torch_file(teacher, tmp_path, suffix, wrap):
    file = tmp_path / f"weights{suffix}"
    state = state_of(teacher)
    torch.save(state if wrap is None else {wrap: state, "epoch": 3}, file)
    loaded = load(NAME, str(file), model_args=ARGS)
    assert_same(loaded, teacher)
    assert loaded.weights == str(file)


def test_a_safetensors_file(teacher, tmp_path):
    save_file(state_of(teacher), tmp_path / "weights.safetensors")
    assert_same(load(NAME, str(tmp_path / "weights.safetensors"), num_classes=7, model_args=ARGS), teacher)


def test_the_exponential_average_is_preferred(teacher, tmp_path):
    raw = {name: value + 1 for name, value in state_of(teacher).items()}
    torch.save({"model": raw, "state_dict_ema": state_of(teacher)}, tmp_path / "weights.pth")
    assert_same(load(NAME, str(tmp_path / "weights.pth"), model_args=ARGS), teacher)


def test_a_folder_brings_its_architecture(teacher, folder):
    loaded = load(None, str(folder))
    assert_same(loaded, teacher)
    assert loaded.name == NAME and loaded.model_args["embed_dim"] == 24
    assert_same(load(NAME, str(folder), num_classes=7, model_args={"img_size": 32, "depth": 2}), teacher)


def test_a_folder_brings_its_preprocessing(folder):
    config = json.loads((folder / "config.json").read_text())
    config["pretrained_cfg"] |= {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "interpolation": "bilinear"}
    (folder / "config.json").write_text(json.dumps(config))
    loaded = load(None, str(folder))
    assert (loaded.mean, loaded.std, loaded.interpolation) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6), "bilinear")


def test_a_teacher_can_be_rebuilt_from_what_it_says_of_itself(folder, tmp_path):
    loaded = load(None, str(folder))
    said = json.loads(json.dumps({"model_args": loaded.model_args, "num_classes": loaded.num_classes}))
    again = load(loaded.name, str(folder / "model.safetensors"), **said)
    assert again.digest == loaded.digest and again.model_args == loaded.model_args


def test_pretrained_weights_are_timms(teacher, tmp_path, monkeypatch):
    save_file(state_of(teacher), tmp_path / "weights.safetensors")
    config = {"file": str(tmp_path / "weights.safetensors"), "num_classes": 7, "input_size": (3, 32, 32)}
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda *a, **k: create(*a, pretrained_cfg_overlay=config, **k))
    loaded = load(NAME, "pretrained", model_args=ARGS)
    assert loaded.digest == teacher.digest and loaded.weights == "pretrained"


# ------------------------------------------------------------------------------------------- beside the weights


PREPARED = {"mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6), "interpolation": "bilinear", "crop_pct": 0.75}


def prepared(teacher):
    return {name: getattr(teacher, name) for name in PREPARED}


@pytest.fixture
def run(teacher, tmp_path):
    """A training run: finished weights, those of the best epoch, and those of epoch 7, with their description."""
    folder = tmp_path / "run"
    names = {"label_names": list("abcdefg")}
    save_for_hf(teacher.model.model, folder, safe_serialization=True, data_config=PREPARED, model_config=names)
    (folder / "epochs").mkdir()
    for number, name in enumerate(("best.safetensors", "epochs/00007.safetensors", "other.pth"), start=1):
        state = state_of(teacher) | {"head.bias": torch.full((7,), float(number))}
        if name.endswith(".pth"):
            torch.save({"model": state}, folder / name)
        else:
            save_file(state, folder / name)
    return folder


@pytest.mark.parametrize(
    ("weights", "bias"),
    [
        ("", 0.0),
        (":final", 0.0),
        ("/model.safetensors", 0.0),
        (":best", 1.0),
        ("/best.safetensors", 1.0),
        (":7", 2.0),
        ("/epochs/00007.safetensors", 2.0),
        ("/other.pth", 3.0),
    ],
)
@pytest.mark.parametrize("name", [None, NAME])
def test_what_a_model_needs_is_read_from_beside_its_weights(run, name, weights, bias):
    spec = TeacherSpec(name=name, weights=f"{run}{weights}")
    loaded = load_teacher(spec)
    assert prepared(loaded) == PREPARED and loaded.classes == tuple("abcdefg") and loaded.note == ""
    assert bias == 0 or loaded.model.model.head.bias[0] == bias
    assert load_teacher(spec.resolved()).digest == loaded.digest
    assert (loaded.name, loaded.model_args["embed_dim"]) == (NAME, 24)


def test_a_run_names_its_classes_in_its_settings(run):
    config = json.loads((run / "config.json").read_text())
    del config["label_names"]
    (run / "config.json").write_text(json.dumps(config))
    assert load(None, str(run)).classes == ()
    record = {"format": "zpipe-run", "version": 1, "kind": "vit", "settings": {"classes": list("ABCDEFG")}}
    (run / "run.json").write_text(json.dumps(record))
    assert load(None, f"{run}:best").classes == tuple("ABCDEFG")
    (run / "run.json").write_text(json.dumps(record | {"settings": {"classes": list("ABCDEFGH")}}))
    assert "names 8 classes, the model has 7" in failure(ZpipeError, None, str(run))


def test_what_nothing_describes_is_assumed_and_told(teacher, run, tmp_path):
    save_file(state_of(teacher), tmp_path / "w.safetensors")
    loaded = load("vit_tiny_patch16_224", str(tmp_path / "w.safetensors"), model_args=ARGS)
    assert loaded.mean == (0.5, 0.5, 0.5)
    assert "no config.json is beside it: mean [0.5, 0.5, 0.5], std" in loaded.note and "--mean" in loaded.note
    told = load("vit_tiny_patch16_224", str(tmp_path / "w.safetensors"), model_args=ARGS, **PREPARED)
    assert prepared(told) == PREPARED and told.note == ""
    half = load("vit_tiny_patch16_224", str(tmp_path / "w.safetensors"), model_args=ARGS, mean=(0.1, 0.2, 0.3))
    assert half.mean == (0.1, 0.2, 0.3) and "std" in half.note and "mean [" not in half.note
    # The description of another file.
    other = load("vit_tiny_patch16_224", str(run / "other.pth"), model_args=ARGS)
    assert "describes another model (architecture is deit_tiny" in other.note and other.classes == ()
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "vit"}))  # of the transformers library
    assert "config.json is not timm's" in load(NAME, str(tmp_path / "w.safetensors"), model_args=ARGS).note
    assert load(NAME, "random", model_args=ARGS).note == ""


def test_options_take_precedence_over_the_description(run):
    assert prepared(load(None, str(run), mean=(0.3, 0.2, 0.1), crop_pct=0.5)) == PREPARED | {
        "mean": (0.3, 0.2, 0.1),
        "crop_pct": 0.5,
    }


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ({"mean": (0.1, 0.2)}, "--mean (0.1, 0.2): Expected array of length 3"),
        ({"mean": (0.1, 0.2, float("nan"))}, "--mean"),
        ({"mean": (123.7, 116.3, 103.5)}, "--mean (123.7, 116.3, 103.5): Expected float <= 10"),
        ({"std": (0.1, 0.0, 0.1)}, "--std (0.1, 0.0, 0.1): Expected float >= 0.0001"),
        ({"crop_pct": 0}, "--crop-pct 0"),
        ({"interpolation": "nearest"}, "--interpolation nearest"),
    ],
)
def test_wrong_options(option, said):
    with pytest.raises(UsageError) as error:
        TeacherSpec(name=NAME, **option)
    assert said in str(error.value)


def test_a_filter_that_images_are_not_resized_by(run):
    config = json.loads((run / "config.json").read_text())
    config["pretrained_cfg"]["interpolation"] = "random"
    (run / "config.json").write_text(json.dumps(config))
    assert "--interpolation" in failure(ZpipeError, None, str(run))
    assert load(None, str(run), interpolation="lanczos").interpolation == "lanczos"


def test_words_for_the_weights_of_a_run(run):
    assert "give" in failure(UsageError, None, f"{run}:last") and ":best" in failure(UsageError, None, f"{run}:last")
    assert "has no such weights" in failure(UsageError, None, f"{run}:8")
    (run / "config.json").unlink()
    (run / "run.json").write_text("{}")
    assert "not finished" in failure(ZpipeError, None, f"{run}:7")


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "model.", "backbone.", "encoder.", "model._orig_mod."])
def test_prefixes_that_all_names_carry(teacher, tmp_path, prefix):
    named = {prefix + name: value for name, value in state_of(teacher).items()}
    torch.save({"state_dict": named, "best": np.float64(0.5)}, tmp_path / "last.ckpt")
    assert_same(load(NAME, str(tmp_path / "last.ckpt"), model_args=ARGS), teacher)
    torch.save(named | {"loss.weight": torch.ones(1)}, tmp_path / "last.ckpt")
    if prefix.count(".") == 1:
        assert f"names begin with '{prefix}'" in failure(ZpipeError, NAME, str(tmp_path / "last.ckpt"), model_args=ARGS)


def test_another_image_size_names_the_remedy(teacher, tmp_path):
    save_file(state_of(teacher), tmp_path / "w.safetensors")
    message = failure(ZpipeError, NAME, str(tmp_path / "w.safetensors"), model_args=ARGS | {"img_size": 64})
    assert "its images have 32 pixels: give model_args img_size=32" in message


def test_a_description_of_any_size_takes_no_memory(run):
    config = json.loads((run / "config.json").read_text())
    config["model_args"] |= {"embed_dim": 60_000, "depth": 100, "img_size": 8192}
    (run / "config.json").write_text(json.dumps(config))  # 17 TB of weights
    assert "describes other weights" in failure(ZpipeError, None, str(run))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
PLACES = [("architecture",), ("num_classes",), ("label_names",), ("model_args",), ("pretrained_cfg",)]
PLACES += [("model_args", name) for name in (*ARGS, "drop_rate", "qk_norm", "act_layer", "global_pool", "pretrained")]
PLACES += [("pretrained_cfg", name) for name in (*PREPARED, "input_size", "num_classes", "label_names", "url")]


@given(place=st.sampled_from(PLACES), value=JSON)
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_json_in_a_description_is_one_line_or_the_right_teacher(teacher, run, place, value):
    whole = (run / "config.json").read_text()
    config = json.loads(whole)
    (config if len(place) == 1 else config[place[0]])[place[-1]] = value
    try:
        (run / "config.json").write_text(json.dumps(config))
        loaded = load(None, str(run))
    except ZpipeError as error:
        assert "\n" not in str(error) and len(str(error)) < 1000
    else:
        assert loaded.digest == teacher.digest and all(0 < each <= 10 for each in loaded.std)
    finally:
        (run / "config.json").write_text(whole)


# --------------------------------------------------------------------------------------------------------- digest


def test_the_digest_ignores_order_and_layout_and_nothing_else():
    a, b = torch.arange(6.0).reshape(2, 3), torch.tensor(2)
    digest = state_digest({"a": a, "b": b})
    assert digest == state_digest({"b": b, "a": a.T.contiguous().T}) and len(digest) == 64
    others = [
        {"a": a + 1e-6, "b": b},
        {"a": a.reshape(3, 2), "b": b},
        {"a": a.to(torch.float64), "b": b},
        {"A": a, "b": b},
        {"a": a},
        {"a": a.bfloat16(), "b": b},
    ]
    assert len({digest, *map(state_digest, others)}) == 7


# --------------------------------------------------------------------------------------------------------- errors


def test_the_hub_out_of_reach(monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    message = failure(ZpipeError, NAME, "pretrained", model_args=ARGS)
    assert NAME in message and "local file" in message


def test_pretrained_weights_do_not_grow_another_head():
    assert "1000 classes, not 10" in failure(UsageError, NAME, "pretrained", num_classes=10)


def test_a_name_without_pretrained_weights():
    assert "no pretrained weights" in failure(UsageError, "vit_base_patch16_18x2_224", "pretrained")


def test_names_that_are_no_model():
    assert "did you mean deit_base_patch16_224?" in failure(UsageError, "deit_bse_patch16_224", "random")
    assert "no such model" in failure(UsageError, "hf-hub:some/model", "random")


def test_a_model_of_no_family():
    assert "ResNet" in failure(ZpipeError, "resnet18", "random")


def test_a_method_that_the_teacher_has_not():
    check_method(load(NAME, "random", model_args=ARGS), "transformer-attribution")
    for name, more, part in (
        ("deit_tiny_distilled_patch16_224", {}, "VisionTransformerDistilled"),
        (NAME, {"qk_norm": True}, "qk_norm"),
    ):
        teacher = load(name, "random", model_args=ARGS | more)
        with pytest.raises(ZpipeError, match=f"{part}.*; choose --method gradient-attention, legrad"):
            check_method(teacher, "transformer-attribution")
        check_method(teacher, "gradient-attention")


def test_wrong_arguments():
    assert "nonsense" in failure(UsageError, NAME, "random", model_args={"nonsense": 1})
    assert "JSON" in failure(UsageError, NAME, "random", model_args={"act_layer": torch.nn.ReLU})
    assert "num_classes" in failure(UsageError, NAME, "random", model_args={"num_classes": 3})
    assert "device nonsense" in failure(UsageError, NAME, "random", model_args=ARGS, device="nonsense")


def test_weights_that_are_not_there(tmp_path):
    assert "pretrianed" in failure(UsageError, NAME, "pretrianed")
    assert "no such weights" in failure(UsageError, NAME, str(tmp_path / "none.pth"))
    assert "copy the files" in failure(UsageError, NAME, "s3://bucket/weights.pth")
    assert "hunter2" not in failure(UsageError, NAME, "https://user:hunter2@host/weights.pth")
    (tmp_path / "weights.onnx").write_bytes(b"x")
    assert ".safetensors" in failure(ZpipeError, NAME, str(tmp_path / "weights.onnx"))
    os.mkfifo(tmp_path / "fifo.pth")
    assert "is a FIFO" in failure(ZpipeError, NAME, str(tmp_path / "fifo.pth"))


class Pickled:
    pass


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_a_damaged_file(teacher, tmp_path, suffix):
    file = tmp_path / f"weights{suffix}"
    if suffix == ".pth":
        torch.save(state_of(teacher), file)
    else:
        save_file(state_of(teacher), file)
    whole = file.read_bytes()
    for content in (whole[: len(whole) // 2], b"", b"not weights at all" * 50, b"\x80\x02."):
        file.write_bytes(content)
        message = failure(ZpipeError, NAME, str(file), model_args=ARGS)
        assert message.startswith(f"{file}: cannot be read as weights (")


def test_a_file_that_is_no_state_dict(teacher, tmp_path):
    file = tmp_path / "weights.pth"
    for content in ({"epoch": 3}, [1, 2], {}, {"model": Pickled()}, torch.zeros(3)):
        torch.save(content, file)
        assert str(file) in failure(ZpipeError, NAME, str(file), model_args=ARGS)


def test_weights_of_another_model(teacher, tmp_path):
    file = tmp_path / "weights.safetensors"
    state = state_of(teacher)
    save_file({name: value for name, value in state.items() if name != "norm.bias"}, file)
    assert "has no norm.bias;" in failure(ZpipeError, NAME, str(file), model_args=ARGS)
    save_file(state | {"extra.a": torch.zeros(1), "extra.b": torch.zeros(1)}, file)
    assert "unknown extra.a and 1 more" in failure(ZpipeError, NAME, str(file), model_args=ARGS)
    save_file(state, file)
    message = failure(ZpipeError, NAME, str(file), model_args=ARGS | {"img_size": 64})
    assert "pos_embed is [1, 17, 24] in the file and [1, 65, 24] in the model" in message
    assert "7 classes, not 8" in failure(UsageError, NAME, str(file), num_classes=8, model_args=ARGS)
    save_file(state | {"norm.bias": torch.full((24,), torch.nan)}, file)
    assert "norm.bias holds NaN" in failure(ZpipeError, NAME, str(file), model_args=ARGS)


def test_a_request_that_contradicts_the_folder(folder):
    assert "not deit_base_patch16_224" in failure(UsageError, "deit_base_patch16_224", str(folder))
    assert "num_classes is 7, not 8" in failure(UsageError, None, str(folder), num_classes=8)
    assert "depth=2, not 3" in failure(UsageError, None, str(folder), model_args={"depth": 3})
    assert "reg_tokens" in failure(UsageError, None, str(folder), model_args={"reg_tokens": 1})


def test_a_folder_that_is_not_whole(folder):
    weights, config = folder / "model.safetensors", folder / "config.json"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-100])
    assert "model.safetensors" in failure(ZpipeError, None, str(folder))
    weights.unlink()
    assert "holds no model.safetensors" in failure(ZpipeError, None, str(folder))
    weights.write_bytes(whole)
    for text in ("{", "[]", "{}", '{"architecture": "no_such_model"}', '{"architecture": 3}'):
        config.write_text(text)
        assert "config.json" in failure(ZpipeError, None, str(folder))
    config.unlink()
    assert "holds no config.json" in failure(ZpipeError, None, str(folder))


@pytest.mark.parametrize(
    ("name", "arguments", "reason"),
    [
        (NAME, ARGS | {"depth": 0}, "without blocks"),
        ("torchvision:vit_b_16", {"image_size": 32, "patch_size": 8, "num_layers": 0}, "without blocks"),
        ("transformers:ViTForImageClassification", {"num_hidden_layers": 0}, "without blocks"),
        (NAME, ARGS | {"img_size": 36, "dynamic_img_pad": True}, "dynamic_img_pad=True"),
    ],
)
def test_a_model_that_is_no_vit_in_the_end(name, arguments, reason):
    assert reason in failure(ZpipeError, name, "random", model_args=arguments)
