"""Nearest upsampling: equal to PyTorch's bit for bit, in both layouts, by factors and to sizes."""

from __future__ import annotations

import pytest
import torch

from sfast.kernels import upsample

ops = torch.ops.sfast
LAYOUTS = [torch.channels_last, torch.contiguous_format]


def make(shape: tuple[int, ...], device: torch.device, dtype: torch.dtype, layout: torch.memory_format) -> torch.Tensor:
    return torch.randn(shape).to(device, dtype, memory_format=layout)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("factors", [[2.0, 2.0], [3.0, 1.0], [1.5, 0.75]], ids=str)
def test_by_factors(factors, dtype, layout, device, runs_kernel) -> None:
    for shape in [(2, 20, 3, 5), (1, 3, 5, 33), (1, 136 if layout == torch.channels_last else 9, 4, 3)]:
        x = make(shape, device, dtype, layout)
        if runs_kernel:
            assert upsample._takes(x, None, factors)
        result = ops.upsample_nearest2d(x, None, factors)
        assert torch.equal(result, upsample.upsample_nearest2d_reference(x, None, factors))
        assert result.is_contiguous(memory_format=layout)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("size", [[14, 18], [13, 19], [7, 9], [3, 300], [1, 1]], ids=str)
def test_to_a_size(size, layout, device, runs_kernel) -> None:
    x = make((2, 12, 7, 9), device, torch.float16, layout)
    if runs_kernel:
        assert upsample._takes(x, size, None)
    assert torch.equal(ops.upsample_nearest2d(x, size, None), upsample.upsample_nearest2d_reference(x, size, None))


def test_what_is_left_to_the_reference(device) -> None:
    x = make((2, 8, 6, 5), device, torch.float32, torch.channels_last)
    for other in (x[:, ::2], x.double(), x[:, :, :0], x.expand(2, 8, 6, 5)[:, :, ::2]):
        assert not upsample._takes(other, None, [2.0, 2.0])
    assert torch.equal(
        ops.upsample_nearest2d(x[:, ::2], None, [2.0, 2.0]),
        upsample.upsample_nearest2d_reference(x[:, ::2], None, [2.0, 2.0]),
    )
    with pytest.raises(RuntimeError):
        ops.upsample_nearest2d(x, [3, 3], [2.0, 2.0])


def test_nan_and_inf_pass_through(device) -> None:
    x = make((1, 8, 3, 3), device, torch.float32, torch.channels_last)
    x[0, 1, 1, 1], x[0, 2, 0, 2] = float("nan"), float("inf")
    result = ops.upsample_nearest2d(x, None, [2.0, 2.0])
    torch.testing.assert_close(
        result, upsample.upsample_nearest2d_reference(x, None, [2.0, 2.0]), rtol=0, atol=0, equal_nan=True
    )


def test_fake_tensors(device) -> None:
    for layout in LAYOUTS:
        inputs = (make((2, 24, 5, 3), device, torch.float32, layout), None, [2.0, 2.0])
        torch.library.opcheck(ops.upsample_nearest2d.default, inputs, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(1, 256, 256, 256), (2, 1280, 8, 8), (2, 640, 64, 64), (3, 320, 33, 17)], ids=str)
def test_at_the_sizes_of_a_pipeline(shape) -> None:
    x = make(shape, torch.device("cuda", 0), torch.float16, torch.channels_last)
    for inputs in [(x, None, [2.0, 2.0]), (x, [2 * shape[2] - 1, 2 * shape[3] + 3], None), (x, None, [1.7, 2.3])]:
        assert torch.equal(ops.upsample_nearest2d(*inputs), upsample.upsample_nearest2d_reference(*inputs))
