"""GroupNorm, with the per-channel shift before it and the SiLU after it, at the speed of memory.

A group is large (megabytes at the end of a VAE) and there are few of them, so one program for each leaves most of a GPU
idle. Here the work is cut without regard to groups, into tiles that lie in memory order, channels-last or not:

1. *moments*: each program takes some rows of some channels and writes mean and M2 (the sum of squared deviations) of every
   channel. It sums x - pilot, where the pilot is its own first row: however far the data is from zero nothing cancels,
   because a pilot is never more than sqrt(rows) standard deviations from the mean of the rows it belongs to.
2. *merge*: one program for each group merges these by Chan's formula and writes center, scale and offset of its channels.
3. *apply*: one read, one write, `(x - center) * scale + offset`, and SiLU. It walks backwards, because the end of x is what
   the L2 cache still holds.

The shift moves a channel's mean and nothing else, so it costs no pass of its own. Where a group is small, one program keeps
it in registers and a single launch does everything. Arithmetic is fp32 throughout and rounded once, when y is stored.

The formula for merging: Chan, Golub, LeVeque, "Algorithms for computing the sample variance" (1983).
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from sfast.kernels.op import define
from sfast.kernels.overlap import launch_options, wait_for_previous_kernel
from sfast.kernels.triton_or_none import tl, triton, triton_takes

IN_REGISTERS = 32768  # elements of a group that one program can keep
LARGE = 1 << 24  # elements of x from which on throughput counts for more than latency
SILU, SHIFT, WEIGHT, BIAS = 1, 2, 4, 8  # bits of `flags`; a run-time value, so that all variants share one compilation


def group_norm_reference(x: Tensor, num_groups: int, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """group_norm(x): x [N, C, *], weight [C], bias [C] -> [N, C, *]."""
    return F.group_norm(x, num_groups, weight, bias, eps)


def group_norm_silu_reference(
    x: Tensor, num_groups: int, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    """silu(group_norm(x)): x [N, C, *], weight [C], bias [C] -> [N, C, *]."""
    return F.silu(F.group_norm(x, num_groups, weight, bias, eps))


def add_group_norm_silu_reference(
    x: Tensor, shift: Tensor, num_groups: int, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    """silu(group_norm(x + shift)): x [N, C, *], shift [N, C, 1, 1] (or any that broadcasts) -> [N, C, *]."""
    return F.silu(F.group_norm(x + shift, num_groups, weight, bias, eps))


def _group_norm(x: Tensor, num_groups: int, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    return _launch(x, None, num_groups, weight, bias, eps, 0)


def _group_norm_silu(x: Tensor, num_groups: int, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    return _launch(x, None, num_groups, weight, bias, eps, SILU)


def _add_group_norm_silu(
    x: Tensor, shift: Tensor, num_groups: int, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    per_channel = shift.dim() == x.dim() and shift.shape[0] in (1, x.shape[0]) and shift.shape[1] == x.shape[1]
    if per_channel and shift.shape[2:].numel() == 1:
        return _launch(x, shift, num_groups, weight, bias, eps, SILU | SHIFT)
    return _launch(x + shift, None, num_groups, weight, bias, eps, SILU)


def _launch(
    x: Tensor, shift: Tensor | None, G: int, weight: Tensor | None, bias: Tensor | None, eps: float, flags: int
) -> Tensor:
    N, C = x.shape[:2]
    S = x.shape[2:].numel()
    channels_last = S == 1 or (C > 1 and x.movedim(1, -1).is_contiguous())
    if not channels_last:
        x = x.contiguous()
    row_stride, channel_stride = (C, 1) if channels_last else (1, S)
    y = torch.empty_like(x)
    flags |= (WEIGHT if weight is not None else 0) | (BIAS if bias is not None else 0)
    weight = x if weight is None else weight.contiguous()
    bias = x if bias is None else bias.contiguous()
    shift = x if shift is None else shift.expand(N, *shift.shape[1:]).reshape(N, C).contiguous()

    options = launch_options(x.device)

    PER_GROUP = C // G
    ROWS, CHANNELS = triton.next_power_of_2(S), triton.next_power_of_2(PER_GROUP)
    if ROWS * CHANNELS <= IN_REGISTERS:
        shape = {"PER_GROUP": PER_GROUP, "ROWS": ROWS, "CHANNELS": CHANNELS}
        warps = max(1, min(16, ROWS * CHANNELS // 512))
        _whole_group[G, N](
            x, y, shift, weight, bias, S, C, row_stride, channel_stride, eps, flags, **shape, **options, num_warps=warps
        )
        return y

    tile, per_multiprocessor = _tile(channels_last, x.numel())
    ROWS, CHANNELS = tile["ROWS"], tile["CHANNELS"]
    blocks = triton.cdiv(C, CHANNELS)
    part_rows = _part_rows(S, ROWS, N * blocks, per_multiprocessor * _multiprocessors(x.device))
    parts = triton.cdiv(S, part_rows)
    moments = x.new_empty(2, N, parts, C, dtype=torch.float32)
    table = x.new_empty(3, N, C, dtype=torch.float32)
    _moments[blocks * parts, N](x, moments, S, C, row_stride, channel_stride, part_rows, parts, **tile, **options)
    _merge[G, N](
        moments, table, shift, weight, bias, S, C, part_rows, parts, eps, flags, ENTRIES=1024, CHANNELS=128, **options
    )
    rows = ROWS * _tiles_per_program(S, ROWS, N * blocks, x.device)
    _apply[blocks * triton.cdiv(S, rows), N](
        x, y, table, S, C, row_stride, channel_stride, rows, flags, **tile, **options
    )
    return y


def _tile(channels_last: bool, elements: int) -> tuple[dict[str, int], int]:
    """(the tile, how many programs for each multiprocessor make moments fastest), as measured on an H200."""
    if not channels_last:
        return {"ROWS": 256, "CHANNELS": 16, "num_warps": 4}, 4
    if elements < LARGE:
        return {"ROWS": 64, "CHANNELS": 32, "num_warps": 2}, 4
    return {"ROWS": 64, "CHANNELS": 64, "num_warps": 4}, 2


def _part_rows(S: int, ROWS: int, neighbours: int, programs: int) -> int:
    """How many rows one moments program takes: a multiple of ROWS that makes about `programs` programs."""
    parts = max(1, programs // neighbours)
    return triton.cdiv(triton.cdiv(S, parts), ROWS) * ROWS


def _tiles_per_program(S: int, ROWS: int, neighbours: int, device: torch.device) -> int:
    """How many tiles one apply program takes: one, until there are many programs for each multiprocessor."""
    return max(1, min(8, triton.cdiv(S, ROWS) * neighbours // (16 * _multiprocessors(device))))


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


@triton.jit(do_not_specialize=["S", "flags"])
def _whole_group(
    x: tl.tensor,
    y: tl.tensor,
    shift: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    S: tl.tensor,
    C: tl.tensor,
    row_stride: tl.tensor,
    channel_stride: tl.tensor,
    eps: tl.tensor,
    flags: tl.tensor,
    PER_GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
    OVERLAP: tl.constexpr,
) -> None:
    """One group of one sample, [S, C/G], stays in registers. PER_GROUP is a constant so that loads can be wide."""
    group, n = tl.program_id(0), tl.program_id(1).to(tl.int64)
    row, lane = tl.arange(0, ROWS), tl.arange(0, CHANNELS)
    live = lane < PER_GROUP
    mask = (row < S)[:, None] & live[None, :]
    channel = group * PER_GROUP + lane
    offset = row[:, None] * row_stride + channel[None, :] * channel_stride
    wait_for_previous_kernel(OVERLAP)
    v = tl.load(x + n * S * C + offset, mask=mask, other=0).to(tl.float32)
    shifted, weighted, biased = flags >> 1 & 1, flags >> 2 & 1, flags >> 3 & 1
    v += tl.load(shift + n * C + channel, mask=lane < PER_GROUP * shifted, other=0).to(tl.float32)[None, :]
    w = tl.load(weight + channel, mask=lane < PER_GROUP * weighted, other=0).to(tl.float32) + (1 - weighted)
    b = tl.load(bias + channel, mask=lane < PER_GROUP * biased, other=0).to(tl.float32)

    count = (S * PER_GROUP).to(tl.float32)
    v -= tl.sum(tl.where(mask, v, 0)) / count
    variance = tl.sum(tl.where(mask, v * v, 0)) / count
    v = v * (w * tl.rsqrt(variance + eps))[None, :] + b[None, :]
    if flags & 1 != 0:
        v = v * tl.sigmoid(v)
    tl.store(y + n * S * C + offset, v.to(y.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["S", "part_rows", "parts"])
def _moments(
    x: tl.tensor,
    moments: tl.tensor,
    S: tl.tensor,
    C: tl.tensor,
    row_stride: tl.tensor,
    channel_stride: tl.tensor,
    part_rows: tl.tensor,
    parts: tl.tensor,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
    OVERLAP: tl.constexpr,
) -> None:
    """Mean and M2 of every channel over part_rows rows of x, into moments [2, N, parts, C]."""
    blocks = tl.cdiv(C, CHANNELS)
    block, part, n = tl.program_id(0) % blocks, tl.program_id(0) // blocks, tl.program_id(1).to(tl.int64)
    row, channel = tl.arange(0, ROWS), block * CHANNELS + tl.arange(0, CHANNELS)
    live = channel < C
    rows = tl.minimum(part_rows, S - part * part_rows)
    start = x + n * S * C + (part * part_rows).to(tl.int64) * row_stride
    offset = row[:, None] * row_stride + channel[None, :] * channel_stride

    wait_for_previous_kernel(OVERLAP)
    pilot = tl.load(start + channel * channel_stride, mask=live, other=0).to(tl.float32)
    s1 = tl.zeros([ROWS, CHANNELS], tl.float32)
    s2 = tl.zeros([ROWS, CHANNELS], tl.float32)
    for done in tl.range(0, rows, ROWS, num_stages=3):
        mask = (row < rows - done)[:, None] & live[None, :]
        d = tl.where(mask, tl.load(start + offset, mask=mask, other=0).to(tl.float32) - pilot[None, :], 0)
        s1 += d
        s2 += d * d
        start += ROWS * row_stride

    count = rows.to(tl.float32)
    sum1, sum2 = tl.sum(s1, axis=0), tl.sum(s2, axis=0)
    to = moments + (n * parts + part) * C + channel
    tl.store(to, pilot + sum1 / count, mask=live)
    tl.store(to + tl.num_programs(1) * parts * C, sum2 - sum1 * sum1 / count, mask=live)


@triton.jit(do_not_specialize=["S", "part_rows", "parts", "flags"])
def _merge(
    moments: tl.tensor,
    table: tl.tensor,
    shift: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    S: tl.tensor,
    C: tl.tensor,
    part_rows: tl.tensor,
    parts: tl.tensor,
    eps: tl.tensor,
    flags: tl.tensor,
    ENTRIES: tl.constexpr,
    CHANNELS: tl.constexpr,
    OVERLAP: tl.constexpr,
) -> None:
    """Chan's formula over one group of moments [2, N, parts, C]; center, scale and offset go to table [3, N, C]."""
    group, n = tl.program_id(0), tl.program_id(1).to(tl.int64)
    per_group = C // tl.num_programs(0)
    first = n * C + group * per_group  # of the group's channels
    means = moments + n * parts * C + group * per_group
    m2s = means + tl.num_programs(1) * parts * C
    shifted, weighted, biased = flags >> 1 & 1, flags >> 2 & 1, flags >> 3 & 1
    entry, lane = tl.arange(0, ENTRIES), tl.arange(0, CHANNELS)
    entries = parts * per_group
    total = S.to(tl.float32) * per_group
    wait_for_previous_kernel(OVERLAP)

    s = tl.load(shift + first + lane, mask=lane < per_group * shifted, other=0).to(tl.float32)
    w = tl.load(weight + group * per_group + lane, mask=lane < per_group * weighted, other=0).to(tl.float32)
    b = tl.load(bias + group * per_group + lane, mask=lane < per_group * biased, other=0).to(tl.float32)
    pilot = tl.load(means)
    excess = tl.zeros([ENTRIES], tl.float32)
    m2 = tl.zeros([ENTRIES], tl.float32)
    for done in range(0, entries, ENTRIES):
        part, c = (done + entry) // per_group, (done + entry) % per_group
        mask = done + entry < entries
        count = tl.minimum(part_rows, S - part * part_rows).to(tl.float32)
        mean = tl.load(means + part * C + c, mask=mask, other=0)
        m2 += tl.load(m2s + part * C + c, mask=mask, other=0)
        mean += tl.load(shift + first + c, mask=done + entry < entries * shifted, other=0).to(tl.float32)
        excess += tl.where(mask, (mean - pilot) * count, 0)
    center = pilot + tl.sum(excess, axis=0) / total

    for done in range(0, entries, ENTRIES):
        part, c = (done + entry) // per_group, (done + entry) % per_group
        mask = done + entry < entries
        count = tl.minimum(part_rows, S - part * part_rows).to(tl.float32)
        gap = tl.load(means + part * C + c, mask=mask, other=0) - center
        gap += tl.load(shift + first + c, mask=done + entry < entries * shifted, other=0).to(tl.float32)
        m2 += tl.where(mask, gap * gap * count, 0)
    rstd = tl.rsqrt(tl.sum(m2, axis=0) / total + eps)

    plane = tl.num_programs(1) * C
    for done in range(0, per_group, CHANNELS):
        c = done + lane
        if done > 0:
            s = tl.load(shift + first + c, mask=c < per_group * shifted, other=0).to(tl.float32)
            w = tl.load(weight + group * per_group + c, mask=c < per_group * weighted, other=0).to(tl.float32)
            b = tl.load(bias + group * per_group + c, mask=c < per_group * biased, other=0).to(tl.float32)
        live = c < per_group
        tl.store(table + first + c, center - s, mask=live)
        tl.store(table + plane + first + c, rstd * (w + (1 - weighted)), mask=live)
        tl.store(table + 2 * plane + first + c, b, mask=live)


@triton.jit(do_not_specialize=["S", "rows", "flags"])
def _apply(
    x: tl.tensor,
    y: tl.tensor,
    table: tl.tensor,
    S: tl.tensor,
    C: tl.tensor,
    row_stride: tl.tensor,
    channel_stride: tl.tensor,
    rows: tl.tensor,
    flags: tl.tensor,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
    OVERLAP: tl.constexpr,
) -> None:
    """y = (x - center) * scale + offset for `rows` rows, and SiLU."""
    blocks = tl.cdiv(C, CHANNELS)
    which = tl.num_programs(0) - 1 - tl.program_id(0)  # backwards: the last rows are still in the L2 cache
    N = tl.num_programs(1)
    n = (N - 1 - tl.program_id(1)).to(tl.int64)
    block, begin = which % blocks, which // blocks * rows
    row, channel = tl.arange(0, ROWS), block * CHANNELS + tl.arange(0, CHANNELS)
    live = channel < C
    wait_for_previous_kernel(OVERLAP)
    center = tl.load(table + n * C + channel, mask=live, other=0)[None, :]
    scale = tl.load(table + (N + n) * C + channel, mask=live, other=0)[None, :]
    b = tl.load(table + (2 * N + n) * C + channel, mask=live, other=0)[None, :]

    start = n * S * C + begin.to(tl.int64) * row_stride
    offset = row[:, None] * row_stride + channel[None, :] * channel_stride
    for done in range(0, tl.minimum(rows, S - begin), ROWS):
        mask = (row < S - begin - done)[:, None] & live[None, :]
        v = tl.load(x + start + offset, mask=mask, other=0).to(tl.float32)
        v = (v - center) * scale + b
        if flags & 1 != 0:
            v = v * tl.sigmoid(v)
        tl.store(y + start + offset, v.to(y.dtype.element_ty), mask=mask)
        start += ROWS * row_stride


def _takes(x: Tensor, G: int, weight: Tensor | None, bias: Tensor | None, eps: float) -> bool:
    if not triton_takes(x) or x.dim() < 2 or x.numel() == 0 or G < 1 or x.shape[1] % G:
        return False
    N, C = x.shape[:2]
    fits = N < 65536 and x.shape[1:].numel() < 2**31  # a grid's second axis; offsets inside a sample
    return fits and all(
        p is None or (p.shape == (C,) and p.dtype == x.dtype and p.device == x.device) for p in (weight, bias)
    )


def _takes_shifted(x: Tensor, shift: Tensor, G: int, weight: Tensor | None, bias: Tensor | None, eps: float) -> bool:
    same = shift.dtype == x.dtype and shift.device == x.device and shift.dim() <= x.dim()
    return same and _takes(x, G, weight, bias, eps) and torch.broadcast_shapes(x.shape, shift.shape) == x.shape


def _like(x: Tensor, *rest: object) -> Tensor:
    return torch.empty_like(x)


def _like_sum(x: Tensor, shift: Tensor, *rest: object) -> Tensor:
    return torch.empty_like(x + shift)


define(
    "group_norm(Tensor x, int num_groups, Tensor? weight, Tensor? bias, float eps) -> Tensor",
    reference=group_norm_reference,
    supports=_takes,
    launch=_group_norm,
    fake=_like,
)
define(
    "group_norm_silu(Tensor x, int num_groups, Tensor? weight, Tensor? bias, float eps) -> Tensor",
    reference=group_norm_silu_reference,
    supports=_takes,
    launch=_group_norm_silu,
    fake=_like,
)
define(
    "add_group_norm_silu(Tensor x, Tensor shift, int num_groups, Tensor? weight, Tensor? bias, float eps) -> Tensor",
    reference=add_group_norm_silu_reference,
    supports=_takes_shifted,
    launch=_add_group_norm_silu,
    fake=_like_sum,
)
