"""Runs of equal rows: what is computed row by row from them need be computed once for each run, and is read by all of it.

Some video models take a timestep for each token, to know frames that they are given from those that they draw. Their
embedding and modulation, as large as all activations, then say the same again and again: for every token, or for every
frame. Which rows equal the row before them is found out here on the GPU at every call, bit for bit, so nothing is assumed
and no host waits: `runs` puts one row of each run next to each other and says to every row which is its own.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sfast.kernels.op import define
from sfast.kernels.overlap import launch_options, wait_for_previous_kernel
from sfast.kernels.triton_or_none import tl, triton, triton_takes

ROWS, COLUMNS = 16, 256  # of a tile
AT_ONCE = 4096  # rows that are numbered at once


def runs_reference(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(first, run, count) of x [.., K]: rows that equal their predecessors, bit for bit, are one run.

    first [.., K] has one row of each run, in order, and behind those `count` [1] rows anything; run [rows of x] is the place
    of each row's run. Both are int32.
    """
    rows = x.reshape(-1, x.shape[-1])
    bits = rows.contiguous().view(_BITS[x.element_size()])
    starts = torch.cat([bits.new_ones(1).bool(), (bits[1:] != bits[:-1]).any(1)]) if len(rows) else bits.new_ones(0)
    run = starts.cumsum(0) - 1
    first = torch.zeros_like(rows, memory_format=torch.contiguous_format).index_copy(0, run, rows)
    return first.view(x.shape), run.int(), starts.sum().int().view(1)


_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def spread(first: Tensor, run: Tensor) -> Tensor:
    """To each row its run's: first [.., *], run [rows] -> [.., *], for as many leading dimensions as hold those rows."""
    leading = 1
    while first.shape[:leading].numel() != run.numel() and leading < first.dim():
        leading += 1
    return first.flatten(0, leading - 1).index_select(0, run).view(first.shape)


def _runs(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    N, K = rows.shape
    first, (starts, run, count) = (
        x.new_empty(x.shape),
        (x.new_empty(size, dtype=torch.int32) for size in (N, N, 1)),
    )
    options = launch_options(x.device)
    bits = _BITS[x.element_size()]
    grid = (triton.cdiv(N, ROWS),)
    _mark[grid](rows.view(bits), starts, N, K, ROWS=ROWS, COLUMNS=COLUMNS, **options, num_warps=4)
    _number[(1,)](starts, run, count, N, AT_ONCE=AT_ONCE, **options, num_warps=8)
    _gather[grid](
        rows.view(bits), starts, run, first.view(bits), N, K, ROWS=ROWS, COLUMNS=COLUMNS, **options, num_warps=4
    )
    return first, run, count


@triton.jit(do_not_specialize=["N"])
def _mark(
    x: tl.tensor,
    starts: tl.tensor,
    N: tl.tensor,
    K: tl.tensor,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    OVERLAP: tl.constexpr,
) -> None:
    """starts [N] = whether a row of x [N, K] differs from the one before it."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    at = row.to(tl.int64)[:, None] * K
    inside, lane = ((row > 0) & (row < N))[:, None], tl.arange(0, COLUMNS)[None, :]
    differs = tl.zeros([ROWS, COLUMNS], tl.int32)
    wait_for_previous_kernel(OVERLAP)
    for column in range(0, K, COLUMNS):
        mask = inside & (column + lane < K)
        own = tl.load(x + at + column + lane, mask=mask, other=0)
        before = tl.load(x + at - K + column + lane, mask=mask, other=0)
        differs |= (own != before).to(tl.int32)
    tl.store(starts + row, tl.where(row == 0, 1, tl.max(differs, axis=1)), mask=row < N)


@triton.jit(do_not_specialize=["N"])
def _number(
    starts: tl.tensor, run: tl.tensor, count: tl.tensor, N: tl.tensor, AT_ONCE: tl.constexpr, OVERLAP: tl.constexpr
) -> None:
    """run [N]: how many starts there are up to a row, less one; count [1]: how many in all. One program."""
    lane = tl.arange(0, AT_ONCE)
    before = tl.program_id(0)  # 0
    wait_for_previous_kernel(OVERLAP)
    for row in range(0, N, AT_ONCE):
        mask = row + lane < N
        started = tl.load(starts + row + lane, mask=mask, other=0)
        tl.store(run + row + lane, before + tl.cumsum(started, 0) - 1, mask=mask)
        before += tl.sum(started, 0)
    tl.store(count, before)


@triton.jit(do_not_specialize=["N"])
def _gather(
    x: tl.tensor,
    starts: tl.tensor,
    run: tl.tensor,
    first: tl.tensor,
    N: tl.tensor,
    K: tl.tensor,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    OVERLAP: tl.constexpr,
) -> None:
    """The rows of x [N, K] that start a run, to their places in first [N, K]."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    lane = tl.arange(0, COLUMNS)[None, :]
    wait_for_previous_kernel(OVERLAP)
    started = tl.load(starts + row, mask=row < N, other=0) != 0
    to = tl.load(run + row, mask=row < N, other=0).to(tl.int64)[:, None] * K
    at = row.to(tl.int64)[:, None] * K
    for column in range(0, K, COLUMNS):
        mask = started[:, None] & (column + lane < K)
        tl.store(first + to + column + lane, tl.load(x + at + column + lane, mask=mask, other=0), mask=mask)


def _takes(x: Tensor) -> bool:
    return triton_takes(x) and x.dim() > 0 and x.numel() > 0 and x.numel() // x.shape[-1] < 2**31


def _fake(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    rows = x.shape[:-1].numel()
    return x.new_empty(x.shape), x.new_empty(rows, dtype=torch.int32), x.new_empty(1, dtype=torch.int32)


define(
    "runs(Tensor x) -> (Tensor, Tensor, Tensor)", reference=runs_reference, supports=_takes, launch=_runs, fake=_fake
)
