"""Which image formats are read, and how a file is recognised as one: by its first bytes, not by its name."""

from __future__ import annotations

import re

# PIL's names. It knows further formats, some of which start programs.
IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
# Suffixes of files and tar members that are taken for images; their content must be one.
IMAGE_SUFFIXES = (
    *("jpg", "jpeg", "jpe", "jfif", "png", "apng", "webp", "bmp", "dib", "gif", "tif", "tiff"),
    *("ppm", "pgm", "pbm", "pnm"),
)
# The suffix in a tar of a format whose files are kept as they are; the pixels of others are written as PNG. MPO is a
# JPEG with further pictures after the first.
SUFFIX_OF_FORMAT = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}
HEAD_BYTES = 32
_SIGNATURES = (
    (b"\xff\xd8\xff", "JPEG"),
    (b"\x89PNG\r\n\x1a\n", "PNG"),
    (b"GIF87a", "GIF"),
    (b"GIF89a", "GIF"),
    (b"II*\0", "TIFF"),
    (b"MM\0*", "TIFF"),
    (b"II+\0", "TIFF"),
    (b"MM\0+", "TIFF"),
)
_PPM = re.compile(rb"P[1-6]\s[\s\d#]")  # the letters alone begin texts, too
_BMP_HEADERS = (12, 16, 40, 52, 56, 64, 108, 124)  # sizes in bytes


def sniff_format(head: bytes) -> str | None:
    """PIL's name of the image format that a file begins with; None if it is none of `IMAGE_FORMATS`.

    Args:
        head: The first `HEAD_BYTES` bytes of the file.
    """
    for signature, name in _SIGNATURES:
        if head.startswith(signature):
            return name
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "WEBP"
    if head[:2] == b"BM" and len(head) >= 18 and int.from_bytes(head[14:18], "little") in _BMP_HEADERS:
        return "BMP"
    return "PPM" if _PPM.match(head) else None
