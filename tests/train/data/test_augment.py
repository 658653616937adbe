"""Pixels, maps and targets beyond crop and flip: colours, mixing, frames, and decoding at a reduced size."""

import io
import random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from ramps import load
from tiny import GRID, SIDE, scenes, store

from zpipe.schemas.errors import UsageError, ZpipeError
from zpipe.schemas.geometry import Box, crop_map
from zpipe.schemas.relevance_maps import RelevanceMaps
from zpipe.train.data.loader import RelevanceLoader
from zpipe.train.data.mix import MixConfig, mix_batch
from zpipe.train.data.transforms import (
    RAND_AUGMENT,
    View,
    ViewConfig,
    change_colours,
    decode,
    erase,
    erase_maps,
    view_image,
)

# -------------------------------------------------------------------------------------------------------------- colours


@pytest.mark.parametrize("colour", ["deit", "deit3"])
def test_colours_change_and_nothing_else(data, colour):
    plain, coloured = load(data), load(data, view=ViewConfig(colour=colour))
    changed = 0
    for one, other in zip(plain, coloured, strict=True):
        for name in one.keys() - {"image", "key"}:
            assert torch.equal(one[name], other[name])
        changed += (one["image"] != other["image"]).flatten(1).any(dim=1).sum().item()
    assert changed >= 12  # of 24
    again = load(data, view=ViewConfig(colour=colour), num_workers=2)
    assert all(torch.equal(one["image"], other["image"]) for one, other in zip(coloured, again, strict=True))


@pytest.mark.parametrize("colour", ["deit", "deit3"])
def test_no_pixel_moves(colour):
    """A black image with one bright square, whose place stays the odd one whatever is done to the image."""
    pixels = np.zeros((3, 32, 32), np.uint8)
    pixels[:, 8:20, 4:12] = 200
    for seed in range(60):
        out = change_colours(np.random.default_rng(seed), pixels, colour)
        assert out.shape == pixels.shape and out.dtype == np.uint8
        inside = out[:, 11:17, 7:9].reshape(3, -1)
        outside = np.concatenate([out[:, :4].reshape(3, -1), out[:, 26:].reshape(3, -1)], axis=1)
        assert np.ptp(inside.astype(int), axis=1).max() <= 60 and np.ptp(outside.astype(int), axis=1).max() <= 60


@pytest.mark.parametrize("name", RAND_AUGMENT)
@pytest.mark.parametrize("drawn", [-5.0, 100.0])
def test_the_weakest_and_the_strongest_operation_can_be_done(monkeypatch, name, drawn):
    """A magnitude beyond either bound; one in forty draws is beyond the upper one."""
    monkeypatch.setattr("zpipe.train.data.transforms.RAND_AUGMENT", (name,))
    monkeypatch.setattr(random, "gauss", lambda mean, deviation: drawn)
    pixels = np.random.default_rng(0).integers(0, 256, (3, 8, 8), dtype=np.uint8)
    for seed in range(8):
        out = change_colours(np.random.default_rng(seed), pixels, "deit")
        assert out.shape == pixels.shape and len(np.unique(out)) > 1


def test_evaluation_leaves_colours_alone(data):
    plain, asked = (load(data, augment="eval", view=ViewConfig(colour=colour)) for colour in ("none", "deit3"))
    assert all(torch.equal(one["image"], other["image"]) for one, other in zip(plain, asked, strict=True))


def test_an_unknown_colour_is_refused():
    with pytest.raises(UsageError, match="view.colour: 'sepia'; choose one of none, deit, deit3"):
        ViewConfig(colour="sepia")


# ------------------------------------------------------------------------------------------------------------- decoding


def photo(width, height):
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8))
    image = coarse.resize((width, height), Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=92)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("size", "loaded"), [(700, (1600, 1200)), (400, (800, 600)), (300, (400, 300)), (60, (200, 150))]
)
def test_a_jpeg_is_decoded_at_a_fraction_where_that_is_enough(size, loaded):
    whole = View(Box(0, 0, 1600, 1200), False)
    image, view, source = decode(photo(1600, 1200), lambda _: whole, size)
    assert source == (1600, 1200) and view is whole
    assert image.size == loaded and min(image.size) >= size


@given(st.integers(0, 2**32 - 1), st.integers(16, 80), st.booleans())
def test_it_shows_the_same_as_the_whole_decode(seed, size, flipped):
    rng = np.random.default_rng(seed)
    x, y = rng.uniform(0, 200), rng.uniform(0, 100)
    view = View(Box(x, y, x + rng.uniform(150, 420), y + rng.uniform(150, 370)), flipped)
    jpeg = photo(640, 480)
    image, _, source = decode(jpeg, lambda _: view, size)
    full = Image.open(io.BytesIO(jpeg)).convert("RGB")
    found, wanted = (view_image(each, view, size, source).astype(int) for each in (image, full))
    assert np.abs(found - wanted).mean() < 2.5  # of 255: other rounding, other filter, no shift


def test_a_shift_of_half_a_pixel_would_show():
    """That the test above can fail: a box taken from the wrong corner by one decoded pixel."""
    jpeg = photo(640, 480)
    view, off = (View(Box(x, 40, x + 400, 440), False) for x in (40, 48))
    full = Image.open(io.BytesIO(jpeg)).convert("RGB")
    found, wanted = (view_image(full, each, 50, (640, 480)).astype(int) for each in (off, view))
    assert np.abs(found - wanted).mean() > 5


# --------------------------------------------------------------------------------------------------------------- frames


@pytest.fixture(scope="module")
def centred(tmp_path_factory):
    """Scenes with maps of a teacher that saw the centre 0.9 of them, and with maps of the whole."""
    from zpipe.pipeline.extract import ExtractConfig, extract_teacher_maps

    root = tmp_path_factory.mktemp("centred")
    tars = scenes(root / "shards", 12)
    store(tars, root / "full")
    body = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3}
    config = ExtractConfig(
        teacher="deit_tiny_patch16_224",
        weights="random",
        num_classes=10,
        teacher_args=body,
        executor="local",
        threads=1,
        device="cpu",
        frame="center",
    )
    extract_teacher_maps(tars, root / "center", config)
    return root


def test_centre_maps_serve_the_views_inside_them(centred):
    """At the very frame a map is what it is; a narrower view is a crop of it."""
    maps = RelevanceMaps(centred / "center", normalise="minmax")
    share = maps.manifest.provenance.crop_pct
    table = maps.table(["key", "frame_x1", "frame_y1", "frame_x2", "frame_y2"]).to_pydict()
    frames = {
        key: [table[f"frame_{edge}"][i] for edge in ("x1", "y1", "x2", "y2")] for i, key in enumerate(table["key"])
    }
    for crop_pct in (share, share / 2):
        view = ViewConfig(crop_pct=crop_pct)
        (batch,) = RelevanceLoader(
            centred / "shards", centred / "center", batch_size=12, image_size=32, augment="eval", view=view
        )
        boxes = dict(zip(batch["key"], batch["box"].numpy(), strict=True))
        for key, found in zip(batch["key"], batch["relevance"], strict=True):
            frame, view_box = (Box(*(float(edge) for edge in edges)) for edges in (frames[key], boxes[key]))
            np.testing.assert_allclose(found, crop_map(maps[key], frame, view_box, (4, 4)), atol=1e-5)
            if crop_pct == share:
                np.testing.assert_allclose(found, maps[key], atol=1e-4)


def test_what_centre_maps_can_not_serve_is_refused(centred):
    with pytest.raises(ZpipeError, match="'center' can't serve random crops"):
        RelevanceLoader(centred / "shards", centred / "center", batch_size=1)
    with pytest.raises(ZpipeError, match="can't serve views of 1; lower view.crop_pct"):
        RelevanceLoader(
            centred / "shards", centred / "center", batch_size=1, augment="eval", view=ViewConfig(crop_pct=1.0)
        )


# --------------------------------------------------------------------------------------------------------------- mixing


def batch_of(count=6, side=12, grid=(3, 4), classes=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        "image": torch.rand(count, 3, side, side, generator=generator),
        "label": torch.randint(classes, (count,), generator=generator),
        "relevance": torch.rand(count, *grid, generator=generator),
        "key": [str(i) for i in range(count)],
    }


@given(st.integers(0, 2**32 - 1))
def test_mixup_weighs_images_maps_and_targets_alike(seed):
    batch = batch_of()
    config = MixConfig(mixup=0.8, cutmix=0.0, smoothing=0.0)
    out = mix_batch(batch, config, np.random.default_rng(seed), 5)
    own, other = (
        torch.nn.functional.one_hot(batch["label"], 5).float(),
        torch.nn.functional.one_hot(batch["label"].flip(0), 5).float(),
    )
    weight = np.random.default_rng(seed)
    weight.random()
    share = weight.beta(0.8, 0.8)
    for name in ("image", "relevance"):
        torch.testing.assert_close(out[name], (share * batch[name] + (1 - share) * batch[name].flip(0)).float())
    torch.testing.assert_close(out["target"], (share * own + (1 - share) * other).float())
    assert out["key"] == batch["key"] and torch.equal(batch["image"], batch_of()["image"])


@given(st.integers(0, 2**32 - 1))
def test_cutmix_pastes_image_and_map_under_one_box(seed):
    """Images that are their own maps, blown up: then the mixed map is the mixed image, shrunk."""
    batch = batch_of(grid=(4, 4))
    big = batch["relevance"][:, None].repeat_interleave(3, dim=2).repeat_interleave(3, dim=3)  # [B, 1, 12, 12]
    batch["image"] = big.expand(-1, 3, -1, -1).clone()
    config = MixConfig(mixup=0.0, cutmix=1.0, smoothing=0.1)
    out = mix_batch(batch, config, np.random.default_rng(seed), 5)
    shrunk = torch.nn.functional.avg_pool2d(out["image"], 3)[:, 0]
    torch.testing.assert_close(out["relevance"], shrunk)
    torch.testing.assert_close(out["target"].sum(dim=1), torch.ones(6))


def test_nothing_is_mixed_when_nothing_is_asked():
    batch = batch_of()
    for config in (MixConfig(prob=0.0), MixConfig(mixup=0.0, cutmix=0.0)):
        out = mix_batch(batch, config, np.random.default_rng(0), 5)
        assert torch.equal(out["image"], batch["image"]) and torch.equal(out["relevance"], batch["relevance"])
        assert torch.equal(out["target"].argmax(dim=1), batch["label"])


@pytest.mark.parametrize("options", [{"mixup": -1}, {"prob": 2}, {"switch": -0.1}, {"smoothing": 1.5}])
def test_mixing_out_of_range_is_refused(options):
    with pytest.raises(UsageError, match=f"mix.{next(iter(options))}"):
        MixConfig(**options)


# -- erasing -----------------------------------------------------------------------------------------------------------


def test_erased_rectangles_are_noise_of_the_sizes_promised():
    pixels = np.full((3, 64, 64), 128, np.uint8)
    shares, tops = [], []
    for seed in range(300):
        out, box = erase(np.random.default_rng(seed), pixels, 0.5)
        if box is None:
            assert out is pixels
            continue
        left, top, right, bottom = (int(edge) for edge in box.as_tuple())
        shares.append((bottom - top) * (right - left) / 64**2)
        tops.append(top)
        mask = np.zeros((64, 64), bool)
        mask[top:bottom, left:right] = True
        assert (out[:, ~mask] == 128).all() and out[:, mask].std() > 20
    assert 100 < len(shares) < 200
    assert 0.01 < min(shares) < 0.05 and 0.28 < max(shares) < 0.35 and len(set(tops)) > 20
    assert (pixels == 128).all()


def test_maps_lose_what_was_erased():
    maps = np.random.default_rng(0).random((3, 4, 4), np.float32)
    got = erase_maps(maps, [None, Box(0, 0, 32, 16), Box(0, 12, 8, 20)], 32)
    assert got.dtype == np.float32
    np.testing.assert_array_equal(got[0], maps[0])
    assert not got[1, :2].any() and np.array_equal(got[1, 2:], maps[1, 2:])
    np.testing.assert_allclose(got[2, 1:3, 0], maps[2, 1:3, 0] / 2, rtol=1e-6)
    assert np.array_equal(got[2, :, 1:], maps[2, :, 1:])


def test_the_loader_erases_images_and_maps_together_and_alike_for_any_workers(tmp_path):
    scenes(tmp_path / "shards", 20)
    store(tmp_path / "shards", tmp_path / "maps")

    def batch(workers, erase):
        view = ViewConfig(crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0), flip=0.0, erase=erase)
        loader = RelevanceLoader(
            tmp_path / "shards", tmp_path / "maps", batch_size=20, image_size=SIDE, num_workers=workers, view=view
        )
        return next(iter(loader))

    plain, erased, same = batch(0, 0.0), batch(0, 1.0), batch(2, 1.0)
    assert torch.equal(erased["image"], same["image"]) and torch.equal(erased["relevance"], same["relevance"])
    changed = (plain["image"] != erased["image"]).any(1)  # [B, S, S]
    assert changed.flatten(1).any(1).all()
    cells = torch.nn.functional.max_pool2d(changed.float(), SIDE // GRID) > 0
    less = erased["relevance"] < plain["relevance"]
    assert not less[~cells].any() and less[cells & (plain["relevance"] > 0)].float().mean() > 0.95
    unchanged = ~cells
    assert torch.equal(erased["relevance"][unchanged], plain["relevance"][unchanged])


def test_a_probability_of_erasing_out_of_range():
    with pytest.raises(UsageError, match="view.erase 2"):
        ViewConfig(erase=2.0)
