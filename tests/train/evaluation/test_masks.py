"""Masks: all file formats, the crop of the image, and the errors for missing or invalid files."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from zpipe.schemas.errors import UsageError, ZpipeError
from zpipe.train.data.transforms import ViewConfig, draw_view, view_image
from zpipe.train.evaluation.localisation import IGNORED
from zpipe.train.evaluation.masks import MaskFolder, classes

WHOLE = torch.tensor([[0.0, 0.0, 8.0, 8.0]])


def save(folder, key, values):
    path = folder / f"{key}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values).save(path)
    return path


def square(value=1, side=8):
    values = np.zeros((side, side), np.uint8)
    values[2:5, 1:4] = value
    return values


@pytest.mark.parametrize("mode", ["L", "1", "P", "I;16", "RGB"])
def test_every_kind_of_pixels(mode):
    values = square()
    values[7, 7] = 255 if mode != "1" else 0
    if mode == "RGB":  # class 513 of ImageNet-S, and 1000 for what is ignored
        image = Image.fromarray(np.stack([values, 2 * values, 0 * values], axis=2))
        image.putpixel((7, 7), (1000 % 256, 1000 // 256, 0))
    elif mode == "P":
        image = Image.fromarray(values, "L").convert("P")
        image.putpalette(bytes(range(256)) * 3)
        image.putdata(values.flatten().tolist())
    elif mode == "1":
        image = Image.fromarray(values.astype(bool))
    else:
        image = Image.fromarray(values.astype(np.uint16) if mode == "I;16" else values)
    assert image.mode == mode
    found = classes(image)
    assert (found[:7] == square()[:7]).all() and found[7, 7] == (0 if mode == "1" else IGNORED)


def test_an_image_without_classes_is_refused():
    with pytest.raises(ValueError, match="mode RGBA are no classes"):
        classes(Image.new("RGBA", (4, 4)))


def test_masks_undergo_the_view_of_the_image(tmp_path):
    """A bright square of an image, and the mask of that square, lie in the same place of the view."""
    values = np.zeros((60, 100), np.uint8)
    values[20:44, 42:70] = 1
    view = draw_view(np.random.default_rng(0), 100, 60, ViewConfig(augment="eval", crop_pct=0.8))
    save(tmp_path, "a", values)
    box = torch.tensor([view.box.as_tuple()], dtype=torch.float32)
    masks, known = MaskFolder(tmp_path).view(["a"], box, 24)
    pixels = view_image(Image.fromarray(255 * values).convert("RGB"), view, 24, (100, 60))[0]
    assert known.tolist() == [True] and masks.shape == (1, 24, 24)
    assert ((pixels > 127) == (masks[0].numpy() == 1)).mean() > 0.98


def test_nested_keys_are_paths(tmp_path):
    save(tmp_path, "n01440764/a", square())
    masks, known = MaskFolder(tmp_path).view(["n01440764/a"], WHOLE, 8)
    assert known.all() and (masks[0].numpy() == square()).all()


def test_missing_and_empty_masks_are_counted(tmp_path):
    save(tmp_path, "a", square())
    save(tmp_path, "b", square(0))
    save(tmp_path, "c", square(255))
    folder = MaskFolder(tmp_path)
    assert folder.view(["a", "b", "c", "d"], WHOLE.expand(4, 4), 8)[1].tolist() == [True, False, False, False]
    folder.view(["e"], WHOLE, 8)
    summary = folder.summary()
    assert summary is not None and summary.startswith(f"{tmp_path}: segmentation is measured on 1 images; ")
    assert (
        "of 2 the mask has no object in view (b first)" in summary and "of 2 the mask is missing (d first)" in summary
    )
    complete = MaskFolder(tmp_path)
    complete.view(["a"], WHOLE, 8)
    assert complete.summary() is None


def test_a_folder_without_any_of_the_masks_is_refused(tmp_path):
    with pytest.raises(UsageError, match=r"has no PNG file; give a folder of KEY.png"):
        MaskFolder(tmp_path).view(["a"], WHOLE, 8)
    save(tmp_path, "a", square(255))
    folder = MaskFolder(tmp_path)
    for key in ("b", "a", "c"):  # the size of the batches decides nothing
        folder.view([key], WHOLE, 8)
    with pytest.raises(UsageError, match=r"none of 3 images has a usable mask \(b.png is missing\); give a"):
        folder.check_used()
    folder = MaskFolder(tmp_path)
    folder.view(["a"], WHOLE, 8)
    with pytest.raises(UsageError, match=r"a.png has no object in view\); .* \(255 is ignored\)"):
        folder.check_used()
    save(tmp_path, "d", square())
    folder.view(["d"], WHOLE, 8)
    folder.check_used()


def test_folders_of_classes_as_imagenet_s_has_them(tmp_path):
    save(tmp_path, "n01440764/a", square())
    save(tmp_path, "n01443537/b", square())
    (tmp_path / "README.txt").write_text("no mask")
    folder = MaskFolder(tmp_path)
    masks, known = folder.view(["a", "b", "c"], WHOLE.expand(3, 4), 8)
    assert known.tolist() == [True, True, False] and (masks[1].numpy() == square()).all()
    save(tmp_path, "b", 1 - square())  # a mask in the folder itself comes first
    assert (MaskFolder(tmp_path).view(["b"], WHOLE, 8)[0][0].numpy() == 1 - square()).all()
    save(tmp_path, "n01443537/a", square())
    with pytest.raises(UsageError, match=r"has n01440764/a.png and n01443537/a.png; give the folder of one split"):
        MaskFolder(tmp_path).view(["a"], WHOLE, 8)
    assert MaskFolder(tmp_path).view(["n01443537/a"], WHOLE, 8)[1].all()


def test_a_mask_that_can_not_be_read(tmp_path):
    (tmp_path / "a.png").mkdir()
    with pytest.raises(ZpipeError, match=r"a.png: can't be read \(.*\); check it and your access"):
        MaskFolder(tmp_path).view(["a"], WHOLE, 8)


def test_masks_of_another_size_and_broken_ones_are_named(tmp_path):
    save(tmp_path, "a", square(side=9))
    with pytest.raises(ZpipeError, match=r"a.png: is 9 x 9 pixels, its image 8 x 8; give a mask"):
        MaskFolder(tmp_path).view(["a"], WHOLE, 8)
    path = save(tmp_path, "b", square())
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(ZpipeError, match=r"b.png: can't be decoded .*; replace it"):
        MaskFolder(tmp_path).view(["b"], WHOLE, 8)
