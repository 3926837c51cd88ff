"""Concatenation of channels: equal to PyTorch's, in its layout, and left to it where that could differ."""

from __future__ import annotations

import pytest
import torch

from sfast.kernels import cat_channels

ops = torch.ops.sfast


def make(shape: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(shape).movedim(1, -1).contiguous().movedim(-1, 1).to(device, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(("A", "B"), [(64, 64), (128, 32), (5, 70), (1, 3), (320, 16)], ids=str)
@pytest.mark.parametrize("size", [(5, 7), (3, 4, 5), (9, 11)], ids=str)
def test_side_by_side(size, A, B, dtype, device, runs_kernel) -> None:
    a, b = make((2, A, *size), device, dtype), make((2, B, *size), device, dtype)
    if runs_kernel and A > 1:
        assert cat_channels._takes(a, b)
    result, expected = ops.cat_channels(a, b), torch.cat([a, b], 1)
    assert torch.equal(result, expected)
    assert result.stride() == expected.stride()


def test_what_is_left_to_the_reference(device) -> None:
    x = make((2, 8, 5, 7), device, torch.float32)
    plain = x.contiguous()
    others = [(plain, plain), (x, plain), (x, x.half()), (x[:, ::2], x), (x[:, :, :1, :1], x[:, :, :1, :1])]
    for a, b in [*others, (x, x[:, :0]), (x[:, :1].contiguous(), x)]:
        assert not cat_channels._takes(a, b)
        result, expected = ops.cat_channels(a, b), torch.cat([a, b], 1)
        assert torch.equal(result, expected) and result.stride() == expected.stride()
    with pytest.raises(RuntimeError):
        ops.cat_channels(x, x[:, :, :2])


def test_fake_tensors(device) -> None:
    inputs = (make((2, 24, 5, 3), device, torch.float32), make((2, 8, 5, 3), device, torch.float32))
    torch.library.opcheck(ops.cat_channels.default, inputs, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.gpu
@pytest.mark.parametrize(
    "shape", [(2, 320, 320, 128), (2, 1280, 640, 32), (28, 1280, 1280, 9), (3, 40, 24, 33)], ids=str
)
def test_at_the_sizes_of_a_pipeline(shape) -> None:
    N, A, B, H = shape
    a, b = (make((N, C, H, H), torch.device("cuda", 0), torch.float16) for C in (A, B))
    assert torch.equal(ops.cat_channels(a, b), torch.cat([a, b], 1))
