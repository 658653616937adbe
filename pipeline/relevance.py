"""Relevance maps of a vision transformer: which patches speak for a class. Tensors in, tensors out.

The method is "transformer attribution": Chefer, Gur and Wolf, "Transformer Interpretability Beyond Attention
Visualization", CVPR 2021, with start layer 0; ZoomViT restates it in its Eq. 1-4. For an image and a target class t:

    R            relevance, propagated down from the one-hot of t at the logits by the rules below (layer-wise relevance
                 propagation of the deep Taylor kind)
    G            gradient of logit t, propagated down beside it
    Abar_b       I + mean over heads of max(0, G_A * R_A), A the attention matrix of block b
    C            Abar_B ... Abar_1
    map          C[class token, patches], rows not normalised

Only the class token's row of C is needed, so C is carried down as a row vector and no [N, N] product is formed.

Rules, with S = R / Z (see `guarded_divide`):

    linear       Z = x+ W+ + x- W-, R_x = x+ (S W+) + x- (S W-); the bias gets no relevance
    matmul       Z = a b, R_a = a (S b^T) / 2, R_b = b (a^T S) / 2; Q K^T is taken before it is scaled
    residual     R_a = a S, R_b = b S, then rescaled so that each branch gets its share of sum R, per image
    clone        x (R_1 + R_2) / x, which differs from R_1 + R_2 where x is tiny, because of the guard
    softmax, GELU, LayerNorm, dropout, pooling of the class token: relevance passes unchanged

The residual rule divides by a + b, which crosses zero in every image. Near it, R_a and R_b are huge and of opposite
signs; they decide the two sums, whose signs decide the sign of all relevance below. So noise that nobody sees changes
maps. `split="magnitude"` replaces that rule alone, and with it the maps are stable (docs/benchmarks.md):

    residual     R_a = R abs(a) / (abs(a) + abs(b)), R_b = R abs(b) / (abs(a) + abs(b))

One recorded forward pass and one downward sweep, without autograd, for any batch size. No value of one image enters the
map of another.

Symbols in the shape comments are those of `zpipe.pipeline.recorded_forward`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from zpipe.pipeline.block_weights import BlockWeights, Linear
from zpipe.pipeline.classifier import Targets, as_classifier
from zpipe.pipeline.prepared import SWEEPS, Prepared
from zpipe.pipeline.recorded_forward import (
    Attribution,
    BlockRecord,
    Recorded,
    join_heads,
    record_forward,
    softmax,
    softmax_grad,
    split_heads,
)
from zpipe.pipeline.supported import check_request, check_supported
from zpipe.schemas.devices import float32_arithmetic

__all__ = ["SPLITS", "SWEEPS", "Attribution", "attribute", "transformer_attribution"]

SPLITS = ("sum", "magnitude")
GUARD = 1e-9  # added to every denominator whatever its sign, as in the public implementation


def transformer_attribution(model: VisionTransformer, images: Tensor, targets: Targets) -> Tensor:
    """Relevance maps, [B, gh, gw] or [B, K, gh, gw], of images for their target classes: the maps of `attribute`."""
    return attribute(model, images, targets).maps


@torch.no_grad()
def attribute(
    model: VisionTransformer,
    images: Tensor,
    targets: Targets,
    *,
    sweep: str = "model",
    split: str = "sum",
    prepared: Prepared | None = None,
) -> Attribution:
    """Compute relevance maps and logits, with one forward pass and one downward sweep for each target.

    Source: Chefer et al. 2021, Eq. 2-14; ZoomViT, Eq. 1-4.

    Args:
        model: A timm VisionTransformer in eval mode that `check_supported` accepts. It is not changed.
        images: [B, channels, height, width], already normalised, in the size, dtype and device of the model.
        targets: Class numbers that the maps explain: integers [B], or [B, K] for K maps per image that share the
            forward pass; or a function that computes them from the logits [B, classes].
        sweep: Arithmetic of the downward sweep, one of SWEEPS: "model" is the dtype of the model; "float32" is for a
            float64 model; "tf32" and "bfloat16" compute in float32 but round the factors of matrix products. The
            forward pass always has the precision of the model: its rounding errors are divided by numbers near zero,
            while those of the sweep do little. bfloat16 in the forward pass lowers the rank correlation with float64 to
            0.99 in the median and 0.7 at worst; in the sweep, to 0.9999 and 0.9997.
        split: How a residual connection splits relevance, one of SPLITS: "sum" is the published rule; "magnitude"
            gives each branch its share of abs(a) + abs(b).
        prepared: What is kept between batches of the same model; its sweep is taken. By default nothing is kept.

    Returns:
        Maps and logits. Register tokens take part in every rule, but they have no place in the image and are left out
        of the map. A map that is all zero or not finite is returned as it is; the caller records it.

    Raises:
        ValueError: The model is not supported, is in train mode, or mixes dtypes or devices; images have another shape,
            dtype or device, or are not finite; targets have another shape or are outside the classes; the sweep or the
            split is unknown, or the sweep is not available on this device; `prepared` is of another model.
    """
    check_supported(model)
    check_request(as_classifier(model), images, targets)
    prepared = prepared or Prepared(model, sweep)
    if prepared.model is not model:
        raise ValueError("prepared is of another model")
    if split not in SPLITS:
        raise ValueError(f"split={split!r}: choose one of {', '.join(SPLITS)}")
    rules = Rules(_products(prepared.sweep, images), residual_rule if split == "sum" else magnitude_rule)
    # Autocast would silently compute the products, and so the divisions after them, in another dtype than the model's.
    with torch.autocast(images.device.type, enabled=False):
        with float32_arithmetic():
            recorded = record_forward(model, images, targets, prepared)
        count = recorded.targets.shape[1]
        with float32_arithmetic("tf32" if prepared.sweep == "tf32" else "ieee"):
            rows = [_sweep(prepared, recorded, k, rules, keep=k + 1 < count) for k in range(count)]
        return Attribution(recorded.as_maps(model, rows), recorded.logits)


# ------------------------------------------------------------------------------------------------------ arithmetic

Product = Callable[[Tensor, Tensor], Tensor]
ResidualRule = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


class Rules(NamedTuple):
    """What differs between sweeps."""

    matmul: Product
    residual: ResidualRule


def _products(sweep: str, images: Tensor) -> Product:
    if sweep == "tf32" and images.device.type != "cuda":
        raise ValueError(f"sweep='tf32' is an arithmetic of CUDA devices, the images are on {images.device}")
    if sweep != "bfloat16":
        return torch.matmul
    return _bfloat16_on_cuda if images.device.type == "cuda" else _bfloat16


def _bfloat16(a: Tensor, b: Tensor) -> Tensor:
    return (a.bfloat16() @ b.bfloat16()).float()


def _bfloat16_on_cuda(a: Tensor, b: Tensor) -> Tensor:
    """Multiply bfloat16 factors with float32 sums and result, for weights [k, n] and for batches of matrices."""
    a, b = a.bfloat16(), b.bfloat16()
    if b.ndim == 2:
        return torch.mm(a.flatten(0, -2), b, out_dtype=torch.float32).unflatten(0, a.shape[:-1])
    batch = torch.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    a, b = (x.expand(*batch, *x.shape[-2:]).flatten(0, -3) for x in (a, b))
    return torch.bmm(a, b, out_dtype=torch.float32).unflatten(0, batch)


# ---------------------------------------------------------------------------------------------------------- rules


def guarded_divide(a: Tensor, b: Tensor) -> Tensor:
    """a / (b + 1e-9), and 0 where b == 0: exactly the guard of the public implementation."""
    denominator = b + GUARD
    denominator.masked_fill_(denominator == 0, GUARD)
    return torch.div(a, denominator, out=denominator).masked_fill_(b == 0, 0)


def linear_rule(
    x: Tensor,
    product: Tensor,
    weight: Tensor,
    relevance: Tensor,
    matmul: Product = torch.matmul,
    abs_weight: Tensor | None = None,
) -> Tensor:
    """Relevance of the input of a linear layer (alpha = 1, beta = 0).

    Term by term, x+ W+ + x- W- = (x W + |x| |W|) / 2. So the product of the forward pass is used again, and the rule
    costs three products instead of four.

    Args:
        x: Input [..., in].
        product: x W^T without bias [..., out].
        weight: [out, in].
        relevance: Relevance of the output [..., out].
        matmul: Matrix product of the sweep.
        abs_weight: abs(weight) [out, in], if it is kept.

    Returns:
        [..., in].
    """
    abs_x, abs_weight = x.abs(), weight.abs() if abs_weight is None else abs_weight
    magnitude = matmul(abs_x, abs_weight.T)  # [..., out]
    z = (product + magnitude).mul_(0.5)
    # Z = 0 for an output that no input speaks for, but as the difference of two rounded sums it is noise.
    silent = z <= magnitude.mul_(16 * torch.finfo(z.dtype).eps)
    s = torch.div(relevance, z.add_(GUARD), out=z).masked_fill_(silent, 0)
    return matmul(s, weight).mul_(x).add_(matmul(s, abs_weight).mul_(abs_x)).mul_(0.5)


def matmul_rule(
    a: Tensor, b: Tensor, product: Tensor, relevance: Tensor, matmul: Product = torch.matmul
) -> tuple[Tensor, Tensor]:
    """Relevance of both factors of a matrix product. Each gets half, so that the sum is conserved.

    Args:
        a: First factor [..., m, k].
        b: Second factor [..., k, n].
        product: a b [..., m, n].
        relevance: Relevance of the product [..., m, n].
        matmul: Matrix product of the sweep.

    Returns:
        Relevance of `a` [..., m, k] and of `b` [..., k, n].
    """
    s = guarded_divide(relevance, product)
    return matmul(s, b.mT).mul_(a).mul_(0.5), matmul(a.mT, s).mul_(b).mul_(0.5)


def residual_rule(a: Tensor, b: Tensor, total: Tensor, relevance: Tensor) -> tuple[Tensor, Tensor]:
    """Relevance of both branches of a residual connection.

    The relevance of the branches is rescaled to sum to sum R, in the ratio |sum a S| : |sum b S|. The sums run over one
    image: over the batch, other images would change the map.

    Args:
        a: First branch [B, tokens, D].
        b: Second branch [B, tokens, D].
        total: a + b [B, tokens, D].
        relevance: Relevance of the total [B, tokens, D].

    Returns:
        Relevance of `a` and of `b`, [B, tokens, D] each.
    """
    s = guarded_divide(relevance, total)
    relevance_a = a * s
    relevance_b = s.mul_(b)
    incoming, sum_a, sum_b = (r.sum(dim=(1, 2), keepdim=True) for r in (relevance, relevance_a, relevance_b))
    weight_a, weight_b = sum_a.abs(), sum_b.abs()  # [B, 1, 1]
    both = weight_a + weight_b
    relevance_a.mul_(guarded_divide(guarded_divide(weight_a, both).mul_(incoming), sum_a))
    relevance_b.mul_(guarded_divide(guarded_divide(weight_b, both).mul_(incoming), sum_b))
    return relevance_a, relevance_b


def magnitude_rule(a: Tensor, b: Tensor, total: Tensor, relevance: Tensor) -> tuple[Tensor, Tensor]:
    """Relevance of both branches of a residual connection, element by element in the ratio abs(a) : abs(b).

    No share is above 1, so that nothing grows without bound; the sum is conserved. Arguments and results are those of
    `residual_rule`; both rules are alike where a and b have the same sign. For ResNets, Otsuki et al. (ECCV 2024)
    compare ways to split relevance at skip connections.
    """
    magnitude = a.abs()
    share = guarded_divide(magnitude, magnitude + b.abs())
    relevance_a = share.mul_(relevance)
    return relevance_a, relevance - relevance_a


def clone_rule(x: Tensor, relevance: Tensor) -> Tensor:
    """Relevance of a value that is used more than once; `relevance` is the sum over its uses, in the shape of `x`."""
    return guarded_divide(relevance, x).mul_(x)


def _down(
    layer: Linear, x: Tensor, out: Tensor, grad: Tensor, relevance: Tensor, matmul: Product
) -> tuple[Tensor, Tensor]:
    """Gradient and relevance of the input `x` of a linear layer, from those of `out` = layer.forward(x)."""
    product = out if layer.bias is None else out - layer.bias
    below = linear_rule(x, product, layer.weight, relevance, matmul, layer.magnitude)
    return matmul(grad, layer.weight), below


# ---------------------------------------------------------------------------------------------------------- sweep


def _sweep(prepared: Prepared, recorded: Recorded, k: int, rules: Rules, *, keep: bool) -> Tensor:
    """Sweep from the logit of the k-th target down to the attention of block 1.

    Returns the class token's row of C, [B, N]. The record of each block is freed after its use, unless `keep` is set
    because the next target needs it.
    """
    top, (norm, head) = recorded.top, prepared.top
    grad = relevance = recorded.one_hot(k)[:, None]  # [B, 1, classes]
    grad, relevance = _down(head, top.norm.out, top.logits, grad, relevance, rules.matmul)  # [B, 1, D]
    relevance = clone_rule(top.norm.out, relevance)  # the pooling takes the class token, one use of the norm's output
    swept = Swept(top.norm.grad(norm, top.x, grad), relevance, None)
    for number in reversed(range(len(prepared.model.blocks))):
        record = recorded.blocks[number] if keep else recorded.blocks.pop()
        swept = prepared.call(sweep_block, prepared.down(number), record, swept, rules, lowest=number == 0)
    assert swept.row is not None  # check_supported refuses a model without blocks
    return swept.row


class Swept(NamedTuple):
    """What a sweep carries down."""

    grad: Tensor  # [B, Q, D] by the output of the next block
    relevance: Tensor  # [B, Q, D] of that output
    row: Tensor | None  # [B, N], the class token's row of Abar_B ... Abar_b; None above the last block


def sweep_block(block: BlockWeights, record: BlockRecord, swept: Swept, rules: Rules, *, lowest: bool) -> Swept:
    """Sweep down through a block; through the lowest one, only to its attention: `grad` and `relevance` remain."""
    matmul = rules.matmul
    skip, grad_context, relevance_context = _sweep_to_context(block, record, swept, rules)
    attention = softmax(record.scores, block.scale)  # [B, H, Q, N]
    s = guarded_divide(relevance_context, record.context)  # [B, H, Q, d]
    grad_attention = matmul(grad_context, record.v.mT)  # [B, H, Q, N]
    relevance_attention = matmul(s, record.v.mT).mul_(attention).mul_(0.5)

    # C Abar = C + C mean(max(0, G R)): the row is multiplied with each head first, so the mean is over rows, not
    # matrices. In the last block C is the class token's unit row.
    positive = (grad_attention * relevance_attention).clamp_(min=0)
    if swept.row is None:
        row = positive.mean(dim=1)[:, 0]
        row[:, 0] += 1
    else:
        row = swept.row + (swept.row[:, None, None] @ positive).mean(dim=1)[:, 0]
    if lowest:
        return swept._replace(row=row)

    relevance_v = matmul(attention.mT, s).mul_(record.v).mul_(0.5)
    grad_v = matmul(attention.mT, grad_context)  # [B, H, N, d]
    relevance_q, relevance_k = matmul_rule(record.q, record.k.mT, record.scores, relevance_attention, matmul)
    grad_scores = softmax_grad(attention, grad_attention).mul_(block.scale)
    grad_q, grad_k = matmul(grad_scores, record.k), matmul(grad_scores.mT, record.q)
    grads, relevances = (grad_q, grad_k, grad_v), (relevance_q, relevance_k.mT, relevance_v)
    grad, relevance = _sweep_to_input(block, record, skip, grads, relevances, matmul)
    return Swept(grad, relevance, row)


def _sweep_to_context(
    block: BlockWeights, record: BlockRecord, swept: Swept, rules: Rules
) -> tuple[tuple[Tensor, Tensor], Tensor, Tensor]:
    """Sweep down through the MLP and the output projection of the attention.

    Returns gradient and relevance of the skip branch of the first residual connection, [B, Q, D] each, and gradient
    and relevance of the context A V, [B, H, Q, d].
    """
    matmul = rules.matmul
    skip, r = rules.residual(record.middle, record.mixed, record.out, swept.relevance)
    g, r = _down(block.fc2, record.active, record.mixed, swept.grad, r, matmul)  # [B, Q, F]
    g = torch.ops.aten.gelu_backward(g, record.hidden, approximate=block.gelu)
    g, r = _down(block.fc1, record.norm2.out, record.hidden, g, r, matmul)  # [B, Q, D]
    grad = record.norm2.grad(block.norm2, record.middle, g).add_(swept.grad)
    relevance = clone_rule(record.middle, r.add_(skip))

    live = record.x[:, : record.middle.shape[1]]
    skip, r = rules.residual(live, record.attended, record.middle, relevance)
    g, r = _down(block.proj, join_heads(record.context), record.attended, grad, r, matmul)  # [B, Q, E]
    return (grad, skip), split_heads(g, block.heads, 1)[0], split_heads(r, block.heads, 1)[0]


def _sweep_to_input(
    block: BlockWeights,
    record: BlockRecord,
    skip: tuple[Tensor, Tensor],
    grads: tuple[Tensor, Tensor, Tensor],
    relevances: tuple[Tensor, Tensor, Tensor],
    matmul: Product,
) -> tuple[Tensor, Tensor]:
    """Sweep down from q, k and v. Returns the gradient and relevance of the block's input, [B, N, D].

    `skip` is the gradient and relevance [B, Q, D] of the skip branch; `grads` and `relevances` are those of q [B, H, Q,
    d], k and v [B, H, N, d].
    """
    qkv, normed, live = block.qkv, record.norm1.out, record.q.shape[2]
    if live == normed.shape[1]:
        out = join_heads(record.q, record.k, record.v)  # [B, N, 3E]
        grad, relevance = _down(qkv, normed, out, join_heads(*grads), join_heads(*relevances), matmul)  # [B, N, D]
    else:
        # Last block: only the class token has a query. The rule treats each output alone, so the layer can be split.
        width = qkv.weight.shape[0] // 3
        to_q, to_kv = qkv.rows(slice(0, width)), qkv.rows(slice(width, None))
        out = join_heads(record.k, record.v)  # [B, N, 2E]
        grad, relevance = _down(to_kv, normed, out, join_heads(*grads[1:]), join_heads(*relevances[1:]), matmul)
        by_q = _down(
            to_q, normed[:, :live], join_heads(record.q), join_heads(grads[0]), join_heads(relevances[0]), matmul
        )
        grad[:, :live] += by_q[0]
        relevance[:, :live] += by_q[1]
    grad = record.norm1.grad(block.norm1, record.x, grad)
    grad[:, :live] += skip[0]
    relevance[:, :live] += skip[1]
    return grad, clone_rule(record.x, relevance)
