"""What the check of make-shards accepts is what decodes in full size."""

import io

import numpy as np
import pytest
from PIL import Image

from zpipe.pipeline.sources import inspect_image
from zpipe.schemas.images import DECODE_ERRORS, open_image

KINDS = {
    "sequential": {},
    "progressive": {"progressive": True},
    "without subsampling": {"subsampling": 0},
    "with restart markers": {"restart_marker_blocks": 2},
    "grey": {"mode": "L"},
    "CMYK": {"mode": "CMYK"},
}


def decodes(data):
    try:
        with open_image(data) as image:
            image.load()
    except DECODE_ERRORS:
        return False
    return True


def passes(data, **check):
    try:
        inspect_image(data, **check)
    except (OSError, ValueError):
        return False
    return True


@pytest.mark.parametrize("kind", KINDS)
def test_a_jpeg_passes_the_check_if_it_decodes_in_full_size(kind):
    settings = dict(KINDS[kind])
    mode = settings.pop("mode", "RGB")
    rng = np.random.default_rng(0)
    buffer = io.BytesIO()
    pixels = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8))
    pixels.resize((70, 50)).convert(mode).save(buffer, "JPEG", **settings)
    good = buffer.getvalue()
    assert inspect_image(good)[:4] == inspect_image(good, check=False)[:4] == ("jpg", 70, 50, good)
    accepted = 0
    for _ in range(300):
        changed = bytearray(good)
        for place in rng.integers(0, len(good), 3):
            changed[place] = rng.integers(0, 256)
        data = bytes(changed[: rng.integers(0, len(good))] if rng.random() < 0.3 else changed)
        accepted += passes(data)
        assert passes(data) == decodes(data)
        assert passes(data, check=False) or not passes(data)  # the header alone is no stricter
    assert 0 < accepted < 300


@pytest.mark.parametrize(("form", "mode", "suffix"), [("PNG", "I;16", "png"), ("WEBP", "RGB", "webp")])
def test_other_formats_of_shards_keep_their_bytes_either_way(form, mode, suffix):
    buffer = io.BytesIO()
    Image.new(mode, (12, 9)).save(buffer, form)
    for check in (True, False):
        assert inspect_image(buffer.getvalue(), check=check)[:4] == (suffix, 12, 9, buffer.getvalue())


def test_formats_that_shards_do_not_hold_are_written_as_png_either_way():
    buffer = io.BytesIO()
    Image.new("RGB", (12, 9), "red").save(buffer, "BMP")
    checked, unchecked = (inspect_image(buffer.getvalue(), check=check) for check in (True, False))
    assert checked == unchecked and checked.suffix == "png" and checked.notes == ("re-encoded as PNG",)
