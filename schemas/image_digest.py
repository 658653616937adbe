"""The digest by which maps find their images, whatever tars, keys and order these come in."""

from __future__ import annotations

DIGEST_BYTES = 16


def image_digest(data: bytes) -> bytes:
    """XXH3-128 of an image file, 16 bytes, big-endian as xxHash prints it: fast, and no proof against forgery.

    Args:
        data: The file as its publisher made it, not decoded: JPEGs of one image that were encoded anew differ.
    """
    import xxhash

    return xxhash.xxh3_128_digest(data)
