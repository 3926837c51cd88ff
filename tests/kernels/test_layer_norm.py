"""LayerNorm against fp64: narrow and wide rows, several dimensions, the residual add, and what is left to the reference."""

from __future__ import annotations

import pytest
import torch

from sfast.kernels import layer_norm
from sfast.kernels.layer_norm import add_layer_norm_reference, layer_norm_reference
from tests.kernels.fp64 import assert_close_to_fp64

ops = torch.ops.sfast
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("shape", "dims"),
    [((2, 5, 33), 1), ((3, 7, 11), 2), ((7, 2), 1), ((2, 9000), 1), ((3, 320), 1), ((5,), 1)],
    ids=str,
)
@pytest.mark.parametrize("many", [1, 1536], ids=["rows together", "row by row"])
def test_layer_norm(many, shape, dims, dtype, device, runs_kernel, monkeypatch) -> None:
    monkeypatch.setattr(layer_norm, "MANY", many)
    x = (torch.randn(shape) + 0.5).to(device, dtype)
    normalized_shape = list(shape[-dims:])
    weight, bias = (torch.randn(normalized_shape).to(device, dtype) for _ in range(2))
    for parameters in [(weight, bias), (None, bias), (weight, None), (None, None)]:
        inputs = (x, normalized_shape, *parameters, 1e-5)
        if runs_kernel:
            assert layer_norm._takes(*inputs)
        assert_close_to_fp64(ops.layer_norm(*inputs), layer_norm_reference, *inputs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(2, 5, 33), (3, 320), (2, 4097)], ids=str)
@pytest.mark.parametrize("many", [1, 1536], ids=["rows together", "row by row"])
def test_add_layer_norm(many, shape, dtype, device, monkeypatch) -> None:
    monkeypatch.setattr(layer_norm, "MANY", many)
    x, residual = (torch.randn(shape).to(device, dtype) for _ in range(2))
    weight, bias = (torch.randn(shape[-1]).to(device, dtype) for _ in range(2))
    inputs = (x, residual, [shape[-1]], weight, bias, 1e-5)
    normalized, total = ops.add_layer_norm(*inputs)
    assert_close_to_fp64(normalized, add_layer_norm_reference, *inputs, part=0)
    assert_close_to_fp64(total, add_layer_norm_reference, *inputs, part=1)


def test_a_large_mean_does_not_cancel(device, runs_kernel) -> None:
    x = 100 + 0.1 * torch.randn(4, 320, device=device)
    inputs = (x, [320], None, None, 1e-5)
    if runs_kernel:  # fp32 knows the mean to 6e-8 of itself, which is 6e-5 of the standard deviation
        assert_close_to_fp64(ops.layer_norm(*inputs), layer_norm_reference, *inputs, floor=1.5e-4)


def test_nan_spoils_its_own_row_and_no_other(device) -> None:
    x = torch.randn(7, 48, device=device)
    x[3, 5] = float("nan")
    result = ops.layer_norm(x, [48], None, None, 1e-5)
    assert result.isnan().all(dim=1).tolist() == [row == 3 for row in range(7)]
    assert result.isnan().any(dim=1).tolist() == [row == 3 for row in range(7)]


def test_views_that_are_not_contiguous(device) -> None:
    wide = torch.randn(6, 8, 40, device=device)
    for x in (wide[..., ::2], wide[:, ::2], wide.transpose(0, 2), wide[:1].expand(6, 8, 40)):
        inputs = (x, [x.shape[-1]], None, None, 1e-5)
        assert_close_to_fp64(ops.layer_norm(*inputs), layer_norm_reference, *inputs)
        inputs = (x, x.flip(0), [x.shape[-1]], None, None, 1e-5)
        assert_close_to_fp64(ops.add_layer_norm(*inputs)[0], add_layer_norm_reference, *inputs, part=0)


@pytest.mark.parametrize("turned", [False, True])
def test_a_row_for_each_sample_is_not_copied_out(turned, device) -> None:
    x, row = torch.randn(3, 7, 40, device=device), torch.randn(3, 1, 48, device=device)[..., :40]
    pair = (row.expand(3, 7, 40), x) if turned else (x, row.expand(3, 7, 40))
    inputs = (*pair, [40], torch.randn(40, device=device), None, 1e-5)
    for part, result in enumerate(ops.add_layer_norm(*inputs)):
        assert_close_to_fp64(result, add_layer_norm_reference, *inputs, part=part)
        assert result.is_contiguous()
    both = (pair[0], row.expand(3, 7, 40), *inputs[2:])
    assert_close_to_fp64(ops.add_layer_norm(*both)[1], add_layer_norm_reference, *both, part=1)


@pytest.mark.parametrize("shape", [(0, 8), (2, 0, 8)], ids=str)
def test_empty(shape, device) -> None:
    assert ops.layer_norm(torch.randn(shape, device=device), [8], None, None, 1e-5).shape == shape


def test_what_is_left_to_the_reference(device) -> None:
    x = torch.randn(2, 8, device=device)
    assert not layer_norm._takes(x.half(), [8], torch.randn(8, device=device), None, 1e-5)
    assert not layer_norm._takes(torch.randn(1, 16385, device=device), [16385], None, None, 1e-5)
    assert not layer_norm._takes_sum(x, x[:1], [8], None, None, 1e-5)
    inputs = (x, x[:1], [8], None, None, 1e-5)
    assert torch.equal(ops.add_layer_norm(*inputs)[0], add_layer_norm_reference(*inputs)[0])


def test_fake_tensors(device) -> None:
    x = torch.randn(3, 8, device=device)
    for call, inputs in [(ops.layer_norm, (x, [8])), (ops.add_layer_norm, (x, x + 1, [8]))]:
        torch.library.opcheck(call.default, (*inputs, None, None, 1e-5), test_utils=("test_schema", "test_faketensor"))
