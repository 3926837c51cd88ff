"""Depthwise convolutions at the speed of memory, and with them the gate that halves their channels (Sana's feed-forward).

A filter for each channel is no matrix product: what counts is to read every pixel once. cuDNN's kernels for it are up to
twenty times slower than that, and the bias and the gate behind it read and write everything again. A program here walks down
a strip of pixels: a row of inputs takes part in three rows of outputs, whose sums wait in registers, and a finished row gets
its bias, is multiplied by SiLU of the other half's, and is written. Other filters than 3x3 gather their taps one by one.
"""

from __future__ import annotations

from collections.abc import Hashable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sfast.kernels import choice
from sfast.kernels.geglu import silu_gate_reference
from sfast.kernels.op import define
from sfast.kernels.overlap import launch_options, wait_for_previous_kernel
from sfast.kernels.triton_or_none import tl, triton, triton_takes

ops = torch.ops.sfast

STRIP, CHANNELS = 8, 64  # of a tile
ROWS = 16  # that a program walks down; it reads two more
PIXELS = 32  # of a tile that gathers taps

# x [N, C, H, W] channels-last, weight [C, 1, R, S], bias [C]


def conv2d_silu_gate_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> Tensor:
    """h * silu(gate) for the halves [h, gate] of conv2d(x, weight) + bias: x [N, C, H, W] -> [N, K / 2, P, Q]."""
    return silu_gate_reference(F.conv2d(x, weight, bias, stride, padding, dilation, groups), 1)


def takes(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> bool:
    """Whether the kernels can compute conv2d of these: one filter for each channel of channels-last x."""
    if x.dim() != 4 or weight.dim() != 4 or not triton_takes(x):
        return False
    (N, C, H, W), (R, S) = x.shape, weight.shape[2:]
    depthwise = weight.shape[:2] == (C, 1) and groups == C and C > 1
    if not (depthwise and x.numel() > 0 and R * S > 1 and len(padding) == len(stride) == 2):
        return False
    P, Q = _size(x, weight, stride, padding, dilation)
    fits = min(P, Q) > 0 and C * max(H * W, P * Q) < 2**31 and N * P * Q * triton.cdiv(C, CHANNELS) < 2**31
    alike = all(p is None or (p.dtype == x.dtype and p.device == x.device) for p in (weight, bias))
    dense = x.is_contiguous(memory_format=torch.channels_last) and (bias is None or bias.is_contiguous())
    return fits and alike and dense


def _size(x: Tensor, weight: Tensor, stride: list[int], padding: list[int], dilation: list[int]) -> tuple[int, int]:
    """Height and width of the result."""
    P, Q = (
        (x.shape[2 + d] + 2 * padding[d] - dilation[d] * (weight.shape[2 + d] - 1) - 1) // stride[d] + 1 for d in (0, 1)
    )
    return P, Q


def convolve(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    gates: bool = False,
) -> Tensor:
    """conv2d of what `takes` takes, or with its gate -> [N, C or C / 2, P, Q], channels-last."""
    (N, C, H, W), (R, S) = x.shape, weight.shape[2:]
    P, Q = _size(x, weight, stride, padding, dilation)
    out_channels = C // 2 if gates else C
    out = torch.empty((N, out_channels, P, Q), dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    taps = (
        weight.flatten(1).t().contiguous()
    )  # [R S, C]: a few percent of x, and a program then reads them side by side
    shape = {"GATES": gates, "BIASED": bias is not None, "CHANNELS": CHANNELS, **launch_options(x.device)}
    operands = x, taps, taps if bias is None else bias, out
    tiles = N * triton.cdiv(out_channels, CHANNELS)  # all along the one axis of a grid that may be longer than 65535
    if (R, S) == (3, 3) and stride == dilation == [1, 1]:
        strips, rows = triton.cdiv(Q, STRIP), min(P, ROWS)
        _depthwise_walk[(tiles * strips * triton.cdiv(P, rows),)](
            *operands, H, W, P, Q, C, strips, rows, *padding, STRIP=STRIP, **shape, num_warps=4
        )
    else:
        _depthwise_taps[(tiles * triton.cdiv(P * Q, PIXELS),)](
            *operands, H, W, P, Q, C, R, S, *stride, *padding, *dilation, PIXELS=PIXELS, **shape, num_warps=4
        )
    return out


@triton.jit
def _place(pieces: tl.tensor, channels: tl.tensor, CHANNELS: tl.constexpr) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """A program's sample, which of the pieces of that, and channels: those first, which share its cache lines."""
    blocks = tl.cdiv(channels, CHANNELS)
    rest = tl.program_id(0) // blocks
    c = tl.program_id(0) % blocks * CHANNELS + tl.arange(0, CHANNELS)
    return (rest // pieces).to(tl.int64), rest % pieces, c


@triton.jit(do_not_specialize=["H", "W", "P", "Q", "strips", "rows", "padding_h", "padding_w"])
def _depthwise_walk(
    x: tl.tensor,
    taps: tl.tensor,
    bias: tl.tensor,
    out: tl.tensor,
    H: tl.tensor,
    W: tl.tensor,
    P: tl.tensor,
    Q: tl.tensor,
    C: tl.tensor,
    strips: tl.tensor,
    rows: tl.tensor,
    padding_h: tl.tensor,
    padding_w: tl.tensor,
    GATES: tl.constexpr,
    BIASED: tl.constexpr,
    STRIP: tl.constexpr,
    CHANNELS: tl.constexpr,
    OVERLAP: tl.constexpr,
) -> None:
    """`rows` rows of STRIP pixels of out [N, P, Q, C or C / 2]: 3x3 filters, a stride of one. A gate's names end with _g."""
    own = C // 2 if GATES else C
    n, piece, c = _place(strips * tl.cdiv(P, rows), own, CHANNELS)
    known = c < own
    left, top = piece % strips * STRIP, piece // strips * rows
    q = left + tl.arange(0, STRIP)
    source, to = x + n * H * W * C + c[None, :], out + n * P * Q * own + c[None, :]

    wait_for_previous_kernel(OVERLAP)
    k, k_g = (), ()
    for tap in tl.static_range(9):
        k += (tl.load(taps + tap * C + c, mask=known, other=0).to(tl.float32)[None, :],)  # type: ignore[assignment]
        if GATES:
            k_g += (tl.load(taps + tap * C + own + c, mask=known, other=0).to(tl.float32)[None, :],)  # type: ignore[assignment]
    first, first_g = tl.zeros([STRIP, CHANNELS], tl.float32), tl.zeros([STRIP, CHANNELS], tl.float32)
    if BIASED:
        first += tl.load(bias + c, mask=known, other=0).to(tl.float32)[None, :]
        if GATES:
            first_g += tl.load(bias + own + c, mask=known, other=0).to(tl.float32)[None, :]
    above, here, above_g, here_g = first, first, first_g, first_g  # sums of the rows of out above h and at h

    for i in tl.range(0, rows + 2, num_stages=4):  # three rows are on their way while one is multiplied
        h, p = q * 0 + (top + i - padding_h), q * 0 + (top + i - 2)
        below, below_g = first, first_g
        for s in tl.static_range(3):
            w = q - padding_w + s
            inside = ((h >= 0) & (h < H) & (w >= 0) & (w < W))[:, None] & known[None, :]
            place = source + (h * W + w)[:, None] * C
            v = tl.load(place, mask=inside, other=0).to(tl.float32)
            above += v * k[6 + s]
            here += v * k[3 + s]
            below += v * k[s]
            if GATES:
                v = tl.load(place + own, mask=inside, other=0).to(tl.float32)
                above_g += v * k_g[6 + s]
                here_g += v * k_g[3 + s]
                below_g += v * k_g[s]
        if GATES:
            above *= above_g * tl.sigmoid(above_g)
        done = ((p >= top) & (p < P) & (q < Q))[:, None] & known[None, :]
        tl.store(to + (p * Q + q)[:, None] * own, above.to(out.dtype.element_ty), mask=done)
        above, here, above_g, here_g = here, below, here_g, below_g


@triton.jit(
    do_not_specialize=[
        *("H", "W", "P", "Q", "R", "S", "stride_h", "stride_w", "padding_h", "padding_w", "dilation_h", "dilation_w"),
    ]
)
def _depthwise_taps(
    x: tl.tensor,
    taps: tl.tensor,
    bias: tl.tensor,
    out: tl.tensor,
    H: tl.tensor,
    W: tl.tensor,
    P: tl.tensor,
    Q: tl.tensor,
    C: tl.tensor,
    R: tl.tensor,
    S: tl.tensor,
    stride_h: tl.tensor,
    stride_w: tl.tensor,
    padding_h: tl.tensor,
    padding_w: tl.tensor,
    dilation_h: tl.tensor,
    dilation_w: tl.tensor,
    GATES: tl.constexpr,
    BIASED: tl.constexpr,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
    OVERLAP: tl.constexpr,
) -> None:
    """PIXELS pixels of out [N, P, Q, C or C / 2], of any filter."""
    own = C // 2 if GATES else C
    n, piece, c = _place(tl.cdiv(P * Q, PIXELS), own, CHANNELS)
    pixel = piece * PIXELS + tl.arange(0, PIXELS)
    known, live = c < own, (pixel < P * Q)[:, None] & (c < own)[None, :]
    source = x + n * H * W * C + c[None, :]

    wait_for_previous_kernel(OVERLAP)
    y, gate = tl.zeros([PIXELS, CHANNELS], tl.float32), tl.zeros([PIXELS, CHANNELS], tl.float32)
    for tap in range(R * S):
        h = pixel // Q * stride_h - padding_h + tap // S * dilation_h
        w = pixel % Q * stride_w - padding_w + tap % S * dilation_w
        inside = ((h >= 0) & (h < H) & (w >= 0) & (w < W))[:, None] & live
        place = source + (h * W + w)[:, None] * C
        k = tl.load(taps + tap * C + c, mask=known, other=0).to(tl.float32)
        y += tl.load(place, mask=inside, other=0).to(tl.float32) * k[None, :]
        if GATES:
            k = tl.load(taps + tap * C + own + c, mask=known, other=0).to(tl.float32)
            gate += tl.load(place + own, mask=inside, other=0).to(tl.float32) * k[None, :]
    if BIASED:
        y += tl.load(bias + c, mask=known, other=0).to(tl.float32)[None, :]
        if GATES:
            gate += tl.load(bias + own + c, mask=known, other=0).to(tl.float32)[None, :]
    if GATES:
        y *= gate * tl.sigmoid(gate)
    tl.store(out + (n * P * Q + pixel[:, None]) * own + c[None, :], y.to(out.dtype.element_ty), mask=live)


def _gated(x: Tensor, weight: Tensor, bias: Tensor | None, *geometry: Any) -> Tensor:
    operands = x, weight, bias, *geometry
    question, layer = ask("gated convolution", *operands)
    return choice.fastest(question, {"apart": _apart, "in one": partial(convolve, gates=True)}, *operands, layer=layer)


def _apart(x: Tensor, weight: Tensor, bias: Tensor | None, *geometry: Any) -> Tensor:
    convolved = F.conv2d(x, weight, bias, *geometry) if bias is None else ops.conv2d_bias(x, weight, bias, *geometry)
    gated: Tensor = ops.silu_gate(convolved, 1)
    return gated


def ask(what: str, x: Tensor, weight: Tensor, bias: Tensor | None, *geometry: Any) -> tuple[str, Hashable]:
    """A question for `choice.fastest` about a convolution of groups, and the layer that asks it."""
    layer = what, x.dtype, x.shape[1], weight.shape, bias is None, repr(geometry)
    return (
        f"{what} of {x.dtype} {list(x.shape)}, {list(weight.shape)}, {'no ' if bias is None else ''}bias, {geometry}",
        layer,
    )


def _takes_gate(x: Tensor, weight: Tensor, bias: Tensor | None, *geometry: Any) -> bool:
    return takes(x, weight, bias, *geometry) and weight.shape[0] % 2 == 0


define(
    "conv2d_silu_gate(Tensor x, Tensor weight, Tensor? bias, int[] stride, int[] padding, int[] dilation, int groups)"
    " -> Tensor",
    reference=conv2d_silu_gate_reference,
    supports=_takes_gate,
    launch=_gated,
    fake=conv2d_silu_gate_reference,
)
