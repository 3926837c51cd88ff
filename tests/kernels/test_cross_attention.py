"""Cross-attention with its projections: short prompts and long ones against fp64, and that one key asks for no queries."""

from __future__ import annotations

import pytest
import torch

from sfast.kernels.cross_attention import cross_attention_reference
from tests.kernels.fp64 import assert_close_to_fp64

ops = torch.ops.sfast
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def make(keys: int, device: torch.device, dtype: torch.dtype) -> list:
    B, T, H, D, width = 3, 70, 5, 8, 40
    x, (key, value) = torch.randn(B, T, width), torch.randn(2, B, keys, H, D)
    query_weight, weight = torch.randn(H * D, width) / width**0.5, torch.randn(width, H * D) / 7
    floats = [
        x,
        query_weight,
        torch.randn(H * D),
        key.transpose(1, 2),
        value.transpose(1, 2),
        weight,
        torch.randn(width),
    ]
    x, query_weight, query_bias, key, value, weight, bias = (each.to(device, dtype) for each in floats)
    return [x, query_weight, query_bias, [B, -1, H, D], key, value, None, [B, -1, H * D], weight, bias]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("keys", [1, 2, 77])
def test_cross_attention(keys, dtype, device) -> None:
    inputs = make(keys, device, dtype)
    for absent in [(), (2,), (2, 9)]:
        arguments = [None if place in absent else value for place, value in enumerate(inputs)]
        result = ops.cross_attention(*arguments)
        assert_close_to_fp64(result, cross_attention_reference, *arguments)
    inputs[6] = 0.7
    assert_close_to_fp64(ops.cross_attention(*inputs), cross_attention_reference, *inputs)


def test_one_key_asks_for_no_queries(device) -> None:
    inputs = make(1, device, torch.float32)
    result = ops.cross_attention(*inputs)
    inputs[1] = torch.full_like(inputs[1], 1e30)  # scores that differ as much as may be
    assert torch.equal(ops.cross_attention(*inputs), result)


def test_a_result_in_another_shape_goes_the_usual_way(device) -> None:
    inputs = make(1, device, torch.float32)
    inputs[7] = [210, 1, 40]
    assert_close_to_fp64(ops.cross_attention(*inputs), cross_attention_reference, *inputs)
