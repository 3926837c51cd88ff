"""Two channels-last tensors side by side, at the speed of memory: what a UNet does with every skip connection.

In channels-last memory the rows of both alternate in the result, and PyTorch's kernel for that reaches a third of an H200's
bandwidth. Here each program copies a tile of rows by channels of one of the two, with wide vectors. (What is joined along
the same dimension in transformers are tokens of heads: those are copied by `rotary.py`'s kernel.)
"""

from __future__ import annotations

import torch
from torch import Tensor

from sfast.kernels import rotary
from sfast.kernels.op import define
from sfast.kernels.overlap import launch_options, wait_for_previous_kernel
from sfast.kernels.triton_or_none import tl, triton, triton_takes


def cat_channels_reference(a: Tensor, b: Tensor) -> Tensor:
    """a [N, A, *], b [N, B, *] -> [N, A + B, *]."""
    return torch.cat([a, b], 1)


def _cat(a: Tensor, b: Tensor) -> Tensor:
    tokens = rotary.cat_tokens(a, b, 1)
    if tokens is not None and rotary.takes(tokens):
        return rotary.process(tokens)
    A, C = a.shape[1], a.shape[1] + b.shape[1]
    y = a.new_empty((a.shape[0], *a.shape[2:], C))
    S = y.numel() // C
    tile = {"ROWS": 32, "CHANNELS": 64}
    blocks = triton.cdiv(A, tile["CHANNELS"]) + triton.cdiv(C - A, tile["CHANNELS"])
    programs = blocks * triton.cdiv(S, tile["ROWS"])
    _cat_tiles[(programs,)](a, b, y, S, A, C, **tile, **launch_options(a.device), num_warps=4)
    return y.movedim(-1, 1)


@triton.jit(do_not_specialize=["S"])
def _cat_tiles(
    a: tl.tensor,
    b: tl.tensor,
    y: tl.tensor,
    S: tl.tensor,
    A: tl.tensor,
    C: tl.tensor,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
    OVERLAP: tl.constexpr,
) -> None:
    """a [S, A] and b [S, C - A] into y [S, C]; blocks of a's channels come before blocks of b's."""
    blocks_a = tl.cdiv(A, CHANNELS)
    blocks = blocks_a + tl.cdiv(C - A, CHANNELS)
    block, piece = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    row = (piece.to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    wait_for_previous_kernel(OVERLAP)
    if block < blocks_a:
        channel = (block * CHANNELS + tl.arange(0, CHANNELS))[None, :]
        mask = (row < S) & (channel < A)
        tl.store(y + row * C + channel, tl.load(a + row * A + channel, mask=mask), mask=mask)
    else:
        channel = ((block - blocks_a) * CHANNELS + tl.arange(0, CHANNELS))[None, :]
        mask = (row < S) & (channel < C - A)
        tl.store(y + row * C + A + channel, tl.load(b + row * (C - A) + channel, mask=mask), mask=mask)


def _takes(a: Tensor, b: Tensor) -> bool:
    if rotary.takes(rotary.cat_tokens(a, b, 1)):
        return True
    if not triton_takes(a) or a.dim() not in (4, 5) or b.dim() != a.dim() or a.numel() == 0 or b.numel() == 0:
        return False
    alike = a.dtype == b.dtype and a.device == b.device and a.shape[0] == b.shape[0] and a.shape[2:] == b.shape[2:]
    return alike and all(_is_channels_last(x) for x in (a, b)) and a[:, 0].numel() < 2**31


def _is_channels_last(x: Tensor) -> bool:
    """Dense with the channels innermost, and nothing else: where sizes are 1 the result's layout is PyTorch's to choose."""
    return x.movedim(1, -1).is_contiguous() and not x.is_contiguous()


define(
    "cat_channels(Tensor a, Tensor b) -> Tensor",
    reference=cat_channels_reference,
    supports=_takes,
    launch=_cat,
    fake=cat_channels_reference,
)
