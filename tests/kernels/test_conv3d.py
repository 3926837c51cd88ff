"""Convolution over frames: equal to the reference, handed to the native op as an image without a copy, or left alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sfast.kernels import conv3d
from tests.kernels.fp64 import assert_close_to_fp64

ops = torch.ops.sfast
GEOMETRIES = [
    ([1, 1, 1], [1, 0, 0], [1, 1, 1], 1),
    ([2, 1, 1], [1, 0, 0], [1, 1, 1], 2),
    ([1, 1, 1], [2, 0, 0], [2, 1, 1], 1),
    ([1, 1, 1], [0, 0, 0], [1, 1, 1], 1),
]


def make(name: str, geometry: tuple, dtype: torch.dtype, device: torch.device) -> tuple:
    x = torch.randn(2, 16, 6, 5, 3).to(device, dtype, memory_format=torch.channels_last_3d)
    weight = torch.randn(24, 16 // geometry[3], 3, 1, 1) / 7
    weight = weight.to(device, dtype, memory_format=torch.channels_last_3d)
    bias = torch.randn(24).to(device, dtype)
    if name == "conv3d_bias":
        return x, weight, bias, *geometry
    frames = conv3d._frames(x, weight, *geometry[:3])
    residual = torch.randn(2, 24, frames, 5, 3).to(device, dtype, memory_format=torch.channels_last_3d)
    return x, weight, bias, residual, *geometry


@pytest.mark.parametrize("name", ["conv3d_bias", "conv3d_add"])
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_conv3d(name, geometry, device) -> None:
    for dtype in (torch.float32, torch.bfloat16) if device.type == "cpu" else (torch.float16, torch.bfloat16):
        inputs = make(name, geometry, dtype, device)
        result = getattr(ops, name)(*inputs)
        assert_close_to_fp64(result, getattr(conv3d, f"{name}_reference"), *inputs)
        if device.type == "cuda":
            assert result.is_contiguous(memory_format=torch.channels_last_3d)


@pytest.mark.parametrize("name", ["conv3d_bias", "conv3d_add"])
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_an_image_of_frames_and_pixels_goes_to_the_native_op(name, geometry, monkeypatch) -> None:
    inputs = make(name, geometry, torch.float32, torch.device("cpu"))

    def native(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, *rest: object) -> Tensor:
        assert x.data_ptr() == inputs[0].data_ptr() and weight.data_ptr() == inputs[1].data_ptr()
        assert x.is_contiguous(memory_format=torch.channels_last)
        assert weight.is_contiguous(memory_format=torch.channels_last)
        *where, activation = rest
        assert activation == "none"
        y = torch.nn.functional.conv2d(x, weight, bias, *where)
        return y if residual is None else y + residual

    monkeypatch.setattr(conv3d, "native_conv2d_takes", lambda *tensors: True)
    monkeypatch.setattr(
        conv3d.torch.ops, "sfast_native", type("Ops", (), {"conv2d": staticmethod(native)}), raising=False
    )
    result = getattr(ops, name)(*inputs)
    assert_close_to_fp64(result, getattr(conv3d, f"{name}_reference"), *inputs)
    assert result.is_contiguous(memory_format=torch.channels_last_3d)


def test_other_convolutions_stay_with_the_reference(monkeypatch) -> None:
    monkeypatch.setattr(conv3d, "native_conv2d_takes", lambda *tensors: True)
    x, weight, bias, stride, padding, dilation, groups = make(
        "conv3d_bias", GEOMETRIES[0], torch.float32, torch.device("cpu")
    )
    wide = torch.randn(24, 16, 3, 3, 1)
    for inputs in [
        (x.contiguous(), weight, bias, stride, padding, dilation, groups),
        (x, weight, bias, [1, 2, 1], padding, dilation, groups),
        (x, weight, bias, stride, [1, 1, 0], dilation, groups),
        (x, wide, bias, stride, padding, dilation, groups),
    ]:
        assert torch.equal(ops.conv3d_bias(*inputs), conv3d.conv3d_bias_reference(*inputs))
    inputs = (x, weight, bias, torch.randn(24, 6, 5, 3), stride, padding, dilation, groups)
    assert torch.equal(ops.conv3d_add(*inputs), conv3d.conv3d_add_reference(*inputs))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last_3d], ids=str)
def test_filters_that_do_not_overlap_are_a_linear_layer_of_patches(layout, device, monkeypatch) -> None:
    products = []
    linear = conv3d.fastest_linear
    monkeypatch.setattr(conv3d, "fastest_linear", lambda *given: products.append(given[0].shape) or linear(*given))
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(2, 5, 4, 6, 10).to(device, dtype).transpose(3, 4).contiguous().transpose(3, 4)
        weight = (torch.randn(24, 5, 1, 2, 2) / 5).to(device, dtype, memory_format=layout)
        inputs = (x, weight, torch.randn(24).to(device, dtype), [1, 2, 2], [0, 0, 0], [1, 1, 1], 1)
        result = ops.conv3d_bias(*inputs)
        assert_close_to_fp64(result, conv3d.conv3d_bias_reference, *inputs)
        tokens = result.flatten(2).transpose(1, 2)
        assert tokens.is_contiguous() and tokens.data_ptr() == result.data_ptr()
        torch.library.opcheck(ops.conv3d_bias.default, inputs, test_utils=("test_schema", "test_faketensor"))
    assert set(products) == {(2, 4, 3, 5, 20)}


def test_filters_that_overlap_or_leave_something_out_are_no_linear_layer(device) -> None:
    x, bias = torch.randn(1, 4, 4, 6, 6, device=device), torch.randn(8, device=device)
    weight = torch.randn(8, 4, 1, 2, 2, device=device)
    place = ([1, 2, 2], [0, 0, 0], [1, 1, 1], 1)
    assert conv3d._takes_patches(x, weight, bias, *place)
    for others in (
        (x, weight, bias, [1, 1, 2], *place[1:]),
        (x, weight, bias, place[0], [0, 1, 0], *place[2:]),
        (x, weight, bias, *place[:2], [1, 2, 1], 1),
        (x[..., :5], weight, bias, *place),
        (x, weight[:, :2], bias, *place[:3], 2),
        (x, weight.transpose(0, 1), bias[:4], *place),
        (x.half(), weight, bias, *place),
    ):
        assert not conv3d._takes_patches(*others)
