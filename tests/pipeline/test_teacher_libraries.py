"""Teachers of torchvision and transformers: what is read, assumed and refused, each in one line."""

import json
import shutil

import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_teachers import OF_TORCHVISION, of_torchvision, of_transformers

from zpipe.pipeline import transformers_models
from zpipe.pipeline.teacher import TeacherSpec, load_teacher, state_digest
from zpipe.schemas.errors import UsageError, ZpipeError

pytestmark = pytest.mark.usefixtures("one_thread")
SIZE = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3}


def load(name, weights, **spec):
    return load_teacher(TeacherSpec(name=name, weights=str(weights), **spec))


def failure(kind, *args, **spec):
    with pytest.raises(kind) as error:
        load(*args, **spec)
    assert type(error.value) is kind and "\n" not in str(error.value)
    return str(error.value)


def images(side=32):
    return torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(1))


# ------------------------------------------------------------------------------------------------------- torchvision


def test_a_file_of_torchvision(tmp_path):
    model = of_torchvision()
    save_file({f"module.{name}": value for name, value in model.state_dict().items()}, tmp_path / "w.safetensors")
    loaded = load("torchvision:vit_b_16", tmp_path / "w.safetensors", model_args=OF_TORCHVISION)
    assert torch.equal(loaded.model(images()), model(images()))
    assert (loaded.name, loaded.num_classes, loaded.grid) == ("torchvision:vit_b_16", 5, (4, 4))
    assert (loaded.interpolation, loaded.crop_pct, loaded.mean[0]) == ("bilinear", 224 / 256, 0.485)
    assert loaded.digest == state_digest(model.state_dict()) and "crop_pct 0.875" in loaded.note
    swag = load("torchvision:vit_b_16.IMAGENET1K_SWAG_E2E_V1", tmp_path / "w.safetensors", model_args=OF_TORCHVISION)
    assert (swag.interpolation, swag.crop_pct) == ("bicubic", 1.0)
    message = failure(
        ZpipeError, "torchvision:vit_b_16", tmp_path / "w.safetensors", model_args=OF_TORCHVISION | {"image_size": 64}
    )
    assert "its images have 32 pixels: give model_args image_size=32" in message


def test_random_weights_of_torchvision_come_from_the_seed_alone():
    first, again, other = (
        load("torchvision:vit_b_16", "random", num_classes=3, seed=seed, model_args=OF_TORCHVISION)
        for seed in (1, 1, 2)
    )
    assert first.digest == again.digest != other.digest and first.num_classes == 3


def test_an_encoder_of_torchvision_takes_a_head(tmp_path):
    model = of_torchvision()
    state = {name: value for name, value in model.state_dict().items() if not name.startswith("heads.")}
    save_file(state, tmp_path / "w.safetensors")
    spec = {"name": "torchvision:vit_b_16", "weights": str(tmp_path / "w.safetensors"), "model_args": OF_TORCHVISION}
    loaded = load_teacher(TeacherSpec(**spec), needs_classes=False)
    assert loaded.num_classes == 0 and loaded.digest == state_digest(state)
    model.heads = torch.nn.Identity()
    assert torch.equal(loaded.model(images()), model(images()))
    embeddings = torch.randn(3, 24, generator=torch.Generator().manual_seed(2))
    save_file({"embeddings": embeddings}, tmp_path / "classes.safetensors")
    zero_shot = load_teacher(TeacherSpec(**spec, class_embeddings=str(tmp_path / "classes.safetensors")))
    expected = 100 * torch.nn.functional.cosine_similarity(model(images())[:, None], embeddings[None], dim=2)
    torch.testing.assert_close(zero_shot.model(images()), expected)
    assert "has no classification head" in failure(ZpipeError, *list(spec.values())[:2], model_args=OF_TORCHVISION)


def test_torchvision_has_no_such_model(tmp_path, monkeypatch):
    assert "choose one of vit_b_16, vit_b_32" in failure(UsageError, "torchvision:resnet50", "random")
    assert "choose IMAGENET1K_V1 or" in failure(UsageError, "torchvision:vit_b_16.V9", "pretrained")
    assert "for 224 pixels and 1000 classes" in failure(
        UsageError, "torchvision:vit_b_16", "pretrained", model_args={"image_size": 384}
    )
    assert "nonsense" in failure(UsageError, "torchvision:vit_b_16", "random", model_args={"nonsense": 1})
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "urlopen", lambda *_: (_ for _ in ()).throw(OSError("no network")))
    assert "could not be loaded (OSError: no network); fetch" in failure(
        ZpipeError, "torchvision:vit_b_16", "pretrained"
    )
    assert "has one head; leave it out" in failure(UsageError, "torchvision:vit_b_16", "random", own_head="class")


# ------------------------------------------------------------------------------------------------------ transformers

PREPARED = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6], "resample": 2, "size": 40, "crop_size": 32}


@pytest.fixture
def folder(tmp_path):
    """A ViT of transformers that names its classes and how its images are prepared."""
    model = of_transformers("ViTForImageClassification")
    model.config.id2label = dict(enumerate("abcde"))
    model.save_pretrained(tmp_path / "vit")
    (tmp_path / "vit" / "preprocessor_config.json").write_text(json.dumps(PREPARED))
    return tmp_path / "vit"


def change(folder, name="config.json", **fields):
    raw = json.loads((folder / name).read_text()) | fields
    (folder / name).write_text(json.dumps(raw))


def change_state(folder, **tensors):
    state = load_file(folder / "model.safetensors") | tensors
    save_file({name: value for name, value in state.items() if value is not None}, folder / "model.safetensors")


def test_a_folder_of_transformers_says_all(folder):
    loaded = load(None, folder)
    assert (loaded.name, loaded.classes) == ("transformers:ViTForImageClassification", tuple("abcde"))
    assert (loaded.mean, loaded.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    assert (loaded.interpolation, loaded.crop_pct, loaded.note) == ("bilinear", 0.8, "")
    model = of_transformers("ViTForImageClassification")
    assert torch.equal(loaded.model(images()), model(images()).logits)
    assert loaded.digest == state_digest(model.state_dict())
    for name, weights in ((loaded.name, folder), (None, folder / "model.safetensors"), ("transformers:me/vit", folder)):
        assert load(name, weights, num_classes=5).digest == loaded.digest
    spec = TeacherSpec(name="transformers:me/vit", weights=str(folder), mean=(0.5, 0.5, 0.5))
    assert load_teacher(spec.resolved()).mean == (0.5, 0.5, 0.5)


def test_a_folder_of_transformers_that_does_not_say_how_images_are_prepared(folder):
    (folder / "preprocessor_config.json").unlink()
    loaded = load(None, folder)
    assert (loaded.mean, loaded.interpolation, loaded.crop_pct) == ((0.5, 0.5, 0.5), "bilinear", 1.0)
    assert f"{folder} does not say all: mean [0.5, 0.5, 0.5]" in loaded.note and "--mean" in loaded.note
    nested = {"image_processor": PREPARED | {"size": {"shortest_edge": 40}, "crop_size": {"height": 32, "width": 32}}}
    (folder / "processor_config.json").write_text(json.dumps(nested))
    assert load(None, folder).crop_pct == 0.8 and load(None, folder).note == ""
    for odd in ({"rescale_factor": 1.0}, {"image_mean": "x"}, {"resample": 9}, {"size": {"height": 3}}):
        (folder / "processor_config.json").write_text(json.dumps(PREPARED | odd))
        assert "does not say how images are prepared" in failure(ZpipeError, None, folder)
    (folder / "processor_config.json").write_text(json.dumps(PREPARED | {"resample": 0}))
    assert "resizes images by 'nearest'" in failure(ZpipeError, None, folder)
    (folder / "processor_config.json").write_text(json.dumps(PREPARED | {"do_normalize": False}))
    assert load(None, folder).std == (1.0, 1.0, 1.0)


def test_weights_of_transformers_in_any_of_its_files(folder):
    digest, state = load(None, folder).digest, load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    assert "holds no model.safetensors" in failure(ZpipeError, None, folder)
    torch.save(state, folder / "pytorch_model.bin")
    assert load(None, folder).digest == digest
    halves = {"a.safetensors": sorted(state)[:9], "b.safetensors": sorted(state)[9:]}
    for name, keys in halves.items():
        save_file({key: state[key] for key in keys}, folder / name)
    index = {"weight_map": {key: name for name, keys in halves.items() for key in keys}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert load(None, folder).digest == digest
    for odd in ({}, {"weight_map": {"x": 3}}, {"weight_map": {"x": "../a.safetensors"}}):
        (folder / "model.safetensors.index.json").write_text(json.dumps(odd))
        assert "model.safetensors.index.json: " in failure(ZpipeError, None, folder)


def test_weights_that_do_not_fit_a_model_of_transformers(folder):
    weight = torch.zeros(1)
    for changes, said in (
        ({"classifier.bias": None}, "has no classifier.bias"),
        ({"extra.weight": weight}, "has the unknown extra.weight"),
        ({"vit.pooler.dense.weight": weight}, ""),
        ({"classifier.bias": torch.zeros(6)}, "ViTForImageClassification, it has another shape of classifier.bias"),
        ({"classifier.bias": torch.full((5,), torch.nan)}, "classifier.bias holds NaN"),
    ):
        whole = (folder / "model.safetensors").read_bytes()
        change_state(folder, **changes)
        assert load(None, folder) if not said else said in failure(ZpipeError, None, folder)
        (folder / "model.safetensors").write_bytes(whole)
    (folder / "model.safetensors").write_bytes(whole[:-100])
    assert "cannot be read as weights" in failure(ZpipeError, None, folder)


def test_a_description_of_transformers_is_not_trusted(folder, tmp_path):
    whole = (folder / "config.json").read_text()
    for fields, said in (
        ({"architectures": ["BertModel"]}, "architectures names BertModel"),
        ({"architectures": [], "model_type": "vit"}, "names no model"),
        ({"architectures": "ViTModel"}, "names no model"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is not within"),
        ({"hidden_size": 6000}, "describes a larger model"),
        ({"image_size": "x"}, "is no configuration of a ViTForImageClassification"),
        ({"hidden_act": "nonsense"}, "does not fit"),
    ):
        change(folder, **fields)
        assert said in failure(ZpipeError, None, folder)
        (folder / "config.json").write_text(whole)
    (folder / "ours.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Ours: pass\n")
    change(folder, auto_map={"AutoModelForImageClassification": "ours.Ours", "AutoConfig": "ours.Ours"})
    assert load(None, folder) and not (tmp_path / "ran").exists()
    (folder / "config.json").write_text(whole)
    change(folder, quantization_config={"quant_method": "mxfp4"})
    assert "quantised weights are not known" in failure(ZpipeError, None, folder)
    (folder / "config.json").write_text("{")
    assert "config.json" in failure(ZpipeError, None, folder)
    assert "holds no model.safetensors" in failure(ZpipeError, None, tmp_path)


KERNEL_FIELDS = ("attn_implementation", "_attn_implementation", "_attn_implementation_internal")


@pytest.fixture
def loads_of_kernels(monkeypatch):
    """What the library was asked to load kernels of."""
    from transformers import modeling_utils

    asked = []
    monkeypatch.setattr(modeling_utils, "lazy_import_flash_attention", lambda name, **_: asked.append(name))
    monkeypatch.setattr(modeling_utils, "is_kernel", lambda name: bool(name and "/" in name) and not asked.append(name))
    return asked


@pytest.mark.parametrize("name", ["ViTForImageClassification", "CLIPForImageClassification"])
@pytest.mark.parametrize("kernel", ["owner/kernel", "flash_attention_2", {"": "owner/kernel"}])
def test_a_description_chooses_no_kernel(name, kernel, tmp_path, loads_of_kernels):
    of_transformers(name).save_pretrained(tmp_path)
    plain = load(None, tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    for field in (*KERNEL_FIELDS, "experts_implementation", "_experts_implementation"):
        change(tmp_path, **{field: kernel})
        if "vision_config" in raw:
            change(tmp_path, vision_config=raw["vision_config"] | {field: kernel})
        loaded = load(None, tmp_path)
        assert loaded.model.model.config._attn_implementation == "sdpa"
        assert torch.equal(loaded.model(images()), plain.model(images()))
        (tmp_path / "config.json").write_text(json.dumps(raw))
    assert loads_of_kernels == []


def test_a_request_chooses_no_kernel(loads_of_kernels):
    for fields in ({"_attn_implementation": "owner/kernel"}, {"vision_config": {"experts_implementation": "o/k"}}):
        message = failure(UsageError, "transformers:ViTModel", "random", model_args=fields)
        assert "are not chosen here; leave them out" in message
    assert loads_of_kernels == []


def test_a_request_that_contradicts_a_folder_of_transformers(folder):
    assert "describes a ViTForImageClassification, not ViTModel" in failure(UsageError, "transformers:ViTModel", folder)
    assert "num_classes is 5, not 6" in failure(UsageError, None, folder, num_classes=6)
    assert "leave the name out" in failure(UsageError, "vit_tiny_patch16_224", folder)
    assert "leave depth out" in failure(UsageError, None, folder, model_args={"depth": 3})
    assert "leave image_size out" in failure(UsageError, None, folder, model_args={"image_size": 64})
    assert load(None, folder, model_args={"image_size": 32}).model_args == {}
    assert "no such weights" in failure(UsageError, "transformers:me/vit", folder / "none")
    assert "--resize-positions" in failure(UsageError, None, folder / "model.safetensors", resize_positions=True)
    assert "no two heads; leave it out" in failure(UsageError, None, folder, own_head="class")


def test_random_weights_of_transformers():
    fields = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 3}
    name = "transformers:BeitForImageClassification"
    first, again = (load(name, "random", num_classes=3, model_args=fields) for _ in range(2))
    assert first.digest == again.digest and first.num_classes == 3 and first.classes == () and first.note == ""
    assert "one of ViTForImageClassification" in failure(UsageError, "transformers:google/vit", "random")
    assert "cannot be built with" in failure(UsageError, name, "random", model_args={"hidden_size": "x"})


def test_a_dinov2_sees_images_of_the_size_that_its_folder_prepares(tmp_path):
    folder = tmp_path / "dino"
    of_transformers("Dinov2ForImageClassification", image_size=64).save_pretrained(folder)
    assert load(None, folder).image_size == (64, 64)
    (folder / "preprocessor_config.json").write_text(json.dumps(PREPARED))
    loaded = load(None, folder)
    assert loaded.grid == (4, 4) and loaded.model_args == {"image_size": [32, 32]}
    assert "interpolates its positions, of [64, 64] pixels, to [32, 32]" in loaded.note
    model = of_transformers("Dinov2ForImageClassification", image_size=64)
    assert torch.equal(loaded.model(images()), model(images()).logits)
    other = load(None, folder, model_args={"image_size": [16, 48]})
    assert other.grid == (2, 6) and other.digest == loaded.digest
    for odd in (33, -8, "x", [8, 8, 8], 1.5):
        assert "image_size" in failure(UsageError, None, folder, model_args={"image_size": odd})


def test_the_part_for_images_of_a_model_of_images_and_texts(tmp_path):
    import transformers

    texts = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 3, "vocab_size": 50, "eos_token_id": 1}
    size = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "image_size": 32, "patch_size": 8}
    for name in transformers_models.VISION_PARTS:
        model_class = getattr(transformers, name)
        config = model_class.config_class(vision_config=size, text_config=texts | {"bos_token_id": 0})
        model = model_class(config).eval()
        model.save_pretrained(tmp_path / name)
        with torch.no_grad():
            expected = model.get_image_features(images()).pooler_output
        spec = TeacherSpec(weights=str(tmp_path / name))
        classifier = load_teacher(spec, needs_classes=False).model
        assert torch.equal(classifier(images()), expected) and classifier.num_classes == 0


@pytest.mark.parametrize("inner", [None, 12])
def test_the_projection_is_that_of_the_whole_model(inner, tmp_path):
    import transformers

    texts = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 3, "vocab_size": 50, "eos_token_id": 1}
    size = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "image_size": 32, "patch_size": 8}
    for width in (20, 512):  # the default, which the library leaves out of the file
        config = transformers.CLIPConfig(
            vision_config=size | ({} if inner is None else {"projection_dim": inner}),
            text_config=texts | {"bos_token_id": 0},
            projection_dim=width,
        )
        transformers.CLIPModel(config).save_pretrained(tmp_path / str(width))
        loaded = load_teacher(TeacherSpec(weights=str(tmp_path / str(width))), needs_classes=False)
        assert loaded.model(images()).shape == (2, width)


def test_the_hub_and_its_cache(folder, tmp_path, monkeypatch):
    name = "transformers:me/vit"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    assert "cannot be fetched" in failure(ZpipeError, name, "pretrained")
    cached = tmp_path / "cache" / "models--me--vit"
    shutil.copytree(folder, cached / "snapshots" / ("0" * 40))
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("0" * 40)
    loaded = load(name, "pretrained")
    assert (loaded.name, loaded.weights, loaded.classes) == (name, "pretrained", tuple("abcde"))
    assert loaded.digest == load(None, folder).digest


def test_without_the_library(folder, monkeypatch):
    monkeypatch.setattr(transformers_models, "is_installed", lambda: False)
    assert "pip install 'zpipe[transformers]'" in failure(ZpipeError, None, folder)
