"""Linear layers and their residuals: the operators equal their references, and only fitting inputs go to the native op."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sfast.kernels import linear
from tests.kernels.fp64 import assert_close_to_fp64

ops = torch.ops.sfast


def make(name: str, dtype: torch.dtype, device: torch.device) -> tuple:
    x, weight, bias = torch.randn(2, 15, 24), torch.randn(40, 24) / 5, torch.randn(40)
    inputs: tuple = (x.to(device, dtype), weight.to(device, dtype), bias.to(device, dtype))
    if name == "linear_add":
        inputs = (*inputs, torch.randn(2, 15, 40).to(device, dtype))
    if name == "linear_image_add":
        residual = torch.randn(2, 40, 3, 5).to(device, dtype, memory_format=torch.channels_last)
        inputs = (*inputs, [2, 3, 5, 40], residual)
    return inputs


NAMES = ["linear", "linear_add", "linear_image_add"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("biased", [True, False], ids=["bias", "no bias"])
def test_linear(name, biased, device) -> None:
    for dtype in (torch.float32, torch.bfloat16) if device.type == "cpu" else (torch.float16, torch.bfloat16):
        x, weight, bias, *rest = make(name, dtype, device)
        inputs = (x, weight, bias if biased else None, *rest)
        result = getattr(ops, name)(*inputs)
        assert_close_to_fp64(result, getattr(linear, f"{name}_reference"), *inputs)
        if name == "linear_image_add":
            assert result.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("name", NAMES)
def test_some_tokens_of_each_sample(name, device) -> None:
    x, *rest = make(name, torch.float32 if device.type == "cpu" else torch.bfloat16, device)
    tokens = torch.cat([x, x + 1, x * 2], 1)[:, 15:30]
    assert not linear.has_even_rows(tokens)
    assert linear.has_even_rows_in_samples(tokens) and linear._matrices(tokens) is tokens
    assert not linear.has_even_rows_in_samples(tokens[:1].expand(2, -1, -1)), "samples that overlap are copied"
    inputs = (tokens, *rest)
    assert_close_to_fp64(getattr(ops, name)(*inputs), getattr(linear, f"{name}_reference"), *inputs)


def test_residuals_that_broadcast_or_differ_are_left_to_the_reference(device) -> None:
    x, weight, bias, residual = make("linear_add", torch.float32, device)
    for other in (residual[:1], residual[..., :1], residual.double(), residual[:, :1]):
        assert not linear._takes_residual(x, weight, bias, other)
        expected = linear.linear_add_reference(x, weight, bias, other)
        assert torch.equal(ops.linear_add(x, weight, bias, other), expected)


def test_images_of_another_size_or_layout_are_left_to_the_reference(device) -> None:
    x, weight, bias, size, residual = make("linear_image_add", torch.float32, device)
    others = [(size, residual.contiguous()), (size, residual[:, :1]), ([1, 3, 10, 40], residual[:1, :, :, :1])]
    others += [([2, 5, 3, 40], residual.reshape(2, 40, 5, 3)), ([30, 1, 1, 40], residual[:1, :, :1, :1])]
    for wanted, other in others:
        assert not linear._takes_image(x, weight, bias, wanted, other)
        expected = linear.linear_image_add_reference(x, weight, bias, wanted, other)
        assert torch.equal(ops.linear_image_add(x, weight, bias, wanted, other), expected)


@pytest.mark.parametrize("name", NAMES)
def test_fitting_inputs_go_to_the_native_op(name, monkeypatch) -> None:
    seen = []

    def native(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, activation: str) -> Tensor:
        seen.append((None if residual is None else tuple(residual.shape), activation))
        product = torch.nn.functional.linear(x, weight, bias)
        return product if residual is None else product + residual

    monkeypatch.setattr(linear, "native_linear_takes", lambda *tensors: True)
    fake = type("Ops", (), {"linear": staticmethod(native)})
    monkeypatch.setattr(linear.torch.ops, "sfast_native", fake, raising=False)
    inputs = make(name, torch.float32, torch.device("cpu"))
    result = getattr(ops, name)(*inputs)
    assert_close_to_fp64(result, getattr(linear, f"{name}_reference"), *inputs)
    assert seen == [(None if name == "linear" else (2, 15, 40), "none")]


def test_even_rows() -> None:
    x = torch.randn(4, 6, 16)
    assert linear.has_even_rows(x) and linear.has_even_rows(x[:, :1]) and linear.has_even_rows(x[1:, :, :8])
    assert linear.has_even_rows(x[0, 0]) and linear.has_even_rows(x.as_strided((2, 6, 16), (144, 24, 1)))
    others = [x.mT, x[:, ::2].transpose(0, 1), x[:, :5], x[..., ::2], x.as_strided((4, 6, 8), (72, 12, 1))]
    others += [torch.randn(97)[1:].view(6, 16), torch.randn(1, 16).expand(4, 16)]
    assert not any(linear.has_even_rows(other) for other in others)


def test_fake_tensors(device) -> None:
    for name in NAMES:
        inputs = make(name, torch.float32, device)
        torch.library.opcheck(getattr(ops, name).default, inputs, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["linear", "linear_add"])
def test_rows_with_gaps(name) -> None:
    x, weight, bias, *rest = make(name, torch.float16, torch.device("cuda", 0))
    for wide in (torch.randn(2, 15, 48), torch.randn(2, 15, 25), torch.randn(4, 15, 24)):
        other = wide.to(x)[: 2 if wide.shape[0] == 2 else 3 : 2, :, :24] if wide.shape[0] == 4 else wide.to(x)[..., :24]
        inputs = (other, weight, bias, *rest)
        assert_close_to_fp64(getattr(ops, name)(*inputs), getattr(linear, f"{name}_reference"), *inputs)
