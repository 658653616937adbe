"""The casts of `torch.autocast("cuda")` for tensors of `pretend_cuda`.

torch's own kernels for these casts leave alone what C++ doesn't see on a CUDA device. So kernels in Python stand in for
them, under the same dispatch key. What they cast is read from the lists in torch's header.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch.utils._pytree import tree_leaves, tree_map

AUTOCAST = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCUDA)


@contextmanager
def autocast_lists(tensors: type[torch.Tensor]) -> Iterator[None]:
    """Register what autocast does to a kind of tensors that has the key `AUTOCAST`."""
    casts: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # of weights, as autocast keeps them until its end
    clear = torch.clear_autocast_cache

    def clear_both() -> None:
        casts.clear()
        clear()

    library = torch.library.Library("aten", "IMPL")
    for policy, operators in _lists().items():
        for operator in operators:
            cast = partial(_cast_and_call, tensors, policy, _overload(operator), casts)
            library.impl(operator, cast, "AutocastCUDA", allow_override=True)
    try:
        with mock.patch.object(torch, "clear_autocast_cache", clear_both):
            yield
    finally:
        library._destroy()


@cache
def _lists() -> dict[str, list[str]]:
    """The names of operators, with overloads, by what autocast does to their arguments."""
    text = (Path(torch.__file__).parent / "include/ATen/autocast_mode.h").read_text().replace("\\\n", " ")
    names = {"LOWER_PRECISION_FP": "low", "FP32": "float32", "FP32_SET_OPT_DTYPE": "dtype", "PROMOTE": "widest"}
    lists = {}
    for name, policy in names.items():
        (line,) = re.findall(rf"#define AT_FORALL_{name}\(_\)(.*)", text)
        lists[policy] = [".".join(each.replace(" ", "").split(",")) for each in re.findall(r"_\(([\w, ]+)\)", line)]
    lists["float32"] += ["norm.Scalar", "norm.ScalarOpt_dim"]  # in a list of their own, because they get a dtype
    return lists


def _overload(operator: str) -> Any:
    name, _, overload = operator.partition(".")
    return getattr(getattr(torch.ops.aten, name), overload or "default")


def _cast_and_call(
    tensors: type[torch.Tensor], policy: str, operator: Any, casts: dict[int, Any], *args: Any, **kwargs: Any
) -> Any:
    """What autocast does to a call of an operator, by its policy."""
    low = torch.get_autocast_dtype("cuda")

    def eligible(x: Any) -> bool:
        return isinstance(x, tensors) and x.is_floating_point() and x.dtype != torch.float64

    def cast(dtype: torch.dtype, x: Any) -> Any:
        if not eligible(x) or x.dtype == dtype:
            return x
        if not (dtype == low and x.dtype == torch.float32 and x.requires_grad and x.is_leaf and not x._is_view()):
            return x.to(dtype)
        if id(x) not in casts:
            casts[id(x)] = (x, x.to(dtype))
        return casts[id(x)][1]

    with torch._C._ExcludeDispatchKeyGuard(AUTOCAST):
        if policy == "dtype":
            named = {argument.name: value for argument, value in zip(operator._schema.arguments, args, strict=False)}
            kwargs = named | kwargs
            if eligible(args[0]) and kwargs.get("dtype") is None:
                kwargs["dtype"] = torch.float32
            return operator(**kwargs)
        floats = [x for x in tree_leaves((args, kwargs)) if eligible(x)]
        widest = torch.float32 if any(x.dtype == torch.float32 for x in floats) else low
        dtype = {"low": low, "float32": torch.float32, "widest": widest}[policy]
        args, kwargs = tree_map(partial(cast, dtype), (args, kwargs))
        return operator(*args, **kwargs)
