"""Kept weights and compiled functions of a block give the maps of plain `attribute`."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from tiny_vit import pixels, tiny_vit
from torch._dynamo.utils import counters

from zpipe.pipeline.prepared import SWEEPS, Prepared
from zpipe.pipeline.relevance import SPLITS, attribute

pytestmark = pytest.mark.usefixtures("one_thread")

TESTS = Path(__file__).parents[1]
SHAPES = ({}, {"init_values": 0.1, "reg_tokens": 2}, {"qkv_bias": False, "proj_bias": False}, {"depth": 1})


def best_three(logits):
    return logits.topk(3).indices


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kwargs", SHAPES, ids=str)
def test_maps_by_kept_weights_are_the_same(kwargs, dtype):
    model = tiny_vit(dtype=dtype, **kwargs)
    images, targets = pixels(model)
    for sweep in (name for name in SWEEPS if name != "tf32"):
        prepared = Prepared(model, sweep, keep=True)
        for split in SPLITS:
            for asked in (targets, best_three):
                expected = attribute(model, images, asked, sweep=sweep, split=split)
                found = attribute(model, images, asked, split=split, prepared=prepared)
                assert torch.equal(found.maps, expected.maps) and torch.equal(found.logits, expected.logits)


def test_what_is_kept_are_two_copies_in_the_precision_of_products():
    model = tiny_vit(dtype=torch.float32, init_values=0.1)
    exact, rounded = Prepared(model, keep=True), Prepared(model, "bfloat16", keep=True)
    qkv = model.blocks[1].attn.qkv.weight
    assert exact.down(1).qkv.weight.data_ptr() == qkv.data_ptr()  # the model's own
    assert torch.equal(exact.down(1).qkv.magnitude, qkv.abs())
    assert exact.down(1).fc2.weight is exact.down(1).fc2.weight  # merged with its LayerScale once
    assert rounded.down(1).qkv.weight.dtype == rounded.down(1).qkv.magnitude.dtype == torch.bfloat16
    assert rounded.forward(1).qkv.weight.dtype == rounded.down(1).qkv.bias.dtype == torch.float32
    other = tiny_vit(dtype=torch.float32)
    with pytest.raises(ValueError, match="another model"):
        attribute(other, *pixels(other), prepared=exact)


def test_each_kind_of_block_is_one_graph():
    """Of the forward pass ordinary blocks and the last one; of the sweep also the lowest one, which ends early."""
    torch._dynamo.reset()
    counters.clear()
    model = tiny_vit(dtype=torch.float32, depth=4, init_values=0.1)
    images, targets = pixels(model)
    prepared = Prepared(model, "bfloat16", keep=True, compiler="eager")
    expected = attribute(model, images, targets, sweep="bfloat16").maps
    for _ in range(3):
        assert torch.equal(attribute(model, images, targets, prepared=prepared).maps, expected)
    attribute(model, images.flip(-1), best_three, prepared=prepared)
    assert counters["stats"]["unique_graphs"] == 5 and not counters["graph_break"] and not prepared.notes
    assert torch.equal(attribute(model, images[:2], targets[:2], prepared=prepared).maps, expected[:2])
    assert counters["stats"]["unique_graphs"] == 10 and not prepared.notes  # another size of batch
    torch._dynamo.reset()


def broken(graph, inputs):
    raise ImportError("no compiler\nat all")


def short_of_memory(graph, inputs):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")


def test_what_cannot_be_compiled_is_called_as_it_is():
    model = tiny_vit(dtype=torch.float32)
    images, targets = pixels(model)
    notes = []
    prepared = Prepared(model, keep=True, compiler=broken, notes=notes)
    for _ in range(2):
        assert torch.equal(
            attribute(model, images, targets, prepared=prepared).maps, attribute(model, images, targets).maps
        )
    (note,) = notes
    assert note.startswith("kernels can't be fused, so that maps take longer: ") and "no compiler at all" in note
    torch._dynamo.reset()


def test_a_shortage_of_memory_is_no_reason_to_compile_nothing():
    model = tiny_vit(dtype=torch.float32)
    prepared = Prepared(model, keep=True, compiler=short_of_memory)
    with pytest.raises(RuntimeError, match="out of memory"):
        attribute(model, *pixels(model), prepared=prepared)
    assert prepared.compiler is not None and not prepared.notes
    torch._dynamo.reset()


MAPS = """
    import sys

    import torch
    from tiny_vit import pixels, tiny_vit

    from zpipe.pipeline.prepared import Prepared
    from zpipe.pipeline.relevance import attribute

    torch.set_num_threads(1)
    dtype, sweep, split = getattr(torch, sys.argv[1]), *sys.argv[2:4]
    model = tiny_vit(dtype=dtype, init_values=0.1, depth=3)
    images, targets = pixels(model)
    prepared = Prepared(model, sweep, keep=True, compiler="inductor")
    expected = attribute(model, images, targets, sweep=sweep, split=split).maps
    found = attribute(model, images, targets, split=split, prepared=prepared).maps
    print(((found - expected).abs().amax((1, 2)) / expected.abs().amax((1, 2))).max().item())
    print(*prepared.notes, sep="\\n")
"""


def compiled_by_inductor(tmp_path, *settings, **environment):
    """The largest difference of a map, relative to its largest value, and the notes; of an own process."""
    own = {"PYTHONPATH": str(TESTS), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    command = [sys.executable, "-c", textwrap.dedent(MAPS), *settings]
    done = subprocess.run(command, env=os.environ | own | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    difference, *notes = done.stdout.split("\n")
    return float(difference), [note for note in notes if note]


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize(("dtype", "sweep"), [("float64", "model"), ("float64", "float32"), ("float32", "bfloat16")])
def test_maps_by_inductor_are_the_same(tmp_path, dtype, sweep, split):
    difference, notes = compiled_by_inductor(tmp_path, dtype, sweep, split)
    # The division by numbers near zero enlarges the rounding of a forward pass in float32.
    assert difference <= {"model": 1e-9, "float32": 1e-3, "bfloat16": 0.05}[sweep] and not notes


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_without_a_compiler_maps_are_computed_all_the_same(tmp_path):
    difference, notes = compiled_by_inductor(tmp_path, "float32", "model", "sum", CXX="/no/compiler", CC="/no/compiler")
    assert difference == 0
    assert len(notes) == 1 and notes[0].startswith("kernels can't be fused, so that maps take longer: ")
