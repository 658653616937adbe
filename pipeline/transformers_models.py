"""Vision transformers of Hugging Face's transformers as teachers: `transformers:OWNER/NAME`, or a saved folder.

The library is imported when such a teacher is wanted, and not before: it is large, and an extra
(`pip install zpipe[transformers]`). Code that a repository brings along is never run, and weights are read by
`zpipe.schemas.weights.read_weights`.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from timm.data.constants import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    IMAGENET_INCEPTION_MEAN,
    IMAGENET_INCEPTION_STD,
    OPENAI_CLIP_MEAN,
    OPENAI_CLIP_STD,
)
from torch import Tensor, nn
from typing_extensions import override

from zpipe.pipeline.classifier import DISTILLED, Classifier, Layout, Part, mean_answer, read_parts
from zpipe.pipeline.hub import hub_errors
from zpipe.pipeline.teacher_spec import BUILD_ERRORS, TRANSFORMERS
from zpipe.schemas.errors import UsageError, ZpipeError, first_line
from zpipe.schemas.formats import read_json
from zpipe.schemas.model_config import CONFIG_NAME, MAX_BLOCKS, MAX_BYTES, MAX_CLASSES, MAX_SIDE
from zpipe.schemas.names import printable
from zpipe.schemas.weights import read_weights

PREPARATION_NAMES = ("preprocessor_config.json", "processor_config.json")
WEIGHTS_NAMES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin")
REMEDY = "write the folder again with save_pretrained"
# Fields of config.json that choose kernels, which the library would fetch and load from any repository.
IMPLEMENTATIONS = {
    f"{start}{kind}_implementation{end}"
    for kind in ("attn", "experts")
    for start, end in (("", ""), ("_", ""), ("_", "_internal"))
}
# PIL's numbers of filters, by which preprocessor_config.json names them.
FILTERS = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """Where a model of transformers has its parts; "" where it has none. Paths are dotted."""

    tower: str = ""
    """The encoder within the model; "" if the model is the encoder."""
    blocks: str = "layers"
    """The blocks within the tower."""
    norm: str = "layernorm"
    """The norm after the last block, within the tower."""
    parts: tuple[Part, ...] = ("class",)
    """What the head reads."""
    prefix_tokens: int = 1
    """Tokens before the patches, without registers."""
    heads: tuple[str, ...] = ()
    """The classifiers; a model without one needs a head or class embeddings."""
    embedding: str = ""
    """The projection to the space that images and texts share, within the model."""
    interpolates: bool = False
    """Whether the model itself adapts its positions to the size of its images, as it was trained to."""
    ignored: tuple[str, ...] = ()
    """How names of tensors begin that no map depends on, and that a file may hold beside the model's."""
    run: Callable[[Any, Tensor], Any] = lambda tower, images: tower(images)
    """Runs the tower at least up to its last block, without a pooling attention after it."""


def _run_clip(tower: Any, images: Tensor) -> None:
    tower.encoder(inputs_embeds=tower.pre_layrnorm(tower.embeddings(images)))


def _run_siglip(tower: Any, images: Tensor) -> None:
    tower.encoder(inputs_embeds=tower.embeddings(images))


_CLASSIFIER = ("classifier",)
_TEXT = ("text_model.", "text_projection.", "logit_scale", "logit_bias")
_DINO: dict[str, Any] = {"blocks": "encoder.layer", "interpolates": True}
_CLIP: dict[str, Any] = {"blocks": "encoder.layers", "norm": "post_layernorm", "ignored": _TEXT, "run": _run_clip}
_SIGLIP: dict[str, Any] = _CLIP | {"prefix_tokens": 0, "run": _run_siglip}
_PROJECTED = Architecture(**_CLIP, tower="vision_model", embedding="visual_projection")

ARCHITECTURES: dict[str, Architecture] = {
    "ViTForImageClassification": Architecture(tower="vit", heads=_CLASSIFIER, ignored=("vit.pooler.",)),
    "ViTModel": Architecture(ignored=("pooler.",)),
    "DeiTForImageClassification": Architecture(tower="deit", prefix_tokens=2, heads=_CLASSIFIER),
    "DeiTForImageClassificationWithTeacher": Architecture(
        tower="deit", prefix_tokens=2, parts=DISTILLED, heads=("cls_classifier", "distillation_classifier")
    ),
    "DeiTModel": Architecture(prefix_tokens=2, ignored=("pooler.",)),
    "Dinov2ForImageClassification": Architecture(**_DINO, tower="dinov2", parts=("class", "mean"), heads=_CLASSIFIER),
    "Dinov2Model": Architecture(**_DINO),
    "Dinov2WithRegistersForImageClassification": Architecture(
        **_DINO, tower="dinov2_with_registers", parts=("class", "mean"), heads=_CLASSIFIER
    ),
    "Dinov2WithRegistersModel": Architecture(**_DINO),
    "DINOv3ViTModel": Architecture(blocks="model.layer", norm="norm", interpolates=True),
    "BeitForImageClassification": Architecture(tower="beit", heads=_CLASSIFIER),
    "BeitModel": Architecture(),
    # The mean of its patches is not normalised.
    "CLIPForImageClassification": Architecture(
        **_CLIP | {"norm": ""}, tower="vision_model", parts=("mean",), heads=_CLASSIFIER
    ),
    "CLIPVisionModel": Architecture(**_CLIP),
    "CLIPVisionModelWithProjection": _PROJECTED,
    "SiglipForImageClassification": Architecture(**_SIGLIP, tower="vision_model", parts=("mean",), heads=_CLASSIFIER),
    "SiglipVisionModel": Architecture(**_SIGLIP, parts=("pool",)),
}
# By the type of the tower: mean, standard deviation, interpolation and the fraction of the image that is cropped.
USUAL = {
    "vit": (IMAGENET_INCEPTION_MEAN, IMAGENET_INCEPTION_STD, "bilinear", 1.0),
    "deit": (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, "bicubic", 0.875),
    "dinov2": (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, "bicubic", 0.875),
    "dinov2_with_registers": (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, "bicubic", 0.875),
    "dinov3_vit": (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, "bilinear", 1.0),
    "beit": (IMAGENET_INCEPTION_MEAN, IMAGENET_INCEPTION_STD, "bicubic", 1.0),
    "clip_vision_model": (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD, "bicubic", 1.0),
    "siglip_vision_model": (IMAGENET_INCEPTION_MEAN, IMAGENET_INCEPTION_STD, "bicubic", 1.0),
}
# Models of images and texts, of which the part for images is taken.
VISION_PARTS = {"CLIPModel": "CLIPVisionModelWithProjection", "SiglipModel": "SiglipVisionModel"}


class TransformersClassifier(Classifier):
    """A model of one of `ARCHITECTURES`.

    Args:
        model: The model.
        head: A head in place of its own; None keeps it.
        own: Whose answer counts, where the model has a head for the class and one for the distillation token.

    Raises:
        ValueError: Its class or its pooling is not known, or it does not have two heads.
    """

    def __init__(self, model: Any, head: nn.Module | None = None, own: tuple[Part, ...] | None = None) -> None:
        name = type(model).__name__
        if name not in ARCHITECTURES:
            raise ValueError(f"of transformers' models, {', '.join(ARCHITECTURES)} are known, not {name}")
        kind = ARCHITECTURES[name]
        tower = model.get_submodule(kind.tower)
        config, parts = tower.config, own or kind.parts
        if own is not None and len(kind.heads) < 2:
            raise ValueError(f"a {name} has no two heads")
        if parts == ("pool",) and not config.vision_use_head:
            raise ValueError(f"a {name} without its pooling head (vision_use_head=false) is not known")
        if config.model_type == "beit" and config.use_mean_pooling:
            parts = ("mean",)
        size, patch = _pair(config.image_size), _pair(config.patch_size)
        layout = Layout(
            blocks=tuple(tower.get_submodule(kind.blocks)),
            parts=parts,
            image_size=size,
            grid=(size[0] // patch[0], size[1] // patch[1]),
            channels=config.num_channels,
            prefix_tokens=kind.prefix_tokens + getattr(config, "num_register_tokens", 0),
            width=config.hidden_size,
            num_heads=config.num_attention_heads,
            classes=model.config.num_labels if kind.heads else 0,
        )
        super().__init__(model, layout, head)
        self._kind, self._tower = kind, (tower,)  # a tuple, because the tower is a part of the model already
        paths = [kind.heads[kind.parts.index(part)] for part in own] if own else kind.heads
        self._heads = tuple(model.get_submodule(path) for path in paths)

    @override
    def run_blocks(self, images: Tensor) -> None:
        self._kind.run(self._tower[0], images)

    @override
    def normalise(self, tokens: Tensor) -> Tensor:
        return self._tower[0].get_submodule(self._kind.norm)(tokens) if self._kind.norm else tokens

    @override
    def pool(self, tokens: Tensor) -> Tensor:
        tower = self._tower[0]
        if self.own_parts == ("pool",):
            return tower.head(tokens)
        pooled = read_parts(tokens, self.own_parts, self.prefix_tokens)
        # BEiT normalises the mean of the patches, not the patches.
        norm = getattr(getattr(tower, "pooler", None), "layernorm", None)
        return pooled if norm is None else norm(pooled)

    @override
    def answer(self, pooled: Tensor) -> Tensor:
        if self._kind.embedding:
            return self.model.get_submodule(self._kind.embedding)(pooled)
        return mean_answer(self._heads, pooled) if self._heads else pooled


class Loaded(NamedTuple):
    """A model that was read, and what its folder says about it."""

    model: Any
    model_args: dict[str, Any]
    prepared: dict[str, Any]  # of mean, std, interpolation and crop_pct, what the folder says
    classes: tuple[str, ...]
    note: str  # what the model does with its positions; empty if nothing


def fetch_folder(name: str) -> Path:
    """Fetch a model of the Hub, or find it in the cache of huggingface_hub; gives its folder.

    Raises:
        ZpipeError: It is neither in the cache nor can it be fetched.
    """
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(name, allow_patterns=["*.json", "model*.safetensors"]))
        if not any((folder / file).is_file() for file in WEIGHTS_NAMES):
            folder = Path(snapshot_download(name, allow_patterns=["*.json", "pytorch_model.bin"]))
    except hub_errors() as error:
        raise ZpipeError(
            f"teacher {TRANSFORMERS}{name}: cannot be fetched ({type(error).__name__}: {first_line(error)}); fetch it "
            "on a machine with network access (hf download) and give the folder as weights"
        ) from error
    return folder


def load_folder(folder: Path, weights: Path | None, model_args: Mapping[str, Any]) -> Loaded:
    """Build the model of a folder that `save_pretrained` wrote, and load its weights.

    Args:
        folder: The folder, with config.json and, where it says how images are prepared, preprocessor_config.json.
        weights: A weights file in place of the folder's own; None takes that.
        model_args: `image_size` at most, for models that interpolate their positions.

    Raises:
        UsageError: `model_args` contradicts the folder.
        ZpipeError: The library or a file is absent or damaged, or the model is none of `ARCHITECTURES`.
    """
    path = folder / CONFIG_NAME
    raw = read_json(path, "a model description", type=dict[str, Any], remedy=REMEDY, max_bytes=MAX_BYTES)
    model_class = _class_of(raw, path)
    config = _config_of(model_class, raw, path)
    prepared, seen = _preparation(folder)
    size = _image_size(model_class.__name__, config, seen, dict(model_args))
    state = _read_state(folder) if weights is None else read_weights(weights)
    model = _fill(model_class, config, state, weights or folder)
    if size is None:
        return Loaded(model, {}, prepared, _class_names(config), "")
    trained, model.config.image_size = _pair(model.config.image_size), size
    note = ""
    if trained != size and hasattr(model.get_submodule(_kind(model).tower).embeddings, "position_embeddings"):
        note = f"the model interpolates its positions, of {list(trained)} pixels, to {list(size)} pixels"
    return Loaded(model, {"image_size": list(size)}, prepared, _class_names(config), note)


def usual_preparation(model: Any) -> dict[str, Any]:
    """How images are usually prepared for such a model: `mean`, `std`, `interpolation` and `crop_pct`."""
    mean, std, interpolation, crop_pct = USUAL[model.get_submodule(_kind(model).tower).config.model_type]
    return {"mean": mean, "std": std, "interpolation": interpolation, "crop_pct": crop_pct}


def create(architecture: str, model_args: Mapping[str, Any], num_classes: int | None = None) -> Any:
    """Build a model of `ARCHITECTURES` with random weights.

    Args:
        architecture: Its name.
        model_args: Fields of its configuration.
        num_classes: Number of classes; None takes the configuration's.

    Raises:
        UsageError: There is no such model, or it does not take these fields.
        ZpipeError: The library is absent.
    """
    if architecture not in ARCHITECTURES:
        raise UsageError(
            f"teacher {TRANSFORMERS}{architecture}: random weights are for one of {', '.join(ARCHITECTURES)}; a model "
            "of the Hub is OWNER/NAME, with --weights pretrained"
        )
    model_class = getattr(_library(), architecture)
    fields = dict(model_args) | ({} if num_classes is None else {"num_labels": num_classes})
    if _without_implementations(fields) != fields:
        raise UsageError(f"model_args: {', '.join(sorted(IMPLEMENTATIONS))} are not chosen here; leave them out")
    try:
        with _silent():
            return model_class._from_config(model_class.config_class(**fields), attn_implementation="sdpa")
    except _build_errors() as error:
        text = ", ".join(f"{key}={value!r}" for key, value in fields.items())
        raise UsageError(
            f"teacher {TRANSFORMERS}{architecture} cannot be built with ({text[:200]}): {first_line(error)}"
        ) from error


def is_installed() -> bool:
    """Whether the transformers library is installed."""
    return importlib.util.find_spec("transformers") is not None


def _kind(model: object) -> Architecture:
    return ARCHITECTURES[type(model).__name__]


def _library() -> Any:
    if not is_installed():
        raise ZpipeError("teachers of transformers need its library; pip install 'zpipe[transformers]'")
    return importlib.import_module("transformers")


def _class_of(raw: Mapping[str, Any], path: Path) -> Any:
    named = raw.get("architectures") or []
    name = next((each for each in named if isinstance(each, str)), "") if isinstance(named, list) else ""
    name = VISION_PARTS.get(name, name)
    if name not in ARCHITECTURES:
        known = ", ".join((*ARCHITECTURES, *VISION_PARTS))
        raise ZpipeError(
            f"{path}: architectures names {printable(name)[:80] or 'no model'}, a teacher is one of {known}"
        )
    return getattr(_library(), name)


def _config_of(model_class: Any, raw: Mapping[str, Any], path: Path) -> Any:
    """The configuration of the model, or of the part for images of a model of images and texts."""
    inner = raw.get(model_class.config_class.base_config_key or "", raw)
    try:
        if "quantization_config" in raw:
            raise ValueError("quantised weights are not known")
        with _silent():
            config = model_class.config_class.from_dict(_without_implementations(inner))
            if "CLIPModel" in raw["architectures"][:1]:  # the projection is that of the whole model
                config.projection_dim = raw.get("projection_dim", _library().CLIPConfig().projection_dim)
        sizes = getattr(config, "vision_config", config)
        limits = {"num_hidden_layers": MAX_BLOCKS, "image_size": MAX_SIDE, "patch_size": MAX_SIDE}
        limits |= dict.fromkeys(("hidden_size", "intermediate_size", "num_attention_heads", "num_channels"), 1 << 16)
        for field, limit in limits.items():
            if not 1 <= max(_pair(getattr(sizes, field))) <= limit:
                raise ValueError(f"{field} is not within 1..{limit}")
        if config.num_labels > MAX_CLASSES:
            raise ValueError(f"id2label names more than {MAX_CLASSES} classes")
    except _build_errors() as error:
        raise ZpipeError(
            f"{path}: is no configuration of a {model_class.__name__} ({first_line(error)}); {REMEDY}"
        ) from error
    return config


def _without_implementations(raw: Mapping[str, Any]) -> dict[str, Any]:
    """A description without the implementations that it asks for, which may be native code of a repository."""
    return {
        key: _without_implementations(value) if isinstance(value, dict) else value
        for key, value in raw.items()
        if key not in IMPLEMENTATIONS
    }


def _read_state(folder: Path) -> dict[str, Tensor]:
    """The weights of a folder: one file, or several that an index names."""
    file = next((folder / name for name in WEIGHTS_NAMES if (folder / name).is_file()), None)
    if file is None:
        raise ZpipeError(f"{folder}: holds no {', '.join(WEIGHTS_NAMES)}; {REMEDY}")
    if file.suffix != ".json":
        return read_weights(file)
    index = read_json(file, "an index of weights", type=dict[str, Any], remedy=REMEDY, max_bytes=MAX_BYTES)
    names = index.get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise ZpipeError(f"{file}: has no weight_map of file names; {REMEDY}")
    state: dict[str, Tensor] = {}
    for name in sorted(set(names.values())):
        if Path(name).name != name:
            raise ZpipeError(f"{file}: names {printable(name)[:80]}, a file of another folder; {REMEDY}")
        state |= read_weights(folder / name)
    return state


def _fill(model_class: Any, config: Any, state: dict[str, Tensor], file: Path) -> Any:
    """Build the model and load its weights, under the names of this or an earlier version of the library."""
    name = model_class.__name__
    # The maps do not depend on this pooler, which published weights often lack.
    extra = {"add_pooling_layer": False} if name in ("ViTModel", "DeiTModel") else {}
    try:
        with torch.device("meta"):
            shape = model_class._from_config(config, attn_implementation="sdpa", **extra)
        # A description may ask for any size. What a file lacks is named below, unless it lacks half of the model.
        if sum(each.numel() for each in shape.parameters()) > 2 * sum(each.numel() for each in state.values()):
            raise ValueError(f"{CONFIG_NAME} describes a larger model")
        with _silent():
            model, info = model_class.from_pretrained(
                None,
                config=config,
                state_dict=state,
                dtype=torch.float32,
                attn_implementation="sdpa",
                ignore_mismatched_sizes=True,  # the check below names the tensor
                output_loading_info=True,
                **extra,
            )
    except _build_errors() as error:
        raise ZpipeError(f"{file}: does not fit {name} ({first_line(error)}); {REMEDY}") from error
    ignored = ARCHITECTURES[name].ignored
    unknown = [key for key in info["unexpected_keys"] if not key.startswith(ignored) and "position_ids" not in key]
    for what, keys in (
        ("has no", info["missing_keys"]),
        ("has another shape of", [each[0] for each in info["mismatched_keys"]]),
        ("has the unknown", unknown),
    ):
        if first := min(keys, default=None):
            raise ZpipeError(f"{file}: does not fit {name}, it {what} {printable(first)[:80]}; {REMEDY}")
    return model


def _image_size(
    name: str, config: Any, seen: tuple[int, int] | None, model_args: dict[str, Any]
) -> tuple[int, int] | None:
    """Height and width of the images of a model that interpolates its positions; None for any other."""
    sizes = getattr(config, "vision_config", config)
    own = _pair(sizes.image_size)
    said = model_args.pop("image_size", None)
    if model_args:
        raise UsageError(f"model_args: {CONFIG_NAME} describes a {name}; leave {', '.join(model_args)} out")
    if not ARCHITECTURES[name].interpolates:
        if said is not None and _pair(said) != own:
            raise UsageError(f"model_args image_size={said}: a {name} of {list(own)} pixels; leave image_size out")
        return None
    size, patch = _pair(said) if said is not None else seen or own, _pair(sizes.patch_size)
    if len(size) != 2 or any(type(side) is not int or not 1 <= side <= MAX_SIDE for side in size):
        raise UsageError(f"model_args image_size={said}: give one number of pixels, or height and width")
    if size[0] % patch[0] or size[1] % patch[1]:
        raise UsageError(
            f"image_size={list(size)}: give model_args image_size, a multiple of its patches of {patch[0]}"
        )
    return size


def _preparation(folder: Path) -> tuple[dict[str, Any], tuple[int, int] | None]:
    """What the folder says about how images are prepared, and the size of the images that the model sees."""
    path = next((folder / name for name in PREPARATION_NAMES if (folder / name).is_file()), None)
    if path is None:
        return {}, None
    raw = read_json(path, "a preparation of images", type=dict[str, Any], remedy=REMEDY, max_bytes=MAX_BYTES)
    raw = raw.get("image_processor", raw)
    try:
        if raw.get("do_rescale", True) and abs(raw.get("rescale_factor", 1 / 255) * 255 - 1) > 1e-3:
            raise ValueError(f"rescale_factor is {raw['rescale_factor']}, not 1/255")
        size = _sides(raw.get("size"))
        crop = _sides(raw.get("crop_size")) if raw.get("do_center_crop", "crop_size" in raw) else None
        prepared: dict[str, Any] = {}
        if raw.get("do_normalize", True):
            prepared = {
                name: tuple(map(float, raw[f"image_{name}"])) for name in ("mean", "std") if f"image_{name}" in raw
            }
        else:
            prepared = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
        if "resample" in raw:
            prepared["interpolation"] = FILTERS[raw["resample"]]
        if size is not None:
            prepared["crop_pct"] = 1.0 if crop is None else min(1.0, max(crop) / max(size))
    except (AttributeError, KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise ZpipeError(f"{path}: does not say how images are prepared ({first_line(error)}); {REMEDY}") from error
    return prepared, crop or size


def _sides(size: Any) -> tuple[int, int] | None:
    """Height and width of a size in any of the forms that the library writes; a shortest edge counts as both."""
    if isinstance(size, dict):
        edge = size.get("shortest_edge")
        size = (size["height"], size["width"]) if edge is None else edge
    if size is None:
        return None
    height, width = _pair(size)
    return int(height), int(width)


def _class_names(config: Any) -> tuple[str, ...]:
    """Names of the classes; empty where the library has only numbered them."""
    names = tuple(str(config.id2label.get(number, "")) for number in range(config.num_labels))
    return () if all(name in ("", f"LABEL_{number}") for number, name in enumerate(names)) else names


def _build_errors() -> tuple[type[Exception], ...]:
    """What the library raises for a configuration that does not fit; it checks fields by classes of huggingface_hub."""
    from huggingface_hub.errors import StrictDataclassError

    return (*BUILD_ERRORS, ImportError, OSError, StrictDataclassError)


def _pair(size: Any) -> tuple[int, int]:
    return tuple(size) if isinstance(size, tuple | list) else (size, size)


@contextmanager
def _silent() -> Iterator[None]:
    """Hide the library's progress bars and reports; we check for the errors that these would show."""
    logging = importlib.import_module("transformers.utils.logging")
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
