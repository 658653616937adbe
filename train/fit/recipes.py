"""Named configurations. A recipe is a complete configuration, which flags and `--set` then change.

Each has a small variant, `NAME-small`, for a trial on a CPU and a small data set: two epochs, small batches, the same
steps.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from zpipe.schemas.errors import UsageError
from zpipe.train.data.transforms import ViewConfig
from zpipe.train.fit.config import TrainConfig
from zpipe.train.fit.train_vit import VitConfig
from zpipe.train.fit.train_zoomer import ZoomerConfig

# DeiT (Touvron et al. 2021): lr 5e-4 for a batch of 512, every image three times in a batch.
_DEIT = VitConfig(
    label_smoothing=0.1,
    mixup=0.8,
    cutmix=1.0,
    model_args={"drop_path_rate": 0.1},
    view=ViewConfig(colour="deit", erase=0.25),
    train=TrainConfig(
        epochs=300.0,
        batch_size=1024,
        repeats=3,
        lr=1e-3,
        min_lr=1e-5,
        warmup_epochs=5.0,
        weight_decay=0.05,
        ema=0.99996,
    ),
)
# The training of ZoomViT's authors: DeiT-III's augmentation and loss, 400 epochs, lr 5e-4, constant weight decay.
_DEIT3 = VitConfig(
    loss="bce",
    mixup=0.8,
    cutmix=1.0,
    model_args={"drop_path_rate": 0.05},
    view=ViewConfig(colour="deit3", crop_pct=1.0),
    train=TrainConfig(epochs=400.0, batch_size=1024, lr=5e-4, min_lr=1e-5, warmup_epochs=5.0, weight_decay=0.05),
)
# Fine-tuning of a trained model, such as --init-from timm:deit3_small_patch16_224.in1k: short, with lower rates below.
_FINETUNE = VitConfig(
    label_smoothing=0.1,
    model_args={"drop_path_rate": 0.1},
    view=ViewConfig(crop_scale=(0.25, 1.0)),
    train=TrainConfig(
        epochs=30.0, batch_size=512, lr=2e-4, min_lr=1e-6, warmup_epochs=2.0, layer_decay=0.75, clip_grad=1.0
    ),
)
# CIFAR-10 from scratch: DeiT's settings, with the learning rate for the smaller batch and patches that fit 32 pixels.
# DeiT's code crops such images with a padding of 4 pixels, which a crop of at least 0.6 approximates. There is no
# moving average of the weights, because 29,000 steps are too few for one so slow.
_CIFAR10 = replace(
    _DEIT,
    image_size=32,
    model_args=_DEIT.model_args | {"patch_size": 4},
    view=replace(_DEIT.view, crop_scale=(0.6, 1.0), crop_pct=1.0),
    train=replace(_DEIT.train, batch_size=512, lr=5e-4, ema=0.0),
)
# Flowers-102 from a trained model (--init-from), as DeiT's authors describe their transfers to small data sets
# (github.com/facebookresearch/deit, issue 45): SGD, no erasing, no stochastic depth, everything else as on ImageNet.
_FLOWERS102 = replace(
    _DEIT,
    model_args={},
    view=replace(_DEIT.view, erase=0.0),
    train=replace(_DEIT.train, opt="sgd", epochs=1000.0, batch_size=768, lr=0.01, weight_decay=1e-4, ema=0.0),
)
_SMALL = {"epochs": 2.0, "batch_size": 32, "warmup_epochs": 0.2, "lr": 1e-3}


def _small(config: Any) -> Any:
    # A trained model would lose what it knows at the learning rate of training from scratch.
    own = {"ema": 0.99} if config.train.ema else {}
    own |= {"lr": config.train.lr} if config is _FINETUNE else {}
    return replace(config, train=replace(config.train, **_SMALL | own))


VIT_RECIPES: Mapping[str, VitConfig] = {
    name + suffix: make(config)
    for name, config in (
        ("deit", _DEIT),
        ("deit3", _DEIT3),
        ("finetune", _FINETUNE),
        ("cifar10", _CIFAR10),
        ("flowers102", _FLOWERS102),
    )
    for suffix, make in (("", lambda config: config), ("-small", _small))
}
ZOOMER_RECIPES: Mapping[str, ZoomerConfig] = {"zoomer": ZoomerConfig(), "zoomer-small": _small(ZoomerConfig())}


def recipe(name: str | None, recipes: Mapping[str, Any], default: Any) -> Any:
    """The recipe of that name, or the default if there is no name.

    Raises:
        UsageError: If the name is unknown.
    """
    if name is None:
        return default
    if name not in recipes:
        raise UsageError(f"--recipe {name}: choose one of {', '.join(recipes)}")
    return recipes[name]
