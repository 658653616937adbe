"""How often the host waits for a GPU, by torch's own count; `tests/pretend_cuda.py` counts more kinds of waits."""

import pytest
import torch

from zpipe.gpu_numbers import NumbersConfig, count_waits, waits_of
from zpipe.train.data.loader import RelevanceLoader
from zpipe.train.models.zoomvit import ZoomViT

pytestmark = pytest.mark.gpu

CUDA = torch.device("cuda")


def test_waits_are_counted():
    x = torch.ones(3, device="cuda")
    assert count_waits(lambda: x + x) == 0
    assert count_waits(lambda: (x.sum().item(), x.cpu())) == 2
    assert count_waits(torch.cuda.current_stream().synchronize) == 1


def test_a_batch_of_maps_waits_once_and_a_training_step_never():
    checks = waits_of(CUDA, NumbersConfig(side=64, depth=2, width=48))
    assert len(checks) == 2 and all(check.ok for check in checks), checks


@pytest.mark.parametrize(("zoom", "waits"), [({"alpha": 0.4}, 1), ({"budget": 3}, 0)], ids=str)
def test_a_zoomvit_waits_for_the_lengths_alone(zoom, waits):
    torch.manual_seed(0)
    model = ZoomViT(32, patch_size=8, embed_dim=48, depth=2, num_heads=3, num_classes=5).to("cuda")
    images, scores = torch.randn(8, 3, 32, 32, device="cuda"), torch.rand(8, 16, device="cuda")

    def step():
        with torch.autocast("cuda", torch.bfloat16):
            model(images, scores, **zoom).float().square().sum().backward()

    step()
    assert count_waits(step) == waits


def test_pinned_batches_are_copied_before_their_memory_is_used_again(photo_shards):
    options = {"batch_size": 2, "image_size": 224, "num_workers": 2}
    whole = list(RelevanceLoader(photo_shards, **options))
    moved = []
    for batch in RelevanceLoader(photo_shards, pin_memory=True, **options):
        assert batch["image"].is_pinned()
        torch.cuda._sleep(10**7)  # the copies wait
        moved.append(batch["image"].to("cuda", non_blocking=True))
    assert len(moved) == len(whole) > 4
    for batch, image in zip(whole, moved, strict=True):
        assert torch.equal(image.cpu(), batch["image"])
