"""The attribution maths: against the public implementation's values, against a slow literal reference, rule by rule."""

import copy
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.layers import GELUTanh, RmsNorm, SwiGLU
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import ParallelScalingBlock, VisionTransformer
from tiny_vit import pixels, tiny_vit
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from zpipe.pipeline.relevance import (
    attribute,
    clone_rule,
    guarded_divide,
    linear_rule,
    magnitude_rule,
    matmul_rule,
    residual_rule,
    transformer_attribution,
)
from zpipe.pipeline.supported import check_supported

pytestmark = pytest.mark.usefixtures("one_thread")

GOLDEN = Path(__file__).parents[1] / "golden" / "relevance_small_vit.npz"


def min_max(maps):
    flat = maps.double().flatten(1)
    low, high = flat.amin(1, keepdim=True), flat.amax(1, keepdim=True)
    return (flat - low) / (high - low)


def worst_per_image(maps, expected):
    return (min_max(maps) - min_max(expected)).abs().amax(1)


def rank_correlation(maps, expected):
    """Spearman's rank correlation of the cells of each image, [B]."""
    ranks = [m.flatten(1).argsort(1).argsort(1).double().numpy() for m in (maps, expected)]
    return torch.tensor([np.corrcoef(a, b)[0, 1] for a, b in zip(*ranks, strict=True)])


def relative_per_image(maps, expected):
    return (maps - expected).flatten(1).abs().amax(1) / expected.flatten(1).abs().amax(1)


# ------------------------------------------------- the slow reference: one image, autograd, straight from the rules


def ref_divide(r, z):
    return torch.where(z == 0, torch.zeros_like(r), r / (z + 1e-9))


def ref_simple(function, inputs, r):
    """R_x = x * dZ/dx applied to R / Z, for each input of Z = function(*inputs)."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    z = function(*inputs)
    return [x.detach() * g for x, g in zip(inputs, torch.autograd.grad(z, inputs, ref_divide(r, z)), strict=True)]


def ref_linear(x, weight, r):
    positive = ref_positive(x, weight)
    x = x.detach().requires_grad_()
    z = ref_positive(x, weight)
    s = ref_divide(r, positive)
    return x.detach() * torch.autograd.grad(z, x, s)[0]


def ref_positive(x, weight):
    return x.clamp(min=0) @ weight.clamp(min=0).T + x.clamp(max=0) @ weight.clamp(max=0).T


def ref_add(a, b, r):
    r_a, r_b = ref_simple(torch.add, (a, b), r)
    sum_a, sum_b = r_a.sum(), r_b.sum()
    both = sum_a.abs() + sum_b.abs()
    scale_a = ref_divide(ref_divide(sum_a.abs(), both) * r.sum(), sum_a)
    scale_b = ref_divide(ref_divide(sum_b.abs(), both) * r.sum(), sum_b)
    return r_a * scale_a, r_b * scale_b


def ref_magnitude(a, b, r):
    share = ref_divide(a.abs(), a.abs() + b.abs())
    return r * share, r * (1 - share)


def ref_clone(x, *uses):
    return x * sum(ref_divide(r, x) for r in uses)


def ref_weight(linear, scale):
    """The weight of a linear layer with the LayerScale behind it multiplied in."""
    return linear.weight * getattr(scale, "gamma", torch.ones(()))[..., None]


def reference(model, image, target, add=ref_add):
    """Transformer attribution of one image [1, C, H, W] -> [gh, gw], the whole product of the [N, N] matrices."""
    model = model.requires_grad_(False)
    x = model.norm_pre(model._pos_embed(model.patch_embed(image))).requires_grad_()
    saved = []
    for block in model.blocks:
        attn = block.attn
        tape = {"x": x, "normed": block.norm1(x)}
        q, k, v = attn.qkv(tape["normed"]).reshape(1, -1, 3, attn.num_heads, attn.head_dim).permute(2, 0, 3, 1, 4)
        attention = ((q @ k.transpose(-1, -2)) * attn.scale).softmax(-1)
        context = (attention @ v).transpose(1, 2).flatten(2)
        attended = block.ls1(attn.proj(context))
        middle = x + attended
        normed2 = block.norm2(middle)
        active = block.mlp.act(block.mlp.fc1(normed2))
        mixed = block.ls2(block.mlp.fc2(active))
        x = middle + mixed
        tape |= {
            "q": q,
            "k": k,
            "v": v,
            "attention": attention,
            "context": context,
            "attended": attended,
            "middle": middle,
        }
        saved.append(tape | {"normed2": normed2, "active": active, "mixed": mixed})
    normed = model.norm(x)
    logits = model.head(normed[:, 0])
    attentions = [tape["attention"] for tape in saved]
    gradients = torch.autograd.grad(logits[0, target], attentions)
    saved = [{name: value.detach() for name, value in tape.items()} for tape in saved]
    normed = normed.detach()

    r = torch.zeros_like(logits)
    r[0, target] = 1
    r = ref_linear(normed[:, 0], model.head.weight, r)
    r = ref_simple(lambda tokens: tokens[:, 0], [normed], r)[0]
    bars = []
    for block, tape, gradient in reversed(list(zip(model.blocks, saved, gradients, strict=True))):
        attn, mlp = block.attn, block.mlp
        skip, branch = add(tape["middle"], tape["mixed"], r)
        branch = ref_linear(tape["active"], ref_weight(mlp.fc2, block.ls2), branch)
        branch = ref_linear(tape["normed2"], mlp.fc1.weight, branch)
        r = ref_clone(tape["middle"], skip, branch)
        skip, branch = add(tape["x"], tape["attended"], r)
        branch = ref_linear(tape["context"], ref_weight(attn.proj, block.ls1), branch)
        branch = branch.unflatten(-1, (attn.num_heads, -1)).transpose(1, 2)
        r_attention, r_v = (half / 2 for half in ref_simple(torch.matmul, (tape["attention"], tape["v"]), branch))
        bars.append(torch.eye(r.shape[1]).double() + (gradient * r_attention).clamp(min=0).mean(1)[0])
        products = ref_simple(lambda q, k: q @ k.transpose(-1, -2), (tape["q"], tape["k"]), r_attention)
        r_q, r_k = (half / 2 for half in products)
        branch = torch.stack([r_q, r_k, r_v]).permute(1, 3, 0, 2, 4).flatten(2)
        r = ref_clone(tape["x"], skip, ref_linear(tape["normed"], attn.qkv.weight, branch))
    c = torch.linalg.multi_dot(bars) if len(bars) > 1 else bars[0]  # top block first
    return c[0, model.num_prefix_tokens :].reshape(model.patch_embed.grid_size)


SHAPES = {
    "plain": {},
    "one block": {"depth": 1},
    "two blocks": {"depth": 2},
    "layer scale": {"init_values": 0.1},
    "registers": {"reg_tokens": 4},
    "registers beside position": {"reg_tokens": 2, "no_embed_class": True, "init_values": 0.1},
    "no biases": {"qkv_bias": False, "proj_bias": False},
    "tanh GELU": {"act_layer": GELUTanh},
    "oblong": {"img_size": (12, 20)},
    "one channel": {"in_chans": 1},
    "dynamic size": {"dynamic_img_size": True},
    "a norm before the blocks": {"pre_norm": True},
    "torch LayerNorm": {"norm_layer": partial(torch.nn.LayerNorm, eps=1e-5)},
}


@pytest.mark.parametrize("kwargs", SHAPES.values(), ids=SHAPES.keys())
def test_maps_equal_the_slow_reference(kwargs):
    model = tiny_vit(**kwargs)
    images, targets = pixels(model)
    maps, logits = attribute(model, images, targets)
    expected = torch.stack([reference(model, images[i : i + 1], targets[i]) for i in range(len(images))])
    assert maps.shape == (len(images), *model.patch_embed.grid_size)
    assert worst_per_image(maps, expected).max() <= 1e-6
    assert relative_per_image(maps, expected).max() <= 1e-6  # raw, too: the method does not normalise
    torch.testing.assert_close(logits, model(images), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ["plain", "two blocks", "layer scale", "registers"])
def test_maps_of_the_other_split_equal_the_slow_reference(name):
    model = tiny_vit(**SHAPES[name])
    images, targets = pixels(model)
    maps = attribute(model, images, targets, split="magnitude").maps
    singly = [reference(model, images[i : i + 1], targets[i], ref_magnitude) for i in range(len(images))]
    assert relative_per_image(maps, torch.stack(singly)).max() <= 1e-9
    assert rank_correlation(maps, transformer_attribution(model, images, targets)).max() < 0.999  # another map


def test_a_layer_scale_is_part_of_the_linear_layer_before_it():
    model, folded = tiny_vit(init_values=0.1), tiny_vit()
    folded.load_state_dict({k: v for k, v in model.state_dict().items() if "gamma" not in k})
    with torch.no_grad():
        for block, plain in zip(model.blocks, folded.blocks, strict=True):
            for scale, layer in ((block.ls1, plain.attn.proj), (block.ls2, plain.mlp.fc2)):
                layer.weight.mul_(scale.gamma[:, None])
                layer.bias.mul_(scale.gamma)
    images, targets = pixels(model)
    maps = transformer_attribution(model, images, targets)
    assert relative_per_image(maps, transformer_attribution(folded, images, targets)).max() <= 1e-9


# ------------------------------------------------------------------------------------------------- golden values


@pytest.fixture(scope="module")
def golden():
    with np.load(GOLDEN) as file:
        values = {name: torch.from_numpy(file[name]) for name in file.files}
    img, patch, dim, depth, heads, classes = (int(n) for n in values["config"])
    model = VisionTransformer(
        img_size=img, patch_size=patch, embed_dim=dim, depth=depth, num_heads=heads, num_classes=classes
    )
    model.load_state_dict({name[2:]: value for name, value in values.items() if name.startswith("w/")})
    side = img // patch
    return (
        model.eval(),
        values["images"],
        values["targets"],
        values["relevance"].reshape(-1, side, side),
        values["logits"],
    )


def test_float64_maps_equal_the_public_implementation(golden):
    model, images, targets, expected, expected_logits = golden
    maps, logits = attribute(model.double(), images.double(), targets)
    worst = worst_per_image(maps, expected)
    assert worst.median() <= 1e-9 and worst.max() <= 1e-6
    assert relative_per_image(maps, expected).max() <= 1e-6
    torch.testing.assert_close(logits, expected_logits, rtol=1e-9, atol=1e-9)


def test_the_slow_reference_equals_the_public_implementation(golden):
    model, images, targets, expected, _ = golden
    some = range(0, 24, 4)
    maps = torch.stack([reference(model.double(), images[i : i + 1].double(), targets[i]) for i in some])
    assert worst_per_image(maps, expected[list(some)]).max() <= 1e-6


UNIT_ROUNDOFF = torch.finfo(torch.float32).eps / 2  # the largest relative error of rounding to float32


def maps_of_moved_values(model, images, targets, units, draws=5):
    """float64 maps after its pixels and weights moved by `units` roundoffs at most, [draws, B, h, w].

    Each draw moves every value on its own, uniformly and with a fixed seed.
    """

    def moved(values):
        noise = torch.rand(values.shape, generator=generator, dtype=torch.float64)
        return values * (1 + units * UNIT_ROUNDOFF * (2 * noise - 1))

    maps = []
    for seed in range(draws):
        generator = torch.Generator().manual_seed(seed)
        other = copy.deepcopy(model)
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.copy_(moved(parameter))
        maps.append(transformer_attribution(other, moved(images), targets))
    return torch.stack(maps)


def share_worse_than_noise(maps, exact, noisy):
    """The shares of the images whose `maps` have a larger difference, or a lower rank correlation, than noise leaves.

    What noise does to an image is the median over its draws, `noisy` [draws, B, h, w].
    """
    difference = torch.stack([worst_per_image(each, exact) for each in noisy]).median(0).values
    rank = torch.stack([rank_correlation(each, exact) for each in noisy]).median(0).values
    larger = worst_per_image(maps, exact) > difference
    lower = rank_correlation(maps, exact) < rank - 1e-12  # equal orders may differ by a rounding of the correlation
    return larger.double().mean(), lower.double().mean()


def test_float32_loses_no_more_than_rounded_pixels_and_weights_would(golden):
    """The method divides by numbers near zero, so a fixed bound on the loss would hold on some processors only.

    How near they come differs between images, and the map of an image with a large condition number may be anything in
    float32. So the loss is held against the conditioning of each image: the float64 maps after a little noise.
    """
    model, images, targets, _, _ = golden
    exact = transformer_attribution(model.double(), images.double(), targets)
    # Float32 rounds not only pixels and weights, by one unit at most, but every result in six blocks, and sums of up to
    # 384 terms in an order that is the processor's own. Over 24 permutations of the network's channels, each of which
    # has it sum in another order, and over four instruction sets the typical loss was that of 2 to 5 units; 16 leave
    # room for orders that round worse. Bfloat16 or TF32 in place of float32 acts like hundreds of units and more.
    noisy = maps_of_moved_values(model, images.double(), targets, units=16)
    maps = transformer_attribution(model.float(), images.float(), targets)
    assert maps.dtype == torch.float32
    # Half of the images: the median is not moved by the few whose error is a matter of luck.
    larger, lower = share_worse_than_noise(maps, exact, noisy)
    assert larger <= 0.5 and lower <= 0.5


def test_the_comparison_with_noise_finds_lost_precision(golden):
    """Products in bfloat16, on the way down alone, are already more than float32 may lose."""
    model, images, targets, _, _ = golden
    exact = transformer_attribution(model.double(), images.double(), targets)
    noisy = maps_of_moved_values(model, images.double(), targets, units=16)
    maps = attribute(model.float(), images.float(), targets, sweep="bfloat16").maps
    larger, lower = share_worse_than_noise(maps, exact, noisy)
    assert larger > 0.5 and lower > 0.5


@pytest.mark.parametrize(("sweep", "difference", "rank"), [("float32", 1e-5, 0.9999), ("bfloat16", 2e-2, 0.999)])
def test_rounding_on_the_way_down_does_little(golden, sweep, difference, rank):
    """What float32 loses, it loses in the forward: with that in float64 every image is near, not just the typical."""
    model, images, targets, expected, _ = golden
    maps, logits = attribute(model.double(), images.double(), targets, sweep=sweep)
    assert (maps.dtype, logits.dtype) == (torch.float32, torch.float64)
    assert worst_per_image(maps, expected).max() <= difference
    assert rank_correlation(maps, expected).min() >= rank


def test_a_bfloat16_sweep_under_a_float32_forward_loses_no_more_than_the_forward(golden):
    model, images, targets, expected, _ = golden
    maps = [attribute(model.float(), images.float(), targets, sweep=sweep).maps for sweep in ("model", "bfloat16")]
    plain, reduced = (rank_correlation(each, expected) for each in maps)
    assert not torch.equal(plain, reduced)
    # The median, not the worst: what float32 makes of an image with a large condition number is luck, and so is what
    # bfloat16 then makes of that. On the typical image bfloat16 swaps one or two pairs of neighbours among 64 cells,
    # which costs 4.6e-5 each; on the way up it would lose 1e-2.
    assert (plain - reduced).median() <= 1e-3


def test_splitting_by_magnitude_makes_maps_stable(golden):
    """Noise of a quarter of a grey level, which changes maps of the published rule, hardly changes these.

    They are the same maps as far as the published rule has them: they agree with its maps as well as these agree with
    those of the noisy images.
    """
    model, images, targets, expected, _ = golden
    model, images = model.double(), images.double()
    noise = torch.rand(images.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    noisy = images + (2 * noise - 1) * 0.25 / 255 / 0.35  # they were divided by 0.35
    maps, moved = (attribute(model, each, targets, split="magnitude").maps for each in (images, noisy))
    published_moved = transformer_attribution(model, noisy, targets)
    stable, published = rank_correlation(maps, moved), rank_correlation(expected, published_moved)
    assert stable.min() > 0.98 and published.quantile(0.1) < 0.9
    assert worst_per_image(maps, moved).max() < 0.1 < worst_per_image(expected, published_moved).max()
    assert rank_correlation(maps, expected).median() > 0.95
    single = attribute(model.float(), images.float(), targets, split="magnitude").maps
    assert rank_correlation(maps, single).min() > 0.999


def test_an_unknown_or_impossible_sweep_or_split_is_refused():
    model = tiny_vit(dtype=torch.float32)
    images, targets = pixels(model)
    with pytest.raises(ValueError, match="split='mean': choose one of sum, magnitude"):
        attribute(model, images, targets, split="mean")
    with pytest.raises(ValueError, match="float16'.*choose one of model, float32, tf32, bfloat16"):
        attribute(model, images, targets, sweep="float16")
    with pytest.raises(ValueError, match="CUDA"):
        attribute(model, images, targets, sweep="tf32")


# ------------------------------------------------------------------------------------- batches, dtype, side effects


def test_a_map_does_not_depend_on_its_neighbours():
    model = tiny_vit(reg_tokens=1)
    images, targets = pixels(model, batch=7)
    together = transformer_attribution(model, images, targets)
    alone = torch.cat([transformer_attribution(model, images[i : i + 1], targets[i : i + 1]) for i in range(7)])
    order = torch.tensor([3, 0, 6, 1, 5, 2, 4])
    shuffled = transformer_attribution(model, images[order], targets[order])
    # One bright neighbour would own every sum that runs over the batch.
    bright = torch.cat([images[:2], images[2:3] * 100])
    beside_bright = transformer_attribution(model, bright, targets[:3])[:2]
    assert relative_per_image(alone, together).median() <= 1e-9
    assert relative_per_image(shuffled, together[order]).median() <= 1e-9
    assert relative_per_image(beside_bright, together[:2]).max() <= 1e-7


def test_the_target_class_is_per_image():
    model = tiny_vit()
    images, _ = pixels(model, batch=1)
    maps = transformer_attribution(model, images.repeat(5, 1, 1, 1), torch.arange(5))
    for target in range(5):
        alone = transformer_attribution(model, images, torch.tensor([target]))
        assert relative_per_image(maps[target : target + 1], alone).max() <= 1e-7
    assert relative_per_image(maps[:1], maps[1:2]).max() > 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_dtype_is_the_models(dtype):
    model = tiny_vit(dtype=dtype)
    maps, logits = attribute(model, *pixels(model))
    assert maps.dtype == logits.dtype == dtype and maps.isfinite().all()


def test_an_empty_batch_gives_empty_maps():
    model = tiny_vit()
    maps, logits = attribute(model, *pixels(model, batch=0))
    assert maps.shape == (0, 4, 4) and logits.shape == (0, 5)


def test_autocast_and_grad_modes_change_nothing():
    model = tiny_vit(dtype=torch.float32)
    images, targets = pixels(model)
    plain = transformer_attribution(model, images, targets)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(transformer_attribution(model, images, targets), plain)
    with torch.enable_grad():
        tracked = transformer_attribution(model, images.clone().requires_grad_(), targets)
    assert torch.equal(tracked, plain) and not tracked.requires_grad
    with torch.inference_mode():
        assert torch.equal(transformer_attribution(model, images, targets), plain)


def test_the_model_and_the_images_are_left_as_they_were():
    model = tiny_vit(init_values=0.1)
    images, targets = pixels(model)
    state, kept = {k: v.clone() for k, v in model.state_dict().items()}, images.clone()
    attributes = {name: set(vars(module)) for name, module in model.named_modules()}
    fused = [block.attn.fused_attn for block in model.blocks]
    transformer_attribution(model, images, targets)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert torch.equal(images, kept) and all(p.grad is None and p.requires_grad for p in model.parameters())
    assert {name: set(vars(module)) for name, module in model.named_modules()} == attributes
    assert [block.attn.fused_attn for block in model.blocks] == fused
    assert not any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in model.modules())


def test_threads_may_share_a_model():
    model = tiny_vit()
    batches = [pixels(model, seed=seed) for seed in range(8)]
    expected = [transformer_attribution(model, *batch) for batch in batches]
    with ThreadPoolExecutor(4) as pool:
        maps = list(pool.map(lambda batch: transformer_attribution(model, *batch), batches))
    assert all(torch.equal(a, b) for a, b in zip(maps, expected, strict=True))


def test_no_product_is_wasted():
    # DeiT's own proportions (197 tokens, 12 blocks) at a narrower width, where attention weighs more than in DeiT-B.
    model = tiny_vit(dtype=torch.float32, img_size=224, patch_size=16, embed_dim=192, depth=12, num_classes=1000)
    images, targets = pixels(model, batch=1)
    with FlopCounterMode(display=False) as forward, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        model(images)
    with FlopCounterMode(display=False) as attribution:
        transformer_attribution(model, images, targets)
    assert attribution.get_total_flops() <= 4.47 * forward.get_total_flops()


# ---------------------------------------------------------------------------------------------------------- rules

sizes = st.integers(1, 6)
few = settings(max_examples=60, deadline=None)


@st.composite
def tensors(draw, *shapes, signs=False):
    """Normal values, float64; with `signs`, some draws are all of one sign or hold exact zeros."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    drawn = []
    for shape in shapes:
        value = torch.randn(shape, generator=generator, dtype=torch.float64)
        kind = draw(st.sampled_from(["any", "positive", "negative", "zeros"])) if signs else "any"
        value = {"any": value, "positive": value.abs(), "negative": -value.abs(), "zeros": value.clamp(min=0)}[kind]
        drawn.append(value)
    return drawn


def kept(r, z):
    """What the guard leaves of relevance that meets Z."""
    return ref_divide(r, z) * z


@few
@given(st.data(), sizes, sizes, sizes)
def test_linear_rule_conserves(data, tokens, n_in, n_out):
    x, weight, r = data.draw(tensors((2, tokens, n_in), (n_out, n_in), (2, tokens, n_out), signs=True))
    relevance = linear_rule(x, x @ weight.T, weight, r)
    z = ref_positive(x, weight)
    z = torch.where(z.abs() <= 1e-12, 0, z)  # an output that nothing speaks for passes nothing on
    torch.testing.assert_close(relevance, ref_linear(x, weight, r * (z != 0)), rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(relevance.sum(-1), kept(r, z).sum(-1), rtol=1e-8, atol=1e-8)


def test_linear_rule_gives_nothing_for_an_output_that_no_input_speaks_for():
    x, weight = torch.tensor([[0.1, 0.7, 0.3]]), torch.tensor([[-0.3, -0.9, -0.1]])
    assert linear_rule(x, x @ weight.T, weight, torch.ones(1, 1)).eq(0).all()


@few
@given(st.data(), sizes, sizes, sizes)
def test_matmul_rule_conserves(data, m, k, n):
    a, b, r = data.draw(tensors((2, 3, m, k), (2, 3, k, n), (2, 3, m, n)))
    r_a, r_b = matmul_rule(a, b, a @ b, r)
    scale = ref_divide(r, a @ b).abs()  # grows where the product is near zero, and rounding with it
    tolerance = 1e-12 * float((scale * (a.abs() @ b.abs())).sum() + 1)
    half = kept(r, a @ b).sum((-1, -2)) / 2
    torch.testing.assert_close(r_a.sum((-1, -2)), half, rtol=0, atol=tolerance)
    torch.testing.assert_close(r_b.sum((-1, -2)), half, rtol=0, atol=tolerance)


@few
@given(st.data(), st.integers(1, 4), sizes, sizes)
def test_residual_rule_conserves_per_image(data, batch, tokens, dim):
    a, b, r = data.draw(tensors(*[(batch, tokens, dim)] * 3))
    r_a, r_b = residual_rule(a, b, a + b, r)
    s = ref_divide(r, a + b)
    for i in range(batch):
        incoming = r[i].sum()
        shares = (a[i] * s[i]).sum().abs(), (b[i] * s[i]).sum().abs()
        # the guard takes 1e-9 over the smaller sum, which may itself be near zero
        slack = 1e-7 * (1 + 1 / min(shares)) * (1 + incoming.abs())
        assert (r_a[i].sum() + r_b[i].sum() - incoming).abs() <= slack
        assert (r_a[i].sum() * shares[1] - r_b[i].sum() * shares[0]).abs() <= slack * sum(shares)
        alone = residual_rule(a[i : i + 1], b[i : i + 1], (a + b)[i : i + 1], r[i : i + 1])
        torch.testing.assert_close(r_a[i], alone[0][0], rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(r_b[i], alone[1][0], rtol=1e-9, atol=1e-12)


@few
@given(st.data(), sizes, sizes)
def test_magnitude_rule_conserves_and_grows_nothing(data, tokens, dim):
    a, b, r = data.draw(tensors(*[(2, tokens, dim)] * 3))
    r_a, r_b = magnitude_rule(a, b, a + b, r)
    torch.testing.assert_close(r_a + r_b, r)
    assert (r_a.abs() <= r.abs()).all() and (r_b.abs() <= r.abs()).all()
    same = torch.full_like(r, 3.0), torch.full_like(r, 1.0)
    torch.testing.assert_close(magnitude_rule(*same, sum(same), r)[0], r * 0.75)  # of one sign: a / (a + b)


def test_clone_rule_passes_relevance_except_where_the_value_is_tiny():
    x = torch.tensor([2.0, -0.5, 0.0, 1e-9], dtype=torch.float64)
    expected = torch.tensor([3.0, 3.0, 0.0, 1.5], dtype=torch.float64)
    torch.testing.assert_close(clone_rule(x, torch.full_like(x, 3)), expected, rtol=1e-8, atol=0)


def test_guarded_divide_is_finite_where_the_guard_cancels_the_denominator():
    b = torch.tensor([0.0, -1e-9, 1.0], dtype=torch.float64)
    expected = torch.tensor([0.0, 1e9, 1.0], dtype=torch.float64)
    torch.testing.assert_close(guarded_divide(torch.ones_like(b), b), expected)


# ---------------------------------------------------------------------------------------------- refusals, bad input

REFUSED = {
    "global_pool='avg'": {"global_pool": "avg"},
    "global_pool='map'": {"global_pool": "map"},
    "class_token=False": {"class_token": False, "global_pool": ""},
    "fc_norm": {"fc_norm": True},
    "num_classes=0": {"num_classes": 0},
    "qk_norm": {"qk_norm": True},
    "attn.norm": {"scale_attn_norm": True},
    "mlp.norm": {"scale_mlp_norm": True},
    "mlp.act": {"act_layer": torch.nn.SiLU},
    "SwiGLU": {"mlp_layer": SwiGLU},
    "ParallelScalingBlock": {"block_fn": ParallelScalingBlock},
    "DiffAttention": {"attn_layer": "diff", "num_heads": 2},
    "RmsNorm": {"norm_layer": RmsNorm},
    "dynamic_img_pad": {"dynamic_img_size": True, "dynamic_img_pad": True},
}


@pytest.mark.parametrize("part", REFUSED)
def test_a_part_without_a_rule_is_refused_by_name(part):
    model = tiny_vit(**REFUSED[part])
    with pytest.raises(ValueError, match=part) as error:
        check_supported(model)
    assert "\n" not in str(error.value)


def test_other_models_are_refused_by_name():
    distilled = VisionTransformerDistilled(img_size=16, patch_size=4, embed_dim=24, depth=1, num_heads=3)
    with pytest.raises(ValueError, match="VisionTransformerDistilled"):
        check_supported(distilled)
    with pytest.raises(ValueError, match="Linear"):
        check_supported(torch.nn.Linear(2, 2))
    model = tiny_vit()
    model.blocks[1].attn.gate = torch.nn.Linear(24, 24)
    with pytest.raises(ValueError, match=r"blocks\.1\.attn\.gate"):
        check_supported(model)
    model = tiny_vit()
    torch.nn.utils.parametrizations.weight_norm(model.blocks[2].mlp.fc1)
    with pytest.raises(ValueError, match=r"blocks\.2\.mlp\.fc1"):
        check_supported(model)


def test_supported_models_pass_the_check():
    for kwargs in SHAPES.values():
        check_supported(tiny_vit(**kwargs))


def test_an_unsupported_model_is_refused_before_its_images_are_looked_at():
    with pytest.raises(ValueError, match="qk_norm"):
        transformer_attribution(tiny_vit(qk_norm=True), None, None)


def bad(model, images, targets, case):
    broken = images.clone()
    broken[1, 0, 3, 3] = torch.nan
    return {
        "shape": (images[:, :, :12], targets),
        r"\[B, 3, 16, 16\]": (images[:, :1], targets),
        "images have shape": (images[0], targets),
        "float32": (images.float(), targets),
        "image 1 ": (broken, targets),
        "infinite": (images / 0, targets),
        "class 5 is outside 0..4": (images, torch.tensor([0, 5, 1])),
        "class -1 is outside": (images, torch.tensor([0, 1, -1])),
        "integers": (images, targets.double()),
        "targets have shape": (images, targets[:2]),
        "3 images need": (images, targets[:, None, None]),
        r"targets have shape \[3, 0\]": (images, targets[:, None][:, :0]),
        "meta": (images.to("meta"), targets),
    }[case]


BAD = (
    "shape", r"\[B, 3, 16, 16\]", "images have shape", "float32", "image 1 ", "infinite", "class 5 is outside 0..4",
    "class -1 is outside", "integers", "targets have shape", "3 images need", r"targets have shape \[3, 0\]", "meta",
)  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line(case):
    model = tiny_vit()
    images, targets = bad(model, *pixels(model), case)
    with pytest.raises(ValueError, match=case) as error:
        transformer_attribution(model, images, targets)
    assert "\n" not in str(error.value)


def test_a_model_in_train_mode_or_of_mixed_dtype_is_refused():
    model = tiny_vit()
    batch = pixels(model)
    with pytest.raises(ValueError, match="train mode"):
        transformer_attribution(model.train(), *batch)
    model.eval().blocks[1].mlp.train()
    with pytest.raises(ValueError, match=r"train mode \(blocks\.1\.mlp"):
        transformer_attribution(model, *batch)
    model.eval().blocks[0].attn.proj.float()
    with pytest.raises(ValueError, match=r"mixes dtypes or devices: blocks\.0\.attn\.proj\.weight"):
        transformer_attribution(model, *batch)
