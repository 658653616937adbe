"""CF-ViT: its authors' numbers and costs, early exit as a choice between two logits, and one-line errors."""

from __future__ import annotations

from functools import partial

import onnxruntime
import pytest
import timm
import timm.optim
import torch
from golden_models import check_golden, golden
from hypothesis import given
from hypothesis import strategies as st
from timm.models.vision_transformer import VisionTransformer
from tiny_cfvit import GRIDS, SMALL, few, pixels, shake, small
from torch import nn

from zpipe.train.checkpoint import Preprocessing, load_run, save_model
from zpipe.train.fit.initialise import start_from
from zpipe.train.macs import count_macs
from zpipe.train.models import CFViT, load_release, load_vit
from zpipe.train.models.cfvit_stages import REUSES, attention_weights, share_of

torch.set_num_threads(1)
# -- the authors' numbers ----------------------------------------------------------------------------------------------


@torch.no_grad()
def test_the_authors_numbers():
    check_golden("cfvit_golden", "cfvit")


def test_size_and_costs_of_the_paper():
    model = timm.create_model("cfvit_small").eval()
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(23.25, abs=0.005)
    assert sum(p.numel() for p in model.reuse.parameters()) / 1e6 == pytest.approx(1.18, abs=0.005)
    assert model.macs(p_exit=1.0) / 1e9 == pytest.approx(1.100, abs=5e-4)
    table = {0.4: 3.66, 0.5: 4.01, 0.6: 4.37, 0.7: 4.73, 0.8: 5.09, 0.9: 5.46}
    assert {keep: round(model.macs(keep=keep) / 1e9, 2) for keep in table} == table
    assert model.macs() / 1e9 == pytest.approx(4.014, abs=5e-4)
    image = torch.zeros(1, 3, 224, 224)
    assert count_macs(partial(model, image)) == model.macs()
    assert count_macs(partial(model, image, exit_threshold=0.0)) == model.macs(p_exit=1.0)


def test_costs_at_nine_by_nine():
    model = timm.create_model("cfvit_small", img_size=288).eval()
    assert model.lengths() == (82, 205)
    assert model.macs(p_exit=1.0) / 1e9 == pytest.approx(1.827, abs=5e-4)
    assert model.macs() / 1e9 == pytest.approx(6.759, abs=5e-4)
    assert count_macs(partial(model, torch.zeros(1, 3, 288, 288))) == model.macs()


@GRIDS
@pytest.mark.parametrize(
    ("selection", "reuse"), [*((rule, "mlp") for rule in CFViT.SELECTIONS), *(("global", kind) for kind in REUSES[1:])]
)
def test_costs_are_what_the_counter_sees(img_size, selection, reuse):
    model = small(img_size=img_size, selection=selection, reuse=reuse, mlp_ratio=3)
    images = pixels(4, img_size)
    for keep in (0.0, 0.3, 1.0):
        assert count_macs(partial(model, images, keep=keep)) == 4 * model.macs(keep=keep)
    assert count_macs(partial(model, images, full_split=True)) == 4 * model.macs(full_split=True)


def test_costs_of_given_scores_and_of_a_mix():
    model, images = small(), pixels(4)
    scores = torch.rand(4, 36)
    assert count_macs(partial(model, images, scores)) == 4 * model.macs()
    confidence = model(images, return_stages=True).coarse.softmax(1).amax(1)
    for exited, threshold in enumerate([1.0, *(confidence.sort(descending=True).values - 1e-5).tolist()]):
        counted = count_macs(partial(model, images, exit_threshold=threshold))
        assert counted == pytest.approx(4 * model.macs(p_exit=exited / 4), abs=4)


# -- from the paper ----------------------------------------------------------------------------------------------------


def by_the_book(model: CFViT, image: torch.Tensor, count: int) -> torch.Tensor:
    """Fine logits of one image [1, D, H, W], attention written out and tokens joined one by one."""
    n = model.coarse_grid

    def embed(x):
        return model.patch_embed(x).flatten(2).transpose(1, 2)[0]

    half = nn.functional.interpolate(image, size=model.img_size // 2, mode="bilinear", align_corners=True)
    coarse = torch.cat([model.cls_token[0], embed(half)]) + model.pos_coarse[0]
    x, score = coarse[None], 0
    for number, block in enumerate(model.blocks):
        q, k, _ = block.attn.qkv(block.norm1(x)).unflatten(2, (3, block.attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
        attention = (q @ k.transpose(2, 3) * block.attn.scale).softmax(3)  # [1, H, N, N]
        if number >= 3:
            score = 0.99 * score + 0.01 * attention.mean(1)[0, 0, 1:]
        x = block(x)
    reused = model.reuse(model.norm(x)[0, 1:])
    fine = torch.cat([model.cls_token[0], embed(image)]) + model.pos_fine[0]
    best = score.topk(count).indices.tolist()
    tokens = [fine[:1]]
    for cell in best:
        row, column = divmod(cell, n)
        first = 2 * row * 2 * n + 2 * column
        tokens += [(fine[1 + first + step] + reused[cell])[None] for step in (0, 1, 2 * n, 2 * n + 1)]
    tokens += [coarse[1 + cell][None] for cell in range(n * n) if cell not in best]
    return model.head(model.norm(model.blocks(torch.cat(tokens)[None])[:, 0]))


@GRIDS
@torch.no_grad()
def test_it_is_the_paper_read_token_by_token(img_size):
    model, images = small(img_size=img_size), pixels(3, img_size)
    expected = torch.cat([by_the_book(model, image[None], model.coarse_grid**2 // 3) for image in images])
    torch.testing.assert_close(model(images, keep=1 / 3), expected, atol=1e-4, rtol=1e-4)
    assert expected.std() > 0.1


def test_the_global_attention_starts_at_zero():
    weights = attention_weights(12, 0.99)
    assert weights[:3] == (0, 0, 0) and weights[11] == pytest.approx(0.01)
    assert weights[3] / sum(weights) == pytest.approx(1 / 9, abs=0.01)
    assert attention_weights(5, 0.0) == (0, 0, 0, 0, 1)
    assert attention_weights(2, 0.5) == (0, 0.5)


@given(st.integers(1, 200), st.integers(0, 200))
def test_a_share_that_is_a_whole_number_of_cells_stays_that(cells, part):
    part = min(part, cells)
    assert share_of(cells, part / cells) == part
    assert share_of(49, 0.5) == 25 and share_of(100, 0.07) == 7


# -- early exit --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def models() -> dict[int, CFViT]:
    return {img_size: small(img_size=img_size) for img_size in (48, 72)}


@few
@given(
    st.sampled_from([48, 72]), st.integers(1, 5), st.one_of(st.sampled_from([0.0, 1.0]), st.floats(0, 1)), st.booleans()
)
@torch.no_grad()
def test_early_exit_is_a_choice_between_two_logits(models, img_size, n, threshold, given_scores):
    model, images = models[img_size], pixels(n, img_size, seed=n)
    scores = torch.rand(n, model.coarse_grid**2) if given_scores else None
    coarse, fine = model(images, scores, return_stages=True)
    logits, exited = model(images, scores, exit_threshold=threshold)
    assert torch.equal(exited, coarse.softmax(1).amax(1) >= threshold)
    torch.testing.assert_close(logits, torch.where(exited[:, None], coarse, fine), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_all_none_or_some_exit(models):
    images = pixels(5)
    confidence = models[48](images, return_stages=True).coarse.softmax(1).amax(1)
    counts = [int(models[48](images, exit_threshold=float(t)).exited.sum()) for t in [0, *confidence.sort().values, 1]]
    assert counts == [5, 5, 4, 3, 2, 1, 0]


# -- selection ---------------------------------------------------------------------------------------------------------


@GRIDS
@torch.no_grad()
def test_an_image_does_not_depend_on_its_batch(img_size):
    model, images = small(img_size=img_size), pixels(6, img_size)
    whole = model(images, return_stages=True)
    for b in range(6):
        for one, all_ in zip(model(images[b : b + 1], return_stages=True), whole, strict=True):
            torch.testing.assert_close(one[0], all_[b], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(model(images.flip(0)), whole.fine.flip(0), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_rules_of_selection():
    model, images = small(), pixels()
    chosen = {rule: model.refined(images, selection=rule) for rule in CFViT.SELECTIONS}
    assert all(cells.sum(1).tolist() == [18] * 6 for cells in chosen.values())
    assert torch.equal(chosen["negative"], ~chosen["global"])
    assert torch.equal(chosen["last"], small(beta=0.0).refined(images))
    assert not torch.equal(chosen["last"], chosen["global"])
    assert len({tuple(model.refined(images, selection="random")[0].tolist()) for _ in range(5)}) > 1
    assert model.refined(images, full_split=True).all() and model.refined(images, keep=1.0).all()
    assert model.refined(images, keep=0.0).sum() == 0
    torch.testing.assert_close(small(selection="last")(images), model(images, selection="last"))


@few
@given(st.integers(0, 36), st.integers(0, 2**31))
@torch.no_grad()
def test_scores_from_elsewhere_choose_the_cells(models, count, seed):
    model, images = models[48], pixels(2)
    scores = torch.rand(2, 144, generator=torch.Generator().manual_seed(seed)).round(decimals=1)  # ties among them
    cells = nn.functional.max_pool2d(scores.view(2, 1, 12, 12), 2).flatten(1)
    chosen = model.refined(images, scores, keep=count / 36)
    assert torch.equal(chosen, model.refined(images, cells, keep=count / 36))
    assert chosen.sum(1).tolist() == [count, count]
    for scored, kept in zip(cells, chosen, strict=True):
        if 0 < count < 36:
            assert scored[kept].min() >= scored[~kept].max()


@torch.no_grad()
def test_own_attention_given_as_scores_changes_nothing():
    model, images = small(), pixels()
    torch.testing.assert_close(model(images, model.refined(images).float()), model(images), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_full_split_with_positions_is_all_cells_refined():
    model, images = small(split_positions=True), pixels()
    torch.testing.assert_close(model(images, full_split=True), model(images, keep=1.0))
    assert not torch.allclose(small()(images, full_split=True), model(images, keep=1.0), atol=1e-2)


@torch.no_grad()
def test_kinds_of_reuse_differ():
    images = pixels()
    logits = [small(reuse=kind)(images) for kind in REUSES]
    for first in range(len(logits)):
        for second in range(first):
            assert not torch.allclose(logits[first], logits[second], atol=1e-3)


# -- training and tools ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("full_split", [False, True])
def test_every_parameter_learns(full_split):
    model = small(drop_path_rate=0.1, split_positions=True).train()
    coarse, fine = model(pixels(), full_split=full_split, return_stages=True)
    (coarse.square().sum() + fine.square().sum()).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum()] == []


@torch.no_grad()
def test_in_half_precision():
    model, images = small(), pixels()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        confidence = model(images, return_stages=True).coarse.float().softmax(1).amax(1)
        logits, exited = model(images, exit_threshold=float(confidence.median()))
    assert logits.isfinite().all() and 0 < exited.sum() < 6


def test_the_interface_of_timm():
    model = timm.create_model("cfvit_tiny", depth=2, embed_dim=24, num_classes=7)
    groups = timm.optim.param_groups_weight_decay(model, 0.05, no_weight_decay_list=model.no_weight_decay())
    free = {id(p) for group in groups if group["weight_decay"] == 0 for p in group["params"]}
    assert all(id(getattr(model, name)) in free for name in ("cls_token", "pos_coarse", "pos_fine"))
    assert id(model.patch_embed.weight) not in free
    layers = timm.optim.param_groups_layer_decay(model, layer_decay=0.5)
    assert sum(len(group["params"]) for group in layers) == len(list(model.parameters()))
    model.reset_classifier(3)
    assert model(torch.zeros(1, 3, 224, 224)).shape == (1, 3) and model.get_classifier() is model.head
    model.reset_classifier(0)
    features = model(torch.zeros(1, 3, 224, 224))
    assert torch.equal(features, model.forward_features(torch.zeros(1, 3, 224, 224))) and features.shape == (1, 24)
    with pytest.raises(ValueError, match="exit_threshold chooses between the logits"):
        model(torch.zeros(1, 3, 224, 224), exit_threshold=0.5)


def test_saved_and_opened_again(tmp_path):
    model = timm.create_model("cfvit_tiny", **SMALL, keep=0.3, selection="last", beta=0.9, reuse="linear").eval()
    save_model(tmp_path, model, Preprocessing(image_size=48, mean=(0.5,) * 3, std=(0.2,) * 3))
    again = load_run(tmp_path).model
    assert torch.equal(again(pixels()), model(pixels())) and again.keep == 0.3 and again.selection == "last"


class Bound(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model
        self.eval()

    def forward(self, images):
        return self.model(images)


@torch.no_grad()
def test_exported_and_in_onnx(tmp_path):
    model, images = small(depth=1), pixels(5)
    shapes = {"images": {0: torch.export.Dim("batch", min=1)}}
    program = torch.export.export(Bound(model), (images,), dynamic_shapes=shapes)
    path = tmp_path / "model.onnx"
    torch.onnx.export(program, (images,), path, verbose=False)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for n in (2, 3):
        torch.testing.assert_close(program.module()(images[:n]), model(images[:n]), atol=1e-5, rtol=1e-5)
        (logits,) = session.run(None, {"images": images[:n].numpy()})
        torch.testing.assert_close(torch.from_numpy(logits), model(images[:n]), atol=1e-4, rtol=1e-4)


# -- other people's weights --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "img_size"), [({}, 48), ({"no_embed_class": True}, 48), ({"img_size": 24, "patch_size": 2}, 48)]
)
@torch.no_grad()
def test_warm_start_has_the_logits_of_the_vit(options, img_size):
    vit = VisionTransformer(**SMALL | {"img_size": img_size, "no_embed_class": options.get("no_embed_class", False)})
    source = shake(vit, seed=1).eval()
    model = small(img_size=img_size, split_positions=True)
    report = load_vit(model, source.state_dict())
    assert report.left == ("reuse: a ViT has none",)
    assert {name for name in model.state_dict() if not name.startswith("reuse.")} == set(report.filled)
    nn.init.zeros_(model.reuse.mlp.fc2.weight), nn.init.zeros_(model.reuse.mlp.fc2.bias)
    images = pixels(img_size=img_size)
    torch.testing.assert_close(model(images, full_split=True), source(images), atol=1e-5, rtol=1e-5)
    assert source(images).std() > 0.1


@torch.no_grad()
def test_warm_start_from_another_grid_and_refusals():
    source = shake(VisionTransformer(**SMALL | {"num_classes": 9}), seed=1)
    model = small(img_size=72, reuse="none")
    report = load_vit(model, source)
    assert report.left == ("head: the ViT has 9 classes, the model 5",)
    assert torch.equal(model.pos_fine[:, 0], source.pos_embed[:, 0])
    with pytest.raises(ValueError, match="not built alike"):
        load_vit(small(depth=4), source)


def test_init_from_a_plain_vit_and_from_its_like(tmp_path):
    source, like = shake(VisionTransformer(**SMALL), seed=1), small()
    for name, start in (("vit", source), ("cfvit", like)):
        torch.save(start.state_dict(), tmp_path / f"{name}.pth")
        model = CFViT(**SMALL)
        start_from(model, str(tmp_path / f"{name}.pth"))
        assert torch.equal(model.blocks[1].attn.qkv.weight, start.blocks[1].attn.qkv.weight)
    torch.testing.assert_close(model.eval()(pixels()), like(pixels()))


@pytest.mark.parametrize(
    ("change", "config", "message"),
    [
        ({"head.weight": None}, {}, "has no head.weight; expected a cfvit that its authors published"),
        ({"pos_embed_list.0": None}, {}, "has nothing for pos_coarse"),
        ({"reuse_block.1.fc1.bias": None}, {}, r"has nothing for reuse.mlp.fc1.bias \(1 such\)"),
        ({"blocks.1.norm1.weight": torch.zeros(7)}, {}, r"blocks.1.norm1.weight is \[7\], expected \[36\]"),
        ({"dist_token": torch.zeros(7)}, {}, "dist_token is not known"),
        ({}, {"num_heads": 5}, "must divide"),
        ({}, {"num_heads": None}, "give num_heads by keyword; got none"),
        ({}, {"region_size": 5}, "give num_heads by keyword; got num_heads, region_size"),
    ],
)
def test_other_checkpoints_are_refused_in_one_line(change, config, message):
    _, state, _ = golden("cfvit_golden")
    state = {key: value for key, value in (state | change).items() if value is not None}
    config = {key: value for key, value in ({"num_heads": 3} | config).items() if value is not None}
    with pytest.raises(ValueError, match=message) as caught:
        load_release(state, model="cfvit", **config)
    assert "\n" not in str(caught.value)


# -- bad input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"exit_threshold": -0.1}, r"exit_threshold must lie in \[0, 1\], got -0.1"),
        ({"exit_threshold": 1.1}, r"exit_threshold must lie in \[0, 1\]"),
        ({"exit_threshold": float("nan")}, r"exit_threshold must lie in \[0, 1\]"),
        ({"exit_threshold": 0.5, "return_stages": True}, "give no return_stages"),
        ({"keep": 1.01}, r"keep must lie in \[0, 1\], got 1.01"),
        ({"keep": float("nan")}, r"keep must lie in \[0, 1\]"),
        ({"selection": "best"}, "selection must be one of global, negative, last, random, got 'best'"),
        ({"scores": torch.rand(2, 37)}, r"scores must be \[2, 36\], by coarse cell, or \[2, 144\], by patch"),
        ({"scores": torch.rand(3, 36)}, r"got \[3, 36\]"),
        ({"scores": torch.full((2, 36), float("nan"))}, "scores must be finite"),
        ({"scores": torch.rand(2, 36), "selection": "random"}, "'random' has no use for scores"),
        ({"images": torch.rand(2, 3, 52, 52)}, r"images must be \[batch, 3, 48, 48\], got \[2, 3, 52, 52\]"),
        ({"images": torch.rand(0, 3, 48, 48)}, "images must be"),
    ],
)
def test_bad_calls(models, arguments, message):
    with pytest.raises(ValueError, match=message) as caught:
        models[48](**{"images": pixels(2)} | arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"img_size": 44}, "image size 44 doesn't divide by 8"),
        ({"img_size": (48, 40)}, "images must be square"),
        ({"num_heads": 5}, "must divide by num_heads 5"),
        ({"beta": 1.0}, r"beta must lie in \[0, 1\)"),
        ({"keep": -1}, r"keep must lie in \[0, 1\]"),
        ({"selection": "region"}, "selection must be one of global"),
        ({"reuse": "all"}, "reuse must be one of mlp"),
    ],
)
def test_bad_models(arguments, message):
    with pytest.raises(ValueError, match=message):
        CFViT(**SMALL | arguments)


def test_bad_shares_of_cost():
    with pytest.raises(ValueError, match=r"p_exit must lie in \[0, 1\], got 1.5"):
        small().macs(p_exit=1.5)
