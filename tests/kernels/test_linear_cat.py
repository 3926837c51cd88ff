"""A linear layer over two tensors side by side: both ways against fp64, and which inputs are left to the reference."""

from __future__ import annotations

import pytest
import torch

from sfast.kernels import choice, linear_cat
from tests.kernels.fp64 import assert_close_to_fp64

ops = torch.ops.sfast


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("biased", [True, False])
def test_two_products(biased, dtype, device) -> None:
    a, b = torch.randn(2, 5, 16, device=device), torch.randn(2, 5, 64, device=device)
    weight, bias = 0.1 * torch.randn(24, 80, device=device), torch.randn(24, device=device) if biased else None
    a, b, weight, bias = (None if tensor is None else tensor.to(dtype) for tensor in (a, b, weight, bias))
    floor = 4e-3 if dtype == torch.bfloat16 else 5e-4 if dtype == torch.float16 else 1e-6  # the sum is rounded twice
    inputs = (a, b, 2, weight, bias)
    assert linear_cat.fits(*inputs)
    result = linear_cat.apart(a, b, weight, bias)
    assert_close_to_fp64(result, linear_cat.linear_cat_reference, *inputs, floor=floor)
    spread = torch.cat([b, b], -1)[..., :64]  # rows with gaps
    assert_close_to_fp64(
        linear_cat.apart(a, spread, weight, bias), linear_cat.linear_cat_reference, *inputs, floor=floor
    )
    assert_close_to_fp64(ops.linear_cat(*inputs), linear_cat.linear_cat_reference, *inputs, floor=floor)


@pytest.mark.gpu
@pytest.mark.parametrize("preferred", ["joined", "apart", "from two places"])
def test_every_way_is_right(preferred, monkeypatch) -> None:
    def fastest(question, ways, *inputs, layer):
        if preferred not in ways:
            pytest.skip("our own kernel takes the place of two products, where it runs")
        return ways[preferred](*inputs)

    monkeypatch.setattr(choice, "fastest", fastest)
    a, b = (torch.randn(1, 64, K, device="cuda", dtype=torch.bfloat16) for K in (128, 256))
    weight, bias = (torch.randn(*s, device="cuda", dtype=torch.bfloat16) for s in ((72, 384), (72,)))
    inputs = (a, b, -1, weight, bias)
    assert linear_cat._takes(*inputs)
    assert_close_to_fp64(ops.linear_cat(*inputs), linear_cat.linear_cat_reference, *inputs, floor=4e-3)


def test_what_is_left_to_the_reference(device) -> None:
    a, weight = torch.randn(2, 8, 8, device=device), torch.randn(4, 16, device=device)
    assert not linear_cat.fits(a, a, 1, weight, None)
    assert not linear_cat.fits(a, a[0], 2, weight, None)
    assert not linear_cat.fits(a, a[..., :4], 2, weight, None)
    assert not linear_cat._takes(a, a, 2, weight, None)  # fp32
    assert torch.equal(ops.linear_cat(a, a, 2, weight, None), linear_cat.linear_cat_reference(a, a, 2, weight, None))


def test_fake_tensors(device) -> None:
    a, weight = torch.randn(2, 5, 8, device=device), torch.randn(4, 16, device=device)
    inputs = (a, a + 1, 2, weight, None)
    torch.library.opcheck(ops.linear_cat.default, inputs, test_utils=("test_schema", "test_faketensor"))
