"""The models that the papers' authors published, and what their own code computes with them; see golden/README.md."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from zpipe.train.models import load_release

GOLDEN = Path(__file__).parent / "golden"
MEAN = torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1)
STD = torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1)


def golden(name: str) -> tuple[dict[str, np.ndarray], dict[str, torch.Tensor], torch.Tensor]:
    """The arrays of the file, the state dict among them, and the images as the model gets them."""
    with np.load(GOLDEN / f"{name}.npz") as file:
        values = dict(file)
    state = {key[2:]: torch.from_numpy(value) for key, value in values.items() if key.startswith("w/")}
    pixels = torch.from_numpy(values["images_uint8"]).float().repeat_interleave(4, 2).repeat_interleave(4, 3)
    images = (F.avg_pool2d(pixels, 5, 1, 2) / 255 - MEAN) / STD
    return values, state, images


def check_golden(name: str, model: str, **config) -> None:
    values, state, images = golden(name)
    vit = load_release(state, model=model, num_heads=int(values["config"][4]), **config)
    coarse, fine = vit(images, return_stages=True)
    np.testing.assert_allclose(coarse.numpy(), values["coarse_logits"], atol=1e-5)
    np.testing.assert_allclose(fine.numpy(), values["fine_logits"], atol=1e-5)
    np.testing.assert_allclose(vit(images, full_split=True).numpy(), values["fine_logits_full_split"], atol=1e-5)
    assert fine.std() > 0.1 and not vit.training
    assert [*vit.lengths(full_split=True), *vit.lengths()] == values["tokens"].tolist()
