"""Attention of models whose code is not ours: every kind of call is answered with the same formula."""

import pytest
import torch
import torch.nn.functional as F
from tiny_families import FAMILIES, attention_of, request, tiny_family
from tiny_vit import pixels, tiny_vit
from torch import nn
from torchvision.models.vision_transformer import VisionTransformer as TorchvisionViT

from zpipe.pipeline.attention_recorder import AttentionRecorder
from zpipe.pipeline.classifier import as_classifier
from zpipe.pipeline.methods import CLOSED_FORM, METHODS

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("name", FAMILIES)
def test_attention_is_timms_own(name, fused):
    model = tiny_family(name)
    images, _ = request(model)
    with attention_of(model) as (expected, _tokens):
        model(images)
    for block in model.blocks:
        block.attn.fused_attn = fused
    with AttentionRecorder() as recorder:
        logits = model(images)
    torch.testing.assert_close(logits, model(images), rtol=1e-12, atol=1e-12)
    recorder.check(as_classifier(model), len(images))
    for found, attention in zip(recorder.recorded, expected, strict=False):
        torch.testing.assert_close(found, attention.detach(), rtol=1e-12, atol=1e-15)
        torch.testing.assert_close(found.sum(-1), torch.ones_like(found[..., 0]))


def test_torchvisions_vit_computes_what_it_computes_without_the_recorder():
    torch.manual_seed(0)
    model = TorchvisionViT(32, 8, num_layers=2, num_heads=3, hidden_dim=24, mlp_dim=48, num_classes=5).double().eval()
    nn.init.normal_(model.heads.head.weight)
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    before = torch.backends.mha.get_fastpath_enabled()
    with torch.no_grad():
        expected = model(images)
        with AttentionRecorder() as recorder:
            found = model(images)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert recorder.shapes == [(2, 17, 17)] * 2 and recorder.recorded[0].shape == (2, 3, 17, 17)
    assert torch.backends.mha.get_fastpath_enabled() == before


def test_masks_and_scales():
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 2, 3, 5, 4, generator=generator, dtype=torch.float64)
    bias = torch.randn(5, 5, generator=generator, dtype=torch.float64)
    for options in ({}, {"attn_mask": bias}, {"attn_mask": bias > -1}, {"scale": 0.3}):
        expected = F.scaled_dot_product_attention(q, k, v, **options)
        with AttentionRecorder():
            torch.testing.assert_close(F.scaled_dot_product_attention(q, k, v, **options), expected)


def test_probabilities_can_be_changed_and_reduced():
    q, k, v = torch.randn(3, 2, 3, 5, 4)
    with AttentionRecorder(torch.zeros_like, lambda p: p.sum()) as recorder:
        assert F.scaled_dot_product_attention(q, k, v).eq(0).all()
    assert recorder.recorded == [torch.tensor(0.0)] and recorder.shapes == [(2, 5, 5)]


def test_an_attention_that_is_not_known_is_refused():
    q = torch.randn(1, 2, 3, 4)
    with AttentionRecorder(), pytest.raises(ValueError, match="causal mask"):
        F.scaled_dot_product_attention(q, q, q, is_causal=True)
    layer = nn.MultiheadAttention(4, 2, add_zero_attn=True).eval()
    with AttentionRecorder(), pytest.raises(ValueError, match="MultiheadAttention"):
        layer(q[0], q[0], q[0])


class OwnKernel(nn.Module):
    """An attention that calls no function that is known."""

    def __init__(self, attention):
        super().__init__()
        self.qkv, self.proj, self.num_heads = attention.qkv, attention.proj, attention.num_heads

    def forward(self, x, attn_mask=None, is_causal=False):
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        weights = (q @ k.mT).exp()
        return self.proj((weights / weights.sum(-1, keepdim=True) @ v).transpose(1, 2).flatten(2))


class Windows(nn.Module):
    """An attention within two halves of the tokens."""

    def __init__(self, attention):
        super().__init__()
        self.attention, self.num_heads = attention, attention.num_heads

    def forward(self, x, attn_mask=None, is_causal=False):
        return torch.cat([self.attention(half) for half in x.split(9, dim=1)], dim=1)


@pytest.mark.parametrize("method", [name for name in METHODS if name not in CLOSED_FORM])
@pytest.mark.parametrize(("kind", "found"), [(OwnKernel, "2 times, not 3"), (Windows, "4 times, not 3")])
def test_methods_refuse_a_model_with_another_attention(method, kind, found):
    model = tiny_vit()
    model.blocks[1].attn = kind(model.blocks[1].attn)
    with pytest.raises(ValueError, match=found) as error:
        METHODS[method](model.eval(), *pixels(model))
    assert "\n" not in str(error.value) and "VisionTransformer" in str(error.value)


def test_an_attention_among_other_tokens_is_named():
    model = tiny_vit()
    recorder = AttentionRecorder()
    recorder.shapes = [(3, 17, 17), (12, 4, 4), (3, 17, 17)]
    with pytest.raises(ValueError, match=r"attention 2 is \[12, 4, 4\], not \[3, 17, 17\]"):
        recorder.check(as_classifier(model), 3)
