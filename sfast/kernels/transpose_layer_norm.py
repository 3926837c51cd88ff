"""Tokens of a video, brought from the order of frames into the order of places and normalized, in one pass.

Attention over time wants the tokens of one place next to each other. Eager adds the frame's embedding, copies everything
into that order and normalizes the copy: three kernels, of which the first two run at half the speed of memory. Here a row
of channels is read once and written twice, as the sum and normalized; another residual before all that costs one read more.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sfast.kernels.layer_norm import MAX_WIDTH, TILE
from sfast.kernels.op import define
from sfast.kernels.overlap import launch_options, wait_for_previous_kernel
from sfast.kernels.triton_or_none import tl, triton, triton_takes

ADD, WEIGHT, BIAS = 1, 2, 4  # bits of `flags`; a run-time value, so that all variants share one compilation

# x and residual [B * F, L, C], shift [B * F, 1, C], grid [B, F, L, C], shape [B * L, F, C], normalized_shape [C].


def shift_transpose_layer_norm_reference(
    x: Tensor,
    shift: Tensor,
    grid: list[int],
    shape: list[int],
    normalized_shape: list[int],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """(layer_norm(turned), turned), where turned [B * L, F, C] is x + shift in the order of places."""
    turned = (x + shift).unsqueeze(0).reshape(grid).permute(0, 2, 1, 3).reshape(shape)
    return F.layer_norm(turned, normalized_shape, weight, bias, eps), turned


def add_shift_transpose_layer_norm_reference(
    x: Tensor,
    residual: Tensor,
    shift: Tensor,
    grid: list[int],
    shape: list[int],
    normalized_shape: list[int],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """(layer_norm(turned), turned, total), where total is x + residual, and turned is total + shift in the order of places."""
    total = x + residual
    turned = (total + shift).unsqueeze(0).reshape(grid).permute(0, 2, 1, 3).reshape(shape)
    return F.layer_norm(turned, normalized_shape, weight, bias, eps), turned, total


def _shift_transpose_layer_norm(
    x: Tensor,
    shift: Tensor,
    grid: list[int],
    shape: list[int],
    normalized_shape: list[int],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    return _launch(x, None, shift, grid, weight, bias, eps)[:2]


def _add_shift_transpose_layer_norm(
    x: Tensor,
    residual: Tensor,
    shift: Tensor,
    grid: list[int],
    shape: list[int],
    normalized_shape: list[int],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    return _launch(x, residual, shift, grid, weight, bias, eps)


def _launch(
    x: Tensor,
    residual: Tensor | None,
    shift: Tensor,
    grid: list[int],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    x, shift = x.contiguous(), shift.contiguous()
    B, frames, L, C = grid
    y, turned = x.new_empty(B * L, frames, C), x.new_empty(B * L, frames, C)
    total = x if residual is None else torch.empty_like(x)
    flags = (
        (ADD if residual is not None else 0) | (WEIGHT if weight is not None else 0) | (BIAS if bias is not None else 0)
    )
    rows = B * frames * L
    WIDTH = triton.next_power_of_2(C)
    ROWS = max(1, TILE // WIDTH)
    _turn_rows[(triton.cdiv(rows, ROWS),)](
        x,
        x if residual is None else residual.contiguous(),
        shift,
        x if weight is None else weight.contiguous(),
        x if bias is None else bias.contiguous(),
        y,
        turned,
        total,
        rows,
        frames,
        L,
        C,
        eps,
        flags,
        ROWS=ROWS,
        WIDTH=WIDTH,
        **launch_options(x.device),
        num_warps=min(16, max(4, WIDTH // 512)),
    )
    return y, turned, total


@triton.jit(do_not_specialize=["rows", "frames", "L", "flags"])
def _turn_rows(
    x: tl.tensor,
    residual: tl.tensor,
    shift: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    y: tl.tensor,
    turned: tl.tensor,
    total: tl.tensor,
    rows: tl.tensor,
    frames: tl.tensor,
    L: tl.tensor,
    C: tl.tensor,
    eps: tl.tensor,
    flags: tl.tensor,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    OVERLAP: tl.constexpr,
) -> None:
    """ROWS rows of C channels, in the order in which they are written."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    lane = tl.arange(0, WIDTH)
    live = (lane < C)[None, :]
    mask = (row < rows)[:, None] & live
    picture = row // frames // L * frames + row % frames
    source = picture * L + row // frames % L
    at, to = source.to(tl.int64)[:, None] * C + lane[None, :], row.to(tl.int64)[:, None] * C + lane[None, :]

    wait_for_previous_kernel(OVERLAP)
    v = tl.load(x + at, mask=mask, other=0).to(tl.float32)
    if flags & 1 != 0:
        v += tl.load(residual + at, mask=mask, other=0).to(tl.float32)
        tl.store(total + at, v.to(total.dtype.element_ty), mask=mask)
    v += tl.load(shift + picture.to(tl.int64)[:, None] * C + lane[None, :], mask=mask, other=0).to(tl.float32)
    tl.store(turned + to, v.to(turned.dtype.element_ty), mask=mask)
    v -= (tl.sum(v, axis=1) / C)[:, None]
    variance = tl.sum(tl.where(live, v * v, 0), axis=1) / C

    weighted = flags >> 1 & 1
    w = tl.load(weight + lane, mask=lane < C * weighted, other=0).to(tl.float32) + (1 - weighted)
    b = tl.load(bias + lane, mask=lane < C * (flags >> 2 & 1), other=0).to(tl.float32)
    v = v * tl.rsqrt(variance + eps)[:, None] * w[None, :] + b[None, :]
    tl.store(y + to, v.to(y.dtype.element_ty), mask=mask)


def _takes(
    x: Tensor,
    shift: Tensor,
    grid: list[int],
    shape: list[int],
    normalized_shape: list[int],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> bool:
    if not triton_takes(x) or x.numel() == 0 or x.dim() != 3 or len(grid) != 4 or min(grid) < 1:
        return False
    B, frames, L, C = grid
    turns = x.shape == (B * frames, L, C) and list(shape) == [B * L, frames, C] and list(normalized_shape) == [C]
    if not turns or shift.shape != (B * frames, 1, C) or C > MAX_WIDTH or B * frames * L >= 2**31:
        return False
    if shift.dtype != x.dtype or shift.device != x.device:
        return False
    return all(p is None or (p.shape == (C,) and p.dtype == x.dtype and p.device == x.device) for p in (weight, bias))


def _takes_sum(x: Tensor, residual: Tensor, *rest: object) -> bool:
    same = residual.shape == x.shape and residual.dtype == x.dtype and residual.device == x.device
    return same and _takes(x, *rest)  # type: ignore[arg-type]


def _two_turned(x: Tensor, shift: Tensor, grid: list[int], shape: list[int], *rest: object) -> tuple[Tensor, Tensor]:
    return x.new_empty(shape), x.new_empty(shape)


def _two_turned_and_sum(
    x: Tensor, residual: Tensor, shift: Tensor, grid: list[int], shape: list[int], *rest: object
) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(shape), x.new_empty(shape), torch.empty_like(x + residual)


define(
    "shift_transpose_layer_norm(Tensor x, Tensor shift, int[] grid, int[] shape, int[] normalized_shape, Tensor? weight,"
    " Tensor? bias, float eps) -> (Tensor, Tensor)",
    reference=shift_transpose_layer_norm_reference,
    supports=_takes,
    launch=_shift_transpose_layer_norm,
    fake=_two_turned,
)
define(
    "add_shift_transpose_layer_norm(Tensor x, Tensor residual, Tensor shift, int[] grid, int[] shape,"
    " int[] normalized_shape, Tensor? weight, Tensor? bias, float eps) -> (Tensor, Tensor, Tensor)",
    reference=add_shift_transpose_layer_norm_reference,
    supports=_takes_sum,
    launch=_add_shift_transpose_layer_norm,
    fake=_two_turned_and_sum,
)
