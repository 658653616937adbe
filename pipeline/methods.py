"""The attribution methods that extraction knows by name, all with the interface of `Method`.

    transformer-attribution         relevance times gradient, per class (Chefer et al., CVPR 2021; the ZoomViT paper's)
    transformer-attribution-stable  the same, but stable: residual connections split by magnitude (`relevance.py`)
    gradient-attention              attention times gradient, per class (Chefer et al., ICCV 2021, Eq. 5-6)
    legrad                          the gradient of each block's own class score (Bousselham et al., ICCV 2025)
    libragrad                       tokens times gradient of a complete backward pass (Mehri et al., CVPR 2025)
    rollout                         attention alone, no class (Abnar and Zuidema, ACL 2020)
    class-attention                 what the head reads in the last block, no class (Caron et al., ICCV 2021)

The last two depend on no class: they give the same map for every target. The first two explain the models that
`check_supported` accepts, the others any `Classifier`: where the head reads the mean of the tokens or a pooling
attention, that row takes the place of the class token's.

Symbols in the shape comments: B images, N tokens, D width, H heads, Q queries (N, or 1 in a pooling attention), K
target classes per image.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from zpipe.pipeline.attention_recorder import AttentionRecorder
from zpipe.pipeline.classifier import Classifier, Targets, as_classifier, first
from zpipe.pipeline.libragrad import BalancedGradients, check_activations
from zpipe.pipeline.recorded_forward import Attribution
from zpipe.pipeline.relevance import attribute
from zpipe.pipeline.supported import check_request, check_supported, resolve_targets
from zpipe.schemas.devices import float32_arithmetic

# Takes a `Classifier`, or a model that `as_classifier` wraps, in eval mode; normalised images [B, C, H, W] in its size,
# dtype and device; and class numbers [B], or [B, K] for K maps per image, or a function that computes them from the
# logits. Returns raw maps. Raises ValueError, in one line, if an argument does not fit or the method cannot explain the
# model. Computes in the dtype of the model, and under autocast in what autocast chooses; float32 is never TF32.
Method = Callable[[nn.Module, Tensor, Targets], Attribution]


def _closed_form(model: nn.Module, images: Tensor, targets: Targets, *, split: str = "sum") -> Attribution:
    """Compute `relevance.attribute` of the model in a `Classifier`. Autocast has no effect on it."""
    classifier = as_classifier(model)
    if reason := _closed_form_refusal(classifier):
        raise ValueError(reason)
    return attribute(classifier.model, images, targets, split=split)


@float32_arithmetic()
def gradient_attention(model: nn.Module, images: Tensor, targets: Targets) -> Attribution:
    """The readout's row of the product over blocks of I + mean over heads of max(0, G_A * A), G_A the gradient.

    Source: Chefer, Gur and Wolf, ICCV 2021, Eq. 5-6. A pooling attention gives the mean over heads of its own max(0,
    G_A * A) as the row to begin with.

    Arguments, result and exceptions are those of `Method`.
    """
    classifier = _checked(model, images, targets)
    with _autograd(images) as images:
        with AttentionRecorder(_begin_graph) as recorder:
            logits = classifier(images)
        recorder.check(classifier, len(images))
        chosen, single = resolve_targets(targets, logits.detach())
        row = _DownwardRow(classifier, recorder.recorded)
        rows = [row.finish(grad) for (grad,) in _gradients(logits, chosen, recorder.recorded[:1])]
    return _attribution(classifier, rows, single, logits)


class _DownwardRow:
    """The row of `gradient_attention`, carried down while the backward pass goes on.

    Gradients arrive from the last attention to the first, in the order in which the row needs them, so hooks use each
    one and let it go: those of all blocks together would take as much memory as the attention.

    Args:
        classifier: The model.
        attention: The probabilities of each call, [B, H, Q, N], on the graph of the logits.
    """

    def __init__(self, classifier: Classifier, attention: list[Tensor]) -> None:
        self._classifier = classifier
        self._first = attention[0].detach()
        self._row: Tensor | None = None  # [B, N]; None before the last attention
        for probabilities in attention[1:]:
            # A hook that held the tensor itself, not its values, would keep the graph alive in a circle.
            probabilities.register_hook(partial(self._descend, probabilities.detach()))

    def _descend(self, attention: Tensor, grad: Tensor) -> None:
        positive = (attention * grad).clamp_(min=0)
        if self._row is not None:
            self._row = self._row + _through(self._row, positive)
            return
        matrices = [positive]
        row = _first_row(self._classifier, matrices)
        self._row = row + _through(row, positive) if matrices else row

    def finish(self, grad: Tensor) -> Tensor:
        """The row [B, N] of a backward pass, from the gradient of the first attention, its last one."""
        self._descend(self._first, grad)
        row, self._row = self._row, None
        assert row is not None  # `_descend` has set it
        return row


@float32_arithmetic()
def legrad(model: nn.Module, images: Tensor, targets: Targets) -> Attribution:
    """The sum over blocks of the positive gradient of the block's own class score by its attention.

    Source: Bousselham et al., "LeGrad: An Explainability Method for Vision Transformers via Feature Formation
    Sensitivity", ICCV 2025. The score of a block is what norm and head of the model make of the mean over all tokens
    of its output, and its gradient stays within the block. The positive part is averaged over heads and queries. If
    the head has a pooling attention, the block's tokens go through that, and the gradient is taken by its
    probabilities.

    Arguments, result and exceptions are those of `Method`.
    """
    classifier = _checked(model, images, targets)
    legrad_rows = _legrad_by_block if classifier.readout() is not None else _legrad_by_pooling
    with _autograd(images) as images:
        rows, single, logits = legrad_rows(classifier, images, targets)
    return _attribution(classifier, list(rows), single, logits)


@float32_arithmetic()
def libragrad(model: nn.Module, images: Tensor, targets: Targets) -> Attribution:
    """The sum over blocks of token times gradient at the block's input, by a complete backward pass.

    Source: Mehri et al., CVPR 2025: the corrected backward pass of `zpipe.pipeline.libragrad`, in a sum over layers as
    their FullGrad+ takes it, of the tokens alone: biases are no part of the image. Relevance may be negative.

    Arguments, result and exceptions are those of `Method`.
    """
    classifier = _checked(model, images, targets)
    check_activations(classifier.blocks)
    tokens: list[Tensor] = []  # the input [B, N, D] of each block

    def begin_block(_block: nn.Module, args: tuple[Tensor, ...]) -> None:
        tokens.append(args[0])

    hooks = [block.register_forward_pre_hook(begin_block) for block in classifier.blocks]
    with _autograd(images) as images:
        with _removed(*hooks), BalancedGradients() as recorder:
            logits = classifier(images.requires_grad_())
        recorder.check(classifier, len(images))
        chosen, single = resolve_targets(targets, logits.detach())
        rows = []
        for grads in _gradients(logits, chosen, tokens):
            shares = [(x.detach() * grad).sum(dim=2) for x, grad in zip(tokens, grads, strict=True)]  # [B, N] each
            rows.append(torch.stack(shares).sum(dim=0))
    return _attribution(classifier, rows, single, logits)


@torch.no_grad()
@float32_arithmetic()
def rollout(model: nn.Module, images: Tensor, targets: Targets) -> Attribution:
    """The readout's row of the product over blocks of (I + mean over heads of A) / 2.

    Source: Abnar and Zuidema, ACL 2020. A pooling attention gives the row to begin with.

    Arguments, result and exceptions are those of `Method`; the maps are the same for every target.
    """
    classifier = _checked(model, images, targets)
    logits, attention = _mean_attention(classifier, images)
    row = _first_row(classifier, attention)
    for matrices in reversed(attention):
        row = 0.5 * (row + _through(row, matrices))
    return _without_class(classifier, row, targets, logits)


@torch.no_grad()
@float32_arithmetic()
def class_attention(model: nn.Module, images: Tensor, targets: Targets) -> Attribution:
    """The readout's row of the last block's attention, or the row of the pooling attention, averaged over heads.

    Source: Caron et al., ICCV 2021, for the class token.

    Arguments, result and exceptions are those of `Method`; the maps are the same for every target.
    """
    classifier = _checked(model, images, targets)
    logits, attention = _mean_attention(classifier, images)
    row = _first_row(classifier, attention)
    if classifier.readout() is not None:
        row = _through(row, attention[-1])
    return _without_class(classifier, row, targets, logits)


METHODS: dict[str, Method] = {
    "transformer-attribution": _closed_form,
    "transformer-attribution-stable": partial(_closed_form, split="magnitude"),
    "gradient-attention": gradient_attention,
    "legrad": legrad,
    "libragrad": libragrad,
    "rollout": rollout,
    "class-attention": class_attention,
}
# Methods in closed form, with a downward sweep that can have another precision: how each splits relevance.
CLOSED_FORM = {"transformer-attribution": "sum", "transformer-attribution-stable": "magnitude"}
DEFAULT_METHOD = "transformer-attribution"
CLASS_BLIND = ("rollout", "class-attention")


def methods_of(classifier: Classifier) -> dict[str, str]:
    """Why each method cannot explain a classifier, "" where it can, in the order of `METHODS`."""
    unknown = _attention_refusal(classifier)
    refusals = dict.fromkeys(METHODS, unknown) | dict.fromkeys(CLOSED_FORM, _closed_form_refusal(classifier))
    return refusals | {"libragrad": unknown or _activation_refusal(classifier)}


def refusal_of(classifier: Classifier, method: str) -> str:
    """Why a method cannot explain a classifier; empty if it can."""
    if method in CLOSED_FORM:
        return _closed_form_refusal(classifier)
    unknown = _attention_refusal(classifier)
    return unknown or (_activation_refusal(classifier) if method == "libragrad" else "")


@torch.no_grad()
def _attention_refusal(classifier: Classifier) -> str:
    """Why the attention of a model cannot be recorded, tried on one black image; empty if it can."""
    weight = next(classifier.model.parameters())
    image = weight.new_zeros(1, classifier.channels, *classifier.image_size)
    try:
        _mean_attention(classifier, image)
    except ValueError as error:
        return str(error)
    return ""


def _activation_refusal(classifier: Classifier) -> str:
    try:
        check_activations(classifier.blocks)
    except ValueError as error:
        return str(error)
    return ""


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


# ------------------------------------------------------------------------------------------------ attention alone


def _mean_attention(classifier: Classifier, images: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Logits [B, classes], and the attention of each call averaged over heads, [B, 1, Q, N]."""
    with AttentionRecorder(keep=lambda p: p.mean(dim=1, keepdim=True)) as recorder:
        logits = classifier(images)
    recorder.check(classifier, len(images))
    return logits, recorder.recorded


def _first_row(classifier: Classifier, matrices: list[Tensor]) -> Tensor:
    """The weights [B, N] of the last block's tokens; those of a pooling attention are taken off the end of the list."""
    readout = classifier.readout()
    if readout is None:
        row = matrices.pop().mean(dim=1)[:, 0]
        return nn.functional.pad(row, (classifier.tokens - row.shape[1], 0))  # it may leave the prefix tokens out
    return readout.expand(len(matrices[-1]), -1)


def _through(row: Tensor, matrices: Tensor) -> Tensor:
    """Multiply a row [B, N] with the mean over heads of [B, H, N, N]: the mean is over rows, not matrices."""
    return (row[:, None, None] @ matrices).mean(dim=1)[:, 0]


def _without_class(classifier: Classifier, row: Tensor, targets: Targets, logits: Tensor) -> Attribution:
    chosen, single = resolve_targets(targets, logits)
    return _attribution(classifier, [row] * chosen.shape[1], single, logits)


def _attribution(classifier: Classifier, rows: list[Tensor], single: bool, logits: Tensor) -> Attribution:
    """Maps of rows [B, N], one for each of K targets. Prefix tokens have no place in the image and are left out."""
    patches = classifier.tokens - classifier.prefix_tokens
    maps = torch.stack([row[:, -patches:].unflatten(1, classifier.grid) for row in rows], dim=1)
    return Attribution(maps[:, 0] if single else maps, logits.detach())


# ------------------------------------------------------------------------------------------------------- gradients


@contextmanager
def _autograd(images: Tensor) -> Iterator[Tensor]:
    """Record a graph, in whatever mode the caller is. Yields the images as autograd can take them."""
    with torch.inference_mode(False), torch.enable_grad():
        yield images.clone() if images.is_inference() else images.detach()


def _begin_graph(probabilities: Tensor) -> Tensor:
    """Let the graph begin at the first attention: the weights are frozen, and nothing below it is needed."""
    return probabilities if probabilities.requires_grad else probabilities.requires_grad_()


def _gradients(logits: Tensor, targets: Tensor, inputs: list[Tensor]) -> Iterator[tuple[Tensor, ...]]:
    """For each of the K targets [B, K], the gradients of its logit by `inputs`; the last one frees the graph."""
    for k in range(targets.shape[1]):
        score = logits.gather(1, targets[:, k, None]).sum()
        yield torch.autograd.grad(score, inputs, retain_graph=k + 1 < targets.shape[1])


# ---------------------------------------------------------------------------------------------------------- LeGrad


def _legrad_by_block(classifier: Classifier, images: Tensor, targets: Targets) -> tuple[Tensor, bool, Tensor]:
    """Rows [K, B, N], whether the targets were [B], and logits [B, classes].

    If the targets are known before the forward pass, the graph of each block is freed at the end of the block.
    """
    known = resolve_targets(targets, images)[0] if isinstance(targets, Tensor) else None
    waiting: list[tuple[list[Tensor], Tensor]] = []  # attention [B, H, N, N] and output [B, N, D] of a block
    rows = []

    def finish(chosen: Tensor) -> None:
        attention, out = waiting.pop()
        mean = out.mean(dim=1, keepdim=True)  # [B, 1, D]
        answer = classifier.read(mean.expand(-1, classifier.prefix_tokens + 1, -1))
        rows.append(_positive_means(answer, chosen, attention))

    def end_block(_block: nn.Module, _args: object, output: object) -> object:
        waiting.append((recorder.recorded[:], first(output)))
        recorder.recorded.clear()
        if known is not None and len(waiting[-1][0]) == 1:
            finish(known)
        cut = first(output).detach()  # the gradient of the blocks above ends here
        return (cut, *output[1:]) if isinstance(output, tuple) else cut

    hooks = [block.register_forward_hook(end_block) for block in classifier.blocks]
    with _removed(*hooks), AttentionRecorder(_begin_graph) as recorder:
        logits = classifier(images)
    recorder.check(classifier, len(images))
    chosen, single = resolve_targets(targets, logits.detach())
    while waiting:
        finish(chosen)
    return torch.stack(rows).sum(dim=0), single, logits


def _legrad_by_pooling(classifier: Classifier, images: Tensor, targets: Targets) -> tuple[Tensor, bool, Tensor]:
    """As `_legrad_by_block`, for a head with a pooling attention."""
    tokens: list[Tensor] = []  # the output [B, N, D] of each block

    def end_block(_block: nn.Module, _args: object, output: object) -> None:
        tokens.append(first(output))

    hooks = [block.register_forward_hook(end_block) for block in classifier.blocks]
    with torch.no_grad(), _removed(*hooks), AttentionRecorder(keep=lambda p: p[:0]) as recorder:
        logits = classifier(images)
    recorder.check(classifier, len(images))
    chosen, single = resolve_targets(targets, logits)
    rows = []
    for out in tokens:
        with AttentionRecorder(_begin_graph) as recorder:
            answer = classifier.read(out)
        rows.append(_positive_means(answer, chosen, recorder.recorded))
    return torch.stack(rows).sum(dim=0), single, logits


def _positive_means(logits: Tensor, targets: Tensor, attention: list[Tensor]) -> Tensor:
    """Positive part of each target's gradient, averaged over heads and queries: [K, B, N]."""
    return torch.stack([grad.clamp_(min=0).mean(dim=(1, 2)) for (grad,) in _gradients(logits, targets, attention)])


@contextmanager
def _removed(*hooks: torch.utils.hooks.RemovableHandle) -> Iterator[None]:
    """Remove hooks at the end of the context."""
    with ExitStack() as stack:
        for hook in hooks:
            stack.callback(hook.remove)
        yield
