"""ZoomViT: equal to the ViT it starts from, independent of its batch, with one-line errors for bad input."""

from __future__ import annotations

from functools import partial

import onnxruntime
import pytest
import timm
import timm.optim
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.models.vision_transformer import VisionTransformer
from torch import nn

import zpipe.train.models as models
from zpipe.train.macs import count_macs
from zpipe.train.models import zoom_tokens as zt
from zpipe.train.models.warm_start import load_vit
from zpipe.train.models.zoomvit import ZoomViT

torch.set_num_threads(1)
SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3, "num_classes": 5}
FACTORS = pytest.mark.parametrize("factor", zt.ZOOM_FACTORS)


def shake(module: nn.Module, seed: int = 0) -> nn.Module:
    """Weights large enough that every one of them shows in the logits."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in module.named_parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * (0.1 if p.ndim > 1 else 0.3))
            if "norm" in name and name.endswith("weight"):
                p.add_(1)
    return module


def small(factor: float = 2.0, **kwargs) -> ZoomViT:
    return shake(ZoomViT(**SMALL | {"zoom_factor": factor} | kwargs)).eval()


def batch(seed: int = 0, n: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 3, 32, 32, generator=generator), torch.rand(n, 16, generator=generator) ** 2


# -- equal to the ViT it starts from -----------------------------------------------------------------------------------


def vit(**kwargs) -> VisionTransformer:
    return shake(VisionTransformer(**SMALL | kwargs), seed=1).eval()


def zooming_off(factor: float) -> dict:
    """Arguments with which every token is one patch of the plain ViT."""
    return {"alpha": 1.0} if factor == 2.0 else {"budget": 4}


@FACTORS
@pytest.mark.parametrize("zfe", zt.ZFE_KINDS)
@pytest.mark.parametrize("options", [{}, {"init_values": 0.5}, {"no_embed_class": True}])
@torch.no_grad()
def test_warm_start_has_the_logits_of_the_vit(factor, zfe, options):
    source = vit(**options)
    model = small(factor, zfe=zfe, init_values=options.get("init_values"))
    report = load_vit(model, source)
    images, scores = batch()
    assert source(images).std() > 0.1
    torch.testing.assert_close(model(images, scores, **zooming_off(factor)), source(images), atol=1e-5, rtol=1e-5)
    assert set(report.filled) == set(model.state_dict()) and not report.left
    assert not torch.allclose(model(images, scores, budget=2), source(images), atol=1e-3)


@torch.no_grad()
def test_warm_start_of_a_real_size_from_a_state_dict():
    # In float64: the logits are equal but for rounding, which grows with the width and the depth. In float32, where the
    # sums are over hundreds of terms, it comes within a factor of two of 1e-5.
    source = shake(timm.create_model("deit_tiny_patch16_224", depth=3)).eval().double()
    model = timm.create_model("zoomvit_tiny_patch16_224", depth=3, zoom_factor=2.0).eval().double()
    load_vit(model, source.state_dict())
    images, scores = torch.randn(1, 3, 224, 224).double(), torch.rand(1, 196).double()
    torch.testing.assert_close(model(images, scores, alpha=1.0), source(images), atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(model(images), source(images), atol=1e-10, rtol=1e-10)


def test_warm_start_from_layer_scale_names_the_remedy():
    with pytest.raises(ValueError, match="blocks.0.ls1.gamma is only in one of them; give the model init_values=1e-4"):
        load_vit(small(), vit(init_values=1e-4))


@pytest.mark.parametrize("size", ["small", "base"])
@torch.no_grad()
def test_warm_start_from_deit3(size):
    source = shake(timm.create_model(f"deit3_{size}_patch16_224", depth=2)).eval().double()
    model = timm.create_model(f"zoomvit_{size}_patch16_224", depth=2, init_values=1e-4).eval().double()
    report = load_vit(model, source)
    assert not report.left and not model.pos_cls.any()
    images, scores = torch.randn(2, 3, 224, 224).double(), torch.rand(2, 196).double()
    torch.testing.assert_close(model(images, scores, alpha=1.0), source(images), atol=1e-10, rtol=1e-10)


@torch.no_grad()
def test_warm_start_interpolates_positions_in_place():
    source = vit()
    ramp = torch.arange(4.0)
    y, x = torch.meshgrid(ramp, ramp, indexing="ij")
    source.pos_embed[0, 1:, 0], source.pos_embed[0, 1:, 1] = y.flatten(), x.flatten()

    model = small(2.0)
    load_vit(model, source)
    fine = model.pos_fine[0, :, :2].reshape(8, 8, 2)
    centres = (torch.arange(8) + 0.5) / 2 - 0.5  # of the fine cells, in coarse cells
    inner = slice(3, 5)  # away from the border, where interpolation runs out of neighbours
    torch.testing.assert_close(fine[inner, 0, 0], centres[inner], atol=1e-5, rtol=0)
    torch.testing.assert_close(fine[0, inner, 1], centres[inner], atol=1e-5, rtol=0)

    model = small(0.5)
    load_vit(model, source)
    assert model.pos_coarse[0, :, :2].tolist() == [[0.5, 0.5], [0.5, 2.5], [2.5, 0.5], [2.5, 2.5]]


def test_warm_start_says_what_it_left():
    model = small(num_classes=7)
    head = model.head.weight.clone()
    assert load_vit(model, vit()).left == ("head: the ViT has 5 classes, the model 7",)
    assert torch.equal(model.head.weight, head)

    distilled = vit().state_dict()
    distilled["dist_token"] = torch.zeros(1, 1, 24)
    distilled["pos_embed"] = torch.randn(1, 18, 24)
    model = small()
    assert load_vit(model, distilled).left == ("dist_token: ZoomViT has no distillation token",)
    assert torch.equal(model.pos_coarse[0], distilled["pos_embed"][0, 2:])

    model = small(pos="sincos")
    table = model.pos_coarse.clone()
    assert load_vit(model, vit()).left == ("pos_embed: the model's positions are fixed",)
    assert torch.equal(model.pos_coarse, table)


@torch.no_grad()
def test_warm_start_from_another_image_size_resizes_positions():
    source = vit(img_size=64)
    source.pos_embed[:, 1:] = source.pos_embed[:, 1:2]  # constant over the grid
    model = small()
    load_vit(model, source)
    assert model.pos_coarse.shape == (1, 16, 24)
    torch.testing.assert_close(model.pos_fine, source.pos_embed[:, 1:2].expand(-1, 64, -1), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depth": 3}, "not built alike: blocks.2"),
        ({"init_values": 1e-4}, "not built alike: blocks.0.ls1.gamma"),
        ({"embed_dim": 48}, "cls_token: the ViT has"),
        ({"patch_size": 4}, "patch_embed.weight: the ViT has"),
        ({"reg_tokens": 2, "no_embed_class": True}, "not built alike: reg_token"),
        ({"global_pool": "avg"}, "not built alike: fc_norm"),
    ],
)
def test_warm_start_refuses_another_architecture_and_touches_nothing(options, message):
    model = small()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        load_vit(model, vit(**options))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with pytest.raises(ValueError, match="no cls_token"):
        load_vit(model, {"model": {}})


# -- the zoom factor embedding cancels ---------------------------------------------------------------------------------


@FACTORS
@torch.no_grad()
def test_zoom_factor_embedding_leaves_the_logits_alone(factor):
    images, scores = batch()
    plain, fixed, soft = (small(factor, zfe=zfe, init_values=0.5).double() for zfe in zt.ZFE_KINDS)
    arguments = {"images": images.double(), "scores": scores.double(), "alpha": 0.3, "keep_tokens": 12}
    logits = plain(**arguments)
    assert logits.std() > 0.1
    # It does enter: the tokens differ by the same number in every channel, which the first LayerNorm removes.
    for model in (fixed, soft):
        for bare, group in zip(plain.tokenise(**arguments).groups(), model.tokenise(**arguments).groups(), strict=True):
            added = group.tokens - bare.tokens
            assert added[:, 1:].abs().max() > 0.1 and not added[:, 0].any()
            torch.testing.assert_close(added, added[..., :1].expand_as(added), atol=1e-12, rtol=0)
        torch.testing.assert_close(model(**arguments), logits, atol=1e-12, rtol=0)


# -- batches -----------------------------------------------------------------------------------------------------------


@FACTORS
@pytest.mark.parametrize("choice", [{"alpha": 0.4}, {"budget": 2}, {"alpha": 0.2, "keep_tokens": 7}])
@torch.no_grad()
def test_logits_do_not_depend_on_the_rest_of_the_batch(factor, choice):
    model = small(factor)
    images, scores = batch(n=8)
    together = model(images, scores, **choice)
    counts = model.token_counts(scores, **choice)
    if choice == {"alpha": 0.4}:
        assert len(counts.unique()) > 1
    alone = torch.cat([model(images[i : i + 1], scores[i : i + 1], **choice) for i in range(8)])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)
    shuffle = torch.tensor([3, 1, 7, 0, 5, 2, 6, 4])
    torch.testing.assert_close(model(images[shuffle], scores[shuffle], **choice), together[shuffle], atol=1e-5, rtol=0)


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from(zt.ZOOM_FACTORS),
    st.integers(0, 10**6),
    st.floats(0, 1),
    st.one_of(st.none(), st.integers(1, 16)),
)
def test_groups_hold_every_image_once_with_its_token_count(factor, seed, alpha, keep):
    model = small(factor)
    images, scores = batch(seed, n=4)
    counts = model.token_counts(scores, alpha, keep)
    assert counts.dtype == torch.int64
    zoomed = (zt.coarse_scores(scores, factor) > alpha).sum(1)
    expected = model.coarse_grid**2 + 3 * zoomed
    assert torch.equal(counts, expected if keep is None else expected.clamp(max=keep))
    groups = model.tokenise(images, scores, alpha, keep).groups()
    assert sorted(torch.cat([group.index for group in groups]).tolist()) == list(range(4))
    for group in groups:
        assert (counts[group.index] == group.ids.shape[1]).all()
        assert group.tokens.shape == (len(group.index), 1 + group.ids.shape[1], 24)


@FACTORS
@pytest.mark.parametrize("prune", [None, *zt.PRUNE_KINDS])
@torch.no_grad()
def test_fixed_shapes_give_what_packing_gives(factor, prune):
    model = small(factor)
    images, _ = batch(n=4)
    scores = torch.rand(4, 16)  # no ties: a threshold between the scores of the best cells takes as many as a budget
    cells = zt.coarse_scores(scores, factor).sort(1, descending=True).values
    budget = 2
    arguments = {} if prune is None else {"keep_tokens": 6, "prune": prune}
    for b in range(4):
        alpha = float((cells[b, budget - 1] + cells[b, budget]) / 2)
        by_threshold = model(images[b : b + 1], scores[b : b + 1], alpha=alpha, **arguments)
        by_budget = model(images, scores, budget=budget, **arguments)[b : b + 1]
        torch.testing.assert_close(by_threshold, by_budget, atol=1e-5, rtol=1e-5)


@FACTORS
@torch.no_grad()
def test_budgets_in_tokens_and_multiply_adds(factor):
    model = small(factor)
    images, scores = batch()
    cells = model.coarse_grid**2
    for k in (0, 1, cells):
        assert model.resolve_budget(k) == model.resolve_budget(f"{k} cells") == k
        assert model.resolve_budget(f"{cells + 3 * k} tokens") == k
        assert model.resolve_budget(f"{cells + 3 * k + 2} tokens") == k
        gmacs = model.macs(k) / 1e9
        assert model.resolve_budget(f"{gmacs + 1e-12:.12f} G") == k
    assert torch.equal(model(images, scores, budget=f"{cells + 6} tokens"), model(images, scores, budget=2))
    for budget, message in (
        (f"{cells - 1} tokens", f"below the {cells} tokens of an image with nothing zoomed"),
        ("0.0000001 GMACs", "below the .* GMACs"),
        (f"{4 * cells + 3} tokens", f"above the {4 * cells} tokens of an image with everything zoomed"),
        (f"{3 * model.macs(cells) / 1e9:.6f} G", "above the .* GMACs"),
        ("1000 cells", "budget must lie between 0 and"),
        ("much", "is none"),
    ):
        with pytest.raises(ValueError, match=message):
            model(images, scores, budget=budget)


@FACTORS
@torch.no_grad()
def test_tokens_are_patch_plus_position(factor):
    model = small(factor, zfe="none")
    images, scores = batch()
    fine, fine_kernel, coarse, coarse_kernel = zt.patches_and_kernels(images, model.patch_embed.weight, factor)
    table = torch.cat([fine @ fine_kernel.T + model.pos_fine, coarse @ coarse_kernel.T + model.pos_coarse], dim=1)
    table = table + model.patch_embed.bias  # [B, 5C, E], by token id
    for group in model.tokenise(images, scores, alpha=0.4).groups():
        for image, ids, tokens in zip(group.index, group.ids, group.tokens, strict=True):
            torch.testing.assert_close(tokens[1:], table[image, ids], atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(tokens[:1], (model.cls_token + model.pos_cls)[0])


@FACTORS
def test_only_the_kept_pixels_matter(factor):
    model = small(factor)
    images, scores = batch(n=3)
    images.requires_grad_()
    model(images, scores, alpha=0.3).square().sum().backward()
    assert bool((images.grad.abs().sum(1) > 0).all())  # every pixel is covered

    images.grad = None
    groups = model.tokenise(images, scores, alpha=0.3, keep_tokens=5).groups()
    model(images, scores, alpha=0.3, keep_tokens=5).square().sum().backward()
    kept = torch.zeros(3, 32, 32, dtype=torch.bool)
    for group in groups:
        boxes = zt.token_boxes(group.ids, model.coarse_grid, 32)
        for image, rows in zip(group.index.tolist(), boxes.tolist(), strict=True):
            for left, top, right, bottom in rows:
                kept[image, top:bottom, left:right] = True
    assert torch.equal(images.grad.abs().sum(1) > 0, kept)


@torch.no_grad()
def test_without_scores_nothing_is_zoomed():
    model = small()
    images, scores = batch()
    expected = model(images, scores, alpha=1.0)
    torch.testing.assert_close(model(images), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(model(images, alpha=0.0), expected, atol=1e-5, rtol=1e-5)


# -- training ----------------------------------------------------------------------------------------------------------


@FACTORS
def test_gradients_reach_every_parameter_and_no_score(factor):
    model = small(factor, init_values=0.5).train()
    images, scores = batch()
    scores.requires_grad_()
    model(images, scores, alpha=0.4).square().sum().backward()
    assert scores.grad is None
    for name, p in model.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all() and p.grad.abs().sum() > 0, name


def test_parameters_of_absent_tokens_still_get_a_gradient():
    model = small().train()  # a data-parallel trainer waits for the gradient of every parameter
    model(batch()[0]).sum().backward()
    assert model.pos_fine.grad is not None and not model.pos_fine.grad.any()


def test_training_with_random_alpha_learns_a_batch():
    torch.manual_seed(0)
    model = ZoomViT(**SMALL, drop_path_rate=0.1).train()
    images, scores = batch(n=10)
    labels = torch.arange(10) % 5
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(80):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images, scores, alpha=torch.rand(()).item()), labels).backward()
        optimizer.step()
    accuracies = [(model.eval()(images, scores, alpha=alpha).argmax(1) == labels).float().mean() for alpha in (0.1, 1)]
    assert min(accuracies) >= 0.9


@torch.no_grad()
def test_half_precision():
    model = small()
    images, scores = batch()
    exact = model(images, scores, alpha=0.4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(model(images, scores, alpha=0.4).float(), exact, atol=0.2, rtol=0.05)
    halved = model.bfloat16()(images.bfloat16(), scores, alpha=0.4)
    assert halved.dtype == torch.bfloat16
    torch.testing.assert_close(halved.float(), exact, atol=0.2, rtol=0.05)


def test_fixed_positions_are_no_parameters_and_align_in_space():
    zooming, merging = (ZoomViT(**SMALL, zoom_factor=factor, pos="sincos") for factor in zt.ZOOM_FACTORS)
    assert not any(name.startswith("pos_") for model in (zooming, merging) for name, _ in model.named_parameters())
    # One scale for all grids, in score cells of 8 pixels: a token lies where the centre of its pixels lies.
    for model in (zooming, merging):
        boxes = zt.token_boxes(torch.arange(5 * model.coarse_grid**2), model.coarse_grid, 32)
        centre = (boxes[:, :2] + boxes[:, 2:]) / 2 / 8 - 0.5  # (x, y)
        table = torch.cat([model.pos_fine[0], model.pos_coarse[0]])  # channels: sine and cosine of y, then of x
        torch.testing.assert_close(table[:, 0], centre[:, 1].sin())
        torch.testing.assert_close(table[:, 12], centre[:, 0].sin())
        torch.testing.assert_close(table[:, 18], centre[:, 0].cos())
    assert ZoomViT(**SMALL).pos_coarse.requires_grad
    torch.testing.assert_close(ZoomViT(**SMALL).pos_coarse.data, zooming.pos_coarse)
    assert len({tuple(row) for row in zooming.pos_fine[0].tolist()}) == 64


def test_one_dimensional_positions_are_those_of_the_release():
    model = ZoomViT(**SMALL, pos="sincos-1d")
    assert not any(name.startswith("pos_") for name, _ in model.named_parameters())
    for table, first in ((model.pos_cls, 0), (model.pos_coarse, 1), (model.pos_fine, 1)):
        place = torch.arange(first, first + table.shape[1], dtype=torch.float64)
        for channel in range(12):
            angle = place / 10000 ** (channel / 12)
            torch.testing.assert_close(table[0, :, 2 * channel], angle.sin().float())
            torch.testing.assert_close(table[0, :, 2 * channel + 1], angle.cos().float())


# -- timm --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "factor", "params"),
    [
        ("zoomvit_tiny_patch16_224", 2.0, 5.868),
        ("zoomvit_small_patch16_224", 2.0, 22.352),
        ("zoomvit_small_patch16_224", 0.5, 22.069),
        ("zoomvit_base_patch16_224", 2.0, 87.170),
    ],
)
def test_registry(name, factor, params):
    assert name in timm.list_models("zoomvit*")
    with torch.device("meta"):
        model = timm.create_model(name, zoom_factor=factor)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(params, abs=5e-4)
    assert (model.score_grid, model.coarse_grid) == ((14, 14) if factor == 2.0 else (14, 7))
    assert timm.data.resolve_model_data_config(model)["input_size"] == (3, 224, 224)


def test_registry_takes_every_argument():
    model = timm.create_model("zoomvit_small_patch16_224", **SMALL, zoom_factor=0.5, zfe="fixed", init_values=1e-4)
    assert isinstance(model, models.ZoomViT)
    assert (model.img_size, model.zfe, len(model.blocks), model.head.out_features) == (32, "fixed", 2, 5)
    model.reset_classifier(3)
    assert model(*batch(), alpha=0.5).shape == (6, 3)
    groups = timm.optim.param_groups_weight_decay(model, 0.05, no_weight_decay_list=model.no_weight_decay())
    decayed = {id(p) for p in groups[1]["params"]}
    assert id(model.pos_fine) not in decayed and id(model.patch_embed.weight) in decayed
    with pytest.raises(RuntimeError, match="No pretrained weights exist"):
        timm.create_model("zoomvit_small_patch16_224", pretrained=True)


@pytest.mark.parametrize(("factor", "budget"), [(2.0, 0), (2.0, 20), (2.0, 196), (0.5, 0), (0.5, 15), (0.5, 49)])
@torch.no_grad()
def test_multiply_adds_are_those_of_the_tokens_present(factor, budget):
    depth, width = 2, 192
    model = timm.create_model("zoomvit_tiny_patch16_224", depth=depth, zoom_factor=factor).eval()
    scores = torch.rand(1, 196)
    counted = count_macs(lambda: model(torch.rand(1, 3, 224, 224), scores, budget=budget))
    fine, coarse = 4 * budget, model.coarse_grid**2 - budget
    assert model.token_counts(scores, budget=budget).tolist() == [fine + coarse]
    embedding = width * 768 * (coarse + (fine / 4 if factor == 2.0 else fine))  # a half-size patch has a quarter
    length = 1 + fine + coarse
    block = 12 * length * width**2 + 2 * length**2 * width
    assert counted == embedding + depth * block + width * 1000
    assert counted == model.macs(budget)
    for keep in (30, 100):
        zoom = {"budget": budget, "keep_tokens": keep}
        assert count_macs(partial(model, torch.rand(1, 3, 224, 224), scores, **zoom)) == model.macs(budget, keep)
    if (factor, budget) in ((2.0, 0), (0.5, 49)):
        plain = timm.create_model("deit_tiny_patch16_224", depth=depth).eval()
        assert counted == count_macs(lambda: plain(torch.rand(1, 3, 224, 224)))


# -- compiled and exported --------------------------------------------------------------------------------------------


class Bound(nn.Module):
    """A ZoomViT under a fixed budget: images and scores in, logits out."""

    def __init__(self, model, **zoom):
        super().__init__()
        self.model, self.zoom = model, zoom
        self.eval()

    def forward(self, images, scores):
        return self.model(images, scores, **self.zoom)


BUDGETS = pytest.mark.parametrize("zoom", [{"budget": 0}, {"budget": 3}, {"budget": 3, "keep_tokens": 9}])


@FACTORS
@torch.no_grad()
def test_compiled_in_one_graph(factor):
    model = small(factor)
    images, scores = batch()
    compiled = torch.compile(Bound(model, budget=3), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(images, scores), model(images, scores, budget=3), atol=1e-5, rtol=1e-5)


@FACTORS
@BUDGETS
@torch.no_grad()
def test_exported_with_any_batch_size(factor, zoom):
    model = small(factor)
    images, scores = batch()
    any_batch = torch.export.Dim("batch", min=1)
    shapes = {"images": {0: any_batch}, "scores": {0: any_batch}}
    program = torch.export.export(Bound(model, **zoom), (images, scores), dynamic_shapes=shapes)
    for n in (2, 5):
        images, scores = batch(seed=n, n=n)
        expected = model(images, scores, **zoom)
        torch.testing.assert_close(program.module()(images, scores), expected, atol=1e-5, rtol=1e-5)


@FACTORS
@BUDGETS
@torch.no_grad()
def test_onnx(factor, zoom, tmp_path):
    model = small(factor)
    images, scores = batch()
    scores[0] = 0.5  # ties must fall the same way
    path = tmp_path / "model.onnx"
    any_batch = torch.export.Dim("batch", min=1)
    shapes = {"images": {0: any_batch}, "scores": {0: any_batch}}
    torch.onnx.export(Bound(model, **zoom), (images, scores), path, dynamic_shapes=shapes, verbose=False)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    for n in (1, 4):
        (logits,) = session.run(None, {"images": images[:n].numpy(), "scores": scores[:n].numpy()})
        expected = model(images[:n], scores[:n], **zoom)
        torch.testing.assert_close(torch.from_numpy(logits), expected, atol=1e-4, rtol=1e-4)


# -- bad input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"alpha": 1.5}, r"alpha must lie in \[0, 1\], got 1.5"),
        ({"alpha": -0.1}, r"alpha must lie in \[0, 1\]"),
        ({"alpha": float("nan")}, r"alpha must lie in \[0, 1\]"),
        ({"alpha": 0.5, "keep_tokens": 0}, "keep_tokens must lie between 1 and the 64"),
        ({"alpha": 0.5, "keep_tokens": 65}, "keep_tokens must lie between 1 and the 64"),
        ({"budget": 17}, "budget must lie between 0 and the 16"),
        ({"budget": -1}, "budget must lie between 0 and the 16"),
        ({}, "either alpha or budget"),
        ({"alpha": 0.5, "budget": 3}, "either alpha or budget"),
        ({"alpha": 0.5, "scores": torch.rand(6, 64)}, r"scores must be \[6, 16\], a 4 x 4 map"),
        ({"alpha": 0.5, "scores": torch.rand(5, 16)}, r"scores must be \[6, 16\]"),
        ({"alpha": 0.5, "scores": torch.rand(6, 4, 4)}, r"scores must be \[6, 16\]"),
        ({"alpha": 0.5, "scores": torch.full((6, 16), float("nan"))}, "got NaN"),
        ({"scores": None, "alpha": 1.5}, r"alpha must lie in \[0, 1\]"),
        ({"scores": None, "budget": 3}, "need scores"),
        ({"scores": None, "alpha": 1.0, "keep_tokens": 3}, "need scores"),
        ({"alpha": 0.5, "images": torch.rand(6, 3, 32, 48)}, r"images must be \[batch, 3, 32, 32\]"),
        ({"alpha": 0.5, "images": torch.rand(6, 1, 32, 32)}, r"images must be \[batch, 3, 32, 32\]"),
    ],
)
def test_bad_calls_are_refused_in_one_line(arguments, message):
    images, scores = batch()
    with pytest.raises(ValueError, match=message) as caught:
        small()(**{"images": images, "scores": scores} | arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"zoom_factor": 1.0}, "zoom_factor must be 2.0 or 0.5"),
        ({"img_size": 36}, "image size 36 or patch size 8"),
        ({"img_size": 40, "zoom_factor": 0.5}, "patches of 16 pixels: image size 40"),
        ({"img_size": 35, "patch_size": 5}, "patch size 5"),
        ({"img_size": (32, 64)}, "must be square"),
        ({"zfe": "hard"}, "zfe must be one of none, fixed, soft"),
        ({"pos": "rope"}, "pos must be one of learned, sincos, sincos-1d"),
        ({"embed_dim": 26}, "embed_dim must divide"),
    ],
)
def test_bad_sizes_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ZoomViT(**SMALL | options)
