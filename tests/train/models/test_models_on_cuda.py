"""Every model and loss on a pretend CUDA device: values and gradients are the CPU's, and the host waits for nothing."""

import copy

import numpy as np
import pytest
import timm
import torch
from pretend_cuda import host
from tiny_models import CLASSES, GRID, MODELS, SIDE

import zpipe.train.models  # noqa: F401  # registers the models
from zpipe.train.data.mix import MixConfig, mix_batch
from zpipe.train.losses import CoarseToFineLoss, TokenLabelLoss, ZoomerLoss, relevance_token_labels
from zpipe.train.models import Zoomer
from zpipe.train.models.cfvit_stages import cell_scores

pytestmark = pytest.mark.usefixtures("one_thread")


def pair(cuda, model):
    """The same model on the CPU and on the device."""
    there = copy.deepcopy(model).to("cuda")
    cuda.reset()
    return model, there


def moved(x):
    return None if x is None else x.pin_memory().to("cuda", non_blocking=True)


def run(model, *inputs, **arguments):
    """The outputs of a model, a tuple, and the gradients of the sum of their squares."""
    out = model(*(x for x in inputs if x is not None), **arguments)
    out = out if isinstance(out, tuple) else (out,)
    out = tuple(x for x in out if x.is_floating_point())
    sum(x.float().square().sum() for x in out).backward()
    return [x.detach() for x in out], [p.grad for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("name", MODELS)
def test_a_model(cuda, name, mode):
    kind, arguments, side, call, waits = MODELS[name]
    torch.manual_seed(0)
    size = {"num_classes": CLASSES} | ({} if kind == "sparseformer_tiny" else {"img_size": SIDE})
    here, there = pair(cuda, timm.create_model(kind, **size | arguments).train(mode == "train"))
    images, scores = torch.randn(3, 3, SIDE, SIDE), None if side is None else torch.rand(3, side * side)
    expected = run(here, images, scores, **call)
    found = run(there, moved(images), moved(scores), **call)
    torch.testing.assert_close(host(found), expected, rtol=1e-3, atol=1e-4)
    assert cuda.syncs.total() == waits, cuda.syncs


@pytest.mark.parametrize("name", MODELS)
def test_a_model_under_autocast(cuda, name):
    """On both devices bfloat16 has three digits; discrete choices, and so whole images, may differ."""
    kind, arguments, side, call, waits = MODELS[name]
    torch.manual_seed(0)
    size = {"num_classes": CLASSES} | ({} if kind == "sparseformer_tiny" else {"img_size": SIDE})
    _, there = pair(cuda, timm.create_model(kind, **size | arguments))
    images, scores = moved(torch.randn(3, 3, SIDE, SIDE)), moved(None if side is None else torch.rand(3, side * side))
    with torch.autocast("cuda", dtype=torch.bfloat16):
        out = there(images, *([] if scores is None else [scores]), **call)
    out = [x for x in (out if isinstance(out, tuple) else (out,)) if x.is_floating_point()]
    sum(x.float().square().sum() for x in out).backward()
    assert cuda.syncs.total() == waits, cuda.syncs
    assert all(host(p.grad).isfinite().all() for p in there.parameters() if p.grad is not None)


def test_the_zoomer(cuda):
    torch.manual_seed(0)
    here, there = pair(cuda, Zoomer(2, GRID, width=8))
    images = torch.randn(3, 3, SIDE, SIDE)
    torch.testing.assert_close(host(run(there, moved(images))), run(here, images), rtol=1e-3, atol=1e-4)
    assert not cuda.syncs


LOGITS = {"coarse": (3, CLASSES), "fine": (3, CLASSES)}
LOSSES = {
    "zoomer": lambda x: ZoomerLoss()(x["scores"], x["maps"].flatten(1))[0],
    "zoomer, softmax": lambda x: ZoomerLoss(normalisation="softmax")(x["scores"], x["maps"].flatten(1))[0],
    "coarse to fine": lambda x: CoarseToFineLoss()(x["coarse"], x["fine"], x["labels"]),
    "by labels": lambda x: CoarseToFineLoss(coarse="labels", label_smoothing=0.1)(x["coarse"], x["fine"], x["labels"]),
    "token labels": lambda x: TokenLabelLoss()(
        x["coarse"], x["dense"], x["labels"], relevance_token_labels(x["maps"], x["labels"], CLASSES, 2)
    ),
}


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss(cuda, name):
    given = {
        "scores": torch.rand(3, GRID * GRID),
        "maps": torch.rand(3, GRID, GRID),
        "coarse": torch.randn(3, CLASSES),
        "fine": torch.randn(3, CLASSES),
        "dense": torch.randn(3, 4, CLASSES),
        "labels": torch.tensor([0, 4, 2]),
    }
    there = {key: moved(x) for key, x in given.items()}
    cuda.reset()
    losses = []
    for inputs in (given, there):
        free = {key: inputs[key].requires_grad_() for key in ("scores", "coarse", "fine", "dense")}
        loss = LOSSES[name](inputs)
        loss.backward()
        losses.append((loss.detach(), {key: x.grad for key, x in free.items() if x.grad is not None}))
    torch.testing.assert_close(host(losses[1]), losses[0])
    assert not cuda.syncs


@pytest.mark.parametrize("config", [MixConfig(cutmix=0.0), MixConfig(mixup=0.0), MixConfig(prob=0.0)], ids=str)
def test_mixing(cuda, config):
    batch = {"image": torch.randn(4, 3, SIDE, SIDE), "label": torch.arange(4), "relevance": torch.rand(4, GRID, GRID)}
    there = {key: moved(x) for key, x in batch.items()}
    cuda.reset()
    found = mix_batch(there, config, np.random.default_rng(1), CLASSES)
    assert not cuda.syncs
    torch.testing.assert_close(host(found), mix_batch(batch, config, np.random.default_rng(1), CLASSES))


def test_wrong_values_fail_on_the_device_without_a_wait(cuda):
    """An assertion of the device takes the place of the ValueError of the CPU."""
    with pytest.raises(RuntimeError, match="scores must be finite"):
        cell_scores(moved(torch.full((2, 4), torch.nan)), 2, 4)
    with pytest.raises(RuntimeError, match="token labels need maps in"):
        relevance_token_labels(moved(torch.full((1, 2, 2), 1.5)), moved(torch.tensor([0])), CLASSES, 2)
    assert not cuda.syncs
