"""The attribution methods that extraction knows by name, all with the interface of `relevance.attribute`.

    transformer-attribution         relevance times gradient, per class (Chefer et al., CVPR 2021; the ZoomViT paper's)
    transformer-attribution-stable  the same with residual connections split by magnitude, see `pipeline/relevance.py`
    gradient-attention              attention times gradient, per class (Chefer et al., ICCV 2021, Eq. 5-6)
    rollout                         attention alone, no class (Abnar and Zuidema, ACL 2020)
    class-attention                 the class token's attention in the last block, no class (Caron et al., ICCV 2021)

The last two depend on no class: they give the same map for every target.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor

from zpipe.pipeline.classifier import Classifier
from zpipe.pipeline.recorded_forward import (
    Attribution,
    BlockRecord,
    Linear,
    Recorded,
    gelu_kind,
    join_heads,
    record_forward,
    softmax,
    softmax_grad,
    split_heads,
)
from zpipe.pipeline.relevance import attribute
from zpipe.pipeline.supported import Targets, check_request, check_supported

Method = Callable[[VisionTransformer, Tensor, Targets], Attribution]


@torch.no_grad()
def gradient_attention(model: VisionTransformer, images: Tensor, targets: Targets) -> Attribution:
    """The class token's row of the product over blocks of I + mean over heads of max(0, G_A * A).

    G_A is the gradient. Arguments, result and exceptions are those of `relevance.attribute`. It takes about 2.3 forward
    passes for one target.
    """
    check_request(model, images, targets)
    with torch.autocast(images.device.type, enabled=False):
        recorded = record_forward(model, images, targets)
        rows = [_gradient_row(model, recorded, k) for k in range(recorded.targets.shape[1])]
        return Attribution(recorded.as_maps(model, rows), recorded.logits)


@torch.no_grad()
def rollout(model: VisionTransformer, images: Tensor, targets: Targets) -> Attribution:
    """The class token's row of the product over blocks of (I + mean over heads of A) / 2.

    Arguments, result and exceptions are those of `relevance.attribute`; the maps are the same for every target.
    """
    check_request(model, images, targets)
    with torch.autocast(images.device.type, enabled=False):
        recorded = record_forward(model, images, targets)
        row: Tensor | None = None
        for block, record in zip(reversed(model.blocks), reversed(recorded.blocks), strict=True):
            attention = softmax(record.scores, block.attn.scale)  # [B, H, Q, N]
            row = 0.5 * _through(row, attention)
        assert row is not None  # check_request refuses a model without blocks
        return Attribution(recorded.as_maps(model, [row] * recorded.targets.shape[1]), recorded.logits)


@torch.no_grad()
def class_attention(model: VisionTransformer, images: Tensor, targets: Targets) -> Attribution:
    """The class token's attention in the last block, averaged over heads.

    Arguments, result and exceptions are those of `relevance.attribute`; the maps are the same for every target.
    """
    check_request(model, images, targets)
    with torch.autocast(images.device.type, enabled=False):
        recorded = record_forward(model, images, targets)
        attention = softmax(recorded.blocks[-1].scores, model.blocks[-1].attn.scale)  # [B, H, 1, N]
        row = attention.mean(dim=1)[:, 0]  # [B, N]
        return Attribution(recorded.as_maps(model, [row] * recorded.targets.shape[1]), recorded.logits)


METHODS: dict[str, Method] = {
    "transformer-attribution": attribute,
    "transformer-attribution-stable": partial(attribute, split="magnitude"),
    "gradient-attention": gradient_attention,
    "rollout": rollout,
    "class-attention": class_attention,
}
DEFAULT_METHOD = "transformer-attribution"
CLASS_BLIND = ("rollout", "class-attention")
# Methods in closed form, whose downward sweep can have another arithmetic than the model: how each splits relevance.
SWEPT = {"transformer-attribution": "sum", "transformer-attribution-stable": "magnitude"}


def methods_of(classifier: Classifier) -> dict[str, str]:
    """Why each method cannot explain a classifier, "" where it can, in the order of `METHODS`."""
    return {name: _closed_form_refusal(classifier) if name in SWEPT else "" for name in METHODS}


def _closed_form_refusal(classifier: Classifier) -> str:
    if classifier.head is not None:
        return "no relevance rules for a head that is not the model's own"
    try:
        check_supported(classifier.model)
    except ValueError as error:
        return str(error)
    return ""


def _through(row: Tensor | None, matrices: Tensor) -> Tensor:
    """Multiply a row [B, N] with I + mean over heads of `matrices` [B, H, Q, N]; None is the class token's unit row."""
    if row is None:
        row = matrices.mean(dim=1)[:, 0].clone()
        row[:, 0] += 1
        return row
    return row + (row[:, None, None] @ matrices).mean(dim=1)[:, 0]


def _gradient_row(model: VisionTransformer, recorded: Recorded, k: int) -> Tensor:
    """Sweep from the logit of the k-th target to the attention of block 1. Returns the class token's row, [B, N]."""
    top = recorded.top
    grad = recorded.one_hot(k)[:, None] @ Linear.of(model.head).weight  # [B, 1, D]
    grad = top.norm.grad(model.norm, top.x, grad)
    row: Tensor | None = None
    for number in reversed(range(len(model.blocks))):
        block, record = model.blocks[number], recorded.blocks[number]
        grad, grad_context = _grad_to_context(block, record, grad)  # [B, Q, D], [B, H, Q, d]
        attention = softmax(record.scores, block.attn.scale)  # [B, H, Q, N]
        grad_attention = grad_context @ record.v.mT  # [B, H, Q, N]
        row = _through(row, (grad_attention * attention).clamp_(min=0))
        if number:
            grad = _grad_to_input(block, record, grad, attention, grad_attention, grad_context)
    assert row is not None
    return row


def _grad_to_context(block: Block, record: BlockRecord, grad: Tensor) -> tuple[Tensor, Tensor]:
    g = grad @ Linear.of(block.mlp.fc2, block.ls2).weight  # [B, Q, F]
    g = torch.ops.aten.gelu_backward(g, record.hidden, approximate=gelu_kind(block.mlp.act))
    g = g @ block.mlp.fc1.weight  # [B, Q, D]
    grad = record.norm2.grad(block.norm2, record.middle, g).add_(grad)
    g = grad @ Linear.of(block.attn.proj, block.ls1).weight  # [B, Q, E]
    return grad, split_heads(g, block.attn.num_heads, 1)[0]


def _grad_to_input(
    block: Block,
    record: BlockRecord,
    grad_skip: Tensor,
    attention: Tensor,
    grad_attention: Tensor,
    grad_context: Tensor,
) -> Tensor:
    scores = softmax_grad(attention, grad_attention).mul_(block.attn.scale)  # [B, H, Q, N]
    grad_q, grad_k, grad_v = scores @ record.k, scores.mT @ record.q, attention.mT @ grad_context
    weight, width = block.attn.qkv.weight, record.q.shape[1] * record.q.shape[3]
    grad = join_heads(grad_k, grad_v) @ weight[width:]  # [B, N, D]
    live = record.q.shape[2]  # in the last block only the class token has a query
    grad[:, :live] += join_heads(grad_q) @ weight[:width]
    grad = record.norm1.grad(block.norm1, record.x, grad)
    grad[:, :live] += grad_skip
    return grad
