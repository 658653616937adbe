"""Attention probabilities of any model, without hooks: scaled dot-product attention is computed in explicit steps."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from typing_extensions import override

from zpipe.pipeline.classifier import Classifier

SOFTMAX = (F.softmax, torch.softmax, Tensor.softmax)


class AttentionRecorder(TorchFunctionMode):
    """While it is active, attention keeps its probabilities, whatever kernel the model would use.

    It answers `torch.nn.functional.scaled_dot_product_attention`, which timm and transformers call, and
    `multi_head_attention_forward`, which `torch.nn.MultiheadAttention` calls, by the same formula in explicit steps. A
    softmax over the last of four axes counts as attention, too: models without a fused kernel call it.

    Args:
        change: Applied to the probabilities [B, H, Q, N] of each call before they weight the values; None keeps them.
        keep: Computes what `recorded` gets of the probabilities of a call; None keeps all of them.

    Attributes:
        recorded: The probabilities of each call in order, [B, H, Q, N], or what `keep` makes of them.
        shapes: B, Q and N of each call.
    """

    def __init__(
        self, change: Callable[[Tensor], Tensor] | None = None, keep: Callable[[Tensor], Tensor] | None = None
    ) -> None:
        super().__init__()
        self.recorded: list[Tensor] = []
        self.shapes: list[tuple[int, int, int]] = []
        self._change, self._keep = change, keep

    def __enter__(self) -> AttentionRecorder:
        # In eval mode torch.nn.MultiheadAttention would otherwise compute everything in one kernel.
        self._fast_path = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)
        return super().__enter__()

    def __exit__(self, *raised: Any) -> None:
        super().__exit__(*raised)
        torch.backends.mha.set_fastpath_enabled(self._fast_path)

    @override
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return self._attend(*args, **kwargs)
        if func is F.multi_head_attention_forward:
            return self._multi_head(*args, **kwargs)
        result = func(*args, **kwargs)
        return self._record(result) if func in SOFTMAX and result.ndim == 4 else result

    def check(self, classifier: Classifier, batch: int) -> None:
        """Check that what was recorded is one self-attention of all tokens per block, then that of the pooling.

        Raises:
            ValueError: The model computes its attention in another way.
        """
        tokens = classifier.tokens
        wanted = [(batch, tokens, tokens)] * len(classifier.blocks)
        if classifier.readout() is None:
            patches = tokens - classifier.prefix_tokens  # a pooling may leave the prefix tokens out
            wanted.append((batch, 1, patches if self.shapes[-1:] == [(batch, 1, patches)] else tokens))
        if self.shapes == wanted:
            return
        if len(self.shapes) == len(wanted):
            place = next(place for place, shape in enumerate(self.shapes) if shape != wanted[place])
            found = f"attention {place + 1} is {list(self.shapes[place])}, not {list(wanted[place])}"
        else:
            found = f"it calls attention {len(self.shapes)} times, not {len(wanted)} times"
        raise ValueError(
            f"a {type(classifier.model).__name__} whose blocks do not each attend once from all tokens to all, by a "
            f"known function, cannot be explained: {found}"
        )

    def _record(self, probabilities: Tensor) -> Tensor:
        if self._change is not None:
            probabilities = self._change(probabilities)
        self.shapes.append((probabilities.shape[0], *probabilities.shape[-2:]))
        self.recorded.append(probabilities if self._keep is None else self._keep(probabilities))
        return probabilities

    def _attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        if is_causal or enable_gqa or dropout_p:
            raise ValueError("an attention with causal mask, grouped heads or dropout is not known")
        scores = (q * (1 / math.sqrt(q.shape[-1]) if scale is None else scale)) @ k.mT  # [B, H, Q, N]
        if attn_mask is not None:
            scores = scores.masked_fill(~attn_mask, -torch.inf) if attn_mask.dtype == torch.bool else scores + attn_mask
        return self._record(scores.softmax(dim=-1)) @ v

    def _multi_head(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        embed_dim: int,
        heads: int,
        weight: Tensor | None,
        bias: Tensor | None,
        bias_k: Tensor | None,
        bias_v: Tensor | None,
        add_zero_attn: bool,
        dropout_p: float,
        out_weight: Tensor,
        out_bias: Tensor | None,
        **options: Any,
    ) -> tuple[Tensor, None]:
        """Of tokens [Q, B, D] and [N, B, D], as torch.nn.MultiheadAttention passes them."""
        masks = ("attn_mask", "key_padding_mask", "is_causal")
        odd = [name for name in masks if options.get(name) not in (None, False)]
        if weight is None or bias_k is not None or bias_v is not None or add_zero_attn or odd:
            raise ValueError("a torch.nn.MultiheadAttention with masks, separate weights or added tokens is not known")
        biases = (None,) * 3 if bias is None else bias.chunk(3)
        q, k, v = (
            F.linear(x, w, b).unflatten(2, (heads, -1)).permute(1, 2, 0, 3)  # [B, H, Q or N, d]
            for x, w, b in zip((query, key, value), weight.chunk(3), biases, strict=True)
        )
        context = self._attend(q, k, v)  # [B, H, Q, d]
        return F.linear(context.permute(2, 0, 1, 3).flatten(2), out_weight, out_bias), None
