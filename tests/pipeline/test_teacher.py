"""Teachers from every form of weights: the same weights are the same teacher, and a wrong request is one line."""

import dataclasses
import json

import huggingface_hub.constants
import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models import save_for_hf

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
    save_for_hf(teacher.model, tmp_path / "run", safe_serialization=True)
    return tmp_path / "run"


def state_of(teacher):
    return {name: value.clone() for name, value in teacher.model.state_dict().items()}


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
    assert transformer_attribution(teacher.model, torch.rand(2, 3, 32, 32), torch.tensor([0, 6])).shape == (2, 4, 4)
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


def test_models_without_rules():
    assert "ResNet" in failure(ZpipeError, "resnet18", "random")
    assert "VisionTransformerDistilled" in failure(
        ZpipeError, "deit_tiny_distilled_patch16_224", "random", model_args=ARGS
    )
    assert "qk_norm" in failure(ZpipeError, NAME, "random", model_args=ARGS | {"qk_norm": True})


def test_wrong_arguments():
    assert "nonsense" in failure(UsageError, NAME, "random", model_args={"nonsense": 1})
    assert "JSON" in failure(UsageError, NAME, "random", model_args={"act_layer": torch.nn.ReLU})
    assert "num_classes" in failure(UsageError, NAME, "random", model_args={"num_classes": 3})
    assert "device nonsense" in failure(UsageError, NAME, "random", model_args=ARGS, device="nonsense")


def test_weights_that_are_not_there(tmp_path):
    assert "pretrianed" in failure(UsageError, NAME, "pretrianed")
    assert "no such weights" in failure(UsageError, NAME, str(tmp_path / "none.pth"))
    (tmp_path / "weights.onnx").write_bytes(b"x")
    assert ".safetensors" in failure(UsageError, NAME, str(tmp_path / "weights.onnx"))


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
        assert str(file) in message and "damaged" in message


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
