"""Packed sequences: each is computed as if it were alone."""

from __future__ import annotations

import pytest
import torch
from flash_on_cpu import flash_on_cpu
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.models.vision_transformer import Block
from torch import nn

from zpipe.train.models import packing as packing_module
from zpipe.train.models.packing import (
    Packing,
    attend_flash,
    attend_padded,
    attend_runs,
    packing,
    rows_of,
    run_blocks,
)

torch.set_num_threads(1)


def packed_as(lengths: list[int]) -> Packing:
    return packing(torch.tensor(lengths, dtype=torch.int64), lengths)


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
    packed = run_blocks(body, torch.cat(sequences), packed_as(lengths))
    alone = torch.cat([body(sequence[None])[0] for sequence in sequences])
    torch.testing.assert_close(packed, alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("lengths", [[4], [4, 4, 4], [1, 3, 3, 7], [7, 1, 3]])
@pytest.mark.parametrize(("attend", "dtype"), [(attend_padded, torch.float64), (attend_flash, torch.bfloat16)])
def test_each_way_to_attend_is_the_same(lengths, attend, dtype):
    torch.manual_seed(0)
    qkv = torch.randn(sum(lengths), 3, 2, 8).to(dtype).requires_grad_()
    packed, weight = packed_as(lengths), torch.randn(sum(lengths), 2, 8).to(dtype)
    with flash_on_cpu():
        values = attend(qkv, packed)
        (gradients,) = torch.autograd.grad((values * weight).sum(), qkv)
    exact = qkv.detach().double().requires_grad_()
    runs = attend_runs(exact, packed)
    (of_runs,) = torch.autograd.grad((runs * weight).sum(), exact)
    rounding = {"atol": 0.02, "rtol": 0.02} if dtype == torch.bfloat16 else {"atol": 1e-12, "rtol": 1e-12}
    torch.testing.assert_close(values.double(), runs, **rounding)
    torch.testing.assert_close(gradients.double(), of_runs, **rounding)


@pytest.mark.parametrize(
    ("device", "dtype", "head_dim", "has_flash", "way"),
    [
        ("cpu", torch.float32, 64, False, attend_runs),
        ("cpu", torch.bfloat16, 64, False, attend_runs),
        ("cuda", torch.bfloat16, 64, True, attend_flash),
        ("cuda", torch.float16, 128, True, attend_flash),
        ("cuda", torch.float32, 64, True, attend_padded),
        ("cuda", torch.bfloat16, 20, True, attend_padded),
        ("cuda", torch.bfloat16, 192, True, attend_padded),
        ("cuda", torch.float16, 64, False, attend_padded),  # a card before Ampere
        ("mps", torch.bfloat16, 64, False, attend_padded),
    ],
)
def test_device_dtype_and_head_decide_how_to_attend(device, dtype, head_dim, has_flash, way):
    assert packing_module._attend_on(device, dtype, head_dim, has_flash) is way


def test_the_flash_operator_takes_these_arguments():
    names = [argument.name for argument in torch.ops.aten._flash_attention_forward.default._schema.arguments]
    assert names[3:10] == ["cum_seq_q", "cum_seq_k", "max_q", "max_k", "dropout_p", "is_causal", "return_debug_mask"]
    with torch.device("meta"):  # what compiling runs
        qkv, offsets = torch.empty(8, 3, 2, 16, dtype=torch.bfloat16), torch.empty(4, dtype=torch.int32)
    packed = packed_as([1, 3, 4])._replace(offsets=offsets)
    attended = attend_flash(qkv, packed)
    assert attended.shape == (8, 2, 16) and attended.dtype == torch.bfloat16


def test_gradients_are_those_of_the_sequences_alone():
    torch.manual_seed(0)
    body, lengths = blocks(), [2, 5, 5, 6]
    sequences = [torch.randn(length, 24) for length in lengths]
    run_blocks(body, torch.cat(sequences), packed_as(lengths)).square().sum().backward()
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
    out = run_blocks(body, tokens, packed_as(lengths)).unflatten(0, (400, 3))
    kinds = []  # not by unique values: a matrix product may round equal rows differently, by where they lie in it
    for row in out.flatten(1):
        if not any(torch.allclose(row, kind, atol=1e-4) for kind in kinds):
            kinds.append(row)
    assert len(kinds) == 4  # each of the two branches dropped, or kept and doubled
    kept = (out != tokens.unflatten(0, (400, 3))).flatten(1).any(1).float().mean()
    assert 0.65 < kept < 0.85  # 3 of 4: at least one branch kept
    body.eval()
    torch.testing.assert_close(
        run_blocks(body, tokens, packed_as(lengths)), body(tokens.view(400, 3, 24)).flatten(0, 1)
    )


@pytest.mark.parametrize("lengths", [[], [3, 0]])
def test_empty_sequences_are_refused(lengths):
    with pytest.raises(ValueError, match="at least one token"):
        packed_as(lengths)


@given(st.lists(st.integers(0, 5), min_size=1, max_size=8))
def test_rows_know_their_sequence_and_place(lengths):
    sequence, place = rows_of(torch.tensor(lengths), sum(lengths))
    expected = [(i, j) for i, length in enumerate(lengths) for j in range(length)]
    assert list(zip(sequence.tolist(), place.tolist(), strict=True)) == expected
