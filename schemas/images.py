"""What an image file is to zpipe: the formats that are read, their bounds, and one rule for every kind of pixel.

The content decides what a file is, not its name. Shards, extraction, training and prediction all read images here, so
that the same file gives the same 8-bit RGB pixels everywhere:

- 8 bits per channel, grey, palette, 1 bit, CMYK, YCbCr, Lab: as Pillow converts them.
- 16 bits per channel: the upper 8 bits, so that white stays white.
- With transparency (an alpha channel, a transparent colour or palette entry): composed over white.
- Animated or with several pages (GIF, WebP, APNG, TIFF, MPO): the first one.
- With an EXIF orientation: as stored, not rotated, because boxes and maps refer to the stored pixels.
- 32-bit integers or floating point (TIFF): refused, because they have no white.
"""

from __future__ import annotations

import io
import struct

import numpy as np
from PIL import Image, ImageFile, UnidentifiedImageError

from zpipe.schemas.image_formats import HEAD_BYTES, IMAGE_FORMATS, sniff_format

# What PIL raises for damaged images. It turns the errors of its parsers into one kind when it opens an image, but not
# when it decodes one (as for a chunk after the pixels of a PNG).
DECODE_ERRORS = (
    *(OSError, ValueError, SyntaxError, EOFError, IndexError, KeyError, TypeError, OverflowError, struct.error),
    *(NotImplementedError, Image.DecompressionBombError),
)
MAX_PIXELS = 1 << 26  # 8,192 x 8,192: Pillow takes up to 13 bytes per pixel while it decodes
MAX_WEBP_PIXELS = MAX_PIXELS // 2  # 21 bytes per pixel
MAX_SCANNED_PIXELS = 1 << 30  # of all scans of a JPEG
EXIF_ORIENTATION = 0x0112
TIFF_COMPRESSION, TIFF_JPEG = 259, (6, 7)
TIFF_TILE_SIDES = (322, 323)


def open_image(data: bytes) -> Image.Image:
    """Open an image file without decoding it. Its content decides the format, not its name.

    Decoding what is returned takes at most some seconds and 1 GB. It may still raise any of `DECODE_ERRORS`.

    Args:
        data: The file.

    Raises:
        DECODE_ERRORS: It is empty or no image of one of `IMAGE_FORMATS`, or it has more pixels or scans than the bounds
            above.
    """
    if not data:
        raise ValueError("zero bytes")
    kind = sniff_format(data[:HEAD_BYTES])
    if kind is None:
        raise ValueError(f"not a readable {', '.join(IMAGE_FORMATS)} image")
    if kind == "WEBP":
        _check_pixels(*_webp_size(data), MAX_WEBP_PIXELS)  # Pillow allocates the canvas when it opens the file
    try:
        image = Image.open(io.BytesIO(data), formats=(kind,))
    except UnidentifiedImageError as error:
        raise ValueError(f"not a readable {kind} image") from error
    except Image.DecompressionBombError as error:  # beyond twice Pillow's own bound, which a process may set
        raise ValueError(str(error)) from error
    _check_pixels(image.width, image.height)
    tags = getattr(image, "tag_v2", {}) if kind == "TIFF" else {}
    if all(isinstance(tags.get(tag), int) for tag in TIFF_TILE_SIDES):
        _check_pixels(tags[TIFF_TILE_SIDES[0]], tags[TIFF_TILE_SIDES[1]])
    if (kind == "JPEG" and not _has_one_scan(image, data)) or tags.get(TIFF_COMPRESSION) in TIFF_JPEG:
        scans = data.count(b"\xff\xda")  # the marker that begins a scan; compressed pixels do not hold it
        if scans * image.width * image.height > MAX_SCANNED_PIXELS:
            raise ValueError(f"{scans} scans of {image.width} x {image.height} pixels would take too long to decode")
    return image


def to_rgb(image: Image.Image) -> Image.Image:
    """Decode an opened image to 8-bit RGB by the rules of this module.

    Raises:
        DECODE_ERRORS: The file is damaged, or its pixels are 32-bit integers or floating point.
    """
    image.load()
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    # Pillow opens a PPM of 16 bits as 32-bit integers that end at 65,535.
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM"):
        return _grey_of_16_bits(image)
    if image.mode in ("I", "F"):
        raise ValueError(f"pixels of mode {image.mode} (32 bits) have no white; convert them to 8 or 16 bits")
    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image.convert("RGBA")
    white = Image.new("RGB", image.size, "white")
    white.paste(image, mask=image.getchannel("A"))
    return white


def _grey_of_16_bits(image: Image.Image) -> Image.Image:
    values = np.asarray(image)
    grey = (values >> 8).astype(np.uint8)
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        grey[values == transparent] = 255
    return Image.fromarray(grey).convert("RGB")


def orientation(image: Image.Image) -> int:
    """The EXIF orientation of an opened image, 1 to 8, which is not applied; 1 if it has none."""
    try:
        value = image.getexif().get(EXIF_ORIENTATION, 1)
    except DECODE_ERRORS:
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _has_one_scan(image: Image.Image, data: bytes) -> bool:
    """Whether an opened JPEG is sequential, with all colours in its first scan: libjpeg decodes no second one."""
    if image.info.get("progressive") or not isinstance(image, ImageFile.ImageFile) or image.fp is None:
        return False
    colours = len(image.getbands())
    # Pillow stops after the header of the first scan: marker, length, number of colours, and more.
    header = b"\xff\xda" + struct.pack(">HB", 6 + 2 * colours, colours)
    return data.startswith(header, image.fp.tell() - (8 + 2 * colours))


def _check_pixels(width: int, height: int, most: int | None = None) -> None:
    most = MAX_PIXELS if most is None else most
    if width * height > most:
        raise ValueError(f"{width} x {height} pixels are more than {most}")


def pixel_notes(image: Image.Image) -> tuple[str, ...]:
    """What the rules of this module make of an opened image beyond plain decoding, as phrases for an account."""
    notes = []
    # TIFF has the orientation among its own tags.
    exif = image.info.get("exif", b"")
    has_tag = b"\x01\x12" in exif or b"\x12\x01" in exif  # looked for first, because parsing takes its time
    if (has_tag or image.format == "TIFF") and orientation(image) != 1:
        notes.append("with an EXIF orientation (not applied)")
    if image.has_transparency_data:
        notes.append("transparent (on white)")
    if image.mode.startswith("I") or ";16" in str(getattr(image, "tile", "")):
        notes.append("with 16 bits per channel (the upper 8 count)")
    if image.format in ("GIF", "TIFF", "WEBP", "PNG") and _has_pages(image):
        notes.append("with several pages or frames (the first counts)")
    return tuple(notes)


def _has_pages(image: Image.Image) -> bool:
    try:
        return bool(getattr(image, "is_animated", False))  # reads the head of the second page, which may be damaged
    except DECODE_ERRORS:
        return True


def _webp_size(data: bytes) -> tuple[int, int]:
    """Width and height that the first chunk of a WebP file states."""
    chunk, body = data[12:16], data[20:30]
    if len(body) < 10:
        raise ValueError("not a readable WEBP image")
    if chunk == b"VP8X":
        return 1 + int.from_bytes(body[4:7], "little"), 1 + int.from_bytes(body[7:10], "little")
    if chunk == b"VP8L":
        bits = int.from_bytes(body[1:5], "little")
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    return int.from_bytes(body[6:8], "little") & 0x3FFF, int.from_bytes(body[8:10], "little") & 0x3FFF
