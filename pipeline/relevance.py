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

Symbols in the shape comments: B images, N tokens, Q the rows that are live (N, or 1 in the last block, where only the
class token reaches the logits), D width, F hidden width of the MLP, H heads, E width of all heads together, d of one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from timm.layers import GELU, GELUTanh, LayerNorm, LayerScale, Mlp, PatchEmbed
from timm.models.vision_transformer import Attention, Block, VisionTransformer
from torch import Tensor, nn

__all__ = ["Attribution", "attribute", "check_supported", "transformer_attribution"]

GUARD = 1e-9  # added to every denominator, as in the public implementation; it does not look at the sign


class Attribution(NamedTuple):
    """What one call gives: `maps` [B, gh, gw], raw and unnormalised, and `logits` [B, classes], both in the model's
    dtype and on its device."""

    maps: Tensor
    logits: Tensor


def transformer_attribution(model: VisionTransformer, images: Tensor, targets: Tensor) -> Tensor:
    """Relevance maps [B, gh, gw] of `images` for the classes `targets`: `attribute` without the logits."""
    return attribute(model, images, targets).maps


@torch.no_grad()
def attribute(model: VisionTransformer, images: Tensor, targets: Tensor) -> Attribution:
    """Relevance maps and logits, from one forward and one sweep.

    Args:
        model: a timm VisionTransformer in eval mode that passes `check_supported`. It is read, never changed.
        images: [B, channels, height, width], already normalised, in the model's size, dtype and device.
        targets: [B] integer class numbers, the class each map explains.

    Returns:
        Attribution with maps [B, gh, gw] (raw: not normalised, row-major over the patch grid) and logits [B, classes].
        Register tokens take part in every rule, but they have no place in the image, so the map leaves them out.
        A map that is all zero or not finite is returned as it is; the caller records it.

    Raises:
        ValueError: the model is not supported, is in train mode, or mixes dtypes or devices; images of another shape,
            dtype or device, or not finite; targets of another shape or outside the classes.

    Source: Chefer et al. 2021, Eq. 2-14; ZoomViT, Eq. 1-4.
    """
    check_supported(model)
    _check_input(model, images, targets)
    if len(images) == 0:
        return Attribution(images.new_empty(0, *model.patch_embed.grid_size), images.new_empty(0, model.num_classes))
    # Autocast would quietly compute the products, and so the divisions that follow, in another dtype than the model's.
    with torch.autocast(images.device.type, enabled=False):
        logits, records, top = _record_forward(model, images)
        one_hot = F.one_hot(targets.to(images.device, torch.int64), model.num_classes).to(logits.dtype)
        return Attribution(_sweep(model, records, top, one_hot), logits)


# ---------------------------------------------------------------------------------------------------------- rules


def guarded_divide(a: Tensor, b: Tensor) -> Tensor:
    """a / (b + 1e-9), and 0 where b == 0: the guard of the public implementation, kept to the letter for parity."""
    denominator = b + GUARD
    denominator.masked_fill_(denominator == 0, GUARD)
    return torch.div(a, denominator, out=denominator).masked_fill_(b == 0, 0)


def linear_rule(x: Tensor, product: Tensor, weight: Tensor, relevance: Tensor) -> Tensor:
    """Relevance of the input of a linear layer (alpha = 1, beta = 0).

    `x` [..., in], `product` = x W^T [..., out] without bias, `weight` [out, in], `relevance` [..., out] -> [..., in].
    x+ W+ + x- W- = (x W + |x| |W|) / 2 term by term, so the forward's product is used again and the rule costs three
    products instead of four.
    """
    abs_x, abs_weight = x.abs(), weight.abs()
    magnitude = abs_x @ abs_weight.T  # [..., out]
    z = (product + magnitude).mul_(0.5)
    # An output that no input speaks for has Z = 0, but as the difference of two rounded sums it comes out as noise.
    silent = z <= magnitude.mul_(16 * torch.finfo(z.dtype).eps)
    s = torch.div(relevance, z.add_(GUARD), out=z).masked_fill_(silent, 0)
    return (s @ weight).mul_(x).add_((s @ abs_weight).mul_(abs_x)).mul_(0.5)


def matmul_rule(a: Tensor, b: Tensor, product: Tensor, relevance: Tensor) -> tuple[Tensor, Tensor]:
    """Relevance of both factors of product = a b: [..., m, k], [..., k, n], [..., m, n] -> like a, like b.

    Each factor is given half, so that together they hold what came in.
    """
    s = guarded_divide(relevance, product)
    return (s @ b.mT).mul_(a).mul_(0.5), (a.mT @ s).mul_(b).mul_(0.5)


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


# -------------------------------------------------------------------------------------------------------- forward


class _Linear(NamedTuple):
    weight: Tensor  # [out, in]
    bias: Tensor | None  # [out]

    @classmethod
    def of(cls, layer: nn.Linear, scale: nn.Module | None = None) -> _Linear:
        """The layer together with the LayerScale that may follow it.

        A per-channel factor after a linear layer is one linear layer with scaled rows, and is given relevance as such:
        a network then has the same map whether the factor is stored apart or multiplied in.
        """
        if not isinstance(scale, LayerScale):
            return cls(layer.weight, layer.bias)
        bias = None if layer.bias is None else layer.bias * scale.gamma
        return cls(layer.weight * scale.gamma[:, None], bias)

    def rows(self, rows: slice) -> _Linear:
        """The layer that computes only these outputs."""
        return _Linear(self.weight[rows], None if self.bias is None else self.bias[rows])

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)

    def down(self, x: Tensor, out: Tensor, grad: Tensor, relevance: Tensor) -> tuple[Tensor, Tensor]:
        """Gradient and relevance of the input `x`, from those of `out` = forward(x)."""
        product = out if self.bias is None else out - self.bias
        return grad @ self.weight, linear_rule(x, product, self.weight, relevance)


class _Normed(NamedTuple):
    """A LayerNorm's output with what its gradient needs."""

    out: Tensor  # [B, tokens, D]
    mean: Tensor  # [B, tokens, 1]
    rstd: Tensor  # [B, tokens, 1]

    @classmethod
    def of(cls, norm: nn.LayerNorm, x: Tensor) -> _Normed:
        return cls(*torch.native_layer_norm(x, norm.normalized_shape, norm.weight, norm.bias, norm.eps))

    def grad(self, norm: nn.LayerNorm, x: Tensor, grad: Tensor) -> Tensor:
        args = (norm.normalized_shape, self.mean, self.rstd, norm.weight, norm.bias)
        return torch.ops.aten.native_layer_norm_backward(grad, x, *args, [True, False, False])[0]


@dataclass(slots=True)
class _Record:
    """What the sweep needs of one block."""

    x: Tensor  # [B, N, D] input
    norm1: _Normed
    q: Tensor  # [B, H, Q, d]
    k: Tensor  # [B, H, N, d]
    v: Tensor  # [B, H, N, d]
    scores: Tensor  # [B, H, Q, N] Q K^T without its scale; the softmax is taken again rather than kept
    context: Tensor  # [B, H, Q, d] A V
    attended: Tensor  # [B, Q, D] what the attention adds
    middle: Tensor  # [B, Q, D] input plus attended
    norm2: _Normed
    hidden: Tensor  # [B, Q, F] before GELU
    active: Tensor  # [B, Q, F] after GELU
    mixed: Tensor  # [B, Q, D] what the MLP adds
    out: Tensor  # [B, Q, D]


@dataclass(slots=True)
class _Top:
    """What the sweep needs of the final norm and the head."""

    x: Tensor  # [B, 1, D]
    norm: _Normed
    logits: Tensor  # [B, 1, classes]


def _record_forward(model: VisionTransformer, images: Tensor) -> tuple[Tensor, list[_Record], _Top]:
    # Below block 1's attention nothing carries relevance, so timm's own embedding serves; in eval it drops nothing.
    x = model._pos_embed(model.patch_embed(images))  # [B, N, D]
    records = []
    for number, block in enumerate(model.blocks, start=1):
        records.append(_record_block(block, x, only_class_token=number == len(model.blocks)))
        x = records[-1].out
    norm = _Normed.of(model.norm, x)  # [B, 1, D]
    logits = _Linear.of(model.head).forward(norm.out)  # [B, 1, classes]
    return logits[:, 0], records, _Top(x, norm, logits)


def _record_block(block: Block, x: Tensor, only_class_token: bool) -> _Record:
    attn, live = block.attn, slice(0, 1) if only_class_token else slice(None)
    qkv, width = _Linear.of(attn.qkv), attn.num_heads * attn.head_dim
    norm1 = _Normed.of(block.norm1, x)
    if only_class_token:
        q = _split_heads(qkv.rows(slice(0, width)).forward(norm1.out[:, live]), attn.num_heads, 1)[0]
        k, v = _split_heads(qkv.rows(slice(width, None)).forward(norm1.out), attn.num_heads, 2)
    else:
        q, k, v = _split_heads(qkv.forward(norm1.out), attn.num_heads, 3)
    scores = q @ k.mT  # [B, H, Q, N]
    context = _softmax(scores, attn.scale) @ v  # [B, H, Q, d]
    attended = _Linear.of(attn.proj, block.ls1).forward(_join_heads(context))  # [B, Q, D]
    middle = x[:, live] + attended

    norm2 = _Normed.of(block.norm2, middle)
    hidden = _Linear.of(block.mlp.fc1).forward(norm2.out)  # [B, Q, F]
    active = F.gelu(hidden, approximate=_gelu_kind(block.mlp.act))
    mixed = _Linear.of(block.mlp.fc2, block.ls2).forward(active)  # [B, Q, D]
    out = middle + mixed
    return _Record(x, norm1, q, k, v, scores, context, attended, middle, norm2, hidden, active, mixed, out)


def _split_heads(x: Tensor, heads: int, parts: int) -> tuple[Tensor, ...]:
    """[B, tokens, parts * E] -> `parts` views [B, H, tokens, d]."""
    return x.unflatten(-1, (parts, heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)


def _join_heads(*parts: Tensor) -> Tensor:
    """The inverse: [B, H, tokens, d] each -> [B, tokens, parts * E]."""
    return torch.stack([part.transpose(1, 2) for part in parts], dim=2).flatten(2)


def _softmax(scores: Tensor, scale: float) -> Tensor:
    return torch.softmax(scores * scale, dim=-1)


def _gelu_kind(act: nn.Module) -> str:
    return "tanh" if isinstance(act, GELUTanh) else getattr(act, "approximate", "none")


# ---------------------------------------------------------------------------------------------------------- sweep


def _sweep(model: VisionTransformer, records: list[_Record], top: _Top, one_hot: Tensor) -> Tensor:
    """From the logits to block 1's attention -> maps [B, gh, gw]. Empties `records` as it goes, to free memory."""
    grad = relevance = one_hot[:, None]  # [B, 1, classes]
    grad, relevance = _Linear.of(model.head).down(top.norm.out, top.logits, grad, relevance)  # [B, 1, D]
    relevance = clone_rule(top.norm.out, relevance)  # the pooling takes the class token, one use of the norm's output
    grad = top.norm.grad(model.norm, top.x, grad)

    row = None  # [B, N], the class token's row of Abar_B ... Abar_b
    for block in reversed(model.blocks):
        record = records.pop()
        grad, relevance, grad_context, relevance_context = _sweep_to_context(block, record, grad, relevance)
        attention = _softmax(record.scores, block.attn.scale)  # [B, H, Q, N]
        s = guarded_divide(relevance_context, record.context)  # [B, H, Q, d]
        grad_attention = grad_context @ record.v.mT  # [B, H, Q, N]
        relevance_attention = (s @ record.v.mT).mul_(attention).mul_(0.5)

        # C Abar = C + C mean(max(0, G R)): the row meets each head before the mean, so the mean is of rows. In the last
        # block C is the class token's unit row.
        positive = (grad_attention * relevance_attention).clamp_(min=0)
        if row is None:
            row = positive.mean(dim=1)[:, 0]
            row[:, 0] += 1
        else:
            row = row + (row[:, None, None] @ positive).mean(dim=1)[:, 0]
        if not records:
            break  # block 1: nothing below its attention is asked for

        relevance_v = (attention.mT @ s).mul_(record.v).mul_(0.5)
        grad_v = attention.mT @ grad_context  # [B, H, N, d]
        relevance_q, relevance_k = matmul_rule(record.q, record.k.mT, record.scores, relevance_attention)
        grad_scores = _softmax_grad(attention, grad_attention).mul_(block.attn.scale)
        grad_q, grad_k = grad_scores @ record.k, grad_scores.mT @ record.q
        grad, relevance = _sweep_to_input(
            block, record, grad, relevance, (grad_q, grad_k, grad_v), (relevance_q, relevance_k.mT, relevance_v)
        )
    gh, gw = model.patch_embed.grid_size
    return row[:, model.num_prefix_tokens :].reshape(-1, gh, gw)


def _sweep_to_context(
    block: Block, record: _Record, grad: Tensor, relevance: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Down through the MLP and the output projection of the attention.

    Takes gradient and relevance [B, Q, D] of the block's output. Gives those of the first residual's skip branch
    [B, Q, D], and those of the context A V [B, H, Q, d].
    """
    heads, kind = block.attn.num_heads, _gelu_kind(block.mlp.act)
    skip, r = residual_rule(record.middle, record.mixed, record.out, relevance)
    g, r = _Linear.of(block.mlp.fc2, block.ls2).down(record.active, record.mixed, grad, r)  # [B, Q, F]
    g = torch.ops.aten.gelu_backward(g, record.hidden, approximate=kind)
    g, r = _Linear.of(block.mlp.fc1).down(record.norm2.out, record.hidden, g, r)  # [B, Q, D]
    grad = record.norm2.grad(block.norm2, record.middle, g).add_(grad)
    relevance = clone_rule(record.middle, r.add_(skip))

    live = record.x[:, : record.middle.shape[1]]
    skip, r = residual_rule(live, record.attended, record.middle, relevance)
    proj, context = _Linear.of(block.attn.proj, block.ls1), _join_heads(record.context)
    g, r = proj.down(context, record.attended, grad, r)  # [B, Q, E]
    return grad, skip, _split_heads(g, heads, 1)[0], _split_heads(r, heads, 1)[0]


def _sweep_to_input(
    block: Block,
    record: _Record,
    grad_skip: Tensor,
    relevance_skip: Tensor,
    grads: tuple[Tensor, Tensor, Tensor],
    relevances: tuple[Tensor, Tensor, Tensor],
) -> tuple[Tensor, Tensor]:
    """Down from q, k and v to the block's input -> gradient and relevance [B, N, D].

    `grads` and `relevances` are those of q [B, H, Q, d], k and v [B, H, N, d]; the skip branch brings [B, Q, D].
    """
    qkv, normed, live = _Linear.of(block.attn.qkv), record.norm1.out, record.q.shape[2]
    if live == normed.shape[1]:
        out = _join_heads(record.q, record.k, record.v)  # [B, N, 3E]
        grad, relevance = qkv.down(normed, out, _join_heads(*grads), _join_heads(*relevances))  # [B, N, D]
    else:
        # Last block: only the class token asked. The rule treats outputs one by one, so the layer may be split by them.
        width = qkv.weight.shape[0] // 3
        to_q, to_kv = qkv.rows(slice(0, width)), qkv.rows(slice(width, None))
        out = _join_heads(record.k, record.v)  # [B, N, 2E]
        grad, relevance = to_kv.down(normed, out, _join_heads(*grads[1:]), _join_heads(*relevances[1:]))
        by_q = to_q.down(normed[:, :live], _join_heads(record.q), _join_heads(grads[0]), _join_heads(relevances[0]))
        grad[:, :live] += by_q[0]
        relevance[:, :live] += by_q[1]
    grad = record.norm1.grad(block.norm1, record.x, grad)
    grad[:, :live] += grad_skip
    relevance[:, :live] += relevance_skip
    return grad, clone_rule(record.x, relevance)


def _softmax_grad(attention: Tensor, grad: Tensor) -> Tensor:
    return torch.ops.aten._softmax_backward_data(grad, attention, -1, attention.dtype)


# --------------------------------------------------------------------------------------------------------- checks


def check_supported(model: nn.Module) -> None:
    """Raise ValueError, naming the part, for a model with a part whose rule is not implemented.

    Supported: timm's VisionTransformer with a class token that alone feeds the head, pre-norm blocks of plain
    attention and GELU MLP, with or without LayerScale, biases and register tokens.
    """
    if type(model) is not VisionTransformer:
        raise ValueError(f"no relevance rules for {type(model).__name__}: a timm VisionTransformer is needed")
    top = {
        "class_token=False": not model.has_class_token,
        f"global_pool={model.global_pool!r} (only 'token')": model.global_pool != "token",
        "num_classes=0 (no classifier head)": type(model.head) is nn.Identity,
        "pre_norm=True (a norm before the blocks)": type(model.norm_pre) is not nn.Identity,
        "fc_norm=True (a norm after the pooling)": type(model.fc_norm) is not nn.Identity,
        "attention pooling": getattr(model, "attn_pool", None) is not None,
        "no blocks": len(model.blocks) == 0,
        "dynamic_img_pad=True": model.patch_embed.dynamic_img_pad if type(model.patch_embed) is PatchEmbed else False,
    }
    for part, present in top.items():
        if present:
            raise ValueError(f"no relevance rules for a VisionTransformer with {part}")
    _check_part("patch_embed", model.patch_embed, PatchEmbed)
    _check_part("norm", model.norm, LayerNorm, nn.LayerNorm)
    _check_part("head", model.head, nn.Linear)
    for number, block in enumerate(model.blocks):
        name = f"blocks.{number}"
        _check_part(name, block, Block)
        attn, mlp = block.attn, block.mlp
        _check_part(f"{name}.attn", attn, Attention)
        for norm in ("q_norm", "k_norm"):
            if type(getattr(attn, norm)) is not nn.Identity:
                raise ValueError(f"no relevance rules for a VisionTransformer with qk_norm=True ({name}.attn.{norm})")
        _check_part(f"{name}.attn.norm", getattr(attn, "norm", None) or nn.Identity(), nn.Identity)
        _check_part(f"{name}.attn.gate", getattr(attn, "gate", None) or nn.Identity(), nn.Identity)
        _check_part(f"{name}.mlp", mlp, Mlp)
        _check_part(f"{name}.mlp.act", mlp.act, nn.GELU, GELU, GELUTanh)
        _check_part(f"{name}.mlp.norm", mlp.norm, nn.Identity)
        for part in ("norm1", "norm2"):
            _check_part(f"{name}.{part}", getattr(block, part), LayerNorm, nn.LayerNorm)
        for part in ("ls1", "ls2"):
            _check_part(f"{name}.{part}", getattr(block, part), LayerScale, nn.Identity)
        for part, layer in (
            ("attn.qkv", attn.qkv),
            ("attn.proj", attn.proj),
            ("mlp.fc1", mlp.fc1),
            ("mlp.fc2", mlp.fc2),
        ):
            _check_part(f"{name}.{part}", layer, nn.Linear)


def _check_part(name: str, module: nn.Module, *kinds: type[nn.Module]) -> None:
    # The exact class: a subclass may compute something else under the same name.
    if type(module) not in kinds:
        wanted = " or ".join(dict.fromkeys(kind.__name__ for kind in kinds))
        raise ValueError(f"no relevance rule for {name}, a {type(module).__name__}: {wanted} is needed")


def _check_input(model: VisionTransformer, images: Tensor, targets: Tensor) -> None:
    training = next((name for name, module in model.named_modules() if module.training), None)
    if training is not None:
        raise ValueError(f"the model is in train mode ({training or 'all of it'}): call model.eval() first")
    weight = model.head.weight
    for name, tensor in model.named_parameters():
        if (tensor.dtype, tensor.device) != (weight.dtype, weight.device):
            raise ValueError(
                f"the model mixes dtypes or devices: {name} is {tensor.dtype} on {tensor.device}, "
                f"head.weight {weight.dtype} on {weight.device}"
            )
    shape = (model.patch_embed.proj.in_channels, *model.patch_embed.img_size)
    if images.ndim != 4 or tuple(images.shape[1:]) != shape:
        wanted = ", ".join(map(str, shape))
        raise ValueError(f"images have shape {list(images.shape)}, the model takes [B, {wanted}]")
    if (images.dtype, images.device) != (weight.dtype, weight.device):
        raise ValueError(
            f"images are {images.dtype} on {images.device}, the model is {weight.dtype} on {weight.device}"
        )
    if targets.dtype not in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8):
        raise ValueError(f"targets are {targets.dtype}, class numbers are integers")
    if tuple(targets.shape) != (len(images),):
        raise ValueError(f"targets have shape {list(targets.shape)}, {len(images)} images need one each")
    outside = (targets < 0) | (targets >= model.num_classes)
    if outside.any():
        first = int(targets[outside][0])
        raise ValueError(f"target class {first} is outside 0..{model.num_classes - 1}, the classes of the model")
    broken = ~images.isfinite().flatten(1).all(dim=1)
    if broken.any():
        raise ValueError(f"image {int(broken.nonzero()[0])} of the batch has pixels that are NaN or infinite")
