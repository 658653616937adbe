"""zpipe: relevance maps of a frozen ViT teacher at data-set scale, and ViTs that zoom where the class is decided.

Importing this module is cheap: neither torch nor ray is loaded.
"""

from __future__ import annotations

from importlib.metadata import version as _version
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import os

    from zpipe.schemas.relevance_maps import Normalise, RelevanceMaps

__all__ = ["__version__", "image_digest", "open_maps"]
__version__ = _version("zpipe")


def open_maps(path: str | os.PathLike[str], normalise: Normalise = None, *, check: bool = True) -> RelevanceMaps:
    """Open a finished relevance store to read its maps by key.

    Args:
        path: Folder or fsspec URL of the store.
        normalise: None for raw relevance, ``minmax`` for each map scaled to [0, 1], as the training loader reads them.
        check: Compare the digests of what is read, and name the file that was damaged.

    Returns:
        The maps, see :class:`zpipe.schemas.relevance_maps.RelevanceMaps`.

    Raises:
        ZpipeError: `path` is no finished store.
    """
    from zpipe.schemas.relevance_maps import RelevanceMaps

    return RelevanceMaps(path, normalise=normalise, check=check)


def image_digest(data: bytes) -> bytes:
    """The digest of an image file by which maps are found: ``maps[zpipe.image_digest(data)]``.

    Args:
        data: The file, not decoded.

    Returns:
        XXH3-128 of the bytes, 16 bytes.
    """
    from zpipe.schemas.image_digest import image_digest

    return image_digest(data)
