"""ZoomViT on a pretend CUDA device: values, what makes the host wait, kernels of attention; and compiled."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from pretend_cuda import host
from torch import Tensor, nn
from torch._dynamo.utils import counters

from zpipe.train.models.backbone import compiled
from zpipe.train.models.zoomvit import ZoomViT

torch.set_num_threads(1)
SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3, "num_classes": 5}


def model_of(**options: Any) -> ZoomViT:
    torch.manual_seed(0)
    model = ZoomViT(**SMALL | options)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model


def batch(n: int = 6, seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 3, 32, 32, generator=generator), torch.rand(n, 16, generator=generator)


def gradients(model: nn.Module) -> list[Tensor]:
    return [p.grad for p in model.parameters()]


@pytest.mark.parametrize("precision", ["float32", "bf16"])
@pytest.mark.parametrize(("zoom", "waits"), [({"alpha": 0.4}, ["tolist"]), ({"budget": 3}, [])])
@pytest.mark.parametrize("pos", ["learned", "sincos"])
def test_a_step_waits_for_the_lengths_alone(cuda, precision, zoom, waits, pos):
    here = model_of(pos=pos).train()
    there, inputs = copy.deepcopy(here).to("cuda"), [x.to("cuda") for x in batch()]
    cuda.reset()
    with torch.autocast("cuda", torch.bfloat16, enabled=precision == "bf16"):
        logits = there(*inputs, **zoom)
        logits.float().square().sum().backward()
    assert [line.partition(" at ")[0] for line in cuda.syncs.elements()] == waits
    # Two blocks, one call each; under a budget it is the dense one.
    assert cuda.ops["_flash_attention_forward"] == (2 if zoom == {"alpha": 0.4} and precision == "bf16" else 0)
    expected = here(*batch(), **zoom)
    expected.square().sum().backward()
    if precision == "float32":
        torch.testing.assert_close(host(logits), expected.detach(), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(host(gradients(there)), gradients(here), atol=1e-4, rtol=1e-4)
    else:
        torch.testing.assert_close(host(logits).float(), expected.detach(), atol=0.1, rtol=0.05)
        for mine, exact in zip(host(gradients(there)), gradients(here), strict=True):
            assert mine.dtype == torch.float32 and (mine - exact).norm() < 0.05 * exact.norm()


def test_nan_in_scores_is_an_assertion_of_the_device(cuda):
    model, (images, scores) = model_of().to("cuda"), (x.to("cuda") for x in batch())
    scores[2, 3] = torch.nan
    cuda.reset()
    for zoom in ({"alpha": 0.4}, {"budget": 3}):
        with pytest.raises(RuntimeError, match="scores must be numbers, got NaN"):
            model(images, scores, **zoom)
    assert not cuda.syncs


@pytest.mark.parametrize("zoom", [{"alpha": 0.4}, {"budget": 3}])
def test_gradients_of_rows_that_many_tokens_read_are_summed_in_float32(zoom):
    # The class token and the positions. Weights that bfloat16 holds make every term exact, so only the sum is rounded.
    model = model_of()
    images, scores = batch(300)
    with torch.autocast("cpu", torch.bfloat16):
        tokens = model.tokenise(images, scores, **zoom)
    weight = torch.randn(tokens.tokens.shape).to(torch.bfloat16)
    (tokens.tokens * weight).sum().backward()
    exact = torch.zeros(81, 24, dtype=torch.float64).index_add_(0, tokens.ids, weight.double())
    for parameter, rows in (
        (model.cls_token, exact[80:]),
        (model.pos_fine, exact[:64]),
        (model.pos_coarse, exact[64:80]),
    ):
        torch.testing.assert_close(parameter.grad[0].double(), rows, atol=1e-4, rtol=1e-5)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # which the compiler itself reads
def test_compiled_blocks_are_one_graph_for_batches_of_all_lengths():
    torch._dynamo.reset()
    counters.clear()
    model = model_of(drop_path_rate=0.2).eval()
    twin = model.compiled(backend="eager", fullgraph=True)
    for i in range(20):
        images, scores = batch(6 if i < 19 else 4, seed=i)
        zoom = {"alpha": (i + 0.5) / 20} if i % 4 else {"budget": i % 16}
        torch.testing.assert_close(twin(images, scores, **zoom), model(images, scores, **zoom), atol=1e-5, rtol=1e-5)
    assert counters["stats"]["unique_graphs"] == 2 and not counters["graph_break"]  # packed, and under a budget
    model.train()
    counters.clear()
    for i in range(20):
        twin(*batch(seed=i), alpha=(i + 0.5) / 20).sum().backward()
    assert counters["stats"]["unique_graphs"] == 2 and not counters["graph_break"]  # with stochastic depth, and without
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_compiling_leaves_the_model_as_it_is():
    model = model_of()
    twin = compiled(model)
    assert isinstance(twin, ZoomViT) and twin is not model
    assert list(twin.state_dict()) == list(model.state_dict())
    assert all(a is b for a, b in zip(twin.parameters(), model.parameters(), strict=True))
    assert model._run_block is not twin._run_block
    model.eval()
    assert not twin.blocks.training
    layer = nn.Linear(2, 2)
    assert compiled(layer).weight is layer.weight  # any other model: as a whole
