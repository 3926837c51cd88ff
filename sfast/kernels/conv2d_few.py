"""Convolutions between few channels and many: the first of a network and its last, at the speed of memory.

cuDNN's kernels want multiples of eight channels on both sides: they pad copies of the operands, waste most of a tile and leave
the bias to another kernel. Neither convolution computes much, so what counts is to touch the wide tensor once.

*few_in* (4 latent channels to 320): a pixel's whole patch is a row of at most 128 values; one product with all filters.
*few_out* (128 channels to 3 colours): a program walks down a strip of pixels, reads every row of it once, and multiplies it
with all taps. A row of inputs takes part in three rows of outputs, which are columns of one small matrix of sums; what comes
from the left and the right neighbour is brought there by shifting the products, and not the much wider input.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sfast.kernels.op import define
from sfast.kernels.overlap import launch_options, wait_for_previous_kernel
from sfast.kernels.triton_or_none import tl, triton, triton_takes

FEW = 8  # channels
MOST_TAPS = 128  # elements of a patch
PIXELS, FILTERS = 128, 64  # of a few_in tile
STRIP = 64  # pixels across that a few_out program reads, of which the two outermost are margin
MOST_CHANNELS = 128  # of x in few_out: all taps stay in shared memory


def conv2d_few_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> Tensor:
    """conv2d(x, weight) + bias: x [N, C, H, W], weight [K, C, R, S], bias [K] -> [N, K, P, Q]."""
    return F.conv2d(x, weight, bias, stride, padding, dilation, groups)


def takes(x: Tensor, weight: Tensor, bias: Tensor | None, *geometry: Any) -> bool:
    """Whether one of the kernels can compute conv2d of these, and faster than others do."""
    return few_in_takes(x, weight, bias, *geometry) or few_out_takes(x, weight, bias, *geometry)


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None, *geometry: Any) -> Tensor:
    return few_in(x, weight, bias, *geometry[:2]) if x.shape[1] <= FEW else few_out(x, weight, bias)


def few_in_takes(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> bool:
    """Whether `few_in` can compute this: x [N, C, H, W] of at most 8 channels, in any layout; weight channels-last."""
    K, C, R, S = weight.shape if weight.dim() == 4 else (0, 0, 0, 0)
    return (
        x.dim() == 4
        and 0 < C <= FEW
        and C * R * S <= MOST_TAPS
        and K >= 16
        and dilation == [1, 1]
        and sum((size - 1) * stride for size, stride in zip(x.shape[1:], x.stride()[1:], strict=True)) < 2**31
        and weight.is_contiguous(memory_format=torch.channels_last)
        and _takes(x, weight, bias, groups)
    )


def few_out_takes(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> bool:
    """Whether `few_out` can compute this: channels-last x, weight [K, C, 3, 3] of at most 8 outputs, a result of x's size."""
    K, C, R, S = weight.shape if weight.dim() == 4 else (0, 0, 0, 0)
    return (
        x.dim() == 4
        and 0 < K <= FEW
        and 16 <= C <= MOST_CHANNELS
        and (R, S) == (3, 3)
        and stride == padding == dilation == [1, 1]
        and x.is_contiguous(memory_format=torch.channels_last)
        and hasattr(tl, "gather")
        and _takes(x, weight, bias, groups)
    )


def _takes(x: Tensor, weight: Tensor, bias: Tensor | None, groups: int) -> bool:
    fits = 0 < x.numel() < x.shape[0] * 2**31 and x.shape[1] == weight.shape[1] and groups == 1
    half = x.dtype in (torch.float16, torch.bfloat16)  # products of fp32 would be rounded to TF32
    new = x.device.type != "cuda" or torch.cuda.get_device_capability(x.device) >= (8, 0)  # before, no tensor cores
    alike = all(p is None or (p.dtype == x.dtype and p.device == x.device) for p in (weight, bias))
    launchable = x.shape[0] <= 65535  # samples are an axis of the grid
    return fits and launchable and half and new and alike and (bias is None or bias.is_contiguous()) and triton_takes(x)


def few_in(x: Tensor, weight: Tensor, bias: Tensor | None, stride: list[int], padding: list[int]) -> Tensor:
    """conv2d of x [N, C, H, W] with weight [K, C, R, S], both as `few_in_takes` wants them -> [N, K, P, Q], channels-last."""
    N, C, H, W = x.shape
    K, _, R, S = weight.shape
    P, Q = (H + 2 * padding[0] - R) // stride[0] + 1, (W + 2 * padding[1] - S) // stride[1] + 1
    out = torch.empty((N, K, P, Q), dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    TAPS = max(16, triton.next_power_of_2(C * R * S))
    pieces = triton.cdiv(P * Q, PIXELS)
    few = pieces * N < 1024  # too few programs to hide their latency: others take the other filters
    _few_in[pieces, N, triton.cdiv(K, FILTERS) if few else 1](
        x,
        weight,
        weight if bias is None else bias,
        out,
        H,
        W,
        P,
        Q,
        K,
        *x.stride(),
        *stride,
        *padding,
        0 if bias is None else K,
        C=C,
        R=R,
        S=S,
        TAPS=TAPS,
        PIXELS=PIXELS,
        FILTERS=FILTERS,
        **launch_options(x.device),
        num_warps=4,
    )
    return out


@triton.jit(
    do_not_specialize=[
        *("H", "W", "P", "Q", "sample", "channel", "line", "column", "biased"),
        *("stride_h", "stride_w", "padding_h", "padding_w"),
    ]
)
def _few_in(
    x: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    out: tl.tensor,
    H: tl.tensor,
    W: tl.tensor,
    P: tl.tensor,
    Q: tl.tensor,
    K: tl.tensor,
    sample: tl.tensor,
    channel: tl.tensor,
    line: tl.tensor,
    column: tl.tensor,
    stride_h: tl.tensor,
    stride_w: tl.tensor,
    padding_h: tl.tensor,
    padding_w: tl.tensor,
    biased: tl.tensor,
    C: tl.constexpr,
    R: tl.constexpr,
    S: tl.constexpr,
    TAPS: tl.constexpr,
    PIXELS: tl.constexpr,
    FILTERS: tl.constexpr,
    OVERLAP: tl.constexpr,
) -> None:
    """PIXELS pixels of out, all filters: patches [PIXELS, TAPS] x filters [TAPS, FILTERS], a block of filters at a time."""
    n = tl.program_id(1).to(tl.int64)
    pixel = tl.program_id(0) * PIXELS + tl.arange(0, PIXELS)
    tap = tl.arange(0, TAPS)
    c, r, s = tap % C, tap // (C * S), tap // C % S  # in the order of a channels-last filter's memory
    h = (pixel // Q * stride_h - padding_h)[:, None] + r[None, :]
    w = (pixel % Q * stride_w - padding_w)[:, None] + s[None, :]
    inside = (h >= 0) & (h < H) & (w >= 0) & (w < W) & (pixel < P * Q)[:, None] & (tap < C * R * S)[None, :]
    k = tl.arange(0, FILTERS)

    wait_for_previous_kernel(OVERLAP)
    patch = tl.load(x + n * sample + c[None, :] * channel + h * line + w * column, mask=inside, other=0)
    to = out + (n * P * Q + pixel.to(tl.int64))[:, None] * K + k[None, :]
    for first in range(tl.program_id(2) * FILTERS, K, tl.num_programs(2) * FILTERS):
        live = first + k < K
        known = (tap < C * R * S)[:, None] & live[None, :]
        filters = tl.load(weight + (first + k)[None, :] * (C * R * S) + tap[:, None], mask=known, other=0)
        b = tl.load(bias + first + k, mask=first + k < biased, other=0).to(tl.float32)
        y = tl.dot(patch, filters) + b[None, :]
        tl.store(to + first, y.to(out.dtype.element_ty), mask=(pixel < P * Q)[:, None] & live[None, :])


def few_out(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """conv2d of x [N, C, H, W] with weight [K, C, 3, 3], both as `few_out_takes` wants them -> [N, K, H, W], channels-last."""
    N, C, H, W = x.shape
    K = weight.shape[0]
    out = torch.empty((N, K, H, W), dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    strips = triton.cdiv(W, STRIP - 2)
    rows = _rows(N * H * strips)
    _few_out[strips * triton.cdiv(H, rows), N](
        x,
        weight,
        weight if bias is None else bias,
        out,
        H,
        W,
        C,
        strips,
        rows,
        *weight.stride(),
        0 if bias is None else K,
        K=K,
        SUMS=16 if 3 * K <= 16 else 32,
        STRIP=STRIP,
        CHANNELS=triton.next_power_of_2(C),
        **launch_options(x.device),
        num_warps=4,
        num_stages=3,
    )
    return out


def _rows(total: int) -> int:
    """How many rows of outputs a program makes: it reads two more, which count where there are programs enough."""
    return 16 if total >= 4096 else 8


@triton.jit(do_not_specialize=["H", "W", "strips", "rows", "filter_stride", "channel", "line", "column", "biased"])
def _few_out(
    x: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    out: tl.tensor,
    H: tl.tensor,
    W: tl.tensor,
    C: tl.tensor,
    strips: tl.tensor,
    rows: tl.tensor,
    filter_stride: tl.tensor,
    channel: tl.tensor,
    line: tl.tensor,
    column: tl.tensor,
    biased: tl.tensor,
    K: tl.constexpr,
    SUMS: tl.constexpr,
    STRIP: tl.constexpr,
    CHANNELS: tl.constexpr,
    OVERLAP: tl.constexpr,
) -> None:
    """`rows` rows of a strip of out, which is STRIP - 2 pixels across."""
    n = tl.program_id(1).to(tl.int64)
    left = tl.program_id(0) % strips * (STRIP - 2) - 1
    top = tl.program_id(0) // strips * rows
    at, c, sum_ = tl.arange(0, STRIP), tl.arange(0, CHANNELS), tl.arange(0, SUMS)
    w = left + at
    r, k = sum_ // K, sum_ % K  # row h of x adds its products with row r of the filters to row h + 1 - r of out
    before = tl.broadcast_to(tl.maximum(at - 1, 0)[:, None], [STRIP, SUMS])
    behind = tl.broadcast_to(tl.minimum(at + 1, STRIP - 1)[:, None], [STRIP, SUMS])
    younger = tl.broadcast_to(tl.maximum(sum_ - K, 0)[None, :], [STRIP, SUMS])
    complete = (at > 0)[:, None] & (at < STRIP - 1)[:, None] & (w < W)[:, None] & (r == 2)[None, :]

    wait_for_previous_kernel(OVERLAP)
    taps = weight + k[None, :] * filter_stride + c[:, None] * channel + r[None, :] * line
    known = (r < 3)[None, :] & (c < C)[:, None]
    left_taps = tl.load(taps, mask=known, other=0)
    taps_here = tl.load(taps + column, mask=known, other=0)
    right_taps = tl.load(taps + 2 * column, mask=known, other=0)
    b = tl.load(bias + k, mask=k < biased, other=0).to(tl.float32)
    sums = tl.zeros([STRIP, SUMS], tl.float32)
    for step in range(rows + 2):
        h = top - 1 + step
        end = tl.where((h >= 0) & (h < H), W, 0)  # of a row outside there is nothing
        inside = ((w >= 0) & (w < end))[:, None] & (c < C)[None, :]
        row = tl.load(x + (n * H + h) * W * C + w[:, None] * C + c[None, :], mask=inside, other=0)
        sums = tl.where(sum_[None, :] >= K, tl.gather(sums, younger, axis=1), 0)  # one row further down
        sums += tl.dot(row, taps_here)
        sums += tl.gather(tl.dot(row, left_taps), before, axis=0)
        sums += tl.gather(tl.dot(row, right_taps), behind, axis=0)
        own = tl.where((h > top) & (h <= H), W, 0)  # the rows above and below belong to other programs
        to = out + ((n * H + h - 1) * W + w[:, None]) * K + k[None, :]
        tl.store(to, (sums + b[None, :]).to(out.dtype.element_ty), mask=complete & (w < own)[:, None])


define(
    "conv2d_few(Tensor x, Tensor weight, Tensor? bias, int[] stride, int[] padding, int[] dilation, int groups) -> Tensor",
    reference=conv2d_few_reference,
    supports=takes,
    launch=_convolve,
    fake=conv2d_few_reference,
)
