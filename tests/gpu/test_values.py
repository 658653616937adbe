"""What a device computes is what float64 says: maps, attention, models, and compiled ones."""

import copy

import pytest
import timm
import torch
from tiny_models import CLASSES, MODELS, SIDE

from zpipe.gpu_numbers import NumbersConfig, agreement, attention_errors, float32_errors, relative_error, zoomvit_errors
from zpipe.pipeline.methods import METHODS
from zpipe.schemas.devices import float32_arithmetic
from zpipe.train.losses import ZoomerLoss
from zpipe.train.models import Zoomer
from zpipe.train.models.backbone import compiled
from zpipe.train.models.packing import packing
from zpipe.train.models.zoomvit import ZoomViT

SMALL = NumbersConfig(images=4, side=64, depth=1, width=48)
SIZES = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 5}


def sizes(device):
    return SMALL if device.type == "cpu" else NumbersConfig()


@pytest.mark.parametrize("method", METHODS)
def test_every_precision_of_a_method(device, method):
    found = agreement(device, sizes(device), [method])
    assert found and all(each.ok for each in found), found


def test_float32_is_never_tf32(device):
    checks = float32_errors(device)
    assert checks and all(check.ok for check in checks), checks


@pytest.mark.parametrize("errors", [attention_errors, zoomvit_errors])
def test_packed_sequences(device, errors):
    """Attention in each form that the device has, and a ZoomViT by threshold and by budget, forward and backward."""
    checks = errors(device, sizes(device))
    assert checks and all(check.ok for check in checks), checks
    if errors is attention_errors and packing(torch.tensor([1], device=device), [1]).has_flash:
        assert any("flash" in check.name for check in checks)


def test_a_zoomer_and_its_loss(device):
    torch.manual_seed(0)
    zoomer, images, maps = Zoomer(2, 4, width=8).train(), torch.randn(6, 3, 32, 32), torch.rand(6, 16)

    def gradients(model, images, maps):
        ZoomerLoss()(model(images), maps)[0].backward()
        return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])

    exact = gradients(copy.deepcopy(zoomer).double(), images.double(), maps.double())
    with float32_arithmetic():
        found = gradients(zoomer.to(device), images.to(device), maps.to(device))
    assert relative_error(found, exact) < 1e-4


@pytest.mark.parametrize("name", MODELS)
def test_every_model(device, name):
    """Against the CPU in float32, since float64 might choose other tokens."""
    kind, arguments, side, call, _ = MODELS[name]
    torch.manual_seed(0)
    size = {"num_classes": CLASSES} | ({} if kind == "sparseformer_tiny" else {"img_size": SIDE})
    model = timm.create_model(kind, **size | arguments)
    inputs = [torch.randn(3, 3, SIDE, SIDE)] + ([] if side is None else [torch.rand(3, side * side)])
    there = copy.deepcopy(model).to(device)
    with float32_arithmetic():
        expected, found = outputs(model, inputs, call), outputs(there, [x.to(device) for x in inputs], call)
    assert all(relative_error(mine, right) < 1e-3 for mine, right in zip(found, expected, strict=True))


def outputs(model, inputs, call):
    """The outputs, and the gradients of the sum of their squares as one vector."""
    out = model(*inputs, **call)
    out = [x for x in (out if isinstance(out, tuple) else (out,)) if x.is_floating_point()]
    sum(x.square().sum() for x in out).backward()
    gradients = [parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None]
    return [*(x.detach() for x in out), torch.cat(gradients)]


def step(model, call, images, arguments):
    model.zero_grad()
    with torch.autocast(images.device.type, torch.bfloat16):
        logits = call(images, **arguments)
    logits.float().square().sum().backward()
    return logits.detach().float(), torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore::UserWarning")  # of the compiler
@pytest.mark.parametrize("zoom", [{"alpha": 0.4}, {"budget": 3}, None], ids=str)
def test_a_compiled_model_is_the_eager_one(zoom):
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = (ZoomViT(**SIZES) if zoom else timm.create_model("deit_tiny_patch16_224", **SIZES)).to("cuda")
    call = compiled(model)
    for seed in range(4):  # sequences of other lengths
        torch.manual_seed(seed)
        images = torch.randn(8, 3, 32, 32, device="cuda")
        arguments = {"scores": torch.rand(8, 16, device="cuda"), **zoom} if zoom else {}
        for mine, eager in zip(
            step(model, call, images, arguments), step(model, model, images, arguments), strict=True
        ):
            assert relative_error(mine, eager) < 0.05
