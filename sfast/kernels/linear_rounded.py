"""A linear layer in fp32 whose result is rounded to bf16, on the tensor cores, and as exact as before that rounding.

Some models keep an embedder in fp32, and a few embed a timestep for each token: then it is the one large product of the model
that runs without tensor cores, and takes as long as dozens of others. A number is the sum of two of bf16, but for 2⁻¹⁷ of it,
and three products of such parts, summed up in fp32, are the product but for as little: 2⁻⁸ of the rounding behind it. Parts
that lie side by side make the three products one: [xₕ xₕ xₗ] [wₕ wₗ wₕ]ᵀ, and the bias two more columns.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sfast.kernels import nearby
from sfast.kernels.native_ops import native_is_available
from sfast.kernels.op import define
from sfast.kernels.overlap import launch_options, wait_for_previous_kernel
from sfast.kernels.triton_or_none import tl, triton, triton_takes

ROWS = 512  # fewer are not worth it: a library splits such products finely enough
EXTRA = 8  # columns: two of the bias, and zeros for the sake of alignment
BLOCK = 1024  # columns of a program


def linear_rounded_reference(x: Tensor, weight: Tensor, bias: Tensor | None, like: Tensor) -> Tensor:
    """x @ weightᵀ + bias, rounded to `like`'s precision: x [..., K], weight [D, K], bias [D] -> [..., D]."""
    return F.linear(x, weight, bias).type_as(like)


def _linear_rounded(x: Tensor, weight: Tensor, bias: Tensor | None, like: Tensor) -> Tensor:
    return nearby.linear(side_by_side(x, None, True), side_by_side(weight, bias, False), None, None, "none")


def side_by_side(x: Tensor, bias: Tensor | None, first: bool) -> Tensor:
    """[high, high, low, 1, 1] of the first factor [..., K] of a product, [high, low, high, bias] of the second: in bf16."""
    K = x.shape[-1]
    y = x.new_empty(*x.shape[:-1], 3 * K + EXTRA, dtype=torch.bfloat16)
    _split[y.numel() // y.shape[-1], triton.cdiv(K, BLOCK)](
        x,
        x if bias is None else bias,
        y,
        K,
        0 if bias is None else 1,
        FIRST=first,
        EXTRA=EXTRA,
        BLOCK=BLOCK,
        **launch_options(x.device),
        num_warps=4,
    )
    return y


@triton.jit(do_not_specialize=["biased"])
def _split(
    x: tl.tensor,
    bias: tl.tensor,
    y: tl.tensor,
    K: tl.tensor,
    biased: tl.tensor,
    FIRST: tl.constexpr,
    EXTRA: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
) -> None:
    """BLOCK columns of a row of x [R, K], into y [R, 3 K + EXTRA]."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < K
    out = y + row * (3 * K + EXTRA)
    wait_for_previous_kernel(OVERLAP)
    v = tl.load(x + row * K + column, mask=mask, other=0)
    high = v.to(tl.bfloat16)
    rest = v - high.to(tl.float32)
    low = tl.where(rest == rest, rest, 0).to(tl.bfloat16)  # infinity is all of itself
    tl.store(out + column, high, mask=mask)
    tl.store(out + K + column, high if FIRST else low, mask=mask)
    tl.store(out + 2 * K + column, low if FIRST else high, mask=mask)
    if tl.program_id(1) == 0:
        place = tl.arange(0, EXTRA)
        if FIRST:
            extra = tl.where(place < 2, 1.0, 0.0).to(tl.bfloat16)
        else:
            b = tl.load(bias + row * biased) * biased
            b_high = b.to(tl.bfloat16).to(tl.float32)
            extra = tl.where(place == 0, b_high, tl.where(place == 1, b - b_high, 0.0)).to(tl.bfloat16)
        tl.store(out + 3 * K + place, extra)


def _takes(x: Tensor, weight: Tensor, bias: Tensor | None, like: Tensor) -> bool:
    return x.is_cuda and native_is_available() and fits(x, weight, bias, like)


def fits(x: Tensor, weight: Tensor, bias: Tensor | None, like: Tensor) -> bool:
    """Whether all is in fp32 and without gaps, the result in bf16, and large enough."""
    factors = [each for each in (x, weight, bias) if each is not None]
    plain = all(
        each.dtype == torch.float32 and each.device == x.device and each.is_contiguous() and each.numel() > 0
        for each in factors
    )
    if not plain or weight.dim() != 2 or weight.shape[1] != x.shape[-1] or not triton_takes(x):
        return False
    if bias is not None and bias.shape != weight.shape[:1]:
        return False
    large = x.numel() // x.shape[-1] >= ROWS and weight.shape[0] % 8 == 0 and weight.shape[1] % 8 == 0
    return large and like.dtype == torch.bfloat16 and like.device == x.device


def _product(x: Tensor, weight: Tensor, bias: Tensor | None, like: Tensor) -> Tensor:
    return like.new_empty((*x.shape[:-1], weight.shape[0]))


define(
    "linear_rounded(Tensor x, Tensor weight, Tensor? bias, Tensor like) -> Tensor",
    reference=linear_rounded_reference,
    supports=_takes,
    launch=_linear_rounded,
    fake=_product,
)
