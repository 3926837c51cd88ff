"""Tokens in the order of places, normalized: against fp64 in odd sizes, and what is left to the reference."""

from __future__ import annotations

import pytest
import torch

from sfast.kernels import transpose_layer_norm
from tests.kernels.fp64 import assert_close_to_fp64

ops = torch.ops.sfast
ADD, SHIFT = "add_shift_transpose_layer_norm", "shift_transpose_layer_norm"


def make(sizes: tuple[int, int, int, int], device: torch.device, dtype: torch.dtype) -> tuple:
    B, frames, L, C = sizes
    x, residual = torch.randn(2, B * frames, L, C).to(device, dtype)
    shift, (weight, bias) = torch.randn(B * frames, 1, C).to(device, dtype), torch.randn(2, C).to(device, dtype)
    return x, residual, shift, [B, frames, L, C], [B * L, frames, C], [C], weight, bias, 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sizes", [(2, 3, 35, 40), (1, 14, 9, 66), (3, 1, 1, 8), (1, 2, 3, 320)], ids=str)
def test_turned_and_normalized(sizes, dtype, device, runs_kernel) -> None:
    inputs = make(sizes, device, dtype)
    if runs_kernel:
        assert transpose_layer_norm._takes_sum(*inputs)
    results = ops.add_shift_transpose_layer_norm(*inputs)
    assert len(results) == 3
    for part, result in enumerate(results):
        reference = transpose_layer_norm.add_shift_transpose_layer_norm_reference
        assert_close_to_fp64(result, reference, *inputs, part=part)
    without = (inputs[0], *inputs[2:])
    for part, result in enumerate(ops.shift_transpose_layer_norm(*without)):
        reference = transpose_layer_norm.shift_transpose_layer_norm_reference
        assert_close_to_fp64(result, reference, *without, part=part)


def test_without_weight_or_bias_and_in_other_layouts(device) -> None:
    _, residual, shift, *rest, weight, bias, eps = make((2, 3, 5, 12), device, torch.float32)
    scattered = torch.randn(6, 5, 24, device=device)[..., ::2]
    for parameters in [(None, None), (weight, None), (None, bias)]:
        inputs = (scattered, residual.mT.contiguous().mT, shift.expand(6, 1, 12), *rest, *parameters, eps)
        reference = transpose_layer_norm.add_shift_transpose_layer_norm_reference
        for part, result in enumerate(ops.add_shift_transpose_layer_norm(*inputs)):
            assert_close_to_fp64(result, reference, *inputs, part=part)


def test_what_is_left_to_the_reference(device) -> None:
    x, residual, shift, grid, shape, *rest = make((2, 3, 5, 12), device, torch.float32)
    for inputs in [
        (x, shift[..., :1], grid, shape, *rest),
        (x, shift, [2, 5, 3, 12], [6, 5, 12], *rest),
        (x, torch.randn(6, 5, 12, device=device), grid, shape, *rest),
    ]:
        assert not transpose_layer_norm._takes(*inputs)
        reference = transpose_layer_norm.shift_transpose_layer_norm_reference(*inputs)
        for result, wanted in zip(ops.shift_transpose_layer_norm(*inputs), reference, strict=True):
            assert torch.equal(result, wanted)
    assert not transpose_layer_norm._takes_sum(x, residual[:1], shift, grid, shape, *rest)
