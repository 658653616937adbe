"""torchvision's VisionTransformer as a teacher: `torchvision:vit_b_16`."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torchvision.models import VisionTransformer, get_model_weights
from typing_extensions import override

from zpipe.pipeline.classifier import Classifier, Layout
from zpipe.pipeline.teacher_spec import TORCHVISION
from zpipe.schemas.errors import UsageError, ZpipeError, first_line

# torchvision's own functions take no other sizes than these.
SIZES = {
    "vit_b_16": {"patch_size": 16, "num_layers": 12, "num_heads": 12, "hidden_dim": 768, "mlp_dim": 3072},
    "vit_b_32": {"patch_size": 32, "num_layers": 12, "num_heads": 12, "hidden_dim": 768, "mlp_dim": 3072},
    "vit_l_16": {"patch_size": 16, "num_layers": 24, "num_heads": 16, "hidden_dim": 1024, "mlp_dim": 4096},
    "vit_l_32": {"patch_size": 32, "num_layers": 24, "num_heads": 16, "hidden_dim": 1024, "mlp_dim": 4096},
    "vit_h_14": {"patch_size": 14, "num_layers": 32, "num_heads": 16, "hidden_dim": 1280, "mlp_dim": 5120},
}


class TorchvisionClassifier(Classifier):
    """torchvision's VisionTransformer, whose head reads the class token.

    Args:
        model: The model.
        head: A head in place of its own; None keeps it.
    """

    def __init__(self, model: Any, head: nn.Module | None = None) -> None:
        if type(model) is not VisionTransformer:
            raise ValueError(
                f"of torchvision's models, only a VisionTransformer is known, this is a {type(model).__name__}"
            )
        blocks = tuple(model.encoder.layers)
        stem = next(part for part in model.conv_proj.modules() if isinstance(part, nn.Conv2d))
        side = model.image_size // model.patch_size
        layout = Layout(
            blocks=blocks,
            parts=("class",),
            image_size=(model.image_size, model.image_size),
            grid=(side, side),
            channels=stem.in_channels,
            prefix_tokens=1,
            width=model.hidden_dim,
            num_heads=blocks[0].self_attention.num_heads if blocks else 0,
            classes=model.num_classes,
        )
        super().__init__(model, layout, head)

    @override
    def run_blocks(self, images: Tensor) -> None:
        self.model(images)

    @override
    def normalise(self, tokens: Tensor) -> Tensor:
        return self.model.encoder.ln(tokens)

    @override
    def pool(self, tokens: Tensor) -> Tensor:
        return tokens[:, 0]

    @override
    def answer(self, pooled: Tensor) -> Tensor:
        return self.model.heads(pooled)


def split_name(name: str) -> tuple[str, Any]:
    """Split ``torchvision:vit_b_16.IMAGENET1K_V1`` into the architecture and its weights, by default the usual ones.

    Raises:
        UsageError: torchvision has no such ViT, or no such weights of it.
    """
    architecture, _, tag = name.removeprefix(TORCHVISION).partition(".")
    if architecture not in SIZES:
        raise UsageError(f"teacher {name}: torchvision has no such ViT; choose one of {', '.join(SIZES)}")
    weights = get_model_weights(architecture)
    if tag and tag not in weights.__members__:
        raise UsageError(f"teacher {name}: torchvision has no such weights; choose {' or '.join(weights.__members__)}")
    return architecture, weights[tag or "DEFAULT"]


def create(name: str, **kwargs: Any) -> Any:
    """Build a model with torchvision's initialisation.

    Args:
        name: Its name, see `split_name`.
        kwargs: Arguments of its constructor; None takes the default. `num_classes` of 0 makes an encoder without a
            head, as timm does.
    """
    sizes = {"image_size": 224} | SIZES[split_name(name)[0]]
    model = VisionTransformer(**sizes | {key: value for key, value in kwargs.items() if value is not None})
    if not model.num_classes:
        model.heads = nn.Sequential()  # torchvision would give it a head of no rows, which no file holds
    return model


def pretrained(name: str, model_args: dict[str, Any], num_classes: int | None) -> tuple[Any, tuple[str, ...]]:
    """Build a model with torchvision's weights, from its cache or the network; also gives the names of its classes.

    Raises:
        UsageError: There are no such weights, or they are for other arguments.
        ZpipeError: They cannot be fetched.
    """
    _, weights = split_name(name)
    size, classes = weights.transforms().crop_size[0], tuple(weights.meta["categories"])
    if model_args not in ({}, {"image_size": size}) or num_classes not in (None, len(classes)):
        raise UsageError(
            f"teacher {name}: its pretrained weights are for {size} pixels and {len(classes)} classes; leave "
            "num_classes and model_args out"
        )
    model = create(name, num_classes=len(classes), image_size=size)
    try:
        model.load_state_dict(weights.get_state_dict(check_hash=True, weights_only=True))
    except (OSError, RuntimeError, ValueError) as error:  # the network, a broken file, a broken cache
        raise ZpipeError(
            f"teacher {name}: its pretrained weights could not be loaded "
            f"({type(error).__name__}: {first_line(error)}); "
            "fetch them on a machine with network access and give the local file as weights"
        ) from error
    return model, classes


def preparation(name: str) -> dict[str, Any]:
    """How images are prepared for torchvision's weights of that name: `mean`, `std`, `interpolation`, `crop_pct`."""
    view = split_name(name)[1].transforms()
    return {
        "mean": tuple(view.mean),
        "std": tuple(view.std),
        "interpolation": view.interpolation.value,
        "crop_pct": view.crop_size[0] / view.resize_size[0],
    }
