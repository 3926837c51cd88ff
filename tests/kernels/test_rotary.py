"""Norm, rotation and concatenation of heads against fp64: layouts, precisions, tables, and what is left to the reference."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sfast.kernels import rms_norm, rotary
from tests.kernels.fp64 import assert_close_to_fp64

ops = torch.ops.sfast
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SHAPES = [(2, 2, 3, 16), (1, 2, 9, 6)]  # B, T, H, D

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def heads(shape: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    """As a merged projection leaves them: rows of queries between rows of keys and values."""
    B, T, H, D = shape
    return torch.randn(B, T, 3 * H * D, device=device).to(dtype)[..., H * D : 2 * H * D].view(B, T, H, D)


def weights(D: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    return (1 + 0.3 * torch.randn(D, device=device)).to(dtype)


def tables(T: int, D: int, device: torch.device) -> tuple[Tensor, Tensor]:
    angle = torch.randn(1, T, 1, D, device=device)
    return angle.cos(), angle.sin()


def as_complex(cos: Tensor, sin: Tensor) -> Tensor:
    return torch.complex(cos, sin)[0, ..., ::2].contiguous()


@dtypes
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rotary(shape, dtype, device, runs_kernel) -> None:
    x, (cos, sin) = heads(shape, device, dtype), tables(shape[1], shape[3], device)
    if runs_kernel:
        assert rotary.takes(rotary._rotary(x, cos, sin))
    result = ops.rotary(x, cos, sin)
    assert_close_to_fp64(result, rotary.rotary_reference, x, cos, sin)
    turned, *other = (each.transpose(1, 2) for each in (x, cos, sin))
    assert_close_to_fp64(ops.rotary(turned, *other), rotary.rotary_reference, turned, *other)
    if runs_kernel:
        assert result.is_contiguous()
        assert ops.rotary(turned, *other).transpose(1, 2).is_contiguous()
    weight = weights(shape[3], device, dtype)
    inputs = (x, weight, 1e-6, cos, sin)
    assert_close_to_fp64(ops.rms_norm_rotary(*inputs), rotary.rms_norm_rotary_reference, *inputs)


@dtypes
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_table_of_complex_numbers_or_of_pairs(shape, dtype, device, runs_kernel) -> None:
    x, (cos, sin) = heads(shape, device, dtype), tables(shape[1], shape[3], device)
    pairs, table, weight = (cos[..., ::2], sin[..., ::2]), as_complex(cos, sin), weights(shape[3], device, dtype)
    if runs_kernel:
        assert rotary.takes(rotary._rotary_complex(x, table)) and rotary.takes(rotary._rotary_pairs(x, *pairs))
    assert_close_to_fp64(ops.rotary_pairs(x, *pairs), rotary.rotary_pairs_reference, x, *pairs)
    # a complex table has no fp64 of its own in this comparison: the pairs say the same
    result = ops.rotary_complex(x, table)
    assert_close_to_fp64(result, rotary.rotary_pairs_reference, x, *pairs)

    def normalized(x: Tensor, weight: Tensor, eps: float, cos: Tensor, sin: Tensor) -> Tensor:
        return rotary.rotary_pairs_reference(rms_norm.rms_norm_reference(x, weight, eps), cos, sin)

    result = ops.rms_norm_rotary_complex(x, weight, 1e-6, table)
    assert_close_to_fp64(result, normalized, x, weight, 1e-6, *pairs)


@dtypes
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_one_norm_over_all_heads(shape, dtype, device, runs_kernel) -> None:
    B, T, H, D = shape
    x, (cos, sin) = torch.randn(B, T, 3 * H * D, device=device).to(dtype).chunk(3, -1)[1], tables(T, D, device)
    inputs = (x, weights(H * D, device, dtype), 1e-2, [H, -1], cos[..., ::2], sin[..., ::2])
    if runs_kernel:
        assert rotary.takes(rotary._rms_norm_heads_rotary_pairs(*inputs))
    result = ops.rms_norm_heads_rotary_pairs(*inputs)
    assert_close_to_fp64(result, rotary.rms_norm_heads_rotary_pairs_reference, *inputs)


@dtypes
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_two_tensors_one_behind_the_other(shape, dtype, device, runs_kernel) -> None:
    B, T, H, D = shape
    a, b = heads(shape, device, dtype), heads((B, T + 2, H, D), device, dtype)
    first, second = (a, weights(D, device, dtype), 1e-6), (b, weights(D, device, dtype), 1e-2)
    inputs = (*first, *second, 1)
    if runs_kernel:
        assert rotary.takes(rotary._cat_rms_norm(*inputs))
    assert_close_to_fp64(ops.cat_rms_norm(*inputs), rotary.cat_rms_norm_reference, *inputs)
    inputs = (a.transpose(1, 2), *first[1:], b.transpose(1, 2), *second[1:], 2)
    assert_close_to_fp64(ops.cat_rms_norm(*inputs), rotary.cat_rms_norm_reference, *inputs)

    cos, sin = tables(2 * T + 2, D, device)
    inputs = (*first, *second, cos, sin)
    if runs_kernel:
        assert rotary.takes(rotary._cat_rms_norm_rotary(*inputs))
    assert_close_to_fp64(ops.cat_rms_norm_rotary(*inputs), rotary.cat_rms_norm_rotary_reference, *inputs)

    table = as_complex(cos, sin)
    inputs = (*first, table[:T], *second, table[T:])
    if runs_kernel:
        assert rotary.takes(rotary._cat_rms_norm_rotary_complex(*inputs))
    result = ops.cat_rms_norm_rotary_complex(*inputs)
    twins = (cos[..., ::2].repeat_interleave(2, -1), sin[..., ::2].repeat_interleave(2, -1))
    assert_close_to_fp64(result, rotary.cat_rms_norm_rotary_reference, *first, *second, *twins)


def test_many_tokens_of_which_a_program_takes_some(device, monkeypatch) -> None:
    monkeypatch.setattr(rotary, "ELEMENTS", 4 * 4 * 16)  # four tokens: each of the two ends amid a program's
    a, b = (heads((2, tokens, 3, 16), device, torch.float32) for tokens in (7, 13))
    inputs = (a, weights(16, device, torch.float32), 1e-6, b, weights(16, device, torch.float32), 1e-2)
    inputs = (*inputs, *tables(20, 16, device))
    assert_close_to_fp64(ops.cat_rms_norm_rotary(*inputs), rotary.cat_rms_norm_rotary_reference, *inputs)


@dtypes
def test_values_are_joined_as_they_are(dtype, device, runs_kernel) -> None:
    a, b = heads((2, 2, 3, 16), device, dtype), heads((2, 3, 3, 16), device, dtype)
    for inputs in ((a, b, 1), (a.transpose(1, 2), b.transpose(1, 2), 2)):
        if runs_kernel:
            assert rotary.takes(rotary.cat_tokens(*inputs))
        assert torch.equal(ops.cat_tokens(*inputs), rotary.cat_tokens_reference(*inputs))
    assert torch.equal(ops.cat_channels(a, b), torch.cat([a, b], 1))
    assert rotary.cat_tokens(a.contiguous(), b.contiguous(), 1) is None
    assert torch.equal(ops.cat_tokens(a, a, 3), torch.cat([a, a], 3))


@dtypes
def test_rms_norm_of_heads_and_of_rows(dtype, device) -> None:
    queries = heads((2, 5, 3, 16), device, dtype)
    for x in (queries, queries.transpose(1, 2), torch.randn(2, 5, 300, device=device).to(dtype)):
        inputs = (x, weights(x.shape[-1], device, dtype), 1e-6)
        assert_close_to_fp64(ops.rms_norm(*inputs), rms_norm.rms_norm_reference, *inputs)


def test_each_sample_has_a_table_of_its_own(device) -> None:
    x, angle = heads((2, 5, 3, 8), device, torch.float32), torch.randn(2, 5, 1, 8, device=device)
    inputs = (x, angle.cos(), angle.sin())
    assert_close_to_fp64(ops.rotary(*inputs), rotary.rotary_reference, *inputs)


def test_a_table_of_complex_numbers_with_gaps(device) -> None:
    x, (cos, sin) = torch.randn(1, 4, 3, 8, device=device), tables(4, 8, device)
    table = torch.complex(cos, sin)[0, ..., ::2]
    pairs = (cos[..., ::2], sin[..., ::2])
    assert_close_to_fp64(ops.rotary_complex(x, table), rotary.rotary_pairs_reference, x, *pairs)


def test_what_is_left_to_the_reference(device) -> None:
    x, (cos, sin) = torch.randn(1, 4, 3, 8, device=device), tables(4, 8, device)
    table = as_complex(cos, sin)
    for job in (
        rotary._rotary(x[..., ::2], cos[..., ::2], sin[..., ::2]),  # gaps
        rotary._rotary(x, cos.double(), sin.double()),
        rotary._rotary(x, cos.expand(1, 4, 3, 8), sin.expand(1, 4, 3, 8)),  # a table for each head
        rotary._rotary(x, cos[:, :2], sin[:, :2]),
        rotary._rotary(x, cos.mT, sin.mT),
        rotary._rotary_complex(x, table.conj()),
        rotary._cat_rms_norm(x, x[0, 0, 0], 1e-6, x, x[0, 0, 0], 1e-6, 3),
        rotary._cat_rms_norm(x, x[0, 0, 0], 1e-6, x[..., :2, :], x[0, 0, 0], 1e-6, 1),
        rotary._rms_norm_rotary(x, x[0, 0, 0].half(), 1e-6, cos, sin),
    ):
        assert not rotary.takes(job)
    every = (cos.expand(1, 4, 3, 8).contiguous(), sin.expand(1, 4, 3, 8).contiguous())
    assert torch.equal(ops.rotary(x, *every), rotary.rotary_reference(x, *every))
    torch.testing.assert_close(ops.rotary_complex(x, table.conj()), rotary.rotary_complex_reference(x, table.conj()))


def test_fake_tensors(device) -> None:
    x, (cos, sin) = heads((2, 4, 3, 8), device, torch.float32), tables(4, 8, device)
    inputs = (x, weights(8, device, torch.float32), 1e-6, cos, sin)
    torch.library.opcheck(ops.rms_norm_rotary.default, inputs, test_utils=("test_schema",))
    torch.library.opcheck(ops.rms_norm.default, inputs[:3], test_utils=("test_schema",))
