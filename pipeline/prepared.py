"""What an attribution keeps between batches: weights as its products take them, and compiled functions of a block."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch
from timm.models.vision_transformer import VisionTransformer

from zpipe.pipeline.block_weights import BlockWeights, Linear, Norm
from zpipe.schemas.devices import device_fault, is_out_of_memory

P = ParamSpec("P")
T = TypeVar("T")

SWEEPS = ("model", "float32", "tf32", "bfloat16")

# Measured kernels would differ between processes, and with them the last bits of a map.
COMPILE_OPTIONS: dict[str, Any] = {"deterministic": True, "shape_padding": False}
GRAPHS = 64  # of a function: one for each precision, split, batch size and kind of block


class Prepared:
    """A model as `attribute` computes with it.

    Args:
        model: A timm VisionTransformer that `check_supported` accepts, on its device and in its dtype.
        sweep: Arithmetic of the downward sweep, one of SWEEPS.
        keep: Keep abs() of the weights, and the weights in the dtype of the sweep, rather than compute them for every
            batch: one or two copies of the weights in the sweep's precision. The weights must not change any more.
        compiler: Backend of `torch.compile` that fuses the functions of a block, such as ``inductor``; it compiles
            them for each size of a batch. None calls them as they are.
        notes: Gets a line that says why, if the functions can't be compiled.

    Raises:
        ValueError: The sweep is unknown.
    """

    def __init__(
        self,
        model: VisionTransformer,
        sweep: str = "model",
        *,
        keep: bool = False,
        compiler: str | Callable[..., Any] | None = None,
        notes: list[str] | None = None,
    ) -> None:
        if sweep not in SWEEPS:
            raise ValueError(f"sweep={sweep!r}: choose one of {', '.join(SWEEPS)}")
        self.model, self.sweep, self.compiler = model, sweep, compiler
        self.dtype: torch.dtype = model.head.weight.dtype if sweep == "model" else torch.float32
        """The dtype of the records, in which the sweep computes."""
        self.notes = [] if notes is None else notes
        self._factors = torch.bfloat16 if sweep == "bfloat16" else self.dtype
        self._functions: dict[Any, Callable[..., Any]] = {}
        self._forward: list[BlockWeights] | None = None
        self._down: list[BlockWeights] | None = None
        if keep:
            with torch.no_grad():
                self._forward = [BlockWeights.of(block) for block in model.blocks]
                self._down = [block.to(self.dtype).keep(self._factors) for block in self._forward]

    def forward(self, number: int) -> BlockWeights:
        """The layers of a block, counted from 0, for the forward pass."""
        return BlockWeights.of(self.model.blocks[number]) if self._forward is None else self._forward[number]

    def down(self, number: int) -> BlockWeights:
        """The layers of a block for the sweep."""
        return self.forward(number).to(self.dtype) if self._down is None else self._down[number]

    @property
    def top(self) -> tuple[Norm, Linear]:
        """The final norm and the head for the sweep."""
        norm, head = Norm.of(self.model.norm).to(self.dtype), Linear.of(self.model.head).to(self.dtype)
        return norm, head if self._down is None else head.keep(self._factors)

    def call(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Call a function of a block. If it can't be compiled, a note says why and all are called as they are."""
        if self.compiler is None:
            return function(*args, **kwargs)
        from torch._dynamo import config, exc  # takes a second, which programs that don't compile needn't wait for

        try:
            with config.patch(recompile_limit=GRAPHS):
                return self._compiled(function, self.compiler)(*args, **kwargs)
        except (exc.TorchDynamoException, exc.FailOnRecompileLimitHit) as error:  # Inductor's errors are Dynamo's, too
            cause = getattr(error, "inner_exception", error)
            if is_out_of_memory(cause) or device_fault(cause):
                raise
            reason = " ".join(str(error).split())[:200]
            self.notes.append(f"kernels can't be fused, so that maps take longer: {type(error).__name__}: {reason}")
        self.compiler = None
        return function(*args, **kwargs)

    def _compiled(self, function: Callable[P, T], compiler: str | Callable[..., Any]) -> Callable[P, T]:
        if function not in self._functions:
            options = COMPILE_OPTIONS if compiler == "inductor" else None
            self._functions[function] = torch.compile(
                function, fullgraph=True, dynamic=False, backend=compiler, options=options
            )
        return self._functions[function]
