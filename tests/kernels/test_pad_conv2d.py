"""Unequal padding: the operator equals its reference, and each side's number reaches the native op in its place."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sfast import fallback
from sfast.kernels import pad_conv2d
from tests.kernels.fp64 import assert_close_to_fp64

ops = torch.ops.sfast
PADS = [[0, 1, 0, 1], [2, 0, 1, 3], [0, 0, 0, 0], [1, 1, 1, 1]]


def make(pad: list[int], dtype: torch.dtype, device: torch.device) -> tuple:
    x = torch.randn(2, 16, 12, 9).to(device, dtype, memory_format=torch.channels_last)
    weight = (torch.randn(24, 16, 3, 3) / 12).to(device, dtype, memory_format=torch.channels_last)
    return x, pad, weight, torch.randn(24).to(device, dtype), [2, 2], [1, 1], 1


@pytest.mark.parametrize("pad", PADS, ids=str)
def test_pad_conv2d(pad, device) -> None:
    for dtype in (torch.float32, torch.bfloat16) if device.type == "cpu" else (torch.float16, torch.bfloat16):
        inputs = make(pad, dtype, device)
        result = ops.pad_conv2d(*inputs)
        assert_close_to_fp64(result, pad_conv2d.pad_conv2d_reference, *inputs)
        assert result.is_contiguous(memory_format=torch.channels_last)


def test_cropping_is_left_to_the_reference(device) -> None:
    inputs = make([-1, 2, 0, 1], torch.float32, device)
    assert not pad_conv2d._takes(*inputs)
    assert torch.equal(ops.pad_conv2d(*inputs), pad_conv2d.pad_conv2d_reference(*inputs))


@pytest.mark.parametrize("works", [True, False])
def test_each_side_reaches_the_native_op(works, monkeypatch, falls_back) -> None:
    def native(x: Tensor, weight: Tensor, bias: Tensor, residual: None, stride: list[int], sides: list[int], *rest):
        if not works:
            raise RuntimeError("sfast_native::conv2d: no kernel")
        top, left, bottom, right = sides
        assert rest == ([1, 1], 1, "none")
        return F.conv2d(F.pad(x, (left, right, top, bottom)), weight, bias, stride)

    monkeypatch.setattr(pad_conv2d, "native_conv2d_takes", lambda *tensors: True)
    fake = type("Ops", (), {"conv2d": staticmethod(native)})
    monkeypatch.setattr(pad_conv2d.torch.ops, "sfast_native", fake, raising=False)
    inputs = make([2, 0, 1, 3], torch.float32, torch.device("cpu"))
    torch.testing.assert_close(ops.pad_conv2d(*inputs), pad_conv2d.pad_conv2d_reference(*inputs))
    assert bool(fallback.noted()) is not works


def test_fake_tensors(device) -> None:
    inputs = make(PADS[1], torch.float32, device)
    torch.library.opcheck(ops.pad_conv2d.default, inputs, test_utils=("test_schema", "test_faketensor"))
