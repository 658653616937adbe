"""How the loop runs a model: laid out for its device, compiled, and shared between the ranks."""

from __future__ import annotations

import importlib.util
import os
import shutil
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from timm.layers import convert_sync_batchnorm
from torch import nn

from zpipe.schemas.errors import ZpipeError, last_line
from zpipe.train.data.loader import RelevanceLoader
from zpipe.train.device import keep_freed_memory
from zpipe.train.fit.task import Batch, Task
from zpipe.train.models.backbone import compiled, has_blocks_to_compile
from zpipe.train.ranks import ranks

MIN_TRITON_CAPABILITY = (7, 0)

Context = Callable[[], AbstractContextManager[Any]]


def lay_out(model: nn.Module, device: torch.device) -> None:
    """Prepare a model, in place, and the process for training on a device.

    On CUDA, the weights of convolutions that follow each other lie with their channels last, as cuDNN's kernels in half
    precision want them, and BatchNorm takes its statistics over all ranks.
    """
    if device.type == "cpu":
        keep_freed_memory()
        return
    if device.index is not None:
        torch.cuda.set_device(device)  # the default of all code that names no device
    channels_last(model)
    if not ranks().alone:
        convert_sync_batchnorm(model)  # in place


def channels_last(model: nn.Module) -> None:
    """Store the kernels of a model's convolutions with their channels last, if it has more than one convolution.

    A ViT's only convolution embeds patches, and may serve as a matrix.
    """
    convolutions = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    for convolution in convolutions if len(convolutions) > 1 else ():
        convolution.to(memory_format=torch.channels_last)


def wrap(task: Task, batch: Batch, context: Context, *, compile: bool | None) -> None:
    """Make `task.call` the model as the loop runs it: compiled, and averaging the gradients over the ranks.

    If it is either, steps that leave no trace are taken on `batch`: one shows whether the model can be compiled, and
    whether all of its parameters get gradients; and one lets the ranks agree in which order they send gradients, so
    that a resumed run sums them as an undisturbed one does.

    Args:
        task: The model and its loss.
        batch: A batch of the size of this rank's.
        context: Makes the context of a forward pass.
        compile: As `TrainConfig.compile`.

    Raises:
        ZpipeError: If `compile` is True and the model can't be compiled.
    """
    group = ranks()
    model = task.call = task.model
    wanted = all(group.gather(compiles_by_default(model))) if compile is None else compile  # the machines may differ
    if wanted:
        model = _compiled_if_possible(task, batch, context, required=compile is not None)
    if group.alone:
        return
    complete = all(group.gather(_rehearse(task, batch, context)))
    task.call = group.share(model, unused_parameters=not complete)
    _rehearse(task, batch, context)


def compiles_by_default(model: nn.Module) -> bool:
    """Whether a model is compiled if the settings don't say: block by block, on a CUDA device with Triton.

    Triton builds its launchers with a C compiler.
    """
    device = next(model.parameters()).device
    if device.type != "cuda" or importlib.util.find_spec("triton") is None or not has_blocks_to_compile(model):
        return False
    if not any(map(shutil.which, (os.environ.get("CC", ""), "gcc", "clang"))):
        return False
    return torch.cuda.get_device_capability(device) >= MIN_TRITON_CAPABILITY


def _compiled_if_possible(task: Task, batch: Batch, context: Context, *, required: bool) -> nn.Module:
    """The compiled model, or the model as it is where that fails on any rank; `task.call` is the same."""
    from torch._dynamo.exc import TorchDynamoException  # torch has no public name for it

    problem = ""
    task.call = compiled(task.model.train())
    try:
        _rehearse(task, batch, context)
    except TorchDynamoException as error:
        problem = last_line(error)[:200]
    group = ranks()
    problems = [each for each in group.gather(problem) if each]
    if not problems:
        return task.call
    if required:
        raise ZpipeError(f"train.compile: the model can't be compiled ({problems[0]}); set train.compile=false")
    if group.first:
        warnings.warn(f"the model can't be compiled ({problems[0]}), and is trained uncompiled", stacklevel=2)
    task.call = task.model
    return task.model


def _rehearse(task: Task, batch: Batch, context: Context) -> bool:
    """Take a step without its update, and leave the model as it was; return whether all parameters got a gradient.

    The random numbers that it draws don't matter, because every epoch seeds all generators, or restores them.
    """
    model = task.model.train()
    kept = [buffer.clone() for buffer in model.buffers()]  # such as the statistics of BatchNorm
    try:
        with context():
            loss, _ = task.loss(batch)
        loss.backward()
        return all(each.grad is not None for each in model.parameters() if each.requires_grad)
    finally:
        model.zero_grad(set_to_none=True)
        with torch.no_grad():
            for buffer, value in zip(model.buffers(), kept, strict=True):
                buffer.copy_(value)


def stand_in(loader: RelevanceLoader, count: int) -> Batch:
    """A batch of `count` black images, with uniform maps if the loader has maps."""
    side = loader.image_size
    batch: Batch = {"image": torch.zeros(count, 3, side, side, dtype=torch.uint8), "key": [""] * count}
    batch["label"] = torch.zeros(count, dtype=torch.int64)
    if loader.maps is not None:
        batch["relevance"] = torch.ones(count, *loader.maps.manifest.provenance.grid)
    return batch
