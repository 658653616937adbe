"""A teacher of every family: maps through the whole extraction, resumed, verified, and joined with images."""

import pytest
import timm
import torch
from safetensors.torch import save_file
from tiny_families import FAMILIES, tiny_family
from tiny_teachers import OF_TORCHVISION, of_torchvision, of_transformers

from zpipe.pipeline import families, torchvision_models, transformers_models
from zpipe.pipeline.classifier import as_classifier
from zpipe.pipeline.explainer import ExplainConfig
from zpipe.pipeline.extract import ExtractConfig, extract_teacher_maps
from zpipe.pipeline.methods import CLOSED_FORM, METHODS, methods_of
from zpipe.pipeline.teacher import TeacherSpec, load_teacher
from zpipe.pipeline.verify import verify_store
from zpipe.schemas.relevance_maps import RelevanceMaps
from zpipe.train.checkpoint import load_run
from zpipe.train.fit.config import TrainConfig
from zpipe.train.fit.train_zoomer import ZoomerConfig, train_zoomer

pytestmark = pytest.mark.usefixtures("one_thread")
SIZE = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3}
CLASSIFIERS = [name for name, kind in transformers_models.ARCHITECTURES.items() if kind.heads]
TOWERS = [name for name, kind in transformers_models.ARCHITECTURES.items() if not kind.heads]


def images(batch=2):
    return torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def settings_of(family, tmp_path):
    """The settings of an extraction with a teacher of the family: a name of timm, torchvision, or a class."""
    if family == "torchvision":
        save_file(of_torchvision().state_dict(), tmp_path / "weights.safetensors")
        weights = str(tmp_path / "weights.safetensors")
        return {"teacher": "torchvision:vit_b_16", "weights": weights, "teacher_args": OF_TORCHVISION}
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
    loop = TrainConfig(epochs=2, batch_size=6, lr=1e-3, data_workers=0, device="cpu")
    zoomer = ZoomerConfig(num_blocks=2, width=4, image_size=32, train=loop)
    train_zoomer(shards, whole, tmp_path / "zoomer", zoomer)
    assert load_run(tmp_path / "zoomer").model(images()).shape == (2, 16)
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
            assert (refusal != "") == (name in CLOSED_FORM)
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
    for name in [name for name in METHODS if name not in CLOSED_FORM]:
        torch.testing.assert_close(METHODS[name](theirs, pixels, targets), METHODS[name](ours, pixels, targets))


# ------------------------------------------------------------------------------------------------ the command line


def test_the_list_of_teachers_needs_no_shards(cli):
    done = cli("extract-teacher-maps", "--list-teachers")
    assert done.code == 0 and done.stderr == ""
    listed, row = {}, []
    for line in done.stdout.splitlines():
        cells = ["".join(cell.split()) for cell in line.strip("│").split("│")]
        if len(cells) == 4:  # of a row, or its continuation
            row = [*cells] if cells[0] and not row else [old + new for old, new in zip(row, cells, strict=True)]
        elif row:
            listed[row[0]] = row[1:]
            row = []
    assert listed["timmViT,DeiT"][:2] == ["classtoken", "all"]
    assert listed["timmCLIP"][1] == "all" and listed["timmCLIP"][2].startswith("vit_base_patch16_clip_224.openai")
    needs = "(needsaheadorclassembeddings)"
    assert [listed[f"timm{name}"][0] for name in ("CLIP", "EVACLIP", "ViTwithregisters")] == [f"classtoken{needs}"] * 3
    assert listed["timmAIMv2"][0] == f"meanofpatches{needs}"
    assert listed["timmSigLIP"][:2] == [f"poolingattention{needs}", f"allbut{','.join(CLOSED_FORM)}"]
    assert listed["transformersViTModel"][0] == "classtoken(needsaheadorclassembeddings)"
    named = {name.removeprefix("transformers") for name in listed if name.startswith("transformers")}
    assert named == set(transformers_models.ARCHITECTURES) and len(listed) == len(families.FAMILIES)


def test_the_list_of_teachers_names_what_must_be_installed(monkeypatch):
    monkeypatch.setattr(transformers_models, "is_installed", lambda: False)
    rows = {row["family"]: row["methods"] for row in families.family_rows()}
    assert rows["transformers ViTModel"] == "pip install 'zpipe[transformers]'" and rows["torchvision ViT"] != ""


@pytest.mark.parametrize("family", families.FAMILIES, ids=lambda family: family.name)
def test_the_examples_of_a_family_are_names_of_its_models(family):
    for name in family.examples:
        if name.startswith("torchvision:"):
            torchvision_models.split_name(name)
        elif not name.startswith("transformers:"):
            assert timm.get_pretrained_cfg(name) is not None
            with torch.device("meta"):
                example = as_classifier(timm.create_model(name))
            assert example.parts == as_classifier(family.tiny()).parts


def test_a_teacher_of_transformers_from_the_command_line_to_a_zoomer(cli, tmp_path, shards):
    of_transformers("DeiTForImageClassificationWithTeacher").save_pretrained(tmp_path / "deit")
    maps = tmp_path / "maps"
    flags = ["--weights", tmp_path / "deit", "--method", "gradient-attention", "--own-head", "distilled"]
    flags += ["--executor", "local", "--threads", "1", "--device", "cpu"]
    done = cli("extract-teacher-maps", shards, "--out", maps, *flags)
    assert done.code == 0 and "18 maps in 4 shards (4 extracted now)" in done.stdout
    assert "how its images are prepared is assumed" in done.stderr
    provenance = RelevanceMaps(maps).manifest.provenance
    assert provenance.teacher == "transformers:DeiTForImageClassificationWithTeacher"
    assert provenance.teacher_args == {"own_head": "distilled"} and provenance.num_classes == 5
    refused = cli(
        "extract-teacher-maps",
        shards,
        "--out",
        maps,
        *[flag for flag in flags if flag != "distilled" and flag != "--own-head"],
    )
    assert refused.code != 0 and "teacher_args" in refused.error
    settings = ["--set", "train.log_every=1", "--set", "image_size=32", "--num-blocks", "2", "--set", "width=8"]
    done = cli(
        "train-zoomer",
        shards,
        "--maps",
        maps,
        "--out",
        tmp_path / "zoomer",
        "--epochs",
        "1",
        "--batch-size",
        "9",
        "--data-workers",
        "0",
        "--device",
        "cpu",
        *settings,
    )
    assert done.code == 0 and (tmp_path / "zoomer" / "model.safetensors").is_file()


def test_a_tower_without_a_head_answers_by_class_embeddings(cli, tmp_path, shards):
    of_transformers("CLIPVisionModelWithProjection", projection_dim=16).save_pretrained(tmp_path / "clip")
    torch.save(torch.randn(5, 16, generator=torch.Generator().manual_seed(0)), tmp_path / "classes.pt")
    flags = ["--weights", tmp_path / "clip", "--method", "legrad", "--executor", "local", "--device", "cpu"]
    refused = cli("extract-teacher-maps", shards, "--out", tmp_path / "maps", *flags)
    assert refused.code == 1 and "has no classification head; fit one with zpipe fit-head" in refused.error
    flags += ["--class-embeddings", tmp_path / "classes.pt"]
    done = cli("extract-teacher-maps", shards, "--out", tmp_path / "maps", *flags)
    assert done.code == 0 and verify_store(tmp_path / "maps", shards) == []


def test_a_method_that_a_model_of_transformers_has_not(cli, tmp_path, shards):
    of_transformers("ViTForImageClassification").save_pretrained(tmp_path / "vit")
    done = cli("extract-teacher-maps", shards, "--out", tmp_path / "maps", "--weights", tmp_path / "vit")
    assert done.code == 1 and not (tmp_path / "maps").exists()
    assert "no relevance rules for ViTForImageClassification" in done.error
    assert "choose --method gradient-attention, legrad, libragrad, rollout, class-attention" in done.error
