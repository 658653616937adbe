"""Attribution on a pretend CUDA device: the maps are those of the CPU, and the host waits once per batch."""

import copy

import numpy as np
import pytest
import torch
from tiny_families import FAMILIES, tiny_family
from tiny_teachers import of_torchvision, of_transformers
from tiny_vit import pixels, tiny_vit

from zpipe.pipeline.classifier import as_classifier
from zpipe.pipeline.explainer import ExplainConfig, Explainer, precisions_of
from zpipe.pipeline.methods import CLASS_BLIND, DEFAULT_METHOD, METHODS, refusal_of
from zpipe.pipeline.teacher import Teacher

SIDE = 32
OTHERS = {
    "torchvision": of_torchvision,
    "transformers": lambda: of_transformers("ViTForImageClassification"),
    "CLIP of transformers": lambda: of_transformers("CLIPForImageClassification"),
}


def vit():
    return tiny_vit(img_size=SIDE, patch_size=8)


def teacher_of(model):
    return Teacher(
        model=as_classifier(model.float().requires_grad_(False)),
        name="tiny",
        weights="random",
        digest="",
        num_classes=5,
        image_size=(SIDE, SIDE),
        grid=(4, 4),
        mean=(0.5, 0.4, 0.3),
        std=(0.5, 0.6, 0.7),
        interpolation="bicubic",
        crop_pct=1.0,
        model_args={},
    )


def images():
    return np.random.default_rng(0).integers(0, 256, (5, SIDE, SIDE, 3), dtype=np.uint8)


def explainers(model, batch_size=8, features=False, **settings):
    """The same on the CPU and on the device."""
    config = ExplainConfig(**settings)
    return [
        Explainer(teacher_of(each), config, batch_size=batch_size, device=device, features=features)
        for each, device in ((copy.deepcopy(model), "cpu"), (model, "cuda"))
    ]


def check(cuda, here, there, *, batches=1, rounding=1e-4):
    """What two explainers return is the same, and the second one makes the host wait once per batch."""
    labels = np.arange(5)
    expected = here(images(), labels)
    cuda.reset()
    found = there(images(), labels)
    waits = {where.partition(":")[0]: count for where, count in cuda.syncs.items()}
    assert waits.pop("event at pipeline/explainer.py") == batches
    assert not waits
    for name, array, other in zip(expected._fields, found, expected, strict=True):
        scale = np.abs(other).max(initial=0)
        np.testing.assert_allclose(array, other, rtol=10 * rounding, atol=rounding * scale, err_msg=name)


@pytest.mark.parametrize("method", METHODS)
def test_every_method(cuda, method):
    check(cuda, *explainers(vit(), method=method))
    target = "predicted" if method in CLASS_BLIND else "top:3"
    options = {"symmetrise": True, "features": True, "batch_size": 3}
    check(cuda, *explainers(vit(), method=method, target=target, **options), batches=2)


@pytest.mark.parametrize("precision", precisions_of(DEFAULT_METHOD, "cpu"))
def test_every_precision(cuda, precision):
    rounding = 0.02 if "bfloat16" in precision else 1e-4  # the CPU rounds the products of bfloat16
    check(cuda, *explainers(vit(), precision=precision), rounding=rounding)


@pytest.mark.parametrize("name", [*FAMILIES, *OTHERS])
def test_every_family(cuda, name):
    for method in ("gradient-attention", "libragrad"):
        model = tiny_family(name) if name in FAMILIES else OTHERS[name]()
        if not refusal_of(as_classifier(model), method):
            here, there = explainers(model, method=method)
            there(images()[:1], np.arange(1))  # timm makes the rotary embedding of DINOv3 on the CPU; it is kept
            check(cuda, here, there)


@pytest.mark.parametrize("method", METHODS)
def test_maps_of_known_classes(cuda, method):
    here, there = explainers(vit(), method=method)
    noisy, targets = images() + np.float32(0.5), np.array([4, 3, -1, 1, 0])
    cuda.reset()
    found = there.maps_of(noisy, targets)
    assert cuda.syncs.total() == 1
    np.testing.assert_allclose(found, here.maps_of(noisy, targets), rtol=1e-3, atol=1e-6)


def test_wrong_values_are_refused_before_the_device_has_them(cuda):
    _, there = explainers(vit())
    cuda.reset()
    with pytest.raises(ValueError, match=r"class 5 is outside 0\.\.4"):
        there(images(), np.array([0, 1, 2, 3, 5]))
    broken = images().astype(np.float32)
    broken[3, 0, 0, 0] = np.nan
    with pytest.raises(ValueError, match="image 3 of the batch has pixels that are NaN"):
        there.maps_of(broken, np.arange(5))
    assert not cuda.syncs and not cuda.kernels


@pytest.mark.parametrize("method", METHODS)
def test_a_call_from_python_reads_the_values_to_check_them(cuda, method):
    model = tiny_vit(dtype=torch.float32)
    given, targets = pixels(model)
    model, given, targets = model.to("cuda"), given.to("cuda"), targets.to("cuda")
    cuda.reset()
    METHODS[method](model, given, targets)
    assert all(place.startswith("item at pipeline/supported.py:") for place in cuda.syncs) and cuda.syncs.total() == 2
    with pytest.raises(ValueError, match=r"class 5 is outside 0\.\.4"):
        METHODS[method](model, given, torch.full((3,), 5, device="cuda"))


def test_a_batch_is_launched_before_the_one_before_it_is_waited_for(cuda):
    _, there = explainers(vit(), method="gradient-attention")
    expected = there(images(), np.arange(5)), there(images()[::-1].copy(), np.arange(5))
    cuda.reset()
    pixels = there.new_array(images().shape)
    pixels[...] = images()
    first = there.begin(pixels, np.arange(5))
    second = there.begin(images()[::-1].copy(), np.arange(5))
    assert not cuda.syncs and cuda.kernels
    for number, launched in enumerate((first, second)):
        for array, other in zip(launched.result(), expected[number], strict=True):
            np.testing.assert_array_equal(array, other)
        assert cuda.syncs.total() == number + 1


def test_arrays_for_pixels_are_pinned(cuda):
    _, there = explainers(vit())
    pixels = there.new_array((5, SIDE, SIDE, 3))
    assert torch.from_numpy(pixels).is_pinned() and torch.from_numpy(pixels[2:4]).is_pinned()
    assert not torch.from_numpy(images()).is_pinned()


def test_one_image_in_a_batch_that_does_not_fit_gets_a_smaller_batch(cuda, monkeypatch):
    """What has to fit is the batch as it is filled up, so that there is room to lower it."""
    here, there = explainers(vit(), batch_size=4, method="gradient-attention")
    sizes = []

    def look(module, args, output):
        sizes.append(len(output))
        if len(output) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    there._model.model.head.register_forward_hook(look)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    found = there(images()[:1], np.zeros(1, np.int64)).maps
    assert sizes == [4, 2, 1]
    np.testing.assert_allclose(found, here(images()[:1], np.zeros(1, np.int64)).maps, rtol=1e-3, atol=1e-6)


def test_every_batch_has_the_same_shape(cuda, monkeypatch):
    here, there = explainers(vit(), batch_size=4, target="predicted")
    sizes = []
    for each in (here, there):
        attribute = each._attribute
        monkeypatch.setattr(
            each, "_attribute", lambda x, y, attribute=attribute: sizes.append(len(x)) or attribute(x, y)
        )
    whole = here(images(), np.arange(5))
    assert sizes == [4, 1]
    filled = there(images(), np.arange(5))
    assert sizes[2:] == [4, 4] and [len(each) for each in filled] == [5] * 4
    alone = there(images()[2:3], np.arange(1))
    for name in ("maps", "logits", "targets"):
        np.testing.assert_allclose(getattr(filled, name), getattr(whole, name), rtol=1e-3, atol=1e-5)
        np.testing.assert_allclose(getattr(alone, name)[0], getattr(whole, name)[2], rtol=1e-3, atol=1e-5)
