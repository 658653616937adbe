"""Teachers of timm: every family, weights files of models without class token or head, and what is refused by name."""

import subprocess
import sys

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models import save_for_hf

from zpipe.pipeline.classifier import as_classifier
from zpipe.pipeline.explainer import check_method
from zpipe.pipeline.methods import CLOSED_FORM, METHODS, methods_of
from zpipe.pipeline.teacher import TeacherSpec, load_teacher, state_digest
from zpipe.pipeline.timm_models import embedding_widths
from zpipe.schemas.errors import UsageError, ZpipeError

pytestmark = pytest.mark.usefixtures("one_thread")
SIZE = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3}
# One of each class, block, attention and pooling of timm's that is known.
MODELS = {
    "vit_base_patch16_224": {},
    "vit_giant_patch14_dinov2": {},
    "vit_base_patch16_xp_224": {},
    "vit_base_patch16_rpn_224": {},
    "vit_base_patch16_radio_v3": {},
    "vit_base_patch16_siglip_224": {},
    "vit_so150m_patch16_reg4_map_256": {},
    "vit_so150m_patch16_reg4_gap_256": {},
    "vit_base_patch16_18x2_224": None,
    "vit_dpwee_patch16_reg1_gap_256": None,
    "vit_dwee_patch16_reg1_gap_256": None,
    "vit_base_r26_s32_224": {"img_size": 64, "patch_size": 1},
    "vit_relpos_base_patch16_clsgap_224": {},
    "vit_relpos_base_patch16_rpn_224": {},
    "eva02_base_patch16_clip_224": {},
    "eva02_enormous_patch14_clip_224": {},
    "vit_base_patch16_dinov3": {},
    "vit_base_patch16_rope_mixed_224": {},
    "vit_pe_core_tiny_patch16_384": {},
    "beit_base_patch16_224": {},
    "deit_base_distilled_patch16_224": {},
}


def tiny(name, **more):
    return timm.create_model(name, **(SIZE | {"num_classes": 5} | more)).eval().requires_grad_(False)


@pytest.mark.parametrize("name", MODELS)
def test_a_model_of_timm_answers_as_it_does_itself_or_is_refused_by_name(name):
    model = tiny(name, **MODELS[name] or {})
    classifier = as_classifier(model)
    images = torch.randn(2, 3, *classifier.image_size, generator=torch.Generator().manual_seed(0))
    assert torch.equal(classifier(images), model(images))
    refused = {method for method, reason in methods_of(classifier).items() if reason}
    if MODELS[name] is None:
        assert refused == set(METHODS) and "calls attention 4 times, not 2 times" in methods_of(classifier)["rollout"]
        return
    assert refused <= set(CLOSED_FORM)
    maps = {
        method: METHODS[method](classifier, images, torch.tensor([0, 1])).maps for method in METHODS.keys() - refused
    }
    assert {each.shape for each in maps.values()} == {(2, *classifier.grid)}
    assert all(each.isfinite().all() for each in maps.values())


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("resnet18", "ResNet: it has no attention"),
        ("swin_tiny_patch4_window7_224", "SwinTransformer: its attention does not see all patches at once"),
        ("hiera_tiny_224", "Hiera: its attention does not see all patches at once"),
        ("naflexvit_base_patch16_gap", "NaFlexVit: it takes patches instead of images"),
        ("xcit_nano_12_p16_224", "no family of teachers has a Xcit"),
    ],
)
def test_what_has_no_family_is_refused_by_name(name, reason):
    with pytest.raises(ZpipeError) as error:
        load_teacher(TeacherSpec(name=name, weights="random"))
    assert reason in str(error.value) and "--list-teachers" in str(error.value)


def test_a_pooling_that_is_not_known_is_refused_by_name():
    with pytest.raises(ZpipeError, match="global_pool='avgmax': only 'token', 'avg' and 'map' are known"):
        load_teacher(TeacherSpec(name="vit_base_patch16_224", weights="random", model_args={"global_pool": "avgmax"}))


def test_a_teacher_that_no_method_explains():
    teacher = load_teacher(TeacherSpec(name="vit_dwee_patch16_reg1_gap_256", weights="random", model_args=SIZE))
    with pytest.raises(ZpipeError, match="--method rollout: .*; no method can explain it; choose another teacher"):
        check_method(teacher, "rollout")


# ---------------------------------------------------------------------------------------------------- weights files


@pytest.mark.parametrize("name", [name for name, more in MODELS.items() if more == {}])
def test_a_weights_file_of_every_family(name, tmp_path):
    model = tiny(name)
    for prefix in ("", "module.backbone."):
        state = {prefix + key: value.clone() for key, value in model.state_dict().items()}
        save_file(state, tmp_path / "w.safetensors")
        spec = TeacherSpec(name=name, weights=str(tmp_path / "w.safetensors"), model_args=SIZE)
        loaded = load_teacher(spec)
        assert loaded.num_classes == 5 and loaded.digest == load_teacher(spec).digest
        images = torch.ones(1, 3, 32, 32)
        assert torch.equal(loaded.model(images), model(images))


def test_a_weights_file_without_a_head_is_an_encoder(tmp_path):
    state = {key: value for key, value in tiny("vit_base_patch16_224").state_dict().items() if "head" not in key}
    save_file(state, tmp_path / "w.safetensors")
    spec = TeacherSpec(name="vit_base_patch16_224", weights=str(tmp_path / "w.safetensors"), model_args=SIZE)
    assert load_teacher(spec, needs_classes=False).num_classes == 0
    with pytest.raises(ZpipeError, match=r"has no head\.bias and 1 more"):
        load_teacher(TeacherSpec(**vars(spec) | {"num_classes": 5}))


def test_a_folder_of_an_encoder_without_a_head(tmp_path):
    model = timm.create_model("vit_small_patch14_dinov2", **SIZE)
    save_for_hf(model, tmp_path / "dino", safe_serialization=True)
    loaded = load_teacher(TeacherSpec(weights=str(tmp_path / "dino")), needs_classes=False)
    assert loaded.num_classes == 0 and loaded.digest == state_digest(model.state_dict())


@pytest.mark.parametrize("name", ["vit_base_patch16_siglip_224", "beit_base_patch16_224", "vit_base_patch16_224"])
def test_weights_for_images_of_another_size_name_the_remedy(name, tmp_path):
    save_file(tiny(name).state_dict(), tmp_path / "w.safetensors")
    spec = TeacherSpec(name=name, weights=str(tmp_path / "w.safetensors"), model_args=SIZE | {"img_size": 48})
    with pytest.raises(ZpipeError, match="its images have 32 pixels: give model_args img_size=32"):
        load_teacher(spec)


# ------------------------------------------------------------------------------------------------------ embeddings


@pytest.mark.parametrize(
    ("name", "widths"),
    [
        ("vit_base_patch16_clip_224", {512}),
        ("vit_large_patch14_clip_224.laion2b_ft_in1k", {768}),
        ("eva02_base_patch16_clip_224", {512}),
        ("vit_pe_core_base_patch16_224", {1024}),
        ("vit_base_patch16_siglip_224", set()),
        ("vit_base_patch16_224", set()),
        ("eva_giant_patch14_224", set()),
        ("torchvision:vit_b_16", set()),
    ],
)
def test_the_widths_of_embeddings(name, widths):
    assert embedding_widths(name) == widths


def test_an_embedding_is_no_classifier(tmp_path):
    spec = {"weights": "random", "model_args": SIZE}
    for name in ("vit_base_patch16_clip_224.openai", "eva02_base_patch16_clip_224"):
        with pytest.raises(ZpipeError) as error:
            load_teacher(TeacherSpec(name=name, **spec))
        assert "has no classification head, its 512 outputs are the embedding" in str(error.value)
        assert "zpipe fit-head" in str(error.value) and "give --num-classes 512" in str(error.value)
        # For class embeddings, the embedding is what the model answers; a request may also call them classes.
        images = torch.zeros(1, 3, 32, 32)
        assert load_teacher(TeacherSpec(name=name, **spec), needs_classes=False).model(images).shape == (1, 512)
        assert load_teacher(TeacherSpec(name=name, num_classes=512, **spec)).num_classes == 512
    tuned = TeacherSpec(name="vit_base_patch16_clip_224.openai_ft_in1k", **spec)
    assert load_teacher(tuned).num_classes == 1000


@pytest.mark.parametrize("named", [False, True])
def test_weights_of_an_embedding_that_name_classes_are_a_classifier(named, tmp_path):
    model = timm.create_model("vit_base_patch16_clip_224.openai", **SIZE)
    names = {"label_names": [f"class {number}" for number in range(512)]} if named else {}
    save_for_hf(model, tmp_path / "clip", model_config=names, model_args=SIZE, safe_serialization=True)
    for spec in (
        TeacherSpec(weights=str(tmp_path / "clip")),
        TeacherSpec(weights=str(tmp_path / "clip" / "model.safetensors")),
    ):
        if named:
            assert load_teacher(spec).classes[7] == "class 7"
        else:
            with pytest.raises(ZpipeError, match="its 512 outputs are the embedding"):
                load_teacher(spec)


@pytest.mark.parametrize("weights", ["random", "file"])
def test_a_teacher_of_other_channels_is_refused(weights, tmp_path):
    args = SIZE | {"in_chans": 1}
    if weights == "file":
        save_file(tiny("vit_base_patch16_224", in_chans=1).state_dict(), tmp_path / "w.safetensors")
        weights = str(tmp_path / "w.safetensors")
    with pytest.raises(ZpipeError, match="takes 1 channels, images have 3; give another"):
        load_teacher(TeacherSpec(name="vit_base_patch16_224", weights=weights, model_args=args))


# ------------------------------------------------------------------------------------------------------- two heads


def test_whose_answer_counts_of_a_distilled_teacher():
    spec = {"name": "deit_tiny_distilled_patch16_224", "weights": "random", "num_classes": 5, "model_args": SIZE}
    both, one, other = (load_teacher(TeacherSpec(**spec, own_head=own)) for own in (None, "class", "distilled"))
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close((one.model(images) + other.model(images)) / 2, both.model(images))
    assert not torch.equal(one.model(images), other.model(images))
    assert one.digest == both.digest and one.model.parts == ("class",) and other.model.parts == ("distilled",)
    assert one.model_args == SIZE | {"own_head": "class"} and both.model_args == SIZE
    assert load_teacher(TeacherSpec(**spec | {"model_args": one.model_args})).model.parts == ("class",)
    with pytest.raises(UsageError, match="--own-head mean: choose class or distilled"):
        TeacherSpec(**spec, own_head="mean")
    with pytest.raises(UsageError, match="--own-head class: a VisionTransformer has one head; leave it out"):
        load_teacher(TeacherSpec(**spec | {"name": "deit_tiny_patch16_224"}, own_head="class"))


# ---------------------------------------------------------------------------------------------- without fused kernels

WITHOUT_FUSED = """
import timm, torch
from zpipe.pipeline.classifier import as_classifier
from zpipe.pipeline.methods import CLOSED_FORM, methods_of
for name in {names}:
    model = timm.create_model(name, **{size}).eval()
    assert not model.blocks[0].attn.fused_attn
    reasons = methods_of(as_classifier(model))
    assert not [r for m, r in reasons.items() if r and m not in CLOSED_FORM], (name, reasons)
"""


def test_a_process_without_fused_attention():
    names = ["vit_base_patch16_224", "vit_base_patch16_siglip_224", "vit_base_patch16_dinov3", "beit_base_patch16_224"]
    code = WITHOUT_FUSED.format(names=names, size=SIZE)
    subprocess.run([sys.executable, "-c", code], env={"TIMM_FUSED_ATTN": "0"}, timeout=120, check=True)
