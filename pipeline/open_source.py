"""Sources of `zpipe make-shards` by name: a folder, `scenes`, or NAME:PATH."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from zpipe.pipeline.annotations import CocoSource, VocSource
from zpipe.pipeline.datasets import Cifar10Source, Flowers102Source
from zpipe.pipeline.image_folder import FolderSource
from zpipe.pipeline.imagenet import ImageNetSource
from zpipe.pipeline.parquet import ParquetSource
from zpipe.pipeline.sources import NumberedSource, SceneSource, Source, scene_config
from zpipe.schemas.choices import check_choice
from zpipe.schemas.errors import UsageError
from zpipe.schemas.sample import KEY_RULES
from zpipe.schemas.storage import as_local, as_path, is_remote


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """Settings of a source that is opened by name."""

    shard_size: int = 1000
    """Most images in one tar."""
    keys: str = "stem"
    """Key of an image of a folder, a name of `zpipe.schemas.sample.KEY_RULES`; other sources have their own keys."""
    seed: int = 0
    """Seed of the order of images, or of the embedded scenes."""
    shuffle: bool = True
    """Whether the images are shuffled; scenes always are."""
    count: int = 10_000
    """Number of embedded scenes."""
    split: str = "train"
    """Split of the embedded scenes or of a published data set."""
    check: bool = True
    """Whether images that keep their bytes are decoded as a check. If not, only their headers are read."""
    image_size: int | None = None
    """Width and height of an embedded scene in pixels; None for the default."""
    image_column: str | None = None
    """Column of the images of a data set in Parquet; None to find it."""
    label_column: str | None = None
    """Column of its labels; None to find it, ``none`` for none."""
    images: str | None = None
    """Folder of the images of COCO; None to find it beside the annotations."""
    scene: Mapping[str, Any] = field(default_factory=dict)
    """Other fields of `zpipe.pipeline.scenes.SceneConfig`."""

    def __post_init__(self) -> None:
        check_choice("--keys", self.keys, KEY_RULES)

    def refuse_others(self, mode: str) -> None:
        """Raise :class:`UsageError` for a setting that differs from its default, where a mode of the command has none.

        Args:
            mode: The option of the mode.
        """
        options = {"shuffle": "--no-shuffle", "check": "--no-check", "scene": "--set"}
        for name, default in asdict(SourceConfig()).items():
            if getattr(self, name) != default:
                option = options.get(name, f"--{name.replace('_', '-')}")
                raise UsageError(f"{option} has no meaning with {mode}, which takes tars as they are; leave it out")

    @property
    def order_seed(self) -> int | None:
        """Seed of the order of images; None to keep that of the source."""
        return self.seed if self.shuffle else None


def _published(
    source: type[Cifar10Source] | type[Flowers102Source] | type[ImageNetSource] | type[VocSource],
) -> Callable[[str, SourceConfig], NumberedSource]:
    def opened(path: str, config: SourceConfig) -> NumberedSource:
        return source(
            _local(path),
            split=config.split,
            shard_size=config.shard_size,
            shuffle_seed=config.order_seed,
            check=config.check,
        )

    return opened


def _parquet(path: str, config: SourceConfig) -> ParquetSource:
    place = as_path(path)
    return ParquetSource(
        place if is_remote(place) else place.expanduser(),
        split=config.split,
        shard_size=config.shard_size,
        shuffle_seed=config.order_seed,
        image_column=config.image_column,
        label_column=config.label_column,
        check=config.check,
    )


def _coco(path: str, config: SourceConfig) -> CocoSource:
    if config.split != SourceConfig.split:
        raise UsageError(f"--split {config.split}: a file of COCO is one split; give the file of that split")
    images = None if config.images is None else _local(config.images)
    return CocoSource(
        _local(path),
        images=images,
        shard_size=config.shard_size,
        shuffle_seed=config.order_seed,
        check=config.check,
    )


# What follows a colon: PATH or URL, and the settings -> a source. Its `note` and `warning`, if any, are shown.
NAMED: Mapping[str, Callable[[str, SourceConfig], Any]] = {
    "cifar10": _published(Cifar10Source),
    "flowers102": _published(Flowers102Source),
    "imagenet": _published(ImageNetSource),
    "parquet": _parquet,
    "voc": _published(VocSource),
    "coco": _coco,
}
# The sources that have a setting.
OWNERS: Mapping[str, str] = {"image_column": "parquet", "label_column": "parquet", "images": "coco"}


def open_source(text: str, config: SourceConfig, warn: Callable[[str], None] = print) -> Source:
    """Open the images that `zpipe make-shards` names.

    Args:
        text: `scenes`, `NAME:PATH` of one of `NAMED`, or a folder of images.
        config: Its settings.
        warn: Called with a line on what the source was taken for, and if the data set does not look complete.

    Raises:
        UsageError: There is no such source, or it does not have a setting that was given.
        ZpipeError: A file of the source is broken.
    """
    name, colon, path = text.partition(":")
    for setting, owner in OWNERS.items():
        if getattr(config, setting) is not None and name != owner:
            raise UsageError(f"--{setting.replace('_', '-')} belongs to {owner}:; {text} has no such setting")
    if text == "scenes":
        if not config.check or not config.shuffle or config.keys != SourceConfig.keys:
            raise UsageError(
                "--no-check, --no-shuffle and --keys belong to images that are read; the embedded scenes are made"
            )
        scene = scene_config(config.image_size, dict(config.scene))
        return SceneSource(
            count=config.count, split=config.split, seed=config.seed, config=scene, shard_size=config.shard_size
        )
    if config.scene or config.image_size or config.count != SourceConfig.count:
        raise UsageError(
            "--count, --image-size and --set belong to the embedded scenes; other sources have none of them"
        )
    if not colon or name not in NAMED:
        if config.split != SourceConfig.split:
            raise UsageError(f"--split {config.split}: an image folder has no splits; give the folder of that split")
        folder = FolderSource(
            as_local(text),
            shard_size=config.shard_size,
            shuffle_seed=config.order_seed,
            key_rule=config.keys,
            check=config.check,
        )
        for line in folder.warnings:
            warn(f"warning: {line}")
        return folder
    if config.keys != SourceConfig.keys:
        raise UsageError(f"--keys belongs to image folders; {name} has keys of its own")
    source: Source = NAMED[name](path, config)
    if note := getattr(source, "note", ""):
        warn(f"note: {note}")
    if warning := getattr(source, "warning", ""):
        warn(f"warning: {warning}")
    return source


def _local(path: str) -> Path:
    # Shells do not expand a ~ after a colon.
    return as_local(path).expanduser()
