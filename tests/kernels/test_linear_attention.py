"""Linear attention against fp64: few tokens and many, heads of any size, where a merged projection left them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sfast.kernels import linear_attention
from tests.kernels.fp64 import assert_close_to_fp64

ops = torch.ops.sfast
dtypes = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)


def make(B: int, T: int, H: int, D: int, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    return list(torch.randn(B, T, 3 * H * D, device=device).to(dtype).chunk(3, -1))


@dtypes
@pytest.mark.parametrize(("B", "T", "H", "D"), [(2, 70, 3, 32), (1, 200, 2, 24), (2, 5, 1, 64)], ids=str)
def test_heads(B, T, H, D, dtype, device, runs_kernel) -> None:
    query, key, value = make(B, T, H, D, device, dtype)
    for sizes, others in (([H, -1], (key, value)), ([-1, D], (key[:, : T // 2 + 1], value[:, : T // 2 + 1]))):
        inputs = (query, *others, sizes, 1e-15)
        if runs_kernel:
            assert linear_attention._takes(*inputs)
        result = ops.linear_attention(*inputs)
        assert_close_to_fp64(result, linear_attention.linear_attention_reference, *inputs)


def test_several_pieces_are_summed(device, monkeypatch) -> None:
    monkeypatch.setattr(linear_attention, "MOST_PIECES", 3)
    inputs = (*make(1, 300, 2, 16, device, torch.float16), [2, -1], 1e-15)
    result = ops.linear_attention(*inputs)
    assert_close_to_fp64(result, linear_attention.linear_attention_reference, *inputs)


def test_a_query_that_asks_for_nothing_gets_nothing(device) -> None:
    query, key, value = make(1, 9, 2, 16, device, torch.float16)
    query = query.clone()
    query[0, 4, 16:] = -1  # no key can match it: 0 / (0 + eps)
    result = ops.linear_attention(query, key, value, [2, -1], 1e-15)
    assert not result[0, 4, 16:].any()
    assert result[0, 4, :16].all()


def test_what_is_left_to_the_reference(device) -> None:
    query, key, value = make(1, 9, 2, 16, device, torch.float16)
    half, sizes = (query, key, value), [2, -1]
    for inputs in (
        (*[x.float() for x in half], sizes),  # eager's products would be exact
        (*half, [3, -1]),
        (*half, [2, 4, 4]),
        (*[x.repeat(1, 1, 9) for x in half], sizes),  # wide heads
        (query, key, value[:, :5], sizes),
        (query[..., ::2], key[..., ::2], value[..., ::2], sizes),
    ):
        assert not linear_attention._takes(*inputs, 1e-15)
    inputs = (*[x.float() for x in half], sizes, 1e-15)
    assert torch.equal(ops.linear_attention(*inputs), linear_attention.linear_attention_reference(*inputs))


def test_fake_tensors(device, runs_kernel) -> None:
    inputs = (*make(2, 10, 3, 16, device, torch.float16), [3, -1], 1e-15)
    checks = (
        ("test_schema", "test_faketensor") if runs_kernel else ("test_schema",)
    )  # the reference's layout is eager's
    torch.library.opcheck(ops.linear_attention.default, inputs, test_utils=checks)
