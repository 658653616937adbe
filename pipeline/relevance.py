"""Relevance maps of a vision transformer: which patches decided for a class. Tensors in, tensors out.

The method is "transformer attribution": Chefer, Gur and Wolf, "Transformer Interpretability Beyond Attention
Visualization", CVPR 2021, with start layer 0; ZoomViT restates it in its Eq. 1-4. For an image and a target class t:

    R            relevance, going down from the one-hot of t at the logits by the rules below (layer-wise relevance
                 propagation of deep Taylor kind)
    G            gradient of logit t, going down beside it
    Abar_b       I + mean over heads of max(0, G_A * R_A), A the attention matrix of block b
    C            Abar_B ... Abar_1
    map          C[class token, patches], rows not normalised

Only the class row of C is asked for, so C is carried as a row vector on the way down and no [N, N] product is formed.

Rules, with S = R / Z (see `guarded_divide`):

    linear       Z = x+ W+ + x- W-, R_x = x+ (S W+) + x- (S W-); the bias takes no relevance
    matmul       Z = a b, R_a = a (S b^T) / 2, R_b = b (a^T S) / 2; Q K^T is taken before its scale
    residual     R_a = a S, R_b = b S, then rescaled so that each branch gets its share of sum R, per image
    clone        x (R_1 + R_2) / x, which the guard makes differ from R_1 + R_2 where x is tiny
    softmax, GELU, LayerNorm, dropout, pooling of the class token: relevance passes

One recorded forward and one downward sweep, without autograd, for any batch size; no value of one image enters the map
of another.

Symbols in the shape comments are those of `zpipe.pipeline.recorded_forward`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import torch
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor

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
from zpipe.pipeline.supported import Targets, check_request

__all__ = ["SWEEPS", "Attribution", "attribute", "transformer_attribution"]

SWEEPS = ("model", "float32", "tf32", "bfloat16")
GUARD = 1e-9  # added to every denominator, as in the public implementation; it does not look at the sign


def transformer_attribution(model: VisionTransformer, images: Tensor, targets: Targets) -> Tensor:
    """Relevance maps of `images` for the classes `targets`: `attribute` without the logits."""
    return attribute(model, images, targets).maps


@torch.no_grad()
def attribute(model: VisionTransformer, images: Tensor, targets: Targets, *, sweep: str = "model") -> Attribution:
    """Relevance maps and logits, from one forward and one sweep for each target.

    Args:
        model: a timm VisionTransformer in eval mode that passes `check_supported`. It is read, never changed.
        images: [B, channels, height, width], already normalised, in the model's size, dtype and device.
        targets: integer class numbers, the classes the maps explain: [B], or [B, K] for K maps an image that share the
            forward; or a function that makes them of the logits [B, classes].
        sweep: arithmetic of the way down, one of SWEEPS: "model" is the model's dtype; "float32" is for a float64
            model; "tf32" and "bfloat16" compute in float32 but round the factors of its matrix products. The forward is
            always the model's own: there every rounding error meets a division by a number near zero, while on the way
            down rounding does little (on the way up bfloat16 brings the rank correlation with float64 to 0.99 in the
            median and 0.7 at worst; on the way down it leaves 0.9999 and 0.9997).

    Returns:
        Attribution. Register tokens take part in every rule, but they have no place in the image, so the map leaves
        them out. A map that is all zero or not finite is returned as it is; the caller records it.

    Raises:
        ValueError: the model is not supported, is in train mode, or mixes dtypes or devices; images of another shape,
            dtype or device, or not finite; targets of another shape or outside the classes; a sweep that is unknown
            or not to be had on this device.

    Source: Chefer et al. 2021, Eq. 2-14; ZoomViT, Eq. 1-4.
    """
    check_request(model, images, targets)
    products = _products(sweep, images)
    # Autocast would quietly compute the products, and so the divisions that follow, in another dtype than the model's.
    with torch.autocast(images.device.type, enabled=False):
        recorded = record_forward(model, images, targets, images.dtype if sweep == "model" else torch.float32)
        count = recorded.targets.shape[1]
        with _tf32() if sweep == "tf32" else nullcontext():
            rows = [_sweep(model, recorded, k, products, keep=k + 1 < count) for k in range(count)]
        return Attribution(recorded.as_maps(model, rows), recorded.logits)


# ------------------------------------------------------------------------------------------------------ arithmetic

Product = Callable[[Tensor, Tensor], Tensor]


def _products(sweep: str, images: Tensor) -> Product:
    if sweep not in SWEEPS:
        raise ValueError(f"sweep={sweep!r}: choose one of {', '.join(SWEEPS)}")
    if sweep == "tf32" and images.device.type != "cuda":
        raise ValueError(f"sweep='tf32' is an arithmetic of CUDA devices, the images are on {images.device}")
    if sweep != "bfloat16":
        return torch.matmul
    return _bfloat16_on_cuda if images.device.type == "cuda" else _bfloat16


def _bfloat16(a: Tensor, b: Tensor) -> Tensor:
    return (a.bfloat16() @ b.bfloat16()).float()


def _bfloat16_on_cuda(a: Tensor, b: Tensor) -> Tensor:
    """Factors in bfloat16, sums and result in float32, for weights [k, n] and for batches of matrices."""
    a, b = a.bfloat16(), b.bfloat16()
    if b.ndim == 2:
        return torch.mm(a.flatten(0, -2), b, out_dtype=torch.float32).unflatten(0, a.shape[:-1])
    batch = torch.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    a, b = (x.expand(*batch, *x.shape[-2:]).flatten(0, -3) for x in (a, b))
    return torch.bmm(a, b, out_dtype=torch.float32).unflatten(0, batch)


@contextmanager
def _tf32() -> Iterator[None]:
    """Let CUDA round factors to TF32 meanwhile; a setting of the whole process."""
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        yield
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


# ---------------------------------------------------------------------------------------------------------- rules


def guarded_divide(a: Tensor, b: Tensor) -> Tensor:
    """a / (b + 1e-9), and 0 where b == 0: the guard of the public implementation, kept to the letter for parity."""
    denominator = b + GUARD
    denominator.masked_fill_(denominator == 0, GUARD)
    return torch.div(a, denominator, out=denominator).masked_fill_(b == 0, 0)


def linear_rule(
    x: Tensor, product: Tensor, weight: Tensor, relevance: Tensor, matmul: Product = torch.matmul
) -> Tensor:
    """Relevance of the input of a linear layer (alpha = 1, beta = 0).

    `x` [..., in], `product` = x W^T [..., out] without bias, `weight` [out, in], `relevance` [..., out] -> [..., in].
    x+ W+ + x- W- = (x W + |x| |W|) / 2 term by term, so the forward's product is used again and the rule costs three
    products instead of four.
    """
    abs_x, abs_weight = x.abs(), weight.abs()
    magnitude = matmul(abs_x, abs_weight.T)  # [..., out]
    z = (product + magnitude).mul_(0.5)
    # An output that no input speaks for has Z = 0, but as the difference of two rounded sums it comes out as noise.
    silent = z <= magnitude.mul_(16 * torch.finfo(z.dtype).eps)
    s = torch.div(relevance, z.add_(GUARD), out=z).masked_fill_(silent, 0)
    return matmul(s, weight).mul_(x).add_(matmul(s, abs_weight).mul_(abs_x)).mul_(0.5)


def matmul_rule(
    a: Tensor, b: Tensor, product: Tensor, relevance: Tensor, matmul: Product = torch.matmul
) -> tuple[Tensor, Tensor]:
    """Relevance of both factors of product = a b: [..., m, k], [..., k, n], [..., m, n] -> like a, like b.

    Each factor is given half, so that together they hold what came in.
    """
    s = guarded_divide(relevance, product)
    return matmul(s, b.mT).mul_(a).mul_(0.5), matmul(a.mT, s).mul_(b).mul_(0.5)


def residual_rule(a: Tensor, b: Tensor, total: Tensor, relevance: Tensor) -> tuple[Tensor, Tensor]:
    """Relevance of both branches of total = a + b, all [B, tokens, D].

    The branches are rescaled to |sum a S| : |sum b S| of sum R. The sums run over one image: over the whole batch they
    would let neighbours change the map.
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


def clone_rule(x: Tensor, relevance: Tensor) -> Tensor:
    """Relevance of a value used more than once; `relevance` is the sum over its uses, in the shape of `x`."""
    return guarded_divide(relevance, x).mul_(x)


def _down(
    layer: Linear, x: Tensor, out: Tensor, grad: Tensor, relevance: Tensor, matmul: Product
) -> tuple[Tensor, Tensor]:
    """Gradient and relevance of the input `x` of a linear layer, from those of `out` = layer.forward(x)."""
    layer = layer.to(x.dtype)
    product = out if layer.bias is None else out - layer.bias
    return matmul(grad, layer.weight), linear_rule(x, product, layer.weight, relevance, matmul)


# ---------------------------------------------------------------------------------------------------------- sweep


def _sweep(model: VisionTransformer, recorded: Recorded, k: int, matmul: Product, *, keep: bool) -> Tensor:
    """From the k-th target's logit to block 1's attention -> the class token's row [B, N] of C.

    Unless told to `keep` them for the next target, it lets go of the blocks' records as it passes, to free memory.
    """
    top = recorded.top
    grad = relevance = recorded.one_hot(k)[:, None]  # [B, 1, classes]
    grad, relevance = _down(Linear.of(model.head), top.norm.out, top.logits, grad, relevance, matmul)  # [B, 1, D]
    relevance = clone_rule(top.norm.out, relevance)  # the pooling takes the class token, one use of the norm's output
    grad = top.norm.grad(model.norm, top.x, grad)

    row: Tensor | None = None  # [B, N], the class token's row of Abar_B ... Abar_b
    for number in reversed(range(len(model.blocks))):
        block = model.blocks[number]
        record = recorded.blocks[number] if keep else recorded.blocks.pop()
        grad, relevance, grad_context, relevance_context = _sweep_to_context(block, record, grad, relevance, matmul)
        attention = softmax(record.scores, block.attn.scale)  # [B, H, Q, N]
        s = guarded_divide(relevance_context, record.context)  # [B, H, Q, d]
        grad_attention = matmul(grad_context, record.v.mT)  # [B, H, Q, N]
        relevance_attention = matmul(s, record.v.mT).mul_(attention).mul_(0.5)

        # C Abar = C + C mean(max(0, G R)): the row meets each head before the mean, so the mean is of rows. In the last
        # block C is the class token's unit row.
        positive = (grad_attention * relevance_attention).clamp_(min=0)
        if row is None:
            row = positive.mean(dim=1)[:, 0]
            row[:, 0] += 1
        else:
            row = row + (row[:, None, None] @ positive).mean(dim=1)[:, 0]
        if number == 0:
            break  # block 1: nothing below its attention is asked for

        relevance_v = matmul(attention.mT, s).mul_(record.v).mul_(0.5)
        grad_v = matmul(attention.mT, grad_context)  # [B, H, N, d]
        relevance_q, relevance_k = matmul_rule(record.q, record.k.mT, record.scores, relevance_attention, matmul)
        grad_scores = softmax_grad(attention, grad_attention).mul_(block.attn.scale)
        grad_q, grad_k = matmul(grad_scores, record.k), matmul(grad_scores.mT, record.q)
        grads, relevances = (grad_q, grad_k, grad_v), (relevance_q, relevance_k.mT, relevance_v)
        grad, relevance = _sweep_to_input(block, record, (grad, relevance), grads, relevances, matmul)
    assert row is not None  # check_supported refuses a model without blocks
    return row


def _sweep_to_context(
    block: Block, record: BlockRecord, grad: Tensor, relevance: Tensor, matmul: Product
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Down through the MLP and the output projection of the attention.

    Takes gradient and relevance [B, Q, D] of the block's output. Gives those of the first residual's skip branch
    [B, Q, D], and those of the context A V [B, H, Q, d].
    """
    heads, kind = block.attn.num_heads, gelu_kind(block.mlp.act)
    skip, r = residual_rule(record.middle, record.mixed, record.out, relevance)
    g, r = _down(Linear.of(block.mlp.fc2, block.ls2), record.active, record.mixed, grad, r, matmul)  # [B, Q, F]
    g = torch.ops.aten.gelu_backward(g, record.hidden, approximate=kind)
    g, r = _down(Linear.of(block.mlp.fc1), record.norm2.out, record.hidden, g, r, matmul)  # [B, Q, D]
    grad = record.norm2.grad(block.norm2, record.middle, g).add_(grad)
    relevance = clone_rule(record.middle, r.add_(skip))

    live = record.x[:, : record.middle.shape[1]]
    skip, r = residual_rule(live, record.attended, record.middle, relevance)
    proj, context = Linear.of(block.attn.proj, block.ls1), join_heads(record.context)
    g, r = _down(proj, context, record.attended, grad, r, matmul)  # [B, Q, E]
    return grad, skip, split_heads(g, heads, 1)[0], split_heads(r, heads, 1)[0]


def _sweep_to_input(
    block: Block,
    record: BlockRecord,
    skip: tuple[Tensor, Tensor],
    grads: tuple[Tensor, Tensor, Tensor],
    relevances: tuple[Tensor, Tensor, Tensor],
    matmul: Product,
) -> tuple[Tensor, Tensor]:
    """Down from q, k and v to the block's input -> gradient and relevance [B, N, D].

    `skip` is the gradient and relevance [B, Q, D] of the skip branch; `grads` and `relevances` are those of q [B, H, Q, d],
    k and v [B, H, N, d].
    """
    qkv, normed, live = Linear.of(block.attn.qkv), record.norm1.out, record.q.shape[2]
    if live == normed.shape[1]:
        out = join_heads(record.q, record.k, record.v)  # [B, N, 3E]
        grad, relevance = _down(qkv, normed, out, join_heads(*grads), join_heads(*relevances), matmul)  # [B, N, D]
    else:
        # Last block: only the class token asked. The rule treats outputs one by one, so the layer may be split by them.
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
