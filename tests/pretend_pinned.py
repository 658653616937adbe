"""Memory of the host that pretends to be pinned, for `pretend_cuda`."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch


def pin(tensor: torch.Tensor) -> torch.Tensor:
    """A copy in pinned memory, or the tensor itself if it is there."""
    if is_pinned(tensor):
        return tensor
    copy = tensor.clone()
    copy.untyped_storage().pretends_pinned = True  # this attribute lives as long as the storage
    return copy


def is_pinned(tensor: torch.Tensor) -> bool:
    """Whether a CPU tensor is, or is a view of one, that `pin` has made."""
    return not tensor.is_cuda and hasattr(tensor.untyped_storage(), "pretends_pinned")


def of_array(from_numpy: Callable[[np.ndarray], torch.Tensor], array: np.ndarray) -> torch.Tensor:
    """As torch.from_numpy: the tensor is pinned if the array is a view of a pinned tensor."""
    tensor, base = from_numpy(array), array.base
    while isinstance(base, np.ndarray):
        base = base.base
    if isinstance(base, torch.Tensor) and is_pinned(base):
        tensor.untyped_storage().pretends_pinned = True
    return tensor
