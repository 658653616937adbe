"""The corrected backward pass: complete for every family, and equal to its definition where that is written out."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from timm.layers import GELUTanh, QuickGELU, RmsNorm, SimpleNorm
from tiny_families import FAMILIES, request, tiny_family
from tiny_vit import pixels, tiny_vit
from torch import nn
from transformers.activations import ACT2FN

from zpipe.pipeline.classifier import as_classifier
from zpipe.pipeline.libragrad import BalancedGradients, check_activations
from zpipe.pipeline.methods import METHODS, methods_of, refusal_of

pytestmark = pytest.mark.usefixtures("one_thread")


def shares(model, images, target):
    """Logits [B, classes], and the sum over the batch of what tokens and biases contribute to the target's."""
    entered = []

    def enter(_block, args):
        entered.append(args[0].detach().requires_grad_())
        return (entered[0], *args[1:])

    biases = [p.requires_grad_() for name, p in model.named_parameters() if name.endswith("bias")]
    hook = model.blocks[0].register_forward_pre_hook(enter)
    try:
        with BalancedGradients():
            logits = as_classifier(model)(images)
    finally:
        hook.remove()
    parts = [entered[0], *biases]
    grads = torch.autograd.grad(logits[:, target].sum(), parts, allow_unused=True)
    return logits, sum((x * g).sum() for x, g in zip(parts, grads, strict=True) if g is not None)


VARIANTS = {name: {"name": name} for name in FAMILIES} | {
    "GELU written out": {"name": "vit_base_patch16_224", "act_layer": partial(ACT2FN.__getitem__, "gelu_new")},
    "Mish": {"name": "vit_base_patch16_224", "act_layer": nn.Mish},
    "tanh GELU": {"name": "vit_base_patch16_224", "act_layer": GELUTanh},
    "quick GELU": {"name": "vit_base_patch16_224", "act_layer": QuickGELU},
    "RMSNorm": {"name": "vit_base_patch16_224", "norm_layer": RmsNorm},
    "RMSNorm without weights": {"name": "vit_base_patch16_224", "norm_layer": SimpleNorm},
    "torch LayerNorm": {"name": "vit_base_patch16_224", "norm_layer": partial(nn.LayerNorm, eps=1e-5)},
    "LayerScale": {"name": "vit_base_patch16_224", "init_values": 0.1},
    "normalised queries": {"name": "vit_base_patch16_224", "qk_norm": True},
    "EVA with sub-norm": {"name": "eva02_tiny_patch14_224", "scale_mlp": True, "swiglu_mlp": True},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_tokens_and_biases_sum_to_the_logit(variant):
    model = tiny_family(**VARIANTS[variant])
    images, _ = request(model)
    expected = model(images)
    logits, total = shares(model, images, target=2)
    torch.testing.assert_close(logits, expected, rtol=1e-12, atol=1e-12)  # the forward pass is the model's own
    assert abs(total - logits[:, 2].sum()) <= 1e-9
    assert logits[:, 2].abs().min() > 1e-3


def test_the_plain_gradient_is_not_complete():
    model = tiny_family("vit_base_patch16_224")
    images, _ = request(model)
    tokens = model._pos_embed(model.patch_embed(images)).requires_grad_()
    logit = model.forward_head(model.norm(model.blocks(tokens)))[:, 2].sum()
    biases = sum(
        (p * torch.autograd.grad(logit, p, retain_graph=True)[0]).sum()
        for name, p in model.named_parameters()
        if name.endswith("bias") and p.requires_grad
    )
    (grad,) = torch.autograd.grad(logit, tokens)
    assert abs((tokens * grad).sum() + biases - logit) > 1e-3


def by_definition(model, images, targets):
    """Maps [B, gh, gw] of a plain ViT: every factor that counts as a constant is detached by hand."""

    def norm(layer, x):
        centred = x - x.mean(-1, keepdim=True)
        return (
            centred / (x.var(-1, unbiased=False, keepdim=True) + layer.eps).sqrt().detach() * layer.weight + layer.bias
        )

    x = model._pos_embed(model.patch_embed(images)).detach().requires_grad_()
    tokens = []
    for block in model.blocks:
        tokens.append(x)
        attn = block.attn
        q, k, v = attn.qkv(norm(block.norm1, x)).unflatten(-1, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
        attention = ((q * attn.scale) @ k.mT).softmax(-1).detach()
        x = x + block.ls1(attn.proj((attention @ v).transpose(1, 2).flatten(2)))
        hidden = block.mlp.fc1(norm(block.norm2, x))
        gate = torch.special.ndtr(hidden).detach()  # GELU(x) = x Phi(x)
        x = x + block.ls2(block.mlp.fc2(hidden * gate))
    logits = model.head(norm(model.norm, x)[:, 0])
    grads = torch.autograd.grad(logits.gather(1, targets[:, None]).sum(), tokens)
    rows = sum((x * g).sum(-1) for x, g in zip(tokens, grads, strict=True))
    return rows[:, model.num_prefix_tokens :].unflatten(1, model.patch_embed.grid_size).detach()


@pytest.mark.parametrize(
    "shape", [{}, {"init_values": 0.3}, {"reg_tokens": 2, "qkv_bias": False}, {"depth": 1}], ids=str
)
def test_maps_are_what_the_definition_says(shape):
    model = tiny_vit(**shape)  # whose weights take gradients: a LayerScale is no activation
    images, targets = pixels(model)
    found = METHODS["libragrad"](model, images, targets)
    torch.testing.assert_close(found.maps, by_definition(model, images, targets), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(found.logits, model(images).detach())


# ---------------------------------------------------------------------------------------------------------- rules


def gradient(function, *values):
    leaves = [torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in values]
    activations = [leaf * 1 for leaf in leaves]
    with BalancedGradients():
        out = function(*activations)
    return out.detach(), torch.autograd.grad(out.sum(), leaves, allow_unused=True, materialize_grads=True)


WRITTEN_OUT = [ACT2FN[name] for name in ("gelu_new", "gelu_fast", "gelu_python", "gelu_python_tanh", "gelu_accurate")]


@pytest.mark.parametrize("activation", WRITTEN_OUT, ids=lambda activation: type(activation).__name__)
def test_a_gelu_that_is_written_out_is_a_gate(activation):
    values = [-4.0, -1.0, 0.0, 0.5, 3.0]
    out, (grad,) = gradient(activation, values)
    assert grad[2] == 0.5
    torch.testing.assert_close(grad * torch.tensor(values, dtype=torch.float64), out)


def test_mish_is_a_gate_with_its_own_limit():
    out, (grad,) = gradient(F.mish, [-2.0, 0.0, 2.0])
    torch.testing.assert_close(grad * torch.tensor([-2.0, 0.0, 2.0], dtype=torch.float64), out)
    near = F.mish(torch.tensor(1e-6, dtype=torch.float64)) / 1e-6
    assert grad[1] == 0.6 and abs(near - 0.6) < 1e-5


@pytest.mark.parametrize("name", ["tanh", "sigmoid", "laplace", "relu2", "relu6", "sqrtsoftplus", "gelu_10"])
def test_an_activation_whose_gradient_is_not_complete_is_refused(name):
    model = tiny_family("vit_base_patch16_224")
    for block in model.blocks:
        block.mlp.act = ACT2FN[name].eval()
    classifier = as_classifier(model)
    reason = refusal_of(classifier, "libragrad")
    kind = type(model.blocks[0].mlp.act).__name__
    assert reason == f"no rule for the activation {kind}: its gradient would not be complete"
    assert methods_of(classifier)["libragrad"] == reason and refusal_of(classifier, "gradient-attention") == ""
    with pytest.raises(ValueError, match="no rule for the activation"):
        METHODS["libragrad"](model, *request(model))


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_models_that_have_rules_are_not_refused(variant):
    check_activations(as_classifier(tiny_family(**VARIANTS[variant])).blocks)


@pytest.mark.parametrize("activation", [F.gelu, partial(F.gelu, approximate="tanh"), F.silu, F.hardswish])
def test_an_activation_is_a_gate_of_its_input(activation):
    values = [-30.0, -2.0, -1e-300, 0.0, 1e-8, 3.0, 40.0]
    out, (grad,) = gradient(activation, values)
    x = torch.tensor(values, dtype=torch.float64)
    torch.testing.assert_close(out, activation(x))
    torch.testing.assert_close(grad * x, activation(x), rtol=1e-12, atol=1e-300)
    assert grad.isfinite().all() and grad[3] == 0.5


def test_a_product_of_activations_is_shared_by_halves():
    a, b = [2.0, -1.0], [5.0, 3.0]
    for function in (torch.mul, lambda a, b: a * b, lambda a, b: a.mul(b)):
        out, (grad_a, grad_b) = gradient(function, a, b)
        assert out.tolist() == [10.0, -3.0]
        assert grad_a.tolist() == [2.5, 1.5] and grad_b.tolist() == [1.0, -0.5]
    out, (grad,) = gradient(lambda a: a * 3 * torch.tensor([1.0, 2.0]), a)
    assert grad.tolist() == [3.0, 6.0]  # a factor that is no activation


def test_gates_and_divisors_are_constants():
    _, (grad_a, grad_b) = gradient(lambda a, b: a * b.sigmoid(), [2.0], [0.0])
    assert (grad_a.item(), grad_b.item()) == (0.5, 0.0)
    _, (grad_a, grad_b) = gradient(lambda a, b: a / b, [2.0], [4.0])
    assert (grad_a.item(), grad_b.item()) == (0.25, 0.0)
    out, (grad,) = gradient(lambda a: F.normalize(a, dim=-1), [3.0, 4.0])
    torch.testing.assert_close(out, torch.tensor([0.6, 0.8], dtype=torch.float64))
    assert grad.tolist() == [0.2, 0.2]
