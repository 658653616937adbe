"""The methods for models of every family, each against its definition by autograd through timm's own modules."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from tiny_families import FAMILIES, attention_of, pooling, request, tiny_family
from tiny_vit import pixels, tiny_vit
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from zpipe.pipeline.classifier import as_classifier
from zpipe.pipeline.methods import CLASS_BLIND, CLOSED_FORM, DEFAULT_METHOD, METHODS, methods_of
from zpipe.pipeline.relevance import attribute

pytestmark = pytest.mark.usefixtures("one_thread")

GOLDEN = Path(__file__).parents[1] / "golden" / "relevance_small_vit.npz"
FOR_ALL = [name for name in METHODS if name not in CLOSED_FORM]
DEFINED = [name for name in FOR_ALL if name != "libragrad"]  # test_libragrad.py has that one
POOLED = "vit_base_patch16_siglip_224"


def readout(name, model):
    """The weights of the tokens [N] in what the head of the family reads, written out."""
    prefix, patches = model.num_prefix_tokens, model.patch_embed.num_patches
    row = torch.zeros(prefix + patches, dtype=torch.float64)
    if any(part in name for part in ("aimv2", "gap", "beit", "eva02", "dinov3")):
        row[prefix:] = 1 / patches
    elif "distilled" in name:
        row[:2] = 0.5
    else:
        row[0] = 1
    return row


def by_definition(method, name, model, images, targets):
    """Maps [B, 4, 4], with whole matrices [B, N, N] and one graph that nothing is cut from."""
    pools = name == POOLED
    with attention_of(model) as (found, tokens), torch.enable_grad():
        logits = model(images)
    if pools:
        logits, row = pooling(model, tokens[-1])
        found = [*found, row]
    if method == "legrad":
        rows = legrad_rows(model, found, tokens, targets, pools)
    else:
        if method == "gradient-attention":
            grads = torch.autograd.grad(logits.gather(1, targets[:, None]).sum(), found)
            layers = [(g * a).clamp(min=0).mean(1) for g, a in zip(grads, found, strict=True)]
        else:
            layers = [a.mean(1) for a in found]
        start = layers.pop() if pools else readout(name, model).expand(len(images), 1, -1)  # [B, 1, N]
        eye = torch.eye(start.shape[-1], dtype=torch.float64)
        if method == "class-attention":
            product = eye if pools else layers[-1]
        else:
            product = eye
            for layer in layers:
                product = ((eye + layer) / (2 if method == "rollout" else 1)) @ product
        rows = (start @ product)[:, 0]
    return rows[:, model.num_prefix_tokens :].unflatten(1, (4, 4)).detach()


def legrad_rows(model, found, tokens, targets, pools):
    total = 0
    for attention, out in zip(found, tokens, strict=False):
        if pools:
            logits, attention = pooling(model, out.detach())
        else:
            logits = model.forward_head(model.norm(out.mean(1, keepdim=True).expand_as(out)))
        score = logits.gather(1, targets[:, None]).sum()
        (grad,) = torch.autograd.grad(score, attention, retain_graph=True)
        total = total + grad.clamp(min=0).mean(dim=(1, 2))
    return total


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("method", DEFINED)
def test_maps_are_what_the_definition_says(method, name):
    model = tiny_family(name)
    images, targets = request(model)
    found = METHODS[method](model, images, targets)
    expected = by_definition(method, name, model, images, targets)
    assert expected.std() > 0
    torch.testing.assert_close(found.maps, expected, rtol=1e-9, atol=1e-15)
    torch.testing.assert_close(found.logits, model(images), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("method", FOR_ALL)
def test_an_image_is_explained_alone(method, name):
    model = tiny_family(name)
    images, targets = request(model)
    images[1] *= 100  # a bright neighbour would own whatever is summed over the batch
    together = METHODS[method](model, images, targets)
    for row in range(3):
        alone = METHODS[method](model, images[row : row + 1], targets[row : row + 1])
        scale = float(alone.maps.abs().max())
        torch.testing.assert_close(together.maps[row], alone.maps[0], rtol=1e-9, atol=1e-11 * scale)


@pytest.mark.parametrize("name", ["vit_base_patch16_224", POOLED])
@pytest.mark.parametrize("method", METHODS)
def test_several_targets_share_a_forward_and_give_the_maps_of_separate_calls(method, name):
    model = tiny_vit() if method in CLOSED_FORM else tiny_family(name)
    images, _ = pixels(model) if method in CLOSED_FORM else request(model)
    found = METHODS[method](model, images, lambda logits: logits.topk(3).indices)
    best = found.logits.topk(3).indices
    assert found.maps.shape == (3, 3, 4, 4)
    torch.testing.assert_close(METHODS[method](model, images, best).maps, found.maps, rtol=1e-10, atol=1e-14)
    for k in range(3):
        alone = METHODS[method](model, images, best[:, k])
        torch.testing.assert_close(found.maps[:, k], alone.maps, rtol=1e-10, atol=1e-14)
    same = bool((found.maps[:, 0] == found.maps[:, 1]).all())
    assert same == (method in CLASS_BLIND)


@pytest.mark.parametrize("method", METHODS)
def test_the_class_matters_unless_the_method_knows_none(method):
    model = tiny_vit()
    images, targets = pixels(model)
    maps = [METHODS[method](as_classifier(model), images, (targets + shift) % 5).maps for shift in (0, 1)]
    assert torch.equal(*maps) == (method in CLASS_BLIND)


@pytest.mark.parametrize("method", METHODS)
def test_targets_made_of_the_logits_are_checked(method):
    model = tiny_vit()
    images, _ = pixels(model)
    with pytest.raises(ValueError, match="outside 0..4"):
        METHODS[method](model, images, lambda logits: logits.argmax(dim=1) + 5)


@pytest.mark.parametrize("method", FOR_ALL)
def test_the_mode_of_the_caller_changes_nothing(method):
    model = tiny_vit(dtype=torch.float32)  # its weights take gradients
    images, targets = pixels(model)
    plain = METHODS[method](model, images, targets)
    assert not plain.maps.requires_grad and not plain.logits.requires_grad
    with torch.enable_grad():
        tracked = METHODS[method](model, images.clone().requires_grad_(), targets)
    with torch.inference_mode():
        inferred = METHODS[method](model, images.clone(), targets.clone())
    with torch.no_grad():
        untracked = METHODS[method](model.requires_grad_(False), images, targets)
    for other in (tracked, inferred, untracked):
        assert torch.equal(other.maps, plain.maps) and not other.maps.requires_grad


@pytest.mark.parametrize("method", FOR_ALL)
def test_the_model_is_left_as_it_was(method):
    model = tiny_vit(init_values=0.1)
    images, targets = pixels(model)
    state, kept = {k: v.clone() for k, v in model.state_dict().items()}, images.clone()
    METHODS[method](model, images, targets)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert torch.equal(images, kept) and all(p.grad is None and p.requires_grad for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in model.modules())


@pytest.mark.parametrize("method", FOR_ALL)
def test_an_empty_batch_gives_empty_maps(method):
    model = tiny_vit()
    maps, logits = METHODS[method](model, *pixels(model, batch=0))
    assert maps.shape == (0, 4, 4) and logits.shape == (0, 5)


# ------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("method", METHODS)
def test_bad_requests_are_one_line(method):
    model = tiny_vit()
    images, targets = pixels(model)
    broken = images.clone()
    broken[1, 0, 3, 3] = torch.nan
    cases = {
        r"\[B, 3, 16, 16\]": (images[:, :, :12], targets),
        "float32": (images.float(), targets),
        "image 1 ": (broken, targets),
        "class 5 is outside 0..4": (images, torch.tensor([0, 5, 1])),
        "integers": (images, targets.double()),
        "3 images need": (images, targets[:2]),
    }
    for message, request_ in cases.items():
        with pytest.raises(ValueError, match=message) as error:
            METHODS[method](model, *request_)
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="train mode"):
        METHODS[method](tiny_vit().train(), images, targets)
    model.blocks[0].attn.proj.float()
    with pytest.raises(ValueError, match=r"mixes dtypes or devices: blocks\.0\.attn\.proj\.weight"):
        METHODS[method](model, images, targets)


@pytest.mark.parametrize("method", METHODS)
def test_a_model_without_classes_or_of_no_known_family_is_refused(method):
    headless = tiny_vit(num_classes=0)
    images = torch.zeros(1, 3, 16, 16, dtype=torch.float64)
    with pytest.raises(ValueError, match="num_classes=0"):
        METHODS[method](headless, images, torch.tensor([0]))
    swin = SwinTransformer(img_size=32, patch_size=4, window_size=4, embed_dim=12, depths=(1,), num_heads=(3,))
    with pytest.raises(ValueError, match="no family of teachers has a SwinTransformer"):
        METHODS[method](swin.eval(), torch.zeros(1, 3, 32, 32), torch.tensor([0]))


def test_the_closed_form_is_for_the_models_whose_rules_are_known():
    known, pooled = as_classifier(tiny_family("vit_base_patch16_224")), tiny_family("vit_so150m_patch16_reg4_gap_256")
    assert not any(methods_of(known).values())
    refusals = methods_of(as_classifier(pooled))
    assert {name for name, reason in refusals.items() if reason} == set(CLOSED_FORM)
    with pytest.raises(ValueError, match="class_token") as error:
        METHODS[DEFAULT_METHOD](pooled, *request(pooled))
    assert str(error.value) == refusals[DEFAULT_METHOD]


# ----------------------------------------------------------------------------------------------------------- cost


def flops(run):
    # Unfused, because torch 2.11 doesn't count the CPU's fused kernel.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def test_further_targets_cost_their_sweeps_only():
    model = tiny_vit(dtype=torch.float32)
    images, _ = pixels(model)

    def cost(k):
        return flops(lambda: attribute(model, images, lambda logits: logits.topk(k).indices))

    with torch.no_grad():
        forward = flops(lambda: model(images))
    sweep = cost(2) - cost(1)
    assert cost(4) == cost(1) + 3 * sweep
    # What the first target pays beyond its sweep is one forward pass, less the last block's rows that nobody asks for.
    assert 0.5 * forward < cost(1) - sweep <= forward


@pytest.mark.parametrize(
    ("method", "most"),
    [("gradient-attention", 2.09), ("legrad", 1.8), ("libragrad", 1.91), ("rollout", 1.01), ("class-attention", 1.01)],
)
def test_no_product_is_wasted(method, most):
    # DeiT's own proportions (197 tokens, 12 blocks) at a narrower width, where attention weighs more than in DeiT-B.
    sizes = {"img_size": 224, "patch_size": 16, "embed_dim": 192, "depth": 12, "num_classes": 1000}
    model = tiny_vit(dtype=torch.float32, **sizes).requires_grad_(False)
    images, targets = pixels(model, batch=1)
    with torch.no_grad():
        forward = flops(lambda: model(images))
    first = flops(lambda: METHODS[method](model, images, targets))
    assert first <= most * forward
    both = flops(lambda: METHODS[method](model, images, torch.stack([targets, targets], dim=1)))
    assert both - first <= (most - 1) * forward  # a second target costs no forward pass


# ------------------------------------------------------------------------------------------------------ precision


@pytest.fixture(scope="module")
def trained():
    """A small trained ViT, 24 images and their classes: `relevance_small_vit.npz`."""
    with np.load(GOLDEN) as file:
        values = {name: torch.from_numpy(file[name]) for name in file.files}
    names = ("img_size", "patch_size", "embed_dim", "depth", "num_heads", "num_classes")
    model = VisionTransformer(**dict(zip(names, values["config"].tolist(), strict=True)))
    model.load_state_dict({name[2:]: value for name, value in values.items() if name.startswith("w/")})
    return model.eval().requires_grad_(False), values["images"], values["targets"]


@pytest.mark.parametrize("method", FOR_ALL)
def test_a_trained_teachers_maps_keep_their_order_in_low_precision(method, trained):
    """These methods divide by nothing that crosses zero, so a bound holds on every processor."""
    model, images, targets = trained

    def rank_correlations(dtype):
        maps = METHODS[method](copy.deepcopy(model).to(dtype), images.to(dtype), targets).maps
        ranks = [m.double().flatten(1).argsort(1).argsort(1).numpy() for m in (maps, exact)]
        return np.array([np.corrcoef(a, b)[0, 1] for a, b in zip(*ranks, strict=True)])

    exact = METHODS[method](copy.deepcopy(model).double(), images.double(), targets).maps
    assert rank_correlations(torch.float32).min() >= 0.9999
    reduced = rank_correlations(torch.bfloat16)
    assert np.median(reduced) >= 0.998 and reduced.min() >= 0.95


@pytest.mark.parametrize("method", METHODS)
def test_every_method_computes_in_exact_float32(method):
    """Seen by hooks in the model, under settings of the user that would round; these stay as they were."""
    model, seen = tiny_vit(dtype=torch.float32), []

    def look(*_):
        backends = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul, torch.backends.cudnn.conv)
        seen.extend(each.fp32_precision for each in backends)

    model.patch_embed.proj.register_forward_hook(look)
    model.head.register_forward_hook(look)
    torch.set_float32_matmul_precision("high")
    try:
        METHODS[method](model, *pixels(model))
        assert torch.get_float32_matmul_precision() == "high"
        assert torch.backends.cuda.matmul.fp32_precision == torch.backends.cudnn.conv.fp32_precision == "tf32"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert set(seen) == {"ieee"}
