"""Blend two tensors, `alpha x + (1 - alpha) y`, in one pass: what a video model does with its spatial and temporal halves.

Eager needs three kernels, two of which broadcast alpha at half the speed of memory, and before them one that adds a residual
and one that brings the temporal half, computed place by place, back into the order of frames. Here y is read where it lies.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sfast.kernels.op import define
from sfast.kernels.overlap import launch_options, wait_for_previous_kernel
from sfast.kernels.triton_or_none import tl, triton, triton_takes

ROWS, COLUMNS = 64, 64  # of a tile
ADD_X, ADD_RESIDUAL = 1, 2  # bits of `flags`; a run-time value, so that all variants share one compilation

# x [N, C, F, H, W] in channels-last memory, or tokens [N, L, C]; alpha broadcasts and is the same throughout a frame.


def blend_reference(x: Tensor, y: Tensor, alpha: Tensor) -> Tensor:
    """alpha x + (1 - alpha) y: x and y of one shape."""
    return alpha * x + (1.0 - alpha) * y


def blend_add_reference(x: Tensor, y: Tensor, alpha: Tensor) -> Tensor:
    """alpha x + (1 - alpha) (x + y): x and y of one shape."""
    return alpha * x + (1.0 - alpha) * (x + y)


def blend_transposed_reference(x: Tensor, y: Tensor, alpha: Tensor, grid: list[int], shape: list[int]) -> Tensor:
    """alpha x + (1 - alpha) yᵀ: y [B * L, F, C], grid [B, L, F, C], and x of shape [B * F, L, C]."""
    return alpha * x + (1.0 - alpha) * y.unsqueeze(0).reshape(grid).permute(0, 2, 1, 3).reshape(shape)


def blend_transposed_add_reference(
    x: Tensor, y: Tensor, residual: Tensor, alpha: Tensor, grid: list[int], shape: list[int]
) -> Tensor:
    """alpha x + (1 - alpha) (y + residual)ᵀ, in the shapes of `blend_transposed`."""
    return blend_transposed_reference(x, y + residual, alpha, grid, shape)


def _blend(x: Tensor, y: Tensor, alpha: Tensor) -> Tensor:
    return _launch(x, _rows(y).contiguous(), None, alpha, 0)


def _blend_add(x: Tensor, y: Tensor, alpha: Tensor) -> Tensor:
    return _launch(x, _rows(y).contiguous(), None, alpha, ADD_X)


def _blend_transposed(x: Tensor, y: Tensor, alpha: Tensor, grid: list[int], shape: list[int]) -> Tensor:
    return _launch(x, y.contiguous().view(grid).transpose(1, 2), None, alpha, 0)


def _blend_transposed_add(
    x: Tensor, y: Tensor, residual: Tensor, alpha: Tensor, grid: list[int], shape: list[int]
) -> Tensor:
    return _launch(x, y.contiguous().view(grid).transpose(1, 2), residual.contiguous(), alpha, ADD_RESIDUAL)


def _rows(x: Tensor) -> Tensor:
    """x as samples of frames of rows of channels, [N, F, L, C]; one sample where it is tokens."""
    return x.permute(0, 2, 3, 4, 1).flatten(2, 3) if x.dim() == 5 else x.unsqueeze(0)


def _launch(x: Tensor, y: Tensor, residual: Tensor | None, alpha: Tensor, flags: int) -> Tensor:
    """x dense, y [N, F, L, C] in any order of rows; the residual lies in memory like y."""
    out = torch.empty_like(x)
    N, F, L, C = y.shape
    every = alpha.expand_as(x)  # its strides say how alpha runs over frames
    if x.dim() == 5:
        sample_step, frame_step = every.stride(0), every.stride(2)
    else:
        sample_step, frame_step = F * every.stride(0), every.stride(0)
    rows = N * F * L
    _blend_rows[triton.cdiv(rows, ROWS), triton.cdiv(C, COLUMNS)](
        x,
        y,
        y if residual is None else residual,
        alpha,
        out,
        rows,
        F,
        L,
        C,
        *y.stride()[:3],
        sample_step,
        frame_step,
        flags,
        ROWS=ROWS,
        COLUMNS=COLUMNS,
        **launch_options(x.device),
        num_warps=4,
    )
    return out


@triton.jit(do_not_specialize=["rows", "F", "L", "y_sample", "y_frame", "y_row", "sample_step", "frame_step", "flags"])
def _blend_rows(
    x: tl.tensor,
    y: tl.tensor,
    residual: tl.tensor,
    alpha: tl.tensor,
    out: tl.tensor,
    rows: tl.tensor,
    F: tl.tensor,
    L: tl.tensor,
    C: tl.tensor,
    y_sample: tl.tensor,
    y_frame: tl.tensor,
    y_row: tl.tensor,
    sample_step: tl.tensor,
    frame_step: tl.tensor,
    flags: tl.tensor,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    OVERLAP: tl.constexpr,
) -> None:
    """A tile [ROWS, COLUMNS] of out; strides of y are in elements, those of its rows multiples of C."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    live = row < rows
    mask = live[:, None] & (column < C)[None, :]
    place, frame, sample = row % L, row // L % F, row // L // F
    offset = row.to(tl.int64)[:, None] * C + column[None, :]
    # In units of C, so that the compiler sees how wide it may read.
    source = sample.to(tl.int64) * (y_sample // C) + frame * (y_frame // C) + place * (y_row // C)
    y_offset = source[:, None] * C + column[None, :]

    wait_for_previous_kernel(OVERLAP)
    a = tl.load(alpha + sample * sample_step + frame * frame_step, mask=live, other=0).to(tl.float32)[:, None]
    v = tl.load(x + offset, mask=mask, other=0).to(tl.float32)
    w = tl.load(y + y_offset, mask=mask, other=0).to(tl.float32)
    if flags & 1 != 0:
        w += v
    if flags & 2 != 0:
        w += tl.load(residual + y_offset, mask=mask, other=0).to(tl.float32)
    tl.store(out + offset, (a * v + (1 - a) * w).to(out.dtype.element_ty), mask=mask)


def _takes(x: Tensor, y: Tensor, alpha: Tensor) -> bool:
    return x.shape == y.shape and _takes_blend(x, alpha, y, alpha)


def _takes_transposed(x: Tensor, y: Tensor, alpha: Tensor, grid: list[int], shape: list[int]) -> bool:
    if x.dim() != 3 or y.dim() != 3 or len(grid) != 4 or list(x.shape) != list(shape):
        return False
    B, L, F, C = grid
    turned = min(grid) > 0 and x.shape == (B * F, L, C) and y.numel() == x.numel() and y.shape[-1] == C
    return turned and _takes_blend(x, alpha, y, alpha)


def _takes_transposed_add(
    x: Tensor, y: Tensor, residual: Tensor, alpha: Tensor, grid: list[int], shape: list[int]
) -> bool:
    alike = residual.shape == y.shape and residual.dtype == x.dtype and residual.device == x.device
    return alike and _takes_transposed(x, y, alpha, grid, shape)


def _takes_blend(x: Tensor, alpha: Tensor, *others: Tensor) -> bool:
    if not triton_takes(x) or x.numel() == 0 or x.dim() not in (3, 5) or alpha.dim() > x.dim():
        return False
    if any(other.dtype != x.dtype or other.device != x.device for other in others):
        return False
    dense = x.is_contiguous(memory_format=torch.channels_last_3d) if x.dim() == 5 else x.is_contiguous()
    sizes = [1] * (x.dim() - alpha.dim()) + list(alpha.shape)
    frames = (0, 2) if x.dim() == 5 else (0,)
    broadcasts = all(size == 1 or (d in frames and size == x.shape[d]) for d, size in enumerate(sizes))
    return dense and broadcasts and x.numel() // x.shape[1 if x.dim() == 5 else 2] < 2**31


def _like(x: Tensor, *rest: object) -> Tensor:
    return torch.empty_like(x)


define(
    "blend(Tensor x, Tensor y, Tensor alpha) -> Tensor",
    reference=blend_reference,
    supports=_takes,
    launch=_blend,
    fake=_like,
)
define(
    "blend_add(Tensor x, Tensor y, Tensor alpha) -> Tensor",
    reference=blend_add_reference,
    supports=_takes,
    launch=_blend_add,
    fake=_like,
)
define(
    "blend_transposed(Tensor x, Tensor y, Tensor alpha, int[] grid, int[] shape) -> Tensor",
    reference=blend_transposed_reference,
    supports=_takes_transposed,
    launch=_blend_transposed,
    fake=_like,
)
define(
    "blend_transposed_add(Tensor x, Tensor y, Tensor residual, Tensor alpha, int[] grid, int[] shape) -> Tensor",
    reference=blend_transposed_add_reference,
    supports=_takes_transposed_add,
    launch=_blend_transposed_add,
    fake=_like,
)
