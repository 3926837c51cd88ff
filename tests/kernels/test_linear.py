"""Linear with GEGLU, GELU and SiLU against fp64; exact GELU stays exact and tanh stays tanh."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from sfast.kernels import geglu
from sfast.kernels.geglu import gate_with_gelu, linear_geglu_reference
from sfast.kernels.linear_activation import linear_gelu_reference, linear_silu_reference
from sfast.kernels.linear_swiglu import linear_swiglu_reference
from sfast.kernels.native_ops import native_linear_takes
from tests.kernels.fp64 import assert_close_to_fp64, error

ops = torch.ops.sfast
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def make(dtype: torch.dtype, device: torch.device, rows: tuple[int, ...] = (3, 7), depth: int = 24, width: int = 42):
    tensors = torch.randn(*rows, depth), torch.randn(width, depth) / 3, torch.randn(width)
    return [tensor.to(device, dtype) for tensor in tensors]


@pytest.fixture(autouse=True)
def full_fp32() -> None:
    assert not torch.backends.cuda.matmul.allow_tf32


@pytest.mark.parametrize("approximate", ["none", "tanh"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_linear_geglu(dtype, approximate, device, runs_kernel) -> None:
    x, weight, bias = make(dtype, device)
    for inputs in [
        (x, weight, bias, approximate),
        (x, weight, None, approximate),
        (x[0, 0], weight, bias, approximate),
    ]:
        if runs_kernel:
            assert geglu._takes(*inputs)
        assert_close_to_fp64(ops.linear_geglu(*inputs), linear_geglu_reference, *inputs)


@pytest.mark.parametrize("approximate", ["none", "tanh"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_linear_gelu(dtype, approximate, device) -> None:
    inputs = (*make(dtype, device), approximate)
    assert_close_to_fp64(ops.linear_gelu(*inputs), linear_gelu_reference, *inputs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_linear_silu(dtype, device) -> None:
    inputs = make(dtype, device)
    assert_close_to_fp64(ops.linear_silu(*inputs), linear_silu_reference, *inputs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_linear_swiglu(dtype, device) -> None:
    x, weight, bias = make(dtype, device, depth=32, width=40)  # the native operator takes these
    gate_weight, gate_bias = make(dtype, device, depth=32, width=40)[1:]
    copies = [tensor.clone() for tensor in (x, weight, gate_weight)]
    for biases in [(gate_bias, bias), (None, None), (gate_bias, None)]:
        inputs = x, gate_weight, biases[0], weight, biases[1]
        assert_close_to_fp64(ops.linear_swiglu(*inputs), linear_swiglu_reference, *inputs)
    assert all(map(torch.equal, (x, weight, gate_weight), copies))


def test_exact_and_tanh_gelu_are_told_apart(device) -> None:
    x, weight, bias = make(torch.float32, device)
    for call, reference in [(ops.linear_geglu, linear_geglu_reference), (ops.linear_gelu, linear_gelu_reference)]:
        exact = reference(x.double(), weight.double(), bias.double(), "none")
        assert error(call(x, weight, bias, "none"), exact) < 1e-6
        assert 1e-5 < error(call(x, weight, bias, "tanh"), exact) < 1e-2


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_gelu_far_from_zero(approximate, device, runs_kernel) -> None:
    if not runs_kernel:
        pytest.skip("the reference has its own tests; run with TRITON_INTERPRET=1")
    gate = torch.tensor([-1e4, -50.0, -6.0, -0.0, 6.0, 50.0, 1e4], device=device)
    result = gate_with_gelu(torch.cat([torch.full_like(gate, 2), gate]), approximate)
    expected = 2 * torch.nn.functional.gelu(gate.double(), approximate=approximate)
    torch.testing.assert_close(result.double(), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_silu_gate(dtype, device, runs_kernel) -> None:
    image = torch.randn(2, 6, 3, 5, device=device).to(dtype, memory_format=torch.channels_last)
    for x, dim in ((image, 1), (torch.randn(2, 3, 34, device=device).to(dtype), -1)):
        if runs_kernel:
            assert geglu._takes_halves(x, dim)
        result = ops.silu_gate(x, dim)
        assert_close_to_fp64(result, geglu.silu_gate_reference, x, dim)
        assert result.stride() == geglu.silu_gate_reference(x, dim).stride()
    for x, dim in ((image, 2), (image.contiguous(), 1), (image[:, :5], 1)):
        assert not geglu._takes_halves(x, dim)
        if x.shape[dim] % 2 == 0:
            assert torch.equal(ops.silu_gate(x, dim), geglu.silu_gate_reference(x, dim))


def test_nan_spoils_its_own_row_and_no_other(device) -> None:
    x, weight, bias = make(torch.float32, device)
    x[1, 2, 3] = float("nan")
    spoilt = torch.zeros(3, 7, dtype=torch.bool, device=device)
    spoilt[1, 2] = True
    for result in [ops.linear_geglu(x, weight, bias, "none"), ops.linear_silu(x, weight, bias)]:
        assert torch.equal(result.isnan(), spoilt[..., None].expand_as(result))


def test_inputs_stay_as_they_are(device) -> None:
    tensors = make(torch.float32, device)
    copies = [tensor.clone() for tensor in tensors]
    ops.linear_gelu(*tensors, "none")
    ops.linear_silu(*tensors)
    ops.linear_geglu(*tensors, "tanh")
    assert all(torch.equal(tensor, copy) for tensor, copy in zip(tensors, copies, strict=True))


def test_empty(device) -> None:
    x, weight, bias = make(torch.float32, device, rows=(0, 7))
    assert ops.linear_geglu(x, weight, bias, "none").shape == (0, 7, 21)
    assert ops.linear_silu(x, weight, bias).shape == (0, 7, 42)


def test_fake_tensors(device) -> None:
    x, weight, bias = make(torch.float32, device)
    for call, inputs in [
        (ops.linear_geglu, (x, weight, bias, "none")),
        (ops.linear_gelu, (x, weight, bias, "tanh")),
        (ops.linear_silu, (x, weight, bias)),
        (ops.linear_swiglu, (x, weight, bias, weight, bias)),
    ]:
        torch.library.opcheck(call.default, inputs, test_utils=("test_schema", "test_faketensor"))


def test_a_weight_without_rows_is_left_to_the_reference() -> None:
    with FakeTensorMode():
        x, weight = (torch.empty(shape, device="cuda", dtype=torch.float16) for shape in ((2, 8), (8,)))
        assert not native_linear_takes(x, weight, None)
