"""What every registered model of ours promises about how it can be run, and what an image costs there."""

from collections.abc import Mapping
from functools import partial

import pytest
import timm
import torch
from torch import nn

import zpipe.train.models  # noqa: F401  registers the models
from zpipe.train.macs import count_macs
from zpipe.train.models.operating_points import (
    OperatingPoint,
    SettingError,
    cost,
    cost_kinds,
    logits_of,
    operating_points,
    score_use,
    setting_names,
)

pytestmark = pytest.mark.usefixtures("one_thread")

SIDE, CLASSES, BATCH = 32, 5, 4
BODY = {"patch_size": 8, "embed_dim": 24, "depth": 4, "num_heads": 3}
SIZED = BODY | {"img_size": SIDE}
PLAIN = {"backbone": "deit_tiny_patch16_224", "img_size": SIDE, "backbone_args": BODY}
SPARSE = {"conv_dim": 16, "num_tokens": 4, "focus_dim": 64, "cortex_dim": 64, "num_heads": 8, "num_points": 9}
MODELS = {
    "zoomvit_tiny_patch16_224": SIZED,
    "zoomvit_small_patch16_224": SIZED | {"zoom_factor": 0.5},
    "zoomvit_base_patch16_224": SIZED | {"init_values": 1e-4, "pos": "sincos"},
    "zoomvit_released": SIZED | {"alpha": 0.1},
    "cfvit_tiny": SIZED,
    "cfvit_small": SIZED | {"reuse": "mlp+class", "selection": "negative"},
    "lfvit_tiny": SIZED | {"region_size": 1},
    "lfvit_small": SIZED | {"region_size": 2},
    "lvvit_small": SIZED,
    "sparseformer_tiny": SPARSE,
    "sparseformer_small": SPARSE,
    "sparseformer_base": SPARSE,
    "token_pruned_vit": PLAIN | {"prune_block": 2},
    "tome_vit": PLAIN | {"r": 2},
    "image_zoom": PLAIN | {"patch_size": 8},
    "fused_vit": PLAIN | {"patch_size": 8},
}
REQUESTED = {
    "alpha": (0.0, 0.3, 1.0),
    "budget": (0, 3),
    "keep": (5, 9),
    "prune": ("forward",),
    "exit": (0.0, 0.22, 1.0),
    "merge": (0, 1, 3),
}


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=CLASSES, **MODELS[name]).eval()


def images_and_scores(model: nn.Module) -> tuple[torch.Tensor, torch.Tensor | None]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(BATCH, 3, SIDE, SIDE, generator=generator)
    use = score_use(model)
    return images, None if use is None else torch.rand(BATCH, use.grid**2, generator=generator) ** 2


def run(model: nn.Module, images: torch.Tensor, scores: torch.Tensor | None, arguments: Mapping):
    return model(images, **{**({} if scores is None else {"scores": scores}), **arguments})


def all_points(model: nn.Module) -> list[OperatingPoint]:
    requested = {name: REQUESTED[name] for name in setting_names(model)}
    return operating_points(model, requested)


def tokens_per_block(model: nn.Module, run_once) -> float:
    """The tokens that enter a block, as a mean over blocks, in a forward pass of one image."""
    lengths: list[int] = []
    norms = [module for name, module in model.named_modules() if name.endswith(("norm1", "norm_attn"))]
    hooks = [norm.register_forward_pre_hook(lambda _, x: lengths.append(x[0].shape[-2])) for norm in norms]
    run_once()
    for hook in hooks:
        hook.remove()
    if hasattr(model, "num_tokens"):  # a SparseFormer, which has no class token and repeats a unit
        return sum(lengths) / len(lengths)
    return sum(length - 1 for length in lengths) / len(norms)


def test_no_model_is_left_out():
    ours = {name for name in timm.list_models() if timm.model_entrypoint(name).__module__.startswith("zpipe.")}
    assert ours == MODELS.keys()


@pytest.mark.parametrize("name", MODELS)
def test_points_have_unique_names_and_come_back_from_their_settings(name):
    model = build(name)
    points = all_points(model)
    assert len({point.name for point in points}) == len(points)
    for point in points:
        assert point.settings.keys() <= set(setting_names(model))
        again = operating_points(model, {setting: (value,) for setting, value in point.settings.items()})
        assert again[-1] == point
    if not setting_names(model):
        assert points == [OperatingPoint(name="")]


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_the_default_point_runs(name):
    model = build(name)
    images, scores = images_and_scores(model)
    use = score_use(model)
    if use is not None and use.zooms:
        with pytest.raises(ValueError, match="give --alphas or --budgets"):
            operating_points(model, {})
        points = [OperatingPoint(name="no zoom")]
    else:
        points = [OperatingPoint(name="plain"), *operating_points(model, {})]
    for point in points:
        output = run(model, images, None if use is None or use.zooms else scores, point.arguments)
        assert logits_of(output).shape == (BATCH, CLASSES)


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_an_image_costs_what_the_model_says(name):
    model = build(name)
    use = score_use(model)
    images, scores = images_and_scores(model)
    if use is not None and use.zooms:
        runs = [(None, OperatingPoint(name="no zoom")), *((scores, point) for point in all_points(model))]
    else:
        points = [OperatingPoint(name="plain"), *all_points(model)]
        runs = [(each, point) for each in ([None] if use is None else [None, scores]) for point in points]
    for each, point in runs:
        output = run(model, images, each, point.arguments)
        kinds = cost_kinds(model, point, each, output)
        assert kinds is None or (kinds.shape == (BATCH,) and kinds.dtype == torch.int64)
        for i, kind in enumerate([None] * BATCH if kinds is None else kinds.tolist()):
            image, own = images[i : i + 1], None if each is None else each[i : i + 1]
            blank = None if own is None else torch.zeros_like(own)
            stated = cost(model, point, kind)
            alone = partial(run, model, image, own, point.arguments)
            assert count_macs(partial(run, model, image, blank, stated.arguments)) == count_macs(alone)
            assert stated.tokens == pytest.approx(tokens_per_block(model, alone))
            exits = bool(output.exited[i]) if "exit_threshold" in point.arguments else False
            assert stated.exited is (exits if "exit" in setting_names(model) else None)


@torch.no_grad()
def test_the_cost_of_a_released_zoomvit_that_splits_cells_in_part():
    model = timm.create_model("zoomvit_released", **SIZED, zoom_factor=0.5, alpha=0.1).eval()
    images, scores = images_and_scores(model)
    scores[1, :4], scores[2] = 0.1, 0.05  # cells at the threshold have no token; nothing is zoomed
    (point,) = operating_points(model, {"alpha": (0.1,)})
    for i, kind in enumerate(cost_kinds(model, point, scores, None).tolist()):
        stated = cost(model, point, kind)
        alone = partial(run, model, images[i : i + 1], scores[i : i + 1], {"alpha": 0.1})
        assert count_macs(partial(run, model, images[:1], None, stated.arguments)) == count_macs(alone)
        assert stated.tokens == model.token_counts(scores, 0.1)[i]


def test_models_that_zoom_state_a_kind_for_every_scored_image():
    for name, kinds in (("zoomvit_tiny_patch16_224", [16, 16, 16, 16]), ("fused_vit", [0, 0, 0, 0])):
        model = build(name)
        scores = torch.ones(BATCH, 16)
        (point,) = operating_points(model, {"alpha": (0.5,)})
        assert cost_kinds(model, point, scores, None).tolist() == kinds
        assert cost_kinds(model, point, None, None) is None


@pytest.mark.parametrize(
    ("name", "requested", "setting", "message"),
    [
        ("zoomvit_tiny_patch16_224", {"alpha": (0.1, 1.5)}, "alpha", "alpha 1.5: a threshold lies in"),
        ("zoomvit_tiny_patch16_224", {"budget": (17,)}, "budget", "budget 17: budget must lie between 0 and the 16"),
        ("zoomvit_tiny_patch16_224", {"budget": ("3 tokens",)}, "budget", "below the 16 tokens of an image"),
        ("zoomvit_tiny_patch16_224", {"alpha": (0.1,), "keep": (65,)}, "keep", "give a number from 1 to 64"),
        ("zoomvit_tiny_patch16_224", {"alpha": (0.1,), "keep": (5,), "prune": ("up",)}, "prune", "choose one of"),
        ("fused_vit", {"budget": ("3 tokens",)}, "budget", "between 0 and the 16 score cells"),
        ("cfvit_tiny", {"exit": (-0.1,)}, "exit", "early exit lies in"),
        ("token_pruned_vit", {"keep": (0,)}, "keep", "between 1 and the 16 patches"),
        ("tome_vit", {"merge": (4,)}, "merge", "r must lie between 0 and 3"),
    ],
)
def test_a_value_out_of_range_is_named(name, requested, setting, message):
    with pytest.raises(SettingError, match=message) as error:
        operating_points(build(name), requested)
    assert error.value.setting == setting and error.value.value == requested[setting][-1]


@torch.no_grad()
def test_models_of_timm_have_defaults():
    vit = timm.create_model("deit_tiny_patch16_224", img_size=SIDE, **BODY)
    assert score_use(vit) is None and setting_names(vit) == ()
    (point,) = operating_points(vit, {})
    assert cost(vit, point) == (16.0, {}, None)
    assert cost_kinds(vit, point, None, vit(torch.zeros(1, 3, SIDE, SIDE))) is None
    assert cost(timm.create_model("resnet18"), point).tokens is None
