"""A product in fp32 that is rounded to bf16: its parts, and all of it, against fp64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from sfast.kernels import linear_rounded
from sfast.kernels.linear_rounded import fits, linear_rounded_reference, side_by_side
from tests.kernels.fp64 import error

BF16 = torch.zeros(1, dtype=torch.bfloat16)


@pytest.mark.parametrize("biased", [True, False], ids=["bias", "no bias"])
def test_three_products_of_parts_are_the_product(biased, device, runs_kernel) -> None:
    if not runs_kernel:
        pytest.skip("needs a GPU or Triton's interpreter")
    x, weight = torch.randn(2, 9, 1032, device=device) * 3, torch.randn(24, 1032, device=device)
    bias = torch.randn(24, device=device) * 100 if biased else None
    product = side_by_side(x, None, True).double() @ side_by_side(weight, bias, False).double().T
    assert error(product, F.linear(x.double(), weight.double(), None if bias is None else bias.double())) < 2**-15
    x[0, 3, 5] = float("inf")
    parts = side_by_side(x, None, True)
    assert parts[0, 3, [5, 1032 + 5]].isinf().all() and not parts.isnan().any()


def test_what_is_small_or_not_fp32_is_left_to_the_reference(device) -> None:
    x, weight, bias = (
        torch.randn(520, 16, device=device),
        torch.randn(8, 16, device=device),
        torch.randn(8, device=device),
    )
    like = BF16.to(device)
    others = [(x[:500], weight, bias, like), (x, weight, bias, like.float()), (x, weight[:7], bias[:7], like)]
    others += [
        (x[:, :8], weight[:, :8], None, like),
        (x.double(), weight.double(), None, like),
        (x[:, 1:], weight[:, 1:], bias, like),
    ]
    for inputs in others:
        assert not fits(*inputs)
        assert torch.equal(torch.ops.sfast.linear_rounded(*inputs), linear_rounded_reference(*inputs))


@pytest.mark.gpu
def test_on_a_gpu() -> None:
    device = torch.device("cuda")
    like = BF16.to(device)
    for rows, K, D in ((600, 256, 64), (1030, 3072, 1536)):
        x, weight, bias = (
            torch.randn(2, rows, K, device=device),
            torch.randn(D, K, device=device),
            torch.randn(D, device=device),
        )
        for inputs in ((x, weight, bias, like), (x * 1e4, weight / 1e6, None, like)):
            exact = F.linear(*(each if each is None else each.double() for each in inputs[:3]))
            result = torch.ops.sfast.linear_rounded(*inputs)
            assert result.dtype == torch.bfloat16
            assert error(result, exact) <= 1.02 * error(exact.bfloat16(), exact), "all that is lost is the rounding"
            if linear_rounded.native_is_available():
                assert linear_rounded._takes(*inputs)
