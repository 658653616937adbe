"""The methods beside transformer attribution, each against its definition by autograd; several targets in one call."""

import pytest
import torch
from tiny_vit import pixels, tiny_vit

from zpipe.pipeline.methods import CLASS_BLIND, METHODS
from zpipe.pipeline.relevance import attribute

SHAPES = [{}, {"init_values": 0.3}, {"reg_tokens": 2, "qkv_bias": False}, {"depth": 1}]


def attentions(model, images):
    """Logits and every block's attention matrix [B, H, N, N], by timm's modules, on an autograd graph."""
    x = model._pos_embed(model.patch_embed(images)).requires_grad_()
    found = []
    for block in model.blocks:
        attn = block.attn
        q, k, v = attn.qkv(block.norm1(x)).unflatten(-1, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
        found.append(((q * attn.scale) @ k.mT).softmax(-1))
        x = x + block.ls1(attn.proj((found[-1] @ v).transpose(1, 2).flatten(2)))
        x = x + block.ls2(block.mlp(block.norm2(x)))
    return model.head(model.norm(x)[:, 0]), found


def by_definition(name, model, images, targets):
    logits, found = attentions(model, images)
    if name == "gradient-attention":
        grads = torch.autograd.grad(logits.gather(1, targets[:, None]).sum(), found)
        layers = [(g * a).clamp(min=0).mean(1) for g, a in zip(grads, found, strict=True)]
    else:
        layers = [a.mean(1) for a in found]
    eye = torch.eye(layers[0].shape[-1], dtype=images.dtype)
    if name == "class-attention":
        product = layers[-1]
    else:
        product = eye.expand_as(layers[0])
        for layer in layers:
            product = ((eye + layer) / (2 if name == "rollout" else 1)) @ product
    return product[:, 0, model.num_prefix_tokens :].unflatten(1, model.patch_embed.grid_size)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", [name for name in METHODS if name != "transformer-attribution"])
def test_maps_are_what_the_definition_says(name, shape):
    model = tiny_vit(**shape)
    images, targets = pixels(model)
    found = METHODS[name](model, images, targets)
    torch.testing.assert_close(found.maps, by_definition(name, model, images, targets).detach(), rtol=1e-9, atol=1e-15)
    torch.testing.assert_close(found.logits, model(images).detach())


@pytest.mark.parametrize("name", METHODS)
def test_several_targets_share_a_forward_and_give_the_maps_of_separate_calls(name):
    model = tiny_vit()
    images, _ = pixels(model)
    found = METHODS[name](model, images, lambda logits: logits.topk(3).indices)
    best = found.logits.topk(3).indices
    assert found.maps.shape == (3, 3, 4, 4)
    for k in range(3):
        alone = METHODS[name](model, images, best[:, k])
        torch.testing.assert_close(found.maps[:, k], alone.maps, rtol=1e-12, atol=0)
    same = bool((found.maps[:, 0] == found.maps[:, 1]).all())
    assert same == (name in CLASS_BLIND)


@pytest.mark.parametrize("name", METHODS)
def test_targets_made_of_the_logits_are_checked(name):
    model = tiny_vit()
    images, _ = pixels(model)
    with pytest.raises(ValueError, match="outside 0..4"):
        METHODS[name](model, images, lambda logits: logits.argmax(dim=1) + 5)


@pytest.mark.parametrize("name", METHODS)
def test_an_image_is_explained_alone(name):
    model = tiny_vit()
    images, targets = pixels(model, batch=4)
    together = METHODS[name](model, images, targets).maps
    for row in range(4):
        alone = METHODS[name](model, images[row : row + 1], targets[row : row + 1]).maps
        torch.testing.assert_close(together[row], alone[0], rtol=1e-9, atol=1e-15)


def test_further_targets_cost_their_sweeps_only():
    from torch.utils.flop_counter import FlopCounterMode

    model = tiny_vit(dtype=torch.float32)
    images, _ = pixels(model)

    def flops(k):
        with FlopCounterMode(display=False) as counter:
            attribute(model, images, lambda logits: logits.topk(k).indices)
        return counter.get_total_flops()

    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(images)
    forward = counter.get_total_flops()
    sweep = flops(2) - flops(1)
    assert flops(4) == flops(1) + 3 * sweep
    # What the first target pays beyond its sweep is one forward pass, less the last block's rows that nobody asks for.
    assert 0.5 * forward < flops(1) - sweep <= forward
