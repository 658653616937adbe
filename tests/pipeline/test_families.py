"""A teacher of every family: maps through the whole extraction, resumed, verified, and joined with images."""

import json

import pytest
import torch
from safetensors.torch import save_file
from tiny_families import FAMILIES, tiny_family

import zpipe.pipeline.families as families
from zpipe.pipeline import transformers_models
from zpipe.pipeline.classifier import as_classifier
from zpipe.pipeline.explainer import ExplainConfig
from zpipe.pipeline.extract import ExtractConfig, extract_teacher_maps
from zpipe.pipeline.methods import DEFAULT_METHOD, METHODS, methods_of
from zpipe.pipeline.teacher import TeacherSpec, load_teacher
from zpipe.pipeline.torchvision_models import VisionTransformer
from zpipe.pipeline.verify import verify_store
from zpipe.schemas.errors import UsageError, ZpipeError
from zpipe.schemas.relevance_maps import RelevanceMaps
from zpipe.train.data.loader import RelevanceLoader

pytestmark = pytest.mark.usefixtures("one_thread")
SIZE = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3}
TOWER = families.TOWER
NESTED = ("CLIPForImageClassification", "SiglipForImageClassification")
CLASSIFIERS = [name for name, kind in transformers_models.ARCHITECTURES.items() if kind.heads]
TOWERS = [name for name, kind in transformers_models.ARCHITECTURES.items() if not kind.heads]


def shaken(model, seed=0):
    """The model in eval mode with weights large enough for every part of it to matter."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator) * 0.25
            parameter.copy_(noise + 1 if "norm" in key and key.endswith("weight") else noise)
    return model.eval().requires_grad_(False)


def of_transformers(name, **fields):
    nested = name in NESTED
    size = TOWER | {"num_labels": 5} | fields
    return shaken(transformers_models.create(name, {"vision_config": TOWER} if nested else size, 5 if nested else None))


def of_torchvision():
    size = {"image_size": 32, "patch_size": 8, "num_layers": 2, "num_heads": 3, "hidden_dim": 24, "mlp_dim": 48}
    return shaken(VisionTransformer(num_classes=5, **size))


def images(batch=2):
    return torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def settings_of(family, tmp_path):
    """The settings of an extraction with a teacher of the family: a name of timm, torchvision, or a class."""
    if family == "torchvision":
        save_file(of_torchvision().state_dict(), tmp_path / "weights.safetensors")
        size = {"image_size": 32, "patch_size": 8, "num_layers": 2, "num_heads": 3, "hidden_dim": 24, "mlp_dim": 48}
        return {
            "teacher": "torchvision:vit_b_16",
            "weights": str(tmp_path / "weights.safetensors"),
            "teacher_args": size,
        }
    if family in transformers_models.ARCHITECTURES:
        of_transformers(family).save_pretrained(tmp_path / "teacher")
        return {"teacher": None, "weights": str(tmp_path / "teacher"), "teacher_args": {}}
    state = tiny_family(family, dtype=torch.float32).state_dict()
    save_file(state, tmp_path / "weights.safetensors")
    return {"teacher": family, "weights": str(tmp_path / "weights.safetensors"), "teacher_args": SIZE}


# -------------------------------------------------------------------------------------------------------- extraction


@pytest.mark.parametrize("family", [*FAMILIES, "torchvision", *CLASSIFIERS])
def test_maps_of_every_family(family, tmp_path, shards, extract, contents):
    settings = settings_of(family, tmp_path) | {
        "num_classes": None,
        "explain": ExplainConfig(method="gradient-attention", target="class:1"),
        "batch_size": 2,
    }
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    report = extract(shards, whole, **settings)
    assert report.statuses == {"ok": 18} and report.extracted == 4

    def stop(*_args, shards_left, **_more):
        if shards_left == 2:
            raise KeyboardInterrupt

    again = ExtractConfig(executor="local", threads=1, device="cpu", **settings)
    with pytest.raises(KeyboardInterrupt):
        extract_teacher_maps(shards, resumed, again, progress=stop)
    assert extract_teacher_maps(shards, resumed, again).extracted == 2
    assert contents(resumed).keys() == contents(whole).keys()
    maps, others = RelevanceMaps(whole), RelevanceMaps(resumed)
    assert all((maps[key] == others[key]).all() for key in maps) and maps.array().shape == (18, 4, 4)
    assert verify_store(whole, shards) == []
    batch = next(iter(RelevanceLoader(shards, whole, batch_size=4)))
    assert len(batch["relevance"]) == 4 and 0 < batch["relevance"].max() <= 1
    provenance = maps.manifest.provenance
    spec = TeacherSpec(
        name=provenance.teacher,
        weights=provenance.weights,
        num_classes=provenance.num_classes,
        model_args=provenance.teacher_args,
    )
    assert load_teacher(spec).digest == provenance.teacher_digest


@pytest.mark.parametrize("family", ["torchvision", *CLASSIFIERS, *TOWERS])
def test_a_model_of_another_library_answers_as_it_does_itself(family):
    model = of_torchvision() if family == "torchvision" else of_transformers(family)
    classifier, answer = as_classifier(model), model(images())
    if family in CLASSIFIERS:
        answer = answer.logits
    elif family == "CLIPVisionModelWithProjection":
        answer = answer.image_embeds
    elif family in ("ViTModel", "DeiTModel"):
        answer = answer.last_hidden_state[:, 0]  # before their own pooler, which no published head reads
    elif family in TOWERS:
        answer = answer.pooler_output
    assert torch.equal(classifier(images()), answer)
    assert classifier.features(images()).shape == (2, 4, 4, 24)
    row = classifier.readout()
    assert row is None if classifier.parts == ("pool",) else row.sum() == pytest.approx(1)
    if classifier.num_classes:
        for name, refusal in methods_of(classifier).items():
            assert (refusal != "") == (name == DEFAULT_METHOD)
            if not refusal:
                maps, logits = METHODS[name](classifier, images(), torch.tensor([0, 1]))
                torch.testing.assert_close(logits, answer, rtol=1e-4, atol=1e-4)
                alone = METHODS[name](classifier, images()[1:], torch.tensor([1])).maps
                assert maps.shape == (2, 4, 4) and maps.abs().sum() > 0
                torch.testing.assert_close(maps[1:], alone, rtol=1e-3, atol=1e-4)


def timm_names(state):
    """The tensors of a transformers ViT under timm's names."""
    named = {}
    for key, value in state.items():
        key = key.removeprefix("vit.").replace("layers.", "blocks.")
        for old, new in (
            ("embeddings.cls_token", "cls_token"),
            ("embeddings.position_embeddings", "pos_embed"),
            ("embeddings.patch_embeddings.projection", "patch_embed.proj"),
            ("layernorm_before", "norm1"),
            ("layernorm_after", "norm2"),
            ("attention.o_proj", "attn.proj"),
            ("layernorm", "norm"),
            ("classifier", "head"),
        ):
            key = key.replace(old, new)
        named[key] = value
    for key in [key for key in named if ".q_proj." in key]:
        parts = [named.pop(key.replace("q_proj", f"{part}_proj")) for part in "qkv"]
        named[key.replace("attention.q_proj", "attn.qkv")] = torch.cat(parts)
    return named


def test_the_same_weights_have_the_same_maps_in_timm_and_transformers():
    theirs = of_transformers("ViTForImageClassification").double()
    ours = tiny_family("vit_base_patch16_224", mlp_ratio=2)
    ours.load_state_dict(timm_names(theirs.state_dict()))
    pixels, targets = images().double(), torch.tensor([3, 0])
    for block in ours.blocks:
        block.norm1.eps = block.norm2.eps = ours.norm.eps = theirs.config.layer_norm_eps
    torch.testing.assert_close(theirs(pixels).logits, ours(pixels), rtol=1e-9, atol=1e-9)
    for name in [name for name in METHODS if name != DEFAULT_METHOD]:
        torch.testing.assert_close(METHODS[name](theirs, pixels, targets), METHODS[name](ours, pixels, targets))
