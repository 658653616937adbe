"""The attribution methods that extraction knows by name, all with the interface of `Method`.

    transformer-attribution   relevance times gradient, per class (Chefer et al., CVPR 2021; the ZoomViT paper's)
    gradient-attention        attention times gradient, per class (Chefer et al., ICCV 2021, Eq. 5-6 for self-attention)
    legrad                    gradient of each block's own class score by its attention (Bousselham et al., ICCV 2025)
    libragrad                 tokens times gradient, by a complete backward pass (Mehri et al., CVPR 2025)
    rollout                   attention alone, no class (Abnar and Zuidema, ACL 2020)
    class-attention           the attention of what the head reads in the last block, no class (Caron et al., ICCV 2021)

The last two depend on no class: they give the same map for every target. The first one is for the models that
`check_supported` accepts, the others for any `Classifier`. They start from the tokens that the head reads: the class
token, the mean of the patches, or the query of a pooling attention.

Symbols in the shape comments: B images, N tokens, D width, H heads, Q queries (N, or 1 in a pooling attention), K
target classes per image.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from zpipe.pipeline.attention_recorder import AttentionRecorder
from zpipe.pipeline.classifier import Classifier, Targets, as_classifier, first
from zpipe.pipeline.recorded_forward import Attribution
from zpipe.pipeline.relevance import attribute
from zpipe.pipeline.supported import check_request, check_supported, resolve_targets

Method = Callable[[nn.Module, Tensor, Targets], Attribution]
"""Computes maps and logits of a `Classifier`, or of a model that `as_classifier` wraps. The model is in eval mode and is
not changed; images [B, C, H, W] are normalised and in its size, dtype and device; targets are class numbers [B], or [B,
K] for K maps per image, or a function that computes them from the logits. Maps are raw. ValueError: an argument does not
fit, or the method cannot explain the model."""


def transformer_attribution(model: nn.Module, images: Tensor, targets: Targets) -> Attribution:
    """Compute `relevance.attribute` for the model inside a `Classifier`."""
    if isinstance(model, Classifier):
        if model.head is not None:
            raise ValueError("transformer-attribution has no relevance rules for a head in place of the model's own")
        model = model.model
    return attribute(model, images, targets)


def gradient_attention(model: nn.Module, images: Tensor, targets: Targets) -> Attribution:
    """The readout's row of the product over blocks of I + mean over heads of max(0, G_A * A), G_A the gradient.

    Arguments, result and exceptions are those of `Method`.
    """
    classifier = _checked(model, images, targets)
    with _autograd(images) as images, AttentionRecorder(_with_grad) as recorder:
        logits = classifier(images)
    recorder.check(classifier, len(images))
    attention = [a.detach() for a in recorder.recorded]  # each [B, H, Q, N]
    rows = []
    chosen, single = resolve_targets(targets, logits.detach())
    for grads in _gradients(logits, chosen, recorder.recorded):
        positive = [(a * g).clamp_(min=0) for a, g in zip(attention, grads, strict=True)]
        row = _first_row(classifier, positive)
        for matrices in reversed(positive):
            row = row + _through(row, matrices)
        rows.append(row)
    return _attribution(classifier, rows, single, logits)


@torch.no_grad()
def rollout(model: nn.Module, images: Tensor, targets: Targets) -> Attribution:
    """The readout's row of the product over blocks of (I + mean over heads of A) / 2.

    Arguments, result and exceptions are those of `Method`; the maps are the same for every target.
    """
    classifier = _checked(model, images, targets)
    logits, attention = _mean_attention(classifier, images)
    row = _first_row(classifier, attention)
    for matrices in reversed(attention):
        row = 0.5 * (row + _through(row, matrices))
    return _without_class(classifier, row, targets, logits)


@torch.no_grad()
def class_attention(model: nn.Module, images: Tensor, targets: Targets) -> Attribution:
    """The readout's row of the last block's attention, or the row of the pooling attention, averaged over heads.

    Arguments, result and exceptions are those of `Method`; the maps are the same for every target.
    """
    classifier = _checked(model, images, targets)
    logits, attention = _mean_attention(classifier, images)
    pools = classifier.readout() is None
    row = _first_row(classifier, attention)
    return _without_class(classifier, row if pools else _through(row, attention[-1]), targets, logits)


def legrad(model: nn.Module, images: Tensor, targets: Targets) -> Attribution:
    classifier = _checked(model, images, targets)
    pools = classifier.readout() is None
    pending: list[tuple[Tensor, Tensor]] = []  # of each block, its attention [B, H, N, N] and its output [B, N, D]
    tokens: list[Tensor] = []

    def end_of_block(_block: nn.Module, _args: object, output: object) -> object:
        """Cut the graph, so that a gradient stays within its block."""
        tokens.append(first(output))
        cut = first(output).detach()
        return (cut, *output[1:]) if isinstance(output, tuple) else cut

    with _autograd(images) as images:
        hooks = [block.register_forward_hook(end_of_block) for block in classifier.blocks]
        try:
            with AttentionRecorder(_with_grad) as recorder:
                logits = classifier(images)
        finally:
            for hook in hooks:
                hook.remove()
    recorder.check(classifier, len(images))
    chosen, single = resolve_targets(targets, logits.detach())
    sums = 0
    with torch.enable_grad():
        for out in reversed(tokens):
            if pools:
                with AttentionRecorder(lambda p: p.detach().requires_grad_()) as pooling:
                    answer = classifier.read(out.detach())
                at = pooling.recorded[-1]
            else:
                mean = out.mean(dim=1, keepdim=True)  # [B, 1, D]
                answer = classifier.read(mean.expand(-1, classifier.prefix_tokens + 1, -1))
                at = recorder.recorded.pop()
            sums = sums + torch.stack([g[0].clamp_(min=0).mean(dim=(1, 2)) for g in _gradients(answer, chosen, [at])])
    return _attribution(classifier, list(sums), single, logits)


METHODS: dict[str, Method] = {
    "transformer-attribution": transformer_attribution,
    "gradient-attention": gradient_attention,
    "legrad": legrad,
    "rollout": rollout,
    "class-attention": class_attention,
}
DEFAULT_METHOD = "transformer-attribution"
CLASS_BLIND = ("rollout", "class-attention")


def methods_of(classifier: Classifier) -> dict[str, str]:
    """Why each method cannot explain a classifier, "" where it can, in the order of `METHODS`."""
    return {name: _closed_form_refusal(classifier) if name == DEFAULT_METHOD else "" for name in METHODS}


def _closed_form_refusal(classifier: Classifier) -> str:
    if classifier.head is not None:
        return "no relevance rules for a head that is not the model's own"
    try:
        check_supported(classifier.model)
    except ValueError as error:
        return str(error)
    return ""


def _checked(model: nn.Module, images: Tensor, targets: Targets) -> Classifier:
    classifier = as_classifier(model)
    check_request(classifier, images, targets)
    return classifier


@contextmanager
def _autograd(images: Tensor) -> Iterator[Tensor]:
    """Record a graph, in whatever mode the caller is. Yields the images as autograd can take them."""
    with torch.inference_mode(False), torch.enable_grad():
        yield images.clone() if images.is_inference() else images.detach()


def _with_grad(probabilities: Tensor) -> Tensor:
    """Let the graph begin at the first attention: the weights are frozen, and nothing below it is needed."""
    return probabilities if probabilities.requires_grad else probabilities.requires_grad_()


def _gradients(logits: Tensor, targets: Tensor, inputs: list[Tensor]) -> Iterator[tuple[Tensor, ...]]:
    """For each of the K targets [B, K], the gradients of its logit by `inputs`; the graph is freed with the last."""
    for k in range(targets.shape[1]):
        score = logits.gather(1, targets[:, k, None]).sum()
        yield torch.autograd.grad(score, inputs, retain_graph=k + 1 < targets.shape[1])


def _mean_attention(classifier: Classifier, images: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Logits [B, classes], and the attention of each call averaged over heads, [B, 1, Q, N]."""
    with AttentionRecorder(keep=lambda p: p.mean(dim=1, keepdim=True)) as recorder:
        logits = classifier(images)
    recorder.check(classifier, len(images))
    return logits, recorder.recorded


def _first_row(classifier: Classifier, matrices: list[Tensor]) -> Tensor:
    """The weights of the last block's tokens [B, N]; a pooling attention is taken off the end of `matrices`."""
    readout = classifier.readout()
    if readout is None:
        return matrices.pop().mean(dim=1)[:, 0]
    return readout.expand(len(matrices[-1]), -1)


def _through(row: Tensor, matrices: Tensor) -> Tensor:
    """Multiply a row [B, N] with the mean over heads of matrices [B, H, N, N]: over rows, which are smaller."""
    return (row[:, None, None] @ matrices).mean(dim=1)[:, 0]


def _without_class(classifier: Classifier, row: Tensor, targets: Targets, logits: Tensor) -> Attribution:
    chosen, single = resolve_targets(targets, logits)
    return _attribution(classifier, [row] * chosen.shape[1], single, logits)


def _attribution(classifier: Classifier, rows: list[Tensor], single: bool, logits: Tensor) -> Attribution:
    """Maps of rows [B, N], one for each of K targets. Prefix tokens have no place in the image and are left out."""
    maps = torch.stack([row[:, classifier.prefix_tokens :].unflatten(1, classifier.grid) for row in rows], dim=1)
    return Attribution(maps[:, 0] if single else maps, logits.detach())
