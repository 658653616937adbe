"""The tensors of a checkpoint that a model's authors published, and how they fill a model of ours."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from zpipe.schemas.errors import ZpipeError
from zpipe.schemas.weights import fit_names, is_state_dict, not_finite, read_weights


@dataclass(frozen=True)
class ReleasedWeights:
    """A published state dict.

    Attributes:
        name: its name in messages, the file's path or "state dict".
        model: the model that it should be of, for messages.
        tensors: the tensors by their authors' names, or by ours after `renamed`.
        prefix: what `part` removed from the names.
        is_renamed: whether the names are ours.
    """

    name: str
    model: str
    tensors: Mapping[str, Tensor]
    prefix: str = ""
    is_renamed: bool = False

    @classmethod
    def read(cls, source: str | Path | Mapping[str, Any], model: str) -> ReleasedWeights:
        """Read a weights file as `zpipe.schemas.weights.read_weights` does, or take a state dict.

        A state dict may be wrapped as {"model": state dict} or {"state_dict": state dict}. The usual prefixes are
        removed where all names carry them.

        Raises:
            ValueError: a file that is no checkpoint of plain tensors, or tensors that hold NaN or infinity.
            OSError: the file can't be read.
        """
        name: str = "state dict"
        state: Any = source
        if not isinstance(source, Mapping):
            name = str(source)
            try:
                state = read_weights(source)
            except ZpipeError as error:
                if isinstance(error.__cause__, OSError):
                    raise error.__cause__ from None
                raise ValueError(str(error)) from error
        for wrapper in ("model", "state_dict"):
            if isinstance(state, Mapping) and isinstance(state.get(wrapper), Mapping):
                state = state[wrapper]
        if not is_state_dict(state):
            raise ValueError(f"{name}: holds no state dict; expected tensors by name, perhaps under 'model'")
        if bad := not_finite(state):
            raise ValueError(f"{name}: {bad} holds NaN or infinity; give weights that did not diverge")
        return cls(name, model, fit_names(state, ()))

    def shape(self, key: str) -> torch.Size:
        """The shape of a tensor.

        Raises:
            ValueError: no tensor has that name.
        """
        if key not in self.tensors:
            lacks = "nothing for" if self.is_renamed else "no"
            raise ValueError(
                f"{self.name}: has {lacks} {self.prefix}{key}; expected a {self.model} that its authors published"
            )
        return self.tensors[key].shape

    def count(self, pattern: str) -> int:
        """One more than the highest number that the first group of `pattern` matches at the start of a name."""
        numbers = (int(match[1]) for key in self.tensors if (match := re.match(pattern, key)))
        return 1 + max(numbers, default=-1)

    def renamed(self, rename: Callable[[str], str]) -> ReleasedWeights:
        """The same tensors under other names."""
        return replace(self, tensors={rename(key): value for key, value in self.tensors.items()}, is_renamed=True)

    def part(self, prefix: str, *, inside: bool = True) -> ReleasedWeights:
        """The tensors whose names start with `prefix`, without it; or, unless inside, all the others."""
        chosen = {key: value for key, value in self.tensors.items() if key.startswith(prefix) == inside}
        tensors = {key.removeprefix(prefix): value for key, value in chosen.items()}
        return replace(self, tensors=tensors, prefix=prefix if inside else "")

    def fill(self, model: nn.Module, rename: Callable[[str], str]) -> None:
        """Copy every parameter of a model from here, except positions that the model computes itself.

        Args:
            model: the model to fill, in place.
            rename: turns the authors' name of a tensor into ours.

        Raises:
            ValueError: names that are missing or unknown, or tensors of unexpected shapes.
        """
        target = model.state_dict()
        values = {rename(theirs): (self.prefix + theirs, value) for theirs, value in self.tensors.items()}
        computed = {key for key, _ in model.named_buffers() if key.startswith("pos_")}
        if unknown := sorted(set(values) - set(target)):
            raise ValueError(
                f"{self.name}: {values[unknown[0]][0]} is not known ({len(unknown)} such); another model's checkpoint?"
            )
        if missing := sorted(set(target) - set(values) - computed):
            raise ValueError(
                f"{self.name}: has nothing for {missing[0]} ({len(missing)} such); the checkpoint is not whole"
            )
        for ours, (theirs, value) in values.items():
            if value.shape != target[ours].shape:
                raise ValueError(f"{self.name}: {theirs} is {list(value.shape)}, expected {list(target[ours].shape)}")
        model.load_state_dict({ours: value for ours, (_, value) in values.items()}, strict=False)
