"""Settings by dotted name: what fits is taken, what doesn't says why."""

from dataclasses import fields, is_dataclass, replace

import pytest
from any_json import any_json
from hypothesis import given
from hypothesis import strategies as st

from zpipe.schemas.errors import UsageError
from zpipe.train.data.transforms import ViewConfig
from zpipe.train.fit.config import TrainConfig
from zpipe.train.fit.train_vit import VitConfig
from zpipe.train.fit.train_zoomer import ZoomerConfig
from zpipe.train.settings import with_settings


@pytest.mark.parametrize(
    ("config", "name", "value", "found"),
    [
        (ZoomerConfig(), "num_blocks", 2, 2),
        (ZoomerConfig(), "train.lr", 0.5, 0.5),
        (ZoomerConfig(), "train.lr", 1, 1.0),
        (ZoomerConfig(), "train.epochs", 3, 3.0),
        (ZoomerConfig(), "view.flip", 0, 0.0),
        (ZoomerConfig(), "view.crop_scale", [0.5, 1], (0.5, 1.0)),
        (ZoomerConfig(), "view.crop_ratio", (1.0, 1.0), (1.0, 1.0)),
        (ZoomerConfig(), "train.opt_args", {"nesterov": True}, {"nesterov": True}),
        (VitConfig(), "model_args", {}, {}),
        (VitConfig(), "num_classes", None, None),
        (VitConfig(), "num_classes", 7, 7),
        (VitConfig(), "init_from", "run", "run"),
        (VitConfig(), "max_zoomed", 3, 3),
        (VitConfig(), "zoom_draw", "budget", "budget"),
    ],
    ids=str,
)
def test_a_value_that_fits(config, name, value, found):
    before = replace(config)
    changed = with_settings(config, {name: value})
    for part in name.split("."):
        changed = getattr(changed, part)
    assert changed == found and type(changed) is type(found)
    assert config == before


def test_the_rest_stays_and_later_settings_win():
    changed = with_settings(VitConfig(), {"train.lr": 0.5, "train.opt": "sgd", "train.lr ".strip(): 0.25})
    assert changed == replace(VitConfig(), train=replace(VitConfig().train, lr=0.25, opt="sgd"))
    assert with_settings(VitConfig(), {}) == VitConfig()


def test_each_stage_has_its_own_defaults():
    assert ZoomerConfig().train.lr == 0.01 and VitConfig().train.lr == 1e-3
    assert with_settings(VitConfig(), {"train.seed": 1}).train.warmup_epochs == VitConfig().train.warmup_epochs


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("lr", "unknown; choose one of model, "),
        ("train.learning_rate", "unknown; choose one of epochs, "),
        ("", "unknown"),
        ("train.", "unknown"),
        (".lr", "unknown"),
        ("train.lr.max", "lr has no settings inside"),
        ("train", "such as train.epochs"),
        ("__class__", "unknown"),
    ],
)
def test_unknown_names(name, told):
    with pytest.raises(UsageError) as error:
        with_settings(VitConfig(), {name: 1})
    assert str(error.value).startswith(f"setting {name}: ") and told in str(error.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("train.lr", "fast"),
        ("train.lr", True),
        ("train.lr", None),
        ("train.lr", [1.0]),
        ("mean", ".5,.5,.5"),
        ("mean", [0.5, 0.5]),
        ("train.lr", float("nan")),
        ("train.lr", float("inf")),
        ("train.batch_size", 2.5),
        ("train.batch_size", True),
        ("train.batch_size", "8"),
        ("train.seed", None),
        ("train.opt", 3),
        ("train.opt_args", [1]),
        ("model_args", "depth=2"),
        ("num_classes", "ten"),
        ("num_classes", 2.0),
        ("init_from", 5),
        ("max_zoomed", "x"),
        ("zoom_draw", "dice"),
        ("zoom_draw", None),
        ("view.crop_scale", 0.5),
        ("view.crop_scale", [0.5]),
        ("view.crop_scale", [0.1, 0.5, 1.0]),
        ("view.crop_scale", ["a", "b"]),
        ("view.augment", "none"),
    ],
    ids=str,
)
def test_values_of_another_type(name, value):
    with pytest.raises(UsageError, match=f"^setting {name}: ") as error:
        with_settings(VitConfig(), {name: value})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("train.epochs", 0),
        ("train.epochs", -1),
        ("train.lr", -0.1),
        ("train.seed", -1),
        ("train.batch_size", 0),
        ("train.log_every", 0),
        ("train.data_workers", -1),
        ("train.warmup_epochs", -1),
        ("train.clip_grad", -1),
        ("view.crop_scale", [0, 1]),
        ("view.crop_pct", 0),
        ("label_smoothing", 1.5),
        ("num_classes", 0),
    ],
    ids=str,
)
def test_values_out_of_range(name, value):
    with pytest.raises(UsageError, match=name):
        with_settings(VitConfig(), {name: value})


@pytest.mark.parametrize(
    ("make", "name", "value"),
    [
        (TrainConfig, "train.precision", "bfloat16"),
        (TrainConfig, "train.sched", "linear"),
        (TrainConfig, "train.clip_mode", None),
        (VitConfig, "loss", "BCE"),
        (VitConfig, "zoom_draw", "cells"),
        (ViewConfig, "view.augment", "val"),
        (ViewConfig, "view.colour", ["deit"]),
        (VitConfig, "missing", "eror"),
        (VitConfig, "damaged", "uniform"),
        (ZoomerConfig, "missing", None),
        (ZoomerConfig, "damaged", "Skip"),
        (ZoomerConfig, "kl_direction", "student"),
        (ZoomerConfig, "normalisation", "max"),
    ],
)
def test_a_choice_that_is_none_is_refused_from_python_too(make, name, value):
    with pytest.raises(UsageError, match=f"^setting {name}: .*; choose one of "):
        make(**{name.rpartition(".")[2]: value})


def test_other_values_that_are_none_are_refused_from_python_too():
    with pytest.raises(UsageError, match="--scores nowhere: choose one of zoomer, maps"):
        VitConfig(scores="nowhere")
    with pytest.raises(UsageError, match="train-zoomer: loss weights must not be negative"):
        ZoomerConfig(w_dice=-0.1)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("train.seed", 2**80),
        ("train.seed", 2**63),
        ("train.epochs", 1e18),
        ("train.epochs", 10**400),
        ("train.lr", 1e31),
        ("train.batch_size", 2**40),
        ("train.data_workers", 10**6),
        ("train.wandb", ""),
        ("train.opt", "\udcff"),
        ("train.opt_args", {"eps": float("nan")}),
        ("train.opt_args", {"a": [{"b": float("inf")}]}),
        ("model_args", {"depth": 2**70}),
        ("image_size", 10**9),
        ("num_classes", 10**9),
        ("mean", [0.5, 0.5, 1e9]),
        ("std", [0.5, 0.5, 0]),
        ("fixed_zoom", 1.5),
        ("max_zoomed", 2**40),
        ("mixup", 1e300),
        ("view.crop_ratio", [1e-300, 1e300]),
        ("view.crop_pct", 1e-300),
    ],
    ids=str,
)
def test_values_that_no_training_could_use(name, value):
    with pytest.raises(UsageError, match=name) as error:
        with_settings(VitConfig(), {name: value})
    assert "\n" not in str(error.value) and len(str(error.value)) < 200


@pytest.mark.parametrize("name", ["image_size", "width", "num_blocks", "w_kl", "w_dice"])
def test_values_that_no_zoomer_could_use(name):
    with pytest.raises(UsageError, match=name):
        with_settings(ZoomerConfig(), {name: 10**15})


NUMBERS = ["epochs", "batch_size", "lr", "seed", "keep", "checkpoint_s", "clip_grad", "ema", "layer_decay"]


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1])
def test_numbers_out_of_range_are_refused_from_python_too(name, value):
    with pytest.raises(UsageError, match=f"train.{name} "):
        TrainConfig(**{name: value})


def names(config) -> list[str]:
    """The settings of a configuration, by dotted name."""
    parts = {field.name: getattr(config, field.name) for field in fields(config)}
    inner = {f"{name}.{each.name}" for name, value in parts.items() if is_dataclass(value) for each in fields(value)}
    return sorted(inner | {name for name, value in parts.items() if not is_dataclass(value)})


def number_or_json():
    return any_json() | st.floats() | st.sampled_from([0, 1, 0.5, 4, [0.5, 1.0], [0.5] * 3, {}])


@pytest.mark.parametrize("default", [VitConfig(), ZoomerConfig()], ids=["vit", "zoomer"])
@given(data=st.data())
def test_any_json_value_of_any_setting_is_taken_or_refused(default, data):
    name, value = data.draw(st.sampled_from(names(default))), data.draw(number_or_json())
    try:
        changed = with_settings(default, {name: value})
    except UsageError as error:
        assert name.rpartition(".")[2] in str(error) and "\n" not in str(error)
        return
    for part in name.split("."):
        changed = getattr(changed, part)
    assert (list(changed) if isinstance(changed, tuple) else changed) == value
