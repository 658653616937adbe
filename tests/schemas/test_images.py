"""One rule for every kind of pixel, on real small files of each, and bounds on what a file may unpack to."""

import io
import struct

import numpy as np
import pytest
from PIL import Image

from zpipe.schemas import images
from zpipe.schemas.image_formats import HEAD_BYTES, IMAGE_FORMATS, sniff_format
from zpipe.schemas.images import DECODE_ERRORS, open_image, orientation, to_rgb


def saved(image, format, **options):
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def pixels(data):
    with open_image(data) as image:
        rgb = to_rgb(image)
    assert rgb.mode == "RGB"
    return np.asarray(rgb)


def tiff(values, *, sample_format=1, order="<"):
    """An uncompressed grey TIFF of 8 x 8 numbers."""
    data = values.astype(values.dtype.newbyteorder(order)).tobytes()
    bits = values.dtype.itemsize * 8
    tags = [(256, 8), (257, 8), (258, bits), (259, 1), (262, 1), (273, 8), (277, 1), (278, 8), (279, len(data))]
    tags.append((339, sample_format))
    head = (b"II" if order == "<" else b"MM") + struct.pack(order + "HI", 42, 8 + len(data)) + data
    entries = b"".join(struct.pack(order + "HHIHH", tag, 3, 1, value, 0) for tag, value in tags)
    return head + struct.pack(order + "H", len(tags)) + entries + bytes(4)


RAMP = np.linspace(0, 255, 64).round().astype(np.uint8).reshape(8, 8)
RGB = Image.fromarray(np.stack([RAMP, RAMP.T, 255 - RAMP], axis=2))
DEEP = RAMP.astype(np.uint16) * 257


@pytest.mark.parametrize("format", ["PNG", "BMP", "TIFF", "PPM"])
def test_lossless_formats_give_the_same_pixels(format):
    data = saved(RGB, format)
    assert sniff_format(data[:HEAD_BYTES]) == format
    np.testing.assert_array_equal(pixels(data), np.asarray(RGB))


def test_every_format_is_recognised_by_its_content():
    found = {
        sniff_format(saved(RGB, format)[:HEAD_BYTES]) for format in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
    }
    assert found == set(IMAGE_FORMATS)
    for text in (
        b"",
        b"P",
        b"P5 is a name",
        b"BM and more text of no image",
        b"%!PS-Adobe-3.0 EPSF-3.0\n",
        b"RIFF....WAVE",
    ):
        assert sniff_format(text) is None
        with pytest.raises(ValueError, match="zero bytes|not a readable JPEG"):
            open_image(text)


@pytest.mark.parametrize(
    "data",
    [
        saved(Image.fromarray(DEEP), "PNG"),
        saved(Image.fromarray(DEEP), "PPM"),
        tiff(DEEP),
        tiff(DEEP, order=">"),
    ],
    ids=["png", "ppm", "tiff", "tiff, big-endian"],
)
def test_16_bits_are_scaled_not_clipped(data):
    np.testing.assert_array_equal(pixels(data), np.stack([RAMP] * 3, axis=2))


def test_32_bits_and_floats_are_refused():
    for data in (tiff(DEEP.astype(np.uint32)), tiff(RAMP.astype(np.float32), sample_format=3)):
        with open_image(data) as image, pytest.raises(ValueError, match="have no white"):
            to_rgb(image)


def see_through():
    """Green that hides behind full transparency, in the left half."""
    image = Image.new("RGBA", (8, 8), (0, 200, 0, 0))
    image.paste((10, 20, 30, 255), (4, 0, 8, 8))
    return image


@pytest.mark.parametrize("format", ["PNG", "WEBP", "TIFF"])
def test_transparent_pixels_become_white(format):
    options = {"lossless": True, "exact": True} if format == "WEBP" else {}
    found = pixels(saved(see_through(), format, **options))
    assert (found[:, :4] == 255).all() and (found[:, 4:] == (10, 20, 30)).all()


def test_half_transparent_pixels_are_composed():
    found = pixels(saved(Image.new("LA", (8, 8), (0, 51)), "PNG"))
    assert (found == 204).all()


def test_transparent_colours_and_palette_entries_become_white():
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([255, 0, 0, 0, 0, 255])
    for format in ("PNG", "GIF"):
        assert (pixels(saved(palette, format)) == (0, 0, 255)).all()
        assert (pixels(saved(palette, format, transparency=1)) == 255).all()
    assert (pixels(saved(Image.new("RGB", (8, 8), (1, 2, 3)), "PNG", transparency=(1, 2, 3))) == 255).all()
    assert (pixels(saved(Image.fromarray(DEEP), "PNG", transparency=int(DEEP[0, 1])))[0, 1] == 255).all()


def test_grey_one_bit_and_cmyk_are_converted():
    assert (pixels(saved(Image.new("L", (8, 8), 7), "PNG")) == 7).all()
    assert (pixels(saved(Image.new("1", (8, 8), 1), "PNG")) == 255).all()
    white = pixels(saved(Image.new("CMYK", (8, 8), (0, 0, 0, 0)), "JPEG"))
    black = pixels(saved(Image.new("CMYK", (8, 8), (0, 0, 0, 255)), "JPEG"))
    assert white.min() >= 250 and black.max() <= 5


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG", "TIFF"])
def test_the_first_of_several_frames_is_taken(format):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("white", "black", "red")]
    options = {"lossless": True} if format == "WEBP" else {}
    assert (pixels(saved(frames[0], format, save_all=True, append_images=frames[1:], **options)) == 255).all()


def test_the_exif_orientation_is_told_and_not_applied():
    exif = Image.Exif()
    exif[images.EXIF_ORIENTATION] = 6
    data = saved(RGB.resize((16, 8)), "JPEG", exif=exif)
    with open_image(data) as image:
        assert orientation(image) == 6 and to_rgb(image).size == (16, 8)
    with open_image(saved(RGB, "PNG")) as image:
        assert orientation(image) == 1


def test_a_webp_of_a_huge_canvas_is_refused_before_it_is_opened(monkeypatch):
    """Pillow allocates the canvas when it opens the file."""
    lossless = saved(Image.new("RGB", (300, 200)), "WEBP", lossless=True)
    lossy = saved(Image.new("RGB", (300, 200)), "WEBP")
    extended = saved(
        Image.new("RGBA", (300, 200), (1, 2, 3, 4)), "WEBP", save_all=True, append_images=[RGB.resize((300, 200))]
    )
    monkeypatch.setattr(images, "MAX_WEBP_PIXELS", 300 * 200)
    for data in (lossless, lossy, extended):
        open_image(data).close()
    monkeypatch.setattr(images, "MAX_WEBP_PIXELS", 300 * 200 - 1)
    monkeypatch.setattr(images.Image, "open", lambda *args, **options: pytest.fail("opened"))
    for data in (lossless, lossy, extended):
        with pytest.raises(ValueError, match="300 x 200 pixels are more than"):
            open_image(data)


def test_a_jpeg_of_many_scans_is_refused(monkeypatch):
    data = saved(Image.effect_noise((64, 64), 50), "JPEG", progressive=True)
    scans = data.count(b"\xff\xda")
    assert scans > 3
    monkeypatch.setattr(images, "MAX_SCANNED_PIXELS", scans * 64 * 64)
    open_image(data).close()
    monkeypatch.setattr(images, "MAX_SCANNED_PIXELS", scans * 64 * 64 - 1)
    with pytest.raises(ValueError, match="scans of 64 x 64 pixels"):
        open_image(data)


def test_scans_are_counted_unless_there_can_be_only_one(monkeypatch):
    """A sequential JPEG of one scan, which most photos are, isn't searched; what follows its scan is never decoded."""
    noise = Image.effect_noise((64, 64), 50)
    sequential = saved(noise, "JPEG")
    repeated = sequential[:-2] + sequential[sequential.index(b"\xff\xda") :]
    monkeypatch.setattr(images, "MAX_SCANNED_PIXELS", 0)
    for data in (sequential, repeated):
        open_image(data).close()
    with open_image(repeated) as image, pytest.raises(OSError, match="broken data stream"):
        to_rgb(image)
    for mode in ("L", "RGB", "CMYK"):
        open_image(saved(noise.convert(mode), "JPEG")).close()
        with pytest.raises(ValueError, match="would take too long"):
            open_image(saved(noise.convert(mode), "JPEG", progressive=True))


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize("format", IMAGE_FORMATS)
def test_damaged_files_raise_what_is_promised(format):
    data = saved(RGB.resize((64, 64)), format)
    rng = np.random.default_rng(0)
    for _ in range(60):
        broken = bytearray(data[: rng.integers(1, len(data) + 1)])
        for place in rng.integers(0, len(broken), 3):
            broken[place] = rng.integers(256)
        try:
            with open_image(bytes(broken)) as image:
                to_rgb(image)
        except DECODE_ERRORS:
            pass
