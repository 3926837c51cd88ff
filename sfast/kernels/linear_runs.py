"""A linear layer of only so many rows, which the GPU counts: the rest of them is not computed, and not even asked for.

The library's products have to know their sizes when they are launched. Here a program takes tile after tile until the counted
rows are done: for one row that takes as long as reading the weight, and for all of them somewhat longer than the library.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sfast.kernels.op import define
from sfast.kernels.overlap import launch_options, wait_for_previous_kernel
from sfast.kernels.triton_or_none import tl, triton, triton_takes

PROGRAMS = 3  # for each multiprocessor


def linear_runs_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, count: Tensor, silu: bool, like: Tensor | None
) -> Tensor:
    """x @ weightᵀ + bias, then SiLU if asked for, in `like`'s precision: x [.., K], weight [D, K], bias [D] -> [.., D].

    The result is defined in its first `count` [1] rows alone.
    """
    y = F.linear(x, weight, bias)
    y = F.silu(y) if silu else y
    return y if like is None else y.type_as(like)


def _linear_runs(
    x: Tensor, weight: Tensor, bias: Tensor | None, count: Tensor, silu: bool, like: Tensor | None
) -> Tensor:
    D, K = weight.shape
    y = _product(x, weight, bias, count, silu, like)
    _multiply_runs[(_programs(x.device),)](
        x,
        weight,
        weight if bias is None else bias,
        count,
        y,
        D,
        K,
        BIASED=bias is not None,
        SILU=silu,
        **_tile(x, y),
        **launch_options(x.device),
    )
    return y


def _tile(x: Tensor, y: Tensor) -> dict[str, Any]:
    """Of what size, and how fp32 is multiplied: three products of TF32 are more exact than bf16, if not as fp32."""
    recent = _has_tf32(x.device)
    if x.dtype == torch.float16 or (x.dtype == torch.bfloat16 and recent):
        return {"ROWS": 64, "COLUMNS": 64, "DEPTH": 64, "PRECISION": "ieee", "num_stages": 4, "num_warps": 4}
    if y.dtype != torch.float32 and recent:
        return {"ROWS": 64, "COLUMNS": 32, "DEPTH": 64, "PRECISION": "tf32x3", "num_stages": 3, "num_warps": 4}
    return {"ROWS": 64, "COLUMNS": 64, "DEPTH": 16, "PRECISION": "ieee", "num_stages": 3, "num_warps": 4}


@functools.cache
def _has_tf32(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


@functools.cache
def _programs(device: torch.device) -> int:
    return PROGRAMS * (torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1)


@triton.jit(do_not_specialize=["D"])
def _multiply_runs(
    x: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    count: tl.tensor,
    y: tl.tensor,
    D: tl.tensor,
    K: tl.tensor,
    BIASED: tl.constexpr,
    SILU: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
    OVERLAP: tl.constexpr,
) -> None:
    """Tiles of y [count, D] = x [count, K] weight [D, K]ᵀ, in rows of tiles."""
    wait_for_previous_kernel(OVERLAP)
    rows, across = tl.load(count), tl.cdiv(D, COLUMNS)
    for tile in range(tl.program_id(0), tl.cdiv(rows, ROWS) * across, tl.num_programs(0)):
        row = tile // across * ROWS + tl.arange(0, ROWS)
        column = tile % across * COLUMNS + tl.arange(0, COLUMNS)
        of_x, of_weight = row.to(tl.int64)[:, None] * K, column.to(tl.int64)[:, None] * K
        total = tl.zeros([ROWS, COLUMNS], tl.float32)
        for depth in range(0, K, DEPTH):
            lane = depth + tl.arange(0, DEPTH)[None, :]
            a = tl.load(x + of_x + lane, mask=(row < rows)[:, None] & (lane < K), other=0)
            b = tl.load(weight + of_weight + lane, mask=(column < D)[:, None] & (lane < K), other=0)
            total = tl.dot(a, tl.trans(b), total, input_precision=PRECISION)
        if BIASED:
            total += tl.load(bias + column, mask=column < D, other=0).to(tl.float32)[None, :]
        if SILU:
            total = total * tl.sigmoid(total)
        to = y + row.to(tl.int64)[:, None] * D + column[None, :]
        tl.store(to, total.to(y.dtype.element_ty), mask=(row < rows)[:, None] & (column < D)[None, :])


def _takes(x: Tensor, weight: Tensor, bias: Tensor | None, count: Tensor, silu: bool, like: Tensor | None) -> bool:
    factors = [each for each in (x, weight, bias) if each is not None]
    plain = all(
        each.dtype == x.dtype and each.device == x.device and each.is_contiguous() and each.numel() > 0
        for each in factors
    )
    if not plain or not triton_takes(x) or weight.dim() != 2 or weight.shape[1] != x.shape[-1]:
        return False
    counts = count.dtype == torch.int32 and count.numel() == 1 and count.device == x.device
    same = like is None or like.dtype == x.dtype or (x.dtype == torch.float32 and like.dtype in _HALF)
    return counts and same and (bias is None or bias.shape == weight.shape[:1])


_HALF = (torch.float16, torch.bfloat16)


def _product(x: Tensor, weight: Tensor, bias: Tensor | None, count: Tensor, silu: bool, like: Tensor | None) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]), dtype=x.dtype if like is None else like.dtype)


define(
    "linear_runs(Tensor x, Tensor weight, Tensor? bias, Tensor count, bool silu, Tensor? like) -> Tensor",
    reference=linear_runs_reference,
    supports=_takes,
    launch=_linear_runs,
    fake=_product,
)
