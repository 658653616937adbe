"""Packed sequences: each is computed as if it were alone."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.models.vision_transformer import Block
from torch import nn

from zpipe.train.models.packing import attend_jagged, attend_runs, packing, rows_of, run_blocks

torch.set_num_threads(1)
CPU = torch.device("cpu")


def blocks(depth: int = 2, **kwargs) -> nn.Sequential:
    torch.manual_seed(0)
    made = nn.Sequential(*(Block(24, 3, qkv_bias=True, init_values=0.5, **kwargs) for _ in range(depth)))
    with torch.no_grad():
        for p in made.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return made


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=8), st.integers(0, 99))
def test_each_sequence_as_if_alone(lengths, seed):
    torch.manual_seed(seed)
    body = blocks().eval()
    sequences = [torch.randn(length, 24) for length in lengths]
    packed = run_blocks(body, torch.cat(sequences), packing(lengths, CPU))
    alone = torch.cat([body(sequence[None])[0] for sequence in sequences])
    torch.testing.assert_close(packed, alone, atol=1e-5, rtol=1e-5)


@pytest.mark.filterwarnings("ignore:.*nested tensors:UserWarning")
@pytest.mark.parametrize("lengths", [[4], [4, 4, 4], [1, 3, 3, 7]])
def test_one_call_on_a_nested_tensor_is_the_same(lengths):
    torch.manual_seed(0)
    qkv = torch.randn(sum(lengths), 3, 2, 8, requires_grad=True)
    packed = packing(lengths, CPU)
    runs, jagged = attend_runs(qkv, packed), attend_jagged(qkv, packed)
    torch.testing.assert_close(jagged, runs, atol=1e-5, rtol=1e-5)
    weight = torch.randn_like(runs)
    gradients = [torch.autograd.grad((out * weight).sum(), qkv)[0] for out in (runs, jagged)]
    torch.testing.assert_close(*gradients, atol=1e-5, rtol=1e-5)


def test_gradients_are_those_of_the_sequences_alone():
    torch.manual_seed(0)
    body, lengths = blocks(), [2, 5, 5, 6]
    sequences = [torch.randn(length, 24) for length in lengths]
    run_blocks(body, torch.cat(sequences), packing(lengths, CPU)).square().sum().backward()
    packed = [p.grad.clone() for p in body.parameters()]
    body.zero_grad()
    sum(body(sequence[None]).square().sum() for sequence in sequences).backward()
    for mine, alone in zip(packed, body.parameters(), strict=True):
        torch.testing.assert_close(mine, alone.grad, atol=1e-3, rtol=1e-4)


def test_stochastic_depth_drops_whole_sequences():
    torch.manual_seed(0)
    body = blocks(1, drop_path=0.5).train()
    lengths = [3] * 400
    tokens = torch.randn(1, 3, 24).expand(400, -1, -1).flatten(0, 1)
    out = run_blocks(body, tokens, packing(lengths, CPU)).unflatten(0, (400, 3))
    kinds = []  # not by unique values: a matrix product may round equal rows differently, by where they lie in it
    for row in out.flatten(1):
        if not any(torch.allclose(row, kind, atol=1e-4) for kind in kinds):
            kinds.append(row)
    assert len(kinds) == 4  # each of the two branches dropped, or kept and doubled
    kept = (out != tokens.unflatten(0, (400, 3))).flatten(1).any(1).float().mean()
    assert 0.65 < kept < 0.85  # 3 of 4: at least one branch kept
    body.eval()
    torch.testing.assert_close(
        run_blocks(body, tokens, packing(lengths, CPU)), body(tokens.view(400, 3, 24)).flatten(0, 1)
    )


@pytest.mark.parametrize("lengths", [[], [3, 0]])
def test_empty_sequences_are_refused(lengths):
    with pytest.raises(ValueError, match="at least one token"):
        packing(lengths, CPU)


@given(st.lists(st.integers(0, 5), min_size=1, max_size=8))
def test_rows_know_their_sequence_and_place(lengths):
    sequence, place = rows_of(torch.tensor(lengths), sum(lengths))
    expected = [(i, j) for i, length in enumerate(lengths) for j in range(length)]
    assert list(zip(sequence.tolist(), place.tolist(), strict=True)) == expected
