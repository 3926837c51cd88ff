"""LayerNorm, with the residual add before it, in one pass: every row is read once, kept in registers, and written once.

Eager adds, writes the sum, reads it again and normalizes; here the sum is normalized before it is rounded, and written on
the side. Statistics are fp32 and two-pass (mean first, then squared deviations), so they do not cancel.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from sfast.kernels.op import define
from sfast.kernels.overlap import launch_options, wait_for_previous_kernel
from sfast.kernels.triton_or_none import tl, triton, triton_takes

MAX_WIDTH = 16384  # elements of a row that fit into one program's registers
TILE = 4096  # elements that a program takes, where there are
MANY = 1536  # rows; a program that takes one of fewer is faster, as measured on an H200
ADD, WEIGHT, BIAS = 1, 2, 4  # bits of `flags`; a run-time value, so that all variants share one compilation


def layer_norm_reference(
    x: Tensor, normalized_shape: list[int], weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    """layer_norm(x): x [..., *normalized_shape], weight and bias [*normalized_shape] -> [..., *normalized_shape]."""
    return F.layer_norm(x, normalized_shape, weight, bias, eps)


def add_layer_norm_reference(
    x: Tensor, residual: Tensor, normalized_shape: list[int], weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """(layer_norm(x + residual), x + residual): the sum is the next block's residual."""
    total = x + residual
    return F.layer_norm(total, normalized_shape, weight, bias, eps), total


def _layer_norm(
    x: Tensor, normalized_shape: list[int], weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    return _launch(x, None, math.prod(normalized_shape), weight, bias, eps)[0]


def _add_layer_norm(
    x: Tensor, residual: Tensor, normalized_shape: list[int], weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    return _launch(x, residual, math.prod(normalized_shape), weight, bias, eps)


def _launch(
    x: Tensor, residual: Tensor | None, width: int, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """(normalized, sum); without a residual the sum is x itself."""
    shape, every = x.shape, 1
    if residual is not None and _is_repeated(residual, width):
        x, residual = residual, x
    if residual is not None and _is_repeated(x, width):
        x, every = x[:, :1], x.shape[1]  # so many rows of the sum read one row of x
    x = x.contiguous()
    y = x.new_empty(shape)
    rows = y.numel() // width
    total = x if residual is None else x.new_empty(shape)
    flags = (
        (ADD if residual is not None else 0) | (WEIGHT if weight is not None else 0) | (BIAS if bias is not None else 0)
    )
    WIDTH = triton.next_power_of_2(width)
    ROWS = max(1, TILE // WIDTH) if rows >= MANY else 1  # two compilations for all sizes
    _layer_norm_rows[(triton.cdiv(rows, ROWS),)](
        x,
        x if residual is None else residual.contiguous(),
        x if weight is None else weight.contiguous(),
        x if bias is None else bias.contiguous(),
        y,
        total,
        rows,
        width,
        every,
        eps,
        flags,
        ROWS=ROWS,
        WIDTH=WIDTH,
        **launch_options(x.device),
        num_warps=min(16, max(4, WIDTH // (256 if ROWS == 1 else 512))),
    )
    return y, total


def _is_repeated(x: Tensor, width: int) -> bool:
    """Whether x [B, T, width] is one row for each sample, expanded: what attention to a single token gives."""
    return x.dim() == 3 and x.shape[2] == width and x.shape[1] > 1 and x.stride(1) == 0


@triton.jit(do_not_specialize=["rows", "every", "flags"])
def _layer_norm_rows(
    x: tl.tensor,
    residual: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    y: tl.tensor,
    total: tl.tensor,
    rows: tl.tensor,
    width: tl.tensor,
    every: tl.tensor,
    eps: tl.tensor,
    flags: tl.tensor,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    OVERLAP: tl.constexpr,
) -> None:
    """ROWS rows of `width` elements."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    source = (row // every).to(tl.int64)
    row = row.to(tl.int64)
    lane = tl.arange(0, WIDTH)
    live = (lane < width)[None, :]
    mask = (row < rows)[:, None] & live
    offset = row[:, None] * width + lane[None, :]

    wait_for_previous_kernel(OVERLAP)
    v = tl.load(x + source[:, None] * width + lane[None, :], mask=mask, other=0).to(tl.float32)
    if flags & 1 != 0:
        v += tl.load(residual + offset, mask=mask, other=0).to(tl.float32)
        tl.store(total + offset, v.to(total.dtype.element_ty), mask=mask)
    v -= (tl.sum(v, axis=1) / width)[:, None]
    variance = tl.sum(tl.where(live, v * v, 0), axis=1) / width

    weighted = flags >> 1 & 1
    w = tl.load(weight + lane, mask=lane < width * weighted, other=0).to(tl.float32) + (1 - weighted)
    b = tl.load(bias + lane, mask=lane < width * (flags >> 2 & 1), other=0).to(tl.float32)
    v = v * tl.rsqrt(variance + eps)[:, None] * w[None, :] + b[None, :]
    tl.store(y + offset, v.to(y.dtype.element_ty), mask=mask)


def _takes(x: Tensor, normalized_shape: list[int], weight: Tensor | None, bias: Tensor | None, eps: float) -> bool:
    if not triton_takes(x) or x.numel() == 0 or not normalized_shape or x.numel() // x.shape[-1] >= 2**31:
        return False
    if list(x.shape[-len(normalized_shape) :]) != list(normalized_shape) or math.prod(normalized_shape) > MAX_WIDTH:
        return False
    return all(
        p is None or (list(p.shape) == list(normalized_shape) and p.dtype == x.dtype and p.device == x.device)
        for p in (weight, bias)
    )


def _takes_sum(
    x: Tensor, residual: Tensor, normalized_shape: list[int], weight: Tensor | None, bias: Tensor | None, eps: float
) -> bool:
    same = residual.shape == x.shape and residual.dtype == x.dtype and residual.device == x.device
    return same and _takes(x, normalized_shape, weight, bias, eps)


def _contiguous_like(x: Tensor, *rest: object) -> Tensor:
    return x.new_empty(x.shape)


def _two_like_sum(x: Tensor, residual: Tensor, *rest: object) -> tuple[Tensor, Tensor]:
    total = torch.empty_like(x + residual)
    return total.new_empty(total.shape), total


define(
    "layer_norm(Tensor x, int[] normalized_shape, Tensor? weight, Tensor? bias, float eps) -> Tensor",
    reference=layer_norm_reference,
    supports=_takes,
    launch=_layer_norm,
    fake=_contiguous_like,
)
define(
    "add_layer_norm(Tensor x, Tensor residual, int[] normalized_shape, Tensor? weight, Tensor? bias, float eps)"
    " -> (Tensor, Tensor)",
    reference=add_layer_norm_reference,
    supports=_takes_sum,
    launch=_add_layer_norm,
    fake=_two_like_sum,
)
