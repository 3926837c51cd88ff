"""Convolution with what follows it: the operators equal their references, and only fitting inputs go to the native op."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sfast.kernels import conv2d
from tests.kernels.fp64 import assert_close_to_fp64

ops = torch.ops.sfast
NAMES = ["conv2d_bias", "conv2d_add", "conv2d_silu", "conv2d_relu", "conv2d_add_silu", "conv2d_add_relu"]
GEOMETRIES = [
    ([1, 1], [1, 1], [1, 1], 1),
    ([2, 2], [1, 1], [1, 1], 1),
    ([1, 1], [2, 2], [2, 2], 1),
    ([1, 2], [0, 1], [1, 1], 2),
]


def make(name: str, geometry: tuple, dtype: torch.dtype, device: torch.device) -> tuple:
    stride, padding, dilation, groups = geometry
    x = torch.randn(2, 16, 11, 9).to(device, dtype, memory_format=torch.channels_last)
    weight = (torch.randn(24, 16 // groups, 3, 3) / 10).to(device, dtype, memory_format=torch.channels_last)
    bias = torch.randn(24).to(device, dtype)
    if not name.startswith("conv2d_add"):
        return x, weight, bias, *geometry
    shape = conv2d._output_shape(x, weight, stride, padding, dilation)
    residual = torch.randn(shape).to(device, dtype, memory_format=torch.channels_last)
    return x, weight, bias, residual, *geometry


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_conv2d(name, geometry, device) -> None:
    reference = getattr(conv2d, f"{name}_reference")
    for dtype in (torch.float32, torch.bfloat16) if device.type == "cpu" else (torch.float16, torch.bfloat16):
        inputs = make(name, geometry, dtype, device)
        result = getattr(ops, name)(*inputs)
        assert_close_to_fp64(result, reference, *inputs)
        assert result.is_contiguous(memory_format=torch.channels_last)


def test_a_residual_that_broadcasts_is_left_to_the_reference(device) -> None:
    inputs = list(make("conv2d_add", GEOMETRIES[0], torch.bfloat16, device))
    inputs[3] = inputs[3][:, :, :1, :1]
    assert torch.equal(ops.conv2d_add(*inputs), conv2d.conv2d_add_reference(*inputs))


def test_output_shape(device) -> None:
    for geometry in GEOMETRIES:
        x, weight, bias, *_ = make("conv2d_silu", geometry, torch.float32, device)
        expected = conv2d.conv2d_silu_reference(x, weight, bias, *geometry).shape
        assert conv2d._output_shape(x, weight, *geometry[:3]) == list(expected)


@pytest.mark.parametrize("name", NAMES)
def test_fitting_inputs_go_to_the_native_op(name, monkeypatch) -> None:
    seen = []

    def native(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, *rest: object) -> Tensor:
        seen.append((residual is not None, rest))
        return torch.zeros(2, 24, 11, 9, dtype=x.dtype)

    monkeypatch.setattr(conv2d, "native_conv2d_takes", lambda *tensors: True)
    monkeypatch.setattr(
        conv2d.torch.ops, "sfast_native", type("Ops", (), {"conv2d": staticmethod(native)}), raising=False
    )
    inputs = make(name, GEOMETRIES[0], torch.float16, torch.device("cpu"))
    assert not getattr(ops, name)(*inputs).any()
    activation = name.rpartition("_")[2] if name.endswith("lu") else "none"
    assert seen == [("add" in name, ([1, 1], [1, 1], [1, 1], 1, activation))]


def test_fake_tensors(device) -> None:
    for name in NAMES:
        inputs = make(name, GEOMETRIES[1], torch.float32, device)
        torch.library.opcheck(getattr(ops, name).default, inputs, test_utils=("test_schema", "test_faketensor"))
