"""Depthwise convolutions and their gates against fp64: filters, strides and borders, and a measured choice that holds."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from sfast.kernels import choice, conv2d, conv2d_depthwise
from tests.kernels.fp64 import assert_close_to_fp64

ops = torch.ops.sfast
GEOMETRIES = [  # filter, stride, padding, dilation
    ((3, 3), [1, 1], [1, 1], [1, 1]),
    ((3, 3), [1, 1], [0, 2], [1, 1]),
    ((3, 3), [2, 1], [1, 1], [1, 1]),
    ((5, 3), [1, 1], [2, 1], [1, 2]),
]


def make(
    channels: int, geometry: tuple, device: torch.device, dtype: torch.dtype, bias: bool = True
) -> tuple[Any, ...]:
    size, *rest = geometry
    x = torch.randn(2, channels, 4, 9).to(device, dtype, memory_format=torch.channels_last)
    weight = (torch.randn(channels, 1, *size) / 3).to(device, dtype)
    return x, weight, torch.randn(channels).to(device, dtype) if bias else None, *rest, channels


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_filters(geometry, dtype, device, runs_kernel) -> None:
    inputs = make(70 if geometry is GEOMETRIES[0] else 6, geometry, device, dtype, bias=dtype != torch.float16)
    gated = conv2d_depthwise.conv2d_silu_gate_reference
    if runs_kernel:
        assert conv2d_depthwise.takes(*inputs)
        assert_close_to_fp64(conv2d_depthwise.convolve(*inputs), conv2d.conv2d_bias_reference, *inputs)
        assert_close_to_fp64(conv2d_depthwise.convolve(*inputs, gates=True), gated, *inputs)
    else:
        assert_close_to_fp64(ops.conv2d_silu_gate(*inputs), gated, *inputs)


def test_the_operators(device) -> None:
    inputs = make(6, GEOMETRIES[0], device, torch.float32)
    for op, reference in (
        (ops.conv2d_bias, conv2d.conv2d_bias_reference),
        (ops.conv2d_silu_gate, conv2d_depthwise.conv2d_silu_gate_reference),
    ):
        result = op(*inputs)
        assert_close_to_fp64(result, reference, *inputs)
        assert result.is_contiguous(memory_format=torch.channels_last)


def test_several_strips_and_pieces(device, runs_kernel, monkeypatch) -> None:
    if not runs_kernel:
        return
    monkeypatch.setattr(conv2d_depthwise, "ROWS", 3)
    monkeypatch.setattr(conv2d_depthwise, "STRIP", 4)
    inputs = make(10, GEOMETRIES[0], device, torch.float32)
    result = conv2d_depthwise.convolve(*inputs, gates=True)
    assert_close_to_fp64(result, conv2d_depthwise.conv2d_silu_gate_reference, *inputs)


@pytest.mark.parametrize("geometry", [GEOMETRIES[0], GEOMETRIES[3]], ids=str)
def test_a_photograph_has_more_pieces_than_a_second_axis_of_a_grid(geometry, device, runs_kernel, monkeypatch) -> None:
    if not runs_kernel:
        return
    size, stride, padding, dilation = geometry
    x = torch.randn(1, 2, 3100, 3100).to(device, torch.float16, memory_format=torch.channels_last)
    weight = torch.randn(2, 1, *size).to(x)
    inputs = x, weight, None, stride, padding, dilation, 2
    assert conv2d_depthwise.takes(*inputs)
    if device.type == "cuda":
        result = conv2d_depthwise.convolve(*inputs)
        expected = torch.nn.functional.conv2d(x.float(), weight.float(), None, *inputs[3:])
        torch.testing.assert_close(result.float(), expected, rtol=2e-3, atol=2e-3)
        return
    grids: list[tuple[int, ...]] = []  # the interpreter would take minutes

    class Launched:
        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            grids.append(grid)
            return lambda *args, **options: None

    for kernel in ("_depthwise_walk", "_depthwise_taps"):
        monkeypatch.setattr(conv2d_depthwise, kernel, Launched())
    conv2d_depthwise.convolve(*inputs)
    assert [len(grid) for grid in grids] == [1] and 65535 < grids[0][0] < 2**31


@pytest.fixture
def asked(monkeypatch) -> list[list[str]]:
    """The ways among which is chosen; all of them run, and agree."""
    questions: list[list[str]] = []

    def ask(question: str, ways: dict[str, Any], *inputs: Any, layer: Any = None) -> Tensor:
        questions.append(list(ways))
        results = [way(*inputs) for way in ways.values()]
        for result in results[1:]:
            torch.testing.assert_close(result, results[0], rtol=2e-2, atol=2e-2)
            assert result.stride() == results[0].stride()
        return results[-1]

    def native(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, *rest: Any) -> Tensor:
        convolved = conv2d.conv2d_bias_reference(x, weight, bias, *rest[:-1])
        convolved = convolved if residual is None else convolved + residual
        return torch.nn.functional.silu(convolved) if rest[-1] == "silu" else convolved

    monkeypatch.setattr(choice, "fastest", ask)
    monkeypatch.setattr(conv2d.nearby, "conv2d", native)
    monkeypatch.setattr(conv2d, "native_conv2d_takes", lambda *tensors: True)
    monkeypatch.setattr(conv2d, "own_kernels_run_on", lambda x: True)
    return questions


def test_of_groups_the_fastest_is_taken_and_pytorch_is_among_them(device, asked) -> None:
    x = torch.randn(2, 16, 6, 5).to(device, torch.float16, memory_format=torch.channels_last)
    weight, bias, geometry = torch.randn(16, 8, 3, 3).to(x), torch.randn(16).to(x), ([1, 1], [1, 1], [1, 1], 2)
    ops.conv2d_bias(x, weight, bias, *geometry)
    ops.conv2d_add(x, weight, bias, x, *geometry)
    assert asked == [["PyTorch's", "native"]] * 2


def test_silu_of_a_product_is_asked_of_linear_layers_too(device, asked) -> None:
    x = torch.randn(2, 16, 6, 5).to(device, torch.float16, memory_format=torch.channels_last)
    weight, bias, geometry = torch.randn(24, 16, 1, 1).to(x), torch.randn(24).to(x), ([1, 1], [0, 0], [1, 1], 1)
    for layout in (torch.channels_last, torch.contiguous_format):
        ops.conv2d_silu(x, weight.contiguous(memory_format=layout), bias, *geometry)
    ops.conv2d_silu(x, weight, bias, [2, 2], *geometry[1:])  # only some pixels
    assert asked == [["native", "product"]] * 2


def test_what_is_left_to_the_reference(device) -> None:
    x, weight, *rest = make(8, GEOMETRIES[0], device, torch.float32)
    for inputs in (
        (x.contiguous(), weight, *rest),
        (x, weight.repeat(2, 1, 1, 1), None, *rest[1:]),  # two filters for each channel
        (x, weight.half(), *rest),
        (x[:, :, :1, :1], weight, rest[0], [1, 1], [0, 0], [1, 1], 8),  # nothing to see
    ):
        assert not conv2d_depthwise.takes(*inputs)
    inputs = (x.contiguous(), weight, *rest)
    assert torch.equal(ops.conv2d_silu_gate(*inputs), conv2d_depthwise.conv2d_silu_gate_reference(*inputs))


def test_fake_tensors(device) -> None:
    inputs = make(8, GEOMETRIES[0], device, torch.float32)
    torch.library.opcheck(ops.conv2d_silu_gate.default, inputs, test_utils=("test_schema", "test_faketensor"))
