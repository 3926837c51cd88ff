"""Blending against fp64: videos and tokens, odd sizes, alphas of every breadth, and what is left to the reference."""

from __future__ import annotations

import pytest
import torch

from sfast.kernels import blend
from tests.kernels.fp64 import assert_close_to_fp64

ops = torch.ops.sfast
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def video(shape: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(shape).to(device, dtype, memory_format=torch.channels_last_3d)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["blend", "blend_add"])
@pytest.mark.parametrize("alpha_shape", [(2, 1, 3, 1, 1), (1, 1, 3, 1, 1), (2, 1, 1, 1, 1), (1,), ()], ids=str)
def test_videos(alpha_shape, name, dtype, device, runs_kernel) -> None:
    for C in (8, 70):
        inputs = (*(video((2, C, 3, 5, 7), device, dtype) for _ in range(2)), torch.rand(alpha_shape).to(device, dtype))
        if runs_kernel:
            assert blend._takes(*inputs)
        result = getattr(ops, name)(*inputs)
        assert_close_to_fp64(result, getattr(blend, f"{name}_reference"), *inputs)
        assert result.is_contiguous(memory_format=torch.channels_last_3d)


@pytest.mark.parametrize("name", ["blend", "blend_add"])
@pytest.mark.parametrize("alpha_shape", [(6, 1, 1), (1, 1, 1), (1,)], ids=str)
def test_tokens(alpha_shape, name, device) -> None:
    x, y = torch.randn(2, 6, 33, 20, device=device)
    inputs = (x, y, torch.rand(alpha_shape, device=device))
    assert_close_to_fp64(getattr(ops, name)(*inputs), getattr(blend, f"{name}_reference"), *inputs)


def test_operands_in_other_layouts(device) -> None:
    x = video((2, 8, 3, 5, 7), device, torch.float32)
    y = torch.randn(2, 8, 3, 5, 14, device=device)
    alpha = torch.rand(2, 1, 6, 1, 1, device=device)[:, :, ::2]
    for first, second in [
        (x, y[..., ::2]),
        (x, y[..., :7].contiguous()),
        (y[..., ::2], x),
        (y[..., :7].contiguous(), x),
    ]:
        assert_close_to_fp64(ops.blend(first, second, alpha), blend.blend_reference, first, second, alpha)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", [(2, 3, 35, 40), (1, 14, 9, 66), (3, 1, 1, 8)], ids=str)
def test_transposed(sizes, dtype, device, runs_kernel) -> None:
    B, frames, L, C = sizes
    x = torch.randn(B * frames, L, C).to(device, dtype)
    y, residual = torch.randn(2, B * L, frames, C).to(device, dtype)
    grid, shape = [B, L, frames, C], [B * frames, L, C]
    for alpha in (torch.rand(B * frames, 1, 1).to(device, dtype), torch.rand(1).to(device, dtype)):
        inputs = (x, y, alpha, grid, shape)
        if runs_kernel:
            assert blend._takes_transposed(*inputs)
        assert_close_to_fp64(ops.blend_transposed(*inputs), blend.blend_transposed_reference, *inputs)
        inputs = (x, y, residual, alpha, grid, shape)
        assert_close_to_fp64(ops.blend_transposed_add(*inputs), blend.blend_transposed_add_reference, *inputs)


def test_what_is_left_to_the_reference(device) -> None:
    x, y = torch.randn(2, 6, 5, 8, device=device)
    by_place, by_channel = torch.rand(6, 5, 1, device=device), torch.rand(8, device=device)
    for inputs in [(x, y, by_place), (x, y, by_channel), (x, y[:1], by_place[:, :1]), (x, y, by_place[:, :1].double())]:
        assert not blend._takes(*inputs)
        assert torch.equal(ops.blend(*inputs), blend.blend_reference(*inputs))
    wrong = (x, y, by_place[:, :1], [2, 5, 3, 8], [2, 15, 8])
    assert not blend._takes_transposed(*wrong)
    empty = torch.randn(0, 5, 8, device=device)
    assert ops.blend(empty, empty, by_channel[:1]).shape == (0, 5, 8)
