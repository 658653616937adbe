"""The position of a training run within an epoch, from which it resumes bit for bit."""

from __future__ import annotations

from typing import Any

import torch

from zpipe.train.data.loader import RelevanceLoader
from zpipe.train.ranks import Ranks


def position_of(loader: RelevanceLoader, draws: torch.Generator, group: Ranks, device: torch.device) -> dict[str, Any]:
    """The position within an epoch: that of the loader, and the states of all ranks' random number generators."""
    # Reading the state of a CUDA generator initialises CUDA, which a run on the CPU must not do.
    own = {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None}
    return {"loader": loader.state_dict(), "draws": draws.get_state(), "ranks": group.gather(own)}


def restore_position(
    position: dict[str, Any], loader: RelevanceLoader, draws: torch.Generator, group: Ranks, device: torch.device
) -> None:
    """Restore loader and generators to a position of `position_of`.

    Raises:
        UsageError: If the loader's state was taken under other settings.
    """
    loader.load_state_dict(position["loader"])
    draws.set_state(position["draws"])
    if group.rank >= len(position["ranks"]):
        return  # the checkpoint is of fewer ranks: this one starts from the seed of the epoch
    own = position["ranks"][group.rank]
    torch.set_rng_state(own["cpu"])
    if own["cuda"] is not None and device.type == "cuda":
        torch.cuda.set_rng_state(own["cuda"], device)


def epoch_seed(seed: int, epoch: int, rank: int = 0) -> int:
    """The seed of an epoch, different on each rank."""
    return (seed * 1_000_003 + epoch + rank * 2_000_000_000_003) % 2**63
